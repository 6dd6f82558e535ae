# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Which tokens of a pass attend together, for the reader `parallel_context`: what they attend to, and their masks.

B rows, T new tokens, L tokens in the cache and new ones, n tokens of a segment, S neighbor tokens that a row attends to, H heads,
D head_dim.
"""

import operator

import torch

from .cache_retro import RetroDynamicLayer
from .neighbor_cache_retro import Neighbors


def neighbors_at(known: list[Neighbors], group: int) -> Neighbors:
    """The neighbors of a group of a row; none where the row has no such group."""
    return known[group] if 0 <= group < len(known) else ()


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


class Segment:
    """Tokens that attend to the same neighbors: one attending chunk of each row.

    Args:
        columns (`list` of B lists of n `int`): the columns of these tokens among the new tokens.
        end (`int`): the column of the last of them in the whole text.
        neighbors (`list` of B tuples of [`EncodedNeighbor`]): the neighbors that they attend to.
    """

    def __init__(self, columns: list[list[int]], end: int, neighbors: list[Neighbors]):
        first = columns[0]
        is_slice = all(row == first for row in columns) and first[-1] - first[0] + 1 == len(first)
        self.columns = slice(first[0], first[-1] + 1) if is_slice else torch.tensor(columns)
        self.begins_text = is_slice and first[0] == 0
        self.length = end + 1  # of the text that they attend to
        self.neighbors = neighbors
        self.lengths = [sum(neighbor.num_tokens for neighbor in row) for row in neighbors]
        self.size = max(self.lengths)  # S; rows with fewer neighbor tokens are padded on the left

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """Their part of `states` (B or 1, H, T, D)."""
        if isinstance(self.columns, slice):
            return states[:, :, self.columns]
        states = states.expand(len(self.columns), -1, -1, -1)
        return states.take_along_dim(self.columns.to(states.device)[:, None, :, None], dim=2)

    def mask(
        self, of_text: torch.Tensor | None, num_past: int, query: torch.Tensor, additive: bool
    ) -> torch.Tensor | None:
        """The mask of neighbors and text, `(B or 1, H or 1, n, S + length)`; None if they attend to everything.

        Args:
            of_text (`torch.Tensor` of shape `(B or 1, H or 1, T, L)`, *optional*): mask of the base, boolean or additive;
                causal if None.
            num_past (`int`): tokens in the cache before the pass.
            query (`torch.Tensor` of shape `(B, H, T, D)`): all queries of the pass.
            additive (`bool`): whether a mask that is made here is added to the scores.
        """
        device = query.device
        if of_text is not None:
            text = self.take(of_text)[..., : self.length]
        elif query.shape[2] == 1 and min(self.lengths) == self.size:
            return None
        elif self.size == num_past == 0 and self.begins_text and not additive:
            return None  # causal by itself, which costs half without a mask
        else:
            columns = self.take(torch.arange(query.shape[2], device=device)[None, None, :, None])
            text = torch.arange(self.length, device=device) <= num_past + columns
            text = _additive(text, query.dtype) if additive else text
        padding = self.size - torch.tensor(self.lengths, device=device)
        seen = (torch.arange(self.size, device=device) >= padding[:, None])[:, None, None, :]
        seen = seen if text.dtype == torch.bool else _additive(seen, text.dtype)
        return torch.cat([seen.expand(-1, *text.shape[1:3], -1), text.expand(len(seen), -1, -1, -1)], dim=-1)

    def join(self, number: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values of the neighbors followed by those of the text, `(B, H, S + length, D)`, as a copy.

        Args:
            number (`int`): of the layer, among those that read.
            key, value (`torch.Tensor` of shape `(B, H, L, D)`): of the text.
        """
        joined = []
        for kind, text in enumerate((key, value)):
            text = text[:, :, : self.length]
            if self.size:
                rows = []
                for row, length in zip(self.neighbors, self.lengths, strict=True):
                    padding = text.new_zeros(text.shape[1], self.size - length, text.shape[-1])
                    rows.append(torch.cat([padding, *(neighbor[kind][number] for neighbor in row)], dim=-2))
                text = torch.cat([torch.stack(rows), text], dim=-2)
            joined.append(text)
        return tuple(joined)

    def exchange(self, number: int, layer: RetroDynamicLayer, room: int) -> tuple[torch.Tensor, ...]:
        """As `join`, without copying the text: neighbors are written into the cache, before the text, unless they are there."""
        joined = []
        for kind, text in enumerate(layer.make_room_before(self.size, room)):
            shape = (*text.shape[:2], self.size + self.length, text.shape[-1])
            joined.append(text.as_strided(shape, text.stride(), text.storage_offset() - self.size * text.stride(2)))
            for row, neighbors in enumerate(self.neighbors):
                if neighbors and layer.neighbors_before[row] is not neighbors:
                    states = torch.cat([neighbor[kind][number] for neighbor in neighbors], dim=-2)
                    joined[kind][row, :, self.size - states.shape[-2] : self.size] = states
        layer.neighbors_before = list(self.neighbors)
        return tuple(joined)


def plan_segments(
    groups: list[list[int]], known: list[list[Neighbors]], num_past: int
) -> tuple[list[Segment], torch.Tensor | None]:
    """Divide the tokens of a pass into segments.

    Args:
        groups (`list` of B lists of T `int`): for each token, which entry of `known` it attends to; -1 at padding.
        known (`list` of B lists of tuples of [`EncodedNeighbor`]): the neighbors of each row's groups.
        num_past (`int`): tokens in the cache before the pass.
    Returns:
        The segments, and the place of each token (B, T) when the segments follow one another; None if that is its column.
    """
    segments: list[Segment] = []
    num_tokens, num_slots = len(groups[0]), 0
    slots = [[0] * num_tokens for _ in groups]  # the place of each token when the segments follow one another
    if num_tokens == 1:  # one segment is enough, even if the rows are in different chunks
        known = [[neighbors_at(own, row[0])] for own, row in zip(known, groups, strict=True)]
        groups = [[0] for _ in groups]
    groups, known = _merged(groups, known)
    for group in range(max(map(max, groups)) + 1):
        columns = [[t for t, found in enumerate(row) if found == group] for row in groups]
        width = max(map(len, columns))
        if width == 0:
            continue
        end = max(row[-1] for row in columns if row)
        for row, own, found in zip(slots, columns, groups, strict=True):
            for place, column in enumerate(own):
                row[column] = num_slots + place
            # A row with fewer tokens in this segment repeats one of them; no slot refers to its second result.
            other = own[-1] if own else max((t for t in range(end + 1) if found[t] >= 0), default=end)
            own += [other] * (width - len(own))
        num_slots += width
        segments.append(Segment(columns, num_past + end, [neighbors_at(own, group) for own in known]))
    order = None if slots == [list(range(num_slots))] * len(slots) else torch.tensor(slots)
    return segments, order


def _merged(groups: list[list[int]], known: list[list[Neighbors]]) -> tuple[list[list[int]], list[list[Neighbors]]]:
    """The same with one group for consecutive ones that read the same in every row, such as the chunks before a question."""
    number, first = [0], [0]  # the new number of each group, and the first old group of each new one
    for group in range(1, max(map(max, groups)) + 1):
        pairs = [(neighbors_at(own, group - 1), neighbors_at(own, group)) for own in known]
        if not all(len(a) == len(b) and all(map(operator.is_, a, b)) for a, b in pairs):
            first.append(group)
        number.append(len(first) - 1)
    groups = [[number[group] if group >= 0 else -1 for group in row] for row in groups]
    return groups, [[neighbors_at(own, group) for group in first] for own in known]
