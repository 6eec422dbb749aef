"""A portrait from any image file as a square tensor, upright and opaque."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from rest_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Source = str | os.PathLike[str] | Image.Image | np.ndarray
Crop = str | tuple[float, float, float, float]

MIN_SIDE_PX = 32
MAX_PIXELS = 100_000_000
MAX_BYTES = 800_000_000
"""Of a picture while it is decoded and brought to 8-bit RGB."""
_BYTES_PER_PIXEL = {"1": 4, "L": 4, "RGB": 6, "P": 7, "I;16": 7, "I": 8, "F": 8, "RGBA": 15}
_BACKDROP = (200, 200, 200)  # behind transparent pixels: a light grey studio wall
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "TGA", "JPEG2000", "ICO")


def load_portrait(source: Source, size_px: int, crop: Crop = "centre") -> Tensor:
    """The portrait as a model wants it: float32 (3, size_px, size_px) in [-1, 1].

    The arguments and errors are those of :func:`read_portrait`.
    """
    import torch

    return (
        torch.from_numpy(read_portrait(source, size_px, crop))
        .permute(2, 0, 1)
        .float()
        .div_(127.5)
        .sub_(1.0)
    )


def read_portrait(source: Source, size_px: int, crop: Crop = "centre") -> np.ndarray:
    """The portrait as uint8 (size_px, size_px, 3) RGB.

    Args:
        source: an image file (orientation tag, transparency, grey, palette and 16 bits are
            handled), a PIL image, or an array uint8 (H, W), (H, W, 3) or (H, W, 4).
        size_px: side of the result.
        crop: ``"centre"`` (the largest centred square), ``"face"`` (found by mediapipe, of the
            ``prepare`` extra), or a box (x, y, width, height) in pixels, or in fractions of the
            sides when all four are at most 1.

    Raises:
        UserError: not an image, truncated, empty, smaller than 32 pixels, larger than 100
            megapixels, a box outside.
    """
    name = (
        f"{source}"
        if isinstance(source, str | os.PathLike)
        else (f"the given {type(source).__name__}")
    )
    if isinstance(source, np.ndarray):
        image = _from_array(source)
    elif isinstance(source, Image.Image):
        image = _decoded(source, name)
    else:
        image = _from_file(Path(source))
    rgb = _to_rgb(image, name)
    x, y, width, height = _box(rgb, crop, name)
    if min(width, height) < MIN_SIDE_PX:
        what = (
            f"of {rgb.width}x{rgb.height}"
            if (width, height) == rgb.size
            else (f"cropped to {width:.0f}x{height:.0f}")
        )
        least = f"{MIN_SIDE_PX}x{MIN_SIDE_PX}"
        raise UserError(
            f"expected a portrait of at least {least} pixels, but {name} is {what}: "
            "use a larger image"
        )
    side = min(width, height)
    left, top = x + (width - side) / 2, y + (height - side) / 2
    square = rgb.resize(
        (size_px, size_px), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )
    return np.asarray(square).copy()


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
    """Opaque 8-bit RGB of any mode."""
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


def _box(image: Image.Image, crop: Crop, name: str) -> tuple[float, float, float, float]:
    """(x, y, width, height) in pixels."""
    if crop == "centre":
        return 0, 0, image.width, image.height
    if crop == "face":
        return _face_box(image, name)
    if isinstance(crop, str) or len(crop) != 4:
        raise UserError(
            "expected a crop 'centre', 'face' or a box (x, y, width, height), got "
            f"{crop!r}: choose one"
        )
    x, y, width, height = (float(value) for value in crop)
    if max(x, y, width, height) <= 1.0:
        x, y, width, height = (
            x * image.width,
            y * image.height,
            width * image.width,
            height * image.height,
        )
    if (
        min(x, y) < 0
        or min(width, height) <= 0
        or x + width > image.width + 0.5
        or y + height > image.height + 0.5
    ):
        size = f"{image.width}x{image.height}"
        raise UserError(
            f"expected a crop box inside {name} of {size} pixels, got {tuple(crop)}: "
            "make it smaller"
        )
    return x, y, min(width, image.width - x), min(height, image.height - y)


def _face_box(image: Image.Image, name: str) -> tuple[float, float, float, float]:
    """A square around the largest face that shows the head as the training clips do: 1.6 times the
    detected box.
    """
    from rest_lightning.media.faces import FaceBoxes

    with FaceBoxes() as detector:
        found = detector.find(np.asarray(image))
    if not found:
        raise UserError(
            f"expected a face in {name}, found none: give the crop as a box (x, y, width, height)"
        )
    left, top, width, height = max((box for box, _, _ in found), key=lambda box: box[2] * box[3])
    side = min(1.6 * max(width, height), image.width, image.height)
    x = left + width / 2 - side / 2
    y = top + 0.42 * height - side / 2  # the detected box ends at the brows: keep the hair
    return min(max(x, 0.0), image.width - side), min(max(y, 0.0), image.height - side), side, side
