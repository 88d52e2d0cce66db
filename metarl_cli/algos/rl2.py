"""RL^2: a recurrent policy that learns within its memory.

Duan et al. 2016, arXiv:1611.02779; Wang et al. 2016, arXiv:1611.05763.

One trial of E episodes in one task is one long episode for the outer learner: the memory is carried over the ends of the
episodes and reset only between trials, the advantages are those of the whole trial, and no end of an episode cuts the
return; after the trial's last step there is nothing. The outer learner is PPO (Schulman et al. 2017) with full
back-propagation through the trial.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import MetaLearner, Metrics, TaskFamily
from metarl_cli.core.losses import surrogate
from metarl_cli.core.memory import MemorySettings
from metarl_cli.core.networks import RecurrentActorCritic
from metarl_cli.core.returns import Normaliser, episode_returns, gae, masked_mean, standardise
from metarl_cli.core.rollout import by_episode, previous_steps, rollout, spaces
from metarl_cli.core.settings import AlgoSettings, EvalSettings, setting
from metarl_cli.core.types import Batch, Key, Params, Plan, Trial, pytree, static


class RL2State(NamedTuple):
    params: Params
    optimizer: optax.OptState
    normaliser: Normaliser


class Data(NamedTuple):
    """What PPO needs of trials, `[B, T]` with T the steps of the whole trial."""

    x: jax.Array  # [B, T, D + A + 2]
    action: jax.Array
    log_prob: jax.Array
    advantage: jax.Array
    target: jax.Array  # of the value
    valid: jax.Array


@pytree
class RL2(MetaLearner):
    lr: float | jax.Array
    gamma: float | jax.Array
    lam: float | jax.Array
    clip: float | jax.Array
    entropy: float | jax.Array
    value: float | jax.Array
    max_grad_norm: float | jax.Array
    network: RecurrentActorCritic = static()
    epochs: int = static()
    minibatches: int = static()
    meta_batch: int = static()  # B
    episodes: int = static()  # E
    normalize_observations: bool = static()
    normalize_rewards: bool = static()

    def optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), optax.adam(self.lr, eps=1e-5))  # type: ignore[arg-type]

    def init(self, key: Key, family: TaskFamily) -> RL2State:
        params = self.network.init(key)
        normaliser = Normaliser.create(self.network.spec.observation, self.normalize_observations, self.normalize_rewards)
        return RL2State(params, self.optimizer().init(params), normaliser)

    def learned(self, state: RL2State) -> RL2State:
        return state._replace(optimizer=None)

    def plan(self, family: TaskFamily, settings: EvalSettings) -> Plan:
        """A point per episode."""
        return Plan(points=settings.episodes or self.episodes, episodes=1)

    def live(self, state: RL2State, key: Key, family: TaskFamily, task: Any, episodes: int) -> Batch:
        """One trial `[E * T]`; `extra` is the log-probability and the value."""

        def act(carry, observation, previous, key):
            x = self.network.inputs(state.normaliser.observe(observation), previous)
            carry, policy, value = self.network.step(state.params, carry, x)
            action = policy.sample(key)
            return carry, action, (policy.log_prob(action), value)

        carry = self.network.memory.init_carry()
        return rollout(key, family, task, act, carry, self.network.spec, episodes)[1]

    def trial(self, state: RL2State, key: Key, family: TaskFamily, task: Any, plan: Plan) -> Trial:
        batch = by_episode(self.live(state, key, family, task, plan.points), plan.points, family.horizon)
        batch = jax.tree.map(lambda x: x[:, None], batch)  # K = 1
        regret = None if batch.regret is None else jnp.sum(jnp.where(batch.valid, batch.regret, 0), -1)
        return Trial(episode_returns(batch), jnp.sum(batch.valid, -1), regret, batch)

    def update(self, state: RL2State, key: Key, family: TaskFamily, progress: jax.Array) -> tuple[RL2State, Metrics]:
        batch = self.sample(state, key, family)
        params, optimizer, metrics = self.ppo(state, self.data(state, batch))
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
        tasks = jax.vmap(family.sample)(jax.random.split(key_tasks, self.meta_batch))
        keys = jax.random.split(key_live, self.meta_batch)
        return jax.vmap(lambda k, task: self.live(state, k, family, task, self.episodes))(keys, tasks)

    def data(self, state: RL2State, batch: Batch) -> Data:
        """Advantages across the whole trial, `[B, T]`."""
        log_prob, value = batch.extra
        reward = jnp.where(batch.valid, state.normaliser.scale(batch.reward), 0)
        value = jnp.where(batch.valid, value, 0)
        next_value = jnp.concatenate([value[:, 1:], jnp.zeros_like(value[:, :1])], axis=1)
        never = jnp.zeros_like(batch.valid)
        advantage = gae(reward, value, next_value, never, never, self.gamma, self.lam)
        previous = jax.vmap(lambda b: previous_steps(b, self.network.spec))(batch)
        x = self.network.inputs(state.normaliser.observe(batch.observation), previous)
        return Data(x, batch.action, log_prob, standardise(advantage, batch.valid), value + advantage, batch.valid)

    def loss(self, params: Params, data: Data) -> tuple[jax.Array, Metrics]:
        """PPO's, on a minibatch of whole trials."""
        policy, value = jax.vmap(lambda x: self.network.sequence(params, x))(data.x)
        log_prob = policy.log_prob(data.action)
        policy_loss = surrogate(log_prob, data.log_prob, data.advantage, data.valid, self.clip)
        value_loss = 0.5 * masked_mean((value - data.target) ** 2, data.valid)
        entropy = masked_mean(policy.entropy(), data.valid)
        metrics = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "kl": masked_mean(data.log_prob - log_prob, data.valid),
        }
        return policy_loss + self.value * value_loss - self.entropy * entropy, metrics

    def ppo(self, state: RL2State, data: Data) -> tuple[Params, optax.OptState, Metrics]:
        """Epochs over minibatches of whole trials, in a fixed order as the authors have it: trials are exchangeable."""

        def minibatch(carry, data):
            params, optimizer = carry
            (_, metrics), gradient = jax.value_and_grad(self.loss, has_aux=True)(params, data)
            updates, optimizer = self.optimizer().update(gradient, optimizer, params)
            metrics["grad_norm"] = optax.tree.norm(gradient)
            return (optax.apply_updates(params, updates), optimizer), metrics

        def epoch(carry, _):
            return jax.lax.scan(minibatch, carry, minibatches)

        minibatches = jax.tree.map(lambda x: x.reshape(self.minibatches, -1, *x.shape[1:]), data)
        (params, optimizer), metrics = jax.lax.scan(epoch, (state.params, state.optimizer), None, length=self.epochs)
        return params, optimizer, jax.tree.map(lambda x: jnp.mean(x[-1]), metrics)


