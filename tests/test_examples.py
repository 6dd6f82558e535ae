"""The examples: a real checkpoint as a user retrofits it (`make test-slow`), and going on with a broken-off training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_questions import make_questions
from tiny_training import make_model, make_trainer, make_world
from transformers import AutoConfig


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
def test_a_real_checkpoint_is_retrofitted(tmp_path):
    """SmolLM2-135M: off and the first step equal the base bit for bit; full and adapter-only saves load again."""
    command = [sys.executable, "retrofit_smollm2.py", "--output", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "off = base, bit for bit: True" in done.stdout
    assert "on = base before training, bit for bit: True" in done.stdout
    assert done.stdout.count("loads again with the same weights: True") == 2


@pytest.mark.slow
@pytest.mark.weights
def test_the_shipped_adapter_reads_what_its_base_does_not_know():
    """SmolLM2 with `hub_configs/retro-smollm2-135m` writes the plagues of its datastore on; off it goes its own way."""
    command = [sys.executable, "examples/generate_smollm2.py"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=EXAMPLES.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    off, on, *read = done.stdout.splitlines()
    assert on.startswith("on: … and come into your house, and into your bedchamber, and on your bed")
    assert off.startswith("off: …") and "bedchamber" not in off
    assert len(read) == 3 and all("exodus_8_kjv.txt" in line for line in read)


def test_finished_training_is_loaded_and_interrupted_training_resumes(tmp_path, monkeypatch):
    """`Trainer` alone would take one more step after the last."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from train_demo import train_on

    world = make_world(tmp_path)

    def run(seed: int, max_steps: int):
        settings = {"max_steps": max_steps, "save_strategy": "steps", "save_steps": 2}
        trainer, losses = make_trainer(make_model(seed), world, tmp_path / "run", **settings)
        train_on(trainer)
        return trainer, list(losses.values)

    first, steps = run(seed=0, max_steps=2)
    assert steps == [1, 2]
    again, steps = run(seed=1, max_steps=2)
    assert steps == [] and again.state.global_step == 2 and len(again.state.log_history) == 2
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    longer, steps = run(seed=1, max_steps=3)
    assert steps == [3] and longer.state.global_step == 3


def test_a_model_is_finetuned_on_questions_from_files(tmp_path, monkeypatch, capsys):
    """Passages from the file in training, looked up in a datastore for the held-out questions; flags as in transformers."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from finetune_qa import main

    world = make_world(tmp_path)
    make_model(scale=0.2).save_pretrained(tmp_path / "model")
    world.tokenizer.save_pretrained(tmp_path / "model")
    questions = make_questions(6)
    questions.to_json(tmp_path / "train.jsonl")
    questions.remove_columns("passages").to_json(tmp_path / "validation.jsonl")
    flags = f"""
        --model_name_or_path {tmp_path}/model --train_file {tmp_path}/train.jsonl
        --validation_file {tmp_path}/validation.jsonl --store {tmp_path}/store --embedder {tmp_path}/encoder
        --num_passages 2 --passages_in_prompt 1 --max_train_questions 5 --max_new_tokens 4
        --output_dir {tmp_path}/out --do_train --do_eval --max_steps 2 --per_device_eval_batch_size 4
        --eval_strategy steps --eval_steps 1 --report_to none --use_cpu --disable_tqdm true
    """
    main(flags.split())
    printed = capsys.readouterr().out
    assert "6 questions, 2 passages per question" in printed and "eval_exact_match" in printed, printed
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["exact_match"].keys() == {"on", "off", "random"} and result["num_questions"] == 6
    assert (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / "checkpoint-2").is_dir()

    # What was saved answers the same, without training.
    evaluate = f"--model_name_or_path {tmp_path}/out --do_train false --eval_strategy no --output_dir {tmp_path}/again"
    main([*flags.split(), *evaluate.split()])
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == result


def test_a_file_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    """Without a traceback, as the command line does."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from finetune_qa import main

    make_model(scale=0.2).save_pretrained(tmp_path / "model")
    make_world(tmp_path).tokenizer.save_pretrained(tmp_path / "model")
    flags = f"--model_name_or_path {tmp_path}/model --output_dir {tmp_path}/out --use_cpu --train_file none.jsonl"
    with pytest.raises(SystemExit, match=r"^FileNotFoundError: .*none.jsonl[^\n]*$"):
        main(flags.split())


def test_the_shipped_config_is_what_the_training_makes(monkeypatch):
    """So the card and the config say what the demo's datastore holds, neighbors of 128 tokens among it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from train_demo import demo_config

    shipped = AutoConfig.from_pretrained(EXAMPLES.parent / "hub_configs" / "retro-bible")
    made = demo_config(shipped.vocab_size, shipped.pad_token_id, shipped.bos_token_id, shipped.eos_token_id)
    written_by_saving = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    for one, other in (
        (shipped, made),
        (shipped.text_config, made.text_config),
        (shipped.neighbor_encoder_config, made.neighbor_encoder_config),
    ):
        fields = {name for name, value in one.to_dict().items() if not isinstance(value, dict)} - written_by_saving
        assert {name: getattr(one, name) for name in fields} == {name: getattr(other, name) for name in fields}
    assert shipped.neighbor_size == 128
