"""Learned rules of the inner step: where they are gradient descent, their meta-gradients, and what they look at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from probes import assert_close, build, eval_settings, finite_differences, update, walk
from test_maml import made_up

from metarl_cli.core import rules
from metarl_cli.core.errors import ConfigError

TINY: dict[str, Any] = {"hidden": [3], "meta_batch": 3, "episodes": 2, "inner_steps": 2, "inner_lr": 0.1, "rule_units": 4}
LEARNED = ("meta_lstm", "learned_optimizer")


def learner_of(algo: str, discrete: bool = True, **settings: Any) -> Any:
    given = TINY | settings
    if algo == "maml":
        given.pop("rule_units")
    return build(algo, walk(discrete), **given)


def point(data: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], data)


def with_gates(params: Any, forget: float, enter: float) -> Any:
    """The gates before their sigmoid, whatever the network looks at."""
    layer = params["rule"]["weights"]["params"]["Dense_0"]
    fixed = {"kernel": jnp.zeros_like(layer["kernel"]), "bias": jnp.array([forget, enter])}
    weights = params["rule"]["weights"]["params"] | {"Dense_0": fixed}
    return params | {"rule": params["rule"] | {"weights": {"params": weights}}}


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])
def test_with_fixed_gates_it_is_the_inner_step_of_maml(float64, discrete):
    """sigmoid(60) is 1, 2 alpha sigmoid(0) is alpha: equal to the last bit, and so is the meta-gradient to rounding."""
    lstm, maml = learner_of("meta_lstm", discrete), learner_of("maml", discrete)
    state, data = made_up(lstm)
    params, task = with_gates(state.params, 60 - rules.OPEN, 0.0), point(data, 0)
    plain = {group: params[group] for group in ("body", "head")}
    for x, y in zip(lstm.inner.replay(params, task), maml.inner.replay(plain, task), strict=True):
        assert_close({group: x[group] for group in plain}, y, rtol=0, atol=0)
    assert np.any(ravel_pytree(maml.inner.replay(plain, task)[-1])[0] != ravel_pytree(plain)[0])
    gradient, expected = jax.grad(lstm.task_loss)(params, task), jax.grad(maml.task_loss)(plain, task)
    assert_close({group: gradient[group] for group in plain}, expected, rtol=1e-8, atol=1e-12)


def test_what_the_gates_do(float64):
    """f theta - i grad L with f = sigmoid(6 - 5), i = 2 alpha sigmoid(1); and a test-time factor on alpha."""
    learner = learner_of("meta_lstm")
    state, data = made_up(learner)
    params, first = with_gates(state.params, -5.0, 1.0), point(point(data, 0), 0)
    start = learner.inner.start(params)
    gradient = jax.grad(learner.inner.loss)(params, first)
    for scale in (1.0, 0.5):
        new = learner.inner.step(start, first, scale).params
        for group in ("body", "head"):
            expected = jax.tree.map(
                lambda p, g, s=scale: sigmoid(1) * p - s * 2 * 0.1 * sigmoid(1) * g, params[group], gradient[group]
            )
            assert_close(new[group], expected, rtol=1e-12)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def lstm(params: Any, carry: Any, x: Any) -> Any:
    """Hochreiter and Schmidhuber 1997 with forget gates, written out: `(c, h)`, the output is h."""
    c, h = carry

    def gate(name):
        return x @ params[f"i{name}"]["kernel"] + h @ params[f"h{name}"]["kernel"] + params[f"h{name}"]["bias"]

    c = sigmoid(gate("f")) * c + sigmoid(gate("i")) * np.tanh(gate("g"))
    return c, sigmoid(gate("o")) * np.tanh(c)


@pytest.mark.parametrize("algo", LEARNED)
def test_rules_remember(float64, algo):
    """Three steps of one number against the networks written out: memory and gates go from step to step."""
    rule = learner_of(algo).inner.rule
    params = jax.tree.map(lambda x: np.asarray(1.5 * x + 0.2), rule.init(jax.random.key(0)))
    weights, moving, lr = params["weights"]["params"], {"w": jnp.array([0.7])}, {"w": jnp.array([0.1])}
    memory, theta, gates = rule.start(params, moving), 0.7, np.ones(2)
    carries = [tuple(layer) for layer in params["start"]]
    for gradient, loss in ((2.0, -1.0), (-0.3, 0.5), (0.004, 3.0)):
        moving, memory = rule.step(params, memory, moving, {"w": jnp.array([gradient])}, jnp.array(loss), lr)
        seen = np.asarray(rules.preprocess(jnp.array([gradient, loss])))
        x = seen.ravel() if algo == "meta_lstm" else seen[0]
        for i, carry in enumerate(carries):
            carries[i] = lstm(weights[f"OptimizedLSTMCell_{i}"], carry, x)
            x = carries[i][1]
        if algo == "meta_lstm":
            x = np.concatenate([x, [theta], gates])
        z = x @ weights["Dense_0"]["kernel"] + weights["Dense_0"]["bias"]
        if algo == "meta_lstm":
            gates = np.array([sigmoid(z[0] + rules.OPEN), 2 * sigmoid(z[1])])
            theta = gates[0] * theta - 0.1 * gates[1] * gradient
        else:
            theta -= 0.1 * z[0]
        np.testing.assert_allclose(moving["w"], theta, rtol=1e-10)


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])
@pytest.mark.parametrize("algo", LEARNED)
def test_meta_gradient_against_finite_differences(float64, monkeypatch, algo, discrete):
    """What the rule looks at is held: nothing is differentiated through it. Every meta-parameter has a gradient."""
    learner = learner_of(algo, discrete, inner_lr=0.05)
    state, data = made_up(learner)
    task = point(data, 0)
    seen: list[Any] = []
    real = rules.preprocess

    def record(x):
        seen.append(real(x))
        return seen[-1]

    monkeypatch.setattr(rules, "preprocess", record)
    learner.task_loss(state.params, task)
    held = [np.asarray(x) for x in seen]
    assert len(held) == 2 * (1 + (algo == "meta_lstm"))
    gradient, unravel = ravel_pytree(jax.grad(learner.task_loss)(state.params, task))
    flat, unravel = ravel_pytree(state.params)

    def loss(x):
        queue = iter(held)
        monkeypatch.setattr(rules, "preprocess", lambda _: jnp.asarray(next(queue)))
        return learner.task_loss(unravel(x), task)

    expected = finite_differences(loss, flat)
    size = np.abs(expected).max()
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7 * size)
    for path, leaf in jax.tree.leaves_with_path(unravel(gradient)["rule"]):
        assert np.all(np.abs(leaf).max(0) > 0), jax.tree_util.keystr(path)


def test_the_step_of_a_learned_optimizer_is_its_output_alone(float64):
    """A gradient a thousand times as large changes what the network sees by log(1000) / 10, not the step a thousandfold."""
    learner = learner_of("learned_optimizer")
    state, data = made_up(learner)
    inner, moving = learner.inner, {group: state.params[group] for group in ("body", "head")}
    gradient = jax.grad(lambda m: inner.loss(state.params | m, point(point(data, 0), 0)))(moving)
    lr, rule = jax.tree.map(lambda x: jnp.full_like(x, 0.1), moving), state.params["rule"]
    sizes = []
    for factor in (1.0, 1e3):
        scaled = jax.tree.map(lambda g, f=factor: f * g, gradient)
        new, _ = inner.rule.step(rule, inner.rule.start(rule, moving), moving, scaled, jnp.zeros(()), lr)
        sizes.append(optax.tree.norm(jax.tree.map(jnp.subtract, new, moving)))
    assert 0.2 < sizes[1] / sizes[0] < 5


def test_preprocessing(float64):
    x = jnp.array([0.0, 1.0, -np.e, np.exp(-10), -np.exp(-12), 1e-30])
    expected = [[-1, 0], [0, 1], [0.1, -1], [-1, 1], [-1, -np.exp(-2)], [-1, np.exp(10) * 1e-30]]
    np.testing.assert_allclose(rules.preprocess(x), expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(jax.jacobian(rules.preprocess)(x), 0)


@pytest.mark.parametrize("algo", LEARNED)
def test_more_steps_than_in_training(algo):
    learner, family = learner_of(algo), walk(True)
    state = jax.jit(lambda key: learner.init(key, family))(jax.random.key(0))
    state, _ = update(learner, state, jax.random.key(1), family)
    plan = learner.plan(family, eval_settings(adapt__steps=6, adapt__episodes=3))
    trial = jax.jit(lambda key, task: learner.trial(state, key, family, task, plan))(
        jax.random.key(2), family.sample(jax.random.key(3))
    )
    assert trial.returns.shape == (7, 3) and np.all(np.isfinite(trial.returns))


def test_computing_steps_again_changes_nothing(float64):
    learner = learner_of("meta_lstm", inner_steps=3)
    again = replace(learner, inner=replace(learner.inner, remat=True))
    state, data = made_up(learner)
    one, two = (jax.jit(lambda d, x=x: x.gradient(x.task_loss, state.params, d))(data) for x in (learner, again))
    assert_close(two, one, rtol=1e-9, atol=1e-13)


def test_every_outer_optimiser_trains_a_rule():
    """TRPO too: the Fisher matrix reaches through the rule."""
    for settings in ({"outer": "trpo"}, {"outer": "vpg"}):
        learner = learner_of("meta_lstm", **settings)
        state, data = made_up(learner)
        params, _, metrics = jax.jit(lambda s, d, x=learner: x.improve(s, None, d))(state, data)
        assert metrics["grad_norm"] > 0
        moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), params["rule"], state.params["rule"])
        assert settings["outer"] == "trpo" or all(jax.tree.leaves(moved))
        assert settings["outer"] != "trpo" or metrics["accepted"] in (0, 1)


def test_reptile_refuses_what_would_never_move():
    with pytest.raises(ConfigError, match=r"algo\.inner_optimizer="):
        build("reptile", walk(True), inner_optimizer="meta_lstm")
