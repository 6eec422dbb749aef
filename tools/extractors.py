"""Trains the embedded extractors of the metrics on synthetic talkers, and writes what they are
worth into a card.

``python -m tools.extractors --data data/talkers --budget-min 15``
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.data.layout import (
    ManifestRow,
    Sidecar,
    clip_path,
    read_dataset_json,
    read_manifest,
    read_sidecar,
)
from rest_lightning.errors import UserError, exit_code
from rest_lightning.metrics.extractors import (
    ASSETS,
    COMMAND,
    EXPRESSION,
    FACTORS,
    IMAGE_PX,
    VIDEO_PX,
    VIDEO_WINDOW,
    EmbeddedImage,
    EmbeddedSync,
    EmbeddedVideo,
    load_embedded,
    resized,
)
from rest_lightning.metrics.frechet import FID, FVD
from rest_lightning.metrics.lips import pearson
from rest_lightning.metrics.mouth import CROP_SIZE, crop_mouth
from rest_lightning.metrics.sync import sync_of_clip
from rest_lightning.metrics.syncnet import WINDOW_FRAMES, mfcc, speech_windows, to_int16
from rest_lightning.metrics.weights import ShippedNetwork

# -- damage to clips that a metric must answer to --------------------------------------------------


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int = 3) -> Tensor:
    """Gaussian blur of every image (n, C, H, W) with its own sigma (n, 1) in pixels; edges are
    repeated.

    Args:
        x: float images.
        sigma: above 0.
        radius: of the kernel in pixels; beyond, the bell is cut off.
    """
    if not len(x):
        return x
    weights = torch.softmax(-0.5 * (torch.arange(-radius, radius + 1.0) / sigma).square(), dim=1)
    weights = weights.repeat_interleave(x.shape[1], dim=0)  # of every channel
    flat = functional.pad(x, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    flat = functional.conv2d(flat, weights[:, None, :, None], groups=len(weights))
    return functional.conv2d(flat, weights[:, None, None, :], groups=len(weights))[0].view(x.shape)


def blur(frames: Tensor, sigma_px: float) -> Tensor:
    """The same Gaussian blur on every frame."""
    if sigma_px <= 0:
        return frames
    sigma, radius = torch.full((1, 1), sigma_px), max(1, round(3 * sigma_px))
    blurred = [
        gaussian_blur(frame.permute(2, 0, 1)[None].float(), sigma, radius)[0] for frame in frames
    ]
    return torch.stack(blurred).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def noise(frames: Tensor, sd: float, generator: torch.Generator) -> Tensor:
    """White noise of ``sd`` grey levels of 255."""
    noisy = frames.float() + sd * torch.randn(frames.shape, generator=generator)
    return noisy.round().clamp(0, 255).to(torch.uint8)


def dropped(num_frames: int, share: float, generator: torch.Generator) -> Tensor:
    """Which frame is shown at every time (n,) when a share of frames is lost and the one before
    stays.
    """
    lost = torch.rand(num_frames, generator=generator) < share
    lost[:1] = False
    shown = torch.where(lost, 0, torch.arange(num_frames))
    return shown.cummax(dim=0).values


def shuffled(num_frames: int, share: float, generator: torch.Generator) -> Tensor:
    """Which frame is shown at every time (n,) when a share of frames changes places among
    themselves.
    """
    order = torch.arange(num_frames)
    chosen = (
        torch.randperm(num_frames, generator=generator)[: round(share * num_frames)].sort().values
    )
    order[chosen] = chosen[torch.randperm(len(chosen), generator=generator)]
    return order


# -- data ------------------------------------------------------------------------------------------

SYNC_MARGIN_PX = 3
VIDEO_FRAMES = 48  # of a clip: windows of 16 start anywhere in them
_SOURCE = re.compile(r"synthetic talkers v\d+, seed (\d+), index (\d+)$")


@dataclass(frozen=True)
class Clips:
    """N clips of one split.

    Attributes:
        images: uint8 (N, K, 128, 128, 3), K frames of every clip.
        image_factors: (N, K, 13), the renderer's curves at these frames.
        videos: uint8 (N, 48, 64, 64, 3), one piece of every clip.
        video_factors: (N, 48, 13).
        mouths: grey uint8 (N, F, 70, 78), the mouth's crop with a margin.
        cepstra: (N, 4F - 1, 13), MFCC.
    """

    images: Tensor
    image_factors: Tensor
    videos: Tensor
    video_factors: Tensor
    mouths: Tensor
    cepstra: Tensor

    def __len__(self) -> int:
        return len(self.images)


def factors_of(sidecar: Sidecar) -> np.ndarray:
    """The renderer's curves (F, 13) of a clip, made again from its seed.

    Raises:
        UserError: the clip is not of this generator, or its curves come out differently.
    """
    from rest_lightning.data.synthetic.script import sample_script
    from rest_lightning.data.synthetic.synthesize import face_track

    match = _SOURCE.search(sidecar.source)
    if match is None or sidecar.mouth_opening is None:
        raise UserError(
            f"expected a synthetic talker of `rest synthesize`, got {sidecar.clip_id} from "
            f"{sidecar.source!r}: "
            "the embedded extractors learn from the renderer's curves"
        )
    words, motion = (
        np.random.default_rng([int(match[1]), int(match[2]), part]) for part in range(2)
    )
    script = sample_script(words, sidecar.num_frames, held_out=sidecar.split != "train")
    track = face_track(motion, script, sidecar.num_frames)
    if np.abs(track.mouth_opening - np.asarray(sidecar.mouth_opening)).max() > 1e-3:
        raise UserError(
            f"expected {sidecar.clip_id} as this version renders it, got other "
            "curves: "
            "synthesize it again"
        )
    return np.stack([getattr(track, name) for name in FACTORS], axis=1).astype(np.float32)


def read_clips(
    data: Path,
    rows: list[ManifestRow],
    frames_per_clip: int,
    rng: np.random.Generator,
    seconds: float = 1e9,
) -> Clips:
    """Read clips, in random order, for at most ``seconds``; at least two."""
    from rich.progress import track

    from rest_lightning.media.video import read_clip_audio, read_frames

    parts: list[tuple[Tensor, ...]] = []
    started_s = time.monotonic()
    for i in track(rng.permutation(len(rows)).tolist(), description="reading"):
        if len(parts) >= 2 and time.monotonic() - started_s > seconds:
            break
        row = rows[i]
        if row.num_frames < VIDEO_FRAMES:
            raise UserError(
                f"expected clips of at least {VIDEO_FRAMES} frames, got "
                f"{row.num_frames} in {row.clip_id}"
            )
        path = clip_path(data, row.clip_id)
        frames, factors = read_frames(path), factors_of(read_sidecar(data, row.clip_id))
        cepstra = mfcc(to_int16(read_clip_audio(path, row.num_frames)))
        parts.append(
            _parts(
                torch.from_numpy(frames), torch.from_numpy(factors), cepstra, frames_per_clip, rng
            )
        )
    if len({part[4].shape for part in parts}) != 1:
        raise UserError(
            "expected clips of one length, got several: synthesize them with one --num-frames"
        )
    return Clips(*(torch.stack(each) for each in zip(*parts, strict=True)))


def _parts(
    frames: Tensor,
    factors: Tensor,
    cepstra: np.ndarray,
    frames_per_clip: int,
    rng: np.random.Generator,
) -> tuple[Tensor, ...]:
    chosen = torch.from_numpy(np.sort(rng.permutation(len(frames))[:frames_per_clip]))
    start = int(rng.integers(0, len(frames) - VIDEO_FRAMES + 1))
    window = slice(start, start + VIDEO_FRAMES)
    small = _resized(frames[window], VIDEO_PX)
    grey = crop_mouth(frames, SYNC_MARGIN_PX).mean(dim=1).add(1.0).mul(127.5)
    mouths = grey.round().clamp(0, 255).to(torch.uint8)
    speech = torch.from_numpy(cepstra.astype(np.float32))
    return (
        _resized(frames[chosen], IMAGE_PX),
        factors[chosen],
        small,
        factors[window],
        mouths,
        speech,
    )


def _resized(frames: Tensor, side: int) -> Tensor:
    if frames.shape[1:3] == (side, side):
        return frames
    x = frames.permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(
        x, (side, side), mode="bilinear", antialias=True, align_corners=False
    )
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


# -- training --------------------------------------------------------------------------------------

IDENTITY_TEMPERATURE, SYNC_TEMPERATURE = 0.1, 0.07
SYNC_FRAMES = 45  # of a clip in a batch: 41 windows, offsets up to 40
_MAX_BLUR_PX, _MAX_NOISE = 2.0, 0.12  # of images in [-1, 1]


def fit(
    name: str,
    parts: list[nn.Module],
    loss_of: Callable[[], Tensor],
    seconds: float,
    lr: float,
    max_steps: int,
) -> tuple[int, float]:
    """AdamW for ``seconds`` or ``max_steps``, the learning rate falling linearly; returns steps and
    the mean loss.
    """
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    for part in parts:
        part.train()
    started_s = shown_s = time.monotonic()
    step, mean_loss = 0, 0.0
    while step < max_steps and (elapsed_s := time.monotonic() - started_s) < seconds:
        left = 1.0 - max(elapsed_s / seconds, step / max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(left, (step + 1) / 50)
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        step += 1
        mean_loss += (loss.item() - mean_loss) / min(step, 100)
        if time.monotonic() - shown_s > 15.0:
            shown_s = time.monotonic()
            print(
                (f"{name}: step {step}, {elapsed_s:.0f} of {seconds:.0f} s, loss {mean_loss:.4f}"),
                flush=True,
            )
    for part in parts:
        part.eval()
    return step, round(mean_loss, 5)


def identity_loss(a: Tensor, b: Tensor) -> Tensor:
    """InfoNCE of two views (n, D) of length 1 of the same n clips: each is nearest to its other
    view.
    """
    logits = a @ b.T / IDENTITY_TEMPERATURE
    target = torch.arange(len(a))
    return (
        functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    ) / 2


class ImageTraining:
    """Curves of the renderer, identity against the other clips, blur and noise of the frame.

    Args:
        net: to train.
        clips: what to train on.
        num_clips: in a batch, two frames each.
        seed: of everything random.
    """

    def __init__(self, net: EmbeddedImage, clips: Clips, num_clips: int, seed: int) -> None:
        self.net, self.clips, self.num_clips = net, clips, min(num_clips, len(clips))
        self.generator = torch.Generator().manual_seed(seed)
        self.damage = nn.Linear(net.num_features, 2)  # of training only
        flat = clips.image_factors.flatten(0, 1)
        self.mean, self.spread = flat.mean(dim=0), flat.std(dim=0).clamp(min=1e-4)

    def loss(self) -> Tensor:
        """One batch."""
        chosen = torch.randperm(len(self.clips), generator=self.generator)[: self.num_clips]
        frame = torch.randint(
            self.clips.images.shape[1], (2, len(chosen)), generator=self.generator
        )
        images = torch.cat([self.clips.images[chosen, each] for each in frame])
        factors = torch.cat([self.clips.image_factors[chosen, each] for each in frame])
        x, damage = damaged(images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0), self.generator)
        with torch.autocast("cpu", torch.bfloat16):
            features, curves, identity = self.net(x)
            guess = self.damage(features)
        loss = functional.smooth_l1_loss(
            curves.float(), (factors - self.mean) / self.spread, beta=0.5
        )
        loss = loss + functional.smooth_l1_loss(guess.float(), damage, beta=0.2)
        return loss + 0.5 * identity_loss(*identity.float().chunk(2))


def damaged(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A third of images (n, 3, H, W) blurred, another with noise; with how much, (n, 2) in 0..1."""
    num = len(x)
    kind = torch.randint(3, (num,), generator=generator)
    amount = torch.rand(num, generator=generator)
    damage = torch.stack([amount * (kind == 1), amount * (kind == 2)], dim=1)
    index = (kind == 1).nonzero()[:, 0]
    x = x.clone()
    x[index] = gaussian_blur(x[index], (_MAX_BLUR_PX * amount[index] + 1e-3)[:, None])
    sd = (_MAX_NOISE * damage[:, 1])[:, None, None, None]
    return x + sd * torch.randn(x.shape, generator=generator), damage


