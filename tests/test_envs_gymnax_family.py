"""Gymnax environments as families: distributions, derived fields, physics once more in numpy, environments of one's own."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import struct
from gymnax.environments.environment import Environment, EnvParams
from gymnax.registration import registered_envs
from scipy import stats

from metarl_cli import catalogue, config
from metarl_cli.cli import main
from metarl_cli.core.errors import ConfigError, MetarlError
from metarl_cli.core.rollout import rollout, spaces
from metarl_cli.envs.gymnax_family import KNOWN, Gymnax, GymnaxSettings, fields

ROOT = Path(__file__).parents[1]
PRESETS = ("cartpole", "cartpole_projected", "pendulum", "acrobot", "mountain_car", "mountain_car_continuous")


def family_of(name: str, *changes: str) -> Gymnax:
    family = config.compose([f"env={name}", *changes]).config.env.build()
    assert isinstance(family, Gymnax)
    return family


def settings(**changes: Any) -> GymnaxSettings:
    given = {"id": "CartPole-v1", "horizon": 9, "episodes": 2, "projection": None, "vary": {}, "ood": {}}
    return GymnaxSettings(**{**given, **changes})


def sample(family: Any, split: str = "train", n: int = 4000, seed: int = 0) -> Any:
    draw = jax.jit(jax.vmap(lambda key: family.sample(key, split)))
    return jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(seed), n)))


# Distributions


def piecewise(x: Any) -> Any:
    """Uniform on [0, 1] and [2, 5]: 1/4 and 3/4 of it."""
    return np.interp(x, [0, 1, 2, 5], [0, 0.25, 0.25, 1])


DISTRIBUTIONS = [
    ({"uniform": [2.0, 5.0]}, stats.uniform(2, 3).cdf, (2, 5), 3.5),
    ({"uniform": [[0, 1], [2, 5]]}, piecewise, (0, 5), 0.25 * 0.5 + 0.75 * 3.5),
    ({"log_uniform": [0.01, 10]}, stats.loguniform(0.01, 10).cdf, (0.01, 10), 9.99 / np.log(1000)),
    ({"normal": [3, 2]}, stats.truncnorm(-3, 3, 3, 2).cdf, (-3, 9), 3.0),
    (
        {"normal": [1, 0.5, 0.75, 3]},
        stats.truncnorm(-0.5, 4, 1, 0.5).cdf,
        (0.75, 3),
        stats.truncnorm(-0.5, 4, 1, 0.5).mean(),
    ),
]


@pytest.mark.parametrize(("given", "cdf", "bounds", "mean"), DISTRIBUTIONS, ids=lambda x: str(x) if type(x) is dict else "")
def test_distributions(given: dict, cdf: Any, bounds: tuple, mean: float) -> None:
    x = sample(settings(vary={"gravity": given}).build(), n=5000).gravity
    assert x.dtype == np.float32 and bounds[0] <= x.min() and x.max() <= bounds[1]
    assert stats.kstest(x.astype(float), cdf).pvalue > 1e-3
    assert abs(x.mean() - mean) < 4 * x.std() / np.sqrt(x.size)


def test_choice_and_fixed() -> None:
    tasks = sample(settings(vary={"gravity": {"choice": [1, 2.5, 7]}, "length": {"fixed": 0.7}}).build())
    values, counts = np.unique(tasks.gravity, return_counts=True)
    np.testing.assert_array_equal(values, [1, 2.5, 7])
    assert stats.chisquare(counts).pvalue > 1e-3
    np.testing.assert_array_equal(tasks.length, np.float32(0.7))


def test_fields_are_independent_of_each_other_and_of_what_else_varies() -> None:
    both = {"gravity": {"uniform": [0, 1]}, "length": {"uniform": [0, 1]}}
    tasks = sample(settings(vary=both).build())
    assert abs(np.corrcoef(tasks.gravity, tasks.length)[0, 1]) < 4 / np.sqrt(4000)
    alone = sample(settings(vary={"length": both["length"]}).build())
    np.testing.assert_array_equal(alone.length, tasks.length)
    assert np.all(alone.gravity == np.float32(9.8))


def test_the_numbers_of_a_distribution_are_leaves() -> None:
    family = settings(vary={"length": {"uniform": [1.0, 2.0]}}).build()
    assert jax.tree.leaves(family) == [1.0, 2.0]
    wider = jax.tree.map(lambda x: 10 * x, family)
    assert 10 <= wider.sample(jax.random.key(0)).length <= 20


# Splits


@pytest.mark.parametrize("name", PRESETS)
def test_presets_draw_what_the_file_says(name: str) -> None:
    family, file = family_of(name), yaml.safe_load(catalogue.groups()["env"][name].read_text())
    tasks = {split: sample(family, split) for split in ("train", "test", "ood")}
    jax.tree.map(np.testing.assert_array_equal, tasks["train"], tasks["test"])
    for split, task in tasks.items():
        params = task.params if family.env is not family.inner else task
        default: Any = family.inner.default_params
        drawn = file["vary"] if split != "ood" else file["vary"] | file["ood"]
        derived = next((known.derived for cls, known in KNOWN.items() if isinstance(family.inner, cls)), {})
        for field in dataclasses.fields(default):
            x, name = getattr(params, field.name), field.name
            if name in drawn:
                intervals = np.reshape(drawn[name]["uniform"], (-1, 2)).astype(np.float32)
                inside = [(low <= x) & (x <= high) for low, high in intervals]
                assert np.all(np.any(inside, axis=0)) and np.all(np.any(inside, axis=1))
                size = (intervals[:, 1] - intervals[:, 0]).astype(float)
                mean = np.average(intervals.mean(1), weights=size)
                assert abs(x.mean(dtype=float) - mean) < 4 * x.std() / np.sqrt(x.size)
            elif name == "max_steps_in_episode":
                assert np.all(x == file["horizon"]) and np.all(task.max_steps_in_episode == x)
            elif name not in derived:
                np.testing.assert_array_equal(x, np.broadcast_to(np.asarray(getattr(default, name), x.dtype), x.shape))


def test_ood_replaces_single_fields_and_need_not_be() -> None:
    family = settings(
        vary={"length": {"uniform": [0, 1]}, "gravity": {"uniform": [0, 1]}},
        ood={"gravity": {"uniform": [2, 3]}, "tau": {"fixed": 0.5}},
    ).build()
    train, ood = sample(family), sample(family, "ood")
    np.testing.assert_array_equal(train.length, ood.length)
    assert train.gravity.max() <= 1 and ood.gravity.min() >= 2
    assert np.all(train.tau == np.float32(0.02)) and np.all(ood.tau == 0.5)
    assert settings(projection=2).build().splits == ("train", "test")
    with pytest.raises(ConfigError, match=r"eval.split=ood: the family has no such split. Allowed: train, test."):
        config.build(config.compose(["env=cartpole_projected", "env.ood=null", "eval.split=ood"]).config)


# Derived fields


def test_what_follows_from_other_fields_does_so_in_gymnax() -> None:
    """The table, against the defaults of gymnax itself."""
    for cls, known in KNOWN.items():
        default = cls().default_params
        for name, (text, rule) in known.derived.items():
            assert rule(default) == pytest.approx(getattr(default, name)), name
            value = eval(text, {}, {field.name: getattr(default, field.name) for field in dataclasses.fields(default)})
            assert value == pytest.approx(rule(default)), "what `metarl list fields` prints"
            assert not next(field for field in fields(cls()) if field.name == name).varies


def test_a_heavier_pole_changes_the_total_mass() -> None:
    for split in ("train", "ood"):
        task = sample(family_of("cartpole"), split)
        np.testing.assert_allclose(task.total_mass, 1 + task.masspole, rtol=1e-6)
        np.testing.assert_allclose(task.polemass_length, task.masspole * task.length, rtol=1e-6)
        assert np.ptp(task.total_mass) > 0.4
    task = sample(family_of("acrobot"))
    np.testing.assert_allclose([task.link_com_pos_1 * 2, task.link_com_pos_2 * 2], [task.link_length_1, task.link_length_2])
    bandit = settings(id="BernoulliBandit-misc", horizon=30, vary={"reward_prob": {"uniform": [0, 1]}}).build()
    assert float(bandit.sample(jax.random.key(0)).t_max) == 30


# Physics


def cartpole(p: Any, s: Any, action: int) -> Any:
    """Barto, Sutton and Anderson 1983, frictionless, from the masses and the half length themselves; Euler."""
    force, m, total = (2 * action - 1) * p.force_mag, p.masspole, p.masscart + p.masspole
    sin, cos = np.sin(s.theta), np.cos(s.theta)
    push = (force + m * p.length * s.theta_dot**2 * sin) / total
    turn = (p.gravity * sin - cos * push) / (p.length * (4 / 3 - m * cos**2 / total))
    x, v = s.x + p.tau * s.x_dot, s.x_dot + p.tau * (push - m * p.length * turn * cos / total)
    theta, w = s.theta + p.tau * s.theta_dot, s.theta_dot + p.tau * turn
    return [x, v, theta, w], 1.0, abs(x) > 2.4 or abs(theta) > np.deg2rad(12)


def pendulum(p: Any, s: Any, action: Any) -> Any:
    """A rod that turns around its end: I = m l^2 / 3."""
    u = np.clip(action[0], -2, 2)
    angle = np.arctan2(np.sin(s.theta), np.cos(s.theta))
    torque = p.m * 10 * (p.l / 2) * np.sin(s.theta) + u
    w = np.clip(s.theta_dot + 0.05 * torque / (p.m * p.l**2 / 3), -8, 8)
    theta = s.theta + 0.05 * w
    return [np.cos(theta), np.sin(theta), w], -(angle**2 + 0.1 * s.theta_dot**2 + 0.001 * u**2), False


def acrobot(p: Any, s: Any, action: int) -> Any:
    """Two links from their Lagrangian: M(q) q'' + c(q, q') + g(q) = (0, torque). One step of Runge-Kutta."""
    m1, m2, l1 = p.link_mass_1, p.link_mass_2, p.link_length_1
    c1, c2, inertia = p.link_length_1 / 2, p.link_length_2 / 2, p.link_moi

    def slope(y):
        q1, q2, w1, w2 = y
        mixed = m2 * (c2**2 + l1 * c2 * np.cos(q2)) + inertia
        mass = np.array(
            [
                [m1 * c1**2 + m2 * (l1**2 + c2**2 + 2 * l1 * c2 * np.cos(q2)) + 2 * inertia, mixed],
                [mixed, m2 * c2**2 + inertia],
            ]
        )
        h = m2 * l1 * c2 * np.sin(q2)
        coriolis = np.array([-h * w2**2 - 2 * h * w1 * w2, h * w1**2])
        weight = 9.8 * m2 * c2 * np.sin(q1 + q2)
        gravity = np.array([9.8 * (m1 * c1 + m2 * l1) * np.sin(q1) + weight, weight])
        return np.concatenate([[w1, w2], np.linalg.solve(mass, [0, action - 1] - coriolis - gravity)])

    y = np.array([s.joint_angle1, s.joint_angle2, s.velocity_1, s.velocity_2], float)
    k1 = slope(y)
    k2 = slope(y + 0.1 * k1)
    k3 = slope(y + 0.1 * k2)
    k4 = slope(y + 0.2 * k3)
    q1, q2, w1, w2 = y + 0.2 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    w1, w2 = np.clip(w1, -4 * np.pi, 4 * np.pi), np.clip(w2, -9 * np.pi, 9 * np.pi)
    high = -np.cos(q1) - np.cos(q1 + q2) > 1
    return [np.cos(q1), np.sin(q1), np.cos(q2), np.sin(q2), w1, w2], 0.0 if high else -1.0, high


def mountain_car(p: Any, s: Any, action: int) -> Any:
    v = np.clip(s.velocity + (action - 1) * p.force - np.cos(3 * s.position) * p.gravity, -0.07, 0.07)
    x = np.clip(s.position + v, -1.2, 0.6)
    v = 0.0 if x <= -1.2 and v < 0 else v
    return [x, v], -1.0, x >= 0.5 and v >= 0


def mountain_car_continuous(p: Any, s: Any, action: Any) -> Any:
    v = np.clip(s.velocity + np.clip(action[0], -1, 1) * p.power - np.cos(3 * s.position) * p.gravity, -0.07, 0.07)
    x = np.clip(s.position + v, -1.2, 0.6)
    there = x >= 0.45 and v >= 0
    return [x, v], 100 * there - 0.1 * action[0] ** 2, there


PHYSICS = [cartpole, pendulum, acrobot, mountain_car, mountain_car_continuous]


def played(family: Any, tasks: Any, steps: int) -> Any:
    """Random actions: state before, action, observation after (before any reset), reward, terminated, truncated `[B, T]`."""

    def one(key, task):
        def step(state, key):
            key_action, key_step = jax.random.split(key)
            action = family.env.action_space(task).sample(key_action)
            _, new, reward, terminated, truncated, info = family.env.step(key_step, state, action, task)
            return new, (state, action, info["final_observation"], reward, terminated, truncated)

        key_reset, key_steps = jax.random.split(key)
        return jax.lax.scan(step, family.env.reset(key_reset, task)[1], jax.random.split(key_steps, steps))[1]

    n = len(jax.tree.leaves(tasks)[0])
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), n), tasks))


