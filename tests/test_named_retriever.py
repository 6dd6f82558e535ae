"""`retriever="config"`: a model opens the datastore that its config names, as a stranger loads it from the Hub."""

import shutil

import pytest
from datastore.fixtures import make_encoder
from huggingface_hub import constants
from tiny import hash_retriever, tiny_retro
from tiny_training import make_world
from transformers import AutoModelForCausalLM, pipeline

from retro_hf import ChunkEmbedder, RetroDatastore, RetroForCausalLM


@pytest.fixture
def put(monkeypatch, tmp_path):
    """A function that puts a folder into the cache of the Hub's client, which is empty at first, under a name of the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(kind, name, folder):
        repository = tmp_path / "hub" / f"{kind}--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)

    return put


def test_model_and_pipeline_open_the_datastore_of_the_config(tmp_path, put, caplog):
    """By its name on the Hub, or by the folder that the caller names."""
    world = make_world(tmp_path)
    make_encoder(tmp_path / "encoder")
    model = tiny_retro(
        "llama", {"vocab_size": 400}, chunk_size=8, neighbor_size=16, retriever_name_or_path="org/store"
    )
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "model")
    world.tokenizer.save_pretrained(tmp_path / "model")
    put("models", "org/encoder", tmp_path / "encoder")
    texts = [{"id": str(number), "text": world.datastore.document(number)["text"]} for number in range(4)]
    RetroDatastore.from_texts(
        texts,
        world.tokenizer,
        embedder=ChunkEmbedder.from_pretrained("org/encoder"),
        path=tmp_path / "named",
        chunk_size=8,
        neighbor_size=16,
    )
    put("datasets", "org/store", tmp_path / "named")
    put("models", "org/model", tmp_path / "model")

    loaded = AutoModelForCausalLM.from_pretrained("org/model", retriever="config")
    assert loaded.retriever.datastore.num_documents == 4
    writer = pipeline("text-generation", model="org/model", model_kwargs={"retriever": "config"})
    assert writer.model.retriever.datastore.num_documents == 4
    text = "the king reads seven letters"
    (written,) = writer(text, max_new_tokens=12, do_sample=False)
    ids = writer.tokenizer(text, return_tensors="pt").input_ids
    expected = loaded.generate(ids, max_new_tokens=12, do_sample=False)
    assert written["generated_text"] == writer.tokenizer.decode(expected[0], skip_special_tokens=True)
    assert AutoModelForCausalLM.from_pretrained("org/model").retriever is None
    # Without it, the pipeline answers from the model alone, and tells once how to open the datastore.
    alone = pipeline("text-generation", model="org/model")
    for _ in range(2):
        alone(text, max_new_tokens=2, do_sample=False)
    (told,) = [record for record in caplog.records if "Generating without retrieval" in record.getMessage()]
    assert told.levelname == "WARNING" and "model_kwargs={'retriever': 'config'}" in told.getMessage()
    # The caller may name another, such as a local folder.
    named = {"retriever": "config", "retriever_name_or_path": str(tmp_path / "named")}
    own = pipeline("text-generation", model="org/model", model_kwargs=named)
    assert str(own.model.retriever.datastore.path) == str(tmp_path / "named")


def test_what_cannot_be_opened_is_explained(tmp_path):
    """A config without a name, and a name in the place of a retriever."""
    tiny_retro("llama").save_pretrained(tmp_path)
    for asked, word in (("config", "retriever_name_or_path="), ("org/store", "retriever='config'")):
        with pytest.raises(ValueError) as error:
            RetroForCausalLM.from_pretrained(tmp_path, retriever=asked)
        assert word in str(error.value)
    retriever = hash_retriever()
    assert RetroForCausalLM.from_pretrained(tmp_path, retriever=retriever).retriever is retriever
