# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What cached decoding must keep of every row, attached to the `Cache` that the backbone uses."""

from functools import cache
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import is_torchdynamo_compiling

from .values_retro import shown


# Appending to a buffer costs one token; `torch.cat` would copy all tokens at every step. A buffer that is full moves to a
# larger one, once in so many steps.
ROOM = 256
"""Buffers of keys and values grow to a multiple of this many tokens."""


class Kept(NamedTuple):
    """Which of the chunks that complete in a pass are kept: chunk `index[i]` goes to half `halves[i]` of row `rows[i]`.

    All three are `torch.LongTensor` of shape `(n,)`. An index behind the last chunk stands for a chunk without neighbors.
    """

    rows: torch.Tensor
    halves: torch.Tensor
    index: torch.Tensor

    def among(self, selected: torch.Tensor) -> "Kept":
        """The same with the places of the chunks in `selected` (V',), which is sorted; V' for those that are not in it."""
        place = torch.searchsorted(selected, self.index.contiguous())
        found = selected[place.clamp(max=len(selected) - 1)] == self.index
        return self._replace(index=torch.where(found, place, len(selected)))

    def put(self, buffer: torch.Tensor, new: torch.Tensor | None) -> torch.Tensor:
        """A copy of `buffer` (B, 2, ...) that holds the kept entries of `new` (V, ...), or zeros where there are none."""
        buffer = buffer.clone()  # autograd may have saved the old one
        if new is None:
            buffer[self.rows, self.halves] = 0
        else:
            exists = (self.index < len(new)).view(-1, *[1] * (new.dim() - 1))
            kept = new[self.index.clamp(max=len(new) - 1)]
            buffer[self.rows, self.halves] = torch.where(exists, kept, torch.zeros_like(kept))
        return buffer


