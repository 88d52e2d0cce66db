"""How far a learner is from the best possible one: the share of the gap between chance and the optimum that it closes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metarl_cli import evaluation
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.settings import EvalSettings
from metarl_cli.core.statistics import summarise

if TYPE_CHECKING:
    from metarl_cli.baselines.optimum import Optimum
    from metarl_cli.evaluation import Evaluation


class Yardstick(NamedTuple):
    """The best learner, and the trial returns of chance `[1, N]`: on the same tasks, and on more where they are few."""

    best: Optimum
    same: np.ndarray
    expected: np.ndarray


Yardsticks = dict[
    tuple[int, EvalSettings, int], "Yardstick | None"
]  # by the identity of the family and the episodes of a trial


def compare(
    result: Evaluation, family: TaskFamily, settings: EvalSettings, known: Yardsticks | None = None
) -> dict[str, Any]:
    """What `result.json` holds under `evaluation.<split>.optimum`; nothing where no optimum is known.

    `value` is the expected trial return of the best learner (null where it is not computed) and `method` how it was
    computed, or why not; `random` is that of random actions. `share` is 0 for chance and 1 for the optimum: what the learner
    gained over chance on the same tasks, which takes most of the luck with the tasks out, over what the best learner gains
    in expectation. `share_ci_low` and `share_ci_high` are its 95 % interval; what is left of the luck can carry it a little
    beyond 1. It is null where chance is as good as it gets.

    Args:
        known: yardsticks that were found before, and to which this one is added.
    """
    known = {} if known is None else known
    key = (id(family), settings, result.returns.shape[2] * result.returns.shape[3])
    if key not in known:
        known[key] = yardstick(family, settings, key[2])
    if (found := known[key]) is None:
        return {}
    best, same, expected = found
    optimum = best.as_dict()
    if best.value is None:
        return {"optimum": optimum}
    random, error = float(expected.mean()), float(expected.std()) / max(1, expected.size - 1) ** 0.5
    gap = best.value - random
    optimum |= {"random": random, "share": None}
    if gap > 3 * error + 1e-6 * abs(best.value):
        share = summarise((result.trial_return - same) / gap)
        optimum |= {"share": share["mean"], "share_ci_low": share["ci_low"], "share_ci_high": share["ci_high"]}
    return {"optimum": optimum}


def yardstick(family: TaskFamily, settings: EvalSettings, episodes: int) -> Yardstick | None:
    """None where no optimum is known."""
    from metarl_cli.baselines.generic import Random
    from metarl_cli.baselines.optimum import optimum
    from metarl_cli.core.rollout import spaces

    best = optimum(family, evaluation.choose_tasks(family, settings), settings.split, episodes)
    if best is None:
        return None
    nothing = np.zeros((1, 0))
    if best.value is None:
        return Yardstick(best, nothing, nothing)

    def chance(**changes: Any) -> Any:
        own = settings.model_copy(update={"episodes": episodes, **changes})
        return evaluation.evaluate(Random(spec=spaces(family)), (), family, own, [0]).trial_return

    same = expected = chance()
    if settings.tasks is not None and not best.of_tasks:  # they may be few: what is expected of chance takes more
        expected = chance(tasks=None)
    return Yardstick(best, same, expected)


def describe(found: dict[str, Any]) -> str:
    """One or two lines for the console."""
    if found["value"] is None:
        return f"optimal: not computed, {found['method']}"
    text = f"optimal: {found['value']:.3f} ({found['method']})"
    if "regret" in found:
        text += f", its regret {found['regret']:.3f}"
    if "episodes" in found:
        each = [f"{x:.3f}" for x in found["episodes"]]
        text += f", by episode {', '.join(each if len(each) <= 12 else [*each[:5], '...', each[-1]])}"
    text += f"\nrandom: {found['random']:.2f}; "
    if found["share"] is None:
        return text + "there is no gap to close"
    low, high = 100 * found["share_ci_low"], 100 * found["share_ci_high"]
    return text + f"the share of the gap that is closed: {100 * found['share']:.1f} % [{low:.1f}, {high:.1f}]"