@pytest.mark.parametrize("reference", PHYSICS, ids=lambda reference: reference.__name__)
def test_against_plain_numpy(reference: Any) -> None:
    """Step by step: from where the environment was, numpy goes on for one step, with the primary fields only."""
    family = family_of(reference.__name__, "env.horizon=60")
    tasks = sample(family, "ood", n=8)
    state, action, seen, reward, terminated, truncated = played(family, tasks, 150)
    ends = np.zeros(8, int)
    for b in range(8):
        task = jax.tree.map(lambda x, b=b: x[b], tasks)
        for t in range(150):
            before = jax.tree.map(lambda x, b=b, t=t: x[b, t], state)
            expected, paid, end = reference(task, before, action[b, t])
            np.testing.assert_allclose(seen[b, t], expected, rtol=2e-5, atol=2e-5)
            np.testing.assert_allclose(reward[b, t], paid, rtol=1e-5, atol=1e-5)
            assert terminated[b, t] == end and truncated[b, t] == (before.time == 59)
            ends[b] += end or truncated[b, t]
    assert np.all(ends >= 2)  # episodes, in one and the same task


@pytest.mark.parametrize("name", ["CartPole-v1", "PointRobot-misc"])
def test_equals_gymnax_with_the_same_parameters(name: str) -> None:
    """Bit for bit, over resets; what gymnax draws in its own reset is none of the family's business."""
    env, default = gymnax.make(name)
    field = next(field.name for field in fields(env) if field.varies)
    task = settings(id=name, vary={field: {"uniform": [1, 2]}}).build().sample(jax.random.key(0))
    params = dataclasses.replace(default, **{field: float(getattr(task, field))}, max_steps_in_episode=9)

    @jax.jit
    def live(key, params):
        keys = jax.random.split(key, 26)
        actions = jax.vmap(env.action_space(params).sample)(keys)
        start = env.reset(key, params)

        def step(state, x):
            observation, state, *rest, _ = env.step(x[0], state, x[1], params)
            return state, (observation, *rest)

        return start, jax.lax.scan(step, start[1], (keys[1:], actions[1:]))

    ours, gymnaxs = live(jax.random.key(1), task), live(jax.random.key(1), jax.tree.map(jnp.asarray, params))
    jax.tree.map(np.testing.assert_array_equal, ours, gymnaxs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in registered_envs if name != "MNISTBandit-bsuite"])  # which downloads
