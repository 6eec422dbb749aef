"""Videos as cameras and programs leave them: joined time stamps, HDR, interlaced fields, rare
colour tags, a person who changes, pictures that stand still.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from videos import levels, rotate, speech_like, write_video

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.data import layout
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.rows import Row
from rest_lightning.data.preparation.work import prepare_video
from rest_lightning.errors import UserError
from rest_lightning.media.video import VideoFile, has_decord, read_clip_audio, read_frames

OPTIONS = PrepareOptions(
    size_px=128,
    already_cropped=True,
    min_frames=5,
    min_sharpness=None,
    max_text=None,
    min_brightness=None,
    max_flow=None,
)
SEEN = replace(OPTIONS, already_cropped=False, detector="videos:OneFace", max_hands=None)


def tone(frequency: float, duration_s: float = 2.0) -> np.ndarray:
    time_s = np.arange(round(duration_s * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * frequency * time_s)).astype(np.float32)


def prepared(path: Path, options: PrepareOptions = OPTIONS) -> list[Row]:
    return prepare_video(path, path.parent, path.parent / "out", options)


def loudest_hz(out: Path, row: Row) -> float:
    assert row.clip_id is not None and row.num_frames is not None
    samples = read_clip_audio(layout.clip_path(out, row.clip_id), row.num_frames)
    spectrum = np.abs(np.fft.rfft(samples))
    return float(np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)[spectrum.argmax()])


@pytest.mark.parametrize(("num_parts", "audio_start_s"), [(2, 0.3), (3, 0.0)])
def test_parts_with_time_stamps_of_their_own_keep_their_sound(
    tmp_path: Path, num_parts: int, audio_start_s: float
) -> None:
    """Each part has its own grey level and its own tone; no clip mixes them."""
    parts = []
    for number in range(num_parts):
        frames = np.full((50, 64, 64, 3), 60 + 60 * number, np.uint8)
        frames[:, :8] = levels(50)[:, :8]
        parts.append(
            write_video(
                tmp_path / "parts" / f"{number}.ts",
                frames,
                [tone(500 * (number + 1))],
                audio_start_s=audio_start_s,
            ).read_bytes()
        )
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    rows = prepared(path)
    kept = [row for row in rows if row.status == "kept"]
    assert [row.num_frames for row in kept] == [50] * num_parts
    for number, row in enumerate(kept):
        assert row.clip_id is not None
        frames = read_frames(layout.clip_path(tmp_path / "out", row.clip_id))
        assert abs(float(frames[25, 64:].mean()) - (60 + 60 * number)) < 8
        assert loudest_hz(tmp_path / "out", row) == pytest.approx(500 * (number + 1), abs=20)


def tagged(path: Path, **tags: int) -> Path:
    """A video that says other colours: ``colorspace``, ``color_trc``, ``color_primaries``."""
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        for name, value in tags.items():
            setattr(video.codec_context, name, value)
        for pixels in levels(25):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            for name, value in tags.items():
                setattr(frame, name, value)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


@pytest.mark.parametrize("matrix", [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14])
def test_every_colour_matrix_is_a_row_and_stops_nothing(tmp_path: Path, matrix: int) -> None:
    (row,) = prepared(tagged(tmp_path / "a.mp4", colorspace=matrix))
    assert row.status in ("failed", "dropped")  # without sound it is not kept
    assert "\n" not in (row.reason or "") and "free some space" not in (row.reason or "")


@pytest.mark.parametrize(
    ("tags", "name"),
    [
        ({"color_trc": 18}, r"HDR \(HLG\)"),
        ({"color_trc": 16}, r"HDR \(PQ\)"),
        ({"color_primaries": 9}, r"BT\.2020"),
        ({"color_trc": 18, "color_primaries": 9, "colorspace": 9}, r"HDR \(HLG\)"),
    ],
)
def test_colours_that_8_bits_cannot_show_are_told(
    tmp_path: Path, tags: dict[str, int], name: str
) -> None:
    (row,) = prepared(tagged(tmp_path / "a.mp4", **tags))
    assert (row.status, row.stage) == ("failed", "probe")
    assert row.reason is not None and pytest.importorskip("re").search(name, row.reason)


@pytest.mark.parametrize("first_field", [0, 1])
@pytest.mark.parametrize("speed_px", [2, 4])
def test_interlaced_frames_have_no_combs(tmp_path: Path, first_field: int, speed_px: int) -> None:
    """A bright bar that moves between the two fields of a frame."""
    path, size = tmp_path / "a.ts", 128
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream(
            "mpeg2video", rate=25, options={"flags": "+ilme+ildct", "qmin": "1", "qmax": "2"}
        )
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=size, height=size, format=av.VideoFormat("yuv420p"), time_base=Fraction(1, 25)
        )
        marked = graph.add("setfield", "tff" if first_field == 0 else "bff")
        source.link_to(marked)
        marked.link_to(graph.add("buffersink"))
        graph.configure()
        for number in range(25):
            pixels = np.full((size, size, 3), 30, np.uint8)
            for field in range(2):
                left = 10 + speed_px * number + speed_px // 2 * (field != first_field)
                pixels[field::2, left : left + 40] = 220
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            graph.push(frame)
            container.mux(video.encode(graph.pull()))
        container.mux(video.encode(None))
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    options = replace(OPTIONS, max_silence=None)
    (row,) = prepared(path, options)
    assert row.status == "kept" and row.clip_id is not None, row.reason
    frames = read_frames(layout.clip_path(tmp_path / "out", row.clip_id))[2:-2, ..., 1].astype(
        float
    )
    combs = np.abs(2 * frames[:, 1:-1] - frames[:, :-2] - frames[:, 2:])[:, 8:-8].mean()
    assert combs < 1.5  # combed: 10 and more


@pytest.mark.parametrize("at", [20, 30, 40])
def test_a_person_who_changes_ends_the_clip(tmp_path: Path, at: int) -> None:
    """Only what is inside the face's box changes, an eighth of the picture."""
    rng = np.random.default_rng(0)
    people = rng.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    frames = np.full((60, 64, 64, 3), 128, np.uint8)
    for number in range(60):
        frames[number, 16:48, 16:48] = people[int(number >= at)]
        frames[number, 16:48, 16:48] += np.uint8(number % 3)
    path = write_video(tmp_path / "a.mp4", frames, [speech_like(2.4)])
    rows = prepared(path, replace(SEEN, min_face_px=None, max_profile=None, scene_threshold=30.0))
    assert sorted(row.num_frames or 0 for row in rows) == sorted((at, 60 - at))


