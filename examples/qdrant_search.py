"""Let a vector database find the neighbors: Qdrant instead of the datastore's own FAISS index.

    pip install qdrant-client
    python examples/qdrant_search.py

Qdrant holds the keys of the datastore under its chunk ids. The tokens still come from the datastore. Here Qdrant runs inside this
process; `QdrantClient(url=...)` connects to a server.
"""

import numpy as np
from qdrant_client import QdrantClient, models
from transformers import AutoTokenizer

from retro_hf import ChunkEmbedder, RetroDatastore, RetroRetriever
from retro_hf.datastore import EmbeddingSearcher


class QdrantIndex:
    """A `VectorIndex` over a collection that this class fills."""

    def __init__(self, client: QdrantClient, datastore: RetroDatastore, name: str = "chunks", batch_size: int = 1024):
        self.client, self.name = client, name
        size = models.VectorParams(size=datastore.manifest.dim, distance=models.Distance.DOT)
        client.create_collection(name, vectors_config=size)
        for start in range(0, datastore.num_chunks, batch_size):
            ids = np.arange(start, min(start + batch_size, datastore.num_chunks))
            payloads = [{"document": number} for number in datastore.document_of(ids).tolist()]
            vectors = datastore.keys_of(ids).tolist()
            client.upsert(name, models.Batch(ids=ids.tolist(), vectors=vectors, payloads=payloads))

    def search(self, queries, num_neighbors, *, exclude_documents=None):
        excluded = np.full((len(queries), 1), -1) if exclude_documents is None else np.asarray(exclude_documents)
        excluded = excluded.reshape(len(queries), -1)
        requests = [
            models.QueryRequest(query=query.tolist(), limit=num_neighbors, filter=_without(documents))
            for query, documents in zip(queries, excluded, strict=True)
        ]
        scores = np.full((len(queries), num_neighbors), -np.inf, dtype=np.float32)
        ids = np.full((len(queries), num_neighbors), -1, dtype=np.int64)
        for row, response in enumerate(self.client.query_batch_points(self.name, requests)):
            for column, point in enumerate(response.points):
                scores[row, column], ids[row, column] = point.score, point.id
        return scores, ids


def _without(documents: np.ndarray) -> models.Filter:
    return models.Filter(
        must_not=[models.FieldCondition(key="document", match=models.MatchAny(any=documents.tolist()))]
    )


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained("hub_configs/retro-bible")
    embedder = ChunkEmbedder.from_pretrained(".data/minilm")  # or "sentence-transformers/all-MiniLM-L6-v2"
    passages = open("examples/data/exodus_8_kjv.txt").read().splitlines()
    datastore = RetroDatastore.from_texts(passages, tokenizer, embedder=embedder, chunk_size=32)

    index = QdrantIndex(QdrantClient(":memory:"), datastore)
    searcher = EmbeddingSearcher(datastore, embedder, index)
    for searched in (RetroRetriever(datastore, searcher=searcher), RetroRetriever(datastore, embedder=embedder)):
        for neighbor in searched.find("Aaron stretched out his hand")[0]:
            print(f"{neighbor.score:.3f}", neighbor.chunk_id, neighbor.text)


if __name__ == "__main__":
    main()
