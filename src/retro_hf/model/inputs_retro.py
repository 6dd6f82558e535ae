# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What a model is given, checked before anything is computed, so that an error names the argument and the remedy.

Values are read on the CPU alone. Reading a value on an accelerator waits for the device; a compiled program has no values to
read.
"""

from collections.abc import Callable
from difflib import get_close_matches
from inspect import Signature, signature
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_torchdynamo_exporting, logging

from .cache_retro import pad_to
from .compatibility_retro import CACHE_NAME, CACHE_NAMES
from .configuration_retro import RetroConfig
from .readers_retro import traits_of
from .retriever_protocol_retro import RetroLookup, check_neighbors, warn_of_longer_neighbors
from .values_retro import check_plain, shown


logger = logging.get_logger(__name__)


ARGUMENT_NAMES = ("neighbor_input_ids", "neighbor_attention_mask", "neighbor_chunk_size", "chunk_offset", "retriever")
"""What retrieval adds to the arguments of a forward pass, and of `generate`."""

RETRIEVAL_ARGUMENTS = r"""
neighbor_input_ids (`torch.LongTensor` of shape `(batch_size, num_chunks, num_neighbors, neighbor_size)`, *optional*):
    Tokens of the neighbors of each chunk, counted from the first chunk of the row. For chunks beyond `num_chunks` the
    retriever is asked; without one they have no neighbors.
neighbor_attention_mask (`torch.Tensor` of the same shape, *optional*):
    1 at real tokens, 0 at padding and at missing neighbors; all ones by default.
