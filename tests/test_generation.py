"""generate(): cached decoding equals a full forward pass token by token, and every chunk is looked up once."""

import copy
import logging
import threading
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation import (
    LogitsProcessor,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from retro_hf.model import inputs_retro
from retro_hf.model.compatibility_retro import CACHE_NAME

from .tiny import CHUNK_SIZE, hash_retriever, neighbors_from, random_ids, random_neighbors, tiny_backbone, tiny_retro


PROMPT_LENGTHS = [1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE - 1, 2 * CHUNK_SIZE]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def full_greedy(model, input_ids, num_tokens, retriever, chunk_offset=0):
    """Greedy decoding with one full forward pass per token, its neighbors given as tensors."""
    for _ in range(num_tokens):
        neighbors = neighbors_from(retriever, input_ids, chunk_offset=chunk_offset)
        logits = model(input_ids, use_cache=False, retriever=None, chunk_offset=chunk_offset, **neighbors).logits
        input_ids = torch.cat([input_ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return input_ids


def left_padded(lengths, seed=0):
    """A ragged batch: ids with padding 1 at the left, and its mask."""
    width = max(lengths)
    ids = random_ids(len(lengths), width, seed=seed)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def chunks_of(row, chunk_size=CHUNK_SIZE):
    """The complete chunks of a list of tokens."""
    return [tuple(row[i : i + chunk_size]) for i in range(0, len(row) - chunk_size + 1, chunk_size)]


@pytest.fixture(scope="module", params=["retro_decoder", "llama", "parallel_context"])
def model(request):
    """A RETRO with random weights, so that retrieval changes what is generated."""
    if request.param == "parallel_context":
        return tiny_retro("llama", reader="parallel_context", scale=0.3)
    return tiny_retro(request.param, scale=0.3)


@pytest.fixture(scope="module")
def llama():
    """One RETRO over Llama, where one backbone is enough."""
    return tiny_retro("llama", scale=0.3)


class TestSameAsAFullForwardPass:
    """Contract 7, token by token."""

    @pytest.fixture(autouse=True)
    def _quiet_assistants(self, caplog):
        """Transformers calls its own assistants in a way that it calls deprecated."""
        caplog.set_level(logging.ERROR, logger="transformers.generation.utils")

    @pytest.mark.parametrize("chunk_offset", [None, 0])
    @pytest.mark.parametrize("length", PROMPT_LENGTHS)
    def test_greedy(self, model, length, chunk_offset):
        """Greedy decoding from prompts of every length: they end a chunk, or with `chunk_offset=0` begin one."""
        prompt, options = random_ids(2, length), dict(max_new_tokens=10, **GREEDY)
        generated = model.generate(prompt, retriever=hash_retriever(), chunk_offset=chunk_offset, **options)
        offset = -length % CHUNK_SIZE if chunk_offset is None else chunk_offset
        assert torch.equal(generated, full_greedy(model, prompt, 10, hash_retriever(), offset))

    def test_retrieval_matters(self, model):
        """The tokens differ from those without retrieval; otherwise this file would show nothing."""
        prompt = random_ids(2, 9)
        on = model.generate(prompt, retriever=hash_retriever(), max_new_tokens=12, **GREEDY)
        assert not torch.equal(on, model.generate(prompt, max_new_tokens=12, **GREEDY))

    def test_logits_of_every_step(self, model):
        """Not only the tokens, but their logits."""
        prompt = random_ids(2, 6)
        out = model.generate(
            prompt,
            retriever=hash_retriever(),
            chunk_offset=0,
            max_new_tokens=11,
            return_dict_in_generate=True,
            output_logits=True,
            **GREEDY,
        )
        inputs = out.sequences[:, :-1]
        full = model(inputs, use_cache=False, **neighbors_from(hash_retriever(), inputs)).logits
        torch.testing.assert_close(torch.stack(out.logits, dim=1), full[:, 5:], atol=2e-5, rtol=1e-4)

    def test_sampling_with_a_seed(self, model):
        """Sampling draws the same tokens with and without a cache, several per prompt."""
        results = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            results.append(
                model.generate(
                    **left_padded([5, 8]),
                    retriever=hash_retriever(),
                    max_new_tokens=10,
                    do_sample=True,
                    top_k=20,
                    num_return_sequences=3,
                    use_cache=use_cache,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            )
        assert results[0].shape[0] == 6
        assert torch.equal(*results)

    def test_beams_of_a_ragged_batch(self, model):
        """Beam search over left-padded rows, two results each."""
        options = dict(max_new_tokens=10, num_beams=3, num_return_sequences=2, length_penalty=0.0, **GREEDY)
        inputs = left_padded([3, 9, 6])
        cached = model.generate(**inputs, retriever=hash_retriever(), **options)
        assert torch.equal(cached, model.generate(**inputs, retriever=hash_retriever(), use_cache=False, **options))

    def test_rows_of_a_padded_batch_are_those_alone(self, model):
        """Rows that complete their chunks at different steps do not disturb each other."""
        lengths = [1, 4, 7, 9]
        inputs = left_padded(lengths)
        together = model.generate(**inputs, retriever=hash_retriever(), max_new_tokens=11, **GREEDY)
        for row, length in enumerate(lengths):
            prompt = inputs["input_ids"][row : row + 1, -length:]
            alone = model.generate(prompt, retriever=hash_retriever(), max_new_tokens=11, **GREEDY)
            assert torch.equal(together[row, -length - 11 :], alone[0])

    @pytest.mark.parametrize("num_tokens", [2, CHUNK_SIZE])
    def test_prompt_lookup(self, model, num_tokens):
        """Proposed tokens are taken back across chunk borders."""
        prompt = random_ids(1, 7).repeat(1, 3)
        options = dict(retriever=hash_retriever(), max_new_tokens=20, **GREEDY)
        proposed = model.generate(prompt, prompt_lookup_num_tokens=num_tokens, **options)
        assert torch.equal(proposed, model.generate(prompt, **options))

    @pytest.mark.parametrize("family", ["retro_decoder", "llama"])
    @pytest.mark.parametrize("kind", ["retro", "plain"])
    def test_assisted(self, llama, family, kind):
        """Any model may draft: another RETRO, or a plain one that knows no neighbors."""
        assistant = tiny_retro(family, seed=5, scale=0.3) if kind == "retro" else tiny_backbone(family, seed=5)
        assistant.generation_config.update(
            num_assistant_tokens=3, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
        )
        options = dict(retriever=hash_retriever(), max_new_tokens=18, **GREEDY)
        drafted = llama.generate(random_ids(1, 6), assistant_model=assistant, **options)
        assert torch.equal(drafted, llama.generate(random_ids(1, 6), **options))

    def test_assistant_that_agrees(self, llama):
        """All drafts accepted, so that whole chunks complete inside one pass."""
        assistant = copy.deepcopy(llama)
        assistant.set_retriever(hash_retriever())
        assistant.generation_config.update(
            num_assistant_tokens=CHUNK_SIZE,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        options = dict(retriever=hash_retriever(), max_new_tokens=21, **GREEDY)
        drafted = llama.generate(random_ids(1, 6), assistant_model=assistant, **options)
        assert torch.equal(drafted, llama.generate(random_ids(1, 6), **options))

    def test_more_proposed_tokens_than_a_chunk(self, llama):
        """Taking back more than a chunk is refused with the settings to lower."""
        prompt = random_ids(1, 12).repeat(1, 2)
        with pytest.raises(ValueError, match=r"take back \d+ tokens.*chunk of 4.*prompt_lookup_num_tokens"):
            llama.generate(
                prompt, retriever=hash_retriever(), max_new_tokens=20, prompt_lookup_num_tokens=11, **GREEDY
            )

    @pytest.mark.parametrize("cache", [None, "static"])
    @pytest.mark.parametrize("size", [1, 3, 5])
    def test_chunked_prefill(self, model, size, cache):
        """The prompt is read in pieces, the first of which are padding for some rows."""
        inputs = left_padded([2, 11, 7])
        options = dict(retriever=hash_retriever(), max_new_tokens=9, **GREEDY)
        pieces = model.generate(**inputs, prefill_chunk_size=size, cache_implementation=cache, **options)
        assert torch.equal(pieces, model.generate(**inputs, **options))

    @pytest.mark.parametrize("cache", ["static", "offloaded", "offloaded_static"])
    def test_other_caches(self, model, cache):
        """Static and offloaded caches, on left-padded rows."""
        if cache.startswith("offloaded") and not torch.accelerator.is_available():
            cache = StaticCache if cache == "offloaded_static" else DynamicCache  # what offloading is on a CPU
        inputs = left_padded([5, 11, 7])
        options = dict(retriever=hash_retriever(), max_new_tokens=9, **GREEDY)
        expected = model.generate(**inputs, **options)
        if isinstance(cache, str):
            given = {"cache_implementation": cache}
        else:
            config = model.config.text_config
            given = {CACHE_NAME: cache(config=config, **({"max_cache_len": 20} if cache is StaticCache else {}))}
        assert torch.equal(model.generate(**inputs, **given, **options), expected)

    def test_without_a_cache(self, model):
        """`use_cache=False` recomputes everything and finds the same."""
        inputs = left_padded([5, 11, 7])
        options = dict(retriever=hash_retriever(), max_new_tokens=9, **GREEDY)
        assert torch.equal(model.generate(**inputs, use_cache=False, **options), model.generate(**inputs, **options))

    @pytest.mark.parametrize("splits", [[1] * 14, [5, 3, 1, 1, 4], [3, 11], [13, 1], [4, 4, 6]])
    def test_forward_in_pieces(self, model, splits):
        """A row cut anywhere and fed with a cache gives the logits of one pass."""
        ids = random_ids(2, 14)
        cache, pieces = None, []
        for piece in ids.split(splits, dim=1):
            out = model(piece, past_key_values=cache, use_cache=True, retriever=hash_retriever())
            cache = out[CACHE_NAME]
            pieces.append(out.logits)
        full = model(ids, use_cache=False, **neighbors_from(hash_retriever(), ids)).logits
        torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=2e-5, rtol=1e-4)

    def test_next_turn_on_a_returned_cache(self, model):
        """A second turn continues from the cache of the first, of which a copy serves another continuation."""
        retriever = hash_retriever()
        options = dict(max_new_tokens=6, return_dict_in_generate=True, retriever=retriever, **GREEDY)
        first = model.generate(random_ids(2, 7), chunk_offset=0, **options)
        kept = copy.deepcopy(first[CACHE_NAME])
        for seed, cache in ((1, first[CACHE_NAME]), (2, kept)):
            prompt = torch.cat([first.sequences, random_ids(2, 5, seed=seed)], dim=1)
            known = len(retriever.calls)
            turn = model.generate(prompt, **{CACHE_NAME: cache}, **options)
            assert torch.equal(turn.sequences, full_greedy(model, prompt, 6, hash_retriever()))
            looked_up = [tuple(row) for call in retriever.calls[known:] for row in call.tolist()]
            assert not set(looked_up) & set(chunks_of(first.sequences[0, :-1].tolist()))


class TestGivenNeighbors:
    """Neighbors that the caller brings."""

    @pytest.mark.parametrize("read", [[(0, 2), (1, 2)], [(0, 1), (1, 2)], [(1, 0)], [(0, 0), (0, 1), (1, 1), (1, 2)]])
    def test_only_chunks_with_neighbors_are_computed_in_a_cached_pass(self, llama, read):
        """The scores are those of a pass without a cache, which computes all chunks; also of the steps that follow."""
        ids, given = random_ids(2, 14), random_neighbors(2, 3)
        has_neighbors = torch.zeros(2, 3, dtype=torch.long)
        has_neighbors[tuple(zip(*read, strict=True))] = 1
        given["neighbor_attention_mask"] = has_neighbors[:, :, None, None] * given["neighbor_attention_mask"]
        encoded, projected = [], []
        reader = llama.model.retro
        projection = next(iter(reader.cross_attention.values())).attention.k_proj
        hooks = [
            reader.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0]))),
            projection.register_forward_pre_hook(lambda _, inputs: projected.append(len(inputs[0]))),
        ]
        with torch.no_grad():
            whole = llama(ids, **given, use_cache=False).logits
            cached = llama(ids[:, :13], **given, use_cache=True)
            step = llama(ids[:, 13:], **given, use_cache=True, **{CACHE_NAME: cached[CACHE_NAME]})
        for hook in hooks:
            hook.remove()
        assert encoded == projected == [6, len(read)]
        torch.testing.assert_close(torch.cat([cached.logits, step.logits], dim=1), whole, atol=1e-5, rtol=0)
        assert not torch.equal(cached.logits, llama(ids[:, :13]).logits)

    def test_replace_the_retriever(self, model):
        """Tensors for all chunks give what a retriever with the same answers gives."""
        prompt = random_ids(2, 9)
        expected = model.generate(prompt, retriever=hash_retriever(), chunk_offset=0, max_new_tokens=8, **GREEDY)
        neighbors = neighbors_from(hash_retriever(), expected)
        for use_cache in (True, False):
            generated = model.generate(prompt, max_new_tokens=8, use_cache=use_cache, **neighbors, **GREEDY)
            assert torch.equal(generated, expected)

    def test_are_expanded_for_beams(self, model):
        """Beams and several results per prompt each get the neighbors of their prompt."""
        prompt = random_ids(2, 9)
        neighbors = random_neighbors(2, 4, ragged=True)
        options = dict(max_new_tokens=8, num_beams=3, num_return_sequences=2, **GREEDY)
        cached = model.generate(prompt, **neighbors, **options)
        assert torch.equal(cached, model.generate(prompt, use_cache=False, **neighbors, **options))
        alone = [
            model.generate(
                prompt[row : row + 1], **{name: value[row : row + 1] for name, value in neighbors.items()}, **options
            )
            for row in range(2)
        ]
        assert torch.equal(cached, torch.cat(alone))

    def test_of_the_prompt_with_a_retriever_for_the_rest(self, model):
        """The retriever answers only for chunks that no tensor covers."""
        prompt, retriever = random_ids(2, 9), hash_retriever()
        expected = model.generate(prompt, retriever=hash_retriever(), chunk_offset=0, max_new_tokens=8, **GREEDY)
        neighbors = neighbors_from(hash_retriever(), prompt)
        generated = model.generate(prompt, retriever=retriever, max_new_tokens=8, **neighbors, **GREEDY)
        assert torch.equal(generated, expected)
        asked = {tuple(row) for call in retriever.calls for row in call.tolist()}
        assert asked == {tuple(row[8:12]) for row in expected.tolist()} | {
            tuple(row[12:16]) for row in expected.tolist()
        }

    @pytest.mark.parametrize("shape", [(2, 0, 2, 8), (2, 2, 0, 8)])
    def test_none_at_all(self, model, shape):
        """No chunks, or no neighbors per chunk, is retrieval that finds nothing."""
        empty = torch.zeros(shape, dtype=torch.long)
        prompt = random_ids(2, 9)
        generated = model.generate(prompt, neighbor_input_ids=empty, max_new_tokens=8, **GREEDY)
        assert torch.equal(generated, model.model.backbone.generate(prompt, max_new_tokens=8, **GREEDY))


