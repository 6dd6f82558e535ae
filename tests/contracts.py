"""The contracts of information flow and of the oracle, as functions: the tests run them, the mutation tests break them.

Every check takes a model and raises an AssertionError. It runs in the dtype of the model.
"""

import torch

from .naive_retro import NaiveShape, naive_decoder_logits
from .tiny import hash_retriever, random_ids, random_neighbors, tiny_retro


# ── the oracle ────────────────────────────────────────────────────────────────────────────────────────────────────────


# Heads times head_dim differ from each other and from both widths (24, 16): a mixed-up argument cannot pass.
TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "head_dim": 10}
ENCODER = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 6}
CROSS = {"cross_attention_num_heads": 2, "cross_attention_head_dim": 7}


def oracle_model(seed: int = 0, **config):
    """A model whose sizes all differ, with an epsilon that matters."""
    eps = config.pop("eps", 1e-6)
    text = {**TEXT, "rms_norm_eps": eps, **config.pop("text_config", {})}
    encoder = {**ENCODER, "rms_norm_eps": eps, **config.pop("neighbor_encoder_config", {})}
    return tiny_retro(
        text_config=text,
        neighbor_encoder_config=encoder,
        rms_norm_eps=eps,
        seed=seed,
        scale=0.25,
        **{**CROSS, **config},
    )


def naive_shape(config) -> NaiveShape:
    """What the oracle must know beside the weights of a model with `config` over the paper's decoder."""
    text, encoder = config.text_config, config.neighbor_encoder_config
    assert text.rms_norm_eps == encoder.rms_norm_eps == config.rms_norm_eps
    return NaiveShape(
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        head_dim=text.head_dim,
        encoder_num_layers=encoder.num_hidden_layers,
        encoder_num_heads=encoder.num_attention_heads,
        encoder_head_dim=encoder.head_dim,
        cross_num_heads=config.cross_attention_num_heads,
        cross_head_dim=config.cross_attention_head_dim,
        chunk_size=config.chunk_size,
        cross_attention_layers=tuple(config.cross_attention_layers),
        encoder_cross_attention_layers=tuple(encoder.cross_attention_layers),
        eps=config.rms_norm_eps,
    )


