"""How good is a model? Streams unseen synthetic talkers, and real recordings, and measures what
comes out.

``python -m benchmarks.quality --model tests/assets/drawn --out benchmarks/results/quality.json``

Every video is streamed through :meth:`TalkingHead.open`, as a user would, and compared with what
the renderer knows. The same numbers of the true renders and of the VAE's reconstructions stand
beside. README.md explains every number.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._models import DRAWN_FOLDER
from benchmarks._result import origin, write_result
from benchmarks._targets import target_lines, target_row
from rest_lightning.constants import FPS, SAMPLE_RATE
from rest_lightning.data.synthetic.synthesize import SyntheticClip, synthesize_clip
from rest_lightning.errors import UserError, exit_code
from rest_lightning.media.audio import open_speech
from rest_lightning.media.files import whole_file
from rest_lightning.media.portrait import read_portrait
from rest_lightning.metrics.image import box_mask, video_psnr_db
from rest_lightning.metrics.lips import pearson, summary
from rest_lightning.metrics.mouth import extractor
from rest_lightning.metrics.video import VideoScores
from rest_lightning.talking_head import TalkingHead

PROTOCOL, PROTOCOL_VERSION = "synthetic-talkers", 1
DRAWN_PORTRAIT = DRAWN_FOLDER / "portraits" / "portrait.png"
IMAGES, SOUNDS = (".png", ".jpg", ".jpeg", ".webp"), (".wav", ".mp3", ".flac", ".m4a", ".ogg")
SHEET_COLUMNS = 9
Frames = NDArray[np.uint8]
Scores = dict[str, float]


@dataclass
class Sampler:
    """One way to sample the model, and what it gave: numbers and background drift of every second,
    per talker.
    """

    num_steps: int
    guidance: float
    rows: list[Scores] = field(default_factory=list)
    curves: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    num_frames: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """Steps and guidance, for :meth:`TalkingHead.open` and for JSON."""
        return {"num_steps": self.num_steps, "guidance": self.guidance}

    def stream(
        self, model: TalkingHead, portrait: Frames, speech: NDArray[np.float32], seed: int
    ) -> Iterator[Frames]:
        """Frames as the session emits them, fed with blocks of 0.25 s."""
        block = SAMPLE_RATE // 4
        started_s = time.perf_counter()
        with model.open(portrait, seed=seed, **self.settings) as session:
            for frames in session.stream(
                speech[i : i + block] for i in range(0, len(speech), block)
            ):
                self.seconds += time.perf_counter() - started_s
                self.num_frames += len(frames)
                yield frames
                started_s = time.perf_counter()  # measuring the frames is not the stream's time

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        length = min((len(curve) for curve in self.curves), default=0)
        mean_curve = np.mean([curve[:length] for curve in self.curves], axis=0) if length else []
        return {
            "sampler": self.settings,
            "metrics": summarise(self.rows),
            "speed": {
                "frames_per_second": round(self.num_frames / self.seconds, 1)
                if self.seconds
                else None
            },
            "background_drift_by_second": [round(float(value), 3) for value in mean_curve],
        }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        type=Path,
        default=DRAWN_FOLDER,
        help="model folder (default: that of drawn faces)",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    parser.add_argument(
        "--num-talkers", type=int, default=24, help=("unseen identities; 0: only --real")
    )
    parser.add_argument("--seconds", type=float, default=28.0, help="of video for each")
    parser.add_argument(
        "--seed", type=int, default=1000, help=("of the talkers: one that no training used")
    )
    parser.add_argument("--noise-seed", type=int, default=0, help="of the sampler's noise")
    parser.add_argument("--guidance", type=float, nargs="+", help="to sweep (default: the model's)")
    parser.add_argument("--steps", type=int, nargs="+", help="to sweep (default: the model's)")
    parser.add_argument(
        "--no-mismatched", action="store_true", help=("leave out the control with another's speech")
    )
    parser.add_argument("--real", type=Path, help="folder with real speech, and portraits if any")
    parser.add_argument(
        "--portrait",
        type=Path,
        action="append",
        default=[],
        help=("one more for --real; repeatable"),
    )
    parser.add_argument("--sheet", type=Path, help="also draw a contact sheet (PNG)")
    parser.add_argument("--sheet-talkers", type=int, default=6, help="talkers on the sheet")
    parser.add_argument("--threads", type=int, help="of torch (default: its choice)")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Measure, write after every talker, print a table. Exit code 1 when a clip failed."""
    if args.threads:
        torch.set_num_threads(args.threads)
    for path in (args.out, args.sheet):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    model = TalkingHead.from_pretrained(args.model, device=args.device)
    defaults = model.sampling
    pairs = product(args.steps or [defaults.num_steps], args.guidance or [defaults.guidance])
    samplers = [Sampler(steps, guidance) for steps, guidance in pairs]
    benchmark = Benchmark(model, samplers, args)
    for number in range(args.num_talkers):
        benchmark.attempt(f"talker {number}", lambda number=number: benchmark.talker(number))
        benchmark.write()
    if args.real is not None:
        for speech, portrait in real_pairs(args.real, args.portrait):
            name = f"{portrait.name} + {speech.name}"
            benchmark.attempt(name, lambda s=speech, p=portrait: benchmark.recording(s, p))
            benchmark.write()
    benchmark.write()
    if args.sheet is not None and benchmark.pictures:
        draw_sheet(args.sheet, benchmark.pictures)
    benchmark.print()
    return 1 if benchmark.failures else 0