class VideoTraining:
    """How the mouth and the head move, identity, and the damage: blur, noise, lost frames, frames
    out of order.
    """

    def __init__(self, net: EmbeddedVideo, clips: Clips, num_clips: int, seed: int) -> None:
        self.net, self.clips, self.num_clips = net, clips, min(num_clips, len(clips))
        self.generator = torch.Generator().manual_seed(seed)
        every = motion_of(
            self.clips.video_factors[:, : 2 * VIDEO_WINDOW]
            .unflatten(1, (2, VIDEO_WINDOW))
            .flatten(0, 1)
        )
        self.mean, self.spread = every.mean(dim=0), every.std(dim=0).clamp(min=1e-4)
        # these three are of training only
        self.motion = nn.Linear(net.num_features, every.shape[1])
        self.damage = nn.Linear(net.num_features, 4)
        self.identity = nn.Linear(net.num_features, 32)

    def loss(self) -> Tensor:
        """One batch: two windows of every clip, each damaged in its own way."""
        chosen = torch.randperm(len(self.clips), generator=self.generator)[: self.num_clips].repeat(
            2
        )
        num = len(chosen)
        last = self.clips.videos.shape[1] - VIDEO_WINDOW
        start = torch.randint(last + 1, (num, 1), generator=self.generator)
        order, lost = self._orders(num)
        factors = self.clips.video_factors[chosen[:, None], start + torch.arange(VIDEO_WINDOW)]
        windows = (
            self.clips.videos[chosen[:, None], start + order]
            .permute(0, 1, 4, 2, 3)
            .float()
            .div(127.5)
            .sub(1.0)
        )
        x, spoilt = damaged(windows.flatten(1, 2), self.generator)  # one blur per window
        with torch.autocast("cpu", torch.bfloat16):
            features = self.net(x.view(windows.shape)).float()
            motion, damage, identity = (
                self.motion(features),
                self.damage(features),
                self.identity(features),
            )
        whole = lost.sum(dim=1) == 0  # frames out of order do not move as the curves say
        wanted = (motion_of(factors) - self.mean) / self.spread
        error = functional.smooth_l1_loss(motion.float(), wanted, beta=0.5, reduction="none").mean(
            dim=1
        )
        loss = (error * whole).sum() / whole.sum().clamp(min=1)
        loss = loss + 2.0 * functional.smooth_l1_loss(
            damage.float(), torch.cat([spoilt, lost], dim=1), beta=0.2
        )
        # Little: who it is must not drown how it moves.
        return loss + 0.1 * identity_loss(*functional.normalize(identity.float(), dim=1).chunk(2))

    def _orders(self, num: int) -> tuple[Tensor, Tensor]:
        """Frames shown (num, 16) and the shares lost and shuffled (num, 2): a third is lost, a
        third shuffled.
        """
        kinds = torch.randint(3, (num,), generator=self.generator).tolist()
        shares = torch.rand(num, generator=self.generator)
        orders, lost = [], torch.zeros(num, 2)
        for i, kind in enumerate(kinds):
            share = float(shares[i])
            pick = (dropped, shuffled)[kind - 1]
            orders.append(
                pick(VIDEO_WINDOW, share, self.generator) if kind else torch.arange(VIDEO_WINDOW)
            )
            if kind:
                lost[i, kind - 1] = share
        return torch.stack(orders), lost


