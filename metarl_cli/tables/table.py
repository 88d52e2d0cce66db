"""A paper's table: rows times columns of cells, each a published number and the command that reproduces it.

One table is one file in configs/table/. A row is a setting (10 pulls of 5 arms), a column a learner. What is run for a cell
is the overrides of its row, of its column and of the budget, one after the other; cells of the same command share its run.
Published numbers stand in published/*.csv with their sources, and only there.
"""

from __future__ import annotations

import csv
import difflib
import functools
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import yaml
from pydantic import ValidationError, model_validator

from metarl_cli import catalogue
from metarl_cli.core.errors import ConfigError, MetarlError
from metarl_cli.core.settings import Settings, setting

Budget = Literal["smoke", "cpu", "gpu", "full"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
PUBLISHED = Path(__file__).parent / "published"
SEEDS = 5
SMOKE_SEEDS = 2

Lines = tuple[str, ...]  # overrides, as typed


class Source(Settings):
    """Where a column's published numbers stand."""

    file: str = setting("of published/, without .csv")
    method: str = setting("how the file calls the learner")


class Row(Settings):
    label: str = setting("how it is printed")
    overrides: Lines = setting("the family and what makes this setting")
    episodes: tuple[int, int] = setting("the episodes [first, last) of a trial that count")
    published: dict[str, Lines] = setting("how the published files call this setting; the first name that is there counts")


class Column(Settings):
    label: str = setting("how it is printed")
    rows: Lines = setting("patterns of the rows that it has")
    overrides: Lines = setting("the learner and its settings")
    reads: Literal["return", "regret", "best_return", "best_regret"] = setting(
        "what of a run is reported: what the learner got, or what the best possible one gets in expectation"
    )
    against: Source | Literal["optimum"] | None = setting("what the verdict compares with; null: with nothing")
    budgets: dict[Budget, dict[str, Lines]] | None = setting(
        "of a learner that is trained: further overrides, by budget and patterns of rows; null: nothing to train"
    )


class Rule(Settings):
    """When ours matches."""

    better: Literal["higher", "lower"] = setting("which numbers are good")
    tasks: int | None = setting(
        "on how many tasks published numbers without an interval were measured; null: they are exact", ge=1
    )
    relative: float = setting("margin around the optimum where it is what the verdict compares with, as a share of it", ge=0)
    absolute: float = setting("the same as a number; the larger margin counts", ge=0)
    welch: float | None = setting(
        "level of the one-sided Welch test: bold are the best of a row and all not significantly worse; null: nothing",
        gt=0,
        lt=1,
    )
    best_seed: int | None = setting(
        "the paper reports the seed of the best training return over so many last iterations; null: it does not", ge=1
    )


class Table(Settings):
    title: str = setting("in one line")
    paper: str = setting("which")
    protocol: str = setting("how the numbers come about, and what is not as in the paper")
    quantity: str = setting("what a number is")
    of_episodes: Literal["sum", "mean"] = setting("what of a row's episodes it is")
    digits: int = setting("after the decimal point", ge=0)
    optimum: Lines = setting("columns that hold the best possible; the first that has a number counts")
    rule: Rule
    smoke: Lines = setting("further overrides of every cell under budget=smoke")
    rows: dict[str, Row]
    columns: dict[str, Column]
    notes: dict[str, str] = setting("by pattern of cells: why a number is not as published")

    @model_validator(mode="after")
    def _known(self) -> Table:
        for place, patterns, names in (
            ("optimum", self.optimum, self.columns),
            *((f"columns.{name}.rows", column.rows, self.rows) for name, column in self.columns.items()),
            *(
                (f"columns.{name}.budgets.{budget}", patterns, self.rows)
                for name, column in self.columns.items()
                for budget, patterns in (column.budgets or {}).items()
            ),
            ("notes", self.notes, [str(cell) for cell in self.cells()]),
        ):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(f"{place}: {pattern} is nothing in this table")
        return self

    def cells(self) -> list[Cell]:
        """All of them, row by row."""
        return [
            Cell(row, column)
            for row in self.rows
            for column, settings in self.columns.items()
            if any(fnmatchcase(row, pattern) for pattern in settings.rows)
        ]

    def published(self, cell: Cell) -> Published | None:
        against = self.columns[cell.column].against
        if not isinstance(against, Source):
            return None
        known = published(against.file)
        for setting_name in self.rows[cell.row].published.get(against.file, ()):
            if (setting_name, against.method) in known:
                return known[setting_name, against.method]
        return None

    def command(self, cell: Cell, budget: Budget, seeds: int | None) -> Lines | None:
        """What follows `metarl`: `train` or `eval` and overrides, of which the last of a key is left; without a directory.

        None where the budget does not include the cell.

        Args:
            seeds: of learners that are trained; None: 5, in a smoke run 2.
        """
        row, column = self.rows[cell.row], self.columns[cell.column]
        lines = [*row.overrides, *column.overrides]
        if column.budgets is not None:
            matching = [more for name, more in column.budgets.get(budget, {}).items() if fnmatchcase(cell.row, name)]
            if not matching:
                return None
            lines += [line for more in matching for line in more]
            lines.append(f"seeds={seeds or (SMOKE_SEEDS if budget == 'smoke' else SEEDS)}")
        if budget == "smoke":
            lines += self.smoke
        last = {"algo": "", "env": ""} | {line.partition("=")[0]: line for line in lines}
        return ("eval" if column.budgets is None else "train", *filter(None, last.values()))

    def note(self, cell: Cell) -> str:
        return " ".join(note for pattern, note in self.notes.items() if fnmatchcase(str(cell), pattern))


class Cell(NamedTuple):
    row: str
    column: str

    def __str__(self) -> str:
        return f"{self.row}.{self.column}"


class Published(NamedTuple):
    """A published number as it was printed."""

    value: float
    half_digit: float  # half a unit of its last digit
    ci: float | None  # half-width of its 95 % interval, where there is one
    source: str
    text: str


@functools.cache
def published(file: str) -> dict[tuple[str, str], Published]:
    """The numbers of a file by setting and method."""
    with (PUBLISHED / f"{file}.csv").open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if re.fullmatch(r"-?\d+(\.\d+)?", row["value"])]
    return {
        (row["setting"], row["method"]): Published(
            value=float(row["value"]),
            half_digit=0.5 * 10.0 ** -len(row["value"].partition(".")[2]),
            ci=float(row["ci"]) if row["ci"] else None,
            source=row["source"],
            text=row["value"] + (f" ± {row['ci']}" if row["ci"] else ""),
        )
        for row in rows
    }


