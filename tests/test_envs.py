"""What every task family of `configs/env/` has to keep, and each environment against a second writing in plain numpy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from gymnax.environments.spaces import Box, Discrete
from scipy import stats

from metarl_cli import catalogue, config
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.rollout import from_environment, rollout, spaces, to_environment
from metarl_cli.core.types import BernoulliArms

FAMILIES = sorted(catalogue.groups()["env"])
TASKS = 16
# Shorter episodes: chance would never live as long, or it would take long.
SHORT = {
    "cartpole": 15,
    "cartpole_projected": 15,
    "acrobot": 50,
    "mountain_car": 50,
    "mountain_car_continuous": 50,
    "krazy_world": 10,
    "chain": 25,
}
# Families whose first observation tells something of the task, and whose YAML says so.
TELLS = {"cartpole_projected", "krazy_world"}


def family_of(name: str, *changes: str) -> Any:
    return config.compose([f"env={name}", *changes]).config.env.build()


@pytest.fixture(scope="module", params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(name) -> TaskFamily:
    return family_of(name, *([f"env.horizon={SHORT[name]}"] if name in SHORT else []))


def sample(family: TaskFamily, split: str = "train", n: int = TASKS, seed: int = 0) -> Any:
    return jax.jit(jax.vmap(lambda k: family.sample(k, split)))(jax.random.split(jax.random.key(seed), n))


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def different(a: Any, b: Any) -> bool:
    return any(np.any(np.asarray(x) != np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


class Played(NamedTuple):
    """Trajectories `[B, T]` in B tasks, over several episodes, jitted and vmapped."""

    tasks: Any  # [B]
    first: Any  # [B] observations
    key: Any  # the key of each step
    state: Any  # before it
    action: Any
    observation: Any  # after it
    reward: Any
    terminated: Any
    truncated: Any
    final: Any  # the observation after it, before any reset

    @property
    def done(self) -> np.ndarray:
        return np.asarray(self.terminated | self.truncated)


@pytest.fixture(scope="module")
def played(family) -> Played:
    """Random actions; in half of the tasks half or all of them are the oracle's, where there is one: goals are reached."""
    tasks = sample(family)

    def one(key, task, share):
        key_reset, key_steps = jax.random.split(key)
        first, state = family.env.reset(key_reset, task)

        def step(carry, key):
            observation, state = carry
            key_action, key_who, key_step = jax.random.split(key, 3)
            action = family.env.action_space(task).sample(key_action)
            oracle = family.oracle(task, state)
            if oracle is not None:
                action = jnp.where(jax.random.bernoulli(key_who, share), oracle, action)
            observation, new, reward, terminated, truncated, info = family.env.step(key_step, state, action, task)
            out = (key_step, state, action, observation, reward, terminated, truncated, info["final_observation"])
            return (observation, new), out

        steps = jax.random.split(key_steps, 2 * family.horizon + 20)
        return first, jax.lax.scan(step, (first, state), steps)[1]

    share = jnp.tile(jnp.array([0.5, 0.0, 1.0, 0.0]), TASKS // 4)
    first, out = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), TASKS), tasks, share)
    return Played(tasks, first, *out)


# --- contracts


def test_shapes_and_types_under_jit_and_vmap(family, played):
    shape = (TASKS, 2 * family.horizon + 20)
    assert played.reward.shape == played.terminated.shape == played.truncated.shape == shape
    assert played.reward.dtype == jnp.float32 and played.terminated.dtype == played.truncated.dtype == bool
    for x, y, z in zip(*map(jax.tree.leaves, (played.first, played.observation, played.final)), strict=True):
        assert y.shape == z.shape == (*shape, *x.shape[1:])
        assert x.dtype == y.dtype == z.dtype
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((played.observation, played.reward)))
    assert family.horizon >= 1 and family.episodes >= 1
    assert {"train", "test", "ood"} <= set(family.splits)


