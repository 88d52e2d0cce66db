"""RL^2: a policy with a memory, that learns within its memory.

Duan et al. 2016, arXiv:1611.02779; Wang et al. 2016, arXiv:1611.05763.

One trial of E episodes in one task is one long episode for the outer learner: the memory is carried over the ends of the
episodes and reset only between trials, the advantages are those of the whole trial, and no end of an episode cuts the
return; after the trial's last step there is nothing. The outer learner is

* `ppo` (Schulman et al. 2017), epochs over minibatches of whole trials;
* `a2c` (Mnih et al. 2016), one step along `E[grad log pi A]` with the same advantages;
* `reinforce`, the plain policy gradient of the trial's return: lambda is 1 and advantages are not standardised; with
  `critic=none` nothing is subtracted.

Gradients go back through the whole trial, or through `unroll` steps of it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarl_cli.core.devices import over_tasks
from metarl_cli.core.distributions import Distribution
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import MetaLearner, Metrics, TaskFamily
from metarl_cli.core.losses import surrogate
from metarl_cli.core.memory import MemorySettings
from metarl_cli.core.networks import Critic, RecurrentActorCritic
from metarl_cli.core.returns import Normaliser, episode_returns, gae, masked_mean, standardise, summed_up
from metarl_cli.core.rollout import by_episode, previous_steps, rollout, spaces
from metarl_cli.core.settings import AlgoSettings, EvalSettings, Widths, setting
from metarl_cli.core.types import Batch, Key, Params, Plan, Trial, pytree, static

Outer = Literal["ppo", "a2c", "reinforce"]
HALVINGS = 10  # of a step that leaves the bound on the KL divergence (Duan et al.'s code)


class RL2State(NamedTuple):
    params: Params
    optimizer: optax.OptState
    normaliser: Normaliser


class Data(NamedTuple):
    """What the outer learner needs of trials, `[B, T]` with T the steps of the whole trial."""

    x: jax.Array  # [B, T, D + A + 2 (+ 1)]
    action: jax.Array
    log_prob: jax.Array
    advantage: jax.Array
    target: jax.Array  # of the value
    valid: jax.Array


@pytree
class RL2(MetaLearner):
    lr: float | jax.Array
    lr_end: float | jax.Array | None
    gamma: float | jax.Array
    lam: float | jax.Array
    clip: float | jax.Array
    entropy: float | jax.Array
    entropy_end: float | jax.Array | None
    value: float | jax.Array
    max_grad_norm: float | jax.Array | None
    max_grad: float | jax.Array | None
    max_kl: float | jax.Array | None
    network: RecurrentActorCritic = static()
    outer: Outer = static()
    epochs: int = static()
    minibatches: int = static()
    accumulate: int = static()
    unroll: int | None = static()
    meta_batch: int = static()  # B
    episodes: int = static()  # E
    standardize: bool = static()
    normalize_observations: bool = static()
    normalize_rewards: bool = static()

    def optimizer(self, progress: float | jax.Array = 0.0) -> optax.GradientTransformation:
        """Its state does not depend on `progress`."""
        clips: list[Any] = []
        if self.max_grad is not None:
            clips.append(optax.clip(self.max_grad))
        if self.max_grad_norm is not None:
            clips.append(optax.clip_by_global_norm(self.max_grad_norm))  # type: ignore[arg-type]
        return optax.chain(*clips, optax.adam(anneal(self.lr, self.lr_end, progress), eps=1e-5))

    def init(self, key: Key, family: TaskFamily) -> RL2State:
        params = self.network.init(key)
        normaliser = Normaliser.create(self.network.spec.observation, self.normalize_observations, self.normalize_rewards)
        return RL2State(params, self.optimizer().init(params), normaliser)

    def learned(self, state: RL2State) -> RL2State:
        return state._replace(optimizer=None)

    def plan(self, family: TaskFamily, settings: EvalSettings) -> Plan:
        """A point per episode."""
        return Plan(points=settings.episodes or self.episodes, episodes=1, greedy=settings.greedy)

    def live(self, state: RL2State, key: Key, family: TaskFamily, task: Any, episodes: int, greedy: bool = False) -> Batch:
        """One trial `[E * T]`; `extra` is the log-probability and the value."""

        def act(carry, observation, previous, key):
            time, memory = carry
            x = self.network.inputs(state.normaliser.observe(observation), previous, time)
            memory, policy, value = self.network.step(state.params, memory, x)
            action = policy.mode() if greedy else policy.sample(key)
            return (time + 1, memory), action, (policy.log_prob(action), value)

        carry = jnp.zeros((), int), self.network.init_carry()
        return rollout(key, family, task, act, carry, self.network.spec, episodes)[1]

    def trial(self, state: RL2State, key: Key, family: TaskFamily, task: Any, plan: Plan) -> Trial:
        batch = by_episode(self.live(state, key, family, task, plan.points, plan.greedy), plan.points, family.horizon)
        batch = jax.tree.map(lambda x: x[:, None], batch)  # K = 1
        return summed_up(batch)

    def update(self, state: RL2State, key: Key, family: TaskFamily, progress: jax.Array) -> tuple[RL2State, Metrics]:
        batch = self.sample(state, key, family)
        params, optimizer, metrics = self.learn(state, self.data(state, batch), progress)
        returns = jnp.mean(jax.vmap(lambda b: episode_returns(by_episode(b, self.episodes, family.horizon)))(batch), 0)
        metrics |= {
            "return_before": returns[0],
            "return_after": returns[-1],
            "trial_return": jnp.sum(returns),
            "steps": jnp.sum(batch.valid),
        }
        return RL2State(params, optimizer, state.normaliser.update(batch, self.gamma)), metrics

    def sample(self, state: RL2State, key: Key, family: TaskFamily) -> Batch:
        """A trial in each of B fresh tasks, `[B, E * T]`."""
        key_tasks, key_live = jax.random.split(key)
        tasks = over_tasks(jax.vmap(family.sample)(over_tasks(jax.random.split(key_tasks, self.meta_batch))))
        keys = over_tasks(jax.random.split(key_live, self.meta_batch))
        return jax.vmap(lambda k, task: self.live(state, k, family, task, self.episodes))(keys, tasks)

    def data(self, state: RL2State, batch: Batch) -> Data:
        """Advantages across the whole trial, `[B, T]`."""
        log_prob, value = batch.extra
        reward = jnp.where(batch.valid, state.normaliser.scale(batch.reward), 0)
        value = jnp.where(batch.valid, value, 0)
        next_value = jnp.concatenate([value[:, 1:], jnp.zeros_like(value[:, :1])], axis=1)
        never = jnp.zeros_like(batch.valid)
        lam = 1.0 if self.outer == "reinforce" else self.lam
        advantage = gae(reward, value, next_value, never, never, self.gamma, lam)
        target = value + advantage
        if self.standardize and self.outer != "reinforce":
            advantage = standardise(advantage, batch.valid)
        previous = jax.vmap(lambda b: previous_steps(b, self.network.spec))(batch)
        time = jnp.broadcast_to(jnp.arange(value.shape[1]), value.shape)
        x = self.network.inputs(state.normaliser.observe(batch.observation), previous, time)
        return Data(x, batch.action, log_prob, advantage, target, batch.valid)

    def sequence(self, params: Params, x: jax.Array) -> tuple[Distribution, jax.Array]:
        """Policies and values at all steps of trials `[B, T, D]`."""
        return jax.vmap(lambda x: self.network.sequence(params, x, self.unroll))(x)

    def loss(self, params: Params, data: Data, progress: float | jax.Array) -> tuple[jax.Array, Metrics]:
        """On some whole trials."""
        policy, value = self.sequence(params, data.x)
        log_prob = policy.log_prob(data.action)
        if self.outer == "ppo":
            policy_loss = surrogate(log_prob, data.log_prob, data.advantage, data.valid, self.clip)
        else:
            policy_loss = -masked_mean(log_prob * data.advantage, data.valid)
        entropy = masked_mean(policy.entropy(), data.valid)
        loss = policy_loss - anneal(self.entropy, self.entropy_end, progress) * entropy
        metrics = {
            "policy_loss": policy_loss,
            "entropy": entropy,
            "kl": masked_mean(data.log_prob - log_prob, data.valid),
        }
        if self.network.critic != "none":
            metrics["value_loss"] = 0.5 * masked_mean((value - data.target) ** 2, data.valid)
            loss += self.value * metrics["value_loss"]
        return loss, metrics

    def learn(self, state: RL2State, data: Data, progress: jax.Array) -> tuple[Params, optax.OptState, Metrics]:
        """Epochs over minibatches of whole trials, in a fixed order as the authors have it: trials are exchangeable.

        A step takes the gradient of a minibatch in `accumulate` parts, one after another. With `max_kl` the result is that
        of the epoch with the lowest policy loss among those within the bound.
        """
        epochs, minibatches = (self.epochs, self.minibatches) if self.outer == "ppo" else (1, 1)
        data = over_tasks(jax.tree.map(lambda x: x.reshape(minibatches, self.accumulate, -1, *x.shape[1:]), data), axis=2)
        optimizer = self.optimizer(progress)

        def minibatch(carry, data):
            params, optimizer_state = carry
            gradient, metrics = self.slope(params, data, progress)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
            metrics["grad_norm"] = optax.tree.norm(gradient)
            return (optax.apply_updates(params, updates), optimizer_state), metrics

        def epoch(carry, _):
            learning, best = carry
            learning, metrics = jax.lax.scan(minibatch, learning, data)
            if bound is not None:
                best = bound.better(best, learning[0])
            return (learning, best), metrics

        bound = None if self.max_kl is None else Bound(self, state.params, data, self.max_kl)
        start = (state.params, state.optimizer), None if bound is None else bound.none()
        ((params, optimizer_state), best), metrics = jax.lax.scan(epoch, start, None, length=epochs)
        if bound is not None and best is not None:
            params = bound.accept(best, params)
        return params, optimizer_state, jax.tree.map(lambda x: jnp.mean(x[-1]), metrics)

    def slope(self, params: Params, data: Data, progress: jax.Array) -> tuple[Params, Metrics]:
        """Gradient and metrics of a minibatch, `[accumulate, B / minibatches / accumulate, T]`."""

        def part(total, data):
            (_, metrics), gradient = jax.value_and_grad(self.loss, has_aux=True)(params, data, progress)
            weight = jnp.sum(data.valid) / jnp.maximum(steps, 1)
            return jax.tree.map(lambda sum, x: sum + weight * x, total, (gradient, metrics)), None

        steps = jnp.sum(data.valid)
        first = jax.tree.map(lambda x: x[0], data)
        metrics = jax.eval_shape(lambda: self.loss(params, first, progress)[1])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, metrics))
        return jax.lax.scan(part, zeros, data)[0]


def anneal(start: Any, end: Any, progress: float | jax.Array) -> Any:
    """Linear in `progress`; constant without an end."""
    return start if end is None else start + progress * (end - start)


class Best(NamedTuple):
    params: Params
    loss: jax.Array  # infinite while no epoch was within the bound


class Bound:
    """The trust region of RL^2's authors: mean KL(old || new) over a meta-batch at most `max_kl`.

    Of the epochs within it the one of the lowest policy loss is kept; if none is, the step of the last is halved until it is
    (rllab-curriculum, algos/pposgd_clip_ratio.py). A critic of its own is left where the last epoch took it.
    """

    def __init__(self, learner: RL2, params: Params, data: Data, max_kl: float | jax.Array):
        """`data` is cut into `[minibatches, accumulate, ...]`."""
        self.learner, self.params, self.max_kl = learner, params, max_kl
        self.data = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data)
        self.old = jax.lax.map(lambda data: learner.sequence(params, data.x)[0], self.data)

    def none(self) -> Best:
        return Best(self.params, jnp.full((), jnp.inf))

    def measure(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """Mean KL and policy loss over the meta-batch."""

        def part(old_and_data):
            old, data = old_and_data
            policy, _ = self.learner.sequence(params, data.x)
            loss = surrogate(policy.log_prob(data.action), data.log_prob, data.advantage, data.valid, self.learner.clip)
            weight = jnp.sum(data.valid)
            return weight * masked_mean(old.kl(policy), data.valid), weight * loss, weight

        kl, loss, weight = map(jnp.sum, jax.lax.map(part, (self.old, self.data)))
        return kl / weight, loss / weight

    def better(self, best: Best, params: Params) -> Best:
        kl, loss = self.measure(params)
        take = (kl <= self.max_kl) & (loss < best.loss)
        return jax.tree.map(lambda new, old: jnp.where(take, new, old), Best(params, loss), best)

    def accept(self, best: Best, last: Params) -> Params:
        def step(halvings):
            return jax.tree.map(lambda old, new: old + 0.5**halvings * (new - old), self.params, last)

        def outside(halvings):
            return (halvings < HALVINGS) & (self.measure(step(halvings))[0] > self.max_kl)

        found = jnp.isfinite(best.loss)
        start = jnp.where(found, HALVINGS, 0)
        halvings = jax.lax.while_loop(outside, lambda n: n + 1, start)
        params = jax.tree.map(lambda kept, shorter: jnp.where(found, kept, shorter), best.params, step(halvings))
        own = ("critic", "value") if self.learner.network.critic == "separate" else ()
        return {name: last[name] if name in own else x for name, x in params.items()}


class RL2Settings(AlgoSettings):
    memory: MemorySettings
    outer: Outer = setting("outer learner: clipped surrogate, actor-critic, or the plain gradient of the trial's return")
    critic: Critic = setting("which memory the value reads: the policy's or one of its own; none: nothing is subtracted")
    hidden: Widths = setting("widths of the policy's hidden tanh layers between the memory and the actions", unit="units")
    policy_sees_state: bool = setting("the observation goes to the policy directly as well, not through the memory alone")
    sees_time: bool = setting("the share of the trial that is over is a part of the input")
    hypernetwork: int | None = setting(
        "size of the embedding from which all weights of the policy are generated (25 in Beck et al. 2023, with "
        "hidden=[32,32]); null: none",
        unit="units",
        ge=1,
    )
    lr: float = setting("learning rate of Adam", gt=0)
    lr_end: float | None = setting("at the end of the training, linearly; null: constant", ge=0)
    gamma: float = setting("discount", ge=0, le=1)
    lam: float = setting("lambda of the advantage estimates; reinforce: 1", ge=0, le=1)
    clip: float = setting("ppo: clip of the probability ratio", gt=0)
    entropy: float = setting("weight of the entropy bonus", ge=0)
    entropy_end: float | None = setting("at the end of the training, linearly; null: constant", ge=0)
    value: float = setting("weight of the value loss", ge=0)
    max_grad_norm: float | None = setting("global norm to which the gradient is clipped; null: none", gt=0)
    max_grad: float | None = setting("size to which each number of the gradient is clipped; null: none", gt=0)
    max_kl: float | None = setting(
        "ppo: the best epoch within this mean KL divergence from the old policy, else a shorter step; null: no bound", gt=0
    )
    epochs: int = setting("ppo: passes over a meta-batch", ge=1)
    minibatches: int = setting("ppo: minibatches of whole trials in a pass; they divide algo.meta_batch", ge=1)
    accumulate: int = setting("parts of a minibatch whose gradients are computed one after another, to save memory", ge=1)
    unroll: int | None = setting(
        "steps through which gradients go back; the carry is handed on; null: the whole trial", unit="steps", ge=1
    )
    meta_batch: int = setting("tasks B of a meta-iteration, one trial each", unit="tasks", ge=1)
    episodes: int | None = setting("episodes E of a trial; null: the family's", ge=1)
    standardize: bool = setting("advantages of a meta-batch to mean 0 and variance 1; reinforce: never")
    normalize_observations: bool = setting("running normalisation of observations")
    normalize_rewards: bool = setting("running normalisation of rewards")

    def build(self, family: TaskFamily) -> RL2:
        episodes = self.episodes or family.episodes
        length = episodes * family.horizon
        minibatches = self.minibatches if self.outer == "ppo" else 1
        divides("algo.minibatches", minibatches, self.meta_batch, f"algo.meta_batch={self.meta_batch}")
        trials = self.meta_batch // minibatches
        batch = "minibatch" if self.outer == "ppo" else "meta-batch"
        divides("algo.accumulate", self.accumulate, trials, f"the {trials} trials of a {batch}")
        if self.unroll is not None:
            divides("algo.unroll", self.unroll, length, f"the {length} steps of a trial")
        if self.hypernetwork is not None and not self.policy_sees_state:
            problem, hint = "the generated policy acts on the state alone", "Set algo.policy_sees_state=true."
            raise ConfigError("algo.hypernetwork", self.hypernetwork, problem, hint=hint)
        if self.max_kl is not None and self.outer != "ppo":
            raise ConfigError("algo.max_kl", self.max_kl, f"algo.outer={self.outer} makes a single step", allowed=["null"])
        network = RecurrentActorCritic(
            spaces(family),
            self.memory.build(length),
            critic=self.critic,
            widths=self.hidden,
            sees_state=self.policy_sees_state,
            length=length if self.sees_time else None,
            embedding=self.hypernetwork,
        )
        same = {field.name for field in fields(RL2)} & RL2Settings.model_fields.keys() - {"episodes"}  # type: ignore[arg-type]
        return RL2(network=network, episodes=episodes, **{name: getattr(self, name) for name in same})


def divides(key: str, n: int, total: int, what: str) -> None:
    """Raises `ConfigError` where n does not divide the total."""
    if total % n:
        allowed = [i for i in range(1, total + 1) if total % i == 0][:12]
        raise ConfigError(key, n, f"must divide {what}", allowed=allowed)
