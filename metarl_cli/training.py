"""THE jitted entry point. Everything from an environment step to a meta-update happens inside `train_chunk`.

The host only asks for the next chunk of meta-iterations. How many that are is a traced number, chosen so that a chunk takes
a few seconds: an XLA call cannot be interrupted. Neither the length of the chunks nor an interruption changes a result:

* the key of meta-iteration i is `fold_in(seed_key, i)`;
* metrics are averaged over windows of `log_every` iterations that start at 0, and an unfinished window travels in the state.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarl_cli.core.interfaces import MetaLearner, Metrics, State, TaskFamily
from metarl_cli.core.types import Key

ROWS = 128  # windows that one chunk can return


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


def init(learner: MetaLearner, family: TaskFamily, seeds: list[int]) -> TrainState:
    """The state before the first meta-iteration. Every seed gets what it would get alone."""
    return _init(learner, family, jnp.array(seeds))


@jax.jit
def _init(learner: MetaLearner, family: TaskFamily, seeds: jax.Array) -> TrainState:
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)
    key_init, key_train = keys[:, 0], keys[:, 1]
    # One after another: several batched QR decompositions (of orthogonal weights) at once can lock up JAX's threads.
    state = jax.lax.map(lambda key: learner.init(key, family), key_init)
    single = jax.tree.map(lambda x: x[0], (state, key_train))
    _, metrics = jax.eval_shape(_update, learner, *single, family, jnp.zeros(()))
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
) -> tuple[TrainState, Metrics]:
    """Runs some meta-iterations for all seeds side by side. Traced once per run.

    A seed whose metrics or parameters turn NaN or infinite keeps its last good state from then on; the others go on.

    Args:
        state: donated.
        iterations: how many to run now (traced).
        total: of the whole run, for schedules.
        log_every: meta-iterations in a window of metrics. A chunk may close at most `ROWS` windows.

    Returns:
        The state and the windows closed in this chunk, `{name: [ROWS, S]}`: means, but for `steps`, which is a sum. Entries
        beyond the closed windows are 0; those of a failed seed are NaN.
    """
    first_row = state.iteration // log_every

    def one_seed(key, learner_state, window, failed_at, failed_by, i):
        new, metrics = _update(learner, learner_state, jax.random.fold_in(key, i), family, i / total)
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
        seeds = jax.vmap(one_seed, in_axes=(0, 0, 0, 0, 0, None))
        new, window, failed_at, failed_by = seeds(
            state.key, state.learner, state.window, state.failed_at, state.failed_by, i
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
    return jax.lax.fori_loop(0, iterations, iteration, (state, rows))


def _finite(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))
