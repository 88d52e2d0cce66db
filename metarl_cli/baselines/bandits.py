"""Bandit learners that look at each arm by itself, as the authors of RL^2 ran them.

Duan et al. 2016, arXiv:1611.02779, table 1; their code, `scripts/bandits/evaluate_bandits.py` in rllab (a public copy is
florensacc/rllab-curriculum), decides every detail below. They believe that arms are independent, with a Beta(1, 1) prior
where rewards are 0 or 1; on correlated arms that is what Wang et al. 2016 compare with. Gaussian arms have their own prior.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarl_cli.baselines.base import Classical, refuse, sample_beta
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.rollout import spaces
from metarl_cli.core.settings import AlgoSettings, setting
from metarl_cli.core.types import Batch, BernoulliArms, CorrelatedArms, GaussianArms, Key, Previous, pytree, static

FITS = "bandits with Bernoulli or Gaussian arms, one pull an episode (env=bandit, bandit_uniform, bandit_gaussian ...)"


class BetaArms(NamedTuple):
    """A belief: success probabilities independent, Beta(successes, failures). Both start at 1."""

    successes: jax.Array  # [k]
    failures: jax.Array  # [k]

    def mean(self) -> jax.Array:
        return self.successes / self.weight()

    def weight(self) -> jax.Array:
        """Pulls of each arm and the two that the prior is worth."""
        return self.successes + self.failures

    def sample(self, key: Key) -> jax.Array:
        return sample_beta(key, self.successes, self.failures)

    def log_density(self, means: jax.Array) -> jax.Array:
        """Joint, up to a constant: the samples that it compares are from the same posterior."""
        tiny = jnp.finfo(means.dtype).tiny
        log_p, log_q = jnp.log(jnp.maximum(means, tiny)), jnp.log(jnp.maximum(1 - means, tiny))
        return jnp.sum((self.successes - 1) * log_p + (self.failures - 1) * log_q)

    def update(self, action: jax.Array, reward: jax.Array) -> BetaArms:
        return BetaArms(self.successes.at[action].add(reward), self.failures.at[action].add(1 - reward))


class NormalArms(NamedTuple):
    """A belief: mean rewards independent, N(means, 1 / precision); a reward is its arm's mean plus N(0, noise^2)."""

    means: jax.Array  # [k]
    precision: jax.Array  # [k]
    noise_precision: jax.Array  # [], 1 / noise^2
    prior_precision: jax.Array  # []

    def mean(self) -> jax.Array:
        return self.means

    def weight(self) -> jax.Array:
        """Pulls of each arm, and the two that the prior is worth on Bernoulli arms: UCB1 divides by it."""
        return 2 + (self.precision - self.prior_precision) / self.noise_precision

    def sample(self, key: Key) -> jax.Array:
        return self.means + jax.random.normal(key, self.means.shape) / jnp.sqrt(self.precision)

    def log_density(self, means: jax.Array) -> jax.Array:
        """Joint, up to a constant."""
        return -0.5 * jnp.sum(self.precision * (means - self.means) ** 2)

    def update(self, action: jax.Array, reward: jax.Array) -> NormalArms:
        before = self.precision[action]
        after = before + self.noise_precision
        mean = (before * self.means[action] + self.noise_precision * reward) / after
        return self._replace(means=self.means.at[action].set(mean), precision=self.precision.at[action].set(after))


def first_belief(prior: Any) -> BetaArms | NormalArms:
    if isinstance(prior, GaussianArms):
        precision = jnp.asarray(prior.std**-2, float)
        noise_precision = jnp.asarray(max(prior.noise, 1e-3) ** -2, float)
        return NormalArms(jnp.full(prior.k, prior.mean, float), jnp.full(prior.k, precision), noise_precision, precision)
    k = prior.k if isinstance(prior, BernoulliArms) else 2
    return BetaArms(jnp.ones(k), jnp.ones(k))


def has_arms(family: TaskFamily) -> bool:
    """Whether these learners fit."""
    return isinstance(family.prior, (BernoulliArms, CorrelatedArms, GaussianArms)) and family.horizon == 1


