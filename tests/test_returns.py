"""Returns, advantages, the linear baseline and running statistics, against hand-derived numbers and plain numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarl_cli.core.returns import (
    Normaliser,
    RunningStats,
    discounted,
    episode_returns,
    gae,
    linear_baseline,
    masked_mean,
    standardise,
)
from metarl_cli.core.types import Batch

RNG = np.random.default_rng(0)


def batch_of(observation: Any, reward: Any, valid: Any) -> Batch:
    never = jnp.zeros(reward.shape, bool)
    return Batch(jnp.array(observation), never, jnp.array(reward), never, never, jnp.array(valid), None, None)


def loop_gae(reward, value, next_value, terminated, done, gamma, lam):
    """Equation 16 as it is written, one `[T]` sequence: sums of delta's up to the end of the episode."""
    steps = len(reward)
    delta = [r + (0 if end else gamma * v2) - v for r, v, v2, end in zip(reward, value, next_value, terminated, strict=True)]
    advantage = np.zeros(steps)
    for t in range(steps):
        for later in range(t, steps):
            advantage[t] += (gamma * lam) ** (later - t) * delta[later]
            if done[later]:
                break
    return advantage


def test_gae_hand_derived():
    # gamma = lambda = 1/2. Step 1 terminates; step 3 is truncated, its next value 4 is that of the final observation.
    #   delta_0 = 1 + 1/2 * 1 - 1 = 1/2        A_0 = 1/2 + 1/4 * A_1 = 3/4
    #   delta_1 = 2 + 0       - 1 = 1          A_1 = delta_1         = 1      (whatever the next value 9 says)
    #   delta_2 = 3 + 1/2 * 3 - 1 = 7/2        A_2 = 7/2 + 1/4 * A_3 = 17/4
    #   delta_3 = 4 + 1/2 * 4 - 3 = 3          A_3 = delta_3         = 3      (bootstraps, but reaches no further)
    #   delta_4 = 5 + 1/2 * 6 - 2 = 6          A_4 = delta_4         = 6
    reward = jnp.array([1.0, 2, 3, 4, 5])
    value = jnp.array([1.0, 1, 1, 3, 2])
    next_value = jnp.array([1.0, 9, 3, 4, 6])
    terminated = jnp.array([False, True, False, False, False])
    done = jnp.array([False, True, False, True, False])
    advantage = gae(reward, value, next_value, terminated, done, 0.5, 0.5)
    np.testing.assert_array_equal(advantage, [0.75, 1, 4.25, 3, 6])  # all are sums of powers of two: exact
    # With no cut at all, as inside a trial of RL^2: delta_1 = 2 + 1/2 * 9 - 1 = 11/2, and everything reaches on.
    #   A_3 = 3 + 6/4 = 9/2,  A_2 = 7/2 + 9/8 = 37/8,  A_1 = 11/2 + 37/32 = 213/32,  A_0 = 1/2 + 213/128 = 277/128
    never = jnp.zeros(5, bool)
    np.testing.assert_array_equal(
        gae(reward, value, next_value, never, never, 0.5, 0.5), [277 / 128, 213 / 32, 37 / 8, 9 / 2, 6]
    )


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.7), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_gae_against_a_loop(float64, gamma, lam):
    shape = (2, 3, 11)
    reward, value, next_value = RNG.normal(size=(3, *shape))
    terminated = RNG.random(shape) < 0.2
    done = terminated | (RNG.random(shape) < 0.2)
    arrays: Any = map(jnp.array, (reward, value, next_value, terminated, done))
    actual = gae(*arrays, gamma, lam)
    for i in np.ndindex(shape[:-1]):
        expected = loop_gae(reward[i], value[i], next_value[i], terminated[i], done[i], gamma, lam)
        np.testing.assert_allclose(actual[i], expected, rtol=1e-12, atol=1e-12)


def test_gae_with_lambda_1_is_the_return_minus_the_value(float64):
    reward, value, end_value = jnp.array(RNG.normal(size=7)), jnp.array(RNG.normal(size=7)), 0.3
    next_value = jnp.append(value[1:], end_value)  # values of one episode are consistent: they telescope
    never = jnp.zeros(7, bool)
    returns = [sum(0.9**i * r for i, r in enumerate(reward[t:])) + 0.9 ** (7 - t) * end_value for t in range(7)]
    np.testing.assert_allclose(
        gae(reward, value, next_value, never, never, 0.9, 1.0), jnp.array(returns) - value, rtol=1e-12
    )


def test_discounted_takes_a_decay_per_step():
    # y_2 = 4,  y_1 = 2 + 0 * 4 = 2,  y_0 = 1 + 1/2 * 2 = 2; the decay of the last step meets y_3 = 0.
    y = discounted(jnp.array([[1.0, 2, 4]]), jnp.array([[0.5, 0, 0.9]]))
    np.testing.assert_array_equal(y, [[2, 2, 4]])


def test_means_run_over_the_mask():
    x, mask = jnp.array([[1.0, 2, 1e30], [3, -1e30, 6]]), jnp.array([[True, True, False], [True, False, True]])
    assert masked_mean(x, mask) == 3
    assert masked_mean(x, jnp.zeros_like(mask)) == 0
    # 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 7/2
    expected = np.array([[-2, -1, 0], [0, 0, 3]]) / np.sqrt(3.5)
    np.testing.assert_allclose(standardise(x, mask), expected, rtol=1e-6)
    np.testing.assert_array_equal(standardise(jnp.full((2, 3), 5.0), mask), 0)
    np.testing.assert_array_equal(episode_returns(batch_of(x[..., None], x, mask)), [3, 9])


