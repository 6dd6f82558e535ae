"""
The layout of an index file, checked byte for byte before FAISS reads it.

FAISS opens whatever a file says it is. Some kinds name other files, and some fields are used as sizes or places without a
check, so FAISS would read past the end of the file. Only the kinds that [`build_index`] makes are opened, and only if every
size in the file follows from the factory string, the number of vectors and the dimension in the manifest.
"""

from __future__ import annotations

import re
import struct
from typing import Any, NamedTuple

import numpy as np


_CODE = r"Flat|SQ(?:4|6|8|fp16|bf16)|PQ[1-9]\d{0,4}(?:x[1-9]\d?)?(?:fs)?"
_FACTORY = re.compile(
    r"(?:PCA(?P<pca>W?R?)(?P<pca_dim>[1-9]\d{0,4}),)?"
    r"(?:IVF(?P<lists>[1-9]\d{0,8})(?:_HNSW(?P<list_links>[1-9]\d{0,3}))?,|HNSW(?P<links>[1-9]\d{0,3})(?:,|$))?"
    rf"(?P<code>{_CODE})?"
    r"(?:,(?:Refine\((?P<refine>Flat|SQ(?:fp16|bf16|8))\)|R(?P<refine_flat>Flat)))?"
)
_MAX_LEVELS = 64
_MAX_SEARCH = 1 << 16
_MAX_BITS = 16
# Vectors of a fast-scan index are stored in blocks of this many.
_BLOCK = 32
_BLOCK_ROWS = 1 << 20


class IndexKind(NamedTuple):
    """A factory string in parts; a part is None or 0 where the index has none.

    Attributes:
        pca_dim: dimensions after the PCA.
        lists: number of inverted lists; `list_links` are the links per node of a graph over their centroids.
        links: links per node of a graph over the vectors.
        code: `"Flat"`, a scalar quantizer such as `"SQ8"`, or a product quantizer such as `"PQ8x4fs"`.
        refine: the code of the vectors that results are scored with again.
    """

    pca_dim: int
    lists: int
    list_links: int
    links: int
    code: str
    refine: str | None


def parse_factory(factory: str) -> IndexKind | None:
    """The parts of a factory string; None for a kind of index that a datastore does not have."""
    match = _FACTORY.fullmatch(factory)
    if match is None or not factory or factory.endswith(","):
        return None
    part = match.groupdict()
    if part["code"] is None and part["links"] is None:
        return None
    numbers = {name: int(part[name] or 0) for name in ("pca_dim", "lists", "list_links", "links")}
    kind = IndexKind(**numbers, code=part["code"] or "Flat", refine=part["refine"] or part["refine_flat"])
    if kind.code.startswith("PQ"):
        bits = _product(kind.code)[1]
        # FAISS ranks a graph over such codes by another metric than the inner product.
        if kind.links or bits > _MAX_BITS or (kind.code.endswith("fs") and bits != 4):
            return None
    return kind


def _product(code: str) -> tuple[int, int]:
    """Parts of a vector and bits per part of a product quantizer."""
    parts, _, bits = code.removeprefix("PQ").removesuffix("fs").partition("x")
    return int(parts), int(bits or 8)


def check_index(data: np.ndarray, factory: str, num_chunks: int, dim: int) -> None:
    """Check that a file is an index of `factory` over `num_chunks` vectors of length `dim`, and nothing else.

    Args:
        data (`np.ndarray` of uint8): the whole file.
    Raises:
        ValueError: if it is not; the message says where it differs.
    """
    kind = parse_factory(factory)
    if kind is None:
        raise ValueError(f"a datastore does not have indexes of the kind {factory!r}")
    reader = _Reader(data)
    if kind.refine:
        reader.kind("IxRF")
        reader.header(dim, num_chunks)
    inner = dim
    if kind.pca_dim:
        inner = kind.pca_dim
        reader.kind("IxPT")
        reader.header(dim, num_chunks)
        _pca(reader, dim, inner)
    if kind.lists:
        _inverted_lists(reader, kind, inner, num_chunks)
    elif kind.links:
        _graph(reader, kind.links, kind.code, inner, num_chunks)
    else:
        _codes(reader, kind.code, inner, num_chunks)
    if kind.refine:
        _codes(reader, kind.refine, dim, num_chunks)
        reader.value("<f", "k_factor", np.isfinite)
    reader.end()


