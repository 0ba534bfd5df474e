"""``steep fit``: a recipe is trained once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

import steep
from steep.cli._app import LogOption, RecipeArgument, command, complete_methods, writable
from steep.utils.validation import check_ranges, require_whole


@command()
def fit(
    recipe: RecipeArgument,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="a method: ID, ID:NAME=VALUE or FILE.py:NAME; repeat the option to combine methods",
            autocompletion=complete_methods,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="hyper-parameter: name=value or id.name=value")
    ] = None,
    seed: int = 0,
    split_seed: Annotated[
        int | None, typer.Option(help="seed of the data split; the same as --seed by default")
    ] = None,
    epochs: float | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    lr_scale: Annotated[float, typer.Option(help="factor on the learning rate of the recipe's own optimizer")] = 1.0,
    checkpoint: Annotated[Path | None, typer.Option(help="file to save to, and to resume from if it exists")] = None,
    save: Annotated[
        Path | None, typer.Option(help="write the trained model's weights to this .safetensors file")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu; by default the accelerator, if there is one")] = None,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16")] = "no",
    accumulate: Annotated[int, typer.Option(help="number of parts to split each batch into, to save memory")] = 1,
    evaluate_every: Annotated[int | None, typer.Option(help="steps between evaluations (25 in all by default)")] = None,
    threads: Annotated[int | None, typer.Option(help="threads of torch; the runs of `steep compare` use 1")] = None,
    log: LogOption = None,
    json_: Annotated[bool, typer.Option("--json", help="print the result as JSON, with all digits")] = False,
) -> None:
    """Train a recipe once, with or without methods."""
    from steep.evidence.runs.jobs import arm_recipe
    from steep.evidence.runs.source import load_recipe

    check_ranges({"--lr-scale": lr_scale}, {"--lr-scale": "(0, inf)"})
    if save is not None and writable(save, "--save").suffix != ".safetensors":
        raise ValueError(f"--save {save} must end in .safetensors")
    if threads is not None:
        require_whole("--threads", threads, 1)
        torch.set_num_threads(threads)
    methods = with_settings(method or [], set_ or [])
    loaded = load_recipe(recipe)
    limited = any(limit is not None for limit in (epochs, steps, seconds))
    budget = steep.Budget(epochs, steps, seconds) if limited else loaded.budget
    settings = {"lr_scale": lr_scale} | {f"{id}.{k}": v for id, hyper in methods for k, v in hyper.items()}
    result = steep.fit(
        arm_recipe(loaded, {}, tuple(methods), lr_scale, budget),
        seed=seed,
        split_seed=split_seed,
        checkpoint=checkpoint,
        device=device,
        precision=precision,
        accumulate=accumulate,
        evaluate_every=evaluate_every,
        log=steep.Log(log, config=settings) if log else None,
    )
    if save is not None:
        _save(result.model, save)
    print(_as_json(result) if json_ else _in_words(loaded.name, result))


def _save(model: torch.nn.Module, path: Path) -> None:
    """The weights, whole or not at all; those that are tied are written once."""
    from safetensors.torch import save_model

    with TemporaryDirectory(dir=path.absolute().parent) as folder:
        save_model(model, str(Path(folder) / path.name))
        os.replace(Path(folder) / path.name, path)


def _in_words(name: str, result: steep.Result) -> str:
    scores = "  ".join(f"test {name} {value:.4g}" for name, value in result.test.items())
    return f"{name}: {scores}  ({result.steps} steps, {result.seconds:.1f} s)"


def _as_json(result: steep.Result) -> str:
    names = ("val", "test", "steps", "examples", "seconds", "cpu_seconds", "peak_memory")
    return json.dumps({name: getattr(result, name) for name in names})


def with_settings(specs: Sequence[str], settings: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    """Methods with their hyper-parameters, from ``id:name=value`` and from ``--set name=value``, ``id.name=value``.

    Raises:
        ValueError: a setting that belongs to none of them.
    """
    from steep.evidence.arms import literal, parse

    found = [part for spec in specs for part in parse(spec)]
    by_id = dict(found)
    for setting in settings:
        name, equals, text = setting.partition("=")
        id, _, key = name.rpartition(".")
        id = id or (found[0][0] if len(found) == 1 else "")
        if not equals or id not in by_id:
            raise ValueError(f"--set {setting!r}: write name=value for one --method, or id.name=value for several")
        by_id[id][key] = literal(text)
    return found
