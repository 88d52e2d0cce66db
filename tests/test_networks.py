"""Policies, and every memory of `configs/algo/memory/`: acting and training see the same numbers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import assert_close, build, walk

from metarl_cli import catalogue, config
from metarl_cli.core.distributions import Categorical, DiagonalGaussian
from metarl_cli.core.memory import Memory
from metarl_cli.core.networks import MIN_LOG_STD, Policy, RecurrentActorCritic
from metarl_cli.core.rollout import Spaces
from metarl_cli.core.types import Previous
from metarl_cli.memories.gru import GRU

MEMORIES = sorted(catalogue.groups()["algo/memory"])
INPUTS, STEPS = 3, 12
RESETS = {
    "never": [],
    "at the start": [0],
    "twice in a row": [4, 5],
    "here and there": [2, 7, 11],
    "always": list(range(STEPS)),
}


def random_like(params: Any, scale: float = 0.5) -> Any:
    """Random numbers in every place, so that none hides behind an initial 0."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(42), len(leaves))
    return jax.tree.unflatten(
        structure, [scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


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


# --- memories


@pytest.fixture(scope="module", params=MEMORIES)
def memory(request) -> Memory:
    settings: Any = config.compose(["algo=rl2", f"algo/memory={request.param}", "algo.memory.features=8"]).config.algo
    return settings.memory.build()


def prepared(memory: Memory) -> tuple[Any, Any, jax.Array]:
    params = random_like(memory.init(jax.random.key(0), INPUTS))
    x = jax.random.normal(jax.random.key(1), (STEPS, INPUTS))
    carry, _ = memory.sequence(params, memory.init_carry(), 3 * x[:5], jnp.zeros(5, bool))  # some past
    return params, carry, x


def steps(memory: Memory, params: Any, carry: Any, x: jax.Array, reset: jax.Array) -> tuple[Any, jax.Array]:
    features = []
    for now, forget in zip(x, reset, strict=True):
        carry, output = memory.step(params, memory.init_carry() if forget else carry, now)
        features.append(output)
    return carry, jnp.stack(features)


def reset_at(places: list[int]) -> jax.Array:
    return jnp.zeros(STEPS, bool).at[jnp.array(places, int)].set(True)


@pytest.mark.parametrize("resets", RESETS)
def test_sequence_is_repeated_step(float64, memory, resets):
    params, carry, x = prepared(memory)
    reset = reset_at(RESETS[resets])
    expected = steps(memory, params, carry, x, reset)
    actual = jax.jit(memory.sequence)(params, carry, x, reset)
    assert actual[1].shape == (STEPS, memory.features)
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    # A sequence may be cut in two anywhere.
    middle, first = memory.sequence(params, carry, x[:5], reset[:5])
    end, second = memory.sequence(params, middle, x[5:], reset[5:])
    assert_close((end, jnp.concatenate([first, second])), expected, rtol=1e-9, atol=1e-12)


def test_sequence_under_vmap_with_resets_of_each_its_own(float64, memory):
    params, carry, x = prepared(memory)
    reset = jnp.stack([reset_at(places) for places in RESETS.values()])
    xs = jnp.stack([x * (i + 1) for i in range(len(RESETS))])
    together = jax.vmap(memory.sequence, in_axes=(None, None, 0, 0))(params, carry, xs, reset)
    alone = [memory.sequence(params, carry, x, r) for x, r in zip(xs, reset, strict=True)]
    assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *alone), rtol=1e-9, atol=1e-12)


def test_a_reset_stops_values(memory):
    params, carry, x = prepared(memory)
    reset = reset_at([6])
    before, after = memory.sequence(params, carry, x, reset)[1], memory.sequence(params, carry, x.at[:6].set(99), reset)[1]
    np.testing.assert_array_equal(before[6:], after[6:])
    assert np.all(before[:6] != after[:6])
    fresh = memory.sequence(params, memory.init_carry(), x[6:], jnp.zeros(6, bool))[1]
    np.testing.assert_allclose(before[6:], fresh, rtol=1e-5, atol=1e-6)


