"""From the table of scored tokens to the result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..datastore import RetroDatastore, chunk_texts
from ..errors import counted
from .in_context import Prompted
from .leakage import shared_tokens
from .neighbors import MODES, Chunks, Run
from .result import Evaluation, Example, ExampleNeighbor, InContext, Inputs, Mode, Similarity, SweepPoint
from .scoring import TokenizedDocument
from .token_table import TokenTable
from .verdict import give_verdict, in_context_note, not_measured, nothing_found, oracle_notes, sweep_warnings


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES_PER_KIND = 3


@dataclass(frozen=True)
class Measured:
    """What was measured, before any summary of it.

    Attributes:
        table ([`TokenTable`]): the scored tokens.
        runs (`dict[str, Run]`): modes and points of sweeps, by name.
        documents (`list[TokenizedDocument]`), chunks ([`Chunks`]): what was scored.
        datastore ([`RetroDatastore`], *optional*): where neighbors come from.
        read (`np.ndarray` of int64 and shape `(num_chunks, num_neighbors)`, *optional*): what the tokens of each chunk
            read in the mode `on`.
        num_read_off (`int`): tokens that go through the model without neighbors.
        prompted ([`Prompted`], *optional*): scores with the neighbors in the prompt.
    """

    table: TokenTable
    runs: Mapping[str, Run]
    documents: Sequence[TokenizedDocument]
    chunks: Chunks
    datastore: RetroDatastore | None
    read: np.ndarray | None
    num_read_off: int
    prompted: Prompted | None = None


def summarize(
    measured: Measured, tokenizer: PreTrainedTokenizerBase, inputs: Inputs, provenance: dict[str, Any]
) -> Evaluation:
    """Compute everything that is reported; this is arithmetic over the table."""
    table, chunks, datastore = measured.table, measured.chunks, measured.datastore
    modes = {name: _mode(table, run) for name, run in measured.runs.items() if name in MODES}
    common: dict[str, Any] = {"modes": list(modes.values()), "inputs": inputs, "provenance": provenance}
    if datastore is None or measured.read is None:
        return Evaluation(verdict=not_measured("without a retriever there is only OFF."), **common)
    num_reading = int((chunks.counts - 1).sum())
    if not (table.run >= 0).any():
        if inputs.num_short == inputs.num_documents:
            verdict = not_measured(
                f"no token could read a neighbor: no document goes beyond its first chunk of {table.chunk_size} tokens. "
                "Evaluate longer documents."
            )
        else:
            verdict = nothing_found(num_reading)
        verdict.details.extend(_not_scored(inputs))
        return Evaluation(verdict=verdict, **common)

    on_minus_random = table.difference("on", "random")
    similarity = _similarity(measured, datastore)
    leakage, runs = table.leakage(list(modes)), table.gain_by_run()
    points = [_sweep_point(table, run, modes["on"]) for name, run in measured.runs.items() if name not in MODES]
    by_neighbors = [point for point in points if point.fraction is None]
    by_fraction = [point for point in points if point.fraction is not None]
    num_drawn = inputs.num_documents - inputs.num_short
    verdict = give_verdict(modes, on_minus_random, similarity, runs, leakage, num_documents=num_drawn)
    num_given = int((measured.read >= 0).any(axis=1).sum())
    if num_given < num_reading:
        verdict.details.append(
            f"Nothing was found for {num_reading - num_given:,} of {counted(num_reading, 'chunk')}; there ON is OFF."
        )
    in_context = _in_context(measured)
    if in_context is not None:
        verdict.details.append(in_context_note(modes, in_context))
    verdict.details.extend([*oracle_notes(modes), *sweep_warnings(by_neighbors, by_fraction), *_not_scored(inputs)])
    return Evaluation(
        verdict=verdict,
        on_minus_random=on_minus_random,
        similarity=similarity,
        leakage=leakage,
        overlap=table.gain_by_overlap(),
        runs=runs,
        offsets=table.offsets(list(modes)),
        num_neighbors_sweep=by_neighbors,
        fraction_sweep=by_fraction,
        examples=_examples(measured, datastore, tokenizer),
        in_context=in_context,
        **common,
    )


def _mode(table: TokenTable, run: Run) -> Mode:
    bits = table.bits(run.name) / len(table.document)
    later = table.later if table.later.any() and table.chunk_size > 1 else None
    is_off = run.name == "off"
    return Mode(
        name=run.name,
        cheating=run.name == "oracle",
        num_neighbors=run.num_neighbors,
        bits_per_byte=table.bits_per_byte(run.name),
        bits_per_token=bits,
        perplexity=2**bits,
        difference=None if is_off else table.difference(run.name, "off"),
        later_chunks_bits_per_byte=None if later is None else table.bits_per_byte(run.name, later),
        later_chunks_difference=None if is_off or later is None else table.difference(run.name, "off", later),
    )


def _sweep_point(table: TokenTable, run: Run, on: Mode) -> SweepPoint:
    difference = table.difference(run.name, "off")
    gain = math.nan if on.difference is None else on.difference.value
    return SweepPoint(
        num_neighbors=run.num_neighbors,
        fraction=run.fraction,
        num_documents=run.num_documents,
        num_chunks=run.num_chunks,
        bits_per_byte=table.bits_per_byte(run.name),
        difference=difference,
        gain_share=difference.value / gain if gain < 0 else None,
    )


def _in_context(measured: Measured) -> InContext | None:
    if measured.prompted is None:
        return None
    difference, num_read_off = measured.table.difference("on", "in_context"), measured.num_read_off
    return InContext(difference, measured.prompted.num_read, num_read_off, measured.prompted.num_cut)


def _similarity(measured: Measured, datastore: RetroDatastore) -> Similarity:
    """How many tokens of a chunk its neighbors have, found and random: a check of the retriever without the model."""
    chunks = measured.chunks
    on, random = (shared_tokens(datastore, chunks, measured.runs[name].chunk_ids or []) for name in ("on", "random"))
    owners = np.repeat(np.arange(len(chunks.counts)), chunks.complete)
    difference = np.bincount(owners, weights=on - random, minlength=len(chunks.counts))
    interval = measured.table.bootstrap.interval(difference, chunks.complete)
    return Similarity(float(on.mean()), float(random.mean()), interval)


def _not_scored(inputs: Inputs) -> Iterator[str]:
    """What the figures leave out, or include although it reads nothing."""
    total = inputs.num_documents + len(inputs.leaked) + len(inputs.copies)
    if inputs.leaked:
        yield f"Leakage: {len(inputs.leaked):,} of {counted(total, 'document')}, found in the datastore, were not scored."
    if inputs.copies:
        yield (
            f"Copies: {len(inputs.copies):,} of {counted(total, 'document')} have the text of another one and were not "
            "scored: counted again, they would make intervals look narrower than they are."
        )
    if inputs.num_short:
        yield (
            f"Short: {inputs.num_short:,} of {counted(inputs.num_documents, 'document')} scored are no longer than a chunk "
            "and read nothing. Their bytes count in every mode; the intervals leave them out."
        )


def _examples(measured: Measured, datastore: RetroDatastore, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Chunks with the largest, a typical and the smallest gain, at most three of each."""
    table = measured.table
    read = np.flatnonzero(table.run >= 0)
    numbers, inverse = np.unique(table.chunk[read], return_inverse=True)
    order = numbers[np.argsort(-np.bincount(inverse, weights=table.gain()[read]), kind="stable")].tolist()
    # In a small evaluation the kinds overlap; a chunk is shown once, as the first kind that it is.
    middle = max(len(order) // 2 - _EXAMPLES_PER_KIND // 2, 0)
    kinds = {"gain": order, "typical": order[middle:], "loss": order[::-1]}
    chosen: dict[int, str] = {}
    for kind, ranked in kinds.items():
        for number in ranked[:_EXAMPLES_PER_KIND]:
            chosen.setdefault(number, kind)
    return [_example(measured, kind, number, datastore, tokenizer) for number, kind in chosen.items()]


def _example(
    measured: Measured, kind: str, number: int, datastore: RetroDatastore, tokenizer: PreTrainedTokenizerBase
) -> Example:
    """One chunk by its number, as it was read."""
    table, chunks = measured.table, measured.chunks
    rows = np.flatnonzero(table.chunk == number)
    place = int(table.document[rows[0]])
    document = measured.documents[place]
    texts = document.token_texts
    known = measured.read[number] if measured.read is not None else np.empty(0, dtype=np.int64)
    known = known[known >= 0]
    owners = (datastore.document(int(owner)) for owner in datastore.document_of(known))
    parts = zip(owners, datastore.texts_of(known), strict=True)
    return Example(
        document_id=document.id,
        document=place,
        chunk=number - int(chunks.starts[place]),
        kind=kind,
        context=chunk_texts(tokenizer, chunks.rows[number - 1 : number], chunks.mask[number - 1 : number])[0],
        tokens=[texts[position] for position in table.position[rows].tolist()],
        gain=[round(value, 4) for value in table.gain()[rows].tolist()],
        run=table.run[rows].tolist(),
        neighbors=[ExampleNeighbor(owner["id"], owner["title"] or "", *texts) for owner, texts in parts],
    )
