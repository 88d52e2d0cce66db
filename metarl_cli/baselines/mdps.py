"""Learners for random tabular MDPs that plan once per episode, as TabulaRL has them.

Osband's TabulaRL (iosband/TabulaRL@1228f4c, `src/finite_tabular_agents.py`) is what Duan et al. 2016 ran for table 2 of the
RL^2 paper, and it decides every detail below. Its belief about an MDP, state and action by themselves: mean reward
N(mean, 1 / precision), transitions Dirichlet(count). An agent plans by backward induction over the steps of an episode.

TabulaRL's default prior mean is 0, while the MDPs' mean rewards are N(1, 1). The columns of the paper come out with 0; with
the true mean, which the prior of the family tells, most learners do far better: `algo.prior_mean`.

PSRL: Strens 2000, Osband et al. 2013. Optimistic PSRL: several samples, the best value of each. UCRL2: Jaksch et al. 2010.
BEB: Kolter and Ng 2009. Q-learning: Watkins 1989.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarl_cli.baselines.base import Classical, choose, refuse, sample_dirichlet, to_trial
from metarl_cli.core.interfaces import Learner, TaskFamily
from metarl_cli.core.rollout import Spaces, rollout, spaces
from metarl_cli.core.settings import AlgoSettings, EvalSettings, setting
from metarl_cli.core.types import Batch, Key, Plan, Previous, TabularMDP, Trial, pytree, static

FITS = "tabular MDPs (env=tabular_mdp)"


class MDPBelief(NamedTuple):
    mean: jax.Array  # [S, A] of the mean reward
    precision: jax.Array  # [S, A]
    counts: jax.Array  # [S, A, S], Dirichlet


class MDPPlan(NamedTuple):
    values: jax.Array  # [T, S, A]
    time: jax.Array  # [] int


@pytree
class MDPPrior:
    """Where a learner starts."""

    mean: float | jax.Array
    precision: float | jax.Array  # of the mean reward
    count: float | jax.Array  # of each next state
    noise_precision: float | jax.Array  # of a reward around its mean
    states: int = static()
    actions: int = static()
    horizon: int = static()
    sparse: bool = static()  # whether `count` is below 1: then sampling takes longer

    def belief(self) -> MDPBelief:
        shape = (self.states, self.actions)
        return MDPBelief(
            jnp.full(shape, jnp.asarray(self.mean, float)),
            jnp.full(shape, jnp.asarray(self.precision, float)),
            jnp.full((*shape, self.states), jnp.asarray(self.count, float)),
        )

    def update(self, belief: MDPBelief, batch: Batch) -> MDPBelief:
        """After an episode `[T]`.

        TabulaRL does not learn from the transition of an episode's last step. So it is here: a step of the batch holds the
        state that its action was chosen in, and what came after the last one is not there.
        """
        action = jax.nn.one_hot(batch.action, self.actions) * batch.valid[:, None]
        visits = jnp.einsum("ts,ta->sa", batch.observation, action)
        rewards = jnp.einsum("ts,ta,t->sa", batch.observation, action, batch.reward)
        moves = jnp.einsum("ts,ta,tn->san", batch.observation[:-1], action[:-1], batch.observation[1:])
        precision = belief.precision + visits * self.noise_precision
        mean = (belief.precision * belief.mean + self.noise_precision * rewards) / precision
        return MDPBelief(mean, precision, belief.counts + moves)


def expected_mdp(belief: MDPBelief) -> tuple[jax.Array, jax.Array]:
    """Mean rewards `[S, A]` and transitions `[S, A, S]`."""
    return belief.mean, belief.counts / jnp.sum(belief.counts, axis=-1, keepdims=True)


def sample_mdp(key: Key, belief: MDPBelief, sparse: bool) -> tuple[jax.Array, jax.Array]:
    key_reward, key_transition = jax.random.split(key)
    reward = belief.mean + jax.random.normal(key_reward, belief.mean.shape) / jnp.sqrt(belief.precision)
    return reward, sample_dirichlet(key_transition, belief.counts, below_one=sparse)


def backward_induction(reward: jax.Array, transition: jax.Array, horizon: int, bonus: jax.Array | None = None) -> jax.Array:
    """The largest sum of rewards that is left, `[T, S, A]`.

    Args:
        bonus: `[S, A]` per step that is left afterwards, on top of the reward.
    """

    def back(value, left):
        q = reward + jnp.einsum("san,n->sa", transition, value)
        if bonus is not None:
            q += bonus * left
        return jnp.max(q, axis=1), q

    left = jnp.arange(horizon)[::-1].astype(float)
    return jax.lax.scan(back, jnp.zeros(reward.shape[0]), left, reverse=True)[1]


def extended_value_iteration(
    reward: jax.Array, transition: jax.Array, reward_slack: jax.Array, transition_slack: jax.Array, horizon: int
) -> jax.Array:
    """Values `[T, S, A]` of the most optimistic MDP within `slack` of the estimate: L1 distance of transitions.

    The next state of the highest value gets half of the slack, those of the lowest values lose it. TabulaRL changes its
    estimate in place while it does so, and the step before starts from what is left: optimism adds up over the steps of an
    episode. It does not where the best next state becomes certain. Reproduced, because the published numbers are of it.
    """

    def back(carry, _):
        value, p = carry
        order = jnp.argsort(value)  # the worst first
        ranked = p[..., order]  # [S, A, S]
        certain = ranked[..., -1] + transition_slack / 2 > 1
        raised = ranked.at[..., -1].add(transition_slack / 2)
        excess = jnp.maximum(jnp.sum(raised, axis=-1, keepdims=True) - 1, 0)
        before = jnp.cumsum(raised, axis=-1) - raised
        moved = raised - jnp.clip(excess - before, 0, raised)
        best = jax.nn.one_hot(order.size - 1, order.size)[None, None]
        optimistic = jnp.where(certain[..., None], best, moved)
        q = reward + reward_slack + jnp.einsum("san,n->sa", optimistic, value[order])
        p = jnp.where(certain[..., None], p, moved[..., jnp.argsort(order)])
        return (jnp.max(q, axis=1), p), q

    return jax.lax.scan(back, (jnp.zeros(reward.shape[0]), transition), length=horizon, reverse=True)[1]


def follow(plan: MDPPlan, observation: jax.Array, key: Key) -> tuple[MDPPlan, jax.Array]:
    """The action of the highest value now, uniformly among equals: what was never tried looks the same."""
    values = plan.values[plan.time, jnp.argmax(observation)]
    return plan._replace(time=plan.time + 1), choose(key, values)


def planned(values: jax.Array) -> MDPPlan:
    return MDPPlan(values, jnp.zeros((), int))


@pytree
class EpsilonGreedyMDP(Classical):
    """Optimal for the expected MDP; with probability epsilon any action."""

    epsilon: float | jax.Array
    prior: MDPPrior

    def start(self) -> MDPBelief:
        return self.prior.belief()

    def begin(self, belief: MDPBelief, key: Key, episode: jax.Array) -> MDPPlan:
        return planned(backward_induction(*expected_mdp(belief), self.prior.horizon))

    def act(self, plan: MDPPlan, observation: jax.Array, previous: Previous, key: Key) -> tuple[MDPPlan, jax.Array]:
        key_greedy, key_whether, key_which = jax.random.split(key, 3)
        plan, greedy = follow(plan, observation, key_greedy)
        any_action = jax.random.randint(key_which, (), 0, self.spec.action)
        return plan, jnp.where(jax.random.uniform(key_whether) < self.epsilon, any_action, greedy)

    def learn(self, belief: MDPBelief, plan: MDPPlan, batch: Batch) -> MDPBelief:
        return self.prior.update(belief, batch)


@pytree
class PSRL(Classical):
    """Optimal for an MDP sampled from the posterior; with several samples for the best value of each state and action."""

    samples: int | jax.Array  # traced: it shapes nothing
    prior: MDPPrior

    def start(self) -> MDPBelief:
        return self.prior.belief()

    def begin(self, belief: MDPBelief, key: Key, episode: jax.Array) -> MDPPlan:
        def draw(i, values):
            mdp = sample_mdp(jax.random.fold_in(key, i), belief, self.prior.sparse)
            return jnp.maximum(values, backward_induction(*mdp, self.prior.horizon))

        shape = (self.prior.horizon, self.prior.states, self.prior.actions)
        return planned(jax.lax.fori_loop(0, self.samples, draw, jnp.full(shape, -jnp.inf)))

    def act(self, plan: MDPPlan, observation: jax.Array, previous: Previous, key: Key) -> tuple[MDPPlan, jax.Array]:
        return follow(plan, observation, key)

    def learn(self, belief: MDPBelief, plan: MDPPlan, batch: Batch) -> MDPBelief:
        return self.prior.update(belief, batch)


@pytree
class UCRL2(Classical):
    """Optimal for the most optimistic MDP within the confidence sets, which `scaling` shrinks."""

    scaling: float | jax.Array
    delta: float | jax.Array
    prior: MDPPrior

    def start(self) -> MDPBelief:
        return self.prior.belief()

    def begin(self, belief: MDPBelief, key: Key, episode: jax.Array) -> MDPPlan:
        prior = self.prior
        # TabulaRL counts episodes from 1 and adds 1 again.
        log = jnp.log(2 * prior.states * prior.actions * (episode + 2) / self.delta)
        rewards = jnp.maximum((belief.precision - prior.precision) / prior.noise_precision, 1)
        # It takes off only one of the S prior counts, which weigh next to nothing.
        moves = jnp.maximum(jnp.sum(belief.counts, axis=-1) - prior.count, 1)
        reward_slack = self.scaling * jnp.sqrt(4 * log / rewards)
        transition_slack = self.scaling * jnp.sqrt(4 * prior.states * log / moves)
        mdp = expected_mdp(belief)
        return planned(extended_value_iteration(*mdp, reward_slack, transition_slack, prior.horizon))

    def act(self, plan: MDPPlan, observation: jax.Array, previous: Previous, key: Key) -> tuple[MDPPlan, jax.Array]:
        return follow(plan, observation, key)

    def learn(self, belief: MDPBelief, plan: MDPPlan, batch: Batch) -> MDPBelief:
        return self.prior.update(belief, batch)


@pytree
class BEB(Classical):
    """Optimal for the expected MDP with bonuses of the order 1 / n, which `scaling` shrinks.

    On the reward 1 / (1 + precision), whatever the scaling; for each step that is left 2 T^3 scaling / (1 + the counts).
    """

    scaling: float | jax.Array
    prior: MDPPrior

    def start(self) -> MDPBelief:
        return self.prior.belief()

    def begin(self, belief: MDPBelief, key: Key, episode: jax.Array) -> MDPPlan:
        horizon = self.prior.horizon
        reward, transition = expected_mdp(belief)
        bonus = 2 * horizon**3 * self.scaling / (1 + jnp.sum(belief.counts, axis=-1))
        return planned(backward_induction(reward + 1 / (1 + belief.precision), transition, horizon, bonus))

    def act(self, plan: MDPPlan, observation: jax.Array, previous: Previous, key: Key) -> tuple[MDPPlan, jax.Array]:
        return follow(plan, observation, key)

    def learn(self, belief: MDPBelief, plan: MDPPlan, batch: Batch) -> MDPBelief:
        return self.prior.update(belief, batch)


@pytree
class QLearning(Classical):
    """Tabular Q-learning from scratch within the trial, epsilon-greedy. It learns from an episode's steps in their order.

    The last step of an episode is not learnt from: the state after it would be needed, since the end is a time limit.
    """

    lr: float | jax.Array
    gamma: float | jax.Array
    epsilon: float | jax.Array
    initial: float | jax.Array
    states: int = static()

    def start(self) -> jax.Array:
        return jnp.full((self.states, self.spec.action), jnp.asarray(self.initial, float))

    def begin(self, belief: jax.Array, key: Key, episode: jax.Array) -> jax.Array:
        return belief

    def act(self, plan: jax.Array, observation: jax.Array, previous: Previous, key: Key) -> tuple[jax.Array, jax.Array]:
        key_greedy, key_whether, key_which = jax.random.split(key, 3)
        greedy = choose(key_greedy, plan[jnp.argmax(observation)])
        any_action = jax.random.randint(key_which, (), 0, self.spec.action)
        return plan, jnp.where(jax.random.uniform(key_whether) < self.epsilon, any_action, greedy)

    def learn(self, belief: jax.Array, plan: jax.Array, batch: Batch) -> jax.Array:
        state = jnp.argmax(batch.observation, axis=-1)

        def step(q, inputs):
            state, action, reward, after, valid = inputs
            error = reward + self.gamma * jnp.max(q[after]) - q[state, action]
            return q.at[state, action].add(jnp.where(valid, self.lr * error, 0)), None

        inputs = (state[:-1], batch.action[:-1], batch.reward[:-1], state[1:], batch.valid[1:])
        return jax.lax.scan(step, belief, inputs)[0]


@pytree
class ValueIteration(Learner):
    """Knows the MDP and is optimal in it: the ceiling."""

    horizon: int = static()
    spec: Spaces = static()

    def init(self, key: Key, family: TaskFamily) -> tuple[()]:
        return ()

    def plan(self, family: TaskFamily, settings: EvalSettings) -> Plan:
        """A point per episode."""
        return Plan(points=settings.episodes or family.episodes, episodes=1)

    def trial(self, state: tuple[()], key: Key, family: TaskFamily, task: Any, plan: Plan) -> Trial:
        values = backward_induction(task.reward, task.transition, self.horizon)

        def act(plan, observation, previous, key):
            return *follow(plan, observation, key), None

        def episode(_, key):
            return None, rollout(key, family, task, act, planned(values), self.spec)[1]

        return to_trial(jax.lax.scan(episode, None, jax.random.split(key, plan.points))[1])


class BayesianMDPSettings(AlgoSettings):
    """The prior of a learner for tabular MDPs; null takes the family's own."""

    prior_mean: float | None = setting(
        "prior mean of the mean rewards; 0 is that of the RL^2 paper's table 2; null: the truth"
    )
    prior_precision: float | None = setting("1 / variance of the mean rewards; null: the truth", gt=0)
    prior_count: float | None = setting("prior count of each next state (Dirichlet); null: the truth", gt=0)


