"""
kNN-LM (Khandelwal et al., 2020): the nearest hidden states of a text vote for the next token.

For every token of the text the datastore holds the token, and as its key what the last layer's feed-forward network reads
before it (the paper's best key). At every position the model's own state is looked up; the k nearest vote with
exp(-squared distance / T), and the vote is mixed with the model's prediction: λ p_knn + (1 - λ) p_model. k, T and λ are
tuned on other documents than are measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import torch

from .rows import batches, cut, log_probabilities


COUNTS = (8, 32, 128, 512, 1024)
TEMPERATURES = 2.0 ** np.arange(-4, 15)
SHARES = np.arange(0.0, 1.0, 0.05)


@dataclass(frozen=True)
class Mixture:
    """Votes per position, their temperature T, and their share λ."""

    k: int
    temperature: float
    share: float


@dataclass(frozen=True)
class Votes:
    """What was found for each scored token.

    Attributes:
        document (`np.ndarray` of int64 and shape `(num_tokens,)`): the number of its document.
        log_probability (`np.ndarray` of float64 and shape `(num_tokens,)`): the model's own.
        distances (`np.ndarray` of float32 and shape `(num_tokens, k)`): squared, nearest first, inf where there is none.
        hits (`np.ndarray` of bool and shape `(num_tokens, k)`): whether the neighbor voted for this token.
    """

    document: np.ndarray
    log_probability: np.ndarray
    distances: np.ndarray
    hits: np.ndarray

    def share_of_votes(self, k: int, temperature: float) -> np.ndarray:
        """p_knn of each scored token, float of shape `(num_tokens,)`."""
        distances = self.distances[:, :k]
        weights = np.exp((distances[:, :1] - distances) / temperature)  # the nearest has 1: no overflow
        return (weights * self.hits[:, :k]).sum(1) / weights.sum(1)

    def nats(self, mixture: Mixture, num_documents: int) -> np.ndarray:
        """Negative log-likelihood of each document under the mixture, float64 of shape `(num_documents,)`."""
        votes = mixture.share * self.share_of_votes(mixture.k, mixture.temperature)
        return -np.bincount(
            self.document, np.log(votes + (1 - mixture.share) * np.exp(self.log_probability)), num_documents
        )


class States:
    """Collects what the last layer's feed-forward network reads in each forward pass."""

    def __init__(self, model) -> None:
        self.layer = model.get_decoder().layers[-1].mlp

    def __enter__(self) -> "States":
        self.hook = self.layer.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()

    def _keep(self, module: torch.nn.Module, inputs: tuple) -> None:
        self.last = inputs[0].float().numpy()  # (rows, length, width)


@torch.inference_mode()
def build(
    model, documents: Sequence[np.ndarray], *, window: int, batch_size: int = 8
) -> tuple[faiss.Index, np.ndarray]:
    """
    Make the datastore of a text.

    Returns:
        the index, inverted lists of float16 vectors of which one in 32 is read; and each vector's token, int32.
    """
    parts = [part for ids in documents for part in cut(ids, window)]
    keys, values = [], []
    with States(model) as states:
        for numbers, batch in batches([row for row, _ in parts], batch_size):
            model.get_decoder()(**batch, use_cache=False)
            for number, read in zip(numbers, states.last, strict=True):
                row, first = parts[number]
                keys.append(read[first - 1 : len(row) - 1].astype(np.float16))
                values.append(row[first:].astype(np.int32))
    keys = np.concatenate(keys)
    lists = int(4 * len(keys) ** 0.5)
    index = faiss.index_factory(keys.shape[1], f"IVF{lists},SQfp16")
    sample = np.random.default_rng(0).permutation(len(keys))[: 40 * lists]
    index.train(keys[sample].astype(np.float32))
    for start in range(0, len(keys), 1 << 16):
        index.add(keys[start : start + (1 << 16)].astype(np.float32))
    index.nprobe = max(1, lists // 32)
    return index, np.concatenate(values)


@torch.inference_mode()
def find_votes(
    model,
    documents: Sequence[np.ndarray],
    index: faiss.Index,
    values: np.ndarray,
    k: int,
    *,
    window: int,
    batch_size: int = 8,
) -> Votes:
    """Look up every token of documents but the first of each."""
    parts = [(number, *part) for number, ids in enumerate(documents) for part in cut(ids, window)]
    results = []
    with States(model) as states:
        for numbers, batch in batches([row for _, row, _ in parts], batch_size):
            scores = log_probabilities(model, batch, [parts[number][2] for number in numbers])
            for number, read, logs in zip(numbers, states.last, scores, strict=True):
                document, row, first = parts[number]
                distances, ids = index.search(read[first - 1 : len(row) - 1], k)
                distances[ids < 0] = np.inf
                hits = (values[ids] == row[first:, None]) & (ids >= 0)
                results.append((np.full(len(logs), document), logs, distances, hits))
    return Votes(*(np.concatenate(part) for part in zip(*results, strict=True)))


def tune(found: Votes) -> Mixture:
    """The mixture, of a grid, that predicts these tokens best."""
    own = np.exp(found.log_probability)

    def choices() -> Iterator[tuple[float, Mixture]]:
        for k in sorted({min(k, found.distances.shape[1]) for k in COUNTS}):
            for temperature in TEMPERATURES:
                votes = found.share_of_votes(k, temperature)
                for share in SHARES:
                    yield -np.log(share * votes + (1 - share) * own).sum(), Mixture(k, temperature, share)

    return min(choices(), key=lambda choice: choice[0])[1]
