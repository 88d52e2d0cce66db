"""Figures show the numbers they are given, in one style, and the same figure is the same file."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.types import Batch
from metarl_cli.report import figures


def metrics(n: int, seeds: int) -> list[dict[str, Any]]:
    """As MAML on point_nav gives them."""
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 1.5, seeds)
    return [
        {
            "iteration": i,
            "steps": 80_000 * i,
            "return_before": (-40 + rng.normal(size=seeds)).tolist(),
            "return_after": (-12 - 28 * np.exp(-5 * i / n) + luck + rng.normal(size=seeds)).tolist(),
        }
        for i in range(1, n + 1)
    ]


def curve(points: int, seeds: int = 5, episodes: int = 40, horizon: int = 100) -> list[dict[str, Any]]:
    mean = -12 - 28 * np.exp(-4 * np.arange(points) / points)
    return [
        {"episodes": p * episodes, "steps": p * episodes * horizon, "mean": m, "iqm": m + 0.2, "ci_low": m - 1.5}
        | {"ci_high": m + 1, "n_tasks": 40, "n_seeds": seeds}
        for p, m in enumerate(mean)
    ]


def walk(goal: np.ndarray, pull: float, episodes: int = 20, horizon: int = 100) -> Batch:
    """Noisy steps, with `pull` towards the goal; an episode ends at the goal."""
    rng = np.random.default_rng(int(1000 * np.abs(goal).sum()))
    position, alive = np.zeros((episodes, 2)), np.ones(episodes, bool)
    observation, action = np.zeros((2, episodes, horizon, 2))
    valid = np.zeros((episodes, horizon), bool)
    for t in range(horizon):
        observation[:, t], valid[:, t] = position, alive
        action[:, t] = pull * (goal - position) + rng.normal(0, 0.03, position.shape)
        position = position + alive[:, None] * np.clip(action[:, t], -0.1, 0.1)
        alive = alive & (np.abs(position - goal) >= 0.01).any(axis=1)
    zeros = np.zeros((episodes, horizon))
    return Batch(observation, action, zeros, zeros > 0, zeros > 0, valid, None, None)  # pyright: ignore[reportArgumentType]


class Navigation:
    """The part of a family that figures use."""

    def draw(self, axes: Axes, task: Any, batch: Batch) -> None:
        axes.add_patch(Rectangle((-0.5, -0.5), 1, 1, fill=False, edgecolor="0.8", linewidth=0.8))
        ends = batch.observation + np.clip(batch.action, -0.1, 0.1)
        for before, after, valid in zip(batch.observation, ends, batch.valid, strict=True):
            path = np.concatenate([before[valid], after[valid][-1:]])
            axes.plot(path[:, 0], path[:, 1], color="C0", linewidth=0.5, alpha=0.5)
        axes.plot(*task.goal, "*", color="C1", markeredgecolor="white", markersize=9, linestyle="none", label="goal")
        axes.set(aspect="equal", xticks=[-0.5, 0, 0.5], yticks=[-0.5, 0, 0.5])


def navigation(tasks: int) -> Figure:
    goals = np.random.default_rng(0).uniform(-0.5, 0.5, (tasks, 2))
    batches = [[walk(goal, 0.0), walk(goal, 0.1)] for goal in goals]
    family = cast(TaskFamily, Navigation())
    return figures.trajectories(family, [SimpleNamespace(goal=g) for g in goals], batches, ["before", "after 3 steps"])


PAIRS = [
    figures.Pair("RL^2", (6.7, 6.6, 6.8), (6.7, 0.0)),
    figures.Pair("SNAIL", None, (6.6, 0.1)),
    figures.Pair("a learner of nobody's_paper", (5.0, 4.9, 5.1), None),
]

MAKERS = {
    "learning": lambda: figures.learning_curve(metrics(100, 5)),
    "learning of many iterations": lambda: figures.learning_curve(metrics(3000, 1)),
    "adaptation": lambda: figures.adaptation_curve(curve(4), "maml", {"oracle": -3.2, "random": -45.0}),
    "adaptation of many points": lambda: figures.adaptation_curve(curve(500, episodes=1), "rl2"),
    "trajectories": lambda: navigation(4),
    "a row of a table": lambda: figures.published_and_ours(PAIRS, "total reward; n=10, k=5", 6.71),
}


def line(axes: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = (drawn for drawn in axes.lines if drawn.get_label() == label)
    return np.asarray(found.get_xdata(), float), np.asarray(found.get_ydata(), float)


def band(axes: Axes, index: int = 0) -> np.ndarray:
    """The corners of a filled band."""
    return [c for c in axes.collections if isinstance(c, PolyCollection)][index].get_paths()[0].vertices  # pyright: ignore


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# --- learning curves


def test_learning_curve_shows_mean_deviation_and_seeds():
    rows = metrics(50, 5)
    (axes,) = figures.learning_curve(rows).axes
    x, y = line(axes, "after adaptation")
    values = np.array([row["return_after"] for row in rows])
    np.testing.assert_allclose(x, [row["steps"] / 1e6 for row in rows])
    np.testing.assert_allclose(y, values.mean(axis=1))
    assert "million" in axes.get_xlabel()
    np.testing.assert_allclose(band(axes, 1)[:, 1].max(), (values.mean(axis=1) + values.std(axis=1)).max())
    thin = [drawn for drawn in axes.lines if drawn.get_linewidth() < 1]
    assert len(thin) == 2 * 5
    assert any(np.array_equal(drawn.get_ydata(), values[:, 3]) for drawn in thin)


def test_learning_curve_of_one_seed_has_no_band():
    figure = figures.learning_curve(metrics(50, 1))
    assert not figure.axes[0].collections and len(figure.axes[0].lines) == 2
    assert texts(figure) == ["before adaptation", "after adaptation"]


def test_learning_curve_averages_many_iterations():
    rows = metrics(1001, 1)  # windows of 6: the last one holds 5
    (axes,) = figures.learning_curve(rows).axes
    x, y = line(axes, "before adaptation")
    values = np.array([row["return_before"][0] for row in rows])
    assert len(y) == 167
    assert y[0] == pytest.approx(values[:6].mean()) and y[-1] == pytest.approx(values[996:].mean())
    assert x[0] == pytest.approx(np.mean([0.08, 0.16, 0.24, 0.32, 0.40, 0.48]))


def test_a_seed_that_turned_nan_ends_and_the_mean_goes_on():
    rows = metrics(30, 3)
    for row in rows[10:]:
        row["return_after"][1] = None
    (axes,) = figures.learning_curve(rows).axes
    _, y = line(axes, "after adaptation")
    assert np.isfinite(y).all()
    assert y[20] == pytest.approx((rows[20]["return_after"][0] + rows[20]["return_after"][2]) / 2)


def test_all_seeds_nan_leaves_a_gap():
    rows = metrics(3, 2)
    rows[1]["return_after"] = [None, None]
    _, y = line(figures.learning_curve(rows).axes[0], "after adaptation")
    assert np.isnan(y).tolist() == [False, True, False]


def test_a_single_line_of_metrics_is_visible():
    (axes,) = figures.learning_curve(metrics(1, 1)).axes
    assert [drawn.get_marker() for drawn in axes.lines] == ["o", "o"]


# --- adaptation curves


def test_adaptation_curve_shows_points_and_interval():
    points = curve(4)
    figure = figures.adaptation_curve(points, "maml", {"oracle": -3.2, "random": -45.0})
    axes = figure.axes[0]
    x, y = line(axes, "maml")
    assert x.tolist() == [0, 40, 80, 120]
    assert y.tolist() == [point["mean"] for point in points]
    corners = band(axes)
    for point in points:
        assert [point["episodes"], point["ci_low"]] in corners.tolist()
        assert [point["episodes"], point["ci_high"]] in corners.tolist()
    assert line(axes, "oracle")[1].tolist() == [-3.2, -3.2]
    assert texts(figure) == ["maml", "95 % interval over seeds and tasks", "oracle", "random"]


def test_one_seed_is_labelled_as_over_tasks_only():
    assert texts(figures.adaptation_curve(curve(4, seeds=1), "maml"))[1] == "95 % interval over tasks"


def test_only_few_points_are_marked():
    for points, marker in ((4, "o"), (500, "None")):
        (drawn,) = figures.adaptation_curve(curve(points), "x").axes[0].lines
        assert drawn.get_marker() == marker


def test_second_axis_in_steps():
    """Episodes need not be equally long: 0, 10, 30 episodes took 0, 1000, 1400 steps."""
    points = curve(3)
    for point, episodes, steps in zip(points, (0, 10, 30), (0, 1000, 1400), strict=True):
        point |= {"episodes": episodes, "steps": steps}
    figure = figures.adaptation_curve(points, "maml")
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    (top,) = axes.child_axes
    assert top.get_xlabel() == "environment steps"
    there = top.xaxis.get_transform()
    for episodes, steps in ((0, 0), (10, 1000), (20, 1200), (30, 1400), (40, 1600), (-1, -100)):
        low, high = axes.get_xlim()
        inside = (there.transform(np.array([float(steps)])) - there.transform(np.array([top.get_xlim()[0]]))) / (
            there.transform(np.array([top.get_xlim()[1]])) - there.transform(np.array([top.get_xlim()[0]]))
        )
        assert inside[0] == pytest.approx((episodes - low) / (high - low))


def test_no_second_axis_where_an_episode_is_a_step():
    assert not figures.adaptation_curve(curve(10, episodes=1, horizon=1), "rl2").axes[0].child_axes


def test_a_single_point():
    (axes,) = figures.adaptation_curve(curve(1), "random").axes
    assert line(axes, "random")[0].tolist() == [0]


# --- trajectories


def test_trajectories_are_drawn_by_the_family_in_comparable_panels():
    figure = navigation(3)
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in figure.axes] == ["task 1", "task 2", "task 3", "", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["before", "", "", "after 3 steps", "", ""]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in figure.axes}) == 1
    (x_low, x_high), (y_low, y_high) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    assert x_high - x_low == pytest.approx(y_high - y_low)  # square
    for axes in figure.axes:  # all that was drawn is inside
        for drawn in axes.lines:
            x, y = np.asarray(drawn.get_xdata(), float), np.asarray(drawn.get_ydata(), float)
            assert x_low <= x.min() and x.max() <= x_high and y_low <= y.min() and y.max() <= y_high
    assert texts(figure) == ["goal"]  # once, not six times


def test_panels_without_equal_aspect_keep_their_limits():
    class Bars:
        def draw(self, axes: Axes, task: Any, batch: Any) -> None:
            axes.bar([1, 2], task)
            axes.set(ylim=(0, 1), ylabel="probability")

    figure = figures.trajectories(cast(TaskFamily, Bars()), [[0.2, 0.5]], [[None]], ["before"])
    (axes,) = figure.axes
    assert axes.get_ylim() == (0, 1)
    assert axes.get_ylabel() == "before\nprobability"
    assert not figure.legends


# --- paper tables


def test_each_learner_has_its_number_and_the_published_one():
    figure = figures.published_and_ours(PAIRS, "total reward", 6.71)
    (axes,) = figure.axes
    assert texts(figure) == ["optimum", "ours", "published"]
    assert [label.get_text().strip() for label in axes.get_yticklabels()] == [pair.label for pair in PAIRS]
    at = dict(zip([pair.label for pair in PAIRS], axes.get_yticks(), strict=True))
    means, means_at = line(axes, "ours")
    assert means.tolist() == [6.7, 5.0]
    np.testing.assert_allclose(means_at, [at["RL^2"], at["a learner of nobody's_paper"]], atol=0.2)
    values, values_at = line(axes, "published")
    assert values.tolist() == [6.7, 6.6]
    np.testing.assert_allclose(values_at, [at["RL^2"], at["SNAIL"]], atol=0.2)
    intervals = [c.get_segments() for c in axes.collections if isinstance(c, LineCollection)]
    np.testing.assert_allclose(np.array(intervals)[..., 0], [[[6.6, 6.8], [4.9, 5.1]], [[6.7, 6.7], [6.5, 6.7]]])
    assert line(axes, "optimum")[0].tolist() == [6.71, 6.71]


def test_nothing_published_and_no_optimum():
    assert texts(figures.published_and_ours(PAIRS[2:], "total reward", None)) == ["ours"]


# --- files and style


@pytest.mark.parametrize("name", MAKERS)
def test_files(name: str, tmp_path: Path):
    figure = MAKERS[name]()
    svg, png = figures.save(figure, tmp_path / "figures" / "a.curve")
    assert (svg, png) == (tmp_path / "figures/a.curve.svg", tmp_path / "figures/a.curve.png")
    root = ET.parse(svg).getroot()
    assert root.tag.endswith("svg")
    assert not list(root.iter("{http://www.w3.org/2000/svg}text"))  # letters are paths: no font is needed to read it
    with Image.open(png) as image:
        assert image.size == pytest.approx([200 * side for side in figure.get_size_inches()], abs=1)
    assert svg.stat().st_size < 1_000_000
    # Made again, every byte is the same.
    again = figures.save(MAKERS[name](), tmp_path / "again")
    assert svg.read_bytes() == again[0].read_bytes() and png.read_bytes() == again[1].read_bytes()


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_is_cut_off_and_the_legend_covers_no_data(name: str):
    figure = MAKERS[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    legend = figure.legends[0].get_window_extent(renderer)
    whole = figure.bbox
    assert whole.x0 <= legend.x0 and legend.x1 <= whole.x1 and legend.y1 <= whole.y1
    for axes in figure.axes:
        assert not legend.overlaps(axes.get_window_extent(renderer))
        outer = axes.get_tightbbox(renderer)
        assert outer is not None
        assert outer.x0 >= whole.x0 - 0.5 and outer.x1 <= whole.x1 + 0.5
        assert outer.y0 >= whole.y0 - 0.5 and outer.y1 <= whole.y1 + 0.5
        assert not legend.overlaps(outer)


def test_the_style_is_ours_and_stays_here():
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):  # somebody's matplotlibrc
        (axes,) = figures.learning_curve(metrics(5, 1)).axes
    assert axes.xaxis.label.get_fontsize() == 8
    assert dict(matplotlib.rcParams) == before


def test_no_pyplot_and_no_matplotlib_before_it_is_needed(tmp_path: Path):
    """pyplot looks for a window system; matplotlib itself costs 0.3 s."""
    code = (
        "import sys; from pathlib import Path; from metarl_cli.report import figures\n"
        "assert 'matplotlib' not in sys.modules and 'jax' not in sys.modules\n"
        "row = {'steps': 1, 'return_before': [0.0], 'return_after': [1.0]}\n"
        "figures.save(figures.learning_curve([row]), Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "x"], check=True)
    assert (tmp_path / "x.png").stat().st_size > 1000
