"""RetroRetriever: completed chunks in, neighbor tokens out; searched once, explained, and the same after a round trip."""

import json
import pickle

import numpy as np
import pytest
import torch

from retro_hf.datastore import ChunkEmbedder, EmbeddingSearcher, HybridSearcher, LexicalSearcher, RetroDatastore
from retro_hf.errors import (
    DatastoreInputError,
    DatastoreMismatchError,
    PretrainedNotFoundError,
    RetrieverError,
    RetroError,
)
from retro_hf.passages import find_passages
from retro_hf.retriever import RetroRetriever

from .datastore.fixtures import corpus, make_encoder, make_tokenizer, one_thread


__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Store, embedder and tokenizer; chunks of 8 tokens, neighbors of 20."""
    folder = tmp_path_factory.mktemp("retriever")
    embedder = ChunkEmbedder.from_pretrained(make_encoder(folder / "encoder"), dtype=torch.float32)
    tokenizer = make_tokenizer()
    store = RetroDatastore.build(
        corpus(), folder / "store", tokenizer=tokenizer, embedder=embedder, chunk_size=8, neighbor_size=20
    )
    return store, embedder, tokenizer


@pytest.fixture
def retriever(parts) -> RetroRetriever:
    store, embedder, tokenizer = parts
    return RetroRetriever(store, embedder=embedder, tokenizer=tokenizer)


@pytest.fixture
def chunks(parts) -> torch.Tensor:
    """The store's own full chunks, as a prompt would bring them."""
    tokens, mask = parts[0].gather(np.arange(parts[0].num_chunks))
    return torch.from_numpy(tokens[mask[:, :8].all(axis=1), :8])


def count_embeddings(retriever, monkeypatch) -> list[int]:
    """The number of texts of each call of the embedder."""
    calls: list[int] = []
    embed = retriever.embedder.embed
    monkeypatch.setattr(
        retriever.embedder, "embed", lambda texts, **rest: calls.append(len(texts)) or embed(texts, **rest)
    )
    return calls


def test_neighbors_are_tokens_of_the_chunk_and_its_continuation(retriever, chunks):
    ids, mask = retriever(chunks[:6])
    assert ids.shape == mask.shape == (6, 2, 20) and ids.dtype == mask.dtype == torch.int64
    # A chunk of the store is its own nearest neighbor, followed by what follows it.
    assert torch.equal(ids[:, 0, :8], chunks[:6])
    found = retriever.search(chunks[:6])
    tokens, _ = retriever.datastore.gather(found.chunk_ids)
    assert torch.equal(ids, torch.from_numpy(tokens))
    np.testing.assert_allclose(found.scores[:, 0], 1, atol=2e-3)
    assert (found.scores[:, 0] >= found.scores[:, 1]).all()


def test_num_neighbors_can_be_changed(retriever, chunks, monkeypatch):
    calls = count_embeddings(retriever, monkeypatch)
    many = retriever.search(chunks[:3], num_neighbors=5)
    retriever.num_neighbors = 4
    assert retriever(chunks[:3])[0].shape == (3, 4, 20)
    np.testing.assert_array_equal(retriever.search(chunks[:3]).chunk_ids, many.chunk_ids[:, :4])
    assert calls == [3]
    retriever.num_neighbors = 7
    assert retriever(chunks[:3])[0].shape == (3, 7, 20)
    assert calls == [3, 3]
    for value in (0, -1, 2.0, True, "2"):
        with pytest.raises(RetrieverError):
            retriever.num_neighbors = value


def test_a_chunk_is_embedded_once(retriever, chunks, monkeypatch):
    calls = count_embeddings(retriever, monkeypatch)
    beams = chunks[[0, 1, 0, 0, 1]]
    first = retriever(beams)
    again = retriever(beams[[2, 4]])
    assert calls == [2]
    assert torch.equal(first[0][[2, 4]], again[0])
    retriever.trace(beams)
    assert calls == [2]


def test_cache_is_bounded_and_can_be_switched_off(parts, chunks, monkeypatch):
    store, embedder, _ = parts
    small = RetroRetriever(store, embedder=embedder, cache_size=3)
    calls = count_embeddings(small, monkeypatch)
    small(chunks[:5])
    assert len(small._cache) == 3
    small(chunks[2:5])
    small(chunks[:1])
    assert calls == [5, 1]
    off = RetroRetriever(store, embedder=embedder, cache_size=0)
    assert torch.equal(off(chunks[:2])[0], off(chunks[:2])[0]) and len(off._cache) == 0