def numpy_baseline(observation, target, valid):
    """Ridge regression with weight 1e-5 per sample, as a least-squares problem with one more row per feature."""
    s = np.clip(observation, -10, 10)
    t = np.broadcast_to(np.arange(target.shape[1])[:, None] / 100, (*target.shape, 1))
    features = np.concatenate([s, s**2, t, t**2, t**3, np.ones_like(t)], axis=-1)
    rows, size = features[valid], features.shape[-1]
    ridge = np.sqrt(1e-5 * valid.sum()) * np.eye(size)
    weights = np.linalg.lstsq(np.vstack([rows, ridge]), np.append(target[valid], np.zeros(size)))[0]
    return features @ weights


def test_linear_baseline_against_lstsq(float64):
    observation = RNG.normal(scale=4, size=(5, 30, 2))  # some beyond the clip at 10
    target = RNG.normal(size=(5, 30))
    valid = np.arange(30) < np.array([30, 7, 19, 30, 1])[:, None]
    target[~valid] = 0  # as `InnerLoop.advantage` has it
    actual = linear_baseline(jnp.array(observation), jnp.array(target), jnp.array(valid))
    # The normal equations square the condition number, about 1e7 here: 1e-16 * 1e7 and a margin.
    np.testing.assert_allclose(actual, numpy_baseline(observation, target, valid), rtol=1e-7, atol=1e-7)
    observation[~valid] = 1e6
    garbage = linear_baseline(jnp.array(observation), jnp.array(target), jnp.array(valid))
    np.testing.assert_allclose(garbage[valid], actual[valid], rtol=1e-12)


def test_linear_baseline_in_float32_explains_what_is_linear_in_its_features():
    observation = RNG.uniform(-1, 1, size=(20, 100, 2))
    time = np.arange(100) / 100
    target = 2 * observation[..., 0] - observation[..., 1] ** 2 - 40 * (1 - time)
    valid = jnp.ones((20, 100), bool)
    error = linear_baseline(jnp.array(observation), jnp.array(target), valid) - target
    # The ridge leaves a bias: 1e-5 |w| / (smallest eigenvalue of the Gram matrix, about 1e-3), 0.4 at the most.
    assert np.abs(error).mean() < 0.1
    assert np.abs(error).mean() < 0.01 * target.std()


def test_running_statistics_against_numpy():
    stats = RunningStats.zeros((3,))
    np.testing.assert_array_equal(stats.std, 1)
    seen = []
    for size in (4, 1, 6):
        x, mask = RNG.normal(loc=[5, -100, 0], scale=[1, 0.5, 10], size=(size, 5, 3)), RNG.random((size, 5)) < 0.6
        stats = stats.update(jnp.array(x, jnp.float32), jnp.array(mask))
        seen.append(x[mask])
    nothing = stats.update(jnp.full((2, 5, 3), 1e9), jnp.zeros((2, 5), bool))
    everything = np.concatenate(seen)
    for result in (stats, nothing):
        assert result.n == len(everything)
        np.testing.assert_allclose(result.mean, everything.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result.std, everything.std(0), rtol=1e-5)


def test_normaliser(float64):
    gamma, normaliser = 0.8, Normaliser.create(2, observations=True, rewards=True)
    raw = RNG.normal(size=(4, 2))
    np.testing.assert_array_equal(normaliser.observe(jnp.array(raw)), raw)  # nothing known yet
    np.testing.assert_array_equal(normaliser.scale(jnp.array(raw[0])), raw[0])
    observations, so_far = [], []
    for _ in range(3):
        observation, reward = RNG.normal(3, 2, size=(4, 6, 2)), RNG.normal(1, 2, size=(4, 6))
        length = RNG.integers(1, 7, size=4)
        valid = np.arange(6) < length[:, None]
        normaliser = normaliser.update(batch_of(observation, reward, valid), gamma)
        observations.append(observation[valid])
        for k in range(4):
            total = 0.0
            for t in range(length[k]):
                total = gamma * total + reward[k, t]
                so_far.append(total)
    mean, std = np.concatenate(observations).mean(0), np.concatenate(observations).std(0)
    np.testing.assert_allclose(normaliser.observe(jnp.array(raw)), (raw - mean) / std, rtol=1e-6)
    np.testing.assert_allclose(normaliser.observe(jnp.array(mean + 100 * std)), [10, 10])
    np.testing.assert_allclose(normaliser.scale(jnp.array(raw)), raw / np.std(so_far), rtol=1e-6)  # scaled, not centred


def test_normaliser_switched_off():
    normaliser = Normaliser.create(2, observations=False, rewards=False)
    assert jax.tree.leaves(normaliser) == []
    x = jnp.array(RNG.normal(size=(4, 2)), jnp.float32)
    normaliser = normaliser.update(batch_of(x[None], x[None, :, 0], jnp.ones((1, 4), bool)), 0.9)
    np.testing.assert_array_equal(normaliser.observe(x), x)
    np.testing.assert_array_equal(normaliser.scale(x), x)


def test_standardising_equal_values_has_a_derivative():
    """Of a square root at 0: meta-gradients go through it, where all rewards of a batch are the same."""
    slope = jax.grad(lambda scale: jnp.sum(standardise(scale * jnp.ones(4), jnp.ones(4, bool)) ** 2))(2.0)
    assert jnp.isfinite(slope)
