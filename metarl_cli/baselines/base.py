"""What the classical learners share: one trial for all of them, and fast exact sampling.

A classical learner has nothing to train. Within a trial it holds a belief, plans once at the start of each episode, acts by
that plan and learns at the episode's end. On bandits an episode is one pull, so there this is learning at every step; on
tabular MDPs it is what the published learners do, and the costly planning happens once per episode instead of once per step.
It may know the family's `prior`, never the task.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import Learner, TaskFamily
from metarl_cli.core.returns import summed_up
from metarl_cli.core.rollout import Spaces, rollout
from metarl_cli.core.settings import EvalSettings
from metarl_cli.core.types import Batch, Key, Plan, Previous, Trial, pytree, static


@pytree
class Classical(Learner):
    """A learner with a belief. Its state is empty: tables that it needs are leaves of its own."""

    spec: Spaces = static()
    planned: int | None = static(default=None)  # episodes of the trial that a table was computed for; None: any

    @abstractmethod
    def start(self) -> Any:
        """The belief at the start of a trial."""

    @abstractmethod
    def begin(self, belief: Any, key: Key, episode: jax.Array) -> Any:
        """The plan for episode `episode` (from 0)."""

    @abstractmethod
    def act(self, plan: Any, observation: jax.Array, previous: Previous, key: Key) -> tuple[Any, jax.Array]:
        """The plan for what is left of the episode, and the action; `previous` is of the same episode."""

    @abstractmethod
    def learn(self, belief: Any, plan: Any, batch: Batch) -> Any:
        """The belief after an episode `[T]` and what is left of its plan."""

    def init(self, key: Key, family: TaskFamily) -> tuple[()]:
        return ()

    def plan(self, family: TaskFamily, settings: EvalSettings) -> Plan:
        """A point per episode."""
        episodes = settings.episodes or family.episodes
        if self.planned is not None and episodes != self.planned:
            raise ConfigError(
                "eval.episodes",
                settings.episodes,
                f"this learner plans for trials of {self.planned} episodes",
                hint="Set the length of a trial where the family has it: env.n or env.episodes.",
            )
        return Plan(points=episodes, episodes=1)

    def trial(self, state: tuple[()], key: Key, family: TaskFamily, task: Any, plan: Plan) -> Trial:
        def episode(belief, inputs):
            number, key = inputs
            key_begin, key_live = jax.random.split(key)

            def act(plan, observation, previous, key):
                return *self.act(plan, observation, previous, key), None

            plan, batch = rollout(key_live, family, task, act, self.begin(belief, key_begin, number), self.spec)
            return self.learn(belief, plan, batch), batch

        inputs = (jnp.arange(plan.points), jax.random.split(key, plan.points))
        _, batch = jax.lax.scan(episode, self.start(), inputs)
        return to_trial(batch)


def to_trial(batch: Batch) -> Trial:
    """Episodes `[E, T]` as a trial of E points with K = 1."""
    return summed_up(jax.tree.map(lambda x: x[:, None], batch))


def refuse(family: TaskFamily, learner: str, fits: str) -> NoReturn:
    """The error for a family without the prior that a learner needs.

    Raises:
        ConfigError: always.
    """
    name = type(family).__name__
    knows = type(family.prior).__name__ if family.prior is not None else "nothing that it could use"
    raise ConfigError(
        "algo",
        learner,
        f"does not fit this family ({name}, of which is known: {knows})",
        hint=f"It fits {fits}. algo=random fits every family.",
    )


def choose(key: Key, values: jax.Array) -> jax.Array:
    """An action of the highest value, uniformly among equals `[A] -> []`.

    Values that were summed in another order differ in the last bits, so equal means equal up to those.
    """
    best = jnp.max(values)
    ties = values >= best - 1e-5 * (1 + jnp.abs(best))
    return jnp.argmax(jnp.where(ties, jax.random.uniform(key, values.shape), -1))


def sample_gamma(key: Key, shape: jax.Array, below_one: bool = True) -> jax.Array:
    """Gamma(shape, 1), exact, for shapes > 0: Marsaglia and Tsang 2000.

    All entries are tried at once until the last is accepted (at least 95 of 100 are in each round). `jax.random.gamma`
    goes through them one by one on a CPU, which takes several times as long.

    Args:
        below_one: whether some shapes may be; they need an additional draw.
    """
    # In one dimension, of which XLA makes much faster code than of several short ones.
    wanted = shape.ravel()
    small = wanted < 1
    d = (jnp.where(small, wanted + 1, wanted) if below_one else wanted) - 1 / 3
    c = 1 / jnp.sqrt(9 * d)
    key_tries, key_small = jax.random.split(key)
    low = jnp.nextafter(jnp.array(-1, d.dtype), jnp.array(0, d.dtype))  # as jax.random.normal has it: erfinv(-1) is infinite

    def attempt(carry):
        i, value, done = carry
        # One draw for a normal and a uniform number: each call of the generator has its price.
        draws = jax.random.uniform(jax.random.fold_in(key_tries, i), (2, d.size), minval=low, maxval=1)
        x = math.sqrt(2) * jax.scipy.special.erfinv(draws[0])
        v = (1 + c * x) ** 3
        log_v = jnp.log(jnp.maximum(v, jnp.finfo(v.dtype).tiny))
        accepted = (v > 0) & (jnp.log((1 + draws[1]) / 2) < 0.5 * x**2 + d * (1 - v + log_v))
        return i + 1, jnp.where(done, value, d * v), done | accepted

    start = (0, jnp.zeros_like(d), jnp.zeros(d.shape, bool))
    value = jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), attempt, start)[1]
    if below_one:  # Gamma(a) = Gamma(a + 1) U^(1/a)
        u = jax.random.uniform(key_small, d.shape, minval=jnp.finfo(d.dtype).tiny)
        value = jnp.where(small, value * u ** (1 / jnp.where(small, wanted, 1)), value)
    return value.reshape(shape.shape)


def sample_beta(key: Key, a: jax.Array, b: jax.Array) -> jax.Array:
    """Beta(a, b), elementwise, for a and b >= 1."""
    gammas = sample_gamma(key, jnp.stack([a, b]), below_one=False)
    return gammas[0] / jnp.sum(gammas, axis=0)


def sample_dirichlet(key: Key, alpha: jax.Array, below_one: bool = True) -> jax.Array:
    """Dirichlet over the last axis; `below_one`: see `sample_gamma`."""
    gammas = sample_gamma(key, alpha, below_one)
    return gammas / jnp.sum(gammas, axis=-1, keepdims=True)
