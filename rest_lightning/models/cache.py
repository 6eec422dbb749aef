"""The ID-Context Cache: keys and values of the reference (ID-Sink) and of the preceding chunk (REST
sec. 3.4).

    K_i = [K_ref | K_(i-1) | K_i], V likewise, in every block; queries come from chunk i alone.

Slots, not lists: one buffer holds the window of every block, and its shape and address never
change. A denoising step writes the current slot (`IDContextCache.update`); `IDContextCache.commit`,
once per chunk, makes the current slot the previous one. Rows of the batch are independent streams
that advance together, chunk after chunk, and may start anew at any chunk
(`IDContextCache.reset_rows`).

The buffer lies as [previous | sink | current] (attention does not mind the order of keys): so a row
without previous chunk reads one contiguous part of it, without a mask. Keys lie there rotated. With
``window`` positions that is the same as caching them un-rotated, since a slot's position is
constant and rotations compose: moving a key from the current slot to the previous one is one more
rotation, by the difference of the two positions, once per chunk instead of at every denoising step.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from rest_lightning.errors import UserError
from rest_lightning.models.attention import (
    KeyValue,
    Rope,
    attend,
    attend_heads,
    join_heads,
    rotate,
    split_heads,
)


@dataclass(frozen=True)
class CacheOptions:
    """The choices that REST leaves open, and its two cache ablations (docs/method.md#cache).

    Attributes:
        chunk_length: l, new latent frames per chunk.
        trained_lengths: chunk lengths that training draws from, so that a stream may choose one;
            empty: chunk_length alone (the paper).
        positions: ``window``: slots stay at positions 0 (sink), 1..l (previous), l+1..2l (current),
            for any length of stream. ``absolute``: frames keep their position in the stream; chunk
            1 is next to the reference then.
        use_sink: False drops the reference after the first chunk (w/o ID-Sink).
        use_context: False hides the preceding chunk (w/o Context-Cache).
        reference_attends: ``self``: the reference sees itself only, so its keys are prefilled
            before any speech. ``first_chunk``: it is computed together with the first chunk, and
            attends to it. ``every_chunk``: it comes along in every chunk and attends to that
            chunk's window; its keys are those of the present chunk and step (REST's Algorithm 1 may
            be read so).
        cache_noise: what later chunks read. ``last_step``: keys of the chunk's last denoising step.
            ``clean_pass``: keys of one more forward at sigma 0. ``per_step``: step s reads the
            previous chunk's keys of step s.
        cache_gradient: ``detached`` cuts the gradient through whatever is read from the cache.
        first_chunk_slot: ``window`` position of the first chunk: ``current`` (l+1..2l) or
            ``adjacent`` (1..l).
    """

    chunk_length: int = 3
    positions: Literal["window", "absolute"] = "window"
    use_sink: bool = True
    use_context: bool = True
    reference_attends: Literal["self", "first_chunk", "every_chunk"] = "self"
    cache_noise: Literal["last_step", "clean_pass", "per_step"] = "last_step"
    cache_gradient: Literal["full", "detached"] = "full"
    first_chunk_slot: Literal["current", "adjacent"] = "current"
    trained_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "trained_lengths", tuple(self.trained_lengths)
        )  # JSON and YAML have no tuples
        if self.chunk_length < 1:
            raise UserError(
                f"expected chunk_length of at least 1, got {self.chunk_length}: the paper uses 3"
            )
        if self.trained_lengths and self.chunk_length not in self.trained_lengths:
            raise UserError(
                f"expected chunk_length among trained_lengths {list(self.trained_lengths)}, got "
                f"{self.chunk_length}"
            )
        for name, hint in get_type_hints(type(self)).items():
            allowed = get_args(hint) if get_origin(hint) is Literal else ()
            if allowed and getattr(self, name) not in allowed:
                raise UserError(
                    f"expected {name} to be one of {', '.join(allowed)}, got "
                    f"{getattr(self, name)!r}"
                )
        if self.positions == "absolute" and self.first_chunk_slot == "adjacent":
            raise UserError(
                "expected first_chunk_slot `current` with absolute positions, got `adjacent`: "
                "leave it out"
            )

        if self.reference_attends == "every_chunk" and not self.use_sink:
            raise UserError(
                "expected use_sink true with reference_attends every_chunk, got false: a reference "
                "that comes along in every chunk is its sink"
            )

    def with_chunk_length(self, chunk_length: int) -> CacheOptions:
        """Returns the same options for chunks of another length.

        Raises:
            UserError: a length that training did not draw.
        """
        trained = self.trained_lengths or (self.chunk_length,)
        if chunk_length not in trained:
            raise UserError(
                "expected a chunk length that the model was trained with "
                f"({', '.join(map(str, trained))} latents of "
                f"0.32 s), got {chunk_length}: choose one of them"
            )
        return replace(self, chunk_length=chunk_length)

    @property
    def num_slots(self) -> int:
        """Latent frames of the window: reference, previous chunk, current chunk."""
        return 1 + 2 * self.chunk_length


class AttentionContext(Protocol):
    """What queries may attend to: rotates queries and keys, gathers the window, and attends."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int
    ) -> Tensor | list[Tensor]:
        """``q, k, v (B, f * n, D)`` of block ``layer`` -> ``(B, f * n, D)``, or its pieces in order
        of their tokens.
        """


