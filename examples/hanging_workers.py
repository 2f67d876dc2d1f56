"""A simulator that hangs: its worker process is started anew, and training goes on."""

import argparse
import time

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_ppo_plus import PPOPlus


class HangsInTheEnd(gym.Wrapper):
    """Stands for a simulator that hangs in its 300th step."""

    n_steps = 0

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.n_steps += 1
        if self.n_steps == 300:
            time.sleep(3600)
        return self.env.step(action)


class CountsRestarts(BaseCallback):
    """Counts the steps that a hanging worker has ended. The log has the number as rollout/env_restarts."""

    n_restarts = 0

    def _on_step(self) -> bool:
        self.n_restarts += sum("env_restarted" in info for info in self.locals["infos"])
        return True


def main(timesteps: int = 4_096) -> int:
    """Train, and return how many workers were started anew."""
    env = make_vec_env("CartPole-v1", 2, seed=0, wrapper_class=HangsInTheEnd, vec_env_cls=SubprocVecEnv)
    # In real runs: some times longer than the slowest step or reset
    model = PPOPlus("MlpPolicy", env, n_steps=256, worker_timeout=1.0, restart_workers=20, seed=0, device="cpu")
    counter = CountsRestarts()
    model.learn(timesteps, counter)
    env.close()
    print(f"{counter.n_restarts} workers were started anew in {model.num_timesteps} steps")
    return counter.n_restarts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=4_096)
    main(parser.parse_args().timesteps)
