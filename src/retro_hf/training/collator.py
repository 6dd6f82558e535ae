"""RetroDataCollator: examples in, with the ids of their neighbors or without; padded tensors with neighbor tokens out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import logging

from ..datastore import RetroDatastore
from ..errors import DatasetError, DatastoreMismatchError
from ..retriever import RetroRetriever
from .exclusion import document_numbers
from .neighbors import (
    ID_COLUMN,
    NEIGHBORS_COLUMN,
    SOURCE_COLUMN,
    START_COLUMN,
    neighbor_source,
    neighbors_of_windows,
    wanted_neighbors,
)


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RetroDataCollator", "checked_shares", "padding_id"]

logger = logging.get_logger(__name__)

_IGNORED_LABEL = -100


class RetroDataCollator:
    """Makes training batches for a RETRO model.

    Pads tokens on the right, sets labels, and reads the tokens of the neighbors from the datastore's memory map. Given a
    datastore, it takes the neighbors that [`precompute_neighbors`] found beforehand; given a retriever, it looks each
    batch up as it comes (section "Live" below). Serves plain [`~transformers.Trainer`] with `TrainingArguments(remove_unused_columns=False)`: otherwise Trainer drops the
    columns with the neighbors, which are no argument of the model, before they get here.

    A model that only ever saw good neighbors trusts bad ones. Both probabilities below replace the neighbors of some
    chunks in training; give the evaluation a collator of its own without them (`Trainer` takes one collator for both,
    so set them only where that is meant).

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `int`): the model's, checked against the datastore's; or
            the id to pad with.
        datastore ([`RetroDatastore`], `str` or `Path`; or [`RetroRetriever`]): the datastore that the neighbors were
            computed with; or who finds them now.
        num_neighbors (`int`, *optional*): how many of the precomputed neighbors to use, all by default; or how many to
            find, by default the retriever's number.
        random_neighbor_probability (`float`, defaults to 0.0): share of chunks whose neighbors are drawn at random from
            the datastore.
        no_neighbor_probability (`float`, defaults to 0.0): share of chunks that get none.
        seed (`int`, defaults to 0): of these draws.
    Inputs of a call:
        examples with `input_ids`, `neighbor_chunk_ids`, `neighbor_source`, and `labels` where they are not `input_ids`
        (-100 at tokens that are not trained on). With a retriever `document_id` and `window_start` instead of the
        neighbors, both optional. Other columns are ignored.
    Returns of a call:
        `input_ids`, `attention_mask` and `labels` of shape `(batch_size, sequence_length)`; `neighbor_input_ids` and
        `neighbor_attention_mask` of shape `(batch_size, num_chunks, num_neighbors, neighbor_size)`; `neighbor_chunk_size`
        of shape `(batch_size,)`, by which the model sees that its chunks are those of the datastore; all int64. A batch
        has room for one chunk at least, so that every weight takes part in every step, on every rank.
    Raises:
        DatasetError: for examples without neighbors, padded examples, neighbors that do not fit their chunks, or an
            example whose labels are all -100.
        DatastoreMismatchError: if the neighbors were computed with another datastore, or fewer than `num_neighbors`.
        DatastoreInputError: for chunk ids that the datastore does not have.
    *Determinism*: the draws depend on the seed, on the examples of the batch and on the epoch set by [`set_epoch`],
    not on earlier calls: worker processes, prefetching and a resumed run change nothing. Shuffled batches differ from
    epoch to epoch and so do their draws; without shuffling, call `set_epoch`.
    *Processes*: pickling keeps the datastore's path; each worker opens its own memory map.
    *Live*: a chunk gets nothing from the documents that its example names in `document_id` (an id, or a list of ids, such
    as its near-duplicates); what is found is what [`precompute_neighbors`] finds. With
    `TrainingArguments(dataloader_num_workers=1)` the next batches are looked up while the model computes. Computing
    beforehand pays from the second epoch on, or where the model waits for its batches.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | int,
        datastore: RetroDatastore | RetroRetriever | str | os.PathLike[str],
        *,
        num_neighbors: int | None = None,
        random_neighbor_probability: float = 0.0,
        no_neighbor_probability: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.retriever = datastore if isinstance(datastore, RetroRetriever) else None
        if isinstance(datastore, RetroRetriever):
            datastore = datastore.datastore
        self.datastore = datastore if isinstance(datastore, RetroDatastore) else RetroDatastore.load(datastore)
        if isinstance(tokenizer, int):
            self.pad_token_id = tokenizer
        else:
            self.datastore.check_compatible(tokenizer=tokenizer)
            self.pad_token_id = padding_id(tokenizer)
        if num_neighbors is not None and num_neighbors < 1:
            raise ValueError(f"num_neighbors is {num_neighbors}, but it must be at least 1, or None for all.")
        self.num_neighbors = num_neighbors
        self.random_neighbor_probability, self.no_neighbor_probability = checked_shares(
            random_neighbor_probability=random_neighbor_probability, no_neighbor_probability=no_neighbor_probability
        )
        self.seed = seed
        self.epoch = 0
        self._accepted: dict[str, int] = {}

    def set_epoch(self, epoch: int) -> None:
        """Draw other random neighbors for the same batch; needed only where batches repeat."""
        self.epoch = epoch

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make one batch; see the class."""
        for example in examples:
            if "input_ids" not in example:
                raise DatasetError(
                    f"The examples have no column 'input_ids', only {sorted(example)}. Tokenize them first: "
                    "`tokenize_documents(dataset, tokenizer, max_length=..., chunk_size=...)`."
                )
        tokens = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
        found = self._looked_up(self.retriever, examples, tokens) if self.retriever else self._precomputed(examples)
        size = self.datastore.chunk_size
        length = max(size, *map(len, tokens))
        input_ids = np.full((len(examples), length), self.pad_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, _IGNORED_LABEL)
        attention_mask = np.zeros_like(input_ids)
        chunk_ids = np.full((len(examples), length // size, found[0].shape[1]), -1, dtype=np.int64)
        for row, (ids, example) in enumerate(zip(tokens, examples, strict=True)):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
            labels[row, : len(ids)] = _labels(example, ids)
            chunk_ids[row, : len(found[row])] = found[row]
        if self.random_neighbor_probability or self.no_neighbor_probability:
            chunk_ids = self._dropped(chunk_ids, input_ids, attention_mask.sum(axis=1) // size)
        neighbor_input_ids, neighbor_attention_mask = self.datastore.gather(chunk_ids)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "neighbor_input_ids": neighbor_input_ids,
            "neighbor_attention_mask": neighbor_attention_mask,
            # For the model to check: with chunks of another size, neighbors would be of text that it is yet to predict.
            "neighbor_chunk_size": np.full(len(examples), size),
        }
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _dropped(self, chunk_ids: np.ndarray, input_ids: np.ndarray, num_chunks: np.ndarray) -> np.ndarray:
        """Chunk ids with those of some complete chunks drawn at random, and of others taken away."""
        digest = hashlib.blake2b(input_ids.tobytes(), digest_size=8).digest()
        generator = np.random.default_rng([self.seed, self.epoch, int.from_bytes(digest, "little")])
        draw = generator.random(chunk_ids.shape[:2])[:, :, None]
        drawn = self.datastore.random_chunks(generator, chunk_ids.shape)
        complete = np.arange(chunk_ids.shape[1]) < num_chunks[:, None]
        chunk_ids = np.where((draw < self.random_neighbor_probability) & complete[:, :, None], drawn, chunk_ids)
        return np.where(draw >= 1 - self.no_neighbor_probability, -1, chunk_ids)

    def _looked_up(
        self, retriever: RetroRetriever, examples: Sequence[Mapping[str, Any]], tokens: list[np.ndarray]
    ) -> list[np.ndarray]:
        """Chunk ids for the complete chunks of each example, looked up now; see `_precomputed`."""
        documents = starts = None
        if all(ID_COLUMN in example for example in examples):
            documents = document_numbers(self.datastore, [example[ID_COLUMN] for example in examples])
            if all(START_COLUMN in example for example in examples):
                starts = np.array([example[START_COLUMN] for example in examples], dtype=np.int64)
        else:
            logger.warning_once(
                f"No column {ID_COLUMN!r}: a chunk whose document is in the datastore will find itself there. If the dataset "
                "has it, Trainer dropped it: set `TrainingArguments(remove_unused_columns=False)`."
            )
        lengths = np.array([len(ids) for ids in tokens])
        wanted = wanted_neighbors(retriever, self.num_neighbors)
        found = neighbors_of_windows(retriever, np.concatenate(tokens), lengths, wanted, documents, starts)
        return np.split(found, np.cumsum(lengths // self.datastore.chunk_size)[:-1])

    def _precomputed(self, examples: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """Chunk ids that each example carries, int64 of shape `(num_chunks, num_neighbors)`, after checking them."""
        computed = min(self._computed_number(example) for example in examples)
        wanted = self.num_neighbors or computed
        size = self.datastore.chunk_size
        rows = [_neighbors(example, len(example["input_ids"]) // size) for example in examples]
        # A list of nothing has lost its second axis.
        return [row[:, :wanted] if len(row) else np.empty((0, wanted), dtype=np.int64) for row in rows]

    def _computed_number(self, example: Mapping[str, Any]) -> int:
        """How many neighbors an example has, after checking that they refer to this datastore."""
        for name in (NEIGHBORS_COLUMN, SOURCE_COLUMN):
            if name not in example:
                raise DatasetError(
                    f"The examples have no column {name!r}, only {sorted(example)}. Make it with "
                    "`precompute_neighbors(dataset, retriever)`; if the dataset has it, Trainer dropped it: set "
                    "`TrainingArguments(remove_unused_columns=False)`. To look neighbors up while training, give the "
                    "collator a RetroRetriever instead of a datastore."
                )
            if example[name] is None:  # what concatenating fills in
                raise DatasetError(
                    f"The column {name!r} of an example is None, as in rows that were joined from a dataset without it. Run "
                    "`precompute_neighbors(dataset, retriever)` on all of them."
                )
        source = example[SOURCE_COLUMN]
        if source not in self._accepted:
            self._accepted[source] = self._checked_source(source)
        return self._accepted[source]

    def _checked_source(self, source: str) -> int:
        computed = json.loads(source)
        count = computed["num_neighbors"]
        own = json.loads(neighbor_source(self.datastore, count))
        # Shards that were appended since then have ids of their own.
        own["datastore"] = own["datastore"][: len(computed.get("datastore", ()))]
        names = ("chunk_size", "tokenizer_fingerprint", "embedder", "embedder_fingerprint", "datastore")
        other = next((name for name in names if computed.get(name) != own[name]), None)
        if other is not None:
            raise DatastoreMismatchError(
                f"The neighbors were computed with another datastore: theirs has {other}={computed.get(other)!r}, the one "
                f"at {str(self.datastore.path)!r} has {own[other]!r}. Their chunk ids would stand for other text. Open the "
                "datastore they were computed with, or run `precompute_neighbors` again."
            )
        if self.num_neighbors is not None and self.num_neighbors > count:
            raise DatastoreMismatchError(
                f"num_neighbors={self.num_neighbors}, but only {count} neighbors per chunk were computed. Run "
                f"`precompute_neighbors(..., num_neighbors={self.num_neighbors})`, or lower the number."
            )
        return int(count)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with. Padding is masked wherever it is read, so any will do."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def checked_shares(**shares: float) -> tuple[float, ...]:
    """Probabilities of which at most one comes true.

    Raises:
        ValueError: if one is negative, or their sum above 1.
    """
    if min(shares.values()) < 0 or sum(shares.values()) > 1:
        named = " and ".join(f"{name}={share}" for name, share in shares.items())
        raise ValueError(f"{named} must not be negative, and their sum at most 1.")
    return tuple(shares.values())


def _labels(example: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    if 0 in example.get("attention_mask", ()):
        raise DatasetError("The examples are padded (attention_mask has zeros). Tokenize them without padding.")
    given = example.get("labels")
    labels = ids if given is None else np.asarray(given, dtype=np.int64)
    if len(labels) != len(ids):
        raise DatasetError(f"An example has {len(ids)} input_ids, but {len(labels)} labels.")
    if not (labels[1:] != _IGNORED_LABEL).any():
        raise DatasetError(
            f"None of the {len(labels)} tokens of an example is trained on: all labels after the first, which nothing "
            f"predicts, are {_IGNORED_LABEL}. A batch of such examples has no loss (0 / 0). Leave them out: "
            f"`dataset.filter(lambda example: any(label != {_IGNORED_LABEL} for label in example['labels'][1:]))`."
        )
    return labels


def _neighbors(example: Mapping[str, Any], num_chunks: int) -> np.ndarray:
    rows = example[NEIGHBORS_COLUMN]
    if len(rows) != num_chunks:
        raise DatasetError(
            f"An example of {len(example['input_ids'])} tokens has {num_chunks} complete chunks, but neighbors of "
            f"{len(rows)}. Compute the neighbors after cutting the examples to length."
        )
    return np.asarray(rows, dtype=np.int64)
