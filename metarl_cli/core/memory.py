"""The interface of memories: what a memory-based meta-learner carries through a trial; and what several of them share.

A memory is static (hashable, no arrays); its parameters and its carry are pytrees. One file in `memories/` and one YAML in
`configs/algo/memory/` add one.

Memories whose state is a linear recurrence find it solved for all steps at once in `linear_recurrence`. Memories that look
back at W single steps (`LookingBack`) keep these and the newest in a ring: step t of a trial is in row t mod (W + 1), so
that acting writes one row and moves none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarl_cli.core.settings import Settings
from metarl_cli.core.types import Key, Params

Carry = Any


class Memory(ABC):
    """`sequence` equals repeated `step`; a test holds every memory to that, with resets anywhere."""

    features: int  # H, the size of what it gives out

    @abstractmethod
    def init(self, key: Key, inputs: int) -> Params:
        """Parameters for an input of that many features."""

    @abstractmethod
    def init_carry(self) -> Carry:
        """Of one agent, at the start of a trial."""

    @abstractmethod
    def step(self, params: Params, carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
        """One time step while acting: `x [D]` to features `[H]`."""

    @abstractmethod
    def sequence(self, params: Params, carry: Carry, x: jax.Array, reset: jax.Array) -> tuple[Carry, jax.Array]:
        """A whole sequence in training: `x [T, D]` to features `[T, H]`.

        Args:
            reset: `[T]` bool; where true, the carry is set to `init_carry()` before that step.
        """

    def trial(self, params: Params, x: jax.Array) -> jax.Array:
        """A whole trial in training: `x [T, D]` to features `[T, H]`, as `sequence` from `init_carry()`."""
        return self.sequence(params, self.init_carry(), x, jnp.zeros(x.shape[0], bool))[1]


class MemorySettings(Settings):
    """What a file in `configs/algo/memory/` configures."""

    @abstractmethod
    def build(self, length: int) -> Memory:
        """Raises `ConfigError` with a key that starts with `algo.memory.`.

        Args:
            length: of a trial in training, in steps. Longer ones occur in evaluations.
        """


# --- linear recurrences


def linear_recurrence(a: jax.Array, b: jax.Array, h: jax.Array, reset: jax.Array) -> jax.Array:
    """`h_t = a_t h_{t-1} + b_t` elementwise for all t, from h before the first step; all `[T, N]`, `h [N]`, real or complex.

    Solved in O(log T) rounds by an associative scan (Blelloch 1990) with the operator
    `(a_i, b_i), (a_j, b_j) -> (a_j a_i, a_j b_i + b_j)`. A reset before step t is `a_t = 0`: nothing earlier gets through,
    the incoming h neither.
    """
    a = jnp.where(reset[:, None], 0, a)
    return _solve(a, b.at[0].add(a[0] * h))


@jax.custom_vjp
def _solve(a: jax.Array, b: jax.Array) -> jax.Array:
    return _scan(a, b, reverse=False)


def _scan(a: jax.Array, b: jax.Array, reverse: bool) -> jax.Array:
    def then(i, j):
        return i[0] * j[0], j[0] * i[1] + j[1]

    return jax.lax.associative_scan(then, (a, b), reverse=reverse)[1]


def _forward(a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    h = _solve(a, b)
    return h, (a, h)


def _backward(saved: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same recurrence backwards in time, `d_t = slope_t + a_{t+1} d_{t+1}`: nothing but a and h has to be kept."""
    a, h = saved
    zero = jnp.zeros_like(a[:1])
    d = _scan(jnp.concatenate([a[1:], zero]), slope, reverse=True)
    return d * jnp.concatenate([zero, h[:-1]]), d


_solve.defvjp(_forward, _backward)


# --- looking back