def test_every_environment_of_gymnax_becomes_a_family(name: str) -> None:
    """Building traces an episode. Pixels, integers, boxes: an observation is one vector of floats."""
    with jax.numpy_rank_promotion("allow"):  # Swimmer relies on it
        family = settings(id=name, projection=3).build()
        assert spaces(family).observation == 3 and family.inner is not family.env
        varied = {field.name: {"uniform": [1, 2]} for field in fields(family.inner) if field.varies}
        if varied:
            assert settings(id=name, vary=varied).build().sample(jax.random.key(0)).max_steps_in_episode == 9


@pytest.mark.parametrize("name", PRESETS)
def test_float64(name: str, float64: None) -> None:
    family = family_of(name)
    spec = spaces(family)
    task = family.sample(jax.random.key(0))
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(task) if jnp.issubdtype(x.dtype, jnp.floating))
    action = jnp.zeros((), int) if spec.discrete else jnp.zeros(spec.action)
    live = lambda key: rollout(key, family, task, lambda carry, *_: (carry, action, None), (), spec)[1]  # noqa: E731
    assert jax.eval_shape(live, jax.random.key(0)).reward.dtype == jnp.float64


# Projections


@pytest.mark.parametrize("size", [2, 7])
def test_projection(size: int) -> None:
    family = family_of("cartpole_projected", f"env.projection={size}", "env.horizon=8")
    tasks = sample(family, n=50)
    assert tasks.projection.shape == (50, size, 4)
    short = tasks.projection if size <= 4 else tasks.projection.transpose(0, 2, 1)
    product = short @ short.transpose(0, 2, 1)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(min(size, 4)), product.shape), atol=1e-5)
    assert np.all(np.abs(tasks.projection.mean(0)) < 4 * 0.5 / np.sqrt(50) + 0.1)  # no direction is preferred
    state, _, seen, *_ = played(family, jax.tree.map(lambda x: x[:3], tasks), 30)
    # Over several episodes the same projection, of what the environment itself would show after the step.
    for b in range(3):
        later = {name: getattr(state, name)[b, 1:] for name in ("x", "x_dot", "theta", "theta_dot")}
        same = state.time[b, 1:] > 0  # no reset in between
        shown = np.stack(list(later.values()), axis=-1) @ tasks.projection[b].T
        np.testing.assert_allclose(seen[b, :-1][same], shown[same], atol=1e-5)
        assert np.sum(~same) >= 2


