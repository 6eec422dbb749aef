"""Who may import what, and how heavy an import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rest_lightning"
ENGINE = ("models", "diffusion", "streaming", "metrics")
RIM = ("rest_lightning.tasks", "rest_lightning.callbacks", "rest_lightning.data.module", "rest_lightning.cli")
LIGHTNING = ("lightning", "pytorch_lightning")
LIBRARIES = ("diffusers", "transformers", "torchvision", "torchmetrics", "lpips", "matplotlib", "decord", "scipy")
TEXT_SUFFIXES = {".py", ".toml", ".txt", ".md", ".yaml", ".yml", ".json", ".html", ".js", ".css", ".sh", ""}
# Written in two parts, so that this file does not contain what it looks for.
MACHINE_PATHS = tuple("/" + rest for rest in ("work/", "root/", "opt/pypi", "opt/wheels", "home/runner"))


def source_files() -> list[Path]:
    folders = ("rest_lightning", "callbacks", "benchmarks", "tests")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: Path, source: str | None = None) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a file imports, at the top or inside functions."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text("utf-8") if source is None else source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def loaded_after(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after running ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}})"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("folder", ENGINE)
def test_engine_source_never_names_lightning(folder: str) -> None:
    found = [
        f"{name(path)}:{line} imports {module}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for line, module in imported_modules(path)
        if is_within(module, (*LIGHTNING, *RIM))
    ]
    assert not found, "\n".join(found)


def test_importing_the_whole_engine_loads_no_lightning() -> None:
    modules = [
        "rest_lightning." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        for folder in ENGINE
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    loaded = loaded_after("\n".join(f"import {module}" for module in modules))
    assert not loaded & set(LIGHTNING)


@pytest.mark.parametrize("module", ["tasks.vae", "callbacks.previews", "data.module"])
def test_modules_at_the_rim_can_be_imported_first(module: str) -> None:
    """Each in a fresh interpreter: torchvision must be made importable before lightning asks for it."""
    assert "lightning" in loaded_after(f"import rest_lightning.{module}")


@pytest.mark.parametrize("module", ["rest_lightning", "rest_lightning.errors", "rest_lightning.constants"])
def test_the_package_itself_is_light(module: str) -> None:
    assert not loaded_after(f"import {module}") & {"torch", *LIGHTNING, *LIBRARIES}


def test_the_check_sees_through_relative_imports() -> None:
    source = "from ..tasks import vae\nfrom . import causal\nimport lightning.pytorch as pl"
    found = [module for _, module in imported_modules(PACKAGE / "models" / "any.py", source)]
    assert found == ["rest_lightning.tasks.vae", "rest_lightning.models.causal", "lightning.pytorch"]


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("*.py")), ids=name)
def test_callbacks_import_the_package_relatively(path: Path) -> None:
    absolute = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        absolute += [module for module in names if is_within(module, ("rest_lightning", "callbacks"))]
    assert not absolute, f"expected relative imports, got {absolute}: write `from ..streaming.writer import ...`"


def committed_files() -> list[Path]:
    """What git tracks; without git (an unpacked archive) the folders that the project ships."""
    done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 0 and done.stdout:
        return [ROOT / entry for entry in done.stdout.split("\0") if entry]
    return [*source_files(), *ROOT.glob("*.*"), *(ROOT / "configs").rglob("*.yaml")]


def test_no_paths_of_one_machine() -> None:
    found = [
        f"{name(path)} contains {marker}"
        for path in committed_files()
        if path.is_file() and path.suffix in TEXT_SUFFIXES
        for marker in MACHINE_PATHS
        if marker in path.read_text("utf-8", errors="ignore")
    ]
    assert not found, "\n".join(found)
