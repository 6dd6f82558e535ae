"""
In-context retrieval: a language model without any retrieval of its own reads what was found as part of its prompt.

As Ram et al. (2023) measure it: every s tokens the last chunk is looked up, the passages found stand before the
document's text, and only the next s tokens are scored. Here s is the chunk size, and a passage is what RETRO reads: a
chunk and what follows it. So both look up the same chunks at the same places, find the same tokens, and differ in how
these reach the model. A new passage changes all that comes after it, so no state is kept: every s tokens cost a pass over
passages and text.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .rows import batches, log_probabilities


def prompts(
    documents: Sequence[np.ndarray], retriever, num_passages: int, separator: Sequence[int], window: int
) -> tuple[list[np.ndarray], list[int], list[int]]:
    """
    The rows to score: one per chunk of each document, the passages found for the chunk before it, then the text.

    Args:
        documents (arrays of int64 and shape `(num_tokens,)`): token ids.
        retriever ([`RetroRetriever`]): where passages come from.
        num_passages (`int`): before each chunk but the first; the nearest stands last. 0 retrieves nothing.
        separator (`Sequence[int]`): token ids after each passage.
        window (`int`): tokens of the document that a row holds at most, a multiple of the chunk size.
    Returns:
        for each row its token ids, the number of its document, and the first place that is scored.
    """
    size = retriever.chunk_size
    complete = [ids[: len(ids) // size * size].reshape(-1, size) for ids in documents]
    number_of = np.cumsum([0, *map(len, complete)])
    if num_passages and number_of[-1]:
        found = retriever.search(torch.from_numpy(np.concatenate(complete)), num_neighbors=num_passages)
        tokens, mask = retriever.datastore.gather(found.chunk_ids)
    rows, owners, firsts = [], [], []
    for number, ids in enumerate(documents):
        for start in range(0, len(ids), size):
            end = min(start + size, len(ids))
            scored = end - max(start, 1)  # nothing predicts a document's first token
            if not scored:
                continue
            parts = []
            if start and num_passages:
                chunk = number_of[number] + start // size - 1
                for place in reversed(range(num_passages)):
                    passage = tokens[chunk, place][mask[chunk, place] == 1]
                    parts += [passage, separator] if len(passage) else []
            begin = max(0, -(-(end - window) // size) * size)
            rows.append(np.concatenate([*parts, ids[begin:end]]).astype(np.int64))
            owners.append(number)
            firsts.append(len(rows[-1]) - scored)
    return rows, owners, firsts


@torch.inference_mode()
def nats_in_context(
    model,
    documents: Sequence[np.ndarray],
    retriever,
    *,
    num_passages: int,
    separator: Sequence[int] = (),
    window: int,
    batch_size: int = 8,
) -> np.ndarray:
    """
    Negative log-likelihood of each document's tokens but the first, in nats; arguments as in [`prompts`].

    Returns:
        `np.ndarray` of float64 and shape `(num_documents,)`.
    """
    rows, owners, firsts = prompts(documents, retriever, num_passages, separator, window)
    nats = np.zeros(len(documents))
    for numbers, batch in batches(rows, batch_size):
        found = log_probabilities(model, batch, [firsts[number] for number in numbers])
        for number, values in zip(numbers, found, strict=True):
            nats[owners[number]] -= values.sum()
    return nats