def test_spaces_match_what_is_seen_and_done(family, played):
    task = jax.tree.map(lambda x: x[0], played.tasks)
    space, actions = family.env.observation_space(task), family.env.action_space(task)
    assert played.first.shape[1:] == tuple(space.shape)
    for x in (played.first, played.observation, played.final):
        assert np.all(jax.vmap(space.contains)(x.reshape(-1, *space.shape)))
    spec = spaces(family)
    assert spec.observation == np.prod(space.shape)
    assert jnp.shape(to_environment(family, task, jnp.zeros((), int) if spec.discrete else jnp.zeros(spec.action))) == tuple(
        actions.shape
    )
    if isinstance(actions, Discrete):
        assert spec.discrete and spec.action == actions.n == family.env.num_actions
        assert set(np.unique(played.action)) == set(range(int(actions.n)))
    else:
        assert isinstance(actions, Box) and not spec.discrete and spec.action == np.prod(actions.shape)


def test_a_task_survives_every_reset(family, played):
    """In every episode, and right after each reset, what happens is what the task handed in says, and no other."""
    step = jax.jit(jax.vmap(jax.vmap(family.env.step_env, in_axes=(0, 0, 0, None))))
    key_step = jax.vmap(jax.vmap(lambda key: jax.random.split(key)[0]))(played.key)  # as gymnax has it

    def outcome(tasks):
        observation, _, reward, terminated, _ = step(key_step, played.state, played.action, tasks)
        flat = observation.reshape(*reward.shape, -1)
        return np.concatenate([flat, reward[..., None], terminated[..., None]], axis=-1)

    happened = np.concatenate(
        [x.reshape(*played.reward.shape, -1) for x in (played.final, played.reward, played.terminated)], axis=-1
    )
    np.testing.assert_allclose(outcome(played.tasks), happened, rtol=1e-5, atol=1e-5)
    elsewhere = outcome(jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), played.tasks))
    episode = np.cumsum(played.done, axis=1) - played.done
    assert np.all(episode[:, -1] >= 2)
    for i in range(3):  # one episode of one task may not show it, those of 16 tasks do
        assert np.any(happened[episode == i] != elsewhere[episode == i])


def test_the_state_does_not_hold_the_task(name, family):
    """Else a reset could change it: at the start, the same key gives the same state in every task."""
    if name == "krazy_world":
        pytest.skip("every board has its own start")
    tasks = sample(family)
    _, states = jax.vmap(lambda task: family.env.reset(jax.random.key(0), task))(tasks)
    for leaf in jax.tree.leaves(states):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


def test_the_first_observation_does_not_tell_the_task(name, family):
    if name in TELLS:
        pytest.skip("it does, as the YAML says")
    tasks = sample(family)
    observations, _ = jax.vmap(lambda task: family.env.reset(jax.random.key(0), task))(tasks)
    assert different(tasks, jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), tasks))
    for leaf in jax.tree.leaves(observations):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


def test_an_end_at_the_horizon_is_a_truncation(family, played):
    truncated, terminated = np.asarray(played.truncated), np.asarray(played.terminated)
    time = np.zeros(TASKS, int)
    for t in range(truncated.shape[1]):
        time += 1
        # Gymnax reports the limit even where the goal is reached in the same step: `rollout` sorts that out.
        np.testing.assert_array_equal(truncated[:, t], time == family.horizon)
        time[played.done[:, t]] = 0
    assert np.any(truncated & ~terminated)


def test_an_end_starts_a_new_episode_and_keeps_the_last_observation(family, played):
    key_reset = jax.vmap(jax.vmap(lambda key: jax.random.split(key)[1]))(played.key)  # as gymnax has it
    starts = jax.vmap(jax.vmap(family.env.reset_env, in_axes=(0, None)))(key_reset, played.tasks)[0]
    done = played.done
    assert done.any()
    for x, last, start in zip(*map(jax.tree.leaves, (played.observation, played.final, starts)), strict=True):
        np.testing.assert_array_equal(x[~done], last[~done])
        np.testing.assert_allclose(x[done], start[done], rtol=1e-6, atol=1e-7)


