"""Algorithm 1 of Borgeaud et al. (2022), transcribed with Python loops: the oracle the model is compared with.

Nothing here is shared with the package, and nothing is fast: one row, no padding, no mask tensors, no cache. A
position is a list index, a distance is an int, and a key that may not be attended is never looked at.

Layers, positions and chunks are counted from 0 (the paper counts from 1). `m` is the chunk size.

Weights come as a flat dict, matrices as (out, in), norms as vectors; `V` vocabulary, `d` decoder width, `e` encoder
width, attention matrices named `{q,k,v,o,r}`, feed-forward ones `{up,down}`:

    embed (V, d)                      tied with the read-out
    layers.{p}.attn_norm (d)          layers.{p}.attn.*     q, k, v, r read d
    layers.{p}.cca_norm (d)           layers.{p}.cca.*      q, r read d; k, v read e; only p in cross_attention_layers
    layers.{p}.cca.null (heads)       where the model has a null key: its logits
    layers.{p}.ffw_norm (d)           layers.{p}.ffw.*
    final_norm (d)
    encoder.embed (V, e)
    encoder.layers.{j}.attn_norm (e)  encoder.layers.{j}.attn.*
    encoder.layers.{j}.cross_norm (e) encoder.layers.{j}.cross.*  q, r read e; k, v read d
    encoder.layers.{j}.ffw_norm (e)   encoder.layers.{j}.ffw.*
    encoder.chunk_norm (d)            of H_u, before the keys and values of every encoder cross-attention
    encoder.final_norm (e)            of E_u, before the keys and values of every chunked cross-attention
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NaiveShape:
    """The integers that the weights do not tell. Layer indices are 0-based."""

    num_layers: int
    num_heads: int
    head_dim: int
    encoder_num_layers: int
    encoder_num_heads: int
    encoder_head_dim: int
    cross_num_heads: int
    cross_head_dim: int
    chunk_size: int
    cross_attention_layers: tuple[int, ...]
    encoder_cross_attention_layers: tuple[int, ...]
    eps: float


def rms_norm(x, gain, eps):
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * gain


def ffw(w, name, x):
    hidden = x @ w[f"{name}.up"].T
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ w[f"{name}.down"].T


def sinusoid(distance, width, dtype):
    """s(d) of Transformer-XL: `width / 2` sines, then as many cosines."""
    angles = [distance * 10000 ** (-2 * t / width) for t in range(width // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=dtype)


def self_distance(i, j):
    return i - j


def encoder_cross_distance(neighbor_position, chunk_position):
    """Equation 7: neighbor token i' looks at chunk token i over d = i' - i, from 0 here, from 1 in the paper."""
    return neighbor_position - chunk_position


def cca_distance(attending_position, neighbor_position, chunk_size):
    """Equation 6: d(i, i') = i - i' + m - 1.

    The paper counts i from 1 to m and i' from 1 to 2m (and writes "l" for m). A difference does not feel where both
    counts start, so the formula holds unchanged from 0: it spans -m .. 2m - 2 either way. Attending position i is
    chunk position u*m + m - 1 + i, which predicts u*m + m + i; laid over the sequence from u*m on, the neighbor token
    in the predicted place is i' = m + i, and its distance is -1.
    """
    return attending_position - neighbor_position + chunk_size - 1


def attention(w, name, queries, keys, distances, num_heads, head_dim):
    """Multi-head attention with relative positions; `distances[i][j]` is None where query i may not see key j.

    Args:
        queries (`torch.Tensor` of shape `(num_queries, query_width)`): Normalized by the caller.
        keys (`torch.Tensor` of shape `(num_keys, key_width)`): Read for keys and for values.
    Returns:
        `torch.Tensor` of shape `(num_queries, query_width)`, to be added to the residual.
    """
    q, k, v = queries @ w[f"{name}.q"].T, keys @ w[f"{name}.k"].T, keys @ w[f"{name}.v"].T
    used = {d for row in distances for d in row if d is not None}
    position = {d: w[f"{name}.r"] @ sinusoid(d, queries.shape[-1], queries.dtype) for d in used}
    outputs = []
    for i in range(len(queries)):
        visible = [j for j in range(len(keys)) if distances[i][j] is not None]
        heads = []
        for h in range(num_heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            content = k[visible, part] @ q[i, part]
            relative = torch.stack([position[distances[i][j]] for j in visible])[:, part] @ q[i, part]
            scores = (content + relative) / math.sqrt(head_dim)
            if f"{name}.null" in w:  # one key more, whose value is zero
                scores = torch.cat([scores, w[f"{name}.null"][h : h + 1]])
            heads.append(torch.softmax(scores, dim=0)[: len(visible)] @ v[visible, part])
        outputs.append(w[f"{name}.o"] @ torch.cat(heads))
    return torch.stack(outputs)


def encode_neighbor(w, shape, tokens, chunk_states, chunk_positions):
    """E_u^j: one neighbor of one chunk, conditioned on that chunk.

    Args:
        tokens (`list[int]`): The neighbor and its continuation.
        chunk_states (`torch.Tensor` of shape `(num_tokens, d)`): H_u, the residual of the chunk's real tokens.
        chunk_positions (`list[int]`): Where in the chunk, 0 .. m - 1, each of those tokens stands.
    Returns:
        `torch.Tensor` of shape `(len(tokens), e)`.
    """
    heads, head_dim = shape.encoder_num_heads, shape.encoder_head_dim
    within = [[self_distance(i, j) for j in range(len(tokens))] for i in range(len(tokens))]
    across = [[encoder_cross_distance(i, j) for j in chunk_positions] for i in range(len(tokens))]
    conditioning = rms_norm(chunk_states, w["encoder.chunk_norm"], shape.eps)

    x = torch.stack([w["encoder.embed"][token] for token in tokens])
    for p in range(shape.encoder_num_layers):
        layer = f"encoder.layers.{p}"
        normed = rms_norm(x, w[f"{layer}.attn_norm"], shape.eps)
        x = x + attention(w, f"{layer}.attn", normed, normed, within, heads, head_dim)
        if p in shape.encoder_cross_attention_layers:
            normed = rms_norm(x, w[f"{layer}.cross_norm"], shape.eps)
            x = x + attention(w, f"{layer}.cross", normed, conditioning, across, heads, head_dim)
        x = x + ffw(w, f"{layer}.ffw", rms_norm(x, w[f"{layer}.ffw_norm"], shape.eps))
    return rms_norm(x, w["encoder.final_norm"], shape.eps)


def encode(w, shape, h, neighbors, chunk_offset):
    """E: for every complete chunk u the list of its encoded neighbors."""
    m = shape.chunk_size
    encoded = []
    for u in range((len(h) + chunk_offset) // m):
        tokens_of_chunk = [t for t in range(len(h)) if u * m <= t + chunk_offset < (u + 1) * m]
        chunk_states = torch.stack([h[t] for t in tokens_of_chunk])
        chunk_positions = [t + chunk_offset - u * m for t in tokens_of_chunk]
        of_chunk = neighbors[u] if u < len(neighbors) else []
        encoded.append(
            [encode_neighbor(w, shape, tokens, chunk_states, chunk_positions) for tokens in of_chunk if tokens]
        )
    return encoded


def chunked_cross_attention(w, name, shape, x, encoded, chunk_offset):
    """CCA(x, E) without its residual: one softmax over all tokens of all neighbors of the chunk before.

    Attending chunk u is chunk positions u*m + m - 1 .. u*m + 2m - 2: the last token of chunk u and the first m - 1 of
    chunk u + 1. Positions without an encoded neighbor get zeros.
    """
    m = shape.chunk_size
    update = []
    for t in range(len(x)):
        # Floor division sends chunk positions 0 .. m - 2 to u = -1, the chunk that does not exist.
        u, i = divmod(t + chunk_offset - (m - 1), m)
        if u < 0 or not encoded[u]:
            update.append(torch.zeros_like(x[t]))
            continue
        keys = torch.cat(encoded[u])
        distances = [cca_distance(i, j, m) for neighbor in encoded[u] for j in range(len(neighbor))]
        heads, head_dim = shape.cross_num_heads, shape.cross_head_dim
        update.append(attention(w, name, x[t : t + 1], keys, [distances], heads, head_dim)[0])
    return torch.stack(update)


def naive_decoder_logits(w, shape, input_ids, neighbors, chunk_offset=0):
    """Logits of one row without padding, by Algorithm 1.

    Args:
        w (`dict[str, torch.Tensor]`): See the top of this file. The dtype of the weights is the dtype of the result.
        input_ids (`list[int]`): At least one token.
        neighbors (`list[list[list[int]]]`, *optional*):
            Token ids, `neighbors[u][j]` is neighbor j of chunk u. Lengths may differ; a chunk without neighbors gives
            a zero update; chunks past the end of the list have none; those of incomplete chunks are not read. None
            turns retrieval off.
        chunk_offset (`int`, *optional*, defaults to 0): Chunk position of the first token, below the chunk size.
    Returns:
        `torch.Tensor` of shape `(len(input_ids), V)`.
    """
    if not 0 <= chunk_offset < shape.chunk_size:
        raise ValueError(f"chunk_offset is {chunk_offset}, but it must be in 0 .. {shape.chunk_size - 1}.")
    length = len(input_ids)
    causal = [[self_distance(i, j) if j <= i else None for j in range(length)] for i in range(length)]
    encoded = None

    x = torch.stack([w["embed"][token] for token in input_ids])
    for p in range(shape.num_layers):
        layer = f"layers.{p}"
        normed = rms_norm(x, w[f"{layer}.attn_norm"], shape.eps)
        x = x + attention(w, f"{layer}.attn", normed, normed, causal, shape.num_heads, shape.head_dim)
        if neighbors is not None and p in shape.cross_attention_layers:
            if p == min(shape.cross_attention_layers):
                encoded = encode(w, shape, x, neighbors, chunk_offset)
            normed = rms_norm(x, w[f"{layer}.cca_norm"], shape.eps)
            x = x + chunked_cross_attention(w, f"{layer}.cca", shape, normed, encoded, chunk_offset)
        x = x + ffw(w, f"{layer}.ffw", rms_norm(x, w[f"{layer}.ffw_norm"], shape.eps))
    return rms_norm(x, w["final_norm"], shape.eps) @ w["embed"].T


def random_weights(shape, vocab, d, ffw, d_enc, ffw_enc, generator, dtype):
    """A complete weight dict, drawn in float64 and then cast, so that one seed gives one model in every dtype."""
    w = {}

    def matrix(name, rows, columns, scale=None):
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        w[name] = (values * (scale or columns**-0.5)).to(dtype)

    def norm(name, width):
        w[name] = (1 + 0.2 * torch.randn(width, generator=generator, dtype=torch.float64)).to(dtype)

    def attention_weights(name, width, key_width, inner):
        for part, columns in (("q", width), ("k", key_width), ("v", key_width), ("r", width)):
            matrix(f"{name}.{part}", inner, columns)
        matrix(f"{name}.o", width, inner)

    def ffw_weights(name, width, inner):
        matrix(f"{name}.up", inner, width)
        matrix(f"{name}.down", width, inner)

    matrix("embed", vocab, d)
    for p in range(shape.num_layers):
        norm(f"layers.{p}.attn_norm", d)
        attention_weights(f"layers.{p}.attn", d, d, shape.num_heads * shape.head_dim)
        if p in shape.cross_attention_layers:
            norm(f"layers.{p}.cca_norm", d)
            attention_weights(f"layers.{p}.cca", d, d_enc, shape.cross_num_heads * shape.cross_head_dim)
        norm(f"layers.{p}.ffw_norm", d)
        ffw_weights(f"layers.{p}.ffw", d, ffw)
    norm("final_norm", d)

    inner = shape.encoder_num_heads * shape.encoder_head_dim
    matrix("encoder.embed", vocab, d_enc, scale=1.0)
    for j in range(shape.encoder_num_layers):
        norm(f"encoder.layers.{j}.attn_norm", d_enc)
        attention_weights(f"encoder.layers.{j}.attn", d_enc, d_enc, inner)
        if j in shape.encoder_cross_attention_layers:
            norm(f"encoder.layers.{j}.cross_norm", d_enc)
            attention_weights(f"encoder.layers.{j}.cross", d_enc, d, inner)
        norm(f"encoder.layers.{j}.ffw_norm", d_enc)
        ffw_weights(f"encoder.layers.{j}.ffw", d_enc, ffw_enc)
    norm("encoder.chunk_norm", d)
    norm("encoder.final_norm", d_enc)
    return w
