"""The oracle held against the paper: causality by gradient, symmetry in the neighbors, and Listing 1's shift."""

from dataclasses import replace

import pytest
import torch

from . import naive_retro
from .naive_retro import (
    NaiveShape,
    attention,
    cca_distance,
    chunked_cross_attention,
    encode,
    naive_decoder_logits,
    random_weights,
    self_distance,
)


M = 4  # chunk size
T = 14  # three and a half chunks
R = 2 * M  # a neighbor and its continuation
K = 2
VOCAB = T + 3 * K * R + 2

# Heads times head size (10, 6, 7) differ from each other and from the widths (12, 8): a mixed-up argument cannot pass.
SHAPE = NaiveShape(
    num_layers=3,
    num_heads=2,
    head_dim=5,
    encoder_num_layers=2,
    encoder_num_heads=3,
    encoder_head_dim=2,
    cross_num_heads=1,
    cross_head_dim=7,
    chunk_size=M,
    cross_attention_layers=(0, 2),
    encoder_cross_attention_layers=(0,),
    eps=1e-6,
)

# Each token stands in one place only, so a row of an embedding's gradient is the gradient at one place. The last two
# ids stand nowhere: their logits depend on the tied embedding of the inputs through the inputs alone.
INPUT_IDS = list(range(T))
NEIGHBORS = [[[T + (u * K + j) * R + i for i in range(R)] for j in range(K)] for u in range(3)]


def weights(shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return random_weights(
        shape, vocab=VOCAB, d=12, ffw=20, d_enc=8, ffw_enc=10, generator=generator, dtype=torch.float64
    )


def influence(shape, chunk_offset=0):
    """Largest |gradient| at each token of the row, and at each neighbor token, for the logits of each position."""
    w = weights(shape)
    tables = [w["embed"].requires_grad_(), w["encoder.embed"].requires_grad_()]
    logits = naive_decoder_logits(w, shape, INPUT_IDS, NEIGHBORS, chunk_offset)
    rows = []
    for t in range(T):
        grads = torch.autograd.grad(logits[t, -2] - 0.7 * logits[t, -1], tables, retain_graph=True)
        rows.append([g.abs().amax(dim=-1) for g in grads])
    of_tokens = torch.stack([row[0][:T] for row in rows])
    of_neighbors = torch.stack([row[1][T : T + 3 * K * R] for row in rows]).reshape(T, 3, K * R)
    return of_tokens, of_neighbors


@pytest.mark.parametrize("chunk_offset", [0, 1, M - 1])
def test_gradient_causality_at_every_position(chunk_offset):
    of_tokens, of_neighbors = influence(SHAPE, chunk_offset)
    for t in range(T):
        for s in range(T):
            assert (of_tokens[t, s] > 0) == (s <= t), (t, s)
        for u in range(3):
            reached = t + chunk_offset >= u * M + M - 1
            assert (of_neighbors[t, u] > 0).all() if reached else (of_neighbors[t, u] == 0).all(), (t, u)


@pytest.mark.parametrize("chunk_offset", [0, M - 1])
def test_one_layer_reaches_only_the_attending_chunk(chunk_offset):
    shape = replace(SHAPE, num_layers=1, cross_attention_layers=(0,))
    _, of_neighbors = influence(shape, chunk_offset)
    for t in range(T):
        for u in range(3):
            reached = u * M + M - 1 <= t + chunk_offset <= u * M + 2 * M - 2
            assert (of_neighbors[t, u] > 0).all() if reached else (of_neighbors[t, u] == 0).all(), (t, u)


@pytest.mark.parametrize("chunk_offset", [0, 1, M - 1])
def test_encoded_neighbor_reads_its_own_chunk_and_its_own_tokens(chunk_offset):
    w = weights()
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(3 * M, 12, generator=generator, dtype=torch.float64)
    row = h[chunk_offset:].clone().requires_grad_()
    table = w["encoder.embed"].requires_grad_()
    encoded = encode(w, SHAPE, row, NEIGHBORS, chunk_offset)
    assert [len(of_chunk) for of_chunk in encoded] == [K, K, K]
    for u in range(3):
        for j in range(K):
            of_row, of_table = torch.autograd.grad(encoded[u][j].sin().sum(), [row, table], retain_graph=True)
            read = {t + chunk_offset for t in range(len(row)) if of_row[t].abs().max() > 0}
            assert read == set(range(max(u * M, chunk_offset), (u + 1) * M))
            assert {token for token in range(VOCAB) if of_table[token].abs().max() > 0} == set(NEIGHBORS[u][j])
    # The grid, not the start of the row, says where a token stands in its chunk.
    unshifted = encode(w, SHAPE, h, NEIGHBORS, 0)
    torch.testing.assert_close(encoded[1:], unshifted[1:], rtol=0, atol=1e-12)


def listing_1(observation, neighbors, query, key, value):
    """Listing 1 of the paper, array for array, with its relative positions left at zero."""
    length, width = observation.shape
    num_chunks = length // M
    attending = torch.nn.functional.pad(observation[M - 1 :], (0, 0, 0, M - 1)).reshape(num_chunks, M, width)
    outputs = []
    for chunk, of_chunk in zip(attending, neighbors, strict=True):
        logits = torch.stack([(chunk @ query) @ (neighbor @ key).T for neighbor in of_chunk])
        values = torch.stack([neighbor @ value for neighbor in of_chunk])
        logits = logits.movedim(0, -1).reshape(M, R * K)
        values = values.movedim(0, 1).reshape(R * K, width)
        outputs.append(torch.softmax(logits, dim=-1) @ values)
    output = torch.cat(outputs)
    return torch.nn.functional.pad(output, (0, 0, M - 1, 0))[:length]


def test_chunked_cross_attention_is_listing_1():
    width, num_chunks = 6, 3
    generator = torch.Generator().manual_seed(1)
    query, key, value, observation, encoded = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in [(width, width)] * 3 + [(num_chunks * M, width), (num_chunks, K, R, width)]
    )
    w = {"cca.q": query.T, "cca.k": key.T * width**0.5, "cca.v": value.T}
    w |= {"cca.o": torch.eye(width, dtype=torch.float64), "cca.r": torch.zeros_like(query)}
    shape = replace(SHAPE, cross_num_heads=1, cross_head_dim=width)
    ours = chunked_cross_attention(w, "cca", shape, observation, [list(e) for e in encoded], chunk_offset=0)
    torch.testing.assert_close(ours, listing_1(observation, encoded, query, key, value), rtol=0, atol=1e-12)
    assert (ours[: M - 1] == 0).all() and (ours[M - 1 :] != 0).all()


