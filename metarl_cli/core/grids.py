"""What families on square grids share. A cell is `[2]`, column and row; (0, 0) is at the bottom left."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from metarl_cli.core.types import Batch

Observe = Literal["coordinates", "one_hot"]

DRAWN = 4  # episodes whose paths are drawn
MOVES = np.array([(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)])  # stay, up, right, down, left


def move(cell: jax.Array, displacement: jax.Array, size: int) -> jax.Array:
    """Where one comes to, `[..., 2]`: the walls around the grid hold one back."""
    return jnp.clip(cell + displacement, 0, size - 1)


def toward(cell: jax.Array, goal: jax.Array, moves: jax.Array, size: int) -> jax.Array:
    """The first of the actions `[A, 2]` that leads nearest to the goal: on an empty grid a shortest path."""
    return jnp.argmin(jnp.sum(jnp.abs(move(cell[None], moves, size) - goal[None]), axis=-1))


def observe(cell: jax.Array, size: int, how: Observe) -> jax.Array:
    """Column and row as numbers `[2]`, or one of `size * size` cells `[size * size]`."""
    return cell.astype(float) if how == "coordinates" else jax.nn.one_hot(cell[1] * size + cell[0], size * size)


def observation_space(size: int, how: Observe) -> Any:
    from gymnax.environments.spaces import Box

    if how == "coordinates":
        return Box(0, size - 1, (2,), dtype=jnp.float32)
    return Box(0, 1, (size * size,), dtype=jnp.float32)


def observed(observation: Any, size: int, how: Observe) -> np.ndarray:
    """The other way round, for pictures: cells `[..., 2]`."""
    if how == "coordinates":
        return observation.astype(int)
    row, column = np.divmod(observation.argmax(-1), size)
    return np.stack([column, row], axis=-1)


def draw_grid(axes: Any, size: int) -> None:
    lines = np.arange(size + 1) - 0.5
    axes.hlines(lines, -0.5, size - 0.5, color="0.85", linewidth=0.6)
    axes.vlines(lines, -0.5, size - 0.5, color="0.85", linewidth=0.6)
    axes.set(aspect="equal", xticks=[0, size - 1], yticks=[0, size - 1], xlim=(-0.6, size - 0.4), ylim=(-0.6, size - 0.4))


def draw_paths(axes: Any, cells: np.ndarray, last: np.ndarray, batch: Batch) -> None:
    """A line per episode through `cells` `[K, T, 2]`, where actions were chosen; they led to `last` `[K, T, 2]`.

    Only of the first few episodes: more would be a tangle. Each is a little beside the others, so that it is seen.
    """
    beside = np.linspace(-0.2, 0.2, DRAWN)[: len(cells)] if len(cells) > 1 else np.zeros(1)
    for before, after, valid, shift in zip(cells, last, batch.valid, beside, strict=False):
        path = np.concatenate([before[valid], after[valid][-1:]]) + shift
        if len(path):
            axes.plot(path[:, 0], path[:, 1], color="C0", linewidth=0.7, alpha=0.6)
            axes.plot(*path[-1], "o", color="C0", markersize=2, markeredgewidth=0)
            start = {"color": "white", "markeredgecolor": "black", "markersize": 4, "markeredgewidth": 0.8}
            axes.plot(*path[0], "o", linestyle="none", label="start", **start)


def draw_mark(axes: Any, cell: np.ndarray, marker: str, label: str, color: str = "C1") -> None:
    style = {"color": color, "markeredgecolor": "white", "markersize": 9, "markeredgewidth": 0.5}
    axes.plot(*cell, marker, linestyle="none", label=label, **style)
