"""The portrait's detail: what it computes, and that streaming it is exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from tiny_head import make_head

from rest_lightning.errors import UserError
from rest_lightning.models.causal import Stream
from rest_lightning.models.detail import (
    AgreementDetail,
    DetailTransfer,
    EnlargedDetail,
    LearnedDetail,
    even_out_seams,
    warp,
)
from rest_lightning.streaming.engine import EngineOptions


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def learned() -> LearnedDetail:
    torch.manual_seed(3)
    detail = LearnedDetail(width=16, num_blocks=1)
    for parameter in detail.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return detail.eval()


def even() -> AgreementDetail:
    return AgreementDetail(hold=0.5, seam_px=8)


DETAILS: list[Callable[[], DetailTransfer]] = [even, learned]


@pytest.mark.parametrize("hold", [0.0, 0.7])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96)])
def test_agreement_is_its_formula(height: int, width: int, hold: float) -> None:
    reference, reconstruction = pictures(1, 3, height, width), pictures(1, 3, height, width, seed=1)
    frames = reconstruction[:, :, None] + 0.1 * pictures(1, 3, 2, height, width, seed=2)
    detail, stream = AgreementDetail(3.0, 0.3, hold, hold_tolerance=0.2), Stream()
    detail.start(reference, reconstruction, stream)
    for index in range(2):
        frame = frames[0, :, index].numpy()
        difference = np.square(frame - reconstruction[0].numpy()).mean(axis=0)
        sigma = 3.0 * width / 256
        blurred = gaussian_filter(
            difference, sigma, mode="nearest", radius=max(1, round(3 * sigma))
        )
        expected = frame + (reference - reconstruction)[0].numpy() * np.exp(-blurred / 0.3**2)
        expected += hold * np.exp(-blurred / 0.2**2) * (reconstruction[0].numpy() - frame)
        np.testing.assert_allclose(detail(frames, stream)[0, :, index].numpy(), expected, atol=1e-5)


def evened_columns(change: np.ndarray, reach: int) -> np.ndarray:
    """Vertical borders of one frame (3, H, W), with lines fitted to 2 points on either side."""
    result = change.copy()
    for border in range(32, change.shape[2], 32):
        steps = np.zeros(change.shape[:2])
        for side, sign in ((change[..., border:], 1), (change[..., :border][..., ::-1], -1)):
            points = np.stack([side[..., :2].mean(-1), side[..., 2:6].mean(-1)])
            line = np.polyfit([1, 4], points.reshape(2, -1), 1)
            steps += sign * line[1].reshape(steps.shape)
        steps = np.stack([gaussian_filter1d(step, 2.0, mode="nearest", radius=6) for step in steps])
        steps *= np.exp(-np.square(steps).mean(0) / 0.3**2)
        for x in range(border - reach, border + reach):
            distance = abs(x + 0.5 - border)
            share = 0.5 if x < border else -0.5
            result[..., x] += share * (1 - distance / reach) * steps
    return result


@pytest.mark.parametrize("reach", [8, 16])
def test_seams_are_evened_out_as_the_formula_says(reach: int) -> None:
    frames, reconstruction = pictures(1, 3, 2, 64, 96) * 0.3, pictures(1, 3, 64, 96, seed=1)
    detail, stream = AgreementDetail(tolerance=0.3, hold=0.5, seam_px=reach), Stream()
    detail.start(reconstruction, reconstruction, stream)
    change = even_out_seams(frames, reach)
    for index in range(2):
        rows = evened_columns(frames[0, :, index].numpy(), reach).transpose(0, 2, 1)
        expected = evened_columns(rows, reach).transpose(0, 2, 1)
        np.testing.assert_allclose(change[0, :, index].numpy(), expected, atol=1e-5)
    plain = AgreementDetail(tolerance=0.3, hold=0.5)
    torch.testing.assert_close(
        detail(reconstruction[:, :, None] + frames, stream),
        plain(reconstruction[:, :, None] + change, stream),
        atol=1e-5,
        rtol=0,
    )


def test_a_pale_square_loses_its_border_and_a_slope_stays() -> None:
    x = torch.arange(96).float().expand(1, 3, 1, 96, 96) / 96
    torch.testing.assert_close(even_out_seams(x), x, atol=1e-5, rtol=0)
    square = torch.zeros(1, 3, 1, 96, 96)
    square[..., 32:64, 32:64] = 0.1
    found = even_out_seams(square)
    assert (found[..., 40:56, 32] - found[..., 40:56, 31]).abs().max() < 0.02
    assert (found[..., 48, :] - square[..., 48, :]).abs().max() < 0.06
    with pytest.raises(UserError, match="expected a seam_px from 0 to 16 pixels, got 17"):
        AgreementDetail(seam_px=17)


@pytest.mark.parametrize("make_detail", [AgreementDetail, LearnedDetail])
def test_frames_without_lost_detail_stay_as_they_are(
    make_detail: Callable[[], DetailTransfer],
) -> None:
    reference, frames = pictures(1, 3, 64, 64), pictures(1, 3, 3, 64, 64, seed=1)
    detail, stream = make_detail().eval(), Stream()
    detail.start(reference, reference, stream)
    torch.testing.assert_close(detail(frames, stream), frames, atol=1e-6, rtol=0)


def test_a_still_comes_back_as_itself() -> None:
    reference, reconstruction = pictures(2, 3, 64, 64), pictures(2, 3, 64, 64, seed=1)
    detail, stream = AgreementDetail(), Stream()
    detail.start(reference, reconstruction, stream)
    again = detail(reconstruction[:, :, None], stream)[:, :, 0]
    torch.testing.assert_close(again, reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (-5, 4)])
def test_warp_reads_whole_pixels_aside_exactly(shift: tuple[int, int]) -> None:
    picture = pictures(1, 3, 32, 48)
    flow = torch.tensor(shift, dtype=torch.float32).view(1, 2, 1, 1).expand(1, 2, 32, 48)
    expected = torch.roll(picture, (-shift[1], -shift[0]), dims=(2, 3))
    inner = (..., slice(6, -6), slice(6, -6))
    torch.testing.assert_close(warp(picture, flow)[inner], expected[inner], atol=1e-5, rtol=0)


@pytest.mark.parametrize("make_detail", DETAILS)
@pytest.mark.parametrize("cuts", [[1], [2, 3], [5]])
def test_frames_do_not_depend_on_their_neighbours(
    make_detail: Callable[[], DetailTransfer], cuts: list[int]
) -> None:
    detail, stream = make_detail(), Stream()
    detail.start(pictures(1, 3, 64, 64), pictures(1, 3, 64, 64, seed=1), stream)
    frames = pictures(1, 3, 6, 64, 64, seed=2)
    with torch.no_grad():
        whole = detail(frames, stream)
        parts = [detail(part, stream) for part in torch.tensor_split(frames, cuts, dim=2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make_detail", DETAILS)
def test_streams_carry_it_along(make_detail: Callable[[], DetailTransfer]) -> None:
    """Any cutting of the speech, a snapshot, a row of a batch, another portrait: the detail is the
    right one.
    """
    head = make_head(detail=make_detail())
    samples = np.random.default_rng(0).normal(0, 0.2, 72 * 640).astype(np.float32)
    first, second = pictures(3, 64, 64), pictures(3, 64, 64, seed=9)

    def run(blocks: list[np.ndarray]) -> np.ndarray:
        with head.open(first) as session:
            parts = [session.push(block) for block in blocks]
            session.switch_identity(second)
            return np.concatenate([*parts, session.push(samples), session.flush()])

    whole = run([samples])
    assert np.array_equal(whole, run(np.split(samples, [700, 20_000])))
    with head.open(first) as session:
        before = session.push(samples[: 40 * 640])
        state = session.snapshot()
        after = session.push(samples[40 * 640 :])
        session.restore(state)
        assert np.array_equal(session.push(samples[40 * 640 :]), after)
        assert np.array_equal(np.concatenate([before, after]), whole[: len(before) + len(after)])
    with head.open(first, options=EngineOptions(detail="none")) as session:
        assert not np.array_equal(session.push(samples), whole[:48])


def test_batch_rows_equal_single_streams() -> None:
    head = make_head(detail=learned())
    samples = np.random.default_rng(0).normal(0, 0.2, (2, 48 * 640)).astype(np.float32)
    portraits = [pictures(3, 64, 64, seed=seed) for seed in (4, 5)]
    with head.open_batch(2) as batch:
        for row, portrait in enumerate(portraits):
            batch.start(row, portrait, seed=row)
            batch.push(row, samples[row])
        together = batch.step()
    for row, portrait in enumerate(portraits):
        with head.open(portrait, seed=row) as session:
            alone = session.push(samples[row])
        assert len(together[row])
        assert np.abs(alone[:24].astype(int) - together[row].astype(int)).max() <= 1


def test_unknown_detail_is_refused() -> None:
    with pytest.raises(UserError, match="expected detail model, agreement or none, got 'sharp'"):
        EngineOptions(detail="sharp")  # type: ignore[arg-type]


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's bicubic resizing of planes (C, H, W)."""
    planes = [
        Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)
        for plane in picture.astype(np.float32)
    ]
    return np.stack([np.asarray(plane) for plane in planes])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48)])
