"""Question answering as in section 4.3 of the paper: questions, answers and passages in, training batches out."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import logging

from .. import extras
from ..arguments import check_tokenizer, flag, numbers, optional_whole, whole
from ..datastore.chunks import padded
from ..errors import DatasetError
from ..model.readers_retro import traits_of
from ..prompts import checked_prompt, is_chat, write_passage, write_question, write_question_as_chat
from ..special_tokens import mark, tokenize_marked, tokenize_prompt, tokenize_texts
from .collator import IGNORED_LABEL, checked_shares, generator_for, padding_id
from .columns import (
    check_columns,
    check_example,
    checked_examples,
    checked_text,
    list_lengths,
    lists_of_ids,
    token_ids,
)


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

_PROMPT_COLUMN = "prompt_input_ids"
_ANSWER_COLUMN = "answer_input_ids"
_PASSAGES_COLUMN = "passage_input_ids"
_START_COLUMN = "question_start"


def tokenize_questions(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    neighbor_size: int,
    reader: str = "cross_attention",
    num_passages: int | None = None,
    prompt: str | None = None,
    with_answers: bool = True,
    max_length: int | None = None,
) -> Dataset:
    r"""Tokenize questions, the answers to learn, and the passages to read, in the paper's format (section 4.3).

    The decoder reads `"question: {question} \n answer:"` and learns to continue with `" {answer}"` and the end token. A
    neighbor is `"title: {title}, source: {text}"`. Passages are tokenized here, from text, so they may come from a
    datastore with another tokenizer than the model's, or from no datastore at all.

    With `reader="parallel_context"` a question is asked as [`answer`] asks it: through the chat template of the tokenizer, if
    there is one, and a passage is its text with its title before it.

    Args:
        dataset (`datasets.Dataset`): one question per row. `question`: a text. `answers`: a list of texts that count as
            right; the first one is learned. `passages`: a list, best first, of dicts with `text` and optionally `title`, or
            of texts; it may be empty. [`retrieve_passages`] makes that column.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the language model's tokenizer.
        neighbor_size (`int`): longest passage, in tokens, `model.config.neighbor_size`; longer passages are cut.
        reader (`str`, defaults to `"cross_attention"`): of the model, `model.config.reader`.
        num_passages (`int`, *optional*): passages to keep per question; all by default. With 0 (closed book) the dataset
            needs no passages.
        prompt (`str`, *optional*): another format of the question, with `{question}` in it; the answer follows after a space.
        with_answers (`bool`, defaults to `True`): `False` for questions without known answers.
        max_length (`int`, *optional*): longest question with its answer, in tokens; a longer one is an error. Leave room
            for `neighbor_size` more per passage that goes into the prompt.
    Returns:
        `datasets.Dataset`: the same rows, without `passages`, and with `prompt_input_ids`, `answer_input_ids` (with the end
        token) and `passage_input_ids` (a list per passage). With `reader="parallel_context"` also `question_start`: the
        prompt's token that the question begins with, and from which on the passages are read.
    Raises:
        ValueError: if there is no such reader.
        DatasetError: for missing columns, a tokenizer without an end token, and, naming the row, for empty questions,
            questions without an answer, and questions that are too long.
    *Disk*: 4 bytes per token, at most `4 * num_passages * neighbor_size` per question.
    """
    datasets = extras.load("datasets", "Training")
    num_passages = optional_whole("num_passages", num_passages, ValueError, least=0)
    max_length = optional_whole("max_length", max_length, ValueError)
    neighbor_size = whole("neighbor_size", neighbor_size, ValueError)
    with_answers = flag("with_answers", with_answers, ValueError)
    needed = ["question", *(["answers"] if with_answers else []), *(["passages"] if num_passages != 0 else [])]
    _check_table(dataset, tokenizer, needed)
    prompt = checked_prompt(prompt, DatasetError)
    reads_question = traits_of(reader).reads_question

    def convert(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        questions = [
            checked_text(text, "question", number) for text, number in zip(batch["question"], numbers, strict=True)
        ]
        targets = None
        if with_answers:
            targets = [_first_answer(given, number) for given, number in zip(batch["answers"], numbers, strict=True)]
        prompts, starts, answers = _written(tokenizer, reader, prompt, questions, targets, numbers)
        columns: dict[str, list[Any]] = {_PROMPT_COLUMN: prompts}
        if reads_question:
            columns[_START_COLUMN] = starts
        lengths = [len(ids) for ids in prompts]
        if answers is not None:
            columns[_ANSWER_COLUMN] = [[*ids, tokenizer.eos_token_id] for ids in answers]
            lengths = [length + len(ids) for length, ids in zip(lengths, columns[_ANSWER_COLUMN], strict=True)]
        for length, number in zip(lengths, numbers, strict=True):
            if max_length is not None and length > max_length:
                raise DatasetError(
                    f"Question {number} has {length} tokens with its answer, but max_length={max_length}. Shorten it, or "
                    "leave it out with `dataset.filter`."
                )
        given = batch["passages"] if num_passages != 0 else [[] for _ in prompts]
        texts = [_passages(row, number, reader)[:num_passages] for row, number in zip(given, numbers, strict=True)]
        tokens = iter(tokenize_texts(tokenizer, [text for row in texts for text in row])[0])
        columns[_PASSAGES_COLUMN] = [[next(tokens)[:neighbor_size] for _ in row] for row in texts]
        return columns

    token_ids = datasets.List(datasets.Value("int32"))
    features = dataset.features.copy()
    dropped = [name for name in ("passages",) if features.pop(name, None) is not None]
    features.update({_PROMPT_COLUMN: token_ids, _PASSAGES_COLUMN: datasets.List(token_ids)})
    if with_answers:
        features[_ANSWER_COLUMN] = token_ids
    if reads_question:
        features[_START_COLUMN] = datasets.Value("int32")
    result = dataset.map(
        convert,
        batched=True,
        batch_size=256,
        with_indices=True,
        remove_columns=dropped,
        features=features,
        desc="Tokenizing questions",
    )
    if num_passages != 0 and not list_lengths(result, _PASSAGES_COLUMN).any():
        logger.warning(
            f"None of the {len(result)} questions has a passage, so the backbone answers alone. Look passages up with "
            "`retrieve_passages(dataset, retriever)`, or pass `num_passages=0`."
        )
    return result


def _check_table(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, needed: list[str]) -> None:
    check_tokenizer(tokenizer, DatasetError)
    if isinstance(dataset, extras.load("datasets", "Training").Dataset) and not len(dataset):
        raise DatasetError("There are no questions: the dataset is empty.")
    check_columns(dataset, needed)
    if tokenizer.eos_token_id is None:
        raise DatasetError(
            "The tokenizer has no end token, which ends an answer. Set one: `tokenizer.eos_token = ...`."
        )


def _written(
    tokenizer: PreTrainedTokenizerBase,
    reader: str,
    prompt: str | None,
    questions: list[str],
    targets: list[str] | None,
    numbers: list[int],
) -> tuple[list[list[int]], list[int], list[list[int]] | None]:
    """Tokens of prompts, where in them the questions begin, and the tokens of the answers if there are any."""
    if is_chat(tokenizer, reader, prompt):
        chats = [write_question_as_chat(tokenizer, [{"role": "user", "content": question}]) for question in questions]
        prompts, starts = [ids for ids, _ in chats], [start for _, start in chats]
        # The template ends with what stands before an answer.
        return prompts, starts, None if targets is None else tokenize_texts(tokenizer, targets)[0]
    texts = [write_question(tokenizer, reader, prompt, question) for question in questions]
    pairs = [tokenize_prompt(tokenizer, *pair) for pair in zip(texts, questions, strict=True)]
    prompts, starts = [ids for ids, _ in pairs], [start for _, start in pairs]
    if targets is None:
        return prompts, starts, None
    # Together with the prompt, so that the answer is tokenized as text that follows it.
    both = [f"{text} {mark(tokenizer, target)}" for text, target in zip(texts, targets, strict=True)]
    whole = tokenize_marked(tokenizer, both)
    return prompts, starts, [_rest(*row) for row in zip(whole, prompts, numbers, strict=True)]


class QuestionCollator:
    """Makes batches of tokenized questions for training, evaluation and generation.

    Rows are `[padding, prompt][answer, padding]`: all answers begin in the same column, so the columns before it are the
    left-padded batch that `generate` needs. `chunk_offset` moves the chunk grid of each row so that its prompt ends a chunk.
    That chunk has the passages as its neighbors, which its last token (of "answer:") and the answer read. An answer that is
    longer than a chunk reads the same passages in its later chunks. Earlier chunks of a long question read nothing.
    Questions for `reader="parallel_context"` read the passages from their own first token on; there, the grid is moved so that
    the chunk before the question ends where the question begins.

    A model that has only seen good passages trusts bad ones. Two probabilities randomly replace or drop the passages of
    some questions during training; [`QuestionTrainer`] switches both off when it evaluates.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the language model's tokenizer.
        chunk_size (`int`): `model.config.chunk_size`.
        num_passages (`int`, *optional*): passages to read, k in the paper; by default all that the dataset has. With 0 the
            batch has no retrieval in it, and fits any causal language model.
        passages_in_prompt (`int`, defaults to 0): passages that the decoder reads before the question: 1 is RETRO++
            (Wang et al., 2023). The encoder reads them, too.
        random_passage_probability (`float`, defaults to 0.0): share of questions that get the passages of another question.
        no_passage_probability (`float`, defaults to 0.0): share of questions that get none.
        random_passages (`datasets.Dataset`, *optional*): tokenized questions whose passages are drawn as random ones, such
            as the training set itself.
        seed (`int`, defaults to 0): seed of these draws.
    Inputs of a call:
        examples from [`tokenize_questions`]; other columns are ignored.
    Returns of a call:
        `input_ids`, `attention_mask`, `position_ids` and, if answers are known, `labels` of shape
        `(batch_size, sequence_length)`, labels -100 except at answers and their end tokens. Unless `num_passages=0`,
        `neighbor_input_ids` and `neighbor_attention_mask` of shape `(batch_size, num_chunks, num_passages, longest passage)`,
        missing passages masked, and `chunk_offset` and `neighbor_chunk_size` of shape `(batch_size,)`. All int64.
    Raises:
        DatasetError: for examples that are not tokenized, or lack passages.
    *Determinism*: as for [`RetroDataCollator`].
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chunk_size: int,
        num_passages: int | None = None,
        passages_in_prompt: int = 0,
        random_passage_probability: float = 0.0,
        no_passage_probability: float = 0.0,
        random_passages: Dataset | None = None,
        seed: int = 0,
    ) -> None:
        shares = checked_shares(
            random_passage_probability=random_passage_probability, no_passage_probability=no_passage_probability
        )
        if random_passages is not None:
            check_columns(random_passages, [_PASSAGES_COLUMN])
        if random_passage_probability and not random_passages:
            raise DatasetError(
                f"random_passage_probability={random_passage_probability} needs questions to take passages from. Pass "
                "`random_passages=`, such as the tokenized training set."
            )
        self.chunk_size = whole("chunk_size", chunk_size, ValueError, most=1 << 32)
        self.num_passages = optional_whole("num_passages", num_passages, ValueError, least=0)
        self.passages_in_prompt = whole("passages_in_prompt", passages_in_prompt, ValueError, least=0)
        self.random_passage_probability, self.no_passage_probability = shares
        self.random_passages = random_passages
        self.seed = whole("seed", seed, ValueError, least=0)
        self.pad_token_id = padding_id(tokenizer)
        self._separator = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def for_evaluation(self) -> QuestionCollator:
        """The same collator, but every question gets its own passages."""
        other = copy.copy(self)
        other.random_passage_probability = other.no_passage_probability = 0.0
        return other

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make one batch; see the class."""
        examples = checked_examples(examples)
        needs_passages = self.num_passages != 0 or self.passages_in_prompt > 0
        for example in examples:
            check_example(example, [_PROMPT_COLUMN, *([_PASSAGES_COLUMN] if needs_passages else [])])
        if len({_START_COLUMN in example for example in examples}) > 1:
            raise DatasetError(
                "The examples are questions for different readers. Tokenize all of them for one: `tokenize_questions(..., reader=)`."
            )
        passages = self._drawn(examples) if needs_passages else [[] for _ in examples]
        prompts, starts = [], []
        for example, read in zip(examples, passages, strict=True):
            first = [token for passage in read[: self.passages_in_prompt] for token in [*passage, *self._separator]]
            prompts.append([*first, *token_ids(example, _PROMPT_COLUMN)])
            # Where passages are read from: the question, or the answer, which is how the paper's reader is trained.
            question = example.get(_START_COLUMN)
            starts.append(
                len(prompts[-1])
                if question is None
                else max(len(first) + whole(_START_COLUMN, question, DatasetError, 0), 1)
            )
        has_answers = _ANSWER_COLUMN in examples[0]
        answers = [list(token_ids(example, _ANSWER_COLUMN)) if has_answers else [] for example in examples]
        start = max(map(len, prompts))
        input_ids = np.full((len(examples), start + max(map(len, answers))), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            real = slice(start - len(prompt), start + len(answer))
            input_ids[row, real] = prompt + answer
            attention_mask[row, real] = 1
            labels[row, start : real.stop] = answer
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            # Without these, models count padding on the left unless they are generating.
            "position_ids": np.maximum(attention_mask.cumsum(axis=1) - 1, 0),
            **({"labels": labels} if has_answers else {}),
        }
        if self.num_passages != 0:
            lengths = np.array([len(prompt) for prompt in prompts])
            ends = lengths + np.array([len(answer) for answer in answers])
            # With chunks of 8, if passages are read from token 13 on, the offset is 3: the tokens before it fill the places 3 to 15.
            offsets = -np.array(starts) % self.chunk_size
            ids, mask = _of_one_shape([read[: self.num_passages] for read in passages])
            # The chunk that ends there has the passages, and so do all later ones.
            chunks = np.arange(((offsets + ends) // self.chunk_size).max())
            reads = (chunks >= ((offsets + np.array(starts)) // self.chunk_size - 1)[:, None])[:, :, None, None]
            batch["neighbor_input_ids"] = np.where(reads, ids[:, None], 0)
            batch["neighbor_attention_mask"] = np.where(reads, mask[:, None], 0)
            batch["chunk_offset"] = offsets
            batch["neighbor_chunk_size"] = np.full(len(examples), self.chunk_size)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _drawn(self, examples: Sequence[Mapping[str, Any]]) -> list[list[list[int]]]:
        """The passages of each question, best first; some replaced by those of another question, or by none."""
        passages = [lists_of_ids(example, _PASSAGES_COLUMN) for example in examples]
        if not self.random_passage_probability and not self.no_passage_probability:
            return passages
        prompts = [np.asarray(example[_PROMPT_COLUMN], dtype=np.int64) for example in examples]
        generator = generator_for(self.seed, np.concatenate(prompts))
        # As in `RetroDataCollator`: one draw, whose two ends are the two events.
        for row, draw in enumerate(generator.random(len(passages))):
            if draw < self.random_passage_probability and self.random_passages is not None:
                other = self.random_passages[int(generator.integers(len(self.random_passages)))]
                passages[row] = other[_PASSAGES_COLUMN]
            elif draw >= 1 - self.no_passage_probability:
                passages[row] = []
        return passages


def _of_one_shape(passages: Sequence[Sequence[Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of shape `(batch_size, most passages, longest passage)`, each at least 1."""
    most = max(1, *map(len, passages))
    longest = max(1, *(len(passage) for read in passages for passage in read), 1)
    rows = [passage for read in passages for passage in [*read, *[[]] * (most - len(read))]]
    ids, mask = (part.reshape(len(passages), most, longest) for part in padded(rows, longest))
    return ids, mask


