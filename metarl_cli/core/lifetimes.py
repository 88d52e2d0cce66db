"""What the meta-learners share that learn an update rule while agents live.

    theta_{n+1} = U_eta(theta_n, D_n),    D_n: K episodes of the agent theta_n in its task                               (1)
    eta better  by the gradient of what theta_N earns in fresh episodes, through N updates                               (2)

Each of B agents has a task of its own. N updates are one meta-iteration, and its life goes on in the next one; it ends
after a random number of updates, its own, and a fresh agent starts in a fresh task. So at any time there are young agents
and old ones. What meets a new task is a fresh agent and eta: eta is all that is learned, and it fits any family.

`update_agent` is (1), the one function that moves an agent, in training, in the meta-gradient and in a trial. (2) is
`gradient`, back-propagation through the N updates (Xu et al. 2018; Oh et al. 2020), or `es`, evolution strategies with
antithetic pairs (Salimans et al. 2017), `E[(J(eta + sigma e) - J(eta - sigma e)) / (2 sigma) e]`, a pair for each agent.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from metarl_cli.core.adapt import map_tasks, policy_data
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import MetaLearner, Metrics, TaskFamily
from metarl_cli.core.networks import Activation, AgentNetwork, Policy
from metarl_cli.core.returns import Normaliser, episode_returns, masked_mean, summed_up
from metarl_cli.core.rollout import rollout, spaces
from metarl_cli.core.settings import AlgoSettings, EvalSettings, Widths, setting
from metarl_cli.core.types import Batch, Key, Params, Plan, Trial, pytree, static

RAW = Normaliser(None, None)


class Agent(NamedTuple):
    """What an update changes."""

    params: Params  # theta
    moments: optax.OptState


class Life(NamedTuple):
    agent: Agent
    task: Any
    left: jax.Array  # int, updates until it ends


class State(NamedTuple):
    params: Params  # eta
    optimizer: optax.OptState
    lives: Life | None  # [B]; None: see `learned`


@pytree
class Lifetimes(MetaLearner):
    inner_lr: float | jax.Array
    lr: float | jax.Array
    max_grad_norm: float | jax.Array
    outer_gamma: float | jax.Array
    outer_entropy: float | jax.Array
    sigma: float | jax.Array
    network: AgentNetwork = static()
    outer: Literal["gradient", "es"] = static()
    inner_optimizer: Literal["sgd", "adam"] = static()
    inner_steps: int = static()  # N
    meta_batch: int = static()  # B
    episodes: int = static()  # K
    lifetime: int = static()
    remat: bool = static()
    task_batch: int = static()

    @abstractmethod
    def init_rule(self, key: Key) -> Params:
        """eta at the start."""

    @abstractmethod
    def update_agent(self, eta: Params, agent: Agent, batch: Batch) -> tuple[Agent, jax.Array]:
        """THE update (1), from K episodes `[K, T]`, and a regulariser of eta, 0 where there is none."""

    # --- agents

    @property
    def transform(self) -> optax.GradientTransformation:
        # Without `eps_root` the derivative of a root at 0 makes the meta-gradient NaN.
        return optax.scale_by_adam(eps_root=1e-8) if self.inner_optimizer == "adam" else optax.identity()

    def descend(self, agent: Agent, gradient: Params, lr: float | jax.Array) -> Agent:
        """A step of the agent's optimiser."""
        direction, moments = self.transform.update(gradient, agent.moments)
        return Agent(jax.tree.map(lambda p, d: p - lr * d, agent.params, direction), moments)

    def born(self, key: Key) -> Agent:
        params = self.network.init(key)
        return Agent(params, self.transform.init(params))

    def life(self, key: Key, family: TaskFamily) -> Life:
        """A fresh agent in a fresh task, with a random time to live."""
        key_agent, key_task, key_left = jax.random.split(key, 3)
        left = jax.random.randint(key_left, (), 1, self.lifetime + 1)
        return Life(self.born(key_agent), family.sample(key_task), left)

    def play(self, params: Params, key: Key, family: TaskFamily, task: Any, episodes: int) -> Batch:
        """K episodes `[K, T]`, which are data: nothing is differentiated through them."""
        params = jax.lax.stop_gradient(params)

        def act(carry, observation, previous, key):
            return carry, self.network.apply(params, observation)[0].sample(key), None

        keys = jax.random.split(key, episodes)
        return jax.vmap(lambda k: rollout(k, family, task, act, (), self.network.policy.spec)[1])(keys)

    def live(
        self, eta: Params, agent: Agent, key: Key, family: TaskFamily, task: Any, updates: int, episodes: int
    ) -> tuple[Agent, Batch]:
        """Updates, each from K fresh episodes, and K more episodes after the last: the agent and `[updates + 1, K, T]`."""

        def one(agent, key):
            batch = self.play(agent.params, key, family, task, episodes)
            return self.update_agent(eta, agent, batch)[0], batch

        keys = jax.random.split(key, updates + 1)
        agent, batches = jax.lax.scan(one, agent, keys[:-1])
        last = self.play(agent.params, keys[-1], family, task, episodes)
        return agent, jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), batches, last)

    # --- the meta-gradient

    def replay(self, eta: Params, agent: Agent, batch: Batch) -> tuple[Agent, jax.Array]:
        """The agent after its updates and what they cost, as functions of eta; recorded `[N, K, T]`."""
        step = jax.checkpoint(self.update_agent) if self.remat else self.update_agent
        agent, costs = jax.lax.scan(lambda agent, batch: step(eta, agent, batch), agent, batch)
        return agent, jnp.mean(costs)

    def loss(self, eta: Params, life: tuple[Agent, Batch]) -> jax.Array:
        """Of one agent: the policy gradient of theta_N on the last of `[N + 1, K, T]`, as a function of eta.

        Its advantages are over the linear feature baseline, fitted to these episodes, with a discount of its own.
        """
        agent, batch = life
        before, last = jax.tree.map(lambda x: x[:-1], batch), jax.tree.map(lambda x: x[-1], batch)
        agent, cost = self.replay(eta, agent, before)
        policy, _ = self.network.apply(agent.params, last.observation)
        data = policy_data(last.observation, last, RAW, self.outer_gamma, 1.0)
        earned = masked_mean(policy.log_prob(last.action) * data.advantage, last.valid)
        return cost - earned - self.outer_entropy * masked_mean(policy.entropy(), last.valid)

    def gradient(self, eta: Params, lives: Life, batch: Batch) -> Params:
        """Through the updates that were recorded, `[B, N + 1, K, T]`; agents as they were before them."""
        each = map_tasks(lambda life: jax.grad(self.loss)(eta, life), (lives.agent, batch), self.task_batch)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), each)

    def evolve(self, eta: Params, lives: Life, key: Key, family: TaskFamily) -> Params:
        """Minus the gradient of the fitness, estimated from an antithetic pair for each agent.

        The two of a pair live through the same N updates with the same random numbers. Fitness is the mean return of all
        their episodes after the first update, centred and scaled over all pairs, since returns have no common unit.
        """
        flat, unravel = ravel_pytree(eta)
        key_noise, key_live = jax.random.split(key)
        noise = jax.random.normal(key_noise, (self.meta_batch, flat.size), flat.dtype)

        def fitness(life, key, noise):
            def of(sign):
                eta = unravel(flat + sign * self.sigma * noise)
                _, batch = self.live(eta, life.agent, key, family, life.task, self.inner_steps, self.episodes)
                return jnp.mean(episode_returns(batch)[1:])

            return jnp.stack([of(1), of(-1)])

        pairs = jax.vmap(fitness)(lives, jax.random.split(key_live, self.meta_batch), noise)  # [B, 2]
        difference = pairs[:, 0] - pairs[:, 1]
        scale = jnp.sqrt(jnp.mean(difference**2)) + 1e-8
        return unravel(-jnp.mean((difference / scale)[:, None] * noise, axis=0) / (2 * self.sigma))

    # --- a meta-learner

    def optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), optax.adam(self.lr))  # type: ignore[arg-type]

    def init(self, key: Key, family: TaskFamily) -> State:
        key_rule, key_lives = jax.random.split(key)
        eta = self.init_rule(key_rule)
        lives = jax.vmap(lambda key: self.life(key, family))(jax.random.split(key_lives, self.meta_batch))
        return State(eta, self.optimizer().init(eta), lives)

    def learned(self, state: State) -> State:
        """eta alone."""
        return state._replace(optimizer=None, lives=None)

    def plan(self, family: TaskFamily, settings: EvalSettings) -> Plan:
        """A fresh agent's life: as many updates as in training at most, unless `eval` says otherwise."""
        episodes = settings.adapt.episodes or self.episodes
        steps = self.lifetime if settings.adapt.steps is None else settings.adapt.steps
        if settings.episodes is None:
            return Plan(points=steps + 1, episodes=episodes)
        if settings.episodes % episodes:
            raise ConfigError(
                "eval.episodes",
                settings.episodes,
                f"must be a multiple of the {episodes} episodes per update",
                hint="Set eval.adapt.episodes, or eval.episodes to a multiple of it.",
            )
        return Plan(points=settings.episodes // episodes, episodes=episodes)

    def trial(self, state: State, key: Key, family: TaskFamily, task: Any, plan: Plan) -> Trial:
        key_agent, key_live = jax.random.split(key)
        agent = self.born(key_agent)
        _, batch = self.live(state.params, agent, key_live, family, task, plan.points - 1, plan.episodes)
        return summed_up(batch)

    def update(self, state: State, key: Key, family: TaskFamily, progress: jax.Array) -> tuple[State, Metrics]:
        key_life, key_live, key_noise = jax.random.split(key, 3)
        lives = state.lives
        assert lives is not None

        def live(life, key):
            return self.live(state.params, life.agent, key, family, life.task, self.inner_steps, self.episodes)

        agents, batch = jax.vmap(live)(lives, jax.random.split(key_live, self.meta_batch))
        if self.outer == "es":
            gradient = self.evolve(state.params, lives, key_noise, family)
        else:
            gradient = self.gradient(state.params, lives, batch)
        updates, optimizer = self.optimizer().update(gradient, state.optimizer, state.params)
        eta = optax.apply_updates(state.params, updates)

        fresh = jax.vmap(lambda key: self.life(key, family))(jax.random.split(key_life, self.meta_batch))
        left = lives.left - self.inner_steps
        old = Life(agents, lives.task, left)
        ended = left <= 0
        lives = jax.tree.map(lambda x, y: jnp.where(ended.reshape(-1, *[1] * (x.ndim - 1)), x, y), fresh, old)

        returns = jnp.mean(episode_returns(batch), axis=(0, 2))
        policy, _ = jax.vmap(self.network.apply)(agents.params, batch.observation[:, -1])
        metrics = {
            "return_before": returns[0],
            "return_after": returns[-1],
            "trial_return": jnp.sum(returns) * self.episodes,
            "entropy": masked_mean(policy.entropy(), batch.valid[:, -1]),
            "grad_norm": optax.tree.norm(gradient),
            "steps": jnp.sum(batch.valid) * (3 if self.outer == "es" else 1),
        }
        return State(eta, optimizer, lives), metrics | self.describe(eta)

    def describe(self, eta: Params) -> Metrics:
        """What is worth seeing of eta while it is learned."""
        return {}


class LifetimesSettings(AlgoSettings):
    """The keys that all learners of this kind have."""

    outer: Literal["gradient", "es"] = setting("back-propagation through the updates, or evolution strategies")
    inner_lr: float = setting("learning rate of the agents; where it starts, if it is learned", gt=0)
    inner_optimizer: Literal["sgd", "adam"] = setting("of the agents")
    inner_steps: int = setting("updates N in a meta-iteration, through which the meta-gradient goes", unit="updates", ge=1)
    lifetime: int = setting(
        "updates of the longest life; each ends at random before, each evaluation here", unit="updates", ge=1
    )
    episodes: int = setting("episodes K of an update", ge=1)
    meta_batch: int = setting("agents B, each in a task of its own", unit="agents", ge=1)
    lr: float = setting("learning rate of Adam for the rule", gt=0)
    max_grad_norm: float = setting("global norm to which the meta-gradient is clipped", gt=0)
    outer_gamma: float = setting("discount of what the rule is learned for (gradient)", ge=0, le=1)
    outer_entropy: float = setting("weight of the agents' entropy in what the rule is learned for (gradient)", ge=0)
    sigma: float = setting("standard deviation of the perturbations (es)", gt=0)
    remat: bool = setting("the meta-gradient computes updates again instead of keeping them: less memory, more time")
    hidden: Widths = setting("widths of the agents' layers; none: linear, a table where states are one-hot", unit="units")
    activation: Activation = setting("of the agents' layers")
    task_batch: int | None = setting(
        "agents differentiated at once, 0 for all; null: as fits the device; changes speed only", ge=0
    )

    def shared(self, family: TaskFamily, outputs: int) -> dict[str, Any]:
        """The fields of `Lifetimes`; beside its policy an agent has so many `outputs`."""
        if self.lifetime < self.inner_steps:
            problem = f"must be at least the {self.inner_steps} updates of a meta-iteration (algo.inner_steps)"
            raise ConfigError("algo.lifetime", self.lifetime, problem)
        task_batch = self.task_batch
        if task_batch is None:
            at_once = max(1, 2000 // (self.episodes * family.horizon))  # see GradientBasedSettings
            task_batch = at_once if jax.default_backend() == "cpu" else 0
        return {
            "inner_lr": self.inner_lr,
            "lr": self.lr,
            "max_grad_norm": self.max_grad_norm,
            "outer_gamma": self.outer_gamma,
            "outer_entropy": self.outer_entropy,
            "sigma": self.sigma,
            "network": AgentNetwork(Policy(spaces(family), self.hidden, self.activation), outputs),
            "outer": self.outer,
            "inner_optimizer": self.inner_optimizer,
            "inner_steps": self.inner_steps,
            "meta_batch": self.meta_batch,
            "episodes": self.episodes,
            "lifetime": self.lifetime,
            "remat": self.remat,
            "task_batch": task_batch,
        }
