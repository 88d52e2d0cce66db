"""Composing, validating and storing configs; what users see of it on the command line is in test_cli.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from pydantic import Field

from metarl_cli import catalogue, config
from metarl_cli.core.errors import ConfigError, MetarlError, RunError
from metarl_cli.core.settings import Settings, Widths, setting

GROUPS = catalogue.groups()


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's config directory, with an algorithm `mine` whose class is in a package of the user's."""
    package = tmp_path / "python" / "my_plugin"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "algo.py").write_text(
        "import os\n"
        "from metarl_cli.core.settings import AlgoSettings, Settings, setting\n"
        "class Inner(Settings):\n"
        "    depth: int = setting('how deep', unit='layers', ge=1)\n"
        "class MySettings(AlgoSettings):\n"
        "    lr: float = setting('how fast', gt=0)\n"
        "    inner: Inner\n"
        "    def build(self, family):\n"
        "        raise NotImplementedError\n"
        "class NoSettings:\n"
        "    pass\n"
    )
    (package / "explodes.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "python"))
    for name in [name for name in sys.modules if name.split(".")[0] == "my_plugin"]:
        monkeypatch.delitem(sys.modules, name)
    directory = tmp_path / "with space, comma's"
    write(directory, "algo/mine", "# Mine\n_target_: my_plugin.algo.MySettings\nlr: 0.5\ninner: {depth: 2}\n")
    return directory


def write(directory: Path, name: str, text: str) -> None:
    file = directory / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def algo(body: str) -> str:
    return f"_target_: my_plugin.algo.MySettings\nlr: 0.5\ninner: {{depth: 2}}\n{body}"


TRUSTED = "plugins=[my_plugin]"


# Composing


PAIRS = [
    (algo, env)
    for algo, file in catalogue.trained(GROUPS["algo"]).items()
    for env in GROUPS["env"]
    if "_target_" in file.read_text() or env in ("bandit", "point_nav")  # a variant fits what it starts from fits
]


@pytest.mark.parametrize(("algo", "env"), PAIRS)
def test_every_pair_composes_and_builds(algo: str, env: str) -> None:
    composed = config.compose([f"algo={algo}", f"env={env}"])
    assert (composed.algo, composed.env) == (algo, env)
    learner, family = config.build(composed.config)
    assert family.horizon >= 1 and learner.plan(family, composed.config.eval).points >= 1


@pytest.mark.parametrize("file", [file for files in GROUPS.values() for file in files.values()], ids=lambda f: f.stem)
def test_every_file_says_what_it_is(file: Path) -> None:
    assert len(catalogue.headline(file)) > 10


def test_overrides_take_effect_and_types_survive() -> None:
    lines = ["algo=maml", "env=bandit", "env.k=7", "algo.hidden=[8,16]", "algo.lr=1e-5", "eval.tasks=12", "seed=4"]
    composed = config.compose(lines)
    assert composed.config.seed == 4 and composed.config.eval.tasks == 12
    assert composed.resolved["env"]["k"] == 7 and composed.resolved["algo"]["lr"] == 1e-5
    assert composed.config.algo.model_dump()["hidden"] == (8, 16)
    assert composed.overrides == lines


def test_interpolations_and_the_run_directory() -> None:
    composed = config.compose(["algo=maml", "env=bandit", "seed=6", "eval.seed=${seed}"])
    assert composed.config.eval.seed == composed.resolved["eval"]["seed"] == 6
    assert composed.run_dir.parent == Path("runs/maml_bandit")
    assert not composed.run_dir_given

    given = config.compose(["seed=6", "hydra.run.dir='x/a=b ${seed}_${hydra:runtime.choices.env}'"])
    assert given.run_dir == Path("x/a=b 6_point_nav")
    assert given.run_dir_given


def test_composing_creates_nothing_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config.compose(["seed=1"])
    with pytest.raises(ConfigError):
        config.compose(["seed=-1"])
    assert list(tmp_path.iterdir()) == []
    assert not GlobalHydra.instance().is_initialized()
    assert not HydraConfig.initialized()
    assert OmegaConf.has_resolver("oc.env")


def test_a_users_own_directory(mine: Path) -> None:
    composed = config.compose(["algo=mine", TRUSTED, "algo.inner.depth=3"], mine)
    assert composed.config.algo.model_dump() == {"lr": 0.5, "inner": {"depth": 3}}
    assert composed.algo == "mine"
    # Ours are still there.
    assert config.compose(["algo=rl2"], mine).algo == "rl2"


def test_a_users_file_cannot_hide_behind_ours(mine: Path) -> None:
    write(mine, "algo/maml", algo(""))
    with pytest.raises(ConfigError, match=r"maml\.yaml.*Rename"):
        config.compose([], mine)


# Mistakes in YAML files


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (algo("lrr: 1"), ["algo.lrr=1: no such key", "Did you mean algo.lr?"]),
        (algo("seeds: 3"), ["algo.seeds=3: no such key", "Did you mean seeds?"]),
        (algo("").replace("depth", "dpth"), ["algo.inner.dpth=2: no such key", "Did you mean algo.inner.depth?"]),
        (algo("").replace("0.5", "fast"), ["algo.lr=fast: must be a number > 0"]),
        (algo("").replace("0.5", "${algo.inner.dept}"), ["algo.lr=${algo.inner.dept}", "${algo.inner.depth}?"]),
        (
            algo("").replace("0.5", "${oc.env:METARL_SECRET}"),
            ["algo.lr=${oc.env:METARL_SECRET}", "may not read the environment"],
        ),
        (algo("").replace("0.5", "${${oc.env:X}:METARL_SECRET}"), ["algo.lr=", "may not read the environment"]),
        (algo("").replace("0.5", "???"), ["algo.lr=???: has no value", "algo.lr=VALUE"]),
        ("lr: 1", ["algo._target_: is missing", "AlgoSettings"]),
        ("lr: [1\nx: 2", ["mine.yaml", "line 2", "is not valid YAML"]),
        ("lr: 1\nlr: 2", ["mine.yaml", "duplicate key"]),
        ("defaults:\n  - nothing: here\n", ["algo/nothing", "here"]),
        ("defaults:\n  - /env: ${oc.env:METARL_SECRET}\n", ["${oc.env:METARL_SECRET}"]),
        (algo("eval: {_target_: os.system}"), ["algo.eval._target_=os.system: no such key"]),
    ],
)
def test_mistakes_in_a_users_file(mine: Path, text: str, fragments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARL_SECRET", "hunter2")
    write(mine, "algo/mine", text)
    with pytest.raises(MetarlError) as caught:
        config.compose(["algo=mine", TRUSTED], mine)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(MetarlError) as caught:
        config.compose(["seeds=0", "algo.inner_lr=x", "env.horizonn=3"])
    first, second, third = str(caught.value).splitlines()
    assert first.startswith("algo.inner_lr=x: ") and second.startswith("env.horizonn=3: ")
    assert third.startswith("seeds=0: ")


# Configs never execute code


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("os.system", "only classes of metarl_cli, my_plugin"),
        ("subprocess.Popen", "only classes of"),
        ("my_plugin_2.algo.MySettings", "only classes of"),
        ("metarl_cli_evil.X", "only classes of"),
        ("metarl_cli.x.os.system", "no module metarl_cli.x"),
        ("metarl_cli.config.os.system", "no module metarl_cli.config.os"),
        ("my_plugin.algo.os.system", "no module my_plugin.algo.os"),
        ("metarl_cli.config.compose", "defines no class compose"),
        ("metarl_cli.core.settings.BaseModel", "defines no class BaseModel"),
        ("metarl_cli.core.settings.AlgoSettings", "no AlgoSettings that can be used"),
        ("metarl_cli.envs.bandit.BanditSettings", "no AlgoSettings that can be used"),
        ("my_plugin.algo.NoSettings", "no AlgoSettings that can be used"),
        ("my_plugin.algo.Inner", "no AlgoSettings that can be used"),
        ("my_plugin.algo.MySetings", "Did you mean MySettings?"),
        ("my_plugin.algoo.MySettings", "no module my_plugin.algoo"),
        ("my_plugin.explodes.X", "RuntimeError: imported"),
        ("my_plugin.__main__.X", "is not the path of a class"),
        ("system", "is not the path of a class"),
        ("..os.system", "is not the path of a class"),
    ],
)
def test_a_class_has_to_be_trusted_and_of_the_right_kind(mine: Path, target: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.compose(["algo=mine", TRUSTED, f"algo._target_='{target}'"], mine)
    assert f"algo._target_={target}" in str(caught.value)
    assert reason in str(caught.value)


def test_nothing_is_imported_that_was_not_named_by_the_user(mine: Path) -> None:
    with pytest.raises(ConfigError, match=r"plugins=\[my_plugin\]"):
        config.compose(["algo=mine"], mine)
    write(mine, "algo/mine", "# @package _global_\nplugins: [my_plugin]\nalgo:\n  _target_: my_plugin.explodes.X\n")
    with pytest.raises(ConfigError, match="a YAML file may not name the packages it trusts"):
        config.compose(["algo=mine"], mine)
    write(mine, "algo/mine", "# @package _global_\nplugins: my_plugin\nalgo: {_target_: my_plugin.algo.MySettings}\n")
    with pytest.raises(ConfigError, match="plugins=my_plugin: a YAML file may not"):
        config.compose(["algo=mine"], mine)
    assert not any(name.split(".")[0] == "my_plugin" for name in sys.modules)


@pytest.mark.parametrize(
    ("hydra", "key"),
    [
        ("callbacks: {x: {_target_: os.system}}", "hydra.callbacks"),
        ("job: {env_copy: [HOME]}", "hydra.job.env_set"),
        ("job: {env_set: {A: b}}", "hydra.job.env_set"),
        ("job: {chdir: true}", "hydra.job.chdir"),
        ("job_logging: {handlers: {x: {(): os.system}}}", "hydra.job_logging"),
        ("hydra_logging: {root: {level: DEBUG}}", "hydra.hydra_logging"),
        ("launcher: {_target_: os.system}", "hydra.launcher._target_"),
        ("sweeper: {_target_: hydra.utils.call}", "hydra.sweeper._target_"),
        ("sweeper: {params: {plugins: '[os]'}}", "hydra.sweeper.params.plugins"),
        ("sweeper: {params: {++hydra.searchpath: '[pkg://os]'}}", "hydra.sweeper.params.++hydra.searchpath"),
    ],
)
def test_hydras_own_settings_are_no_way_round(mine: Path, hydra: str, key: str) -> None:
    write(mine, "algo/mine", f"# @package _global_\nhydra:\n  {hydra}\nalgo:\n  lr: 1\n")
    with pytest.raises(ConfigError) as caught:
        config.compose(["algo=mine"], mine)
    assert caught.value.key == key


# Runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / "one"
    directory.mkdir(parents=True)
    config.save(config.compose(["algo=rl2", "env=bandit", "seed=5", "algo.lr=1e-5"]), directory)
    return directory


def test_a_run_gives_back_its_config(run: Path) -> None:
    original = config.compose(["algo=rl2", "env=bandit", "seed=5", "algo.lr=1e-5"])
    again = config.from_run(run, [], ("eval",))
    assert again.config == original.config and again.resolved == original.resolved
    assert (again.algo, again.env, again.run_dir, again.run_dir_given) == ("rl2", "bandit", run, True)
    assert again.overrides == original.overrides
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "overrides.yaml"]


