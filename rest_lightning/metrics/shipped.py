"""Small networks that ship with the package: a folder with ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from rest_lightning.errors import UserError

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
                    f"expected the {cls.title}'s {name} in {source}, got none: train one with `{cls.command}`"
                )
        content = json.loads((source / CONFIG_FILE).read_text())
        if content.get("class") != cls.__name__:
            raise UserError(
                f"expected a {cls.title} ({cls.__name__}) in {source}, got {content.get('class')}: name its folder"
            )
        model = cls(**content["config"])
        state = load_file(source / WEIGHTS_FILE)
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        return model.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``: matrices in bfloat16, all else as it is."""
        from safetensors.torch import save

        from rest_lightning.media.files import whole_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        state = {k: (v.bfloat16() if v.ndim > 1 else v).contiguous().cpu() for k, v in self.state_dict().items()}
        with whole_file(target / WEIGHTS_FILE) as temporary:
            temporary.write_bytes(save(state))
        with whole_file(target / CONFIG_FILE) as temporary:
            temporary.write_text(json.dumps({"class": type(self).__name__, "config": self.config}, indent=2) + "\n")