def naive_weights(model) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model over the paper's decoder, under the oracle's names; every one of them exactly once."""
    named = dict(model.named_parameters())
    weights = {}

    def block(target: str, source: str) -> None:
        for suffix, name in (
            ("attn_norm", "self_attn_norm.weight"),
            ("attn.q", "self_attn.q_proj.weight"),
            ("attn.k", "self_attn.k_proj.weight"),
            ("attn.v", "self_attn.v_proj.weight"),
            ("attn.o", "self_attn.o_proj.weight"),
            ("attn.r", "self_attn.position_bias.weight"),
            ("ffw_norm", "mlp_norm.weight"),
            ("ffw.up", "mlp.up_proj.weight"),
            ("ffw.down", "mlp.down_proj.weight"),
        ):
            weights[f"{target}.{suffix}"] = named.pop(f"{source}.{name}")

    def cross(target: str, norm: str, source: str, attention: str) -> None:
        weights[target.replace(".cca", ".cca_norm").replace(".cross", ".cross_norm")] = named.pop(
            f"{source}.{norm}.weight"
        )
        for suffix, name in zip("qkvor", ("q_proj", "k_proj", "v_proj", "o_proj", "position_bias"), strict=True):
            weights[f"{target}.{suffix}"] = named.pop(f"{source}.{attention}.{name}.weight")

    decoder, retro = "model.backbone.model", "model.retro"
    weights["embed"] = named.pop(f"{decoder}.embed_tokens.weight")
    weights["final_norm"] = named.pop(f"{decoder}.norm.weight")
    for p in range(model.config.num_hidden_layers):
        block(f"layers.{p}", f"{decoder}.layers.{p}")
    for p in model.config.cross_attention_layers:
        cross(f"layers.{p}.cca", "norm", f"{retro}.cross_attention.{p}", "attention")
        if model.config.cross_attention_null_key:
            weights[f"layers.{p}.cca.null"] = named.pop(f"{retro}.cross_attention.{p}.null_logits")
    weights["encoder.embed"] = named.pop(f"{retro}.encoder.embed_tokens.weight")
    weights["encoder.chunk_norm"] = named.pop(f"{retro}.encoder.chunk_norm.weight")
    weights["encoder.final_norm"] = named.pop(f"{retro}.encoder.norm.weight")
    for j in range(model.config.neighbor_encoder_config.num_hidden_layers):
        block(f"encoder.layers.{j}", f"{retro}.encoder.layers.{j}")
        if j in model.config.neighbor_encoder_config.cross_attention_layers:
            cross(f"encoder.layers.{j}.cross", "cross_attn_norm", f"{retro}.encoder.layers.{j}", "cross_attn")
    assert not named, f"parameters that the oracle does not know: {sorted(named)}"
    return weights


def naive_logits(model, input_ids, neighbors: dict | None = None, chunk_offset: int = 0) -> torch.Tensor:
    """Logits of a batch without padding by the oracle, row by row; neighbors must be padded at their end."""
    rows = []
    with torch.no_grad():
        for b, row in enumerate(input_ids.tolist()):
            given = None
            if neighbors:
                ids, masks = neighbors["neighbor_input_ids"][b], neighbors["neighbor_attention_mask"][b].bool()
                given = [
                    [n[m].tolist() for n, m in zip(*chunk, strict=True)] for chunk in zip(ids, masks, strict=True)
                ]
            rows.append(
                naive_decoder_logits(naive_weights(model), naive_shape(model.config), row, given, chunk_offset)
            )
    return torch.stack(rows)


def check_agrees_with_oracle(
    model,
    num_tokens: int = 14,
    chunk_offset: int = 2,
    ragged: bool = True,
    num_rows: int = 2,
    atol: float = 1e-5,
    **kwargs,
) -> None:
    """Logits agree with Algorithm 1, with short and missing neighbors and a first chunk that starts in its middle."""
    num_chunks = (num_tokens + chunk_offset) // model.config.chunk_size
    input_ids = random_ids(num_rows, num_tokens)
    neighbors = random_neighbors(num_rows, num_chunks, ragged=ragged) if num_chunks else {}
    expected = naive_logits(model, input_ids, neighbors, chunk_offset)
    with torch.set_grad_enabled(kwargs.pop("grad", False)):
        logits = model(input_ids, **neighbors, chunk_offset=chunk_offset, **kwargs).logits
    torch.testing.assert_close(logits.detach(), expected, atol=atol, rtol=0)


def check_gradients_agree_with_oracle(model, num_tokens: int = 10, chunk_offset: int = 1) -> None:
    """The gradient of every parameter agrees with that of Algorithm 1: nothing is detached, nothing counted twice."""
    ids = random_ids(1, num_tokens)
    neighbors = random_neighbors(1, (num_tokens + chunk_offset) // model.config.chunk_size)
    weights = naive_weights(model)
    names, leaves = zip(*weights.items(), strict=True)
    logits = naive_decoder_logits(
        weights, naive_shape(model.config), ids[0].tolist(), neighbors["neighbor_input_ids"][0].tolist(), chunk_offset
    )
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
    expected = torch.autograd.grad((logits * direction).sum(), leaves)
    logits = model(ids, **neighbors, chunk_offset=chunk_offset).logits[0]
    gradients = torch.autograd.grad((logits * direction).sum(), leaves, allow_unused=True)
    for name, gradient, reference in zip(names, gradients, expected, strict=True):
        assert gradient is not None, f"{name} gets no gradient"
        scale = reference.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            gradient / scale, reference / scale, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


# ── who depends on what, by gradient ──────────────────────────────────────────────────────────────────────────────────


def embedded(model, input_ids, neighbors: dict, **kwargs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, and what they were computed from: token embeddings (B, T, d), neighbor embeddings (B, C, K, R, ·).

    Both are leaves of the graph. Tokens go in as `inputs_embeds`, so only neighbors pass through an embedding table, also
    where the backbone's is shared.
    """
    table = model.get_input_embeddings()
    own_table = getattr(getattr(model.model.retro, "encoder", None), "embed_tokens", None)
    tokens = table(input_ids).detach().requires_grad_()
    num_rows, _, num_neighbors, _ = neighbors["neighbor_input_ids"].shape
    leaves = []

    def make_leaf(module, args, output):
        leaves.append(output.detach().unflatten(0, (num_rows, -1, num_neighbors)).requires_grad_())
        return leaves[-1].flatten(0, 2)

    hook = (own_table or table).register_forward_hook(make_leaf)
    try:
        logits = model(inputs_embeds=tokens, **{"chunk_offset": 0, **neighbors, **kwargs}).logits
    finally:
        hook.remove()
    assert len(leaves) == 1, "the neighbor encoder must run once per pass, over all chunks"
    return logits, tokens, leaves[0]


