# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Generation with retrieval: the `generate` of transformers, which retrieves once per completed chunk, and its trace."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import CompileConfig, GenerationMixin
from transformers.utils import ModelOutput, logging

from .cache_retro import chunk_offsets
from .compatibility_retro import CACHE_NAME
from .compiled_steps_retro import CompiledSteps
from .configuration_retro import RetroConfig
from .inputs_retro import ARGUMENT_NAMES, check_prompt, vocabulary_of
from .modeling_retro_decoder import RetroDecoderForCausalLM
from .readers_retro import traits_of
from .retriever_protocol_retro import ATTACHED, Retriever, RetroLookup
from .values_retro import shown


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
        query: str | list[str] | None = None,
        **kwargs: Any,
    ):
        """Generate as any model of transformers does, retrieving once per completed chunk of `chunk_size` tokens.

        With a retriever, chunks are counted so that each prompt ends a chunk. So a prompt of any length is looked up before
        the first new token. With `chunk_offset=0` chunks are counted from the first token, as in the paper; then only the
        full chunks of a prompt are looked up. With a cache that holds tokens, or with given neighbors, chunks are counted as
        they were before.

        Args:
            inputs, generation_config, args, kwargs: as in [`~transformers.GenerationMixin.generate`];
                `neighbor_input_ids`, `neighbor_attention_mask` and `chunk_offset` as in `forward`.
            retriever (`Callable`, *optional*): see `forward`; None generates without retrieval, by default the attached
                retriever is used.
            query (`str` or `list[str]`, *optional*): what to look up for the prompt, one text for all rows or one per row.
                In a prompt made by a chat template, the default is the last user turn, if the retriever knows its
                tokenizer, as [`RetroRetriever`] does. In any other prompt every chunk is looked up by default, and the last
                one ends with the prompt. With a query, the prompt reads only what was found for the query: its last token
                does, and with `reader="parallel_context"` every token from the last user turn on.
        Returns:
            `torch.LongTensor` of token ids, or a `ModelOutput` with `return_dict_in_generate=True`; the latter has
            `retrieval_trace`, for each sequence the list of its looked-up chunks with their neighbors.
        """
        retriever = self.retriever if retriever is ATTACHED else retriever
        given = kwargs.get("neighbor_input_ids") is not None
        if query is not None and (retriever is None or given):
            raise ValueError(
                f"`query` is {shown(query)}, but there is {'no retriever' if retriever is None else 'no need to look it up'}: "
                f"{'pass `retriever=` with it' if retriever is None else '`neighbor_input_ids` are given'}."
            )
        check_prompt(inputs, kwargs | {"generation_config": generation_config}, vocabulary_of(self))
        if retriever is None and not given and self.config.retriever_name_or_path:
            logger.warning_once(
                f"Generating without retrieval: this model was trained with '{self.config.retriever_name_or_path}'. Open it "
                "with `from_pretrained(..., retriever='config')` (`pipeline(..., model_kwargs={'retriever': 'config'})`), or "
                "pass `retriever=`."
            )
        lookup = self.model._lookup(retriever)
        if lookup is not None and lookup is not retriever:
            lookup.query, lookup.aligns = query, not given
            prompt, mask = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("attention_mask")
            if isinstance(prompt, torch.Tensor) and isinstance(mask, torch.Tensor) and mask.dim() == 2:
                # A mask that is longer than the prompt covers tokens of a cache that the prompt leaves out.
                lookup.num_before = max(mask.shape[1] - prompt.shape[1], 0)
        outputs = super().generate(inputs, generation_config, *args, retriever=lookup, **kwargs)
        if lookup is None and isinstance(outputs, ModelOutput):
            outputs["retrieval_trace"] = [[] for _ in outputs["sequences"]]
        elif isinstance(outputs, ModelOutput):
            used = self._prepare_generation_config(generation_config, **kwargs)[0]
            outputs["retrieval_trace"] = self._trace(lookup, outputs, used)
        return outputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        # `generate` calls this once, when it knows which tokens are padding, and before it repeats rows.
        lookup = model_kwargs.get("retriever")
        if isinstance(lookup, RetroLookup):
            prompt = input_ids if input_ids is not None and input_ids.shape[1] else model_kwargs.get("inputs_embeds")
            model_kwargs["chunk_offset"] = self._place_chunks(lookup, prompt, model_kwargs)
            lookup.repeats = expand_size
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _place_chunks(
        self, lookup: RetroLookup, prompt: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """Decide where the chunks of each row begin, and return the offsets.

        A prompt that is looked up by a query, or by its last user turn, is looked up here: where it reads what was found
        decides where its chunks begin.
        """
        cache, size = model_kwargs.get(CACHE_NAME), self.config.chunk_size
        offset, mask = model_kwargs.get("chunk_offset"), model_kwargs.get("attention_mask")
        has_history = cache is not None and int(cache.get_seq_length()) > 0
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
        lengths = mask.long().sum(dim=1).tolist()
        aligns = offset is None and lookup.aligns and not has_history
        turns = lookup.last_turns(prompt, mask) if aligns else [None] * len(lengths)
        reads = self._read_from(turns, lengths)
        if aligns:
            offset = torch.tensor([-read % size for read in reads], device=prompt.device)
        lookup.offsets = chunk_offsets(offset, len(lengths), size)
        state = getattr(cache, "retrieval_state", None)
        if lookup.num_before > 0 and state is not None:
            lookup.begins = state.unfinished_chunks()
        if lookup.query is not None and not (aligns or self._ends_chunk(lookup.offsets, lengths, has_history)):
            why = "the cache holds tokens already" if has_history else f"`chunk_offset` is {offset}"
            raise ValueError(
                f"`query` is read where the prompt ends a chunk, which it does not here: {why}. Leave that out."
            )
        if aligns or lookup.query is not None:
            chunks = [
                range((start + read) // size - 1, (start + length) // size)
                for start, read, length in zip(lookup.offsets, reads, lengths, strict=True)
            ]
            lookup.look_up_prompts([None if turn is None else turn[0] for turn in turns], chunks)
        return offset

    def _read_from(self, turns: list[tuple[str, int] | None], lengths: list[int]) -> list[int]:
        """The token of each prompt from which on it reads what was found for its query."""
        if not traits_of(self.config.reader).reads_question:
            return lengths
        return [
            length if turn is None else min(max(turn[1], 1), length)
            for length, turn in zip(lengths, turns, strict=True)
        ]

    def _ends_chunk(self, offsets: list[int], lengths: list[int], has_history: bool) -> bool:
        ends = [start + length for start, length in zip(offsets, lengths, strict=True)]
        return not has_history and all(end % self.config.chunk_size == 0 for end in ends)

    def _trace(self, lookup: RetroLookup, outputs: ModelOutput, used: GenerationConfig) -> list[list[dict]]:
        """For every sequence, the chunks that could influence it: those after which a token was generated."""
        sequences = outputs["sequences"]
        real = torch.ones_like(sequences, dtype=torch.bool)
        real[:, -1] = False  # the last token was never an input
        if used.eos_token_id is not None:
            eos = used.eos_token_id if isinstance(used.eos_token_id, list) else [used.eos_token_id]
            ends = torch.tensor([*eos, eos[0] if used.pad_token_id is None else used.pad_token_id])
            tail = torch.isin(sequences, ends.to(sequences.device))
            real &= ~tail.long().flip(1).cumprod(1).flip(1).bool()
        if lookup.padding_mask is not None:
            mask = lookup.padding_mask[:, lookup.num_before :].bool().to(real.device)
            real[:, : mask.shape[1]] &= mask[_prompt_rows(len(mask), len(sequences))]
        state = getattr(outputs.get(CACHE_NAME), "retrieval_state", None)
        offsets = lookup.offsets if state is None else state.offsets
        begins = lookup.begins or [(0, [-1] * offset) for offset in offsets]
        begins = [begins[row] for row in _prompt_rows(len(begins), len(sequences))]
        return lookup.trace(sequences, real, begins, self.config.chunk_size)

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
        """The inputs that the backbone prepares, and those of retrieval."""
        inputs = self.model.backbone.prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if isinstance(retriever, RetroLookup):
            retriever.padding_mask = attention_mask
        if neighbor_input_ids is not None and kwargs.get(CACHE_NAME) is None:
            # Without a cache, only the chunks of this pass.
            num_chunks = input_ids.shape[1] // self.config.chunk_size + 1
            neighbor_input_ids = neighbor_input_ids[:, :num_chunks]
            if neighbor_attention_mask is not None:
                neighbor_attention_mask = neighbor_attention_mask[:, :num_chunks]
        of_retrieval = {
            "neighbor_input_ids": neighbor_input_ids,
            "neighbor_attention_mask": neighbor_attention_mask,
            "chunk_offset": chunk_offset,
            "retriever": retriever,
            "neighbor_chunk_size": neighbor_chunk_size,
            "token_mask": attention_mask,  # the backbone's own may be 4-D, or as long as a static cache
        }
        if inputs.get("input_ids") is None and input_ids.shape[1] > 0:
            of_retrieval["token_ids"] = input_ids
        return inputs | of_retrieval

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        # As in transformers: a static cache, and a GPU or a `compile_config` that asks for other devices.
        if not super()._valid_auto_compile_criteria(model_kwargs, generation_config):
            return False
        reads = any(model_kwargs.get(name) is not None for name in ("retriever", "neighbor_input_ids"))
        if traits_of(self.config.reader).compiles or not reads:
            return True
        if generation_config.compile_config is not None:
            logger.warning_once(
                f"`compile_config` is ignored: with reader='{self.config.reader}' each chunk reads neighbors of other lengths, "
                "and its steps are not compiled."
            )
        return False

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """The forward pass for `generate`, which compiles its steps from one chunk border to the next; see [`CompiledSteps`]."""
        # A function of the model and not a method of this one: a copy of the model must not run with the weights of the first.
        compiled = torch.compile(type(self.model)._run, **(compile_config or CompileConfig()).to_dict())
        return partial(self, compiled_steps=CompiledSteps(compiled))

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any):
        if kwargs["generation_config"].assistant_early_exit is not None:
            raise NotImplementedError(
                "RETRO does not support `assistant_early_exit`: the first layers alone would read no neighbors. Use "
                "`assistant_model` or `prompt_lookup_num_tokens`."
            )
        # An assistant may be any model, which would reject our arguments; so it drafts without retrieval.
        rest = {name: value for name, value in model_kwargs.items() if name not in ARGUMENT_NAMES}
        return super()._get_candidate_generator(*args, model_kwargs=rest, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        """As in transformers, but only without a retriever: it packs requests into one row, which hides where chunks begin."""
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
    """The prompt's row of each generated sequence. Sequences of one prompt (beams or results) follow one another."""
    return [sequence * num_rows // num_sequences for sequence in range(num_sequences)]
