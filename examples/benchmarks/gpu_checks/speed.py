"""The stages of gpu_check.py that measure: speed of the contenders in turns, and the profiler."""

import re
import statistics
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gpu_checks.capture import graphs_without_code
from gpu_checks.cases import wait_for_device
from gpu_checks.report import Options, Report
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profiler

from sb3_ppo_plus import PPOPlus

SECONDS, MIN_ROUNDS, MAX_ROUNDS = 16, 3, 25
PIXELS, VECTOR = (4, 84, 84), (17,)


class SpeedCase(NamedTuple):
    """One size of task: environments that cost next to nothing, and the algorithm's settings."""

    name: str
    n_envs: int
    observation_shape: tuple[int, ...]
    settings: dict[str, Any]

    @property
    def is_image(self) -> bool:
        return len(self.observation_shape) == 3


CASES = {
    "f1": SpeedCase("pixels 84x84x4, 8 envs", 8, PIXELS, {"n_steps": 128, "batch_size": 256, "n_epochs": 4}),
    "f2": SpeedCase("pixels 84x84x4, 64 envs", 64, PIXELS, {"n_steps": 64, "batch_size": 512, "n_epochs": 4}),
    "f3": SpeedCase(
        "256x256 net, batch 4096, 8 envs",
        8,
        VECTOR,
        {"n_steps": 512, "batch_size": 4096, "n_epochs": 10, "policy_kwargs": {"net_arch": [256, 256]}},
    ),
    "f4": SpeedCase("64x64 net, 1024 envs", 1024, VECTOR, {"n_steps": 16, "batch_size": 4096, "n_epochs": 10}),
    "f5": SpeedCase("64x64 net, 8 envs, batch 64", 8, VECTOR, {"n_steps": 128, "batch_size": 64, "n_epochs": 4}),
}
COMPILED: dict[str, Any] = {"compile": True}
# Class and settings of what is compared
CONTENDERS: dict[str, tuple[type[PPO], dict[str, Any]]] = {
    "SB3": (PPO, {}),
    "PPOPlus": (PPOPlus, {}),
    "compiled": (PPOPlus, COMPILED),
    "bf16 compiled": (PPOPlus, {**COMPILED, "amp": True}),
    "compiled, CPU": (PPOPlus, COMPILED),
    "compiled, not captured": (PPOPlus, {"compile": {"triton.cudagraphs": False}}),
}