def mdp_prior(settings: BayesianMDPSettings, family: TaskFamily, learner: str) -> MDPPrior:
    """Raises `ConfigError` for a family that is no tabular MDP."""
    prior = family.prior
    if not isinstance(prior, TabularMDP):
        refuse(family, learner, FITS)

    def or_true(value: float | None, true: float) -> float:
        return true if value is None else value

    return MDPPrior(
        mean=or_true(settings.prior_mean, prior.reward_mean),
        precision=or_true(settings.prior_precision, prior.reward_std**-2),
        count=or_true(settings.prior_count, prior.dirichlet),
        noise_precision=max(prior.reward_noise, 1e-3) ** -2,
        states=prior.states,
        actions=prior.actions,
        horizon=prior.horizon,
        sparse=or_true(settings.prior_count, prior.dirichlet) < 1,
    )


class PSRLSettings(BayesianMDPSettings):
    samples: int = setting("sampled MDPs, of whose values the best counts; 1 is PSRL", ge=1)

    def build(self, family: TaskFamily) -> PSRL:
        return PSRL(samples=self.samples, prior=mdp_prior(self, family, "psrl"), spec=spaces(family))


class UCRL2Settings(BayesianMDPSettings):
    scaling: float = setting("of the confidence sets; 1 is what the theory needs", gt=0)
    delta: float = setting("probability that the confidence sets do not hold", gt=0, lt=1)

    def build(self, family: TaskFamily) -> UCRL2:
        prior = mdp_prior(self, family, "ucrl2")
        return UCRL2(scaling=self.scaling, delta=self.delta, prior=prior, spec=spaces(family))


