"""The still skin of a synthetic talker's head: a sculpted height field under soft light, painted
once per identity.

Normals of the height field give nose, sockets, cheeks and chin their shading; features that move
(eyes, lips) are drawn over it in every frame.
"""

from __future__ import annotations

import numpy as np

from rest_lightning.data.synthetic.geometry import Array, bump, smoothstep
from rest_lightning.data.synthetic.hair import hair_colour, hair_front
from rest_lightning.data.synthetic.identity import Identity
from rest_lightning.data.synthetic.raster import linear_to_srgb, over, srgb_to_linear, texture_grid


def _radius(p: Identity, x: Array, y: Array) -> Array:
    """1 on the face's outline, below 1 inside."""
    up = np.clip((p.cheek_y - y) / (p.cheek_y - p.head_top), 0, None)
    down = np.clip((y - p.cheek_y) / (p.chin_y - p.cheek_y), 0, None)
    width = (
        p.face_width
        * (1 - p.jaw_taper * np.clip(down, 0, 1.2) ** 2)
        * (1 - 0.03 * np.clip(up, 0, 1))
    )
    n = np.where(y < p.cheek_y, 2.45, p.jaw_power)
    return ((np.abs(x) / width) ** n + (up + down) ** n) ** (1 / n)


def _height(p: Identity, x: Array, y: Array) -> Array:
    """Sculpted height of the face for shading, in image fractions."""
    a = np.abs(x)
    r = np.clip(_radius(p, x, y), 0, 1)
    z = 0.17 * np.sqrt(np.clip(1 - r**2.6, 0, 1) + 0.03)
    # forehead, brow ridge, sockets, lids
    z += 0.008 * bump(a, y, 0.06, 0.33, 0.07, 0.05)
    z += 0.010 * bump(a, y, p.eye_x * 0.95, p.eye_y - 0.048, 0.05, 0.018)
    z -= (0.010 + 0.012 * p.eye_depth) * bump(a, y, p.eye_x * 0.93, p.eye_y - 0.006, 0.045, 0.026)
    z -= 0.006 * bump(a, y, 0.044, p.eye_y - 0.002, 0.020, 0.024)
    z += 0.009 * bump(a, y, p.eye_x, p.eye_y, 0.034, 0.017)
    # nose: bridge widening to the tip, wings, hollow beside them
    t = np.clip((y - (p.eye_y - 0.015)) / (p.nose_y - p.eye_y + 0.015), 0, 1.0)
    ridge_width = 0.018 + (0.22 * p.nose_width) * t**1.5
    ridge = np.exp(-0.5 * (x / ridge_width) ** 2) * (0.007 + 0.029 * t**1.4) * p.nose_height
    z += (
        ridge
        * smoothstep(p.eye_y - 0.05, p.eye_y + 0.01, y)
        * (1 - smoothstep(p.nose_y - 0.004, p.nose_y + 0.026, y))
    )
    z += 0.016 * p.nose_height * bump(x, y, 0.0, p.nose_y - 0.012, 0.4 * p.nose_width, 0.017)
    z += 0.015 * bump(a, y, p.nose_width * 0.78, p.nose_y - 0.003, 0.0125, 0.014)
    z -= 0.006 * bump(a, y, p.nose_width * 1.25, p.nose_y - 0.004, 0.010, 0.020)
    # cheeks, muzzle, chin
    z += 0.010 * (0.4 + p.cheekbone) * bump(a, y, 0.140, 0.535, 0.045, 0.038)
    z -= 0.009 * p.cheekbone * bump(a, y, 0.165, 0.64, 0.035, 0.05)
    z += 0.012 * bump(x, y, 0.0, p.mouth_y, 0.085, 0.055)
    z -= 0.003 * bump(x, y, 0.0, 0.5 * (p.nose_y + p.mouth_y) + 0.006, 0.008, 0.018)
    below = p.mouth_y + 1.25 * p.lower_lip
    z -= 0.006 * bump(x, y, 0.0, below + 0.016, 0.034, 0.013)
    z += 0.010 * bump(x, y, 0.0, p.chin_y - 0.045, 0.05, 0.034)
    # fold from nose to mouth corner, deeper with age
    down = (y - p.nose_y) / (p.mouth_y - p.nose_y)
    fold_x = 1.25 * (p.nose_width + (p.mouth_width - p.nose_width) * down)
    fold = np.exp(-0.5 * ((a - fold_x) / 0.010) ** 2) * bump(
        x, y, 0.0, 0.5 * (p.nose_y + p.mouth_y), 1.0, 0.03
    )
    z -= (0.0015 + 0.006 * p.age) * fold
    z -= (0.001 + 0.005 * p.age) * bump(a, y, p.eye_x * 0.92, p.eye_y + 0.034, 0.03, 0.007)
    return z


