"""One sweep, `metarl train -m`: its points, what has been done of them already, and the summary of all.

A point is an ordinary run in a directory of its own, named by what is swept. Hydra's sweeper says which points there are and
its launcher how they are started: one after another, in processes of their own, or, with `hydra/launcher=vmap`, those of the
same structure as one program. All of them end in `Job`. A point that has ended is not run again, one that was interrupted
goes on from its checkpoint, and one that fails is told at the end and stops no other.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from metarl_cli import catalogue, checkpoint, directory, search
from metarl_cli import config as configs
from metarl_cli.config import Composed
from metarl_cli.core.errors import MetarlError, RunError
from metarl_cli.core.interfaces import MetaLearner, TaskFamily
from metarl_cli.core.statistics import summarise
from metarl_cli.logs import log_to, say, table
from metarl_cli.runner import (
    SCHEMA_VERSION,
    Interrupted,
    OutOfMemory,
    Point,
    Prune,
    Session,
    configure_jax,
    drawn,
    make_directory,
    now,
    write_json,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

TOGETHER = 128  # runs in one program: each keeps a few files open
ENDED = ("completed", "diverged", "pruned")


class Outcome(NamedTuple):
    """Of one point. As a number it is the metric, which is what Hydra's sweepers optimise."""

    run: Path
    overrides: list[str]
    status: str  # one of ENDED, failed or interrupted
    metric: float = float("nan")
    message: str = ""

    def __float__(self) -> float:
        return self.metric


class Candidate(NamedTuple):
    """A point that is to be trained, or to be trained on."""

    composed: Composed
    learner: MetaLearner
    family: TaskFamily
    done: int  # meta-iterations


def run(overrides: list[str], config_dir: Path | None) -> int:
    """`metarl train -m`. Returns the exit code."""
    try:
        folder, outcomes = configs.sweep(overrides, config_dir, Job(config_dir, os.getpid()))
    except SystemExit as ended:
        return int(str(ended.code))
    return summarise_sweep(folder, outcomes, overrides, Console())


class Job(NamedTuple):
    """Trains points. Hydra's launchers may send it to another process."""

    config_dir: Path | None
    process: int  # that the sweep was started in

    def __call__(self, points: list[list[str]], hydra: DictConfig) -> list[Outcome]:
        """
        Args:
            points: the overrides of each, `hydra.run.dir` the last of them.
            hydra: that section of the config.

        Raises:
            SystemExit: a signal came; what was computed is saved, and no other point is to begin here.
        """
        here = os.getpid() == self.process
        console = Console(quiet=not here)
        jax.clear_caches()  # a compiled program keeps memory mapped: those of 40 runs would exceed what Linux allows
        found = [look_up(overrides, self.config_dir) for overrides in points]
        outcomes = {x.run: x for x in found if isinstance(x, Outcome)}
        for outcome in outcomes.values():
            say(f"{outcome.run.name}: {describe(outcome)}", Console())
        try:
            for group in groups([x for x in found if isinstance(x, Candidate)]):
                for outcome in train(group, hydra.launcher.get("runs") or TOGETHER, search.pruner(hydra.sweeper), console):
                    outcomes[outcome.run] = outcome
                    say(f"{outcome.run.name}: {describe(outcome)}", Console())
        except Interrupted as error:
            if here:
                print("metarl: Interrupted; everything is saved. The same command goes on.", file=sys.stderr)
                raise SystemExit(error.exit_code) from None
            if requeued():  # a result would tell the sweep that this is over
                raise SystemExit(error.exit_code) from None
        runs = [x.run if isinstance(x, Outcome) else x.composed.run_dir for x in found]
        return [outcomes.get(run, Outcome(run, point, "interrupted")) for run, point in zip(runs, points, strict=True)]


def requeued() -> bool:
    """Whether this is a job of Slurm that will be started again: it was pre-empted, and not cancelled."""
    job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if job is None or shutil.which("scontrol") is None:
        return False
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True).stdout
    return any(int(n) > restarts for n in re.findall(r" Restarts=(\d+)", shown))


def look_up(overrides: list[str], config_dir: Path | None) -> Candidate | Outcome:
    """A point as it stands: ended already, impossible, or to be trained."""
    run = Path(overrides[-1].partition("=")[2].strip("'"))
    try:
        composed = configs.compose(overrides, config_dir)
        run = composed.run_dir
        if (run / "config.yaml").exists():
            check_same(composed)
            outcome = ended(composed) if (run / "result.json").exists() else None
            if outcome is not None and (outcome.status != "completed" or drawn(composed)):
                return outcome
        configure_jax(composed.config)
        done = checkpoint.latest(run, "last") or 0
        return Candidate(composed, *configs.build(composed.config, composed.algo, composed.env), done)
    except MetarlError as error:
        return Outcome(run, overrides, "failed", message=str(error))


