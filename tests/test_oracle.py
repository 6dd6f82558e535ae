"""The model against an independent, naive transcription of Algorithm 1, over the same weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_hf.model import attention_retro
from retro_hf.model.compatibility_retro import CACHE_NAME

from . import contracts
from .contracts import oracle_model
from .tiny import random_ids, random_neighbors


@pytest.mark.parametrize("chunk_offset", [0, 1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 14])
def test_logits_agree(num_tokens, chunk_offset):
    """At lengths around every chunk border, from every place in the first chunk, with ragged and missing neighbors."""
    contracts.check_agrees_with_oracle(oracle_model(), num_tokens, chunk_offset)


@pytest.mark.parametrize("use_cache", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_agree_on_every_path(implementation, grad, use_cache):
    """Fused and eager attention, with and without a graph, with and without a cache to fill."""
    model = oracle_model()
    model.set_attn_implementation(implementation)
    for chunk_offset in (0, 2):
        contracts.check_agrees_with_oracle(model, chunk_offset=chunk_offset, grad=grad, use_cache=use_cache)


@pytest.mark.parametrize("null_key", [False, True], ids=["paper", "null_key"])
@pytest.mark.parametrize("splits", [[1] * 14, [3, 1, 1, 9], [4, 4, 6], [5, 1, 8]], ids=str)
@pytest.mark.parametrize("chunk_offset", [0, 2])
def test_logits_of_a_sequence_in_pieces_agree(splits, chunk_offset, null_key):
    """Token by token and piece by piece through the cache, the logits stay those of Algorithm 1."""
    model, ids = oracle_model(cross_attention_null_key=null_key), random_ids(2, 14)
    neighbors = random_neighbors(2, 4, ragged=True)
    num_chunks = (14 + chunk_offset) // 4
    complete = {name: tensor[:, :num_chunks] for name, tensor in neighbors.items()}
    expected = contracts.naive_logits(model, ids, complete, chunk_offset)
    cache, start, pieces = None, 0, []
    with torch.no_grad():
        for length in splits:
            output = model(
                ids[:, start : start + length],
                past_key_values=cache,
                use_cache=True,
                chunk_offset=chunk_offset,
                **neighbors,
            )
            cache, start = output[CACHE_NAME], start + length
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_with_a_null_key_agree(implementation, grad):
    """One key more for every head, with a logit of its own and the value zero; its gradient, too."""
    model = oracle_model(cross_attention_null_key=True)
    assert all(layer.null_logits.abs().min() > 0 for layer in model.model.retro.cross_attention.values())
    model.set_attn_implementation(implementation)
    for chunk_offset in (0, 2):
        contracts.check_agrees_with_oracle(model, chunk_offset=chunk_offset, grad=grad)
    contracts.check_gradients_agree_with_oracle(model)


def test_a_head_that_attends_to_the_null_key_reads_nothing():
    """With a large logit neighbors change nothing, and the probabilities of their tokens are zero."""
    model, ids, neighbors = oracle_model(cross_attention_null_key=True), random_ids(2, 14), random_neighbors(2, 3)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids).logits
        for layer in model.model.retro.cross_attention.values():
            layer.null_logits.fill_(1e4)
        output = model(ids, output_attentions=True, **neighbors)
    torch.testing.assert_close(output.logits, expected)
    for weights in output.cross_attentions:
        assert weights.shape[-1] == neighbors["neighbor_input_ids"][0, 0].numel() and not weights.any()


def test_logits_without_neighbors_agree():
    """The paper's decoder alone is Algorithm 1 without a retrieval set."""
    model, ids = oracle_model(), random_ids(2, 14)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, contracts.naive_logits(model, ids), atol=1e-5, rtol=0)


def test_gradients_agree():
    """Of every parameter: nothing is detached, and nothing counted twice."""
    contracts.check_gradients_agree_with_oracle(oracle_model())


