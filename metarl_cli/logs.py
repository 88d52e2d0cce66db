"""What a run says: log.txt, metrics.jsonl, the progress display and tables on the console.

On a terminal rich draws, and respects `NO_COLOR`; anywhere else (a pipe, a dumb terminal) plain lines are printed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from metarl_cli.core.errors import RunError

logger = logging.getLogger("metarl")


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path} cannot be written: {error.strerror}. Check the free space and the permissions there.")


# --- log.txt


class _ConsoleHandler(logging.Handler):
    """Prints the bare message; warnings and errors say what they are. Through rich, so that it stands above the bar."""

    def __init__(self, console: Console):
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        with_level = record.levelno >= logging.WARNING
        text = f"{record.levelname.lower()}: {record.getMessage()}" if with_level else record.getMessage()
        say(text, self.console, style="yellow" if with_level else "")


class _FileHandler(logging.FileHandler):
    """A full disk is told by what cannot do without it: the metrics and the checkpoints."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextlib.contextmanager
def log_to(run: Path, console: Console) -> Iterator[logging.Logger]:
    """Within the block, log.txt gets every message (`metarl` from DEBUG on, with stack traces, other libraries from
    WARNING on, Python's warnings) and the console those of `metarl` from INFO on, without stack traces.

    A resumed run goes on in the same file.
    """
    path = run / "log.txt"
    try:
        file = _FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    shown = _ConsoleHandler(console)
    root, level = logging.getLogger(), logger.level
    root.addHandler(file)
    logger.addHandler(shown)
    logger.setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    try:
        yield logger
    finally:
        logging.captureWarnings(False)
        logger.setLevel(level)
        logger.removeHandler(shown)
        root.removeHandler(file)
        file.close()


# --- metrics.jsonl


class MetricsFile:
    """metrics.jsonl: one JSON object per line, in the order of `iteration`. NaN and infinity are written as null.

    Every line reaches the file before `write` returns. A context manager; `close` may be called twice.
    """

    def __init__(self, run: Path):
        self.path = run / "metrics.jsonl"
        self._file: Any = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one line. Values are numbers, strings, None, numpy or JAX arrays, and lists and dicts of these."""
        line = json.dumps(plain(row), allow_nan=False)
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def cut_back(self, iteration: int) -> None:
        """Drops the lines of later iterations and a half-written last one, as if the run had stopped at `iteration`."""
        self.close()
        if not self.path.exists():
            return
        kept = [line for line, row in self._lines() if row["iteration"] <= iteration]
        new = self.path.with_name(".metrics.jsonl.new")
        try:
            with new.open("w", encoding="utf-8") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; none where there is no file yet. A half-written last line is left out.

        Raises:
            RunError: a line in the middle is damaged.
        """
        return [row for _, row in self._lines()] if self.path.exists() else []

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                row["iteration"]
            except (ValueError, TypeError, KeyError):
                row = None
            if row is not None and line.endswith("\n"):
                yield line, row
            elif number < len(lines):
                raise RunError(f"{self.path}, line {number}: damaged, no metrics. Delete the line and try again.")


def plain(value: Any) -> Any:
    """What JSON can hold. Arrays become lists, numbers that are not finite None."""
    if hasattr(value, "tolist"):  # numpy and JAX arrays and scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --- the console


def live(console: Console) -> bool:
    """Whether the console is a terminal that can be drawn on. `FORCE_COLOR` makes a pipe colourful, but no terminal."""
    return console.is_interactive and console.file.isatty()


def say(text: str, console: Console, style: str = "") -> None:
    """Prints text as it is: brackets are no markup, numbers are not coloured, and no path is wrapped in the middle."""
    if live(console):
        fill = functools.partial(textwrap.fill, width=console.width, break_long_words=False, break_on_hyphens=False)
        text = "\n".join(fill(line) for line in text.split("\n"))
    console.print(Text(text, style=style), soft_wrap=True)


def tell(text: str, console: Console) -> None:
    """Prints text and keeps it in log.txt."""
    say(text, console)
    logger.debug(text)


