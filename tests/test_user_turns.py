"""The last turn of the user is found in what a chat template has made."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from retro_hf import RetroRetriever
from retro_hf.user_turns import chat_markers, last_user_turn


TOKENIZER = Path(__file__).parents[1] / "hub_configs" / "retro-smollm2-135m"

TEMPLATES = {
    "own": None,
    "brackets": "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>"
    "{% endif %}{% endfor %}",
    "headers": "{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
    "thinking": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n\n</think>\n\n{% endif %}",
}


@pytest.fixture(params=TEMPLATES)
def tokenizer(request):
    """A tokenizer with one of several chat templates."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = TEMPLATES[request.param] or tokenizer.chat_template
    return tokenizer


@pytest.mark.parametrize(
    "earlier",
    [
        [],
        [{"role": "system", "content": "Answer in one word."}],
        [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A ferry."}],
    ],
)
@pytest.mark.parametrize("is_asking", [True, False])
def test_last_turn_of_the_user(tokenizer, earlier, is_asking):
    """Whatever came before, and whether the prompt already begins the answer."""
    if "[INST]" in tokenizer.chat_template:
        earlier = [message for message in earlier if message["role"] != "system"]  # that template has none
    messages = [*earlier, {"role": "user", "content": "When does the boat\nto Lund leave?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_asking)
    prompt = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    question = "When does the boat\nto Lund leave?"
    assert last_user_turn(prompt, *chat_markers(tokenizer)) == (question, prompt.index(question))


def test_other_prompts_have_no_turn(tokenizer):
    """A text without the marks of the template, or an empty turn, is no chat."""
    markers = chat_markers(tokenizer)
    assert last_user_turn("The boat to Lund leaves at noon.", *markers) is None
    assert last_user_turn(markers[0] + " " + markers[1], *markers) is None


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ messages[0].role }}"])
def test_tokenizer_without_a_usable_template(template):
    """No template, one that fails, and one that leaves the content out."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = template
    assert chat_markers(tokenizer) is None


def test_retriever_reads_the_turns_of_a_padded_batch():
    """Padding at the left is no part of a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, padding_side="left")
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True)
        for turn in ("Who?", "When does the boat leave?")
    ]
    batch = tokenizer([*texts, "No chat at all"], return_tensors="pt", padding=True)
    retriever = RetroRetriever.__new__(RetroRetriever)
    retriever._tokenizer = tokenizer
    turns = retriever.last_turns(batch.input_ids, torch.as_tensor(batch.attention_mask))
    assert [turn and turn[0] for turn in turns] == ["Who?", "When does the boat leave?", None]
    for text, turn in zip(texts, turns, strict=False):
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(tokens[turn[1] :]).startswith(turn[0])
