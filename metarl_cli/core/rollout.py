"""Living through episodes of one task. One loop serves every learner, every family, training and evaluation.

A task is handed to the environment at each step and each reset, so it survives them all; `terminated` and `truncated` stay
apart. Learners act in units of their own, [-1, 1] per component where the action space is a bounded box.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.types import Batch, Key, Previous

Carry = TypeVar("Carry")
Act = Callable[[Carry, jax.Array, Previous, Key], tuple[Carry, jax.Array, Any]]


@dataclass(frozen=True)
class Spaces:
    """What a network has to know of a family: D observation features; A action components or n actions."""

    observation: int
    action: int
    discrete: bool


def spaces(family: TaskFamily) -> Spaces:
    """Raises `ConfigError` for an action space that is neither discrete nor a box."""
    from gymnax.environments.spaces import Box, Discrete

    key = jax.random.key(0)
    task = family.sample(key)
    observation = jax.eval_shape(lambda: flatten(family.env.reset(key, task)[0]))
    space = family.env.action_space(task)
    if isinstance(space, Discrete):
        return Spaces(observation.size, int(space.n), True)
    if isinstance(space, Box):
        return Spaces(observation.size, max(1, math.prod(space.shape)), False)
    raise ConfigError("env", type(space).__name__, "this action space is not supported", allowed=["Discrete", "Box"])


def flatten(observation: Any) -> jax.Array:
    """Any pytree of arrays as one vector of floats `[D]`."""
    return jnp.concatenate([jnp.ravel(leaf).astype(float) for leaf in jax.tree.leaves(observation)])


def to_environment(family: TaskFamily, task: Any, action: jax.Array) -> jax.Array:
    """An action in the environment's units: discrete ones as they are, [-1, 1] stretched over a bounded box and clipped."""
    from gymnax.environments.spaces import Box

    space = family.env.action_space(task)
    if not isinstance(space, Box):
        return action
    action = action.reshape(space.shape)
    low, high = (jnp.broadcast_to(jnp.asarray(bound, action.dtype), space.shape) for bound in (space.low, space.high))
    bounded = jnp.isfinite(low) & jnp.isfinite(high)
    stretched = low + 0.5 * (jnp.clip(action, -1, 1) + 1) * (high - low)
    return jnp.where(bounded, stretched, jnp.clip(action, low, high))


def from_environment(family: TaskFamily, task: Any, action: jax.Array) -> jax.Array:
    """The other way round: what a policy has to say for an action in the environment's units."""
    from gymnax.environments.spaces import Box

    space = family.env.action_space(task)
    if not isinstance(space, Box):
        return action
    low, high = (jnp.broadcast_to(jnp.asarray(bound, action.dtype), space.shape) for bound in (space.low, space.high))
    bounded = jnp.isfinite(low) & jnp.isfinite(high)
    return jnp.ravel(jnp.where(bounded, 2 * (action - low) / (high - low) - 1, action))


def first_input(spec: Spaces) -> Previous:
    """What an agent is told of the step before the first one of a trial: nothing, and `done` = 1 (Duan et al. 2016).

    The action is -1 where actions are discrete: its one-hot code is all zeros.
    """
    action = jnp.full((), -1) if spec.discrete else jnp.zeros(spec.action)
    return Previous(action, jnp.zeros(()), jnp.ones(()))


def rollout(
    key: Key,
    family: TaskFamily,
    task: Any,
    act: Act,
    carry: Carry,
    spec: Spaces,
    episodes: int = 1,
    sees_state: bool = False,
) -> tuple[Carry, Batch]:
    """Lives through E episodes in a row in one task.

    Args:
        act: `(carry, observation [D], previous step, key) -> (carry, action, extra)`; it never sees the task.
        carry: the agent's memory. It is handed on over resets.
        episodes: E. The loop runs `E * horizon` steps; those after the end of episode E are marked invalid.
        sees_state: `act` is handed the environment's state in the place of the observation: for oracles.

    Returns:
        The final carry and a batch `[E * horizon]`.
    """
    steps = episodes * family.horizon
    key_reset, keys = jnp.split(jax.random.split(key, 1 + 2 * steps), [1])  # one call: each costs compile time

    def step(state, keys):
        env_state, observation, carry, previous, ended = state
        key_act, key_env = keys
        carry, action, extra = act(carry, env_state if sees_state else observation, previous, key_act)
        env_action = to_environment(family, task, action)
        rewards = family.expected(task, env_state, env_action)
        next_observation, env_state, reward, terminated, truncated, _ = family.env.step(key_env, env_state, env_action, task)
        reward = jnp.asarray(reward, float)
        done = terminated | truncated
        batch = Batch(
            observation=observation,
            action=action,
            reward=reward,
            terminated=terminated,
            truncated=truncated & ~terminated,
            valid=ended < episodes,
            regret=None if rewards is None else rewards[1] - rewards[0],
            extra=extra,
        )
        previous = Previous(action, reward, done.astype(float))
        return (env_state, flatten(next_observation), carry, previous, ended + done), batch

    observation, env_state = family.env.reset(key_reset[0], task)
    start = (env_state, flatten(observation), carry, first_input(spec), jnp.zeros((), int))
    (_, _, carry, _, _), batch = jax.lax.scan(step, start, keys.reshape(steps, 2))
    return carry, batch


def previous_steps(batch: Batch, spec: Spaces) -> Previous:
    """What `act` was told at each step of a trial `[T]`, from the steps themselves."""
    done = (batch.terminated | batch.truncated).astype(float)
    steps = Previous(batch.action, batch.reward, done)
    return jax.tree.map(lambda first, x: jnp.concatenate([first[None], x[:-1]]), first_input(spec), steps)


def by_episode(batch: Batch, episodes: int, horizon: int) -> Batch:
    """A trial `[E * T]` cut at the ends of its episodes, each padded: `[E, T]`."""
    done = batch.terminated | batch.truncated
    episode = jnp.cumsum(done) - done
    now = jnp.arange(done.size)
    start = jax.lax.cummax(jnp.where(jnp.concatenate([jnp.ones(1, bool), done[:-1]]), now, 0))

    def cut(x):
        return jnp.zeros((episodes, horizon, *x.shape[1:]), x.dtype).at[episode, now - start].set(x, mode="drop")

    return jax.tree.map(cut, batch)
