"""Sweeps: points side by side are points alone; what has ended is not run again; searches go on where they stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from probes import assert_close
from running import (
    GROUPS,
    TRAINED,
    assert_same_run,
    build,
    checkpoint_arrays,
    hasty_compiler,
    metarl,
    no_figures,
    own_configs,
    result,
    rows,
    run_chunks,
    small,
    walker,
)

from metarl_cli import catalogue, config, optimality, runner, search, sweep, training
from metarl_cli.core.errors import ConfigError


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    with hasty_compiler():
        yield


@pytest.fixture(autouse=True)
def bare_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without figures and optimum, in an empty directory."""
    no_figures(monkeypatch)
    monkeypatch.setattr(optimality, "compare", lambda *_: {})
    monkeypatch.chdir(tmp_path)


def swept(directory: str, *more: str) -> int:
    """A sweep of the walker."""
    lines = walker("seeds=2", "iterations=6", "log_every=2", "precision=float64", "eval.every=3")
    return metarl("train", "-m", f"--config-dir={own_configs(Path())}", *lines, f"hydra.sweep.dir={directory}", *more)


RATES = ("algo.lr=0.5,1.0", "seed=0,7")
POINTS = [f"algo.lr={lr},seed={seed}" for lr in (0.5, 1.0) for seed in (0, 7)]
VMAP = "hydra/launcher=vmap"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One after another, as ordinary runs."""
    directory = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        no_figures(patch)
        patch.setattr(optimality, "compare", lambda *_: {})
        patch.chdir(directory)
        assert swept("sweep", *RATES) == 0
    return directory / "sweep"


def content(directory: str | Path) -> dict[str, Any]:
    return json.loads((Path(directory) / "sweep.json").read_text())


def assert_equal_runs(actual: Path, expected: Path) -> None:
    """As two programs that compute the same can be: the same actions, other roundings."""
    assert_close(checkpoint_arrays(actual), checkpoint_arrays(expected))
    for one, other in zip(rows(actual), rows(expected), strict=True):
        assert one.keys() == other.keys()
        flat, wanted = (dict(catalogue.leaves(row)) for row in (one, other))
        for key, value in wanted.items():
            assert flat[key] == (pytest.approx(value, rel=1e-6, abs=1e-9) if key != "evaluation.split" else value), key
    for key in ("status", "seeds", "failed_seeds"):
        assert result(actual)[key] == result(expected)[key]
    assert result(actual)["evaluation"].keys() == result(expected)["evaluation"].keys()
    with np.load(actual / "evaluation.npz") as a, np.load(expected / "evaluation.npz") as b:
        assert_close(dict(a), dict(b))


# --- several runs in one program


DIFFERENT = {
    ("maml", "point_nav"): ["algo.lr=0.01", "algo.inner_lr=0.1", "env.wind=0.02", "algo.gamma=0.95"],
    ("rl2", "bandit"): ["algo.lr=0.01", "algo.gamma=0.9", "algo.clip=0.1"],
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("algo", "env"), DIFFERENT)
def test_points_side_by_side_are_points_alone(algo: str, env: str) -> None:
    """After two meta-iterations, in float64; the learned inner step shows that the first state has its own floats, too."""
    more = ["algo.learned_lr=true", "algo.outer=vpg", "env.published=null"] if algo == "maml" else []
    every = [small(algo, env, *more, "seeds=1"), small(algo, env, *more, *DIFFERENT[algo, env], "seeds=2", "seed=5")]
    candidates = [
        sweep.Candidate(config.compose(lines), *build(lines)[1:], 0)  # type: ignore[arg-type]
        for lines in every
    ]
    (group,) = sweep.groups(candidates)
    seeds, sizes = [0, 5, 6], [1, 2]
    learner, family, leaves = training.together([(x.learner, x.family) for x in group], sizes)
    assert len(leaves) == len(DIFFERENT[algo, env]) and all(x.shape == (3,) for x in leaves.values())
    state, found = run_chunks(training.init(learner, family, seeds, leaves), learner, family, [2], total=2, swept=leaves)
    first = 0
    for candidate, part in zip(group, training.split(state, sizes), strict=True):
        own = seeds[first : first + len(part.key)]
        start = training.init(candidate.learner, candidate.family, own)
        expected, windows = run_chunks(start, candidate.learner, candidate.family, [2], total=2)
        assert_close(part.learner, expected.learner)
        # atol: the loss of MAML is 0 but for rounding, before the first outer step.
        assert_close({name: x[:, first : first + len(own)] for name, x in found.items()}, windows, atol=1e-12)
        np.testing.assert_array_equal(jax.random.key_data(part.key), jax.random.key_data(expected.key))
        first += len(own)
    rejoined = training.join(training.split(state, sizes))
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), rejoined) == jax.tree.map(
        lambda x: (x.shape, str(x.dtype)), state
    )


def test_what_has_the_same_structure() -> None:
    """Seeds and floats may differ, of the learner and of the family; an int or a name makes another program."""
    lines = [
        ["algo=rl2", "env=bandit"],
        ["algo=rl2", "env=bandit", "seed=4", "algo.lr=0.1", "eval.adapt.decay=0.1"],
        ["algo=rl2", "env=bandit", "algo.meta_batch=64"],
        ["algo=rl2", "env=bandit", "iterations=3"],
        ["algo=rl2", "env=cartpole"],
        ["algo=rl2", "env=cartpole", "seed=1"],
        ["algo=rl2", "env=point_nav", "env.published=null"],
        ["algo=rl2", "env=point_nav", "env.published=null", "env.size=0.3"],
    ]
    candidates = [sweep.Candidate(config.compose(each), *build(each)[1:], 0) for each in lines]  # type: ignore[arg-type]
    found = [[lines.index(x.composed.overrides) for x in group] for group in sweep.groups(candidates)]
    assert found == [[0, 1], [2], [3], [4, 5], [6, 7]]
    assert len(sweep.groups([candidates[0], candidates[1]._replace(done=3)])) == 2


def test_one_program_for_all(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert swept("sweep", *RATES, VMAP) == 0
    assert "4 runs in one program" in capsys.readouterr().out
    for name in POINTS:
        assert result(Path("sweep") / name)["train"]["runs"] == 4
        assert_equal_runs(Path("sweep") / name, alone / name)
    theirs, ours = content("sweep"), content(alone)
    assert [point["run"] for point in ours["points"]] == POINTS
    assert [{**point, "metric": None} for point in theirs["points"]] == [{**p, "metric": None} for p in ours["points"]]
    assert [p["metric"] for p in theirs["points"]] == pytest.approx([p["metric"] for p in ours["points"]])
    assert {p.name for p in Path("sweep/figures").iterdir()} == {"sweep.svg", "sweep.png"}


def test_an_interrupted_program_goes_on_alone_and_together(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the signal every point can be resumed by itself; the same command takes up the others, from where they are."""
    original = runner.Session.report_failures

    def interrupt(session: runner.Session, failed_at: list[int]) -> None:
        original(session, failed_at)
        if session.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner, "CHUNK_SECONDS", 0)
    monkeypatch.setattr(runner.Session, "report_failures", interrupt)
    assert swept("sweep", *RATES, VMAP) == 143
    monkeypatch.setattr(runner.Session, "report_failures", original)
    assert not list(Path("sweep").glob("*/result.json"))
    assert metarl("resume", Path("sweep") / POINTS[2]) == 0
    trained: list[list[str]] = []
    go_on = runner.Session.go_on
    monkeypatch.setattr(
        runner.Session, "go_on", lambda self: (trained.append([p.run.name for p in self.points]), go_on(self))[1]
    )
    assert swept("sweep", *RATES, VMAP) == 0
    assert trained == [[POINTS[0], POINTS[1], POINTS[3]]]
    for name in POINTS:
        assert_equal_runs(Path("sweep") / name, alone / name)


