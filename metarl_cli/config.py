"""Composes the config with Hydra, validates it and builds what it describes. Every mistake ends as a `ConfigError`.

Hydra merges the YAML files and knows the groups; the `key=value` overrides are applied here, so that each way of
misspelling a key ends at one place, pydantic's `extra="forbid"`, and gets the same answer.

Configs never execute code. A `_target_` names a class only where a kind of settings is to be chosen (`algo`, `env`,
`algo.memory`), is imported only from metarl_cli or a package that the user named in `plugins=[...]`, and has to be a
subclass of what is expected there. The same holds for the one setting that may name a class, `env.id` of a gymnax
environment. Hydra's own `_target_`s are those of its plugins. Resolvers that could read the
environment or decode text do not exist while a config is composed and resolved.

`config.yaml` in a run directory is the resolved config with one more key, `choices`, which says what the groups were:

    choices: {algo: maml, env: point_nav} # and `experiment`, where there was one
    seed: 0
    ...
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import os
import re
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import BeforeValidator, ValidationError

from metarl_cli import catalogue, directory
from metarl_cli.core.errors import ConfigError, MetarlError, RunError
from metarl_cli.core.settings import MAX_SEED, AlgoSettings, EvalSettings, FamilySettings, Settings, Widths, setting

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

    from metarl_cli.core.interfaces import Learner, MetaLearner, TaskFamily

T = TypeVar("T")

_RESOLVERS = {"hydra", "now", "oc.select", "python_version"}
_HYDRA_KEYS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweeper", "hydra.launcher")
_HYDRA_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
_ENGINES = ("hydra_plugins.hydra_submitit_launcher.", "hydra_plugins.hydra_ray_launcher.")
_PACKAGES = {  # of launchers that are installed separately
    "submitit_slurm": "hydra-submitit-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "ray": "hydra-ray-launcher",
    "joblib": "'metarl[joblib]'",
}
_CLASS_PATH = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", re.ASCII)

Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Loggers = Annotated[
    tuple[Literal["jsonl", "tensorboard", "wandb"], ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]
Numbers = Annotated[tuple[int | float, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class RunConfig(Settings):
    """What every command that composes a config has."""

    seed: int = setting("the first seed", ge=0, le=MAX_SEED)
    seeds: int = setting("how many seeds run side by side in one program: seed, seed+1, ...", ge=1)
    device: Literal["auto", "cpu", "gpu"] = setting("where it runs; auto: on the GPU where JAX finds one")
    precision: Literal["float32", "float64", "bfloat16"] = setting("of all numbers; bfloat16: of matrix products only")
    plugins: Names = setting("packages whose classes the YAML files may name; on the command line only")
    eval: EvalSettings
    algo: AlgoSettings
    env: FamilySettings


class TrainConfig(RunConfig):
    """One run of `metarl train`."""

    iterations: int = setting("length of the training", unit="meta-iterations", ge=0)
    log_every: int = setting("meta-iterations averaged in one line of metrics.jsonl", ge=1)
    metric: Literal["trial_return", "return_before", "return_after"] = setting(
        "of the evaluation: what a sweep compares; of a trial, or of an episode before or after adaptation"
    )
    figures: bool = setting("draw them at the end")
    devices: Literal["auto", "one", "all"] = setting(
        "over which the tasks of a meta-batch are spread; auto: on a CPU all cores, else one; all: those of all processes"
    )
    logger: Loggers = setting("where metrics go: metrics.jsonl always, beside it TensorBoard or Weights & Biases")


class TuneSettings(Settings):
    """One parameter of a learner, chosen by the mean trial return."""

    key: str | None = setting("which one, e.g. algo.epsilon; null: none")
    values: Numbers = setting("what to try")
    tasks: Literal["reported", "other"] = setting(
        "on which tasks: the reported ones, as in the RL^2 paper, which flatters; or as many others"
    )


class EvalConfig(RunConfig):
    """One run of `metarl eval` with a learner that has nothing to train."""

    tune: TuneSettings


class DiagnoseConfig(Settings):
    """`metarl diagnose estimators`."""

    tasks: int = setting("tasks in which the meta-gradient is estimated", unit="tasks", ge=1)
    episodes: Widths = setting("batch sizes: episodes of a task before, and as many after the inner step", min_length=1)
    repeats: int = setting("batches of each size", ge=2)
    reference: int = setting("episodes of a task for the reference gradient", ge=2)
    seed: int = setting("the tasks and all randomness derive from it", ge=0, le=MAX_SEED)


C = TypeVar("C", bound=RunConfig)


class Composed(NamedTuple, Generic[C]):
    """A validated config and where it comes from."""

    config: C
    resolved: dict[str, Any]  # plain, interpolations resolved, without Hydra's part; `_target_`s included
    overrides: list[str]
    run_dir: Path
    run_dir_given: bool
    algo: str
    env: str
    experiment: str | None = None


class Row(NamedTuple):
    """One key of a config, as the help shows it."""

    key: str
    value: str
    unit: str
    allowed: str
    description: str


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> Composed[TrainConfig]:
    """The config of one training run. Creates nothing on disk.

    Args:
        overrides: as typed: `key=value`, `group=name`, `hydra.run.dir=PATH`.
        config_dir: the user's own configs, added to ours.

    Raises:
        ConfigError: for the first mistake; `MetarlError` with one line for each where there are several.
    """
    return _compose("train", TrainConfig, overrides, config_dir)


def compose_eval(overrides: Sequence[str], config_dir: Path | None = None) -> Composed[EvalConfig]:
    """The config of one evaluation of a learner that has nothing to train; see `compose`."""
    return _compose("eval", EvalConfig, overrides, config_dir)


def _compose(command: str, cls: type[C], overrides: Sequence[str], config_dir: Path | None) -> Composed[C]:
    from hydra import compose as hydra_compose
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    known = catalogue.groups(config_dir)
    with _hydra():
        parsed = [_parse(override, known, command=command) for override in overrides]
        for override in parsed:
            if override.is_sweep_override():
                raise _several_values(override, known)
        for_hydra, for_us = _split(parsed, known)
        with _hydra_errors(known):
            lines = [*_search_path(config_dir), *(str(override.input_line) for override in for_hydra)]
            config = hydra_compose(command, lines, return_hydra_config=True)
        _check_hydra(config)
        HydraConfig.instance().set_config(config)
        choices = {group: config.hydra.runtime.choices.get(group) for group in ("algo", "env", "experiment")}
        OmegaConf.set_struct(config, False)
        _apply(config, for_us)
        run_dir = Path(_resolve(config, "hydra.run.dir")).expanduser()
        del config["hydra"]
        resolved = _resolve(config)
    if cls is EvalConfig and not any(override.key_or_group == "iterations" for override in for_us):
        resolved.pop("iterations", None)  # of the YAML of a learner that is to be trained: `build` finds better words
    for name in resolved["plugins"] if isinstance(resolved["plugins"], list) else ():
        if isinstance(name, str) and importlib.util.find_spec(name.partition(".")[0]) is None:
            hint = "A package of your own has to be installed or on PYTHONPATH."
            raise ConfigError("plugins", name, "there is no such package", hint=hint)
    if resolved["plugins"] and not any(override.key_or_group == "plugins" for override in for_us):
        raise ConfigError(
            "plugins",
            _show(resolved["plugins"]),
            "a YAML file may not name the packages it trusts",
            hint="If you trust them, say so on the command line.",
        )
    return Composed(
        config=validate(resolved, choices, known, cls),
        resolved=resolved,
        overrides=list(overrides),
        run_dir=run_dir,
        run_dir_given=any(override.key_or_group == "hydra.run.dir" for override in for_hydra),
        algo=str(choices["algo"]),
        env=str(choices["env"]),
        experiment=choices["experiment"],
    )


def from_run(run: Path, overrides: Sequence[str], allowed: tuple[str, ...]) -> Composed[TrainConfig]:
    """The config of an existing run, changed by `key=value` overrides. The `plugins` it was made with stay trusted.

    Args:
        allowed: the top-level keys that may change.

    Raises:
        RunError: where the directory is no run, or its `config.yaml` is damaged.
        ConfigError: for a mistake in the overrides.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = directory.config_of(run)
    try:
        _refuse_aliases(file)
        stored = OmegaConf.load(file)
        recorded: Any = OmegaConf.to_container(stored)
    except Exception as error:  # of the file system, the encoding, YAML or OmegaConf
        mark = getattr(error, "problem_mark", None)
        where = f"{file}, line {mark.line + 1}" if mark else str(file)
        raise RunError(f"{where}: cannot be read: {_first_line(error)}. Start the run again.") from None
    choices = recorded.pop("choices", None) if isinstance(recorded, dict) else None
    if not isinstance(stored, DictConfig) or not isinstance(choices, dict) or not {"algo", "env"} <= choices.keys():
        raise RunError(f"{file}: is no config of a metarl run: `choices` with `algo` and `env` is missing.")
    if "tune" in recorded:
        raise RunError(
            f"{run}: is an evaluation of a learner that was never trained. There is nothing to go on with: "
            f"evaluate it anew with metarl eval algo={choices['algo']} env={choices['env']}."
        )
    env = recorded.get("env")
    ids = [env.get("id")] if isinstance(env, dict) else []
    for target in [value for _, value in _targets(recorded, "config")] + ids:
        if isinstance(target, str) and _lies_in(run, target):
            raise RunError(f"{file}: {target} lies in the run directory itself, and nothing of it is ever run.")
    try:
        config = validate(recorded, choices)
    except MetarlError as error:
        raise RunError(f"{file}: damaged, or written by another version of metarl. {error}") from None

    with _hydra():
        parsed = [_parse(override, {}) for override in overrides]
        for override in parsed:
            key, value = override.key_or_group, _show(override.value())
            if override.is_sweep_override():
                raise ConfigError(key, _text(override), "takes one value here")
            if key.split(".")[0] not in allowed:
                raise ConfigError(key, value, "cannot be changed in an existing run", allowed=allowed)
            if key == "algo" and not isinstance(override.value(), dict):
                raise ConfigError(key, value, "a run keeps its own", hint=f"Change its settings: {key}.KEY=VALUE.")
        named = [override for override in parsed if override.key_or_group == "env" and isinstance(override.value(), str)]
        parsed = [override for override in parsed if override not in named]
    if named:  # another family, with its own defaults
        choices["env"] = named[-1].value()
        stored["env"] = compose([f"env={choices['env']}"]).resolved["env"]
    with _hydra():
        if parsed or named:
            del stored["choices"]
            _apply(stored, parsed)
            recorded = _resolve(stored)
            config = validate(recorded, choices)
    with suppress(OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException):  # a record, which may be damaged
        overrides = [*(str(line) for line in OmegaConf.load(run / "overrides.yaml")), *overrides]
    names = str(choices["algo"]), str(choices["env"]), choices.get("experiment")
    return Composed(config, recorded, list(overrides), run, True, *names)


