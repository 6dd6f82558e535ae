# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Save and load a whole model, or an adapter: only what RETRO adds to a backbone that is stored elsewhere."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.peft import maybe_load_adapters
from transformers.utils import logging

from .backbone_retro import fingerprint, placement
from .card_retro import read_evaluation, write_card
from .configuration_retro import RetroConfig
from .inputs_retro import check_names
from .names_retro import HUB_ARGUMENTS, check_folder_name, check_peft_base, check_weights, explaining, is_hub_name
from .readers_retro import traits_of
from .retriever_protocol_retro import Retriever
from .values_retro import shown


logger = logging.get_logger(__name__)

# Arguments for the file of the adapter's weights, and for every file of weights.
_ADAPTER_ARGUMENTS = ("variant", "ignore_mismatched_sizes", "key_mapping")
_FILE_ARGUMENTS = ("use_safetensors", "weights_only", "disable_mmap")
# Arguments meant for the weights, which a config would otherwise store or swallow.
_NOT_OF_THE_CONFIG = ("dtype", "torch_dtype", "quantization_config", "trust_remote_code", "gguf_file")


class RetroAdapter(PreTrainedModel):
    """Only what RETRO adds to a backbone, so that `PreTrainedModel.from_pretrained` loads it with all its options.

    Args:
        config ([`RetroConfig`]): of the whole model.
        retro (`nn.Module`): the part of the whole model whose weights are loaded, in place.
    """

    config: RetroConfig
    base_model_prefix = "model"  # weights are called `model.retro...`, or `retro...` if a RetroModel was saved
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: RetroConfig, retro: nn.Module):
        super().__init__(config)
        self.model = nn.ModuleDict({"retro": retro})
        self.post_init()