class RetrievalState:
    """The history of one batch: the tokens, activations and encoded neighbors of the last two chunks of every row.

    Positions are chunk positions (see `chunking_retro.py`). Chunk u is in half `u % 2` of every buffer. Two halves are
    enough. While chunk u is unfinished, tokens attend to the neighbors of chunk u - 1. Assisted decoding may take back the
    tokens of at most one chunk; then chunk u - 1 is unfinished again, and its tokens are still there. With m = 4, after nine
    tokens:

        half 0   chunk 2, unfinished  i . . .    (chunk 0 was here)
        half 1   chunk 1, completed   e f g h

    Args:
        offsets (`list[int]`): chunk position of each row's first token.
        chunk_size (`int`): tokens per chunk, m.

    Attributes:
        next_positions (`list[int]`): chunk position of each row's next token; on the host, so that a decoding step knows
            without a device-to-host copy whether it completes a chunk.
        num_columns (`int`): tokens in the backbone's cache, padding included.
        neighbor_size (`int`): tokens of one neighbor, R; None before the first retrieval.
        input_ids (`torch.LongTensor` of shape `(B, 2 m + 1)`): tokens; what must not be kept is written to the last cell.
        hidden_states (`torch.FloatTensor` of shape `(B, 2 m + 1, hidden_size)`): the residual stream at the first layer with
            cross-attention.
        sinusoids (`torch.FloatTensor` of shape `(m + R - 1, hidden_size)`): the distances in cross-attention, as sinusoids.
        key_values (`dict[int, tuple]`): per layer, keys and values of shape `(B, 2, heads, S, D)` of the encoded neighbors.
        neighbors (`list` of B lists of two tuples): encoded neighbors, where the reader is `parallel_context`.
        neighbor_mask (`torch.BoolTensor` of shape `(B, 2, S)`): which of the S = K · R neighbor tokens are real.
    """

    def __init__(self, offsets: list[int], chunk_size: int):
        self.chunk_size = chunk_size
        self.offsets = list(offsets)
        self.next_positions = list(offsets)
        self.neighbors: list[list[tuple]] = [[(), ()] for _ in offsets]
        self.num_columns = 0
        self.neighbor_size: int | None = None
        self.input_ids: torch.Tensor | None = None
        self.hidden_states: torch.Tensor | None = None
        self.neighbor_mask: torch.Tensor | None = None
        self.sinusoids: torch.Tensor | None = None
        self.key_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def is_started(self) -> bool:
        """Whether every row has had a token other than padding."""
        return all(length > offset for length, offset in zip(self.next_positions, self.offsets, strict=True))

    def unfinished_chunks(self) -> list[tuple[int, list[int]]]:
        """For each row its unfinished chunk, and the tokens of that; -1 in cells before the row's first token."""
        ring, chunks = self.read("input_ids"), []
        for row, (position, offset) in enumerate(zip(self.next_positions, self.offsets, strict=True)):
            chunk, count = divmod(position, self.chunk_size)
            cells = [-1] * count if ring is None else ring[row, chunk % 2, :count].tolist()
            empty = max(offset - chunk * self.chunk_size, 0)
            chunks.append((chunk, [-1] * empty + cells[empty:]))
        return chunks

    # ── encoded neighbors ─────────────────────────────────────────────────────────────────────────────────────────────

    def make_room(self, neighbor_input_ids: torch.Tensor) -> None:
        """Make room for the neighbors `(V, K, R)` of another pass.

        Raises:
            ValueError: if their length differs from that of earlier neighbors.
        """
        num_neighbors, neighbor_size = neighbor_input_ids.shape[-2:]
        if self.neighbor_size not in (None, neighbor_size):
            raise ValueError(
                f"Neighbors of {neighbor_size} tokens follow neighbors of {self.neighbor_size} in one sequence; the "
                "neighbor_size of a retriever must not change while generating."
            )
        self.neighbor_size = neighbor_size
        num_tokens = num_neighbors * neighbor_size
        if self.neighbor_mask is None:
            self.neighbor_mask = torch.zeros(
                len(self.next_positions), 2, num_tokens, dtype=torch.bool, device=neighbor_input_ids.device
            )
        self.neighbor_mask = pad_to(self.neighbor_mask, num_tokens, dim=-1)

    def choose_kept(
        self, first_chunk: list[int], num_completed: list[int], device: torch.device, rows: list[int] | None = None
    ) -> Kept | None:
        """Choose the chunks of a pass that are kept: the last two of each row that complete. None if no chunk completes.

        Args:
            first_chunk, num_completed (`list[int]`): per row, the first chunk that can complete and how many do.
            device (`torch.device`): of the result.
            rows (`list[int]`, *optional*): the rows to which the entries of both lists belong; all rows by default.
        """
        # Chunk u and chunk u + 2 share a half, so of more than two chunks only the last two are written; writing all of them
        # would leave the order, and so the winner, to the device.
        width = max(num_completed, default=0)
        places = [
            (row, (chunk + step) % 2, number * width + step)
            for number, (row, chunk, count) in enumerate(
                zip(range(len(first_chunk)) if rows is None else rows, first_chunk, num_completed, strict=True)
            )
            for step in range(max(count - 2, 0), count)
        ]
        return Kept(*torch.tensor(places, device=device).unbind(dim=1)) if places else None

    def keep_key_values(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor, kept: Kept | None) -> None:
        """Keep keys and values (V, heads, S', D) of chunks that complete; S' may be less than S."""
        num_tokens = self.neighbor_mask.shape[-1]
        old = self._key_values(layer_idx, key, value)
        if kept is not None:
            new = (pad_to(tensor, num_tokens, dim=-2) for tensor in (key, value))
            old = tuple(kept.put(buffer, tensor) for buffer, tensor in zip(old, new, strict=True))
        self.key_values[layer_idx] = old

    def recall_key_values(
        self, layer_idx: int, index: tuple, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, heads, S, D) in the half `index` of each row. Before the first retrieval, zeros shaped like `key` and `value`."""
        keys, values = self._key_values(layer_idx, key, value)
        return keys[index], values[index]

    def _key_values(
        self, layer_idx: int, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens = self.neighbor_mask.shape[-1]
        if layer_idx in self.key_values:
            return tuple(pad_to(halves, num_tokens, dim=-2) for halves in self.key_values[layer_idx])
        batch_size = len(self.next_positions)
        return tuple(new.new_zeros(batch_size, 2, new.shape[1], num_tokens, new.shape[-1]) for new in (key, value))

    # ── rows and tokens ───────────────────────────────────────────────────────────────────────────────────────────────

    def _map(self, function) -> None:
        for name in ("input_ids", "hidden_states", "neighbor_mask"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))
        self.key_values = {layer: (function(k), function(v)) for layer, (k, v) in self.key_values.items()}

    def select(self, indices: torch.Tensor) -> None:
        """Keep or reorder rows; `indices` of shape `(new batch size,)`."""
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))
        if any(map(any, self.neighbors)):
            self.neighbors = [list(self.neighbors[i]) for i in indices.tolist()]
        else:
            self.neighbors = [[(), ()] for _ in indices]
        # If all are equal, spare the copy from the device.
        if len(set(zip(self.next_positions, self.offsets, strict=True))) > 1:
            order = indices.tolist()
            self.next_positions = [self.next_positions[i] for i in order]
            self.offsets = [self.offsets[i] for i in order]
        else:
            self.next_positions = self.next_positions[:1] * len(indices)
            self.offsets = self.offsets[:1] * len(indices)

    def advance(self, num_tokens: list[int], num_columns: int) -> None:
        """Count the tokens of a finished pass: those of each row without padding, and the columns with padding."""
        self.next_positions = [length + count for length, count in zip(self.next_positions, num_tokens, strict=True)]
        self.num_columns += num_columns

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        self.neighbors = [list(row) for row in self.neighbors for _ in range(repeats)]
        self.next_positions = [length for length in self.next_positions for _ in range(repeats)]
        self.offsets = [offset for offset in self.offsets for _ in range(repeats)]

    @classmethod
    def join(cls, states: list["RetrievalState"], num_columns: int) -> "RetrievalState":
        """The rows of several states of one model, whose neighbors are of one size, as one state."""
        first = states[0]
        new = cls([offset for state in states for offset in state.offsets], first.chunk_size)
        new.next_positions = [position for state in states for position in state.next_positions]
        new.neighbors = [row for state in states for row in state.neighbors]
        new.num_columns, new.neighbor_size, new.sinusoids = num_columns, first.neighbor_size, first.sinusoids

        def joined(parts: list[torch.Tensor | None], dim: int) -> torch.Tensor | None:
            like = max((part for part in parts if part is not None), key=lambda part: part.shape[dim], default=None)
            if like is None:
                return None
            # Rows that have read nothing yet may lack a part, which is then empty.
            rows = [like.new_zeros(len(state.next_positions), *like.shape[1:]) for state in states]
            return torch.cat(
                [
                    row if part is None else pad_to(part, like.shape[dim], dim)
                    for row, part in zip(rows, parts, strict=True)
                ]
            )

        for name, dim in (("input_ids", 1), ("hidden_states", 1), ("neighbor_mask", 2)):
            setattr(new, name, joined([getattr(state, name) for state in states], dim))
        for layer in sorted({layer for state in states for layer in state.key_values}):
            pairs = [state.key_values.get(layer, (None, None)) for state in states]
            new.key_values[layer] = tuple(joined([pair[kind] for pair in pairs], -2) for kind in (0, 1))
        return new

    def crop(self, num_tokens: int) -> None:
        """Remove the last `num_tokens` tokens of every row.

        Raises:
            ValueError: if that is more than one chunk, because no more is kept.
        """
        if num_tokens > self.chunk_size:
            raise ValueError(
                f"Cannot take back {num_tokens} tokens: the retrieval state keeps one chunk of {self.chunk_size}. Propose "
                f"at most {self.chunk_size} tokens at a time (`prompt_lookup_num_tokens`, `num_assistant_tokens`)."
            )
        # Only the counters move back. What is in the buffers behind them is overwritten before it is read again, and the
        # neighbors of the chunk before are still in the other half.
        self.next_positions = [max(n - num_tokens, o) for n, o in zip(self.next_positions, self.offsets, strict=True)]
        self.num_columns -= num_tokens

    def read(self, buffer: str) -> torch.Tensor | None:
        """What `write` kept, by halves, of shape `(B, 2, m, ...)`; None before the first `write`."""
        ring = getattr(self, buffer)
        return None if ring is None else ring[:, :-1].unflatten(1, (2, self.chunk_size))

    def with_kept(self, buffer: str, chunks: list[int], values: torch.Tensor) -> torch.Tensor:
        """What `write` kept of the chunk `chunks[b]` of each row, zeros before the first `write`, then `values` (B, T, ...)."""
        kept = self.read(buffer)
        if kept is None:
            kept = values.new_zeros(len(values), self.chunk_size, *values.shape[2:])
        else:
            kept = kept[per_row([chunk % 2 for chunk in chunks], values.device)]
        return torch.cat([kept, values], dim=1)

    def write(self, buffer: str, positions: torch.Tensor | list[int], values: torch.Tensor) -> None:
        """Write a value per token at its chunk position, in place. `crop` cannot bring back what this overwrites.

        Args:
            buffer (`str`): `"input_ids"` or `"hidden_states"`.
            positions (`torch.LongTensor` of shape `(B, T)`, or one `int` per row if T = 1): chunk positions, -1 for tokens
                that are not kept; the others of a row must be within two chunks.
            values (`torch.Tensor` of shape `(B, T, ...)`): what to write.
        """
        # The buffer is a ring of two chunks, and one more cell that takes what must not be kept: a write to a cell that
        # nobody reads costs less than a mask, whose true entries the host would have to count.
        size = 2 * self.chunk_size
        ring = getattr(self, buffer)
        if ring is None:
            ring = values.new_zeros(len(values), size + 1, *values.shape[2:])
        elif not _is_writable(ring):
            ring = ring.clone()
        if isinstance(positions, list):
            ring[per_row([position % size for position in positions], ring.device)] = values[:, 0]
        else:
            rows = torch.arange(len(values), device=values.device).unsqueeze(1)
            ring[rows, torch.where(positions >= 0, positions % size, size)] = values
        setattr(self, buffer, ring)


def _is_writable(tensor: torch.Tensor) -> bool:
    """Whether a tensor may be changed in place: one made in inference mode may be changed only there."""
    return is_torchdynamo_compiling() or tensor.is_inference() == torch.is_inference_mode_enabled()


def per_row(indices: list[int], device: torch.device) -> tuple:
    """An index for entry `indices[b]` of every row b. If all are equal it is a plain number, which needs no copy."""
    if len(set(indices)) == 1:
        return slice(None), indices[0]
    return torch.arange(len(indices), device=device), torch.tensor(indices, device=device)


def pad_to(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Append zeros along `dim` until it has at least `size` entries."""
    missing = size - tensor.shape[dim]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def _room_before(seen: torch.Tensor) -> int:
    """The number of slots before the first token of `seen` (B, heads, L, D), a view of a larger buffer."""
    return seen.storage_offset() % seen.stride(1) // seen.stride(2) if seen.numel() else 0


