"""The two action distributions against scipy, and their Fisher matrices against the Hessian of the KL divergence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import integrate, stats

from metarl_cli.core.distributions import Categorical, DiagonalGaussian

RNG = np.random.default_rng(0)
LOGITS, OTHER_LOGITS = RNG.normal(size=(2, 4, 5)) * 2 + 7  # not normalised
MEAN, OTHER_MEAN, LOG_STD, OTHER_LOG_STD = RNG.normal(size=(4, 4, 3))
N = 200_000


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def make(kind: str, other: bool = False) -> Any:
    if kind == "categorical":
        return Categorical(jnp.array(OTHER_LOGITS if other else LOGITS))
    mean, log_std = (OTHER_MEAN, OTHER_LOG_STD) if other else (MEAN, LOG_STD)
    return DiagonalGaussian(jnp.array(mean), jnp.array(log_std))


def test_categorical_against_scipy(float64):
    distribution, p, q = make("categorical"), softmax(LOGITS), softmax(OTHER_LOGITS)
    for action in range(5):
        expected = [stats.multinomial(1, row).logpmf(np.eye(5)[action]) for row in p]
        np.testing.assert_allclose(distribution.log_prob(jnp.full(4, action)), expected, rtol=1e-9)
    np.testing.assert_allclose(distribution.entropy(), stats.entropy(p, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(distribution.kl(make("categorical", other=True)), stats.entropy(p, q, axis=-1), rtol=1e-12)
    np.testing.assert_array_equal(distribution.mode(), p.argmax(-1))


def test_gaussian_against_scipy(float64):
    distribution = make("gaussian")
    action = RNG.normal(size=(4, 3))
    normal = stats.norm(MEAN, np.exp(LOG_STD))
    np.testing.assert_allclose(distribution.log_prob(jnp.array(action)), normal.logpdf(action).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(distribution.entropy(), normal.entropy().sum(-1), rtol=1e-12)
    np.testing.assert_array_equal(distribution.mode(), MEAN)


def test_gaussian_kl_against_integration(float64):
    expected = np.zeros((4, 3))
    for i in np.ndindex(4, 3):
        p = stats.norm(MEAN[i], np.exp(LOG_STD[i]))
        q = stats.norm(OTHER_MEAN[i], np.exp(OTHER_LOG_STD[i]))
        low, high = p.interval(1 - 1e-15)
        expected[i] = integrate.quad(lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), low, high, epsabs=1e-11)[0]
    np.testing.assert_allclose(make("gaussian").kl(make("gaussian", other=True)), expected.sum(-1), rtol=1e-7)


def test_categorical_samples():
    # The standard error of a frequency is at most 0.5 / sqrt(N) = 0.0011; 20 of them: 4.5 of it.
    keys = jax.random.split(jax.random.key(0), N)
    samples = np.asarray(jax.vmap(make("categorical").sample)(keys))
    assert samples.shape == (N, 4)
    frequencies = np.stack([np.bincount(column, minlength=5) for column in samples.T]) / N
    np.testing.assert_allclose(frequencies, softmax(LOGITS), atol=0.005)


def test_gaussian_samples():
    # Standard errors: of the mean sigma / sqrt(N), of the variance sigma^2 sqrt(2 / N); 4.5 of each.
    distribution = make("gaussian")
    samples = np.asarray(jax.vmap(distribution.sample)(jax.random.split(jax.random.key(0), N)))
    std = np.exp(LOG_STD)
    np.testing.assert_allclose((samples.mean(0) - MEAN) / std, 0, atol=4.5 / np.sqrt(N))
    np.testing.assert_allclose(samples.var(0) / std**2, 1, atol=4.5 * np.sqrt(2 / N))
    z = ((samples - MEAN) / std).reshape(N, -1)
    np.testing.assert_allclose(np.corrcoef(z.T), np.eye(12), atol=4.5 / np.sqrt(N))  # independent components
    assert stats.kstest(z[:, 0], "norm").pvalue > 1e-3


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_kl_is_0_to_itself_and_positive_to_others(kind):
    distribution, other = make(kind), make(kind, other=True)
    np.testing.assert_allclose(distribution.kl(distribution), 0, atol=1e-6)
    assert np.all(np.asarray(distribution.kl(other)) > 0.01)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_fisher_is_the_hessian_of_the_kl(float64, kind):
    distribution, other = (jax.tree.map(lambda x: x[0], make(kind, other=i)) for i in (False, True))
    flat, unravel = ravel_pytree(distribution)
    hessian = jax.hessian(lambda x: distribution.kl(unravel(x)))(flat)
    products = jax.vmap(lambda v: ravel_pytree(distribution.fisher(unravel(v)))[0])(jnp.eye(flat.size))
    np.testing.assert_allclose(products, hessian, rtol=1e-10, atol=1e-12)
    assert np.abs(hessian).max() > 0.1 and other.kl(distribution) > 0
    batched = make(kind)  # and with leading axes
    np.testing.assert_allclose(
        ravel_pytree(jax.vmap(lambda d, v: d.fisher(v))(batched, make(kind, other=True)))[0],
        ravel_pytree(batched.fisher(make(kind, other=True)))[0],
        rtol=1e-12,
    )


def test_fisher_is_the_variance_of_the_score(float64):
    # Of a categorical distribution the expectation is a finite sum.
    distribution = Categorical(jnp.array(LOGITS[0]))
    score = jax.jacobian(lambda x: Categorical(x).log_prob(jnp.arange(5)))(jnp.tile(distribution.logits, (5, 1)))
    score = score[np.arange(5), np.arange(5)]  # [action, logit]
    expected = jnp.einsum("a,ai,aj->ij", jax.nn.softmax(distribution.logits), score, score)
    products = jax.vmap(lambda v: distribution.fisher(Categorical(v)).logits)(jnp.eye(5))
    np.testing.assert_allclose(products, expected, rtol=1e-10, atol=1e-14)


def test_extreme_categorical_stays_finite():
    distribution = Categorical(jnp.array([1000.0, 0.0, -1000.0]))
    assert distribution.log_prob(jnp.array(2)) == -2000
    assert distribution.entropy() == 0
    gradient = jax.grad(lambda x: Categorical(x).entropy() + Categorical(x).log_prob(jnp.array(1)))(distribution.logits)
    assert np.all(np.isfinite(gradient))


def test_narrow_gaussian_stays_finite():
    # The floor of the standard deviation is 1e-6: log_prob(mean) = -log(1e-6 sqrt(2 pi)) = 12.8966
    distribution = DiagonalGaussian(jnp.zeros(1), jnp.log(jnp.full(1, 1e-6)))
    np.testing.assert_allclose(distribution.log_prob(jnp.zeros(1)), 12.8966, rtol=1e-5)
    np.testing.assert_allclose(distribution.log_prob(jnp.full(1, 1e-6)), 12.3966, rtol=1e-5)
