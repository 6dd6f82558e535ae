"""What the tests of the datastore share: one tokenizer, one encoder, one built store, each read-only."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import running_hub
from huggingface_hub import constants
from transformers import PreTrainedTokenizerFast

from retro_hf.datastore import ChunkEmbedder, RetroDatastore

from .fixtures import corpus, make_encoder, make_tokenizer, one_thread


__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def embedder(encoder_folder: Path) -> ChunkEmbedder:
    return ChunkEmbedder.from_pretrained(encoder_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, tokenizer, embedder) -> Path:
    """The folder of a store of 40 documents, chunks of 8 tokens and neighbors of 20; tests must not change it."""
    path = tmp_path_factory.mktemp("built") / "store"
    RetroDatastore.build(corpus(), path, tokenizer=tokenizer, embedder=embedder, chunk_size=8, neighbor_size=20)
    return path


@pytest.fixture
def datastore(built: Path) -> RetroDatastore:
    return RetroDatastore.load(built)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running Hub, which the client of this process talks to, with a cache of its own."""
    with running_hub() as server:
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        # Transformers keeps one client, which another test may have made for the real Hub.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's pauses before it tries again
        yield server
        huggingface_hub.close_session()
