"""Passages for questions: each question is looked up in a datastore."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import extras
from ..arguments import whole
from ..errors import DatasetError
from ..passages import find_passages
from ..retriever import RetroRetriever
from .columns import check_columns, checked_text
from .search import search_digest


if TYPE_CHECKING:
    from datasets import Dataset


def retrieve_passages(
    dataset: Dataset, retriever: RetroRetriever, *, num_passages: int = 20, batch_size: int = 256
) -> Dataset:
    """Look every question up, and add the results as a column `passages`.

    [`find_passages`] says what a passage is.

    Args:
        dataset (`datasets.Dataset`): with a column `question`.
        retriever ([`RetroRetriever`]): where to look.
        num_passages (`int`, defaults to 20): passages per question; k in the paper.
        batch_size (`int`, defaults to 256): questions per search.
    Returns:
        `datasets.Dataset`: the same rows with `passages`, for each a list of at most `num_passages` dicts with `title` and
        `text`, best first, for [`tokenize_questions`].
    Raises:
        DatasetError: if a question is missing or empty, the dataset already has passages, or the retriever is not a
            `RetroRetriever`.
    *Determinism*: the same dataset, datastore and batch size give the same column. `datasets` keeps the result of a
    dataset on disk, and finds it again.
    """
    check_columns(dataset, ["question"])
    if "passages" in dataset.column_names:
        raise DatasetError(
            "The dataset already has a column 'passages'. Use it, or drop it first: `dataset.remove_columns('passages')`."
        )
    if not isinstance(retriever, RetroRetriever):
        raise DatasetError(f"retrieve_passages needs a RetroRetriever, but got a {type(retriever).__name__}.")
    num_passages = whole("num_passages", num_passages, ValueError)
    batch_size = whole("batch_size", batch_size, ValueError, most=1 << 32)

    def find(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        questions = [
            checked_text(text, "question", number) for text, number in zip(batch["question"], numbers, strict=True)
        ]
        return {
            "passages": [
                [{"title": passage.title, "text": passage.text} for passage in found]
                for found in find_passages(retriever, questions, num_passages)
            ]
        }

    features = dataset.features.copy()
    datasets = extras.load("datasets", "Training")
    text = datasets.Value("string")
    features["passages"] = datasets.List({"title": text, "text": text})
    return dataset.map(
        find,
        batched=True,
        batch_size=batch_size,
        with_indices=True,
        features=features,
        # The fingerprint that `datasets` would make hashes the pickled retriever, which only knows paths.
        new_fingerprint=search_digest(retriever, dataset._fingerprint, num_passages, batch_size),
        desc="Retrieving passages",
    )