neighbor_chunk_size (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
    The chunk size for which the given neighbors were looked up. It must be the model's: neighbors of longer chunks
    would tell the model what comes next. The collators pass it.
chunk_offset (`int` or `torch.LongTensor` of shape `(batch_size,)`, *optional*):
    Chunk position of a row's first token, 0 by default; with `-prompt_length % chunk_size` the prompt ends a chunk.
retriever (`Callable`, *optional*):
    `retriever(chunk_input_ids, chunk_attention_mask)` of shapes `(N, chunk_size)` returns neighbor ids and mask of
    shape `(N, num_neighbors, neighbor_size)`. None turns retrieval off; by default the attached one is used.
with_head (`bool`, *optional*, defaults to `False`):
    Whether to run the backbone with its head, as [`RetroForCausalLM`] does.
"""
"""The arguments of a forward pass that other causal language models do not have."""


def with_arguments_of(forward: Callable) -> Callable:
    """Show the arguments of `forward` in the signature of a function that passes them on, followed by its own arguments."""

    def decorate(function: Callable) -> Callable:
        passed_on = [p for p in signature(forward).parameters.values() if p.name not in ("with_head", "kwargs")]
        own = [p for p in signature(function).parameters.values() if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
        function.__signature__ = Signature(passed_on + own)  # type: ignore[attr-defined]  # `inspect` reads it
        return function

    return decorate


class Vocabulary(NamedTuple):
    """The table that a model looks ids up in; None where the model computes embeddings in another way.

    Args:
        size (`int`, *optional*): its rows; also None where ids beyond them mean images or sound.
        width (`int`, *optional*): length of an embedding.
        is_real (`bool`): whether the table has values, so that the ids must have some, too.
    """

    size: int | None
    width: int | None
    is_real: bool


def vocabulary_of(model: PreTrainedModel) -> Vocabulary:
    """The [`Vocabulary`] of a model as it is now: it may have been resized."""
    table, text_config = model.get_input_embeddings(), getattr(model.config, "text_config", model.config)
    size = getattr(table, "num_embeddings", None) if text_config.get_text_config() is text_config else None
    is_real = not getattr(getattr(table, "weight", None), "is_meta", True)
    return Vocabulary(size, getattr(table, "embedding_dim", None), is_real)


def check_inputs(
    input_ids: Any,
    inputs_embeds: Any,
    attention_mask: Any,
    position_ids: Any,
    cache: Any,
    vocabulary: Vocabulary,
    positions: range | None = None,
) -> None:
    """Check the arguments of a forward pass that every causal language model has.

    Args:
        input_ids, inputs_embeds, attention_mask, position_ids, cache: as in `forward`.
        vocabulary ([`Vocabulary`]): of the model.
        positions (`range`, *optional*): the positions that the model has a table of.
    Raises:
        ValueError: for a tensor of another shape or dtype than it must have, for ids that the vocabulary lacks, or more
            tokens than positions.
        TypeError: for a cache that is none.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    _check_cache(cache)
    text = inputs_embeds if input_ids is None else input_ids
    check_plain("`input_ids`" if text is input_ids else "`inputs_embeds`", text, has_values=vocabulary.is_real)
    if input_ids is not None:
        check_ids(input_ids, vocabulary)
    else:
        _check_embeddings(inputs_embeds, vocabulary)
    if is_torchdynamo_exporting():  # a comparison would fix a size that may be dynamic
        return
    for name, tensor in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        check_plain(f"`{name}`", tensor, has_values=not text.is_meta)
    rows, tokens = text.shape[:2]
    if 0 in (rows, tokens):
        raise ValueError(f"The input has no tokens: its shape is {(rows, tokens)} (batch, tokens).")
    _check_mask(attention_mask, rows, tokens, is_whole=cache is None)
    if positions is not None:
        length = tokens + (int(cache.get_seq_length()) if isinstance(cache, Cache) else 0)
        if length > positions.stop:
            raise ValueError(
                f"The sequence has {length} tokens, but the backbone's position table ends at {positions.stop}. Shorten "
                "the prompt, or lower `max_new_tokens`."
            )
    if position_ids is not None:
        _check_positions(position_ids, rows, tokens, positions)


def check_prompt(prompt: Any, arguments: dict[str, Any], vocabulary: Vocabulary) -> None:
    """Check the prompt of `generate` and what comes with it; without a prompt it begins with the `bos_token_id`.

    Args:
        prompt (`torch.LongTensor` of shape `(B, T)`, *optional*): the first argument of `generate`.
        arguments (`dict`): its keyword arguments.
        vocabulary ([`Vocabulary`]): of the model.
    Raises:
        ValueError, TypeError: as `check_inputs`.
    """
    prompt = arguments.get("input_ids") if prompt is None else prompt
    embeds, position_ids = arguments.get("inputs_embeds"), arguments.get("position_ids")
    cache = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
    _check_cache(cache)
    for name in ("attention_mask", "position_ids", "inputs_embeds", "chunk_offset", "neighbor_chunk_size"):
        check_plain(f"`{name}`", arguments.get(name))
    check_plain("`input_ids`", prompt)
    check_flags(arguments)
    if prompt is not None:
        check_ids(prompt, vocabulary)
    if embeds is not None:
        _check_embeddings(embeds, vocabulary)
    text = prompt if embeds is None else embeds
    if text is None:
        return
    rows, tokens = text.shape[:2]
    if rows == 0:
        raise ValueError(
            f"The prompt has no rows: its shape is {(rows, tokens)} (batch, tokens). Give at least one text."
        )
    if tokens == 0:
        raise ValueError(
            f"The prompt has no tokens: its shape is {(rows, tokens)} (batch, tokens). Begin with at least one token, such "
            "as the tokenizer's `bos_token_id`."
        )
    # A prompt may continue a cache, or begin with embeddings of its first part.
    _check_mask(arguments.get("attention_mask"), rows, tokens, is_whole=cache is None and embeds is None)
    if position_ids is not None:
        _check_positions(position_ids, rows, tokens, None)


def check_labels(labels: Any, text: torch.Tensor, vocabulary: Vocabulary, ignore_index: int = -100) -> None:
    """Check the labels of a loss.

    Args:
        labels (`torch.LongTensor` of shape `(B, T)`, *optional*): token ids, `ignore_index` where there is no loss.
        text (`torch.Tensor` of shape `(B, T, ...)`): the input.
        vocabulary ([`Vocabulary`]): of the model.
        ignore_index (`int`, defaults to -100): label of tokens without a loss.
    Raises:
        ValueError: for another shape or dtype, or ids that the vocabulary lacks.
    """
    if labels is None:
        return
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"`labels` must be a tensor of token ids, got {type(labels).__name__}.")
    check_plain("`labels`", labels, has_values=not text.is_meta)
    shape = text.shape[:2]
    if not is_torchdynamo_exporting() and tuple(labels.shape) != tuple(shape):
        raise ValueError(
            f"`labels` must have the shape of the input {tuple(shape)}, got {tuple(labels.shape)}. The model shifts them "
            "by one token itself."
        )
    if labels.dtype != torch.long:
        raise ValueError(f"`labels` must be of the dtype torch.long, got {labels.dtype}. Use `labels.long()`.")
    if vocabulary.size is not None and _can_read(labels):
        _check_range("labels", labels[labels != ignore_index], vocabulary.size, f", or {ignore_index} for no loss")


def check_names(arguments: dict[str, Any]) -> None:
    """Check arguments that a model does not know: one that is meant for retrieval would be ignored without a word.

    Raises:
        TypeError: for a name that speaks of neighbors, chunks or retrieval.
    """
    for name in arguments:
        if any(part in name for part in ("neighbo", "chunk", "retr")):
            match = next(iter(get_close_matches(name, ARGUMENT_NAMES, 1, 0.0)))
            raise TypeError(f"RETRO has no argument `{name}`, which would be ignored. Did you mean `{match}`?")