def test_enlarged_detail_is_its_formula(height: int, width: int) -> None:
    photograph = pictures(1, 3, 2 * height, 2 * width)
    reconstruction = pictures(1, 3, height, width, seed=1)
    decoded = reconstruction[:, :, None] + 0.1 * pictures(1, 3, 2, height, width, seed=2)
    frames = pictures(1, 3, 2, height, width, seed=3)
    enlarged, stream = EnlargedDetail(3.0, 0.2), Stream()
    enlarged.start(photograph, reconstruction, stream)
    found = enlarged(frames, decoded, stream)
    large = (2 * height, 2 * width)
    coarse = resized(resized(photograph[0].numpy(), height, width), *large)
    for index in range(2):
        change = decoded[0, :, index].numpy() - reconstruction[0].numpy()
        sigma = 3.0 * width / 256
        radius = max(1, round(3 * sigma))
        blurred = gaussian_filter(np.square(change).mean(0), sigma, mode="nearest", radius=radius)
        weight = resized(np.exp(-blurred / 0.2**2)[None], *large).clip(0, 1)
        expected = resized(frames[0, :, index].numpy(), *large)
        expected += (photograph[0].numpy() - coarse) * weight
        np.testing.assert_allclose(found[0, :, index].numpy(), expected, atol=2e-5)


