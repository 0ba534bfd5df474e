"""kill -9 over a running compare, scaled down from `benchmarks/kills.py`; and what the benchmark would notice."""

import json
from dataclasses import replace

from steep.evidence.runs.source import from_name
from steep.evidence.runs.store import Store
from steep.evidence.runs.workers import Workers
from steep.evidence.study import RunRecord


def record(**changes):
    values = {"key": "k", "arm": "baseline", "role": "tune", "methods": [], "lr_scale": 1.0, "seed": 0}
    return RunRecord(**values | {"split_seed": 0, "budget": {"steps": 1}, "outcome": "finished"} | changes)


def test_killed_studies_end_with_the_table_of_an_undisturbed_one(kills, undisturbed, tmp_path):
    recipe, expected = undisturbed
    # a worker after about 5 seconds, then all processes early after the restart
    *_, found = kills.killed_studies(recipe, tmp_path, 2, 7.0, expected, (1, 2), seed=2)
    assert found["kills"] == found["group"] + found["worker"] == 2
    assert found["wrong"] == []
    assert found["errors"] == 0
    assert found["same_table"] == found["studies"] > 0


def test_the_watch_sees_a_run_made_again_lost_or_cut(kills, tmp_path):
    store, watch = Store(tmp_path), kills.Watch(tmp_path)
    store.put(record(key="a"))
    store.put(record(key="b"))
    assert watch.problems() == watch.problems() == []
    store.put(record(key="a"))  # the same content, written again
    assert watch.problems() == ["a.json changed or vanished"]
    store.run_path("b").unlink()
    assert watch.problems() == ["b.json changed or vanished"]
    store.run_path("c").write_text(json.dumps(record().to_json())[:50])
    assert "c.json is not whole" in watch.problems()


def test_only_measured_times_are_left_out_of_the_comparison(kills):
    run = record(curve=[{"step": 1, "loss": 0.5, "seconds": 1.0}])
    assert kills.unmeasured(run) == kills.unmeasured(replace(run, seconds=9.0, cpu_seconds=9.0))
    assert kills.unmeasured(run) == kills.unmeasured(replace(run, curve=[{"step": 1, "loss": 0.5, "seconds": 2.0}]))
    assert kills.unmeasured(run) != kills.unmeasured(replace(run, curve=[{"step": 1, "loss": 0.6, "seconds": 1.0}]))
    assert kills.unmeasured(run) != kills.unmeasured(replace(run, digest="other"))


def test_drafts_of_a_killed_writer_are_cleared_when_a_comparison_starts(tmp_path):
    store = Store(tmp_path)
    draft = tmp_path / "runs" / ".k.json.0123.part"
    draft.write_text("{")
    store.put(record())
    with store.lock():
        assert not draft.exists()
        assert [r.key for r in store.records()] == ["k"]


def test_a_worker_killed_in_a_dry_run_is_replaced(kills, tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(kills.RECIPE)
    with Workers(from_name(f"{path}:recipe"), Store(tmp_path / "out"), 1) as workers:
        mark = str(tmp_path / "mark")
        die = f"open({mark!r}, 'w').close(), __import__('os').kill(__import__('os').getpid(), 9)"
        code = f"__import__('os').path.exists({mark!r}) or ({die})"
        assert workers.apply(eval, [(code,)]) == [True]
