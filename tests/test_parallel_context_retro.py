"""The reader `parallel_context`: the contracts of every reader, and what is its own.

Generation is in test_generation.py, which runs with this reader, too. What is different from the paper's reader: neighbors
given twice count twice, since they share one softmax with the text.
"""

import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache

from retro_hf import RetroConfig, RetroForCausalLM, retrofit
from retro_hf.errors import UnsupportedBackboneError
from retro_hf.model.neighbor_cache_retro import EncodedNeighbor, NeighborCache, place_neighbors
from retro_hf.model.segments_retro import plan_segments

from . import contracts
from .naive_parallel_context import naive_logits
from .test_generation import TextRetriever
from .test_gradient_checkpointing import assert_equal_gradients, without_dropout
from .tiny import (
    CHUNK_SIZE,
    NEIGHBOR_SIZE,
    hash_retriever,
    random_ids,
    random_neighbors,
    tiny_backbone,
    tiny_retro,
)


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FAMILIES = ["llama", "qwen3", "gemma2", "gpt_neox", "olmo2", "phi", "granite"]


def reading(family="llama", **config):
    """A tiny model with this reader and random weights."""
    return tiny_retro(family, reader="parallel_context", **config)


@pytest.fixture(scope="module")
def model():
    return reading()


def generate(model, prompt, retriever, **options):
    return model.generate(prompt, retriever=retriever, max_new_tokens=11, **GREEDY, **options)


class TestWithoutNeighbors:
    """Retrieval off is the base, bit for bit."""

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_logits_and_loss_are_those_of_the_base(self, family, implementation):
        base = tiny_backbone(family)
        if family != "gemma2":  # its own choice is eager, which alone can cap the scores
            base.set_attn_implementation(implementation)
        ids, masked = random_ids(2, 14), random_neighbors(2, 3)
        masked["neighbor_attention_mask"] *= 0
        with torch.no_grad():
            expected = base(ids, labels=ids)
            model = retrofit(base, reader="parallel_context", chunk_size=CHUNK_SIZE)
            for neighbors in ({}, masked):
                found = model(ids, labels=ids, **neighbors)
                assert torch.equal(found.logits, expected.logits)
                assert torch.equal(found.loss, expected.loss)
            assert not torch.equal(model(ids, **random_neighbors(2, 3)).logits, expected.logits)

    def test_generated_tokens_are_those_of_the_base(self):
        base, prompt = tiny_backbone("llama"), random_ids(2, 9)
        expected = base.generate(prompt, max_new_tokens=11, **GREEDY)
        model = retrofit(base, reader="parallel_context", chunk_size=CHUNK_SIZE)
        assert torch.equal(generate(model, prompt, None), expected)
        nothing = lambda ids, mask: (ids.unsqueeze(1), torch.zeros_like(ids).unsqueeze(1))  # noqa: E731
        assert torch.equal(generate(model, prompt, nothing), expected)

    def test_nothing_is_added_to_the_base(self):
        base = tiny_backbone("llama")
        model = retrofit(base, reader="parallel_context")
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in base.parameters())
        assert list(model.model.retro.parameters()) == []


