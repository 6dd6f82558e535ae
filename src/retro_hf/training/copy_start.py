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


_BEFORE = (1, 1, 2)  # which token before it each of the encoder's first heads brings to a token
_SHARES = (0.5, 0.25, 0.25)  # of a key: the token before, the one before that, and the token itself
_CONSTANT = 4.0  # a channel that is the same for every token
_SHARPNESS = 4.0  # of the match between text and neighbor
_NULL_LOGIT = 9.0
_STRENGTH = 0.1  # of what is copied, as a share of the residual stream
_BATCH = 4


@torch.no_grad()
def start_by_copying(model: RetroForCausalLM, input_ids: torch.Tensor) -> None:
    """Set the weights of a new reader so that it copies, as an induction head does: what followed there is predicted here.

    A reader that begins at random first has to find out where to look, and that takes most of a short training. Here the encoder gives
    every neighbor token the two tokens before it, cross-attention looks for neighbor tokens that follow what the text just said, and
    what it finds raises its own logit. What cannot be written down is fitted: how a layer's states tell the current token, the token
    before and the next one is a ridge regression over `input_ids`.

    The model no longer equals its base with neighbors; without them it does. Call it before the first training step.

    Args:
        model ([`RetroForCausalLM`]): made by [`retrofit`] with the reader `"cross_attention"`, `share_embeddings=True` and
            `cross_attention_null_key=True`. The encoder needs three heads, a width that is not the base's, and more than three times
            its `head_dim`.
        input_ids (`torch.LongTensor` of shape `(B, T)`): text without padding, on the model's device. 40,000 tokens of mixed text are
            enough for SmolLM2-135M, about one minute on a CPU.
    Raises:
        ValueError: if the model has not what is needed, or the text is too short for the regression.
    """
    if not isinstance(model, RetroForCausalLM):
        raise ValueError(
            f"The model is of type {type(model).__name__}. Pass a RetroForCausalLM, as `retrofit` makes it."
        )
    reader: Any = model.model.retro
    config: Any = model.config
    _check(model, input_ids)
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
    before = []
    for head, distance in enumerate(_BEFORE):
        projection = directions(code_size, head_dim)
        part = slice(code_size + 1 + head * head_dim, code_size + 1 + (head + 1) * head_dim)
        _attend_to_distance(encoder.layers[0].self_attn, head, distance, config.neighbor_size, code_size, scale)
        _carry(encoder.layers[0].self_attn, head, projection.T * scale, part)
        before.append(code @ projection)
    targets = torch.cat([before[0], before[1], before[2], code], dim=1)

    # Cross-attention: queries that tell what the keys hold, values that raise their own logit.
    queries, size = _fit_queries(model, input_ids, targets)
    scale = math.sqrt((width - 1 + _CONSTANT**2) / width)
    towards = _raises_logit(model, share) @ torch.linalg.pinv(code).T  # (hidden_size, code_size)
    first, second, own = 2 * head_dim, 3 * head_dim, width - 1
    for layer_idx, cross in reader.cross_attention.items():
        attention, fitted = cross.attention, queries[int(layer_idx)]
        heads, head_width = attention.num_heads, attention.head_dim
        shares = [round(share * head_width) for share in _SHARES[:2]]
        shares.append(head_width - sum(shares))
        for head in range(heads):
            rows = slice(head * head_width, (head + 1) * head_width)
            ends, query, key = (0, first, second, own), [], []
            for start, end, count in zip(ends, ends[1:], shares, strict=False):
                drawn = directions(end - start, count)
                query.append(fitted[:, start:end] @ drawn)
                held = torch.zeros(width, count)
                where = slice(code_size + 1 + start, code_size + 1 + end) if end <= second else slice(0, code_size)
                held[where] = drawn
                key.append(held)
            attention.q_proj.weight[rows].copy_(torch.cat(query, dim=1).T * _SHARPNESS * 8 / head_width**0.5)
            attention.k_proj.weight[rows].copy_(torch.cat(key, dim=1).T * scale)
        attention.position_bias.weight.mul_(0.3)
        values = directions(heads * head_width, min(code_size, heads * head_width))
        values = torch.nn.functional.pad(values, (0, code_size - values.shape[1]))
        attention.v_proj.weight.zero_()
        attention.v_proj.weight[:, :code_size].copy_(values * scale)
        output = towards @ values.T
        written = (code @ values.T @ output.T).norm(dim=1).mean()
        attention.o_proj.weight.copy_(output * (_STRENGTH * size[int(layer_idx)] / written))
        cross.null_logits.fill_(_NULL_LOGIT)


