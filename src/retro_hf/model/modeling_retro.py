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
"""RETRO (Borgeaud et al., 2022), in the order of the paper's Algorithm 1.

    H ← EMB(X)                                      the backbone, any causal language model
    for each layer p:
        H ← ATTN(H)                                 the backbone
        if p = min(P):  E ← ENCODER(RET(C), H)      RetroNeighborEncoder, section 2.4, equation 7
        if p in P:      H ← CCA(H, E)               RetroChunkedCrossAttention, equations 3, 4 and 6
        H ← FFW(H)                                  the backbone
    O ← READ(H)                                     the backbone

`RetroPass` is the body of this loop. Hooks of `backbone_retro.py` call it at the end of the self-attention of each layer in P,
and add what it returns to H. `RetroModel` first plans the pass (which chunks complete, and what they retrieve:
`planning_retro.py`, `chunking_retro.py`), then runs the backbone. The file has the parts first. To follow a call, begin with
`RetroModel.forward`, and go on with `RetroPass.__call__`.

    chunk u-1        chunk u                  chunk u+1
    … . . . . x │ x . . . . . . . x │ x . . . . . . . x │ …       H: one column per token
              └──── attends E(u-1) ──┘└ attends E(u)            C+: the last token of a chunk and the first m-1 of the next

Shapes: B rows, T new tokens, m chunk_size, K neighbors of R tokens (a neighbor and its continuation), S = K · R, V chunks
that complete in the pass, N attending chunks of Q tokens, D head_dim, W distances.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, is_torchdynamo_exporting, logging

from .adapter_retro import RetroAdapterMixin
from .attention_retro import (
    RetroAttention,
    RetroMLP,
    RetroPositionProjection,
    RetroRMSNorm,
    sinusoids_of,
)
from .backbone_retro import (
    accepted_arguments,
    attach_hooks,
    checkpoint_within_pass,
    find_decoder_layers,
    learned_positions,
    run_within,
)
from .cache_retro import state_of
from .chunking_retro import PassPlan
from .compatibility_retro import CACHE_NAME, CACHE_NAMES, CHECKPOINTING, accept_cache_by_any_name
from .compiled_steps_retro import CompiledSteps
from .configuration_retro import RetroConfig, RetroDecoderConfig, RetroEncoderConfig
from .generation_retro import RetroGenerationMixin
from .inputs_retro import (
    RETRIEVAL_ARGUMENTS,
    check_chunk_size,
    check_flags,
    check_inputs,
    check_labels,
    check_names,
    given_neighbors,
    text_of,
    vocabulary_of,
    warn_of_nothing_to_train,
    with_arguments_of,
)
from .modeling_retro_decoder import RetroDecoderForCausalLM
from .parallel_context_retro import ParallelContextReader
from .planning_retro import plan_pass, real_tokens
from .readers_retro import traits_of
from .retriever_protocol_retro import ATTACHED, Retriever, RetroLookup, SharedRetriever, check_retriever
from .values_retro import check_plain


logger = logging.get_logger(__name__)
# Made once: making such a function takes as long as several layers of a step.
_plan_outside_graphs = torch.compiler.disable(plan_pass)

# The linter asks which checkpoints take which path; here the user's config decides, and each field says what it does.
# trf-ignore: TRF041 config.reader, config.share_embeddings, config.cross_attention_layers, config.text_config.model_type, config.text_config
# trf-ignore: TRF041 config.freeze_backbone, config.cross_attention_placement, config.save_backbone, config.cross_attention_null_key


# ── relative positions (B.1.2, equations 6 and 7) ─────────────────────────────────────────────────────────────────────


def distances(num_queries: int, num_keys: int, largest: int, device: torch.device) -> torch.Tensor:
    """All distances, decreasing, `(num_queries + num_keys - 1,)`. The first is `largest`: from the last query to the first key."""
    return largest - torch.arange(num_queries + num_keys - 1, device=device)


def cross_attention_distances(chunk_size: int, neighbor_size: int, device: torch.device) -> torch.Tensor:
    """Equation 6: d(i, i') = i - i' + m - 1, with m for the paper's l, from token i of an attending chunk to token i' of a neighbor.

    A neighbor N is aligned with the chunk that retrieved it, and its continuation F with the next chunk. So the neighbor
    token at the place of the token that is being predicted has the distance -1. The same table serves every neighbor.
    """
    return distances(chunk_size, neighbor_size, 2 * chunk_size - 2, device)


def encoder_distances(neighbor_size: int, chunk_size: int, device: torch.device) -> torch.Tensor:
    """Equation 7: d_enc(i', i) = i' - i, from token i' of a neighbor to token i of the chunk that retrieved it."""
    return distances(neighbor_size, chunk_size, neighbor_size - 1, device)


# ── the neighbor encoder (Algorithm 1, ENCODER) ───────────────────────────────────────────────────────────────────────


class RetroEncoderLayer(GradientCheckpointingLayer):
    """E ← FFW(CA(ATTN(E), H_u)), each operator residual and pre-normed; CA only in the layers P_enc."""

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
        self_sinusoids: torch.Tensor,
        cross_sinusoids: torch.Tensor,
    ) -> torch.Tensor:
        """Encode neighbors.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(V * K, R, encoder_hidden_size)`): the neighbors.
            chunk_states (`torch.FloatTensor` of shape `(V, m, hidden_size)`): normalized H_u of their chunks.
            neighbor_mask (`torch.BoolTensor` of shape `(V * K, 1, 1, R)`): True at real tokens.
            chunk_mask (`torch.BoolTensor` of shape `(V, 1, 1, m)`): True at real tokens.
            self_sinusoids, cross_sinusoids (`torch.FloatTensor` of shape `(W, encoder_hidden_size)`): of the distances.
        Returns:
            `torch.FloatTensor` of the shape of `hidden_states`.
        """
        update, _ = self.self_attn(self.self_attn_norm(hidden_states), self_sinusoids, attention_mask=neighbor_mask)
        hidden_states = hidden_states + update
        if self.has_cross_attention:
            # H_u is projected once per chunk, for all of its neighbors.
            num_neighbors = hidden_states.shape[0] // chunk_states.shape[0]
            key, value = self.cross_attn.project_key_value(chunk_states)
            update, _ = self.cross_attn.attend(
                self.cross_attn_norm(hidden_states),
                key.repeat_interleave(num_neighbors, dim=0),
                value.repeat_interleave(num_neighbors, dim=0),
                cross_sinusoids,
                chunk_mask.repeat_interleave(num_neighbors, dim=0),
            )
            hidden_states = hidden_states + update
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class RetroNeighborEncoder(nn.Module):
    """Bidirectional encoder of one neighbor, conditioned on the chunk that retrieved it (section 2.4).

    The neighbors of a chunk do not attend to each other here. The paper does not say where norms are: this encoder norms H_u
    before it attends to it, and E at the end.
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
        """Compute E_u of V chunks.

        Args:
            neighbor_input_ids (`torch.LongTensor` of shape `(V, K, R)`): neighbor tokens with their continuations.
            neighbor_mask (`torch.BoolTensor` of shape `(V, K, R)`): True at real tokens.
            chunk_states (`torch.FloatTensor` of shape `(V, m, hidden_size)`): H_u, the residual stream after the
                self-attention of layer min(P).
            chunk_mask (`torch.BoolTensor` of shape `(V, m)`): True at real tokens.
            embed (`Callable`): the backbone's embedding, used where embeddings are shared.
        Returns:
            `torch.FloatTensor` of shape `(V, K * R, encoder_hidden_size)`.
        """
        num_chunks, num_neighbors, size = neighbor_input_ids.shape
        # Padding may hold any id, even one outside the vocabulary.
        ids = neighbor_input_ids.masked_fill(~neighbor_mask, 0)
        hidden_states = (self.embed_tokens or embed)(ids.flatten(0, 1))
        if self.embed_proj is not None:
            hidden_states = self.embed_proj(hidden_states)
        chunk_size = chunk_states.shape[1]
        device, dtype = chunk_states.device, chunk_states.dtype
        self_sinusoids = sinusoids_of(distances(size, size, size - 1, device), self.hidden_size, dtype)
        cross_sinusoids = sinusoids_of(encoder_distances(size, chunk_size, device), self.hidden_size, dtype)
        chunk_states = self.chunk_norm(chunk_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states.to(dtype),
                chunk_states,
                neighbor_mask.view(-1, 1, 1, size),
                chunk_mask.view(-1, 1, 1, chunk_size),
                self_sinusoids,
                cross_sinusoids,
            )
        return self.norm(hidden_states).view(num_chunks, num_neighbors * size, -1)


# ── chunked cross-attention (equations 3, 4 and 6, Listing 1) ─────────────────────────────────────────────────────────


class RetroChunkedCrossAttention(nn.Module):
    """CCA(H, E): attention from each attending chunk to the encoded neighbors of one chunk.

    One softmax covers the tokens of all neighbors. Each neighbor has the same distances (Listing 1), so the order of the
    neighbors does not matter.
    """

    def __init__(self, config: RetroConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.norm = RetroRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = RetroAttention(
            config,
            config.hidden_size,
            config.cross_attention_num_heads,
            config.cross_attention_head_dim,
            key_value_size=config.neighbor_encoder_config.hidden_size,
        )
        self.attention.o_proj.zero_init = config.zero_init_cross_attention  # read by `_init_weights`
        heads = config.cross_attention_num_heads
        self.null_logits = nn.Parameter(torch.zeros(heads)) if config.cross_attention_null_key else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        neighbor_states: torch.Tensor | None,
        sinusoids: torch.Tensor,
        plan: PassPlan,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the update CCA(H, E) - H; the residual is added by the caller.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, T, hidden_size)`): H, the residual stream.
            neighbor_states (`torch.FloatTensor` of shape `(V, S, encoder_hidden_size)`, *optional*): E of the chunks that
                complete in this pass. Their keys and values are projected here, once.
            sinusoids (`torch.FloatTensor` of shape `(W, hidden_size)` or `(N, W, hidden_size)`): of the distances from
                the queries to the tokens of one neighbor (equation 6).
            plan ([`PassPlan`]): which token attends to which chunk.
        Returns:
            The update of the shape of `hidden_states`, zero where a token attends to nothing, and the probabilities of
            the attending chunks, of shape `(N, heads, Q, S)`, None under sdpa.
        """
        # Equation 3: the attending chunks H_u⁺, tokens u·m + m - 1 to u·m + 2m - 2.
        attending = plan.attending(hidden_states)
        # E_u is new for chunks that complete now, and from the cache for the one that was completed before the pass.
        projected = (None, None) if neighbor_states is None else self.attention.project_key_value(neighbor_states)
        key, value = plan.exchange_key_values(self.layer_idx, *projected)
        mask = plan.attended_mask
        # Equation 4: CA(H_u⁺, E_u), with the logits of equation 6.
        update, weights = self.attention.attend(
            self.norm(attending),
            key,
            value,
            sinusoids,
            mask[:, None, None, :],
            num_repeats=mask.shape[1] // plan.neighbor_size,
            null_logits=self.null_logits,
        )
        if weights is not None:
            weights = weights[..., : mask.shape[1]]
        return plan.per_token(torch.where(mask.any(dim=-1)[:, None, None], update, 0.0)), weights


class RetroReader(nn.Module):
    """The paper's reader, all that RETRO adds to a backbone: the neighbor encoder and one cross-attention per layer of P.

    Args:
        config ([`RetroConfig`]), backbone (`PreTrainedModel`): of the model, and its base, which gets the hooks.
    """

    def __init__(self, config: RetroConfig, backbone: PreTrainedModel):
        super().__init__()
        self.config = config
        # In some families the embeddings are not as wide as the residual stream.
        self.encoder = RetroNeighborEncoder(config, backbone.get_input_embeddings().embedding_dim)
        self.cross_attention = nn.ModuleDict(
            {str(layer): RetroChunkedCrossAttention(config, layer) for layer in config.cross_attention_layers}
        )
        attach_hooks(backbone, config)

    @staticmethod
    def check_structure(backbone: PreTrainedModel, layers: str | None = None) -> None:
        """Raise a ValueError for a base that this reader cannot read with; `layers` is `backbone_layers` of the config."""
        find_decoder_layers(backbone, layers)

    def check_outputs(self, backbone: PreTrainedModel) -> None:
        """Nothing to try: where this reader enters a base is found by its structure."""

    def begin(
        self, backbone: PreTrainedModel, plan: PassPlan, inputs: dict[str, Any], mask: Any, output_attentions: bool
    ) -> "RetroPass":
        """Begin a pass; arguments as in `ParallelContextReader.begin`."""
        return RetroPass(self, backbone.get_input_embeddings(), self.config, plan, output_attentions)


# ── the pass: the loop of Algorithm 1 inside the backbone ─────────────────────────────────────────────────────────────


class RetroPass:
    """RETRO's part of one forward pass. Each pass gets a new object, so that passes never mix.

    With the reader `"parallel_context"`, `ParallelContextPass` and `ParallelContextReader` replace this class and
    `RetroReader`; they use the same [`PassPlan`]. Hooks need of it what `HookedPass` in `backbone_retro.py` names.

    Args:
        reader ([`RetroReader`]): encoder and cross-attention.
        embed (`nn.Module`): the backbone's embedding, for an encoder that shares it.
        config ([`RetroConfig`]): of the model.
        plan ([`PassPlan`]): what is read, and where.
        output_attentions (`bool`): whether to collect `cross_attentions`.
    """

    def __init__(
        self,
        reader: RetroReader,
        embed: nn.Module,
        config: RetroConfig,
        plan: PassPlan,
        output_attentions: bool = False,
    ):
        self.reader = reader
        self.embed = embed
        self.config = config
        self.plan = plan
        self.output_attentions = output_attentions
        self.layer_inputs: dict[int, torch.Tensor] = {}
        self.layers_read: list[int] = []
        self.neighbor_states: torch.Tensor | None = None
        self.sinusoids: torch.Tensor | None = None
        self.cross_attentions: dict[int, torch.Tensor] = {}

    def __call__(self, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """What layer `layer_idx` adds to its residual stream after self-attention, of the same shape (B, T, hidden_size)."""
        self._check_shape(layer_idx, hidden_states)
        self.layers_read.append(layer_idx)
        neighbor_states = self.neighbor_states
        if layer_idx == self.config.cross_attention_layers[0]:
            # Under gradient checkpointing the backward pass runs this layer again. Later layers still hold the first E, so we keep
            # that.
            neighbor_states = self.encode(hidden_states)
            if self.neighbor_states is None:
                self.neighbor_states = neighbor_states
        return self.attend(layer_idx, hidden_states, neighbor_states)

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """E of the chunks that complete in this pass, (V, S, d'), given H at layer min(P); None if nothing is retrieved."""
        plan = self.plan
        chunk_states = plan.take_completed(hidden_states)
        if chunk_states is None:
            return None
        # The bound method, not the module: accelerate moves modules that it finds among the arguments to another device.
        embed = self.embed.__call__
        return self.reader.encoder(plan.neighbor_input_ids, plan.neighbor_mask, chunk_states, plan.chunk_mask, embed)

    def attend(
        self, layer_idx: int, hidden_states: torch.Tensor, neighbor_states: torch.Tensor | None
    ) -> torch.Tensor:
        """CCA(H, E) - H of one layer."""
        plan = self.plan
        is_known = plan.state is not None and layer_idx in plan.state.key_values
        if neighbor_states is None and not is_known:
            return torch.zeros_like(hidden_states)
        if self.sinusoids is None:
            self.sinusoids = self._sinusoids(hidden_states)
        update, weights = self.reader.cross_attention[str(layer_idx)](
            hidden_states, neighbor_states, self.sinusoids, plan
        )
        if self.output_attentions and weights is not None:
            by_query = weights.transpose(1, 2).flatten(2) * plan.attended_mask.any(dim=-1)[:, None, None]
            self.cross_attentions[layer_idx] = (
                plan.per_token(by_query).unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)
            )
        return update

    def _sinusoids(self, like: torch.Tensor) -> torch.Tensor:
        """Features of the distances in cross-attention, in decreasing order: `(W, hidden_size)` or `(N, W, hidden_size)`."""
        plan, size = self.plan, self.config.chunk_size
        table = None if plan.state is None else plan.state.sinusoids
        if table is None:
            table = cross_attention_distances(size, plan.neighbor_size, like.device)
            table = sinusoids_of(table, like.shape[-1], like.dtype)
            if plan.state is not None:
                plan.state.sinusoids = table
        places = plan.places
        if places is None:
            return table
        # A step has one query per row. Its R distances lie next to each other in the table; those of a query one place later in
        # its chunk begin one entry earlier.
        windows = table.unfold(0, plan.neighbor_size, 1)
        return windows[size - 1 - places].transpose(-1, -2)

    def _check_shape(self, layer_idx: int, hidden_states: torch.Tensor) -> None:
        shape = self.plan.shape
        if hidden_states.shape[:-1] != shape:
            raise ValueError(
                f"The residual stream of the backbone's layer {layer_idx} has the shape {tuple(hidden_states.shape)}, but the "
                f"input has {shape[0]} rows of {shape[1]} tokens; RETRO needs one vector per token. Choose another "
                "backbone, such as Llama or GPT-2."
            )

    def finish(self, outputs: Any) -> None:
        """Check that every layer of P has read exactly once, and add `cross_attentions` to the outputs if they were asked for.

        Raises:
            RuntimeError: if the hooks of a layer did not run, or those of another layer ran in their place. That happens
                where `torch.compile` compiles the layers one by one: it uses the code of one layer for all of them.
        """
        expected = self.config.cross_attention_layers
        if getattr(self.config.text_config, "layerdrop", 0.0):  # layers are skipped at random in training
            expected = [layer for layer in expected if layer in self.layers_read]
        if self.layers_read != expected:
            raise RuntimeError(
                f"The backbone read neighbors in its layers {self.layers_read}, but `cross_attention_layers` is "
                f"{expected}. If the backbone or its layers are compiled by themselves, compile the whole model instead: "
                "`torch.compile(model)`."
            )
        if self.output_attentions and isinstance(outputs, ModelOutput):
            outputs["cross_attentions"] = tuple(self.cross_attentions.values())


READER_MODULES: dict[str, type[RetroReader] | type[ParallelContextReader]] = {
    "cross_attention": RetroReader,
    "parallel_context": ParallelContextReader,
}
"""The module of each reader; what else differs between them is in `readers_retro.py`."""


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
        if isinstance(module, RetroPositionProjection):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif getattr(module, "zero_init", False):
            init.zeros_(module.weight)

    # trf-ignore: TRF033 (no hyperparameter)
    def is_custom_code(self) -> bool:
        """Whether the backbone is custom code. What RETRO adds follows transformers' rules for initialization.

        In custom code, transformers takes a module without parameters for initialized. Values that a backbone computes there
        when it is loaded, such as Falcon-H1's multipliers, would then stay empty.
        """
        return getattr(self, "model", self).backbone.is_custom_code()

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs: Any) -> None:
        """Set the attention implementation of the backbone and of what RETRO adds; as in transformers.

        A `dict` sets the parts that it names: `"text_config"` is the backbone, `"neighbor_encoder_config"` the neighbor
        encoder, and `""` chunked cross-attention.
        """
        parts = ("", *self.config.sub_configs)
        if not isinstance(attn_implementation, dict):
            attn_implementation = dict.fromkeys(parts, attn_implementation)
        if unknown := set(attn_implementation) - set(parts):
            raise ValueError(
                f"`attn_implementation` has the keys {sorted(unknown)}, but a RETRO model has the parts {sorted(parts)}."
            )
        requested = dict(attn_implementation)
        encoder = requested.pop("neighbor_encoder_config", None)
        super().set_attn_implementation(requested, **kwargs)
        if encoder is not None:  # transformers checks only parts that are a PreTrainedModel, and warns of others
            self.config.neighbor_encoder_config._attn_implementation_internal = self.get_correct_attn_implementation(
                encoder
            )

    # trf-ignore: TRF033 (a retriever is no hyperparameter)
    def set_retriever(self, retriever: Retriever | None) -> None:
        """Attach a retriever that every forward pass and `generate` will use; None detaches it."""
        if retriever is not None:
            check_retriever(retriever, self.config.chunk_size, self.config.neighbor_size)
        self.base_model._retriever = SharedRetriever(retriever)

    @property
    def retriever(self) -> Retriever | None:
        """The attached retriever."""
        return self.base_model._retriever.value

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
        encoder = getattr(self.base_model.retro, "encoder", None)
        if encoder is not None and encoder.embed_tokens is not None:
            encoder.embed_tokens = self._get_resized_embeddings(encoder.embed_tokens, embeddings.num_embeddings)
        return embeddings

    # trf-ignore: TRF033 (no hyperparameter)
    def enable_input_require_grads(self) -> None:
        """Does nothing: only reentrant checkpointing needs inputs that require a gradient, and that is refused.

        With such inputs, the backward pass would run through the frozen layers below the first cross-attention for nothing.
        """

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable | None = None, **kwargs
    ):
        if enable and gradient_checkpointing_func is not None:
            if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "Reentrant gradient checkpointing would lose the gradient of the encoded neighbors, because the "
                    f"checkpointed layers do not take them as inputs. Use `{CHECKPOINTING}_kwargs={{'use_reentrant': False}}`."
                )
            gradient_checkpointing_func = partial(checkpoint_within_pass, gradient_checkpointing_func)
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable=enable, **kwargs)


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
                no_code = {"trust_remote_code": False}  # nor a question at the terminal
                backbone = AutoModelForCausalLM.from_config(config.text_config, **no_code)
        else:
            parts: list[Any] = [*backbone.modules(), *backbone.parameters()]
            for part in parts:
                part._is_hf_initialized = True  # its weights are not ours to initialize
        self.backbone = backbone
        self.retro = READER_MODULES[config.reader](config, backbone)
        self._backbone_arguments = accepted_arguments(backbone)
        self._positions = learned_positions(backbone)
        self._retriever = SharedRetriever(None)
        if config.freeze_backbone:
            backbone.requires_grad_(False)
        self.post_init()

    @auto_docstring(custom_args=RETRIEVAL_ARGUMENTS)
    @accept_cache_by_any_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        *,
        neighbor_input_ids: torch.LongTensor | None = None,
        neighbor_attention_mask: torch.Tensor | None = None,
        neighbor_chunk_size: torch.LongTensor | None = None,
        chunk_offset: int | torch.LongTensor | None = None,
        retriever: Retriever | None = ATTACHED,
        with_head: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        # `generate` gives the 2-D padding mask where `attention_mask` is another one (static caches), and the tokens of a
        # prompt whose embeddings are given. Where it compiles steps, it gives them, too.
        token_mask, token_ids = kwargs.pop("token_mask", None), kwargs.pop("token_ids", None)
        steps = kwargs.pop("compiled_steps", None)
        text = (input_ids, inputs_embeds, attention_mask, position_ids)
        tokens = self._checked_tokens(text, past_key_values, kwargs | {"use_cache": use_cache})
        check_chunk_size(neighbor_chunk_size, self.config.chunk_size)
        check_plain("`chunk_offset`", chunk_offset)
        state = getattr(past_key_values, "retrieval_state", None)
        is_whole = past_key_values is None and not use_cache
        is_step = state is not None and tokens.shape[1] == 1
        given = given_neighbors(
            neighbor_input_ids, neighbor_attention_mask, tokens, self.config, is_step=is_step, is_whole=is_whole
        )
        retriever = self._lookup(retriever)

        module = self.backbone if with_head else self.backbone.base_model
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask, **kwargs}
        if "position_ids" in self._backbone_arguments:
            inputs["position_ids"] = position_ids
        reader = traits_of(self.config.reader)
        is_off = given is None and retriever is None and state is None
        if is_off or not reader.has_weights:
            warn_of_nothing_to_train(self.backbone, kwargs.get("labels"), self.config.reader)
        if is_off:
            run = RetroModel._run if steps is None else steps.run
            return run(self, module, inputs | {CACHE_NAME: past_key_values, "use_cache": use_cache})

        if input_ids is None:
            unclear = state is None and (chunk_offset is None or neighbor_chunk_size is not None)
            tokens = text_of(tokens, token_ids, given, retriever, is_unclear=unclear)
        inputs |= self._cache_inputs(past_key_values, use_cache, kwargs.get("labels"), retriever)
        read = self._read
        is_cached_lookup = inputs[CACHE_NAME] is not None and retriever is not None
        if is_cached_lookup or not reader.compiles:
            # Each step would be compiled again, because what it looks up, and its history, depend on values of tensors.
            read = self._read_outside_graphs
        mask = attention_mask if token_mask is None else token_mask
        sources = {"given": given, "retriever": retriever, "chunk_offset": chunk_offset}
        return read(module, inputs, tokens, mask, position_ids, sources, steps)

    def _checked_tokens(
        self, text: tuple[Any, Any, Any, Any], cache: Cache | None, others: dict[str, Any]
    ) -> torch.Tensor:
        """Check what every language model is given, and names that none has; return the tokens, or their embeddings."""
        vocabulary = vocabulary_of(self)
        check_inputs(*text, cache, vocabulary, self._positions)
        check_names(others)
        check_flags(others)
        tokens = text[1] if text[0] is None else text[0]
        check_labels(others.get("labels"), tokens, vocabulary, others.get("ignore_index", -100))
        return tokens

    def _lookup(self, retriever: Retriever | None) -> RetroLookup | None:
        retriever = self.retriever if retriever is ATTACHED else retriever
        if retriever is None or isinstance(retriever, RetroLookup):
            return retriever
        return RetroLookup(retriever, self.config.vocab_size, self.config.chunk_size, self.config.neighbor_size)

    def _cache_inputs(
        self,
        past_key_values: Cache | None,
        use_cache: bool | None,
        labels: torch.Tensor | None,
        retriever: RetroLookup | None,
    ) -> dict[str, Any]:
        """The cache of a pass with retrieval. It is made here, because the plan needs it before the backbone runs."""
        exporting = is_torchdynamo_exporting()
        if use_cache is None:  # no cache in training, or with labels: no generation follows
            wanted = getattr(self.config.text_config, "use_cache", True)
            use_cache = wanted and not self.training and labels is None and not exporting
        cached = use_cache or past_key_values is not None
        if exporting and (cached or retriever is not None):
            raise ValueError(
                f"{'A cache' if cached else 'A retriever'} cannot be part of an exported pass with retrieval: chunks are "
                "completed and looked up outside of the program. Export with `neighbor_input_ids`, `retriever=None` and "
                "`use_cache=False`, or without retrieval."
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config.get_text_config(decoder=True))
        return {CACHE_NAME: past_key_values, "use_cache": use_cache}

    def _read(
        self,
        module: nn.Module,
        inputs: dict[str, Any],
        tokens: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        sources: dict[str, Any],
        steps: CompiledSteps | None,
    ) -> ModelOutput:
        """Plan the pass, run it, and count its tokens; `sources` are arguments of `plan_pass`."""
        size, cache = self.config.chunk_size, inputs[CACHE_NAME]
        state = None if cache is None else state_of(cache, len(tokens), sources["chunk_offset"], size)
        real = real_tokens(mask, position_ids, state, *tokens.shape[:2])
        # A retriever works on the host; the pass itself compiles.
        is_outside = sources["retriever"] is not None or not torch.compiler.is_compiling()
        plan = _plan_outside_graphs if is_outside else plan_pass
        planned = plan(tokens, real, size, state=state, **sources)
        run = RetroModel._run
        if steps is not None:
            planned, run = steps.choose(planned, run)
        outputs = run(self, module, inputs, planned, mask)
        if state is not None:
            planned.commit()
        return outputs

    _read_outside_graphs = torch.compiler.disable(_read)

    def _run(
        self, module: nn.Module, inputs: dict[str, Any], plan: PassPlan | None = None, mask: torch.Tensor | None = None
    ) -> ModelOutput:
        """Run `module(**inputs)` within a planned pass; without a plan, by itself. `generate` may compile this function."""
        if plan is None:  # the hooks ask for the pass, but a graph cannot read a context variable that it has not set
            return run_within(None, module, inputs) if torch.compiler.is_compiling() else module(**inputs)
        asked = inputs.get("output_attentions")
        attentions = self.config.output_attentions if asked is None else asked
        retro_pass = self.retro.begin(self.backbone, plan, inputs, mask, attentions)
        outputs = run_within(retro_pass, module, inputs)
        retro_pass.finish(outputs)
        return outputs