def test_attention_is_transformer_xl_with_matrices():
    length, width, heads, head_dim = 5, 6, 2, 4
    generator = torch.Generator().manual_seed(2)
    sizes = {"q": (8, 6), "k": (8, 6), "v": (8, 6), "r": (8, 6), "o": (6, 8)}
    w = {f"a.{n}": torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in sizes.items()}
    x = torch.randn(length, width, generator=generator, dtype=torch.float64)
    distances = [[self_distance(i, j) if j <= i else None for j in range(length)] for i in range(length)]
    ours = attention(w, "a", x, x, distances, heads, head_dim)

    q, k, v = ((x @ w[f"a.{n}"].T).reshape(length, heads, head_dim) for n in "qkv")
    steps = torch.arange(length, dtype=torch.float64)
    difference = steps[:, None] - steps[None, :]
    angles = difference[..., None] / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    r = (torch.cat([angles.sin(), angles.cos()], dim=-1) @ w["a.r"].T).reshape(length, length, heads, head_dim)
    logits = torch.einsum("ihd,jhd->hij", q, k) + torch.einsum("ihd,ijhd->hij", q, r)
    logits = (logits / head_dim**0.5).masked_fill(difference < 0, -torch.inf)
    expected = torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).reshape(length, -1) @ w["a.o"].T
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_offset", [0, 1, M - 1])
def test_distances_in_the_sequence(monkeypatch, chunk_offset):
    seen = {}

    def record(w, name, queries, keys, distances, *args):
        seen.setdefault(name, []).append(distances)
        return attention(w, name, queries, keys, distances, *args)

    monkeypatch.setattr(naive_retro, "attention", record)
    naive_decoder_logits(weights(), SHAPE, INPUT_IDS, NEIGHBORS, chunk_offset)

    assert seen["layers.1.attn"] == [[[t - s if s <= t else None for s in range(T)] for t in range(T)]]
    assert seen["encoder.layers.1.attn"][0] == [[i - j for j in range(R)] for i in range(R)]
    # With the paper's counts from 1: d_enc(i', i) = i' - i, over the tokens of the first chunk that exist.
    first = list(range(chunk_offset + 1, M + 1))
    assert seen["encoder.layers.0.cross"][0] == [[i_prime - i for i in first] for i_prime in range(1, R + 1)]
    full = list(range(1, M + 1))
    assert seen["encoder.layers.0.cross"][K] == [[i_prime - i for i in full] for i_prime in range(1, R + 1)]
    # d(i, i') = i - i' + m - 1, i counted within the attending chunk, the same for each neighbor.
    attended = [t + chunk_offset - (M - 1) for t in range(T) if M - 1 <= t + chunk_offset < 3 * M + M - 1]
    assert seen["layers.2.cca"][: len(attended)] == [
        [[place % M + 1 - i_prime + M - 1 for i_prime in range(1, R + 1)] * K] for place in attended
    ]


