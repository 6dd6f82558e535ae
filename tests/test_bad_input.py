"""Wrong input is refused with both values and the remedy, before anything is computed."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from .tiny import CHUNK_SIZE, VOCAB_SIZE, hash_retriever, random_ids, random_neighbors, tiny_backbone, tiny_retro


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    """A RETRO over Llama."""
    return tiny_retro("llama")


def ids_of(*shape, **kwargs):
    """Neighbor ids alone."""
    return {"neighbor_input_ids": torch.zeros(shape, dtype=torch.long, **kwargs)}


@pytest.mark.parametrize(
    ("neighbors", "message"),
    [
        (ids_of(2, 2, 8), r"shape \(2, any, num_neighbors, neighbor_size\), got \(2, 2, 8\)"),
        (ids_of(2, 2, 2, 8, 1), r"shape \(2, any, num_neighbors, neighbor_size\), got \(2, 2, 2, 8, 1\)"),
        (ids_of(3, 2, 2, 8), r"shape \(2, any, num_neighbors, neighbor_size\), got \(3, 2, 2, 8\)"),
        (ids_of(2, 5, 2, 8), r"of 5 chunks, but 9 tokens have only 2 complete chunks of 4.*`chunk_size`"),
        (ids_of(2, 2, 2, 0), r"at least one token, got shape \(2, 2, 2, 0\)"),
        ({"neighbor_input_ids": torch.zeros(2, 2, 2, 8)}, r"integer dtype \(torch.long\), got torch.float32"),
        ({"neighbor_input_ids": torch.ones(2, 2, 2, 8).bool()}, r"integer dtype \(torch.long\), got torch.bool"),
        ({"neighbor_input_ids": [[[[1] * 8] * 2] * 2] * 2}, r"tensors of shape .* got list"),
        (
            {"neighbor_input_ids": torch.full((2, 2, 2, 8), VOCAB_SIZE)},
            r"ids from 99 to 99, but the model's vocabulary has 99 tokens.*another tokenizer",
        ),
        ({"neighbor_input_ids": torch.full((2, 2, 2, 8), -1)}, r"ids from -1 to -1.*99 tokens"),
        (
            {**ids_of(2, 2, 2, 8), "neighbor_attention_mask": torch.ones(2, 2, 2)},
            r"mask .*shape of the ids \(2, 2, 2, 8\), got \(2, 2, 2\)",
        ),
        ({**ids_of(2, 2, 2, 8), "neighbor_attention_mask": [1]}, r"tensors of shape .* got list"),
        ({"neighbor_attention_mask": torch.ones(2, 2, 2, 8)}, r"without `neighbor_input_ids`. Give both"),
        (
            {**ids_of(2, 1, 2, 8), "neighbor_chunk_size": torch.tensor([8, 8])},
            r"looked up for chunks of \[8\] tokens, but the model has chunks of 4.*chunk_size=4",
        ),
    ],
)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["default", "no_cache"])
def test_neighbor_tensors(model, neighbors, message, options):
    """Rank, batch, chunk count, length, dtype, vocabulary and mask of given neighbors."""
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 9), **neighbors, **options)


def test_padding_ids_of_neighbors_may_be_anything(model):
    """What stands at masked places is never read, -100 or another tokenizer's padding included."""
    neighbors = random_neighbors(2, 2, ragged=True)
    mask = neighbors["neighbor_attention_mask"].bool()
    expected = model(random_ids(2, 9), **neighbors).logits
    neighbors["neighbor_input_ids"] = neighbors["neighbor_input_ids"].masked_fill(~mask, -100)
    assert torch.equal(model(random_ids(2, 9), **neighbors).logits, expected)


