"""Whether retrieval helps a model on some documents, and by what: everything that is measured, in one call."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..datastore import RetroDatastore
from ..datastore.derive import drawn_documents
from ..datastore.executors import progress_bar
from ..errors import DatasetError, counted
from ..retriever import RetroRetriever
from ..training.neighbors import wanted_neighbors
from .folder import BLOCKS, claim_folder
from .kept import KeptBlocks
from .measure import LEAKAGE_NEIGHBORS, make_table, score_runs
from .modes import MODES, Chunks, Lookup, Run, as_many, oracle_neighbors, random_neighbors, shuffled_neighbors
from .presence import copied_documents, leaked_documents
from .provenance import provenance, score_settings
from .result import CopiedDocument, Evaluation, Inputs, LeakedDocument
from .scoring import Document, check_numbers, checked_window, read_documents, reads_neighbors
from .summary import summarize


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["evaluate"]

_COMPARED = ("off", "on", "random")


def evaluate(
    model: PreTrainedModel,
    documents: Iterable[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    retriever: RetroRetriever | None = None,
    modes: Sequence[str] | None = None,
    num_neighbors: int | None = None,
    num_neighbors_sweep: Sequence[int] = (),
    fractions: Sequence[float] = (),
    output: str | os.PathLike[str] | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    num_resamples: int = 2000,
    show_progress: bool | None = None,
) -> Evaluation:
    """Measure whether retrieval helps, whether it is copying, and how much of the datastore it needs.

    The same tokens are scored with different neighbors: none (`off`), those found (`on`), as many chunks of the datastore
    drawn blindly (`random`), those of another chunk of the document (`shuffled`), and what is found for the very chunk to be
    predicted (`oracle`, which is cheating: what a perfect retriever might bring). Every token but the first of each document
    is scored once, in windows that overlap; see [`bits_per_byte`], whose totals are the same. Everything else is arithmetic
    over the scores of these tokens: the leakage filter of section 2.6 of Borgeaud et al. (2022), the gain by overlap and by
    place in the chunk. Sweeps score again with other neighbors; the model is not trained.

    Documents of which the datastore has at least 80 % (13-grams of tokens in one document) are reported, and not scored; nor
    are those of which another document to score has as much. Intervals draw only documents of which a token could read a
    neighbor: those of [`bits_per_byte`], which draws what it is given, differ where there are others.

    Args:
        model ([`RetroForCausalLM`], or without a retriever any causal language model): it is put into eval mode while
            measuring.
        documents (iterable of `str`, or of `dict` with `text` and perhaps `id`, such as a `datasets.Dataset`): held out.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's, a fast one.
        retriever ([`RetroRetriever`], *optional*): where neighbors come from; without one only `off` is measured.
        modes (`Sequence[str]`, *optional*): keys of [`MODES`]; all by default. With a retriever `off`, `on` and `random`
            must be among them, for the verdict compares these.
        num_neighbors (`int`, *optional*): neighbors per chunk; the retriever's number by default.
        num_neighbors_sweep (`Sequence[int]`, *optional*): other numbers of neighbors to score `on` with.
        fractions (`Sequence[float]`, *optional*): shares of the datastore's documents, above 0 and at most 1, to score `on`
            with. They are those of [`RetroDatastore.subset`] with the same seed: drawn by id, and nested.
        output (`str` or `Path`, *optional*): a folder for `evaluation.json`, `tokens.parquet` and `documents.parquet`, and
            for finished work: the same call goes on where a killed one was, and one that asks for more computes only that;
            the files are then those of the last call.
        window, stride, batch_size, num_resamples, show_progress: as for [`bits_per_byte`].
        seed (`int`, defaults to 0): of random and shuffled neighbors, of fractions and of the bootstrap.
    Returns:
        [`Evaluation`]: its `verdict` first; `print` shows all of it.
    Raises:
        DatasetError: if there is nothing to score, every document is in the datastore, or an id has two texts.
        DatastoreMismatchError: if the datastore is of another tokenizer or chunk size than the model.
        FileExistsError: if `output` has files of something else, or of another model, datastore or documents.
        ValueError: for a model without retrieval, unknown modes, or settings out of range.
    *Determinism*: the same call gives the same numbers; a resumed one the same `tokens.parquet`, byte by byte.
    *Disk*: 4 bytes per token and kind of neighbors, twice, and 4 bytes per chunk and dimension of the embedder.
    """
    begin = time.perf_counter()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    check_numbers(batch_size=(batch_size, 1), num_resamples=(num_resamples, 1), seed=(seed, 0))
    names = _checked_modes(model, retriever, modes)
    datastore = None if retriever is None else retriever.datastore
    chunk_size = getattr(model.config, "chunk_size", None) or 1
    if datastore is not None:
        datastore.check_compatible(tokenizer=tokenizer, chunk_size=chunk_size)
    window, stride = checked_window(model, window, stride, chunk_size)
    count = wanted_neighbors(retriever, num_neighbors)
    _check_sweeps(retriever, num_neighbors_sweep, fractions)
    folder = None if output is None else Path(output)

    read = list(read_documents(documents, tokenizer))
    settings = score_settings(model, datastore)
    origin = provenance(model, settings, datastore, read)
    if folder is not None:
        claim_folder(folder, origin)
    kept = KeptBlocks(None if folder is None else folder / BLOCKS)
    scored, copies, leaked = _scorable(read, datastore, show_progress)
    chunks = Chunks.of(scored, chunk_size)
    runs = {"off": Run("off", None)}
    nearest, given, num_same_id = None, None, 0
    if retriever is not None:
        widest = max(count, *num_neighbors_sweep, LEAKAGE_NEIGHBORS)
        with progress_bar(show_progress, total=len(chunks.rows), unit="chunk", desc="Looking up") as bar:
            lookup = Lookup(retriever, scored, chunks, kept, bar)
        nearest, num_same_id = lookup.nearest(widest), lookup.num_same_id
        runs = {run.name: run for run in _runs(lookup, nearest, names, count, num_neighbors_sweep, fractions, seed)}
        given = chunks.given(runs["on"].chunk_ids or [])

    nats = score_runs(
        model,
        scored,
        list(runs.values()),
        datastore,
        window=window,
        stride=stride,
        batch_size=batch_size,
        kept=kept,
        settings=settings,
        show_progress=show_progress,
    )
    table = make_table(scored, chunks, nats, num_resamples, seed, datastore, nearest, given)
    inputs = Inputs(
        num_documents=len(scored),
        num_chunks=len(np.unique(table.chunk)),
        num_tokens=len(table.document),
        num_bytes=int(table.num_bytes.sum(dtype=np.int64)),
        num_unscorable=len(read) - len(scored) - len(copies) - len(leaked),
        num_short=0 if datastore is None else sum(len(one.input_ids) <= chunk_size for one in scored),
        num_same_id=num_same_id,
        leaked=leaked,
        copies=copies,
    )
    origin |= {
        "seed": seed,
        "window": window,
        "stride": stride,
        "batch_size": batch_size,
        "num_resamples": num_resamples,
        "started": started,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    result = summarize(table, runs, scored, chunks, datastore, tokenizer, inputs, origin)
    if folder is not None:
        table.write(folder, scored)
        result.save(folder)
    return result


def _checked_modes(
    model: PreTrainedModel, retriever: RetroRetriever | None, modes: Sequence[str] | None
) -> tuple[str, ...]:
    """The modes to measure, OFF first."""
    if isinstance(modes, str):
        raise ValueError(f"modes is the text {modes!r}; give a list of {list(MODES)}.")
    unknown = [mode for mode in modes or () if mode not in MODES]
    if unknown:
        raise ValueError(f"Unknown modes {unknown}; there are {list(MODES)}.")
    if retriever is None:
        if modes is not None and set(modes) != {"off"}:
            raise ValueError(
                f"The modes {list(modes)} need neighbors: pass `retriever=`, or measure `modes=('off',)`."
            )
        return ("off",)
    if not isinstance(retriever, RetroRetriever):
        raise ValueError(
            f"The retriever is a {type(retriever).__name__}, but what it finds must be known by chunk id: make a "
            "`RetroRetriever(datastore, embedder=...)`, or one with a searcher of your own, `RetroRetriever(datastore, "
            "searcher=...)`."
        )
    if not reads_neighbors(model):
        raise ValueError(
            f"{type(model).__name__} has no retrieval: it takes no neighbors, so ON would be OFF. Make a RETRO model of it with "
            "`retrofit`, and train that; or measure it alone, without `retriever=`."
        )
    wanted = tuple(MODES) if modes is None else tuple(mode for mode in MODES if mode in modes)
    if not set(_COMPARED) <= set(wanted):
        raise ValueError(
            f"The modes are {list(wanted)}, but the verdict compares {list(_COMPARED)}: only 'shuffled' and 'oracle' can be "
            "left out. `bits_per_byte` measures any of off, on and random alone."
        )
    return wanted


def _check_sweeps(retriever: RetroRetriever | None, num_neighbors: Sequence[int], fractions: Sequence[float]) -> None:
    if retriever is None and (num_neighbors or fractions):
        raise ValueError("A sweep over neighbors or fractions needs neighbors: pass `retriever=`.")
    for name, given in (("num_neighbors_sweep", num_neighbors), ("fractions", fractions)):
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ValueError(f"{name} is {given!r}, but it must be a list of numbers.")
    for number in num_neighbors:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(
                f"num_neighbors_sweep has {number!r}, but a number of neighbors is an integer of at least 1."
            )
    for fraction in fractions:
        if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ValueError(
                f"fractions has {fraction!r}, but a fraction is above 0 and at most 1; 0 is the mode 'off'."
            )


def _scorable(
    read: Sequence[Document], datastore: RetroDatastore | None, show_progress: bool | None
) -> tuple[list[Document], list[CopiedDocument], list[LeakedDocument]]:
    """The documents to score; of the rest the copies of others, and those that are in the datastore."""
    numbers = [number for number, document in enumerate(read) if document.num_bytes]
    if not numbers:
        named = [f" The first is {document.id}." for document in read[:1] if document.id is not None]
        raise DatasetError(
            f"There is nothing to score: no document of {len(read):,} has two tokens, so that one could be predicted."
            f"{''.join(named)} Evaluate longer texts."
        )
    leaked: dict[int, LeakedDocument] = {}
    if datastore is not None:
        with progress_bar(show_progress, total=datastore.num_documents, unit="doc", desc="Looking for leakage") as bar:
            leaked = leaked_documents([read[number] for number in numbers], datastore, bar)
    if len(leaked) == len(numbers):
        raise DatasetError(
            f"In the datastore there are all of {counted(len(leaked), 'document')}, the first as {leaked[0].stored_id!r} ({leaked[0].contained:.0%} of it): "
            "their text would be looked up, not predicted. Evaluate on documents that were held out, or delete these from "
            "the datastore (`retro delete`)."
        )
    numbers = [number for place, number in enumerate(numbers) if place not in leaked]
    names = [f"document {number}" if read[number].id is None else str(read[number].id) for number in numbers]
    copies = copied_documents([read[number] for number in numbers], names)
    numbers = [number for place, number in enumerate(numbers) if place not in copies]
    _check_ids(read, numbers)
    scored = [read[number] for number in numbers]
    return scored, [copies[place] for place in sorted(copies)], [leaked[place] for place in sorted(leaked)]


def _check_ids(read: Sequence[Document], numbers: Sequence[int]) -> None:
    """Other text under the same id is a part of a document, or another one by mistake; intervals draw whole documents."""
    first: dict[str, int] = {}
    for number in numbers:
        id = read[number].id
        if id is not None and first.setdefault(id, number) != number:
            raise DatasetError(
                f"Two documents have the id {id!r}, but other text: number {first[id]} and number {number}, counted from 0. "
                "Intervals draw whole documents. If these are parts of one, join their texts; if not, make the ids unique, "
                "or leave them out."
            )


def _runs(
    lookup: Lookup,
    nearest: np.ndarray,
    names: Sequence[str],
    count: int,
    sweep: Sequence[int],
    fractions: Sequence[float],
    seed: int,
) -> list[Run]:
    """Every mode and every point of the sweeps, with its chunk ids."""
    chunks, datastore = lookup.chunks, lookup.retriever.datastore
    complete = chunks.complete_by_document(nearest)
    on = [ids[:, :count] for ids in complete]
    random = random_neighbors(datastore, chunks.complete.tolist(), count, seed)
    by_mode = {
        "off": None,
        "on": on,
        "random": as_many(random, on),
        "shuffled": shuffled_neighbors(on, seed),
        "oracle": oracle_neighbors(datastore, chunks.by_document(nearest[:, :count]), chunks.complete.tolist()),
    }
    size: dict[str, Any] = {
        "num_documents": datastore.num_documents - datastore.num_deleted_documents,
        "num_chunks": datastore.num_chunks,
    }
    runs = [Run(name, by_mode[name], 0 if name == "off" else count, **size) for name in names]
    runs += [
        Run(f"k={number}", [ids[:, :number] for ids in complete], number, **size) for number in sorted(set(sweep))
    ]
    for fraction in sorted(set(fractions)):
        index = datastore.restricted_to(drawn_documents(datastore, fraction, seed))
        ids = chunks.complete_by_document(lookup.nearest(count, index))
        runs.append(Run(f"fraction={fraction:g}", ids, count, fraction, index.num_documents, index.num_chunks))
    return runs
