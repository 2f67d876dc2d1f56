"""PPOPlus: SB3's PPO with every extra one argument away."""

from __future__ import annotations

import inspect
import io
import pathlib
import time
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import numpy as np
import torch as th
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus import attributes
from sb3_ppo_plus.argument_checks import check_ranges, check_types, helps_with_keywords
from sb3_ppo_plus.buffers import plus_buffer_class
from sb3_ppo_plus.callback_hooks import notify_update_end
from sb3_ppo_plus.distributed import first_rank, training
from sb3_ppo_plus.envs.frames import check_frames
from sb3_ppo_plus.envs.vector_envs import AcceptsVectorEnvs, device_for, hint_at_cpu, in_batches
from sb3_ppo_plus.fast.execution import Execution, check_execution
from sb3_ppo_plus.masking.evaluation import evaluate_with_masks, evaluate_without_masks
from sb3_ppo_plus.masking.predicting import PredictsWithMasks
from sb3_ppo_plus.masking.usage import MaskUse
from sb3_ppo_plus.policies.actor_critic import PLUS_POLICY_OF, POLICY_ALIASES, MlpPolicy
from sb3_ppo_plus.policies.bounded_distributions import explaining_infinite_bounds
from sb3_ppo_plus.policies.bounds import AcceptsHybridActions
from sb3_ppo_plus.policies.names import POLICY_ARGUMENTS, explaining_dict_keys, resolving_policy_kwargs
from sb3_ppo_plus.policies.remembering import set_sequence_length
from sb3_ppo_plus.resuming.resume import arguments_to_continue, load_checkpoint
from sb3_ppo_plus.resuming.run import Run
from sb3_ppo_plus.rollout.reset_rows import ResetRows
from sb3_ppo_plus.rollout.steps import steps_of
from sb3_ppo_plus.rollout.tensor_buffer import fit_buffer
from sb3_ppo_plus.saving.model_file import File, loading_arguments, policies_named_by_package, write_model
from sb3_ppo_plus.saving.plain_file import is_without_pickles
from sb3_ppo_plus.saving.untrusted_model import load_without_trust, read_parameters
from sb3_ppo_plus.update.coefficients import Coefficient, Coefficients
from sb3_ppo_plus.update.epochs import check_extras, log_update, minibatches_of, run_epochs
from sb3_ppo_plus.update.gradient_step import Objective, recompute_log_prob
from sb3_ppo_plus.update.history import UpdateHistory
from sb3_ppo_plus.update.non_finite import check_epsilon, count_skipped_steps
from sb3_ppo_plus.update.symmetry import Symmetry