def dependence(model, input_ids, neighbors: dict, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token (T, T) and which chunk's neighbors (T, C) have a gradient into the logits of each position of row 0."""
    logits, tokens, retrieved = embedded(model, input_ids, neighbors, **kwargs)
    direction = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(3)).to(logits)
    of_tokens, of_neighbors = [], []
    for t in range(logits.shape[1]):
        gradients = torch.autograd.grad((logits[0, t] * direction).sum(), (tokens, retrieved), retain_graph=True)
        assert all(g.isfinite().all() for g in gradients)
        assert not gradients[0][1:].any() and not gradients[1][1:].any(), "a row depends on another row"
        of_tokens.append(gradients[0][0].ne(0).any(-1))
        of_neighbors.append(gradients[1][0].flatten(1).ne(0).any(-1))
    return torch.stack(of_tokens), torch.stack(of_neighbors)


def check_information_flow(model, num_tokens: int | None = None, chunk_offset: int = 0, **kwargs) -> None:
    """Position t depends on exactly the tokens up to t, and on the neighbors of exactly the chunks complete at t."""
    size = model.config.chunk_size
    num_tokens = 3 * size + size // 2 if num_tokens is None else num_tokens
    num_chunks = (num_tokens + chunk_offset) // size
    if chunk_offset:
        kwargs["chunk_offset"] = chunk_offset
    tokens, neighbors = dependence(model, random_ids(2, num_tokens), random_neighbors(2, num_chunks), **kwargs)
    position = torch.arange(num_tokens).unsqueeze(1)
    expected = torch.arange(num_tokens) <= position
    assert torch.equal(tokens, expected), f"tokens:\n{tokens.int() - expected.int()}"
    expected = position + chunk_offset >= torch.arange(num_chunks) * size + size - 1
    assert torch.equal(neighbors, expected), f"neighbors:\n{neighbors.int() - expected.int()}"


def check_reach_in_one_layer(model, chunk_offset: int = 0) -> None:
    """E_u reaches exactly chunk positions u*m + m - 1 .. u*m + 2m - 2; P must be the last layer alone."""
    assert model.config.cross_attention_layers == [model.config.num_hidden_layers - 1]
    size = model.config.chunk_size
    num_tokens = 3 * size + size // 2
    num_chunks = (num_tokens + chunk_offset) // size
    kwargs = {"chunk_offset": chunk_offset} if chunk_offset else {}
    _, reached = dependence(model, random_ids(1, num_tokens), random_neighbors(1, num_chunks), **kwargs)
    position = torch.arange(num_tokens).unsqueeze(1) + chunk_offset
    first = torch.arange(num_chunks) * size + size - 1
    expected = (position >= first) & (position < first + size)
    assert torch.equal(reached, expected), f"{reached.int() - expected.int()}"


def check_neighbors_are_encoded_apart(model) -> None:
    """In the encoder a neighbor depends on its own tokens, all of them at every place, and on no other neighbor."""
    size, outputs = model.config.chunk_size, []
    hook = model.model.retro.encoder.norm.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        _, _, retrieved = embedded(model, random_ids(1, 2 * size), random_neighbors(1, 2, num_neighbors=3))
    finally:
        hook.remove()
    encoded = outputs[0].view(6, -1, outputs[0].shape[-1])
    direction = torch.randn(encoded.shape[-1], generator=torch.Generator().manual_seed(3)).to(encoded)
    for j in range(6):
        for place in (0, encoded.shape[1] - 1):
            (gradient,) = torch.autograd.grad((encoded[j, place] * direction).sum(), retrieved, retain_graph=True)
            seen = gradient.flatten(0, 2).ne(0).any(-1)
            assert seen[j].all(), "a neighbor must see all of itself"
            assert not seen[[n for n in range(6) if n != j]].any(), "a neighbor sees another one"


# ── symmetries ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _change(neighbors: dict, function) -> dict:
    return {name: function(tensor) for name, tensor in neighbors.items()}


def check_neighbor_order_is_irrelevant(model, atol: float = 1e-5) -> None:
    """Another order of the neighbors of each chunk gives the same logits."""
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3, num_neighbors=3, ragged=True)
    with torch.no_grad():
        logits = model(ids, **neighbors).logits
        for order in ([2, 0, 1], [1, 0, 2]):
            other = model(ids, **_change(neighbors, lambda t, order=order: t[:, :, order])).logits
            torch.testing.assert_close(other, logits, atol=atol, rtol=0)


