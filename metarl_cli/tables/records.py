"""What is kept of a cell that was run: one small JSON file, `<table>/<cell>.json`, in a folder of the user's or in ours.

    {"schema_version": 1, "table": ..., "cell": "n10k5.rl2", "budget": "cpu", "command": "metarl train ...",
     "mean": 6.64, "ci_low": ..., "ci_high": ..., "iqm": ..., "interval_over": "seeds, tasks", "n_seeds": 5, "n_tasks": 1000,
     "std": of all S * N numbers, "by_seed": [...], "best_seed": {"seed", "mean", "ci_low", "ci_high"} | null,
     "chosen": {"algo.c": 0.2} | null, "method": how an optimum was computed | null, "failed_seeds": [],
     "seconds": of the run, "steps": environment steps per seed of the training | null,
     "date", "memory", "device", "versions", "git_revision"}

`mean` is null where an optimum does not fit into memory; `method` says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from metarl_cli.core.errors import RunError
from metarl_cli.core.statistics import summarise
from metarl_cli.logs import MetricsFile
from metarl_cli.runner import write_json
from metarl_cli.tables.table import Cell, Table

RECORDED = Path(__file__).parent / "recorded"  # what comes with metarl
OWN = Path("runs") / "tables"

Record = dict[str, Any]


def read(folder: Path, name: str) -> dict[Cell, Record]:
    """All records of a table in a folder.

    Raises:
        RunError: a file is damaged.
    """
    found = {}
    for path in sorted((folder / name).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            row, _, column = record["cell"].partition(".")
            found[Cell(row, column)] = record
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{path}: is no record of a cell. Delete it and reproduce the cell again.") from None
    return found


def write(folder: Path, record: Record) -> None:
    """At once or not at all."""
    directory = folder / record["table"]
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / f"{record['cell']}.json", record)


def measure(run: Path, table: Table, cell: Cell) -> Record:
    """What a finished run says about a cell: a record without what the caller knows (table, budget, command, seconds).

    Raises:
        RunError: the run has no such number.
    """
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    ((_, evaluation),) = result["evaluation"].items()
    provenance = {key: result[key] for key in ("date", "memory", "device", "versions", "git_revision")}
    head = {"cell": str(cell), "steps": result.get("train", {}).get("steps"), "failed_seeds": result.get("failed_seeds", [])}
    reads = table.columns[cell.column].reads
    if reads.startswith("best_"):
        return head | _optimum(table, cell, evaluation.get("optimum"), reads.removeprefix("best_")) | provenance
    with np.load(run / "evaluation.npz") as file:
        arrays = dict(file)
    chosen = None
    values = _of_episodes(table, cell, arrays["returns" if reads == "return" else "regret"], run)
    if result.get("tune") and reads == "return":
        candidates = [_of_episodes(table, cell, x[..., None], run) for x in arrays["candidates"]]
        best = int(np.argmax([x.mean() for x in candidates]))
        values, chosen = candidates[best], {result["tune"]["key"]: result["tune"]["candidates"][best]["value"]}
    summary = summarise(values)
    return {
        **head,
        **summary,
        "std": float(values.std(ddof=1)) if values.size > 1 else 0.0,
        "by_seed": values.mean(1).tolist(),
        "best_seed": _best_seed(run, table, values, result["seeds"]),
        "chosen": chosen,
        "method": None,
        **provenance,
    }


def _of_episodes(table: Table, cell: Cell, x: np.ndarray, run: Path) -> np.ndarray:
    """`[S, N, P, K] -> [S, N]`: sum or mean of the row's episodes."""
    first, last = table.rows[cell.row].episodes
    x = np.asarray(x, np.float64).reshape(*x.shape[:2], -1)
    if x.shape[2] < last:
        raise RunError(f"{run}: a trial has {x.shape[2]} episodes, and {cell} is about episodes {first} to {last - 1}.")
    return getattr(x[:, :, first:last], table.of_episodes)(axis=2)


def _optimum(table: Table, cell: Cell, found: dict[str, Any] | None, quantity: str) -> Record:
    """A number without an interval: what the best possible learner gets in expectation."""
    first, last = table.rows[cell.row].episodes
    value, method = None, "nothing is known"
    if found is not None:
        method = found["method"]
        if quantity == "regret":
            value = found.get("regret")
        elif "episodes" in found:
            value = float(sum(found["episodes"][first:last])) / (last - first if table.of_episodes == "mean" else 1)
        elif found["value"] is not None:
            value = found["value"] / (last - first if table.of_episodes == "mean" else 1)
    exact = {"mean": value, "ci_low": value, "ci_high": value, "iqm": value, "interval_over": None}
    none = {"std": 0.0, "by_seed": [], "best_seed": None, "chosen": None, "n_seeds": 1, "n_tasks": None}
    return exact | none | {"method": method}


def _best_seed(run: Path, table: Table, values: np.ndarray, seeds: list[int]) -> dict[str, Any] | None:
    """As the authors of RL^2 choose: by the mean training return of the last meta-iterations."""
    rows = [row for row in MetricsFile(run).read() if "evaluation" not in row] if table.rule.best_seed else []
    if not rows or table.rule.best_seed is None:
        return None
    last = [row["trial_return"] for row in rows if row["iteration"] > rows[-1]["iteration"] - table.rule.best_seed]
    trained = np.array(last, np.float64).mean(0)  # NaN where a seed failed
    best = int(np.nanargmax(trained))
    summary = summarise(values[best : best + 1])
    return {"seed": seeds[best], **{key: summary[key] for key in ("mean", "ci_low", "ci_high")}}
