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
"""The paper's decoder, a plain causal language model: relative positions → attention → layer → `RetroDecoderForCausalLM`.

Shape legend: B batch, T tokens, H heads, D head_dim, Q queries, K keys, P distances.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .compatibility_retro import CACHE_NAME, CACHE_NAMES, accept_cache_by_any_name, slice_logits_to_keep
from .configuration_retro import RetroDecoderConfig


CAUSAL_BLOCK, GPU_CAUSAL_BLOCK = 128, 1024
"""Queries per block of causal attention, in tokens. On a CPU 128 are 2.5 times as fast as 1024. On an H100 a training step of 8
sequences of 2048 tokens (80 million parameters, bfloat16) takes 160 ms with 1024, 175 with 512, 340 to 520 with 128."""

FEATURE_BLOCK = 256
"""Distances by which the table of their features grows in generation."""


class RetroRMSNorm(nn.RMSNorm):
    """Root mean square norm: x / sqrt(mean(x²) + eps) · weight (section 2.5)."""


def position_features(distances: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Sines and cosines of relative distances, as in Transformer-XL (B.1.2).

    Args:
        distances (`torch.LongTensor` of shape `(...,)`): distances in tokens, of any sign.
        width (`int`): number of features, even.
        dtype (`torch.dtype`): of the result; the angles are computed in float32.
    Returns:
        `torch.FloatTensor` of shape `(..., width)`: `width / 2` sines, then as many cosines, of d / 10000^(2t / width).
    """
    exponent = torch.arange(0, width, 2, device=distances.device, dtype=torch.float32) / width
    angles = distances.float().unsqueeze(-1) * torch.pow(10000.0, -exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


def relative_shift(scores: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Turn scores by distance into scores by key, without a copy.

    Column c of `scores` belongs to the distance `largest - c`, where `largest` is that of the last query to key 0. Then
    query i meets key j in column Q - 1 - i + j, and reading each row one element further on lines the keys up.

    Args:
        scores (`torch.FloatTensor` of shape `(..., Q, P)`): contiguous, with P > `num_keys` where Q > 1. Where
            P < Q + K - 1 the entries of the last keys are meaningless and must be masked (causal attention).
        num_keys (`int`): K.
    Returns:
        `torch.FloatTensor` of shape `(..., Q, K)`.
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
    """Softmax attention with a relative-position bias; keeps one probability matrix for the backward pass.

    Args:
        module (`nn.Module`): the attention layer; `is_causal` is read where `attention_mask` is None.
        query (`torch.FloatTensor` of shape `(B, H, Q, D)`), key, value (`(B, H, K, D)`): projected states.
        attention_mask (`torch.Tensor` of shape `(B, 1, Q or 1, K)`, *optional*): boolean, True where a key may be seen,
            or additive.
        scaling (`float`): factor of the logits.
        position_bias (`torch.FloatTensor` of shape `(B, H, Q, K)`): added to the scaled logits.
        dropout (`float`): probability of dropping an attention weight.
    Returns:
        The output of shape `(B, Q, H, D)` and the probabilities of shape `(B, H, Q, K)`.
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


class RetroRelativePositionBias(nn.Module):
    """Positional logits q · R s(d), "a linear transform of a cosine vector computed from d" (B.1.2).

    Args:
        width (`int`): features per distance, the width of the query stream.
        num_heads (`int`), head_dim (`int`): of the attention it belongs to.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim, width))

    def forward(self, features: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """Project distances, or score them for a few queries without projecting them.

        Args:
            features (`torch.FloatTensor` of shape `(P, width)`, or `(B, P, width)` with `query`): of the distances, in
                decreasing order (see `relative_shift`).
            query (`torch.FloatTensor` of shape `(B, H, Q, D)`, *optional*): scaled queries.
        Returns:
            R s(d) of shape `(H, D, P)`; with `query` its products q · R s(d), of shape `(B, H, Q, P)`.
        """
        weight = self.weight.view(self.num_heads, self.head_dim, -1)
        by_distance = features.transpose(-1, -2)
        if query is None:
            return torch.matmul(weight, by_distance.unsqueeze(-3))
        # The heads side by side: every feature is read once, not once per head.
        scores = torch.matmul(torch.matmul(query, weight).flatten(1, 2), by_distance)
        return scores.unflatten(1, query.shape[1:3])


class RetroAttention(nn.Module):
    """Multi-head attention with Transformer-XL relative positions; the paper's only kind of attention.

    Q, K, V, O and the position projection R have no bias, which is what the paper's parameter totals ask for.

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

    # trf-ignore: TRF029 (one class serves four attentions, whose sizes stand in three configs)
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
        self.position_bias = RetroRelativePositionBias(hidden_size, num_heads, head_dim)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-2, -3)

    def project_key_value(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project `(B, K, key_value_size)` states to keys and values of shape `(B, H, K, D)`."""
        return self._split_heads(self.k_proj(states)), self._split_heads(self.v_proj(states))

    def attend(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        features: torch.Tensor,
        attention_mask: torch.Tensor | None,
        num_repeats: int = 1,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to projected keys and values; the keys are `num_repeats` runs with the same distances; see `forward`."""
        query = self._split_heads(self.q_proj(hidden_states))
        batch_size, _, num_queries, _ = query.shape
        in_blocks = self.is_causal and num_queries == key.shape[-2] and num_queries > self._block_size(query)
        # trf-ignore: TRF051 (eager returns whole probabilities)
        if in_blocks and self.config._attn_implementation != "eager":
            return self.o_proj(self._attend_in_blocks(query, key, value, features, attention_mask, **kwargs)), None
        if batch_size * num_queries <= self.head_dim:  # a step of generation must not project the whole past
            scores = self.position_bias(features, query * self.scaling)
        else:
            scores = torch.matmul(query * self.scaling, self.position_bias(features))
        bias = relative_shift(scores, key.shape[-2] // num_repeats)
        bias = bias.unsqueeze(-2).expand(-1, -1, -1, num_repeats, -1).flatten(-2)  # a view for one run
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
        # A bias that needs a gradient has no fused kernel on CPU: there sdpa would keep more matrices than we do. The mode
        # decides and not the tensor, so that retrieval on and off take the same path.
        # trf-ignore: TRF051
        if self.config._attn_implementation == "eager" or (torch.is_grad_enabled() and query.device.type == "cpu"):
            return eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager_attention_forward)

    def _attend_in_blocks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        features: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Causal attention in blocks of queries, which never computes most of the future: half the time and memory.

        Probabilities are recomputed in the backward pass, one block at a time, instead of kept.
        """
        table = self.position_bias(features)
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
        features: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `hidden_states` to themselves or to `key_value_states`.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, Q, hidden_size)`): normalized query stream.
            features (`torch.FloatTensor` of shape `(P, hidden_size)`): see [`RetroRelativePositionBias`].
            key_value_states (`torch.FloatTensor` of shape `(B, K, key_value_size)`, *optional*): what is attended to.
            attention_mask (`torch.Tensor` of shape `(B, 1, Q or 1, K)`, *optional*): boolean, True where seen, or
                additive.
            past_key_values (`Cache`, *optional*): keys and values of earlier tokens, extended in place.
        Returns:
            The output of shape `(B, Q, hidden_size)` and the attention probabilities, None under sdpa.
        """
        key, value = self.project_key_value(hidden_states if key_value_states is None else key_value_states)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self.attend(hidden_states, key, value, features, attention_mask, **kwargs)


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


class RetroDecoderLayer(GradientCheckpointingLayer):
    """LM(H) = FFW(ATTN(H)), equation 2, both residual and pre-normed."""

    def __init__(self, config: RetroDecoderConfig, layer_idx: int):
        super().__init__()
        self.self_attn_norm = RetroRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = RetroAttention(
            config,
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            is_causal=True,
            layer_idx=layer_idx,
            dropout=config.attention_dropout,
        )
        self.mlp_norm = RetroRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = RetroMLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    @accept_cache_by_any_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Map the residual stream `(B, T, hidden_size)` to the same shape; `features` as in [`RetroAttention`]."""
        attention, _ = self.self_attn(
            self.self_attn_norm(hidden_states),
            features,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attention
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


@auto_docstring(custom_intro="Weight initialization, loading and saving of the paper's decoder.")
class RetroDecoderPreTrainedModel(PreTrainedModel):
    config: RetroDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RetroDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": RetroDecoderLayer, "attentions": RetroAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RetroRelativePositionBias):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


def _distance_features(largest: int, num_distances: int, like: torch.Tensor, cache: Any) -> torch.Tensor:
    """Features `(num_distances, hidden_size)` of `largest` and the distances below it.

    A step of generation needs all distances down to 0, one more than the step before: it takes them from the end of a
    table that rides on the cache and is made anew every `FEATURE_BLOCK` steps.
    """
    if cache is None or num_distances != largest + 1:
        return position_features(largest - torch.arange(num_distances, device=like.device), like.shape[-1], like.dtype)
    table = getattr(cache, "position_features", None)
    if table is None or len(table) < num_distances:
        size = -(-num_distances // FEATURE_BLOCK) * FEATURE_BLOCK
        distances = size - 1 - torch.arange(size, device=like.device)
        table = cache.position_features = position_features(distances, like.shape[-1], like.dtype)
    return table[-num_distances:]


@auto_docstring(custom_intro="The paper's decoder without its read-out: hidden states of every token.")
class RetroDecoderModel(RetroDecoderPreTrainedModel):
    def __init__(self, config: RetroDecoderConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([RetroDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RetroRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    @accept_cache_by_any_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`, not both and not neither.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_queries = inputs_embeds.shape[1]
        num_past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        num_keys = num_queries if past_key_values is None else past_key_values.get_mask_sizes(num_queries, 0)[0]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values},
        )
        # Only differences count, so columns serve as positions: padding shifts a query and its keys alike. One negative
        # distance is enough, keys further ahead are masked.
        num_distances = num_keys + (num_queries > 1)
        features = _distance_features(num_past + num_queries - 1, num_distances, inputs_embeds, past_key_values)

        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, causal_mask, features, **{CACHE_NAME: past_key_values}, use_cache=use_cache, **kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: past_key_values})


@auto_docstring(
    custom_intro="The paper's decoder with its read-out: RETRO's baseline, and its backbone when trained from scratch."
)
class RetroDecoderForCausalLM(RetroDecoderPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RetroDecoderConfig):
        super().__init__(config)
        self.model = RetroDecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    @accept_cache_by_any_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


__all__ = ["RetroDecoderForCausalLM", "RetroDecoderModel", "RetroDecoderPreTrainedModel"]
