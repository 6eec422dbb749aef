"""Sync-C, Sync-D and offset against a plain reading of the reference's steps, on random weights and
known shifts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rest_lightning.errors import UserError
from rest_lightning.metrics.extractors import SyncNetExtractor, load_extractor, mfcc_windows
from rest_lightning.metrics.sync import SyncScore, sync_of_clip, sync_of_embeddings
from rest_lightning.metrics.syncnet import SyncNet, mfcc, to_int16
from rest_lightning.metrics.weights import VARIABLE

# (name, shape) of the published tensors; weights and biases of layers without norms.
PUBLISHED = {
    "netcnnaud.0": (64, 1, 3, 3),
    "netcnnaud.4": (192, 64, 3, 3),
    "netcnnaud.8": (384, 192, 3, 3),
    "netcnnaud.11": (256, 384, 3, 3),
    "netcnnaud.14": (256, 256, 3, 3),
    "netcnnaud.18": (512, 256, 5, 4),
    "netcnnlip.0": (96, 3, 5, 7, 7),
    "netcnnlip.4": (256, 96, 1, 5, 5),
    "netcnnlip.8": (256, 256, 1, 3, 3),
    "netcnnlip.11": (256, 256, 1, 3, 3),
    "netcnnlip.14": (256, 256, 1, 3, 3),
    "netcnnlip.18": (512, 256, 1, 6, 6),
    "netfcaud.0": (512, 512),
    "netfcaud.3": (1024, 512),
    "netfclip.0": (512, 512),
    "netfclip.3": (1024, 512),
}
NORMS = {
    "netcnnaud": (1, 5, 9, 12, 15, 19),
    "netcnnlip": (1, 5, 9, 12, 15, 19),
    "netfcaud": (1,),
    "netfclip": (1,),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and random running statistics: a norm left at 0 and 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def clip(num_frames: int, side: int = 224, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(
        0, 256, (num_frames, side, side, 3), dtype=torch.uint8, generator=generator
    )
    return frames, 0.1 * torch.randn(640 * num_frames, generator=generator)


def test_names_and_shapes_are_the_published_ones() -> None:
    state = SyncNet().state_dict()
    expected = {f"{name}.weight": shape for name, shape in PUBLISHED.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in PUBLISHED.items()}
    for part, places in NORMS.items():
        for place in places:
            before = PUBLISHED[f"{part}.{place - 1}"][:1]
            for name in ("weight", "bias", "running_mean", "running_var"):
                expected[f"{part}.{place}.{name}"] = before
            expected[f"{part}.{place}.num_batches_tracked"] = ()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


# Strides and paddings of the published layers, and the pooling after them:
# (kernel, stride, padding).
LAYERS: dict[str, dict[int, Any]] = {
    "netcnnaud": {
        0: (1, 1, None),
        4: (1, 1, (3, (1, 2), 0)),
        8: (1, 1, None),
        11: (1, 1, None),
        14: (1, 1, (3, 2, 0)),
        18: (1, 0, None),
    },
    "netcnnlip": {
        0: ((1, 2, 2), 0, ((1, 3, 3), (1, 2, 2), 0)),
        4: ((1, 2, 2), (0, 1, 1), ((1, 3, 3), (1, 2, 2), (0, 1, 1))),
        8: (1, (0, 1, 1), None),
        11: (1, (0, 1, 1), None),
        14: (1, (0, 1, 1), ((1, 3, 3), (1, 2, 2), 0)),
        18: (1, 0, None),
    },
}


def normalised(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale = (state[f"{name}.weight"] / (var + 1e-5).sqrt()).reshape(shape)
    return (x - mean.reshape(shape)) * scale + state[f"{name}.bias"].reshape(shape)


def tower(state: dict[str, Tensor], cnn: str, fc: str, x: Tensor) -> Tensor:
    """A tower of the published network from its tensors alone."""
    conv, pool = (F.conv2d, F.max_pool2d) if x.ndim == 4 else (F.conv3d, F.max_pool3d)
    for place, (stride, padding, pooling) in LAYERS[cnn].items():
        x = conv(x, state[f"{cnn}.{place}.weight"], state[f"{cnn}.{place}.bias"], stride, padding)
        x = normalised(x, state, f"{cnn}.{place + 1}").clamp(min=0)
        x = x if pooling is None else pool(x, *pooling)
    x = x.reshape(1, -1) @ state[f"{fc}.0.weight"].T + state[f"{fc}.0.bias"]
    return (
        normalised(x, state, f"{fc}.1").clamp(min=0) @ state[f"{fc}.3.weight"].T
        + state[f"{fc}.3.bias"]
    )


def reference_numbers(
    state: dict[str, Tensor], frames: Tensor, audio: Tensor, reach: int = 15
) -> tuple[float, float, int]:
    """The reference's steps one by one: a window at a time through whole towers, a row of distances
    per frame.
    """
    video = frames.numpy()[..., ::-1].astype(np.float32).transpose(3, 0, 1, 2)
    cepstra = mfcc(to_int16(audio.numpy())).T
    count = min(video.shape[1], len(audio) // 640) - 5
    lips, sounds = [], []
    for i in range(count):
        window = torch.from_numpy(np.ascontiguousarray(video[None, :, i : i + 5]))
        lips.append(tower(state, "netcnnlip", "netfclip", window))
        step = torch.from_numpy(cepstra[None, None, :, 4 * i : 4 * i + 20].astype(np.float32))
        sounds.append(tower(state, "netcnnaud", "netfcaud", step))
    zero = torch.zeros_like(sounds[0])
    table = np.zeros((count, 2 * reach + 1))
    for i in range(count):
        for j in range(2 * reach + 1):
            k = i + j - reach
            other = sounds[k] if 0 <= k < count else zero
            table[i, j] = float(((lips[i] - other + 1e-6) ** 2).sum().sqrt())
    mean = table.mean(axis=0)
    return float(np.sort(mean)[reach] - mean.min()), float(mean.min()), reach - int(mean.argmin())


@pytest.mark.parametrize("num_frames", [6, 13])
@torch.no_grad()
def test_equals_the_reference_steps_on_random_weights(num_frames: int, tmp_path: Path) -> None:
    torch.save(
        randomised(SyncNet(num_features=64, width=0.25)).state_dict(), tmp_path / "syncnet_v2.model"
    )
    state = torch.load(tmp_path / "syncnet_v2.model", weights_only=True)
    net = SyncNet(num_features=64, width=0.25)
    net.load_state_dict(state)
    extractor = narrow_extractor(net.eval(), batch_windows=3)
    frames, audio = clip(num_frames)
    sync = sync_of_clip(frames, audio, extractor)
    confidence, distance, offset = reference_numbers(state, frames, audio)
    assert sync.offset_frames == offset
    assert sync.distance == pytest.approx(distance, rel=1e-4)
    assert sync.confidence == pytest.approx(confidence, rel=1e-4, abs=1e-4 * distance)


def narrow_extractor(net: SyncNet, batch_windows: int) -> SyncNetExtractor:
    extractor = SyncNetExtractor.__new__(SyncNetExtractor)
    nn.Module.__init__(extractor)
    extractor.net, extractor.num_features, extractor.batch_windows = (
        net,
        net.num_features,
        batch_windows,
    )
    return extractor


@torch.no_grad()
def test_published_file_loads_strictly_and_full_size_runs(tmp_path: Path) -> None:
    file = tmp_path / "syncnet_v2.model"
    state = randomised(SyncNet()).state_dict()
    torch.save(state, file)
    extractor = load_extractor("sync", file)
    assert (
        extractor.name == "syncnet-v2"
        and len(extractor.sha256) == 64
        and extractor.row()["known"] is False
    )
    frames, audio = clip(7)
    confidence, distance, offset = reference_numbers(state, frames, audio)
    score = SyncScore(extractor)
    score.update(frames, audio)
    result = {key: float(value) for key, value in score.compute().items()}
    assert (
        result["sync_d"] == pytest.approx(distance, rel=1e-4) and result["offset_frames"] == offset
    )
    assert result["sync_c"] == pytest.approx(confidence, rel=1e-4, abs=1e-4 * distance)
    # as torch 0.3 wrote it
    old = {name: value for name, value in state.items() if "num_batches" not in name}
    torch.save(old, file)
    torch.testing.assert_close(
        load_extractor("sync", file).net.state_dict(), extractor.net.state_dict()
    )
    del state["netfclip.3.bias"]
    torch.save(state, file)
    with pytest.raises(UserError, match="expected the weights of syncnet-v2"):
        load_extractor("sync", file)


@pytest.mark.parametrize("shift", [-15, -7, -1, 0, 1, 4, 15])
def test_known_shift_is_reported(shift: int) -> None:
    """Lips that repeat what the speech was ``shift`` frames before."""
    generator = torch.Generator().manual_seed(3)
    world = torch.randn(80, 16, generator=generator)
    speech, faces = world[20:60], world[20 - shift : 60 - shift]
    faces = faces + 0.1 * torch.randn(faces.shape, generator=generator)
    sync = sync_of_embeddings(faces, speech)
    assert sync.offset_frames == shift
    assert sync.distance == float(sync.by_offset.min()) and sync.confidence > 0.5


class EchoExtractor(nn.Module):
    """Loudness in both ears: the brightness of a frame against the power of its speech."""

    def forward(self, frames: Tensor, audio: Tensor, num_windows: int) -> tuple[Tensor, Tensor]:
        light = frames.float().mean(dim=(1, 2, 3))[: num_windows + 4].unfold(0, 5, 1) / 255.0
        power = (
            audio[: 640 * len(frames)]
            .reshape(-1, 640)
            .square()
            .mean(dim=1)[: num_windows + 4]
            .unfold(0, 5, 1)
        )
        return light, power


@pytest.mark.parametrize("shift", [-9, -2, 0, 3, 12])
def test_shifted_clip_reports_its_shift_from_pixels_and_samples(shift: int) -> None:
    """Positive: the lips come late. The frames are those of ``shift`` frames earlier."""
    generator = torch.Generator().manual_seed(5)
    power = torch.rand(140, generator=generator)
    light = (255 * power).round().to(torch.uint8)
    audio = power[20:120].sqrt().repeat_interleave(640)
    frames = light[20 - shift : 120 - shift, None, None, None].expand(-1, 16, 16, 3)
    assert sync_of_clip(frames, audio, EchoExtractor()).offset_frames == shift


def test_windows_of_speech_and_frames_begin_together() -> None:
    """Window i holds steps 4i .. 4i + 19: a click in frame 10 is in the windows of frames 6 to
    10.
    """
    audio = torch.zeros(640 * 20)
    audio[640 * 10 + 300 : 640 * 10 + 340] = 0.9
    energy = mfcc_windows(audio, 15)[:, 0].amax(dim=1)
    loud = (energy > 0).nonzero()[:, 0].tolist()
    assert loud == [6, 7, 8, 9, 10]


def test_means_over_clips_and_failed_clips_leave_no_trace() -> None:
    score = SyncScore(EchoExtractor())
    singles = []
    for seed in range(3):
        frames, audio = clip(40, 16, seed)
        singles.append(sync_of_clip(frames, audio, EchoExtractor()))
        score.update(frames, audio)
        with pytest.raises(
            UserError,
            match=(
                r"at least 6 frames with audio, got 5 frames and "
                r"1\.60 "
                r"s"
            ),
        ):
            score.update(frames[:5], audio)
        with pytest.raises(UserError, match=r"got 40 frames and 0\.20 s"):
            score.update(frames, audio[:3200])
        with pytest.raises(UserError, match="mono"):
            score.update(frames, audio[None])
    result = score.compute()
    assert float(result["sync_d"]) == pytest.approx(np.mean([s.distance for s in singles]))
    assert float(result["sync_c"]) == pytest.approx(np.mean([s.confidence for s in singles]))
    assert float(result["offset_frames"]) == pytest.approx(
        np.mean([s.offset_frames for s in singles])
    )
    assert float(result["offset_abs_frames"]) == pytest.approx(
        np.mean([abs(s.offset_frames) for s in singles])
    )


def test_embeddings_that_are_not_numbers_are_named() -> None:
    with pytest.raises(UserError, match="NaN or infinity"):
        sync_of_embeddings(torch.full((4, 3), torch.nan), torch.zeros(4, 3))
    with pytest.raises(UserError, match="same windows"):
        sync_of_embeddings(torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.real_weights("syncnet_v2.model", "syncnet_example.avi")
def test_golden_value_of_the_example_clip() -> None:
    """The reference repository's data/example.avi, a face crop: offset 3, minimum distance 5.353,
    confidence 10.021.
    """
    import os

    from rest_lightning.media.audio import open_speech
    from rest_lightning.media.video import read_frames

    folder = Path(os.environ[VARIABLE])
    frames = read_frames(folder / "syncnet_example.avi")
    audio = open_speech(folder / "syncnet_example.avi").read_all()
    sync = sync_of_clip(frames, audio, load_extractor("sync", folder))
    assert sync.offset_frames == 3
    # The reference reads the frames back from jpg files, we do not: that much is left to
    # compression.
    assert sync.distance == pytest.approx(5.353, abs=0.1) and sync.confidence == pytest.approx(
        10.021, abs=0.2
    )
