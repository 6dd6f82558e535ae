"""The three configs refuse what is wrong, say what is right, and come back from disk as they were."""

import copy

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from retro_hf import RetroConfig, RetroDecoderConfig, RetroEncoderConfig, RetroForCausalLM, retrofit
from retro_hf.model.modeling_retro import READER_MODULES, RetroModel
from retro_hf.model.readers_retro import READERS

from .tiny import ENCODER, FAMILIES, random_ids, random_neighbors, tiny_backbone, tiny_retro


# ── wrong types and values ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config_class", "field", "value"),
    [
        (RetroDecoderConfig, "hidden_size", "896"),
        (RetroDecoderConfig, "hidden_size", 896.0),
        (RetroDecoderConfig, "tie_word_embeddings", "yes"),
        (RetroEncoderConfig, "num_hidden_layers", "2"),
        (RetroEncoderConfig, "cross_attention_layers", 0),
        (RetroEncoderConfig, "cross_attention_layers", ["0"]),
        (RetroConfig, "chunk_size", "64"),
        (RetroConfig, "chunk_size", True),
        (RetroConfig, "num_neighbors", 2.0),
        (RetroConfig, "cross_attention_layers", 5),
        (RetroConfig, "cross_attention_layers", [5.0]),
        (RetroConfig, "share_embeddings", 1),
        (RetroConfig, "rms_norm_eps", "1e-6"),
        (RetroConfig, "backbone_layers", 3),
        (RetroConfig, "text_config", "llama"),
        (RetroConfig, "neighbor_encoder_config", [1]),
    ],
)
def test_wrong_types_are_refused(config_class, field, value):
    """The error names the field and what was given; annotations that are strings would let everything through."""
    with pytest.raises(StrictDataclassFieldValidationError, match=f"(?s){field}.*{type(value).__name__}"):
        config_class(**{field: value})


@pytest.mark.parametrize("config_class", [RetroConfig, RetroDecoderConfig, RetroEncoderConfig])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", ""),
        ("dtype", "float33"),
        ("torch_dtype", "x"),
        ("id2label", 0),
        ("num_labels", 1 << 63),
        ("num_labels", "x"),
    ],
)
def test_what_transformers_takes_apart_is_checked_before(config_class, field, value):
    """It would raise from deep inside, or make labels until memory ends."""
    with pytest.raises(ValueError, match=f"`{field.removeprefix('torch_')}`.*{value!r}"):
        config_class(**{field: value})


def test_an_array_in_an_unknown_field_is_kept_as_any_other_value():
    """It is not compared with anything: an array has no truth value."""
    assert (RetroConfig(mine=np.arange(3)).mine == np.arange(3)).all()


@pytest.mark.parametrize("config_class", [RetroConfig, RetroDecoderConfig, RetroEncoderConfig])
def test_annotations_are_types(config_class):
    """`from __future__ import annotations` would turn them into strings, and the type checks off without a word."""
    assert not [name for name, kind in vars(config_class)["__annotations__"].items() if isinstance(kind, str)]


@pytest.mark.parametrize(
    ("config_class", "field", "value", "message"),
    [
        (RetroDecoderConfig, "vocab_size", 0, "at least 1, got 0 in RetroDecoderConfig"),
        (RetroDecoderConfig, "hidden_size", 33, "must be even for relative positions, got 33"),
        (RetroDecoderConfig, "num_hidden_layers", -1, "at least 1, got -1"),
        (RetroDecoderConfig, "attention_dropout", 1.5, "at least 0.0 and below 1.0, got 1.5"),
        (RetroDecoderConfig, "initializer_range", -0.1, "at least 0.0, got -0.1"),
        (RetroEncoderConfig, "hidden_size", 33, "must be even for relative positions, got 33"),
        (RetroEncoderConfig, "head_dim", 0, "at least 1, got 0 in RetroEncoderConfig"),
        (RetroEncoderConfig, "rms_norm_eps", -1e-6, "at least 0.0, got -1e-06"),
        (RetroEncoderConfig, "cross_attention_layers", [2], "counted from 0 to 1, got \\[2\\]"),
        (RetroEncoderConfig, "cross_attention_layers", [], "at least one layer"),
        (RetroConfig, "chunk_size", 0, "at least 1, got 0 in RetroConfig"),
        (RetroConfig, "chunk_size", 1 << 25, "below 16777217, got 33554432"),
        (RetroConfig, "cross_attention_head_dim", 1 << 40, "below 262145, got 1099511627776"),
        (RetroEncoderConfig, "hidden_size", 1 << 31, "below 262145, got 2147483648"),
        (RetroDecoderConfig, "num_hidden_layers", 1 << 31, "below 513, got 2147483648"),
        (RetroConfig, "num_neighbors", 0, "at least 1, got 0"),
        (RetroConfig, "neighbor_size", 0, "at least 1, got 0"),
        (RetroConfig, "cross_attention_head_dim", 0, "at least 1, got 0"),
        (RetroConfig, "cross_attention_layers", [12], "counted from 0 to 11, got \\[12\\].*paper counts from 1"),
        (RetroConfig, "cross_attention_layers", [-1], "counted from 0"),
        (RetroConfig, "cross_attention_layers", [8, 5], "increasing order"),
        (RetroConfig, "cross_attention_layers", [5, 5], "increasing order"),
        (RetroConfig, "cross_attention_layers", [], "at least one layer"),
        (RetroConfig, "cross_attention_placement", "before", "'after_attention'.*'after_layer', got 'before'"),
        (RetroConfig, "rms_norm_eps", -1.0, "at least 0.0, got -1.0"),
    ],
)
def test_wrong_values_are_refused(config_class, field, value, message):
    """The error says what is allowed and what was given."""
    with pytest.raises(StrictDataclassClassValidationError, match=f"(?s)`{field}.*{message}"):
        config_class(**{field: value})