def _light(p: Identity, z: Array, spacing: float) -> Array:
    """Diffuse light 0..about 1.1 on a height field, key light from above and one side, fill from
    the front.
    """
    dzdy, dzdx = np.gradient(z, spacing)
    norm = np.sqrt(1 + dzdx**2 + dzdy**2)
    key = np.array([0.75 * p.light_x, -0.55, 0.85])
    key /= np.linalg.norm(key)
    lambert = (-dzdx * key[0] - dzdy * key[1] + key[2]) / norm
    wrapped = np.clip((lambert + 0.25) / 1.25, 0, 1)
    front = 1 / norm
    return 0.25 + p.light_strength * (0.60 * wrapped + 0.16 * front)


def _albedo(p: Identity, x: Array, y: Array) -> Array:
    """Linear skin colour with redder cheeks and nose, darker eye surroundings, beard shade."""
    a = np.abs(x)
    skin = srgb_to_linear(p.skin)
    red = p.blush * (
        0.55 * bump(a, y, 0.140, 0.555, 0.050, 0.042) + 0.45 * bump(x, y, 0, p.nose_y, 0.03, 0.025)
    )
    red = red + 0.25 * p.blush * bump(x, y, 0, p.chin_y - 0.03, 0.05, 0.03)
    tint = 1 - red[..., None] * np.array([0.02, 0.20, 0.17])
    socket = 0.16 * bump(a, y, p.eye_x * 0.9, p.eye_y + 0.006, 0.045, 0.028) * (0.5 + 0.5 * p.age)
    tint = tint * (1 - socket[..., None] * np.array([0.7, 1.0, 0.85]))
    return skin * tint


def _beard(p: Identity, x: Array, y: Array) -> Array:
    """Opacity of the beard."""
    if p.beard == "none":
        return np.zeros_like(x)
    a = np.abs(x)
    moustache_y = 0.45 * p.nose_y + 0.55 * p.mouth_y
    half = p.mouth_width * 1.08
    arch = moustache_y + 0.05 * np.clip(a / half, 0, 1.3) ** 2.5 * 0.5
    moustache = np.exp(-0.5 * ((y - arch) / 0.012) ** 2) * (
        1 - smoothstep(half * 0.85, half * 1.25, a)
    )
    around = np.hypot(x / (p.mouth_width * 1.30), (y - p.mouth_y - 0.02) / 0.062)
    ring = (
        smoothstep(0.82, 1.02, around)
        * (1 - smoothstep(1.05, 1.45, around))
        * smoothstep(p.mouth_y - 0.03, 0.70, y)
    )
    chin = (
        bump(x, y, 0.0, p.chin_y - 0.03, 0.055, 0.045)
        * smoothstep(p.mouth_y + 0.02, p.mouth_y + 0.06, y)
        * 1.3
    )
    line = p.mouth_y - 0.035 - 0.75 * np.clip(a - 0.12, 0, 1) - 0.05 * smoothstep(0.10, 0.15, a)
    blend = 2.2 if p.beard == "stubble" else 1.0  # stubble has no edge
    jaw = smoothstep(-0.015 * blend, 0.04 * blend, y - line)
    jaw = jaw * smoothstep(
        1.05 - 0.15 * blend, 1.05 + 0.15 * blend, around + 2 * smoothstep(0.68, 0.78, y)
    )
    jaw = jaw * smoothstep(0.45, 0.53, y)
    if p.beard == "stubble":
        return np.clip(np.maximum(jaw, 0.9 * moustache), 0, 1) * (0.14 + 0.20 * p.beard_strength)
    if p.beard == "moustache":
        return moustache * (0.65 + 0.25 * p.beard_strength)
    if p.beard == "goatee":
        return np.clip(np.maximum(np.maximum(moustache, chin), 0.8 * ring), 0, 1) * (
            0.6 + 0.25 * p.beard_strength
        )
    return np.clip(np.maximum(jaw, moustache), 0, 1) * (0.68 + 0.24 * p.beard_strength)


def _brows(p: Identity, x: Array, y: Array) -> Array:
    """Opacity of the eyebrows: tapered arches with soft edges."""
    a = np.abs(x)
    u = (a - (p.eye_x - 1.12 * p.eye_width)) / (2.45 * p.eye_width)  # 0 inner end, 1 outer end
    arch = (
        0.017 * (0.35 + p.brow_arch) * np.sin(np.clip(u, 0, 1) * np.pi * 0.95) ** 1.2
        - 0.008 * np.clip(u, 0, 1) ** 3
    )
    centre = p.eye_y - p.brow_y + 0.006 - arch - p.eye_tilt * 0.3 * (a - p.eye_x)
    half = 0.5 * p.brow_thickness * (1.0 - 0.62 * np.clip(u, 0, 1) ** 1.5)
    across = 1 - smoothstep(0.45, 1.55, np.abs(y - centre) / half)
    return 0.88 * across * smoothstep(-0.05, 0.10, u) * (1 - smoothstep(0.82, 1.06, u))


