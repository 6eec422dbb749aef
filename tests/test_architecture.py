"""Who may import what, and how heavy an import is."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tools import house

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rest_lightning"
ENGINE = ("models", "diffusion", "streaming", "metrics", "media")
PACKAGES = sorted(
    name
    for name, path in house.modules().items()
    if path.name == "__init__.py" and "lazy(" in path.read_text("utf-8")
)
RIM = (
    "rest_lightning.tasks",
    "rest_lightning.callbacks",
    "rest_lightning.data.module",
    "rest_lightning.lightning_cli",
)
LIGHTNING = ("lightning", "pytorch_lightning")
LIBRARIES = (
    "diffusers",
    "transformers",
    "torchvision",
    "torchmetrics",
    "lpips",
    "matplotlib",
    "decord",
    "scipy",
)
TEXT_SUFFIXES = {
    ".py",
    ".toml",
    ".txt",
    ".md",
    ".yaml",
    ".yml",
    ".json",
    ".html",
    ".js",
    ".css",
    ".sh",
    "",
}
# Written in two parts, so that this file does not contain what it looks for.
MACHINE_PATHS = tuple(
    "/" + rest for rest in ("work/", "root/", "opt/pypi", "opt/wheels", "home/runner")
)


def source_files() -> list[Path]:
    folders = ("rest_lightning", "callbacks", "benchmarks", "tests", "tools")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def loaded_after(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after running ``code``."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            (f"{code}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}})"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Who imports whom, wherever an import stands: at the top, in a function, for type checkers
    alone.
    """
    return house.import_graph()


def test_no_modules_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    assert house.circles(graph) == []


def test_nothing_imports_a_higher_floor(graph: dict[str, set[str]]) -> None:
    assert house.arrows_up(graph) == {}


def test_every_part_has_its_floor(graph: dict[str, set[str]]) -> None:
    """A new package or module says where it belongs: in `FLOORS` of tools/house.py."""
    assert {house.part_of(name) for name in graph} == {
        part for parts in house.FLOORS for part in parts
    }


def test_one_loop_takes_euler_steps() -> None:
    """And READ's, which goes through the clips of a video within every step."""
    places = sorted(house.euler_loops(house.shipped()))
    assert [place.partition(":")[0] for place in places] == ["generation.py", "sampling.py"]


def test_the_checks_see_circles_and_arrows_up(tmp_path: Path) -> None:
    files = {
        "__init__": "",
        "models/__init__": "",
        "models/a": "from rest_lightning.models import b",
        "models/b": "def late():\n    from rest_lightning.models.c import thing",
        "models/c": "if TYPE_CHECKING:\n    from rest_lightning.models.a import other",
        "media/__init__": "",
        "media/writer": "from rest_lightning.models.a import other",
    }
    for name, source in files.items():
        path = tmp_path / "rest_lightning" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    graph = house.import_graph(tmp_path)
    assert house.circles(graph) == [[f"rest_lightning.models.{name}" for name in "abc"]]
    up = "rest_lightning.media.writer imports rest_lightning.models.a"
    assert house.arrows_up(graph) == {("media", "models"): [up]}


@pytest.mark.parametrize("folder", ENGINE)
def test_engine_source_never_names_lightning(folder: str) -> None:
    found = [
        f"{module}:{line} imports {target}"
        for module, path in house.modules().items()
        if house.part_of(module) == folder
        for line, target in house.imports_of(module, path)
        if is_within(target, (*LIGHTNING, *RIM))
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


def test_modules_at_the_rim_can_be_imported_first() -> None:
    """Each in a process that holds torch alone: torchvision must have been imported before anything
    asks for lightning, which would fail to import it.
    """
    loaded_after("""
import importlib, os, sys, torch

class Look:
    def find_spec(self, name, path=None, target=None):
        if name == "lightning":
            os._exit("torchvision" not in sys.modules)

sys.meta_path.insert(0, Look())
for name in ("tasks.vae", "callbacks.previews", "data.module", "lightning_cli"):
    child = os.fork()
    if child == 0:
        importlib.import_module(f"rest_lightning.{name}")
        os._exit(2)  # nobody has asked
    assert os.waitpid(child, 0)[1] == 0, name
""")


@pytest.mark.parametrize(
    "module", ["rest_lightning", "rest_lightning.errors", "rest_lightning.constants"]
)
def test_the_package_itself_is_light(module: str) -> None:
    assert not loaded_after(f"import {module}") & {"torch", *LIGHTNING, *LIBRARIES}


def test_the_check_sees_through_relative_imports() -> None:
    source = "from ..tasks import vae\nfrom . import causal\nimport lightning.pytorch as pl"
    path = PACKAGE / "models" / "any.py"
    found = [module for _, module in house.imports_of("rest_lightning.models.any", path, source)]
    assert found == [
        "rest_lightning.tasks.vae",
        "rest_lightning.models.causal",
        "lightning.pytorch",
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("*.py")), ids=name)
def test_callbacks_import_the_package_relatively(path: Path) -> None:
    absolute = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        absolute += [
            module for module in names if is_within(module, ("rest_lightning", "callbacks"))
        ]
    assert not absolute, (
        f"expected relative imports, got {absolute}: write `from ..streaming.writer import ...`"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_export_what_type_checkers_see(package: str) -> None:
    """Each public name is found, and the imports for type checkers name the same ones."""
    module = importlib.import_module(package)
    path = house.modules()[package]
    seen = {
        target.rpartition(".")[2]
        for _, target in house.imports_of(package, path)
        if target.count(".") > 1
    }
    hidden = {"TYPE_CHECKING", "lazy", "accept_old_names", "ensure_torchvision", "VERSION"}
    assert set(module.__all__) == seen - hidden
    assert all(getattr(module, name).__name__ == name for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


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
