"""The generated pages: one per method, and an overview of what they achieve. Nothing in them is written by hand.

They are made from the methods' entries, the claims, the ledger and `benchmarks/results`.
"""

import ast
import importlib
import inspect
import json
import math
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import measured
from measured import table

import steep
from steep.cli.catalog import range_text
from steep.evidence.claims import ledger
from steep.evidence.claims.verdicts import effect, gains, number, numbers
from steep.method import PACKAGES, PURPOSES, methods
from steep.tasks import tasks

ROOT = Path(__file__).parent.parent
NOT_RUN = "not run"
GREY, BLUE, RED = "#888888", "#3b82c4", "#c4533b"  # readable on light and on dark


def outcomes(root=ROOT):
    """Claim, ledger entry (or `None`) and state, by method; methods without a claim are absent."""
    found = {}
    for id, (claim, path) in ledger.load_claims(root / "claims").items():
        entry = ledger.read(root / "ledger", id)
        found[id] = (claim, entry, ledger.state(claim, path, entry))
    return found


def example(method):
    """The example of the docstring, or nothing."""
    doc = inspect.getdoc(method.make) or ""
    block = re.search(r"^Example:\n((?:    .*\n?|\n)+)", doc, re.MULTILINE)
    if not block:
        return ""
    lines, name = textwrap.dedent(block[1]).strip(), f"import {method.make.__name__}"
    place = method.make.__module__
    if place.rpartition(".")[2] != method.make.__name__:  # else the package's attribute is the file, not the function
        place = ".".join(place.split(".")[:2])
    imported = "" if name in lines else f">>> from {place} {name}\n"
    return f"```pycon\n{imported}{lines}\n```"


def hyper_table(method):
    rows = [f"| `{n}` | `{v!r}` | {range_text(method.search_space.get(n)) or '–'} |" for n, v in method.hyper.items()]
    return "\n".join(["| name | default | tuned over |", "|---|---|---|", *rows]) if rows else ""


def cost_ratios(method, folder=ROOT / "benchmarks" / "results") -> Iterator[tuple[str, str, float]]:
    """Benchmark, place in its file and value of every recorded ratio of this method."""
    names = (method.id, method.make.__name__.lower())
    for path in sorted(folder.glob("*.json")):
        for place, value in leaves(json.loads(path.read_text())):
            if place[-1].lower().startswith(names) and ("ratio" in place or " / " in place[-1]):
                yield path.stem, ", ".join(place[:-1]), place[-1], value