def test_fewer_chunks_and_other_dtypes_work(model):
    """Neighbors may end early, and be int32."""
    ids = random_ids(2, 9)
    neighbors = random_neighbors(2, 1)
    expected = model(ids, **neighbors).logits
    small = {name: value.int() for name, value in neighbors.items()}
    torch.testing.assert_close(model(ids, **small).logits, expected)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(4, 2, 8).long(), r"pair \(neighbor_input_ids, neighbor_attention_mask\), got Tensor"),
        ([torch.zeros(4, 2, 8).long(), torch.ones(4, 2, 8)], r"pair .*got list"),
        ((torch.zeros(4, 2, 8).long(),), r"pair .*got a tuple of 1"),
        (([[1]], None), r"tensors of shape \(4, num_neighbors, neighbor_size\), got list"),
        ((torch.zeros(4, 8).long(), None), r"\(4, num_neighbors, neighbor_size\), got \(4, 8\)"),
        ((torch.zeros(3, 2, 8).long(), None), r"\(4, num_neighbors, neighbor_size\), got \(3, 2, 8\)"),
        ((torch.zeros(4, 2, 8), None), r"integer dtype \(torch.long\), got torch.float32"),
        ((torch.zeros(4, 2, 8).long(), torch.ones(4, 2)), r"shape of the ids \(4, 2, 8\), got \(4, 2\)"),
        ((torch.full((4, 2, 8), 30521), None), r"30521 to 30521, but the model's vocabulary has 99"),
        (None, r"pair .*got NoneType"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_answers_of_a_retriever(model, answer, message, call):
    """What a retriever returns is checked, in forward and in generate, and named as the retriever's."""
    run = (
        model
        if call == "forward"
        else lambda ids, **kw: model.generate(ids, max_new_tokens=2, chunk_offset=0, **kw, **GREEDY)
    )
    with pytest.raises(ValueError, match=rf"(?i)(the retriever) .*{message}"):
        run(random_ids(2, 9), retriever=lambda ids, mask: answer)


def test_a_mask_of_none_means_all_tokens(model):
    """A retriever without padding may leave the mask out."""
    inner = hash_retriever(1)
    expected = model(random_ids(2, 9), retriever=inner).logits
    assert torch.equal(
        model(random_ids(2, 9), retriever=lambda ids, mask: (inner(ids, mask)[0], None)).logits, expected
    )


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_retriever_that_raises(model, call):
    """Its error comes through, with what it was asked, and stays the cause."""

    def broken(ids, mask):
        raise ConnectionError("no route to the store")

    run = (
        model
        if call == "forward"
        else lambda ids, **kw: model.generate(ids, max_new_tokens=2, chunk_offset=0, **kw, **GREEDY)
    )
    with pytest.raises(RuntimeError, match=r"failed on 4 chunks of 4 tokens: ConnectionError: no route") as caught:
        run(random_ids(2, 9), retriever=broken)
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize("retriever", ["org/wiki", 3, hash_retriever()(random_ids(1, 4), torch.ones(1, 4))])
def test_a_retriever_that_cannot_be_called(model, retriever):
    """A name, a number or an answer in place of a retriever."""
    message = rf"must be callable .*got {type(retriever).__name__}.*RetroRetriever.from_pretrained"
    for call in (
        lambda: model(random_ids(1, 5), retriever=retriever),
        lambda: model.generate(random_ids(1, 5), retriever=retriever, max_new_tokens=2),
        lambda: model.set_retriever(retriever),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("offset", [-1, CHUNK_SIZE, 1.0, "0", torch.tensor([0, 4]), torch.tensor([0, 0, 0]), [1]])
def test_chunk_offset(model, offset):
    """Offsets out of range, of another type or number of rows."""
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=r"from 0 to 3, or one per row of the batch of 2, got"):
            model(random_ids(2, 9), chunk_offset=offset, retriever=hash_retriever(), use_cache=use_cache)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_more_tokens_than_positions(family):
    """A prompt, or a generation, beyond the position table is refused with both lengths; up to it all works."""
    model = tiny_retro(family, text_config={"max_position_embeddings" if family == "opt" else "n_positions": 12})
    retriever = hash_retriever()
    assert model(random_ids(1, 12), retriever=retriever).logits.shape[1] == 12
    with pytest.raises(ValueError, match=r"has 13 tokens.*position table ends at 12. Shorten.*max_new_tokens"):
        model(random_ids(1, 13), retriever=retriever)
    assert model.generate(random_ids(1, 8), retriever=retriever, max_new_tokens=5, **GREEDY).shape[1] == 13
    with pytest.raises(ValueError, match=r"has 13 tokens.*position table ends at 12"):
        model.generate(random_ids(1, 8), retriever=retriever, max_new_tokens=6, **GREEDY)


def test_relative_positions_have_no_end():
    """The paper's decoder reads on beyond its training length."""
    model = tiny_retro(text_config={"max_position_embeddings": 12})
    assert model(random_ids(1, 20), retriever=hash_retriever()).logits.shape[1] == 20


def test_embeddings_cannot_be_looked_up(model):
    """`inputs_embeds` have no tokens for a retriever."""
    embeds = torch.zeros(1, 9, 32)
    with pytest.raises(ValueError, match=r"Retrieval needs `input_ids`.*`neighbor_input_ids`, or `retriever=None`"):
        model(inputs_embeds=embeds, retriever=hash_retriever())
    assert model(inputs_embeds=embeds, retriever=None).logits.shape[1] == 9


def test_both_ids_and_embeddings(model):
    """One of the two, not both and not neither."""
    for inputs in ({}, {"input_ids": random_ids(1, 9), "inputs_embeds": torch.zeros(1, 9, 32)}):
        with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
            model(**inputs)
        with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
            model.model(**inputs, retriever=hash_retriever())


@pytest.mark.parametrize("shape", [(0, 9), (2, 0)])
def test_no_tokens(model, shape):
    """An empty batch, or rows without a token."""
    with pytest.raises(ValueError, match=r"no tokens.*\(\d, \d\) \(batch, tokens\)"):
        model(torch.zeros(shape, dtype=torch.long), retriever=hash_retriever())


@pytest.mark.parametrize("shape", [(2, 8), (2, 10), (1, 9)])
def test_attention_mask_of_another_shape(model, shape):
    """A mask that is shorter or longer than the input would shift every chunk."""
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(2, 9\).*got \(\d, \d+\)"):
        model(random_ids(2, 9), attention_mask=torch.ones(shape), retriever=hash_retriever(), use_cache=False)


def test_attention_mask_that_forgets_the_cache(model):
    """With a cache the mask covers the cached tokens too."""
    cache = DynamicCache(config=model.config.text_config)
    model(random_ids(2, 5), past_key_values=cache, use_cache=True, retriever=hash_retriever())
    with pytest.raises(ValueError, match=r"shape \(2, 8\), one entry per token of the input and of the cache"):
        model(
            random_ids(2, 3),
            attention_mask=torch.ones(2, 3),
            past_key_values=cache,
            use_cache=True,
            retriever=hash_retriever(),
        )


def test_packed_rows(model):
    """Positions that restart inside a row would run chunks across sequences."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match=r"`position_ids` restart.*row of its own"):
        model(random_ids(1, 9), position_ids=positions, retriever=hash_retriever())
    with pytest.raises(ValueError, match=r"`position_ids` restart"):
        model(random_ids(1, 9), position_ids=positions, use_cache=False, **random_neighbors(1, 2))


def test_cache_filled_without_retrieval(model):
    """Its chunks are unknown, so retrieval cannot begin in the middle."""
    cache = DynamicCache(config=model.config.text_config)
    model(random_ids(2, 5), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"holds 5 tokens .*without retrieval.*empty cache"):
        model(random_ids(2, 1), past_key_values=cache, use_cache=True, retriever=hash_retriever())


def test_cache_of_another_batch(model):
    """A cache with more rows than the input."""
    cache = DynamicCache(config=model.config.text_config)
    model(random_ids(3, 5), past_key_values=cache, use_cache=True, retriever=hash_retriever())
    with pytest.raises(ValueError, match=r"cache holds 3 rows, the input 2.*batch_select_indices"):
        model(random_ids(2, 1), past_key_values=cache, use_cache=True, retriever=hash_retriever())


def test_neighbor_sizes_of_tensors_and_retriever(model):
    """Given neighbors and the retriever's must have one length."""
    with pytest.raises(ValueError, match=r"of 6 tokens, `neighbor_input_ids` has 8.*neighbor_size"):
        model(random_ids(1, 9), retriever=hash_retriever(2, 6), **random_neighbors(1, 1))


def test_continuous_batching_with_a_retriever_is_refused(model):
    """It would pack requests into one row; its own machinery would hide the error and cut the output."""
    model = tiny_retro("llama")
    model.set_retriever(hash_retriever())
    for call in (
        lambda: model.generate_batch([[5, 6, 7]]),
        lambda: model.init_continuous_batching(),
        lambda: model.generate(random_ids(1, 5), cache_implementation="paged", max_new_tokens=2),
    ):
        with pytest.raises((NotImplementedError, ValueError), match=r"(?i)continuous batching|paged"):
            call()


@pytest.mark.parametrize("make", [tiny_backbone, tiny_retro])
def test_continuous_batching_of_the_papers_decoder_is_refused(make):
    """Its relative positions would count across the packed sequences."""
    with pytest.raises(NotImplementedError):
        make("retro_decoder").generate_batch([[5, 6, 7]])


@pytest.mark.parametrize("retriever", [None, hash_retriever()])
def test_an_empty_prompt_is_refused(model, retriever):
    with pytest.raises(ValueError, match="no tokens"):
        model.generate(torch.empty(2, 0, dtype=torch.long), retriever=retriever, max_new_tokens=3)


def test_embeddings_must_say_where_their_chunks_begin(model):
    """Virtual tokens before the text would shift its chunks against the given neighbors."""
    embeds, neighbors = model.get_input_embeddings()(random_ids(2, 9)), random_neighbors(2, 2)
    looked_up_for = {"neighbor_chunk_size": torch.tensor([4, 4]), "chunk_offset": torch.tensor([0, 0])}
    for unclear in ({}, looked_up_for):
        with pytest.raises(ValueError, match="chunk_offset"):
            model(inputs_embeds=embeds, **neighbors, **unclear)
    expected = model(random_ids(2, 9), **neighbors).logits
    assert torch.equal(model(inputs_embeds=embeds, chunk_offset=0, **neighbors).logits, expected)


def test_early_exit_is_refused(model):
    """The layers left out could not read what the pass retrieved."""
    with pytest.raises(NotImplementedError):
        model.generate(random_ids(1, 5), assistant_early_exit=1, max_new_tokens=2, do_sample=False)