class TestRetrieverArgument:
    """Where a retriever may be given."""

    def test_attached_or_passed(self, llama):
        """`set_retriever` and `generate(retriever=)` do the same; None switches an attached one off."""
        prompt, options = random_ids(1, 9), dict(max_new_tokens=8, **GREEDY)
        passed = llama.generate(prompt, retriever=hash_retriever(), **options)
        off = llama.generate(prompt, **options)
        attached = tiny_retro("llama", scale=0.3)
        attached.set_retriever(hash_retriever())
        assert torch.equal(attached.generate(prompt, **options), passed)
        assert torch.equal(attached.generate(prompt, retriever=None, **options), off)
        assert torch.equal(attached(prompt, retriever=None).logits, llama(prompt).logits)
        attached.set_retriever(None)
        assert torch.equal(attached.generate(prompt, **options), off)

    def test_custom_generation_loop(self, llama):
        """A loop of the user's own, which passes on nothing about retrieval, uses the attached retriever."""
        model = copy.deepcopy(llama)
        model.set_retriever(hash_retriever())

        def loop(model, input_ids, **kwargs):
            for _ in range(6):
                inputs = model.prepare_inputs_for_generation(input_ids, use_cache=False)
                input_ids = torch.cat([input_ids, model(**inputs).logits[:, -1:].argmax(-1)], dim=1)
            return input_ids

        prompt = random_ids(1, 7)
        assert torch.equal(loop(model, prompt), full_greedy(model, prompt, 6, hash_retriever()))

    def test_generation_config_object(self, llama):
        """A `GenerationConfig` may be given as transformers allows, by position too."""
        settings = GenerationConfig(max_new_tokens=8, return_dict_in_generate=True, **GREEDY)
        out = llama.generate(random_ids(1, 9), settings, retriever=hash_retriever())
        expected = llama.generate(random_ids(1, 9), retriever=hash_retriever(), max_new_tokens=8, **GREEDY)
        assert torch.equal(out.sequences, expected)
        assert [entry["chunk"] for entry in out.retrieval_trace[0]] == [0, 1, 2, 3]

    def test_missing_retriever_is_told_once(self, caplog):
        """A model that was trained with a retriever warns when it generates without, once."""
        model = tiny_retro("llama", retriever_name_or_path="org/a-store")
        caplog.set_level(logging.WARNING)
        for _ in range(2):
            model.generate(random_ids(1, 5), max_new_tokens=2, **GREEDY)
        told = [record for record in caplog.records if "org/a-store" in record.getMessage()]
        assert len(told) == 1
        assert "retriever=" in told[0].getMessage()

    def test_given_retriever_warns_of_nothing(self, caplog):
        """No warning with a retriever, nor with given neighbors."""
        model = tiny_retro("llama", retriever_name_or_path="org/another-store")
        caplog.set_level(logging.WARNING)
        model.generate(random_ids(1, 5), retriever=hash_retriever(), max_new_tokens=2, **GREEDY)
        model.generate(random_ids(1, 5), max_new_tokens=2, **random_neighbors(1, 1), **GREEDY)
        assert "another-store" not in caplog.text

    def test_two_threads_with_retrievers_of_their_own(self, llama):
        """Passes of different threads do not mix."""
        prompts = [random_ids(2, 6, seed=seed) for seed in range(2)]
        retrievers = [lambda: hash_retriever(2), lambda: hash_retriever(3, 6)]
        options = dict(max_new_tokens=30, **GREEDY)
        expected = [llama.generate(p, retriever=r(), **options) for p, r in zip(prompts, retrievers, strict=True)]
        results = [None, None]
        barrier = threading.Barrier(2)

        def work(index):
            barrier.wait()
            for _ in range(2):
                results[index] = llama.generate(prompts[index], retriever=retrievers[index](), **options)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(results[0], expected[0])
        assert torch.equal(results[1], expected[1])

    def test_copies_of_a_model_share_its_retriever(self, llama):
        """A retriever holds files, locks and connections: copying a model must not copy them."""

        class Locked:
            def __init__(self):
                self.lock = threading.Lock()
                self.inner = hash_retriever()

            def __call__(self, ids, mask):
                with self.lock:
                    return self.inner(ids, mask)

        model = tiny_retro("llama", scale=0.3)
        model.set_retriever(Locked())
        twin = copy.deepcopy(model)
        assert twin.retriever is model.retriever
        prompt = random_ids(1, 9)
        expected = model.generate(prompt, max_new_tokens=8, **GREEDY)
        assert torch.equal(twin.generate(prompt, max_new_tokens=8, **GREEDY), expected)

    def test_module_as_retriever_stays_out_of_the_weights(self):
        """A retriever that happens to be a module does not become part of the model."""
        model = tiny_retro("llama")
        before = set(model.state_dict())
        model.set_retriever(torch.nn.Linear(2, 2))
        assert set(model.state_dict()) == before


