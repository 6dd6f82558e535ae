"""Blocks of a build: a few thousand chunks each, in files that appear when complete and are named by their content.

A block's name holds a digest of everything it is made from. Where the file exists the work is done; where the input,
an option or the encoder has changed, the name is another. So a build that was stopped anywhere goes on by being
started again, and ends with the bytes of one that was not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save_file

from ..errors import DatastoreInputError
from .chunks import chunk_texts, num_chunks_of
from .documents import Document
from .shard import hash_of_id
from .storage import complete_file
from .writer import DOCUMENT_SCHEMA, GROUP_DOCUMENTS, Piece


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .embedder import ChunkEmbedder

__all__ = [
    "Block",
    "BlockPart",
    "BlockSummary",
    "EmbedBlock",
    "TokenBlock",
    "TokenizeBlock",
    "batches",
    "digest_of",
    "read_summary",
    "read_token_block",
    "tokenizer_identity",
]

# About two thousand chunks, ten seconds of work for a small encoder; a single long document may be more.
_BLOCK_DOCUMENTS = 2048
_BLOCK_CHARACTERS = 1 << 19
# Texts handed to the encoder at once, in forward passes: between them the progress bar and Ctrl-C have their turn.
_BATCHES_PER_CALL = 8


class Block(NamedTuple):
    """A block by number and by the digest of what it is made from."""

    number: int
    digest: str


class BlockPart(NamedTuple):
    """Some documents of a tokenized block in a row: from place `first` up to `last`, without it."""

    block: Block
    first: int
    last: int


class BlockSummary(NamedTuple):
    """What is asked of a tokenized block before the rest, of the documents it keeps.

    Their `counts` of chunks (int64) and `id_hashes` (uint64), and how many others were left out for lack of tokens.
    """

    counts: np.ndarray
    id_hashes: np.ndarray
    num_wordless: int


class TokenBlock(NamedTuple):
    """The tokens of a block: `tokens` `(num_chunks * chunk_size,)`, `lengths` and `id_hashes` `(num_documents,)`."""

    tokens: np.ndarray
    lengths: np.ndarray
    id_hashes: np.ndarray


def digest_of(*parts: str | bytes) -> str:
    """A digest of texts, in an order and with borders that count."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents by blocks, a bounded number of characters each."""
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
    """The fields of a document beyond the four, as JSON."""
    return json.dumps(document.metadata, default=str, sort_keys=True) if document.metadata else None


def content_digest(documents: list[Document], settings: str) -> str:
    """The digest of a block of documents and of what they are tokenized with."""
    fields = ((d.id, d.title, d.source, d.text, metadata_of(d) or "") for d in documents)
    return digest_of(settings, *(part for row in fields for part in row))


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest_of(type(tokenizer).__name__, json.dumps(tokenizer.get_vocab(), sort_keys=True))
    content = json.loads(backend.to_str())
    content.update(padding=None, truncation=None)
    return digest_of(json.dumps(content, sort_keys=True))


def _tokens_path(folder: Path, block: Block) -> Path:
    return folder / f"tokens-{block.number:06d}-{block.digest}.safetensors"


def documents_path(folder: Path, block: Block) -> Path:
    """Where the documents of a tokenized block lie."""
    return folder / f"documents-{block.number:06d}-{block.digest}.parquet"


def read_token_block(folder: Path, block: Block) -> TokenBlock:
    """Read what [`TokenizeBlock`] wrote."""
    with safe_open(_tokens_path(folder, block), framework="np") as file:
        return TokenBlock(*(file.get_tensor(name) for name in TokenBlock._fields))


def read_summary(folder: Path, block: Block, chunk_size: int) -> BlockSummary:
    """Read of what [`TokenizeBlock`] wrote all but the tokens."""
    with safe_open(_tokens_path(folder, block), framework="np") as file:
        counts = num_chunks_of(file.get_tensor("lengths"), chunk_size)
        return BlockSummary(counts, file.get_tensor("id_hashes"), int(file.metadata()["num_wordless"]))


