"""log.txt, metrics.jsonl, and what the console shows on a terminal, in a pipe, and where there is little room."""

import io
import json
import logging
import math
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from metarl_cli import logs
from metarl_cli.core.errors import RunError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(width: int = 100) -> tuple[Console, Terminal]:
    file = Terminal()
    return Console(file=file, width=width, force_terminal=True, force_interactive=True), file


def in_pipe() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file), file


def frames(text: str) -> list[str]:
    """The lines that a terminal showed one after the other, without the codes that draw them."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", re.sub(r"\x1b\[[0-9;]*m", "", text))
    lines = (line.rstrip() for line in re.split(r"[\r\n]+", text))
    return [line for line in lines if line]


# --- log.txt


def test_the_file_gets_everything_and_the_console_what_users_should_see(tmp_path: Path):
    console, shown = in_pipe()
    with logs.log_to(tmp_path, console) as log:
        log.debug("a detail")
        log.info("device [cpu]")
        log.warning("seed 3 is frozen")
        try:
            raise KeyError("cause")
        except KeyError:
            log.error("it failed", exc_info=True)
        logging.getLogger("jax._src").warning("no GPU here")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old call", stacklevel=1)
    assert shown.getvalue() == "device [cpu]\nwarning: seed 3 is frozen\nerror: it failed\n"
    text = (tmp_path / "log.txt").read_text()
    for line in ("DEBUG metarl: a detail", "INFO metarl: device [cpu]", "WARNING metarl: seed 3 is frozen"):
        assert re.search(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} " + re.escape(line) + "$", text)
    assert "Traceback" in text and "KeyError: 'cause'" in text
    assert "no GPU here" in text and "old call" in text


def test_a_resumed_run_goes_on_in_the_same_file_and_nothing_is_left_behind(tmp_path: Path):
    before = logging.getLogger().handlers[:], logs.logger.handlers[:], logs.logger.level
    console, shown = in_pipe()
    for text in ("first", "second"):
        with logs.log_to(tmp_path, console) as log:
            log.info(text)
    logs.logger.info("after the run")
    assert [line.split(": ")[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "second"]
    assert shown.getvalue() == "first\nsecond\n"
    assert before == (logging.getLogger().handlers[:], logs.logger.handlers[:], logs.logger.level)


def test_a_log_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(RunError, match=r"log\.txt cannot be written: Is a directory"), logs.log_to(tmp_path, Console()):
        pass


# --- metrics.jsonl


def test_metrics_are_valid_json_whatever_they_hold(tmp_path: Path):
    row = {
        "iteration": np.int64(3),
        "steps": jnp.int32(400),
        "return_after": jnp.array([-16.25, jnp.nan, jnp.inf]),
        "nested": {"a": (np.float32(0.5), -math.inf), 1: None},
        "flag": np.bool_(True),
        "name": "maml",
    }
    with logs.MetricsFile(tmp_path) as metrics:
        metrics.write(row)
        lines = (tmp_path / "metrics.jsonl").read_text()  # there before the file is closed
    assert lines.endswith("\n") and lines.count("\n") == 1
    assert json.loads(lines, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == {
        "iteration": 3,
        "steps": 400,
        "return_after": [-16.25, None, None],
        "nested": {"a": [0.5, None], "1": None},
        "flag": True,
        "name": "maml",
    }


def test_numbers_are_exact(tmp_path: Path):
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    logs.MetricsFile(tmp_path).write({"iteration": 1, "x": values})
    assert np.array(logs.MetricsFile(tmp_path).read()[0]["x"], np.float32).tobytes() == values.tobytes()


def test_cut_back_to_a_checkpoint(tmp_path: Path):
    metrics = logs.MetricsFile(tmp_path)
    assert metrics.read() == []
    metrics.cut_back(5)  # nothing to cut
    for i in range(1, 6):
        metrics.write({"iteration": i, "x": [i / 10, None]})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    with path.open("a") as file:
        file.write('{"iteration": 6, "x": [0.')  # the kill came here
    assert [row["iteration"] for row in logs.MetricsFile(tmp_path).read()] == [1, 2, 3, 4, 5]
    metrics.cut_back(10)
    assert path.read_text() == "".join(whole)
    metrics.cut_back(3)
    assert path.read_text() == "".join(whole[:3])
    metrics.write({"iteration": 4, "x": [0.4, None]})
    assert path.read_text() == "".join(whole[:4])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_that_lacks_only_its_end_is_dropped(tmp_path: Path):
    """Else the next line would be glued to it."""
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}')
    metrics = logs.MetricsFile(tmp_path)
    metrics.cut_back(2)
    metrics.write({"iteration": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 1}\n{"iteration": 2}\n'


@pytest.mark.parametrize("damage", ["{", "[]", "\0\0", '{"steps": 1}', "\xff"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, damage: str):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"iteration": 1}\n' + damage.encode("latin1") + b'\n{"iteration": 3}\n')
    for call in (logs.MetricsFile(tmp_path).read, lambda: logs.MetricsFile(tmp_path).cut_back(3)):
        with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: damaged"):
            call()


def test_metrics_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: No such file or directory"):
        logs.MetricsFile(tmp_path / "nowhere").write({"iteration": 1})


# --- progress


def drive(progress: logs.Progress, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`total` iterations of one second each after 20 s of compiling."""
    now = 0.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    with progress:
        progress.status("compiling")
        now += 19
        for i in range(1, total + 1):
            now += 1
            progress.update(i, before=-40.0, after=-40.0 + i / 10, steps_per_second=123_456)
            if progress._live is not None:
                progress._live.refresh()


