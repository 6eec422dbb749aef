"""The losses of the embedded extractors and the loop that all three share."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from rest_lightning.commands.extractor_data import SYNC_MARGIN_PX, Clips
from rest_lightning.metrics.degrade import dropped, gaussian_blur, shuffled
from rest_lightning.metrics.extractors import FACTORS, VIDEO_WINDOW, EmbeddedImage, EmbeddedSync, EmbeddedVideo
from rest_lightning.metrics.mouth import CROP_SIZE
from rest_lightning.metrics.syncnet import WINDOW_FRAMES, speech_windows

IDENTITY_TEMPERATURE, SYNC_TEMPERATURE = 0.1, 0.07
SYNC_FRAMES = 45  # of a clip in a batch: 41 windows, offsets up to 40
_MAX_BLUR_PX, _MAX_NOISE = 2.0, 0.12  # of images in [-1, 1]


def fit(
    name: str, parts: list[nn.Module], loss_of: Callable[[], Tensor], seconds: float, lr: float, max_steps: int
) -> tuple[int, float]:
    """AdamW for ``seconds`` or ``max_steps``, the learning rate falling linearly; returns steps and the mean loss."""
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
            print(f"{name}: step {step}, {elapsed_s:.0f} of {seconds:.0f} s, loss {mean_loss:.4f}", flush=True)
    for part in parts:
        part.eval()
    return step, round(mean_loss, 5)


def identity_loss(a: Tensor, b: Tensor) -> Tensor:
    """InfoNCE of two views (n, D) of length 1 of the same n clips: each is nearest to its other view."""
    logits = a @ b.T / IDENTITY_TEMPERATURE
    target = torch.arange(len(a))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


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
        frame = torch.randint(self.clips.images.shape[1], (2, len(chosen)), generator=self.generator)
        images = torch.cat([self.clips.images[chosen, each] for each in frame])
        factors = torch.cat([self.clips.image_factors[chosen, each] for each in frame])
        x, damage = damaged(images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0), self.generator)
        with torch.autocast("cpu", torch.bfloat16):
            features, curves, identity = self.net(x)
            guess = self.damage(features)
        loss = functional.smooth_l1_loss(curves.float(), (factors - self.mean) / self.spread, beta=0.5)
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
    """How the mouth and the head move, identity, and the damage: blur, noise, lost frames, frames out of order."""

    def __init__(self, net: EmbeddedVideo, clips: Clips, num_clips: int, seed: int) -> None:
        self.net, self.clips, self.num_clips = net, clips, min(num_clips, len(clips))
        self.generator = torch.Generator().manual_seed(seed)
        every = motion_of(self.clips.video_factors[:, : 2 * VIDEO_WINDOW].unflatten(1, (2, VIDEO_WINDOW)).flatten(0, 1))
        self.mean, self.spread = every.mean(dim=0), every.std(dim=0).clamp(min=1e-4)
        self.motion = nn.Linear(net.num_features, every.shape[1])  # these three are of training only
        self.damage = nn.Linear(net.num_features, 4)
        self.identity = nn.Linear(net.num_features, 32)

    def loss(self) -> Tensor:
        """One batch: two windows of every clip, each damaged in its own way."""
        chosen = torch.randperm(len(self.clips), generator=self.generator)[: self.num_clips].repeat(2)
        num = len(chosen)
        last = self.clips.videos.shape[1] - VIDEO_WINDOW
        start = torch.randint(last + 1, (num, 1), generator=self.generator)
        order, lost = self._orders(num)
        factors = self.clips.video_factors[chosen[:, None], start + torch.arange(VIDEO_WINDOW)]
        windows = self.clips.videos[chosen[:, None], start + order].permute(0, 1, 4, 2, 3).float().div(127.5).sub(1.0)
        x, spoilt = damaged(windows.flatten(1, 2), self.generator)  # one blur per window
        with torch.autocast("cpu", torch.bfloat16):
            features = self.net(x.view(windows.shape)).float()
            motion, damage, identity = self.motion(features), self.damage(features), self.identity(features)
        whole = lost.sum(dim=1) == 0  # frames out of order do not move as the curves say
        wanted = (motion_of(factors) - self.mean) / self.spread
        error = functional.smooth_l1_loss(motion.float(), wanted, beta=0.5, reduction="none").mean(dim=1)
        loss = (error * whole).sum() / whole.sum().clamp(min=1)
        loss = loss + 2.0 * functional.smooth_l1_loss(damage.float(), torch.cat([spoilt, lost], dim=1), beta=0.2)
        # Little: who it is must not drown how it moves.
        return loss + 0.1 * identity_loss(*functional.normalize(identity.float(), dim=1).chunk(2))

    def _orders(self, num: int) -> tuple[Tensor, Tensor]:
        """Frames shown (num, 16) and the shares lost and shuffled (num, 2): a third is lost, a third shuffled."""
        kinds = torch.randint(3, (num,), generator=self.generator).tolist()
        shares = torch.rand(num, generator=self.generator)
        orders, lost = [], torch.zeros(num, 2)
        for i, kind in enumerate(kinds):
            share = float(shares[i])
            pick = (dropped, shuffled)[kind - 1]
            orders.append(pick(VIDEO_WINDOW, share, self.generator) if kind else torch.arange(VIDEO_WINDOW))
            if kind:
                lost[i, kind - 1] = share
        return torch.stack(orders), lost


def motion_of(factors: Tensor) -> Tensor:
    """What a window (n, 16, 13) of curves does: means, and mean steps from frame to frame, (n, 26)."""
    return torch.cat([factors.mean(dim=1), factors.diff(dim=1).abs().mean(dim=1)], dim=1)


class SyncTraining:
    """Windows of one clip against the speech of all its windows: InfoNCE over offsets, both ways."""

    def __init__(self, net: EmbeddedSync, clips: Clips, num_clips: int, seed: int) -> None:
        self.net, self.clips, self.num_clips = net, clips, min(num_clips, len(clips))
        self.generator = torch.Generator().manual_seed(seed)
        self.spread = clips.cepstra.flatten(0, 1).std(dim=0)
        self.num_frames = min(SYNC_FRAMES, clips.mouths.shape[1] - 1)

    def loss(self) -> Tensor:
        """One batch."""
        chosen = torch.randperm(len(self.clips), generator=self.generator)[: self.num_clips]
        num_windows = self.num_frames - WINDOW_FRAMES + 1
        last = self.clips.mouths.shape[1] - 1 - self.num_frames  # the last frame has no whole window of speech
        faces, speech = [], []
        for clip in chosen.tolist():
            start = int(torch.randint(last + 1, (), generator=self.generator))
            faces.append(self._mouths(self.clips.mouths[clip, start : start + self.num_frames]))
            speech.append(speech_windows(self._cepstra(self.clips.cepstra[clip, 4 * start :]), num_windows))
        with torch.autocast("cpu", torch.bfloat16):
            a = self.net.embed_faces(torch.stack(faces))
            b = self.net.embed_speech(torch.cat(speech)).unflatten(0, (len(chosen), -1))
        logits = a.float() @ b.float().transpose(1, 2) / SYNC_TEMPERATURE
        target = torch.arange(num_windows).repeat(len(chosen))
        by_face = functional.cross_entropy(logits.flatten(0, 1), target)
        return (by_face + functional.cross_entropy(logits.transpose(1, 2).flatten(0, 1), target)) / 2

    def _uniform(self, low: float, high: float) -> float:
        return float(torch.rand((), generator=self.generator)) * (high - low) + low

    def _mouths(self, mouths: Tensor) -> Tensor:
        """A clip's crops (n, 70, 78) shifted, mirrored, brightened, blurred and with noise: (n, 64, 72)."""
        top, left = (int(i) for i in torch.randint(2 * SYNC_MARGIN_PX + 1, (2,), generator=self.generator))
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