@dataclass(frozen=True)
class TokenizeBlock:
    """Stage 1: documents of one block to tokens, each document padded to a chunk border."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    chunk_size: int
    dtype: np.dtype

    def output(self, block: Block, documents: list[Document]) -> Path:
        """The block's tokens."""
        return _tokens_path(self.folder, block)

    def __call__(self, block: Block, documents: list[Document]) -> None:
        """Tokenize, leaving out documents that have no token."""
        kept, lengths, parts = [], [], [np.empty(0, dtype=self.dtype)]
        for start in range(0, len(documents), GROUP_DOCUMENTS):
            batch = documents[start : start + GROUP_DOCUMENTS]
            encoded = self.tokenizer(
                [document.text for document in batch],
                add_special_tokens=False,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            for document, ids in zip(batch, encoded, strict=True):
                if ids:
                    padded = np.zeros(num_chunks_of(len(ids), self.chunk_size) * self.chunk_size, dtype=self.dtype)
                    padded[: len(ids)] = ids
                    parts.append(padded)
                    lengths.append(len(ids))
                    kept.append(document)
        columns: dict[str, list[Any]] = {
            name: [getattr(document, name) for document in kept] for name in ("id", "title", "source", "text")
        }
        columns["metadata"] = [metadata_of(document) for document in kept]
        with complete_file(documents_path(self.folder, block)) as path:
            pq.write_table(pa.table(columns, schema=DOCUMENT_SCHEMA), path, compression="zstd")
        arrays = {
            "tokens": np.concatenate(parts),
            "lengths": np.array(lengths, dtype=np.int64),
            "id_hashes": np.array([hash_of_id(document.id) for document in kept], dtype=np.uint64),
        }
        # The tokens come last: their file says that the block is complete.
        with complete_file(_tokens_path(self.folder, block)) as path:
            save_file(arrays, path, metadata={"num_wordless": str(len(documents) - len(kept))})


@dataclass(frozen=True)
class EmbedBlock:
    """Stage 2: the chunks of one tokenized block to keys, float16 of shape `(num_chunks, dim)`."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    embedder: ChunkEmbedder
    chunk_size: int
    batch_size: int

    def output(self, block: Block) -> Path:
        """The block's keys; another encoder or precision has another name."""
        digest = digest_of(block.digest, self.embedder.fingerprint, str(self.embedder.dtype))
        return self.folder / f"keys-{block.number:06d}-{digest}.npy"

    def __call__(self, block: Block) -> None:
        """Embed, in forward passes over chunks of similar length."""
        tokens = read_token_block(self.folder, block)
        rows = tokens.tokens.reshape(-1, self.chunk_size)
        counts = num_chunks_of(tokens.lengths, self.chunk_size)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        left = np.repeat(tokens.lengths, counts) - (np.arange(len(rows)) - first) * self.chunk_size
        texts = chunk_texts(self.tokenizer, rows, np.arange(self.chunk_size) < left[:, None])
        # Sorted by length over the whole block, rather than each batch: that is what saves padding.
        order = np.argsort([-len(text) for text in texts], kind="stable")
        vectors = np.empty((len(texts), self.embedder.dim), dtype=np.float32)
        step = self.batch_size * _BATCHES_PER_CALL
        for start in range(0, len(order), step):
            part = order[start : start + step]
            vectors[part] = self.embedder.embed([texts[row] for row in part], batch_size=self.batch_size)
        if not np.isfinite(vectors).all():
            raise DatastoreInputError(
                f"The embedder {self.embedder.name_or_path!r} gave vectors that are not finite, for example for "
                f"{texts[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]!r}. Try dtype=torch.float32."
            )
        with complete_file(self.output(block)) as path, path.open("wb") as file:
            np.save(file, vectors.astype(np.float16))

    def piece(self, part: BlockPart) -> Piece:
        """Documents of a finished block, to be written into a shard."""
        tokens = read_token_block(self.folder, part.block)
        counts = num_chunks_of(tokens.lengths, self.chunk_size)
        start, stop = (int(counts[:place].sum()) for place in (part.first, part.last))
        documents = slice(part.first, part.last)
        return Piece(
            tokens=tokens.tokens[start * self.chunk_size : stop * self.chunk_size],
            lengths=tokens.lengths[documents],
            counts=counts[documents],
            hashes=tokens.id_hashes[documents],
            keys=np.load(self.output(part.block), mmap_mode="r", allow_pickle=False)[start:stop],
            documents=pq.read_table(documents_path(self.folder, part.block)).slice(part.first, part.last - part.first),
        )
