"""A made-up evaluation and trace with everything a report can show, and hostile text in every place for text."""

import json
from pathlib import Path

from retro_hf.evaluation.result import Evaluation
from retro_hf.evaluation.trace import Trace, TracedChunk, TracedNeighbor


VERDICT = "Retrieval helps: 1.1900 bits/byte ON, 1.7054 OFF (-30.2 %), 1.8388 RANDOM."
HOSTILE = (
    """<script>window.pwned = 1</script><img src="http://evil.example/x.png" onerror="window.pwned = 1">"'</p>&amp;"""
)
CHUNK_SIZE = 8
# Fields of an evaluation of OFF alone, which leave nothing to draw.
NO_CURVES = dict.fromkeys(("leakage", "overlap", "runs", "num_neighbors_sweep", "fraction_sweep", "examples"), []) | {
    "offsets": None,
    "modes": [
        {
            "name": "off",
            "cheating": False,
            "num_neighbors": 0,
            "bits_per_byte": 1.7,
            "bits_per_token": 6.6,
            "perplexity": 97.0,
            "difference": None,
            "later_chunks_bits_per_byte": None,
            "later_chunks_difference": None,
        }
    ],
}


def interval(value: float) -> dict:
    return {"value": value, "low": value - 0.02, "high": value + 0.02}


def sample_evaluation(folder: Path, **changes: object) -> Evaluation:
    """Loaded from JSON as a user would; `changes` replace whole fields."""
    values = {"off": 1.7054, "on": 1.19, "random": 1.8388, "shuffled": 1.7712, "oracle": 1.1402}
    content = {
        "format_version": 1,
        "verdict": {"outcome": "helps", "copying": False, "text": VERDICT, "details": ["RANDOM is worse than OFF."]},
        "modes": [
            {
                "name": name,
                "cheating": name == "oracle",
                "num_neighbors": 0 if name == "off" else 2,
                "bits_per_byte": value,
                "bits_per_token": 3.9 * value,
                "perplexity": 2 ** (3.9 * value),
                "difference": None if name == "off" else interval(value - values["off"]),
                "later_chunks_bits_per_byte": value - 0.05,
                "later_chunks_difference": None if name == "off" else interval(value - values["off"] - 0.1),
            }
            for name, value in values.items()
        ],
        "on_minus_random": interval(-0.6488),
        "similarity": {"on": 0.61, "random": 0.17, "difference": interval(0.44)},
        "leakage": [
            {
                "alpha": alpha,
                "num_chunks": int(2000 * alpha),
                "num_tokens": int(60000 * alpha),
                "num_bytes": int(240000 * alpha),
                "bits_per_byte": {"off": 1.8, "on": 1.7 - alpha / 2, "random": None if alpha < 0.2 else 1.93},
                "difference": {"on": interval(-0.1 - alpha / 2)},
            }
            for alpha in (0.125, 0.5, 1.0)
        ],
        "overlap": [
            {"low": 0.0, "high": 0.125, "num_tokens": 14310, "gain": -0.31, "share": -0.05},
            {"low": 0.125, "high": 1.0, "num_tokens": 20110, "gain": 1.7, "share": 1.05},
        ],
        "runs": [
            {"low": 0, "high": 0, "num_tokens": 14003, "gain": None, "share": None},
            {"low": 5, "high": 8, "num_tokens": 6003, "gain": 3.9, "share": 0.97},
            {"low": 17, "high": None, "num_tokens": 103, "gain": 4.9, "share": 0.03},
        ],
        "offsets": {
            "num_tokens": [1701, 1690, 0],
            "bits_per_token": {"off": [6.6, 6.7, None], "on": [4.3, 4.4, None]},
        },
        "num_neighbors_sweep": [sweep_point(k, None, 1.3 - k / 50) for k in (1, 4)],
        "fraction_sweep": [sweep_point(2, fraction, 1.7 - fraction / 2) for fraction in (0.1, 0.5)],
        "examples": [
            {
                "document_id": HOSTILE,
                "document": 7,
                "chunk": 3,
                "kind": "gain",
                "context": f"{HOSTILE} the river shall swarm",
                "tokens": [" with", " frogs", HOSTILE],
                "gain": [0.2, 5.1, -1.5],
                "run": [0, 6, 6],
                "neighbors": [{"document_id": HOSTILE, "title": HOSTILE, "text": HOSTILE, "continuation": HOSTILE}],
            }
        ],
        "inputs": {
            "num_documents": 400,
            "num_chunks": 2101,
            "num_tokens": 60049,
            "num_bytes": 234623,
            "num_unscorable": 1,
            "num_short": 2,
            "num_same_id": 3,
            "leaked": [{"id": HOSTILE, "stored_id": HOSTILE, "contained": 0.93, "same_id": False}],
            "copies": [{"id": HOSTILE, "copy_of": HOSTILE, "contained": 0.97}],
        },
        "provenance": {
            "command": f"retro evaluate {HOSTILE}",
            "seed": 0,
            "versions": {"torch": "2.13.0"},
            "model": {"name": HOSTILE, "revision": None},
        },
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(content))
    return Evaluation.load(folder)


def sweep_point(num_neighbors: int, fraction: float | None, value: float) -> dict:
    return {
        "num_neighbors": num_neighbors,
        "fraction": fraction,
        "num_documents": 341,
        "num_chunks": 1610,
        "bits_per_byte": value,
        "difference": interval(value - 1.7054),
        "gain_share": 0.9,
    }


def sample_trace() -> Trace:
    """Three chunks: two complete ones, whose second has nothing to find, and a rest."""
    tokens = [" the", " river", " shall", " swarm", " with", " frogs", HOSTILE, "é", " which", " shall", " go", " up"]
    tokens += [" and", "", "\n", " \ud800come", " into", " thy", " house"]
    nats_off: list[float | None] = [None, *(3.0 + place / 10 for place in range(len(tokens) - 1))]
    nats_on: list[float | None] = [
        None,
        *(3.0 + place / 10 for place in range(7)),
        *(1.0 + place / 5 for place in range(11)),
    ]
    neighbor = {
        "chunk_id": 5,
        "document_id": HOSTILE,
        "title": HOSTILE,
        "source": HOSTILE,
        "text": f"And the river shall bring forth frogs {HOSTILE}",
        "continuation": ", which shall go up and come",
        "metric": "inner_product",
    }
    neighbors = [
        TracedNeighbor(**neighbor, score=0.79, gains=[2.5, 0.5, 0.0, -1.0, 0.1, 0.1, 0.1, 0.1], later_gain=-0.25),
        TracedNeighbor(**neighbor, score=0.71, gains=[0.0] * CHUNK_SIZE, later_gain=0.0),
    ]
    chunks = [TracedChunk(0, 8, neighbors), TracedChunk(8, 16, []), TracedChunk(16, 19, [])]
    return Trace(HOSTILE, HOSTILE, tokens, nats_off, nats_on, chunks, CHUNK_SIZE, 300)
