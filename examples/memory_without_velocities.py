"""Memory instead of velocities: CartPole, Pendulum or LunarLander of which only positions are seen.

    python examples/memory_without_velocities.py Pendulum-v1 --memory gtrxl

LunarLander-v3 needs gymnasium[box2d].
"""

import argparse

import gymnasium as gym
from gymnasium.wrappers import TransformObservation
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus import PPOPlus

POSITIONS = {"CartPole-v1": [0, 2], "Pendulum-v1": [0, 1], "LunarLander-v3": [0, 1, 4, 6, 7]}
# steps, arguments of PPOPlus, length of the sequences in a minibatch
SETTINGS = {
    "CartPole-v1": (199_680, {"n_steps": 128, "gae_lambda": 0.9, "gamma": 0.98, "batch_size": 256}, 32),
    "Pendulum-v1": (499_200, {"n_steps": 200, "gae_lambda": 0.95, "gamma": 0.9, "batch_size": 320}, 40),
    "LunarLander-v3": (999_424, {"n_steps": 512, "gae_lambda": 0.98, "gamma": 0.999, "batch_size": 512}, 64),
}
MEMORIES = {
    "lstm": {"hidden_size": 64, "forget_bias": 1.0},
    "gtrxl": {"hidden_size": 64, "n_layers": 1, "memory_length": 16, "gate_bias": 0.0},
}


def make_env(env_id: str, n_envs: int, seed: int) -> VecEnv:
    """Leave the velocities out of the observations."""
    positions = POSITIONS[env_id]

    def only_positions(env: gym.Env) -> gym.Env:
        space = env.observation_space
        seen = gym.spaces.Box(space.low[positions], space.high[positions], dtype=space.dtype)
        return TransformObservation(env, lambda observation: observation[positions], seen)

    return make_vec_env(env_id, n_envs, seed=seed, wrapper_class=only_positions)


def main(env_id: str = "CartPole-v1", memory: str = "lstm", timesteps: int | None = None, seed: int = 10) -> float:
    """Train and return the mean reward of 20 deterministic episodes."""
    steps, arguments, sequence_length = SETTINGS[env_id]
    model = PPOPlus(
        "MlpPolicy",
        make_env(env_id, n_envs=8, seed=seed),
        learning_rate="lin_1e-3",
        policy_kwargs={"memory": memory, "memory_kwargs": {**MEMORIES[memory], "sequence_length": sequence_length}},
        seed=seed,
        device="cpu",
        **arguments,
    )
    model.learn(timesteps or steps)
    # SB3's evaluate_policy hands the memory's state on and resets it, as EvalCallback and RL Zoo's enjoy do
    mean_reward, std_reward = evaluate_policy(model, make_env(env_id, n_envs=1, seed=1000 + seed), n_eval_episodes=20)
    print(f"{env_id}, {memory}, seed {seed}: {mean_reward:.1f} +/- {std_reward:.1f} after {model.num_timesteps} steps")
    return float(mean_reward)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env_id", nargs="?", choices=POSITIONS, default="CartPole-v1")
    parser.add_argument("--memory", choices=MEMORIES, default="lstm")
    parser.add_argument("--timesteps", type=int)
    parser.add_argument("--seed", type=int, default=10)
    arguments = parser.parse_args()
    main(arguments.env_id, arguments.memory, arguments.timesteps, arguments.seed)
