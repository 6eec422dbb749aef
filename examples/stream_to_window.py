"""Streams a talking portrait into an OpenCV window, or into a file.

    python examples/stream_to_window.py photo.jpg speech.wav                # a window; q closes it
    python examples/stream_to_window.py photo.jpg speech.wav --out out.mp4  # a file, with sound

A window needs a build of OpenCV with a display: pip install opencv-python
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from rest_lightning import TalkingHead, UserError
from rest_lightning.media import BackgroundWriter, Mp4Writer, open_speech
from rest_lightning.streaming import StreamingSession, write_stream

FPS = 25


def at_the_pace_of_sound(blocks: Iterable[np.ndarray], sample_rate: int) -> Iterator[np.ndarray]:
    """Yields each block when a microphone would have recorded it."""
    start_s = time.monotonic()
    num_samples = 0
    for block in blocks:
        num_samples += len(block)
        time.sleep(max(0.0, start_s + num_samples / sample_rate - time.monotonic()))
        yield block


def show(session: StreamingSession, speech: Iterable[np.ndarray]) -> None:
    """Shows frames at 25 a second until the speech ends or q is pressed."""
    import cv2

    title = "q closes"
    for frames in session.stream(at_the_pace_of_sound(speech, 16_000)):
        for frame in frames:
            cv2.imshow(title, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            if cv2.waitKey(round(1000 / FPS)) == ord("q"):
                return
    cv2.destroyAllWindows()


def write(session: StreamingSession, speech: Iterable[np.ndarray], out: Path) -> int:
    """Writes an mp4 with sound; returns its number of frames."""
    with BackgroundWriter(Mp4Writer(out, session.model.size_px, overwrite=True)) as writer:
        return sum(write_stream(session, speech, writer))


def main(args: list[str] | None = None) -> None:
    """Reads the command line and streams."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("portrait", type=Path)
    parser.add_argument("speech", type=Path)
    parser.add_argument("--out", type=Path, help="mp4 to write (default: a window)")
    parser.add_argument("--model", type=Path, help="model folder (default: the bundled model)")
    options = parser.parse_args(args)
    try:
        speech = open_speech(options.speech)
        with TalkingHead.from_pretrained(options.model).open(options.portrait) as session:
            if options.out is None:
                show(session, speech)
            else:
                print(f"{options.out}: {write(session, speech, options.out)} frames")
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
