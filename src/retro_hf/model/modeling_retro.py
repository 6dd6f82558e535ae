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
"""RETRO (Borgeaud et al., 2022): neighbor encoder → chunked cross-attention → one pass over the chunk grid → model.

Shape legend: B batch, T new tokens, C chunks, m chunk_size, K neighbors, R neighbor_size (neighbor and continuation),
S = K · R neighbor tokens of a chunk, H heads, D head_dim, N chunks of any row.

    chunk u-1        chunk u                  chunk u+1
    … . . . . x │ x . . . . . . . x │ x . . . . . . . x │ …       H: one column per token
              └──── attends E(u-1) ──┘└ attends E(u)            C+: the last token of a chunk and the first m-1 of the next
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, logging
from transformers.utils.output_capturing import CompileableContextVar

from .adapter_retro import RetroAdapterMixin
from .backbone_retro import accepted_arguments, find_branch_end, find_decoder_layers
from .cache_retro import RetroState, pad_to
from .chunking_retro import Planner, chunk_offsets, real_tokens, state_of
from .compatibility_retro import CACHE_NAME, CACHE_NAMES, CHECKPOINTING, accept_cache_by_any_name
from .configuration_retro import RetroConfig, RetroDecoderConfig, RetroEncoderConfig
from .modeling_retro_decoder import (
    RetroAttention,
    RetroDecoderForCausalLM,
    RetroMLP,
    RetroRelativePositionBias,
    RetroRMSNorm,
    position_features,
)
from .retriever_protocol_retro import Retriever, RetroLookup, check_neighbors, check_retriever


logger = logging.get_logger(__name__)

# The linter asks which checkpoints take which path; here the user's config decides, and each field says what it does.
# trf-ignore: TRF041 config.share_embeddings, config.cross_attention_layers, config.text_config.model_type, config.text_config
# trf-ignore: TRF041 config.freeze_backbone, config.cross_attention_placement, config.save_backbone

_ATTACHED: Any = type("AttachedRetriever", (), {"__repr__": lambda self: "<the attached retriever>"})()


# ── the neighbor encoder (Algorithm 1, ENCODER) ───────────────────────────────────────────────────────────────────────


class RetroEncoderLayer(GradientCheckpointingLayer):
    """FFW(CA(ATTN(E), H_u)), each residual and pre-normed; CA only in the layers P_enc."""

    def __init__(self, config: RetroEncoderConfig, chunk_states_size: int, has_cross_attention: bool):
        super().__init__()
        width, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        self.self_attn_norm = RetroRMSNorm(width, eps=config.rms_norm_eps)
        self.self_attn = RetroAttention(config, width, heads, head_dim)
        if has_cross_attention:
            self.cross_attn_norm = RetroRMSNorm(width, eps=config.rms_norm_eps)
            self.cross_attn = RetroAttention(config, width, heads, head_dim, key_value_size=chunk_states_size)
        self.has_cross_attention = has_cross_attention
        self.mlp_norm = RetroRMSNorm(width, eps=config.rms_norm_eps)
        self.mlp = RetroMLP(width, config.intermediate_size, config.hidden_act)

    def forward(
        self,
        hidden_states: torch.Tensor,
        chunk_states: torch.Tensor,
        neighbor_mask: torch.Tensor,
        chunk_mask: torch.Tensor,
        self_features: torch.Tensor,
        cross_features: torch.Tensor,
    ) -> torch.Tensor:
        """Encode neighbors.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(N * K, R, encoder_hidden_size)`): the neighbors.
            chunk_states (`torch.FloatTensor` of shape `(N, m, hidden_size)`): normalized H_u of their chunks.
            neighbor_mask (`torch.BoolTensor` of shape `(N * K, 1, 1, R)`): True at real tokens.
            chunk_mask (`torch.BoolTensor` of shape `(N, 1, 1, m)`): True at real tokens.
            self_features, cross_features (`torch.FloatTensor` of shape `(P, encoder_hidden_size)`): of the distances.
        Returns:
            `torch.FloatTensor` of the shape of `hidden_states`.
        """
        update, _ = self.self_attn(self.self_attn_norm(hidden_states), self_features, attention_mask=neighbor_mask)
        hidden_states = hidden_states + update
        if self.has_cross_attention:
            num_neighbors = hidden_states.shape[0] // max(chunk_states.shape[0], 1)
            key, value = self.cross_attn.project_key_value(chunk_states)  # once per chunk, for all of its neighbors
            update, _ = self.cross_attn.attend(
                self.cross_attn_norm(hidden_states),
                key.repeat_interleave(num_neighbors, dim=0),
                value.repeat_interleave(num_neighbors, dim=0),
                cross_features,
                chunk_mask.repeat_interleave(num_neighbors, dim=0),
            )
            hidden_states = hidden_states + update
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class RetroNeighborEncoder(nn.Module):
    """Bidirectional encoder of one neighbor, conditioned on the chunk that retrieved it (section 2.4).

    Neighbors of a chunk never see each other here. Where the paper is silent, H_u is normed before it is attended to,
    and E is normed at the end.
    """

    def __init__(self, config: RetroConfig, embedding_size: int):
        super().__init__()
        encoder: RetroEncoderConfig = config.neighbor_encoder_config
        self.hidden_size = encoder.hidden_size
        self.embed_tokens = None if config.share_embeddings else nn.Embedding(config.vocab_size, encoder.hidden_size)
        needs_map = config.share_embeddings and embedding_size != encoder.hidden_size
        self.embed_proj = nn.Linear(embedding_size, encoder.hidden_size, bias=False) if needs_map else None
        self.chunk_norm = RetroRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(
            [
                RetroEncoderLayer(encoder, config.hidden_size, i in encoder.cross_attention_layers)
                for i in range(encoder.num_hidden_layers)
            ]
        )
        self.norm = RetroRMSNorm(encoder.hidden_size, eps=encoder.rms_norm_eps)

    def forward(
        self,
        neighbor_input_ids: torch.Tensor,
        neighbor_mask: torch.Tensor,
        chunk_states: torch.Tensor,
        chunk_mask: torch.Tensor,
        embed: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Compute E_u of N chunks.

        Args:
            neighbor_input_ids (`torch.LongTensor` of shape `(N, K, R)`): neighbor tokens with their continuations.
            neighbor_mask (`torch.BoolTensor` of shape `(N, K, R)`): True at real tokens.
            chunk_states (`torch.FloatTensor` of shape `(N, m, hidden_size)`): H_u, the residual stream after the
                self-attention of layer min(P).
            chunk_mask (`torch.BoolTensor` of shape `(N, m)`): True at real tokens.
            embed (`Callable`): the backbone's embedding, used where embeddings are shared.
        Returns:
            `torch.FloatTensor` of shape `(N, K * R, encoder_hidden_size)`.
        """
        num_chunks, num_neighbors, size = neighbor_input_ids.shape
        ids = neighbor_input_ids.masked_fill(~neighbor_mask, 0)  # whatever stands at padding is never read
        hidden_states = (self.embed_tokens or embed)(ids.flatten(0, 1))
        if self.embed_proj is not None:
            hidden_states = self.embed_proj(hidden_states)
        chunk_size = chunk_states.shape[1]
        device, dtype = chunk_states.device, chunk_states.dtype
        steps = torch.arange(2 * size - 1, device=device)
        self_features = position_features(size - 1 - steps, self.hidden_size, dtype)  # d = i - j
        steps = torch.arange(size + chunk_size - 1, device=device)
        cross_features = position_features(size - 1 - steps, self.hidden_size, dtype)  # equation 7: d = i' - i
        chunk_states = self.chunk_norm(chunk_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states.to(dtype),
                chunk_states,
                neighbor_mask.view(-1, 1, 1, size),
                chunk_mask.view(-1, 1, 1, chunk_size),
                self_features,
                cross_features,
            )
        return self.norm(hidden_states).view(num_chunks, num_neighbors * size, -1)


# ── chunked cross-attention (equations 3 and 4, Listing 1) ────────────────────────────────────────────────────────────


class RetroChunkedCrossAttention(nn.Module):
    """Attention from an attending chunk to the encoded neighbors of the chunk before it.

    One softmax runs over the tokens of all neighbors; the position table is the same for each of them (Listing 1), so
    their order does not matter. The shift by m - 1 that makes a chunk an *attending* chunk is the caller's
    (`chunking_retro.py`).
    """

    def __init__(self, config: RetroConfig):
        super().__init__()
        self.norm = RetroRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = RetroAttention(
            config,
            config.hidden_size,
            config.cross_attention_num_heads,
            config.cross_attention_head_dim,
            key_value_size=config.neighbor_encoder_config.hidden_size,
        )
        self.attention.o_proj.zero_init = config.zero_init_cross_attention  # read by `_init_weights`

    def forward(
        self,
        hidden_states: torch.Tensor,
        neighbor_states: torch.Tensor | None,
        features: torch.Tensor,
        neighbor_size: int,
        recall: Callable,
    ) -> torch.Tensor:
        """Compute the update of N attending chunks.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(N, Q, hidden_size)`): residual stream of the attending chunks.
            neighbor_states (`torch.FloatTensor` of shape `(M, S, encoder_hidden_size)`, *optional*): E of chunks that
                are new in this pass; their keys and values are projected once, here.
            features (`torch.FloatTensor` of shape `(P, hidden_size)` or `(N, P, hidden_size)`): of the distances from
                the queries to the tokens of one neighbor.
            neighbor_size (`int`): R.
            recall (`Callable`): takes the new keys and values (or None) and returns keys and values of shape
                `(N, H, S, D)` and a mask of shape `(N, S)`, those of earlier chunks among them.
        Returns:
            `torch.FloatTensor` of shape `(N, Q, hidden_size)`: zero where a chunk has no neighbor.
        """
        attention = self.attention
        projected = None if neighbor_states is None else attention.project_key_value(neighbor_states)
        key, value, mask = recall(projected)
        update, _ = attention.attend(
            self.norm(hidden_states),
            key,
            value,
            features,
            mask[:, None, None, :],
            num_repeats=mask.shape[1] // neighbor_size,
        )
        return torch.where(mask.any(dim=-1)[:, None, None], update, 0.0)


class RetroReader(nn.Module):
    """Everything that RETRO adds to a backbone: the neighbor encoder and one cross-attention per layer of P.

    Args:
        config ([`RetroConfig`]): of the model.
        embedding_size (`int`): width of the backbone's embeddings; not that of its residual stream in every family.
    """

    def __init__(self, config: RetroConfig, embedding_size: int):
        super().__init__()
        self.encoder = RetroNeighborEncoder(config, embedding_size)
        self.cross_attention = nn.ModuleDict(
            {str(layer): RetroChunkedCrossAttention(config) for layer in config.cross_attention_layers}
        )


# ── where the pass meets the backbone ─────────────────────────────────────────────────────────────────────────────────


class _PassVar(CompileableContextVar):
    """A class of its own, so that output capturing does not take it for its collector."""


_active_pass = _PassVar("retro_pass")


def _record_layer_input(module: nn.Module, args: tuple, kwargs: dict, *, layer_idx: int, name: str) -> None:
    retro_pass = _active_pass.get()
    if retro_pass is not None:
        retro_pass.layer_inputs[layer_idx] = args[0] if args else kwargs[name]


def _cross_attend_after_attention(
    module: nn.Module, args: tuple, output: Any, *, layer_idx: int, includes_residual: bool, multiplier: float
) -> Any:
    """The paper's order ATTN → CCA → FFW: add CCA(x + branch) to the end of the self-attention branch."""
    retro_pass = _active_pass.get()
    if retro_pass is None:
        return None
    branch = output[0] if isinstance(output, tuple) else output
    if includes_residual:
        hidden_states = branch
    else:
        hidden_states = torch.add(retro_pass.layer_inputs[layer_idx], branch, alpha=multiplier)
    branch = torch.add(branch, retro_pass(layer_idx, hidden_states), alpha=1 / multiplier)
    return (branch, *output[1:]) if isinstance(output, tuple) else branch


