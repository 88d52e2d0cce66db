"""Figures of a run, in one style, good enough for a paper: column width, fonts that stay readable, colours that stay
apart for the colour-blind (Okabe and Ito) and in grey.

Every function returns a figure; `save` writes it as SVG (text as paths: it looks the same everywhere; no date: the same
figure is the same file) and PNG. Matplotlib is imported late, and without pyplot: no window system, no global state.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from metarl_cli.core.interfaces import TaskFamily

P = ParamSpec("P")
R = TypeVar("R")

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#767676"
CYCLE = (BLUE, "#D55E00", "#009E73", ORANGE, "#CC79A7", "#56B4E9", "#000000")  # `C0`, `C1` ... in `TaskFamily.draw`
COLUMN, TEXT = 3.4, 7.0  # inches: one column, and the width of a page's text
_LINES = 200  # points of a learning curve beyond which it is averaged
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("--", ":", "-.", (0, (6, 1)), (0, (1, 2)), (0, (3, 1, 1, 1, 1, 1)))

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.0,
    "legend.handletextpad": 0.5,
    "legend.borderpad": 0,
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
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "metarl",
}


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what the user's matplotlibrc says
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["axes.prop_cycle"] = cycler(color=CYCLE)
        yield


def _styled(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with _style():
            return function(*args, **kwargs)

    return inner


@_styled
def save(figure: Figure, path: Path) -> list[Path]:
    """Writes `path`.svg and `path`.png (200 dpi), each at once or not at all; the folder is made. Returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        file = path.with_name(f"{path.name}.{kind}")
        new = file.with_name(f".{file.name}")
        figure.savefig(new, format=kind, dpi=200 if kind == "png" else "figure", metadata=metadata)
        files.append(new.replace(file))
    return files


@_styled
def learning_curve(
    rows: Sequence[Mapping[str, Any]], names: tuple[str, str] = ("before adaptation", "after adaptation")
) -> Figure:
    """Return at the start and at the end of a trial against the environment steps of the training.

    Thin lines are seeds, the thick one their mean, the band one standard deviation of the seeds to either side. More
    than 200 lines of metrics are averaged in windows; with one seed the unaveraged ones stay visible behind.

    Args:
        rows: the lines of metrics.jsonl, at least one; `None` (NaN) leaves a gap in that seed.
        names: what start and end of a trial are, e.g. `before adaptation`, `after adaptation`.
    """
    figure = _figure(COLUMN, 2.3)
    axes = figure.add_subplot()
    steps = np.array([row["steps"] for row in rows], np.float64)
    scale, unit = _unit(steps.max())
    seeds = 1
    for key, name, colour in (("return_before", names[0], ORANGE), ("return_after", names[1], BLUE)):
        values = np.array([np.atleast_1d(np.asarray(row[key], np.float64)) for row in rows])  # [rows, S]
        seeds = values.shape[1]
        window = -(-len(rows) // _LINES)
        x, smooth = _window_means(steps / scale, window), _window_means(values, window)
        mean, spread = _mean_and_deviation(smooth)
        if seeds > 1:
            axes.plot(x, smooth, color=colour, linewidth=0.4, alpha=0.45, zorder=2)
            axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.18, linewidth=0, zorder=1)
        elif window > 1:
            axes.plot(steps / scale, values, color=colour, linewidth=0.3, alpha=0.35, zorder=1)
        axes.plot(x, mean, color=colour, label=name, zorder=3, marker="o" if len(x) == 1 else None)
    if seeds > 1:
        axes.fill_between([], [], color=GREY, alpha=0.3, linewidth=0, label=f"±1 s.d., {seeds} seeds")
    axes.set_xlabel(f"environment steps in training ({unit}per seed)")
    axes.set_ylabel("return of an episode")
    axes.set_xlim(0, 1.02 * steps.max() / scale)
    _legend(figure, [axes], columns=3)
    return figure


