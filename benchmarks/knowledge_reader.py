"""The model of `knowledge.py`, small enough to learn to read in minutes of one core."""

from __future__ import annotations

import torch

from retro_hf import RetroConfig, RetroDecoderConfig, RetroEncoderConfig, RetroForCausalLM


CHUNK, NEIGHBOR = 32, 64


def reader_config(vocab_size: int, hidden_size: int, pad: int, eos: int) -> RetroConfig:
    """The paper's decoder with CCA in both of its layers, and an encoder of its width that compares in both of its own.

    Weights start at 1 / sqrt(width): at the usual 0.02 so narrow a model is slow to tell one token from another.
    """
    scale = hidden_size**-0.5
    decoder = RetroDecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=hidden_size // 4,
        max_position_embeddings=2 * CHUNK,
        initializer_range=scale,
        tie_word_embeddings=False,
        pad_token_id=pad,
        eos_token_id=eos,
    )
    encoder = RetroEncoderConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=hidden_size // 4,
        cross_attention_layers=[0, 1],
        initializer_range=scale,
    )
    return RetroConfig(
        text_config=decoder,
        neighbor_encoder_config=encoder,
        chunk_size=CHUNK,
        neighbor_size=NEIGHBOR,
        cross_attention_layers=[0, 1],
        cross_attention_head_dim=16,
        share_embeddings=True,
        initializer_range=scale,
        pad_token_id=pad,
        eos_token_id=eos,
    )


def make_reader(config: RetroConfig, seed: int) -> RetroForCausalLM:
    """A fresh model, its embeddings of unit variance, as in `nn.Embedding`, so that tokens are told apart early."""
    torch.manual_seed(seed)
    model = RetroForCausalLM(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
    return model
