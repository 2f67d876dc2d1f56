"""SB3's logger with what PPOPlus adds to it: TensorBoard, CSV and the console, all at once."""

import argparse
import csv
from pathlib import Path

from stable_baselines3.common.logger import configure

from sb3_ppo_plus import PPOPlus

ADDED = (
    "train/ent_coef",
    "train/vf_coef",
    "train/critic_learning_rate",
    "train/grad_norm",
    "train/value_clip_fraction",
    "train/early_stopped",
    "train/n_epochs_done",
    "time/rollout_seconds",
    "time/update_seconds",
)


def main(timesteps: int = 20_000, folder: Path = Path("logs/logging")) -> dict[str, str]:
    """Train with a KL limit and return the CSV file's last row; `tensorboard --logdir logs/logging` shows them all."""
    model = PPOPlus(
        "MlpPolicy",
        "CartPole-v1",
        n_steps=512,
        ent_coef="lin_0.01",
        clip_range_vf=0.2,
        target_kl=0.02,
        seed=10,
        device="cpu",
    )
    model.set_logger(configure(str(folder), ["stdout", "csv", "tensorboard"]))
    model.learn(timesteps)

    with (folder / "progress.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    print(*(f"{name:28s} {last[name]}" for name in ADDED), sep="\n")
    return last


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=20_000)
    main(parser.parse_args().timesteps)
