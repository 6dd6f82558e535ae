"""Datastores on the Hub: a dataset repository with a card, in which one commit is one generation."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    DatasetCardData,
    HfApi,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from transformers.utils import logging

from .. import arguments
from ..arguments import flag, optional_text, shown
from ..errors import DatastoreCorruptError, DatastoreInputError, DatastoreNotFoundError
from ..outside import MAX_JSON_BYTES, is_path, printable, read_json_value
from .atomic_files import MANIFEST_NAME, building_folder
from .manifest import DatastoreManifest, FileEntry, check_content, check_sizes, checked_path
from .store_generation import with_current_files


if TYPE_CHECKING:
    from .store import RetroDatastore

logger = logging.get_logger(__name__)

_REPO_TYPE = "dataset"
_CARD_NAME = "README.md"
_TEMPLATE = Path(__file__).parent / "templates" / "datastore_card.md"
_MAX_LISTED = 20
_PATHS_PER_CALL = 1000
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
# What follows this line in a card is its owner's own text.
_OWN_TEXT = "<!-- Everything below this line is kept when the datastore is pushed again. -->"


def push(
    datastore: RetroDatastore,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    settings: dict[str, bytes] | None = None,
) -> CommitInfo:
    """Upload a datastore to a dataset repository, with a card, as one commit.

    Only files that the manifest names and the repository lacks are uploaded; files that only its old manifest named are
    removed. A reader sees the old generation or the new one. If it is interrupted, the same call uploads what is missing.

    Args:
        datastore ([`RetroDatastore`]): the store; verified first, so that no damage is passed on.
        repo_id (`str`): `"name"` or `"organization/name"`; created if it does not exist.
        private (`bool`, *optional*): whether a new repository is private.
        token (`str`, *optional*): for the Hub; by default the one that `hf auth login` saved.
        revision (`str`, *optional*): branch to push to; created if it does not exist.
        settings (`dict[str, bytes]`, *optional*): small files to put beside the datastore, by name.
    Returns:
        [`~huggingface_hub.CommitInfo`]: its `oid` is the `revision` that pins what was pushed.
    Raises:
        DatastoreCorruptError: if the folder is damaged; nothing is uploaded.
        DatastoreInputError: if the token may not write there, the Hub cannot be reached, or `repo_id` is not a valid name.
    """
    if not isinstance(repo_id, str):
        raise DatastoreInputError(f"repo_id is {shown(repo_id)}. Pass a repository name such as 'organization/name'.")
    private = None if private is None else flag("private", private, DatastoreInputError)
    for name, value in (("token", token), ("revision", revision)):
        optional_text(name, value, DatastoreInputError)
    datastore.refresh()
    datastore.verify()
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, repo_type=_REPO_TYPE, private=private, exist_ok=True).repo_id
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise DatastoreInputError(
            f"The Hub does not let you write to the dataset repository {repo_id!r}: {error} Log in with `hf auth login`, with a "
            "token that may write there."
        ) from error
    except HFValidationError as error:
        raise DatastoreInputError(f"{error} Pass a repository name such as 'organization/name'.") from error
    # `HTTPError` is what the client's HTTP library raises if there is no answer at all.
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise DatastoreInputError(
            f"The Hub could not be reached to push to {repo_id!r}: {error} Repeat the call with a connection, and without "
            "HF_HUB_OFFLINE=1."
        ) from error
    # A writer may remove files of this generation while they are uploaded: then the next one is pushed.
    result: CommitInfo = with_current_files(
        [datastore], lambda: _uploaded(api, repo_id, datastore, revision, settings or {})
    )
    return result


def _uploaded(
    api: HfApi, repo_id: str, datastore: RetroDatastore, revision: str | None, settings: dict[str, bytes]
) -> CommitInfo:
    """Commit a datastore, and explain what may stop the upload."""
    try:
        return _commit(api, repo_id, datastore, revision, settings)
    except ValueError:
        check_sizes(datastore.path, datastore.manifest.files)  # of the client, for a file that is gone
        raise
    except (HTTPError, RuntimeError) as error:
        # An answer of the Hub explains itself; the client wraps the errors that stop the upload of a file.
        if isinstance(error, HfHubHTTPError) or isinstance(error.__cause__, HfHubHTTPError):
            raise
        raise DatastoreInputError(
            f"The push to {repo_id!r} was interrupted: {error.__cause__ or error} Nothing has changed for readers; repeat the call, "
            "which uploads only what is missing."
        ) from error


def _commit(
    api: HfApi, repo_id: str, datastore: RetroDatastore, revision: str | None, settings: dict[str, bytes]
) -> CommitInfo:
    """Upload what a repository lacks of a datastore, and commit it."""
    manifest = datastore.manifest
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, repo_type=_REPO_TYPE, branch=revision, exist_ok=True)
    head = str(api.repo_info(repo_id, repo_type=_REPO_TYPE, revision=revision).sha)
    tree = api.list_repo_tree(repo_id, repo_type=_REPO_TYPE, revision=head)
    there = {file.path: file for file in tree if isinstance(file, RepoFile)}
    new = [file for file in manifest.files if not _is_same(there.get(file.name), file)]
    content = {MANIFEST_NAME: manifest.to_bytes(), **settings}
    # The card is made and validated now, so that a bad card cannot stop the commit.
    card = _make_card(api, repo_id, head if _CARD_NAME in there else None, manifest)
    if card is not None:
        content[_CARD_NAME] = card
    old = _files_of_manifest(api, repo_id, head) if MANIFEST_NAME in there else set()
    stale = sorted((old & set(there)) - {file.name for file in manifest.files} - set(content))
    logger.warning(
        f"Uploading {len(new)} of {len(manifest.files)} files ({_megabytes(new)} of {_megabytes(manifest.files)}) to the "
        f"dataset repository {repo_id!r}. If this is interrupted, the same call resumes."
    )
    return api.create_commit(
        repo_id,
        repo_type=_REPO_TYPE,
        revision=revision,
        # If somebody else pushes in the meantime, the Hub refuses this commit instead of mixing both.
        parent_commit=head,
        commit_message=f"Datastore, generation {manifest.generation}",
        operations=[
            *(CommitOperationAdd(file.name, str(datastore.path / file.name)) for file in new),
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
            *(CommitOperationAdd(name, data) for name, data in content.items()),
        ],
    )


def local_folder(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    verify: bool = True,
    settings: str | None = None,
) -> Path:
    """The folder of a datastore: a local one as it is, or one from the Hub, downloaded to the client's cache.

    Only files that the manifest names are downloaded, all from one commit. If it is interrupted, the same call downloads
    what is missing; without a connection, earlier downloads are used.

    Args: those of [`RetroDatastore.from_pretrained`], and

        settings (`str`, *optional*): the name of a file that is downloaded, too, if it exists.
    Raises:
        DatastoreNotFoundError: if there is no such folder or repository, or it holds no datastore.
        DatastoreCorruptError: if the download is not what its manifest says.
    """
    path = checked_path(name_or_path)
    for name, value in (("token", token), ("revision", revision)):
        optional_text(name, value, DatastoreInputError)
    cache_dir = None if cache_dir is None else arguments.path("cache_dir", cache_dir, DatastoreInputError)
    verify = flag("verify", verify, DatastoreInputError)
    if os.path.exists(path) or os.path.exists(building_folder(path)):
        if revision is not None and path.is_dir():
            raise DatastoreInputError(
                f"'{name_or_path}' is a local folder, which has no revision {revision!r}. Leave `revision` out, or rename the folder "
                "to load the repository of that name."
            )
        return path
    repo_id = str(name_or_path)

    def download(names: list[str], commit: str | None) -> Path:
        options: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "allow_patterns": names}
        try:
            return Path(snapshot_download(repo_id, repo_type=_REPO_TYPE, revision=commit, **options))
        except (OSError, ValueError) as error:
            if "/" not in repo_id or is_path(repo_id):  # on the Hub, a datastore has an owner
                raise DatastoreNotFoundError(
                    f"There is no datastore at '{name_or_path}': the folder does not exist. Check the path, or build one with "
                    "`retro build`. On the Hub a datastore is named with its owner, such as 'org/name'."
                ) from error
            raise DatastoreNotFoundError(
                f"There is no folder '{name_or_path}', and no dataset repository of that name could be loaded from the Hub: {error} "
                "Check the name and the revision, and log in with `hf auth login` if it is private."
            ) from error

    small = [MANIFEST_NAME] if settings is None else [MANIFEST_NAME, settings]
    _check_remote_sizes(repo_id, revision, token, dict.fromkeys(small, MAX_JSON_BYTES))
    folder = download(small, revision)
    if not (folder / MANIFEST_NAME).is_file():
        raise DatastoreNotFoundError(
            f"The dataset repository {repo_id!r} holds no datastore at commit {folder.name}: it has no {MANIFEST_NAME}. Check the "
            "name and the revision."
        )
    manifest = DatastoreManifest.read(folder)
    _check_remote_sizes(repo_id, folder.name, token, {file.name: file.size for file in manifest.files})
    # A folder of the cache is named after its commit, so the files come from the same commit as the manifest.
    download([file.name for file in manifest.files], folder.name)
    if verify:
        check_content(
            folder,
            manifest.files,
            f"It was downloaded from {repo_id!r}, commit {folder.name}. Remove it with `hf cache rm {_REPO_TYPE}/{repo_id}` and load it "
            "again; if the repository itself is damaged, load an earlier commit with `revision`.",
        )
    return folder


def _check_remote_sizes(repo_id: str, revision: str | None, token: str | None, limits: dict[str, int]) -> None:
    """Check that files on the Hub are not larger than they may be, before they are downloaded.

    Without an answer of the Hub nothing is checked: then nothing is downloaded, or the download says what is wrong.
    """
    names = list(limits)
    for start in range(0, len(names), _PATHS_PER_CALL):
        try:
            found = HfApi(token=token).get_paths_info(
                repo_id, names[start : start + _PATHS_PER_CALL], repo_type=_REPO_TYPE, revision=revision
            )
        except (HTTPError, OSError, ValueError):
            return
        for file in found:
            if isinstance(file, RepoFile) and file.size > limits[file.path]:
                raise DatastoreCorruptError(
                    f"{file.path!r} in the dataset repository {repo_id!r} has {file.size:,} bytes, more than {limits[file.path]:,}. "
                    "Nothing of it was downloaded; load an earlier commit with `revision`."
                )


def _is_same(there: RepoFile | None, file: FileEntry) -> bool:
    return there is not None and there.lfs is not None and there.lfs.sha256 == file.sha256


def _files_of_manifest(api: HfApi, repo_id: str, commit: str) -> set[str]:
    """The files that the manifest in a repository names; none if it is not a manifest."""
    path = api.hf_hub_download(repo_id, MANIFEST_NAME, repo_type=_REPO_TYPE, revision=commit)
    try:
        return {str(file["name"]) for file in read_json_value(Path(path))["files"]}
    except (ValueError, KeyError, TypeError):
        return set()


def _megabytes(files: Iterable[FileEntry]) -> str:
    return f"{sum(file.size for file in files) / 1e6:,.2f} MB"


def _make_card(api: HfApi, repo_id: str, commit: str | None, manifest: DatastoreManifest) -> bytes | None:
    """The card, validated by the Hub; None, with a warning, if the existing card must stay or no card can be made.

    `commit` has a card already. Its text below the marker line is kept; a card without that line belongs to its owner.
    """
    try:
        own = "\n"
        if commit is not None:
            path = api.hf_hub_download(repo_id, _CARD_NAME, repo_type=_REPO_TYPE, revision=commit)
            _, line, own = Path(path).read_text(encoding="utf-8").partition(_OWN_TEXT)
            if not line:
                logger.warning(
                    f"The card of {repo_id!r} was written by hand and is kept. To get a generated one, remove {_CARD_NAME} from the "
                    "repository."
                )
                return None
        card = render_card(manifest, repo_id)
        card.validate(repo_type=_REPO_TYPE)
        return f"{str(card).rstrip()}\n\n{_OWN_TEXT}{own}".encode()
    except Exception as error:  # no failure of the card may stop the upload of the datastore
        logger.warning(f"The datastore is pushed to {repo_id!r} without a new card: {error}")
        return None


def render_card(manifest: DatastoreManifest, repo_id: str) -> DatasetCard:
    """Fill in the template of the card."""
    licenses = {source.get("license") for source in manifest.sources}
    agreed = licenses.pop() if len(licenses) == 1 else None
    data = DatasetCardData(
        license=agreed if isinstance(agreed, str) and _LICENSE_ID.fullmatch(agreed) else "other",
        pretty_name=repo_id.split("/")[-1],
        tags=["retro", "retrieval", "retro-hf"],
        configs=[{"config_name": "default", "data_files": "documents-*.parquet"}],
    )
    # A name on the Hub has an owner; of a local folder the manifest has only the last part.
    embedder = manifest.embedder
    on_hub = "/" in embedder["name"] or embedder["revision"] is not None
    return DatasetCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        manifest=_cells(dataclasses.asdict(manifest))
        | {name: getattr(manifest, name) for name in ("num_documents", "num_chunks", "num_tokens")},
        repo_id=repo_id,
        size=sum(file.size for file in manifest.files),
        sources=[{key: _cell(value) for key, value in source.items()} for source in manifest.sources[:_MAX_LISTED]],
        num_more_sources=max(0, len(manifest.sources) - _MAX_LISTED),
        indexes=[_index_row(shard.index) for shard in manifest.shards[:_MAX_LISTED]],
        num_more_shards=max(0, len(manifest.shards) - _MAX_LISTED),
        embedder_argument="" if on_hub else f", embedder={json.dumps(embedder['name'])}",
    )


def _index_row(index: dict[str, Any]) -> dict[str, str]:
    recall = index["recall"]
    measured = recall and "{value:.3f} of the {at} nearest, measured on {queries:,} queries".format(**recall)
    search = ", ".join(f"{name}={value}" for name, value in index["search"].items())
    return {"factory": _cell(index["factory"]), "search": search or "none", "recall": measured or "exact"}


def _cell(value: Any) -> str:
    """Text of somebody else that stays in its cell of a Markdown table, and is neither a tag nor a link."""
    text = html.escape(" ".join(printable(str(value)).split()), quote=False)
    return re.sub(r"([|\[\]\\])", r"\\\1", text).replace("`", "'")


def _cells(value: Any) -> Any:
    """The same for every text of a record."""
    if isinstance(value, dict):
        return {key: _cells(part) for key, part in value.items()}
    return _cell(value) if isinstance(value, str) else value
