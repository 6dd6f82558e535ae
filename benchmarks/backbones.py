"""Tries RETRO on every causal language model of transformers and writes docs/backbones.md.

    python benchmarks/backbones.py                   # all that benchmarks/results/backbones.json does not have yet
    python benchmarks/backbones.py llama gpt2        # these again
    python benchmarks/backbones.py --page            # only the page, from the results

A family is built from its default config with every size made small (`tests/zoo.py`) and random weights, retrofitted,
and checked; what is checked stands on the page. Each runs in a process of its own, with a time limit. A family that
refuses cross-attention after its attention, and says that it can go after the layer, is tried there.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from textwrap import shorten


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "backbones.json"
PAGE = ROOT / "docs" / "backbones.md"


def try_family(family: str) -> dict:
    """One row of the results, in this process."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from retro_hf.errors import UnsupportedBackboneError
    from tests.zoo import BaseFails, NotBuilt, check_family

    row = {"class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family], "works": False, "status": "refused", "reason": ""}
    for placement in ("after_attention", "after_layer"):
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = check_family(family, Path(folder), placement)
        except UnsupportedBackboneError as error:
            row["reason"] = row["reason"] or str(error)
            if "after_layer" not in str(error):
                break
        except NotBuilt as error:
            return row | {"status": "not built", "reason": shorten(str(error), 200, placeholder=" …")}
        except BaseFails as error:
            return row | {"status": "base", "placement": placement, "reason": str(error)}
        except Exception as error:
            return row | {"status": "fails", "placement": placement, "reason": f"{type(error).__name__}: {error}"}
        else:
            row |= {"works": True, "status": "works", "placement": placement}
            return row | {"where": found["check_placement"], "rollback": found["check_rollback"]}
    return row


def run(family: str, limit: float) -> dict:
    """One row of the results, from a forked process that has `limit` seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work(sender: Connection) -> None:
        warnings.simplefilter("ignore")
        sender.send(try_family(family))

    start = time.perf_counter()
    process = context.Process(target=work, args=(sender,))
    process.start()
    sender.close()
    row = {"works": False, "status": "fails"}
    try:
        row = receiver.recv() if receiver.poll(limit) else row | {"reason": f"did not end within {limit:.0f} s"}
    except EOFError:
        row |= {"reason": "the process died"}
    process.kill()
    process.join()
    return row | {"seconds": round(time.perf_counter() - start, 1)}


CHECKS = """\
This page is about the paper's reader. The reader without training has [its own page](readers.md).

**Is your family missing?** It works if it follows the conventions of transformers. If it does not, `retrofit` raises an error that
says what it looked for, and how to name the layers yourself.

**How the families were tried.** Each one was built from its default config, with small sizes and random weights, in float32 on a
CPU. Families such as BERT, which are causal only on request, were made causal. A family *works* if all of this is true:

| | |
|---|---|
| off | without neighbors, logits and loss equal those of the base, bit for bit |
| before training | with neighbors, logits and generated tokens equal those of the base, bit for bit |
| placement | cross-attention reads the residual stream at the end of the attention branch, and adds to it there and nowhere else. The table says where; *beside* means that another module of the layer reads the same input in parallel |
| causality | no token changes an earlier one, and no neighbor changes a token before the end of its chunk |
| padding | a row that is padded on the right or on the left has the logits of the row alone |
| cache | generation with a cache equals full passes, also across chunk borders |
| taking tokens back | prompt lookup, which takes tokens back, generates the same tokens; or it is refused, if the base refuses it, too |
| training | every parameter of RETRO is trained, and none of the base |
| saving | the model loads as it was saved, in full and without the base |

The checks are in [`tests/zoo.py`](../tests/zoo.py), and the results and all messages in
[`backbones.json`](../benchmarks/results/backbones.json). `python benchmarks/backbones.py` makes the results and this page.
"""
# What the messages of refused families have in common, and what the page says for all of them.
REFUSALS = (
    (
        "also attend to an encoder",
        "The layers also attend to an encoder or an image. RETRO needs a decoder-only model.",
    ),
    (
        "Cannot tell the decoder layers",
        "`retrofit` does not find the layers. The error says how to name them (not tried).",
    ),
    ("several residual streams", "The layers have several residual streams. RETRO can add to one only."),
    ("its own kind of state", "The model does not keep its history in a `DynamicCache`, which RETRO needs."),
)
BASE_FAILS = (
    ("cached generation", "with a cache, the logits differ from those of a full pass"),
    ("padded at the left", "the logits of a row that is padded on the left differ from those of the row alone"),
)


def page(results: dict) -> str:
    """docs/backbones.md."""
    groups: dict[str, list[tuple[str, dict]]] = {}
    for family, row in results["families"].items():
        groups.setdefault(row["status"], []).append((family, row))
    works = groups.pop("works", [])
    num_classes = len({row["class"] for _, row in works})
    parts = [
        "# Families of models",
        f"Of the {len(results['families'])} families of causal language models in transformers {results['transformers']}, "
        f"**{len(works)} work** with `retrofit` ({num_classes} model classes).",
        CHECKS.strip(),
        "## Families that work",
        "Prompt lookup is refused, as it is for their base, by "
        f"{named(family for family, row in works if row['rollback'] is not None)}.",
        table(
            ("Family", "Model class", "Cross-attention enters"),
            [(f"`{family}`", row["class"], entry(row)) for family, row in works],
        ),
    ]
    if failing := groups.get("fails"):
        rows = [(f"`{family}`", row["reason"].replace("|", "\\|")) for family, row in failing]
        parts += ["## Families that fail", "This is a defect of this library:", table(("Family", "Reason"), rows)]
    if refused := groups.get("refused"):
        reasons: dict[str, list[str]] = {}
        for family, row in refused:
            reasons.setdefault(said(row["reason"], REFUSALS), []).append(family)
        rows = [(reason, named(families)) for reason, families in reasons.items()]
        parts += [
            "## Families that are refused",
            "`retrofit` raises an `UnsupportedBackboneError`.",
            table(("Reason", "Families"), rows),
        ]
    if failing := groups.get("base"):
        rows = [
            (f"`{family}`", f"{said(row['reason'], BASE_FAILS)}, by {row['reason'].rpartition(' by ')[2]}")
            for family, row in failing
        ]
        text = "`retrofit` accepts these families, but a check fails for the base alone:"
        parts += ["## Families whose base fails a check", text, table(("Family", "What the base does"), rows)]
    if untried := groups.get("not built"):
        text = "No small base that runs on text alone could be made of "
        parts += ["## Families that could not be tried", f"{text}{named(family for family, _ in untried)}."]
    return "\n\n".join(parts) + "\n"


def said(message: str, known: tuple[tuple[str, str], ...]) -> str:
    """A message as the page words it, or as it is."""
    return next((text for part, text in known if part in message), message.replace("|", "\\|"))


def named(families: Iterable[str]) -> str:
    """Names in a row."""
    return ", ".join(f"`{family}`" for family in families)


def entry(row: dict) -> str:
    """Where cross-attention enters, in words."""
    if row["placement"] == "after_layer":
        return "after the layer (`cross_attention_placement='after_layer'`)"
    preposition, _, module = row["where"].partition(" ")
    return f"{preposition} `{module}`"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; by default all that have no result yet")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one family")
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.page:
        sys.path.insert(0, str(ROOT))  # for `tests`

        import torch
        import transformers

        import retro_hf  # noqa: F401 - imported once, before the forks
        from tests.zoo import FAMILIES

        torch.set_num_threads(1)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if results.get("transformers") != transformers.__version__:
            results = {"transformers": transformers.__version__, "torch": torch.__version__, "families": {}}
        for family in args.families or [family for family in FAMILIES if family not in results["families"]]:
            row = results["families"][family] = run(family, args.limit)
            results["families"] = dict(sorted(results["families"].items()))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{family:<24} {row['status']:<10} {row['seconds']:>5} s  {row['reason']}", flush=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
