"""The interface of memories: what a memory-based meta-learner carries through a trial.

A memory is static (hashable, no arrays); its parameters and its carry are pytrees. One file in `memories/` and one YAML in
`configs/algo/memory/` add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import jax

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


class MemorySettings(Settings):
    """What a file in `configs/algo/memory/` configures."""

    @abstractmethod
    def build(self) -> Memory:
        """Raises `ConfigError` with a key that starts with `algo.memory.`."""
