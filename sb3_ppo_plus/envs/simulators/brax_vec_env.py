"""Environments of Brax and MuJoCo Playground, which are functions of JAX."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch.utils.dlpack import from_dlpack

from sb3_ppo_plus.envs.simulators.observation_groups import ObservationGroups, space_of
from sb3_ppo_plus.envs.simulators.simulator_vec_env import SimulatorVecEnv, name_of
from sb3_ppo_plus.envs.tensor_vec_env import Observations, TensorStep


class BraxVecEnv(SimulatorVecEnv):
    """An environment of Brax or MuJoCo Playground, wrapped for training. PyTorch reads JAX's arrays where they are.

    Make it by ``brax.envs.create(name, batch_size=...)`` or Playground's ``wrapper.wrap_for_brax_training(env)``.
    Episodes begin where its ``AutoResetWrapper`` begins them. The last observations of episodes, which that wrapper
    overwrites, are kept. Actions are from -1 to 1, as for Brax's own agents.

    :param env: the environment; its outermost wrapper begins new episodes
    :param num_envs: number of environments; None: the environment's ``batch_size``
    :param groups: names of the observations that the policy sees, if they are a dict; None: all
    :raises TypeError: if the outermost wrapper does not begin new episodes
    :raises ValueError: if the number of environments is not known, or is not the environment's
    """

    _keeps_observations = False

    def __init__(
        self,
        env: Any,  # noqa: ANN401  # Brax is not imported
        num_envs: int | None = None,
        groups: Sequence[str] | None = None,
    ) -> None:
        self._jax: Any = importlib.import_module("jax")
        batch_size = _checked_batch_size(env, num_envs)
        begin, step = _functions(self._jax, env)
        self._begin_jitted, self._step_jitted = self._jax.jit(begin), self._jax.jit(step)
        self._n_keys = None if getattr(env, "batch_size", None) is not None else batch_size
        shapes = self._jax.eval_shape(begin, self._keys(self._jax.random.PRNGKey(0)))
        chosen = ObservationGroups(name_of(type(self), env), shapes.obs, groups, space_of)
        device = from_dlpack(self._jax.numpy.zeros(1)).device
        action_space = spaces.Box(-1.0, 1.0, (int(env.action_size),))
        super().__init__(env, batch_size, chosen, action_space, device, action_bound=1.0)
        self.seed_tensor(self.generator.initial_seed() % 2**31)
        self._state: Any = None

    def _keys(self, key: Any) -> Any:  # noqa: ANN401  # JAX's
        # An environment with a batch size splits a key by itself
        return key if self._n_keys is None else self._jax.random.split(key, self._n_keys)

    def seed_tensor(self, seed: int) -> None:
        """Make the key of all resets that follow.

        :param seed: the seed
        """
        super().seed_tensor(seed)
        self._key = self._jax.random.PRNGKey(seed)

    def reset_tensor(self) -> Observations:
        """Begin an episode in each environment."""
        self._key, key = self._jax.random.split(self._key)
        self._state = self._begin_jitted(self._keys(key))
        return self._begun(self._tensors(self._state.obs))

    def step_tensor(self, actions: th.Tensor) -> TensorStep:
        """Step each environment.

        :param actions: shape (n_envs, n_actions)
        """
        given = self._jax.dlpack.from_dlpack(actions.detach().contiguous())
        self._state, values = self._step_jitted(self._state, given)
        if self.device.type == "cpu":
            # JAX computes while Python goes on, and the actions may be overwritten
            self._jax.block_until_ready(values)
        groups, rewards = self._tensors((self._state.obs, self._state.reward))
        final, terminated, truncated = self._tensors(values)
        return self._stepped(groups, rewards, terminated, truncated, final)

    def _tensors(self, arrays: Any) -> Any:  # noqa: ANN401  # tree of arrays
        return self._jax.tree.map(from_dlpack, arrays)

    def get_resume_state(self) -> dict[str, Any]:
        """Return the state of all episodes, and the key of the next reset."""
        arrays = [np.array(leaf) for leaf in self._jax.tree.leaves((self._key, self._state))]
        # PyTorch computes little with unsigned numbers
        return {str(index): th.from_numpy(_signed(array)) for index, array in enumerate(arrays)}

    def set_resume_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`get_resume_state` has returned.

        :param state: tensors, which may be hostile
        :raises ValueError: if they are not those of such an environment
        """
        if not isinstance(state, dict):
            raise ValueError(f"the state of {self} must be a dict, got {type(state).__name__}")
        if self._state is None:
            self.reset_tensor()
        leaves, tree = self._jax.tree.flatten((self._key, self._state))
        arrays = []
        for index, leaf in enumerate(leaves):
            own, given = np.array(leaf), state.get(str(index))
            array = np.array(None)
            if isinstance(given, th.Tensor) and given.layout == th.strided and given.dtype != th.bfloat16:
                array = given.detach().cpu().numpy()
            if array.shape != own.shape or array.dtype != _signed(own).dtype:
                raise ValueError(f"the state of {self} must have {own.dtype}{list(own.shape)} as its array {index}")
            arrays.append(self._jax.numpy.asarray(array.view(own.dtype)))
        if len(state) != len(leaves):
            raise ValueError(f"the state of {self} must have {len(leaves)} arrays, got {len(state)}")
        self._key, self._state = self._jax.tree.unflatten(tree, arrays)


