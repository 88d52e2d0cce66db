"""The inner loop of gradient-based meta-learners.

A meta-learner of this kind is right only if the *same* inner step adapts while sampling and inside the meta-loss.
`InnerLoop.step` is that one function: `live` calls it on fresh data, `replay` on the data that `live` returned.

    theta' = theta - alpha grad L_in(theta; D)                                      (Finn et al. 2017, equation 4)

Five switches make of it the inner loops of the literature: what `adapts` (all: MAML; the head: ANIL, Raghu et al. 2020; a
context: CAVIA, Zintgraf et al. 2019), whether alpha is learned for each parameter (Meta-SGD, Li et al. 2017), whether the
step is differentiated through (`first_order`: it is not), the `estimator` of the policy gradient, and the `rule` by which a
gradient becomes a step, which may be learned itself (`core.rules`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metarl_cli.core.devices import over_tasks, shares
from metarl_cli.core.distributions import Distribution
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.networks import Policy
from metarl_cli.core.returns import Normaliser, gae, linear_baseline, masked_mean, mean_and_std
from metarl_cli.core.rollout import flatten, rollout
from metarl_cli.core.rules import Optax, Rule
from metarl_cli.core.types import Batch, Key, Params, pytree, static

Estimator = Literal["score", "dice", "lvc", "ratio"]
Adapts = Literal["all", "head", "context"]
GROUPS: dict[Adapts, tuple[str, ...]] = {"all": ("body", "head"), "head": ("head",), "context": ("context",)}


class Data(NamedTuple):
    """What a policy gradient needs of K episodes, `[K, T]`. Constants for differentiation."""

    observation: jax.Array  # [K, T, D], as the policy sees it
    action: jax.Array
    advantage: jax.Array  # A, centred and scaled
    reward: jax.Array  # r and
    value: jax.Array  # the baseline b in the same units: with lambda = 1, A_t = sum_{t' >= t} gamma^{t' - t} r_{t'} - b_t
    log_prob: jax.Array  # under the policy that acted
    valid: jax.Array


class Adapted(NamedTuple):
    """A policy on its way: its parameters, and what the rule remembers."""

    params: Params
    memory: Any


def inner_loss(estimator: Estimator, log_prob: jax.Array, data: Data, gamma: float | jax.Array) -> jax.Array:
    """L_in of K episodes: estimators of the policy gradient that differ in the second derivative.

    All have the gradient of REINFORCE, `sum_t grad log pi_t A_t`, but that of `dice` is of the discounted return, with a
    factor gamma^t that the others leave out, as is usual: the same step at a discount of 1, a smaller one of `dice` below.
    With `sg` for stop-gradient and `box(x) = exp(x - sg(x))`:

    * `score`: `-mean_t log pi(a_t | s_t) A_t`. Its Hessian lacks the outer products of the scores;
    * `dice` (Foerster et al. 2018), with the baseline of Mao et al. 2019:
      `-(1 / sum T) sum_t gamma^t [box(sum_{t' <= t} log pi_t') r_t + (1 - box(log pi_t)) b_t]`, of whole returns (lambda =
      1). Its Hessian is unbiased;
    * `lvc` (Rothfuss et al. 2018): `-mean_t box(log pi_t) A_t`. Its Hessian lacks `H12 + H12^T` and varies less;
    * `ratio`: `-mean_t pi(a_t | s_t) / pi_acted(a_t | s_t) A_t`. Equal to `lvc` at the policy that acted; away from it, in
      later epochs of the outer loop, the data are weighted by importance.

    Args:
        log_prob: `[K, T]` of the actions in `data`, under the policy that adapts.
    """
    match estimator:
        case "score":
            return -masked_mean(log_prob * data.advantage, data.valid)
        case "lvc":
            return -masked_mean(box(log_prob) * data.advantage, data.valid)
        case "ratio":
            ratio = jnp.exp(jnp.where(data.valid, log_prob - data.log_prob, 0))
            return -masked_mean(ratio * data.advantage, data.valid)
        case "dice":
            log_prob = jnp.where(data.valid, log_prob, 0)
            discount = jnp.broadcast_to(gamma ** jnp.arange(log_prob.shape[-1]), log_prob.shape)
            so_far = box(jnp.cumsum(log_prob, axis=-1))
            return -masked_mean(discount * (so_far * data.reward + (1 - box(log_prob)) * data.value), data.valid)


def box(x: jax.Array) -> jax.Array:
    """1, with the gradient of x: `exp(x - sg(x))`."""
    return jnp.exp(x - jax.lax.stop_gradient(x))


@pytree
class InnerLoop:
    """Adaptation by policy gradients (Finn et al. 2017, section 4.2).

    The meta-parameters theta are those of the policy, `{"body", "head"}`, with `learned_lr` a step `"lr"` for each number
    that adapts, and those of a learned `"rule"`. A context is no part of theta: it is 0 at the start of each trial.
    """

    lr: float | jax.Array  # alpha, or where the learned ones start
    gamma: float | jax.Array
    lam: float | jax.Array
    policy: Policy = static()
    estimator: Estimator = static(default="score")
    adapts: Adapts = static(default="all")
    rule: Rule = static(default=Optax())
    learned_lr: bool = static(default=False)
    first_order: bool = static(default=False)
    remat: bool = static(default=False)
    told: tuple[int, ...] = static(default=())  # which numbers of the task the policy observes: see `task_code`

    def init(self, key: Key) -> Params:
        """theta at the start."""
        theta = self.policy.init(key)
        rule = self.rule.init(jax.random.fold_in(key, 1))
        if rule is not None:
            theta["rule"] = rule
        if self.learned_lr:
            moving = self.moving(self.start(theta).params)
            theta["lr"] = jax.tree.map(lambda x: jnp.full_like(x, self.lr), moving)
        return theta

    def moving(self, params: Params) -> Params:
        return {group: params[group] for group in GROUPS[self.adapts]}

    def start(self, theta: Params) -> Adapted:
        """Before the first step."""
        params = theta
        if self.adapts == "context":
            params = {**theta, "context": jnp.zeros(self.policy.context)}
        return Adapted(params, self.rule.start(params.get("rule"), self.moving(params)))

    def loss(self, params: Params, data: Data) -> jax.Array:
        """L_in: see `inner_loss`."""
        log_prob = self.policy.apply(params, data.observation).log_prob(data.action)
        return inner_loss(self.estimator, log_prob, data, self.gamma)

    def step(self, adapted: Adapted, data: Data, scale: float | jax.Array = 1.0) -> Adapted:
        """THE inner step: `theta' = theta - alpha grad L_in(theta; D)` or what the rule makes of it, alpha times `scale`."""
        params, memory = adapted
        moving = self.moving(params)
        loss, gradient = jax.value_and_grad(lambda moving: self.loss({**params, **moving}, data))(moving)
        if self.first_order:
            gradient = jax.lax.stop_gradient(gradient)
        lr = params["lr"] if self.learned_lr else jax.tree.map(lambda x: jnp.full_like(x, self.lr), moving)
        lr = jax.tree.map(lambda lr: scale * lr, lr)
        moving, memory = self.rule.step(params.get("rule"), memory, moving, gradient, loss, lr)
        return Adapted({**params, **moving}, memory)

    def replay(self, theta: Params, data: Data) -> list[Params]:
        """The policies' parameters at all points of a trial, as functions of theta; recorded data `[N + 1, K, T]`."""
        adapted = self.start(theta)
        points = [adapted.params]
        step = jax.checkpoint(self.step) if self.remat else self.step
        for i in range(data.valid.shape[0] - 1):
            adapted = step(adapted, jax.tree.map(lambda x, i=i: x[i], data))
            points.append(adapted.params)
        return points

    def policies(self, theta: Params, data: Data) -> list[Distribution]:
        """At each point of a trial on that point's states, as functions of theta; recorded data `[N + 1, K, T]`."""
        points = self.replay(theta, data)
        return [self.policy.apply(p, observation) for p, observation in zip(points, data.observation, strict=True)]

    def adapted(self, theta: Params, data: Data) -> tuple[Distribution, Data]:
        """The adapted policy on the last point's states, with that point's data; `data [N + 1, K, T]`."""
        last = jax.tree.map(lambda x: x[-1], data)
        return self.policy.apply(self.replay(theta, data)[-1], last.observation), last

    def data(self, observation: jax.Array, batch: Batch, normaliser: Normaliser) -> Data:
        """What one task's batch `[K, T]` says: see `policy_data`."""
        return policy_data(observation, batch, normaliser, self.gamma, self.lam)

    def live(
        self,
        theta: Params,
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
        told = task_code(family, task)[jnp.array(self.told, int)] if self.told else jnp.zeros(0)

        def see(observation):
            told_now = jnp.broadcast_to(told, (*observation.shape[:-1], told.size))
            return jnp.concatenate([normaliser.observe(observation), told_now], axis=-1)

        def point(adapted, x):
            index, key = x

            def act(carry, observation, previous, key):
                distribution = self.policy.apply(adapted.params, see(observation))
                action = distribution.sample(key)
                return carry, action, distribution.log_prob(action)

            keys = jax.random.split(key, episodes)
            _, batch = jax.vmap(lambda k: rollout(k, family, task, act, (), self.policy.spec))(keys)
            data = self.data(see(batch.observation), batch, normaliser)
            scale = jnp.where(index == 0, 1.0, decay)
            if points > 1:
                adapted = jax.lax.cond(index < points - 1, lambda a: self.step(a, data, scale), lambda a: a, adapted)
            return adapted, (batch, data)

        keys = jax.random.split(key, points)
        _, (batch, data) = jax.lax.scan(point, self.start(theta), (jnp.arange(points), keys))
        return batch, data


def policy_data(
    observation: jax.Array, batch: Batch, normaliser: Normaliser, gamma: float | jax.Array, lam: float | jax.Array
) -> Data:
    """What one task's batch `[K, T]` says, advantages over the linear feature baseline, centred and scaled.

    The policy acted on `observation`. What it was told of the task is not for the baseline, which is fitted to one task.

    The return is that of the finite horizon: the baseline sees the time, so the time limit is a part of the task and a
    truncation does not bootstrap. Episodes of a single step are neither standardised nor, if there is but one,
    compared with a baseline: either would leave an advantage of 0.
    """
    reward = jnp.where(batch.valid, normaliser.scale(batch.reward), 0)
    end = batch.terminated | batch.truncated
    zeros = jnp.zeros_like(reward)
    target = gae(reward, zeros, zeros, end, end, gamma, 1.0)
    value = zeros
    if batch.valid.size > 1:
        value = linear_baseline(normaliser.observe(batch.observation), target, batch.valid)
    next_value = jnp.concatenate([value[..., 1:], jnp.zeros_like(value[..., :1])], axis=-1)
    advantage = gae(reward, value, next_value, end, end, gamma, lam)
    if batch.valid.shape[-1] > 1:
        mean, std = mean_and_std(advantage, batch.valid)
        advantage = jnp.where(batch.valid, (advantage - mean) / std, 0)
        reward, value = reward / std, (value + mean) / std
    return Data(observation, batch.action, advantage, reward, value, batch.extra, batch.valid)


def task_code(family: TaskFamily, task: Any) -> jax.Array:
    """The task as an observation `[n]`: its numbers, standardised over training tasks; those that never vary are 0."""
    mean, std, varies = known_tasks(family)
    return jnp.where(varies, (flatten(task) - mean) / jnp.where(varies, std, 1), 0)


def known_tasks(family: TaskFamily) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and standard deviation of a task's numbers over some of the training tasks, and which of them vary, `[n]`."""
    known = jax.vmap(lambda key: flatten(family.sample(key)))(jax.random.split(jax.random.key(0), 256))
    mean, std = jnp.mean(known, axis=0), jnp.std(known, axis=0)
    return mean, std, std > 1e-6 * (1 + jnp.abs(mean))


def map_tasks(function: Callable[..., Any], xs: Any, batch: int) -> Any:
    """`vmap` over the leading axis of `xs`, at most `batch` tasks at once (0: all).

    On a CPU one task at a time keeps its data in the cache; on an accelerator all at once fill the device. The results are
    the same up to rounding.
    """
    size = jax.tree.leaves(xs)[0].shape[0]
    n = shares(size)
    if batch == 0 or batch >= size:
        return jax.vmap(function)(over_tasks(xs))
    if n > 1:  # one after another on each device, not across them
        parts = jax.tree.map(lambda x: x.reshape(n, size // n, *x.shape[1:]), over_tasks(xs))
        found = jax.vmap(lambda part: one_after_another(function, part, batch))(over_tasks(parts))
        return jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), found)
    return one_after_another(function, xs, batch)


def one_after_another(function: Callable[..., Any], xs: Any, batch: int) -> Any:
    return jax.lax.map(function, xs, batch_size=batch if batch > 1 else None)
