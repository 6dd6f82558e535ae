"""What transformers' `GenerationTesterMixin` checks, which its source distribution lacks, as checks of our own.

The reference of greedy decoding is one full forward pass per token without a cache; everything else that must give the same
tokens is compared with it.
"""

import copy
import inspect
import tempfile
from collections.abc import Iterator
from threading import Thread

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    WatermarkingConfig,
)
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from retro_hf.model.compatibility_retro import CACHE_NAME

from ..tiny import random_ids, randomize, tiny_backbone
from .targets import CHUNK_SIZE


PROMPT_LENGTH, NUM_NEW = 8, 7  # with chunks of three tokens, the steps complete two more
LENGTHS = (PROMPT_LENGTH, PROMPT_LENGTH - 3)  # of the rows of a ragged batch


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per printable character, after the special tokens 0, 1 and 2: 99 in all."""
    alphabet = ["<pad>", "<bos>", "<eos>", "é", *map(chr, range(ord(" "), ord("~") + 1))]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=128,
        chat_template="{% for message in messages %}{{ message.content }} {% endfor %}",
    )


class GenerationTesterMixin:
    """Checks of `generate` for the target of a suite."""

    def _model(self) -> PreTrainedModel:
        """The model, random in every weight, which generates until it is stopped."""
        model = randomize(self.target.causal_lm_class(self.target.config()), scale=0.3).eval()
        model.generation_config.eos_token_id = None
        return model

    def _prompt(self) -> dict[str, torch.Tensor]:
        """Two rows of different lengths, padded on the left."""
        mask = torch.stack([(torch.arange(PROMPT_LENGTH) >= PROMPT_LENGTH - length).long() for length in LENGTHS])
        ids = random_ids(len(LENGTHS), PROMPT_LENGTH)
        return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}

    def _generate(self, model: PreTrainedModel, **kwargs) -> torch.Tensor:
        inputs = {"max_new_tokens": NUM_NEW, "do_sample": False, **self._prompt(), **kwargs}
        return model.generate(**inputs)

    def _greedy_reference(self, model: PreTrainedModel, num_new: int = NUM_NEW) -> torch.Tensor:
        """The tokens that full forward passes choose, row by row and without padding."""
        rows = []
        for ids, length in zip(self._prompt()["input_ids"], LENGTHS, strict=True):
            row = ids[None, -length:]
            # `generate` counts the chunks so that the prompt ends one.
            aligned = {} if getattr(model, "retriever", None) is None else {"chunk_offset": -length % CHUNK_SIZE}
            for _ in range(num_new):
                with torch.no_grad():
                    logits = model(row, use_cache=False, **aligned).logits
                row = torch.cat([row, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            rows.append(row[0, length:])
        return torch.stack(rows)

    def _steps(self) -> Iterator[tuple[int, int, int]]:
        """Of every forward pass of `generate` with a cache: its number, new tokens, and tokens seen after it."""
        for step in range(NUM_NEW):
            yield step, PROMPT_LENGTH if step == 0 else 1, PROMPT_LENGTH + step

    # ── greedy search and its outputs ─────────────────────────────────────────────────────────────────────────────────

    def test_inherits_generation_mixin(self):
        self.assertTrue(issubclass(self.target.causal_lm_class, GenerationMixin))

    def test_retrieval_matters(self):
        model = self._model()
        found = self._generate(model)
        if self.target.is_retro:
            self.assertEqual(torch.equal(found, self._generate(model, retriever=None)), not self.target.is_live)

    def test_greedy_generate(self):
        model = self._model()
        expected = self._greedy_reference(model)
        for use_cache in (True, False):
            found = self._generate(model, use_cache=use_cache)
            self.assertEqual(tuple(found.shape), (2, PROMPT_LENGTH + NUM_NEW))
            torch.testing.assert_close(found[:, :PROMPT_LENGTH], self._prompt()["input_ids"], rtol=0, atol=0)
            torch.testing.assert_close(found[:, PROMPT_LENGTH:], expected, rtol=0, atol=0)

    def test_greedy_generate_dict_outputs(self):
        model = self._model()
        model.set_attn_implementation("eager")
        options = dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), True)
        outputs = self._generate(model, return_dict_in_generate=True, **options)
        self.assertIsInstance(outputs, GenerateDecoderOnlyOutput)
        heads, width = self.model_tester.num_attention_heads, self.model_tester.hidden_size
        layers = self.model_tester.num_hidden_layers
        for name in ("scores", "logits", "attentions", "hidden_states"):
            self.assertEqual(len(outputs[name]), NUM_NEW, name)
        for step, queries, keys in self._steps():
            self.assertEqual(tuple(outputs.scores[step].shape), (2, model.config.vocab_size))
            self.assertEqual(tuple(outputs.logits[step].shape), (2, model.config.vocab_size))
            self.assertEqual(len(outputs.attentions[step]), layers)
            self.assertEqual(len(outputs.hidden_states[step]), layers + 1)
            for attention in outputs.attentions[step]:
                self.assertEqual(tuple(attention.shape[:3]), (2, heads, queries))
                self.assertLessEqual(attention.shape[3], keys)  # less in a sliding window
            for hidden_states in outputs.hidden_states[step]:
                self.assertEqual(tuple(hidden_states.shape), (2, queries, width))
        chosen = torch.stack([scores.argmax(-1) for scores in outputs.scores], dim=1)
        torch.testing.assert_close(outputs.sequences[:, PROMPT_LENGTH:], chosen, rtol=0, atol=0)

    def test_past_key_values_format(self):
        model = self._model()
        cache = self._generate(model, return_dict_in_generate=True)[CACHE_NAME]
        self.assertEqual(len(cache), self.model_tester.num_hidden_layers)
        self.assertEqual(cache.get_seq_length(), PROMPT_LENGTH + NUM_NEW - 1)
        for layer in cache.layers:
            self.assertEqual(layer.keys.shape, layer.values.shape)
            self.assertEqual(layer.keys.shape[0], 2)

    def test_generate_without_a_prompt(self):
        found = self._model().generate(max_new_tokens=NUM_NEW, do_sample=False)
        self.assertEqual(tuple(found.shape), (1, 1 + NUM_NEW))
        self.assertEqual(int(found[0, 0]), 1)  # the token that begins a text

    def test_max_and_min_length(self):
        model = self._model()
        model.generation_config.eos_token_id = [2]
        for options, expected in (
            ({"max_new_tokens": None, "max_length": PROMPT_LENGTH + 2}, 2),
            ({"max_new_tokens": 4, "min_new_tokens": 4}, 4),
        ):
            found = self._generate(model, **options)[:, PROMPT_LENGTH:]
            self.assertEqual(found.shape[1], expected)
            self.assertFalse((found[:, :-1] == 2).any() and "min_new_tokens" in options)

    # ── sampling and beams ────────────────────────────────────────────────────────────────────────────────────────────

    def test_sample_generate(self):
        model = self._model()
        found = []
        for use_cache in (True, False, True):
            torch.manual_seed(3)
            found.append(self._generate(model, do_sample=True, num_return_sequences=3, use_cache=use_cache, top_k=20))
        self.assertEqual(tuple(found[0].shape), (6, PROMPT_LENGTH + NUM_NEW))
        torch.testing.assert_close(found[0], found[2], rtol=0, atol=0)
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
        self.assertGreater(len({tuple(row.tolist()) for row in found[0]}), 2)

    def test_sample_generate_dict_output(self):
        outputs = self._generate(
            self._model(), do_sample=True, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
        )
        self.assertIsInstance(outputs, GenerateDecoderOnlyOutput)
        self.assertEqual([tuple(scores.shape) for scores in outputs.scores], [(4, 99)] * NUM_NEW)

    def test_beam_search_generate(self):
        model = self._model()
        for options in ({}, {"length_penalty": 2.0, "early_stopping": True}):
            found = self._generate(model, num_beams=3, num_return_sequences=2, **options)
            without = self._generate(model, num_beams=3, num_return_sequences=2, use_cache=False, **options)
            self.assertEqual(tuple(found.shape), (4, PROMPT_LENGTH + NUM_NEW))
            torch.testing.assert_close(found, without, rtol=0, atol=0)

    def test_beam_search_generate_dict_output(self):
        model = self._model()
        model.set_attn_implementation("eager")
        options = dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores"), True)
        for do_sample in (False, True):
            outputs = self._generate(
                model,
                num_beams=3,
                num_return_sequences=2,
                do_sample=do_sample,
                return_dict_in_generate=True,
                **options,
            )
            self.assertIsInstance(outputs, GenerateBeamDecoderOnlyOutput)
            self.assertEqual(tuple(outputs.sequences_scores.shape), (4,))
            self.assertEqual(tuple(outputs.beam_indices.shape[:1]), (4,))
            for step, queries, _ in self._steps():
                self.assertEqual(tuple(outputs.scores[step].shape), (6, 99))
                for hidden_states in outputs.hidden_states[step]:
                    self.assertEqual(tuple(hidden_states.shape), (6, queries, self.model_tester.hidden_size))
            transition = model.compute_transition_scores(outputs.sequences, outputs.scores, outputs.beam_indices)
            if not do_sample:
                lengths = (transition < 0).sum(dim=1)
                torch.testing.assert_close(transition.sum(1) / lengths, outputs.sequences_scores, rtol=1e-3, atol=1e-4)

    # ── decoding with an assistant ────────────────────────────────────────────────────────────────────────────────────

    def _one_row(self) -> dict[str, torch.Tensor]:
        return {name: tensor[:1] for name, tensor in self._prompt().items()}

    def test_prompt_lookup_decoding_matches_greedy_search(self):
        model = self._model()
        repeated = {"input_ids": random_ids(1, 3).repeat(1, 3), "attention_mask": None}
        expected = self._generate(model, **repeated)
        for num_tokens in (1, 3):  # the retrieval state can take back one chunk
            found = self._generate(model, prompt_lookup_num_tokens=num_tokens, **repeated)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_assisted_decoding_matches_greedy_search(self):
        model = self._model()
        expected = self._generate(model, **self._one_row())
        for assistant in (copy.deepcopy(model), tiny_backbone("llama")):
            assistant.generation_config.num_assistant_tokens = 3
            assistant.generation_config.eos_token_id = None
            found = self._generate(model, assistant_model=assistant, **self._one_row())
            torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_assisted_decoding_sample(self):
        model = self._model()
        outputs = self._generate(
            model,
            assistant_model=copy.deepcopy(model),
            do_sample=True,
            return_dict_in_generate=True,
            output_scores=True,
            **self._one_row(),
        )
        self.assertEqual(outputs.sequences.shape[1] - PROMPT_LENGTH, len(outputs.scores))

    def test_early_exit_matches_greedy_search(self):
        model, options = self._model(), {"assistant_early_exit": 1, "num_assistant_tokens": 2, **self._one_row()}
        if self.target.is_retro:
            with self.assertRaises(NotImplementedError):
                self._generate(model, **options)
        else:
            expected = self._generate(model, **self._one_row())
            torch.testing.assert_close(self._generate(model, **options), expected, rtol=0, atol=0)

    # ── padding, positions and masks ──────────────────────────────────────────────────────────────────────────────────

    def test_left_padding_compatibility(self):
        model, prompt = self._model(), self._prompt()
        if "position_ids" in inspect.signature(model.forward).parameters:
            prompt["position_ids"] = (prompt["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # as `generate` does
        with torch.no_grad():
            together = model(**prompt).logits
            for row, length in enumerate(LENGTHS):
                alone = model(prompt["input_ids"][row : row + 1, -length:]).logits
                torch.testing.assert_close(together[row, -length:], alone[0], rtol=1e-4, atol=1e-4)

    def test_generate_with_and_without_position_ids(self):
        model = self._model()
        ids = random_ids(2, PROMPT_LENGTH)
        given = torch.arange(PROMPT_LENGTH).expand(2, -1)
        expected = self._generate(model, input_ids=ids, attention_mask=None)
        found = self._generate(model, input_ids=ids, attention_mask=None, position_ids=given)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_forward_with_logits_to_keep(self):
        model, prompt = self._model(), self._prompt()
        with torch.no_grad():
            every = model(**prompt).logits
            for wanted, expected in ((1, every[:, -1:]), (3, every[:, -3:]), (torch.tensor([0, 5]), every[:, [0, 5]])):
                torch.testing.assert_close(model(**prompt, logits_to_keep=wanted).logits, expected)

    def test_generate_with_logits_to_keep(self):
        model = self._model()
        for options in ({}, {"num_beams": 2}):
            found = self._generate(model, logits_to_keep=0, **options)
            torch.testing.assert_close(found, self._generate(model, **options), rtol=0, atol=0)

    def test_custom_4d_attention_mask(self):
        """Two endings of one text in one row: a mask keeps them apart, and both have the same positions."""
        model = self._model()
        stem, endings = random_ids(1, 4), random_ids(2, 2, seed=5)
        with torch.no_grad():
            expected = [model(torch.cat([stem, end[None]], dim=1)).logits[0, -2:] for end in endings]
            allowed = torch.ones(8, 8, dtype=torch.bool).tril()
            allowed[6:, 4:6] = False
            found = model(
                torch.cat([stem, endings.view(1, -1)], dim=1),
                attention_mask=allowed[None, None],
                position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5]]),
            ).logits[0, -4:]
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)

    # ── inputs_embeds ─────────────────────────────────────────────────────────────────────────────────────────────────

    def test_generate_from_inputs_embeds(self):
        model, prompt = self._model(), self._prompt()
        embeds = model.get_input_embeddings()(prompt["input_ids"])
        for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            expected = self._generate(model, **options)[:, PROMPT_LENGTH:]
            found = self._generate(model, input_ids=None, inputs_embeds=embeds, **options)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            both = self._generate(model, inputs_embeds=embeds, **options)
            torch.testing.assert_close(both[:, PROMPT_LENGTH:], expected, rtol=0, atol=0)

    def test_generate_from_random_inputs_embeds(self):
        model, prompt = self._model(), self._prompt()
        embeds = model.get_input_embeddings()(prompt["input_ids"])
        other = self._generate(model, input_ids=None, inputs_embeds=torch.randn_like(embeds))
        self.assertFalse(torch.equal(other, self._generate(model, input_ids=None, inputs_embeds=embeds)))

    # ── caches ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def test_generate_continues_from_past_key_values(self):
        model = self._model()
        expected = self._generate(model)
        first = self._generate(model, max_new_tokens=3, return_dict_in_generate=True)
        mask = torch.cat([self._prompt()["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
        found = self._generate(
            model,
            input_ids=first.sequences,
            attention_mask=mask,
            max_new_tokens=NUM_NEW - 3,
            **{CACHE_NAME: first[CACHE_NAME]},
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_generate_with_other_caches(self):
        model = self._model()
        for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
            expected = self._generate(model, **options)
            for name in ("static", *(("offloaded", "offloaded_static") if torch.cuda.is_available() else ())):
                with self.subTest(name=name, **options):
                    found = self._generate(model, cache_implementation=name, **options)
                    torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_generate_with_a_given_cache(self):
        model = self._model()
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        found = self._generate(model, **{CACHE_NAME: cache})
        torch.testing.assert_close(found, self._generate(model), rtol=0, atol=0)
        self.assertEqual(cache.get_seq_length(), PROMPT_LENGTH + NUM_NEW - 1)

    def test_chunked_prefill(self):
        model = self._model()
        expected = self._generate(model)
        for size in (2, 5):
            found = self._generate(model, prefill_chunk_size=size)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def _next_logits(self, model: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids, **{CACHE_NAME: cache}).logits

    def _filled(self, model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self._next_logits(model, cache, ids)
        return cache

    def test_cache_reorders_repeats_and_selects(self):
        model, ids, more = self._model(), random_ids(3, 7), random_ids(3, 3, seed=4)
        expected = self._next_logits(model, self._filled(model, ids), more)
        order = torch.tensor([2, 0, 0])
        cache = self._filled(model, ids)
        cache.reorder_cache(order)
        torch.testing.assert_close(self._next_logits(model, cache, more[order]), expected[order])
        cache = self._filled(model, ids)
        cache.batch_repeat_interleave(2)
        twice = expected.repeat_interleave(2, dim=0)
        torch.testing.assert_close(self._next_logits(model, cache, more.repeat_interleave(2, dim=0)), twice)
        cache = self._filled(model, ids)
        cache.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(self._next_logits(model, cache, more[1:2]), expected[1:2])

    def test_cache_is_cropped(self):
        model, ids, more = self._model(), random_ids(2, 7), random_ids(2, 3, seed=4)
        expected = self._next_logits(model, self._filled(model, ids[:, :5]), more)
        cache = self._filled(model, ids)
        cache.crop(-2)
        torch.testing.assert_close(self._next_logits(model, cache, more), expected, rtol=1e-4, atol=1e-4)

    # ── stopping, processors, streaming ───────────────────────────────────────────────────────────────────────────────

    def test_rows_stop_at_eos(self):
        model = self._model()
        free = self._generate(model)
        stop = int(free[0, PROMPT_LENGTH + 2])
        found = self._generate(model, eos_token_id=stop, pad_token_id=0)
        for row, whole in zip(found.tolist(), free.tolist(), strict=True):
            end = whole.index(stop, PROMPT_LENGTH) + 1 if stop in whole[PROMPT_LENGTH:] else len(whole)
            self.assertEqual(row[:end], whole[: len(row)][:end])
            self.assertEqual(set(row[end:]) - {0}, set())

    def test_stopping_criteria(self):
        class AfterTwo(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((len(input_ids),), input_ids.shape[1] >= PROMPT_LENGTH + 2)

        model = self._model()
        found = self._generate(model, stopping_criteria=StoppingCriteriaList([AfterTwo()]))
        torch.testing.assert_close(found, self._generate(model)[:, : PROMPT_LENGTH + 2], rtol=0, atol=0)
        character = tiny_tokenizer().decode(found[0, -1])
        stopped = self._generate(model, stop_strings=[character], tokenizer=tiny_tokenizer(), **self._one_row())
        self.assertLess(stopped.shape[1], PROMPT_LENGTH + NUM_NEW)
        self.assertEqual(stopped[0, -1], found[0, -1])

    def test_logits_processors(self):
        model = self._model()
        free = self._generate(model)[:, PROMPT_LENGTH:]
        bad = free.unique().tolist()
        found = self._generate(model, bad_words_ids=[[token] for token in bad])[:, PROMPT_LENGTH:]
        self.assertEqual(set(found.unique().tolist()) & set(bad), set())
        found = self._generate(model, suppress_tokens=bad)[:, PROMPT_LENGTH:]
        self.assertEqual(set(found.unique().tolist()) & set(bad), set())
        found = self._generate(model, no_repeat_ngram_size=1, attention_mask=None)
        self.assertTrue(all(len(set(row)) == NUM_NEW for row in found[:, PROMPT_LENGTH:].tolist()))
        self.assertEqual(self._generate(model, forced_eos_token_id=5)[:, -1].tolist(), [5, 5])
        found = self._generate(model, sequence_bias=[[[7], 1e4]])[:, PROMPT_LENGTH:]
        self.assertEqual(found.unique().tolist(), [7])
        for options in ({"repetition_penalty": 1.3}, {"typical_p": 0.9, "do_sample": True}, {"guidance_scale": 1.5}):
            self.assertEqual(self._generate(model, **options).shape[1], PROMPT_LENGTH + NUM_NEW)

    def test_custom_logits_processor(self):
        class OnlyNine(LogitsProcessor):
            def __call__(self, input_ids, scores):
                return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([9]), 0.0)

        found = self._generate(self._model(), logits_processor=LogitsProcessorList([OnlyNine()]))
        self.assertEqual(found[:, PROMPT_LENGTH:].unique().tolist(), [9])

    def test_watermarking(self):
        model = self._model()
        for num_beams in (1, 2):
            marked = self._generate(model, watermarking_config=WatermarkingConfig(bias=20.0), num_beams=num_beams)
            self.assertFalse(torch.equal(marked, self._generate(model, num_beams=num_beams)))

    def test_streamer(self):
        model, tokenizer = self._model(), tiny_tokenizer()
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        inputs = {**self._one_row(), "max_new_tokens": NUM_NEW, "do_sample": False, "streamer": streamer}
        thread = Thread(target=model.generate, kwargs=inputs)
        thread.start()
        text = "".join(streamer)
        thread.join()
        expected = self._generate(model, **self._one_row())[0, PROMPT_LENGTH:]
        self.assertEqual(text, tokenizer.decode(expected))

    def test_custom_generate(self):
        def last_token_again(model, input_ids, **kwargs):
            return torch.cat([input_ids, input_ids[:, -1:]], dim=1)

        found = self._generate(self._model(), custom_generate=last_token_again)
        self.assertEqual(tuple(found.shape), (2, PROMPT_LENGTH + 1))

    # ── configuration ─────────────────────────────────────────────────────────────────────────────────────────────────

    def test_generation_config_is_saved_and_used(self):
        model = self._model()
        model.generation_config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = self.target.causal_lm_class.from_pretrained(folder)
        self.assertEqual(loaded.generation_config.max_new_tokens, 2)
        found = loaded.generate(**self._prompt())
        torch.testing.assert_close(found, self._generate(model)[:, : PROMPT_LENGTH + 2], rtol=0, atol=0)
        self.assertEqual(loaded.generate(**self._prompt(), max_new_tokens=1).shape[1], PROMPT_LENGTH + 1)

    def test_prepare_inputs_for_generation_forwards_arguments(self):
        prepared = self._model().prepare_inputs_for_generation(
            self._prompt()["input_ids"], attention_mask=self._prompt()["attention_mask"], use_cache=True, anything=9
        )
        self.assertEqual(prepared["anything"], 9)
        self.assertIn("input_ids", prepared)

    def test_unknown_arguments_are_refused(self):
        with self.assertRaises(ValueError):
            self._generate(self._model(), unknown_argument=1)
