"""`metarl report`: what the words name, a run, a directory of runs or a table, as one page."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path
from typing import Any

from metarl_cli import catalogue
from metarl_cli.core.errors import MetarlError, RunError
from metarl_cli.report import page, runs
from metarl_cli.report.figures import Pair
from metarl_cli.report.runs import Run
from metarl_cli.runner import now
from metarl_cli.tables import records, view
from metarl_cli.tables.reproduce import digest
from metarl_cli.tables.table import load


def write(words: list[str], output: Path, config_dir: Path | None = None) -> None:
    """Writes the page.

    Raises:
        RunError: a word names nothing, or the page cannot be written.
    """
    found: dict[Path, Run] = {}
    tables, known = [], catalogue.tables(config_dir)
    for word in words:
        path = Path(word).expanduser()
        if word in known and not path.exists():
            table = load(word, config_dir)
            shown = view.view(word, table, table.cells(), None)
            tables.append(_table(shown))
            some = _behind(shown)
        elif path.exists():
            some = runs.find(path)
        else:
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise RunError(f"{word}: there is no such run, directory of runs or table.{hint} Tables: {', '.join(known)}.")
        found |= {run.path.resolve(): run for run in some}
    try:
        page.write(output, ", ".join(words), list(found.values()), tables, now())
    except OSError as error:
        raise MetarlError(f"{output} cannot be written: {error.strerror}. Take another file with -o.") from error


def _behind(shown: view.View) -> list[Run]:
    """The runs that the records of one's own were made from, not those of earlier settings or other budgets."""
    folder = records.OWN / shown.name / "runs"
    if shown.origin == view.RECORDED or not folder.is_dir():
        return []
    made_by = {digest(shlex.split(line.record["command"])[1:]) for line in shown.lines if line.record is not None}
    return [run for run in runs.find(folder) if run.path.name.rpartition("-")[2] in made_by]


def _table(shown: view.View) -> page.Table:
    rows: list[list[page.Cell]] = []
    for line in shown.lines:
        row: list[page.Cell] = list(view.cells(shown, line))
        if line.bold:
            row[3] = (view.cells(shown, line)[3], "strong")
        row[-1] = (line.verdict, line.verdict.replace(" ", "-"))
        rows.append(_verdict_early(row))
    below = view.explanation(shown)
    if shown.origin == view.RECORDED:
        below.append(f"Curves and costs stand here once there are runs of your own: metarl reproduce {shown.name}")
    columns = _verdict_early(view.header(shown))
    return page.Table(shown.name, shown.table.title, shown.table.quantity, columns, rows, below, _drawn(shown.lines))


def _drawn(lines: list[view.Line]) -> list[page.Row]:
    """Rows of which something was run."""
    rows = []
    for label in dict.fromkeys(line.row for line in lines):
        here = [line for line in lines if line.row == label and (line.record or line.published)]
        if any(line.record for line in here):
            rows.append(page.Row(label, [_pair(line) for line in here], here[0].optimum))
    return rows


def _pair(line: view.Line) -> Pair:
    record, published = line.record, line.published
    ours = (record["mean"], record["ci_low"], record["ci_high"]) if record else None
    return Pair(line.column, ours, (published.value, published.ci or 0.0) if published else None)


def _verdict_early(row: list[Any]) -> list[Any]:
    """The last column beside ours, where it is seen on a phone without scrolling."""
    return [*row[:4], row[-1], *row[4:-1]]