@auto_docstring(
    custom_intro="RETRO: a causal language model that reads retrieved neighbors through chunked cross-attention."
)
class RetroForCausalLM(RetroPreTrainedModel, RetroGenerationMixin):
    def __init__(self, config: RetroConfig, backbone: PreTrainedModel | None = None):
        r"""
        backbone (`PreTrainedModel`, *optional*):
            A live causal language model whose config is `config.text_config`; built from that config by default.
        """
        super().__init__(config)
        self.model = RetroModel(config, backbone)
        if backbone is not None and backbone.generation_config is not None:
            self.generation_config = GenerationConfig.from_dict(backbone.generation_config.to_dict())
        # Tokens cannot be removed from a recurrent state. With this flag `generate` refuses assisted decoding by name.
        self._is_stateful = self.model.backbone._is_stateful
        self.post_init()

    get_compiled_call = RetroGenerationMixin.get_compiled_call  # PreTrainedModel has one, too

    def get_decoder(self) -> nn.Module:
        return self.model

    @auto_docstring(custom_args=RETRIEVAL_ARGUMENTS)
    @accept_cache_by_any_name
    @with_arguments_of(RetroModel.forward)
    def forward(
        self,
        *args: Any,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        # As in `RetroModel`, with logits, and a loss where there are labels. Under `output_attentions` the output also has
        # `cross_attentions`, per layer of P the probabilities of each token over the neighbor tokens of its chunk.
        if "logits_to_keep" in self.model._backbone_arguments:
            kwargs |= {"logits_to_keep": logits_to_keep}
        return self.model(*args, with_head=True, labels=labels, **kwargs)
