"""`metarl reproduce`: runs what is missing of a table, command by command, each in a process of its own.

What is finished is recorded before the next starts, so that the whole can be stopped at any time and continued; a command
that fails stops no other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from metarl_cli.core.errors import ConfigError, MetarlError
from metarl_cli.logs import clock, live, say
from metarl_cli.runner import SCHEMA_VERSION
from metarl_cli.tables import records
from metarl_cli.tables.table import BUDGETS, Budget, Cell, Lines, Table, load, select

POLL_SECONDS = 0.5


class Stopped(MetarlError):
    """By Ctrl-C or SIGTERM."""

    def __init__(self, name: str, signum: int):
        super().__init__(f"Stopped; what is finished is recorded. Go on with the same command: metarl reproduce {name} ...")
        self.exit_code = 128 + signum


class Failed(MetarlError):
    exit_code = 1


class Job(NamedTuple):
    """A command and the cells that it fills."""

    command: Lines
    cells: list[Cell]
    run: Path
    wanted: bool  # some of its cells were asked for, and are not recorded yet

    def __str__(self) -> str:
        more = f" and {len(self.cells) - 1} more" if len(self.cells) > 1 else ""
        return f"{self.cells[0]}{more}"


def reproduce(
    name: str,
    words: list[str],
    budget: Budget,
    seeds: int | None,
    config_dir: Path | None = None,
    folder: Path | None = None,
) -> None:
    """Runs and records the missing cells of a table.

    Args:
        words: which cells, see `select`.
        folder: of the records; None: runs/tables, of a smoke run runs/tables_smoke.

    Raises:
        ConfigError: the budget has none of the cells.
        Failed: a command failed; all others ran.
        Stopped: by a signal.
    """
    console = Console()
    table = load(name, config_dir)
    folder = folder or smoke_folder(budget)
    todo = jobs(name, table, select(table, words), budget, seeds, folder)
    chosen = select(table, words)
    left_out = [cell for cell in chosen if table.command(cell, budget, seeds) is None]
    if not todo:
        has = [b for b in BUDGETS if any(table.command(cell, b, seeds) is not None for cell in chosen)]
        raise ConfigError("budget", budget, "has none of these cells", allowed=has)
    waiting = [job for job in todo if job.wanted]
    shown_by = f"metarl table {name}" + ("" if folder == records.OWN else f" --records {folder}")
    cells = sum(len(job.cells) for job in waiting)
    say(f"{name}, budget={budget}: {len(waiting)} of {len(todo)} commands to run, for {cells} cells", console)
    if left_out:
        say(f"not in this budget: {', '.join(map(str, left_out))}", console)
    if not waiting:
        say(f"Everything is recorded in {folder / name}. {shown_by} prints it.", console)
        return
    watch = Watch(waiting, records.read(records.RECORDED, name), console)
    failures: list[str] = []
    with _signals() as received:
        for number, job in enumerate(waiting):
            watch.start(number)
            began = time.monotonic()
            problem = _run(job, config_dir, watch, received)
            if received:
                raise Stopped(name, received[0])
            if problem is None:
                try:
                    _record(name, table, job, budget, time.monotonic() - began, folder)
                except MetarlError as error:
                    problem = str(error)
            watch.end(problem)
            if problem is not None:
                failures.append(str(job))
    if failures:
        raise Failed(f"{len(failures)} of {len(waiting)} commands failed: {', '.join(failures)}. The others are recorded.")
    say(f"Recorded in {folder / name}. {shown_by} prints it.", console)


def smoke_folder(budget: Budget) -> Path:
    """A smoke run says nothing about a paper, so it is kept apart."""
    return records.OWN.with_name("tables_smoke") if budget == "smoke" else records.OWN


def jobs(name: str, table: Table, chosen: list[Cell], budget: Budget, seeds: int | None, folder: Path) -> list[Job]:
    """The commands of the chosen cells. Each fills all cells of the table that it serves, chosen or not."""
    commands: dict[Lines, list[Cell]] = {}
    for cell in table.cells():
        command = table.command(cell, budget, seeds)
        if command is not None:
            commands.setdefault(command, []).append(cell)
    known = records.read(folder, name)

    def missing(cell: Cell, command: Lines) -> bool:
        """A record is not replaced by one of a lesser budget, or of the same command with fewer seeds."""
        if cell not in known:
            return True
        recorded, count = _seeds(shlex.split(known[cell]["command"])[1:])
        asked, wanted = _seeds(command)
        if recorded == asked:
            return wanted > count
        return BUDGETS.index(known[cell]["budget"]) <= BUDGETS.index(budget)

    return [
        Job(
            command,
            cells,
            run_directory(name, command, cells, budget),
            any(c in chosen and missing(c, command) for c in cells),
        )
        for command, cells in commands.items()
        if set(cells) & set(chosen)
    ]


def printed(command: Lines) -> str:
    """As it is typed."""
    return shlex.join(["metarl", *command])


def run_directory(name: str, command: Lines, cells: list[Cell], budget: Budget) -> Path:
    """Of one command, always the same: so an interrupted run is found again, and never that of another command."""
    return smoke_folder(budget) / name / "runs" / f"{cells[0]}-{digest(command)}"


def digest(command: Sequence[str]) -> str:
    """What the name of a command's run directory ends with."""
    return hashlib.sha256("\n".join(command).encode()).hexdigest()[:8]


