"""What an estimator of the inner gradient gains or costs: the meta-gradient of a trained learner, estimated in several ways.

The tasks are fixed; a batch is K episodes before and K after one inner step in each of them. An estimate is the gradient
with respect to theta of the adapted policies' surrogate, the outer loss that all gradient-based learners share,

    g = grad_theta mean_i L_out(theta_i'(theta); D_i'),    theta_i' = theta - alpha grad L_in(theta; D_i)

and estimators differ in how they differentiate L_in twice (`core.adapt.inner_loss`), or in that they do not. All see the
same tasks and draw with the same keys, each after its own step: with a discount that of `dice` is smaller. Reported of R
estimates g_r, against a reference g* (compare Rothfuss et al. 2019, section 6.2):

* cosine: `g_r . g* / |g_r| |g*|`;
* relative variance: `mean_r |g_r - g|^2 / |g|^2` with g the mean of the estimates;
* seconds that one takes, data given.

g* is the mean of DiCE's estimates, whose Hessian is unbiased, from far more episodes. How much noise is left in it, the
cosine a of two halves of it tells: an estimate without any error has the expected cosine `sqrt(2 a / (1 + a))`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarl_cli.config import DiagnoseConfig
from metarl_cli.core.adapt import Data
from metarl_cli.core.errors import RunError
from metarl_cli.core.gradient_based import GradientBased
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.losses import surrogate
from metarl_cli.core.statistics import summarise
from metarl_cli.core.types import Key, Params

ESTIMATORS: dict[str, dict[str, Any]] = {
    "score": {"estimator": "score"},
    "dice": {"estimator": "dice"},
    "lvc": {"estimator": "lvc"},
    "first order": {"first_order": True},
}
LARGEST = 100  # episodes of a task in one estimate of the reference: what fits into memory


class Estimate(NamedTuple):
    """One estimator at one batch size."""

    estimator: str
    episodes: int  # K
    cosine: dict[str, Any]  # as `statistics.summarise` has it, over the repeats
    variance: float  # relative
    seconds: float  # one estimate, median


class Diagnosis(NamedTuple):
    estimates: list[Estimate]
    norm: float  # of the reference
    agreement: float  # cosine of two halves of the reference

    @property
    def ceiling(self) -> float:
        """The cosine of an estimate without error (Spearman 1904, correction for attenuation; Brown 1910)."""
        return math.sqrt(max(0.0, 2 * self.agreement / (1 + self.agreement)))


def estimators(
    learner: Any, state: Any, family: TaskFamily, config: DiagnoseConfig, between: Callable[[str], None] = lambda _: None
) -> Diagnosis:
    """Measures all estimators.

    Args:
        state: of one seed.
        between: called with what comes next, between the jitted calls.

    Raises:
        RunError: the learner has no inner step to differentiate.
    """
    if not isinstance(learner, GradientBased) or learner.inner_steps == 0:
        raise RunError(
            f"{type(learner).__name__} has no inner step whose gradient could be estimated in several ways. "
            "Take a run of a gradient-based learner with algo.inner_steps of at least 1: maml, fomaml, anil, promp ..."
        )
    key_tasks, key_reference, key_batches = jax.random.split(jax.random.key(config.seed), 3)
    tasks = jax.vmap(family.sample)(jax.random.split(key_tasks, config.tasks))

    at_once = min(config.reference, LARGEST)
    repeats = 2 * -(-config.reference // (2 * at_once))  # two halves
    between(f"reference: {repeats * at_once} episodes of {config.tasks} tasks")
    dice = variant(learner, at_once, **ESTIMATORS["dice"])
    parts = [
        _gradient(dice, state.params, _batch(dice, state, k, family, tasks))
        for k in jax.random.split(key_reference, repeats)
    ]
    halves = [jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), axis=0), *parts[i::2]) for i in (0, 1)]
    reference = np.mean([_flat(half) for half in halves], axis=0)

    estimates = []
    for episodes in config.episodes:
        keys = jax.random.split(jax.random.fold_in(key_batches, episodes), config.repeats)
        variants = {name: variant(learner, episodes, **changes) for name, changes in ESTIMATORS.items()}
        found: dict[str, list[np.ndarray]] = {name: [] for name in variants}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        between(f"{config.repeats} batches of {episodes} episodes")
        for key in keys:
            for name, other in variants.items():
                data = jax.block_until_ready(_batch(other, state, key, family, tasks))
                if not found[name]:
                    jax.block_until_ready(_gradient(other, state.params, data))  # compiles
                began = time.perf_counter()
                gradient = jax.block_until_ready(_gradient(other, state.params, data))
                seconds[name].append(time.perf_counter() - began)
                found[name].append(_flat(gradient))
        for name, gradients in found.items():
            cosines = np.array([cosine(g, reference) for g in gradients])
            estimates.append(
                Estimate(
                    name, episodes, summarise(cosines[None]), relative_variance(gradients), statistics.median(seconds[name])
                )
            )
    return Diagnosis(estimates, float(np.linalg.norm(reference)), float(cosine(*map(_flat, halves))))


def variant(learner: GradientBased, episodes: int, **inner: Any) -> GradientBased:
    """The learner with one inner step from K episodes and another estimator."""
    changed = dataclasses.replace(learner.inner, **{"first_order": False, **inner})
    return dataclasses.replace(learner, inner=changed, episodes=episodes, inner_steps=1)


def relative_variance(gradients: list[np.ndarray]) -> float:
    """`mean_r |g_r - g|^2 / |g|^2`, of R estimates `[P]`, without bias: both means are of few estimates."""
    g = np.stack(gradients)
    spread = g.var(axis=0, ddof=1).sum()
    square = (g.mean(axis=0) ** 2).sum() - spread / len(g)  # |mean|^2 holds the variance of the mean
    return float(spread / square) if square > 0 else float("inf")


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x @ y / np.maximum(np.linalg.norm(x) * np.linalg.norm(y), np.finfo(np.float64).tiny)


@partial(jax.jit)
def _batch(learner: GradientBased, state: Any, key: Key, family: TaskFamily, tasks: Any) -> Data:
    return learner.live(state, key, family, tasks)[1]


@partial(jax.jit)
def _gradient(learner: GradientBased, params: Params, data: Data) -> Params:
    def loss(params: Params, task: Data) -> jax.Array:
        policy, last = learner.inner.adapted(params, task)
        return surrogate(policy.log_prob(last.action), last.log_prob, last.advantage, last.valid, None)

    return learner.gradient(loss, params, data)[1]


def _flat(gradient: Params) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(gradient)])
