"""Reading in parallel context, written down a second time: a Llama in plain torch, one row at a time, one mask for all.

Nothing is shared with the package: the keys of all neighbors of all chunks stand before those of the text, and a mask of
shape (T, all neighbor tokens + T) says which of them a token sees.
"""

import torch


def _norm(states, weight, eps):
    return weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)


def _rotate(states, positions, theta):
    """Rotary positions of `states` (T, H, D)."""
    half = states.shape[-1] // 2
    angles = positions[:, None].float() / theta ** (torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    left, right = states[..., :half], states[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _run(backbone, tokens, positions, before, mask):
    """Hidden states of `tokens`, and their keys and values by layer; `before` are keys and values by layer that come first."""
    config = backbone.config
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    width = config.hidden_size // heads
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    states, kept = backbone.model.embed_tokens.weight[tokens], []
    for number, layer in enumerate(backbone.model.layers):
        normed = _norm(states, layer.input_layernorm.weight, eps)
        attention = layer.self_attn
        query, key, value = (
            (normed @ projection.weight.T).view(len(tokens), -1, width)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = _rotate(query, positions, theta), _rotate(key, positions, theta)
        kept.append((key, value))
        if before:
            key, value = torch.cat([before[number][0], key]), torch.cat([before[number][1], value])
        outputs = []
        for head in range(heads):
            scores = query[:, head] @ key[:, head // groups].T / width**0.5
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            outputs.append(weights @ value[:, head // groups])
        states = states + torch.cat(outputs, dim=-1) @ attention.o_proj.weight.T
        normed, mlp = _norm(states, layer.post_attention_layernorm.weight, eps), layer.mlp
        gate = normed @ mlp.gate_proj.weight.T
        states = states + (gate * gate.sigmoid() * (normed @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return _norm(states, backbone.model.norm.weight, eps) @ backbone.lm_head.weight.T, kept


def naive_logits(model, input_ids, neighbors: dict | None = None, chunk_offset: int = 0, grad: bool = False):
    """Logits (B, T, vocabulary) of rows without padding."""
    backbone, config = model.model.backbone, model.config
    size, rows = config.chunk_size, []
    with torch.set_grad_enabled(grad):
        for row, tokens in enumerate(input_ids):
            num_tokens = len(tokens)
            attended = (
                torch.arange(num_tokens) + chunk_offset + 1
            ) // size - 1  # the chunk whose neighbors a token reads
            encoded, owners = [], []
            if neighbors:
                ids, masks = neighbors["neighbor_input_ids"][row], neighbors["neighbor_attention_mask"][row].bool()
                for chunk in range(len(ids)):
                    # Each neighbor stands before the one that is more similar.
                    end = 0
                    for one, real in zip(ids[chunk], masks[chunk], strict=True):
                        one = one[real]
                        if len(one) < 2:  # the first token of a neighbor is not read
                            continue
                        end -= max(config.neighbor_size, len(one))
                        positions = torch.arange(len(one)) + end
                        causal = torch.ones(len(one), len(one), dtype=torch.bool).tril()
                        states = _run(backbone, one, positions, None, causal)[1]
                        encoded.append([(1.1 * key, value) for key, value in states])
                        owners += [chunk] * (len(one) - 1)
            before = [
                tuple(torch.cat([one[number][kind][1:] for one in encoded]) for kind in (0, 1))
                for number in range(len(backbone.model.layers) if encoded else 0)
            ]
            causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
            mask = torch.cat([attended[:, None] == torch.tensor(owners, dtype=torch.long), causal], dim=1)
            rows.append(_run(backbone, tokens, torch.arange(num_tokens), before, mask)[0])
    return torch.stack(rows)
