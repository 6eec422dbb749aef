"""The ID-Context Cache: keys and values of the reference (ID-Sink) and of the preceding chunk (REST sec. 3.4).

    K_i = [K_ref | K_(i-1) | K_i], V likewise, in every block; queries come from chunk i alone.

Slots, not lists: one buffer holds the window of every block, and its shape and address never change. A denoising step
writes the current slot (`IDContextCache.update`); `IDContextCache.commit`, once per chunk, makes the current slot the
previous one. Rows of the batch are independent streams that advance together, chunk after chunk, and may start anew at
any chunk (`IDContextCache.reset_rows`).

The buffer lies as [previous | sink | current] (attention does not mind the order of keys): so a row without previous
chunk reads one contiguous part of it, without a mask. Keys lie there rotated. With ``window`` positions that is the
same as caching them un-rotated, since a slot's position is constant and rotations compose: moving a key from the
current slot to the previous one is one more rotation, by the difference of the two positions, once per chunk instead
of at every denoising step.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from rest_lightning.errors import UserError
from rest_lightning.models.attention import KeyValue, Rope, attend_heads, join_heads, rotate, split_heads
from rest_lightning.models.cache_options import CacheOptions as CacheOptions

if TYPE_CHECKING:
    from rest_lightning.models.transformer import A2VDiT


class IDContextCache:
    """State of a batch of streams; make one with `allocate`, outside of inference mode.

    Attributes:
        keys, values: ``(num_steps, num_layers, rows, heads, tokens, D / heads)``: a head's lie together, as products
            want them. num_steps is 1 unless ``cache_noise`` is per_step.
        mask: ``(rows, 1, 1, tokens)``, 0 where a row may look and -inf where not; kept up to date where it is needed.
        rotation: ``(rows, l * n, D / 2)``, of the current slot.
        num_frames: per row, latent frames committed since its start; 0 = the next chunk is its first.
        num_previous: per row, latent frames in the previous slot (right-aligned: next to the current slot).
        step: denoising step under way; matters for ``per_step`` only.
    """

    def __init__(
        self,
        options: CacheOptions,
        rope: Rope,
        num_layers: int,
        num_heads: int,
        rows: int,
        height: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        num_steps: int = 1,
        always_mask: bool = False,
    ) -> None:
        self.options, self.rope, self.height, self.width = options, rope, height, width
        self.num_layers, self.num_heads, self.rows, self.always_mask = num_layers, num_heads, rows, always_mask
        self.num_steps, self.device, self.dtype = num_steps, device, dtype
        self.num_tokens = height * width
        self.previous_frames = options.chunk_length if options.use_context else 0
        self.num_frames, self.num_previous = [0] * rows, [0] * rows
        self.step = self.num_current = 0
        tokens = (self.previous_frames + 1 + options.chunk_length) * self.num_tokens
        with torch.inference_mode(False):
            self.mask = torch.zeros(rows, 1, 1, tokens, device=device, dtype=dtype)
            self.rotation = self._table(1, options.chunk_length).repeat(rows, 1, 1)
            self._reference_rotation = self._table(0, 1)  # held: a captured graph goes on reading it
            self._make_slots((num_steps, num_layers, rows, num_heads, tokens, rope.dim // num_heads))
        self._positions: list[int] = []
        self._visible: list[tuple[int, bool]] = []
        self._refresh()

    @classmethod
    def allocate(
        cls,
        model: A2VDiT,
        rows: int,
        height: int,
        width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_steps: int = 1,
        always_mask: bool = False,
    ) -> Self:
        """An empty cache for ``rows`` streams of ``height x width`` latents.

        Args:
            device, dtype: of the model unless given; dtype is that of the keys and values.
            num_steps: denoising steps per chunk; used by ``cache_noise: per_step`` alone.
            always_mask: keep one shape for all chunks (CUDA graphs). Else the mask is left out where no row needs it.
        """
        if model.attention != "chunked":
            raise UserError('expected a model with attention="chunked", got a teacher: use teacher.to_student()')
        weight = model.proj_in.weight
        per_step = model.cache_options.cache_noise == "per_step"
        return cls(
            model.cache_options,
            model.rope,
            model.num_layers,
            model.num_heads,
            rows,
            height,
            width,
            torch.device(device) if device is not None else weight.device,
            dtype or weight.dtype,
            num_steps if per_step else 1,
            always_mask,
        )

    def _make_slots(self, shape: tuple[int, ...]) -> None:
        self.keys = torch.zeros(shape, device=self.device, dtype=self.dtype)
        self.values = torch.zeros(shape, device=self.device, dtype=self.dtype)
        self._views: dict[tuple[int, int, int], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values, self.mask, self.rotation))

    @property
    def reference_expected(self) -> bool:
        """Whether the next chunk comes with the reference in front (``reference_attends: first_chunk``)."""
        return self.options.reference_attends == "first_chunk" and 0 in self.num_frames

    @property
    def variant(self) -> Hashable:
        """What the next chunk's sequence of operations depends on, beside its length: one captured graph for each."""
        return self.reference_expected, self._start, self._masked

    # -- one denoising step -------------------------------------------------------------------------------------------

    def begin(self, num_frames: int, step: int = 0) -> int:
        """Get ready for one forward of ``num_frames`` latents; returns how many of them are the reference (0 or 1).

        Raises:
            UserError: more frames than a chunk has, or rows that disagree on whether the reference is due.
        """
        has_reference = self.reference_expected
        if has_reference and any(self.num_frames):
            raise UserError(
                "expected all rows at their first chunk with reference_attends=first_chunk, got rows in mid-stream: "
                "start the stream in a cache of its own and use copy_row_"
            )
        length = self.options.chunk_length
        if not 1 <= num_frames - has_reference <= length:
            what = "the reference and 1" if has_reference else "1"
            raise UserError(f"expected {what} to {length} latent frames of one chunk, got {num_frames} frames in all")
        self.step = step if self.options.cache_noise == "per_step" else 0
        if self.step >= self.num_steps:
            raise UserError(f"expected a step below {self.num_steps}, got {step}: allocate with a larger num_steps")
        self.num_current = num_frames - has_reference
        self._has_reference = has_reference
        self._rotation = self.rotation[:, : self.num_current * self.num_tokens]
        if has_reference:
            self._rotation = torch.cat([self._reference_rotation.expand(self.rows, -1, -1), self._rotation], dim=1)
        return int(has_reference)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        """Attention of the current chunk over its window; ``q, k, v (rows, f * n, D)``, not rotated."""
        q, k = rotate(q, self._rotation), rotate(k, self._rotation)
        if self._has_reference:
            n = self.num_tokens
            self.write_sink(layer, k[:, :n], v[:, :n])
            k, v = k[:, n:], v[:, n:]
        keys, values = self.update(layer, k, v)
        mask = self.window_mask
        return attend_heads(split_heads(q, num_heads).to(values.dtype), keys, values, mask).to(v.dtype)

    @property
    def current_rotation(self) -> Tensor:
        """Rotations ``(rows, f * n, D / 2)`` of the tokens of the forward under way."""
        return self._rotation

    @property
    def window_mask(self) -> Tensor | None:
        """Mask of the window of the forward under way, None where every row sees all of it."""
        if not self._masked:
            return None
        end = (self.previous_frames + 1) * self.num_tokens + self.num_current * self.num_tokens
        return self.mask[..., self._start : end]

    def slots(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where the forward under way writes its keys and values, and the window that it attends to.

        All four are views ``(rows, heads, tokens, D / heads)`` of the buffers.
        """
        plan = (self.step, self._start, self.num_current)
        if plan not in self._views:
            self._views[plan] = self._make_views(*plan)
        return self._views[plan][layer]

    def update(self, layer: int, k: Tensor, v: Tensor) -> KeyValue:
        """Write rotated keys and values ``(rows, f * n, D)`` to the current slot; returns the window to attend to.

        That is of shape ``(rows, heads, tokens, D / heads)``.
        """
        if k.requires_grad or v.requires_grad:
            raise UserError("expected torch.no_grad() with an IDContextCache, got tensors with a gradient: use it")
        key_slot, value_slot, keys, values = self.slots(layer)
        key_slot.copy_(split_heads(k, self.num_heads))
        value_slot.copy_(split_heads(v, self.num_heads))
        return keys, values

    def _make_views(self, step: int, start: int, num_current: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        current = (self.previous_frames + 1) * self.num_tokens
        end = current + num_current * self.num_tokens
        slots = [(self.keys[step, layer], self.values[step, layer]) for layer in range(self.num_layers)]
        new, window = slice(current, end), slice(start, end)
        return [(k[:, :, new], v[:, :, new], k[:, :, window], v[:, :, window]) for k, v in slots]

    def write_sink(self, layer: int, k: Tensor, v: Tensor, rows: Sequence[int] | None = None) -> None:
        """Write the reference's rotated keys and values ``(rows, n, D)``: all rows unless they are named."""
        start = self.previous_frames * self.num_tokens
        every = self.options.reference_attends == "self"  # prefilled once, for all steps
        steps = slice(None) if every else slice(self.step, self.step + 1)
        for buffer, new in ((self.keys, split_heads(k, self.num_heads)), (self.values, split_heads(v, self.num_heads))):
            sink = buffer[steps, layer, :, :, start : start + self.num_tokens]
            if rows is None:
                sink.copy_(new)
            else:
                for i, row in enumerate(rows):
                    sink[:, row].copy_(new[i])

    # -- once per chunk -----------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """End the chunk: the current slot becomes the previous one, moved to its positions, in place."""
        if self.num_current == 0:
            raise UserError("expected a chunk before commit(), got none: run the model with this cache first")
        if self.options.use_context:
            self._move()
            self.num_previous = [self.num_current] * self.rows
        self.num_frames = [count + self.num_current for count in self.num_frames]
        self.num_current = 0
        self._refresh()

    def _move(self) -> None:
        n, f = self.num_tokens, self.num_current
        previous = slice((self.previous_frames - f) * n, self.previous_frames * n)
        current = slice((self.previous_frames + 1) * n, (self.previous_frames + 1 + f) * n)
        self.values[..., previous, :] = self.values[..., current, :]
        if self.options.positions != "window":
            self.keys[..., previous, :] = self.keys[..., current, :]
            return
        # Layer by layer: what one of them takes in between, in float32, stays small and in a GPU's cache.
        shift = self._shift()
        for keys in self.keys.flatten(0, 1):
            keys[..., previous, :] = split_heads(rotate(join_heads(keys[..., current, :]), shift), self.num_heads)

    def _shift(self) -> Tensor:
        """Rotation from the current slot to the positions just before it: ``(rows, f * n, D / 2)``."""
        first = 1 + self.options.chunk_length - self.num_current
        return self.rotation[:, : self.num_current * self.num_tokens].conj() * self._table(first, self.num_current)

    def _table(self, first: int, num_frames: int) -> Tensor:
        return self.rope.table(first, num_frames, self.height, self.width, self.device)

    def reset_rows(self, rows: Sequence[int] | None = None) -> None:
        """Let rows start anew with their next chunk (all rows unless named); their sinks stay until prefilled again."""
        for row in self.check_rows(rows):
            self.num_frames[row] = self.num_previous[row] = 0
            self._clear_previous(row)
        self._refresh()

    def clear(self) -> None:
        """Empty all slots, in place; all rows start anew with their next chunk, and need their sinks."""
        self.keys.zero_()
        self.values.zero_()
        self.num_current = 0
        self.reset_rows()

    def _clear_previous(self, row: int) -> None:
        for buffer in (self.keys, self.values):  # a hidden slot must still be finite: 0 * NaN = NaN
            buffer[:, :, row, :, : self.previous_frames * self.num_tokens] = 0

    def check_rows(self, rows: Sequence[int] | None) -> Sequence[int]:
        for row in rows if rows is not None else ():
            if not 0 <= row < self.rows:
                raise UserError(f"expected a row from 0 to {self.rows - 1}, got {row}: allocate more rows")
        return rows if rows is not None else range(self.rows)

    def _refresh(self) -> None:
        """Bring rotation, mask and window in line with the rows' counters; the host knows all it needs."""
        options, n = self.options, self.num_tokens
        fresh = [count == 0 for count in self.num_frames]
        if options.positions == "absolute":
            positions = [1 + count for count in self.num_frames]
        else:
            adjacent = options.first_chunk_slot == "adjacent"
            positions = [1 if adjacent and new else 1 + options.chunk_length for new in fresh]
        if positions != self._positions:
            for row, position in enumerate(positions):
                self.rotation[row].copy_(self._table(position, options.chunk_length))
            self._positions = positions
        visible = [(count, options.use_sink or new) for count, new in zip(self.num_previous, fresh, strict=True)]
        same_previous = len({count for count, _ in visible}) == 1
        all_sinks = all(sink for _, sink in visible)
        no_sinks = not any(sink for _, sink in visible) and not any(self.num_previous)
        self._masked = self.always_mask or not ((same_previous and all_sinks) or no_sinks)
        if self._masked:
            self._start = 0
        elif no_sinks:
            self._start = (self.previous_frames + 1) * n
        else:
            self._start = (self.previous_frames - self.num_previous[0]) * n
        if self._masked and visible != self._visible:
            # Filled on the device: a copy from the host would be waited for.
            self.mask.zero_()
            for row, (count, sink) in enumerate(visible):
                self.mask[row, ..., : (self.previous_frames - count) * n].fill_(-torch.inf)
                if not sink:
                    self.mask[row, ..., self.previous_frames * n : (self.previous_frames + 1) * n].fill_(-torch.inf)
            self._visible = visible

    # -- moving state -------------------------------------------------------------------------------------------------

    def narrow(self, rows: int) -> Self:
        """The first ``rows`` rows as a cache of its own: the same memory, with counters that go their own way."""
        narrow = copy.copy(self)
        with torch.inference_mode(False):
            narrow.rows, narrow._views = rows, {}
            narrow.keys, narrow.values = self.keys[:, :, :rows], self.values[:, :, :rows]
            narrow.mask, narrow.rotation = self.mask[:rows].clone(), self.rotation[:rows].clone()
        narrow.num_frames, narrow.num_previous = self.num_frames[:rows], self.num_previous[:rows]
        narrow._positions, narrow._visible = [], []
        narrow._refresh()
        return narrow

    def copy_row_(self, row: int, source: IDContextCache, source_row: int = 0) -> None:
        """Take over one stream of another cache, between two chunks."""
        self.copy_rows_([(row, source, source_row)])

    def copy_rows_(self, rows: Sequence[tuple[int, IDContextCache, int]]) -> None:
        """The same for several rows, each (row, source, its row there). The current slot is written before it is read.

        Raises:
            UserError: no such row, or a cache of another model or size.
        """
        past = slice(0, (self.previous_frames + 1) * self.num_tokens)
        for row, source, source_row in rows:
            self.check_rows([row])
            source.check_rows([source_row])
            if (source.options, source.keys.shape[1], source.keys.shape[3:]) != (
                self.options,
                self.keys.shape[1],
                self.keys.shape[3:],
            ):
                raise UserError(
                    "expected a row of a cache with the same model and size, got another: allocate both alike"
                )
            self.keys[:, :, row, :, past].copy_(source.keys[:, :, source_row, :, past])
            self.values[:, :, row, :, past].copy_(source.values[:, :, source_row, :, past])
            self.num_frames[row] = source.num_frames[source_row]
            self.num_previous[row] = source.num_previous[source_row]
        self._refresh()

    def snapshot(self) -> dict[str, Any]:
        """A copy of the state; `restore` brings it back bit by bit."""
        return {
            "keys": self.keys.clone(),
            "values": self.values.clone(),
            "num_frames": list(self.num_frames),
            "num_previous": list(self.num_previous),
            "num_current": self.num_current,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Write a `snapshot` of a cache of the same model and size into the buffers, in place."""
        if state["keys"].shape != self.keys.shape or state["keys"].dtype != self.keys.dtype:
            raise UserError(
                f"expected a snapshot of shape {tuple(self.keys.shape)} and {self.keys.dtype}, "
                f"got {tuple(state['keys'].shape)} and {state['keys'].dtype}: it is of another model or size"
            )
        self.keys.copy_(state["keys"])
        self.values.copy_(state["values"])
        self.num_frames, self.num_previous = list(state["num_frames"]), list(state["num_previous"])
        self.num_current = state["num_current"]
        self._refresh()


class DifferentiableCache(IDContextCache):
    """The same maths with tensors that keep their graph: sequential training, chunk after chunk.

    The parallel forward gives the same gradients at less cost; this is what it is compared with. All rows advance
    together: there is no mask, no `snapshot` and no `copy_row_`.
    """

    def _make_slots(self, shape: tuple[int, ...]) -> None:
        self._sink: dict[tuple[int, int], KeyValue] = {}
        self._previous: dict[tuple[int, int], KeyValue] = {}
        self._current: dict[tuple[int, int], KeyValue] = {}

    def _refresh(self) -> None:
        self.rotation = self.rotation.clone()  # the graph of earlier chunks still needs the old one
        super()._refresh()
        self._masked = False

    def update(self, layer: int, k: Tensor, v: Tensor) -> KeyValue:
        slot, options = (self.step, layer), self.options
        self._current[slot] = (k, v)
        cached = [self._previous[slot]] if self.num_previous[0] else []
        if options.use_sink or self.num_frames[0] == 0:
            cached.append(self._sink[slot])
        if options.cache_gradient == "detached" and not self._has_reference:
            cached = [(key.detach(), value.detach()) for key, value in cached]
        keys, values = (torch.cat(parts, 1) for parts in zip(*cached, (k, v), strict=True))
        return split_heads(keys, self.num_heads), split_heads(values, self.num_heads)

    def write_sink(self, layer: int, k: Tensor, v: Tensor, rows: Sequence[int] | None = None) -> None:
        assert rows is None
        steps = range(self.num_steps) if self.options.reference_attends == "self" else [self.step]
        self._sink.update({(step, layer): (k, v) for step in steps})

    def _move(self) -> None:
        absolute = self.options.positions == "absolute"
        shift = None if absolute else self._shift()
        self._previous = {s: (k if shift is None else rotate(k, shift), v) for s, (k, v) in self._current.items()}

    def _clear_previous(self, row: int) -> None:
        self._previous = {}
