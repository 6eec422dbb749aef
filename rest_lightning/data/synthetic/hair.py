"""Hair of the synthetic talkers: soft masks over the texture grid, smooth shading, no strands."""

from __future__ import annotations

import numpy as np

from rest_lightning.data.synthetic.geometry import Array, bump, smoothstep
from rest_lightning.data.synthetic.identity import Identity
from rest_lightning.data.synthetic.raster import srgb_to_linear

# name -> (thickness on top, at the sides, sideburn end, growth of both with hair_volume)
_SHAPE = {
    "balding": (0.0, 0.006, 0.53, 0.004),
    "buzz": (0.008, 0.006, 0.46, 0.006),
    "short": (0.016, 0.010, 0.47, 0.022),
    "side_part": (0.022, 0.012, 0.47, 0.022),
    "quiff": (0.034, 0.007, 0.45, 0.026),
    "curly": (0.036, 0.030, 0.54, 0.030),
    "afro": (0.060, 0.055, 0.58, 0.035),
    "bun": (0.016, 0.010, 0.44, 0.010),
    "bob": (0.030, 0.036, 0.50, 0.026),
    "long": (0.028, 0.030, 0.50, 0.024),
    "wavy": (0.034, 0.044, 0.50, 0.030),
}
_CURTAIN = ("bob", "long", "wavy")


def _thickness(p: Identity) -> tuple[float, float, float]:
    top, side, end, growth = _SHAPE[p.hair_style]
    return top + growth * p.hair_volume, side + growth * p.hair_volume * 0.8, end