def check_duplicates_change_nothing(model, atol: float = 1e-5) -> None:
    """All neighbors given twice give the same logits."""
    ids, neighbors = random_ids(2, 14), random_neighbors(2, 3, ragged=True)
    with torch.no_grad():
        logits = model(ids, **neighbors).logits
        twice = model(ids, **_change(neighbors, lambda t: t.repeat(1, 1, 2, 1))).logits
    torch.testing.assert_close(twice, logits, atol=atol, rtol=0)


def _neighbors_with_gaps() -> dict:
    """Neighbors of 2 rows of 3 chunks: short ones, a hole inside, one missing, and one chunk without any."""
    neighbors = random_neighbors(2, 3, num_neighbors=3)
    mask = neighbors["neighbor_attention_mask"]
    mask[0, 0, 0, -3:] = mask[1, 2, 1, 1:] = mask[0, 2, 0, 2] = 0
    mask[0, 0, 1] = mask[1, 0, 2] = 0
    mask[0, 1] = 0
    return neighbors


def check_masked_neighbors_have_no_influence(model) -> None:
    """Masked neighbor tokens get exactly zero gradient, the others some; what stands there is never read."""
    neighbors = _neighbors_with_gaps()
    logits, _, retrieved = embedded(model, random_ids(2, 14), neighbors)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
    (gradient,) = torch.autograd.grad((logits * direction).sum(), retrieved)
    assert gradient.isfinite().all()
    assert torch.equal(gradient.ne(0).any(-1), neighbors["neighbor_attention_mask"].bool())
    ids = neighbors["neighbor_input_ids"].masked_fill(neighbors["neighbor_attention_mask"] == 0, -100)
    with torch.no_grad():
        tokens = random_ids(2, 14)
        logits = model(tokens, **neighbors).logits
        assert torch.equal(model(tokens, **{**neighbors, "neighbor_input_ids": ids}).logits, logits)


def check_chunks_without_neighbors_get_no_update(model) -> None:
    """A chunk whose neighbors are all masked is a chunk without retrieval: equal logits, no NaN in any gradient."""
    ids, neighbors = random_ids(1, 14), random_neighbors(1, 3)
    mask = neighbors["neighbor_attention_mask"]
    mask[0, 1:] = 0
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            masked = model(ids, **neighbors).logits
            fewer = model(ids, **_change(neighbors, lambda t: t[:, :1])).logits
        torch.testing.assert_close(masked, fewer, atol=1e-6, rtol=0)
    mask[0, 0] = 0
    with torch.no_grad():
        assert torch.equal(model(ids, **neighbors).logits, model.model.backbone(ids).logits)
    for keep in (0, 1):
        mask[0, 0] = keep
        model.zero_grad()
        loss = model(ids, labels=ids, **neighbors).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
            if keep == 0 and name.startswith("model.retro."):
                assert parameter.grad is None or not parameter.grad.any(), name
    model.zero_grad()


def check_padding_is_invisible(
    model, side: str = "left", chunk_offsets: tuple[int, ...] | None = None, live: bool = False, atol: float = 1e-5
) -> None:
    """Every row of a padded, ragged batch has the logits it has alone."""
    lengths = [14, 9, 4, 3, 1]
    width, size = max(lengths), model.config.chunk_size
    offsets = list(chunk_offsets or [0] * len(lengths))
    rows = [random_ids(1, n, seed=n) for n in lengths]
    given = random_neighbors(len(rows), (width + max(offsets)) // size, ragged=True)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    spans = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for b, (row, span) in enumerate(zip(rows, spans, strict=True)):
        input_ids[b, span], attention_mask[b, span] = row[0], 1
    kwargs = {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0), "use_cache": False}
    if chunk_offsets:
        kwargs["chunk_offset"] = torch.tensor(offsets)
    kwargs |= {"retriever": hash_retriever()} if live else given
    with torch.no_grad():
        batch = model(input_ids, attention_mask=attention_mask, **kwargs).logits
        for b, (row, span) in enumerate(zip(rows, spans, strict=True)):
            num_chunks = (lengths[b] + offsets[b]) // size
            alone = {"use_cache": False}
            if live:
                alone["retriever"] = hash_retriever()
            elif num_chunks:
                alone |= {name: t[b : b + 1, :num_chunks] for name, t in given.items()}
            if chunk_offsets:
                alone["chunk_offset"] = offsets[b]
            torch.testing.assert_close(batch[b : b + 1, span], model(row, **alone).logits, atol=atol, rtol=0)
