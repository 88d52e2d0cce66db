"""Conjugate gradient against a direct solve; the trust region on problems with a known answer."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from metarl_cli.core.solvers import add, conjugate_gradient, dot, trust_region_step

RNG = np.random.default_rng(0)
SIZE = 7
ROOT = RNG.normal(size=(SIZE, SIZE))
MATRIX = ROOT @ ROOT.T + 0.1 * np.eye(SIZE)
PARAMS = {"a": RNG.normal(size=(2, 2)), "b": RNG.normal(size=3)}  # 7 numbers
FLAT, UNRAVEL = ravel_pytree(PARAMS)


def tree(vector):
    """7 numbers in the shape of the parameters."""
    return {"a": jnp.reshape(vector[:4], (2, 2)), "b": vector[4:]}


def flat(x):
    return jnp.concatenate([x["a"].ravel(), x["b"]])


def product(v):
    return tree(jnp.array(MATRIX) @ flat(v))


def test_vectors_are_pytrees():
    x, y = tree(jnp.arange(7.0)), tree(jnp.full(7, 2.0))
    assert dot(x, y) == 42
    np.testing.assert_array_equal(flat(add(x, y, 0.5)), np.arange(7) + 1)


def test_conjugate_gradient_against_a_direct_solve(float64):
    # n iterations are exact but for rounding, which a condition number of about 1e3 enlarges.
    b = RNG.normal(size=SIZE)
    x, residual = jax.jit(lambda b: conjugate_gradient(product, b, SIZE))(tree(jnp.array(b)))
    np.testing.assert_allclose(flat(x), np.linalg.solve(MATRIX, b), rtol=1e-8)
    np.testing.assert_allclose(flat(residual), 0, atol=1e-8)
    x, residual = jax.jit(lambda b: conjugate_gradient(product, b, 3))(tree(jnp.array(b)))
    np.testing.assert_allclose(flat(residual), b - MATRIX @ flat(x), rtol=1e-8)
    assert np.abs(flat(residual)).max() > 0.01
    batch = RNG.normal(size=(3, SIZE))
    x = jax.vmap(lambda b: flat(conjugate_gradient(product, tree(b), SIZE)[0]))(jnp.array(batch))
    np.testing.assert_allclose(x, np.linalg.solve(MATRIX, batch.T).T, rtol=1e-8)


def test_conjugate_gradient_does_not_stumble_over_a_solved_system():
    # The matrix is 2 times the identity: solved after one of the ten iterations.
    b = tree(jnp.arange(7.0))
    np.testing.assert_allclose(flat(conjugate_gradient(lambda v: add(v, v), b, 10)[0]), np.arange(7) / 2, rtol=1e-6)
    zero = tree(jnp.zeros(7))
    np.testing.assert_array_equal(flat(conjugate_gradient(product, zero, 10)[0]), 0)


def step(params, gradient, loss=lambda x: 0.0, kl=lambda x: 0.0, value=0.0, **settings):
    """A trust region step on functions of the displacement `[7]` from `params`."""

    def evaluate(new):
        x = flat(new) - flat(params)
        return jnp.asarray(loss(x), float), jnp.asarray(kl(x), float)

    settings = {"max_kl": 0.01, "damping": 0.0, "shrink": 0.8, "iterations": 2 * SIZE, "backtracks": 15} | settings
    return trust_region_step(params, jnp.asarray(value, float), gradient, product, evaluate, **settings)


def natural_step(gradient, max_kl=0.01, damping=0.0):
    """`-sqrt(2 delta / g^T F^-1 g) F^-1 g`: minimises a linear loss where `x^T F x / 2 <= delta`."""
    direction = np.linalg.solve(MATRIX + damping * np.eye(SIZE), gradient)
    return -np.sqrt(2 * max_kl / (gradient @ direction)) * direction


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_natural_step(float64, damping):
    g = RNG.normal(size=SIZE)
    expected = natural_step(g, damping=damping)
    # The divergence is a hair smaller than its quadratic model, so that rounding cannot reject the full step.
    result = step(tree(FLAT), tree(jnp.array(g)), lambda x: x @ g, lambda x: 0.499999 * x @ MATRIX @ x, damping=damping)
    assert result.accepted and result.backtracks == 0
    np.testing.assert_allclose(flat(result.params) - FLAT, expected, rtol=1e-7)
    np.testing.assert_allclose(result.improvement, -g @ expected, rtol=1e-7)
    np.testing.assert_allclose(result.kl, 0.499999 * expected @ MATRIX @ expected, rtol=1e-7)
    assert result.kl <= 0.01


def test_line_search_finds_the_first_step_that_keeps_the_bound(float64):
    # The divergence is 4 times its model: a step has to be at most half as long. 0.8^3 = 0.512, 0.8^4 = 0.4096.
    g = RNG.normal(size=SIZE)
    result = step(tree(FLAT), tree(jnp.array(g)), lambda x: x @ g, lambda x: 2 * x @ MATRIX @ x)
    assert result.accepted and result.backtracks == 4
    np.testing.assert_allclose(flat(result.params) - FLAT, 0.4096 * natural_step(g), rtol=1e-7)
    np.testing.assert_allclose(result.kl, 0.01 * 4 * 0.4096**2, rtol=1e-7)
    # One trial less than needed, and nothing is accepted.
    result = step(tree(FLAT), tree(jnp.array(g)), lambda x: x @ g, lambda x: 2 * x @ MATRIX @ x, backtracks=4)
    assert not result.accepted


def test_line_search_finds_the_first_step_on_which_the_loss_falls(float64):
    # Along the step u x_max the loss is g x_max (u - 3 u^2): it falls for u < 1/3. 0.8^4 = 0.4096, 0.8^5 = 0.32768.
    g = RNG.normal(size=SIZE)
    slope = g @ natural_step(g)  # negative
    result = step(tree(FLAT), tree(jnp.array(g)), lambda x: x @ g - 3 * (x @ g) ** 2 / slope, lambda x: 0.0)
    assert result.accepted and result.backtracks == 5
    np.testing.assert_allclose(result.improvement, -slope * (0.8**5 - 3 * 0.8**10), rtol=1e-6)


NAN = {
    "the loss only rises": ({}, 1.0, lambda x: 1 + jnp.sum(x**2), lambda x: 0.0),
    "the loss stays": ({}, 1.0, lambda x: 1.0, lambda x: 0.0),
    "the bound never holds": ({}, 0.0, lambda x: -1.0, lambda x: 0.02),
    "the loss is NaN": ({}, 0.0, lambda x: jnp.nan, lambda x: 0.0),
    "the loss is NaN from the start": ({}, jnp.nan, lambda x: -1.0, lambda x: 0.0),
    "the divergence is NaN": ({}, 0.0, lambda x: -1.0, lambda x: jnp.nan),
    "the direction is NaN": ({3: jnp.nan}, 0.0, lambda x: x[0], lambda x: 0.0),
    "the direction is infinite": ({3: jnp.inf}, 0.0, lambda x: x[0], lambda x: 0.0),
    "the gradient is 0": ({i: 0.0 for i in range(7)}, 0.0, lambda x: jnp.sum(x), lambda x: 0.0),
}


@pytest.mark.parametrize("case", NAN)
def test_a_rejected_step_leaves_the_parameters_alone(case):
    changes, value, loss, kl = NAN[case]
    gradient = jnp.array(RNG.normal(size=SIZE))
    for index, number in changes.items():
        gradient = gradient.at[index].set(number)
    params = tree(jnp.array(FLAT))
    result = jax.jit(partial(step, loss=loss, kl=kl, value=value))(params, tree(gradient))
    assert not result.accepted
    np.testing.assert_array_equal(flat(result.params), flat(params))  # bit for bit
    assert result.kl == 0 and result.improvement == 0


def test_under_vmap_one_problem_may_reject_while_another_accepts(float64):
    g = jnp.array(RNG.normal(size=(2, SIZE)))

    def one(g, sign):
        return step(tree(FLAT), tree(g), lambda x: sign * (x @ g), lambda x: 0.499999 * x @ MATRIX @ x)

    result = jax.vmap(one)(g, jnp.array([1.0, -1.0]))
    np.testing.assert_array_equal(result.accepted, [True, False])
    moved = jax.vmap(flat)(result.params) - FLAT[None]
    np.testing.assert_allclose(moved[0], natural_step(np.asarray(g[0])), rtol=1e-7)
    np.testing.assert_array_equal(moved[1], 0)
