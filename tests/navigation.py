"""What the tests of the navigation families share: trajectories against a second writing in plain numpy."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from trajectories import live, oracle

from metarl_cli.core.interfaces import TaskFamily


class Reference(Protocol):
    """An environment in plain numpy, made from a task."""

    def reset(self, state: Any) -> Any:
        """The observation; what is random in a start is taken from the state that the family drew."""
        ...

    def step(self, action: Any) -> tuple[Any, float, bool]:
        """Observation, reward, terminated."""
        ...


def follow(family: Any, make: Any, tasks: Any, share: float = 0.7, atol: float = 0.0) -> np.ndarray:
    """Plays in B tasks, over episodes, and compares every step with `make(task)`; returns rewards `[B, T]`.

    Actions are random, but for a share that are the oracle's.
    """
    steps = 2 * family.horizon + 5

    def one(key, task):
        key_reset, key_steps = jax.random.split(key)
        first, start = family.env.reset(key_reset, task)

        def step(state, key):
            key_action, key_who, key_step = jax.random.split(key, 3)
            action = family.env.action_space(task).sample(key_action)
            action = jnp.where(jax.random.bernoulli(key_who, share), family.oracle(task, state), action)
            observation, new, reward, terminated, truncated, info = family.env.step(key_step, state, action, task)
            return new, (action, info["final_observation"], observation, reward, terminated, truncated, new)

        return first, start, *jax.lax.scan(step, start, jax.random.split(key_steps, steps))[1]

    b = len(jax.tree.leaves(tasks)[0])
    out = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), b), tasks))
    for i in range(b):
        task, (first, start, action, final, observation, reward, terminated, truncated, after) = jax.tree.map(
            lambda x, i=i: x[i], (tasks, out)
        )
        reference: Reference = make(task)
        np.testing.assert_allclose(first, reference.reset(start), atol=atol)
        time = 0
        for t in range(steps):
            time += 1
            seen, paid, ended = reference.step(action[t])
            np.testing.assert_allclose(final[t], seen, atol=atol)
            np.testing.assert_allclose(reward[t], paid, rtol=1e-6, atol=atol)
            assert (terminated[t], truncated[t]) == (ended, time == family.horizon)
            if ended or time == family.horizon:
                time, seen = 0, reference.reset(jax.tree.map(lambda x, t=t: x[t], after))
            np.testing.assert_allclose(observation[t], seen, atol=atol)
    return out[5]


def oracle_episodes(family: TaskFamily, tasks: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """Returns and lengths `[B, E]` of the oracle's episodes of a trial (E or more), and the batch `[B, E * T]`."""
    from metarl_cli.core.rollout import from_environment

    known = oracle(family)

    def act(task, *args):
        carry, action, extra = known(task, *args)
        return carry, from_environment(family, task, action), extra

    batch = live(family, tasks, act, (), sees_state=True)
    done = batch.terminated | batch.truncated
    episode = np.cumsum(done, axis=1) - done
    returns = np.stack([np.sum(batch.reward * (episode == e), axis=1) for e in range(family.episodes)], axis=1)
    lengths = np.stack([np.sum(episode == e, axis=1) for e in range(family.episodes)], axis=1)
    return returns, lengths, batch


def one_hot(cell: Any, size: int) -> np.ndarray:
    seen = np.zeros(size * size)
    seen[cell[1] * size + cell[0]] = 1
    return seen
