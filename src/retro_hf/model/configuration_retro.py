# Copyright 2026 The retro-hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""RETRO configuration: the paper's decoder, the neighbor encoder, and the model that joins them to any backbone."""

# No `from __future__ import annotations` here: it would turn the type checks of `@strict` off without a word.
import copy
import os
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import auto_docstring

from .compatibility_retro import CACHE_NAMES, SubConfigSpec
from .names_retro import LARGEST, check_folder_name, check_saved_names, is_local
from .readers_retro import traits_of
from .values_retro import check_general_fields, shown


# What peers call our fields, so that their spelling gets an answer instead of being stored and ignored.
_SPELLINGS = {
    "chunk_size": "chunk_len chunk_length",
    "num_neighbors": "knn k num_neighbours",
    "neighbor_size": "neighbour_size retrieved_length",
    "cross_attention_layers": "dec_cross_attn_layers dec_cca_layers",
    "hidden_size": "d_model dim n_embd",
    "intermediate_size": "d_ff ffn_dim n_inner",
    "num_hidden_layers": "depth num_layers n_layer n_layers",
    "head_dim": "dim_head",
    "num_attention_heads": "heads num_heads n_head n_heads",
    "max_position_embeddings": "n_positions n_ctx max_seq_len",
    "neighbor_encoder_config": "encoder_config",
    "text_config": "backbone_config decoder_config",
}
_ALIASES = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings.split()}
# Sizes of a transformer; those of the backbone can't be set on `RetroConfig`.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")

# Arguments that every config takes although they are no fields of it.
_OF_EVERY_CONFIG = (
    "attn_implementation",
    "experts_implementation",
    "torch_dtype",
    "quantization_config",
    "model_type",
)

_MOST = 1 << 24  # tokens of a chunk or a neighbor, and neighbors


def _implementations(config: PreTrainedConfig) -> list[tuple[PreTrainedConfig, str | None, str | None]]:
    """How a config and its sub-configs, which may differ, compute attention and experts; the outer ones first."""
    found = [(config, config._attn_implementation, config._experts_implementation)]
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return sum((_implementations(part) for part in parts if isinstance(part, PreTrainedConfig)), found)


def _require_range(config: PreTrainedConfig, *names: str, least: float = 1, below: float | None = None) -> None:
    """Check numbers; sizes have an end, too, by which layers are made and memory is taken."""
    for name in names:
        value, end = getattr(config, name), below
        if end is None:
            end = float("inf") if isinstance(least, float) else LARGEST.get(name, _MOST) + 1
        if not least <= value < end:
            limit = "" if end == float("inf") or (below is None and value < least) else f" and below {end}"
            raise ValueError(
                f"`{name}` must be at least {least}{limit}, got {shown(value)} in {type(config).__name__}."
            )


def _require_even(config: PreTrainedConfig, name: str) -> None:
    value = getattr(config, name)
    if value % 2:  # half of the sinusoids are sines, half cosines
        raise ValueError(f"`{name}` must be even for relative positions, got {value} in {type(config).__name__}.")


def _require_layers(config: PreTrainedConfig, name: str, num_layers: int) -> None:
    layers = getattr(config, name)
    if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or layers[-1] >= num_layers:
        raise ValueError(
            f"`{name}` must name at least one layer, in increasing order, counted from 0 to {num_layers - 1}, got "
            f"{layers}. (The paper counts from 1: its P = 6, 9, 12 is [5, 8, 11] here.)"
        )


def _of_backbone(name: str, docstring: str) -> property:
    """A field of the backbone's config that is read through the whole config."""
    return property(lambda self: getattr(self.text_config.get_text_config(decoder=True), name, None), doc=docstring)


class _RetroConfigMixin:
    """What the three configs share."""

    @property
    def auto_map(self) -> dict[str, str]:
        """Classes of the code that the config was saved with; empty without code, where TRL wants it not to be missing."""
        return self.__dict__.setdefault("auto_map", {})

    @auto_map.setter
    def auto_map(self, value: dict[str, str]) -> None:
        self.__dict__["auto_map"] = value

    def to_dict(self) -> dict[str, Any]:
        """All values, as in transformers; without an empty `auto_map`, or where the backbone was loaded from."""
        values = super().to_dict()
        values.get("text_config", {}).pop("_name_or_path", None)  # `backbone_name_or_path` says it
        return {name: value for name, value in values.items() if name != "auto_map" or value}

    def _reject_misspelt_fields(self, unknown: dict) -> None:
        """Raise for an unknown keyword that is nearly a field: transformers would store it and never read it."""
        check_general_fields(self, unknown)
        known = [n for cls in type(self).__mro__ for n in getattr(cls, "__annotations__", {}) if not n.startswith("_")]
        for name in unknown:
            match = _ALIASES.get(name)
            if match not in known:
                match = next(iter(get_close_matches(name.replace("neighbour", "neighbor"), known, 1, 0.85)), None)
            if match is not None and name not in known:
                raise ValueError(f"{type(self).__name__} has no field '{name}'. Did you mean '{match}'?")


