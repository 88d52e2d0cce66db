"""The inner loop: advantages, the step, and that the same step adapts while sampling and in the replay."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from probes import assert_close, finite_differences, walk
from test_returns import loop_gae, numpy_baseline

from metarl_cli.core.adapt import Data, InnerLoop, map_tasks
from metarl_cli.core.distributions import DiagonalGaussian
from metarl_cli.core.networks import Policy
from metarl_cli.core.returns import Normaliser, RunningStats
from metarl_cli.core.rollout import Spaces
from metarl_cli.core.types import Batch

K, T = 3, 5


@dataclass(frozen=True)
class LinearPolicy:
    """N(s W, 1): the inner loss is a quadratic function of W."""

    spec: Spaces

    def apply(self, params: Any, observation: jax.Array) -> DiagonalGaussian:
        mean = observation @ params["head"]
        return DiagonalGaussian(mean, jnp.zeros_like(mean))


def inner_loop(policy: Any, lr: float = 0.1) -> InnerLoop:
    return InnerLoop(lr=lr, gamma=0.9, lam=0.7, policy=policy)


def random_data(spec: Spaces, points: int, seed: int = 0) -> Data:
    """Of `[points, K, T]`; some episodes end early. Advantages and log-probabilities are just numbers."""
    rng = np.random.default_rng(seed)
    shape = (points, K, T)
    observation = rng.normal(size=(*shape, spec.observation))
    action = rng.integers(spec.action, size=shape) if spec.discrete else rng.normal(size=(*shape, spec.action))
    valid = np.arange(T) < rng.integers(1, T + 1, size=(points, K, 1))
    advantage, reward, value = rng.normal(size=(3, *shape))
    log_prob = rng.normal(-1.5, 0.3, size=shape)
    return jax.tree.map(jnp.array, Data(observation, action, advantage, reward, value, log_prob, valid))


# --- the closed form


def quadratic(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """`H`, `b` of the loss of `LinearPolicy` on `[K, T]` data.

    L(W) = -mean_t A_t log pi(a_t | s_t) = mean_t A_t |a_t - s_t W|^2 / 2 + constant, hence grad L = H W - b with
    H = mean_t A_t s_t s_t^T and b = mean_t A_t s_t a_t^T.
    """
    valid = np.asarray(data.valid)
    s, a, weight = (np.asarray(x)[valid] for x in (data.observation, data.action, data.advantage))
    return np.einsum("t,ti,tj->ij", weight, s, s) / len(s), np.einsum("t,ti,tj->ij", weight, s, a) / len(s)


@pytest.mark.parametrize("steps", [1, 3])
def test_meta_gradient_closed_form(float64, steps):
    # theta_{n+1} = theta_n - alpha (H_n theta_n - b_n), so d theta_N / d theta_0 is the product of all (I - alpha H_n), and
    #   second order: grad = (I - alpha H_0) ... (I - alpha H_{N-1}) g   with  g = H' theta_N - b',   first order: grad = g
    spec, alpha = Spaces(2, 2, False), 0.3
    inner, data = inner_loop(LinearPolicy(spec), alpha), random_data(spec, steps + 1)
    last = jax.tree.map(lambda x: x[-1], data)
    theta = start = np.array([[0.5, -1.0], [2.0, 0.3]])
    chain = np.eye(2)
    for n in range(steps):
        h, b = quadratic(jax.tree.map(lambda x, n=n: x[n], data))
        theta = theta - alpha * (h @ theta - b)
        chain = chain @ (np.eye(2) - alpha * h)
    h, b = quadratic(last)
    g = h @ theta - b

    def adapted(inner, x):
        return inner.replay({"body": {}, "head": x}, data)[-1]

    np.testing.assert_allclose(adapted(inner, jnp.array(start))["head"], theta, rtol=1e-12)
    second = jax.grad(lambda x: inner.loss(adapted(inner, x), last))(jnp.array(start))
    np.testing.assert_allclose(second, chain @ g, rtol=1e-10)
    constant = dataclasses.replace(inner, first_order=True)
    np.testing.assert_allclose(adapted(constant, jnp.array(start))["head"], theta, rtol=1e-12)
    first = jax.grad(lambda x: inner.loss(adapted(constant, x), last))(jnp.array(start))
    np.testing.assert_allclose(first, g, rtol=1e-10)
    assert np.linalg.norm(second - first) > 0.05 * np.linalg.norm(first)


# --- advantages


def random_batch(seed: int = 0, k: int = K, t: int = T) -> Batch:
    """`[K, T]` with ends of both kinds, as `rollout` gives them: steps after the first end are another episode's."""
    rng = np.random.default_rng(seed)
    terminated = rng.random((k, t)) < 0.3
    truncated = ~terminated & (np.arange(t) == t - 1)
    done = terminated | truncated
    valid = np.cumsum(done, axis=1) - done == 0
    arrays = (rng.normal(size=(k, t, 2)), rng.normal(size=(k, t)), rng.normal(size=(k, t)), terminated, truncated, valid)
    return Batch(*map(jnp.array, arrays), None, None)


