# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The chunk arithmetic of one forward pass: which chunks complete, what they retrieve, which token attends to which chunk.

B rows, T new tokens, m chunk_size, V chunks that complete, N attending chunks of Q tokens, K neighbors of R tokens, S = K · R.

The *chunk position* of a token is the number of real tokens before it in its row, plus the row's `chunk_offset`. Chunk u
holds the positions u · m to u · m + m - 1. Padding gets the position -1 and is counted nowhere. So the result does not depend
on the side on which a row is padded, or on the amount of padding.

**Example.** m = 4, and two rows of seven columns; the second row is left-padded.

    column               0   1   2   3   4   5   6
    row 0   token        a   b   c   d   e   f   g
            position     0   1   2   3   4   5   6
            attends to   -   -   -   0   0   0   0
    row 1   token        .   .   h   i   j   k   l
            position    -1  -1   0   1   2   3   4
            attends to   -   -   -   -   -   0   0

Chunk 0 completes in both rows: `a b c d` and `h i j k`. The retriever looks both up. The last token of a chunk is the first
one that may attend to the chunk's neighbors, because it predicts the first token of the next chunk. So the token at position p
attends to the neighbors of chunk (p + 1) // m - 1. The *attending chunks* of equation 3 are `d e f g` and `k l`; the second
one has two empty cells.

A plan numbers the tokens of all rows: token `column` of row `row` is `row · T + column`. An empty cell is `B · T`, one more
than the last token:

    completed_tokens  [[0, 1, 2, 3], [ 9, 10, 11, 12]]      (V, m)
    attending_tokens  [[3, 4, 5, 6], [12, 13, 14, 14]]      (N, m)

(`tests/test_chunking_retro.py` checks these numbers.) With a cache, positions continue where the last pass ended. The first
attending chunk of each row then holds the tokens that still attend to a chunk of an earlier pass.