def test_a_run_can_be_changed_where_allowed(run: Path) -> None:
    changed = config.from_run(run, ["eval.split=ood", "env.k=9"], ("eval", "env"))
    assert changed.config.eval.split == "ood" and changed.resolved["env"]["k"] == 9
    assert changed.overrides[-2:] == ["eval.split=ood", "env.k=9"]


def test_a_run_can_meet_another_family(run: Path) -> None:
    changed = config.from_run(run, ["env=point_nav", "env.horizon=7"], ("eval", "env"))
    assert changed.env == "point_nav" and changed.algo == config.from_run(run, [], ()).algo
    expected = config.compose(["env=point_nav", "env.horizon=7"])
    assert changed.config.env == expected.config.env and changed.resolved["env"] == expected.resolved["env"]
    with pytest.raises(ConfigError, match="algo=maml: a run keeps its own"):
        config.from_run(run, ["algo=maml"], ("eval", "env", "algo"))


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("algo.lr=1", ["algo.lr=1: cannot be changed in an existing run", "Allowed: eval, env"]),
        ("evl.split=ood", ["evl.split=ood", "Allowed: eval, env"]),
        ("eval.splitt=ood", ["eval.splitt=ood: no such key", "Did you mean eval.split?"]),
        ("env.k=0", ["env.k=0: must be an integer >= "]),
        ("env.k=1,2", ["env.k=1,2: takes one value"]),
        ("env=pointnav", ["env=pointnav", "Did you mean point_nav?"]),
        ("env._target_=os.system", ["env._target_=os.system: only classes of metarl_cli"]),
        ("eval.seed=${oc.env:METARL_SECRET}", ["eval.seed=${oc.env:METARL_SECRET}", "may not read the environment"]),
        ("hydra.run.dir=x", ["hydra.run.dir=x: cannot be changed"]),
        ("~eval.seed", ["eval.seed: a key cannot be deleted"]),
    ],
)
def test_mistakes_in_the_overrides_of_a_run(run: Path, override: str, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.from_run(run, [override], ("eval", "env"))
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1, 2]",
        b"just text",
        b"seed: 1",
        b"choices: {algo: maml, env: bandit}",
        b"choices: 3",
        b"seed: [1",
        b"\xff\xfe\x00",
        b"!!python/object/apply:os.system ['true']",
    ],
)
def test_a_damaged_config_names_the_file(run: Path, content: bytes) -> None:
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(RunError, match=r"one/config\.yaml[:,] "):
        config.from_run(run, [], ())


