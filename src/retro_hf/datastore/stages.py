"""
The stages of a build: documents → tokens → keys → shards, each done block by block.

A task writes one output file or folder, which appears when it is complete and whose name contains a digest of everything
that it is made from. If the output exists, its work is done. If the input, an option or the encoder has changed, the name
is another one. So a build that was stopped anywhere resumes when it is started again, and ends with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from ..arguments import shown
from ..errors import DatastoreInputError
from ..outside import parse_json
from ..special_tokens import tokenize_texts
from .atomic_files import complete_file, digest_of, hash_of
from .chunks import chunk_texts, num_chunks_of, text_starts
from .documents import Document
from .embedder import ChunkEmbedder
from .shard import DOCUMENT_SCHEMA, GROUP_DOCUMENTS, Piece, ShardWriter


# About two thousand chunks, which take a small encoder ten seconds. A single long document may make a larger block.
_BLOCK_DOCUMENTS = 2048
_BLOCK_CHARACTERS = 1 << 19
# Batches per call of the encoder; between calls the progress bar moves and Ctrl-C is noticed.
_BATCHES_PER_CALL = 8


class Block(NamedTuple):
    """A block of documents, by number and by the digest of everything it is made from."""

    number: int
    digest: str


class BlockPart(NamedTuple):
    """Some consecutive documents of a tokenized block: from position `first` up to, but without, `last`."""

    block: Block
    first: int
    last: int


class TokenBlock(NamedTuple):
    """A tokenized block: `tokens` `(num_chunks * chunk_size,)`, `lengths` and `id_hashes` `(num_documents,)`.

    `text_starts` `(num_chunks,)` tells where in its document each chunk begins; None for a tokenizer that cannot tell.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    id_hashes: np.ndarray
    text_starts: np.ndarray | None


class BlockSummary(NamedTuple):
    """A tokenized block without its tokens: `counts` of chunks (int64) and `id_hashes` (uint64) of its documents.

    `num_wordless` other documents were left out because they have no token.
    """

    counts: np.ndarray
    id_hashes: np.ndarray
    num_wordless: int


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Group documents into blocks of a bounded number of characters."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BLOCK_DOCUMENTS or characters >= _BLOCK_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def metadata_of(document: Document) -> str | None:
    """All fields of a document but the four, as the JSON that a store keeps; None if it has none.

    Raises:
        DatastoreInputError: for fields that JSON cannot hold, or that no store would read again.
    """
    if not document.metadata:
        return None
    try:
        metadata = json.dumps(document.metadata, default=str, sort_keys=True)
        parse_json(metadata)
    except (TypeError, ValueError, RecursionError) as error:  # keys of several types, a list in itself, 5,000 digits
        raise DatastoreInputError(
            f"The fields {', '.join(map(shown, document.metadata))} of {document.where} cannot be kept as JSON: {error}. Leave out "
            "what is not needed, or turn it into text."
        ) from error
    return metadata


def content_digest(documents: list[Document], settings: str) -> str:
    """The digest of a block of documents and of the settings that they are tokenized with."""
    fields = ((d.id, d.title, d.source, d.text, metadata_of(d) or "") for d in documents)
    return digest_of(settings, *(part for row in fields for part in row))


def _tokens_path(folder: Path, block: Block) -> Path:
    return folder / f"tokens-{block.number:06d}-{block.digest}.safetensors"


def _documents_path(folder: Path, block: Block) -> Path:
    return folder / f"documents-{block.number:06d}-{block.digest}.parquet"


def read_token_block(folder: Path, block: Block) -> TokenBlock:
    """Read what [`TokenizeBlock`] wrote."""
    with safe_open(_tokens_path(folder, block), framework="np") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return TokenBlock(**{"text_starts": None, **found})


