"""Compiled decoding: the tokens of eager decoding from one graph, which is left only where a chunk completes."""

import copy
import logging

import pytest
import torch
from transformers.generation import CompileConfig

from .tiny import hash_retriever, random_ids, random_neighbors, randomize, tiny_backbone, tiny_retro, two_layer_retro


NEW_TOKENS = 14
OPTIONS = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "cache_implementation": "static",
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.fixture(scope="module", autouse=True)
def _llama_compiles():
    """PyTorch 2.6 cannot compile Llama itself as one graph."""
    try:
        llama = tiny_backbone("llama", num_hidden_layers=1)
        torch.compile(llama, backend="eager", fullgraph=True)(random_ids(1, 3), use_cache=False)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"PyTorch {torch.__version__} cannot compile Llama itself as one graph: {error}")


class Graphs:
    """A backend that runs graphs as they are, and counts them and their runs."""

    def __init__(self):
        self.compiled = self.runs = 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run

    def __deepcopy__(self, memo):  # `generate` copies its settings
        return self


def on_any_device(backend="inductor", mode=None):
    """Settings of a compiler that transformers uses on a CPU, too; a step must be one graph, of fixed shapes."""
    asked = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=mode)
    asked._compile_all_devices = True
    return asked


def left_padded():
    """Three prompts of 7, 4 and 9 tokens."""
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :2] = mask[1, :5] = 0
    return {"input_ids": random_ids(3, 9), "attention_mask": mask}


def sources():
    """Where neighbors come from, and on which steps no row completes a chunk of four tokens."""
    prompts = left_padded()
    return {
        "prompts that end a chunk": ({**prompts, "retriever": hash_retriever()}, 10),
        # Their next positions are 10, 5 and 9: the first borders are after 2, 3 and 3 new tokens.
        "rows at different places": (
            {**prompts, "retriever": hash_retriever(), "chunk_offset": torch.tensor([3, 1, 0])},
            7,
        ),
        "given neighbors": ({**prompts, **random_neighbors(3, 5, ragged=True), "chunk_offset": 1}, 4),
    }


def assert_same(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    assert found.retrieval_trace == expected.retrieval_trace
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["retro_decoder", "llama"])
def test_one_graph_serves_every_step_between_borders(family):
    """Whoever brings the neighbors, three borders later, and in the next call: it is compiled once, and left at borders."""
    torch.compiler.reset()
    model, graphs = randomize(two_layer_retro(family), 0.3), Graphs()
    for name, (inputs, between_borders) in sources().items():
        expected, before = model.generate(**inputs, **OPTIONS), graphs.runs
        assert_same(model.generate(**inputs, compile_config=on_any_device(graphs), **OPTIONS), expected)
        assert graphs.runs - before == between_borders, name
    assert graphs.compiled == 1


def test_every_step_without_retrieval_is_compiled():
    """There is no border then: the graph is that of the base, whatever the reader."""
    torch.compiler.reset()
    for reader in ("cross_attention", "parallel_context"):
        model, graphs = two_layer_retro("llama", reader=reader), Graphs()
        expected = model.generate(**left_padded(), **OPTIONS)
        assert_same(model.generate(**left_padded(), compile_config=on_any_device(graphs), **OPTIONS), expected)
        assert (graphs.compiled, graphs.runs) == (1, NEW_TOKENS - 1)


def test_a_copy_of_a_model_runs_with_its_own_weights():
    """A compiled step belongs to no model: each call hands it the weights."""
    torch.compiler.reset()
    model, asked = two_layer_retro("llama"), on_any_device(Graphs())
    inputs = {"input_ids": random_ids(1, 5), "retriever": hash_retriever(), **OPTIONS}
    model.generate(compile_config=asked, **inputs)
    other = randomize(copy.deepcopy(model), 0.3, seed=1)
    assert_same(other.generate(compile_config=asked, **inputs), other.generate(**inputs))


@pytest.mark.parametrize(
    ("reader", "options"),
    [
        ("parallel_context", {}),
        ("cross_attention", {"num_beams": 2}),
        ("cross_attention", {"cache_implementation": None}),
    ],
)
def test_what_is_not_compiled_runs_eagerly_and_says_so(reader, options, monkeypatch, caplog):
    """The other reader, about which we warn, and beams and caches that grow, which transformers does not compile either."""
    caplog.set_level(logging.WARNING, logger="transformers")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    graphs = Graphs()
    model = randomize(two_layer_retro("llama", reader=reader), 0.3)
    inputs = {"input_ids": random_ids(2, 5), "retriever": hash_retriever(), **OPTIONS, **options}
    assert_same(model.generate(compile_config=on_any_device(graphs), **inputs), model.generate(**inputs))
    assert graphs.compiled == 0
    if reader == "parallel_context":
        assert "`compile_config` is ignored" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("family", ["retro_decoder", "llama"])
def test_by_inductor(family):
    """Real code: the tokens of eager decoding, and no step is compiled a second time."""
    torch.compiler.reset()
    model = tiny_retro(family, scale=0.3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for inputs, _ in sources().values():
            expected = model.generate(**inputs, **OPTIONS)
            assert_same(model.generate(**inputs, compile_config=on_any_device(), **OPTIONS), expected)