def test_a_tampered_config_runs_no_code(run: Path) -> None:
    stored = yaml.safe_load((run / "config.yaml").read_text())
    stored["algo"]["_target_"] = "os.system"
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(RunError, match=r"config\.yaml.*algo\._target_=os\.system: only classes of metarl_cli"):
        config.from_run(run, [], ())


def test_what_is_no_run_directory(run: Path) -> None:
    with pytest.raises(RunError, match=r"no such run directory.*Did you mean .*runs/one\?"):
        config.from_run(run.parent / "onne", [], ())
    with pytest.raises(RunError, match=r"holds no config\.yaml.*runs/one, the latest"):
        config.from_run(run.parent, [], ())
    with pytest.raises(RunError, match="is a file"):
        config.from_run(run / "config.yaml", [], ())


# Building


def test_building_checks_the_split() -> None:
    with pytest.raises(ConfigError, match=r"eval\.split=tset: .*Did you mean test\?"):
        config.build(config.compose(["eval.split=tset"]).config)


# Several runs


def test_a_sweep_runs_each_combination_in_its_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs: list[config.Composed] = []

    def job(points: list[list[str]], hydra: Any) -> list[int]:
        assert hydra.launcher._target_.endswith("BasicLauncher")
        (point,) = points
        runs.append(config.compose(point))
        return [len(runs)]

    directory, returned = config.sweep(["seed=range(0,2)", "env=bandit,point_nav", "algo.lr=0.5"], None, job)
    assert [(each.config.seed, each.env) for each in runs] == [
        (0, "bandit"),
        (0, "point_nav"),
        (1, "bandit"),
        (1, "point_nav"),
    ]
    assert returned == [1, 2, 3, 4]
    assert directory.parent == Path("runs/sweeps") and directory.name.startswith(
        "seed=range-0,2-,env=bandit,point_nav,algo.lr"
    )
    assert runs[0].run_dir == directory / "seed=0,env=bandit"
    assert len({each.run_dir for each in runs}) == 4
    assert all(each.run_dir_given and each.resolved["algo"]["lr"] == 0.5 for each in runs)
    assert not any(each.run_dir.exists() for each in runs)
    again, _ = config.sweep(["seed=range(0,2)", "env=bandit,point_nav", "algo.lr=0.5"], None, job)
    assert again == directory and [each.run_dir for each in runs[:4]] == [each.run_dir for each in runs[4:]]


