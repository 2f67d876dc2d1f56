"""Plans of campaigns: YAML files that say which runs there are, and each run with its hyperparameters.

A plan is a mapping with one key, ``runs``: a list of mappings with these keys.

env           Gymnasium's id, or a list
column        ppo_plus: PPOPlus with compile=True and the entry of zoo_hyperparams/ppo_plus.yml
              sb3: SB3's PPO with the entry of the RL Zoo's own ppo.yml; where it has none for this version of the
              environment, that for the newest older version
              sb3_tuned: SB3's PPO with the entry of ppo_plus.yml; an error where SB3 lacks what the entry uses
              or a list of these
seeds         a list
steps         environment steps
variant       a name, where hyperparams or entry are given
entry         name of another entry of the column's file, or a whole entry
hyperparams   values that replace those of the entry
compile       true: the columns of SB3 are computed by PPOPlus with compile=True
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("ppo_plus", "sb3", "sb3_tuned")
ENGINES = ("auto", "sb3")
KEYS = ("env", "column", "seeds", "steps", "variant", "entry", "hyperparams", "compile")
Entry = dict[str, Any]
RunKey = tuple[str, str, str | None, int, int, str]


@dataclass(frozen=True)
class Job:
    """One run.

    :param env: Gymnasium's id
    :param column: one of :data:`COLUMNS`
    :param variant: name of what differs from the column's entry; None: nothing does
    :param entry: name of the entry in the column's file; "in the plan" where the plan has it whole
    :param engine: what computes it: "ppo_plus", or "sb3" for SB3's own PPO
    :param seed: seed of the model and of the first environment
    :param steps: environment steps asked for
    :param hyperparams: the entry with the plan's changes, in plain values
    """

    env: str
    column: str
    variant: str | None
    entry: str
    engine: str
    seed: int
    steps: int
    hyperparams: Entry

    @property
    def hyperparams_hash(self) -> str:
        """Short hash of the hyperparameters."""
        return hash_of(self.hyperparams)

    @property
    def key(self) -> RunKey:
        """What tells runs apart; a run with the same key is not needed again."""
        return self.env, self.column, self.variant, self.seed, self.steps, self.hyperparams_hash

    @property
    def name(self) -> str:
        """A name for people and for the folder of the run's files."""
        parts = (self.env, self.column, self.variant, self.engine, self.seed, self.steps, self.hyperparams_hash)
        return re.sub(r"[^\w.-]", "-", "_".join(str(part) for part in parts if part is not None))

    def to_json(self) -> str:
        """Describe it for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Read what :meth:`to_json` has written."""
        return cls(**json.loads(text))


def hash_of(hyperparams: Entry) -> str:
    """Short hash of hyperparameters, whatever their order.

    :param hyperparams: plain values
    """
    return hashlib.sha256(json.dumps(hyperparams, sort_keys=True).encode()).hexdigest()[:12]


def read_plan(path: Path, engine: str = "auto") -> list[Job]:
    """Read a plan's runs, in the order of work: the first seed of all, then the second seed of all, and so on.

    :param path: the YAML file
    :param engine: "sb3": SB3's own PPO computes its columns; "auto": PPOPlus does, where it gives the same bits
    :raises ValueError: for what a plan may not hold, naming the value and what is allowed
    """
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(plan, dict) or not isinstance(plan.get("runs"), list):
        raise ValueError(f"{path} must be a mapping with a list under `runs`")
    numbered = []
    for item in plan["runs"]:
        try:
            numbered += _jobs_of(item, engine)
        except ValueError as error:
            raise ValueError(f"{path}: {error}, in {json.dumps(item)[:200]}") from error
    # Stable: what has the same number stays in the plan's order
    jobs = [job for _, job in sorted(numbered, key=lambda pair: pair[0])]
    keys = [job.key for job in jobs]
    twice = sorted({job.name for job in jobs if keys.count(job.key) > 1})
    if twice:
        raise ValueError(f"{path} lists these runs twice: {', '.join(twice)}")
    return jobs


def _jobs_of(item: Any, engine: str) -> list[tuple[int, Job]]:  # noqa: ANN401  # whatever the YAML holds
    """Make the runs of one item of a plan, each with the number of its seed."""
    _check(item)
    variant, steps = item.get("variant"), int(item["steps"])
    jobs = []
    for env in _as_list(item["env"]):
        for column in _as_list(item["column"]):
            name, hyperparams = _hyperparams_of(env, column, item)
            by = choose_engine(column, hyperparams, steps, engine)
            for number, seed in enumerate(_as_list(item["seeds"])):
                jobs.append((number, Job(env, column, variant, name, by, seed, steps, hyperparams)))
    return jobs


