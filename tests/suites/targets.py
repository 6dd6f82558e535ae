"""The models that transformers' suites run on: the paper's decoder, and RETRO over five families, off and live."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from unittest import mock

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from retro_hf import (
    RetroConfig,
    RetroDecoderConfig,
    RetroDecoderForCausalLM,
    RetroDecoderModel,
    RetroForCausalLM,
    RetroModel,
)

from ..tiny import ENCODER, FAMILIES


CHUNK_SIZE = 3  # the 7 tokens of a row of transformers' inputs complete two chunks
# Ids of special tokens, which most families set outside of the tiny vocabulary.
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Target:
    """One model under test.

    Args:
        name: the model's name in the table of results.
        family: the backbone, a key of `FAMILIES`.
        kind: `"decoder"` for a plain causal language model, `"from_scratch"` or `"retrofit"` for a RETRO.
        is_live: whether every model has a retriever attached.
    """

    name: str
    family: str
    kind: str
    is_live: bool = False

    @property
    def suite_name(self) -> str:
        """The name of the test case."""
        words = re.findall(r"[A-Za-z0-9]+", self.name)
        return "Test" + "".join(word[0].upper() + word[1:] for word in words)

    @property
    def is_retro(self) -> bool:
        """Whether the model is a RETRO and not a plain decoder."""
        return self.kind != "decoder"

    @property
    def base_class(self) -> type[PreTrainedModel]:
        """The class without a head."""
        return RetroModel if self.is_retro else RetroDecoderModel

    @property
    def causal_lm_class(self) -> type[PreTrainedModel]:
        """The class with a head."""
        return RetroForCausalLM if self.is_retro else RetroDecoderForCausalLM

    def config(self) -> PreTrainedConfig:
        """A new, tiny config of two layers, both with cross-attention."""
        # Some of transformers' tests read texts longer than the last position.
        text = {**FAMILIES[self.family], **SPECIAL, "num_hidden_layers": 2, "max_position_embeddings": 128}
        if self.family == "gemma3":
            text["layer_types"] = ["sliding_attention", "full_attention"]
        if "n_layer" in text:
            text["n_layer"] = text.pop("num_hidden_layers")
            del text["max_position_embeddings"]
        if not self.is_retro:
            return RetroDecoderConfig(**{key: value for key, value in text.items() if key != "model_type"})
        is_retrofit = self.kind == "retrofit"
        return RetroConfig(
            text_config=text,
            neighbor_encoder_config=dict(ENCODER),
            chunk_size=CHUNK_SIZE,
            num_neighbors=2,
            cross_attention_layers=[0, 1],
            share_embeddings=is_retrofit,
            freeze_backbone=is_retrofit,
            **SPECIAL,
        )

    @contextmanager
    def with_retriever(self) -> Iterator[None]:
        """Attach a retriever to every RETRO that is built meanwhile, if the target is live."""
        if not self.is_live:
            yield
            return
        build = RetroModel.__init__

        @wraps(build)
        def build_live(self, *args, **kwargs):
            build(self, *args, **kwargs)
            self.set_retriever(turn_chunks)

        with mock.patch.object(RetroModel, "__init__", build_live):
            yield


def turn_chunks(
    chunk_input_ids: torch.Tensor, chunk_attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A retriever whose neighbors hold the chunk's own tokens, turned by one and by two places, so any vocabulary fits."""
    turned = [chunk_input_ids.roll(places, dims=-1) for places in (1, 2)]
    neighbors = torch.stack([torch.cat([chunk, chunk.flip(-1)], dim=-1) for chunk in turned], dim=1)
    return neighbors, torch.ones_like(neighbors)


TARGETS: tuple[Target, ...] = (
    Target("RetroDecoderForCausalLM", "retro_decoder", "decoder"),
    *(
        Target(name + ", live retriever" * is_live, family, kind, is_live)
        for name, family, kind in (
            ("RETRO", "retro_decoder", "from_scratch"),
            ("RETROfit of Llama", "llama", "retrofit"),
            ("RETROfit of Qwen3", "qwen3", "retrofit"),
            ("RETROfit of Gemma 3", "gemma3", "retrofit"),
            ("RETROfit of GPT-2", "gpt2", "retrofit"),
        )
        for is_live in (False, True)
    ),
)


class ModelTester:
    """What transformers' suites ask of a family: sizes, a config, and inputs."""

    batch_size, seq_length = 4, 7
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4
    is_training = True

    def __init__(self, target: Target):
        self.target = target

    def get_config(self) -> PreTrainedConfig:
        """A new config."""
        return self.target.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """A new config, and rows of 7, 6, 5 and 4 tokens that are padded on the right."""
        config = self.get_config()
        input_ids = torch.randint(3, config.vocab_size, (self.batch_size, self.seq_length))
        lengths = self.seq_length - torch.arange(self.batch_size)
        attention_mask = (torch.arange(self.seq_length) < lengths[:, None]).long()
        return config, {"input_ids": input_ids, "attention_mask": attention_mask}