def test_a_point_that_diverges_alone_stands_still(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It keeps its last good state and its message; the others end as without it."""
    breaks = ("algo.breaks=loss", "algo.breaks_at=2", "seed=3")
    assert swept("sweep", *breaks, "algo.luckier_than=-1.0,2.0", VMAP) == 1
    assert "algo.luckier_than=-1.0, seed 4: loss turned NaN or infinite" in caplog.text
    err = capsys.readouterr().err
    assert "luckier_than=-1.0: diverged: Training diverged: loss turned NaN or infinite in meta-iteration 3" in err
    broken, healthy = (Path("sweep") / f"algo.luckier_than={x}" for x in ("-1.0", "2.0"))
    assert result(broken)["status"] == "diverged" and result(broken)["failed_seeds"] == [3, 4]
    assert [point["status"] for point in content("sweep")["points"]] == ["diverged", "completed"]
    assert content("sweep")["points"][0]["metric"] is None
    assert swept("alone", *breaks, "algo.luckier_than=2.0") == 0
    assert_equal_runs(healthy, Path("alone") / "point")
    assert swept("sweep", *breaks, "algo.luckier_than=-1.0,2.0", VMAP) == 1  # and is not tried again
    assert "diverged: Training diverged" in capsys.readouterr().err


def test_what_does_not_fit_in_memory_becomes_several_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = runner.Session.compile

    def compile(session: runner.Session) -> Any:
        if len(session.points) > 2:
            raise runner.OutOfMemory(session.points[0].composed, "Too much.")
        return original(session)

    monkeypatch.setattr(runner.Session, "compile", compile)
    assert swept("sweep", "algo.lr=0.5,1.0,2.0", "iterations=2", VMAP) == 0
    assert "3 runs in one program do not fit in memory; trying 2" in capsys.readouterr().out
    assert [result(Path(f"sweep/algo.lr={lr}"))["train"]["runs"] for lr in (0.5, 1.0, 2.0)] == [2, 2, 1]


def test_runs_that_ended_leave_a_program_that_is_worth_it(monkeypatch: pytest.MonkeyPatch, alone: Path) -> None:
    monkeypatch.setattr(runner, "CHUNK_SECONDS", 0)
    monkeypatch.setattr(runner.Session, "pays_to_shrink", lambda self, _: len(self.alive()) < len(self.points))

    def worse(_: Any) -> runner.Prune:
        return lambda points: {p: "too slow" for p in points if p.done == 3 and p.config.algo.lr == 0.5}  # type: ignore[attr-defined]

    monkeypatch.setattr(search, "pruner", worse)
    assert swept("sweep", *RATES, VMAP) == 0
    assert [point["status"] for point in content("sweep")["points"]] == ["pruned", "pruned", "completed", "completed"]
    assert content("sweep")["points"][0]["message"] == "too slow"
    assert result(Path("sweep") / POINTS[0])["train"]["iterations"] == 3
    for name in POINTS[2:]:
        assert_equal_runs(Path("sweep") / name, alone / name)


# --- the same command again


def test_what_has_ended_is_not_run_again(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(alone)
    monkeypatch.chdir(alone.parent)
    monkeypatch.setattr(runner.Session, "go_on", lambda _: pytest.fail("a run was started"))
    assert swept("sweep", *RATES) == 0
    assert content(alone)["points"] == before["points"]


def test_an_interrupted_run_goes_on(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another: the signal stops the sweep; the same command ends it, bit by bit as without."""
    original = runner.Session.report_failures

    def interrupt(session: runner.Session, failed_at: list[int]) -> None:
        original(session, failed_at)
        if session.config.algo.lr == 1.0 and session.done == 3:
            monkeypatch.setattr(runner.Session, "report_failures", original)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner.Session, "report_failures", interrupt)
    monkeypatch.setattr(runner, "CHUNK_SECONDS", 0)
    assert swept("sweep", "algo.lr=0.5,1.0", "seed=7") == 143
    assert [path.parent.name for path in Path("sweep").glob("*/result.json")] == ["algo.lr=0.5"]
    assert swept("sweep", "algo.lr=0.5,1.0", "seed=7") == 0
    for lr in (0.5, 1.0):
        assert_same_run(Path(f"sweep/algo.lr={lr}"), alone / f"algo.lr={lr},seed=7")


