"""Training losses as pure functions: flow matching, distillation (ASD), SpeechAE pre-training.

Velocities are (B, C, f, h, w) with the reference in slot 0, and every loss leaves that slot out.
Losses are computed at least in float32 and are 0-d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ASDLoss:
    """``loss = flow + alpha * contrastive + beta * smoothness``, each 0-d."""

    loss: Tensor
    flow: Tensor
    contrastive: Tensor
    smoothness: Tensor


@dataclass(frozen=True)
class SpeechAELoss:
    """``loss = 10 * mse + contrastive``, each 0-d."""

    loss: Tensor
    mse: Tensor
    contrastive: Tensor


def _generated(velocity: Tensor) -> Tensor:
    """Returns the generated frames, without the reference, at least in float32."""
    return velocity[:, :, 1:].to(torch.promote_types(velocity.dtype, torch.float32))


def _frame_vectors(frames: Tensor) -> Tensor:
    """Returns flattened frames (B, f, ...) as unit vectors (B, f, D).

    A small epsilon keeps the gradient bounded when the frames start at zero.
    """
    return F.normalize(frames.flatten(2), dim=-1, eps=1e-3)


def flow_matching_loss(velocity: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error over the non-reference frames: ``mean((noise - latents - v)^2)`` (REST).

    Args:
        velocity: the network's output (B, C, f, h, w).
        target: noise - latents, same shape.
        mask: optional weights of frames (B, f) or of places (B, 1, f, h, w) (bool or float; slot 0
            is ignored): a weighted mean, 0 where nothing is selected.
    """
    error = (_generated(velocity) - _generated(target)).square()
    if mask is None:
        return error.mean()
    places = mask[:, None, :, None, None] if mask.ndim == 2 else mask
    error = error.mean(dim=1, keepdim=True)
    weight = places[:, :, 1:].to(error).expand_as(error)
    return (error * weight).sum() / weight.sum().clamp_min(torch.finfo(error.dtype).tiny)


def contrastive_loss(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """ASD's L_CON (REST): InfoNCE over the generated frames of each clip, mean over frames and
    clips.

    For frame i: ``-log(exp(s_ii / tau) / sum_j exp(s_ij / tau))`` with s_ij the cosine similarity
    of the student's flattened velocity of frame i and the teacher's of frame j. At least 0; log f
    for frames that are all alike.
    """
    anchors, candidates = (
        _frame_vectors(_generated(velocity).transpose(1, 2)) for velocity in (student, teacher)
    )
    logits = anchors @ candidates.transpose(1, 2) / temperature
    return -torch.log_softmax(logits, dim=-1).diagonal(dim1=1, dim2=2).mean()


def smoothness_loss(student: Tensor, teacher: Tensor, anchored: bool = True) -> Tensor:
    """Returns ASD's L_SMO (REST): how differently student and teacher bend in time.

    ``mean((D v_S - D v_T)^2)`` with ``D v_i = v_(i+1) - 2 v_i + v_(i-1)``, i = 1 .. f - 1 over
    ``v_0 .. v_f``. The papers do not name the mean; here it runs over frames and elements. v_0 is
    the reference, which student and teacher share: their difference there is zero, whatever slot 0
    holds. So a constant offset costs something, at the first frame; an offset that grows linearly
    from the reference costs nothing. Fewer than 2 generated frames give 0.

    Args:
        student, teacher: (B, C, 1 + f, h, w).
        anchored: False sums over ``v_1 .. v_f`` alone (an ablation).
    """
    offset = _generated(student) - _generated(teacher)
    if anchored:
        offset = torch.cat([torch.zeros_like(offset[:, :, :1]), offset], dim=2)
    if offset.shape[2] < 3:
        return (offset * 0).sum()
    return (offset[:, :, 2:] - 2 * offset[:, :, 1:-1] + offset[:, :, :-2]).square().mean()


def asd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float = 0.2,
    beta: float = 0.2,
    temperature: float = 0.1,
    mask: Tensor | None = None,
    anchored: bool = True,
) -> ASDLoss:
    """Asynchronous streaming distillation ``L_FM + alpha * L_CON + beta * L_SMO`` (REST, alpha =
    beta = 0.2).

    L_FM regresses to the ground truth ``target``, as the paper's equations say (one sentence of its
    appendix says the teacher's output). ``teacher`` comes from the same noise, sigmas and dropout
    masks, without gradients. ``anchored``: see :func:`smoothness_loss`.
    """
    flow = flow_matching_loss(student, target, mask)
    contrastive = contrastive_loss(student, teacher, temperature)
    smoothness = smoothness_loss(student, teacher, anchored)
    return ASDLoss(flow + alpha * contrastive + beta * smoothness, flow, contrastive, smoothness)


def speech_contrastive_loss(
    reconstruction: Tensor, features: Tensor, temperature: float = 0.1
) -> Tensor:
    """SpeechAE's frame InfoNCE (READ): mean over i of ``-log(exp(s_ii / tau) / sum_(j != i)
    exp(s_ij / tau))``.

    s_ij is the cosine similarity of reconstructed frame i and true frame j of the same clip,
    windows flattened. READ's denominator leaves out j = i, so the loss can be negative; temperature
    0.1 is a choice of this project, which READ leaves open. One frame alone gives 0.

    Args:
        reconstruction: (B, F, ...), ``features``: same shape; F video frames.
        features: the input of SpeechAE.
        temperature: tau.
    """
    if features.shape[1] < 2:
        return (reconstruction * 0).sum()
    dtype = torch.promote_types(features.dtype, torch.float32)
    logits = (
        _frame_vectors(reconstruction.to(dtype))
        @ _frame_vectors(features.to(dtype)).transpose(1, 2)
        / temperature
    )
    positive = logits.diagonal(dim1=1, dim2=2)
    own = torch.eye(features.shape[1], dtype=torch.bool, device=features.device)
    return (logits.masked_fill(own, -torch.inf).logsumexp(dim=-1) - positive).mean()


def speech_ae_loss(
    reconstruction: Tensor, features: Tensor, temperature: float = 0.1
) -> SpeechAELoss:
    """Returns SpeechAE's loss ``10 * MSE + 1 * frame InfoNCE`` (READ) and both terms.

    Shapes are those of :func:`speech_contrastive_loss`.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    mse = F.mse_loss(reconstruction.to(dtype), features.to(dtype))
    contrastive = speech_contrastive_loss(reconstruction, features, temperature)
    return SpeechAELoss(10.0 * mse + contrastive, mse, contrastive)
