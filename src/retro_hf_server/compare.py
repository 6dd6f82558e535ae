"""How likely each token of an answer is when the store is read and when it is not."""

from __future__ import annotations

import math
from typing import Any

import torch

from retro_hf.special_tokens import tokenize_texts

from .engine import Engine
from .readers import Prompt, Reader, RowLookup, reader_for
from .requests import RequestError


def compare(engine: Engine, prompt: Prompt, answer: str) -> dict[str, Any]:
    """
    Score an answer with retrieval and without. Runs in the engine's thread.

    Args:
        engine ([`Engine`]): the model and its store.
        prompt ([`Prompt`]): what comes before the answer.
        answer (`str`): the text to score.
    Returns:
        `dict` with `tokens`, each with `text` and its cost in bits `off` and `on`, and with `retrieval`, `on` or `unavailable`.
    Raises:
        RequestError: if there is no store, or no room.
    """
    if engine.source is None:
        raise RequestError("This server has no store. Start it with `--store`.", 404, code="no_store")
    ((tokens,), _) = tokenize_texts(engine.tokenizer, [answer])
    room = engine.context_size
    if room is not None and len(prompt.tokens) + len(tokens) > room:
        raise RequestError(
            f"The model has room for {room:,} tokens, but prompt and answer have {len(prompt.tokens) + len(tokens):,}.",
            code="context_length_exceeded",
        )
    reader = reader_for(engine.source, engine.model, prompt, engine.tokenizer, len(tokens))
    off, on = (_bits(engine, prompt, tokens, one) for one in (None, reader))
    texts = _texts(engine.tokenizer, tokens)
    return {
        "tokens": [{"text": text, "off": a, "on": b} for text, a, b in zip(texts, off, on, strict=True)],
        "retrieval": "on" if reader.error is None else "unavailable",
        "message": reader.error,
    }


def _bits(engine: Engine, prompt: Prompt, tokens: list[int], reader: Reader | None) -> list[float]:
    """Bits that each token costs."""
    device = engine.model.device
    input_ids = torch.tensor([prompt.tokens + tokens], device=device)
    reads: dict[str, Any] = {"retriever": None}
    if reader is not None:
        lookup = RowLookup([reader], engine.model.config.vocab_size)
        reads = {"retriever": lookup, "chunk_offset": reader.chunk_offset}
    with torch.inference_mode():
        logits = engine.model(input_ids, **reads, use_cache=False).logits[0]
    scores = logits[len(prompt.tokens) - 1 : -1].float().log_softmax(-1)
    chosen = scores.gather(-1, torch.tensor(tokens, device=device).unsqueeze(-1)).squeeze(-1)
    return (-chosen / math.log(2)).tolist()


def _texts(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text of each token. A character of several tokens belongs to the last of them."""
    texts, shown = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end])
        if text.endswith("�"):
            texts.append("")
            continue
        texts.append(text[len(shown) :])
        shown = text
    return texts
