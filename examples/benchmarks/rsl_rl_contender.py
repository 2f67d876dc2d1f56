"""rsl_rl's own PPO as a contender of ``speed.py``, on an environment on tensors: ``pip install rsl-rl-lib``."""

import contextlib
import io
import statistics
import time
from typing import Any

import torch as th
from rsl_rl.algorithms import PPO
from rsl_rl.env import VecEnv
from tensordict import TensorDict

from sb3_ppo_plus.envs import TensorVecEnv


class TensorsForRslRl(VecEnv):
    """A ``TensorVecEnv`` with rsl_rl's methods. As SB3 does, it clips actions to their bounds."""

    def __init__(self, env: TensorVecEnv) -> None:
        self.env, self.num_envs, self.device, self.cfg = env, env.num_envs, env.device, {}
        self.num_actions = env.action_space.shape[0]
        self.max_episode_length, self.episode_length_buf = 10**9, th.zeros(env.num_envs, dtype=th.long)
        self.low, self.high = (th.as_tensor(bound) for bound in (env.action_space.low, env.action_space.high))
        self.observations = env.reset_checked()

    def get_observations(self) -> TensorDict:
        """Return the present observations."""
        return TensorDict({"policy": self.observations}, batch_size=[self.num_envs])

    def step(self, actions: th.Tensor) -> tuple[TensorDict, th.Tensor, th.Tensor, dict[str, Any]]:
        """Step each environment."""
        step = self.env.step_tensor(actions.clamp(self.low, self.high))
        self.observations = step.observations
        dones = step.truncated if step.terminated is None else step.terminated | step.truncated
        return self.get_observations(), step.rewards, dones, {"time_outs": step.truncated}


class RslRlContender:
    """rsl_rl's loop, without its log, with the networks, batches and epochs of a PPO of SB3.

    :param env: the environment
    :param model: a PPO of SB3, whose settings are used
    """

    def __init__(self, env: TensorVecEnv, model: Any) -> None:  # noqa: ANN401  # a PPO
        started = time.perf_counter()
        self.env, self.n_steps, self.n_envs = TensorsForRslRl(env), model.n_steps, env.num_envs
        n_minibatches = model.n_steps * env.num_envs // model.batch_size
        self.minibatches = model.n_epochs * n_minibatches
        net = {"class_name": "MLPModel", "hidden_dims": [64, 64], "activation": "tanh"}
        self.config = {
            "num_steps_per_env": model.n_steps,
            "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
            "actor": {**net, "distribution_cfg": {"class_name": "GaussianDistribution", "std_type": "log"}},
            "critic": dict(net),
            "multi_gpu": None,
            "algorithm": {
                "class_name": "PPO",
                "num_learning_epochs": model.n_epochs,
                "num_mini_batches": n_minibatches,
                "learning_rate": 3e-4,
                "schedule": "fixed",
                "entropy_coef": 0.0,
                "value_loss_coef": 0.5,
                "max_grad_norm": 0.5,
                "use_clipped_value_loss": False,
                "normalize_advantage_per_mini_batch": True,
            },
        }
        with contextlib.redirect_stdout(io.StringIO()):
            # It prints the networks
            self.algorithm = PPO.construct_algorithm(self.env.get_observations(), self.env, self.config, "cpu")
        self.algorithm.train_mode()
        self.rollout: list[float] = []
        self.update: list[float] = []
        for _ in range(2):
            self.measure()
        self.rollout, self.update = [], []
        self.warm_up_seconds = time.perf_counter() - started

    def measure(self) -> None:
        """Collect one rollout and train on it, see ``OnPolicyRunner.learn``."""
        started = time.perf_counter()
        observations = self.env.get_observations()
        with th.inference_mode():
            for _ in range(self.n_steps):
                actions = self.algorithm.act(observations)
                observations, rewards, dones, extras = self.env.step(actions)
                self.algorithm.process_env_step(observations, rewards, dones, extras)
            self.algorithm.compute_returns(observations)
        collected = time.perf_counter()
        self.algorithm.update()
        self.rollout.append((collected - started) / self.n_steps)
        self.update.append((time.perf_counter() - collected) / self.minibatches)

    def figures(self) -> dict[str, float]:
        """Medians, in microseconds and steps per second."""
        rollout, update = statistics.median(self.rollout), statistics.median(self.update)
        return {
            "rollout_us_per_step": rollout * 1e6,
            "update_us_per_minibatch": update * 1e6,
            "steps_per_second": self.n_steps * self.n_envs / (rollout * self.n_steps + update * self.minibatches),
            "warm_up_seconds": self.warm_up_seconds,
            "compile_seconds": 0.0,
        }
