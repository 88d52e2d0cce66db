"""Finished and unfinished runs as a report needs them: read from their directories, sorted into learners that met the same
tasks."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from metarl_cli import catalogue
from metarl_cli.core.errors import RunError
from metarl_cli.core.statistics import summarise_curve
from metarl_cli.logs import MetricsFile
from metarl_cli.report.figures import Curve

POINTS = 50  # of a curve beyond which it is averaged
NO_DIFFERENCE = ("seed", "seeds", "device", "devices", "plugins", "log_every")  # what two runs of one learner may differ in


class Run:
    """A run directory, of a training or of an evaluation of a learner that has nothing to train."""

    def __init__(self, path: Path):
        self.path = path
        try:
            config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
            self.choices: dict[str, str] = {key: str(config["choices"][key]) for key in ("algo", "env")}
            self.config: dict[str, Any] = {key: x for key, x in config.items() if key != "choices"}
            result = path / "result.json"
            self.result: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
            overrides = path / "overrides.yaml"
            self.overrides = yaml.safe_load(overrides.read_text(encoding="utf-8")) if overrides.exists() else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise RunError(f"{path}: cannot be read as a run: {error}. Leave it out, or start it again.") from None

    @property
    def status(self) -> str:
        return str(self.result.get("status", "not finished"))

    @property
    def command(self) -> str:
        """As it was typed, without the directory."""
        verb = "eval" if "tune" in self.config else "train"
        words = [str(word) for word in self.overrides if not str(word).startswith("hydra.run.dir=")]
        return " ".join(["metarl", verb, *words])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted keys."""
        return {"algo": self.choices["algo"], "env": self.choices["env"]} | dict(catalogue.leaves(self.config))

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """What result.json says of the one split; empty where there is nothing."""
        return next(iter(self.result.get("evaluation", {}).values()), {})

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        file = self.path / "evaluation.npz"
        if not self.evaluation or not file.exists():
            return {}
        with np.load(file) as arrays:
            return {name: x for name, x in arrays.items() if name != "candidates"}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return [row for row in MetricsFile(self.path).read() if "evaluation" not in row]

    @cached_property
    def tasks(self) -> str:
        """What has to agree for two runs to have met the same tasks."""
        evaluation = {key: x for key, x in (self.config.get("eval") or {}).items() if key in ("split", "tasks", "seed")}
        return json.dumps([self.choices["env"], self.config.get("env"), evaluation], sort_keys=True, default=str)


class Learner(NamedTuple):
    """Runs that differ in their seeds only."""

    label: str
    runs: list[Run]

    def array(self, name: str) -> np.ndarray | None:
        """`[S, N, P, K]` over all runs; None where one of them has none."""
        if not all(name in run.arrays for run in self.runs):
            return None
        return np.concatenate([run.arrays[name] for run in self.runs])

    @property
    def seeds(self) -> list[int]:
        return [seed for run in self.runs for seed in run.result.get("seeds", [])]


class Group(NamedTuple):
    """Learners that met the same tasks."""

    env: str
    split: str
    learners: list[Learner]

    @property
    def optimum(self) -> dict[str, Any]:
        """The best possible, where it is known and of the same trials for all."""
        every = [run.evaluation for learner in self.learners for run in learner.runs if run.evaluation]
        found = [evaluation.get("optimum") or {} for evaluation in every]
        values = {x.get("value") for x in found}
        return found[0] if len(values) == 1 and None not in values else {}


