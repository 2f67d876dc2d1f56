"""The stages of gpu_check.py that check: the same bits, compiled graphs, resuming, the project's tests, host waits."""

import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3
import torch as th
from gpu_checks.capture import graphs_without_code, parts_of, replays_of
from gpu_checks.cases import CASES, ROLLOUT, cases_for, difference, make_toys, parameters_of
from gpu_checks.report import BENCHMARKS, Options, Report
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint
from sb3_ppo_plus.fast.captured import CudaReplay
from sb3_ppo_plus.fast.compiled_actor import CompiledActor
from sb3_ppo_plus.fast.compiled_step import CompiledGradientStep

ROOT = BENCHMARKS.parents[1]
# Float32 rounding of a few updates, and that of half precision
TOLERANCE, LOOSE_TOLERANCE = 1e-4, 5e-3
COMPILED = {
    "c1": ["box", "cnn", "bf16", "masks", "skip non-finite", "sgd"],
    "c2": ["discrete", "dict", "beta", "critic_lr, clip_vf", "cnn bf16", "fp16"],
    "c3": ["squashed", "gsde", "target_kl", "transformer", "lstm", "reduce-overhead"],
    "c4": ["gtrxl"],
}
WITH_A_DEVICE = ["tests/update/test_gradient_step.py"]
MOVED_TO_THE_DEVICE = [
    "tests/test_sb3_equality.py",
    "tests/test_contrib_equality.py",
    "tests/test_together.py",
    "tests/masking",
    "tests/policies/test_remembering.py",
    "tests/rollout",
    "tests/update",
]


def versions(options: Options, report: Report) -> None:
    """What is installed, and whether the device computes."""

    def look() -> dict[str, Any]:
        found: dict[str, Any] = {
            "python": sys.version.split()[0],
            "triton": _version("triton"),
            "cuda": th.version.cuda,
        }
        for module in (th, np, gym, stable_baselines3, sb3_contrib):
            found[module.__name__] = module.__version__
        if options.device == "cuda":
            found |= {"gpu": th.cuda.get_device_name(), "capability": th.cuda.get_device_capability()}
            found["auto"] = str(CASES["box"].build("auto").device)
        numbers = th.randn(64, 64, device=options.device)
        return {**found, "ok": bool((numbers @ numbers).isfinite().all())}

    report.check("versions", look)


def _version(name: str) -> str | None:
    try:
        return __import__(name).__version__
    except ImportError:
        return None


def equality(options: Options, report: Report) -> None:
    """PPOPlus beside SB3: as equal as SB3 is to itself, when it trains twice."""

    def compare(name: str, deterministic: bool) -> dict[str, Any]:
        case = CASES[name]
        th.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            models = [case.build(options.device, one).learn(ROLLOUT * 6) for one in (PPO, PPO, PPOPlus)]
        finally:
            th.use_deterministic_algorithms(False)
        sb3, again, ours = map(parameters_of, models)
        moved = difference(sb3, parameters_of(case.build(options.device, PPO)))
        diff, twice = difference(sb3, ours), difference(sb3, again)
        is_ok = diff <= max(twice, 1e-6) and moved > 0
        return {"ok": is_ok, "bitwise": bool((sb3 == ours).all()), "diff": diff, "sb3_twice": twice, "moved": moved}

    for name in cases_for(["box", "cnn", "discrete", "dict", "gsde", "target_kl"], options.device, options.quick):
        report.check(name, compare, name, False)
        if name in ("cnn", "dict"):
            report.check(f"{name}, deterministic", compare, name, True)

    def lstm() -> dict[str, Any]:
        settings = {"n_steps": 16, "batch_size": 16, "n_epochs": 3, "seed": 0, "device": options.device}
        settings["policy_kwargs"] = {"net_arch": [8], "lstm_hidden_size": 16}
        models = [one("MlpLstmPolicy", make_toys(), **settings).learn(ROLLOUT * 6) for one in (RecurrentPPO, PPOPlus)]
        return {"diff": difference(*map(parameters_of, models)), "note": "their minibatches differ by design"}

    def beside_the_cpu() -> dict[str, Any]:
        vectors = [parameters_of(CASES["box"].build(device).learn(ROLLOUT * 3)) for device in (options.device, "cpu")]
        is_finite = all(bool(vector.isfinite().all()) for vector in vectors)
        return {"ok": is_finite, "note": "other random numbers: only that both are finite"}

    report.check("lstm beside RecurrentPPO", lstm)
    report.check("box beside the CPU", beside_the_cpu)