def _outline_wave(p: Identity, x: Array, y: Array) -> Array:
    """Undulation of the outer contour, largest for curls."""
    strength = {"curly": 0.0085, "afro": 0.005, "wavy": 0.010}.get(p.hair_style, 0.003) * (
        0.5 + p.waviness
    )
    angle = np.arctan2(y - 0.42, x)
    waves = 13 if p.hair_style in ("curly", "afro") else 5
    ripple = np.sin(waves * angle + p.hair_phase) + 0.7 * np.sin(
        (waves * 1.7 // 1) * angle + 2 * p.hair_phase
    )
    return strength * (ripple + np.sin(y * 30 + p.hair_phase) * (p.hair_style == "wavy"))


def _curtain_end(p: Identity) -> float:
    return 0.66 + 0.13 * p.hair_length if p.hair_style == "bob" else 0.92 + 0.2 * p.hair_length


def _outer(p: Identity, x: Array, y: Array) -> Array:
    """Approximate distance inside the hair's outer outline, positive inside."""
    top, side, _ = _thickness(p)
    half: Array | float = p.face_width + side
    if p.hair_style not in (*_CURTAIN, "curly", "afro"):
        # cropped sides end in the skin
        half = p.face_width + side * (1 - smoothstep(0.34, 0.46, y))
    high = p.cheek_y - p.head_top + top
    lean = x - (
        0.02 * np.sign(p.part) * bump(x, y, 0.0, p.head_top, 0.3, 0.08)
        if p.hair_style == "side_part"
        else 0.0
    )
    rx, ry = lean / half, (y - p.cheek_y) / high
    if p.hair_style in _CURTAIN:
        flare = 1 + (0.10 if p.hair_style != "wavy" else 0.22) * smoothstep(0.5, 0.85, y) * (
            0.3 + p.hair_volume
        )
        rx = np.where(y > p.cheek_y, rx / flare, rx)
        ry = np.where(y > p.cheek_y, np.maximum(y - _curtain_end(p) + 0.12, 0) / 0.12, ry)
        radius = (np.abs(rx) ** 2.4 + np.abs(ry) ** 2.4) ** (1 / 2.4)
        reach = 0.30 - 0.16 * smoothstep(p.cheek_y - 0.12, p.cheek_y + 0.12, y)
    else:
        if p.hair_style in ("curly", "afro"):  # closes roundly below the ears
            ry = np.where(y > p.cheek_y, (y - p.cheek_y) / (0.15 + 0.05 * p.hair_volume), ry)
        radius = (np.abs(rx) ** 2.45 + np.abs(ry) ** 2.45) ** (1 / 2.45)
        reach = np.full_like(x, 0.28)
    return (1 - radius) * reach + _outline_wave(p, x, y)


def _soft(distance: Array, width: float) -> Array:
    return smoothstep(-width, width, distance)


def hair_back(p: Identity, x: Array, y: Array) -> Array:
    """Opacity of the hair behind neck and head."""
    if p.hair_style in ("bald", "balding", "buzz"):
        return np.zeros_like(x)
    mask = np.zeros_like(x)
    if p.hair_style in _CURTAIN:
        mask = _soft(_outer(p, x * 1.03, y), 0.010)
    elif p.hair_style in ("afro", "curly"):
        mask = _soft(_outer(p, x, y), 0.012)
    if p.hair_style == "bun":
        radius = 0.055 + 0.025 * p.hair_volume
        distance = radius - np.hypot(x, (y - (p.head_top - 0.03)) * 1.1)
        mask = np.maximum(mask, _soft(distance, 0.007))
    return mask


def hair_front(p: Identity, x: Array, y: Array) -> Array:
    """Opacity of the hair over skull and face sides."""
    if p.hair_style == "bald":
        return np.zeros_like(x)
    _, _, sideburn = _thickness(p)
    inside = _soft(_outer(p, x, y), 0.014 if p.hair_style in ("curly", "afro") else 0.008)
    relative = x / p.face_width
    line = (
        p.hairline_y
        + 0.012 * np.sin(2.2 * relative + p.hair_phase)
        + 0.17 * np.abs(relative) ** (2.2 + p.waviness)
    )
    if p.hair_style in ("side_part", "quiff", "short"):
        line = line - 0.03 * np.exp(-(((np.abs(relative) - 0.55) / 0.2) ** 2)) * (0.3 + p.age)
    if p.hair_style == "balding":
        line = np.full_like(x, p.head_top - 0.1)
    if p.hair_style in ("long", "wavy", "bob") and p.fringe == 0:
        # parted: the line rises to the parting and falls to both sides
        middle = 0.3 * p.part
        aside = (relative - middle) / (1 - middle * np.sign(relative - middle))
        line = p.hairline_y - 0.015 + 0.20 * np.abs(aside) ** 2.3
    if p.fringe > 0:
        drop = (p.eye_y - p.brow_y - 0.012 - p.hairline_y) * (0.45 + 0.5 * p.fringe)
        sweep = 1 - 0.35 * np.clip(relative * np.sign(p.part), -1, 1)
        edge = p.hairline_y + drop * sweep + 0.006 * np.sin(relative * 7 + p.hair_phase)
        line = np.maximum(line, np.minimum(edge, p.eye_y - p.brow_y - 0.004) + 0.06 * relative**2)
    elif p.hair_style == "side_part":
        line = line + 0.035 * np.clip(relative * np.sign(p.part), -1, 1)
    cap = _soft(line - y, 0.020 if p.hair_style != "buzz" else 0.030)
    if p.hair_style in _CURTAIN:
        inner = p.face_width * (
            0.90 - 0.10 * smoothstep(0.6, 0.8, y) + 0.10 * smoothstep(0.8, 1.0, y)
        )
        inner = inner - 0.02 * (p.hair_volume - 0.5)
        sides = _soft(np.abs(x) - inner, 0.012) * smoothstep(0.28, 0.36, y)
        return inside * np.maximum(cap, sides)
    inner = p.face_width * (0.88 + 0.10 * smoothstep(0.36, sideburn, y))
    sides = _soft(np.abs(x) - inner, 0.010) * (1 - smoothstep(sideburn - 0.035, sideburn + 0.01, y))
    if p.hair_style == "balding":
        sides = 0.85 * sides * smoothstep(0.34, 0.45, y)
    return inside * np.maximum(cap * (1 - smoothstep(sideburn - 0.03, sideburn, y)), sides)


def hair_colour(p: Identity, x: Array, y: Array, behind: bool = False) -> Array:
    """Linear-light colour (T, T, 3): a round volume under the light with one broad sheen and faint
    waves.
    """
    base = srgb_to_linear(p.hair) + 0.004
    nx = np.clip(x / (p.face_width + 0.07), -1, 1)
    ny = np.clip((y - 0.42) / 0.36, -1, 1)
    facing = np.sqrt(np.clip(1.05 - nx**2 * 0.8 - ny**2 * 0.55, 0.05, 1))
    light = 0.35 + 0.75 * facing - 0.16 * ny + 0.14 * p.light_x * nx
    ring = np.hypot(x * 0.9, y - 0.47)
    sheen = (
        np.exp(-(((ring - 0.285) / 0.035) ** 2))
        * np.exp(-(((nx - 0.35 * p.light_x) / 0.45) ** 2))
        * (y < 0.47)
    )
    flow = np.arctan2(x - 0.05 * p.part, y - p.head_top + 0.10)
    along = np.sin(11 * flow + 2 * np.sin(6 * y + p.hair_phase)) + 0.6 * np.sin(
        23 * flow + 9 * y + 2 * p.hair_phase
    )
    if p.hair_style in ("curly", "afro", "wavy"):
        along = along + 1.2 * np.sin(48 * x + 3 * np.sin(31 * y + p.hair_phase)) * np.sin(
            44 * y + 2 * np.sin(27 * x)
        )
    light = light * (1 + 0.042 * along)
    if behind:
        return base * (0.5 * light)[..., None]
    shine = 0.05 + 0.35 * base.mean()
    return base * light[..., None] + (shine * sheen)[..., None] * (
        0.4 * base / (base.max() + 1e-6) + 0.6 * base.max()
    )
