from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rest_lightning.diffusion.losses import (
    asd_loss,
    contrastive_loss,
    flow_matching_loss,
    smoothness_loss,
    speech_ae_loss,
    speech_contrastive_loss,
)


def video(*frames: list[float]) -> Tensor:
    """One clip (1, C, 1 + f, 1, 1) from the channel vectors of its generated frames; the reference
    slot is poisoned.
    """
    generated = torch.tensor(frames, dtype=torch.float64).T[None, :, :, None, None]
    return torch.cat([torch.full_like(generated[:, :, :1], torch.nan), generated], dim=2)


def random_velocity(batch: int = 2, num_frames: int = 13) -> Tensor:
    return torch.randn(batch, 4, num_frames, 2, 2, dtype=torch.float64)


def test_flow_matching_by_hand() -> None:
    velocity, target = video([1.0, 2.0], [3.0, 4.0]), video([1.0, 0.0], [0.0, 4.0])
    assert flow_matching_loss(velocity, target).item() == pytest.approx((0 + 4 + 9 + 0) / 4)
    mask = torch.tensor([[1, 0, 1]])
    assert flow_matching_loss(velocity, target, mask).item() == pytest.approx(4.5)
    assert flow_matching_loss(velocity, target, torch.tensor([[True, False, False]])).item() == 0
    assert flow_matching_loss(velocity, target, torch.ones(1, 3)).item() == pytest.approx(13 / 4)


def test_contrastive_by_hand() -> None:
    # cosine similarities: student e1 with teacher (e1, e2) = (1, 0); student (e1+e2)/sqrt2 = (r, r)
    student, teacher = video([2.0, 0.0], [1.0, 1.0]), video([5.0, 0.0], [0.0, 0.5])
    tau = 0.5
    first = -math.log(math.exp(1 / tau) / (math.exp(1 / tau) + math.exp(0)))
    second = math.log(2)
    assert contrastive_loss(student, teacher, tau).item() == pytest.approx(
        (first + second) / 2, abs=1e-12
    )


@pytest.mark.parametrize("num_frames", [2, 3, 12])
def test_contrastive_limits(num_frames: int) -> None:
    same = random_velocity(num_frames=1).expand(-1, -1, 1 + num_frames, -1, -1)
    assert contrastive_loss(same, same).item() == pytest.approx(math.log(num_frames), abs=1e-9)
    for seed in range(5):
        torch.manual_seed(seed)
        student, teacher = (
            random_velocity(num_frames=1 + num_frames),
            random_velocity(num_frames=1 + num_frames),
        )
        assert contrastive_loss(student, teacher).item() >= 0
        assert contrastive_loss(teacher, teacher).item() < contrastive_loss(student, teacher).item()
        assert contrastive_loss(3 * teacher, teacher).item() == pytest.approx(
            contrastive_loss(teacher, teacher).item()
        )


def test_contrastive_compares_frames_of_one_clip_only() -> None:
    student, teacher = random_velocity(batch=3), random_velocity(batch=3)
    alone = [contrastive_loss(student[b : b + 1], teacher[b : b + 1]).item() for b in range(3)]
    assert contrastive_loss(student, teacher).item() == pytest.approx(sum(alone) / 3)


def test_contrastive_gradient_is_finite_at_a_zero_start() -> None:
    student = torch.zeros(1, 4, 4, 2, 2, requires_grad=True)
    contrastive_loss(student, torch.randn(1, 4, 4, 2, 2)).backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e5


def test_smoothness_by_hand() -> None:
    student, teacher = video([0.0], [1.0], [4.0], [9.0]), video([0.0], [0.0], [0.0], [1.0])
    # offsets from the reference on: 0, 0, 1, 4, 8; their second differences: 1, 2, 1
    assert smoothness_loss(student, teacher).item() == pytest.approx((1 + 4 + 1) / 3)
    # second differences without the reference: student (2, 2), teacher (0, 1)
    assert smoothness_loss(student, teacher, anchored=False).item() == pytest.approx((4 + 1) / 2)


