"""When a run is saved, and that good checkpoints are never written over by bad ones."""

import os
import signal

import pytest
import torch

import steep
from steep.loop import checkpoint, saver
from steep.loop.saver import Saver


def spoiled(recipe, *, bad, interrupted):
    """The recipe; its model is not finite after step `bad`, and Ctrl-C is pressed during step `interrupted`."""

    def optimizer(parameters):
        class Spoiling(torch.optim.SGD):
            steps = 0

            def step(self, closure=None):
                super().step(closure)
                self.steps += 1
                if self.steps == bad:
                    with torch.no_grad():
                        self.param_groups[0]["params"][0].fill_(torch.nan)
                if self.steps == interrupted:
                    os.kill(os.getpid(), signal.SIGINT)

        return Spoiling(parameters, lr=0.01)

    return recipe.replace(optimizer=optimizer)


def test_ctrl_c_after_a_bad_step_keeps_the_last_good_checkpoint(regression, tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(steep.Interrupted, match=r"after step 5, where a parameter is not finite.*of step 4"):
        steep.fit(spoiled(regression, bad=5, interrupted=5), checkpoint=path, evaluate_every=2, progress=False)
    state = checkpoint.load(path)
    assert len(state["history"]["losses"]) == 4
    assert all(p.isfinite().all() for p in state["parts"]["model"].values())


def test_ctrl_c_after_a_bad_step_with_no_checkpoint_says_that_nothing_was_saved(regression, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(steep.Interrupted, match=r"not finite, so nothing was saved$"):
        steep.fit(spoiled(regression, bad=3, interrupted=3), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_names_the_step_of_the_last_good_checkpoint(regression, tmp_path):
    path = tmp_path / "run.pt"
    recipe = spoiled(regression, bad=7, interrupted=None)
    with pytest.raises(steep.NonFinite, match=r"at step 7 .*last finite checkpoint is .*run\.pt, of step 6"):
        steep.fit(recipe, checkpoint=path, evaluate_every=3, progress=False)
    with pytest.raises(steep.NonFinite, match="before the first checkpoint"):
        steep.fit(spoiled(regression, bad=1, interrupted=None), checkpoint=tmp_path / "other.pt", progress=False)


@pytest.mark.parametrize(("every", "saved"), [(0.0, [2, 4, 6, 8, 10]), (2.5, [6, 10]), (1e9, [10])])
def test_save_every_is_the_least_time_between_checkpoints(regression, tmp_path, monkeypatch, every, saved):
    """On a clock that advances by one second at each evaluation: saved at the first evaluation that is due, and at the
    end."""
    clock, steps = [0.0], []
    monkeypatch.setattr(saver.time, "monotonic", lambda: clock[0])
    save_if_due, save = Saver.save_if_due, Saver.save

    def ticking(self):
        clock[0] += 1.0
        save_if_due(self)

    def noting(self):
        steps.append(self.training.step)
        return save(self)

    monkeypatch.setattr(Saver, "save_if_due", ticking)
    monkeypatch.setattr(Saver, "save", noting)
    recipe = regression.replace(budget=steep.Budget(steps=10))
    steep.fit(recipe, checkpoint=tmp_path / "run.pt", save_every=every, evaluate_every=2, progress=False)
    assert steps == saved
