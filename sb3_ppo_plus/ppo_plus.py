"""PPOPlus: SB3's PPO with every extra one argument away."""

from __future__ import annotations

import inspect
import pathlib
import time
import warnings
from typing import Any, ClassVar, Self

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.argument_checks import check_ranges, check_types
from sb3_ppo_plus.buffers import PPOPlusDictRolloutBuffer, PPOPlusRolloutBuffer, minibatches
from sb3_ppo_plus.callback_hooks import notify_learn_end, notify_update_end
from sb3_ppo_plus.envs.output_check import EnvOutputCheck
from sb3_ppo_plus.envs.restarting_env import RestartCounter
from sb3_ppo_plus.envs.stack_order import warn_if_stacked_inside_normalize
from sb3_ppo_plus.envs.workers import BROKEN_PIPES, dead_worker_error
from sb3_ppo_plus.extractors import TransformerExtractor
from sb3_ppo_plus.fast.compiled_actor import CompiledActor, can_act_alone
from sb3_ppo_plus.fast.compiled_step import CompiledGradientStep
from sb3_ppo_plus.fast.graphs import CompilationReporter, inductor_options
from sb3_ppo_plus.fast.policy_changes import hindrance
from sb3_ppo_plus.fast.replayed_actor import RecordedActor
from sb3_ppo_plus.fast.replayed_step import RecordedGradientStep
from sb3_ppo_plus.masking.evaluation import MaskedPredictor, evaluate_with_masks, evaluate_without_masks
from sb3_ppo_plus.masking.sources import ActionMaskSource
from sb3_ppo_plus.masking.usage import decide_masking, takes_masks
from sb3_ppo_plus.policies.actor_critic import (
    PLUS_POLICY_OF,
    ActorCriticPlusPolicy,
    CnnLstmPolicy,
    CnnPolicy,
    MlpLstmPolicy,
    MlpPolicy,
    MultiInputLstmPolicy,
    MultiInputPolicy,
)
from sb3_ppo_plus.policies.bounded_distributions import SquashedGaussianDistribution, make_action_distribution
from sb3_ppo_plus.policies.names import resolve_policy_kwargs
from sb3_ppo_plus.policies.remembering import resolve_sequence_length
from sb3_ppo_plus.policies.torch_switches import without_argument_validation
from sb3_ppo_plus.resuming.resume import Continuation, load_checkpoint
from sb3_ppo_plus.rollout.actor import RolloutActor
from sb3_ppo_plus.rollout.memory_actor import RolloutMemory
from sb3_ppo_plus.saving.saved_ppo import SavedPPO
from sb3_ppo_plus.update.gradient_step import GradientStep, Objective, recompute_log_prob, resolve_amp
from sb3_ppo_plus.update.history import UpdateHistory
from sb3_ppo_plus.update.learning_rates import LearningRateGroups
from sb3_ppo_plus.update.losses import METRICS, LossCoefficients
from sb3_ppo_plus.update.non_finite import ON_NON_FINITE, Skipped, check_steps
from sb3_ppo_plus.update.scheduled_ppo import Coefficient

REPLACED_BUFFERS = (None, RolloutBuffer, DictRolloutBuffer, MaskableRolloutBuffer, MaskableDictRolloutBuffer)


