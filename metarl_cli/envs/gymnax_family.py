"""Any gymnax environment as a task family, from YAML alone: its id, and distributions of the `EnvParams` that vary.

    id: CartPole-v1
    vary: {length: {uniform: [0.25, 0.75]}}               # train and test
    ood: {length: {uniform: [[0.05, 0.25], [0.75, 1.0]]}} # takes the place of the same fields of `vary`

The task is the `EnvParams`. What an environment draws in its own `reset` (a start, a goal) is no task: it changes with
every episode. Fields that follow from others (`KNOWN`) are computed anew for every task. A distribution is one of

    {uniform: [low, high]}                 or of several intervals, each as likely as it is long: [[low, high], [low, high]]
    {log_uniform: [low, high]}             0 < low: the logarithm is uniform
    {choice: [a, b, ...]}                  each as likely
    {normal: [mean, std]}                  cut off at 3 std; {normal: [mean, std, low, high]} at bounds of your own, which
                                           keep a mass positive
    {fixed: x}                             the same in every task, instead of the environment's default

and `null` in place of a section, a field or a distribution takes it out, so that a command line can change a file:
`env.vary.length.uniform=null env.vary.length.log_uniform=[0.1,1]`.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces as gymnax_spaces
from gymnax.environments.classic_control.acrobot import Acrobot
from gymnax.environments.classic_control.cartpole import CartPole
from gymnax.environments.classic_control.continuous_mountain_car import ContinuousMountainCar
from gymnax.environments.classic_control.mountain_car import MountainCar
from gymnax.environments.classic_control.pendulum import Pendulum
from gymnax.environments.environment import Environment, EnvParams
from gymnax.environments.misc.bernoulli_bandit import BernoulliBandit
from gymnax.registration import registered_envs
from pydantic import BeforeValidator, ValidationInfo

from metarl_cli.core.errors import ConfigError, MetarlError
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.rollout import first_input, flatten, rollout, spaces
from metarl_cli.core.settings import FamilySettings, class_named, setting
from metarl_cli.core.types import Batch, Key, pytree, static

KINDS = ("uniform", "log_uniform", "choice", "normal", "fixed")


# What there is to know of gymnax's own environments


class Known(NamedTuple):
    """Beside what its `EnvParams` say."""

    derived: dict[str, tuple[str, Callable[[Any], Any]]]  # field -> how it follows from the others
    shown: tuple[str, Callable[[Any], Any]] | None = None  # what tells most in a figure, of observations [T, D]
    positive: tuple[str, ...] = ()  # masses, lengths, times: at 0 or below they are no physics


# All 26 environments of gymnax 1.0.1 were read for this; the others have no such fields. A subclass counts as its parent.
KNOWN: dict[type[Environment], Known] = {
    CartPole: Known(
        {
            "total_mass": ("masscart + masspole", lambda p: p.masscart + p.masspole),
            "polemass_length": ("masspole * length", lambda p: p.masspole * p.length),
        },
        ("pole angle (rad)", lambda x: x[:, 2]),
        ("masscart", "masspole", "length", "tau", "theta_threshold_radians", "x_threshold"),
    ),
    # The centre of mass is the middle of a link. Without this the length of the second link would change nothing at all.
    Acrobot: Known(
        {
            "link_com_pos_1": ("link_length_1 / 2", lambda p: p.link_length_1 / 2),
            "link_com_pos_2": ("link_length_2 / 2", lambda p: p.link_length_2 / 2),
        },
        # Of links of length 1, whatever they are: at 1 the episode ends. The second angle is relative to the first.
        ("height of the tip", lambda x: -x[:, 0] - x[:, 0] * x[:, 2] + x[:, 1] * x[:, 3]),
        ("dt", "link_length_1", "link_length_2", "link_mass_1", "link_mass_2", "link_moi", "max_vel_1", "max_vel_2"),
    ),
    Pendulum: Known({}, ("height of the tip / length", lambda x: x[:, 0]), ("dt", "m", "l", "max_speed")),
    MountainCar: Known({}, ("position", lambda x: x[:, 0]), ("max_speed",)),
    ContinuousMountainCar: Known({}, ("position", lambda x: x[:, 0]), ("max_speed",)),
    # The end of the clock that is part of the observation.
    BernoulliBandit: Known({"t_max": ("max_steps_in_episode", lambda p: p.max_steps_in_episode)}),
}


def known(env: Environment) -> Known:
    return next((entry for cls, entry in KNOWN.items() if isinstance(env, cls)), Known({}))


class Field(NamedTuple):
    """A field of an environment's `EnvParams`."""

    name: str
    default: Any
    varies: bool  # whether `vary` may name it
    note: str  # why not