def load(name: str, config_dir: Path | None = None) -> Table:
    """A table by its name.

    Raises:
        ConfigError: there is none, or its file is wrong.
    """
    files = catalogue.tables(config_dir)
    if name not in files:
        raise ConfigError("table", name, "there is no such table", allowed=files)
    try:
        content = yaml.safe_load(files[name].read_text(encoding="utf-8"))
        # As JSON, where lists may become tuples even in strict mode.
        return Table.model_validate_json(json.dumps(content))
    except yaml.YAMLError as error:
        raise ConfigError(str(files[name]), None, f"is not valid YAML: {error}") from None
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            key = ".".join(map(str, detail["loc"])) or "table"
            lines.append(f"table/{name}.yaml, {key}: {detail['msg'].removeprefix('Value error, ')}.")
        raise MetarlError("\n".join(lines)) from None


def select(table: Table, words: list[str]) -> list[Cell]:
    """The cells that words name: a row (n10k5), a column (rl2) or one cell (n10k5.rl2); all of them without words.

    Raises:
        ConfigError: a word names nothing.
    """
    cells = table.cells()
    names = {*table.rows, *table.columns, *map(str, cells)}
    for word in words:
        if word not in names:
            near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
            raise ConfigError(
                "cells",
                word,
                "is no row, column or cell of this table",
                allowed=[*table.rows, *table.columns],
                hint=f"Did you mean {near[0]}?" if near and near[0] not in (*table.rows, *table.columns) else "",
            )
    return [cell for cell in cells if not words or {cell.row, cell.column, str(cell)} & set(words)]
