"""Documents: whatever a user has (texts, files, folders, datasets) as one stream of checked records."""

from __future__ import annotations

import gzip
import json
import os
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import DatastoreInputError, DatastoreNotFoundError, counted
from .fields import without_lone_surrogates
from .manifest import MANIFEST_NAME


__all__ = ["Document", "DocumentReader", "document_ids"]

logger = logging.get_logger(__name__)

_SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")
_LONGEST_SUFFIX = max(map(len, _SUFFIXES))
_FIELDS = ("id", "title", "source", "text")
_PARQUET_ROWS = 1024
_NAMED_OTHERS = 5

# What was read, where (for messages), and what its id, title and source are if it does not say.
Record = tuple[Any, str, dict[str, str]]


@dataclass(slots=True)
class Document:
    """One document of the input: `where` names it in messages, `metadata` holds the fields beyond the four."""

    id: str
    title: str
    source: str
    text: str
    where: str
    metadata: dict[str, Any] = field(default_factory=dict)


class DocumentReader:
    """One pass over the documents of any supported input.

    Args:
        documents: an iterable of texts (`str`), of records (`dict` with `text` and perhaps `id`, `title`, `source` and
            more), or of paths (`Path`); one path, as `str` or `Path`, to a .txt, .md, .jsonl, .jsonl.gz or .parquet
            file or to a folder of such files; a `datasets.Dataset` or `IterableDataset` with a `text` column.

    Attributes:
        total (`int`, *optional*): number of records where it is known beforehand.
        num_read (`int`): records met so far.
        num_empty (`int`): records without text met so far; they are skipped.
        first_empty (`str`, *optional*): where the first of them stands.
        num_repaired (`int`): documents met so far with lone surrogates (half characters that JSON can smuggle in) in text,
            title, source or id, which became U+FFFD.
        not_utf8 (`set[str]`): names of the text files met so far that are not UTF-8; what cannot be read became U+FFFD.

    Raises:
        DatastoreInputError: for a record that is no document, naming the document, or the file and line.
        DatastoreNotFoundError: for a path that does not exist.
    """

    def __init__(self, documents: Any) -> None:
        self.num_read = 0
        self.num_empty = 0
        self.first_empty: str | None = None
        self.num_repaired = 0
        self.not_utf8: set[str] = set()
        self.sources: list[dict[str, str]] = []
        self.total: int | None = None
        if isinstance(documents, (str, os.PathLike)):
            if documents == "":  # to Python the current folder, but most often a variable that was not set
                raise DatastoreInputError(
                    "The path of the documents is empty. Name a folder or file; the current folder is '.'."
                )
            files = _files_of(Path(documents))
            self._records: Iterator[Record] = chain.from_iterable(self._read_file(file, name) for file, name in files)
        elif isinstance(documents, Mapping):
            splits = ", ".join(repr(key) for key in list(documents)[:5])
            raise DatastoreInputError(
                f"The documents are a mapping with the keys {splits}. Pass one split, such as documents['train'], or "
                "a list with one dict per document."
            )
        elif hasattr(documents, "columns"):
            # Its rows are the documents, but iterating over it gives columns, or their names.
            raise DatastoreInputError(
                f"The documents are a table ({type(documents).__name__}). Pass its rows: of pandas "
                "`df.to_dict(\"records\")`, or `datasets.Dataset.from_pandas(df)`, with a column 'text'."
            )
        elif isinstance(documents, (bytes, bytearray)):
            raise DatastoreInputError(
                "The documents are bytes. Decode them, or pass a path as a text: `os.fsdecode(path)`."
            )
        elif isinstance(documents, Iterable):
            columns = getattr(documents, "column_names", None)
            if columns is not None and "text" not in columns:
                raise DatastoreInputError(
                    f"The dataset has the columns {list(columns)}, but no column 'text'. Rename the one that holds "
                    "the text: `dataset.rename_column('<name>', 'text')`."
                )
            if hasattr(documents, "info"):
                self.sources = [_source_of(documents.info)]
            self.total = len(documents) if isinstance(documents, Sized) else None
            self._records = self._read_iterable(documents)
        else:
            raise DatastoreInputError(
                f"The documents are of type {type(documents).__name__}. Pass an iterable of texts or dicts, a path, "
                "or a dataset."
            )

    def __iter__(self) -> Iterator[Document]:
        for number, (record, where, defaults) in enumerate(self._records):
            self.num_read = number + 1
            document = self._document(record, where, {"id": str(number), **defaults})
            if document is None:
                self.num_empty += 1
                self.first_empty = self.first_empty or where
            else:
                yield document

    def warn_of_repairs(self) -> None:
        """Say what could not be read as it is, once all has been read."""
        if self.num_repaired:
            logger.warning(f"Replaced lone surrogates by U+FFFD in {counted(self.num_repaired, 'document')}.")
        if self.not_utf8:
            logger.warning(
                f"Not UTF-8: {len(self.not_utf8):,} of {counted(len(self.sources), 'file')}, such as {min(self.not_utf8)!r}; "
                "what cannot be read there became U+FFFD. Convert them with `iconv -f <encoding> -t utf-8 …`, where the "
                "encoding is often latin1 or utf-16, and start again; what is no text at all is better left out."
            )

    def _document(self, record: Any, where: str, defaults: dict[str, str]) -> Document | None:
        if isinstance(record, str):
            record = {"text": record}
        if not isinstance(record, Mapping):
            raise DatastoreInputError(
                f"{where} is of type {type(record).__name__}. A document is a text (str) or a dict with a 'text'."
            )
        if "text" not in record:
            raise DatastoreInputError(
                f"{where} has the fields {[str(key) for key in record]}, but no 'text'. Rename the field that holds "
                "the text."
            )
        text = record["text"]
        if text is not None and not isinstance(text, str):
            raise DatastoreInputError(
                f"The text of {where} is of type {type(text).__name__}, not str. Convert it, or drop the document."
            )
        if text is None or not text.strip():
            return None
        texts = {name: _as_text(record.get(name), defaults.get(name, ""), name, where) for name in _FIELDS[:3]}
        texts["text"] = text
        clean = {name: without_lone_surrogates(value) for name, value in texts.items()}
        self.num_repaired += clean != texts
        metadata = {str(key): value for key, value in record.items() if key not in _FIELDS}
        return Document(where=where, metadata=metadata, **clean)

    def _read_iterable(self, documents: Iterable[Any]) -> Iterator[Record]:
        for number, record in enumerate(documents):
            if isinstance(record, os.PathLike):
                for file, name in _files_of(Path(record)):
                    yield from self._read_file(file, name)
                continue
            # A path that was written as a text; a dict says that the name itself is the document.
            if isinstance(record, str) and _is_readable(record) and os.path.isfile(record):
                raise DatastoreInputError(
                    f"Document {number} is the text {record!r}, which is the name of a file. For what the file holds, "
                    f"pass Path({record!r}), or the folder's path alone; for the name as a text, {{'text': {record!r}}}."
                )
            yield record, f"Document {number}", {}

    def _read_file(self, file: Path, name: str) -> Iterator[Record]:
        """Records of one file; `name` is its path as it is recorded, relative to what the user named."""
        self.sources.append({"name": without_lone_surrogates(name)})
        defaults = {"source": name}
        suffix = file.suffix.lower()
        if suffix in (".txt", ".md"):
            text = self._decode(file.read_bytes(), name).replace("\r\n", "\n").replace("\r", "\n")
            yield text, f"File {name!r}", {"id": name, "title": file.stem, **defaults}
        elif suffix == ".parquet":
            import pyarrow.parquet as pq

            try:
                with pq.ParquetFile(file) as table:
                    rows = chain.from_iterable(
                        batch.to_pylist() for batch in table.iter_batches(batch_size=_PARQUET_ROWS)
                    )
                    for number, row in enumerate(rows):
                        yield row, f"Row {number} of {name!r}", {"id": f"{name}:{number}", **defaults}
            except (OSError, ValueError) as error:
                if isinstance(error, DatastoreInputError):
                    raise
                raise DatastoreInputError(f"{name!r} is not a readable parquet file: {error}.") from error
        else:
            yield from self._read_jsonl(file, name, defaults)

    def _read_jsonl(self, file: Path, name: str, defaults: dict[str, str]) -> Iterator[Record]:
        number = 0
        opened = gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")
        try:
            with opened as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.strip():
                        continue
                    where = f"{name}:{number}"
                    try:
                        record = json.loads(self._decode(line, name))
                    except (ValueError, RecursionError) as error:
                        raise DatastoreInputError(
                            f"{where} is not JSON ({error}). Each line of a .jsonl file holds one JSON object; repair "
                            "or remove the line."
                        ) from error
                    yield record, where, {"id": where, **defaults}
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            what = "breaks off" if isinstance(error, EOFError) else "is damaged, or goes on with something else,"
            what = f"{what} after line {number}" if number else "is not a gzip file"
            raise DatastoreInputError(f"{name!r} {what} ({error}). Fetch or compress it again.") from error

    def _decode(self, content: bytes, name: str) -> str:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            self.not_utf8.add(name)
            return content.decode("utf-8-sig", errors="replace")