# Mistakes


MISTAKES = [
    (
        "env.vary.lenght.uniform=[1,2]",
        ["env.vary=lenght: CartPole-v1 has no such field", "masspole", "Did you mean length?"],
    ),
    ("env.ood.lenght.uniform=[1,2]", ["env.ood=lenght: CartPole-v1 has no such field", "Did you mean length?"]),
    ("env.vary.max_steps_in_episode.fixed=3", ["max_steps_in_episode: is set by env.horizon", "These can vary: gravity"]),
    ("env.ood.total_mass.fixed=3", ["env.ood=total_mass: follows from others: masscart + masspole"]),
    ("env.vary.length.unifrm=[1,2]", ["env.vary.length=unifrm: there is no such distribution", "Did you mean uniform?"]),
    ("env.vary.length.normal=[1,2]", ["env.vary.length=uniform, normal: must be one distribution", "uniform=null"]),
    ("env.vary.length.uniform=null", ["env.vary.length={}: must be one distribution", "env.vary.length=null"]),
    ("env.vary.length=0.5", ["env.vary.length=0.5: is no distribution", "{fixed: 0.5}"]),
    ("env.vary.length.uniform=[-1,1]", ["env.vary.length: can be as low as -1, but has to be positive"]),
    ("env.vary.length.uniform=[2,1]", ["env.vary.length.uniform=[2,1]: low must be below high"]),
    ("env.vary.length.uniform=[1,2,3]", ["env.vary.length.uniform=[1,2,3]: must be [low, high]"]),
    ("env.vary.length.uniform=[[1,3],[2,4]]", ["intervals must be in order and apart"]),
    ("env.vary.length.uniform=[[1,3,5]]", ["each interval must be [low, high]"]),
    ("env.vary.length.uniform=[a,b]", ["must be a list of numbers"]),
    ("env.vary.length.uniform=[true,2]", ["must be a list of numbers"]),
    ("env.vary.length.uniform=[.inf,2]", ["must be a list of numbers"]),
    ("env.vary.tau.log_uniform=[0,1]", ["env.vary.tau.log_uniform=[0,1]: the bounds must be positive"]),
    ("env.vary.tau.normal=[1,0]", ["the standard deviation must be positive"]),
    ("env.vary.tau.normal=[1,1,2]", ["must be [mean, std] or [mean, std, low, high]"]),
    ("env.vary.tau.normal=[1,1,7,9]", ["next to nothing"]),
    ("env.vary.tau.choice=[]", ["must be a list of numbers"]),
    ("env.vary.tau.fixed=[1]", ["must be a number"]),
    ("env.vary=5", ["env.vary=5: must be a mapping"]),
    ("env.vary={force_mag:null,length:null,masspole:null}", ["env.vary: nothing varies", "env.projection"]),
    ("env.id=CartPole", ["env.id=CartPole: gymnax has no such environment", "Did you mean CartPole-v1?"]),
    ("env.id=3", ["env.id=3: must be text or a class"]),
    ("env.id=os.path", ["env.id=os.path: only classes of metarl_cli may be named here", "plugins=[os]"]),
    ("env.id=../x.py", ["is not the path of a class"]),
    ("env.id=metarl_cli.envs.bandit.BanditSettings", ["is no Environment that can be used"]),
    ("env.id=metarl_cli.envs.gymnax_family.Projected", ["cannot be made without arguments", "missing 2 required"]),
    ("env.projection=0", ["env.projection=0: must be an integer >= 1 or null"]),
]