def check_flags(arguments: dict[str, Any]) -> None:
    """Check what is asked of a forward pass or of `generate`: yes or no, and how many.

    Raises:
        ValueError: for a tensor or an array, which is neither true nor false, or a text, which would be true; for a number of
            tokens that never ends, such as NaN; and for logits that are no number and no places.
    """
    for name in ("use_cache", "output_attentions", "return_dict"):
        if not isinstance(arguments.get(name), (bool, int, type(None))):
            raise ValueError(f"`{name}` must be True, False or None, got {shown(arguments[name])}.")
    for name in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences"):
        count = arguments.get(name)
        if count is not None and not (isinstance(count, Integral) and int(count) >= 1):
            raise ValueError(f"`{name}` must be an integer of at least 1, got {shown(count)}.")
    config = arguments.get("generation_config")
    if not isinstance(config, (GenerationConfig, type(None))):
        raise ValueError(f"`generation_config` must be a GenerationConfig, got {shown(config)}.")
    kept = arguments.get("logits_to_keep", 0)
    check_plain("`logits_to_keep`", kept)
    if isinstance(kept, torch.Tensor):
        fits = kept.dim() in (1, 2) and kept.dtype in (torch.long, torch.int, torch.bool)
    else:
        fits = isinstance(kept, (int, torch.SymInt)) and kept >= 0
    if not fits:
        raise ValueError(
            f"`logits_to_keep` must be the number of last tokens, 0 for all, or a tensor of places (torch.long), got {shown(kept)}."
        )


def check_no_attentions(asked: bool | None) -> None:
    """Refuse `output_attentions` while passages are read in parallel context.

    Raises:
        ValueError: if they are asked for.
    """
    if asked:
        raise ValueError(
            "`output_attentions` is not there while reader='parallel_context' reads: the tokens of each chunk attend to "
            "neighbors of their own, so the weights of a layer fit into no tensor. Ask without neighbors: `retriever=None`."
        )


