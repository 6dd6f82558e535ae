"""Datastores that were written by an earlier version open, and answer as they did."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from retro_hf.datastore import ChunkEmbedder, LexicalSearcher, RetroDatastore, chunk_texts
from retro_hf.errors import DatastoreMismatchError

from .fixtures import make_encoder


ARCHIVE = Path(__file__).parents[1] / "data" / "format_2.zip"


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """A retokenized shard with a re-scored IVF index, an appended flat one, a deleted document, prompts, and BM25."""
    folder = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def answers(old) -> dict[str, np.ndarray]:
    with np.load(old / "format_2_answers.npz") as file:
        return dict(file)


def test_old_datastore_opens_with_valid_checksums_and_answers_as_before(old, answers):
    store = RetroDatastore.load(old / "format_2", verify=True)
    assert (store.generation, store.num_documents, store.num_deleted_documents) == (3, 16, 1)
    ids = np.arange(store.num_chunks)
    tokens, mask = store.gather(ids)
    np.testing.assert_array_equal(tokens, answers["tokens"])
    np.testing.assert_array_equal(mask, answers["mask"])
    np.testing.assert_array_equal(store.document_of(ids), answers["documents"])
    scores, found = store.search(store.keys_of(ids), 3, exclude_documents=store.document_of(ids))
    np.testing.assert_allclose(scores, answers["scores"], atol=1e-5)
    assert (found == answers["ids"]).mean() > 0.99  # equally near chunks may change places
    assert store.document(store.document_number("doc-15"))["title"] == "Title 15"


def test_old_index_of_words_opens_and_answers_as_before(old, answers):
    store = RetroDatastore.load(old / "format_2")
    words = LexicalSearcher.load(store, old / "format_2_words", verify=True)
    scores, ids = words.search(["the king builds", "lighthouse harbor"], 3)
    np.testing.assert_array_equal(ids, answers["word_ids"])
    np.testing.assert_allclose(scores, answers["word_scores"], rtol=1e-6)


def test_embedder_of_an_old_datastore_is_recognized(old, answers, tmp_path):
    encoder = make_encoder(tmp_path)
    prompts = {"prompt": "the river: ", "query_prompt": "the king: "}
    embedder = ChunkEmbedder.from_pretrained(encoder, dtype=torch.float32, **prompts)
    former = [embedder.former_fingerprint, embedder.former_query_fingerprint]
    assert former == answers["fingerprint"].tolist() and embedder.fingerprint not in former
    RetroDatastore.load(old / "format_2").check_compatible(embedder=embedder)
    with pytest.raises(DatastoreMismatchError):
        RetroDatastore.load(old / "format_2").check_compatible(embedder=ChunkEmbedder.from_pretrained(encoder))


def test_old_datastore_can_be_changed(old, tmp_path):
    store = RetroDatastore.load(shutil.copytree(old / "format_2", tmp_path / "store"))
    store.delete(["doc-1"])
    store.compact()
    assert store.num_documents == 14 and store.num_deleted_documents == 0
    RetroDatastore.load(store.path, verify=True)


def test_old_datastore_tells_its_old_keys_from_new_ones(old, tmp_path):
    """Keys of format 2 are made of decoded tokens. What is appended knows its text, and compacting keeps the two apart."""
    store = RetroDatastore.load(shutil.copytree(old / "format_2", tmp_path / "store"))
    assert store.manifest.format_version == 2
    num_old = store.num_chunks
    ids = np.arange(num_old)[~np.isin(store.document_of(np.arange(num_old)), store.deleted_documents)]
    tokens, mask = store.gather(ids)
    size = store.chunk_size
    assert [text for text, _ in store.texts_of(ids)] == chunk_texts(store.tokenizer, tokens[:, :size], mask[:, :size])
    prompts = {"prompt": "the river: ", "query_prompt": "the king: "}
    embedder = ChunkEmbedder.from_pretrained(make_encoder(tmp_path / "encoder"), dtype=torch.float32, **prompts)
    store.append([{"id": "new", "text": "The King  sings"}], embedder=embedder)
    store.compact()
    assert store.manifest.format_version == 3
    assert [shard.text_starts is None for shard in store.shards] == [True, True, False]
    new = np.flatnonzero(store.document_of(np.arange(store.num_chunks)) == store.document_number("new"))
    assert "".join(text for text, _ in store.texts_of(new)) == "The King  sings"
