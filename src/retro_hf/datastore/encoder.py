"""Encoders of text as transformers has them, and what is checked before one is loaded: a stranger may have made it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DPRContextEncoder,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..outside import read_json_value
from .chunks import padded


def _path_of(name_or_path: str, filename: str, revision: str | None) -> str | None:
    """The path of a file of a model folder or Hub repository; None if there is none."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    path: str | None = cached_file(name_or_path, filename, revision=revision, **quiet)
    return path


def read_json_of(name_or_path: str, filename: str, revision: str | None) -> Any:
    """A JSON file of a model folder or Hub repository, as somebody else made it; None if there is none."""
    path = _path_of(name_or_path, filename, revision)
    return None if path is None else read_json_value(Path(path), what=filename)


def is_mean_pooling(name_or_path: str, modules: list[dict[str, Any]], revision: str | None) -> bool:
    """Whether a sentence-transformers model is a transformer, the mean over its tokens, and at most a normalization."""
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0].get("path"):
        return False
    settings = read_json_of(name_or_path, "config_sentence_transformers.json", revision) or {}
    pooling = read_json_of(name_or_path, f"{modules[1].get('path')}/config.json", revision) or {}
    if settings.get("default_prompt_name") or pooling.get("include_prompt") is False:
        return False
    if "pooling_mode" in pooling:
        return pooling["pooling_mode"] in ("mean", ["mean"])
    active = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True}
    return active == {"pooling_mode_mean_tokens"}


def check_weights(name_or_path: str, config: PreTrainedConfig, revision: str | None) -> None:
    """Check that the weights are about as many as a config says, before it takes memory for what is not there.

    Raises:
        ValueError: if a weight has less than a quarter of a byte; one that is quantized has half a byte.
    """
    for file in ("model.safetensors", "pytorch_model.bin"):
        index = read_json_of(name_or_path, f"{file}.index.json", revision)
        path = _path_of(name_or_path, file, revision) if index is None else None
        size = os.path.getsize(path) if path else index and int(index["metadata"]["total_size"])
        if size:
            with torch.device("meta"):  # shapes without memory
                count = sum(weight.numel() for weight in AutoModel.from_config(config).parameters())
            if count > 4 * size + (1 << 20):
                raise ValueError(f"config.json describes {count:,} weights, but {file} has {size:,} bytes")
            return


class Encoder:
    """A transformer with the mean over its real tokens, or DPR's pooler; called as a sentence-transformers model is.

    It gives what that library gives for such models, which are most embedders, and needs transformers alone.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(name, **options)
        # `AutoModel` takes every DPR checkpoint for a question encoder.
        kind: Any = DPRContextEncoder if "DPRContextEncoder" in (config.architectures or []) else AutoModel
        self.pooling = "pooler" if config.model_type == "dpr" else "mean"
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **options)
        # In float32, whatever the checkpoint has: the same model gets the same fingerprint on every machine.
        # Others would be random, and so the keys.
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        self.model, told = kind.from_pretrained(name, dtype=torch.float32, **options)
        if lacking := sorted(key for key in told["missing_keys"] if ".pooler." not in f".{key}"):
            raise ValueError(f"config.json describes the weights {lacking[0]!r}, which are not there")
        for key, found, described in sorted(told["mismatched_keys"]):
            raise ValueError(
                f"config.json describes {key!r} of shape {tuple(described)}, but these weights have the shape {tuple(found)}"
            )
        settings = read_json_of(name, "sentence_bert_config.json", revision) or {}
        positions = getattr(self.model.config, "max_position_embeddings", None)
        limits = {
            "max_seq_length of sentence_bert_config.json": settings.get("max_seq_length"),
            "model_max_length of tokenizer_config.json": self.tokenizer.model_max_length,
            "max_position_embeddings of config.json": positions,
        }
        for limit, value in limits.items():
            if value and not (type(value) is int and value > 0):
                raise ValueError(f"the {limit} is {value!r:.100}, but it must be an integer of at least 1")
        self.max_seq_length = min([limit for limit in limits.values() if limit] or [512])
        self.prompts = (read_json_of(name, "config_sentence_transformers.json", revision) or {}).get("prompts")

    @torch.inference_mode()
    def is_bidirectional(self) -> bool:
        """Whether the first token sees the second: whether its state depends on that token's mask."""
        if self.model.config.is_encoder_decoder:
            return False
        ids = torch.tensor([[0, 1], [0, 1]], device=self.model.device)
        mask = torch.tensor([[1, 1], [1, 0]], device=self.model.device)
        seeing, blind = self.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0].float()
        return bool((seeing - blind).norm() > 0.01 * blind.norm())

    @torch.inference_mode()
    def encode(self, texts: list[str], prompt: str, batch_size: int, show_progress_bar: bool) -> np.ndarray:
        """Vectors of texts, float32 of shape `(len(texts), dim)`, in batches of similar length."""
        encoding = self.tokenizer(
            [prompt + text for text in texts] if prompt else texts,
            padding=False,
            truncation=True,
            max_length=self.max_seq_length,
            return_attention_mask=False,
        )["input_ids"]
        # Longest first: the largest batch comes first, and if memory runs out, it does so at once.
        order = np.argsort([-len(ids) for ids in encoding], kind="stable")
        parts = []
        bar = logging.tqdm(total=len(texts), unit="chunk", desc="Embedding", disable=not show_progress_bar)
        for start in range(0, len(texts), batch_size):
            parts.append(self._forward([encoding[row] for row in order[start : start + batch_size]]))
            bar.update(len(parts[-1]))
        bar.close()
        vectors = np.empty((len(texts), parts[0].shape[1]), dtype=np.float32)
        vectors[order] = np.concatenate(parts)
        return vectors

    encode_document = encode_query = encode

    def _forward(self, ids: list[list[int]]) -> np.ndarray:
        width = max(1, max(len(row) for row in ids))
        both = padded(ids, width, fill=self.tokenizer.pad_token_id or 0)
        input_ids, mask = (torch.from_numpy(part).to(self.model.device) for part in both)
        # A text without tokens would attend to nothing and give NaN. It reads one padding token, and its mean is zero.
        readable = mask.clone()
        readable[:, 0] = 1
        output = self.model(input_ids=input_ids, attention_mask=readable)
        if self.pooling == "pooler":
            return output.pooler_output.float().cpu().numpy()
        weights = mask.unsqueeze(-1)
        # In float32: a sum of many bfloat16 states loses precision.
        return ((output.last_hidden_state.float() * weights).sum(1) / weights.sum(1).clamp(min=1)).cpu().numpy()