@pytest.mark.parametrize(
    ("config_class", "given", "hint"),
    [
        (RetroConfig, "num_neighbours", "num_neighbors"),
        (RetroConfig, "neighbour_size", "neighbor_size"),
        (RetroConfig, "neighbors_size", "neighbor_size"),
        (RetroConfig, "neighbour_encoder_config", "neighbor_encoder_config"),
        (RetroConfig, "chunk_len", "chunk_size"),
        (RetroConfig, "chunk_length", "chunk_size"),
        (RetroConfig, "chunksize", "chunk_size"),
        (RetroConfig, "knn", "num_neighbors"),
        (RetroConfig, "k", "num_neighbors"),
        (RetroConfig, "retrieved_length", "neighbor_size"),
        (RetroConfig, "cross_attention_layer", "cross_attention_layers"),
        (RetroConfig, "dec_cca_layers", "cross_attention_layers"),
        (RetroConfig, "encoder_config", "neighbor_encoder_config"),
        (RetroConfig, "backbone_config", "text_config"),
        (RetroConfig, "hiden_size", "text_config={'hidden_size'"),
        (RetroConfig, "hidden_size", "text_config={'hidden_size'"),
        (RetroConfig, "num_layers", "text_config={'num_hidden_layers'"),
        (RetroDecoderConfig, "hiden_size", "hidden_size"),
        (RetroDecoderConfig, "d_model", "hidden_size"),
        (RetroDecoderConfig, "num_layers", "num_hidden_layers"),
        (RetroDecoderConfig, "dim_head", "head_dim"),
        (RetroDecoderConfig, "ffn_dim", "intermediate_size"),
        (RetroEncoderConfig, "hiden_size", "hidden_size"),
        (RetroEncoderConfig, "heads", "num_attention_heads"),
        (RetroEncoderConfig, "cross_attn_layers", "cross_attention_layers"),
    ],
)
def test_misspelt_fields_are_refused_with_a_hint(config_class, given, hint):
    """transformers would store the unknown name and never read it."""
    with pytest.raises(ValueError) as error:
        config_class(**{given: 4})
    assert f"'{given}'" in str(error.value) and hint in str(error.value)


@pytest.mark.parametrize("name", ["text_config", "neighbor_encoder_config"])
def test_misspelt_fields_of_nested_configs_are_refused(name):
    """Also where they stand in a dict inside."""
    with pytest.raises(ValueError, match="no field 'hiden_size'. Did you mean 'hidden_size'"):
        RetroConfig(**{name: {"hiden_size": 64}})


def test_a_misspelt_field_in_a_file_is_refused(tmp_path):
    """Loading a config.json checks its names as the constructor does."""
    RetroConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"num_neighbors"', '"num_neighbours"'))
    with pytest.raises(ValueError, match="Did you mean 'num_neighbors'"):
        RetroConfig.from_pretrained(tmp_path)


# ── families ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_family_is_refused():
    """The error names the family that was given."""
    with pytest.raises(ValueError, match="llamma"):
        RetroConfig(text_config={"model_type": "llamma"})


