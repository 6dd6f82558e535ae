# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The reader `parallel_context`: the base itself reads the neighbors, without training (Ratner et al., 2023).

The base encodes each neighbor by itself, at positions before the text. Then each token of an attending chunk attends to the
keys and values of the chunk's neighbors and to its own past, in one softmax, in every layer that attends to the whole text:

    neighbor 2   -2R … -R-1 ┐
    neighbor 1    -R … -1   ┼─ keys and values ─► softmax over [neighbors of chunk u | text up to t] ◄─ query of token t
    text           0 … t    ┘

The text keeps its positions, so its keys never change. At the end of a chunk only the neighbors are exchanged. Neighbors stand
one before another, as they would in a prompt, and the best one is the nearest: so the base can tell their tokens apart.

This and two numbers were chosen on validation text (docs/results/readers.md). The first token of a neighbor is not read: it is an
"attention sink", which takes the weight that a head does not use, and several would take too much. The scores of neighbor
tokens are multiplied by 1.1, because attention to texts encoded by themselves is spread too evenly (APE, Yang et al., 2025).

Shape legend: B batch, T new tokens, L tokens in the cache and new ones, K neighbors, R neighbor_size, r tokens of one neighbor,
S neighbor tokens that a row attends to, H heads, D head_dim.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_routing_retro import route_attention
from .backbone_retro import accepted_arguments, check_decoder, placement, run_within
from .cache_retro import RetroDynamicLayer
from .chunking_retro import PassPlan, SequencePlan, StepPlan, text_positions
from .compatibility_retro import CACHE_NAME
from .configuration_retro import RetroConfig
from .inputs_retro import check_no_attentions
from .neighbor_cache_retro import (
    EncodedNeighbor,
    NeighborCache,
    Neighbors,
    PlacedNeighbor,
    check_memory,
    place_neighbors,
    weights_version,
)
from .segments_retro import neighbors_at, plan_segments


ENCODED_TOKENS = 4096
"""Neighbor tokens that the base encodes in one pass."""
NUM_SINKS = 1
"""First tokens of a neighbor that are not read."""
FOCUS = 1.1
"""The scores of neighbor tokens are multiplied by this."""
_REMEDY = "Use the paper's reader for this base: `retro fit` (in Python: `retrofit(base, reader='cross_attention')`)."


# ── what a base must be able to do ────────────────────────────────────────────────────────────────────────────────────


def reading_layers(backbone: PreTrainedModel) -> list[int]:
    """The layers of a base that read neighbors: those that attend to the whole text.

    Layers with a sliding window, a recurrence or a sparse selection read nothing.

    Raises:
        ValueError: if the positions of the base cannot be shifted, its attention cannot be reached, or no layer remains.
    """
    check_decoder(backbone)
    config = backbone.config.get_text_config(decoder=True)
    family = config.model_type
    if not getattr(config, "rope_parameters", None) or "position_ids" not in accepted_arguments(backbone):
        raise ValueError(
            "reader='parallel_context' places neighbors before the text, which needs rotary positions, but the family "
            f"'{family}' does not have them. {_REMEDY}"
        )
    if not backbone._can_set_attn_implementation():
        raise ValueError(
            "reader='parallel_context' needs a base that uses the attention interface of transformers, but the family "
            f"'{family}' has its own attention code. {_REMEDY}"
        )
    layers = [idx for idx, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer]
    if not layers:
        raise ValueError(
            f"reader='parallel_context' needs layers that attend to the whole text, but all layers of this '{family}' model "
            f"have a sliding window or no attention. {_REMEDY}"
        )
    return layers


