"""MAML: model-agnostic meta-learning (Finn, Abbeel & Levine 2017, arXiv:1703.03400, algorithm 3).

    theta_i' = theta - alpha grad L_in(theta; D_i),    D_i sampled with pi_theta                                     (1)
    minimise over theta   mean_i L_out(theta_i'(theta); D_i'),    D_i' sampled with pi_{theta_i'}                     (2)

The outer gradient goes *through* the inner step (1), which `core.adapt.InnerLoop` holds. L_out is the surrogate of the
adapted policies, on which three outer optimisers work:

* `trpo`, as in the paper: natural gradient, KL bound on the adapted policies, line search (Schulman et al. 2015);
* `ppo`: Adam on the clipped surrogate, several epochs, theta_i' recomputed from the current theta in each (Schulman et al.
  2017). The paper has no such variant; it reaches the same returns in a fraction of the time;
* `vpg`: one Adam step along the plain policy gradient.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarl_cli.core.adapt import Data, InnerLoop, map_tasks
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import MetaLearner, Metrics, TaskFamily
from metarl_cli.core.losses import surrogate
from metarl_cli.core.networks import Activation, Policy
from metarl_cli.core.returns import Normaliser, episode_returns, masked_mean
from metarl_cli.core.rollout import spaces
from metarl_cli.core.settings import AlgoSettings, EvalSettings, Widths, setting
from metarl_cli.core.solvers import TrustRegion, trust_region_step
from metarl_cli.core.types import Batch, Key, Params, Plan, Trial, pytree, static


class MAMLState(NamedTuple):
    params: Params
    optimizer: optax.OptState
    normaliser: Normaliser


@pytree
class MAML(MetaLearner):
    inner: InnerLoop
    lr: float | jax.Array
    clip: float | jax.Array
    max_grad_norm: float | jax.Array
    max_kl: float | jax.Array
    damping: float | jax.Array
    shrink: float | jax.Array
    outer: Literal["ppo", "trpo", "vpg"] = static()
    epochs: int = static()
    cg_iterations: int = static()
    backtracks: int = static()
    inner_steps: int = static()
    meta_batch: int = static()  # B
    episodes: int = static()  # K
    task_batch: int = static()
    normalize_observations: bool = static()
    normalize_rewards: bool = static()

    @property
    def policy(self) -> Policy:
        return self.inner.policy

    def optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), optax.adam(self.lr))  # type: ignore[arg-type]

    def init(self, key: Key, family: TaskFamily) -> MAMLState:
        params = self.policy.init(key)
        normaliser = Normaliser.create(self.policy.spec.observation, self.normalize_observations, self.normalize_rewards)
        return MAMLState(params, self.optimizer().init(params), normaliser)

    def plan(self, family: TaskFamily, settings: EvalSettings) -> Plan:
        """The authors' test protocol: 3 steps from 40 episodes each, alpha halved after the first.

        Where an episode is one step (a bandit), the budget of pulls is the problem: it is split evenly over the points.
        """
        rule = settings.adapt
        budget = settings.episodes or (family.episodes if family.horizon == 1 else None)
        steps = rule.steps if rule.steps is not None else (self.inner_steps if family.horizon == 1 else 3)
        if budget is None:
            return Plan(points=steps + 1, episodes=rule.episodes or 40, decay=rule.decay)
        episodes = rule.episodes or _even_split(budget, steps, "eval.adapt.steps")
        if budget % episodes:
            raise ConfigError(
                "eval.episodes",
                budget,
                f"must be a multiple of the {episodes} episodes per adaptation step",
                hint="Set eval.adapt.episodes, or eval.episodes to a multiple of it.",
            )
        return Plan(points=budget // episodes, episodes=episodes, decay=rule.decay)

    def trial(self, state: MAMLState, key: Key, family: TaskFamily, task: Any, plan: Plan) -> Trial:
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
        regret = None if batch.regret is None else jnp.sum(jnp.where(batch.valid, batch.regret, 0), -1)
        return Trial(episode_returns(batch), jnp.sum(batch.valid, -1), regret, batch)

    def update(self, state: MAMLState, key: Key, family: TaskFamily, progress: jax.Array) -> tuple[MAMLState, Metrics]:
        batch, data = self.sample(state, key, family)  # [B, N + 1, K, T]
        match self.outer:
            case "trpo":
                params, metrics = self.trpo(state.params, data)
                optimizer = state.optimizer
            case "ppo" | "vpg":
                params, optimizer, metrics = self.adam(state, data)
        returns = jnp.mean(episode_returns(batch), axis=(0, 2))
        metrics |= {
            "return_before": returns[0],
            "return_after": returns[-1],
            "trial_return": jnp.sum(returns) * self.episodes,
            "entropy": masked_mean(self.policy.apply(state.params, data.observation[:, 0]).entropy(), data.valid[:, 0]),
            "steps": jnp.sum(batch.valid),
        }
        return MAMLState(params, optimizer, state.normaliser.update(batch, self.inner.gamma)), metrics

    def sample(self, state: MAMLState, key: Key, family: TaskFamily) -> tuple[Batch, Data]:
        """Fresh tasks, and what the learner lived through in each: `[B, N + 1, K, T]`."""
        key_tasks, key_live = jax.random.split(key)
        tasks = jax.vmap(family.sample)(jax.random.split(key_tasks, self.meta_batch))

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

        return jax.vmap(live)(jax.random.split(key_live, self.meta_batch), tasks)

    def task_loss(self, params: Params, data: Data) -> jax.Array:
        """L_out of one task, `data [N + 1, K, T]`: a function of theta through the inner steps."""
        policy, last = self.inner.adapted(params, data)
        clip = self.clip if self.outer == "ppo" else None
        return surrogate(policy.log_prob(last.action), last.log_prob, last.advantage, last.valid, clip)

    def gradient(self, params: Params, data: Data) -> tuple[jax.Array, Params]:
        """Loss and gradient of (2), averaged over tasks. Each task is differentiated by itself: see `map_tasks`."""
        each = map_tasks(lambda d: jax.value_and_grad(self.task_loss)(params, d), data, self.task_batch)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), each)

    def adam(self, state: MAMLState, data: Data) -> tuple[Params, optax.OptState, Metrics]:
        def epoch(carry, _):
            params, optimizer = carry
            loss, gradient = self.gradient(params, data)
            updates, optimizer = self.optimizer().update(gradient, optimizer, params)
            params = optax.apply_updates(params, updates)
            return (params, optimizer), {"loss": loss, "grad_norm": optax.tree.norm(gradient)}

        epochs = self.epochs if self.outer == "ppo" else 1
        (params, optimizer), metrics = jax.lax.scan(epoch, (state.params, state.optimizer), None, length=epochs)
        return params, optimizer, jax.tree.map(lambda x: x[-1], metrics)

    def trpo(self, params: Params, data: Data) -> tuple[Params, Metrics]:
        """The adapted outputs are linearised once: gradient and all Fisher-vector products `J^T H J v` reuse it."""
        last = jax.tree.map(lambda x: x[:, -1], data)  # [B, K, T]
        weight = last.valid / jnp.maximum(jnp.sum(last.valid, (1, 2), keepdims=True), 1) / self.meta_batch

        def outputs(params):
            return map_tasks(lambda d: self.inner.adapted(params, d)[0], data, self.task_batch)

        def loss(policy):
            ratio = jnp.exp(policy.log_prob(last.action) - last.log_prob)
            return -jnp.sum(weight * ratio * last.advantage)

        def evaluate(params):
            new = outputs(params)
            return loss(new), jnp.sum(weight * old.kl(new))

        old, jvp = jax.linearize(outputs, params)
        vjp = jax.linear_transpose(jvp, params)

        def fisher(v):
            product = old.fisher(jvp(v))
            return vjp(jax.tree.map(lambda x: weight[..., None] * x, product))[0]

        value, slope = jax.value_and_grad(loss)(old)
        gradient = vjp(slope)[0]
        step: TrustRegion = trust_region_step(
            params,
            value,
            gradient,
            fisher,
            evaluate,
            max_kl=self.max_kl,
            damping=self.damping,
            shrink=self.shrink,
            iterations=self.cg_iterations,
            backtracks=self.backtracks,
        )
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(gradient),
            "kl": step.kl,
            "accepted": step.accepted.astype(float),
            "backtracks": step.backtracks.astype(float),
        }
        return step.params, metrics


def _even_split(budget: int, steps: int, key: str) -> int:
    """Episodes per point where a trial of `budget` one-step episodes is split over `steps + 1` points."""
    if budget % (steps + 1):
        raise ConfigError(
            key,
            steps,
            f"a trial of {budget} pulls cannot be split evenly over {steps + 1} points (one before each step, one after)",
            allowed=[s for s in range(1, budget) if budget % (s + 1) == 0][:8],
        )
    return budget // (steps + 1)


class MAMLSettings(AlgoSettings):
    outer: Literal["ppo", "trpo", "vpg"] = setting("outer optimiser")
    inner_lr: float = setting("inner step alpha", gt=0)
    inner_steps: int = setting("adaptation steps N in training", ge=1)
    episodes: int | None = setting(
        "episodes K per adaptation step; null: 20, on one-step families an even split of the trial", ge=1
    )
    meta_batch: int = setting("tasks B of a meta-iteration", unit="tasks", ge=1)
    lr: float = setting("outer learning rate of Adam (ppo, vpg)", gt=0)
    epochs: int = setting("Adam steps on one meta-batch (ppo)", ge=1)
    clip: float = setting("clip of the probability ratio (ppo)", gt=0)
    max_grad_norm: float = setting("global norm to which the outer gradient is clipped (ppo, vpg)", gt=0)
    max_kl: float = setting("bound on the mean KL of the adapted policies (trpo)", unit="nats", gt=0)
    cg_iterations: int = setting("conjugate gradient iterations (trpo)", ge=1)
    damping: float = setting("added to the Fisher matrix (trpo)", ge=0)
    shrink: float = setting("factor of the line search (trpo)", gt=0, lt=1)
    backtracks: int = setting("trials of the line search (trpo)", ge=1)
    gamma: float = setting("discount", ge=0, le=1)
    lam: float = setting("lambda of the advantage estimates", ge=0, le=1)
    hidden: Widths = setting("widths of the policy's layers", unit="units")
    activation: Activation = setting("of the policy's layers")
    task_batch: int | None = setting(
        "tasks differentiated at once, 0 for all; null: as fits the device; changes speed only", ge=0
    )
    normalize_observations: bool = setting("running normalisation of observations")
    normalize_rewards: bool = setting("running normalisation of rewards")

    def build(self, family: TaskFamily) -> MAML:
        spec = spaces(family)
        if self.episodes is not None:
            episodes = self.episodes
        else:
            episodes = 20 if family.horizon > 1 else _even_split(family.episodes, self.inner_steps, "algo.inner_steps")
        task_batch = self.task_batch
        if task_batch is None:
            # About 2,000 states at once stay in a core's cache (measured: scripts/bench.py); an accelerator takes all.
            at_once = max(1, 2000 // (episodes * family.horizon))
            task_batch = at_once if jax.default_backend() == "cpu" else 0
        return MAML(
            inner=InnerLoop(
                lr=self.inner_lr,
                gamma=self.gamma,
                lam=self.lam,
                policy=Policy(spec, self.hidden, self.activation),
            ),
            lr=self.lr,
            clip=self.clip,
            max_grad_norm=self.max_grad_norm,
            max_kl=self.max_kl,
            damping=self.damping,
            shrink=self.shrink,
            outer=self.outer,
            epochs=self.epochs,
            cg_iterations=self.cg_iterations,
            backtracks=self.backtracks,
            inner_steps=self.inner_steps,
            meta_batch=self.meta_batch,
            episodes=episodes,
            task_batch=task_batch,
            normalize_observations=self.normalize_observations,
            normalize_rewards=self.normalize_rewards,
        )
