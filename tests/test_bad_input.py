"""Wrong input is refused with both values and the remedy, before anything is computed."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from retro_hf.model.compatibility_retro import CACHE_NAME

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
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model(**inputs)
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model.model(**inputs, retriever=hash_retriever())


IDS = random_ids(2, 9)
MODELS = {
    "llama": lambda: tiny_retro("llama"),
    "gpt2": lambda: tiny_retro("gpt2"),
    "parallel_context": lambda: tiny_retro("llama", reader="parallel_context"),
    "retro_decoder": lambda: tiny_retro("retro_decoder"),
    "baseline": lambda: tiny_backbone("retro_decoder"),
}


@pytest.fixture(scope="module", params=MODELS)
def any_model(request):
    """Both readers, three families, and the paper's decoder by itself."""
    return MODELS[request.param]()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": IDS[0]}, r"shape \(batch, tokens\).*unsqueeze\(0\).*got \(9,\)"),
        ({"input_ids": torch.tensor(5)}, r"shape \(batch, tokens\).*got \(\)"),
        ({"input_ids": IDS[None]}, r"shape \(batch, tokens\).*got \(1, 2, 9\)"),
        ({"input_ids": IDS[:, :0]}, r"no tokens.*\(2, 0\)"),
        ({"input_ids": IDS[:0]}, r"no (rows|tokens).*\(0, 9\)"),
        ({"input_ids": IDS[0, :0]}, r"shape \(batch, tokens\).*got \(0,\)"),
        ({"input_ids": IDS.tolist()}, r"tensor.*got list.*return_tensors"),
        ({"input_ids": "a text"}, r"tensor.*got str.*return_tensors"),
        ({"input_ids": {"input_ids": IDS}}, r"tensor.*got dict.*\*\*inputs"),
        ({"input_ids": IDS.numpy()}, r"tensor.*got ndarray.*torch.tensor"),
        ({"input_ids": IDS.float()}, r"torch.long or torch.int, got torch.float32.*long\(\)"),
        ({"input_ids": IDS.bool()}, r"torch.long or torch.int, got torch.bool"),
        ({"input_ids": IDS.short()}, r"torch.long or torch.int, got torch.int16"),
        ({"input_ids": torch.full((2, 9), VOCAB_SIZE)}, r"ids from 99 to 99.*0 to 98.*resize_token_embeddings"),
        ({"input_ids": torch.full((2, 9), -100)}, r"ids from -100 to -100.*0 to 98"),
        ({"inputs_embeds": torch.zeros(9, 32)}, r"shape \(batch, tokens, 32\), got \(9, 32\)"),
        ({"inputs_embeds": torch.zeros(2, 9, 31)}, r"shape \(batch, tokens, 32\), got \(2, 9, 31\)"),
        ({"inputs_embeds": torch.zeros(2, 9, 32).long()}, r"floating-point dtype, got torch.int64"),
        ({"inputs_embeds": torch.zeros(2, 0, 32)}, r"no tokens.*\(2, 0\)"),
        ({"inputs_embeds": [[1.0]]}, r"shape \(batch, tokens, 32\), got list"),
        ({"input_ids": IDS, "attention_mask": torch.ones(9)}, r"shape \(2, 9\).*got \(9,\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 9, 9)}, r"shape \(2, 9\).*got \(2, 9, 9\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(3, 9)}, r"shape \(2, 9\).*got \(3, 9\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 8)}, r"shape \(2, 9\).*got \(2, 8\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 8, 8)}, r"shape \(2, 9\).*got \(2, 1, 8, 8\)"),
        ({"input_ids": IDS, "attention_mask": [[1] * 9] * 2}, r"shape \(2, 9\), got list"),
        ({"input_ids": IDS, "position_ids": torch.arange(9)}, r"shape \(2, 9\).*got \(9,\)"),
        ({"input_ids": IDS, "position_ids": torch.arange(8)[None]}, r"shape \(2, 9\).*got \(1, 8\)"),
        ({"input_ids": IDS, "position_ids": torch.arange(27).view(3, 9)}, r"shape \(2, 9\).*got \(3, 9\)"),
        ({"input_ids": IDS, "position_ids": torch.arange(9.0)[None]}, r"integers.*got torch.float32"),
        ({"input_ids": IDS, "position_ids": [[0] * 9]}, r"integers.*got list"),
    ],
)
@pytest.mark.parametrize("retrieves", [False, True])
def test_wrong_inputs_of_any_language_model_are_refused(any_model, inputs, message, retrieves):
    """Ids, embeddings, masks and positions: in forward and in generate, with a retriever and without one."""
    is_baseline = not hasattr(any_model, "set_retriever")
    options = {"retriever": hash_retriever()} if retrieves and not is_baseline else {}
    with pytest.raises(ValueError, match=message):
        any_model(**inputs, **options)
    with pytest.raises(ValueError, match=message):
        any_model.generate(**inputs, **options, max_new_tokens=2, **GREEDY)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (IDS[0], r"shape of the input \(2, 9\), got \(9,\)"),
        (IDS[:, :7], r"shape of the input \(2, 9\), got \(2, 7\)"),
        (IDS.tolist(), r"tensor of token ids, got list"),
        (IDS.float(), r"torch.long, got torch.float32.*long\(\)"),
        (torch.full((2, 9), VOCAB_SIZE), r"`labels` holds ids from 99 to 99.*0 to 98, or -100"),
        (torch.full((2, 9), -1), r"`labels` holds ids from -1 to -1"),
    ],
)
def test_labels(any_model, labels, message):
    with pytest.raises(ValueError, match=message):
        any_model(IDS, labels=labels)


