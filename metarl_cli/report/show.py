"""A few tasks of a family as pictures: what they are, what chance achieves there and what one who knows them can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from metarl_cli.config import TrainConfig, build_family
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.rollout import Spaces, by_episode, from_environment, rollout, spaces
from metarl_cli.core.types import Batch, Key
from metarl_cli.evaluation import choose_tasks
from metarl_cli.report import figures

TASKS = 4  # unless the user asks for another number
DRAWS = 40_000  # tasks of which the distributions are drawn


def show(config: TrainConfig, folder: Path) -> list[Path]:
    """`metarl show`: writes `folder`/tasks.* and, where tasks are made of single numbers, `folder`/parameters.*.

    Returns:
        The files.
    """
    family = build_family(config)
    spec, fixed = spaces(family), family.fixed(config.eval.split)
    n = config.eval.tasks or (TASKS if fixed is None else min(TASKS, len(jax.tree.leaves(fixed)[0])))
    tasks = choose_tasks(family, config.eval.model_copy(update={"tasks": n}))
    episodes = config.eval.episodes or family.episodes
    policies = {"random policy": False, "oracle": True} if has_oracle(family) else {"random policy": False}
    keys = jax.random.split(jax.random.key(config.eval.seed), n)
    lived = [
        jax.jit(jax.vmap(lambda key, task, oracle=oracle: live(key, family, task, spec, episodes, oracle)))(keys, tasks)
        for oracle in policies.values()
    ]
    tasks, lived = jax.tree.map(np.asarray, (tasks, lived))
    one = [jax.tree.map(lambda x, m=m: x[m], tasks) for m in range(n)]
    batches = [[jax.tree.map(lambda x, m=m: x[m], batch) for batch in lived] for m in range(n)]
    files = figures.save(figures.trajectories(family, one, batches, list(policies)), folder / "tasks")
    values = numbers(family)
    return files + (figures.save(figures.parameters(values), folder / "parameters") if values else [])


def has_oracle(family: TaskFamily) -> bool:
    task = family.sample(jax.random.key(0))
    _, state = family.env.reset(jax.random.key(0), task)
    return family.oracle(task, state) is not None


def live(key: Key, family: TaskFamily, task: Any, spec: Spaces, episodes: int, oracle: bool) -> Batch:
    """A trial of E episodes in one task, by chance or by the oracle: `[E, T]`."""

    def knows(carry, state, previous, key):
        action = family.oracle(task, state)
        assert action is not None
        return carry, from_environment(family, task, action), None

    def chance(carry, observation, previous, key):
        return carry, random_action(key, spec), None

    _, batch = rollout(key, family, task, knows if oracle else chance, (), spec, episodes, sees_state=oracle)
    return by_episode(batch, episodes, family.horizon)


def random_action(key: Key, spec: Spaces) -> jax.Array:
    """Uniform, in the units of a policy."""
    if spec.discrete:
        return jax.random.randint(key, (), 0, spec.action)
    return jax.random.uniform(key, (spec.action,), minval=-1, maxval=1)


def numbers(family: TaskFamily) -> dict[str, dict[str, np.ndarray]]:
    """The single numbers that differ between tasks: name -> split -> `[N]`. What `test` draws is what `train` draws."""
    shapes = jax.tree.leaves_with_path(jax.eval_shape(family.sample, jax.random.key(0)))
    single = {i: path for i, (path, x) in enumerate(shapes) if x.shape == () and np.issubdtype(x.dtype, np.floating)}
    keys = jax.random.split(jax.random.key(0), DRAWS)
    found: dict[str, dict[str, np.ndarray]] = {}
    for split in family.splits if single else ():
        if split == "test":
            continue

        def draw(key: Key, split: str = split) -> list[jax.Array]:  # nothing else of the task is computed
            leaves = jax.tree.leaves(family.sample(key, split))
            return [leaves[i] for i in single]

        for path, x in zip(single.values(), jax.jit(jax.vmap(draw))(keys), strict=True):
            found.setdefault(jax.tree_util.keystr(path[-1:], simple=True), {})[split] = np.asarray(x)
    return {name: splits for name, splits in found.items() if any(np.ptp(x) > 0 for x in splits.values())}
