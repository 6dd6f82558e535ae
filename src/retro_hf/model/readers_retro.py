# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The ways in which a model can read neighbors, and what differs between them outside of their own modules."""

from typing import NamedTuple

from .values_retro import shown


class ReaderTraits(NamedTuple):
    """What the rest of the package must know of a reader.

    Args:
        has_weights (`bool`): whether it adds weights, which are trained. Without any, the base itself reads, as it is.
        reads_question (`bool`): whether all tokens of a question read its passages; if not, its last token is the first one
            that does. A base without training must see the passages when it reads the question: it then answers far better.
        compiles (`bool`): whether `torch.compile` can compile a pass that reads, and `generate` its steps.
        sentence (`str`): what a model card says of it; `{layers}` are the layers that read.
    """

    has_weights: bool
    reads_question: bool
    compiles: bool
    sentence: str


READERS = {
    "cross_attention": ReaderTraits(
        has_weights=True,
        reads_question=False,
        compiles=True,
        sentence="a neighbor encoder and chunked cross-attention in layers {layers} (counted from 0), which are to be trained",
    ),
    "parallel_context": ReaderTraits(
        has_weights=False,
        reads_question=True,
        compiles=False,
        sentence="the base reads neighbors beside its text; no weights are added",
    ),
}
"""The readers by their names in `RetroConfig.reader`. The module of each is in `modeling_retro.py: READER_MODULES`."""


def traits_of(reader: str) -> ReaderTraits:
    """The traits of a reader; ValueError for a name that is none."""
    if not isinstance(reader, str) or reader not in READERS:
        raise ValueError(f"`reader` must be one of {', '.join(map(repr, READERS))}, got {shown(reader)}.")
    return READERS[reader]
