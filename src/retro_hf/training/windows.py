"""Documents cut into training windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .. import extras
from ..arguments import whole
from ..datastore.bos_eos import Borders
from ..datastore.compatibility import tokenizer_record
from ..datastore.documents import Document, DocumentReader, as_document
from ..errors import DatasetError
from ..special_tokens import tokenize_texts


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict
    from transformers import PreTrainedTokenizerBase

ID_COLUMN = "document_id"
START_COLUMN = "window_start"
TOKENIZER_COLUMN = "window_tokenizer"
_BATCH_DOCUMENTS = 256


def tokenize_documents(
    documents: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chunk_size: int,
    add_bos: bool | None = None,
    add_eos: bool | None = None,
    encoding: str | None = None,
    split: str | None = None,
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Tokenize documents as a datastore does, and cut each into windows.

    The windows of a document follow each other without overlap, and the last one may be short. No window has tokens of two
    documents, so only its own document must be excluded from the search. Documents without text are left out, and so is a
    last window of a single token, because nothing predicts it.

    A document begins with the begin-of-text token if the tokenizer puts one before a prompt, so that the model sees in
    training what it sees when it generates, and it ends with the end-of-text token if the tokenizer has one, so that the model
    learns to end. Without a begin token, every window begins at a chunk border of the stored document.

    Args:
        documents: what [`RetroDatastore.build`] takes: a list or another iterable of texts or dicts, the path of a file or a
            folder, a `datasets.Dataset` or `IterableDataset` with a column `text`; or a `DatasetDict`. Ids are those of a
            datastore built from the same documents: the field `id`, or the position where it is missing.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the language model's tokenizer.
        max_length (`int`): tokens per window, a multiple of `chunk_size`.
        chunk_size (`int`): tokens per chunk; m in the paper.
        add_bos (`bool`, *optional*): whether a document begins with the begin-of-text token; by default as a prompt does.
        add_eos (`bool`, *optional*): whether a document ends with the end-of-text token; by default if there is one.
        encoding, split (`str`, *optional*): as for [`RetroDatastore.build`].
    Returns:
        With the columns `input_ids`, `document_id`, `window_start` (the position in the document, without the begin token,
        of the window's first token) and `window_tokenizer` (its fingerprint, by which ids of another are found): a `datasets.Dataset`; a dict of them for a `DatasetDict`; an `IterableDataset`, which
        tokenizes while it is read, for an `IterableDataset`.
    Raises:
        DatasetError: if there is no column `text`, or `max_length` is not a multiple of `chunk_size`, or the tokenizer has no
            token that is asked for.
        DatastoreInputError: for a document that is invalid.
    """
    chunk_size, max_length = (
        whole("chunk_size", chunk_size, DatasetError),
        whole("max_length", max_length, DatasetError, least=0),
    )
    if max_length < 2 or max_length % chunk_size:
        raise DatasetError(
            f"max_length={max_length} is not a multiple of chunk_size={chunk_size}. Use "
            f"{max(1, max_length // max(chunk_size, 1)) * max(chunk_size, 1)}, so that every window begins at a chunk border."
        )
    datasets = extras.load("datasets", "Training")
    cutter = _Cutter(tokenizer, max_length, Borders.of(tokenizer, add_bos, add_eos))
    options: dict[str, Any] = {"add_bos": add_bos, "add_eos": add_eos, "encoding": encoding, "split": split}
    if isinstance(documents, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        options |= {"max_length": max_length, "chunk_size": chunk_size}
        parts = {name: tokenize_documents(part, tokenizer, **options) for name, part in documents.items()}
        return type(documents)(parts)
    if not isinstance(documents, (datasets.Dataset, datasets.IterableDataset)) or split is not None:
        return datasets.Dataset(cutter.table(DocumentReader(documents, encoding=encoding, split=split)))
    columns = documents.column_names or list(next(iter(documents), {}))  # a stream may not know its columns
    if "text" not in columns:
        raise DatasetError(
            f"The dataset has no column 'text', only {columns}. Rename the column that has the text: "
            "`dataset.rename_column(..., 'text')`."
        )
    progress = {"desc": "Tokenizing documents"} if isinstance(documents, datasets.Dataset) else {}
    return documents.with_format(None).map(
        cutter,
        batched=True,
        batch_size=_BATCH_DOCUMENTS,
        with_indices=True,
        remove_columns=columns,
        features=cutter.features(),
        **progress,
    )


class _Cutter:
    """Cuts documents into windows: a batch of a dataset when it is called, or all of an input as one table."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, borders: Borders) -> None:
        self.tokenizer, self.max_length, self.borders = tokenizer, max_length, borders
        self.record = tokenizer_record(tokenizer)

    def features(self) -> Features:
        """The columns of the windows."""
        datasets = extras.load("datasets", "Training")
        token_ids, text, position = (datasets.Value(kind) for kind in ("int32", "string", "int64"))
        return datasets.Features(
            {"input_ids": datasets.List(token_ids), ID_COLUMN: text, START_COLUMN: position, TOKENIZER_COLUMN: text}
        )

    def __call__(self, batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        """The windows of the documents of a batch."""
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        read = (as_document(row, f"Row {n}", {"id": str(n)}) for row, n in zip(rows, numbers, strict=True))
        windows: dict[str, list[Any]] = {"input_ids": [], ID_COLUMN: [], START_COLUMN: []}
        for tokens, id, start in self._windows([document for document in read if document is not None]):
            windows["input_ids"].append(tokens)
            windows[ID_COLUMN].append(id)
            windows[START_COLUMN].append(start)
        return windows | {TOKENIZER_COLUMN: [self.record] * len(windows["input_ids"])}

    def table(self, reader: DocumentReader) -> pa.Table:
        """The windows of all documents, in memory."""
        schema = self.features().arrow_schema
        parts = []
        batch: list[Document] = []
        for document in reader:
            batch.append(document)
            if len(batch) == _BATCH_DOCUMENTS:
                parts.append(self._part(batch, schema))
                batch = []
        parts.append(self._part(batch, schema))
        reader.warn_of_repairs()
        return pa.concat_tables(parts)

    def _part(self, documents: list[Document], schema: pa.Schema) -> pa.Table:
        windows = list(self._windows(documents))
        ends = np.cumsum([0, *(len(tokens) for tokens, _, _ in windows)], dtype=np.int32)
        values = np.concatenate([np.empty(0, dtype=np.int32), *(tokens for tokens, _, _ in windows)]).astype(np.int32)
        columns = [
            pa.ListArray.from_arrays(ends, values),
            [id for _, id, _ in windows],
            [at for _, _, at in windows],
            [self.record] * len(windows),
        ]
        return pa.table(dict(zip(schema.names, columns, strict=True))).cast(schema)

    def _windows(self, documents: Iterable[Document]) -> Iterator[tuple[list[int], str, int]]:
        documents = list(documents)
        if not documents:
            return
        ids, _ = tokenize_texts(self.tokenizer, [document.text for document in documents])
        for document, text_ids in zip(documents, ids, strict=True):
            tokens = self.borders.around(text_ids) if text_ids else []
            # Up to `len - 1`: a last window of one token would have nothing to predict. With 9 tokens and windows of 4 they begin
            # at 0 and 4, and the ninth token is left out.
            for start in range(0, len(tokens) - 1, self.max_length):
                # Positions are those of the stored document, which has no begin token.
                place = max(0, start - len(self.borders.begin))
                yield tokens[start : start + self.max_length], document.id, place