def test_plain_lines(monkeypatch: pytest.MonkeyPatch):
    console, file = in_pipe()
    drive(logs.Progress(200, console), 200, monkeypatch)
    lines = file.getvalue().splitlines()
    assert lines[:3] == [
        "compiling ...",
        "iteration   1/200  return -40.00 -> -39.90  123k steps/s",
        "iteration  20/200  return -40.00 -> -38.00  123k steps/s  3:00 left",
    ]
    assert lines[-1] == "iteration 200/200  return -40.00 -> -20.00  123k steps/s  3:39 in all"
    assert [int(line.split("/")[0].split()[1]) for line in lines[1:]] == [1, *range(20, 201, 20)]


@pytest.mark.parametrize("total", [1, 3, 7, 1000])
def test_few_plain_lines(total: int, monkeypatch: pytest.MonkeyPatch):
    console, file = in_pipe()
    drive(logs.Progress(total, console), total, monkeypatch)
    done = [int(line.split("/")[0].split()[1]) for line in file.getvalue().splitlines()[1:]]
    assert done[0] == 1 and done[-1] == total
    assert len(done) == min(total, 11)


def test_a_resumed_run_in_plain_lines():
    console, file = in_pipe()
    with logs.Progress(100, console) as progress:
        for i in range(95, 101):
            progress.update(i, -1, math.nan, 10)
    assert [line[:17] for line in file.getvalue().splitlines()] == ["iteration  95/100", "iteration 100/100"]
    assert "return -1.00 -> nan  10 steps/s" in file.getvalue()


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    console, file = on_terminal(100)
    drive(logs.Progress(40, console), 40, monkeypatch)
    shown = frames(file.getvalue())
    assert shown[0].startswith("iteration  0/40  ━") and "compiling ...  0:00 so far" in shown[0]
    assert "return -40.00 -> -38.00  123k steps/s  0:20 left" in next(s for s in shown if "20/40" in s)
    assert re.fullmatch(r"iteration 40/40  ━{20,}  return -40\.00 -> -36\.00  123k steps/s  0:59 in all", shown[-1])
    assert max(map(len, shown)) <= 100


