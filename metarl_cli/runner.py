"""One run: config -> learner and family -> training -> evaluation, figures and `result.json`.

The run directory is a documented format (README, "The run directory"). Whatever stops a run, what was computed is on disk,
and `resume` goes on from there to the same bits as an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import logging
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.console import Console

from metarl_cli import catalogue, directory, tracking
from metarl_cli.config import Composed, RunConfig, TrainConfig, build, diagnosis, from_run, save
from metarl_cli.core import devices, footprint
from metarl_cli.core.errors import ConfigError, MetarlError, Misfit, RunError
from metarl_cli.core.interfaces import MetaLearner, TaskFamily
from metarl_cli.core.types import Batch
from metarl_cli.logs import MetricsFile, Progress, log_to, plain, say, table, tell

if TYPE_CHECKING:
    from metarl_cli.evaluation import Evaluation
    from metarl_cli.optimality import Yardsticks

CHUNK_SECONDS = 2.0  # what one call of train_chunk should take: Ctrl-C waits for its end
SAVE_SECONDS = 20.0  # between checkpoints
FREE_BYTES = 50_000_000  # a run needs a few megabytes; less than this and it is refused at the start
SCHEMA_VERSION = 1


class Interrupted(MetarlError):
    """Stopped by Ctrl-C or SIGTERM after the state was saved."""

    def __init__(self, run: Path, signum: int):
        super().__init__(f"Interrupted; everything is saved. Go on with: metarl resume {run}")
        self.exit_code = 128 + signum


class Diverged(MetarlError):
    """NaN or infinity in every seed."""

    exit_code = 1


def train(composed: Composed) -> Path:
    """`metarl train`. Returns the run directory.

    Raises:
        MetarlError: everything that a user can mend. No directory is left behind by a mistake in the config.
    """
    configure_jax(composed.config)
    console = Console(quiet=not devices.first())
    learner, family = build(composed.config, composed.algo, composed.env)
    tracking.check(composed.config.logger)
    import jax

    from metarl_cli import evaluation
    from metarl_cli.checkpoint import RunLock

    jax.eval_shape(lambda: evaluation.choose_tasks(family, composed.config.eval))  # a mistake shows now, not at the end
    with own_directory(composed.run_dir, copy=False) as own:
        run = make_directory(composed._replace(run_dir=own))
        with RunLock(run), log_to(run, console) as log:
            save(composed, run)
            log.debug("metarl train %s", " ".join(composed.overrides))
            try:
                Session([Point(run, composed, learner, family, console)], console).go_on()
            except OutOfMemory:
                if not (run / "metrics.jsonl").exists():  # nothing has begun here: another try may
                    (run / "config.yaml").unlink()
                raise
    return run


def resume(run: Path, overrides: list[str]) -> Path:
    """`metarl resume`: goes on with an interrupted run, or extends a finished one (`iterations=...`)."""
    composed = from_run(run, overrides, allowed=("iterations", "device", "devices", "logger"))
    configure_jax(composed.config)
    console = Console(quiet=not devices.first())
    learner, family = build(composed.config)
    tracking.check(composed.config.logger)
    from metarl_cli.checkpoint import RunLock

    with own_directory(run, copy=True) as own, RunLock(own), log_to(own, console) as log:
        session = Session([Point(own, composed, learner, family, console)], console)
        session.restore()
        save(composed, own)
        log.info(f"resuming {run} at iteration {session.done} of {composed.config.iterations}")
        session.go_on()
    return run


def evaluate(run: Path, overrides: list[str]) -> Path:
    """`metarl eval`: evaluates a run again. Returns the new file; the recorded result is not touched."""
    console = Console()
    composed = from_run(run, overrides, allowed=("eval", "env", "algo", "device", "precision"))
    configure_jax(composed.config)
    learner, family = build(composed.config)
    from metarl_cli import evaluation, optimality

    config = composed.config
    try:
        state = restore_learner(run, composed, learner, family)
    except Misfit as error:
        changed = [line for line in overrides if line.lstrip("+").startswith(("env", "algo."))]
        if not changed:
            raise
        problem = f"{', '.join(changed)}: the learner was trained on tasks of another shape or with another network"
        state = restore_rule(run, composed, learner, family)
        if state is None:
            raise RunError(f"{problem}, and its parameters do not fit. ({error})") from None
        say(f"{problem}. Its learned rule is used, from a fresh initialisation of each seed.", console)
    with memory_errors(composed):
        evaluation.check(learner, state, family, config.eval, seed_list(config))
        result = evaluation.evaluate(learner, state, family, config.eval, seed_list(config))
    folder = run / "evaluations"
    stem = f"{config.eval.split}_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    summary = {config.eval.split: result.summary() | optimality.compare(result, family, config.eval)}
    print_curve(result, summary[config.eval.split], composed, console)
    write_arrays(folder / f"{stem}.npz", result.arrays() | {"seeds": seed_list(config)})
    path = folder / f"{stem}.json"
    head = {"schema_version": SCHEMA_VERSION, "overrides": overrides, "seeds": seed_list(config), "date": now()}
    write_json(path, {**head, "evaluation": summary, **provenance()})
    console.print(f"Written to {path}", soft_wrap=True)
    return path


def diagnose(run: Path, overrides: list[str]) -> Path:
    """`metarl diagnose estimators`, at the parameters of the first seed. Returns the new file."""
    console = Console()
    settings, of_run = diagnosis(overrides)
    composed = from_run(run, of_run, allowed=("env", "device", "precision"))
    configure_jax(composed.config)
    learner, family = build(composed.config)
    import jax

    from metarl_cli import diagnosis as diagnoses
    from metarl_cli.report import figures

    state = jax.tree.map(lambda x: x[0], restore_learner(run, composed, learner, family))
    found = diagnoses.estimators(learner, state, family, settings, lambda text: say(f"{text} ...", console))
    rows = [
        (
            e.episodes,
            e.estimator,
            e.cosine["mean"],
            f"[{e.cosine['ci_low']:.3f}, {e.cosine['ci_high']:.3f}]",
            e.variance,
            1e3 * e.seconds,
        )
        for e in found.estimates
    ]
    where = f"{composed.algo} on {composed.env}, {settings.tasks} tasks"
    title = f"\n{where}: the meta-gradient against one of {settings.reference} episodes of each"
    table(title, ("episodes", "estimator", "cosine", "95% over batches", "relative variance", "ms"), rows, console)
    tell(f"the reference has noise as well: an estimate without error would have a cosine of {found.ceiling:.2f}", console)
    if found.ceiling < 0.5:
        tell("The reference is mostly noise: its cosines tell nothing, whatever their intervals.", console)
    if found.ceiling < 0.9:
        tell(f"Take more episodes for it, reference={4 * settings.reference}, or shorter ones, env.horizon.", console)
    path = run / "diagnoses" / f"estimators_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S-%f}.json"
    reference = {"norm": found.norm, "agreement": found.agreement, "ceiling": found.ceiling}
    content = {"estimates": [e._asdict() for e in found.estimates], "reference": reference}
    head = {"schema_version": SCHEMA_VERSION, "overrides": overrides, "settings": settings.model_dump(), "date": now()}
    write_json(path, {**head, **content, **provenance()})
    figures.save(figures.estimators(found.estimates), path.with_suffix(""))
    console.print(f"Written to {path}", soft_wrap=True)
    return path


@dataclass(repr=False)
class LoadedRun:
    """A trained learner for a notebook.

    `state` has a leading axis `[S]`, one entry per seed: `learner.trial(jax.tree.map(lambda x: x[0], run.state), ...)`.
    """

    path: Path
    config: TrainConfig
    learner: MetaLearner
    family: TaskFamily
    state: Any
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]

    def __repr__(self) -> str:
        return f"LoadedRun({str(self.path)!r}, seeds={seed_list(self.config)}, {type(self.learner).__name__})"


def load(run: str | Path, checkpoint: Literal["last", "best"] = "last") -> LoadedRun:
    """The trained learner of a run, its family and its results; from Python, `metarl_cli.load("runs/...")`.

    Raises:
        RunError: no run there, or a damaged file.
    """
    run = Path(run)
    composed = from_run(run, [f"eval.checkpoint={checkpoint}"], allowed=("eval",))
    configure_jax(composed.config)
    learner, family = build(composed.config)
    state = restore_learner(run, composed, learner, family)
    result = directory.read_result(run)
    return LoadedRun(run, composed.config, learner, family, state, result, MetricsFile(run).read())


Prune = Callable[[list["Point"]], dict["Point", str]]


class Pruned(MetarlError):
    """A point of a sweep that was not worth going on with."""


class Best(NamedTuple):
    """Of each seed the state with the highest mean trial return, as it was when it was scored."""

    learner: Any  # [S, ...]
    score: Any  # [S]
    iteration: Any  # [S] int


class Checkpoint(NamedTuple):
    """What `checkpoints/last` holds; `checkpoints/best` holds a `Best`."""

    train: Any  # TrainState
    best: Best | None  # with eval.every only


class Point:
    """A run while it is being trained, alone or beside others: what is its own. `Session` trains it."""

    state: Any  # TrainState, as it was when the session handed it out

    def __init__(self, run: Path, composed: Composed, learner: MetaLearner, family: TaskFamily, console: Console):
        self.run, self.composed, self.learner, self.family, self.console = run, composed, learner, family, console
        self.config = composed.config
        self.seeds = seed_list(self.config)
        self.best: Best | None = None
        self.metrics = MetricsFile(run)
        self.error: MetarlError | None = None  # what ended it before its time
        self.scores: list[tuple[int, float]] = []  # the metric so far, by meta-iteration: of evaluations, else of training
        self.done = 0
        self.steps = 0  # environment steps per seed
        self.compile_seconds = self.train_seconds = 0.0
        self.trained_steps = 0  # in this process, for the speed
        self.together = 1  # runs in the program
        self.started = time.monotonic()
        self.seconds_before = 0.0  # of the processes that were interrupted
        self.reported: set[int] = set()

    def begin(self, state: Any) -> None:
        """With the state before the first meta-iteration."""
        self.state = state
        self.best = untried(state.learner, len(self.seeds)) if self.config.eval.every else None

    def restore(self) -> None:
        """From the last checkpoint, if there was time for one; the metrics are cut back to it."""
        from metarl_cli import checkpoint

        if checkpoint.latest(self.run, "last") is None and (self.run / "result.json").exists():
            problem = "the run had ended, but its checkpoints are missing, so there is nothing to go on from"
            raise RunError(f"{self.run / 'checkpoints'}: {problem}. Restore them from a copy, or train again.")
        if checkpoint.latest(self.run, "last") is not None:
            saved = Checkpoint(self.state, self.best)
            self.done, (self.state, self.best) = checkpoint.restore(self.run, "last", saved)
            if self.config.iterations < self.done or (
                self.config.iterations == self.done and self.finished() and drawn(self.composed)
            ):
                raise ConfigError(
                    "iterations",
                    self.config.iterations,
                    f"this run has already done {self.done} meta-iterations",
                    hint=f"Extend it with a larger number: metarl resume {self.run} iterations={2 * self.done}",
                )
        if all(at >= 0 for at in self.state.failed_at.tolist()):
            raise RunError(
                f"{self.run}: the training diverged in every seed, so there is nothing to go on with. Train again."
            )
        self.metrics.cut_back(self.done)
        rows = [row for row in self.metrics.read() if "steps" in row]
        self.steps = rows[-1]["steps"] if rows else 0
        self.seconds_before = rows[-1]["seconds"] if rows else 0.0

    def finished(self) -> bool:
        """Whether the result is that of the present state. A shorter run that is being extended has one as well."""
        result = directory.read_result(self.run)
        return result is not None and result["train"]["iterations"] == self.done

    def track(self) -> tracking.Trackers:
        """From here on lines of metrics go to the trackers as well."""
        loggers = self.config.logger if devices.first() else ()
        self.trackers = tracking.Trackers(loggers, self.run, self.composed.resolved, self.done)
        return self.trackers

    def record(self, row: dict[str, Any]) -> None:
        """A line of metrics."""
        self.metrics.write(row)
        self.trackers.log(row)

    def write_rows(self, rows: dict[str, Any], n: int, seconds: float) -> int:
        """Writes the windows that a chunk of n meta-iterations closed, `{name: [ROWS, S]}`. Returns how many."""
        import numpy as np

        log_every = self.config.log_every
        first, last = self.done // log_every, (self.done + n) // log_every
        if self.done + n == self.config.iterations and (self.done + n) % log_every:
            last += 1
        rows = {name: np.asarray(x[: last - first], float) for name, x in rows.items()}
        rate = rows["steps"].sum() / seconds
        for row in range(last - first):
            values = {name: x[row] for name, x in rows.items()}
            self.steps += round(float(np.mean(values.pop("steps"))))
            self.record(
                {
                    "iteration": min((first + row + 1) * log_every, self.config.iterations),
                    "steps": self.steps,
                    **{name: values[name] for name in sorted(values)},
                    "seconds": round(self.seconds(), 3),
                    "steps_per_second": round(rate, 1),
                }
            )
        self.done += n
        self.train_seconds += seconds
        self.trained_steps += int(rows["steps"].sum())
        if not self.config.eval.every:
            closed = [min((first + row + 1) * log_every, self.config.iterations) for row in range(last - first)]
            self.scores += zip(closed, rows[self.config.metric].mean(1).tolist(), strict=True)
        return last - first

    def seconds(self) -> float:
        """That the run has taken, without what was lost between its last line of metrics and an interruption."""
        return self.seconds_before + time.monotonic() - self.started

    def report_failures(self, failed_at: list[int], failed_by: list[int]) -> Diverged | None:
        """Of each seed once. Returns what ends the run, if no seed is left."""
        from metarl_cli.training import quantities

        names = quantities(self.state)
        for i, at in enumerate(failed_at):
            if at >= 0 and i not in self.reported:
                self.reported.add(i)
                which = f"{self.run.name}, " if self.together > 1 else ""
                logging.getLogger("metarl").warning(
                    f"{which}seed {self.seeds[i]}: {names[failed_by[i]]} turned NaN or infinite in meta-iteration "
                    f"{at + 1}; its last good state is kept."
                )
        if any(at < 0 for at in failed_at):
            return None
        return Diverged(
            f"Training diverged: {names[failed_by[0]]} turned NaN or infinite in meta-iteration "
            f"{failed_at[0] + 1} (seed {self.seeds[0]}). The last good state is in {self.run / 'checkpoints'}. "
            "A smaller algo.lr, algo.inner_lr or algo.max_grad_norm may help."
        )

    def save(self) -> None:
        from metarl_cli import checkpoint

        checkpoint.save(self.run, "last", self.done, Checkpoint(self.state, self.best))

    def evaluate(self, check: Callable[[], None] = lambda: None) -> Evaluation:
        """The present state; with `eval.every` it is scored, and each seed keeps its own best."""
        import jax
        import jax.numpy as jnp

        from metarl_cli import checkpoint, evaluation

        learner, settings = self.state.learner, self.config.eval
        result = evaluation.evaluate(self.learner, learner, self.family, settings, self.seeds, check)
        if self.best is None:
            return result
        score = jnp.asarray(result.trial_return.mean(1), float)
        better = score > self.best.score

        def choose(new, old):
            return jnp.where(better.reshape(-1, *[1] * (jnp.ndim(old) - 1)), new, old)

        self.best = jax.tree.map(choose, Best(learner, score, jnp.full(len(self.seeds), self.done)), self.best)
        checkpoint.save(self.run, "best", self.done, self.best)
        mean = result.returns.mean((1, 3))
        scores = {"trial_return": score, "return_before": mean[:, 0], "return_after": mean[:, -1]}
        # A run that was killed after its last evaluation, but before its end, evaluates once more when it is resumed.
        if not any("evaluation" in row and row["iteration"] == self.done for row in self.metrics.read()):
            self.record({"iteration": self.done, "evaluation": {"split": result.split, **scores}})
        self.scores.append((self.done, float(scores[self.config.metric].mean())))
        return result

    def finish(self, check: Callable[[], None], known: Yardsticks) -> None:
        """The final evaluation, the table, the files."""
        from metarl_cli import evaluation, optimality

        self.console.print("evaluating ...")
        result = self.evaluate(check)
        if self.best is not None:
            self.save()
            if self.config.eval.checkpoint == "best":
                state = self.best.learner
                result = evaluation.evaluate(self.learner, state, self.family, self.config.eval, self.seeds, check)
        summary = directory.read_result(self.run) if self.finished() else None
        if summary is None:  # else the run was killed while its figures were drawn
            write_arrays(self.run / "evaluation.npz", result.arrays() | {"seeds": self.seeds})
            found = result.summary() | optimality.compare(result, self.family, self.config.eval, known)
            summary = {**self.result("completed"), "evaluation": {result.split: found}}
            write_json(self.run / "result.json", summary)
        print_curve(result, summary["evaluation"][result.split], self.composed, self.console)
        if self.config.figures:
            self.draw(result, summary["evaluation"][result.split]["curve"])
        speed = summary["train"]
        tell(
            f"\nTrained {speed['steps'] * len(self.seeds):,} steps in {speed['wall_seconds']:.1f} s "
            f"({speed['compile_seconds']:.1f} s of it compiling). Everything is in {self.run}",
            self.console,
        )

    def draw(self, result: Evaluation, curve: list[dict[str, Any]]) -> None:
        """The figures; one that cannot be written is no reason to lose the run."""
        import jax

        from metarl_cli.report import figures

        rows = [row for row in self.metrics.read() if "evaluation" not in row]
        p, k = result.returns.shape[2:]
        if self.family.horizon == 1:  # a single pull says little: the first and the second half of the trial
            moments = [range(p // 2), range(p // 2, p)] if p > 1 else [range(1)]
        else:
            moments = [range(i, i + 1) for i in sorted({0, min(1, p - 1), p - 1})]
        spans = [(m[0] * k + 1, (m[-1] + 1) * k) for m in moments]
        titles = [f"episodes {first} to {last}" if first < last else f"episode {first}" for first, last in spans]
        ends = (
            ("before adaptation", "after adaptation") if k > 1 else ("first episode of a trial", "last episode of a trial")
        )
        tasks = [jax.tree.map(lambda x, i=i: x[i], result.shown_tasks) for i in range(len(result.shown.valid))]

        def moment(i: int, points: range) -> Batch:
            def pick(x):
                x = x[i, points[0] : points[-1] + 1]
                return x.reshape(-1, *x.shape[2:])

            return jax.tree.map(pick, result.shown)

        batches = [[moment(i, points) for points in moments] for i in range(len(tasks))]
        try:
            folder = self.run / "figures"
            if rows:  # else nothing was trained
                figures.save(figures.learning_curve(rows, ends), folder / "learning_curve")
            figures.save(figures.adaptation_curve(curve, label=self.composed.algo), folder / "adaptation_curve")
            who = f", seed {self.seeds[0]}" if len(self.seeds) > 1 else ""
            figures.save(figures.trajectories(self.family, tasks, batches, titles, who), folder / "trajectories")
        except OSError as error:
            logging.getLogger("metarl").warning(f"the figures could not be written: {error}")

    def result(self, status: str) -> dict[str, Any]:
        best = None
        if self.best is not None:
            best = {"iteration": self.best.iteration.tolist(), "trial_return": self.best.score.tolist()}
        return {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "algorithm": self.composed.algo,
            "family": self.composed.env,
            "seeds": self.seeds,
            "failed_seeds": [s for s, at in zip(self.seeds, self.state.failed_at.tolist(), strict=True) if at >= 0],
            "date": now(),
            "overrides": self.composed.overrides,
            "train": {
                "iterations": self.done,
                "runs": self.together,
                "steps": self.steps,
                "steps_per_second": self.trained_steps / max(self.train_seconds, 1e-9),
                "compile_seconds": self.compile_seconds,
                "wall_seconds": self.seconds(),
            },
            "best": best,
            **provenance(),
        }


class Session:
    """Training: one run, or several of the same structure that have come equally far, as one program.

    Args:
        points: the runs. What ends one of several before its time stands in its `error`, and the others go on; where there
            is only one, it is raised.
        prune: called with the points after each chunk; names those that are not worth going on with, and why.
    """

    def __init__(self, points: list[Point], console: Console, prune: Prune = lambda points: {}):
        from metarl_cli import training

        self.console, self.prune, self.config = console, prune, points[0].config
        self.alone = len(points) == 1
        self.arrange(points)
        seeds = [seed for point in points for seed in point.seeds]
        with memory_errors(points[0].composed):
            self.check(seeds)
            self.state = training.init(self.learner, self.family, seeds, self.swept)
        for point, state in zip(points, training.split(self.state, self.sizes), strict=True):
            point.together = len(points)
            point.begin(state)
        self.done = 0
        self.compile_seconds = 0.0
        self.saved, self.save_seconds = time.monotonic(), 0.0

    def arrange(self, points: list[Point]) -> None:
        """Side by side on the axis of seeds."""
        from metarl_cli import training

        self.points, self.sizes = points, [len(point.seeds) for point in points]
        pairs = [(point.learner, point.family) for point in points]
        self.learner, self.family, self.swept = training.together(pairs, self.sizes)

    def check(self, seeds: list[int]) -> None:
        """Raises `MemoryError` where training or evaluation cannot fit. Nothing is computed nor compiled."""
        import jax

        from metarl_cli import evaluation, training

        state = jax.eval_shape(lambda: training.init(self.learner, self.family, seeds, self.swept))
        program = training.train_chunk.trace(*self.arguments(state, 1)).jaxpr
        footprint.check(footprint.footprint(program) // devices.memories(), "A meta-iteration")
        point = max(self.points, key=lambda point: len(point.seeds))  # they are evaluated one by one
        own = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(point.seeds), *x.shape[1:]), x.dtype), state.learner)
        evaluation.check(point.learner, own, point.family, point.config.eval, point.seeds)

    def take_up(self) -> None:
        """The states that the runs have."""
        from metarl_cli import training

        self.state = training.join([point.state for point in self.points])

    def restore(self) -> None:
        for point in self.points:
            point.restore()
        self.take_up()
        self.done = self.points[0].done

    def alive(self) -> list[Point]:
        return [point for point in self.points if point.error is None]

    def hand_out(self) -> None:
        """To each run that goes on its own part of the state."""
        from metarl_cli import training

        for point, state in zip(self.points, training.split(self.state, self.sizes), strict=True):
            if point.error is None:
                point.state = state

    def go_on(self) -> None:
        """Trains to the end, evaluates and writes the results."""
        with contextlib.ExitStack() as stack:
            check = stack.enter_context(catch_signals(self.points[0].run))
            stack.enter_context(memory_errors(self.points[0].composed))
            for point in self.points:
                stack.enter_context(contextlib.closing(point.track()))
            self.train(check)
            known: Yardsticks = {}
            for point in self.alive():
                with self.ends(point):
                    point.finish(check, known)

    @contextlib.contextmanager
    def ends(self, point: Point) -> Iterator[None]:
        """What is wrong with one of several runs is no matter of the others; what is said of it goes into its own log."""
        if self.alone:
            yield
            return
        with log_to(point.run, Console(quiet=True)):
            try:
                yield
            except Interrupted:
                raise
            except MetarlError as error:
                point.error = error
                point.metrics.close()

    def train(self, check: Callable[..., None]) -> None:
        import jax.numpy as jnp

        from metarl_cli import training

        total, log_every, every = self.config.iterations, self.config.log_every, self.config.eval.every
        if self.done >= total:
            return
        with Progress(total, self.console) as progress:
            progress.status("compiling")
            chunk = self.compile()
            length = 1
            while self.done < total and self.alive():
                check(self.save)
                n = min(length, total - self.done, training.ROWS * log_every - self.done % log_every)
                if every:
                    n = min(n, every - self.done % every)
                began = time.monotonic()
                self.state, rows = chunk(self.state, n)
                rows = {name: jnp.asarray(x) for name, x in rows.items()}
                failed = self.state.failed_at.tolist()  # waits for the chunk
                seconds = time.monotonic() - began
                self.write_rows(rows, n, seconds, progress)
                self.report_failures(failed)
                # Doubled at most: the first chunk's time says little.
                length = devices.agree(max(1, min(2 * length, int(CHUNK_SECONDS * n / seconds))))
                if every and self.done % every == 0 and self.done < total:
                    progress.status("evaluating")
                    self.hand_out()
                    for point in self.alive():
                        with self.ends(point):
                            point.evaluate()
                if self.done < total:
                    self.end([(point, Pruned(why)) for point, why in self.prune(self.alive()).items()], "pruned")
                    if self.pays_to_shrink(seconds / n):
                        progress.status("compiling")
                        chunk = self.shrink()
                # Where the states of many runs take long to write, it is done more seldom.
                often = SAVE_SECONDS if self.alone else max(SAVE_SECONDS, 10 * self.save_seconds)
                if time.monotonic() - self.saved > often:
                    self.save()
            self.save()

    def compile(self) -> Callable[[Any, int], tuple[Any, Any]]:
        """`(state, n) -> (state, rows)`, n meta-iterations of all runs."""
        import jax

        from metarl_cli import training

        began = time.monotonic()
        self.state = devices.place(self.state)
        # Saves a fifth of the compile time or more at the same speed: on a CPU the matrix products are not LLVM's.
        options: Any = {"xla_backend_optimization_level": 2} if jax.default_backend() == "cpu" else None
        chunk = training.train_chunk.trace(*self.arguments(self.state, 1)).lower().compile(options)
        self.compile_seconds = time.monotonic() - began
        for point in self.points:
            point.compile_seconds += self.compile_seconds
        if sizes := chunk.memory_analysis():  # not every backend knows
            needed = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
            footprint.check(needed * devices.count() // devices.memories(), "A meta-iteration")
        return lambda state, n: chunk(*self.arguments(state, n))

    def arguments(self, state: Any, n: int) -> tuple[Any, ...]:
        """Of `train_chunk`, for n meta-iterations of all runs."""
        import jax.numpy as jnp

        counts = (jnp.asarray(x) for x in (n, self.config.iterations, self.config.log_every))
        return state, self.learner, self.family, *counts, self.swept

    def write_rows(self, rows: dict[str, Any], n: int, seconds: float, progress: Progress) -> None:
        import numpy as np

        host = {name: np.asarray(x) for name, x in rows.items()}
        before, after, steps = [], [], 0
        for point, part in self.parts():
            own = {name: x[:, part] for name, x in host.items()}
            with self.ends(point):
                closed = point.write_rows(own, n, seconds)
                if closed:
                    before += own["return_before"][closed - 1].tolist()
                    after += own["return_after"][closed - 1].tolist()
                    steps += int(own["steps"].sum())
        self.done += n
        if before:
            alive = np.isfinite(before)  # a failed seed has no numbers
            first, last = (float(np.asarray(x)[alive].mean()) if alive.any() else float("nan") for x in (before, after))
            progress.update(self.done, first, last, steps / seconds)

    def parts(self) -> list[tuple[Point, slice]]:
        """The runs that go on, and where on the axis of seeds each stands."""
        ends = itertools.accumulate(self.sizes)
        parts = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        return [(point, part) for point, part in zip(self.points, parts, strict=True) if point.error is None]

    def report_failures(self, failed_at: list[int]) -> None:
        """A run without a seed that is left ends; the others go on."""
        if any(at >= 0 for at in failed_at):
            failed_by = self.state.failed_by.tolist()
            errors = [(point, point.report_failures(failed_at[part], failed_by[part])) for point, part in self.parts()]
            self.end([(point, error) for point, error in errors if error is not None], "diverged")

    def end(self, points: list[tuple[Point, MetarlError]], status: str) -> None:
        """Ends some of the runs in the state that they have."""
        if points:
            self.hand_out()
        for point, error in points:
            with self.ends(point):
                point.save()
                write_json(point.run / "result.json", point.result(status) | {"message": str(error)})
                raise error

    def pays_to_shrink(self, iteration_seconds: float) -> bool:
        """Whether a smaller program, without the runs that have ended, would save more time than it takes to compile."""
        left = len(self.alive()) / len(self.points)
        return (
            0 < left <= 0.5 and (1 - left) * iteration_seconds * (self.config.iterations - self.done) > self.compile_seconds
        )

    def shrink(self) -> Callable[[Any, int], tuple[Any, Any]]:
        self.hand_out()
        self.arrange(self.alive())
        self.take_up()
        return self.compile()

    def save(self) -> None:
        began = time.monotonic()
        self.hand_out()
        for point in self.alive():
            with self.ends(point):
                point.save()
        self.saved = time.monotonic()
        self.save_seconds = self.saved - began


def drawn(composed: Composed[TrainConfig]) -> bool:
    """Whether the figures are there that a run is to have; `Point.draw` writes this one last."""
    return not composed.config.figures or (composed.run_dir / "figures" / "trajectories.png").exists()


def untried(learner: Any, seeds: int) -> Best:
    import jax
    import jax.numpy as jnp

    return Best(jax.tree.map(jnp.copy, learner), jnp.full(seeds, -jnp.inf), jnp.zeros(seeds, int))


def restore_learner(run: Path, composed: Composed, learner: MetaLearner, family: TaskFamily) -> Any:
    """What was learned, `[S, ...]`, from the checkpoint that `eval.checkpoint` names.

    Only the shapes of a fresh state are computed. The rest of a state may be of other shapes, and is not restored.
    """
    import jax

    from metarl_cli import training

    seeds = seed_list(composed.config)
    state = jax.eval_shape(lambda: training.init(learner, family, seeds))
    return _restore(run, composed, learner.learned(state.learner))


def restore_rule(run: Path, composed: Composed, learner: MetaLearner, family: TaskFamily) -> Any:
    """A learned rule as `restore_learner` has it, all else as it is before training; None where nothing is portable.

    Raises:
        Misfit: the rule itself was changed.
    """
    import jax

    from metarl_cli import training

    fresh = learner.learned(training.init(learner, family, seed_list(composed.config)).learner)
    portable = learner.portable(fresh)
    if portable is None:
        return None
    rule = _restore(run, composed, portable)
    return jax.tree.map(lambda x, y: y if x is None else x, rule, fresh, is_leaf=lambda x: x is None)


def _restore(run: Path, composed: Composed, learned: Any) -> Any:
    """The leaves of `learned` from the checkpoint that `eval.checkpoint` names."""
    from metarl_cli import checkpoint, training

    if composed.config.eval.checkpoint == "best":
        return checkpoint.restore(run, "best", Best(learned, None, None), part=True)[1].learner
    nothing = training.TrainState(*[None] * len(training.TrainState._fields))._replace(learner=learned)  # type: ignore[arg-type]
    return checkpoint.restore(run, "last", Checkpoint(nothing, None), part=True)[1].train.learner


def seed_list(config: RunConfig) -> list[int]:
    return list(range(config.seed, config.seed + config.seeds))


# --- where and how


def configure_jax(config: RunConfig) -> None:
    """Device, precision and the persistent compilation cache; before the first computation.

    Raises:
        ConfigError: the device is not there.
    """
    import jax

    jax.config.update("jax_enable_x64", config.precision == "float64")
    jax.config.update("jax_default_matmul_precision", {"bfloat16": "bfloat16"}.get(config.precision, "highest"))
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or f"{cache}/metarl/jax")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    devices.start(getattr(config, "devices", "one"), getattr(config.algo, "meta_batch", None))
    # `config` has told JAX already, unless this process computed before: a notebook, or a sweep over devices.
    elsewhere = config.device == "cpu" and jax.default_backend() != "cpu"
    jax.config.update("jax_default_device", jax.devices("cpu")[0] if elsewhere else None)
    if config.device == "gpu" and jax.default_backend() != "gpu":
        raise ConfigError(
            "device",
            config.device,
            f"JAX finds no such device, only {jax.default_backend()}",
            hint="Take device=cpu, or install the GPU build of JAX (README, 'GPU').",
        )


@contextlib.contextmanager
def catch_signals(run: Path) -> Iterator[Any]:
    """Within the block Ctrl-C and SIGTERM only set a flag; the yielded `check(save)` acts on it between XLA calls.

    A second one ends the process at once. SIGUSR2 is caught where somebody waits for it already, who gets it when the state
    is saved: on Slurm it says that the time of the job is nearly up, and submitit puts the job into the queue again.
    """
    caught = [signal.SIGINT, signal.SIGTERM]
    if callable(warned := signal.getsignal(signal.SIGUSR2)):
        caught.append(signal.SIGUSR2)
    received: list[int] = []

    def receive(signum: int, frame: Any) -> None:
        received.append(signum)

    def check(save: Any = None) -> None:
        if signum := devices.most(max(received, default=0)):
            if save is not None:
                save()
            if signum == signal.SIGUSR2:
                received.clear()
                warned(signal.SIGUSR2, None)  # type: ignore[operator]
            else:
                raise Interrupted(run, signum)

    try:
        previous = {s: signal.signal(s, receive) for s in caught}
    except ValueError:  # not in the main thread: somebody else's signals
        yield check
        return
    # Python's own handlers wait for the end of an XLA call, or of a compilation. The bytes that the C part of Python writes
    # come at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    listener = threading.Thread(target=_listen, args=(reader,), daemon=True)
    listener.start()
    others = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield check
    finally:
        signal.set_wakeup_fd(others)
        os.close(writer)
        listener.join()
        os.close(reader)
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _listen(reader: int) -> None:
    """Says that a signal was heard; ends the process at the second one. Each is one byte, its number."""
    heard = False
    while signum := os.read(reader, 1):
        if signum[0] not in (signal.SIGINT, signal.SIGTERM):
            continue
        if heard:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), b"\033[?25h\n")  # the progress bar had hidden the cursor
            os._exit(128 + signum[0])
        heard = True
        print("\nStopping after this chunk; once more to end at once.", file=sys.stderr, flush=True)


# --- memory


class OutOfMemory(MetarlError):
    """Names the settings that decide how much memory a run takes."""

    def __init__(self, composed: Composed, problem: str):
        known = dict(catalogue.leaves(composed.resolved))
        lower = [key for key in ("seeds", "algo.meta_batch", "algo.episodes", "env.horizon", "env.n") if known.get(key)]
        lower += ["algo.task_batch=1"] if "algo.task_batch" in known and known["algo.task_batch"] != 1 else []
        now = ", ".join(f"{key}={known[key]}" if "=" not in key else f"or take {key}" for key in lower)
        more = f", or raise algo.minibatches={known['algo.minibatches']}" if "algo.minibatches" in known else ""
        super().__init__(f"{problem} Lower one of {now}{more}; for the evaluation eval.tasks and eval.episodes.")


@contextlib.contextmanager
def memory_errors(composed: Composed) -> Iterator[None]:
    """What does not fit, or goes beyond the memory all the same, in our words."""
    import jax

    try:
        yield
    except MemoryError as error:  # `footprint.check` says more than others
        raise OutOfMemory(composed, str(error) if "needs" in str(error) else "There is not enough memory.") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(composed, "There is not enough memory on the device.") from error


# --- files


def make_directory(composed: Composed) -> Path:
    """The new run's directory. One that was asked for has to be empty; the default gets a suffix where two runs meet.

    Raises:
        ConfigError: it is in use, cannot be written, or its disk is full.
    """
    run, key = composed.run_dir, "hydra.run.dir"
    if not composed.run_dir_given:
        original, n = run, 1
        while run.exists():
            n += 1
            run = original.with_name(f"{original.name}-{n}")
    elif run.exists() and (not run.is_dir() or not directory.empty(run)):
        if (run / "config.yaml").exists():
            raise ConfigError(key, run, "already in use", hint="Take another directory, or `metarl resume` to go on there.")
        raise ConfigError(key, run, "not an empty directory, and no run either", hint="Take another one.")
    created = [path for path in [run, *run.parents] if not path.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe = run / ".probe"
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(run).free
    except OSError as error:
        _remove_empty(created)
        raise ConfigError(key, run, f"cannot be written ({error.strerror})", hint="Take another directory.") from error
    if free < FREE_BYTES:
        _remove_empty(created)
        raise ConfigError(key, run, f"only {free / 1e6:.0f} MB are free on this disk, a run needs {FREE_BYTES / 1e6:.0f} MB")
    return run


@contextlib.contextmanager
def own_directory(run: Path, copy: bool) -> Iterator[Path]:
    """The run directory. Of several processes only the first writes there, the others into one that is thrown away."""
    with contextlib.ExitStack() as stack:
        if not devices.first():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metarl-")))
            run = Path(shutil.copytree(run, folder / "run")) if copy else folder / "run"
        devices.agree(0)  # nobody writes before all have their copy
        yield run


def _remove_empty(created: list[Path]) -> None:
    for path in created:
        with contextlib.suppress(OSError):
            path.rmdir()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing; NaN and infinity are written as null, as in metrics.jsonl."""
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(exist_ok=True)
        new.write_text(json.dumps(plain(content), indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}. Check the free space.") from error


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    import numpy as np

    try:
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(path, **arrays)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}. Check the free space.") from error