@auto_docstring(
    custom_intro="Configuration of [`RetroDecoderForCausalLM`], the paper's own decoder and baseline (section 2.5): GPT-2 "
    "with RMSNorm in place of LayerNorm and Transformer-XL relative positions. The defaults are the paper's "
    "smallest model (table 2)."
)
@strict
class RetroDecoderConfig(_RetroConfigMixin, PreTrainedConfig):
    r"""
    vocab_size (`int`, defaults to 128000): number of tokens.
    hidden_size (`int`, defaults to 896): width *d* of the residual stream.
    intermediate_size (`int`, defaults to 3584): width of the feed-forward layer, 4 *d* in the paper.
    num_hidden_layers (`int`, defaults to 12): number of layers *L*.
    num_attention_heads (`int`, defaults to 16): attention heads.
    head_dim (`int`, defaults to 64): width of a head; heads times head_dim need not be `hidden_size`.
    hidden_act (`str`, defaults to `"gelu"`): activation of the feed-forward layer.
    max_position_embeddings (`int`, defaults to 2048): longest sequence in tokens.
    rms_norm_eps (`float`, defaults to 1e-6): added to the mean square before the root.
    attention_dropout (`float`, defaults to 0.0): dropout of attention probabilities.
    initializer_range (`float`, defaults to 0.02): standard deviation of initial weights.
    tie_word_embeddings (`bool`, defaults to `True`): read out through the transposed embedding.
    """

    model_type = "retro_decoder"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = list(CACHE_NAMES)

    vocab_size: int = 128000
    hidden_size: int = 896
    intermediate_size: int = 3584
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    head_dim: int = 64
    hidden_act: str = "gelu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self._reject_misspelt_fields(kwargs)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Check values that types alone cannot (called by `@strict`)."""
        _require_range(self, "vocab_size", "max_position_embeddings", *_SIZES)
        _require_even(self, "hidden_size")
        _require_range(self, "rms_norm_eps", "initializer_range", least=0.0)
        _require_range(self, "attention_dropout", least=0.0, below=1.0)