def test_a_still_comes_back_as_itself_at_twice_its_size() -> None:
    photograph, reconstruction = pictures(1, 3, 128, 128), pictures(1, 3, 64, 64, seed=1)
    detail, enlarged, stream = AgreementDetail(), EnlargedDetail(), Stream()
    detail.start(enlarged.reduce(photograph), reconstruction, stream)
    enlarged.start(photograph, reconstruction, stream)
    decoded = reconstruction[:, :, None]
    again = enlarged(detail(decoded, stream), decoded, stream)[:, :, 0]
    torch.testing.assert_close(again, photograph, atol=1e-5, rtol=0)


def test_what_has_moved_gets_no_finer_detail() -> None:
    """A left half that disagrees is the enlarged frame alone, whatever the photograph shows."""
    reconstruction = torch.zeros(1, 3, 64, 64)
    frames = pictures(1, 3, 1, 64, 64, seed=1)
    decoded = torch.zeros(1, 3, 1, 64, 64)
    decoded[..., :32] = 0.8
    shown = []
    for seed in (2, 3):
        enlarged, stream = EnlargedDetail(), Stream()
        enlarged.start(pictures(1, 3, 128, 128, seed=seed), reconstruction, stream)
        shown.append(enlarged(frames, decoded, stream))
    torch.testing.assert_close(shown[0][..., :60], shown[1][..., :60], atol=1e-4, rtol=0)
    assert (shown[0] - shown[1])[..., 70:].abs().mean() > 0.1


def test_enlarged_frames_are_streamed_exactly() -> None:
    """Any cutting of the speech, a snapshot, another portrait, a row of a batch."""
    head, options = make_head(detail=learned()), EngineOptions(size_px=128)
    samples = np.random.default_rng(0).normal(0, 0.2, 40 * 640).astype(np.float32)
    first, second = pictures(3, 128, 128), pictures(3, 128, 128, seed=9)

    def run(blocks: list[np.ndarray]) -> np.ndarray:
        with head.open(first, options=options) as session:
            parts = [session.push(block) for block in blocks]
            session.switch_identity(second)
            return np.concatenate([*parts, session.push(samples), session.flush()])

    whole = run([samples])
    assert whole.shape == (80, 128, 128, 3)
    assert np.array_equal(whole, run(np.split(samples, [700, 17_000])))
    with head.open(first, options=options) as session:
        assert session.push(np.zeros(0, np.float32)).shape == (0, 128, 128, 3)
        before = session.push(samples[: 20 * 640])
        state = session.snapshot()
        after = session.push(samples[20 * 640 :])
        session.restore(state)
        assert np.array_equal(session.push(samples[20 * 640 :]), after)
        assert np.array_equal(np.concatenate([before, after]), whole[: len(before) + len(after)])
    with head.open_batch(2, options=options) as batch:
        for row, portrait in enumerate((second, first)):
            batch.start(row, portrait)
            batch.push(row, samples[: 26 * 640])
        alone = batch.step()[1]
    assert np.abs(alone.astype(int) - whole[:24].astype(int)).max() <= 1
    refused = pytest.raises(UserError, match="expected a snapshot of a session with this")
    with head.open(pictures(3, 64, 64)) as session, refused:
        session.restore(state)


def test_sizes_are_the_models_own_and_twice_that() -> None:
    assert EngineOptions().output_px(256) == EngineOptions(size_px=256).output_px(256) == 256
    assert EngineOptions(size_px=512).output_px(256) == 512
    with pytest.raises(UserError, match=r"expected a size of 64 or 128 pixels .*, got 100: choose"):
        make_head().open(pictures(3, 100, 100), options=EngineOptions(size_px=100))
    with pytest.raises(UserError, match=r"shape \(3, 128, 128\), got \(3, 64, 64\)"):
        make_head().open(pictures(3, 64, 64), options=EngineOptions(size_px=128))
