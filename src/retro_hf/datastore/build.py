"""Building a datastore, in stages: documents and tokens, then keys, then the index, then the manifest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import logging

from ..errors import DatastoreInputError
from .chunks import chunk_texts, num_chunks_of, token_dtype, tokenizer_fingerprint, vocabulary_size
from .documents import Document, DocumentReader
from .index import build_index, check_factory, choose_factory
from .manifest import DatastoreManifest, FileEntry
from .storage import NpyWriter, TensorWriter, map_npy, map_tensor, new_folder, sha256_of


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .embedder import ChunkEmbedder

__all__ = ["build_datastore"]

logger = logging.get_logger(__name__)

TOKENS = "tokens-00000.npy"
DOC_OFFSETS = "doc_offsets.npy"
DOC_LENGTHS = "doc_lengths.npy"
DOCUMENTS = "documents-00000.parquet"
KEYS = "keys-00000.safetensors"
INDEX = "index.faiss"

_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "title", "source", "text", "metadata")])
# Documents are read back one by one, so row groups stay small; a long document closes its group early.
_GROUP_DOCUMENTS = 512
_GROUP_CHARACTERS = 1 << 20
_KEY_BLOCK = 1 << 14


def build_datastore(
    documents: Any,
    path: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    embedder: ChunkEmbedder,
    chunk_size: int,
    neighbor_size: int,
    index: str,
    batch_size: int,
    show_progress: bool | None,
) -> None:
    """Write the datastore of `documents` to the folder `path`. See [`RetroDatastore.build`] for the arguments."""
    _check_options(chunk_size, neighbor_size, index, batch_size)
    if index != "auto":
        check_factory(index, None, embedder.dim)
    with new_folder(path) as folder:
        counts, sources = _write_tokens(documents, folder, tokenizer, chunk_size, show_progress)
        num_chunks = counts["num_chunks"]
        factory = choose_factory(num_chunks, embedder.dim) if index == "auto" else index
        check_factory(factory, num_chunks, embedder.dim)
        _tell_sizes(counts, embedder.dim, factory)
        _write_keys(folder, tokenizer, embedder, chunk_size, batch_size, show_progress)
        keys = map_tensor(folder / KEYS, (num_chunks, embedder.dim))
        with _bar(show_progress, total=num_chunks, unit="chunk", desc=f"Indexing ({factory})") as progress:
            built = build_index(keys, factory, folder / INDEX, progress=progress)
        tokenizer.save_pretrained(folder)
        DatastoreManifest(
            chunk_size=chunk_size,
            neighbor_size=neighbor_size,
            **counts,
            tokenizer={
                "name": _portable_name(tokenizer.name_or_path),
                "revision": getattr(tokenizer, "init_kwargs", {}).get("revision"),
                "fingerprint": tokenizer_fingerprint(tokenizer),
                "vocab_size": vocabulary_size(tokenizer),
            },
            embedder={
                "name": _portable_name(embedder.name_or_path),
                "revision": embedder.revision,
                "fingerprint": embedder.fingerprint,
                "dim": embedder.dim,
                "pooling": embedder.pooling,
                "dtype": str(embedder.dtype).removeprefix("torch."),
            },
            index=built,
            files=tuple(_entries(folder)),
            sources=sources,
            library_version=_library_version(),
        ).write(folder)


def _check_options(chunk_size: int, neighbor_size: int, index: str, batch_size: int) -> None:
    for name, value in (("chunk_size", chunk_size), ("neighbor_size", neighbor_size), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DatastoreInputError(f"{name} is {value!r}, but it must be an integer of at least 1.")
    if neighbor_size < chunk_size:
        raise DatastoreInputError(
            f"neighbor_size={neighbor_size} is below chunk_size={chunk_size}, but a neighbor holds its whole chunk "
            f"and what follows it. Use at least {chunk_size}; the paper uses {2 * chunk_size}."
        )
    if not isinstance(index, str):
        raise DatastoreInputError(f"index is of type {type(index).__name__}, not a FAISS factory string or 'auto'.")


def _bar(show_progress: bool | None, **options: Any) -> Any:
    """A progress bar: on a terminal by default, always with True, never with False or with transformers' bars off."""
    return logging.tqdm(disable=None if show_progress is None else not show_progress, **options)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Groups of documents that bound memory: at most 512 documents, fewer when they are long."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _GROUP_DOCUMENTS or characters >= _GROUP_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_tokens(
    documents: Any, folder: Path, tokenizer: PreTrainedTokenizerBase, chunk_size: int, show_progress: bool | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write documents, token stream and document borders in one pass; returns the counts and the sources."""
    reader = DocumentReader(documents)
    dtype = token_dtype(vocabulary_size(tokenizer))
    num_chunks = num_tokens = num_documents = num_wordless = largest = 0
    seen: set[bytes] = set()
    int64 = np.dtype(np.int64)
    with (
        _bar(show_progress, total=reader.total, unit="doc", desc="Tokenizing") as progress,
        NpyWriter(folder / TOKENS, dtype) as tokens,
        NpyWriter(folder / DOC_OFFSETS, int64) as offsets,
        NpyWriter(folder / DOC_LENGTHS, int64) as lengths,
        pq.ParquetWriter(folder / DOCUMENTS, _SCHEMA, compression="zstd") as table,
    ):
        for batch in _batches(iter(reader)):
            encoded = tokenizer(
                [document.text for document in batch],
                add_special_tokens=False,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            kept = []
            for document, ids in zip(batch, encoded, strict=True):
                _check_new_id(document, seen)
                if not ids:
                    num_wordless += 1
                    continue
                padded = np.zeros(num_chunks_of(len(ids), chunk_size) * chunk_size, dtype=dtype)
                padded[: len(ids)] = ids
                tokens.append(padded)
                offsets.append(np.array([num_chunks]))
                lengths.append(np.array([len(ids)]))
                largest = max(largest, int(padded.max()))
                num_chunks += len(padded) // chunk_size
                num_tokens += len(ids)
                kept.append(document)
            num_documents += len(kept)
            if kept:
                table.write_table(_rows(kept))
            progress.update(len(batch))
        offsets.append(np.array([num_chunks]))

    num_empty = reader.num_empty + num_wordless
    if not num_documents:
        raise DatastoreInputError(
            f"There is nothing to build a datastore from: the input has {num_empty:,} documents, all without text."
            if num_empty
            else "There is nothing to build a datastore from: the input has no documents."
        )
    if num_empty:
        logger.warning(f"Skipped {num_empty:,} of {num_empty + num_documents:,} documents, because they have no text.")
    if reader.num_repaired:
        logger.warning(f"Replaced lone surrogates by U+FFFD in {reader.num_repaired:,} documents.")
    counts = {
        "num_chunks": num_chunks,
        "num_documents": num_documents,
        "num_tokens": num_tokens,
        "num_empty_documents": num_empty,
        "token_dtype": str(dtype),
        "max_token_id": largest,
    }
    return counts, reader.sources


def _check_new_id(document: Document, seen: set[bytes]) -> None:
    # A digest per document, not the id: ids may be long paths.
    digest = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
    if digest in seen:
        raise DatastoreInputError(
            f"{document.where} has the id {document.id!r}, which an earlier document has too. Documents are found, "
            "excluded and deleted by id: make the ids unique, or leave them out."
        )
    seen.add(digest)


def _rows(documents: list[Document]) -> pa.Table:
    columns = {name: [getattr(document, name) for document in documents] for name in ("id", "title", "source", "text")}
    columns["metadata"] = [
        json.dumps(document.metadata, default=str, sort_keys=True) if document.metadata else None
        for document in documents
    ]
    return pa.table(columns, schema=_SCHEMA)


def _tell_sizes(counts: dict[str, Any], dim: int, factory: str) -> None:
    """Say what is about to be computed and written, before the long part of the work."""
    num_chunks = counts["num_chunks"]
    megabytes = num_chunks * dim * 2 / 1e6
    logger.info(
        f"{counts['num_documents']:,} documents, {counts['num_tokens']:,} tokens, {num_chunks:,} chunks to embed: "
        f"{megabytes:,.1f} MB of keys and an index {factory!r} of at most {2 * megabytes:,.1f} MB."
    )


def _write_keys(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    embedder: ChunkEmbedder,
    chunk_size: int,
    batch_size: int,
    show_progress: bool | None,
) -> None:
    """Embed every chunk, block by block, into the float16 keys."""
    offsets = np.load(folder / DOC_OFFSETS)
    lengths = np.load(folder / DOC_LENGTHS)
    num_chunks = int(offsets[-1])
    tokens = map_npy(folder / TOKENS, token_dtype(vocabulary_size(tokenizer)), num_chunks * chunk_size)
    chunks = tokens.reshape(num_chunks, chunk_size)
    desc = f"Embedding ({num_chunks * embedder.dim * 2 / 1e6:,.1f} MB of keys)"
    with (
        TensorWriter(folder / KEYS, num_chunks, embedder.dim) as keys,
        _bar(show_progress, total=num_chunks, unit="chunk", desc=desc) as progress,
    ):
        for start in range(0, num_chunks, _KEY_BLOCK):
            ids = np.arange(start, min(start + _KEY_BLOCK, num_chunks))
            owner = np.searchsorted(offsets, ids, side="right") - 1
            left = lengths[owner] - (ids - offsets[owner]) * chunk_size
            mask = np.arange(chunk_size) < left[:, None]
            texts = chunk_texts(tokenizer, np.asarray(chunks[ids]), mask)
            # Sorting by length inside a block, rather than a batch, is what saves padding.
            order = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)
            vectors = np.empty((len(texts), embedder.dim), dtype=np.float32)
            rows = iter(order)
            while part := list(islice(rows, batch_size * 8)):
                vectors[part] = embedder.embed([texts[row] for row in part], batch_size=batch_size)
                progress.update(len(part))
            if not np.isfinite(vectors).all():
                raise DatastoreInputError(
                    f"The embedder {embedder.name_or_path!r} gave vectors that are not finite for chunks from "
                    f"{start:,} on. Try dtype=torch.float32."
                )
            keys.append(vectors)


def _entries(folder: Path) -> Iterator[FileEntry]:
    """Manifest entries of all files in the folder, in a fixed order."""
    kinds = {
        TOKENS: "tokens",
        DOC_OFFSETS: "doc_offsets",
        DOC_LENGTHS: "doc_lengths",
        DOCUMENTS: "documents",
        KEYS: "keys",
        INDEX: "index",
    }
    for file in sorted(folder.iterdir()):
        if file.is_file():
            yield FileEntry(file.name, kinds.get(file.name, "tokenizer"), file.stat().st_size, sha256_of(file))


def _portable_name(name_or_path: str) -> str:
    """A Hub name as it is; of a local folder only its last part, since a datastore travels."""
    if os.path.isabs(name_or_path) or os.path.exists(name_or_path):
        return os.path.basename(os.path.normpath(name_or_path))
    return name_or_path


def _library_version() -> str:
    try:
        return importlib.metadata.version("retro-hf")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
