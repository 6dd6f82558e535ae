"""What the tests of the datastore share: one tokenizer, one encoder, one built store, each read-only."""

from pathlib import Path

import pytest
import torch
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