def diagnosis(overrides: Sequence[str]) -> tuple[DiagnoseConfig, list[str]]:
    """The config of `metarl diagnose`, and the overrides that are meant for the run that is diagnosed."""
    from omegaconf import DictConfig, OmegaConf

    values = OmegaConf.load(catalogue.configs() / "diagnose.yaml")
    assert isinstance(values, DictConfig)
    of_run = [line for line in overrides if line.partition("=")[0].partition(".")[0] in ("env", "device", "precision")]
    with _hydra():
        parsed = [_parse(line, {}) for line in overrides if line not in of_run]
        for override in parsed:
            if override.is_sweep_override():
                raise ConfigError(override.key_or_group, _text(override), "takes one value here, or a list: [5,10]")
        _apply(values, parsed)
        section = _section(DiagnoseConfig, _resolve(values), "", ())
    errors: list[ConfigError] = []
    config = _instance(section, section, errors, {}, {})
    _raise(errors)
    assert isinstance(config, DiagnoseConfig)
    return config, of_run


def environment(name: str, overrides: Sequence[str]) -> str | type:
    """What `env.id` names: gymnax's id as it is, or a class of a package in `plugins=[...]`, which is imported.

    Args:
        overrides: `plugins=[...]` or nothing.
    """
    with _hydra():
        given = {override.key_or_group: override.value() for override in (_parse(line, {}) for line in overrides)}
    for key in given.keys() - {"plugins"}:
        raise ConfigError(key, _show(given[key]), "cannot be set here", allowed=["plugins"])
    if "." not in name:
        return name
    from gymnax.environments.environment import Environment

    plugins = given.get("plugins")
    names = [str(plugin) for plugin in plugins] if isinstance(plugins, list) else []
    return locate(name, Environment, "env.id", ("metarl_cli", *names))


