"""What keys have seen of their chunks: reported, and refused where it is too little."""

import json

import numpy as np
import pytest

from retro_hf.datastore import ChunkEmbedder, RetroDatastore
from retro_hf.datastore.key_coverage import coverage_of
from retro_hf.errors import DatastoreInputError

from .fixtures import WORDS, corpus, sentence


@pytest.fixture(scope="module")
def short_embedder(encoder_folder, tmp_path_factory) -> ChunkEmbedder:
    """The encoder, which reads 16 tokens at most."""
    folder = tmp_path_factory.mktemp("short")
    for file in encoder_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    return ChunkEmbedder.from_pretrained(folder)


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING" and "coverage" in record.name]


def test_chunks_longer_than_the_encoder_reads_are_refused(tokenizer, short_embedder, tmp_path):
    """Texts that differ at their ends only would get one key. Nothing is embedded before, and nothing stays behind."""
    head = " ".join(WORDS[:30])
    texts = [f"{head} {end}" for end in ("river", "harbor", "queen")]
    with pytest.raises(DatastoreInputError, match="chunk_size=16"):
        RetroDatastore.from_texts(texts, tokenizer, embedder=short_embedder, chunk_size=64, path=tmp_path / "store")
    assert not list(tmp_path.iterdir())
    store = RetroDatastore.from_texts(texts, tokenizer, embedder=short_embedder, chunk_size=8)
    assert store.coverage(short_embedder).cut == 0


def test_appended_chunks_are_looked_at(tokenizer, short_embedder, tmp_path):
    store = RetroDatastore.from_texts(
        ["the river", "the harbor"], tokenizer, embedder=short_embedder, chunk_size=64, path=tmp_path / "store"
    )
    with pytest.raises(DatastoreInputError):
        store.append([{"id": "long", "text": " ".join(WORDS)}], embedder=short_embedder)
    assert store.num_documents == 2


def test_few_cut_chunks_are_told(tokenizer, short_embedder, caplog):
    generator = np.random.default_rng(0)
    texts = [sentence(generator, 5) for _ in range(19)] + [sentence(generator, 30)]
    store = RetroDatastore.from_texts(texts, tokenizer, embedder=short_embedder, chunk_size=64)
    (told,) = warnings_of(caplog)
    found = store.coverage(short_embedder)
    assert (found.num_chunks, found.cut, found.unknown, found.lost, found.equal) == (20, 1, 0, 0, 0)
    assert found.examples["cut"][:30] in told and texts[-1].startswith(found.examples["cut"][:30])


@pytest.mark.parametrize("foreign", ["ბიბლიოთეკა", "図書館", "QmFzZTY0" * 20])
def test_words_that_the_encoder_does_not_know_are_refused(tokenizer, embedder, foreign, caplog):
    """Foreign scripts, and words that are too long for word pieces; a few texts are only told of."""
    texts = [f"{foreign} {number} {foreign}" for number in range(40)]
    with pytest.raises(DatastoreInputError):
        RetroDatastore.from_texts(texts, tokenizer, embedder=embedder, chunk_size=512, neighbor_size=512)
    RetroDatastore.from_texts(texts[:3], tokenizer, embedder=embedder, chunk_size=512, neighbor_size=512)
    assert len(warnings_of(caplog)) == 1


def test_equal_keys_of_unequal_texts_are_found():
    """Copies, and texts that differ in case, accents and punctuation, are not unequal."""
    texts = ["one text", "another text", "the same", "The same!", "the same", "le caf\u00e9", "le cafe"]
    keys = np.eye(8, dtype=np.float32)[[0, 0, 1, 1, 1, 2, 2]]
    found = coverage_of(texts, keys=keys)
    assert (found.equal, found.lost, found.cut) == (2, 0, None)
    assert found.examples == {"equal": "one text"}


def test_encoder_that_tells_nothing_apart_is_refused(tokenizer, embedder, monkeypatch, tmp_path):
    def embed(self, texts, batch_size=64, show_progress=None):
        return np.tile(np.eye(1, self.dim, dtype=np.float32), (len(texts), 1))

    store = RetroDatastore.from_texts(corpus(5), tokenizer, embedder=embedder, chunk_size=8)
    assert store.coverage().equal == 0
    monkeypatch.setattr(ChunkEmbedder, "embed", embed)
    with pytest.raises(DatastoreInputError):
        RetroDatastore.from_texts(corpus(5), tokenizer, embedder=embedder, chunk_size=8)
    monkeypatch.setattr("retro_hf.datastore.build.check_coverage", lambda *_, **options: None)
    blind = RetroDatastore.from_texts(corpus(5), tokenizer, embedder=embedder, chunk_size=8)
    assert blind.coverage().equal == blind.num_chunks
    with pytest.raises(DatastoreInputError):
        blind.retokenize(tmp_path / "again", tokenizer)


def test_lost_characters_are_told(tokenizer, embedder, tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes("\u00e9\u00e8\u00e0\u00e7\u00fc\u00f6".encode("latin1"))
    store = RetroDatastore.build(tmp_path / "a.txt", tmp_path / "store", tokenizer=tokenizer, embedder=embedder)
    assert store.coverage().lost == 1 and len(warnings_of(caplog)) == 1


def test_shares_count_characters(embedder):
    """Of a text with one long unknown word, the word is most; of one with a single strange letter, it is little."""
    reached, known = embedder.seen(
        ["the river " + "\u6f22" * 30, " ".join(WORDS[:20]) + " \u6f22", "", "   ", "river " * 300]
    )
    assert known[0] < 0.3 and known[1] > 0.95 and known[2] == known[3] == 1
    assert reached[:4].tolist() == [1, 1, 1, 1] and abs(reached[4] - 126 / 300) < 0.01
