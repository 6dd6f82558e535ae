"""The text of a chunk: its document's own characters, for keys, searches by words, passages and readers."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from retro_hf import RetroRetriever
from retro_hf.datastore import LexicalSearcher, RetroDatastore, chunk_texts
from retro_hf.passages import find_passages

from .fixtures import make_tokenizer


TEXTS = [
    "the old river\n\n你好吗，大教堂附近 the golden clock 😀😀👨‍👩‍👧 sings",
    "图书馆每天早上九点开门。" * 4,
    "  Two  SPACES and a café, the e\u0301tude; it's <|endoftext|> said ",
    "שלום " * 9,
    "x",
]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Letters and their words as pieces, and bytes for all else, as Llama's: a decoder gives up a run of bytes as a whole."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    model = models.BPE({piece: id for id, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback", "word pieces"])
def any_tokenizer(request, encoder_folder) -> PreTrainedTokenizerFast:
    if request.param == "word pieces":  # lower case, unknown words, no spaces
        return PreTrainedTokenizerFast.from_pretrained(encoder_folder)
    return make_tokenizer() if request.param == "byte-level" else byte_fallback_tokenizer()


def texts_of_documents(store: RetroDatastore) -> list[str]:
    """The texts of the chunks of each document, joined."""
    owners = store.document_of(np.arange(store.num_chunks))
    texts = [text for text, _ in store.texts_of(np.arange(store.num_chunks))]
    return ["".join(np.array(texts, dtype=object)[owners == number]) for number in range(store.num_documents)]


@pytest.mark.parametrize("chunk_size", [5, 8])
def test_chunks_are_pieces_of_their_documents(any_tokenizer, embedder, chunk_size, tmp_path, monkeypatch):
    """Whatever the tokenizer loses: every character is in one chunk, and keys are made of these characters."""
    for module in ("build", "derive"):  # the encoder knows few of these words
        monkeypatch.setattr(f"retro_hf.datastore.{module}.check_coverage", lambda *_, **options: None)
    store = RetroDatastore.from_texts(
        TEXTS, any_tokenizer, embedder=embedder, chunk_size=chunk_size, neighbor_size=2 * chunk_size + 1
    )
    ids = np.arange(store.num_chunks)
    found = store.texts_of(ids)
    assert texts_of_documents(store) == TEXTS
    np.testing.assert_allclose(store.keys_of(ids), embedder.embed([text for text, _ in found]), atol=1e-3)
    owners = store.document_of(ids)
    for number, (text, continuation) in zip(owners, found, strict=True):
        assert text + continuation in TEXTS[number]
    again = store.retokenize(tmp_path / "again", make_tokenizer(300))
    assert [text for text, _ in again.texts_of(ids)] == [text for text, _ in found]
    shown = RetroRetriever(store, embedder=embedder).find("大教堂", num_neighbors=3)[0]
    assert len(shown) == 3 and not any("\ufffd" in one.text + one.continuation for one in shown)


def test_continuation_is_what_a_reader_gets(datastore):
    ids = np.arange(datastore.num_chunks)
    tokens, mask = datastore.gather(ids)
    whole = chunk_texts(datastore.tokenizer, tokens, mask)
    assert ["".join(pair) for pair in datastore.texts_of(ids)] == whole
    again = datastore.texts_of(np.array([3, -1, 0]))
    assert again[1] == ("", "") and again[0] == datastore.texts_of([3])[0]


def test_query_of_tokens_has_all_whole_characters():
    """A chunk that begins and ends within a character loses these two, not the run of bytes they belong to."""
    tokenizer = byte_fallback_tokenizer()
    ids = np.array(tokenizer("a 你好吗大教堂附 b", add_special_tokens=False)["input_ids"])
    first = len(tokenizer("a ", add_special_tokens=False)["input_ids"]) + 1
    assert chunk_texts(tokenizer, ids[None, first : first + 12]) == ["好吗大"]
    assert chunk_texts(tokenizer, ids[None, first - 1 : first + 20]) == ["你好吗大教堂附"]
    level = make_tokenizer()
    ids = np.array(level("你好吗")["input_ids"])
    assert chunk_texts(level, ids[None, 1:-1]) == ["好"]


def test_words_and_passages_are_those_of_the_document(encoder_folder, embedder):
    """A tokenizer in lower case with unknown words: BM25 and passages still have the document's text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder_folder)
    texts = ["The Zürich clock, built in 1898 by Überall & Söhne", "the river runs over the harbor"]
    store = RetroDatastore.from_texts(texts, tokenizer, embedder=embedder, chunk_size=64)
    retriever = RetroRetriever(store, searcher=LexicalSearcher.build(store), num_neighbors=1)
    (found,) = retriever.find("Söhne")[0]
    assert found.text == texts[0]
    assert find_passages(retriever, ["Überall"], 1)[0][0].text == texts[0]
