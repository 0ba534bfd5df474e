"""Machines that share a study: runs claimed once, records that count for all, dead machines replaced, refusals."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from typer.testing import CliRunner

from steep.cli import app
from steep.evidence.planning import REPORT_SECONDS, agreed
from steep.evidence.runs import shared as module
from steep.evidence.runs.dry_runs import DryRuns
from steep.evidence.runs.jobs import DryRun, Job
from steep.evidence.runs.shared import alone, database, finished, join, without_passwords
from steep.evidence.runs.source import from_name
from steep.evidence.runs.store import Store, StoreError
from steep.evidence.runs.workers import Failure, Workers
from steep.evidence.study import RunRecord
from steep.loop.training import RunError
from steep.recipe import Budget

SIZES = ["--trials", "1", "--seeds", "2", "--workers", "1"]  # those of `undisturbed`
QUICK = "from steep.evidence.runs import shared; shared.BEAT, shared.GRACE = 1, 3; from steep.cli import main; main()"
POSTGRES = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A PostgreSQL server of our own on a private socket; its URL."""
    if not (POSTGRES / "initdb").exists():
        pytest.skip(f"no PostgreSQL at {POSTGRES}")
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("PostgreSQL refuses to run as root, and there is no setpriv to run it as nobody")
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/steep-XXXXXX"], text=True).strip())  # a short path
    user = ["setpriv", "--reuid=nobody", "--clear-groups"] if os.geteuid() == 0 else []
    if user:
        shutil.chown(folder, "nobody")
    control = [*user, str(POSTGRES / "pg_ctl"), "-D", str(folder / "db"), "-w", "-l", str(folder / "log")]
    make = [*user, str(POSTGRES / "initdb"), "-D", str(folder / "db"), "-A", "trust", "-U", "steep", "--no-sync"]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    options = f"-F -c listen_addresses='' -k {folder}"
    subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    yield f"postgresql://steep@/postgres?host={folder}"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    shutil.rmtree(folder)


def machine(recipe, out, url):
    """`steep compare` as on a machine of its own, in a process group of its own; signs of life come fast."""
    command = ["compare", f"{recipe}:recipe", "--methods", "adabelief", *SIZES, "--out", str(out)]
    started = [sys.executable, "-c", QUICK, *command, "--storage", url]
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(started, start_new_session=True, stdout=log, stderr=log)


def finished_trials(url):
    """By key, the trials of a shared study that finished."""
    with connected(url) as studies:
        found = {}
        for trial in studies.study.get_trials():
            if trial.state == TrialState.COMPLETE:
                found.setdefault(trial.user_attrs["key"], []).append(trial)
        return found


def connected(url):
    """The comparison's study there."""
    place = database(url).render_as_string(hide_password=False)
    (name,) = (name for name in optuna.get_all_study_names(place) if name.startswith("steep "))
    return join(url, name)


def record(**changes):
    values = {"key": "k", "arm": "baseline", "role": "tune", "methods": [], "lr_scale": 1.0, "seed": 0}
    return RunRecord(**values | {"split_seed": 0, "budget": {"steps": 1}, "outcome": "finished"} | changes)


def jobs(count):
    return {f"key{i}": Job("baseline", "tune", (), i, i, Budget(steps=1)) for i in range(count)}


def runs(out):
    return {path.name: path.read_text() for path in (out / "runs").glob("*.json")}


def test_two_processes_share_a_file_and_end_with_the_same_records(kills, undisturbed, tmp_path):
    recipe, expected = undisturbed
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    processes = [machine(recipe, tmp_path / name, url) for name in ("a", "b")]
    assert [p.wait(150) for p in processes] == [0, 0], (tmp_path / "a.log").read_text()
    assert [kills.table(Store(tmp_path / name).study()) for name in ("a", "b")] == [expected, expected]
    assert runs(tmp_path / "a") == runs(tmp_path / "b")
    done = finished_trials(url)
    assert {f"{key}.json" for key in done} == set(runs(tmp_path / "a"))
    assert all(len(trials) == 1 for trials in done.values())
    checks = [(tmp_path / name / "dry_runs.json").read_text() for name in ("a", "b")]
    assert checks[0] == checks[1]