def _cross_attend_after_layer(module: nn.Module, args: tuple, output: Any, *, layer_idx: int) -> Any:
    retro_pass = _active_pass.get()
    if retro_pass is None:
        return None
    hidden_states = output[0] if isinstance(output, tuple) else output
    hidden_states = hidden_states + retro_pass(layer_idx, hidden_states)
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


def _checkpoint_within_pass(checkpoint: Callable, function: Callable, *args: Any) -> Any:
    """Checkpoint a layer so that its recomputation, long after the pass, still finds the pass."""
    retro_pass = _active_pass.get()

    def run(*inputs: Any) -> Any:
        token = _active_pass.set(retro_pass)
        try:
            return function(*inputs)
        finally:
            _active_pass.reset(token)

    return checkpoint(run, *args)


# ── the model ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@auto_docstring(custom_intro="Weight initialization, loading and saving of RETRO models.")
class RetroPreTrainedModel(RetroAdapterMixin):
    config: RetroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RetroEncoderLayer", "RetroChunkedCrossAttention"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    # Flash and flex attention serve the backbone; our own attention has a position bias and runs as sdpa then.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _can_set_attn_implementation_cached_value = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RetroRelativePositionBias):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif getattr(module, "zero_init", False):
            init.zeros_(module.weight)

    # trf-ignore: TRF033 (no hyperparameter)
    def is_custom_code(self) -> bool:
        """Whether the backbone's code is: what RETRO adds keeps transformers' rules for initialization.

        As custom code, transformers would take every module without parameters of its own for initialized, and leave
        empty what a backbone computes there when it is loaded (Falcon-H1's multipliers).
        """
        return getattr(self, "model", self).backbone.is_custom_code()

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs: Any) -> None:
        """Set the attention implementation of the backbone and of what RETRO adds; as in transformers.

        A `dict` has the keys `"text_config"` for the backbone, `"neighbor_encoder_config"` for the neighbor encoder and `""`
        for chunked cross-attention, and for the encoder too if that is not named.
        """
        parts = ("", *self.config.sub_configs)
        if not isinstance(attn_implementation, dict):
            attn_implementation = dict.fromkeys(parts, attn_implementation)
        if unknown := set(attn_implementation) - set(parts):
            raise ValueError(
                f"`attn_implementation` has the keys {sorted(unknown)}, but a RETRO model has the parts {sorted(parts)}."
            )
        requested = dict(attn_implementation)
        encoder = requested.pop("neighbor_encoder_config", requested.get("", None))
        super().set_attn_implementation(requested, **kwargs)
        if encoder is not None:  # not a model of its own, so transformers would set it unchecked and warn
            self.config.neighbor_encoder_config._attn_implementation_internal = self.get_correct_attn_implementation(
                encoder
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base_model.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base_model.backbone.set_output_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the vocabulary of the backbone and of the neighbor encoder; arguments as in transformers."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        encoder = self.base_model.retro.encoder
        if encoder.embed_tokens is not None:
            encoder.embed_tokens = self._get_resized_embeddings(encoder.embed_tokens, embeddings.num_embeddings)
        return embeddings

    # trf-ignore: TRF033 (no hyperparameter)
    def enable_input_require_grads(self) -> None:
        """Does nothing: only reentrant checkpointing, which is refused, needs inputs that require a gradient.

        With them, the frozen layers below the first cross-attention would be differentiated for nothing.
        """

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable | None = None, **kwargs
    ):
        if enable and gradient_checkpointing_func is not None:
            if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "Reentrant gradient checkpointing would lose the gradient of the encoded neighbors, which are no input "
                    f"of the checkpointed layers. Use `{CHECKPOINTING}_kwargs={{'use_reentrant': False}}`."
                )
            gradient_checkpointing_func = partial(_checkpoint_within_pass, gradient_checkpointing_func)
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable=enable, **kwargs)


