"""A run directory as it lies on the disk, which may come from anybody: what is read there is data, never code.

No pickle is read anywhere. What a run never holds is refused before anything else of it is used: links that lead out of the
directory, files that are no files, files larger than any that metarl writes there.
"""

from __future__ import annotations

import difflib
import json
import os
import stat
from pathlib import Path
from typing import Any

from metarl_cli.core.errors import RunError

# Bytes. A checkpoint is bounded by the state that it has to hold, the others by the disk alone.
LIMITS = {
    "config.yaml": 10**6,
    "overrides.yaml": 10**6,
    "result.json": 10**8,
    "manifest.json": 10**8,
    "metrics.jsonl": 10**10,
}
# What a run leaves that was killed before its config.yaml was there.
UNBEGUN = {".probe", ".lock", "log.txt", ".config.yaml", "overrides.yaml"}


def empty(run: Path) -> bool:
    """Whether a run can begin in this directory: there is none yet, at most the first files of one that was killed."""
    return {path.name for path in run.iterdir()} <= UNBEGUN


def check(run: Path) -> None:
    """Raises `RunError` for the first thing that no run directory holds."""
    root = run.resolve()
    for folder, folders, files in os.walk(run):
        for name in (*folders, *files):
            path = Path(folder, name)
            try:
                if path.is_symlink():
                    inside, problem = path.resolve().is_relative_to(root), "is a link that leads out of the run directory"
                else:
                    mode = path.lstat().st_mode
                    inside, problem = stat.S_ISREG(mode) or stat.S_ISDIR(mode), "is neither a file nor a directory"
                size = path.stat().st_size if name in LIMITS and inside else 0
            except (OSError, RuntimeError):  # deleted meanwhile; a link that leads nowhere or to itself
                continue
            if not inside:
                raise RunError(f"{path}: {problem}. A run holds none: delete it, if you trust the rest.")
            if size > LIMITS.get(name, size):
                raise RunError(f"{path}: has {size / 1e6:,.0f} MB, more than metarl ever writes there.")


def config_of(run: Path) -> Path:
    """The `config.yaml` of a run directory."""
    if run.is_file():
        raise RunError(f"{run}: is a file, not a run directory.")
    if not run.is_dir():
        near = difflib.get_close_matches(run.name, _names(run.parent), n=1, cutoff=0.5)
        hint = f" Did you mean {run.parent}/{near[0]}?" if near else ""
        raise RunError(f"{run}: there is no such run directory.{hint}")
    file = run / "config.yaml"
    if not file.is_file():
        inside = sorted(path.parent for path in run.glob("*/config.yaml"))
        hint = f"Did you mean {inside[-1]}, the latest run in it?" if inside else "metarl train makes one."
        if empty(run):
            hint = f"A run that was stopped before it began starts anew: metarl train ... hydra.run.dir={run}"
        if (run / "multirun.yaml").is_file():
            hint = "It is a sweep: name one of its runs. The command that made it goes on with all of them."
        raise RunError(f"{run}: is no run directory: it holds no config.yaml. {hint}")
    check(run)
    return file


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def read_result(run: Path) -> dict[str, Any] | None:
    """`result.json`, where there is one.

    Raises:
        RunError: it is damaged.
    """
    path = run / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        _ = result["status"] + "", result.get("train", {"iterations": 0})["iterations"] + 0
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise RunError(f"{path}: damaged. Delete it and `metarl resume` the run.") from None
    return result
