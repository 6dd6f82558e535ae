# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Planning a forward pass: which tokens are real, which chunks complete, and what is retrieved for them."""

from collections.abc import Callable
from typing import Any

import torch

from .cache_retro import RetrievalState, chunk_offsets, pad_to
from .chunking_retro import (
    History,
    NeighborTokens,
    PassPlan,
    SequencePlan,
    StepPlan,
    cells_from,
    completing_tokens,
    gather,
    positions_from,
)
from .retriever_protocol_retro import RetroLookup


def plan_pass(
    tokens: torch.Tensor,
    real: torch.Tensor | None,
    chunk_size: int,
    *,
    state: RetrievalState | None = None,
    given: NeighborTokens | None = None,
    retriever: RetroLookup | None = None,
    chunk_offset: int | torch.Tensor | None = None,
) -> PassPlan:
    """Decide which chunks complete in a pass, and fetch their neighbors, before the model computes anything.

    Args:
        tokens (`torch.LongTensor` of shape `(B, T)`, or embeddings of shape `(B, T, hidden_size)`): new tokens.
        real (`torch.BoolTensor` of shape `(B, T)`, *optional*): False at padding.
        chunk_size (`int`): m.
        state ([`RetrievalState`], *optional*): history on the cache.
        given (pair of tensors of shape `(B, C, K, R)`, *optional*): the caller's neighbors of the first C chunks of each row.
        retriever ([`RetroLookup`], *optional*): looks up the chunks whose neighbors are not given.
        chunk_offset (`int` or `torch.LongTensor` of shape `(B,)`, *optional*): of rows without a history.
    Returns:
        [`PassPlan`].
    """
    if state is None and retriever is None and given is not None:
        return _plan_given(tokens, real, chunk_size, given, chunk_offset)
    if state is not None and tokens.shape[1] == 1 and state.is_started:
        return _plan_step(tokens, state, given, retriever)
    begins = chunk_offsets(chunk_offset, len(tokens), chunk_size) if state is None else state.next_positions
    return _plan_sequence(tokens, real, begins, chunk_size, state, given, retriever)


def _plan_given(
    tokens: torch.Tensor,
    real: torch.Tensor | None,
    chunk_size: int,
    given: NeighborTokens,
    chunk_offset: int | torch.Tensor | None,
) -> SequencePlan:
    """The plan where all neighbors are given and nothing is cached, as in training and scoring.

    Only shapes decide, so that the host reads no value of a tensor and the pass compiles.
    """
    batch_size, num_tokens = tokens.shape[:2]
    compiling = torch.compiler.is_compiling()
    ids, mask = given
    if not compiling:  # an exported program must serve other lengths
        num_chunks = (num_tokens if chunk_offset is None else num_tokens + chunk_size - 1) // chunk_size
        ids, mask = ids[:, :num_chunks], mask[:, :num_chunks]
    if chunk_offset is None:
        start = torch.zeros(1, dtype=torch.long, device=tokens.device)
    elif compiling and isinstance(chunk_offset, torch.Tensor):
        start = chunk_offset.to(tokens.device).expand(batch_size)
        wrong = f"`chunk_offset` must be from 0 to {chunk_size - 1}."
        torch._assert_async(((start >= 0) & (start < chunk_size)).all(), wrong)
    else:
        start = torch.tensor(chunk_offsets(chunk_offset, batch_size, chunk_size), device=tokens.device)
    selected = None
    if chunk_offset is not None and not compiling:
        # The offset was read on the host anyway. Reading the mask, too, allows encoding only the chunks that have neighbors:
        # for a question, the last one.
        selected = _with_neighbors(mask.flatten(0, 1))
    positions_in_pass = positions_from(tokens, real, start)
    completing = completing_tokens(positions_in_pass, ids.shape[1], chunk_size)
    neighbors = (ids.flatten(0, 1), mask.flatten(0, 1)) if ids.shape[1] else None
    return SequencePlan(positions_in_pass, completing, ids.shape[1], neighbors, selected)