class RL2Settings(AlgoSettings):
    memory: MemorySettings
    lr: float = setting("learning rate of Adam", gt=0)
    gamma: float = setting("discount", ge=0, le=1)
    lam: float = setting("lambda of the advantage estimates", ge=0, le=1)
    clip: float = setting("clip of the probability ratio", gt=0)
    entropy: float = setting("weight of the entropy bonus", ge=0)
    value: float = setting("weight of the value loss", ge=0)
    max_grad_norm: float = setting("global norm to which the gradient is clipped", gt=0)
    epochs: int = setting("passes over a meta-batch", ge=1)
    minibatches: int = setting("minibatches of whole trials in a pass; they divide algo.meta_batch", ge=1)
    meta_batch: int = setting("tasks B of a meta-iteration, one trial each", unit="tasks", ge=1)
    episodes: int | None = setting("episodes E of a trial; null: the family's", ge=1)
    normalize_observations: bool = setting("running normalisation of observations")
    normalize_rewards: bool = setting("running normalisation of rewards")

    def build(self, family: TaskFamily) -> RL2:
        if self.meta_batch % self.minibatches:
            raise ConfigError(
                "algo.minibatches",
                self.minibatches,
                f"must divide algo.meta_batch={self.meta_batch}",
                allowed=[n for n in range(1, self.meta_batch + 1) if self.meta_batch % n == 0][:12],
            )
        return RL2(
            lr=self.lr,
            gamma=self.gamma,
            lam=self.lam,
            clip=self.clip,
            entropy=self.entropy,
            value=self.value,
            max_grad_norm=self.max_grad_norm,
            network=RecurrentActorCritic(spaces(family), self.memory.build()),
            epochs=self.epochs,
            minibatches=self.minibatches,
            meta_batch=self.meta_batch,
            episodes=self.episodes or family.episodes,
            normalize_observations=self.normalize_observations,
            normalize_rewards=self.normalize_rewards,
        )