def save(composed: Composed, run_dir: Path) -> None:
    """Writes `config.yaml` and `overrides.yaml`, each at once or not at all."""
    import yaml

    choices = {"algo": composed.algo, "env": composed.env}
    if composed.experiment is not None:
        choices["experiment"] = composed.experiment
    for name, content in (
        ("config.yaml", {"choices": choices, **composed.resolved}),
        ("overrides.yaml", composed.overrides),
    ):
        temporary = run_dir / f".{name}"
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        os.replace(temporary, run_dir / name)


def build(config: TrainConfig, algo: str = "NAME", env: str = "NAME") -> tuple[MetaLearner, TaskFamily]:
    """The learner and its family; settings that do not fit together show here, before anything is compiled.

    Args:
        algo, env: what was chosen, for messages.
    """
    from metarl_cli.core.interfaces import MetaLearner

    learner, family = build_untrained(config)
    if not isinstance(learner, MetaLearner):
        raise ConfigError(
            "algo", algo, "has nothing to train", hint=f"Evaluate it as it is: metarl eval algo={algo} env={env}"
        )
    return learner, family


def build_untrained(config: RunConfig) -> tuple[Learner, TaskFamily]:
    """The same for any learner."""
    family = build_family(config)
    if config.seed + config.seeds - 1 > MAX_SEED:
        raise ConfigError("seeds", config.seeds, f"the last seed, seed + seeds - 1, would be above {MAX_SEED}")
    if config.eval.checkpoint == "best" and not config.eval.every:
        hint = "Train with eval.every=N to keep one."
        raise ConfigError("eval.checkpoint", "best", "a run with eval.every=0 keeps no best state", hint=hint)
    learner = config.algo.build(family)
    learner.plan(family, config.eval)
    return learner, family


def build_family(config: RunConfig) -> TaskFamily:
    """The family alone, which has the split that is asked for."""
    family = config.env.build()
    if config.eval.split not in family.splits:
        raise ConfigError("eval.split", config.eval.split, "the family has no such split", allowed=family.splits)
    return family


class Points(Generic[T]):
    """What Hydra's launchers call for one point of a sweep, and ours for several at once; it may go to another process.

    Args:
        job: trains points, each given by its overrides, its `hydra.run.dir` among them; its other argument is the
            section `hydra` of the config.
        directory: of the sweep.
        keys: what is swept: the names of the points.
    """

    def __init__(self, job: Callable[[list[list[str]], DictConfig], list[T]], directory: Path, keys: Sequence[str]):
        self.job, self.directory, self.keys = job, directory, keys

    def __call__(self, _: DictConfig) -> T:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        return self.together([list(hydra.overrides.task)], hydra)[0]

    def together(self, points: Sequence[Sequence[str]], hydra: Any) -> list[T]:
        return self.job(
            [[*point, f"hydra.run.dir={_quote(str(self.directory / self.name(point)))}"] for point in points], hydra
        )

    def name(self, point: Sequence[str]) -> str:
        return file_name([line for line in point if line.partition("=")[0].lstrip("+") in self.keys]) or "point"


