"""One HTML page about runs and paper tables: nothing is loaded from elsewhere, so it can be mailed or kept beside a paper.

Everything that comes from a config, a path or a result is escaped. Figures are images within the page, each with a link that
saves it as SVG.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metarl_cli.core.statistics import performance_profile, probability_of_improvement, summarise
from metarl_cli.logs import clock, count
from metarl_cli.report import figures, runs
from metarl_cli.report.figures import Curve, Pair
from metarl_cli.report.runs import Group, Learner, Run

PAIRS = 8  # comparisons in one figure
THRESHOLDS = 60  # of a performance profile
_STYLE = Path(__file__).with_suffix(".css")
LARGEST = 250_000  # bytes of trajectories in a page: those of further learners are left out

Cell = str | tuple[str, str]  # text, or text and a class of it


class Row(NamedTuple):
    """A row of a paper's table to be drawn."""

    label: str
    pairs: list[Pair]
    optimum: float | None


class Table(NamedTuple):
    """A paper's table as text, and its rows to be drawn."""

    name: str
    title: str
    quantity: str
    columns: list[str]
    rows: list[list[Cell]]
    explanation: list[str]
    drawn: list[Row]


def write(file: Path, title: str, found: list[Run], tables: Sequence[Table], date: str) -> None:
    """Writes the page.

    Args:
        date: of today, ISO.
    """
    groups = runs.groups(found)
    parts = [f"<h1>{text(title)}</h1>", f'<p class="quiet">metarl report, {text(date[:10])}</p>']
    parts += [_paper_table(table) for table in tables]
    if found:
        parts += ["<h2>What was run</h2>", _what(groups)]
        parts += [_group(group) for group in groups]
        parts += ["<h2>Cost</h2>", _cost(groups), "<h2>Provenance</h2>", _provenance(found)]
    page = _PAGE.format(title=text(title), style=_STYLE.read_text(encoding="utf-8"), body="\n".join(parts), script=_SCRIPT)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")


def text(value: Any) -> str:
    return html.escape(str(value), quote=True)


# --- sections


def _paper_table(table: Table) -> str:
    below = "".join(f"<li>{_code(line)}</li>" for line in table.explanation)
    summary = "<summary>How to read it, and where it comes from</summary>"
    numbers = _table(table.columns, table.rows)
    images = "".join(
        _figure(
            figures.published_and_ours(row.pairs, f"{table.quantity}; {row.label}", row.optimum),
            f"{table.name}_{row.label}",
            f"{row.label}: published and ours with 95 % intervals",
        )
        for row in table.drawn
    )
    return (
        f"<h2>{text(f'{table.title}: {table.quantity}')}</h2>{numbers}"
        f'<div class="figures">{images}</div><details open>{summary}<ul>{below}</ul></details>'
    )


def _code(line: str) -> str:
    """The command in a line of explanation stands out."""
    head, found, command = line.partition(": metarl ")
    return f"{text(head)}:<br><code>metarl {text(command)}</code>" if found else text(line)


def _what(groups: list[Group]) -> str:
    rows: list[list[Cell]] = []
    for group in groups:
        for learner in group.learners:
            first = learner.runs[0]
            states = ", ".join(dict.fromkeys(run.status for run in learner.runs))
            trained = [run.result["train"]["iterations"] for run in learner.runs if "train" in run.result]
            seeds = learner.seeds
            rows.append(
                [
                    learner.label,
                    f"{group.env}, {group.split}",
                    _ranges(seeds) if seeds else "",
                    str(max(trained)) if trained else "",
                    states if states == "completed" else (states, "bad"),
                    (first.command, "code"),
                ]
            )
    return _table(["learner", "tasks", "seeds", "meta-iterations", "status", "command"], rows)


