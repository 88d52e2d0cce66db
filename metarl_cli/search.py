"""What `hydra/sweeper=optuna` searches with: spaces from Hydra's overrides, samplers, a study that is kept, pruning.

The study is a database file (SQLite by default) and holds everything: every proposal is drawn anew from what is recorded
there, so a search that was stopped goes on as if it had not been, and never draws the same trials again. Trials that were
running when it stopped come first, with their own parameters: their runs go on from their checkpoints.

Optuna: Akiba et al. 2019, arXiv:1907.10902. CMA-ES: Hansen 2016, arXiv:1604.00772; by `cmaes`, the library that Optuna uses
as well, but replayed from the recorded trials: Optuna's own sampler keeps its state as a pickle in the database, and reading
a pickle can run code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from metarl_cli.core.errors import ConfigError, MetarlError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import Trial

    from metarl_cli.runner import Point, Prune

Sampler = Literal["tpe", "cmaes", "random", "grid"]
SAMPLERS, PRUNERS = ("tpe", "cmaes", "random", "grid"), ("none", "median", "halving")
RUNGS = (1, 3, 9)  # tenths of the training after which `halving` looks
NAME = "metarl"  # of the study in the database


class Search:
    """A study and how it goes on.

    Args:
        space: what is searched, by key.
        storage: the address of the database.
        trials: how many there are to be in all.
    """

    def __init__(
        self,
        space: dict[str, BaseDistribution],
        storage: str,
        sampler: str,
        pruner: str,
        direction: str,
        trials: int,
        seed: int,
    ):
        choices = {"sampler": SAMPLERS, "pruner": PRUNERS, "direction": ("maximize", "minimize")}
        for (key, allowed), value in zip(choices.items(), (sampler, pruner, direction), strict=True):
            if value not in allowed:
                raise ConfigError(f"hydra.sweeper.{key}", value, "no such choice", allowed=allowed)
        if not space:
            hint = "Give a key an interval or several values: 'algo.lr=tag(log,interval(1e-4,1e-2))'."
            raise ConfigError("hydra/sweeper", "optuna", "has nothing to search", hint=hint)
        self.space, self.storage, self.sampler, self.trials, self.seed = space, storage, sampler, trials, seed
        self.study = study(storage, direction)
        begun = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name != "WAITING"]
        self.waiting = [trial for trial in begun if trial.state.name == "RUNNING"]
        self.ended = [trial for trial in begun if trial.state.name != "RUNNING"]
        if any(trial.distributions != space for trial in begun):
            problem = "holds a search of another space"
            raise ConfigError("hydra.sweeper.storage", storage, problem, hint="Take another hydra.sweep.dir.")

    def ask(self, most: int) -> list[Trial]:
        """The next trials, at most so many; none when the search is over."""
        import optuna

        batch = [optuna.trial.Trial(self.study, trial._trial_id) for trial in self.waiting[:most]]
        self.waiting = self.waiting[most:]
        while len(batch) < most:
            recorded = self.study.get_trials(deepcopy=False)
            if len(recorded) >= self.trials:
                break
            # Another stream of random numbers for each trial: a search that goes on draws no number a second time.
            seed = int(np.random.SeedSequence([self.seed, len(recorded)]).generate_state(1)[0])
            if self.sampler == "random":
                self.study.sampler = optuna.samplers.RandomSampler(seed=seed)
            else:
                self.study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=len(self.space) > 1)
            if self.sampler in ("cmaes", "grid"):
                params = self.grid() if self.sampler == "grid" else self.cmaes(seed)
                if params is None:
                    break
                self.study.enqueue_trial(params)
            batch.append(self.study.ask(self.space))
        return batch

    def tell(self, trial: Trial, status: str, metric: float) -> None:
        """How a trial ended; one that was interrupted goes on running."""
        from optuna.trial import TrialState

        if status == "completed" and math.isfinite(metric):
            self.study.tell(trial, metric)
        elif status != "interrupted":
            self.study.tell(trial, state=TrialState.PRUNED if status == "pruned" else TrialState.FAIL)

    def grid(self) -> dict[str, Any] | None:
        """The first combination that no trial has had."""
        values = {key: steps(key, distribution) for key, distribution in self.space.items()}
        had = [trial.params for trial in self.study.get_trials(deepcopy=False)]
        every = (dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values()))
        return next((params for params in every if params not in had), None)

    def cmaes(self, seed: int) -> dict[str, Any]:
        """A draw from the distribution to which the completed trials have led, each generation of them in turn."""
        try:
            from cmaes import CMA
        except ImportError:
            raise MetarlError("hydra.sweeper.sampler=cmaes: needs the package cmaes: pip install 'metarl[optuna]'") from None
        scales = [scale(key, distribution) for key, distribution in self.space.items()]
        if len(scales) < 2:
            raise ConfigError("hydra.sweeper.sampler", "cmaes", "needs two parameters or more", hint="Take tpe.")
        bounds = np.array([[0.0, 1.0]] * len(scales))
        optimizer = CMA(mean=np.full(len(scales), 0.5), sigma=0.3, bounds=bounds, seed=seed % 2**31)
        sign = -1 if self.study.direction.name == "MAXIMIZE" else 1
        done = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
        for first in range(0, len(done) - optimizer.population_size + 1, optimizer.population_size):
            generation = done[first : first + optimizer.population_size]
            solutions = [
                (
                    np.array([s.inward(trial.params[key]) for key, s in zip(self.space, scales, strict=True)]),
                    sign * trial.value,
                )
                for trial in generation
                if trial.value is not None
            ]
            optimizer.tell(solutions)
        drawn = optimizer.ask()
        return {key: s.outward(float(x)) for key, s, x in zip(self.space, scales, drawn, strict=True)}


def check_library() -> None:
    """Raises `ConfigError` where Optuna is not installed."""
    import importlib.util

    if importlib.util.find_spec("optuna") is None:
        hint = "It comes with pip install 'metarl[optuna]'."
        raise ConfigError("hydra/sweeper", "optuna", "the package is not installed", hint=hint)


def study(storage: str, direction: Any) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return optuna.create_study(storage=storage, study_name=NAME, direction=direction, load_if_exists=True)
    except Exception as error:  # of the database's own library, of many types
        raise ConfigError("hydra.sweeper.storage", storage, f"cannot be used: {str(error).splitlines()[0]}") from None


# --- spaces


def distribution(override: Override) -> BaseDistribution:
    """What a swept override means: `tag(log,interval(1e-4,1e-2))`, `int(interval(1,8))`, `range(1,5)`, `choice(a,b)`."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    if override.is_interval_sweep():
        log, whole = "log" in value.tags, isinstance(value.start, int) and isinstance(value.end, int)
        if not value.start < value.end or (log and value.start <= 0):
            hint = "The first end is the smaller one, with tag(log,...) above 0."
            raise ConfigError(override.key_or_group, str(override.input_line).partition("=")[2], "is no interval", hint=hint)
        kind: Any = IntDistribution if whole else FloatDistribution
        return kind(value.start, value.end, log=log)
    texts = list(override.sweep_string_iterator())
    numbers = [as_number(text) for text in texts]
    if override.is_range_sweep() and len(numbers) > 1 and all(isinstance(x, int) for x in numbers):
        return IntDistribution(min(numbers), max(numbers), step=abs(numbers[1] - numbers[0]))
    return CategoricalDistribution([text if x is None else x for text, x in zip(texts, numbers, strict=True)])


