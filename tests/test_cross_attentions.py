"""`output_attentions=True` also returns which neighbor tokens each token attended to."""

import pytest
import torch

from retro_hf.model.compatibility_retro import CACHE_NAME

from .tiny import CHUNK_SIZE, hash_retriever, random_ids, random_neighbors, tiny_retro


@pytest.fixture(scope="module")
def model():
    model = tiny_retro("llama", cross_attention_num_heads=2, cross_attention_head_dim=8)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def test_each_token_has_probabilities_over_the_neighbors_of_its_chunk(model):
    """They sum to one from the end of the first chunk on, and are zero before it and at padding."""
    neighbors = random_neighbors(2, 3, ragged=True)
    outputs = model(random_ids(2, 14), use_cache=False, output_attentions=True, **neighbors)
    assert len(outputs.cross_attentions) == len(model.config.cross_attention_layers)
    assert len(outputs.attentions) == model.config.num_hidden_layers
    for layer in outputs.cross_attentions:
        assert layer.shape == (2, 2, 14, 16)
        mask = neighbors["neighbor_attention_mask"].flatten(2).bool()
        for token in range(14):
            chunk = (token + 1) // CHUNK_SIZE - 1
            real = mask[:, chunk] if chunk >= 0 else torch.zeros(2, 16, dtype=torch.bool)
            expected = real.any(dim=-1).float()[:, None].expand(2, 2)
            torch.testing.assert_close(layer[:, :, token].sum(-1), expected)
            assert (layer[:, :, token].transpose(0, 1)[:, ~real] == 0).all()


@torch.no_grad()
def test_cached_passes_return_the_probabilities_of_one_pass(model):
    ids, options = random_ids(2, 14), {"retriever": hash_retriever(), "output_attentions": True}
    expected = model(ids, use_cache=False, **options).cross_attentions
    cache, pieces = None, []
    for piece in ids.split([5, 1, 1, 1, 6], dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True, **options)
        cache = outputs[CACHE_NAME]
        pieces.append(outputs.cross_attentions)
    for layer, whole in enumerate(expected):
        torch.testing.assert_close(torch.cat([piece[layer] for piece in pieces], dim=2), whole)


@torch.no_grad()
def test_nothing_is_returned_where_nothing_was_read_or_asked_for(model):
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    assert model(ids, retriever=None, output_attentions=True).get("cross_attentions") is None
    assert model(ids, **neighbors).get("cross_attentions") is None
    assert model(ids[:, :3], retriever=hash_retriever(), output_attentions=True).cross_attentions == ()
