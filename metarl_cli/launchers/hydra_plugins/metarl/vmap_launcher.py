"""`hydra/launcher=vmap`: points that differ in seeds and float settings alone become one program."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass  # Hydra reads the annotations, so that they may not be postponed
class VmapLauncherConf:
    _target_: str = "hydra_plugins.metarl.vmap_launcher.VmapLauncher"
    runs: int | None = None  # the most in one program; null: as fit in memory


ConfigStore.instance().store(group="hydra/launcher", name="vmap", node=VmapLauncherConf, provider="metarl")


class VmapLauncher(Launcher):
    """Hands all points over at once: `metarl_cli.config.Points` knows what to do with them."""

    def __init__(self, runs: int | None):
        self.runs = runs
        self.task_function: Any = None
        self.config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.task_function, self.config = task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self.config is not None
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        returned = self.task_function.together(job_overrides, self.config.hydra)
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value)
            for overrides, value in zip(job_overrides, returned, strict=True)
        ]
