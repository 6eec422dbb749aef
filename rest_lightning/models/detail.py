"""The portrait's detail, put back into decoded frames (beyond the paper).

A VAE of 32x32x8 compression blurs hair, glasses and skin. What it loses of the portrait is known:
the portrait minus its reconstruction. Where a frame agrees with that reconstruction, or shows it
moved, the lost detail belongs. Each frame depends on the portrait and on itself alone, so streaming
stays causal and exact under any cutting.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rest_lightning.constants import SPATIAL_RATIO
from rest_lightning.errors import UserError
from rest_lightning.models.causal import RMSNorm, SpatialConv, Stream, patchify, unpatchify
from rest_lightning.models.pretrained import PretrainedPart

_RESIDUAL, _RECONSTRUCTION, _FEATURES = (
    "detail.residual",
    "detail.reconstruction",
    "detail.features",
)
_FINE_RESIDUAL, _FINE_RECONSTRUCTION = "enlarged.residual", "enlarged.reconstruction"


class DetailTransfer(PretrainedPart):
    """What every way to put detail back offers. Frames are (B, 3, F, H, W) in [-1, 1].

    What belongs to the portrait is kept in the decoder's
    :class:`~rest_lightning.models.causal.Stream`, beside the past of its convolutions, so that
    snapshots, rows and changes of identity carry it along.
    """

    def start(self, reference: Tensor, reconstruction: Tensor, stream: Stream) -> None:
        """Remembers a portrait.

        Args:
            reference: (B, 3, H, W), the portrait.
            reconstruction: (B, 3, H, W), what the VAE makes of it.
            stream: of the decoder.
        """
        stream.remember(_RESIDUAL, reference - reconstruction)
        stream.remember(_RECONSTRUCTION, reconstruction)

    def forward(self, frames: Tensor, stream: Stream) -> Tensor:
        """Decoded frames (B, 3, F, H, W) with the portrait's detail, the same shape."""
        raise NotImplementedError