def read_chunk_texts(
    folder: Path, block: Block, tokenizer: PreTrainedTokenizerBase, chunk_size: int, places: np.ndarray | None = None
) -> list[str]:
    """The texts of a tokenized block's chunks, or of some of them by their positions in the block (int64, in order)."""
    tokens = read_token_block(folder, block)
    counts = num_chunks_of(tokens.lengths, chunk_size)
    firsts = np.cumsum(counts) - counts
    owners = np.repeat(np.arange(len(counts)), counts)
    places = np.arange(len(owners)) if places is None else places
    if tokens.text_starts is None:
        # Without the places in the text, chunks are decoded: `left` are the tokens of the document from each chunk on.
        left = tokens.lengths[owners[places]] - (places - firsts[owners[places]]) * chunk_size
        rows = tokens.tokens.reshape(-1, chunk_size)[places]
        return chunk_texts(tokenizer, rows, np.arange(chunk_size) < left[:, None])
    # The text itself is cut: what is decoded may differ from it, and a tokenizer that changes it loses what it was.
    documents = read_documents(folder, block, ["text"]).column("text").to_pylist()
    starts, last = tokens.text_starts.tolist(), (firsts + counts - 1).tolist()
    return [
        documents[owner][starts[place] : None if place == last[owner] else starts[place + 1]]
        for place, owner in zip(places.tolist(), owners[places].tolist(), strict=True)
    ]


def read_summary(folder: Path, block: Block, chunk_size: int) -> BlockSummary:
    """Read what [`TokenizeBlock`] wrote, except for the tokens."""
    with safe_open(_tokens_path(folder, block), framework="np") as file:
        counts = num_chunks_of(file.get_tensor("lengths"), chunk_size)
        return BlockSummary(counts, file.get_tensor("id_hashes"), int(file.metadata()["num_wordless"]))


def read_documents(folder: Path, block: Block, columns: list[str] | None = None) -> pa.Table:
    """The documents of a tokenized block, by `DOCUMENT_SCHEMA`."""
    return pq.read_table(_documents_path(folder, block), columns=columns)


