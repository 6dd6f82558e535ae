"""Datastores on the Hub, against a small Hub on this machine that speaks the client's own protocol."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import running_hub
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from tiny import tiny_retro
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from retro_hf import RetroDatastore, RetroRetriever
from retro_hf.datastore import hub as hub_module
from retro_hf.datastore.hub import render_card
from retro_hf.datastore.manifest import DatastoreManifest
from retro_hf.errors import DatastoreCorruptError, DatastoreInputError, DatastoreNotFoundError
from retro_hf_cli.main import app


REPO = "me/store"


@pytest.fixture
def changing(built, tmp_path):
    """A copy of the built store that a test may change."""
    shutil.copytree(built, tmp_path / "store")
    return RetroDatastore.load(tmp_path / "store")


def content(folder) -> dict[str, bytes]:
    """All files but the card, which a push fetches to see what people wrote into it."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}


def uploads(hub) -> list[str]:
    return [line for line in hub.log if line.startswith("PUT ")]


def downloads(hub) -> list[str]:
    return [line.rsplit("/", 1)[1] for line in hub.log if line.startswith("GET ") and "/resolve/" in line]


def test_pushed_store_comes_back_byte_for_byte(hub, datastore):
    commit = datastore.push_to_hub(REPO)
    pulled = RetroDatastore.from_pretrained(REPO)
    assert pulled.path.name == commit.oid
    assert content(pulled.path) == content(datastore.path)
    assert pulled.manifest == datastore.manifest
    assert pulled.document(3) == datastore.document(3)


