"""Files of documents: their bytes become text, and the text becomes records."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .. import extras
from ..arguments import shown
from ..errors import DatastoreInputError, RetroError
from ..outside import parse_json
from .atomic_files import bytes_of, group_bytes, open_parquet
from .web_page import read_page


SUFFIXES = (".txt", ".md", ".html", ".htm", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".pdf")
"""How a name ends that is read, in upper or lower case; `.gz` may follow."""
_LONGEST_SUFFIX = max(map(len, SUFFIXES)) + len(".gz")
_PARQUET_ROWS = 1024
_BLOCK_BYTES = 1 << 20
_MAX_HEADER = 1 << 20  # characters in the line with the names of a table's columns
# A packed file that is larger than this when unpacked, and by this factor, has no text: gzip packs 1,032 equal bytes into one.
_MAX_UNPACKED, _MAX_FACTOR = 1 << 22, 200
# A document is in memory as a whole, and tokenized in one piece.
MAX_DOCUMENT_BYTES = 1 << 28
# The mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Codecs of names and of Python's source, some of which take the square of a text's length.
_NOT_OF_FILES = ("idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape")
_DECLARED = re.compile(rb"<(?:meta\b[^>]*?\bcharset|\?xml\b[^>]*?\bencoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
# The length of a field is bounded by that of a line, which is checked while it is read.
csv.field_size_limit(MAX_DOCUMENT_BYTES)

# A record, where it was read (for messages), and its id, title and source unless it has its own.
Record = tuple[Any, str, dict[str, str]]


def suffix_of(name: str) -> str:
    """The suffix that says how a file is read, in lower case and without `.gz`; empty if it is not read at all."""
    # The name may be a whole text: `lower()` of its end only.
    end = name[-_LONGEST_SUFFIX:].lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if end.endswith(suffix)), "")


class FileReader:
    """Reads files of documents.

    Args:
        encoding (`str`, *optional*): of the texts that have no mark; UTF-8 by default. A mark (UTF-8, UTF-16, UTF-32) at the
            beginning of a file decides, and in HTML what the page declares if no encoding is given.

    Attributes:
        undecodable (`dict[str, str]`): files so far that have other bytes than their encoding, and that encoding. The bytes
            became U+FFFD.
        left_out (`list[str]`): files so far with NUL characters, which no text has: pictures and programs, or UTF-16 without a
            mark. They give no document.
    Raises:
        DatastoreInputError: if there is no such encoding.
    """

    def __init__(self, encoding: str | None = None) -> None:
        self.undecodable: dict[str, str] = {}
        self.left_out: list[str] = []
        self._encoding = encoding
        if encoding is not None and not _is_encoding(encoding):
            raise DatastoreInputError(
                f"There is no encoding {shown(encoding)}. Pass one that Python knows, such as 'cp1252', 'utf-16-le' or 'shift_jis'."
            )

    def read(self, file: Path, name: str) -> Iterator[Record]:
        """The records of a file; `name` stands for it in ids and messages.

        Raises:
            DatastoreInputError: if it is damaged or has another form than its suffix says, and for a document that is too long.
            MissingExtraError: for a PDF file if `pypdf` is not installed.
        """
        suffix = suffix_of(file.name)
        readers: dict[str, Callable[[IO[bytes], str], Iterator[Record]]] = {
            ".html": self._read_html,
            ".htm": self._read_html,
            ".csv": self._read_table,
            ".tsv": self._read_table,
            ".json": self._read_json,
            ".jsonl": self._read_lines,
            ".parquet": self._read_parquet,
            ".pdf": self._read_pdf,
        }
        whole = {"id": name, "title": file.name[: file.name.lower().rindex(suffix)]}  # of a file that is one document
        with _opened(file, name) as stream:
            for record, where, defaults in readers.get(suffix, self._read_text)(stream, name):
                yield record, where, {**whole, "source": name, **defaults}

    # ── one document ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _read_text(self, stream: IO[bytes], name: str) -> Iterator[Record]:
        text = self._text(_whole(stream, name), name)
        if self._is_text(text, name):
            yield text.replace("\r\n", "\n").replace("\r", "\n"), f"File {name!r}", {}

    def _read_html(self, stream: IO[bytes], name: str) -> Iterator[Record]:
        content = _whole(stream, name)
        declared = _DECLARED.search(content[:1024]) if self._encoding is None else None
        text = self._text(content, name, _web_encoding(declared[1].decode("ascii")) if declared else None)
        if self._is_text(text, name):
            shown, title = read_page(text)
            yield {"text": shown, "title": title}, f"File {name!r}", {}

    def _read_pdf(self, stream: IO[bytes], name: str) -> Iterator[Record]:
        pypdf = extras.load("pypdf", f"The file {name!r}")
        content = _whole(stream, name)
        try:
            pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(content)).pages]
        except Exception as error:  # a damaged file can raise anything
            raise DatastoreInputError(
                f"{name!r} is not a PDF file that can be read ({error}). Repair it, remove its password, or leave it out."
            ) from error
        yield "\n\n".join(pages), f"File {name!r}", {}

    # ── many documents ────────────────────────────────────────────────────────────────────────────────────────────────

    def _read_json(self, stream: IO[bytes], name: str) -> Iterator[Record]:
        content = _whole(stream, name)
        text = self._text(content, name)
        try:
            records = parse_json(text)
        except ValueError as error:
            try:  # many name files of JSON lines so
                parse_json(text.lstrip().partition("\n")[0])
            except ValueError:
                raise DatastoreInputError(f"{name!r} is not JSON ({error}). Repair it, or leave it out.") from error
            yield from self._read_lines(io.BytesIO(content), name)
            return
        if not isinstance(records, list):
            yield records, f"File {name!r}", {}
            return
        for number, record in enumerate(records):
            yield record, f"Item {number} of {name!r}", _own(name, number)

    def _read_lines(self, stream: IO[bytes], name: str) -> Iterator[Record]:
        for number, line in enumerate(self._lines(stream, name), start=1):
            line = line.strip().lstrip("\ufeff")  # marks of files that were put together
            if not line:
                continue
            where = f"{name}:{number}"
            try:
                record = parse_json(line)
            except ValueError as error:
                raise DatastoreInputError(
                    f"{where} is not JSON ({error}). Repair or remove the line: each line holds one JSON object."
                ) from error
            yield record, where, _own(name, number)

    def _read_table(self, stream: IO[bytes], name: str) -> Iterator[Record]:
        """Rows below a line with the names of the columns; the character that separates them is the one that finds `text`."""
        lines = self._lines(stream, name)
        first = next(lines, "")
        if len(first) > _MAX_HEADER:
            raise DatastoreInputError(
                f"The first line of {name!r} has {len(first):,} characters, but it should have the names of the columns, in {_MAX_HEADER:,} "
                "at most. Put a line with these names before the rows."
            )
        separators = "\t,;|" if suffix_of(name) == ".tsv" else ",;\t|"
        names = {separator: next(csv.reader([first], delimiter=separator), []) for separator in separators}
        separator = next((key for key, found in names.items() if "text" in map(str.strip, found)), separators[0])
        rows = csv.reader(chain([first], lines), delimiter=separator, strict=True)
        number = 0
        try:
            columns = [column.strip() for column in next(rows, [])]
            for row in rows:
                if not row:
                    continue
                where = f"Row {number} of {name!r}"
                if len(row) > len(columns):
                    raise DatastoreInputError(
                        f"{where} has {len(row)} fields, but there are {len(columns)} columns. Put quotes around a text that has "
                        f"the separator {separator!r} in it."
                    )
                yield dict(zip(columns, row, strict=False)), where, _own(name, number)
                number += 1
        except csv.Error as error:
            raise DatastoreInputError(
                f"Row {number} of {name!r} cannot be read ({error}). A text with quotes or line breaks in it stands in quotes, and "
                "its own quotes are doubled."
            ) from error

    def _read_parquet(self, stream: IO[bytes], name: str) -> Iterator[Record]:
        source = io.BytesIO(_whole(stream, name)) if isinstance(stream, gzip.GzipFile) else stream
        with open_parquet(source) as table:
            rows = chain.from_iterable(part.to_pylist() for part in _parquet_parts(table, name))
            for number, row in enumerate(rows):
                yield row, f"Row {number} of {name!r}", _own(name, number)

    # ── bytes to text ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _encoding_of(self, start: bytes, declared: str | None = None) -> str:
        marked = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)
        return marked or self._encoding or declared or "utf-8"

    def _text(self, content: bytes, name: str, declared: str | None = None) -> str:
        """The content of a whole file as text."""
        encoding = self._encoding_of(content, declared)
        try:
            text = content.decode(encoding)
        except UnicodeError:
            self.undecodable[name] = encoding
            text = content.decode(encoding, "replace")
        return text

    def _is_text(self, text: str, name: str) -> bool:
        """Whether the content of a file is text; one that is not is left out."""
        if "\0" not in text:
            return True
        self.undecodable.pop(name, None)
        self.left_out.append(name)
        return False

    def _lines(self, stream: IO[bytes], name: str) -> Iterator[str]:
        """The lines of a file with their ends, decoded block by block."""
        block = stream.read(_BLOCK_BYTES)
        encoding = self._encoding_of(block)
        decoder = codecs.getincrementaldecoder(encoding)()
        pieces: list[str] = []
        length = number = 0
        while True:
            state = decoder.getstate()
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeError:
                self.undecodable[name] = encoding
                decoder.errors = "replace"
                decoder.setstate(state)
                text = decoder.decode(block, final=not block)
            if "\0" in text:
                self.undecodable[name] = encoding
            *ended, last = text.split("\n")
            for line in ended:
                number += 1
                yield "".join([*pieces, line, "\n"])
                pieces, length = [], 0
            pieces.append(last)
            length += len(last)
            if length > MAX_DOCUMENT_BYTES:
                raise _too_long(f"Line {number + 1} of {name!r}", length)
            if not block:
                break
            block = stream.read(_BLOCK_BYTES)
        if length:
            yield "".join(pieces)


def _own(name: str, number: int) -> dict[str, str]:
    """The id of a record in a file of many; it has no title."""
    return {"id": f"{name}:{number}", "title": ""}


@contextmanager
def _opened(file: Path, name: str) -> Iterator[IO[bytes]]:
    """A file, unpacked while it is read."""
    try:
        with _Unpacked(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb") as stream:
            yield stream  # type: ignore[misc]  # both kinds read bytes
    except RetroError:
        raise
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DatastoreInputError(
            f"{name!r} is not a complete gzip file ({error}). Download or compress it again."
        ) from error
    except OSError as error:
        raise DatastoreInputError(f"{name!r} could not be read: {error.strerror or error}.") from error
    except Exception as error:  # a file of a stranger can make a library raise anything
        reason = str(error) or type(error).__name__
        raise DatastoreInputError(f"{name!r} could not be read ({reason}). Repair it, or leave it out.") from error


def _parquet_parts(table: pq.ParquetFile, name: str) -> Iterator[pa.RecordBatch]:
    """The rows of a file in parts that fit into memory, with the copies of a text counted before they are made."""
    for group in range(table.num_row_groups):
        num_rows = table.metadata.row_group(group).num_rows
        fitting = MAX_DOCUMENT_BYTES * num_rows // max(group_bytes(table.metadata, group), 1)
        size = max(1, min(_PARQUET_ROWS, fitting))
        for batch in table.iter_batches(batch_size=size, row_groups=[group]):
            todo = [batch]
            while todo:
                part = todo.pop()
                taken = bytes_of(part)
                if taken <= MAX_DOCUMENT_BYTES:
                    yield part
                elif part.num_rows == 1:
                    raise _too_long(f"A row of {name!r}", taken)
                else:
                    half = part.num_rows // 2
                    todo += [part.slice(half), part.slice(0, half)]


class _Unpacked(gzip.GzipFile):
    """A packed file, which is not read on once it has unpacked to so much that it cannot be text."""

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes, or EOFError."""
        content = super().read(size)
        if self.tell() > max(_MAX_UNPACKED, _MAX_FACTOR * os.path.getsize(self.name)):
            raise EOFError(f"it unpacks to {_MAX_FACTOR} times its size and more, as no text does")
        return content


def _whole(stream: IO[bytes], name: str) -> bytes:
    content = bytearray()
    while block := stream.read(_BLOCK_BYTES):
        content += block
        if len(content) > MAX_DOCUMENT_BYTES:
            raise _too_long(f"The file {name!r}", len(content))
    return bytes(content)


def _too_long(what: str, size: int) -> DatastoreInputError:
    return DatastoreInputError(
        f"{what} has {size:,} bytes or more, and a document has {MAX_DOCUMENT_BYTES:,} at most. Split it into several."
    )


def _is_encoding(name: str) -> bool:
    try:
        b"".decode(name)  # also refuses codecs that are none of text
        codecs.getincrementaldecoder(name)
    except (LookupError, TypeError, ValueError):
        return False
    return _known_name(name) not in _NOT_OF_FILES


def _known_name(encoding: str) -> str:
    return codecs.lookup(encoding).name


def _web_encoding(declared: str) -> str | None:
    """The encoding that browsers take for a declared one, which cannot be UTF-16: its mark would have been there."""
    if not _is_encoding(declared) or declared.lower().startswith(("utf-16", "utf-32")):
        return None
    return "cp1252" if _known_name(declared) in ("ascii", "iso8859-1") else declared