def test_one_failure_stops_no_other_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: runner.Point, *args: Any) -> None:
        raise ZeroDivisionError("of all things")

    original = runner.Point.finish
    monkeypatch.setattr(
        runner.Point, "finish", lambda self, *args: (fail if self.config.seed == 4 else original)(self, *args)
    )
    assert swept("sweep", "seed=4,5", "iterations=1") == 1
    out, err = capsys.readouterr()
    assert "2 runs, 1 failed" in out
    assert (
        "seed=4: failed: ZeroDivisionError: of all things. This is a bug; the stack trace is in sweep/seed=4/log.txt" in err
    )
    assert "of all things" in Path("sweep/seed=4/log.txt").read_text()
    assert [point["status"] for point in content("sweep")["points"]] == ["failed", "completed"]


def test_a_directory_with_other_settings_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert swept("sweep", "seed=4,5", "iterations=0") == 0
    assert swept("sweep", "seed=4,5", "iterations=0", "algo.lr=0.25") == 1
    err = capsys.readouterr().err
    assert "sweep/seed=4: holds a run with other settings (algo.lr). Remove it, or name another directory" in err


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["algo=maml,rl2", "seed=range(8)"], "algo=maml,rl2,seed=range-8-~"),
        (["algo.lr=1e-3"], "algo.lr=1e-3"),
        (["a=../../b"], "a=..-..-b~"),
        (["x=" + "y" * 200], "x=" + "y" * 108 + "~"),
    ],
)
def test_names_are_safe(lines: list[str], name: str) -> None:
    found = config.file_name(lines)
    assert found.startswith(name) and len(found) <= 120 and "/" not in found
    assert found == name or len(found) == len(name) + 8


