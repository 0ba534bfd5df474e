"""The generated page of what was measured about steep itself: its statistics, its defaults and its costs.

Everything comes from `benchmarks/results`.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
NOT_FIGURES = {"versions", "hardware"}


def table(columns, rows):
    """A Markdown table; bars inside cells do not end them."""
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
            "### False verdicts in a family of methods without effect\n\nAllowed: 5 %. Families of 1 to 10 methods.",
            crossed(validity["false verdicts"], "noise", "seeds", rates),
            "### The same where a study may stop early\n\nLooks at a quarter, half and all of 16 pairs.",
            crossed(validity["sequential"], "noise", "arms", rates),
            f"### A/A controls of real studies\n\n{controls['count']} of {controls['of']} were judged different from "
            "their own baseline.",
            "### How often the 95 % interval holds the truth",
            crossed(validity["coverage"], "noise", "seeds", rates),
            "### How often an effect of the promised size is found\n\nPromised: 80 %.",
            crossed(validity["power"], "seeds", "arms", rates),
        ]
    )


def second_order(results: dict) -> str:
    """Test loss over that of tuned Adam at equal CPU time."""
    problems = {name: budgets for name, budgets in results.items() if "float" in name}
    rows = [
        [name, arm, *(against(budgets[b].get(arm)) for b in ("T/9", "T/3", "T"))]
        for name, budgets in problems.items()
        for arm in ("levenberg-marquardt", "lbfgs")
    ]
    steps = results["steps of Adam at T"]
    head = (
        "Test loss over that of tuned Adam with its schedule at equal CPU time, with 95 % intervals, over 8 paired "
        f"seeds; T: {steps} steps of Adam. Of both methods the learning rate was tuned, with as many trials."
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
    "validity": "Statistics, by simulation",
    "second_order": "Levenberg-Marquardt with its defaults",
    "compare": "A comparison's own cost",
    "kills": "kill -9 at random moments over a running comparison",
    "report": "The report",
    "fit": "`fit` over a loop by hand",
    "sven": "The per-example engine and Sven",
    "optim": "Optimizers over fused AdamW",
    "m_fac": "M-FAC over fused AdamW",
}


def page(folder: Path = RESULTS) -> str:
    """The page, of the benchmarks that were recorded."""
    parts = ["# What was measured", "Ratios of one run on one machine each, as `make bench` records them."]
    for name, title in TITLES.items():
        path = folder / f"{name}.json"
        if path.exists():
            values = json.loads(path.read_text())
            parts += [f"## {title}", f"`benchmarks/{name}.py`", SPECIAL.get(name, figures)(values)]
    return "\n\n".join(parts) + "\n"
