"""The package as it is installed: the place of callbacks/, wheel, version, bounds and pins."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
# Import names that differ from the names on the package index.
DISTRIBUTION = {
    "PIL": "pillow",
    "skia": "skia-python",
    "cv2": "opencv-contrib-python",
    "yaml": "pyyaml",
    "livekit": "livekit-agents",
    "c2pa": "c2pa-python",
    "pipecat": "pipecat-ai",
}
# Imported, but certain to be there: what a declared requirement cannot be installed without.
IMPLIED = {
    "torchvision": "lpips",
    "yaml": "jsonargparse",
    "huggingface_hub": "transformers",
    "packaging": "lightning",
    "aiortc": "pipecat-ai",  # of its extra for WebRTC; its absence is caught
}
# Only these files may import what an extra installs.
EXTRA_FILES = {
    "app": "rest_lightning/integrations/gradio.py",
    "synthetic": "rest_lightning/data/synthetic/",
    "provenance": "rest_lightning/media/provenance.py",
    "prepare": ("rest_lightning/data/preparation/", "rest_lightning/data/animated/"),
    "ray": (
        "rest_lightning/data/preparation/",
        "rest_lightning/serve/",
        "rest_lightning/ray_cluster.py",
    ),
    "serve": "rest_lightning/serve/",
    "completion": "rest_lightning/commands/completion.py",
    "metrics": "rest_lightning/evaluation/clips.py",
    "livekit": "rest_lightning/integrations/livekit.py",
    "pipecat": "rest_lightning/integrations/pipecat.py",
    # Triton: the engine looks for it before it imports this file.
    "test": "rest_lightning/models/fused.py",
}
# Extras that exclude `prepare`, which constraints.txt holds: they have an environment of their own.
APART = ("livekit", "pipecat", "test-agents")
# Not pinned: a CUDA build of torch brings the release that it fits.
UNPINNED = {"triton"}
OURSELVES = "rest-lightning"  # an extra may ask for others


def requirements(extra: str | None = None) -> list[Requirement]:
    return [
        Requirement(line)
        for line in (EXTRAS[extra] if extra else PROJECT["project"]["dependencies"])
    ]


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def package_folders() -> dict[str, Path]:
    """Import names of all packages in the tree and where they lie."""
    found = {
        "rest_lightning.callbacks": ROOT / "callbacks",
        "rest_lightning.configs": ROOT / "configs",
    }
    for path in (ROOT / "rest_lightning").rglob("*.py"):
        found[".".join(path.parent.relative_to(ROOT).parts)] = path.parent
    return found


def test_every_package_is_listed() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(package_folders())


def test_callbacks_are_mapped_from_the_top_level() -> None:
    package = importlib.import_module("rest_lightning.callbacks")
    assert Path(str(package.__file__)).resolve() == ROOT / "callbacks" / "__init__.py"


def test_type_checkers_find_the_package_and_its_callbacks() -> None:
    """Also in an editable install: a plain path leads to it, and py.typed lies there."""
    from mypy.modulefinder import FindModuleCache, SearchPaths, get_search_dirs

    folders = tuple(folder for group in get_search_dirs(sys.executable) for folder in group)
    paths = SearchPaths((), (), package_path=folders, typeshed_path=())
    finder = FindModuleCache(paths, None, None)
    for name, file in (
        ("rest_lightning", ROOT / "rest_lightning" / "__init__.py"),
        ("rest_lightning.callbacks", ROOT / "callbacks" / "__init__.py"),
        ("rest_lightning.callbacks.averaging", ROOT / "callbacks" / "averaging.py"),
    ):
        found = finder.find_module(name)
        assert isinstance(found, str), f"{name}: {found}; pip install -e . again"
        assert Path(found).resolve() == file
    assert (ROOT / "rest_lightning" / "py.typed").is_file()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "callbacks").glob("[!_]*.py")), ids=lambda path: path.stem
)
def test_callback_classes_exist_once(path: Path) -> None:
    module = importlib.import_module(f"rest_lightning.callbacks.{path.stem}")
    assert Path(str(module.__file__)).resolve() == path
    assert sys.modules[module.__name__] is module
    for cls in vars(module).values():
        if inspect.isclass(cls) and cls.__module__.split(".")[0] in ("callbacks", "rest_lightning"):
            assert cls.__module__.startswith("rest_lightning."), (
                f"{cls} was imported under a second name"
            )
    assert f"callbacks.{path.stem}" not in sys.modules


def test_version_is_told_once() -> None:
    assert importlib.metadata.version("rest_lightning") == PROJECT["project"]["version"]
    package = importlib.import_module("rest_lightning")
    assert (
        getattr(package, "__version__", PROJECT["project"]["version"])
        == PROJECT["project"]["version"]
    )


def test_command_is_installed() -> None:
    (command,) = (
        e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "rest"
    )
    assert command.value == "rest_lightning.cli:main"


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a copy: building in the repository would leave build/ behind
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("rest_lightning", "callbacks", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
    ]
    done = subprocess.run(
        [*pip, "--no-index", "-w", str(tmp_path), str(tree)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 100_000_000  # what the index takes
    files = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in package_folders().items()
        for path in folder.glob("*.py")
    }
    assets = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "rest_lightning" / "assets").rglob("*")
        if path.suffix in {".safetensors", ".json", ".png", ".wav"}
    }
    configs = {
        f"rest_lightning/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert files >= modules | assets | configs | {
        "rest_lightning/py.typed",
        "rest_lightning/media/page.html",
    }
    assert {name.split("/")[0].split("-")[0] for name in files} == {"rest_lightning"}
    assert not any(name.startswith("callbacks/") for name in files)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--help"], 0, r"tools/newcomer.sh \[--over VENV\] \[WAY\.\.\.\]"),
        (["no-such"], 2, r"error: expected a way of .*\bwheel\b.*, got no-such"),
    ],
)
def test_newcomer_tells_its_ways(words: list[str], code: int, text: str) -> None:
    done = subprocess.run(
        [ROOT / "tools" / "newcomer.sh", *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert re.search(text, done.stdout + done.stderr)


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_malicious_lightning_releases_are_excluded(version: str) -> None:
    (lightning,) = (r for r in requirements() if r.name == "lightning")
    assert version not in lightning.specifier
    for name in ("lightning", "pytorch-lightning"):
        assert Version(version) not in constraints()[name].specifier


def test_every_bound_has_its_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text("utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.strip().startswith('"') and any(mark in line for mark in (">=", "==")):
            assert "#" in line or lines[number - 1].strip().startswith("#"), (
                f"no reason beside {line.strip()}"
            )


def test_constraints_are_exact_and_satisfy_every_bound() -> None:
    pins = constraints()
    for pin in pins.values():
        assert [part.operator for part in pin.specifier] == ["=="], (
            f"expected an exact pin, got {pin}"
        )
        assert pin.url is None
    extras = [extra for extra in EXTRAS if extra not in APART]
    asked = [*requirements(), *(r for extra in extras for r in requirements(extra))]
    unpinned = {OURSELVES, *UNPINNED}
    for requirement in (r for r in asked if canonicalize_name(r.name) not in unpinned):
        (exact,) = pins[canonicalize_name(requirement.name)].specifier
        assert exact.version in requirement.specifier, (
            f"{requirement} excludes the pin {exact.version}"
        )


def closure(roots: list[Requirement]) -> set[str]:
    """Names of all installed distributions that the requirements bring along, torch's own left
    out.
    """
    names: set[str] = set()
    todo = [(r, extra) for r in roots for extra in (r.extras or {""})]
    seen = set()
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen or (
            requirement.marker and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        seen.add((name, extra))
        names.add(name)
        if name == "torch":  # its CUDA packages differ from build to build; torch pins them itself
            continue
        environment: dict[str, str | AbstractSet[str]] = {"extra": extra}
        for line in importlib.metadata.requires(name) or []:
            child = Requirement(line)
            if child.marker is None or child.marker.evaluate(environment):
                child.marker = None
                todo += [(child, e) for e in {"", *child.extras}]
    return names


def test_constraints_cover_what_is_installed() -> None:
    needed = closure([*requirements(), *requirements("test")]) - {OURSELVES, *UNPINNED}
    assert not needed - set(constraints()), (
        "add the versions that `pip freeze` shows to constraints.txt"
    )


def imported_names(path: Path) -> dict[str, bool]:
    """Third-party names that a file imports, each with whether every import of it stands in a
    ``try`` block.
    """
    tree = ast.parse(path.read_text("utf-8"))
    lines = [line for block in ast.walk(tree) if isinstance(block, ast.Try) for line in block.body]
    tried = {node for line in lines for node in ast.walk(line)}
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        for name in names:
            top = name.split(".")[0]
            found[top] = found.get(top, True) and node in tried
    ours = {*sys.stdlib_module_names, "rest_lightning", "__future__"}
    return {name: optional for name, optional in found.items() if name not in ours}


def test_every_import_is_a_declared_requirement() -> None:
    """An extra's packages may be imported in that extra's files, elsewhere only where their absence
    is caught.
    """
    required = {canonicalize_name(r.name) for r in requirements()}
    of_extra = {
        extra: {canonicalize_name(r.name) for r in requirements(extra)} for extra in EXTRA_FILES
    }
    undeclared = []
    for path in [*(ROOT / "rest_lightning").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        where = path.relative_to(ROOT).as_posix()
        for name, optional in imported_names(path).items():
            extras = [
                extra
                for extra, prefix in EXTRA_FILES.items()
                if optional or where.startswith(prefix)
            ]
            allowed = required.union(*(of_extra[extra] for extra in extras))
            distribution = canonicalize_name(DISTRIBUTION.get(name, name))
            if (
                distribution not in allowed
                and canonicalize_name(IMPLIED.get(name, "")) not in allowed
            ):
                undeclared.append(f"{where} imports {name}")
    assert not undeclared, "\n".join(undeclared)
