"""What trackers get, and that a broken one costs a run nothing but a warning."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import assert_same_run, driver, environment, hasty_compiler, metarl, no_figures, own_configs, train, walker

from metarl_cli import optimality, runner, tracking

BARE = """
from metarl_cli import optimality
runner.Point.draw = lambda *_: None
optimality.compare = lambda *_: {}
"""
WALK = walker("iterations=6", "log_every=2", "eval.every=4")


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    with hasty_compiler(), pytest.MonkeyPatch.context() as patch:
        no_figures(patch)
        patch.setattr(optimality, "compare", lambda *_: {})
        yield


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("walked") / "run", WALK)


class Memory(tracking.Tracker):
    """Keeps what it is given."""

    def __init__(self, *arguments: Any):
        self.arguments, self.rows, self.closed = arguments, [], False
        made.append(self)

    def log(self, iteration: int, numbers: Any) -> None:
        self.rows.append((iteration, numbers))

    def close(self) -> None:
        self.closed = True


made: list[Memory] = []


def test_seeds_become_a_mean_and_a_curve_each() -> None:
    row = {"iteration": 3, "steps": 10, "loss": [1.0, None, 3.0], "dead": [None], "evaluation": {"split": "ood", "x": [5.0]}}
    assert dict(tracking.numbers(row)) == {
        "steps": 10,
        "loss": 2.0,
        "loss/seed_0": 1.0,
        "loss/seed_2": 3.0,
        "evaluation/x": 5.0,
    }


def test_a_run_hands_over_its_metrics(walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Memory)
    run = train(tmp_path / "run", [*WALK, "logger=[tensorboard]"])
    tracker = made.pop()
    assert tracker.closed and tracker.arguments[0] == run and tracker.arguments[1]["algo"]["lr"] == 1.0
    assert [i for i, row in tracker.rows if "loss" in row] == [2, 4, 6]
    assert [i for i, row in tracker.rows if "evaluation/trial_return" in row] == [4, 6]
    assert_same_run(run, walked)


class Broken(Memory):
    def log(self, iteration: int, numbers: Any) -> None:
        raise ConnectionError("nobody there\nand a second line")


class Stuck(Memory):
    def __init__(self, *arguments: Any):
        threading.Event().wait()


@pytest.mark.parametrize(("tracker", "fragment"), [(Broken, "nobody there"), (Stuck, "has not taken everything")])
def test_a_broken_tracker_costs_a_warning(
    tracker: type[Memory], fragment: str, walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", tracker)
    monkeypatch.setattr(tracking, "LAST_SECONDS", 0.2)
    began = time.monotonic()
    run = train(tmp_path / "run", [*WALK, "logger=[tensorboard]"])
    assert time.monotonic() - began < 30
    warnings = [line for line in (run / "log.txt").read_text().splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and fragment in warnings[0] and "second line" not in warnings[0]
    assert "Traceback" not in "".join(capfd.readouterr())
    assert_same_run(run, walked)


def test_a_slow_tracker_does_not_hold_up_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Rows that it has no room for are dropped."""

    class Slow(Memory):
        def log(self, iteration: int, numbers: Any) -> None:
            time.sleep(0.01)
            super().log(iteration, numbers)

    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Slow)
    monkeypatch.setattr(tracking, "WAITING", 5)
    monkeypatch.setattr(tracking, "LAST_SECONDS", 0.5)
    trackers = tracking.Trackers(("jsonl", "tensorboard"), tmp_path, {}, 0)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "metarl"):
        for i in range(500):
            trackers.log({"iteration": i, "loss": [0.5]})
    assert time.monotonic() - began < 1  # 5 s, if it waited
    assert "too slow" in caplog.text and len(caplog.records) == 1
    trackers.close()
    assert 0 < len(made.pop().rows) < 500


def test_a_missing_package_is_told_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "PACKAGES", {"wandb": "no_such_package"})
    assert (
        metarl("train", f"--config-dir={own_configs(tmp_path)}", *WALK, "logger=[wandb]", f"hydra.run.dir={tmp_path}/run")
        == 2
    )
    message = capsys.readouterr().err
    assert "logger=wandb: the package no_such_package is not installed" in message and "pip install" in message
    assert not (tmp_path / "run").exists()
    assert metarl("train", "logger=[tensorbord]") == 2
    assert "tensorboard" in capsys.readouterr().err


def scalars(run: Path) -> dict[int, float]:
    """`loss` by iteration, as TensorBoard reads it: what a later file takes back is gone."""
    from tensorboardX.proto import event_pb2

    found: dict[int, float] = {}
    for file in sorted((run / "tensorboard").glob("events*"), key=lambda path: path.stat().st_mtime):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                found = {step: x for step, x in found.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "loss":
                    found[event.step] = value.simple_value
    return found


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run takes back what was written after its checkpoint."""
    pytest.importorskip("tensorboardX", reason="pip install tensorboardX")
    run, lines = tmp_path / "run", walker("iterations=6", "logger=[tensorboard]", "seeds=1")
    original = runner.Session.report_failures

    def killed(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        if self.done == 4:
            self.points[0].trackers.close()
            raise KeyboardInterrupt  # as if by kill -9: nothing is saved

    with monkeypatch.context() as patch:
        patch.setattr(runner, "CHUNK_SECONDS", 0)
        patch.setattr(runner.Session, "report_failures", killed)
        assert metarl("train", f"--config-dir={own_configs(tmp_path)}", *lines, f"hydra.run.dir={run}") == 130
    assert sorted(scalars(run)) == [1, 2, 3, 4]
    assert metarl("resume", run) == 0
    import json

    losses = {row["iteration"]: row["loss"][0] for row in map(json.loads, (run / "metrics.jsonl").open())}
    assert scalars(run) == pytest.approx(losses, rel=1e-6)


@pytest.mark.slow
def test_weights_and_biases_offline_and_unreachable(walked: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install wandb")
    for mode, more in (("offline", {}), ("online", {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40})):
        run = tmp_path / mode
        words = [f"--config-dir={own_configs(tmp_path)}", *WALK, "logger=[wandb]", f"hydra.run.dir={run}"]
        began = time.monotonic()
        done = subprocess.run(
            driver(BARE, "train", *words),
            env={**environment(), "WANDB_MODE": mode, **more},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert time.monotonic() - began < 100
        assert_same_run(run, walked)
        if mode == "offline":
            assert list((run / "wandb").glob("offline-run-*/*.wandb"))


def test_nothing_is_imported_without_need() -> None:
    code = "import sys; from metarl_cli import tracking; sys.exit(bool({'wandb', 'tensorboardX'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0
