"""Gymnasium's cart-pole and pendulum, many at once on tensors: the same physics as CartPole-v1 and Pendulum-v1."""

import math
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.envs import TensorStep, TensorVecEnv


class TorchEnv(TensorVecEnv):
    """Environments whose state is a tensor, with a time limit.

    :param num_envs: number of environments
    :param max_episode_steps: the time limit
    :param device: where the state is
    :param dtype: of the state
    """

    n_numbers: int
    """How many numbers the state of one environment has."""

    def __init__(
        self,
        num_envs: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        max_episode_steps: int,
        device: th.device | str = "cpu",
        dtype: th.dtype = th.float32,
    ) -> None:
        super().__init__(num_envs, observation_space, action_space, device)
        self.max_episode_steps = max_episode_steps
        self.state = th.zeros(num_envs, self.n_numbers, dtype=dtype, device=self.device)
        self.n_steps = th.zeros(num_envs, dtype=th.int64, device=self.device)

    def first_states(self) -> th.Tensor:
        """Draw states in which episodes begin, shape (n_envs, n_numbers)."""
        raise NotImplementedError

    def next_states(self, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Return the states after a step, rewards, and which episodes have terminated, or None."""
        raise NotImplementedError

    def observe(self, state: th.Tensor) -> th.Tensor:
        """Return observations of states, float32."""
        raise NotImplementedError

    def uniform(self, high: float | th.Tensor) -> th.Tensor:
        """Draw numbers from -high to high, of the shape of the state."""
        draws = th.rand(self.state.shape, generator=self.generator, dtype=self.state.dtype, device=self.device)
        return (2.0 * draws - 1.0) * high

    def reset_tensor(self) -> th.Tensor:
        """Begin an episode in each environment."""
        self.state = self.first_states()
        self.n_steps = th.zeros_like(self.n_steps)
        return self.observe(self.state)

    def step_tensor(self, actions: th.Tensor) -> TensorStep:
        """Step each environment, and begin a new episode where one has ended."""
        state, rewards, terminated = self.next_states(actions)
        n_steps = self.n_steps + 1
        truncated = n_steps >= self.max_episode_steps
        dones = truncated if terminated is None else truncated | terminated
        final = self.observe(state)
        # New states are drawn for all, so that nothing waits for the number of those that need one
        self.state = th.where(dones.unsqueeze(1), self.first_states(), state)
        self.n_steps = n_steps.masked_fill(dones, 0)
        return TensorStep(self.observe(self.state), rewards.float(), terminated, truncated, final)

    def get_resume_state(self) -> dict[str, Any]:
        """Return the state of all episodes."""
        return {"state": self.state, "n_steps": self.n_steps}

    def set_resume_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`get_resume_state` has returned."""
        self.state, self.n_steps = (state[name].to(self.device) for name in ("state", "n_steps"))


class TorchCartPole(TorchEnv):
    """Gymnasium's CartPole-v1: 1 for each step until the pole falls, 500 steps at most."""

    n_numbers = 4
    gravity, mass_cart, mass_pole, half_length, force, seconds = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
    most_place, most_angle = 2.4, 12 * 2 * math.pi / 360

    def __init__(
        self,
        num_envs: int,
        max_episode_steps: int = 500,
        device: th.device | str = "cpu",
        dtype: th.dtype = th.float32,
    ) -> None:
        high = np.array([2 * self.most_place, np.inf, 2 * self.most_angle, np.inf], np.float32)
        space = spaces.Box(-high, high, dtype=np.float32)
        super().__init__(num_envs, space, spaces.Discrete(2), max_episode_steps, device, dtype)

    def first_states(self) -> th.Tensor:
        """Draw each number from -0.05 to 0.05."""
        return self.uniform(0.05)

    def next_states(self, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Push the cart to one side; see Gymnasium's ``CartPoleEnv.step``."""
        place, speed, angle, turn = self.state.unbind(1)
        force = th.where(actions == 1, self.force, -self.force).to(self.state.dtype)
        mass, moment = self.mass_cart + self.mass_pole, self.mass_pole * self.half_length
        cos, sin = angle.cos(), angle.sin()
        push = (force + moment * turn.square() * sin) / mass
        turn_rate = (self.gravity * sin - cos * push) / (
            self.half_length * (4.0 / 3.0 - self.mass_pole * cos.square() / mass)
        )
        speed_rate = push - moment * turn_rate * cos / mass
        rates = th.stack((speed, speed_rate, turn, turn_rate), 1)
        state = self.state + self.seconds * rates
        terminated = (state[:, 0].abs() > self.most_place) | (state[:, 2].abs() > self.most_angle)
        return state, th.ones_like(place), terminated

    def observe(self, state: th.Tensor) -> th.Tensor:
        """Show the state."""
        return state.to(th.float32, copy=True)


class TorchPendulum(TorchEnv):
    """Gymnasium's Pendulum-v1: swing a pendulum up and hold it, for 200 steps."""

    n_numbers = 2
    most_speed, most_torque, seconds, gravity, mass, length = 8.0, 2.0, 0.05, 10.0, 1.0, 1.0

    def __init__(
        self,
        num_envs: int,
        max_episode_steps: int = 200,
        device: th.device | str = "cpu",
        dtype: th.dtype = th.float32,
    ) -> None:
        high = np.array([1.0, 1.0, self.most_speed], np.float32)
        space = spaces.Box(-high, high, dtype=np.float32)
        torque = spaces.Box(-self.most_torque, self.most_torque, (1,), np.float32)
        super().__init__(num_envs, space, torque, max_episode_steps, device, dtype)
        self._high = th.tensor([math.pi, 1.0], dtype=dtype, device=self.device)

    def first_states(self) -> th.Tensor:
        """Draw angles from -pi to pi, and speeds from -1 to 1."""
        return self.uniform(self._high)

    def next_states(self, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Apply a torque; see Gymnasium's ``PendulumEnv.step``. An episode never terminates."""
        angle, speed = self.state.unbind(1)
        torque = actions[:, 0].to(self.state.dtype).clamp(-self.most_torque, self.most_torque)
        from_top = (angle + math.pi) % (2 * math.pi) - math.pi
        costs = from_top.square() + 0.1 * speed.square() + 0.001 * torque.square()
        weight = 3 * self.gravity / (2 * self.length) * angle.sin()
        speed = speed + (weight + 3.0 / (self.mass * self.length**2) * torque) * self.seconds
        speed = speed.clamp(-self.most_speed, self.most_speed)
        return th.stack((angle + speed * self.seconds, speed), 1), -costs, None

    def observe(self, state: th.Tensor) -> th.Tensor:
        """Show the cosine and sine of the angle, and the speed."""
        angle, speed = state.unbind(1)
        return th.stack((angle.cos(), angle.sin(), speed), 1).float()


def main(timesteps: int = 200_000, n_envs: int = 64, **arguments: Any) -> float:
    """Train on cart-poles, and return the mean return of 16 episodes.

    :param timesteps: environment steps
    :param n_envs: number of environments
    :param arguments: of PPOPlus
    """
    settings = {"n_steps": 32, "batch_size": 256, "compile": True, "seed": 0, **arguments}
    model = PPOPlus("MlpPolicy", TorchCartPole(n_envs), **settings).learn(timesteps)
    mean, _ = evaluate_policy(model, TorchCartPole(8), n_eval_episodes=16)
    print(f"mean return of 16 episodes: {mean}")
    return float(mean)


if __name__ == "__main__":
    main()
