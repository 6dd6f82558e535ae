"""Datastores on the Hub: a dataset repository that one commit takes from generation to generation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from transformers.utils import logging

from ..errors import DatastoreInputError, DatastoreNotFoundError
from .card import CARD_NAME, make_card
from .manifest import MANIFEST_NAME, DatastoreManifest, FileEntry, checked_path
from .storage import building_folder
from .view import verify_files


if TYPE_CHECKING:
    from .store import RetroDatastore

__all__ = ["local_folder", "push"]

logger = logging.get_logger(__name__)

_REPO_TYPE = "dataset"


def push(
    datastore: RetroDatastore,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    settings: dict[str, bytes] | None = None,
) -> CommitInfo:
    """Upload a datastore to a dataset repository, with a card, as one commit.

    Only files that the manifest names are uploaded, and of these only what the repository does not have; those that its
    old manifest named and the new one doesn't are removed. A reader sees the old generation or the new. Interrupted,
    the same call goes on with the files that are missing.

    Args:
        datastore ([`RetroDatastore`]): the store; verified first, so that no damage is passed on.
        repo_id (`str`): `"name"` or `"organization/name"`; made if it isn't there.
        private (`bool`, *optional*): whether a new repository is private.
        token (`str`, *optional*): for the Hub; by default the one that `hf auth login` saved.
        revision (`str`, *optional*): branch to push to; made if it isn't there.
        commit_message (`str`, *optional*): by default it says which generation this is.
        settings (`dict[str, bytes]`, *optional*): small files to put beside the datastore, by name.
    Returns:
        [`~huggingface_hub.CommitInfo`]: its `oid` is the `revision` that pins what was pushed.
    Raises:
        DatastoreCorruptError: if the folder is damaged; nothing has been uploaded.
        DatastoreInputError: if the token may not write there, or there is none; if the Hub cannot be reached, or the connection
            is lost; or if `repo_id` is no name of a repository.
    """
    datastore.refresh()
    datastore.verify()
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, repo_type=_REPO_TYPE, private=private, exist_ok=True).repo_id
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise DatastoreInputError(
            f"The Hub does not let you write to the dataset repository {repo_id!r}. Log in with `hf auth login`, with a token "
            f"that may write there. It says: {error}"
        ) from error
    except HFValidationError as error:
        raise DatastoreInputError(
            f"{repo_id!r} is no name of a repository: {error} Name one such as 'organization/name'."
        ) from error
    # `HTTPError` is what the HTTP library of the client raises where there is no answer at all.
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise DatastoreInputError(
            f"The Hub could not be reached to push to {repo_id!r}: {error} Nothing was uploaded. Make the same call again with a "
            "connection, and without HF_HUB_OFFLINE=1."
        ) from error
    try:
        return _commit(api, repo_id, datastore, revision, commit_message, settings or {})
    except (HTTPError, RuntimeError) as error:
        # What the Hub answers speaks for itself; the client wraps what stops the upload of a file.
        if isinstance(error, HfHubHTTPError) or isinstance(error.__cause__, HfHubHTTPError):
            raise
        raise DatastoreInputError(
            f"The push to {repo_id!r} broke off: {error.__cause__ or error} The files that have arrived are kept there, and "
            "readers see what was there before until the commit, which is the last step. With a connection, the same call "
            "again goes on with the files that are missing."
        ) from error


def _commit(
    api: HfApi,
    repo_id: str,
    datastore: RetroDatastore,
    revision: str | None,
    commit_message: str | None,
    settings: dict[str, bytes],
) -> CommitInfo:
    """Upload what a repository lacks of a datastore, and commit it. See [`push`] for the arguments."""
    manifest = datastore.manifest
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, repo_type=_REPO_TYPE, branch=revision, exist_ok=True)
    head = str(api.repo_info(repo_id, repo_type=_REPO_TYPE, revision=revision).sha)
    tree = api.list_repo_tree(repo_id, repo_type=_REPO_TYPE, revision=head)
    there = {file.path: file for file in tree if isinstance(file, RepoFile)}
    new = [file for file in manifest.files if not _is_same(there.get(file.name), file)]
    content = {MANIFEST_NAME: manifest.to_bytes(), **settings}
    # The card is made and checked here, so that nothing about it can stop the commit.
    card = make_card(api, repo_id, head if CARD_NAME in there else None, manifest)
    if card is not None:
        content[CARD_NAME] = card
    old = _files_of_manifest(api, repo_id, head) if MANIFEST_NAME in there else set()
    stale = sorted((old & set(there)) - {file.name for file in manifest.files} - set(content))
    logger.warning(
        f"Uploading {len(new)} of {len(manifest.files)} files ({_megabytes(new)} of {_megabytes(manifest.files)}) to the "
        f"dataset repository {repo_id!r}. If this is interrupted, the same call again goes on."
    )
    return api.create_commit(
        repo_id,
        repo_type=_REPO_TYPE,
        revision=revision,
        # Another push in the meantime is refused instead of mixed with this one.
        parent_commit=head,
        commit_message=commit_message or f"Datastore, generation {manifest.generation}",
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
    """The folder of a datastore: a local one as it is, one on the Hub downloaded to the client's cache.

    Only what the manifest names is downloaded, all of one commit. Interrupted, the same call goes on with the files that
    are missing; without a connection, what was downloaded before is used.

    Args:
        name_or_path (`str` or `Path`): a folder, or a dataset repository.
        revision (`str`, *optional*): branch, tag or commit; a commit pins the content.
        cache_dir (`str` or `Path`, *optional*): instead of the client's own, `$HF_HOME/hub`.
        token (`str`, *optional*): for the Hub; by default the one that `hf auth login` saved.
        verify (`bool`, defaults to `True`): compare the sha256 of every file of a download with the manifest.
        settings (`str`, *optional*): the name of a file that is downloaded too, if it is there.
    Raises:
        DatastoreNotFoundError: if there is no such folder or repository, or it holds no datastore.
        DatastoreCorruptError: if what was downloaded is not what its manifest says.
    """
    path = checked_path(name_or_path)
    if path.exists() or building_folder(path).exists():
        if revision is not None and path.is_dir():
            raise DatastoreInputError(
                f"'{name_or_path}' is a local folder, which has no revision {revision!r}. Leave `revision` out, or move "
                "the folder out of the way to load the repository of that name."
            )
        return path
    repo_id = str(name_or_path)

    def download(names: list[str], commit: str | None) -> Path:
        try:
            return Path(
                snapshot_download(
                    repo_id,
                    repo_type=_REPO_TYPE,
                    revision=commit,
                    cache_dir=cache_dir,
                    token=token,
                    allow_patterns=names,
                )
            )
        except (OSError, ValueError) as error:
            raise DatastoreNotFoundError(
                f"There is no folder '{name_or_path}', and no dataset repository of that name could be loaded from the "
                f"Hub: {error} Check the name and the revision, log in with `hf auth login` if it is private, or build "
                "the datastore first."
            ) from error

    names = [MANIFEST_NAME] if settings is None else [MANIFEST_NAME, settings]
    folder = download(names, revision)
    if not (folder / MANIFEST_NAME).is_file():
        raise DatastoreNotFoundError(
            f"The dataset repository {repo_id!r} holds no datastore at commit {folder.name}: it has no {MANIFEST_NAME}. "
            "Check the name and the revision, or put one there with `RetroDatastore.push_to_hub`."
        )
    manifest = DatastoreManifest.read(folder)
    # A folder of the cache is named after its commit: the files come from the commit that the manifest came from.
    download([file.name for file in manifest.files], folder.name)
    if verify:
        verify_files(
            folder,
            manifest,
            f"It was downloaded from {repo_id!r}, commit {folder.name}. Remove the download with `hf cache rm "
            f"{_REPO_TYPE}/{repo_id}` and load it again. If it comes back like this, the repository itself is damaged: "
            "load an earlier commit with `revision`, or ask for it to be pushed again.",
        )
    return folder


def _is_same(there: RepoFile | None, file: FileEntry) -> bool:
    return there is not None and there.lfs is not None and there.lfs.sha256 == file.sha256


def _files_of_manifest(api: HfApi, repo_id: str, commit: str) -> set[str]:
    """What the manifest in the repository names; nothing if it is not one."""
    path = api.hf_hub_download(repo_id, MANIFEST_NAME, repo_type=_REPO_TYPE, revision=commit)
    try:
        return {str(file["name"]) for file in json.loads(Path(path).read_bytes())["files"]}
    except (ValueError, KeyError, TypeError):
        return set()


def _megabytes(files: Iterable[FileEntry]) -> str:
    return f"{sum(file.size for file in files) / 1e6:,.2f} MB"
