"""Living through episodes: against a replay in plain Python, and what an agent is told."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces as gymnax_spaces
from probes import OneStep, Probe, one_step, walk, walk_step, walk_task

from metarl_cli.core.errors import ConfigError
from metarl_cli.core.rollout import (
    Spaces,
    by_episode,
    first_input,
    flatten,
    previous_steps,
    rollout,
    spaces,
    to_environment,
)
from metarl_cli.core.types import Batch

HORIZON, EPISODES = 4, 3


def act(discrete: bool, carry: Any, observation: Any, previous: Any, key: Any):
    """A random policy that counts its steps and keeps what it was told."""
    # A continuous one is often beyond the box.
    action = jax.random.randint(key, (), 0, 3) if discrete else 1.5 * jax.random.normal(key, (2,))
    return carry + 1, action, (carry, previous)


@pytest.fixture(scope="module", params=[True, False], ids=["discrete", "continuous"])
def trials(request) -> tuple[bool, Any, Any, Batch]:
    """20 trials in different tasks: `(discrete, tasks, final carries, batch [20, E * T])`."""
    family = walk(request.param, HORIZON, EPISODES)
    tasks = jax.vmap(family.sample)(jax.random.split(jax.random.key(0), 20))
    act_so, spec = partial(act, request.param), spaces(family)
    live = jax.jit(jax.vmap(lambda k, task: rollout(k, family, task, act_so, 0, spec, EPISODES)))
    carry, batch = live(jax.random.split(jax.random.key(1), 20), tasks)
    return request.param, *jax.tree.map(np.asarray, (tasks, carry, batch))


def test_against_a_replay_in_plain_python(trials):
    discrete, tasks, _, batch = trials
    kinds = set()
    for i in range(20):
        task = jax.tree.map(lambda x, i=i: x[i], tasks)
        ended, position, time = 0, np.nan, 0
        for t in range(EPISODES * HORIZON):
            if t == 0 or batch.terminated[i, t - 1] or batch.truncated[i, t - 1]:  # a fresh start somewhere in [-1, 1]
                position, time = float(batch.observation[i, t, 0]), 0
                assert -1 <= position <= 1
            np.testing.assert_allclose(batch.observation[i, t], [position, 1 + time], rtol=1e-6, atol=1e-6)
            assert batch.valid[i, t] == (ended < EPISODES)
            position, time, reward, terminated, truncated = walk_step(
                position, time, batch.action[i, t], task, HORIZON, discrete
            )
            np.testing.assert_allclose(batch.reward[i, t], reward, rtol=1e-6, atol=1e-6)
            assert (batch.terminated[i, t], batch.truncated[i, t]) == (terminated, truncated)
            ended += terminated or truncated
            kinds.add((terminated, truncated, time == HORIZON))
    # Ends before, at and by the limit have all been seen: where both fall together the episode has terminated.
    assert kinds == {(False, False, False), (True, False, False), (True, False, True), (False, True, True)}


def test_trials_start_at_different_places(trials):
    _, _, _, batch = trials
    starts = batch.observation[:, 0, 0]
    assert len(np.unique(starts)) == 20
    first_end = np.argmax(batch.terminated | batch.truncated, axis=1)
    seconds = batch.observation[np.arange(20), first_end + 1, 0]
    assert len(np.intersect1d(starts, seconds)) == 0  # and so does the next episode


def test_carry_is_handed_on_over_resets(trials):
    _, _, carry, batch = trials
    np.testing.assert_array_equal(batch.extra[0], np.tile(np.arange(EPISODES * HORIZON), (20, 1)))
    np.testing.assert_array_equal(carry, EPISODES * HORIZON)


def test_what_an_agent_is_told(trials):
    discrete, _, _, batch = trials
    told = batch.extra[1]
    # At the start of a trial: no action, no reward, and `done`.
    np.testing.assert_array_equal(told.action[:, 0], np.full(20, -1) if discrete else np.zeros((20, 2)))
    np.testing.assert_array_equal(told.reward[:, 0], 0)
    np.testing.assert_array_equal(told.done[:, 0], 1)
    # Later: the step before, `done` right after each end of an episode, the last reward and action still there.
    np.testing.assert_array_equal(told.action[:, 1:], batch.action[:, :-1])
    np.testing.assert_array_equal(told.reward[:, 1:], batch.reward[:, :-1])
    np.testing.assert_array_equal(told.done[:, 1:], (batch.terminated | batch.truncated)[:, :-1])
    assert 0.2 < told.done[:, 1:].mean() < 0.9


def test_previous_steps_are_what_act_was_told(trials):
    discrete, _, _, batch = trials
    spec = Spaces(2, 3 if discrete else 2, discrete)
    again = jax.vmap(lambda b: previous_steps(b, spec))(jax.tree.map(jnp.asarray, batch))
    jax.tree.map(np.testing.assert_array_equal, again, batch.extra[1])


def test_by_episode(trials):
    _, _, _, batch = trials
    cut = jax.vmap(lambda b: by_episode(b, EPISODES, HORIZON))(jax.tree.map(jnp.asarray, batch))
    lengths = set()
    for i in range(20):
        done = batch.terminated[i] | batch.truncated[i]
        starts = [0, *(np.flatnonzero(done) + 1)]
        for episode in range(EPISODES):
            chosen = slice(starts[episode], starts[episode + 1])
            length = starts[episode + 1] - starts[episode]
            lengths.add(length)
            for x, y in zip(jax.tree.leaves(cut), jax.tree.leaves(batch), strict=True):
                np.testing.assert_array_equal(x[i, episode, :length], y[i, chosen])
                np.testing.assert_array_equal(x[i, episode, length:], 0)
            np.testing.assert_array_equal(cut.valid[i, episode], np.arange(HORIZON) < length)
    assert lengths == {1, 2, 3, 4}
    # Nothing is lost: all valid steps are there.
    np.testing.assert_array_equal(np.sum(cut.valid, (1, 2)), batch.valid.sum(1))


def test_by_episode_hand_derived():
    # E = 2, T = 3: an episode of 1 step, one of 3, and two steps of a third that the trial does not contain.
    done = jnp.array([True, False, False, True, False, True])
    valid = jnp.array([True, True, True, True, False, False])
    reward = jnp.array([1.0, 2, 3, 4, 5, 6])
    never = jnp.zeros(6, bool)
    cut = by_episode(Batch(reward[:, None], reward, reward, done, never, valid, None, None), 2, 3)
    np.testing.assert_array_equal(cut.reward, [[1, 0, 0], [2, 3, 4]])
    np.testing.assert_array_equal(cut.observation[..., 0], [[1, 0, 0], [2, 3, 4]])
    np.testing.assert_array_equal(cut.valid, [[True, False, False], [True, True, True]])
    np.testing.assert_array_equal(cut.terminated, [[True, False, False], [False, False, True]])


def test_one_key_gives_one_trial():
    family = walk(True)
    task, spec = family.sample(jax.random.key(0)), spaces(family)
    live = jax.jit(lambda k: rollout(k, family, task, partial(act, True), 0, spec, 2)[1])
    first, again, other = live(jax.random.key(1)), live(jax.random.key(1)), live(jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first.observation != other.observation) and np.any(first.action != other.action)


def test_spaces_of_a_family():
    assert spaces(walk(True)) == Spaces(observation=2, action=3, discrete=True)
    assert spaces(walk(False)) == Spaces(observation=2, action=2, discrete=False)
    scalar = one_step(gymnax_spaces.Box(-1.0, 1.0, ()), lambda hidden, action: action, 1)
    assert spaces(scalar) == Spaces(observation=1, action=1, discrete=False)
    odd = one_step(gymnax_spaces.Tuple([gymnax_spaces.Discrete(2)]), lambda hidden, action: action, 1)
    with pytest.raises(ConfigError, match=r"env=Tuple: this action space is not supported\. Allowed: Discrete, Box"):
        spaces(odd)


def test_observations_of_any_shape_become_one_vector():
    observation = {"map": jnp.arange(4).reshape(2, 2), "alive": jnp.array(True), "x": jnp.array([0.5])}
    np.testing.assert_array_equal(flatten(observation), [1, 0, 1, 2, 3, 0.5])
    assert flatten(observation).dtype == jnp.float32


@pytest.mark.parametrize(
    ("space", "action", "expected"),
    [
        # [-1, 1] is stretched over the box, and what is beyond clipped.
        (gymnax_spaces.Box(-0.1, 0.1, (2,)), [0.5, -3.0], [0.05, -0.1]),
        (gymnax_spaces.Box(0.0, 4.0, (3,)), [-1.0, 0.0, 1.0], [0, 2, 4]),
        (gymnax_spaces.Box(jnp.array([-1.0, 2.0]), jnp.array([1.0, 6.0]), (2,)), [0.5, 0.5], [0.5, 5]),
        # An unbounded box takes actions as they are; a box bounded on one side clips there.
        (gymnax_spaces.Box(-jnp.inf, jnp.inf, (2,)), [0.5, -3.0], [0.5, -3]),
        (gymnax_spaces.Box(0.0, jnp.inf, (2,)), [7.0, -3.0], [7, 0]),
        (gymnax_spaces.Box(-2.0, 2.0, ()), [0.5], 1.0),
        (gymnax_spaces.Box(-2.0, 2.0, (2, 1)), [0.5, -0.5], [[1.0], [-1.0]]),
        (gymnax_spaces.Discrete(3), 2, 2),
    ],
)
def test_actions_in_the_units_of_the_environment(space, action, expected):
    family = Probe(env=OneStep(space, lambda *_: jnp.zeros(())), task=partial(walk_task, horizon=1), horizon=1, episodes=1)
    result = to_environment(family, family.sample(jax.random.key(0)), jnp.asarray(action))
    assert result.shape == np.shape(expected)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_first_input():
    told = first_input(Spaces(2, 3, True))
    np.testing.assert_array_equal(jax.nn.one_hot(told.action, 3), 0)
    assert (told.reward, told.done) == (0, 1)
    told = first_input(Spaces(2, 3, False))
    np.testing.assert_array_equal(told.action, [0, 0, 0])
