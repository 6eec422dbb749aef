"""What the embedded extractors must do, measured on clips that they have not seen; and the card that tells it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.data.layout import ManifestRow, clip_path, read_sidecar
from rest_lightning.metrics import degrade
from rest_lightning.metrics.extractors import (
    EXPRESSION,
    FACTORS,
    IMAGE_PX,
    VIDEO_WINDOW,
    EmbeddedImage,
    load_embedded,
    resized,
)
from rest_lightning.metrics.frechet import FID, FVD
from rest_lightning.metrics.lips import pearson
from rest_lightning.metrics.sync import sync_of_clip

# Growing damage; the first is the weakest. Frame drop and shuffle are shares, wrong identity is a share of clips.
SEVERITIES = {
    "blur_px": (0.5, 1.0, 2.0, 4.0),
    "noise": (4.0, 10.0, 25.0, 50.0),
    "frame_drop": (0.1, 0.3, 0.6, 0.9),
    "frame_shuffle": (0.1, 0.3, 0.6, 1.0),
    "wrong_identity": (0.1, 0.3, 0.6, 1.0),
}
# A set of frames has no order, so FID cannot see these; it is shown for them and not judged.
ORDER_ONLY = ("frame_drop", "frame_shuffle")
MIN_SHARE_WITHIN_1 = 0.9
MAX_SHIFT_FRAMES = 10
READABLE = 0.5  # correlation of a curve with its truth
_FID_EVERY = 6  # frames

Clip = tuple[Tensor, np.ndarray]


def read_held_out(data: Path, rows: list[ManifestRow]) -> list[Clip]:
    """Frames, uint8 (n, H, W, 3), and audio of clips."""
    from rest_lightning.media.video import read_clip_audio, read_frames

    clips = []
    for row in rows:
        path = clip_path(data, row.clip_id)
        clips.append((torch.from_numpy(read_frames(path)), read_clip_audio(path, row.num_frames)))
    return clips


def sync_accuracy(folder: Path, clips: list[Clip], seed: int = 0) -> dict[str, Any]:
    """Offsets found for clips as they are and for clips shifted by up to 10 frames."""
    extractor = load_embedded("sync", folder)
    rng = np.random.default_rng(seed)
    errors: dict[str, list[int]] = {"as_rendered": [], "shifted": []}
    confidences = []
    for frames, audio in clips:
        sync = sync_of_clip(frames, audio, extractor)
        errors["as_rendered"].append(abs(sync.offset_frames))
        confidences.append(sync.confidence)
        shift = int(rng.integers(-MAX_SHIFT_FRAMES, MAX_SHIFT_FRAMES + 1))
        late, speech = shifted(frames, audio, shift)
        errors["shifted"].append(abs(sync_of_clip(late, speech, extractor).offset_frames - shift))
    shares = {key: round(float(np.mean(np.array(values) <= 1)), 4) for key, values in errors.items()}
    exact = {key: round(float(np.mean(np.array(values) == 0)), 4) for key, values in errors.items()}
    accepted = min(shares.values()) >= MIN_SHARE_WITHIN_1
    confidence = round(float(np.mean(confidences)), 4)
    num = len(clips)
    return {"num_clips": num, "within_1_frame": shares, "exact": exact, "sync_c": confidence, "accepted": accepted}


def shifted(frames: Tensor, audio: np.ndarray, shift: int) -> Clip:
    """The clip with its lips ``shift`` frames late, 10 frames shorter or as many as the shift has."""
    reach = max(MAX_SHIFT_FRAMES, abs(shift))
    count = len(frames) - reach
    first_frame, first_sound = max(-shift, 0), max(shift, 0)
    start = first_sound * SAMPLES_PER_FRAME
    return frames[first_frame : first_frame + count], audio[start : start + count * SAMPLES_PER_FRAME]


def image_accuracy(folder: Path, data: Path, rows: list[ManifestRow], clips: list[Clip]) -> dict[str, Any]:
    """Correlation of every curve with the renderer's, and how often the nearest identity is the right one."""
    from rest_lightning.commands.extractor_data import factors_of

    image = EmbeddedImage.from_pretrained(folder / "image")
    guesses, truths, identities = [], [], []
    for row, (frames, _) in zip(rows, clips, strict=True):
        chosen = torch.arange(0, len(frames), 4)
        with torch.inference_mode():
            _, curves, identity = image(resized(frames[chosen], IMAGE_PX))
        guesses.append(curves.numpy())
        truths.append(factors_of(read_sidecar(data, row.clip_id))[chosen.numpy()])
        identities.append(identity[[0, -1]])
    guess, truth = np.concatenate(guesses), np.concatenate(truths)
    first, last = torch.stack(identities, dim=1)
    right = (first @ last.T).argmax(dim=1) == torch.arange(len(first))
    return {
        "num_clips": len(rows),
        "correlation": {name: round(pearson(guess[:, i], truth[:, i]), 4) for i, name in enumerate(FACTORS)},
        "identity_found": round(float(right.float().mean()), 4),
    }


