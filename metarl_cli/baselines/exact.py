"""Bayes-optimal learners and what they are worth, for the families where that can be computed.

Each is a policy and, by a dynamic program that does not use the policy's simulation, its expected trial return; a test holds
the two together. All of it is for tasks of the prior (the splits `train` and `test`) and for trials of the given length.

* Bernoulli arms: dynamic program over the counts of successes and failures of all arms, sorted, because it does not matter
  which arm is which. There are about C(n + 2k, 2k) / k! states, so it fits for few arms or few pulls only.
* Correlated arms: every pull tells the same about p, whichever arm it was, so the arm of the higher mean is optimal.
* Informative arm: which arms have been tried and whether the target is known.
* Two-step task: every round tells the same about which state is the better one, so the likelier action is optimal.
* A goal on a grid: a walk that tries a new cell with every step, and what it has no time for lies on one shortest path.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarl_cli.baselines.base import Classical, refuse
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.grids import MOVES, move, toward
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.rollout import spaces
from metarl_cli.core.settings import AlgoSettings
from metarl_cli.core.types import (
    Batch,
    BernoulliArms,
    CorrelatedArms,
    GoalGrid,
    InformativeArms,
    Key,
    Previous,
    TwoStep,
    pytree,
    static,
)

MEMORY = 2e9  # bytes that a dynamic program may take
BELIEFS = 20_001  # grid over the belief of the two-step task


# --- Bernoulli arms


class CountTable(NamedTuple):
    """The optimal policy as a graph: a node is a multiset of counts, its arms in descending order of their code."""

    value: float  # expected trial return
    arms: int  # how many arms a node has: no more than there are pulls
    best: np.ndarray  # [nodes], the place in that order of the arm to pull
    after: np.ndarray  # [nodes, 2], the node after failure and success; of the last pull: 0


def count_states(k: int, n: int) -> int:
    """How many multisets of k arms' counts have fewer than n pulls in all: the nodes of the dynamic program."""
    k = min(k, n)
    ways = np.zeros((k + 1, n), object)  # [arms that were pulled, pulls]
    ways[:] = 0
    ways[0, 0] = 1
    for pulls in range(1, n):
        for _ in range(pulls + 1):  # an arm with so many pulls had 0 .. pulls successes
            for arms in range(1, k + 1):
                ways[arms, pulls:] += ways[arms - 1, : n - pulls]
    return int(ways.sum())


def count_bytes(k: int, n: int) -> float:
    """Of the arrays that `solve_counts` keeps: each node's successors for every arm, its value, its row."""
    k = min(k, n)
    return count_states(k, n) * (k * (8 + 2) + 8.0 + 9)