def compiled(options: Options, report: Report) -> None:
    """``compile=True`` beside eager, and whether everything that should be compiled was."""
    th.backends.cudnn.allow_tf32 = False
    captures = options.device == "cuda" or options.no_code

    def compare(name: str) -> dict[str, Any]:
        case = CASES[name]
        start = parameters_of(case.build(options.device, compile=False))
        eager, again = (_trained(case.build(options.device, compile=False)) for _ in range(2))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = _trained(case.build(options.device, compile=case.settings.get("compile", True)))
        texts = [str(warning.message)[:200] for warning in caught]
        said = [text for text in texts if "compile=True" in text or "cudagraph" in text.lower()]
        n_graphs = [sum(part.n_compilations for part in parts_of(model, kind)) for kind in COMPILING]
        diff, moved = difference(parameters_of(eager), parameters_of(model)), difference(parameters_of(eager), start)
        is_close = diff < (LOOSE_TOLERANCE if case.loose else TOLERANCE)
        n_replays = replays_of(model)
        is_compiled = case.runs_eagerly or (n_graphs[0] > 0 and not said and (n_replays[0] > 0 or not captures))
        return {
            "ok": is_close and is_compiled and moved > 0,
            "diff": diff,
            "eager_twice": difference(parameters_of(eager), parameters_of(again)),
            "moved": moved,
            "graphs": n_graphs,
            "replays": n_replays,
            "said": said,
            "losses": {log: (_logged(eager, log), _logged(model, log)) for log in COMPARED_LOGS},
            "compile_s": _logged(model, "time/compile_seconds", 1),
        }

    def captured(name: str) -> dict[str, Any]:
        def train(compile: bool | dict[str, Any]) -> tuple[th.Tensor, list[int], float]:
            model = CASES[name].build(options.device, compile=compile).learn(ROLLOUT * 3)
            # What is replaced and changed in between is found by the replays
            with th.no_grad():
                for parameter in model.policy.parameters():
                    parameter.data = parameter.data * 0.99
                    parameter.add_(0.001)
            model.learn(ROLLOUT * 3, reset_num_timesteps=False)
            return parameters_of(model), replays_of(model), float(th.rand(1, device=options.device))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            called, again, replayed = (train(one) for one in (NOT_CAPTURED, NOT_CAPTURED, True))
        said = [str(warning.message)[:200] for warning in caught if "compile=True" in str(warning.message)]
        diff, twice = difference(called[0], replayed[0]), difference(called[0], again[0])
        is_ok = diff <= twice and min(replayed[1]) > 0 and sum(called[1]) == 0 and called[2] == replayed[2] and not said
        return {"ok": is_ok, "diff": diff, "twice": twice, "replays": replayed[1], "said": said}

    with graphs_without_code(options):
        for name in cases_for(COMPILED[report.stage], options.device, options.quick):
            report.check(f"compiled {name}", compare, name)
        if report.stage == "c1" and captures:
            for name in cases_for(["box", "squashed", "beta", "cnn"], options.device, options.quick):
                report.check(f"replayed as CUDA graphs: {name}", captured, name)
    # Last: it may take the rest with it
    if report.stage == "c1" and options.device == "cuda":
        report.check("a capture that fails", _failed_capture)


