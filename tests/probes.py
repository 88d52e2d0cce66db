"""Tiny task families of which everything is known, and what else several test files need."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams, EnvState

from metarl_cli import catalogue, config
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.settings import EvalSettings
from metarl_cli.core.types import Key, pytree, static


@pytree
class Probe(TaskFamily):
    """A family given by its environment and a function that draws a task."""

    env: Any = static()
    task: Callable[[Key], Any] = static()
    horizon: int = static()
    episodes: int = static()
    prior: None = static(default=None)
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> Any:
        return self.task(key)

    def fixed(self, split: str) -> None:
        return None

    def oracle(self, task: Any, state: Any) -> None:
        return None

    def expected(self, task: Any, state: Any, action: jax.Array) -> None:
        return None

    def draw(self, axes: Any, task: Any, batch: Any) -> None:
        axes.set(xlabel="nothing to see")


# --- a walk with episodes of different lengths


@pytree
class WalkParams(EnvParams):
    """Where rewards are highest, and after how many steps an episode terminates."""

    goal: jax.Array
    length: jax.Array
    max_steps_in_episode: Any


@pytree
class WalkState(EnvState):
    position: jax.Array
    time: Any


class Walk(Environment[WalkState, WalkParams]):
    """On a line, from a random start. What a step does, `walk_step` says once more in plain Python."""

    def __init__(self, discrete: bool):
        self.discrete = discrete

    @property
    def num_actions(self) -> int:
        return 3

    def observation(self, state: WalkState) -> jax.Array:
        return jnp.stack([state.position, 1.0 + state.time])

    def reset_env(self, key, params):
        state = WalkState(position=jax.random.uniform(key, minval=-1, maxval=1), time=jnp.zeros((), int))
        return self.observation(state), state

    def step_env(self, key, state, action, params):
        move = 0.5 * (action - 1) if self.discrete else action[0] + 0.5 * action[1]
        state = WalkState(position=state.position + move, time=state.time + 1)
        reward = -jnp.abs(state.position - params.goal)
        return self.observation(state), state, reward, self.is_terminated(state, params), {}

    def is_terminated(self, state, params):
        return state.time >= params.length

    def action_space(self, params):
        return spaces.Discrete(3) if self.discrete else spaces.Box(-0.5, 0.5, (2,))


def walk_step(position: float, time: int, action: Any, task: Any, horizon: int, discrete: bool):
    """`(position, time, reward, terminated, truncated)`; `action` in the units of a policy."""
    if discrete:
        position += 0.5 * (int(action) - 1)
    else:
        moves = 0.5 * np.clip(action, -1, 1)
        position += moves[0] + 0.5 * moves[1]
    time += 1
    terminated = time >= int(task.length)
    return position, time, -abs(position - float(task.goal)), terminated, time >= horizon and not terminated


def walk_task(key: Key, horizon: int) -> WalkParams:
    """Lengths from 1 to `horizon + 2`: some episodes terminate, some at the very step of the limit, some are truncated."""
    key_goal, key_length = jax.random.split(key)
    return WalkParams(
        goal=jax.random.uniform(key_goal, minval=-2, maxval=2),
        length=jax.random.randint(key_length, (), 1, horizon + 3),
        max_steps_in_episode=horizon,
    )


@cache
def walk(discrete: bool, horizon: int = 4, episodes: int = 3) -> Probe:
    return Probe(env=Walk(discrete), task=partial(walk_task, horizon=horizon), horizon=horizon, episodes=episodes)


# --- one-step tasks with known optima


@pytree
class HiddenParams(EnvParams):
    hidden: jax.Array
    max_steps_in_episode: Any = 1


@pytree
class TimeState(EnvState):
    time: Any


class OneStep(Environment[TimeState, HiddenParams]):
    """One action, a reward that depends on it and on what is hidden, the end. The observation is always 1."""

    def __init__(self, space: Any, reward: Callable[[jax.Array, jax.Array], jax.Array]):
        self.space, self.reward = space, reward

    def reset_env(self, key, params):
        return jnp.ones(1), TimeState(time=jnp.zeros((), int))

    def step_env(self, key, state, action, params):
        state = TimeState(time=state.time + 1)
        return jnp.ones(1), state, self.reward(params.hidden, action), jnp.zeros((), bool), {}

    def is_terminated(self, state, params):
        return jnp.zeros((), bool)

    def action_space(self, params):
        return self.space


def one_step(space: Any, reward: Callable[[jax.Array, jax.Array], jax.Array], episodes: int) -> Probe:
    """The hidden variable is 0 or 1, equally likely."""

    def task(key: Key) -> HiddenParams:
        return HiddenParams(hidden=jax.random.bernoulli(key).astype(float))

    return Probe(env=OneStep(space, reward), task=task, horizon=1, episodes=episodes)


# --- learners


def build(algo: str, family: TaskFamily, **settings: Any) -> Any:
    """The learner of `configs/algo/<algo>.yaml` with some settings changed; `memory__features=4` is `memory.features`."""
    groups = catalogue.groups()
    env = next(name for name in groups["env"] if f"{algo}_{name}" not in groups["tuned"])  # the defaults, nothing else
    lines = [f"algo.{name.replace('__', '.')}={'null' if v is None else v}" for name, v in settings.items()]
    return config.compose([f"algo={algo}", f"env={env}", *lines]).config.algo.build(family)


def eval_settings(**settings: Any) -> EvalSettings:
    """Those of `configs/train.yaml` with some changed; `adapt__steps=2` is `adapt.steps`."""
    lines = [f"eval.{name.replace('__', '.')}={'null' if v is None else v}" for name, v in settings.items()]
    return config.compose(lines).config.eval


@jax.jit
def update(learner: Any, state: Any, key: Key, family: TaskFamily) -> tuple[Any, Any]:
    """One meta-iteration."""
    return learner.update(state, key, family, jnp.zeros(()))


@partial(jax.jit, static_argnames=("iterations", "seeds"))
def train(learner: Any, family: TaskFamily, iterations: int, seeds: int) -> tuple[Any, Any]:
    """States `[S]` after training and the metrics of all meta-iterations `[S, iterations]`."""

    def one(key):
        key_init, key_train = jax.random.split(key)
        keys = jax.random.split(key_train, iterations)
        step = lambda state, key: learner.update(state, key, family, jnp.zeros(()))  # noqa: E731
        return jax.lax.scan(step, learner.init(key_init, family), keys)

    return jax.vmap(one)(jax.random.split(jax.random.key(0), seeds))


def assert_close(actual: Any, expected: Any, rtol: float = 1e-6, atol: float = 0.0) -> None:
    """Leaf by leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def random_like(params: Any, scale: float = 0.5) -> Any:
    """Random numbers in every place, so that none hides behind an initial 0."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(42), len(leaves))
    return jax.tree.unflatten(
        structure, [scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def finite_differences(f: Callable[[jax.Array], jax.Array], x: jax.Array, step: float = 1e-5) -> np.ndarray:
    """The derivative `[n, ...]` of `f` at `x [n]` by central differences, exact to about step^2 + 1e-16 / step = 1e-10."""
    offsets = step * jnp.eye(x.size)
    up, down = jax.jit(jax.vmap(lambda d: (f(x + d), f(x - d))))(offsets)
    return np.asarray((up - down) / (2 * step))
