"""The bar of ``rest talk``."""

from __future__ import annotations

from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME


class TalkProgress:
    """A bar on stderr: frames, frames per second, times real time; without a total for pipes."""

    def __init__(self, duration_s: float | None, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        total = None if duration_s is None else -(-round(duration_s * SAMPLE_RATE) // SAMPLES_PER_FRAME)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("talking"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("frames  {task.fields[speed]}"),
            Remaining(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._task = self._bar.add_task("talking", total=total, speed="")

    def advance(self, num_frames: int) -> None:
        """Counts frames that are written."""
        self._bar.update(self._task, advance=num_frames)
        task = self._bar.tasks[self._task]
        if task.elapsed:
            speed = task.completed / task.elapsed
            self._bar.update(self._task, speed=f"{speed:.1f} fps  {speed / FPS:.2f} x real time")

    def __enter__(self) -> TalkProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