class AgreementDetail(DetailTransfer):
    """The closed form: ``frame + residual * exp(-blur((frame - reconstruction)^2) / tolerance^2)``.

    ``reconstruction`` is what the VAE makes of the portrait, ``residual`` the portrait minus that.
    With ``hold`` a part of small differences is taken back: ``hold * (reconstruction - frame) *
    exp(-blur(...) / hold_tolerance^2)`` is added. So what does not move shows the portrait itself,
    and not the noise that a small network leaves there.

    With ``seam_px`` steps of ``frame - reconstruction`` at the borders of the latents' squares of
    32x32 pixels are evened out first, see :func:`even_out_seams`. Such a step is an error of one
    latent; it would be seen as a pale square where the rest is held back or covered by detail.

    Args:
        blur_px: standard deviation of the Gaussian blur, in pixels of a picture of 256.
        tolerance: difference, in [-1, 1] units, at which a third of the detail is left.
        hold: share of a vanishing difference that is taken back, 0 to 1.
        hold_tolerance: difference at which a third of that share is taken back.
        seam_px: how far from a border of squares, in pixels, its step is spread, at most 16; 0
            leaves steps as they are.
    """

    def __init__(
        self,
        blur_px: float = 2.5,
        tolerance: float = 0.2,
        hold: float = 0.0,
        hold_tolerance: float = 0.12,
        seam_px: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= seam_px <= SPATIAL_RATIO // 2:
            raise UserError(
                f"expected a seam_px from 0 to {SPATIAL_RATIO // 2} pixels, got {seam_px}: half of "
                "a latent's square is the most"
            )
        self.blur_px, self.tolerance = blur_px, tolerance
        self.hold, self.hold_tolerance = hold, hold_tolerance
        self.seam_px = seam_px

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("blur_px", "tolerance", "hold", "hold_tolerance", "seam_px")
        return {name: getattr(self, name) for name in names}

    def forward(self, frames: Tensor, stream: Stream) -> Tensor:
        """See :meth:`DetailTransfer.forward`."""
        change = frames - stream[_RECONSTRUCTION][:, :, None]
        if self.seam_px:
            change = even_out_seams(change, self.seam_px)
            frames = stream[_RECONSTRUCTION][:, :, None] + change
        blurred = _blurred_square(change, self.blur_px)
        weight = torch.exp(-blurred / self.tolerance**2)[:, None]
        frames = frames + stream[_RESIDUAL][:, :, None] * weight
        if not self.hold:
            return frames
        held = self.hold * torch.exp(-blurred / self.hold_tolerance**2)[:, None]
        return frames - change * held


class EnlargedDetail:
    """Frames at twice their size, with the photograph's own detail of that size.

    ``out = U(frame) + (photograph - U(D(photograph))) * U(weight)``, ``weight =
    exp(-blur((decoded - reconstruction)^2) / tolerance^2)``, with U and D the bicubic enlargement
    and reduction by two. A frame shows what D(photograph) has, by any way to put detail back; this
    adds what is finer, where the decoded frame agrees with the decoded portrait. What moves shows
    the enlarged frame alone: detail in the wrong place would be a second edge.

    Where the photograph itself was enlarged to get here, its finer part is nearly zero, and so is
    what is added.

    Args:
        blur_px: standard deviation of the Gaussian blur, in pixels of a picture of 256.
        tolerance: difference, in [-1, 1] units, at which a third of the detail is left.

    Attributes:
        factor: how much larger the frames become.
    """

    factor = 2

    def __init__(self, blur_px: float = 2.5, tolerance: float = 0.15) -> None:
        self.blur_px, self.tolerance = blur_px, tolerance

    def reduce(self, photograph: Tensor) -> Tensor:
        """D: a photograph (B, 3, 2 H, 2 W) at the size that the model works at, (B, 3, H, W)."""
        return _resize(photograph, 1 / self.factor)

    def start(self, photograph: Tensor, reconstruction: Tensor, stream: Stream) -> None:
        """Remembers a portrait.

        Args:
            photograph: (B, 3, 2 H, 2 W) in [-1, 1].
            reconstruction: (B, 3, H, W), what the VAE makes of it at the model's size.
            stream: of the decoder.
        """
        coarse = _resize(self.reduce(photograph), self.factor)
        stream.remember(_FINE_RESIDUAL, photograph - coarse)
        stream.remember(_FINE_RECONSTRUCTION, reconstruction)

    def __call__(self, frames: Tensor, decoded: Tensor, stream: Stream) -> Tensor:
        """Frames at twice their size, each by itself.

        Args:
            frames: (B, 3, F, H, W) in [-1, 1], with the portrait's detail.
            decoded: the same frames without it.
            stream: of the decoder.

        Returns:
            (B, 3, F, 2 H, 2 W) float32.
        """
        change = decoded.float() - stream[_FINE_RECONSTRUCTION][:, :, None]
        weight = torch.exp(-_blurred_square(change, self.blur_px) / self.tolerance**2)
        large = _resize(frames.float().transpose(1, 2).flatten(0, 1), self.factor)
        fine = stream[_FINE_RESIDUAL][:, None]
        shape = (*weight.shape[:2], *fine.shape[2:])
        weight = _resize(weight.flatten(0, 1)[:, None], self.factor).clamp(0, 1)
        return torch.addcmul(
            large.view(shape), fine, weight.view(*shape[:2], 1, *shape[3:])
        ).transpose(1, 2)


class LearnedDetail(DetailTransfer):
    """A small network that moves the detail along: ``frame + gate * warp(residual, flow) +
    remainder``.

    It sees patches of 8x8 pixels of the frame, the reconstruction and the residual. Flow and gate
    are found for every 4x4 pixels and enlarged; the remainder has full size. Untrained, it leaves
    frames as they are.

    Args:
        width: channels.
        num_blocks: residual blocks of two 3x3 convolutions, on patches.
    """

    patch_size = 8
    max_flow_px = 16.0  # of a picture of 256

    def __init__(self, width: int = 64, num_blocks: int = 3) -> None:
        super().__init__()
        self._config = {"width": width, "num_blocks": num_blocks}
        values = 3 * self.patch_size**2
        self.frame_in = nn.Linear(values, width)
        self.portrait_in = nn.Linear(2 * values, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(num_blocks))
        self.norm = RMSNorm(width)
        self.motion_out = nn.Linear(width, 4 * 3)
        self.remainder_out = nn.Linear(width, values)
        for layer in (self.motion_out, self.remainder_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)

    def start(self, reference: Tensor, reconstruction: Tensor, stream: Stream) -> None:
        """See :meth:`DetailTransfer.start`; the portrait's part of the first layer is computed
        here, once.
        """
        dtype = self.frame_in.weight.dtype
        stream.remember(_RESIDUAL, reference - reconstruction)
        pair = torch.cat([reconstruction, reference - reconstruction], dim=1)[:, :, None]
        patches = torch.cat(
            [patchify(half, self.patch_size) for half in pair.chunk(2, dim=1)], dim=-1
        )
        stream.remember(_FEATURES, self.portrait_in(patches.to(dtype)))

    def forward(self, frames: Tensor, stream: Stream) -> Tensor:
        """See :meth:`DetailTransfer.forward`."""
        x = self.frame_in(patchify(frames, self.patch_size)) + stream[_FEATURES].to(frames.dtype)
        for block in self.blocks:
            x = block(x)
        x = F.silu(self.norm(x))
        flow, gate = self._motion(x, frames.shape[-2:])
        remainder = unpatchify(self.remainder_out(x), self.patch_size)
        residual = stream[_RESIDUAL].float()[:, None].expand(-1, frames.shape[2], -1, -1, -1)
        moved = warp(residual.flatten(0, 1), flow.flatten(0, 1)).unflatten(0, flow.shape[:2])
        return frames + remainder + (gate * moved).transpose(1, 2).to(frames.dtype)

    def _motion(self, x: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Flow (B, F, 2, H, W) in pixels and gate (B, F, 1, H, W) in 0..1 from features (B, F, h,
        w, C).
        """
        motion = self.motion_out(x).float()
        batch = motion.shape[:2]
        motion = F.pixel_shuffle(motion.permute(0, 1, 4, 2, 3).flatten(0, 1), 2)
        motion = F.interpolate(
            motion, size=tuple(size), mode="bilinear", align_corners=False
        ).unflatten(0, batch)
        limit = self.max_flow_px * size[-1] / 256
        return limit * torch.tanh(motion[:, :, :2] / self.max_flow_px), torch.sigmoid(
            motion[:, :, 2:]
        )


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.conv1, self.conv2 = SpatialConv(width, width), SpatialConv(width, width)
        nn.init.zeros_(self.conv2.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


def warp(pictures: Tensor, flow: Tensor) -> Tensor:
    """Returns pictures (N, C, H, W) read at places moved by ``flow``.

    Args:
        flow: (N, 2, H, W), x and y in pixels; reading is bilinear, and borders are repeated.
    """
    height, width = pictures.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device),
        torch.arange(width, device=flow.device),
        indexing="ij",
    )
    grid = torch.stack([x + flow[:, 0], y + flow[:, 1]], dim=-1)
    scale = grid.new_tensor([2 / width, 2 / height])
    return F.grid_sample(
        pictures, (grid + 0.5) * scale - 1, padding_mode="border", align_corners=False
    )


def even_out_seams(
    change: Tensor, reach_px: int = 16, limit: float = 0.3, along_px: float = 2.0
) -> Tensor:
    """Steps at the borders of squares of 32x32 pixels become ramps on both sides of them.

    To measure the step of a border, a straight line is drawn through the 6 pixels on each side and
    continued to the border; the step is the gap between the two, so a slope is none. It is smoothed
    along the border, and a large one is left alone, as something that moved: it counts ``step *
    exp(-mean of colours of step^2 / limit^2)``. Half of it is added on the one side and taken off
    on the other, falling to zero at ``reach_px``. First all vertical borders, then all horizontal
    ones.

    Args:
        change: (B, 3, F, H, W), frames minus the portrait's reconstruction, in [-2, 2].
        reach_px: of a ramp, 1 to 16.
        limit: step, in the units of ``change``, of which a third is evened out.
        along_px: standard deviation of the smoothing along a border.

    Returns:
        The same shape; each frame by itself.
    """
    for _ in range(2):
        change = _even_out_vertical(change, reach_px, limit, along_px).transpose(-1, -2)
    return change


def _even_out_vertical(change: Tensor, reach_px: int, limit: float, along_px: float) -> Tensor:
    width = change.shape[-1]
    if width == SPATIAL_RATIO:
        return change
    squares = change.unflatten(-1, (-1, SPATIAL_RATIO))
    left, right = squares[..., :-1, :], squares[..., 1:, :]
    # Means of 2 and of 4 pixels lie 1 and 4 pixels from the border.
    near, far = left[..., -2:].mean(-1), left[..., -6:-2].mean(-1)
    ends = near + (near - far) / 3
    near, far = right[..., :2].mean(-1), right[..., 2:6].mean(-1)
    steps = near + (near - far) / 3 - ends  # (B, 3, F, H, borders)
    steps = _blur(steps.movedim(-1, -2)[..., None], along_px, down=True)[..., 0].movedim(-2, -1)
    steps = steps * torch.exp(-steps.square().mean(dim=1, keepdim=True) / limit**2)
    middles = torch.arange(width, device=change.device, dtype=torch.float32) + 0.5
    borders = torch.arange(SPATIAL_RATIO, width, SPATIAL_RATIO, device=change.device)
    offsets = middles - borders[:, None]
    ramps = -0.5 * offsets.sign() * (1 - offsets.abs() / reach_px).clamp(min=0)
    return change + steps @ ramps.to(steps.dtype)


def _blurred_square(change: Tensor, blur_px: float) -> Tensor:
    """How much (B, 3, F, H, W) differs from zero around each place: (B, F, H, W); ``blur_px`` is
    that of a picture of 256.
    """
    return _blur(change.square().mean(dim=1), blur_px * change.shape[-1] / 256)


def _resize(pictures: Tensor, factor: float) -> Tensor:
    """Pictures (N, C, H, W) larger or smaller, bicubic (a = -0.5, as in Pillow)."""
    return F.interpolate(
        pictures, scale_factor=factor, mode="bicubic", align_corners=False, antialias=True
    )


def _blur(planes: Tensor, sigma_px: float, down: bool = False) -> Tensor:
    """Gaussian blur of the last two dimensions, or of the columns alone (``down``), edges
    repeated.
    """
    radius = max(1, round(3 * sigma_px))
    x = torch.arange(-radius, radius + 1, device=planes.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (x / sigma_px).square())
    kernel = (kernel / kernel.sum()).to(planes.dtype)
    flat = planes.flatten(0, -3)[:, None]
    if not down:
        flat = F.conv2d(
            F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel[None, None, None]
        )
    flat = F.conv2d(
        F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel[None, None, :, None]
    )
    return flat[:, 0].view(planes.shape)
