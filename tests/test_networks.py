"""Policies, and the network of RL^2 around its memory: acting and training see the same numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import assert_close, build, random_like, walk

from metarl_cli.core.distributions import Categorical, DiagonalGaussian
from metarl_cli.core.networks import MIN_LOG_STD, Policy, RecurrentActorCritic
from metarl_cli.core.rollout import Spaces
from metarl_cli.core.types import Previous
from metarl_cli.memories.gru import GRU

STEPS = 12


# --- feed-forward policies


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_policy_against_numpy(float64, discrete, activation):
    policy = Policy(Spaces(2, 3, discrete), (4, 5), activation)
    params = random_like(policy.init(jax.random.key(0)))
    x = np.random.default_rng(0).normal(size=(6, 7, 2))
    output = policy.apply(params, jnp.array(x))
    function = np.tanh if activation == "tanh" else lambda x: np.maximum(x, 0)
    body, head = (jax.tree.map(np.asarray, params[name]["params"]) for name in ("body", "head"))
    for layer in (body["Dense_0"], body["Dense_1"]):
        x = function(x @ layer["kernel"] + layer["bias"])
    expected = x @ head["Dense_0"]["kernel"] + head["Dense_0"]["bias"]
    if discrete:
        assert isinstance(output, Categorical)
        np.testing.assert_allclose(output.logits, expected, rtol=1e-10)
    else:
        assert isinstance(output, DiagonalGaussian)
        np.testing.assert_allclose(output.mean, expected, rtol=1e-10)
        np.testing.assert_array_equal(output.log_std, np.broadcast_to(head["log_std"], (6, 7, 3)))


def test_standard_deviation_starts_at_1_and_has_a_floor():
    policy = Policy(Spaces(2, 3, False), (4,), "tanh")
    params = policy.init(jax.random.key(0))
    np.testing.assert_array_equal(policy.apply(params, jnp.ones(2)).log_std, 0)  # type: ignore[union-attr]
    params["head"]["params"]["log_std"] = jnp.array([-50.0, -13.0, 2.0])
    np.testing.assert_allclose(
        policy.apply(params, jnp.ones(2)).log_std,  # type: ignore[union-attr]
        [np.log(1e-6), -13, 2],
        rtol=1e-6,
    )
    assert np.log(1e-6) == pytest.approx(MIN_LOG_STD)


def test_policy_without_hidden_layers_is_linear():
    policy = Policy(Spaces(2, 3, True), (), "tanh")
    params = random_like(policy.init(jax.random.key(0)))
    x, y = jnp.array([1.0, 2.0]), jnp.array([-3.0, 0.5])
    f = lambda x: policy.apply(params, x).logits  # type: ignore[union-attr]  # noqa: E731
    np.testing.assert_allclose(f(x + y) + f(jnp.zeros(2)), f(x) + f(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algo", ["maml", "rl2"])
def test_precision_holds_for_everything(float64, algo):
    # flax's own default would leave the weights of dense layers in float32.
    state = build(algo, walk(False)).init(jax.random.key(0), walk(False))
    assert {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)} == {jnp.dtype("float64")}


# --- the network of RL^2


def test_recurrent_inputs():
    network = RecurrentActorCritic(Spaces(2, 3, True), GRU(4))
    observation = jnp.array([[7.0, 8.0], [5.0, 6.0]])
    previous = Previous(jnp.array([-1, 2]), jnp.array([0.0, -0.5]), jnp.array([1.0, 0.0]))
    # observation, one-hot action (none before the first step), reward, done
    np.testing.assert_array_equal(
        network.inputs(observation, previous, jnp.arange(2)), [[7, 8, 0, 0, 0, 0, 1], [5, 6, 0, 0, 1, -0.5, 0]]
    )
    network = RecurrentActorCritic(Spaces(2, 2, False), GRU(4))
    previous = previous._replace(action=jnp.array([[0.0, 0.0], [0.5, -3.0]]))
    np.testing.assert_array_equal(
        network.inputs(observation, previous, jnp.arange(2)), [[7, 8, 0, 0, 0, 1], [5, 6, 0.5, -1, -0.5, 0]]
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "own critic": {"critic": "separate", "widths": (5,), "sees_state": True, "length": STEPS},
    "no critic": {"critic": "none", "sees_state": True},
    "generated": {"sees_state": True, "widths": (3, 4), "embedding": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("discrete", [True, False])
def test_recurrent_sequence_is_repeated_step(float64, discrete, options):
    network = RecurrentActorCritic(Spaces(2, 3, discrete), GRU(4), **OPTIONS[options])
    params = random_like(network.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (STEPS, 2 + 3 + 2 + (network.length is not None)))
    carry, expected = network.init_carry(), []
    for now in x:
        carry, *heads = network.step(params, carry, now)
        expected.append(tuple(heads))
    expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
    assert_close(network.sequence(params, x), expected, rtol=1e-9, atol=1e-12)
    # Cut into segments, it is the same.
    assert_close(jax.jit(lambda x: network.sequence(params, x, 4))(x), expected, rtol=1e-9, atol=1e-12)


def test_first_policies_are_close_to_uniform_and_a_critic_is_a_draw_of_its_own():
    network = RecurrentActorCritic(Spaces(2, 3, True), GRU(16), critic="separate", widths=(8,), sees_state=True)
    params = network.init(jax.random.key(0))
    policy, _ = network.sequence(params, jax.random.normal(jax.random.key(1), (STEPS, 7)))
    assert isinstance(policy, Categorical) and 0.01 < np.abs(policy.logits).max() < 0.3
    assert np.all(params["memory"]["inputs"]["kernel"] != params["critic"]["inputs"]["kernel"])


@pytest.mark.parametrize("sees_state", [True, False])
def test_policy_and_value_see_the_state_only_where_they_are_told_to(sees_state):
    network = RecurrentActorCritic(Spaces(2, 3, True), GRU(4), sees_state=sees_state)
    params = random_like(network.init(jax.random.key(0)))

    def heads(state):
        policy, value = network.heads(params, [jnp.ones(4)], jnp.concatenate([state, jnp.zeros(5)]))
        return jnp.append(policy.logits, value)

    assert np.all((np.asarray(jax.jacobian(heads)(jnp.ones(2))) != 0) == sees_state)


def test_time_is_the_share_of_the_trial():
    network = RecurrentActorCritic(Spaces(1, 1, False), GRU(4), length=8)
    previous = Previous(jnp.zeros((2, 1)), jnp.ones(2), jnp.zeros(2))
    np.testing.assert_array_equal(
        network.inputs(jnp.ones((2, 1)), previous, jnp.array([0, 6])), [[1, 0, 1, 0, 0], [1, 0, 1, 0, 0.75]]
    )


def test_gradients_reach_back_within_a_segment_only(float64):
    network = RecurrentActorCritic(Spaces(1, 2, True), GRU(4))
    params = random_like(network.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (STEPS, 5))

    def slope(t, unroll):
        """Of the value at t by all inputs."""
        return np.any(jax.grad(lambda x: network.sequence(params, x, unroll)[1][t])(x) != 0, axis=1)

    now = np.arange(STEPS)
    np.testing.assert_array_equal(slope(10, None), now <= 10)
    np.testing.assert_array_equal(slope(10, 4), (now >= 8) & (now <= 10))
    np.testing.assert_array_equal(slope(3, 4), now <= 3)

    # By the parameters: each segment by itself, from the carry that the one before left as a constant.
    def by_hand(params):
        carry, total = GRU(4).init_carry(), 0.0
        for part in jnp.split(x, 3):
            carry, features = GRU(4).sequence(params["memory"], jax.lax.stop_gradient(carry), part, jnp.zeros(4, bool))
            total += jnp.sum(network.heads(params, [features], part)[1] ** 2)
        return total

    truncated = jax.grad(lambda params: jnp.sum(network.sequence(params, x, 4)[1] ** 2))(params)
    assert_close(truncated, jax.grad(by_hand)(params), rtol=1e-9, atol=1e-12)
    full = jax.grad(lambda params: jnp.sum(network.sequence(params, x)[1] ** 2))(params)
    difference = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), full["memory"], truncated["memory"])
    assert min(jax.tree.leaves(difference)) > 1e-3
    whole = jax.grad(lambda params: jnp.sum(network.sequence(params, x, STEPS)[1] ** 2))(params)
    assert_close(whole, full, rtol=1e-9, atol=1e-12)


def test_a_critic_of_its_own_shares_nothing(float64):
    x = jax.random.normal(jax.random.key(1), (STEPS, 7))

    def touched(critic, which):
        network = RecurrentActorCritic(Spaces(2, 3, True), GRU(4), critic=critic)
        params = random_like(network.init(jax.random.key(0)))
        gradient = jax.grad(lambda params: jnp.sum(jax.tree.leaves(network.sequence(params, x)[which])[0] ** 2))(params)
        return {name for name, g in gradient.items() if any(np.any(leaf != 0) for leaf in jax.tree.leaves(g))}

    assert (touched("separate", 0), touched("separate", 1)) == ({"memory", "policy"}, {"critic", "value"})
    assert (touched("shared", 0), touched("shared", 1)) == ({"memory", "policy"}, {"memory", "value"})
    assert (touched("none", 0), touched("none", 1)) == ({"memory", "policy"}, set())


@pytest.mark.parametrize("discrete", [True, False])
def test_generated_policy_starts_as_a_policy_of_its_own(discrete):
    """Bias-HyperInit (Beck et al. 2022): whatever the memory says, the weights are an initialisation of the policy."""
    network = RecurrentActorCritic(Spaces(2, 3, discrete), GRU(4), sees_state=True, widths=(32, 32), embedding=25)
    actor: Any = network.actor
    params = network.init(jax.random.key(0))["policy"]
    key_actor, _ = jax.random.split(jax.random.split(jax.random.key(0), 4)[1])
    expected = actor.actor.init(key_actor, jnp.zeros(2))
    for features in (jnp.zeros(4), jnp.ones(4), 100 * jax.random.normal(jax.random.key(3), (4,))):
        jax.tree.map(np.testing.assert_array_equal, actor.generate(params, features), expected)
    kernel = expected["params"]["MLP_0"]["Dense_1"]["kernel"]  # Xavier: uniform on +-sqrt(6 / 64)
    assert np.abs(kernel).max() < np.sqrt(6 / 64) and np.std(kernel) == pytest.approx(np.sqrt(2 / 64), rel=0.1)
    # Other weights for other features, as soon as the last layer has learned anything.
    params["weights"]["kernel"] += 0.1
    first, second = (actor.generate(params, x) for x in (jnp.ones(4), -jnp.ones(4)))
    assert all(np.all(x != y) for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
