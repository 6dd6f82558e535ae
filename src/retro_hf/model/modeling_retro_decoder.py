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
"""The paper's decoder, a plain causal language model: GPT-2 with RMSNorm and relative positions (section 2.5).

Shapes: B batch, T tokens.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_retro import RetroAttention, RetroMLP, RetroPositionProjection, RetroRMSNorm, sinusoids_of
from .compatibility_retro import CACHE_NAME, CACHE_NAMES, accept_cache_by_any_name, slice_logits_to_keep
from .configuration_retro import RetroDecoderConfig
from .inputs_retro import check_flags, check_inputs, check_labels, check_prompt, vocabulary_of


SINUSOID_BLOCK = 256
"""Distances by which the table of their sinusoids grows in generation."""


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
        sinusoids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Map the residual stream `(B, T, hidden_size)` to the same shape; `sinusoids` as in [`RetroAttention`]."""
        attention, _ = self.self_attn(
            self.self_attn_norm(hidden_states),
            sinusoids,
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
        if isinstance(module, RetroPositionProjection):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


def _distance_sinusoids(
    largest: int | torch.Tensor, num_distances: int, like: torch.Tensor, cache: Any
) -> torch.Tensor:
    """Sinusoids `(num_distances, hidden_size)` of `largest` and the distances below it. A static cache counts on the device.

    A step of generation needs all distances down to 0, one more than the step before. It takes them from the end of a
    table that is kept on the cache and made again every `SINUSOID_BLOCK` steps.
    """
    if cache is None or isinstance(largest, torch.Tensor) or num_distances != largest + 1:
        return sinusoids_of(largest - torch.arange(num_distances, device=like.device), like.shape[-1], like.dtype)
    table = getattr(cache, "distance_sinusoids", None)
    if table is None or len(table) < num_distances:
        size = -(-num_distances // SINUSOID_BLOCK) * SINUSOID_BLOCK
        distances = size - 1 - torch.arange(size, device=like.device)
        table = cache.distance_sinusoids = sinusoids_of(distances, like.shape[-1], like.dtype)
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
        check_inputs(input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, vocabulary_of(self))
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_queries = inputs_embeds.shape[1]
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
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
        sinusoids = _distance_sinusoids(num_past + num_queries - 1, num_distances, inputs_embeds, past_key_values)

        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer while `generate` drafts by early exit
            hidden_states = layer(
                hidden_states, causal_mask, sinusoids, **{CACHE_NAME: past_key_values}, use_cache=use_cache, **kwargs
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
        tokens = inputs_embeds if input_ids is None else input_ids
        check_flags({**kwargs, "use_cache": use_cache, "logits_to_keep": logits_to_keep})
        if isinstance(tokens, torch.Tensor):
            check_labels(labels, tokens, vocabulary_of(self), kwargs.get("ignore_index", -100))
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

    # trf-ignore: TRF033 (no hyperparameter)
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any):
        """Generate as any model of transformers does; a prompt that it cannot read raises with the remedy."""
        check_prompt(inputs, kwargs, vocabulary_of(self))
        return super().generate(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        """Refused: a packed row holds many sequences, and relative positions count across all of them."""
        raise NotImplementedError(
            "The paper's decoder does not support continuous batching (`generate_batch`, paged caches): its relative positions "
            "cannot tell packed sequences apart. Use `generate` on a left-padded batch."
        )
