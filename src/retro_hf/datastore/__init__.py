"""The datastore of RETRO: documents cut into chunks, their keys, and the index that finds them. Knows no model."""

from .chunks import chunk_texts, tokenizer_fingerprint
from .cluster import RayExecutor
from .cluster_search import RayShards
from .duplicates import near_duplicates
from .embedder import ChunkEmbedder
from .executors import RankExecutor
from .lexical import LexicalSearcher
from .manifest import DatastoreManifest
from .searchers import EmbeddingSearcher, HybridSearcher, Searcher, VectorIndex
from .store import RetroDatastore


__all__ = [
    "ChunkEmbedder",
    "DatastoreManifest",
    "EmbeddingSearcher",
    "HybridSearcher",
    "LexicalSearcher",
    "RankExecutor",
    "RayExecutor",
    "RayShards",
    "RetroDatastore",
    "Searcher",
    "VectorIndex",
    "chunk_texts",
    "near_duplicates",
    "tokenizer_fingerprint",
]