@pytest.mark.parametrize("block", [1, 5])
def test_blocks_of_queries_agree(block, monkeypatch):
    """Causal attention over several blocks of queries: logits, gradients, information flow and padding."""
    monkeypatch.setattr(attention_retro, "CAUSAL_BLOCK", block)
    model = oracle_model()
    for grad in (False, True):
        for use_cache in (False, True):
            contracts.check_agrees_with_oracle(model, grad=grad, use_cache=use_cache)
    contracts.check_gradients_agree_with_oracle(model)
    contracts.check_information_flow(model)
    for side in ("left", "right"):
        contracts.check_padding_is_invisible(model, side)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_long_sequence_attends_as_eagerly(grad):
    """Over more than two full blocks of queries the fused and the eager path agree."""
    model = oracle_model(chunk_size=16)
    ids = random_ids(1, 2 * attention_retro.CAUSAL_BLOCK + 9)
    neighbors = random_neighbors(1, ids.shape[1] // 16, neighbor_size=32, ragged=True)
    logits = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.set_grad_enabled(grad):
            logits.append(model(ids, **neighbors).logits.detach())
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_epsilon_of_every_norm_is_the_configured_one():
    """With a large epsilon the logits still agree."""
    contracts.check_agrees_with_oracle(oracle_model(eps=0.05))


@pytest.mark.parametrize(
    "config",
    [
        {"cross_attention_layers": [0]},
        {"cross_attention_layers": [0, 1, 2, 3]},
        {"cross_attention_layers": [3]},
        {"neighbor_encoder_config": {"num_hidden_layers": 3, "cross_attention_layers": [0, 2]}},
        {"neighbor_encoder_config": {"cross_attention_layers": [1]}},
        {"chunk_size": 1},
        {"chunk_size": 5},
        {"text_config": {"num_hidden_layers": 1}, "cross_attention_layers": [0]},
    ],
    ids=str,
)
def test_logits_agree_for_any_layers(config):
    """Cross-attention in any layers of the decoder and of the encoder, and chunks of any size."""
    model = oracle_model(**config)
    contracts.check_agrees_with_oracle(model, chunk_offset=model.config.chunk_size // 2)


def test_oracle_catches_the_other_placement():
    """Cross-attention after the feed-forward layer is not the paper's order, and the oracle sees it."""
    with pytest.raises(AssertionError):
        contracts.check_agrees_with_oracle(oracle_model(cross_attention_placement="after_layer"))


@st.composite
def shapes(draw):
    """A model, an input and its neighbors, all small and all drawn."""
    num_layers = draw(st.integers(1, 4))
    encoder_layers = draw(st.integers(1, 2))
    chunk_size = draw(st.integers(1, 5))
    num_tokens = draw(st.integers(1, 13))

    def subset(count):
        return sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))

    config = {
        "seed": draw(st.integers(0, 9)),
        "chunk_size": chunk_size,
        "cross_attention_layers": subset(num_layers),
        "text_config": {
            "num_hidden_layers": num_layers,
            "num_attention_heads": draw(st.integers(1, 3)),
            "head_dim": draw(st.integers(1, 9)),
        },
        "neighbor_encoder_config": {
            "num_hidden_layers": encoder_layers,
            "cross_attention_layers": subset(encoder_layers),
            "hidden_size": 2 * draw(st.integers(1, 9)),
            "head_dim": draw(st.integers(1, 9)),
        },
        "cross_attention_num_heads": draw(st.integers(1, 3)),
        "cross_attention_head_dim": draw(st.integers(1, 9)),
    }
    chunk_offset = draw(st.integers(0, chunk_size - 1))
    neighbors = None
    if num_chunks := (num_tokens + chunk_offset) // chunk_size:
        neighbors = random_neighbors(
            draw(st.integers(1, 3)),
            num_chunks,
            draw(st.integers(1, 3)),
            draw(st.integers(1, 9)),
            ragged=draw(st.booleans()),
            seed=draw(st.integers(0, 9)),
        )
    return config, num_tokens, chunk_offset, neighbors, draw(st.booleans())


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(shapes())
def test_logits_agree_for_any_shape(drawn):
    """Any sizes of model, chunk, neighbors and input, with and without a graph."""
    config, num_tokens, chunk_offset, neighbors, grad = drawn
    model = oracle_model(**config)
    ids = random_ids(1 if neighbors is None else len(neighbors["neighbor_input_ids"]), num_tokens)
    expected = contracts.naive_logits(model, ids, neighbors, chunk_offset)
    with torch.set_grad_enabled(grad):
        logits = model(ids, chunk_offset=chunk_offset, **(neighbors or {})).logits.detach()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [False, True], ids=["uncached", "cached"])
def test_logits_agree_loosely_in_bfloat16(use_cache):
    """In bfloat16 the logits are finite and near: off by a few per cent of their spread on average."""
    model, ids, neighbors = oracle_model(), random_ids(2, 14), random_neighbors(2, 3, ragged=True)
    expected = contracts.naive_logits(model, ids, neighbors)
    with torch.no_grad():
        logits = model.to(torch.bfloat16)(ids, use_cache=use_cache, **neighbors).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().mean() < 0.03 * expected.std()