def given_neighbors(
    input_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    tokens: torch.Tensor,
    config: RetroConfig,
    *,
    is_step: bool,
    is_whole: bool,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Check the neighbors that were given to a forward pass; None if there are none.

    Args:
        input_ids, mask (`torch.Tensor` of shape `(B, C, K, R)`, *optional*): the neighbors of the chunks of each row.
        tokens (`torch.Tensor` of shape `(B, T, ...)`): the new tokens, or their embeddings.
        config ([`RetroConfig`]): of the model.
        is_step (`bool`): whether an earlier pass has checked these neighbors.
        is_whole (`bool`): whether no tokens can follow.
    Returns:
        Ids and boolean mask of shape `(B, C, K, R)`, with K at least 1.
    """
    if input_ids is None:
        if mask is not None:
            raise ValueError("`neighbor_attention_mask` was given without `neighbor_input_ids`. Give both, or none.")
        return None
    size, (batch_size, num_tokens) = config.chunk_size, tokens.shape[:2]
    if not is_step:
        source = "`neighbor_input_ids` (batch, chunks, …)"
        input_ids, mask = check_neighbors(input_ids, mask, (batch_size, -1), config.vocab_size, source)
        if not torch.compiler.is_compiling():
            warn_of_longer_neighbors(input_ids.shape[-1], config.neighbor_size)
        # An exported program also runs on shorter texts; neighbors of chunks beyond the text are never read.
        if is_whole and not is_torchdynamo_exporting() and input_ids.shape[1] > num_tokens // size + 1:
            raise ValueError(
                f"`neighbor_input_ids` holds neighbors of {input_ids.shape[1]} chunks, but {num_tokens} tokens have "
                f"only {num_tokens // size} complete chunks of {size}. Were they made with another `chunk_size`?"
            )
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=input_ids.device).expand_as(input_ids)
    # A chunk has at least one neighbor, if only to be masked.
    return pad_to(input_ids.to(tokens.device), 1, dim=-2), pad_to(mask.bool().to(tokens.device), 1, dim=-2)


def text_of(
    inputs_embeds: torch.Tensor,
    input_ids: torch.Tensor | None,
    given: tuple[torch.Tensor, torch.Tensor] | None,
    retriever: RetroLookup | None,
    is_unclear: bool,
) -> torch.Tensor:
    """The tokens that given embeddings stand for, or the embeddings themselves if the tokens are not known.

    Args:
        inputs_embeds (`torch.FloatTensor` of shape `(B, T, hidden_size)`): the embeddings.
        input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): the tokens that they stand for.
        given, retriever (*optional*): where neighbors come from.
        is_unclear (`bool`): whether it is unknown where the chunks of the given neighbors begin.
    Raises:
        ValueError: if retrieval needs to know more.
    """
    if input_ids is not None:
        if input_ids.shape != inputs_embeds.shape[:2]:
            raise ValueError(
                f"`input_ids` has the shape {tuple(input_ids.shape)} and `inputs_embeds` {tuple(inputs_embeds.shape)}, so the "
                "chunks of the text are unknown. Give embeddings of exactly these tokens, or `input_ids` alone."
            )
        return input_ids
    if retriever is not None:
        raise ValueError(
            "Retrieval needs `input_ids`: there are no tokens to look up in `inputs_embeds`. Give "
            "`neighbor_input_ids`, or `retriever=None`."
        )
    if given is not None and is_unclear:
        raise ValueError(
            "With `inputs_embeds` it is unknown where the chunks of `neighbor_input_ids` begin: virtual tokens before the "
            "text, as in PEFT's prompt tuning, would let tokens read neighbors of their own chunk. Give `input_ids` (and "
            "tune with LoRA), or, for embeddings of the text alone, `chunk_offset=0`."
        )
    return inputs_embeds


def check_chunk_size(looked_up: torch.Tensor | int | None, chunk_size: int) -> None:
    """Check that given neighbors were looked up for chunks of the model's size; `looked_up` is one number, or `(B,)`."""
    check_plain("`neighbor_chunk_size`", looked_up)
    if looked_up is None:
        return
    if isinstance(looked_up, torch.Tensor) and torch.compiler.is_compiling():  # reading values would break the graph
        message = f"The neighbors were looked up for chunks of another size than the model's {chunk_size}."
        torch._assert_async((looked_up == chunk_size).all(), message)
        return
    sizes = looked_up.unique().tolist() if isinstance(looked_up, torch.Tensor) else looked_up
    listed = sizes if isinstance(sizes, (list, tuple)) and sizes else [sizes]
    if not all(isinstance(size, Integral) and size == chunk_size for size in listed):
        raise ValueError(
            f"The neighbors were looked up for chunks of {shown(sizes)} tokens, but the model has chunks of "
            f"{chunk_size}: it would read neighbors of text that it is yet to predict. Take a datastore (and "
            f"a collator) of chunk_size={chunk_size}, and cut and look up the training text with it."
        )


def warn_of_nothing_to_train(backbone: nn.Module, labels: torch.Tensor | None, reader: str) -> None:
    """Explain a loss without a gradient; PyTorch only says that "element 0 of tensors does not require grad".

    Args:
        backbone (`nn.Module`): of a model that runs without retrieval, or whose reader has no weights.
        labels (`torch.LongTensor`, *optional*): whether a loss is computed.
        reader (`str`): of the model.
    """
    if labels is None or not backbone.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    if any(weight.requires_grad for weight in backbone.parameters()):
        return
    if not traits_of(reader).has_weights:
        logger.warning_once(
            f"reader='{reader}' has no weights, and the backbone is frozen, so the loss has no gradient. Put LoRA on the "
            "model (`get_peft_model`), or make it with `retrofit(..., freeze_backbone=False)`."
        )
    else:
        logger.warning_once(
            "This batch has no neighbors, and the backbone is frozen, so its loss has no gradient. Give `neighbor_input_ids`, or "
            "attach a retriever with `set_retriever`."
        )