def motion_of(factors: Tensor) -> Tensor:
    """What a window (n, 16, 13) of curves does: means, and mean steps from frame to frame,
    (n, 26).
    """
    return torch.cat([factors.mean(dim=1), factors.diff(dim=1).abs().mean(dim=1)], dim=1)


class SyncTraining:
    """Windows of one clip against the speech of all its windows: InfoNCE over offsets, both
    ways.
    """

    def __init__(self, net: EmbeddedSync, clips: Clips, num_clips: int, seed: int) -> None:
        self.net, self.clips, self.num_clips = net, clips, min(num_clips, len(clips))
        self.generator = torch.Generator().manual_seed(seed)
        self.spread = clips.cepstra.flatten(0, 1).std(dim=0)
        self.num_frames = min(SYNC_FRAMES, clips.mouths.shape[1] - 1)

    def loss(self) -> Tensor:
        """One batch."""
        chosen = torch.randperm(len(self.clips), generator=self.generator)[: self.num_clips]
        num_windows = self.num_frames - WINDOW_FRAMES + 1
        # the last frame has no whole window of speech
        last = self.clips.mouths.shape[1] - 1 - self.num_frames
        faces, speech = [], []
        for clip in chosen.tolist():
            start = int(torch.randint(last + 1, (), generator=self.generator))
            faces.append(self._mouths(self.clips.mouths[clip, start : start + self.num_frames]))
            speech.append(
                speech_windows(self._cepstra(self.clips.cepstra[clip, 4 * start :]), num_windows)
            )
        with torch.autocast("cpu", torch.bfloat16):
            a = self.net.embed_faces(torch.stack(faces))
            b = self.net.embed_speech(torch.cat(speech)).unflatten(0, (len(chosen), -1))
        logits = a.float() @ b.float().transpose(1, 2) / SYNC_TEMPERATURE
        target = torch.arange(num_windows).repeat(len(chosen))
        by_face = functional.cross_entropy(logits.flatten(0, 1), target)
        return (
            by_face + functional.cross_entropy(logits.transpose(1, 2).flatten(0, 1), target)
        ) / 2

    def _uniform(self, low: float, high: float) -> float:
        return float(torch.rand((), generator=self.generator)) * (high - low) + low

    def _mouths(self, mouths: Tensor) -> Tensor:
        """A clip's crops (n, 70, 78) shifted, mirrored, brightened, blurred and with noise:
        (n, 64, 72).
        """
        top, left = (
            int(i) for i in torch.randint(2 * SYNC_MARGIN_PX + 1, (2,), generator=self.generator)
        )
        x = mouths[:, top : top + CROP_SIZE[0], left : left + CROP_SIZE[1]].float() / 127.5 - 1.0
        x = x.flip(2) if self._uniform(0, 1) < 0.5 else x
        if self._uniform(0, 1) < 0.5:
            x = gaussian_blur(x[None], torch.full((1, 1), self._uniform(0.3, 1.6)))[0]
        x = x * self._uniform(0.7, 1.2) + self._uniform(-0.15, 0.15)
        return x + self._uniform(0, 0.06) * torch.randn(x.shape, generator=self.generator)

    def _cepstra(self, cepstra: Tensor) -> Tensor:
        """A clip's MFCC (steps, 13), louder or softer, through another microphone, with noise."""
        tilt = 0.2 * self.spread * torch.randn(cepstra.shape[1], generator=self.generator)
        hiss = 0.1 * self.spread * torch.randn(cepstra.shape, generator=self.generator)
        return cepstra + tilt + hiss