@pytest.mark.parametrize(
    ("width", "kept"),
    [
        (80, "return -40.00 -> -36.00  123k steps/s  0:59 in all"),
        (60, "return -40.00 -> -36.00  0:59 in all"),
        (45, "return -40.00 -> -36.00"),
        (20, "iteration 40/40"),
        (10, "iteration"),
    ],
)
def test_a_narrow_terminal(width: int, kept: str, monkeypatch: pytest.MonkeyPatch):
    """The least important goes first, and nothing wraps: a wrapped bar would leave a trail."""
    console, file = on_terminal(width)
    drive(logs.Progress(40, console), 40, monkeypatch)
    shown = frames(file.getvalue())
    assert kept in shown[-1]
    assert max(map(len, shown)) <= width
    assert len(shown) < 50  # one line a frame


def test_messages_stand_above_the_bar(tmp_path: Path):
    console, file = on_terminal(80)
    with logs.log_to(tmp_path, console) as log, logs.Progress(2, console) as progress:
        progress.update(1, 0, 0, 1)
        log.warning("seed 3 is frozen")
        progress.update(2, 0, 0, 1)
    shown = frames(file.getvalue())
    assert shown.index("warning: seed 3 is frozen") < len(shown) - 1
    assert shown[-1].startswith("iteration 2/2")


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_real_pipes_and_terminals(variables: dict[str, str]):
    code = (
        "from rich.console import Console; from metarl_cli import logs\n"
        "c = Console()\n"
        "with logs.Progress(2, c) as p:\n"
        "    p.status('compiling'); p.update(1, 0, 0, 1); p.update(2, 0, 0, 1)\n"
        "logs.table('title', ['a'], [[1.0]], c)\n"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR", "TERM", "COLUMNS")}
    environment = clean | {"TERM": "xterm-256color"} | variables
    piped = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", piped.stdout)
    assert (plain != piped.stdout) == ("FORCE_COLOR" in variables)
    assert [line[:9] for line in plain.splitlines()] == ["compiling", "iteration", "iteration", "title", "   a", "1.00"]

    main, child = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=child)
    os.close(child)
    output = b""
    try:
        while chunk := os.read(main, 4096):
            output += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(main)
    assert process.wait() == 0
    text = output.decode()
    if "TERM" in variables:
        assert "\x1b" not in text and text.count("iteration") == 2
    else:
        assert "━" in text and "\x1b[?25l" in text and "\x1b[?25h" in text  # cursor hidden and shown again
        assert bool(re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", text)) == ("NO_COLOR" not in variables)


# --- tables and texts


def test_a_table():
    console, file = in_pipe()
    rows = [[0, 0, -40.123, "-41.0 to -39.2"], [40, 4000, -6.5, "-7 to -6"], [80, 8000, None, "[none]"]]
    logs.table("return on 40 tasks [test]", ["episodes", "steps", "mean", "interval"], rows, console)
    assert file.getvalue() == (
        "return on 40 tasks [test]\n"
        "episodes  steps    mean  interval\n"
        "       0      0  -40.12  -41.0 to -39.2\n"
        "      40   4000   -6.50  -7 to -6\n"
        "      80   8000       -  [none]\n"
    )


def test_a_table_loses_no_digit_on_a_narrow_terminal():
    console, file = on_terminal(20)
    logs.table("title", ["episodes", "steps", "mean"], [[123456, 1234567, -1234.5]], console)
    assert " 123456  1234567  -1234.50" in re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


def test_a_table_without_rows():
    console, file = in_pipe()
    logs.table("title", ["a", "b"], [], console)
    assert file.getvalue() == "title\na  b\n"


def test_a_long_path_is_never_broken():
    path = "runs/maml_point_nav/2026-01-01_00-00-00/figures/adaptation_curve.svg"
    for console, file in (on_terminal(40), in_pipe()):
        logs.say(f"All of it stands in a place with a long name:\nsee {path}", console)
        assert path in file.getvalue()
        wrapped = file.getvalue().splitlines()[0] == "All of it stands in a place with a long"
        assert wrapped == logs.live(console)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950.4, "950"), (12_345, "12.3k"), (999_960, "1.00M"), (1.23e8, "123M"), (5e9, "5.00G")],
)
def test_counts(number: float, text: str):
    assert logs.count(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str):
    assert logs.clock(seconds) == text