def _seeds(command: Sequence[str]) -> tuple[list[str], int]:
    """A command without its `seeds=`, and how many those are."""
    seeds = [int(line.removeprefix("seeds=")) for line in command if line.startswith("seeds=")]
    return [line for line in command if not line.startswith("seeds=")], seeds[-1] if seeds else 1


def _run(job: Job, config_dir: Path | None, watch: Watch, received: list[int]) -> str | None:
    """Trains or evaluates, or goes on where an earlier process stopped. What went wrong, or None."""
    status = _status(job.run)
    if status == "completed":  # and was interrupted before it was recorded
        return None
    words = [*job.command, f"hydra.run.dir='{job.run}'"]
    if config_dir is not None:
        words.insert(1, f"--config-dir={config_dir}")
    if status == "interrupted":
        words = ["resume", str(job.run)]
    elif job.run.exists():
        shutil.rmtree(job.run)  # ours: it diverged, or it was an evaluation, which starts anew
    log = job.run.with_name(f"{job.run.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        # Its own session: a Ctrl-C of the terminal reaches this process, which passes it on.
        process = subprocess.Popen(
            [sys.executable, "-m", "metarl_cli", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        told = 0
        try:
            while process.poll() is None:
                if len(received) > told:
                    told = len(received)
                    process.send_signal(signal.SIGINT if told == 1 else signal.SIGKILL)
                watch.update(job.run)
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode == 0:
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].removeprefix('metarl: ') if lines else f'exit code {process.returncode}'} (see {log})"


def _status(run: Path) -> str | None:
    """`completed`, `interrupted` (it can go on), or None: nothing that is of use."""
    if (run / "result.json").exists():
        completed = json.loads((run / "result.json").read_text(encoding="utf-8"))["status"] == "completed"
        return "completed" if completed else None
    return "interrupted" if (run / "checkpoints").exists() else None


def _record(name: str, table: Table, job: Job, budget: Budget, seconds: float, folder: Path) -> None:
    trained = json.loads((job.run / "result.json").read_text(encoding="utf-8")).get("train", {})
    head = {
        "schema_version": SCHEMA_VERSION,
        "table": name,
        "budget": budget,
        "command": printed(job.command),
        "seconds": trained.get("wall_seconds", seconds),
    }
    for cell in job.cells:
        records.write(folder, head | records.measure(job.run, table, cell))


class Watch:
    """Progress over all commands of a table and the time left: one line on a terminal, elsewhere a line per command.

    What a command takes is guessed from the record that comes with metarl, else from those of this call.
    """

    def __init__(self, waiting: list[Job], recorded: dict[Cell, records.Record], console: Console):
        self.waiting, self.console = waiting, console
        self.expected = [self._expected(job, recorded) for job in waiting]
        self.taken: list[float] = []
        self.began = self.since = time.monotonic()
        self.status = console.status("") if live(console) else None

    def _expected(self, job: Job, recorded: dict[Cell, records.Record]) -> float | None:
        record = recorded.get(job.cells[0], {})
        return record["seconds"] if record.get("command") == printed(job.command) else None

    def start(self, number: int) -> None:
        self.number, self.since = number, time.monotonic()
        head = f"[{number + 1}/{len(self.waiting)}] {self.waiting[number]}: {printed(self.waiting[number].command)}"
        say(head, self.console)
        if self.status is not None:
            self.status.start()

    def update(self, run: Path) -> None:
        if self.status is None:
            return
        done = _iteration(run / "metrics.jsonl")
        at = "" if done is None else f"iteration {done}, "
        self.status.update(f"{at}{clock(time.monotonic() - self.since)} so far, {self.left()}")

    def end(self, problem: str | None) -> None:
        if self.status is not None:
            self.status.stop()
        seconds = time.monotonic() - self.since
        if problem is None:
            self.taken.append(seconds)
        self.number, self.since = self.number + 1, time.monotonic()
        what = "done" if problem is None else f"FAILED: {problem}"
        say(
            f"    {what} in {clock(seconds)}; {self.left() if self.number < len(self.waiting) else 'the last'}", self.console
        )

    def left(self) -> str:
        """Of all commands from the present one on."""
        mean = sum(self.taken) / len(self.taken) if self.taken else None
        guesses = [known if known is not None else mean for known in self.expected[self.number :]]
        if any(guess is None for guess in guesses):
            return "time left unknown"
        spent = (
            time.monotonic() - self.since
        )  # on the present one; it may take longer than was guessed, but not less than nothing
        known = [guess for guess in guesses if guess is not None]
        return f"about {clock(max(0.0, known[0] - spent) + sum(known[1:]))} left"


def _iteration(metrics: Path) -> int | None:
    """Of the last complete line; the file may be long."""
    if not metrics.exists():
        return None
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 10_000))
        lines = file.read().split(b"\n")[:-1]
    try:
        return json.loads(lines[-1])["iteration"]
    except (IndexError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Within the block Ctrl-C and SIGTERM are only noted; the second one ends the running command at once."""
    received: list[int] = []

    def receive(signum: int, frame: Any) -> None:
        received.append(signum)
        print("\nStopping; the running command saves what it has.", file=sys.stderr, flush=True)

    previous = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
