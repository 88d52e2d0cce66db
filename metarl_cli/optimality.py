"""How far a learner is from the best possible one: the share of the gap between chance and the optimum that it closes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metarl_cli import evaluation
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.settings import EvalSettings

if TYPE_CHECKING:
    from metarl_cli.evaluation import Evaluation


def compare(result: Evaluation, family: TaskFamily, settings: EvalSettings) -> dict[str, Any]:
    """What `result.json` holds under `evaluation.<split>.optimum`; nothing where no optimum is known.

    `value` is the expected trial return of the best learner (null where it does not fit in memory) and `method` how it was
    computed; `random` is that of random actions, simulated on the same tasks. `share` is 0 for chance and 1 for the optimum;
    luck with the tasks can carry it a little beyond.
    """
    from metarl_cli.baselines.generic import Random
    from metarl_cli.baselines.optimum import optimum
    from metarl_cli.core.rollout import spaces

    episodes = result.returns.shape[2] * result.returns.shape[3]
    best = optimum(family, evaluation.choose_tasks(family, settings), result.split, episodes)
    if best is None:
        return {}
    found = best.as_dict()
    if best.value is not None:
        chance = evaluation.evaluate(
            Random(spec=spaces(family)), (), family, settings.model_copy(update={"episodes": episodes}), [0]
        )
        random = float(chance.trial_return.mean())
        share = (float(result.trial_return.mean()) - random) / (best.value - random)
        found |= {"random": random, "share": share}
    return {"optimum": found}


def describe(found: dict[str, Any]) -> str:
    """One or two lines for the console."""
    if found["value"] is None:
        return f"optimal: not computed, {found['method']}"
    text = f"optimal: {found['value']:.3f} ({found['method']})"
    if "regret" in found:
        text += f", its regret {found['regret']:.3f}"
    if "episodes" in found:
        text += f", by episode {', '.join(f'{x:.3f}' for x in found['episodes'])}"
    return f"{text}\nrandom: {found['random']:.2f}; the share of the gap that is closed: {100 * found['share']:.1f} %"
