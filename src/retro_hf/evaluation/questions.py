"""Exact match and F1 of answers, with the question's own passages, those of another question, and none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import arguments, extras
from ..errors import DatasetError
from ..progress import progress_bar
from ..training.columns import check_columns, list_lengths
from ..training.question_trainer import decode_answers, generate_answers
from ..training.questions import QuestionCollator, check_reader, check_same_tokenizer
from .interval import Bootstrap, checked_resamples
from .neighbors import check_modes
from .scoring import check_model, evaluating


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

_MODES = ("on", "off", "random")
_MeanAndEnds = tuple[float, float, float]


@dataclass(frozen=True)
class QuestionAnswers:
    """What [`answer_questions`] found; `print` shows it as a table.

    Attributes:
        predictions (`dict[str, list[str]]`): per mode the answer to each question.
        exact_match, f1 (`dict[str, np.ndarray]` of float64 and shape `(num_questions,)`): per mode the score of each
            answer, in percent.
        num_passages (`int`): largest number of passages per question.
        intervals (`dict[str, dict[str, tuple[float, float, float]]]`): by score and mode the mean and the ends of its 95 %
            interval, from a bootstrap over questions; NaN for a single question.
        differences (`dict[str, dict[str, tuple[float, float, float]]]`): by score, for each mode but `off`, the score minus
            that of `off`, with the same questions drawn for both.
    """

    predictions: dict[str, list[str]]
    exact_match: dict[str, np.ndarray]
    f1: dict[str, np.ndarray]
    num_passages: int
    intervals: dict[str, dict[str, _MeanAndEnds]]
    differences: dict[str, dict[str, _MeanAndEnds]]

    def to_dict(self) -> dict[str, Any]:
        """The means and intervals as plain numbers, for JSON."""

        def plain(intervals: dict[str, _MeanAndEnds]) -> dict[str, dict[str, float]]:
            names = ("mean", "low", "high")
            return {mode: dict(zip(names, values, strict=True)) for mode, values in intervals.items()}

        return {
            **{score: plain(intervals) for score, intervals in self.intervals.items()},
            **{f"{score}_minus_off": plain(intervals) for score, intervals in self.differences.items()},
            "num_questions": len(next(iter(self.predictions.values()))),
            "num_passages": self.num_passages,
        }

    def __str__(self) -> str:
        lines = [f"{'passages':<8} {'EM':>6}  {'95 % interval':<14} {'F1':>6}  {'95 % interval':<14} EM minus off"]
        for mode in self.predictions:
            line = f"{mode:<8}"
            for score in ("exact_match", "f1"):
                mean, low, high = self.intervals[score][mode]
                line += f" {mean:>6.1f}  {f'[{low:.1f}, {high:.1f}]':<14}"
            if mode in self.differences["exact_match"]:
                mean, low, high = self.differences["exact_match"][mode]
                line += f" {mean:+.1f} [{low:+.1f}, {high:+.1f}]"
            lines.append(line.rstrip())
        number = len(next(iter(self.predictions.values())))
        lines.append(f"{number:,} questions, {self.num_passages} passages per question; EM and F1 in percent")
        return "\n".join(lines)


def answer_questions(
    model: PreTrainedModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_passages: int | None = None,
    passages_in_prompt: int = 0,
    modes: Sequence[str] | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    seed: int = 0,
    num_resamples: int = 2000,
    show_progress: bool | None = None,
    **options: Any,
) -> QuestionAnswers:
    """Answer questions with their passages, with none, and with those of other questions, and score the answers.

    Args:
        model ([`RetroForCausalLM`], or any causal language model for `modes=("off",)` or `num_passages=0`): put into eval
            mode while answering. A retriever attached to it is not used.
        dataset (`datasets.Dataset`): from [`tokenize_questions`], with its column `answers`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's tokenizer.
        num_passages (`int`, *optional*): passages that the encoder reads, more or fewer than in training if you like; by
            default all that the dataset has.
        passages_in_prompt (`int`, defaults to 0): passages that the decoder reads before the question; 1 is RETRO++.
        modes (`Sequence[str]`, *optional*): of `"on"` (the question's own passages), `"off"` (none, also not in the prompt)
            and `"random"` (those of another question); by default all that the dataset has passages for.
        batch_size (`int`, defaults to 8): questions per call of `generate`.
        max_new_tokens (`int`, defaults to 32): longest answer, in tokens.
        seed (`int`, defaults to 0): seed of the random passages and of the bootstrap.
        num_resamples (`int`, defaults to 2000): draws of the bootstrap.
        show_progress (`bool`, *optional*): whether to show a progress bar; by default only on a terminal.
        options: options of `generate`, such as `num_beams`; greedy by default.
    Returns:
        [`QuestionAnswers`]: answers, exact match and F1 per question, means with intervals.
    Raises:
        DatasetError: for questions that are not tokenized, were tokenized with another tokenizer, have no answers, lack
            the passages that a mode needs, or are longer than the model's context.
        MissingExtraError: without `retro-hf[qa]`.
    *Determinism*: the same arguments give the same answers; `batch_size` moves only the last bits of the logits.
    """
    check_columns(dataset, ["answers", "prompt_input_ids", "passage_input_ids"])
    batch_size = arguments.whole("batch_size", batch_size, ValueError)
    max_new_tokens = arguments.whole("max_new_tokens", max_new_tokens, ValueError)
    num_resamples, seed = checked_resamples(num_resamples, seed)
    num_passages = arguments.optional_whole("num_passages", num_passages, ValueError, least=0)
    if not len(dataset):
        raise DatasetError("There are no questions: the dataset is empty.")
    check_same_tokenizer(dataset, tokenizer)
    check_reader(dataset, model, num_passages)
    most = int(list_lengths(dataset, "passage_input_ids").max())
    modes = [mode for mode in _MODES if most or mode == "off"] if modes is None else modes
    modes = check_modes(modes, _MODES, has_neighbors=True)
    if not most and set(modes) != {"off"}:
        raise DatasetError(
            f"The modes {list(modes)} need passages, but the dataset has none. Look them up with `retrieve_passages(dataset, "
            "retriever)` before tokenizing, or answer with `modes=('off',)`."
        )
    if "random" in modes and len(dataset) == 1:
        raise DatasetError(
            "The mode 'random' needs the passages of another question, but there is only one. Leave it out."
        )
    score = _scorer()
    check_model(model)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(dataset))
    others = np.empty_like(order)
    others[order] = np.roll(order, 1)  # never the question itself

    wanted = most if num_passages is None else min(num_passages, most)
    chunk_size = getattr(model.config, "chunk_size", 1)
    reading = QuestionCollator(
        tokenizer, chunk_size=chunk_size, num_passages=wanted, passages_in_prompt=passages_in_prompt
    )
    closed = QuestionCollator(tokenizer, chunk_size=chunk_size, num_passages=0)
    # Sorted by length, because rows of similar length need little padding; the longest first, so that running out of
    # memory shows at once.
    lengths = list_lengths(dataset, "prompt_input_ids")
    batches = np.array_split(np.argsort(-lengths, kind="stable"), range(batch_size, len(lengths), batch_size))
    predictions = {mode: [""] * len(dataset) for mode in modes}
    total = len(dataset) * len(modes)
    with (
        progress_bar(show_progress, total=total, unit="question", desc="Answering") as progress,
        evaluating(model),
    ):
        for numbers in batches:
            for mode in modes:
                rows = [dataset[int(number)] for number in numbers]
                if mode == "random":
                    for row, number in zip(rows, numbers, strict=True):
                        row["passage_input_ids"] = dataset[int(others[number])]["passage_input_ids"]
                batch = (closed if mode == "off" else reading)(rows)
                answers = generate_answers(model, batch, tokenizer, max_new_tokens=max_new_tokens, **options)
                for number, answer in zip(numbers.tolist(), answers, strict=True):
                    predictions[mode][number] = answer
                progress.update(len(rows))
    scores: dict[str, dict[str, np.ndarray]] = {"exact_match": {}, "f1": {}}
    for mode, texts in predictions.items():
        scores["exact_match"][mode], scores["f1"][mode] = score(texts, dataset["answers"])

    def interval(values: np.ndarray) -> _MeanAndEnds:
        # A copy of the generator, so that the same questions are drawn for every score and mode.
        return astuple(Bootstrap(num_resamples, copy.deepcopy(generator)).interval(values, np.ones(len(values))))

    return QuestionAnswers(
        predictions=predictions,
        exact_match=scores["exact_match"],
        f1=scores["f1"],
        num_passages=max(wanted, min(passages_in_prompt, most)),
        intervals={name: {mode: interval(row) for mode, row in rows.items()} for name, rows in scores.items()},
        differences={
            name: {mode: interval(row - rows["off"]) for mode, row in rows.items() if mode != "off" and "off" in rows}
            for name, rows in scores.items()
        },
    )


def answer_metrics(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> Callable[[EvalPrediction], dict[str, float]]:
    """The `compute_metrics` of a [`QuestionTrainer`]: exact match and F1 in percent.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's tokenizer.
        dataset (`datasets.Dataset`): the tokenized evaluation set, with `answers`.
    Returns:
        `Callable`: takes generated tokens and labels, both of shape `(num_questions, any)` and -100 at padding, and returns
        `exact_match` and `f1`. It raises a DatasetError for other questions than those of `dataset`, or another order.
    Raises:
        DatasetError: for a dataset that has no answers, is not tokenized, or was tokenized with another tokenizer.
        MissingExtraError: without `retro-hf[qa]`.
    """
    check_columns(dataset, ["answers", "prompt_input_ids", "answer_input_ids"])
    check_same_tokenizer(dataset, tokenizer)
    score = _scorer()

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        given = [_rows(prediction, name) for name in ("label_ids", "predictions")]
        labels, generated = ([[token for token in row if token >= 0] for row in rows] for rows in given)
        if labels != list(dataset["answer_input_ids"]):
            raise DatasetError(
                f"The trainer evaluated {len(labels)} questions that are not the {len(dataset)} questions given to "
                "`answer_metrics`, in the same order. Give it the `eval_dataset`, and leave `train_sampling_strategy` at "
                "'random'."
            )
        answers = decode_answers(tokenizer, generated)
        exact_match, f1 = score(answers, dataset["answers"])
        return {"exact_match": float(exact_match.mean()), "f1": float(f1.mean())}

    return compute_metrics


def _rows(prediction: EvalPrediction, name: str) -> list[list[int]]:
    """Token ids of shape `(num_questions, any)` that the trainer hands over, as lists."""
    found = arguments.numbers(f"The {name}", getattr(prediction, name, None), DatasetError, -(1 << 31), 1 << 31)
    if found.ndim != 2:
        raise DatasetError(
            f"The {name} have the shape {found.shape}, but they must be (num_questions, any). Use a QuestionTrainer, whose "
            "predictions are generated tokens."
        )
    return found.tolist()


def score_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of each answer, by the rules of SQuAD (Rajpurkar et al., 2016).

    Case, punctuation, articles and white space do not count. Of several right answers the most similar one counts. F1 is
    over words.

    Args:
        predictions (`Sequence[str]`): the answers to score.
        answers (sequence of sequences of `str`): the right answers to each question, at least one.
    Returns:
        `(exact_match, f1)`, both `np.ndarray` of float64 and shape `(num_answers,)`, in percent.
    Raises:
        DatasetError: if the numbers differ, or a question has no right answer.
        MissingExtraError: without `retro-hf[qa]`.
    """
    return _scorer()(predictions, answers)


def _scorer() -> Callable[[Sequence[str], Sequence[Sequence[str]]], tuple[np.ndarray, np.ndarray]]:
    """`score_answers`, with its import done, so that a missing package shows before any work."""
    squad = extras.load("torchmetrics.functional.text", "Scoring answers").squad

    def score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        predictions = arguments.texts("Prediction", predictions, DatasetError)
        if (rights := arguments.listed(answers)) is None:
            raise DatasetError(
                f"The right answers are of type {type(answers).__name__}. Pass a list of lists of texts."
            )
        if len(predictions) != len(rights):
            raise DatasetError(f"There are {len(predictions)} predictions for {len(rights)} questions.")
        scores = np.empty((2, len(predictions)))
        for number, (prediction, right) in enumerate(zip(predictions, rights, strict=True)):
            found = arguments.listed(right)
            if not found or not all(isinstance(one, str) for one in found):
                raise DatasetError(
                    f"The right answers of question {number} are {arguments.shown(right)}, but must be a list of texts."
                )
            result = squad(
                {"id": "", "prediction_text": prediction},
                {"id": "", "answers": {"text": found, "answer_start": [0] * len(found)}},
            )
            scores[:, number] = float(result["exact_match"]), float(result["f1"])
        return scores[0], scores[1]

    return score