def _move(seen: torch.Tensor, before: int, length: int) -> torch.Tensor:
    """Copy `seen` (B, heads, L, D) to a new buffer that has `before` slots before it and room for `length` tokens.

    What the old buffer has before `seen` is copied, too, as far as the new slots reach.
    """
    buffer = seen.new_zeros(*seen.shape[:2], -(-(before + length) // ROOM) * ROOM, seen.shape[-1])
    kept = min(_room_before(seen), before)
    size = kept + seen.shape[-2]
    offset = seen.storage_offset() - kept * seen.stride(2)
    old = seen.as_strided((*seen.shape[:2], size, seen.shape[-1]), seen.stride(), offset)
    buffer[:, :, before - kept : before - kept + size] = old
    return buffer[:, :, before : before + seen.shape[-2]]


def _append(seen: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Append `new` (B, heads, T, D) to `seen` (B, heads, L, D), in place where the buffer of `seen` has room for it."""
    if seen.numel() == 0:
        grown = new.new_empty(*new.shape[:2], -(-new.shape[-2] // ROOM) * ROOM, new.shape[-1])[:, :, : new.shape[-2]]
        grown.copy_(new)
        return grown
    # `seen` is a view of a buffer, and its strides tell how much of the buffer is before it and behind it. A tensor that
    # `index_select` has made (beams) fills its buffer, so it moves to one with room.
    total = seen.shape[-2] + new.shape[-2]
    before = _room_before(seen)
    if seen.stride(1) // seen.stride(2) - before < total or not _is_writable(seen):
        seen = _move(seen, before, total)
    grown = seen.as_strided((*seen.shape[:2], total, seen.shape[-1]), seen.stride())
    grown[:, :, seen.shape[-2] :] = new
    return grown


class RetroDynamicLayer(DynamicLayer):
    """A layer of a `DynamicCache` that appends new tokens in place; its parent copies all tokens at every step.

    Its buffer may also hold keys and values of neighbors, before those of the text. `neighbors_before` names them for each row.
    """

    neighbors_before: list[Any]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values `(B, heads, T, D)` and return all of them; as in transformers."""
        if torch.is_grad_enabled() or is_torchdynamo_compiling():  # what autograd has saved must not change
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = _append(self.keys, key_states), _append(self.values, value_states)
        return self.keys, self.values

    def make_room_before(self, size: int, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that have `size` slots before them. If there are fewer, both move to buffers that have `room` slots."""
        if min(_room_before(self.keys), _room_before(self.values)) < size or not _is_writable(self.keys):
            self.keys, self.values = (
                _move(tensor, max(size, room), tensor.shape[-2]) for tensor in (self.keys, self.values)
            )
            self.neighbors_before = [None] * len(self.keys)
        return self.keys, self.values


class RetroCacheMixin:
    """Keeps a [`RetrievalState`] in step with the cache that holds it."""

    retrieval_state: RetrievalState | None = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows, as beam search does."""
        super().reorder_cache(beam_idx)
        if self.retrieval_state is not None:
            self.retrieval_state.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, as assisted decoding does.

        Raises:
            ValueError: for a positive number, which some releases of transformers read as the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes the negative number of tokens to remove, got {tokens_to_remove}.")
        if self.retrieval_state is not None and tokens_to_remove:
            self.retrieval_state.crop(-tokens_to_remove)
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat rows."""
        super().batch_repeat_interleave(repeats)
        if self.retrieval_state is not None:
            self.retrieval_state.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows."""
        super().batch_select_indices(indices)
        if self.retrieval_state is not None:
            self.retrieval_state.select(indices)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.retrieval_state = None

    def __reduce__(self) -> tuple:
        return _restore, (type(self).__bases__[1], self.__dict__)


@cache
def _retro_class(cls: type[Cache]) -> type[Cache]:
    return type(f"Retro{cls.__name__}", (RetroCacheMixin, cls), {"__module__": __name__})


def _restore(cls: type[Cache], attributes: dict) -> Cache:
    """Rebuild a copied cache. Its class is made at run time, so the copy records only the class that it extends."""
    cache = cls.__new__(cls)
    cache.__dict__.update(attributes)
    attach_state(cache, attributes.get("retrieval_state"))
    return cache


def attach_state(cache: Any, state: RetrievalState | None) -> None:
    """Give a cache of any class a retrieval state, in place.

    The caller keeps using the same object, and `isinstance` still holds: the cache gets a subclass of its own class.
    """
    if not isinstance(cache, RetroCacheMixin):
        cache.__class__ = _retro_class(type(cache))
        for layer in cache.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = RetroDynamicLayer
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = RetroDynamicLayer
    cache.retrieval_state = state


def state_of(
    cache: Cache, batch_size: int, chunk_offset: int | torch.Tensor | None, chunk_size: int
) -> RetrievalState:
    """The history on a cache, for a batch of `batch_size` rows; a new one if the cache is empty."""
    state = getattr(cache, "retrieval_state", None)
    if state is None:
        if int(cache.get_seq_length()) > 0:
            raise ValueError(
                f"The cache holds {int(cache.get_seq_length())} tokens that were processed without retrieval, so "
                "their chunks are unknown. Start from an empty cache, or give the retriever from the first call on."
            )
        state = RetrievalState(chunk_offsets(chunk_offset, batch_size, chunk_size), chunk_size)
        attach_state(cache, state)
    elif len(state.next_positions) != batch_size:
        raise ValueError(
            f"The cache holds {len(state.next_positions)} rows, the input {batch_size}. Use `batch_select_indices` or "
            "`batch_repeat_interleave` of the cache, or start from an empty one."
        )
    return state


def chunk_offsets(chunk_offset: int | torch.Tensor | None, batch_size: int, chunk_size: int) -> list[int]:
    """Chunk offsets as one integer per row, checked."""
    if chunk_offset is None:
        return [0] * batch_size
    values = chunk_offset.tolist() if isinstance(chunk_offset, torch.Tensor) else chunk_offset
    values = list(values) if isinstance(values, (list, tuple)) else [values] * batch_size
    if len(values) != batch_size or not all(isinstance(value, int) and 0 <= value < chunk_size for value in values):
        raise ValueError(
            f"`chunk_offset` must be one integer from 0 to {chunk_size - 1}, or one per row of the batch of {batch_size}, "
            f"got {shown(chunk_offset)}."
        )
    return values
