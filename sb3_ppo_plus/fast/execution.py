"""How a model acts and takes its steps: in compiled graphs, by replays, or eagerly."""

from __future__ import annotations

from typing import Any, Self

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer
from sb3_ppo_plus.distributed.parts import Parts
from sb3_ppo_plus.fast.compiled_actor import CompiledActor, can_act_alone
from sb3_ppo_plus.fast.compiled_memory_actor import CompiledMemoryActor
from sb3_ppo_plus.fast.compiled_step import CompiledGradientStep
from sb3_ppo_plus.fast.graphs import CompilationReporter, inductor_options
from sb3_ppo_plus.fast.policy_changes import hindrance
from sb3_ppo_plus.fast.replayed_actor import ReplayedActor
from sb3_ppo_plus.fast.replayed_step import ReplayedGradientStep
from sb3_ppo_plus.fast.users_code import UsersCode
from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy
from sb3_ppo_plus.policies.remembering import MemoryOptions
from sb3_ppo_plus.rollout.actor import RolloutActor
from sb3_ppo_plus.rollout.memory_actor import MemoryActor
from sb3_ppo_plus.rollout.parted_actor import PartedActor
from sb3_ppo_plus.trees import tree_map
from sb3_ppo_plus.update.gradient_step import GradientStep, check_amp, resolve_amp


def check_execution(model: PlusModel) -> None:
    """Check the arguments of a model that say how it computes.

    :param model: the model
    :raises ValueError: for values of ``amp`` or ``compile`` that are not allowed
    :raises TypeError: for a ``compile`` of another type
    """
    check_amp(model)
    inductor_options(model.compile)