@torch.no_grad()
def check_backbone(backbone: PreTrainedModel) -> None:
    """Try a base with real weights: every layer that should read is reached, and shifted positions change nothing.

    Raises:
        ValueError: if one of the two is not true.
    """
    layers = reading_layers(backbone)
    route_attention(backbone)
    family = backbone.config.get_text_config(decoder=True).model_type
    device, dtype = placement(backbone)
    input_ids = torch.arange(3, 9, device=device).unsqueeze(0)
    states = []
    for start in (0, -128):
        recorder = _KeyValueRecorder(layers)
        try:
            positions = torch.arange(start, start + 6, device=device).unsqueeze(0)
            states.append(recorder.run(backbone, input_ids, None, positions).float())
        except (IndexError, RuntimeError) as error:
            raise ValueError(
                f"The family '{family}' does not run at positions before the text ({error}), where "
                f"reader='parallel_context' places neighbors. {_REMEDY}"
            ) from error
        missed = sorted(set(layers) - recorder.states.keys())
        if missed:
            raise ValueError(
                f"reader='parallel_context' does not reach the attention of the layers {missed} of the family '{family}'. "
                f"{_REMEDY}"
            )
    difference = float((states[1] - states[0]).abs().max() / states[0].abs().max())
    if not difference < (0.01 if dtype == torch.float32 else 0.2):
        raise ValueError(
            f"The outputs of the family '{family}' change when all positions are shifted (by {difference:.1%} of the largest "
            f"value), so reader='parallel_context' cannot place neighbors before the text. {_REMEDY}"
        )


# ── encoding neighbors ────────────────────────────────────────────────────────────────────────────────────────────────


