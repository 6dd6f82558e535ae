"""Documents: texts, files, folders and datasets as one stream of checked records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..arguments import shown
from ..errors import DatasetError, DatastoreInputError, DatastoreNotFoundError, RetroError, counted
from ..outside import is_inside
from .atomic_files import MANIFEST_NAME, not_readable
from .document_files import SUFFIXES, FileReader, Record, suffix_of
from .document_splitting import check_split, split_text


logger = logging.get_logger(__name__)

_FIELDS = ("id", "title", "source", "text")
_NAMED_OTHERS = 5
_NAMED_UNDECODABLE = 20
_MOST_BITS = 1 << 12  # of a whole number that is an id; Python writes out none of more than 4,300 digits


def without_lone_surrogates(text: str) -> str:
    """Text that UTF-8 can encode: surrogate pairs are joined, lone surrogates become U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


@dataclass(slots=True)
class Document:
    """One document of the input: `where` names it in messages, `metadata` holds all fields but the four.

    If it `is_repaired`, it had lone surrogates.
    """

    id: str
    title: str
    source: str
    text: str
    where: str
    metadata: dict[str, Any] = field(default_factory=dict)
    is_repaired: bool = False


class DocumentReader:
    """One pass over the documents of any supported input.

    Args:
        documents: an iterable of texts (`str`), of records (`dict` with `text` and optionally `id`, `title`, `source` and
            more), or of paths (`Path`); one path, as `str` or `Path`, to a file of [`SUFFIXES`] or to a folder of such files;
            a `datasets.Dataset` or `IterableDataset` with a `text` column.
        encoding (`str`, *optional*): of files without a mark (BOM); UTF-8 by default.
        split (`str`, *optional*): `"line"`, `"paragraph"` (ended by a blank line) or `"heading"`: each document becomes
            several, whose ids have the number of their first line in it, such as `notes.md:12`.

    A value of None, or NaN as pandas has it for a gap, is a value that is not there.

    Attributes:
        total (`int`, *optional*): number of documents, where it is known in advance.
        num_read (`int`): records read so far.
        num_empty (`int`): records without text so far; they are skipped.
        num_repaired (`int`): documents so far whose text, title, source or id had lone surrogates (half characters, which
            JSON allows); they became U+FFFD.
        undecodable (`dict[str, str]`): files so far that have other bytes than their encoding, which became U+FFFD.
        sources (`list[dict]`): the files or the dataset that documents were read from.

    Raises:
        DatastoreInputError: for an invalid document; the message names it, or its file and line.
        DatastoreNotFoundError: for a path that does not exist.
        MissingExtraError: for a PDF file if `pypdf` is not installed.
    """

    def __init__(self, documents: Any, *, encoding: str | None = None, split: str | None = None) -> None:
        check_split(split)
        self._given = documents, encoding, split
        self._files = FileReader(encoding)
        self.num_read = self.num_empty = self.num_repaired = 0
        self.first_empty: str | None = None
        self.sources: list[dict[str, str]] = []
        self.total: int | None = None
        if isinstance(documents, (str, os.PathLike)):
            if documents == "":  # the current folder to Python, but usually a variable that was not set
                raise DatastoreInputError("The path of the documents is empty. Pass a folder or file, such as '.'.")
            files = _files_of(documents)
            self._records: Iterator[Record] = chain.from_iterable(self._read_file(file, name) for file, name in files)
            return
        if remedy := _unsuitable(documents):
            raise DatastoreInputError(f"The documents are of type {type(documents).__name__}. {remedy}")
        if hasattr(documents, "with_format"):
            self.sources = [_source_of(documents.info)]
            documents = documents.with_format(None)  # rows of Python values
        self.total = len(documents) if isinstance(documents, Sized) and split is None else None
        self._records = self._read_iterable(documents)

    def __iter__(self) -> Iterator[Document]:
        for number, (record, where, defaults) in enumerate(self._records):
            self.num_read = number + 1
            document = as_document(record, where, {"id": str(number), **defaults})
            if document is None:
                self.num_empty += 1
                self.first_empty = self.first_empty or where
                continue
            self.num_repaired += document.is_repaired
            split = self._given[2]
            if split is None:
                yield document
            else:
                for line, title, text in split_text(document.text, split):
                    id, where = f"{document.id}:{line}", f"{document.where}, line {line}"
                    yield replace(document, id=id, where=where, text=text, title=title or document.title)
        if self._files.left_out and not self.num_read:
            raise DatastoreInputError(f"There is no text in {_no_text(self._files.left_out)}")

    @property
    def undecodable(self) -> dict[str, str]:
        """Files so far that have other bytes than their encoding, and that encoding."""
        return self._files.undecodable

    def again(self) -> DocumentReader:
        """Another pass over the same documents; an iterator is exhausted by then."""
        documents, encoding, split = self._given
        return DocumentReader(documents, encoding=encoding, split=split)

    def warn_of_repairs(self) -> None:
        """Log once, after everything was read, which texts were repaired and which files are no text."""
        if left_out := self._files.left_out:
            logger.warning(f"Left out {_no_text(left_out)}")
        if self.num_repaired:
            logger.warning(f"Replaced lone surrogates by U+FFFD in {counted(self.num_repaired, 'document')}.")
        if self.undecodable:
            named = sorted(f"{name!r} ({encoding})" for name, encoding in self.undecodable.items())
            more = f" and {len(named) - _NAMED_UNDECODABLE:,} more" if len(named) > _NAMED_UNDECODABLE else ""
            logger.warning(
                f"{len(named):,} of {counted(len(self.sources), 'file')} have bytes that are not text in their encoding: "
                f"{', '.join(named[:_NAMED_UNDECODABLE])}{more}. What could not be read became U+FFFD. Say which encoding they "
                'have, such as `encoding="cp1252"` (`--encoding cp1252`) or "utf-16-le", or leave out files that are not text.'
            )

    def _read_iterable(self, documents: Iterable[Any]) -> Iterator[Record]:
        for number, record in enumerate(documents):
            if isinstance(record, os.PathLike):
                for file, name in _files_of(record):
                    yield from self._read_file(file, name)
                continue
            # Most likely a list of file names, which would become documents of one word each.
            if isinstance(record, str) and suffix_of(record) and os.path.isfile(record):
                raise DatastoreInputError(
                    f"Document {number} is the text {record!r}, which is also the name of a file. Pass Path({record!r}) for "
                    f"its content, or {{'text': {record!r}}} for the name as a text."
                )
            yield record, f"Document {number}", {}

    def _read_file(self, file: Path, name: str) -> Iterator[Record]:
        # `name` is relative to the path that the user gave: a datastore records no absolute paths.
        self.sources.append({"name": without_lone_surrogates(name)})
        yield from self._files.read(file, name)
        if name in self._files.left_out[-1:]:
            self.sources.pop()