def _check(model: RetroForCausalLM, input_ids: torch.Tensor) -> None:
    check_plain("`input_ids`", input_ids)
    check_ids(input_ids, vocabulary_of(model))
    config: Any = model.config
    encoder, reader = config.neighbor_encoder_config, getattr(model.model.retro, "encoder", None)
    needed = len(_BEFORE) * encoder.head_dim + 2
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
    if encoder.hidden_size < needed or encoder.num_attention_heads < len(_BEFORE):
        raise ValueError(
            f"`start_by_copying` needs an encoder of at least {len(_BEFORE)} heads and a width of at least {needed}, got "
            f"{encoder.num_attention_heads} heads and {encoder.hidden_size}. Give a larger `encoder` to `retrofit`."
        )
    if config.cross_attention_head_dim > 4 * encoder.head_dim:
        raise ValueError(
            f"`start_by_copying` needs heads of cross-attention that are at most four times as wide as the encoder's, got "
            f"cross_attention_head_dim={config.cross_attention_head_dim} and head_dim={encoder.head_dim}. Give `retrofit` "
            f"cross_attention_head_dim={4 * encoder.head_dim}, or an encoder of wider heads."
        )
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
    model: RetroForCausalLM, input_ids: torch.Tensor, targets: torch.Tensor
) -> tuple[dict[int, torch.Tensor], dict[int, float]]:
    """By layer: a map from normed states to the codes of the current token, the one before and the next; the size of the states.

    `targets` holds the codes of every token: twice that of the token before, that of the one before that, and its own.
    """
    config: Any = model.config
    layers, width, head_dim = (
        config.cross_attention_layers,
        config.hidden_size,
        config.neighbor_encoder_config.head_dim,
    )
    gram = {layer: torch.zeros(width, width) for layer in layers}
    cross = {layer: torch.zeros(width, targets.shape[1]) for layer in layers}
    norms = dict.fromkeys(layers, 0.0)
    for ids in input_ids.split(_BATCH):
        recorded = _StateRecorder()
        run_within(recorded, model.model.backbone.base_model, {"input_ids": ids, "use_cache": False})
        now, past, following = (part.flatten().cpu() for part in (ids[:, 1:-1], ids[:, :-2], ids[:, 2:]))
        known = torch.cat(
            [
                targets[now, : 2 * head_dim],
                targets[past, 2 * head_dim : 3 * head_dim],
                targets[following, 3 * head_dim :],
            ],
            dim=1,
        )
        for layer, states in recorded.states.items():
            hidden = states[:, 1:-1].flatten(0, 1).float().cpu()
            norms[layer] += float(hidden.norm(dim=1).sum())
            normed = hidden * hidden.pow(2).mean(dim=1, keepdim=True).add(config.rms_norm_eps).rsqrt()
            gram[layer] += normed.T @ normed
            cross[layer] += normed.T @ known
    count = input_ids.shape[0] * (input_ids.shape[1] - 2)
    ridge = {layer: 2e-3 * gram[layer].diagonal().mean() * torch.eye(width) for layer in layers}
    maps = {layer: torch.linalg.solve(gram[layer] + ridge[layer], cross[layer]) for layer in layers}
    return maps, {layer: norms[layer] / count for layer in layers}


class _StateRecorder:
    """In the place of a `RetroPass`: keeps the states that cross-attention would read, and adds nothing."""

    def __init__(self) -> None:
        self.layer_inputs: dict[int, torch.Tensor] = {}
        self.states: dict[int, torch.Tensor] = {}

    def __call__(self, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        self.states[layer_idx] = hidden_states
        return torch.zeros_like(hidden_states)


def _raises_logit(model: RetroForCausalLM, share: torch.Tensor) -> torch.Tensor:
    """For every token the direction of the last residual stream that raises its logit: (hidden_size, tokens).

    Against the others as often as they occur, so that the code 0, that of an average token, raises none.
    """
    head = _weight(model.get_output_embeddings()).float().cpu()
    parts = model.model.backbone.base_model.children()
    norms = [weight for weight in map(_weight, parts) if weight.shape == head.shape[1:]]
    return ((head - share @ head) * (norms[-1].float().cpu() if norms else 1.0)).T


def _weight(module: nn.Module | None) -> torch.Tensor:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, torch.Tensor) else torch.empty(0)