def leaves(values, place=()):
    """Every number in nested dictionaries, with the keys that lead to it."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*place, key))
        elif isinstance(value, float):
            yield (*place, key), value


def cost(method):
    rows = [f"| `{file}` | {where} | {what} | {value:.3g} |" for file, where, what, value in cost_ratios(method)]
    return "\n".join(["| benchmark | on | ratio of | value |", "|---|---|---|---|", *rows]) if rows else ""


def claim_section(claim, entry, state):
    """The claim and its outcome; every verdict has the same frame, whatever it says."""
    verdict = entry.verdict if entry else "never run"
    if state == "stale":
        verdict = f"not measured with this version (before the code changed: {verdict})"
    scales = f"- In the paper: {claim.paper_scale}.\n- Here: {claim.our_scale}.\n- Source: {claim.source}."
    frame = f"```{{admonition}} Verdict: {verdict}\n{result(claim, entry)}\n```"
    parts = [f"## Claim\n\n{claim.statement}", scales, frame]
    if entry and entry.quantities:
        parts += [f"![Gain of every case, with interval and claimed size]({claim.id}.svg)", provenance(claim, entry)]
    return "\n\n".join(parts)


def result(claim, entry):
    if not entry or not entry.quantities:
        return claim.reason or f"Run `steep claims {claim.id}`."
    return "\n".join(f"- **{j.verdict}**: {j.quantity.name}: {numbers(j)}." for j in entry.quantities)


def provenance(claim, entry):
    versions = ", ".join(f"{name} {version}" for name, version in entry.versions.items())
    hardware = ", ".join(f"{name}: {value}" for name, value in entry.hardware.items() if value)
    spent = f"{entry.cpu_seconds:.0f} CPU seconds"
    text = f"Run on {entry.date[:10]} with {versions} ({hardware}; {spent}). To repeat: `steep claims {claim.id}`."
    warnings = [w for note in entry.notes.values() if isinstance(note, dict) for w in note.get("warnings", ())]
    return "\n".join([text, *(f"- {warning}" for warning in dict.fromkeys(warnings))])


def plot(entry, path):
    """A strip per quantity: a dot for each case, the interval, lines at no gain and at the claimed size."""
    figure, axes = plt.subplots(len(entry.quantities), 1, figsize=(7, 1.25 * len(entry.quantities)), squeeze=False)
    for axis, judged in zip(axes[:, 0], entry.quantities, strict=True):
        strip(axis, judged)
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def strip(axis, judged):
    q, values = judged.quantity, gains(judged)
    finite = [v for v in values if math.isfinite(v) and (v > 0 or q.scale == "difference")]
    none = float(q.scale == "ratio")
    if q.scale == "ratio":
        axis.set_xscale("log")
    axis.plot(finite, [0] * len(finite), "o", color=BLUE, alpha=0.6)
    ends = [v if math.isfinite(v) and v != 0 else none for v in (judged.low, judged.high)]
    axis.plot(ends, [-0.5, -0.5], color=BLUE, linewidth=3)
    axis.axvline(none, color=GREY, linewidth=1)
    if q.size is not None:
        axis.axvline(q.size, color=RED, linewidth=1, linestyle="--")
    axis.set(ylim=(-1, 0.6), yticks=[])
    lost = f"; {len(values) - len(finite)} not shown (never finished)" if len(finite) < len(values) else ""
    axis.set_title(f"{q.name}: gain{lost}", fontsize=9, color=GREY, loc="left")
    ticks(axis, [none, *([q.size] if q.size is not None else []), *ends], q)


def ticks(axis, places, quantity):
    """Label no gain, the claimed size and the interval's ends, unless the labels overlap."""
    kept: list[float] = []
    for place in places:
        x, *others = (share(axis, v) for v in (place, *kept))
        if all(abs(x - other) > 0.08 for other in others):
            kept.append(place)
    axis.set_xticks(kept, [number(quantity, v) for v in kept], fontsize=8, color=GREY)
    axis.set_xticks([], minor=True)
    axis.tick_params(color=GREY)
    for side in axis.spines.values():
        side.set_visible(False)


def share(axis, value):
    """Where a value lies along the axis, from 0 to 1."""
    return axis.transAxes.inverted().transform(axis.transData.transform((value, 0)))[0]


def objects_of(method):
    """What `make` makes, and whatever else its file names in ``__all__``."""
    module, own = sys.modules[method.make.__module__], method.make.__name__
    return {getattr(module, name): name for name in dict.fromkeys((own, *getattr(module, "__all__", ())))}


def reference(method):
    """The directives that document them."""
    module = method.make.__module__
    return "\n\n".join(
        f".. autoclass:: {module}.{name}\n   :members:\n   :inherited-members: Optimizer, Module"
        if isinstance(thing, type)
        else f".. autofunction:: {module}.{name}"
        for thing, name in objects_of(method).items()
    )