def test_push_command_writes_to_a_branch_of_a_private_repository(hub, built):
    arguments = ["push", str(built), REPO, "--private", "--revision", "trial"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    commit = result.stdout.split()[-1]
    assert result.stdout == f"{hub.url}/datasets/{REPO}, commit {commit}\n"
    assert content(RetroDatastore.from_pretrained(REPO, revision=commit).path) == content(built)
    assert hub.repositories[f"datasets/{REPO}"].private
    assert "datastore.json" not in hub.files(f"datasets/{REPO}")


def test_only_files_of_the_manifest_are_pushed_and_pulled(hub, changing):
    (changing.path / "private notes.txt").write_text("mine")
    changing.push_to_hub(REPO)
    named = {file.name for file in changing.manifest.files} | {"datastore.json"}
    assert set(hub.files(f"datasets/{REPO}")) == named | {".gitattributes", "README.md"}
    huggingface_hub.HfApi().upload_file(
        repo_id=REPO, repo_type="dataset", path_in_repo="large.bin", path_or_fileobj=b"x" * 5000
    )
    assert set(content(RetroDatastore.from_pretrained(REPO).path)) == named


def test_second_push_of_the_same_store_uploads_nothing(hub, datastore, caplog):
    first = datastore.push_to_hub(REPO)
    total, size = len(datastore.manifest.files), sum(file.size for file in datastore.manifest.files) / 1e6
    assert f"Uploading {total} of {total} files ({size:.2f} MB of {size:.2f} MB)" in caplog.text
    hub.log.clear()
    caplog.clear()
    assert datastore.push_to_hub(REPO).oid == first.oid
    assert not uploads(hub)
    # Only small files, whose sha256 the Hub does not tell, are offered again.
    small = [file for file in datastore.manifest.files if file.size <= 1024]
    assert f"Uploading {len(small)} of {total} files" in caplog.text


def test_commit_pins_its_generation(hub, changing, embedder):
    first = changing.push_to_hub(REPO).oid
    before = content(changing.path)
    changing.append([{"id": "new", "text": "a lighthouse over the harbor"}], embedder=embedder)
    changing.delete(["doc-1"])
    hub.log.clear()
    second = changing.push_to_hub(REPO).oid
    # What was there already is not uploaded again.
    assert len(uploads(hub)) <= sum(
        file.shard == "00001" or file.kind == "deleted" for file in changing.manifest.files
    )
    old, new = (RetroDatastore.from_pretrained(REPO, revision=revision) for revision in (first, None))
    assert content(old.path) == before and old.generation == 1
    assert new.path.name == second and new.generation == 3
    assert new.document_numbers(["new"])[0] == 40 and new.document_numbers(["doc-1"])[0] == -1


def test_files_of_the_old_generation_are_removed_in_the_same_commit(hub, changing):
    first = changing.push_to_hub(REPO).oid
    huggingface_hub.HfApi().upload_file(
        repo_id=REPO, repo_type="dataset", path_in_repo="tokens-notes.npy", path_or_fileobj=b"the owner's own file"
    )
    number_of_commits = len(hub.repositories[f"datasets/{REPO}"].commits)
    changing.delete(["doc-1"])
    changing.compact()
    changing.push_to_hub(REPO)
    assert len(hub.repositories[f"datasets/{REPO}"].commits) == number_of_commits + 1
    named = {file.name for file in changing.manifest.files}
    assert set(hub.files(f"datasets/{REPO}")) == named | {
        "datastore.json", "README.md", ".gitattributes", "tokens-notes.npy"
    }  # fmt: skip
    assert "tokens-00000.npy" in hub.files(f"datasets/{REPO}", first)


def test_push_to_a_branch_does_not_change_main(hub, changing):
    changing.push_to_hub(REPO)
    changing.delete(["doc-1"])
    changing.push_to_hub(REPO, revision="trial")
    changing.push_to_hub(REPO, revision="trial")
    assert RetroDatastore.from_pretrained(REPO).generation == 1
    assert RetroDatastore.from_pretrained(REPO, revision="trial").generation == 2


@pytest.mark.parametrize("num_requests", [2, 5, 9])
def test_interrupted_push_changes_nothing_and_resumes(hub, datastore, num_requests):
    hub.fail_after = num_requests
    with pytest.raises(DatastoreInputError):
        datastore.push_to_hub(REPO)
    assert set(hub.files(f"datasets/{REPO}")) == {".gitattributes"}
    hub.fail_after = None
    done = len(hub.objects) - 1
    hub.log.clear()
    datastore.push_to_hub(REPO)
    lfs = {name for name, data in hub.objects.items() if len(data) > 1024}
    assert len(uploads(hub)) == len(lfs) - done
    assert content(RetroDatastore.from_pretrained(REPO).path) == content(datastore.path)


@pytest.mark.parametrize("num_requests", [3, 12])
def test_interrupted_download_resumes(hub, datastore, num_requests):
    datastore.push_to_hub(REPO)
    hub.log.clear()
    hub.fail_after = num_requests
    with pytest.raises((OSError, HTTPError)):
        RetroDatastore.from_pretrained(REPO)
    hub.fail_after = None
    arrived = {file.name for file in Path(constants.HF_HUB_CACHE).glob("*/snapshots/*/*")}
    hub.log.clear()
    pulled = RetroDatastore.from_pretrained(REPO)
    assert content(pulled.path) == content(datastore.path)
    assert not arrived & set(downloads(hub))
    hub.log.clear()
    RetroDatastore.from_pretrained(REPO, revision=pulled.path.name)
    assert not downloads(hub)


def test_interrupted_file_resumes_within_the_file(hub, datastore, monkeypatch):
    datastore.push_to_hub(REPO)
    hub.break_off = "keys-00000.safetensors"
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    assert content(RetroDatastore.from_pretrained(REPO).path) == content(datastore.path)
    assert "RANGE keys-00000.safetensors" in hub.log


@pytest.mark.parametrize("change", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-1]])
def test_file_damaged_on_the_server_is_refused(hub, datastore, change):
    datastore.push_to_hub(REPO)
    name = next(file.sha256 for file in datastore.manifest.files if file.kind == "keys")
    hub.objects[name] = change(hub.objects[name])
    with pytest.raises(DatastoreCorruptError):
        RetroDatastore.from_pretrained(REPO)


def test_damaged_store_is_not_pushed(hub, changing):
    path = changing.path / "documents-00000.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DatastoreCorruptError):
        changing.push_to_hub(REPO)
    assert not hub.repositories