def factor_names(spread: Tensor) -> dict[str, float]:
    """Spread of every curve by name, for the card."""
    return dict(zip(FACTORS, (round(float(x), 5) for x in spread), strict=True))


# -- what the networks are worth -------------------------------------------------------------------

# Growing damage; the first is the weakest. Frame drop and shuffle are shares, wrong identity is a
# share of clips.
SEVERITIES = {
    "blur_px": (0.5, 1.0, 2.0, 4.0),
    "noise": (4.0, 10.0, 25.0, 50.0),
    "frame_drop": (0.1, 0.3, 0.6, 0.9),
    "frame_shuffle": (0.1, 0.3, 0.6, 1.0),
    "wrong_identity": (0.1, 0.3, 0.6, 1.0),
}
# A set of frames has no order, so FID cannot see these; it is shown for them and not judged.
ORDER_ONLY = ("frame_drop", "frame_shuffle")
MIN_SHARE_WITHIN_1 = 0.9
MAX_SHIFT_FRAMES = 10
READABLE = 0.5  # correlation of a curve with its truth
_FID_EVERY = 6  # frames

Clip = tuple[Tensor, np.ndarray]


def read_held_out(data: Path, rows: list[ManifestRow]) -> list[Clip]:
    """Frames, uint8 (n, H, W, 3), and audio of clips."""
    from rest_lightning.media.video import read_clip_audio, read_frames

    clips = []
    for row in rows:
        path = clip_path(data, row.clip_id)
        clips.append((torch.from_numpy(read_frames(path)), read_clip_audio(path, row.num_frames)))
    return clips