def check_same_tokenizer(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that tokenized questions were made with this tokenizer; otherwise all answers would be silently wrong.

    Raises:
        DatasetError: if none of the first questions is found in its decoded prompt.
    """
    check_tokenizer(tokenizer, DatasetError)
    if "question" not in dataset.column_names:
        return
    first = dataset.select_columns(["question", _PROMPT_COLUMN])[:8]
    for row, (question, ids) in enumerate(zip(first["question"], first[_PROMPT_COLUMN], strict=True)):
        ids = token_ids({_PROMPT_COLUMN: ids}, _PROMPT_COLUMN)
        numbers(f"The ids in {_PROMPT_COLUMN!r}", ids, DatasetError, 0, (1 << 32) - 1)
        # Encoded and decoded again, because a tokenizer may not be able to spell every question.
        ((tokens,), _) = tokenize_texts(tokenizer, [checked_text(question, "question", row)])
        asked, prompt = ("".join(str(tokenizer.decode(part)).split()) for part in (tokens, ids))
        if asked and asked in prompt:
            return
    raise DatasetError(
        f"The questions were not tokenized with {tokenizer.name_or_path!r}. Pass the model's tokenizer here and to "
        "`tokenize_questions`."
    )


def check_reader(dataset: Dataset, model: Any, num_passages: int | None) -> None:
    """Check that tokenized questions were written for the reader of a model, if it is to read `num_passages` with it.

    Raises:
        DatasetError: if they were written for the other one, which reads them from another token on and in another format.
    """
    reader = None if num_passages == 0 else getattr(getattr(model, "config", None), "reader", None)
    made_for = "parallel_context" if _START_COLUMN in dataset.column_names else "cross_attention"
    if reader is not None and traits_of(reader).reads_question != traits_of(made_for).reads_question:
        raise DatasetError(
            f"The questions were tokenized for reader='{made_for}', but the model has reader='{reader}'. Tokenize them again: "
            "`tokenize_questions(..., reader=model.config.reader)`."
        )


def _first_answer(answers: Any, row: int) -> str:
    """The first right answer that is not empty."""
    if answers is not None and not isinstance(answers, (list, tuple)):
        raise DatasetError(
            f"The answers in row {row} are {textwrap.shorten(repr(answers), 100)}, but they must be a list of texts. Convert "
            "them: `dataset.map(lambda row: {'answers': [row['answers']]})`, or in the format of SQuAD `dataset.map(lambda "
            "row: {'answers': row['answers']['text']})`."
        )
    found = (answer for answer in answers or [] if not isinstance(answer, str) or answer.strip())
    return checked_text(next(found, None), "answer", row)


def _rest(whole: list[int], start: list[int], row: int) -> list[int]:
    if whole[: len(start)] != start:
        raise DatasetError(
            f"In row {row} the boundary between prompt and answer falls inside a token. Use a `prompt` that ends with a sign "
            "such as ':', and without white space."
        )
    return whole[len(start) :]


def _passages(value: Any, row: int, reader: str) -> list[str]:
    """The passages of a row as the reader reads them, without empty ones."""
    given = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    parts = [passage if isinstance(passage, Mapping) else {"text": passage} for passage in given]
    if isinstance(value, (str, Mapping)) or not all(
        isinstance(part.get("text"), str) and isinstance(part.get("title") or "", str) for part in parts
    ):
        raise DatasetError(
            f"The passages in row {row} are {textwrap.shorten(repr(value), 100)}, but they must be a list of texts, or of dicts "
            "with `text` and optionally `title`."
        )
    return [write_passage(reader, part.get("title") or "", part["text"]) for part in parts if part["text"].strip()]