def as_number(text: str) -> Any:
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return None


def steps(key: str, distribution: BaseDistribution) -> Sequence[Any]:
    """The values of one parameter on a grid."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return range(distribution.low, distribution.high + 1, distribution.step)
    raise ConfigError("hydra.sweeper.sampler", "grid", f"{key} is an interval", hint=f"Name its values: {key}=1,2,3.")


class Scale(NamedTuple):
    """Between a parameter and [0, 1]."""

    low: float
    high: float
    log: bool
    whole: bool

    def inward(self, value: float) -> float:
        low, high, x = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (x - low) / (high - low)

    def outward(self, x: float) -> float:
        low, high = (math.log(v) if self.log else v for v in (self.low, self.high))
        value = low + min(1.0, max(0.0, x)) * (high - low)
        value = min(self.high, max(self.low, math.exp(value) if self.log else value))
        return round(value) if self.whole else value


def scale(key: str, distribution: BaseDistribution) -> Scale:
    from optuna.distributions import FloatDistribution, IntDistribution

    if not isinstance(distribution, FloatDistribution | IntDistribution) or distribution.step not in (None, 1):
        raise ConfigError("hydra.sweeper.sampler", "cmaes", f"{key} is no interval", hint="Take tpe, or an interval.")
    return Scale(distribution.low, distribution.high, distribution.log, isinstance(distribution, IntDistribution))


# --- pruning


def pruner(sweeper: DictConfig) -> Prune:
    """Which runs of a search are not worth going on with, by what is recorded of the others.

    `median` is Optuna's: worse than the median of those that have completed. `halving` (Jamieson and Talwalkar 2016,
    arXiv:1502.07943) goes on with the best third after 1, 3 and 9 tenths. It is ours: Optuna's asks one run after another
    and lets the first ones pass, but runs in one program come to a tenth all at once.
    """
    kind = sweeper.get("pruner") or "none"
    if kind == "none":
        return lambda points: {}
    import optuna

    running = [optuna.trial.TrialState.RUNNING]
    found = study(sweeper.storage, sweeper.direction)
    found.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    sign = 1 if sweeper.direction == "maximize" else -1

    def is_bad(trial: Trial, step: int) -> bool:
        if kind == "median":
            return trial.should_prune()
        if step not in RUNGS:
            return False
        recorded = [other.intermediate_values for other in found.get_trials(deepcopy=False)]
        values = sorted((sign * values[step] for values in recorded if step in values), reverse=True)
        own = sign * found.get_trials(deepcopy=False)[trial.number].intermediate_values[step]
        return own < values[-(-len(values) // 3) - 1]

    def prune(points: list[Point]) -> dict[Point, str]:
        names = {trial.user_attrs.get("run"): trial for trial in found.get_trials(deepcopy=False, states=running)}
        reported = []
        for point in points:
            if recorded := names.get(point.run.name):
                trial = optuna.trial.Trial(found, recorded._trial_id)
                reported += [(point, trial, step) for step in report(trial, point, set(recorded.intermediate_values))]
        bad = [point for point, trial, step in reported if is_bad(trial, step)]
        return {point: f"given up after {point.done} meta-iterations" for point in bad}

    return prune


def report(trial: Trial, point: Point, reported: set[int]) -> list[int]:
    """The mean metric of each tenth of the training that is over. Returns those that are new."""
    total, new = point.config.iterations, []
    for step in range(1, 10):
        first, last = (-(-i * total // 10) for i in (step - 1, step))
        scores = [score for iteration, score in point.scores if first < iteration <= last and math.isfinite(score)]
        if last <= point.done and step not in reported and scores:
            trial.report(float(np.mean(scores)), step)
            new.append(step)
    return new
