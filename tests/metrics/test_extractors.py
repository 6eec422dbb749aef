"""Published networks behind one interface: parity of what is around them, and messages where files
are missing.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rest_lightning.errors import UserError
from rest_lightning.media.files import TRUST
from rest_lightning.metrics import weights
from rest_lightning.metrics.extractors import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    centre_square,
    load_extractor,
)
from rest_lightning.metrics.frechet import FVD


def clip(num_frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (num_frames, height, width, 3), dtype=torch.uint8, generator=generator
    )


def straightforward_square(frames: np.ndarray, side: int) -> np.ndarray:
    """The common FVD recipe in plain numpy: bilinear by hand (half-pixel centres), long side up,
    corner down.
    """
    height, width = frames.shape[1:3]
    scale = side / min(height, width)
    size = (side, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), side)
    x = frames.astype(np.float64) / 255.0
    for axis, (old, new) in enumerate(zip((height, width), size, strict=True), start=1):
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, None)
        low = np.minimum(at.astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        part = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        x = np.take(x, low, axis) * (1 - part) + np.take(x, high, axis) * part
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return x[:, top : top + side, left : left + side]


@pytest.mark.parametrize("size", [(64, 64), (50, 71), (97, 60), (32, 33), (40, 40)])
@pytest.mark.parametrize("side", [32, 56])
def test_resize_and_crop_follow_the_recipe(size: tuple[int, int], side: int) -> None:
    frames = clip(2, *size)
    expected = straightforward_square(frames.numpy(), side).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(centre_square(frames, side).numpy(), expected, atol=1e-5)


class ScriptedI3D(nn.Module):
    """Stands in the file for I3D: random weights, the same call; asks to be called as StyleGAN-V's
    is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3 * 4, 400)

    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        if rescale or resize or not return_features or x.shape[3] != 224 or x.shape[4] != 224:
            raise RuntimeError("called otherwise")
        pooled = torch.nn.functional.adaptive_avg_pool3d(x, (4, 1, 1)).flatten(1)
        return self.mix(pooled)


@pytest.fixture
def i3d_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(TRUST, "1")
    torch.jit.script(ScriptedI3D().eval()).save(str(tmp_path / "i3d_torchscript.pt"))
    return tmp_path / "i3d_torchscript.pt"


