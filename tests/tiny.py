"""Tiny models, neighbors and retrievers that the tests share: everything is a few thousand weights and seeded."""

from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from retro_hf import RetroConfig, RetroForCausalLM


VOCAB_SIZE = 99
CHUNK_SIZE = 4
NUM_NEIGHBORS = 2
NEIGHBOR_SIZE = 8

_LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_GROUPED = {**_LLAMA, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 4, "n_head": 4}

# One tiny config for each way in which decoder-only families differ, ready for `text_config`.
FAMILIES: dict[str, dict] = {
    "retro_decoder": {"model_type": "retro_decoder", **_LLAMA, "head_dim": 8},
    "llama": {"model_type": "llama", **_GROUPED, "max_position_embeddings": 128},
    "gpt2": {"model_type": "gpt2", **_GPT2, "n_positions": 128},
    "gpt_neox": {"model_type": "gpt_neox", **_LLAMA},
    "qwen3": {"model_type": "qwen3", **_GROUPED, "head_dim": 8},
    "mistral": {"model_type": "mistral", **_GROUPED, "sliding_window": None},
    "mistral_sliding": {"model_type": "mistral", **_GROUPED, "sliding_window": 8},
    "gemma2": {"model_type": "gemma2", **_GROUPED, "head_dim": 8, "sliding_window": 8},
    "gemma3": {"model_type": "gemma3_text", **_GROUPED, "head_dim": 8, "sliding_window": 8},
    "olmo2": {"model_type": "olmo2", **_GROUPED},
    "opt": {
        "model_type": "opt",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 128,
        "pad_token_id": 1,
    },
    "phi": {"model_type": "phi", **_LLAMA},
    "bloom": {"model_type": "bloom", "vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": 4, "n_head": 4},
    "falcon": {
        "model_type": "falcon",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "granite": {"model_type": "granite", **_GROUPED, "residual_multiplier": 0.3},
    "gptj": {"model_type": "gptj", **_GPT2, "rotary_dim": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_GROUPED,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}

ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 8}


def randomize(model: torch.nn.Module, scale: float = 0.15, seed: int = 0) -> torch.nn.Module:
    """Draw every matrix anew, and move every norm off one, so that no part of the model is silent; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.dim() > 1:
                parameter.copy_(scale * noise)
            else:
                parameter.add_(0.1 * noise)
    return model


def tiny_backbone(family: str = "llama", seed: int = 0, **config) -> PreTrainedModel:
    """A causal language model of a family in `FAMILIES`, in evaluation mode; `config` overrides its fields."""
    fields = {**FAMILIES[family], **config}
    torch.manual_seed(seed)
    backbone = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    return randomize(backbone, seed=seed).eval()


def tiny_retro(
    family: str = "retro_decoder", text_config: dict | None = None, seed: int = 0, scale: float = 0.15, **config
) -> RetroForCausalLM:
    """A from-scratch RETRO over a family in `FAMILIES`, random in every weight, in evaluation mode.

    Args:
        text_config: overrides fields of the backbone.
        scale: standard deviation of every matrix.
        config: overrides fields of `RetroConfig`; `neighbor_encoder_config` is merged into `ENCODER`.
    """
    fields = {"chunk_size": CHUNK_SIZE, "num_neighbors": NUM_NEIGHBORS, "cross_attention_layers": [1, 3], **config}
    fields["text_config"] = {**FAMILIES[family], **(text_config or {})}
    fields["neighbor_encoder_config"] = {**ENCODER, **config.get("neighbor_encoder_config", {})}
    torch.manual_seed(seed)
    return randomize(RetroForCausalLM(RetroConfig(**fields)), scale, seed).eval()


def two_layer_retro(family: str, **config) -> RetroForCausalLM:
    """One layer without cross-attention and one with it, for tests that trace a model: that takes time for each layer."""
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 2}
    return tiny_retro(family, layers, cross_attention_layers=[1], **config)


def random_ids(*shape: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.LongTensor:
    """Token ids from 3 on: the lower ones are special in some families."""
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def random_neighbors(
    batch_size: int,
    num_chunks: int,
    num_neighbors: int = NUM_NEIGHBORS,
    neighbor_size: int = NEIGHBOR_SIZE,
    *,
    ragged: bool = False,
    seed: int = 1,
    vocab_size: int = VOCAB_SIZE,
) -> dict[str, torch.Tensor]:
    """`neighbor_input_ids` and `neighbor_attention_mask`, ready to be passed to `forward`.

    Args:
        ragged: neighbors end early at random, and some are missing as a whole.
    """
    shape = (batch_size, num_chunks, num_neighbors, neighbor_size)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, shape, generator=generator)
    mask = torch.ones_like(ids)
    if ragged:
        lengths = torch.randint(0, neighbor_size + 1, shape[:3], generator=generator)
        mask = (torch.arange(neighbor_size) < lengths.unsqueeze(-1)).long()
        ids = ids.masked_fill(mask == 0, 0)
    return {"neighbor_input_ids": ids, "neighbor_attention_mask": mask}


def hash_retriever(
    num_neighbors: int = NUM_NEIGHBORS, neighbor_size: int = NEIGHBOR_SIZE, vocab_size: int = VOCAB_SIZE
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A retriever without a datastore: every neighbor is a fixed function of all tokens of the chunk.

    The last neighbor, where there are several, ends two tokens early. `calls` of the function holds the `(N, chunk_size)`
    ids of each call.
    """

    def retrieve(
        chunk_input_ids: torch.Tensor, chunk_attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        retrieve.calls.append(chunk_input_ids.clone())
        chunk = chunk_input_ids * chunk_attention_mask.long()
        weights = torch.arange(1, chunk.shape[1] + 1, device=chunk.device)
        key = (chunk * weights).sum(-1)[:, None, None]
        rank = torch.arange(num_neighbors, device=chunk.device)[:, None]
        place = torch.arange(neighbor_size, device=chunk.device)
        ids = (key * (2 * place + 3) + 31 * rank + 7 * place * place) % (vocab_size - 3) + 3
        mask = torch.ones_like(ids)
        if num_neighbors > 1:
            mask[:, -1, -2:] = 0
        return ids, mask

    retrieve.calls = []
    return retrieve


def neighbors_from(
    retriever: Callable, input_ids: torch.Tensor, chunk_size: int = CHUNK_SIZE, chunk_offset: int = 0
) -> dict[str, torch.Tensor]:
    """What `retriever` returns for every complete chunk of unpadded rows, ready for `forward`; {} without a chunk."""
    mask = torch.nn.functional.pad(torch.ones_like(input_ids), (chunk_offset, 0))
    input_ids = torch.nn.functional.pad(input_ids, (chunk_offset, 0))
    batch_size, num_chunks = len(input_ids), input_ids.shape[1] // chunk_size
    if num_chunks == 0:
        return {}
    chunks, mask = (part[:, : num_chunks * chunk_size].reshape(-1, chunk_size) for part in (input_ids, mask))
    ids, mask = retriever(chunks, mask)
    shape = (batch_size, num_chunks, *ids.shape[1:])
    return {"neighbor_input_ids": ids.view(shape), "neighbor_attention_mask": mask.view(shape)}
