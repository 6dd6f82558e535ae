"""`retriever="config"`: a model opens the datastore that its config names, as a stranger loads it from the Hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from datastore.fixtures import make_encoder
from tiny import hash_retriever, tiny_retro
from tiny_training import make_world

from retro_hf import RetroForCausalLM


# Makes the store with an encoder of the Hub's cache, then puts the store and the model there, too.
PROGRAM = """
import os, shutil, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, pipeline
from retro_hf import ChunkEmbedder, RetroDatastore, RetroRetriever

hub, work = Path(os.environ["HF_HOME"], "hub"), Path(sys.argv[1])
def put(kind, name, folder):
    repository = hub / f"{kind}--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)

put("models", "org/encoder", work / "encoder")
store = RetroDatastore.load(work / "store")
again = RetroDatastore.from_texts(
    [dict(id=str(n), text=store.document(n)["text"]) for n in range(4)], work / "model",
    embedder=ChunkEmbedder.from_pretrained("org/encoder"), path=work / "named", chunk_size=8, neighbor_size=16)
put("datasets", "org/store", work / "named")
put("models", "org/model", work / "model")

loaded = AutoModelForCausalLM.from_pretrained("org/model", retriever="config")
assert loaded.retriever.datastore.num_documents == 4, loaded.retriever
writer = pipeline("text-generation", model="org/model", model_kwargs={"retriever": "config"})
assert writer.model.retriever.datastore.num_documents == 4
text = "the king reads seven letters"
(written,) = writer(text, max_new_tokens=12, do_sample=False)
ids = writer.tokenizer(text, return_tensors="pt").input_ids
expected = loaded.generate(ids, max_new_tokens=12, do_sample=False)
assert written["generated_text"] == writer.tokenizer.decode(expected[0], skip_special_tokens=True), written
plain = AutoModelForCausalLM.from_pretrained("org/model")
assert plain.retriever is None
# The caller may name another, such as a local folder; the config of the saved model is as it was.
own = pipeline("text-generation", model="org/model",
               model_kwargs={"retriever": "config", "retriever_name_or_path": str(work / "named")})
assert str(own.model.retriever.datastore.path) == str(work / "named")
print("ok")
"""


def test_model_and_pipeline_open_the_datastore_of_the_config(tmp_path):
    """By its name on the Hub, or by the folder that the caller names."""
    world = make_world(tmp_path)
    make_encoder(tmp_path / "encoder")
    model = tiny_retro(
        "llama", {"vocab_size": 400}, chunk_size=8, neighbor_size=16, retriever_name_or_path="org/store"
    )
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "model")
    world.tokenizer.save_pretrained(tmp_path / "model")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(tmp_path))
    assert ran.stdout.splitlines()[-1:] == ["ok"], ran.stderr[-3000:]


def test_what_cannot_be_opened_is_explained(tmp_path):
    """A config without a name, and a name in the place of a retriever."""
    tiny_retro("llama").save_pretrained(tmp_path)
    for asked, word in (("config", "retriever_name_or_path="), ("org/store", "retriever='config'")):
        with pytest.raises(ValueError) as error:
            RetroForCausalLM.from_pretrained(tmp_path, retriever=asked)
        assert word in str(error.value)
    retriever = hash_retriever()
    assert RetroForCausalLM.from_pretrained(tmp_path, retriever=retriever).retriever is retriever