def find(path: Path) -> list[Run]:
    """The run at a path, or all runs below it.

    Raises:
        RunError: there is none.
    """
    if (path / "config.yaml").is_file():
        return [Run(path)]
    found = [Run(file.parent) for file in sorted(path.rglob("config.yaml"), key=_natural)] if path.is_dir() else []
    if not found:
        raise RunError(f"{path}: no run is here. A run directory holds a config.yaml; metarl train makes one.")
    return found


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """2 before 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.parts]


def groups(runs: list[Run]) -> list[Group]:
    by_tasks: dict[str, list[Run]] = {}
    for run in runs:
        by_tasks.setdefault(run.tasks, []).append(run)
    firsts = [some[0] for some in by_tasks.values()]
    apart = [{key: x for key, x in run.settings.items() if key.startswith(("env", "eval."))} for run in firsts]
    names = [
        ", ".join(filter(None, [run.choices["env"], _apart(own, apart)])) for run, own in zip(firsts, apart, strict=True)
    ]
    return [
        Group(name, str((run.config.get("eval") or {}).get("split", "")), learners(some))
        for name, run, some in zip(names, firsts, by_tasks.values(), strict=True)
    ]


def learners(runs: list[Run]) -> list[Learner]:
    """Runs of the same settings and other seeds are one learner; each is called by its algorithm and what sets it apart."""
    alike: dict[str, list[list[Run]]] = {}
    for run in runs:
        settings = {key: x for key, x in run.settings.items() if key not in NO_DIFFERENCE}
        lists = alike.setdefault(json.dumps(settings, sort_keys=True, default=str), [])
        seeds = set(run.result.get("seeds", []))

        def joins(others: list[Run], run: Run = run, seeds: set[int] = seeds) -> bool:
            taken = {seed for other in others for seed in other.result.get("seeds", [])}
            shapes = {other.arrays["returns"].shape[1:] for other in [*others, run] if other.arrays}
            return not seeds & taken and len(shapes) <= 1 and bool(run.arrays) == bool(others[0].arrays)

        for others in lists:
            if joins(others):
                others.append(run)
                break
        else:
            lists.append([run])
    found = [some for lists in alike.values() for some in lists]
    return [Learner(label, some) for label, some in zip(_labels([some[0] for some in found]), found, strict=True)]


def _labels(firsts: list[Run]) -> list[str]:
    labels = []
    for run in firsts:
        same = [other.settings for other in firsts if other.choices["algo"] == run.choices["algo"]]
        labels.append(" ".join(filter(None, [run.choices["algo"], _apart(run.settings, same)])))
    return [
        label if labels.count(label) == 1 else f"{label} ({run.path.name})"
        for label, run in zip(labels, firsts, strict=True)
    ]


def _apart(own: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """The settings that tell it from the others of the same family: as few as do, the first that do."""
    same = [other for other in others if other["env"] == own["env"]]
    telling: list[str] = []

    def kinds(keys: list[str]) -> int:
        return len({str([other.get(key) for key in keys]) for other in same})

    for key in own:
        if key not in NO_DIFFERENCE and kinds([*telling, key]) > kinds(telling):
            telling.append(key)
    return ", ".join(f"{key.rpartition('.')[2]}={own[key]}" for key in telling)


# --- curves


def adaptation(learner: Learner) -> Curve | None:
    """Return of an episode over the environment steps spent in the task before; long curves in windows."""
    returns, steps = learner.array("returns"), learner.array("steps")
    if returns is None or steps is None:
        return None
    spent = steps.sum(3).mean((0, 1))  # [P]
    before = np.concatenate([[0.0], np.cumsum(spent)[:-1]])
    windows = np.array_split(np.arange(len(before)), min(POINTS, len(before)))
    means = np.stack([returns.mean(3)[:, :, w].mean(2) for w in windows], axis=2)
    return _curve(learner.label, np.array([before[w].mean() for w in windows]), means)


def regret(learner: Learner) -> Curve | None:
    """Cumulative regret over the episodes of a trial."""
    regret = learner.array("regret")
    if regret is None:
        return None
    total = np.cumsum(regret.sum(3), axis=2)  # [S, N, P]
    places = np.unique(np.linspace(0, total.shape[2] - 1, POINTS).astype(int))
    return _curve(learner.label, (places + 1) * float(regret.shape[3]), total[:, :, places])


def _curve(label: str, x: np.ndarray, values: np.ndarray) -> Curve:
    points = summarise_curve(values)
    mean, low, high = (np.array([point[key] for point in points]) for key in ("mean", "ci_low", "ci_high"))
    return Curve(label, x, mean, low, high)


def training(learner: Learner) -> Curve | None:
    """Return of the last episodes of a training trial over the steps of the training; the band is one standard deviation of
    the seeds. Runs of other lengths are cut to the shortest."""
    metrics = [run.metrics for run in learner.runs]
    length = min(map(len, metrics))
    if not length:
        return None
    values = np.concatenate(
        [np.array([row["return_after"] for row in rows[:length]], np.float64) for rows in metrics], axis=1
    )
    steps = np.array([row["steps"] for row in metrics[0][:length]], np.float64)
    windows = np.array_split(np.arange(length), min(2 * POINTS, length))
    means = np.array([np.nanmean(values[w], axis=0) if np.isfinite(values[w]).any() else values[w][0] for w in windows])
    alive = means[:, np.isfinite(means).all(0)] if np.isfinite(means).all(0).any() else means
    mean, spread = alive.mean(1), alive.std(1)
    return Curve(learner.label, np.array([steps[w].mean() for w in windows]), mean, mean - spread, mean + spread)


def scores(group: Group) -> tuple[str, dict[str, np.ndarray]]:
    """One number per seed and task `[S, N]` by learner, and what it is: the whole trial where all live through as many
    episodes one by one, else the return of an episode at the end of it."""
    found = {learner.label: learner.array("returns") for learner in group.learners}
    returns = {label: x for label, x in found.items() if x is not None}
    shapes = {x.shape[2:] for x in returns.values()}
    if len(shapes) == 1 and next(iter(shapes))[1] == 1:
        ((episodes, _),) = shapes
        what = f"trial return (sum over {episodes} episodes)" if episodes > 1 else "return"
        return what, {label: x.sum((2, 3)) for label, x in returns.items()}
    return "return of an episode at the end of a trial", {label: x[:, :, -1].mean(2) for label, x in returns.items()}
