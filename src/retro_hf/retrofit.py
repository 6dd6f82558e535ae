"""RETROfit: add retrieval to any decoder-only checkpoint, whose own weights stay frozen (section 4.2)."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .arguments import optional_text, shown
from .errors import PretrainedNotFoundError, UnsupportedBackboneError
from .model.backbone_retro import fingerprint, placement
from .model.configuration_retro import RetroConfig, RetroEncoderConfig
from .model.modeling_retro import READER_MODULES, RetroForCausalLM
from .model.names_retro import check_folder_name, check_weights, explaining
from .model.readers_retro import traits_of


logger = logging.get_logger(__name__)


def retrofit(
    base: str | os.PathLike | PreTrainedModel,
    *,
    reader: str = "cross_attention",
    encoder: RetroEncoderConfig | dict | None = None,
    freeze_backbone: bool = True,
    share_embeddings: bool = True,
    revision: str | None = None,
    base_kwargs: dict[str, Any] | None = None,
    **config: Any,
) -> RetroForCausalLM:
    """Let a causal language model read retrieved neighbors.

    The paper's reader adds a neighbor encoder and chunked cross-attention, which you then train. Before the first training
    step the result computes exactly what the base computes, with neighbors or without, because the output projections of
    the cross-attention start at zero. The reader `parallel_context` adds no weights and needs no training.

    Args:
        base (`str`, `os.PathLike` or `PreTrainedModel`): checkpoint (folder or Hub repository), or a loaded model, which
            becomes part of the result.
        reader (`str`, defaults to `"cross_attention"`): the paper's; or `"parallel_context"`, where the base itself encodes the
            neighbors and attends to them beside the text (see [`RetroConfig`]).
        encoder ([`RetroEncoderConfig`] or `dict`, *optional*): the neighbor encoder. The default is small, two layers of half
            the base's width, because it encodes `num_neighbors * neighbor_size / chunk_size` neighbor tokens for each token
            of the text.
        freeze_backbone (`bool`, defaults to `True`): train only what is added. Without retrieval the model then stays equal
            to the base, bit for bit.
        share_embeddings (`bool`, defaults to `True`): read neighbors through the base's embeddings (B.1.4).
        revision (`str`, *optional*): revision of the checkpoint.
        base_kwargs (`dict`, *optional*): for `AutoModelForCausalLM.from_pretrained`, such as `dtype`, `device_map` or
            `quantization_config`. What is added is never quantized. Of a quantized base only the name is saved.
        config: fields of [`RetroConfig`], such as `chunk_size` or `cross_attention_layers`.
    Returns:
        [`RetroForCausalLM`] in evaluation mode, on the device and in the dtype of the base.
    Raises:
        UnsupportedBackboneError: if the base is not a decoder-only model with its head, or its layers are not found. The
            message says how to name them.
        PretrainedNotFoundError: if the checkpoint is not found.
    """
    revision = optional_text("revision", revision, ValueError)
    if base_kwargs is not None and (not isinstance(base_kwargs, dict) or isinstance(base, PreTrainedModel)):
        raise ValueError(
            f"`base_kwargs` is {shown(base_kwargs)}, and the base is of type {type(base).__name__}. Pass a dict, such as "
            "{'dtype': 'bfloat16'}, with the name of a checkpoint; leave it out with a model, which is loaded already."
        )
    backbone, name = _backbone_of(base, revision, base_kwargs or {})
    if isinstance(backbone, RetroForCausalLM):
        raise ValueError("The base is a RETRO model already; retrofit its `model.backbone`, or train it as it is.")
    traits = traits_of(reader)
    if encoder is not None and not traits.has_weights:
        raise ValueError(f"reader='{reader}' has no neighbor encoder; leave `encoder` out.")
    try:  # before sizes are read that only a decoder has
        READER_MODULES[reader].check_structure(backbone, config.get("backbone_layers"))
    except ValueError as error:
        raise UnsupportedBackboneError(str(error)) from error
    if name and os.path.isdir(name):
        name = os.path.abspath(name)  # an adapter is loaded from other working directories, too
    if name and getattr(backbone, "hf_quantizer", None):
        config.setdefault("save_backbone", False)
    retro_config = RetroConfig(
        text_config=backbone.config,
        reader=reader,
        neighbor_encoder_config=_small_encoder(backbone) if encoder is None else encoder,
        share_embeddings=share_embeddings,
        freeze_backbone=freeze_backbone,
        zero_init_cross_attention=True,
        backbone_name_or_path=name,
        backbone_revision=revision or getattr(backbone.config, "_commit_hash", None),
        backbone_fingerprint=fingerprint(backbone) if name else None,
        **{"pad_token_id": getattr(backbone.config.get_text_config(decoder=True), "pad_token_id", None), **config},
    )
    try:
        model = RetroForCausalLM(retro_config, backbone=backbone)
        model.model.retro.check_outputs(backbone)
    except ValueError as error:
        raise UnsupportedBackboneError(str(error)) from error
    # TRL loads its reference model from this name, and pipelines load the tokenizer. Until training, the base is the same.
    model.config.name_or_path = name or ""
    device, dtype = placement(backbone)
    model.model.retro.to(device=device, dtype=dtype)
    logger.info(parameter_report(model))
    return model.eval()


def _backbone_of(
    base: str | os.PathLike | PreTrainedModel, revision: str | None, base_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, str | None]:
    """The base as a loaded model, and its name."""
    if isinstance(base, PreTrainedModel):
        return base, base.config.name_or_path or None
    if not isinstance(base, (str, os.PathLike)):
        remedy = "Give one of these"
        if isinstance(base, PreTrainedConfig):
            remedy = "Make the model first: `retrofit(AutoModelForCausalLM.from_config(config))`"
        raise UnsupportedBackboneError(
            f"The base must be a folder, the name of a model on the Hub, or a loaded causal language model of transformers "
            f"(`PreTrainedModel`), got {'None' if base is None else type(base).__name__}. {remedy}."
        )
    check_folder_name(base, what="The base")
    name = os.fspath(base)
    return _load_base(name, revision, base_kwargs), name


def _small_encoder(backbone: PreTrainedModel) -> RetroEncoderConfig:
    """A neighbor encoder of two layers, half as wide as the base."""
    heads = max(backbone.config.get_text_config(decoder=True).hidden_size // 128, 1)
    return RetroEncoderConfig(
        hidden_size=heads * 64, intermediate_size=heads * 256, num_attention_heads=heads, head_dim=64
    )


def _load_base(name: str, revision: str | None, base_kwargs: dict[str, Any]) -> PreTrainedModel:
    try:
        # No question at the terminal: code of a checkpoint runs only if the caller says so.
        options = {"revision": revision or "main", "trust_remote_code": False, **base_kwargs}
        check_weights(name, options)
        with explaining(name):
            return AutoModelForCausalLM.from_pretrained(name, **options)
    except OSError as error:
        raise PretrainedNotFoundError.for_name("model", name, error) from error
    except ValueError as error:
        if str(error).startswith("Unrecognized model"):  # of a folder without a config
            raise PretrainedNotFoundError.for_name("model", name, error) from error
        if not str(error).startswith("Unrecognized configuration class"):
            raise
        raise UnsupportedBackboneError(
            f"'{name}' is not a decoder-only causal language model such as Llama or GPT-2, which RETRO needs: "
            f"{str(error).splitlines()[0]}"
        ) from error


def parameter_report(model: RetroForCausalLM) -> str:
    """One line that says what RETRO adds and what will be trained.

    Returns:
        `str`, such as `base 134,515,008 + retro 11,059,776 (8.2 %) | trainable 11,059,776 of 145,574,784 (7.6 %)`.
    """

    def count(parameters: Any) -> int:
        return sum(p.numel() for p in parameters)

    total = count(model.parameters())
    added = count(model.model.retro.parameters())
    trainable = count(p for p in model.parameters() if p.requires_grad)
    return (
        f"base {total - added:,} + retro {added:,} ({added / max(total - added, 1):.1%}) | trainable {trainable:,} of "
        f"{total:,} ({trainable / total:.1%})"
    )