def method_page(method, outcome=None):
    """A page about one method, from its entry, its docstrings and its claim."""
    doc = inspect.getdoc(sys.modules[method.make.__module__]) or ""
    requires = "\n".join(f"- {steep.requires.REQUIREMENTS[n].what}" for n in sorted(method.requires))
    command = f"```console\n$ steep compare RECIPE --methods {method.id}\n```" if method.is_arm else ""
    year = f", {method.paper.year}" if method.paper.year else ""
    sections = {
        "Formula": f"```text\n{method.formula}\n```" if method.formula else "",
        "Usage": "\n\n".join(part for part in (example(method), command) if part),
        "Hyper-parameters": hyper_table(method),
        "Requires": requires,
        "Cost": cost(method),
        "In detail": f"```text\n{doc}\n```",
        "Reference": f"```{{eval-rst}}\n{reference(method)}\n```",
    }
    claim = claim_section(*outcome) if outcome else "## Claim\n\n```{admonition} Verdict: not run\nNo claim yet.\n```"
    head = [f"# {method.id}", method.summary, f"*{method.paper.title}*{year}. <{method.paper.link}>", claim]
    return "\n\n".join([*head, *(f"## {title}\n\n{text}" for title, text in sections.items() if text)]) + "\n"


def which_page(found):
    """Which method for what, by the reader's problem: one table, from the methods' entries and the ledger."""
    head = (
        "What papers say their methods are good for. Whether one helps on your model is what "
        "`steep compare YOUR_RECIPE --methods ...` measures. `steep list --for WORD` prints a row of this table."
    )
    rows = []
    for word, problem in PURPOSES.items():
        own = [method for method in methods().values() if word in method.good_for]
        if own:
            rows.append([f"`{word}`", problem, ", ".join(f"[{m.id}]({m.id}.md){mark(m, found)}" for m in own)])
    foot = (
        "✓ reproduced at the small scale of its [claim](outcomes.md), with this version of the code; ✗ not reproduced. "
        "Methods without a mark have not been measured with this version."
    )
    return "\n\n".join(["# Which method for what", head, table(["", "you want", "methods"], rows), foot]) + "\n"


def mark(method, found):
    """What the ledger says with this version of the code."""
    _, entry, state = found.get(method.id, (None, None, ""))
    current = entry is not None and entry.quantities and state == "current"
    return {"reproduced": " ✓", "not reproduced": " ✗"}.get(entry.verdict, "") if current else ""


def outcomes_page(found):
    """The outcome of every claim's quantities that was measured with this version of the code."""
    head = (
        "Measured at the small scale of each claim, against that claim's baseline. *Helps* and *hurts* mean that the "
        "exact 95 % interval excludes zero gain. What was measured before the code changed is not shown."
    )
    every = [row for method in methods().values() for row in rows_of(method, found)]
    parts = ["# Outcomes of the papers' claims", head]
    for outcome in ("helps", "no evidence", "hurts"):
        rows = [[method, what, gain, verdict] for method, what, result, gain, verdict in every if result == outcome]
        shown = table(["method", "measured", "gain [95 %]", "claim"], rows) if rows else "None."
        parts += [f"## {outcome.capitalize()}", shown]
    rest = dict.fromkeys(method for method, _, result, *_ in every if result == NOT_RUN)
    parts += ["## Not measured with this version", ", ".join(rest) or "None."]
    return "\n\n".join(parts) + "\n"


def rows_of(method, found):
    """Method, what was measured, outcome, gain and verdict: a row for each quantity of its claim."""
    link, (_, entry, state) = f"[{method.id}]({method.id}.md)", found.get(method.id, (None, None, ""))
    if not entry or not entry.quantities or state != "current":
        return [[link, "–", NOT_RUN, "–", "–"]]
    return [[link, j.quantity.name, effect(j), interval(j), j.verdict] for j in entry.quantities]