@_styled
def sweep(points: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """A metric against each parameter of a sweep: a dot for each run, a line through the means.

    Args:
        points: of each run its parameters and the metric. `seed` has a panel only where nothing else was swept.
        metric: the key of the metric.
    """
    names = list(dict.fromkeys(name for point in points for name in point if name != metric))
    names = [name for name in names if name != "seed"] or names or ["seed"]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(COLUMN if columns == 1 else TEXT, 2.1 * rows + 0.2)
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        pairs = [(point.get(name), float(point[metric])) for point in points]
        values: list[Any] = list(dict.fromkeys(value for value, _ in pairs))
        numbers = all(isinstance(value, int | float) for value in values)
        place_of: dict[Any, Any] = {value: i for i, value in enumerate(values)}
        if numbers:
            values.sort()
            place_of = {value: value for value in values}
            if values[0] > 0 and values[-1] >= 10 * values[0]:
                axes.set_xscale("log")
            else:
                axes.locator_params(axis="x", nbins=4)
        else:
            axes.set_xticks(range(len(values)), [str(value) for value in values], rotation=30 if len(values) > 4 else 0)
        means = [float(np.mean([y for value, y in pairs if value == x])) for x in values]
        axes.scatter([place_of[x] for x, _ in pairs], [y for _, y in pairs], s=9, color=BLUE, alpha=0.5, linewidths=0)
        if len(pairs) > len(values) > 1:  # else every mean is a single run
            axes.plot([place_of[x] for x in values], means, color=BLUE, marker="o", markersize=3, zorder=3)
        axes.set_xlabel(name)
        if place % columns == 0:
            axes.set_ylabel(metric.replace("_", " "))
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
    figure = _figure(COLUMN, 2.5)
    axes = figure.add_subplot()
    keys = ("episodes", "steps", "mean", "ci_low", "ci_high")
    episodes, steps, mean, low, high = (np.array([point[key] for point in curve], np.float64) for key in keys)
    marked = len(curve) <= 40
    axes.plot(episodes, mean, color=BLUE, label=label, zorder=3, marker="o" if marked else None, markersize=3.5)
    over = "seeds and tasks" if curve[0]["n_seeds"] > 1 else "tasks"
    band = f"95 % interval over {over}"
    axes.fill_between(episodes, low, high, color=BLUE, alpha=0.22, linewidth=0, label=band, zorder=1)
    for (name, value), dashes in zip((references or {}).items(), itertools.cycle(_DASHES)):
        axes.axhline(value, color=GREY, linewidth=0.9, linestyle=dashes, label=name, zorder=1.5)
    axes.set_xlabel("experience in the new task (episodes)")
    axes.set_ylabel("return of an episode")
    if not np.array_equal(episodes, steps) and len(curve) > 1:
        _steps_axis(axes, episodes, steps)
    _legend(figure, [axes], columns=2)
    return figure


@_styled
def trajectories(
    family: TaskFamily, tasks: Sequence[Any], batches: Sequence[Sequence[Any]], titles: Sequence[str], who: str = ""
) -> Figure:
    """What the learner did in M tasks (columns) at C moments of a trial (rows), drawn by the family.

    All panels share their limits; where the family asks for an equal aspect they are squares. Labels of what the family
    draws become the legend.

    Args:
        family: draws each panel (`TaskFamily.draw`).
        tasks: M tasks, unbatched, numpy.
        batches: `[M][C]` batches `[K, T]` of one task at one moment, numpy.
        titles: C names of the moments, e.g. `before adaptation`.
        who: follows the number of each task, e.g. `, seed 3`.
    """
    rows, columns = len(titles), len(tasks)
    side = min(1.75, TEXT / columns)
    figure = _figure(side * columns + 0.4, side * rows + 0.5)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for m, task in enumerate(tasks):
        for c, title in enumerate(titles):
            axes = panels[c, m]
            axes.grid(False)
            family.draw(axes, task, batches[m][c])
            if m == 0:
                axes.set_ylabel("\n".join(part for part in (title, axes.get_ylabel()) if part))
            axes.label_outer()
        panels[0, m].set_title(f"task {m + 1}{who}")
    if panels[0, 0].get_aspect() == 1:
        _square(panels[0, 0])
    _legend(figure, panels.flat, columns=4)
    return figure


@_styled
def parameters(values: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """How the numbers that make a task are distributed, a panel for each; every histogram has its peak at the same height,
    else one that is narrow, or a single value, would hide the others.

    Args:
        values: name of the number -> split -> its values `[N]` in N tasks.
    """
    columns = min(4, len(values))
    rows = -(-len(values) // columns)
    figure = _figure(TEXT / 4 * columns + 0.2, 1.4 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, splits) in zip(panels.flat, values.items(), strict=False):
        every = np.concatenate(list(splits.values()))
        edges = np.histogram_bin_edges(every, bins=100)
        for (split, x), colour in zip(splits.items(), (BLUE, ORANGE, GREY), strict=False):
            height = np.histogram(x, edges)[0]
            axes.stairs(height / height.max(), edges, color=colour, fill=True, alpha=0.3)
            axes.stairs(height / height.max(), edges, color=colour, linewidth=0.7)
            axes.fill_between([], [], color=colour, alpha=0.5, linewidth=0, label=split)
        axes.set(xlabel=name, yticks=[], ylim=(0, 1.05))
        axes.margins(x=0.05)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        axes.grid(False)
    for axes in panels.flat[len(values) :]:
        axes.remove()
    panels[0, 0].set_ylabel("relative frequency")
    _legend(figure, panels.flat, columns=3)
    return figure


@_styled
def estimators(estimates: Sequence[Any]) -> Figure:
    """Cosine with the reference, relative variance and seconds against the batch size, a line for each estimator.

    Args:
        estimates: `diagnosis.Estimate`s.
    """
    figure = _figure(TEXT, 2.3)
    left, middle, right = figure.subplots(1, 3)
    names = dict.fromkeys(e.estimator for e in estimates)
    for name, colour, marker in zip(names, CYCLE, _MARKERS, strict=False):
        of_name = [e for e in estimates if e.estimator == name]
        size = [e.episodes for e in of_name]
        marked: Any = {"color": colour, "marker": marker, "markersize": 3.5, "label": name}
        left.plot(size, [e.cosine["mean"] for e in of_name], **marked)
        low, high = ([e.cosine[key] for e in of_name] for key in ("ci_low", "ci_high"))
        left.fill_between(size, low, high, color=colour, alpha=0.18, linewidth=0)
        middle.plot(size, [e.variance for e in of_name], **marked)
        right.plot(size, [1e3 * e.seconds for e in of_name], **marked)
    left.set_ylabel("cosine with the reference")
    middle.set(ylabel="relative variance", yscale="log")
    right.set(ylabel="milliseconds", yscale="log")
    for axes in (left, middle, right):
        axes.set(xlabel="episodes of a task", xscale="log")
        sizes = sorted({e.episodes for e in estimates})
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
    _legend(figure, [left], columns=4)
    return figure


# --- of several learners


class Curve(NamedTuple):
    """One learner's line with its band, `[M]` each."""

    label: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    place: int | None = None  # of its colour; None: as it comes


@_styled
def curves(
    lines: Sequence[Curve], xlabel: str, ylabel: str, references: Mapping[str, float] | None = None, log: bool = False
) -> Figure:
    """Several learners on one axis; colours, dashes and markers differ together.

    Args:
        references: name -> value, drawn as horizontal lines.
        log: whether x is logarithmic beyond its smallest positive value; learners may have gathered very different amounts.
    """
    figure = _figure(COLUMN, 2.6)
    axes = figure.add_subplot()
    for i, line in enumerate(lines):
        i = i if line.place is None else line.place
        colour, dash = CYCLE[i % len(CYCLE)], "-" if i < len(CYCLE) else _DASHES[i % len(_DASHES)]
        marker = _MARKERS[i % len(_MARKERS)] if len(line.x) <= 12 else None
        label = plain_text(line.label)
        axes.plot(line.x, line.mean, color=colour, linestyle=dash, marker=marker, markersize=3.5, label=label, zorder=3)
        if len(line.x) > 1:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0, zorder=1)
        else:
            axes.vlines(line.x, line.low, line.high, color=colour, linewidth=1, zorder=2)
    for (name, value), dashes in zip((references or {}).items(), itertools.cycle(_DASHES)):
        axes.axhline(value, color=GREY, linewidth=0.9, linestyle=dashes, label=plain_text(name), zorder=1.5)
    positive = [x for line in lines for x in line.x if x > 0]
    if log and positive:
        from matplotlib.ticker import FixedLocator

        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
        decades = range(math.ceil(math.log10(min(positive))), math.ceil(math.log10(max(positive))) + 1)
        axes.xaxis.set_major_locator(FixedLocator([0, *(10.0**k for k in decades)]))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _legend(figure, [axes], columns=2)
    return figure


@_styled
def improvements(pairs: Sequence[tuple[str, str, float, float, float]]) -> Figure:
    """How likely one learner is better than another: dots with 95 % intervals; on the dashed line neither is.

    Args:
        pairs: X, Y, the probability that X is better, and its interval.
    """
    figure = _figure(COLUMN, 0.7 + 0.3 * len(pairs))
    axes = figure.add_subplot()
    places = np.arange(len(pairs))[::-1]
    value, low, high = (np.array([pair[i] for pair in pairs]) for i in (2, 3, 4))
    axes.axvline(0.5, color=GREY, linewidth=0.9, linestyle="--")
    axes.hlines(places, low, high, color=BLUE, linewidth=1.4)
    axes.plot(value, places, "o", color=BLUE, markersize=4)
    axes.set_yticks(places, [f"{plain_text(x, 24)}\n> {plain_text(y, 24)}" for x, y, *_ in pairs])
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.6, len(pairs) - 0.4), xlabel="probability that the first is better on a task")
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    return figure


