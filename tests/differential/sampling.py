"""Configurations drawn from one number each."""

import random
from typing import Any

from gymnasium import spaces

from differential import tables
from differential.changes import BETWEEN, CHANGES, END, START, STEP
from differential.training import SETTINGS, Configuration

# Images make convolutions, which take ten times as long as all else
RARE_OBSERVATIONS = ("image", "channel first", "dict with image")
MLP_BOXES = ("box", "float64", "int64", "uint8", "one number", "matrix", "unbounded")
# Changes that PPOPlus is known not to follow as yet, each with when it does not. Empty is as it should be
KNOWN_DEFECTS: dict[str, tuple[str, ...]] = {}


def sample(seed: int, compiled: bool = False) -> Configuration:
    """Draw a configuration: plain values by name, where what is left out has its default.

    :param seed: the same number gives the same configuration
    :param compiled: leave out what compiled training does not promise to follow, or not to rounding
    """
    return _Sampler(random.Random(seed), compiled).configuration(seed)


class _Sampler:
    def __init__(self, generator: random.Random, compiled: bool) -> None:
        self._random = generator
        self._compiled = compiled

    def configuration(self, seed: int) -> Configuration:
        self._configuration: Configuration = {"seed": seed}
        self._choose(0.7, "observations", [name for name in tables.OBSERVATIONS if name not in RARE_OBSERVATIONS])
        self._choose(0.06, "observations", RARE_OBSERVATIONS)
        self._choose(0.7, "actions", list(tables.ACTIONS))
        self.observations = self._configuration.get("observations", "box")
        self.actions = tables.ACTIONS[self._configuration.get("actions", "box")]
        self._choose(0.6, "n_envs", [2, 3])
        self._choose(0.3, "max_steps", [1, 2, 3, 1000])
        self._choose(0.3, "p_terminate", [0.0, 0.4])
        self._choose(0.8, "replay_after", [0, 1, 2, 5])
        if self.observations in ("image", "channel first"):
            self._choose(0.7, "cnn", [True])
        settings, policy_kwargs = self._settings(), self._policy_kwargs()
        if settings:
            self._configuration["settings"] = settings
        if policy_kwargs:
            self._configuration["policy_kwargs"] = policy_kwargs
        self._spare_batch_norm()
        self._wrappers()
        self._learns_and_changes()
        return self._configuration

    def _choose(self, probability: float, name: str, values: Any, into: Configuration | None = None) -> None:
        if self._random.random() < probability:
            (self._configuration if into is None else into)[name] = self._random.choice(values)

    def _settings(self) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        self._choose(0.5, "n_steps", [5, 9, 12, 16], chosen)
        n_transitions = chosen.get("n_steps", SETTINGS["n_steps"]) * self._configuration.get("n_envs", 1)
        self._choose(0.3, "normalize_advantage", [False], chosen)
        sizes = [4, 5, 6, 16, n_transitions, n_transitions - 1, 64]
        self._choose(0.7, "batch_size", sizes if len(chosen) < 2 else [*sizes, 1], chosen)
        if chosen.get("batch_size") == 1 and chosen.get("normalize_advantage") is not False:
            del chosen["batch_size"]
        self._choose(0.5, "n_epochs", [1, 3, 4], chosen)
        self._choose(0.3, "gamma", [0.0, 0.9, 1.0], chosen)
        self._choose(0.3, "gae_lambda", [0.0, 0.5, 1.0], chosen)
        rates = [1e-4, 3e-3] if self._compiled else [1e-4, 3e-3, 1e-2]
        self._choose(0.8, "learning_rate", [*rates, ["linear", 3e-3, 1e-4], ["falls", 2e-3]], chosen)
        self._choose(0.5, "clip_range", [0.05, 0.4, ["linear", 0.3, 0.1], ["falls", 0.2]], chosen)
        self._choose(0.3, "clip_range_vf", [0.02, 0.2, ["linear", 0.3, 0.1], ["falls", 0.1]], chosen)
        self._choose(0.5, "ent_coef", [0.01, 0.1], chosen)
        self._choose(0.3, "vf_coef", [0.0, 1.0], chosen)
        self._choose(0.4, "max_grad_norm", [0.01, 10.0], chosen)
        self._choose(0.3, "target_kl", [1e-4, 3e-3, 0.1], chosen)
        self._choose(0.1, "stats_window_size", [1, 3], chosen)
        self._choose(0.1, "seed", [None], chosen)
        is_dict = isinstance(tables.OBSERVATIONS[self.observations], spaces.Dict)
        self._choose(0.15, "rollout_buffer", ["SB3's", "own advantages", *(() if is_dict else ("own get",))], chosen)
        if isinstance(self.actions, spaces.Box) and len(self.actions.shape) == 1:
            self._choose(0.25, "use_sde", [True], chosen)
        if "use_sde" in chosen:
            self._choose(0.6, "sde_sample_freq", [1, 3], chosen)
        return chosen

    def _policy_kwargs(self) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        optimizers = tables.COMPARABLE_OPTIMIZERS if self._compiled else list(tables.OPTIMIZERS)
        self._choose(0.5, "optimizer", optimizers, chosen)
        if self._configuration.get("cnn"):
            chosen["features_extractor_kwargs"] = {"features_dim": 8}
        elif self.observations == "dict with image":
            chosen["features_extractor_kwargs"] = {"cnn_output_dim": 4}
        self._choose(0.2, "share_features_extractor", [False], chosen)
        if self.observations in MLP_BOXES and not self._configuration.get("settings", {}).get("use_sde"):
            self._choose(0.15, "extractor", list(tables.EXTRACTORS), chosen)
            self._choose(0.2, "policy", self._policies(), self._configuration)
        nets = [None, [], [6], [4, 4, 4], {"pi": [6], "vf": [8, 4]}, {"pi": [], "vf": [5]}, {"pi": [4]}]
        self._choose(0.5, "net_arch", nets, chosen)
        self._choose(0.4, "activation", list(tables.ACTIVATIONS), chosen)
        self._choose(0.2, "ortho_init", [False], chosen)
        self._choose(0.2, "log_std_init", [-1.0, 0.5], chosen)
        if self.observations in ("image", "channel first") and not self._configuration.get("cnn"):
            self._choose(0.3, "normalize_images", [False], chosen)
        return chosen | self._noise_kwargs()

    def _spare_batch_norm(self) -> None:
        """Batch norm refuses a minibatch of one."""
        kwargs, settings = self._configuration.get("policy_kwargs", {}), self._configuration.get("settings", {})
        n_transitions = settings.get("n_steps", SETTINGS["n_steps"]) * self._configuration.get("n_envs", 1)
        batch_size = settings.get("batch_size", SETTINGS["batch_size"])
        if kwargs.get("extractor") == "noisy" and (batch_size == 1 or n_transitions % batch_size == 1):
            del kwargs["extractor"]

    def _policies(self) -> list[str]:
        names = ["SB3's", "custom", "partly frozen", "two groups"]
        # Which has no parameters to optimise without hidden layers, and one that looks at the first number
        return [*names, "half optimized"] if self.observations == "matrix" else [*names, "sometimes used"]

    def _noise_kwargs(self) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        if "use_sde" in self._configuration.get("settings", {}):
            self._choose(0.3, "full_std", [False], chosen)
            self._choose(0.3, "use_expln", [True], chosen)
            # Rounding leads SB3 beyond other bounds
            if self._configuration.get("actions") == "unit box":
                self._choose(0.5, "squash_output", [True], chosen)
        return chosen

    def _wrappers(self) -> None:
        wrappers = []
        space = tables.OBSERVATIONS[self.observations]
        is_box = isinstance(space, spaces.Box)
        is_image = self.observations in RARE_OBSERVATIONS
        if is_box and not is_image and self._random.random() < 0.3:
            wrappers.append(self._random.choice([name for name in tables.WRAPPERS if name.startswith("normalize")]))
        elif self._random.random() < 0.15:
            wrappers.append("normalize rewards")
        if is_box and self._random.random() < 0.1:
            wrappers.insert(self._random.randint(0, len(wrappers)), "stack")
        for name in ("monitor", "check", "float64 rewards"):
            if self._random.random() < 0.05:
                wrappers.insert(self._random.randint(0, len(wrappers)), name)
        if wrappers:
            self._configuration["wrappers"] = wrappers

    def _learns_and_changes(self) -> None:
        learns = self._random.choice([[2], [3], [1, 2], [2, 1], [1, 1, 1], [4], [2, 2]])
        resets = [index == 0 or self._random.random() < 0.5 for index in range(len(learns))]
        n_steps = self._configuration.get("settings", {}).get("n_steps", SETTINGS["n_steps"])
        self._configuration["learns"] = [list(learn) for learn in zip(learns, resets, strict=True)]
        n_rollouts = sum(learns)
        changes = []
        for _ in range(self._random.choice([0, 1, 1, 2, 3, 4, 6])):
            name = self._random.choice(list(CHANGES))
            allowed = CHANGES[name].compiled_moments if self._compiled else CHANGES[name].moments
            moments = [one for one in allowed if one != BETWEEN or len(learns) > 1]
            moments = [one for one in moments if one not in KNOWN_DEFECTS.get(name, ())]
            if not moments:
                continue
            moment = self._random.choice(moments)
            at = {
                STEP: self._random.randint(1, n_rollouts * n_steps - 1),
                START: self._random.randrange(n_rollouts),
                END: self._random.randrange(n_rollouts),
                BETWEEN: self._random.randint(1, max(1, len(learns) - 1)),
            }[moment]
            changes.append([moment, at, name, self._random.randrange(16)])
        if changes:
            order = (START, STEP, END, BETWEEN)
            self._configuration["changes"] = sorted(changes, key=lambda one: (order.index(one[0]), one[1]))
