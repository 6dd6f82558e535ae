"""Every kind of input becomes the same documents, and what is no document is named with its place."""

import errno
import gzip
import json
import math
import os
import sys
import time
from datetime import date
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retro_hf.datastore.documents import DocumentReader, document_ids
from retro_hf.errors import DatastoreInputError, DatastoreNotFoundError, DatastoreReadError, MissingExtraError


ROWS = [
    {"id": "x", "title": "T", "source": "S", "text": "first text", "year": 1},
    {"id": "y", "title": "U", "source": "S", "text": "second text", "year": 2},
]


def read(documents):
    return list(DocumentReader(documents))


def texts_of(documents, **options):
    return [document.text for document in DocumentReader(documents, **options)]


def write_jsonl(path: Path, rows=ROWS) -> Path:
    opened = gzip.open(path, "wt") if path.name.lower().endswith(".gz") else path.open("w")
    with opened as file:
        file.write("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


@pytest.mark.parametrize("kind", ["list", "generator", "dataset", "iterable", "jsonl", "jsonl.gz", "parquet"])
def test_every_kind_of_input_gives_the_same_documents(kind, tmp_path):
    path = tmp_path / f"corpus.{kind}"
    if kind.startswith("jsonl"):
        write_jsonl(path)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    documents = {
        "list": lambda: ROWS,
        "generator": lambda: (row for row in ROWS),
        "dataset": lambda: datasets.Dataset.from_list(ROWS),
        "iterable": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    }.get(kind, lambda: str(path))()
    found = [(d.id, d.title, d.source, d.text, d.metadata) for d in read(documents)]
    assert found == [("x", "T", "S", "first text", {"year": 1}), ("y", "U", "S", "second text", {"year": 2})]


def test_texts_get_numbers_and_lines_get_file_names_as_ids(tmp_path):
    assert [d.id for d in read(["a", "", "c"])] == ["0", "2"]
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "a"}, {"text": "b", "source": "own"}])
    assert [(d.id, d.source) for d in read(path)] == [("corpus.jsonl:1", "corpus.jsonl"), ("corpus.jsonl:2", "own")]


def test_folder_is_read_in_name_order_without_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("text of one")
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfwith a mark \xff")
    (tmp_path / "c.bin").write_bytes(b"\x00")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    write_jsonl(tmp_path / "d.jsonl")
    reader = DocumentReader(tmp_path)
    found = [(d.id, d.title, d.source) for d in reader]
    assert found == [("a.md", "a", "a.md"), ("b/one.txt", "one", "b/one.txt"), ("x", "T", "S"), ("y", "U", "S")]
    assert read(tmp_path)[0].text == "with a mark \ufffd"
    assert reader.sources == [{"name": "a.md"}, {"name": "b/one.txt"}, {"name": "d.jsonl"}]


def test_upper_case_suffixes_are_read_and_skipped_files_are_logged(tmp_path, caplog):
    for name in ("c.png", "e.DOC", ".hidden.png"):
        (tmp_path / name).write_bytes(b"\x00")
    (tmp_path / "a.TXT").write_text("text of a")
    write_jsonl(tmp_path / "d.JSONL")
    write_jsonl(tmp_path / "f.jsonl.GZ")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "g.Parquet")
    assert [d.id for d in read(tmp_path)] == ["a.TXT", *["x", "y"] * 3]
    assert [record.getMessage() for record in caplog.records] == ["Skipped 2 files of other kinds: c.png, e.DOC"]
    for number in range(9):
        (tmp_path / f"h{number}.log").write_text("")
    read(tmp_path)
    assert caplog.messages[-1] == "Skipped 11 files of other kinds: c.png, e.DOC, h0.log, h1.log, h2.log, …"