def sync_accuracy(folder: Path, clips: list[Clip], seed: int = 0) -> dict[str, Any]:
    """Offsets found for clips as they are and for clips shifted by up to 10 frames."""
    extractor = load_embedded("sync", folder)
    rng = np.random.default_rng(seed)
    errors: dict[str, list[int]] = {"as_rendered": [], "shifted": []}
    confidences = []
    for frames, audio in clips:
        sync = sync_of_clip(frames, audio, extractor)
        errors["as_rendered"].append(abs(sync.offset_frames))
        confidences.append(sync.confidence)
        shift = int(rng.integers(-MAX_SHIFT_FRAMES, MAX_SHIFT_FRAMES + 1))
        late, speech = shifted(frames, audio, shift)
        errors["shifted"].append(abs(sync_of_clip(late, speech, extractor).offset_frames - shift))
    shares = {
        key: round(float(np.mean(np.array(values) <= 1)), 4) for key, values in errors.items()
    }
    exact = {key: round(float(np.mean(np.array(values) == 0)), 4) for key, values in errors.items()}
    accepted = min(shares.values()) >= MIN_SHARE_WITHIN_1
    confidence = round(float(np.mean(confidences)), 4)
    num = len(clips)
    return {
        "num_clips": num,
        "within_1_frame": shares,
        "exact": exact,
        "sync_c": confidence,
        "accepted": accepted,
    }


