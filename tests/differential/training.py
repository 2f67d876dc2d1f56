"""Training as a configuration says, with everything written down that two algorithms should have in common."""

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch as th
from environments import SMALL_NET, ToyEnv
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import unwrap_vec_normalize

from differential import model_changes, optimizer_changes, policy_changes, tables
from differential.changes import BETWEEN, CHANGES, END, START, STEP, Interruption
from sb3_ppo_plus.fast import replays

Configuration = dict[str, Any]

SETTINGS = {"n_steps": 8, "batch_size": 8, "n_epochs": 2}
COEFFICIENTS = ("learning_rate", "clip_range", "clip_range_vf")
# At each step a callback sees these, and so do its changes
LOCALS = ("actions", "clipped_actions", "values", "log_probs", "rewards", "dones", "new_obs")
IN_BUFFER = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns")
assert policy_changes and optimizer_changes and model_changes, "imported for the changes that they enter"


class Run(BaseCallback):
    """Trains one model, does the changes of the configuration, and keeps a record of what it saw.

    :param configuration: see :func:`differential.sampling.sample`
    :param algorithm: SB3's PPO or a subclass
    :param arguments: further ones of the algorithm
    """

    def __init__(self, configuration: Configuration, algorithm: type, **arguments: Any) -> None:
        super().__init__()
        self.configuration = configuration
        self.handles: list[Any] = []
        self.kept: object = None
        self.stops = False
        self.records: list[tuple[str, np.ndarray]] = []
        self._globals = ExitStack()
        self._n_rollouts = 0
        settings = configuration.get("settings", {})
        self.has_schedules = any(isinstance(settings.get(name), list | tuple) for name in COEFFICIENTS)
        with warnings.catch_warnings(), self._globals:
            # About short last minibatches and the like, in both algorithms
            warnings.simplefilter("ignore")
            set_random_seed(configuration["seed"])
            self.model = algorithm(
                policy_of(configuration), self.make_env(0), device="cpu", **settings_of(configuration) | arguments
            )
            self.initial = copy.deepcopy(self.model.policy.state_dict())
            self._learn()

    def make_env(self, number: int) -> Any:
        configuration = self.configuration
        action_space = tables.ACTIONS[configuration.get("actions", "box")]
        settings = {
            "observation_space": tables.OBSERVATIONS[configuration.get("observations", "box")],
            "action_space": action_space,
            "max_steps": configuration.get("max_steps", 7),
            "p_terminate": configuration.get("p_terminate", 0.1),
        }
        starts_elsewhere = isinstance(action_space, spaces.Discrete) and action_space.start != 0
        env_class = tables.StartingAction if starts_elsewhere else ToyEnv
        n_envs = configuration.get("n_envs", 1)
        env = make_vec_env(lambda: env_class(**settings), n_envs, seed=configuration["seed"] + number)
        for name in configuration.get("wrappers", ()):
            env = tables.WRAPPERS[name](env)
        return env

    def undo(self, function: Callable[[], object]) -> None:
        """Have a function called at the end of training."""
        self._globals.callback(function)

    def record(self, name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                self.record(f"{name}[{key!r}]", part)
        elif value is not None:
            array = value.detach().cpu().numpy() if isinstance(value, th.Tensor) else np.asarray(value)
            self.records.append((f"{name} at step {self.n_calls}", array.copy()))

    def _learn(self) -> None:
        for index, (n_rollouts, resets) in enumerate(self.configuration.get("learns", [[2, True]])):
            if index > 0:
                self._change(BETWEEN, index)
            try:
                n_timesteps = n_rollouts * self.model.n_steps * self.model.n_envs
                self.model.learn(n_timesteps, self, reset_num_timesteps=resets)
            except Interruption:
                pass
        self._record_the_end()

    def _record_the_end(self) -> None:
        model = self.model
        for name, parameter in model.policy.named_parameters():
            self.record(f"gradient of {name}", np.array(np.nan) if parameter.grad is None else parameter.grad)
        episodes = [(episode["r"], episode["l"]) for episode in model.ep_info_buffer or ()]
        self.record("episodes", np.array(episodes))
        self.record("last observations", model._last_obs)
        self.record("last episode starts", model._last_episode_starts)
        self.record("training mode", np.array([part.training for part in model.policy.modules()]))
        normalize = unwrap_vec_normalize(model.env)
        if normalize is not None and normalize.norm_obs and not isinstance(normalize.obs_rms, dict):
            self.record("mean of observations", normalize.obs_rms.mean)
        for name, value in model.logger.name_to_value.items():
            if not name.startswith("time/"):
                self.records.append((f"logged {name}", np.array(value)))

    def _change(self, moment: str, number_of_moment: int) -> None:
        for when, at, name, number in self.configuration.get("changes", ()):
            if (when, at) == (moment, number_of_moment):
                CHANGES[name].function(self, number)

    def _on_rollout_start(self) -> None:
        self._change(START, self._n_rollouts)

    def _on_step(self) -> bool:
        for name in LOCALS:
            self.record(name, self.locals[name])
        self.stops = False
        self._change(STEP, self.n_calls)
        return not self.stops

    def _on_rollout_end(self) -> None:
        for name in IN_BUFFER:
            self.record(f"the buffer's {name}", getattr(self.model.rollout_buffer, name))
        self.record("PyTorch's random state", th.get_rng_state())
        self.record("NumPy's random state", np.random.get_state()[1])
        self.record("Python's random state", np.array(random.getstate()[1]))
        self._change(END, self._n_rollouts)
        self._n_rollouts += 1


def policy_of(configuration: Configuration) -> Any:
    if "policy" in configuration:
        return tables.POLICIES[configuration["policy"]]
    observations = configuration.get("observations", "box")
    if isinstance(tables.OBSERVATIONS[observations], spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if configuration.get("cnn") else "MlpPolicy"


def settings_of(configuration: Configuration) -> dict[str, Any]:
    """Arguments of SB3's PPO."""
    settings = SETTINGS | configuration.get("settings", {})
    settings = {name: tables.coefficient(value) if name in COEFFICIENTS else value for name, value in settings.items()}
    buffer = settings.pop("rollout_buffer", None)
    if buffer is not None:
        is_dict = isinstance(tables.OBSERVATIONS[configuration.get("observations", "box")], spaces.Dict)
        settings["rollout_buffer_class"] = tables.BUFFERS[buffer][is_dict]
        assert is_dict == issubclass(settings["rollout_buffer_class"], DictRolloutBuffer)
    kwargs = SMALL_NET | configuration.get("policy_kwargs", {})
    if "optimizer" in kwargs:
        kwargs["optimizer_class"], kwargs["optimizer_kwargs"] = tables.OPTIMIZERS[kwargs.pop("optimizer")]
    if "activation" in kwargs:
        kwargs["activation_fn"] = tables.ACTIVATIONS[kwargs.pop("activation")]
    if "extractor" in kwargs:
        kwargs["features_extractor_class"] = tables.EXTRACTORS[kwargs.pop("extractor")]
    return {"seed": configuration["seed"], "policy_kwargs": copy.deepcopy(kwargs)} | settings


@contextmanager
def replayed_early(configuration: Configuration) -> Iterator[None]:
    """Have minibatches and steps replayed after so few of them as the configuration says."""
    before = replays.REPLAY_AFTER
    replays.REPLAY_AFTER = configuration.get("replay_after", 3)
    try:
        yield
    finally:
        replays.REPLAY_AFTER = before
