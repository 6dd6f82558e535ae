"""Neighbors of a training set: windows on the chunk grid, own documents left out, stored keys used again."""

import errno
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from datastore.fixtures import corpus, make_tokenizer

from retro_hf.datastore import ChunkEmbedder, EmbeddingSearcher, HybridSearcher, LexicalSearcher, RetroDatastore
from retro_hf.errors import DatasetError, DatastoreMismatchError, DatastoreWriteError, RetrieverError
from retro_hf.retriever import RetroRetriever
from retro_hf.training import RetroDataCollator, precompute_neighbors, tokenize_documents


SIZE = 8


def texts_of(number: int) -> Dataset:
    return Dataset.from_list(corpus(number))


def test_windows_join_to_their_documents_and_begin_at_chunk_borders(world):
    """Only a lone last token is lost, and each window has its position."""
    for document in corpus():
        windows = [row for row in world.windows if row["document_id"] == document["id"]]
        tokens = world.tokenizer(document["text"], add_special_tokens=False)["input_ids"]
        tokens.append(world.tokenizer.eos_token_id)
        joined = [token for row in windows for token in row["input_ids"]]
        assert joined == tokens[: len(joined)] and len(tokens) - len(joined) <= 1
        assert [row["window_start"] for row in windows] == list(range(0, len(joined), 32))
        assert all(len(row["input_ids"]) == 32 for row in windows[:-1])


