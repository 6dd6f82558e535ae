"""ChunkEmbedder: the frozen text encoder that turns chunks into keys (section 2.3 of the paper)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from transformers import AutoConfig, PreTrainedTokenizerBase

from .. import arguments, extras
from ..errors import DatastoreInputError, DatastoreMismatchError, PretrainedNotFoundError, UnsupportedEmbedderError
from ..outside import check_base, check_hub_name, check_pretrained
from .atomic_files import sha256_of
from .compatibility import check_embedder, loading, tokenizer_fingerprint, vocabulary_fingerprint
from .documents import without_lone_surrogates
from .encoder import Encoder, check_weights, is_mean_pooling, read_json_of


def _default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively (3.2 times faster on CPUs, cosine 0.9999), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def _readable(texts: Any) -> list[str]:
    """Texts that a tokenizer can read; DatastoreInputError for anything else."""
    return [without_lone_surrogates(text) for text in arguments.texts("Text", texts, DatastoreInputError)]


def _prompts_of(prompts: dict[str, str | None]) -> tuple[str, str]:
    """What a sentence-transformers model puts before a document and before a query."""
    documents = (prompts.get(name) for name in ("document", "passage", "corpus"))
    return next(filter(None, documents), ""), prompts.get("query") or ""


def _limit_of(encoder: Any) -> int | None:
    """The tokens of a text that an encoder reads; None if it reads all, as static embeddings do, whose limit is infinite."""
    limit = encoder.max_seq_length
    return int(limit) if limit and limit != float("inf") else None


def _tensor_digests(model: torch.nn.Module) -> list[str]:
    """A sha256 of each tensor of a model, sorted, so that they depend neither on names nor on their order."""
    digests = []
    for name, tensor in model.state_dict().items():
        # The pooler of an encoder does not take part in the mean, and whether it is loaded depends on the class.
        if ".pooler." in f".{name}":
            continue
        values = tensor.detach().cpu().contiguous()
        content = memoryview(values.reshape(-1).view(torch.uint8).numpy())
        digests.append(sha256_of(f"{values.dtype}{tuple(values.shape)}", content))
    return sorted(digests)


def _settings_of(encoder: Any) -> list[str]:
    """Settings that change vectors but no weights: of a transformer its heads and activation, of a pipeline all modules'."""
    config = getattr(getattr(encoder, "model", None), "config", None)
    names = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps", "position_embedding_type")
    settings = [f"{name} {getattr(config, name, None)}" for name in names] if config is not None else []
    if isinstance(encoder, torch.nn.Module):
        for module in encoder.children():
            # Of a transformer it would say how it was loaded; its length is told already.
            described: dict[str, Any] = (
                {} if type(module).__name__ == "Transformer" else getattr(module, "get_config_dict", dict)()
            )
            settings.append(f"{type(module).__name__} {json.dumps(described, sort_keys=True, default=str)}")
    return settings


def _origin(made: dict[str, Any]) -> str:
    """The name on the Hub under which an encoder of a manifest can be loaded; a folder is named by the caller alone."""
    name: str = made["name"]
    try:
        check_hub_name(name)
    except ValueError as error:
        raise PretrainedNotFoundError(f"A datastore stores only the name of a local embedder: {error}.") from error
    # A manifest records only the last part of a local folder. A name without an owner may also be an old model of the Hub,
    # which is loaded if it is in the cache.
    known = "/" in name or made["revision"] is not None
    if not known and not os.path.isdir(os.path.join(constants.HF_HUB_CACHE, f"models--{name}")):
        raise PretrainedNotFoundError(f"A datastore stores only the name of a local embedder, here {name!r}.")
    return name


