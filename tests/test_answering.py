"""Questions: what is looked up, which passages are read from which token on, and what comes back."""

import pytest
import torch
from datasets import Dataset
from tiny import tiny_backbone, tiny_retro
from tiny_training import make_world

from retro_hf import RetroRetriever, answer, retrofit
from retro_hf.answering import prepare_question
from retro_hf.errors import RetrieverError
from retro_hf.training import QuestionCollator, generate_answers, retrieve_passages, tokenize_questions


CHUNK_SIZE = 8
NEIGHBOR_SIZE = 16
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DOCUMENTS = [
    {"id": "harbor", "title": "Harbor", "source": "notes/harbor.txt", "text": "the sailor crosses the harbor"},
    {"id": "garden", "title": "", "source": "notes/garden.txt", "text": "the baker opens the garden"},
    {"id": "castle", "title": "Castle", "source": "notes/castle.txt", "text": "the queen reads a letter"},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def retriever(world):
    world.tokenizer.chat_template = None
    return RetroRetriever.from_texts(
        DOCUMENTS, world.tokenizer, embedder=world.embedder, chunk_size=CHUNK_SIZE, neighbor_size=NEIGHBOR_SIZE
    )


@pytest.fixture
def chat(retriever, monkeypatch):
    """The retriever, its tokenizer with a chat template."""
    monkeypatch.setattr(retriever.tokenizer, "chat_template", TEMPLATE)
    return retriever


@pytest.fixture(scope="module")
def model(world):
    backbone = tiny_backbone("llama", vocab_size=len(world.tokenizer))
    return retrofit(backbone, reader="parallel_context", chunk_size=CHUNK_SIZE, neighbor_size=NEIGHBOR_SIZE)


@pytest.fixture(scope="module")
def trained(world):
    """A model with the paper's reader and random weights."""
    text_config = {"vocab_size": len(world.tokenizer)}
    return tiny_retro("llama", text_config, chunk_size=CHUNK_SIZE, neighbor_size=NEIGHBOR_SIZE)


def reading_tokens(question) -> list[bool]:
    """For each token of the prompt, whether it reads: the chunk that it completes, or the one before its chunk, has neighbors."""
    offset, mask = int(question.inputs["chunk_offset"]), question.inputs["neighbor_attention_mask"][0]
    read = []
    for token in range(question.num_tokens):
        place = offset + token
        chunk = place // CHUNK_SIZE if place % CHUNK_SIZE == CHUNK_SIZE - 1 else place // CHUNK_SIZE - 1
        read.append(chunk >= 0 and bool(mask[chunk].any()))
    return read


def test_sources_are_the_passages_that_were_read(model, retriever):
    result = answer(model, retriever, "the queen reads a letter", num_passages=2, max_new_tokens=4)
    assert [source.document_id for source in result.sources][0] == "castle"
    assert result.sources[0].source == "notes/castle.txt"
    assert result.sources[0].title == "Castle"
    assert result.sources[0].text == "the queen reads a letter"
    assert result.sources[0].score >= result.sources[1].score
    assert len({source.document_id for source in result.sources}) == 2
    assert str(result) == result.text


def test_passages_are_introduced_and_begin_with_their_title(model, retriever):
    asked = prepare_question(model, retriever, "the queen reads a letter", num_passages=3)
    ids, mask = asked.inputs["neighbor_input_ids"][0, -1], asked.inputs["neighbor_attention_mask"][0, -1].bool()
    texts = [retriever.tokenizer.decode(row[keep]) for row, keep in zip(ids, mask, strict=True)]
    by_id = {source.document_id: text for source, text in zip(asked.sources, texts, strict=True)}
    for name, expected in (("castle", "Castle: the queen reads a letter"), ("garden", "the baker opens the garden")):
        expected = "Read this text.\n\n" + expected
        assert expected.startswith(by_id[name])  # 16 tokens of it
        assert by_id[name].startswith(expected[:20])


def test_passages_are_read_from_the_question_on(model, chat):
    asked = prepare_question(
        model,
        chat,
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "who reads"},
            {"role": "assistant", "content": "a king"},
            {"role": "user", "content": "who reads again"},
        ],
    )
    text = chat.tokenizer.decode(asked.inputs["input_ids"][0])
    assert text == "<system>be brief<user>who reads<assistant>a king<user>who reads again<assistant>"
    before = len(chat.tokenizer(text[: text.rindex("who")], add_special_tokens=False)["input_ids"])
    read = reading_tokens(asked)
    # The last token before the question ends a chunk, so it reads, too.
    assert read == [token >= before - 1 for token in range(asked.num_tokens)]