# --- what is printed and recorded


def print_curve(result: Evaluation, summary: dict[str, Any], composed: Composed, console: Console) -> None:
    s, n, _, k = result.returns.shape
    curve = summary["curve"]
    rows = [
        (p["episodes"], round(p["steps"]), p["mean"], f"[{p['ci_low']:.2f}, {p['ci_high']:.2f}]", p["iqm"])
        for p in (curve if len(curve) <= 12 else [*curve[:5], *curve[-5:]])
    ]
    over = curve[0]["interval_over"]
    title = f"\n{composed.algo} on {composed.env}, {n} {result.split} tasks, {s} seed{'s' if s > 1 else ''}"
    table(title, ("episodes", "steps", "return", f"95% over {over}", "iqm"), rows, console)
    total = summary["trial_return"]
    tell(
        f"trial return (sum over {result.returns.shape[2] * k} episodes): "
        f"{total['mean']:.2f} [{total['ci_low']:.2f}, {total['ci_high']:.2f}]",
        console,
    )
    if "optimum" in summary:
        from metarl_cli.optimality import describe

        tell(describe(summary["optimum"]), console)


def provenance() -> dict[str, Any]:
    import jax

    device: Any = jax.config.jax_default_device or jax.local_devices()[0]  # type: ignore[attr-defined]
    packages = ("metarl", "jax", "jaxlib", "flax", "optax", "gymnax", "numpy", "hydra-core", "orbax-checkpoint")
    stats = device.memory_stats() or {}
    return {
        "memory": {
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            "peak_device_bytes": stats.get("peak_bytes_in_use"),
        },
        "device": {"platform": device.platform, "kind": device.device_kind, "cores": devices.cores()},
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "git_revision": git_revision(),
    }


def git_revision() -> str | None:
    """Of the source tree that metarl runs from, if it is one; `-dirty` if it has changes."""
    tree = Path(__file__).parents[1]
    if not (tree / ".git").exists():  # an installed metarl may lie within the repository of somebody else
        return None
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