class ChunkEmbedder:
    """The frozen text encoder behind the keys of a datastore: text in, unit vectors out.

    Section 2.3 of Borgeaud et al. (2022) embeds a chunk as the mean over time of a frozen BERT. Any sentence-transformers
    model can be used, and any plain encoder of transformers, which is pooled by the mean over its real tokens, or an
    encoder of DPR (Karpukhin et al., 2020), whose pooler is read. Make one with [`ChunkEmbedder.from_pretrained`].

    Queries may be embedded in another way than chunks: with another prompt, by another part of the model, or by another
    model. Such an embedder is asymmetric, and a stored key cannot serve as a query.

    Attributes:
        dim (`int`): length of a vector.
        fingerprint (`str`): sha256 over weights, tokenizer, pooling, maximum length and prompt. It does not depend on the
            name, the folder, the device or the dtype, so a copy of a model is the same embedder.
        query_fingerprint (`str`): the same for queries; equal to `fingerprint` if they are embedded as chunks are.
        name_or_path (`str`), revision (`str`, *optional*): as given.
        prompt, query_prompt (`str`): what is put before a chunk, and before a query.
        query_encoder ([`ChunkEmbedder`], *optional*): the encoder of the queries, if it is another model.
        pooling (`str`): `"mean"`, `"pooler"` (DPR), or `"sentence-transformers"` for any other model of that library.
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
        given = {"name": os.fspath(name_or_path) if isinstance(name_or_path, os.PathLike) else name_or_path}
        if not isinstance(given["name"], str):
            raise DatastoreInputError(f"The embedder is {arguments.shown(name_or_path)}. Pass a text or a path.")
        for key, value in (given | {"revision": revision, "prompt": prompt, "query_prompt": query_prompt}).items():
            arguments.optional_text(f"The {key} of the embedder", value, DatastoreInputError)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise DatastoreInputError(f"The dtype is {arguments.shown(dtype)}. Pass one such as torch.float32.")
        try:
            device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DatastoreInputError(
                f"The device of the embedder is {arguments.shown(device)}. Pass 'cpu', 'cuda' or a torch.device."
            ) from error
        self.name_or_path = str(name_or_path)
        self.revision = revision
        self._requested = device, dtype, prompt, query_prompt
        if query_encoder is not None and not isinstance(query_encoder, ChunkEmbedder):
            query_encoder = arguments.path("query_encoder", query_encoder, DatastoreInputError)
            query_encoder = ChunkEmbedder(str(query_encoder), device=device, dtype=dtype, query_prompt=query_prompt)
        self.query_encoder = query_encoder
        self._load()

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> ChunkEmbedder:
        """Load a frozen encoder.

        Args:
            name_or_path (`str` or `Path`): folder or Hub name of a sentence-transformers model or of an encoder.
            revision (`str`, *optional*): branch, tag or commit on the Hub.
            device (`torch.device` or `str`, *optional*): defaults to CUDA if there is a GPU, else the CPU.
            dtype (`torch.dtype`, *optional*): of the weights; defaults to bfloat16 on hardware that has it (CUDA, CPUs
                with AVX512-BF16 or AMX) and to float32 elsewhere. Vectors are pooled and normalized in float32.
            prompt (`str`, *optional*): put before every chunk, such as `"passage: "` for E5; defaults to the model's own
                (sentence-transformers), else none.
            query_prompt (`str`, *optional*): put before every query, such as `"query: "` for E5; the same defaults.
            query_encoder ([`ChunkEmbedder`] or `str`, *optional*): another model for the queries, such as the question
                encoder that belongs to a passage encoder of DPR. Its vectors get length 1, too, so neighbors are ranked by
                the cosine, although DPR was trained for the inner product.
        Raises:
            DatastoreMismatchError: if the vectors of queries and chunks have different lengths.
            PretrainedNotFoundError: if there is no such model.
            UnsupportedEmbedderError: for a model that is neither a bidirectional encoder nor a sentence-transformers model.
        """
        return cls(name_or_path, **options)  # type: ignore[arg-type]  # a path, too

    @classmethod
    def of(cls, embedder: ChunkEmbedder | str | os.PathLike[str]) -> ChunkEmbedder:
        """An embedder as it is, or the one of a given name."""
        if isinstance(embedder, (str, os.PathLike)):
            return cls(os.fspath(embedder))
        check_embedder(embedder)
        return embedder

    @classmethod
    def of_datastore(cls, made: dict[str, Any], name_or_path: str | Path | None = None) -> ChunkEmbedder:
        """The embedder that a manifest describes, by default loaded from where it came from.

        Raises:
            PretrainedNotFoundError: if it is not there, or was a local folder, of which only the name is known.
        """
        if not isinstance(made, dict) or not {"name", "revision"} <= made.keys():
            raise DatastoreInputError(
                f"The embedder of the datastore is {arguments.shown(made)}. Pass `datastore.manifest.embedder`."
            )
        if name_or_path is not None:
            name_or_path = arguments.path("name_or_path", name_or_path, DatastoreInputError)
        prompt = made.get("prompt", "")
        query = made.get("query") or {"name": None, "prompt": prompt}
        other = None
        try:
            if query["name"]:
                other = cls(_origin(query), revision=query["revision"], query_prompt=query["prompt"])
            return cls(
                str(name_or_path or _origin(made)),
                revision=None if name_or_path else made["revision"],
                prompt=prompt,
                query_prompt=query["prompt"],
                query_encoder=other,
            )
        except OSError as error:
            raise PretrainedNotFoundError(
                f"The embedder {str(name_or_path or made['name'])!r} could not be loaded: {error} Say where it is: `--embedder "
                "FOLDER` (in Python: `embedder='<folder or Hub name>'`; if queries have an encoder of their own, "
                "`ChunkEmbedder.from_pretrained(..., query_encoder=...)`)."
            ) from error

    @property
    def symmetric(self) -> bool:
        """Whether a query is embedded as a chunk with the same text."""
        return self.query_fingerprint == self.fingerprint

    def _load(self) -> None:
        self._process = os.getpid()
        device, dtype, *given = self._requested
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        name = self.name_or_path
        # Some settings are found to be wrong only when a text is read.
        with loading("embedder", name):
            encoder, model, default, is_pipeline = self._open(name, self.revision)
            self._identify(encoder, model, *given)
            self.dtype = dtype or default
            model.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
            if self.pooling == "mean" and not is_pipeline and not encoder.is_bidirectional():
                raise UnsupportedEmbedderError(
                    f"The embedder '{name}' is a {type(model).__name__}, in which a token does not see the whole text. Use a "
                    "bidirectional encoder, such as 'sentence-transformers/all-MiniLM-L6-v2', or a sentence-transformers model made "
                    "from this one."
                )
            self._model = encoder
            self.dim: int = self._encode(["dimension"], 1, False, query=False).shape[1]
            other = self.query_encoder
            dim = other.dim if other else self._encode(["dimension"], 1, False, query=True).shape[1]
        if dim != self.dim:
            raise DatastoreMismatchError(
                f"{name!r} makes vectors of length {self.dim} for chunks, but {(other or self).name_or_path!r} makes vectors of "
                f"length {dim} for queries. Use two encoders that were trained together."
            )

    def _open(self, name: str, revision: str | None) -> tuple[Any, Any, torch.dtype, bool]:
        """The encoder, its module, the dtype that it has by default, and whether it has modules of sentence-transformers."""

        def read(filename: str) -> Any:
            return read_json_of(name, filename, revision)

        check_base(read)
        if not os.path.isdir(name):
            check_pretrained(read)
        modules = read("modules.json")
        if "model_type" in (read("config.json") or {}):
            check_weights(name, AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False), revision)
        if modules is None or is_mean_pooling(name, modules, revision):
            encoder = Encoder(name, revision)
            self.pooling = encoder.pooling
            return encoder, encoder.model, _default_dtype(self.device), modules is not None
        library = extras.load("sentence_transformers", f"The embedder {name!r}, which is not a plain mean,")
        encoder = library.SentenceTransformer(
            name, revision=revision, device=str(self.device), trust_remote_code=False
        )
        # The modules of such a model may expect float32, so it gets another dtype only if the user asks for it.
        self.pooling = "sentence-transformers"
        return encoder, encoder, torch.float32, True

    def _identify(self, encoder: Any, model: Any, prompt: str | None, query_prompt: str | None) -> None:
        """Set the prompts and the fingerprints, from the weights before they are cast to another dtype."""
        own, own_query = _prompts_of(encoder.prompts or {})
        self.prompt = own if prompt is None else prompt
        self.query_prompt: str = own_query if query_prompt is None else query_prompt
        length, weights = str(_limit_of(encoder) or 0), _tensor_digests(model)
        parts = [self.pooling, length, tokenizer_fingerprint(encoder.tokenizer), *_settings_of(encoder), *weights]
        # What datastores of earlier versions recorded.
        former = [self.pooling, length, vocabulary_fingerprint(encoder.tokenizer), *weights]

        def fingerprint(parts: list[str], prompt: str) -> str:
            return sha256_of("\n".join([*parts, *([f"prompt {prompt}"] if prompt else [])]))

        self.fingerprint, self.former_fingerprint = (fingerprint(one, self.prompt) for one in (parts, former))
        if self.query_encoder is not None:
            self.query_prompt = self.query_encoder.query_prompt
            self.query_fingerprint: str = self.query_encoder.query_fingerprint
            self.former_query_fingerprint: str = self.query_encoder.former_query_fingerprint
            return
        # A router sends queries through a part of the model that is theirs alone.
        routed = any(type(module).__name__ == "Router" for module in model.children())
        route = ["route query"] if routed else []
        self.query_fingerprint, self.former_query_fingerprint = (
            fingerprint([*one, *route], self.query_prompt) for one in (parts, former)
        )

    def embed(self, texts: Sequence[str], batch_size: int = 64, show_progress: bool | None = None) -> np.ndarray:
        """Embed texts, in batches of similar length.

        Args:
            texts (`Sequence[str]`): any number, in any order. Text beyond the encoder's maximum length is cut off.
            batch_size (`int`, defaults to 64): texts per forward pass; 64 suits a CPU, 256 a GPU.
            show_progress (`bool`, *optional*): show a progress bar; by default none is shown.
        Returns:
            `np.ndarray` of float32 and shape `(len(texts), dim)`, rows of length 1 (or 0, for a text without tokens).
        *Determinism*: the same texts in the same call give the same bytes; padding moves the last bits between calls.
        """
        return self._encode(texts, batch_size, show_progress, query=False)

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
        return self._encode(texts, batch_size, show_progress, query=True)

    @property
    def max_length(self) -> int | None:
        """Tokens of a text that the encoder reads, special ones included; None if it reads all."""
        return _limit_of(self._loaded)

    @property
    def _loaded(self) -> Any:
        if self._model is None:
            self._load()
        return self._model

    def seen(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The share of each text that is not cut off, and the share of that in words that the encoder knows.

        Args:
            texts (`Sequence[str]`): chunks.
        Returns:
            Two `np.ndarray` of float32 and shape `(len(texts),)`: the share of each text's characters that is before the
            cut, and the share of these that are in known words. Both are 1 for a text without characters, and where the
            tokenizer is not one of transformers.
        """
        tokenizer, texts = self._loaded.tokenizer, _readable(texts)
        shares = np.ones((2, len(texts)), dtype=np.float32)
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or not len(texts):
            return shares[0], shares[1]
        encoded = tokenizer(
            [self.prompt + text for text in texts],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,
        )
        limit = max((self.max_length or 1 << 60) - tokenizer.num_special_tokens_to_add(), 0)
        for row, ids in enumerate(encoded["input_ids"]):
            widths, letters = np.ones(len(ids), dtype=np.int64), len(ids)
            if tokenizer.is_fast:
                begins, ends = np.array([(0, 0), *encoded["offset_mapping"][row]], dtype=np.int64).T
                # Bytes of one character share its place.
                widths = np.maximum(ends[1:] - np.maximum(begins[1:], np.maximum.accumulate(ends)[:-1]), 0)
                widths[ends[1:] <= len(self.prompt)] = 0  # the prompt is none of the text
                # A tokenizer may leave out what it does not know.
                letters = sum(map(len, texts[row].split()))
            if not letters:
                continue
            total, cut = max(int(widths.sum()), letters), int(widths[limit:].sum())
            known = int(widths[:limit][np.array(ids[:limit]) != tokenizer.unk_token_id].sum())
            shares[:, row] = 1 - cut / total, known / max(total - cut, 1)
        return shares[0], shares[1]

    def _encode(self, texts: Sequence[str], batch_size: int, show_progress: bool | None, query: bool) -> np.ndarray:
        texts = _readable(texts)
        batch_size = arguments.whole("batch_size", batch_size, DatastoreInputError)
        model = self._loaded
        if self._process != os.getpid():
            # The threads that share the work do not survive a fork, and PyTorch would wait for them for ever.
            torch.set_num_threads(1)
            self._process = os.getpid()
        if not len(texts):
            return np.zeros((0, self.dim), dtype=np.float32)
        shows = show_progress is not None and arguments.flag("show_progress", show_progress, DatastoreInputError)
        encode = model.encode_query if query else model.encode_document
        prompt = self.query_prompt if query else self.prompt
        vectors = encode(texts, prompt=prompt, batch_size=batch_size, show_progress_bar=shows).astype(np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def __getstate__(self) -> dict[str, Any]:
        # All processes use the same precision, also on hardware with another default.
        device, _, *prompts = self._requested
        return self.__dict__ | {"_model": None, "_requested": (device, self.dtype, *prompts)}

    def __repr__(self) -> str:
        other = self.query_encoder.name_or_path if self.query_encoder else None
        parts = {"prompt": self.prompt, "query_prompt": self.query_prompt, "query_encoder": other}
        return (
            f"ChunkEmbedder({self.name_or_path!r}, dim={self.dim}, pooling={self.pooling!r}, dtype={self.dtype}, "
            f"device={str(self.device)!r}{''.join(f', {name}={value!r}' for name, value in parts.items() if value)})"
        )
