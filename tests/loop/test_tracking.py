"""Logging to trackers: read back what real TensorBoard kept, and what any other of Accelerate's trackers is told."""

import time
from pathlib import Path

import pytest
import torch
from accelerate import tracking as trackers
from accelerate.utils import LoggerType

import steep
from steep.loop.tracking import as_log


class Notebook(trackers.GeneralTracker):
    """A tracker of one's own: keeps in memory what it is told."""

    name, requires_logging_directory = "notebook", False

    def __init__(self, *made_with, **options):
        self.made_with, self.options = made_with, options
        self.config, self.entries, self.finished = None, [], 0
        super().__init__()

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.entries.append((step, values))

    def finish(self):
        self.finished += 1

    def series(self, key):
        return [(step, values[key]) for step, values in self.entries if key in values]


@pytest.fixture
def fit(regression):
    return lambda **options: steep.fit(regression, progress=False, seed=3, **options)


def test_tensorboard_holds_losses_scores_rates_and_settings(fit, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    import yaml
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(log=steep.Log("tensorboard", tmp_path, "mine", {"rank": 8, "sizes": (1, 2), "nothing": None}))
    kept = EventAccumulator(str(tmp_path / "mine")).Reload()
    losses = kept.Scalars("train/loss")
    assert [entry.step for entry in losses] == list(range(1, result.steps + 1))
    assert [entry.value for entry in losses] == pytest.approx(result.history.losses, rel=1e-6)
    scores, evaluations = kept.Scalars("val/loss"), result.history.evaluations
    assert [entry.step for entry in scores] == [entry["step"] for entry in evaluations]
    assert [entry.value for entry in scores] == pytest.approx([entry["loss"] for entry in evaluations], rel=1e-6)
    cosine = [0.05 * (1 + torch.cos(torch.tensor(torch.pi * e.step / result.steps)).item()) / 2 for e in losses]
    assert [entry.value for entry in kept.Scalars("lr")] == pytest.approx(cosine, abs=1e-6)
    settings = yaml.safe_load(next((tmp_path / "mine").glob("*/hparams.yml")).read_text())
    assert settings.items() >= {"seed": 3, "optimizer": "Adam", "lr": 0.05, "rank": 8, "sizes": "(1, 2)"}.items()
    assert "nothing" not in settings


def test_by_default_a_run_is_named_after_recipe_and_seed(fit, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    monkeypatch.chdir(tmp_path)
    fit(log="tensorboard")
    assert list((tmp_path / "steep-log" / "regression-3").glob("events.out.tfevents.*"))


def test_a_tracker_of_ones_own_is_told_everything_once_and_closed(fit):
    notebook = Notebook()
    result = fit(log=notebook, evaluate_every=7)
    assert notebook.series("train/loss") == list(enumerate(result.history.losses, start=1))
    assert [step for step, _ in notebook.series("val/loss")] == [7, 14, result.steps]
    assert [value for _, value in notebook.series("val/loss")] == [e["loss"] for e in result.history.evaluations]
    assert notebook.config["steps"] == result.steps
    assert notebook.finished == 1
    assert all(isinstance(value, (bool, int, float, str)) for value in notebook.config.values())


def test_logging_changes_no_bit_of_the_training(fit):
    assert fit(log=Notebook()).history.losses == fit().history.losses


def test_time_spent_at_the_tracker_is_not_training(fit):
    class Slow(Notebook):
        def log(self, values, step=None, **_):
            time.sleep(0.02)

        def finish(self):
            time.sleep(1.0)

    started = time.perf_counter()
    result = fit(log=Slow())
    assert result.seconds < time.perf_counter() - started - 0.02 * result.steps - 0.99


def test_a_diverging_run_is_logged_to_its_last_finite_loss(regression):
    notebook = Notebook()
    wild = regression.replace(optimizer=lambda p: torch.optim.SGD(p, lr=1e6), scheduler=None)
    with pytest.raises(steep.NonFinite, match="at step") as stop:
        steep.fit(wild, progress=False, log=notebook, evaluate_every=1000)
    steps = [step for step, _ in notebook.series("train/loss")]
    assert f"at step {steps[-1]} " in str(stop.value)
    assert steps == list(range(1, len(steps) + 1))
    assert notebook.finished == 1


def test_a_resumed_run_goes_on_in_the_log_where_it_stopped(fit, regression, tmp_path):
    first, second = Notebook(), Notebook()
    steep.fit(
        regression.replace(budget=steep.Budget(steps=6)), progress=False, checkpoint=tmp_path / "run.pt", log=first
    )
    result = steep.fit(regression, progress=False, checkpoint=tmp_path / "run.pt", log=second)
    steps = [step for notebook in (first, second) for step, _ in notebook.series("train/loss")]
    assert steps == list(range(1, result.steps + 1))
    assert second.series("train/loss")[0] == (7, result.history.losses[6])


@pytest.mark.parametrize(
    ("to", "message"),
    [("tensorbord", "log='tensorbord' is no tracker; there is: aim, "), (True, "log=True is no tracker")],
)
def test_unknown_trackers_are_refused_before_anything_is_built(regression, to, message):
    unbuilt = regression.replace(data=lambda generator: pytest.fail("the data were built"))
    with pytest.raises(ValueError, match=message):
        steep.fit(unbuilt, log=to)
    with pytest.raises(ValueError, match=message):
        steep.compare(unbuilt, ["adabelief"], log=to, progress=False)


@pytest.mark.parametrize(("to", "package"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("comet_ml", "comet-ml")])
def test_missing_packages_are_named(regression, monkeypatch, to, package):
    monkeypatch.setattr("steep.loop.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(ValueError, match=f"log='{to}' needs a package: pip install {package}$"):
        steep.fit(regression.replace(data=lambda generator: pytest.fail("the data were built")), log=to)


@pytest.mark.parametrize(
    ("to", "options"),
    [("wandb", {"name": "mine", "dir": True}), ("mlflow", {"run_name": "mine"})],
)
def test_services_get_the_recipe_as_project_and_the_run_by_name(fit, monkeypatch, tmp_path, to, options):
    made = []

    class Service(Notebook):
        def __init__(self, *made_with, **kept):
            super().__init__(*made_with, **kept)
            made.append(self)

    for place in ("accelerate.tracking", "steep.loop.tracking"):
        monkeypatch.setattr(f"{place}.get_available_trackers", lambda: [LoggerType(to)])
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, to, Service)
    result = fit(log=steep.Log(to, tmp_path / "deep" / "log", "mine"))
    (service,) = made
    assert service.made_with == ("regression",)
    assert service.options == {key: str(tmp_path / "deep" / "log") if v is True else v for key, v in options.items()}
    assert Path(tmp_path / "deep" / "log").is_dir()
    assert len(service.series("train/loss")) == result.steps


def test_as_log_leaves_nothing_and_logs_alone():
    log = steep.Log(Notebook(), "there")
    assert as_log(None) is None
    assert as_log(log) is log
    assert as_log(log.to).to is log.to
