"""The inner loop of gradient-based meta-learners.

MAML is right only if the *same* inner step adapts while sampling and inside the meta-loss. `InnerLoop.step` is that one
function: `live` calls it on fresh data, `adapt` on the data that `live` returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarl_cli.core.distributions import Distribution
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.networks import Policy
from metarl_cli.core.returns import Normaliser, gae, linear_baseline, masked_mean, standardise
from metarl_cli.core.rollout import rollout
from metarl_cli.core.types import Batch, Key, Params, pytree, static


class Data(NamedTuple):
    """What a policy gradient needs of K episodes, `[K, T]`. Constants for differentiation."""

    observation: jax.Array  # [K, T, D], normalised
    action: jax.Array
    advantage: jax.Array
    log_prob: jax.Array  # under the policy that acted
    valid: jax.Array


@pytree
class InnerLoop:
    """Adaptation by policy gradients (Finn et al. 2017, section 4.2)."""

    lr: float | jax.Array  # alpha
    gamma: float | jax.Array
    lam: float | jax.Array
    policy: Policy = static()

    def advantage(self, observation: jax.Array, batch: Batch, normaliser: Normaliser) -> jax.Array:
        """Advantages `[K, T]` of one task's batch over the linear feature baseline, centred and scaled.

        The return is that of the finite horizon: the baseline sees the time, so the time limit is a part of the task and a
        truncation does not bootstrap. Episodes of a single step are neither standardised nor, if there is but one,
        compared with a baseline: either would leave an advantage of 0.
        """
        reward = jnp.where(batch.valid, normaliser.scale(batch.reward), 0)
        end = batch.terminated | batch.truncated
        target = gae(reward, jnp.zeros_like(reward), jnp.zeros_like(reward), end, end, self.gamma, 1.0)
        if batch.valid.size == 1:
            return target
        value = linear_baseline(observation, target, batch.valid)
        next_value = jnp.concatenate([value[..., 1:], jnp.zeros_like(value[..., :1])], axis=-1)
        advantage = gae(reward, value, next_value, end, end, self.gamma, self.lam)
        if batch.valid.shape[-1] == 1:
            return advantage
        return standardise(advantage, batch.valid)

    def loss(self, params: Params, data: Data) -> jax.Array:
        """REINFORCE: `L_in = -mean_t log pi(a_t | s_t) A_t`."""
        log_prob = self.policy.apply(params, data.observation).log_prob(data.action)
        return -masked_mean(log_prob * data.advantage, data.valid)

    def step(self, params: Params, data: Data, scale: float | jax.Array = 1.0) -> Params:
        """THE inner step: `theta' = theta - alpha grad L_in(theta; D)`, alpha times `scale`."""
        gradient = jax.grad(self.loss)(params, data)
        return jax.tree.map(lambda p, g: p - scale * self.lr * g, params, gradient)

    def adapt(self, params: Params, data: Data) -> Params:
        """Replays the inner steps on recorded data `[N, K, T]`."""
        for i in range(data.valid.shape[0]):
            params = self.step(params, jax.tree.map(lambda x, i=i: x[i], data))
        return params

    def adapted(self, params: Params, data: Data) -> tuple[Distribution, Data]:
        """The adapted policy on the last point's states, with that point's data; `data [N + 1, K, T]`."""
        before, last = jax.tree.map(lambda x: x[:-1], data), jax.tree.map(lambda x: x[-1], data)
        return self.policy.apply(self.adapt(params, before), last.observation), last

    def live(
        self,
        params: Params,
        key: Key,
        family: TaskFamily,
        task: Any,
        normaliser: Normaliser,
        *,
        points: int,
        episodes: int,
        decay: float | jax.Array = 1.0,
    ) -> tuple[Batch, Data]:
        """P points of K episodes in one task, with an inner step after each point but the last; `[P, K, T]`.

        Args:
            decay: factor on alpha after the first step.
        """

        def point(params, x):
            index, key = x

            def act(carry, observation, previous, key):
                distribution = self.policy.apply(params, normaliser.observe(observation))
                action = distribution.sample(key)
                return carry, action, distribution.log_prob(action)

            keys = jax.random.split(key, episodes)
            _, batch = jax.vmap(lambda k: rollout(k, family, task, act, (), self.policy.spec))(keys)
            observation = normaliser.observe(batch.observation)
            data = Data(observation, batch.action, self.advantage(observation, batch, normaliser), batch.extra, batch.valid)
            scale = jnp.where(index == 0, 1.0, decay)
            params = jax.lax.cond(index < points - 1, lambda p: self.step(p, data, scale), lambda p: p, params)
            return params, (batch, data)

        _, (batch, data) = jax.lax.scan(point, params, (jnp.arange(points), jax.random.split(key, points)))
        return batch, data


def map_tasks(function: Callable[..., Any], xs: Any, batch: int) -> Any:
    """`vmap` over the leading axis of `xs`, at most `batch` tasks at once (0: all).

    On a CPU one task at a time keeps its data in the cache; on an accelerator all at once fill the device. The results are
    the same up to rounding.
    """
    size = jax.tree.leaves(xs)[0].shape[0]
    if batch == 0 or batch >= size:
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=batch if batch > 1 else None)
