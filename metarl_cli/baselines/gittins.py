"""The Gittins index of Bernoulli arms (Gittins 1979), tabulated by calibration and backward induction.

An arm is compared with one that pays lambda for certain. U(s, f, lambda), the advantage of being allowed to pull it with s
successes and f failures seen, over retiring to the certain arm for good, is

    U(s, f, lambda) = max(0, p - lambda + gamma (p U(s + 1, f, lambda) + (1 - p) U(s, f + 1, lambda)))

with p = (s + 1) / (s + f + 2), and the index is the lambda at which the second argument of the maximum crosses zero. Pulling
the arm of the highest index is optimal for the discounted sum over an infinite time; for the n pulls of a trial it is an
approximation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from metarl_cli.baselines.bandits import BetaArms, first_belief
from metarl_cli.baselines.base import Classical, refuse
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.rollout import spaces
from metarl_cli.core.settings import AlgoSettings, setting
from metarl_cli.core.types import Batch, BernoulliArms, Key, Previous, pytree, static

GRID = 401  # values of lambda; the crossing is interpolated between two of them
AHEAD = 1000  # pulls that are looked ahead at most; after them an arm counts as known


@functools.lru_cache(maxsize=16)
def gittins_indices(pulls: int, discount: float) -> np.ndarray:
    """The indices `[pulls + 1, pulls + 1]` by successes and failures seen, where their sum is at most `pulls`; else 0."""
    ahead = min(AHEAD, int(np.ceil(np.log(1e-6) / np.log(discount))) if discount > 0 else 1)
    last = pulls + ahead
    grid = np.linspace(0, 1, GRID, dtype=np.float32)
    mean = ((np.arange(last + 1) + 1) / (last + 2)).astype(np.float32)[:, None]
    advantage = np.maximum(0, mean - grid) / np.float32(1 - discount)  # [s, lambda] with s + f = last
    table = np.zeros((pulls + 1, pulls + 1))
    for n in range(last - 1, -1, -1):
        p = ((np.arange(n + 1) + 1) / (n + 2)).astype(np.float32)[:, None]
        gain = p * advantage[1:]
        gain += (1 - p) * advantage[:-1]
        gain *= np.float32(discount)
        gain += p - grid
        if n <= pulls:
            # It falls with lambda, by at least 1 per unit: from a positive value to a negative one.
            after = np.clip(np.argmax(gain <= 0, axis=1), 1, GRID - 1)
            rows = np.arange(n + 1)
            above, below = gain[rows, after - 1], gain[rows, after]
            table[rows, n - rows] = grid[after - 1] + above / (above - below) / (GRID - 1)
        advantage = np.maximum(gain, 0, out=gain)
    return table


@pytree
class Gittins(Classical):
    """The arm of the highest index, the first among equals."""

    index: jax.Array  # [n, n]
    prior: BernoulliArms = static()

    def start(self) -> BetaArms:
        belief = first_belief(self.prior)
        assert isinstance(belief, BetaArms)
        return belief

    def begin(self, belief: BetaArms, key: Key, episode: jax.Array) -> jax.Array:
        return jnp.argmax(self.index[belief.successes.astype(int) - 1, belief.failures.astype(int) - 1])

    def act(self, plan: jax.Array, observation: jax.Array, previous: Previous, key: Key) -> tuple[jax.Array, jax.Array]:
        return plan, plan

    def learn(self, belief: BetaArms, plan: jax.Array, batch: Batch) -> BetaArms:
        return belief.update(batch.action[0], batch.reward[0])


class GittinsSettings(AlgoSettings):
    discount: float = setting("of a reward one pull later; the longer the trial, the closer to 1", ge=0, lt=1)

    def build(self, family: TaskFamily) -> Gittins:
        prior = family.prior
        if not isinstance(prior, BernoulliArms) or family.horizon != 1:
            refuse(family, "gittins", "bandits with independent Bernoulli arms, one pull an episode (env=bandit)")
        index = jnp.asarray(gittins_indices(family.episodes, self.discount), float)
        return Gittins(index=index, prior=prior, spec=spaces(family), planned=family.episodes)
