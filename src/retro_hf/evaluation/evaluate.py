"""Whether retrieval helps a model on some documents, and how: everything that is measured, in one call."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import listed, path, real, shown, whole
from ..datastore import RetroDatastore
from ..datastore.bos_eos import Borders
from ..datastore.derive import drawn_documents
from ..errors import DatasetError, counted
from ..retriever import RetroRetriever
from ..training.search import MOST_NEIGHBORS, wanted_neighbors
from ..unwrapped import unwrapped
from .cache import ArrayCache
from .in_context import score_in_context
from .interval import Bootstrap, checked_resamples
from .leakage import copied_documents, leaked_documents
from .neighbors import MODES, Chunks, NeighborSearch, Run, check_modes, neighbors_by_mode
from .provenance import claim_folder, provenance, score_identity
from .result import CopiedDocument, Evaluation, Inputs, LeakedDocument
from .scoring import (
    ScoringOptions,
    TokenizedDocument,
    accepts,
    chunk_size_of,
    cut_windows,
    read_documents,
    score_runs,
)
from .summary import Measured, summarize
from .token_table import LEAKAGE_NEIGHBORS, TokenTable


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    add_bos: bool | None = None,
    add_eos: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    num_resamples: int = 2000,
    show_progress: bool | None = None,
) -> Evaluation:
    """Measure whether retrieval helps, whether it is copying, and how much of the datastore it needs.

    The same tokens are scored with different neighbors ([`MODES`]): none (`off`), those found (`on`), random chunks
    (`random`), those of another chunk of the document (`shuffled`), and those found for the chunk that is to be predicted
    (`oracle`, which is cheating: it shows how much a better retriever might gain, but is not an upper bound). On request the
    base model alone reads the neighbors of `on` in its prompt (`in_context`, a prompt for every chunk). Every token but the
    first of each document is scored once, in overlapping windows; the totals are those of [`bits_per_byte`]. Everything else
    is arithmetic over these scores: the leakage filter of section 2.6 of Borgeaud et al. (2022), the gain by overlap and by position in the
    chunk. Sweeps score the same model again with other neighbors.

    Documents of which the datastore has at least 80 % (13-grams of tokens in one stored document) are reported and not
    scored, and so are copies of other documents. Intervals are over documents of which a token could read a neighbor.

    Args:
        model ([`RetroForCausalLM`], or without a retriever any causal language model): put into eval mode while measuring.
        documents (iterable of `str`, or of `dict` with `text` and optionally `id`, such as a `datasets.Dataset`): held-out
            documents.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's fast tokenizer.
        retriever ([`RetroRetriever`], *optional*): finds the neighbors. Without one only `off` is measured.
        modes (`Sequence[str]`, *optional*): keys of [`MODES`], by default all but `in_context`. With a retriever `off`, `on` and `random`
            must be among them, because the verdict compares them.
        num_neighbors (`int`, *optional*): neighbors per chunk; by default the retriever's.
        num_neighbors_sweep (`Sequence[int]`, *optional*): other numbers of neighbors to score `on` with.
        fractions (`Sequence[float]`, *optional*): shares of the datastore's documents, above 0 and at most 1, to score
            `on` with. They are those of [`RetroDatastore.subset`] with the same seed.
        output (`str` or `Path`, *optional*): folder for `evaluation.json`, `tokens.parquet`, `documents.parquet` and
            finished work. The same call resumes after a crash; a call that asks for more computes only what is new.
        window, stride, add_bos, add_eos, batch_size, num_resamples, show_progress: as for [`bits_per_byte`].
        seed (`int`, defaults to 0): seed of random and shuffled neighbors, of fractions and of the bootstrap.
    Returns:
        [`Evaluation`]: `print` shows all of it, `verdict` first.
    Raises:
        DatasetError: if there is nothing to score, every document is in the datastore, or an id has two texts.
        DatastoreMismatchError: if the datastore has another tokenizer or chunk size than the model.
        FileExistsError: if `output` has files of something else, or of another model, datastore or documents.
        ValueError: for a model without retrieval, unknown modes, or settings out of range.
    *Determinism*: the same call gives the same numbers; a resumed call gives the same `tokens.parquet`, byte by byte.
    *Disk*: 4 bytes per token and kind of neighbors, twice, and 4 bytes per chunk and dimension of the embedder.
    """
    begin = time.perf_counter()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    batch_size = whole("batch_size", batch_size, ValueError)
    num_resamples, seed = checked_resamples(num_resamples, seed)
    model = unwrapped(model)
    names = _checked_modes(model, retriever, modes)
    output = None if output is None else path("output", output, ValueError)
    num_neighbors_sweep, fractions = _checked_sweeps(retriever, num_neighbors_sweep, fractions)
    datastore = None if retriever is None else retriever.datastore
    chunk_size = chunk_size_of(model)
    if datastore is not None:
        datastore.check_compatible(tokenizer=tokenizer, chunk_size=chunk_size)
    options = ScoringOptions.checked(
        model, chunk_size, window, stride, batch_size=batch_size, show_progress=show_progress
    )
    count = wanted_neighbors(retriever, num_neighbors)

    borders = Borders.of(tokenizer, add_bos, add_eos)
    read = list(read_documents(documents, tokenizer, borders))
    identity = score_identity(model, datastore)
    origin = provenance(model, identity, datastore, read, borders)
    # The folder is claimed before anything is searched or scored. It is claimed with the fingerprint of the documents.
    cache = ArrayCache()
    if output is not None:
        claim_folder(output, origin)
        cache = ArrayCache(output / "blocks")
    scored, copies, leaked = _scorable(read, datastore, show_progress)
    chunks = Chunks.of(scored, chunk_size)
    # One search serves every mode and the sweep over neighbors: its best `k` are the first `k` columns. Only a part of the
    # datastore must be searched again.
    runs, found, num_same_id = {"off": Run("off", None)}, None, 0
    if retriever is not None:
        search = NeighborSearch(retriever, scored, chunks, cache=cache, show_progress=show_progress)
        nearest, num_same_id = search.nearest(max(count, *num_neighbors_sweep, LEAKAGE_NEIGHBORS)), search.num_same_id
        runs = _runs(search, nearest, names, count, seed) | _sweeps(search, nearest, num_neighbors_sweep)
        runs |= _fractions(search, count, fractions, seed)
        found = (retriever.datastore, nearest, chunks.read_by_each(runs["on"].chunk_ids or []))

    options = replace(options, cache=cache, identity=identity)
    nats, prompted = score_runs(model, scored, list(runs.values()), datastore, options), None
    if "in_context" in names and datastore is not None:
        on, separator = runs["on"], tokenizer("\n", add_special_tokens=False)["input_ids"]
        runs["in_context"] = replace(on, name="in_context")
        prompted = score_in_context(
            _base(model), scored, (datastore, on.chunk_ids or []), nats["off"], separator, options
        )
        nats["in_context"] = prompted.nats
    table = TokenTable.of(scored, chunks, nats, Bootstrap(num_resamples, seed), found)
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
        "window": options.window,
        "stride": options.stride,
        "batch_size": batch_size,
        "num_resamples": num_resamples,
        "started": started,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    num_read = sum(part.end - part.start for part in cut_windows(scored, options.window, options.stride))
    read_by_each = None if found is None else found[2]
    measured = Measured(table, runs, scored, chunks, datastore, read_by_each, num_read, prompted)
    result = summarize(measured, tokenizer, inputs, origin)
    if output is not None:
        table.write(output, scored)
        result.save(output)
    return result


def _checked_modes(
    model: PreTrainedModel, retriever: RetroRetriever | None, modes: Sequence[str] | None
) -> tuple[str, ...]:
    """The modes to measure, OFF first."""
    if modes is not None:
        modes = check_modes(modes, list(MODES), has_neighbors=retriever is not None)
    if retriever is None:
        return ("off",)
    if not isinstance(retriever, RetroRetriever):
        raise ValueError(
            f"The retriever is a {type(retriever).__name__}, but `evaluate` needs chunk ids. Pass `RetroRetriever(datastore, "
            "embedder=...)`, or with a searcher of your own `RetroRetriever(datastore, searcher=...)`."
        )
    if not accepts(model, "neighbor_input_ids"):
        raise ValueError(
            f"{type(model).__name__} has no retrieval. Make a RETRO model of it with `retrofit` and train it, or measure it "
            "without `retriever=`."
        )
    wanted = tuple(mode for mode in MODES if (mode != "in_context" if modes is None else mode in modes))
    if "in_context" in wanted:
        _base(model)
    if not set(_COMPARED) <= set(wanted):
        raise ValueError(
            f"The modes are {list(wanted)}, but the verdict compares {list(_COMPARED)}. Leave out only 'shuffled' and "
            "'oracle', or use `bits_per_byte`."
        )
    return wanted


def _base(model: PreTrainedModel) -> PreTrainedModel:
    """The base of a RETRO model, which is a complete causal language model."""
    base = getattr(getattr(model, "base_model", None), "backbone", None)
    if base is None or base.get_output_embeddings() is None:
        raise ValueError(
            f"The mode 'in_context' needs the base of a RETRO model, but {type(model).__name__} has none with a language "
            "modeling head. Leave it out of `modes`."
        )
    return base


def _checked_sweeps(
    retriever: RetroRetriever | None, num_neighbors: Iterable[int], fractions: Iterable[float]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The numbers of neighbors and the fractions to score with."""
    numbers = tuple(
        whole("num_neighbors_sweep", one, ValueError, most=MOST_NEIGHBORS)
        for one in _listed("num_neighbors_sweep", num_neighbors)
    )
    shares = tuple(real("fractions", one, ValueError, least=0, most=1) for one in _listed("fractions", fractions))
    if retriever is None and (numbers or shares):
        raise ValueError("A sweep over neighbors or fractions needs neighbors. Pass `retriever=`.")
    if 0 in shares:
        raise ValueError("fractions has 0, but a fraction must be above 0 and at most 1.")
    return numbers, shares


