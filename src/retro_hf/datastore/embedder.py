"""ChunkEmbedder: the frozen text encoder that turns chunks into keys (section 2.3 of the paper)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import constants
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .. import extras
from ..errors import DatastoreMismatchError, PretrainedNotFoundError, UnsupportedEmbedderError
from .chunks import tokenizer_fingerprint


if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ChunkEmbedder"]


def _default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively (3.2 times faster on CPUs, cosine 0.9999), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def _read_json(name_or_path: str, filename: str, revision: str | None) -> Any:
    """A JSON file of a model folder or Hub repository, or None where there is none."""
    path = cached_file(
        name_or_path,
        filename,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _is_mean_pooling(name_or_path: str, modules: list[dict[str, Any]], revision: str | None) -> bool:
    """Whether a sentence-transformers recipe is a transformer, the mean over tokens, and at most a normalization."""
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0].get("path"):
        return False
    settings = _read_json(name_or_path, "config_sentence_transformers.json", revision) or {}
    if settings.get("default_prompt_name"):
        return False
    pooling = _read_json(name_or_path, f"{modules[1].get('path')}/config.json", revision) or {}
    if pooling.get("include_prompt") is False:
        return False
    if "pooling_mode" in pooling:
        return pooling["pooling_mode"] in ("mean", ["mean"])
    active = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True}
    return active == {"pooling_mode_mean_tokens"}


def _prompts_of(prompts: dict[str, str | None] | None) -> tuple[str, str]:
    """What a sentence-transformers model puts before a document and before a query."""
    known = prompts or {}
    documents = (known.get(name) for name in ("document", "passage", "corpus"))
    return next(filter(None, documents), ""), known.get("query") or ""


def _digest(parts: list[str], prompt: str) -> str:
    # Without a prompt nothing is added, so that the fingerprints of plain encoders stay what they were.
    return hashlib.sha256("\n".join([*parts, *([f"prompt {prompt}"] if prompt else [])]).encode()).hexdigest()


def _origin(made: dict[str, Any]) -> str:
    """The name under which an encoder of a manifest can be loaded: one of the Hub, or a folder that is here."""
    name: str = made["name"]
    # A folder leaves its last part alone. A few old models of the Hub look alike; those in use are in its cache.
    known = "/" in name or made["revision"] is not None or os.path.isdir(name)
    if not known and not os.path.isdir(os.path.join(constants.HF_HUB_CACHE, f"models--{name}")):
        raise PretrainedNotFoundError(
            f"The datastore was built with an encoder from a folder named {name!r}, and keeps only that name."
        )
    return name


class ChunkEmbedder:
    """The frozen text encoder behind the keys of a datastore: text in, unit vectors out.

    Section 2.3 of Borgeaud et al. (2022) embeds a chunk as the mean over time of a frozen BERT. Any
    sentence-transformers model serves, and so does a plain encoder of transformers, pooled by the mean over its real
    tokens, or one of DPR (Karpukhin et al., 2020), read at its pooler. Make one with [`ChunkEmbedder.from_pretrained`].

    Queries may be embedded in another way than the chunks of the datastore: with another prompt, by another part of
    the model, or by another model. Such an embedder is asymmetric, and a stored key is no query for it.

    Attributes:
        dim (`int`): length of a vector.
        fingerprint (`str`): sha256 over weights, vocabulary, pooling, maximum length and prompt. Independent of the name,
            the folder, the device and the dtype, so that a copy of a model is the same embedder.
        query_fingerprint (`str`): the same for queries; equal to `fingerprint` where they are embedded as chunks are.
        name_or_path (`str`): as given.
        revision (`str`, *optional*): as given.
        prompt, query_prompt (`str`): what is put before a chunk, and before a query.
        query_encoder ([`ChunkEmbedder`], *optional*): the encoder of the queries, where it is another model.
        pooling (`str`): `"mean"`, `"pooler"` (DPR), or `"sentence-transformers"` for a recipe of that library beyond the
            mean.
        dtype (`torch.dtype`): of the weights in use.

    *Processes*: pickling keeps the name, the settings and the dtype; weights are loaded again on first use, by default
    on the device that is there.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        prompt: str | None = None,
        query_prompt: str | None = None,
        query_encoder: ChunkEmbedder | str | Path | None = None,
    ) -> None:
        self.name_or_path = str(name_or_path)
        self.revision = revision
        self._requested_device = device
        self._requested_dtype = dtype
        self._requested_prompts = prompt, query_prompt
        if query_encoder is not None and not isinstance(query_encoder, ChunkEmbedder):
            query_encoder = ChunkEmbedder(str(query_encoder), device=device, dtype=dtype, query_prompt=query_prompt)
        self.query_encoder = query_encoder
        self._load()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        prompt: str | None = None,
        query_prompt: str | None = None,
        query_encoder: ChunkEmbedder | str | Path | None = None,
    ) -> ChunkEmbedder:
        """Load a frozen encoder.

        Args:
            name_or_path (`str` or `Path`): folder or Hub name of a sentence-transformers model or of an encoder.
            revision (`str`, *optional*): branch, tag or commit on the Hub.
            device (`torch.device` or `str`, *optional*): defaults to CUDA where there is one, else the CPU.
            dtype (`torch.dtype`, *optional*): of the weights; defaults to bfloat16 on hardware that has it (CUDA, CPUs
                with AVX512-BF16 or AMX) and to float32 elsewhere. Vectors are pooled and normalized in float32.
            prompt (`str`, *optional*): put before every chunk, such as `"passage: "` for E5; defaults to the model's own
                (sentence-transformers), else none.
            query_prompt (`str`, *optional*): put before every query, such as `"query: "` for E5; the same defaults.
            query_encoder ([`ChunkEmbedder`] or `str`, *optional*): another model for the queries, such as the question
                encoder that belongs to a passage encoder of DPR. Its vectors, too, are brought to length 1, so that
                neighbors are ranked by the cosine, where DPR was trained for the inner product.
        Raises:
            DatastoreMismatchError: if queries and chunks would have vectors of different lengths.
            PretrainedNotFoundError: if there is no such model.
            UnsupportedEmbedderError: for a model that is no bidirectional encoder, unless it has a sentence-transformers
                recipe.
        """
        return cls(
            str(name_or_path),
            revision=revision,
            device=device,
            dtype=dtype,
            prompt=prompt,
            query_prompt=query_prompt,
            query_encoder=query_encoder,
        )

    @classmethod
    def of_datastore(cls, made: dict[str, Any], name_or_path: str | Path | None = None) -> ChunkEmbedder:
        """The embedder that the manifest of a datastore describes, by default from where that one came from.

        Raises:
            PretrainedNotFoundError: if it is not there, or the manifest does not say where: it was a local folder.
        """
        prompt = made.get("prompt", "")
        query = made.get("query") or {"name": None, "prompt": prompt}
        other = None
        try:
            if query["name"]:
                other = cls.from_pretrained(_origin(query), revision=query["revision"], query_prompt=query["prompt"])
            return cls.from_pretrained(
                name_or_path or _origin(made),
                revision=None if name_or_path else made["revision"],
                prompt=prompt,
                query_prompt=query["prompt"],
                query_encoder=other,
            )
        except OSError as error:
            raise PretrainedNotFoundError(
                f"The embedder {str(name_or_path or made['name'])!r} could not be loaded: {error} Pass the embedder that "
                "made the keys: embedder='<folder or Hub name>'; if queries have an encoder of their own, pass "
                "ChunkEmbedder.from_pretrained(..., query_encoder=...) in Python."
            ) from error

    @property
    def symmetric(self) -> bool:
        """Whether a query is embedded as a chunk with the same text."""
        return self.query_fingerprint == self.fingerprint

    def _load(self) -> None:
        self.device = torch.device(self._requested_device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            modules = _read_json(self.name_or_path, "modules.json", self.revision)
            if modules is None or _is_mean_pooling(self.name_or_path, modules, self.revision):
                self._load_transformer()
            else:
                self._load_sentence_transformer()
        except (OSError, ValueError) as error:
            raise PretrainedNotFoundError.for_name("embedder", self.name_or_path, error) from error
        if modules is None and self.pooling == "mean" and not self._is_bidirectional():
            raise UnsupportedEmbedderError(
                f"The embedder '{self.name_or_path}' is a {type(self._model).__name__}, but keys need a bidirectional "
                "encoder, in which every token sees the whole text. Name one, such as "
                "'sentence-transformers/all-MiniLM-L6-v2', or a sentence-transformers model made from it."
            )
        if self.query_encoder is not None:
            self._check_dim(self.query_encoder.dim, self.query_encoder.name_or_path)

    def _load_transformer(self) -> None:
        from transformers import AutoConfig, AutoModel, AutoTokenizer, DPRContextEncoder

        config = AutoConfig.from_pretrained(self.name_or_path, revision=self.revision)
        # `AutoModel` takes every DPR checkpoint for a question encoder.
        kind: Any = DPRContextEncoder if "DPRContextEncoder" in (config.architectures or []) else AutoModel
        self.pooling = "pooler" if config.model_type == "dpr" else "mean"
        self._recipe: Any = None
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.name_or_path, revision=self.revision
        )
        model: PreTrainedModel = kind.from_pretrained(self.name_or_path, revision=self.revision, dtype=torch.float32)
        settings = _read_json(self.name_or_path, "sentence_bert_config.json", self.revision) or {}
        limits = [
            settings.get("max_seq_length"),
            self._tokenizer.model_max_length,
            getattr(model.config, "max_position_embeddings", None),
        ]
        self._max_length = min([limit for limit in limits if limit] or [512])
        self.dim: int = getattr(model.config, "projection_dim", 0) or model.config.hidden_size
        settings = _read_json(self.name_or_path, "config_sentence_transformers.json", self.revision) or {}
        # Hashed as loaded, before the cast: the same model has the same fingerprint on every machine.
        self._identify(model, settings.get("prompts"))
        self._freeze(model, self._requested_dtype or _default_dtype(self.device))

    def _load_sentence_transformer(self) -> None:
        library = extras.load("sentence_transformers", f"The embedder {self.name_or_path!r}, which is no plain mean,")
        self.pooling = "sentence-transformers"
        recipe = library.SentenceTransformer(self.name_or_path, revision=self.revision, device=str(self.device))
        self._tokenizer = recipe.tokenizer
        self._max_length = int(recipe.max_seq_length or 0)
        self._identify(recipe, recipe.prompts, routed=any(type(module).__name__ == "Router" for module in recipe))
        self.dim = int(recipe.encode_document(["dimension"], show_progress_bar=False).shape[1])
        self._check_dim(int(recipe.encode_query(["dimension"], show_progress_bar=False).shape[1]), self.name_or_path)
        # Later modules of a recipe may mix precisions, so only an explicit wish leaves float32.
        self._recipe = recipe
        self._freeze(recipe, self._requested_dtype or torch.float32)

    def _freeze(self, model: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._model = model.to(device=self.device, dtype=dtype).eval().requires_grad_(False)

    @torch.inference_mode()
    def _is_bidirectional(self) -> bool:
        """Whether the first token sees the second: whether its state depends on that token's mask."""
        if self._model.config.is_encoder_decoder:
            return False
        ids = torch.tensor([[0, 1], [0, 1]], device=self.device)
        mask = torch.tensor([[1, 1], [1, 0]], device=self.device)
        seeing, blind = self._model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0].float()
        return bool((seeing - blind).norm() > 0.01 * blind.norm())

    def _identify(
        self, model: torch.nn.Module, own_prompts: dict[str, str | None] | None, routed: bool = False
    ) -> None:
        """Set the prompts and the fingerprints; `routed` if parts of the model are for queries alone."""
        given, own = self._requested_prompts, _prompts_of(own_prompts)
        self.prompt, self.query_prompt = (
            default if prompt is None else prompt for prompt, default in zip(given, own, strict=True)
        )
        digests = []
        for name, tensor in model.state_dict().items():
            # The pooler plays no part in the mean, and whether it is loaded depends on the class.
            if ".pooler." in f".{name}":
                continue
            values = tensor.detach().cpu().contiguous()
            digest = hashlib.sha256(f"{values.dtype}{tuple(values.shape)}".encode())
            digest.update(memoryview(values.reshape(-1).view(torch.uint8).numpy()))
            digests.append(digest.hexdigest())
        parts = [self.pooling, str(self._max_length), tokenizer_fingerprint(self._tokenizer), *sorted(digests)]
        self.fingerprint = _digest(parts, self.prompt)
        self.query_fingerprint: str
        if self.query_encoder is not None:
            self.query_prompt = self.query_encoder.query_prompt
            self.query_fingerprint = self.query_encoder.query_fingerprint
        else:
            self.query_fingerprint = _digest([*parts, *(["route query"] if routed else [])], self.query_prompt)

    def _check_dim(self, dim: int, name: str) -> None:
        if dim != self.dim:
            raise DatastoreMismatchError(
                f"The chunks' encoder {self.name_or_path!r} makes vectors of length {self.dim}, but the queries' encoder "
                f"{name!r} makes vectors of length {dim}. They cannot be compared: take two encoders that were trained together."
            )

    def embed(self, texts: Sequence[str], batch_size: int = 64, show_progress: bool | None = None) -> np.ndarray:
        """Embed texts, in batches of similar length.

        Args:
            texts (`Sequence[str]`): any number, in any order. Text beyond the encoder's maximum length is cut off.
            batch_size (`int`, defaults to 64): texts per forward pass; 64 suits a CPU, 256 a GPU.
            show_progress (`bool`, *optional*): a progress bar; by default no bar is drawn.
        Returns:
            `np.ndarray` of float32 and shape `(len(texts), dim)`, rows of length 1 (or 0, for a text without tokens).
        *Determinism*: the same texts in the same call give the same bytes; padding moves the last bits between calls.
        """
        return self._embed(texts, batch_size, show_progress, query=False)

    def embed_queries(
        self, texts: Sequence[str], batch_size: int = 64, show_progress: bool | None = None
    ) -> np.ndarray:
        """Embed texts to look up, as [`ChunkEmbedder.embed`] embeds the texts that are found.

        Returns:
            `np.ndarray` of float32 and shape `(len(texts), dim)`, rows of length 1.
        """
        if self.symmetric:
            return self.embed(texts, batch_size=batch_size, show_progress=show_progress)
        if self.query_encoder is not None:
            return self.query_encoder.embed_queries(texts, batch_size, show_progress)
        return self._embed(texts, batch_size, show_progress, query=True)

    def _embed(self, texts: Sequence[str], batch_size: int, show_progress: bool | None, query: bool) -> np.ndarray:
        texts = list(texts)
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        if not texts:
            return vectors
        if self._model is None:
            self._load()
        prompt = self.query_prompt if query else self.prompt
        encoded = None if self._recipe else self._tokenize([prompt + text for text in texts] if prompt else texts)
        lengths = [len(text) for text in texts] if encoded is None else [len(ids) for ids in encoded]
        # Longest first: the largest batch comes first, where running out of memory costs least.
        order = np.argsort(np.negative(lengths), kind="stable")
        bar = logging.tqdm(total=len(texts), unit="chunk", desc="Embedding", disable=not show_progress)
        for start in range(0, len(texts), batch_size):
            rows = order[start : start + batch_size]
            if encoded is None:
                encode = self._recipe.encode_query if query else self._recipe.encode_document
                batch = [texts[row] for row in rows]
                pooled = torch.from_numpy(encode(batch, prompt=prompt, batch_size=batch_size, show_progress_bar=False))
            else:
                pooled = self._pooled([encoded[row] for row in rows])
            vectors[rows] = torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()
            bar.update(len(rows))
        bar.close()
        return vectors

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        encoding = self._tokenizer(
            texts, padding=False, truncation=True, max_length=self._max_length, return_attention_mask=False
        )
        return encoding["input_ids"]

    @torch.inference_mode()
    def _pooled(self, ids: list[list[int]]) -> torch.Tensor:
        """Mean over real tokens of the last hidden states, or the pooler's output; float of shape `(len(ids), dim)`."""
        width = max(1, max(len(row) for row in ids))
        input_ids = torch.full((len(ids), width), self._tokenizer.pad_token_id or 0, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, tokens in enumerate(ids):
            input_ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            attention_mask[row, : len(tokens)] = 1
        mask = attention_mask.to(self.device)
        # A row without tokens would attend to nothing; it reads one padding token and its mean is zero.
        readable = mask.clone()
        readable[:, 0] = 1
        output = self._model(input_ids=input_ids.to(self.device), attention_mask=readable)
        if self.pooling == "pooler":
            return output.pooler_output
        hidden = output.last_hidden_state
        weights = mask.unsqueeze(-1)
        return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # One precision for all processes, also on hardware with another default.
        state.update(_model=None, _recipe=None, _tokenizer=None, _requested_dtype=self.dtype)
        return state

    def __repr__(self) -> str:
        other = self.query_encoder.name_or_path if self.query_encoder else None
        parts = {"prompt": self.prompt, "query_prompt": self.query_prompt, "query_encoder": other}
        return (
            f"ChunkEmbedder({self.name_or_path!r}, dim={self.dim}, pooling={self.pooling!r}, dtype={self.dtype}, "
            f"device={str(self.device)!r}{''.join(f', {name}={value!r}' for name, value in parts.items() if value)})"
        )