def test_labels_may_leave_tokens_out(any_model):
    """-100 means no loss, and so does another number that the caller names."""
    labels = IDS.clone()
    labels[:, :5] = -100
    expected = any_model(IDS, labels=labels).loss
    assert torch.equal(any_model(IDS, labels=labels.clamp(min=-1), ignore_index=-1).loss, expected)


@pytest.mark.parametrize("cache", [((torch.zeros(2, 4, 3, 8),) * 2,) * 4, [1], "dynamic"])
def test_a_cache_that_is_none(any_model, cache):
    with pytest.raises(TypeError, match=rf"must be a cache of transformers, got {type(cache).__name__}"):
        any_model(IDS, **{CACHE_NAME: cache})
    with pytest.raises(TypeError, match=rf"must be a cache of transformers, got {type(cache).__name__}"):
        any_model.generate(IDS, **{CACHE_NAME: cache}, max_new_tokens=2, **GREEDY)


@pytest.mark.parametrize("positions", [torch.arange(9)[None] - 20, torch.arange(9)[None] + 120])
def test_positions_beyond_the_table(positions):
    """A table has an end on both sides; rotary and relative positions have none."""
    with pytest.raises(ValueError, match=r"table has those from 0 to 127"):
        tiny_retro("gpt2")(IDS, position_ids=positions)
    assert tiny_retro("llama")(IDS, position_ids=positions.clamp(min=0)).logits.shape == (2, 9, VOCAB_SIZE)


@pytest.mark.parametrize("name", ["neighbour_input_ids", "neighbors", "chunk_offsets", "retrieve"])
def test_a_misspelt_argument_of_retrieval(model, name):
    """A model would take it among its other arguments, and run without retrieval."""
    with pytest.raises(TypeError, match=rf"no argument `{name}`.*Did you mean"):
        model(IDS, **{name: None})


@pytest.mark.parametrize("looked_up", [4, [4, 4], torch.tensor(4), torch.tensor([[4], [4]])])
def test_forms_of_neighbor_chunk_size(model, looked_up):
    """One number says it, too; a wrong one is refused in every form."""
    neighbors = random_neighbors(2, 2)
    assert torch.equal(model(IDS, neighbor_chunk_size=looked_up, **neighbors).logits, model(IDS, **neighbors).logits)
    with pytest.raises(ValueError, match=r"chunks of \[8\] tokens"):
        model(IDS, neighbor_chunk_size=2 * torch.as_tensor(looked_up), **neighbors)


@pytest.mark.parametrize("shape", [(2, 8), (2, 10), (1, 9)])
def test_attention_mask_of_another_shape(model, shape):
    """A mask that is shorter or longer than the input would shift every chunk."""
    for retriever in (None, hash_retriever()):
        with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(2, 9\).*got \(\d, \d+\)"):
            model(IDS, attention_mask=torch.ones(shape), retriever=retriever, use_cache=False)


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


@pytest.mark.parametrize("way", ["given", "retriever"])
def test_longer_neighbors_than_the_model_is_made_for_are_told(way, caplog):
    """They are read, and nothing else says that the datastore and the model have other sizes."""
    from retro_hf.model import retriever_protocol_retro

    model, ids = tiny_retro("llama", chunk_size=4, neighbor_size=8).eval(), random_ids(1, 9)
    retriever_protocol_retro.logger.warning_once.cache_clear()
    with caplog.at_level("WARNING", logger="retro_hf.model.retriever_protocol_retro"):
        for size in (8, 12):
            if way == "given":
                model(ids, neighbor_input_ids=torch.randint(1, 90, (1, 2, 2, size)))
            else:
                retriever = hash_retriever()
                retriever.neighbor_size = size
                model.set_retriever(retriever)
            told = [record for record in caplog.records if "neighbor_size" in record.getMessage()]
            assert len(told) == (size == 12)


