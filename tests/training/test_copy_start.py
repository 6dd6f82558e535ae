"""start_by_copying: a new reader copies what its neighbors say before it is trained."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from retro_hf import RetroEncoderConfig, retrofit
from retro_hf.training import start_by_copying

from ..tiny import tiny_backbone


ENCODER = RetroEncoderConfig(hidden_size=144, intermediate_size=16, num_attention_heads=5, head_dim=16)
SETTINGS = {
    "encoder": ENCODER,
    "chunk_size": 8,
    "neighbor_size": 16,
    "cross_attention_null_key": True,
    "cross_attention_head_dim": 32,
}


def new_reader(**settings):
    """A small Llama, whose embeddings share a direction as those of trained models do, and a reader of it."""
    torch.manual_seed(0)
    base = tiny_backbone("llama")
    with torch.no_grad():
        embeddings = base.get_input_embeddings().weight
        embeddings.copy_(0.1 * torch.randn_like(embeddings) + 0.2)
    return retrofit(base, cross_attention_layers=[2, 3], **SETTINGS | settings)


def random_text(model, rows: int) -> torch.Tensor:
    return torch.randint(5, model.config.vocab_size, (rows, 32), generator=torch.Generator().manual_seed(1))


def copied(ids: torch.Tensor) -> torch.Tensor:
    """For every chunk one neighbor that says what comes after the chunk, with the chunk's last four tokens before it."""
    chunks = [torch.roll(ids, 4 - start, dims=1)[:, :16] for start in (8, 16, 24, 32)]
    return torch.stack(chunks, dim=1).unsqueeze(2)


@torch.no_grad()
def test_it_copies_at_once():
    """Random text that a neighbor repeats is predicted better than without it; other neighbors change next to nothing."""
    model = new_reader()
    start_by_copying(model, random_text(model, 200))
    ids = random_text(model, 8)
    off = float(model(ids, labels=ids).loss)
    on = float(model(ids, labels=ids, neighbor_input_ids=copied(ids)).loss)
    other = float(model(ids, labels=ids, neighbor_input_ids=copied(ids.flip(0))).loss)
    assert on < off - 0.02 and abs(other - off) < (off - on) / 4


@torch.no_grad()
def test_without_neighbors_it_stays_the_base():
    """Nothing of the base is touched."""
    model = new_reader()
    ids = random_text(model, 4)
    before = {name: weight.clone() for name, weight in model.model.backbone.state_dict().items()}
    expected = model(ids).logits
    start_by_copying(model, random_text(model, 200))
    assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.backbone.state_dict().items())


@torch.no_grad()
def test_what_is_copied_raises_the_logits_that_it_should():
    """Token v raises the logit of token w by code(w) · code(v), up to a factor, also where most tokens occur in no text."""
    model = new_reader(encoder=RetroEncoderConfig(hidden_size=146, num_attention_heads=5, head_dim=16))
    embeddings = model.get_input_embeddings().weight
    model.get_output_embeddings().weight.copy_(embeddings)
    start_by_copying(model, random_text(model, 200).clamp(max=30))
    attention = model.model.retro.cross_attention["3"].attention
    coded = model.model.retro.encoder.embed_proj(embeddings)
    code = coded[5:30, : 146 - 1 - 5 * 16]
    head = model.get_output_embeddings().weight * model.model.backbone.model.norm.weight
    raised = attention.o_proj(attention.v_proj(coded))[5:30] @ head[5:30].T
    similarity = cosine_similarity(raised - raised.mean(dim=1, keepdim=True), code @ (code - code.mean(dim=0)).T)
    assert similarity.min() > 0.9


@pytest.mark.parametrize(
    "settings",
    [
        {"cross_attention_null_key": False},
        {"share_embeddings": False},
        {"encoder": {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 3, "head_dim": 8}},
        {"encoder": {"hidden_size": 80, "intermediate_size": 16, "num_attention_heads": 4, "head_dim": 8}},
        {"reader": "parallel_context", "encoder": None},
    ],
    ids=str,
)
def test_a_reader_without_what_it_needs_is_refused(settings):
    """The message names the remedy."""
    model = new_reader(**settings)
    with pytest.raises(ValueError, match="start_by_copying"):
        start_by_copying(model, random_text(model, 200))


def test_too_little_text_is_refused():
    """A regression over fewer tokens than it has unknowns would fit noise."""
    model = new_reader()
    with pytest.raises(ValueError, match="tokens"):
        start_by_copying(model, random_text(model, 1))
