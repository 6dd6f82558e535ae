"""The report of `knowledge.py`: predictions beside measured values, tables in Markdown, and the curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np


MODES = ("on", "off", "random")
PER_PERSON = 4  # questions, one for each attribute

# Written before the run whose results are in docs/results.
PREDICTIONS = {
    "own card": ("exact match with the person's own card alone, %", "at least", 90.0),
    "retrieved": ("exact match, in % of the questions whose card was found", "at least", 90.0),
    "off": ("exact match with no passages, %", "at most", 3.0),
    "random": ("exact match with the passages of another question, %", "at most", 3.0),
    "before": ("exact match before their cards are in the store, %", "at most", 3.0),
    "new value": ("rewritten half: answers with the new value, %", "at least", 85.0),
    "old value": ("rewritten half: answers with the old value, %", "at most", 3.0),
    "untouched": ("other half: change of exact match, points", "at most", 1.0),
    "deleted": ("exact match after their cards are deleted, %", "at most", 3.0),
    "restored": ("answers that are not as before, after restoring the cards", "at most", 0.0),
}


def share(values: np.ndarray, counted: np.ndarray | None = None) -> list[float]:
    """Percentage of the counted questions, and the ends of its 95 % interval over people drawn again.

    Args:
        values, counted (`np.ndarray` of bool and shape `(num_questions,)`): what is true; of which questions.
    """
    counted = np.ones_like(values) if counted is None else counted
    hits = (values & counted).reshape(-1, PER_PERSON).sum(axis=1)
    totals = counted.reshape(-1, PER_PERSON).sum(axis=1)
    drawn = np.random.default_rng(0).integers(len(hits), size=(2000, len(hits)))
    low, high = np.quantile(hits[drawn].sum(axis=1) / np.maximum(totals[drawn].sum(axis=1), 1), (0.025, 0.975))
    return [round(100 * float(value), 2) for value in (hits.sum() / max(totals.sum(), 1), low, high)]


def judge(swapped: dict) -> dict[str, dict]:
    """The predictions beside what was measured."""
    rows = swapped["rows"]

    def on(label: str) -> float:
        return rows[label]["on"][0]

    appended = rows["their cards are appended"]
    values = {
        "own card": on("- the person's own card alone"),
        "retrieved": 100 * appended["on"][0] / appended["found"][0] if appended["found"][0] else 0.0,
        "off": appended["off"][0],
        "random": appended["random"][0],
        "before": on("their cards are not in the store"),
        "new value": on("half of the cards are rewritten: new values of these"),
        "old value": on("- old values of these"),
        "untouched": abs(on("- the other half, now") - on("- the other half, before")),
        "deleted": on("their cards are deleted"),
        "restored": swapped["answers_changed_by_restoring"],
    }
    return {
        name: {
            "what": what,
            "predicted": f"{side} {bound:g}",
            "measured": round(values[name], 2),
            "met": bool(values[name] >= bound if side == "at least" else values[name] <= bound),
        }
        for name, (what, side, bound) in PREDICTIONS.items()
    }


def tables(swapped: dict, judged: dict[str, dict]) -> str:
    """What was measured, in Markdown."""

    def cell(value: list[float] | None) -> str:
        return "" if value is None else f"{value[0]:.1f} [{value[1]:.1f}, {value[2]:.1f}]"

    lines = ["| the store | card found | on | off | random |", "|---|---|---|---|---|"]
    for label, row in swapped["rows"].items():
        lines.append(f"| {label} | {' | '.join(cell(row.get(name)) for name in ('found', *MODES))} |")
    lines += ["", "| predicted | | measured | |", "|---|---|---|---|"]
    for entry in judged.values():
        met = "met" if entry["met"] else "**missed**"
        lines.append(f"| {entry['what']} | {entry['predicted']} | {entry['measured']:.1f} | {met} |")
    found = (f"{cell(value)} among {k}" for k, value in swapped["hit_at"].items())
    lines += ["", f"Card found, % of {swapped['num_questions']:,} questions: {', '.join(found)}."]
    return "\n".join(lines)


def plot(log: list[dict], path: Path) -> None:
    """Loss and exact match on the held-out people while training; readable on light and on dark pages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [entry for entry in log if "exact_match_on" in entry]
    colors, gray = {"on": "#2a9d8f", "off": "#e07a2f", "random": "#9b6bd6"}, "#808080"
    style = {name: gray for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")}
    with pyplot.rc_context(style | {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for axis, name, label in zip(
            axes, ("loss", "exact_match"), ("loss of the answer, nats per token", "exact match, %"), strict=True
        ):
            for mode, color in colors.items():
                values = [entry[f"{name}_{mode}"] for entry in points]
                axis.plot([entry["step"] for entry in points], values, color=color, linewidth=2, label=mode)
            axis.set(xlabel="step", ylabel=label, ylim=(0, None if name == "loss" else 100))
            axis.grid(color=gray, alpha=0.25)
        axes[1].legend(title="passages", frameon=False, loc="center right", bbox_to_anchor=(1, 0.4))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, transparent=True)
        pyplot.close(figure)
