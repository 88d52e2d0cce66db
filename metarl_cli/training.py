"""THE jitted entry point. Everything from an environment step to a meta-update happens inside `train_chunk`.

The host only asks for the next chunk of meta-iterations. How many that are is a traced number, chosen so that a chunk takes
a few seconds: an XLA call cannot be interrupted. Neither the length of the chunks nor an interruption changes a result:

* the key of meta-iteration i is `fold_in(seed_key, i)`;
* metrics are averaged over windows of `log_every` iterations that start at 0, and an unfinished window travels in the state.

Runs that differ in seeds and in floats of their learner or family, the points of a sweep, can share one program: their seeds
stand side by side on the axis S, and each seed has its own values of the leaves that differ (`Swept`). No point knows of the
others; `join` and `split` change between the state of all and that of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarl_cli.core import devices
from metarl_cli.core.interfaces import MetaLearner, Metrics, State, TaskFamily
from metarl_cli.core.types import Key

ROWS = 128  # windows that one chunk can return

Swept = dict[int, jax.Array]  # place of a leaf among those of `(learner, family)` -> its value for each seed, [S, ...]


class TrainState(NamedTuple):
    """Everything that a run has to remember: the checkpoint."""

    iteration: jax.Array  # int, meta-iterations done
    key: Key  # [S]
    learner: State  # [S, ...]
    window: Metrics  # [S], sums over the unfinished window
    windowed: jax.Array  # int, meta-iterations in it
    failed_at: jax.Array  # [S] int, the meta-iteration that turned non-finite; -1 while all is well
    failed_by: jax.Array  # [S] int, index into `quantities`


def quantities(state: TrainState) -> list[str]:
    """What is watched for NaN and infinity, in the order of `failed_by`: each metric, then the learner's own state."""
    return [*sorted(state.window), "parameters"]


def init(learner: MetaLearner, family: TaskFamily, seeds: list[int], swept: Swept | None = None) -> TrainState:
    """The state before the first meta-iteration. Every seed gets what it would get alone."""
    return _init(learner, family, jnp.array(seeds), swept or {})


@jax.jit
def _init(learner: MetaLearner, family: TaskFamily, seeds: jax.Array, swept: Swept) -> TrainState:
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)
    key_init, key_train = keys[:, 0], keys[:, 1]

    def one_seed(key_and_leaves):
        key, leaves = key_and_leaves
        own, world = _with_leaves(learner, family, leaves)
        return own.init(key, world)

    # One after another: several batched QR decompositions (of orthogonal weights) at once can lock up JAX's threads.
    state = jax.lax.map(one_seed, (key_init, swept))
    single, key, leaves = jax.tree.map(lambda x: x[0], (state, key_train, swept))
    own, world = _with_leaves(learner, family, leaves)
    _, metrics = jax.eval_shape(_update, own, single, key, world, jnp.zeros(()))
    n = len(seeds)
    return TrainState(
        iteration=jnp.zeros((), int),
        key=key_train,
        learner=state,
        window={name: jnp.zeros((n, *m.shape), m.dtype) for name, m in metrics.items()},
        windowed=jnp.zeros((), int),
        failed_at=jnp.full(n, -1, int),  # with its type: a weak one would be traced again in the second chunk
        failed_by=jnp.full(n, -1, int),
    )


@jax.jit
def _update(learner: MetaLearner, state: State, key: Key, family: TaskFamily, progress: jax.Array) -> tuple[State, Metrics]:
    """Jitted for its cache alone: `_init` needs the shapes of the metrics, and `train_chunk` then traces nothing anew."""
    return learner.update(state, key, family, progress)


