"""Train the demo's model from scratch: a small RETRO on three Bible translations, with plain `transformers.Trainer`.

    make demo-train        # or: python examples/train_demo.py --output hub_configs/retro-bible

It takes about half an hour on one core that has bfloat16 instructions. The model is trained on 48 books in three translations; it never
sees 18 others. Neighbors come from a datastore of the same text, but never from a chunk's own document. So most of them are the same
passage in other words. Some chunks get random neighbors and some none, so that the model neither trusts bad neighbors nor depends on good ones.
A stopped run resumes from its last checkpoint.

The results of the shipped checkpoint are in `hub_configs/retro-bible/README.md`.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from demo_data import load_corpus, minilm_path, split, train_tokenizer
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from retro_hf import (
    ChunkEmbedder,
    RetroConfig,
    RetroDataCollator,
    RetroDatastore,
    RetroDecoderConfig,
    RetroEncoderConfig,
    RetroForCausalLM,
    RetroRetriever,
    precompute_neighbors,
)
from retro_hf.evaluation import bits_per_byte
from retro_hf.training import tokenize_documents


CHUNK, WINDOW, NEIGHBORS, NEIGHBOR_SIZE = 32, 512, 2, 128


def demo_config(vocab_size: int, pad: int, bos: int, eos: int) -> RetroConfig:
    """A RETRO of 6.2 million parameters: the paper's decoder at width 256, CCA in two of its five layers.

    Weights start at 1 / sqrt(width): at the usual 0.02 so narrow a model is slow to tell one neighbor token from another.
    """
    scale = 256**-0.5
    decoder = RetroDecoderConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        head_dim=64,
        initializer_range=scale,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    encoder = RetroEncoderConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=64,
        initializer_range=scale,
    )
    return RetroConfig(
        text_config=decoder,
        neighbor_encoder_config=encoder,
        chunk_size=CHUNK,
        num_neighbors=NEIGHBORS,
        neighbor_size=NEIGHBOR_SIZE,
        cross_attention_layers=[1, 3],
        share_embeddings=True,
        initializer_range=scale,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )


def open_datastore(path: Path, documents: list[dict], tokenizer, embedder: ChunkEmbedder) -> RetroDatastore:
    """The datastore at `path`, built there first if there is none."""
    if path.exists():
        return RetroDatastore.load(path)
    sizes = {"chunk_size": CHUNK, "neighbor_size": NEIGHBOR_SIZE}
    return RetroDatastore.build(documents, path, tokenizer=tokenizer, embedder=embedder, **sizes)


def train_on(trainer: Trainer) -> None:
    """Train from the last checkpoint on; a finished run is only loaded, since `Trainer` would take one more step."""
    folder = Path(trainer.args.output_dir)
    last = get_last_checkpoint(folder) if folder.exists() else None
    if last is not None:
        state = TrainerState.load_from_json(str(Path(last) / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:
            print(f"{last} is finished; remove it to train again.")
            trainer.model.load_state_dict(RetroForCausalLM.from_pretrained(last).state_dict())
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=last)


def main() -> None:
    """Train, measure on the validation books, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output/retro-bible"), help="folder of the model")
    parser.add_argument("--work", type=Path, default=Path("demo_output/train"), help="datastores and checkpoints")
    parser.add_argument("--max-steps", type=int, default=800, help="steps of 16 passages")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16 (faster on CPUs that have it)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(args.seed)

    parts = split(load_corpus("bible"), "validation")
    tokenizer = train_tokenizer(parts.train)
    embedder = ChunkEmbedder.from_pretrained(minilm_path())
    args.work.mkdir(parents=True, exist_ok=True)
    train_store = open_datastore(args.work / "train_store", parts.train, tokenizer, embedder)
    validation_store = open_datastore(args.work / "validation_store", parts.store, tokenizer, embedder)

    windows = tokenize_documents(
        Dataset.from_list(parts.train), tokenizer, max_length=WINDOW, chunk_size=CHUNK, add_bos=False, add_eos=False
    )
    windows = precompute_neighbors(windows, train_store, num_neighbors=NEIGHBORS, tokenizer=tokenizer)

    config = demo_config(len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    model = RetroForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(windows):,} windows")
    collator = RetroDataCollator(
        tokenizer, train_store, random_neighbor_probability=0.15, no_neighbor_probability=0.15, seed=args.seed
    )
    training = TrainingArguments(
        output_dir=str(args.work / "checkpoints"),
        max_steps=args.max_steps,
        per_device_train_batch_size=16,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=100,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length",
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        save_steps=200,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to=[],
        seed=args.seed,
    )
    trainer = Trainer(model=model, args=training, train_dataset=windows, data_collator=collator)
    train_on(trainer)
    seconds = time.perf_counter() - start

    retriever = RetroRetriever(validation_store, embedder=embedder, num_neighbors=NEIGHBORS)
    result = bits_per_byte(model, parts.heldout, tokenizer, retriever=retriever, window=WINDOW)
    print(result)

    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "seed": args.seed,
        "seconds": round(seconds),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "log": trainer.state.log_history,
        "validation": result.to_dict(),
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
