"""RetroDataCollator: makes padded training batches of examples, with the tokens of their neighbors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import logging

from ..arguments import check_tokenizer, numbers, real, whole
from ..datastore import RetroDatastore
from ..datastore.chunks import padded
from ..datastore.compatibility import check_record
from ..errors import DatasetError, DatastoreMismatchError
from ..retriever import RetroRetriever
from .columns import check_example, checked_examples, token_ids
from .exclusion import documents_by_row
from .neighbors import NEIGHBORS_COLUMN, SOURCE_COLUMN
from .own_text import Lookups
from .search import neighbor_source, neighbors_of_windows, wanted_neighbors
from .windows import ID_COLUMN, START_COLUMN, TOKENIZER_COLUMN


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

IGNORED_LABEL = -100


class RetroDataCollator:
    """Makes training batches for a RETRO model.

    Pads tokens on the right, sets labels, and reads the tokens of the neighbors from the datastore. Given a datastore, it
    takes the neighbors that [`precompute_neighbors`] found; given a retriever, it looks up each batch as it comes. Use it
    with plain [`~transformers.Trainer`] and `TrainingArguments(remove_unused_columns=False)`. Otherwise Trainer drops the
    columns that are not arguments of the model before they arrive here.

    A model that has only seen good neighbors trusts bad ones. Two probabilities randomly replace or drop neighbors during
    training. `Trainer` uses one collator for training and evaluation, so evaluate with a second `Trainer` if the evaluation
    should read all neighbors.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `int`): the model's tokenizer, checked against the
            datastore's; or the id to pad with.
        datastore ([`RetroDatastore`], `str` or `Path`; or [`RetroRetriever`]): the datastore that the neighbors were
            computed with, or the retriever that finds them.
        num_neighbors (`int`, *optional*): neighbors per chunk; by default all that were computed, or the retriever's number.
        random_neighbor_probability (`float`, defaults to 0.0): share of chunks that read random chunks of the datastore.
        no_neighbor_probability (`float`, defaults to 0.0): share of chunks that read nothing.
        seed (`int`, defaults to 0): seed of these draws.
    Inputs of a call:
        examples with `input_ids`, `neighbor_chunk_ids` and `neighbor_source`, and optionally `labels` (-100 at tokens that
        are not trained on). With a retriever, `document_id` and `window_start` instead of the neighbors, both optional: a
        chunk then gets nothing from the documents that its example names (an id, or a list of ids).
    Returns of a call:
        `input_ids`, `attention_mask` and `labels` of shape `(batch_size, sequence_length)`; `neighbor_input_ids` and
        `neighbor_attention_mask` of shape `(batch_size, num_chunks, num_neighbors, neighbor_size)`; `neighbor_chunk_size`
        of shape `(batch_size,)`, with which the model checks that its chunks are those of the datastore; all int64. A batch
        has at least one chunk, so that every weight takes part in every step, on every rank.
    Raises:
        DatasetError: for examples without neighbors, padded examples, neighbors that do not fit their chunks, or an
            example whose labels are all -100.
        DatastoreMismatchError: if the neighbors were computed with another datastore, or fewer than `num_neighbors`.
        DatastoreInputError: for chunk ids that the datastore does not have.
    *Determinism*: draws depend on the seed and on the examples of the batch, not on earlier calls, so worker processes,
    prefetching and resuming change nothing. Shuffling gives other batches, and so other draws, in every epoch.
    *Processes*: pickling keeps the datastore's path; each worker opens its own memory map. With a retriever,
    `TrainingArguments(dataloader_num_workers=1)` looks up the next batches while the model computes.
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
            self.pad_token_id = whole("The id to pad with", tokenizer, ValueError, least=0, most=(1 << 63) - 1)
        else:
            self.datastore.check_compatible(tokenizer=tokenizer)
            self.pad_token_id = padding_id(tokenizer)
        self.num_neighbors = None if num_neighbors is None else wanted_neighbors(None, num_neighbors)
        self.random_neighbor_probability, self.no_neighbor_probability = checked_shares(
            random_neighbor_probability=random_neighbor_probability, no_neighbor_probability=no_neighbor_probability
        )
        self.seed = whole("seed", seed, ValueError, least=0)
        self._computed: dict[str, int] = {}
        self._records: set[str] = set()
        self._lookups = Lookups()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make one batch; see the class."""
        examples = checked_examples(examples)
        for example in examples:
            check_example(example, ["input_ids"])
        for record in (example[TOKENIZER_COLUMN] for example in examples if TOKENIZER_COLUMN in example):
            if not isinstance(record, str) or record not in self._records:
                check_record(self.datastore, record)
                self._records.add(record)
        tokens = [token_ids(example, "input_ids") for example in examples]
        found = self._looked_up(self.retriever, examples, tokens) if self.retriever else self._precomputed(examples)
        self._lookups.count(found)
        size = self.datastore.chunk_size
        length = max(size, *map(len, tokens))  # at least one chunk; see the class
        input_ids, attention_mask = padded(tokens, length, self.pad_token_id)
        labels, _ = padded([_labels(*pair) for pair in zip(examples, tokens, strict=True)], length, IGNORED_LABEL)
        chunk_ids, _ = padded(found, length // size, fill=-1)
        if self.random_neighbor_probability or self.no_neighbor_probability:
            chunk_ids = self._drawn(chunk_ids, input_ids, attention_mask.sum(axis=1) // size)
        neighbor_input_ids, neighbor_attention_mask = self.datastore.gather(chunk_ids)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "neighbor_input_ids": neighbor_input_ids,
            "neighbor_attention_mask": neighbor_attention_mask,
            # With chunks of another size, neighbors would contain text that the model is to predict. The model checks it.
            "neighbor_chunk_size": np.full(len(examples), size),
        }
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _drawn(self, chunk_ids: np.ndarray, input_ids: np.ndarray, num_chunks: np.ndarray) -> np.ndarray:
        """What is read instead of what was found: some complete chunks get random neighbors, and others none.

        Args:
            chunk_ids (`np.ndarray` of int64 and shape `(batch_size, chunks, found)`): what was found, best first.
            input_ids (`np.ndarray` of int64 and shape `(batch_size, sequence_length)`): decide what is drawn.
            num_chunks (`np.ndarray` of int64 and shape `(batch_size,)`): complete chunks of each example.
        Returns:
            `np.ndarray` of int64: as `chunk_ids`, -1 for none.
        """
        generator = generator_for(self.seed, input_ids)
        # One draw decides both events, from either end of [0, 1), so that they exclude each other. The random chunks are drawn
        # whether they are used or not: so the draws of one probability do not move those of the other.
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
            documents = documents_by_row(self.datastore, [example[ID_COLUMN] for example in examples])
            if all(START_COLUMN in example for example in examples):
                given = [example[START_COLUMN] for example in examples]
                starts = numbers(f"The values of {START_COLUMN!r}", given, DatasetError, 0, 1 << 48)
                if starts.ndim != 1:
                    raise DatasetError(
                        f"The values of {START_COLUMN!r} are of shape {starts.shape}. Pass one per example."
                    )
        else:
            logger.warning_once(
                f"The examples have no column {ID_COLUMN!r}, so their own documents in the datastore are known by their text alone. "
                "If the dataset has it, Trainer dropped it: set `TrainingArguments(remove_unused_columns=False)`. If not, add it: for each "
                "window an id, or a list of the ids of its documents."
            )
        lengths = np.array([len(ids) for ids in tokens])
        wanted = wanted_neighbors(retriever, self.num_neighbors)
        found, _ = neighbors_of_windows(retriever, np.concatenate(tokens), lengths, wanted, documents, starts)
        return np.split(found, np.cumsum(lengths // self.datastore.chunk_size)[:-1])

    def _precomputed(self, examples: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """The chunk ids of each example, int64 of shape `(num_chunks, num_neighbors)`, after checking them."""
        rows, computed = [], []
        for example in examples:
            check_example(example, [NEIGHBORS_COLUMN, SOURCE_COLUMN])
            source, ids = example[SOURCE_COLUMN], example[NEIGHBORS_COLUMN]
            if not isinstance(source, str) or not isinstance(ids, (list, np.ndarray, torch.Tensor)):
                raise DatasetError(
                    f"{SOURCE_COLUMN!r} is of type {type(source).__name__} and {NEIGHBORS_COLUMN!r} of type {type(ids).__name__}. "
                    "Use the columns as `precompute_neighbors` makes them."
                )
            found = numbers(f"The ids in {NEIGHBORS_COLUMN!r}", ids, DatasetError, -1, (1 << 63) - 1)
            if found.ndim != 2 and found.shape != (0,):
                raise DatasetError(
                    f"{NEIGHBORS_COLUMN!r} has the shape {found.shape}, but it must be (num_chunks, num_neighbors). Use the columns "
                    "as `precompute_neighbors` makes them."
                )
            if source not in self._computed:
                self._computed[source] = self._checked_source(source)
            computed.append(self._computed[source])
            num_chunks = len(example["input_ids"]) // self.datastore.chunk_size
            if len(found) != num_chunks:
                raise DatasetError(
                    f"An example of {len(example['input_ids'])} tokens has {num_chunks} complete chunks, but neighbors of "
                    f"{len(found)}. Compute the neighbors after cutting the examples to length."
                )
            rows.append(found)
        wanted = self.num_neighbors or min(computed)
        # An empty list has lost its second axis.
        return [row[:, :wanted] if len(row) else np.empty((0, wanted), dtype=np.int64) for row in rows]

    def _checked_source(self, source: str) -> int:
        """How many neighbors were computed, after checking that they were computed with this datastore."""
        try:
            computed = json.loads(source)
            count = int(computed["num_neighbors"])
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{SOURCE_COLUMN!r} is {source!r:.100}, which `precompute_neighbors` has not written. Run it again."
            ) from error
        own = json.loads(neighbor_source(self.datastore, count))
        # Shards that were appended since then have chunk ids of their own.
        own["datastore"] = own["datastore"][: len(computed.get("datastore", ()))]
        names = ("chunk_size", "tokenizer_fingerprint", "embedder", "embedder_fingerprint", "datastore")
        other = next((name for name in names if computed.get(name) != own[name]), None)
        if other is not None:
            raise DatastoreMismatchError(
                f"The neighbors were computed with another datastore, with {other}={computed.get(other)!r}; the one at "
                f"{str(self.datastore.path)!r} has {own[other]!r}. Open that datastore, or run `precompute_neighbors` again."
            )
        if self.num_neighbors is not None and self.num_neighbors > count:
            raise DatastoreMismatchError(
                f"num_neighbors={self.num_neighbors}, but only {count} neighbors per chunk were computed. Lower it, or run "
                f"`precompute_neighbors(..., num_neighbors={self.num_neighbors})`."
            )
        return count


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with. Any will do, because padding is masked wherever it is read."""
    check_tokenizer(tokenizer, DatasetError)
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def checked_shares(**shares: float) -> tuple[float, ...]:
    """Probabilities of events that exclude each other.

    Raises:
        ValueError: if one is negative, or their sum is above 1.
    """
    found = tuple(real(name, share, ValueError, least=0, most=1) for name, share in shares.items())
    if sum(found) > 1:
        named = " and ".join(f"{name}={share}" for name, share in shares.items())
        raise ValueError(f"{named} are together more than 1.")
    return found


def generator_for(seed: int, tokens: np.ndarray) -> np.random.Generator:
    """Random numbers that depend on a seed and on the token ids of a batch, not on earlier batches."""
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
    return np.random.default_rng([seed, 0, int.from_bytes(digest, "little")])


def _labels(example: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """The labels of an example, by default its tokens."""
    mask = example.get("attention_mask")
    if mask is not None and not token_ids(example, "attention_mask").all():
        raise DatasetError("The examples are padded (attention_mask has zeros). Tokenize them without padding.")
    given = example.get("labels")
    labels = ids if given is None else token_ids(example, "labels")
    if len(labels) != len(ids):
        raise DatasetError(f"An example has {len(ids)} input_ids, but {len(labels)} labels.")
    # Nothing predicts the first token, so its label does not count.
    if not (labels[1:] != IGNORED_LABEL).any():
        raise DatasetError(
            f"None of the {len(labels)} tokens of an example is trained on: all labels are {IGNORED_LABEL}. Leave such examples "
            f"out: `dataset.filter(lambda example: any(label != {IGNORED_LABEL} for label in example['labels'][1:]))`."
        )
    return labels
