"""Passages for questions: each question is looked up in a datastore."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import extras
from ..datastore import RetroDatastore, chunk_texts
from ..datastore.documents import without_lone_surrogates
from ..errors import DatasetError
from ..retriever import RetroRetriever
from .columns import check_columns, checked_text
from .search import search_digest


if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["retrieve_passages"]


def retrieve_passages(
    dataset: Dataset, retriever: RetroRetriever, *, num_passages: int = 20, batch_size: int = 256
) -> Dataset:
    """Look every question up, and add the results as a column `passages`.

    A passage is a chunk that was found and what follows it in its document, `neighbor_size` tokens of the datastore. If the
    document ends sooner, the passage begins earlier, so that a short document is read whole. A chunk that an earlier
    passage of the same question contains is skipped; for this, twice as many chunks as wanted are looked up.

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
    if num_passages < 1:
        raise ValueError(f"num_passages is {num_passages}, but it must be at least 1.")
    datastore = retriever.datastore

    def find(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        questions = [
            without_lone_surrogates(checked_text(text, "question", number))
            for text, number in zip(batch["question"], numbers, strict=True)
        ]
        starts = _starts(datastore, retriever.searcher.search(questions, 2 * num_passages)[1], num_passages)
        documents = datastore.document_of(starts)
        # In order, so that each group of the documents' file is read once.
        stored = [number for number in np.unique(documents).tolist() if number >= 0]
        titles = {number: datastore.document(number)["title"] for number in stored}
        known = starts >= 0
        texts = iter(chunk_texts(datastore.tokenizer, *(values[known] for values in datastore.gather(starts))))
        passages = [[(titles[number], next(texts)) for number in row if number >= 0] for row in documents.tolist()]
        # A chunk border within a character leaves U+FFFD.
        return {
            "passages": [
                [{"title": title, "text": text.strip("\ufffd").strip()} for title, text in row] for row in passages
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


def _starts(datastore: RetroDatastore, chunk_ids: np.ndarray, num_passages: int) -> np.ndarray:
    """The chunks that passages begin with, int64 of shape `(num_questions, num_passages)`, -1 for none.

    Args:
        chunk_ids (`np.ndarray` of int64 and shape `(num_questions, any)`): chunks that were found, best first.
    """
    first = datastore.first_chunks(np.maximum(datastore.document_of(chunk_ids), 0))
    room = datastore.neighbor_size - datastore.gather(chunk_ids)[1].sum(axis=-1)
    begins = np.maximum(first, chunk_ids - room // datastore.chunk_size)
    width = datastore.neighbor_size // datastore.chunk_size
    starts = np.full((len(chunk_ids), num_passages), -1, dtype=np.int64)
    for row, (found, moved) in enumerate(zip(chunk_ids.tolist(), begins.tolist(), strict=True)):
        kept: list[int] = []
        for chunk, begin in zip(found, moved, strict=True):
            if chunk >= 0 and not any(start <= chunk < start + width for start in kept):
                kept.append(begin)
        starts[row, : len(kept[:num_passages])] = kept[:num_passages]
    return starts