def file_name(overrides: Sequence[str]) -> str:
    """Overrides as the name of a file; where it had to be changed or cut, a checksum tells it from similar ones."""
    text = ",".join(overrides)
    name = re.sub(r"[^\w.,=+-]+", "-", text)
    return name if name == text and len(name) <= 120 else f"{name[:110]}~{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def sweep(
    overrides: Sequence[str], config_dir: Path | None, job: Callable[[list[list[str]], DictConfig], list[T]]
) -> tuple[Path, list[T]]:
    """Runs several configs through Hydra's sweeper and launcher (`metarl train -m`).

    Every value is tried first, so that a mistake in the last of them shows before the first starts.

    Args:
        job: see `Points`.

    Returns:
        The directory of the sweep, by default one that is named by the overrides, and what `job` returned.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    known = catalogue.groups(config_dir)
    with _hydra() as hydra:
        parsed = [_parse(override, known, hydra) for override in overrides]
        for override in parsed:
            if override.key_or_group == "hydra.run.dir":
                raise ConfigError(
                    "hydra.run.dir",
                    _text(override),
                    "with -m every run has a directory of its own",
                    hint="Set hydra.sweep.dir, the directory of them all.",
                )
        for single in _each_value(parsed):
            compose(single, config_dir)
        lines = [*_search_path(config_dir), *overrides]
        if not any(override.key_or_group == "hydra.sweep.dir" for override in parsed):
            name = file_name([str(override.input_line) for override in parsed if not override.is_hydra_override()])
            name = name or "default"
            lines.append(f"hydra.sweep.dir={_quote(f'runs/sweeps/{name}')}")
        with _hydra_errors(known):
            config = hydra.compose_config("train", lines, RunMode.MULTIRUN)
        _check_hydra(config)
        HydraConfig.instance().set_config(config)
        directory = Path(_resolve(config, "hydra.sweep.dir")).expanduser()
        if str(config.hydra.launcher._target_).startswith(_ENGINES):  # who may work in another directory
            directory = directory.absolute()
            lines.append(f"hydra.sweep.dir={_quote(str(directory))}")
        given = {override.key_or_group for override in parsed}
        params = {key: value for key, value in (config.hydra.sweeper.get("params") or {}).items() if key not in given}
        space = [_parse(f"{key}={value}", known, hydra) for key, value in params.items()]
        for single in _each_value([*parsed, *space]) if space else ():
            compose(single, config_dir)
        swept = [override for override in (*parsed, *space) if override.is_sweep_override()]
        for override in swept:
            if override.is_interval_sweep() and config.hydra.sweeper._target_.startswith("hydra._internal."):
                problem = "an interval has no end of values"
                raise ConfigError(override.key_or_group, _text(override), problem, hint="Add hydra/sweeper=optuna.")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot be made ({error.strerror})"
            raise ConfigError("hydra.sweep.dir", directory, problem, hint="Take another directory.") from None
        points = Points(job, directory, [override.get_key_element().lstrip("+") for override in swept])
        with _engine_errors():
            returned = hydra.multirun("train", points, lines, with_log_configuration=False)
    return directory, [point.return_value for batch in returned for point in batch]


def rows(composed: Composed) -> Iterator[Row]:
    """Every key of the config, for `metarl train ... --help`."""
    for section in _sections(_root(composed.resolved, type(composed.config))):
        for name, field in section.cls.model_fields.items():
            if name not in section.below:
                extra = field.json_schema_extra
                unit = str(extra.get("unit", "")) if isinstance(extra, dict) else ""
                allowed = describe(field.annotation, field.metadata)
                yield Row(section.path(name), _show(section.values[name]), unit, allowed, field.description or "")


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What values a setting takes, in words that follow `must be`: `an integer >= 1`, `true or false` ..."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return describe(arguments[0], [*arguments[1:], *metadata])
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else describe(part, metadata) for part in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (tuple, list):
        return f"a list, each {describe(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "a section with keys of its own"
    if origin is dict:
        return "a mapping"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", type: "a class"}
    bounds = []
    for constraint in itertools.chain.from_iterable(getattr(item, "metadata", [item]) for item in metadata):
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if (bound := getattr(constraint, name, None)) is not None:
                bounds.append(f"{sign} {bound}")
    return " ".join([words.get(annotation, str(annotation)), " and ".join(bounds)]).strip()


# Validation


class _Section(NamedTuple):
    """A part of the config with the class that validates it."""

    key: str  # "algo.memory"; empty at the top
    cls: type[Settings]
    values: dict[str, Any]  # what is no section itself
    below: dict[str, _Section]
    trusted: tuple[str, ...]  # packages whose classes may be named

    def path(self, name: str) -> str:
        return f"{self.key}.{name}" if self.key else name


def validate(
    resolved: dict[str, Any],
    choices: dict[str, Any] | None = None,
    known: catalogue.Groups | None = None,
    cls: type[C] = TrainConfig,
) -> C:
    """The config as its class.

    Args:
        resolved: see `Composed`.
        choices: group to name, for messages.
        known: the config files there are, for messages.
        cls: of which command it is the config.

    Raises:
        ConfigError: for the first mistake; `MetarlError` with one line for each where there are several.
    """
    if resolved.get("device") == "cpu":
        # JAX takes hold of its devices when something is computed for the first time, and `import gymnax` computes. With
        # `gpu` there is nothing to do: it is what JAX prefers.
        import jax

        jax.config.update("jax_platforms", "cpu")
    if resolved.get("devices") in ("auto", "all"):
        from metarl_cli.core import devices

        # `all` has to wait until all processes are there
        (devices.offer_cores if resolved["devices"] == "auto" else devices.connect)()
    root = _root(resolved, cls)
    errors: list[ConfigError] = []
    config = _instance(root, root, errors, choices or {}, known or {})
    _raise(errors)
    assert isinstance(config, cls)
    return config


def _raise(errors: list[ConfigError]) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise MetarlError("\n".join(map(str, errors)))


def _root(resolved: dict[str, Any], cls: type[RunConfig]) -> _Section:
    plugins = resolved.get("plugins")
    names = [name for name in plugins if isinstance(name, str)] if isinstance(plugins, list) else []
    return _section(cls, resolved, "", ("metarl_cli", *names))


def _section(expected: type[Settings], data: dict[str, Any], key: str, trusted: tuple[str, ...]) -> _Section:
    """Finds the classes of a part of the config and of everything below it."""
    values = dict(data)
    cls = expected
    if inspect.isabstract(expected):
        cls = locate(values.pop("_target_", None), expected, f"{key}._target_", trusted)
    elif "_target_" in values:
        where = f"{key}._target_" if key else "_target_"
        raise ConfigError(where, _show(values["_target_"]), "no class may be named here, only in algo and env")
    section = _Section(key, cls, values, {}, trusted)
    for name, field in cls.model_fields.items():
        inner = _settings_class(field.annotation)
        if inner is not None and isinstance(values.get(name), dict):
            section.below[name] = _section(inner, values.pop(name), section.path(name), trusted)
    return section


def _settings_class(annotation: Any) -> type[Settings] | None:
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Settings):
            return part
    return None


def locate(target: Any, expected: type[T], where: str, trusted: tuple[str, ...]) -> type[T]:
    """The class that a config names. Nothing outside the trusted packages is imported.

    Args:
        expected: what it has to be a subclass of.
        where: the key, for messages.
        trusted: names of packages.
    """

    def refuse(problem: str, hint: str = "") -> ConfigError:
        return ConfigError(where, _show(target), problem, hint=hint)

    def is_trusted(module: str) -> bool:
        return any(module == package or module.startswith(f"{package}.") for package in trusted)

    if target is None:
        raise ConfigError(where, None, f"is missing: the class, a subclass of {expected.__name__}")
    if not isinstance(target, str) or not _CLASS_PATH.fullmatch(target):
        raise refuse("is not the path of a class, such as package.module.Class")
    module_name, _, name = target.rpartition(".")
    is_ours = module_name.startswith("metarl_cli.")
    if not is_trusted(module_name):
        raise refuse(
            f"only classes of {', '.join(trusted)} may be named here",
            f"If you trust the package, add plugins=[{target.split('.')[0]}] to the command line.",
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        hint = "" if is_ours else "A package of your own has to be installed or on PYTHONPATH."
        raise refuse(f"there is no module {error.name}", hint) from None
    except Exception as error:  # whatever the plug-in's own code raises
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise refuse(
            f"the module cannot be imported: {type(error).__name__}: {_first_line(error)}",
            f"See {frame.filename}, line {frame.lineno}.",
        ) from error
    cls = getattr(module, name, None)
    if not inspect.isclass(cls) or not is_trusted(cls.__module__):
        names = [n for n, item in vars(module).items() if inspect.isclass(item) and issubclass(item, expected)]
        raise refuse(f"{module_name} defines no class {name}", _did_you_mean(name, names))
    if not issubclass(cls, expected) or inspect.isabstract(cls):
        raise refuse(f"is no {expected.__name__} that can be used")
    return cls


def _instance(
    section: _Section, root: _Section, errors: list[ConfigError], choices: dict[str, Any], known: catalogue.Groups
) -> Settings | None:
    """The section as an instance of its class; mistakes are added to `errors`."""
    below = {name: _instance(child, root, errors, choices, known) for name, child in section.below.items()}

    def class_named(name: str, path: str, expected: type) -> type:
        return locate(path, expected, section.path(name), section.trusted)

    try:
        values = section.values | {k: v for k, v in below.items() if v is not None}
        return section.cls.model_validate(values, context=class_named)
    except ValidationError as error:
        seen = set()
        for detail in error.errors():
            name = str(detail["loc"][0]) if detail["loc"] else ""
            if name in seen or below.get(name, ...) is None:
                continue  # one message for a key, and none for a section that has its own
            seen.add(name)
            errors.append(_mistake(section, name, detail, root, choices, known))
        return None


def _mistake(
    section: _Section, name: str, detail: Any, root: _Section, choices: dict[str, Any], known: catalogue.Groups
) -> ConfigError:
    """One of pydantic's errors in our words."""
    key, value = section.path(name), section.values.get(name)
    if detail["type"] == "extra_forbidden":
        while isinstance(value, dict) and len(value) == 1:  # `alg.lr=1` is {alg: {lr: 1}} by now
            ((inner, value),) = value.items()
            key = f"{key}.{inner}"
        return _unknown_key(key, value, section, root, choices, known)
    field = section.cls.model_fields.get(name)
    if field is None:  # a check of the class as a whole
        return ConfigError(section.key or "config", None, str(detail["msg"]))
    allowed = describe(field.annotation, field.metadata)
    if detail["type"] == "missing":
        return ConfigError(key, None, f"has no value; it must be {allowed}", hint=f"Add {key}=VALUE.")
    if detail["type"] in ("value_error", "assertion_error"):
        return ConfigError(key, _show(value), str(detail["ctx"]["error"]))
    if detail["type"] == "too_short":
        return ConfigError(key, _show(value), f"must be {allowed}, and not empty")
    if typing.get_origin(field.annotation) is Literal:
        return ConfigError(key, _show(value), "no such choice", allowed=typing.get_args(field.annotation))
    if not re.match(r".*_type$|int_from|greater|less", detail["type"]):
        return ConfigError(key, _show(value), str(detail["msg"]).replace("Input should", "must"))
    hint = ""
    if isinstance(value, float) and value.is_integer() and "integer" in allowed:
        hint = f"Write {int(value)}."
    elif detail["type"] in ("tuple_type", "list_type") and not isinstance(value, dict | str | None):
        hint = f"Write {key}=[{_show(value)}]."
    elif (group := key.replace(".", "/")) in known:
        hint = f"To choose another file, write {group}=NAME; there are {', '.join(known[group])}."
    return ConfigError(key, _show(value), f"must be {allowed}", hint=hint)