@pytest.mark.parametrize(("line", "fragments"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_gets_a_message(line: str, fragments: list[str]) -> None:
    with pytest.raises(MetarlError) as caught:
        config.build(config.compose(["env=cartpole", line]).config)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_command_line_changes_a_file() -> None:
    family = family_of(
        "cartpole", "env.vary.length.uniform=null", "env.vary.length.log_uniform=[0.1,1]", "env.vary.masspole=null"
    )
    assert {name: chosen.kind for name, chosen in family.vary.items()} == {"force_mag": "uniform", "length": "log_uniform"}


# What can vary


def test_list_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "fields", "CartPole-v1"]) == 0
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["length"] == ["0.5", "may vary"]
    assert lines["total_mass"] == ["1.1", "follows from others: masscart + masspole"]
    assert lines["max_steps_in_episode"] == ["500", "is set by env.horizon"]
    assert main(["list", "fields", "PointRobot-misc"]) == 0
    assert "False       is no float but of type bool" in capsys.readouterr().out
    for words, fragment in (
        (["Cartpole-v1"], "Did you mean CartPole-v1?"),
        ([], "name one environment"),
        (["CartPole-v1", "seed=3"], "seed=3: cannot be set here. Allowed: plugins."),
        (["my_package.my_env.MyEnv"], "plugins=[my_package]"),
    ):
        assert main(["list", "fields", *words]) == 2
        assert fragment in capsys.readouterr().err


