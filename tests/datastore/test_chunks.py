"""Chunk arithmetic: borders of documents hold for every length, chunk size and neighbor size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AddedToken

from retro_hf.datastore.chunks import (
    chunk_texts,
    document_of,
    gather_tokens,
    num_chunks_of,
    token_dtype,
)
from retro_hf.datastore.compatibility import tokenizer_fingerprint, vocabulary_fingerprint, vocabulary_size

from .fixtures import make_tokenizer


def stream_of(documents: list[list[int]], chunk_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chunks, document borders and lengths of a stream, laid out one document at a time."""
    padded = [document + [0] * (-len(document) % chunk_size) for document in documents]
    chunks = np.array([token for document in padded for token in document], dtype=np.uint16).reshape(-1, chunk_size)
    offsets = np.cumsum([0] + [len(document) // chunk_size for document in padded])
    return chunks, offsets, np.array([len(document) for document in documents])


def gather(ids: np.ndarray, store: tuple, neighbor_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbors of a store, which are the same where it says in so many words at which token each chunk begins."""
    documents, chunk_size, _ = store
    chunks, offsets, lengths = stream_of(documents, chunk_size)
    sizes = {"chunk_size": chunk_size, "neighbor_size": neighbor_size}
    found = gather_tokens(ids, chunks.reshape(-1), offsets, lengths, **sizes)
    starts = np.arange(len(chunks)) * chunk_size
    again = gather_tokens(ids, chunks.reshape(-1), offsets, lengths, **sizes, chunk_starts=starts)
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one, other)
    return found


stores = st.tuples(
    st.lists(st.lists(st.integers(1, 60_000), min_size=1, max_size=40), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(0, 20),
)


@given(stores)
def test_neighbor_is_the_chunk_and_its_continuation_in_the_document(store):
    documents, chunk_size, extra = store
    chunks, offsets, lengths = stream_of(documents, chunk_size)
    neighbor_size = chunk_size + extra
    tokens, mask = gather(np.arange(len(chunks)), store, neighbor_size)
    expected = [
        document[start : start + neighbor_size]
        for document in documents
        for start in range(0, len(document), chunk_size)
    ]
    assert len(expected) == len(chunks)
    for row, keep, neighbor in zip(tokens, mask, expected, strict=True):
        assert row[: len(neighbor)].tolist() == neighbor
        assert not row[len(neighbor) :].any()
        assert keep.tolist() == [1] * len(neighbor) + [0] * (neighbor_size - len(neighbor))


@given(stores)
def test_chunks_of_a_document_joined_are_the_document(store):
    documents, chunk_size, _ = store
    chunks, offsets, lengths = stream_of(documents, chunk_size)
    ids = np.arange(len(chunks))
    tokens, mask = gather(ids, store, chunk_size)
    owners = document_of(ids, offsets)
    for number, document in enumerate(documents):
        own = owners == number
        assert own.sum() == num_chunks_of(len(document), chunk_size)
        assert tokens[own][mask[own].astype(bool)].tolist() == document


@given(stores, st.data())
def test_gather_takes_any_shape_and_minus_one(store, data):
    documents, chunk_size, extra = store
    chunks, offsets, lengths = stream_of(documents, chunk_size)
    shape = data.draw(st.sampled_from([(), (0,), (3,), (2, 3), (2, 0, 4), (1, 2, 3)]))
    size = int(np.prod(shape))
    ids = np.array(data.draw(st.lists(st.integers(-1, len(chunks) - 1), min_size=size, max_size=size)), dtype=np.int64)
    tokens, mask = gather(ids.reshape(shape), store, chunk_size + extra)
    assert tokens.shape == mask.shape == (*shape, chunk_size + extra)
    assert tokens.dtype == mask.dtype == np.int64
    absent = ids.reshape(shape) == -1
    assert not tokens[absent].any() and not mask[absent].any()
    assert (mask[~absent].sum(axis=-1) > 0).all()


def test_document_of_minus_one_is_minus_one():
    offsets = np.array([0, 2, 3])
    assert document_of(np.array([[-1, 0], [1, 2]]), offsets).tolist() == [[-1, 0], [0, 1]]


def test_token_dtype_is_the_narrowest_that_holds_every_id():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_chunk_texts_leave_out_padding_and_special_tokens(tokenizer):
    ids = tokenizer("the old river", add_special_tokens=False)["input_ids"]
    rows = np.array([ids + [0, 0], [0, 0] + ids])
    mask = np.array([[1] * len(ids) + [0, 0], [1, 1] + [1] * len(ids)])
    assert chunk_texts(tokenizer, rows, mask) == ["the old river", "the old river"]
    assert chunk_texts(tokenizer, np.zeros((1, 4), dtype=np.int64)) == [""]


def test_the_fingerprint_ignores_padding_truncation_and_the_path(tokenizer, tmp_path):
    fingerprint = tokenizer_fingerprint(tokenizer)
    other = make_tokenizer()
    other(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(other) == fingerprint
    other.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(type(other).from_pretrained(tmp_path)) == fingerprint


def test_the_fingerprint_may_leave_a_pad_token_out(tokenizer):
    other = make_tokenizer()
    other.add_special_tokens({"pad_token": "<pad>"})
    assert vocabulary_size(other) == vocabulary_size(tokenizer) + 1
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(other, without="<pad>") == tokenizer_fingerprint(tokenizer)


def change(tokenizer, part):
    """Change one of the stages of a tokenizer."""
    backend = tokenizer.backend_tokenizer
    if part == "added tokens":
        tokenizer.add_tokens([AddedToken("<new>")])
    elif part == "how merges apply":
        backend.model.fuse_unk, backend.model.unk_token = True, "<|endoftext|>"
    elif part == "normalizer":
        backend.normalizer = normalizers.Lowercase()
    elif part == "pre-tokenizer":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif part == "post-processor":
        backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])


@pytest.mark.parametrize("part", ["added tokens", "how merges apply", "normalizer", "pre-tokenizer", "post-processor"])
def test_the_fingerprint_tells_every_stage_apart(tokenizer, part):
    other = make_tokenizer()
    change(other, part)
    assert vocabulary_fingerprint(other) == vocabulary_fingerprint(tokenizer)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_the_fingerprint_tells_how_added_tokens_match():
    one, other = make_tokenizer(), make_tokenizer()
    one.add_tokens([AddedToken("<new>", lstrip=True)])
    other.add_tokens([AddedToken("<new>", lstrip=False)])
    assert one(" <new>")["input_ids"] != other(" <new>")["input_ids"]
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)


def test_fingerprint_distinguishes_vocabularies(tokenizer):
    assert tokenizer_fingerprint(make_tokenizer(vocab_size=380)) != tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize("starts", [None, np.array([0, 8, 16, 24])])
def test_neighbors_of_a_million_tokens_cost_what_they_have(starts, monkeypatch):
    """A stranger's store may say that neighbors have a million tokens: what is no token of a document is not computed."""
    taken = []
    take = np.take
    monkeypatch.setattr(np, "take", lambda *args, **options: taken.append(take(*args, **options)) or taken[-1])
    tokens, layout = np.arange(1, 33, dtype=np.uint16), (np.array([0, 3, 4]), np.array([20, 5]))
    ids = np.array([[0, 2], [3, -1]])
    options = {"chunk_size": 8, "chunk_starts": starts}
    short = gather_tokens(ids, tokens, *layout, neighbor_size=24, **options)
    long = gather_tokens(ids, tokens, *layout, neighbor_size=1 << 20, **options)
    for few, many in zip(short, long, strict=True):
        assert many.shape == (2, 2, 1 << 20) and many.dtype == np.int64
        assert np.array_equal(few, many[..., :24]) and not many[..., 24:].any()
    assert short[1].sum(axis=-1).tolist() == [[20, 4], [5, 0]]
    assert max(part.size for part in taken) <= 4 * 24
