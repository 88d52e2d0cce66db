"""A ball on a line. An unknown wind blows it away; the closer to the middle it is kept, the better."""

import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces


@struct.dataclass
class EnvState(environment.EnvState):
    position: jax.Array
    time: jax.Array


@struct.dataclass
class EnvParams(environment.EnvParams):
    """The task: floats may vary."""

    wind: float = 0.0  # added to the position in each step
    gain: float = 1.0  # of the action
    max_steps_in_episode: int = 20


class MyEnv(environment.Environment[EnvState, EnvParams]):
    @property
    def default_params(self) -> EnvParams:
        return EnvParams()

    def reset_env(self, key, params):
        position = jax.random.uniform(key, minval=-1, maxval=1)
        return position[None], EnvState(position=position, time=jnp.zeros((), int))

    def step_env(self, key, state, action, params):
        position = state.position + params.gain * action[0] + params.wind
        state = EnvState(position=position, time=state.time + 1)
        return position[None], state, -jnp.abs(position), self.is_terminated(state, params), {}

    def is_terminated(self, state, params):  # the time limit is not meant here: that is a truncation
        return jnp.abs(state.position) > 5

    def action_space(self, params):
        return spaces.Box(-1.0, 1.0, (1,))

    def observation_space(self, params):
        return spaces.Box(-jnp.inf, jnp.inf, (1,))
