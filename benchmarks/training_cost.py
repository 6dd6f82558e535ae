"""What training the paper's models would cost, computed from FLOPs: the table of docs/reproduce.md.

    python benchmarks/training_cost.py
    python benchmarks/training_cost.py --utilization 0.2 --gpu-flops 312e12

Nothing here is measured. The sizes are counted on the models of `hub_configs`, which are built without storage.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from scale import print_table, rounded

from retro_hf import RetroConfig, RetroForCausalLM


PRESETS = Path(__file__).resolve().parents[1] / "hub_configs"
SIZES = ("172m", "425m", "1.5b", "7.5b")
SEQUENCE = 2048
# Section C.1, and section 4.2: 6 million sequences.
TRAINING_TOKENS, RETROFIT_TOKENS = 419_430_400_000, 6_000_000 * SEQUENCE
# Float32 weights, gradients, and the two moments of AdamW.
BYTES_PER_PARAMETER = 16


class Cost(NamedTuple):
    """FLOPs for one token of the text, in training; and the model's size."""

    baseline: float
    retro: float
    retrofit: float
    parameters: int


def count(module: torch.nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def cost_per_token(config: RetroConfig, length: int = SEQUENCE) -> Cost:
    """Training FLOPs per token of a model.

    A weight costs 2 FLOPs per token forwards, and 4 backwards: 2 for the gradient of its input, 2 for its own. Attention of
    width w to n keys costs 4 * w * n forwards, and twice that backwards. The causal mask saves nothing in this formula.
    """
    with torch.device("meta"):
        model = RetroForCausalLM(config)
    text, encoder, retro = config.text_config, config.neighbor_encoder_config, model.model.retro
    layers, first = text.num_hidden_layers, config.cross_attention_layers[0]
    head = text.vocab_size * text.hidden_size
    # Forward FLOPs per token of the text, of the decoder's layers, its head, and all that RETRO adds.
    inner = text.num_attention_heads * text.head_dim
    decoder = 2 * count(model.model.backbone.model.layers) + layers * 4 * inner * length
    read_out = 2 * head
    # Neighbor tokens per token of the text pass through the encoder, and are keys and values of cross-attention.
    neighbor_tokens = config.num_neighbors * config.neighbor_size / config.chunk_size
    inner = encoder.num_attention_heads * encoder.head_dim
    keys = encoder.num_hidden_layers * config.neighbor_size + len(encoder.cross_attention_layers) * config.chunk_size
    added = neighbor_tokens * (2 * count(retro.encoder.layers) + 4 * inner * keys)
    inner = config.cross_attention_num_heads * config.cross_attention_head_dim
    key_value, keys = 2 * encoder.hidden_size * inner, config.num_neighbors * config.neighbor_size
    for layer in retro.cross_attention.values():
        added += neighbor_tokens * 2 * key_value + 2 * (count(layer) - key_value) + 4 * inner * keys
    # RETROfit: no gradient reaches the layers below the first cross-attention, and the frozen weights get none themselves.
    frozen = decoder + read_out + decoder * (layers - first) / layers + read_out
    return Cost(3 * (decoder + read_out), 3 * (decoder + read_out + added), frozen + 3 * added, count(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--gpu-flops", type=float, default=989e12, help="peak of one GPU; default: H100, dense bfloat16"
    )
    parser.add_argument("--utilization", type=float, default=0.4, help="share of the peak that is reached")
    parser.add_argument("--gpu-price", type=float, default=3.0, help="dollars per GPU-hour")
    arguments = parser.parse_args()
    per_hour = arguments.gpu_flops * arguments.utilization * 3600
    rows = []
    for size in SIZES:
        one = cost_per_token(RetroConfig.from_pretrained(PRESETS / f"retro-{size}"))
        baseline, retro = (TRAINING_TOKENS * flops / per_hour for flops in (one.baseline, one.retro))
        retrofit = RETROFIT_TOKENS * one.retrofit / per_hour
        rows.append(
            (
                f"retro-{size}",
                f"{one.baseline / 1e9:.2f}",
                f"{one.retro / 1e9:.2f}",
                f"{one.retro / one.baseline:.2f}",
                *(rounded(hours) for hours in (baseline, retro, retrofit)),
                rounded(retro * arguments.gpu_price),
                rounded(one.parameters * BYTES_PER_PARAMETER / 1e9),
            )
        )
    header = "model, baseline, RETRO, ratio, baseline, RETRO, RETROfit, $ RETRO, GB"
    print_table(
        f"GFLOP per token, then GPU-hours at {arguments.utilization:.0%} of {arguments.gpu_flops / 1e12:.0f} TFLOP/s",
        tuple(header.split(", ")),
        rows,
    )


if __name__ == "__main__":
    main()
