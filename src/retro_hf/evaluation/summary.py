"""From the table of scored tokens to the result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..datastore import RetroDatastore
from ..errors import counted
from .examples import choose_examples
from .measure import similarity_of
from .modes import MODES, Chunks, Run
from .result import Evaluation, Inputs, Mode, SweepPoint
from .tokens import TokenTable
from .verdict import give_verdict, not_measured, nothing_found, oracle_notes, sweep_warnings


if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from .scoring import Document

__all__ = ["summarize"]


def summarize(
    table: TokenTable,
    runs: Mapping[str, Run],
    documents: Sequence[Document],
    chunks: Chunks,
    datastore: RetroDatastore | None,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Inputs,
    provenance: dict[str, Any],
) -> Evaluation:
    """Everything that is reported: arithmetic over the table."""
    modes = {name: _mode(table, run) for name, run in runs.items() if name in MODES}
    found: dict[str, Any] = {
        "modes": list(modes.values()),
        **dict.fromkeys(("on_minus_random", "similarity", "offsets")),
        **{name: [] for name in ("leakage", "overlap", "runs", "num_neighbors_sweep", "fraction_sweep", "examples")},
        "inputs": inputs,
        "provenance": provenance,
    }
    if datastore is None:
        return Evaluation(verdict=not_measured("without a retriever there is only OFF."), **found)
    if not (table.run >= 0).any():
        if inputs.num_short == inputs.num_documents:
            verdict = not_measured(
                f"no token could read a neighbor: no document goes beyond its first chunk of {table.chunk_size} tokens. Evaluate "
                "longer documents."
            )
        else:
            verdict = nothing_found(int((chunks.counts - 1).sum()))
        verdict.details.extend(_not_scored(inputs))
        return Evaluation(verdict=verdict, **found)

    on, random = (runs[name].chunk_ids or [] for name in ("on", "random"))
    given = chunks.given(on)
    points = [_sweep_point(table, run, modes["on"]) for name, run in runs.items() if name not in MODES]
    found |= {
        "on_minus_random": table.difference("on", "random"),
        "similarity": similarity_of(chunks, on, random, datastore, table.num_resamples, table.seed),
        "leakage": table.leakage(list(modes)),
        "overlap": table.gain_by_overlap(),
        "runs": table.gain_by_run(),
        "offsets": table.offsets(list(modes)),
        "num_neighbors_sweep": [point for point in points if point.fraction is None],
        "fraction_sweep": [point for point in points if point.fraction is not None],
        "examples": choose_examples(table, documents, chunks, given, datastore, tokenizer),
    }
    verdict = give_verdict(
        modes,
        found["on_minus_random"],
        found["similarity"],
        found["runs"],
        found["leakage"],
        inputs.num_documents - inputs.num_short,
    )
    num_reading, num_given = int((chunks.counts - 1).sum()), int((given >= 0).any(axis=1).sum())
    if num_given < num_reading:
        verdict.details.append(
            f"Nothing was found for {num_reading - num_given:,} of {counted(num_reading, 'chunk')}; there ON is OFF."
        )
    verdict.details.extend(oracle_notes(modes))
    verdict.details.extend(sweep_warnings(found["num_neighbors_sweep"], found["fraction_sweep"]))
    verdict.details.extend(_not_scored(inputs))
    return Evaluation(verdict=verdict, **found)


def _not_scored(inputs: Inputs) -> Iterator[str]:
    """What the figures leave out, or hold although retrieval has no part in it."""
    total = inputs.num_documents + len(inputs.leaked) + len(inputs.copies)
    if inputs.leaked:
        yield f"Leakage: {len(inputs.leaked):,} of {counted(total, 'document')}, found in the datastore, were not scored."
    if inputs.copies:
        yield (
            f"Copies: {len(inputs.copies):,} of {counted(total, 'document')}, of which another one has the text, were not "
            "scored: counted again, they would make intervals look narrower than they are."
        )
    if inputs.num_short:
        yield (
            f"Short: {inputs.num_short:,} of {counted(inputs.num_documents, 'document')} scored end with their first chunk and "
            "can read nothing. Their bytes count in every mode; no interval draws them."
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
