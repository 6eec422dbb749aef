"""One measure of a protocol each: takes a clip in pieces, for the generated frames and for the true
ones alike.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rest_lightning.constants import FPS
from rest_lightning.evaluation.faces import FaceFinder
from rest_lightning.evaluation.protocol import Protocol
from rest_lightning.metrics.extractors import FeatureExtractor, load_extractor
from rest_lightning.metrics.frechet import FrechetDistance
from rest_lightning.metrics.identity import identities
from rest_lightning.metrics.mouth import extractor as mouth_extractor
from rest_lightning.metrics.sums import MeanMetric, RowMetric, check_clip
from rest_lightning.metrics.sync import SyncScore
from rest_lightning.metrics.syncnet import face_crops
from rest_lightning.metrics.video import KEYS as TALKING_KEYS
from rest_lightning.metrics.video import VideoScores, row_scores
from rest_lightning.torchvision_compat import ensure_torchvision

ensure_torchvision()  # torchmetrics imports torchvision

from torchmetrics import Metric  # noqa: E402  the line above must come first

Frames = NDArray[np.uint8]
Load = Callable[[str, str], FeatureExtractor]
CURVE = "/"  # background_drift_by_second/3 is the value of the fourth second
SECONDS_PER_MINUTE = 60


class Measure:
    """Base class of measures. A clip is ``start``, any number of ``push``, then ``finish``.

    When a clip fails half-way, the caller restores the states.

    Attributes:
        metrics: the metric of the generated clips and that of the true ones.
    """

    def __init__(
        self, generated: RowMetric, truth: RowMetric, extractors: Mapping[str, Any]
    ) -> None:
        self.metrics = {"generated": generated, "truth": truth}
        self.extractors = extractors

    def start(self, clip: Any) -> None:
        """Begins a clip."""

    def push(self, generated: Frames, truth: Frames) -> None:
        """Takes in the next frames of both, uint8 (n, H, W, 3)."""
        raise NotImplementedError

    def finish(self, clip: Any) -> None:
        """Ends a clip."""

    def compute(self, side: str) -> dict[str, Tensor]:
        """Returns the numbers of the ``generated`` or the ``truth`` clips by their key in a row."""
        return dict(self.metrics[side].compute())

    def notes(self) -> list[str]:
        """Returns what readers must know, of the clips of all processes.

        Call it on every process.
        """
        # `compute` has given the states back to their processes
        with self.metrics["generated"].sync_context():
            return self.metrics["generated"].notes()


class Frechet(Measure):
    """FID, FVD and E-FID; the true clips against themselves are the ground truth: 0, through the
    same code.
    """

    def __init__(self, key: str, extractor: FeatureExtractor, whole: bool) -> None:
        num = extractor.num_features
        super().__init__(
            FrechetDistance(num, key, extractor), FrechetDistance(num, key), {key: extractor.row()}
        )
        self.extractor, self.whole = extractor, whole
        self.waiting: list[tuple[Frames, Frames]] = []

    def start(self, clip: Any) -> None:
        """See :class:`Measure`."""
        self.waiting.clear()

    def push(self, generated: Frames, truth: Frames) -> None:
        """See :class:`Measure`; what looks at whole clips waits for the end."""
        if self.whole:
            self.waiting.append((generated, truth))
        else:
            self._add(generated, truth)

    def finish(self, clip: Any) -> None:
        """See :class:`Measure`."""
        if self.whole:
            self._add(*(np.concatenate(pieces) for pieces in zip(*self.waiting, strict=True)))
            self.waiting.clear()

    def _add(self, generated: Frames, truth: Frames) -> None:
        device = self.metrics["generated"].device
        self.extractor.to(device)
        made, real = (
            self.extractor(check_clip(each, self.extractor.min_frames))
            for each in (generated, truth)
        )
        self.metrics["generated"].update(made, real=False)
        self.metrics["generated"].update(real, real=True)
        self.metrics["truth"].update(real, real=False)
        self.metrics["truth"].update(real, real=True)


class Identity(Measure):
    """Cosine of every frame's identity with that of the reference, averaged over frames, then over
    clips.
    """

    key = "identity_similarity"

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__(
            MeanMetric([self.key]), MeanMetric([self.key]), {self.key: extractor.row()}
        )
        self.extractor = extractor
        self.cosines: dict[str, list[float]] = {}

    def start(self, clip: Any) -> None:
        """See :class:`Measure`."""
        self.extractor.to(self.metrics["generated"].device)
        self.reference = identities(clip.reference[None], self.extractor)
        self.cosines = {"generated": [], "truth": []}

    def push(self, generated: Frames, truth: Frames) -> None:
        """See :class:`Measure`."""
        for side, frames in (("generated", generated), ("truth", truth)):
            found = identities(frames, self.extractor)
            self.cosines[side] += functional.cosine_similarity(found, self.reference).tolist()

    def finish(self, clip: Any) -> None:
        """See :class:`Measure`."""
        for side, values in self.cosines.items():
            self.metrics[side].update({self.key: float(np.mean(values))})


class Sync(Measure):
    """Sync-C, Sync-D and the offset, each clip against its own sound."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__(SyncScore(extractor), SyncScore(extractor), {"sync_c": extractor.row()})
        self.waiting: list[tuple[Frames, Frames]] = []

    def start(self, clip: Any) -> None:
        """See :class:`Measure`."""
        self.waiting.clear()

    def push(self, generated: Frames, truth: Frames) -> None:
        """See :class:`Measure`."""
        self.waiting.append((generated, truth))

    def finish(self, clip: Any) -> None:
        """See :class:`Measure`."""
        videos = [np.concatenate(pieces) for pieces in zip(*self.waiting, strict=True)]
        self.waiting.clear()
        sounds = (clip.audio, clip.true_audio)
        for side, frames, sound in zip(("generated", "truth"), videos, sounds, strict=True):
            faces: FaceFinder | None = clip.faces
            crops = frames if faces is None else face_crops(frames, faces.boxes(frames))
            self.metrics[side].update(crops, sound)


