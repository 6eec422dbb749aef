"""Measures of the code base: circles and directions of imports, size of the wheel, loops and lines
that stand twice.

``python -m tools.house [ROOT]`` prints a Markdown table; the tests hold the imports to
:data:`FLOORS`.
"""

from __future__ import annotations

import argparse
import ast
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "rest_lightning"
# From the lowest floor to the highest: a package or module imports what stands on its own floor or
# below.
FLOORS = (
    (
        "config",
        "constants",
        "errors",
        "extras",
        "machine",
        "names",
        "options",
        "processes",
        "ray_cluster",
        "terminal",
        "torchvision_compat",
    ),
    ("hub", "media", "model_folder"),
    ("models", "metrics"),
    ("diffusion", "data"),
    ("parts", "model_card", "evaluation"),
    ("streaming",),
    ("talking_head",),
    ("generation", "avatar"),
    ("tasks", "serve"),
    ("callbacks", "integrations"),
    ("lightning_cli", "commands"),
    ("cli", "__main__"),
    ("",),  # the package itself, which lends names of all floors
)


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Returns full name -> file of everything that is installed, ``callbacks/`` under its import
    name.
    """
    found = {}
    for folder, prefix in ((root / PACKAGE, PACKAGE), (root / "callbacks", f"{PACKAGE}.callbacks")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            names = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((prefix, *names))] = path
    return found


def imports_of(name: str, path: Path, source: str | None = None) -> Iterator[tuple[int, str]]:
    """Yields line and full name of everything that a file imports: at the top, in functions, for
    type checkers.
    """
    base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8") if source is None else source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Returns module -> modules of the package that it imports; a name counts for the module that
    it is taken from.
    """
    known = modules(root)
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = (
            full if full in known else full.rpartition(".")[0] for _, full in imports_of(name, path)
        )
        graph[name] = {target for target in targets if target in known and target != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of modules that import each other, directly or through others."""
    reachable = {name: _reachable(graph, name) for name in graph}
    found, seen = [], set[str]()
    for name in graph:
        group = {other for other in reachable[name] if name in reachable[other]}
        if group and name not in seen:
            seen |= group
            found.append(sorted(group))
    return found


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found, waiting = set[str](), list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def part_of(module: str) -> str:
    """Returns the name that :data:`FLOORS` has for a module: its package below the top, or its
    own.
    """
    return module.partition(".")[2].partition(".")[0]


def arrows_up(graph: dict[str, set[str]]) -> dict[tuple[str, str], list[str]]:
    """Returns (lower part, higher part) -> the imports between them; parts without a floor are left
    out.
    """
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    found: dict[tuple[str, str], list[str]] = {}
    for name, targets in graph.items():
        for target in sorted(targets):
            low, high = part_of(name), part_of(target)
            if low in floor and high in floor and floor[low] < floor[high]:
                found.setdefault((low, high), []).append(f"{name} imports {target}")
    return found


def shipped(root: Path = ROOT) -> list[Path]:
    """Returns the Python files of the wheel, as pyproject.toml lists its packages."""
    setup = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = setup["package-dir"]
    return [
        path
        for package in setup["packages"]
        for path in sorted((root / folders.get(package, package.replace(".", "/"))).glob("*.py"))
    ]


def euler_loops(files: list[Path]) -> list[str]:
    """Returns the places where a loop takes Euler steps, the innermost loops alone."""
    found = []
    for path in files:
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        loops = [node for node in nodes if isinstance(node, ast.For | ast.While) and _steps(node)]
        inner = {
            id(each)
            for loop in loops
            for each in ast.walk(loop)
            if each is not loop and each in loops
        }
        outer = [
            loop
            for loop in loops
            if not any(id(each) in inner for each in ast.walk(loop) if each is not loop)
        ]
        found += [f"{path.name}:{loop.lineno}" for loop in outer]
    return found


def _steps(node: ast.AST) -> bool:
    calls = (each.func for each in ast.walk(node) if isinstance(each, ast.Call))
    return any(isinstance(call, ast.Name) and call.id == "euler_step" for call in calls)


def repeated_lines(folder: Path) -> tuple[int, int]:
    """Returns how many lines of the YAML files in a folder stand in more than one of them, and how
    many there are.
    """
    lines = [
        {
            line.strip()
            for line in path.read_text("utf-8").splitlines()
            if line.strip() and line.strip()[0] != "#"
        }
        for path in sorted(folder.glob("*.yaml"))
    ]
    counts = Counter(line for each in lines for line in each)
    return sum(count for count in counts.values() if count > 1), sum(counts.values())


def num_lines(path: Path) -> int:
    """Returns how many lines a text file has."""
    return len(path.read_text("utf-8").splitlines())


def num_statements(path: Path) -> int:
    """Returns how many statements a module has, docstrings included, however it is formatted."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return sum(isinstance(node, ast.stmt) for node in nodes)


def measures(root: Path = ROOT) -> dict[str, str]:
    """Returns what the table says."""
    graph, files = import_graph(root), shipped(root)
    rim = [
        *sorted((root / PACKAGE / "tasks").glob("*.py")),
        *sorted((root / "callbacks").glob("*.py")),
    ]
    repeated, total = repeated_lines(root / "configs" / "embedded")
    return {
        "circles of imports between modules": str(len(circles(graph))),
        "arrows up between packages": str(len(arrows_up(graph))),
        "Python files in the wheel": str(len(files)),
        "lines of Python shipped": f"{sum(map(num_lines, files)):,}",
        "statements of Python shipped": f"{sum(map(num_statements, files)):,}",
        "Euler loops in the package": str(len(euler_loops(files))),
        "`trainer.datamodule` in tasks and callbacks": str(
            sum(path.read_text("utf-8").count("trainer.datamodule") for path in rim)
        ),
        "lines that stand in more than one file of configs/embedded": f"{repeated} of {total}",
        "README, words": f"{len((root / 'README.md').read_text('utf-8').split()):,}",
    }


def main(args: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "root", type=Path, nargs="?", default=ROOT, help=("a checkout (default: this one)")
    )
    for name, value in measures(parser.parse_args(args).root).items():
        print(f"| {name} | {value} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
