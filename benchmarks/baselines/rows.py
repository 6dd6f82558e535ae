"""What the baselines share: token ids of documents, rows cut from them, and what a causal language model says of these."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch


def token_ids(documents: Sequence[dict], tokenizer) -> list[np.ndarray]:
    """The tokens of each document, int64, as `bits_per_byte` reads them."""
    return [np.array(tokenizer(doc["text"], add_special_tokens=False)["input_ids"], np.int64) for doc in documents]


def cut(ids: np.ndarray, window: int) -> list[tuple[np.ndarray, int]]:
    """The rows of a document and the first place that each scores: those of `bits_per_byte`, half a window apart."""
    rows, scored, start = [], 1, 0
    while scored < len(ids):
        rows.append((ids[start : start + window], scored - start))
        scored, start = min(start + window, len(ids)), start + window // 2
    return rows


def batches(rows: Sequence[np.ndarray], batch_size: int) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield the numbers of `batch_size` rows, the longest first, and what the model takes: ids and mask, right-padded."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        ids = np.zeros((len(numbers), len(rows[numbers[0]])), np.int64)
        mask = np.zeros_like(ids)
        for place, number in enumerate(numbers):
            ids[place, : len(rows[number])] = rows[number]
            mask[place, : len(rows[number])] = 1
        yield numbers, {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def log_probabilities(model, batch: dict[str, torch.Tensor], firsts: Sequence[int]) -> list[np.ndarray]:
    """
    Log-probabilities (float64) of each row's tokens from its place in `firsts` on.

    The read-out, a good part of a small model, runs no further back than is scored.
    """
    length = batch["input_ids"].shape[1]
    keep = length - min(firsts) + 1
    logits = model(**batch, use_cache=False, logits_to_keep=keep).logits
    results = []
    for row, first, size, scores in zip(
        batch["input_ids"], firsts, batch["attention_mask"].sum(1), logits, strict=True
    ):
        skipped = length - keep
        predicted = scores[first - 1 - skipped : size - 1 - skipped].float().log_softmax(-1)
        results.append(predicted.gather(1, row[first:size, None])[:, 0].double().numpy())
    return results