class BEBSettings(BayesianMDPSettings):
    scaling: float = setting("of the bonus on transitions; 1 is what the theory needs", ge=0)

    def build(self, family: TaskFamily) -> BEB:
        return BEB(scaling=self.scaling, prior=mdp_prior(self, family, "beb"), spec=spaces(family))


class QLearningSettings(AlgoSettings):
    lr: float = setting("step size", gt=0, le=1)
    gamma: float = setting("discount", ge=0, lt=1)
    epsilon: float = setting("probability of a random action", ge=0, le=1)
    initial: float = setting("all values at the start; high ones make it explore")

    def build(self, family: TaskFamily) -> QLearning:
        prior = family.prior
        if not isinstance(prior, TabularMDP):
            refuse(family, "q_learning", FITS)
        return QLearning(
            lr=self.lr,
            gamma=self.gamma,
            epsilon=self.epsilon,
            initial=self.initial,
            states=prior.states,
            spec=spaces(family),
        )


class ValueIterationSettings(AlgoSettings):
    def build(self, family: TaskFamily) -> ValueIteration:
        if not isinstance(family.prior, TabularMDP):
            refuse(family, "value_iteration", f"{FITS}; algo=oracle knows the task in other families")
        return ValueIteration(horizon=family.prior.horizon, spec=spaces(family))
