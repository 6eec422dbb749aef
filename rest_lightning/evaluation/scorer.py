"""Scores clips under a protocol, one at a time: every fault is named and counted, a failed clip
counts nowhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.evaluation.clips import (
    NUM_THUMBNAILS,
    NUM_WORST,
    intervals,
    thumbnails,
    worst_first,
)
from rest_lightning.evaluation.faces import FaceFinder
from rest_lightning.evaluation.measures import (
    CURVE,
    Load,
    Own,
    assemble,
    make_measures,
)
from rest_lightning.evaluation.protocol import MAX_WHOLE_FRAMES, Protocol
from rest_lightning.evaluation.row import DECIMALS, ResultRow
from rest_lightning.machine import commit, hardware, versions
from rest_lightning.metrics.extractors import load_extractor
from rest_lightning.metrics.sums import MeanMetric
from rest_lightning.metrics.video import CHUNK_FRAMES

if TYPE_CHECKING:
    from torchmetrics import Metric

Frames = NDArray[np.uint8]
Samples = NDArray[np.float32]


@dataclass
class ClipPair:
    """A generated clip and the true one, frame by frame.

    Attributes:
        name: in failures.
        pieces: frames of both, uint8 (n, H, W, 3) each, n the same for both, ``num_frames`` in all.
        audio: (640 * num_frames,) or longer, 16 kHz mono: what the generated clip is heard with.
        true_audio: the same of the true clip.
        reference: the portrait, uint8 (H, W, 3).
        true_opening: (num_frames,) or longer of the renderer, or None.
        faces: finds the face for SyncNet's crop; None: the frame is the crop.
        facts: further numbers of the clip's own row, such as ``time_to_first_frame_ms``.
    """

    name: str
    pieces: Iterable[tuple[Frames, Frames]]
    audio: Samples
    true_audio: Samples
    reference: Frames
    true_opening: NDArray[np.floating] | None = None
    faces: FaceFinder | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


class Scorer:
    """Scores clips and makes a result row of them.

    Args:
        protocol: what to measure.
        chunk_frames: period of the method's chunk borders, for the seam ratio.
        device: device of the networks.
        load: where extractors come from.
        metrics: of one's own, beside the protocol's, see
            :class:`~rest_lightning.evaluation.measures.Own`; copied.

    Raises:
        UserError: weights that are not there, two metrics of one class, or clips that are too long
            for a metric that holds them whole.
    """

    def __init__(
        self,
        protocol: Protocol,
        chunk_frames: int = CHUNK_FRAMES,
        device: str | torch.device = "cpu",
        load: Load = load_extractor,
        metrics: Sequence[Metric] = (),
    ) -> None:
        self.protocol = protocol
        self.measures = make_measures(protocol, chunk_frames, load)
        self._add_own(metrics)
        self.failures: list[dict[str, str]] = []
        self.resized: set[int] = set()
        self.remarks: list[str] = []  # further notes of the row
        self.num_clips = 0
        self._clips: list[dict[str, Any]] = []
        self._thumbnails: dict[str, Frames] = {}  # of the worst clips so far
        for measure in self.measures.values():
            for metric in measure.metrics.values():
                metric.persistent(True)
                metric.to(device)

    def _add_own(self, metrics: Sequence[Metric]) -> None:
        if metrics and self.protocol.num_frames > MAX_WHOLE_FRAMES:
            raise UserError(
                f"expected at most {MAX_WHOLE_FRAMES} frames with metrics of your own, which get "
                f"whole clips, got {self.protocol.num_frames} in {self.protocol.name}: leave them "
                "out, or choose another protocol"
            )
        for metric in metrics:
            name = f"{type(metric).__module__}.{type(metric).__qualname__}"
            if name in self.measures:
                raise UserError(f"expected metrics of different classes, got {name} twice")
            self.measures[name] = Own(copy.deepcopy(metric))

    @torch.no_grad()
    def add(self, clip: ClipPair) -> bool:
        """Scores one clip, and returns whether it counts.

        A user's error on the way is a failure of this clip.
        """
        before = self._states()
        try:
            self._check(clip)
            for name, measure in self.measures.items():
                with _naming(name):
                    measure.start(clip)
            num_frames = 0
            shown = np.linspace(0, self.protocol.num_frames - 1, NUM_THUMBNAILS).astype(int)
            small: list[Frames] = []
            for generated, truth in clip.pieces:
                inside = shown[(shown >= num_frames) & (shown < num_frames + len(generated))]
                small.append(thumbnails(generated[inside - num_frames], truth[inside - num_frames]))
                num_frames += len(generated)
                pair = [
                    self._fit(frames, what)
                    for frames, what in ((generated, "generated"), (truth, "true"))
                ]
                for name, measure in self.measures.items():
                    with _naming(name):
                        measure.push(*pair)
            if num_frames != self.protocol.num_frames:
                raise UserError(
                    f"expected {self.protocol.num_frames} frames, got {num_frames}: too short"
                )
            for name, measure in self.measures.items():
                with _naming(name):
                    measure.finish(clip)
        except UserError as error:
            self._restore(before)
            self.fail(clip.name, str(error))
            return False
        self.num_clips += 1
        self._clips.append({"clip": clip.name, **self._scores_since(before), **clip.facts})
        self._thumbnails[clip.name] = np.concatenate(small, axis=1)
        if len(self._thumbnails) > NUM_WORST:
            kept = [each["clip"] for each in worst_first(self._shown())[:NUM_WORST]]
            self._thumbnails = {name: self._thumbnails[name] for name in kept}
        return True

    def _shown(self) -> list[dict[str, Any]]:
        return [each for each in self._clips if each["clip"] in self._thumbnails]

    def worst(self) -> list[tuple[dict[str, Any], Frames]]:
        """Returns scores and thumbnails of the worst clips, the worst first, of all processes; call
        it on every process. An evaluation that was interrupted has those of its last part.
        """
        own = [(clip, self._thumbnails[clip["clip"]]) for clip in self._shown()]
        found = {clip["clip"]: (clip, small) for part in _gathered(own) for clip, small in part}
        order = worst_first([clip for clip, _ in found.values()])
        return [found[clip["clip"]] for clip in order[:NUM_WORST]]

    def clips(self) -> list[dict[str, Any]]:
        """Returns the scores of each clip that counts (``clip`` is its name, None a number that is
        not defined), of all processes; call it on every process. Frechet distances are those of
        all clips together: no clip has one.
        """
        return [clip for part in _gathered(self._clips) for clip in part]

    def fail(self, name: str, reason: str) -> None:
        """Records a clip that could not be scored."""
        self.failures.append({"clip": name, "reason": " ".join(reason.split())})

    def row(
        self,
        method: str,
        sampler: Mapping[str, Any] | None = None,
        speed: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> ResultRow:
        """Returns the row of all clips so far; call it on every process.

        Raises:
            UserError: fewer usable clips than the protocol or a metric needs.
        """
        failures = [failure for part in _gathered(self.failures) for failure in part]
        num_clips = sum(_gathered(self.num_clips))
        if num_clips < self.protocol.min_clips:
            first = f" ({failures[0]['clip']}: {failures[0]['reason']})" if failures else ""
            raise UserError(
                f"expected at least {self.protocol.min_clips} usable clips under "
                f"{self.protocol.name}, got {num_clips}"
                f"; {len(failures)} failed{first}: mend them or give more clips"
            )
        known = intervals(self.clips())
        sides: dict[str, dict[str, Any]] = {}
        for side in ("generated", "truth"):
            values: dict[str, Any] = {}
            for name, measure in self.measures.items():
                found = measure.compute(side)
                if taken := sorted(values.keys() & found.keys()):
                    raise UserError(f"{name}: expected a new name, got {taken[0]}: rename it")
                values |= found
            sides[side] = assemble(values)
        for key in sides["generated"].keys() ^ sides["truth"].keys():
            sides["generated"].setdefault(key, None)
            sides["truth"].setdefault(key, None)
        return ResultRow(
            protocol=self.protocol.name,
            protocol_version=self.protocol.version,
            method=method,
            measured=True,
            metrics=sides["generated"],
            ground_truth=sides["truth"],
            num_clips=num_clips,
            num_frames=self.protocol.num_frames,
            failures=failures,
            extractors={
                key: dict(row) for m in self.measures.values() for key, row in m.extractors.items()
            },
            sampler=dict(sampler or {}),
            speed=dict(speed or {}),
            hardware=hardware(),
            commit=commit(),
            config={
                "size_px": self.protocol.size_px,
                "fps": self.protocol.fps,
                "notes": self.notes(),
                "intervals_95": known,
                "protocol": asdict(self.protocol),
                "versions": versions(),
                **(config or {}),
            },
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def notes(self) -> list[str]:
        """What readers of the numbers must know; call it on every process."""
        notes = [*self.remarks]
        notes += [note for measure in self.measures.values() for note in measure.notes()]
        sizes = sorted({size for part in _gathered(sorted(self.resized)) for size in part})
        notes += [f"frames of {size} px were resized to {self.protocol.size_px}" for size in sizes]
        unknown = {
            row["name"]
            for m in self.measures.values()
            for row in m.extractors.values()
            if row.get("known") is False
        }
        return notes + [
            (f"the weights of {name} are none of the known files") for name in sorted(unknown)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`row` depends on."""
        metrics = {
            f"{name}.{side}": {"state": metric.state_dict(), "num_updates": metric._update_count}
            for name, measure in self.measures.items()
            for side, metric in measure.metrics.items()
        }
        return {
            "metrics": metrics,
            "failures": list(self.failures),
            "num_clips": self.num_clips,
            "resized": sorted(self.resized),
            "clips": list(self._clips),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        for name, measure in self.measures.items():
            for side, metric in measure.metrics.items():
                saved = state["metrics"][f"{name}.{side}"]
                metric.load_state_dict(saved["state"])
                metric._update_count = saved["num_updates"]
        self.failures, self.num_clips = list(state["failures"]), state["num_clips"]
        self.resized = set(state["resized"])
        self._clips = list(state.get("clips", []))

    def _check(self, clip: ClipPair) -> None:
        needed = self.protocol.num_frames * SAMPLES_PER_FRAME
        for what, samples in (("generated", clip.audio), ("true", clip.true_audio)):
            if len(samples) < needed - SAMPLES_PER_FRAME:
                seconds = (
                    f"{needed / 16_000:.2f} s of sound in the {what} clip, got "
                    f"{len(samples) / 16_000:.2f} s"
                )
                raise UserError(f"expected {seconds}: too short")
            if not np.isfinite(samples).all():
                raise UserError(
                    f"expected numbers as samples of the {what} clip, got NaN or "
                    "infinity: export it again"
                )
        clip.audio, clip.true_audio = clip.audio[:needed], clip.true_audio[:needed]

    def _fit(self, frames: Frames, what: str) -> Frames:
        """Frames at the protocol's size."""
        height, width = frames.shape[1:3]
        size = self.protocol.size_px
        if (height, width) == (size, size):
            return frames
        if height != width:
            raise UserError(
                f"expected square frames, got {width}x{height} in the {what} clip: crop it"
            )
        self.resized.add(width)
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
        fitted = functional.interpolate(
            pixels, (size, size), mode="bilinear", antialias=True, align_corners=False
        )
        return fitted.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

    def _states(self) -> list[tuple[Any, int, dict[str, Any]]]:
        metrics = [
            metric for measure in self.measures.values() for metric in measure.metrics.values()
        ]
        return [
            (
                m,
                m._update_count,
                {k: v.clone() for k, v in m.metric_state.items() if isinstance(v, torch.Tensor)},
            )
            for m in metrics
        ]

    def _scores_since(self, before: list[tuple[Any, int, dict[str, Any]]]) -> dict[str, Any]:
        """What the one clip since then added to the means."""
        earlier = {id(metric): state for metric, _, state in before}
        scores: dict[str, Any] = {}
        for measure in self.measures.values():
            metric = measure.metrics["generated"]
            if not isinstance(metric, MeanMetric):
                continue
            state = earlier[id(metric)]
            added = (metric.total - state["total"]).tolist()
            is_defined = (metric.num_defined - state["num_defined"]).tolist()
            for name, value, defined in zip(metric.names, added, is_defined, strict=True):
                if CURVE not in name:
                    scores[name] = round(value, DECIMALS) if defined else None
        return scores

    @staticmethod
    def _restore(states: list[tuple[Any, int, dict[str, Any]]]) -> None:
        """Take back what a clip that failed half-way has left: it counts in all metrics or in
        none.
        """
        for metric, num_updates, values in states:
            metric._update_count = num_updates
            for name, value in values.items():
                setattr(metric, name, value)


@contextmanager
def _naming(measure: str) -> Iterator[None]:
    """Puts the measure's name in front of a mistake."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{measure}: {error}") from None


def _gathered(value: Any) -> list[Any]:
    """The value of every process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