class CheapEnvs(VecEnv):
    """Any number of environments whose steps are a look into a short list."""

    def __init__(self, n_envs: int, observation_space: spaces.Box, action_space: spaces.Space) -> None:
        rng = np.random.default_rng(0)
        shape = (n_envs, *observation_space.shape)
        is_image = observation_space.dtype == np.uint8
        draws = [rng.integers(0, 255, shape) if is_image else rng.uniform(-1, 1, shape) for _ in range(4)]
        self.observations = [draw.astype(observation_space.dtype) for draw in draws]
        self.rewards = rng.normal(size=n_envs).astype(np.float32)
        self.infos: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        self.n_steps = 0
        super().__init__(n_envs, observation_space, action_space)

    def reset(self) -> np.ndarray:
        return self.observations[0]

    def step_async(self, actions: np.ndarray) -> None:
        self.n_steps += 1

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        dones = np.zeros(self.num_envs, bool)
        return self.observations[self.n_steps % 4], self.rewards.copy(), dones, self.infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:  # noqa: ANN401  # as in VecEnv
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise AttributeError(attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:  # noqa: ANN401  # as in VecEnv
        pass

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:  # noqa: ANN401  # as in VecEnv
        raise AttributeError(method_name)

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:  # noqa: ANN401  # as in VecEnv
        return [False] * self.num_envs


@dataclass
class Running:
    """A contender that is warm.

    :param model: the model
    :param callback: an empty one, as ``learn`` makes it
    :param warm_seconds: what the first updates took, compilation included
    """

    model: Any
    callback: BaseCallback
    warm_seconds: float
    step_seconds: list[float] = field(default_factory=list)
    minibatch_seconds: list[float] = field(default_factory=list)

    @property
    def n_minibatches(self) -> int:
        """Minibatches of an update."""
        model = self.model
        return model.n_epochs * -(-model.n_steps * model.n_envs // model.batch_size)

    def collect(self) -> None:
        """Collect a rollout."""
        model = self.model
        model.collect_rollouts(model.env, self.callback, model.rollout_buffer, model.n_steps)

    def measure(self) -> None:
        """Time one rollout and one update."""
        device = self.model.device.type
        wait_for_device(device)
        started = time.perf_counter()
        self.collect()
        wait_for_device(device)
        collected = time.perf_counter()
        self.model.train()
        wait_for_device(device)
        self.step_seconds.append((collected - started) / self.model.n_steps)
        self.minibatch_seconds.append((time.perf_counter() - collected) / self.n_minibatches)


def start(options: Options, case: SpeedCase, label: str) -> Running:
    """Build a contender and warm it up.

    :param label: a key of ``CONTENDERS``
    """
    n_envs, shape, settings = case.n_envs, case.observation_shape, dict(case.settings)
    if options.quick:
        n_envs, shape = min(n_envs, 2), tuple(min(size, 36) for size in shape)
        settings |= {"n_steps": 8, "n_epochs": 1, "batch_size": min(settings["batch_size"], 8)}
    observation_space, action_space = spaces.Box(-1, 1, shape, np.float32), spaces.Box(-1, 1, (6,))
    if case.is_image:
        observation_space, action_space = spaces.Box(0, 255, shape, np.uint8), spaces.Discrete(6)
    algorithm, more = CONTENDERS[label]
    device = "cpu" if label == "compiled, CPU" else options.device
    policy = "CnnPolicy" if case.is_image else "MlpPolicy"
    envs = CheapEnvs(n_envs, observation_space, action_space)
    model = algorithm(policy, envs, seed=0, device=device, **settings, **more)
    rollout = model.n_steps * n_envs
    started = time.perf_counter()
    model.learn(3 * rollout)
    wait_for_device(device)
    warm_seconds = time.perf_counter() - started
    _, callback = model._setup_learn(10**9, None, reset_num_timesteps=False)
    callback.on_training_start({}, {})
    return Running(model, callback, warm_seconds)


def labels(options: Options, stage: str) -> list[str]:
    """Return the contenders of a stage; the others are compared with the first."""
    found = ["SB3", "PPOPlus", "compiled"]
    if stage in ("f1", "f3"):
        found.append("bf16 compiled")
    if stage in ("f4", "f5") and options.device == "cuda":
        found.append("compiled, CPU")
    # Elsewhere it would be the same as "compiled"
    if options.device == "cuda" or options.no_code:
        found.append("compiled, not captured")
    return found


def speed(options: Options, report: Report) -> None:
    """Time per rollout step and minibatch, all contenders in turns, so that whatever disturbs hits all alike."""
    case = CASES[report.stage]
    running: dict[str, Running] = {}
    with graphs_without_code(options):
        for label in labels(options, report.stage):
            item = f"{case.name}: {label}"
            with report.noting_errors(item), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                running[label] = start(options, case, label)
            said = [text[:200] for text in (str(warning.message) for warning in caught) if "compile=True" in text]
            if said:
                report.write(item, ok=False, said=said)
        n_rounds = _measure_in_turns(options, report, running)
    _report_speed(report, running, n_rounds)


def _measure_in_turns(options: Options, report: Report, running: dict[str, Running]) -> int:
    end, n_rounds = time.time() + SECONDS, 0
    while n_rounds < MIN_ROUNDS or (not options.quick and time.time() < end and n_rounds < MAX_ROUNDS):
        n_rounds += 1
        for label in list(running):
            contender = running.pop(label)
            with report.noting_errors(f"{CASES[report.stage].name}: {label}"):
                contender.measure()
                running[label] = contender
    return n_rounds


def _report_speed(report: Report, running: dict[str, Running], n_rounds: int) -> None:
    first: tuple[float, float, float] | None = None
    for label, contender in running.items():
        model = contender.model
        step, minibatch = statistics.median(contender.step_seconds), statistics.median(contender.minibatch_seconds)
        seconds = step * model.n_steps + minibatch * contender.n_minibatches
        rate = model.n_steps * model.n_envs / seconds
        first = first or (step, minibatch, rate)
        report.write(
            f"{CASES[report.stage].name}: {label}",
            ok=True,
            rollout_us=round(step * 1e6),
            update_us=round(minibatch * 1e6),
            steps_per_s=round(rate),
            x=[round(first[0] / step, 2), round(first[1] / minibatch, 2), round(rate / first[2], 2)],
            rounds=n_rounds,
            warm_s=round(contender.warm_seconds, 1),
            # Of the whole process: the largest contender so far
            peak_mib=round(th.cuda.max_memory_allocated() / 2**20) if model.device.type == "cuda" else None,
        )


def profile(options: Options, report: Report) -> None:
    """Launches, copies and waits per minibatch of one update, and how busy the GPU is."""

    def look(case: SpeedCase, label: str) -> dict[str, Any]:
        contender = start(options, case, label)
        contender.measure()
        contender.collect()
        wait_for_device(options.device)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (options.device == "cuda")
        with torch_profiler(activities=activities) as profiler:
            started = time.perf_counter()
            contender.model.train()
            wait_for_device(options.device)
            seconds = time.perf_counter() - started
        return _profiled(profiler, seconds, contender.n_minibatches)

    with graphs_without_code(options):
        for stage in ("f5",) if options.quick else ("f1", "f5"):
            for label in labels(options, stage):
                if label != "compiled, CPU":
                    report.check(f"{CASES[stage].name}: {label}", look, CASES[stage], label)


def _profiled(profiler: Any, seconds: float, n_minibatches: int) -> dict[str, Any]:  # noqa: ANN401  # torch's
    counts: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in profiler.key_averages():
        if "CUDA" in str(event.device_type):
            kernels[event.key[:70]] += event.self_device_time_total
            counts["kernels"] += event.count
        elif re.match(r"cu(da)?(Launch|Graph|Memcpy|Memset|StreamSync|DeviceSync|EventSync)", event.key) or (
            event.key in ("aten::item", "aten::_local_scalar_dense", "aten::copy_", "aten::_to_copy")
        ):
            counts[event.key] += event.count
    busy_us = float(sum(kernels.values()))
    return {
        "wall_us": round(seconds / n_minibatches * 1e6),
        "gpu_us": round(busy_us / n_minibatches, 1),
        "busy": round(busy_us / seconds / 1e6, 2),
        "per_minibatch": {name: round(count / n_minibatches, 2) for name, count in counts.most_common(14)},
        "top": [(name, round(us / n_minibatches, 1)) for name, us in kernels.most_common(10)],
    }
