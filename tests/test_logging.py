"""What each update logs, and where SB3's loggers put it."""

import time

import pytest
from environments import ToyEnv, logs_of_updates, make_env, record_logs
from models import STEPS, build
from stable_baselines3.common.logger import configure

SB3_NAMES = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "time/fps",
    "time/iterations",
    "time/time_elapsed",
    "time/total_timesteps",
    "train/approx_kl",
    "train/clip_fraction",
    "train/clip_range",
    "train/entropy_loss",
    "train/explained_variance",
    "train/learning_rate",
    "train/loss",
    "train/n_updates",
    "train/policy_gradient_loss",
    "train/std",
    "train/value_loss",
}
OUR_NAMES = {
    "train/ent_coef",
    "train/vf_coef",
    "train/critic_learning_rate",
    "train/grad_norm",
    "train/value_clip_fraction",
    "train/early_stopped",
    "train/n_epochs_done",
    "time/rollout_seconds",
    "time/update_seconds",
}


def test_every_update_logs_sb3s_names_and_ours():
    model = build(make_env(2))
    recorder = record_logs(model)
    model.learn(4 * 2 * STEPS)
    assert len(recorder.dumps) == 4
    for dump in recorder.dumps[1:]:
        assert dump.keys() == SB3_NAMES | OUR_NAMES
    assert SB3_NAMES - set(recorder.dumps[0]) == {name for name in SB3_NAMES if name.startswith("train/")}


def test_value_clipping_logs_its_range():
    logs = logs_of_updates(build(clip_range_vf=0.1), 2 * STEPS)
    assert all(update["train/clip_range_vf"] == 0.1 for update in logs)


def test_logged_values_of_an_update():
    n_updates = 3
    logs = logs_of_updates(build(ent_coef=0.01, vf_coef=0.4, learning_rate=1e-3, n_epochs=4), n_updates * STEPS)
    for update in logs:
        assert update["train/ent_coef"] == 0.01
        assert update["train/vf_coef"] == 0.4
        assert update["train/learning_rate"] == update["train/critic_learning_rate"] == 1e-3
        assert update["train/grad_norm"] > 0.0
        assert update["train/value_clip_fraction"] == 0.0
        assert update["train/early_stopped"] == 0
        assert update["train/n_epochs_done"] == 4
    assert [update["train/n_updates"] for update in logs] == [4, 8, 12]


def test_value_clip_fraction_is_the_share_of_values_that_left_the_range():
    # Before the first step nothing has moved; after it, everything by more than next to nothing
    settings = {"clip_range_vf": 1e-6, "batch_size": STEPS, "learning_rate": 1e-2}
    (first,), (both,) = (logs_of_updates(build(**settings, n_epochs=n_epochs), STEPS) for n_epochs in (1, 2))
    assert first["train/value_clip_fraction"] == 0.0
    assert both["train/value_clip_fraction"] == 0.5


def test_durations_are_those_of_the_clock():
    class Slow(ToyEnv):
        def step(self, action):
            time.sleep(0.002)
            return super().step(action)

    model = build(Slow())
    recorder = record_logs(model)
    started = time.perf_counter()
    model.learn(3 * STEPS)
    total = time.perf_counter() - started
    assert len(recorder.dumps) == 3
    assert all(dump["time/rollout_seconds"] > 0.002 * STEPS for dump in recorder.dumps)
    assert all(dump["time/update_seconds"] > 0.0 for dump in recorder.dumps[1:])
    logged = [
        dump.get(name, 0.0) for dump in recorder.dumps for name in ("time/rollout_seconds", "time/update_seconds")
    ]
    assert sum(logged) < total


@pytest.mark.parametrize("file_format", ["csv", "json", "tensorboard"])
def test_sb3s_loggers_write_what_is_logged(file_format, tmp_path):
    model = build()
    model.set_logger(configure(str(tmp_path), [file_format]))
    model.learn(3 * STEPS)
    model.logger.close()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes().decode(errors="ignore")
    assert all(name in content for name in OUR_NAMES)


def test_tensorboard_runs_are_called_ppo_plus(tmp_path):
    build(tensorboard_log=str(tmp_path)).learn(STEPS)
    assert [path.name for path in tmp_path.iterdir()] == ["PPOPlus_1"]