def check_same(composed: Composed) -> None:
    """Raises `RunError` where the directory holds a run with other settings."""
    there = configs.from_run(composed.run_dir, [], allowed=()).resolved
    old, new = dict(catalogue.leaves(there)), dict(catalogue.leaves(composed.resolved))
    differ = sorted(
        key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and key not in ("device", "figures")
    )
    if differ:
        problem = f"holds a run with other settings ({', '.join(differ)})"
        raise RunError(f"{composed.run_dir}: {problem}. Remove it, or name another directory: hydra.sweep.dir=PATH.")


def ended(composed: Composed) -> Outcome:
    """What `result.json` says of a point."""
    result = directory.read_result(composed.run_dir)
    assert result is not None
    outcome = Outcome(composed.run_dir, composed.overrides, result["status"], message=result.get("message") or "")
    if result["status"] != "completed":
        return outcome
    found = result["evaluation"][composed.config.eval.split]
    point = {"return_before": 0, "return_after": -1}.get(composed.config.metric)
    summary = found["trial_return"] if point is None else found["curve"][point]
    return outcome._replace(metric=summary["mean"])


# --- several as one program


def groups(candidates: list[Candidate]) -> list[list[Candidate]]:
    """Those that can share a program: of the same structure, and equally far."""
    found: dict[Any, list[Candidate]] = {}
    families: list[tuple[str, TaskFamily]] = []
    for candidate in candidates:
        family = share_environment(candidate, families)
        leaves, structure = jax.tree.flatten((candidate.learner, family))
        shapes = tuple(np.shape(leaf) for leaf in leaves)
        settings = repr(without_floats(candidate.composed.config.model_dump(exclude={"seed", "seeds"})))
        found.setdefault((structure, shapes, settings, candidate.done), []).append(candidate._replace(family=family))
    return list(found.values())


def share_environment(candidate: Candidate, families: list[tuple[str, TaskFamily]]) -> TaskFamily:
    """The family, with the very environment of another one whose environment has the same class and attributes.

    Environments shape the program, and two of them are equal only if they are one.
    """
    settings, family = repr(candidate.composed.config.env), candidate.family
    for other_settings, other in families:
        if settings == other_settings:
            return other
        if type(family) is type(other) and alike(family.env, other.env):
            family = dataclasses.replace(family, env=other.env)  # type: ignore[type-var]
            break
    families.append((settings, family))
    return family


def alike(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | jax.Array):
        return np.array_equal(a, b)
    if not hasattr(a, "__dict__") or callable(a):
        return a == b
    return vars(a).keys() == vars(b).keys() and all(alike(x, vars(b)[name]) for name, x in vars(a).items())


def without_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_floats(item) for item in value]
    return "float" if isinstance(value, float) else value