@pytest.mark.parametrize("family", ["retro", "retro_encoder"])
def test_retro_model_is_refused_as_backbone(family):
    """Neither the model itself nor its encoder can stand in the backbone's place, as a dict or as a config."""
    for config in ({"model_type": family}, AutoConfig.for_model(family)):
        with pytest.raises(
            ValueError, match=f"decoder-only language model such as 'llama', got the family '{family}'"
        ):
            RetroConfig(text_config=config)


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    """`RetroForCausalLM.from_pretrained("a llama")` says what does load it."""
    tiny_backbone("llama").save_pretrained(tmp_path)
    for read in (RetroConfig.from_pretrained, RetroForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="'llama'.*retrofit"):
            read(tmp_path)


def test_the_neighbor_encoder_is_ours():
    """Another family in its place would be ignored."""
    for config in ({"model_type": "bert"}, LlamaConfig()):
        with pytest.raises(ValueError, match="must be a RetroEncoderConfig"):
            RetroConfig(neighbor_encoder_config=config)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("bert", "'bert' attends in both directions.*needs a decoder-only"),
        ("roberta", "'roberta' attends in both directions.*needs a decoder-only"),
        ("t5", "T5Config'> for this kind of AutoModel: AutoModelForCausalLM"),
        ("bart", r"The layers of the family 'bart' also attend to an encoder or an image \(`encoder_attn`\)"),
    ],
)
def test_models_that_are_not_decoder_only_are_refused(family, message):
    """A bidirectional backbone would see the tokens it predicts, another cross-attention would find nothing."""
    config = RetroConfig(text_config={"model_type": family}, cross_attention_layers=[1])
    with torch.device("meta"), pytest.raises(ValueError, match=f"(?s){message}"):
        RetroForCausalLM(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_built_from_its_dict(family):
    """`text_config` becomes the family's own config, whose sizes the composite shows."""
    config = RetroConfig(text_config=FAMILIES[family], cross_attention_layers=[1])
    assert config.text_config.model_type == FAMILIES[family]["model_type"]
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        99,
        32,
        4,
        4,
    )
    assert (config.cross_attention_num_heads, config.cross_attention_head_dim) == (4, 8)


def test_an_odd_width_is_refused():
    """Half of the position features are sines, half cosines."""
    with pytest.raises(StrictDataclassClassValidationError, match="must be even for relative positions, got 33"):
        RetroConfig(text_config={"model_type": "gpt2", "n_embd": 33, "n_head": 3})


# ── defaults ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_follow_the_backbone():
    """A neighbor is two chunks; layers are every third from the sixth, or from the middle of a small model."""
    config = RetroConfig(chunk_size=16)
    assert config.neighbor_size == 32
    assert config.cross_attention_layers == [5, 8, 11]
    assert config.neighbor_encoder_config.cross_attention_layers == [0]
    assert RetroConfig(text_config={"num_hidden_layers": 24}).cross_attention_layers == [5, 8, 11, 14, 17, 20, 23]
    assert RetroConfig(text_config={"num_hidden_layers": 4}).cross_attention_layers == [2]
    assert RetroConfig(text_config={"num_hidden_layers": 1}).cross_attention_layers == [0]


def test_defaults_are_not_shared_between_configs():
    """Changing one config leaves the next one alone."""
    config = RetroConfig()
    config.cross_attention_layers.append(99)
    config.neighbor_encoder_config.cross_attention_layers.append(99)
    config.text_config.hidden_size = 2
    assert RetroConfig().cross_attention_layers == [5, 8, 11]
    assert RetroConfig().neighbor_encoder_config.cross_attention_layers == [0]
    assert RetroConfig().hidden_size == 896


def test_head_dim_need_not_divide_the_width():
    """The paper's smallest model has 16 heads of 64 over a width of 896."""
    model = tiny_retro(text_config={"head_dim": 6, "num_attention_heads": 3})
    attention = model.model.backbone.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (18, 32) and attention.o_proj.weight.shape == (32, 18)
    assert model(random_ids(1, 9), **random_neighbors(1, 2)).logits.isfinite().all()