def frechet_answers(folder: Path, clips: list[Clip], others: list[Clip], seed: int = 0) -> dict[str, Any]:
    """FID and FVD of damaged clips against the clips: they must grow with the damage.

    Args:
        folder: of the networks.
        clips: the truth.
        others: where wrong identities come from.
        seed: of the damage.
    """
    fid, fvd = FID(load_embedded("fid", folder)), FVD(load_embedded("fvd", folder))
    half = len(clips) // 2
    result: dict[str, Any] = {"num_clips": len(clips), "damage": {}}
    for frames, _ in clips:
        fid.update(frames[::_FID_EVERY], real=True)
        fvd.update(frames, real=True)
    accepted = True
    for kind, amounts in SEVERITIES.items():
        rows = []
        for amount in amounts:
            fid_of, fvd_of = _against(fid, fvd, damaged_clips(kind, amount, clips, others, seed))
            rows.append({"amount": amount, "fid": round(fid_of, 6), "fvd": round(fvd_of, 6)})
        grows = {key: all(a[key] < b[key] for a, b in pairwise(rows)) and rows[0][key] > 0 for key in ("fid", "fvd")}
        result["damage"][kind] = {"rows": rows, "grows": grows}
        accepted &= grows["fvd"] and (grows["fid"] or kind in ORDER_ONLY)
    for metric in (fid, fvd):
        metric.reset()
    for i, (frames, _) in enumerate(clips):
        fid.update(frames[::_FID_EVERY], real=i < half)
        fvd.update(frames, real=i < half)
    floor = {**fid.compute(), **fvd.compute()}
    result["half_against_half"] = {key: round(float(value), 6) for key, value in floor.items()}
    return {**result, "accepted": accepted}


def _against(fid: FID, fvd: FVD, clips: Iterator[Tensor]) -> tuple[float, float]:
    for metric in (fid, fvd):
        for name in ("num_generated", "sum_generated", "outer_generated"):
            getattr(metric, name).zero_()
    for frames in clips:
        fid.update(frames[::_FID_EVERY], real=False)
        fvd.update(frames, real=False)
    return float(fid.compute()["fid"]), float(fvd.compute()["fvd"])


def damaged_clips(kind: str, amount: float, clips: list[Clip], others: list[Clip], seed: int) -> Iterator[Tensor]:
    """The frames of every clip with one kind of damage."""
    if not others:
        raise ValueError("expected at least one clip of another identity, got none: give some")
    for i, (frames, _) in enumerate(clips):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        if kind == "wrong_identity":  # the first clips are the first to go: more damage holds all of the lesser
            wrong = i < round(amount * len(clips))
            yield others[i % min(3, len(others))][0][: len(frames)] if wrong else frames
        else:
            yield _DAMAGES[kind](frames, amount, generator)


def _dropped(frames: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    return frames[degrade.dropped(len(frames), amount, generator)]


def _shuffled(frames: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    return torch.cat([part[degrade.shuffled(len(part), amount, generator)] for part in frames.split(VIDEO_WINDOW)])


def _blurred(frames: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    return degrade.blur(frames, amount)


_DAMAGES: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "blur_px": _blurred,
    "noise": degrade.noise,
    "frame_drop": _dropped,
    "frame_shuffle": _shuffled,
}


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """``card.json``, and ``card.md`` for readers."""
    from rest_lightning.media.files import whole_file

    with whole_file(folder / "card.json") as temporary:
        temporary.write_text(json.dumps(card, indent=2) + "\n")
    with whole_file(folder / "card.md") as temporary:
        temporary.write_text(markdown(card))


def markdown(card: dict[str, Any]) -> str:
    """The card as a page."""
    networks, held_out = card["networks"], card["held_out"]
    lines = [
        "# Embedded extractors",
        "",
        "Small networks behind FID, FVD, E-FID, identity similarity and Sync-C / Sync-D, without published weights.",
        "They know synthetic talkers and nothing else; their numbers never stand beside those of published weights.",
        "",
        f"Trained on {card['data']['num_train_clips']} synthetic clips by `{card['command']}`.",
        "",
        "| network | parameters | loss | steps | last loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, net in networks.items():
        lines.append(f"| {name} | {net['num_parameters']} | {net['loss']} | {net['num_steps']} | {net['final_loss']} |")
    sync, image, answers = held_out["sync"], held_out["image"], held_out["frechet"]
    correlations = ", ".join(f"{name} {value}" for name, value in image["correlation"].items())
    unread = [name for name in EXPRESSION if not image["correlation"][name] >= READABLE]
    lines += [
        "",
        f"On {sync['num_clips']} clips of unseen people and sentences:",
        "",
        f"* offset within 1 frame: {_shares(sync['within_1_frame'])}; exact: {_shares(sync['exact'])} "
        f"({_verdict(sync['accepted'])}, 90 % wanted of both)",
        f"* correlation of the curves: {correlations}",
        *([f"* E-FID is blind to how these move (below {READABLE}): {', '.join(unread)}"] if unread else []),
        f"* identity found among {image['num_clips']}: {image['identity_found']:.1%}",
        "",
        f"FID and FVD of {answers['num_clips']} damaged clips against themselves ({_verdict(answers['accepted'])}); "
        "a set of frames has no order, so FID is not judged by lost and shuffled frames. "
        f"Half of the clips against the other half: {answers['half_against_half']}.",
        "",
        "| damage | amount | FID | FVD |",
        "| --- | --- | --- | --- |",
    ]
    for kind, each in answers["damage"].items():
        lines += [f"| {kind} | {row['amount']} | {row['fid']:.4f} | {row['fvd']:.4f} |" for row in each["rows"]]
    return "\n".join(lines) + "\n"


def _shares(values: dict[str, float]) -> str:
    return ", ".join(f"{value:.1%} {key.replace('_', ' ')}" for key, value in values.items())


def _verdict(accepted: bool) -> str:
    return "accepted" if accepted else "NOT accepted"