def read_texts(
    documents: Any, *, encoding: str | None = None, split: str | None = None
) -> tuple[list[dict[str, str]], DocumentReader]:
    """All documents of an input that is not to become a datastore, as dicts with `id`, `title` and `text`, and their reader.

    Raises:
        DatasetError: where [`DocumentReader`] raises a DatastoreInputError.
    """
    try:
        reader = DocumentReader(documents, encoding=encoding, split=split)
        found = [{"id": one.id, "title": one.title, "text": one.text} for one in reader]
    except DatastoreInputError as error:
        raise DatasetError(str(error)) from error
    reader.warn_of_repairs()
    return found, reader


def as_document(record: Any, where: str, defaults: dict[str, str]) -> Document | None:
    """A record as a checked document; None if it has no text.

    Args:
        record: a text, or a mapping with a `text`.
        where (`str`): where it was read, for messages.
        defaults (`dict[str, str]`): its id, title and source, unless it has its own.
    Raises:
        DatastoreInputError: if it is neither, or one of the four fields has an unsuitable type.
    """
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, Mapping):
        raise DatastoreInputError(
            f"{where} is of type {type(record).__name__}. Pass a text (str), or a dict with a 'text'."
        )
    if "text" not in record:
        raise DatastoreInputError(
            f"{where} has the fields {[str(key) for key in record]}, but no 'text'. Rename the field with the text, or leave out "
            "what is no document."
        )
    record = {key: None if is_missing(value) else value for key, value in record.items()}
    text = record["text"]
    if text is not None and not isinstance(text, str):
        raise DatastoreInputError(
            f"The text of {where} is of type {type(text).__name__}, not str. Pass a text, or None if it has none."
        )
    if text is None or not text.strip():
        return None
    texts = {name: _as_text(record.get(name), defaults.get(name, ""), name, where) for name in _FIELDS[:3]}
    texts["text"] = text
    clean = {name: without_lone_surrogates(value) for name, value in texts.items()}
    metadata = {str(key): value for key, value in record.items() if key not in _FIELDS}
    return Document(where=where, metadata=metadata, is_repaired=clean != texts, **clean)


