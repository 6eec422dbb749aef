"""Portraits and speech to predict from: a list of pairs, and its speech as one stream of blocks."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from rest_lightning.errors import UserError, note
from rest_lightning.media.audio import SpeechSource, open_speech
from rest_lightning.media.portrait import find_portrait, parse_crop

BLOCK_SAMPLES = 16_000
_FORM = '{"portrait": "a.png", "speech": "a.wav", "name": "optional"}'


@dataclass
class PredictPair:
    """One video to make. Not frozen: Lightning rebuilds what travels in batches.

    Attributes:
        portrait: path of an image.
        speech: path of a speech file.
        name: stem of the output; ``<portrait>-<speech>`` unless given.
        crop: of the portrait: ``auto`` (the head that is found), ``centre``, ``x,y,size`` or
            ``x,y,width,height``.
    """

    portrait: str
    speech: str
    name: str = ""
    crop: str = "auto"

    def __post_init__(self) -> None:
        if not self.name:
            self.name = f"{Path(self.portrait).stem}-{Path(self.speech).stem}"
        if Path(self.name).name != self.name:
            raise UserError(
                f"expected a file name without folders as the name of a pair, got {self.name!r}: "
                "rename it"
            )
        self.crop = self.crop or "auto"  # an empty cell
        try:
            parse_crop(self.crop)
        except UserError as error:
            raise UserError(f"{error} for the pair {self.name}: correct its crop") from None


class SpeechBlock(TypedDict):
    """A batch of the predict loader: a piece of one pair's speech, or its end.

    ``pair``; ``samples`` float32 (n,), 16 kHz, empty at the end; ``is_first``; ``is_end``: no more
    speech of this pair.
    """

    pair: PredictPair
    samples: NDArray[np.float32]
    is_first: bool
    is_end: bool


def read_pairs(
    source: str | os.PathLike[str] | Sequence[PredictPair | dict[str, str]],
) -> list[PredictPair]:
    """The pairs of an inline list, or of a file: .json, .yaml (a list of objects), .csv with the
    columns portrait, speech and, where wanted, name and crop.

    Relative paths in a file are relative to the file.

    Raises:
        UserError: no such file or another form, a portrait or speech that is missing, two pairs of
            one name.
    """
    rows: list[Any]
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        rows = [_beside(path, row) for row in _read_rows(path)]
    else:
        rows = list(source)
    pairs = [row if isinstance(row, PredictPair) else _parse(row) for row in rows]
    if not pairs:
        raise UserError(f"expected at least one pair to predict from, got none: add {_FORM}")
    seen: set[str] = set()
    for pair in pairs:
        for what, file in (("portrait", pair.portrait), ("speech", pair.speech)):
            if not Path(file).is_file():
                raise UserError(
                    f"expected the {what} {file} of the pair {pair.name}, got no such file: check "
                    "the name"
                )
        if pair.name in seen:
            raise UserError(
                f"expected one name per pair, got {pair.name} twice: give the pairs names"
            )
        seen.add(pair.name)
    return pairs


class SpeechStream:
    """The speech of all pairs, one after another, in blocks; every pair closes with an empty block.

    It knows its length: Lightning fetches one batch ahead of a loader that does not, which would be
    a block of hidden latency.

    Args:
        pairs: what to make.
        block_samples: samples per block, at 16 kHz.

    Raises:
        UserError: not a single pair can be read. All are checked before the first block, and bad
            ones are left out.

    Attributes:
        pairs: what will be made.
        failed: what is left out, with the reason.
    """

    def __init__(self, pairs: Sequence[PredictPair], block_samples: int = BLOCK_SAMPLES) -> None:
        if block_samples < 1:
            raise UserError(
                f"expected block_samples of at least 1, got {block_samples}: 16000 are one second"
            )
        self.pairs = list(pairs)
        self.failed: list[tuple[PredictPair, str]] = []
        self._sources: list[SpeechSource] = []
        good: list[PredictPair] = []
        for pair in self.pairs:
            try:
                find_portrait(pair.portrait, parse_crop(pair.crop))
                self._sources.append(open_speech(pair.speech, block_samples=block_samples))
            except UserError as error:
                self.failed.append((pair, str(error)))
                note(f"{pair.name} is left out: {error}")
            else:
                good.append(pair)
        if self.pairs and not good:
            raise UserError(self.failed[0][1])
        self.pairs = good
        for source in self._sources:
            for line in source.notes:
                note(line)
        self._length = sum(_num_blocks(source) + 1 for source in self._sources)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[SpeechBlock]:
        for pair, source in zip(self.pairs, self._sources, strict=True):
            first = True
            for samples in source:
                yield SpeechBlock(pair=pair, samples=samples, is_first=first, is_end=False)
                first = False
            yield SpeechBlock(
                pair=pair, samples=np.zeros(0, np.float32), is_first=first, is_end=True
            )


def _num_blocks(source: SpeechSource) -> int:
    if source.num_samples is None:
        raise UserError(
            f"expected a speech file of known length, got {source.name}: use `rest talk` for pipes"
        )
    return -(-source.num_samples // source.block_samples)


def _read_rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel begins a file with a mark
        if path.suffix == ".csv":
            return _read_csv(path, text)
        if path.suffix == ".json":
            rows = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            rows = yaml.safe_load(text)
        else:
            raise UserError(
                f"expected a list of pairs in .json, .yaml or .csv, got {path}: convert it"
            )
    except FileNotFoundError:
        raise UserError(
            f"expected a list of pairs, got no such file: {path}; check data.predict_pairs"
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # JSON errors are ValueErrors
        raise UserError(
            f"expected to read pairs from {path}, got {str(error).splitlines()[0]}: repair it"
        ) from None
    except Exception as error:  # YAML's errors share no base with anything
        raise UserError(
            f"expected YAML in {path}, got {' '.join(str(error).split())}: repair it"
        ) from None
    if not isinstance(rows, list):
        raise UserError(
            f"expected a list of pairs in {path}, got {type(rows).__name__}: write [{_FORM}]"
        )
    return rows


def _read_csv(path: Path, text: str) -> list[dict[str, str]]:
    """Rows of a CSV with commas, or with the semicolons of Excel in many languages."""
    first = text.split("\n", 1)[0]
    comma = ";" if first.count(";") > first.count(",") else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=comma)
    names = [(name or "").strip().lower() for name in reader.fieldnames or []]
    if not {"portrait", "speech"} <= set(names):
        raise UserError(
            f"expected the columns portrait,speech[,name] in the first line of {path}, got "
            f"{first.strip()[:80]!r}: add that line"
        )
    reader.fieldnames = names
    return [{k: v for k, v in row.items() if v} for row in reader]


def _beside(path: Path, row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    moved = {key: str(path.parent / str(row[key])) for key in ("portrait", "speech") if key in row}
    return {**row, **moved}


def _parse(row: Any) -> PredictPair:
    known = [field.name for field in fields(PredictPair)]
    good = isinstance(row, dict) and {"portrait", "speech"} <= row.keys() and set(row) <= set(known)
    if not good or not all(isinstance(value, str) for value in row.values()):
        raise UserError(f"expected pairs of the form {_FORM}, got {row!r}")
    return PredictPair(**row)
