from __future__ import annotations

import zlib
from functools import partial
from pathlib import Path

import drawn
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from stills import face

from rest_lightning.errors import UserError
from rest_lightning.media import portrait
from rest_lightning.media.portrait import find_portrait, head_box, load_portrait

# The middle square, unseen, unless a test is about the head.
read_portrait = partial(portrait.read_portrait, crop="centre")


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
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # PIL's transpose that the tag's reader must undo
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
    assert load_portrait(corners(64, 64)[..., 0], 32, "centre").shape == (3, 32, 32)


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
    for crop in ((100, 0, 64, 64), (0, 0, 0, 5), (-1, 0, 64, 64), "nose", (1, 2)):
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


@pytest.mark.parametrize("form", ["square", "box"])
def test_square_crops(form: str) -> None:
    array = corners(128, 80)
    crop = (16, 8, 64) if form == "square" else (16, 8, 64, 64)
    np.testing.assert_array_equal(read_portrait(array, 64, crop=crop), array[8:72, 16:80])


def photograph(
    size: tuple[int, int], head_px: int, at: tuple[int, int], index: int = 4
) -> Image.Image:
    """A still of so many pixels on a wall."""
    wall = Image.new("RGB", size, (120, 130, 140))
    wall.paste(face(head_px, head_px, index), at)
    return wall


@pytest.mark.parametrize(
    ("size", "head_px", "at"),
    [((800, 1600), 300, (250, 120)), ((1600, 900), 500, (1050, 380)), ((600, 600), 200, (20, 30))],
)
def test_auto_shows_the_head_as_training_does(
    size: tuple[int, int], head_px: int, at: tuple[int, int]
) -> None:
    found = find_portrait(photograph(size, head_px, at))
    left, top, side, _ = found.box
    # The face of this still is 0.63 of its side wide, with its middle at (0.5, 0.56).
    assert side == pytest.approx(0.97 * head_px, rel=0.1)
    assert left + side / 2 == pytest.approx(at[0] + 0.5 * head_px, abs=0.06 * head_px)
    assert top + side / 2 == pytest.approx(at[1] + 0.51 * head_px, abs=0.08 * head_px)
    assert left >= 0 and top >= 0 and left + side <= size[0] and top + side <= size[1]
    assert found.notes == ()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_auto_follows_the_orientation_tag(tmp_path: Path, orientation: int) -> None:
    upright = photograph((600, 900), 260, (300, 100))
    undo = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert find_portrait(tmp_path / "a.png").box == pytest.approx(find_portrait(upright).box)


@pytest.mark.parametrize("path", drawn.PORTRAITS, ids=lambda path: path.stem)
def test_a_framed_square_is_taken_whole(path: Path) -> None:
    whole = portrait.read_portrait(path, 128, crop="centre")
    np.testing.assert_array_equal(portrait.read_portrait(path, 128), whole)


def test_a_frame_of_the_models_size_is_taken_as_it_is(tmp_path: Path) -> None:
    frame = corners(64, 64)
    np.testing.assert_array_equal(portrait.read_portrait(frame, 64), frame)
    Image.fromarray(frame).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="expected the face of a person"):
        portrait.read_portrait(tmp_path / "a.png", 64)