def _plan_sequence(
    tokens: torch.Tensor,
    real: torch.Tensor | None,
    begins: list[int],
    chunk_size: int,
    state: RetrievalState | None,
    given: NeighborTokens | None,
    retriever: RetroLookup | None,
) -> SequencePlan:
    """The plan of a pass over many tokens; `begins` are the chunk positions of the first token of each row."""
    device, (batch_size, num_tokens) = tokens.device, tokens.shape[:2]
    # Chunks are counted from the row's first one, or with a history from its unfinished one.
    first_chunk = [0 if state is None else begin // chunk_size for begin in begins]
    starts = [begin - chunk * chunk_size for begin, chunk in zip(begins, first_chunk, strict=True)]
    # Reading values on the host waits for the device, so this is done only where there is padding.
    counts = [num_tokens] * batch_size if real is None else real.sum(dim=1).tolist()
    num_completed = [(start + count) // chunk_size for start, count in zip(starts, counts, strict=True)]
    num_chunks = max(num_completed)
    start = torch.tensor(starts, device=device)
    positions_in_pass = positions_from(tokens, real, start)
    history = None
    if state is not None:
        origins = [max(o - c * chunk_size, 0) for o, c in zip(state.offsets, first_chunk, strict=True)]
        history = History(first_chunk, num_completed, counts, start, torch.tensor(origins, device=device))
    completed_tokens, chunk_mask = completing_tokens(positions_in_pass, num_chunks, chunk_size, history)

    neighbors = None
    if num_chunks:
        steps = torch.arange(num_chunks, device=device)
        rows = torch.arange(batch_size, device=device).repeat_interleave(num_chunks)
        chunks = torch.tensor(first_chunk, device=device).unsqueeze(1) + steps
        complete = torch.tensor(num_completed, device=device).unsqueeze(1) > steps

        def chunk_tokens(selected: torch.Tensor) -> NeighborTokens:
            # A chunk may have begun in an earlier pass. So the m remembered tokens of each row come before its new ones, and
            # `completed_tokens` counts both.
            ids = tokens if state is None else state.with_kept("input_ids", first_chunk, tokens)
            return gather(ids.unsqueeze(-1), completed_tokens[selected]).squeeze(-1), chunk_mask[selected]

        neighbors = _fetch(given, retriever, (rows, chunks.flatten()), complete.flatten(), chunk_tokens)
        if neighbors is not None and state is not None:
            state.make_room(neighbors[0])
    selected = None
    if neighbors is not None and state is not None and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        selected = _with_neighbors(neighbors[1])
    completing = completed_tokens, chunk_mask
    plan = SequencePlan(positions_in_pass, completing, num_chunks, neighbors, selected, state, history)
    if state is not None and tokens.dim() == 2:
        plan._remember("input_ids", tokens)
    return plan


def _plan_step(
    tokens: torch.Tensor, state: RetrievalState, given: NeighborTokens | None, retriever: RetroLookup | None
) -> StepPlan:
    size, device = state.chunk_size, tokens.device
    if tokens.dim() == 2:  # embeddings have no ids to look up
        state.write("input_ids", state.next_positions, tokens)
    rows = [row for row, length in enumerate(state.next_positions) if (length + 1) % size == 0]
    neighbors = None
    if rows:
        chunks = [state.next_positions[row] // size for row in rows]
        index = torch.tensor(rows, device=device)
        halves = torch.tensor([chunk % 2 for chunk in chunks], device=device)
        origins = [state.offsets[row] - chunk * size for row, chunk in zip(rows, chunks, strict=True)]

        def chunk_tokens(selected: torch.Tensor) -> NeighborTokens:
            return state.read("input_ids")[index, halves][selected], cells_from(origins, size, device)[selected]

        every = torch.ones_like(index, dtype=torch.bool)
        neighbors = _fetch(given, retriever, (index, torch.tensor(chunks, device=device)), every, chunk_tokens)
        if neighbors is not None:
            state.make_room(neighbors[0])
    return StepPlan(state, rows, neighbors, device)


def _fetch(
    given: NeighborTokens | None,
    retriever: RetroLookup | None,
    where: tuple[torch.Tensor, torch.Tensor],
    wanted: torch.Tensor,
    chunk_tokens: Callable[[torch.Tensor], NeighborTokens],
) -> NeighborTokens | None:
    """Neighbors (V, K, R) of V chunks: those given, else those of the retriever, else masked ones. None if there are none.

    Args:
        given, retriever: see `plan_pass`.
        where (pair of `torch.LongTensor` of shape `(V,)`): row, and chunk of the row.
        wanted (`torch.BoolTensor` of shape `(V,)`): chunks that need neighbors.
        chunk_tokens (`Callable`): maps a boolean selection to tokens and mask `(selected, m)` for the retriever.
    """
    ids = mask = None
    rows, chunks = where
    if given is not None and given[0].shape[1] > 0:
        known = chunks < given[0].shape[1]
        at = chunks.clamp(max=given[0].shape[1] - 1)
        ids, mask = given[0][rows, at], given[1][rows, at] & known[:, None, None]
        wanted = wanted & ~known
    if retriever is not None and bool(wanted.any()):
        found, found_mask = retriever(*chunk_tokens(wanted), rows[wanted], chunks[wanted])
        if ids is None:
            ids = found.new_zeros(len(rows), *found.shape[1:])
            mask = torch.zeros_like(ids, dtype=torch.bool)
        elif found.shape[-1] != ids.shape[-1]:
            raise ValueError(
                f"The retriever returned neighbors of {found.shape[-1]} tokens, `neighbor_input_ids` has "
                f"{ids.shape[-1]}; both must have the same neighbor_size."
            )
        # Given and found neighbors may differ in number; the missing ones are masked.
        width = max(ids.shape[1], found.shape[1])
        ids, mask = pad_to(ids, width, 1).clone(), pad_to(mask, width, 1).clone()
        ids[wanted], mask[wanted] = pad_to(found, width, 1), pad_to(found_mask, width, 1)
    return None if ids is None else (ids, mask)


def _with_neighbors(mask: torch.Tensor) -> torch.Tensor | None:
    """The numbers of the chunks that have neighbors, given their mask (V, K, R); None if all or none have.

    If only the question at the end of a prompt has passages, only its chunks read.
    """
    some = mask.flatten(1).any(dim=-1).nonzero().squeeze(1)
    return some if 0 < len(some) < len(mask) else None


def real_tokens(
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    state: RetrievalState | None,
    batch_size: int,
    num_tokens: int,
) -> torch.Tensor | None:
    """A mask (B, T) that is False at padding, or None if no token is padding.

    A 4-D mask does not tell padding from other hidden tokens. The position of a row's last token then tells how many real
    tokens the row has.
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
        message = (
            "`position_ids` restart inside a row, so it packs several sequences, whose chunks cannot be told apart. Give "
            "each sequence a row of its own (`packing=False`)."
        )
        if torch.compiler.is_compiling():  # branching on a value would break the graph
            torch._assert_async(~restarts.any(), message)
        elif restarts.any():
            raise ValueError(message)
    return real
