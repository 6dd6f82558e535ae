"""Releases of transformers: what is checked on a new one first, and what RETRO does on one that nobody has tested."""

import inspect
import subprocess
import sys

import pytest
import torch
from transformers.cache_utils import DynamicCache

from retro_hf import RetroDecoderForCausalLM
from retro_hf.model import compatibility_retro
from retro_hf.model.compatibility_retro import (
    CACHE_NAME,
    CACHE_NAMES,
    NEWEST_TESTED,
    OLDEST_TESTED,
    slice_logits_to_keep,
    warn_if_untested,
)

from .tiny import CHUNK_SIZE, hash_retriever, neighbors_from, random_ids, tiny_retro


FAMILIES = ["retro_decoder", "llama"]
GREEDY = {"do_sample": False, "max_new_tokens": 2 * CHUNK_SIZE + 1, "pad_token_id": 0, "eos_token_id": None}


def models() -> dict:
    """Every class with a forward pass of its own that takes a cache."""
    retro = tiny_retro("retro_decoder")
    decoder = retro.model.backbone
    assert isinstance(decoder, RetroDecoderForCausalLM)
    layer = decoder.model.layers[0]
    return {
        "causal_lm": retro,
        "model": retro.model,
        "decoder": decoder,
        "decoder_model": decoder.model,
        "layer": layer,
    }


class TestSelfCheck:
    """If one of these fails on a new release, generation is wrong there."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_cached_pass_is_full_pass(self, family):
        """Tokens given one by one with a cache, against all of them at once."""
        model, ids = tiny_retro(family), random_ids(2, 3 * CHUNK_SIZE + 1)
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            full = model(ids, use_cache=False, **neighbors_from(hash_retriever(), ids)).logits
            assert (full - model(ids, use_cache=False).logits).abs().max() > 0.05, "retrieval changes nothing"
            steps = [model(piece, cache=cache, retriever=hash_retriever()).logits for piece in ids.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=2e-5, rtol=1e-4)
        assert int(cache.get_seq_length()) == ids.shape[1]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_generate_returns_the_same_tokens_with_and_without_a_cache(self, family):
        model, ids = tiny_retro(family), random_ids(2, CHUNK_SIZE + 1)
        options = {"retriever": hash_retriever(), "return_dict_in_generate": True, **GREEDY}
        cached = model.generate(ids, **options)
        assert torch.equal(cached.sequences, model.generate(ids, use_cache=False, **options).sequences)
        assert cached[CACHE_NAME].get_seq_length() == cached.sequences.shape[1] - 1


class TestNameOfTheCache:
    @pytest.mark.parametrize("name", CACHE_NAMES)
    @pytest.mark.parametrize("kind", ["causal_lm", "model", "decoder", "decoder_model"])
    def test_every_name_is_accepted(self, kind, name):
        """The one of the installed release, and those of others: code for RETRO runs on all of them."""
        model, ids = models()[kind], random_ids(2, 7)
        cache = DynamicCache()
        with torch.no_grad():
            model(ids[:, :4], **{name: cache})
            second = model(ids[:, 4:], **{name: cache})
            full = model(ids, use_cache=False)
        assert second[CACHE_NAME] is cache
        torch.testing.assert_close(second[0], full[0][:, 4:], atol=2e-5, rtol=1e-4)

    @pytest.mark.parametrize("kind", ["causal_lm", "model", "decoder", "decoder_model", "layer"])
    def test_signature_shows_the_name_of_the_installed_release(self, kind):
        names = inspect.signature(models()[kind].forward).parameters
        assert CACHE_NAME in names
        assert not (set(CACHE_NAMES) - {CACHE_NAME}) & set(names)

    @pytest.mark.parametrize("kind", ["causal_lm", "model", "decoder", "decoder_model"])
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("memory", DynamicCache()),
            ("cache_params", [torch.zeros(1)]),
            ("layer_past", ((torch.zeros(1), torch.zeros(1)),)),
            ("past_states", torch.zeros(1)),
        ],
    )
    def test_cache_under_an_unknown_name_raises(self, kind, name, value):
        """It would be ignored, and each token read without its past."""
        with pytest.raises(TypeError, match=name):
            models()[kind](random_ids(2, 3), **{name: value})

    @pytest.mark.parametrize("kind", ["causal_lm", "model", "decoder", "decoder_model"])
    def test_two_caches_raise(self, kind):
        with pytest.raises(TypeError, match="twice"):
            models()[kind](random_ids(2, 3), cache=DynamicCache(), past_key_values=DynamicCache())

    @pytest.mark.parametrize("kind", ["causal_lm", "model", "decoder", "decoder_model"])
    def test_missing_caches_and_flags_do_not_raise(self, kind):
        models()[kind](random_ids(2, 3), cache=None, past_key_values=None, cache_params=None, skip_cache=False)


class TestRelease:
    @pytest.fixture
    def messages(self, monkeypatch):
        """What is logged as a warning."""
        logged = []
        monkeypatch.setattr(compatibility_retro.logger, "warning_once", logged.append)
        return logged

    @pytest.mark.parametrize("version", ["5.17.1", "5.99.0", "6.0.0.dev0"])
    def test_untested_release_is_named_beside_the_tested_ones(self, messages, version):
        warn_if_untested(version)
        (message,) = messages
        assert all("{}.{}".format(*release) in message for release in (OLDEST_TESTED, NEWEST_TESTED))
        assert version in message

    @pytest.mark.parametrize("release", [OLDEST_TESTED, NEWEST_TESTED])
    def test_tested_release_is_not_mentioned(self, messages, release):
        warn_if_untested("{}.{}.7".format(*release))
        assert messages == []

    def test_import_beside_an_untested_release_warns_once_and_works(self):
        """It does not raise, not even where warnings are errors, and it leaves standard output alone."""
        code = (
            "import transformers; transformers.__version__ = '5.99.0'; import retro_hf, retro_hf.model.modeling_retro"
        )
        result = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True
        )
        assert (result.returncode, result.stdout) == (0, ""), result.stderr
        assert result.stderr.count("5.99.0") == 1


@pytest.mark.parametrize(
    ("kept", "positions"),
    [(0, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3]), (torch.tensor([2, 0]), [2, 0])],
)
def test_logits_are_kept_where_asked(kept, positions):
    states = torch.randn(2, 4, 3)
    assert torch.equal(slice_logits_to_keep(states, kept), states[:, positions])