A plan does not decide how neighbors are read. A reader takes the `neighbor_input_ids` of the chunks that complete and encodes
them in its own way. It hands the keys and values of each layer to `exchange_key_values`, and gets back those that
each attending chunk attends to. `attending` and `per_token` move states from tokens to attending chunks and back.
"""

from typing import NamedTuple

import torch

from .cache_retro import RetrievalState, pad_to, per_row


NeighborTokens = tuple[torch.Tensor, torch.Tensor]
"""Ids and boolean mask, of one shape."""


# ── plans ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class PassPlan:
    """What one forward pass reads, and which token reads it.

    Args:
        shape (`tuple[int, int]`): rows and new tokens, (B, T).
        state (`RetrievalState`, *optional*): what the cache keeps of earlier passes; None without a cache.
        neighbors (pair of tensors of shape `(V, K, R)`, *optional*): ids and boolean mask of the neighbors of the chunks that
            complete in this pass; None if nothing was retrieved.
        chunk_mask (`torch.BoolTensor` of shape `(V, m)`, *optional*): which cells of these chunks hold a token.
    """

    attended_mask: torch.Tensor | None = None
    """Which neighbor tokens each attending chunk may attend to, (N, S); None if there is nothing to attend to."""

    def __init__(
        self,
        shape: tuple[int, int],
        state: RetrievalState | None = None,
        neighbors: NeighborTokens | None = None,
        chunk_mask: torch.Tensor | None = None,
    ):
        self.shape = shape
        self.state = state
        self.neighbor_input_ids: torch.Tensor | None = None if neighbors is None else neighbors[0]
        self.neighbor_mask: torch.Tensor | None = None if neighbors is None else neighbors[1]
        self.chunk_mask = chunk_mask

    @property
    def neighbor_size(self) -> int | None:
        """R, the length of every neighbor; None if there are none."""
        if self.neighbor_input_ids is not None:
            return self.neighbor_input_ids.shape[-1]
        return None if self.state is None else self.state.neighbor_size

    @property
    def places(self) -> int | torch.Tensor | None:
        """The place of each row's token in its attending chunk, from 0: one number if all are equal, else a `torch.LongTensor`
        of shape `(B,)`. None if the plan holds whole attending chunks.
        """
        return None

    def take_completed(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Take H_u of the chunks that complete, (V, m, d), from all new tokens (B, T, d), and keep those of unfinished chunks."""
        raise NotImplementedError

    def attending(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The attending chunks (N, Q, d) among the tokens (B, T, d), zero in empty cells (equation 3).

        In a step, each token is an attending chunk of its own.
        """
        return hidden_states

    def per_token(self, states: torch.Tensor) -> torch.Tensor:
        """The inverse of `attending`: from (N, Q, d) to tokens (B, T, d), zero for tokens that attend to nothing."""
        return states

    def exchange_key_values(
        self, layer_idx: int, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep keys and values of new neighbors, and return those that each attending chunk attends to, as a `Cache` does.

        Args:
            layer_idx (`int`): the layer.
            key, value (`torch.FloatTensor` of shape `(V, heads, S, D)`, *optional*): of the chunks that complete.
        Returns:
            Keys and values of shape `(N, heads, S, D)`; `attended_mask` belongs to them.
        """
        raise NotImplementedError

    def commit(self) -> None:
        """End the pass: count its tokens, and keep the mask of the neighbors for the next pass."""
        raise NotImplementedError


class History(NamedTuple):
    """How far each row of a cached pass has come. Positions are counted from the start of the row's unfinished chunk.

    With m = 4, a row that has five tokens goes on in chunk 1, which began with its last token. If four tokens follow, they have the
    positions 1 to 4, and chunk 1 completes: `first_chunk` is 1, `num_completed` 1, `num_tokens` 4, `start` 1 and `origin` 0.

    Args:
        first_chunk (`list[int]`): the unfinished chunk of each row.
        num_completed (`list[int]`): how many chunks of each row complete in the pass.
        num_tokens (`list[int]`): how many new tokens each row has, without padding.
        start (`torch.LongTensor` of shape `(B,)`): position of the first new token.
        origin (`torch.LongTensor` of shape `(B,)`): position of the row's very first token, if the unfinished chunk has it, as in
            a row that begins with a `chunk_offset`; else 0.
    """

    first_chunk: list[int]
    num_completed: list[int]
    num_tokens: list[int]
    start: torch.Tensor
    origin: torch.Tensor


class SequencePlan(PassPlan):
    """A pass over many tokens: training, scoring, a prompt, or the check of proposed tokens in assisted decoding.

    All rows get as many chunks as the row with the most, so that everything is one batch. The other rows get empty cells.

    Args:
        positions_in_pass (`torch.LongTensor` of shape `(B, T)`): chunk positions, but counted from the start of the row's
            first chunk in the pass; -1 at padding.
        completing (pair of tensors of shape `(V, m)`): the tokens of the chunks that complete, and a mask of the cells that
            are not empty. With a state, a row has m + T columns: first what earlier passes put into its unfinished chunk.
        num_chunks (`int`): the largest number of chunks that complete in a row.
        neighbors (pair of tensors of shape `(V, K, R)`, *optional*): of these chunks.
        selected (`torch.LongTensor`, *optional*): the numbers of the chunks that have neighbors, if others have none.
        state ([`RetrievalState`], *optional*), history ([`History`], *optional*): of a cached pass.
    """

    def __init__(
        self,
        positions_in_pass: torch.Tensor,
        completing: tuple[torch.Tensor, torch.Tensor],
        num_chunks: int,
        neighbors: NeighborTokens | None,
        selected: torch.Tensor | None = None,
        state: RetrievalState | None = None,
        history: History | None = None,
    ):
        completed_tokens, chunk_mask = completing
        super().__init__(positions_in_pass.shape, state, neighbors, chunk_mask)
        self.positions_in_pass = positions_in_pass
        self.completed_tokens = completed_tokens
        self.history = history
        self.num_chunks = num_chunks
        self.selected = selected
        num_tokens, size = positions_in_pass.shape[1], chunk_mask.shape[-1]

        # First, the cell of each token. The cells of a row's attending chunks are numbered one after another; a token in none of
        # them gets `num_cells`, for "none". Attending chunks are shifted by m - 1 against chunks, so position p is in the cell
        # p + 1 - m. With a history, cells begin m earlier: before the others comes the attending chunk that reads what was
        # retrieved before this pass, with the positions -1 to m - 2.
        num_new = 0 if neighbors is None else num_chunks
        num_attending = num_new if history is None else num_new + 1
        num_cells = num_attending * size
        # In the example there are 4 cells: row 0 has the cells [-, -, -, 0, 1, 2, 3], and row 1 [-, -, -, -, -, 0, 1]. With a
        # history: if a row goes on at chunk position 5, its chunk 1 began at 4, and four tokens have the positions 1, 2, 3, 4
        # in the pass and the cells 2, 3, 4, 5. The first two of them (cells below 4) still attend to chunk 0, the others to
        # chunk 1, which completes now.
        cells = positions_in_pass + 1 - (size if history is None else 0)
        cells = torch.where((positions_in_pass >= 0) & (cells >= 0) & (cells < num_cells), cells, num_cells)
        attending_tokens = _flat(_invert(cells, num_cells), num_tokens).view(-1, size)
        token_cells = _flat(cells, num_cells)
        # Second, which attending chunks there are, and in which order: all, unless some have no neighbors or the batch has a history.
        order = selected
        if selected is not None:
            self.completed_tokens, self.chunk_mask = completed_tokens[selected], chunk_mask[selected]
            self.neighbor_input_ids, self.neighbor_mask = neighbors[0][selected], neighbors[1][selected]
        if history is not None and num_new:
            # First the attending chunk of every row that reads what an earlier pass retrieved, then those of this pass.
            first = torch.arange(len(positions_in_pass), device=positions_in_pass.device) * num_attending
            new = torch.arange(len(chunk_mask), device=positions_in_pass.device) if selected is None else selected
            order = torch.cat([first, new // num_new * num_attending + new % num_new + 1])
        if order is not None:
            # `rank` maps an attending chunk to its place in the order, and one that is left out, like the cell for "none",
            # to the place after the last one.
            rank = torch.full((len(attending_tokens) + 1,), len(order), device=positions_in_pass.device)
            rank[order] = torch.arange(len(order), device=positions_in_pass.device)
            attending_tokens = attending_tokens[order]
            ranks = rank[token_cells // size]
            token_cells = torch.where(ranks < len(order), ranks * size + token_cells % size, len(order) * size)
        self.attending_tokens = attending_tokens
        self.token_cells = token_cells
        if history is not None:
            self._plan_cached(state, history, num_new)
        elif neighbors is not None:
            self.attended_mask = self.neighbor_mask.flatten(1)

    def _plan_cached(self, state: RetrievalState, history: History, num_new: int) -> None:
        """Decide what the pass reads from the state, and what the state holds after it."""
        self.state_mask = state.neighbor_mask
        # The first attending chunk reads the neighbors of the chunk that was completed before this pass. They are in the
        # other half of the state than the unfinished chunk. A row without such a chunk (-1) is masked below.
        chunks = [chunk - 1 for chunk in history.first_chunk]
        self.attended = per_row([chunk % 2 for chunk in chunks], self.positions_in_pass.device)
        self.kept = state.choose_kept(history.first_chunk, history.num_completed, self.positions_in_pass.device)
        if self.kept is not None and self.selected is not None:
            self.kept = self.kept.among(self.selected)
        if self.state_mask is None:
            return
        old = self.state_mask[self.attended]
        if min(chunks) < 0:
            old = old & torch.tensor([chunk >= 0 for chunk in chunks], device=old.device).unsqueeze(1)
        new = pad_to(self.neighbor_mask.flatten(1), old.shape[-1], dim=-1) if num_new else None
        self.attended_mask = old if new is None else torch.cat([old, new])
        if self.kept is not None:
            self.state_mask = self.kept.put(self.state_mask, new)

    def _remember(self, buffer: str, values: torch.Tensor) -> torch.Tensor:
        """Put the kept values of the unfinished chunk before the new ones (B, T, ...), and keep the last of the new ones."""
        state, chunks, size = self.state, self.history.first_chunk, self.chunk_mask.shape[-1]
        both = state.with_kept(buffer, chunks, values)
        starts = torch.tensor([chunk * size for chunk in chunks], device=values.device)
        positions = self.positions_in_pass + starts.unsqueeze(1)
        # The two halves hold 2m values. Earlier ones would be written to the same cells, in no defined order.
        recent = positions > positions.max(dim=1, keepdim=True).values - 2 * size
        state.write(buffer, torch.where((self.positions_in_pass >= 0) & recent, positions, -1), values)
        return both

    def take_completed(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        if self.state is not None:
            hidden_states = self._remember("hidden_states", hidden_states)
        return None if self.neighbor_input_ids is None else gather(hidden_states, self.completed_tokens)

    def attending(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return gather(hidden_states, self.attending_tokens)

    def per_token(self, states: torch.Tensor) -> torch.Tensor:
        return gather(states, self.token_cells)

    def exchange_key_values(
        self, layer_idx: int, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.state is None:
            return key, value
        # First, because the new ones may overwrite them: when two chunks complete in one pass, the second goes to the half
        # of the chunk that was completed before the pass.
        old = self.state.recall_key_values(layer_idx, self.attended, key, value)
        if key is None:
            return old
        self.state.keep_key_values(layer_idx, key, value, self.kept)
        num_tokens = self.attended_mask.shape[-1]
        keys, values = (
            torch.cat([first, pad_to(new, num_tokens, dim=-2)]) for first, new in zip(old, (key, value), strict=True)
        )
        return keys, values

    def commit(self) -> None:
        self.state.neighbor_mask = self.state_mask
        self.state.advance(self.history.num_tokens, self.shape[1])


class StepPlan(PassPlan):
    """A pass over one token per row with a history: a step of generation.

    Each token is an attending chunk of its own. In most steps no chunk completes. All decisions use integers on the host, so
    that a step waits for no copy from the device.

    Args:
        state (`RetrievalState`): the history; its `next_positions` do not count this token yet.
        rows (`list[int]`): the V rows whose chunk completes with this token.
        neighbors (pair of tensors of shape `(V, K, R)`, *optional*): of these chunks.
        device (`torch.device`): of the tokens.

    Attributes:
        chunks (`list[int]`): the chunk of each row whose neighbors the token reads; -1 if there is none yet.
    """

    state: RetrievalState

    def __init__(self, state: RetrievalState, rows: list[int], neighbors: NeighborTokens | None, device: torch.device):
        size, positions = state.chunk_size, state.next_positions
        super().__init__((len(positions), 1), state, neighbors)
        self.device = device
        self.kept = state.choose_kept([positions[row] // size for row in rows], [1] * len(rows), device, rows)
        if neighbors is not None:
            origins = [max(state.offsets[row] - positions[row] // size * size, 0) for row in rows]
            self.chunk_mask = cells_from(origins, size, device)
        self.state_mask = state.neighbor_mask
        if self.state_mask is not None and self.kept is not None:
            width = self.state_mask.shape[-1]
            new = None if neighbors is None else pad_to(self.neighbor_mask.flatten(1), width, dim=-1)
            self.state_mask = self.kept.put(self.state_mask, new)

        # The last completed chunk, this token's included. With m = 4 and three tokens before this one, this token ends chunk 0
        # and already reads its neighbors: (3 + 1) // 4 - 1 = 0.
        self.chunks = [(position + 1) // size - 1 for position in positions]
        self.attended = per_row([chunk % 2 for chunk in self.chunks], device)
        if self.state_mask is not None:
            self.attended_mask = self.state_mask[self.attended]
            if min(self.chunks) < 0:
                has_chunk = torch.tensor([chunk >= 0 for chunk in self.chunks], device=device)
                self.attended_mask = self.attended_mask & has_chunk.unsqueeze(1)

    @property
    def places(self) -> int | torch.Tensor:
        # An attending chunk begins with the last token of a chunk (position m - 1, place 0), so places are one ahead of
        # positions.
        places = [(position + 1) % self.state.chunk_size for position in self.state.next_positions]
        return places[0] if len(set(places)) == 1 else torch.tensor(places, device=self.device)

    def take_completed(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        self.state.write("hidden_states", self.state.next_positions, hidden_states)
        if self.neighbor_input_ids is None:
            return None
        return self.state.read("hidden_states")[self.kept.rows, self.kept.halves]

    def exchange_key_values(
        self, layer_idx: int, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key is not None:
            self.state.keep_key_values(layer_idx, key, value, self.kept)
        return self.state.recall_key_values(layer_idx, self.attended, key, value)

    def commit(self) -> None:
        self.state.neighbor_mask = self.state_mask
        self.state.advance([1] * self.shape[0], 1)


# ── positions and indexes ─────────────────────────────────────────────────────────────────────────────────────────────


def positions_from(tokens: torch.Tensor, real: torch.Tensor | None, start: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) of tokens whose first real one has the position `start` (B,); -1 at padding."""
    if real is None:
        return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2]) + start.unsqueeze(1)
    # Counting the real tokens, and not the columns, is what makes a padded row equal to the row alone.
    return torch.where(real, real.long().cumsum(dim=1) - 1 + start.unsqueeze(1), -1)


def text_positions(mask: torch.Tensor | dict | None, num_tokens: int, num_past: int) -> torch.Tensor | None:
    """Positions of new tokens that count the real tokens alone, as `generate` counts them; None without padding.

    A reader that puts neighbors right before position 0 needs them: with padding on the left, the text would begin later, and
    the distance to its neighbors would depend on the batch.

    Args:
        mask (`torch.Tensor` of shape `(B, num_past + num_tokens)`, *optional*): which tokens are real; another kind of mask
            does not say so.
        num_tokens, num_past (`int`): new tokens, and those of the cache.
    Returns:
        `torch.LongTensor` of shape `(B, num_tokens)`, or None.
    """
    if not isinstance(mask, torch.Tensor) or mask.shape[1:] != (num_past + num_tokens,) or bool(mask.all()):
        return None
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, num_past:]


def completing_tokens(
    positions: torch.Tensor, num_chunks: int, chunk_size: int, history: History | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`completed_tokens` and `chunk_mask`, both (B · num_chunks, m), of the first `num_chunks` chunks of every row."""
    num_cells, num_columns = num_chunks * chunk_size, positions.shape[1]
    own = torch.where((positions >= 0) & (positions < num_cells), positions, num_cells)
    columns = _invert(own, num_cells)
    if history is not None:
        # The tokens that earlier passes put into the growing chunk come first, one column per cell. Cells before the
        # row's very first token are empty.
        cell = torch.arange(num_cells, device=positions.device).expand(len(positions), -1)
        remembered = (cell < history.start[:, None]) & (cell >= history.origin[:, None])
        columns = torch.where(remembered, cell, columns + chunk_size)
        num_columns += chunk_size
    return _flat(columns, num_columns).view(-1, chunk_size), (columns < num_columns).view(-1, chunk_size)


def _invert(cells: torch.Tensor, num_cells: int) -> torch.Tensor:
    """Turn the cell of each column, (B, T), into the column of each cell, (B, num_cells); T for an empty cell.

    The cell `num_cells` takes the columns that are in no cell, and is cut off.
    """
    # A scatter instead of a search: its shapes depend on no value, so that the pass compiles and no device is waited for.
    batch_size, num_columns = cells.shape
    columns = torch.arange(num_columns, device=cells.device).expand(batch_size, -1)
    inverse = torch.full((batch_size, num_cells + 1), num_columns, device=cells.device)
    return inverse.scatter(1, cells, columns)[:, :num_cells]


def _flat(index: torch.Tensor, length: int) -> torch.Tensor:
    """Number the entries of all rows: entry i of row b becomes b · `length` + i, and "none", which is `length`, `B · length`."""
    # "None" of every row becomes one number, behind all tokens, where `gather` has a row of zeros.
    batch_size = index.shape[0]
    rows = torch.arange(batch_size, device=index.device).unsqueeze(1) * length
    return torch.where(index < length, index + rows, batch_size * length)


def gather(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows `index` of `states` (·, ·, d), with zeros for "none"; of shape `(*index.shape, d)`."""
    width = states.shape[-1]
    padded = torch.cat([states.reshape(-1, width), states.new_zeros(1, width)])
    return padded.index_select(0, index.flatten()).view(*index.shape, width)


def cells_from(origins: list[int], chunk_size: int, device: torch.device) -> torch.Tensor:
    """A mask (V, m) that is True from the cell `origins[i]` on, where the tokens of a row begin."""
    return torch.arange(chunk_size, device=device) >= torch.tensor(origins, device=device).unsqueeze(1)
