"""Do votes of kNN-LM help a RETRO model, where text repeats and where it does not?

    python benchmarks/knn_retro.py       # about 6 minutes on 1 core: hub_configs/retro-bible, documents as in alternatives.py

The model predicts each token while it reads its neighbors (RETRO); states like its own, without neighbors, vote on the same
token (kNN-LM). Two mixtures of both:

- `constant`: one share λ of the votes for all tokens;
- `gated`: a share per bin of the distance of the nearest state, so that votes count where a state was seen before.

Number of votes, temperature and shares are chosen on other held-out passages (`tuned on repeats`), or on these as they are and
with the other wordings of the same passage left out of the store, half and half (`tuned on both`). Measured on the
60 passages of alternatives.py as they are, and with the other wordings left out: there nothing repeats. Adds `knn_retro` to the
record in benchmarks/results/alternatives.json; docs/results/alternatives.md tells what came out.
"""

import json
from dataclasses import dataclass

import alternatives  # first: it sets the threads and finds the examples
import faiss
import numpy as np
import torch
from alternatives import BATCH, WINDOW, Job
from alternatives_control import Recorder, owners_of, passage
from baselines import knn_lm
from baselines.rows import token_ids

from retro_hf.training.exclusion import documents_by_row


BINS = 8


@dataclass(frozen=True)
class Predictions:
    """What RETRO and the votes say of the tokens of some documents.

    Attributes:
        retro, off (`np.ndarray` of float64 and shape `(num_tokens,)`): probability of each token, with neighbors and without.
        votes ([`knn_lm.Votes`]): for the same tokens.
        num_bytes (`int`): of the documents, as `bits_per_byte` counts them.
    """

    retro: np.ndarray
    off: np.ndarray
    votes: knn_lm.Votes
    num_bytes: int

    def bits(self, probability: np.ndarray) -> float:
        """Bits per byte of the tokens."""
        return float(-np.log2(probability).sum() / self.num_bytes)


