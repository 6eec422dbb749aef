"""A network that can be loaded and saved by itself, as the parts of a pipeline in diffusers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from rest_lightning.errors import UserError
from rest_lightning.hub import PART_PATTERNS, find_folder
from rest_lightning.model_folder import (
    CONFIG_FILE,
    MAX_SHARD_BYTES,
    build_checked,
    read_description,
    read_weights,
    write_part,
)


class PretrainedPart(nn.Module):
    """Base of the parts of a talking head.

    A subclass has ``config``, its constructor's arguments, and ``from_config``, which takes them
    back.
    """

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for ``config.json``."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Builds an untrained network from :attr:`config`."""
        return cls(**config)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, subfolder: str | None = None, **hub: Any
    ) -> Self:
        """Loads one part, in evaluation mode and float32: ``CompactVAE.from_pretrained(folder,
        subfolder="vae")``.

        Args:
            source: folder of a model or of the part, or ``org/name`` on the hub.
            subfolder: of the part, in the folder of a model.
            hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``;
                see :func:`~rest_lightning.hub.find_folder`.

        Raises:
            UserError: no such folder, another class, or weights that do not fit; and what
                :func:`~rest_lightning.hub.find_folder` raises.
        """
        prefix = "" if subfolder is None else f"{subfolder}/"
        folder = find_folder(source, tuple(prefix + name for name in PART_PATTERNS), **hub)
        folder = folder / (subfolder or "")
        if subfolder is None and not (folder / CONFIG_FILE).is_file():
            raise UserError(
                f"expected a part with {CONFIG_FILE}, got {folder}: name the part of a model "
                "folder with subfolder="
            )
        description = read_description(folder)
        kinds = {_name_in_files(kind): kind for kind in cls._kinds()}
        name = description.get("class")
        if name not in kinds:
            raise UserError(
                f"{folder / CONFIG_FILE}: expected the class {cls.__name__}, got {str(name)[:60]}: "
                "load it with its own class, or name another folder"
            )
        build = partial(kinds[name].from_config, description["config"])
        part = build_checked(folder / CONFIG_FILE, build, read_weights(folder))
        assert isinstance(part, cls)
        return part.eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Writes ``config.json`` and safetensors weights into a folder.

        Args:
            folder: made where there is none.
            dtype: of the stored weights; statistics of latents stay float32.
            max_shard_bytes: of one file; more are cut into shards with an index.
        """
        description = {"class": type(self).__name__, "config": self.config}
        write_part(Path(folder), description, self.state_dict(), dtype, max_shard_bytes)

    @classmethod
    def _kinds(cls) -> Iterator[type[Self]]:
        """This class and all that derive from it."""
        yield cls
        for kind in cls.__subclasses__():
            yield from kind._kinds()


def _name_in_files(cls: type) -> str:
    """The name of a class of this package, the import path of another one."""
    own = cls.__module__.startswith(__name__.partition(".")[0] + ".")
    return cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"
