"""Question answering as in section 4.3 of the paper: questions, answers and passages in, training batches out."""

from __future__ import annotations

import copy
import hashlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import logging

from .. import extras
from ..errors import DatasetError
from .collator import checked_shares, padding_id
from .exclusion import flattened


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED_LABEL",
    "PROMPT",
    "QuestionCollator",
    "check_columns",
    "check_same_tokenizer",
    "checked_text",
    "list_lengths",
    "tokenize_questions",
]

logger = logging.get_logger(__name__)

PROMPT = "question: {question} \n answer:"
"""What the paper writes before an answer."""
PASSAGE = "title: {title}, source: {text}"

IGNORED_LABEL = -100

_PROMPT_COLUMN = "prompt_input_ids"
_ANSWER_COLUMN = "answer_input_ids"
_PASSAGES_COLUMN = "passage_input_ids"

_COMPARED_QUESTIONS = 8


def tokenize_questions(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    neighbor_size: int,
    num_passages: int | None = None,
    prompt: str = PROMPT,
    target_column: str | None = None,
    with_answers: bool = True,
    max_length: int | None = None,
    batch_size: int = 256,
) -> Dataset:
    r"""Tokenize questions, the answer to learn, and the passages to read, in the paper's format (section 4.3).

    The decoder reads `"question: {question} \n answer:"` and learns to go on with `" {answer}"` and the end token; a neighbor
    is `"title: {title}, source: {text}"`. White space is made single. Passages are tokenized here, as text, so
    they may come from a datastore with another tokenizer than the model's, or from no datastore at all.

    Args:
        dataset (`datasets.Dataset`): one question per row. `question`: a text. `answers`: a list of texts that count as
            right; the first one is learned. `passages`: a list, best first, of dicts with `text` and perhaps `title`, or
            of texts; it may be empty. [`retrieve_passages`] makes that column.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the language model.
        neighbor_size (`int`): tokens of a passage at most, `model.config.neighbor_size`; what is longer is cut.
        num_passages (`int`, *optional*): passages to keep per question; all by default. With 0, closed book, there need
            not be any.
        prompt (`str`): another format of the question; the answer follows after a space.
        target_column (`str`, *optional*): column with the answer to learn instead of the first.
        with_answers (`bool`, defaults to `True`): False for questions whose answers are not known, to be answered only.
        max_length (`int`, *optional*): tokens that the decoder has room for; longer questions are an error. Leave room
            for `neighbor_size` more per passage that is to stand in the prompt.
        batch_size (`int`, defaults to 256): questions per call of the tokenizer.
    Returns:
        `datasets.Dataset`: the same rows, without `passages`, and with `prompt_input_ids`, `answer_input_ids` (end token
        included) and `passage_input_ids` (a list per passage).
    Raises:
        DatasetError: naming the row, for empty questions, questions without an answer, and questions that are too long;
            for missing columns; for a tokenizer without an end token.
    *Disk*: 4 bytes per token, at most `4 * num_passages * neighbor_size` per question.
    """
    wanted = [
        "question",
        *([target_column or "answers"] if with_answers else []),
        *(["passages"] if num_passages != 0 else []),
    ]
    check_columns(dataset, wanted)
    _check_format(tokenizer, prompt, neighbor_size)

    def encode(texts: list[str]) -> list[list[int]]:
        return (
            tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"] if texts else []
        )

    def convert(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        questions = [
            checked_text(text, "question", number) for text, number in zip(batch["question"], numbers, strict=True)
        ]
        prompts = [prompt.replace("{question}", question) for question in questions]
        columns: dict[str, list[Any]] = {_PROMPT_COLUMN: encode(prompts)}
        answers: list[list[int]] = [[] for _ in prompts]
        if with_answers:
            source = batch[target_column or "answers"]
            if target_column is None:
                source = [_first(given, number) for given, number in zip(source, numbers, strict=True)]
            targets = [checked_text(text, "answer", number) for text, number in zip(source, numbers, strict=True)]
            # Together, so that the answer is cut into tokens as text that follows the prompt.
            both = encode([f"{start} {target}" for start, target in zip(prompts, targets, strict=True)])
            answers = [
                _rest(whole, start, number) + [tokenizer.eos_token_id]
                for whole, start, number in zip(both, columns[_PROMPT_COLUMN], numbers, strict=True)
            ]
            columns[_ANSWER_COLUMN] = answers
        for start, answer, number in zip(columns[_PROMPT_COLUMN], answers, numbers, strict=True):
            if max_length is not None and len(start) + len(answer) > max_length:
                raise DatasetError(
                    f"Question {number} has {len(start) + len(answer)} tokens with its answer, but max_length={max_length}. "
                    "Shorten it, or leave it out with `dataset.filter`."
                )
        given = batch["passages"] if num_passages != 0 else [[] for _ in prompts]
        texts = [_passages(row, number)[:num_passages] for row, number in zip(given, numbers, strict=True)]
        tokens = iter(encode([text for row in texts for text in row]))
        columns[_PASSAGES_COLUMN] = [[next(tokens)[:neighbor_size] for _ in row] for row in texts]
        return columns

    dropped = [name for name in ("passages",) if name in dataset.column_names]
    features = dataset.features.copy()
    for name in dropped:
        del features[name]
    datasets = extras.load("datasets", "Training on questions")
    token_ids = datasets.List(datasets.Value("int32"))
    features.update({_PROMPT_COLUMN: token_ids, _PASSAGES_COLUMN: datasets.List(token_ids)})
    if with_answers:
        features[_ANSWER_COLUMN] = token_ids
    result = dataset.map(
        convert,
        batched=True,
        batch_size=batch_size,
        with_indices=True,
        remove_columns=dropped,
        features=features,
        desc="Tokenizing questions",
    )
    if num_passages != 0 and not list_lengths(result, _PASSAGES_COLUMN).any():
        logger.warning(
            f"None of the {len(result)} questions has a passage, so the backbone answers alone. Look passages up with "
            "`retrieve_passages(dataset, retriever)`, or say `num_passages=0`."
        )
    return result


class QuestionCollator:
    """Makes batches of tokenized questions for training, evaluation and generation alike.

    Rows are `[padding, prompt][answer, padding]`: all answers begin in the same column, so the columns before it are the
    left-padded batch that `generate` wants. `chunk_offset` makes every prompt end a chunk without spending pad tokens. That
    chunk has the passages as its neighbors, which its last token (of "answer:") and the answer read; a longer answer reads
    the same ones in the chunks that follow. Earlier chunks, of questions longer than a chunk, read nothing.

    A model that only ever saw good passages trusts bad ones. Both probabilities replace the passages of some questions in
    training; [`QuestionTrainer`] leaves them out when it evaluates.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the language model.
        chunk_size (`int`): `model.config.chunk_size`.
        num_passages (`int`, *optional*): passages to read, k in the paper; all that the dataset has by default. With 0 the
            batch has no retrieval in it, and any causal language model takes it.
        passages_in_prompt (`int`, defaults to 0): passages that the decoder itself reads before the question: 1 is RETRO++
            (Wang et al., 2023). The encoder reads them, too.
        random_passage_probability (`float`, defaults to 0.0): share of questions that get the passages of another question.
        no_passage_probability (`float`, defaults to 0.0): share of questions that get none.
        random_passages (`datasets.Dataset`, *optional*): tokenized questions whose passages are drawn as random ones, such
            as the training set itself.
        seed (`int`, defaults to 0): of these draws.
    Inputs of a call:
        examples from [`tokenize_questions`]; columns that are not needed are ignored.
    Returns of a call:
        `input_ids`, `attention_mask`, `position_ids` and, where answers are known, `labels` of shape
        `(batch_size, sequence_length)`, labels -100 except at answers and their end tokens. Unless `num_passages=0`,
        `neighbor_input_ids` and `neighbor_attention_mask` of shape `(batch_size, num_chunks, num_passages, longest passage)`,
        missing passages masked, and `chunk_offset` and `neighbor_chunk_size` of shape `(batch_size,)`. All int64.
    Raises:
        DatasetError: for examples that are not tokenized, or lack passages.
    *Determinism*: the draws depend on the seed, on the questions of the batch and on the epoch set by [`set_epoch`], as
    those of [`RetroDataCollator`] do.
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
        for name, value, least in (
            ("chunk_size", chunk_size, 1),
            ("num_passages", num_passages, 0),
            ("passages_in_prompt", passages_in_prompt, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, but it must be at least {least}.")
        shares = checked_shares(
            random_passage_probability=random_passage_probability, no_passage_probability=no_passage_probability
        )
        if random_passage_probability and not random_passages:
            raise DatasetError(
                f"random_passage_probability={random_passage_probability} needs questions to take passages from: pass "
                "`random_passages=`, such as the tokenized training set."
            )
        self.chunk_size = chunk_size
        self.num_passages = num_passages
        self.passages_in_prompt = passages_in_prompt
        self.random_passage_probability, self.no_passage_probability = shares
        self.random_passages = random_passages
        self.seed = seed
        self.epoch = 0
        self.pad_token_id = padding_id(tokenizer)
        self._separator = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def set_epoch(self, epoch: int) -> None:
        """Draw other random passages for the same batch; needed only where batches repeat."""
        self.epoch = epoch

    def for_evaluation(self) -> QuestionCollator:
        """The same, but every question gets its own passages."""
        other = copy.copy(self)
        other.random_passage_probability = other.no_passage_probability = 0.0
        return other

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make one batch; see the class."""
        needs_passages = self.num_passages != 0 or self.passages_in_prompt > 0
        for name in [_PROMPT_COLUMN, *([_PASSAGES_COLUMN] if needs_passages else [])]:
            if name not in examples[0]:
                raise DatasetError(
                    f"The examples have no column {name!r}, only {sorted(examples[0])}. Make it with "
                    "`tokenize_questions(dataset, tokenizer, ...)`; if the dataset has it, Trainer dropped it: set "
                    "`TrainingArguments(remove_unused_columns=False)`."
                )
        passages = self._drawn(examples) if needs_passages else [[] for _ in examples]
        prompts = [
            [token for passage in read[: self.passages_in_prompt] for token in [*passage, *self._separator]]
            + list(example[_PROMPT_COLUMN])
            for example, read in zip(examples, passages, strict=True)
        ]
        has_answers = _ANSWER_COLUMN in examples[0]
        answers = [list(example[_ANSWER_COLUMN]) if has_answers else [] for example in examples]
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
            # Left to themselves, models count padding on the left when they are not generating.
            "position_ids": np.maximum(attention_mask.cumsum(axis=1) - 1, 0),
            **({"labels": labels} if has_answers else {}),
        }
        if self.num_passages != 0:
            lengths = np.array([len(prompt) for prompt in prompts])
            ends = lengths + np.array([len(answer) for answer in answers])
            offsets = -lengths % self.chunk_size
            ids, mask = self._padded([read[: self.num_passages] for read in passages])
            # The chunk that the prompt ends, and those that the answer completes.
            chunks = np.arange(((offsets + ends) // self.chunk_size).max())
            reads = (chunks >= ((offsets + lengths) // self.chunk_size - 1)[:, None])[:, :, None, None]
            batch["neighbor_input_ids"] = np.where(reads, ids[:, None], 0)
            batch["neighbor_attention_mask"] = np.where(reads, mask[:, None], 0)
            batch["chunk_offset"] = offsets
            batch["neighbor_chunk_size"] = np.full(len(examples), self.chunk_size)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _drawn(self, examples: Sequence[Mapping[str, Any]]) -> list[list[list[int]]]:
        """The passages of each question, best first; some replaced by those of another question, or by none."""
        passages = [example[_PASSAGES_COLUMN] for example in examples]
        if not self.random_passage_probability and not self.no_passage_probability:
            return passages
        content = np.concatenate([np.asarray(example[_PROMPT_COLUMN], dtype=np.int64) for example in examples])
        digest = hashlib.blake2b(content.tobytes(), digest_size=8).digest()
        generator = np.random.default_rng([self.seed, self.epoch, int.from_bytes(digest, "little")])
        for row, draw in enumerate(generator.random(len(passages))):
            if draw < self.random_passage_probability and self.random_passages is not None:
                other = self.random_passages[int(generator.integers(len(self.random_passages)))]
                passages[row] = other[_PASSAGES_COLUMN]
            elif draw >= 1 - self.no_passage_probability:
                passages[row] = []
        return passages

    def _padded(self, passages: Sequence[Sequence[Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of shape `(batch_size, most passages, longest passage)`, of at least one token."""
        most = max(1, *map(len, passages))
        longest = max(1, *(len(passage) for read in passages for passage in read), 1)
        ids = np.zeros((len(passages), most, longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, read in enumerate(passages):
            for place, passage in enumerate(read):
                ids[row, place, : len(passage)] = passage
                mask[row, place, : len(passage)] = 1
        return ids, mask


def check_columns(dataset: Dataset, names: Sequence[str]) -> None:
    """Check that a dataset of questions has what is needed.

    Raises:
        DatasetError: for another type, and for the first column that is missing.
    """
    if not isinstance(dataset, extras.load("datasets", "Training on questions").Dataset):
        raise DatasetError(
            f"The dataset is of type {type(dataset).__name__}, not datasets.Dataset. Of a DatasetDict pass one split; "
            "from a list make one with `Dataset.from_list(...)`."
        )
    remedies = {
        "passages": "Look them up with `retrieve_passages(dataset, retriever)`, or work without any: `num_passages=0`",
        _PROMPT_COLUMN: "Make it with `tokenize_questions(dataset, tokenizer, neighbor_size=...)`",
        "answers": "A row holds a list of texts; for questions that are only to be answered, `with_answers=False`",
    }
    for name in names:
        if name not in dataset.column_names:
            remedy = remedies.get(name, f"Rename the one that holds it: `dataset.rename_column(..., {name!r})`")
            raise DatasetError(f"The dataset has no column {name!r}, only {dataset.column_names}. {remedy}.")


def check_same_tokenizer(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that tokenized questions can be read with a tokenizer; with another, answers would be wrong without a word.

    Raises:
        DatasetError: if the tokens of the first questions stand for other text.
    """
    if "question" not in dataset.column_names:
        return

    def spelled(ids: list[int]) -> str:
        return "".join(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).split())

    first = dataset.select_columns(["question", _PROMPT_COLUMN])[:_COMPARED_QUESTIONS]
    for question, ids in zip(first["question"], first[_PROMPT_COLUMN], strict=True):
        # What a tokenizer cannot spell it cannot spell here either.
        text = spelled(tokenizer(" ".join(question.split()), add_special_tokens=False)["input_ids"])
        if text and text in spelled(ids):
            return
    if len(dataset):
        raise DatasetError(
            f"The questions were made with another tokenizer than {tokenizer.name_or_path!r}, in which the first one reads "
            f"{textwrap.shorten(repr(tokenizer.decode(first[_PROMPT_COLUMN][0])), 100)}. Pass the tokenizer of the model, here and to "
            "`tokenize_questions`."
        )


def _check_format(tokenizer: PreTrainedTokenizerBase, prompt: str, neighbor_size: int) -> None:
    if "{question}" not in prompt:
        raise DatasetError(f"The prompt {prompt!r} has no place for the question: write it as {{question}}.")
    if neighbor_size < 1:
        raise ValueError(f"neighbor_size is {neighbor_size}, but a passage has at least 1 token.")
    if tokenizer.eos_token_id is None:
        raise DatasetError(
            "The tokenizer has no end token, by which a model says that an answer is complete. Set one of its tokens: "
            "`tokenizer.eos_token = ...`."
        )


def list_lengths(dataset: Dataset, name: str) -> np.ndarray:
    """The lengths of the lists in a column, int64 of shape `(num_rows,)`, without making lists of them."""
    return flattened(dataset.select_columns([name]).with_format("arrow")[:][name])[1]


def checked_text(value: Any, name: str, number: int) -> str:
    """A text with single white space.

    Raises:
        DatasetError: naming the row, for what is no text or an empty one.
    """
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text:
        raise DatasetError(
            f"The {name} in row {number} is {value!r}, but it must be a text that is not empty. Leave such rows out with "
            "`dataset.filter`."
        )
    return text


def _first(answers: Any, number: int) -> Any:
    """The first right answer that says something."""
    if answers is not None and not isinstance(answers, (list, tuple)):
        raise DatasetError(
            f"The answers in row {number} are {textwrap.shorten(repr(answers), 100)}, but they must be a list of texts. Of one "
            "text: `dataset.map(lambda row: {'answers': [row['answers']]})`; of the format of SQuAD: `dataset.map(lambda row: "
            "{'answers': row['answers']['text']})`."
        )
    return next((answer for answer in answers or [] if not isinstance(answer, str) or answer.strip()), None)


def _rest(whole: list[int], start: list[int], number: int) -> list[int]:
    if whole[: len(start)] != start:
        raise DatasetError(
            f"The tokenizer joins the end of the prompt and the beginning of the answer in row {number}, so that no token "
            "border lies between them. Use a `prompt` that ends with a sign such as ':', and without white space."
        )
    return whole[len(start) :]


def _passages(value: Any, number: int) -> list[str]:
    """The passages of a row as the encoder reads them; empty ones say nothing and are left out."""
    given = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    parts = [passage if isinstance(passage, Mapping) else {"text": passage} for passage in given]
    if isinstance(value, (str, Mapping)) or not all(
        isinstance(part.get("text"), str) and isinstance(part.get("title") or "", str) for part in parts
    ):
        raise DatasetError(
            f"The passages in row {number} are {textwrap.shorten(repr(value), 100)}, but they must be a list of dicts with "
            "`text` and perhaps `title`, or a list of texts."
        )
    texts = [
        PASSAGE.format(title=part.get("title") or "", text=part["text"]) for part in parts if part["text"].strip()
    ]
    return [" ".join(text.split()) for text in texts]
