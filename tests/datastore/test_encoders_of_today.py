"""Today's encoders by tiny random models of their classes: what sentence-transformers makes of them, with their prompts."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from transformers import (
    AutoTokenizer,
    Gemma3TextConfig,
    Gemma3TextModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from retro_hf import ChunkEmbedder, RetroDatastore, RetroRetriever
from retro_hf.errors import DatastoreMismatchError

from .fixtures import corpus, make_encoder, sentence


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = {
    "embedding-gemma": ("title: none | text: ", "task: search result | query: "),
    "qwen3-embedding": (
        "",
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
    ),
    "bge-m3": ("", ""),
    "model2vec": ("", ""),
}


def transformer(kind, tokenizer, folder):
    """The folder of a random model of the family, with a tokenizer that pads on its side."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": 0, "initializer_range": 0.5}
    if kind == "embedding-gemma":
        config = Gemma3TextConfig(
            **sizes, num_key_value_heads=1, head_dim=16, sliding_window=8, use_bidirectional_attention=True
        )
        model = Gemma3TextModel(config)
    elif kind == "qwen3-embedding":
        model = Qwen3Model(Qwen3Config(**sizes, num_key_value_heads=1, head_dim=16))
        tokenizer.padding_side = "left"
    else:
        model = XLMRobertaModel(XLMRobertaConfig(**sizes, max_position_embeddings=200))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Transformer(str(folder), max_seq_length=128)


@pytest.fixture(params=PROMPTS)
def encoder(request, tmp_path):
    """The name of a kind, and a folder as sentence-transformers saves it."""
    kind, tokenizer = request.param, AutoTokenizer.from_pretrained(make_encoder(tmp_path / "words"))
    if kind == "model2vec":
        torch.manual_seed(0)
        modules = [StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=32), Normalize()]
    else:
        pooling = {"embedding-gemma": "mean", "qwen3-embedding": "lasttoken", "bge-m3": "cls"}[kind]
        modules = [transformer(kind, tokenizer, tmp_path / "base"), Pooling(32, pooling_mode=pooling)]
        if kind == "embedding-gemma":
            modules += [Dense(32, 48, bias=False), Dense(48, 32, bias=False)]
        modules.append(Normalize())
    document, query = PROMPTS[kind]
    prompts = {"query": query, "document": document} if query else {}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(tmp_path / "encoder"))
    return kind, tmp_path / "encoder"


def test_it_embeds_as_its_library_does_with_its_prompts_on_both_sides(encoder, tokenizer, tmp_path):
    """Chunks with the prompt for documents, queries with that for queries; the store knows both."""
    kind, folder = encoder
    library = SentenceTransformer(str(folder), device="cpu")
    embedder = ChunkEmbedder.from_pretrained(folder)
    generator = np.random.default_rng(3)
    texts = [sentence(generator, int(words)) for words in generator.integers(1, 30, size=20)]
    assert (embedder.prompt, embedder.query_prompt) == PROMPTS[kind]
    for embed, encode in ((embedder.embed, library.encode_document), (embedder.embed_queries, library.encode_query)):
        np.testing.assert_allclose(embed(texts), encode(texts, normalize_embeddings=True), atol=1e-5)
    assert embedder.symmetric == (PROMPTS[kind][0] == PROMPTS[kind][1])
    cut, known = embedder.seen(["the king " * 200, "the king"])
    assert (
        known.min() == 1 and cut[1] == 1 and (cut[0] < 1) == (kind != "model2vec")
    )  # which reads texts of any length

    store = RetroDatastore.build(
        corpus(6), tmp_path / "store", tokenizer=tokenizer, embedder=embedder, chunk_size=8, neighbor_size=16
    )
    made = RetroDatastore.load(tmp_path / "store").manifest.embedder
    prompts = made.get("prompt", ""), (made.get("query") or {"prompt": made.get("prompt", "")})["prompt"]
    assert prompts == PROMPTS[kind]
    retriever = RetroRetriever.from_pretrained(tmp_path / "store", embedder=str(folder))
    query = library.encode_query(["the golden lighthouse"], normalize_embeddings=True)
    (found,) = retriever.find(["the golden lighthouse"])
    texts = [neighbor.text for neighbor in found]
    expected = library.encode_document(texts, normalize_embeddings=True) @ query[0]
    np.testing.assert_allclose([neighbor.score for neighbor in found], expected, atol=5e-3)  # keys are float16
    if not embedder.symmetric:
        with pytest.raises(DatastoreMismatchError):
            store.check_compatible(embedder=ChunkEmbedder.from_pretrained(folder, query_prompt=""))
