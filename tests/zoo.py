"""Every causal language model of transformers: a tiny config for each, and what has to hold for a RETROfit of it.

`benchmarks/backbones.py` tries them all and writes docs/backbones.md; `test_zoo.py` runs the same checks.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from retro_hf import RetroForCausalLM, retrofit
from retro_hf.model.backbone_retro import accepted_arguments, find_decoder_layers
from retro_hf.model.compatibility_retro import CACHE_NAME
from retro_hf.model.modeling_retro import RetroPass

from .tiny import (
    CHUNK_SIZE,
    ENCODER,
    VOCAB_SIZE,
    hash_retriever,
    neighbors_from,
    random_ids,
    random_neighbors,
    randomize,
)


FAMILIES = tuple(sorted(family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not family.startswith("retro")))
LAYERS = [1, 3]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}
TOLERANCE = 5e-4  # of the largest logit: float32, and state spaces sum in another order with a cache
MATTERS = 1e-2  # what retrieval must change at least, so that a check is about something


# ── tiny configs ──────────────────────────────────────────────────────────────────────────────────────────────────────

_LAYER_COUNTS = (
    *(
        "num_hidden_layers",
        "num_layers",
        "encoder_layers",
        "decoder_layers",
        "num_encoder_layers",
        "num_decoder_layers",
    ),
    *("n_layer", "n_layers", "num_blocks"),
)
_SMALL = {
    # transformers' own names, and those of families that have their own
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB_SIZE),
    **dict.fromkeys(("hidden_size", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "dff", "dim_ff"), 48
    ),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(_LAYER_COUNTS, 4),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "attention_head_size", "kv_channels"), 8),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len", "n_positions", "max_target_positions", "n_ctx"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "sliding_window_size"), 8),
    **dict.fromkeys(("local_attention", "window_size", "rel_extent"), 8),
    **dict.fromkeys(("rotary_dim", "d_rel"), 4),
    # multi-head latent attention and its indexer, which must not leave tokens out here
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "o_lora_rank"), 4),
    "index_head_dim": 16,
    "index_topk": 64,
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    # linear attention and state spaces
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "mamba_d_head", "ssm_state_size", "state_size", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 1),
    "eos_token_id": 2,
    # every second layer of the other kind
    **dict.fromkeys(("sliding_window_pattern", "global_attn_every_n_layers", "layer_group_size"), 2),
    **dict.fromkeys(("attn_layer_period", "no_rope_layer_interval", "full_attention_interval"), 2),
    "attn_layer_offset": 1,
}
_ENCODERS = (
    *(
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
    ),
    *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
# Fields that no rule for all families gives.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SPECIAL: dict[str, dict] = {
    **{family: {"is_decoder": True} for family in _ENCODERS},  # causal only if told so
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    # hybrids: every second layer has attention
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8},
    **dict.fromkeys(("granitemoehybrid", "kimi_linear"), {"layer_types": ["linear_attention", "full_attention"] * 2}),
    **dict.fromkeys(("zamba", "zamba2"), {"layers_block_type": ["linear_attention", "hybrid"] * 2}),
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    # what the default config leaves open
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 8}),
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, 4], "adapter_in_dim": 32, "adapter_out_dim": 32},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 16, "indexer_compress_ratio": 4},
    },
    # what does not go together
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str, **fields: object) -> PreTrainedConfig:
    """The default config of a family with every size made small; `fields` override."""
    default = CONFIG_MAPPING[family]()
    return type(default)(**_small_fields(default) | fields)


def _small_fields(config: PreTrainedConfig, num_layers: int = 4) -> dict:
    known, fields = type(config).__dataclass_fields__, {}
    for name, value in _SMALL.items():
        name = config.attribute_map.get(name, name)
        if name in known and (isinstance(known[name].default, int) or name.endswith("_token_id")):
            fields[name] = num_layers if name in _LAYER_COUNTS else value
    if "kv_lora_rank" in fields:  # every head has keys of its own
        fields |= {"num_key_value_heads": fields["num_attention_heads"]} if "num_key_value_heads" in fields else {}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            # An image encoder has another number of layers, as it has in life.
            depth = 4 if part is config.get_text_config(decoder=True) else 2
            fields[name] = {**_small_fields(part, depth), "model_type": part.model_type}
    return fields | _SPECIAL.get(config.model_type, {})


# ── a base and its RETROfit ───────────────────────────────────────────────────────────────────────────────────────────


class NotBuilt(Exception):
    """The base cannot be made here: its default config, a library, or what it saves does not allow it."""


class BaseFails(AssertionError):
    """The base itself does not do what is asked of its RETROfit."""


class Case:
    """A base with random weights, in a folder and in memory, and its RETROfit before any training.

    Args:
        family (`str`): `model_type`.
        folder (`Path`): empty, to save into.
        placement (`str`): where cross-attention goes.
    """

    def __init__(self, family: str, folder: Path, placement: str = "after_attention"):
        self.folder = folder
        try:
            self.base = _build(family, folder / "base")
        except Exception as error:
            raise NotBuilt(f"{type(error).__name__}: {str(error).strip()}") from error
        self.model = retrofit(
            folder / "base",
            chunk_size=CHUNK_SIZE,
            cross_attention_layers=LAYERS,
            cross_attention_placement=placement,
            encoder=ENCODER,
        )

    @property
    def layer(self) -> nn.Module:
        """The first layer with cross-attention."""
        return find_decoder_layers(self.model.model.backbone)[LAYERS[0]]


def _build(family: str, folder: Path) -> PreTrainedModel:
    """A base with random weights, as it loads from the folder that it was saved to."""
    torch.manual_seed(0)
    base = randomize(AutoModelForCausalLM.from_config(tiny_config(family))).eval()
    table = base.get_input_embeddings()
    if getattr(table, "padding_idx", None) is not None:  # as it is in every checkpoint
        table.weight.data[table.padding_idx] = 0
    base.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    lost = sorted(_changed(base.state_dict(), loaded.state_dict()))
    assert not lost, f"it loads with other weights than were saved: {lost[:3]}"
    with torch.no_grad():
        loaded(random_ids(2, 14), labels=random_ids(2, 14), use_cache=False)  # some do not run on text alone
    return loaded


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a part of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def _changed(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that are not the same, bit for bit, in two state dicts."""
    shared = left.keys() & right.keys()
    return (left.keys() ^ right.keys()) | {name for name in shared if not torch.equal(left[name], right[name])}