def is_missing(value: Any) -> bool:
    """None, or NaN, NaT or NA, which pandas has where a row is empty: one rule for every input."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, Real) and bool(value != value)


def _unsuitable(documents: Any) -> str:
    """What to pass instead of an object that does not hold documents; empty for one that does."""
    if isinstance(documents, Mapping):
        splits = ", ".join(repr(key) for key in list(documents)[:5])
        return f"It has the keys {splits}: pass one split, such as documents['train'], or a list with one dict per document."
    if hasattr(documents, "columns"):  # iterating over a table gives columns, or their names
        return "Pass its rows: `df.to_dict(\"records\")` or `datasets.Dataset.from_pandas(df)`, with a column 'text'."
    if isinstance(documents, (bytes, bytearray)):
        return "Decode the text first; pass a path as `os.fsdecode(path)`."
    if (
        not isinstance(documents, Iterable)
        or isinstance(documents, torch.Tensor)
        or getattr(documents, "shape", None) == ()
    ):
        return "Pass an iterable of texts or dicts, a path, or a dataset."
    columns = getattr(documents, "column_names", None)
    if columns is not None and "text" not in columns:
        return f"It has the columns {list(columns)}, but no 'text': use `dataset.rename_column('<name>', 'text')`."
    return ""


def _files_of(given: str | os.PathLike[str]) -> list[tuple[Path, str]]:
    """The files under a path in a fixed order, each with its name relative to the path.

    Raises:
        DatastoreInputError, DatastoreNotFoundError: if there are none.
        DatastoreReadError: for a folder that cannot be read: without its files, `sync` would delete them from the datastore.
    """
    path = Path(given)
    try:
        return _found_in(path)
    except OSError as error:
        if isinstance(error, RetroError):
            raise
        raise not_readable(Path(error.filename or path), error) from error


def _found_in(path: Path) -> list[tuple[Path, str]]:
    if path.is_file():
        if not suffix_of(path.name):
            raise DatastoreInputError(
                f"{str(path)!r} has none of the suffixes {', '.join(SUFFIXES)}, with or without .gz. Convert or rename it."
            )
        return [(path, path.name)]
    if path.exists() and not path.is_dir():
        raise DatastoreInputError(
            f"{str(path)!r} is a pipe or a device. Write its content to a file: documents may be read more than once."
        )
    if not path.is_dir():
        raise DatastoreNotFoundError(
            f"There is no file or folder {str(path)!r} with documents. Check the path, or pass texts as a list."
        )
    # The files of a datastore are not documents, even if the store is inside the folder of texts.
    below = _below(path)
    stores = {file.parent for file in below if file.name == MANIFEST_NAME}
    if path in stores:
        raise DatastoreInputError(f"{str(path)!r} is a datastore. Pass a folder or file of texts.")
    if stores:
        logger.warning(f"Left out {counted(len(stores), 'datastore')} among the texts, such as {str(min(stores))!r}.")
    found = [(file, file.relative_to(path).as_posix()) for file in below if stores.isdisjoint(file.parents)]
    # A link to a folder may lead in a circle; a broken link may be a disk that is not mounted.
    if links := sorted(name for file, name in found if file.is_symlink() and not file.is_file()):
        logger.warning(
            f"Left out {counted(len(links), 'link')} to folders, or to nothing, such as {links[0]!r}. Pass a linked folder "
            "itself, or copy it."
        )
    if pipes := sorted(name for file, name in found if not (file.is_symlink() or file.is_file() or file.is_dir())):
        logger.warning(f"Left out pipes and devices ({len(pipes):,}), such as {pipes[0]!r}.")
    files_there = [pair for pair in found if pair[0].is_file()]
    # A folder of somebody else must not bring in files from elsewhere on this machine.
    if outside := sorted(name for file, name in files_there if not is_inside(path, file)):
        logger.warning(
            f"Left out {counted(len(outside), 'link')} to files outside of the folder, such as {outside[0]!r}. Copy these files "
            "into it, or pass them themselves."
        )
    found = sorted((pair for pair in files_there if is_inside(path, pair[0])), key=lambda pair: pair[1])
    files = [pair for pair in found if suffix_of(pair[1])]
    if not files:
        raise DatastoreInputError(f"The folder {str(path)!r} has no {', '.join(SUFFIXES)} file. Check the path.")
    others = [name for _, name in found if not suffix_of(name)]
    if others:
        more = ", …" if len(others) > _NAMED_OTHERS else ""
        logger.warning(
            f"Skipped {counted(len(others), 'file')} of other kinds: {', '.join(others[:_NAMED_OTHERS])}{more}"
        )
    return files


def _below(path: Path) -> list[Path]:
    """Everything below a folder that is not hidden. Links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, files in os.walk(path, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in (*folders, *files) if not name.startswith(".")]
    return found


