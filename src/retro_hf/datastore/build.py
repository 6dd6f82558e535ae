"""Building shards in stages, tokens → keys → index, each block by block, so that a stopped build goes on."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from transformers.utils import logging

from ..errors import (
    DatastoreExistsError,
    DatastoreInputError,
    RetroError,
    counted,
)
from .blocks import (
    Block,
    BlockPart,
    EmbedBlock,
    TokenizeBlock,
    batches,
    content_digest,
    digest_of,
    documents_path,
    read_summary,
    read_token_block,
    tokenizer_identity,
)
from .chunks import token_dtype, vocabulary_size
from .documents import DocumentReader
from .executors import Call, Executor, progress_bar, run_stage
from .manifest import MAX_TOKENS, DatastoreManifest, check_num_shards, new_path
from .origins import describe_embedder, describe_tokenizer, library_version, unique_sources
from .policy import IndexOptions, check_factory, plan_index, tell_plan
from .storage import building_folder, check_free, new_folder, not_written
from .writer import BuiltShard, ShardWriter, describe_file


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .embedder import ChunkEmbedder

__all__ = ["BuildOptions", "build_datastore", "build_shards", "work_folder"]

logger = logging.get_logger(__name__)

_POLL_SECONDS = 0.1
# Names in a folder of unfinished work: blocks, shards, and what is hidden, such as the lock.
_WORK = re.compile(r"\.|(tokens|documents|keys|shard)-")


@dataclass(frozen=True)
class BuildOptions:
    """What a build is made with, apart from the documents. See [`RetroDatastore.build`]."""

    tokenizer: PreTrainedTokenizerBase
    embedder: ChunkEmbedder
    chunk_size: int
    neighbor_size: int
    index: IndexOptions
    batch_size: int
    shard_chunks: int
    show_progress: bool | None

    def __post_init__(self) -> None:
        for name, value, method in (("tokenizer", self.tokenizer, "get_vocab"), ("embedder", self.embedder, "embed")):
            if not hasattr(value, method):
                raise DatastoreInputError(
                    f"The {name} is of type {type(value).__name__}. Pass the {name} itself, or its folder or Hub name."
                )
        for name in ("chunk_size", "neighbor_size", "batch_size", "shard_chunks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DatastoreInputError(f"{name} is {value!r}, but it must be an integer of at least 1.")
        if self.neighbor_size > MAX_TOKENS:
            raise DatastoreInputError(
                f"neighbor_size is {self.neighbor_size:,}, more than the {MAX_TOKENS:,} tokens that a manifest allows. The paper uses 128."
            )
        if self.neighbor_size < self.chunk_size:
            raise DatastoreInputError(
                f"neighbor_size={self.neighbor_size} is below chunk_size={self.chunk_size}, but a neighbor holds its "
                f"whole chunk and what follows it. Use at least {self.chunk_size}; the paper uses {2 * self.chunk_size}."
            )
        if self.index.factory != "auto":
            check_factory(self.index.factory, None, self.embedder.dim)


@contextmanager
def work_folder(path: Path, *, helps: bool = False) -> Iterator[Path]:
    """The folder of unfinished work on the datastore at `path`, for one process, and those that help it.

    Bad input leaves nothing behind unless keys have been computed; whatever else stops the work leaves all of it.

    Raises:
        DatastoreExistsError: if another process is at work there, or something else lies there, which stays.
    """
    folder = building_folder(path)
    if os.path.lexists(folder) and (strange := _not_work(folder)):
        raise DatastoreExistsError(
            f"{str(folder)!r} is where unfinished work on the datastore {str(path)!r} is kept, and removed in the end, but {strange}. "
            "Move it elsewhere, or choose another path for the datastore."
        )
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not helps:
            lock.acquire()
    except Timeout as error:
        raise DatastoreExistsError(
            f"Another process is writing the datastore {str(path)!r} (it holds {str(folder / '.lock')!r}). Wait for it, or "
            "stop it; what it has done is kept, and used when the same call is made again."
        ) from error
    except OSError as error:
        raise not_written(path, error) from error
    try:
        yield folder
    except BaseException as error:
        # A full disk or a worker that was killed is no fault of the input.
        bad_input = isinstance(error, RetroError) and isinstance(error, (ValueError, FileNotFoundError))
        done = "keys-*" if bad_input else "[kst]*-*"
        kept = any(folder.glob(done))
        if kept:
            logger.warning(f"What was done so far is kept in {str(folder)!r}: the same call again goes on from there.")
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
    """What of a folder is no unfinished work, in words."""
    if not folder.is_dir():
        return "it is no folder"
    others = sorted(file.name for file in folder.iterdir() if not _WORK.match(file.name))
    return f"it holds {others[0]!r}, which is no part of any" if others else ""


def build_datastore(documents: Any, path: str | os.PathLike[str], options: BuildOptions, executor: Executor) -> None:
    """Write the datastore of `documents` to the folder `path`. See [`RetroDatastore.build`] for the arguments."""
    path = Path(os.path.abspath(new_path(path)))
    check_free(path)
    with work_folder(path, helps=not executor.is_main) as work:
        built = build_shards(documents, work, options, executor)
        if built is not None:
            _finish(path, work, *built, options)
    # Whoever helps is done before the store is.
    while not path.exists():
        time.sleep(_POLL_SECONDS)


def _finish(
    path: Path,
    work: Path,
    shards: list[BuiltShard],
    sources: list[dict[str, Any]],
    num_empty: int,
    options: BuildOptions,
) -> None:
    """Put shards, tokenizer and manifest together in a folder, and give it its name."""
    tokenizer, embedder = options.tokenizer, options.embedder
    with new_folder(path, within=work) as folder:
        tokenizer.save_pretrained(folder)
        shared = [describe_file(file, "tokenizer") for file in sorted(folder.iterdir())]
        for shard in shards:
            shard.link_into(folder)
        DatastoreManifest(
            chunk_size=options.chunk_size,
            neighbor_size=options.neighbor_size,
            token_dtype=str(token_dtype(vocabulary_size(tokenizer))),
            tokenizer=describe_tokenizer(tokenizer),
            embedder=describe_embedder(embedder),
            shards=tuple(shard.entry for shard in shards),
            files=(*(file for shard in shards for file in shard.files), *shared),
            next_shard=len(shards),
            num_empty_documents=num_empty,
            sources=unique_sources(sources),
            library_version=library_version(),
        ).write(folder)


def build_shards(
    documents: Any,
    work: Path,
    options: BuildOptions,
    executor: Executor,
    first_shard: int = 0,
    taken: Callable[[list[str]], np.ndarray] | None = None,
) -> tuple[list[BuiltShard], list[dict[str, Any]], int] | None:
    """Make shards of documents in a work folder.

    Args:
        first_shard (`int`): number of the first shard.
        taken (`Callable`, *optional*): says which ids cannot be used, by a number that is not -1 for each.
    Returns:
        The shards, the sources, and how many documents had no text; None where another process puts them together.
    """
    tokenizer, embedder, size = options.tokenizer, options.embedder, options.chunk_size
    reader = DocumentReader(documents)
    dtype = token_dtype(vocabulary_size(tokenizer))
    settings = digest_of(tokenizer_identity(tokenizer), str(size), str(dtype), library_version())
    embed = EmbedBlock(work, tokenizer, embedder, size, options.batch_size)
    write = WriteShard(work, embed, options.index.recall)
    tasks = (TokenizeBlock(work, tokenizer, size, dtype), embed, write)
    blocks: list[Block] = []

    def tokenize_calls() -> Iterator[Call]:
        for batch in batches(iter(reader)):
            blocks.append(Block(len(blocks), content_digest(batch, settings)))
            yield Call(len(batch), (blocks[-1], batch))

    with executor.start(tasks) as run:

        def stage(number: int, calls: Iterable[Call], total: int | None, unit: str, desc: str) -> None:
            with progress_bar(options.show_progress, total=total, unit=unit, desc=desc) as progress:
                if progress.disable:  # a log gets a line instead
                    logger.info(desc if total is None else f"{desc}: {counted(total, unit)}")
                run_stage(run, tasks, number, calls, progress)

        stage(0, tokenize_calls(), reader.total, "doc", "Tokenizing")
        blocks, counts, num_wordless = _counted(work, blocks, size, documents)
        num_empty = reader.num_empty + num_wordless
        _tell_input(len(blocks), num_empty, reader)
        if taken is not None:
            _check_taken(work, blocks, taken)
        groups, sizes = _groups(blocks, counts, options.shard_chunks)
        check_num_shards(len(groups))
        total = sum(sizes)
        # Planned before the long part of the work, so that what cannot be built is refused first.
        plans = [plan_index(size, embedder.dim, options.index, total) for size in sizes]
        tell_plan(total, embedder, plans, options.batch_size)

        calls = [Call(int(part.sum()), (block,)) for block, part in zip(blocks, counts, strict=True)]
        stage(1, calls, total, "chunk", "Embedding")

        shard_calls = []
        for number, (group, size, plan) in enumerate(zip(groups, sizes, plans, strict=True)):
            shard_calls.append(Call(size, (f"{first_shard + number:05d}", plan.factory, group)))
        kinds = " + ".join(dict.fromkeys(plan.factory for plan in plans))
        stage(2, shard_calls, total, "chunk", f"Indexing ({kinds})")
    if not executor.is_main:
        return None
    return [BuiltShard.read(write.output(*call.args)) for call in shard_calls], reader.sources, num_empty


def _counted(
    work: Path, blocks: list[Block], chunk_size: int, documents: Any
) -> tuple[list[Block], list[np.ndarray], int]:
    """The blocks that have chunks, the chunks of each document, and how many had no token; refuses ids that come twice."""
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
        _check_ids(work, kept, hashes, documents)
    return kept, counts, num_wordless


def _check_ids(work: Path, blocks: list[Block], hashes: list[np.ndarray], documents: Any) -> None:
    owner = np.repeat(np.arange(len(hashes)), [len(part) for part in hashes])
    everything = np.concatenate(hashes)
    order = np.argsort(everything, kind="stable")
    twice = np.flatnonzero(everything[order][1:] == everything[order][:-1])
    starts = np.cumsum([0, *(len(part) for part in hashes)])
    for place in twice:
        rows = [int(row) for row in order[place : place + 2]]
        first, second = (
            pq.read_table(documents_path(work, blocks[owner[row]])).slice(row - starts[owner[row]], 1).to_pylist()[0]
            for row in rows
        )
        if first["id"] == second["id"]:
            # Read again for the file and line; an iterator has been used up.
            places = list(islice((one.where for one in DocumentReader(documents) if one.id == first["id"]), 2))
            if len(places) < 2:
                places = [
                    f"number {rows[0]} (source {first['source']!r})",
                    f"number {rows[1]} (source {second['source']!r}), counted from 0 without those that are empty",
                ]
            raise DatastoreInputError(
                f"Two documents have the id {first['id']!r}: {' and '.join(places)}. Documents are found, excluded and "
                "deleted by id: make the ids unique, or leave them out."
            )


def _check_taken(work: Path, blocks: list[Block], taken: Callable[[list[str]], np.ndarray]) -> None:
    for block in blocks:
        ids = pq.read_table(documents_path(work, block), columns=["id"]).column("id").to_pylist()
        found = np.flatnonzero(taken(ids) >= 0)
        if len(found):
            raise DatastoreInputError(
                f"The datastore has a document with the id {ids[found[0]]!r} already, and {len(found) - 1} more of the ids to "
                "be added. Documents are found, excluded and deleted by id: delete the old ones first, or give the new ones "
                "ids of their own (a text without an id is numbered from 0). If the same call was stopped before, it may have been "
                "done: then all of them are there."
            )


def _tell_input(num_blocks: int, num_empty: int, reader: DocumentReader) -> None:
    if not num_blocks:
        raise DatastoreInputError(
            f"There is nothing to build a datastore from: the input has {counted(num_empty, 'document')}, none with text."
            if num_empty
            else "There is nothing to build a datastore from: the input has no documents."
        )
    if num_empty:
        logger.warning(f"Skipped {num_empty:,} of {counted(reader.num_read, 'document')} for lack of text.")
    reader.warn_of_repairs()


def _groups(
    blocks: list[Block], counts: list[np.ndarray], shard_chunks: int
) -> tuple[list[tuple[BlockPart, ...]], list[int]]:
    """Documents by shards of about equal size, and that size.

    A shard has at most `shard_chunks` chunks, unless it is of a single document that has more.
    """
    starts = np.cumsum([0, *(len(part) for part in counts)])
    before = np.cumsum(np.concatenate([[0], *counts]))  # chunks before each document, and in all
    total, num_documents = int(before[-1]), len(before) - 1
    aim = -(-total // -(-total // shard_chunks))
    groups, sizes, first = [], [], 0
    while first < num_documents:
        reached = int(np.searchsorted(before, before[first] + aim))
        fitting = int(np.searchsorted(before, before[first] + shard_chunks, side="right")) - 1
        last = min(max(first + 1, min(reached, fitting)), num_documents)
        here = range(int(np.searchsorted(starts, first, side="right")) - 1, int(np.searchsorted(starts, last)))
        groups.append(
            tuple(
                BlockPart(
                    blocks[place],
                    max(first - int(starts[place]), 0),
                    min(last, int(starts[place + 1])) - int(starts[place]),
                )
                for place in here
            )
        )
        sizes.append(int(before[last] - before[first]))
        first = last
    return groups, sizes


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
