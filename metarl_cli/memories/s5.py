"""Simplified state-space layer S5 (Smith et al. 2023, arXiv:2208.04933): a discretised continuous-time system.

x' = Lambda x + B u,  y = Re(C x) + D u  with a zero-order hold of length Delta:
h_t = exp(Lambda Delta) h_{t-1} + Lambda^-1 (exp(Lambda Delta) - 1) B u_t

Lambda starts as eigenvalues of the normal part of the HiPPO-LegS matrix, B and C in the basis of its eigenvectors (section
3.3); its real part stays negative, as -exp of a parameter. The eigenvalues come in conjugate pairs, of which one each is
kept: 2 N states of the paper are N complex ones here, and Re(C x) is 2 Re of the kept half. Each state has a Delta of its
own, at first log-uniform on [0.001, 0.1]. Lu et al. 2023 (arXiv:2303.03982) brought S5 to RL^2, with a modified operator
for resets; plain a_t = 0 does the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from metarl_cli.core.memory import MemorySettings
from metarl_cli.core.networks import LinearMemory
from metarl_cli.core.settings import setting
from metarl_cli.core.types import Key, Params

DELTA = (0.001, 0.1)


def hippo(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues `[n]` of HiPPO-LegS' normal part of size 2 n, the upper half of them, and eigenvectors `[2 n, n]`.

    The matrix is `-sqrt(2 i + 1) sqrt(2 j + 1)` below the diagonal, `-(i + 1)` on it (Gu et al. 2020); `p p^T` with
    `p_i = sqrt(i + 1/2)` makes it -1/2 plus a skew-symmetric S, and i S is Hermitian (Gu et al. 2022, theorem 1).
    """
    i = np.arange(2 * n)
    root = np.sqrt(2 * i + 1.0)
    full = -np.tril(np.outer(root, root), -1) - np.diag(i + 1.0)
    skew = full + np.outer(root, root) / 2 + np.eye(2 * n) / 2
    frequency, vectors = np.linalg.eigh(-1j * skew)
    return -0.5 + 1j * frequency[n:], vectors[:, n:]


@dataclass(frozen=True)
class S5(LinearMemory):
    state: int  # N

    def init_recurrence(self, key: Key) -> Params:
        key_b, key_c, key_d, key_delta = jax.random.split(key, 4)
        eigenvalues, vectors = hippo(self.state)
        re, im = jnp.asarray(np.real(vectors), float), jnp.asarray(np.imag(vectors), float)
        b = jax.random.normal(key_b, (2 * self.state, self.features)) / math.sqrt(self.features)
        c = jax.random.normal(key_c, (self.features, 2 * self.state)) / math.sqrt(2 * self.state)
        low, high = map(math.log, DELTA)
        return {
            "decay": jnp.full(self.state, math.log(0.5)),  # log of minus the real part of Lambda
            "frequency": jnp.asarray(np.imag(eigenvalues), float),
            "b": jnp.stack([re.T @ b, -im.T @ b]),  # V^H B
            "c": jnp.stack([c @ re, c @ im]),  # C V
            "d": jax.random.normal(key_d, (self.features,)),
            "delta": jax.random.uniform(key_delta, (self.state,), minval=low, maxval=high),
        }

    def init_state(self) -> jax.Array:
        return jnp.zeros(self.state, complex)

    def coefficients(self, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        eigenvalue = jax.lax.complex(-jnp.exp(params["decay"]), params["frequency"])
        decay = jnp.exp(eigenvalue * jnp.exp(params["delta"]))
        b = params["b"]
        return decay, (decay - 1) / eigenvalue * jax.lax.complex(b[0] @ x, b[1] @ x)

    def output(self, params: Params, h: jax.Array, x: jax.Array) -> jax.Array:
        c = params["c"]
        return 2 * (c[0] @ h.real - c[1] @ h.imag) + params["d"] * x


class S5Settings(MemorySettings):
    features: int = setting("size of a layer", unit="units", ge=1)
    state: int = setting("size N of a layer's state, half of the paper's", unit="complex numbers", ge=1)
    layers: int = setting("layers, each with a state of its own", ge=1)

    def build(self, length: int) -> S5:
        return S5(self.features, self.layers, self.state)
