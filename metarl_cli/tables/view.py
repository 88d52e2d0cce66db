"""A table as it is read: published, ours, the best possible, the difference and a verdict, cell by cell; and as text,
Markdown, LaTeX, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from metarl_cli.core.errors import ConfigError
from metarl_cli.core.statistics import welch
from metarl_cli.logs import plain
from metarl_cli.tables import records
from metarl_cli.tables.table import Cell, Published, Rule, Table

Verdict = Literal["matches", "better", "worse", "not run", ""]
RECORDED = "as recorded with metarl"
WIDTH = 130  # of the text around the numbers


class Line(NamedTuple):
    """One cell."""

    cell: Cell
    row: str
    column: str
    published: Published | None
    record: records.Record | None  # with a number, or None
    optimum: float | None
    optimum_from: Cell | None
    difference: float | None  # from what the verdict compares with
    verdict: Verdict  # empty where there is nothing to compare with
    bold: bool
    note: str


class View(NamedTuple):
    name: str
    table: Table
    lines: list[Line]
    origin: str  # whose runs
    optima: dict[Cell, records.Record]  # where the column of the optimum is from


def view(name: str, table: Table, chosen: list[Cell], folder: Path | None) -> View:
    """The chosen cells with what is recorded of them.

    Args:
        folder: of the records; None: the user's own if there are any, else those that come with metarl.

    Raises:
        ConfigError: of all cells only the optimum was chosen.
    """
    if folder is None:
        own = any((records.OWN / name).glob("*.json"))
        folder = records.OWN if own else records.RECORDED
        origin = f"your own runs, {records.OWN / name}" if own else RECORDED
    else:
        origin = str(folder / name)
    known = {cell: record for cell, record in records.read(folder, name).items() if record["mean"] is not None}
    lines = []
    for cell in chosen:
        column = table.columns[cell.column]
        if column.reads.startswith("best_"):
            continue  # the optimum of every line
        record, published = known.get(cell), table.published(cell)
        source = next((Cell(cell.row, c) for c in table.optimum if Cell(cell.row, c) in known), None)
        best = known[source]["mean"] if source else None
        target = best if column.against == "optimum" else published.value if published else None
        difference, verdict = None, "not run"
        if record is not None:
            difference = None if target is None else record["mean"] - target
            verdict = judge(record, published if column.against != "optimum" else best, table.rule)
        lines.append(
            Line(
                cell,
                table.rows[cell.row].label,
                column.label,
                published,
                record,
                best,
                source,
                difference,
                verdict,
                record is not None and is_bold(cell, known, table),
                table.note(cell),
            )
        )
    if not lines:
        problem = "the optimum stands beside the other columns, and is none of its own"
        others = [key for key, column in table.columns.items() if not column.reads.startswith("best_")]
        raise ConfigError("cells", ",".join(map(str, chosen)), problem, allowed=[*table.rows, *others])
    optima = {line.optimum_from: known[line.optimum_from] for line in lines if line.optimum_from}
    return View(name, table, lines, origin, optima)


def judge(record: records.Record, target: Published | float | None, rule: Rule) -> Verdict:
    """Whether ours matches: the 95 % interval of ours meets that of the target.

    A published number without an interval gets that of a mean over as many tasks as its authors took, each as uncertain as
    ours, and half a unit of its last digit. An optimum (a float) gets the margin of the rule.
    """
    match target:
        case None:
            return ""
        case Published(value=value):
            sampling = 1.96 * record["std"] / math.sqrt(rule.tasks) if rule.tasks else 0.0
            margin = (sampling if target.ci is None else target.ci) + target.half_digit
        case value:
            margin = max(rule.relative * abs(value), rule.absolute)
    if record["ci_low"] <= value + margin and record["ci_high"] >= value - margin:
        return "matches"
    return "better" if (record["mean"] > value) == (rule.better == "higher") else "worse"


def is_bold(cell: Cell, known: dict[Cell, records.Record], table: Table) -> bool:
    """As in the RL^2 paper: the best mean of the row, and what a one-sided Welch test does not find significantly worse."""
    if table.rule.welch is None:
        return False
    row = {
        other.column: record
        for other, record in known.items()
        if other.row == cell.row and not table.columns[other.column].reads.startswith("best_")
    }
    sign = 1 if table.rule.better == "higher" else -1

    def sample(record: records.Record) -> tuple[float, float, int]:
        # Seeds share their tasks, so they are no further samples; the authors test the tasks of one seed.
        return sign * record["mean"], record["std"], record["n_tasks"]

    best = max(row.values(), key=lambda record: sign * record["mean"])
    return welch(sample(best), sample(row[cell.column])) >= table.rule.welch


# --- formats


def header(shown: View) -> list[str]:
    best = ["best seed"] if shown.table.rule.best_seed else []
    return ["", "learner", "published", "ours", "95 %", *best, "optimum", "difference", "verdict"]


def cells(shown: View, line: Line) -> list[str]:
    """As text, without what makes a number bold."""

    def number(x: float | None, sign: str = "") -> str:
        return "" if x is None else f"{x:{sign}.{shown.table.digits}f}"

    record: dict[str, Any] = line.record or {}
    interval = f"[{number(record['ci_low'])}, {number(record['ci_high'])}]" if record else ""
    best = [number((record.get("best_seed") or {}).get("mean"))] if shown.table.rule.best_seed else []
    published = line.published.text if line.published is not None else ""
    return [
        line.row,
        line.column,
        published,
        number(record.get("mean")),
        interval,
        *best,
        number(line.optimum),
        number(line.difference, "+"),
        line.verdict,
    ]


def text(shown: View) -> str:
    rows = []
    before = ""
    for line in shown.lines:
        row = cells(shown, line)
        row[3] += "*" if line.bold else " " if shown.table.rule.welch else ""
        row[0], before = ("" if row[0] == before else row[0]), row[0]
        rows.append(row)
    table = [header(shown), *rows]
    right = [2, 3, 4, *range(5, len(table[0]) - 1)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(
            x.rjust(w) if i in right else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join(
        [f"{shown.name}: {shown.table.title}, {shown.table.quantity}", "", *lines, "", *_below(shown, wrap), ""]
    )


def markdown(shown: View) -> str:
    def escape(x: str) -> str:
        return x.replace("|", "\\|").replace("*", "\\*").replace("RL^2", "RL²")

    rows = []
    for line in shown.lines:
        row = [escape(x) for x in cells(shown, line)]
        row[3] = f"**{row[3]}**" if line.bold else row[3]
        rows.append(row)
    head = [[escape(x) for x in header(shown)], ["---"] * len(header(shown))]
    lines = ["| " + " | ".join(row) + " |" for row in [*head, *rows]]
    return "\n".join(
        [f"**{shown.table.title}**, {shown.table.quantity}", "", *lines, "", *_below(shown, lambda x: escape(x) + "\n")]
    )


def latex(shown: View) -> str:
    def escape(x: str) -> str:
        for character in "\\{}&%$#_^~":  # the backslash first
            x = x.replace(character, {"\\": "\0", "^": "\1", "~": "\\textasciitilde{}"}.get(character, f"\\{character}"))
        x = x.replace("RL\0012", "RL$^2$").replace("\0", "\\textbackslash{}").replace("\1", "\\textasciicircum{}")
        return x.replace("±", "$\\pm$").replace("-", "$-$") if x[:1] in "-+[" or "±" in x else x

    rows, before = [], None
    for line in shown.lines:
        row = [escape(x) for x in cells(shown, line)]
        row[3] = f"\\textbf{{{row[3]}}}" if line.bold else row[3]
        rule = ["\\midrule"] if line.row != before else []
        row[0], before = ("" if line.row == before else row[0]), line.row
        rows += [*rule, " & ".join(row) + " \\\\"]
    head = " & ".join(escape(x) for x in header(shown)) + " \\\\"
    columns = "ll" + "r" * (len(header(shown)) - 3) + "l"
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            *(f"% {x}" for x in "\n".join(_below(shown, wrap)).splitlines()),
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            head,
            *rows,
            "\\bottomrule",
            "\\end{tabular}",
            "",
        ]
    )


def as_rows(shown: View) -> list[dict[str, Any]]:
    """Every number of a cell, unrounded, and where it comes from."""
    rows = []
    for line in shown.lines:
        record: dict[str, Any] = line.record or {}
        best = record.get("best_seed") or {}
        rows.append(
            {
                "table": shown.name,
                "cell": str(line.cell),
                "setting": line.row,
                "learner": line.column,
                "published": line.published and line.published.value,
                "published_ci": line.published and line.published.ci,
                "source": line.published and line.published.source,
                **{key: record.get(key) for key in ("mean", "ci_low", "ci_high", "iqm", "std", "n_seeds", "n_tasks")},
                "best_seed": best.get("seed"),
                "best_seed_mean": best.get("mean"),
                "optimum": line.optimum,
                "optimum_from": line.optimum_from and line.optimum_from.column,
                "difference": line.difference,
                "verdict": line.verdict,
                "bold": line.bold,
                "note": line.note,
                "chosen": record.get("chosen"),
                **{key: record.get(key) for key in ("budget", "command", "seconds", "steps", "date")},
                "device": (record.get("device") or {}).get("kind"),
                "metarl": (record.get("versions") or {}).get("metarl"),
                "jax": (record.get("versions") or {}).get("jax"),
            }
        )
    return rows


def as_json(shown: View) -> str:
    return json.dumps(plain(as_rows(shown)), indent=2) + "\n"


def as_csv(shown: View) -> str:
    rows = as_rows(shown)
    output = io.StringIO()
    writer = csv.DictWriter(output, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: json.dumps(x) if isinstance(x, dict) else x for key, x in row.items()} for row in rows)
    return output.getvalue()


FORMATS: dict[str, Callable[[View], str]] = {
    "text": text,
    "markdown": markdown,
    "latex": latex,
    "csv": as_csv,
    "json": as_json,
}


def wrap(x: str) -> str:
    return textwrap.fill(x, WIDTH, break_long_words=False, break_on_hyphens=False, subsequent_indent="  ")


def _below(shown: View, paragraph: Callable[[str], str]) -> list[str]:
    """What stands below the numbers: rule, protocol, notes, sources, commands and where they ran."""
    return [paragraph(x) for x in explanation(shown)]


def explanation(shown: View) -> list[str]:
    rule, table = shown.table.rule, shown.table
    counts = {v: sum(line.verdict == v for line in shown.lines) for v in ("matches", "better", "worse", "not run")}
    found = [f"Ours: {shown.origin}. " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + "."]
    how = ["A cell matches where its 95 % interval meets that of the published number"]
    if rule.tasks:
        how.append(f"(without one: that of a mean over {rule.tasks} tasks; and half a unit of the last digit)")
    if rule.relative or rule.absolute:
        margins = [f"{100 * rule.relative:g} %"] * (rule.relative > 0) + [f"{rule.absolute:g}"] * (rule.absolute > 0)
        how.append(f"or the optimum within {' or '.join(margins)}, where it is compared with that")
    found.append(" ".join(how) + ".")
    if rule.welch and any(line.bold for line in shown.lines):
        found.append(
            "Bold (* in text): the best of its row or not significantly worse (one-sided Welch test over tasks, "
            f"p = {rule.welch:g})."
        )
    found.append(f"Paper: {table.paper}.")
    found.append(f"Protocol: {table.protocol}")
    best: dict[str, list[str]] = {}
    for cell in shown.optima:
        best.setdefault(table.columns[cell.column].label, []).append(cell.row)
    if best:
        found.append("Optimum: " + "; ".join(f"{label} ({', '.join(rows)})" for label, rows in best.items()) + ".")
    notes: dict[str, list[str]] = {}
    for line in shown.lines:
        if line.note:
            notes.setdefault(line.note, []).append(str(line.cell))
    found += [f"Note on {', '.join(names)}: {note}" for note, names in notes.items()]
    sources = dict.fromkeys(line.published.source for line in shown.lines if line.published)
    found += [f"Published: {source}." for source in sources]
    commands: dict[tuple[str, ...], list[str]] = {}
    for cell, record in ({line.cell: line.record for line in shown.lines} | shown.optima).items():
        if record is not None:
            commands.setdefault((record["command"], where(record)), []).append(_with_choice(cell, record))
    return found + [f"{', '.join(names)}: {command} ({place})" for (command, place), names in commands.items()]


def _with_choice(cell: Cell, record: records.Record) -> str:
    """`n10k5.ucb1 (algo.c=0.2)`."""
    chosen = record["chosen"]
    return str(cell) + (f" ({', '.join(f'{key}={x:g}' for key, x in chosen.items())})" if chosen else "")


def where(record: records.Record) -> str:
    """On what, when and with which versions a cell was run."""
    device, versions = record["device"], record["versions"]
    failed = f", of which diverged: {', '.join(map(str, record['failed_seeds']))}" if record["failed_seeds"] else ""
    seeds = f"{record['n_seeds']} seeds{failed}, " if record["n_seeds"] > 1 else ""
    cores = f"{device['cores']} CPU core{'s' if device['cores'] > 1 else ''}"
    on = cores if device["platform"] == "cpu" else device["kind"]
    made_by = f"metarl {versions['metarl']}, jax {versions['jax']}"
    return f"{seeds}{record['seconds']:.0f} s on {on}, {record['date'][:10]}, {made_by}"