def _unknown_key(
    key: str, value: Any, section: _Section, root: _Section, choices: dict[str, Any], known: catalogue.Groups
) -> ConfigError:
    every = [part.path(name) for part in _sections(root) for name in part.cls.model_fields if name not in part.below]
    here = [section.path(name) for name in section.cls.model_fields]
    last = key.rpartition(".")[2]
    same_name = [other for other in every if other.rpartition(".")[2] == last]
    # The same name elsewhere, then a similar name here, then a similar path anywhere, then a similar name anywhere.
    nearest = same_name or difflib.get_close_matches(key, here, n=1, cutoff=0.75)
    nearest = nearest or difflib.get_close_matches(key, every, n=1, cutoff=0.75)
    if not nearest:
        similar = difflib.get_close_matches(last, {other.rpartition(".")[2] for other in every}, n=1)
        nearest = [other for other in every if other.rpartition(".")[2] in similar]
    hints = [f"Did you mean {' or '.join(nearest)}?"] if nearest else []
    nested = [group for group in known if "/" in group and group.rpartition("/")[2] == key]
    hints += [f"To choose a file of {group}, write {group}=NAME." for group in nested]
    group = key.split(".")[0]
    if group in choices:
        others = [name for name in known.get(group, ()) if name != choices[group] and _has_key(group, name, key, known)]
        if others:
            some = ", ".join(f"{group}={name}" for name in others[:3])
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            hints.append(f"{some}{more} {'have' if len(others) > 1 else 'has'} it, {group}={choices[group]} does not.")
    hints.append(f"Keys of {section.key}: " if section.key else "Keys at the top: ")
    hints[-1] += f"{', '.join(section.cls.model_fields)}."
    return ConfigError(key, _show(value), "no such key", hint=" ".join(hints))


