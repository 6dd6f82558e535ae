"""What a user of transformers expects of any model: what somebody tried and found wrong, one test each."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from retro_hf import retrofit

from .tiny import ENCODER, hash_retriever, random_ids, random_neighbors, randomize, tiny_backbone


SETTINGS = {"encoder": ENCODER, "chunk_size": 4, "cross_attention_layers": [1, 3]}


def parallel(family="llama", **options):
    return retrofit(tiny_backbone(family), reader="parallel_context", chunk_size=4, neighbor_size=8, **options).eval()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("padding", [3, 9])
def test_a_padded_row_reads_as_the_row_alone(family, padding):
    """In a forward pass without `position_ids`, too: neighbors stand right before the text, not before its padding."""
    model, find = parallel(family), hash_retriever()
    randomize(model.model.backbone, seed=1)
    ids = random_ids(1, 14)
    padded = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, padding, dtype=torch.long), torch.ones_like(ids)], dim=1)
    with torch.no_grad():
        alone = model(ids, retriever=find).logits
        assert (alone - model(ids).logits).abs().max() > 1e-3  # it reads
        together = model(padded, attention_mask=mask, retriever=find).logits[:, padding:]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        cache = model(padded[:, :-3], attention_mask=mask[:, :-3], retriever=find, use_cache=True).past_key_values
        for end in range(padded.shape[1] - 2, padded.shape[1] + 1):
            step = model(padded[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache, retriever=find)
            torch.testing.assert_close(step.logits[:, -1], alone[:, end - padding - 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, 0.5, float("nan"), 2])
def test_a_mask_of_neighbors_that_is_no_mask_is_refused(value):
    """An additive mask says the opposite: it would turn reading off where it is meant to be on."""
    model = retrofit(tiny_backbone("llama"), **SETTINGS)
    neighbors = random_neighbors(1, 3)
    ids = neighbors["neighbor_input_ids"]
    mask = torch.full(ids.shape, value, dtype=torch.long if value == 2 else torch.float32)
    with pytest.raises(ValueError, match="mask"):
        model(random_ids(1, 14), neighbor_input_ids=ids, neighbor_attention_mask=mask)


def test_attentions_of_parallel_context_are_refused_and_not_left_out():
    model = parallel()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="output_attentions"):
        model(random_ids(1, 14), retriever=hash_retriever(), output_attentions=True)
    assert len(model(random_ids(1, 14), output_attentions=True).attentions) == model.config.num_hidden_layers


def test_an_adapter_folder_tells_its_dtype_and_all_of_its_loading_info(tmp_path):
    tiny_backbone("llama").save_pretrained(tmp_path / "base")
    for reader, options in (("cross_attention", SETTINGS), ("parallel_context", {"chunk_size": 4})):
        retrofit(tmp_path / "base", reader=reader, **options).save_pretrained(tmp_path / reader, save_backbone=False)
        load = AutoModelForCausalLM.from_pretrained
        where = {"backbone_name_or_path": tmp_path / "base"}
        model, info = load(tmp_path / reader, dtype="bfloat16", output_loading_info=True, **where)
        assert model.config.dtype is torch.bfloat16
        assert {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"} <= set(info)
        with pytest.raises(TypeError, match="retriever"):
            load(tmp_path / reader, retrievers=hash_retriever(), **where)


def test_fewer_layers_than_the_reader_needs_are_refused_by_name(tmp_path):
    retrofit(tiny_backbone("llama"), **SETTINGS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cross_attention_layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1)


def test_a_frozen_reader_without_weights_says_that_it_cannot_be_trained(caplog):
    model = parallel().train()
    ids = random_ids(1, 14)
    assert not model(ids, labels=ids, retriever=hash_retriever()).loss.requires_grad
    assert "LoRA" in caplog.text


def test_a_batch_without_rows_is_not_called_a_prompt_without_tokens():
    with pytest.raises(ValueError, match="no rows"):
        parallel().generate(torch.zeros(0, 8, dtype=torch.long))
