"""What holds for every test: one thread, no network, fixed seeds, markers that skip themselves."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports torch or a hub client. One thread: tiny tensors gain nothing from two, and
# one is repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", MPLBACKEND="Agg"
)

# Triton's kernels run in its interpreter where there is no GPU; it looks when it is first imported.
if not any(map(Path.exists, map(Path, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")))):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import argparse
import ipaddress
import random
import socket
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rest_lightning.torchvision_compat import ensure_torchvision

# pytest-xdist imports the modules of the warnings that its workers send, lightning among them.
ensure_torchvision()

WEIGHTS_VARIABLE = "REST_LIGHTNING_WEIGHTS"


def _is_local(host: Any) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def offline_guard() -> Iterator[None]:
    """Fail the test that looks up or connects to anything but this machine.

    ``pytest.fail`` raises a BaseException, so a library that swallows connection errors cannot hide
    the attempt.
    """
    patch = pytest.MonkeyPatch()

    def guarded(original: Any, host_of: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            host = host_of(*args)
            if not _is_local(host):
                pytest.fail(f"tests stay offline, but one tried to reach {host!r}")
            return original(*args, **kwargs)

        return call

    def address_host(sock: socket.socket, address: Any, *_: Any) -> Any:
        return address[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else None

    for name in ("connect", "connect_ex"):
        patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name), address_host))
    patch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, lambda host, *_: host))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seed the global generators; torch only where the test module imported it.

    float32 is float32: convolutions on CUDA round to the 10 bits of TF32 unless told otherwise.
    """
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def drawn_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name, this process takes the drawn model and its portraits: programs of the pages
    run as they stand, in a fraction of the time.
    """
    import drawn

    monkeypatch.setattr("rest_lightning.talking_head.DEFAULT_FOLDER", drawn.FOLDER)


@pytest.hookimpl(trylast=True)  # after the choice of marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run; the reasons stand in the summary.

    Files whose tests share the recipe's stages come first, and thus to one process of pytest-xdist,
    which alone trains them.
    """
    sharing = {item.path for item in items if "recipe" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in sharing)
    weights = os.environ.get(WEIGHTS_VARIABLE)
    for item in items:
        if marker := item.get_closest_marker("real_weights"):
            missing = [
                name for name in marker.args if not (weights and any(Path(weights).glob(name)))
            ]
            if missing:
                reason = (
                    f"expected {' and '.join(missing)} in the folder that {WEIGHTS_VARIABLE} "
                    "names, got none"
                )
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six synthetic talkers of 57 frames, 64x64: four train, one val, one test. Read only."""
    for name in ("espeakng_loader", "skia"):
        pytest.importorskip(
            name, reason=f"{name} (extra `synthetic`) renders the clips that stages are tested on"
        )
    from rest_lightning.data.synthetic.synthesize import synthesize

    root = tmp_path_factory.mktemp("talkers") / "data"
    return synthesize(root, 6, 64, 57, num_workers=1, val_fraction=0.17, test_fraction=0.17)


class Recipe:
    """Runs the stages of `rest train-embedded` at tiny size, in this process, from the real
    configuration files.

    One stage more, which that command leaves out, starts from ``asd``: ``rollout``.

    Args:
        out: folder of the stages, ``out / <stage>`` each.
        data: prepared clips.
        repository: where ``configs/`` is.
    """

    def __init__(self, out: Path, data: Path, repository: Path) -> None:
        self.out, self.data, self.configs = out, data, repository / "configs"
        from rest_lightning.commands.train_embedded import STAGES, VAE_STAGE, Stage

        initial = {"transformer": "asd", "speech_ae": "asd"}
        rollout = Stage("rollout", 0.0, initial, "teacher", uses_latents=True)
        self.vae_stage = VAE_STAGE
        self.stages = {stage.name: stage for stage in (*STAGES, rollout)}
        self.used: set[Path] = set()
        self.clis: dict[str, Any] = {}

    def final(self, stage: str) -> Path:
        """Final checkpoint of a stage."""
        return self.out / stage / "final.ckpt"

    def run(
        self,
        stage: str,
        out: Path,
        *args: str,
        overlays: tuple[Path, ...] = (),
        command: str = "fit",
    ) -> Any:
        """`rest fit` of one stage into ``out``; returns the CLI with its trainer and model."""
        from rest_lightning import lightning_cli

        return lightning_cli.run(self.words(stage, out, *args, overlays=overlays, command=command))

    def words(
        self,
        stage: str,
        out: Path,
        *args: str,
        overlays: tuple[Path, ...] = (),
        command: str = "fit",
    ) -> list[str]:
        """The command line of `run`.

        The stage starts where the recipe says, from ``self.final`` of the stages before.
        ``overlays`` are further configuration files, behind what the recipe says; ``args`` come
        last on the command line.
        """
        from rest_lightning.config import read_config

        files = (f"embedded/{stage}", "trainer/tiny", "model/tiny", "data/tiny")
        for file in (*files, *overlays):
            self.used.update(path for path, _ in read_config(file).sources)
        words = [command, *(word for file in files for word in ("--config", file))]
        initial = dict(self.stages[stage].initial)
        if self.stages[stage].uses_latents:
            initial["vae"] = self.vae_stage
        words += [
            f"--model.initial.{part}={self.final(source)}" for part, source in initial.items()
        ]
        if (teacher := self.stages[stage].teacher) is not None:
            words += [f"--model.asd.teacher={self.final(teacher)}"]
        if (source := self.stages[stage].source) is not None:
            words += [f"--model.distill.source={self.final(source)}"]
        words += [word for overlay in overlays for word in ("--config", str(overlay))]
        words += ["--trainer.default_root_dir", str(out), "--data.data_dir", str(self.data)]
        return [*words, *args]


@pytest.fixture(scope="session")
def recipe_class() -> type[Recipe]:
    """For a recipe on other clips: in importlib mode tests cannot import this file."""
    return Recipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, talkers: Path, repository: Path) -> Recipe:
    """All stages after three steps each, their CLIs in ``clis``. Read only."""
    recipe = Recipe(tmp_path_factory.mktemp("recipe"), talkers, repository)
    for stage in recipe.stages:
        recipe.clis[stage] = recipe.run(stage, recipe.out / stage)
    return recipe


@pytest.fixture(scope="session")
def model_folder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's student as an exported model folder: 64x64, two Euler steps, no guidance. Read
    only.
    """
    from rest_lightning.commands import export

    folder = tmp_path_factory.mktemp("model") / "tiny"
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    words = [
        str(recipe.final("asd")),
        "--vae",
        str(recipe.final(recipe.vae_stage)),
        "--out",
        str(folder),
    ]
    words += [
        "--size-px",
        "64",
        "--num-steps",
        "2",
        "--guidance",
        "1",
        "--shift",
        "1",
        "--dtype",
        "float32",
    ]
    assert export.run(parser.parse_args(words)) == 0
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Three portraits and speeches of 1.5, 1.3 and 0.9 s."""
    import wave

    from stills import face

    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    pairs = []
    for i, duration_s in enumerate((1.5, 1.3, 0.9)):
        portrait, speech = folder / f"portrait-{i}.png", folder / f"speech-{i}.wav"
        face(index=i).save(portrait)
        with wave.open(str(speech), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(
                rng.normal(scale=3000, size=round(16_000 * duration_s)).astype("<i2").tobytes()
            )
        pairs.append({"portrait": str(portrait), "speech": str(speech)})
    return pairs
