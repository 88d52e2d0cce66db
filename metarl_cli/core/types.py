"""The words of the project as types.

Axis letters, in this order, everywhere: `S` seeds, `B` tasks of a meta-batch, `P` points of a trial, `E` episodes of a
trial, `K` episodes per adaptation step, `T` time steps, then features (`D` observation, `A` action).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax

Key = jax.Array
Params = Any  # a pytree of arrays
T_co = TypeVar("T_co")


def static(**kwargs: Any) -> Any:
    """A field that shapes the program (an int, a name, a switch): changing it compiles again."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(kw_only_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[T_co]) -> type[T_co]:
    """A frozen dataclass whose fields are leaves (every float hyper-parameter is one) unless marked `static()`."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


class Previous(NamedTuple):
    """What the last step brought. `rollout.first_input` says what an agent is told at the start of a trial."""

    action: jax.Array
    reward: jax.Array
    done: jax.Array


class Batch(NamedTuple):
    """Steps of one or more episodes, time last: `[T]`, `[K, T]`, `[P, K, T]` ... Padded; means run over `valid` steps."""

    observation: jax.Array  # [T, D], what the action was chosen on
    action: jax.Array  # [T] int, or [T, A] in the units of the policy
    reward: jax.Array  # [T]
    terminated: jax.Array  # [T] bool
    truncated: jax.Array  # [T] bool
    valid: jax.Array  # [T] bool, false after the last episode's end
    regret: jax.Array | None  # [T], mean reward of the best action minus that of the action taken
    extra: Any  # what `act` returned beside the action: log-probability, value ...


class Trial(NamedTuple):
    """One learner's whole encounter with one task, as P points of K episodes that share one policy."""

    returns: jax.Array  # [P, K] undiscounted
    steps: jax.Array  # [P, K] environment steps
    regret: jax.Array | None  # [P, K] summed over the episode
    batch: Batch  # [P, K, T]


@pytree
class Plan:
    """The shape of a trial."""

    points: int = static()  # P
    episodes: int = static()  # K
    decay: float | jax.Array = 1.0  # factor on the inner step after the first adaptation step


@dataclasses.dataclass(frozen=True)
class BernoulliArms:
    """A prior: k arms, success probabilities independent and uniform on [0, 1]."""

    k: int