def test_concurrent_push_is_not_overwritten(hub, changing, monkeypatch):
    changing.push_to_hub(REPO)
    changing.delete(["doc-1"])
    create = huggingface_hub.HfApi.create_commit

    def too_late(api, repo_id, **options):
        repository = hub.repositories[f"datasets/{REPO}"]
        repository.commit("main", dict(repository.commits[repository.branches["main"]]))
        return create(api, repo_id, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", too_late)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError):
        changing.push_to_hub(REPO)
    assert json.loads(hub.files(f"datasets/{REPO}")["datastore.json"])["generation"] == 1


def test_push_of_a_store_that_is_compacted_meanwhile_pushes_the_next_generation(hub, changing, monkeypatch):
    real, raced = hub_module._make_card, []

    def compacting(*arguments):
        if not raced:
            raced.append(1)
            other = RetroDatastore.load(changing.path)
            other.delete([other.document(0)["id"]])
            other.compact()
        return real(*arguments)

    monkeypatch.setattr(hub_module, "_make_card", compacting)
    before = changing.num_documents
    changing.push_to_hub("me/raced")
    pulled = RetroDatastore.from_pretrained("me/raced")
    assert pulled.num_documents == changing.num_documents == before - 1
    assert pulled.manifest == changing.manifest


def test_push_during_a_download_does_not_mix_generations(hub, changing, monkeypatch):
    changing.push_to_hub(REPO)
    before = content(changing.path)
    read = DatastoreManifest.read

    def read_then_push(folder):
        manifest = read(folder)
        monkeypatch.setattr(DatastoreManifest, "read", read)
        changing.delete(["doc-1"])
        changing.compact()
        changing.push_to_hub(REPO)
        return manifest

    monkeypatch.setattr(DatastoreManifest, "read", read_then_push)
    assert content(RetroDatastore.from_pretrained(REPO).path) == before
    assert RetroDatastore.from_pretrained(REPO).generation == 3


def test_missing_repository_revision_or_datastore_is_reported(hub, datastore):
    with pytest.raises(DatastoreNotFoundError):
        RetroDatastore.from_pretrained("me/nothing")
    datastore.push_to_hub(REPO)
    with pytest.raises(DatastoreNotFoundError):
        RetroDatastore.from_pretrained(REPO, revision="nonsense")
    huggingface_hub.HfApi().create_repo("me/empty", repo_type="dataset")
    with pytest.raises(DatastoreNotFoundError):
        RetroDatastore.from_pretrained("me/empty")
    with pytest.raises(DatastoreInputError):
        RetroDatastore.from_pretrained(datastore.path, revision="main")


def test_push_that_cannot_start_is_reported(hub, datastore, monkeypatch):
    with pytest.raises(DatastoreInputError):
        datastore.push_to_hub("a/b/c")
    hub.fail_after = 0
    with pytest.raises(DatastoreInputError):
        datastore.push_to_hub(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DatastoreInputError):
        datastore.push_to_hub(REPO)


def test_private_repository_needs_a_token(hub, datastore, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DatastoreInputError):
        datastore.push_to_hub(REPO)
    datastore.push_to_hub(REPO, private=True, token="hf_mine")
    with pytest.raises(DatastoreNotFoundError):
        RetroDatastore.from_pretrained(REPO)
    assert RetroDatastore.from_pretrained(REPO, token="hf_mine").num_documents == 40


def test_downloaded_store_opens_offline_and_is_read_only(hub, datastore, monkeypatch, tmp_path):
    datastore.push_to_hub(REPO)
    RetroDatastore.from_pretrained(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pulled = RetroDatastore.from_pretrained(REPO)
    with pytest.raises(DatastoreInputError):
        pulled.delete(["doc-1"])
    assert content(pulled.path) == content(datastore.path)
    pulled.save(tmp_path / "copy")
    copy = RetroDatastore.load(tmp_path / "copy")
    copy.delete(["doc-1"])
    assert copy.num_deleted_documents == 1


def test_settings_of_a_retriever_are_pushed(hub, datastore, embedder):
    retriever = RetroRetriever(datastore, embedder=embedder, num_neighbors=5)
    commit = retriever.push_to_hub(REPO)
    again = RetroRetriever.from_pretrained(REPO, embedder=embedder, revision=commit.oid)
    assert again.num_neighbors == 5 and again.datastore.generation == 1
    datastore.push_to_hub("me/other")
    assert RetroRetriever.from_pretrained("me/other", embedder=embedder).num_neighbors == 2


def test_card_describes_the_store(hub, changing):
    changing.delete(["doc-1"])
    changing.push_to_hub(REPO)
    text = hub.files(f"datasets/{REPO}")["README.md"].decode()
    data = huggingface_hub.DatasetCard(text).data
    assert data.tags == ["retro", "retrieval", "retro-hf"] and data.license == "other"
    assert data.configs == [{"config_name": "default", "data_files": "documents-*.parquet"}]
    manifest = changing.manifest
    for words in (
        "| documents | 40, of which 1 deleted |",
        f"| chunks | {manifest.num_chunks} of 8 tokens; neighbors of 20 |",
        "| `Flat` | none | exact |",
        "| generation | 2 |",
        "Not recorded: the documents were given as texts.",
        "super_squash_history",
    ):
        assert words in text
    assert "{{" not in text and "\n\n\n" not in text


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (["cc-by-4.0", "cc-by-4.0"], "cc-by-4.0"),
        (["cc-by-4.0", "mit"], "other"),
        (["cc-by-4.0", None], "other"),
        (["Public | domain\nas I think"], "other"),
        ([], "other"),
    ],
)
def test_card_has_the_license_of_all_sources(datastore, licenses, expected):
    sources = [{"name": f"source {n}"} | ({"license": value} if value else {}) for n, value in enumerate(licenses)]
    index = {"factory": "IVF64,Flat", "search": {"nprobe": 8}, "recall": {"at": 2, "value": 0.9712, "queries": 100}}
    shards = tuple(dataclasses.replace(shard, index=index) for shard in datastore.manifest.shards)
    card = render_card(dataclasses.replace(datastore.manifest, sources=sources, shards=shards), REPO)
    assert card.data.license == expected
    assert "| `IVF64,Flat` | nprobe=8 | 0.971 of the 2 nearest, measured on 100 queries |" in card.text
    assert len(re.findall(r"(?m)^\| source \d \| not recorded \| .+ \|$", card.text)) == len(licenses)