class PPOPlus(SavedPPO):
    """Proximal Policy Optimization (Schulman et al. 2017), bit for bit SB3's PPO by default.

    The parameters of SB3's PPO come first, with its names, order, meaning and defaults. Those that are described here
    take more than in SB3, or are new and keyword-only.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy" ("MlpLstmPolicy" ... with an LSTM), or an
        ``ActorCriticPolicy`` class
    :param env: environment, or the id of a registered one
    :param learning_rate: number, schedule, callable of progress_remaining, or string such as "lin_3e-4"
    :param clip_range: the same
    :param clip_range_vf: the same, or None: no clipping of the value function
    :param ent_coef: the same
    :param vf_coef: the same
    :param policy_kwargs: SB3's, where ``features_extractor_class``, ``activation_fn`` and ``optimizer_class`` may be
        registered names too; plus ``action_dist``, ``action_dist_kwargs``, ``memory`` and ``memory_kwargs``
        (:class:`ActorCriticPlusPolicy`)
    :param critic_learning_rate: learning rate of the parameters that only the critic uses; None: as the actor's
    :param pessimistic_value_clip: with ``clip_range_vf``, take the larger of the clipped and the unclipped error;
        False: SB3's form, which is also what a model saved by SB3 keeps
    :param action_masking: mask invalid actions: None: where the action space is Discrete, MultiDiscrete or MultiBinary
        and every environment has a method ``action_masks()`` or the observations a key ``action_mask``; True: an error
        where they have not; False: never
    :param amp: autocast of the update's forward pass: True or "bf16", or "fp16" on CUDA
    :param compile: the fast path: True, or a dict of torch.compile's options. Same semantics, float32 rounding apart.
        With a memory it is the gradient step of "gtrxl" that is compiled; the rest runs eagerly
    :param on_non_finite: where a loss or its gradient is NaN or infinite, no step is taken; "raise": an error then says
        which term it is; "skip": training goes on, and ``train/skipped_steps`` counts
    :param max_skipped: with "skip", an error at more than so many in a row
    :raises ValueError: for a value that is not allowed, before the first environment step
    :raises TypeError: for an argument of the wrong type, or one that a custom policy class lacks
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "CnnLstmPolicy": CnnLstmPolicy,
        "MlpLstmPolicy": MlpLstmPolicy,
        "MultiInputPolicy": MultiInputPolicy,
        "MultiInputLstmPolicy": MultiInputLstmPolicy,
    }

    TRAINING_STATE: ClassVar[tuple[str, ...]] = (
        "_current_progress_remaining",
        "_episode_num",
        "_last_episode_starts",
        "_last_obs",
        "_last_original_obs",
        "_last_states",
        "_log_interval",
        "_n_iterations",
        "_n_updates",
        "_num_timesteps_at_start",
        "_skipped_in_a_row",
        "_skipped_steps",
        "_tb_log_name",
        "_total_timesteps",
        "ep_info_buffer",
        "ep_success_buffer",
        "num_timesteps",
    )
    """Attributes of plain values that a checkpoint holds; a subclass adds what changes during training."""

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
    ) -> None:
        check_types(locals())
        self.critic_learning_rate = critic_learning_rate
        self.pessimistic_value_clip = pessimistic_value_clip
        self.action_masking = action_masking
        self.amp = amp
        self.compile = compile
        self.on_non_finite = on_non_finite
        self.max_skipped = max_skipped
        self._skipped_steps = self._skipped_in_a_row = 0
        self.last_checkpoint: str | None = None
        """Directory of the checkpoint that was last written or resumed."""
        self._callback: BaseCallback | None = None
        self._continuation: dict[str, Any] | None = None
        self._log_interval: int | None = 1
        self._n_iterations = 0
        self._tb_log_name = "PPOPlus"
        self._last_states: RNNStates | None = None
        self._update_end_said_stop = False
        self._restart_counter: RestartCounter | None = None
        self._env_with_masks: tuple[VecEnv | None, bool] = (None, False)
        self._built_for_masks: bool | None = None
        self._was_given_masks = False
        self._warned_of_no_masks = False
        try:
            super().__init__(
                policy,
                env,
                learning_rate=learning_rate,  # type: ignore[arg-type]  # strings are resolved before SB3 reads them
                n_steps=n_steps,
                batch_size=batch_size,
                n_epochs=n_epochs,
                gamma=gamma,
                gae_lambda=gae_lambda,
                clip_range=clip_range,  # type: ignore[arg-type]  # the same
                clip_range_vf=clip_range_vf,  # type: ignore[arg-type]  # the same
                normalize_advantage=normalize_advantage,
                ent_coef=ent_coef,  # type: ignore[arg-type]  # SB3 only stores it
                vf_coef=vf_coef,  # type: ignore[arg-type]  # SB3 only stores it
                max_grad_norm=max_grad_norm,
                use_sde=use_sde,
                sde_sample_freq=sde_sample_freq,
                rollout_buffer_class=rollout_buffer_class,
                rollout_buffer_kwargs=rollout_buffer_kwargs,
                target_kl=target_kl,
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                policy_kwargs=policy_kwargs,
                verbose=verbose,
                seed=seed,
                device=device,
                _init_setup_model=_init_setup_model,
            )
        except AssertionError:
            # SB3's assertion about infinite bounds knows no remedy, ours does
            given = policy_kwargs or {}
            if "action_dist" in given and isinstance(getattr(self, "action_space", None), spaces.Box):
                make_action_distribution(self.action_space, given["action_dist"], given.get("action_dist_kwargs"))
            raise

    def _setup_model(self) -> None:
        if issubclass(self.policy_class, MaskableActorCriticPolicy):
            self._built_for_masks, self._was_given_masks = True, self.num_timesteps > 0
        self.policy_class = PLUS_POLICY_OF.get(self.policy_class, self.policy_class)
        if self.rollout_buffer_class in REPLACED_BUFFERS:
            is_dict = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = PPOPlusDictRolloutBuffer if is_dict else PPOPlusRolloutBuffer
        self._check_arguments()
        self._setup_coefficients()
        given = self.policy_kwargs
        self.policy_kwargs = resolve_policy_kwargs(self.policy_class, given)
        uses_masks = self.action_masking is True if self.env is None else self._uses_masks_of(self.env)
        if self._built_for_masks is None:
            self._built_for_masks = uses_masks and issubclass(self.policy_class, ActorCriticPlusPolicy)
        if self._built_for_masks:
            self.policy_kwargs["action_masking"] = True
        try:
            super()._setup_model()
        except KeyError as error:
            if not isinstance(self.observation_space, spaces.Dict):
                raise
            # SB3's extractors are kept by these keys in a ModuleDict, which takes no dots for one
            raise ValueError(f"a key of the Dict observations is not allowed: {error}") from error
        finally:
            # Kept as given: names, not classes, are saved and compared by load
            self.policy_kwargs = given
        self._learning_rate_groups = LearningRateGroups(self.policy.optimizer, self.lr_schedule(1))
        self._separate_critic()
        self._grad_scaler = th.amp.GradScaler(
            self.device.type, enabled=resolve_amp(self.amp, self.device) is th.float16
        )
        self._reporter = CompilationReporter(self.verbose)
        self._gradient_step = self._make_gradient_step()
        self._compiled_actor: CompiledActor | None = None
        self._recorded_actor: RecordedActor | None = None
        self._setup_memory()
        if isinstance(self.rollout_buffer, PPOPlusRolloutBuffer):
            self.rollout_buffer.advantages_by_scan = self.compile is not False
        if self.env is not None and any(isinstance(module, TransformerExtractor) for module in self.policy.modules()):
            warn_if_stacked_inside_normalize(self.env)

    def _setup_memory(self) -> None:
        options = getattr(self.policy, "memory_options", None)
        if options is None:
            return
        if not isinstance(self.rollout_buffer, PPOPlusRolloutBuffer):
            raise ValueError(
                f"memory={options.kind!r} needs a rollout_buffer_class that is None or a subclass of "
                f"PPOPlusRolloutBuffer, got {self.rollout_buffer_class}"
            )
        self.rollout_buffer.sequence_length = resolve_sequence_length(
            options.sequence_length, self.n_steps, self.batch_size
        )

    def _uses_masks_of(self, env: VecEnv) -> bool:
        if self._env_with_masks[0] is not env:
            # Asked once: an environment without masks takes its time to say so
            is_used = decide_masking(self.action_masking, env, self.action_space, self._obstacle_to_masks())
            self._env_with_masks = (env, is_used)
        return self._env_with_masks[1]

    def _obstacle_to_masks(self) -> Exception | None:
        if not takes_masks(self.policy_class):
            return TypeError(f"{self.policy_class.__name__}'s forward and evaluate_actions lack action_masks")
        buffer_class = self.rollout_buffer_class
        if buffer_class is None or not issubclass(buffer_class, PPOPlusRolloutBuffer):
            return TypeError(f"{buffer_class} stores none; subclass PPOPlusRolloutBuffer instead")
        if isinstance(self.action_space, spaces.MultiBinary) and self._built_for_masks is False:
            return ValueError("a model with MultiBinary actions that was built without masks has no logits for them")
        return None

    @property
    def _compiles_gradient_step(self) -> bool:
        # An LSTM or GRU cuts sequences at episode starts, elsewhere in each minibatch: no graph of fixed shapes
        options = getattr(self.policy, "memory_options", None)
        return self.compile is not False and (options is None or options.kind == "gtrxl")

    def _make_gradient_step(self) -> GradientStep:
        if not self._compiles_gradient_step:
            return RecordedGradientStep(self.policy, self._grad_scaler)
        return CompiledGradientStep(self.policy, self._grad_scaler, inductor_options(self.compile), self._reporter)

    def _check_arguments(self) -> None:
        if not (self.action_masking is None or isinstance(self.action_masking, bool)):
            raise ValueError(f"action_masking must be None, True or False, got {self.action_masking!r}")
        if self.on_non_finite not in ON_NON_FINITE:
            raise ValueError(f"on_non_finite must be one of {ON_NON_FINITE}, got {self.on_non_finite!r}")
        resolve_amp(self.amp, self.device)
        inductor_options(self.compile)
        check_ranges(self)
        buffer_class = self.rollout_buffer_class
        if self.amp and not (buffer_class is not None and issubclass(buffer_class, PPOPlusRolloutBuffer)):
            raise ValueError(
                f"amp={self.amp!r} needs a rollout_buffer_class that is None or a subclass of PPOPlusRolloutBuffer, "
                f"got {buffer_class}"
            )

    def _maybe_recommend_cpu(self, mlp_class_name: str = MlpPolicy.__name__) -> None:
        super()._maybe_recommend_cpu(mlp_class_name)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Collect ``n_rollout_steps`` steps of each env, as SB3's ``OnPolicyAlgorithm.collect_rollouts`` does.

        :param env: the training environment
        :param callback: called at each step, and at the beginning and end of the rollout
        :param rollout_buffer: buffer to fill, with advantages and returns
        :param n_rollout_steps: steps per env
        :return: False where a callback ended training
        """
        assert self._last_obs is not None, "No previous observation was provided"
        if self._update_end_said_stop:
            return False
        started = time.perf_counter()
        self.policy.set_training_mode(False)
        n_steps = 0
        rollout_buffer.reset()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        callback.on_rollout_start()
        actor = self._actor_for(env, rollout_buffer)
        mask_source = self._mask_source(env)
        action_masks: np.ndarray | None = None
        context: dict[str, th.Tensor] = {}
        check_output = EnvOutputCheck(env)
        check_output(self._last_obs, None, n_steps)
        while n_steps < n_rollout_steps:
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)
            obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]  # not None in a rollout
            if mask_source is not None:
                action_masks = mask_source.ask(self._last_obs, n_steps)
                context = mask_source.context(action_masks)
            chosen, values, log_probs = actor.act(obs_tensor, self._last_episode_starts, context)
            actions = chosen.cpu().numpy()
            clipped_actions = self._to_env_units(actions)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            check_output(new_obs, rewards, n_steps)
            self.num_timesteps += env.num_envs
            # Callbacks read SB3's and sb3-contrib's names of these variables
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            self._bootstrap_timeouts(actor, rewards, dones, infos, n_steps, check_output)
            last = (self._last_obs, actions, rewards, self._last_episode_starts, values, log_probs)
            rollout_buffer.add(*last, *((context,) if context else ()))  # type: ignore[arg-type]  # SB3 declares neither Dict observations nor None
            n_steps += 1
            self._last_obs = new_obs  # type: ignore[assignment]  # SB3's VecEnvObs includes tuples, which it refuses
            self._last_episode_starts = dones
            self._last_states = actor.states
        actor.finish(rollout_buffer, self.gamma)
        obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]  # as above
        values = actor.last_values(obs_tensor, dones)
        rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)
        self.logger.record("time/rollout_seconds", time.perf_counter() - started)
        self._log_restarts(env)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _bootstrap_timeouts(
        self,
        actor: RolloutActor,
        rewards: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
        step: int,
        check_output: EnvOutputCheck,
    ) -> None:
        """Add the value of what would have followed to the reward before a truncation."""
        for index in dones.nonzero()[0].tolist():
            terminal_obs = infos[index].get("terminal_observation")
            if terminal_obs is None or not infos[index].get("TimeLimit.truncated", False):
                continue
            check_output.terminal(terminal_obs, index, step)
            terminal_value = actor.terminal_value(terminal_obs, index, step)
            if terminal_value is not None:
                rewards[index] += self.gamma * terminal_value

    def _log_restarts(self, env: VecEnv) -> None:
        if self._restart_counter is None or self._restart_counter.env is not env:
            self._restart_counter = RestartCounter(env)
        n_restarts = self._restart_counter.count()
        if n_restarts is not None:
            self.logger.record("rollout/env_restarts", n_restarts)

    def _actor_for(self, env: VecEnv, rollout_buffer: RolloutBuffer) -> RolloutActor:
        if getattr(self.policy, "memory_options", None) is not None:
            assert isinstance(self.policy, ActorCriticPlusPolicy) and isinstance(rollout_buffer, PPOPlusRolloutBuffer)
            return RolloutMemory(self.policy, rollout_buffer, self._last_states, env.num_envs)
        actor = None if self.compile is False else self._find_compiled_actor(rollout_buffer)
        if actor is not None:
            actor.begin_rollout(rollout_buffer)
            return actor
        if self._recorded_actor is None or self._recorded_actor.policy is not self.policy:
            self._recorded_actor = RecordedActor(self.policy)
        self._recorded_actor.begin_rollout()
        return self._recorded_actor

    def _find_compiled_actor(self, rollout_buffer: RolloutBuffer) -> CompiledActor | None:
        if not isinstance(rollout_buffer, PPOPlusRolloutBuffer) or not can_act_alone(self.policy):
            own = type(self.policy if isinstance(rollout_buffer, PPOPlusRolloutBuffer) else rollout_buffer)
            self._reporter.failed("acting", f"{own.__name__} has methods of its own, which need all at each step")
            return None
        reason = hindrance(self.policy)
        if reason is not None:
            self._reporter.failed("acting", reason)
            return None
        if self._compiled_actor is None or self._compiled_actor.policy is not self.policy:
            self._compiled_actor = CompiledActor(self.policy, inductor_options(self.compile), self._reporter)
        return None if self._compiled_actor.has_given_up else self._compiled_actor

    def _mask_source(self, env: VecEnv) -> ActionMaskSource | None:
        if not self._uses_masks_of(env):
            return None
        self._was_given_masks = True
        return ActionMaskSource(env, self.action_space, self.policy)

    def _to_env_units(self, actions: np.ndarray) -> np.ndarray:
        if not isinstance(self.action_space, spaces.Box):
            return actions
        if self.policy.squash_output:
            actions = self.policy.unscale_action(actions)
        # np.clip, without its overhead; after unscale_action too, which may round beyond a bound
        bounded: np.ndarray = np.minimum(np.maximum(actions, self.action_space.low), self.action_space.high)
        return bounded

    def train(self) -> None:
        """Update the policy from the rollout buffer: ``n_epochs`` passes of minibatch steps on the PPO objective."""
        started = time.perf_counter()
        self._update_learning_rate(self.policy.optimizer)
        objective = Objective(
            self._current_coefficients(),
            normalize_advantage=self.normalize_advantage,
            pessimistic_value_clip=self.pessimistic_value_clip,
            max_grad_norm=self.max_grad_norm,
            kl_limit=None if self.target_kl is None else 1.5 * self.target_kl,
            amp_dtype=resolve_amp(self.amp, self.device),
        )
        is_sensitive = isinstance(getattr(self.policy, "action_dist", None), SquashedGaussianDistribution)
        if (objective.amp_dtype is not None or is_sensitive) and isinstance(self.rollout_buffer, PPOPlusRolloutBuffer):
            self.policy.set_training_mode(False)
            recompute_log_prob(self.policy, objective, self.rollout_buffer, self.batch_size)
        self.policy.set_training_mode(True)
        history = self._run_epochs(objective)
        self._check_steps(history)
        self._log_update(objective.coefficients, history)
        self.logger.record("time/update_seconds", time.perf_counter() - started)
        if self.compile is not False:
            self.logger.record("time/compile_seconds", self._reporter.seconds)
        self._n_iterations += 1
        if self._callback is not None:
            self._update_end_said_stop = not notify_update_end(self._callback)

    def _run_epochs(self, objective: Objective) -> UpdateHistory:
        is_compiled = isinstance(self._gradient_step, CompiledGradientStep)
        if self._gradient_step.policy is not self.policy or is_compiled != self._compiles_gradient_step:
            self._gradient_step = self._make_gradient_step()
        self._gradient_step.begin_update()
        try:
            with without_argument_validation():
                return self._take_steps(objective)
        finally:
            self._gradient_step.end_update()

    def _take_steps(self, objective: Objective) -> UpdateHistory:
        history = UpdateHistory()
        for epoch in range(self.n_epochs):
            history.begin_epoch()
            self._n_updates += 1
            for minibatch in minibatches(self.rollout_buffer, self.batch_size):
                metrics, was_allowed = self._gradient_step(objective, minibatch)
                history.metrics.append(metrics)
                if not was_allowed:
                    history.was_stopped = True
                    if self.verbose >= 1:
                        approx_kl = metrics[METRICS.index("approx_kl")]
                        print(f"Early stopping at step {epoch} due to reaching max kl: {approx_kl:.2f}")
                    return history
            history.n_epochs_done += 1
        return history

    def _check_steps(self, history: UpdateHistory) -> None:
        after = f"update {self._n_iterations + 1}, {self.num_timesteps} timesteps; no step was taken on it"
        if self.last_checkpoint is not None:
            after += f"; the last checkpoint is {self.last_checkpoint}"
        is_fine, skipped = check_steps(
            history.table[: len(history.table) - history.was_stopped],
            Skipped(self._skipped_steps, self._skipped_in_a_row),
            None if self.on_non_finite == "raise" else self.max_skipped,
            checks_gradient=not self._grad_scaler.is_enabled(),
            n_minibatches=-(-self.n_steps * self.n_envs // self.batch_size),
            after=after,
        )
        self._skipped_steps, self._skipped_in_a_row = skipped
        if not is_fine.all():
            history.is_fine = th.cat([is_fine, th.ones(int(history.was_stopped), dtype=th.bool)])
        if self.on_non_finite == "skip":
            self.logger.record("train/skipped_steps", self._skipped_steps)

    def _log_update(self, coefficients: LossCoefficients, history: UpdateHistory) -> None:
        for name, value in history.logged().items():
            self.logger.record(f"train/{name}", value)
        values, returns = self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten()
        self.logger.record("train/explained_variance", explained_variance(values, returns))
        log_std = getattr(self.policy, "log_std", None)
        if log_std is not None:
            self.logger.record("train/std", th.exp(log_std).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, value in coefficients._asdict().items():
            if value is not None:
                self.logger.record(f"train/{name}", value)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPOPlus",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train for ``total_timesteps`` environment steps; SB3's ``learn``.

        Callbacks that have a method ``on_update_end() -> bool`` are called after each update; False stops training.
        With action masks, every ``EvalCallback`` whose environment offers masks evaluates ``self.masked(eval_env)``.

        :raises NonFiniteError: where an observation, reward, loss or gradient is NaN or infinite, see ``on_non_finite``
        :raises DeadWorkerError: if a worker of a SubprocVecEnv has died
        """
        self._continuation = None
        self._log_interval, self._n_iterations, self._tb_log_name = log_interval, 0, tb_log_name
        return self._learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    @classmethod
    def resume(
        cls, save_path: str | pathlib.Path, env: GymEnv, device: th.device | str = "auto", **load_arguments: Any
    ) -> Self:
        """Load the newest valid checkpoint of a run, for :meth:`continue_learning` to finish it.

        A checkpoint that is torn or was altered is skipped with a warning. Its ``model.zip`` is loaded as
        :meth:`load` does, by pickle: resume from directories that you trust.

        :param save_path: as given to :class:`TrainingCheckpoint`; or the directory of one checkpoint
        :param env: as many environments as before, wrapped in the same way. What they or their wrappers cannot say
            with ``get_resume_state()`` begins anew, after a warning
        :param device: device on which to load
        :param load_arguments: further arguments of :meth:`load`
        :raises CheckpointError: where there is no valid checkpoint
        :raises WrapperStackError: a ValueError, for other wrappers or another number of environments, naming both
        """
        return load_checkpoint(cls, save_path, env, device, **load_arguments)

    def continue_learning(self, callback: MaybeCallback = None, progress_bar: bool = False) -> Self:
        """Finish the ``learn`` that was interrupted, with its total, schedules, logs and parameters, bit for bit.

        :param callback: the same callbacks as before; those that were made anew go on from the checkpoint's state
        :param progress_bar: display a progress bar
        :raises ValueError: for a model that has never learned
        """
        if self._total_timesteps == 0:
            raise ValueError("there is no learn to continue: call learn, or resume from a checkpoint")
        given = callback if isinstance(callback, list) else [] if callback is None else [callback]
        callbacks = [one if isinstance(one, BaseCallback) else ConvertCallback(one) for one in given]
        return self._learn(
            self._total_timesteps - self.num_timesteps,
            [*callbacks, Continuation(self)],
            # dump_logs knows better which iterations are meant
            None if self._log_interval is None else 1,
            self._tb_log_name,
            False,
            progress_bar,
        )

    def _learn(self, *arguments: Any) -> Self:
        self._update_end_said_stop = False
        try:
            return super().learn(*arguments)
        except BROKEN_PIPES as error:
            dead = dead_worker_error(self.env, self._callback)
            if dead is None:
                raise
            raise dead from error
        finally:
            if self._callback is not None:
                notify_learn_end(self._callback)
                evaluate_without_masks(self._callback, self)
            self._callback = None

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log; SB3's ``dump_logs``, with iterations counted from the beginning of a run that was resumed."""
        if iteration > 0:
            iteration = self._n_iterations + 1
            if self._log_interval is None or iteration % self._log_interval != 0:
                return
        super().dump_logs(iteration)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        self._callback = super()._init_callback(callback, progress_bar)
        if self.env is not None and self._uses_masks_of(self.env):
            evaluate_with_masks(self._callback, self)
        return self._callback

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Choose actions; SB3's ``predict``.

        :param action_masks: True where an action is valid, shape (n_envs, mask size) or (mask size,); None: all are
        :raises ValueError: for masks of a wrong size, or where no action is valid
        :raises TypeError: for masks that the policy class does not take
        """
        if action_masks is not None:
            if "action_masks" not in inspect.signature(self.policy.predict).parameters:
                raise TypeError(f"{type(self.policy).__name__}.predict has no action_masks")
            return self.policy.predict(observation, state, episode_start, deterministic, action_masks)  # type: ignore[call-arg]  # as just seen
        if self.needs_masks and not self._warned_of_no_masks:
            self._warned_of_no_masks = True
            warnings.warn(
                "This model was trained with action masks and now predicts without: give predict(action_masks=...), or "
                "use model.masked(env), which asks env for them",
                stacklevel=2,
            )
        return super().predict(observation, state, episode_start, deterministic)

    @property
    def needs_masks(self) -> bool:
        """Whether the model was trained with masks that it does not find among the observations."""
        return self._was_given_masks and not getattr(self.policy, "has_mask_key", False)

    def masked(self, env: GymEnv) -> MaskedPredictor:
        """Return this model with a ``predict`` that asks ``env`` for masks, for SB3's ``evaluate_policy`` and the like.

        :param env: the environment that is acted in: a VecEnv, or a single environment
        :raises ValueError: if it has neither a method ``action_masks()`` nor masks among its observations
        """
        return MaskedPredictor(self, env)
