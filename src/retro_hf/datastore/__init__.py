"""The datastore of RETRO: documents cut into chunks, their keys, and the index that finds them. Knows no model."""

from .chunks import chunk_texts, tokenizer_fingerprint
from .embedder import ChunkEmbedder
from .manifest import DatastoreManifest
from .store import RetroDatastore


__all__ = ["ChunkEmbedder", "DatastoreManifest", "RetroDatastore", "chunk_texts", "tokenizer_fingerprint"]