def test_one_key_one_task(family):
    for split in family.splits:
        tasks, again, others = sample(family, split), sample(family, split), sample(family, split, seed=1)
        assert_same(tasks, again)
        assert different(tasks, others)
        alone = family.sample(jax.random.split(jax.random.key(0), TASKS)[3], split)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x[3], y, rtol=1e-6, atol=1e-6), tasks, jax.tree.map(jnp.asarray, alone)
        )
        assert jax.tree.structure(tasks) == jax.tree.structure(alone)


def test_published_tasks_have_the_shape_of_drawn_ones(family):
    for split in family.splits:
        fixed, drawn = family.fixed(split), sample(family, split)
        if fixed is not None:
            assert jax.tree.structure(fixed) == jax.tree.structure(drawn)
            for x, y in zip(*map(jax.tree.leaves, (fixed, drawn)), strict=True):
                assert x.shape[1:] == y.shape[1:] and x.dtype == y.dtype


def test_oracle_is_better_than_chance(family):
    """And acts within the action space."""
    n, spec = 64, spaces(family)
    tasks = sample(family, n=n)
    first = jax.tree.map(lambda x: x[0], tasks)
    if family.oracle(first, family.env.reset(jax.random.key(0), first)[1]) is None:
        pytest.skip("nobody knows what is best there")

    def episode(key, task, knows):
        space = family.env.action_space(task)

        def act(carry, state, previous, key):
            action = family.oracle(task, state) if knows else space.sample(key)
            return carry, from_environment(family, task, action), space.contains(action)

        batch = rollout(key, family, task, act, (), spec, sees_state=True)[1]
        return jnp.sum(jnp.where(batch.valid, batch.reward, 0)), batch.extra

    run = jax.jit(jax.vmap(episode, in_axes=(0, 0, None)), static_argnums=2)
    keys = jax.random.split(jax.random.key(5), n)
    (oracle, inside), (chance, _) = run(keys, tasks, True), run(keys, tasks, False)
    assert np.all(inside)
    difference = np.asarray(oracle - chance)
    assert difference.mean() > 3 * difference.std() / np.sqrt(n)  # standard errors


def test_regret(family, played):
    expected = jax.vmap(jax.vmap(family.expected, in_axes=(None, 0, 0)))(played.tasks, played.state, played.action)
    if expected is None:
        pytest.skip("regret is not defined there")
    mean, best = (np.asarray(x) for x in expected)
    assert np.all(mean <= best) and np.any(mean < best)
    # The mean is that of the rewards: their sum is off by some standard errors at the most.
    surprise = np.asarray(played.reward) - mean
    assert abs(surprise.sum()) <= 4 * surprise.std() * np.sqrt(mean.size) + 1e-5 * mean.size


def test_draws_into_axes(family):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    spec, task = spaces(family), family.sample(jax.random.key(1))
    act = lambda carry, *_: (carry, jnp.zeros((), int) if spec.discrete else jnp.zeros(spec.action), None)  # noqa: E731
    live = jax.jit(jax.vmap(lambda key: rollout(key, family, task, act, (), spec)[1]))
    batch = live(jax.random.split(jax.random.key(2), 3))  # [K, T]
    figure, axes = plt.subplots()
    family.draw(axes, *jax.tree.map(np.asarray, (task, batch)))
    figure.canvas.draw()
    assert axes.has_data()
    plt.close(figure)


# --- each environment once more, in plain numpy


