# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What the decoder, the neighbor encoder and chunked cross-attention are made of (sections 2.4, 2.5 and B.1.2).

Shapes: B rows, Q queries, S keys, D head_dim, W distances. In chunked cross-attention the keys are S = K · R neighbor tokens.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs


CAUSAL_BLOCK, GPU_CAUSAL_BLOCK = 128, 1024
"""Queries per block of causal attention, in tokens. On a CPU 128 are 2.5 times as fast as 1024. On an H100 a training step of 8
sequences of 2048 tokens (80 million parameters, bfloat16) takes 160 ms with 1024, 175 with 512, 340 to 520 with 128."""


class RetroRMSNorm(nn.RMSNorm):
    """Root mean square norm: x / sqrt(mean(x²) + eps) · weight (section 2.5)."""


def sinusoids_of(distances: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Sines and cosines of relative distances, as in Transformer-XL (B.1.2).

    Args:
        distances (`torch.LongTensor` of shape `(...,)`): distances in tokens, of any sign.
        width (`int`): number of sinusoids, even.
        dtype (`torch.dtype`): of the result; the angles are computed in float32.
    Returns:
        `torch.FloatTensor` of shape `(..., width)`: `width / 2` sines, then as many cosines, of d / 10000^(2t / width).
    """
    exponent = torch.arange(0, width, 2, device=distances.device, dtype=torch.float32) / width
    angles = distances.float().unsqueeze(-1) * torch.pow(10000.0, -exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


def relative_shift(scores: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Turn scores by distance into scores by key, without a copy.

    Column 0 of `scores` belongs to the largest distance, from the last query to key 0, and each column after it to a distance
    that is less by one. So the score of query i and key j is in column Q - 1 - i + j: each row is shifted by one against the
    row above. Reading the same memory with rows of W - 1 instead of W elements undoes the shift. With Q = 2 queries, S = 2
    keys and W = 3 distances:

        memory, rows of 3      a b c | d e f       query 0 needs b c, query 1 needs d e
        from b, rows of 2          b c | d e

    Args:
        scores (`torch.FloatTensor` of shape `(..., Q, W)`): contiguous, with W > `num_keys` where Q > 1. With
            fewer distances than W = Q + S - 1, the last keys of the first queries get wrong scores, and the caller must mask
            them, as causal attention does.
        num_keys (`int`): S.
    Returns:
        `torch.FloatTensor` of shape `(..., Q, S)`.
    """
    num_queries, num_distances = scores.shape[-2:]
    if num_queries == 1:
        return scores[..., :num_keys]
    row = num_distances - 1
    start = num_queries - 1
    return scores.flatten(-2)[..., start : start + num_queries * row].unflatten(-1, (num_queries, row))[..., :num_keys]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    position_bias: torch.Tensor,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with a relative-position bias. It keeps one matrix of probabilities for the backward pass.

    Args:
        module (`nn.Module`): the attention layer; `is_causal` is read where `attention_mask` is None.
        query (`torch.FloatTensor` of shape `(B, heads, Q, D)`), key, value (`(B, heads, S, D)`): projected states.
        attention_mask (`torch.Tensor` of shape `(B, 1, Q or 1, S)`, *optional*): boolean, True where a key may be seen,
            or additive.
        scaling (`float`): factor of the logits.
        position_bias (`torch.FloatTensor` of shape `(B, heads, Q, S)`): added to the scaled logits.
        dropout (`float`): probability of dropping an attention weight.
    Returns:
        The output of shape `(B, Q, heads, D)` and the probabilities of shape `(B, heads, Q, S)`.
    """
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if attention_mask is None and module.is_causal and num_queries > 1:
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        attention_mask = ones.tril(num_keys - num_queries)
    scores = scores.add_(position_bias)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores.add_(attention_mask)
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class RetroPositionProjection(nn.Module):
    """The matrix A of the positional logits q · A s(d): "a linear transform of a cosine vector computed from d" (B.1.2).

    Args:
        width (`int`): sinusoids per distance, the width of the query stream.
        num_heads (`int`), head_dim (`int`): of the attention it belongs to.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim, width))

    def forward(self, sinusoids: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """Project the sinusoids of distances, or multiply them with a few queries without projecting them first.

        Args:
            sinusoids (`torch.FloatTensor` of shape `(W, width)`, or `(B, W, width)` with `query`): s(d) of the distances, in
                decreasing order (see `relative_shift`).
            query (`torch.FloatTensor` of shape `(B, heads, Q, D)`, *optional*): scaled queries.
        Returns:
            A s(d) of shape `(heads, D, W)`; with `query` the logits q · A s(d), of shape `(B, heads, Q, W)`.
        """
        weight = self.weight.view(self.num_heads, self.head_dim, -1)
        by_distance = sinusoids.transpose(-1, -2)
        if query is None:
            return torch.matmul(weight, by_distance.unsqueeze(-3))
        # With the heads side by side in one matrix, every sinusoid is read once, and not once per head.
        scores = torch.matmul(torch.matmul(query, weight).flatten(1, 2), by_distance)
        return scores.unflatten(1, query.shape[1:3])


class RetroAttention(nn.Module):
    """Multi-head attention with Transformer-XL relative positions; the paper's only kind of attention.

    The projections of queries, keys, values, output and positions have no bias; only so do the parameters add up to the paper's totals.

    Args:
        config (`PreTrainedConfig`): read for the attention implementation.
        hidden_size (`int`): width of the query stream and of the output.
        num_heads (`int`), head_dim (`int`): heads times head_dim need not be `hidden_size`.
        key_value_size (`int`, *optional*): width of the stream that is attended to; `hidden_size` by default.
        is_causal (`bool`, defaults to `False`): whether a missing mask means causal attention.
        layer_idx (`int`, *optional*): index in the key/value cache.
        dropout (`float`, defaults to 0.0): of attention probabilities.
    """

    num_key_value_groups = 1

    # trf-ignore: TRF029 (one class serves four attentions, whose sizes are in three configs)
    def __init__(
        self,
        config,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        key_value_size: int | None = None,
        is_causal: bool = False,
        layer_idx: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scaling = head_dim**-0.5
        self.is_causal = is_causal
        self.layer_idx = layer_idx
        self.dropout = dropout
        key_value_size = hidden_size if key_value_size is None else key_value_size
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(key_value_size, num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(key_value_size, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        # Weights of saved models have this name. What it computes are the sinusoids of distances, projected.
        self.position_bias = RetroPositionProjection(hidden_size, num_heads, head_dim)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-2, -3)

    def project_key_value(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project `(B, S, key_value_size)` states to keys and values of shape `(B, heads, S, D)`."""
        return self._split_heads(self.k_proj(states)), self._split_heads(self.v_proj(states))

    def attend(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinusoids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        num_repeats: int = 1,
        null_logits: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `hidden_states` to keys and values that are projected already.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, Q, hidden_size)`): normalized query stream.
            key, value (`torch.FloatTensor` of shape `(B, heads, S, D)`): as `project_key_value` makes them.
            sinusoids (`torch.FloatTensor` of shape `(W, hidden_size)` or `(B, W, hidden_size)`): of the distances to one of
                the neighbors, in decreasing order.
            attention_mask (`torch.Tensor` of shape `(B, 1, Q or 1, S)`, *optional*): boolean, True where seen, or
                additive.
            num_repeats (`int`, defaults to 1): how many neighbors of equal length the keys are; all have the same distances.
            null_logits (`torch.FloatTensor` of shape `(heads,)`, *optional*): give each head one more key, with this logit at
                every query, and the value zero.
        Returns:
            The output of shape `(B, Q, hidden_size)` and the attention probabilities, None under sdpa.
        """
        query = self._split_heads(self.q_proj(hidden_states))
        batch_size, _, num_queries, _ = query.shape
        in_blocks = self.is_causal and num_queries == key.shape[-2] and num_queries > self._block_size(query)
        # trf-ignore: TRF051 (eager returns whole probabilities)
        if in_blocks and self.config._attn_implementation != "eager":
            return self.o_proj(self._attend_in_blocks(query, key, value, sinusoids, attention_mask, **kwargs)), None
        if batch_size * num_queries <= self.head_dim:  # for few queries this costs less than projecting every distance
            scores = self.position_bias(sinusoids, query * self.scaling)
        else:
            scores = torch.matmul(query * self.scaling, self.position_bias(sinusoids))
        bias = relative_shift(scores, key.shape[-2] // num_repeats)
        bias = bias.unsqueeze(-2).expand(-1, -1, -1, num_repeats, -1).flatten(-2)  # a view for one run
        if null_logits is not None:
            key, value = (nn.functional.pad(states, (0, 0, 0, 1)) for states in (key, value))
            null = null_logits.to(bias.dtype).view(1, -1, 1, 1).expand(*bias.shape[:-1], 1)
            bias = torch.cat([bias, null], dim=-1)
            if attention_mask is not None:
                attention_mask = nn.functional.pad(attention_mask, (0, 1), value=attention_mask.dtype == torch.bool)
        output, weights = self._interface(query)(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            position_bias=bias,
            **kwargs,
        )
        return self.o_proj(output.flatten(-2)), weights

    def _block_size(self, query: torch.Tensor) -> int:
        return CAUSAL_BLOCK if query.device.type == "cpu" else GPU_CAUSAL_BLOCK

    def _interface(self, query: torch.Tensor) -> Callable:
        # On a CPU no fused kernel takes a bias that needs a gradient, and sdpa would keep more matrices than eager does. The
        # gradient mode decides, and not the tensor, so that retrieval on and off take the same path.
        # trf-ignore: TRF051
        if self.config._attn_implementation == "eager" or (torch.is_grad_enabled() and query.device.type == "cpu"):
            return eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager_attention_forward)

    def _attend_in_blocks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinusoids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Causal attention in blocks of queries. It skips most masked keys, which saves half of the time and memory.

        The backward pass computes the probabilities again, one block at a time, so that none are kept.
        """
        table = self.position_bias(sinusoids)
        interface = self._interface(query)

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, mask: torch.Tensor | None
        ) -> torch.Tensor:
            num_queries, num_keys = query.shape[-2], key.shape[-2]
            if mask is None:
                mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
                mask = mask.tril(num_keys - num_queries)[None, None]
            bias = relative_shift(torch.matmul(query * self.scaling, table), num_keys)
            dropout = self.dropout if self.training else 0.0
            return interface(
                self, query, key, value, mask, scaling=self.scaling, dropout=dropout, position_bias=bias, **kwargs
            )[0]

        outputs = []
        block_size = self._block_size(query)
        for start in range(0, query.shape[-2], block_size):
            end = min(start + block_size, query.shape[-2])
            mask = None if attention_mask is None else attention_mask[:, :, start:end, :end]
            block = (query[:, :, start:end], key[:, :, :end], value[:, :, :end], table[..., -(end + 1) :], mask)
            recompute = torch.is_grad_enabled()
            outputs.append(checkpoint(attend, *block, use_reentrant=False) if recompute else attend(*block))
        return torch.cat(outputs, dim=1).flatten(-2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        sinusoids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `hidden_states` to themselves; `attend` serves cross-attention.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, Q, hidden_size)`): normalized query stream.
            sinusoids (`torch.FloatTensor` of shape `(W, hidden_size)`): of the distances, in decreasing order.
            attention_mask (`torch.Tensor` of shape `(B, 1, Q or 1, S)`, *optional*): boolean, True where seen, or
                additive.
            past_key_values (`Cache`, *optional*): keys and values of earlier tokens, extended in place.
        Returns:
            The output of shape `(B, Q, hidden_size)` and the attention probabilities, None under sdpa.
        """
        key, value = self.project_key_value(hidden_states)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self.attend(hidden_states, key, value, sinusoids, attention_mask, **kwargs)


class RetroMLP(nn.Module):
    """The feed-forward layer FFW: up, activation, down, without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(..., hidden_size)` to the same shape."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
