"""Who can see what, by gradient at every position of a sequence of three and a half chunks; and what may not matter."""

import pytest
import torch

from retro_hf import retrofit

from . import contracts
from .tiny import ENCODER, FAMILIES, hash_retriever, random_ids, random_neighbors, randomize, tiny_backbone, tiny_retro


def retrofitted_llama(**config):
    """A Llama with RETRO added, as after some training: its output projections are no longer zero."""
    config = {"chunk_size": 4, "cross_attention_layers": [1, 3], "encoder": ENCODER, **config}
    return randomize(retrofit(tiny_backbone("llama"), **config))


BUILD = {"from_scratch": tiny_retro, "retrofit": retrofitted_llama}


@pytest.fixture(params=BUILD)
def build(request):
    """Build a model from scratch over the paper's decoder, and a retrofitted Llama."""
    return BUILD[request.param]


@pytest.fixture
def model(build):
    """A model of each kind, in float32."""
    return build()


# ── causality and reach ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("chunk_offset", [0, 1, 3])
def test_a_position_sees_the_past_and_the_neighbors_of_complete_chunks(model, chunk_offset, use_cache):
    """No position sees a later token or the neighbors of a chunk that it does not complete; it sees all others."""
    contracts.check_information_flow(model, chunk_offset=chunk_offset, use_cache=use_cache)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7])
def test_causality_holds_for_any_chunk_size(build, chunk_size):
    """Also for chunks of one token, whose every position completes a chunk, and for odd ones."""
    contracts.check_information_flow(build(chunk_size=chunk_size))


@pytest.mark.parametrize("placement", ["after_attention", "after_layer"])
@pytest.mark.parametrize("layers", [[0], [0, 1, 2, 3], [3]])
def test_causality_holds_for_any_layers(build, layers, placement):
    """From the first layer on, in every layer, and in the last alone, in either placement."""
    model = build(cross_attention_layers=layers, cross_attention_placement=placement)
    if layers == [3]:
        contracts.check_reach_in_one_layer(model)
    else:
        contracts.check_information_flow(model)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bloom", "falcon"])
def test_causality_holds_where_the_attention_branch_ends_elsewhere(family):
    """Families with a norm after attention, a residual inside it, or a parallel feed-forward layer."""
    contracts.check_information_flow(tiny_retro(family))


@pytest.mark.parametrize("chunk_offset", [0, 2])
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_neighbors_reach_exactly_their_attending_chunk_in_one_layer(build, chunk_size, chunk_offset):
    """E_u reaches the last token of chunk u and the first m - 1 tokens of chunk u + 1, and nothing else."""
    model = build(cross_attention_layers=[3], chunk_size=chunk_size)
    contracts.check_reach_in_one_layer(model, chunk_offset % chunk_size)


def test_neighbors_of_an_incomplete_chunk_are_ignored(model):
    """Neighbors that stand for the half chunk at the end have exactly zero gradient, and change no bit."""
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 4)
    for kwargs in ({}, {"chunk_offset": torch.tensor([0, 0]), "use_cache": False}):
        _, of_neighbors = contracts.dependence(model, ids, neighbors, **kwargs)
        assert of_neighbors[:, :3].any(0).all() and not of_neighbors[:, 3:].any()
    with torch.no_grad():
        fewer = model(ids, **{name: tensor[:, :3] for name, tensor in neighbors.items()}).logits
        torch.testing.assert_close(model(ids, **neighbors).logits, fewer, atol=1e-6, rtol=0)


