"""``export``: a run's policy as ONNX or for PyTorch, with its normaliser, and the contract beside it."""

from __future__ import annotations

from pathlib import Path

from sb3_ppo_plus.envs.questions import innermost_normalizer
from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.export.checks import SUFFIXES, check_path, check_wrappers
from sb3_ppo_plus.export.exporting import export_policy
from sb3_ppo_plus.export.observations import space_before_wrappers
from sb3_ppo_plus.zoo.hyperparams import ALGO
from sb3_ppo_plus.zoo.parser import ZooParser
from sb3_ppo_plus.zoo.run_folder import add_run_arguments, create_env, find_run, hint_at_trust, load_model, prepare


def main(arguments: list[str]) -> None:
    """Run ``export``; its flags are those of ``record`` that say which model is meant.

    :param arguments: what the user gave after the command
    :raises SystemExit: if there is no model, if it is refused without trust, or if it cannot be exported
    """
    parser = ZooParser(
        prog="python -m sb3_ppo_plus.zoo export",
        description="Write a policy as ONNX (.onnx) or for torch.export.load (.pt2): from observations in the "
        "environment's units to actions in its units. With --stochastic, it takes random numbers as further inputs.",
    )
    add_run_arguments(parser)
    parser.add_argument("-o", "--output", help="the file, .onnx or .pt2; by default an .onnx file in the run's folder")
    args = parser.parse_args(arguments)
    if args.output is not None and Path(args.output).suffix not in SUFFIXES:
        parser.error(f"--output must end in {' or '.join(SUFFIXES)}, got {args.output!r}")
    if args.algo != ALGO:
        parser.error(f"--algo must be {ALGO}, got {args.algo!r}")
    prepare(args)
    with hint_at_trust("export"):
        run = find_run(args)
        path = Path(args.output) if args.output else run.folder / f"{run.prefix}.onnx"
        try:
            check_path(path)
        except (ImportError, ValueError) as error:
            raise SystemExit(str(error)) from error
        env = create_env(run, args)
        try:
            model = load_model(run, env, args)
            normalize = innermost_normalizer(env)
            check_wrappers(env)
            space = space_before_wrappers(model.observation_space, env, normalize)
            export_policy(model, path, normalize, not args.stochastic, observation_space=space)
        except UntrustedFileError:
            raise
        except (ImportError, TypeError, ValueError) as error:
            # A part of the policy or a normaliser that the exporter does not know, or a package that is missing
            raise SystemExit(str(error)) from error
        finally:
            env.close()
    print(f"Saved policy to {path}, and what goes in and comes out to {path}.json")