def _has_key(group: str, name: str, key: str, known: catalogue.Groups) -> bool:
    """Whether another file of the group sets the key."""
    with suppress(Exception):  # a file that cannot be read is not to hide the mistake that is being reported
        return key in dict(catalogue.keys(known[group][name], group, {}, known))
    return False


def _sections(section: _Section) -> Iterator[_Section]:
    yield section
    for below in section.below.values():
        yield from _sections(below)


# Hydra


@contextmanager
def _hydra() -> Iterator[Hydra]:
    """Hydra on our configs, with harmless resolvers only. Afterwards all is as it was."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.basecontainer import BaseContainer

    outer, outer_config, resolvers = GlobalHydra().hydra, HydraConfig().cfg, dict(BaseContainer._resolvers)
    GlobalHydra().clear()
    try:
        with initialize_config_dir(str(catalogue.configs()), job_name="metarl", version_base="1.3"):
            for name in BaseContainer._resolvers.keys() - _RESOLVERS:
                OmegaConf.clear_resolver(name)
            hydra = GlobalHydra().hydra
            assert hydra is not None
            yield hydra
    finally:
        GlobalHydra().hydra, HydraConfig().cfg, BaseContainer._resolvers = outer, outer_config, resolvers


def _parse(line: str, known: catalogue.Groups, hydra: Hydra | None = None, command: str | None = None) -> Override:
    """One override.

    Args:
        hydra: needed where a sweep is to be expanded.
        command: a message offers only the files that it can use.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = line.partition("=")
    if not equals and not line.startswith("~"):
        choices = [f"{group}={line}" for group, files in known.items() if line in files]
        raise ConfigError(
            line or "''",
            None,
            "an override has the form key=value, without spaces around `=`",
            hint=f"Did you mean {choices[0]}?" if choices else "",
        )
    try:
        parser = OverridesParser.create(hydra.config_loader if hydra else None)
        (override,) = parser.parse_overrides([line])
    except HydraException:
        if value.startswith("~"):
            hint = "Hydra does not know `~`: write $HOME."
        else:
            hint = (
                "Brackets and quotes have to be closed. A value that holds brackets, commas, quotes or `=` is quoted, "
                f"once more for the shell: {key}=\"'...'\"."
            )
        raise ConfigError(key, value, "cannot be read", hint=hint) from None
    name, is_group = override.key_or_group, override.key_or_group in known
    if not name or (override.package is not None and not is_group):
        raise ConfigError(key, value, "this is no key", hint="A key looks like algo.lr.")
    if override.is_delete():
        raise ConfigError(name, None, "a key cannot be deleted, each needs a value", hint="Give it another one.")
    if override.is_hydra_override() and not name.replace("/", ".").startswith(_HYDRA_KEYS):
        hints = {"hydra.searchpath": "Use --config-dir.", "hydra.mode": "Use -m."}
        raise ConfigError(name, value, "cannot be set", allowed=_HYDRA_KEYS, hint=hints.get(name, ""))
    if is_group and command == "eval" and name.partition("/")[0] not in ("algo", "env"):
        takes = "algo=NAME, env=NAME and their keys"
        hint = f"It takes {takes}; metarl eval algo=NAME --help lists them. Or a run that there is: metarl eval RUN."
        raise ConfigError(name, value, f"metarl eval takes no {catalogue.noun(name)}", hint=hint)
    if is_group and not override.is_sweep_override():
        choice = override.value()
        if not isinstance(choice, dict) and not (isinstance(choice, str) and choice in known[name]):
            allowed = (catalogue.fitting(command, known) if command else known)[name]
            raise ConfigError(name, _show(choice), f"no such {catalogue.noun(name)}", allowed=allowed)
    return override


