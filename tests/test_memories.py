"""Every memory of `configs/algo/memory/`: `sequence` is repeated `step`, and nothing gets through a reset."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import assert_close, random_like
from scipy.linalg import expm

from metarl_cli import catalogue, config
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.memory import Memory, linear_recurrence
from metarl_cli.core.networks import Gates, orthogonal
from metarl_cli.memories.gru import GRU
from metarl_cli.memories.lru import LRU
from metarl_cli.memories.lstm import LSTM
from metarl_cli.memories.s5 import S5, hippo
from metarl_cli.memories.snail import SNAIL
from metarl_cli.memories.transformer import Transformer

INPUTS, STEPS, PAST = 3, 12, 5
RESETS = {
    "never": [],
    "at the start": [0],
    "twice in a row": [4, 5],
    "here and there": [2, 7, 11],
    "always": list(range(STEPS)),
}
# Values that make it quick, for whatever memory has the key.
SMALL = {"features": 8, "state": 5, "layers": 2, "heads": 2, "filters": 4, "keys": 3}
# Every file as it is, and switches that take another way through the code.
VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in sorted(catalogue.groups()["algo/memory"])]
VARIANTS += [
    ("gru", {"layer_norm": "true", "weight_norm": "true", "activation": "relu"}),
    ("lstm", {"layer_norm": "true", "weight_norm": "true"}),
    ("transformer", {"context": 3}),
    ("snail", {"context": 3}),
]


def build(name: str, length: int = STEPS + PAST, **settings: Any) -> Any:
    known = catalogue.defaults({"algo": "rl2", "algo/memory": name})
    settings = {key: value for key, value in SMALL.items() if f"algo.memory.{key}" in known} | settings
    lines = [f"algo.memory.{key}={value}" for key, value in settings.items()]
    algo: Any = config.compose(["algo=rl2", f"algo/memory={name}", *lines]).config.algo
    return algo.memory.build(length)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: "-".join([v[0], *v[1]]))
def memory(request) -> Memory:
    return build(request.param[0], **request.param[1])


@partial(jax.jit, static_argnames="memory")
def sequence(memory: Memory, params: Any, carry: Any, x: jax.Array, reset: jax.Array) -> tuple[Any, jax.Array]:
    return memory.sequence(params, carry, x, reset)


@partial(jax.jit, static_argnames="memory")
def repeated_step(memory: Memory, params: Any, carry: Any, x: jax.Array, reset: jax.Array) -> tuple[Any, jax.Array]:
    def step(carry, now):
        x, reset = now
        carry = jax.tree.map(lambda start, x: jnp.where(reset, start, x), memory.init_carry(), carry)
        return memory.step(params, carry, x)

    return jax.lax.scan(step, carry, (x, reset))


@cache
def prepared(memory: Memory) -> tuple[Any, Any, jax.Array]:
    params = random_like(jax.jit(lambda key: memory.init(key, INPUTS))(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (STEPS, INPUTS))
    carry, _ = sequence(memory, params, memory.init_carry(), 3 * x[:PAST], jnp.zeros(PAST, bool))  # some past
    return params, carry, x


def reset_at(places: list[int]) -> jax.Array:
    return jnp.zeros(STEPS, bool).at[jnp.array(places, int)].set(True)


def bounded(memory: Memory) -> bool:
    """Whether it sees less than the whole trial."""
    return getattr(memory, "context", STEPS) < STEPS


@pytest.fixture(autouse=True)
def everywhere(float64) -> None:
    """So that all tests share the compiled programs."""


# --- all of them


def test_sequence_is_repeated_step(memory):
    params, carry, x = prepared(memory)
    for places in RESETS.values():
        reset = reset_at(places)
        expected = repeated_step(memory, params, carry, x, reset)
        actual = sequence(memory, params, carry, x, reset)
        assert actual[1].shape == (STEPS, memory.features)
        assert_close(actual, expected, rtol=1e-9, atol=1e-11)
        # A sequence may be cut in two anywhere.
        middle, first = sequence(memory, params, carry, x[:5], reset[:5])
        end, second = sequence(memory, params, middle, x[5:], reset[5:])
        assert_close((end, jnp.concatenate([first, second])), expected, rtol=1e-9, atol=1e-11)


def test_a_trial_is_a_sequence_from_its_start(memory):
    params, _, x = prepared(memory)
    expected = sequence(memory, params, memory.init_carry(), x, reset_at([]))[1]
    assert_close(jax.jit(memory.trial)(params, x), expected, rtol=1e-9, atol=1e-11)
    slopes = [
        jax.jit(jax.grad(lambda p, f=f: jnp.sum(f(p) ** 2)))(params)
        for f in (lambda p: memory.trial(p, x), lambda p: memory.sequence(p, memory.init_carry(), x, reset_at([]))[1])
    ]
    assert_close(*slopes, rtol=1e-8, atol=1e-10)


def test_the_past_matters(memory):
    params, carry, x = prepared(memory)
    reset = reset_at([])
    with_past = sequence(memory, params, carry, x, reset)[1]
    without = sequence(memory, params, memory.init_carry(), x, reset)[1]
    assert np.all(np.any(np.abs(with_past - without)[:2] > 1e-3, axis=1))


def test_sequence_under_vmap_with_resets_of_each_its_own(memory):
    params, carry, x = prepared(memory)
    reset = jnp.stack([reset_at(places) for places in RESETS.values()])
    xs = jnp.stack([x * (i + 1) for i in range(len(RESETS))])
    together = jax.jit(jax.vmap(memory.sequence, in_axes=(None, None, 0, 0)))(params, carry, xs, reset)
    alone = [sequence(memory, params, carry, x, r) for x, r in zip(xs, reset, strict=True)]
    assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *alone), rtol=1e-9, atol=1e-11)


def test_a_reset_stops_values(memory):
    params, carry, x = prepared(memory)
    reset = reset_at([6])
    before, after = sequence(memory, params, carry, x, reset)[1], sequence(memory, params, carry, x.at[:6].set(99), reset)[1]
    np.testing.assert_array_equal(before[6:], after[6:])
    assert np.all(np.any(before[:6] != after[:6], axis=1))
    huge = jax.tree.map(lambda x: jnp.full_like(x, 1000), carry)
    end, features = sequence(memory, params, huge, x, reset_at([0]))
    fresh_end, fresh = sequence(memory, params, memory.init_carry(), x, reset_at([]))
    assert_close((end, features), (fresh_end, fresh), rtol=1e-4, atol=1e-5)


def test_a_reset_stops_gradients_and_nothing_else_does(memory):
    params, carry, x = prepared(memory)

    @jax.jit
    def slopes(reset):
        def late(x, carry):
            return jnp.sum(memory.sequence(params, carry, x, reset)[1][-1] ** 2)

        gradient, of_carry = jax.grad(late, argnums=(0, 1), allow_int=True)(x, carry)
        return gradient, [g for g in jax.tree.leaves(of_carry) if g.dtype != jax.dtypes.float0]

    gradient, of_carry = slopes(reset_at([6]))
    np.testing.assert_array_equal(gradient[:6], 0)
    assert all(np.all(np.asarray(g) == 0) for g in of_carry)
    gradient, of_carry = slopes(reset_at([0]))
    assert all(np.all(np.asarray(g) == 0) for g in of_carry)
    if not bounded(memory):  # all the way back
        assert np.all(np.any(np.asarray(gradient) != 0, axis=1))
        assert any(np.any(np.asarray(g) != 0) for g in slopes(reset_at([]))[1])


def test_every_parameter_of_a_memory_matters(memory):
    params = prepared(memory)[0]
    x = jax.random.normal(jax.random.key(2), (8, PAST + STEPS, INPUTS))

    @jax.jit
    @jax.grad
    def slope(params):
        return jnp.sum(jax.vmap(lambda x: memory.trial(params, x) ** 2)(x))

    dead = 0.8 if isinstance(memory, Transformer) or getattr(memory, "activation", None) == "relu" else 0  # of ReLUs
    for path, g in jax.tree.leaves_with_path(slope(params)):
        assert np.mean(np.asarray(g) == 0) <= dead, jax.tree_util.keystr(path)


# --- building blocks


@pytest.mark.parametrize("dtype", [float, complex])
def test_associative_scan_is_the_plain_recurrence(dtype):
    """Values and derivatives, at lengths that are powers of two and that are not."""

    def numbers(seed, *shape):
        parts = jax.random.normal(jax.random.key(seed), (2, *shape))
        return 0.7 * (parts[0] + 1j * parts[1]) if dtype is complex else 0.7 * parts[0]

    def plain(a, b, h, reset):
        def step(h, now):
            a, b, reset = now
            h = a * jnp.where(reset, 0, h) + b
            return h, h

        return jax.lax.scan(step, h, (a, b, reset))[1]

    def real(f):
        return lambda *x: jnp.sum(jnp.abs(f(*x) - 0.3) ** 2)

    for length, places in ((1, []), (1, [0]), (7, [3]), (8, []), (12, [0, 5, 6])):
        a, b, h = numbers(0, length, 3), numbers(1, length, 3), numbers(2, 3)
        reset = jnp.zeros(length, bool).at[jnp.array(places, int)].set(True)
        assert_close(linear_recurrence(a, b, h, reset), plain(a, b, h, reset), rtol=1e-10, atol=1e-12)
        slopes = [jax.jit(jax.grad(real(f), argnums=(0, 1, 2)))(a, b, h, reset) for f in (linear_recurrence, plain)]
        assert_close(*slopes, rtol=1e-9, atol=1e-11)


def test_orthogonal():
    draws = jax.vmap(lambda key: orthogonal(key, 7))(jax.random.split(jax.random.key(0), 2000))
    np.testing.assert_allclose(jnp.einsum("bij,bik->bjk", draws, draws), np.broadcast_to(np.eye(7), draws.shape), atol=1e-5)
    # Uniform over the group: each entry has mean 0 and variance 1/7; the determinant takes both signs.
    np.testing.assert_allclose(draws.mean(0), 0, atol=5 / np.sqrt(7 * 2000))
    np.testing.assert_allclose(jnp.mean(draws**2, 0), 1 / 7, atol=0.03)
    assert abs(np.mean(np.linalg.det(draws) > 0) - 0.5) < 0.06


def test_gates_start_orthogonal_or_xavier():
    gates = Gates(3, 6, "orthogonal").init(jax.random.key(0), 6)
    parts = jnp.split(gates["kernel"], 3, axis=1)
    for part in parts:
        np.testing.assert_allclose(part.T @ part, np.eye(6), atol=1e-5)
    assert np.any(parts[0] != parts[1]) and np.any(parts[1] != parts[2])
    kernel = Gates(2, 100, "xavier").init(jax.random.key(0), 20)["kernel"]  # each gate by itself: 20 inputs, 100 units
    assert np.abs(kernel).max() < np.sqrt(6 / 120) and np.std(kernel) == pytest.approx(np.sqrt(2 / 120), rel=0.05)


def test_normalised_gates():
    x = jax.random.normal(jax.random.key(1), (INPUTS,))
    gates = Gates(2, 5, "xavier", layer_norm=True, weight_norm=True)
    params = gates.init(jax.random.key(0), INPUTS)
    weights = gates.weights(params | {"kernel": 3 * params["kernel"], "length": jnp.arange(1.0, 11)})
    np.testing.assert_allclose(np.linalg.norm(weights["kernel"], axis=0), np.arange(1, 11))
    y = (x @ weights["kernel"]).reshape(2, 5)
    expected = (y - y.mean(1, keepdims=True)) / y.std(1, keepdims=True)
    np.testing.assert_allclose(gates(weights, x), expected.reshape(-1), rtol=1e-4)
    np.testing.assert_allclose(
        gates(weights | {"scale": jnp.full(10, 2.0), "bias": jnp.ones(10)}, x), 2 * expected.reshape(-1) + 1, rtol=1e-4
    )


# --- each against another source


def test_gru_against_flax():
    # The same equations; flax has no second bias for the gates r and z, ours is added to the first.
    features, cell = 6, nn.GRUCell(6, param_dtype=float)
    params = random_like(GRU(features).init(jax.random.key(0), INPUTS))
    w, b, u, c = (params[name][part] for name in ("inputs", "recurrent") for part in ("kernel", "bias"))
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


def test_lstm_against_flax():
    features, cell = 6, nn.OptimizedLSTMCell(6, param_dtype=float)
    params = random_like(LSTM(features).init(jax.random.key(0), INPUTS))
    w, b, u, c = (
        jnp.split(params[name][part], 4, axis=-1) for name in ("inputs", "recurrent") for part in ("kernel", "bias")
    )
    theirs = {f"i{gate}": {"kernel": w[i]} for i, gate in enumerate("ifgo")}
    theirs |= {f"h{gate}": {"kernel": u[i], "bias": b[i] + c[i]} for i, gate in enumerate("ifgo")}
    carry = tuple(jax.random.normal(jax.random.key(i), (features,)) for i in (1, 2))
    x = jax.random.normal(jax.random.key(3), (INPUTS,))
    expected: Any = cell.apply({"params": theirs}, carry, x)
    assert_close(LSTM(features).step(params, carry, x), expected, rtol=1e-12)


def test_lstm_forgets_nothing_at_first():
    params = LSTM(6).init(jax.random.key(0), INPUTS)
    np.testing.assert_array_equal(params["inputs"]["bias"], [0] * 6 + [1] * 6 + [0] * 12)
    np.testing.assert_array_equal(params["recurrent"]["bias"], 0)


@pytest.mark.parametrize("memory", [GRU(6), LSTM(6)], ids=["gru", "lstm"])
def test_recurrent_weights_start_orthogonal_and_others_xavier(memory):
    params = memory.init(jax.random.key(0), 20)
    for u in np.split(params["recurrent"]["kernel"], params["recurrent"]["kernel"].shape[1] // 6, axis=1):
        np.testing.assert_allclose(u.T @ u, np.eye(6), atol=1e-9)
    assert np.abs(params["inputs"]["kernel"]).max() < np.sqrt(6 / 26)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def normed(p: Any, x: jax.Array, gates: int) -> list[np.ndarray]:
    """Weight norm, then layer norm of each gate."""
    p = jax.tree.map(np.asarray, p)
    y = np.asarray(x) @ (p["kernel"] * p["length"] / np.linalg.norm(p["kernel"], axis=0))
    return np.split(standard(y.reshape(gates, -1)).ravel() * p["scale"] + p["bias"], gates)


def test_gru_with_all_options_against_numpy():
    memory = GRU(6, "relu", layer_norm=True, weight_norm=True)
    p = random_like(memory.init(jax.random.key(0), INPUTS))
    h, x = jax.random.normal(jax.random.key(1), (6,)), jax.random.normal(jax.random.key(2), (INPUTS,))
    (xr, xz, xn), (hr, hz, hn) = normed(p["inputs"], x, 3), normed(p["recurrent"], h, 3)
    z, n = sigmoid(xz + hz), np.maximum(xn + sigmoid(xr + hr) * hn, 0)
    assert np.any(n > 0)
    np.testing.assert_allclose(memory.step(p, h, x)[1], (1 - z) * n + z * h, rtol=1e-10)


def test_lstm_with_all_options_against_numpy():
    memory = LSTM(6, layer_norm=True, weight_norm=True)
    p = random_like(memory.init(jax.random.key(0), INPUTS))
    c, h = jax.random.normal(jax.random.key(1), (2, 6))
    x = jax.random.normal(jax.random.key(2), (INPUTS,))
    i, f, g, o = (a + b for a, b in zip(normed(p["inputs"], x, 4), normed(p["recurrent"], h, 4), strict=True))
    new = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    out = sigmoid(o) * np.tanh(standard(new) * p["cell"]["scale"] + p["cell"]["bias"])
    assert_close(memory.step(p, (c, h), x), ((new, out), out), rtol=1e-10)


def layer_of(memory: Any) -> tuple[Any, jax.Array, jax.Array]:
    """Parameters of a recurrence, a state, an input."""
    params = random_like(memory.init_recurrence(jax.random.key(0)))
    h = random_like(memory.init_state().real) + (
        1j * random_like(memory.init_state().real + 1) if memory.init_state().dtype == complex else 0
    )
    return params, h, jax.random.normal(jax.random.key(1), (memory.features,))


def test_lru_starts_on_a_ring():
    params = LRU(4, 1, 20_000).init_recurrence(jax.random.key(0))
    squared = np.exp(-2 * np.exp(params["nu"]))
    assert 0.81 < squared.min() < 0.8101 and 0.9979 < squared.max() < 0.9981
    np.testing.assert_allclose(
        np.quantile(squared, [0.25, 0.5, 0.75]), 0.81 + 0.188 * np.array([0.25, 0.5, 0.75]), atol=3e-3
    )
    phase = np.exp(params["theta"])
    assert phase.min() > 0 and phase.max() <= np.pi / 10 * (1 + 1e-6)
    np.testing.assert_allclose(np.exp(2 * params["gamma"]), 1 - squared, rtol=1e-2)
    # gamma makes the size of the state that of the input, whatever lambda: b ~ N(0, 1/2F) twice, x ~ N(0, 1).
    np.testing.assert_allclose(np.mean(params["b"] ** 2), 1 / 8, rtol=0.05)


def test_lru_and_s5_read_out_with_unit_variance():
    params = LRU(40, 1, 500).init_recurrence(jax.random.key(0))
    np.testing.assert_allclose(np.mean(params["c"] ** 2), 1 / 500, rtol=0.05)
    for d in (params["d"], S5(40, 1, 4).init_recurrence(jax.random.key(0))["d"]):  # N(0, 1)
        assert 0.6 < np.std(d) < 1.4


def test_s5_is_a_zero_order_hold():
    memory = S5(4, 1, 3)
    params, h, u = layer_of(memory)
    a, b = memory.coefficients(params, u)
    eigenvalue = -np.exp(params["decay"]) + 1j * np.asarray(params["frequency"])
    drive = (params["b"][0] + 1j * params["b"][1]) @ u
    for i in range(3):  # x' = Lambda x + B u with u held, over Delta
        system = np.array([[eigenvalue[i], drive[i]], [0, 0]]) * np.exp(params["delta"][i])
        np.testing.assert_allclose(a[i] * h[i] + b[i], (expm(system) @ [h[i], 1])[0], rtol=1e-10)


def normal_part_of_hippo(n: int) -> np.ndarray:
    i = np.arange(n)
    matrix = np.where(i[:, None] > i, -np.sqrt(2 * i + 1)[:, None] * np.sqrt(2 * i + 1), np.diag(-(i + 1.0)))
    return matrix + np.outer(np.sqrt(i + 0.5), np.sqrt(i + 0.5))


def test_s5_starts_as_hippo():
    eigenvalues, vectors = hippo(4)
    # The kept half and its conjugates are all of the normal part.
    np.testing.assert_allclose(2 * np.real(vectors * eigenvalues @ vectors.conj().T), normal_part_of_hippo(8), atol=1e-12)
    assert np.all(np.imag(eigenvalues) > 0)
    memory = S5(3, 1, 4)
    params = memory.init_recurrence(jax.random.key(0))
    np.testing.assert_allclose(-np.exp(params["decay"]) + 1j * params["frequency"], eigenvalues, rtol=1e-9)
    keys = jax.random.split(jax.random.key(0), 250)
    delta = np.exp(jax.vmap(memory.init_recurrence)(keys)["delta"])
    assert 0.001 <= delta.min() < 0.0011 and 0.09 < delta.max() <= 0.1 and np.median(delta) == pytest.approx(0.01, rel=0.15)


def test_s5_gives_out_what_the_real_system_does():
    """With one Delta for all: the paper's 2 N real states x' = A x + B u, y = C x + D u, A the normal part of HiPPO-LegS."""
    memory, key = S5(3, 1, 4), jax.random.key(0)
    params = memory.init_recurrence(key) | {"delta": jnp.full(4, np.log(0.05))}
    key_b, key_c, _, _ = jax.random.split(key, 4)
    b, c = jax.random.normal(key_b, (8, 3)) / np.sqrt(3), jax.random.normal(key_c, (3, 8)) / np.sqrt(8)
    a = normal_part_of_hippo(8)
    x, h = np.zeros(8), memory.init_state()
    for u in np.asarray(jax.random.normal(jax.random.key(1), (6, 3))):
        x = (expm(0.05 * np.block([[a, np.asarray(b @ u)[:, None]], [np.zeros((1, 9))]])) @ [*x, 1])[:8]
        decay, drive = memory.coefficients(params, u)
        h = decay * h + drive
        np.testing.assert_allclose(memory.output(params, h, u), c @ x + params["d"] * u, rtol=1e-8)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def linear(p: Any, x: Any) -> Any:
    return x @ p["kernel"] + p.get("bias", 0)


def test_transformer_is_full_attention():
    """The cache while acting, against attention over the whole trial without one, rotations as complex numbers."""
    memory = build("transformer", features=8, heads=2)
    params, _, x = prepared(memory)
    _, actual = repeated_step(memory, params, memory.init_carry(), x, reset_at([]))
    p = jax.tree.map(np.asarray, params["params"])

    def norm(q, x):
        return standard(x) * q["scale"] + q["bias"]

    def gate(q, x, y):
        of_y, of_x = np.split(linear(q["Dense_0"], y), 3, -1), np.split(linear(q["Dense_1"], x), 2, -1)
        r, z = sigmoid(of_y[0] + of_x[0]), sigmoid(of_y[1] + of_x[1] - 2)
        return (1 - z) * x + z * np.tanh(of_y[2] + linear(q["Dense_2"], r * x))

    def turned(x, t):  # [4] as two complex numbers
        return (x[:2] + 1j * x[2:]) * np.exp(1j * t * 1000.0 ** -np.array([0, 0.5]))

    h = linear(p["Dense_0"], np.asarray(x))
    for i in range(2):
        q = p[f"Layer_{i}"]
        query, key, value = np.split(linear(q["Dense_0"], norm(q["LayerNorm_0"], h)), 3, -1)
        read = np.zeros_like(h)
        for t in range(STEPS):
            for part in (slice(0, 4), slice(4, 8)):
                scores = [np.real(np.vdot(turned(query[t, part], t), turned(key[s, part], s))) / 2 for s in range(t + 1)]
                read[t, part] = softmax(np.array(scores)) @ value[: t + 1, part]
        h = gate(q["Gate_0"], h, np.maximum(linear(q["Dense_1"], read), 0))
        hidden = np.maximum(linear(q["Dense_2"], norm(q["LayerNorm_1"], h)), 0)
        h = gate(q["Gate_1"], h, np.maximum(linear(q["Dense_3"], hidden), 0))
    np.testing.assert_allclose(actual, h, rtol=1e-8, atol=1e-10)


def test_snail_is_padded_convolutions_and_full_attention():
    memory = build("snail", length=STEPS)
    params, _, x = prepared(memory)
    _, actual = repeated_step(memory, params, memory.init_carry(), x, reset_at([]))
    p = jax.tree.map(np.asarray, params["params"])
    layers = iter(range(100))
    next_layer = lambda x: linear(p[f"Dense_{next(layers)}"], x)  # noqa: E731
    h = next_layer(np.asarray(x))
    for _ in range(2):
        for dilation in (1, 2, 4, 8):  # 1 + 2 + 4 + 8 steps back: all of 12
            earlier = np.concatenate([np.zeros((dilation, h.shape[1])), h])[:STEPS]
            u, v = np.split(next_layer(earlier) + next_layer(h), 2, 1)
            h = np.concatenate([h, np.tanh(u) * sigmoid(v)], 1)
        key, value, query = next_layer(h), next_layer(h), next_layer(h)
        read = [softmax(query[t] @ key[: t + 1].T / np.sqrt(3)) @ value[: t + 1] for t in range(STEPS)]
        h = np.concatenate([h, read], 1)
    np.testing.assert_allclose(actual, next_layer(h), rtol=1e-8, atol=1e-10)


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("name", ["mingru", "lru", "s5"])
def test_layers_around_a_linear_recurrence(name):
    """Norm, recurrence, GLU of a GELU, residual, with the recurrences as the papers print them."""
    memory: Any = build(name)
    params, _, x = prepared(memory)
    _, actual = repeated_step(memory, params, memory.init_carry(), x, reset_at([]))
    params = jax.tree.map(np.asarray, params)
    x = linear(params["encoder"]["params"], np.asarray(x))
    for layer in params["layers"]:
        norm, p = layer["norm"]["params"], layer["recurrence"]
        h, y = 0, []
        for now in standard(x) * norm["scale"] + norm["bias"]:
            if name == "mingru":
                z, candidate = np.split(linear(p, now), 2)
                h = (1 - sigmoid(z)) * h + sigmoid(z) * candidate
                y.append(h)
                continue
            b, c = p["b"][0] + 1j * p["b"][1], p["c"][0] + 1j * p["c"][1]
            if name == "lru":
                h = np.exp(-np.exp(p["nu"]) + 1j * np.exp(p["theta"])) * h + np.exp(p["gamma"]) * (b @ now)
            else:
                eigenvalue, delta = -np.exp(p["decay"]) + 1j * p["frequency"], np.exp(p["delta"])
                h = np.exp(eigenvalue * delta) * h + (np.exp(eigenvalue * delta) - 1) / eigenvalue * (b @ now)
            y.append((2 if name == "s5" else 1) * np.real(c @ h) + p["d"] * now)
        left, right = np.split(linear(layer["mixed"]["params"]["Dense_0"], gelu(np.array(y))), 2, -1)
        x = x + left * sigmoid(right)
    np.testing.assert_allclose(actual, x, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["transformer", "snail"])
def test_what_looks_back_sees_no_further_than_its_context(name):
    memory = build(name, length=50, context=2, **({"layers": 1} if name == "transformer" else {}))
    assert sum(x.size for x in jax.tree.leaves(memory.init_carry())) < 200
    params, _, x = prepared(memory)
    gradient = jax.grad(lambda x: jnp.sum(memory.sequence(params, memory.init_carry(), x, reset_at([]))[1][-1] ** 2))(x)
    reach = {"transformer": 2, "snail": 2 * (1 + 2 + 2)}[name]  # SNAIL: two blocks of dilations 1 and 2 and a head
    np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=1), np.arange(STEPS) >= STEPS - 1 - reach)


def test_context_is_the_trial_unless_it_is_given():
    assert isinstance(transformer := build("transformer", length=40), Transformer) and transformer.context == 39
    assert isinstance(snail := build("snail", length=40, context=7), SNAIL) and snail.context == 7


def test_heads_have_to_divide_the_features():
    with pytest.raises(
        ConfigError, match=r"algo\.memory\.heads=3: twice their number must divide algo\.memory\.features=8.*1, 2, 4"
    ):
        build("transformer", heads=3)
    with pytest.raises(ConfigError, match=r"algo\.memory\.features=7: must be even"):
        build("transformer", features=7)
