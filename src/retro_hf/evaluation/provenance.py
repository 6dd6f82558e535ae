"""What is needed to trust a result and to repeat it: command, versions, model, datastore; and whose folder it is in."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from ..datastore import RetroDatastore
from ..datastore.atomic_files import digest_of, make_folder
from ..datastore.bos_eos import Borders
from ..datastore.manifest import MANIFEST_NAME
from ..outside import read_json_value
from ..training.search import neighbor_source
from .scoring import TokenizedDocument


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKAGES = ("retro-hf", "torch", "transformers", "numpy", "faiss-cpu")
_RESULTS = ("evaluation.json", "tokens.parquet", "documents.parquet")
# Where provenance has what must not change within a folder.
_SAME = {"model": "weights", "datastore": "fingerprint", "documents": "fingerprint"}


def weights_digest(model: PreTrainedModel) -> str:
    """A digest of a model's weights and settings, wherever it was loaded from.

    Offloaded weights cannot be read. Such a model gets a different digest each time.
    """
    # Not the name of the model: the same weights give the same scores wherever they are.
    digest = xxhash.xxh3_128(json.dumps(_settings(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            return uuid.uuid4().hex
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(value: Any) -> Any:
    """A config without what does not change a score: names, versions, and the dtype it was saved in."""
    if not isinstance(value, dict):
        return value
    without_effect = ("dtype", "transformers_version", "architectures")
    kept = {str(name): part for name, part in value.items()}
    return {name: _settings(part) for name, part in kept.items() if name[:1] != "_" and name not in without_effect}


def score_identity(model: PreTrainedModel, datastore: RetroDatastore | None) -> str:
    """Everything that scores depend on, except token ids and chunk ids. It begins with the digest of the weights."""
    attention = getattr(model.config, "_attn_implementation", None)
    source = None if datastore is None else neighbor_source(datastore, 0)
    return f"{weights_digest(model)} {model.dtype} {model.device.type} {attention} {torch.__version__} {source}"


def provenance(
    model: PreTrainedModel,
    identity: str,
    datastore: RetroDatastore | None,
    documents: Sequence[TokenizedDocument],
    borders: Borders,
) -> dict[str, Any]:
    """Where a result comes from, for its JSON. `identity` is what [`score_identity`] returned."""
    texts = (f"{document.id}\n{document.text}".encode("utf-8", "replace") for document in documents)
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "model": {
            "name": getattr(model.config, "_name_or_path", None) or type(model).__name__,
            "revision": getattr(model.config, "_commit_hash", None),
            "weights": identity.split()[0],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "chunk_size": getattr(model.config, "chunk_size", None),
            "neighbor_size": getattr(model.config, "neighbor_size", None),
        },
        "datastore": None if datastore is None else _datastore(datastore),
        "documents": {
            "fingerprint": digest_of(
                *texts, *(f"begin {id}" for id in borders.begin), *(f"end {id}" for id in borders.end)
            )
        },
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
        "licenses": sorted({str(source["license"]) for source in manifest.sources if source.get("license")}),
    }


def claim_folder(folder: Path, origin: Mapping[str, Any]) -> None:
    """Create the folder of results, unless its files are of something else than this model, datastore and texts.

    Other settings are allowed: a call that asks for more resumes with what is there. `origin` is from [`provenance`].

    Raises:
        DatastoreWriteError: if the folder cannot be made.
        FileExistsError: if the folder has results of something else.
    """
    make_folder(folder)
    if (folder / MANIFEST_NAME).exists():
        raise FileExistsError(f"The output folder {str(folder)!r} is a datastore. Choose another folder.")
    found = [name for name in _RESULTS if (folder / name).exists()]
    before = _provenance(folder / _RESULTS[0])
    # Tables without evaluation.json are ours if the folder of finished work is there.
    if found and before is None and (found[0] == _RESULTS[0] or not (folder / "blocks").is_dir()):
        raise FileExistsError(
            f"The output folder {str(folder)!r} has a file {found[0]!r} that no evaluation wrote. Choose another folder, or "
            "move the file."
        )
    others = [
        part
        for part, key in _SAME.items()
        if before and (before.get(part) or {}).get(key) != (origin[part] or {}).get(key)
    ]
    if others:
        raise FileExistsError(
            f"The output folder {str(folder)!r} has an evaluation with a different {' and '.join(others)}. Choose another "
            "folder, or remove its evaluation.json."
        )


def _provenance(file: Path) -> dict[str, Any] | None:
    """The provenance of an evaluation of any version, or None if the file is not one."""
    try:
        content = read_json_value(file)
        return content["provenance"] if "format_version" in content else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
