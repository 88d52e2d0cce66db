"""The validated side of a config. YAML holds the values; these classes hold types, units, ranges and descriptions.

Learners and families are built from them once. They are not the same objects, because a validator would run again on
tracers. No JAX here: `metarl train --help` reads these classes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

if TYPE_CHECKING:
    from metarl_cli.core.interfaces import Learner, TaskFamily


MAX_SEED = 2**31 - 1  # what fits into an int32


class Settings(BaseModel):
    """A frozen section of the config. An unknown key, a wrong type and a value out of range are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def setting(description: str, *, unit: str = "", **bounds: Any) -> Any:
    """One key. It has no default here: the YAML file is where defaults stand.

    Args:
        description: what it does, in one line of the help text.
        unit: e.g. `steps`, `episodes`; empty for a pure number.
        **bounds: pydantic's `gt`, `ge`, `lt`, `le`, `min_length` ...
    """
    return Field(description=description, json_schema_extra={"unit": unit}, **bounds)


# YAML has lists only; a setting has to be hashable because it shapes the program.
Widths = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]
Fractions = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1)], ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]


def class_named(path: str, expected: type, info: ValidationInfo) -> type:
    """For a validator: the class of the user's that a setting names, a subclass of `expected`.

    Only `config` knows which packages the user trusts; it hands the look-up over as the context of the validation.
    """
    if info.context is None:
        raise ValueError("the path of a class has a meaning in a config only")
    return info.context(info.field_name, path, expected)


class FamilySettings(Settings):
    """What a file in `configs/env/` configures."""

    @abstractmethod
    def build(self) -> TaskFamily:
        """Raises `ConfigError` with a key that starts with `env.` where settings do not fit together."""


class AlgoSettings(Settings):
    """What a file in `configs/algo/` configures."""

    @abstractmethod
    def build(self, family: TaskFamily) -> Learner:
        """Raises `ConfigError` with a key that starts with `algo.` where settings do not fit the family."""


class AdaptSettings(Settings):
    """The test-time rule of gradient-based learners and of agents with a learned update; others ignore it."""

    steps: int | None = setting(
        "adaptation steps; null: 3, on one-step families as many as in training; more where that splits the trial evenly; "
        "of agents with a learned update algo.lifetime",
        ge=0,
    )
    episodes: int | None = setting(
        "episodes per adaptation step; null: 40, on one-step families an even split; with a learned update algo.episodes",
        ge=1,
    )
    decay: float = setting("factor on the inner step after the first one; an agent with a learned update has none", gt=0)


class EvalSettings(Settings):
    """How a learner is evaluated on tasks that it has not been trained on."""

    split: str = setting("which tasks: train, test or ood")
    tasks: int | None = setting("number of tasks; null: the published set where there is one, else 1000", ge=1)
    episodes: int | None = setting("episodes of a trial; null: as the learner and the family have it", ge=1)
    checkpoint: Literal["last", "best"] = setting("which state; best needs eval.every, and each seed has its own")
    seed: int = setting("the tasks and all randomness of an evaluation derive from it alone", ge=0, le=MAX_SEED)
    every: int = setting(
        "evaluate every so many meta-iterations as well and keep the best checkpoint; 0: only at the end",
        unit="meta-iterations",
        ge=0,
    )
    greedy: bool = setting("RL^2: the most likely action and not a sampled one; others ignore it")
    adapt: AdaptSettings