def test_failing_card_is_a_warning_and_does_not_stop_the_upload(hub, datastore, caplog):
    hub.invalid_cards = True
    datastore.push_to_hub(REPO)
    assert "without a new card" in caplog.text and "no cards today" in caplog.text
    assert RetroDatastore.from_pretrained(REPO).num_documents == 40
    assert "README.md" not in hub.files(f"datasets/{REPO}")


def test_text_written_into_the_card_is_kept(hub, changing, caplog):
    api = huggingface_hub.HfApi()
    changing.push_to_hub(REPO)
    card = hub.files(f"datasets/{REPO}")["README.md"] + b"\n## Thanks\nto the sailors\n"
    for text, kept in ((card, b"to the sailors"), (b"# all my own\n", b"# all my own")):
        api.upload_file(repo_id=REPO, repo_type="dataset", path_in_repo="README.md", path_or_fileobj=text)
        changing.delete(["doc-1" if text == card else "doc-2"])
        changing.push_to_hub(REPO)
        assert kept in hub.files(f"datasets/{REPO}")["README.md"]
        assert (b"| generation | 2 |" in hub.files(f"datasets/{REPO}")["README.md"]) == (text == card)
    assert "written by hand" in caplog.text


def test_model_and_datastore_load_by_two_names(hub, datastore, embedder, tokenizer, tmp_path):
    model = tiny_retro(text_config={"vocab_size": len(tokenizer)}, chunk_size=8)
    model.push_to_hub("me/model")
    RetroRetriever(datastore, embedder=embedder).push_to_hub(REPO)
    again = AutoModelForCausalLM.from_pretrained("me/model", cache_dir=tmp_path / "models")
    retriever = RetroRetriever.from_pretrained(REPO, embedder=embedder, tokenizer=tokenizer)
    inputs = tokenizer("the king builds a bridge over the golden river today", return_tensors="pt").input_ids
    expected = model.generate(inputs, retriever=retriever, max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(inputs, retriever=retriever, max_new_tokens=4, do_sample=False), expected)


STORY = """
    import os, re
    from pathlib import Path
    from huggingface_hub import hf_hub_download
    from retro_hf import RetroDatastore

    local = RetroDatastore.load(os.environ["STORE"])
    local.push_to_hub("me/story")
    card = Path(hf_hub_download("me/story", "README.md", repo_type="dataset")).read_text()
    blocks = re.findall(r"```python\\n(.*?)```", card, re.DOTALL)
    for block in blocks:
        exec(block.replace("<id>", "doc-1"))
    assert RetroDatastore.from_pretrained("me/story").document_numbers(["doc-1", "doc-2"]).tolist() == [-1, 1]
    print(len(blocks), "blocks")
"""


def test_code_of_the_card_runs_in_a_fresh_process(built, encoder_folder, tmp_path):
    """A fresh process, HF_HOME and folder; the only settings are the client's own environment variables."""
    (tmp_path / encoder_folder.name).symlink_to(encoder_folder)
    with running_hub() as server:
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        environment |= {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_test",
            "STORE": str(built),
        }
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(STORY)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert f"40 {RetroDatastore.load(built).num_chunks}\n" in result.stdout and "3 blocks" in result.stdout
        # After the last block no commit but the newest is left.
        (tree,) = server.repositories["datasets/me/story"].commits.values()
        assert "tokens-00000.npy" not in tree and "tokens-00001.npy" in tree