class RetroAdapterMixin(PreTrainedModel):
    """`save_pretrained` and `from_pretrained` of RETRO models, with the backbone or without it."""

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """The weights of a backbone of which only the name is saved. `Trainer` does not miss them either when it resumes."""
        if self.config.save_backbone:
            return set()
        prefix = f"{self.base_model_prefix}."
        return {name for name in self.state_dict() if name.removeprefix(prefix).startswith("backbone.")}

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value: Any) -> None:
        """Do nothing: `post_init` of transformers assigns what it has read."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, save_backbone: bool | None = None, **kwargs: Any
    ) -> None:
        """Save the model; with `save_backbone=False` only what RETRO adds, with the name and revision of the backbone.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write.
            args, kwargs: as in [`~transformers.PreTrainedModel.save_pretrained`].
            save_backbone (`bool`, *optional*, defaults to `config.save_backbone`): whether to write the backbone's weights.
        Raises:
            FileExistsError: if `save_directory` is a file.
            ValueError: for `save_backbone=False` if the config names no checkpoint to load the backbone from again, or
                its weights have changed since; for `save_backbone=True` if the backbone is quantized.
        """
        check_folder_name(save_directory, saves=True)
        if self._hf_peft_config_loaded:  # PEFT's folder holds what it trains, and names this model
            return super().save_pretrained(save_directory, *args, **kwargs)
        before = self.config.save_backbone
        self.config.save_backbone = before if save_backbone is None else save_backbone
        try:
            self.config.validate_architecture()
            self._check_backbone_can_be_saved()
            with self._without_local_paths() if kwargs.get("push_to_hub") else nullcontext():
                super().save_pretrained(save_directory, *args, **kwargs)
                if kwargs.get("is_main_process", True):
                    _tell_local_backbone(self.config, save_directory)
        finally:
            self.config.save_backbone = before

    def push_to_hub(self, repo_id: str, *args: Any, evaluation: str | os.PathLike | None = None, **kwargs: Any) -> str:
        """Upload the model as `config.save_backbone` says, with a card.

        Args:
            repo_id (`str`): name of the repository, such as `"org/name"`.
            args, kwargs: as in [`~transformers.PreTrainedModel.push_to_hub`].
            evaluation (`str` or `os.PathLike`, *optional*): the folder that `retro evaluate -o` wrote for this model; its numbers
                go into the card.
        Returns:
            `str`: address of the commit.
        Raises:
            ValueError: if only the name of the backbone would go up, and that is a folder of this machine; if `evaluation` is none
                of this model; or for a name that no repository can have.
        """
        if not is_hub_name(repo_id):
            raise ValueError(f"`repo_id` is {shown(repo_id)}. Pass the name of a repository, such as 'org/name'.")
        self._evaluation = None if evaluation is None else read_evaluation(evaluation, self.config)
        try:
            with self._without_local_paths():
                return super().push_to_hub(repo_id, *args, **kwargs)
        finally:
            del self._evaluation

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any):
        write_card(working_dir, repo_id, self.config, getattr(self, "_evaluation", None))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @contextmanager
    def _without_local_paths(self) -> Iterator[None]:
        local = self.config.local_paths()
        if "backbone_name_or_path" in local and not self.config.save_backbone:
            raise ValueError(
                f"The model would be uploaded with the name of its backbone alone, and '{local['backbone_name_or_path']}' is a "
                "folder of this machine. Upload the backbone, too (`model.config.save_backbone = True`), or name its "
                "repository (`model.config.backbone_name_or_path = 'org/name'`)."
            )
        for field, name in local.items():
            logger.warning(f"`{field}` is left out of what is uploaded: '{name}' is a folder of this machine.")
            setattr(self.config, field, None)
        try:
            yield
        finally:
            for field, name in local.items():
                setattr(self.config, field, name)

    def _check_backbone_can_be_saved(self) -> None:
        backbone, name = self.base_model.backbone, self.config.backbone_name_or_path
        if not self.config.save_backbone and name is None:
            raise ValueError(
                "`save_backbone=False` keeps only the name of the backbone, but `backbone_name_or_path` is None. Set it "
                "to the checkpoint that the backbone came from, or save with `save_backbone=True`."
            )
        recorded = self.config.backbone_fingerprint
        found = None
        if not self.config.save_backbone:
            found = recorded and fingerprint(backbone, sampled=len(recorded) == 16)
        elif getattr(backbone, "hf_quantizer", None):
            raise ValueError(
                "A quantized backbone cannot be written into the folder of the model. Save its name only, with "
                "`save_backbone=False`; it must have been loaded by its name, as in `retrofit('org/name', base_kwargs=...)`."
            )
        has_peft = any(".base_layer." in key for key in backbone.state_dict())
        names_peft = not self.config.save_backbone and os.path.isfile(os.path.join(name, "adapter_config.json"))
        if has_peft and not names_peft and (found is None or found != recorded):
            raise ValueError(
                "The backbone has adapters of PEFT in it, which would not be saved with the model. Save them by themselves and "
                "name them as the backbone: `model.base_model.backbone.save_pretrained('lora')`, then set "
                "`model.config.backbone_name_or_path = 'lora'` and `model.config.backbone_fingerprint = None`, and save with "
                "`save_backbone=False`. Or put adapters on the whole model: `get_peft_model(model, ...)`."
            )
        if found not in (None, recorded):
            raise ValueError(
                f"The backbone's weights are no longer those of '{name}' (trained or resized), and `save_backbone=False` "
                "would lose what they are now. Save with `save_backbone=True`."
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        retriever: Retriever | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a saved model, its backbone from the checkpoint it names if it was saved adapter-only.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or Hub repository.
            args, kwargs: as in [`~transformers.PreTrainedModel.from_pretrained`]; `backbone_name_or_path=` says where the
                backbone of an adapter is, if not where it was.
            config ([`RetroConfig`], *optional*): configuration to use instead of the saved one.
            retriever (`Callable` or `"config"`, *optional*): attached with `set_retriever`. `"config"` opens the datastore that
                the config names; `retriever_name_or_path=` names another one, such as a local folder.
        Returns:
            The model in evaluation mode; with `output_loading_info=True` also the `dict` of what was missing or unexpected.
        """
        check_folder_name(pretrained_model_name_or_path)
        if not isinstance(config, PreTrainedConfig):
            check_folder_name(config, what="config")
        path, hub = pretrained_model_name_or_path, {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        check_names({name: kwargs[name] for name in kwargs if name not in cls.config_class.__dataclass_fields__})
        if path is not None:
            check_weights(path, kwargs)
        with explaining(path):
            loaded = cls._load(path, config, hub, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.freeze_backbone:
            model.base_model.backbone.requires_grad_(False)  # loading makes new parameters
        if isinstance(retriever, str):
            retriever = _open_retriever(retriever, path, model.config)
        if retriever is not None:
            model.set_retriever(retriever)
        return loaded

    @classmethod
    def _load(cls, path: str | os.PathLike | None, config: Any, hub: dict, *args: Any, **kwargs: Any) -> Any:
        """The model, with what was missing if `output_loading_info` asks for it."""
        asked = kwargs.pop("reader", getattr(config, "reader", None))
        if asked is not None and path is not None:
            _check_reader(path, asked, cls.config_class, hub)
        # The folder of a PEFT adapter names the model that the adapter belongs on.
        peft_path, base_path, peft_hub = maybe_load_adapters(path, hub, **(kwargs.get("adapter_kwargs") or {}))
        check_peft_base(peft_path, base_path)
        if base_path is not None and not isinstance(config, PreTrainedConfig):
            held = {name: kwargs.pop(name) for name in _NOT_OF_THE_CONFIG if name in kwargs}
            config, kwargs = cls.config_class.from_pretrained(config or base_path, return_unused_kwargs=True, **kwargs)
            kwargs |= held | hub
        if base_path is not None:
            config = copy.deepcopy(config)
            if (where := kwargs.pop("backbone_name_or_path", None)) is not None:  # beside a config of the caller's
                config.backbone_name_or_path, config.backbone_revision = os.fspath(where), None
        try:
            if base_path is None or config.save_backbone:
                return super().from_pretrained(path, *args, config=config, **kwargs)
            model, info = cls._from_adapter(base_path, config, hub, **kwargs)
            if peft_path is not None:
                model.load_adapter(peft_path, kwargs.get("adapter_name"), adapter_kwargs=hub | peft_hub)
            return (model, info) if kwargs.get("output_loading_info") else model
        except SafetensorError as error:
            message = f"The weights in '{path}' are damaged or not complete: {error}. Copy or download them again."
            raise OSError(message) from error

    @classmethod
    def _from_adapter(cls, path: str | os.PathLike, config: RetroConfig, hub: dict, **kwargs: Any) -> tuple[Any, dict]:
        if "attn_implementation" in kwargs:
            config._attn_implementation = kwargs.pop("attn_implementation")
        backbone = _load_backbone(path, config, kwargs)
        config.text_config = backbone.config
        config.name_or_path = os.fspath(path)
        device, dtype = placement(backbone)
        if isinstance(config.dtype, str):
            config.dtype = dtype
        with torch.device("meta"):
            model = cls(config, backbone=backbone)
        retro = model.base_model.retro.to(dtype=dtype)
        settings = {name: kwargs[name] for name in (*_ADAPTER_ARGUMENTS, *_FILE_ARGUMENTS) if name in kwargs}
        info: dict = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        if any(True for _ in retro.parameters()):  # a reader without weights has no file of them
            added = copy.deepcopy(config)
            for part in (added.text_config, added.get_text_config(decoder=True)):
                part.__dict__.pop("quantization_config", None)  # the backbone's; what is added is never quantized
            info = RetroAdapter.from_pretrained(
                path, config=added, retro=retro, dtype=dtype, output_loading_info=True, **hub, **settings
            )[1]
        if info["missing_keys"] or info["unexpected_keys"]:
            raise ValueError(
                f"The weights in '{path}' do not fit its config: missing {sorted(info['missing_keys'])[:3]}, unexpected "
                f"{sorted(info['unexpected_keys'])[:3]}. Restore the config.json that was saved with them."
            )
        # Copy the weights: a memory-mapped file holds them at unaligned addresses, where kernels round differently.
        retro._apply(lambda weight: weight.to(device, copy=True))
        if model.can_generate():
            given = kwargs.get("generation_config")
            with suppress(OSError):  # the backbone's, if the folder has none of its own
                found = given or GenerationConfig.from_pretrained(path, **hub)
                model.generation_config = GenerationConfig.from_dict(found.to_dict())
        return model.eval(), info


def _open_retriever(asked: str, path: str | os.PathLike, config: RetroConfig) -> Retriever:
    """The retriever that a config names: of a repository, or of the folder that the caller has put there."""
    name = config.retriever_name_or_path
    if asked != "config":
        raise ValueError(
            f"`retriever` is {asked!r}. Pass a retriever, or `retriever='config', retriever_name_or_path={asked!r}` to open that one."
        )
    if name is None:
        raise ValueError(
            f"The config of '{path}' names no datastore to open. Name one: `from_pretrained(..., retriever='config', "
            "retriever_name_or_path='org/store')`."
        )
    try:  # by its name: these files work without the package, and import nothing of it
        package = import_module("retro_hf")
    except ImportError as error:
        raise ImportError(
            f"The package retro-hf opens the datastore '{name}'. Install it: `pip install retro-hf`."
        ) from error
    try:
        return package.RetroRetriever.from_pretrained(name, tokenizer=str(path))
    except package.errors.PretrainedNotFoundError:  # the model was saved without its tokenizer
        return package.RetroRetriever.from_pretrained(name)


def _check_reader(path: str | os.PathLike, asked: str, config_class: type[RetroConfig], hub: dict) -> None:
    """Raise for a folder that was saved with another reader than the one that is asked for."""
    with suppress(OSError):  # weights without a config
        saved = config_class.from_pretrained(path, **hub)
        traits_of(asked)
        if saved.reader != asked:
            raise ValueError(
                f"'{path}' was saved with reader='{saved.reader}' and cannot be loaded with reader='{asked}'. Load it as it "
                f"is, or make a new model of its base: `retrofit(base, reader='{asked}')`."
            )


def _load_backbone(path: str | os.PathLike, config: RetroConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load the backbone that the adapter at `path` was made for; `kwargs` are those of `from_pretrained`."""
    name, revision = config.backbone_name_or_path, config.backbone_revision
    if name is None:
        raise OSError(
            f"'{path}' holds only what RETRO adds to a backbone, and does not name it: it was a folder of the machine that saved "
            f"the model. Say where it is: `from_pretrained('{path}', backbone_name_or_path='<folder>')`. For programs that take "
            "one name only, save the whole model that this gives with `save_pretrained('<new folder>', save_backbone=True)`."
        )
    checkpoint = f"'{name}' (revision {revision})"
    ours = ("subfolder", "adapter_kwargs", "adapter_name", "generation_config", "output_loading_info")
    theirs = {key: value for key, value in kwargs.items() if key not in (*ours, *_ADAPTER_ARGUMENTS)}
    theirs = {key: value for key, value in theirs.items() if not key.startswith("_")}  # what Auto classes add
    theirs["revision"] = revision or "main"
    theirs.setdefault("trust_remote_code", False)  # no question at the terminal
    dtype = next((one for one in (theirs.pop("torch_dtype", None), theirs.get("dtype")) if one is not None), "auto")
    theirs["dtype"] = config.dtype or "auto" if isinstance(dtype, str) and dtype == "auto" else dtype
    text_config = copy.deepcopy(config.text_config)
    # A base that is stored quantized stays as it is stored; one that was quantized on loading is quantized again.
    quantization = text_config.__dict__.pop("quantization_config", None)
    try:
        where = {key: theirs[key] for key in HUB_ARGUMENTS if key in theirs}
        check_weights(name, theirs)
        adapter, base, _ = maybe_load_adapters(name, where)  # if the name is that of a PEFT adapter
        check_peft_base(adapter, base)
        stored = AutoConfig.from_pretrained(base, trust_remote_code=theirs["trust_remote_code"], **where)
        for field in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            values = [getattr(part.get_text_config(decoder=True), field, None) for part in (text_config, stored)]
            _check_same(path, checkpoint, field, *values)
        if hasattr(stored, "quantization_config"):
            text_config.quantization_config = stored.quantization_config
        elif quantization is not None:
            theirs.setdefault("quantization_config", quantization)
        backbone = AutoModelForCausalLM.from_pretrained(name, config=text_config, **theirs)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ValueError) and not str(error).startswith("Unrecognized model"):  # of an empty folder
            raise
        raise OSError(
            f"'{path}' holds only what RETRO adds to {checkpoint}, and that backbone cannot be loaded: {error} Make it "
            "available there, or say where it is: `from_pretrained(..., backbone_name_or_path=...)`."
        ) from error
    recorded = config.backbone_fingerprint
    found = recorded and fingerprint(backbone, sampled=len(recorded) == 16)
    if found is not None:
        remedy = " To read other weights all the same, give `backbone_fingerprint=None`."
        _check_same(path, checkpoint, "backbone_fingerprint", recorded, found, remedy)
        config.backbone_fingerprint = found if len(recorded) > 16 else fingerprint(backbone)
    return backbone


def _check_same(path: Any, checkpoint: str, field: str, expected: Any, found: Any, remedy: str = "") -> None:
    if expected != found:
        raise ValueError(
            f"The config of '{path}', with the arguments given, has {field}={expected}, but the backbone {checkpoint} has {found}. "
            "Leave the argument out, or load the backbone that it was made for: `from_pretrained(..., "
            f"backbone_name_or_path=..., backbone_revision=...)`.{remedy}"
        )


def _tell_local_backbone(config: RetroConfig, folder: str | os.PathLike) -> None:
    """Say how an adapter is loaded whose backbone is a folder of this machine, which no saved file names."""
    name = config.local_paths().get("backbone_name_or_path")
    if name is not None and not config.save_backbone:
        logger.warning_once(
            f"'{folder}' does not say where its backbone is, since '{name}' is a folder of this machine. Load it with "
            f"`from_pretrained('{folder}', backbone_name_or_path='{name}')`; before it is uploaded, name the backbone's repository: "
            "`model.config.backbone_name_or_path = 'org/name'`."
        )