def shifted(frames: Tensor, audio: np.ndarray, shift: int) -> Clip:
    """The clip with its lips ``shift`` frames late, 10 frames shorter or as many as the shift
    has.
    """
    reach = max(MAX_SHIFT_FRAMES, abs(shift))
    count = len(frames) - reach
    first_frame, first_sound = max(-shift, 0), max(shift, 0)
    start = first_sound * SAMPLES_PER_FRAME
    return frames[first_frame : first_frame + count], audio[
        start : start + count * SAMPLES_PER_FRAME
    ]


def image_accuracy(
    folder: Path, data: Path, rows: list[ManifestRow], clips: list[Clip]
) -> dict[str, Any]:
    """Correlation of every curve with the renderer's, and how often the nearest identity is the
    right one.
    """
    image = EmbeddedImage.from_pretrained(folder / "image")
    guesses, truths, identities = [], [], []
    for row, (frames, _) in zip(rows, clips, strict=True):
        chosen = torch.arange(0, len(frames), 4)
        with torch.inference_mode():
            _, curves, identity = image(resized(frames[chosen], IMAGE_PX))
        guesses.append(curves.numpy())
        truths.append(factors_of(read_sidecar(data, row.clip_id))[chosen.numpy()])
        identities.append(identity[[0, -1]])
    guess, truth = np.concatenate(guesses), np.concatenate(truths)
    first, last = torch.stack(identities, dim=1)
    right = (first @ last.T).argmax(dim=1) == torch.arange(len(first))
    return {
        "num_clips": len(rows),
        "correlation": {
            name: round(pearson(guess[:, i], truth[:, i]), 4) for i, name in enumerate(FACTORS)
        },
        "identity_found": round(float(right.float().mean()), 4),
    }


def frechet_answers(
    folder: Path, clips: list[Clip], others: list[Clip], seed: int = 0
) -> dict[str, Any]:
    """FID and FVD of damaged clips against the clips: they must grow with the damage.

    Args:
        folder: of the networks.
        clips: the truth.
        others: where wrong identities come from.
        seed: of the damage.
    """
    fid, fvd = FID(load_embedded("fid", folder)), FVD(load_embedded("fvd", folder))
    half = len(clips) // 2
    result: dict[str, Any] = {"num_clips": len(clips), "damage": {}}
    for frames, _ in clips:
        fid.update(frames[::_FID_EVERY], real=True)
        fvd.update(frames, real=True)
    accepted = True
    for kind, amounts in SEVERITIES.items():
        rows = []
        for amount in amounts:
            fid_of, fvd_of = _against(fid, fvd, damaged_clips(kind, amount, clips, others, seed))
            rows.append({"amount": amount, "fid": round(fid_of, 6), "fvd": round(fvd_of, 6)})
        grows = {
            key: all(a[key] < b[key] for a, b in pairwise(rows)) and rows[0][key] > 0
            for key in ("fid", "fvd")
        }
        result["damage"][kind] = {"rows": rows, "grows": grows}
        accepted &= grows["fvd"] and (grows["fid"] or kind in ORDER_ONLY)
    for metric in (fid, fvd):
        metric.reset()
    for i, (frames, _) in enumerate(clips):
        fid.update(frames[::_FID_EVERY], real=i < half)
        fvd.update(frames, real=i < half)
    floor = {**fid.compute(), **fvd.compute()}
    result["half_against_half"] = {key: round(float(value), 6) for key, value in floor.items()}
    return {**result, "accepted": accepted}


def _against(fid: FID, fvd: FVD, clips: Iterator[Tensor]) -> tuple[float, float]:
    for metric in (fid, fvd):
        for name in ("num_generated", "sum_generated", "outer_generated"):
            getattr(metric, name).zero_()
    for frames in clips:
        fid.update(frames[::_FID_EVERY], real=False)
        fvd.update(frames, real=False)
    return float(fid.compute()["fid"]), float(fvd.compute()["fvd"])


def damaged_clips(
    kind: str, amount: float, clips: list[Clip], others: list[Clip], seed: int
) -> Iterator[Tensor]:
    """The frames of every clip with one kind of damage."""
    if not others:
        raise ValueError("expected at least one clip of another identity, got none: give some")
    for i, (frames, _) in enumerate(clips):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        # the first clips are the first to go: more damage holds all of the lesser
        if kind == "wrong_identity":
            wrong = i < round(amount * len(clips))
            yield others[i % min(3, len(others))][0][: len(frames)] if wrong else frames
        else:
            yield _DAMAGES[kind](frames, amount, generator)