def test_the_survivor_of_a_kill_ends_with_the_undisturbed_table(kills, undisturbed, server, tmp_path):
    recipe, expected = undisturbed
    victim, survivor = (machine(recipe, tmp_path / name, server) for name in ("a", "b"))
    while len(runs(tmp_path / "a")) < 6 and victim.poll() is None:
        time.sleep(0.05)
    os.killpg(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    before = finished_trials(server)
    assert before
    assert survivor.wait(150) == 0, (tmp_path / "b.log").read_text()
    assert kills.table(Store(tmp_path / "b").study()) == expected
    after = finished_trials(server)
    assert all(len(trials) == 1 for trials in after.values())
    assert len(after) > len(before)
    assert all(after[key] == trials for key, trials in before.items())  # also when they were finished
    left, counting = runs(tmp_path / "a"), runs(tmp_path / "b")
    assert sum(counting[name] != text for name, text in left.items()) <= 1  # finished as the kill came, not handed over


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return request.getfixturevalue("server") if request.param == "postgresql" else f"sqlite:///{tmp_path / 'shared.db'}"


def test_racing_machines_claim_every_run_exactly_once(url):
    wanted, start = jobs(20), threading.Barrier(4)

    def claim_all(_):
        with join(url, "race") as shared:
            start.wait()
            mine = []
            while claimed := shared.claim(shared.trials_of(wanted), 2):
                mine += claimed
                for key in claimed:
                    shared.finish(key, {"by": key}, 0.0)
            return mine

    with ThreadPoolExecutor(4) as threads:
        claimed = [key for mine in threads.map(claim_all, range(4)) for key in mine]
    assert sorted(claimed) == sorted(wanted)
    with join(url, "race") as shared:
        assert dict(finished(shared.trials_of(wanted))) == {key: {"by": key} for key in wanted}


def test_the_first_trial_that_has_not_failed_counts(tmp_path):
    url, wanted = f"sqlite:///{tmp_path / 'shared.db'}", jobs(1)
    with join(url, "s") as a, join(url, "s") as b:
        a.trials_of(wanted)
        b.study.add_trial(a.study.trials[0])  # as if both had enqueued it at once
        assert [t.state for t in a.study.trials] == [TrialState.WAITING] * 2
        assert b.claim(b.trials_of(wanted), 9) == ["key0"]
        assert a.claim(a.trials_of(wanted), 9) == []
        assert [t.state for t in a.study.trials] == [TrialState.RUNNING, TrialState.WAITING]
        b.release()
        assert a.trials_of(wanted)["key0"].number == 1
        assert a.claim(a.trials_of(wanted), 9) == ["key0"]


def test_a_silent_machine_loses_its_run_and_its_late_record_does_not_count(url, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 1000)
    wanted = jobs(1)
    with join(url, "silence") as silent:
        assert silent.claim(silent.trials_of(wanted), 1) == ["key0"]
        monkeypatch.setattr(module, "BEAT", 1)
        monkeypatch.setattr(module, "GRACE", 1)
        with join(url, "silence") as other:
            deadline = time.monotonic() + 20
            while not other.claim(other.trials_of(wanted), 1):
                assert time.monotonic() < deadline
                time.sleep(0.2)
            time.sleep(2.5)  # longer than GRACE: a beating machine keeps what it has
            assert other.trials_of(wanted)["key0"].state == TrialState.RUNNING
            silent.finish("key0", {"by": "silent"}, 0.0)
            assert dict(finished(other.trials_of(wanted))) == {}
            other.finish("key0", {"by": "other"}, 0.0)
            assert dict(finished(silent.trials_of(wanted))) == {"key0": {"by": "other"}}


def test_what_the_first_machine_gives_counts_for_all(tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    with join(url, "s") as a, join(url, "s") as b, join(url, "another study") as c:
        assert b.agree("steps", None) is None
        assert a.agree("steps", [1, 0.1]) == [1, 0.1]
        assert b.agree("steps", [2]) == b.agree("steps", None) == [1, 0.1]
        assert b.agree("other", "x") == "x"
        assert c.agree("steps", None) is None
        a.study.add_trial(b.study.trials[1])
        assert a.agree("other", "y") == "x"


def test_machines_plan_alike_whatever_their_own_measurements_and_workers(tmp_path):
    with join(f"sqlite:///{tmp_path / 'shared.db'}", "s") as shared:
        quick = DryRuns(tmp_path / "a", {"baseline": "key"}, shared.agree)
        quick.add({"baseline": DryRun(0.1, 0.2, 3)})
        slow = DryRuns(tmp_path / "b", {"baseline": "key"}, shared.agree)
        assert slow.known == {"baseline": DryRun(0.1, 0.2, 3)}
        slow.add({"baseline": DryRun(9.0, 9.0, 3)})
        assert slow.known == quick.known
        cost, tuned = {"baseline": 10.0, "adamw": 10.0}, {"baseline": True, "adamw": True}
        asked = {"minutes": 3.0, "trials": None, "seeds": None, "sequential": False}
        first = agreed(shared.agree, cost, tuned, 8, **asked)
        other = agreed(shared.agree, cost, tuned, 1, **asked)
        assert (other.trials, other.seeds, other.interim_analyses) == (
            first.trials,
            first.seeds,
            first.interim_analyses,
        )
        assert other.seconds - REPORT_SECONDS == pytest.approx(8 * (first.seconds - REPORT_SECONDS))
        with pytest.raises(ValueError, match="too few"):
            agreed(alone, cost, tuned, 1, **asked)


def test_a_run_travels_with_its_picture(tmp_path):
    a, b = Store(tmp_path / "a"), Store(tmp_path / "b")
    (a.directory / "pictures" / "k.png").write_bytes(b"\x89PNG")
    sent = record(picture="pictures/k.png", curve=[{"step": 1, "loss": 0.5}], methods=[("sven", {"lr": 0.1})])
    a.put(sent)
    b.put(record(seconds=9.0))  # our own run of that key gives way
    assert b.unpack("k", a.pack(sent)) == a.get("k") == b.get("k")
    assert (b.directory / "pictures" / "k.png").read_bytes() == b"\x89PNG"
    written = b.run_path("k").stat().st_mtime_ns
    b.unpack("k", a.pack(sent))
    assert b.run_path("k").stat().st_mtime_ns == written
    outside = a.pack(replace(sent, key="../../x", picture="pictures/k.png"))
    assert b.unpack("k", outside) == sent  # a database cannot name files
    with pytest.raises(StoreError, match="newer steep"):
        b.unpack("k", a.pack(sent) | {"format": 99})


def test_a_shared_study_of_the_previous_format_is_refused_and_left_alone(tmp_path):
    url, packed = f"sqlite:///{tmp_path / 'shared.db'}", {"format": 1, "run": {"role": "twin"}, "picture": ""}
    trial = create_trial(value=0.5, user_attrs={"key": "k", "run": packed})
    old = optuna.create_study(storage=url, study_name="s")
    old.add_trial(trial)
    told = r"the study in sqlite.*shared\.db was written by an older steep \(format 1; .*choose another --storage"
    with pytest.raises(StoreError, match=told), join(url, "s"):
        pass
    again = optuna.load_study(storage=url, study_name="s")
    assert (again.user_attrs, [t.user_attrs for t in again.trials]) == ({}, [trial.user_attrs])
    with pytest.raises(StoreError, match=r"a run in the shared database was written by an older steep"):
        Store(tmp_path / "a").unpack("k", packed)
    with join(url, "another study") as shared:
        assert shared.study.user_attrs == {"steep format": 2}
    with join(url, "another study") as shared:
        shared.study.set_user_attr("steep format", 3)
    with pytest.raises(StoreError, match="newer steep"), join(url, "another study"):
        pass


def test_runs_of_the_own_store_are_handed_over_and_others_are_taken_without_training(undisturbed, tmp_path):
    source, url = from_name(f"{undisturbed[0]}:recipe"), f"sqlite:///{tmp_path / 'shared.db'}"
    wanted, stores = list(jobs(3).values()), [Store(tmp_path / name) for name in ("a", "b")]
    workers = [Workers(source, store, 2) for store in stores]  # not started: they cannot train
    keys = [job.key(source, workers[0].code(job)) for job in wanted]
    for i, key in enumerate(keys):
        stores[0].put(record(key=key, seed=i, outcome="diverged"))
    stores[1].put(record(key=keys[1], seed=1, seconds=9.0))  # made apart, before they shared anything
    with join(url, "s") as workers[0].shared, join(url, "s") as workers[1].shared:
        assert [r.seed for r in workers[0].run(wanted)] == [0, 1, 2]
        assert [r.outcome for r in workers[1].run(wanted)] == ["diverged"] * 3
        assert [t.state for t in workers[0].shared.study.trials] == [TrialState.COMPLETE] * 3
    assert runs(stores[0].directory) == runs(stores[1].directory)


def test_a_run_that_raises_is_given_back(undisturbed, tmp_path):
    class Broken:
        def submit(self, *_):
            future = Future()
            future.set_result(Failure("ValueError", "no such file", "x.py, line 1"))
            return future

    workers = Workers(from_name(f"{undisturbed[0]}:recipe"), Store(tmp_path / "out"), 2)
    workers.executor = Broken()
    with join(f"sqlite:///{tmp_path / 'shared.db'}", "s") as workers.shared:
        with pytest.raises(RunError, match="no such file"):
            workers.run(list(jobs(3).values()))
        states = [t.state for t in workers.shared.study.trials]
    assert states == [TrialState.FAIL, TrialState.FAIL, TrialState.WAITING]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("shared.db", "not the URL of a database: write sqlite:///FILE"),
        ("postgresql://h:port/d", "not the URL of a database"),
        ("mysql://root@host/db", "driver 'mysql' is not supported"),
        ("postgresql+psycopg2://host/db", "driver 'postgresql+psycopg2' is not supported"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        (
            "sqlite:////no/such/folder/shared.db",
            "cannot reach the database sqlite:////no/such/folder/shared.db: unable",
        ),
    ],
)
def test_unusable_databases_are_refused_before_anything_is_trained(url, message, undisturbed, tmp_path):
    assert message in refused(url, undisturbed, tmp_path)


def test_a_server_that_is_down_is_refused_without_showing_the_password(undisturbed, tmp_path):
    pytest.importorskip("psycopg")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = refused(f"postgresql://me:secret@127.0.0.1:{port}/db", undisturbed, tmp_path)
    assert f"cannot reach the database postgresql+psycopg://me:***@127.0.0.1:{port}/db" in told
    assert "refused" in told
    assert "secret" not in told


def test_a_missing_driver_says_what_to_install(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert "pip install 'steep[postgres]'" in refused("postgresql://host/db", undisturbed, tmp_path)


def refused(url, undisturbed, tmp_path):
    recipe, _ = undisturbed
    command = ["compare", f"{recipe}:recipe", "--methods", "adabelief", *SIZES, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--storage", url])
    assert result.exit_code == 2
    assert not list(tmp_path.rglob("runs/*.json"))
    assert not list(tmp_path.rglob("dry_runs.json"))
    return result.stderr


def test_a_file_that_is_no_database_is_refused_and_left_alone(undisturbed, tmp_path):
    (tmp_path / "notes.txt").write_text("not a database" * 100)
    told = refused(f"sqlite:///{tmp_path / 'notes.txt'}", undisturbed, tmp_path)
    assert "cannot use the database" in told
    assert "file is not a database" in told
    assert (tmp_path / "notes.txt").read_text() == "not a database" * 100


def test_a_database_that_goes_away_is_named(tmp_path):
    path = tmp_path / "shared.db"

    def work():
        with join(f"sqlite:///{path}", "s") as shared:
            shared.storage.engine.dispose()
            path.write_bytes(b"not a database" * 100)
            shared.trials_of(jobs(1))

    with pytest.raises(StoreError, match=r"lost the database sqlite.*rerun the same command to resume"):
        work()


def test_passwords_are_left_out_of_the_command_that_a_report_shows():
    words = ["--storage", "postgresql://me:s3:cr%40t@host:5432/db", "a:b", "--out=x@y"]
    assert without_passwords(words) == ["--storage", "postgresql://me@host:5432/db", "a:b", "--out=x@y"]
    assert without_passwords(["--storage=postgresql://me@host/db"]) == ["--storage=postgresql://me@host/db"]


def test_postgresql_means_psycopg():
    assert database("postgresql://me@host/db").drivername == "postgresql+psycopg"
    assert database("postgresql+psycopg://me@host/db").drivername == "postgresql+psycopg"
    assert database("sqlite:///x.db").drivername == "sqlite"
