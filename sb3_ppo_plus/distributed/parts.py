"""Environments and minibatches in equal parts: micro-batches of one process, or of several."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer
from sb3_ppo_plus.distributed.meeting import Meeting
from sb3_ppo_plus.distributed.random_streams import RandomStream
from sb3_ppo_plus.distributed.ranks import Ranks, sum_in_order

GSDE_NOISE = ("exploration_mat", "exploration_matrices")


class Parts:
    """The parts of a training run. Part k has the k-th of equally many environments, and a random stream of its own.

    Where there is one part in all, nothing is divided.

    :param n_here: number of parts of this process
    :param device: the policy's device
    :param ranks: the processes of the run
    :param is_exact: compute with the bits of one process that has all parts
    :param rank_of_envs: whose environments this process has, where it has not joined the others yet
    """

    def __init__(
        self,
        n_here: int,
        device: th.device,
        ranks: Ranks | None = None,
        *,
        is_exact: bool = True,
        rank_of_envs: int = 0,
    ) -> None:
        self.n_here = n_here
        self.ranks = ranks or Ranks()
        self._rank_of_envs = self.ranks.rank or rank_of_envs
        self.n_in_all = n_here * self.ranks.size
        self.first = n_here * self.ranks.rank
        self._device = device
        self.is_exact = is_exact
        self.meeting = Meeting(self.ranks, at_each_step=is_exact)
        self._entropy: int | None = None
        self._streams: list[RandomStream] = []
        self._gsde_noise: list[dict[str, th.Tensor]] = []

    @property
    def is_whole(self) -> bool:
        """Whether there is one part in all."""
        return self.n_in_all == 1

    def check(self, model: PlusModel) -> None:
        """Check that a model's environments and minibatches can be divided.

        :param model: the model
        :raises ValueError: names what does not divide
        """
        buffer_class = model.rollout_buffer_class
        if not self.is_whole and not (buffer_class is not None and issubclass(buffer_class, PPOPlusRolloutBuffer)):
            raise ValueError(
                f"micro_batches={self.n_here} and distributed={model.distributed!r} need a rollout_buffer_class that "
                f"is None or a subclass of PPOPlusRolloutBuffer, got {buffer_class}"
            )
        if self.n_here > 1 and model.n_envs % self.n_here != 0:
            raise ValueError(
                f"micro_batches must divide the number of environments, got micro_batches={self.n_here} and "
                f"{model.n_envs} environments"
            )
        self.size_of(model.batch_size)

    def seed_envs(self, env: VecEnv | None, seed: int | None) -> None:
        """Give the environments of this process other seeds than those of the processes before it.

        They are those of one process with all environments. The generators of Python and NumPy get other seeds too.

        :param env: the environments, after they were seeded as those of the first process
        :param seed: the model's seed
        """
        if self._rank_of_envs == 0 or seed is None or env is None:
            return
        own_seed = (seed + self._rank_of_envs * env.num_envs) % 2**32
        env.seed(own_seed)
        # Environments may draw from these. PyTorch's is the same in all processes, as policies are built from it
        random.seed(own_seed)
        np.random.seed(own_seed)

    def size_of(self, batch_size: int) -> int:
        """Return how many transitions of a minibatch belong to each part.

        :param batch_size: transitions per minibatch, over all parts
        :raises ValueError: if they cannot be divided
        """
        size, rest = divmod(batch_size, self.n_in_all)
        if rest:
            parts = f"{self.ranks.size} processes" if self.ranks.size > 1 else ""
            parts += " with " if parts and self.n_here > 1 else ""
            parts += f"micro_batches={self.n_here}" if self.n_here > 1 else ""
            raise ValueError(
                f"batch_size must be a multiple of {self.n_in_all}, as there are {parts}; got batch_size={batch_size}: "
                f"{batch_size - rest or self.n_in_all} is one"
            )
        return size

    def envs_of(self, n_envs: int) -> list[slice]:
        """Return which environments of this process belong to each of its parts.

        :param n_envs: number of environments of this process
        """
        size = n_envs // self.n_here
        return [slice(part * size, (part + 1) * size) for part in range(self.n_here)]

    def streams(self) -> list[RandomStream]:
        """Return the random stream of each part of this process. In it, the part acts and its loss is computed."""
        if not self._streams:
            entropy = self.entropy()
            self._streams = [RandomStream([entropy, 0, self.first + part], self._device) for part in range(self.n_here)]
        return self._streams

    def seed(self, env: VecEnv | None, seed: int | None) -> None:
        """Let all random streams begin anew, from what NumPy's generator draws next, and seed the environments.

        :param env: the environments, see :meth:`seed_envs`
        :param seed: the model's seed; None: nothing is done
        """
        if seed is not None:
            self._entropy, self._streams = None, []
            self.seed_envs(env, seed)

    def entropy(self) -> int:
        """Return the integer from which all random streams of the parts begin. It is the same in all processes."""
        if self._entropy is None:
            self._entropy = self.ranks.gather_objects(int(np.random.randint(2**31)), "entropy")[0]
        return self._entropy

    def permutations_of(self, n_updates: int) -> list[np.random.Generator]:
        """Return what permutes the transitions of each part of this process in an update.

        :param n_updates: number of epochs that were done before the update
        """
        seeds = ([self.entropy(), 1, self.first + part, n_updates] for part in range(self.n_here))
        return [np.random.default_rng(seed) for seed in seeds]

    def sum(self, vectors: Iterable[th.Tensor]) -> th.Tensor:
        """Add what all parts have computed. The sum has the same bits in each process.

        :param vectors: a vector of each part of this process, in their order
        """
        if self.ranks.size > 1 and self.is_exact:
            return sum_in_order(self.ranks.gather(th.stack(list(vectors))).flatten(0, 1))
        return self.ranks.sum(sum_in_order(vectors))

    def gather(self, tables: list[np.ndarray]) -> np.ndarray:
        """Return a table of each part of all processes, in their order.

        :param tables: a table of each part of this process, float64 and of one shape
        :return: shape (number of parts in all, *shape)
        """
        gathered = self.ranks.gather(th.from_numpy(np.stack(tables)))
        all_tables: np.ndarray = gathered.flatten(0, 1).numpy()
        return all_tables

    def reset_noise(self, policy: ActorCriticPolicy, n_envs: int) -> None:
        """Draw exploration matrices for gSDE.

        :param policy: the policy
        :param n_envs: number of environments of this process
        """
        if self.is_whole:
            policy.reset_noise(n_envs)
            return
        self._gsde_noise = []
        for stream in self.streams():
            with stream:
                policy.reset_noise(n_envs // self.n_here)
            self._gsde_noise.append({name: getattr(policy.action_dist, name) for name in GSDE_NOISE})

    def use_noise(self, policy: ActorCriticPolicy, part: int) -> None:
        """Let a policy act with the exploration matrices of a part.

        :param policy: the policy
        :param part: index of the part in this process
        """
        if isinstance(getattr(policy, "action_dist", None), StateDependentNoiseDistribution):
            vars(policy.action_dist).update(self._gsde_noise[part])

    def state(self) -> dict[str, Any]:
        """Return what the parts of this process draw next, as plain values; empty where nothing is divided."""
        if self.is_whole:
            return {}
        streams = [stream.states for stream in self.streams()]
        return {"parts": {"entropy": self.entropy(), "streams": streams, "gsde": self._gsde_noise}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` has returned.

        :param state: the result of :meth:`state`; other entries are ignored
        """
        if "parts" in state and not self.is_whole:
            saved = state["parts"]["streams"]
            if len(saved) != self.n_here:
                warnings.warn(
                    f"the checkpoint has {len(saved)} micro-batches, now {self.n_here}: random numbers are new ones",
                    stacklevel=2,
                )
                return
            self._entropy, self._streams = state["parts"]["entropy"], []
            for stream, states in zip(self.streams(), saved, strict=True):
                stream.states = states
            self._gsde_noise = [
                {name: tensor.to(self._device) for name, tensor in noise.items()} for noise in state["parts"]["gsde"]
            ]
