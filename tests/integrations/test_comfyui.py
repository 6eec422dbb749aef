"""The nodes against ComfyUI's interface: inputs, outputs, the values between nodes, the workflow.

ComfyUI is not on the package index. What the nodes use of its modules (a progress bar, whether the
run was cancelled, the temporary folder, a video from a file) is stood in for as documented.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from stills import face
from tiny_head import make_head

from rest_lightning.errors import UserError
from rest_lightning.integrations.comfyui import LoadModel, Talk, as_picture, as_speech

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "comfyui"
BUILT_IN = {"IMAGE", "AUDIO", "VIDEO", "INT", "FLOAT", "STRING", "BOOLEAN"}


class Interrupted(Exception):
    """What ComfyUI raises when its user cancels."""


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    state = SimpleNamespace(total=0, shown=[], is_cancelled=False, temp=tmp_path / "temp")

    class ProgressBar:
        def __init__(self, total: int) -> None:
            state.total = total

        def update(self, value: int) -> None:
            state.shown.append(value)

    def throw() -> None:
        if state.is_cancelled:
            raise Interrupted

    names: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_management": {"throw_exception_if_processing_interrupted": throw},
        "comfy_api": {},
        "comfy_api.latest": {"InputImpl": SimpleNamespace(VideoFromFile=lambda file: file)},
        "folder_paths": {"get_temp_directory": lambda: str(state.temp)},
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return state


def picture(side: int = 96) -> torch.Tensor:
    return torch.from_numpy(np.array(face(side, side))).float()[None] / 255


def sound(seconds: float = 1.5, rate_hz: int = 44_100) -> dict[str, Any]:
    times = torch.arange(round(seconds * rate_hz)) / rate_hz
    wave = 0.3 * torch.sin(2 * torch.pi * 220 * times)
    return {"waveform": wave.expand(1, 2, -1), "sample_rate": rate_hz}


def test_frames_and_video_are_what_comfyui_passes_on(comfy: SimpleNamespace) -> None:
    (images, video) = Talk().talk(make_head(), picture(), sound(), seed=3, frame="photo")
    assert images.shape == (38, 96, 96, 3)  # 1.5 s are 37.5 frames
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert (comfy.total, sum(comfy.shown)) == (38, 38)
    with av.open(video) as container:
        assert "trainedAlgorithmicMedia" in container.metadata["comment"]
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (38, Fraction(25))
        shown = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(stream)])
    # brightness alone: H.264 halves the resolution of the colours, which are noise here
    greys = images.numpy() @ np.array([0.299, 0.587, 0.114], np.float32)
    assert np.corrcoef(shown.ravel(), greys.ravel())[0, 1] > 0.97
    with av.open(video) as container:
        length = sum(frame.samples for frame in container.decode(audio=0))
    assert abs(length - 24_000) < 2 * 1024
    assert Path(video).parent == comfy.temp


def test_the_seed_and_the_steps_count(comfy: SimpleNamespace) -> None:
    head, speech = make_head(), sound(0.3)
    one, again, other, longer = (
        Talk().talk(head, picture(), speech, seed=seed, steps=steps)[0]
        for seed, steps in ((1, 0), (1, 0), (2, 0), (1, 3))
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, longer)


def test_cancelling_ends_the_run_and_leaves_no_file(comfy: SimpleNamespace) -> None:
    comfy.is_cancelled = True
    with pytest.raises(Interrupted):
        Talk().talk(make_head(), picture(), sound(), seed=0)
    assert list(comfy.temp.iterdir()) == []


def test_pictures_and_sound_are_read_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    assert np.array_equal(as_picture(torch.from_numpy(pixels).float()[None] / 255), pixels)
    speech = as_speech(sound(1.0))
    times = np.arange(16_000) / 16_000
    expected = 0.3 * np.sin(2 * np.pi * 220 * times)
    assert abs(len(speech) - 16_000) <= 1
    assert np.abs(speech[200:15_800] - expected[200:15_800]).max() < 1e-3


def test_batches_and_empty_sound_are_told_in_one_line() -> None:
    with pytest.raises(UserError, match=r"one portrait.*got \(2, 96, 96, 3\)"):
        as_picture(picture().repeat(2, 1, 1, 1))
    with pytest.raises(UserError, match=r"one sound.*got \(1, 2, 0\)"):
        as_speech({"waveform": torch.zeros(1, 2, 0), "sample_rate": 44_100})
    with pytest.raises(UserError, match="expected a model folder"):
        LoadModel().load("no/such/folder", "cpu", "float32")


def load_folder() -> ModuleType:
    """The folder as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location("custom_nodes_rest", FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_has_what_comfyui_looks_for() -> None:
    module = load_folder()
    assert set(module.NODE_CLASS_MAPPINGS) == set(module.NODE_DISPLAY_NAME_MAPPINGS)
    for node in module.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        names = [name for group in inputs.values() for name in group]
        method = getattr(node, node.FUNCTION)
        parameters = method.__code__.co_varnames[1 : method.__code__.co_argcount]
        assert list(parameters) == names
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        for kind, *_ in (spec for group in inputs.values() for spec in group.values()):
            assert isinstance(kind, list) or kind in BUILT_IN | {"REST_MODEL"}


def test_the_workflow_fits_the_nodes() -> None:
    workflow = json.loads((FOLDER / "example_workflows" / "talk.json").read_text("utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, out_slot, target, in_slot, kind in workflow["links"]:
        end, begin = nodes[target]["inputs"][in_slot], nodes[source]["outputs"][out_slot]
        assert (begin["type"], end["type"], end["link"]) == (kind, kind, number)
        assert number in begin["links"]
    classes = load_folder().NODE_CLASS_MAPPINGS
    ours = [node for node in nodes.values() if node["type"] in classes]
    assert len(ours) == len(classes)
    for node in ours:
        cls = classes[node["type"]]
        inputs = {n: spec for group in cls.INPUT_TYPES().values() for n, spec in group.items()}
        sockets = [name for name, spec in inputs.items() if len(spec) == 1]
        assert [each["name"] for each in node["inputs"]] == sockets
        assert [each["type"] for each in node["outputs"]] == list(cls.RETURN_TYPES)
        # ComfyUI puts what becomes of a seed after each run behind it
        values = [value for value in node["widgets_values"] if value != "fixed"]
        widgets = [spec for spec in inputs.values() if len(spec) == 2]
        for value, (kind, options) in zip(values, widgets, strict=True):
            assert value == options["default"]
            assert value in kind if isinstance(kind, list) else kind in BUILT_IN
