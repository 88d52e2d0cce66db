"""Figures of a run, in one style, good enough for a paper: column width, fonts that stay readable, colours that stay apart
for the colour-blind (Okabe and Ito) and in grey.

Every function returns a figure; `save` writes it as SVG (text as paths: it looks the same everywhere; no date: the same
figure is the same file) and PNG. Matplotlib is imported late, and without pyplot: no window system, no global state.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from metarl_cli.core.interfaces import TaskFamily

P = ParamSpec("P")
R = TypeVar("R")

BEFORE, AFTER, ACCENT, NEUTRAL = "#E69F00", "#0072B2", "#D55E00", "#767676"
COLUMN, TEXT = 3.4, 7.0  # inches: one column, and the width of a page's text
_LINES = 200  # points of a curve beyond which it is averaged

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#404040",
    "axes.labelcolor": "#202020",
    "xtick.color": "#404040",
    "ytick.color": "#404040",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "axes.unicode_minus": True,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "metarl",
    "path.simplify": True,
}


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what the user's matplotlibrc says
        matplotlib.rcParams.update(_STYLE)
        yield


def _styled(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with _style():
            return function(*args, **kwargs)

    return inner


@_styled
def save(figure: Figure, path: Path) -> list[Path]:
    """Writes `path`.svg and `path`.png (200 dpi); the folder is made. Returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png")]
    figure.savefig(files[0], format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(files[1], format="png", dpi=200, metadata={"Software": None})
    return files


@_styled
def learning_curve(rows: Sequence[Mapping[str, Any]], label: str = "") -> Figure:
    """Return before and after adaptation against the environment steps of the training.

    Thin lines are seeds, the thick one their mean, the band one standard deviation of the seeds to either side.

    Args:
        rows: the lines of metrics.jsonl, at least one; `None` (NaN) leaves a gap in that seed.
        label: what was trained, e.g. `maml on point_nav`.
    """
    figure, axes = _figure(COLUMN, 2.4)
    steps = np.array([row["steps"] for row in rows], np.float64)
    scale, unit = _unit(steps.max())
    seeds = 1
    for key, name, colour in (("return_before", "before", BEFORE), ("return_after", "after", AFTER)):
        values = np.array([np.atleast_1d(np.asarray(row[key], np.float64)) for row in rows])  # [rows, S]
        seeds = values.shape[1]
        window = -(-len(rows) // _LINES)
        x, smooth = _window_means(steps / scale, window), _window_means(values, window)
        mean, spread = _mean_and_deviation(smooth)
        if seeds > 1:
            axes.plot(x, smooth, color=colour, linewidth=0.4, alpha=0.55, zorder=2)
            axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.18, linewidth=0, zorder=1)
        elif window > 1:
            axes.plot(steps / scale, values, color=colour, linewidth=0.3, alpha=0.35, zorder=1)
        axes.plot(x, mean, color=colour, label=f"{name} adaptation", zorder=3, marker="o" if len(x) == 1 else None)
    axes.set_xlabel(f"training experience ({unit}environment steps per seed)")
    axes.set_ylabel("return of an episode")
    axes.set_xlim(left=0)
    _legend(figure, axes, title=f"mean ± s.d. of {seeds} seeds" if seeds > 1 else None, label=label)
    return figure


@_styled
def adaptation_curve(
    curve: Sequence[Mapping[str, Any]], label: str, references: Mapping[str, float] | None = None
) -> Figure:
    """Return against the experience in a new task, with the 95 % interval.

    Args:
        curve: points `{episodes, steps, mean, ci_low, ci_high, n_seeds, ...}`, as in result.json.
        label: of the curve, e.g. `maml`.
        references: name -> return, drawn as horizontal lines, e.g. `{"oracle": -3.2}`.
    """
    figure, axes = _figure(COLUMN, 2.4)
    episodes, steps, mean, low, high = (
        np.array([point[key] for point in curve], np.float64) for key in ("episodes", "steps", "mean", "ci_low", "ci_high")
    )
    over = "seeds and tasks" if curve[0].get("n_seeds", 1) > 1 else "tasks"
    axes.fill_between(episodes, low, high, color=AFTER, alpha=0.22, linewidth=0, label=f"95 % interval over {over}", zorder=1)
    marked = {"marker": "o", "markersize": 3.5} if len(curve) <= 40 else {}
    if marked:
        axes.vlines(episodes, low, high, color=AFTER, linewidth=0.8, zorder=2)
    axes.plot(episodes, mean, color=AFTER, label=label, zorder=3, **marked)
    for (name, value), dashes in zip((references or {}).items(), _DASHES, strict=False):
        axes.axhline(value, color=NEUTRAL, linewidth=0.9, linestyle=dashes, label=name, zorder=1.5)
    axes.set_xlabel("experience in the new task (episodes)")
    axes.set_ylabel("return of an episode")
    if not np.array_equal(episodes, steps) and len(curve) > 1:
        _steps_axis(axes, episodes, steps)
    _legend(figure, axes)
    return figure


@_styled
def trajectories(
    family: TaskFamily, tasks: Sequence[Any], batches: Sequence[Sequence[Any]], titles: Sequence[str]
) -> Figure:
    """What the learner did in M tasks (columns) at C moments of a trial (rows), drawn by the family.

    Args:
        family: draws each panel (`TaskFamily.draw`).
        tasks: M tasks, unbatched, numpy.
        batches: `[M][C]` batches `[K, T]` of one task at one moment, numpy.
        titles: C names of the moments, e.g. `before adaptation`.
    """
    rows, columns = len(titles), len(tasks)
    side = min(1.75, TEXT / columns)
    figure, _ = _figure(side * columns + 0.35, side * rows + 0.2, empty=True)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for m, task in enumerate(tasks):
        for c, title in enumerate(titles):
            axes = panels[c, m]
            axes.grid(False)
            family.draw(axes, task, batches[m][c])
            axes.label_outer()
            if c == 0:
                axes.set_title(f"task {m + 1}")
            if m == 0:
                below = axes.get_ylabel()
                axes.set_ylabel(f"{title}\n{below}".strip())
    return figure


# --- parts

_DASHES = ("--", ":", "-.", (0, (6, 1)), (0, (1, 2)), (0, (3, 1, 1, 1, 1, 1)))


def _figure(width: float, height: float, empty: bool = False) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot() if not empty else None  # type: ignore[return-value]


def _legend(figure: Figure, axes: Axes, title: str | None = None, label: str = "") -> None:
    """Above the axes: there it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, title=title)


def _steps_axis(axes: Axes, episodes: np.ndarray, steps: np.ndarray) -> None:
    """A second axis on top, in environment steps; between points and beyond them the line is straight."""
    scale, unit = _unit(steps.max())

    def line(x: np.ndarray, of: np.ndarray, to: np.ndarray) -> np.ndarray:
        inside = np.interp(x, of, to)
        below = to[0] + (x - of[0]) * (to[1] - to[0]) / (of[1] - of[0])
        above = to[-1] + (x - of[-1]) * (to[-1] - to[-2]) / (of[-1] - of[-2])
        return np.where(x < of[0], below, np.where(x > of[-1], above, inside))

    top = axes.secondary_xaxis(
        "top", functions=(lambda x: line(x, episodes, steps / scale), lambda x: line(x, steps / scale, episodes))
    )
    top.set_xlabel(f"{unit}environment steps")


def _unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "billion "), (1e6, "million "), (1e4, "thousand ")):
        if largest >= scale:
            return (1e3 if scale == 1e4 else scale), unit
    return 1.0, ""


def _window_means(x: np.ndarray, window: int) -> np.ndarray:
    """Means of consecutive windows along the first axis; the last may be shorter."""
    return np.array([_mean(x[i : i + window]) for i in range(0, len(x), window)])


def _mean(x: np.ndarray) -> np.ndarray:
    """Over the first axis, without NaN; NaN where nothing is left."""
    valid = np.isfinite(x)
    return np.where(valid.any(axis=0), np.where(valid, x, 0).sum(axis=0) / np.maximum(valid.sum(axis=0), 1), np.nan)


def _mean_and_deviation(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the last axis, without NaN."""
    mean = _mean(x.T)
    return mean, np.sqrt(_mean(np.square(x.T - mean)))