def test_an_integer_default_of_a_float_field_may_vary() -> None:
    @struct.dataclass
    class Params(EnvParams):
        mass: float = 1
        count: int = 1

    class Env(Environment):
        @property
        def default_params(self):
            return Params()

    assert [field.varies for field in fields(Env())] == [False, True, False]


# A user's own environment


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example of the README, somewhere else than in the repository."""
    shutil.copytree(ROOT / "tests" / "examples", tmp_path / "mine")
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "mine"


def test_the_readme_shows_the_example() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for file in ("my_package/my_env.py", "my_configs/env/mine.yaml"):
        assert (ROOT / "tests" / "examples" / file).read_text(encoding="utf-8") in readme


def test_a_users_own_environment(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    composed = config.compose(["env=mine", "plugins=[my_package]"], mine / "my_configs")
    assert composed.resolved["env"]["id"] == "my_package.my_env.MyEnv"  # as it goes into config.yaml
    family = composed.config.env.build()
    train, ood = sample(family), sample(family, "ood")
    assert np.abs(train.wind).max() <= 0.5 <= np.abs(ood.wind).min() and np.all(train.gain == ood.gain)
    state, action, seen, reward, terminated, truncated = played(family, jax.tree.map(lambda x: x[:4], train), 60)
    where = state.position + train.gain[:4, None] * action[..., 0] + train.wind[:4, None]
    np.testing.assert_allclose(seen[..., 0], where, atol=1e-5)
    np.testing.assert_allclose(reward, -np.abs(where), atol=1e-5)
    np.testing.assert_array_equal(terminated, np.abs(where) > 5)
    assert truncated.any() and terminated.any()
    assert main(["list", "fields", "my_package.my_env.MyEnv", "plugins=[my_package]"]) == 0
    assert "wind" in capsys.readouterr().out


@pytest.mark.slow
def test_a_users_own_environment_is_trained_on(mine: Path) -> None:
    tiny = ["algo=rl2", "iterations=1", "algo.meta_batch=8", "eval.tasks=4", "env.horizon=5"]
    assert main(["train", "--config-dir", str(mine / "my_configs"), "env=mine", "plugins=[my_package]", *tiny]) == 0
    (run,) = Path("runs/rl2_mine").iterdir()
    assert main(["eval", str(run), "eval.split=ood"]) == 0
    assert (run / "result.json").exists() and list((run / "evaluations").glob("ood*.json"))


def test_a_users_environment_has_to_be_trusted_and_of_the_right_kind(mine: Path) -> None:
    (mine / "my_package" / "others.py").write_text(
        "from my_package.my_env import MyEnv\n"
        "class Argument(MyEnv):\n    def __init__(self, size): pass\n"
        "class Broken(MyEnv):\n    def step_env(self, key, state, action, params): return 1 / 0\n"
        "class NoEnvironment:\n    def __init__(self): raise SystemExit('made')\n"
        "class NoParams(MyEnv):\n    default_params = 3\n"
    )

    def message(name: str, *overrides: str) -> str:
        with pytest.raises(MetarlError) as caught:
            config.build(config.compose(["env=mine", f"env.id=my_package.{name}", *overrides], mine / "my_configs").config)
        return str(caught.value)

    trust = "plugins=[my_package]"
    assert "add plugins=[my_package] to the command line" in message("my_env.MyEnv")
    assert "my_package" not in sys.modules  # nothing was imported
    assert "there is no module my_package.nowhere" in message("nowhere.MyEnv", trust)
    assert "Did you mean MyEnv?" in message("my_env.MyEvn", trust)
    assert "is no Environment that can be used" in message("others.NoEnvironment", trust)
    assert "missing 1 required positional argument: 'size'" in message("others.Argument", trust)
    assert "cannot be stepped: ZeroDivisionError: division by zero. See " in message("others.Broken", trust)
    assert "default_params must be a dataclass" in message("others.NoParams", trust)
