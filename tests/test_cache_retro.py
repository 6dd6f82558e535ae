"""The state that rides on a cache: rows move with it, tokens are taken back with it, and any cache class will do."""

import copy
import pickle

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from retro_hf.model import cache_retro, modeling_retro_decoder
from retro_hf.model.cache_retro import ROOM, RetrievalState, RetroCacheMixin, attach_state
from retro_hf.model.compatibility_retro import CACHE_NAME

from .tiny import CHUNK_SIZE, hash_retriever, neighbors_from, random_ids, tiny_backbone, tiny_retro


@pytest.fixture(scope="module")
def model():
    """A RETRO over Llama."""
    return tiny_retro("llama", scale=0.3)


@pytest.fixture(autouse=True)
def _no_grad():
    """As generate does."""
    with torch.no_grad():
        yield


def feed(model, ids, cache=None, **kwargs):
    """Feed tokens with a cache."""
    cache = DynamicCache(config=model.config.text_config) if cache is None else cache
    return model(ids, past_key_values=cache, use_cache=True, retriever=hash_retriever(), **kwargs)


def full(model, ids):
    """Logits of one pass without a cache."""
    return model(ids, use_cache=False, **neighbors_from(hash_retriever(), ids)).logits


def assert_continues(model, cache, seen, seed=9):
    """The cache continues `seen` as a full pass would, across the next chunk border."""
    new = random_ids(len(seen), CHUNK_SIZE + 2, seed=seed)
    expected = full(model, torch.cat([seen, new], dim=1))[:, seen.shape[1] :]
    pieces = [feed(model, new[:, i : i + 1], cache).logits for i in range(new.shape[1])]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 5, 8, 11])
def test_rows_can_be_selected(model, length):
    """Selected and reordered rows, also fewer or more than before, continue as their own."""
    ids = random_ids(3, length)
    for rows in ([2, 0, 1], [1], [0, 0, 2, 2]):
        cache = feed(model, ids)[CACHE_NAME]
        cache.batch_select_indices(torch.tensor(rows))
        assert_continues(model, cache, ids[rows])


@pytest.mark.parametrize("length", [1, 5, 8, 11])
def test_rows_can_be_repeated_and_reordered(model, length):
    """What beam search does."""
    ids = random_ids(2, length)
    cache = feed(model, ids)[CACHE_NAME]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0, 3, 3]))
    assert_continues(model, cache, ids[[0, 0, 1, 1]])


def test_ragged_rows_can_be_reordered(model):
    """Rows at different places of their chunks take these places along."""
    ids, mask = random_ids(2, 9), torch.ones(2, 9).long()
    mask[0, :4] = 0
    cache = feed(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))[CACHE_NAME]
    assert cache.retrieval_state.next_positions == [5, 9]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.retrieval_state.next_positions == [9, 5]


@pytest.mark.parametrize("length", [5, 8, 9, 11, 12, 14])
@pytest.mark.parametrize("number", range(1, CHUNK_SIZE + 1))
def test_up_to_a_chunk_can_be_taken_back(model, length, number):
    """Crop to every place, also across a border, after which other tokens follow."""
    ids = random_ids(2, length)
    cache = feed(model, ids[:, :3])[CACHE_NAME]
    feed(model, ids[:, 3:], cache)
    cache.crop(-number)
    assert_continues(model, cache, ids[:, : length - number])


def test_taking_back_step_by_step(model):
    """Tokens fed one by one, taken back and replaced again and again."""
    ids = random_ids(1, 6)
    cache = feed(model, ids)[CACHE_NAME]
    for seed in range(4):
        for token in random_ids(1, 4, seed=seed).split(1, dim=1):
            feed(model, token, cache)
        cache.crop(-3)
        ids = torch.cat([ids, random_ids(1, 4, seed=seed)[:, :1]], dim=1)
    assert_continues(model, cache, ids)


def test_more_than_a_chunk_cannot_be_taken_back(model):
    """The error says how much is kept, and the cache is as before."""
    ids = random_ids(2, 11)
    cache = feed(model, ids)[CACHE_NAME]
    with pytest.raises(ValueError, match=r"take back 5 tokens.*keeps one chunk of 4"):
        cache.crop(-5)
    assert_continues(model, cache, ids)


def test_a_positive_number_of_tokens_cannot_be_taken_back(model):
    """Some releases of transformers take it for the length to keep."""
    cache = feed(model, random_ids(2, 7))[CACHE_NAME]
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)
    assert int(cache.get_seq_length()) == cache.retrieval_state.num_columns == 7


def test_failed_retrieval_leaves_the_cache_as_it_was(model):
    """After an error of the retriever the same step can be tried again."""
    ids = random_ids(2, 7)
    cache = feed(model, ids)[CACHE_NAME]

    def broken(ids, mask):
        raise ConnectionError("no route to the store")

    step = random_ids(2, 1, seed=4)
    with pytest.raises(RuntimeError, match=r"The retriever failed on 2 chunks.*ConnectionError: no route"):
        model(step, past_key_values=cache, use_cache=True, retriever=broken)
    feed(model, step, cache)
    assert_continues(model, cache, torch.cat([ids, step], dim=1))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_any_cache_is_upgraded_in_place(model, kind):
    """Identity and class of the caller's cache are kept; only the state is new."""
    config = model.config.text_config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=20)
    before = type(cache)
    assert feed(model, random_ids(2, 6), cache)[CACHE_NAME] is cache
    assert isinstance(cache, before)
    assert isinstance(cache, RetroCacheMixin)
    assert int(cache.get_seq_length()) == 6
    assert cache.retrieval_state.next_positions == [6, 6]