def test_padding_does_not_change_what_is_found(retriever, chunks):
    short = chunks[:2].clone()
    mask = torch.ones_like(short)
    mask[0, :3] = 0
    left = retriever.search(short, mask)
    short[0, :3] = 0
    retriever._forget()
    np.testing.assert_array_equal(retriever.search(short, mask).chunk_ids, left.chunk_ids)


def test_a_chunk_of_padding_has_no_neighbors(retriever, chunks):
    mask = torch.ones_like(chunks[:2])
    mask[0] = 0
    ids, neighbor_mask = retriever(chunks[:2], mask)
    assert not neighbor_mask[0].any() and not ids[0].any() and neighbor_mask[1].any()
    assert retriever.trace(chunks[:2], mask)[0] == []
    assert (retriever.search(chunks[:2], mask, exclude_documents=[-1, -1]).chunk_ids[0] == -1).all()


def test_excluded_documents_are_not_found(retriever, chunks):
    own = retriever.datastore.document_of(retriever.search(chunks).chunk_ids[:, 0])
    found = retriever.search(chunks, exclude_documents=own)
    assert (retriever.datastore.document_of(found.chunk_ids) != own[:, None]).all()
    # What was searched with exclusion is not served without it.
    assert (retriever.datastore.document_of(retriever.search(chunks).chunk_ids[:, 0]) == own).all()
    with pytest.raises(DatastoreInputError):
        retriever.search(chunks, exclude_documents=own[:1])


def test_the_trace_shows_text_continuation_and_document(retriever, chunks, parts):
    store, _, tokenizer = parts
    traces = retriever.trace(chunks[:4])
    assert [len(trace) for trace in traces] == [2] * 4
    found = retriever.search(chunks[:4])
    for row, trace in enumerate(traces):
        for column, neighbor in enumerate(trace):
            document = store.document(int(store.document_of(neighbor.chunk_id)))
            assert neighbor.chunk_id == found.chunk_ids[row, column]
            assert neighbor.score == pytest.approx(found.scores[row, column])
            assert (neighbor.document_id, neighbor.title) == (document["id"], document["title"])
            assert neighbor.text + neighbor.continuation in document["text"]
        assert trace[0].text == tokenizer.decode(chunks[row])


def test_fewer_chunks_than_neighbors_are_padded_and_masked(parts):
    _, embedder, tokenizer = parts
    retriever = RetroRetriever.from_texts(
        ["the old river"], tokenizer, embedder=embedder, chunk_size=8, neighbor_size=16, num_neighbors=3
    )
    ids, mask = retriever(torch.zeros(2, 8, dtype=torch.long))
    assert ids.shape == (2, 3, 16)
    assert mask.any(dim=-1).tolist() == [[True, False, False]] * 2
    assert [len(trace) for trace in retriever.trace(torch.zeros(2, 8, dtype=torch.long))] == [1, 1]


def test_no_chunks_give_no_neighbors(retriever):
    ids, mask = retriever(torch.zeros(0, 8, dtype=torch.long))
    assert ids.shape == mask.shape == (0, 2, 20) and ids.dtype == torch.int64
    assert retriever.trace(torch.zeros(0, 8, dtype=torch.long)) == []


@pytest.mark.parametrize(
    ("ids", "mask", "named"),
    [
        (torch.zeros(2, 7, dtype=torch.long), None, r"\(2, 7\).*\(num_chunks, 8\)"),
        (torch.zeros(8, dtype=torch.long), None, r"shape \(8,\)"),
        (torch.zeros(2, 8), None, "torch.float32"),
        ([[0] * 8], None, "type list"),
        (torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 7), r"\(2, 8\) and a mask of shape \(2, 7\)"),
    ],
)
def test_wrong_tensors_are_refused(retriever, ids, mask, named):
    with pytest.raises(RetrieverError, match=named):
        retriever(ids, mask)


