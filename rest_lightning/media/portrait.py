"""A portrait from any image file: upright, opaque, in sRGB, cut to the head that is found in it."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from rest_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from rest_lightning.media.face_models import Face, Landmarks

Source = str | os.PathLike[str] | Image.Image | np.ndarray
Crop = str | Sequence[float]
Box = tuple[float, float, float, float]

MIN_SIDE_PX = 32
MIN_FACE_PX = 40
# Beyond the landmarks' extremes, in shares of their longer side: the face is 0.64 times as high as
# the square, as in the clips that the shipped model saw (`rest animate`, `rest prepare`).
MARGIN, MARGIN_TOP = 0.22, 0.34
MAX_PIXELS = 100_000_000
MAX_BYTES = 800_000_000
"""Of a picture while it is decoded and brought to 8-bit RGB."""
_BYTES_PER_PIXEL = {"1": 4, "L": 4, "RGB": 6, "P": 7, "I;16": 7, "I": 8, "F": 8, "RGBA": 15}
_BACKDROP = (200, 200, 200)  # behind transparent pixels: a light grey studio wall
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "TGA", "JPEG2000", "ICO")


@dataclass(frozen=True)
class Portrait:
    """A picture and the square of it that is shown.

    Attributes:
        picture: the whole picture: upright, RGB.
        box: left, top, width, height of the square in pixels; it may reach beyond the picture.
        notes: one line each about what will not look well: a profile, closed eyes, an open mouth.
    """

    picture: Image.Image
    box: Box
    notes: tuple[str, ...] = ()

    def small_note(self, size_px: int) -> str | None:
        """Returns a line about frames of ``size_px`` where the square has fewer pixels, else
        None.
        """
        side = round(self.box[2])
        if side >= size_px:
            return None
        return (
            f"the head has a square of {side} pixels in its photograph: frames of {size_px} show "
            "no finer detail than that; a larger photograph gives more"
        )

    def square(self, size_px: int) -> np.ndarray:
        """Returns the square as uint8 (size_px, size_px, 3); edges go on beyond the picture."""
        left, top, width, height = self.box
        picture = self.picture
        beyond = max(-left, -top, left + width - picture.width, top + height - picture.height)
        if beyond > 0.5:
            pad = int(np.ceil(beyond))
            pixels = np.pad(np.asarray(picture), ((pad, pad), (pad, pad), (0, 0)), mode="edge")
            picture = Image.fromarray(pixels)
            left, top = left + pad, top + pad
        limits = (picture.width, picture.height)
        right, bottom = min(left + width, limits[0]), min(top + height, limits[1])
        box = (max(left, 0.0), max(top, 0.0), right, bottom)
        resized = picture.resize((size_px, size_px), Image.Resampling.LANCZOS, box=box)
        return np.asarray(resized).copy()


def load_portrait(
    source: Source, size_px: int, crop: Crop = "auto", least_px: int | None = None
) -> Tensor:
    """Returns the portrait as a model wants it: float32 (3, size_px, size_px) in [-1, 1].

    The arguments and errors are those of :func:`read_portrait`.
    """
    import torch

    pixels = read_portrait(source, size_px, crop, least_px)
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def read_portrait(
    source: Source, size_px: int, crop: Crop = "auto", least_px: int | None = None
) -> np.ndarray:
    """Returns the portrait as uint8 (size_px, size_px, 3) RGB. Its notes become warnings.

    Args:
        source: see :func:`find_portrait`. With ``auto``, an array or a PIL image of exactly
            ``size_px`` x ``size_px`` is a frame of the model already and taken as it is.
        size_px: side of the result.
        crop: see :func:`find_portrait`.
        least_px: side of the square in the picture below which a note says that it is small; None:
            no such note.

    Raises:
        UserError: see :func:`find_portrait`.
    """
    if crop == "auto" and _size(source) == (size_px, size_px):
        crop = "centre"
    portrait = find_portrait(source, crop)
    small = portrait.small_note(least_px) if least_px is not None else None
    for note in (*portrait.notes, *([small] if small else [])):
        warnings.warn(note, stacklevel=2)
    return portrait.square(size_px)


def find_portrait(source: Source, crop: Crop = "auto", option: str | None = "crop") -> Portrait:
    """Returns the picture and where the head is in it.

    Args:
        source: an image file (orientation tag, colour profile, transparency, grey, palette and 16
            bits are handled), a PIL image, or an array uint8 (H, W), (H, W, 3) or (H, W, 4).
        crop: ``auto``: the head, found by :class:`rest_lightning.media.face_models.FaceFinder` and
            framed as training clips are; a square picture that shows a head about so is taken
            whole. Of several faces the largest, when it has twice the area of the next. ``centre``:
            the largest centred square, without looking. Or a square (x, y, size) or a box (x, y,
            width, height), whose largest centred square is taken, in pixels, or in fractions of the
            sides when all numbers are at most 1.
        option: what the caller's user sets ``crop`` with, for messages; None: there is nothing to
            set.

    Raises:
        UserError: not an image, truncated, empty, smaller than 32 pixels, larger than 100
            megapixels, a box outside; with ``auto``: no face, several of similar size, or one of
            less than 40 pixels.
    """
    is_file = isinstance(source, str | os.PathLike)
    name = f"{source}" if is_file else f"the given {type(source).__name__}"
    if isinstance(source, np.ndarray):
        image = _from_array(source)
    elif isinstance(source, Image.Image):
        image = _decoded(source, name)
    else:
        image = _from_file(Path(source))
    rgb = _to_rgb(image, name)
    if crop == "auto":
        _check_side(rgb, rgb.size, name)
        return _head(rgb, name, option)
    left, top, width, height = _box(rgb, crop, name)
    _check_side(rgb, (width, height), name)
    side = min(width, height)
    return Portrait(rgb, (left + (width - side) / 2, top + (height - side) / 2, side, side))


def parse_crop(text: str) -> Crop:
    """Returns the crop that a user wrote: ``auto``, ``centre``, ``x,y,size`` or
    ``x,y,width,height``.

    Raises:
        UserError: none of these.
    """
    if text in ("auto", "centre"):
        return text
    if text == "face":  # of 0.1
        return "auto"
    try:
        values = tuple(float(value) for value in text.replace(",", " ").split())
    except ValueError:
        values = ()
    if len(values) not in (3, 4):
        raise UserError(f"expected auto, centre, x,y,size or x,y,width,height, got {text!r}")
    return values


def _size(source: Source) -> tuple[int, int] | None:
    if isinstance(source, np.ndarray):
        return (source.shape[1], source.shape[0]) if source.ndim >= 2 else None
    return source.size if isinstance(source, Image.Image) else None


def _check_side(image: Image.Image, size: tuple[float, float], name: str) -> None:
    if min(size) < MIN_SIDE_PX:
        whole = f"{image.width}x{image.height}"
        what = f"of {whole}" if size == image.size else f"cropped to {size[0]:.0f}x{size[1]:.0f}"
        least = f"{MIN_SIDE_PX}x{MIN_SIDE_PX}"
        raise UserError(
            f"expected a portrait of at least {least} pixels, but {name} is {what}: use a larger "
            "image"
        )


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    ):
        raise UserError(
            f"expected a portrait array uint8 (H, W, 3), got {array.dtype} {array.shape}: scale it "
            "to 0..255"
        )
    if 0 in array.shape:
        raise UserError(
            f"expected a portrait array with pixels, got shape {array.shape}: use a larger image"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _from_file(path: Path) -> Image.Image:
    if path.is_dir():
        raise UserError(f"expected a portrait image, got the folder {path}: name a file in it")
    if not path.exists():
        raise UserError(f"expected a portrait image, but {path} does not exist: check the name")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"expected a portrait image, got the empty file {path}: export it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            Image.init()  # registers all formats; without it only some of those named are known
            image = Image.open(path, formats=_FORMATS)
    except Image.DecompressionBombError:
        raise UserError(
            f"expected at most {MAX_PIXELS // 1_000_000} megapixels, but {path} claims more: scale "
            "it down"
        ) from None
    except PermissionError:
        raise UserError(
            f"expected a portrait image, but {path} may not be read: change its permissions"
        ) from None
    except Exception as error:  # decoders raise all kinds of errors on damaged headers
        raise UserError(
            f"expected a portrait image (PNG, JPEG, WebP, ...), but {path} is not one that can be "
            "read: "
            "export it as PNG or JPEG; of a video, save a frame"
        ) from error
    return _decoded(image, str(path))


def _decoded(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    most = min(MAX_PIXELS, MAX_BYTES // _BYTES_PER_PIXEL.get(image.mode, 8))
    if width * height > most:
        raise UserError(
            f"expected at most {most // 1_000_000} megapixels, but {name} has {width}x{height} of "
            f"mode {image.mode}: scale it down"
        )
    try:
        image.load()
    except Exception as error:  # as above
        raise UserError(
            f"expected a whole image, but {name} is truncated or damaged: export it again"
        ) from error
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged tag says nothing about the pixels
        return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """The picture with its colour profile applied: Display P3, Adobe RGB, CMYK, ... to sRGB."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "L", "LA", "CMYK"):
        return image
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
        opaque = image.convert(image.mode[:-1]) if alpha else image
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(opaque, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a damaged profile
        return image
    assert converted is not None
    if alpha:
        converted.putalpha(alpha)
    return converted


def _grey_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, with 8 bits; some rows at a time, so that memory is that
    of the picture.
    """
    rows = max(1, 2_000_000 // image.width)
    tops = range(0, image.height, rows)

    def band(top: int) -> np.ndarray:
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        return np.nan_to_num(np.asarray(part, dtype=np.float64))

    largest = max(band(top).max(initial=0.0) for top in tops)
    factor = 1.0
    if image.mode == "F" and largest <= 1.0:
        factor = 255.0
    elif image.mode.startswith("I;16") or largest > 255.0:
        factor = 1 / 257.0  # 65535 -> 255
    grey = Image.new("L", image.size)
    for top in tops:
        values = (band(top) * factor).round().clip(0, 255).astype(np.uint8)
        grey.paste(Image.fromarray(values), (0, top))
    return grey


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Opaque 8-bit RGB of any mode, in sRGB."""
    image = _in_srgb(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_8_bit(image).convert("RGB")
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(
                Image.new("RGBA", image.size, (*_BACKDROP, 255)), image
            ).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise UserError(
            f"expected colours as RGB or grey, but {name} has {image.mode}: export it as PNG"
        ) from error


def _box(image: Image.Image, crop: Crop, name: str) -> Box:
    """(x, y, width, height) in pixels."""
    if crop == "centre":
        return 0, 0, image.width, image.height
    if isinstance(crop, str) or len(crop) not in (3, 4):
        raise UserError(
            "expected a crop 'auto', 'centre', a square (x, y, size) or a box (x, y, width, "
            "height), "
            f"got {crop!r}: choose one"
        )
    x, y, width, height = (float(value) for value in (*crop, crop[2])[:4])
    if max(x, y, width, height) <= 1.0:
        x, width = x * image.width, width * image.width
        y, height = y * image.height, height * image.height
    right, bottom = x + width, y + height
    if (
        min(x, y) < 0
        or min(width, height) <= 0
        or right > image.width + 0.5
        or bottom > image.height + 0.5
    ):
        size = f"{image.width}x{image.height}"
        raise UserError(
            f"expected a crop box inside {name} of {size} pixels, got {tuple(crop)}: make it "
            "smaller"
        )
    return x, y, min(width, image.width - x), min(height, image.height - y)


def _head(image: Image.Image, name: str, option: str | None) -> Portrait:
    """The head of the one face that is to speak."""
    from rest_lightning.media.face_models import shared_finder

    finder = shared_finder()
    picture = np.asarray(image)
    faces = finder.find(picture)
    face = _chosen(faces, image, name, option)
    longer = max(face.box[2:])
    if longer < MIN_FACE_PX:
        raise UserError(
            f"expected a face of at least {MIN_FACE_PX} pixels in {name}, found one of "
            f"{longer:.0f}: "
            "use a larger picture"
        )
    assert finder.mesh is not None
    landmarks = finder.mesh.landmarks(picture, face)
    box = head_box(landmarks.box, image.size)
    return Portrait(image, box, tuple(_notes(landmarks, name)))


def _chosen(faces: Sequence[Face], image: Image.Image, name: str, option: str | None) -> Face:
    if not faces:
        way_out = f"set {option} to x,y,size around the face" if option else "use another picture"
        raise UserError(
            f"expected the face of a person in {name}, found none: {way_out}"
            + (", or to centre to take the middle unseen" if option else "")
        )
    areas = [face.box[2] * face.box[3] for face in faces]
    alike = [face for face, area in zip(faces, areas, strict=True) if 2 * area > areas[0]]
    if len(alike) == 1:
        return faces[0]
    alike.sort(key=lambda face: face.box[0])
    squares = []
    for face in alike:
        x, y, size, _ = _inside(_around(face.box), image.size)
        squares.append(f"{x:.0f},{y:.0f},{size:.0f}")
    way_out = f"set {option} to one of {' '.join(squares)}" if option else "crop it to one head"
    raise UserError(
        f"expected one person in {name}, found {len(alike)} faces of similar size: {way_out}"
    )


def _notes(landmarks: Landmarks, name: str) -> list[str]:
    notes = []
    yaw_deg = landmarks.pose().yaw_deg
    if abs(yaw_deg) > _MAX_YAW_DEG:
        notes.append(
            f"{name}: the head is turned by {abs(yaw_deg):.0f} degrees; faces from the front speak "
            "best"
        )
    if max(landmarks.eye_opening()) < _MIN_EYE_OPENING:
        notes.append(f"{name}: the eyes look closed and will stay so")
    if landmarks.mouth_opening() > _MAX_MOUTH_OPENING:
        notes.append(f"{name}: the mouth is open; lips that rest on each other speak best")
    return notes


_MAX_YAW_DEG = 30.0
_MIN_EYE_OPENING = 0.13  # the narrowest open eyes of 567 faces: 0.15
_MAX_MOUTH_OPENING = 0.06


def head_box(extremes: Box, size: tuple[int, int]) -> Box:
    """Returns the square that shows a head as training clips do, left, top, width, height in
    pixels.

    It is moved into the picture and gives up margin where the picture is too small; only a face
    that is itself larger than the picture's shorter side leaves a square that reaches beyond it. A
    square picture that shows the head about as large and about there is taken whole.

    Args:
        extremes: of the landmarks: left, top, width, height in pixels.
        size: width and height of the picture.
    """
    left, top, side, _ = _around(extremes)
    width, height = size
    if width == height:
        off_middle = max(abs(left + side / 2 - width / 2), abs(top + side / 2 - height / 2)) / width
        if 0.88 <= side / width <= 1.35 and off_middle < 0.15:
            return 0.0, 0.0, float(width), float(height)
    return _inside((left, top, side, side), size, least=max(extremes[2:]) * 1.05)


def _around(extremes: Box) -> Box:
    """The square with the margins of training around a face."""
    left, top, width, height = extremes
    longer = max(width, height)
    room = MARGIN * longer
    side = max(width + 2 * room, height + room + MARGIN_TOP * longer)
    spare = side - height
    y = top - spare * MARGIN_TOP / (MARGIN + MARGIN_TOP)
    return left + width / 2 - side / 2, y, side, side


def _inside(square: Box, size: tuple[int, int], least: float = 0.0) -> Box:
    """The square made smaller, down to ``least``, and moved until it is inside the picture where it
    can be.
    """
    left, top, side, _ = square
    smaller = min(side, max(min(size), least))
    left, top = left + (side - smaller) / 2, top + (side - smaller) / 2
    x, y = (
        min(max(corner, 0.0), length - smaller) if smaller <= length else (length - smaller) / 2
        for corner, length in zip((left, top), size, strict=True)
    )
    return x, y, smaller, smaller