class TestSameAsANaiveImplementation:
    """A Llama in plain torch, with one explicit mask over all neighbors and the text."""

    @pytest.mark.parametrize("chunk_offset", [0, 3])
    @pytest.mark.parametrize("num_tokens", [1, 3, 4, 7, 8, 14])
    def test_logits(self, model, num_tokens, chunk_offset):
        num_chunks = (num_tokens + chunk_offset) // CHUNK_SIZE
        ids = random_ids(2, num_tokens)
        neighbors = random_neighbors(2, num_chunks, 3, ragged=True) if num_chunks else {}
        with torch.no_grad():
            found = model(ids, **neighbors, chunk_offset=chunk_offset).logits
        torch.testing.assert_close(found, naive_logits(model, ids, neighbors, chunk_offset), atol=1e-5, rtol=0)

    def test_neighbors_longer_and_shorter_than_in_the_config(self, model):
        ids = random_ids(2, 14)
        for size in (1, 2, NEIGHBOR_SIZE + 5):
            neighbors = random_neighbors(2, 3, neighbor_size=size)
            with torch.no_grad():
                found = model(ids, **neighbors).logits
            torch.testing.assert_close(found, naive_logits(model, ids, neighbors), atol=1e-5, rtol=0)

    def test_gradients_reach_the_base_through_text_and_neighbors(self, model):
        ids, neighbors = random_ids(1, 10), random_neighbors(1, 2)
        found = torch.autograd.grad(model(ids, **neighbors).logits.square().sum(), list(model.parameters()))
        logits = naive_logits(model, ids, neighbors, grad=True)
        expected = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one / other.abs().max(), other / other.abs().max(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "context", "starts"),
    [
        ([4, 4, 4], None, [-4, -8, -12]),
        ([2, 4, 3], 100, [-4, -8, -12]),  # short ones take as much room
        ([4, 6, 4], 100, [-4, -10, -14]),
        ([4, 4, 4, 4], 16, [-4, -8, -8, -8]),  # half of the context is full
        ([4, 4, 6], 16, [-4, -8, -8]),
        ([6, 4], 8, [-6, -6]),
        ([], 8, []),
    ],
)
def test_neighbors_stand_one_before_another_in_half_of_the_context(lengths, context, starts):
    neighbors = [tuple(range(length)) for length in lengths]
    assert [tuple(one) for one in place_neighbors(neighbors, 4, context)] == list(zip(neighbors, starts, strict=True))


def test_chunks_that_read_the_same_attend_together():
    """The chunks before a question read nothing, those of the question the same: two segments, the first one without a mask."""
    one, other = (EncodedNeighbor((torch.zeros(1, size, 2),), (torch.zeros(1, size, 2),)) for size in (3, 5))
    groups = [[0, 0, 1, 1, 2, 2, 3, 3], [-1, 0, 1, 1, 2, 2, 3, 3]]

    def divided(*rows) -> list[tuple[int, int, bool]]:
        segments, _ = plan_segments([groups[row] for row in range(len(rows))], list(rows), 0)
        return [(segment.length, segment.size, segment.begins_text) for segment in segments]

    assert divided([(), (), (one, other), (one, other)]) == [(4, 0, True), (8, 8, False)]
    assert divided([(), (), (one, other), (other, one)]) == [(4, 0, True), (6, 8, False), (8, 8, False)]
    assert divided([(), (), (), ()], [(), (), (), (one,)]) == [(6, 0, False), (8, 3, False)]
    assert divided([(one,), (one,), (one,), (one,)]) == [(8, 3, True)]


class TestInformationFlow:
    """Who depends on what, by gradient."""

    @pytest.mark.parametrize("chunk_offset", [0, 1, 3])
    def test_every_position_sees_its_past_and_the_neighbors_of_complete_chunks(self, model, chunk_offset):
        contracts.check_information_flow(model, chunk_offset=chunk_offset)

    def test_in_one_layer_neighbors_reach_the_attending_chunk_only(self):
        model = reading(text_config={"num_hidden_layers": 1}, cross_attention_layers=[0])
        contracts.check_reach_in_one_layer(model)
        contracts.check_reach_in_one_layer(model, chunk_offset=2)

    def test_first_neighbor_is_the_nearest(self, model):
        """Two neighbors that change places give other scores; one that is masked leaves its place to the next."""
        ids, neighbors = random_ids(1, 8), random_neighbors(1, 2, 2)
        swapped = {name: tensor.flip(2) for name, tensor in neighbors.items()}
        one = {name: tensor[:, :, 1:] for name, tensor in neighbors.items()}
        masked = neighbors | {"neighbor_attention_mask": neighbors["neighbor_attention_mask"].clone()}
        masked["neighbor_attention_mask"][:, :, 0] = 0
        with torch.no_grad():
            assert not torch.allclose(model(ids, **neighbors).logits, model(ids, **swapped).logits, atol=1e-4)
            assert torch.equal(model(ids, **masked).logits, model(ids, **one).logits)

    def test_masked_tokens_are_never_read(self, model):
        neighbors = contracts._neighbors_with_gaps()
        ids, mask = neighbors.values()
        with torch.no_grad():
            expected = model(random_ids(2, 14), **neighbors).logits
            neighbors["neighbor_input_ids"] = ids.masked_fill(mask == 0, -100)
            assert torch.equal(model(random_ids(2, 14), **neighbors).logits, expected)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("offsets", [None, (0, 1, 2, 3, 1)])
    def test_rows_of_a_padded_batch_are_those_alone(self, model, side, offsets):
        contracts.check_padding_is_invisible(model, side, offsets)
        contracts.check_padding_is_invisible(model, side, offsets, live=True)

    def test_eager_and_sdpa_agree(self):
        model, ids, neighbors = reading(), random_ids(2, 14), random_neighbors(2, 3, ragged=True)
        with torch.no_grad():
            expected = model(ids, **neighbors).logits
            model.set_attn_implementation("eager")
            torch.testing.assert_close(model(ids, **neighbors).logits, expected, atol=1e-5, rtol=0)
            generated = generate(model, ids, hash_retriever())
            model.set_attn_implementation("sdpa")
            assert torch.equal(generate(model, ids, hash_retriever()), generated)


