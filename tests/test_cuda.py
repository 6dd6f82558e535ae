"""On a GPU: the numbers of the CPU, off is the base bit for bit, cached is full, and everything that takes a device works.

    pytest -m gpu          # in an environment whose PyTorch is one for CUDA, with `pip install -e ".[test]"`

The default run leaves these out, since most machines have no GPU; asked for without one, they fail.
"""

import numpy as np
import pytest
import torch
from datastore.fixtures import corpus
from tiny import hash_retriever, neighbors_from, random_ids, random_neighbors, tiny_backbone, tiny_retro
from tiny_questions import tokenized
from tiny_training import make_model, make_trainer, make_world
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM
from transformers.cache_utils import StaticCache

from retro_hf import RetroRetriever, retrofit
from retro_hf.datastore import ChunkEmbedder, RetroDatastore
from retro_hf.evaluation import answer_questions, bits_per_byte, evaluate, trace
from retro_hf.model.attention_retro import GPU_CAUSAL_BLOCK
from retro_hf.model.compatibility_retro import CHECKPOINTING
from retro_hf.training import RetroDataCollator


pytestmark = pytest.mark.gpu

DEVICE = "cuda"
FAMILIES = ["retro_decoder", "llama", "gpt2", "gpt_neox", "gemma3"]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _a_gpu_in_full_precision():
    """TF32 would round what is compared with the CPU."""
    if not torch.cuda.is_available():
        pytest.fail("These tests need a CUDA GPU, and torch.cuda.is_available() is False.")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def on_gpu(tensors: dict) -> dict:
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def both(family: str = "llama", **config):
    """The same model on the CPU and on the GPU."""
    return tiny_retro(family, scale=0.3, **config), tiny_retro(family, scale=0.3, **config).to(DEVICE)


