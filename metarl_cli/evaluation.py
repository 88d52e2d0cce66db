"""Meeting new tasks: every learner, learned or not, on the same tasks, by the same code, over the same axis."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarl_cli.core import devices, footprint
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import Learner, State, TaskFamily
from metarl_cli.core.settings import EvalSettings
from metarl_cli.core.statistics import summarise, summarise_curve
from metarl_cli.core.types import Batch, Key, Plan

STEPS_PER_CALL = 2_000_000  # environment steps in one jitted call: a few seconds on a laptop
SHOWN = 3  # tasks whose trajectories are kept for the figure


class Evaluation(NamedTuple):
    """N tasks met by S seeds, each for a trial of P points of K episodes (numpy)."""

    split: str
    returns: np.ndarray  # [S, N, P, K]
    steps: np.ndarray  # [S, N, P, K]
    regret: np.ndarray | None  # [S, N, P, K]
    shown_tasks: Any  # a few tasks [M, ...]
    shown: Batch  # and what the first seed did there, [M, P, K, T]

    @property
    def trial_return(self) -> np.ndarray:
        """`[S, N]`, summed over all episodes of the trial."""
        return self.returns.sum((2, 3))

    def curve(self) -> list[dict[str, Any]]:
        """A point per P: return of its episodes over the experience spent before them."""
        spent = self.steps.sum(3).mean((0, 1))  # [P]
        before = np.concatenate([[0.0], np.cumsum(spent)[:-1]])
        episodes = self.returns.shape[3]
        points = summarise_curve(self.returns.mean(3))
        return [{"episodes": p * episodes, "steps": float(before[p]), **point} for p, point in enumerate(points)]

    def summary(self) -> dict[str, Any]:
        """What `result.json` holds under `evaluation.<split>`."""
        summary = {"curve": self.curve(), "trial_return": summarise(self.trial_return)}
        if self.regret is not None:
            summary["trial_regret"] = summarise(self.regret.sum((2, 3)))
        return summary

    def arrays(self) -> dict[str, np.ndarray]:
        """What `evaluation.npz` holds."""
        arrays = {"returns": self.returns, "steps": self.steps, "regret": self.regret}
        return {name: x for name, x in arrays.items() if x is not None}


def choose_tasks(family: TaskFamily, settings: EvalSettings) -> Any:
    """The N tasks of an evaluation, `[N, ...]`: they derive from the family, the split and `eval.seed` alone.

    Raises:
        ConfigError: more tasks than the published set of the split has.
    """
    fixed = family.fixed(settings.split)
    if fixed is None:
        # The more an episode costs, the fewer tasks: a pull of a bandit costs next to nothing.
        n = settings.tasks or (10_000 if family.horizon == 1 else 1_000)
        return jax.vmap(lambda key: family.sample(key, settings.split))(jax.random.split(_key(settings, "tasks"), n))
    size = len(jax.tree.leaves(fixed)[0])
    if settings.tasks is not None and settings.tasks > size:
        raise ConfigError(
            "eval.tasks",
            settings.tasks,
            f"the {settings.split} split of this family is a published set of {size} tasks",
            hint=f"Ask for at most {size}, or take eval.split=train for fresh tasks.",
        )
    return jax.tree.map(lambda x: x[: settings.tasks or size], fixed)


def evaluate(
    learner: Learner,
    state: State,
    family: TaskFamily,
    settings: EvalSettings,
    seeds: list[int],
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Lives through one trial per seed and task.

    Args:
        state: `[S, ...]`, one learner per seed.
        seeds: `[S]`; the randomness of a trial derives from `eval.seed`, the seed and the task's place in the list.
        between: called between the jitted calls, each of which takes a few seconds.
    """
    plan = learner.plan(family, settings)
    tasks = choose_tasks(family, settings)
    n, size = _sizes(tasks, family, plan, len(seeds))
    key = _key(settings, "trials")
    keys = jax.vmap(lambda seed: jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, seed), i))(jnp.arange(n)))
    trial_keys = keys(jnp.array(seeds))  # [S, N]
    parts = []
    for first in range(0, n, size):
        # The last call is filled up with the last task, so that it does not compile again.
        chosen = np.minimum(np.arange(first, first + size), n - 1)
        chunk = jax.tree.map(lambda x, chosen=chosen: x[chosen], tasks)
        *arrays, batch = _trials(learner, state, trial_keys[:, chosen], family, chunk, plan)
        # float64: sums over many episodes and tasks are exact where rewards are integers.
        parts.append([None if x is None else np.asarray(x, np.float64)[:, : n - first] for x in arrays])
        if first == 0:
            shown = jax.tree.map(np.asarray, batch)
        between()
    returns, steps, regret = (None if x[0] is None else np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    shown_tasks = jax.tree.map(lambda x: np.asarray(x)[:SHOWN], tasks)
    return Evaluation(settings.split, returns, steps, regret, shown_tasks, shown)  # type: ignore[arg-type]


def check(learner: Learner, state: State, family: TaskFamily, settings: EvalSettings, seeds: list[int]) -> None:
    """Raises `MemoryError` where `evaluate` cannot fit. Nothing is computed.

    Args:
        state: `[S, ...]`, or its shapes.
    """
    plan = learner.plan(family, settings)
    tasks = jax.eval_shape(lambda: choose_tasks(family, settings))
    n, size = _sizes(tasks, family, plan, len(seeds))
    chunk = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), tasks)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (len(seeds), size)))
    program = _trials.trace(learner, state, keys, family, chunk, plan).jaxpr
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tasks))
    kept += 3 * 8 * len(seeds) * n * plan.points * plan.episodes  # returns, steps and regret, in float64
    footprint.check(footprint.footprint(program) // devices.memories() + kept, "The evaluation")


def _sizes(tasks: Any, family: TaskFamily, plan: Plan, seeds: int) -> tuple[int, int]:
    """How many tasks there are, and how many of them one jitted call takes."""
    n = jax.tree.leaves(tasks)[0].shape[0]
    calls = -(-n // max(1, STEPS_PER_CALL // (plan.points * plan.episodes * family.horizon * seeds)))
    size = -(-n // calls)
    return n, -(-size // devices.count()) * devices.count()


@partial(jax.jit)
def _trials(learner: Learner, state: State, keys: Key, family: TaskFamily, tasks: Any, plan: Plan):
    def one(state, key, task):
        return learner.trial(state, key, family, task, plan)

    keys, tasks = devices.over_tasks(keys, axis=1), devices.over_tasks(tasks)
    trial = jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)), in_axes=(0, 0, None))(state, keys, tasks)
    shown = jax.tree.map(lambda x: x[0, :SHOWN], trial.batch)
    return devices.everywhere((trial.returns, trial.steps, trial.regret, shown))


def _key(settings: EvalSettings, purpose: str) -> Key:
    return jax.random.fold_in(jax.random.key(settings.seed), zlib.crc32(f"{settings.split} {purpose}".encode()))
