"""What the gradient-based meta-learners share: everything but how theta gets better.

    theta_i' = theta - alpha grad L_in(theta; D_i),    D_i sampled with pi_theta                                     (1)
    improve theta by what D_i and D_i' say,            D_i' sampled with pi_{theta_i'}                               (2)

`core.adapt.InnerLoop` holds (1). A file in `algos/` holds (2): `improve`, mostly a loss of one task for `descend`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarl_cli.core.adapt import Adapts, Data, Estimator, InnerLoop, known_tasks, map_tasks
from metarl_cli.core.devices import over_tasks
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import MetaLearner, Metrics, TaskFamily
from metarl_cli.core.networks import Activation, Policy
from metarl_cli.core.returns import Normaliser, episode_returns, masked_mean, summed_up
from metarl_cli.core.rollout import Spaces, spaces
from metarl_cli.core.rules import MetaLSTM, Optax, Recurrent
from metarl_cli.core.settings import AlgoSettings, EvalSettings, Widths, setting
from metarl_cli.core.types import Batch, Key, Params, Plan, Trial, pytree, static


class State(NamedTuple):
    params: Params  # theta
    optimizer: optax.OptState
    normaliser: Normaliser


@pytree
class GradientBased(MetaLearner):
    inner: InnerLoop
    lr: float | jax.Array
    max_grad_norm: float | jax.Array
    outer_optimizer: Literal["adam", "sgd"] = static()
    inner_steps: int = static()  # N
    meta_batch: int = static()  # B
    episodes: int = static()  # K
    task_batch: int = static()
    normalize_observations: bool = static()
    normalize_rewards: bool = static()

    @abstractmethod
    def improve(self, state: State, batch: Batch, data: Data) -> tuple[Params, optax.OptState, Metrics]:
        """The new theta, from what the learner lived through in each task, `[B, N + 1, K, T]`."""

    @property
    def policy(self) -> Policy:
        return self.inner.policy

    def optimizer(self) -> optax.GradientTransformation:
        step = optax.adam if self.outer_optimizer == "adam" else optax.sgd
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), step(self.lr))  # type: ignore[arg-type]

    def init(self, key: Key, family: TaskFamily) -> State:
        theta = self.inner.init(key)
        normaliser = Normaliser.create(spaces(family).observation, self.normalize_observations, self.normalize_rewards)
        return State(theta, self.optimizer().init(theta), normaliser)

    def learned(self, state: State) -> State:
        return state._replace(optimizer=None)

    def portable(self, state: State) -> State | None:
        """A learned rule: it runs for each number that adapts, however many there are."""
        if state.params.get("rule") is None:
            return None
        return State({group: x if group == "rule" else None for group, x in state.params.items()}, None, None)  # type: ignore[arg-type]

    def plan(self, family: TaskFamily, settings: EvalSettings) -> Plan:
        """The test protocol of MAML's authors: 3 steps from 40 episodes each, alpha halved after the first.

        Where an episode is one step (a bandit), the budget of pulls is the problem: see `split`.
        """
        rule = settings.adapt
        budget = settings.episodes or (family.episodes if family.horizon == 1 else None)
        steps = rule.steps if rule.steps is not None else (max(self.inner_steps, 1) if family.horizon == 1 else 3)
        if budget is None:
            return Plan(points=steps + 1, episodes=rule.episodes or 40, decay=rule.decay)
        episodes = rule.episodes or split(budget, steps)
        if budget % episodes:
            raise ConfigError(
                "eval.episodes",
                budget,
                f"must be a multiple of the {episodes} episodes per adaptation step",
                hint="Set eval.adapt.episodes, or eval.episodes to a multiple of it.",
            )
        return Plan(points=budget // episodes, episodes=episodes, decay=rule.decay)

    def trial(self, state: State, key: Key, family: TaskFamily, task: Any, plan: Plan) -> Trial:
        batch, _ = self.inner.live(
            state.params,
            key,
            family,
            task,
            state.normaliser,
            points=plan.points,
            episodes=plan.episodes,
            decay=plan.decay,
        )
        return summed_up(batch)

    def update(self, state: State, key: Key, family: TaskFamily, progress: jax.Array) -> tuple[State, Metrics]:
        batch, data = self.sample(state, key, family)
        params, optimizer, metrics = self.improve(state, batch, data)
        returns = jnp.mean(episode_returns(batch), axis=(0, 2))
        first = jax.tree.map(lambda x: x[:, 0], data)
        policy = self.policy.apply(self.inner.start(state.params).params, first.observation)
        metrics |= {
            "return_before": returns[0],
            "return_after": returns[-1],
            "trial_return": jnp.sum(returns) * self.episodes,
            "entropy": masked_mean(policy.entropy(), first.valid),
            "steps": jnp.sum(batch.valid),
        }
        return State(params, optimizer, state.normaliser.update(batch, self.inner.gamma)), metrics

    def sample(self, state: State, key: Key, family: TaskFamily) -> tuple[Batch, Data]:
        """Fresh tasks, and what the learner lived through in each: `[B, N + 1, K, T]`."""
        key_tasks, key_live = jax.random.split(key)
        tasks = jax.vmap(family.sample)(over_tasks(jax.random.split(key_tasks, self.meta_batch)))
        return self.live(state, key_live, family, tasks)

    def live(self, state: State, key: Key, family: TaskFamily, tasks: Any) -> tuple[Batch, Data]:
        """What the learner lives through in each of B tasks in training: `[B, N + 1, K, T]`."""

        def live(key, task):
            return self.inner.live(
                state.params,
                key,
                family,
                task,
                state.normaliser,
                points=self.inner_steps + 1,
                episodes=self.episodes,
            )

        keys = jax.random.split(key, jax.tree.leaves(tasks)[0].shape[0])
        return jax.vmap(live)(over_tasks(keys), over_tasks(tasks))

    def gradient(self, loss: Callable[[Params, Any], jax.Array], params: Params, tasks: Any) -> tuple[jax.Array, Params]:
        """A loss of one task and its gradient, averaged over `tasks [B, ...]`. Each is differentiated by itself."""
        each = map_tasks(lambda task: jax.value_and_grad(loss)(params, task), tasks, self.task_batch)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), each)

    def descend(
        self, loss: Callable[[Params, Any], jax.Array], state: State, tasks: Any, epochs: int
    ) -> tuple[Params, optax.OptState, Metrics]:
        """Steps of the outer optimiser down a loss of one task, `loss(theta, task)`, averaged over `tasks [B, ...]`."""

        def epoch(carry, _):
            params, optimizer = carry
            value, gradient = self.gradient(loss, params, tasks)
            updates, optimizer = self.optimizer().update(gradient, optimizer, params)
            params = optax.apply_updates(params, updates)
            return (params, optimizer), {"loss": value, "grad_norm": optax.tree.norm(gradient)}

        (params, optimizer), metrics = jax.lax.scan(epoch, (state.params, state.optimizer), None, length=epochs)
        return params, optimizer, jax.tree.map(lambda x: x[-1], metrics)


def split(budget: int, steps: int) -> int:
    """Episodes per point where a trial of `budget` episodes is split evenly over `steps + 1` points.

    Where that does not go, over the next larger number of points that does: at last over points of one episode each.
    """
    points = next(p for p in range(min(steps + 1, budget), budget + 1) if budget % p == 0)
    return budget // points


class GradientBasedSettings(AlgoSettings):
    """The keys that all gradient-based meta-learners have."""

    inner_lr: float = setting("inner step alpha; with learned_lr, where it starts", gt=0)
    inner_steps: int = setting(
        "adaptation steps N in training, 0 trains one policy for all tasks; on one-step families with episodes=null at "
        "least so many, as the trial is split evenly",
        ge=0,
    )
    inner_optimizer: Literal["sgd", "adam", "meta_lstm", "recurrent"] = setting(
        "what turns the inner gradient into a step; the last two are learned"
    )
    rule_units: int = setting("units of a learned inner_optimizer, for each number that adapts", unit="units", ge=1)
    estimator: Estimator = setting("of the inner policy gradient: they differ in its derivative")
    adapts: Adapts = setting("what an inner step changes; a context is an input of the policy, 0 before the first step")
    context: int = setting("size of the context (adapts=context)", ge=1)
    learned_lr: bool = setting("an inner step for each parameter, meta-learned")
    first_order: bool = setting("inner steps are not differentiated through")
    remat: bool = setting("the meta-gradient computes inner steps again instead of keeping them: less memory, more time")
    sees_task: bool = setting("the policy observes the task as well: an upper bound, no meta-learning")
    episodes: int | None = setting(
        "episodes K per adaptation step; null: 20, on one-step families an even split of the trial", ge=1
    )
    meta_batch: int = setting("tasks B of a meta-iteration", unit="tasks", ge=1)
    outer_optimizer: Literal["adam", "sgd"] = setting("what turns the outer gradient into a step")
    lr: float = setting("outer learning rate", gt=0)
    max_grad_norm: float = setting("global norm to which the outer gradient is clipped", gt=0)
    gamma: float = setting("discount", ge=0, le=1)
    lam: float = setting("lambda of the advantage estimates", ge=0, le=1)
    hidden: Widths = setting("widths of the policy's layers", unit="units")
    activation: Activation = setting("of the policy's layers")
    task_batch: int | None = setting(
        "tasks differentiated at once, 0 for all; null: as fits the device; changes speed only", ge=0
    )
    normalize_observations: bool = setting("running normalisation of observations")
    normalize_rewards: bool = setting("running normalisation of rewards")

    def shared(self, family: TaskFamily) -> dict[str, Any]:
        """The fields of `GradientBased`."""
        learned = self.inner_optimizer in ("meta_lstm", "recurrent")
        if learned and self.inner_steps == 0:
            problem = "a learned inner_optimizer is learned through the inner steps, so there has to be one"
            raise ConfigError("algo.inner_steps", 0, problem)
        spec = spaces(family)
        varies = jax.jit(known_tasks)(family)[2] if self.sees_task else jnp.zeros(0)
        told = tuple(jnp.flatnonzero(varies).tolist())
        spec = Spaces(spec.observation + len(told), spec.action, spec.discrete)
        episodes, inner_steps = self.episodes or 20, self.inner_steps
        if self.episodes is None and family.horizon == 1:
            episodes = split(family.episodes, inner_steps)
            inner_steps = family.episodes // episodes - 1
        task_batch = self.task_batch
        if task_batch is None:
            # About 2,000 states at once stay in a core's cache (measured: scripts/bench.py); an accelerator takes all.
            at_once = max(1, 2000 // (episodes * family.horizon))
            task_batch = at_once if jax.default_backend() == "cpu" else 0
        context = self.context if self.adapts == "context" else 0
        match self.inner_optimizer:
            case "meta_lstm":
                rule = MetaLSTM(self.rule_units)
            case "recurrent":
                rule = Recurrent(self.rule_units)
            case name:
                rule = Optax(name)
        inner = InnerLoop(
            lr=self.inner_lr,
            gamma=self.gamma,
            lam=self.lam,
            policy=Policy(spec, self.hidden, self.activation, context),
            estimator=self.estimator,
            adapts=self.adapts,
            rule=rule,
            learned_lr=self.learned_lr,
            first_order=self.first_order,
            remat=self.remat,
            told=told,
        )
        return {
            "inner": inner,
            "lr": self.lr,
            "max_grad_norm": self.max_grad_norm,
            "outer_optimizer": self.outer_optimizer,
            "inner_steps": inner_steps,
            "meta_batch": self.meta_batch,
            "episodes": episodes,
            "task_batch": task_batch,
            "normalize_observations": self.normalize_observations,
            "normalize_rewards": self.normalize_rewards,
        }