def _group(group: Group) -> str:
    title = f"<h2>{text(group.env)}, {text(group.split)} tasks</h2>"
    what, scores = runs.scores(group)
    parts = [title]
    if scores:
        parts.append(_results(group, what, scores))
    else:
        parts.append("<p>None of these runs has been evaluated yet.</p>")
    shown = []
    lines = _lines(runs.adaptation, group)
    if lines:
        spans = [line.x[-1] for line in lines if line.x[-1] > 0]
        log = bool(spans) and max(spans) > 10 * min(spans)
        figure = figures.curves(lines, "experience in the new task (steps)", "return of an episode", log=log)
        shown.append(
            _figure(
                figure, "adaptation", f"Adaptation in new tasks of {group.env}: mean and 95 % interval over {_over(group)}."
            )
        )
    lines = _lines(runs.regret, group)
    if lines:
        best = group.optimum.get("regret")
        references = {} if best is None else {"Bayes-optimal, at the end": best}
        figure = figures.curves(lines, "experience in the new task (episodes)", "cumulative regret", references)
        shown.append(_figure(figure, "regret", f"Regret so far in new tasks of {group.env}, in expectation; 95 % interval."))
    lines = _lines(runs.training, group)
    if lines:
        scale = max(line.x[-1] for line in lines)
        unit = next(
            ((size, name) for size, name in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")) if scale >= size),
            (1, ""),
        )
        lines = [line._replace(x=line.x / unit[0]) for line in lines]
        figure = figures.curves(lines, f"{unit[1]}steps of training per seed", "return at the end of a trial")
        shown.append(_figure(figure, "learning", "Learning curves: mean of the seeds, band one standard deviation."))
    if len(scores) > 1:
        shown.append(_improvement(what, scores))
    if scores:
        shown.append(_profile(what, scores, [learner.label for learner in group.learners]))
    parts.append(f'<div class="figures">{"".join(shown)}</div>')
    parts.append(_trajectories(group))
    return "\n".join(filter(None, parts))


def _lines(draw: Callable[[Learner], Curve | None], group: Group) -> list[Curve]:
    """Of the learners that have one; a learner has the same colour in all figures of the group."""
    lines = [(i, draw(learner)) for i, learner in enumerate(group.learners)]
    return [line._replace(place=i) for i, line in lines if line is not None]


def _over(group: Group) -> str:
    return "seeds and tasks" if any(len(learner.seeds) > 1 for learner in group.learners) else "tasks"


def _results(group: Group, what: str, scores: dict[str, np.ndarray]) -> str:
    """What each learner got, with the share of the gap between chance and the optimum where that is known."""
    rows: list[list[Cell]] = []
    best = group.optimum
    for learner in group.learners:
        if learner.label not in scores:
            continue
        values = scores[learner.label]
        s = summarise(values)
        row: list[Cell] = [
            learner.label,
            f"{s['mean']:.2f}",
            f"[{s['ci_low']:.2f}, {s['ci_high']:.2f}]",
            f"{s['iqm']:.2f}",
            str(s["n_seeds"]),
            str(s["n_tasks"]),
        ]
        if best:
            shares = [run.evaluation.get("optimum", {}).get("share") for run in learner.runs]
            known = [share for share in shares if share is not None]
            row.append(f"{100 * sum(known) / len(known):.1f} %" if known else "")
        rows.append(row)
    head = [
        "learner",
        "mean",
        "95 %",
        "interquartile mean",
        "seeds",
        "tasks",
        *(["share of what is possible"] if best else []),
    ]
    note = f"<p>{text(what[0].upper() + what[1:])}."
    if best:
        note += f" The best possible is {best['value']:.2f} ({text(best['method'])}), chance {best['random']:.2f}:"
        note += " the share is 0 for chance and 100 % for the best; who is told the task can exceed it, and so can luck."
    return _table(head, rows) + note + "</p>"


def _improvement(what: str, scores: dict[str, np.ndarray]) -> str:
    """Each pair if they are few, else each learner against the best one."""
    order = sorted(scores, key=lambda label: -scores[label].mean())
    every = list(itertools.combinations(order, 2))
    chosen = every if len(every) <= PAIRS else [(order[0], other) for other in order[1 : PAIRS + 1]]
    chosen = [(x, y) for x, y in chosen if scores[x].shape[1] == scores[y].shape[1]]
    pairs = [(x, y, *probability_of_improvement(scores[x], scores[y])) for x, y in chosen]
    if not pairs:
        return ""
    left_out = f" The best one against {len(chosen)} of the others." if len(every) > PAIRS else ""
    caption = f"How often the first learner beats the second on the same task, ties counted half; {what}.{left_out}"
    return _figure(figures.improvements(pairs), "improvement", caption)


def _profile(what: str, scores: dict[str, np.ndarray], labels: list[str]) -> str:
    every = np.concatenate([x.ravel() for x in scores.values()])
    low, high = np.quantile(every, (0.001, 0.999))
    margin = 0.02 * (high - low) or 1.0
    thresholds = np.linspace(low - margin, high + margin, THRESHOLDS)
    lines = []
    for label, values in scores.items():
        share, below, above = performance_profile(values[:, :: max(1, values.shape[1] // 2000)], thresholds)
        lines.append(Curve(label, thresholds, share, below, above, labels.index(label)))
    figure = figures.curves(lines, what, "share of seeds and tasks above it")
    return _figure(
        figure, "profile", "Performance profiles: the share of all seeds and tasks that end above a value; 95 % interval."
    )


def _trajectories(group: Group) -> str:
    found, left_out, size = [], [], 0
    for learner in group.learners:
        file = learner.runs[0].path / "figures" / "trajectories.svg"
        svg = _coarse(file.read_text(encoding="utf-8")) if file.is_file() else ""
        if svg and size + len(svg) <= LARGEST:
            size += len(svg)
            found.append(_image(svg, "trajectories", f"{learner.label}: what it did in the first tasks."))
        elif svg:
            left_out.append(f"{learner.label} ({file})")
    rest = f"<p>Not shown, to keep the page small: {text(', '.join(left_out))}.</p>" if left_out else ""
    return f'<h3>Trajectories</h3><div class="figures wide">{"".join(found)}</div>{rest}' if found or rest else ""


def _cost(groups: list[Group]) -> str:
    rows: list[list[Cell]] = []
    for group in groups:
        for learner in group.learners:
            spent = [run.result.get("train", {}) for run in learner.runs]
            steps = sum(
                x.get("steps", 0) * len(run.result.get("seeds", [])) for x, run in zip(spent, learner.runs, strict=True)
            )
            seconds, compiling = (sum(x.get(key, 0) for x in spent) for key in ("wall_seconds", "compile_seconds"))
            peak = max((run.result.get("memory", {}).get("peak_bytes") or 0 for run in learner.runs), default=0)
            device = max((run.result.get("memory", {}).get("peak_device_bytes") or 0 for run in learner.runs), default=0)
            speeds = [x["steps_per_second"] for x in spent if x.get("steps_per_second")]
            rows.append(
                [
                    learner.label,
                    group.env,
                    count(steps) if steps else "",
                    clock(seconds) if seconds else "",
                    f"{compiling:.1f} s" if seconds else "",
                    count(sum(speeds) / len(speeds)) if speeds else "",
                    f"{peak / 1e6:.0f} MB" if peak else "",
                    f"{device / 1e6:.0f} MB" if device else "",
                ]
            )
    head = [
        "learner",
        "tasks",
        "training steps, all seeds",
        "time",
        "of it compiling",
        "steps/s",
        "peak memory",
        "on the device",
    ]
    return _table(head, rows)


def _provenance(found: list[Run]) -> str:
    parts = []
    for run in found:
        result = run.result
        device, versions = result.get("device", {}), result.get("versions", {})
        facts = {
            "directory": run.path,
            "date": result.get("date", ""),
            "device": ", ".join(f"{key} {x}" for key, x in device.items()),
            "versions": ", ".join(f"{key} {x}" for key, x in versions.items()),
            "revision": result.get("git_revision") or "",
            "failed seeds": ", ".join(map(str, result.get("failed_seeds", []))),
        }
        rows: list[list[Cell]] = [[name, str(x)] for name, x in facts.items() if str(x)]
        settings = "".join(f"<li><code>{text(f'{key}={_short(x)}')}</code></li>" for key, x in run.settings.items())
        parts.append(
            f"<details><summary><code>{text(run.command)}</code></summary>{_table(['', ''], rows)}"
            f'<ul class="settings">{settings}</ul></details>'
        )
    return "\n".join(parts)


# --- parts


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    def cell(x: Cell, right: bool) -> str:
        value, kind = x if isinstance(x, tuple) else (x, "")
        inner = f"<code>{text(value)}</code>" if kind == "code" else text(value)
        classes = " ".join(filter(None, [kind if kind != "code" else "", "number" if right else ""]))
        return f'<td class="{classes}">{inner}</td>' if classes else f"<td>{inner}</td>"

    plain = [[x[0] if isinstance(x, tuple) else x for x in row] for row in rows]
    used = [i for i, name in enumerate(columns) if any(row[i] for row in plain)]  # a column of nothing takes room
    columns = [columns[i] for i in used]
    rows, plain = [[row[i] for i in used] for row in rows], [[row[i] for i in used] for row in plain]
    right = [any(row[i] for row in plain) and all(_is_number(row[i]) for row in plain) for i in range(len(columns))]
    head = "".join(f"<th{' class=number' if r else ''}>{text(name)}</th>" for name, r in zip(columns, right, strict=True))
    body = "".join(f"<tr>{''.join(cell(x, r) for x, r in zip(row, right, strict=True))}</tr>" for row in rows)
    head = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _is_number(x: str) -> bool:
    return re.fullmatch(r"[-+\[\]\d.,±:kMG% s/*]*(MB)?", x) is not None


def _figure(figure: Any, name: str, caption: str) -> str:
    return _image(_coarse(figures.svg(figure)), name, caption)


def _image(svg: str, name: str, caption: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    image = f'<img alt="{text(caption)}" src="data:image/svg+xml;base64,{data}">'
    save = f'<a class="save" href="#" download="{text(name)}.svg">Save as SVG</a>'
    return f"<figure>{image}<figcaption>{text(caption)} {save}</figcaption></figure>"


def _coarse(svg: str) -> str:
    """Paths to a tenth of a point, and no line breaks: two thirds of the size."""
    return re.sub(r"\s+", " ", re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg))


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _ranges(numbers: Sequence[int]) -> str:
    """`0-4, 7`."""
    runs_of: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs_of and n == runs_of[-1][-1] + 1:
            runs_of[-1].append(n)
        else:
            runs_of.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs_of)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

# The image is in the page once; a click hands it to the link. What is folded is unfolded for printing.
_SCRIPT = """
document.querySelectorAll('a.save').forEach(a => a.addEventListener('click', () => {
  a.href = a.closest('figure').querySelector('img').src;
}));
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => { d.open = true; }));
"""
