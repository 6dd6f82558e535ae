"""What a result needs to be believed, and to be made again: command, versions, model, datastore."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..datastore import RetroDatastore
from ..training.neighbors import neighbor_source
from .kept import digest_of, weights_digest
from .scoring import Document


if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["provenance", "score_settings"]

_PACKAGES = ("retro-hf", "torch", "transformers", "numpy", "faiss-cpu")


def score_settings(model: PreTrainedModel, datastore: RetroDatastore | None) -> str:
    """All that scores depend on but the tokens and the chunk ids; it begins with the digest of the weights."""
    attention = getattr(model.config, "_attn_implementation", None)
    source = None if datastore is None else neighbor_source(datastore, 0)
    return f"{weights_digest(model)} {model.dtype} {model.device.type} {attention} {torch.__version__} {source}"


def provenance(
    model: PreTrainedModel, settings: str, datastore: RetroDatastore | None, documents: Sequence[Document]
) -> dict[str, Any]:
    """Where a result comes from, for its JSON; `settings` is what [`score_settings`] returned."""
    texts = (f"{document.id}\n{document.text}".encode("utf-8", "replace") for document in documents)
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "model": _model(model, settings.split()[0]),
        "datastore": None if datastore is None else _datastore(datastore),
        "documents": {"fingerprint": digest_of(*texts)},
    }


def _model(model: PreTrainedModel, weights: str) -> dict[str, Any]:
    return {
        "name": getattr(model.config, "_name_or_path", None) or type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": weights,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "chunk_size": getattr(model.config, "chunk_size", None),
        "neighbor_size": getattr(model.config, "neighbor_size", None),
    }


def _datastore(datastore: RetroDatastore) -> dict[str, Any]:
    manifest = datastore.manifest
    return {
        "name": str(datastore.path),
        "generation": manifest.generation,
        "fingerprint": digest_of(*(file.sha256 for file in manifest.files)),
        "num_documents": datastore.num_documents - datastore.num_deleted_documents,
        "num_chunks": datastore.num_chunks,
        "embedder": manifest.embedder["name"],
        "index": manifest.index["factory"],
    }
