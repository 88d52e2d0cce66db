"""Whole runs, as a user starts, interrupts, resumes, breaks and evaluates them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import yaml
from running import (
    assert_identical,
    assert_same_run,
    checkpoint_arrays,
    driver,
    environment,
    hasty_compiler,
    metarl,
    no_figures,
    own_configs,
    result,
    rows,
    small,
    train,
    tree,
    walker,
)

import metarl_cli
from metarl_cli import checkpoint, config, logs, optimality, runner
from metarl_cli.core.errors import ConfigError, RunError
from metarl_cli.core.types import Trial

WALK = walker("iterations=12", "eval.every=4", "log_every=2")
DRAW, DRAWN = runner.Point.draw, runner.drawn


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    with hasty_compiler():
        yield


class Finished(NamedTuple):
    run: Path
    output: str


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """Without figures and optimum, which take most of the time of a small run; `finished` has them."""
    with pytest.MonkeyPatch.context() as patch:
        no_figures(patch)
        patch.setattr(optimality, "compare", lambda *_: {})
        yield


@pytest.fixture(scope="module", params=[("maml", "point_nav"), ("rl2", "bandit")], ids=["maml", "rl2"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished run, for tests that only read. The directory was given by a relative path, as users do."""
    directory = tmp_path_factory.mktemp("runs")
    output = io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(output):
        train(Path("a run/of mine"), small(*request.param, "iterations=5", "log_every=2"))
    return Finished(directory / "a run" / "of mine", output.getvalue())


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    """A copy of it, for tests that change it."""
    return shutil.copytree(finished.run, tmp_path / "copy")


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the walker, which also keeps its best state."""
    with bare():
        return train(tmp_path_factory.mktemp("walked") / "run", WALK)


@pytest.fixture(autouse=True)
def bare_runs() -> Iterator[None]:
    with bare():
        yield


def digests(run: Path) -> dict[str, str]:
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- what a run leaves behind


def test_the_run_directory(finished: Finished) -> None:
    assert sorted(path.name for path in finished.run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "evaluation.npz",
        "figures",
        "log.txt",
        "metrics.jsonl",
        "overrides.yaml",
        "result.json",
    ]
    assert [path.name for path in (finished.run / "checkpoints").iterdir()] == ["last"]
    assert checkpoint.latest(finished.run, "last") == 5
    assert "metarl train algo=" in (finished.run / "log.txt").read_text()


def test_the_figures(finished: Finished) -> None:
    names = ["adaptation_curve", "learning_curve", "trajectories"]
    expected = [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert tree(finished.run / "figures") == expected
    for name in names:
        assert (finished.run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (finished.run / "figures" / f"{name}.svg").read_text()[:2000]


def test_the_recorded_config_composes_to_itself(finished: Finished) -> None:
    overrides = yaml.safe_load((finished.run / "overrides.yaml").read_text())
    assert overrides[-1] == "hydra.run.dir='a run/of mine'"
    composed = config.compose(overrides)
    recorded = yaml.safe_load((finished.run / "config.yaml").read_text())
    assert recorded.pop("choices") == {"algo": composed.algo, "env": composed.env}
    assert recorded == composed.resolved
    assert config.from_run(finished.run, [], allowed=()).config == composed.config


def test_the_keys_of_the_result(finished: Finished) -> None:
    """The documented, stable format."""
    content = result(finished.run)
    algo, env = content["algorithm"], content["family"]
    assert (algo, env) in (("maml", "point_nav"), ("rl2", "bandit"))
    assert set(content) == {
        "schema_version",
        "status",
        "algorithm",
        "family",
        "seeds",
        "failed_seeds",
        "date",
        "overrides",
        "train",
        "best",
        "memory",
        "device",
        "versions",
        "git_revision",
        "evaluation",
    }
    assert (content["schema_version"], content["status"]) == (1, "completed")
    assert (content["seeds"], content["failed_seeds"], content["best"]) == ([0, 1], [], None)

    spent = content["train"]
    assert set(spent) == {"iterations", "runs", "steps", "steps_per_second", "compile_seconds", "wall_seconds"}
    assert spent["iterations"] == 5 and spent["steps"] > 0
    assert 0 < spent["compile_seconds"] < spent["wall_seconds"]
    assert content["memory"]["peak_bytes"] > 1e8
    assert content["device"]["platform"] == jax.devices()[0].platform
    assert content["versions"]["jax"] == jax.__version__ and "python" in content["versions"]

    (split,) = content["evaluation"]
    evaluation = content["evaluation"][split]
    assert split == "test"
    assert {"curve", "trial_return"} | ({"trial_regret", "optimum"} if env == "bandit" else set()) <= set(evaluation)
    spread = {"mean", "iqm", "ci_low", "ci_high", "n_tasks", "n_seeds", "interval_over"}
    # MAML: 3 adaptation steps of 2 episodes each; RL^2: 4 pulls, of which training has seen 2.
    assert len(evaluation["curve"]) == (4 if algo == "maml" else 2)
    for point in evaluation["curve"]:
        assert set(point) == {"episodes", "steps", *spread}
        assert (point["n_tasks"], point["n_seeds"], point["interval_over"]) == (6, 2, "seeds, tasks")
        assert point["ci_low"] <= point["mean"] <= point["ci_high"]
    assert set(evaluation["trial_return"]) == spread
    assert (evaluation["curve"][0]["episodes"], evaluation["curve"][0]["steps"]) == (0, 0)


def test_the_arrays_are_what_the_curve_was_made_of(finished: Finished) -> None:
    evaluation = result(finished.run)["evaluation"]["test"]
    curve = evaluation["curve"]
    with np.load(finished.run / "evaluation.npz") as arrays:
        returns, steps, seeds = (arrays[name] for name in ("returns", "steps", "seeds"))
    episodes = curve[1]["episodes"]
    assert returns.shape == steps.shape == (2, 6, len(curve), episodes)  # [S, N, P, K]
    assert seeds.tolist() == [0, 1]
    np.testing.assert_allclose([point["mean"] for point in curve], returns.mean((0, 1, 3)))
    assert [point["episodes"] for point in curve] == [i * episodes for i in range(len(curve))]
    spent = steps.sum(3).mean((0, 1)).cumsum()
    np.testing.assert_allclose([point["steps"] for point in curve], [0, *spent[:-1]])
    np.testing.assert_allclose(evaluation["trial_return"]["mean"], returns.sum((2, 3)).mean())


def test_the_metrics(finished: Finished) -> None:
    """Windows of 2, 2 and 1 iterations; a value per seed."""
    lines = rows(finished.run, timing=True)
    assert [line["iteration"] for line in lines] == [2, 4, 5]
    assert all(lines[i]["steps"] < lines[i + 1]["steps"] for i in range(2))
    assert lines[-1]["steps"] == result(finished.run)["train"]["steps"]
    for line in lines:
        assert {"return_before", "return_after", "trial_return", "seconds", "steps_per_second"} <= line.keys()
        metrics = {k: v for k, v in line.items() if k not in ("iteration", "steps", "seconds", "steps_per_second")}
        assert all(len(value) == 2 and all(map(math.isfinite, value)) for value in metrics.values())
        assert line["seconds"] > 0 and line["steps_per_second"] > 0


def test_what_is_printed(finished: Finished) -> None:
    curve = result(finished.run)["evaluation"]["test"]["curve"]
    assert "2 seeds" in finished.output and "6 test tasks" in finished.output
    assert "iteration 5/5" in finished.output
    for point in curve:
        assert f"{point['mean']:.2f}" in finished.output
    assert "a run/of mine" in finished.output.splitlines()[-1]


# --- evaluating a finished run again


def evaluations(run: Path) -> list[Path]:
    folder = run / "evaluations"
    return sorted(folder.glob("*.json")) if folder.is_dir() else []


def test_evaluating_again_gives_the_recorded_numbers(run: Path) -> None:
    before = digests(run)
    assert metarl("eval", run) == 0
    (path,) = evaluations(run)
    recorded = result(run)["evaluation"]["test"]
    recorded.pop("optimum", None)
    assert json.loads(path.read_text())["evaluation"]["test"] == recorded
    with np.load(path.with_suffix(".npz")) as again, np.load(run / "evaluation.npz") as recorded:
        assert_identical(dict(again), dict(recorded))
    new = {name for name in digests(run) if name not in before}
    assert new == {f"evaluations/{path.stem}.json", f"evaluations/{path.stem}.npz"}
    assert {name: value for name, value in digests(run).items() if name in before} == before


def test_each_evaluation_gets_its_own_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(run)
    for _ in range(2):
        assert metarl("eval", run, "eval.split=ood", "eval.tasks=6") == 0
    first, second = evaluations(run)
    content = json.loads(first.read_text())
    assert content["evaluation"].keys() == {"ood"}
    assert content["evaluation"]["ood"]["curve"][0]["n_tasks"] == 6
    assert content["overrides"] == ["eval.split=ood", "eval.tasks=6"]
    assert content["schema_version"] == 1 and content["seeds"] == [0, 1]
    assert json.loads(second.read_text())["evaluation"] == content["evaluation"] != result(run)["evaluation"]
    assert str(second) in capsys.readouterr().out
    assert {name: value for name, value in digests(run).items() if name in before} == before


def test_another_budget_and_another_family(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(finished.run, tmp_path / "copy")
    if result(run)["family"] == "point_nav":
        assert metarl("eval", run, "eval.episodes=4", "env.horizon=3") == 0
        (path,) = evaluations(run)
        curve = json.loads(path.read_text())["evaluation"]["test"]["curve"]
        assert [(point["episodes"], point["steps"]) for point in curve] == [(0, 0), (2, 6)]
        return
    assert metarl("eval", run, "eval.episodes=20", "env.n=20") == 0
    (path,) = evaluations(run)
    curve = json.loads(path.read_text())["evaluation"]["test"]["curve"]
    assert [point["episodes"] for point in curve] == list(range(20))

    # Seven arms are another network.
    capsys.readouterr()
    assert metarl("eval", run, "env.k=7") == 2
    message = capsys.readouterr().err
    assert "does not fit" in message and "other settings" in message and "params" in message
    assert len(message.splitlines()) == 1
    assert evaluations(run) == [path]


@pytest.mark.parametrize("words", [["eval.split=odd"], ["algo=rl2"], ["seed=3"], ["eval.checkpoint=best"]])
def test_what_cannot_be_evaluated(
    finished: Finished, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(finished.run)
    assert metarl("eval", finished.run, *words) == 2
    message = capsys.readouterr().err
    assert words[0] in message and len(message.splitlines()) == 1
    assert digests(finished.run) == before


@pytest.mark.parametrize("words", [["eval.split=ood"], ["algo.lr=1"], ["seeds=3"], ["env.n=9"]])
def test_what_a_resumed_run_keeps(finished: Finished, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(finished.run)
    assert metarl("resume", finished.run, *words, "iterations=9") == 2
    message = capsys.readouterr().err
    assert f"{words[0]}: cannot be changed in an existing run. Allowed: iterations, device, devices, logger." in message
    assert digests(finished.run) == before


def test_a_run_in_a_notebook(finished: Finished) -> None:
    loaded = metarl_cli.load(finished.run)
    assert loaded.result == result(finished.run)
    assert [line["iteration"] for line in loaded.metrics] == [2, 4, 5]
    assert jax.tree.leaves(loaded.state)[0].shape[0] == 2
    first = jax.tree.map(lambda x: x[0], loaded.state)
    plan = loaded.learner.plan(loaded.family, loaded.config.eval)
    task = loaded.family.sample(jax.random.key(0), "test")
    trial: Trial = jax.jit(loaded.learner.trial)(first, jax.random.key(1), loaded.family, task, plan)
    assert trial.returns.shape == (plan.points, plan.episodes)
    assert np.isfinite(trial.returns).all()
    with pytest.raises(ConfigError, match="keeps no best state"):
        metarl_cli.load(finished.run, checkpoint="best")
    with pytest.raises(RunError, match="no run directory"):
        metarl_cli.load(finished.run / "figures")


# --- interrupting and resuming

SLOWLY = """
import time
runner.CHUNK_SECONDS = 0
write = logs.MetricsFile.write
logs.MetricsFile.write = lambda *row: (write(*row), time.sleep(0.2))
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_a_resumed_run_equals_an_uninterrupted_one(
    signum: signal.Signals, code: int, walked: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [f"--config-dir={own_configs(tmp_path)}", *WALK, f"hydra.run.dir={run}"]
    command = driver(SLOWLY, "train", *words)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("iteration"):
                break
        process.send_signal(signum)
        sent = time.monotonic()
        errors = process.stderr.read()
    assert process.returncode == code, errors
    assert time.monotonic() - sent < 5
    assert f"metarl resume {run}" in errors and "Traceback" not in errors

    done = checkpoint.latest(run, "last")
    assert done is not None and 0 < done < 12
    assert not (run / "result.json").exists() and not (run / ".lock").exists()
    assert metarl("resume", run) == 0
    assert_same_run(run, walked)


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(walked: Path, tmp_path: Path) -> None:
    """Killed while it writes the line of iteration 10, the last checkpoint being that of iteration 6."""
    run = tmp_path / "run"
    patch = """
import os, signal
runner.CHUNK_SECONDS, runner.SAVE_SECONDS = 0, -1
write = logs.MetricsFile.write
def slow(self, row):
    if row["iteration"] == 8:
        runner.SAVE_SECONDS = 1e9
    if row["iteration"] == 10:
        self._file.write('{"iteration": 10, "ste')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, row)
logs.MetricsFile.write = slow
"""
    words = [f"--config-dir={own_configs(tmp_path)}", *WALK, f"hydra.run.dir={run}"]
    process = subprocess.run(driver(patch, "train", *words), env=environment(), capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert checkpoint.latest(run, "last") == 7
    assert (
        len((run / "metrics.jsonl").read_text().splitlines()) == 7
    )  # 2, 4, evaluation at 4, 6, 8, evaluation at 8, half of 10
    assert metarl("resume", run) == 0
    assert_same_run(run, walked)


class Killed(BaseException):
    """As if by `kill -9`: nothing that the runner could catch."""


def at_iteration(iteration: int, do: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`do(session)` once that many meta-iterations are done; chunks are of one iteration each until then."""
    original = runner.Session.report_failures

    def report_failures(session: Any, *args: Any) -> None:
        original(session, *args)
        if session.done == iteration:
            monkeypatch.undo()
            do(session)

    monkeypatch.setattr(runner, "CHUNK_SECONDS", 0)
    monkeypatch.setattr(runner.Session, "report_failures", report_failures)


def kill(*_: Any) -> None:
    raise Killed


@pytest.mark.parametrize(
    ("algo", "env", "more"),
    [
        ("rl2", "bandit", []),
        ("maml", "point_nav", ["algo.normalize_observations=true", "algo.normalize_rewards=true"]),
    ],
    ids=["rl2", "maml"],
)
def test_every_bit_of_a_real_learner_survives(
    algo: str, env: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle of a window of metrics, and once more between two evaluations."""
    lines = small(algo, env, "iterations=7", "log_every=2", "eval.every=3", *more)
    whole = train(tmp_path / "whole", lines)
    run = tmp_path / "run"

    at_iteration(3, lambda _: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    assert metarl("train", *lines, f"hydra.run.dir={run}") == 143
    assert checkpoint.latest(run, "last") == 3
    monkeypatch.setattr(runner, "SAVE_SECONDS", -1)
    at_iteration(5, kill, monkeypatch)
    with pytest.raises(Killed):
        metarl("resume", run)
    assert checkpoint.latest(run, "last") == 4
    assert metarl("resume", run) == 0
    assert_same_run(run, whole)
    log = (run / "log.txt").read_text()
    assert "at iteration 3 of 7" in log and "at iteration 4 of 7" in log


def test_interrupted_while_compiling(walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    status = logs.Progress.status

    def interrupted(self: logs.Progress, text: str) -> None:
        status(self, text)
        if text == "compiling":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(logs.Progress, "status", interrupted)
    assert metarl("train", f"--config-dir={own_configs(tmp_path)}", *WALK, f"hydra.run.dir={run}") == 130
    monkeypatch.undo()
    assert checkpoint.latest(run, "last") == 0
    assert metarl("resume", run) == 0
    assert_same_run(run, walked)


def test_killed_before_the_first_checkpoint(walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    at_iteration(5, kill, monkeypatch)
    with pytest.raises(Killed):
        train(run, WALK)
    assert checkpoint.latest(run, "last") is None and checkpoint.latest(run, "best") == 4
    assert metarl("resume", run) == 0
    assert_same_run(run, walked)


def test_interrupted_during_the_last_evaluation(walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    at_iteration(12, lambda _: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    assert metarl("train", f"--config-dir={own_configs(tmp_path)}", *WALK, f"hydra.run.dir={run}") == 143
    assert checkpoint.latest(run, "last") == 12 and not (run / "result.json").exists()
    assert metarl("resume", run) == 0
    assert_same_run(run, walked)


@pytest.mark.parametrize("moment", ["save", "finish"])
def test_killed_around_the_last_evaluation(
    moment: str, walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`save`: the score is in the metrics, but not in the checkpoint; `finish`: it is in both, but there is no result."""
    run = tmp_path / "run"
    if moment == "save":
        original, evaluated = runner.Point.save, logs.MetricsFile(run)

        def save(session: Any) -> None:
            if any("evaluation" in row and row["iteration"] == 12 for row in evaluated.read()):
                raise Killed
            original(session)

        monkeypatch.setattr(runner.Point, "save", save)
    else:
        monkeypatch.setattr(runner, "write_json", kill)
    with pytest.raises(Killed):
        train(run, WALK)
    monkeypatch.undo()
    assert [row["iteration"] for row in rows(run) if "evaluation" in row] == [4, 8, 12]
    assert not (run / "result.json").exists()
    assert metarl("resume", run) == 0
    assert_same_run(run, walked)


# --- extending


def test_an_extended_run_equals_the_longer_one(walked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As long as the first end is no end of a window or an evaluation that the longer run has not."""
    run = train(tmp_path / "run", walker("iterations=8", "eval.every=4", "log_every=2"))
    before = digests(run)

    # It has done what it was asked for.
    for words in ([], ["iterations=8"], ["iterations=5"]):
        capsys.readouterr()
        assert metarl("resume", run, *words) == 2
        message = capsys.readouterr().err
        assert "already done 8" in message and "iterations=" in message and len(message.splitlines()) == 1
    assert {k: v for k, v in digests(run).items() if k != "log.txt"} == {k: v for k, v in before.items() if k != "log.txt"}

    assert metarl("resume", run, "iterations=12") == 0
    progress = [row.pop("progress", None) for row in rows(run)]
    assert len(progress) == len(rows(walked))
    for name in ("last", "best"):
        assert_identical(checkpoint_arrays(run, name), checkpoint_arrays(walked, name))  # type: ignore[arg-type]
    for key in ("best", "evaluation", "seeds"):
        assert result(run)[key] == result(walked)[key]
    assert result(run)["train"]["steps"] == result(walked)["train"]["steps"]
    without = [
        [{k: v for k, v in row.items() if k != "progress"} for row in rows(x)] for x in (run, walked)
    ]  # the schedule is that of the length the run had at the time
    assert without[0] == without[1]
    assert config.from_run(run, [], ()).config.iterations == 12


def test_an_extension_that_was_killed_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of the shorter run is still there; that is no reason to call the longer one finished."""
    run = train(tmp_path / "run", walker("iterations=2"))
    monkeypatch.setattr(runner, "write_arrays", kill)
    with pytest.raises(Killed):
        metarl("resume", run, "iterations=4")
    monkeypatch.undo()
    assert result(run)["train"]["iterations"] == 2
    assert metarl("resume", run) == 0
    assert result(run)["train"]["iterations"] == 4


def test_a_run_cannot_be_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    at_iteration(3, lambda _: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    assert metarl("train", f"--config-dir={own_configs(tmp_path)}", *walker(), f"hydra.run.dir={run}") == 143
    capsys.readouterr()
    assert metarl("resume", run, "iterations=2") == 2
    assert "already done 3" in capsys.readouterr().err
    assert config.from_run(run, [], ()).config.iterations == 4


# --- the best checkpoint


def test_the_best_checkpoint_is_the_state_that_was_scored(walked: Path, tmp_path: Path) -> None:
    scores = {row["iteration"]: row["evaluation"] for row in rows(walked) if "evaluation" in row}
    assert list(scores) == [4, 8, 12]
    table = np.array([score["trial_return"] for score in scores.values()])  # [evaluations, S]
    best = result(walked)["best"]
    assert best["trial_return"] == table.max(0).tolist()
    assert best["iteration"] == [[4, 8, 12][i] for i in table.argmax(0)]
    assert len(set(best["iteration"])) > 1, "each seed has its own"
    assert set(best["iteration"]) - {12}, "and the last is not the best of all"

    run = shutil.copytree(walked, tmp_path / "copy")
    assert metarl("eval", run, "eval.checkpoint=best") == 0
    with np.load(evaluations(run)[0].with_suffix(".npz")) as arrays:
        assert np.float32(arrays["returns"].sum((2, 3)).mean(1)).tolist() == best["trial_return"]
    assert metarl("eval", run) == 0
    with np.load(evaluations(run)[1].with_suffix(".npz")) as arrays:
        assert np.float32(arrays["returns"].sum((2, 3)).mean(1)).tolist() == scores[12]["trial_return"]
    assert json.loads(evaluations(run)[1].read_text())["evaluation"] == result(walked)["evaluation"]

    state = metarl_cli.load(walked, checkpoint="best").state
    last = metarl_cli.load(walked).state
    for i, iteration in enumerate(best["iteration"]):
        assert int(state.updates[i]) == iteration
        assert np.array_equal(state.logits[i], last.logits[i]) == (iteration == 12)


def test_a_run_can_end_with_its_best_state(walked: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", [*WALK, "eval.checkpoint=best"])
    assert_identical(checkpoint_arrays(run, "best"), checkpoint_arrays(walked, "best"))
    best = result(run)["best"]
    assert best == result(walked)["best"]
    with np.load(run / "evaluation.npz") as arrays:
        assert np.float32(arrays["returns"].sum((2, 3)).mean(1)).tolist() == best["trial_return"]


# --- seeds that break


@pytest.mark.parametrize("breaks", ["loss", "logits"])
def test_a_broken_seed_is_reported_and_the_others_go_on(
    breaks: str, walked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    luck = np.asarray(metarl_cli.load(walked).state.luck)
    breaking, limit = int(np.argmax(luck)), float(np.sort(luck)[1])
    others = [i for i in range(3) if i != breaking]
    trouble = [f"algo.breaks={breaks}", "algo.breaks_at=5", f"algo.luckier_than={limit}"]
    capsys.readouterr()
    run = train(tmp_path / "run", [*WALK, *trouble])

    assert result(run)["status"] == "completed" and result(run)["failed_seeds"] == [breaking]
    quantity = "loss" if breaks == "loss" else "parameters"
    printed = capsys.readouterr().out.replace("\n", " ")
    assert f"seed {breaking}: {quantity} turned NaN or infinite in meta-iteration 6" in printed
    assert printed.count("turned NaN") == 1
    assert f"seed {breaking}: {quantity}" in (run / "log.txt").read_text()

    for row, good in zip(rows(run), rows(walked), strict=True):
        for name, value in good.items():
            if isinstance(value, list):
                assert [row[name][i] for i in others] == [value[i] for i in others]
        if "loss" in row:
            assert (row["loss"][breaking] is None) == (row["iteration"] > 5)
    state, good = (metarl_cli.load(path).state for path in (run, walked))
    assert_identical(
        jax.tree.map(lambda x: x[np.array(others)], (state, good))[0], jax.tree.map(lambda x: x[np.array(others)], good)
    )
    assert int(state.updates[breaking]) == 5 and np.isfinite(np.asarray(state.logits)).all()
    with np.load(run / "evaluation.npz") as a, np.load(walked / "evaluation.npz") as b:
        np.testing.assert_array_equal(a["returns"][others], b["returns"][others])
        assert np.isfinite(a["returns"]).all()


@pytest.mark.parametrize("every", [0, 2, 10])
def test_a_run_that_diverges_stops_and_keeps_the_last_good_state(
    every: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = train(tmp_path / "good", walker("iterations=3"))
    run = tmp_path / "run"
    lines = walker("iterations=400", f"eval.every={every}", "algo.breaks=loss", "algo.breaks_at=3")
    capsys.readouterr()
    assert metarl("train", f"--config-dir={own_configs(tmp_path)}", *lines, f"hydra.run.dir={run}") == 1
    message = capsys.readouterr().err
    assert "loss turned NaN or infinite in meta-iteration 4" in message
    assert str(run / "checkpoints") in message and "Traceback" not in message and len(message.splitlines()) == 1

    content = result(run)
    assert content["status"] == "diverged" and content["failed_seeds"] == [0, 1, 2]
    assert content["train"]["iterations"] < 400
    assert_identical(metarl_cli.load(run).state, metarl_cli.load(good).state)
    # There is nothing to go on with.
    assert metarl("resume", run) == 2
    assert "diverged in every seed" in capsys.readouterr().err
    # But what there is can be evaluated.
    assert metarl("eval", run) == 0
    assert json.loads(evaluations(run)[0].read_text())["evaluation"] == result(good)["evaluation"]


# --- mistakes

MISTAKES: list[tuple[list[str], str]] = [
    (["algo.inner_lr=-1"], "algo.inner_lr=-1"),
    (["seeds=0"], "seeds=0"),
    (["algo=rl2", "algo.meta_batch=10", "algo.minibatches=4"], "algo.minibatches=4: must divide algo.meta_batch=10"),
    (["env=bandit", "env.n=7", "algo.episodes=2", "eval.adapt.episodes=2"], "must be a multiple of the 2 episodes"),
    (["eval.split=tset"], "Did you mean test?"),
    (["eval.episodes=7", "eval.adapt.episodes=2"], "eval.episodes=7: must be a multiple of the 2 episodes"),
    (["eval.tasks=41"], "eval.tasks=41: the test split of this family is a published set of 40 tasks"),
    (["eval.checkpoint=best"], "eval.checkpoint=best"),
]


@pytest.mark.parametrize(("words", "fragment"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_leaves_no_directory_behind(
    words: list[str], fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner.Session, "go_on", kill)  # it must not come to this
    assert metarl("train", *words) == 2
    message = capsys.readouterr().err
    assert fragment in message and len(message.splitlines()) == 1
    assert tree(tmp_path) == []


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("it is there")
    command = driver("runner.Session = None  # it must not come to this", "train", "device=gpu")
    process = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2, process.stderr
    assert "device=gpu: JAX finds no such device, only cpu" in process.stderr and "Take device=cpu" in process.stderr
    assert tree(tmp_path) == []


@pytest.mark.parametrize("where", ["below a file", "not writable", "full"])
def test_a_directory_that_cannot_be_used(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    run = {"below a file": tmp_path / "file" / "run", "not writable": Path("/proc/run"), "full": tmp_path / "a" / "b"}[where]
    if where == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1_000_000))  # type: ignore[attr-defined]
    monkeypatch.setattr(runner.Session, "go_on", kill)
    assert metarl("train", f"hydra.run.dir={run}") == 2
    message = capsys.readouterr().err
    assert f"hydra.run.dir={run}: " in message and len(message.splitlines()) == 1
    assert ("only 1 MB are free" if where == "full" else "cannot be written") in message
    assert tree(tmp_path) == ["file"]


def test_a_directory_with_a_run_in_it(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(finished.run)
    assert metarl("train", f"hydra.run.dir='{finished.run}'") == 2
    message = capsys.readouterr().err
    assert "already in use" in message and "metarl resume" in message
    assert digests(finished.run) == before


def test_two_runs_of_the_same_second_get_two_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    composed = config.compose([])._replace(run_dir=Path("runs/x"))
    assert [runner.make_directory(composed) for _ in range(3)] == [Path("runs/x"), Path("runs/x-2"), Path("runs/x-3")]


HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(str(os.getpid())); file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_that_another_process_is_working_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run / ".lock")], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            before = digests(run)
            assert metarl("resume", run, "iterations=9") == 2
            assert f"in use by process {holder.pid}" in capsys.readouterr().err
            assert digests(run) == before
        finally:
            holder.kill()


@pytest.mark.parametrize("command", ["resume", "eval"])
def test_a_damaged_checkpoint_is_named(run: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints" / "last" / "5" / "arrays"
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert metarl(command, run, *(["iterations=9"] if command == "resume" else [])) == 2
    message = capsys.readouterr().err
    assert f"{largest} is damaged" in message and len(message.splitlines()) == 1
    assert config.from_run(run, [], ()).config.iterations == 5


def test_the_checkpoint_of_another_algorithm_is_named(run: Path, walked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(walked / "checkpoints", run / "checkpoints")
    for command, words in (("eval", []), ("resume", ["iterations=20"])):
        assert metarl(command, run, *words) == 2
        message = capsys.readouterr().err
        assert f"{run / 'checkpoints' / 'last' / '12'} does not fit: it was saved by another algorithm" in message
        assert len(message.splitlines()) == 1


def test_a_full_disk_during_the_run_is_no_stack_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **arrays: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    run = tmp_path / "run"
    assert metarl("train", f"--config-dir={own_configs(tmp_path)}", *walker(), f"hydra.run.dir={run}") == 2
    message = capsys.readouterr().err
    assert "evaluation.npz cannot be written: No space left on device" in message and len(message.splitlines()) == 1
    monkeypatch.undo()
    # Nothing that was computed is lost.
    assert metarl("resume", run) == 0
    assert result(run)["status"] == "completed"


# --- how it is run


def test_the_length_of_chunks_changes_nothing(walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CHUNK_SECONDS", 0)
    assert_same_run(train(tmp_path / "run", WALK), walked)


def test_one_trace_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import plugin_learner

    def traces(name: str, *more: str) -> int:
        before = plugin_learner.calls["update"]
        run = train(tmp_path / name, walker(*more))
        assert len(rows(run)) == int(more[0].partition("=")[2])
        return plugin_learner.calls["update"] - before

    once = traces("one chunk", "iterations=1", "env.k=3")
    assert 1 <= once <= 2  # for the shapes of the metrics, and for the program
    monkeypatch.setattr(runner, "CHUNK_SECONDS", 1e9)  # 1, 2, 4 and a shorter one
    assert traces("many chunks", "iterations=9", "env.k=4") == once


def test_more_windows_than_a_chunk_can_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CHUNK_SECONDS", 1e9)
    run = train(tmp_path / "run", walker("iterations=600"))
    assert [row["iteration"] for row in rows(run)] == list(range(1, 601))
    # Each seed takes 3 + i steps in iteration i.
    assert [row["steps"] for row in rows(run)] == np.cumsum(3 + np.arange(600)).tolist()


def test_what_is_not_trained_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.Point, "draw", DRAW)
    run = train(tmp_path / "run", small("random_init", "point_nav", "iterations=0"))
    assert result(run)["train"]["iterations"] == 0 and result(run)["status"] == "completed"
    assert tree(run / "figures") == ["adaptation_curve.png", "adaptation_curve.svg", "trajectories.png", "trajectories.svg"]
    assert len(result(run)["evaluation"]["test"]["curve"]) == 4


def test_figures_that_a_kill_cut_off_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner.Point, "draw", DRAW)
    monkeypatch.setattr(runner, "drawn", DRAWN)
    from metarl_cli.report import figures

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(figures, "trajectories", kill)
        train(tmp_path / "run", walker("iterations=2"))
    run, kept = tmp_path / "run", ("result.json", "evaluation.npz", "metrics.jsonl")
    before = {name: digests(run)[name] for name in kept}
    assert metarl("resume", run) == 0
    assert {"trajectories.png", "learning_curve.svg"} <= set(tree(run / "figures"))
    assert {name: digests(run)[name] for name in kept} == before
    capsys.readouterr()
    assert metarl("resume", run) == 2 and "already done 2" in capsys.readouterr().err


def test_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    lines = walker("seeds=1", "seed=0,5")
    assert metarl("train", "-m", f"--config-dir={own_configs(tmp_path)}", *lines, "hydra.sweep.dir=sweep") == 0
    assert "2 runs, none failed" in capsys.readouterr().out
    assert [result(Path("sweep") / f"seed={seed}")["seeds"] for seed in (0, 5)] == [[0], [5]]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone lists and limits the memory maps of a process")
def test_a_sweep_keeps_no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run maps memory more than a thousand times; a process may 65,530 times."""
    maps, go_on = [], runner.Session.go_on

    def counted(session: runner.Session) -> None:
        maps.append(len(Path("/proc/self/maps").read_text().splitlines()))
        go_on(session)

    monkeypatch.setattr(runner.Session, "go_on", counted)
    lines = walker("seeds=1", "env.k=3,4,5", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert metarl("train", "-m", f"--config-dir={own_configs(tmp_path)}", *lines) == 0
    assert len(maps) == 3 and maps[2] - maps[1] < 100


def test_one_seed_is_labelled_as_over_tasks_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", walker("seeds=1", "seed=3"))
    content = result(run)
    assert content["seeds"] == [3]
    assert {point["interval_over"] for point in content["evaluation"]["test"]["curve"]} == {"tasks"}
    assert "95% over tasks" in capsys.readouterr().out


def test_precision(tmp_path: Path) -> None:
    run = train(tmp_path / "run", walker("precision=float64"))
    arrays = checkpoint_arrays(run)
    assert arrays["train.learner.logits"].dtype == np.float64
    assert metarl_cli.load(run).state.logits.dtype == np.float64


# --- as users have it: processes of their own, programs that are compiled with care


@pytest.fixture
def optimised() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_a_resumed_run_equals_an_uninterrupted_one_in_three_processes(tmp_path: Path) -> None:
    lines = ["algo=rl2", "env=bandit", "algo.meta_batch=64", "iterations=20", "eval.tasks=100", "seeds=2"]

    def start(*words: str) -> subprocess.Popen[str]:
        command = driver("runner.CHUNK_SECONDS = 0.1", *words)
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)

    with start("train", *lines, "hydra.run.dir=whole") as process:
        assert process.wait() == 0
    with start("train", *lines, "hydra.run.dir=run") as process:
        assert process.stdout is not None and process.stderr is not None
        next(line for line in process.stdout if line.startswith("iteration"))
        process.terminate()
        assert process.wait() == 143, process.stderr.read()
    assert 0 < (checkpoint.latest(tmp_path / "run", "last") or 0) < 20
    with start("resume", "run") as process:
        assert process.wait() == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_maml_learns_to_adapt(tmp_path: Path) -> None:
    """Of the way from -40 to -17, a quarter of the default training brings more than half."""
    run = train(tmp_path / "run", ["algo=maml", "env=point_nav", "iterations=15"])
    curve = result(run)["evaluation"]["test"]["curve"]
    assert [point["episodes"] for point in curve] == [0, 40, 80, 120] and curve[0]["n_tasks"] == 40
    assert curve[0]["mean"] < -35
    assert curve[1]["mean"] > -25


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_rl2_learns_to_explore(tmp_path: Path) -> None:
    """Pulling at random brings 5 of 10, the Bayes optimum is 6.66."""
    run = train(tmp_path / "run", ["algo=rl2", "env=bandit", "iterations=40"])
    evaluation = result(run)["evaluation"]["test"]
    assert evaluation["curve"][0]["n_tasks"] == 10_000
    assert abs(evaluation["curve"][0]["mean"] - 0.5) < 0.02  # nothing is known before the first pull
    assert evaluation["trial_return"]["mean"] > 5.8
