"""Generates the page of measurements of steep itself: its statistics, its defaults and its costs.

All figures come from `benchmarks/results`.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
NOT_FIGURES = {"versions", "hardware"}


def table(columns, rows):
    """A Markdown table, with the bars inside cells escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def crossed(entries: Iterable[dict], down: str, across: str, cell: Callable[[list[dict]], str]) -> str:
    """A table of entries by two of their values; a cell shows all entries that share them."""
    entries = list(entries)
    rows, columns = ([*dict.fromkeys(e[key] for e in entries)] for key in (down, across))
    found = [[cell([e for e in entries if e[down] == r and e[across] == c]) for c in columns] for r in rows]
    return table(
        [down, *(f"{c} {across}" for c in columns)], [[r, *cells] for r, cells in zip(rows, found, strict=True)]
    )


def rates(entries: list[dict]) -> str:
    """Lowest and highest rate, in per cent."""
    found = sorted(100 * e["rate"] for e in entries if e["rate"] is not None)
    if not found:
        return "too few"
    low, high = (f"{value:.1f}" for value in (found[0], found[-1]))
    return f"{low} %" if low == high else f"{low} to {high} %"


def statistics(validity: dict) -> str:
    controls = validity["controls of real studies"][0]
    studies = validity["false verdicts"][0]["of"]
    return "\n\n".join(
        [
            f"Rates over {studies} simulated studies each, whose paired noise has the shapes and sizes of real runs. "
            f"The standard error of a rate of 5 % is {100 * (0.05 * 0.95 / studies) ** 0.5:.1f} points.",
            "### False verdicts in families of methods that have no effect\n\n"
            "At most 5 % are allowed. Families of 1 to 10 methods.",
            crossed(validity["false verdicts"], "noise", "seeds", rates),
            "### False verdicts in studies that may stop early\n\n"
            "Interim analyses after a quarter and half of 16 pairs.",
            crossed(validity["sequential"], "noise", "arms", rates),
            f"### A/A controls of real studies\n\n{controls['count']} of {controls['of']} controls were judged "
            "different from their own baseline.",
            "### How often the 95 % interval contains the true effect",
            crossed(validity["coverage"], "noise", "seeds", rates),
            "### How often the minimum detectable effect is found\n\nThe target is 80 %.",
            crossed(validity["power"], "seeds", "arms", rates),
        ]
    )


def second_order(results: dict) -> str:
    """Test loss relative to that of tuned Adam at equal CPU time."""
    problems = {name: budgets for name, budgets in results.items() if "float" in name}
    rows = [
        [name, arm, *(against(budgets[b].get(arm)) for b in ("T/9", "T/3", "T"))]
        for name, budgets in problems.items()
        for arm in ("levenberg-marquardt", "lbfgs")
    ]
    steps = results["steps of Adam at T"]
    head = (
        "Test loss relative to that of tuned Adam with a schedule, at equal CPU time, with 95 % intervals over 8 "
        f"paired seeds. T is the time of {steps} steps of Adam. For both methods and for Adam, only the learning rate "
        "was tuned, with the same number of trials."
    )
    return head + "\n\n" + table(["problem", "method", "T/9", "T/3", "T"], rows)


def against(arm: dict | None) -> str:
    if not arm or not (time := arm.get("equal time") or arm.get("equal steps")):
        return "–"
    ratio, low, high = (f"{math.exp(-time[key]):.2g}" for key in ("estimate", "high", "low"))  # gains are logarithms
    return f"{ratio} [{low}, {high}] {time['verdict']}"


def figures(values: dict) -> str:
    """All numbers of a benchmark: groups of the same names side by side, the rest one below the other."""
    values = values.get("figures", values)
    groups = {k: g for k, v in values.items() if isinstance(v, dict) and k not in NOT_FIGURES and (g := flat(v))}
    plain = [[k, shown(v)] for k, v in values.items() if isinstance(v, int | float)]
    parts = [table(["figure", "value"], plain)] if plain else []
    while groups:
        names = [*next(iter(groups.values()))]
        alike = [k for k, v in groups.items() if [*v] == names]
        same = {k: groups.pop(k) for k in alike}
        parts.append(table(["figure", *same], [[n, *(shown(v[n]) for v in same.values())] for n in names]))
    return "\n\n".join(parts)


def flat(values: dict, before: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}: ")
        elif isinstance(value, int | float):
            found[before + key] = value
    return found


def shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


SPECIAL = {"validity": statistics, "second_order": second_order}
TITLES = {
    "validity": "Statistics, measured on simulated studies",
    "second_order": "Levenberg-Marquardt with its default settings",
    "compare": "Cost of a comparison beyond its runs",
    "kills": "Comparisons killed with kill -9 at random moments",
    "report": "The HTML report",
    "fit": "`fit`, relative to a hand-written loop",
    "sven": "The per-example engine and Sven",
    "optim": "Optimizers, relative to fused AdamW",
    "m_fac": "M-FAC, relative to fused AdamW",
}


def page(folder: Path = RESULTS) -> str:
    """The page, with a section for every recorded benchmark."""
    parts = ["# Measurements", "Each section shows one run on one machine, as `make bench` records it."]
    for name, title in TITLES.items():
        path = folder / f"{name}.json"
        if path.exists():
            values = json.loads(path.read_text())
            parts += [f"## {title}", f"`benchmarks/{name}.py`", SPECIAL.get(name, figures)(values)]
    return "\n\n".join(parts) + "\n"