class FullContext:
    """Every token sees every token (teacher, REST sec. 3.3). ``table``: rotations of all tokens."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        """See `AttentionContext.attend`."""
        return attend(rotate(q, self.table), rotate(k, self.table), v, num_heads)


class ChunkedContext:
    """All chunks in parallel, chunk i over [reference | chunk i-1 | chunk i] (REST sec. 3.4),
    without any mask.

    The windows are gathered instead of masked: the queries of chunks 2..K form one batch of windows
    of equal length, and chunk 1, which has no predecessor, is attended to on its own. With
    ``window`` positions a key is rotated once per slot in which it appears.

    With ``two_streams`` the batch holds ``[noisy; context]``: the second half feeds the cache of
    both halves. With ``reference_attends: every_chunk`` the tokens are ``[reference, chunk 1,
    reference, chunk 2, ...]``, a copy of the reference for every chunk (`repeat_reference`).
    """

    def __init__(
        self,
        options: CacheOptions,
        rope: Rope,
        size: tuple[int, int, int],
        device: torch.device,
        two_streams: bool,
    ) -> None:
        num_frames, height, width = size
        length = options.chunk_length
        self.options = options
        self.two_streams = two_streams
        self.num_reference = height * width
        self.num_chunk = length * height * width
        self.num_chunks = (num_frames - 1) // length
        slots = rope.table(0, options.num_slots, height, width, device)
        reference, previous, current = slots.split(
            [self.num_reference, self.num_chunk, self.num_chunk]
        )
        if options.positions == "absolute":
            table = rope.table(0, num_frames, height, width, device)
            self.start_table, later = table.tensor_split([self.num_reference + self.num_chunk])
            self.later_table = later.unflatten(0, (self.num_chunks - 1, self.num_chunk))
            self.previous_table = table[self.num_reference : -self.num_chunk].view_as(
                self.later_table
            )
        else:
            first = previous if options.first_chunk_slot == "adjacent" else current
            self.start_table = torch.cat([reference, first])
            self.later_table, self.previous_table = current, previous

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> list[Tensor]:
        """See `AttentionContext.attend`."""
        n, chunk, num_later = self.num_reference, self.num_chunk, self.num_chunks - 1
        if self.options.reference_attends == "every_chunk":
            return self._attend_repeated(q, k, v, num_heads)
        # Split, not indexed: a single concatenation takes the gradients of the pieces back.
        (q_start, q_later), (k_start, k_later), (v_start, v_later) = (
            x.split([n + chunk, num_later * chunk], 1) for x in (q, k, v)
        )
        q_start, k_start = rotate(q_start, self.start_table), rotate(k_start, self.start_table)
        v_start = v_start.clone()  # the graph keeps it: a view would keep the values of all chunks
        if self.options.reference_attends == "self":
            q_ref, q_first = q_start.split([n, chunk], 1)
            out = [
                attend(q_ref, k_start[:, :n], v_start[:, :n], num_heads),
                attend(
                    q_first, self._first_window(k_start), self._first_window(v_start), num_heads
                ),
            ]
        else:
            out = [attend(q_start, k_start, v_start, num_heads)]
        if num_later:
            q_later, k_later, v_later = (
                x.unflatten(1, (num_later, chunk)) for x in (q_later, k_later, v_later)
            )
            k_previous, v_previous = (
                x[:, n:-chunk].unflatten(1, (num_later, chunk)) for x in (k, v)
            )
            if self.options.use_context:
                k_previous = rotate(k_previous, self.previous_table)
            keys = self._windows(k_start[:, :n], k_previous, rotate(k_later, self.later_table))
            values = self._windows(v_start[:, :n], v_previous, v_later)
            later = attend(rotate(q_later, self.later_table).flatten(0, 1), keys, values, num_heads)
            out.append(later.unflatten(0, (-1, num_later)).flatten(1, 2))
        return out

    def _attend_repeated(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> list[Tensor]:
        n, num_later = self.num_reference, self.num_chunks - 1
        q, k, v = (x.unflatten(1, (self.num_chunks, -1)) for x in (q, k, v))
        queries, keys = (rotate(x[:, 0], self.start_table) for x in (q, k))
        out = [attend(queries, keys, v[:, 0], num_heads)]
        if not num_later:
            return out
        places = self.later_table
        reference = self.start_table[:n]
        if places.ndim == 3:  # absolute: each chunk at places of its own
            reference = reference.expand(num_later, -1, -1)
        table = torch.cat([reference, places], -2)
        queries, keys, values = rotate(q[:, 1:], table), rotate(k[:, 1:], table), v[:, 1:]
        if self.options.use_context:
            previous = rotate(k[:, :-1, n:], self.previous_table)
            keys = torch.cat([self._cached(previous), keys], 2)
            values = torch.cat([self._cached(v[:, :-1, n:]), values], 2)
        later = attend(queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), num_heads)
        out.append(later.unflatten(0, (-1, num_later)).flatten(1, 2))
        return out

    def _first_window(self, start: Tensor) -> Tensor:
        """What the first chunk reads: keys or values ``(B, (1 + l) * n, D)`` of the reference and
        of itself.
        """
        if not self.two_streams and self.options.cache_gradient == "full":
            return start
        return torch.cat(
            [self._cached(start[:, : self.num_reference]), start[:, self.num_reference :]], 1
        )

    def _windows(self, reference: Tensor, previous: Tensor, current: Tensor) -> Tensor:
        """What chunks 2 to K read, each its window of keys or values: ``(B * (K - 1), tokens,
        D)``.
        """
        pieces = [current]
        if self.options.use_context:
            pieces.insert(0, self._cached(previous))
        if self.options.use_sink:
            pieces.insert(
                0, self._cached(reference).unsqueeze(1).expand(-1, current.shape[1], -1, -1)
            )
        return torch.cat(pieces, 2).flatten(0, 1)

    def _cached(self, x: Tensor) -> Tensor:
        """What a later chunk reads of ``x``: the context stream, cut from the graph if the gradient
        is detached.
        """
        if self.two_streams:
            context = x[x.shape[0] // 2 :]
            x = torch.cat([context, context])
        return x.detach() if self.options.cache_gradient == "detached" else x


def repeat_reference(x: Tensor, num_chunks: int, dim: int) -> Tensor:
    """``[reference, chunk 1, ..., chunk K]`` along ``dim`` to ``[reference, chunk 1, reference,
    chunk 2, ...]``.
    """
    reference, chunks = x.split([1, x.shape[dim] - 1], dim)
    pieces = chunks.chunk(num_chunks, dim)
    return torch.cat([each for piece in pieces for each in (reference, piece)], dim)


class IDContextCache:
    """State of a batch of streams; `A2VDiT.new_cache` makes one.

    Attributes:
        keys, values: ``(num_steps, num_layers, rows, heads, tokens, D / heads)``: the tokens of a
            head lie together, as matrix products want them. num_steps is 1 unless ``cache_noise``
            is per_step.
        mask: ``(rows, 1, 1, tokens)``, 0 where a row may look and -inf where not; kept up to date
            where it is needed.
        rotation: ``(rows, l * n, D / 2)``, of the current slot.
        num_frames: per row, latent frames committed since its start; 0 = the next chunk is its
            first.
        num_previous: per row, latent frames in the previous slot (right-aligned: next to the
            current slot).
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
        self.num_layers, self.num_heads, self.rows, self.always_mask = (
            num_layers,
            num_heads,
            rows,
            always_mask,
        )
        self.num_steps, self.device, self.dtype = num_steps, device, dtype
        self.num_tokens = height * width
        self.previous_frames = options.chunk_length if options.use_context else 0
        self.num_frames, self.num_previous = [0] * rows, [0] * rows
        self.step = self.num_current = 0
        tokens = (self.previous_frames + 1 + options.chunk_length) * self.num_tokens
        with torch.inference_mode(False):
            self.mask = torch.zeros(rows, 1, 1, tokens, device=device, dtype=dtype)
            self.rotation = self._table(1, options.chunk_length).repeat(rows, 1, 1)
            self._reference_rotation = self._table(
                0, 1
            )  # held: a captured graph goes on reading it
            self._make_slots(
                (num_steps, num_layers, rows, num_heads, tokens, rope.dim // num_heads)
            )
        self._positions: list[int] = []
        self._visible: list[tuple[int, bool]] = []
        self._refresh()

    def _make_slots(self, shape: tuple[int, ...]) -> None:
        self.keys = torch.zeros(shape, device=self.device, dtype=self.dtype)
        self.values = torch.zeros(shape, device=self.device, dtype=self.dtype)
        self._views: dict[tuple[int, int, int], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(
            x.numel() * x.element_size() for x in (self.keys, self.values, self.mask, self.rotation)
        )

    @property
    def reference_expected(self) -> bool:
        """Whether the next chunk comes with the reference in front: every one, or the first
        (``reference_attends``).
        """
        attends = self.options.reference_attends
        return attends == "every_chunk" or (attends == "first_chunk" and 0 in self.num_frames)

    @property
    def variant(self) -> Hashable:
        """What the next chunk's sequence of operations depends on, beside its length: one captured
        graph for each.
        """
        return self.reference_expected, self._start, self._masked

    # -- one denoising step ------------------------------------------------------------------------

    def begin(self, num_frames: int, step: int = 0) -> int:
        """Get ready for one forward of ``num_frames`` latents; returns how many of them are the
        reference (0 or 1).

        Raises:
            UserError: more frames than a chunk has, or rows that disagree on whether the reference
                is due.
        """
        has_reference = self.reference_expected
        first_alone = self.options.reference_attends == "first_chunk"
        if has_reference and first_alone and any(self.num_frames):
            raise UserError(
                "expected all rows at their first chunk with reference_attends=first_chunk, got "
                "rows in mid-stream: "
                "start the stream in a cache of its own and use copy_rows_"
            )
        length = self.options.chunk_length
        if not 1 <= num_frames - has_reference <= length:
            what = "the reference and 1" if has_reference else "1"
            raise UserError(
                f"expected {what} to {length} latent frames of one chunk, got {num_frames} frames "
                "in all"
            )
        self.step = step if self.options.cache_noise == "per_step" else 0
        if self.step >= self.num_steps:
            raise UserError(
                f"expected a step below {self.num_steps}, got {step}: allocate with a larger "
                "num_steps"
            )
        self.num_current = num_frames - has_reference
        self._has_reference = has_reference
        self._rotation = self.rotation[:, : self.num_current * self.num_tokens]
        if has_reference:
            self._rotation = torch.cat(
                [self._reference_rotation.expand(self.rows, -1, -1), self._rotation], dim=1
            )
        return int(has_reference)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        """Attention of the current chunk over its window; ``q, k, v (rows, f * n, D)``, not
        rotated.
        """
        q, k = rotate(q, self._rotation), rotate(k, self._rotation)
        if self._has_reference:
            n = self.num_tokens
            self.write_sink(layer, k[:, :n], v[:, :n])
            k, v = k[:, n:], v[:, n:]
        keys, values = self.update(layer, k, v)
        queries = split_heads(q, num_heads).to(values.dtype)
        return attend_heads(queries, keys, values, self.window_mask).to(v.dtype)

    @property
    def current_rotation(self) -> Tensor:
        """Rotations ``(rows, f * n, D / 2)`` of the tokens of the forward under way."""
        return self._rotation

    @property
    def window_mask(self) -> Tensor | None:
        """Mask of the window of the forward under way, None where every row sees all of it."""
        if not self._masked:
            return None
        end = (self.previous_frames + 1 + self.num_current) * self.num_tokens
        return self.mask[..., self._start : end]

    def slots(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where the forward under way writes keys and values, and the window that it attends to.

        All four are views ``(rows, heads, tokens, D / heads)`` of the buffers.
        """
        plan = (self.step, self._start, self.num_current)
        if plan not in self._views:
            self._views[plan] = self._make_views(*plan)
        return self._views[plan][layer]

    def update(self, layer: int, k: Tensor, v: Tensor) -> KeyValue:
        """Write rotated keys and values ``(rows, f * n, D)`` to the current slot; returns the
        window to attend to.

        That is of shape ``(rows, heads, tokens, D / heads)``.
        """
        if k.requires_grad or v.requires_grad:
            raise UserError(
                "expected torch.no_grad() with an IDContextCache, got tensors with a gradient: use "
                "it"
            )
        key_slot, value_slot, keys, values = self.slots(layer)
        key_slot.copy_(split_heads(k, self.num_heads))
        value_slot.copy_(split_heads(v, self.num_heads))
        return keys, values

    def _make_views(
        self, step: int, start: int, num_current: int
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        current = (self.previous_frames + 1) * self.num_tokens
        end = current + num_current * self.num_tokens
        slots = [
            (self.keys[step, layer], self.values[step, layer]) for layer in range(self.num_layers)
        ]
        new, window = slice(current, end), slice(start, end)
        return [(k[:, :, new], v[:, :, new], k[:, :, window], v[:, :, window]) for k, v in slots]

    def write_sink(
        self, layer: int, k: Tensor, v: Tensor, rows: Sequence[int] | None = None
    ) -> None:
        """Write the reference's rotated keys and values ``(rows, n, D)``: all rows unless they are
        named.
        """
        start = self.previous_frames * self.num_tokens
        every = self.options.reference_attends == "self"  # prefilled once, for all steps
        steps = slice(None) if every else slice(self.step, self.step + 1)
        for buffer, new in (
            (self.keys, split_heads(k, self.num_heads)),
            (self.values, split_heads(v, self.num_heads)),
        ):
            sink = buffer[steps, layer, :, :, start : start + self.num_tokens]
            if rows is None:
                sink.copy_(new)
            else:
                for i, row in enumerate(rows):
                    sink[:, row].copy_(new[i])

    # -- once per chunk ----------------------------------------------------------------------------

    def commit(self) -> None:
        """End the chunk: the current slot becomes the previous one, moved to its positions, in
        place.
        """
        if self.num_current == 0:
            raise UserError(
                "expected a chunk before commit(), got none: run the model with this cache first"
            )
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
        # Layer by layer: what one of them takes in between, in float32, stays small and in a GPU's
        # cache.
        shift = self._shift()
        for keys in self.keys.flatten(0, 1):
            moved = rotate(join_heads(keys[..., current, :]), shift)
            keys[..., previous, :] = split_heads(moved, self.num_heads)

    def _shift(self) -> Tensor:
        """Rotation from the current slot to the positions just before it: ``(rows, f * n, D /
        2)``.
        """
        first = 1 + self.options.chunk_length - self.num_current
        return self.rotation[:, : self.num_current * self.num_tokens].conj() * self._table(
            first, self.num_current
        )

    def _table(self, first: int, num_frames: int) -> Tensor:
        return self.rope.table(first, num_frames, self.height, self.width, self.device)

    def reset_rows(self, rows: Sequence[int] | None = None) -> None:
        """Let rows start anew with their next chunk (all rows unless named); their sinks stay until
        prefilled again.
        """
        for row in self.check_rows(rows):
            self.num_frames[row] = self.num_previous[row] = 0
            self._clear_previous(row)
        self._refresh()

    def clear(self) -> None:
        """Empty all slots, in place; all rows start anew with their next chunk, and need sinks."""
        self.keys.zero_()
        self.values.zero_()
        self.num_current = 0
        self.reset_rows()

    def _clear_previous(self, row: int) -> None:
        for buffer in (self.keys, self.values):  # a hidden slot must still be finite: 0 * NaN = NaN
            buffer[:, :, row, :, : self.previous_frames * self.num_tokens] = 0

    def check_rows(self, rows: Sequence[int] | None) -> Sequence[int]:
        """Returns the rows, all of them for None; a UserError when there is no such row."""
        for row in rows if rows is not None else ():
            if not 0 <= row < self.rows:
                raise UserError(
                    f"expected a row from 0 to {self.rows - 1}, got {row}: allocate more rows"
                )
        return rows if rows is not None else range(self.rows)

    def _refresh(self) -> None:
        """Bring rotation, mask and window in line with the rows' counters; the host knows all it
        needs.
        """
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
        visible = [
            (count, options.use_sink or new)
            for count, new in zip(self.num_previous, fresh, strict=True)
        ]
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
            start = self.previous_frames * n
            self.mask.zero_()
            for row, (count, sink) in enumerate(visible):
                self.mask[row, ..., : start - count * n].fill_(-torch.inf)
                if not sink:
                    self.mask[row, ..., start : start + n].fill_(-torch.inf)
            self._visible = visible

    # -- moving state ------------------------------------------------------------------------------

    def narrow(self, rows: int) -> Self:
        """The first ``rows`` rows as a cache of its own: the same memory, with counters that go
        their own way.
        """
        narrow = copy.copy(self)
        with torch.inference_mode(False):
            narrow.rows, narrow._views = rows, {}
            narrow.keys, narrow.values = self.keys[:, :, :rows], self.values[:, :, :rows]
            narrow.mask, narrow.rotation = self.mask[:rows].clone(), self.rotation[:rows].clone()
        narrow.num_frames, narrow.num_previous = self.num_frames[:rows], self.num_previous[:rows]
        narrow._positions, narrow._visible = [], []
        narrow._refresh()
        return narrow

    def copy_rows_(self, rows: Sequence[tuple[int, IDContextCache, int]]) -> None:
        """Takes over streams of other caches, between two chunks.

        The current slot is left out: it is written before it is read.

        Args:
            rows: (row here, source, row there) of each stream.

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
                    "expected a row of a cache with the same model and size, got another: allocate "
                    "both alike"
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
                f"got {tuple(state['keys'].shape)} and {state['keys'].dtype}: it is of another "
                "model or size"
            )
        self.keys.copy_(state["keys"])
        self.values.copy_(state["values"])
        self.num_frames, self.num_previous = list(state["num_frames"]), list(state["num_previous"])
        self.num_current = state["num_current"]
        self._refresh()


class SinkContext:
    """The reference alone: it sees itself, and its keys and values become the sink of some rows."""

    def __init__(self, cache: IDContextCache, rows: Sequence[int] | None, table: Tensor) -> None:
        self.cache, self.rows, self.table = cache, rows, table

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        """See `AttentionContext.attend`."""
        k = rotate(k, self.table)
        self.cache.write_sink(layer, k, v, self.rows)
        return attend(rotate(q, self.table), k, v, num_heads)