@torch.inference_mode()
def predict(job: Job, documents: list[dict], *, without_same: bool, parts: tuple) -> Predictions:
    """Predictions for all tokens but the first of each document; `without_same` hides other wordings of a passage."""
    tokenizer, model, plain, retriever, owners = parts
    stored = np.array([passage(document) for document in job.store])
    numbers = documents_by_row(retriever.datastore, [document["id"] for document in job.store])[:, 0]
    all_ids = token_ids(documents, tokenizer)
    index_path, values_path = alternatives.knn_paths(job)
    index = Recorder(faiss.read_index(str(index_path)))
    votes = knn_lm.find_votes(
        plain, all_ids, index, np.load(values_path), max(knn_lm.COUNTS), window=WINDOW, batch_size=BATCH
    )
    if without_same:
        own = np.array([passage(document) for document in documents])[votes.document]
        same = stored[owners][np.concatenate(index.found)] == own[:, None]
        distances = np.where(same, np.inf, votes.distances)
        order = np.argsort(distances, axis=1, kind="stable")
        kept = (np.take_along_axis(part, order, axis=1) for part in (distances, votes.hits & ~same))
        votes = knn_lm.Votes(votes.document, votes.log_probability, *kept)
    retro, num_bytes = np.empty(len(votes.document)), 0
    for number, (document, ids) in enumerate(zip(documents, all_ids, strict=True)):
        if len(ids) > WINDOW:
            raise SystemExit(f"{document['id']} has {len(ids)} tokens, but {WINDOW} are read at most.")
        chunks = torch.from_numpy(ids[: len(ids) // retriever.chunk_size * retriever.chunk_size])
        chunks = chunks.view(-1, retriever.chunk_size)
        own_numbers = numbers[stored == passage(document)] if without_same else np.array([-1])
        hidden = np.tile(own_numbers if len(own_numbers) else np.array([-1]), (len(chunks), 1))
        found = retriever.search(chunks, exclude_documents=hidden)
        tokens, mask = retriever.datastore.gather(found.chunk_ids)
        neighbors = {
            "neighbor_input_ids": torch.as_tensor(tokens).long()[None],
            "neighbor_attention_mask": torch.as_tensor(mask).long()[None],
        }
        row = torch.from_numpy(ids)[None]
        logs = model(row, use_cache=False, **(neighbors if len(chunks) else {})).logits[0, :-1].log_softmax(-1)
        scored = logs.gather(1, row[0, 1:, None])[:, 0].exp().double().numpy()
        retro[votes.document == number] = scored
        num_bytes += len(tokenizer.decode(ids[1:]).encode())
    return Predictions(retro, np.exp(votes.log_probability), votes, num_bytes)


def log_sum(share: np.ndarray | float, own: np.ndarray, votes: np.ndarray) -> float:
    return float(np.log(share * votes + (1 - share) * own).sum())


def join(sets: list[Predictions]) -> Predictions:
    """Several sets as one."""
    votes = [one.votes for one in sets]
    parts = (np.concatenate([getattr(one, name) for one in votes]) for name in knn_lm.Votes.__dataclass_fields__)
    retro, off = (np.concatenate([getattr(one, name) for one in sets]) for name in ("retro", "off"))
    return Predictions(retro, off, knn_lm.Votes(*parts), sum(one.num_bytes for one in sets))


@dataclass(frozen=True)
class Gate:
    """Votes per position, their temperature, and their share in each bin of the nearest distance, between `edges`."""

    k: int
    temperature: float
    edges: np.ndarray
    shares: np.ndarray

    def mix(self, found: Predictions, own: np.ndarray) -> np.ndarray:
        """The probability of each token under the mixture of `own` and the votes."""
        share = self.shares[np.digitize(found.votes.distances[:, 0], self.edges)]
        return share * found.votes.share_of_votes(self.k, self.temperature) + (1 - share) * own


def tune(found: Predictions, own: np.ndarray, num_bins: int) -> Gate:
    """The best gate of a grid for some tokens; with one bin, the best constant share."""
    nearest = found.votes.distances[:, 0]
    edges = np.quantile(nearest[np.isfinite(nearest)], np.linspace(0, 1, num_bins + 1)[1:-1])
    bins, best = np.digitize(nearest, edges), (-np.inf, None)
    for k in (32, 1024):
        for temperature in knn_lm.TEMPERATURES[2:12]:
            votes = found.votes.share_of_votes(k, temperature)
            shares, total = np.zeros(num_bins), 0.0
            for number in range(num_bins):
                rows = bins == number
                scores = [log_sum(share, own[rows], votes[rows]) for share in knn_lm.SHARES]
                shares[number], total = knn_lm.SHARES[int(np.argmax(scores))], total + max(scores)
            if total > best[0]:
                best = (total, Gate(k, float(temperature), edges, shares))
    return best[1]


def main() -> None:
    args = alternatives.arguments(__doc__).parse_args()
    job = alternatives.make_job(args)
    alternatives.in_own_process(alternatives.build_store, job)
    alternatives.in_own_process(alternatives.build_knn, job)
    tokenizer, model, plain = job.load()
    parts = (tokenizer, model, plain, job.retriever(), owners_of(job, tokenizer))
    sets = {
        (use, hides): predict(job, documents, without_same=hides, parts=parts)
        for use, documents in (("tuning", job.tuning), ("measured", job.measured))
        for hides in (False, True)
    }
    tuned_on = {"repeats": sets["tuning", False], "both": join([sets["tuning", False], sets["tuning", True]])}
    results = {}
    for text, hides in (("repeats", False), ("nothing repeats", True)):
        found = sets["measured", hides]
        row = {"off": found.bits(found.off), "retro": found.bits(found.retro)}
        for name, tuning in tuned_on.items():
            for who in ("off", "retro"):
                for kind, num_bins in (("constant", 1), ("gated", BINS)):
                    gate = tune(tuning, getattr(tuning, who), num_bins)
                    label = f"{who} + knn, {kind}, tuned on {name}"
                    row[label] = found.bits(gate.mix(found, getattr(found, who)))
        results[text] = row
    print(json.dumps(results, indent=1))
    everything = json.loads(args.output.read_text())
    everything[job.folder.name]["knn_retro"] = results
    args.output.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
