"""Which of transformers' tests cannot hold for our classes, and why.

A listed test runs all the same. It must fail, and its traceback must hold the words that the table gives: a test that passes
has to leave the table. A test that transformers leaves out by itself must do so for a reason that is known here; hardware and
packages that are not there (`test requires …`) need no entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch

from .targets import Target


@dataclass(frozen=True)
class NotApplicable:
    """Tests that cannot hold.

    Args:
        tests: pattern of the names.
        applies: to which targets.
        error: words of the traceback with which the tests fail.
        reason: why they cannot hold.
    """

    tests: str
    applies: Callable[[Target], bool]
    error: str
    reason: str


def _is_live(target: Target) -> bool:
    return target.is_live


def _is_retro(target: Target) -> bool:
    return target.is_retro


_NEEDS_TOKENS = "Retrieval needs `input_ids`"
_NO_TOKENS = "There are no tokens to look up in `inputs_embeds`; the error says what to give instead."

NOT_APPLICABLE = (
    NotApplicable("test_inputs_embeds", _is_live, _NEEDS_TOKENS, _NO_TOKENS),
    NotApplicable("test_inputs_embeds_matches_input_ids", _is_live, _NEEDS_TOKENS, _NO_TOKENS),
    NotApplicable("test_generate_from_inputs_embeds", _is_live, _NEEDS_TOKENS, _NO_TOKENS),
    NotApplicable("test_generate_from_random_inputs_embeds", _is_live, _NEEDS_TOKENS, _NO_TOKENS),
    NotApplicable(
        "test_training_gradient_checkpointing_use_reentrant_true",
        _is_retro,
        "Reentrant gradient checkpointing would lose",
        "Reentrant checkpointing is refused by name: it would lose the gradient of the encoded neighbors.",
    ),
    NotApplicable(
        "test_bc_cache_name_*",
        lambda target: not target.is_live,
        "is not true",
        "It wants a warning for the old name of the cache; ours take both names on every release without one.",
    ),
    NotApplicable(
        "test_config",
        _is_retro,
        "'_name_or_path': ''",
        "Only its check of parts fails: the saved parts hold no `_name_or_path`, so that no path of a machine is published.",
    ),
    NotApplicable(
        "test_training",
        lambda target: target.kind == "retrofit" and not target.is_live,
        "does not require grad",
        "Without neighbors, a RETROfit is its frozen backbone, and nothing can be trained.",
    ),
    NotApplicable(
        "test_retain_grad_hidden_states_attentions",
        lambda target: target.kind == "retrofit",
        "can't retain_grad on Tensor that has requires_grad=False",
        "The backbone of a RETROfit is frozen, so its first hidden states have no gradient.",
    ),
    NotApplicable(
        "test_capture_outputs_decorator",
        _is_live,
        "has no attribute 'keys'",
        "It takes every `CompileableContextVar` for output capturing; RETRO's pass travels in one too.",
    ),
    NotApplicable(
        "test_custom_4d_attention_mask",
        _is_live,
        "`position_ids` restart inside a row",
        "Two endings of one text in one row have no chunks of their own; this is refused by name.",
    ),
    NotApplicable(
        "test_custom_4d_attention_mask",
        lambda target: target.family == "retro_decoder" and not target.is_live,
        "Tensor-likes are not close",
        "The paper's decoder measures distances in columns of the row, not by `position_ids`.",
    ),
)


@dataclass(frozen=True)
class LeavesItselfOut:
    """Tests that transformers leaves out by itself.

    Args:
        tests: pattern of the names.
        words: what the test says.
        reason: what that means here.
    """

    tests: str
    words: str
    reason: str


_OF_WHOLES = "It is about models made of several, and this one is not, or the other way around."
_NO_ROPE = "The backbone has no rotary positions."
_POSITIONS = "Positions are the backbone's; transformers tests them with the backbone's family."

LEAVES_ITSELF_OUT = (
    LeavesItselfOut(
        "test_bc_cache_name_*", "non standard Cache", "The cache holds the retrieval state too, by its type."
    ),
    LeavesItselfOut("test_pipeline_*", "is not in `self.pipeline_model_mapping`", "RETRO has no head for this task."),
    LeavesItselfOut("test_attn_implementation_composite_models", "not a composite model", _OF_WHOLES),
    LeavesItselfOut("test_can_set_attention_dynamically_composite_model", "not composite", _OF_WHOLES),
    LeavesItselfOut("test_internal_model_config_and_subconfig_are_same", "No subconfigs", _OF_WHOLES),
    LeavesItselfOut("test_sdpa_can_dispatch_composite_models", "does not support SDPA", _OF_WHOLES),
    LeavesItselfOut(
        "test_sdpa_can_dispatch_composite_models", "a non-text modality tower", "It is about images and sound."
    ),
    LeavesItselfOut("test_sdpa_can_dispatch_non_composite_models", "does not support SDPA", _OF_WHOLES),
    LeavesItselfOut(
        "test_enable_input_require_grads_with_gradient_checkpointing",
        "No model with a differentiable loss",
        "The embeddings of a RETROfit are frozen and get no gradient.",
    ),
    LeavesItselfOut("test_encoder_decoder_loss_no_double_shift", "No sequence-to-sequence", "RETRO is a decoder."),
    LeavesItselfOut(
        "test_can_load_from_already_mapped_keys", "No conversion found", "No weight is renamed when loaded."
    ),
    LeavesItselfOut("test_reverse_loading_mapping", "No conversion found", "No weight is renamed when loaded."),
    LeavesItselfOut("test_keep_in_fp32_modules*", "_keep_in_fp32_modules", "No part has to stay in float32."),
    LeavesItselfOut("test_eager_matches_batched_and_grouped*", "does not support grouped_mm", "There are no experts."),
    LeavesItselfOut("test_moe_models_record_router_logits", "no sparse experts", "There are no experts."),
    LeavesItselfOut("test_output_router_logits_from_config", "no `output_router_logits`", "There are no experts."),
    LeavesItselfOut("test_model_rope_*", "does not support RoPE scaling", _NO_ROPE),
    LeavesItselfOut("test_model_rope_*", "does not have RoPE", _NO_ROPE),
    LeavesItselfOut("test_model_rope_*", "does not have partial rope", "Its rotary positions are whole."),
    LeavesItselfOut("test_resize_position_vector_embeddings", "does not have position embeddings", _POSITIONS),
    LeavesItselfOut("test_vision_axial_rope", "no axial RoPE layer", _POSITIONS),
    LeavesItselfOut(
        "test_sliding_window_mask", "does not support sliding window mask", "The window is the backbone's."
    ),
    LeavesItselfOut(
        "test_tied_head_has_a_tp_plan_entry", "does not have a TP plan", "No plan for tensor parallelism."
    ),
    LeavesItselfOut("test_tp_plan_matches_params", "does not have a TP plan", "No plan for tensor parallelism."),
)


def find(test: str, target: Target) -> NotApplicable | None:
    """The entry of a test of a target, None if the test must hold."""
    return next((entry for entry in NOT_APPLICABLE if fnmatch(test, entry.tests) and entry.applies(target)), None)


def may_leave_itself_out(test: str, words: str) -> bool:
    """Whether the reason with which a test leaves itself out is known."""
    return any(fnmatch(test, entry.tests) and entry.words in words for entry in LEAVES_ITSELF_OUT)