class PointNavReference:
    """As the authors' `point_env_randgoal.py` describes it."""

    def __init__(self, task, horizon):
        self.goal, self.horizon = task.goal, horizon

    def reset(self):
        self.x, self.y, self.time = 0.0, 0.0, 0
        return [0.0, 0.0]

    def step(self, action):
        dx, dy = np.clip(action, -0.1, 0.1)
        self.x, self.y, self.time = self.x + dx, self.y + dy, self.time + 1
        to_x, to_y = self.x - self.goal[0], self.y - self.goal[1]
        done = abs(to_x) < 0.01 and abs(to_y) < 0.01
        return [self.x, self.y], -((to_x**2 + to_y**2) ** 0.5), done, self.time >= self.horizon


class BanditReference:
    """Of a random reward only the two values are known: NaN stands for "0 or 1"."""

    def __init__(self, task, horizon):
        assert horizon == 1

    def reset(self):
        return [0.0]

    def step(self, action):
        return [0.0], np.nan, False, True


REFERENCES = {"point_nav": PointNavReference, "bandit": BanditReference}


def test_against_plain_numpy(name, family, played):
    if name not in REFERENCES:
        own = Path(__file__).with_name(f"test_envs_{type(family).__module__.rpartition('.')[2]}.py")
        assert own.exists(), f"write the environment once more in plain numpy, here in REFERENCES or in {own.name}"
        pytest.skip(f"in {own.name}")
    plain = jax.tree.map(np.asarray, played._replace(key=None))
    tasks, first, _, _, action, observation, reward, terminated, truncated, final = plain
    for i in range(TASKS):
        reference = REFERENCES[name](jax.tree.map(lambda x, i=i: x[i], tasks), family.horizon)
        np.testing.assert_array_equal(first[i], reference.reset())
        for t in range(reward.shape[1]):
            seen, paid, end, limit = reference.step(action[i, t])
            # Up to 100 sums in single precision.
            np.testing.assert_allclose(final[i, t], seen, rtol=1e-5, atol=1e-5)
            assert (terminated[i, t], truncated[i, t]) == (end, limit)
            assert reward[i, t] in (0, 1) if np.isnan(paid) else abs(reward[i, t] - paid) < 1e-5
            if end or limit:
                seen = reference.reset()
            np.testing.assert_allclose(observation[i, t], seen, rtol=1e-5, atol=1e-5)


# --- point_nav


def test_point_nav_hand_derived():
    # From (0, 0) towards the goal (0.3, 0.4): (0.05, 0.5) is clipped to (0.05, 0.1); the distance left is |(0.25, 0.3)|.
    family = family_of("point_nav")
    task = family.sample(jax.random.key(0))
    task = dataclasses.replace(task, goal=jnp.array([0.3, 0.4]))
    _, state = family.env.reset(jax.random.key(0), task)
    observation, _, reward, terminated, truncated, _ = family.env.step(
        jax.random.key(0), state, jnp.array([0.05, 0.5]), task
    )
    np.testing.assert_allclose(observation, [0.05, 0.1], rtol=1e-6)
    assert reward == pytest.approx(-np.hypot(0.25, 0.3))
    assert not terminated and not truncated
    # The box around the goal is 0.01 wide to each side, its border does not belong to it.
    for distance, inside in ((0.0099, True), (0.0101, False)):
        for offset in ([distance, 0.0], [0.0, -distance]):
            at = dataclasses.replace(state, position=task.goal + jnp.array(offset))
            assert family.env.is_terminated(at, task) == inside


def test_point_nav_published_goals():
    family = family_of("point_nav")
    np.random.seed(1)  # as the authors have it
    expected = np.random.uniform(-0.5, 0.5, size=(40, 2))
    np.testing.assert_allclose(family.fixed("test").goal, expected, rtol=1e-6, atol=1e-7)
    # The first two, as numbers: they do not depend on the numpy of this machine.
    first = [[-0.082977995, 0.220324493], [-0.499885625, -0.197667427]]
    np.testing.assert_allclose(family.fixed("test").goal[:2], first, atol=1e-6)
    np.testing.assert_array_equal(family.fixed("test").max_steps_in_episode, 100)
    assert family.fixed("train") is None and family.fixed("ood") is None