def test_links_to_files_of_the_folder_are_read_and_other_links_are_logged(tmp_path, caplog):
    """A corpus on a disk that is not there would shrink unnoticed, and a stranger's link would bring in a private file."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("text of b")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("text of a")
    (corpus / "b.txt").symlink_to("a.txt")
    assert [d.text for d in read(corpus)] == ["text of a", "text of a"]
    assert not caplog.records
    (corpus / "c.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    (corpus / "d.txt").symlink_to("../elsewhere/b.txt")
    assert [d.text for d in read(corpus)] == ["text of a", "text of a"]
    assert "2 links to files outside" in caplog.text and "'c.txt'" in caplog.text
    caplog.clear()
    (corpus / "folder").symlink_to(tmp_path / "elsewhere")
    (corpus / "gone.txt").symlink_to("nowhere")
    (corpus / "round.txt").symlink_to("round.txt")
    assert [d.text for d in read(corpus)] == ["text of a", "text of a"]
    assert caplog.messages[0] == (
        "Left out 3 links to folders, or to nothing, such as 'folder'. Pass a linked folder itself, or copy it."
    )


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    """`sync` would delete its documents from the datastore."""
    (tmp_path / "closed").mkdir()
    for name in ("a.txt", "closed/b.txt"):
        (tmp_path / name).write_text("text")
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    with pytest.raises(DatastoreReadError, match="closed"):
        read(tmp_path)


@pytest.mark.parametrize("length", [300, 5000])
def test_a_path_that_is_too_long_is_explained(length):
    """Most likely it is the text itself."""
    with pytest.raises(DatastoreReadError, match="too long"):
        read("x" * length)


def test_line_that_unpacks_to_more_than_a_document_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("retro_hf.datastore.document_files.MAX_DOCUMENT_BYTES", 1000)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b'{"text": "short"}\n{"text": "' + b"a" * 1_000_000 + b'"}')
    (tmp_path / "b.txt").write_text("a" * 1001)
    (tmp_path / "c.jsonl").write_text('{"text": ' + "[" * 900 + "\n")
    for name in ("a.jsonl.gz", "b.txt", "c.jsonl"):
        with pytest.raises(DatastoreInputError):
            read(tmp_path / name)


def test_pipe_is_not_reported_as_a_missing_path(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DatastoreInputError):
        read(tmp_path / "pipe.jsonl")


def test_paths_in_a_list_are_read_as_files(tmp_path):
    (tmp_path / "one.txt").write_text("text of one")
    assert [d.text for d in read([tmp_path / "one.txt", "one.txt"])] == ["text of one", "one.txt"]


def test_ids_may_be_whole_numbers_of_any_kind():
    ids = [7, np.int64(8), 9.0, np.float32(10), "11.0"]
    assert [d.id for d in read([{"text": "x", "id": id} for id in ids])] == ["7", "8", "9", "10", "11.0"]
    assert document_ids(ids) == ["7", "8", "9", "10", "11.0"]
    assert document_ids(np.arange(2)) == ["0", "1"]
    with pytest.raises(DatastoreInputError):
        document_ids([1.5])


def test_file_name_given_as_a_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("text of one")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatastoreInputError):
        read(["fine", "one.txt"])
    assert [d.text for d in read([{"text": "one.txt"}, "two.txt", "x" * 5000 + ".txt", "\0.txt"])][:2] == [
        "one.txt",
        "two.txt",
    ]


def test_empty_documents_are_skipped_and_counted():
    reader = DocumentReader(["a", "", " \n\t", {"text": None}, {"text": "b"}])
    assert [d.text for d in reader] == ["a", "b"]
    assert reader.num_empty == 3


def test_lone_surrogates_are_replaced_and_pairs_joined(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a\\ud800b", "title": "\\udc00"}\n{"text": "\\ud83d\\ude00 \\u0000"}\n')
    reader = DocumentReader(path)
    assert [(d.text, d.title) for d in reader] == [("a\ufffdb", "\ufffd"), ("\U0001f600 \x00", "")]
    assert reader.num_repaired == 1
    assert read(["\ud83d\ude00"])[0].text == "\U0001f600"
    reader = DocumentReader([{"id": "\ud800", "text": "a"}, {"title": "\ud800", "text": "a"}, "a"])
    assert [d.id for d in reader] == ["\ufffd", "1", "2"] and reader.num_repaired == 2


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode there")
def test_file_name_that_is_not_utf8_is_repaired_everywhere(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a cup")
    reader = DocumentReader(tmp_path)
    (document,) = reader
    name = "caf\ufffd.txt"
    assert (document.id, document.source, document.title) == (name, name, "caf\ufffd")
    assert reader.sources == [{"name": name}]


def test_files_that_are_not_utf8_are_read_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin1"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one \xff"}\n{"text": "two \xff"}\n\xef\xbb\xbf{"text": "three"}\n')
    (tmp_path / "c.md").write_bytes(b"first\r\nsecond\rthird \xef\xbf\xbd")
    reader = DocumentReader(tmp_path)
    texts = [document.text for document in reader]
    assert texts == ["caf\ufffd", "one \ufffd", "two \ufffd", "three", "first\nsecond\nthird \ufffd"]
    assert set(reader.undecodable) == {"a.txt", "b.jsonl"}


@pytest.mark.parametrize(
    ("documents", "named"),
    [
        ([{"id": "a", "content": "x"}], r"Document 0 .*\['id', 'content'\]"),
        (["fine", {"text": 3}], "Document 1 is of type int"),
        (["fine", 3.5], r"Document 1 is of type float"),
        ([["a", "b"]], r"Document 0 is of type list"),
        ([{"text": "x", "title": ["t"]}], r"title of Document 0 is \['t'\]"),
        ([{"text": "x", "id": 1.5}], "id of Document 0 is 1.5"),
        ([{"text": "x", "id": 2.0**60}], r"id of Document 0 is 1.15\d+e\+18"),
        ([{"text": "x", "id": True}], "id of Document 0 is True"),
        ({"train": ["a"], "test": []}, "'train', 'test'"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "train"),
        (datasets.Dataset.from_dict({"body": ["x"]}), "body.*rename_column"),
        (pd.DataFrame(ROWS), "DataFrame.*to_dict.*from_pandas"),
        (pa.Table.from_pylist(ROWS), "Table"),
        (7, "type int"),
        (b"texts", "type bytes"),
        ("", "empty"),
    ],
)
def test_invalid_document_is_reported(documents, named):
    with pytest.raises(DatastoreInputError, match=named):
        read(documents)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_broken_line_is_reported_with_file_and_number(tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    with gzip.open(path, "wt") if suffix.endswith("gz") else path.open("w") as file:
        file.write('{"text": "fine"}\n\n{"text": "bro\n')
    with pytest.raises(DatastoreInputError):
        read(path)


def test_line_that_is_not_an_object_is_reported(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("[1, 2]\n")
    with pytest.raises(DatastoreInputError):
        read(path)
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(DatastoreInputError):
        read(path)


def test_truncated_gzip_file_is_reported(tmp_path):
    path = write_jsonl(tmp_path / "corpus.jsonl.gz", ROWS * 2000)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DatastoreInputError):
        read(path)


def test_gzip_file_with_trailing_data_is_reported(tmp_path):
    path = write_jsonl(tmp_path / "corpus.jsonl.gz")
    path.write_bytes(path.read_bytes() + b"something else")
    with pytest.raises(DatastoreInputError):
        read(path)


def test_invalid_parquet_file_is_reported(tmp_path):
    path = tmp_path / "corpus.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DatastoreInputError):
        read(path)


def test_missing_paths_and_empty_folders_are_reported(tmp_path):
    with pytest.raises(DatastoreNotFoundError):
        read(str(tmp_path / "nowhere"))
    with pytest.raises(DatastoreInputError):
        read(tmp_path)
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(DatastoreInputError):
        read(tmp_path / "x.pdf")


PAGE = """<!doctype html><html><head><title>Boat  times</title><style>p {color: red}</style></head><body>
<h2>Fares</h2><p>A ride costs&nbsp;<b>ten</b> crowns.</p><script>track("x < y")</script>
<table><tr><td>Lund</td><td>9:00</td></tr></table><![x[ odd ]]><ul><li>bring<li>bread</ul></body></html>"""
TABLE = 'text,id,year\r\n"Boats, red ""ones"".\nTwo lines.",a,1\r\n,empty,2\r\nBread is sold.,,3\r\n'


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\r\ntwo", [("a.txt", "a", "one\ntwo")]),
        ("a.md", "# one", [("a.md", "a", "# one")]),
        ("a.html", PAGE, [("a.html", "Boat times", "## Fares\nA ride costs ten crowns.\nLund 9:00\nbring\nbread")]),
        ("a.htm", "<p>no title", [("a.htm", "a", "no title")]),
        ("a.csv", TABLE, [("a", "", 'Boats, red "ones".\nTwo lines.'), ("a.csv:2", "", "Bread is sold.")]),
        ("semicolon.csv", "id;text\n7;Ten, or so\n", [("7", "", "Ten, or so")]),
        ("a.tsv", "id\ttext\n7\tTen, or so\n", [("7", "", "Ten, or so")]),
        ("a.json", '[{"text": "x", "id": "i"}, "y"]', [("i", "", "x"), ("a.json:1", "", "y")]),
        ("one.json", '{"text": "x"}', [("one.json", "one", "x")]),
        ("lines.json", '{"text": "x"}\n{"text": "y"}\n', [("lines.json:1", "", "x"), ("lines.json:2", "", "y")]),
        ("a.jsonl", '{"text": "x", "title": "T"}\n\n{"text": "y"}', [("a.jsonl:1", "T", "x"), ("a.jsonl:3", "", "y")]),
    ],
)
def test_every_format_is_read_plain_and_packed(name, content, expected, packed, tmp_path):
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    found = [(d.id, d.title, d.text) for d in read(path)]
    assert found == [(id.replace(name, path.name), title, text) for id, title, text in expected]
    assert [d.id for d in read(tmp_path)] == [id for id, _, _ in found]


def test_packed_parquet_is_read(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert texts_of(tmp_path / "a.parquet.gz") == texts_of(tmp_path / "a.parquet") == ["first text", "second text"]


def pdf_of(text: str) -> bytes:
    """A PDF file of one page, written by hand."""
    stream = f"BT /F1 24 Tf 72 720 Td ({text}) Tj ET".encode()
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>"
    font = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
    stream = b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream)
    parts = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>", page, stream, font]
    content, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, start=1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, part)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return content + b"xref\n0 6\n0000000000 65535 f \n%strailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        table,
        len(content),
    )


def test_pdf_is_read_by_pypdf(tmp_path, monkeypatch):
    (tmp_path / "boats.pdf").write_bytes(pdf_of("Boats leave at nine."))
    assert [(d.id, d.title, d.text) for d in read(tmp_path)] == [("boats.pdf", "boats", "Boats leave at nine.")]
    (tmp_path / "boats.pdf").write_bytes(b"%PDF-1.4 nonsense")
    with pytest.raises(DatastoreInputError):
        read(tmp_path)
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(MissingExtraError, match=r"retro-hf\[pdf\]"):
        read(tmp_path)


LINE = "Das Caf\u00e9 \u00f6ffnet um neun \u2013 \u56fe\u4e66\u9986.\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html", "a.csv", "a.tsv", "a.json", "a.jsonl", "a.jsonl.gz"])
def test_mark_at_the_beginning_of_a_file_is_obeyed(name, encoding, tmp_path, caplog):
    content = {
        "a.html": f"<p>{LINE}</p>",
        "a.csv": f"text\n{LINE}",
        "a.tsv": f"text\n{LINE}",
        "a.json": json.dumps([{"text": LINE}], ensure_ascii=False),
        "a.jsonl": json.dumps({"text": LINE}, ensure_ascii=False) + "\r\n",
        "a.jsonl.gz": json.dumps({"text": LINE}, ensure_ascii=False) + "\r\n",
    }.get(name, LINE)
    mark = "\ufeff" if encoding.endswith("-be") else ""  # Python writes no mark for these
    encoded = (mark + content).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(encoded) if name.endswith(".gz") else encoded)
    # A mark says more than the encoding that somebody named for the whole folder.
    for named in (None, "cp1252"):
        reader = DocumentReader(tmp_path, encoding=named)
        assert [d.text.strip() for d in reader] == [LINE.strip()]
        assert not reader.undecodable


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "shift_jis", "gb18030", "latin1"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_other_encodings_are_named_by_the_caller(name, encoding, tmp_path):
    text = {"cp1252": "Caf\u00e9 \u2013 \u20ac", "latin1": "Caf\u00e9"}.get(encoding, "\u65e5\u672c\u8a9e")
    content = {"a.csv": f"text\n{text}\n", "a.jsonl": f'{{"text": "{text}"}}\n'}.get(name, text)
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert texts_of(tmp_path, encoding=encoding) == [text]


def test_encoding_that_a_page_declares_is_obeyed(tmp_path):
    page = '<html><head><meta charset="{}"></head><p>Caf\u00e9 \u2013 Tee'
    (tmp_path / "a.html").write_bytes(page.format("iso-8859-1").encode("cp1252"))  # as browsers read it
    (tmp_path / "b.html").write_bytes(page.format("nonsense").encode())
    (tmp_path / "c.html").write_bytes(page.format("windows-1252").encode("utf-8-sig"))
    (tmp_path / "d.html").write_bytes(page.format("punycode").encode())
    assert texts_of(tmp_path) == ["Caf\u00e9 \u2013 Tee"] * 4


@pytest.mark.parametrize(
    "encoding", ["nonsense", "base64", "rot13", "", 7, "idna", "punycode", "undefined", "unicode_escape"]
)
def test_unknown_encoding_is_refused(encoding, tmp_path):
    with pytest.raises(DatastoreInputError):
        DocumentReader(tmp_path, encoding=encoding)


def test_every_file_with_undecodable_bytes_is_named(tmp_path, caplog):
    for number in range(23):
        (tmp_path / f"{number:02d}.txt").write_bytes(b"caf\xe9")
    (tmp_path / "nul.txt").write_bytes("no mark".encode("utf-16-le"))
    (tmp_path / "fine.txt").write_text("caf\u00e9")
    reader = DocumentReader(tmp_path)
    list(reader)
    reader.warn_of_repairs()
    assert len(reader.undecodable) == 23 and "nul.txt" not in reader.undecodable
    assert "23 of 24 files" in caplog.text and "'19.txt'" in caplog.text and "3 more" in caplog.text
    assert "'nul.txt'" in caplog.text


@pytest.mark.parametrize("name", ["picture.txt", "picture.md", "picture.html", "picture.txt.gz"])
def test_file_that_is_no_text_is_left_out_by_name(name, tmp_path, caplog):
    """A picture with the suffix of a text gives no document; alone it is an error, and UTF-16 is read if it is named."""
    content = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(50)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DatastoreInputError, match=name):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.txt").write_bytes("a text".encode("utf-16-le"))
    reader = DocumentReader(tmp_path)
    assert [document.text for document in reader] == ["a text"]
    assert reader.sources == [{"name": "a.txt"}]
    reader.warn_of_repairs()
    assert "2 files" in caplog.text and repr(name) in caplog.text
    assert texts_of(tmp_path / "b.txt", encoding="utf-16-le") == ["a text"]


def test_copies_of_a_long_text_in_a_parquet_file_are_counted_before_they_are_made(tmp_path, monkeypatch):
    """A dictionary of one text is small in the file; rows are read one by one, and a row beyond the bound is refused."""
    monkeypatch.setattr("retro_hf.datastore.document_files.MAX_DOCUMENT_BYTES", 1 << 20)
    text = "a" * (600 << 10)
    pq.write_table(pa.table({"text": [text] * 9, "id": list("abcdefghi")}), tmp_path / "copies.parquet")
    assert [len(document.text) for document in read(tmp_path / "copies.parquet")] == [len(text)] * 9
    for number, column in enumerate(([text * 2], [[text, text]], [{"a": {"b": [text * 2]}}], [[0] * (1 << 18)])):
        table = pa.table({"text": ["short"], "other": column})
        pq.write_table(table, tmp_path / f"{number}.parquet", compression="zstd")
        with pytest.raises(DatastoreInputError, match=f"{number}.parquet"):
            read(tmp_path / f"{number}.parquet")


def test_any_column_of_a_parquet_file_is_kept(tmp_path):
    """Of whatever type: what the bounds look at comes back as Python has it."""
    rows = [
        {"text": "one", "words": ["a", "b"], "deep": {"x": ["c", None], "y": 1}, "raw": b"d", "price": Decimal("1.50"), "day": date(2020, 1, 2)},
        {"text": "two", "words": [], "deep": {"x": None, "y": 2}, "raw": None, "price": None, "day": None},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [document.metadata | {"text": document.text} for document in read(tmp_path / "a.parquet")]
    assert found == rows


@pytest.mark.parametrize("depth", [200, 300, 5000, 200_000])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_nesting_is_bounded(name, depth, tmp_path):
    """What is read can be written again; deeper JSON is refused by name, and brackets in a text do not count."""
    text = "[" * 300
    (tmp_path / name).write_text(json.dumps({"text": text})[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}\n")
    if depth == 200:
        assert texts_of(tmp_path / name) == [text]
    else:
        with pytest.raises(DatastoreInputError, match=name):
            read(tmp_path / name)


def test_tags_that_are_never_closed_take_no_time(tmp_path):
    (tmp_path / "a.html").write_text("<svg>" * 200_000 + "</b>" * 200_000 + "</svg>" + "<p>text")
    assert texts_of(tmp_path / "a.html") == ["text"]


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("too deep"), NotImplementedError("of a library"), KeyError("x")]
)
def test_whatever_a_library_raises_names_the_file(error, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("retro_hf.datastore.document_files.open_parquet", fail)
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(DatastoreInputError, match="a.parquet"):
        read(tmp_path)


@pytest.mark.parametrize("gap", [None, math.nan, np.float32("nan"), pd.NA, pd.NaT])
def test_gap_of_pandas_is_a_value_that_is_not_there(gap):
    rows = [{"text": "a", "id": gap, "title": gap, "year": gap}, {"text": gap}, {"text": "c"}]
    for documents in (rows, iter(rows), pd.DataFrame(rows).to_dict("records")):
        reader = DocumentReader(documents)
        found = list(reader)
        assert [(d.id, d.title, d.text) for d in found] == [("0", "", "a"), ("2", "", "c")]
        assert found[0].metadata == {"year": None} and reader.num_empty == 1


def test_dataset_in_any_format_is_read_as_python_values():
    for kind in (None, "arrow", "numpy", "pandas"):
        assert texts_of(datasets.Dataset.from_list(ROWS).with_format(kind)) == ["first text", "second text"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,text\n1,one, two\n"),
        ("a.csv", 'text\n"never closed\n'),
        ("a.csv", "body\nx\n"),
        ("a.json", '{"data": ["x"]}'),
        ("a.json", "{nonsense"),
        ("a.json", "[[1]]"),
        ("a.txt.gz", "not packed"),
        ("a.parquet.gz", "not packed"),
    ],
)
def test_file_of_another_form_than_its_suffix_says_is_reported(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DatastoreInputError, match=name.replace(".", r"\.")):
        read(tmp_path)


def test_file_is_split_into_documents(tmp_path):
    (tmp_path / "a.md").write_text(
        "intro\n\n# One\n## Deep\ntext of deep\n\nmore\n```\n# code\n```\n\nTwo\n===\nend\n"
    )
    parts = {split: list(DocumentReader(tmp_path, split=split)) for split in ("line", "paragraph", "heading")}
    assert [d.id for d in parts["line"]][:3] == ["a.md:1", "a.md:3", "a.md:4"] and len(parts["line"]) == 11
    assert [(d.id, d.text.split("\n")[0]) for d in parts["paragraph"]] == [
        ("a.md:1", "intro"),
        ("a.md:3", "# One"),
        ("a.md:7", "more"),
        ("a.md:12", "Two"),
    ]
    assert [(d.id, d.title, d.source) for d in parts["heading"]] == [
        ("a.md:1", "a", "a.md"),
        ("a.md:3", "Deep", "a.md"),
        ("a.md:12", "Two", "a.md"),
    ]
    assert "# code" in parts["heading"][1].text and parts["heading"][2].text == "Two\n===\nend"
    assert texts_of(["a\n\nb", {"id": "x", "text": "c"}], split="paragraph") == ["a", "b", "c"]
    with pytest.raises(DatastoreInputError):
        DocumentReader(tmp_path, split="page")


@pytest.mark.parametrize(
    ("unit", "shown"),
    [
        ("<a ", True), ("</a ", True), ('<a x="', True), ("<", True), ("&", True), ("&#", True), ("<!--", False), ("<!", False),
        ("<![", False), ("<?", False), ("</", False), ("<script>", False), ("<script>x</scri", False),
    ],
)  # fmt: skip
def test_markup_that_does_not_end_takes_no_square_of_time(tmp_path, unit, shown):
    """The parser of Python needs minutes for each of these."""
    (tmp_path / "a.html").write_text("<p>The boats.</p>" + unit * 100_000)
    started = time.monotonic()
    (text,) = texts_of(tmp_path)
    assert text.startswith("The boats.") and (len(text) > 100_000) is shown
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("1 < 2 and a<b>c", "1 < 2 and ac"),
        ("<p title=it's>one</p><p title='a > b'>two", "one\ntwo"),
        ("<!-->one<!-- <p>two</p> -->three", "onethree"),
        ("<script>if (a<b) { '</p>' }</script ><style>p>a</style>one", "one"),
        ("<script/>one<noscript>two</noscript><svg><title>three</title></svg>", "one"),
        ("&lt;p&gt; caf&eacute &#65;&#x42; &zzz; &#" + "9" * 5000 + ";", "<p> caf\u00e9 AB &zzz; \ufffd"),
        ("<H2>One\ntwo</H2><h2></h2><tr><td>a<td>b</tr>", "## One two\na b"),
        ("one <b", "one <b"),
    ],
)
def test_what_a_page_shows(tmp_path, page, expected):
    (tmp_path / "a.html").write_text(page)
    assert texts_of(tmp_path) == [expected]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz", "a.html.gz", "a.json.gz", "a.parquet.gz"])
@pytest.mark.parametrize("unit", [b" ", b"\n"])
def test_file_that_unpacks_to_far_more_is_refused(tmp_path, name, unit):
    content = (b"text" if name == "a.csv.gz" else b"") + unit * (1 << 25)
    for level in (1, 9):
        (tmp_path / name).write_bytes(gzip.compress(content, level))
        with pytest.raises(DatastoreInputError, match="200 times its size"):
            read(tmp_path)


def test_packed_text_may_be_large_and_repeat_itself(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"text": "Boat %d"}\n' % n for n in range(1000))))
    assert len(read(tmp_path)) == 1000


def test_json_of_countless_values_is_refused_before_it_is_parsed(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[" + b"[]," * (1 << 23) + b"[],[]]")
    with pytest.raises(DatastoreInputError, match="more than 8,388,608 values"):
        read(tmp_path)


def test_table_without_names_of_columns_is_refused_before_it_is_parsed(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a," * (1 << 20))
    with pytest.raises(DatastoreInputError, match="names of the columns"):
        read(tmp_path)


def test_pipes_in_a_folder_are_left_out_and_told(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "folder").mkdir()
    read(tmp_path)
    assert "pipes" not in caplog.text
    os.mkfifo(tmp_path / "pipe.txt")
    assert texts_of(tmp_path) == ["one"]
    assert "Left out pipes and devices (1), such as 'pipe.txt'" in caplog.text