def test_a_reset_stops_gradients_and_nothing_else_does(memory):
    params, carry, x = prepared(memory)

    def late(x, carry, reset):
        return jnp.sum(memory.sequence(params, carry, x, reset)[1][-1] ** 2)

    gradient, of_carry = jax.grad(late, argnums=(0, 1))(x, carry, reset_at([6]))
    np.testing.assert_array_equal(gradient[:6], 0)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), of_carry)
    assert np.all(np.any(np.asarray(gradient[6:]) != 0, axis=1))
    gradient, of_carry = jax.grad(late, argnums=(0, 1))(x, carry, reset_at([]))
    assert np.all(np.any(np.asarray(gradient) != 0, axis=1))  # all the way back
    assert any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(of_carry))


def test_every_parameter_of_a_memory_matters(memory):
    params, carry, x = prepared(memory)
    gradient = jax.grad(lambda p: jnp.sum(memory.sequence(p, carry, x, reset_at([6]))[1] ** 2))(params)
    for path, g in jax.tree.leaves_with_path(gradient):
        assert np.all(np.asarray(g) != 0), jax.tree_util.keystr(path)


def test_gru_against_flax(float64):
    # The same equations; flax has no second bias for the gates r and z, ours is added to the first.
    features, cell = 6, nn.GRUCell(6, param_dtype=float)
    params = random_like(GRU(features).init(jax.random.key(0), INPUTS))
    w, b, u, c = (params[name]["params"][part] for name in ("inputs", "recurrent") for part in ("kernel", "bias"))
    (wr, wz, wn), (ur, uz, un) = jnp.split(w, 3, axis=1), jnp.split(u, 3, axis=1)
    (br, bz, bn), (cr, cz, cn) = jnp.split(b, 3), jnp.split(c, 3)
    theirs = {
        "ir": {"kernel": wr, "bias": br + cr},
        "iz": {"kernel": wz, "bias": bz + cz},
        "in": {"kernel": wn, "bias": bn},
        "hr": {"kernel": ur},
        "hz": {"kernel": uz},
        "hn": {"kernel": un, "bias": cn},
    }
    h, x = jax.random.normal(jax.random.key(1), (features,)), jax.random.normal(jax.random.key(2), (INPUTS,))
    expected: Any = cell.apply({"params": theirs}, h, x)
    assert_close(GRU(features).step(params, h, x), expected, rtol=1e-12)


def test_gru_starts_orthogonal():
    params = GRU(6).init(jax.random.key(0), INPUTS)
    gates = jnp.split(params["recurrent"]["params"]["kernel"], 3, axis=1)
    for gate in gates:
        np.testing.assert_allclose(gate.T @ gate, np.eye(6), atol=1e-5)
    assert np.any(gates[0] != gates[1]) and np.any(gates[1] != gates[2])


# --- the network of RL^2


def test_recurrent_inputs():
    network = RecurrentActorCritic(Spaces(2, 3, True), GRU(4))
    observation = jnp.array([[7.0, 8.0], [5.0, 6.0]])
    previous = Previous(jnp.array([-1, 2]), jnp.array([0.0, -0.5]), jnp.array([1.0, 0.0]))
    # observation, one-hot action (none before the first step), reward, done
    np.testing.assert_array_equal(network.inputs(observation, previous), [[7, 8, 0, 0, 0, 0, 1], [5, 6, 0, 0, 1, -0.5, 0]])
    network = RecurrentActorCritic(Spaces(2, 2, False), GRU(4))
    previous = previous._replace(action=jnp.array([[0.0, 0.0], [0.5, -3.0]]))
    np.testing.assert_array_equal(network.inputs(observation, previous), [[7, 8, 0, 0, 0, 1], [5, 6, 0.5, -1, -0.5, 0]])


@pytest.mark.parametrize("discrete", [True, False])
def test_recurrent_sequence_is_repeated_step(float64, memory, discrete):
    network = RecurrentActorCritic(Spaces(2, 3, discrete), memory)
    params = random_like(network.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (STEPS, 2 + 3 + 2))
    carry, expected = memory.init_carry(), []
    for now in x:
        carry, *heads = network.step(params, carry, now)
        expected.append(tuple(heads))
    assert_close(network.sequence(params, x), jax.tree.map(lambda *x: jnp.stack(x), *expected), rtol=1e-9, atol=1e-12)
