"""How much of the frozen encoder's own speed a build gets: keys of real chunks, with all that is around the forward pass.

    python benchmarks/embedding.py                # about seven minutes on one core
    python benchmarks/embedding.py --chunks 1000  # a quick look

`encoder` is the forward pass alone: the same texts, tokenized beforehand, in batches sorted by length, pooled to vectors.
`build` is the stage of a build: read a block, decode its chunks to text, tokenize them for the encoder, embed, write the
keys. `unsorted` is the encoder on batches in the order of the text: what sorting is worth. They take turns; CPU time of
one thread. Writes benchmarks/results/embedding.json.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from demo_data import load_corpus, minilm_path  # noqa: E402

from retro_hf import ChunkEmbedder  # noqa: E402
from retro_hf.datastore.chunks import chunk_texts  # noqa: E402
from retro_hf.datastore.documents import DocumentReader  # noqa: E402
from retro_hf.datastore.stages import Block, EmbedBlock, TokenizeBlock, batches, read_token_block  # noqa: E402


CHUNK, BATCH = 64, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/embedding.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        Path(__file__).parent.parent / "hub_configs" / "retro-bible"
    )
    embedder = ChunkEmbedder.from_pretrained(minilm_path())

    times: dict[str, list[float]] = {"encoder": [], "build": [], "unsorted": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenize = TokenizeBlock(folder, tokenizer, CHUNK, np.dtype(np.uint16))
        embed = EmbedBlock(folder, tokenizer, embedder, CHUNK, BATCH)
        blocks, num_chunks = [], 0
        for number, documents in enumerate(batches(iter(DocumentReader(load_corpus("bible"))))):
            blocks.append(Block(number, str(number)))
            tokenize(blocks[-1], documents)
            num_chunks += len(read_token_block(folder, blocks[-1]).tokens) // CHUNK
            if num_chunks >= args.chunks:
                break
        rows = np.concatenate([read_token_block(folder, block).tokens.reshape(-1, CHUNK) for block in blocks])
        encoder = embedder._model
        options = {"truncation": True, "max_length": encoder.max_seq_length, "return_attention_mask": False}
        encoded = encoder.tokenizer(chunk_texts(tokenizer, rows, rows != 0), **options)["input_ids"]
        ordered = sorted(encoded, key=len, reverse=True)

        @torch.inference_mode()
        def forward(ids: list[list[int]]) -> None:
            for start in range(0, len(ids), BATCH):
                pooled = encoder._forward(ids[start : start + BATCH])
                pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

        def build() -> None:
            for block in blocks:
                embed.output(block).unlink(missing_ok=True)
                embed(block)

        for _ in range(args.rounds):
            for who, work in (
                ("encoder", lambda: forward(ordered)),
                ("build", build),
                ("unsorted", lambda: forward(encoded)),
            ):
                begin = time.process_time()
                work()
                times[who].append(time.process_time() - begin)

    rates = {who: [len(rows) / seconds for seconds in values] for who, values in times.items()}
    print(f"{len(rows):,} chunks of {CHUNK} tokens, {embedder.dtype}, {args.threads} thread(s): chunks per CPU-second")
    for who, values in rates.items():
        share = statistics.median(values) / statistics.median(rates["encoder"])
        print(
            f"  {who:<9} {statistics.median(values):7.1f} [{min(values):.1f}, {max(values):.1f}]  {share:.1%} of the encoder"
        )
    record = {
        "command": " ".join(["python", *sys.argv]),
        "chunks": len(rows),
        "dtype": str(embedder.dtype),
        "chunks_per_core_second": rates,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} thread(s) of {os.cpu_count()}",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