def parity_page():
    """What each method's tests hold it equal to, and where it differs from its authors' code, from the docstrings."""
    head = (
        "Every method is tested against an independent reference written from the paper's formula. This page says what "
        "its own tests compare it with, where it differs from the paper or the authors' code and why, and what stayed "
        "uncertain."
    )
    parts = ["# Parity with the authors' code", head]
    for method in methods().values():
        module = sys.modules[method.make.__module__]
        differs = [text for text in paragraphs(module) if re.match(r"(What differs|Differs|Unsure|Not here)", text)]
        tested = tests_of(module)
        parts += [
            f"## [{method.id}]({method.id}.md)",
            f"**Tested against:** {tested}" if tested else "",
            f"```text\n{chr(10).join(differs)}\n```" if differs else "No known difference.",
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def paragraphs(module):
    return (inspect.getdoc(module) or "").split("\n\n")


def tests_of(module):
    """The first line of the test file of the same name, without its name."""
    place = Path(module.__file__).relative_to(Path(steep.__file__).parent)
    file = ROOT / "tests" / place.parent / f"test_{place.name}"
    text = ast.get_docstring(ast.parse(file.read_text())) or "" if file.exists() else ""
    return text.split("\n\n")[0].replace("\n", " ")


def data_page():
    """Where the data of every task are from."""
    rows = [[f"`{task.name}`", task.summary, task.data] for task in tasks().values()]
    head = (
        "steep contains no data sets. Small ones come with scikit-learn and Python, others are computed; the rest are "
        "read from the folder `STEEP_DATA` or downloaded on first use."
    )
    return "\n\n".join(["# Data of the tasks", head, table(["task", "what it is", "data and licence"], rows)]) + "\n"


API = ("per_example", "linalg", "roles", "tasks", "testing")
API += tuple(f"adapters.{name}" for name in ("lightning", "hf", "accelerate", "distributed"))


def api_page():
    """Everything public: the names of `steep`, then those of its packages that are not on a method's page."""
    documented = {thing for method in methods().values() for thing in objects_of(method)}
    parts = ["# API", "Methods have [pages of their own](index.md). Everything else that is public:"]
    for name in ("steep", *(f"steep.{package}" for package in API)):
        module = importlib.import_module(name)
        listed = getattr(module, "__all__", ())
        things = {n: getattr(module, n) for n in sorted(listed or vars(module)) if not n.startswith("_")}
        own = {n: thing for n, thing in things.items() if is_ours(thing, name, listed) and thing not in documented}
        documented |= set(own.values())
        about = next(iter(paragraphs(module)), "")
        if own:
            directives = "\n\n".join(directive(name, n, thing) for n, thing in own.items())
            parts += [f"## {name}", about, f"```{{eval-rst}}\n{directives}\n```"]
    return "\n\n".join(parts) + "\n"


def is_ours(thing, module, listed):
    """Whether it is a class or function that this module defines, or lists in ``__all__``."""
    home = getattr(thing, "__module__", "") or ""
    return (inspect.isclass(thing) or inspect.isfunction(thing)) and (home == module or bool(listed))


def directive(module, name, thing):
    kind = "autoclass" if inspect.isclass(thing) else "autofunction"
    return f".. {kind}:: {module}.{name}" + ("\n   :members:" if kind == "autoclass" else "")


def interval(judged):
    middle, low, high = (number(judged.quantity, v) for v in (judged.gain, judged.low, judged.high))
    return f"{middle} [{low}, {high}]"


def index_page():
    lines = ["# Methods", "What each changes in a training step. [Which method for what](which.md)"]
    for package in PACKAGES:
        own = [method for method in methods().values() if method.changes == package]
        if own:
            lines += [
                f"## {package}",
                "\n".join(f"- [{method.id}]({method.id}.md): {method.summary}" for method in own),
            ]
    lines.append("```{toctree}\n:hidden:\n" + "\n".join(methods()) + "\n```")
    return "\n\n".join(lines) + "\n"


def write_pages(folder):
    """Write all pages and plots, and delete those of methods that no longer exist."""
    folder.mkdir(exist_ok=True)
    found = outcomes()
    pages = {f"{method.id}.md": method_page(method, found.get(method.id)) for method in methods().values()}
    pages |= {"index.md": index_page(), "which.md": which_page(found), "measured.md": measured.page()}
    pages |= {"outcomes.md": outcomes_page(found), "parity.md": parity_page(), "data.md": data_page()}
    pages["api.md"] = api_page()
    for old in (*folder.glob("*.md"), *folder.glob("*.svg")):
        old.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text)
    for id, (_, entry, _) in found.items():
        if entry and entry.quantities:
            plot(entry, folder / f"{id}.svg")
