"""The time of each stage: the same tokens as without, counted as often as the stage ran, and nothing left behind."""

import pytest
import torch
from tiny import tiny_backbone
from tiny_training import CHUNK_SIZE, NEIGHBOR_SIZE, make_model

from retro_hf import ChunkEmbedder, RetroRetriever, retrofit
from retro_hf.evaluation import profile


def generated(model, world, prompt):
    torch.manual_seed(0)
    retriever = RetroRetriever(world.datastore, embedder=world.embedder, tokenizer=world.tokenizer)
    return model.generate(
        prompt, retriever=retriever, max_new_tokens=2 * CHUNK_SIZE, do_sample=False, eos_token_id=None
    )


@pytest.mark.parametrize("reader", ["cross_attention", "parallel_context"])
def test_each_stage_is_timed_and_the_tokens_are_the_same(world, reader):
    model = make_model()
    if reader == "parallel_context":
        base = tiny_backbone("llama", vocab_size=model.config.vocab_size)
        model = retrofit(base, reader=reader, chunk_size=CHUNK_SIZE, neighbor_size=NEIGHBOR_SIZE)
    prompt = torch.arange(3, 3 + CHUNK_SIZE).unsqueeze(0)
    expected = generated(model, world, prompt)
    before = ChunkEmbedder.embed_queries, type(model.model.backbone).forward
    with profile(model) as spent:
        assert torch.equal(generated(model, world, prompt), expected)
    assert (ChunkEmbedder.embed_queries, type(model.model.backbone).forward) == before
    assert "forward" not in vars(model.model.backbone)
    assert all(seconds >= 0 for seconds in spent.seconds.values())
    assert 0 <= spent.other < spent.total
    # The prompt's chunk and the one after it are looked up; the last chunk has nothing to be read by.
    assert spent.calls["embed the queries"] == spent.calls["search the index"] == 2
    assert spent.calls["encode the neighbors"] == 2
    # One pass for the prompt, and one for each further token; what encodes a neighbor is not a step of the text.
    assert spent.calls["backbone"] == 2 * CHUNK_SIZE
    assert ("chunked cross-attention" in spent.calls) == (reader == "cross_attention")
    assert "backbone" in str(spent) and "total" in str(spent)
