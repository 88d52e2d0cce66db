"""A learner of a user's own, as `plugins=[plugin_learner]` finds it: it walks at random, and breaks where it is told to.

What a run has to get right shows within seconds on it: its update is cheap to compile, its score goes up and down, and a
seed turns NaN in a known meta-iteration.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metarl_cli.core.distributions import Categorical
from metarl_cli.core.interfaces import MetaLearner, Metrics, TaskFamily
from metarl_cli.core.returns import episode_returns
from metarl_cli.core.rollout import by_episode, rollout, spaces
from metarl_cli.core.settings import AlgoSettings, EvalSettings, setting
from metarl_cli.core.types import Key, Plan, Trial, pytree

YAML = """\
# Walks at random
_target_: plugin_learner.WalkerSettings
lr: 1.0
breaks: nothing
breaks_at: 3
luckier_than: -1.0
"""

calls: Counter[str] = Counter()  # how often Python ran through a method: each time is a trace


class WalkerState(NamedTuple):
    logits: jax.Array  # [A], the policy: the same in all states
    luck: jax.Array  # uniform on [0, 1], drawn once
    updates: jax.Array  # int


@pytree
class Walker(MetaLearner):
    lr: float | jax.Array
    loss_breaks_at: float | jax.Array  # meta-iteration; -1: never
    logits_break_at: float | jax.Array
    luckier_than: float | jax.Array  # the seeds in which they do

    def init(self, key: Key, family: TaskFamily) -> WalkerState:
        return WalkerState(jnp.zeros(spaces(family).action), jax.random.uniform(key), jnp.zeros((), int))

    def learned(self, state: WalkerState) -> WalkerState:
        return state

    def plan(self, family: TaskFamily, settings: EvalSettings) -> Plan:
        return Plan(points=settings.episodes or family.episodes, episodes=1)

    def update(self, state: WalkerState, key: Key, family: TaskFamily, progress: jax.Array) -> tuple[WalkerState, Metrics]:
        calls["update"] += 1
        logits = state.logits + self.lr * jax.random.normal(key, state.logits.shape)
        lucky = state.luck > self.luckier_than
        loss = jnp.where(lucky & (state.updates == self.loss_breaks_at), jnp.nan, jnp.sum(logits**2))
        logits = jnp.where(lucky & (state.updates == self.logits_break_at), jnp.inf, logits)
        metrics = {
            "loss": loss,
            "progress": progress,
            "return_before": jnp.min(state.logits),
            "return_after": jnp.max(state.logits),
            "trial_return": jnp.sum(state.logits),
            "steps": 3 + state.updates,
        }
        return WalkerState(logits, state.luck, state.updates + 1), metrics

    def trial(self, state: WalkerState, key: Key, family: TaskFamily, task: Any, plan: Plan) -> Trial:
        calls["trial"] += 1

        def act(carry, observation, previous, key):
            return carry, Categorical(state.logits).sample(key), ()

        batch = rollout(key, family, task, act, (), spaces(family), plan.points)[1]
        batch = jax.tree.map(lambda x: x[:, None], by_episode(batch, plan.points, family.horizon))
        regret = None if batch.regret is None else jnp.sum(batch.regret, -1)
        return Trial(episode_returns(batch), jnp.sum(batch.valid, -1), regret, batch)


class WalkerSettings(AlgoSettings):
    lr: float = setting("length of a step", gt=0)
    breaks: Literal["nothing", "loss", "logits"] = setting("what turns NaN or infinite")
    breaks_at: int = setting("and in which meta-iteration", ge=0)
    luckier_than: float = setting("and in which seeds")

    def build(self, family: TaskFamily) -> Walker:
        # Traced, so that a broken run is the same program as a healthy one and can be compared with it bit by bit.
        return Walker(
            lr=self.lr,
            loss_breaks_at=self.breaks_at if self.breaks == "loss" else -1,
            logits_break_at=self.breaks_at if self.breaks == "logits" else -1,
            luckier_than=self.luckier_than,
        )