class TestChat:
    """In a chat the question itself is read with its passages, not only the last token of the prompt."""

    @pytest.mark.parametrize(("turn_start", "first_chunk"), [(5, 1), (1, 0), (8, 1)])
    def test_passages_are_read_from_the_question_on(self, model, turn_start, first_chunk):
        """The same as neighbors given to every chunk of the prompt from the one that ends before the question."""
        prompt = random_ids(1, 9)
        prompt[prompt == 5] = 6
        prompt[0, turn_start] = 5  # where the retriever sees the turn begin
        found = generate(model, prompt, TextRetriever())
        offset = -turn_start % CHUNK_SIZE
        num_chunks = (offset + 9) // CHUNK_SIZE
        ids, mask = TextRetriever().look_up([f"turn {int(prompt.sum())}"])
        reads = torch.arange(num_chunks) >= first_chunk
        given = {
            "neighbor_input_ids": ids.unsqueeze(1).expand(-1, num_chunks, -1, -1),
            "neighbor_attention_mask": mask.unsqueeze(1) * reads[None, :, None, None],
        }
        assert torch.equal(found, generate(model, prompt, hash_retriever(), chunk_offset=offset, **given))

    def test_a_query_of_ones_own_is_read_there_too(self, model):
        prompt = random_ids(1, 9)
        prompt[prompt == 5] = 6
        prompt[0, 5] = 5
        retriever = TextRetriever()
        output = generate(model, prompt, retriever, query="my words", return_dict_in_generate=True)
        assert retriever.texts == ["my words"]
        assert [entry.get("query") for entry in output.retrieval_trace[0][:3]] == ["my words", "my words", None]


