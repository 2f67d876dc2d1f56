"""The search for hyperparameters: what is sampled, studies that go on, trials that are pruned, a trial's training."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import optuna
import pytest
import yaml
from environments import ToyEnv
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from zoo_runs import zoo_in

from sb3_ppo_plus import PPOPlus, zoo
from sb3_ppo_plus.zoo.hyperparams import convert_ppo_plus_params
from sb3_ppo_plus.zoo.train import CheckpointedExperiment


@pytest.fixture(autouse=True)
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.register()
    monkeypatch.chdir(tmp_path)


def sample(env: gym.Env, n_trials: int) -> list[tuple[optuna.Trial, dict[str, Any]]]:
    n_actions = env.action_space.shape[0] if isinstance(env.action_space, gym.spaces.Box) else 0
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(n_trials)]
    return [(trial, HYPERPARAMS_SAMPLER["ppo_plus"](trial, n_actions, 1, {})) for trial in trials]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_every_sample_builds_a_model_whatever_the_entry_says_about_gsde(env_id):
    env = gym.make(env_id)
    entry = {"use_sde": True} if env_id == "Pendulum-v1" else {}
    for _, hyperparams in sample(env, 10):
        PPOPlus("MlpPolicy", env, device="cpu", **{**entry, **hyperparams})


def test_samples_cover_schedules_and_distributions_and_are_plain_values():
    samples = [hyperparams for _, hyperparams in sample(gym.make("Pendulum-v1"), 40)]
    assert {str(s["learning_rate"]).rpartition("_")[0] for s in samples} == {"", "lin", "cos", "warmup_cos"}
    assert {str(s["ent_coef"]).rpartition("_")[0] for s in samples} == {"", "lin"}
    assert {s["policy_kwargs"]["action_dist"] for s in samples} == {"gaussian", "squashed_gaussian", "beta"}
    assert {str(s["clip_range"]).rpartition("_")[0] for s in samples} == {"", "lin"}
    assert {"critic_learning_rate" in s for s in samples} == {True, False}
    clips = {(s["clip_range_vf"] == s["clip_range"], s["pessimistic_value_clip"]) for s in samples}
    assert clips == {(False, True), (True, True), (True, False)}
    assert yaml.safe_load(yaml.safe_dump(samples)) == samples


def test_discrete_actions_get_no_distribution_to_choose():
    for _, hyperparams in sample(gym.make("CartPole-v1"), 5):
        assert "action_dist" not in hyperparams["policy_kwargs"]


def test_the_converter_rebuilds_the_sample_from_the_trial():
    for trial, hyperparams in sample(gym.make("Pendulum-v1"), 10):
        assert HYPERPARAMS_CONVERTER["ppo_plus"](trial.params) == hyperparams


def test_the_converter_takes_a_trial_of_the_rl_zoos_ppo():
    trial = optuna.create_study().ask()
    expected = HYPERPARAMS_SAMPLER["ppo"](trial, 1, 1, {})
    converted = HYPERPARAMS_CONVERTER["ppo_plus"](trial.params)
    assert converted["policy_kwargs"].pop("activation_fn") == trial.params["activation_fn"]
    del expected["policy_kwargs"]["activation_fn"]
    assert converted == expected


def test_optimize_runs_and_train_takes_a_trial_from_the_study():
    storage = ["--storage", "study.log", "--study-name", "small"]
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend("study.log")), study_name="small", direction="maximize"
    )
    for action_dist in ("gaussian", "beta"):
        # Only the costly parameters are fixed; the sampler draws the others.
        study.enqueue_trial({"n_steps_pow": 5, "batch_size_pow": 5, "n_epochs": 1, "action_dist": action_dist})
    common = ["train", "--env", "Pendulum-v1", "-n", "128", "--device", "cpu", "--eval-freq", "-1", *storage]

    zoo.main([*common, "-optimize", "--n-trials", "2", "--n-evaluations", "1", "--no-optim-plots", "--verbose", "0"])
    trials = study.get_trials()
    assert [trial.state for trial in trials] == [optuna.trial.TrialState.COMPLETE] * 2

    zoo.main([*common, "--trial-id", "1"])
    (archive,) = Path("logs/ppo_plus").glob("Pendulum-v1_*/Pendulum-v1.zip")
    model = PPOPlus.load(archive)
    assert model.policy_kwargs["action_dist"] == "beta"
    assert model.gamma == 1 - trials[1].params["one_minus_gamma"]


PPO_PARAMS = {
    **{"batch_size_pow": 6, "n_steps_pow": 8, "one_minus_gamma": 0.01, "one_minus_gae_lambda": 0.05},
    **{"learning_rate": 0.001, "ent_coef": 0.01, "clip_range": 0.2, "n_epochs": 5, "max_grad_norm": 0.5},
    **{"net_arch": "small", "activation_fn": "tanh"},
}


def test_the_converter_names_schedules_and_the_critics_rate():
    extras = {"lr_schedule": "cos", "critic_lr_factor": 10, "clip_range_schedule": "lin", "value_clip": "sb3"}
    converted = convert_ppo_plus_params({**PPO_PARAMS, **extras})
    assert converted["learning_rate"] == "cos_0.001" and converted["critic_learning_rate"] == "cos_0.01"
    assert converted["clip_range"] == converted["clip_range_vf"] == "lin_0.2"
    assert converted["pessimistic_value_clip"] is False


def test_a_study_of_an_earlier_version_converts_as_it_did():
    converted = convert_ppo_plus_params({**PPO_PARAMS, "lr_schedule": "lin", "ent_coef_schedule": "constant"})
    assert converted["learning_rate"] == "lin_0.001" and converted["ent_coef"] == 0.01
    assert not {"critic_learning_rate", "clip_range_vf", "pessimistic_value_clip"} & converted.keys()


STUDY = ["--storage", "sqlite:///study.db", "--study-name", "small"]
SEARCH = ["-optimize", "--n-trials", "1", "--no-optim-plots", "--verbose", "0", "--eval-episodes", "1"]


# Only the costly parameters are fixed; the sampler draws the others
CHEAP = {"n_steps_pow": 5, "batch_size_pow": 5, "n_epochs": 1, "net_arch": "tiny"}


def test_a_study_in_sqlite_goes_on(tmp_path):
    study = optuna.create_study(storage="sqlite:///study.db", study_name="small", direction="maximize")
    for _ in range(2):
        study.enqueue_trial(CHEAP)
    arguments = ["train", "--env", "CartPole-v1", "-n", "64", "--device", "cpu", "--n-evaluations", "1", *STUDY]
    for n_trials in (1, 2):
        zoo_in(tmp_path, *arguments, *SEARCH)
        states = [trial.state for trial in study.get_trials()]
        assert states == [*[TrialState.COMPLETE] * n_trials, *[TrialState.WAITING] * (2 - n_trials)]
    reports = list(Path("logs/ppo_plus").glob("report_*.csv"))
    assert reports and "params_critic_lr_factor" in reports[0].read_text().splitlines()[0]


@pytest.mark.parametrize("storage", ["sqlite:///seeded.db", "seeded.log", None])
def test_a_study_that_goes_on_with_the_same_seed_draws_other_trials(storage):
    experiment = CheckpointedExperiment.__new__(CheckpointedExperiment)
    experiment.seed, experiment.storage, experiment.study_name = 5, storage, "seeded"
    drawn = []
    for _ in range(3):
        sampler = experiment._create_sampler("random")
        kept = JournalStorage(JournalFileBackend(storage)) if storage == "seeded.log" else storage
        study = optuna.create_study(storage=kept, study_name="seeded", load_if_exists=True, sampler=sampler)
        drawn.append(study.ask().suggest_float("x", 0.0, 1.0))
    first = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=5)).ask().suggest_float("x", 0.0, 1.0)
    assert drawn[0] == first and experiment.seed == 5
    assert len(set(drawn)) == (1 if storage is None else 3)


class WorseEachTime(ToyEnv):
    """Each environment gives lower rewards than the one before."""

    n_made = 0

    def __init__(self):
        super().__init__()
        WorseEachTime.n_made += 1
        self.reward = -WorseEachTime.n_made

    def step(self, action):
        observation, _, *others = super().step(action)
        return observation, float(self.reward), *others


def test_a_trial_below_the_median_is_pruned_and_another_one_is_trained(monkeypatch):
    monkeypatch.setitem(gym.registry, "Worse-v0", gym.envs.registration.EnvSpec("Worse-v0", WorseEachTime))
    study = optuna.create_study(storage="sqlite:///study.db", study_name="small", direction="maximize")
    for gamma in (0.001, 0.002):
        study.enqueue_trial({**CHEAP, "one_minus_gamma": gamma})
    common = ["train", "--env", "Worse-v0", "-n", "128", "--device", "cpu", "--eval-freq", "-1", *STUDY]
    flags = ["--pruner", "median", "--n-startup-trials", "1", "--n-evaluations", "4", "--n-trials", "2"]
    params = ["-params", "n_envs:1", "policy:MlpPolicy", "normalize:False"]
    zoo.main([*common, *SEARCH, *flags, *params])
    first, second = study.get_trials()
    assert (first.state, second.state) == (TrialState.COMPLETE, TrialState.PRUNED)
    assert len(second.intermediate_values) < len(first.intermediate_values)

    # The RL Zoo itself takes trial 0 for none
    for trial, gamma in enumerate((0.001, 0.002)):
        zoo.main([*common, "--trial-id", str(trial), *params])
        newest = f"logs/ppo_plus/Worse-v0_{len(list(Path('logs/ppo_plus').glob('Worse-v0_*')))}"
        assert PPOPlus.load(f"{newest}/Worse-v0.zip").gamma == 1 - gamma
