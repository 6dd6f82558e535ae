# Copyright 2026 The retro-hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""One forward pass over the chunk grid: which token attends to which chunk, which chunks complete, what they retrieve.

B batch, T new tokens, V chunks that complete in the pass, m chunk_size, K neighbors, R neighbor_size, S = K · R.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache_retro import RetroState, attach_state, pad_to, per_row
from .configuration_retro import RetroConfig
from .modeling_retro_decoder import position_features
from .retriever_protocol_retro import RetroLookup


Neighbors = tuple[torch.Tensor, torch.Tensor]
"""Ids and boolean mask, of one shape."""


def _take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` (B, N) of `states` (B, L, d) as (B, N, d); the index L yields zeros."""
    batch_size, length, width = states.shape
    padded = torch.cat([states, states.new_zeros(batch_size, 1, width)], dim=1)
    start = torch.arange(batch_size, device=states.device).unsqueeze(1) * (length + 1)
    return padded.view(-1, width).index_select(0, (index + start).flatten()).view(batch_size, -1, width)


def _invert(cells: torch.Tensor, num_cells: int) -> torch.Tensor:
    """For every cell the column that lies in it, T if none; `cells` (B, T), entries equal to `num_cells` lie nowhere."""
    batch_size, num_columns = cells.shape
    columns = torch.arange(num_columns, device=cells.device).expand(batch_size, -1)
    inverse = torch.full((batch_size, num_cells + 1), num_columns, device=cells.device)
    return inverse.scatter(1, cells, columns)[:, :num_cells]


class RetroPass:
    """What the hooks of one forward pass need to know; a new object every pass, so that passes never mix."""

    shape: torch.Size | tuple[int, int]  # rows, and new tokens in each

    def __init__(self, reader: nn.Module, embed: nn.Module, config: RetroConfig, state: RetroState | None):
        self.reader = reader
        self.embed = embed
        self.config = config
        self.state = state
        self.layer_inputs: dict[int, torch.Tensor] = {}
        self.neighbor_states: torch.Tensor | None = None

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """E of the chunks that complete in this pass, (N, S, d'), given the residual stream at layer min(P)."""
        raise NotImplementedError

    def attend(
        self, layer_idx: int, hidden_states: torch.Tensor, neighbor_states: torch.Tensor | None
    ) -> torch.Tensor:
        """The update of layer `layer_idx`, of the shape of `hidden_states` (B, T, hidden_size)."""
        raise NotImplementedError

    def commit(self) -> None:
        """Count the tokens of a finished pass in the history; with it what must not be visible before."""
        raise NotImplementedError

    def position_table(self, neighbor_size: int, like: torch.Tensor) -> torch.Tensor:
        """Features of the distances in cross-attention, in decreasing order: `(m + R - 1, hidden_size)`.

        Equation 6 with m for the paper's l: d = i - i' + m - 1, the same for every neighbor.
        """
        if self.state is not None and self.state.features is not None:
            return self.state.features
        size = self.config.chunk_size
        steps = torch.arange(size + neighbor_size - 1, device=like.device)
        features = position_features(2 * size - 2 - steps, like.shape[-1], like.dtype)
        if self.state is not None:
            self.state.features = features
        return features

    def __call__(self, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Cross-attention of one layer: zero update or CCA(H, E) - H."""
        if hidden_states.shape[:-1] != self.shape:
            raise ValueError(
                f"The residual stream of the backbone's layer {layer_idx} has the shape {tuple(hidden_states.shape)}, but the "
                f"input has {self.shape[0]} rows of {self.shape[1]} tokens; RETRO needs one vector per "
                "token. Choose another backbone, such as Llama or GPT-2."
            )
        neighbor_states = self.neighbor_states
        if layer_idx == self.config.cross_attention_layers[0]:
            # A recomputation under gradient checkpointing runs this again; later layers keep the first result.
            neighbor_states = self.encode(hidden_states)
            if self.neighbor_states is None:
                self.neighbor_states = neighbor_states
        return self.attend(layer_idx, hidden_states, neighbor_states)


class GridPass(RetroPass):
    """A pass over many tokens: training, scoring, prefill, checking proposed tokens.

    Tokens are laid on a grid of V chunks that complete in this pass. With a cache, one more attending chunk comes
    first: tokens that still attend to the neighbors of the chunk completed before this pass.

    Args:
        positions (`torch.LongTensor` of shape `(B, T)`): chunk positions relative to the first chunk of the grid, -1 at
            padding.
        num_chunks (`int`): V.
        neighbor_input_ids, neighbor_mask (`(B, V, K, R)`, long and bool): neighbors of those chunks, None if V = 0.
        state (`RetroState`, *optional*): history to read and to extend.
        num_history (`torch.LongTensor` of shape `(B,)`): cells of the first chunk that an earlier pass has filled.
        first_cell (`torch.LongTensor` of shape `(B,)`): cell of the row's very first token, if it is in the first chunk.
        first_chunk, num_completed, num_tokens (`list[int]`): per row, on the host; only with a state.
        selected (`torch.LongTensor` of shape `(N,)`, *optional*): the chunks of all rows, by `row * V + chunk`, to be computed;
            the others have no neighbors. Only without a state.
    """

    def __init__(
        self,
        reader: nn.Module,
        embed: nn.Module,
        config: RetroConfig,
        positions: torch.Tensor,
        num_chunks: int,
        neighbor_input_ids: torch.Tensor | None,
        neighbor_mask: torch.Tensor | None,
        state: RetroState | None = None,
        num_history: torch.Tensor | None = None,
        first_cell: torch.Tensor | None = None,
        first_chunk: list[int] | None = None,
        num_completed: list[int] | None = None,
        num_tokens: list[int] | None = None,
        selected: torch.Tensor | None = None,
    ):
        super().__init__(reader, embed, config, state)
        size = config.chunk_size
        self.selected = selected
        self.num_chunks = num_chunks
        self.neighbor_input_ids = neighbor_input_ids
        self.neighbor_mask = neighbor_mask
        self.first_chunk = first_chunk
        self.num_completed = num_completed
        self.num_tokens = num_tokens
        self.positions = positions
        self.shape = positions.shape
        self.batch_size, num_columns = positions.shape

        # Attending chunks: token p attends to chunk (p + 1) // m - 1. Without a state there is none before the first.
        self.num_groups = num_chunks + (state is not None)
        cells = positions + 1 - (0 if state is not None else size)
        num_cells = self.num_groups * size
        self.cells = torch.where((positions >= 0) & (cells >= 0) & (cells < num_cells), cells, num_cells)
        self.queries = _invert(self.cells, num_cells)

        # Completing chunks: their m activations, of this pass or remembered.
        num_cells = num_chunks * size
        own = torch.where((positions >= 0) & (positions < num_cells), positions, num_cells)
        self.chunk_columns = _invert(own, num_cells)
        if state is not None:
            index = torch.arange(num_cells, device=positions.device).expand(self.batch_size, -1)
            remembered = (index < num_history[:, None]) & (index >= first_cell[:, None])
            self.chunk_columns = torch.where(remembered, index, self.chunk_columns + size)
        num_rows = num_columns + (size if state is not None else 0)
        self.chunk_mask = (self.chunk_columns < num_rows).view(-1, size)

    def chunk_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tokens of the completing chunks, (B, V, m), zero where a cell is empty."""
        if self.state is not None:
            input_ids = torch.cat([self._remembered("input_ids", input_ids), input_ids], dim=1)
        tokens = _take(input_ids.unsqueeze(-1), self.chunk_columns).squeeze(-1)
        return tokens.view(self.batch_size, self.num_chunks, -1)

    def _remembered(self, buffer: str, like: torch.Tensor) -> torch.Tensor:
        """The chunk that was growing before this pass, (B, m, ...)."""
        ring = self.state.read(buffer)
        if ring is None:
            return like.new_zeros(self.batch_size, self.config.chunk_size, *like.shape[2:])
        return _pick(ring, self.first_chunk)

    def write(self, buffer: str, values: torch.Tensor) -> None:
        """Remember the last two chunks of every row."""
        starts = [chunk * self.config.chunk_size for chunk in self.first_chunk]
        positions = self.positions + torch.tensor(starts, device=values.device).unsqueeze(1)
        recent = positions > positions.max(dim=1, keepdim=True).values - 2 * self.config.chunk_size
        self.state.write(buffer, torch.where((self.positions >= 0) & recent, positions, -1), values)

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        if self.state is not None:
            history = self._remembered("hidden_states", hidden_states)
            with_history = torch.cat([history, hidden_states], dim=1)
            self.write("hidden_states", hidden_states)  # over the history
            hidden_states = with_history
        if self.num_chunks == 0 or self.neighbor_input_ids is None:
            return None
        chunk_states = _take(hidden_states, self.chunk_columns).view(*self.chunk_mask.shape, -1)
        chunks = (
            self.neighbor_input_ids.flatten(0, 1),
            self.neighbor_mask.flatten(0, 1),
            chunk_states,
            self.chunk_mask,
        )
        if self.selected is not None:
            chunks = [tensor[self.selected] for tensor in chunks]
        return self.reader.encoder(*chunks, self.embed)

    def attend(
        self, layer_idx: int, hidden_states: torch.Tensor, neighbor_states: torch.Tensor | None
    ) -> torch.Tensor:
        size, state = self.config.chunk_size, self.state
        if neighbor_states is None and (state is None or layer_idx not in state.key_values):
            return torch.zeros_like(hidden_states)
        neighbor_size = state.neighbor_size if self.neighbor_input_ids is None else self.neighbor_input_ids.shape[-1]
        features = self.position_table(neighbor_size, hidden_states)
        queries = _take(hidden_states, self.queries).view(self.batch_size * self.num_groups, size, -1)
        num_rows = len(queries)
        if self.selected is not None:
            queries = queries[self.selected]
        update = self.reader.cross_attention[str(layer_idx)](
            queries, neighbor_states, features, neighbor_size, partial(self._recall, layer_idx)
        )
        if self.selected is not None:
            update = update.new_zeros(num_rows, *update.shape[1:]).index_copy(0, self.selected, update)
        return _take(update.view(self.batch_size, -1, update.shape[-1]), self.cells)

    def _recall(self, layer_idx: int, projected: tuple | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.state is None:
            mask = self.neighbor_mask.flatten(0, 1).flatten(1)
            return *projected, mask if self.selected is None else mask[self.selected]
        state, batch_size = self.state, self.batch_size
        before = [chunk - 1 for chunk in self.first_chunk]
        old_mask = _pick(state.neighbor_mask, before)
        old_mask = old_mask & torch.tensor([chunk >= 0 for chunk in before], device=old_mask.device).unsqueeze(1)
        if projected is None:
            key, value = (_pick(tensor, before) for tensor in state.key_values[layer_idx])
            if self.num_chunks:  # chunks complete, but nothing is known for them
                key, value = (tensor.repeat_interleave(self.num_groups, dim=0) for tensor in (key, value))
                blank = torch.zeros_like(old_mask).unsqueeze(1).expand(-1, self.num_chunks, -1)
                old_mask = torch.cat([old_mask.unsqueeze(1), blank], dim=1).flatten(0, 1)
            return key, value, old_mask
        num_tokens = old_mask.shape[-1]
        new = [pad_to(t, num_tokens, dim=-2).unflatten(0, (batch_size, self.num_chunks)) for t in projected]
        if layer_idx not in state.key_values:
            shape = (batch_size, 2, *new[0].shape[2:])
            state.key_values[layer_idx] = (new[0].new_zeros(shape), new[1].new_zeros(shape))
        old = tuple(pad_to(tensor, num_tokens, dim=-2) for tensor in state.key_values[layer_idx])
        gathered = [
            torch.cat([_pick(o, before).unsqueeze(1), n], dim=1).flatten(0, 1) for o, n in zip(old, new, strict=True)
        ]
        state.key_values[layer_idx] = tuple(self._latest(o, n) for o, n in zip(old, new, strict=True))
        new_mask = pad_to(self.neighbor_mask.flatten(2), num_tokens, dim=-1)
        return *gathered, torch.cat([old_mask.unsqueeze(1), new_mask], dim=1).flatten(0, 1)

    def _latest(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Halves (B, 2, ...) after this pass: of each parity the last completed chunk of `new` (B, V, ...), else `old`."""
        last = []  # per row and half: index into new, or -1
        for first, count in zip(self.first_chunk, self.num_completed, strict=True):
            done = {(first + v) % 2: v for v in range(max(count - 2, 0), count)}
            last.append([done.get(0, -1), done.get(1, -1)])
        index = torch.tensor(last, device=old.device)
        rows = torch.arange(self.batch_size, device=old.device).unsqueeze(1)
        keep = (index < 0).view(self.batch_size, 2, *[1] * (old.dim() - 2))
        return torch.where(keep, old, new[rows, index.clamp(min=0)])

    def commit(self) -> None:
        mask = self.state.neighbor_mask
        if mask is not None and self.num_chunks:
            new = mask.new_zeros(self.batch_size, self.num_chunks, mask.shape[-1])
            if self.neighbor_mask is not None:
                new = pad_to(self.neighbor_mask.flatten(2), mask.shape[-1], dim=-1)
            self.state.neighbor_mask = self._latest(mask, new)
        self.state.advance(self.num_tokens, self.positions.shape[1])


def _pick(halves: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Per row the half of `halves` (B, 2, ...) that holds chunk `chunks[b]`, (B, ...)."""
    return halves[per_row([chunk % 2 for chunk in chunks], halves.device)]


class StepPass(RetroPass):
    """A pass over one token per row with a history: the steady state of generation.

    Args:
        state (`RetroState`): history; its `lengths` are still those before the pass.
        rows (`list[int]`): rows whose chunk completes with this token.
        neighbor_input_ids, neighbor_mask (`(len(rows), K, R)`, long and bool): their neighbors, None if there are none.
    """

    def __init__(
        self,
        reader: nn.Module,
        embed: nn.Module,
        config: RetroConfig,
        state: RetroState,
        rows: list[int],
        neighbor_input_ids: torch.Tensor | None,
        neighbor_mask: torch.Tensor | None,
        device: torch.device,
    ):
        super().__init__(reader, embed, config, state)
        size = config.chunk_size
        self.shape = (len(state.lengths), 1)
        self.neighbor_input_ids = neighbor_input_ids
        self.neighbor_mask = neighbor_mask
        self.rows = torch.tensor(rows, device=device) if rows else None
        self.halves = torch.tensor([state.lengths[row] // size % 2 for row in rows], device=device) if rows else None
        self.origins = [max(state.offsets[row] - state.lengths[row] // size * size, 0) for row in rows]
        if rows and state.neighbor_mask is not None:
            mask = state.neighbor_mask.clone()
            mask[self.rows, self.halves] = False
            if neighbor_mask is not None:
                mask[self.rows, self.halves] = pad_to(neighbor_mask.flatten(1), mask.shape[-1], dim=-1)
            state.neighbor_mask = mask

        # What all layers read: the neighbors of the last completed chunk, -1 for none, and their distances.
        chunks = [(length + 1) // size - 1 for length in state.lengths]
        self.read = per_row([chunk % 2 for chunk in chunks], device)
        self.read_mask = None if state.neighbor_mask is None else state.neighbor_mask[self.read]
        if self.read_mask is not None and min(chunks) < 0:
            has_chunk = torch.tensor([chunk >= 0 for chunk in chunks], device=device)
            self.read_mask = self.read_mask & has_chunk.unsqueeze(1)
        self.features: torch.Tensor | None = None

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        state, size, device = self.state, self.config.chunk_size, hidden_states.device
        state.write("hidden_states", state.lengths, hidden_states)
        if state.neighbor_size is not None:
            windows = self.position_table(state.neighbor_size, hidden_states).unfold(0, state.neighbor_size, 1)
            # The further into its chunk a token is, the larger are its distances.
            first = [size - 1 - (length + 1) % size for length in state.lengths]
            window = windows[first[0] if len(set(first)) == 1 else torch.tensor(first, device=device)]
            self.features = window.transpose(-1, -2)
        if self.neighbor_input_ids is None:
            return None
        chunk_states = state.read("hidden_states")[self.rows, self.halves]
        cells = torch.arange(size, device=device)
        chunk_mask = cells >= torch.tensor(self.origins, device=device).unsqueeze(1)
        return self.reader.encoder(self.neighbor_input_ids, self.neighbor_mask, chunk_states, chunk_mask, self.embed)

    def attend(
        self, layer_idx: int, hidden_states: torch.Tensor, neighbor_states: torch.Tensor | None
    ) -> torch.Tensor:
        if neighbor_states is None and layer_idx not in self.state.key_values:
            return torch.zeros_like(hidden_states)
        recall = partial(self._recall, layer_idx)
        layer = self.reader.cross_attention[str(layer_idx)]
        return layer(hidden_states, neighbor_states, self.features, self.state.neighbor_size, recall)

    def _recall(self, layer_idx: int, projected: tuple | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        state = self.state
        if projected is not None:
            num_tokens = state.neighbor_mask.shape[-1]
            if layer_idx not in state.key_values:
                shape = (len(state.lengths), 2, *projected[0].shape[1:])
                state.key_values[layer_idx] = (projected[0].new_zeros(shape), projected[1].new_zeros(shape))
            updated = []
            for old, new in zip(state.key_values[layer_idx], projected, strict=True):
                old = pad_to(old, num_tokens, dim=-2).clone()
                old[self.rows, self.halves] = pad_to(new, num_tokens, dim=-2)
                updated.append(old)
            state.key_values[layer_idx] = tuple(updated)
        key, value = (tensor[self.read] for tensor in state.key_values[layer_idx])
        return key, value, self.read_mask

    def commit(self) -> None:
        self.state.advance([1] * len(self.state.lengths), 1)


def state_of(
    cache: Cache, batch_size: int, chunk_offset: int | torch.Tensor | None, config: RetroConfig
) -> RetroState:
    """The history on a cache, for a batch of `batch_size` rows; a new one if the cache is empty."""
    state = getattr(cache, "retro", None)
    if state is None:
        if int(cache.get_seq_length()) > 0:
            raise ValueError(
                f"The cache holds {int(cache.get_seq_length())} tokens that were processed without retrieval, so "
                "their chunks are unknown. Start from an empty cache, or give the retriever from the first call on."
            )
        state = RetroState(chunk_offsets(chunk_offset, batch_size, config.chunk_size), config.chunk_size)
        attach_state(cache, state)
    elif len(state.lengths) != batch_size:
        raise ValueError(
            f"The cache holds {len(state.lengths)} rows, the input {batch_size}. Use `batch_select_indices` or "
            "`batch_repeat_interleave` of the cache, or start from an empty one."
        )
    return state


class Planner:
    """Decides which chunks complete in a pass and fetches their neighbors, before any of it is computed.

    Args:
        reader (`nn.Module`): the model's [`RetroReader`].
        embed (`nn.Module`): the backbone's embedding.
        config ([`RetroConfig`]): of the model.
        state ([`RetroState`], *optional*): history on the cache.
        given (pair of tensors of shape `(B, C, K, R)`, *optional*): the caller's neighbors, by absolute chunk.
        retriever ([`RetroLookup`], *optional*): asked for what is not given.
    """

    def __init__(
        self,
        reader: nn.Module,
        embed: nn.Module,
        config: RetroConfig,
        state: RetroState | None,
        given: Neighbors | None,
        retriever: RetroLookup | None,
    ):
        self.parts = reader, embed, config
        self.size = config.chunk_size
        self.state = state
        self.given = given
        self.retriever = retriever

    def plan(
        self, tokens: torch.Tensor, real: torch.Tensor | None, chunk_offset: int | torch.Tensor | None
    ) -> "RetroPass":
        """The pass over new tokens.

        Args:
            tokens (`torch.LongTensor` of shape `(B, T)`, or embeddings of shape `(B, T, hidden_size)`): new tokens.
            real (`torch.BoolTensor` of shape `(B, T)`, *optional*): False at padding.
            chunk_offset (`int` or `torch.LongTensor` of shape `(B,)`, *optional*): of rows without a history.
        """
        if self.state is not None and tokens.shape[1] == 1 and self.state.is_started:
            return self._plan_step(self.state, tokens)
        return self._plan_grid(tokens, real, chunk_offset)

    def _plan_step(self, state: RetroState, tokens: torch.Tensor) -> "StepPass":
        device = tokens.device
        if tokens.dim() == 2:
            state.write("input_ids", state.lengths, tokens)
        rows = [row for row, length in enumerate(state.lengths) if (length + 1) % self.size == 0]
        ids = mask = None
        if rows:
            chunks = [state.lengths[row] // self.size for row in rows]
            index = torch.tensor(rows, device=device)
            halves = torch.tensor([chunk % 2 for chunk in chunks], device=device)
            origins = [state.offsets[row] - chunk * self.size for row, chunk in zip(rows, chunks, strict=True)]

            def chunk_tokens(selected: torch.Tensor) -> Neighbors:
                real = torch.arange(self.size, device=device) >= torch.tensor(origins, device=device).unsqueeze(1)
                return state.read("input_ids")[index, halves][selected], real[selected]

            every = torch.ones_like(index, dtype=torch.bool)
            ids, mask = self._neighbors(index, torch.tensor(chunks, device=device), every, chunk_tokens)
        return StepPass(*self.parts, state, rows, ids, mask, device)

    def _plan_grid(
        self, tokens: torch.Tensor, real: torch.Tensor | None, chunk_offset: int | torch.Tensor | None
    ) -> "GridPass":
        size, state, device = self.size, self.state, tokens.device
        batch_size, num_tokens = tokens.shape[:2]
        begins = chunk_offsets(chunk_offset, batch_size, size) if state is None else state.lengths
        # Without a history the grid begins at chunk 0, with one at the chunk that is growing.
        first_chunk = [0] * batch_size if state is None else [length // size for length in begins]
        start = torch.tensor([n - c * size for n, c in zip(begins, first_chunk, strict=True)], device=device)
        order = torch.arange(num_tokens, device=device).expand(batch_size, -1)
        if real is not None:
            order = real.long().cumsum(dim=1) - 1
        positions = order + start.unsqueeze(1)
        positions = positions if real is None else torch.where(real, positions, -1)

        if state is None and self.retriever is None and self.given is not None:
            # Training: shapes alone decide, so that no value has to be read back.
            bound = num_tokens if chunk_offset is None else num_tokens + size - 1
            num_chunks = min(self.given[0].shape[1], bound // size)
            ids, mask = (tensor[:, :num_chunks] for tensor in self.given)
            selected = None
            if chunk_offset is not None:
                # Its values were read: reading the mask, too, spares all chunks of a question but the last.
                has_neighbor = mask.flatten(2).any(dim=-1).flatten()
                if 0 < int(has_neighbor.sum()) < len(has_neighbor):
                    selected = has_neighbor.nonzero().squeeze(1)
            return GridPass(*self.parts, positions, num_chunks, ids, mask, selected=selected)

        counts = [num_tokens] * batch_size if real is None else real.sum(dim=1).tolist()
        ends = [n - c * size + count for n, c, count in zip(begins, first_chunk, counts, strict=True)]
        num_completed = [end // size for end in ends]
        num_chunks = max(num_completed)
        history: dict[str, Any] = {}
        if state is not None:
            origins = [max(o - c * size, 0) for o, c in zip(state.offsets, first_chunk, strict=True)]
            history = {
                "state": state,
                "num_history": start,
                "first_cell": torch.tensor(origins, device=device),
                "first_chunk": first_chunk,
                "num_completed": num_completed,
                "num_tokens": counts,
            }
        grid = GridPass(*self.parts, positions, num_chunks, None, None, **history)
        if num_chunks:
            steps = torch.arange(num_chunks, device=device)
            complete = torch.tensor(num_completed, device=device).unsqueeze(1) > steps
            rows = torch.arange(batch_size, device=device).repeat_interleave(num_chunks)
            chunks = torch.tensor(first_chunk, device=device).unsqueeze(1) + steps

            def chunk_tokens(selected: torch.Tensor) -> Neighbors:
                return grid.chunk_tokens(tokens).flatten(0, 1)[selected], grid.chunk_mask[selected]

            ids, mask = self._neighbors(rows, chunks.flatten(), complete.flatten(), chunk_tokens)
            if ids is not None and mask is not None:
                grid.neighbor_input_ids = ids.unflatten(0, (batch_size, num_chunks))
                grid.neighbor_mask = mask.unflatten(0, (batch_size, num_chunks))
        if state is not None and tokens.dim() == 2:
            grid.write("input_ids", tokens)
        return grid

    def _neighbors(
        self,
        rows: torch.Tensor,
        chunks: torch.Tensor,
        wanted: torch.Tensor,
        chunk_tokens: Callable[[torch.Tensor], Neighbors],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Neighbors (n, K, R) of n chunks: the given ones, else the retriever's, else masked; None if there are none.

        Args:
            rows, chunks (`torch.LongTensor` of shape `(n,)`): row and absolute chunk index.
            wanted (`torch.BoolTensor` of shape `(n,)`): chunks that need neighbors.
            chunk_tokens (`Callable`): maps a boolean selection to tokens and mask `(selected, m)` for the retriever.
        """
        ids = mask = None
        if self.given is not None and self.given[0].shape[1] > 0:
            known = chunks < self.given[0].shape[1]
            at = chunks.clamp(max=self.given[0].shape[1] - 1)
            ids, mask = self.given[0][rows, at], self.given[1][rows, at] & known[:, None, None]
            wanted = wanted & ~known
        if self.retriever is not None and bool(wanted.any()):
            found, found_mask = self.retriever(*chunk_tokens(wanted))
            if ids is None or mask is None:
                ids = found.new_zeros(len(rows), *found.shape[1:])
                mask = torch.zeros_like(ids, dtype=torch.bool)
            elif found.shape[-1] != ids.shape[-1]:
                raise ValueError(
                    f"The retriever returned neighbors of {found.shape[-1]} tokens, `neighbor_input_ids` has "
                    f"{ids.shape[-1]}; both must have the same neighbor_size."
                )
            width = max(ids.shape[1], found.shape[1])
            ids, mask = pad_to(ids, width, 1).clone(), pad_to(mask, width, 1).clone()
            ids[wanted], mask[wanted] = pad_to(found, width, 1), pad_to(found_mask, width, 1)
        if ids is not None and self.state is not None:
            _make_room(self.state, ids)
        return ids, mask


def _make_room(state: RetroState, neighbor_input_ids: torch.Tensor) -> None:
    """Make the history wide enough for neighbors (n, K, R)."""
    num_neighbors, size = neighbor_input_ids.shape[-2:]
    if state.neighbor_size not in (None, size):
        raise ValueError(
            f"Neighbors of {size} tokens follow neighbors of {state.neighbor_size} in one sequence; the neighbor_size of a "
            "retriever must not change while generating."
        )
    state.neighbor_size = size
    state.grow_neighbors(num_neighbors * size, neighbor_input_ids.device)


def chunk_offsets(chunk_offset: int | torch.Tensor | None, batch_size: int, chunk_size: int) -> list[int]:
    """Chunk offsets as one integer per row, checked."""
    if chunk_offset is None:
        return [0] * batch_size
    values = chunk_offset.tolist() if isinstance(chunk_offset, torch.Tensor) else chunk_offset
    values = list(values) if isinstance(values, (list, tuple)) else [values] * batch_size
    if len(values) != batch_size or not all(isinstance(value, int) and 0 <= value < chunk_size for value in values):
        raise ValueError(
            f"`chunk_offset` must be one integer from 0 to {chunk_size - 1}, or one per row of the batch of {batch_size}, "
            f"got {chunk_offset}."
        )
    return values


def real_tokens(
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    state: RetroState | None,
    batch_size: int,
    num_tokens: int,
) -> torch.Tensor | None:
    """Which of the new tokens are no padding, (B, T), or None if all are real.

    A 4-D mask says nothing about padding; then the position of the last token tells how many tokens came before it.
    """
    num_columns = num_tokens + (0 if state is None else state.num_columns)
    positions = position_ids if position_ids is not None and position_ids.dim() == 2 else None
    real = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        if attention_mask.shape != (batch_size, num_columns):
            raise ValueError(
                f"`attention_mask` must have shape {(batch_size, num_columns)}, one entry per token of the input and of "
                f"the cache, got {tuple(attention_mask.shape)}."
            )
        real = attention_mask[:, -num_tokens:].bool()
    elif attention_mask is not None and positions is not None:
        num_padding = (num_columns - 1 - positions[:, -1:]).expand(batch_size, -1)
        real = torch.arange(num_columns - num_tokens, num_columns, device=positions.device) >= num_padding
    if positions is not None and num_tokens > 1:
        restarts = positions.diff(dim=-1) != 1
        if real is not None:
            restarts = restarts & real[:, 1:] & real[:, :-1]
        if restarts.any():
            raise ValueError(
                "`position_ids` restart inside a row, so it packs several sequences, whose chunks cannot be told apart. Give "
                "each sequence a row of its own (`packing=False`)."
            )
    return real


__all__ = ["GridPass", "Planner", "RetroPass", "StepPass", "chunk_offsets", "real_tokens", "state_of"]
