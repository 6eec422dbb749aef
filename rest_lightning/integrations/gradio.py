"""A Gradio app: a portrait and speech in, a video out that plays while it is made (extra `app`).

`rest app` shows it, and examples/space is the folder of a Space with it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rest_lightning.constants import FPS, SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.extras import missing
from rest_lightning.media.audio import open_speech
from rest_lightning.media.photo import PhotoFrames
from rest_lightning.media.portrait import find_portrait
from rest_lightning.media.segments import Segment, SegmentEncoder, join_segments

# Read when Gradio is imported. No usage statistics, and no question to the hub at the start.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import gradio
    import uvicorn
    from fastapi import FastAPI
    from gradio.data_classes import FileData
except ModuleNotFoundError as error:
    raise missing(error.name, "app", "rest app") from None

if TYPE_CHECKING:
    from rest_lightning.media.provenance import Signer
    from rest_lightning.talking_head import TalkingHead

SPEECH = Path(__file__).resolve().parent.parent / "assets" / "speech.wav"
_KEEP_S = 3600
_HEIGHT_PX = 320
_INTRODUCTION = """# A portrait speaks

Give a portrait and speech. The video plays while it is made; everything in it but the speech is
**synthetic**, and the file that you download says so. Use portraits of people who have agreed."""


def plays_segments(video: gradio.Video, signer: Signer | None = None) -> gradio.Video:
    """Lets a streaming output take :class:`rest_lightning.media.segments.Segment`.

    Gradio's own way passes every piece through the program ``ffmpeg``, and encodes the sound anew.
    A segment is already what the player takes. The methods are those that Gradio's components
    implement for streams (``gradio.components.base.StreamingOutput``); they are set on the
    component, because Gradio writes a .pyi file beside the source of every class of components.
    """

    async def stream_output(value: Any, output_id: str, first_chunk: bool) -> tuple[Any, Any]:
        place = {
            "path": output_id,
            "is_stream": True,
            "orig_name": "video-stream.mp4",
            "meta": {"_type": "gradio.FileData"},
        }
        if not isinstance(value, Segment):  # Gradio's sign that the run has ended
            return None, place
        return {"data": value.data, "duration": value.duration_s, "extension": ".ts"}, place

    async def flush_stream_output(output_id: str) -> None:
        """Nothing is held back: the last segment ends the video."""

    async def combine_stream(
        stream: list[bytes], desired_output_format: str | None = None, only_file: bool = False
    ) -> FileData:
        Path(video.GRADIO_CACHE).mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(dir=video.GRADIO_CACHE)) / "talking-head.mp4"
        await asyncio.to_thread(join_segments, stream, path, signer)
        video.temp_files.add(str(path))  # what Gradio deletes after a while
        return FileData(path=str(path), is_stream=False, orig_name=path.name)

    video.stream_output = stream_output
    video.flush_stream_output = flush_stream_output
    video.combine_stream = combine_stream
    return video


def build(model: TalkingHead, max_s: float = 120.0, signer: Signer | None = None) -> FastAPI:
    """Returns the app, for any ASGI server.

    Args:
        model: what speaks. One video is made at a time; others wait in Gradio's queue.
        max_s: longest speech in seconds; longer speech is refused.
        signer: signs the videos that are downloaded; None leaves them unsigned.
    """

    def talk(
        portrait: str | None, speech: str | None, whole_photo: bool, seed: float | None
    ) -> Iterator[tuple[Any, str]]:
        try:
            yield from _talk(model, portrait, speech, whole_photo, int(seed or 0), max_s)
        except UserError as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from error

    # Uploads and videos are deleted when they are an hour old.
    with gradio.Blocks(
        title="REST talking head", analytics_enabled=False, delete_cache=(_KEEP_S, _KEEP_S)
    ) as blocks:
        gradio.Markdown(_INTRODUCTION)
        with gradio.Row():
            with gradio.Column():
                portrait = gradio.Image(
                    label="Portrait",
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    height=_HEIGHT_PX,
                )
                speech = gradio.Audio(
                    label="Speech",
                    type="filepath",
                    sources=["upload", "microphone"],
                    buttons=["download"],
                )
                with gradio.Accordion("More", open=False):
                    whole_photo = gradio.Checkbox(
                        label="Show the whole photograph around the head", value=False
                    )
                    seed = gradio.Number(label="Seed of the noise", value=0, precision=0)
                button = gradio.Button("Talk", variant="primary")
            with gradio.Column():
                video = plays_segments(
                    gradio.Video(
                        label="Video",
                        streaming=True,
                        autoplay=True,
                        interactive=False,
                        height=_HEIGHT_PX,
                    ),
                    signer,
                )
                report = gradio.Markdown(elem_id="report")
        examples = [[str(picture), str(SPEECH)] for picture in model.portraits]
        gradio.Examples(examples, [portrait, speech], cache_examples=False)
        button.click(
            talk,
            [portrait, speech, whole_photo, seed],
            [video, report],
            concurrency_limit=1,
            api_name="talk",
        )
    blocks.queue(max_size=16)
    return gradio.mount_gradio_app(
        FastAPI(),
        blocks,
        path="/",
        # fonts of the system: nothing is loaded from elsewhere
        theme=gradio.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        max_file_size="100mb",
    )


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket to give to :func:`serve`; port 0 takes any free one.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise UserError(
            f"expected a free port, got {host}:{port} ({error.strerror}): choose another --port"
        ) from error


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serves the app until Ctrl-C or SIGTERM."""
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def _talk(
    model: TalkingHead,
    portrait: str | None,
    speech: str | None,
    whole_photo: bool,
    seed: int,
    max_s: float,
) -> Iterator[tuple[Any, str]]:
    """Yields the segments of the video, each with a line about it."""
    if not portrait or not speech:
        absent = "portrait" if not portrait else "speech"
        raise UserError(f"expected a portrait and speech, got no {absent}: choose an example")
    found = find_portrait(portrait, option=None)
    source = open_speech(speech, longest_s=max_s)
    samples = source.read_all()
    compose = PhotoFrames(found) if whole_photo else None
    size = model.size_px if compose is None else (compose.height, compose.width)
    notes = "".join(f"\n\n{note}" for note in (*found.notes, *source.notes))
    total = -(-len(samples) // SAMPLES_PER_FRAME)
    encoder = SegmentEncoder(size)
    start_s, first_s, done = time.perf_counter(), None, 0
    try:
        with model.open(found.square(model.size_px), seed=seed) as session:
            for frames in session.stream([samples]):
                if first_s is None:
                    first_s = time.perf_counter() - start_s
                begin, done = done, done + len(frames)
                block = samples[begin * SAMPLES_PER_FRAME : done * SAMPLES_PER_FRAME]
                shown = frames if compose is None else compose(frames)
                segment = encoder.encode(np.asarray(shown), block, last=done >= total)
                speed = done / (time.perf_counter() - start_s)
                line = (
                    f"{done} of {total} frames, {speed:.1f} frames/s ({speed / FPS:.2f} x real "
                    f"time), first frames after {1000 * first_s:.0f} ms"
                )
                yield segment, line + notes
    finally:
        encoder.close()