def test_windows_have_the_tokens_of_the_stored_chunks(world):
    """A window has the very tokens of its document's chunks in the store."""
    for row in world.windows.select(range(20)):
        number = world.datastore.document_number(row["document_id"])
        first = np.searchsorted(world.datastore.document_of(np.arange(len(world.datastore))), number)
        chunks = np.arange(len(row["input_ids"]) // SIZE) + first + row["window_start"] // SIZE
        tokens, _ = world.datastore.gather(chunks)
        assert tokens[:, :SIZE].flatten().tolist() == row["input_ids"][: len(chunks) * SIZE]


def test_documents_without_text_give_no_windows(world):
    """Empty, blank, missing and one-token documents are left out. Row numbers replace missing ids."""
    dataset = Dataset.from_dict({"text": ["", "   ", None, "a", "the river runs"]})
    windows = tokenize_documents(dataset, world.tokenizer, max_length=32, chunk_size=SIZE, add_eos=False)
    assert windows["document_id"] == ["4"]


@pytest.mark.parametrize("max_length", [0, 1, 20, 33])
def test_window_off_the_chunk_grid_is_an_error(world, max_length):
    """Neighbors of a shifted chunk would be those of other text."""
    with pytest.raises(DatasetError, match=f"max_length={max_length}"):
        tokenize_documents(texts_of(2), world.tokenizer, max_length=max_length, chunk_size=SIZE)


def test_dataset_without_text_is_an_error_that_names_its_columns(world):
    dataset = texts_of(2).rename_column("text", "body")
    with pytest.raises(DatasetError, match="'body'"):
        tokenize_documents(dataset, world.tokenizer, max_length=32, chunk_size=SIZE)


def test_each_complete_chunk_gets_its_neighbors_and_none_of_its_own_document(world):
    """Numbers of lists fit the chunks; the own document is always there to be found, and never is."""
    for row in world.dataset:
        ids = np.array(row["neighbor_chunk_ids"]).reshape(-1, 2)
        assert len(ids) == len(row["input_ids"]) // SIZE
        assert (ids >= 0).all()
        own = world.datastore.document_number(row["document_id"])
        assert (world.datastore.document_of(ids) != own).all()


def test_neighbors_are_the_nearest_chunks_of_other_documents(world):
    """As brute force over the keys says."""
    keys = world.datastore.keys_of(np.arange(world.datastore.num_chunks))
    owners = world.datastore.document_of(np.arange(len(keys)))
    for row in world.dataset.select(range(0, len(world.dataset), 9)):
        number = world.datastore.document_number(row["document_id"])
        first = np.searchsorted(owners, number) + row["window_start"] // SIZE
        for chunk, found in enumerate(row["neighbor_chunk_ids"]):
            scores = np.where(owners == number, -np.inf, keys @ keys[first + chunk])
            np.testing.assert_allclose(scores[found], np.sort(scores)[::-1][:2], atol=1e-6)


def test_missing_document_ids_are_warned_about(world, caplog):
    """There is a warning; and the text itself says which documents are its own."""
    windows = world.windows.remove_columns(["document_id", "window_start"]).select(range(8))
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        found = precompute_neighbors(windows, world.retriever)
    assert "'document_id'" in caplog.text
    with_ids = precompute_neighbors(world.windows.select(range(8)), world.retriever)
    assert found["neighbor_chunk_ids"] == with_ids["neighbor_chunk_ids"]


def test_stored_keys_are_reused_as_queries(world, monkeypatch):
    """The same result as embedding, and the embedder isn't called once."""
    monkeypatch.setattr(world.embedder, "embed", lambda *args, **kwargs: pytest.fail("embedded"))
    again = precompute_neighbors(world.windows, world.retriever, batch_size=50)
    alone = precompute_neighbors(world.windows, world.datastore, batch_size=17)
    assert again["neighbor_chunk_ids"] == alone["neighbor_chunk_ids"] == world.dataset["neighbor_chunk_ids"]


def test_embedded_queries_find_what_stored_keys_find(world):
    """Keys are float16 and queries float32, which moves no neighbor here."""
    embedded = precompute_neighbors(world.windows.remove_columns("window_start"), world.retriever)
    assert embedded["neighbor_chunk_ids"] == world.dataset["neighbor_chunk_ids"]


def test_unknown_document_ids_exclude_nothing(world):
    """Held-out text is embedded, and unknown ids are accepted."""
    held_out = Dataset.from_list([{**row, "id": f"new-{row['id']}"} for row in corpus(4, seed=9)])
    windows = tokenize_documents(held_out, world.tokenizer, max_length=32, chunk_size=SIZE)
    found = precompute_neighbors(windows, world.retriever)
    for row in found:
        chunks = np.array(row["input_ids"][: len(row["input_ids"]) // SIZE * SIZE]).reshape(-1, SIZE)
        if len(chunks):
            queries = world.embedder.embed(world.tokenizer.batch_decode(chunks, skip_special_tokens=True))
            assert row["neighbor_chunk_ids"] == world.datastore.search(queries, 2)[1].tolist()


def test_datastore_alone_cannot_search_for_other_text(world):
    """There is no embedder to make the queries with."""
    windows = tokenize_documents(Dataset.from_list(corpus(2, seed=9)), world.tokenizer, max_length=32, chunk_size=SIZE)
    with pytest.raises(DatasetError):
        precompute_neighbors(windows, world.datastore)


def test_several_documents_can_be_excluded(world):
    """A column of lists: the own document and its near-duplicates."""
    first = world.windows.select([0]).remove_columns(["window_start", "document_id"])
    nearest = world.dataset[0]["neighbor_chunk_ids"]
    numbers = world.datastore.document_of(np.array(nearest))
    names = sorted({world.datastore.document(number)["id"] for number in numbers.flatten().tolist()})
    several = first.add_column("document_id", [["doc-0", "unknown", *names]])
    found = precompute_neighbors(several, world.retriever)
    owners = world.datastore.document_of(np.array(found[0]["neighbor_chunk_ids"]))
    assert not set(owners.flatten()) & {0, *numbers.flatten()}


def test_missing_neighbors_are_minus_one(world, tmp_path):
    """A store with fewer chunks than neighbors wanted fills up with -1."""
    small = RetroDatastore.build(
        corpus(2),
        tmp_path / "small",
        tokenizer=world.tokenizer,
        embedder=world.embedder,
        chunk_size=SIZE,
        neighbor_size=16,
    )
    windows = tokenize_documents(texts_of(2), world.tokenizer, max_length=32, chunk_size=SIZE)
    found = precompute_neighbors(windows, small, num_neighbors=len(small))
    for row in found:
        ids = np.array(row["neighbor_chunk_ids"]).reshape(-1, len(small))
        other = 1 - small.document_number(row["document_id"])
        count = (small.document_of(np.arange(len(small))) == other).sum()
        assert (ids[:, :count] >= 0).all() and (ids[:, count:] == -1).all()


def test_source_survives_shuffling_and_saving(world, tmp_path):
    """Shuffling, selecting, saving and loading keep the record beside the ids."""
    world.dataset.shuffle(seed=1).select(range(5)).save_to_disk(tmp_path / "saved")
    loaded = Dataset.load_from_disk(tmp_path / "saved")
    assert set(loaded["neighbor_source"]) == set(world.dataset["neighbor_source"])
    assert len(set(loaded["neighbor_source"])) == 1


def test_kept_result_is_reused_only_for_the_same_datastore(world, tmp_path, monkeypatch):
    """What `datasets` caches beside a dataset on disk belongs to one store and one number of neighbors."""
    world.windows.select(range(30)).save_to_disk(tmp_path / "windows")
    windows = Dataset.load_from_disk(tmp_path / "windows")
    other = RetroDatastore.build(
        corpus()[::-1],
        tmp_path / "other",
        tokenizer=world.tokenizer,
        embedder=world.embedder,
        chunk_size=SIZE,
        neighbor_size=16,
    )
    first, third, single = (
        precompute_neighbors(windows, store, num_neighbors=number)
        for store, number in ((world.datastore, 2), (other, 2), (world.datastore, 1))
    )
    assert first["neighbor_chunk_ids"] == world.dataset[:30]["neighbor_chunk_ids"] != third["neighbor_chunk_ids"]
    assert len(single[0]["neighbor_chunk_ids"][0]) == 1
    monkeypatch.setattr(RetroDatastore, "search", lambda *args, **kwargs: pytest.fail("searched"))
    again = precompute_neighbors(Dataset.load_from_disk(tmp_path / "windows"), world.datastore)
    assert again["neighbor_chunk_ids"] == first["neighbor_chunk_ids"]


PADDED = {"input_ids": [[1] * 16], "attention_mask": [[1] * 15 + [0]]}


@pytest.mark.parametrize("dataset", [texts_of(2), [{"input_ids": [1]}], Dataset.from_dict(PADDED)])
def test_untokenized_or_padded_dataset_is_an_error(world, dataset):
    with pytest.raises(DatasetError):
        precompute_neighbors(dataset, world.retriever)


def test_tokenizer_and_number_of_neighbors_are_checked(world):
    with pytest.raises(DatastoreMismatchError):
        precompute_neighbors(world.windows, world.retriever, tokenizer=make_tokenizer(vocab_size=300))
    with pytest.raises(RetrieverError, match="num_neighbors"):
        precompute_neighbors(world.windows, world.retriever, num_neighbors=0)


def test_cache_folder_that_is_a_file_is_an_error(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cache_dir"):
        precompute_neighbors(world.windows, world.retriever, cache_dir=tmp_path / "file")


def test_full_disk_is_explained(world, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", full)
    with pytest.raises(DatastoreWriteError, match="No space left"):
        precompute_neighbors(world.windows, world.retriever, cache_dir=tmp_path)


@pytest.mark.parametrize("hybrid", [False, True])
def test_lexical_and_hybrid_neighbors_are_precomputed(world, hybrid):
    """Another searcher than the store's own index has the text, not the stored key, as its query."""
    searcher = LexicalSearcher.build(world.datastore)
    if hybrid:
        searcher = HybridSearcher(EmbeddingSearcher(world.datastore, world.embedder), searcher)
    retriever = RetroRetriever(world.datastore, searcher=searcher)
    windows = world.windows.select(range(12))
    found = precompute_neighbors(windows, retriever)
    for row in found:
        chunks = np.array(row["input_ids"][: len(row["input_ids"]) // SIZE * SIZE], dtype=np.int64).reshape(-1, SIZE)
        own = [world.datastore.document_number(row["document_id"])] * len(chunks)
        expected = retriever.search(torch.from_numpy(chunks), exclude_documents=np.array(own, dtype=np.int64))
        assert row["neighbor_chunk_ids"] == expected.chunk_ids.tolist()
    assert found._fingerprint != precompute_neighbors(windows, world.retriever)._fingerprint


def test_stored_keys_are_not_used_if_queries_have_a_prompt(world, tmp_path):
    """Neighbors are those of the query's own embedding, and a datastore alone cannot find them."""
    embedder = ChunkEmbedder.from_pretrained(
        world.embedder.name_or_path, query_prompt="the king: ", dtype=torch.float32
    )
    store = RetroDatastore.build(
        corpus(), tmp_path / "store", tokenizer=world.tokenizer, embedder=embedder, chunk_size=SIZE, neighbor_size=16
    )
    windows = world.windows.select(range(10))
    found = precompute_neighbors(windows, RetroRetriever(store, embedder=embedder))
    for row in found:
        chunks = np.array(row["input_ids"][: len(row["input_ids"]) // SIZE * SIZE], dtype=np.int64).reshape(-1, SIZE)
        own = np.full(len(chunks), store.document_number(row["document_id"]))
        queries = embedder.embed_queries(world.tokenizer.batch_decode(chunks, skip_special_tokens=True))
        assert row["neighbor_chunk_ids"] == store.search(queries, 2, exclude_documents=own)[1].tolist()
    with pytest.raises(DatasetError):
        precompute_neighbors(windows, store)


@pytest.mark.parametrize("where", ["cache_dir", "on disk"])
def test_stopped_run_resumes_at_its_last_block(world, tmp_path, monkeypatch, where):
    """Blocks of 16 batches are kept as they end; the rest is the same as without a stop."""
    monkeypatch.setattr("retro_hf.training.neighbors._BATCHES_PER_BLOCK", 2)
    windows, options = world.windows.select(range(60)), {"batch_size": 10}
    if where == "cache_dir":
        # Made anew by each call, as a script that is started again does.
        windows, options["cache_dir"] = Dataset.from_list(windows.to_list()), tmp_path / "cache"
    else:
        windows.save_to_disk(tmp_path / "windows")
        windows = Dataset.load_from_disk(tmp_path / "windows")
    search, searched = RetroDatastore.search, []

    def stop_at_the_fourth(self, queries, *args, **kwargs):
        searched.append(len(queries))
        if len(searched) == 4:
            raise KeyboardInterrupt
        return search(self, queries, *args, **kwargs)

    monkeypatch.setattr(RetroDatastore, "search", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        precompute_neighbors(windows, world.datastore, **options)
    if where == "cache_dir":
        windows = Dataset.from_list(windows.to_list())
    found = precompute_neighbors(windows, world.datastore, **options)
    # Two batches were kept, the third was lost with its block.
    assert len(searched) == 4 + 4
    assert found["neighbor_chunk_ids"] == world.dataset[:60]["neighbor_chunk_ids"]
    precompute_neighbors(windows, world.datastore, **options)
    assert len(searched) == 8


def test_dataset_format_is_kept(world):
    windows = world.windows.select(range(5)).with_format("numpy", columns=["input_ids"])
    found = precompute_neighbors(windows, world.retriever)
    assert found.format["type"] == "numpy" and set(found[0]) == {"input_ids", "neighbor_chunk_ids", "neighbor_source"}
    assert found[0]["neighbor_chunk_ids"].tolist() == world.dataset[0]["neighbor_chunk_ids"]
    assert precompute_neighbors(world.windows, world.retriever).format == world.windows.format | {
        "columns": [*world.windows.column_names, "neighbor_chunk_ids", "neighbor_source"]
    }


def test_near_duplicates_are_excluded_on_demand(world, tmp_path):
    """Copies with one more word are not neighbors, whether the document is in the datastore or held out."""
    documents = [row for row in corpus() if len(row["text"].split()) >= 40]
    copies = [{"id": f"copy-{row['id']}", "text": row["text"] + " today"} for row in documents]
    store = RetroDatastore.build(
        [*corpus(), *copies],
        tmp_path / "store",
        tokenizer=world.tokenizer,
        embedder=world.embedder,
        chunk_size=SIZE,
        neighbor_size=16,
    )
    held_out = [{"id": f"new-{row['id']}", "text": row["text"] + " lighthouse"} for row in documents[:5]]
    dataset = Dataset.from_list([{"id": row["id"], "text": row["text"]} for row in [*documents, *held_out]])
    windows = tokenize_documents(dataset, world.tokenizer, max_length=32, chunk_size=SIZE)
    retriever = RetroRetriever(store, embedder=world.embedder)

    def pairs(found) -> set[tuple[str, str]]:
        return {
            (row["document_id"], store.document(int(number))["id"])
            for row in found
            for number in store.document_of(np.array(row["neighbor_chunk_ids"], dtype=np.int64)).flatten()
        }

    alike = {(row["id"], f"copy-{row['id']}") for row in documents}
    alike |= {(f"new-{row['id']}", other) for row in documents[:5] for other in (row["id"], f"copy-{row['id']}")}
    assert alike & pairs(precompute_neighbors(windows, retriever))  # parts that are not equal to the text
    assert not alike & pairs(precompute_neighbors(windows, retriever, exclude_near_duplicates=True))
    with pytest.raises(DatasetError, match="'document_id'"):
        precompute_neighbors(windows.remove_columns("document_id"), retriever, exclude_near_duplicates=True)
    packed = windows.remove_columns(["document_id", "window_start"])
    packed = packed.add_column("document_id", [["unknown"]] * len(windows))
    with pytest.raises(DatasetError, match="'unknown'"):
        precompute_neighbors(packed, retriever, exclude_near_duplicates=True)


@pytest.mark.parametrize("kind", [Dataset.from_list, list], ids=["dataset", "list"])
def test_windows_of_another_tokenizer_are_refused_before_the_search(world, monkeypatch, kind):
    """Without `tokenizer=`, too, since the windows say what made them."""
    other = make_tokenizer(350)
    windows = tokenize_documents(kind(corpus(3)), other, max_length=32, chunk_size=SIZE)
    monkeypatch.setattr(EmbeddingSearcher, "search_vectors", None)  # any search would fail
    for retriever in (world.retriever, world.datastore):
        with pytest.raises(DatastoreMismatchError, match="another tokenizer"):
            precompute_neighbors(windows, retriever)
    for collator in (
        RetroDataCollator(world.tokenizer, world.retriever),
        RetroDataCollator(world.tokenizer, world.datastore),
    ):
        with pytest.raises(DatastoreMismatchError, match="another tokenizer"):
            collator([world.dataset[0] | windows[0]])


def test_a_token_for_padding_that_was_added_since_changes_no_window(world):
    padded = make_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    windows = tokenize_documents(texts_of(2), padded, max_length=32, chunk_size=SIZE)
    found = precompute_neighbors(windows, world.retriever)
    assert found["neighbor_chunk_ids"] == world.dataset.select(range(len(found)))["neighbor_chunk_ids"]


@pytest.mark.parametrize("wrong", [400, -1, 2**31])
def test_ids_that_the_tokenizer_of_the_datastore_lacks(world, wrong):
    """Of windows that do not say what made them."""
    windows = Dataset.from_dict({"input_ids": [[1] * 8, [1] * 7 + [wrong]], "document_id": ["a", "b"]})
    with pytest.raises(DatastoreMismatchError, match="400 tokens"):
        precompute_neighbors(windows, world.retriever)
