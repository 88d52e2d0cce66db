"""Krazy World (Stadie et al. 2018, section 4.1 and appendix A): a small grid of many kinds of tiles, seen 3x3 at a time.

Tiles: walls; goals, which pay 1 once; ice, over which one slides on; death, which ends the episode; teleporters, in pairs;
energy, which is used up by every step and whose end ends the episode; a lock, which opens with the key, and the key; all
others are normal. Every task has its own board, its own start, its own code of the tile types ("color palette") and its own
effect of the four actions ("dynamics"). An episode begins with all goals, energy and the key in their places.

The rules are those of bstadie/krazyworld@e8af438, krazy_world.py, the code beside the paper, but for:
  * Reward: its step returns the number of goals taken so far, at every step; its successor krazy_gridworld.py and the paper
    pay 1 for taking a goal, as here.
  * What it keeps free by mistake, the last row and column (`randint` without its end) and the mirror image of the start
    instead of the start, is not free here; nor does it loop for ever where the walled corner has no room for key and agent.
  * Observation: its eight neighbours one-hot, those outside the grid all ones, and the agent's cell one-hot. Here the
    tile under the agent comes with them, as the paper's 3x3 has it, and what is outside is all zeros.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams, EnvState

from metarl_cli.core.errors import ConfigError
from metarl_cli.core.grids import MOVES, draw_grid, draw_paths
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.settings import FamilySettings, setting
from metarl_cli.core.types import Batch, Key, pytree, static

TILES = ("normal", "wall", "goal", "ice", "death", "teleporter", "energy", "lock", "key")
NORMAL, WALL, GOAL, ICE, DEATH, TELEPORTER, ENERGY, LOCK, KEY = range(len(TILES))
COLORS = ("white", "#444444", "#FFDF00", "#BFE3F5", "#D62728", "#FF8C00", "#2CA02C", "#8C6D46", "#E377C2")
STEPS = MOVES[1:]  # up, right, down, left


@pytree
class KrazyWorldParams(EnvParams):
    """One task. Cells are numbered row by row, N of them."""

    tile: jax.Array  # [N] int, as in `TILES`
    start: jax.Array  # [] int, a cell
    code: jax.Array  # [9] int, a permutation: how a type of tile is shown
    leads: (
        jax.Array
    )  # [2, 4, N] int, without and with the key: from a cell by an action to a cell, slide and teleport included
    max_steps_in_episode: Any = 100


@pytree
class KrazyWorldState(EnvState):
    cell: jax.Array  # [] int
    taken: jax.Array  # [N] bool, goals, energy and key that are there no longer
    has_key: jax.Array  # [] bool
    energy: jax.Array  # [] int, steps left
    dead: jax.Array  # [] bool
    time: Any  # [] int


class KrazyWorldEnv(Environment[KrazyWorldState, KrazyWorldParams]):
    """Observed are the 3x3 tiles around the agent and its cell, all one-hot."""

    def __init__(self, size: int, energy: int, replenish: int):
        self.size, self.energy, self.replenish = size, energy, replenish

    @property
    def default_params(self) -> KrazyWorldParams:
        tile = jnp.full(self.size**2, NORMAL).at[-1].set(GOAL)
        return KrazyWorldParams(
            tile=tile, start=jnp.array(0), code=jnp.arange(len(TILES)), leads=leads(tile, None, self.size)
        )

    @property
    def num_actions(self) -> int:
        return len(STEPS)

    def reset_env(self, key, params):
        state = KrazyWorldState(
            cell=jnp.asarray(params.start),
            taken=jnp.zeros(self.size**2, bool),
            has_key=jnp.zeros((), bool),
            energy=jnp.array(self.energy),
            dead=jnp.zeros((), bool),
            time=jnp.zeros((), int),
        )
        return self._observe(state, params), state

    def step_env(self, key, state, action, params):
        cell = params.leads[state.has_key.astype(int), action, state.cell]
        tile = jnp.where(state.taken[cell], NORMAL, params.tile[cell])
        energy = state.energy - 1 + jnp.where(tile == ENERGY, self.replenish, 0)
        state = KrazyWorldState(
            cell=cell,
            taken=state.taken.at[cell].set(state.taken[cell] | (tile == GOAL) | (tile == ENERGY) | (tile == KEY)),
            has_key=state.has_key | (tile == KEY),
            energy=energy,
            dead=(tile == DEATH) | (energy < 1),
            time=state.time + 1,
        )
        return self._observe(state, params), state, (tile == GOAL).astype(float), state.dead, {}

    def _observe(self, state: KrazyWorldState, params: KrazyWorldParams) -> jax.Array:
        shown = params.code[jnp.where(state.taken, NORMAL, params.tile)].reshape(self.size, self.size)
        row, column = jnp.divmod(state.cell, self.size)
        around = jnp.pad(shown, 1, constant_values=-1)  # which has no one-hot code
        view = jax.lax.dynamic_slice(around, (row, column), (3, 3))
        return jnp.concatenate([jax.nn.one_hot(view, len(TILES)).ravel(), jax.nn.one_hot(state.cell, self.size**2)])

    def is_terminated(self, state, params):
        return state.dead

    def action_space(self, params):
        return spaces.Discrete(len(STEPS))

    def observation_space(self, params):
        return spaces.Box(0, 1, (9 * len(TILES) + self.size**2,), dtype=jnp.float32)


def leads(tile: jax.Array, partner: jax.Array | None, size: int) -> jax.Array:
    """Where each of the four moves leads from each cell, `[2, 4, N]`: without and with the key.

    Args:
        tile: [N].
        partner: [N], the cell that a teleporter leads to; other cells lead to themselves. None: there are no teleporters.
    """
    cells = np.arange(size**2)[None]
    beside = np.stack([cells % size, cells // size], axis=-1) + STEPS[:, None]  # [4, N, 2]
    inside = np.all((beside >= 0) & (beside < size), axis=-1)
    beside = np.where(inside, beside[..., 1] * size + beside[..., 0], cells)  # [4, N]

    def with_key(key: jax.Array) -> jax.Array:
        free = (tile != WALL) & ((tile != LOCK) | key)
        one = jnp.where(free[beside], beside, cells)  # [4, N] one step without the slide
        slide = lambda _, to: jnp.where(tile[to] == ICE, jnp.take_along_axis(one, to, axis=1), to)  # noqa: E731
        to = jax.lax.fori_loop(0, size - 2, slide, one)  # none is longer
        return to if partner is None else partner[to]

    return jax.vmap(with_key)(jnp.array([False, True]))


def pick(noise: jax.Array, allowed: jax.Array, n: int) -> jax.Array:
    """n different ones out of those allowed `[N]`, uniformly, given uniform noise `[N]`; `[n]`."""
    noise = jnp.where(allowed, noise, -1)
    mine, theirs, index = noise[:, None], noise[None], jnp.arange(noise.size)
    before = (theirs > mine) | ((theirs == mine) & (index[None] < index[:, None]))
    place = jnp.sum(before, axis=1)  # a sort would take much longer to compile
    return jnp.argmax(place[None] == jnp.arange(n)[:, None], axis=1)


@pytree
class KrazyWorld(TaskFamily):
    """Boards are drawn afresh; in `ood` with twice as many deadly tiles."""

    horizon: int = static()
    episodes: int = static()
    env: KrazyWorldEnv = static()
    goals: int = static()
    lock: bool = static()
    teleporters: int = static()
    ice: int = static()
    death: int = static()
    energy_tiles: int = static()
    swap_colors: bool = static()
    swap_dynamics: bool = static()
    prior: None = static(default=None)
    splits: tuple[str, ...] = static(default=("train", "test", "ood"))

    def sample(self, key: Key, split: str = "train") -> KrazyWorldParams:
        size = self.env.size
        uses: list[str] = ["corner", "door", "start", "teleporters", "death", "ice", "energy", "goals", "colors", "dynamics"]
        noise = dict(zip(uses, jax.random.uniform(key, (len(uses), size**2)), strict=True))
        tile, start, door = self._walls(noise)

        def distance(cell: jax.Array) -> jax.Array:  # [N]
            cells = jnp.arange(size**2)
            return jnp.abs(cells % size - cell % size) + jnp.abs(cells // size - cell // size)

        free = lambda: (tile == NORMAL) & (distance(start) > 0)  # noqa: E731
        ends = pick(noise["teleporters"], free(), 2 * self.teleporters)
        tile = tile.at[ends].set(TELEPORTER)
        partner = jnp.arange(size**2).at[ends].set(jnp.roll(ends.reshape(-1, 2), 1, axis=1).ravel())
        # Death and ice keep away from the lock, lest it be shut off.
        away = distance(door) > 2 if self.lock else jnp.ones(size**2, bool)
        death = (2 if split == "ood" else 1) * self.death
        tile = tile.at[pick(noise["death"], free() & away, death)].set(DEATH)
        tile = tile.at[pick(noise["ice"], free() & away, self.ice)].set(ICE)
        tile = tile.at[pick(noise["energy"], free(), self.energy_tiles)].set(ENERGY)
        tile = tile.at[pick(noise["goals"], free() & (distance(start) > 1), self.goals)].set(GOAL)
        code, order = jnp.arange(len(TILES)), jnp.arange(len(STEPS))
        if self.swap_colors:
            code = pick(noise["colors"][: code.size], code >= 0, code.size)
        if self.swap_dynamics:
            order = pick(noise["dynamics"][: order.size], order >= 0, order.size)
        return KrazyWorldParams(
            tile=tile,
            start=start,
            code=code,
            leads=leads(tile, partner, size)[:, order],
            max_steps_in_episode=self.horizon,
        )

    def _walls(self, noise: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`(tile [N], start, door)`: without a lock an empty board.

        Two walls run from a corner to the border of the board, each to the nearer side. The first has a lock in it; the key
        and the start are between them and the lower left, which they close off if both run that way.
        """
        size = self.env.size
        row, column = jnp.divmod(jnp.arange(size**2), size)
        if not self.lock:
            return jnp.full(size**2, NORMAL), jnp.argmax(noise["start"]), jnp.array(0)
        corner = 2 + jnp.floor(noise["corner"][:2] * (size - 4)).astype(int)  # row and column, up to size - 3
        far = corner > size // 2
        upwards = (column == corner[1]) & jnp.where(far[0], row >= corner[0], row < corner[0])
        sideways = (row == corner[0]) & jnp.where(far[1], column >= corner[1], column < corner[1])
        tile = jnp.where(upwards | sideways, WALL, NORMAL)
        door = pick(noise["door"], upwards & (row != corner[0]), 1)[0]
        start, at = pick(noise["start"], (row < corner[0]) & (column < corner[1]) & (tile == NORMAL), 2)
        return tile.at[door].set(LOCK).at[at].set(KEY), start, door

    def fixed(self, split: str) -> None:
        return None

    def oracle(self, task: Any, state: Any) -> jax.Array:
        """To the nearest goal, or the key where no goal can be reached, or energy where that is too far. Not the optimum."""
        to = task.leads[state.has_key.astype(int)]  # [4, N]
        tile = jnp.where(state.taken, NORMAL, task.tile)
        far = 10 * tile.size  # no way
        deadly = tile == DEATH

        def nearer(distance):  # [targets, N]
            onwards = jnp.where(deadly[None], 2 * far, 1 + jnp.min(distance[:, to], axis=1))
            return jnp.minimum(distance, jnp.minimum(onwards, far))

        # Of every kind of target, the steps to the nearest one from each cell.
        distance = jnp.where(tile[None] == jnp.array([GOAL, ENERGY, KEY])[:, None], 0, far)
        distance, _ = jax.lax.while_loop(
            lambda both: jnp.any(both[0] != both[1]), lambda both: (nearer(both[0]), both[0]), (nearer(distance), distance)
        )
        goal, energy, key = distance[:, state.cell]
        wanted = jnp.where(goal < far, 0, jnp.where(key < far, 2, 0))
        target = jnp.where((distance[wanted, state.cell] > state.energy) & (energy < state.energy), 1, wanted)
        ahead = to[:, state.cell]
        return jnp.argmin(jnp.where(deadly[ahead], 2 * far, distance[target, ahead]))

    def expected(self, task: Any, state: Any, action: jax.Array) -> None:
        return None

    def draw(self, axes: Any, task: Any, batch: Batch) -> None:
        from matplotlib.colors import ListedColormap

        size = self.env.size
        axes.imshow(task.tile.reshape(size, size), ListedColormap(COLORS), vmin=0, vmax=len(TILES) - 1, origin="lower")
        draw_grid(axes, size)
        cells = batch.observation[..., 9 * len(TILES) :].argmax(-1)
        # Whether the key was there is not observed; it is at hand from the step after its cell was entered.
        has_key = np.zeros(cells.shape, int)
        if np.any(task.tile == KEY):
            has_key = np.maximum.accumulate(task.tile[cells] == KEY, axis=-1).astype(int)
        last = task.leads[has_key, batch.action, cells]
        where = [np.stack([c % size, c // size], axis=-1) for c in (cells, last)]
        draw_paths(axes, where[0], where[1], batch)
        for kind in np.unique(task.tile):
            if kind != NORMAL:
                axes.plot([], [], "s", color=COLORS[kind], label=TILES[kind])


class KrazyWorldSettings(FamilySettings):
    size: int = setting("cells along each side", unit="cells", ge=5)
    goals: int = setting("goals on a board", unit="tiles", ge=1)
    lock: bool = setting("whether there are walls with a lock in them, and a key")
    teleporters: int = setting("pairs of teleporters", unit="pairs", ge=0)
    ice: int = setting("tiles of ice", unit="tiles", ge=0)
    death: int = setting("deadly tiles", unit="tiles", ge=0)
    energy_tiles: int = setting("tiles of energy", unit="tiles", ge=0)
    energy: int = setting("steps that the energy at the start lasts", unit="steps", ge=1)
    replenish: int = setting("steps that a tile of energy adds", unit="steps", ge=0)
    swap_colors: bool = setting("whether each task shows tile types in a code of its own")
    swap_dynamics: bool = setting("whether in each task the four actions lead elsewhere")
    horizon: int = setting("steps after which an episode is truncated", unit="steps", ge=1)
    episodes: int = setting("length of a trial, for learners that live through it one by one", unit="episodes", ge=1)

    def build(self) -> KrazyWorld:
        # Walls, the lock's surroundings, those of the start; `ood` has twice the deadly tiles.
        free = self.size**2 - 5 - (2 * self.size + 14 if self.lock else 0)
        tiles = self.goals + 2 * self.teleporters + self.ice + 2 * self.death + self.energy_tiles
        if tiles > free:
            problem = f"{tiles} tiles, deadly ones counted twice, may not find room; at most {free} do"
            raise ConfigError("env.size", self.size, problem)
        if self.lock and self.size < 6:
            raise ConfigError(
                "env.size", self.size, "too small for walls with a lock", hint="Use at least 6, or env.lock=false."
            )
        return KrazyWorld(
            horizon=self.horizon,
            episodes=self.episodes,
            env=KrazyWorldEnv(self.size, self.energy, self.replenish),
            goals=self.goals,
            lock=self.lock,
            teleporters=self.teleporters,
            ice=self.ice,
            death=self.death,
            energy_tiles=self.energy_tiles,
            swap_colors=self.swap_colors,
            swap_dynamics=self.swap_dynamics,
        )