NO_NORMALISER = Normaliser.create(2, observations=False, rewards=False)


def test_advantages_against_plain_python(float64):
    batch = random_batch()
    reward, valid = np.where(batch.valid, batch.reward, 0), np.asarray(batch.valid)
    done = np.asarray(batch.terminated | batch.truncated)
    returns, zeros = np.zeros((K, T)), np.zeros(T)
    for k in range(K):
        returns[k] = loop_gae(reward[k], zeros, zeros, done[k], done[k], 0.9, 1.0)
    value = numpy_baseline(np.asarray(batch.observation), np.where(valid, returns, 0), valid)
    expected = np.zeros((K, T))
    for k in range(K):
        expected[k] = loop_gae(reward[k], value[k], np.append(value[k, 1:], 0), done[k], done[k], 0.9, 0.7)
    expected = np.where(valid, (expected - expected[valid].mean()) / expected[valid].std(), 0)
    advantage = jax.jit(lambda batch, normaliser: inner_loop(None).data(batch.observation, batch, normaliser).advantage)
    actual = advantage(batch, NO_NORMALISER)
    # The conditioning of the normal equations (see test_returns.py) is felt here as well: 8 rows for 8 features.
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    # Rewards 5 times as large, and a normaliser that divides by 5.
    scaled = Normaliser(None, RunningStats(jnp.array(4.0), jnp.array(0.0), jnp.array(100.0)))
    again = advantage(batch._replace(reward=5 * batch.reward), scaled)
    np.testing.assert_allclose(again, actual, rtol=1e-6, atol=1e-6)


def test_advantages_of_single_steps():
    # Not divided by their deviation, which would make +-1 of any difference; the baseline is their mean (times 1 - 1e-5).
    reward = jnp.array([[1.0], [0.0], [0.0], [1.0]])
    yes = jnp.ones((4, 1), bool)
    batch = Batch(jnp.zeros((4, 1, 1)), yes, reward, ~yes, yes, yes, None, None)
    advantage = inner_loop(None).data(batch.observation, batch, NO_NORMALISER).advantage
    np.testing.assert_allclose(advantage, [[0.5], [-0.5], [-0.5], [0.5]], atol=1e-4)
    # A single pull is compared with nothing: its advantage is its reward.
    single = jax.tree.map(lambda x: x[:1], batch)
    np.testing.assert_array_equal(inner_loop(None).data(single.observation, single, NO_NORMALISER).advantage, [[1.0]])


def garbage(x: jax.Array, valid: jax.Array) -> jax.Array:
    """What must not matter: other numbers after the end of an episode."""
    mask = jnp.broadcast_to(valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim)), x.shape)
    if x.dtype == bool:
        return x ^ ~mask
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.where(mask, x, 1 - x)
    return jnp.where(mask, x, 1000 * jax.random.normal(jax.random.key(9), x.shape, x.dtype))


@pytest.mark.parametrize("discrete", [True, False])
def test_garbage_after_an_episode_changes_nothing(float64, discrete):
    batch = random_batch()
    assert 0.2 < batch.valid.mean() < 0.9
    noisy = jax.tree.map(lambda x: garbage(x, batch.valid), batch)._replace(valid=batch.valid)
    inner = inner_loop(Policy(Spaces(2, 2, discrete), (3,), "tanh"))
    advantage = jax.jit(lambda batch: inner.data(batch.observation, batch, NO_NORMALISER).advantage)
    np.testing.assert_allclose(advantage(noisy), advantage(batch), rtol=1e-9, atol=1e-12)
    data = random_data(Spaces(2, 2, discrete), 3)
    noise = jax.tree.map(lambda x: garbage(x, data.valid), data)._replace(valid=data.valid)
    params = inner.policy.init(jax.random.key(0))
    adapt = jax.jit(inner.replay)
    assert_close(adapt(params, noise), adapt(params, data), rtol=1e-12, atol=1e-14)


# --- one step, shared