@partial(jax.jit, donate_argnames="state")
def train_chunk(
    state: TrainState,
    learner: MetaLearner,
    family: TaskFamily,
    iterations: jax.Array,
    total: jax.Array,
    log_every: jax.Array,
    swept: Swept | None = None,
) -> tuple[TrainState, Metrics]:
    """Runs some meta-iterations for all seeds side by side. Traced once per run.

    A seed whose metrics or parameters turn NaN or infinite keeps its last good state from then on; the others go on.

    Args:
        state: donated.
        iterations: how many to run now (traced).
        total: of the whole run, for schedules.
        log_every: meta-iterations in a window of metrics. A chunk may close at most `ROWS` windows.
        swept: leaves of learner and family that each seed has its own value of.

    Returns:
        The state and the windows closed in this chunk, `{name: [ROWS, S]}`: means, but for `steps`, which is a sum. Entries
        beyond the closed windows are 0; those of a failed seed are NaN.
    """
    first_row = state.iteration // log_every

    def one_seed(key, learner_state, window, failed_at, failed_by, leaves, i):
        own, world = _with_leaves(learner, family, leaves)
        new, metrics = _update(own, learner_state, jax.random.fold_in(key, i), world, i / total)
        finite = jnp.stack([jnp.all(jnp.isfinite(metrics[name])) for name in sorted(metrics)] + [_finite(new)])
        newly = (failed_at < 0) & ~jnp.all(finite)
        failed_at = jnp.where(newly, i, failed_at)
        failed_by = jnp.where(newly, jnp.argmin(finite), failed_by)
        keep = failed_at >= 0
        new = jax.tree.map(lambda old, new: jnp.where(keep, old, new), learner_state, new)
        return new, jax.tree.map(jnp.add, window, metrics), failed_at, failed_by

    def iteration(_, carry):
        state, rows = carry
        i = state.iteration
        seeds = jax.vmap(one_seed, in_axes=(0, 0, 0, 0, 0, 0, None))
        new, window, failed_at, failed_by = seeds(
            state.key, state.learner, state.window, state.failed_at, state.failed_by, swept or {}, i
        )
        closes = ((i + 1) % log_every == 0) | (i + 1 == total)
        windowed = state.windowed + 1
        row = i // log_every - first_row

        def write(name, rows):
            value = window[name] if name == "steps" else window[name] / windowed
            if jnp.issubdtype(rows.dtype, jnp.floating):
                value = jnp.where(failed_at >= 0, jnp.nan, value)
            return rows.at[row].set(jnp.where(closes, value, rows[row]))

        rows = {name: write(name, x) for name, x in rows.items()}
        window = {name: jnp.where(closes, jnp.zeros_like(x), x) for name, x in window.items()}
        windowed = jnp.where(closes, 0, windowed)
        return TrainState(i + 1, state.key, new, window, windowed, failed_at, failed_by), rows

    rows = {name: jnp.zeros((ROWS, *x.shape), x.dtype if name == "steps" else float) for name, x in state.window.items()}
    return devices.everywhere(jax.lax.fori_loop(0, iterations, iteration, (state, rows)))


def _finite(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


# --- several runs in one program


def together(pairs: Sequence[tuple[MetaLearner, TaskFamily]], seeds: Sequence[int]) -> tuple[MetaLearner, TaskFamily, Swept]:
    """One learner and family for several runs of the same structure, and what each seed has its own value of.

    Args:
        seeds: how many seeds each run has.
    """
    leaves, structures = zip(*(jax.tree.flatten(pair) for pair in pairs), strict=True)
    assert all(structure == structures[0] for structure in structures), "runs of different structure are no one program"
    swept: Swept = {}
    for place, values in enumerate(zip(*leaves, strict=True)):
        if any(not np.array_equal(value, values[0]) for value in values[1:]):
            swept[place] = jnp.asarray(np.repeat(np.stack([np.asarray(value) for value in values]), seeds, axis=0))
    return *pairs[0], swept


def join(states: Sequence[TrainState]) -> TrainState:
    """The states of several runs that have come equally far, side by side."""
    if len(states) == 1:
        return states[0]

    def side_by_side(*parts):
        if _is_key(parts[0]):
            data = np.concatenate([np.asarray(jax.random.key_data(part)) for part in parts])
            return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(parts[0]))
        return jnp.asarray(np.concatenate([np.asarray(part) for part in parts]))

    first = states[0]
    own = [state._replace(iteration=None, windowed=None) for state in states]  # type: ignore[arg-type]
    return jax.tree.map(side_by_side, *own)._replace(
        iteration=jnp.asarray(first.iteration), windowed=jnp.asarray(first.windowed)
    )


def split(state: TrainState, seeds: Sequence[int]) -> list[TrainState]:
    """The state of each run, on the host: numpy arrays but for the keys.

    Args:
        seeds: how many each run has.
    """
    if len(seeds) == 1:
        return [state]
    keys = {place: x for place, x in enumerate(jax.tree.leaves(state)) if _is_key(x)}
    leaves, structure = jax.tree.flatten(state)
    host = jax.device_get([jax.random.key_data(x) if place in keys else x for place, x in enumerate(leaves)])
    ends = np.cumsum(seeds)

    def part(first, last):
        own = [x if np.ndim(x) == 0 else x[first:last] for x in host]
        for place, x in keys.items():
            own[place] = jax.random.wrap_key_data(own[place], impl=jax.random.key_impl(x))
        return jax.tree.unflatten(structure, own)

    return [part(last - n, last) for n, last in zip(seeds, ends, strict=True)]


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _with_leaves(learner: MetaLearner, family: TaskFamily, leaves: Swept) -> tuple[MetaLearner, TaskFamily]:
    every, structure = jax.tree.flatten((learner, family))
    return jax.tree.unflatten(structure, [leaves.get(place, leaf) for place, leaf in enumerate(every)])