def _listed(name: str, given: Any) -> list[Any]:
    if (found := listed(given)) is None:
        raise ValueError(f"{name} is {shown(given)}, but it must be a list of numbers.")
    return found


def _scorable(
    read: Sequence[TokenizedDocument], datastore: RetroDatastore | None, show_progress: bool | None
) -> tuple[list[TokenizedDocument], list[CopiedDocument], list[LeakedDocument]]:
    """The documents to score, those that are copies of others, and those that are in the datastore."""
    numbers = [number for number, document in enumerate(read) if document.num_bytes]
    if not numbers:
        named = f", such as {read[0].id!r}," if read and read[0].id is not None else ""
        raise DatasetError(
            f"There is nothing to score: each of {counted(len(read), 'document')}{named} has fewer than two tokens."
        )
    leaked: dict[int, LeakedDocument] = {}
    if datastore is not None:
        leaked = leaked_documents([read[number] for number in numbers], datastore, show_progress)
    if len(leaked) == len(numbers):
        raise DatasetError(
            f"The datastore has all of {counted(len(leaked), 'document')}, the first as {leaked[0].stored_id!r} "
            f"({leaked[0].contained:.0%} of it). Evaluate on held-out documents, or delete these from the datastore (`retro "
            "delete`)."
        )
    numbers = [number for place, number in enumerate(numbers) if place not in leaked]
    names = [f"document {number}" if read[number].id is None else str(read[number].id) for number in numbers]
    copies = copied_documents([read[number] for number in numbers], names)
    numbers = [number for place, number in enumerate(numbers) if place not in copies]
    # Intervals draw whole documents, so the parts of one document must not pass for several.
    first: dict[str, int] = {}
    for number in numbers:
        id = read[number].id
        if id is not None and first.setdefault(id, number) != number:
            raise DatasetError(
                f"Two documents have the id {id!r} but different texts: number {first[id]} and number {number}, counted from "
                "0. If they are parts of one document, join their texts; if not, give them different ids or none."
            )
    scored = [read[number] for number in numbers]
    return scored, [copies[place] for place in sorted(copies)], [leaked[place] for place in sorted(leaked)]