class _KeyValueRecorder:
    """A pass of the base over neighbors that keeps the keys and values `(N, H, r, D)` of the layers that read, in `states`."""

    def __init__(self, layers: Sequence[int]):
        self.layers = layers
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, function: Callable, module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Gradient checkpointing computes a layer a second time; the text reads the first result.
        self.states.setdefault(module.layer_idx, (key, value))
        return function(module, query, key, value, *args, **kwargs)

    def run(
        self, backbone: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        """The last hidden states of `input_ids` (N, r) at `positions` (N, r)."""
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        return run_within(self, backbone.base_model, inputs)[0]


class ParallelContextReader(nn.Module):
    """Reads neighbors with the base alone, and has no weights.

    Args:
        config ([`RetroConfig`]), backbone (`PreTrainedModel`): of the model, and its base.

    Attributes:
        cache ([`NeighborCache`]): encoded neighbors that are kept between calls, unless gradients are computed.
    """

    def __init__(self, config: RetroConfig, backbone: PreTrainedModel):
        super().__init__()
        self.config = config
        self.layers = {idx: number for number, idx in enumerate(reading_layers(backbone))}
        self.cache = NeighborCache()
        route_attention(backbone)

    def encode(self, backbone: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor) -> list[Neighbors]:
        """Encode the neighbors of N chunks. A neighbor of several chunks is encoded once.

        Args:
            backbone (`PreTrainedModel`): the base.
            input_ids, mask (`torch.Tensor` of shape `(N, K, R)`, long and bool): neighbors, and which tokens are real.
        Returns:
            For each chunk a tuple of [`EncodedNeighbor`], without neighbors that are empty or one token long.
        Raises:
            ValueError: if a neighbor is longer than the context of the base, or memory would not hold all of them.
        """
        limit = self.config.max_position_embeddings
        chunks = []
        for chunk in zip(input_ids.tolist(), mask.tolist(), strict=True):
            neighbors = [tuple(t for t, real in zip(*one, strict=True) if real) for one in zip(*chunk, strict=True)]
            neighbors = [tokens for tokens in neighbors if len(tokens) > NUM_SINKS]
            chunks.append(place_neighbors(neighbors, self.config.neighbor_size or 0, limit))
        keeps = not (torch.is_grad_enabled() or backbone.training)
        self.cache.use(weights_version(backbone) if keeps else None)
        found: dict[PlacedNeighbor, Any] = {placed: self.cache.get(placed) for chunk in chunks for placed in chunk}
        missing = sorted(
            (placed for placed, neighbor in found.items() if neighbor is None), key=lambda one: len(one.tokens)
        )
        longest = len(missing[-1].tokens) if missing else 0
        if limit is not None and longest > limit:
            raise ValueError(
                f"A neighbor has {longest} tokens, but the context of the base ends at {limit}. Build the datastore with a "
                "smaller `neighbor_size`."
            )
        size = max(ENCODED_TOKENS // max(longest, 1), 1)
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            for placed, neighbor in zip(batch, self._encode(backbone, batch, input_ids.device, keeps), strict=True):
                found[placed] = neighbor
                if keeps:
                    self.cache.put(placed, neighbor)
            if start == 0:
                check_memory(found[batch[0]], sum(len(placed.tokens) for placed in missing))
        return [tuple(found[placed] for placed in chunk) for chunk in chunks]

    def _encode(
        self, backbone: PreTrainedModel, batch: Sequence[PlacedNeighbor], device: torch.device, copy: bool
    ) -> list[EncodedNeighbor]:
        """One pass of the base over neighbors, padded on the right."""
        lengths = torch.tensor([len(tokens) for tokens, _ in batch], device=device).unsqueeze(1)
        starts = torch.tensor([start for _, start in batch], device=device).unsqueeze(1)
        width = len(batch[-1].tokens)  # the longest
        input_ids = torch.tensor([tokens + (0,) * (width - len(tokens)) for tokens, _ in batch], device=device)
        steps = torch.arange(width, device=device)
        mask = (steps < lengths).long() if len(batch[0].tokens) < width else None
        recorder = _KeyValueRecorder(list(self.layers))
        recorder.run(backbone, input_ids, mask, starts + steps)
        neighbors = []
        for row, (tokens, _) in enumerate(batch):
            read = slice(NUM_SINKS, len(tokens))
            pairs = [[states[row, :, read] for states in recorder.states[idx]] for idx in self.layers]
            keys = tuple(key * FOCUS for key, _ in pairs)
            # A view would keep the whole batch in memory.
            values = tuple(value.clone() if copy else value for _, value in pairs)
            neighbors.append(EncodedNeighbor(keys, values))
        return neighbors

    @staticmethod
    def check_structure(backbone: PreTrainedModel, layers: str | None = None) -> None:
        """Raise a ValueError for a base that this reader cannot read with."""
        reading_layers(backbone)

    def check_outputs(self, backbone: PreTrainedModel) -> None:
        """Raise a ValueError for a base whose outputs show that it cannot read so."""
        check_backbone(backbone)

    def begin(
        self, backbone: PreTrainedModel, plan: PassPlan, inputs: dict[str, Any], mask: Any, output_attentions: bool
    ) -> "ParallelContextPass":
        """Begin the pass over new tokens of text.

        Args:
            backbone (`PreTrainedModel`): the base.
            plan ([`PassPlan`]): which chunks complete in the pass, and their neighbors.
            inputs (`dict`): what the base will be given. Its `position_ids` are filled in where the caller has none.
            mask (`torch.Tensor`, *optional*): which tokens of the text are real.
            output_attentions (`bool`): whether probabilities are asked for, which this reader refuses.
        """
        check_no_attentions(output_attentions)
        route_attention(backbone)  # the user may have called `set_attn_implementation` since
        size, state = self.config.chunk_size, cast("Any", plan.state)  # a step always has a state
        if "position_ids" in inputs and inputs["position_ids"] is None:
            num_past = 0 if state is None else state.num_columns
            inputs["position_ids"] = text_positions(mask, plan.shape[1], num_past)
        found: list[Neighbors] = []
        if plan.neighbor_input_ids is not None and plan.neighbor_mask is not None:
            found = self.encode(backbone, plan.neighbor_input_ids, plan.neighbor_mask)
        if isinstance(plan, SequencePlan):
            (num_rows, _), count = plan.shape, plan.num_chunks
            if plan.selected is not None:
                chunks = dict(zip(plan.selected.tolist(), found, strict=True))
                found = [chunks.get(chunk, ()) for chunk in range(num_rows * count)]
            # Per row: group 0 is what the chunk completed before this pass has, group i what the i-th new chunk has.
            known = [[(), *found[row * count : (row + 1) * count]] for row in range(num_rows)]
            if state is not None and plan.history is not None:
                steps = zip(plan.history.first_chunk, plan.history.num_completed, strict=True)
                for row, (halves, (first, completed)) in enumerate(zip(state.neighbors, steps, strict=True)):
                    if first:
                        known[row][0] = halves[(first - 1) % 2]
                    for chunk in range(completed):
                        halves[(first + chunk) % 2] = neighbors_at(known[row], 1 + chunk)
            groups = [[(p + 1) // size if p >= 0 else -1 for p in row] for row in plan.positions_in_pass.tolist()]
        elif isinstance(plan, StepPlan):
            for number, row in enumerate([] if plan.kept is None else plan.kept.rows.tolist()):
                state.neighbors[row][state.next_positions[row] // size % 2] = neighbors_at(found, number)
            pairs = zip(plan.chunks, state.neighbors, strict=True)
            known = [[halves[chunk % 2] if chunk >= 0 else ()] for chunk, halves in pairs]
            groups = [[0] for _ in known]
        return ParallelContextPass(self, plan, known, groups, inputs[CACHE_NAME])


# ── reading them ──────────────────────────────────────────────────────────────────────────────────────────────────────


class ParallelContextPass:
    """A pass over text whose tokens attend to neighbors. Each pass gets a new object, so that passes never mix.

    Args:
        reader ([`ParallelContextReader`]), plan ([`PassPlan`]): of the model, and of the pass.
        known (`list` of B lists of tuples of [`EncodedNeighbor`]): the neighbors of each row's chunks.
        groups (`list` of B lists of T `int`): for each token, which entry of `known` it attends to; -1 at padding.
        cache ([`~transformers.Cache`], *optional*): of the text.
    """

    def __init__(
        self,
        reader: ParallelContextReader,
        plan: PassPlan,
        known: list[list[Neighbors]],
        groups: list[list[int]],
        cache: Cache | None,
    ):
        self.plan, self.cache = plan, cache
        self.num_past = 0 if plan.state is None else plan.state.num_columns
        self.room = reader.config.num_neighbors * (reader.config.neighbor_size or 0)
        is_off = not any(
            neighbors_at(own, group) for own, row in zip(known, groups, strict=True) for group in set(row)
        )
        self.layers = {} if is_off else reader.layers
        self._masks: list[tuple[torch.Tensor | None, list[torch.Tensor | None]]] = []
        self.segments, self.order = plan_segments(groups, known, self.num_past)

    def finish(self, outputs: Any) -> None:
        """Nothing to check: what can go wrong was tried before."""

    def attend(
        self,
        function: Callable,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention of one layer: `query` (B, H, T, D) over `key` and `value` of the text (B, H, L, D) and the neighbors'."""
        number = self.layers[module.layer_idx]
        outputs = []
        for segment, mask in zip(self.segments, self._masks_of(attention_mask, query, function), strict=True):
            layer = self._layer_with_room(module.layer_idx, key, value)
            if segment.size and layer is not None:
                joined = segment.exchange(number, layer, self.room)
            else:
                joined = segment.join(number, key, value)
            outputs.append(function(module, segment.take(query), *joined, mask, *args, **kwargs)[0])
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        if self.order is not None:
            output = output.take_along_dim(self.order.to(output.device)[:, :, None, None], dim=1)
        return output, None

    def _masks_of(self, mask: torch.Tensor | None, query: torch.Tensor, function: Callable) -> list:
        """The masks of all segments, made once for all layers that have the mask `mask`."""
        for known, masks in self._masks:
            if known is mask:
                return masks
        additive = function is not ALL_ATTENTION_FUNCTIONS["sdpa"]
        masks = [segment.mask(mask, self.num_past, query, additive) for segment in self.segments]
        self._masks.append((mask, masks))
        return masks

    def _layer_with_room(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> RetroDynamicLayer | None:
        """The layer of the cache, if neighbors can be written into it."""
        if self.cache is None or len(self.segments) > 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        layer = self.cache.layers[layer_idx]
        return layer if isinstance(layer, RetroDynamicLayer) and layer.keys is key and layer.values is value else None
