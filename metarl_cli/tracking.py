"""TensorBoard and Weights & Biases beside metrics.jsonl, which is always written.

What a tracker does happens in a thread of its own, from its first import on: a service that cannot be reached, or a disk
that is full, costs the run a warning and nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import queue
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metarl_cli.core.errors import ConfigError
from metarl_cli.logs import plain

WAITING = 1000  # rows that may wait for a slow tracker; further ones are dropped
LAST_SECONDS = 10.0  # that the end of a run waits for what is still waiting

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_log = logging.getLogger("metarl")


class Tracker(ABC):
    """Takes the numbers of a run, one row per window of metrics. For the arguments see `Trackers`."""

    @abstractmethod
    def __init__(self, run: Path, config: Mapping[str, Any], done: int): ...

    @abstractmethod
    def log(self, iteration: int, numbers: Mapping[str, float]) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class TensorBoard(Tracker):
    """Event files in `RUN/tensorboard`. What was written after the checkpoint that a run goes on from is taken back."""

    def __init__(self, run: Path, config: Mapping[str, Any], done: int):
        self.writer = importlib.import_module("tensorboardX").SummaryWriter(
            str(run / "tensorboard"), purge_step=done + 1 if done else None
        )

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self.writer.close()


class WandB(Tracker):
    """Online, or with WANDB_MODE=offline in `RUN/wandb`. A resumed run goes on in the same run there."""

    def __init__(self, run: Path, config: Mapping[str, Any], done: int):
        wandb: Any = importlib.import_module("wandb")
        name = run / ".wandb_id"
        if not name.exists():
            name.write_text(secrets.token_hex(6), encoding="utf-8")
        self.wandb = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "metarl"),
            id=name.read_text(encoding="utf-8").strip(),
            name=str(run),
            dir=str(run),
            config=dict(config),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", init_timeout=LAST_SECONDS),
        )

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        self.wandb.log(dict(numbers), step=iteration)  # steps that it has already are left out

    def close(self) -> None:
        self.wandb.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check(names: Sequence[str]) -> None:
    """Raises `ConfigError` where a package is missing; nothing is imported."""
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            hint = f"Install it: pip install {PACKAGES[name]}; or leave {name} out."
            raise ConfigError("logger", name, f"the package {PACKAGES[name]} is not installed", hint=hint)


class Trackers:
    """All trackers of a run. No method of it raises, waits (but `close`, for seconds) or computes.

    Args:
        names: of `logger=[...]`.
        config: of the run, as it is recorded.
        done: meta-iterations before this process.
    """

    def __init__(self, names: Sequence[str], run: Path, config: Mapping[str, Any], done: int):
        self.workers = [_Worker(name, (run, config, done)) for name in names if name in TRACKERS]

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""
        for worker in self.workers:
            worker.put((row["iteration"], dict(numbers(plain(row)))))

    def close(self) -> None:
        for worker in self.workers:
            worker.put(None)
        for worker in self.workers:
            worker.thread.join(LAST_SECONDS)
            if worker.thread.is_alive():
                worker.warn("has not taken everything in time; the rest is in metrics.jsonl")


class _Worker:
    def __init__(self, name: str, arguments: tuple[Path, Mapping[str, Any], int]):
        self.name, self.arguments = name, arguments
        self.waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING)
        self.warned = False
        self.thread = threading.Thread(target=self.work, name=name, daemon=True)
        self.thread.start()

    def put(self, item: tuple[int, dict[str, float]] | None) -> None:
        try:
            self.waiting.put_nowait(item)
        except queue.Full:
            self.warn("is too slow; rows are left out there")

    def work(self) -> None:
        try:
            tracker = TRACKERS[self.name](*self.arguments)
            while (item := self.waiting.get()) is not None:
                tracker.log(*item)
            tracker.close()
        except BaseException as error:  # whatever a service raises, SystemExit included
            _log.debug("%s failed", self.name, exc_info=True)
            self.warn(f"failed, the run goes on without it: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
            while self.waiting.get() is not None:
                pass

    def warn(self, problem: str) -> None:
        if not self.warned:
            self.warned = True
            _log.warning(f"logger {self.name} {problem}.")


def numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """`return_after: [1, 2, None]` as its mean over the seeds that have one, and each as `return_after/seed_0` ..."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            there = {i: x for i, x in enumerate(value) if isinstance(x, int | float)}
            if there:
                yield prefix + name, sum(there.values()) / len(there)
            if len(value) > 1:
                yield from ((f"{prefix}{name}/seed_{i}", x) for i, x in there.items())
        elif isinstance(value, int | float) and name != "iteration":
            yield prefix + name, value