class _Shared:
    """Holds the retriever: never a submodule, even if it is an `nn.Module`, and shared by copies of the model."""

    def __init__(self, value: Retriever | None):
        self.value = value

    def __deepcopy__(self, memo: dict) -> "_Shared":
        return self


@auto_docstring(
    custom_intro="A backbone that reads retrieved neighbors, without its head: hidden states of every token."
)
class RetroModel(RetroPreTrainedModel):
    def __init__(self, config: RetroConfig, backbone: PreTrainedModel | None = None):
        r"""
        backbone (`PreTrainedModel`, *optional*):
            A live causal language model whose config is `config.text_config`; built from that config by default.
        """
        super().__init__(config)
        if backbone is None:
            if config.text_config.model_type == RetroDecoderConfig.model_type:
                backbone = RetroDecoderForCausalLM._from_config(config.text_config)
            else:
                backbone = AutoModelForCausalLM.from_config(config.text_config)
        else:
            parts: list[Any] = [*backbone.modules(), *backbone.parameters()]
            for part in parts:
                part._is_hf_initialized = True  # its weights are not ours to initialize
        self.backbone = backbone
        self.retro = RetroReader(config, backbone.get_input_embeddings().embedding_dim)
        self._attach_hooks()
        self._backbone_arguments = accepted_arguments(backbone)
        self._max_positions = _learned_positions(backbone)
        self._retriever = _Shared(None)
        if config.freeze_backbone:
            backbone.requires_grad_(False)
        self.post_init()

    def _attach_hooks(self) -> None:
        config = self.config
        layers = find_decoder_layers(self.backbone, config.backbone_layers)
        for idx in config.cross_attention_layers:
            if config.cross_attention_placement == "after_layer":
                layers[idx].register_forward_hook(partial(_cross_attend_after_layer, layer_idx=idx))
                continue
            end = find_branch_end(self.backbone, layers[idx], config.backbone_attention)
            # Nearly always called `hidden_states`.
            record = partial(_record_layer_input, layer_idx=idx, name=accepted_arguments(layers[idx])[0])
            layers[idx].register_forward_pre_hook(record, with_kwargs=True)
            end.module.register_forward_hook(
                partial(
                    _cross_attend_after_attention,
                    layer_idx=idx,
                    includes_residual=end.includes_residual,
                    multiplier=end.multiplier,
                )
            )

    # trf-ignore: TRF033 (a retriever is no hyperparameter)
    def set_retriever(self, retriever: Retriever | None) -> None:
        """Attach a retriever that every forward pass and `generate` will use; None detaches it."""
        if retriever is not None:
            check_retriever(retriever, self.config.chunk_size)
        self._retriever = _Shared(retriever)

    @property
    def retriever(self) -> Retriever | None:
        """The attached retriever."""
        return self._retriever.value

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
        neighbor_input_ids: torch.LongTensor | None = None,
        neighbor_attention_mask: torch.Tensor | None = None,
        chunk_offset: int | torch.LongTensor | None = None,
        retriever: Retriever | None = _ATTACHED,
        neighbor_chunk_size: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        neighbor_input_ids (`torch.LongTensor` of shape `(batch_size, num_chunks, num_neighbors, neighbor_size)`, *optional*):
            Tokens of the neighbors of each chunk, counted from the first chunk of the row. Chunks beyond `num_chunks` ask
            the retriever, or have none.
        neighbor_attention_mask (`torch.Tensor` of the same shape, *optional*):
            1 at real tokens, 0 at padding and at missing neighbors; all ones by default.
        chunk_offset (`int` or `torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Chunk position of a row's first token, 0 by default; with `-prompt_length % chunk_size` the prompt ends a chunk.
        retriever (`Callable`, *optional*):
            `retriever(chunk_input_ids, chunk_attention_mask)` of shapes `(N, chunk_size)` returns neighbor ids and mask of
            shape `(N, num_neighbors, neighbor_size)`. None turns retrieval off; by default the attached one is used.
        neighbor_chunk_size (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Tokens per chunk for which the given neighbors were looked up; an error if it is not the model's. The collators
            give it: neighbors of longer chunks would tell the model what comes next.
        """
        return self.run(
            self.backbone.base_model,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            neighbor_input_ids,
            neighbor_attention_mask,
            chunk_offset,
            retriever,
            neighbor_chunk_size=neighbor_chunk_size,
            **kwargs,
        )

    def run(
        self,
        module: nn.Module,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: torch.Tensor | None,
        use_cache: bool | None,
        neighbor_input_ids: torch.Tensor | None,
        neighbor_attention_mask: torch.Tensor | None,
        chunk_offset: int | torch.Tensor | None,
        retriever: Retriever | None,
        token_mask: torch.Tensor | None = None,
        neighbor_chunk_size: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run the backbone, or its body, with retrieval; `module` is one of the two, the rest as in `forward`.

        `token_mask` is the 2-D padding mask where `attention_mask` is not (static caches).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`, not both and not neither.")
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        if "position_ids" in self._backbone_arguments:
            inputs["position_ids"] = position_ids
        tokens = input_ids if input_ids is not None else inputs_embeds
        self._check_length(tokens.shape[1], past_key_values)
        self._check_chunk_size(neighbor_chunk_size)

        retriever = self.retriever if retriever is _ATTACHED else retriever
        if retriever is not None and not isinstance(retriever, RetroLookup):
            retriever = RetroLookup(retriever, self.config.vocab_size, self.config.chunk_size)
        state = getattr(past_key_values, "retro", None)
        is_whole = past_key_values is None and not use_cache
        given = self._given_neighbors(neighbor_input_ids, neighbor_attention_mask, tokens, state, is_whole)
        if given is None and retriever is None and state is None:
            return module(**inputs, **{CACHE_NAME: past_key_values}, use_cache=use_cache, **kwargs)

        if 0 in tokens.shape[:2]:
            raise ValueError(f"The input has no tokens: its shape is {tuple(tokens.shape[:2])} (batch, tokens).")
        if retriever is not None and input_ids is None:
            raise ValueError(
                "Retrieval needs `input_ids`: there are no tokens to look up in `inputs_embeds`. Give "
                "`neighbor_input_ids`, or `retriever=None`."
            )
        if use_cache is None:  # nobody goes on from tokens whose labels are known
            wanted = getattr(self.config.text_config, "use_cache", True)
            use_cache = wanted and not self.training and kwargs.get("labels") is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config.get_text_config(decoder=True))
        if past_key_values is not None:
            state = state_of(past_key_values, len(tokens), chunk_offset, self.config)
        real = real_tokens(
            attention_mask if token_mask is None else token_mask, position_ids, state, *tokens.shape[:2]
        )
        planner = Planner(self.retro, self.get_input_embeddings(), self.config, state, given, retriever)
        retro_pass = planner.plan(tokens, real, chunk_offset)
        token = _active_pass.set(retro_pass)
        try:
            outputs = module(**inputs, **{CACHE_NAME: past_key_values}, use_cache=use_cache, **kwargs)
        finally:
            _active_pass.reset(token)
        if state is not None:
            retro_pass.commit()
        return outputs

    def _check_length(self, num_tokens: int, past_key_values: Cache | None) -> None:
        if self._max_positions is None:
            return
        length = num_tokens + (int(past_key_values.get_seq_length()) if past_key_values is not None else 0)
        if length > self._max_positions:
            raise ValueError(
                f"The sequence has {length} tokens, but the backbone's position table ends at {self._max_positions}. "
                "Shorten the prompt, or lower `max_new_tokens`."
            )

    def _check_chunk_size(self, looked_up: torch.Tensor | None) -> None:
        if looked_up is None or torch.compiler.is_compiling():  # reading values would break the graph
            return
        sizes = set(looked_up.tolist())
        if sizes != {self.config.chunk_size}:
            raise ValueError(
                f"The neighbors were looked up for chunks of {sorted(sizes)} tokens, but the model has chunks of "
                f"{self.config.chunk_size}: it would read neighbors of text that it is yet to predict. Take a datastore (and "
                f"a collator) of chunk_size={self.config.chunk_size}, and cut and look up the training text with it."
            )

    def _given_neighbors(
        self,
        input_ids: torch.Tensor | None,
        mask: torch.Tensor | None,
        tokens: torch.Tensor,
        state: RetroState | None,
        is_whole: bool,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The caller's neighbors, checked; `is_whole` says that no tokens can follow."""
        if input_ids is None:
            if mask is not None:
                raise ValueError(
                    "`neighbor_attention_mask` was given without `neighbor_input_ids`. Give both, or none."
                )
            return None
        size, (batch_size, num_tokens) = self.config.chunk_size, tokens.shape[:2]
        if state is None or num_tokens > 1:  # a decoding step would only repeat the check
            source = "`neighbor_input_ids` (batch, chunks, …)"
            input_ids, mask = check_neighbors(input_ids, mask, (batch_size, -1), self.config.vocab_size, source)
            if is_whole and input_ids.shape[1] > num_tokens // size + 1:
                raise ValueError(
                    f"`neighbor_input_ids` holds neighbors of {input_ids.shape[1]} chunks, but {num_tokens} tokens have "
                    f"only {num_tokens // size} complete chunks of {size}. Were they made with another `chunk_size`?"
                )
        if mask is None:
            mask = torch.ones((), dtype=torch.bool, device=input_ids.device).expand_as(input_ids)
        # A chunk has at least one neighbor, if only to be masked.
        return tuple(pad_to(tensor.to(tokens.device), 1, dim=-2) for tensor in (input_ids, mask.bool()))


def _prompt_rows(num_rows: int, num_sequences: int) -> list[int]:
    """For each generated sequence a row of its prompt, which stand together: once per beam, and once per result."""
    return [sequence * num_rows // num_sequences for sequence in range(num_sequences)]


def _learned_positions(backbone: PreTrainedModel) -> int | None:
    """Length of the backbone's table of absolute positions, None if it has no table that could be overrun."""
    limit = getattr(backbone.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = [
        m for m in backbone.modules() if isinstance(m, nn.Embedding) and m is not backbone.get_input_embeddings()
    ]
    return limit if limit and any(limit <= table.num_embeddings <= limit + 2 for table in tables) else None


@auto_docstring(
    custom_intro="RETRO: a causal language model that reads retrieved neighbors through chunked cross-attention."
)
class RetroForCausalLM(RetroPreTrainedModel, GenerationMixin):
    def __init__(self, config: RetroConfig, backbone: PreTrainedModel | None = None):
        r"""
        backbone (`PreTrainedModel`, *optional*):
            A live causal language model whose config is `config.text_config`; built from that config by default.
        """
        super().__init__(config)
        self.model = RetroModel(config, backbone)
        if backbone is not None and backbone.generation_config is not None:
            self.generation_config = GenerationConfig.from_dict(backbone.generation_config.to_dict())
        # A recurrent state cannot be taken back: `generate` then refuses assisted decoding by name.
        self._is_stateful = self.model.backbone._is_stateful
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self.model

    # trf-ignore: TRF033 (a retriever is no hyperparameter)
    def set_retriever(self, retriever: Retriever | None) -> None:
        """Attach a retriever that every forward pass and `generate` will use; None detaches it."""
        self.model.set_retriever(retriever)

    @property
    def retriever(self) -> Retriever | None:
        """The attached retriever."""
        return self.model.retriever

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
        neighbor_input_ids: torch.LongTensor | None = None,
        neighbor_attention_mask: torch.Tensor | None = None,
        chunk_offset: int | torch.LongTensor | None = None,
        retriever: Retriever | None = _ATTACHED,
        neighbor_chunk_size: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        neighbor_input_ids (`torch.LongTensor` of shape `(batch_size, num_chunks, num_neighbors, neighbor_size)`, *optional*):
            Tokens of the neighbors of each chunk, counted from the first chunk of the row. Chunks beyond `num_chunks` ask
            the retriever, or have none.
        neighbor_attention_mask (`torch.Tensor` of the same shape, *optional*):
            1 at real tokens, 0 at padding and at missing neighbors; all ones by default.
        chunk_offset (`int` or `torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Chunk position of a row's first token, 0 by default; with `-prompt_length % chunk_size` the prompt ends a chunk.
        retriever (`Callable`, *optional*):
            `retriever(chunk_input_ids, chunk_attention_mask)` of shapes `(N, chunk_size)` returns neighbor ids and mask of
            shape `(N, num_neighbors, neighbor_size)`. None turns retrieval off; by default the attached one is used.
        neighbor_chunk_size (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Tokens per chunk for which the given neighbors were looked up; an error if it is not the model's. The collators
            give it: neighbors of longer chunks would tell the model what comes next.
        """
        if "logits_to_keep" in self.model._backbone_arguments:
            kwargs["logits_to_keep"] = logits_to_keep
        return self.model.run(
            self.model.backbone,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            neighbor_input_ids,
            neighbor_attention_mask,
            chunk_offset,
            retriever,
            neighbor_chunk_size=neighbor_chunk_size,
            labels=labels,
            **kwargs,
        )

    # ── generation ────────────────────────────────────────────────────────────────────────────────────────────────────

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        retriever: Retriever | None = _ATTACHED,
        **kwargs: Any,
    ):
        """Generate as any model of transformers does, retrieving once per completed chunk of `chunk_size` tokens.

        Args:
            inputs, generation_config, args, kwargs: as in [`~transformers.GenerationMixin.generate`];
                `neighbor_input_ids`, `neighbor_attention_mask` and `chunk_offset` as in `forward`.
            retriever (`Callable`, *optional*): see `forward`; None generates without retrieval, by default the attached
                retriever is used.
        Returns:
            `torch.LongTensor` of token ids, or a `ModelOutput` with `return_dict_in_generate=True`; the latter has
            `retrieval_trace`, for each sequence the list of its looked-up chunks with their neighbors.
        """
        retriever = self.retriever if retriever is _ATTACHED else retriever
        if retriever is None and kwargs.get("neighbor_input_ids") is None and self.config.retriever_name_or_path:
            logger.warning_once(
                f"Generating without retrieval: this model was trained with '{self.config.retriever_name_or_path}'. Open it "
                "with `RetroRetriever.from_pretrained(...)` and pass `retriever=`."
            )
        lookup = None if retriever is None else RetroLookup(retriever, self.config.vocab_size, self.config.chunk_size)
        outputs = super().generate(inputs, generation_config, *args, retriever=lookup, **kwargs)
        if lookup is None and isinstance(outputs, ModelOutput):
            outputs["retrieval_trace"] = [[] for _ in outputs["sequences"]]
        elif isinstance(outputs, ModelOutput):
            used = self._prepare_generation_config(generation_config, **kwargs)[0]
            outputs["retrieval_trace"] = self._trace(lookup, outputs, used, kwargs.get("chunk_offset"))
        return outputs

    def _trace(
        self,
        lookup: RetroLookup,
        outputs: ModelOutput,
        used: GenerationConfig,
        chunk_offset: int | torch.Tensor | None,
    ) -> list[list[dict]]:
        """The trace of every sequence, of chunks that had a say in it: a token was generated after them."""
        sequences = outputs["sequences"]
        real = torch.ones_like(sequences, dtype=torch.bool)
        real[:, -1] = False  # it was never an input
        if used.eos_token_id is not None:
            eos = used.eos_token_id if isinstance(used.eos_token_id, list) else [used.eos_token_id]
            ends = torch.tensor([*eos, eos[0] if used.pad_token_id is None else used.pad_token_id])
            tail = torch.isin(sequences, ends.to(sequences.device))
            real &= ~tail.long().flip(1).cumprod(1).flip(1).bool()
        if lookup.padding_mask is not None:
            mask = lookup.padding_mask.bool().to(real.device)
            real[:, : mask.shape[1]] &= mask[_prompt_rows(len(mask), len(sequences))]
        state = getattr(outputs.get(CACHE_NAME), "retro", None)
        if state is None:
            num_rows = len(chunk_offset) if isinstance(chunk_offset, (list, torch.Tensor)) else 1
            offsets = chunk_offsets(chunk_offset, num_rows, self.config.chunk_size)
        else:
            offsets = state.offsets
        offsets = [offsets[row] for row in _prompt_rows(len(offsets), len(sequences))]
        return lookup.trace(sequences, real, offsets, self.config.chunk_size)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        neighbor_input_ids: torch.LongTensor | None = None,
        neighbor_attention_mask: torch.Tensor | None = None,
        chunk_offset: int | torch.LongTensor | None = None,
        retriever: Retriever | None = _ATTACHED,
        neighbor_chunk_size: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Let the backbone prepare its inputs, and add those of retrieval."""
        inputs = self.model.backbone.prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if isinstance(retriever, RetroLookup):
            retriever.padding_mask = attention_mask
        if neighbor_input_ids is not None and kwargs.get(CACHE_NAME) is None:
            num_chunks = input_ids.shape[1] // self.config.chunk_size + 1  # without a cache only those of this pass
            neighbor_input_ids = neighbor_input_ids[:, :num_chunks]
            if neighbor_attention_mask is not None:
                neighbor_attention_mask = neighbor_attention_mask[:, :num_chunks]
        retro = {
            "neighbor_input_ids": neighbor_input_ids,
            "neighbor_attention_mask": neighbor_attention_mask,
            "chunk_offset": chunk_offset,
            "retriever": retriever,
            "neighbor_chunk_size": neighbor_chunk_size,
            "token_mask": attention_mask,  # the backbone's own may be 4-D, or as long as a static cache
        }
        return inputs | retro

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        # Retrieval decides on the host when a chunk completes; transformers compiles the steps of a static cache on a GPU.
        if generation_config.compile_config is not None:
            logger.warning_once("`compile_config` is ignored: generation with retrieval is not compiled.")
        return False

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any):
        # An assistant drafts without retrieval: it may be any model, and would reject our arguments.
        ours = ("neighbor_input_ids", "neighbor_attention_mask", "neighbor_chunk_size", "chunk_offset", "retriever")
        rest = {name: value for name, value in model_kwargs.items() if name not in ours}
        return super()._get_candidate_generator(*args, model_kwargs=rest, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        """Refused: continuous batching packs requests into one row, where chunks cannot be told apart."""
        raise NotImplementedError(
            "RETRO does not support continuous batching (`generate_batch`, paged caches): it packs requests into one row, "
            "where their chunks cannot be told apart. Use `generate` on a left-padded batch."
        )


__all__ = ["RetroForCausalLM", "RetroModel", "RetroPreTrainedModel"]