def test_fvd_equals_its_steps_on_random_weights(
    i3d_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File -> features -> distance, against the same steps in numpy and scipy."""
    from scipy.linalg import sqrtm

    monkeypatch.setenv(weights.VARIABLE, str(i3d_file.parent))
    extractor = load_extractor("fvd", "published")
    assert (
        extractor.name == "i3d-kinetics-400"
        and extractor.row() == load_extractor("fvd", i3d_file).row()
    )
    fvd, net, sides = FVD(extractor), torch.jit.load(str(i3d_file)), []
    for real in (True, False):
        side = []
        for i in range(4):
            frames = clip(10 + i, 24, 30, seed=i + 10 * real) // (1 if real else 2)
            fvd.update(frames, real=real)
            video = torch.from_numpy(straightforward_square(frames.numpy(), 224)).float() * 2 - 1
            with torch.no_grad():
                side.append(
                    net(video.permute(3, 0, 1, 2)[None], False, False, True)[0].double().numpy()
                )
        sides.append(np.stack(side))
    means, covariances = [x.mean(0) for x in sides], [np.cov(x, rowvar=False) for x in sides]
    # Three dimensions of each set differ from their mean; sqrtm of a 400x400 matrix of rank 3 is
    # noise: go there.
    basis = np.linalg.qr(np.concatenate([x - x.mean(0) for x in sides]).T)[0]
    a, b = (basis.T @ c @ basis for c in covariances)
    root = np.real(sqrtm(sqrtm(a) @ b @ sqrtm(a)))
    expected = np.square(means[0] - means[1]).sum() + np.trace(a + b - 2 * root)
    assert float(fvd.compute()["fvd"]) == pytest.approx(expected, rel=1e-4)
    assert fvd.notes() == ["fvd: 4 real and 4 generated samples for 400 features, biased"]
    with pytest.raises(UserError, match="at least 10 frames, got 9"):
        fvd.update(clip(9, 24, 24), real=True)
    monkeypatch.delenv(TRUST)
    with pytest.raises(UserError, match=r"runs no code, got .*i3d_torchscript\.pt: TorchScript"):
        load_extractor("fvd", i3d_file)


def test_videomae_sees_every_window_as_it_is(tmp_path: Path) -> None:
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_frames=4,
        tubelet_size=2,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    net = VideoMAEModel(config).eval()
    net.save_pretrained(tmp_path / "videomae-base")
    extractor = load_extractor("fvd_videomae", tmp_path)
    assert (
        extractor.name == "videomae" and extractor.num_features == 24 and extractor.min_frames == 4
    )
    frames = clip(11, 40, 36)
    features = extractor(frames)
    assert features.shape == (2, 24)
    for i, found in enumerate(features):
        square = straightforward_square(frames[4 * i : 4 * i + 4].numpy(), 32)
        x = (
            torch.from_numpy((square - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD))
            .float()
            .permute(0, 3, 1, 2)
        )
        with torch.no_grad():
            expected = net(pixel_values=x[None]).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_inception_equals_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="extra `test` has it"
    )
    reference_class = module.FeatureExtractorInceptionV3
    file = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    # its constructor only loads: let it keep its random weights once
    with monkeypatch.context() as patch:
        torch.save({}, file)
        patch.setattr(reference_class, "load_state_dict", lambda self, state: None)
        state = reference_class(
            "random", ["2048"], feature_extractor_weights_path=str(file)
        ).state_dict()
    torch.save(state, file)
    reference = reference_class("random", ["2048"], feature_extractor_weights_path=str(file))
    extractor = load_extractor("fid", file)
    assert extractor.row() == {
        "name": "inception-v3-compat",
        "sha256": extractor.sha256,
        "known": False,
    }
    frames = clip(3, 40, 52)
    expected = reference(frames.permute(0, 3, 1, 2).contiguous())[0]
    assert float(expected.std()) > 0
    torch.testing.assert_close(extractor(frames), expected.reshape(3, 2048), rtol=1e-4, atol=1e-6)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for metric, file in (
        ("fid", "weights-inception"),
        ("fvd", "i3d_torchscript"),
        ("sync", "syncnet_v2"),
    ):
        with pytest.raises(UserError, match=f"expected {file}") as error:
            load_extractor(metric, "published")
        message = str(error.value)
        assert str(tmp_path) in message and str(tmp_path / "hub" / "checkpoints") in message
        assert "fetch it from" in message and weights.VARIABLE in message and "\n" not in message
    with pytest.raises(UserError, match="hf download MCG-NJU/videomae-base"):
        load_extractor("fvd_videomae", "published")
    with pytest.raises(UserError, match=r"expected syncnet_v2\.model"):
        load_extractor("sync", tmp_path / "nothing.model")


@pytest.mark.parametrize("metric", ["fvd", "sync", "fid"])
def test_another_file_is_named(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRUST, "1")
    (tmp_path / "weights.pt").write_bytes(b"not a network")
    with pytest.raises(
        UserError, match=(f"expected the weights of .* in {tmp_path}/weights.pt, got another file")
    ):
        load_extractor(metric, tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "expected an extractor of fid, fvd"),
        (("fvd_videomae",), "expected published weights for fvd_videomae"),
        (("e_fid", "published"), "expected the embedded extractor for e_fid"),
        (("identity", "published"), "expected the embedded extractor for identity"),
    ],
)
def test_impossible_wishes_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_extractor(*arguments)


def test_hash_on_record_is_known_and_no_other() -> None:
    assert weights.is_known("fid", "6726825d" + 56 * "0") and not weights.is_known("fid", 64 * "0")
    assert not weights.is_known("sync", 64 * "0")  # none on record: nothing can be confirmed


@pytest.mark.real_weights("i3d_torchscript.pt")
def test_golden_fvd_of_zeros_against_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 clips x 30 frames x 64 x 64, all black against all white: 151.256."""
    monkeypatch.setenv(TRUST, "1")
    fvd = FVD(load_extractor("fvd", os.environ[weights.VARIABLE]))
    for _ in range(8):
        fvd.update(torch.zeros(30, 64, 64, 3, dtype=torch.uint8), real=True)
        fvd.update(torch.full((30, 64, 64, 3), 255, dtype=torch.uint8), real=False)
    assert float(fvd.compute()["fvd"]) == pytest.approx(151.256, abs=0.05)


@pytest.mark.real_weights("*inception-2015-12-05-6726825d.pth")
def test_published_inception_has_its_hash() -> None:
    assert load_extractor("fid", os.environ[weights.VARIABLE]).known


def test_devices_and_modes(i3d_file: Path) -> None:
    extractor = load_extractor("fvd", i3d_file)

    def check(net: nn.Module) -> bool:
        return not any(p.requires_grad for p in net.parameters())

    assert not extractor.training and check(extractor)
    metric = FVD(extractor)
    metric.persistent(True)
    assert not any("net" in name for name in metric.state_dict())  # weights are no state