def test_a_face_larger_than_the_picture_is_padded_with_its_edges() -> None:
    whole = face(512, 512)
    narrow = whole.crop((150, 60, 340, 500))
    found = find_portrait(narrow)
    left, _, side, _ = found.box
    assert left < 0 and left + side > narrow.width
    square = found.square(round(side))
    row = square[len(square) // 2].astype(int)
    assert np.abs(row[0] - row[int(-left) // 2]).max() <= 2
    assert square.std() > 20


def test_two_people() -> None:
    picture = photograph((1400, 700), 500, (50, 100))
    picture.paste(face(200, 200, 0), (900, 100))
    found = find_portrait(picture)
    assert found.box[0] + found.box[2] / 2 < 600
    picture.paste(face(450, 450, 0), (900, 100))
    with pytest.raises(
        UserError, match=r"found 2 faces of similar size: set --crop to one of "
    ) as caught:
        find_portrait(picture, option="--crop")
    named = [
        tuple(map(float, word.split(","))) for word in str(caught.value).split("one of ")[1].split()
    ]
    assert len(named) == 2
    for square, middle in zip(named, (300, 1125), strict=True):
        left, _, side, _ = find_portrait(picture, square).box
        assert left + side / 2 == pytest.approx(middle, abs=60)


@pytest.mark.parametrize("option", ["--crop", "crop", None])
def test_no_face(option: str | None) -> None:
    with pytest.raises(UserError, match=r"expected the face of a person .* found none: ") as caught:
        find_portrait(corners(300, 200), option=option)
    assert "\n" not in str(caught.value)
    assert (f"set {option} to x,y,size" in str(caught.value)) == (option is not None)


def test_a_small_face_is_told() -> None:
    with pytest.raises(
        UserError, match=r"a face of at least 40 pixels .* found one of 3\d: use a larger"
    ):
        find_portrait(photograph((400, 300), 50, (100, 100)))


def test_an_open_mouth_is_noted() -> None:
    picture = face(512, 512, 1)  # laughs
    (note,) = find_portrait(picture).notes
    assert "the mouth is open" in note and "\n" not in note
    with pytest.warns(UserWarning, match="the mouth is open"):
        portrait.read_portrait(picture, 64)


def test_head_box_stays_inside_or_is_as_large_as_the_face() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = tuple(int(n) for n in rng.integers(100, 2000, 2))
        side = rng.uniform(20, 1.5 * max(size))
        x, y = (rng.uniform(-0.3, 0.9) * n for n in size)
        left, top, width, height = head_box((x, y, side, 1.1 * side), size)
        assert width == height
        if width <= min(size):
            assert left >= -1e-6 and top >= -1e-6
            assert left + width <= size[0] + 1e-6 and top + width <= size[1] + 1e-6
        else:
            assert width == pytest.approx(1.1 * side * 1.05)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_colour_profiles_are_applied(tmp_path: Path, mode: str) -> None:
    """Red of a wide space is more than sRGB's; greys stay; a damaged profile changes nothing."""
    wide = wide_profile()
    image = Image.new("RGB", (64, 64), (200, 100, 60)).convert(mode)
    plain = read_portrait(image, 64)
    image.save(tmp_path / "wide.png", icc_profile=wide)
    converted = read_portrait(tmp_path / "wide.png", 64).astype(int)[0, 0]
    if mode == "L":
        assert np.abs(converted - plain[0, 0]).max() <= 3
    else:
        assert converted[0] > plain[0, 0, 0] + 3
    image.save(tmp_path / "damaged.png", icc_profile=wide[: len(wide) // 3])
    np.testing.assert_array_equal(read_portrait(tmp_path / "damaged.png", 64), plain)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "srgb.png", icc_profile=srgb)
    np.testing.assert_array_equal(read_portrait(tmp_path / "srgb.png", 64), plain)


def wide_profile() -> bytes:
    """The sRGB profile with Display P3's primaries in the place of its own."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.5151, 0.2412, -0.0011),
        b"gXYZ": (0.2920, 0.6922, 0.0419),
        b"bXYZ": (0.1571, 0.0666, 0.7841),
    }
    for i in range(int.from_bytes(data[128:132], "big")):
        entry = 132 + 12 * i
        tag, offset = (
            bytes(data[entry : entry + 4]),
            int.from_bytes(data[entry + 4 : entry + 8], "big"),
        )
        if tag in primaries:
            values = [
                round(65536 * value).to_bytes(4, "big", signed=True) for value in primaries[tag]
            ]
            data[offset + 8 : offset + 20] = b"".join(values)
    return bytes(data).replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))


@pytest.mark.parametrize(
    ("text", "crop"),
    [
        ("auto", "auto"),
        ("centre", "centre"),
        ("face", "auto"),  # of 0.1
        ("1,2,3", (1, 2, 3)),
        ("1, 2, 3, 4", (1, 2, 3, 4)),
        (".1 .2 .5", (0.1, 0.2, 0.5)),
    ],
)
def test_crops_as_text(text: str, crop: portrait.Crop) -> None:
    assert portrait.parse_crop(text) == crop


@pytest.mark.parametrize("text", ["", "head", "1,2", "1,2,3,4,5", "a,b,c"])
def test_bad_crops_as_text(text: str) -> None:
    with pytest.raises(UserError, match="expected auto, centre, x,y,size or x,y,width,height, got"):
        portrait.parse_crop(text)