# --- searches


def searching(storage: str, sampler: str, trials: int = 12, **space: str) -> search.Search:
    return search.Search(parsed(**space), storage, sampler, "none", "maximize", trials, seed=0)


def parsed(**space: str) -> dict[str, Any]:
    with config._hydra() as hydra:
        overrides = {key: config._parse(f"{key}={text}", {}, hydra) for key, text in space.items()}
        return {key: search.distribution(override) for key, override in overrides.items()}


INTERVALS = {"x": "interval(-1.0,1.0)", "y": "tag(log,interval(1e-3,1e1))"}
CHOICES = {"x": "range(0,3)", "y": "a,b"}


def live(found: search.Search, most: int, batch: int = 1) -> list[dict[str, Any]]:
    """Trials of a search, told how far they are from x=0.3, y=0.1."""
    seen: list[dict[str, Any]] = []
    while len(seen) < most and (trials := found.ask(min(batch, most - len(seen)))):
        for trial in trials:
            x, y = trial.params["x"], trial.params["y"]
            value = -((x - 0.3) ** 2) - (np.log10(y) + 1) ** 2 if isinstance(y, float) else float(x)
            found.tell(trial, "completed", value)
            seen.append(trial.params)
    return seen


@pytest.mark.parametrize(("sampler", "space"), [(s, CHOICES if s == "grid" else INTERVALS) for s in search.SAMPLERS])
def test_a_search_goes_on_and_repeats_nothing(sampler: str, space: dict[str, str]) -> None:
    """Stopped after 4 trials, with one that was running: that one first, then new ones only, up to the number in all."""
    storage = f"sqlite:///{Path(f'{sampler}.db').absolute()}"
    trials = 6 if sampler == "grid" else 10
    first = searching(storage, sampler, trials, **space)
    seen = live(first, 4)
    (running,) = first.ask(1)
    again = searching(storage, sampler, trials, **space)
    (resumed,) = again.ask(1)
    assert resumed.number == running.number and resumed.params == running.params
    again.tell(resumed, "completed", 0.0)
    rest = live(again, 100, batch=3)
    every = [*seen, running.params, *rest]
    assert len(every) == trials == len({tuple(params.items()) for params in every})
    assert searching(storage, sampler, trials, **space).ask(1) == []


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_a_search_finds_the_optimum(sampler: str) -> None:
    """In the last of 60 trials it is closer to it than chance is: E|x - 0.3| of chance is 0.59 here, E|log y + 1| = 1.25."""
    seen = live(searching(f"sqlite:///{Path('s.db').absolute()}", sampler, 60, **INTERVALS), 60, batch=6)[-12:]
    assert np.mean([abs(params["x"] - 0.3) for params in seen]) < 0.35
    assert np.mean([abs(np.log10(params["y"]) + 1) for params in seen]) < 0.75


