"""The card of a datastore on the Hub: what is in it, where it comes from, how it is loaded, how to have text removed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from transformers.utils import logging

from .manifest import DatastoreManifest


__all__ = ["CARD_NAME", "make_card"]

logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
_TEMPLATE = Path(__file__).parent / "templates" / "datastore_card.md"
_MAX_SOURCES = 20
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
# What follows this line in a card is its owner's own text.
_OWN_TEXT = "<!-- Everything below this line is kept when the datastore is pushed again. -->"


def make_card(api: HfApi, repo_id: str, commit: str | None, manifest: DatastoreManifest) -> bytes | None:
    """The card, checked by the Hub.

    Args:
        api (`HfApi`): client.
        repo_id (`str`): where the datastore goes.
        commit (`str`, *optional*): a commit with the card that is there already. What stands in it below the line that
            says so is kept; a card without that line is somebody's own and stays.
        manifest ([`DatastoreManifest`]): of the datastore.
    Returns:
        `bytes`, or None where a card is left as it is, or none could be made: a warning says why.
    """
    try:
        own = "\n"
        if commit is not None:
            path = api.hf_hub_download(repo_id, CARD_NAME, repo_type="dataset", revision=commit)
            _, line, own = Path(path).read_text(encoding="utf-8").partition(_OWN_TEXT)
            if not line:
                logger.warning(
                    f"The card of {repo_id!r} was written by hand and stays as it is. Remove {CARD_NAME} from the "
                    "repository to have one made."
                )
                return None
        card = render_card(manifest, repo_id)
        card.validate(repo_type="dataset")
        return f"{str(card).rstrip()}\n\n{_OWN_TEXT}{own}".encode()
    except Exception as error:  # whatever it is, it must not keep the datastore from its readers
        logger.warning(f"The datastore is pushed to {repo_id!r} without a new card: {error}")
        return None


def render_card(manifest: DatastoreManifest, repo_id: str) -> DatasetCard:
    """Fill the template in."""
    licenses = {source.get("license") for source in manifest.sources}
    agreed = licenses.pop() if len(licenses) == 1 else None
    data = DatasetCardData(
        license=agreed if isinstance(agreed, str) and _LICENSE_ID.fullmatch(agreed) else "other",
        pretty_name=repo_id.split("/")[-1],
        tags=["retro", "retrieval", "retro-hf"],
        configs=[{"config_name": "default", "data_files": "documents-*.parquet"}],
    )
    # A name on the Hub has an owner; of a local folder the manifest keeps the last part.
    embedder = manifest.embedder
    on_hub = "/" in embedder["name"] or embedder["revision"] is not None
    return DatasetCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        manifest=manifest,
        repo_id=repo_id,
        size=sum(file.size for file in manifest.files),
        sources=[{key: _cell(value) for key, value in source.items()} for source in manifest.sources[:_MAX_SOURCES]],
        num_more_sources=max(0, len(manifest.sources) - _MAX_SOURCES),
        indexes=[_index(shard.index) for shard in manifest.shards[:_MAX_SOURCES]],
        num_more_shards=max(0, len(manifest.shards) - _MAX_SOURCES),
        embedder_argument="" if on_hub else f", embedder={json.dumps(embedder['name'])}",
    )


def _index(index: dict[str, Any]) -> dict[str, str]:
    """Factory, search parameters and recall of a shard's index, in words."""
    recall = index.get("recall")
    search = ", ".join(f"{name}={value}" for name, value in index["search"].items())
    return {
        "factory": _cell(index["factory"]),
        "search": search or "none",
        "recall": "exact"
        if not recall
        else f"{recall['value']:.3f} of the {recall['at']} nearest, measured on {recall['queries']:,} queries",
    }


def _cell(value: Any) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(str(value).replace("|", "\\|").split())