@dataclass(frozen=True)
class TokenizeBlock:
    """Stage 1: the documents of one block as tokens, each document padded to a chunk border."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    chunk_size: int
    dtype: np.dtype

    def output(self, block: Block, documents: list[Document]) -> Path:
        """The file with the tokens."""
        return _tokens_path(self.folder, block)

    def __call__(self, block: Block, documents: list[Document]) -> None:
        """Tokenize the documents, and leave out those that have no token."""
        kept, lengths, parts = [], [], [np.empty(0, dtype=self.dtype)]
        starts = [np.empty(0, dtype=np.uint32)]
        for start in range(0, len(documents), GROUP_DOCUMENTS):
            batch = documents[start : start + GROUP_DOCUMENTS]
            tokens, spans = tokenize_texts(self.tokenizer, [document.text for document in batch])
            places_of: Iterable[list[tuple[int, int]] | None] = spans or repeat(None, len(batch))
            for document, ids, places in zip(batch, tokens, places_of, strict=True):
                if ids:
                    padded = np.zeros(num_chunks_of(len(ids), self.chunk_size) * self.chunk_size, dtype=self.dtype)
                    padded[: len(ids)] = ids
                    parts.append(padded)
                    if places is not None:
                        starts.append(text_starts(places, np.arange(0, len(ids), self.chunk_size)).astype(np.uint32))
                    lengths.append(len(ids))
                    kept.append(document)
        columns: dict[str, list[Any]] = {
            name: [getattr(document, name) for document in kept] for name in ("id", "title", "source", "text")
        }
        columns["metadata"] = [metadata_of(document) for document in kept]
        with complete_file(_documents_path(self.folder, block)) as path:
            pq.write_table(pa.table(columns, schema=DOCUMENT_SCHEMA), path, compression="zstd")
        arrays = {
            "tokens": np.concatenate(parts),
            "lengths": np.array(lengths, dtype=np.int64),
            "id_hashes": np.array([hash_of(document.id) for document in kept], dtype=np.uint64),
        }
        if self.tokenizer.is_fast:
            arrays["text_starts"] = np.concatenate(starts)
        # The tokens come last: once their file exists, the block is complete.
        with complete_file(_tokens_path(self.folder, block)) as path:
            save_file(arrays, path, metadata={"num_wordless": str(len(documents) - len(kept))})


@dataclass(frozen=True)
class EmbedBlock:
    """Stage 2: the chunks of one tokenized block as keys, float16 of shape `(num_chunks, dim)`."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    embedder: ChunkEmbedder
    chunk_size: int
    batch_size: int

    def output(self, block: Block) -> Path:
        """The file with the keys; another encoder or precision gives another name."""
        digest = digest_of(block.digest, self.embedder.fingerprint, str(self.embedder.dtype))
        return self.folder / f"keys-{block.number:06d}-{digest}.npy"

    def __call__(self, block: Block) -> None:
        """Embed the chunks."""
        texts = read_chunk_texts(self.folder, block, self.tokenizer, self.chunk_size)
        # Sorted by length over the whole block, which saves more padding than sorting inside each call.
        order = np.argsort([-len(text) for text in texts], kind="stable")
        vectors = np.empty((len(texts), self.embedder.dim), dtype=np.float32)
        step = self.batch_size * _BATCHES_PER_CALL
        for start in range(0, len(order), step):
            part = order[start : start + step]
            vectors[part] = self.embedder.embed([texts[row] for row in part], batch_size=self.batch_size)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise DatastoreInputError(
                f"The embedder {self.embedder.name_or_path!r} returned NaN or infinity, for example for "
                f"{texts[int(np.argmin(finite))]!r}. Use dtype=torch.float32, or another embedder."
            )
        with complete_file(self.output(block)) as path, path.open("wb") as file:
            np.save(file, vectors.astype(np.float16))

    def keys(self, block: Block) -> np.ndarray:
        """The keys of an embedded block, float16 of shape `(num_chunks, dim)`, memory-mapped."""
        return np.load(self.output(block), mmap_mode="r", allow_pickle=False)

    def piece(self, part: BlockPart) -> Piece:
        """Documents of an embedded block, to be written to a shard."""
        tokens = read_token_block(self.folder, part.block)
        counts = num_chunks_of(tokens.lengths, self.chunk_size)
        start, stop = (int(counts[:place].sum()) for place in (part.first, part.last))
        documents = slice(part.first, part.last)
        return Piece(
            tokens=tokens.tokens[start * self.chunk_size : stop * self.chunk_size],
            lengths=tokens.lengths[documents],
            counts=counts[documents],
            hashes=tokens.id_hashes[documents],
            keys=self.keys(part.block)[start:stop],
            documents=read_documents(self.folder, part.block).slice(part.first, part.last - part.first),
            text_starts=None if tokens.text_starts is None else tokens.text_starts[start:stop],
        )


@dataclass(frozen=True)
class WriteShard:
    """Stage 3: the documents of one shard joined, and an index over their keys."""

    folder: Path
    embed: EmbedBlock
    recall: float

    def output(self, name: str, factory: str, parts: tuple[BlockPart, ...]) -> Path:
        """The folder of the shard."""
        keys = [f"{self.embed.output(part.block).name} {part.first} {part.last}" for part in parts]
        return self.folder / f"shard-{name}-{digest_of(factory, str(self.recall), *keys)}"

    def __call__(self, name: str, factory: str, parts: tuple[BlockPart, ...]) -> None:
        """Write the shard."""
        dtype = read_token_block(self.folder, parts[0].block).tokens.dtype
        with ShardWriter(self.output(name, factory, parts), name, dtype, self.embed.embedder.dim) as writer:
            for part in parts:
                writer.add(self.embed.piece(part))
            writer.finish(factory, self.recall)