class TestCost:
    """What is computed, and how often."""

    def test_no_token_is_computed_twice(self, model):
        """Generation runs the base once over every token of the text and of each distinct neighbor."""
        seen = []
        hook = model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
        model.model.retro.cache = NeighborCache()
        retriever = hash_retriever()
        prompt = random_ids(1, 6).repeat(2, 1)
        generate(model, prompt, retriever, num_beams=2)
        hook.remove()
        chunks = {tuple(row) for call in retriever.calls for row in call.tolist()}
        neighbors = len(chunks) * 2 * NEIGHBOR_SIZE  # the last of each ends two tokens early, and is padded
        assert sum(seen) == 2 * 2 * (6 + 10) + neighbors

    def test_neighbors_are_encoded_once_for_all_calls(self, model):
        model.model.retro.cache = NeighborCache()
        prompt = random_ids(2, 9)
        first = generate(model, prompt, hash_retriever())
        kept = len(model.model.retro.cache)
        assert kept > 0
        seen = []
        hook = model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
        assert torch.equal(generate(model, prompt, hash_retriever()), first)
        hook.remove()
        assert sum(seen) == 2 * (9 + 10)
        assert len(model.model.retro.cache) == kept

    def test_the_text_stays_where_it_is_when_neighbors_are_exchanged(self, model):
        """At the end of a chunk neither the text's keys are copied, nor those of rows whose neighbors stay."""
        cache = DynamicCache(config=model.config.text_config)
        ids, retriever = random_ids(1, 30), hash_retriever()
        places = set()
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache, use_cache=True, retriever=retriever)
            for step in range(6, 30):
                model(ids[:, step : step + 1], past_key_values=cache, use_cache=True, retriever=retriever)
                places |= {tensor.data_ptr() for layer in cache.layers for tensor in (layer.keys, layer.values)}
        assert len(places) == 2 * 4

    def test_kept_neighbors_are_bounded_in_bytes(self):
        model, prompt = reading(), random_ids(4, 12)
        generated = generate(model, prompt, hash_retriever())
        cache = model.model.retro.cache
        size = cache.num_bytes // len(cache)
        model.model.retro.cache = NeighborCache(max_bytes=3 * size)
        assert torch.equal(generate(model, prompt, hash_retriever()), generated)
        assert 0 < model.model.retro.cache.num_bytes <= 3 * size

    @pytest.mark.parametrize("change", ["step", "load", "adapter"])
    def test_changed_weights_encode_anew(self, change):
        model, ids, neighbors = reading(freeze_backbone=False), random_ids(2, 14), random_neighbors(2, 3)
        with torch.no_grad():
            before = model(ids, **neighbors).logits
            assert len(model.model.retro.cache) > 0
            if change == "step":
                for parameter in model.parameters():
                    parameter.add_(0.01)
            elif change == "load":
                model.load_state_dict(reading(seed=5).state_dict())
            else:
                tuned = get_peft_model(model, LoraConfig(target_modules=r".*v_proj", init_lora_weights=False))
                after = tuned.eval()(input_ids=ids, **neighbors).logits
                with tuned.disable_adapter():
                    torch.testing.assert_close(tuned(input_ids=ids, **neighbors).logits, before)
                torch.testing.assert_close(tuned(input_ids=ids, **neighbors).logits, after)
            after = model(ids, **neighbors).logits
            model.model.retro.cache = NeighborCache()
            assert not torch.equal(after, before)
            assert torch.equal(model(ids, **neighbors).logits, after)

    def test_gradients_and_training_keep_nothing(self, model):
        model.model.retro.cache = NeighborCache()
        model(random_ids(2, 14), **random_neighbors(2, 3))
        assert len(model.model.retro.cache) == 0

    def test_copies_of_a_model_keep_neighbors_of_their_own(self, model):
        with torch.no_grad():
            model(random_ids(2, 14), **random_neighbors(2, 3))
        assert len(model.model.retro.cache) > 0
        assert len(copy.deepcopy(model).model.retro.cache) == 0


class TestTraining:
    """LoRA on the base, which reads while it is trained."""

    def test_lora_by_the_trainer(self, tmp_path):
        tiny_backbone("llama").save_pretrained(tmp_path / "base")
        model = retrofit(tmp_path / "base", reader="parallel_context", chunk_size=CHUNK_SIZE)
        tuned = get_peft_model(model, LoraConfig(target_modules=r".*(q_proj|v_proj)", r=2))
        ids, neighbors = random_ids(4, 14), random_neighbors(4, 3)
        rows = [
            {"input_ids": ids[i], "labels": ids[i], **{name: value[i] for name, value in neighbors.items()}}
            for i in range(4)
        ]
        arguments = TrainingArguments(
            output_dir=tmp_path / "run", max_steps=4, learning_rate=0.02, report_to="none", use_cpu=True, seed=0
        )
        with torch.no_grad():
            before = tuned.eval()(input_ids=ids, labels=ids, **neighbors).loss
        collate = lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]}  # noqa: E731
        Trainer(tuned, arguments, train_dataset=rows, data_collator=collate).train()
        with torch.no_grad():
            assert tuned.eval()(input_ids=ids, labels=ids, **neighbors).loss < before

    def test_gradient_checkpointing_changes_no_gradient(self):
        model = without_dropout(reading())
        ids = random_ids(2, 14)
        for neighbors in (random_neighbors(2, 3, ragged=True), {"retriever": hash_retriever()}):
            model.activation_checkpointing_disable()
            assert_equal_gradients(model, {"input_ids": ids, "labels": ids, **neighbors})


