"""Jump ratios of videos whose every step is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rest_lightning.metrics.image import BorderJumps, border_jump_ratio


def video(steps: list[float], batch: int = 1) -> torch.Tensor:
    """Uniform frames (batch, 3, len(steps) + 1, 4, 4): frame i + 1 differs from frame i by
    ``steps[i]``, up or down.
    """
    signs = torch.tensor([1.0, -1.0]).repeat(len(steps))[: len(steps)]
    levels = torch.cat([torch.zeros(1), (torch.tensor(steps) * signs).cumsum(0)])
    return levels.view(1, 1, -1, 1, 1).expand(batch, 3, -1, 4, 4).contiguous()


def steps_of(
    num_frames: int, first_frame: int, jumps: dict[int, float], elsewhere: float = 2.0
) -> list[float]:
    """Step of every internal frame to the next, ``jumps[period]`` at borders (the largest period
    wins).
    """
    result = []
    for number in range(first_frame, first_frame + num_frames - 1):
        value = elsewhere
        for period in sorted(jumps):
            if number and number % period == 0:
                value = jumps[period]
        result.append(200.0 if number == 0 else value)  # leaving frame 0 counts for neither side
    return result


@pytest.mark.parametrize("period", [8, 24])
@pytest.mark.parametrize("first_frame", [0, 1])
@pytest.mark.parametrize("num_frames", [33, 97, 100])
@pytest.mark.parametrize("jump", [2.0, 3.0, 7.0])
def test_jumps_at_borders_are_found(
    period: int, first_frame: int, num_frames: int, jump: float
) -> None:
    frames = video(steps_of(num_frames, first_frame, {period: jump}), batch=2)
    assert float(border_jump_ratio(frames, period, first_frame)) == pytest.approx(jump / 2.0)


@pytest.mark.parametrize("first_frame", [0, 1])
def test_other_borders_can_be_left_out(first_frame: int) -> None:
    frames = video(steps_of(97, first_frame, {8: 4.0, 24: 6.0}))
    assert float(border_jump_ratio(frames, 24, first_frame, ignore_period=8)) == pytest.approx(3.0)
    assert 2.0 < float(border_jump_ratio(frames, 24, first_frame)) < 3.0


def test_a_step_beside_the_border_is_no_border() -> None:
    frames = video(steps_of(97, 0, {8: 6.0}))
    assert float(border_jump_ratio(frames[:, :, 1:], 8, first_frame=1)) == pytest.approx(3.0)
    assert float(border_jump_ratio(frames[:, :, 1:], 8, first_frame=0)) < 1.0


@pytest.mark.parametrize("first_frame", [0, 1])
@pytest.mark.parametrize("pieces", [[97], [1, 96], [24, 24, 24, 24, 1], [1] * 97])
def test_pieces_equal_the_whole(first_frame: int, pieces: list[int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (97, 8, 6, 3), dtype=np.uint8)
    tracker = BorderJumps(first_frame)
    for piece in np.split(frames, np.cumsum(pieces)[:-1]):
        tracker.update(piece)
    whole = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float()
    for period, ignored in ((8, None), (24, None), (24, 8)):
        expected = float(border_jump_ratio(whole, period, first_frame, ignored))
        assert tracker.compute(period, ignored) == pytest.approx(expected, rel=1e-5)


def test_without_a_border_it_is_nan() -> None:
    assert np.isnan(float(border_jump_ratio(video([1.0] * 5))))
    assert np.isnan(BorderJumps().compute())


def test_a_period_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a period of at least 2 frames, got 1"):
        border_jump_ratio(video([1.0] * 20), 1)
