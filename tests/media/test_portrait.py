from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rest_lightning.errors import UserError
from rest_lightning.media.portrait import load_portrait, read_portrait


def corners(width: int, height: int) -> np.ndarray:
    """Smooth colours (H, W, 3) that tell every corner and direction apart."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * x, 255 * y, 128 * (1 - x) + 60 * y], axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff", "ppm", "tga", "jp2", "avif"]
)
@pytest.mark.parametrize("size", [(64, 64), (80, 64), (64, 100)])
def test_formats(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    array = corners(*size)
    Image.fromarray(array).save(tmp_path / f"a.{suffix}", quality=95)
    square = read_portrait(tmp_path / f"a.{suffix}", 64)
    left, top = (size[0] - 64) // 2, (size[1] - 64) // 2
    expected = array[top : top + 64, left : left + 64]
    assert square.shape == (64, 64, 3) and square.dtype == np.uint8
    assert np.abs(square.astype(int) - expected).mean() < (12 if suffix == "gif" else 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tag(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(corners(64, 64))
    # PIL's transpose that the tag's reader must undo
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_portrait(tmp_path / "a.png", 64), corners(64, 64))


def test_modes_give_the_same_picture(tmp_path: Path) -> None:
    rgb = Image.fromarray(corners(64, 64))
    grey = np.asarray(rgb.convert("L"))
    expected_grey = np.repeat(grey[..., None], 3, axis=2)
    cases: dict[str, tuple[Image.Image, np.ndarray]] = {
        "grey.png": (Image.fromarray(grey), expected_grey),
        "grey16.png": (Image.fromarray(grey.astype(np.uint16) * 257), expected_grey),
        "grey32.tiff": (Image.fromarray(grey.astype(np.int32) * 257), expected_grey),
        "float.tiff": (Image.fromarray(grey.astype(np.float32) / 255), expected_grey),
        "float255.tiff": (Image.fromarray(grey.astype(np.float32)), expected_grey),
        "grey_alpha.png": (rgb.convert("LA"), expected_grey),
        "bits.png": (rgb.convert("1"), np.asarray(rgb.convert("1").convert("RGB"))),
        "opaque.png": (rgb.convert("RGBA"), np.asarray(rgb)),
        "cmyk.tiff": (rgb.convert("CMYK"), np.asarray(rgb)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        difference = np.abs(read_portrait(tmp_path / name, 64).astype(int) - expected)
        assert difference.max() <= 2, name


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_shows_a_light_wall(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.dstack([corners(64, 64), np.full((64, 64), 255, np.uint8)]))
    image.paste((0, 0, 0, 0), (0, 0, 64, 32))
    if mode == "P":
        palette = image.convert("RGB").quantize(200)
        index = palette.getpixel((0, 0))
        palette.save(tmp_path / "a.png", transparency=index)
    else:
        image.convert(mode).save(
            tmp_path / ("a.tiff" if mode == "PA" else "a.png"),
            **({"format": "TIFF"} if mode == "PA" else {}),
        )
    square = read_portrait(tmp_path / ("a.tiff" if mode == "PA" else "a.png"), 64)
    if mode != "PA":  # TIFF drops the alpha of palettes
        assert (square[:31] == 200).all()
    assert square[40:].std() > 5


def test_sources_agree(tmp_path: Path) -> None:
    array = corners(64, 64)
    Image.fromarray(array).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array):
        np.testing.assert_array_equal(read_portrait(source, 64), array)
    tensor = load_portrait(array, 64)
    assert tensor.shape == (3, 64, 64) and tensor.dtype == torch.float32
    assert torch.equal(tensor, torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1)
    assert load_portrait(corners(64, 64)[..., 0], 32).shape == (3, 32, 32)


@pytest.mark.parametrize("box", [(16, 8, 64, 64), (0.125, 0.1, 0.5, 0.8)])
def test_crop_boxes_in_pixels_and_fractions(box: tuple[float, float, float, float]) -> None:
    array = corners(128, 80)
    np.testing.assert_array_equal(read_portrait(array, 64, crop=box), array[8:72, 16:80])


def test_oblong_box_gives_its_centre() -> None:
    array = corners(128, 80)
    np.testing.assert_array_equal(
        read_portrait(array, 64, crop=(16, 0, 64, 80)), array[8:72, 16:80]
    )


def test_bad_crops() -> None:
    for crop in ((100, 0, 64, 64), (0, 0, 0, 5), (-1, 0, 64, 64), "nose", (1, 2, 3)):
        with pytest.raises(UserError, match="expected a crop"):
            read_portrait(corners(128, 80), 64, crop=crop)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"cropped to 20x20"):
        read_portrait(corners(128, 80), 64, crop=(0, 0, 20, 20))


def bomb(width: int, height: int) -> bytes:
    """A PNG header that claims a huge image."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        )

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "does not exist: check the name"),
        ("folder", "got the folder"),
        ("empty.png", "the empty file"),
        ("text.png", "not one that can be read"),
        ("postscript.eps", "not one that can be read"),
        ("cut.png", "truncated or damaged"),
        ("cut.jpg", "truncated or damaged"),
        ("stub.jpg", "not one that can be read|truncated"),
        ("one.png", "at least 32x32 pixels, but .* is of 1x1: use a larger image"),
        ("line.png", "is of 500x20"),
        ("bomb.png", "at most 100 megapixels, but .* has 11000x10000"),
        ("big_bomb.png", "at most 100 megapixels, but .* claims more"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, message: str) -> None:
    photo = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "postscript.eps").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n"
    )
    for suffix, share in (("png", 0.5), ("jpg", 0.6)):
        photo.save(tmp_path / f"cut.{suffix}")
        data = (tmp_path / f"cut.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(data[: int(share * len(data))])
        (tmp_path / f"stub.{suffix}").write_bytes(data[:30])
    photo.resize((1, 1)).save(tmp_path / "one.png")
    photo.resize((500, 20)).save(tmp_path / "line.png")
    (tmp_path / "bomb.png").write_bytes(bomb(11_000, 10_000))
    (tmp_path / "big_bomb.png").write_bytes(bomb(100_000, 100_000))
    with pytest.raises(UserError, match=message) as info:
        load_portrait(tmp_path / name, 64)
    assert name in str(info.value) and "\n" not in str(info.value)


def test_bad_arrays() -> None:
    for array in (
        np.zeros((64, 64, 3)),
        np.zeros((64, 64, 2), np.uint8),
        np.zeros((3,), np.uint8),
        np.zeros((0, 5), np.uint8),
    ):
        with pytest.raises(UserError, match="expected a portrait array"):
            read_portrait(array, 64)
