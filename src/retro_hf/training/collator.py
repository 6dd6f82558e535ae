"""RetroDataCollator: examples with neighbor ids in, padded tensors with neighbor tokens out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..datastore import RetroDatastore
from ..errors import DatasetError, DatastoreMismatchError
from .neighbors import NEIGHBORS_COLUMN, SOURCE_COLUMN, neighbor_source


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RetroDataCollator", "checked_shares", "padding_id"]

_IGNORED_LABEL = -100


class RetroDataCollator:
    """Makes training batches for a RETRO model from a dataset that [`precompute_neighbors`] has been over.

    Pads tokens on the right, sets labels, and reads the tokens of the neighbors from the datastore's memory map. Serves
    plain [`~transformers.Trainer`] with `TrainingArguments(remove_unused_columns=False)`: otherwise Trainer drops the
    columns with the neighbors, which are no argument of the model, before they get here.

    A model that only ever saw good neighbors trusts bad ones. Both probabilities below replace the neighbors of some
    chunks in training; give the evaluation a collator of its own without them (`Trainer` takes one collator for both,
    so set them only where that is meant).

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `int`): the model's, checked against the datastore's; or
            the id to pad with.
        datastore ([`RetroDatastore`], `str` or `Path`): the datastore that the neighbors were computed with.
        num_neighbors (`int`, *optional*): how many of the precomputed neighbors to use; all by default.
        random_neighbor_probability (`float`, defaults to 0.0): share of chunks whose neighbors are drawn at random from
            the datastore.
        no_neighbor_probability (`float`, defaults to 0.0): share of chunks that get none.
        seed (`int`, defaults to 0): of these draws.
    Inputs of a call:
        examples with `input_ids`, `neighbor_chunk_ids`, `neighbor_source`, and `labels` where they are not `input_ids`
        (-100 at tokens that are not trained on). Other columns are ignored.
    Returns of a call:
        `input_ids`, `attention_mask` and `labels` of shape `(batch_size, sequence_length)`; `neighbor_input_ids` and
        `neighbor_attention_mask` of shape `(batch_size, num_chunks, num_neighbors, neighbor_size)`; all int64.
    Raises:
        DatasetError: for examples without neighbors, padded examples, or neighbors that do not fit their chunks.
        DatastoreMismatchError: if the neighbors were computed with another datastore, or fewer than `num_neighbors`.
        DatastoreInputError: for chunk ids that the datastore does not have.
    *Determinism*: the draws depend on the seed, on the examples of the batch and on the epoch set by [`set_epoch`],
    not on earlier calls: worker processes, prefetching and a resumed run change nothing. Shuffled batches differ from
    epoch to epoch and so do their draws; without shuffling, call `set_epoch`.
    *Processes*: pickling keeps the datastore's path; each worker opens its own memory map.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | int,
        datastore: RetroDatastore | str | os.PathLike[str],
        *,
        num_neighbors: int | None = None,
        random_neighbor_probability: float = 0.0,
        no_neighbor_probability: float = 0.0,
        seed: int = 0,
    ) -> None:
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
        wanted = min(self._precomputed(example) for example in examples)
        wanted = self.num_neighbors or wanted
        size = self.datastore.chunk_size
        tokens = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
        length = max(map(len, tokens))
        input_ids = np.full((len(examples), length), self.pad_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, _IGNORED_LABEL)
        attention_mask = np.zeros_like(input_ids)
        chunk_ids = np.full((len(examples), length // size, wanted), -1, dtype=np.int64)
        for row, (ids, example) in enumerate(zip(tokens, examples, strict=True)):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
            labels[row, : len(ids)] = _labels(example, ids)
            neighbors = _neighbors(example, len(ids) // size)
            if len(neighbors):
                chunk_ids[row, : len(neighbors)] = neighbors[:, :wanted]
        if self.random_neighbor_probability or self.no_neighbor_probability:
            chunk_ids = self._dropped(chunk_ids, input_ids, attention_mask.sum(axis=1) // size)
        neighbor_input_ids, neighbor_attention_mask = self.datastore.gather(chunk_ids)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "neighbor_input_ids": neighbor_input_ids,
            "neighbor_attention_mask": neighbor_attention_mask,
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

    def _precomputed(self, example: Mapping[str, Any]) -> int:
        """How many neighbors an example has, after checking that they refer to this datastore."""
        for name in ("input_ids", NEIGHBORS_COLUMN, SOURCE_COLUMN):
            if name not in example:
                raise DatasetError(
                    f"The examples have no column {name!r}, only {sorted(example)}. Make it with "
                    "`precompute_neighbors(dataset, retriever)`; if the dataset has it, Trainer dropped it: set "
                    "`TrainingArguments(remove_unused_columns=False)`."
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
    labels = example.get("labels")
    if labels is None:
        return ids
    if len(labels) != len(ids):
        raise DatasetError(f"An example has {len(ids)} input_ids, but {len(labels)} labels.")
    return np.asarray(labels, dtype=np.int64)


def _neighbors(example: Mapping[str, Any], num_chunks: int) -> np.ndarray:
    rows = example[NEIGHBORS_COLUMN]
    if len(rows) != num_chunks:
        raise DatasetError(
            f"An example of {len(example['input_ids'])} tokens has {num_chunks} complete chunks, but neighbors of "
            f"{len(rows)}. Compute the neighbors after cutting the examples to length."
        )
    # A list of nothing has lost its second axis.
    return np.asarray(rows, dtype=np.int64) if rows else np.empty((0, 0), dtype=np.int64)
