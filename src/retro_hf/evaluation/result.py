"""What `evaluate` found: plain data that is saved as JSON and loaded again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from .. import arguments
from ..datastore.atomic_files import make_folder, write_file
from ..errors import DatasetError
from ..outside import read_json_value
from .interval import Interval


if TYPE_CHECKING:
    from rich.console import RenderableType

_FILE = "evaluation.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Verdict:
    """The answer in words.

    Attributes:
        outcome (`str`): `"helps"`, `"nothing"` (no measurable effect), `"hurts"`, `"broken"` (the neighbors are no nearer
            to the text than random ones) or `"not_measured"`.
        copying (`bool`, *optional*): whether most of the gain is copied word for word; `None` without a gain.
        text (`str`): one line.
        details (`list[str]`): sentences that explain it and say what to do.
    """

    outcome: str
    copying: bool | None
    text: str
    details: list[str]


@dataclass(frozen=True)
class Mode:
    """The totals of one mode.

    Attributes:
        name (`str`): a key of [`MODES`].
        cheating (`bool`): whether the neighbors were chosen by the answer.
        num_neighbors (`int`): neighbors per chunk; 0 for off.
        bits_per_byte, bits_per_token, perplexity (`float`): of all scored tokens; perplexity is per token.
        difference ([`Interval`], *optional*): bits per byte minus those of off; negative is better.
        later_chunks_bits_per_byte (`float`, *optional*): without the first chunk of each document, which reads nothing.
        later_chunks_difference ([`Interval`], *optional*): the same for the difference.
    """

    name: str
    cheating: bool
    num_neighbors: int
    bits_per_byte: float
    bits_per_token: float
    perplexity: float
    difference: Interval | None
    later_chunks_bits_per_byte: float | None
    later_chunks_difference: Interval | None


@dataclass(frozen=True)
class LeakageLevel:
    """Bits per byte of the chunks whose overlap with their 10 nearest neighbors is at most `alpha` (section 2.6, Fig. 6)."""

    alpha: float
    num_chunks: int
    num_tokens: int
    num_bytes: int
    bits_per_byte: dict[str, float | None]
    difference: dict[str, Interval]


@dataclass(frozen=True)
class Bucket:
    """The tokens whose overlap or run is between `low` and `high` (`None`: no limit), and what retrieval saves on them.

    `gain` is in bits per token, OFF minus ON. `share` is the share of the whole gain, `None` without a gain.
    """

    low: float
    high: float | None
    num_tokens: int
    gain: float | None
    share: float | None


@dataclass(frozen=True)
class Offsets:
    """Bits per token by position in the chunk, `chunk_size` values each, without the first chunks of documents."""

    num_tokens: list[int]
    bits_per_token: dict[str, list[float | None]]


@dataclass(frozen=True)
class SweepPoint:
    """ON with another number of neighbors, or with a fraction of the datastore's documents.

    `gain_share` is its gain over OFF as a share of the gain of the mode ON, `None` if that one has none.
    """

    num_neighbors: int
    fraction: float | None
    num_documents: int
    num_chunks: int
    bits_per_byte: float
    difference: Interval
    gain_share: float | None


@dataclass(frozen=True)
class Similarity:
    """The share of a chunk's tokens that its neighbors have, found and random, and the difference of both."""

    on: float
    random: float
    difference: Interval


@dataclass(frozen=True)
class InContext:
    """ON beside the base model with the same neighbors in its prompt.

    Attributes:
        on_minus_in_context ([`Interval`]): bits per byte; negative if reading in layers is better.
        num_read, num_read_off (`int`): tokens of all prompts, and tokens that go through the base without neighbors.
        num_cut (`int`): scored tokens with less text before them than in the other modes, because prompt and text together
            do not fit the model's context.
    """

    on_minus_in_context: Interval
    num_read: int
    num_read_off: int
    num_cut: int


@dataclass(frozen=True)
class ExampleNeighbor:
    """A neighbor as text."""

    document_id: str
    title: str
    text: str
    continuation: str


@dataclass(frozen=True)
class Example:
    """One chunk token by token, with `gain` in bits and `run` as in [`common_runs`], and the neighbors it read.

    `kind` is `"gain"`, `"typical"` or `"loss"`; `context` is the chunk before, for which the neighbors were found.
    """

    document_id: str | None
    document: int
    chunk: int
    kind: str
    context: str
    tokens: list[str]
    gain: list[float]
    run: list[int]
    neighbors: list[ExampleNeighbor]


@dataclass(frozen=True)
class LeakedDocument:
    """A document that was not scored because the datastore has it; `contained` is the share of its 13-grams found there."""

    id: str | None
    stored_id: str
    contained: float
    same_id: bool


@dataclass(frozen=True)
class CopiedDocument:
    """A document that was not scored because another has its text; `contained` is the share of its 13-grams found there.

    `id` and `copy_of` are ids, or the number of the document ("document 3", from 0) if it has none.
    """

    id: str
    copy_of: str
    contained: float