class _Watched:
    """Stands inside the wrapper that begins new episodes, and keeps the observations that it overwrites."""

    def __init__(self, env: Any) -> None:  # noqa: ANN401  # Brax's
        self.env, self.last = env, None

    def reset(self, rng: Any) -> Any:  # noqa: ANN401  # Brax's
        return self.env.reset(rng)

    def step(self, state: Any, action: Any) -> Any:  # noqa: ANN401  # Brax's
        state = self.env.step(state, action)
        self.last = state.obs
        return state

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # Brax's
        return getattr(self.env, name)


def _functions(jax: Any, env: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:  # noqa: ANN401  # JAX, Brax
    """Return what begins episodes and what steps, to be compiled by JAX."""
    outer, inner = copy.copy(env), _Watched(env.env)
    outer.env = inner

    def step(state: Any, actions: Any) -> Any:  # noqa: ANN401  # Brax's
        state = outer.step(state, actions)
        dones = state.done != 0
        timeouts = jax.numpy.zeros_like(dones)
        if "truncation" in state.info:
            timeouts = dones & (state.info["truncation"] != 0)
        return state, (inner.last, dones & ~timeouts, timeouts)

    return outer.reset, step


def is_brax(env: Any) -> bool:  # noqa: ANN401  # anything
    """Whether an environment has the methods of Brax and MuJoCo Playground.

    :param env: anything
    """
    # Of its class, because some properties reset the environment
    names = ("observation_size", "action_size", "reset", "step", "unwrapped")
    return all(hasattr(type(env), name) for name in names)


def _checked_batch_size(env: Any, num_envs: int | None) -> int:  # noqa: ANN401  # Brax's
    if "AutoReset" not in type(env).__name__:
        raise TypeError(
            "a Brax environment must be wrapped for training, by brax.envs.create(name, batch_size=...) or "
            f"mujoco_playground.wrapper.wrap_for_brax_training(env), got {type(env).__name__}"
        )
    batch_size: int | None = getattr(env, "batch_size", None)
    given = num_envs if batch_size is None else batch_size
    if given is None:
        raise ValueError("num_envs must be set, the environment has no batch_size: BraxVecEnv(env, num_envs)")
    if num_envs is not None and batch_size not in (None, num_envs):
        raise ValueError(f"num_envs must be the environment's batch_size {batch_size}, got {num_envs}")
    return int(given)


def _signed(array: np.ndarray) -> np.ndarray:
    return array.view(f"i{array.dtype.itemsize}") if array.dtype.kind == "u" else array