class Execution:
    """Makes the actor and the gradient step of a model when they are first needed, and keeps them.

    They are made again when a user assigns another policy, or changes the model's attribute ``compile``.

    :param grad_scaler: scales the loss and unscales the gradients under float16
    :param verbose: 1: print what was compiled
    """

    def __init__(self, grad_scaler: th.amp.GradScaler, verbose: int) -> None:
        self.grad_scaler = grad_scaler
        self.reporter = CompilationReporter(verbose)
        self.users_code = UsersCode()
        self.gradient_step: GradientStep | None = None
        self.compiled_actor: CompiledActor | None = None
        self.replayed_actor: ReplayedActor | None = None

    @classmethod
    def of_model(cls, model: PlusModel) -> Self:
        """Make the execution of a model that has its policy and rollout buffer.

        :param model: the model
        """
        if isinstance(model.rollout_buffer, PPOPlusRolloutBuffer):
            model.rollout_buffer.advantages_by_scan = model.compile is not False
        is_scaled = resolve_amp(model.amp, model.device) is th.float16
        return cls(th.amp.GradScaler(model.device.type, enabled=is_scaled), model.verbose)

    def step_for(self, model: PlusModel) -> GradientStep:
        """Return the object that takes the gradient steps of a model.

        :param model: the model
        """
        policy, step = model.policy, self.gradient_step
        options = getattr(policy, "memory_options", None)
        is_compiled = model.compile is not False and (options is None or _fits_graphs(options, model.device))
        if step is None or step.policy is not policy or isinstance(step, CompiledGradientStep) != is_compiled:
            if is_compiled:
                step = CompiledGradientStep(policy, self.grad_scaler, inductor_options(model.compile), self.reporter)
            else:
                step = ReplayedGradientStep(policy, self.grad_scaler)
            self.gradient_step = step
        return step

    def actor_for(
        self, model: PlusModel, rollout_buffer: RolloutBuffer, callback: BaseCallback | None = None
    ) -> RolloutActor:
        """Return the actor that chooses the actions of a rollout, ready for its first step.

        :param model: the model
        :param rollout_buffer: the buffer of the rollout
        :param callback: the callback of the rollout; None: it is not known
        """
        self.users_code.begin_rollout(callback)
        parts: Parts = model._parts
        actor = self._actor_for(model, rollout_buffer) if parts.is_whole else self._parted_actor(model, rollout_buffer)
        actor.begin_rollout(rollout_buffer)
        return actor

    def _parted_actor(self, model: PlusModel, rollout_buffer: RolloutBuffer) -> RolloutActor:
        policy, n_envs = model.policy, rollout_buffer.n_envs
        parts: Parts = model._parts
        if getattr(policy, "memory_options", None) is None:
            return PartedActor([self._actor_for(model, rollout_buffer)] * parts.n_here, parts, n_envs)
        assert isinstance(policy, ActorCriticPlusPolicy)
        states = model._last_states
        actors: list[RolloutActor] = []
        for envs in parts.envs_of(n_envs):
            of_part = None if states is None else tree_map(lambda part, envs=envs: part[:, envs].clone(), states)
            actors.append(MemoryActor(policy, of_part, n_envs // parts.n_here))
        return PartedActor(actors, parts, n_envs)

    def _actor_for(self, model: PlusModel, rollout_buffer: RolloutBuffer) -> RolloutActor:
        policy = model.policy
        actor = None if model.compile is False else self._compiled_actor_for(model, rollout_buffer)
        if getattr(policy, "memory_options", None) is not None:
            assert isinstance(policy, ActorCriticPlusPolicy)
            if isinstance(actor, CompiledMemoryActor):
                actor.remember(model._last_states, rollout_buffer.n_envs)
                return actor
            return MemoryActor(policy, model._last_states, rollout_buffer.n_envs)
        if actor is not None:
            actor.n_parts = model._parts.n_here
            return actor
        if self.replayed_actor is None or self.replayed_actor.policy is not policy:
            self.replayed_actor = ReplayedActor(policy, self.users_code)
        return self.replayed_actor

    def _compiled_actor_for(self, model: PlusModel, rollout_buffer: RolloutBuffer) -> CompiledActor | None:
        policy = model.policy
        if not isinstance(rollout_buffer, PPOPlusRolloutBuffer) or not can_act_alone(policy):
            other = type(policy if isinstance(rollout_buffer, PPOPlusRolloutBuffer) else rollout_buffer)
            self.reporter.failed(
                "acting", f"{other.__name__} may have methods of its own, which need values and log-probs at each step"
            )
            return None
        reason = hindrance(policy)
        if reason is not None:
            self.reporter.failed("acting", reason)
            return None
        kind = CompiledActor if policy.memory_options is None else CompiledMemoryActor
        if type(self.compiled_actor) is not kind or self.compiled_actor.policy is not policy:
            options = inductor_options(model.compile)
            self.compiled_actor = kind(policy, options, self.reporter, self.users_code)
        return None if self.compiled_actor.has_given_up else self.compiled_actor

    def log_to(self, logger: Logger, model: PlusModel) -> None:
        """Log how many seconds compilations have taken, if the model compiles.

        :param logger: SB3's logger
        :param model: the model
        """
        if model.compile is not False:
            logger.record("time/compile_seconds", self.reporter.seconds)

    def state(self, model: PlusModel) -> dict[str, Any]:
        """Return what the next gradient steps depend on, as plain values and tensors.

        :param model: the model
        """
        return {
            "grad_scaler": self.grad_scaler.state_dict(),
            "has_gradient": self.step_for(model).has_gradient,
            # Parts of a policy may have been frozen during training
            "trainable": [parameter.requires_grad for parameter in model.policy.parameters()],
        }

    def set_state(self, model: PlusModel, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` has returned.

        :param model: the model
        :param state: the result of :meth:`state`; other entries are ignored
        """
        self.grad_scaler.load_state_dict(state["grad_scaler"])
        has_gradient, trainable = state["has_gradient"], state.get("trainable")
        if trainable is not None:
            for parameter, is_trainable in zip(model.policy.parameters(), trainable, strict=True):
                parameter.requires_grad_(is_trainable)
        # Without the flags of older files, a parameter without gradient may have been frozen: the first step finds out
        if has_gradient is not None and (trainable is not None or all(has_gradient)):
            self.step_for(model).flatten(has_gradient)


def _fits_graphs(options: MemoryOptions, device: th.device) -> bool:
    # On a GPU PyTorch's own kernels are faster than a loop over time. Dropout would draw other numbers than they do
    return options.kind == "gtrxl" or (device.type == "cpu" and not options.sizes.get("dropout"))