def fields(env: Environment) -> list[Field]:
    """In the order of the class."""
    params: Any = env.default_params
    derived, found = known(env).derived, []
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        kind = _kind(value)
        is_float = kind == "float" or (kind == "int" and field.type in (float, "float"))  # `mass: float = 1`
        if field.name == "max_steps_in_episode":
            note = "is set by env.horizon"
        elif field.name in derived:
            note = f"follows from others: {derived[field.name][0]}"
        else:
            note = "" if is_float else f"is no float but of type {kind}"
        found.append(Field(field.name, value, not note, note))
    return found


def _kind(value: Any) -> str:
    """`float`, `int`, `bool` ..."""
    try:
        array = jnp.asarray(value)
    except TypeError:
        return type(value).__name__
    return f"array {list(array.shape)}" if array.shape else array.dtype.name.rstrip("0123456789")


# Distributions


@pytree
class Distribution:
    """Of one number. Its numbers are leaves."""

    kind: str = static()  # of KINDS
    # uniform: low, high of each interval in turn; log_uniform: low, high; normal: mean, std, low, high
    values: tuple[float, ...]

    @property
    def lowest(self) -> float:
        return self.values[2] if self.kind == "normal" else min(self.values)

    @property
    def positive(self) -> bool:
        """Whether all that is drawn is; the bound of a continuous distribution is never drawn."""
        return self.lowest > 0 or (self.lowest == 0 and self.kind in ("uniform", "normal"))

    def sample(self, key: Key) -> jax.Array:
        values = jnp.array(self.values, float)
        if self.kind == "uniform":
            low, length = values[0::2], values[1::2] - values[0::2]
            end = jnp.cumsum(length)
            u = end[-1] * jax.random.uniform(key)
            i = jnp.minimum(jnp.sum(u >= end), end.size - 1)
            return low[i] + (u - end[i] + length[i])
        if self.kind == "log_uniform":
            low, high = jnp.log(values)
            return jnp.exp(jax.random.uniform(key, minval=low, maxval=high))
        if self.kind == "choice":
            return values[jax.random.randint(key, (), 0, values.size)]
        if self.kind == "normal":
            mean, std, low, high = values
            return mean + std * jax.random.truncated_normal(key, (low - mean) / std, (high - mean) / std)
        return values[0]


def _distributions(given: Any, info: ValidationInfo) -> dict[str, Distribution]:
    """The sections `vary` and `ood`."""
    key, given = f"env.{info.field_name}", {} if given is None else given
    if not isinstance(given, dict):
        raise ConfigError(key, str(given), "must be a mapping of fields to distributions", hint="Write null for none.")
    return {str(name): _distribution(f"{key}.{name}", value) for name, value in given.items() if value is not None}


