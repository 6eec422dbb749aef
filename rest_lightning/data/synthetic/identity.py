"""Who a synthetic talker is: plain numbers and names, sampled from one wide distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Rgb = tuple[float, float, float]

HAIR_STYLES = (
    "bald",
    "balding",
    "buzz",
    "short",
    "side_part",
    "quiff",
    "curly",
    "afro",
    "bun",
    "bob",
    "long",
    "wavy",
)
BEARDS = ("none", "stubble", "moustache", "goatee", "full")
CLOTHES = ("crew", "v_neck", "collar", "turtleneck", "scoop", "jacket")

# Light to deep, sRGB 0..255; neighbours are mixed, then an undertone is added.
_SKIN = np.array(
    [
        (244, 214, 196),
        (239, 204, 180),
        (231, 190, 158),
        (216, 168, 132),
        (190, 140, 104),
        (160, 110, 78),
        (126, 84, 60),
        (94, 62, 46),
    ],
    dtype=np.float64,
)
_HAIR = np.array(
    [
        (28, 24, 24),
        (46, 34, 29),
        (72, 49, 36),
        (104, 70, 46),
        (140, 100, 62),
        (186, 150, 102),
        (218, 190, 142),
    ],
    dtype=np.float64,
)
_IRIS = np.array(
    [
        (58, 36, 24),
        (84, 54, 32),
        (116, 82, 46),
        (104, 108, 66),
        (92, 120, 110),
        (92, 128, 160),
        (120, 142, 158),
    ],
    dtype=np.float64,
)


@dataclass(frozen=True)
class Identity:
    """One synthetic person. Colours are sRGB 0..255; lengths are fractions of the image side in the
    neutral frame.

    The vertical axis points down; positions are those of the neutral frame (head centred at x =
    0.5).
    """

    skin: Rgb
    lip: Rgb
    blush: float
    age: float
    light_x: float
    light_strength: float
    face_width: float  # half width at the cheekbones
    head_top: float
    cheek_y: float
    chin_y: float
    jaw_power: float  # 1.8 = oval, 2.6 = square
    jaw_taper: float
    cheekbone: float
    ear_size: float
    eye_x: float
    eye_y: float
    eye_width: float
    eye_height: float
    eye_tilt: float
    eye_depth: float
    iris: Rgb
    lashes: float
    brow: Rgb
    brow_y: float
    brow_thickness: float
    brow_arch: float
    nose_width: float
    nose_y: float
    nose_height: float
    mouth_y: float
    mouth_width: float  # half width at rest
    upper_lip: float
    lower_lip: float
    cupid_bow: float
    mouth_corner: float
    open_height: float  # inner height at mouth_opening = 1
    teeth: Rgb
    hair_style: str
    hair: Rgb
    hair_volume: float
    hair_length: float
    hairline_y: float
    fringe: float  # 0 = none
    part: float  # side of the parting, -1 .. 1
    waviness: float
    hair_phase: float
    beard: str
    beard_strength: float
    glasses: str  # "none", "round", "square"
    glasses_colour: Rgb
    earrings: bool
    clothes: str
    cloth: Rgb
    cloth_2: Rgb
    shoulder_y: float
    neck_width: float
    background: Rgb
    background_2: Rgb
    background_angle: float
    blobs: tuple[tuple[float, float, float, float, float, float], ...]  # x, y, radius, r, g, b


def _mix(table: np.ndarray, t: float) -> np.ndarray:
    """Colour at position t in 0..1 of a table of colours."""
    u = float(np.clip(t, 0, 1)) * (len(table) - 1)
    i = min(int(u), len(table) - 2)
    return table[i] + (u - i) * (table[i + 1] - table[i])


def _rgb(values: np.ndarray) -> Rgb:
    r, g, b = (round(float(v), 2) for v in np.clip(values, 0, 255))
    return (r, g, b)


def _hsv(h: float, s: float, v: float) -> np.ndarray:
    """sRGB 0..255 of hue, saturation, value in 0..1."""
    k = (np.array([5.0, 3.0, 1.0]) + h * 6) % 6
    return 255 * (v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1))


def sample_identity(rng: np.random.Generator) -> Identity:
    """Draw one person. The same generator state gives the same person."""

    def u(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 5)

    def pick(names: tuple[str, ...], weights: tuple[float, ...]) -> str:
        p = np.asarray(weights) / sum(weights)
        return names[int(rng.choice(len(names), p=p))]

    tone = u(0, 1)
    skin_noise = np.array([u(-6, 6), u(-4, 4), u(-7, 7)]) * (1.0 - 0.55 * tone)
    skin = _mix(_SKIN, tone) + skin_noise
    feminine = u(0, 1)
    # Deep skin goes with browner lips; every lip stays redder and darker than the skin around it.
    lip_hue = (
        np.array([0.84, 0.56, 0.56]) * skin
        + np.array([10, 2, 7])
        + 16 * tone * np.array([1.0, 0.2, 0.45])
    )
    lip_hue = lip_hue + feminine * np.array([4, -16, -8]) * u(0, 1)
    lip = lip_hue * u(0.86, 1.0)
    age = u(0, 1) ** 1.6
    hair_t = u(0, 1) ** 1.2 * (1.0 if tone < 0.35 else 0.45 if tone < 0.6 else 0.2)
    hair = _mix(_HAIR, hair_t)
    if tone < 0.45 and rng.random() < 0.12:
        hair = np.array([150.0, 78.0, 42.0]) * u(0.75, 1.1)  # ginger
    if age > 0.55 and rng.random() < 0.6:
        hair = hair + (np.array([188.0, 186.0, 184.0]) - hair) * u(0.4, 0.95)
    hair = hair * u(0.9, 1.1)
    if feminine > 0.5:
        style = pick(HAIR_STYLES, (0.2, 0, 0.3, 0.8, 0.8, 0.4, 1.4, 0.8, 1.8, 2.4, 2.6, 2.2))
        beard = "none"
    else:
        style = pick(
            HAIR_STYLES, (0.8, 0.5 + age, 1.2, 2.6, 2.2, 1.4, 1.2, 0.6, 0.2, 0.3, 0.3, 0.3)
        )
        beard = pick(BEARDS, (4.5, 2.2, 0.7, 0.9, 1.4))
    brow = (
        hair * u(0.55, 0.8)
        if hair.mean() < 150
        else hair * u(0.5, 0.65) * np.array([1.0, 0.9, 0.8])
    )
    brow = np.minimum(brow, skin * 0.62)
    background = _hsv(u(0, 1), u(0.0, 1.0) ** 1.6 * 0.28 + 0.02, u(0.22, 0.82))
    shift = u(0.75, 1.2)
    blobs = []
    for _ in range(int(rng.integers(0, 5))):
        colour = background * u(0.72, 1.25) + np.array([u(-18, 18), u(-14, 14), u(-18, 18)])
        blobs.append((u(-0.1, 1.1), u(-0.1, 0.8), u(0.2, 0.45), *_rgb(colour)))
    cloth = _hsv(u(0, 1), u(0.0, 0.65), u(0.14, 0.9))
    if rng.random() < 0.35:
        cloth = _hsv(u(0, 1), u(0, 0.15), u(0.12, 0.95))
    light = u(-1, 1)
    jaw = u(1.85, 2.25) if feminine > 0.5 else u(2.0, 2.6)
    face_width = u(0.222, 0.252)
    return Identity(
        skin=_rgb(skin),
        lip=_rgb(np.minimum(lip, skin * np.array([0.95 + 0.2 * tone, 0.74, 0.80 + 0.1 * tone]))),
        blush=u(0.2, 1.0),
        age=round(age, 5),
        light_x=light,
        light_strength=u(0.75, 1.1),
        face_width=face_width,
        head_top=u(0.115, 0.15),
        cheek_y=u(0.44, 0.50),
        chin_y=u(0.785, 0.82),
        jaw_power=jaw,
        jaw_taper=u(0.02, 0.2),
        cheekbone=u(0.2, 1.0),
        ear_size=u(0.85, 1.15),
        eye_x=u(0.096, 0.106) * (0.5 + 0.5 * face_width / 0.237),
        eye_y=u(0.435, 0.452),
        eye_width=u(0.047, 0.056),
        eye_height=u(0.85, 1.2),
        eye_tilt=u(-0.08, 0.16),
        eye_depth=u(0.4, 1.0),
        iris=_rgb(_mix(_IRIS, u(0, 1) if tone < 0.45 else u(0, 0.3)) * u(0.9, 1.12)),
        lashes=u(0.1, 0.5) + 0.5 * feminine,
        brow=_rgb(brow),
        brow_y=u(0.056, 0.072),
        brow_thickness=u(0.013, 0.019) + (0.0 if feminine > 0.5 else u(0.0, 0.005)),
        brow_arch=u(0.1, 1.0),
        nose_width=u(0.042, 0.060),
        nose_y=u(0.565, 0.588),
        nose_height=u(0.7, 1.25),
        mouth_y=u(0.655, 0.672),
        mouth_width=u(0.080, 0.098),
        upper_lip=u(0.016, 0.025) + 0.003 * tone,
        lower_lip=u(0.024, 0.034) + 0.003 * tone,
        cupid_bow=u(0.2, 1.0),
        mouth_corner=u(0.002, 0.011),
        open_height=u(0.120, 0.132),
        teeth=_rgb(np.array([240.0, 234.0, 222.0]) + np.array([u(-8, 8), u(-8, 8), u(-14, 10)])),
        hair_style=style,
        hair=_rgb(hair),
        hair_volume=u(0.2, 1.0),
        hair_length=u(0.0, 1.0),
        hairline_y=u(0.215, 0.265) - (0.0 if age < 0.6 else u(0, 0.03)),
        fringe=u(0.3, 1.0)
        if style in ("short", "bob", "long", "curly", "wavy") and rng.random() < 0.4
        else 0.0,
        part=u(-1, 1),
        waviness=u(0, 1),
        hair_phase=u(0, 6.28),
        beard=beard,
        beard_strength=u(0.4, 1.0),
        glasses=pick(("none", "round", "square"), (8.2, 0.9, 0.9)),
        glasses_colour=_rgb(
            np.array([40.0, 34.0, 32.0]) + u(0, 1) ** 2 * np.array([110.0, 90.0, 70.0])
        ),
        earrings=bool(feminine > 0.5 and rng.random() < 0.2),
        clothes=pick(CLOTHES, (2.5, 1.5, 2, 0.8, 1 + feminine, 1.6)),
        cloth=_rgb(cloth),
        cloth_2=_rgb(_hsv(u(0, 1), u(0, 0.3), u(0.3, 0.97))),
        shoulder_y=u(0.875, 0.905),
        neck_width=u(0.106, 0.120) + (0.0 if feminine > 0.5 else u(0.010, 0.030)),
        background=_rgb(background),
        background_2=_rgb(background * shift),
        background_angle=u(0, 6.28),
        blobs=tuple(blobs),
    )
