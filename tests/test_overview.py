"""`metarl runs` and `metarl compare`, from files alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import metarl

from metarl_cli import checkpoint, config


def summary(mean: float) -> dict[str, Any]:
    return {"mean": mean, "iqm": mean, "ci_low": mean - 1, "ci_high": mean + 1}


def make(run: Path, *lines: str, status: str | None = "completed", done: int = 60, mean: float = 5.0) -> Path:
    """A run directory as `metarl train` leaves it, without having trained."""
    run.mkdir(parents=True)
    config.save(config.compose(list(lines)), run)
    (run / "metrics.jsonl").write_text(
        json.dumps({"iteration": done, "steps": 9, "trial_return": [1.0, 2.0]}) + "\n" + '{"iteration": 99, "tr'
    )
    if status is not None:
        evaluation = {"test": {"curve": [summary(mean - 4), summary(mean)], "trial_return": summary(3 * mean)}}
        train = {"iterations": done, "steps": 1234567, "wall_seconds": 61.25}
        (run / "result.json").write_text(json.dumps({"status": status, "train": train, "evaluation": evaluation}))
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make(root / "one", "algo=maml", "env=point_nav", mean=-5.0)
    make(root / "deep" / "two", "algo=rl2", "env=bandit", status=None, done=7)
    make(root / "three", "algo=maml", "env=bandit", "algo.lr=0.1", status="diverged", done=2)
    make(root / "longer", "algo=maml", "iterations=80")  # was extended, but has not got there
    for i in (2, 10):
        make(root / "sweep" / str(i), "algo=maml", "env=point_nav", f"seed={i}")
    (root / "sweep" / "multirun.yaml").write_text("{}")  # one that was interrupted has no sweep.json yet
    (root / "one" / "wandb").mkdir()
    (root / "one" / "wandb" / "config.yaml").write_text("no: run")
    broken = make(root / "broken", "algo=maml")
    (broken / "config.yaml").write_text("choices: [1]")
    old = time.time() - 3 * 86400
    for path in (root / "one").rglob("*"):
        os.utime(path, (old, old))
    return root


def table(text: str) -> dict[str, str]:
    return {line.split("  ")[0]: line for line in (x.strip() for x in text.splitlines())}


def test_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with checkpoint.RunLock(root / "deep" / "two"):
        assert metarl("runs", root) == 0
    out = capsys.readouterr().out
    lines = table(out)
    assert len(lines) == 9  # the head, 5 runs, a sweep and its 2
    one = lines[str(root / "one")]
    assert "maml on point_nav" in one and "completed" in one and "60/60" in one
    assert "-15.00 [-16.00, -14.00]" in one and "3 d ago" in one and " kB" in one
    assert out.splitlines()[1].startswith(str(root / "one"))  # the oldest
    two = lines[str(root / "deep" / "two")]
    assert "rl2 on bandit" in two and "running" in two and "7/150" in two and "(1.50 in training)" in two
    assert "diverged" in lines[str(root / "three")] and "interrupted" in lines[str(root / "longer")]
    assert "60/80" in lines[str(root / "longer")] and "damaged" in lines[str(root / "broken")]
    assert "sweep of 2" in lines[str(root / "sweep")] and "2 completed" in lines[str(root / "sweep")]
    inside = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert inside == ["2", "10"]
    assert metarl("runs", root) == 0
    assert "interrupted" in table(capsys.readouterr().out)[str(root / "deep" / "two")]


def test_listing_does_not_keep_a_run_from_starting(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold the lock for an instant."""
    import fcntl

    run = root / "one"
    (run / ".lock").touch()
    held = (run / ".lock").open()
    fcntl.flock(held, fcntl.LOCK_SH)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: held.close())
    with checkpoint.RunLock(run):
        pass


def test_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert metarl("runs", tmp_path) == 0
    assert "There are no runs" in capsys.readouterr().out
    assert metarl("runs", tmp_path / "nowhere") == 2
    assert "there is no such directory" in capsys.readouterr().err


def test_compare(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert metarl("compare", root / "one", root / "three", root / "deep" / "two") == 0
    lines = table(capsys.readouterr().out)
    assert lines["algo.lr"].split() == ["algo.lr", "0.005", "0.1", "0.003"]
    assert lines["env.k"].split()[1:] == ["-", "5", "5"]
    assert "seed" not in lines and "precision" not in lines  # the same in all
    assert lines["status"].split() == ["status", "completed", "diverged", "interrupted"]
    assert "-15.00 [-16.00, -14.00]" in lines["test trial_return"] and lines["test trial_return"].endswith("-")
    assert "-9.00" in lines["test return, first point"] and "-5.00" in lines["test return, last point"]
    assert "1,234,567" in lines["training steps"]


def test_what_cannot_be_compared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, fragment in (
        ([root / "one"], "two run directories or more"),
        ([root / "one", root / "on"], "Did you mean"),
        ([root / "one", root / "broken"], "is no config of a metarl run"),
    ):
        assert metarl("compare", *words) == 2
        message = capsys.readouterr().err
        assert fragment in message and len(message.splitlines()) == 1


def test_a_config_of_aliases_is_not_unfolded(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "bomb"
    run.mkdir()
    (run / "config.yaml").write_text("a: &a [1]\nb: *a\nchoices: {algo: x, env: y}\n")
    assert yaml.safe_load((run / "config.yaml").read_text())["b"] == [1]
    assert metarl("runs", tmp_path) == 0
    assert "damaged" in capsys.readouterr().out
