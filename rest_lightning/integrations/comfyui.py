"""Nodes of ComfyUI: load a talking head, and let a portrait speak.

`examples/comfyui` is the folder to copy or link into ComfyUI's ``custom_nodes``; it hands ComfyUI
what this module has. The values between nodes are ComfyUI's own: IMAGE is float (B, H, W, 3) in
[0, 1], AUDIO ``{"waveform": float (B, C, T) in [-1, 1], "sample_rate": Hz}``, VIDEO an object of
``comfy_api``. ComfyUI's modules are imported when a node runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from rest_lightning.avatar.speech import check_sound
from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.media.audio import resample
from rest_lightning.media.files import temporary_path
from rest_lightning.media.photo import PhotoFrames
from rest_lightning.media.portrait import find_portrait
from rest_lightning.media.writer import Mp4Writer
from rest_lightning.talking_head import ModelOptions

if TYPE_CHECKING:
    from rest_lightning.talking_head import TalkingHead

CATEGORY = "REST talking head"
MODEL = "REST_MODEL"  # ComfyUI's name of a type is any word
_MAX_SEED = 2**64 - 1


class LoadModel:
    """Node: a model folder becomes a model, kept until its inputs change."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Loads a model folder of rest_lightning; without a folder the bundled model."
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs, as ComfyUI asks for them."""
        folder = {"default": "", "tooltip": "empty: the bundled model"}
        return {
            "required": {
                "folder": ("STRING", folder),
                "device": (["auto", "cpu", "cuda"], {"default": "auto"}),
                "dtype": (["auto", "float32", "bfloat16"], {"default": "auto"}),
            }
        }

    def load(self, folder: str, device: str, dtype: str) -> tuple[TalkingHead]:
        """Returns the model.

        Raises:
            UserError: see :meth:`rest_lightning.talking_head.ModelOptions.load`.
        """
        path = Path(folder.strip()).expanduser() if folder.strip() else None
        return (ModelOptions(path, dtype=dtype, device=device).load(),)


class Talk:
    """Node: portrait and speech become frames and a video with sound."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Lets a portrait speak, at 25 frames a second."
    RETURN_TYPES = ("IMAGE", "VIDEO")
    RETURN_NAMES = ("images", "video")
    FUNCTION = "talk"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs, as ComfyUI asks for them."""
        steps = {"default": 0, "min": 0, "max": 100, "tooltip": "Euler steps; 0: the model's"}
        frame = "the square around the head, or the whole photo with it"
        return {
            "required": {
                "model": (MODEL,),
                "portrait": ("IMAGE",),
                "speech": ("AUDIO",),
                "seed": ("INT", {"default": 0, "min": 0, "max": _MAX_SEED}),
            },
            "optional": {
                "steps": ("INT", steps),
                "frame": (["head", "photo"], {"default": "head", "tooltip": frame}),
            },
        }

    def talk(
        self,
        model: TalkingHead,
        portrait: Tensor,
        speech: dict[str, Any],
        seed: int,
        steps: int = 0,
        frame: Literal["head", "photo"] = "head",
    ) -> tuple[Tensor, Any]:
        """Returns the frames, float (n, H, W, 3) in [0, 1], and the video: an mp4 in ComfyUI's
        folder of temporary files, with mono speech at 16 kHz and the mark of synthetic media.

        Args:
            model: from :class:`LoadModel`.
            portrait: IMAGE of one picture.
            speech: AUDIO of one sound; its channels are averaged.
            seed: of the noise.
            steps: Euler steps per chunk; 0 takes the model's.
            frame: what is shown.

        Raises:
            UserError: several pictures or sounds, no face, or sound that is none.
        """
        found = find_portrait(as_picture(portrait), option=None)
        samples = as_speech(speech)
        num_frames = -(-len(samples) // SAMPLES_PER_FRAME)
        compose = PhotoFrames(found) if frame == "photo" else None
        size = model.size_px if compose is None else (compose.height, compose.width)
        folder = Path(importlib.import_module("folder_paths").get_temp_directory())
        folder.mkdir(parents=True, exist_ok=True)
        path = temporary_path(folder / "talking-head.mp4").with_suffix(".mp4")
        advance = _progress(num_frames)
        images: list[Tensor] = []
        with (
            Mp4Writer(path, size) as writer,
            model.open(found.square(model.size_px), seed=seed, num_steps=steps or None) as session,
        ):
            for frames in session.stream([samples]):
                shown = np.asarray(frames if compose is None else compose(frames))
                begin = writer.num_frames * SAMPLES_PER_FRAME
                writer.write(shown)
                writer.write_audio(samples[begin : begin + len(shown) * SAMPLES_PER_FRAME])
                images.append(torch.from_numpy(shown).float().div_(255))
                advance(len(shown))
        video = importlib.import_module("comfy_api.latest").InputImpl.VideoFromFile(str(path))
        return torch.cat(images), video


def as_picture(image: Tensor) -> np.ndarray:
    """Returns the one picture of an IMAGE (1, H, W, C) as uint8 (H, W, C).

    Raises:
        UserError: several pictures, or another shape.
    """
    if image.ndim != 4 or image.shape[0] != 1 or image.shape[-1] not in (3, 4):
        raise UserError(
            f"expected one portrait as IMAGE (1, height, width, 3), got {tuple(image.shape)}: "
            "choose one with the node Image From Batch"
        )
    return image[0].detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()


def as_speech(audio: dict[str, Any]) -> np.ndarray:
    """Returns the one sound of an AUDIO as mono float32 (n,) at 16 kHz.

    Raises:
        UserError: no sound, several, another shape, or samples that are not finite.
    """
    waveform = audio["waveform"]
    if waveform.ndim != 3 or waveform.shape[0] != 1 or not waveform.shape[-1]:
        raise UserError(
            f"expected one sound as AUDIO (1, channels, samples), got {tuple(waveform.shape)}: "
            "choose one sound that is not empty"
        )
    rate_hz = int(audio["sample_rate"])
    mono = check_sound(waveform[0].detach().float().mean(0).cpu().numpy(), rate_hz)
    return resample(mono, rate_hz)


def _progress(num_frames: int) -> Callable[[int], None]:
    """Returns what moves ComfyUI's bar by a number of frames, and ends the run where it was
    cancelled.
    """
    bar = importlib.import_module("comfy.utils").ProgressBar(num_frames)
    management = importlib.import_module("comfy.model_management")

    def advance(count: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update(count)

    return advance


NODE_CLASS_MAPPINGS = {"RestLoadModel": LoadModel, "RestTalk": Talk}
NODE_DISPLAY_NAME_MAPPINGS = {
    "RestLoadModel": "Load REST model",
    "RestTalk": "Talk (REST)",
}
