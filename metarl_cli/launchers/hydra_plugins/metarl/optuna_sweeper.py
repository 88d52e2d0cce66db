"""`hydra/sweeper=optuna`: searches with the current Optuna; `metarl_cli.search` holds how."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass  # Hydra reads the annotations, so that they may not be postponed
class OptunaSweeperConf:
    _target_: str = "hydra_plugins.metarl.optuna_sweeper.OptunaSweeper"
    trials: int = 20  # in all
    batch: int = 1  # of them launched at a time
    sampler: str = "tpe"  # or cmaes, random, grid
    pruner: str = "none"  # or median, halving
    direction: str = "maximize"
    seed: int = 0
    storage: str = "sqlite:///${hydra.sweep.dir}/study.db"
    params: dict[str, Any] = field(default_factory=dict)  # what is searched, as on the command line


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="metarl")


class OptunaSweeper(Sweeper):
    def __init__(self, **settings: Any):
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context: HydraContext = hydra_context
        self.points: Any = task_function  # metarl_cli.config.Points
        self.directory = Path(config.hydra.sweep.dir)
        self.starting: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """
        Args:
            arguments: the overrides of the command line; they go before `params`.
        """
        from metarl_cli import search

        search.check_library()
        params = [f"{key}={value}" for key, value in self.settings["params"].items()]
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        given = {override.key_or_group: override for override in parser.parse_overrides([*params, *arguments])}
        fixed = [str(override.input_line) for override in given.values() if not override.is_sweep_override()]
        swept = {o.get_key_element(): search.distribution(o) for o in given.values() if o.is_sweep_override()}
        self.directory.mkdir(parents=True, exist_ok=True)
        names = ("storage", "sampler", "pruner", "direction", "trials", "seed")
        searching = search.Search(swept, **{name: self.settings[name] for name in names})
        returned: list[Sequence[JobReturn]] = []

        def points_of(trials: Sequence[Any]) -> list[list[str]]:
            return [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]

        if searching.ended:  # their results are there: they stand in the summary as well
            returned.append(self.starting.launch(points_of(searching.ended), initial_job_idx=0))
        while batch := searching.ask(self.settings["batch"]):
            points = points_of(batch)
            for trial, point in zip(batch, points, strict=True):
                trial.set_user_attr("run", self.points.name(point))
            returned.append(self.starting.launch(points, initial_job_idx=sum(map(len, returned))))
            for trial, point in zip(batch, returned[-1], strict=True):
                searching.tell(trial, point.return_value.status, float(point.return_value))
        return returned