@pytest.mark.parametrize("discrete", [True, False])
def test_step_against_finite_differences(float64, discrete):
    policy = Policy(Spaces(2, 2, discrete), (3,), "tanh")
    inner, data = inner_loop(policy, 0.3), jax.tree.map(lambda x: x[0], random_data(Spaces(2, 2, discrete), 1))
    flat, unravel = ravel_pytree(policy.init(jax.random.key(0)))

    def loss(x):  # one step after the other, as the formula says
        total = jnp.zeros(())
        for k, t in zip(*np.nonzero(data.valid), strict=True):
            log_prob = policy.apply(unravel(x), data.observation[k, t]).log_prob(data.action[k, t])
            total -= log_prob * data.advantage[k, t] / np.sum(data.valid)
        return total

    def step(theta):
        return inner.step(inner.start(theta), data, 0.5).params

    actual, moved = jax.jit(lambda x: (inner.loss(x, data), ravel_pytree(inner.step(inner.start(x), data, 0.5).params)[0]))(
        unravel(flat)
    )
    np.testing.assert_allclose(actual, jax.jit(loss)(flat), rtol=1e-12)
    # alpha = 0.3, scaled by 1/2
    np.testing.assert_allclose(moved, flat - 0.15 * finite_differences(loss, flat), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("discrete", [True, False])
def test_replay_gives_the_policy_that_acted(float64, discrete):
    """THE condition of MAML: what `live` did at each point, `step` finds again from the recorded data."""
    family = walk(discrete)
    policy = Policy(Spaces(2, 3 if discrete else 2, discrete), (4,), "tanh")
    inner, params = inner_loop(policy, 0.5), policy.init(jax.random.key(0))
    stats = RunningStats(jnp.array(10.0), jnp.array([0.3, 2.0]), jnp.array([20.0, 5.0]))
    normaliser = Normaliser(stats, RunningStats(jnp.array(10.0), jnp.array(0.0), jnp.array(40.0)))
    task = family.sample(jax.random.key(1))
    points = 3

    @jax.jit
    def live_and_replay(key, decay):
        batch, data = inner.live(params, key, family, task, normaliser, points=points, episodes=6, decay=decay)
        point = lambda i: jax.tree.map(lambda x: x[i], data)  # noqa: E731
        adapted, replayed, unmoved = inner.start(params), [], []
        for i in range(points):
            now = point(i)
            log_prob = policy.apply(adapted.params, now.observation).log_prob(now.action)
            # `adapted` replays with the full step.
            whole, last = inner.adapted(params, point(slice(0, i + 1)))
            replayed.append((log_prob, whole.log_prob(last.action)))
            unmoved.append(policy.apply(params, now.observation).log_prob(now.action))
            adapted = inner.step(adapted, now, 1.0 if i == 0 else decay)
        return batch, data, [jnp.stack(x) for x in zip(*replayed, strict=True)], jnp.stack(unmoved)

    for decay in (1.0, 0.5):
        batch, data, (stepwise, whole), unmoved = live_and_replay(jax.random.key(2), decay)
        assert data.valid.shape == (points, 6, family.horizon)
        np.testing.assert_allclose(data.observation, normaliser.observe(batch.observation), rtol=1e-12)
        np.testing.assert_allclose(stepwise, data.log_prob, rtol=1e-9, atol=1e-12)
        # Without a decay that is one and the same; with it, from the second step on it is not.
        same = points if decay == 1.0 else 2
        np.testing.assert_allclose(whole[:same], data.log_prob[:same], rtol=1e-9, atol=1e-12)
        assert np.all(np.abs(whole[same:] - data.log_prob[same:]).max((1, 2)) > 1e-3)
        # The test could not see a difference had the policy not moved.
        assert np.all(np.abs(unmoved - data.log_prob).max((1, 2))[1:] > 0.02)


def test_trials_in_one_task_are_independent_episodes():
    family, policy = walk(False), Policy(Spaces(2, 2, False), (4,), "tanh")
    params, task = policy.init(jax.random.key(0)), family.sample(jax.random.key(1))
    live = jax.jit(lambda k: inner_loop(policy).live(params, k, family, task, NO_NORMALISER, points=2, episodes=6)[0])
    batch = live(jax.random.key(2))
    starts = batch.observation[:, :, 0, 0].ravel()
    assert len(np.unique(starts)) == 12
    assert len(np.unique(batch.action[:, :, 0, 0])) == 12


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7])
def test_map_tasks_is_a_map(float64, size):
    xs = (jnp.arange(5.0), jnp.arange(10.0).reshape(5, 2))
    actual = map_tasks(lambda x: {"sum": x[0] + x[1].sum(), "outer": x[0] * x[1]}, xs, size)
    np.testing.assert_allclose(actual["sum"], np.arange(5) + np.arange(10).reshape(5, 2).sum(1))
    np.testing.assert_allclose(actual["outer"], np.arange(5)[:, None] * np.arange(10).reshape(5, 2))