def _failed_capture() -> dict[str, Any]:
    """Fail to capture what waits for the GPU; then the stream, the generator and the next capture are as before."""
    device = th.device("cuda", th.cuda.current_device())
    numbers, state, error = th.ones(3, device=device), th.cuda.get_rng_state(), ""
    try:
        CudaReplay(partial(lambda x: [x * x.sum().item()], numbers), device)
    except RuntimeError as caught:
        error = str(caught).partition("\n")[0][:80]
    is_back = th.cuda.current_stream() == th.cuda.default_stream()
    is_same = th.equal(state, th.cuda.get_rng_state())
    drawn = th.rand(3, device=device)
    replay = CudaReplay(partial(lambda x: [x + th.rand_like(x)], numbers), device)
    th.cuda.set_rng_state(state)
    replay.replay()
    draws_alike = th.equal(replay.outputs[0], numbers + drawn)
    is_ok = bool(error) and is_back and is_same and draws_alike
    return {"ok": is_ok, "error": error, "stream": is_back, "state": is_same, "draws_alike": draws_alike}


COMPILING = (CompiledGradientStep, CompiledActor)
NOT_CAPTURED = {"triton.cudagraphs": False}
COMPARED_LOGS = ("train/loss", "train/grad_norm", "train/approx_kl")


def _trained(model: PPOPlus) -> PPOPlus:
    return model.learn(ROLLOUT * 4)


def _logged(model: PPOPlus, name: str, digits: int = 6) -> float:
    return round(float(model.logger.name_to_value[name]), digits)


class _Killed(Exception):
    pass


