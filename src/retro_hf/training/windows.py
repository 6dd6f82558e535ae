"""Documents cut into training windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import extras
from ..errors import DatasetError


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["ID_COLUMN", "START_COLUMN", "tokenize_documents"]

ID_COLUMN = "document_id"
START_COLUMN = "window_start"


def tokenize_documents(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, chunk_size: int
) -> Dataset:
    """Tokenize documents as a datastore does, and cut each into windows that begin at a chunk border.

    The windows of a document follow each other without overlap, and the last one may be short. No window has tokens of two
    documents, so only its own document must be excluded from the search. Documents without text are left out, and so is a
    last window of a single token, because nothing predicts it.

    Args:
        dataset (`datasets.Dataset`): one document per row, its text in the column `text`. The column `id` has the ids of
            the documents in the datastore. Without it the row number is the id, as in a datastore built from this dataset.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the language model's tokenizer.
        max_length (`int`): tokens per window, a multiple of `chunk_size`.
        chunk_size (`int`): tokens per chunk; m in the paper.
    Returns:
        `datasets.Dataset` with the columns `input_ids`, `document_id` and `window_start` (the position in the document of
        the window's first token).
    Raises:
        DatasetError: if there is no column `text`, or `max_length` is not a multiple of `chunk_size`.
    """
    if chunk_size < 1 or max_length < 2 or max_length % chunk_size:
        raise DatasetError(
            f"max_length={max_length} is not a multiple of chunk_size={chunk_size}. Use "
            f"{max(1, max_length // max(chunk_size, 1)) * max(chunk_size, 1)}, so that every window begins at a chunk border."
        )
    if "text" not in dataset.column_names:
        raise DatasetError(
            f"The dataset has no column 'text', only {dataset.column_names}. Rename the column that has the text: "
            "`dataset.rename_column(..., 'text')`."
        )

    def cut(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        windows: dict[str, list[Any]] = {"input_ids": [], ID_COLUMN: [], START_COLUMN: []}
        texts = [text or "" for text in batch["text"]]
        encoded = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        for text, tokens, document_id in zip(texts, encoded["input_ids"], batch.get("id", numbers), strict=True):
            # A datastore skips documents of white space, too.
            for start in range(0, len(tokens) - 1 if text.strip() else 0, max_length):
                windows["input_ids"].append(tokens[start : start + max_length])
                windows[ID_COLUMN].append(str(document_id))
                windows[START_COLUMN].append(start)
        return windows

    datasets = extras.load("datasets", "Training")
    token_ids, text, position = (datasets.Value(kind) for kind in ("int32", "string", "int64"))
    return dataset.map(
        cut,
        batched=True,
        batch_size=256,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=datasets.Features({"input_ids": datasets.List(token_ids), ID_COLUMN: text, START_COLUMN: position}),
        desc="Tokenizing documents",
    )