class TestOneLookupPerChunk:
    """Retrieval happens once per completed chunk and distinct chunk."""

    def test_calls_and_rows(self, model):
        """One call for the prompt, one per completed chunk after it, for all rows together."""
        retriever = hash_retriever()
        out = model.generate(random_ids(3, 9), retriever=retriever, chunk_offset=0, max_new_tokens=12, **GREEDY)
        by_chunk = zip(*(chunks_of(row[:-1]) for row in out.tolist()), strict=True)
        new = [set(chunks) for chunks in by_chunk]  # of the prompt's two chunks, then of each that was generated
        assert [len(call) for call in retriever.calls] == [6, len(new[2]), len(new[3] - new[2]), len(new[4] - new[3])]
        asked = [tuple(row) for call in retriever.calls for row in call.tolist()]
        assert set(asked) == set.union(*new)
        assert len(asked) == len(set(asked))

    def test_nothing_is_asked_before_a_chunk_is_complete(self, llama):
        """m - 1 tokens ask nothing; the next one asks."""
        retriever = hash_retriever()
        llama(random_ids(2, CHUNK_SIZE - 1), retriever=retriever)
        assert retriever.calls == []
        llama(random_ids(2, CHUNK_SIZE), retriever=retriever)
        assert [call.shape for call in retriever.calls] == [(2, CHUNK_SIZE)]

    def test_ragged_rows_ask_when_they_complete(self, llama):
        """Rows of different lengths ask at different steps, each chunk once."""
        retriever, inputs = hash_retriever(), left_padded([5, 7])
        out = llama.generate(**inputs, retriever=retriever, chunk_offset=0, max_new_tokens=8, **GREEDY)
        assert [len(call) for call in retriever.calls] == [2, 1, 1, 1, 1]
        rows = [out[0, 2:].tolist(), out[1].tolist()]
        asked = {tuple(row) for call in retriever.calls for row in call.tolist()}
        assert asked == {chunk for row in rows for chunk in chunks_of(row[:-1])}

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_the_same_chunk_is_never_asked_twice(self, llama, use_cache):
        """Not for beams, not for copies of a prompt, not without a cache."""
        retriever = hash_retriever()
        llama.generate(
            random_ids(1, 12).repeat(2, 1),
            retriever=retriever,
            max_new_tokens=12,
            num_beams=4,
            use_cache=use_cache,
            **GREEDY,
        )
        asked = [tuple(row) for call in retriever.calls for row in call.tolist()]
        assert len(asked) == len(set(asked))
        assert len(retriever.calls[0]) == 3
        assert len(retriever.calls) <= 4

    def test_taken_back_tokens_are_not_asked_again(self, llama):
        """Prompt lookup asks no chunk twice."""
        retriever = hash_retriever()
        llama.generate(
            random_ids(1, 7).repeat(1, 3), retriever=retriever, max_new_tokens=20, prompt_lookup_num_tokens=4, **GREEDY
        )
        asked = [tuple(row) for call in retriever.calls for row in call.tolist()]
        assert len(asked) == len(set(asked))

    @pytest.mark.parametrize("counts", [(2, 3, 1, 4), (3, 1, 2, 1)])
    def test_number_of_neighbors_may_change(self, model, counts):
        """Each chunk may have its own number, also among beams that return to remembered chunks."""

        def retriever(ids, mask):
            number = counts[int(ids.sum()) % len(counts)]
            return hash_retriever(number)(ids, mask)

        retriever.calls = []
        for options in ({}, {"num_beams": 3}):
            options = dict(options, retriever=retriever, max_new_tokens=16, **GREEDY)
            cached = model.generate(random_ids(1, 5), **options)
            assert torch.equal(cached, model.generate(random_ids(1, 5), use_cache=False, **options))

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_neighbor_size_must_not_change(self, llama, use_cache):
        """Neighbors of another length in the middle of a sequence are refused, with both lengths."""
        sizes = iter([8, 6, 6, 6, 6])
        with pytest.raises(ValueError, match=r"of 6 .*of 8 .*neighbor_size"):
            llama.generate(
                random_ids(1, 5),
                retriever=lambda ids, mask: hash_retriever(2, next(sizes))(ids, mask),
                max_new_tokens=8,
                use_cache=use_cache,
                **GREEDY,
            )

    def test_no_neighbors_found(self, model):
        """A retriever that finds nothing is RETRO[OFF]."""

        def nothing(ids, mask):
            return torch.zeros(len(ids), 0, 8, dtype=torch.long), torch.zeros(len(ids), 0, 8)

        prompt = random_ids(2, 6)
        generated = model.generate(prompt, retriever=nothing, max_new_tokens=8, **GREEDY)
        assert torch.equal(generated, model.model.backbone.generate(prompt, max_new_tokens=8, **GREEDY))