class _Kill(BaseCallback):
    """Ends training in the middle of a rollout, as a kill would."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def _on_step(self) -> bool:
        if self.num_timesteps > self.after:
            raise _Killed
        return True


def resuming(options: Options, report: Report) -> None:
    """A run that is killed and resumed, beside one that is not, and beside that one run again."""
    total, kept = ROLLOUT * 6, ROLLOUT * 3

    def drawn() -> list[float]:
        return [float(np.random.random()), float(th.rand(1)), float(th.rand(1, device=options.device))]

    def resume(name: str, compile: bool = False) -> dict[str, Any]:
        case = CASES[name]

        def build() -> PPOPlus:
            return case.build(options.device, wrapper=ResumableEnv, compile=compile)

        whole, numbers = parameters_of(build().learn(total)), drawn()
        twice = difference(whole, parameters_of(build().learn(total)))
        with tempfile.TemporaryDirectory() as folder:
            with suppress(_Killed):
                build().learn(total, [TrainingCheckpoint(1, folder), _Kill(kept + 9)])
            th.manual_seed(123)
            np.random.seed(5)
            model = PPOPlus.resume(folder, make_toys(ResumableEnv, **case.env), device=options.device)
            resumed_at = model.num_timesteps
            model.continue_learning()
        diff, same_numbers = difference(whole, parameters_of(model)), drawn() == numbers
        # On a GPU a run may differ from itself
        is_equal = diff == 0 or diff <= 10 * twice
        on = next(model.policy.parameters()).device
        return {
            "ok": resumed_at == kept and is_equal,
            "bitwise": diff == 0,
            "diff": diff,
            "same_run_twice": twice,
            "same_random_numbers": same_numbers,
            "on": str(on),
        }

    def move() -> dict[str, Any]:
        model = CASES["box"].build(options.device).learn(ROLLOUT * 2)
        with tempfile.TemporaryDirectory() as folder:
            model.save(f"{folder}/model")
            untrusted = PPOPlus.load(f"{folder}/model", env=make_toys(), device=options.device, trusted=False)
            on_cpu = PPOPlus.load(f"{folder}/model", env=make_toys(), device="cpu")
        on_cpu.learn(ROLLOUT * 2, reset_num_timesteps=False)
        goes_on = bool(parameters_of(on_cpu).isfinite().all())
        is_same = difference(parameters_of(model), parameters_of(untrusted)) == 0
        return {"ok": is_same and goes_on, "cpu_goes_on": goes_on, "untrusted_on": str(untrusted.device)}

    names = ["box", "cnn", "gsde", "masks", "lstm", "gtrxl", "squashed", "bf16", "fp16"]
    for name in cases_for(names, options.device, options.quick):
        report.check(f"resume {name}", resume, name)
    if not options.quick:
        with graphs_without_code(options):
            report.check("resume box, compiled", resume, "box", True)
    report.check("save, load on CPU, load untrusted", move)


def project_tests(options: Options, report: Report) -> None:
    """The project's tests that choose a device; then others with their models moved to the device.

    Among the moved ones, those that compare with tensors on the CPU fail: look at the failures.
    """
    if not options.quick:
        report.check("tests with a device", _run_tests, options, WITH_A_DEVICE, False)
    report.check("tests moved to the device", _run_tests, options, MOVED_TO_THE_DEVICE, True)


def _run_tests(options: Options, paths: list[str], moves_models: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "60", "--tb=line"]
    command += ["-n", "0", "-k", "cuda", WITH_A_DEVICE[0]] if options.quick else ["-n", "6", *paths]
    command += ["-p", "gpu_checks.device_plugin"] * moves_models
    paths_of_modules = os.pathsep.join([str(BENCHMARKS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CHECK_DEVICE": options.device, "PYTHONPATH": paths_of_modules}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=105)
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode(errors="replace")
    print(text[-12000:], flush=True)
    lines = text.splitlines()
    failures = [line[:230] for line in lines if line.startswith(("FAILED", "ERROR"))]
    endings = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
    kinds = Counter(failure.partition(" - ")[2][:110] for failure in failures).most_common(12)
    is_ok = bool(endings) and "passed" in endings[-1] and not failures
    result = endings[-1] if endings else "they did not end"
    return {"ok": is_ok, "result": result, "failures": len(failures), "kinds": kinds, "where": failures[:80]}


def host_waits(options: Options, report: Report) -> None:
    """Where the host waits for the GPU, by source line, per step of a rollout and per minibatch."""
    n_steps = 64

    def look(name: str, algorithm: type[PPO], settings: dict[str, Any]) -> dict[str, Any]:
        model = CASES[name].build(options.device, algorithm, n_steps=n_steps, **settings)
        # Long enough for whatever records or compiles the first steps
        model.learn(3 * n_steps * model.n_envs)
        _, callback = model._setup_learn(10**9, None, reset_num_timesteps=False)
        callback.on_training_start({}, {})
        with _counted_waits(options.device) as of_rollout:
            model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)
        with _counted_waits(options.device) as of_update:
            model.train()
        n_minibatches = model.n_epochs * n_steps * model.n_envs // model.batch_size
        values: dict[str, Any] = {"where": {}}
        for part, lines, number in (("rollout", of_rollout, n_steps), ("update", of_update, n_minibatches)):
            values[part] = round(lines.total() / number, 2)
            values["where"][part] = {line: round(count / number, 2) for line, count in lines.most_common(12)}
        return values

    with graphs_without_code(options):
        for name in cases_for(["box", "cnn"], options.device, options.quick):
            report.check(f"waits: {name} compiled", look, name, PPOPlus, {"compile": True})
        for name in cases_for(
            ["box", "cnn", "target_kl", "squashed", "masks", "lstm", "gtrxl", "bf16"], options.device, options.quick
        ):
            report.check(f"waits: {name}", look, name, PPOPlus, {})
        for name in cases_for(["box", "cnn"], options.device, options.quick):
            report.check(f"waits: SB3 {name}", look, name, PPO, {})


@contextmanager
def _counted_waits(device: str) -> Iterator[Counter[str]]:
    """Count the waits inside the block, by source line; none are seen on the CPU."""
    lines: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            th.cuda.set_sync_debug_mode("warn")
        yield lines
        if device == "cuda":
            th.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    lines.update(f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits)