def _check(item: Any) -> None:  # noqa: ANN401  # as above
    if not isinstance(item, dict):
        raise ValueError(f"a run must be a mapping, got {item!r}")
    unknown = sorted(item.keys() - set(KEYS))
    if unknown:
        raise ValueError(f"unknown keys {unknown}; allowed: {list(KEYS)}")
    missing = [key for key in ("env", "column", "seeds", "steps") if key not in item]
    if missing:
        raise ValueError(f"the keys {missing} are missing")
    columns = [column for column in _as_list(item["column"]) if column not in COLUMNS]
    if columns:
        raise ValueError(f"unknown column {columns[0]!r}; allowed: {list(COLUMNS)}")
    for key in ("seeds", "steps"):
        for value in _as_list(item[key]):
            if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
                raise ValueError(f"{key} must be whole numbers, got {value!r}")
    if item["steps"] == 0:
        raise ValueError("steps must be at least 1, got 0")
    is_changed = "entry" in item or "hyperparams" in item
    if is_changed != ("variant" in item):
        raise ValueError("variant must be given with entry or hyperparams, and only then")


def _hyperparams_of(env: str, column: str, item: dict[str, Any]) -> tuple[str, Entry]:
    """Find the entry that counts, and change it as the plan says.

    :return: name of the entry, and the hyperparameters of the run
    """
    given = item.get("entry", env)
    if isinstance(given, dict):
        name, entry = "in the plan", dict(given)
    elif column == "sb3":
        name, entry = _peers_entry(given)
    else:
        name, entry = given, _entry_of(given)
    hyperparams = {**entry, **item.get("hyperparams", {})}
    hyperparams.pop("n_timesteps", None)
    if column == "ppo_plus":
        return name, {"compile": True, **hyperparams}
    # Imported here: it needs PyTorch, and a campaign's own process is to stay small
    from sb3_arguments import what_sb3_lacks

    lacking = what_sb3_lacks(hyperparams)
    if lacking:
        raise ValueError(f"{env} cannot be in column {column}: SB3's PPO has no {'; no '.join(lacking)}")
    return name, hyperparams | ({"compile": True} if item.get("compile", False) else {})


def _entry_of(name: str) -> Entry:
    entries = _read_entries(ROOT / "zoo_hyperparams" / "ppo_plus.yml")
    if name not in entries:
        raise ValueError(f"ppo_plus.yml has no entry {name!r}; give `entry`, such as default")
    return entries[name]


def _peers_entry(name: str) -> tuple[str, Entry]:
    """Find an entry of the RL Zoo's ppo.yml: of the environment's own version, or of the newest older one."""
    entries = _read_entries(_rl_zoo_file())
    base, dash_v, version = name.rpartition("-v")
    candidates = [name]
    if dash_v and version.isdigit():
        candidates = [f"{base}-v{older}" for older in range(int(version), -1, -1)]
    for candidate in candidates:
        if candidate in entries:
            return candidate, entries[candidate]
    raise ValueError(f"the RL Zoo's ppo.yml has no entry {' or '.join(candidates)}; give `entry`, such as default")


def _rl_zoo_file() -> Path:
    spec = importlib.util.find_spec("rl_zoo3")
    if spec is None or spec.origin is None:
        raise ValueError('rl_zoo3 is not installed: run `pip install -e ".[zoo]"`')
    return Path(spec.origin).parent / "hyperparams" / "ppo.yml"


@cache
def _read_entries(path: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return entries


def choose_engine(column: str, hyperparams: Entry, steps: int, wanted: str = "auto") -> str:
    """Say what computes a run: "ppo_plus", or "sb3" where only SB3's own PPO gives SB3's bits.

    PPOPlus gives them but for two things. It clamps progress at 0, where SB3's schedules go below 0 in a last rollout
    that reaches beyond the steps asked for. And it keeps squashed actions inside the bounds.

    :param column: one of :data:`COLUMNS`
    :param hyperparams: of the run
    :param steps: environment steps asked for
    :param wanted: "sb3": SB3's own for its columns
    :raises ValueError: where SB3's own PPO would have to compile
    """
    if column == "ppo_plus":
        return "ppo_plus"
    rollout = int(hyperparams.get("n_envs", 1)) * int(hyperparams.get("n_steps", 2048))
    schedules = [name for name, value in hyperparams.items() if isinstance(value, str) and value.startswith("lin_")]
    reasons = []
    if wanted == "sb3":
        reasons.append("the engine sb3 is wanted")
    if schedules and steps % rollout:
        reasons.append(f"{steps} steps are no whole number of rollouts of {rollout}, with a schedule of {schedules[0]}")
    if "squash_output" in str(hyperparams.get("policy_kwargs")):
        reasons.append("its actions are squashed")
    if not reasons:
        return "ppo_plus"
    if hyperparams.get("compile"):
        raise ValueError(f"compile is not possible: SB3's own PPO has to compute this, since {' and '.join(reasons)}")
    return "sb3"


def _as_list(value: Any) -> Sequence[Any]:  # noqa: ANN401  # as above
    return value if isinstance(value, list) else [value]
