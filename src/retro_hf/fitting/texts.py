"""The documents of a fit: which are held out, which are in the datastore, and windows of the others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from .. import extras
from ..datastore import RetroDatastore
from ..datastore.documents import read_texts
from ..datastore.duplicates import stored_documents
from ..errors import DatasetError, counted
from ..evaluation.leakage import Block, holders
from ..special_tokens import tokenize_texts
from ..training.windows import ID_COLUMN, tokenize_documents


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

_LEAST_HELDOUT = 2
_LARGEST_SHARE = 5  # at most one in so many documents is held out
# Characters of a token at most, on average, in any text; more windows are cut than are drawn.
_CHARACTERS, _SPARE = 8, 3


@dataclass(frozen=True)
class Texts:
    """Documents to train on and documents held out, each a dict with `id`, `title` and `text`.

    Attributes:
        train (`list[dict]`): in an order that has nothing to do with them.
        heldout (`list[dict]`): cut to one window.
        num_near (`int`): documents that are neither, because they have most of a held-out text.
    """

    train: list[dict[str, str]]
    heldout: list[dict[str, str]]
    num_near: int


def split(
    texts: Any, tokenizer: PreTrainedTokenizerBase, *, num_heldout: int, least: int, window: int, seed: int
) -> Texts:
    """Hold out some documents of at least `least` tokens, and leave out of training what is nearly one of them.

    Raises:
        DatasetError: if there are too few documents.
    """
    documents, _ = read_texts(texts)
    # An order that depends on each id alone: with more documents, most of those that were held out are held out again.
    documents.sort(key=lambda one: hashlib.sha256(f"{seed} {one['id']}".encode()).digest())
    wanted = min(num_heldout, len(documents) // _LARGEST_SHARE)
    heldout, tokens = [], []
    for document in documents if wanted else ():
        (ids,), spans = tokenize_texts(tokenizer, [document["text"]])
        ids = ids[:window]
        if len(ids) >= least and spans is not None:
            heldout.append(document | {"text": document["text"][: spans[0][len(ids) - 1][1]]})
            tokens.append(np.array(ids, dtype=np.int64))
        if len(heldout) == wanted:
            break
    if len(heldout) < _LEAST_HELDOUT:
        raise DatasetError(
            f"Of {counted(len(documents), 'document')} {len(heldout)} can be held out, but at least {_LEAST_HELDOUT} are needed: one in "
            f"{_LARGEST_SHARE} is, and it must have {least} tokens. Give more or longer texts, or divide a long one into several documents."
        )
    names = {one["id"] for one in heldout}
    rest = [one for one in documents if one["id"] not in names]
    near = set().union(*holders(tokens, _tokenized(rest, tokenizer)))
    return Texts([one for one in rest if one["id"] not in near], heldout, len(near))


def windows_of(
    documents: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    window: int,
    chunk_size: int,
    seed: int,
) -> Dataset:
    """Windows of a part of the documents that is large enough for `count` of them, in random order.

    Windows without a token that reads something are left out.

    Raises:
        DatasetError: if no document is longer than a chunk.
    """
    datasets = extras.load("datasets", "Fitting")
    # Tokenizing everything would take minutes for a large corpus of which a short training sees a part.
    room, taken = _SPARE * count * window * _CHARACTERS, 0
    while taken < len(documents) and room > 0:
        room -= len(documents[taken]["text"])
        taken += 1
    rows = [{"id": one["id"], "text": one["text"]} for one in documents[:taken]]
    cut = tokenize_documents(datasets.Dataset.from_list(rows), tokenizer, max_length=window, chunk_size=chunk_size)
    long = [number for number, ids in enumerate(cut["input_ids"]) if len(ids) > chunk_size]
    if not long:
        raise DatasetError(
            f"None of {counted(len(rows), 'document')} is longer than a chunk of {chunk_size} tokens, where reading begins. Give "
            "longer texts, or join short ones."
        )
    np.random.default_rng(seed).shuffle(long)
    return cut.select(long[:count])


def with_stored_ids(
    windows: Dataset, texts: Iterable[dict[str, str]], datastore: RetroDatastore, tokenizer: Any
) -> Dataset:
    """The windows with the ids that their documents have in a datastore, so that none reads itself.

    What a document is called there does not matter: it is there where one stored document has most of its text.
    """
    names = set(windows[ID_COLUMN])
    used = [one for one in texts if one["id"] in names]
    tokens = [row for _, rows in _tokenized(used, tokenizer) for row in rows]
    stored = dict(zip((one["id"] for one in used), holders(tokens, stored_documents(datastore)), strict=True))
    known = sum(bool(ids) for ids in stored.values())
    logger.info(
        f"{known:,} of {counted(len(used), 'training document')} are in the datastore; none of them reads itself there."
    )
    # The document itself first, whose stored keys are its queries.
    rows = [sorted(stored[id], key=id.__ne__) for id in windows[ID_COLUMN]]
    datasets = extras.load("datasets", "Fitting")
    column = datasets.Dataset.from_dict(
        {ID_COLUMN: rows}, features=datasets.Features({ID_COLUMN: datasets.List(datasets.Value("string"))})
    )
    return datasets.concatenate_datasets([windows.remove_columns(ID_COLUMN), column], axis=1)


def _tokenized(documents: list[dict[str, str]], tokenizer: Any) -> Iterator[Block]:
    for first in range(0, len(documents), 256):
        block = documents[first : first + 256]
        encoded, _ = tokenize_texts(tokenizer, [one["text"] for one in block])
        yield [one["id"] for one in block], [np.array(ids, dtype=np.int64) for ids in encoded]