class LookingBack(Memory):
    """One whose network takes T new steps with those that were kept; a step is a sequence of one.

    In its carry, `time` counts the steps of the trial and `past` holds rings.
    """

    @property
    @abstractmethod
    def trunk(self) -> Any:
        """A flax module: carry, `x [T, D]` and `reset [T]` to carry and features `[T, H]`. A ring of None keeps nothing."""

    def init(self, key: Key, inputs: int) -> Params:
        return self.trunk.init(key, self.init_carry(), jnp.zeros((1, inputs)), jnp.zeros(1, bool))

    def step(self, params: Params, carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
        carry, features = self.sequence(params, carry, x[None], jnp.zeros(1, bool))
        return carry, features[0]

    def sequence(self, params: Params, carry: Carry, x: jax.Array, reset: jax.Array) -> tuple[Carry, jax.Array]:
        return self.trunk.apply(params, carry, x, reset)

    def trial(self, params: Params, x: jax.Array) -> jax.Array:
        carry = self.init_carry()
        carry["past"] = jax.tree.map(lambda ring: None, carry["past"])  # there is none, and none will be asked for
        return self.sequence(params, carry, x, jnp.zeros(x.shape[0], bool))[1]


def steps_before(time: jax.Array, reset: jax.Array) -> jax.Array:
    """How many steps of its trial lie before each of T new ones, `[T]`; `time` says it for the first, `[]`."""
    now = jnp.arange(reset.shape[0])
    return now - jax.lax.cummax(jnp.where(reset, now, -time))


class Rows(NamedTuple):
    """What T new steps may look at."""

    rows: jax.Array  # [R, ...]
    age: jax.Array  # [T, R], how many steps each lies back; those of other trials are older than `before`
    ring: jax.Array | None  # after the last of them


def look_back(ring: jax.Array | None, new: jax.Array, before: jax.Array) -> Rows:
    """The T new rows behind those that the ring `[W + 1, ...]` has kept; without a ring, by themselves."""
    steps = new.shape[0]
    if ring is None:
        return Rows(new, jnp.arange(steps)[:, None] - jnp.arange(steps)[None], None)
    size = ring.shape[0]
    age = (before[-1] - jnp.arange(size)) % size  # in the ring, after the last
    if steps == 1:
        ring = ring.at[before[0] % size].set(new[0])
        return Rows(ring, age[None], ring)
    rows = jnp.concatenate([ring[(before[0] + 1 + jnp.arange(size - 1)) % size], new])  # oldest first
    ring = rows[len(rows) - 1 - age]
    ring = jnp.where((age <= before[-1]).reshape(-1, *[1] * (rows.ndim - 1)), ring, 0)
    return Rows(rows, size - 1 + jnp.arange(steps)[:, None] - jnp.arange(len(rows))[None], ring)


def delayed(ring: jax.Array | None, new: jax.Array, before: jax.Array, steps: int) -> tuple[jax.Array, jax.Array | None]:
    """The rows `[T, ...]` that lie `steps` back, zeros where the trial had not begun; and the ring after them."""
    rows, _, after = look_back(ring, new, before)
    if ring is None:
        rows = jnp.concatenate([jnp.zeros((steps, *new.shape[1:])), new])
    elif new.shape[0] == 1:
        rows = rows[(before + 1) % (steps + 1)]
    return jnp.where((before >= steps)[:, None], rows[: new.shape[0]], 0), after


Rings = tuple[jax.Array | None, jax.Array | None]


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, rings: Rings, before: jax.Array, window: int
) -> tuple[jax.Array, Rings]:
    """What one head reads of each step itself and of `window` earlier ones of its trial, `[T, V]`; and the rings after.

    Args:
        query, key: `[T, K]`.
        value: `[T, V]`.
        rings: of keys and of values.
    """
    keys, values = look_back(rings[0], key, before), look_back(rings[1], value, before)
    visible = (keys.age >= 0) & (keys.age <= jnp.minimum(before, window)[:, None])
    scores = query @ keys.rows.T / jnp.sqrt(query.shape[-1])
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)) @ values.rows, (keys.ring, values.ring)