def strange(shape):
    """Tensors whose values cannot be read as they are, by what a message calls them."""
    ids = torch.zeros(shape, dtype=torch.long)
    quantized = torch.quantize_per_tensor(torch.zeros(shape), 1.0, 0, torch.quint8)
    return {
        "meta": ids.to("meta"),
        "sparse": ids.to_sparse(),
        "quantized": quantized,
        "complex": ids.to(torch.complex64),
        "nested": torch.nested.nested_tensor([torch.tensor([3, 4]), torch.tensor([3])]),
        "1,099,511,627,776 numbers": ids[:1]
        .flatten()[:1]
        .expand(1 << 40),  # without memory, as long as nobody reads it
    }


@pytest.mark.parametrize("kind", strange((1,)))
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's own, of the kinds
def test_tensors_whose_values_cannot_be_read(model, kind):
    """Named, and told what they are."""
    ids, tensor, neighbors = random_ids(1, 9), strange((1, 9))[kind], strange((1, 2, 2, 8))[kind]
    real = torch.zeros(1, 2, 2, 8, dtype=torch.long)
    calls = {
        "`attention_mask`": lambda: model(ids, attention_mask=tensor),
        "`position_ids`": lambda: model(ids, position_ids=tensor),
        "`labels`": lambda: model(ids, labels=tensor),
        "`chunk_offset`": lambda: model(ids, chunk_offset=tensor, retriever=hash_retriever()),
        "`chunk_offset` ": lambda: model.generate(ids, chunk_offset=tensor, max_new_tokens=2, **GREEDY),
        "`neighbor_chunk_size`": lambda: model(ids, neighbor_chunk_size=tensor),
        "`logits_to_keep`": lambda: model(ids, logits_to_keep=tensor),
        "`input_ids`  ": lambda: model(tensor),
        "`input_ids`": lambda: model.generate(tensor, max_new_tokens=2, **GREEDY),
        "`attention_mask` ": lambda: model.generate(ids, attention_mask=tensor, max_new_tokens=2, **GREEDY),
        "`neighbor_input_ids`": lambda: model(ids, neighbor_input_ids=neighbors),
        "`neighbor_input_ids` ": lambda: model(ids, neighbor_input_ids=real, neighbor_attention_mask=neighbors),
        "(?i)the retriever": lambda: model(ids, retriever=lambda ids, mask: (strange((2, 2, 8))[kind], None)),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"{name.strip()}.* must be a dense tensor .* {kind}|.*'{kind}'"):
            call()


NESTED: list = []
for _ in range(3000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    "value", ["x", b"x", 1.5, {}, object(), NESTED, random_ids(1, 9).numpy(), random_ids(1, 9).float()]
)
def test_arguments_of_another_kind(any_model, value):
    """Also where transformers would fail deep inside, or take any value for true."""
    names = ["attention_mask", CACHE_NAME, "use_cache", "logits_to_keep"]
    neighbors = random_neighbors(1, 2) if hasattr(any_model, "set_retriever") else {}
    names += ["chunk_offset", "neighbor_chunk_size"] if neighbors else []
    for name in names[isinstance(value, torch.Tensor) :]:  # a mask may be of floats
        with pytest.raises((ValueError, TypeError), match=f"{name}|looked up for chunks of"):
            any_model(IDS[:1], **neighbors, **{name: value})
    for name in ("max_new_tokens", "num_beams", "generation_config"):
        with pytest.raises((ValueError, TypeError), match=name):
            any_model.generate(IDS[:1], **{name: value})


@pytest.mark.parametrize("count", [float("inf"), float("nan"), -1, 0])
def test_numbers_of_tokens_that_never_end(any_model, count):
    with pytest.raises(ValueError, match="`max_new_tokens` must be an integer of at least 1"):
        any_model.generate(IDS, max_new_tokens=count)


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), -1])
def test_a_mask_that_is_no_mask(any_model, value):
    """Numbers to be added to attention scores say the opposite: 0 is what is read."""
    mask = torch.zeros(2, 9)
    mask[0, 0] = value
    with pytest.raises(ValueError, match="`attention_mask` must be 1 at tokens and 0 at padding"):
        any_model(IDS, attention_mask=mask)


def test_a_model_without_values_takes_text_without_values():
    """Its shapes can be computed on the device "meta", as those of any model."""
    model, ids = tiny_retro("llama").to("meta"), random_ids(1, 9).to("meta")
    assert model(ids, labels=ids).logits.shape == (1, 9, VOCAB_SIZE)