def test_tokens_of_a_chunk_reach_later_positions_through_their_encoded_neighbors():
    """E_u is conditioned on H_u, and that path carries gradient: without self-attention it is the only one."""
    model = tiny_retro(cross_attention_layers=[0], text_config={"num_hidden_layers": 1})
    torch.nn.init.zeros_(model.model.backbone.model.layers[0].self_attn.o_proj.weight)
    of_tokens, _ = contracts.dependence(model, random_ids(1, 14), random_neighbors(1, 3))
    position = torch.arange(14).unsqueeze(1)
    chunk = (position + 1) // 4 - 1
    expected = (torch.arange(14) // 4 == chunk) | (torch.arange(14) == position)
    assert torch.equal(of_tokens, expected)


def test_neighbors_never_see_each_other_in_the_encoder(model):
    """Every token of an encoded neighbor sees all of that neighbor, and no other neighbor of any chunk."""
    contracts.check_neighbors_are_encoded_apart(model)


# ── symmetries of the neighbors ───────────────────────────────────────────────────────────────────────────────────────


def test_order_of_neighbors_does_not_matter(build):
    """In float64 any order gives the same logits up to rounding."""
    contracts.check_neighbor_order_is_irrelevant(build().double(), atol=1e-12)


def test_duplicating_all_neighbors_changes_nothing(build):
    """In float64 every neighbor given twice gives the same logits up to rounding."""
    contracts.check_duplicates_change_nothing(build().double(), atol=1e-12)


def test_masked_neighbor_tokens_have_no_influence(model):
    """They get exactly zero gradient, whatever their ids; all other neighbor tokens get some."""
    contracts.check_masked_neighbors_have_no_influence(model)


def test_chunks_without_neighbors_get_no_update(model):
    """A chunk whose neighbors are all masked equals one without retrieval, with finite gradients everywhere."""
    contracts.check_chunks_without_neighbors_get_no_update(model)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masking_is_the_same_in_every_attention_implementation(build, implementation):
    """Masked neighbors and whole chunks of them are ignored by eager and by fused attention."""
    model = build()
    model.set_attn_implementation(implementation)
    contracts.check_masked_neighbors_have_no_influence(model)
    contracts.check_chunks_without_neighbors_get_no_update(model)


@pytest.mark.parametrize("num_neighbors", [1, 5])
def test_number_of_neighbors_is_free(model, num_neighbors):
    """More or fewer neighbors than in the config work, and more of them masked change nothing."""
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3, num_neighbors)
    padded = random_neighbors(2, 3, num_neighbors + 2)
    padded["neighbor_input_ids"][:, :, :num_neighbors] = neighbors["neighbor_input_ids"]
    padded["neighbor_attention_mask"][:, :, num_neighbors:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(ids, **padded).logits, model(ids, **neighbors).logits, atol=1e-5, rtol=0)


def test_longer_padding_of_neighbors_changes_nothing(model):
    """Neighbors padded to twice the length give the same logits: distances count from their first token."""
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3, ragged=True)
    padded = {name: torch.nn.functional.pad(tensor, (0, 8)) for name, tensor in neighbors.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(ids, **padded).logits, model(ids, **neighbors).logits, atol=1e-5, rtol=0)


# ── rows and padding ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("live", [False, True], ids=["given", "retrieved"])
@pytest.mark.parametrize("chunk_offsets", [None, (1, 3, 2, 1, 3)], ids=["aligned", "offset"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_padded_batch_equals_the_row_alone(build, side, chunk_offsets, live):
    """Chunk borders depend neither on padding nor on the other rows, with given neighbors and with a retriever."""
    contracts.check_padding_is_invisible(build().double(), side, chunk_offsets, live, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible_in_other_families(family, side):
    """Learned positions, sliding windows and ALiBi take their positions from the mask as well."""
    contracts.check_padding_is_invisible(tiny_retro(family), side, live=True)


def test_padding_between_tokens_has_no_chunk_position(model):
    """Chunk positions count real tokens: padding at both sides moves no border."""
    ids = random_ids(1, 9)
    mask = torch.tensor([[0, 0, *[1] * 9, 0]])
    padded = torch.nn.functional.pad(ids, (2, 1))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(ids, retriever=hash_retriever(), use_cache=False).logits
        batch = model(padded, attention_mask=mask, position_ids=positions, retriever=hash_retriever(), use_cache=False)
    torch.testing.assert_close(batch.logits[:, 2:11], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_a_padded_batch_is_the_mean_over_its_tokens(family):
    """Labels of -100 at padding leave the loss of the real tokens, with and without the padding."""
    model, ids = tiny_retro(family), random_ids(1, 9)
    neighbors = random_neighbors(1, 2)
    padded = torch.nn.functional.pad(ids, (0, 5))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 5))
    with torch.no_grad():
        alone = model(ids, labels=ids, **neighbors).loss
        labels = padded.masked_fill(mask == 0, -100)
        loss = model(padded, attention_mask=mask, labels=labels, **neighbors).loss
    torch.testing.assert_close(loss, alone, atol=1e-5, rtol=0)
