"""The mouth estimator: crops, sizes, files, and what it reads from faces nobody trained it on."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rest_lightning.errors import UserError
from rest_lightning.metrics import mouth, weights
from rest_lightning.metrics.lips import pearson
from rest_lightning.metrics.mouth import MouthOpeningEstimator, crop_mouth, mouth_opening
from tools import mouth as training


def noise(num: int, size: int = 128) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


def test_crop_is_the_window_itself_at_128() -> None:
    frames = noise(2)
    expected = torch.from_numpy(frames[:, 58:122, 28:100]).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(crop_mouth(frames), expected)
    floats = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(crop_mouth(floats), expected)
    assert torch.equal(crop_mouth(frames, margin_px=3)[:, :, 3:-3, 3:-3], expected)


@pytest.mark.parametrize("size", [64, 256, 512])
def test_crop_of_another_size_shows_the_same_place(size: int) -> None:
    y, x = np.mgrid[0:size, 0:size] / size
    frame = np.stack([200 * x, 200 * y, 100 + 50 * x], axis=-1).round().astype(np.uint8)[None]
    y, x = np.mgrid[0:128, 0:128] / 128
    small = np.stack([200 * x, 200 * y, 100 + 50 * x], axis=-1).round().astype(np.uint8)[None]
    assert float((crop_mouth(frame) - crop_mouth(small)).abs().max()) < 2.5 / 127.5


@pytest.mark.parametrize("shape", [(2, 128, 128), (2, 128, 128, 4), (2, 3, 128, 128)])
def test_other_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"expected frames as uint8 \(n, H, W, 3\) or as float .* "
            r"got uint8"
        ),
    ):
        crop_mouth(np.zeros(shape, np.uint8))


def test_batches_do_not_change_the_result() -> None:
    model = MouthOpeningEstimator().eval()
    frames = noise(7)
    whole = mouth_opening(frames, model)
    assert whole.shape == (7,) and whole.dtype == np.float32
    assert ((whole >= 0) & (whole <= 1)).all()
    np.testing.assert_allclose(mouth_opening(frames, model, batch_size=2), whole, atol=1e-6)
    assert mouth_opening(frames[:0], model).shape == (0,)


def test_brightness_and_contrast_do_not_matter() -> None:
    model = MouthOpeningEstimator().eval()
    frames = torch.from_numpy(noise(3)).permute(0, 3, 1, 2).float() / 127.5 - 1
    np.testing.assert_allclose(
        mouth_opening(frames, model), mouth_opening(0.8 * frames + 0.1, model), atol=0.02
    )


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = MouthOpeningEstimator((4, 8, 8, 8, 8), hidden=8).eval()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {weights.CONFIG_FILE, weights.WEIGHTS_FILE}
    loaded = MouthOpeningEstimator.from_pretrained(tmp_path)
    np.testing.assert_allclose(
        mouth_opening(noise(4), loaded), mouth_opening(noise(4), model), atol=0.02
    )


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"expected the mouth estimator's config.json .* train one "
            r"with"
        ),
    ):
        MouthOpeningEstimator.from_pretrained(tmp_path)


def test_augmentation_shifts_and_mirrors() -> None:
    """Every augmented crop still shows the mouth: shifted by up to 3 px, mirrored or not."""
    crops = torch.zeros(64, 3, 70, 78, dtype=torch.uint8)
    crops[:, :, 33:38, 37:42] = 255
    result = training.augment(crops, torch.Generator().manual_seed(0))
    assert result.shape == (64, 3, 64, 72)
    bright = (result.mean(dim=1) - result.mean(dim=(1, 2, 3))[:, None, None]).clamp(min=0.5) - 0.5
    rows = (bright.sum(2) @ torch.arange(64.0)) / bright.sum((1, 2))
    columns = (bright.sum(1) @ torch.arange(72.0)) / bright.sum((1, 2))
    assert float(rows.min()) == pytest.approx(29, abs=0.3) and float(rows.max()) == pytest.approx(
        35, abs=0.3
    )
    # The middle of 78 columns is 38.5: mirrored, column 39 becomes 38, before the shift of -3 +- 3.
    assert float(columns.min()) == pytest.approx(32, abs=0.3) and float(
        columns.max()
    ) == pytest.approx(39, abs=0.3)


def test_it_learns_rendered_mouths(tmp_path: Path) -> None:
    """The whole command at tiny size: it writes weights and a card, and beats a constant by far."""
    pytest.importorskip("espeakng_loader")
    from rest_lightning.data.synthetic.synthesize import synthesize

    data = synthesize(
        tmp_path / "clips", 4, num_frames=33, num_workers=1, val_fraction=0.0, test_fraction=0.25
    )
    code = training.main(
        [
            "--data",
            str(data),
            "--out",
            str(tmp_path / "out"),
            "--minutes",
            "0.08",
            "--batch-size",
            "16",
        ]
    )
    assert code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "card.json",
    }
    model = MouthOpeningEstimator.from_pretrained(tmp_path / "out")
    crops, openings = training.gather(
        data, training.read_manifest(data, "train"), 33, np.random.default_rng(0)
    )
    with torch.inference_mode():
        estimated = model.from_crops(crops[:, :, 3:-3, 3:-3].float() / 127.5 - 1)
    assert pearson(estimated.numpy(), openings.numpy()) > 0.5


def test_missing_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(["--data", str(tmp_path / "none"), "--minutes", "0.01"]) == 2
    assert "expected prepared clips with" in capsys.readouterr().err


def test_shipped_weights_read_unseen_talkers() -> None:
    pytest.importorskip("espeakng_loader")
    from rest_lightning.data.synthetic.synthesize import synthesize_clip

    correlations, errors = [], []
    for index in range(6):
        clip = synthesize_clip(index, seed=7001, split="test", num_frames=75)
        true = np.asarray(clip.sidecar.mouth_opening)
        estimated = mouth_opening(clip.frames)
        errors.append(np.abs(estimated - true).mean())
        if true.std() > 0.02:
            correlations.append(pearson(estimated, true))
            larger = [
                np.array(Image.fromarray(f).resize((256, 256), Image.Resampling.BICUBIC))
                for f in clip.frames
            ]
            assert pearson(mouth_opening(np.stack(larger)), true) > 0.9
    assert np.mean(correlations) > 0.95 and min(correlations) > 0.9
    assert np.mean(errors) < 0.08


def test_shipped_weights_are_small_and_fast() -> None:
    folder = mouth.ASSETS
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1.5e6
    assert set(mouth.extractor()) == {"name", "sha256"} and len(mouth.extractor()["sha256"]) == 64
    frames = noise(256)
    mouth_opening(frames[:64])
    start_s = time.process_time()
    mouth_opening(frames)
    # 2500 on a free core; a loaded one must not fail
    assert 256 / (time.process_time() - start_s) > 300