# ── round trips ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_comes_back_from_dict_and_disk(family, tmp_path):
    """Every field of the three configs, through a dict and through config.json."""
    config = RetroConfig(
        text_config=FAMILIES[family],
        neighbor_encoder_config={**ENCODER, "num_hidden_layers": 3, "cross_attention_layers": [0, 2]},
        chunk_size=4,
        num_neighbors=3,
        neighbor_size=7,
        cross_attention_layers=[0, 3],
        cross_attention_num_heads=2,
        cross_attention_head_dim=5,
        cross_attention_placement="after_layer",
        cross_attention_null_key=True,
        zero_init_cross_attention=True,
        rms_norm_eps=1e-5,
        retriever_name_or_path="some/retriever",
    )
    expected = config.to_dict()
    assert RetroConfig(**copy.deepcopy(expected)).to_dict() == expected
    assert RetroConfig.from_dict(copy.deepcopy(expected)).to_dict() == expected
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is RetroConfig and type(again.text_config) is type(config.text_config)
    assert RetroConfig.from_pretrained(tmp_path).to_dict() == expected
    assert copy.deepcopy(config).to_dict() == expected


@pytest.mark.parametrize("config_class", [RetroDecoderConfig, RetroEncoderConfig])
def test_the_parts_come_back_from_disk_alone(config_class, tmp_path):
    """Each is a registered config of its own."""
    config = config_class(hidden_size=32, num_hidden_layers=3)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is config_class
    assert again.hidden_size == 32 and again.num_hidden_layers == 3


def test_a_config_object_and_its_dict_give_the_same():
    """Sub-configs may be objects or dicts."""
    text, encoder = LlamaConfig(hidden_size=32, num_attention_heads=4), RetroEncoderConfig(**ENCODER)
    objects = RetroConfig(text_config=text, neighbor_encoder_config=encoder)
    assert objects.text_config is text
    dicts = RetroConfig(text_config=text.to_dict(), neighbor_encoder_config=encoder.to_dict())
    assert objects.to_dict() == dicts.to_dict()


