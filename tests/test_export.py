"""torch.export: the exported program gives the logits of the model, for other batches and lengths too."""

import pytest
import torch
from tiny import hash_retriever, random_ids, random_neighbors, two_layer_retro
from torch.export import Dim
from transformers.integrations.executorch import register_dynamic_cache_export_support

from retro_hf.model.compatibility_retro import CACHE_NAME


def inputs(batch_size: int, num_tokens: int, num_chunks: int, off: bool = False, offset: bool = False) -> dict:
    """A left-padded batch with everything that a tokenizer, a collator and a user give."""
    ids = random_ids(batch_size, num_tokens)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if offset:
        batch["chunk_offset"] = torch.arange(batch_size) % 4
    return batch if off else batch | random_neighbors(batch_size, num_chunks, ragged=True)


@pytest.mark.parametrize(
    ("family", "off", "offset"),
    [
        pytest.param("llama", False, False, marks=pytest.mark.slow),  # of the kinds that follow
        ("llama", False, True),
        ("llama", True, False),
        ("gpt2", False, False),
        ("retro_decoder", False, False),
    ],
)
def test_batch_length_and_number_of_chunks_are_dynamic(family, off, offset):
    model = two_layer_retro(family)
    batch, length, chunks = Dim("batch", min=2, max=64), Dim("length", min=8, max=64), Dim("chunks", min=2, max=16)
    example = inputs(2, 17, 4, off, offset)
    sizes = {
        name: {0: batch} if name == "chunk_offset" else {0: batch, 1: chunks if "neighbor" in name else length}
        for name in example
    }
    program = torch.export.export(
        model, (), {**example, "use_cache": False}, dynamic_shapes={**sizes, "use_cache": None}, strict=False
    ).module()
    for shape in ((2, 17, 4), (3, 22, 5), (5, 9, 2)):
        given = inputs(*shape, off, offset)
        torch.testing.assert_close(program(**given, use_cache=False).logits, model(**given, use_cache=False).logits)


def test_wrong_chunk_offsets_are_refused_by_the_program():
    model, example = two_layer_retro("llama"), inputs(2, 17, 4, offset=True)
    program = torch.export.export(model, (), example, strict=False).module()
    with pytest.raises(RuntimeError):
        program(**{**example, "chunk_offset": torch.tensor([0, 4])})


def test_a_cached_step_without_retrieval_is_exported():
    register_dynamic_cache_export_support()
    model, ids = two_layer_retro("llama"), random_ids(2, 9)
    caches = [model(ids[:, :8], use_cache=True)[CACHE_NAME] for _ in range(3)]
    step = {"input_ids": ids[:, 8:], "use_cache": True}
    with torch.no_grad():
        program = torch.export.export(model, (), {**step, CACHE_NAME: caches[0]}, strict=False).module()
        found = program(**step, **{CACHE_NAME: caches[1]}).logits
        torch.testing.assert_close(found, model(**step, **{CACHE_NAME: caches[2]}).logits)


@pytest.mark.parametrize("extra", [{"use_cache": True, **random_neighbors(2, 2)}, {"use_cache": False}])
def test_a_cache_and_a_retriever_are_refused_by_name(extra):
    model = two_layer_retro("llama")
    model.set_retriever(None if extra["use_cache"] else hash_retriever())
    with pytest.raises(ValueError, match="exported"):
        torch.export.export(model, (), {"input_ids": random_ids(2, 9), **extra}, strict=False)