@dataclass(frozen=True)
class Inputs:
    """What was scored, and what was not.

    Attributes:
        num_documents, num_chunks, num_tokens, num_bytes (`int`): scored; a chunk counts if it has a scored token.
        num_unscorable (`int`): documents with nothing to predict (empty, one token, one character), left out.
        num_short (`int`): scored documents that are no longer than a chunk, so that none of their tokens reads anything.
            They are the same in all modes, so intervals leave them out.
        num_same_id (`int`): scored documents that got no neighbors from the datastore's document of the same id.
        leaked (`list[LeakedDocument]`): documents that are in the datastore, left out.
        copies (`list[CopiedDocument]`): documents whose text another document has, left out.
    """

    num_documents: int
    num_chunks: int
    num_tokens: int
    num_bytes: int
    num_unscorable: int
    num_short: int
    num_same_id: int
    leaked: list[LeakedDocument]
    copies: list[CopiedDocument] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What [`evaluate`] found. `print` shows it as text, and `rich.print` fits it to the terminal.

    Attributes:
        verdict ([`Verdict`]): the answer in words.
        modes (`list[Mode]`): totals, OFF first.
        on_minus_random ([`Interval`], *optional*): bits per byte.
        similarity ([`Similarity`], *optional*): whether neighbors are nearer to their chunks than random ones.
        leakage (`list[LeakageLevel]`): bits per byte below each level of overlap.
        overlap (`list[Bucket]`): gain by r(C), the overlap of a chunk with its 10 nearest neighbors. A bucket excludes
            `low`, except the first one.
        runs (`list[Bucket]`): gain by the length of the run of tokens, ending with the predicted one, that is also in a
            neighbor which the model read; only tokens that could read some.
        offsets ([`Offsets`], *optional*): bits by position in the chunk.
        num_neighbors_sweep, fraction_sweep (`list[SweepPoint]`): as asked for.
        examples (`list[Example]`): chunks with the largest, a typical and the smallest gain.
        in_context ([`InContext`], *optional*): ON beside the base with the neighbors in its prompt, if that was measured.
        inputs ([`Inputs`]): what was scored.
        provenance (`dict`): command, seed, versions, model, datastore, and settings.
        format_version (`int`): of the JSON.
    """

    verdict: Verdict
    modes: list[Mode]
    on_minus_random: Interval | None = None
    similarity: Similarity | None = None
    leakage: list[LeakageLevel] = field(default_factory=list)
    overlap: list[Bucket] = field(default_factory=list)
    runs: list[Bucket] = field(default_factory=list)
    offsets: Offsets | None = None
    num_neighbors_sweep: list[SweepPoint] = field(default_factory=list)
    fraction_sweep: list[SweepPoint] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    in_context: InContext | None = None
    inputs: Inputs
    provenance: dict[str, Any]
    format_version: int = _FORMAT_VERSION

    def mode(self, name: str) -> Mode:
        """The totals of a mode; raises `KeyError` if it was not measured."""
        measured = [mode.name for mode in self.modes]
        if name not in measured:
            raise KeyError(f"The mode {arguments.shown(name)} was not measured, only {', '.join(measured)}.")
        return self.modes[measured.index(name)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; numbers that are not finite become `None`."""
        return _plain(dataclasses.asdict(self))

    def save(self, folder: str | Path) -> None:
        """Write `evaluation.json` into a folder, atomically."""
        folder = arguments.path("folder", folder, ValueError)
        make_folder(folder)
        content = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        write_file(folder / _FILE, (content + "\n").encode("utf-8", "replace"))

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Load a saved evaluation from its folder or its JSON file.

        Raises:
            FileNotFoundError: if there is none.
            DatasetError: if it is damaged, or has another format.
        """
        file = arguments.path("path", path, ValueError)
        file = file / _FILE if os.path.isdir(file) else file
        if not os.path.isfile(file):
            raise FileNotFoundError(
                f"There is no evaluation at {str(file)!r}. Make one with `evaluate(..., output=folder)`."
            )
        try:
            content = read_json_value(file)
            if content["format_version"] != _FORMAT_VERSION:
                raise ValueError(
                    f"format_version={content['format_version']}, but this version reads {_FORMAT_VERSION}"
                )
            return _read(cls, content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"{str(file)!r} is not an evaluation ({type(error).__name__}: {error}). Run `retro evaluate` again."
            ) from error

    def __str__(self) -> str:
        from .text import plain_text

        return plain_text(self)

    def __rich_console__(self, *_: Any) -> Iterator[RenderableType]:
        from .text import layout

        yield layout(self)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(kind: Any, value: Any) -> Any:
    """A value of a type from its plain form."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(parts[0], value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        # A field that an older version did not write has a default.
        return kind(**{name: _read(hint, value[name]) for name, hint in hints.items() if name in value})
    if origin is list:
        return [_read(parts[0], part) for part in value]
    if origin is dict and parts[1] is not Any:
        return {key: _read(parts[1], part) for key, part in value.items()}
    return math.nan if kind is float and value is None else value