def test_point_nav_splits():
    family, n = family_of("point_nav"), 5000
    for split in ("train", "test"):
        goals = np.asarray(sample(family, split, n).goal)
        for axis in (0, 1):
            assert stats.kstest(goals[:, axis], stats.uniform(-0.5, 1).cdf).pvalue > 1e-3
        assert abs(np.corrcoef(goals.T)[0, 1]) < 4 / np.sqrt(n)
    goals = np.asarray(sample(family, "ood", n).goal)
    radius = np.abs(goals).max(1)
    assert radius.min() >= 0.5 and radius.max() <= 1
    # Uniform in the frame: within max-norm r lies the share (4 r^2 - 1) / 3 of its area,
    assert stats.kstest(radius, lambda r: (4 * r**2 - 1) / 3).pvalue > 1e-3
    # its four corner squares are 1/3 of it, and no side is preferred.
    corners = np.mean(np.abs(goals).min(1) > 0.5)
    assert abs(corners - 1 / 3) < 4 * np.sqrt(2 / 9 / n)
    assert np.all(np.abs(goals.mean(0)) < 4 * goals.std(0) / np.sqrt(n))


def test_point_nav_oracle_takes_the_shortest_time():
    family = family_of("point_nav")
    tasks, spec = sample(family), spaces(family)
    act = lambda task: lambda carry, state, *_: (carry, family.oracle(task, state) / 0.1, None)  # noqa: E731
    run = jax.jit(jax.vmap(lambda k, task: rollout(k, family, task, act(task), (), spec, sees_state=True)[1]))
    batch = run(jax.random.split(jax.random.key(0), TASKS), tasks)
    # 0.1 per step and axis, and the last 0.01 need not be walked.
    np.testing.assert_array_equal(batch.valid.sum(1), np.ceil((np.abs(tasks.goal).max(1) - 0.01) / 0.1))


# --- bandit


def test_bandit_splits():
    family, n = family_of("bandit", "env.k=4"), 5000
    assert family.prior == BernoulliArms(4) and family.horizon == 1 and family.episodes == 10
    for split in ("train", "test"):
        p = np.asarray(sample(family, split, n).probability)
        assert p.shape == (n, 4) and stats.kstest(p.ravel(), "uniform").pvalue > 1e-3
        np.testing.assert_allclose(np.corrcoef(p.T), np.eye(4), atol=4 / np.sqrt(n))
    p = np.asarray(sample(family, "ood", n).probability)
    np.testing.assert_allclose(np.sort(p, axis=1), np.broadcast_to([0.45, 0.45, 0.45, 0.55], (n, 4)), rtol=1e-6)
    best = np.bincount(p.argmax(1), minlength=4)
    np.testing.assert_allclose(best / n, 1 / 4, atol=4 * np.sqrt(3 / 16 / n))


def test_bandit_pays_with_the_probability_of_the_arm():
    family, n = family_of("bandit", "env.k=3", "env.n=7"), 20_000
    assert family.episodes == 7
    task = dataclasses.replace(family.sample(jax.random.key(0)), probability=jnp.array([0.0, 0.3, 1.0]))
    _, state = family.env.reset(jax.random.key(0), task)
    for arm, p in enumerate((0, 0.3, 1)):
        pull = jax.jit(jax.vmap(lambda key, arm=arm: family.env.step(key, state, arm, task)[2]))
        reward = np.asarray(pull(jax.random.split(jax.random.key(arm), n)))
        assert set(np.unique(reward)) <= {0, 1}
        assert abs(reward.mean() - p) <= 4 * np.sqrt(p * (1 - p) / n)
        mean, best = family.expected(task, state, jnp.array(arm))
        assert (mean, best) == (pytest.approx(p), 1)