def test_reset_forgets_everything(model):
    """A static cache can be used for the next prompt."""
    cache = StaticCache(config=model.config.text_config, max_cache_len=20)
    feed(model, random_ids(2, 11), cache)
    cache.reset()
    ids = random_ids(2, 6, seed=5)
    feed(model, ids, cache)
    assert cache.retrieval_state.next_positions == [6, 6]
    assert_continues(model, cache, ids)


def test_caches_can_be_copied_and_pickled(model):
    """A prompt's cache is computed once and kept, in memory or on disk."""
    ids = random_ids(2, 9)
    cache = feed(model, ids)[CACHE_NAME]
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert isinstance(twin, DynamicCache)
        assert_continues(model, twin, ids)
    assert_continues(model, cache, ids)


def test_caches_without_retrieval_are_left_alone(model):
    """Off, the cache stays what it was."""
    cache = DynamicCache(config=model.config.text_config)
    model(random_ids(2, 6), past_key_values=cache, use_cache=True)
    assert type(cache) is DynamicCache


def test_state_of_another_length_is_told():
    """The state knows its rows, on the host."""
    state = RetrievalState([0, 3], CHUNK_SIZE)
    assert state.next_positions == [0, 3]
    assert not state.is_started
    cache = DynamicCache()
    attach_state(cache, state)
    assert cache.retrieval_state is state


def test_new_keys_are_written_behind_the_old_ones(model):
    """A step copies one token: the buffers of the backbone's keys and values stay where they are, with little room."""
    cache = feed(model, random_ids(2, 6))[CACHE_NAME]
    before = [layer.keys.data_ptr() for layer in cache.layers]
    for token in random_ids(2, 5, seed=1).split(1, dim=1):
        feed(model, token, cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert all(layer.keys.shape[-2] == 11 for layer in cache.layers)
    room = [layer.keys.untyped_storage().nbytes() // layer.keys[..., :1, :].nbytes for layer in cache.layers]
    assert room == [ROOM] * len(cache.layers)


@pytest.mark.parametrize("family", ["retro_decoder", "llama"])
def test_keys_and_distances_outgrow_their_buffers(family, monkeypatch):
    """The next buffer continues where the full one ended, also after tokens were taken back."""
    monkeypatch.setattr(cache_retro, "ROOM", 4)
    monkeypatch.setattr(modeling_retro_decoder, "SINUSOID_BLOCK", 4)
    model, ids = tiny_retro(family, scale=0.3), random_ids(2, 3)
    cache = feed(model, ids)[CACHE_NAME]
    assert_continues(model, cache, ids)
    cache.crop(-4)
    assert_continues(model, cache, torch.cat([ids, random_ids(2, CHUNK_SIZE + 2, seed=9)[:, :2]], dim=1), seed=3)


@pytest.mark.parametrize("family", ["retro_decoder", "llama"])
@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_may_begin_or_end(family, first):
    """A cache that was made in inference mode can be continued outside of it, and the other way round."""
    model, ids = tiny_retro(family, scale=0.3), random_ids(2, 6)
    with torch.inference_mode(first), torch.no_grad():
        cache = feed(model, ids)[CACHE_NAME]
    with torch.inference_mode(not first), torch.no_grad():
        assert_continues(model, cache, ids)


@pytest.mark.parametrize("family", ["retro_decoder", "llama"])
def test_gradients_flow_through_a_cache(family):
    """Pieces fed with a cache give the gradients of one pass."""
    model, ids = tiny_retro(family, scale=0.3), random_ids(2, 11)

    def gradients(logits):
        model.zero_grad()
        logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with torch.enable_grad():
        expected = gradients(full(model, ids))
        cache, pieces = None, []
        for piece in ids.split([5, 1, 1, 1, 1, 2], dim=1):
            out = feed(model, piece, cache)
            cache = out[CACHE_NAME]
            pieces.append(out.logits)
        found = gradients(torch.cat(pieces, dim=1))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_a_step_compiles_as_one_graph(model):
    """Between chunk borders nothing that the state does breaks the graph, where Llama itself compiles as one."""
    ids = random_ids(2, 6)
    try:
        llama = tiny_backbone("llama", num_hidden_layers=1)
        torch.compile(llama, backend="eager", fullgraph=True)(ids, use_cache=False)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"PyTorch {torch.__version__} cannot compile Llama itself as one graph: {error}")
    cache, twin = (feed(model, ids)[CACHE_NAME] for _ in range(2))
    neighbors = neighbors_from(hash_retriever(), ids)
    step = dict(input_ids=random_ids(2, 1, seed=1), use_cache=True, **neighbors)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits = compiled(past_key_values=cache, **step).logits
    torch.testing.assert_close(logits, model(past_key_values=twin, **step).logits)
