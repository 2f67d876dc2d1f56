"""Reads hostile files under limits of memory and time, each in a process of its own, and counts what passed a limit.

The files are those that ``keep_files.py`` has kept, the finds and the corpus of the fuzzer, and folders with links,
named pipes and holes, which are made here:

    PYTHONPATH=tests/fuzz KEPT_FILES=kept pytest -p keep_files -q tests/saving tests/untrusted tests/zoo/test_enjoy.py \
        tests/resuming/test_untrusted_checkpoints.py tests/export/test_hostile_*.py
    python tests/fuzz/under_limits.py kept --corpus fuzz_corpus
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch as th
from environments import SMALL_NET, make_env
from hostile import make_special_file
from stable_baselines3.common.vec_env import VecNormalize
from targets import TARGETS, checkpoint, envs, run

from sb3_ppo_plus import CheckpointError, PPOPlus, UntrustedFileError, WrapperStackError, load_vec_normalize
from sb3_ppo_plus.export import load_exported
from sb3_ppo_plus.untrusted.tensor_file import load_tensors
from sb3_ppo_plus.zoo.enjoy import read_hyperparams

#: Beside the size of the file, three times: its bytes, its members, its tensors
MEMORY = 512 * 2**20
SECONDS = 10
#: What only running code does. None of the readers unpickles anything
EVENTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)
DOCUMENTED = (UntrustedFileError, CheckpointError, WrapperStackError, ValueError, FileNotFoundError, RuntimeError)


def read_model(path: Path) -> None:
    """Load a model, and read its parameters alone."""
    for read in (lambda: PPOPlus.load(path, trusted=False, device="cpu"), lambda: parameters(path)):
        with contextlib.suppress(*DOCUMENTED):
            read()


def parameters(path: Path) -> None:
    PPOPlus("MlpPolicy", make_env(), n_steps=8, batch_size=8, policy_kwargs=SMALL_NET, device="cpu").set_parameters(
        path
    )


def read_config(path: Path) -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "config.yml").symlink_to(path.resolve())
    read_hyperparams(str(folder))


def read_checkpoint(path: Path) -> None:
    folder = Path(tempfile.mkdtemp()) / "checkpoint_000001_16_steps"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    resume(folder)


def read_exported(path: Path) -> None:
    folder = Path(tempfile.mkdtemp())
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
        load_exported(folder / archive.namelist()[0])


def resume(folder: Path) -> None:
    PPOPlus.resume(folder, VecNormalize(envs()), device="cpu", trusted=False)


READERS: dict[str, Callable[[Path], object]] = {
    "model": read_model,
    "tensors": lambda path: load_tensors(path.read_bytes(), "tensors", th.device("cpu"), allows_legacy=True),
    "normalizer": lambda path: load_vec_normalize(path, make_env()),
    "config": read_config,
    "checkpoint": read_checkpoint,
    "exported": read_exported,
    **{f"fuzz {name}": lambda path, name=name: run(TARGETS[name], path.read_bytes()) for name in TARGETS},
}


def special_files(folder: Path) -> Iterator[tuple[str, Path, Callable[[Path], object]]]:
    """Make a link, a named pipe, a folder and a file of holes in place of each file that is read."""
    for kind in ("/dev/zero", "fifo", "folder", "holes"):
        for name, read in (("model.zip", read_model), ("vecnormalize.json", READERS["normalizer"])):
            path = folder / kind.strip("/") / name
            make_special_file(path, kind)
            yield f"{kind} {name}", path, read
        path = folder / kind.strip("/") / "config.yml"
        make_special_file(path, kind)
        yield f"{kind} config.yml", path, lambda path: read_hyperparams(str(path.parent))
        for name in ("manifest.json", "model.zip", "training_state.json", "training_state.bin"):
            copied = folder / kind.strip("/") / name.replace(".", "_") / checkpoint().name
            copied.mkdir(parents=True)
            for member in checkpoint().iterdir():
                (copied / member.name).write_bytes(member.read_bytes())
            (copied / name).unlink()
            make_special_file(copied / name, kind)
            yield f"{kind} checkpoint {name}", copied, resume


def outcome(read: Callable[[Path], object], path: Path) -> tuple[str, float, int]:
    """Read a file in a child process.

    :return: what happened; seconds; bytes of memory beside those at the start
    """
    size = path.stat().st_size if path.is_file() and not path.is_symlink() else 0
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _read_and_exit(read, path, 3 * min(size, 2**30))
    status, usage = 0, None
    while time.monotonic() - started < 2 * SECONDS:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.002)
    else:
        os.kill(child, signal.SIGKILL)
        os.wait4(child, 0)
        return "time", time.monotonic() - started, 0
    seconds = usage.ru_utime + usage.ru_stime
    names = {0: "taken", 1: "refused", 2: "memory", 3: "code", 4: "undocumented error"}
    result = names.get(os.waitstatus_to_exitcode(status), "crash")
    memory = max(0, usage.ru_maxrss * 1024 - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return ("time" if seconds > SECONDS else result), seconds, memory


def _read_and_exit(read: Callable[[Path], object], path: Path, honest: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY + honest,) * 2)
    sys.addaudithook(lambda event, args: os._exit(3) if event in EVENTS else None)
    code = 0
    # What the readers print belongs to nobody
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(path)
        except DOCUMENTED as error:
            code = 2 if _is_of_memory(error) else 1
        except MemoryError:
            code = 2
        except BaseException:
            traceback.print_exc()
            code = 4
    os._exit(code)


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether an error comes from a lack of memory: a file that is refused for it has passed the limit."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "MemoryError" in str(error):
            return True
        error = error.__cause__
    return False


def files(arguments: argparse.Namespace) -> Iterator[tuple[str, Path, Callable[[Path], object]]]:
    for kind in ("model", "tensors", "normalizer", "config", "checkpoint", "exported"):
        for path in sorted((arguments.kept / kind).glob("*")):
            yield kind, path, READERS[kind]
    for root in [HERE / "finds", *([arguments.corpus] if arguments.corpus else [])]:
        for folder in sorted(root.glob("*")):
            for path in sorted(folder.iterdir())[:: arguments.every]:
                yield f"fuzz {folder.name}", path, READERS[f"fuzz {folder.name}"]
    yield from special_files(Path(tempfile.mkdtemp()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", type=Path, help="folder that keep_files.py has filled")
    parser.add_argument("--corpus", type=Path, help="folder of inputs that fuzz.py has kept")
    parser.add_argument("--every", type=int, default=1, help="read only each n-th file of the corpus")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    # Made before the children are, so that their memory is not counted
    for target in TARGETS.values():
        target.seeds()
    READERS["model"](io.BytesIO(TARGETS["model"].seeds()[0]))  # type: ignore[arg-type]  # a file is as good as its path
    counts: dict[str, Counter[str]] = {}
    slowest, largest = (0.0, ""), (0, "")
    for kind, path, read in files(arguments):
        result, seconds, memory = outcome(read, path)
        group = kind.partition(" ")[0] if kind.startswith(("/dev/zero", "fifo", "folder", "holes")) else kind
        counts.setdefault(group, Counter())[result] += 1
        slowest, largest = max(slowest, (seconds, f"{kind} {path}")), max(largest, (memory, f"{kind} {path}"))
        if result not in ("taken", "refused"):
            print(f"{result:20} {seconds:6.2f} s {memory / 2**20:6.0f} MB {kind} {path}", flush=True)
    total: Counter[str] = sum(counts.values(), Counter())
    for kind, count in [*counts.items(), ("all", total)]:
        print(f"{kind:20} {sum(count.values()):6} files: {', '.join(f'{n} {name}' for name, n in count.items())}")
    print(f"slowest {slowest[0]:.2f} s of CPU: {slowest[1]}")
    print(f"most memory {largest[0] / 2**20:.0f} MB: {largest[1]}")


if __name__ == "__main__":
    main()
