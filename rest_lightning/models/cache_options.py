"""What the ID-Context Cache may keep, and how: the choices that REST leaves open (METHOD.md section 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from rest_lightning.errors import UserError


@dataclass(frozen=True)
class CacheOptions:
    """The choices that REST leaves open, and its two cache ablations; see METHOD.md section 6.

    Attributes:
        chunk_length: l, new latent frames per chunk.
        positions: ``window``: slots stay at positions 0 (sink), 1..l (previous), l+1..2l (current), for any length of
            stream. ``absolute``: frames keep their position in the stream; chunk 1 is next to the reference then.
        use_sink: False drops the reference after the first chunk (w/o ID-Sink).
        use_context: False hides the preceding chunk (w/o Context-Cache).
        reference_attends: ``self``: the reference sees itself only, so its keys are prefilled before any speech.
            ``first_chunk``: it is computed together with the first chunk, and attends to it.
        cache_noise: what later chunks read. ``last_step``: keys of the chunk's last denoising step. ``clean_pass``:
            keys of one more forward at sigma 0. ``per_step``: step s reads the previous chunk's keys of step s.
        cache_gradient: ``detached`` cuts the gradient through whatever is read from the cache.
        first_chunk_slot: ``window`` position of the first chunk: ``current`` (l+1..2l) or ``adjacent`` (1..l).
    """

    chunk_length: int = 3
    positions: Literal["window", "absolute"] = "window"
    use_sink: bool = True
    use_context: bool = True
    reference_attends: Literal["self", "first_chunk"] = "self"
    cache_noise: Literal["last_step", "clean_pass", "per_step"] = "last_step"
    cache_gradient: Literal["full", "detached"] = "full"
    first_chunk_slot: Literal["current", "adjacent"] = "current"

    def __post_init__(self) -> None:
        if self.chunk_length < 1:
            raise UserError(f"expected chunk_length of at least 1, got {self.chunk_length}: the paper uses 3")
        for name, hint in get_type_hints(type(self)).items():
            allowed = get_args(hint)
            if allowed and getattr(self, name) not in allowed:
                raise UserError(f"expected {name} to be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.positions == "absolute" and self.first_chunk_slot == "adjacent":
            raise UserError("expected first_chunk_slot `current` with absolute positions, got `adjacent`: leave it out")

    @property
    def num_slots(self) -> int:
        """Latent frames of the window: reference, previous chunk, current chunk."""
        return 1 + 2 * self.chunk_length
