"""`metarl runs` and `metarl compare`: what the run directories say, read as plain text. No JAX, no Hydra."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarl_cli import catalogue, directory
from metarl_cli.core.errors import MetarlError, RunError

SWEEP = ("sweep.json", "multirun.yaml")  # what makes a directory of runs a sweep; the second is there from the start
INSIDE = {"checkpoints", "evaluations", "figures", "tensorboard", "wandb"}  # a run holds no other runs


@dataclass(frozen=True)
class Run:
    path: Path
    what: str  # maml on point_nav
    status: str  # running, interrupted, completed, diverged, damaged
    iterations: str  # 60/100
    metric: str
    changed: float  # seconds since 1970
    size: int  # bytes


def runs(root: Path) -> int:
    """Prints a table of all runs below a directory, a line for each sweep above those of its runs; the newest last."""
    if not root.is_dir():
        raise MetarlError(f"{root}: there is no such directory. metarl runs DIR lists the runs below DIR.")
    found = list(_find(root))
    if not found:
        print(f"There are no runs in {root}.")
        return 0
    sweeps = {folder: [run for run in found if folder in run.path.parents] for folder in _sweeps(found, root)}
    lines, newest = [], lambda runs: max(run.changed for run in runs)
    alone = [run for run in found if not any(run in inside for inside in sweeps.values())]
    groups: list[tuple[Path | None, list[Run]]] = [*sweeps.items(), *((None, [run]) for run in alone)]
    for folder, group in sorted(groups, key=lambda item: newest(item[1])):
        if folder is not None:
            states = {status: sum(run.status == status for run in group) for status in sorted({r.status for r in group})}
            status = ", ".join(f"{n} {status}" for status, n in states.items())
            size = _size(sum(run.size for run in group))
            lines.append((f"{folder}", f"sweep of {len(group)}", status, "", "", _age(newest(group)), size))
        for run in sorted(group, key=lambda run: _natural(run.path) if folder else run.changed):
            name = f"  {run.path.relative_to(folder)}" if folder else f"{run.path}"
            lines.append((name, run.what, run.status, run.iterations, run.metric, _age(run.changed), _size(run.size)))
    _print(("run", "what", "status", "iteration", "trial return", "changed", "size"), lines)
    return 0


def compare(paths: Sequence[Path]) -> int:
    """Prints where the configs of some runs differ, and below it what they reached, a column for each run."""
    configs, results = [], []
    for path in paths:
        config = _config(directory.config_of(path))
        configs.append(dict(catalogue.leaves(config)))
        results.append(directory.read_result(path) or {})
    keys = list(dict.fromkeys(key for config in configs for key in config))
    lines: list[Sequence[str]] = []
    for key in keys:
        values = [_value(config[key]) if key in config else "-" for config in configs]
        if len(set(values)) > 1:
            lines.append((key, *values))
    lines.append(("", *("" for _ in paths)))
    lines.append(("status", *(run.status for run in map(_read, paths))))
    train = [result.get("train", {}) for result in results]
    lines.append(("training steps", *(f"{t['steps']:,}" if "steps" in t else "-" for t in train)))
    lines.append(("seconds", *(f"{t['wall_seconds']:.1f}" if "wall_seconds" in t else "-" for t in train)))
    for split in dict.fromkeys(split for result in results for split in result.get("evaluation", {})):
        found = [result.get("evaluation", {}).get(split, {}) for result in results]
        for name in ("trial_return", "trial_regret"):
            if any(name in evaluation for evaluation in found):
                lines.append((f"{split} {name}", *(_interval(evaluation.get(name)) for evaluation in found)))
        for which, index in (("first", 0), ("last", -1)):
            points = [evaluation["curve"][index] if evaluation.get("curve") else None for evaluation in found]
            lines.append((f"{split} return, {which} point", *(_interval(point) for point in points)))
    _print(("", *map(str, paths)), lines)
    print("\nIn brackets: 95 % bootstrap intervals over seeds and tasks (one seed: over tasks).")
    return 0


def _find(root: Path) -> Iterator[Run]:
    for folder, folders, files in os.walk(root):
        if "config.yaml" in files:
            folders[:] = []
            yield _read(Path(folder))
        folders[:] = sorted(name for name in folders if name not in INSIDE and not name.startswith("."))


def _sweeps(found: Sequence[Run], root: Path) -> list[Path]:
    folders = {parent for run in found for parent in run.path.parents if parent.is_relative_to(root)}
    return sorted(folder for folder in folders if any((folder / name).is_file() for name in SWEEP))


def _read(path: Path) -> Run:
    """One that cannot be read is `damaged`: the list goes on."""
    what, total, done, metric = "?", None, None, ""
    try:
        directory.config_of(path)
        config = _config(path / "config.yaml")
        choices = config["choices"]
        what, total = f"{choices['algo']} on {choices['env']}", config.get("iterations")
        result, last = directory.read_result(path), _last_row(path / "metrics.jsonl")
        done = last.get("iteration")
        if result is not None:
            done = result.get("train", {}).get("iterations", done)
            summary = next(iter(result.get("evaluation", {}).values()), {})
            metric = _interval(summary.get("trial_return"))
        elif isinstance(values := last.get("trial_return"), list) and (there := [x for x in values if x is not None]):
            metric = f"({sum(there) / len(there):.2f} in training)"
        if _held(path):
            status = "running"
        elif result is not None and (total is None or done is None or done >= total or result["status"] != "completed"):
            status = result["status"]
        else:
            status = "interrupted"
    except (RunError, KeyError, TypeError, ValueError, AttributeError):
        status = "damaged"
    changed, size = 0.0, 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                found = os.lstat(os.path.join(folder, name))
            except OSError:
                continue
            changed, size = max(changed, found.st_mtime), size + found.st_size
    iterations = "" if total is None else f"{done or 0}/{total}"
    return Run(path, what, status, iterations, metric, changed, size)


def _config(file: Path) -> dict[str, Any]:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError
        config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(config, dict) or not isinstance(config.get("choices"), dict):
            raise ValueError
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        raise RunError(f"{file}: is no config of a metarl run.") from None
    return config


def _last_row(path: Path) -> dict[str, Any]:
    """The last line of metrics of the training, from the last part of the file alone."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200_000))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # half written, or cut off
            continue
        if isinstance(row, dict) and "evaluation" not in row:
            return row
    return {}


def _held(run: Path) -> bool:
    """Whether a process works on it."""
    try:
        with (run / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _interval(summary: Any) -> str:
    try:
        return f"{summary['mean']:.2f} [{summary['ci_low']:.2f}, {summary['ci_high']:.2f}]"
    except (TypeError, KeyError, ValueError):
        return "-"


def _value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | bool) or value is None else str(value)


def _natural(path: Path) -> tuple[tuple[int, str], ...]:
    """So that 10 comes after 9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in path.parts)


def _age(changed: float) -> str:
    seconds = max(0.0, time.time() - changed)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "now"


def _size(size: int) -> str:
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if size >= 0.95 * length:
            return f"{size / length:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def _print(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[i]) for line in (columns, *lines)) for i in range(len(columns))]
    for line in (columns, *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