def test_a_sweep_of_a_users_own_configs(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine.parent)
    seen: list[config.Composed] = []

    def job(points: list[list[str]], hydra: Any) -> list[None]:
        seen.extend(config.compose(point, mine) for point in points)
        return [None for _ in points]

    config.sweep(["algo=mine,maml", "hydra.sweep.dir='a b'", "hydra/launcher=vmap", TRUSTED], mine, job)
    assert [each.algo for each in seen] == ["mine", "maml"]
    assert [each.run_dir for each in seen] == [Path("a b/algo=mine"), Path("a b/algo=maml")]


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["seed=0,1", "algo.lr=0.1,0.2,-1"], "algo.lr=-1: must be a number > 0"),
        (["algo=maml,rl3"], "algo=rl3: no such algorithm"),
        (["seed=0,1", "algo.lrr=1"], "algo.lrr=1: no such key"),
        (["seed=0,1", "hydra.run.dir=x"], "Set hydra.sweep.dir"),
        (["seed=0,1", "hydra/launcher=vnap"], "hydra/launcher=vnap: no such file in hydra/launcher/. Allowed: basic,"),
        (["seed=0,1", "hydra/launcher=vnap"], "Did you mean vmap?"),
        (["seed=0,1", "hydra/launcher=vmap", "hydra.launcher.runs=0"], "hydra.launcher.runs=0: must be 1 or more."),
        (["seed=0,1", "hydra/launcher=vmap", "hydra.launcher.runs=x"], "hydra.launcher.runs=x: Value 'x' of type 'str'"),
        (["seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0: must be 1 or more."),
        (["seed=0,1", "hydra/sweeper=optuna", "hydra.sweeper.batch=-3"], "hydra.sweeper.batch=-3: must be 1 or more."),
        (["seed=0,1", "hydra.launcher.runs=2"], "no such key. Which there are depends on hydra/launcher=NAME."),
        (
            ["algo.lr=interval(0.1,1)"],
            "algo.lr=interval(0.1,1): an interval has no end of values. Add hydra/sweeper=optuna.",
        ),
        (["algo.lr=interval(-1,1)", "hydra/sweeper=optuna"], "algo.lr=-1.0: must be a number > 0"),
        (["seed=0,1", "hydra.sweep.subdir=x"], "hydra.sweep.subdir=x: cannot be set"),
        (["seed=range(0)"], "seed=range(0): holds no value"),
        (["seed=0,1", "hydra.sweeper=5"], "hydra.sweeper=5: is a section. Choose with hydra/sweeper=NAME"),
        (["seed=0,1", "hydra.launcher=null"], "hydra.launcher=null: is a section"),
        (["seed=0,1,0"], "seed=0,1,0: names 0 twice"),
        (["seed=0,1", "hydra.sweep.dir=/dev/null/x"], "hydra.sweep.dir=/dev/null/x: cannot be made (Not a directory)"),
        (["sweep=rl2", "algo=maml"], "algo.entropy=0.0: no such key."),
        (["seed=0,1", "hydra.launcher._target_=os.system"], "Hydra may use its own plug-ins only"),
    ],
)
def test_a_mistake_in_a_sweep_shows_before_the_first_run(
    overrides: list[str], fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        config.sweep(overrides, None, lambda *_: pytest.fail("a run was started"))
    assert fragment in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# Words


def test_settings_are_described_in_words() -> None:
    class Some(Settings):
        a: int = setting("", ge=1)
        b: float | None = setting("", gt=0, le=1)
        c: bool
        d: Literal["x", "y"]
        e: Widths
        f: str
        g: list[float] = Field(description="")
        h: int | Literal["auto"]

    words = {name: config.describe(field.annotation, field.metadata) for name, field in Some.model_fields.items()}
    assert words == {
        "a": "an integer >= 1",
        "b": "a number > 0 and <= 1 or null",
        "c": "true or false",
        "d": "one of x, y",
        "e": "a list, each an integer >= 1",
        "f": "text",
        "g": "a list, each a number",
        "h": "an integer or one of auto",
    }


def test_the_help_lists_every_key(mine: Path) -> None:
    composed = config.compose(["algo=mine", TRUSTED], mine)
    rows = {row.key: row for row in config.rows(composed)}
    assert set(rows) == {key for key, _ in catalogue.leaves(composed.resolved)}
    assert rows["algo.inner.depth"] == ("algo.inner.depth", "2", "layers", "an integer >= 1", "how deep")
    assert rows["eval.tasks"].value == "null"


# Experiments


@pytest.mark.parametrize("name", sorted(catalogue.groups()["experiment"]))
def test_every_experiment_can_be_run_and_changed(name: str, tmp_path: Path) -> None:
    composed = config.compose([f"experiment={name}"])
    config.build(composed.config)
    assert composed.experiment == name
    # A choice on the command line and a key there have the last word.
    changed = config.compose(["algo.meta_batch=7", "env=grid_nav", f"experiment={name}", "algo.minibatches=1"])
    assert changed.env == "grid_nav" != composed.env and changed.config.algo.meta_batch == 7
    assert changed.algo == composed.algo
    # It is recorded, and what is recorded is all that a run needs.
    config.save(composed, tmp_path)
    again = config.from_run(tmp_path, [], ())
    assert again.config == composed.config and again.experiment == name
    choices = yaml.safe_load((tmp_path / "config.yaml").read_text())["choices"]
    assert choices == {"algo": composed.algo, "env": composed.env, "experiment": name}


def test_an_experiment_wins_over_what_is_tuned(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    lines = ["# @package _global_", "defaults: [{override /algo: rl2}, {override /env: grid_nav}]", "algo: {gamma: 0.5}"]
    (tmp_path / "experiment" / "mine.yaml").write_text("\n".join(lines))
    composed = config.compose(["experiment=mine"], tmp_path)
    assert (composed.algo, composed.env, composed.config.algo.gamma) == ("rl2", "grid_nav", 0.5)
    tuned = config.compose(["algo=rl2", "env=grid_nav"])
    assert composed.config.algo.lam == tuned.config.algo.lam != config.compose(["algo=rl2", "env=two_step"]).config.algo.lam