class PPOPlus(PPO, PredictsWithMasks, AcceptsHybridActions, AcceptsVectorEnvs, attributes.Optionals):
    """Proximal Policy Optimization (Schulman et al. 2017), bit for bit SB3's PPO by default.

    The parameters of SB3's PPO come first, with its names, order, meaning and defaults. The parameters below accept
    more than in SB3, or are new and keyword-only.

    :param policy: "MlpPolicy", "CnnPolicy" or "MultiInputPolicy"; "MlpLstmPolicy", "CnnLstmPolicy" or
        "MultiInputLstmPolicy" for an LSTM; or an ``ActorCriticPolicy`` class
    :param env: environment, the id of a registered one, or what ``sb3_ppo_plus.envs.as_vec_env`` takes
    :param learning_rate: number, schedule, callable of progress_remaining, or string such as "lin_3e-4"
    :param clip_range: in any form that ``learning_rate`` may have
    :param clip_range_vf: in any form that ``learning_rate`` may have; None: no clipping of the value function
    :param ent_coef: in any form that ``learning_rate`` may have
    :param vf_coef: in any form that ``learning_rate`` may have
    :param policy_kwargs: arguments of the policy, see :class:`ActorCriticPlusPolicy`. ``features_extractor_class``,
        ``activation_fn`` and ``optimizer_class`` may be registered names, ``net_arch`` "tiny", "small" or "medium"
    :param critic_learning_rate: learning rate of the parameters that only the critic uses; None: ``learning_rate``
    :param pessimistic_value_clip: with ``clip_range_vf``, the larger error counts, clipped or not; False: SB3's form
    :param action_masking: mask invalid actions. None: if actions are discrete, and every environment has a method
        ``action_masks()`` or the observations have a key ``action_mask``; True: an error if not; False: never
    :param amp: autocast of the update's forward pass: True or "bf16", or "fp16" on CUDA; False: none
    :param compile: True, or a dict of torch.compile's options: compiled code, which is faster and differs by float32
        rounding only. The gradient step of an LSTM or GRU is not compiled on CUDA, nor with dropout; acting with a
        memory is not in several parts or processes. On CUDA, what is compiled is replayed as CUDA graphs, but not with
        ``{"triton.cudagraphs": False}``
    :param on_non_finite: if a loss or its gradient is NaN or infinite, no step is taken. "raise": an error names the
        term; "skip": training goes on, and ``train/skipped_steps`` counts such steps
    :param max_skipped: with "skip", how many steps may be skipped in a row before an error is raised
    :param worker_timeout: seconds for a worker's answer in ``learn``, 300 or more to build its env; None: no limit
    :param restart_workers: how many hanging or dead workers of the training environment one ``learn`` may start anew
    :param micro_batches: add the gradient of a minibatch from so many parts, each of an equal share of the
        environments. They act and are evaluated one after another, which takes less memory. 1: SB3's minibatches
    :param distributed: True: train with the other processes that torchrun or Ray Train has started. ``env`` is of this
        process; ``batch_size`` and timesteps are of all. "exact": slower, with the bits of one with ``micro_batches``
    :param symmetry: function of observations and actions, tensors in the env's units, that mirrors both; None: none
    :param symmetry_mode: "augment": mirror images are further data of an update; "loss": a term that wants symmetry
    :param symmetry_coef: weight of that term
    :param caps_temporal: weight of a term that wants similar actions in successive steps (CAPS), in any form
        that ``learning_rate`` may have; so is the next
    :param caps_spatial: weight of a term that wants similar actions at observations with Gaussian noise (CAPS)
    :param caps_sigma: standard deviation of that noise, in the units in which the policy is given observations
    :raises ValueError: for a value that is not allowed, before the first environment step
    :raises TypeError: for an argument of the wrong type, one that does not exist, or one that a custom policy lacks
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = POLICY_ALIASES
    TRAINING_STATE: ClassVar[tuple[str, ...]] = attributes.TRAINING_STATE
    """Attributes that a checkpoint holds, as plain values. A subclass adds its own that training changes."""

    @helps_with_keywords(POLICY_ARGUMENTS)
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: Coefficient = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: Coefficient = 0.2,
        clip_range_vf: Coefficient | None = None,
        normalize_advantage: bool = True,
        ent_coef: Coefficient = 0.0,
        vf_coef: Coefficient = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        critic_learning_rate: Coefficient | None = None,
        pessimistic_value_clip: bool = True,
        action_masking: bool | None = None,
        amp: bool | str = False,
        compile: bool | dict[str, Any] = False,
        on_non_finite: str = "raise",
        max_skipped: int = 10,
        worker_timeout: float | None = None,
        restart_workers: int = 0,
        micro_batches: int = 1,
        distributed: bool | str = False,
        symmetry: Symmetry | None = None,
        symmetry_mode: str = "augment",
        symmetry_coef: float = 1.0,
        caps_temporal: Coefficient = 0.0,
        caps_spatial: Coefficient = 0.0,
        caps_sigma: float = 0.1,
    ) -> None:
        given = check_types({**locals(), "env": in_batches(env)})
        self.critic_learning_rate, self.pessimistic_value_clip = critic_learning_rate, pessimistic_value_clip
        self.action_masking, self.amp, self.compile = action_masking, amp, compile
        self.on_non_finite, self.max_skipped, self.worker_timeout = on_non_finite, max_skipped, worker_timeout
        self.restart_workers, self.micro_batches, self.distributed = restart_workers, micro_batches, distributed
        self.symmetry, self.symmetry_mode, self.symmetry_coef = symmetry, symmetry_mode, symmetry_coef
        self.caps_temporal, self.caps_spatial, self.caps_sigma = caps_temporal, caps_spatial, caps_sigma
        given["device"] = training.device_of_process(distributed, device_for(given["env"], device))
        self._skipped_steps, self._skipped_in_a_row, self._n_iterations, self._tb_log_name = 0, 0, 0, "PPOPlus"
        self._log_interval, self._last_states, self._built_for_masks, self.last_checkpoint = 1, None, None, None
        self._current_run, self._joins, self._was_given_masks = Run(), _init_setup_model, False
        with explaining_infinite_bounds(self, policy_kwargs), training.counting_all_environments(distributed):
            super().__init__(**{name: given[name] for name in inspect.signature(PPO).parameters if name in given})

    def _setup_model(self) -> None:
        if issubclass(self.policy_class, MaskableActorCriticPolicy):
            self._built_for_masks, self._was_given_masks = True, self.num_timesteps > 0
        self.policy_class = PLUS_POLICY_OF.get(self.policy_class, self.policy_class)
        self.rollout_buffer_class = plus_buffer_class(self.rollout_buffer_class, self.observation_space)
        check_execution(self)
        check_ranges(self)
        self._parts = training.make_parts(self, joins=self._joins)
        self._mask_use = MaskUse()
        self._coefficients = Coefficients()
        self._coefficients.setup(self)
        with resolving_policy_kwargs(self):
            self._built_for_masks = self._mask_use.builds_for_masks(self)
            if self._built_for_masks:
                self.policy_kwargs["action_masking"] = True
            with explaining_dict_keys(self.observation_space):
                super()._setup_model()
        self._coefficients.groups(self)
        fit_buffer(self, self.env)
        self._execution = Execution.of_model(self)
        set_sequence_length(self.rollout_buffer, self.policy, self._parts.size_of(self.batch_size))
        check_frames(self.env, self.policy, is_new=self.num_timesteps == 0)

    def _maybe_recommend_cpu(self, mlp_class_name: str = MlpPolicy.__name__) -> None:
        if self.policy_class.__name__ == mlp_class_name:
            hint_at_cpu(self.env, self.device)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Collect ``n_rollout_steps`` steps of each env; return False if a callback ended training, as in SB3."""
        assert self._last_obs is not None, "No previous observation was provided"
        if self._current_run.was_asked_to_stop:
            return False
        started, n_steps = time.perf_counter(), 0
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        if self.use_sde:
            self._parts.reset_noise(self.policy, env.num_envs)
        callback.on_rollout_start()
        actor = self._execution.actor_for(self, rollout_buffer, callback)
        mask_source = self._mask_use.source(env, self)
        action_masks: np.ndarray | th.Tensor | None = None
        context: dict[str, th.Tensor] = {}
        steps = steps_of(self, env, rollout_buffer, mask_source)
        check_output, rollout_values = steps.check_output, steps.values_of(actor)
        reset_rows = ResetRows(env, rollout_buffer, is_whole=self._parts.is_whole)
        check_output(self._last_obs, None, n_steps)
        while n_steps < n_rollout_steps:
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self._parts.reset_noise(self.policy, env.num_envs)
            obs_tensor = steps.tensors(self._last_obs)
            if mask_source is not None:
                action_masks = mask_source.ask(self._last_obs, n_steps)
                context = mask_source.context(action_masks)
            if actor.states is not None:
                rollout_buffer.add_states(actor.states)  # type: ignore[attr-defined]  # a memory needs a buffer of ours
            chosen, values, log_probs = actor.act(obs_tensor, self._last_episode_starts, context)
            actions, clipped_actions = steps.actions(self.policy, chosen)
            new_obs, rewards, dones, infos = steps.step(clipped_actions)
            check_output(new_obs, rewards, n_steps)
            self.num_timesteps += reset_rows.count_transitions() * self._parts.ranks.size
            # Callbacks read these variables by the names that they have in SB3 and sb3-contrib
            callback.update_locals(locals())
            if not self._parts.meeting.goes_on(self, callback.on_step()):
                steps.end()
                return False
            actor = rollout_values.actor_of(self.policy)
            steps.note_episodes(infos, dones)
            rollout_values.bootstrap_timeouts(rewards, dones, infos, n_steps, self.gamma)
            last = (self._last_obs, actions, rewards, self._last_episode_starts, values, log_probs)
            rollout_buffer.add(*last, *((context,) if context else ()))  # type: ignore[arg-type]  # SB3 declares neither Dict observations nor None
            n_steps += 1
            self._last_obs, self._last_episode_starts = steps.kept(new_obs, dones)
            self._last_states = actor.states
        steps.end()
        if not self._parts.meeting.end_rollout(self):
            return False
        rollout_values.finish(rollout_buffer)
        reset_rows.finish(rollout_buffer)
        values = actor.last_values(steps.tensors(self._last_obs), dones)
        rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)
        self.logger.record("time/rollout_seconds", time.perf_counter() - started)
        self._current_run.log_restarts(env, self.logger)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """Update the policy from the rollout buffer: ``n_epochs`` passes of minibatch steps on the PPO objective."""
        started = time.perf_counter()
        self._update_learning_rate(self.policy.optimizer)
        objective = Objective.of_update(self, self._coefficients.of_loss(self), self._parts)
        recompute_log_prob(self.policy, objective, self.rollout_buffer, self.batch_size, self._parts)
        self.policy.set_training_mode(True)
        gradient_step = self._execution.step_for(self)
        history = UpdateHistory()
        for _ in run_epochs(gradient_step, objective, minibatches_of(self, self._parts), self.n_epochs, history):
            self._n_updates += 1
        count_skipped_steps(history, self, checks_gradient=not self._execution.grad_scaler.is_enabled())
        log_update(self, history, objective.coefficients)
        self.logger.record("time/update_seconds", time.perf_counter() - started)
        self._execution.log_to(self.logger, self)
        self._n_iterations += 1
        goes_on = notify_update_end(self._current_run.callback)
        self._current_run.was_asked_to_stop = not self._parts.meeting.end_update(self, goes_on)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPOPlus",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train for ``total_timesteps`` environment steps; parameters as in SB3's ``learn``.

        A callback's ``on_update_end() -> bool``, if it has one, is called after each update; False stops training.
        With action masks, every ``EvalCallback`` whose environment offers masks evaluates ``self.masked(eval_env)``.

        :raises NonFiniteError: if an observation, reward, loss or gradient is NaN or infinite, see ``on_non_finite``
        :raises ValueError: for an optimiser with eps=0 and a Transformer, whose updates would be NaN
        :raises DeadWorkerError: if a worker of a SubprocVecEnv has died; HangingWorkerError: if it hangs
        """
        self._current_run.continuation = None
        self._log_interval, self._n_iterations, self._tb_log_name = log_interval, 0, tb_log_name
        return self._learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    @classmethod
    def resume(
        cls, save_path: str | pathlib.Path, env: GymEnv, device: th.device | str = "auto", **load_arguments: Any
    ) -> Self:
        """Load the newest valid checkpoint of a run. :meth:`continue_learning` then finishes the run.

        A damaged checkpoint is skipped with a warning. ``model.zip`` is unpickled, except with ``trusted=False``.

        :param save_path: the ``save_path`` of :class:`TrainingCheckpoint`, or the directory of one checkpoint
        :param env: as many environments as before, with the same wrappers. An environment without
            ``get_resume_state()`` starts a new episode, with a warning
        :param device: device on which the model runs
        :param load_arguments: other arguments of :meth:`load`
        :raises CheckpointError: if there is no valid checkpoint
        :raises WrapperStackError: a ValueError, for other wrappers or another number of environments; it names both
        """
        return load_checkpoint(cls, save_path, env, device, **load_arguments)

    def continue_learning(self, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Finish the ``learn`` that was interrupted. The result has the bits of a run without interruption.

        :param callback: the callbacks of that ``learn``; new objects of their classes get the checkpoint's state
        :param progress_bar: display a progress bar
        :raises ValueError: for a model that has never learned
        """
        return self._learn(*arguments_to_continue(self, callback), progress_bar)

    def _learn(self, *arguments: Any) -> Self:
        check_epsilon(self.policy)
        fit_buffer(self, self.env)
        self._current_run.was_asked_to_stop = False
        self._join()
        try:
            with self._current_run.watching_workers(self), training.training_together(self, *arguments):
                return super().learn(*arguments)
        finally:
            self._current_run.end(lambda callback: evaluate_without_masks(callback, self))

    def _join(self) -> None:
        """Divide environments, and join the other processes: a model that was loaded does so when it trains."""
        if not self._joins:
            self._joins, self._parts = True, training.make_parts(self, joins=True)
            set_sequence_length(self.rollout_buffer, self.policy, self._parts.size_of(self.batch_size))

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log, as SB3's ``dump_logs``; in a resumed run, iterations count from the run's beginning."""
        if iteration > 0:
            iteration = self._n_iterations + 1
        if iteration == 0 or (self._log_interval is not None and iteration % self._log_interval == 0):
            super().dump_logs(iteration)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        progress_bar = progress_bar and self._parts.ranks.rank == 0
        all_callbacks = self._current_run.callback = super()._init_callback(callback, progress_bar)
        first_rank.share_out_work(all_callbacks, self._parts.ranks)
        self._current_run.begin(self, all_callbacks)
        check_extras(self)
        evaluate_with_masks(all_callbacks, self)
        return all_callbacks

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may end after total_timesteps, where SB3's progress_remaining is below 0
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed all generators, as SB3 does. Environments of each process get seeds of their own."""
        super().set_random_seed(seed)
        self._parts.seed(self.env, seed)

    def _setup_lr_schedule(self) -> None:
        self._coefficients.setup_learning_rate(self)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        self._coefficients.update_learning_rates(self, optimizers)

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """Return state dicts of policy and optimiser, the latter in SB3's order with the critic's groups joined."""
        return self._coefficients.to_saved_groups(self, super().get_parameters())

    def set_parameters(
        self, load_path_or_dict: str | dict[str, Any], exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """Load state dicts, or the file of a model. Any file is safe, because nothing is unpickled.

        :param load_path_or_dict: file that PPOPlus or SB3's PPO saved, or state dicts that :meth:`get_parameters` gave
        :raises UntrustedFileError: a ValueError, for a file that is damaged or hostile
        """
        given = load_path_or_dict
        parameters = given if isinstance(given, dict) else read_parameters(given, device, self)
        super().set_parameters(self._coefficients.to_present_groups(self, parameters), exact_match, device)

    @classmethod
    def load(
        cls,
        path: File,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        trusted: bool = True,
        allow: Iterable[type] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model that PPOPlus or SB3's PPO saved; the other parameters are those of SB3's ``load``.

        A model of SB3's PPO keeps SB3's form of value clipping unless ``pessimistic_value_clip`` is given.

        :param trusted: True: as in SB3, code in the file is run. False: nothing is unpickled or imported by name, see
            :func:`sb3_ppo_plus.saving.untrusted_model.load_without_trust`; so is a file without pickles (zoo ``pull``)
        :param allow: with ``trusted=False``, your own classes that the file may name
        :param kwargs: constructor arguments to change
        :raises TypeError: for a keyword that the constructor does not have, or a class that ``allow`` cannot hold
        :raises UntrustedFileError: a ValueError, if ``trusted=False`` and the file is damaged, hostile or not plain
        """
        trusted = trusted and not is_without_pickles(path)
        replaced = loading_arguments(cls, path, custom_objects, kwargs, trusted=trusted, allow=allow)
        if trusted:
            return super().load(path, env, device, custom_objects, print_system_info, force_reset, **replaced)
        return load_without_trust(cls, path, env, device, allow, replaced, print_system_info=print_system_info)

    def save(self, path: File, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """Save the model in a zip as SB3 does, with a plain description for loading without trust."""
        archive = io.BytesIO()
        with policies_named_by_package():
            super().save(archive, exclude, include)
        write_model(archive, path, self, exclude or ())

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *attributes.NOT_SAVED]