def _agree(what: str, measure: Callable[..., float], case: Case) -> None:
    """Check that a difference from the row alone, or from a full pass, is rounding; blame the base if it has it too."""
    found = measure(case.model, hash_retriever())
    if found > TOLERANCE:
        own = measure(case.base, None)
        if own > TOLERANCE:
            raise BaseFails(f"the base itself gives {what} other logits, by {own:.1g} of the largest")
        raise AssertionError(f"{what} gets other logits, by {found:.1g} of the largest, but not from the base")


def _generate(model: PreTrainedModel, retriever: Callable | None, input_ids: torch.Tensor, **options):
    """Eleven tokens, with a cache also where the default is none."""
    if retriever is not None:
        options |= {"retriever": retriever, "chunk_offset": 0}  # as `neighbors_from` counts the chunks of a pass
    options |= {"max_new_tokens": 11, "use_cache": True, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(input_ids, **GREEDY, **options)


def _logits(model: PreTrainedModel, retriever: Callable | None, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
    """One pass over whole rows, with positions as `generate` gives them, and neighbors as tensors."""
    if retriever is not None:
        inputs |= neighbors_from(retriever, input_ids)
    if "position_ids" in accepted_arguments(model):
        inputs["position_ids"] = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    with torch.no_grad():
        return model(input_ids, use_cache=False, **inputs).logits


# ── what has to hold ──────────────────────────────────────────────────────────────────────────────────────────────────


def check_off_is_the_base(case: Case) -> None:
    """Without neighbors, or with all of them masked, logits and loss are the base's, bit for bit."""
    ids, masked = random_ids(2, 14), random_neighbors(2, 3)
    masked["neighbor_attention_mask"] *= 0
    with torch.no_grad():
        expected = case.base(ids, labels=ids, use_cache=False)
        for neighbors in ({}, masked):
            found = case.model(ids, labels=ids, use_cache=False, **neighbors)
            assert torch.equal(found.logits, expected.logits), "the logits without neighbors are not those of the base"
            assert torch.equal(found.loss, expected.loss), "the loss without neighbors is not that of the base"


def check_step_0_is_the_base(case: Case) -> None:
    """Before the first training step logits and generated tokens are the base's, bit for bit, neighbors or not."""
    ids = random_ids(2, 14)
    same = torch.equal(_logits(case.model, hash_retriever(), ids), _logits(case.base, None, ids))
    assert same, "the logits before training are not those of the base"
    found, expected = (_generate(*pair, ids).sequences for pair in ((case.model, hash_retriever()), (case.base, None)))
    assert torch.equal(found, expected), "what is generated before training is not what the base generates"


def check_only_retro_trains(case: Case) -> None:
    """In training every parameter of RETRO gets a gradient, and none of the backbone's."""
    model = case.model.train()
    try:
        model(random_ids(2, 14), labels=random_ids(2, 14), use_cache=False, **random_neighbors(2, 3)).loss.backward()
    finally:
        model.eval()
    for name, parameter in model.named_parameters():
        if name.startswith("model.retro."):
            alive = parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
            assert alive, f"{name} gets no gradient"
        else:
            assert not parameter.requires_grad and parameter.grad is None, f"{name} of the backbone is trained"
    model.zero_grad(set_to_none=True)


def check_causality(case: Case) -> None:
    """A token changes nothing before itself, neighbors nothing before the last token of their chunk; both change that."""
    num_tokens, num_chunks = 14, 3
    ids = random_ids(1, num_tokens).repeat(1 + num_tokens + num_chunks, 1)
    neighbors = {k: v.repeat(len(ids), 1, 1, 1) for k, v in random_neighbors(1, num_chunks).items()}
    for s in range(num_tokens):
        ids[1 + s, s] = (ids[0, s] + 40) % (VOCAB_SIZE - 3) + 3
    other = random_neighbors(1, num_chunks, seed=7)["neighbor_input_ids"][0]
    for u in range(num_chunks):
        neighbors["neighbor_input_ids"][1 + num_tokens + u, u] = other[u]
    with torch.no_grad():
        logits = case.model(ids, use_cache=False, **neighbors).logits
    changed = (logits[1:] - logits[0]).abs().amax(-1) / logits.abs().max()
    starts = [*range(num_tokens), *(u * CHUNK_SIZE + CHUNK_SIZE - 1 for u in range(num_chunks))]
    for row, (change, start) in enumerate(zip(changed, starts, strict=True)):
        cause = f"token {row}" if row < num_tokens else f"the neighbors of chunk {row - num_tokens}"
        assert not (change[:start] > TOLERANCE).any(), f"{cause} changes the logits of an earlier token"
        assert change[start] > TOLERANCE, f"{cause} does not change the logits of token {start}"


def check_padding(case: Case) -> None:
    """A row padded at the right (one pass) or at the left (generation) is the row alone."""
    _agree("a row padded at the right", _right_padding, case)
    _agree("a row padded at the left", _left_padding, case)


def _right_padding(model: PreTrainedModel, retriever: Callable | None) -> float:
    ids, mask = random_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, 9:] = 0
    expected = _logits(model, retriever, ids[:1, :9])
    found = _logits(model, retriever, ids.masked_fill(mask == 0, 1), attention_mask=mask)
    return _difference(found[:1, :9], expected)


def _left_padding(model: PreTrainedModel, retriever: Callable | None) -> float:
    ids, mask = random_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    together = _generate(model, retriever, ids.masked_fill(mask == 0, 1), attention_mask=mask)
    differences = []
    for row, start in enumerate((5, 0)):
        alone = _generate(model, retriever, ids[row : row + 1, start:])
        # After a token that differs everything does, so the first logits tell how much.
        for step, expected in zip(together.logits, alone.logits, strict=True):
            differences.append(_difference(step[row], expected[0]))
            if differences[-1] > TOLERANCE:
                break
    return max(differences)


def check_cached_is_full(case: Case) -> None:
    """Greedy generation with a cache gives the logits of a full pass, token by token; retrieval matters there."""
    _agree("cached generation", _cached, case)
    ids = random_ids(2, 14)
    matters = _difference(_logits(case.model, hash_retriever(), ids), _logits(case.model, None, ids))
    assert matters > MATTERS, f"retrieval changes the logits only by {matters:.1g} of the largest"


def _cached(model: PreTrainedModel, retriever: Callable | None) -> float:
    prompt = random_ids(2, 6)
    out = _generate(model, retriever, prompt)
    assert retriever is None or out[CACHE_NAME].retrieval_state.num_columns == 16, "generation did not use a cache"
    full = _logits(model, retriever, out.sequences[:, :-1])
    return _difference(torch.stack(out.logits, dim=1), full[:, prompt.shape[1] - 1 :])


def check_rollback(case: Case) -> str | None:
    """Prompt lookup, which takes tokens back across chunk borders, generates the same; returns why it can't be had."""
    prompt = random_ids(1, 7).repeat(1, 2)
    try:
        _generate(case.base, None, prompt, prompt_lookup_num_tokens=3)
    except (ValueError, RuntimeError) as error:
        try:
            _generate(case.model, hash_retriever(), prompt, prompt_lookup_num_tokens=3)
        except type(error):
            return str(error).splitlines()[0]
        raise AssertionError(f"prompt lookup is not refused, but the base refuses it: {error}") from error
    proposed = _generate(case.model, hash_retriever(), prompt, prompt_lookup_num_tokens=3).sequences
    plain = _generate(case.model, hash_retriever(), prompt).sequences
    assert torch.equal(proposed, plain), "prompt lookup generates other tokens"
    return None


def check_saving(case: Case) -> None:
    """Saved in full, and without the backbone, the model loads again: every weight bit for bit, the logits to rounding."""
    ids, weights = random_ids(2, 14), case.model.state_dict()
    expected = _logits(case.model, hash_retriever(), ids)
    for name, save_backbone in (("full", True), ("adapter", False)):
        case.model.save_pretrained(case.folder / name, save_backbone=save_backbone)
        loaded = AutoModelForCausalLM.from_pretrained(case.folder / name, backbone_name_or_path=case.folder / "base")
        assert type(loaded) is RetroForCausalLM
        lost = sorted(_changed(weights, loaded.state_dict()))
        assert not lost, f"saved as '{name}', the model loads with other weights: {lost[:3]}"
        off = _difference(_logits(loaded, hash_retriever(), ids), expected)  # memory aligned otherwise sums otherwise
        assert off < TOLERANCE, f"saved as '{name}', the model loads with other logits, by {off:.1g} of the largest"


def check_placement(case: Case) -> str:
    """Cross-attention reads the stream at the end of the attention branch, and is added to it there and nowhere else.

    What it read and what it returned is recorded. With `off` and `on` the same tensor inside the layer without and with
    retrieval, some tensor must have `on - off` = update. Either that tensor is the stream that was read, or it is the
    stream and the output of one module beside the attention: the feed-forward layer, or a mixer.

    Returns:
        `str`: the module that receives the stream first, or the one beside.
    """
    layer, ids, calls = case.layer, random_ids(2, 14), []
    run = RetroPass.__call__

    def spy(self: RetroPass, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        calls.append((hidden_states, run(self, layer_idx, hidden_states)))
        return calls[-1][1]

    with patch.object(RetroPass, "__call__", spy):
        on, _ = _inside(layer, partial(_logits, case.model, hash_retriever(), ids))
        off, outputs = _inside(layer, partial(_logits, case.model, None, ids))
    stream, update = calls[0]
    assert _difference(stream + update, stream) > MATTERS, "cross-attention adds nothing in this layer"

    def same(left: torch.Tensor, right: torch.Tensor) -> bool:
        return left.numel() == right.numel() and _difference(left.reshape(right.shape), right) < TOLERANCE

    for name in on:
        if name in off and same(on[name] - off[name], update):  # OPT flattens rows
            if same(off[name], stream):
                return f"before {name}" if name else "after the layer"
            for beside, output in outputs.items():
                if beside and same(off[name] - stream, output):
                    return f"beside {beside}"
    raise AssertionError("cross-attention is not added to the stream that it read, at the end of the attention branch")


def _inside(layer: nn.Module, run: Callable) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """First inputs of a layer's modules in one pass, in order of the calls, with the layer's output under ""; outputs."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    handles = []

    def before(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if given and name:
            inputs.setdefault(name, given[0].clone())

    def after(name: str, module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, torch.Tensor):
            (outputs if name else inputs)[name] = output.clone()

    for name, module in layer.named_modules():
        handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(after, name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs


BEFORE_TRAINING = (check_off_is_the_base, check_step_0_is_the_base)
TRAINED = (
    check_placement,
    check_cached_is_full,
    check_causality,
    check_padding,
    check_only_retro_trains,
    check_rollback,
    check_saving,
)


def check_family(family: str, folder: Path, placement: str = "after_attention") -> dict[str, str | None]:
    """All checks on one family.

    Returns:
        What checks have to say, by their names.
    Raises:
        NotBuilt: if there is no base to try.
        UnsupportedBackboneError: if RETRO refuses the family.
        BaseFails: if something does not hold for the base itself.
        AssertionError: if something does not hold.
    """
    case = Case(family, folder, placement)
    for check in BEFORE_TRAINING:
        check(case)
    randomize(case.model.model.retro, scale=0.3)
    return {check.__name__: check(case) for check in TRAINED}
