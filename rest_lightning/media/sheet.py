"""A contact sheet of a talking video: reference and frames along time, mouth opening over the audio
envelope.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS, SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.media.container import open_media
from rest_lightning.media.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MouthOpening = Callable[[NDArray[np.uint8]], NDArray[np.float32]] | NDArray[np.floating[Any]] | None

_PAPER, _INK, _QUIET, _SOUND, _MOUTH = "#fbfaf7", "#22262b", "#8b9097", "#c9d3dc", "#c2412d"
_COLUMNS = 8
_BATCH_FRAMES = 64


@dataclass
class VideoSummary:
    """What a contact sheet shows of a video.

    Attributes:
        frames: chosen frames (n, H, W, 3), evenly spread.
        frame_numbers: their numbers (n,).
        mouth_opening: (F,) in [0, 1], or None.
        envelope: (F,) root mean square of the sound of every frame, 0 where the video has none.
    """

    frames: NDArray[np.uint8]
    frame_numbers: NDArray[np.int64]
    mouth_opening: NDArray[np.float32] | None
    envelope: NDArray[np.float32]


def draw_contact_sheet(
    path: str | os.PathLike[str],
    video: str | os.PathLike[str],
    reference: NDArray[np.uint8] | None = None,
    mouth_opening: MouthOpening = None,
    *,
    title: str | None = None,
    figures: Mapping[str, str] | None = None,
    num_frames: int = 2 * _COLUMNS - 1,
) -> None:
    """Writes the sheet of a finished video as PNG.

    Args:
        path: the PNG; appears when it is whole.
        video: the mp4, read once in bounded memory.
        reference: the portrait (H, W, 3), shown first.
        mouth_opening: a curve (F,) in [0, 1], or a function from frames (n, H, W, 3) to openings
            (n,); None shows none.
        title: text above; None takes the video's name.
        figures: names and values of key figures below the title.
        num_frames: frames to show.

    Raises:
        UserError: a video without frames, a curve of another length, or a PNG that cannot be
            written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summary = summarise_video(video, mouth_opening, num_frames)
    pictures = ([] if reference is None else [("reference", reference)]) + [
        (f"{number / FPS:.2f} s", frame)
        for number, frame in zip(summary.frame_numbers, summary.frames, strict=True)
    ]
    num_rows = -(-len(pictures) // _COLUMNS)
    figure = Figure(figsize=(16, 2.0 * num_rows + 3.9), facecolor=_PAPER)
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    _draw_title(figure, title or Path(video).stem, figures or {})
    grid = figure.add_gridspec(
        num_rows,
        _COLUMNS,
        left=0.03,
        right=0.97,
        top=1 - 1.05 / height,
        bottom=2.65 / height,
        wspace=0.04,
        hspace=0.16,
    )
    for index, (label, picture) in enumerate(pictures):
        axes = figure.add_subplot(grid[index // _COLUMNS, index % _COLUMNS])
        _draw_picture(axes, picture, label, is_reference=label == "reference")
    _draw_curves(figure.add_axes((0.045, 0.55 / height, 0.91, 1.75 / height)), summary)
    with whole_file(path) as temporary:
        figure.savefig(
            temporary, dpi=100, facecolor=_PAPER, metadata={"Software": "rest_lightning"}
        )


def summarise_video(
    video: str | os.PathLike[str],
    mouth_opening: MouthOpening = None,
    num_frames: int = 2 * _COLUMNS - 1,
) -> VideoSummary:
    """Reads a video once, keeping only what the sheet shows. See :func:`draw_contact_sheet`."""
    with open_media(video) as container:
        if not container.streams.video or not container.streams.video[0].frames:
            raise UserError(
                f"expected a video with frames for the contact sheet, got {video}: choose an mp4"
            )
        total = container.streams.video[0].frames
        wanted = np.unique(np.linspace(0, total - 1, num_frames).round().astype(np.int64))
        kept: list[NDArray[np.uint8]] = []
        openings: list[NDArray[np.float32]] = []
        batch: list[NDArray[np.uint8]] = []

        def measure() -> None:
            if callable(mouth_opening) and batch:
                openings.append(np.asarray(mouth_opening(np.stack(batch)), dtype=np.float32))
            batch.clear()

        for number, frame in enumerate(container.decode(video=0)):
            if not callable(mouth_opening) and number not in wanted:
                continue
            pixels = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
            if number in wanted:
                kept.append(pixels)
            batch.append(pixels)
            if len(batch) == _BATCH_FRAMES:
                measure()
        measure()
    curve = np.concatenate(openings) if openings else None
    if mouth_opening is not None and not callable(mouth_opening):
        curve = np.asarray(mouth_opening, dtype=np.float32)
        if curve.shape != (total,):
            raise UserError(
                f"expected a mouth opening per frame ({total},), got {curve.shape}: "
                "cut it to the video"
            )
    return VideoSummary(np.stack(kept), wanted[: len(kept)], curve, sound_envelope(video, total))


def sound_envelope(video: str | os.PathLike[str], num_frames: int) -> NDArray[np.float32]:
    """Root mean square (num_frames,) of the 640 samples of every frame; zeros for a video without
    sound.
    """
    from rest_lightning.media.audio import open_speech

    envelope = np.zeros(num_frames, np.float32)
    try:
        speech = open_speech(video, block_samples=SAMPLES_PER_FRAME)
    except UserError:
        return envelope
    for number, block in zip(range(num_frames), speech, strict=False):
        envelope[number] = np.sqrt(np.mean(np.square(block)))
    return envelope


def _draw_title(figure: Figure, title: str, figures: Mapping[str, str]) -> None:
    height = figure.get_figheight()
    figure.text(0.03, 1 - 0.42 / height, title, size=19, weight="bold", color=_INK, va="center")
    if figures:
        step = min(0.135, 0.94 / len(figures))
        for index, (name, value) in enumerate(reversed(list(figures.items()))):
            x = 0.97 - index * step
            figure.text(
                x,
                1 - 0.32 / height,
                value,
                size=14,
                weight="bold",
                color=_INK,
                va="center",
                ha="right",
            )
            figure.text(x, 1 - 0.62 / height, name, size=9.5, color=_QUIET, va="center", ha="right")


def _draw_picture(axes: Axes, picture: NDArray[np.uint8], label: str, is_reference: bool) -> None:
    axes.imshow(picture, interpolation="lanczos")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=_MOUTH if is_reference else _PAPER, linewidth=2.5 if is_reference else 0)
    color, weight = (_MOUTH, "bold") if is_reference else (_QUIET, "normal")
    axes.set_xlabel(label, size=10, color=color, weight=weight, labelpad=3)


def _draw_curves(axes: Axes, summary: VideoSummary) -> None:
    """Envelope as a symmetric shape, the mouth opening as a line over it, a tick where every frame
    was taken.
    """
    num_frames = len(summary.envelope)
    time_s = (np.arange(num_frames) + 0.5) / FPS
    peak = float(summary.envelope.max(initial=0.0))
    level = summary.envelope / peak if peak > 1e-6 else summary.envelope
    axes.fill_between(
        *_thinned(time_s, level), color=_SOUND, linewidth=0, label=("speech, root mean square")
    )
    if summary.mouth_opening is not None:
        axes.plot(
            *_thinned(time_s, summary.mouth_opening),
            color=_MOUTH,
            linewidth=1.7,
            label="mouth opening",
        )
    for number in summary.frame_numbers:
        axes.axvline((number + 0.5) / FPS, ymin=0.965, color=_INK, linewidth=1.2)
    axes.set(xlim=(0, num_frames / FPS), ylim=(0, 1.08), yticks=[0, 0.5, 1], facecolor=_PAPER)
    axes.set_xlabel("seconds", size=10, color=_QUIET)
    axes.tick_params(colors=_QUIET, labelsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_QUIET)
    axes.legend(
        loc="upper right",
        bbox_to_anchor=(1.0, -0.1),
        ncols=2,
        frameon=False,
        fontsize=10,
        labelcolor=_INK,
    )


def _thinned(
    x: NDArray[Any], y: NDArray[Any], num_points: int = 3000
) -> tuple[NDArray[Any], NDArray[Any]]:
    """At most about ``num_points`` points, each the largest of its group: hours stay readable and
    quick to draw.
    """
    group = -(-len(y) // num_points)
    if group <= 1:
        return x, y
    padded = np.pad(y, (0, -len(y) % group), mode="edge").reshape(-1, group)
    return x[::group], padded.max(axis=1)