def _files_of(path: Path) -> list[tuple[Path, str]]:
    """The files under a path in a fixed order, each with its name relative to the path."""
    if path.is_file():
        if not _is_readable(path.name):
            raise DatastoreInputError(f"{str(path)!r} is none of the readable kinds {', '.join(_SUFFIXES)}.")
        return [(path, path.name)]
    if path.exists() and not path.is_dir():
        raise DatastoreInputError(
            f"{str(path)!r} is a pipe or a device, not a file. Write what comes from it to a file first: documents may be read "
            "more than once."
        )
    if not path.is_dir():
        raise DatastoreNotFoundError(
            f"There is no file or folder {str(path)!r} to read documents from. Check the path; in Python, texts themselves "
            "are passed as a list."
        )
    # What a datastore holds is no document, also where one lies among the texts.
    stores = {file.parent for file in path.rglob(MANIFEST_NAME)}
    if path in stores:
        raise DatastoreInputError(
            f"{str(path)!r} is a datastore, not a folder of texts. Name a folder or file of texts, such as it was built from."
        )
    if stores:
        logger.warning(f"Left out {counted(len(stores), 'datastore')} among the texts, such as {str(min(stores))!r}.")
    found = [
        (file, file.relative_to(path).as_posix())
        for file in path.rglob("*")
        if stores.isdisjoint(file.parents) and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    # A link to a folder may lead around in a circle, and one that leads nowhere may be a disk that is not there.
    if links := sorted(name for file, name in found if file.is_symlink() and not file.is_file()):
        logger.warning(
            f"Left out {counted(len(links), 'link')} to folders, or to nothing, such as {links[0]!r}. Pass a linked folder itself, "
            "or copy it."
        )
    found = sorted((pair for pair in found if pair[0].is_file()), key=lambda pair: pair[1])
    files = [pair for pair in found if _is_readable(pair[1])]
    if not files:
        raise DatastoreInputError(f"The folder {str(path)!r} holds no {', '.join(_SUFFIXES)} file.")
    others = [name for _, name in found if not _is_readable(name)]
    if others:
        more = ", …" if len(others) > _NAMED_OTHERS else ""
        logger.warning(
            f"Skipped {counted(len(others), 'file')} of other kinds: {', '.join(others[:_NAMED_OTHERS])}{more}"
        )
    return files


def _is_readable(name: str) -> bool:
    return name[-_LONGEST_SUFFIX:].lower().endswith(_SUFFIXES)  # of a whole text, too, which is not to be copied


def _source_of(info: Any) -> dict[str, str]:
    """Name, revision and license of a `datasets.Dataset`, as far as it knows them."""
    known = {
        "name": getattr(info, "dataset_name", None) or "dataset",
        "config": getattr(info, "config_name", None),
        "revision": str(info.version) if getattr(info, "version", None) else None,
        "license": getattr(info, "license", None),
    }
    return {key: without_lone_surrogates(str(value)) for key, value in known.items() if value}


def _as_text(value: Any, default: str, name: str, where: str) -> str:
    if value is None or value == "":
        return default
    text = _in_digits(value)
    if text is None:
        raise DatastoreInputError(
            f"The {name} of {where} is {reprlib.repr(value)}, of type {type(value).__name__}, but it must be a text or a whole "
            "number. Write it as a text, or leave it out (None) where there is none."
        )
    return text


def _in_digits(value: Any) -> str | None:
    """A text as it is, a whole number in digits; None for what is neither."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if isinstance(value, Integral):
        return str(int(value))
    # Tables make floats of whole numbers with a gap; above 2**53 a float may have been another number.
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) <= 2**53 else None


def document_ids(ids: Any) -> list[str]:
    """Ids as a datastore has them: one or several, numbers in digits.

    Raises:
        DatastoreInputError: for what is no id.
    """
    texts = []
    for id in [ids] if isinstance(ids, str) or not isinstance(ids, Iterable) else ids:
        text = _in_digits(id)
        if text is None:
            raise DatastoreInputError(
                f"An id is {reprlib.repr(id)}, of type {type(id).__name__}, but the ids of documents are texts or whole numbers. "
                "Pass one, or a list."
            )
        texts.append(without_lone_surrogates(text))
    return texts