class TestTrace:
    """`retrieval_trace` says what was retrieved, for each sequence."""

    @staticmethod
    def expected(row, offset=0):
        """The trace of a row whose last token was never an input."""
        cells = [-1] * offset + list(row[:-1])
        entries = []
        for index in range(len(cells) // CHUNK_SIZE):
            chunk = torch.tensor([cells[index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE]])
            real = chunk >= 0
            ids, mask = hash_retriever()(chunk.clamp(min=0), real)
            entries.append(
                {
                    "chunk": index,
                    "chunk_input_ids": chunk[real].tolist(),
                    "neighbor_input_ids": [i[m.bool()].tolist() for i, m in zip(ids[0], mask[0], strict=True)],
                }
            )
        return entries

    def test_without_retrieval_nothing_was_read(self, llama):
        """The trace is there, and empty."""
        out = llama.generate(**left_padded([3, 9]), max_new_tokens=2, return_dict_in_generate=True, **GREEDY)
        assert out.retrieval_trace == [[], []]

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_beams": 3, "num_return_sequences": 2},
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"prefill_chunk_size": 2},
        ],
    )
    def test_of_left_padded_rows(self, llama, options):
        """Chunks are counted so that the row's prompt ends one, however it was generated."""
        lengths = [3, 9, 6]
        out = llama.generate(
            **left_padded(lengths),
            retriever=hash_retriever(),
            max_new_tokens=10,
            return_dict_in_generate=True,
            **options,
            **GREEDY,
        )
        per_row = len(out.sequences) // 3
        assert len(out.retrieval_trace) == len(out.sequences)
        for index, (sequence, trace) in enumerate(zip(out.sequences.tolist(), out.retrieval_trace, strict=True)):
            length = lengths[index // per_row]
            assert trace == self.expected(sequence[9 - length :], -length % CHUNK_SIZE)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}])
    def test_with_offsets(self, llama, options):
        """Offsets shift the grid of each row."""
        offsets = [3, 1]
        out = llama.generate(
            random_ids(2, 6),
            chunk_offset=torch.tensor(offsets),
            retriever=hash_retriever(),
            max_new_tokens=9,
            return_dict_in_generate=True,
            **options,
            **GREEDY,
        )
        per_row = len(out.sequences) // 2
        for index, (sequence, trace) in enumerate(zip(out.sequences.tolist(), out.retrieval_trace, strict=True)):
            assert trace == self.expected(sequence, offsets[index // per_row])

    def test_of_a_finished_row(self, llama):
        """A row that ends early has the tokens and the trace it has alone; what follows its end counts for nothing."""
        prompts = random_ids(4, 6)
        options = dict(
            retriever=hash_retriever(),
            max_new_tokens=17,
            do_sample=False,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        free = llama.generate(prompts, eos_token_id=None, **options).sequences
        eos = int(free[0, 9])  # ends row 0 early
        together = llama.generate(prompts, eos_token_id=eos, **options)
        for row in range(4):
            alone = llama.generate(prompts[row : row + 1], eos_token_id=eos, **options)
            length = alone.sequences.shape[1]
            assert torch.equal(together.sequences[row, :length], alone.sequences[0])
            assert together.retrieval_trace[row] == alone.retrieval_trace[0]
        assert (together.sequences[0] == 0).any()

    def test_of_the_retriever_itself(self, llama):
        """Scores, documents and text come from the retriever's own `trace`."""

        class Traced:
            def __init__(self):
                self.inner = hash_retriever()

            def __call__(self, ids, mask):
                return self.inner(ids, mask)

            def trace(self, ids, mask):
                return [f"{int(row.sum())} of {int(m.sum())}" for row, m in zip(ids, mask, strict=True)]

        out = llama.generate(
            random_ids(1, 6),
            chunk_offset=2,
            retriever=Traced(),
            max_new_tokens=4,
            return_dict_in_generate=True,
            **GREEDY,
        )
        row = out.sequences[0].tolist()
        texts = [entry["neighbors"] for entry in out.retrieval_trace[0]]
        assert texts == [f"{sum(row[:2])} of 2", f"{sum(row[2:6])} of 4"]

    def test_of_a_second_turn(self, llama):
        """On a returned cache the offset of the first turn still counts, and earlier chunks are not repeated."""
        options = dict(retriever=hash_retriever(), max_new_tokens=6, return_dict_in_generate=True, **GREEDY)
        first = llama.generate(random_ids(1, 6), chunk_offset=3, **options)
        prompt = torch.cat([first.sequences, random_ids(1, 3, seed=1)], dim=1)
        second = llama.generate(prompt, **{CACHE_NAME: first[CACHE_NAME]}, **options)
        whole = self.expected(second.sequences[0].tolist(), 3)
        assert first.retrieval_trace[0] + second.retrieval_trace[0] == whole

    @pytest.mark.parametrize("length", [1, 2, 3, 6])
    def test_of_a_second_turn_without_the_first(self, llama, length):
        """A prompt may leave out what the cache holds; its mask covers both. Chunks keep their numbers and their tokens."""
        options = dict(retriever=hash_retriever(), max_new_tokens=6, return_dict_in_generate=True, **GREEDY)
        first = llama.generate(random_ids(1, 6), chunk_offset=3, **options)
        turn = random_ids(1, length, seed=1)
        prompt = torch.cat([first.sequences, turn], dim=1)
        cache = copy.deepcopy(first[CACHE_NAME])
        whole = llama.generate(prompt, **{CACHE_NAME: first[CACHE_NAME]}, **options)
        new = torch.cat([first.sequences[:, -1:], turn], dim=1)  # the last token is not in the cache yet
        found = llama.generate(new, attention_mask=torch.ones_like(prompt), **{CACHE_NAME: cache}, **options)
        assert torch.equal(found.sequences[:, 1:], whole.sequences[:, first.sequences.shape[1] :])
        assert found.retrieval_trace == whole.retrieval_trace
        assert found.retrieval_trace[0]


class TextRetriever:
    """`hash_retriever` that also looks up texts, as sums of their letters, and knows the user turn in token 5."""

    def __init__(self):
        self.inner, self.texts = hash_retriever(), []

    def __call__(self, ids, mask):
        return self.inner(ids, mask)

    def look_up(self, texts):
        self.texts += texts
        ids = torch.tensor([[sum(map(ord, text)), 0, 0, 0] for text in texts])
        return hash_retriever(1)(ids, torch.ones_like(ids))

    def last_turns(self, ids, mask):
        rows = [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
        return [(f"turn {sum(row)}", row.index(5)) if 5 in row else None for row in rows]


class TestQuery:
    """What is looked up for a prompt: its last tokens, the last turn of a user, or a text of one's own."""

    @pytest.mark.parametrize("length", PROMPT_LENGTHS)
    def test_prompt_of_any_length_is_looked_up_before_the_first_token(self, model, length):
        """The logits of the first new token depend on what was found, however short the prompt."""
        options = dict(max_new_tokens=1, return_dict_in_generate=True, output_logits=True, **GREEDY)
        on = model.generate(random_ids(1, length), retriever=hash_retriever(), **options)
        off = model.generate(random_ids(1, length), **options)
        assert not torch.equal(on.logits[0], off.logits[0])
        assert on.retrieval_trace[0][-1]["chunk_input_ids"] == random_ids(1, length)[0, -CHUNK_SIZE:].tolist()

    def prompts(self):
        """A ragged batch: a chat, no chat, and another chat that ends with the same chunk as the first."""
        inputs = left_padded([9, 6, 11])
        ids = inputs["input_ids"]
        ids[ids == 5] = 6
        ids[0, -7], ids[2, -9] = 5, 5
        ids[2, -CHUNK_SIZE:] = ids[0, -CHUNK_SIZE:]
        return inputs

    @pytest.mark.parametrize(
        "options",
        [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"num_beams": 3, "num_return_sequences": 2}],
    )
    def test_rows_of_a_batch_are_those_alone(self, model, options):
        """Each row reads what was found for its own turn, before its first new token, in a batch or alone."""
        inputs, retriever = self.prompts(), TextRetriever()
        settings = dict(max_new_tokens=9, return_dict_in_generate=True, **GREEDY)
        together = model.generate(**inputs, retriever=retriever, **options, **settings)
        assert len(set(retriever.texts)) == 2
        per_row = len(together.sequences) // 3
        for row, length in enumerate([9, 6, 11]):
            prompt = inputs["input_ids"][row : row + 1, -length:]
            alone = model.generate(prompt, retriever=TextRetriever(), **options, **settings)
            for result in range(per_row):
                assert torch.equal(together.sequences[row * per_row + result, -length - 9 :], alone.sequences[result])
                assert together.retrieval_trace[row * per_row + result] == alone.retrieval_trace[result]
            queries = [entry.get("query") for entry in alone.retrieval_trace[0]]
            assert queries[0] == (f"turn {int(prompt.sum())}" if row != 1 else None)

    def test_same_as_neighbors_that_are_given(self, model):
        """A query is the neighbors of the prompt's last chunk; the chunks before it read nothing."""
        prompt, text = random_ids(1, 6), "a query"
        settings = dict(max_new_tokens=6, **GREEDY)
        found = model.generate(prompt, retriever=TextRetriever(), query=text, **settings)
        ids, mask = TextRetriever().look_up([text])
        given = {
            "neighbor_input_ids": torch.stack([torch.zeros_like(ids), ids], dim=1),
            "neighbor_attention_mask": torch.stack([torch.zeros_like(mask), mask], dim=1),
        }
        assert torch.equal(
            found, model.generate(prompt, retriever=hash_retriever(), chunk_offset=2, **given, **settings)
        )

    def test_of_ones_own_comes_before_the_turn(self, llama):
        """A text, or one per row, is looked up instead of the last turn of the user."""
        inputs = self.prompts()
        for query, expected in (("one", ["one"]), (["a", "b", "a"], ["a", "b"])):
            retriever = TextRetriever()
            llama.generate(**inputs, retriever=retriever, query=query, max_new_tokens=2, **GREEDY)
            assert retriever.texts == expected

    def test_counting_from_the_first_token_looks_no_turn_up(self, llama):
        """`chunk_offset=0` is the paper's count, in a chat, too."""
        retriever = TextRetriever()
        llama.generate(**self.prompts(), retriever=retriever, chunk_offset=0, max_new_tokens=2, **GREEDY)
        assert retriever.texts == []

    @pytest.mark.parametrize(
        "options",
        [
            {"query": "a text"},
            {"query": "a text", "retriever": hash_retriever()},
            {"query": ["a", "b"], "retriever": TextRetriever()},
            {"query": " ", "retriever": TextRetriever()},
            {"query": "a text", "retriever": TextRetriever(), "chunk_offset": 1},
            {"query": "a text", "retriever": TextRetriever(), **random_neighbors(1, 1)},
        ],
    )
    def test_that_cannot_be_read_is_refused(self, llama, options):
        """Without a retriever of texts, with a wrong number of texts, or where the prompt ends no chunk."""
        with pytest.raises(ValueError):
            llama.generate(random_ids(1, 6), max_new_tokens=2, **options, **GREEDY)


class TestOffset:
    """`chunk_offset` in generate."""

    @pytest.mark.parametrize("length", [1, 5, 6, 8])
    def test_prompt_that_ends_a_chunk(self, model, length):
        """With `-length % m` the prompt's last token completes a chunk, whose neighbors the first new token sees."""
        prompt, retriever = random_ids(2, length), hash_retriever()
        offset = -length % CHUNK_SIZE
        options = dict(retriever=retriever, chunk_offset=offset, max_new_tokens=9, **GREEDY)
        cached = model.generate(prompt, **options)
        assert [len(call) for call in retriever.calls][0] == 2 * ((length + offset) // CHUNK_SIZE)
        assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))

    def test_one_per_row(self, model):
        """Ragged rows all end a chunk, and equal the rows alone."""
        lengths = [3, 9, 6]
        inputs = left_padded(lengths)
        offsets = -torch.tensor(lengths) % CHUNK_SIZE
        options = dict(retriever=hash_retriever(), max_new_tokens=9, **GREEDY)
        together = model.generate(**inputs, chunk_offset=offsets, **options)
        for row, length in enumerate(lengths):
            prompt = inputs["input_ids"][row : row + 1, -length:]
            alone = model.generate(prompt, chunk_offset=int(offsets[row]), **options)
            assert torch.equal(together[row, -length - 9 :], alone[0])
        beams = model.generate(**inputs, chunk_offset=offsets, num_beams=2, **options)
        assert torch.equal(
            beams, model.generate(**inputs, chunk_offset=offsets, num_beams=2, use_cache=False, **options)
        )


class TestEverydayOptions:
    """Streamers, stopping, processors: what users combine with generate."""

    def test_streamer(self, llama):
        """A streamer sees the prompt and then each token."""

        class Collect(BaseStreamer):
            tokens, ended = [], False

            def put(self, value):
                self.tokens += value.flatten().tolist()

            def end(self):
                self.ended = True

        streamer = Collect()
        out = llama.generate(
            random_ids(1, 6), retriever=hash_retriever(), max_new_tokens=8, streamer=streamer, **GREEDY
        )
        assert streamer.ended
        assert streamer.tokens == out[0].tolist()

    def test_stopping_and_processors(self, llama):
        """Custom stopping criteria and logits processors work as ever."""

        class StopAtEleven(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((len(input_ids),), input_ids.shape[1] >= 11)

        class Forbid(LogitsProcessor):
            def __call__(self, input_ids, scores):
                scores[:, 50:] = -torch.inf
                return scores

        out = llama.generate(
            random_ids(2, 6),
            retriever=hash_retriever(),
            max_new_tokens=20,
            stopping_criteria=StoppingCriteriaList([StopAtEleven(), MaxLengthCriteria(99)]),
            logits_processor=[Forbid()],
            **GREEDY,
        )
        assert out.shape == (2, 11)
        assert (out[:, 6:] < 50).all()

    def test_inputs_embeds_with_given_neighbors(self, llama):
        """A prompt of embeddings has no tokens to look up, but may bring its neighbors."""
        prompt = random_ids(2, 9)
        neighbors = random_neighbors(2, 2)
        embeds = llama.get_input_embeddings()(prompt)
        generated = llama.generate(inputs_embeds=embeds, chunk_offset=0, max_new_tokens=8, **neighbors, **GREEDY)
        expected = llama.generate(prompt, max_new_tokens=8, **neighbors, **GREEDY)
        assert torch.equal(generated, expected[:, 9:])
        with pytest.raises(ValueError, match="Retrieval needs `input_ids`"):
            llama.generate(inputs_embeds=embeds, retriever=hash_retriever(), max_new_tokens=8, **GREEDY)

    def test_inputs_embeds_with_their_tokens_and_a_retriever(self, llama):
        """The tokens are looked up, the embeddings are read."""
        prompt = random_ids(2, 9)
        embeds = llama.get_input_embeddings()(prompt)
        options = {"retriever": hash_retriever(), "max_new_tokens": 8, **GREEDY}
        generated = llama.generate(prompt, inputs_embeds=embeds, **options)
        assert torch.equal(generated, llama.generate(prompt, **options))
        with pytest.raises(ValueError, match="shape"):
            llama.generate(prompt, inputs_embeds=embeds[:, 1:], **options)

    def test_continuous_batching_without_a_retriever(self, llama):
        """Requests of other lengths give the tokens of `generate`."""
        prompts = [random_ids(1, length)[0].tolist() for length in (3, 9, 6)]
        options = GenerationConfig(
            max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        memory = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # else it takes most of the machine's
        outputs = llama.generate_batch(
            prompts, generation_config=options, continuous_batching_config=memory, progress_bar=False
        )
        found = [outputs[name].generated_tokens for name in sorted(outputs, key=lambda n: int(n.split("_")[-1]))]
        expected = [
            llama.generate(torch.tensor([p]), retriever=None, max_new_tokens=6, **GREEDY)[0, len(p) :] for p in prompts
        ]
        assert found == [row.tolist() for row in expected]


class _ReadsOnHost(TorchDispatchMode):
    """Collects where a tensor's value is read on the host, for which an accelerator would have to wait."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            self.reads.append("".join(traceback.format_stack(limit=6)))
        return func(*args, **(kwargs or {}))


class TestCost:
    """What a decoding step may cost."""

    @pytest.mark.parametrize("lengths", [[9, 9], [9, 6]])
    def test_steady_step_reads_nothing_back(self, llama, lengths, monkeypatch):
        """Between chunk borders RETRO reads no value on the host, and the backbone what it reads alone."""
        inputs = left_padded(lengths)
        if len(set(lengths)) == 1:
            inputs = {"input_ids": inputs["input_ids"]}

        def reads_of_a_step(model, **retrieval):
            cache = DynamicCache(config=llama.config.text_config)
            model(**inputs, **{CACHE_NAME: cache}, use_cache=True, **retrieval)
            step = {"input_ids": random_ids(2, 1), "position_ids": torch.tensor(lengths)[:, None]}
            if "attention_mask" in inputs:
                step["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(2, 1).long()], dim=1)
            listed = []
            with torch.no_grad(), _ReadsOnHost() as mode, monkeypatch.context() as patch:
                patch.setattr(inputs_retro, "_can_read", lambda tensor: False)  # as on an accelerator
                for name in ("tolist", "numpy"):
                    plain = getattr(torch.Tensor, name)
                    patch.setattr(torch.Tensor, name, lambda t, f=plain: (listed.append("list"), f(t))[1])
                model(**step, **{CACHE_NAME: cache}, use_cache=True, **retrieval)
            return mode.reads + listed

        retriever = hash_retriever()
        with_retrieval = reads_of_a_step(llama, retriever=retriever)
        assert len(retriever.calls) == 1
        assert len(with_retrieval) == len(reads_of_a_step(llama.model.backbone)), "\n\n".join(with_retrieval)
        assert not with_retrieval or "attention_mask" in inputs

    def test_history_does_not_grow(self, llama):
        """The state beside the cache has as many bytes after 40 chunks as after 10."""

        def size(num_chunks):
            out = llama.generate(
                random_ids(2, 6),
                retriever=hash_retriever(),
                max_new_tokens=num_chunks * CHUNK_SIZE - 2,
                return_dict_in_generate=True,
                **GREEDY,
            )
            state = out[CACHE_NAME].retrieval_state
            tensors = [state.input_ids, state.hidden_states, state.neighbor_mask]
            tensors += [tensor for pair in state.key_values.values() for tensor in pair]
            assert state.next_positions == [num_chunks * CHUNK_SIZE + 5] * 2
            return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

        assert size(10) == size(40)


@pytest.mark.parametrize("query", [5, True, b"text", object(), {"a": 1}, ["a", None], ["a", "b", "c"]])
def test_a_query_is_a_text_or_one_for_each_prompt(query):
    model = tiny_retro("llama")
    retriever = hash_retriever()
    with pytest.raises(ValueError, match="query"):
        model.generate(random_ids(2, 6), retriever=retriever, query=query, max_new_tokens=2, do_sample=False)