class Talking(Measure):
    """What :class:`VideoScores` measures: seams, drift (its curves, too), sharpness, lips."""

    def __init__(self, num_frames: int, chunk_frames: int) -> None:
        self.chunk_frames = chunk_frames
        self.by_minute = num_frames >= 2 * SECONDS_PER_MINUTE * FPS
        names = [*TALKING_KEYS, *self._curve_names(num_frames)]
        super().__init__(
            MeanMetric(names), MeanMetric(names), {"lip_correlation": mouth_extractor()}
        )
        self.scores: dict[str, VideoScores] = {}

    def _curve_names(self, num_frames: int) -> Iterator[str]:
        step = FPS * (SECONDS_PER_MINUTE if self.by_minute else 1)
        count = num_frames // step + (num_frames % step >= step / 2)
        keys = (
            ("colour_drift_lab_by_minute", "sharpness_by_minute")
            if self.by_minute
            else ("background_drift_by_second",)
        )
        return (f"{key}{CURVE}{i}" for key in keys for i in range(count))

    def start(self, clip: Any) -> None:
        """See :class:`Measure`."""
        self.scores = {side: VideoScores(1, self.chunk_frames) for side in self.metrics}

    def push(self, generated: Frames, truth: Frames) -> None:
        """See :class:`Measure`."""
        self.scores["generated"].update(generated)
        self.scores["truth"].update(truth)

    def finish(self, clip: Any) -> None:
        """See :class:`Measure`."""
        for side, sound in (("generated", clip.audio), ("truth", clip.true_audio)):
            scores = self.scores[side]
            numbers = row_scores(scores, sound, clip.true_opening)
            if self.by_minute:
                minutes = scores.by_minute()
                curves = {
                    "colour_drift_lab_by_minute": minutes["colour_lab"],
                    "sharpness_by_minute": minutes["sharpness"],
                }
            else:
                curves = {"background_drift_by_second": scores.background_by_second}
            numbers |= {
                f"{key}{CURVE}{i}": v
                for key, values in curves.items()
                for i, v in enumerate(values)
            }
            self.metrics[side].update(numbers)

    def notes(self) -> list[str]:
        """Curves may end early; that says nothing of the numbers."""
        return [note for note in super().notes() if CURVE not in note]


class Own(Measure):
    """A metric of one's own: ``update`` takes the frames of a whole clip, uint8 (n, H, W, 3).

    Args:
        metric: of torchmetrics; of a single number the key is the name of its class.
    """

    def __init__(self, metric: Metric) -> None:
        super().__init__(metric, copy.deepcopy(metric), {})  # type: ignore[arg-type]
        self.pieces: dict[str, list[Frames]] = {}

    def start(self, clip: Any) -> None:
        """See :class:`Measure`."""
        self.pieces = {side: [] for side in self.metrics}

    def push(self, generated: Frames, truth: Frames) -> None:
        """See :class:`Measure`."""
        self.pieces["generated"].append(generated)
        self.pieces["truth"].append(truth)

    def finish(self, clip: Any) -> None:
        """See :class:`Measure`."""
        for side, pieces in self.pieces.items():
            self.metrics[side].update(torch.from_numpy(np.concatenate(pieces)))
        self.pieces.clear()

    def compute(self, side: str) -> dict[str, Tensor]:
        """See :class:`Measure`."""
        found = self.metrics[side].compute()
        return dict(found) if isinstance(found, Mapping) else {self.key: found}

    @property
    def key(self) -> str:
        """The key of a single number: ``MouthArea`` is ``mouth_area``."""
        name = type(self.metrics["generated"]).__name__
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()

    def notes(self) -> list[str]:
        """See :class:`Measure`."""
        return super().notes() if hasattr(self.metrics["generated"], "notes") else []


def make_measures(
    protocol: Protocol, chunk_frames: int, load: Load = load_extractor
) -> dict[str, Measure]:
    """Returns the measures of a protocol by name.

    Args:
        protocol: what to measure.
        chunk_frames: period of chunk borders, for the seam ratio.
        load: ``load_extractor``, or a function that takes its place.

    Raises:
        UserError: weights that are not there.
    """
    measures: dict[str, Measure] = {}
    for name in protocol.measures:
        if name == "talking":
            measures[name] = Talking(protocol.num_frames, chunk_frames)
            continue
        extractor = load(name, protocol.source_of(name))
        if name == "sync":
            measures[name] = Sync(extractor)
        elif name == "identity":
            measures[name] = Identity(extractor)
        else:
            measures[name] = Frechet(name, extractor, whole=name.startswith("fvd"))
    return measures


def assemble(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Scalars as floats, NaN as None; ``key/0``, ``key/1``, ... as one list, cut at its first
    NaN.
    """
    out: dict[str, Any] = {}
    ended: set[str] = set()
    for name, value in values.items():
        number = float(value) if bool(torch.as_tensor(value).isfinite()) else None
        key, _, place = name.partition(CURVE)
        if not place:
            out[key] = number
            continue
        curve = out.setdefault(key, [])
        if number is None or key in ended:
            ended.add(key)
        else:
            curve.append(number)
    return out
