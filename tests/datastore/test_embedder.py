"""The frozen encoder: mean over real tokens, unit length, the same vector whatever the batch, one identity."""

import json
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from retro_hf.datastore import ChunkEmbedder
from retro_hf.datastore.embedder import _default_dtype

from .fixtures import make_encoder, sentence


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


def test_nothing_and_empty_and_overlong_texts_are_embedded(embedder):
    assert embedder.embed([]).shape == (0, 32)
    vectors = embedder.embed(["", "the " * 1000, "\x00 \ufffd \U0001f600 \u05e9\u05dc\u05d5\u05dd"])
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_weights_are_frozen_and_bfloat16_where_the_hardware_has_it(encoder_folder, texts):
    embedder = ChunkEmbedder.from_pretrained(encoder_folder)
    assert embedder.dtype == _default_dtype(embedder.device)
    assert not any(parameter.requires_grad for parameter in embedder._model.parameters())
    half = ChunkEmbedder.from_pretrained(encoder_folder, dtype=torch.bfloat16)
    whole = ChunkEmbedder.from_pretrained(encoder_folder, dtype=torch.float32)
    cosine = (half.embed(texts) * whole.embed(texts)).sum(axis=1)
    assert cosine.min() > 0.999


def test_the_fingerprint_belongs_to_the_weights_not_to_the_place_or_the_dtype(encoder_folder, embedder, tmp_path):
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


def test_a_mean_pooling_sentence_transformer_is_read_as_the_encoder_it_is(embedder, tmp_path, texts):
    folder = recipe(make_encoder(tmp_path), {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    same = ChunkEmbedder.from_pretrained(folder, dtype=torch.float32)
    assert same.pooling == "mean" and same.fingerprint == embedder.fingerprint
    np.testing.assert_array_equal(same.embed(texts), embedder.embed(texts))


def test_another_recipe_goes_through_sentence_transformers(embedder, tmp_path, texts):
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