@auto_docstring(
    custom_intro="Configuration of the neighbor encoder (section 2.4): a small bidirectional transformer over one "
    "neighbor, conditioned on the decoder. The defaults are the paper's, the same for all four model sizes "
    "(table 2)."
)
@strict
class RetroEncoderConfig(_RetroConfigMixin, PreTrainedConfig):
    r"""
    hidden_size (`int`, defaults to 896): width *d'*.
    intermediate_size (`int`, defaults to 3584): width of the feed-forward layer.
    num_hidden_layers (`int`, defaults to 2): number of layers.
    num_attention_heads (`int`, defaults to 16): attention heads.
    head_dim (`int`, defaults to 64): width of a head.
    cross_attention_layers (`list[int]`, defaults to `[0]`): layers, counted from 0, that attend to the decoder's
        chunk; the paper's P_enc = [1].
    hidden_act (`str`, defaults to `"gelu"`): activation of the feed-forward layer.
    rms_norm_eps (`float`, defaults to 1e-6): added to the mean square before the root.
    initializer_range (`float`, defaults to 0.02): standard deviation of initial weights.
    """

    model_type = "retro_encoder"
    base_config_key = "neighbor_encoder_config"

    hidden_size: int = 896
    intermediate_size: int = 3584
    num_hidden_layers: int = 2
    num_attention_heads: int = 16
    head_dim: int = 64
    cross_attention_layers: list[int] | None = None
    hidden_act: str = "gelu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self._reject_misspelt_fields(kwargs)
        if self.cross_attention_layers is None:
            self.cross_attention_layers = [0]
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Check values that types alone cannot (called by `@strict`)."""
        _require_range(self, *_SIZES)
        _require_even(self, "hidden_size")
        _require_layers(self, "cross_attention_layers", self.num_hidden_layers)
        _require_range(self, "rms_norm_eps", "initializer_range", least=0.0)


@auto_docstring(
    custom_intro="Configuration of [`RetroForCausalLM`]: a backbone, a neighbor encoder, and chunked cross-attention (CCA) "
    "in some of the backbone's layers."
)
@strict
class RetroConfig(_RetroConfigMixin, PreTrainedConfig):
    r"""
    text_config (`PreTrainedConfig` or `dict`, *optional*): the backbone, any decoder-only language model;
        [`RetroDecoderConfig`] by default.
    reader (`str`, defaults to `"cross_attention"`): how neighbors are read. `"cross_attention"` is the paper's: a neighbor
        encoder and chunked cross-attention, which are trained. `"parallel_context"` adds no weights and needs no training: the
        backbone encodes the neighbors itself and attends to them beside the text; the fields of the encoder and of
        cross-attention then have no effect.
    neighbor_encoder_config ([`RetroEncoderConfig`] or `dict`, *optional*): the neighbor encoder.
    chunk_size (`int`, defaults to 64): tokens per chunk, the paper's *m*.
    num_neighbors (`int`, defaults to 2): neighbors per chunk that the model is trained with, *k*; any other number
        may be given at any time.
    neighbor_size (`int`, *optional*, defaults to `2 * chunk_size`): tokens of one neighbor with its continuation,
        *r*.
    cross_attention_layers (`list[int]`, *optional*): layers with CCA, **counted from 0**; by default every
        third from the sixth, the paper's P = 6, 9, 12, … written [5, 8, 11, …]; in a backbone of fewer than 10 layers from
        the middle.
    cross_attention_num_heads (`int`, *optional*): heads of CCA; the backbone's by default.
    cross_attention_head_dim (`int`, *optional*): width of a CCA head; the backbone's by default.
    cross_attention_placement (`str`, defaults to `"after_attention"`): `"after_attention"`, the paper's order
        ATTN → CCA → FFW, or `"after_layer"`.
    cross_attention_null_key (`bool`, defaults to `False`): give every head of CCA one more key, with a learned logit and the value
        zero. A query that no neighbor token answers can attend to it, and then reads nothing. The paper has none.
    zero_init_cross_attention (`bool`, defaults to `False`): start with a zero output projection, so that the model
        equals its backbone before the first training step; what `retrofit` does.
    share_embeddings (`bool`, defaults to `False`): read neighbors through the backbone's embeddings instead of a
        table of their own (B.1.4).
    rms_norm_eps (`float`, defaults to 1e-6): of the norms before CCA and of the chunk states.
    initializer_range (`float`, defaults to 0.02): standard deviation of initial CCA weights.
    freeze_backbone (`bool`, defaults to `False`): build the model with the backbone's weights frozen; what `retrofit`
        does.
    backbone_layers (`str`, *optional*): dotted path of the backbone's layer list, for a family that the rule does
        not find.
    backbone_attention (`str`, *optional*): dotted path, inside a layer, of the module whose output is the
        self-attention branch.
    backbone_name_or_path (`str`, *optional*): checkpoint that the backbone's weights came from.
    backbone_revision (`str`, *optional*): its revision.
    backbone_fingerprint (`str`, *optional*): tells its weights from others of the same shape; what `retrofit` fills in.
    save_backbone (`bool`, defaults to `True`): whether a saved folder holds the backbone's weights, or only their
        name and revision (adapter-only).
    retriever_name_or_path (`str`, *optional*): the datastore that the model was made with. It is opened by
        `from_pretrained(..., retriever="config")` only.
    """

    model_type = "retro"
    keys_to_ignore_at_inference = list(CACHE_NAMES)
    # A dict of another family is turned into its class in `__post_init__`; the class here is only the default.
    sub_configs = {"text_config": RetroDecoderConfig, "neighbor_encoder_config": RetroEncoderConfig}
    sub_configs_defaults = {name: SubConfigSpec(config_class=part) for name, part in sub_configs.items()}

    text_config: dict | PreTrainedConfig | None = None
    reader: str = "cross_attention"
    neighbor_encoder_config: dict | PreTrainedConfig | None = None
    chunk_size: int = 64
    num_neighbors: int = 2
    neighbor_size: int | None = None
    cross_attention_layers: list[int] | None = None
    cross_attention_num_heads: int | None = None
    cross_attention_head_dim: int | None = None
    cross_attention_placement: str = "after_attention"
    cross_attention_null_key: bool = False
    zero_init_cross_attention: bool = False
    share_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    freeze_backbone: bool = False
    backbone_layers: str | None = None
    backbone_attention: str | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_fingerprint: str | None = None
    save_backbone: bool = True
    retriever_name_or_path: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self._reject_misspelt_fields(kwargs)
        for name, family in (("text_config", None), ("neighbor_encoder_config", RetroEncoderConfig.model_type)):
            self._check_family(name, family)
        if self.text_config is None:
            self.text_config = RetroDecoderConfig()
        elif isinstance(self.text_config, dict):
            family = self.text_config.get("model_type", RetroDecoderConfig.model_type)
            if family == RetroDecoderConfig.model_type:
                self.text_config = RetroDecoderConfig(**self.text_config)
            else:
                self.text_config = AutoConfig.for_model(
                    family, **{k: v for k, v in self.text_config.items() if k != "model_type"}
                )
        if not isinstance(self.neighbor_encoder_config, PreTrainedConfig):
            self.neighbor_encoder_config = RetroEncoderConfig(**(self.neighbor_encoder_config or {}))
        self._reject_backbone_fields(kwargs)
        # The base class sets the attention implementation of every sub-config again. That of a live backbone must stay, or
        # the backbone would attend without its causal mask.
        kept = _implementations(self.text_config)
        super().__post_init__(**kwargs)
        if "attn_implementation" not in kwargs:
            for part, attention, experts in kept:
                part._attn_implementation, part._experts_implementation = attention, experts
        backbone = self.text_config.get_text_config(decoder=True)
        num_layers = getattr(backbone, "num_hidden_layers", 1)
        if self.neighbor_size is None:
            self.neighbor_size = 2 * self.chunk_size
        if self.cross_attention_layers is None:
            self.cross_attention_layers = list(range(min(5, num_layers // 2), num_layers, 3))
        heads = self.num_attention_heads
        if self.cross_attention_num_heads is None:
            self.cross_attention_num_heads = heads
        if self.cross_attention_head_dim is None:
            head_dim = getattr(backbone.per_layer_config[0], "head_dim", None)
            self.cross_attention_head_dim = head_dim or backbone.hidden_size // heads

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field. A field of the backbone is also set in the backbone's config, where the backbone reads it."""
        owner = self._owner(name)
        if owner is not None:
            setattr(owner, name, value)
        if owner is None or not hasattr(type(self), name):  # our properties read the owner's
            super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """All values, as in transformers. The backbone's are in `text_config` only."""
        return {name: value for name, value in super().to_dict().items() if self._owner(name) is None}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json, as in transformers, without names of local folders, because the file may be uploaded."""
        portable = copy.copy(self)
        for name in self.local_paths():
            setattr(portable, name, None)
        super(RetroConfig, portable).save_pretrained(save_directory, push_to_hub, **kwargs)

    def local_paths(self) -> dict[str, str]:
        """The names that are folders of this machine, and mean nothing elsewhere.

        Returns:
            `dict` that maps fields (`backbone_name_or_path`, `retriever_name_or_path`) to paths.
        """
        names = {field: getattr(self, field) for field in ("backbone_name_or_path", "retriever_name_or_path")}
        return {field: name for field, name in names.items() if name and is_local(name)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config of saved values; as in transformers, and fields of the backbone alone reach `text_config`."""
        if (name := kwargs.get("backbone_name_or_path")) is not None:
            check_folder_name(name, what="backbone_name_or_path")
            kwargs["backbone_name_or_path"] = os.path.abspath(name) if os.path.isdir(name) else os.fspath(name)
            kwargs.setdefault("backbone_revision", None)  # the saved one is of the saved name
        check_saved_names({name: value for name, value in config_dict.items() if name not in kwargs})
        family = config_dict.get("model_type", cls.model_type)
        if family != cls.model_type:
            raise ValueError(
                f"This is a config of the family '{family}', not of a RETRO model. To add retrieval to a model of that family, use "
                "`retro_hf.retrofit`; to load it as it is, use `AutoModelForCausalLM`."
            )
        unknown = {name: value for name, value in kwargs.items() if name not in {field.name for field in fields(cls)}}
        saved = cls(**config_dict) if unknown else None
        # Ids of special tokens belong to the whole model, which has the backbone's tokenizer, though no field is called so.
        theirs = {
            name: kwargs.pop(name) for name in unknown if name.endswith("_token_id") or saved._owner(name) is not None
        }
        if saved is not None:
            saved._reject_backbone_fields({name: value for name, value in kwargs.items() if name in unknown})
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in theirs.items():
            setattr(config, name, value)
        config.validate_architecture()  # transformers does not check what is given beside the saved values
        return loaded

    def _owner(self, name: str) -> PreTrainedConfig | None:
        """The config that owns a field: the backbone's, or that of the language model in it; None for a field of our own."""
        text_config = self.__dict__.get("text_config")  # a dict, or not there, while the config is being built
        shared = name.startswith("_") or name.endswith("_token_id") or name == "quantization_config"
        shared = shared or name in self.__dataclass_fields__
        shared = shared or hasattr(PreTrainedConfig, name) or hasattr(_RetroConfigMixin, name)
        if shared or not isinstance(text_config, PreTrainedConfig):
            return None
        parts = (text_config, text_config.get_text_config(decoder=True))
        return next((part for part in parts if hasattr(part, name)), None)

    def _reject_backbone_fields(self, unknown: dict) -> None:
        for name, value in unknown.items():
            match = name
            if self._owner(name) is None:
                match = _ALIASES.get(name) or next(iter(get_close_matches(name, _SIZES, 1, 0.85)), name)
            owner = self._owner(match)
            # Trainer sets `use_cache` on every config; any other that says what the backbone says does no harm either.
            theirs = getattr(owner, name, None)
            is_same = type(value) is type(theirs) and value == theirs  # an array is not compared
            is_harmless = name == "use_cache" or (name == match and is_same)
            if not is_harmless and (match in _SIZES or owner is not None):
                inner = (
                    f"{{'{match}': ...}}"
                    if owner in (None, self.text_config)
                    else f"{{'text_config': {{'{match}': ...}}}}"
                )
                remedy = f"`text_config={inner}`"
                raise ValueError(f"RetroConfig has no field '{name}'. It is one of the backbone's: {remedy}.")
            if owner is None and (kept := self._backbone_keeps(name, value)):
                family = type(self.text_config).__name__
                raise ValueError(
                    f"RetroConfig has no field '{name}'. {family} makes the field '{next(iter(kept))}' of it. Set that one in "
                    f"the backbone's config: `text_config={kept}`."
                )

    def _backbone_keeps(self, name: str, value: Any) -> dict[str, Any]:
        """The fields that the backbone's config makes of an argument that is no field of it, such as `rope_theta`."""
        is_general = hasattr(PreTrainedConfig, name) and name != "rope_scaling"  # kept there for older code alone
        if is_general or name in _OF_EVERY_CONFIG or name.startswith("_"):
            return {}
        if not isinstance(value, (int, float, str, list, dict)):
            return {}
        family = type(self.text_config)
        try:
            plain, made = family().to_dict(), family(**{name: copy.deepcopy(value)}).to_dict()
        except Exception:  # a family without defaults, or a value that it refuses
            return {}
        return {field: made[field] for field in made if field != name and made[field] != plain.get(field)}

    def _check_family(self, name: str, expected: str | None) -> None:
        config = getattr(self, name) or {}
        family = config.get("model_type", expected) if isinstance(config, dict) else config.model_type
        if expected not in (None, family):
            raise ValueError(f"`{name}` must be a RetroEncoderConfig or a dict of one, got the family '{family}'.")
        if expected is None and family in (RetroConfig.model_type, RetroEncoderConfig.model_type):
            wanted = "a decoder-only language model such as 'llama'"
            raise ValueError(f"`{name}` must be {wanted}, got the family '{family}'.")

    def validate_architecture(self):
        """Check values that types alone cannot (called by `@strict`)."""
        _require_range(self, "rms_norm_eps", "initializer_range", least=0.0)
        _require_range(self, "chunk_size", "num_neighbors", "neighbor_size")
        _require_range(self, "cross_attention_num_heads", "cross_attention_head_dim")
        traits_of(self.reader)
        backbone = self.text_config.get_text_config(decoder=True)
        _require_layers(self, "cross_attention_layers", backbone.num_hidden_layers)
        _require_even(backbone, "hidden_size")
        if self.cross_attention_placement not in ("after_attention", "after_layer"):
            allowed = "'after_attention' (the paper's order) or 'after_layer'"
            raise ValueError(f"`cross_attention_placement` must be {allowed}, got '{self.cross_attention_placement}'.")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The config of the language model itself, also where the backbone reads images or sound too."""
        text_config = super().get_text_config(decoder=decoder, encoder=encoder)
        return text_config if text_config is self else text_config.get_text_config(decoder=decoder, encoder=encoder)

    # Trainer, TRL, lm-eval and DeepSpeed read these on the composite.
    vocab_size = _of_backbone("vocab_size", "Number of the backbone's tokens.")
    hidden_size = _of_backbone("hidden_size", "Width of the backbone's residual stream.")
    num_hidden_layers = _of_backbone("num_hidden_layers", "Number of the backbone's layers.")
    max_position_embeddings = _of_backbone("max_position_embeddings", "Longest sequence of the backbone, or None.")

    @property
    def num_attention_heads(self) -> int:
        """Attention heads of the backbone, in its first layer where layers differ."""
        return self.text_config.get_text_config(decoder=True).per_layer_config[0].num_attention_heads
