"""train_pointer: teaches a new reader where to look, before it is trained as a part of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..errors import counted
from ..model.attention_retro import sinusoids_of
from ..model.backbone_retro import run_within
from ..model.modeling_retro import RetroForCausalLM, cross_attention_distances
from .collator import IGNORED_LABEL
from .copy_start import StateRecorder, check_copier


logger = logging.get_logger(__name__)

_PASSES = 3  # over the batches
_LEARNING_RATE, _WARM_UP = 2e-3, 20
_RAISED = 8.0  # nats by which full attention raises the logit of a token, at first
_KEPT = torch.float16  # of what is kept in memory
_NEEDED = {
    "input_ids": 2,
    "attention_mask": 2,
    "labels": 2,
    "neighbor_input_ids": 4,
    "neighbor_attention_mask": 4,
}  # dimensions
_FACTORS = (1.0, 2.0, 3.0, 4.0, 6.0)  # by which the outputs of the last layer may grow
_TRIED = 2  # batches that decide it


@dataclass(frozen=True)
class _Recorded:
    """What the chunks of a batch need again in every pass: N attending chunks of m tokens, S neighbor tokens each."""

    states: dict[int, torch.Tensor]  # by layer, normed: (N, m, hidden_size)
    neighbor_states: torch.Tensor  # (N, S, encoder_hidden_size)
    neighbor_mask: torch.Tensor  # (N, S)
    neighbor_ids: torch.Tensor  # (N, S)
    probabilities: torch.Tensor  # (N, m, S): that each neighbor token comes next, by the base alone
    is_next: torch.Tensor  # (N, m, S): whether it does
    is_scored: torch.Tensor  # (N, m)


def train_pointer(model: RetroForCausalLM, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[float]:
    """Teach the cross-attention of a new reader to look at neighbor tokens that come next, and at its null key elsewhere.

    Each layer of cross-attention is trained by itself as a pointer (compare See et al., 2017): with B nats of strength and the
    attention a(w) that all neighbor tokens w get, the next token has

        log p(w) = log p_base(w) + B · a(w) - log Z,    Z = 1 + sum over the neighbors' tokens of p_base(w) · (exp(B · a(w)) - 1).

    This is what the reader does if its values raise their own logits, as [`start_by_copying`] has set them. But the base runs only
    once per batch, nothing goes back through it, and Z needs no other tokens. So a step takes a tenth of the time of a training
    step, and shows the queries directly what they should find. Queries, keys, distances and null keys are trained. Then the
    outputs of the last layer are made as strong as serves the loss of the first batches.

    Args:
        model ([`RetroForCausalLM`]): after [`start_by_copying`].
        batches: as [`RetroDataCollator`] makes them: `input_ids`, `attention_mask` and `labels` (B, T),
            `neighbor_input_ids` and `neighbor_attention_mask` (B, T // m, K, R).
    Returns:
        `list[float]`: nats per token that each step gained over the base, the mean of the layers.
    Raises:
        ValueError: if the model is no reader for `start_by_copying`, a batch is not as described, or no token reads a neighbor.
    *Memory*: 16 KB per token with SmolLM2-135M and two neighbors of 128 tokens.
    """
    check_copier(model)
    reader: Any = model.model.retro
    first: list[Mapping[str, torch.Tensor]] = []
    recorded = []
    for batch in batches:
        first += [batch] if len(first) < _TRIED else []
        _check_batch(model, batch)
        chunks = _record(model, batch)
        recorded += [chunks] if bool(chunks.is_scored.any()) else []
    if not recorded:
        raise ValueError(
            "No token of the batches reads a neighbor. Give batches with texts longer than a chunk, and their neighbors."
        )
    steps = _PASSES * len(recorded)
    logger.info(f"Teaching the reader where to look: {counted(steps, 'step')}.")
    strengths = nn.Parameter(torch.full((len(reader.cross_attention),), math.log(_RAISED), device=model.device))
    trained = [strengths]
    for cross in reader.cross_attention.values():
        attention = cross.attention
        trained += [
            attention.q_proj.weight,
            attention.k_proj.weight,
            attention.position_bias.weight,
            cross.null_logits,
        ]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / _WARM_UP) * max(0.05, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator, gains = torch.Generator().manual_seed(0), []
    for _ in range(_PASSES):
        for place in torch.randperm(len(recorded), generator=generator).tolist():
            optimizer.zero_grad()
            layers = zip(reader.cross_attention, strengths.exp(), strict=True)
            gained = [
                _gain(raised * _attended(model, int(layer), recorded[place]), recorded[place])
                for layer, raised in layers
            ]
            torch.stack(gained).sum().neg().backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            gains.append(float(torch.stack(gained).detach().mean()))
    optimizer.zero_grad()
    _set_strength(model, first)
    return gains


def _check_batch(model: RetroForCausalLM, batch: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless a batch has tensors that belong together."""
    given = batch if isinstance(batch, Mapping) else {}
    shapes = {name: tuple(given[name].shape) for name in _NEEDED if isinstance(given.get(name), torch.Tensor)}
    config: Any = model.config
    fits = all(len(shapes.get(name, ())) == count for name, count in _NEEDED.items())
    if fits:
        batch_size, length = shapes["input_ids"]
        chunks = (batch_size, length // config.chunk_size)
        fits = shapes["attention_mask"] == shapes["labels"] == (batch_size, length)
        fits &= shapes["neighbor_attention_mask"] == shapes["neighbor_input_ids"]
        fits &= shapes["neighbor_input_ids"][:2] == chunks and shapes["neighbor_input_ids"][3] == config.neighbor_size
    if not fits:
        raise ValueError(
            f"`train_pointer` needs batches of {', '.join(_NEEDED)}, with chunks of {config.chunk_size} tokens and neighbors of "
            f"{config.neighbor_size}, got {shapes or type(batch).__name__}. Make them with RetroDataCollator."
        )


@torch.no_grad()
def _record(model: RetroForCausalLM, batch: Mapping[str, torch.Tensor]) -> _Recorded:
    """Run the base and the encoder on a batch."""
    size, reader = model.config.chunk_size, model.model.retro
    given = _moved(batch, model.device)
    ids, mask = given["input_ids"], given["attention_mask"].bool()
    recorder = StateRecorder()
    inputs = {"input_ids": ids, "attention_mask": given["attention_mask"], "use_cache": False}
    logits = run_within(recorder, model.model.backbone, inputs).logits

    chunks = given["neighbor_input_ids"].shape[1]

    def completed(values: torch.Tensor) -> torch.Tensor:
        """From (B, T, …) to (B · chunks, m, …): chunk u."""
        return values[:, : chunks * size].unflatten(1, (chunks, size)).flatten(0, 1)

    def attending(values: torch.Tensor) -> torch.Tensor:
        """The same for the tokens that read the neighbors of chunk u: its last one, and all but the last of the next (equation 3)."""
        room = [0, 0] * (values.ndim - 2)
        return completed(nn.functional.pad(values[:, size - 1 :], (*room, 0, size)))

    neighbors = given["neighbor_input_ids"].flatten(0, 1)
    seen = given["neighbor_attention_mask"].bool().flatten(0, 1)
    states = {int(layer): recorder.states[int(layer)] for layer in reader.cross_attention}
    embed = model.get_input_embeddings()
    with _both_types(model):
        encoded = reader.encoder(neighbors, seen, completed(states[min(states)]), completed(mask), embed)
    neighbors, seen = neighbors.flatten(1), seen.flatten(1)
    follows = nn.functional.pad(mask[:, 1:] & mask[:, :-1] & (given["labels"][:, 1:] != IGNORED_LABEL), (0, 1))
    scored = attending(follows) & seen.any(dim=1, keepdim=True)
    used = scored.any(dim=1)
    neighbors, seen, scored = neighbors.masked_fill(~seen, 0)[used], seen[used], scored[used]
    following = attending(nn.functional.pad(ids[:, 1:], (0, 1)))[used]
    # Chunk by chunk: the probabilities of a whole vocabulary take much memory.
    rows = zip(attending(logits)[used], neighbors, strict=True)
    probabilities = [row.float().softmax(dim=-1)[:, tokens].to(_KEPT) for row, tokens in rows]
    return _Recorded(
        states={
            layer: reader.cross_attention[str(layer)].norm(attending(of)[used].float()).to(_KEPT)
            for layer, of in states.items()
        },
        neighbor_states=encoded[used].to(_KEPT),
        neighbor_mask=seen,
        neighbor_ids=neighbors,
        probabilities=torch.stack(probabilities)
        if probabilities
        else neighbors.new_zeros(0, size, neighbors.shape[1]),
        is_next=(following[:, :, None] == neighbors[:, None]) & seen[:, None],
        is_scored=scored,
    )


def _moved(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: values.to(device) for name, values in batch.items()}


def _both_types(model: RetroForCausalLM) -> torch.autocast:
    """For a reader in float32 on a base in bfloat16."""
    dtypes = {next(part.parameters()).dtype for part in (model.model.backbone, model.model.retro)}
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=len(dtypes) > 1)


def _attended(model: RetroForCausalLM, layer: int, batch: _Recorded) -> torch.Tensor:
    """How much a layer attends to each neighbor token, the mean of its heads: (N, m, S)."""
    config: Any = model.config
    cross = model.model.retro.cross_attention[str(layer)]
    states = batch.states[layer].float()
    key, value = cross.attention.project_key_value(batch.neighbor_states.float())
    table = cross_attention_distances(config.chunk_size, config.neighbor_size, states.device)
    _, weights = cross.attention.attend(
        states,
        key,
        value,
        sinusoids_of(table, states.shape[-1], states.dtype),
        batch.neighbor_mask[:, None, None],
        num_repeats=batch.neighbor_mask.shape[1] // config.neighbor_size,
        null_logits=cross.null_logits,
    )
    attended: torch.Tensor = weights[..., :-1].mean(dim=1)
    return attended


def _gain(raised: torch.Tensor, batch: _Recorded) -> torch.Tensor:
    """Nats per scored token that are gained over the base if every neighbor token raises its own logit, by (N, m, S)."""
    same = (batch.neighbor_ids[:, None] == batch.neighbor_ids[:, :, None]) & batch.neighbor_mask[:, None]
    by_token = raised @ same.to(raised.dtype)
    # A token that stands there several times counts once.
    share = batch.probabilities.float() / same.sum(dim=-1).clamp_min(1)[:, None]
    grown = (share * by_token.expm1()).sum(dim=-1)
    return ((raised * batch.is_next).sum(dim=-1) - grown.log1p())[batch.is_scored].mean()


@torch.no_grad()
def _set_strength(model: RetroForCausalLM, batches: list[Mapping[str, torch.Tensor]]) -> None:
    """Let the last layer, whose outputs reach the logits almost unchanged, write as strongly as serves the loss."""
    output = list(model.model.retro.cross_attention.values())[-1].attention.o_proj.weight
    before, losses = output.clone(), []
    for factor in _FACTORS:
        output.copy_(before * factor)
        with _both_types(model):
            losses.append(sum(float(model(**_moved(batch, model.device)).loss) for batch in batches))
    output.copy_(before * _FACTORS[losses.index(min(losses))])