def test_int32_and_bool_masks_are_taken(retriever, chunks):
    expected = retriever(chunks[:2])
    found = retriever(chunks[:2].int(), torch.ones(2, 8, dtype=torch.bool))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_tokenizer_or_embedder_of_another_store_is_refused(parts, tmp_path):
    store, embedder, _ = parts
    with pytest.raises(DatastoreMismatchError):
        RetroRetriever(store, embedder=embedder, tokenizer=make_tokenizer(vocab_size=380))
    other = ChunkEmbedder.from_pretrained(make_encoder(tmp_path, seed=5))
    with pytest.raises(DatastoreMismatchError):
        RetroRetriever(store, embedder=other)


def test_the_tokenizer_of_the_store_is_the_default(parts, chunks):
    store, embedder, tokenizer = parts
    default = RetroRetriever(RetroDatastore.load(store.path), embedder=embedder)
    explicit = RetroRetriever(store, embedder=embedder, tokenizer=tokenizer)
    assert torch.equal(default(chunks)[0], explicit(chunks)[0])


def test_a_pickled_retriever_works_and_carries_no_handles(retriever, chunks):
    retriever.num_neighbors = 3
    expected = retriever(chunks[:4])[0]
    data = pickle.dumps(retriever)
    again = pickle.loads(data)
    assert torch.equal(again(chunks[:4])[0], expected)
    assert len(data) < 100_000


def test_saving_and_opening_keeps_settings_and_results(retriever, parts, chunks, tmp_path):
    retriever.num_neighbors = 3
    retriever.save_pretrained(tmp_path / "saved")
    again = RetroRetriever.from_pretrained(tmp_path / "saved", embedder=parts[1])
    assert again.num_neighbors == 3
    assert torch.equal(again(chunks[:4])[0], retriever(chunks[:4])[0])
    assert RetroRetriever.from_pretrained(tmp_path / "saved", embedder=parts[1], num_neighbors=1).num_neighbors == 1
    # A folder that was only ever a datastore opens too.
    assert RetroRetriever.from_pretrained(parts[0].path, embedder=parts[1].name_or_path).num_neighbors == 2


def test_damaged_settings_are_refused(retriever, parts, tmp_path):
    retriever.save_pretrained(tmp_path / "saved")
    for text in ("{}", "nonsense", "[]", json.dumps({"num_neighbors": -1}), json.dumps({"num_neighbors": "two"})):
        (tmp_path / "saved" / "retriever.json").write_text(text)
        with pytest.raises(RetrieverError):
            RetroRetriever.from_pretrained(tmp_path / "saved", embedder=parts[1])


def test_local_embedder_is_asked_for_and_not_looked_up_on_the_hub(retriever, tmp_path, monkeypatch):
    """The store keeps the last part of the folder's name; a name that the Hub's cache knows is loaded from there."""
    retriever.save_pretrained(tmp_path / "saved")
    asked = []
    monkeypatch.setattr("retro_hf.datastore.encoder.cached_file", lambda name, *rest, **options: asked.append(name))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PretrainedNotFoundError, match="embedder='<folder or Hub name>'"):
        RetroRetriever.from_pretrained(tmp_path / "saved")
    assert asked == []
    (tmp_path / "cache" / "models--encoder").mkdir(parents=True)
    with pytest.raises(PretrainedNotFoundError):
        RetroRetriever.from_pretrained(tmp_path / "saved")
    assert asked


def test_texts_of_any_length_are_looked_up(retriever):
    """`find` takes words where `trace` takes chunks of tokens, and agrees with it on a chunk's own text."""
    short, long = retriever.find(
        ["lighthouse", "the king builds a bridge over the golden river " * 20], num_neighbors=3
    )
    assert len(short) == len(long) == 3
    assert [n.score for n in short] == sorted((n.score for n in short), reverse=True)
    stored = short[0]
    again = retriever.find(stored.text)[0][0]
    assert (again.chunk_id, again.text) == (stored.chunk_id, stored.text)
    assert again.score == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize(
    ("queries", "named"),
    [
        (["a", 3], "Query 1 .*int"),
        ([None], "Query 0"),
        (None, "Query 0 .*NoneType"),
        ("", "Query 0"),
        (["a", " "], "Query 1"),
    ],
)
def test_invalid_query_is_reported(retriever, queries, named):
    with pytest.raises(RetrieverError, match=named):
        retriever.find(queries)


