"""Trains SB3's PPO and PPOPlus while something changes the model, and compares them."""

import models
import torch as th
from environments import make_env
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from states import assert_same_training
from torch.optim import SGD, Adam, AdamW, RMSprop

from sb3_ppo_plus import PPOPlus

SETTINGS = models.SETTINGS | {"n_steps": 16, "batch_size": 8}
ROLLOUTS = 5
OPTIMIZERS = {
    "Adam": (Adam, {}),
    "AdamW": (AdamW, {}),
    "SGD": (SGD, {}),
    "SGD with momentum": (SGD, {"momentum": 0.9, "dampening": 0.1}),
    "RMSprop": (RMSprop, {}),
}


def build(algorithm, optimizer="Adam", **settings):
    optimizer_class, optimizer_kwargs = OPTIMIZERS[optimizer]
    kwargs = {"net_arch": [8, 8], "optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs}
    rates = {"learning_rate": lambda progress: 0.02 * progress + 1e-3}
    return algorithm("MlpPolicy", make_env(), policy_kwargs=kwargs, **SETTINGS | rates | settings)


class Change(BaseCallback):
    """Changes the model before some rollouts.

    :param change: takes the model
    :param before: indices of the rollouts, from 0
    """

    def __init__(self, change, before):
        super().__init__()
        self.change, self.before, self.n_rollouts = change, before, 0

    def _on_rollout_start(self):
        if self.n_rollouts in self.before:
            self.change(self.model)
        self.n_rollouts += 1

    def _on_step(self):
        return True


def trained(algorithm, change, before=(1, 3), **settings):
    model = build(algorithm, **settings)
    return model.learn(ROLLOUTS * 16, Change(change, before))


def assert_has_an_effect(changed, **settings):
    unchanged = build(PPO, **settings).learn(ROLLOUTS * 16)
    pairs = zip(changed.policy.parameters(), unchanged.policy.parameters(), strict=True)
    assert any(not th.equal(*pair) for pair in pairs), "the change changed nothing: the case proves nothing"


def assert_changes_alike(change, *, has_an_effect=True, **settings):
    sb3, ours = (trained(algorithm, change, **settings) for algorithm in (PPO, PPOPlus))
    assert_same_training(sb3, ours)
    if has_an_effect:
        settings.pop("before", None)
        assert_has_an_effect(sb3, **settings)
    return sb3, ours
