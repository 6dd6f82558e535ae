"""The frozen encoder: mean over real tokens, unit length, the same vector whatever the batch, one identity."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    GPT2Config,
    GPT2Model,
    T5Config,
    T5Model,
)

from retro_hf.datastore import ChunkEmbedder, RetroDatastore
from retro_hf.datastore import embedder as embedder_module
from retro_hf.datastore.embedder import _default_dtype
from retro_hf.errors import DatastoreMismatchError, PretrainedNotFoundError, UnsupportedEmbedderError
from retro_hf.retriever import RetroRetriever

from .fixtures import corpus, make_encoder, sentence


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = np.random.default_rng(3)
    return [sentence(generator, int(words)) for words in generator.integers(1, 30, size=50)]


def test_vectors_are_the_normalized_mean_over_real_tokens(embedder, encoder_folder, texts):
    tokenizer, model = AutoTokenizer.from_pretrained(encoder_folder), AutoModel.from_pretrained(encoder_folder).eval()
    vectors = embedder.embed(texts, batch_size=7)
    assert vectors.dtype == np.float32 and vectors.shape == (len(texts), embedder.dim) == (50, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0).numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_order_and_batch_size_do_not_matter(embedder, texts):
    vectors = embedder.embed(texts)
    shuffled = np.random.default_rng(0).permutation(len(texts))
    again = embedder.embed([texts[row] for row in shuffled], batch_size=3)
    np.testing.assert_allclose(again, vectors[shuffled], atol=1e-5)


def test_no_texts_empty_texts_and_overlong_texts_are_embedded(embedder):
    assert embedder.embed([]).shape == (0, 32)
    vectors = embedder.embed(["", "the " * 1000, "\x00 \ufffd \U0001f600 \u05e9\u05dc\u05d5\u05dd"])
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_weights_are_frozen_and_bfloat16_where_the_hardware_has_it(encoder_folder, texts):
    embedder = ChunkEmbedder.from_pretrained(encoder_folder)
    assert embedder.dtype == _default_dtype(embedder.device)
    assert not any(parameter.requires_grad for parameter in embedder._model.model.parameters())
    half = ChunkEmbedder.from_pretrained(encoder_folder, dtype=torch.bfloat16)
    whole = ChunkEmbedder.from_pretrained(encoder_folder, dtype=torch.float32)
    cosine = (half.embed(texts) * whole.embed(texts)).sum(axis=1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize("part", ["normalizer", "pre-tokenizer", "length", "heads"])
def test_fingerprint_depends_on_what_changes_vectors_beside_weights(encoder_folder, embedder, tmp_path, part):
    """With the same weights and vocabulary, another encoder."""
    folder = Path(shutil.copytree(encoder_folder, tmp_path / "encoder"))
    name = "config.json" if part == "heads" else "tokenizer.json"
    content = json.loads((folder / name).read_text())
    if part == "normalizer":
        content["normalizer"]["lowercase"] = False
    elif part == "pre-tokenizer":
        content["pre_tokenizer"] = {"type": "Whitespace"}
    elif part == "heads":
        content["num_attention_heads"] = 4
    (folder / name).write_text(json.dumps(content))
    if part == "length":
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    other = ChunkEmbedder.from_pretrained(folder)
    assert other.fingerprint != embedder.fingerprint and other.query_fingerprint != embedder.query_fingerprint


def test_fingerprint_depends_on_weights_not_on_path_or_dtype(encoder_folder, embedder, tmp_path):
    copy = make_encoder(tmp_path / "copy")
    assert ChunkEmbedder.from_pretrained(copy, dtype=torch.bfloat16).fingerprint == embedder.fingerprint
    other = make_encoder(tmp_path / "other", seed=1)
    assert ChunkEmbedder.from_pretrained(other).fingerprint != embedder.fingerprint


def recipe(folder, pooling: dict, prompt: str | None = None):
    """Make an encoder folder a sentence-transformers model."""
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(zip(kinds, ["", "1_Pooling", "2_Normalize"], strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Normalize"):
        (folder / name).mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128, "do_lower_case": False}))
    settings = {"prompts": {"query": prompt}, "default_prompt_name": "query"} if prompt else {}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


def test_mean_pooling_sentence_transformer_equals_its_plain_encoder(embedder, tmp_path, texts):
    folder = recipe(make_encoder(tmp_path), {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    same = ChunkEmbedder.from_pretrained(folder, dtype=torch.float32)
    assert same.pooling == "mean" and same.fingerprint == embedder.fingerprint
    np.testing.assert_array_equal(same.embed(texts), embedder.embed(texts))


def test_other_models_are_run_by_sentence_transformers(embedder, tmp_path, texts):
    folder = recipe(make_encoder(tmp_path), {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True})
    first_token = ChunkEmbedder.from_pretrained(folder)
    assert first_token.pooling == "sentence-transformers" and first_token.dim == 32
    assert first_token.fingerprint != embedder.fingerprint
    vectors = first_token.embed(texts, batch_size=8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.abs(vectors - embedder.embed(texts)).max() > 0.01
    np.testing.assert_allclose(pickle.loads(pickle.dumps(first_token)).embed(texts[:3]), vectors[:3], atol=1e-5)


def test_pickling_keeps_the_name_and_not_the_weights(embedder, texts):
    data = pickle.dumps(embedder)
    assert len(data) < 2000
    np.testing.assert_array_equal(pickle.loads(data).embed(texts), embedder.embed(texts))


def test_pickled_encoder_keeps_its_precision_on_other_hardware(encoder_folder, monkeypatch):
    """Otherwise blocks of one build would differ by node, and would not be found under their names."""
    half = ChunkEmbedder.from_pretrained(encoder_folder, dtype=torch.bfloat16)
    default = ChunkEmbedder.from_pretrained(encoder_folder)
    monkeypatch.setattr(embedder_module, "_default_dtype", lambda device: torch.float16)
    for one in (half, default):
        copy = pickle.loads(pickle.dumps(one))
        copy.embed(["the river"])
        assert copy.dtype == one.dtype


def plain(folder, seed: int = 0, **options) -> ChunkEmbedder:
    return ChunkEmbedder.from_pretrained(make_encoder(folder, seed=seed), dtype=torch.float32, **options)


def test_queries_without_prompts_are_embedded_as_chunks(embedder, texts):
    assert embedder.symmetric and embedder.query_fingerprint == embedder.fingerprint
    np.testing.assert_array_equal(embedder.embed_queries(texts), embedder.embed(texts))


def test_prompts_are_put_before_chunks_and_queries(embedder, tmp_path, texts):
    prompted = plain(tmp_path, prompt="the river: ", query_prompt="the king: ")
    assert not prompted.symmetric
    assert len({embedder.fingerprint, prompted.fingerprint, prompted.query_fingerprint}) == 3
    np.testing.assert_array_equal(prompted.embed(texts), embedder.embed([f"the river: {text}" for text in texts]))
    np.testing.assert_array_equal(
        prompted.embed_queries(texts), embedder.embed([f"the king: {text}" for text in texts])
    )
    again = pickle.loads(pickle.dumps(prompted))
    np.testing.assert_array_equal(again.embed_queries(texts), prompted.embed_queries(texts))
    # The same prompt on both sides makes another embedder, but a symmetric one.
    same = plain(tmp_path, prompt="the king: ", query_prompt="the king: ")
    assert same.symmetric and same.fingerprint == prompted.query_fingerprint


def dpr(folder, kind, seed: int = 0, **config):
    """A folder with a random DPR encoder."""
    make_encoder(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vocab = len(AutoTokenizer.from_pretrained(folder))
    kind(DPRConfig(vocab_size=vocab, max_position_embeddings=128, **sizes, **config)).save_pretrained(folder)
    return folder


def test_dpr_encoders_return_their_pooler_output(tmp_path, texts):
    passages, questions = (
        dpr(tmp_path / "passages", DPRContextEncoder),
        dpr(tmp_path / "questions", DPRQuestionEncoder, seed=1),
    )
    both = ChunkEmbedder.from_pretrained(passages, query_encoder=questions, dtype=torch.float32)
    assert both.pooling == "pooler" and not both.symmetric
    assert both.fingerprint == ChunkEmbedder.from_pretrained(passages).fingerprint
    tokenizer = AutoTokenizer.from_pretrained(passages)
    for embed, kind, folder in (
        (both.embed, DPRContextEncoder, passages),
        (both.embed_queries, DPRQuestionEncoder, questions),
        (pickle.loads(pickle.dumps(both)).embed_queries, DPRQuestionEncoder, questions),
    ):
        model = kind.from_pretrained(folder).eval()
        for text, vector in zip(texts[:5], embed(texts[:5]), strict=True):
            with torch.no_grad():
                pooled = model(**tokenizer(text, return_tensors="pt")).pooler_output[0]
            np.testing.assert_allclose(vector, (pooled / pooled.norm()).numpy(), atol=1e-5)
    projected = dpr(tmp_path / "projected", DPRContextEncoder, projection_dim=8)
    assert ChunkEmbedder.from_pretrained(projected).embed(texts[:2]).shape == (2, 8)


def test_two_encoders_with_vectors_of_different_lengths_are_refused(tmp_path):
    with pytest.raises(DatastoreMismatchError):
        plain(tmp_path / "32", query_encoder=make_encoder(tmp_path / "16", hidden_size=16))


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_prompts_of_a_sentence_transformer_are_used(tmp_path, texts, mode):
    """As the library's `encode_document` and `encode_query` embed, with the plain mean and with another recipe."""
    modules = [Transformer(str(make_encoder(tmp_path / "encoder"))), Pooling(32, pooling_mode=mode)]
    prompts = {"query": "the king: ", "document": "the river: "}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(tmp_path / "recipe"))
    library = SentenceTransformer(str(tmp_path / "recipe"), device="cpu")
    embedder = ChunkEmbedder.from_pretrained(tmp_path / "recipe", dtype=torch.float32)
    assert embedder.pooling == ("mean" if mode == "mean" else "sentence-transformers") and not embedder.symmetric
    for embed, encode in ((embedder.embed, library.encode_document), (embedder.embed_queries, library.encode_query)):
        expected = encode(texts, normalize_embeddings=True, show_progress_bar=False)
        np.testing.assert_allclose(embed(texts), expected, atol=1e-5)
    off = ChunkEmbedder.from_pretrained(tmp_path / "recipe", prompt="", query_prompt="", dtype=torch.float32)
    assert off.symmetric and off.fingerprint != embedder.fingerprint


