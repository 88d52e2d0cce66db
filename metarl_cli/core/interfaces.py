"""The three interfaces. A new algorithm or task family implements one of them in one file and is named in one YAML."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import jax

from metarl_cli.core.settings import EvalSettings
from metarl_cli.core.types import Batch, Key, Plan, Trial

if TYPE_CHECKING:
    from gymnax.environments.environment import EnvParams
    from matplotlib.axes import Axes

State = Any
Metrics = dict[str, jax.Array]


class TaskFamily(ABC):
    """A gymnax environment and a distribution over its `EnvParams`. A pytree: floats are leaves, the rest is static."""

    env: Any  # a gymnax Environment
    horizon: int  # T: no episode is longer
    episodes: int  # E: the default length of a trial
    prior: Any  # what a classical learner may know of the distribution (`core.types`), or None
    splits: tuple[str, ...]

    @abstractmethod
    def sample(self, key: Key, split: str = "train") -> EnvParams:
        """Draws ONE task; callers `vmap`."""

    @abstractmethod
    def fixed(self, split: str) -> EnvParams | None:
        """A published set of N tasks (leaves `[N, ...]`), where the split has one."""

    @abstractmethod
    def oracle(self, task: Any, state: Any) -> jax.Array | None:
        """The action of one who knows the task and sees the environment's state, in the environment's units."""

    @abstractmethod
    def expected(self, task: Any, state: Any, action: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """`(mean reward, best mean reward)` of an action in the environment's units, where regret is defined."""

    @abstractmethod
    def draw(self, axes: Axes, task: Any, batch: Batch) -> None:
        """Draws one task and, over it, what a learner did there; `task` and `batch` `[K, T]` are numpy.

        What is labelled goes into one legend of the whole figure.
        """


class Learner(ABC):
    """Anything that can live through a trial. A pytree like the family."""

    @abstractmethod
    def init(self, key: Key, family: TaskFamily) -> State:
        """The state before training."""

    @abstractmethod
    def plan(self, family: TaskFamily, settings: EvalSettings) -> Plan:
        """The shape of an evaluation trial. Raises `ConfigError` (keys `eval.*`) where it does not fit."""

    @abstractmethod
    def trial(self, state: State, key: Key, family: TaskFamily, task: Any, plan: Plan) -> Trial:
        """Lives through one trial in one task; pure, callers `vmap`."""


class MetaLearner(Learner):
    """A learner that is trained on tasks of a family."""

    @abstractmethod
    def learned(self, state: State) -> State:
        """The state with None for all that `trial` does not need: what is left fits every family that `trial` can meet."""

    def portable(self, state: State) -> State | None:
        """What of `learned` also fits other families and networks, with None for the rest, which can start afresh."""
        return None

    @abstractmethod
    def update(self, state: State, key: Key, family: TaskFamily, progress: jax.Array) -> tuple[State, Metrics]:
        """One meta-iteration, pure. `progress` in [0, 1) is traced, for schedules.

        The metrics are scalars and always hold `return_before` and `return_after` (mean undiscounted return of an episode
        at the first and at the last point of a trial), `trial_return` and `steps` (environment steps consumed).
        """
