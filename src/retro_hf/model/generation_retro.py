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
"""Generation with retrieval: stock `generate`, retrieving once per completed chunk, and the trace of what was retrieved."""

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput, logging

from .cache_retro import chunk_offsets
from .compatibility_retro import CACHE_NAME
from .configuration_retro import RetroConfig
from .modeling_retro_decoder import RetroDecoderForCausalLM
from .retriever_protocol_retro import ATTACHED, Retriever, RetroLookup


logger = logging.get_logger(__name__)


class RetroGenerationMixin(GenerationMixin):
    """`generate` of [`RetroForCausalLM`]."""

    config: RetroConfig
    model: Any
    retriever: Retriever | None

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        retriever: Retriever | None = ATTACHED,
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
        retriever = self.retriever if retriever is ATTACHED else retriever
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(prompt, torch.Tensor) and 0 in prompt.shape and kwargs.get("inputs_embeds") is None:
            raise ValueError(
                f"The prompt has no tokens: its shape is {tuple(prompt.shape)} (batch, tokens). Begin with at least one "
                "token, such as the tokenizer's `bos_token_id`."
            )
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
        retriever: Retriever | None = ATTACHED,
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
        if inputs.get("input_ids") is None and input_ids.shape[1] > 0:
            retro["token_ids"] = input_ids
        return inputs | retro

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        # Retrieval decides on the host when a chunk completes; transformers compiles the steps of a static cache on a GPU.
        if generation_config.compile_config is not None:
            logger.warning_once("`compile_config` is ignored: generation with retrieval is not compiled.")
        return False

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any):
        if kwargs["generation_config"].assistant_early_exit is not None:
            raise NotImplementedError(
                "RETRO does not support `assistant_early_exit`: the first layers alone would read no neighbors. Use "
                "`assistant_model` or `prompt_lookup_num_tokens`."
            )
        # An assistant drafts without retrieval: it may be any model, and would reject our arguments.
        ours = ("neighbor_input_ids", "neighbor_attention_mask", "neighbor_chunk_size", "chunk_offset", "retriever")
        rest = {name: value for name, value in model_kwargs.items() if name not in ours}
        return super()._get_candidate_generator(*args, model_kwargs=rest, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        """As in transformers, without a retriever: requests are packed into one row, where chunks cannot be told apart."""
        if self.retriever is not None:
            raise NotImplementedError(
                "Continuous batching (`generate_batch`, paged caches) packs requests into one row, where their chunks cannot "
                "be told apart, so it cannot retrieve. Use `generate` on a left-padded batch, or detach the retriever: "
                "`set_retriever(None)`."
            )
        if isinstance(self.model.backbone, RetroDecoderForCausalLM):
            self.model.backbone.init_continuous_batching()
        return super().init_continuous_batching(*args, **kwargs)


def _prompt_rows(num_rows: int, num_sequences: int) -> list[int]:
    """For each generated sequence a row of its prompt, which stand together: once per beam, and once per result."""
    return [sequence * num_rows // num_sequences for sequence in range(num_sequences)]


__all__ = ["RetroGenerationMixin"]
