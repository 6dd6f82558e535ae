# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decoding steps as one compiled graph, as far as no chunk completes.

Between two chunk borders a step of generation is always the same: every row reads the same neighbors, one place later in its
chunk. Only the host knows where the borders are. So it plans each step, outside of the graph, and hands the graph tensors whose
shapes never change. At a border the step is not compiled: it looks up and encodes, and changes what the next steps read.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch

from .cache_retro import RetrievalState
from .chunking_retro import PassPlan, StepPlan


class Reading(NamedTuple):
    """What the rows read from one border to the next.

    Args:
        key_values (`dict[int, tuple]`): per layer, keys and values of shape `(B, heads, S, D)`.
        mask (`torch.BoolTensor` of shape `(B, S)`): which of these neighbor tokens are real.
        places (`torch.LongTensor` of shape `(B,)`): places in the attending chunks at the first step that reads so.
        position (`int`): chunk position of the first row at that step.
        source (pair): the mask of the state that this was taken from, and the chunk whose neighbors each row reads.
    """

    key_values: dict[int, tuple[torch.Tensor, torch.Tensor]]
    mask: torch.Tensor
    places: torch.Tensor
    position: int
    source: tuple[torch.Tensor, list[int]]


class FixedStepPlan(PassPlan):
    """A [`StepPlan`] in which no chunk completes, as tensors alone: a graph that was compiled for one serves all.

    Args:
        state ([`RetrievalState`]): the history; the graph reads from it only what no step changes.
        reading ([`Reading`]): what the rows read.
    """

    state: RetrievalState
    hidden_states: torch.Tensor
    """H at the first layer with cross-attention, (B, 1, d), once the graph has run."""

    def __init__(self, state: RetrievalState, reading: Reading):
        super().__init__((len(state.next_positions), 1), state)
        self.key_values = reading.key_values
        self.attended_mask = reading.mask
        # A number that grows with every step would be a constant of the graph, and a list of them a copy to the device.
        self._places = reading.places + (state.next_positions[0] - reading.position)

    @property
    def places(self) -> torch.Tensor:
        return self._places

    def take_completed(self, hidden_states: torch.Tensor) -> None:
        self.hidden_states = hidden_states

    def exchange_key_values(
        self, layer_idx: int, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key_values[layer_idx]

    def commit(self) -> None:
        self.state.write("hidden_states", self.state.next_positions, self.hidden_states)
        self.state.advance([1] * self.shape[0], 1)


class CompiledSteps:
    """The steps of one call of `generate` with a static cache.

    Args:
        run (`Callable`): runs a planned pass, compiled.
    """

    def __init__(self, run: Callable):
        self.run = run
        self.reading: Reading | None = None

    def choose(self, plan: PassPlan, run: Callable) -> tuple[PassPlan, Callable]:
        """The plan and the function that run it: compiled if the pass is a step between two borders, else those given."""
        if not isinstance(plan, StepPlan) or plan.kept is not None or not plan.state.key_values:
            return plan, run
        state = plan.state
        mask = cast("torch.Tensor", state.neighbor_mask)  # there are neighbors, so it has one
        source = mask, plan.chunks
        # Whatever changes the neighbors in a state gives it another mask.
        known = self.reading
        if known is None or known.source[0] is not mask or known.source[1] != source[1]:
            self.reading = known = _read(plan, source)
        return FixedStepPlan(state, known), self.run


def _read(plan: StepPlan, source: tuple[torch.Tensor, list[int]]) -> Reading:
    """Copy what the rows of a step read, so that it has the same strides from whichever half of the state it comes."""
    state = plan.state
    pairs = {layer: state.recall_key_values(layer, plan.attended, None, None) for layer in state.key_values}
    key_values = {layer: (_copy(key), _copy(value)) for layer, (key, value) in pairs.items()}
    mask = _copy(cast("torch.Tensor", plan.attended_mask))  # all False in a row without a chunk yet
    places = torch.as_tensor(plan.places, device=mask.device).expand(len(mask))
    return Reading(key_values, mask, places, state.next_positions[0], source)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
