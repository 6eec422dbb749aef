"""The bundle of all parts, and the folder it is saved in."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from rest_lightning.constants import SPATIAL_RATIO, VERSION
from rest_lightning.diffusion.sampling import Sampling, SamplingChanges, warn_of_unseen_levels
from rest_lightning.errors import UserError
from rest_lightning.hub import CARD_FILE, find_folder, is_cached, note_licence, publish
from rest_lightning.media.files import whole_folder
from rest_lightning.media.portrait import load_portrait
from rest_lightning.model_card import make_card, with_licence
from rest_lightning.model_folder import MAX_SHARD_BYTES, read_json, write_part
from rest_lightning.parts import (
    OPTIONAL_PART_NAMES,
    PART_NAMES,
    check_index,
    describe_part,
    device_named,
    dtype_on,
    open_part,
)
from rest_lightning.streaming.batch import BatchSession
from rest_lightning.streaming.session import StreamingSession

if TYPE_CHECKING:
    from rest_lightning.media.portrait import Crop
    from rest_lightning.models.detail import DetailTransfer
    from rest_lightning.models.speech import SpeechEncoder
    from rest_lightning.models.speech_ae import SpeechAE
    from rest_lightning.models.transformer import A2VDiT
    from rest_lightning.models.vae import VideoAutoencoder
    from rest_lightning.streaming.engine import EngineOptions

INDEX_FILE = "model_index.json"
ASSETS = Path(__file__).parent / "assets"
DEFAULT_MODEL = "people"
BUNDLED_MODELS = (DEFAULT_MODEL,)  # folders in `assets`, taken by name
DEFAULT_FOLDER = ASSETS / DEFAULT_MODEL


class TalkingHead(nn.Module):
    """VAE, speech encoder, SpeechAE and A2V-DiT of one streaming talking head.

    Args:
        vae, speech_encoder, speech_ae, transformer: the parts; the transformer has chunked
            attention (a student).
        detail: puts the portrait's detail into decoded frames (beyond the paper); None: nothing
            does.
        sampling: defaults of :meth:`open`.
        size_px: side of the square frames; None: the size that the transformer's
            ``spatial_embedding`` fixes, or 512 where it has none.

    Attributes:
        card: the model card (Markdown with a head of YAML) that goes with the weights, or None.
        portraits: PNG files that come with the model; `rest demo` takes the first.
    """

    def __init__(
        self,
        vae: VideoAutoencoder,
        speech_encoder: SpeechEncoder,
        speech_ae: SpeechAE,
        transformer: A2VDiT,
        sampling: Sampling | None = None,
        size_px: int | None = None,
        detail: DetailTransfer | None = None,
    ) -> None:
        super().__init__()
        if transformer.config["attention"] != "chunked":
            raise UserError(
                "expected a streaming student (attention 'chunked'), got a teacher: train the "
                "student stage first"
            )
        if transformer.config["in_channels"] != vae.latent_channels:
            raise UserError(
                f"expected a transformer for the VAE's {vae.latent_channels} channels, "
                f"got {transformer.config['in_channels']}: use one number for both"
            )
        self.vae, self.speech_encoder, self.speech_ae, self.transformer = (
            vae,
            speech_encoder,
            speech_ae,
            transformer,
        )
        self.detail = detail
        self.card: str | None = None
        self.portraits = portraits_in()
        self.sampling = sampling or Sampling()
        self.size_px: int = size_px or _size_of(transformer)
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the transformer's weights."""
        return next(self.transformer.parameters()).dtype

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the parts that this head has."""
        optional = (name for name in OPTIONAL_PART_NAMES if getattr(self, name) is not None)
        return (*PART_NAMES, *optional)

    def with_chunk_length(self, chunk_length: int) -> Self:
        """Returns this head for chunks of another length, in latents of 0.32 s.

        The weights are the same ones, in the same memory. Short chunks answer sooner, long ones
        cost less.

        Raises:
            UserError: a length that the model was not trained with.
        """
        transformer = self.transformer.with_chunk_length(chunk_length)
        if transformer is self.transformer:
            return self
        other = copy.copy(self)
        other._modules = {**self._modules, "transformer": transformer}
        return other

    def open(
        self,
        portrait: Any,
        *,
        crop: Crop = "auto",
        seed: int = 0,
        num_steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        reference_guidance: float | None = None,
        table_steps: int | None = None,
        chunk_length: int | None = None,
        options: EngineOptions | None = None,
    ) -> StreamingSession:
        """Opens a session for one portrait; its ID-Sink is filled before any speech arrives.

        Args:
            portrait: path of an image, PIL image, uint8 array (H, W, 3), or float tensor (3, H, W)
                in [-1, 1].
            crop: which square of the portrait to take, unless it is a tensor: ``auto`` (around the
                head that is found), ``centre``, (x, y, size) or (x, y, width, height); see
                :func:`rest_lightning.media.portrait.find_portrait`.
            seed: seed of the noise; the same seed, portrait and speech give the same frames.
            num_steps, guidance, shift, reference_guidance, table_steps: override those of
                :class:`~rest_lightning.diffusion.sampling.Sampling` that the model came with.
            chunk_length: latents per chunk, see :meth:`with_chunk_length`; None takes the model's
                default.
            options: switches of the engine: graphs, compilation, overlap, warm-up, a short first
                chunk, frames of twice the size.

        Raises:
            UserError: a portrait or a value that cannot be used, or not enough memory.
        """
        if not isinstance(portrait, torch.Tensor):
            size_px = options.output_px(self.size_px) if options is not None else self.size_px
            least_px = size_px if size_px > self.size_px else None
            portrait = load_portrait(portrait, size_px, crop, least_px)
        changes = SamplingChanges(num_steps, guidance, shift, reference_guidance, table_steps)
        sampling = changes.of(self.sampling)
        head = self if chunk_length is None else self.with_chunk_length(chunk_length)
        head._warn_of_unseen_levels(sampling)
        return StreamingSession(head, portrait, seed=seed, sampling=sampling, options=options)

    def open_batch(
        self,
        num_rows: int,
        *,
        num_steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        reference_guidance: float | None = None,
        table_steps: int | None = None,
        chunk_length: int | None = None,
        options: EngineOptions | None = None,
        max_waiting_s: float = 60.0,
    ) -> BatchSession:
        """Opens up to ``num_rows`` streams that are computed together.

        Rows come and go independently, chunk by chunk.

        Args:
            num_rows: number of rows n; memory for all of them is taken now.
            num_steps, guidance, shift, reference_guidance, table_steps, chunk_length, options: see
                :meth:`open`.
            max_waiting_s: seconds of speech that a row may hold before it is computed.

        Raises:
            UserError: no row, a value that cannot be used, or not enough memory.
        """
        changes = SamplingChanges(num_steps, guidance, shift, reference_guidance, table_steps)
        sampling = changes.of(self.sampling)
        head = self if chunk_length is None else self.with_chunk_length(chunk_length)
        head._warn_of_unseen_levels(sampling)
        return BatchSession(
            head, num_rows, sampling=sampling, options=options, max_waiting_s=max_waiting_s
        )

    def _warn_of_unseen_levels(self, sampling: Sampling) -> None:
        slots = self.transformer.cache_options.num_slots
        num_tokens = slots * (self.size_px // SPATIAL_RATIO) ** 2
        warn_of_unseen_levels(sampling, num_tokens, self.transformer.training_noise)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        **hub: Any,
    ) -> TalkingHead:
        """Load a model folder, a model of the Hugging Face hub, or the bundled model.

        Args:
            path: a folder, ``org/name`` (or ``org/name@revision``) on the hub, or ``people``, the
                bundled model; None is the bundled model too. Of the hub's files only JSON,
                safetensors and the card are fetched.
            device: where the weights go.
            dtype: of the weights; the speech encoder stays in float32.
            hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``;
                see :func:`rest_lightning.hub.find_folder`.

        Raises:
            UserError: no such model, or a folder without ``model_index.json``; a file that is
                damaged; no CUDA, or too little memory; and what
                :func:`rest_lightning.hub.find_folder` raises.
        """
        folder = find_model(path, **hub)
        if path is not None and is_cached(folder):
            note_licence(folder, path)
        index_file = folder / INDEX_FILE
        if not index_file.is_file():
            raise UserError(
                f"expected a model folder with {INDEX_FILE}, got {folder}: make one with `rest "
                "export`, or leave the path out for the bundled model"
            )
        index = read_json(index_file)
        size_px, sampling = check_index(index_file, index)
        optional = (name for name in OPTIONAL_PART_NAMES if name in index.get("parts", {}))
        parts = {name: open_part(name, folder) for name in (*PART_NAMES, *optional)}
        head = cls(**parts, sampling=sampling, size_px=size_px)  # type: ignore[arg-type]
        if (folder / CARD_FILE).is_file():
            head.card = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")
        head.portraits = portraits_in(folder)
        _move(head, device)
        head.set_dtype(dtype)
        return head

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Converts the weights to a type.

        The speech encoder stays in float32, as in training.
        """
        for name in self.part_names:
            if name != "speech_encoder":
                getattr(self, name).to(dtype=dtype)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Write the folder: ``model_index.json`` and one folder per part with ``config.json`` and
        ``model.safetensors``, or shards and the index of them that Hugging Face's libraries read;
        and :attr:`card` as ``README.md``, where there is one.

        The folder appears whole or not at all; one that exists is replaced, and stays when writing
        fails.

        Args:
            path: the folder.
            dtype: of the stored weights; statistics of the latents stay float32.
            max_shard_bytes: of the tensors of one file; a larger part is cut into several.
        """
        with whole_folder(path) as folder:
            for name in self.part_names:
                part = getattr(self, name)
                state = part.state_dict()
                write_part(folder / name, describe_part(part), state, dtype, max_shard_bytes)
            index = {
                "_class_name": "TalkingHead",
                "version": VERSION,
                "size_px": self.size_px,
                "sampling": asdict(self.sampling),
                "parts": {name: type(getattr(self, name)).__name__ for name in self.part_names},
            }
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
            if self.card is not None:
                (folder / CARD_FILE).write_text(self.card, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a talking head",
        dtype: torch.dtype = torch.float32,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> str:
        """Uploads the model folder to the Hugging Face hub, in one commit.

        The card is :attr:`card`, or a new one with what is known of the parts.

        Args:
            repo_id: ``org/name``; made where there is none.
            license: identifier of the hub, such as ``cc-by-4.0``; None keeps that of the card.
            revision: branch; None takes ``main``.
            private: of a repository that is made.
            token: None takes that of ``hf auth login``.
            commit_message: of the commit.
            dtype, max_shard_bytes: see :meth:`save_pretrained`.

        Returns:
            Address of the commit.

        Raises:
            UserError: no licence, no access, or no network.
        """
        before = self.card
        card = before or make_card(self, name=repo_id)
        try:
            self.card = card if license is None else with_licence(card, license)
            with tempfile.TemporaryDirectory(prefix="rest-push-") as scratch:
                folder = Path(scratch) / "model"
                self.save_pretrained(folder, dtype, max_shard_bytes)
                return publish(
                    folder,
                    repo_id,
                    revision=revision,
                    private=private,
                    token=token,
                    commit_message=commit_message,
                )
        finally:
            self.card = before


@dataclass(frozen=True)
class ModelOptions:
    """Which model a command loads, and how it computes.

    Attributes:
        model: model folder, or ``org/name`` on the hub; None takes the bundled model.
        chunk_length: latents (of 0.32 s) per chunk, where the model was trained for several; None
            takes its default.
        num_threads: of torch; None leaves its choice.
        dtype: ``auto`` takes bfloat16 on processors that compute it natively, else float32.
        device: ``auto`` takes a CUDA device where there is one.
    """

    model: Path | None = None
    chunk_length: int | None = None
    num_threads: int | None = None
    dtype: str = "auto"
    device: str = "auto"

    def portraits(self) -> list[Path]:
        """Returns the portraits that come with the model; see :func:`portraits_in`."""
        return portraits_in(find_model(self.model))

    def load(self) -> TalkingHead:
        """Returns the model on its device, with torch's threads set.

        Raises:
            UserError: no such model, device or type, or too little memory.
        """
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        device = device_named(self.device)
        dtype = dtype_on(self.dtype, device.partition(":")[0])
        head = TalkingHead.from_pretrained(self.model, device=device, dtype=dtype)
        return head if self.chunk_length is None else head.with_chunk_length(self.chunk_length)


def find_model(path: str | os.PathLike[str] | None = None, **hub: Any) -> Path:
    """Returns the folder of a model that :meth:`TalkingHead.from_pretrained` takes.

    Raises:
        UserError: see :func:`bundled_folder` and :func:`rest_lightning.hub.find_folder`.
    """
    bundled = bundled_folder(path)
    if bundled is not None:
        return bundled
    assert path is not None
    return find_folder(path, **hub)


def bundled_folder(name: str | os.PathLike[str] | None) -> Path | None:
    """Returns the folder of a model that ships with the package, or None where ``name`` is of none.

    Args:
        name: ``people``; None takes the default. A folder of that name in the current one wins.

    Raises:
        UserError: the name of the drawn model, which shipped until 0.1.
    """
    if name is None:
        return DEFAULT_FOLDER
    if Path(name).exists():
        return None
    if os.fspath(name) == "embedded":
        raise UserError(
            "expected a model, got 'embedded': the model of drawn faces has left the package; "
            "leave it out for the model of people, or name the folder tests/assets/drawn of a clone"
        )
    return ASSETS / name if os.fspath(name) in BUNDLED_MODELS else None


def portraits_in(folder: Path | None = None) -> list[Path]:
    """Returns the portraits that come with a model; `rest demo` takes the first.

    They are the PNG files of ``portraits`` in its folder; where it has none, and without a folder,
    those of the bundled model.
    """
    own = [] if folder is None else sorted((folder / "portraits").glob("*.png"))
    return own or sorted((DEFAULT_FOLDER / "portraits").glob("*.png"))


def _move(head: TalkingHead, device: str) -> None:
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"expected an available device, got {device}, but torch finds no CUDA device: use cpu"
        )
    try:
        head.to(device=device)
    except torch.OutOfMemoryError as error:
        weights_gb = sum(p.numel() * p.element_size() for p in head.parameters()) / 1e9
        raise UserError(
            f"expected {weights_gb:.2f} GB free on {device} for the weights, got out of memory: "
            "free some, or use another device"
        ) from error


def _size_of(transformer: A2VDiT) -> int:
    return (
        SPATIAL_RATIO * transformer.spatial_size[0] if transformer.spatial_size is not None else 512
    )
