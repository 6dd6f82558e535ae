"""The presets have the parameters that the paper reports for its four sizes, counted on the meta device."""

from math import prod
from pathlib import Path

import pytest
import torch

from retro_hf import RetroConfig, RetroDecoderForCausalLM, RetroForCausalLM


PRESETS = Path(__file__).resolve().parents[1] / "hub_configs"

# Millions, without embeddings: in the matrices of the decoder alone and of RETRO, then the paper's own (rounded) totals
# of both, and that of the decoder with embeddings (Tables 2 and 10).
TOTALS = {
    "retro-172m": (132.1, 172.5, 132, 172, 247),
    "retro-425m": (368.1, 425.5, 368, 425, 564),
    "retro-1.5b": (1308.6, 1451.4, 1309, 1451, 1574),
    "retro-7.5b": (6979.3, 7531.5, 6982, 7532, 7505),
}


def count(model: torch.nn.Module, least_dim: int = 1, embeddings: bool = False) -> int:
    """Number of parameters, those of vectors only with `least_dim=1`; tied ones once."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if p.dim() >= least_dim and (embeddings or id(p) not in tables))


def load(preset: str) -> tuple[RetroConfig, RetroForCausalLM]:
    """A preset's config, and its model without storage."""
    config = RetroConfig.from_pretrained(PRESETS / preset)
    with torch.device("meta"):
        return config, RetroForCausalLM(config)


@pytest.mark.parametrize("preset", TOTALS)
def test_totals_are_the_papers(preset):
    """To 0.1 million what the paper's table of sizes amounts to, and near the totals that it prints."""
    decoder, retro, printed_decoder, printed_retro, printed_with_embeddings = TOTALS[preset]
    _, model = load(preset)
    backbone = model.model.backbone
    assert round(count(backbone, least_dim=2) / 1e6, 1) == decoder
    assert round(count(model, least_dim=2) / 1e6, 1) == retro
    assert count(backbone) / 1e6 == pytest.approx(printed_decoder, rel=2e-3)
    assert count(model) / 1e6 == pytest.approx(printed_retro, rel=4e-3)
    assert count(backbone, embeddings=True) / 1e6 == pytest.approx(printed_with_embeddings, rel=3e-3)


@pytest.mark.parametrize("preset", TOTALS)
def test_totals_are_the_sum_of_the_papers_matrices(preset):
    """Exactly: Q, K, V, O and R without biases in every attention, two matrices in every FFW, one gain in every norm."""
    config, model = load(preset)
    text, encoder = config.text_config, config.neighbor_encoder_config
    d, inner, e = text.hidden_size, text.num_attention_heads * text.head_dim, encoder.hidden_size
    e_inner = encoder.num_attention_heads * encoder.head_dim
    decoder = text.num_hidden_layers * (5 * d * inner + 2 * d * text.intermediate_size + 2 * d) + d
    cca = len(config.cross_attention_layers) * (3 * d * inner + 2 * e * inner + d)
    encoder_self = encoder.num_hidden_layers * (5 * e * e_inner + 2 * e * encoder.intermediate_size + 2 * e)
    encoder_cross = len(encoder.cross_attention_layers) * (3 * e * e_inner + 2 * d * e_inner + e)
    assert count(model.model.backbone) == decoder
    assert count(model) == decoder + cca + encoder_self + encoder_cross + d + e
    tables = config.vocab_size * (d + e)
    assert count(model, embeddings=True) == count(model) + tables


@pytest.mark.parametrize("preset", TOTALS)
def test_the_decoder_alone_is_the_papers_baseline(preset):
    """`text_config` is the baseline of that size, with the names and shapes of the backbone."""
    config, model = load(preset)
    with torch.device("meta"):
        baseline = RetroDecoderForCausalLM(config.text_config)
    shapes = {name: tuple(p.shape) for name, p in baseline.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in model.model.backbone.named_parameters()}
    assert sum(prod(shape) for shape in shapes.values()) == count(model.model.backbone, embeddings=True)


@pytest.mark.parametrize("preset", ["retro-1.5b", "retro-7.5b"])
def test_only_every_third_layer_from_the_sixth_gives_the_totals(preset):
    """Table 10 begins P with 9 for the two large models; that misses the total it reports by at least 0.7 per cent."""
    config = RetroConfig.from_pretrained(PRESETS / preset)
    config.cross_attention_layers = config.cross_attention_layers[1:]
    with torch.device("meta"):
        model = RetroForCausalLM(config)
    assert count(model) / 1e6 < TOTALS[preset][3] * 0.993
