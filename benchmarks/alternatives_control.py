"""
RETRO and kNN-LM where no other wording of a passage may be read: how much of their gain is copying.

    python benchmarks/alternatives_control.py        # after alternatives.py, with the same arguments; 2 minutes on 1 core

Every measured passage lies in the store in up to two other translations. Here whatever belongs to these documents is left
out of what is found, and kNN-LM's mixture is tuned under the same rule. Adds `same_passage_left_out` to the record in
benchmarks/results/alternatives.json.
"""

import json

import alternatives  # first: it sets the threads and finds the examples
import faiss
import numpy as np
import torch
from alternatives import BATCH, WINDOW, Job
from baselines import knn_lm
from baselines.rows import batches, cut, token_ids

from retro_hf.evaluation import bits_per_byte
from retro_hf.training.exclusion import documents_by_row


class Recorder:
    """An index that remembers what it found, row by row."""

    def __init__(self, index: faiss.Index) -> None:
        self.index, self.found = index, []

    def search(self, states: np.ndarray, k: int):
        distances, ids = self.index.search(states, k)
        self.found.append(ids)
        return distances, ids


def passage(document: dict) -> str:
    """What a document is in every translation: "acts/1.1" for "kjv/acts/1.1"."""
    return document["id"].split("/", 1)[1]


def owners_of(job: Job, tokenizer) -> np.ndarray:
    """The number of the stored document of each of kNN-LM's vectors, in the order in which `build` adds them."""
    parts = [
        (number, *part) for number, ids in enumerate(token_ids(job.store, tokenizer)) for part in cut(ids, WINDOW)
    ]
    order = [number for numbers, _ in batches([row for _, row, _ in parts], BATCH) for number in numbers]
    return np.concatenate([np.full(len(parts[n][1]) - parts[n][2], parts[n][0]) for n in order])


def filtered_votes(job: Job, documents: list[dict], tokenizer, plain) -> tuple[knn_lm.Votes, float]:
    """Votes of other passages only, and how often the nearest state was of the same passage."""
    index_path, values_path = alternatives.knn_paths(job)
    index, values = Recorder(faiss.read_index(str(index_path))), np.load(values_path)
    ids = token_ids(documents, tokenizer)
    votes = knn_lm.find_votes(plain, ids, index, values, max(knn_lm.COUNTS), window=WINDOW, batch_size=BATCH)
    stored = np.array([passage(document) for document in job.store])[owners_of(job, tokenizer)]
    own = np.array([passage(document) for document in documents])[votes.document]
    same = stored[np.concatenate(index.found)] == own[:, None]
    distances = np.where(same, np.inf, votes.distances)
    order = np.argsort(distances, axis=1, kind="stable")
    kept = (np.take_along_axis(part, order, axis=1) for part in (distances, votes.hits & ~same))
    return knn_lm.Votes(votes.document, votes.log_probability, *kept), float(same[:, 0].mean())


def main() -> None:
    args = alternatives.arguments(__doc__).parse_args()
    job = alternatives.make_job(args)
    tokenizer, model, plain = job.load()
    retriever = job.retriever()
    numbers = {}
    for document, number in zip(
        job.store, documents_by_row(retriever.datastore, [d["id"] for d in job.store])[:, 0], strict=True
    ):
        numbers.setdefault(passage(document), []).append(number)
    neighbors, same = [], []
    for document, ids in zip(job.measured, token_ids(job.measured, tokenizer), strict=True):
        chunks = torch.from_numpy(ids[: len(ids) // retriever.chunk_size * retriever.chunk_size])
        chunks = chunks.reshape(-1, retriever.chunk_size)
        left_out = np.tile(np.array(numbers.get(passage(document), [-1]), np.int64), (len(chunks), 1))
        neighbors.append(retriever.search(chunks, exclude_documents=left_out).chunk_ids)
        nearest = retriever.datastore.document_of(retriever.search(chunks).chunk_ids[:, 0])
        same += list(np.isin(nearest, left_out))
    result = bits_per_byte(
        model,
        job.measured,
        tokenizer,
        retriever=retriever.datastore,
        neighbor_chunk_ids=neighbors,
        modes=("on", "off"),
        window=WINDOW,
    )
    mixture = knn_lm.tune(filtered_votes(job, job.tuning, tokenizer, plain)[0])
    votes, same_state = filtered_votes(job, job.measured, tokenizer, plain)
    nats = votes.nats(mixture, len(job.measured))
    differences = nats - result.nats["off"]
    found = {
        "off": result.bits_per_byte["off"],
        "retro": result.bits_per_byte["on"],
        "retro_interval": result.differences["on"][1:],
        "knn-lm": float(nats.sum() / result.num_bytes.sum() / np.log(2)),
        "knn-lm_interval": alternatives.interval(differences, result.num_bytes),
        "knn-lm_choice": vars(mixture),
        "nearest_chunk_of_same_passage": float(np.mean(same)),
        "nearest_state_of_same_passage": same_state,
    }
    print(json.dumps(found, indent=1))
    everything = json.loads(args.output.read_text())
    everything[job.folder.name]["same_passage_left_out"] = found
    args.output.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
