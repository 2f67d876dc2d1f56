"""Short runs of the zoo for tests of commands that read log folders."""

from contextlib import chdir

from sb3_ppo_plus import zoo

SMALL = ("n_steps:32", "batch_size:32", "n_epochs:1", "n_envs:2")


def train(folder, env_id, *flags, n_steps=128, settings=()):
    """Train in ``folder`` as the shell would, and return the run's folder there."""
    with chdir(folder):
        common = ["--env", env_id, "-n", str(n_steps), "--device", "cpu"]
        zoo.main(["train", *common, "--eval-freq", "32", "--eval-episodes", "2", *flags, "-params", *SMALL, *settings])
    return max(folder.glob(f"logs/ppo_plus/{env_id.replace('/', '-')}_*"), key=lambda path: path.stat().st_mtime_ns)


def copy(run, folder):
    """Write the files of a folder, as ``files_of`` has read them, into another folder."""
    for path, content in run.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
