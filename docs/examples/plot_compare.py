"""
Does it help on my model?
=========================

A small training run as a recipe, two methods, and a verdict. The same from a terminal:
``steep compare digits --methods ps-kd adabelief``.
"""

import tempfile

import matplotlib.pyplot as plt
from rich.console import Console

import steep
from steep.evidence.report.sentences import sentences
from steep.evidence.report.table import render

recipe = steep.task("digits").replace(budget=steep.Budget(epochs=6))
study = steep.compare(recipe, ["ps-kd", "adabelief"], trials=2, seeds=8, out=tempfile.mkdtemp(), progress=False)
Console(width=100, force_jupyter=False).print(render(study))

# %%
# The verdicts in words.
for sentence in sentences(study):
    print(sentence)

# %%
# Every dot is a pair of runs that share split, initialisation and data order.
figure, axis = plt.subplots(figsize=(7, 2.6))
for row, arm in enumerate(study.arms[1:]):
    found = arm.scores["loss"]
    axis.plot(found.differences, [row] * len(found.differences), "o", color="0.7")
    axis.plot([found.low, found.high], [row, row], color="C0", linewidth=3)
    axis.plot(found.estimate, row, "D", color="C0")
axis.axvline(0, color="0.5", linewidth=1)
axis.set_yticks(range(len(study.arms) - 1), [arm.name for arm in study.arms[1:]])
axis.set_xlabel("log of baseline's test loss over the arm's: positive is better")
figure.tight_layout()