@pytest.mark.parametrize(("still_s", "is_dropped"), [(2.0, False), (4.0, True), (6.0, True)])
def test_pictures_that_stand_still_are_dropped(
    tmp_path: Path, still_s: float, is_dropped: bool
) -> None:
    num_still = round(25 * still_s)
    moving = levels(150)
    last = max(0, 149 - num_still)
    frames = np.concatenate([moving[: 150 - num_still], moving[[last] * num_still]])
    path = write_video(tmp_path / "a.mp4", frames, [speech_like(6.0)])
    (row,) = prepared(path)
    assert (row.filter == "still") == is_dropped, row.scores
    off = replace(OPTIONS, max_still_s=None)
    assert prepared(path, off)[0].status == "kept"


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_both_backends_read_rotated_videos_upright(tmp_path: Path, degrees: int) -> None:
    if not has_decord():
        pytest.skip("no decord")
    frames = np.zeros((10, 64, 96, 3), np.uint8)
    frames[:, :20, :30, 0] = 200
    path = rotate(write_video(tmp_path / "a.mp4", frames), degrees)
    read = []
    for backend in ("decord", "pyav"):
        with VideoFile(path, backend) as video:  # type: ignore[arg-type]
            read.append(video.read())
    assert read[0].shape == read[1].shape
    assert np.abs(read[0].astype(int) - read[1].astype(int)).mean() < 2


@pytest.mark.parametrize("claimed", [11, 1_000_000, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("box", [b"stts", b"stsz"])
def test_counts_that_are_not_kept_never_reach_decord(
    tmp_path: Path, box: bytes, claimed: int
) -> None:
    """decord makes room for what a container says, and aborts the process."""
    path = write_video(tmp_path / "a.mp4", levels(10, 64, 64))
    data = bytearray(path.read_bytes())
    at = data.index(box) + 12
    data[at : at + 4] = claimed.to_bytes(4, "big")
    path.write_bytes(data)
    try:
        with VideoFile(path) as video:
            assert video.backend == "pyav" or video.num_frames == 10
            assert len(video.read(0, 5)) == 5
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 - reading what is left is fine too


@pytest.mark.parametrize("distance", [None, 0, 6, 32])
def test_null_switches_the_filter_of_duplicates_off(distance: int | None) -> None:
    from rest_lightning.data.preparation.duplicates import mark_duplicates

    rows = [
        Row(name, name, "kept", "encode", num_frames=50, phash="0" * 16, sound_hash="1" * 16)
        for name in ("a", "b")
    ]
    marked = mark_duplicates(rows, replace(OPTIONS, max_duplicate_distance=distance))
    assert sum(row.status == "kept" for row in marked) == (2 if distance is None else 1)


@pytest.mark.parametrize("distance", [-1, 33, 40])
def test_a_distance_outside_its_bounds_is_refused_at_once(distance: int) -> None:
    with pytest.raises(UserError, match=f"of 0 to 32 bits, got {distance}"):
        replace(OPTIONS, max_duplicate_distance=distance)


def test_channels_that_cancel_are_no_silence(tmp_path: Path) -> None:
    voice = speech_like(2.0)
    path = write_video(
        tmp_path / "a.mp4", levels(50), [np.stack([voice, -voice])], layout="stereo", rate=16_000
    )
    (row,) = prepared(path)
    assert row.status == "kept" and row.scores["silence"] < 0.2