def _no_text(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_UNDECODABLE:,} more" if len(names) > _NAMED_UNDECODABLE else ""
    return (
        f"{counted(len(names), 'file')} with NUL characters: {', '.join(map(repr, sorted(names)[:_NAMED_UNDECODABLE]))}{more}. If it is "
        'text in UTF-16 without a mark, say so with `encoding="utf-16-le"` (`--encoding utf-16-le`) or "utf-16-be".'
    )


def _source_of(info: Any) -> dict[str, str]:
    """Name, revision and license of a `datasets.Dataset`, where it knows them."""
    known = {
        "name": getattr(info, "dataset_name", None) or "dataset",
        "config": getattr(info, "config_name", None),
        "revision": str(info.version) if getattr(info, "version", None) else None,
        "license": getattr(info, "license", None),
    }
    return {key: without_lone_surrogates(str(value)) for key, value in known.items() if value}


def _as_text(value: Any, default: str, name: str, where: str) -> str:
    if value is None or (isinstance(value, str) and not value):
        return default
    text = _in_digits(value)
    if text is None:
        raise DatastoreInputError(
            f"The {name} of {where} is {shown(value)}, of type {type(value).__name__}. Pass a text or a whole number, "
            "or None if it has none."
        )
    return text


def _in_digits(value: Any) -> str | None:
    """A text unchanged, a whole number as digits, None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if isinstance(value, Integral):
        number = int(value)
        return str(number) if number.bit_length() <= _MOST_BITS else None
    # pandas turns whole numbers into floats where a row is empty. Above 2**53 a float stands for several numbers.
    share = float(value)
    return str(int(share)) if share.is_integer() and abs(share) <= 2**53 else None


def known_id(id: Any) -> str | None:
    """One id as a text, as when a datastore is built; None for an id that is missing. Raises as [`document_ids`]."""
    return None if is_missing(id) else document_ids([id])[0]


def document_ids(ids: Any) -> list[str]:
    """One id or several as a list of texts; whole numbers become digits, as when a datastore is built.

    Raises:
        DatastoreInputError: for an id that is neither a text nor a whole number.
    """
    texts = []
    is_one = isinstance(ids, (str, torch.Tensor)) or not isinstance(ids, Iterable) or getattr(ids, "shape", None) == ()
    for id in [ids] if is_one else ids:
        text = _in_digits(id)
        if text is None:
            raise DatastoreInputError(
                f"An id is {shown(id)}, of type {type(id).__name__}. Pass a text or a whole number, or a list of them."
            )
        texts.append(without_lone_surrogates(text))
    return texts