@pytest.mark.parametrize(
    ("sampler", "space", "message"),
    [
        ("cma", INTERVALS, r"hydra\.sweeper\.sampler=cma: no such choice\. Allowed: tpe, cmaes, random, grid"),
        ("grid", INTERVALS, r"hydra\.sweeper\.sampler=grid: x is an interval"),
        ("cmaes", CHOICES, r"hydra\.sweeper\.sampler=cmaes: y is no interval"),
        ("cmaes", {"x": "interval(0,1)"}, r"needs two parameters"),
        ("tpe", {"x": "interval(1,0)"}, r"x=interval\(1,0\): is no interval"),
        ("tpe", {}, r"hydra/sweeper=optuna: has nothing to search"),
    ],
)
def test_mistakes_in_a_search(sampler: str, space: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        searching(f"sqlite:///{Path('s.db').absolute()}", sampler, **space).ask(1)


def test_a_study_holds_one_space() -> None:
    storage = f"sqlite:///{Path('s.db').absolute()}"
    live(searching(storage, "tpe", 2, **INTERVALS), 2)
    assert len(searching(storage, "tpe", 3, **INTERVALS).ended) == 2
    for other in ({**INTERVALS, "x": "interval(-1.0,2.0)"}, {"x": INTERVALS["x"]}):
        with pytest.raises(ConfigError, match="holds a search of another space"):
            searching(storage, "cmaes", 3, **other)


def test_spaces() -> None:
    space = parsed(
        a="int(interval(1,8))", b="tag(log,interval(1e-4,1e-2))", c="range(2,9,3)", d="x,1,2.5", e="interval(0.0,1)"
    )
    assert str(space["a"]) == "IntDistribution(high=8, log=False, low=1, step=1)"
    assert str(space["b"]) == "FloatDistribution(high=0.01, log=True, low=0.0001, step=None)"
    assert list(search.steps("c", space["c"])) == [2, 5, 8] and search.steps("d", space["d"]) == ("x", 1, 2.5)
    assert str(space["e"]) == "FloatDistribution(high=1.0, log=False, low=0.0, step=None)"
    scale = search.scale("b", space["b"])
    assert scale.outward(0.5) == pytest.approx(1e-3) and scale.inward(1e-3) == pytest.approx(0.5)
    assert search.scale("a", space["a"]).outward(1.2) == 8


class Runs:
    """What a pruner sees of a run."""

    def __init__(self, name: str, score: float):
        self.run, self.done, self.score = Path(name), 0, score
        self.config = config.compose(["iterations=20"]).config

    @property
    def scores(self) -> list[tuple[int, float]]:
        return [(i, self.score) for i in range(1, self.done + 1)]


@pytest.mark.parametrize("kind", ["median", "halving"])
def test_bad_runs_are_given_up(kind: str) -> None:
    """The worst of nine runs side by side is given up before the end and the best is not, however long the chunks are."""
    storage = f"sqlite:///{Path('s.db').absolute()}"
    found = searching(storage, "random", 100, x="interval(0.0,1.0)")
    sweeper = type("Sweeper", (dict,), {"storage": storage, "direction": "maximize"})(pruner=kind)
    for _ in range(5):  # the median asks for some that have completed
        (trial,) = found.ask(1)
        for step in range(1, 10):
            trial.report(4.0, step)
        found.tell(trial, "completed", 4.0)
    points: list[Any] = []
    for i, trial in enumerate(found.ask(9)):
        trial.set_user_attr("run", f"run{i}")
        points.append(Runs(f"run{i}", float(i)))
    prune, alive, given_up = search.pruner(sweeper), list(points), []
    for done in (1, 2, 5, 9, 14, 19):
        for point in alive:
            point.done = done
        out = prune(alive)
        given_up += [point.score for point in out]
        alive = [point for point in alive if point not in out]
    assert 0.0 in given_up and 8.0 not in given_up
    # Beside 5 with 4.0: the best third of 14 after a tenth, down to 4.0; of 10 after three, to 5.0; of 9 after nine, to 6.0.
    assert kind == "median" or [point.score for point in alive] == [6.0, 7.0, 8.0]


def test_a_search_of_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Batches of one program each; the same command with more trials goes on in the same study."""
    search_for = ("hydra/sweeper=optuna", "'algo.lr=tag(log,interval(0.1,2.0))'".strip("'"), VMAP, "hydra.sweeper.batch=2")
    assert swept("sweep", *search_for, "iterations=2", "hydra.sweeper.trials=4") == 0
    first = content("sweep")["points"]
    assert len(first) == 4 and all(point["status"] == "completed" for point in first)
    assert [result(Path("sweep") / point["run"])["train"]["runs"] for point in first] == [2] * 4
    assert capsys.readouterr().out.count("2 runs in one program") == 2
    assert swept("sweep", *search_for, "iterations=2", "hydra.sweeper.trials=6") == 0
    assert len([path for path in Path("sweep").iterdir() if path.name.startswith("algo.lr=")]) == 6
    both = content("sweep")["points"]
    assert both[:4] == first and len({point["run"] for point in both}) == 6
    assert swept("sweep", *search_for, "iterations=2", "hydra.sweeper.trials=6") == 0
    assert content("sweep")["points"] == both


@pytest.mark.parametrize("name", TRAINED)
def test_every_algorithm_has_a_search_space(name: str) -> None:
    """It composes, its parameters are keys of the algorithm, and both ends of each are allowed."""
    file = GROUPS["sweep"][name]
    params = catalogue_params(file)
    space = parsed(**{f"p{i}": text for i, text in enumerate(params.values())})
    env = "point_nav" if name == "told_task" else "bandit"
    for end in ("low", "high"):
        values = [f"{key}={getattr(space[f'p{i}'], end)}" for i, key in enumerate(params)]
        composed = config.compose([f"sweep={name}", f"env={env}", *values])
        assert composed.algo == name
        config.build(composed.config)
    assert params.keys() <= catalogue.defaults({"algo": name, "env": env}).keys()


def catalogue_params(file: Path) -> dict[str, str]:
    import yaml

    return yaml.safe_load(file.read_text())["hydra"]["sweeper"]["params"]


@pytest.mark.slow
def test_two_processes(alone: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    lines = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)  # for the plug-in
        assert swept("sweep", *RATES, *lines) == 0
    for name in POINTS:
        assert_equal_runs(Path("sweep") / name, alone / name)
