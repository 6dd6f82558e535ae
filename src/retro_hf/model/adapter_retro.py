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
"""Saving and loading: the whole model, or an adapter, which holds only what RETRO adds to a backbone saved elsewhere."""

import os
from contextlib import suppress
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from .backbone_retro import fingerprint, placement
from .configuration_retro import RetroConfig
from .retriever_protocol_retro import Retriever


logger = logging.get_logger(__name__)

# Where a checkpoint lies on the Hub; arguments of `from_pretrained`.
_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
_BACKBONE_FIELDS = {"backbone_name_or_path", "backbone_revision", "backbone_fingerprint"}


class RetroAdapterMixin(PreTrainedModel):
    """`save_pretrained` and `from_pretrained` of RETRO models."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, save_backbone: bool | None = None, **kwargs: Any
    ) -> None:
        """Save the model; with `save_backbone=False` only what RETRO adds, with the name and revision of the backbone.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write.
            args, kwargs: as in [`~transformers.PreTrainedModel.save_pretrained`].
            save_backbone (`bool`, *optional*, defaults to `config.save_backbone`): whether to write the backbone's weights.
        Raises:
            ValueError: for `save_backbone=False` if the config names no checkpoint to load the backbone from again, or
                its weights have changed since; for `save_backbone=True` if the backbone is quantized.
        """
        before = self.config.save_backbone
        self.config.save_backbone = before if save_backbone is None else save_backbone
        try:
            self.config.validate_architecture()
            if not self.config.save_backbone:
                self._check_backbone_is_unchanged()
                state_dict = kwargs.get("state_dict") or self.state_dict()
                kwargs["state_dict"] = {k: v for k, v in state_dict.items() if k.startswith("model.retro.")}
            elif getattr(self.model.backbone, "hf_quantizer", None):
                raise ValueError(
                    "A quantized backbone cannot be written into the folder of the model, only its name can: save with "
                    "`save_backbone=False`, which needs a base that was loaded by its name (`retrofit('org/name', "
                    "base_kwargs={'quantization_config': ...})`)."
                )
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.save_backbone = before

    def _check_backbone_is_unchanged(self) -> None:
        found = fingerprint(self.model.backbone)
        if None not in (found, self.config.backbone_fingerprint) and found != self.config.backbone_fingerprint:
            raise ValueError(
                f"The backbone's weights are no longer those of '{self.config.backbone_name_or_path}' (trained, resized, or "
                "with adapters of PEFT in them), and `save_backbone=False` would lose what they are now. Save with "
                "`save_backbone=True`."
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        config: RetroConfig | None = None,
        retriever: Retriever | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a saved model, its backbone from the checkpoint it names if it was saved adapter-only.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or Hub repository.
            args, kwargs: as in [`~transformers.PreTrainedModel.from_pretrained`]; `backbone_name_or_path=` says where the
                backbone of an adapter lies, if not where it was.
            config ([`RetroConfig`], *optional*): configuration to use instead of the saved one.
            retriever (`Callable`, *optional*): attached with `set_retriever`.
        """
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        saved = config
        if config is None and pretrained_model_name_or_path is not None:
            saved = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
            if not saved.save_backbone:
                for name in _BACKBONE_FIELDS & kwargs.keys():
                    value = kwargs.pop(name)
                    setattr(saved, name, os.fspath(value) if isinstance(value, os.PathLike) else value)
        if pretrained_model_name_or_path is None or saved.save_backbone:
            model = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        else:
            model = cls._from_adapter(pretrained_model_name_or_path, saved, hub, **kwargs)
        result = model[0] if isinstance(model, tuple) else model
        if result.config.freeze_backbone:
            result.model.backbone.requires_grad_(False)  # loading makes new parameters
        if retriever is not None:
            result.set_retriever(retriever)
        return model

    @classmethod
    def _from_adapter(cls, path: str | os.PathLike, config: RetroConfig, hub: dict, **kwargs: Any) -> Any:
        name, revision = config.backbone_name_or_path, config.backbone_revision
        if os.path.isabs(name) and not os.path.isdir(name):
            name = config.backbone_name_or_path = _folder_beside(path, name)
        theirs = {
            key: value for key, value in kwargs.items() if key not in ("revision", "subfolder", "output_loading_info")
        }
        theirs = {key: value for key, value in theirs.items() if not key.startswith("_")}  # what Auto classes add
        implementation = theirs.pop("attn_implementation", config._attn_implementation_internal)
        quantization = getattr(config.text_config, "quantization_config", None)
        if quantization is not None:  # as it was trained; `quantization_config=None` loads it as it is
            theirs.setdefault("quantization_config", quantization)
        try:
            backbone = AutoModelForCausalLM.from_pretrained(
                name, revision=revision or "main", attn_implementation=implementation, **theirs
            )
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not str(error).startswith("Unrecognized model"):  # of an empty folder
                raise
            raise OSError(
                f"'{path}' holds only what RETRO adds to '{name}' (revision {revision}), and that backbone cannot be loaded: "
                f"{error} Make it available there, or say where it is: `from_pretrained(..., backbone_name_or_path=...)`, or in "
                "the folder's config.json."
            ) from error
        expected = config.text_config.get_text_config(decoder=True)
        found = backbone.config.get_text_config(decoder=True)
        for field in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            if getattr(found, field) != getattr(expected, field):
                raise ValueError(
                    f"'{path}' was made for a backbone with {field}={getattr(expected, field)}, but '{name}' (revision "
                    f"{revision}) has {getattr(found, field)}. Load the checkpoint that it was made for: set "
                    "`backbone_name_or_path` and `backbone_revision` in the folder's config.json."
                )
        fingerprints = fingerprint(backbone), config.backbone_fingerprint
        if None not in fingerprints and fingerprints[0] != fingerprints[1]:
            raise ValueError(
                f"'{path}' was made for other weights than '{name}' (revision {revision}) has: their fingerprint is "
                f"{fingerprints[0]}, that of its backbone {fingerprints[1]}. Load the checkpoint that it was made for: set "
                "`backbone_name_or_path` and `backbone_revision` in the folder's config.json; or, to read these weights all "
                "the same, `backbone_fingerprint` to null."
            )
        config.text_config = backbone.config
        config.name_or_path = os.fspath(path)
        model = cls(config, backbone=backbone)
        weights = _read_weights(path, hub)
        own = {key for key in model.state_dict() if key.startswith("model.retro.")}
        if own != set(weights):
            raise ValueError(
                f"The weights in '{path}' do not fit its config: missing {sorted(own - set(weights))[:3]}, unexpected "
                f"{sorted(set(weights) - own)[:3]}."
            )
        model.load_state_dict(weights, strict=False)
        device, dtype = placement(backbone)
        model.model.retro.to(device=device, dtype=dtype)
        if implementation is not None:
            model.set_attn_implementation(implementation)
        with suppress(OSError):  # the backbone's, if the folder has none of its own
            model.generation_config = GenerationConfig.from_pretrained(path, **hub)
        return model.eval()


def _folder_beside(path: str | os.PathLike, name: str) -> str:
    """Where the folder of the backbone lies if it was moved together with that of the adapter at `path`."""
    beside = os.path.join(os.path.dirname(os.path.abspath(path)), os.path.basename(name))
    if not os.path.isdir(beside):
        raise OSError(
            f"'{path}' holds only what RETRO adds to the model in the folder '{name}', and neither that nor '{beside}' is "
            f"there. Put it there, or say where it is: `from_pretrained(..., backbone_name_or_path=...)`, or in the config.json "
            f"of '{path}'."
        )
    logger.warning(f"There is no folder '{name}' any more; the backbone is read from '{beside}'.")
    return beside


def _read_weights(path: str | os.PathLike, hub: dict) -> dict[str, torch.Tensor]:
    """The weights in the folder or repository of an adapter, from one file or several."""
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    files = [cached_file(path, SAFE_WEIGHTS_NAME, **hub)] if index is None else None
    if files is None:
        files, _ = get_checkpoint_shard_files(path, index, **hub)
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            weights |= load_state_dict(file)
        except SafetensorError as error:
            raise OSError(f"'{file}' is damaged or not complete: {error}. Copy or download it again.") from error
    return weights


__all__ = ["RetroAdapterMixin"]