def test_router_embeds_queries_with_its_query_part(tmp_path, texts):
    sides = [
        [Transformer(str(make_encoder(tmp_path / str(seed), seed=seed))), Pooling(32, pooling_mode="mean")]
        for seed in (0, 1)
    ]
    router = Router.for_query_document(query_modules=sides[1], document_modules=sides[0])
    SentenceTransformer(modules=[router], device="cpu").save(str(tmp_path / "router"))
    embedder = ChunkEmbedder.from_pretrained(tmp_path / "router")
    assert not embedder.symmetric
    np.testing.assert_allclose(embedder.embed(texts), plain(tmp_path / "0").embed(texts), atol=1e-5)
    np.testing.assert_allclose(embedder.embed_queries(texts), plain(tmp_path / "1", seed=1).embed(texts), atol=1e-5)


def test_store_records_query_prompt_and_refuses_another(tokenizer, tmp_path):
    """By default the sides it was built with are loaded again; a symmetric store's manifest is what it was."""
    options = {"prompt": "the river: ", "query_prompt": "the king: "}
    embedder = plain(tmp_path / "encoder", **options)
    store = RetroDatastore.build(
        corpus(4), tmp_path / "store", tokenizer=tokenizer, embedder=embedder, chunk_size=8, neighbor_size=16
    )
    known = store.manifest.embedder
    assert (known["prompt"], known["query"]["prompt"]) == ("the river: ", "the king: ")
    text = "the lighthouse"
    expected = store.search(embedder.embed_queries([text]), 3)
    retriever = RetroRetriever.from_pretrained(store.path, embedder=tmp_path / "encoder", num_neighbors=3)
    assert [neighbor.chunk_id for neighbor in retriever.find(text)[0]] == expected[1][0].tolist()
    for wrong in ({"prompt": "the river: ", "query_prompt": "the queen: "}, {"prompt": "the river: "}):
        with pytest.raises(DatastoreMismatchError):
            RetroRetriever(store, embedder=plain(tmp_path / "encoder", **wrong))
    with pytest.raises(DatastoreMismatchError):
        RetroRetriever(store, embedder=plain(tmp_path / "encoder"))