# ── a live backbone ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_of_a_live_backbone_is_left_alone(implementation):
    """Building a config around it must not reset how it attends, or it would lose its causal mask."""
    base = tiny_backbone("llama")
    base.set_attn_implementation(implementation)
    config = RetroConfig(text_config=base.config, cross_attention_layers=[1])
    assert base.config._attn_implementation == config.text_config._attn_implementation == implementation
    model = retrofit(base, chunk_size=4, cross_attention_layers=[1], encoder=ENCODER)
    assert base.config._attn_implementation == implementation
    ids = random_ids(1, 14)
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, :7], base(ids).logits[:, :7])
        torch.testing.assert_close(base(ids[:, :7]).logits, base(ids).logits[:, :7], atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_of_the_whole_can_be_chosen(implementation):
    """When it is built and later, it is that of backbone, encoder and cross-attention."""
    config = tiny_retro("llama").config
    built = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    switched = tiny_retro("llama")
    switched.set_attn_implementation(implementation)
    for model in (built, switched):
        assert model.config._attn_implementation == implementation
        assert model.model.backbone.config._attn_implementation == implementation
        layer = model.model.retro.encoder.layers[0]
        assert layer.self_attn.config._attn_implementation == implementation


def test_a_field_of_the_backbone_that_was_set_on_the_whole_can_be_saved(tmp_path):
    """Training scripts set `model.config.pretraining_tp = 1`, whatever the model is."""
    config = tiny_retro("llama").config
    config.pretraining_tp = config.text_config.pretraining_tp
    config.attention_dropout = 0.25
    config.max_position_embeddings = 77
    config.use_cache = False
    config.save_pretrained(tmp_path)
    for read in (config, AutoConfig.from_pretrained(tmp_path)):
        assert read.max_position_embeddings == 77
        text_config = read.text_config
        assert (text_config.attention_dropout, text_config.max_position_embeddings) == (0.25, 77)
        assert (text_config.pretraining_tp, text_config.use_cache) == (config.pretraining_tp, False)
    config.text_config.attention_dropout = 0.5  # what the backbone reads is what is saved
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_config.attention_dropout == 0.5
    with pytest.raises(ValueError, match="pretraining_tp"):
        RetroConfig(text_config=config.text_config, pretraining_tp=config.pretraining_tp + 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_field_of_the_backbone_can_be_given_at_loading(family, tmp_path):
    """It reaches the config that the layers read, that of the language model inside a composite too, and can be saved again."""
    name, value = {
        "llama": ("attention_dropout", 0.25),
        "gpt2": ("attn_pdrop", 0.25),
        "gemma3": ("sliding_window", 77),
    }[family]
    RetroConfig(text_config={"model_type": family}, cross_attention_layers=[1]).save_pretrained(tmp_path)
    for config_class in (AutoConfig, RetroConfig):
        config = config_class.from_pretrained(tmp_path, **{name: value})
        config.save_pretrained(tmp_path / "again")
        for read in (config, config_class.from_pretrained(tmp_path / "again")):
            assert getattr(read.get_text_config(decoder=True), name) == value


@pytest.mark.parametrize(
    ("family", "name", "value", "field"),
    [
        ("llama", "rope_theta", 5.0, "rope_parameters"),
        ("llama", "rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope_parameters"),
        ("llama", "n_embd", 64, "hidden_size"),
        ("llama", "n_positions", 64, "max_position_embeddings"),
        ("gpt2", "n_embd", 64, "n_embd"),
        ("gpt2", "embd_pdrop", 0.5, "embd_pdrop"),
    ],
)
def test_what_the_backbone_alone_understands_is_refused(family, name, value, field):
    """On the whole config it would be stored and ignored, also where the backbone turns it into another field."""
    with pytest.raises(ValueError, match=rf"no field '{name}'.*text_config={{'{field}'"):
        RetroConfig(text_config=FAMILIES[family], **{name: value})


def test_what_the_backbone_alone_understands_is_refused_at_loading(tmp_path):
    RetroConfig(text_config=FAMILIES["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no field 'rope_theta'") as caught:
        RetroConfig.from_pretrained(tmp_path, rope_theta=5.0)
    remedy = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}
    assert str(remedy) in str(caught.value)
    assert RetroConfig.from_pretrained(tmp_path, text_config=remedy).text_config.rope_parameters["rope_theta"] == 5.0


def test_notes_of_a_user_are_kept(tmp_path):
    """As in transformers; they say nothing that the backbone would understand."""
    RetroConfig(text_config=FAMILIES["llama"], note="mine").save_pretrained(tmp_path)
    config, unused = RetroConfig.from_pretrained(tmp_path, device_map="auto", return_unused_kwargs=True)
    assert (config.note, unused) == ("mine", {"device_map": "auto"})


@pytest.mark.parametrize("save_backbone", [True, False])
def test_special_tokens_can_be_given_at_loading(tmp_path, save_backbone):
    """They belong to the whole model, although they are no fields of its config."""
    tiny_backbone("llama").save_pretrained(tmp_path / "base")
    retrofit(tmp_path / "base", save_backbone=save_backbone).save_pretrained(tmp_path / "retro")
    given = {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8}
    for load in (RetroForCausalLM, AutoModelForCausalLM):
        config = load.from_pretrained(tmp_path / "retro", backbone_name_or_path=tmp_path / "base", **given).config
        assert {name: getattr(config, name) for name in given} == given


def test_the_error_says_where_a_field_of_a_composite_backbone_belongs():
    """The layers read the config inside the backbone's, so the remedy names both."""
    with pytest.raises(ValueError, match=r"`text_config=\{'text_config': \{'sliding_window': \.\.\.\}\}`"):
        RetroConfig(text_config={"model_type": "gemma3"}, sliding_window=77, cross_attention_layers=[1])


@pytest.mark.parametrize("name", ["", "text_config", "neighbor_encoder_config"])
def test_the_attention_of_one_part_can_be_chosen(name):
    """A dict sets the parts that it names, and no others."""
    model = tiny_retro("llama")
    model.set_attn_implementation("eager")
    model.set_attn_implementation({name: "sdpa"})
    config = model.config
    parts = {"": config, "text_config": config.text_config, "neighbor_encoder_config": config.neighbor_encoder_config}
    found = {key: part._attn_implementation for key, part in parts.items()}
    assert found == {**dict.fromkeys(parts, "eager"), name: "sdpa"}
    with pytest.raises(ValueError):
        model.set_attn_implementation({name: "no such attention"})


def test_text_config_of_a_backbone_that_reads_images_too():
    """`get_text_config` is what Trainer, TRL and `generate` ask for the vocabulary: the innermost config."""
    config = RetroConfig(text_config={"model_type": "gemma3"}, cross_attention_layers=[1])
    for text_config in (config.get_text_config(), config.get_text_config(decoder=True)):
        assert text_config is config.text_config.text_config
    assert RetroConfig().get_text_config().model_type == "retro_decoder"


def test_each_reader_has_a_module():
    """What is described is there, and the other way round."""
    assert READERS.keys() == READER_MODULES.keys()


def test_a_reader_without_a_module_does_not_run_as_another(monkeypatch):
    monkeypatch.setitem(READERS, "new", READERS["cross_attention"])
    with pytest.raises(KeyError):
        RetroModel(RetroConfig(reader="new", text_config=tiny_retro().config.text_config))
