"""Generating answers for a batch of questions, and a `Trainer` that evaluates with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer

from ..arguments import whole
from ..errors import DatasetError
from ..model.backbone_retro import accepted_arguments
from ..model.values_retro import check_plain
from .collator import IGNORED_LABEL, padding_id
from .questions import QuestionCollator, check_reader


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

# Of what QuestionCollator makes.
_DIMENSIONS = {"input_ids": 2, "attention_mask": 2, "labels": 2, "chunk_offset": 1, "neighbor_chunk_size": 1}
_DIMENSIONS |= {"neighbor_input_ids": 4, "neighbor_attention_mask": 4}


def generate_answers(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 32,
    **options: Any,
) -> list[str]:
    """Answer the questions of a batch.

    Args:
        model ([`RetroForCausalLM`], or any causal language model for batches with `num_passages=0`): in eval mode. A
            retriever attached to it is not used.
        batch (`dict` of `torch.Tensor`): from [`QuestionCollator`], with or without answers; on any device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's tokenizer.
        max_new_tokens (`int`, defaults to 32): longest answer, in tokens.
        options: options of `generate`, such as `num_beams`; greedy by default.
    Returns:
        `list[str]`: one answer per question, up to the end token or the end of the line.
    Raises:
        DatasetError: if a question and `max_new_tokens` are together longer than the model's context.
    """
    sequences = generate_ids(model, batch, tokenizer, max_new_tokens=max_new_tokens, **options)
    return decode_answers(tokenizer, sequences.tolist())


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    **options: Any,
) -> torch.Tensor:
    """The tokens of [`generate_answers`], without the prompt: `torch.LongTensor` of shape `(batch_size, at most max_new_tokens)`."""
    if not isinstance(batch, Mapping) or not {"input_ids", "attention_mask"} <= batch.keys():
        raise DatasetError(
            f"The batch is of type {type(batch).__name__}. Pass what QuestionCollator makes of examples."
        )
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        raise DatasetError(
            f"The model is of type {type(model).__name__}. Pass a causal language model of transformers."
        )
    max_new_tokens = whole("max_new_tokens", max_new_tokens, DatasetError)
    pad_token_id = padding_id(tokenizer)
    for name, value in batch.items():
        check_plain(f"{name!r} of the batch", value)
    if strange := [name for name, value in batch.items() if not isinstance(value, torch.Tensor) or not value.ndim]:
        raise DatasetError(
            f"{strange[0]!r} of the batch is of type {type(batch[strange[0]]).__name__}. Pass what QuestionCollator makes of examples."
        )
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    shapes = {name: tuple(value.shape) for name, value in batch.items() if name in _DIMENSIONS}
    fits = all(len(shape) == _DIMENSIONS[name] and shape[0] == len(input_ids) for name, shape in shapes.items())
    if not fits or input_ids.shape != attention_mask.shape or batch.get("labels", input_ids).shape != input_ids.shape:
        raise DatasetError(
            f"The shapes of the batch are {shapes}, but 'input_ids', 'attention_mask' and 'labels' must be "
            "(batch_size, sequence_length), and all have as many rows. Pass what QuestionCollator makes of examples."
        )
    start = input_ids.shape[1]
    if "labels" in batch:
        # All answers begin in the same column.
        start = int((batch["labels"] != IGNORED_LABEL).any(dim=0).long().argmax())
    inputs = {"input_ids": input_ids[:, :start], "attention_mask": attention_mask[:, :start]}
    longest = int(inputs["attention_mask"].sum(dim=1).max())
    limit = getattr(model.config, "max_position_embeddings", None)  # not every model has one
    if limit is not None and longest + max_new_tokens > limit:
        raise DatasetError(
            f"A question, with the passages in its prompt, has {longest} tokens and may get {max_new_tokens} more, but the "
            f"model's context has {limit}. Lower `max_new_tokens` or `passages_in_prompt`, or find long questions with "
            "`tokenize_questions(..., max_length=...)`."
        )
    if "neighbor_input_ids" in batch:
        # The collator's neighbors are those of all chunks that prompt and answer complete. While generating, the answer is not
        # known yet, so the passages are given for every chunk that an answer of any length can complete.
        lengths = inputs["attention_mask"].sum(dim=1) + batch["chunk_offset"]
        last = lengths // model.config.chunk_size - 1  # the last chunk that the prompt completes
        rows = torch.arange(len(last), device=last.device)
        # All chunks that have passages have the same ones, and so have those that the answer will complete.
        chunks = torch.arange(int(last.max()) + 2 + max_new_tokens // model.config.chunk_size, device=last.device)
        first = batch["neighbor_attention_mask"].flatten(2).any(dim=2).long().argmax(dim=1)
        reads = (chunks >= first[:, None])[:, :, None, None]
        inputs |= {name: batch[name] for name in ("chunk_offset", "neighbor_chunk_size") if name in batch}
        inputs["neighbor_input_ids"] = batch["neighbor_input_ids"][rows, last][:, None].expand(-1, len(chunks), -1, -1)
        inputs["neighbor_attention_mask"] = batch["neighbor_attention_mask"][rows, last][:, None] * reads
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if "retriever" in accepted_arguments(model):
        options["retriever"] = None
    defaults = {"do_sample": False, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad_token_id}
    generate: Any = model.generate  # any causal language model has it, `PreTrainedModel` by itself does not
    sequences: torch.Tensor = generate(**inputs, max_new_tokens=max_new_tokens, **{**defaults, **options})
    return sequences[:, start:]


def decode_answers(tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Sequence[int]]) -> list[str]:
    """The texts of generated answers, each up to the end token or the end of its line; negative ids are padding."""
    texts = []
    for sequence in sequences:
        ids = [token for token in sequence if token >= 0]
        if tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(tokenizer.eos_token_id)]
        texts.append(str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)))
    return [text.strip().partition("\n")[0].strip() for text in texts]


class QuestionTrainer(Trainer):
    """A [`~transformers.Trainer`] that evaluates by generating answers.

    It trains as `Trainer` does. Evaluation differs in two ways: `compute_metrics` gets the generated tokens as predictions
    (see [`answer_metrics`]), and every question reads its own passages, even if the collator draws random ones in training.
    `Seq2SeqTrainer` does not fit a decoder, because it generates from the whole input, which has the answer in it.

    Args:
        args, kwargs: as in [`~transformers.Trainer`], among them `data_collator`, a [`QuestionCollator`], and
            `processing_class`, the tokenizer. Without `compute_metrics` only the loss is evaluated.
        max_new_tokens (`int`, defaults to 32): longest answer, in tokens.
    Raises:
        ValueError: without a `QuestionCollator`, or without a tokenizer.
        DatasetError: for questions that were tokenized for another reader than the model's.
    """

    def __init__(self, *args: Any, max_new_tokens: int = 32, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        collator, tokenizer = self.data_collator, self.processing_class
        if not isinstance(collator, QuestionCollator) or not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                "QuestionTrainer generates from the batches of a QuestionCollator and needs the end token. Pass "
                "`data_collator=QuestionCollator(...)` and `processing_class=tokenizer`."
            )
        for dataset in (self.train_dataset, self.eval_dataset):
            if hasattr(dataset, "column_names"):
                check_reader(dataset, self.model, collator.num_passages)
        self._training_collator, self._tokenizer = collator, tokenizer
        self.max_new_tokens = max_new_tokens

    @contextmanager
    def _own_passages(self) -> Iterator[None]:
        # `Trainer` reads `self.data_collator` when it makes a data loader, and has no other way to give it one.
        self.data_collator = self._training_collator.for_evaluation()
        try:
            yield
        finally:
            self.data_collator = self._training_collator

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Batches for the evaluation, in which every question reads its own passages."""
        with self._own_passages():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Batches for `predict`, in which every question reads its own passages."""
        with self._own_passages():
            return super().get_test_dataloader(test_dataset)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The loss of a batch, the generated tokens `(batch_size, any)`, and the labels."""
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            unwrapped: Any = self.model  # a `nn.Module` for `Trainer`
            sequences = generate_ids(unwrapped, inputs, self._tokenizer, max_new_tokens=self.max_new_tokens)
        return loss, sequences, inputs.get("labels")