def test_symmetric_store_records_nothing_about_queries(datastore, encoder_folder):
    assert set(datastore.manifest.embedder) == {"name", "revision", "fingerprint", "dim", "pooling", "dtype"}
    with pytest.raises(DatastoreMismatchError):
        RetroRetriever(datastore, embedder=ChunkEmbedder.from_pretrained(encoder_folder, query_prompt="the king: "))


@pytest.mark.parametrize("name", ["org/no-such-encoder", "./nowhere/at/all", "no such name!"])
def test_unknown_embedder_name_is_reported(name):
    with pytest.raises(PretrainedNotFoundError):
        ChunkEmbedder.from_pretrained(name)


def test_folder_without_a_model_is_reported(tmp_path, encoder_folder):
    with pytest.raises(PretrainedNotFoundError):
        ChunkEmbedder.from_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder_folder).save_pretrained(tmp_path)
    with pytest.raises(PretrainedNotFoundError):
        ChunkEmbedder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        lambda size: GPT2Model(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2)),
        lambda size: BertModel(
            BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, is_decoder=True)
        ),
        lambda size: T5Model(T5Config(vocab_size=size, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)),
    ],
    ids=["gpt2", "bert as a decoder", "t5"],
)
def test_causal_model_is_refused_unless_it_is_a_sentence_transformer(model, encoder_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    tokenizer.save_pretrained(tmp_path)
    made = model(len(tokenizer))
    made.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(UnsupportedEmbedderError):
            ChunkEmbedder.from_pretrained(tmp_path, dtype=dtype)
    if not made.config.is_encoder_decoder:
        recipe(tmp_path, {"pooling_mode_mean_tokens": True})
        assert ChunkEmbedder.from_pretrained(tmp_path).dim == 32