def _can_read(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and type(tensor) is torch.Tensor and not torch.compiler.is_compiling()


def _check_cache(cache: Any) -> None:
    # That of continuous batching is a class of its own, without a length.
    if cache is not None and not any(hasattr(cache, method) for method in ("get_seq_length", "free_blocks")):
        raise TypeError(
            f"`{CACHE_NAME}` must be a cache of transformers, got {type(cache).__name__}. Make one with "
            "`DynamicCache(config=model.config)`, or leave it out."
        )


def check_ids(input_ids: Any, vocabulary: Vocabulary) -> None:
    """Check that tokens are a tensor of ids (B, T) that the vocabulary has.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(input_ids, torch.Tensor):
        remedy = "Pass `torch.tensor(ids)`, one row of ids per text"
        if hasattr(input_ids, "keys"):  # what a tokenizer returns
            remedy = "Unpack what the tokenizer returned: `model(**inputs)`, `model.generate(**inputs)`"
        elif isinstance(input_ids, (str, list, tuple)):
            remedy = "Let the tokenizer make it: `tokenizer(texts, return_tensors='pt')`"
        raise ValueError(
            f"`input_ids` must be a tensor of shape (batch, tokens), got {type(input_ids).__name__}. {remedy}."
        )
    if input_ids.dim() != 2:
        remedy = "one row per text: `input_ids.unsqueeze(0)`" if input_ids.dim() == 1 else "one row per text"
        raise ValueError(f"`input_ids` must have the shape (batch, tokens), {remedy}; got {tuple(input_ids.shape)}.")
    if input_ids.dtype not in (torch.long, torch.int):
        raise ValueError(
            f"`input_ids` must be of the dtype torch.long or torch.int, got {input_ids.dtype}. Use `input_ids.long()`."
        )
    if vocabulary.size is not None and _can_read(input_ids):
        _check_range("input_ids", input_ids, vocabulary.size)


def _check_range(name: str, ids: torch.Tensor, vocab_size: int, others: str = "") -> None:
    if not ids.numel():
        return
    least, most = (int(value) for value in ids.aminmax())
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"`{name}` holds ids from {least} to {most}, but the vocabulary has the ids 0 to {vocab_size - 1}{others}. Use "
            "the model's own tokenizer; if tokens were added to it, `model.resize_token_embeddings(len(tokenizer))`."
        )


def _check_embeddings(inputs_embeds: Any, vocabulary: Vocabulary) -> None:
    width = vocabulary.width
    expected = f"(batch, tokens, {'hidden_size' if width is None else width})"
    if not isinstance(inputs_embeds, torch.Tensor):
        raise ValueError(
            f"`inputs_embeds` must be a tensor of shape {expected}, got {type(inputs_embeds).__name__}. For token ids use "
            "`input_ids`."
        )
    if inputs_embeds.dim() != 3 or width not in (None, inputs_embeds.shape[-1]):
        raise ValueError(f"`inputs_embeds` must have the shape {expected}, got {tuple(inputs_embeds.shape)}.")
    if not inputs_embeds.is_floating_point():
        raise ValueError(
            f"`inputs_embeds` must be of a floating-point dtype, got {inputs_embeds.dtype}. For token ids use `input_ids`."
        )


def _check_mask(mask: Any, rows: int, tokens: int, is_whole: bool) -> None:
    """A 2-D mask covers the tokens, and those of a cache if there is one; other kinds are transformers' own."""
    parts = mask.values() if isinstance(mask, dict) and mask else [mask]  # one for each kind of layer
    if all(
        part is None or type(part).__name__ == "BlockMask" or isinstance(part, torch.Tensor) and part is not mask
        for part in parts  # a BlockMask is one of flex attention
    ):
        return
    expected = f"({rows}, {tokens}{'' if is_whole else ' and those of the cache'})"
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"`attention_mask` must be a tensor of shape {expected}, got {type(mask).__name__}.")
    if mask.dim() == 2:
        if (
            _can_read(mask) and mask.numel() and not bool((mask >= 0).all())
        ):  # so is NaN; an additive mask says the opposite
            raise ValueError(
                "`attention_mask` must be 1 at tokens and 0 at padding, but holds negative numbers or NaN."
            )
        fits = mask.shape[0] == rows and (mask.shape[1] == tokens or (mask.shape[1] > tokens and not is_whole))
    else:
        fits = mask.dim() == 4 and mask.shape[0] in (1, rows) and mask.shape[2] == tokens
    if not fits:
        raise ValueError(
            f"`attention_mask` must have shape {expected}, one entry per token of the input and of the cache, got "
            f"{tuple(mask.shape)}."
        )


def _check_positions(position_ids: Any, rows: int, tokens: int, positions: range | None) -> None:
    if not isinstance(position_ids, torch.Tensor) or position_ids.is_floating_point():
        found = position_ids.dtype if isinstance(position_ids, torch.Tensor) else type(position_ids).__name__
        raise ValueError(f"`position_ids` must be a tensor of integers of shape {(rows, tokens)}, got {found}.")
    shape = tuple(position_ids.shape)
    # Models of images and text have several positions per token, in a dimension before the rows.
    if len(shape) not in (2, 3) or shape[-1] != tokens or shape[-2] not in (1, rows):
        raise ValueError(f"`position_ids` must have the shape {(rows, tokens)}, one per token, got {shape}.")
    if positions is not None and _can_read(position_ids):
        least, most = (int(value) for value in position_ids.aminmax())
        if least not in positions or most not in positions:
            raise ValueError(
                f"`position_ids` are from {least} to {most}, but the backbone's position table has those from "
                f"{positions.start} to {positions.stop - 1}."
            )
