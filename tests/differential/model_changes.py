"""Changes of the model's settings, its environment, its rollout, and of what PyTorch holds for all."""

import tempfile
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import FloatSchedule, set_random_seed
from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize
from torch.distributions import Distribution

from differential.changes import (
    ANYTIME,
    BETWEEN,
    END,
    NOT_AMID,
    START,
    STEP,
    Interruption,
    change,
    has_batch_norm,
    sampled_observation,
)

SETTINGS = (
    ("max_grad_norm", 0.01),
    ("ent_coef", 0.1),
    ("vf_coef", 0.2),
    ("batch_size", 6),
    ("n_epochs", 1),
    ("target_kl", 0.002),
    ("target_kl", None),
    ("gamma", 0.8),
    ("gae_lambda", 0.7),
    ("sde_sample_freq", 2),
    ("clip_range", FloatSchedule(0.05)),
    ("clip_range_vf", FloatSchedule(0.1)),
    ("clip_range_vf", None),
    ("lr_schedule", FloatSchedule(5e-4)),
    ("verbose", 0),
    ("normalize_advantage", True),
)


@change(*ANYTIME)
def set_a_setting(run, number):
    name, value = SETTINGS[number % len(SETTINGS)]
    setattr(run.model, name, value)


@change(*ANYTIME)
def set_a_setting_of_the_buffer(run, number):
    setattr(run.model.rollout_buffer, ("gamma", "gae_lambda")[number % 2], 0.6)


@change(BETWEEN)
def save_and_load(run, number):
    if type(run.model.policy.optimizer) is not run.model.policy.optimizer_class:
        # SB3 loads the state of an optimiser into one of the class that the policy was built with
        return
    settings = ({}, {"ent_coef": 0.02}, {"n_epochs": 1}, {"clip_range": 0.1})[number % 4]
    with tempfile.TemporaryDirectory() as folder:
        run.model.save(Path(folder) / "model.zip")
        run.model = type(run.model).load(Path(folder) / "model.zip", env=run.model.env, device="cpu", **settings)


@change(BETWEEN)
def set_parameters_from_a_file(run, number):
    with tempfile.TemporaryDirectory() as folder:
        run.model.save(Path(folder) / "model.zip")
        run.model.set_parameters(str(Path(folder) / "model.zip"))


@change(BETWEEN)
def set_another_env(run, number):
    env = run.make_env(number)
    forces_reset = bool(number % 2)
    if not forces_reset:
        env.reset()
    run.model.set_env(env, force_reset=forces_reset)


@change(STEP)
def stop_learning(run, number):
    # Progress would no longer end at 0: SB3's schedules then go below it, which PPOPlus's do not
    run.stops = not run.has_schedules


@change(STEP, END)
def interrupt_learning(run, number):
    if not run.has_schedules:
        raise Interruption


@change(*ANYTIME)
def seed(run, number):
    (set_random_seed, run.model.set_random_seed)[number % 2](number)


@change(*ANYTIME)
def draw_random_numbers(run, number):
    th.rand(number + 1)
    np.random.rand(number + 1)


@change(*ANYTIME)
def predict(run, number):
    observation = sampled_observation(run.model, number)
    run.record("predicted", run.model.predict(observation, deterministic=bool(number % 2))[0])


@change(STEP, START, END)
def evaluate(run, number):
    run.record("evaluated", np.array(evaluate_policy(run.model, run.make_env(number), 1, warn=False)))


@change(STEP, compiled=())
def read_the_distribution(run, number):
    distribution = run.model.policy.action_dist
    for name in ("mode", "entropy"):
        value = getattr(distribution, name)()
        if value is not None:
            run.record(name, value)


@change(STEP)
def change_rewards(run, number):
    run.locals["rewards"] += 0.5


# Compiled training computes the log-probabilities of the actions that it finds in the buffer
@change(STEP, compiled=())
def change_actions(run, number):
    run.locals["actions"][...] = run.locals["actions"][::-1].copy()


@change(STEP, compiled=())
def change_values_and_log_probs(run, number):
    run.locals[("values", "log_probs")[number % 2]].add_(0.1)


@change(STEP)
def change_infos(run, number):
    for info in run.locals["infos"]:
        info["TimeLimit.truncated"] = bool(number % 2)


@change(STEP)
def change_dones(run, number):
    run.locals["dones"][:] = bool(number % 2)


@change(STEP)
def change_observations(run, number):
    observations = run.locals["new_obs"]
    for array in observations.values() if isinstance(observations, dict) else [observations]:
        array[:] = array[::-1].copy()


@change(END)
def change_the_buffer(run, number):
    name = ("advantages", "returns", "log_probs", "values", "rewards")[number % 5]
    array = getattr(run.model.rollout_buffer, name)
    array *= 0.9


@change(END)
def replace_arrays_of_the_buffer(run, number):
    buffer = run.model.rollout_buffer
    buffer.advantages = (buffer.advantages * 2).astype((np.float32, np.float64)[number % 2])


@change(BETWEEN)
def make_a_buffer(run, number):
    old = run.model.rollout_buffer
    run.model.rollout_buffer = type(old)(
        old.buffer_size, old.observation_space, old.action_space, "cpu", n_envs=old.n_envs, gamma=0.9, gae_lambda=0.8
    )


@change(STEP, START, END)
def reset_the_noise(run, number):
    if run.model.use_sde:
        run.model.policy.reset_noise(run.model.n_envs)


@change(*ANYTIME)
def set_attributes_of_the_envs(run, number):
    run.model.env.set_attr("max_steps", 2 + number)


@change(*ANYTIME)
def stop_normalising(run, number):
    wrapper = unwrap_vec_normalize(run.model.env)
    if isinstance(wrapper, VecNormalize):
        setattr(wrapper, ("training", "norm_obs", "norm_reward")[number % 3], False)


@change(*ANYTIME)
def set_the_policys_training_mode(run, number):
    run.model.policy.set_training_mode(number % 2 == 0 and not has_batch_norm(run.model.policy))


# What PyTorch holds for all


@change(*ANYTIME)
def use_deterministic_algorithms(run, number):
    run.undo(lambda: th.use_deterministic_algorithms(False))
    th.use_deterministic_algorithms(True, warn_only=True)


@change(*ANYTIME)
def detect_anomalies(run, number):
    run.undo(lambda: th.autograd.set_detect_anomaly(False))
    th.autograd.set_detect_anomaly(True)


@change(*ANYTIME, compiled=NOT_AMID)
def set_default_dtype(run, number):
    run.undo(lambda: th.set_default_dtype(th.float32))
    th.set_default_dtype(th.float64)


@change(*ANYTIME)
def check_arguments_of_distributions(run, number):
    run.undo(lambda: Distribution.set_default_validate_args(True))
    Distribution.set_default_validate_args(bool(number % 2))


@change(*ANYTIME)
def set_default_device(run, number):
    # This puts a mode around all functions of PyTorch
    run.undo(lambda: th.set_default_device(None))
    th.set_default_device("cpu")


@change(*ANYTIME)
def set_precision_of_products(run, number):
    run.undo(lambda: th.set_float32_matmul_precision("highest"))
    th.set_float32_matmul_precision(("high", "medium")[number % 2])


@change(*ANYTIME)
def set_number_of_threads(run, number):
    run.undo(lambda: th.set_num_threads(1))
    th.set_num_threads(2)


@change(*ANYTIME)
def do_without_mkldnn(run, number):
    run.undo(lambda: th.backends.mkldnn.set_flags(True))
    th.backends.mkldnn.set_flags(False)