def _runs(search: NeighborSearch, nearest: np.ndarray, names: Sequence[str], count: int, seed: int) -> dict[str, Run]:
    """The modes, with `count` neighbors per chunk; `nearest` has at least as many."""
    given = neighbors_by_mode(search.retriever.datastore, search.chunks, nearest[:, :count], seed)
    return {name: Run(name, given[name], 0 if name == "off" else count) for name in names if name in given}


def _sweeps(search: NeighborSearch, nearest: np.ndarray, sweep: Sequence[int]) -> dict[str, Run]:
    """ON with other numbers of neighbors."""
    datastore, found = search.retriever.datastore, search.chunks.complete_by_document(nearest)
    size = datastore.num_documents - datastore.num_deleted_documents, datastore.num_chunks
    runs = [
        Run(f"k={number}", [ids[:, :number] for ids in found], number, None, *size) for number in sorted(set(sweep))
    ]
    return {run.name: run for run in runs}


def _fractions(search: NeighborSearch, count: int, fractions: Sequence[float], seed: int) -> dict[str, Run]:
    """ON with parts of the datastore, which are searched without being written."""
    datastore, runs = search.retriever.datastore, {}
    for fraction in sorted(set(fractions)):
        index = datastore.restricted_to(drawn_documents(datastore, fraction, seed))
        ids = search.chunks.complete_by_document(search.nearest(count, index))
        name = f"fraction={fraction:g}"
        runs[name] = Run(name, ids, count, fraction, index.num_documents, index.num_chunks)
    return runs