def paint_head(p: Identity, size_px: int) -> Array:
    """Premultiplied sRGB texture (T, T, 4) of skin, ears, brows, beard and front hair."""
    x, y = texture_grid(size_px)
    spacing = float(x[0, 1] - x[0, 0])
    a = np.abs(x)
    skin = srgb_to_linear(p.skin)
    radius = _radius(p, x, y)
    shade = _light(p, _height(p, x, y), spacing)
    lit = _albedo(p, x, y)
    # shadows on skin are warm
    lit = lit * np.stack([shade**0.90, shade**1.0, shade**1.05], axis=-1)
    gloss = bump(x, y, 0.006 * p.light_x, p.nose_y - 0.02, 0.007, 0.011) + 0.5 * bump(
        x, y, 0.03 * p.light_x, 0.325, 0.06, 0.03
    )
    gloss = (
        gloss
        + 0.40 * bump(a, y, 0.135, 0.515, 0.030, 0.016)
        + 0.35 * bump(x, y, 0, p.chin_y - 0.045, 0.02, 0.012)
    )
    lit = lit + (0.03 + 0.10 * skin.mean()) * gloss[..., None] * np.array([1.0, 0.95, 0.9])
    # nostrils and the shadow under the nose
    nostril = bump(a, y, p.nose_width * 0.42, p.nose_y + 0.0070, 0.0085, 0.0044)
    under = bump(x, y, -0.01 * p.light_x, p.nose_y + 0.016, p.nose_width * 0.75, 0.009)
    lit = lit * (1 - 0.72 * nostril - 0.22 * under)[..., None]
    # ears lie behind the face
    ear_x = p.face_width * 1.02
    er = np.hypot(
        (a - ear_x) / (0.030 * p.ear_size), (y - 0.495 + (a - ear_x) * 0.5) / (0.062 * p.ear_size)
    )
    ear_shade = 0.62 + 0.30 * smoothstep(0.2, 0.85, er) - 0.25 * smoothstep(0.9, 1.0, er)
    ear_rgb = skin * ear_shade[..., None] * np.array([1.04, 0.92, 0.88])
    edge = spacing * 1.2 / 0.03
    image = over(np.zeros((*x.shape, 4)), ear_rgb, 1 - smoothstep(1 - edge, 1 + edge, er))
    if p.earrings and p.hair_style not in ("long", "wavy", "bob"):
        drop = np.hypot(a - ear_x - 0.006, y - 0.572)
        image = over(image, np.array([0.75, 0.62, 0.35]), 1 - smoothstep(0.006, 0.012, drop))
    soft = 0.03
    image = over(image, lit, 1 - smoothstep(1 - soft, 1 + soft * 0.4, radius))
    inside = 1 - smoothstep(0.97, 1.02, radius)
    shadow = shade[..., None]
    hair_lin = srgb_to_linear(p.hair)
    beard_lin = srgb_to_linear(np.minimum(np.asarray(p.hair) * 0.72, np.asarray(p.skin) * 0.75))
    image = over(image, beard_lin * (0.35 + 0.75 * shadow), _beard(p, x, y) * inside)
    image = over(image, srgb_to_linear(p.brow) * (0.5 + 0.5 * shadow), _brows(p, x, y) * inside)
    front = hair_front(p, x, y)
    if p.hair_style != "bald":
        # the hair throws a soft shadow on the skin below it
        drop_px = max(1, round(0.012 / spacing))
        cast = np.roll(front, drop_px, axis=0)
        image = over(image, skin * 0.25, 0.30 * cast * image[..., 3])
        strength = 0.85 if p.hair_style == "buzz" else 1.0
        image = over(image, hair_colour(p, x, y), front * strength)
    elif p.age < 0.7:
        # shaved: a shade of the hair on the skull
        skull = smoothstep(0.0, 0.05, p.hairline_y + 0.16 * (a / p.face_width) ** 3 - y) * inside
        image = over(image, hair_lin * 0.8 + skin * 0.2, 0.16 * skull)
    alpha = np.clip(image[..., 3:], 1e-6, 1)
    return np.concatenate([linear_to_srgb(image[..., :3] / alpha) * alpha, image[..., 3:]], axis=-1)