def left_padded(lengths: list[int]) -> dict:
    width = max(lengths)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return {"input_ids": random_ids(len(lengths), width).masked_fill(mask == 0, 1), "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_cpu(family):
    host, device = both(family)
    batch = {"input_ids": random_ids(2, 18), "labels": random_ids(2, 18), **random_neighbors(2, 4, ragged=True)}
    expected, found = host(**batch), device(**on_gpu(batch))
    torch.testing.assert_close(found.logits.cpu(), expected.logits, atol=1e-4, rtol=1e-4)
    expected.loss.backward()
    found.loss.backward()
    for (name, one), (_, other) in zip(host.named_parameters(), device.named_parameters(), strict=True):
        torch.testing.assert_close(
            other.grad.cpu(), one.grad, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_blocks_of_queries_are_those_of_the_cpu():
    """The paper's decoder attends in blocks, larger ones on a GPU: three here, and seventeen on the CPU."""
    length = 2 * GPU_CAUSAL_BLOCK + 9
    host, device = both("retro_decoder", text_config={"max_position_embeddings": length})
    batch = {"input_ids": random_ids(1, length), "labels": random_ids(1, length), **random_neighbors(1, length // 4)}
    expected, found = host(**batch), device(**on_gpu(batch))
    torch.testing.assert_close(found.logits.cpu(), expected.logits, atol=1e-4, rtol=1e-4)
    expected.loss.backward()
    found.loss.backward()
    for one, other in zip(host.parameters(), device.parameters(), strict=True):
        torch.testing.assert_close(other.grad.cpu(), one.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_off_is_the_base_bit_for_bit(family, dtype):
    base = tiny_backbone(family).to(DEVICE, dtype)
    ids = random_ids(3, 17).to(DEVICE)
    with torch.no_grad():
        expected = base(ids).logits
        model = retrofit(base, encoder={"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8}, chunk_size=4)
        assert model.device.type == DEVICE and next(model.model.retro.parameters()).device.type == DEVICE
        assert torch.equal(model(ids).logits, expected)
        neighbors = on_gpu(random_neighbors(3, 4, ragged=True))
        assert torch.equal(model(ids, **neighbors).logits, expected)  # untrained: reads, adds nothing


@pytest.mark.parametrize("length", [3, 4, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_is_a_full_pass_per_token(family, length):
    _, model = both(family)
    ids = random_ids(2, length).to(DEVICE)
    generated = model.generate(ids, retriever=hash_retriever(), max_new_tokens=10, **GREEDY)
    for _ in range(10):
        with torch.no_grad():
            logits = model(ids, use_cache=False, **neighbors_from(hash_retriever(), ids)).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, ids)


def test_generation_is_that_of_the_cpu():
    """A ragged batch, greedily, with beams, with a static cache, and from a cache that grew on the GPU."""
    host, device = both()
    inputs = left_padded([3, 9, 6])
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        here, there = inputs, on_gpu(inputs)
        if "prompt_lookup_num_tokens" in options:  # transformers: one row
            here, there = {"input_ids": inputs["input_ids"][1:2]}, {"input_ids": there["input_ids"][1:2]}
        options = {"retriever": hash_retriever(), "max_new_tokens": 10, **GREEDY, **options}
        assert torch.equal(device.generate(**there, **options).cpu(), host.generate(**here, **options)), options
    cache = StaticCache(config=device.config.text_config, max_cache_len=32)
    whole = random_ids(2, 14).to(DEVICE)
    with torch.no_grad():
        pieces = [
            device(piece, past_key_values=cache, use_cache=True, retriever=hash_retriever()).logits
            for piece in whole.split([5, 1, 8], dim=1)
        ]
        full = device(whole, use_cache=False, **neighbors_from(hash_retriever(), whole)).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["retro_decoder", "llama"])
def test_steps_of_a_static_cache_are_one_cuda_graph(family):
    """Compiled without being asked, from border to border, also in the next call; the tokens are those of eager steps."""
    _, model = both(family)
    options = {"retriever": hash_retriever(), "max_new_tokens": 14, "cache_implementation": "static", **GREEDY}
    inputs = on_gpu(left_padded([3, 9, 6]))
    for offset in (None, torch.tensor([3, 1, 0])):
        expected = model.generate(**inputs, chunk_offset=offset, disable_compile=True, **options)
        torch.compiler.reset()
        counters.clear()
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, chunk_offset=offset, **options), expected)
        assert counters["stats"]["unique_graphs"] == 1
        assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    """Logits of half precision within what rounding explains; sampling gives tokens."""
    host, device = both()
    device = device.to(dtype)
    batch = {"input_ids": random_ids(2, 18), **random_neighbors(2, 4, ragged=True)}
    with torch.no_grad():
        expected, found = host(**batch).logits, device(**on_gpu(batch)).logits
    assert found.dtype == dtype
    assert (found.float().cpu() - expected).norm() < 0.05 * expected.norm()
    sampled = device.generate(
        **on_gpu(left_padded([3, 9])), retriever=hash_retriever(), max_new_tokens=9, pad_token_id=0
    )
    assert sampled.is_cuda and sampled.max() < host.config.vocab_size


def test_retriever_of_a_datastore(world):
    """Ids come from the GPU, the search runs on the host, neighbors go back."""
    host, device = make_model(scale=0.3), make_model(scale=0.3).to(DEVICE)
    inputs = world.tokenizer([row["text"] for row in corpus(2, seed=3)], return_tensors="pt", padding=True)
    inputs = {"input_ids": inputs["input_ids"][:, :20]}
    options = {"retriever": world.retriever, "max_new_tokens": 12, "return_dict_in_generate": True, **GREEDY}
    expected, found = host.generate(**inputs, **options), device.generate(**on_gpu(inputs), **options)
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    assert [len(row) for row in found.retrieval_trace] == [len(row) for row in expected.retrieval_trace]
    assert found.retrieval_trace[0][0]["neighbors"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"fp16": True}, {CHECKPOINTING: True}, {"torch_compile": True, "bf16": True}],
    ids=str,
)
def test_trainer(world, tmp_path, settings):
    """The losses of the CPU; evaluation, saving and loading again included."""
    precise = not settings or CHECKPOINTING in settings
    found = {}
    for use_cpu in (True, False):
        own = {} if use_cpu else {"dataloader_pin_memory": True, **settings}
        trainer, losses = make_trainer(make_model(), world, tmp_path / str(use_cpu), use_cpu=use_cpu, **own)
        trainer.train()
        found[use_cpu] = [*losses.values.values(), trainer.evaluate()["eval_loss"]]
    assert next(trainer.model.parameters()).is_cuda
    assert found[False] == pytest.approx(found[True], abs=1e-3 if precise else 5e-2)
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=DEVICE)
    for (name, one), (_, other) in zip(
        loaded.named_parameters(), trainer.accelerator.unwrap_model(trainer.model).named_parameters(), strict=True
    ):
        assert one.is_cuda and torch.equal(one, other), name


def test_live_retrieval_in_training(world, tmp_path):
    """The collator looks neighbors up on the host while the GPU trains."""
    collator = RetroDataCollator(world.tokenizer, world.retriever)
    trainer, losses = make_trainer(make_model(), world, tmp_path, collator, use_cpu=False)
    trainer.train()
    assert losses.values[6] < losses.values[1]


def test_a_base_that_accelerate_places(tmp_path):
    """A part on the GPU, a part on the host, and all of it by `device_map="auto"`: the logits of the base in memory."""
    tiny_backbone("llama").save_pretrained(tmp_path / "base")
    settings = {"encoder": {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8}, "chunk_size": 4}
    expected = retrofit(tmp_path / "base", **settings)
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
    split = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.layers.2": "cpu"}
    split |= {"model.layers.3": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for place in ("auto", {"": 0}, split):
        model = retrofit(tmp_path / "base", base_kwargs={"device_map": place}, **settings)
        with torch.no_grad():
            found = model(ids.to(DEVICE), **on_gpu(neighbors)).logits.cpu()
            torch.testing.assert_close(found, expected(ids, **neighbors).logits, atol=1e-4, rtol=1e-4)
        options = {"max_new_tokens": 6, "retriever": hash_retriever(), **GREEDY}
        assert torch.equal(model.generate(ids.to(DEVICE), **options).cpu(), expected.generate(ids, **options)), place


def test_embedder(world, tmp_path):
    """On the GPU by default, in bfloat16 where it has it; the same neighbors as from the CPU."""
    folder = world.embedder.name_or_path
    texts = [row["text"] for row in corpus(20, seed=2)]
    device = ChunkEmbedder.from_pretrained(folder, dtype=torch.float32)
    host = ChunkEmbedder.from_pretrained(folder, dtype=torch.float32, device="cpu")
    np.testing.assert_allclose(device.embed(texts), host.embed(texts), atol=1e-5)
    assert device.device.type == DEVICE and host.device.type == "cpu"
    short = ChunkEmbedder.from_pretrained(folder)
    assert short.dtype == torch.bfloat16
    assert (short.embed(texts) * host.embed(texts)).sum(axis=1).min() > 0.99
    sizes = {"tokenizer": world.tokenizer, "chunk_size": 8, "neighbor_size": 16}
    store = RetroDatastore.build(corpus(), tmp_path / "store", embedder=device, **sizes)
    scores, ids = store.search(device.embed(texts), 2)
    expected_scores, expected_ids = world.datastore.search(host.embed(texts), 2)
    np.testing.assert_allclose(scores, expected_scores, atol=2e-3)  # keys are kept in half precision
    assert (ids == expected_ids).mean() > 0.95
    assert RetroRetriever(store, embedder=device).find("the")[0]


def test_evaluation_is_that_of_the_cpu(world, tmp_path):
    """`evaluate` with its sweeps, `bits_per_byte`, `trace`: the CPU's numbers."""
    documents = [{"id": f"new-{number}", "text": row["text"]} for number, row in enumerate(corpus(10, seed=5))]
    options = {"retriever": world.retriever, "window": 32, "num_resamples": 50}
    found = {}
    for device in ("cpu", DEVICE):
        model = make_model(scale=0.25).to(device)
        result = evaluate(
            model,
            documents,
            world.tokenizer,
            num_neighbors_sweep=[1, 3],
            fractions=[0.3, 1.0],
            output=tmp_path / device,
            **options,
        )
        measured = bits_per_byte(model, documents, world.tokenizer, **options).bits_per_byte
        page = trace(model, documents[0]["text"], world.tokenizer, retriever=world.retriever)
        found[device] = [*(mode.bits_per_byte for mode in result.modes), *measured.values(), *page.gains]
    assert found[DEVICE] == pytest.approx(found["cpu"], rel=1e-4, abs=1e-4)


def test_questions_are_answered_as_on_the_cpu(world):
    questions = tokenized(world.tokenizer)
    answers = {}
    for device in ("cpu", DEVICE):
        result = answer_questions(
            make_model(scale=0.3).to(device), questions, world.tokenizer, max_new_tokens=6, num_resamples=50
        )
        answers[device] = result.predictions
    assert answers[DEVICE] == answers["cpu"]