class Pair(NamedTuple):
    """What one learner reached in a row of a paper's table; at least one of the two is known."""

    label: str
    ours: tuple[float, float, float] | None  # mean, and its interval
    published: tuple[float, float] | None  # the number, and half the width of its interval; 0: none was printed


@_styled
def published_and_ours(pairs: Sequence[Pair], xlabel: str, optimum: float | None) -> Figure:
    """A row of a paper's table: of each learner our mean with its 95 % interval, and below it what was published."""
    figure = _figure(COLUMN, 0.8 + 0.24 * len(pairs))
    axes = figure.add_subplot()
    place = np.arange(len(pairs))[::-1]
    if optimum is not None:
        axes.axvline(optimum, color=GREY, linewidth=0.9, linestyle="--", label="optimum", zorder=1.5)
    ours = [(at + 0.13, *pair.ours) for at, pair in zip(place, pairs, strict=True) if pair.ours]
    if ours:
        at, mean, low, high = np.array(ours).T
        axes.hlines(at, low, high, color=BLUE, linewidth=1.4)
        axes.plot(mean, at, "o", color=BLUE, markersize=3.5, linestyle="none", label="ours", zorder=3)
    published = [(at - 0.17, *pair.published) for at, pair in zip(place, pairs, strict=True) if pair.published]
    if published:
        at, value, half = np.array(published).T
        axes.hlines(at, value - half, value + half, color=CYCLE[1], linewidth=0.9)
        style: Any = {"color": CYCLE[1], "markerfacecolor": "white", "markersize": 4, "linestyle": "none"}
        axes.plot(value, at, "D", **style, label="published", zorder=3)
    axes.set_yticks(place, [plain_text(pair.label, 28) for pair in pairs])
    axes.set(ylim=(-0.6, len(pairs) - 0.4), xlabel=xlabel)
    axes.margins(x=0.06)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    _legend(figure, [axes], columns=3)
    return figure