@functools.lru_cache(maxsize=8)
def solve_counts(k: int, n: int) -> CountTable:
    """Raises `ConfigError` where it does not fit in memory."""
    if count_bytes(k, n) > MEMORY:
        raise ConfigError("algo", "bayes_optimal", does_not_fit(k, n), hint="Fewer arms or pulls: env.k, env.n.")
    k = min(k, n)  # more arms than pulls: some are never pulled
    # An arm with m pulls and s successes has the code m (m + 1) / 2 + s.
    pulls = np.repeat(np.arange(n + 1), np.arange(1, n + 2))
    code = np.arange(pulls.size)
    failed = (code + pulls + 1).astype(np.int32)
    success = (failed + 1).astype(np.int32)
    mean = (code - pulls * (pulls + 1) // 2 + 1) / (pulls + 2)

    rows = np.zeros((1, k), np.int32)
    levels, successors = [rows], []
    for _ in range(n - 1):
        children = np.repeat(rows[:, None], 2 * k, axis=1)  # [nodes, 2 k, k]
        arms = np.arange(k)
        children[:, arms, arms] = failed[rows]
        children[:, k + arms, arms] = success[rows]
        children = -np.sort(-children.reshape(-1, k), axis=1)
        rows, inverse = _unique_rows(children, code.size)
        successors.append(inverse.reshape(-1, 2, k))
        levels.append(rows)

    first = np.concatenate([[0], np.cumsum([len(level) for level in levels])])
    best, after = np.zeros(first[-1], np.int8), np.zeros((first[-1], 2), np.int32)
    value = np.zeros(0)
    for level in range(n - 1, -1, -1):
        p = mean[levels[level]]  # [nodes, k]
        q = p.copy()
        if level < n - 1:
            left, won = successors[level][:, 0], successors[level][:, 1]
            q += p * value[won] + (1 - p) * value[left]
        choice = np.argmax(q, axis=1)
        nodes = np.arange(len(choice))
        here = slice(first[level], first[level + 1])
        best[here] = choice
        if level < n - 1:
            after[here] = first[level + 1] + successors[level][nodes, :, choice]
        value = q[nodes, choice]
    return CountTable(float(value[0]), k, best, after)


def _unique_rows(rows: np.ndarray, codes: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows, and where each row went. Rows are integers where 63 bits are enough: sorting is all the work."""
    k = rows.shape[1]
    if k * np.log2(codes) < 62:
        keys = rows.astype(np.int64) @ codes ** np.arange(k, dtype=np.int64)
        _, where, inverse = np.unique(keys, return_index=True, return_inverse=True)
        return rows[where], inverse.astype(np.int32)
    distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
    return distinct, inverse.astype(np.int32).ravel()


def does_not_fit(k: int, n: int) -> str:
    return f"{count_states(k, n):.3g} count states for {k} arms and {n} pulls would take {count_bytes(k, n) / 1e9:.3g} GB"


class Counted(NamedTuple):
    node: jax.Array  # [] int
    code: jax.Array  # [k] int
    pulls: jax.Array  # [k] int


@pytree
class OptimalArms(Classical):
    best: jax.Array  # [nodes]
    after: jax.Array  # [nodes, 2]
    k: int = static()

    def start(self) -> Counted:
        return Counted(jnp.zeros((), int), jnp.zeros(self.k, int), jnp.zeros(self.k, int))

    def begin(self, belief: Counted, key: Key, episode: jax.Array) -> jax.Array:
        return jnp.argsort(-belief.code)[self.best[belief.node]]

    def act(self, plan: jax.Array, observation: jax.Array, previous: Previous, key: Key) -> tuple[jax.Array, jax.Array]:
        return plan, plan

    def learn(self, belief: Counted, plan: jax.Array, batch: Batch) -> Counted:
        won = batch.reward[0].astype(int)
        step = belief.pulls[plan] + 1 + won
        node = self.after[belief.node, won].astype(int)
        return Counted(node, belief.code.at[plan].add(step), belief.pulls.at[plan].add(1))


# --- correlated arms


def correlated_value(values: tuple[float, ...] | None, n: int) -> tuple[float, float]:
    """Expected trial return of the optimal policy, and the mean reward of the better arm."""
    if values is None:
        # m of t pulls spoke for arm 1, all m as likely under the uniform prior; p is then Beta(m + 1, t - m + 1).
        total = sum(sum(max(m + 1, t - m + 1) for m in range(t + 1)) / ((t + 2) * (t + 1)) for t in range(n))
        return float(total), 0.75
    p = np.array(values, float)
    weight, total = np.ones((1, p.size)) / p.size, 0.0  # [t + 1, values]: prior times probability that m spoke for arm 1
    for _ in range(n):
        first = weight @ p
        total += np.maximum(first, weight.sum(1) - first).sum()
        weight = np.pad(weight * p, ((1, 0), (0, 0))) + np.pad(weight * (1 - p), ((0, 1), (0, 0)))
    return float(total), float(np.maximum(p, 1 - p).mean())


class Votes(NamedTuple):
    """Successes of arm 1 and failures of arm 2, and the other way round."""

    first: jax.Array  # []
    second: jax.Array  # []


@pytree
class OptimalCorrelated(Classical):
    values: tuple[float, ...] | None = static()

    def start(self) -> Votes:
        return Votes(jnp.zeros(()), jnp.zeros(()))

    def begin(self, belief: Votes, key: Key, episode: jax.Array) -> jax.Array:
        if self.values is None:
            mean = (belief.first + 1) / (belief.first + belief.second + 2)
        else:
            p = jnp.array(self.values, float)
            tiny = jnp.finfo(p.dtype).tiny
            log_weight = belief.first * jnp.log(jnp.maximum(p, tiny)) + belief.second * jnp.log(jnp.maximum(1 - p, tiny))
            mean = jnp.sum(jax.nn.softmax(log_weight) * p)
        return jnp.where(mean >= 0.5, 0, 1)

    def act(self, plan: jax.Array, observation: jax.Array, previous: Previous, key: Key) -> tuple[jax.Array, jax.Array]:
        return plan, plan

    def learn(self, belief: Votes, plan: jax.Array, batch: Batch) -> Votes:
        for_first = jnp.where(batch.action[0] == 0, batch.reward[0], 1 - batch.reward[0])
        return Votes(belief.first + for_first, belief.second + 1 - for_first)


# --- informative arm


class InformativePlan(NamedTuple):
    value: float
    asks: np.ndarray  # [n, arms + 1] bool: whether to pull the informative arm, by pull and by how many arms were tried


@functools.lru_cache(maxsize=8)
def solve_informative(prior: InformativeArms, n: int) -> InformativePlan:
    """By how many of the arms, tried in the order of their number, were not the target.

    That order is optimal: the informative arm pays the more, the higher the number of the target, so it is best to rule out
    the lowest numbers first; for all else the arms are alike.

    Raises:
        ConfigError: the target does not pay the most, which all of this takes for granted.
    """
    arms, target, other = prior.arms, prior.target, prior.other
    if target < max(other, 1):
        raise ConfigError(
            "env.target", target, "the optimum is known only where the target pays the most: >= 1 and env.other"
        )
    value = np.zeros(arms)  # by arms tried, with no pull left
    asks = np.zeros((n, arms + 1), bool)
    for left in range(1, n + 1):
        new = np.zeros(arms)
        for tried in range(arms):
            ask = np.mean(np.arange(tried + 1, arms + 1) / arms) + target * (left - 1)
            hit = 1 / (arms - tried)
            pull = hit * target * left
            if tried + 1 < arms:
                pull += (1 - hit) * (other + value[tried + 1])
            new[tried] = max(ask, pull)
            asks[n - left, tried] = ask > pull
        value = new
    return InformativePlan(float(value[0]), asks)


class Informed(NamedTuple):
    tried: jax.Array  # [] int, arms that were not the target
    target: jax.Array  # [] int, -1: not known


@pytree
class OptimalInformative(Classical):
    asks: jax.Array  # [n, arms + 1]
    prior: InformativeArms = static()

    def start(self) -> Informed:
        return Informed(jnp.zeros((), int), jnp.full((), -1))

    def begin(self, belief: Informed, key: Key, episode: jax.Array) -> jax.Array:
        explore = jnp.where(self.asks[episode, belief.tried], self.prior.arms, belief.tried)
        return jnp.where(belief.target >= 0, belief.target, explore)

    def act(self, plan: jax.Array, observation: jax.Array, previous: Previous, key: Key) -> tuple[jax.Array, jax.Array]:
        return plan, plan

    def learn(self, belief: Informed, plan: jax.Array, batch: Batch) -> Informed:
        arms, reward = self.prior.arms, batch.reward[0]
        told = jnp.round(reward * arms).astype(int) - 1
        found = jnp.abs(reward - self.prior.target) < 1e-3
        unknown = belief.target < 0
        asked = plan == arms
        target = jnp.where(unknown & asked, told, jnp.where(unknown & found, plan, belief.target))
        tried = belief.tried + (unknown & ~asked & ~found)
        return Informed(tried.astype(belief.tried.dtype), target.astype(belief.target.dtype))


# --- two-step task


def two_step_value(prior: TwoStep, rounds: int) -> float:
    """Expected return of `rounds` rounds in a row, by backward induction over a fine grid of the belief.

    The value is convex in the belief, so that linear interpolation is too high, by less than 1e-6 for 100 rounds.
    """
    good = prior.common * prior.reward + (1 - prior.common) * (1 - prior.reward)  # by the action that commonly leads to it
    good = max(good, 1 - good)
    belief = np.linspace(0, 1, BELIEFS)  # that the first state is the better one
    now = (1 - good) + (2 * good - 1) * np.maximum(belief, 1 - belief)
    for_first = belief * prior.reward + (1 - belief) * (1 - prior.reward)  # a reward there, or none in the second state
    with np.errstate(invalid="ignore"):
        yes = np.nan_to_num(belief * prior.reward / for_first)
        no = np.nan_to_num(belief * (1 - prior.reward) / (1 - for_first))
    yes, no = (b * (1 - prior.switch) + (1 - b) * prior.switch for b in (yes, no))
    value = np.zeros(BELIEFS)
    for _ in range(rounds):
        value = now + for_first * np.interp(yes, belief, value) + (1 - for_first) * np.interp(no, belief, value)
    return float(value[BELIEFS // 2])


class Believed(NamedTuple):
    first: jax.Array  # [], probability that the first of the two second-stage states is the better one
    time: jax.Array  # [] int, steps into the episode
    was: jax.Array  # [] int, the second-stage state of the round
    reward: jax.Array  # [], the last


@pytree
class OptimalTwoStep(Classical):
    prior: TwoStep = static()

    def start(self) -> jax.Array:
        return jnp.full((), 0.5)

    def begin(self, belief: jax.Array, key: Key, episode: jax.Array) -> Believed:
        return Believed(belief, jnp.zeros((), int), jnp.zeros((), int), jnp.zeros(()))

    def update(self, belief: jax.Array, second: jax.Array, reward: jax.Array) -> jax.Array:
        """After a round: the posterior, without the switch that may follow."""
        for_first = jnp.where(second == 1, reward, 1 - reward) > 0.5
        first = jnp.where(for_first, self.prior.reward, 1 - self.prior.reward)
        joint = belief * first
        return joint / (joint + (1 - belief) * (1 - first))

    def act(self, plan: Believed, observation: jax.Array, previous: Previous, key: Key) -> tuple[Believed, jax.Array]:
        state = jnp.argmax(observation)
        posterior = self.update(plan.first, plan.was, previous.reward)
        after = posterior * (1 - self.prior.switch) + (1 - posterior) * self.prior.switch
        new_round = (state == 0) & (plan.time > 0)
        first = jnp.where(new_round, after, plan.first)
        likelier = jnp.where(first >= 0.5, 0, 1)
        action = likelier if self.prior.common >= 0.5 else 1 - likelier
        return Believed(first, plan.time + 1, state, previous.reward), action

    def learn(self, belief: jax.Array, plan: Believed, batch: Batch) -> jax.Array:
        return self.update(plan.first, plan.was, batch.reward[-1])


# --- a goal on a grid


class Sweep(NamedTuple):
    first: list[tuple[int, int]]  # [T] cells after each step of the first episode
    second: list[tuple[int, int]]  # [T] of the second one, if the first found nothing
    episodes: tuple[float, float]  # expected return of the first episode and of every later one


@functools.lru_cache(maxsize=8)
def solve_sweep(prior: GoalGrid, horizon: int) -> Sweep | None:
    """A search that nothing can beat, or None where this one is not found.

    No walk can try more than one new cell with a step, nor any before the nearest one's distance: that bounds the first
    episode. Who knows the goal takes its distance to it: that bounds the others. The sweep attains both. In its first
    episode every step from the nearest goal's distance on tries a new cell, until all are tried or time is up; what is left
    then lies on one shortest path, which is the second episode.
    """
    if prior.once or prior.on_goal <= prior.off_goal:
        return None
    goals, distance = set(prior.goals), {cell: _distance(prior.start, cell) for cell in prior.goals}
    nearest = max(1, min(distance.values()))
    left = max(0, len(goals) - max(0, horizon - nearest + 1))
    for chain in _shortest_paths(prior):
        tested_later = [cell for cell in chain if cell in goals]
        if len(tested_later) < left or (left and distance[tested_later[-1]] > horizon):
            continue
        later = set(tested_later[len(tested_later) - left :])
        first = _walk(prior, goals - later, nearest, horizon)
        if first is not None:
            second = (chain + [chain[-1]] * horizon)[:horizon]
            times = [first.index(cell) + 1 for cell in goals - later]
            found = [_paid(prior, horizon, time) for time in times] + [horizon * prior.off_goal] * left
            known = [_paid(prior, horizon, d) for d in distance.values()]
            return Sweep(first, second, (float(np.mean(found)), float(np.mean(known))))
    return None


def _distance(a: tuple[int, int], b: tuple[int, int]) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _paid(prior: GoalGrid, horizon: int, time: int) -> float:
    """The return of an episode that reaches the goal with step `time` and stays."""
    reached = max(0, horizon - max(time, 1) + 1)
    return reached * prior.on_goal + (horizon - reached) * prior.off_goal


def _shortest_paths(prior: GoalGrid) -> Iterator[list[tuple[int, int]]]:
    """From the start to the corners: every shortest path that cannot be made longer."""
    for corner in itertools.product((0, prior.size - 1), repeat=2):
        across, up = corner[0] - prior.start[0], corner[1] - prior.start[1]
        for columns in itertools.combinations(range(abs(across) + abs(up)), abs(across)):
            x, y = prior.start
            path = []
            for step in range(abs(across) + abs(up)):
                x, y = (x + int(np.sign(across)), y) if step in columns else (x, y + int(np.sign(up)))
                path.append((x, y))
            if path:
                yield path


def _walk(prior: GoalGrid, cells: set[tuple[int, int]], nearest: int, horizon: int) -> list[tuple[int, int]] | None:
    """A walk that enters a new one of the cells with every step from `nearest` on, as long as there are any."""
    budget = 20_000

    def extend(path: list[tuple[int, int]], new: set[tuple[int, int]]) -> list[tuple[int, int]] | None:
        nonlocal budget
        budget -= 1
        if not new:
            return path + [(path or [prior.start])[-1]] * (horizon - len(path))
        if len(path) == horizon:
            return None
        x, y = (path or [prior.start])[-1]
        near = [(x + dx, y + dy) for dx, dy in MOVES[1:].tolist()]
        near = [c for c in near if min(c) >= 0 and max(c) < prior.size]
        options = [c for c in near if (c in new if len(path) + 1 >= nearest else c not in new)]
        # First where there is least way on: what is not entered now may be cut off.
        options.sort(key=lambda c: sum(_distance(c, other) == 1 for other in new))
        for cell in options:
            if budget > 0 and (found := extend([*path, cell], new - {cell})) is not None:
                return found
        return None

    return extend([], cells)


class Searching(NamedTuple):
    cell: jax.Array  # [2]
    goal: jax.Array  # [2]
    knows: jax.Array  # [] bool
    time: jax.Array  # [] int
    path: jax.Array  # [T, 2]


class Goal(NamedTuple):
    cell: jax.Array  # [2]
    knows: jax.Array  # [] bool


@pytree
class OptimalSweep(Classical):
    paths: jax.Array  # [2, T, 2]
    prior: GoalGrid = static()

    def start(self) -> Goal:
        return Goal(jnp.zeros(2, int), jnp.zeros((), bool))

    def begin(self, belief: Goal, key: Key, episode: jax.Array) -> Searching:
        start = jnp.array(self.prior.start)
        return Searching(start, belief.cell, belief.knows, jnp.zeros((), int), self.paths[jnp.minimum(episode, 1)])

    def found(self, plan: Searching, reward: jax.Array) -> Goal:
        """After a step that led to `plan.cell`."""
        here = (plan.time > 0) & (reward > (self.prior.on_goal + self.prior.off_goal) / 2)
        return Goal(jnp.where(here, plan.cell, plan.goal), plan.knows | here)

    def act(self, plan: Searching, observation: jax.Array, previous: Previous, key: Key) -> tuple[Searching, jax.Array]:
        goal = self.found(plan, previous.reward)
        moves, size = jnp.asarray(MOVES), self.prior.size
        action = toward(plan.cell, jnp.where(goal.knows, goal.cell, plan.path[plan.time]), moves, size)
        cell = move(plan.cell, moves[action], size)
        return Searching(cell, goal.cell, goal.knows, plan.time + 1, plan.path), action

    def learn(self, belief: Goal, plan: Searching, batch: Batch) -> Goal:
        return self.found(plan, batch.reward[-1])


# --- which of them


class BayesOptimalSettings(AlgoSettings):
    def build(self, family: TaskFamily) -> Classical:
        prior, n = family.prior, family.episodes
        if isinstance(prior, BernoulliArms) and family.horizon == 1:
            table = solve_counts(prior.k, n)
            return OptimalArms(
                best=jnp.asarray(table.best), after=jnp.asarray(table.after), k=prior.k, spec=spaces(family), planned=n
            )
        if isinstance(prior, CorrelatedArms) and family.horizon == 1:
            return OptimalCorrelated(values=prior.values, spec=spaces(family))
        if isinstance(prior, InformativeArms) and family.horizon == 1:
            asks = jnp.asarray(solve_informative(prior, n).asks)
            return OptimalInformative(asks=asks, prior=prior, spec=spaces(family), planned=n)
        if isinstance(prior, TwoStep):
            # Further episodes of several rounds go through the same switches again: only the first is known to be optimal.
            return OptimalTwoStep(prior=prior, spec=spaces(family), planned=None if prior.rounds == 1 else 1)
        if isinstance(prior, GoalGrid) and (sweep := solve_sweep(prior, family.horizon)) is not None:
            return OptimalSweep(paths=jnp.array([sweep.first, sweep.second]), prior=prior, spec=spaces(family))
        refuse(
            family, "bayes_optimal", "env=bandit (few arms or pulls), bandit_uniform, bandit_informative, two_step, grid_nav"
        )
