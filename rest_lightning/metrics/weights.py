"""Published weights of the metrics' networks: files that a user supplies. Nothing here
downloads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from rest_lightning.errors import UserError

VARIABLE = "REST_LIGHTNING_WEIGHTS"  # names a folder


@dataclass(frozen=True)
class Published:
    """One published set of weights.

    Attributes:
        name: of the extractor, in result rows.
        files: names under which the file, or folder, is published.
        how_to_get: where it is published.
        sha256_prefixes: on record of the published files; names of the kind ``...-6726825d.pth``
            carry theirs. Where there is none, a row says that the file could not be confirmed.
        hub_id: repository on the hub whose local cache is looked through, or None.
    """

    name: str
    files: tuple[str, ...]
    how_to_get: str
    sha256_prefixes: tuple[str, ...] = ()
    hub_id: str | None = None


PUBLISHED = {
    "fid": Published(
        "inception-v3-compat",
        ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
        "fetch it from github.com/toshas/torch-fidelity/releases (v0.2.0)",
        ("6726825d",),
    ),
    "fvd": Published(
        "i3d-kinetics-400",
        ("i3d_torchscript.pt",),
        ("fetch it from github.com/universome/fvd-comparison's link"),
    ),
    "fvd_videomae": Published(
        "videomae",
        ("videomae-base",),
        "fetch it with `hf download MCG-NJU/videomae-base --local-dir FOLDER/videomae-base`",
        hub_id="MCG-NJU/videomae-base",
    ),
    "sync": Published(
        "syncnet-v2",
        ("syncnet_v2.model",),
        "fetch it from www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
    ),
}


def find_weights(key: str, path: str | os.PathLike[str] | None = None) -> Path:
    """The file (for ``fvd_videomae`` the folder) of published weights.

    Args:
        key: ``fid``, ``fvd``, ``fvd_videomae`` or ``sync``.
        path: the file, or a folder that holds it under its published name. None looks in the folder
            that the environment variable REST_LIGHTNING_WEIGHTS names, in torch's hub folder and in
            the hub's local cache.

    Raises:
        UserError: no such file; tells what was wanted, where it was looked for and how to get it.
    """
    if key not in PUBLISHED:
        raise UserError(
            f"expected weights of {', '.join(PUBLISHED)}, got {key!r}: choose one of them"
        )
    wanted = PUBLISHED[key]
    places = list(_places(wanted, path))
    for place in places:
        if place.exists():
            return place
    folders = dict.fromkeys(str(place.parent if path is None else place) for place in places)
    raise UserError(
        f"expected {wanted.files[0]} (the weights of {wanted.name}), looked in "
        f"{', '.join(folders)}: "
        f"{wanted.how_to_get}, then set {VARIABLE} to its folder or name the file"
    )


def _places(wanted: Published, path: str | os.PathLike[str] | None) -> Iterator[Path]:
    if path is not None:
        given = Path(path).expanduser()
        # A file, or the folder of a model in transformers' layout, is taken as it is.
        yield from [given] if not given.is_dir() or (given / "config.json").is_file() else []
        yield from (given / file for file in wanted.files)
        return
    folder = os.environ.get(VARIABLE)
    if folder:
        yield from (Path(folder).expanduser() / file for file in wanted.files)
    yield from (Path(torch.hub.get_dir()) / "checkpoints" / file for file in wanted.files)
    if wanted.hub_id is not None:
        from huggingface_hub.constants import HF_HUB_CACHE

        cached = Path(HF_HUB_CACHE) / f"models--{wanted.hub_id.replace('/', '--')}" / "snapshots"
        snapshots = sorted(cached.glob("*"), key=lambda snapshot: snapshot.stat().st_mtime)
        yield from snapshots[-1:] or [cached / "newest"]


@cache
def sha256_of_weights(path: Path) -> str:
    """SHA-256 of a file, or of the weights in a folder of transformers' layout; read once per
    process.

    Raises:
        UserError: a folder without weights.
    """
    from rest_lightning.media.files import sha256_of

    if path.is_dir():
        files = [
            path / name
            for name in ("model.safetensors", "pytorch_model.bin")
            if (path / name).is_file()
        ]
        if not files:
            raise UserError(
                f"expected model.safetensors in {path}, got none: fetch the model again"
            )
        return sha256_of(files[0])
    return sha256_of(path)


def is_known(key: str, sha256: str) -> bool:
    """Whether the hash is on record as that of the published file; files without a record are never
    known.
    """
    prefixes = PUBLISHED[key].sha256_prefixes
    return bool(prefixes) and sha256.startswith(prefixes)


# -- networks of this package ----------------------------------------------------------------------
# Small networks that ship with the package: a folder with ``config.json`` and
# ``model.safetensors``.

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class ShippedNetwork(nn.Module):
    """Base: loads and saves. Subclasses set ``config``, their constructor's arguments.

    Attributes:
        title: of the network, in messages.
        command: that trains it.
        assets: folder that ships with the package.
    """

    title: ClassVar[str]
    command: ClassVar[str]
    assets: ClassVar[Path]
    config: dict[str, Any]

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None) -> Self:
        """Load a folder made by :meth:`save_pretrained`, or the weights that ship with the package.

        Raises:
            UserError: no such folder, no weights in it, or another network's.
        """
        from safetensors.torch import load_file

        source = cls.assets if folder is None else Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (source / name).is_file():
                raise UserError(
                    f"expected the {cls.title}'s {name} in {source}, got none: train one with "
                    f"`{cls.command}`"
                )
        content = json.loads((source / CONFIG_FILE).read_text())
        if content.get("class") != cls.__name__:
            raise UserError(
                f"expected a {cls.title} ({cls.__name__}) in {source}, got {content.get('class')}: "
                "name its folder"
            )
        model = cls(**content["config"])
        state = load_file(source / WEIGHTS_FILE)
        model.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        )
        return model.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``: matrices in bfloat16, all else as it
        is.
        """
        from safetensors.torch import save

        from rest_lightning.media.files import whole_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        state = {
            k: (v.bfloat16() if v.ndim > 1 else v).contiguous().cpu()
            for k, v in self.state_dict().items()
        }
        with whole_file(target / WEIGHTS_FILE) as temporary:
            temporary.write_bytes(save(state))
        with whole_file(target / CONFIG_FILE) as temporary:
            temporary.write_text(
                json.dumps({"class": type(self).__name__, "config": self.config}, indent=2) + "\n"
            )
