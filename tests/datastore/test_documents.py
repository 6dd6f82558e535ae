"""Every kind of input becomes the same documents, and what is no document is named with its place."""

import gzip
import json
import math
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retro_hf.datastore.documents import DocumentReader, document_ids
from retro_hf.errors import DatastoreInputError, DatastoreNotFoundError


ROWS = [
    {"id": "x", "title": "T", "source": "S", "text": "first text", "year": 1},
    {"id": "y", "title": "U", "source": "S", "text": "second text", "year": 2},
]


def read(documents):
    return list(DocumentReader(documents))


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


def test_texts_are_numbered_and_lines_of_files_are_named(tmp_path):
    assert [d.id for d in read(["a", "", "c"])] == ["0", "2"]
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "a"}, {"text": "b", "source": "own"}])
    assert [(d.id, d.source) for d in read(path)] == [("corpus.jsonl:1", "corpus.jsonl"), ("corpus.jsonl:2", "own")]


def test_a_folder_is_read_in_order_of_names_hidden_files_apart(tmp_path):
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


def test_suffixes_may_be_in_upper_case_and_what_is_skipped_is_told(tmp_path, caplog):
    for name in ("c.png", "e.PDF", ".hidden.png"):
        (tmp_path / name).write_bytes(b"\x00")
    (tmp_path / "a.TXT").write_text("text of a")
    write_jsonl(tmp_path / "d.JSONL")
    write_jsonl(tmp_path / "f.jsonl.GZ")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "g.Parquet")
    assert [d.id for d in read(tmp_path)] == ["a.TXT", *["x", "y"] * 3]
    assert [record.getMessage() for record in caplog.records] == ["Skipped 2 files of other kinds: c.png, e.PDF"]
    for number in range(9):
        (tmp_path / f"h{number}.log").write_text("")
    read(tmp_path)
    assert caplog.messages[-1] == "Skipped 11 files of other kinds: c.png, e.PDF, h0.log, h1.log, h2.log, …"


