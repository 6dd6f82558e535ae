"""Options that several commands share, and what opens the things that they name."""

import codecs
import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import paths


DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
STORE = "A datastore: its folder, or a dataset repository on the Hub."
Folder = Annotated[Path, typer.Argument(callback=paths.datastore, help="The folder of a datastore.")]
TEXTS = "A folder of texts, or a .txt, .md, .html, .csv, .tsv, .json, .jsonl, .parquet or .pdf file, also as .gz."
Source = Annotated[Path, typer.Argument(callback=paths.source, help=TEXTS)]
StoreName = Annotated[str, typer.Argument(callback=paths.store, help=STORE)]
Embedder = Annotated[
    str | None,
    typer.Option(
        callback=paths.embedder, help="The encoder that built the datastore. Needed if it was a local folder."
    ),
]


def _known_encoding(name: str | None) -> str | None:
    try:
        codecs.lookup(name or "utf-8")
    except LookupError:
        raise typer.BadParameter(
            f"Python knows no encoding {name!r}. Pass one such as cp1252, utf-16-le or shift_jis."
        ) from None
    return name


Encoding = Annotated[
    str | None,
    typer.Option(
        callback=_known_encoding,
        help="The encoding of texts without a byte order mark, such as cp1252. Default: UTF-8.",
    ),
]
Split = Annotated[
    Literal["line", "paragraph", "heading"] | None,
    typer.Option(help="Make several documents of each file: by line, paragraph (blank lines) or heading."),
]
MinScore = Annotated[
    float | None,
    typer.Option(help="Leave out passages with a lower score. `retro search` shows scores. Default: all are read."),
]
Workers = Annotated[int, typer.Option(min=1, help="Number of processes that share the work.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_MODEL = "Folder or Hub name of a RETRO model, or of another decoder-only model, which then reads in parallel context."
Model = Annotated[str, typer.Argument(callback=paths.model, help=_MODEL)]
Base = Annotated[
    str | None,
    typer.Option(
        callback=paths.base, help="Folder of the base of an adapter that does not name it, or that has moved."
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"], typer.Option(help="Dtype of the weights. auto: the checkpoint's.")
]
NumNeighbors = Annotated[
    int | None,
    typer.Option(
        "-k", min=1, help="Passages that a question, or each chunk of a text, reads. Default: the store's number."
    ),
]


def open_retriever(store: str, embedder: str | None, tokenizer: Any = None, min_score: float | None = None) -> Any:
    """The retriever of a datastore, with the encoder that built it or the one that is named."""
    from retro_hf import RetroRetriever

    return RetroRetriever.from_pretrained(store, embedder=embedder, tokenizer=tokenizer, min_score=min_score)


def readable(argument: str) -> str:
    """The argument with U+FFFD for bytes that are not UTF-8, which Python keeps as half characters no tokenizer takes."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def tell_progress() -> None:
    """Show what the library logs: sizes and times before long work, and the progress where there is no terminal."""
    logger = logging.getLogger("retro_hf")
    logger.setLevel(logging.INFO)
    if not logger.handlers:  # Python shows nothing below a warning by itself
        logger.addHandler(logging.StreamHandler())
