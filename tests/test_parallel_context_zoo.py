"""The reader `parallel_context` over every causal language model of transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from retro_hf import retrofit
from retro_hf.errors import UnsupportedBackboneError

from .tiny import CHUNK_SIZE, VOCAB_SIZE, hash_retriever, neighbors_from, random_ids, random_neighbors, randomize
from .zoo import FAMILIES, GREEDY, MATTERS, TOLERANCE, tiny_config


READ = tuple(
    """
afmoe apertus arcee aria_text axk1 bailing_hybrid bamba beam bitnet cohere cohere2 cohere2_moe
cohere_compass_text cwm dbrx deepseek_v2 deepseek_v3 diffllama doge dots1 emu3 ernie4_5 ernie4_5_moe exaone4
exaone_moe flex_olmo flint fuyu gemma gemma2 gemma4 gemma4_text gemma4_unified gemma4_unified_text glm glm4
glm4_moe glm4_moe_lite gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoehybrid
granitemoeshared helium hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe laguna lfm2 lfm2_moe lfm3 llama
llama4 llama4_text longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text mixtral
modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi phi3 phi4_multimodal
phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss
smollm3 solar_open stablelm starcoder2 vaultgemma youtu
""".split()
)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_reads_or_is_refused_by_name(family):
    """Off is the base bit for bit; with a cache as without; nothing reads ahead; or a clear error."""
    torch.manual_seed(0)
    ids, changed, neighbors = random_ids(2, 14), random_ids(2, 14), random_neighbors(2, 3)
    try:
        base = randomize(AutoModelForCausalLM.from_config(tiny_config(family))).eval()
        with torch.no_grad():
            expected = base(ids, use_cache=False).logits
    except Exception as error:  # the base itself does not run here, for whatever reason
        assert family not in READ, error
        return
    if family not in READ:
        with pytest.raises(UnsupportedBackboneError):
            retrofit(base, reader="parallel_context", chunk_size=CHUNK_SIZE)
        return
    model = retrofit(base, reader="parallel_context", chunk_size=CHUNK_SIZE)

    def difference(found, expected):
        return float((found - expected).abs().max() / expected.abs().max())

    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        logits = model(ids, use_cache=False, **neighbors).logits
        assert difference(logits[:, 3], expected[:, 3]) > MATTERS
        assert difference(logits[:, :3], expected[:, :3]) < TOLERANCE
        changed[:, :9] = ids[:, :9]
        assert difference(model(changed, use_cache=False, **neighbors).logits[:, :9], logits[:, :9]) < TOLERANCE
        neighbors["neighbor_input_ids"][:, 1] = (neighbors["neighbor_input_ids"][:, 1] + 40) % (VOCAB_SIZE - 3) + 3
        other = model(ids, use_cache=False, **neighbors).logits
        assert difference(other[:, :7], logits[:, :7]) < TOLERANCE
        assert not torch.equal(other[:, 7], logits[:, 7])
        settings = {"max_new_tokens": 11, "use_cache": True, "return_dict_in_generate": True, "output_logits": True}
        generated = model.generate(ids[:, :6], retriever=hash_retriever(), **settings, **GREEDY)
        tokens = generated.sequences[:, :-1]
        full = model(tokens, use_cache=False, **neighbors_from(hash_retriever(), tokens)).logits
        assert difference(torch.stack(generated.logits, dim=1), full[:, 5:]) < TOLERANCE


def test_at_least_forty_families_read():
    assert len(set(READ) & set(FAMILIES)) >= 40
