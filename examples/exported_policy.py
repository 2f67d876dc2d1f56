"""Run an exported policy by onnxruntime, without PyTorch, Stable-Baselines3 or sb3-ppo-plus.

    python -m sb3_ppo_plus.zoo export --env CartPole-v1 -o policy.onnx
    python examples/exported_policy.py policy.onnx --env CartPole-v1

The file needs numpy, onnxruntime and, for the environment, gymnasium. Copy what you need of it. The contract beside the
policy, ``policy.onnx.json``, says what goes in and what comes out; this file reads it, and works for any policy that
``export_policy`` writes: with memory, with noise, with Dict observations.
"""

import argparse
import base64
import json

import gymnasium as gym
import numpy as np
import onnxruntime


class Policy:
    def __init__(self, path: str, seed: int = 0) -> None:
        with open(f"{path}.json") as file:
            self.contract = json.load(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.rng = np.random.default_rng(seed)
        self.begin_episode()

    def begin_episode(self) -> None:
        """Forget what came before: the memory's state is zeros."""
        self.state = {
            entry["name"]: np.zeros([1 if size == "batch" else size for size in entry["shape"]], entry["dtype"])
            for entry in self.contract["inputs"]
            if entry["role"] == "state"
        }

    def act(self, observation: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """Choose an action for one observation, both in the environment's units."""
        inputs = dict(self.state)
        for entry in self.contract["inputs"]:
            shape = [1 if size == "batch" else size for size in entry["shape"]]
            if entry["role"] == "observation":
                part = observation if entry["key"] is None else observation[entry["key"]]
                inputs[entry["name"]] = np.asarray(part, entry["dtype"]).reshape(shape)
            elif entry["role"] == "episode_start":
                # begin_episode has reset the state
                inputs[entry["name"]] = np.zeros(shape, bool)
            elif entry["role"] == "noise":
                draw = {"standard_normal": self.rng.standard_normal, "uniform": self.rng.random}
                inputs[entry["name"]] = draw.get(entry["distribution"], self.rng.gumbel)(size=shape).astype(np.float32)
        names = [entry["name"] for entry in self.contract["outputs"]]
        outputs = dict(zip(names, self.session.run(names, inputs), strict=True))
        self.state = {f"state_{name[len('next_state_') :]}": outputs[name] for name in names if name != "action"}
        return outputs["action"][0]

    def check(self) -> float:
        """Run the contract's test vector, and return the largest difference from the contract's answer."""
        test = self.contract["test"]
        inputs = {name: decode(entry) for name, entry in test["inputs"].items()}
        (action,) = self.session.run(["action"], inputs)
        return float(np.abs(action.astype(float) - decode(test["outputs"]["action"])).max())


def decode(entry: dict) -> np.ndarray:
    data = base64.b64decode(entry["base64"])
    return (
        np.frombuffer(data, np.dtype(entry["dtype"]).newbyteorder("<")).reshape(entry["shape"]).astype(entry["dtype"])
    )


def main(path: str, env_id: str = "CartPole-v1", episodes: int = 5, seed: int = 0) -> list[float]:
    policy = Policy(path, seed)
    print(f"difference from the contract's test vector: {policy.check():.1e}")
    env, returns = gym.make(env_id), []
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        policy.begin_episode()
        total, done = 0.0, False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(policy.act(observation))
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    print(f"returns of {episodes} episodes: {returns}")
    return returns


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="the .onnx file, with its .onnx.json beside it")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--episodes", type=int, default=5)
    args = parser.parse_args()
    main(args.path, args.env, args.episodes)