@pytree
class EpsilonGreedyArms(Classical):
    """The arm of the highest posterior mean, the first among equals; with probability epsilon any arm."""

    epsilon: float | jax.Array
    prior: Any = static()

    def start(self) -> BetaArms | NormalArms:
        return first_belief(self.prior)

    def begin(self, belief: BetaArms | NormalArms, key: Key, episode: jax.Array) -> jax.Array:
        key_whether, key_which = jax.random.split(key)
        greedy = jnp.argmax(belief.mean())
        any_arm = jax.random.randint(key_which, (), 0, self.spec.action)
        return jnp.where(jax.random.uniform(key_whether) < self.epsilon, any_arm, greedy)

    def act(self, plan: jax.Array, observation: jax.Array, previous: Previous, key: Key) -> tuple[jax.Array, jax.Array]:
        return plan, plan

    def learn(self, belief: BetaArms | NormalArms, plan: jax.Array, batch: Batch) -> BetaArms | NormalArms:
        return belief.update(batch.action[0], batch.reward[0])


@pytree
class UCB1(Classical):
    """The arm of the highest mean + c sqrt(2 log t / n), with c = 1 the rule of Auer et al. 2002.

    As the authors of RL^2 have it: each arm starts with one success and one failure, which count among its n, and t counts
    the pulls from 0. So log 0 makes the first pull arm 0, and at the second there is no bonus yet.
    """

    c: float | jax.Array
    prior: Any = static()

    def start(self) -> BetaArms | NormalArms:
        return first_belief(self.prior)

    def begin(self, belief: BetaArms | NormalArms, key: Key, episode: jax.Array) -> jax.Array:
        # Their log 0 is -infinity and its root NaN, of which numpy takes the first.
        log_t = jnp.log(jnp.maximum(episode, 1).astype(float))
        index = belief.mean() + self.c * jnp.sqrt(2 * log_t / belief.weight())
        return jnp.where(episode == 0, 0, jnp.argmax(index))

    def act(self, plan: jax.Array, observation: jax.Array, previous: Previous, key: Key) -> tuple[jax.Array, jax.Array]:
        return plan, plan

    def learn(self, belief: BetaArms | NormalArms, plan: jax.Array, batch: Batch) -> BetaArms | NormalArms:
        return belief.update(batch.action[0], batch.reward[0])


@pytree
class Thompson(Classical):
    """The best arm of a sample from the posterior (Thompson 1933).

    With several samples it takes the one of the highest joint log-density. The authors of RL^2 call that optimistic Thompson
    sampling; May et al. 2012, whom they cite, take the larger of sample and mean for each arm instead.
    """

    samples: int | jax.Array  # traced: it shapes nothing
    prior: Any = static()

    def start(self) -> BetaArms | NormalArms:
        return first_belief(self.prior)

    def begin(self, belief: BetaArms | NormalArms, key: Key, episode: jax.Array) -> jax.Array:
        def draw(i, best):
            means = belief.sample(jax.random.fold_in(key, i))
            density = belief.log_density(means)
            better = density > best[0]
            return jnp.where(better, density, best[0]), jnp.where(better, jnp.argmax(means), best[1])

        start = (jnp.full((), -jnp.inf), jnp.zeros((), int))
        return jax.lax.fori_loop(0, self.samples, draw, start)[1]

    def act(self, plan: jax.Array, observation: jax.Array, previous: Previous, key: Key) -> tuple[jax.Array, jax.Array]:
        return plan, plan

    def learn(self, belief: BetaArms | NormalArms, plan: jax.Array, batch: Batch) -> BetaArms | NormalArms:
        return belief.update(batch.action[0], batch.reward[0])


class UCB1Settings(AlgoSettings):
    c: float = setting("width of the confidence bounds; 1 is Auer et al.'s", ge=0)

    def build(self, family: TaskFamily) -> UCB1:
        if not has_arms(family):
            refuse(family, "ucb1", FITS)
        return UCB1(c=self.c, prior=family.prior, spec=spaces(family))


class ThompsonSettings(AlgoSettings):
    samples: int = setting("joint posterior samples, of which the likeliest decides; 1 is Thompson sampling", ge=1)

    def build(self, family: TaskFamily) -> Thompson:
        if not has_arms(family):
            refuse(family, "thompson", FITS)
        return Thompson(samples=self.samples, prior=family.prior, spec=spaces(family))
