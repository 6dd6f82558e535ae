"""Building a datastore: the stages run in order over all blocks, and the shards become a folder with a manifest."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .. import arguments
from ..errors import DatastoreExistsError, DatastoreInputError, RetroError, counted
from ..progress import progress_bar
from .atomic_files import building_folder, check_free, digest_of, new_folder, not_written
from .chunks import token_dtype
from .compatibility import tokenizer_identity, vocabulary_size
from .documents import Document, DocumentReader
from .embedder import ChunkEmbedder
from .executors import Call, Executor, WorkRemovedError, run_stage
from .index_plan import IndexOptions, check_factory, plan_index, tell_plan
from .key_coverage import check_coverage, coverage_of, looked_at
from .manifest import (
    FORMAT_VERSION,
    MAX_TOKENS,
    DatastoreManifest,
    check_num_shards,
    describe_embedder,
    describe_file,
    describe_tokenizer,
    library_version,
    new_path,
    unique_sources,
)
from .shard import BuiltShard
from .stages import (
    Block,
    BlockPart,
    EmbedBlock,
    TokenizeBlock,
    WriteShard,
    batches,
    content_digest,
    read_chunk_texts,
    read_documents,
    read_summary,
)


logger = logging.get_logger(__name__)

_POLL_SECONDS = 0.1
_SLOW_FOLDER_SECONDS = 60.0
# From so many chunks on, a document with most of them is worth a warning.
_MANY_CHUNKS = 100
_MOST_CHUNKS = 1 << 48
# Names in a folder of unfinished work: blocks, shards, and hidden files such as the lock.
_WORK = re.compile(r"\.|(tokens|documents|keys|shard)-")


@dataclass(frozen=True)
class BuildOptions:
    """Everything that a build is made with, except for the documents. See [`RetroDatastore.build`]."""

    tokenizer: PreTrainedTokenizerBase
    embedder: ChunkEmbedder
    chunk_size: int
    neighbor_size: int
    index: IndexOptions
    batch_size: int
    shard_chunks: int
    show_progress: bool | None

    def __post_init__(self) -> None:
        for name in ("chunk_size", "neighbor_size", "batch_size", "shard_chunks"):
            value = arguments.whole(name, getattr(self, name), DatastoreInputError, most=_MOST_CHUNKS)
            object.__setattr__(self, name, value)
        if not self.chunk_size <= self.neighbor_size <= MAX_TOKENS:
            raise DatastoreInputError(
                f"neighbor_size is {self.neighbor_size:,}, but a neighbor contains its whole chunk. Pass a number from chunk_size="
                f"{self.chunk_size:,} to {MAX_TOKENS:,}; the paper uses 2 * chunk_size."
            )
        if self.index.factory != "auto":
            check_factory(self.index.factory, None, self.embedder.dim)


class Built(NamedTuple):
    """What a build has made of documents: shards, where the documents come from, and how many had no text."""

    shards: list[BuiltShard]
    sources: list[dict[str, Any]]
    num_empty: int


@contextmanager
def work_folder(path: Path, *, helps: bool = False) -> Iterator[Path]:
    """The folder of unfinished work on the datastore at `path`, locked for one process; those that help it take no lock.

    If the work stops, it is kept for the next call. Only after bad input that was found before any embedding, it is removed.

    Raises:
        DatastoreExistsError: if another process is writing the datastore, or the folder holds something else.
    """
    folder = building_folder(path)
    if os.path.lexists(folder) and (reason := _not_work(folder)):
        raise DatastoreExistsError(
            f"{str(folder)!r} is needed for unfinished work on {str(path)!r}, but {reason}. Move it away, or choose another path "
            "for the datastore."
        )
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not helps:
            lock.acquire()
    except Timeout as error:
        raise DatastoreExistsError(
            f"Another process is writing the datastore {str(path)!r} (it holds {str(folder / '.lock')!r}). Wait for it, or stop it "
            "and repeat the call, which resumes its work."
        ) from error
    except OSError as error:
        raise not_written(path, error) from error
    try:
        yield folder
    except BaseException as error:
        # An error of the input will come again, so only expensive work (keys) is worth keeping. Any other error, such as a
        # full disk or a killed worker, can go away.
        bad_input = isinstance(error, RetroError) and isinstance(error, (ValueError, FileNotFoundError))
        if helps:
            pass  # the work is that of all ranks
        elif any(folder.glob("keys-*" if bad_input else "[kst]*-*")):
            logger.warning(f"Unfinished work is kept in {str(folder)!r}; the same call resumes from it.")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, RetroError):
            raise not_written(path, error) from error
        raise
    else:
        if not helps:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()


def _not_work(folder: Path) -> str:
    """Why a path is not a folder of unfinished work; it would be removed at the end."""
    if not folder.is_dir():
        return "it is not a folder"
    others = sorted(file.name for file in folder.iterdir() if not _WORK.match(file.name))
    return f"it contains {others[0]!r}" if others else ""


def build_datastore(
    documents: DocumentReader, path: str | os.PathLike[str], options: BuildOptions, executor: Executor
) -> None:
    """Write the datastore of `documents` to the folder `path`. See [`RetroDatastore.build`]."""
    path = Path(os.path.abspath(new_path(path)))
    check_free(path)
    with work_folder(path, helps=not executor.is_main) as work:
        built = None
        with suppress(WorkRemovedError):  # below, a helper sees whether the store is there
            built = build_shards(documents, work, options, executor)
        if built is not None:
            _finish(path, work, built, options)
    # A helping rank is done before the first rank has put the store together.
    limit = time.monotonic() + getattr(executor, "timeout", math.inf)
    while not path.exists():
        if not work.exists():
            # The first rank removes the work once the store is there, or because it has failed. A shared folder may show the
            # one before the other.
            limit = min(limit, time.monotonic() + _SLOW_FOLDER_SECONDS)
        if time.monotonic() > limit:
            raise RetroError(
                f"The first rank did not put {str(path)!r} together within the timeout. See what it reports, and start the build "
                "again: it resumes."
            )
        time.sleep(_POLL_SECONDS)


def _finish(path: Path, work: Path, built: Built, options: BuildOptions) -> None:
    tokenizer, shards = options.tokenizer, built.shards
    with new_folder(path, within=work) as folder:
        tokenizer.save_pretrained(folder)
        shared = [describe_file(file, "tokenizer") for file in sorted(folder.iterdir())]
        DatastoreManifest(
            chunk_size=options.chunk_size,
            neighbor_size=options.neighbor_size,
            token_dtype=token_dtype(vocabulary_size(tokenizer)).name,  # type: ignore[arg-type]  # one of two names
            tokenizer=describe_tokenizer(tokenizer),
            embedder=describe_embedder(options.embedder),
            shards=tuple(shard.entry for shard in shards),
            files=(*(file for shard in shards for file in shard.link_into(folder)), *shared),
            next_shard=len(shards),
            num_empty_documents=built.num_empty,
            sources=unique_sources(built.sources),
            library_version=library_version(),
        ).write(folder)


def build_shards(
    reader: DocumentReader,
    work: Path,
    options: BuildOptions,
    executor: Executor,
    first_shard: int = 0,
    select: Callable[[Iterator[Document]], Iterator[Document]] | None = None,
) -> Built | None:
    """Make shards of documents in a work folder.

    Args:
        first_shard (`int`): number of the first shard.
        select (`Callable`, *optional*): yields the documents to take; it may take none of them.
    Returns:
        The shards; None in a process that only helps.
    """
    tokenizer, embedder, size = options.tokenizer, options.embedder, options.chunk_size
    dtype = token_dtype(vocabulary_size(tokenizer))
    versions = library_version(), str(FORMAT_VERSION)
    settings = digest_of(tokenizer_identity(tokenizer), str(size), str(dtype), *versions)
    embed = EmbedBlock(work, tokenizer, embedder, size, options.batch_size)
    write = WriteShard(work, embed, options.index.recall)
    tasks = (TokenizeBlock(work, tokenizer, size, dtype), embed, write)
    blocks: list[Block] = []

    def tokenize_calls() -> Iterator[Call]:
        for batch in batches(iter(reader) if select is None else select(iter(reader))):
            blocks.append(Block(len(blocks), content_digest(batch, settings)))
            yield Call(len(batch), (blocks[-1], batch))

    with executor.start(tasks) as run:

        def stage(number: int, calls: Iterable[Call], total: int | None, unit: str, desc: str) -> None:
            with progress_bar(options.show_progress, total=total, unit=unit, desc=desc) as progress:
                if progress.disable:  # a log gets one line per stage instead
                    logger.info(desc if total is None else f"{desc}: {counted(total, unit)}")
                run_stage(run, tasks, number, calls, progress)

        stage(0, tokenize_calls(), reader.total, "doc", "Tokenizing")
        blocks, counts, num_wordless = _checked_blocks(work, blocks, size, reader)
        if not blocks and (select is None or reader.num_empty == reader.num_read):
            raise DatastoreInputError(
                f"The input has {counted(reader.num_empty + num_wordless, 'document')}, none of them with text. Pass at least one "
                "with text."
            )
        _tell_input(num_wordless, reader)
        if not blocks:
            return Built([], reader.sources, reader.num_empty + num_wordless) if executor.is_main else None
        groups, sizes = _groups(blocks, counts, options.shard_chunks)
        check_num_shards(len(groups))
        total = sum(sizes)
        _tell_largest(np.concatenate(counts))
        # Planned before the long part of the work, so that an impossible index is refused first.
        plans = [plan_index(size, embedder.dim, options.index, total) for size in sizes]
        tell_plan(total, embedder, plans, options.batch_size)
        places = _looked_at(blocks, counts) if executor.is_main else []
        texts = [text for block, here in places for text in read_chunk_texts(work, block, tokenizer, size, here)]
        check_coverage(coverage_of(texts, embedder), size, is_final=False)

        calls = [Call(int(part.sum()), (block,)) for block, part in zip(blocks, counts, strict=True)]
        stage(1, calls, total, "chunk", "Embedding")
        if executor.is_main:
            keys = np.concatenate([embed.keys(block)[here] for block, here in places])
            check_coverage(coverage_of(texts, embedder, keys), size)

        shard_calls = []
        for number, (group, size, plan) in enumerate(zip(groups, sizes, plans, strict=True)):
            shard_calls.append(Call(size, (f"{first_shard + number:05d}", plan.factory, group)))
        kinds = " + ".join(dict.fromkeys(plan.factory for plan in plans))
        stage(2, shard_calls, total, "chunk", f"Indexing ({kinds})")
    if not executor.is_main:
        return None
    shards = [BuiltShard.read(write.output(*call.args)) for call in shard_calls]
    return Built(shards, reader.sources, reader.num_empty + num_wordless)


def _looked_at(blocks: list[Block], counts: list[np.ndarray]) -> list[tuple[Block, np.ndarray]]:
    """The chunks of which it is checked what their keys see: blocks, and positions of chunks (int64) in each."""
    ends = np.cumsum([part.sum() for part in counts])
    seen = looked_at(int(ends[-1]))
    parts = np.split(seen, np.searchsorted(seen, ends[:-1]))
    return [
        (block, part - start) for block, part, start in zip(blocks, parts, [0, *ends[:-1]], strict=True) if len(part)
    ]


def _checked_blocks(
    work: Path, blocks: list[Block], chunk_size: int, reader: DocumentReader
) -> tuple[list[Block], list[np.ndarray], int]:
    """The blocks that have chunks, the chunks of each document, and the number of documents without tokens.

    Raises:
        DatastoreInputError: if an id comes twice.
    """
    counts, hashes, num_wordless = [], [], 0
    kept = []
    for block in blocks:
        summary = read_summary(work, block, chunk_size)
        num_wordless += summary.num_wordless
        if len(summary.counts):
            kept.append(block)
            counts.append(summary.counts)
            hashes.append(summary.id_hashes)
    if hashes:
        _check_unique(work, kept, hashes, reader)
    return kept, counts, num_wordless


def _check_unique(work: Path, blocks: list[Block], hashes: list[np.ndarray], reader: DocumentReader) -> None:
    # Only hashes are held in memory; where two are equal, the ids themselves are read and compared.
    owner = np.repeat(np.arange(len(hashes)), [len(part) for part in hashes])
    everything = np.concatenate(hashes)
    order = np.argsort(everything, kind="stable")
    twice = np.flatnonzero(everything[order][1:] == everything[order][:-1])
    starts = np.cumsum([0, *(len(part) for part in hashes)])
    for place in twice:
        rows = [int(row) for row in order[place : place + 2]]
        first, second = (
            read_documents(work, blocks[owner[row]]).slice(row - starts[owner[row]], 1).to_pylist()[0] for row in rows
        )
        if first["id"] != second["id"]:
            continue
        # The input is read again to name files and lines; an iterator is exhausted by now.
        places = list(islice((one.where for one in reader.again() if one.id == first["id"]), 2))
        if len(places) < 2:
            sources = first["source"], second["source"]
            places = [f"document {row} (source {source!r})" for row, source in zip(rows, sources, strict=True)]
        raise DatastoreInputError(
            f"Two documents have the id {first['id']!r}: {' and '.join(places)}. Make the ids unique, or leave them out: "
            "documents are found, excluded and deleted by id."
        )


def _tell_input(num_wordless: int, reader: DocumentReader) -> None:
    if num_empty := reader.num_empty + num_wordless:
        logger.warning(f"Skipped {num_empty:,} of {counted(reader.num_read, 'document')} without text.")
    reader.warn_of_repairs()


def _tell_largest(counts: np.ndarray) -> None:
    """Warn if most chunks (int64, of each document) are of one document, from which its own text must not read."""
    total, largest = int(counts.sum()), int(counts.max())
    if total > 1 and (len(counts) == 1 or (total >= _MANY_CHUNKS and 2 * largest > total)):
        logger.warning(
            f"One of {counted(len(counts), 'document')} has {largest:,} of {counted(total, 'chunk')} ({largest / total:.0%}). In training "
            "and evaluation a chunk reads nothing of its own document, so these chunks find "
            f"{'nothing at all' if len(counts) == 1 else 'little'} in this datastore. Divide the text into several documents: with "
            '`split="heading"`, "paragraph" or "line" (`--split heading`), or by hand.'
        )


def _groups(
    blocks: list[Block], counts: list[np.ndarray], shard_chunks: int
) -> tuple[list[tuple[BlockPart, ...]], list[int]]:
    """Divide documents into shards of about equal size; returns the shards and their numbers of chunks.

    A shard has at most `shard_chunks` chunks, unless it consists of a single longer document.
    """
    starts = np.cumsum([0, *(len(part) for part in counts)])
    before = np.cumsum(np.concatenate([[0], *counts]))  # chunks before each document, and in all
    total, num_documents = int(before[-1]), len(before) - 1
    # As few shards as the limit allows, and all of about the same size: 10 chunks with at most 4 per shard make three shards
    # that aim at 4, 4 and 2, and 9 chunks three of 3.
    aim = -(-total // -(-total // shard_chunks))
    groups, sizes, first = [], [], 0
    while first < num_documents:
        # Documents stay whole: the shard ends with the document that reaches the aim, or before it if that is too long.
        reached = int(np.searchsorted(before, before[first] + aim))
        fitting = int(np.searchsorted(before, before[first] + shard_chunks, side="right")) - 1
        last = min(max(first + 1, min(reached, fitting)), num_documents)
        parts = []
        for place in range(int(np.searchsorted(starts, first, side="right")) - 1, int(np.searchsorted(starts, last))):
            begin, end = max(first, int(starts[place])), min(last, int(starts[place + 1]))
            parts.append(BlockPart(blocks[place], begin - int(starts[place]), end - int(starts[place])))
        groups.append(tuple(parts))
        sizes.append(int(before[last] - before[first]))
        first = last
    return groups, sizes
