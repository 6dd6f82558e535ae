"""start_by_copying: lets a new reader copy from its neighbors before the first training step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..model.attention_retro import RetroAttention, sinusoids_of
from ..model.backbone_retro import run_within
from ..model.inputs_retro import check_ids, vocabulary_of
from ..model.modeling_retro import RetroForCausalLM
from ..model.values_retro import check_plain


_BEFORE = (1, 1, 1, 2, 2)  # which token before it each of the encoder's first heads brings to a token
_CONSTANT = 4.0  # a channel that is the same for every token
_MATCH = 10.0  # mean logit of a neighbor token that follows what the text just said
_NULL_LOGIT = 10.0
_STRENGTH = 0.1  # of what is copied, as a share of the residual stream
_BATCH = 4


@torch.no_grad()
def start_by_copying(model: RetroForCausalLM, input_ids: torch.Tensor) -> None:
    """Set the weights of a new reader so that it copies, as an induction head does: what followed there is predicted here.

    A reader that begins at random first has to find out where to look, and that takes most of a short training. Here the encoder gives
    every neighbor token the two tokens before it, cross-attention looks for neighbor tokens that follow what the text just said, and
    what it finds raises its own logit. What cannot be written down is fitted over `input_ids`: what a layer's states tell of the
    current token and the one before, and which direction raises a logit. [`train_pointer`] goes on from there.

    The model no longer equals its base with neighbors; without them it does. Call it before the first training step.

    Args:
        model ([`RetroForCausalLM`]): made by [`retrofit`] with the reader `"cross_attention"`, `share_embeddings=True` and
            `cross_attention_null_key=True`. The encoder needs five heads, a width that is not the base's, and more than eight times
            its `head_dim`.
        input_ids (`torch.LongTensor` of shape `(B, T)`): text without padding, on the model's device. 40,000 tokens of mixed text are
            enough for SmolLM2-135M, about one minute on a CPU.
    Raises:
        ValueError: if the model has not what is needed, or the text is too short for the regression.
    """
    check_copier(model)
    check_plain("`input_ids`", input_ids)
    check_ids(input_ids, vocabulary_of(model))
    reader: Any = model.model.retro
    config: Any = model.config
    _check_text(config, input_ids)
    encoder = reader.encoder
    width, head_dim = encoder.hidden_size, config.neighbor_encoder_config.head_dim
    code_size = width - 1 - len(_BEFORE) * head_dim
    generator = torch.Generator().manual_seed(0)

    def directions(rows: int, columns: int) -> torch.Tensor:
        """Orthonormal columns."""
        return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]

    embeddings = _weight(model.get_input_embeddings()).float().cpu()
    # How often each token occurs; a little for those that the text lacks.
    counts = torch.bincount(input_ids.cpu().flatten(), minlength=len(embeddings)).float() + 0.02
    share = counts / counts.sum()
    to_code = _fit_code(embeddings, share, code_size)
    code = embeddings @ to_code[:, :code_size]

    # The encoder: [code of the token, constant, codes of the tokens before it].
    encoder.embed_proj.weight.copy_(to_code.T.new_zeros(width, len(embeddings[0])))
    encoder.embed_proj.weight[: code_size + 1].copy_(to_code.T)
    for layer in encoder.layers:
        branches = [layer.self_attn.o_proj, layer.mlp.down_proj]
        for last in [*branches, layer.cross_attn.o_proj] if layer.has_cross_attention else branches:
            last.weight.zero_()
    scale = math.sqrt((code_size + _CONSTANT**2) / width)
    before = {}  # by distance: a part of the code of each token, (vocabulary, part)
    for distance in sorted(set(_BEFORE)):
        heads = [head for head, one in enumerate(_BEFORE) if one == distance]
        projection = directions(code_size, len(heads) * head_dim)
        before[distance] = code @ projection
        for head, columns in zip(heads, projection.split(head_dim, dim=1), strict=True):
            part = slice(code_size + 1 + head * head_dim, code_size + 1 + (head + 1) * head_dim)
            _attend_to_distance(encoder.layers[0].self_attn, head, distance, config.neighbor_size, code_size, scale)
            _carry(encoder.layers[0].self_attn, head, columns.T * scale, part)

    # Cross-attention: queries that tell what the keys hold, values that raise their own logit.
    queries, size = _fit_queries(model, input_ids, before)
    scale = math.sqrt((width - 1 + _CONSTANT**2) / width)
    towards = _raises_logit(model, share, code)
    held = len(_BEFORE) * head_dim
    for layer_idx, cross in reader.cross_attention.items():
        attention, fitted = cross.attention, queries[int(layer_idx)]
        heads, head_width = attention.num_heads, attention.head_dim
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        for head in range(heads):
            drawn = directions(held, min(head_width, held)) * max(held / head_width, 1.0) ** 0.5
            rows = slice(head * head_width, head * head_width + drawn.shape[1])
            attention.q_proj.weight[rows] = (fitted @ drawn).T * head_width**0.5
            attention.k_proj.weight[rows, code_size + 1 :] = drawn.T * scale
        attention.position_bias.weight.zero_()
        values = directions(heads * head_width, min(code_size, heads * head_width))
        values = torch.nn.functional.pad(values, (0, code_size - values.shape[1]))
        attention.v_proj.weight.zero_()
        attention.v_proj.weight[:, :code_size].copy_(values * scale)
        output = towards @ values.T
        written = (code @ values.T @ output.T).norm(dim=1).mean()
        attention.o_proj.weight.copy_(output * (_STRENGTH * size[int(layer_idx)] / written))
        cross.null_logits.fill_(_NULL_LOGIT)


def check_copier(model: RetroForCausalLM) -> None:
    """Raise ValueError unless a model has all that copying needs."""
    if not isinstance(model, RetroForCausalLM):
        raise ValueError(
            f"The model is of type {type(model).__name__}. Pass a RetroForCausalLM, as `retrofit` makes it."
        )
    config: Any = model.config
    encoder, reader = config.neighbor_encoder_config, getattr(model.model.retro, "encoder", None)
    if config.reader != "cross_attention" or not config.cross_attention_null_key:
        raise ValueError(
            f"`start_by_copying` needs reader='cross_attention' and cross_attention_null_key=True, got reader={config.reader!r} and "
            f"cross_attention_null_key={config.cross_attention_null_key}. Give both to `retrofit`."
        )
    if getattr(reader, "embed_proj", None) is None:
        raise ValueError(
            f"`start_by_copying` needs share_embeddings=True and an encoder whose width is not that of the base's embeddings, got "
            f"share_embeddings={config.share_embeddings} and a width of {encoder.hidden_size}."
        )
    # Channels for the tokens before, a constant, and a code that is no smaller than what it is projected to.
    needed = (len(_BEFORE) + _BEFORE.count(1)) * encoder.head_dim + 1
    if encoder.hidden_size < needed or encoder.num_attention_heads < len(_BEFORE):
        raise ValueError(
            f"`start_by_copying` needs an encoder of at least {len(_BEFORE)} heads and a width of at least {needed}, got "
            f"{encoder.num_attention_heads} heads and {encoder.hidden_size}. Give a larger `encoder` to `retrofit`."
        )


def _check_text(config: Any, input_ids: torch.Tensor) -> None:
    wanted = 4 * config.hidden_size
    if input_ids.numel() < wanted or input_ids.shape[-1] < 8:
        raise ValueError(
            f"`start_by_copying` fits maps to {config.hidden_size} channels and needs at least {wanted} tokens in rows of at least 8, got "
            f"the shape {tuple(input_ids.shape)}. Give more text."
        )


def _fit_code(embeddings: torch.Tensor, share: torch.Tensor, size: int) -> torch.Tensor:
    """Map from an embedding to its code, of mean 0 and RMS 1 over the text, and to a constant: (embedding_size, size + 1).

    The code is the embedding in its leading directions, each brought to the same spread. An embedding has a direction that is nearly
    the same for all tokens, which takes the place of a bias.
    """
    mean = share @ embeddings
    centered = embeddings - mean
    spread, directions = torch.linalg.eigh((centered * share[:, None]).T @ centered)
    kept = directions.flip(1)[:, :size] / spread.flip(0)[:size].clamp_min(1e-12).sqrt()
    if kept.shape[1] < size:
        kept = nn.functional.pad(kept, (0, size - kept.shape[1]))
    rms = (share @ (centered @ kept).pow(2).mean(dim=1)).sqrt()
    one = torch.linalg.lstsq(embeddings, torch.ones(len(embeddings), 1)).solution
    return torch.cat([(kept - one @ (mean @ kept)[None]) / rms, _CONSTANT * one], dim=1)


def _attend_to_distance(
    attention: RetroAttention, head: int, distance: int, neighbor_size: int, constant: int, scale: float
) -> None:
    """Let a head of the encoder attend to the token at a distance before each token."""
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    width = attention.q_proj.in_features
    sinusoids = sinusoids_of(torch.arange(1 - neighbor_size, neighbor_size), width, torch.float32)
    bias = torch.zeros(width)
    target = torch.tensor([distance + neighbor_size - 1])
    with torch.enable_grad():
        bias.requires_grad_()
        optimizer = torch.optim.Adam([bias], lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy((sinusoids @ bias)[None], target) + 1e-4 * bias.pow(2).sum()
            loss.backward()
            optimizer.step()
    attention.q_proj.weight[rows] = 0.0
    attention.q_proj.weight[rows.start, constant] = 1.0
    attention.k_proj.weight[rows] *= 0.1
    attention.position_bias.weight[rows] = 0.0
    attention.position_bias.weight[rows.start].copy_(bias.detach() / (_CONSTANT / scale * attention.scaling))


def _carry(attention: RetroAttention, head: int, projection: torch.Tensor, part: slice) -> None:
    """Let a head write a projection of the code of what it attends to into the channels `part`."""
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    attention.v_proj.weight[rows] = 0.0
    attention.v_proj.weight[rows, : projection.shape[1]].copy_(projection)
    attention.o_proj.weight[part, rows].copy_(torch.eye(attention.head_dim))


def _fit_queries(
    model: RetroForCausalLM, input_ids: torch.Tensor, before: dict[int, torch.Tensor]
) -> tuple[dict[int, torch.Tensor], dict[int, float]]:
    """By layer: a map from normed states to queries for the codes of the last tokens, and the size of the states.

    A neighbor token whose token before it is at distance 1 is one that follows the current token. With y, the codes of the current
    token and of those before it, W h is what a state h tells of y by ridge regression, S is the covariance of what it does not tell,
    and W h S⁻¹ y is the score of linear discriminant analysis: how much more likely the state is after these tokens than after others.
    """
    config: Any = model.config
    layers, width = config.cross_attention_layers, config.hidden_size
    size, reach = sum(part.shape[1] for part in before.values()), max(before)
    gram = {layer: torch.zeros(width, width) for layer in layers}
    cross = {layer: torch.zeros(width, size) for layer in layers}
    norms, spread = dict.fromkeys(layers, 0.0), torch.zeros(size, size)
    for ids in input_ids.split(_BATCH):
        recorded = StateRecorder()
        run_within(recorded, model.model.backbone.base_model, {"input_ids": ids, "use_cache": False})
        length = ids.shape[1]
        known = torch.cat(
            [part[ids[:, reach - distance : length - distance + 1].cpu()] for distance, part in before.items()], dim=-1
        ).flatten(0, 1)
        spread += known.T @ known
        for layer, states in recorded.states.items():
            hidden = states[:, reach - 1 :].flatten(0, 1).float().cpu()
            norms[layer] += float(hidden.norm(dim=1).sum())
            normed = hidden * hidden.pow(2).mean(dim=1, keepdim=True).add(config.rms_norm_eps).rsqrt()
            gram[layer] += normed.T @ normed
            cross[layer] += normed.T @ known
    count, queries = input_ids.shape[0] * (input_ids.shape[1] - reach + 1), {}
    for layer in layers:
        ridge = 2e-3 * gram[layer].diagonal().mean() * torch.eye(width)
        told = torch.linalg.solve(gram[layer] + ridge, cross[layer])
        part = told.T @ cross[layer]
        unknown = (spread - part - part.T + told.T @ gram[layer] @ told) / count
        unknown += 1e-3 * unknown.diagonal().mean() * torch.eye(size)
        scored = told @ torch.linalg.inv(unknown)
        mean = float((scored * cross[layer]).sum()) / count
        queries[layer] = scored * (_MATCH / mean)
    return queries, {layer: norms[layer] / count for layer in layers}


class StateRecorder:
    """In the place of a `RetroPass`: keeps the states that cross-attention would read, and adds nothing."""

    def __init__(self) -> None:
        self.layer_inputs: dict[int, torch.Tensor] = {}
        self.states: dict[int, torch.Tensor] = {}

    def __call__(self, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Called by the hook of a layer."""
        self.states[layer_idx] = hidden_states
        return torch.zeros_like(hidden_states)


def _raises_logit(model: RetroForCausalLM, share: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """A map from codes to the last residual stream, (hidden_size, code_size), so that each token raises its own logit.

    It is fitted, over all tokens as often as they occur: the logit of token w grows by code(w) · code(v) if v is copied. So an average
    token, whose code is 0, raises none.
    """
    head = _weight(model.get_output_embeddings()).float().cpu()
    parts = model.model.backbone.base_model.children()
    norms = [weight for weight in map(_weight, parts) if weight.shape == head.shape[1:]]
    head = (head - share @ head) * (norms[-1].float().cpu() if norms else 1.0)
    weighted = head.T * share
    gram = weighted @ head
    return torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)), weighted @ code)


def _weight(module: nn.Module | None) -> torch.Tensor:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, torch.Tensor) else torch.empty(0)