def _split(parsed: list[Override], known: catalogue.Groups) -> tuple[list[Override], list[Override]]:
    """What Hydra has to know before it merges the files, and the values, which we set ourselves."""
    for_hydra, for_us = [], []
    for override in parsed:
        is_choice = override.key_or_group in known and not isinstance(override.value(), dict)
        (for_hydra if is_choice or override.is_hydra_override() else for_us).append(override)
    return for_hydra, for_us


def _search_path(config_dir: Path | None) -> list[str]:
    return [] if config_dir is None else [f"hydra.searchpath=[{_quote(f'file://{config_dir.absolute()}')}]"]


@contextmanager
def _hydra_errors(known: catalogue.Groups) -> Iterator[None]:
    """What goes wrong while the files are merged, in our words."""
    from hydra.errors import MissingConfigException
    from yaml import MarkedYAMLError

    try:
        yield
    except MetarlError:
        raise
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if group == "hydra/launcher" and name in _PACKAGES:
            hint = f"Install it: pip install {_PACKAGES[name]}."
            raise ConfigError(group, name, f"needs the package {_PACKAGES[name]}", hint=hint) from None
        problem = f"no such {catalogue.noun(group)}"
        raise ConfigError(group, name, problem, allowed=error.options or known.get(group)) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a config file"
        raise ConfigError(where, None, f"is not valid YAML: {error.problem or error.context}") from None
    except Exception as error:  # Hydra raises many types, with several lines each
        cause = error.__cause__ if not str(error).strip() and error.__cause__ else error
        if match := re.search(r"Could not override '(.+?)'(?s:.*use \+.+?=(.*))?", str(cause)):
            key = match[1].split("@")[0]
            if key not in known:
                chosen = re.match(r"hydra\.(launcher|sweeper)\.", key)
                hint = f"Which there are depends on hydra/{chosen[1]}=NAME." if chosen else ""
                raise ConfigError(key, match[2], "no such key", hint=hint) from None
            outer = key.rpartition("/")[0]
            if outer:
                raise ConfigError(key, match[2], f"the chosen {catalogue.noun(outer)} takes none") from None
            raise ConfigError(key, match[2], "a run has none unless it is added", hint=f"Write +{key}={match[2]}.") from None
        if match := re.match(r"Error merging override (.+?)=(.*)", str(cause)):
            raise ConfigError(match[1], match[2], _first_line(error.__cause__ or cause)) from None
        raise ConfigError("config", None, f"cannot be composed: {_first_line(cause)}") from None


@contextmanager
def _engine_errors() -> Iterator[None]:
    """What Slurm or Ray refuse, in one paragraph."""
    try:
        with warnings.catch_warnings():  # Ray's fork turns into another program at once
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called")
            yield
    except Exception as error:
        engine = type(error).__module__.partition(".")[0]
        if engine not in ("submitit", "ray"):
            raise
        said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise MetarlError(f"hydra/launcher ({engine}): {said[-1000:] or type(error).__name__}") from error


def _check_hydra(config: DictConfig) -> None:
    """Refuses what could run code or read the environment by way of Hydra's own settings."""
    from omegaconf import OmegaConf

    hydra = OmegaConf.to_container(config.hydra, resolve=False)
    assert isinstance(hydra, dict)
    silent = {"version": 1, "root": None, "disable_existing_loggers": False}
    fixed = {"callbacks": {}, "hydra_logging": silent, "job_logging": silent}
    fixed_job = {"env_set": {}, "env_copy": [], "chdir": None}
    for section, expected, prefix in ((hydra, fixed, "hydra"), (hydra["job"], fixed_job, "hydra.job")):
        for name, value in expected.items():
            if section[name] != value:
                raise ConfigError(f"{prefix}.{name}", _show(section[name]), "cannot be set", allowed=_HYDRA_KEYS)
    for section in ("launcher", "sweeper"):
        if not isinstance(hydra[section], dict):
            hint = f"Choose with hydra/{section}=NAME, and set hydra.{section}.KEY=VALUE."
            raise ConfigError(f"hydra.{section}", _show(hydra[section]), "is a section", hint=hint)
    for section, name in (("launcher", "runs"), ("launcher", "n_jobs"), ("sweeper", "trials"), ("sweeper", "batch")):
        value = hydra[section].get(name)
        if isinstance(value, int) and value < 1 and (name, value) != ("n_jobs", -1):  # as many as there are cores
            raise ConfigError(f"hydra.{section}.{name}", value, "must be 1 or more")
    # These would pass for the user's own overrides.
    for key in hydra["sweeper"].get("params") or {}:
        if re.match(r"\+*(plugins|hydra)\b", key):
            raise ConfigError(f"hydra.sweeper.params.{key}", None, "belongs on the command line")
    for key, target in _targets(hydra, "hydra"):
        if not str(target).startswith(_HYDRA_PLUGINS):
            raise ConfigError(
                key, target, "Hydra may use its own plug-ins only", allowed=[f"{name}*" for name in _HYDRA_PLUGINS]
            )