def test_cca_distances_span_equation_6():
    distances = [cca_distance(i, j, M) for i in range(M) for j in range(R)]
    assert (min(distances), max(distances)) == (-M, 2 * M - 2)
    # The neighbor token that lies where the predicted token will stand.
    assert {cca_distance(i, M + i, M) for i in range(M)} == {-1}


def test_neighbor_order_and_duplicates_change_nothing():
    w = weights()
    logits = naive_decoder_logits(w, SHAPE, INPUT_IDS, NEIGHBORS)
    reversed_neighbors = [of_chunk[::-1] for of_chunk in NEIGHBORS]
    doubled_neighbors = [of_chunk + of_chunk for of_chunk in NEIGHBORS]
    for changed in (reversed_neighbors, doubled_neighbors):
        again = naive_decoder_logits(w, SHAPE, INPUT_IDS, changed)
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-11)
    swapped_chunks = naive_decoder_logits(w, SHAPE, INPUT_IDS, NEIGHBORS[::-1])
    assert (swapped_chunks[M - 1 :] - logits[M - 1 :]).abs().amax(dim=-1).min() > 1e-3


def test_off_equals_no_neighbors():
    w = weights()
    off = naive_decoder_logits(w, SHAPE, INPUT_IDS, None)
    for neighbors in ([], [[], [], []], [[[]], [], [[], []]]):
        assert torch.equal(naive_decoder_logits(w, SHAPE, INPUT_IDS, neighbors), off)
    on = naive_decoder_logits(w, SHAPE, INPUT_IDS, NEIGHBORS)
    assert torch.equal(on[: M - 1], off[: M - 1])
    assert (on[M - 1 :] - off[M - 1 :]).abs().amax(dim=-1).min() > 1e-3


def test_missing_and_ragged_neighbors():
    w = weights()
    ragged = [[NEIGHBORS[0][0][:3], NEIGHBORS[0][1]], [], [NEIGHBORS[2][0][:1]]]
    logits = naive_decoder_logits(w, SHAPE, INPUT_IDS, ragged)
    assert logits.isfinite().all()
    # The half chunk at the end is never attended, whatever is offered for it.
    assert torch.equal(naive_decoder_logits(w, SHAPE, INPUT_IDS, ragged + [NEIGHBORS[1]]), logits)
    shape = replace(SHAPE, num_layers=1, cross_attention_layers=(0,))
    single = naive_decoder_logits(weights(shape), shape, INPUT_IDS, ragged)
    off = naive_decoder_logits(weights(shape), shape, INPUT_IDS, None)
    same = [torch.equal(single[t], off[t]) for t in range(T)]
    assert same == [not (M - 1 <= t < 2 * M - 1 or t >= 3 * M - 1) for t in range(T)]


def test_a_longer_row_does_not_change_its_beginning():
    w = weights()
    logits = naive_decoder_logits(w, SHAPE, INPUT_IDS, NEIGHBORS)
    for length in (1, M - 1, M, M + 1, 2 * M - 1, 2 * M):
        prefix = naive_decoder_logits(w, SHAPE, INPUT_IDS[:length], NEIGHBORS)
        torch.testing.assert_close(prefix, logits[:length], rtol=0, atol=1e-11)


def test_chunk_offset_out_of_range_is_refused():
    with pytest.raises(ValueError, match="chunk_offset is 4"):
        naive_decoder_logits(weights(), SHAPE, INPUT_IDS, None, chunk_offset=M)