def test_chat_without_a_system_message_asks_for_a_short_answer(model, chat):
    asked = prepare_question(model, chat, "who reads")
    text = chat.tokenizer.decode(asked.inputs["input_ids"][0])
    assert text.startswith("<system>") and text.endswith("<user>who reads<assistant>")


def test_question_without_a_template_reads_from_its_beginning(model, retriever):
    asked = prepare_question(model, retriever, "who reads", prompt="{question}?")
    assert all(reading_tokens(asked))


@pytest.mark.parametrize(
    ("reader", "template"),
    [("trained", None), ("model", None), ("model", TEMPLATE)],
    ids=["paper", "parallel", "chat"],
)
def test_question_is_asked_as_it_was_trained(reader, template, retriever, request, monkeypatch):
    """The prompt, the passages and the chunk borders are those of the collator, and so is the answer."""
    model, tokenizer = request.getfixturevalue(reader), retriever.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", template)
    question = "who reads a letter under the bridge"
    dataset = Dataset.from_list([{"question": question, "answers": ["the queen reads it in the garden " * 3]}])
    dataset = retrieve_passages(dataset, retriever, num_passages=2)
    rows = tokenize_questions(dataset, tokenizer, neighbor_size=NEIGHBOR_SIZE, reader=model.config.reader)
    batch = QuestionCollator(tokenizer, chunk_size=CHUNK_SIZE)([rows[0]])
    asked = prepare_question(model, retriever, question, num_passages=2, max_new_tokens=2 * CHUNK_SIZE)
    assert torch.equal(asked.inputs["input_ids"], batch["input_ids"][:, : asked.num_tokens])
    assert torch.equal(asked.inputs["chunk_offset"], batch["chunk_offset"])
    given, made = asked.inputs["neighbor_input_ids"], batch["neighbor_input_ids"]
    size, count = made.shape[-1], min(given.shape[1], made.shape[1])
    assert count > (int(batch["chunk_offset"]) + asked.num_tokens) // CHUNK_SIZE
    assert torch.equal(given[:, :count, :, :size], made[:, :count]) and not given[..., size:].any()
    masks = [values["neighbor_attention_mask"][:, :count, :, :size] for values in (asked.inputs, batch)]
    assert torch.equal(*masks) and masks[0].any()
    written = answer(model, retriever, question, num_passages=2, max_new_tokens=2 * CHUNK_SIZE).text
    (generated,) = generate_answers(model, batch, tokenizer, max_new_tokens=2 * CHUNK_SIZE)
    assert generated == written.partition("\n")[0].strip()