def test_links_to_files_are_read_and_other_links_are_told(tmp_path, caplog):
    """A corpus on a disk that is not there would shrink unnoticed."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("text of b")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("text of a")
    (corpus / "c.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    assert [d.text for d in read(corpus)] == ["text of a", "text of b"]
    assert not caplog.records
    (corpus / "folder").symlink_to(tmp_path / "elsewhere")
    (corpus / "gone.txt").symlink_to("nowhere")
    (corpus / "round.txt").symlink_to("round.txt")
    assert [d.text for d in read(corpus)] == ["text of a", "text of b"]
    assert caplog.messages == [
        "Left out 3 links to folders, or to nothing, such as 'folder'. Pass a linked folder itself, or copy it."
    ]


def test_a_pipe_is_told_from_a_path_that_is_wrong(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(
        DatastoreInputError, match="is a pipe or a device, not a file. Write what comes from it to a file"
    ):
        read(tmp_path / "pipe.jsonl")


def test_paths_in_a_list_are_files(tmp_path):
    (tmp_path / "one.txt").write_text("text of one")
    assert [d.text for d in read([tmp_path / "one.txt", "one.txt"])] == ["text of one", "one.txt"]


def test_ids_may_be_whole_numbers_of_any_kind():
    ids = [7, np.int64(8), 9.0, np.float32(10), "11.0"]
    assert [d.id for d in read([{"text": "x", "id": id} for id in ids])] == ["7", "8", "9", "10", "11.0"]
    assert document_ids(ids) == ["7", "8", "9", "10", "11.0"]
    assert document_ids(np.arange(2)) == ["0", "1"]
    with pytest.raises(DatastoreInputError, match="An id is 1.5, of type float"):
        document_ids([1.5])


def test_the_name_of_a_file_is_no_text(tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("text of one")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatastoreInputError, match=r"Document 1 is the text 'one.txt'.*pass Path\('one.txt'\)"):
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
def test_a_name_that_is_not_utf8_becomes_one_in_all_that_is_recorded(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a cup")
    reader = DocumentReader(tmp_path)
    (document,) = reader
    name = "caf\ufffd.txt"
    assert (document.id, document.source, document.title) == (name, name, "caf\ufffd")
    assert reader.sources == [{"name": name}]


def test_files_that_are_not_utf8_are_counted_and_readable_ones_keep_their_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin1"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one \xff"}\n{"text": "two \xff"}\n\xef\xbb\xbf{"text": "three"}\n')
    (tmp_path / "c.md").write_bytes(b"first\r\nsecond\rthird \xef\xbf\xbd")
    reader = DocumentReader(tmp_path)
    texts = [document.text for document in reader]
    assert texts == ["caf\ufffd", "one \ufffd", "two \ufffd", "three", "first\nsecond\nthird \ufffd"]
    assert reader.not_utf8 == {"a.txt", "b.jsonl"}


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([{"id": "a", "content": "x"}], r"Document 0 has the fields \['id', 'content'\], but no 'text'"),
        (["fine", {"text": 3}], r"text of Document 1 is of type int, not str"),
        (["fine", 3.5], r"Document 1 is of type float"),
        ([["a", "b"]], r"Document 0 is of type list"),
        ([{"text": "x", "title": ["t"]}], r"title of Document 0 is \['t'\], of type list, but it must be a text or"),
        (
            [{"text": "x", "id": 1.5}],
            r"id of Document 0 is 1.5, of type float, but .* whole number. Write it as a text",
        ),
        ([{"text": "x", "title": math.nan}], r"title of Document 0 is nan, of type float.*leave it out \(None\)"),
        ([{"text": "x", "id": 2.0**60}], r"id of Document 0 is 1.15\d+e\+18"),
        ([{"text": "x", "id": True}], r"id of Document 0 is True, of type bool"),
        ({"train": ["a"], "test": []}, r"mapping with the keys 'train', 'test'. Pass one split"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), r"Pass one split"),
        (datasets.Dataset.from_dict({"body": ["x"]}), r"columns \['body'\], but no column 'text'.*rename_column"),
        (
            pd.DataFrame(ROWS),
            r"documents are a table \(DataFrame\).*df.to_dict\(\"records\"\).*Dataset.from_pandas\(df\)",
        ),
        (pa.Table.from_pylist(ROWS), r"documents are a table \(Table\). Pass its rows"),
        (7, r"documents are of type int"),
        (b"texts", r"documents are bytes. Decode them"),
        ("", r"path of the documents is empty. Name a folder"),
    ],
)
def test_what_is_no_document_is_named(documents, message):
    with pytest.raises(DatastoreInputError, match=message):
        read(documents)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_broken_line_is_named_with_file_and_number(tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    with gzip.open(path, "wt") if suffix.endswith("gz") else path.open("w") as file:
        file.write('{"text": "fine"}\n\n{"text": "bro\n')
    with pytest.raises(DatastoreInputError, match=rf"corpus{suffix}:3 is not JSON"):
        read(path)


def test_a_line_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("[1, 2]\n")
    with pytest.raises(DatastoreInputError, match=r"corpus.jsonl:1 is of type list"):
        read(path)
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(DatastoreInputError, match=r"corpus.jsonl:1 is not JSON"):
        read(path)


def test_a_gzip_file_cut_short_is_named(tmp_path):
    path = write_jsonl(tmp_path / "corpus.jsonl.gz", ROWS * 2000)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DatastoreInputError, match=r"corpus.jsonl.gz' breaks off after line"):
        read(path)


def test_a_gzip_file_with_something_behind_it_is_named(tmp_path):
    path = write_jsonl(tmp_path / "corpus.jsonl.gz")
    path.write_bytes(path.read_bytes() + b"something else")
    with pytest.raises(
        DatastoreInputError, match=r"corpus.jsonl.gz' is damaged, or goes on with something else, after line 3"
    ):
        read(path)


def test_a_file_that_is_no_parquet_file_is_named(tmp_path):
    path = tmp_path / "corpus.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DatastoreInputError, match=r"corpus.parquet' is not a readable parquet file"):
        read(path)


def test_missing_paths_and_empty_folders_are_named(tmp_path):
    with pytest.raises(DatastoreNotFoundError, match=r"no file or folder .*texts themselves are passed as a list"):
        read(str(tmp_path / "nowhere"))
    with pytest.raises(DatastoreInputError, match=r"holds no \.txt, \.md"):
        read(tmp_path)
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(DatastoreInputError, match=r"x.pdf' is none of the readable kinds"):
        read(tmp_path / "x.pdf")