class Benchmark:
    """What was measured so far; holds one clip at a time."""

    def __init__(
        self, model: TalkingHead, samplers: list[Sampler], args: argparse.Namespace
    ) -> None:
        self.model, self.samplers, self.args = model, samplers, args
        self.truth: list[Scores] = []
        self.vae: list[Scores] = []
        self.real: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        self.pictures: list[tuple[str, list[Frames]]] = []
        self.other_speech: NDArray[np.float32] | None = None
        self.num_frames = round(args.seconds * FPS)
        self.chunk_frames = 8 * int(model.transformer.cache_options.chunk_length)

    def attempt(self, name: str, measure: Any) -> None:
        """Run one measurement; what fails is named, never skipped in silence."""
        started_s = time.perf_counter()
        try:
            measure()
            print(f"{name}: {time.perf_counter() - started_s:.1f} s", flush=True)
        except Exception as error:
            self.failures.append({"clip": name, "reason": f"{type(error).__name__}: {error}"})
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)

    def clip(self, number: int) -> SyntheticClip:
        """Talker ``number``: an identity and words that no training saw."""
        return synthesize_clip(number, self.args.seed, "test", self.model.size_px, self.num_frames)

    def talker(self, number: int) -> None:
        """Truth, reconstruction and streamed videos of one talker."""
        clip = self.clip(number)
        if self.other_speech is None and not self.args.no_mismatched:
            self.other_speech = self.clip(self.args.num_talkers).audio
        opening, mouth = (
            np.asarray(clip.sidecar.mouth_opening),
            np.asarray((clip.sidecar.landmarks or {})["mouth"]),
        )
        shown = sheet_frames(opening)
        truth = VideoScores(first_frame=0)
        truth.update(clip.frames)
        truth_row = truth.compute(clip.audio, opening)

        rebuilt = self.reconstruct(clip.frames)
        count = len(rebuilt)
        vae = VideoScores(first_frame=0, chunk_frames=self.chunk_frames)
        vae.update(rebuilt)
        vae_row = vae.compute(clip.audio, opening)
        vae_row["psnr_db"] = video_psnr_db(rebuilt, clip.frames[:count])
        at_mouth = box_mask(mouth[:count], rebuilt.shape[1:3])
        vae_row["mouth_psnr_db"] = video_psnr_db(rebuilt, clip.frames[:count], at_mouth)
        strips = [clip.frames[shown], rebuilt[np.minimum(shown, count - 1)]]
        rows = []
        for i, sampler in enumerate(self.samplers):
            scores, pictures = self.generate(sampler, clip, clip.audio, shown)
            row = scores.compute(clip.audio, opening)
            if i == 0 and self.other_speech is not None:
                other, _ = self.generate(sampler, clip, self.other_speech, shown)
                row["lip_correlation_mismatched"] = pearson(other.opening, opening)
            rows.append(row)
            sampler.curves.append(scores.background_by_second)
            if i == 0:
                strips.append(pictures)
        # Kept together: a talker that fails half-way counts nowhere.
        self.truth.append(truth_row)
        self.vae.append(vae_row)
        for sampler, row in zip(self.samplers, rows, strict=True):
            sampler.rows.append(row)
        self.other_speech = clip.audio
        if len(self.pictures) < self.args.sheet_talkers:
            label = (
                f"talker {number}   lip correlation {rows[0]['lip_correlation']:.2f}   rows: "
                "truth, VAE, streamed"
            )
            self.pictures.append((label, strips))

    def generate(
        self,
        sampler: Sampler,
        clip: SyntheticClip,
        speech: NDArray[np.float32],
        shown: NDArray[np.int64],
    ) -> tuple[VideoScores, Frames]:
        """Stream one video; keeps its numbers and the frames for the sheet."""
        scores, kept, position = VideoScores(chunk_frames=self.chunk_frames), [], 0
        for frames in sampler.stream(self.model, clip.frames[0], speech, self.args.noise_seed):
            scores.update(frames)
            kept += [
                frames[i - position].copy() for i in shown if position <= i < position + len(frames)
            ]
            position += len(frames)
        return scores, np.stack(kept)

    def recording(self, speech_file: Path, portrait_file: Path) -> None:
        """Real speech over a portrait, of which no truth is known."""
        speech = open_speech(speech_file).read_all()
        portrait = read_portrait(portrait_file, self.model.size_px)
        for sampler in self.samplers:
            scores = VideoScores(chunk_frames=self.chunk_frames)
            every = max(1, -(-len(speech) // (SAMPLE_RATE // FPS)) // (SHEET_COLUMNS - 1))
            pictures, position = [portrait], 0
            for frames in Sampler(**sampler.settings).stream(
                self.model, portrait, speech, self.args.noise_seed
            ):
                scores.update(frames)
                pictures += [
                    f.copy() for i, f in enumerate(frames, position) if i % every == every // 2
                ]
                position += len(frames)
            row = scores.compute(speech)
            self.real.append(
                {
                    "speech": speech_file.name,
                    "portrait": portrait_file.name,
                    "seconds": round(len(speech) / SAMPLE_RATE, 2),
                    "sampler": sampler.settings,
                    "metrics": {key: rounded(value) for key, value in row.items()},
                    "background_drift_by_second": [
                        round(value, 3) for value in scores.background_by_second
                    ],
                }
            )
            label = f"{portrait_file.name} + {speech_file.name}   guidance {sampler.guidance:g}"
            self.pictures.append((label, [np.stack(pictures[:SHEET_COLUMNS])]))

    @torch.inference_mode()
    def reconstruct(self, frames: Frames) -> Frames:
        """The VAE's reconstruction of the first 8n + 1 frames, decoded as a stream: chunk by
        chunk.
        """
        vae, step = self.model.vae, self.chunk_frames // 8
        video = torch.from_numpy(frames[: (len(frames) - 1) // 8 * 8 + 1]).permute(3, 0, 1, 2)[None]
        latents = vae.encode(video.to(self.model.device, self.model.dtype) / 127.5 - 1.0)
        first, stream = vae.start_decode(latents[:, :, :1])
        chunks = [
            first,
            *(vae.decode_chunk(part, stream) for part in latents[:, :, 1:].split(step, dim=2)),
        ]
        pieces = [
            ((x[0].float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
            for x in chunks
        ]
        return torch.cat(pieces, dim=1).permute(1, 2, 3, 0).numpy()

    def result(self) -> dict[str, Any]:
        """Everything as JSON: the keys of a result row, one entry of ``runs`` per sampler."""
        runs = [sampler.to_dict() for sampler in self.samplers]
        result: dict[str, Any] = {
            "protocol": PROTOCOL,
            "protocol_version": PROTOCOL_VERSION,
            "method": self.args.model.name,
            "measured": True,
            "num_clips": len(self.truth),
            "num_frames": self.num_frames,
            "size_px": self.model.size_px,
            "fps": FPS,
            "metrics": runs[0]["metrics"],
            "ground_truth": summarise(self.truth),
            "vae": summarise(self.vae),
            "runs": runs,
            "real": self.real,
            "failures": self.failures,
            "extractors": {"mouth_opening": extractor()},
            **origin(self.args),
            "seeds": {"talkers": self.args.seed, "noise": self.args.noise_seed},
        }
        result["targets"] = targets(result)
        return result

    def write(self) -> None:
        """The JSON so far, whole."""
        write_result(self.args.out, self.result())

    def print(self) -> None:
        """The same for people."""
        result = self.result()
        print(
            f"\n{'':30}{'truth':>18}{'VAE':>18}{'streamed':>18}   (mean and sd of "
            f"{result['num_clips']})"
        )
        for name in dict.fromkeys([*result["metrics"], *result["vae"]]):
            cells = [result[column].get(name) for column in ("ground_truth", "vae", "metrics")]
            print(f"{name:30}" + "".join(f"{_cell(cell):>18}" for cell in cells))
        for row in result["real"]:
            print(
                f"\n{row['portrait']} + {row['speech']}: "
                + ", ".join(f"{k} {v}" for k, v in row["metrics"].items())
            )
        print("\n".join(["", *target_lines(result["targets"])]))
        print(f"wrote {self.args.out}")


def summarise(rows: list[Scores]) -> dict[str, Any]:
    """Summary of every number over all rows; a number that a row lacks is left out."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: summary(row[name] for row in rows if name in row) for name in names}


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the model of drawn faces should reach, and whether it does."""

    def mean(row: str, name: str) -> float:
        value = result[row].get(name, {}).get("mean")
        return math.nan if value is None else float(value)

    seam = mean("metrics", "jump_ratio_chunk") / (mean("vae", "jump_ratio_chunk") or math.nan)
    rules = [
        ("lip correlation", mean("metrics", "lip_correlation"), ">=", 0.70),
        (
            ("lip correlation, mismatched speech"),
            mean("metrics", "lip_correlation_mismatched"),
            "<=",
            0.15,
        ),
        ("VAE PSNR, dB", mean("vae", "psnr_db"), ">=", 29.5),
        ("VAE mouth PSNR, dB", mean("vae", "mouth_psnr_db"), ">=", 26.5),
        ("chunk borders, streamed over VAE", seam, "<=", 1.15),
        ("VAE jump ratio, latent borders", mean("vae", "jump_ratio_latent"), "<=", 1.8),
        ("VAE jump ratio, chunk borders", mean("vae", "jump_ratio_chunk"), "<=", 1.8),
        ("background drift, of 255", mean("metrics", "background_drift"), "<=", 2.0),
    ]
    real = [row["metrics"]["loudness_rank_correlation"] for row in result["real"]]
    if real:
        worst = min(math.nan if value is None else value for value in real)
        rules.append(("real speech, rank correlation with loudness (worst)", worst, ">=", 0.3))
    known = [rule for rule in rules if not math.isnan(rule[1])]
    return [target_row(what, rounded(value), sign, limit) for what, value, sign, limit in known]


def real_pairs(folder: Path, portraits: list[Path]) -> list[tuple[Path, Path]]:
    """Every speech file of a folder with every portrait: a drawn one, the folder's images, the
    given ones.
    """
    if not folder.is_dir():
        raise UserError(
            f"expected a folder with speech for --real, got {folder}: give one that "
            "holds a wav file"
        )
    files = sorted(folder.iterdir())
    sounds = [path for path in files if path.suffix.lower() in SOUNDS]
    images = [path for path in files if path.suffix.lower() in IMAGES]
    if not sounds:
        raise UserError(
            f"expected speech in --real {folder}, got none: put a file of {', '.join(SOUNDS)} there"
        )
    return list(product(sounds, [DRAWN_PORTRAIT, *images, *portraits]))


def sheet_frames(opening: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Frame numbers for a strip, evenly spread: the widest and the most closed mouth of windows in
    turn.
    """
    windows = np.array_split(np.arange(len(opening)), SHEET_COLUMNS)
    pick = (np.argmin, np.argmax)
    return np.array(
        [window[pick[i % 2](opening[window])] for i, window in enumerate(windows) if len(window)]
    )


def draw_sheet(path: Path, pictures: list[tuple[str, list[Frames]]]) -> None:
    """Strips of frames under their labels, as PNG."""
    from PIL import Image, ImageDraw, ImageFont

    side, line = pictures[0][1][0].shape[1], 22
    size = (side * SHEET_COLUMNS, sum(line + side * len(strips) for _, strips in pictures))
    sheet = Image.new("RGB", size, "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for label, strips in pictures:
        draw.text((4, y + 3), label, fill="black", font=ImageFont.load_default(14))
        y += line
        for strip in strips:
            for i, frame in enumerate(strip):
                sheet.paste(Image.fromarray(frame), (i * side, y))
            y += side
    with whole_file(path) as temporary:
        sheet.save(temporary)


def rounded(value: float) -> float | None:
    """Four decimals; None for NaN, which JSON does not know."""
    return None if math.isnan(value) else round(value, 4)


def _cell(cell: dict[str, Any] | None) -> str:
    return "-" if not cell or cell["mean"] is None else f"{cell['mean']:.3f} ± {cell['sd']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
