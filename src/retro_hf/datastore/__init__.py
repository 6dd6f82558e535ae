"""The datastore of RETRO: documents cut into chunks, their keys, and the index that finds them. It knows no model."""

from .chunks import chunk_texts
from .compatibility import tokenizer_fingerprint
from .document_changes import Changes
from .duplicates import near_duplicates
from .embedder import ChunkEmbedder
from .executors import RankExecutor
from .index_plan import IndexOptions
from .lexical import LexicalSearcher
from .manifest import DatastoreManifest
from .ray import RayExecutor, RayShards
from .searchers import EmbeddingSearcher, HybridSearcher, Searcher, VectorIndex
from .store import RetroDatastore


__all__ = [
    "Changes",
    "ChunkEmbedder",
    "DatastoreManifest",
    "EmbeddingSearcher",
    "HybridSearcher",
    "IndexOptions",
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