def test_smoothness_anchors_the_first_frame() -> None:
    """An offset of the first frame costs what the reference, shared by both, lets it cost."""
    teacher = random_velocity(num_frames=5)
    jump = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64)
    # a constant offset of all frames: second differences -jump at the first frame, else 0
    student = teacher + jump
    assert smoothness_loss(student, teacher).item() == pytest.approx(
        (jump.square() / 3).mean().item()
    )
    student.requires_grad_()
    smoothness_loss(student, teacher).backward()
    assert student.grad is not None
    assert float(student.grad[:, :, 1].abs().sum()) > 0
    assert not student.grad[:, :, 0].any()
    ramp = torch.arange(5, dtype=torch.float64).view(1, 1, -1, 1, 1)
    assert smoothness_loss(teacher + jump * ramp, teacher).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("num_frames", [4, 7, 13])
def test_smoothness_ignores_linear_offsets(num_frames: int) -> None:
    teacher = random_velocity(num_frames=num_frames)
    constant, slope = torch.randn(2, 2, 4, 1, 2, 2, dtype=torch.float64)
    time = torch.arange(num_frames, dtype=torch.float64).view(1, 1, -1, 1, 1)
    student = teacher + constant + slope * time
    assert smoothness_loss(student, teacher, anchored=False).item() == pytest.approx(0, abs=1e-20)
    student = teacher + slope * time**2
    for anchored in (False, True):
        assert smoothness_loss(student, teacher, anchored).item() == pytest.approx(
            (4 * slope**2).mean().item()
        )


@pytest.mark.parametrize(("num_frames", "anchored"), [(2, True), (2, False), (3, False)])
def test_smoothness_of_short_clips_is_zero(num_frames: int, anchored: bool) -> None:
    student = random_velocity(num_frames=num_frames).requires_grad_()
    loss = smoothness_loss(student, random_velocity(num_frames=num_frames), anchored)
    loss.backward()
    assert loss.item() == 0


def test_asd_adds_up_and_leaves_the_reference_out() -> None:
    student, teacher, target = random_velocity(), random_velocity(), random_velocity()
    loss = asd_loss(student, teacher, target, alpha=0.3, beta=0.7)
    expected = (
        flow_matching_loss(student, target)
        + 0.3 * contrastive_loss(student, teacher)
        + 0.7 * smoothness_loss(student, teacher)
    )
    assert torch.equal(loss.loss, expected)
    for velocity in (student, teacher, target):
        velocity[:, :, 0] = torch.nan
    assert torch.equal(asd_loss(student, teacher, target, alpha=0.3, beta=0.7).loss, expected)


def test_losses_of_half_precision_are_float32() -> None:
    student, teacher = random_velocity().bfloat16(), random_velocity().bfloat16()
    assert asd_loss(student, teacher, teacher).loss.dtype == torch.float32
    assert asd_loss(teacher, teacher, teacher).flow.item() == 0


def test_speech_contrastive_by_hand() -> None:
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]], dtype=torch.float64)[
        :, :, None
    ]
    reconstruction = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [-3.0, 0.0]]], dtype=torch.float64)[
        :, :, None
    ]
    tau = 0.5
    # rows of cosine similarities: (1, 0, -1), (1, 0, -1), (-1, 0, 1); denominators leave out j = i
    rows = [
        -1 / tau + math.log(math.exp(0) + math.exp(-1 / tau)),
        0 + math.log(math.exp(1 / tau) + math.exp(-1 / tau)),
        -1 / tau + math.log(math.exp(-1 / tau) + math.exp(0)),
    ]
    assert speech_contrastive_loss(reconstruction, features, tau).item() == pytest.approx(
        sum(rows) / 3, abs=1e-12
    )


@pytest.mark.parametrize("num_frames", [2, 9, 97])
def test_speech_contrastive_limit_and_total(num_frames: int) -> None:
    same = torch.randn(2, 1, 10, 4, dtype=torch.float64).expand(-1, num_frames, -1, -1)
    assert speech_contrastive_loss(same, same).item() == pytest.approx(
        math.log(num_frames - 1), abs=1e-9
    )
    features, reconstruction = torch.randn(2, 2, num_frames, 10, 4, dtype=torch.float64)
    loss = speech_ae_loss(reconstruction, features)
    assert loss.mse.item() == pytest.approx((reconstruction - features).square().mean().item())
    assert loss.loss.item() == pytest.approx(10 * loss.mse.item() + loss.contrastive.item())
    assert speech_contrastive_loss(reconstruction[:, :1], features[:, :1]).item() == 0
