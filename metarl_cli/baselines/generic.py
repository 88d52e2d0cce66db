"""Two learners for every family: chance, and one who knows the task."""

from __future__ import annotations

from typing import Any

import jax

from metarl_cli.baselines.base import Classical, to_trial
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import Learner, TaskFamily
from metarl_cli.core.rollout import Spaces, from_environment, rollout, spaces
from metarl_cli.core.settings import AlgoSettings, EvalSettings
from metarl_cli.core.types import Batch, Key, Plan, Previous, Trial, pytree, static


@pytree
class Random(Classical):
    """Uniform actions: in [-1, 1] per component, which `to_environment` stretches over the action space."""

    def start(self) -> tuple[()]:
        return ()

    def begin(self, belief: tuple[()], key: Key, episode: jax.Array) -> tuple[()]:
        return ()

    def act(self, plan: tuple[()], observation: jax.Array, previous: Previous, key: Key) -> tuple[tuple[()], jax.Array]:
        if self.spec.discrete:
            return plan, jax.random.randint(key, (), 0, self.spec.action)
        return plan, jax.random.uniform(key, (self.spec.action,), minval=-1, maxval=1)

    def learn(self, belief: tuple[()], plan: tuple[()], batch: Batch) -> tuple[()]:
        return ()


@pytree
class Oracle(Learner):
    """Does what the family's oracle says, which knows the task and sees the environment's state."""

    spec: Spaces = static()

    def init(self, key: Key, family: TaskFamily) -> tuple[()]:
        return ()

    def plan(self, family: TaskFamily, settings: EvalSettings) -> Plan:
        """A point per episode."""
        return Plan(points=settings.episodes or family.episodes, episodes=1)

    def trial(self, state: tuple[()], key: Key, family: TaskFamily, task: Any, plan: Plan) -> Trial:
        def act(carry, env_state, previous, key):
            action = family.oracle(task, env_state)
            assert action is not None  # `build` has seen to it
            return carry, from_environment(family, task, action), None

        def episode(_, key):
            return None, rollout(key, family, task, act, (), self.spec, sees_state=True)[1]

        return to_trial(jax.lax.scan(episode, None, jax.random.split(key, plan.points))[1])


class RandomSettings(AlgoSettings):
    def build(self, family: TaskFamily) -> Random:
        return Random(spec=spaces(family))


class OracleSettings(AlgoSettings):
    def build(self, family: TaskFamily) -> Oracle:
        if not has_oracle(family):
            raise ConfigError("algo", "oracle", "nobody knows what is best in this family", hint="algo=random fits it.")
        return Oracle(spec=spaces(family))


def has_oracle(family: TaskFamily) -> bool:
    key = jax.random.key(0)

    def action():
        task = family.sample(key)
        return family.oracle(task, family.env.reset(key, task)[1])

    return jax.eval_shape(action) is not None