def train(group: list[Candidate], limit: int, prune: Prune, console: Console) -> Iterator[Outcome]:
    """In as few programs as fit in memory.

    Args:
        limit: runs in one program.
    """
    while group:
        size = -(-len(group) // -(-len(group) // limit))
        part, rest = group[:size], group[size:]
        try:
            yield from train_together(part, prune, console)
        except OutOfMemory:
            if len(part) == 1:
                raise
            limit = -(-len(part) // 2)
            say(f"{len(part)} runs in one program do not fit in memory; trying {limit}", console)
            rest = group
        group = rest


def train_together(group: list[Candidate], prune: Prune, console: Console) -> list[Outcome]:
    """As one program; one run alone is an ordinary run."""
    alone = len(group) == 1
    name = group[0].composed.run_dir.name if alone else f"{len(group)} runs in one program"
    say(f"\n{name}{f', from meta-iteration {group[0].done} on' if group[0].done else ''}", console)
    shown = console if alone else Console(quiet=True)
    configure_jax(group[0].composed.config)
    points: list[Point] = []
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        for composed, learner, family, _ in group:
            try:
                if not (composed.run_dir / "config.yaml").exists():
                    make_directory(composed)
                stack.enter_context(checkpoint.RunLock(composed.run_dir))
                if alone:
                    stack.enter_context(log_to(composed.run_dir, console))
                configs.save(composed, composed.run_dir)
                points.append(Point(composed.run_dir, composed, learner, family, shown))
            except MetarlError as error:
                outcomes.append(Outcome(composed.run_dir, composed.overrides, "failed", message=str(error)))
        if not points:
            return outcomes
        try:
            session = Session(points, console, prune)
            if any((point.run / "metrics.jsonl").exists() for point in points):
                session.restore()
            session.go_on()
        except (Interrupted, OutOfMemory) as error:
            if isinstance(error, Interrupted) or not alone:
                raise
            points[0].error = error
        except MetarlError as error:
            for point in points:
                point.error = point.error or error
        except Exception as error:  # a bug of ours or of a plug-in: other points may go well
            for point in points:
                with log_to(point.run, Console(quiet=True)):
                    logging.getLogger("metarl").exception("a bug")
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                point.error = MetarlError(f"{what}. This is a bug; the stack trace is in {point.run / 'log.txt'}.")
    for point in points:
        if (point.run / "result.json").exists():
            outcomes.append(ended(point.composed))
        else:
            outcomes.append(Outcome(point.run, point.composed.overrides, "failed", message=str(point.error)))
    return outcomes


# --- the summary


def describe(outcome: Outcome) -> str:
    if outcome.status == "completed":
        return f"{outcome.metric:.4g}"
    return f"{outcome.status}{f': {outcome.message}' if outcome.message else ''}"


def summarise_sweep(folder: Path, outcomes: list[Outcome], overrides: list[str], console: Console) -> int:
    """Writes `sweep.json` and the figure, prints the table and what failed. Returns the exit code."""
    chosen = [line.partition("=")[2] for line in overrides if line.startswith("metric=")]
    metric: str = chosen[0] if chosen else catalogue.defaults({})["metric"]
    swept = swept_values(outcomes)
    points = [
        {
            "run": outcome.run.relative_to(folder).as_posix(),
            "swept": values,
            "status": outcome.status,
            "metric": outcome.metric,
            "message": outcome.message or None,
        }
        for values, outcome in zip(swept, outcomes, strict=True)
    ]
    head = {"schema_version": SCHEMA_VERSION, "overrides": overrides, "date": now(), "metric": metric}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sweep.json", {**head, "points": points})
    completed = [(v, outcome.metric) for v, outcome in zip(swept, outcomes, strict=True) if outcome.status == "completed"]
    if completed:
        print_table(metric, completed, console)
        from metarl_cli.report import figures

        try:
            figures.save(figures.sweep([{**v, metric: x} for v, x in completed], metric), folder / "figures" / "sweep")
        except OSError as error:
            say(f"the figure could not be written: {error}", console)
    failed = [outcome for outcome in outcomes if outcome.status not in ("completed", "pruned")]
    pruned = sum(outcome.status == "pruned" for outcome in outcomes)
    counts = f"{f', {pruned} pruned' if pruned else ''}, {len(failed) or 'none'} failed"
    say(f"\n{len(outcomes)} runs{counts}. Everything is in {folder}", console)
    sys.stdout.flush()
    for outcome in failed:
        print(f"metarl: {outcome.run.name}: {describe(outcome)}", file=sys.stderr)
    return 1 if failed else 0


def swept_values(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Of each point the overrides that not all have alike, numbers as numbers."""
    lines = [dict(line.lstrip("+").split("=", 1) for line in outcome.overrides[:-1]) for outcome in outcomes]
    keys = list(dict.fromkeys(key for line in lines for key in line))
    varied = [key for key in keys if len({line.get(key) for line in lines}) > 1]

    def value(text: str) -> Any:
        try:
            return int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:
            return text

    return [{key: value(line[key]) for key in varied if key in line} for line in lines]


def print_table(metric: str, completed: list[tuple[dict[str, Any], float]], console: Console, most: int = 30) -> None:
    """The best first; points that differ in the seed alone share a line."""
    found: dict[tuple[Any, ...], list[float]] = {}
    keys = [key for key in completed[0][0] if key != "seed"]
    for values, x in completed:
        found.setdefault(tuple(values.get(key) for key in keys), []).append(x)
    rows = []
    for values, x in sorted(found.items(), key=lambda item: -float(np.mean(item[1]))):
        summary = summarise(np.asarray(x)[:, None])
        interval = f"[{summary['ci_low']:.2f}, {summary['ci_high']:.2f}]" if len(x) > 1 else None
        rows.append((*(f"{v:g}" if isinstance(v, float) else str(v) for v in values), len(x), summary["mean"], interval))
    title = f"\n{metric}{f', the best {most} of {len(rows)} settings' if len(rows) > most else ''}"
    table(title, (*keys, "runs", "mean", "95% over runs"), rows[:most], console)