class Progress:
    """How far the training is: a bar on a terminal; elsewhere the first line, the last and one about every tenth part.

    with Progress(total=100, console=console) as progress:
        progress.status("compiling")
        progress.update(1, before=-40.2, after=-38.9, steps_per_second=1e5)
    """

    def __init__(self, total: int, console: Console):
        self.total, self.console = total, console
        self.iteration = 0
        self._status = ""
        self._before = self._after = self._rate = math.nan
        self._start = self._since = self._last = time.monotonic()  # of the run, the status, the last update
        self._first: tuple[int, float] | None = None  # iteration and time of the first update: compiling comes before it
        self._tenth = -1
        self._live = Live(self, console=console, refresh_per_second=4) if live(console) else None

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._status = ""
            self._live.stop()

    def status(self, text: str) -> None:
        """What is going on beside the iterations, such as `compiling`; the next update ends it."""
        self._status, self._since = text, time.monotonic()
        if self._live is None:
            say(f"{text} ...", self.console)
        else:
            self._live.refresh()

    def update(self, iteration: int, before: float, after: float, steps_per_second: float) -> None:
        """`iteration` meta-iterations are done; `before` and `after` are mean returns before and after adaptation."""
        self._last = time.monotonic()
        self._first = self._first or (iteration, self._last)
        self.iteration, self._status = iteration, ""
        self._before, self._after, self._rate = before, after, steps_per_second
        tenth = 10 * iteration // self.total
        if tenth > self._tenth or iteration >= self.total:
            line = "  ".join(part for part in self._parts() if part)
            logger.debug(line)
            if self._live is None:
                say(line, self.console)
        self._tenth = max(tenth, self._tenth)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        iteration, returns, rate, left = self._parts()
        # What does not fit is left out, the least important first; the bar takes the room that remains.
        room = options.max_width
        parts = [iteration]
        for part in (returns, left, rate):
            if part and sum(map(len, parts)) + 2 * len(parts) + len(part) <= room:
                parts.append(part)
        parts = [part for part in (iteration, returns, rate, left) if part in parts and part]
        width = room - sum(map(len, parts)) - 2 * len(parts)
        line = Table.grid(padding=(0, 2, 0, 0))
        cells: list[Any] = [Text(part, no_wrap=True, overflow="ellipsis") for part in parts]
        if width >= 5:
            cells.insert(1, ProgressBar(total=self.total, completed=self.iteration, width=min(width, 40)))
        line.add_row(*cells)
        yield line

    def _parts(self) -> tuple[str, str, str, str]:
        """Iteration, returns (or the status), steps per second, time left (or taken); empty where there is nothing."""
        iteration = f"iteration {self.iteration:{len(str(self.total))}d}/{self.total}"
        if self._status:
            return iteration, f"{self._status} ...", "", f"{clock(time.monotonic() - self._since)} so far"
        if self._first is None:
            return iteration, "", "", ""
        returns = f"return {self._before:.2f} -> {self._after:.2f}"
        return iteration, returns, f"{count(self._rate)} steps/s", self._time()

    def _time(self) -> str:
        assert self._first is not None
        first, since = self._first
        if self.iteration >= self.total:
            return f"{clock(self._last - self._start)} in all"
        if self.iteration == first:
            return ""
        left = (self.total - self.iteration) * (self._last - since) / (self.iteration - first)
        return f"{clock(max(0.0, left - (time.monotonic() - self._last)))} left"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], console: Console) -> None:
    """Prints a table as aligned text, the same on a terminal and in a pipe.

    Floats get two decimals, None is a dash; columns of numbers are aligned to the right.
    """
    right = [all(row[i] is None or isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]

    def aligned(line: Sequence[str]) -> str:
        padded = (x.rjust(w) if r else x.ljust(w) for x, w, r in zip(line, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    logger.debug("\n".join([title, aligned(columns), *map(aligned, cells)]))
    lines = [Text(title, style="bold"), Text(aligned(columns), style="dim"), *(Text(aligned(row)) for row in cells)]
    for line in lines:
        console.print(line, soft_wrap=True)  # too narrow a terminal wraps, so that no digit is lost


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: float) -> str:
    """Three digits: `950`, `12.3k`, `1.23M`."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            scaled = number / size
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{suffix}"
    return f"{number:.0f}"
