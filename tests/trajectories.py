"""Random trajectories for the tests of single environments."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarl_cli import config
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.rollout import rollout, spaces


def family_of(name: str, *changes: str) -> Any:
    return config.compose([f"env={name}", *changes]).config.env.build()


def sample(family: TaskFamily, n: int, split: str = "train", seed: int = 0) -> Any:
    """`[n]` tasks, as numpy arrays."""
    draw = jax.jit(jax.vmap(lambda key: family.sample(key, split)))
    return jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(seed), n)))


class Played(NamedTuple):
    """`[B, T]`, numpy."""

    first: np.ndarray  # [B, D]
    action: np.ndarray
    final: np.ndarray  # [B, T, D], what a step led to, before any reset
    observation: np.ndarray  # [B, T, D], after it
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


def play(family: TaskFamily, tasks: Any, steps: int, seed: int = 1) -> Played:
    """Random actions in B tasks, over as many episodes as it takes."""

    def one(key, task):
        key_reset, key_steps = jax.random.split(key)
        first, state = family.env.reset(key_reset, task)

        def step(state, key):
            key_action, key_step = jax.random.split(key)
            action = family.env.action_space(task).sample(key_action)
            observation, state, reward, terminated, truncated, info = family.env.step(key_step, state, action, task)
            return state, (action, info["final_observation"], observation, reward, terminated, truncated)

        return first, *jax.lax.scan(step, state, jax.random.split(key_steps, steps))[1]

    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(tasks)[0]))
    return Played(*jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(keys, tasks)))


def live(family: TaskFamily, tasks: Any, act: Any, carry: Any, sees_state: bool = False, seed: int = 2) -> Any:
    """A whole trial in each of B tasks: a batch `[B, E * T]`, numpy. `act` may look at the task: it comes first."""
    spec = spaces(family)

    def one(key, task):
        agent = lambda *args: act(task, *args)  # noqa: E731
        return rollout(key, family, task, agent, carry, spec, family.episodes, sees_state)[1]

    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(tasks)[0]))
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(keys, tasks))


def oracle(family: TaskFamily) -> Any:
    return lambda task, carry, state, *_: (carry, family.oracle(task, state), None)


def close(x: Any, expected: float, more: float = 0.0) -> bool:
    """Whether the mean of independent numbers is within 4 standard errors (and those of the expected value)."""
    x = np.asarray(x, np.float64)
    return bool(abs(x.mean() - expected) <= 4 * np.hypot(x.std() / np.sqrt(x.size), more))


def one_task(family: TaskFamily, n: int, **changes: Any) -> Any:
    """The same task n times, some of its fields set."""
    import dataclasses

    task = family.sample(jax.random.key(0))
    task = dataclasses.replace(task, **{name: jnp.asarray(value) for name, value in changes.items()})
    return jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (n, *np.shape(x))), task)