def test_tokenizer_can_be_passed_by_name(parts, chunks, tmp_path):
    """As an embedder may: by a folder, here, or a Hub name; one that leads nowhere is explained."""
    store, embedder, tokenizer = parts
    tokenizer.save_pretrained(tmp_path)
    named = RetroRetriever(store, embedder=embedder, tokenizer=str(tmp_path))
    assert named.trace(chunks[:1]) == RetroRetriever(store, embedder=embedder, tokenizer=tokenizer).trace(chunks[:1])
    assert RetroRetriever.from_texts(["a text"], tmp_path, embedder=embedder).datastore.num_documents == 1
    for call in (
        lambda: RetroRetriever(store, embedder=embedder, tokenizer="org/nothing"),
        lambda: RetroDatastore.from_texts(["a text"], "org/nothing", embedder=embedder),
        lambda: store.retokenize(tmp_path / "again", "org/nothing"),
    ):
        with pytest.raises(PretrainedNotFoundError):
            call()


@pytest.fixture(params=["bm25", "reciprocal_rank_fusion"])
def searching(parts, request) -> RetroRetriever:
    """A retriever with a searcher instead of an embedder."""
    store, embedder, tokenizer = parts
    searcher = LexicalSearcher.build(store)
    if request.param == "reciprocal_rank_fusion":
        searcher = HybridSearcher(EmbeddingSearcher(store, embedder), searcher)
    return RetroRetriever(store, searcher=searcher, tokenizer=tokenizer)


def test_retriever_works_with_any_searcher(searching, chunks):
    """Tokens from the store, a trace that names its metric, exclusion, and `find` in agreement."""
    ids, mask = searching(chunks[:6])
    assert ids.shape == mask.shape == (6, 2, 20)
    found = searching.search(chunks[:6])
    assert torch.equal(ids, torch.from_numpy(searching.datastore.gather(found.chunk_ids)[0]))
    own = searching.datastore.document_of(found.chunk_ids[:, 0])
    other = searching.search(chunks[:6], exclude_documents=own)
    assert (searching.datastore.document_of(other.chunk_ids) != own[:, None]).all()
    trace = searching.trace(chunks[:1])[0]
    assert {neighbor.metric for neighbor in trace} == {searching.searcher.metric}
    again = searching.find(searching.tokenizer.decode(chunks[0]))[0]
    assert [neighbor.chunk_id for neighbor in again] == [neighbor.chunk_id for neighbor in trace]


def test_retriever_with_any_searcher_is_cached_and_pickled(searching, chunks, monkeypatch):
    expected = searching(chunks[:4])[0]
    assert torch.equal(pickle.loads(pickle.dumps(searching))(chunks[:4])[0], expected)
    searching.num_neighbors = 1
    monkeypatch.setattr(searching, "_searcher", None)
    assert torch.equal(searching(chunks[:4])[0], expected[:, :1])


def test_retriever_takes_exactly_one_of_embedder_and_searcher(parts, tmp_path):
    store, embedder, tokenizer = parts
    lexical = LexicalSearcher.build(store)
    for options in ({}, {"embedder": embedder, "searcher": lexical}):
        with pytest.raises(RetrieverError):
            RetroRetriever(store, **options)
    with pytest.raises(RetrieverError):
        RetroRetriever(store, searcher=5)
    store.save(tmp_path / "copy")
    with pytest.raises(RetrieverError):
        RetroRetriever(RetroDatastore.load(tmp_path / "copy"), searcher=lexical)


@pytest.mark.parametrize("number", [0, -1, "2", 2.0, True, 10**9])
def test_odd_number_of_neighbors_is_explained(searching, number):
    for call in (searching.find, searching.search_texts):
        with pytest.raises(RetroError):
            call("the old river", num_neighbors=number)
    with pytest.raises(RetroError):
        find_passages(searching, ["the old river"], number)


def test_odd_chunks_and_ids_are_explained(searching):
    ids = torch.zeros(1, searching.chunk_size, dtype=torch.long)
    for arguments in ((ids - 1,), (ids, ids.tolist()), (None,)):
        with pytest.raises(RetroError):
            searching(*arguments)
    for call, argument in (
        (searching.datastore.gather, [[1], [1, 2]]),
        (searching.datastore.document_number, None),
        (searching.datastore.document_numbers, [3]),
    ):
        with pytest.raises(RetroError):
            call(argument)
    with pytest.raises(RetroError):
        find_passages(searching, [None], 1)