class _Reader:
    """Reads a file from the front; every step is checked against the bytes that are left."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data
        self._at = 0

    def _take(self, size: int, what: str) -> np.ndarray:
        if not 0 <= size <= len(self._data) - self._at:
            raise ValueError(f"{what} needs {size:,} bytes at byte {self._at:,} of {len(self._data):,}")
        self._at += size
        return self._data[self._at - size : self._at]

    def kind(self, *names: str) -> str:
        """The four letters that say what follows; one of `names`."""
        found = self._take(4, "the kind").tobytes().decode("latin-1")
        if found not in names:
            raise ValueError(f"at byte {self._at - 4:,} it is of the kind {found!r} instead of {' or '.join(names)!r}")
        return found

    def value(self, layout: str, name: str, expected: Any = None) -> Any:
        """One number; `expected` is its value, or a function that says whether it is right."""
        (found,) = struct.unpack(layout, self._take(struct.calcsize(layout), name).tobytes())
        if expected is not None and not (expected(found) if callable(expected) else found == expected):
            wanted = "" if callable(expected) else f" instead of {expected}"
            raise ValueError(f"its {name} is {found}{wanted}")
        return found

    def vector(self, dtype: str, name: str, length: int | None = None) -> np.ndarray:
        """An array with its length before it."""
        count = self.value("<Q", f"length of {name}", length)
        width = np.dtype(dtype).itemsize
        return np.frombuffer(self._take(count * width, name), dtype=dtype)

    def header(self, dim: int, num_vectors: int) -> None:
        """What every index begins with: sizes, two unused numbers, whether it is trained, and the metric."""
        self.value("<i", "dimension", dim)
        self.value("<q", "number of vectors", num_vectors)
        self.value("<q", "first unused field")
        self.value("<q", "second unused field")
        self.value("<B", "is_trained", 1)
        self.value("<i", "metric", 0)

    def end(self) -> None:
        """Nothing may follow."""
        if self._at != len(self._data):
            raise ValueError(f"{len(self._data) - self._at:,} bytes follow the index")


def _scalar(reader: _Reader, code: str, dim: int) -> int:
    """A scalar quantizer; returns the bytes per vector."""
    import faiss

    quantizer = faiss.ScalarQuantizer(dim, getattr(faiss.ScalarQuantizer, _SCALAR_TYPES[code]))
    reader.value("<i", "type of the scalar quantizer", int(quantizer.qtype))
    reader.value("<i", "range of the scalar quantizer")
    reader.value("<f", "argument of the range")
    reader.value("<Q", "dimension of the scalar quantizer", dim)
    reader.value("<Q", "bytes per code", int(quantizer.code_size))
    # The lowest value and the width of each dimension; float codes have none.
    reader.vector("<f4", "the ranges", 2 * dim if code in ("SQ4", "SQ6", "SQ8") else 0)
    return int(quantizer.code_size)


_SCALAR_TYPES = {"SQ4": "QT_4bit", "SQ6": "QT_6bit", "SQ8": "QT_8bit", "SQfp16": "QT_fp16", "SQbf16": "QT_bf16"}


def _product_quantizer(reader: _Reader, code: str, dim: int) -> int:
    """A product quantizer; returns the bytes per vector."""
    parts, bits = _product(code)
    if dim % parts:
        raise ValueError(f"{code} does not divide {dim} dimensions")
    reader.value("<Q", "dimension of the product quantizer", dim)
    reader.value("<Q", "parts of the product quantizer", parts)
    reader.value("<Q", "bits of the product quantizer", bits)
    reader.vector("<f4", "the centroids of the product quantizer", dim << bits)
    return (parts * bits + 7) // 8


def _fast_scan_bytes(code: str) -> tuple[int, int]:
    """The parts of a fast-scan code, made even, and the bytes of a block of vectors."""
    parts = _product(code)[0]
    even = parts + parts % 2
    return even, _BLOCK * even // 2


def _codes(reader: _Reader, code: str, dim: int, num_vectors: int) -> None:
    """An index that holds the codes of its vectors in order."""
    if code == "Flat":
        reader.kind("IxFI")
        reader.header(dim, num_vectors)
        reader.vector("<f4", "the vectors", dim * num_vectors)
    elif code.startswith("SQ"):
        reader.kind("IxSQ")
        reader.header(dim, num_vectors)
        size = _scalar(reader, code, dim)
        reader.vector("u1", "the codes", size * num_vectors)
    elif code.endswith("fs"):
        reader.kind("IPfs")
        reader.header(dim, num_vectors)
        _product_quantizer(reader, code, dim)
        even, size = _fast_scan_bytes(code)
        blocks = -(-num_vectors // _BLOCK)
        reader.value("<i", "implementation", 0)
        reader.value("<i", "block", _BLOCK)
        reader.value("<i", "block of queries", 0)
        reader.value("<Q", "vectors with padding", blocks * _BLOCK)
        reader.value("<Q", "parts with padding", even)
        reader.vector("u1", "the codes", blocks * size)
    else:
        reader.kind("IxPq")
        reader.header(dim, num_vectors)
        size = _product_quantizer(reader, code, dim)
        reader.vector("u1", "the codes", size * num_vectors)
        reader.value("<i", "type of search", 0)
        reader.value("<B", "signs", 0)
        reader.value("<i", "threshold")


def _pca(reader: _Reader, dim: int, kept: int) -> None:
    """One PCA, before an index of the dimensions that it keeps."""
    reader.value("<i", "number of transforms", 1)
    reader.kind("Pcam")
    reader.value("<f", "power")
    reader.value("<f", "epsilon")
    reader.value("<B", "rotation", lambda value: value <= 1)
    reader.value("<i", "bins", 0)
    reader.vector("<f4", "the mean", dim)
    reader.vector("<f4", "the eigenvalues", dim)
    reader.vector("<f4", "the axes", dim * dim)
    has_bias = reader.value("<B", "bias", lambda value: value <= 1)
    reader.vector("<f4", "the matrix", dim * kept)
    reader.vector("<f4", "the bias", kept if has_bias else None)
    reader.value("<i", "dimension before the PCA", dim)
    reader.value("<i", "dimension after the PCA", kept)
    reader.value("<B", "is_trained", 1)


def _graph(reader: _Reader, links: int, code: str, dim: int, num_vectors: int) -> None:
    """A graph (HNSW) over an index of codes."""
    reader.kind("IHNf" if code == "Flat" else "IHNs")
    reader.header(dim, num_vectors)
    probabilities = reader.vector("<f8", "the probabilities of the levels")
    starts = reader.vector("<i4", "the links per level")
    num_levels = len(starts) - 1
    if not 1 <= num_levels <= _MAX_LEVELS or len(probabilities) != num_levels:
        raise ValueError(f"its graph has {num_levels} levels and {len(probabilities)} probabilities")
    # Twice the links on the lowest level.
    if not np.array_equal(starts, np.cumsum([0, 2 * links, *[links] * (num_levels - 1)])):
        raise ValueError(f"its graph does not have {links} links per node")
    levels = reader.vector("<i4", "the levels", num_vectors)
    offsets = reader.vector("<u8", "the places of the links", num_vectors + 1)
    neighbors = reader.vector("<i4", "the links")
    if levels.min() < 1 or levels.max() > num_levels:
        raise ValueError("a node of its graph has a level that does not exist")
    if offsets[0] or offsets[-1] != len(neighbors) or (np.diff(offsets) != starts[levels]).any():
        raise ValueError("the links of its graph are not where its levels put them")
    for first in range(0, len(neighbors), _BLOCK_ROWS):
        block = neighbors[first : first + _BLOCK_ROWS]
        if block.min() < -1 or block.max() >= num_vectors:
            raise ValueError("its graph links to vectors that it does not have")
    # A link on a higher level must lead to a node that is there, too.
    for level in range(1, int(levels.max())):
        nodes = np.flatnonzero(levels > level)
        places = offsets[nodes].astype(np.int64)[:, None] + np.arange(starts[level], starts[level + 1])
        linked = neighbors[places]
        if (levels[np.maximum(linked, 0)][linked >= 0] <= level).any():
            raise ValueError("its graph links to a node on a level where that node is not")
    entry = reader.value("<i", "entry point", lambda value: 0 <= value < num_vectors)
    reader.value("<i", "highest level", int(levels.max()) - 1)
    if levels[entry] != levels.max():
        raise ValueError("the entry point of its graph is not on the highest level")
    reader.value("<i", "efConstruction", lambda value: 1 <= value <= _MAX_SEARCH)
    reader.value("<i", "efSearch", lambda value: 1 <= value <= _MAX_SEARCH)
    reader.value("<i", "beam", 1)
    _codes(reader, code, dim, num_vectors)


def _inverted_lists(reader: _Reader, kind: IndexKind, dim: int, num_vectors: int) -> None:
    """Lists of codes, and an index of their centroids."""
    code, fast = kind.code, kind.code.endswith("fs")
    reader.kind("IwPf" if fast else {"F": "IwFl", "S": "IwSq", "P": "IwPQ"}[code[0]])
    reader.header(dim, num_vectors)
    reader.value("<Q", "number of lists", kind.lists)
    reader.value("<Q", "nprobe", lambda value: value >= 1)
    if kind.list_links:
        _graph(reader, kind.list_links, "Flat", dim, kind.lists)
    else:
        _codes(reader, "Flat", dim, kind.lists)
    reader.value("<B", "map", 0)
    reader.vector("<i8", "the map", 0)
    size = 4 * dim
    if code.startswith("SQ"):
        size = _scalar(reader, code, dim)
        reader.value("<Q", "bytes per code", size)
        reader.value("<B", "by_residual", lambda value: value <= 1)
    elif fast:
        reader.value("<B", "by_residual", lambda value: value <= 1)
        size = (_product(code)[0] + 1) // 2
        reader.value("<Q", "bytes per code", size)
        reader.value("<i", "block", _BLOCK)
        even, block_size = _fast_scan_bytes(code)
        reader.value("<Q", "parts with padding", even)
        reader.value("<i", "implementation", 0)
        reader.value("<Q", "block of queries", 0)
        _product_quantizer(reader, code, dim)
        _blocks(reader, kind.lists, block_size, num_vectors)
        return
    elif code.startswith("PQ"):
        reader.value("<B", "by_residual", lambda value: value <= 1)
        parts, bits = _product(code)
        size = (parts * bits + 7) // 8
        reader.value("<Q", "bytes per code", size)
        _product_quantizer(reader, code, dim)
    _arrays(reader, kind.lists, size, num_vectors)


def _arrays(reader: _Reader, num_lists: int, code_size: int, num_vectors: int) -> None:
    """Lists of codes and ids in arrays."""
    reader.kind("ilar")
    reader.value("<Q", "number of lists", num_lists)
    reader.value("<Q", "bytes per code", code_size)
    sizes = np.zeros(num_lists, dtype=np.uint64)
    if reader.kind("full", "sprs") == "full":
        sizes = reader.vector("<u8", "the sizes of the lists", num_lists)
    else:
        pairs = reader.vector("<u8", "the sizes of the lists")
        places, filled = pairs[: len(pairs) // 2 * 2].reshape(-1, 2).T
        if len(pairs) % 2 or len(np.unique(places)) != len(places) or (places >= num_lists).any():
            raise ValueError("the sizes of its lists name lists that it does not have")
        sizes[places.astype(np.int64)] = filled
    if (sizes > num_vectors).any() or int(sizes.sum()) != num_vectors:
        raise ValueError(f"its lists do not hold {num_vectors:,} vectors together")
    for size in sizes.tolist():
        if size:
            reader._take(size * code_size, "the codes of a list")
            _ids(np.frombuffer(reader._take(size * 8, "the ids of a list"), dtype="<i8"), num_vectors)


def _blocks(reader: _Reader, num_lists: int, block_size: int, num_vectors: int) -> None:
    """Lists of fast-scan codes in blocks, and their ids."""
    reader.kind("ilbl")
    reader.value("<Q", "number of lists", num_lists)
    # Codes in blocks have no size of their own, which FAISS writes as -1.
    reader.value("<Q", "bytes per code", (1 << 64) - 1)
    reader.value("<Q", "vectors per block", _BLOCK)
    reader.value("<Q", "bytes per block", block_size)
    total = 0
    for _ in range(num_lists):
        ids = reader.vector("<i8", "the ids of a list")
        _ids(ids, num_vectors)
        reader.vector("u1", "the codes of a list", -(-len(ids) // _BLOCK) * block_size)
        total += len(ids)
    if total != num_vectors:
        raise ValueError(f"its lists hold {total:,} vectors instead of {num_vectors:,}")


def _ids(ids: np.ndarray, num_vectors: int) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= num_vectors):
        raise ValueError("its lists name vectors that it does not have")