def test_questions_for_parallel_context_learn_only_their_answers(model, chat):
    """What stands before the question does not read the passages; the question and the answer do."""
    rows = [
        {"question": "who reads a letter", "answers": ["the queen"], "passages": ["the queen reads"]},
        {"question": "who opens it", "answers": ["the baker"], "passages": ["a", "the baker opens it"]},
    ]
    made = tokenize_questions(
        Dataset.from_list(rows), chat.tokenizer, neighbor_size=NEIGHBOR_SIZE, reader="parallel_context"
    )
    batch = QuestionCollator(chat.tokenizer, chunk_size=CHUNK_SIZE)(list(made))
    for labels, row, ids in zip(batch["labels"], made, batch["input_ids"], strict=True):
        assert labels[labels != -100].tolist() == row["answer_input_ids"]
        assert ids[labels != -100].tolist() == row["answer_input_ids"]
        text = chat.tokenizer.decode(row["prompt_input_ids"][row["question_start"] :])
        assert text == f"{row['question']}<assistant>"
        assert chat.tokenizer.decode(row["answer_input_ids"]) == f"{row['answers'][0]}{chat.tokenizer.eos_token}"
    other = {**batch, "neighbor_input_ids": (batch["neighbor_input_ids"] + 7) % 300 + 3}
    with torch.no_grad():
        on, changed = (model(**inputs).logits for inputs in (batch, other))
    padding = batch["attention_mask"].argmax(dim=1)
    for row, start in enumerate(made["question_start"]):
        differs = (on[row] != changed[row]).any(dim=-1)[padding[row] :]
        assert not differs[: start - 1].any() and differs[start - 1 :].all()


@pytest.mark.parametrize("reader", ["model", "trained"])
def test_long_answer_reads_the_same_passages_to_its_end(reader, retriever, request):
    model = request.getfixturevalue(reader)
    asked = prepare_question(model, retriever, "who reads", max_new_tokens=3 * CHUNK_SIZE)
    neighbors, offset = asked.inputs["neighbor_attention_mask"][0], int(asked.inputs["chunk_offset"])
    last = offset + asked.num_tokens + 3 * CHUNK_SIZE - 1
    assert last // CHUNK_SIZE <= len(neighbors)
    first = int(neighbors.any(-1).any(-1).nonzero()[0])
    assert neighbors[first:].any(-1).any(-1).all()


@pytest.mark.parametrize("reader", ["model", "trained"])
def test_answer_depends_on_the_passages(reader, retriever, request):
    model = request.getfixturevalue(reader)
    asked = prepare_question(model, retriever, "who reads", max_new_tokens=CHUNK_SIZE)
    options = {
        "max_new_tokens": CHUNK_SIZE,
        "output_logits": True,
        "return_dict_in_generate": True,
        "do_sample": False,
    }
    on = model.generate(**asked.inputs, **options).logits
    off = model.generate(asked.inputs["input_ids"], retriever=None, **options).logits
    assert not torch.equal(on[0], off[0])


def test_query_is_looked_up_instead_of_the_question(model, retriever):
    result = answer(model, retriever, "what is it", query="the baker opens the garden", max_new_tokens=1)
    assert result.sources[0].document_id == "garden"


def test_options_reach_generate(model, retriever):
    texts = {answer(model, retriever, "who reads", do_sample=True, max_new_tokens=12).text for _ in range(3)}
    assert len(texts) == 3


@pytest.mark.parametrize(
    "question",
    [
        "",
        "  \n",
        [],
        [{"role": "assistant", "content": "yes"}],
        [{"role": "user", "content": " "}],
        3,
        [{"role": "user"}],
    ],
)
def test_invalid_question_is_refused(model, retriever, question):
    with pytest.raises(RetrieverError):
        answer(model, retriever, question)


def test_chat_for_a_reader_without_one_is_refused(trained, chat):
    messages = [{"role": role, "content": "who"} for role in ("user", "assistant", "user")]
    with pytest.raises(RetrieverError):
        answer(trained, chat, messages)


def test_base_and_function_are_refused_by_name(model, retriever, world):
    with pytest.raises(RetrieverError, match="LlamaForCausalLM"):
        answer(model.model.backbone, retriever, "who")
    with pytest.raises(RetrieverError, match="function"):
        answer(model, lambda chunks, mask: (chunks, mask), "who")


@pytest.mark.parametrize("options", [{"num_passages": 0}, {"prompt": "no place"}, {"query": ""}])
def test_bad_options_are_refused(model, retriever, options):
    with pytest.raises(ValueError):
        answer(model, retriever, "who", **options)
