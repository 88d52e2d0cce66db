"""What the best possible learner gets, where that can be computed: `optimum`, found by the family's prior."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarl_cli.baselines import exact
from metarl_cli.baselines.mdps import backward_induction
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.types import BernoulliArms, CorrelatedArms, GoalGrid, InformativeArms, TabularMDP, TwoStep


class Optimum(NamedTuple):
    """The expected trial return of the best learner, over tasks of the prior."""

    value: float | None  # None: the method is known, but does not fit
    method: str  # how it was computed, or why it was not
    regret: float | None = None  # its expected regret over the trial, where that is defined
    episodes: tuple[float, ...] | None = None  # its expected return in each episode, where they differ
    of_tasks: bool = False  # of the tasks at hand, not of the prior

    def as_dict(self) -> dict[str, Any]:
        """For result.json: without what is not known."""
        return {name: x for name, x in self._asdict().items() if name == "value" or (x is not None and name != "of_tasks")}


def optimum(family: TaskFamily, tasks: Any, split: str, episodes: int) -> Optimum | None:
    """None where nothing is known.

    Args:
        tasks: those that were evaluated, `[N, ...]`; the ceiling of an MDP is theirs, all else that of the prior.
        split: out of distribution, the prior says nothing of the tasks.
        episodes: E, the length of the trial.
    """
    prior = family.prior
    if isinstance(prior, TabularMDP):
        # Every episode starts in state 0.
        values = jax.jit(jax.vmap(lambda task: backward_induction(task.reward, task.transition, prior.horizon)[0, 0]))
        value = float(jnp.mean(jnp.max(values(tasks), axis=-1))) * episodes
        return Optimum(value, "value iteration in the true MDPs, a ceiling: who has to learn gets less", of_tasks=True)
    if split not in ("train", "test"):
        return None
    if isinstance(prior, BernoulliArms) and family.horizon == 1:
        k, best = prior.k, episodes * prior.k / (prior.k + 1)  # the mean of the largest of k uniform numbers
        if exact.count_bytes(k, episodes) > exact.MEMORY:
            return Optimum(None, f"does not fit in memory: {exact.does_not_fit(k, episodes)}")
        table = exact.solve_counts(k, episodes)
        return Optimum(table.value, f"dynamic program over {len(table.best)} count states", best - table.value)
    if isinstance(prior, CorrelatedArms) and family.horizon == 1:
        value, best = exact.correlated_value(prior.values, episodes)
        return Optimum(value, "exact posterior of p", episodes * best - value)
    if isinstance(prior, InformativeArms) and family.horizon == 1:
        try:
            value = exact.solve_informative(prior, episodes).value
        except ConfigError as error:
            return Optimum(None, error.problem)
        return Optimum(value, "dynamic program over the arms tried", episodes * prior.target - value)
    if isinstance(prior, TwoStep):
        if prior.rounds == 1:
            lasting = dataclasses.replace(prior, switch=0.0)  # there is no switch between episodes
            return Optimum(exact.two_step_value(lasting, episodes), "dynamic program over the belief")
        if episodes == 1:
            return Optimum(exact.two_step_value(prior, prior.rounds), "dynamic program over the belief")
    if isinstance(prior, GoalGrid) and (sweep := exact.solve_sweep(prior, family.horizon)) is not None:
        by_episode = tuple(sweep.episodes[min(e, 1)] for e in range(episodes))
        return Optimum(sum(by_episode), "a sweep that attains both bounds", episodes=by_episode)
    return None