def _distribution(key: str, given: Any) -> Distribution:
    if isinstance(given, Distribution):
        return given
    if not isinstance(given, dict):
        hint = f"Write {{fixed: {given}}} for one value." if isinstance(given, (int, float)) else ""
        raise ConfigError(key, str(given), "is no distribution", allowed=KINDS, hint=hint)
    given = {kind: values for kind, values in given.items() if values is not None}
    for kind in given:
        if kind not in KINDS:
            raise ConfigError(key, kind, "there is no such distribution", allowed=KINDS)
    if len(given) != 1:
        hint = f"Take one of them out: {key}.{next(iter(given))}=null." if given else f"Take the field out: {key}=null."
        raise ConfigError(key, ", ".join(given) or "{}", f"must be one distribution: {', '.join(KINDS)}", hint=hint)
    ((kind, values),) = given.items()
    where, shown = f"{key}.{kind}", str(values).replace(" ", "")

    def check(condition: bool, problem: str) -> None:
        if not condition:
            raise ConfigError(where, shown, problem)

    if kind == "fixed":
        check(_is_number(values), "must be a number")
        return Distribution(kind=kind, values=(float(values),))
    check(isinstance(values, list) and bool(values), "must be a list of numbers")
    if kind == "uniform" and all(isinstance(interval, list) for interval in values):
        check(all(len(interval) == 2 for interval in values), "each interval must be [low, high]")
        values = [bound for interval in values for bound in interval]
        check(all(map(_is_number, values)) and values == sorted(values), "intervals must be in order and apart")
    check(all(map(_is_number, values)), "must be a list of numbers")
    values = tuple(map(float, values))
    if kind in ("uniform", "log_uniform"):
        check(len(values) % 2 == 0 and (kind == "uniform" or len(values) == 2), "must be [low, high]")
        check(kind == "uniform" or values[0] > 0, "the bounds must be positive: logarithms are drawn")
        check(all(low < high for low, high in zip(values[0::2], values[1::2], strict=True)), "low must be below high")
    if kind == "normal":
        check(len(values) in (2, 4), "must be [mean, std] or [mean, std, low, high]")
        check(values[1] > 0, "the standard deviation must be positive")
        mean, std = values[:2]
        low, high = values[2:] or (mean - 3 * std, mean + 3 * std)
        check(low < high, "low must be below high")
        check(low < mean + 3 * std and high > mean - 3 * std, "between these bounds there is next to nothing of the normal")
        values = (mean, std, low, high)
    return Distribution(kind=kind, values=values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Random projections


@pytree
class ProjectedParams(EnvParams):
    """One task: the environment's own parameters, and how its observation looks."""

    params: Any  # EnvParams of the environment
    projection: jax.Array  # [D, d]
    max_steps_in_episode: Any = 1


class Projected(Environment[Any, ProjectedParams]):
    """Shows `projection @ observation` in place of the d features of an environment's observation."""

    def __init__(self, env: Environment, size: int):
        self.env, self.size = env, size

    @property
    def default_params(self) -> ProjectedParams:
        params: Any = self.env.default_params
        features = jax.eval_shape(lambda: flatten(self.env.reset_env(jax.random.key(0), params)[0])).size
        return ProjectedParams(
            params=params,
            projection=jnp.eye(self.size, features),
            max_steps_in_episode=params.max_steps_in_episode,
        )

    @property
    def num_actions(self) -> int:
        return self.env.num_actions

    def reset_env(self, key, params):
        observation, state = self.env.reset_env(key, params.params)
        return params.projection @ flatten(observation), state

    def step_env(self, key, state, action, params):
        observation, state, reward, terminated, info = self.env.step_env(key, state, action, params.params)
        return params.projection @ flatten(observation), state, reward, terminated, info

    def is_terminated(self, state, params):
        return self.env.is_terminated(state, params.params)

    def is_truncated(self, state, params):
        return self.env.is_truncated(state, params.params)

    def action_space(self, params):
        return self.env.action_space(params.params)

    def observation_space(self, params):
        return gymnax_spaces.Box(-jnp.inf, jnp.inf, (self.size,), dtype=jnp.float32)


# The family


@pytree
class Gymnax(TaskFamily):
    """`train` and `test` draw from `vary`; `ood` too, but for the fields that have another distribution there."""

    vary: dict[str, Distribution]
    ood: dict[str, Distribution]
    horizon: int = static()
    episodes: int = static()
    inner: Environment = static()  # gymnax's, or the user's
    env: Environment = static()  # the same, or its projection
    prior: None = static(default=None)
    splits: tuple[str, ...] = static()

    def sample(self, key: Key, split: str = "train") -> Any:
        default: Any = self.inner.default_params
        names = [field.name for field in dataclasses.fields(default)]
        drawn = {**self.vary, **(self.ood if split == "ood" else {})}
        # A key of its own for every field of the class: what else varies does not change its draw.
        values = {name: drawn[name].sample(jax.random.fold_in(key, names.index(name))) for name in drawn}
        horizon = type(default.max_steps_in_episode)(self.horizon)
        params = dataclasses.replace(default, **values, max_steps_in_episode=horizon)
        derived = {name: rule(params) for name, (_, rule) in known(self.inner).derived.items()}
        params = jax.tree.map(jnp.asarray, dataclasses.replace(params, **derived))
        if not isinstance(self.env, Projected):
            return params
        # Orthonormal columns, or rows where D < d: no feature is louder than another.
        shape = self.env.default_params.projection.shape
        projection = jax.nn.initializers.orthogonal()(jax.random.fold_in(key, len(names)), shape, float)
        limit = params.max_steps_in_episode
        return ProjectedParams(params=params, projection=projection, max_steps_in_episode=limit)

    def fixed(self, split: str) -> None:
        return None

    def oracle(self, task: Any, state: Any) -> None:
        return None

    def expected(self, task: Any, state: Any, action: jax.Array) -> None:
        return None

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        """What tells most over time, else the reward summed so far; the task's numbers stand below."""
        projected = isinstance(self.env, Projected)
        shown = None if projected else known(self.inner).shown
        for k, valid in enumerate(batch.valid):
            line = np.cumsum(batch.reward[k][valid]) if shown is None else shown[1](batch.observation[k][valid])
            if len(line):
                axes.plot(np.arange(1, len(line) + 1), line, color="C0", linewidth=0.6, alpha=0.6)
                if batch.terminated[k][valid][-1]:
                    end = {"color": "C1", "markersize": 4, "markeredgecolor": "white", "markeredgewidth": 0.4}
                    axes.plot(len(line), line[-1], "o", linestyle="none", label="terminated", zorder=3, **end)
        params = task.params if projected else task
        numbers = [f"{name} {float(getattr(params, name)):.3g}" for name in sorted({*self.vary, *self.ood})]
        below = textwrap.wrap(", ".join(numbers).replace(" ", "\xa0").replace(",\xa0", ", "), 30)
        axes.set_xlabel("\n".join(["step", *below]), fontsize=6)
        axes.set_ylabel("summed reward" if shown is None else shown[0])


# Settings


def _environment(value: Any, info: ValidationInfo) -> Any:
    """`id`: no id of gymnax has a dot in it, the path of a class has one."""
    return class_named(value, Environment, info) if isinstance(value, str) and "." in value else value


Distributions = Annotated[dict[str, Distribution], BeforeValidator(_distributions)]


class GymnaxSettings(FamilySettings):
    id: Annotated[str | type, BeforeValidator(_environment)] = setting(
        "gymnax's name of the environment, or the path of a class of yours: my_package.my_env.MyEnv"
    )
    horizon: int = setting("steps after which an episode is truncated: max_steps_in_episode", unit="steps", ge=1)
    episodes: int = setting("length of a trial, for learners that live through it one by one", unit="episodes", ge=1)
    projection: int | None = setting(
        "features of a random orthogonal projection of the observation, another in each task; null: none", ge=1
    )
    vary: Distributions = setting("what varies between tasks; `metarl list fields ID` prints what can")
    ood: Distributions = setting("other distributions for the split ood; null or {}: there is no such split")

    def build(self) -> Gymnax:
        inner = make(self.id)
        name = self.id if isinstance(self.id, str) else _path(self.id)
        every = {field.name: field for field in fields(inner)}
        allowed = [field.name for field in every.values() if field.varies]
        for section, chosen in (("env.vary", self.vary), ("env.ood", self.ood)):
            for field in chosen:
                if field not in every:
                    raise ConfigError(section, field, f"{name} has no such field", allowed=allowed)
                if not every[field].varies:
                    raise ConfigError(section, field, every[field].note, hint=f"These can vary: {', '.join(allowed)}.")
                lowest = chosen[field].lowest
                if field in known(inner).positive and not chosen[field].positive:
                    problem = f"can be as low as {lowest:g}, but has to be positive"
                    raise ConfigError(
                        f"{section}.{field}", None, problem, hint="{normal: [mean, std, low, high]} has bounds."
                    )
        if self.projection is None and all(chosen.kind == "fixed" for chosen in self.vary.values()):
            hint = "Give one a distribution, or set env.projection."
            raise ConfigError("env.vary", None, "nothing varies, so all tasks are the same", allowed=allowed, hint=hint)
        family = Gymnax(
            vary=self.vary,
            ood=self.ood,
            horizon=self.horizon,
            episodes=self.episodes,
            inner=inner,
            env=inner if self.projection is None else Projected(inner, self.projection),
            splits=("train", "test", "ood") if self.ood else ("train", "test"),
        )
        _try(family, name)
        return family


def make(which: str | type) -> Environment:
    """An environment by gymnax's id or by its class.

    Raises:
        ConfigError: an unknown id, or a class that cannot be made without arguments. The key is `env.id`.
    """
    if isinstance(which, str) and which not in registered_envs:
        hint = "An environment of your own is named by its class: my_package.my_env.MyEnv."
        raise ConfigError("env.id", which, "gymnax has no such environment", allowed=registered_envs, hint=hint)
    name = which if isinstance(which, str) else _path(which)
    try:
        env = gymnax.make(which)[0] if isinstance(which, str) else which()
        params: Any = env.default_params
    except Exception as error:  # whatever the environment's own code raises
        raise _broken(name, "cannot be made without arguments", error) from error
    if not dataclasses.is_dataclass(params) or not isinstance(params, EnvParams):
        raise ConfigError("env.id", name, "its default_params must be a dataclass, a subclass of gymnax's EnvParams")
    return env


def _try(family: Gymnax, name: str) -> None:
    """Traces an episode, so that a mistake in an environment shows before anything is compiled."""

    try:
        spec = spaces(family)
        action = jnp.zeros_like(first_input(spec).action)
        act = lambda carry, *_: (carry, action, None)  # noqa: E731
        jax.eval_shape(lambda key: rollout(key, family, family.sample(key), act, (), spec), jax.random.key(0))
    except MetarlError:
        raise
    except Exception as error:
        raise _broken(name, "cannot be stepped", error) from error


def _broken(name: str, problem: str, error: Exception) -> ConfigError:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
    hint = f"See {frame.filename}, line {frame.lineno}."
    return ConfigError("env.id", name, f"the environment {problem}: {type(error).__name__}: {text}", hint=hint)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
