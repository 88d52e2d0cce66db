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
    greedy: bool = static(default=False)  # the most likely action and not a sampled one
    decay: float | jax.Array = 1.0  # factor on the inner step after the first adaptation step


@dataclasses.dataclass(frozen=True)
class BernoulliArms:
    """A prior: k arms, success probabilities independent and uniform on [0, 1]."""

    k: int


@dataclasses.dataclass(frozen=True)
class CorrelatedArms:
    """A prior: two arms that pay with p and 1 - p; p is uniform on [0, 1] or, where there are some, on `values`."""

    values: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class GaussianArms:
    """A prior: k arms, mean rewards independent N(mean, std^2); a reward is N(its arm's mean, noise^2)."""

    k: int
    mean: float
    std: float
    noise: float


@dataclasses.dataclass(frozen=True)
class InformativeArms:
    """A prior: one of the ordinary arms, at random, pays `target`, each of the others `other`.

    One more arm, the last, pays i / arms if the target is the i-th (from 1). All rewards are deterministic.
    """

    arms: int
    target: float
    other: float


@dataclasses.dataclass(frozen=True)
class RestlessArms:
    """A prior: two arms that pay with p_t and 1 - p_t in pull t of n.

    p_0 is uniform on [0, 1]; then a Gaussian random walk, reflected at 0 and 1, whose step has one of the standard
    deviations `volatilities`, drawn at random for each task.
    """

    n: int
    volatilities: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class TabularMDP:
    """A prior: mean rewards N(reward_mean, reward_std^2), rewards N(their mean, reward_noise^2), rows of the transition
    matrix Dirichlet(dirichlet, ..., dirichlet). Every episode starts in state 0 and takes `horizon` steps."""

    states: int
    actions: int
    horizon: int
    reward_mean: float
    reward_std: float
    reward_noise: float
    dirichlet: float


@dataclasses.dataclass(frozen=True)
class TwoStep:
    """A prior: which of two second-stage states pays 1 with probability `reward`, the other with 1 - `reward`.

    At random at first; before each further one of the `rounds` of an episode they change places with probability
    `switch`. Action i leads to second-stage state i with probability `common`, else to the other.
    """

    rounds: int
    common: float
    reward: float
    switch: float


@dataclasses.dataclass(frozen=True)
class GoalGrid:
    """A prior: one goal, uniform on `goals`, of an empty grid of `size` x `size` cells (column, row), from one `start`.

    The actions are those of `core.grids`. A step that ends on the goal pays `on_goal`, in an episode only the first of them
    if `once`; any other step pays `off_goal`.
    """

    size: int
    start: tuple[int, int]
    goals: tuple[tuple[int, int], ...]
    on_goal: float
    off_goal: float
    once: bool