def _targets(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        if name == "_target_":
            yield f"{key}._target_", item
        yield from _targets(item, f"{key}.{name}")


def _apply(config: DictConfig, overrides: list[Override]) -> None:
    """Sets the values. Keys that do not exist are found later, by the classes."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        key, value = override.key_or_group, override.value()
        try:
            old = OmegaConf.to_container(config)
            for part in key.split("."):
                old = old.get(part) if isinstance(old, dict) else None
            if override.is_add() and old is not None and not isinstance(value, (dict, list)):
                raise ConfigError(key, _show(value), "the key exists already", hint="Leave out the `+`.")
            OmegaConf.update(config, key, value, merge=True, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(key, _show(value), f"cannot be set: {_first_line(error)}") from None


def _resolve(config: DictConfig, key: str | None = None) -> Any:
    """The whole config, or one value of it, as plain Python with all interpolations resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException, UnsupportedInterpolationType

    try:
        if key is not None:
            return OmegaConf.select(config, key, throw_on_missing=True)
        for missing in sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(missing, "???", "has no value", hint=f"Add {missing}=VALUE.")
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = key or str(error.full_key or "config")
        raw = _raw(config, where)
        if isinstance(error, UnsupportedInterpolationType):
            raise ConfigError(
                where,
                raw,
                "a config may not read the environment or compute",
                hint="Allowed: ${KEY}, ${now:FORMAT}, ${hydra:KEY}.",
            ) from None
        if isinstance(error, InterpolationKeyError):
            known = [name for name, _ in catalogue.leaves(OmegaConf.to_container(config, resolve=False))]
            wanted = re.findall(r"\$\{([\w.]+)\}", str(raw)) or [""]
            raise ConfigError(
                where, raw, "refers to a key that does not exist", hint=_did_you_mean(wanted[0], known, "${%s}")
            ) from None
        raise ConfigError(where, raw, f"cannot be resolved: {_first_line(error)}") from None
    except RecursionError:
        raise ConfigError("config", None, "interpolations refer to each other in a circle") from None


def _raw(config: DictConfig, key: str) -> str:
    from omegaconf import OmegaConf

    value: Any = OmegaConf.to_container(config, resolve=False)
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return _show(value)


def _each_value(parsed: list[Override]) -> Iterator[list[str]]:
    """Configs in which every value of a sweep occurs at least once, of an interval its ends.

    Raises:
        ConfigError: nothing is swept, or something twice.
    """
    lines: list[list[str]] = []
    for override in parsed:
        if override.is_discrete_sweep():
            values = list(override.sweep_string_iterator())
            twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
            if not values or twice is not None:
                problem = "holds no value" if twice is None else f"names {twice} twice"
                raise ConfigError(override.key_or_group, _text(override), problem)
            lines.append([f"{override.get_key_element()}={value}" for value in values])
        elif override.is_interval_sweep():
            interval: Any = override.value()
            lines.append([f"{override.get_key_element()}={end}" for end in (interval.start, interval.end)])
        elif not override.is_sweep_override():
            lines.append([str(override.input_line)])
    yield [choices[0] for choices in lines]
    for position, choices in enumerate(lines):
        for choice in choices[1:]:
            yield [choice if i == position else other[0] for i, other in enumerate(lines)]


def _several_values(override: Override, known: catalogue.Groups) -> ConfigError:
    key, text = override.key_or_group, _text(override)
    hint = f"Add -m to run them one after the other: metarl train -m {key}={text}."
    if key == "seed":
        hint += " seeds=N trains N seeds side by side."
    elif key not in known:
        hint += f" A list is written {key}=[{text}]."
    return ConfigError(key, text, "takes one value", hint=hint)


def _text(override: Override) -> str:
    """The value as it was typed."""
    return str(override.input_line).partition("=")[2]


# Small things


def _refuse_aliases(file: Path) -> None:
    """metarl writes none, and a few lines of them unfold into gigabytes."""
    import yaml

    for token in yaml.scan(file.read_text(encoding="utf-8")):
        if isinstance(token, yaml.AliasToken):
            raise RunError("aliases are not allowed here")


def _lies_in(run: Path, target: str) -> bool:
    """Whether the import of a class would look into the run directory; nothing is imported to find out."""
    package, *below = target.split(".")[:-1] or [""]
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    places = [Path(place, *below) for place in spec.submodule_search_locations or ()]
    places += [Path(spec.origin)] if spec.has_location and spec.origin else []
    return any(path.resolve().is_relative_to(run.resolve()) for path in places)


def _did_you_mean(word: str, options: Sequence[str], form: str = "%s") -> str:
    nearest = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f"Did you mean {form % nearest[0]}?" if nearest else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _quote(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _show(value: Any) -> str:
    """A value as the user would type it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        return f"'{value}'" if value == "" or re.fullmatch(r"[-+\d.e]+|true|false|null", value) else value
    if isinstance(value, list):
        return f"[{','.join(map(_show, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{_show(item)}' for name, item in value.items())}}}"
    return str(value)