def _dropped(frames: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    return frames[dropped(len(frames), amount, generator)]


def _shuffled(frames: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    return torch.cat(
        [part[shuffled(len(part), amount, generator)] for part in frames.split(VIDEO_WINDOW)]
    )


def _blurred(frames: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    return blur(frames, amount)


_DAMAGES: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "blur_px": _blurred,
    "noise": noise,
    "frame_drop": _dropped,
    "frame_shuffle": _shuffled,
}


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """``card.json``, and ``card.md`` for readers."""
    from rest_lightning.media.files import whole_file

    with whole_file(folder / "card.json") as temporary:
        temporary.write_text(json.dumps(card, indent=2) + "\n")
    with whole_file(folder / "card.md") as temporary:
        temporary.write_text(markdown(card))


def markdown(card: dict[str, Any]) -> str:
    """The card as a page."""
    networks, held_out = card["networks"], card["held_out"]
    lines = [
        "# Embedded extractors",
        "",
        (
            "Small networks behind FID, FVD, E-FID, identity similarity and Sync-C / Sync-D, "
            "without published weights."
        ),
        (
            "They know synthetic talkers and nothing else; their numbers never stand beside those "
            "of published weights."
        ),
        "",
        f"Trained on {card['data']['num_train_clips']} synthetic clips by `{card['command']}`.",
        "",
        "| network | parameters | loss | steps | last loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, net in networks.items():
        lines.append(
            f"| {name} | {net['num_parameters']} | {net['loss']} | {net['num_steps']} | "
            f"{net['final_loss']} |"
        )
    sync, image, answers = held_out["sync"], held_out["image"], held_out["frechet"]
    correlations = ", ".join(f"{name} {value}" for name, value in image["correlation"].items())
    unread = [name for name in EXPRESSION if not image["correlation"][name] >= READABLE]
    lines += [
        "",
        f"On {sync['num_clips']} clips of unseen people and sentences:",
        "",
        f"* offset within 1 frame: {_shares(sync['within_1_frame'])}; exact: "
        f"{_shares(sync['exact'])} "
        f"({_verdict(sync['accepted'])}, 90 % wanted of both)",
        f"* correlation of the curves: {correlations}",
        *(
            [(f"* E-FID is blind to how these move (below {READABLE}): {', '.join(unread)}")]
            if unread
            else []
        ),
        f"* identity found among {image['num_clips']}: {image['identity_found']:.1%}",
        "",
        f"FID and FVD of {answers['num_clips']} damaged clips against themselves "
        f"({_verdict(answers['accepted'])}); "
        "a set of frames has no order, so FID is not judged by lost and shuffled frames. "
        f"Half of the clips against the other half: {answers['half_against_half']}.",
        "",
        "| damage | amount | FID | FVD |",
        "| --- | --- | --- | --- |",
    ]
    for kind, each in answers["damage"].items():
        lines += [
            (f"| {kind} | {row['amount']} | {row['fid']:.4f} | {row['fvd']:.4f} |")
            for row in each["rows"]
        ]
    return "\n".join(lines) + "\n"


def _shares(values: dict[str, float]) -> str:
    return ", ".join(f"{value:.1%} {key.replace('_', ' ')}" for key, value in values.items())


def _verdict(accepted: bool) -> str:
    return "accepted" if accepted else "NOT accepted"


# name -> network, its training, share of the training time, what its loss is
STAGES: dict[str, tuple[type[ShippedNetwork], Any, float, str]] = {
    "sync": (
        EmbeddedSync,
        SyncTraining,
        0.5,
        ("InfoNCE of lips and speech over the offsets of a clip"),
    ),
    "image": (
        EmbeddedImage,
        ImageTraining,
        0.25,
        ("smooth L1 of 13 face curves, blur, noise; InfoNCE of identity"),
    ),
    "video": (
        EmbeddedVideo,
        VideoTraining,
        0.25,
        "smooth L1 of motion, blur, noise, lost, shuffled; InfoNCE of identity",
    ),
}
_MAX_READING = 0.4  # of the budget


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--data", type=Path, default=Path("data/talkers"), help="synthetic talkers")
    parser.add_argument(
        "--out", type=Path, default=ASSETS, help=("folder of the networks and their card")
    )
    parser.add_argument(
        "--budget-min", type=float, default=15.0, help=("minutes of reading and training together")
    )
    parser.add_argument(
        "--only",
        choices=list(STAGES),
        nargs="+",
        default=list(STAGES),
        help=("train these, keep the others"),
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        default=1_000_000,
        help=("of every network; the time may end it earlier"),
    )
    parser.add_argument(
        "--max-clips", type=int, default=None, help=("use at most this many clips of each split")
    )
    parser.add_argument(
        "--frames-per-clip",
        type=int,
        default=12,
        help=("of the image network, drawn from every clip"),
    )
    parser.add_argument("--batch-clips", type=int, default=24, help="clips in a batch")
    parser.add_argument(
        "--acceptance-clips",
        type=int,
        default=66,
        help=("unseen clips that FID and FVD are judged on"),
    )
    parser.add_argument(
        "--threads", type=int, default=None, help=("of torch; None leaves its choice")
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Read, train, save, judge; the exit code is 1 when a network does not do what it must."""
    if args.budget_min <= 0 or args.batch_clips < 2:
        raise UserError(
            "expected --budget-min above 0 and --batch-clips of at least 2: correct them"
        )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started_s = time.monotonic()
    rows = {
        split: read_manifest(args.data, split)[: args.max_clips]
        for split in ("train", "val", "test")
    }
    if any(len(each) < 2 for each in rows.values()):
        counts = {split: len(each) for split, each in rows.items()}
        raise UserError(
            f"expected at least 2 clips of each split in {args.data}, got {counts}: synthesize more"
        )
    budget_s = 60.0 * args.budget_min
    rng = np.random.default_rng(args.seed)
    clips = read_clips(args.data, rows["train"], args.frames_per_clip, rng, _MAX_READING * budget_s)
    print(f"read {len(clips)} of {len(rows['train'])} training clips", flush=True)
    networks = train(args, clips, budget_s - (time.monotonic() - started_s))
    card = {
        "command": COMMAND,
        "minutes": args.budget_min,
        "data": {
            "dataset": read_dataset_json(args.data),
            "num_train_clips": len(clips),
            "frames_per_clip": args.frames_per_clip,
        },
        "networks": networks,
        "held_out": judge(args, rows),
        "seed": args.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_card(args.out, card)
    print(markdown(card), flush=True)
    return 0 if all(card["held_out"][key]["accepted"] for key in ("sync", "frechet")) else 1


def train(args: argparse.Namespace, clips: Clips, seconds: float) -> dict[str, Any]:
    """Train and save the networks; what the card says of each. Those left out keep what the old
    card said.
    """
    old = args.out / "card.json"
    networks: dict[str, Any] = json.loads(old.read_text())["networks"] if old.is_file() else {}
    total = sum(STAGES[name][2] for name in args.only)
    for name in args.only:
        network, training, share, loss = STAGES[name]
        net = network()
        stage = training(net, clips, args.batch_clips, args.seed)
        parts = [
            net,
            *(
                part
                for part in vars(stage).values()
                if isinstance(part, torch.nn.Module) and part is not net
            ),
        ]
        steps, final = fit(
            name, parts, stage.loss, seconds * share / total, args.lr, args.max_steps
        )
        net.save_pretrained(args.out / name)
        networks[name] = {
            "num_parameters": sum(p.numel() for p in net.parameters()),
            "loss": loss,
            "num_steps": steps,
            "final_loss": final,
            "batch_clips": args.batch_clips,
            "lr": args.lr,
        }
        if name == "image":
            networks[name]["unit_of_curves"] = factor_names(stage.spread)
    return networks


def judge(args: argparse.Namespace, rows: dict[str, Any]) -> dict[str, Any]:
    """Everything on clips of people and sentences that training has not seen; from the saved
    files.
    """
    held_out = rows["test"] + rows["val"]
    clips = read_held_out(args.data, held_out)
    count = min(args.acceptance_clips, len(rows["test"]))
    print(f"judging on {len(held_out)} unseen clips", flush=True)
    return {
        "sync": sync_accuracy(args.out, clips, args.seed),
        "image": image_accuracy(args.out, args.data, held_out, clips),
        "frechet": frechet_answers(args.out, clips[:count], clips[len(rows["test"]) :], args.seed),
    }


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    return exit_code(lambda: run(parser.parse_args(args)))


if __name__ == "__main__":
    sys.exit(main())
