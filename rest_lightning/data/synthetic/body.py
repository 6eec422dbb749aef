"""Background, neck, clothes and back hair of the synthetic talkers, painted once per identity."""

from __future__ import annotations

import numpy as np

from rest_lightning.data.synthetic.geometry import Array, bump, smoothstep
from rest_lightning.data.synthetic.hair import hair_back, hair_colour
from rest_lightning.data.synthetic.identity import Identity
from rest_lightning.data.synthetic.raster import linear_to_srgb, over, srgb_to_linear, texture_grid

# How far the neckline drops below the shoulder line.
_OPENING = {
    "crew": 0.035,
    "v_neck": 0.14,
    "collar": 0.07,
    "turtleneck": 0.0,
    "scoop": 0.10,
    "jacket": 0.16,
}


def paint_background(p: Identity, size_px: int) -> Array:
    """sRGB 0..1 (size_px, size_px, 3): a soft gradient with blurred blobs."""
    axis = (np.arange(size_px) + 0.5) / size_px
    x, y = np.meshgrid(axis, axis)
    t = 0.5 + (x - 0.5) * np.cos(p.background_angle) + (y - 0.5) * np.sin(p.background_angle)
    t = smoothstep(-0.2, 1.2, t)[..., None]
    image = np.asarray(p.background) * (1 - t) + np.asarray(p.background_2) * t
    for bx, by, r, *rgb in p.blobs:
        weight = 0.75 * (1 - smoothstep(0.35, 1.0, np.hypot(x - bx, y - by) / r))[..., None]
        image = image * (1 - weight) + np.asarray(rgb) * weight
    glow = 0.94 + 0.10 * bump(x, y, 0.5 + 0.2 * p.light_x, 0.4, 0.4, 0.4)
    return np.clip(image * glow[..., None] / 255, 0, 1)


def _unlinear(image: Array) -> Array:
    alpha = np.clip(image[..., 3:], 1e-6, 1)
    return np.concatenate([linear_to_srgb(image[..., :3] / alpha) * alpha, image[..., 3:]], axis=-1)


def paint_back(p: Identity, size_px: int) -> Array | None:
    """Premultiplied sRGB texture (T, T, 4) of the hair behind the neck, or None."""
    x, y = texture_grid(size_px)
    mask = hair_back(p, x, y)
    if mask.max() < 0.5:
        return None
    return _unlinear(
        over(np.zeros((*x.shape, 4)), hair_colour(p, x, y, behind=p.hair_style != "bun"), mask)
    )


def paint_body(p: Identity, size_px: int) -> Array:
    """Premultiplied sRGB texture (T, T, 4) of neck, shoulders and clothes."""
    x, y = texture_grid(size_px)
    a = np.abs(x)
    skin = srgb_to_linear(p.skin)
    nw = p.neck_width
    flare = nw + 0.20 * smoothstep(p.shoulder_y - 0.07, p.shoulder_y + 0.10, y) ** 1.5
    if p.clothes == "turtleneck":
        flare = np.full_like(x, nw)
    neck = smoothstep(-0.005, 0.005, flare - a) * smoothstep(0.50, 0.52, y)
    round_shade = np.sqrt(np.clip(1.02 - (x / np.maximum(flare, 0.01)) ** 2, 0.05, 1))
    side = 0.12 * p.light_x * np.clip(x / nw, -1, 1)
    slanted = y + 0.25 * x * p.light_x - 0.18 * np.clip(a - 0.05, 0, 1)
    chin_shadow = 1 - smoothstep(p.chin_y - 0.01, p.chin_y + 0.12, slanted)
    light = (0.36 + 0.46 * round_shade + side) * (1 - 0.42 * chin_shadow)
    tendon = bump(a - 0.2 * (p.shoulder_y + 0.04 - y), y, 0.018, p.shoulder_y - 0.01, 0.012, 0.04)
    light = light + 0.05 * tendon
    rgb = skin * np.stack([light**0.92, light, light**1.04], axis=-1)
    image = over(np.zeros((*x.shape, 4)), rgb, neck)
    # clothes: below the shoulder line and outside the neckline
    away = np.clip(a - nw, 0, None)
    shoulder = p.shoulder_y - 0.012 + 0.24 * away + 0.38 * away**2
    opening = _OPENING[p.clothes]
    across = np.clip(a / (nw * 1.12), 0, 1)
    bowl = np.sqrt(np.clip(1 - across**2, 0, 1))
    curve = 1 - across if p.clothes in ("v_neck", "jacket", "collar") else bowl
    neckline = p.shoulder_y - 0.012 + opening * curve
    if p.clothes == "turtleneck":
        neckline = np.where(a < nw * 1.10, p.shoulder_y - 0.055 + 0.02 * bowl, shoulder)
        shoulder = np.where(a < nw * 1.10, neckline, shoulder)
    top = np.maximum(shoulder, neckline)
    mask = smoothstep(-0.005, 0.005, y - top)
    cloth = srgb_to_linear(p.cloth)
    fall = 0.62 + 0.34 * np.sqrt(np.clip(1 - (x / 0.62) ** 2, 0, 1)) + 0.12 * p.light_x * x / 0.5
    rim = 1 - 0.22 * np.exp(-(((y - top) / 0.02) ** 2))
    folds = 1 + 0.05 * np.sin(9 * x + 3 * np.sin(5 * y) + p.hair_phase)
    shade = (fall * rim * folds * (0.92 - 0.15 * smoothstep(0.9, 1.1, y)))[..., None]
    if p.clothes == "jacket":
        shirt = smoothstep(-0.005, 0.005, y - (p.shoulder_y - 0.02 + 0.06 * (1 - across)))
        image = over(
            image, srgb_to_linear(p.cloth_2) * (0.85 - 0.12 * round_shade[..., None]), shirt * neck
        )
    image = over(image, cloth * shade, mask)
    if p.clothes in ("collar", "jacket"):
        inner = neckline if p.clothes == "collar" else p.shoulder_y - 0.02 + 0.06 * (1 - across)
        flap = inner - 0.022 + 1.3 * np.clip(a - nw, 0, None)  # slopes down from the neck
        hem = inner + 0.5 * np.clip(a - nw, 0, None)
        band = smoothstep(-0.004, 0.004, y - flap) * (1 - smoothstep(0.028, 0.040, y - hem))
        reach = smoothstep(0.2, 0.3, across) * (1 - smoothstep(nw * 1.45, nw * 1.6, a))
        tone = cloth if p.clothes == "collar" else srgb_to_linear(p.cloth_2)
        image = over(image, tone * (0.80 + 0.25 * across[..., None]), band * reach)
    return _unlinear(image)