def plain_text(label: str, width: int = 44) -> str:
    """A label as it is: no mathematics between dollars, no hiding behind an underscore, no line breaks, not too long."""
    text = "".join(x if x.isprintable() else " " for x in label)
    text = text if len(text) <= width else f"{text[: width - 1]}…"
    return f" {text}".replace("$", "\\$") if text.startswith("_") else text.replace("$", "\\$")


@_styled
def svg(figure: Figure) -> str:
    """The figure as it stands in a page; the same figure is the same text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


# --- parts


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")  # its canvas is Agg's


def _legend(figure: Figure, panels: Iterable[Axes], columns: int) -> None:
    """Above the axes, where it covers no data; what several panels show stands there once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles and max(map(len, handles)) > 14 * figure.get_figwidth() / columns - 5:  # characters: they would not fit
        columns = 1
        figure.set_figheight(figure.get_figheight() + 0.16 * len(handles))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns)


def _square(axes: Axes) -> None:
    """The same span on both axes, around the middle of what is there."""
    x, y = axes.get_xlim(), axes.get_ylim()
    half = max(x[1] - x[0], y[1] - y[0]) / 2
    axes.set(xlim=(sum(x) / 2 - half, sum(x) / 2 + half), ylim=(sum(y) / 2 - half, sum(y) / 2 + half))


def _steps_axis(axes: Axes, episodes: np.ndarray, steps: np.ndarray) -> None:
    """A second axis on top, in environment steps; between points and beyond them the line is straight."""
    scale, unit = _unit(steps.max())

    def line(x: Any, of: np.ndarray, to: np.ndarray) -> np.ndarray:
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