class TestSaving:
    """Whole, or as a folder that holds a config and the name of the base."""

    @pytest.mark.parametrize("save_backbone", [True, False])
    def test_saved_and_loaded(self, tmp_path, save_backbone):
        tiny_backbone("llama").save_pretrained(tmp_path / "base")
        model = retrofit(tmp_path / "base", reader="parallel_context", chunk_size=CHUNK_SIZE)
        model.save_pretrained(tmp_path / "model", save_backbone=save_backbone)
        assert bool(list((tmp_path / "model").glob("*.safetensors"))) == save_backbone
        assert json.loads((tmp_path / "model" / "config.json").read_text())["reader"] == "parallel_context"
        ids, neighbors = random_ids(2, 14), random_neighbors(2, 3)
        for again in (False, True):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", backbone_name_or_path=tmp_path / "base")
            with torch.no_grad():
                assert torch.equal(loaded(ids, **neighbors).logits, model(ids, **neighbors).logits)
                assert torch.equal(loaded(ids).logits, model(ids).logits)
            assert torch.equal(generate(loaded, ids, hash_retriever()), generate(model, ids, hash_retriever()))
            if not again:
                loaded.save_pretrained(tmp_path / "model")

    @pytest.mark.parametrize("save_backbone", [True, False])
    @pytest.mark.parametrize(
        "readers", [("parallel_context", "cross_attention"), ("cross_attention", "parallel_context")]
    )
    def test_one_reader_is_not_loaded_as_the_other(self, tmp_path, save_backbone, readers):
        saved, asked = readers
        tiny_backbone("llama").save_pretrained(tmp_path / "base")
        model = retrofit(tmp_path / "base", reader=saved)
        model.save_pretrained(tmp_path / "model", save_backbone=save_backbone)
        with pytest.raises(ValueError, match=asked):
            RetroForCausalLM.from_pretrained(tmp_path / "model", reader=asked)
        config = copy.deepcopy(model.config)
        config.reader = asked
        with pytest.raises(ValueError, match=asked):
            RetroForCausalLM.from_pretrained(tmp_path / "model", config=config)


class TestBadInput:
    """What cannot be read is refused by name, with what to do."""

    @pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "gptj", "mistral_sliding", "retro_decoder"])
    def test_bases_that_cannot_read(self, family):
        with pytest.raises(UnsupportedBackboneError, match="reader='cross_attention'"):
            retrofit(tiny_backbone(family), reader="parallel_context")

    def test_unknown_reader(self):
        with pytest.raises(StrictDataclassClassValidationError, match="'cross_attention', 'parallel_context'"):
            RetroConfig(reader="prompt")
        with pytest.raises(ValueError, match="'cross_attention', 'parallel_context'"):
            retrofit(tiny_backbone(), reader="prompt")

    def test_an_encoder_that_would_be_ignored(self):
        with pytest.raises(ValueError, match="encoder"):
            retrofit(tiny_backbone(), reader="parallel_context", encoder={"hidden_size": 16})

    def test_other_implementations_of_attention(self):
        base = tiny_backbone()
        base.set_attn_implementation("flex_attention")
        with pytest.raises(ValueError, match="flex_attention"):
            retrofit(base, reader="parallel_context")

    def test_neighbors_longer_than_the_context(self, model):
        limit = model.config.max_position_embeddings
        neighbors = random_neighbors(1, 1, neighbor_size=limit + 1)
        with pytest.raises(ValueError, match=rf"{limit + 1} tokens.*{limit}"):
            model(random_ids(1, 6), **neighbors)

    def test_more_neighbors_than_memory_holds(self, model, monkeypatch):
        monkeypatch.setattr("retro_hf.model.neighbor_cache_retro.total_memory", lambda device: 2**14)
        with pytest.raises(ValueError, match="num_neighbors"):
            model(random_ids(1, 6), **random_neighbors(1, 1, num_neighbors=50))
