"""What is checked before a policy is exported: the file, the packages, the model, the wrappers of its environments."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import (
    VecEnv,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
    unwrap_vec_normalize,
)

from sb3_ppo_plus.envs.questions import innermost_normalizer, unknown_wrapper
from sb3_ppo_plus.masking.evaluation import MaskedPredictor
from sb3_ppo_plus.masking.predicting import PredictsWithMasks

SUFFIXES = (".onnx", ".pt2")
_PACKAGES_OF_ONNX = ("onnx", "onnxscript", "onnxruntime")
# Their predict does nothing but to call the policy's
_PREDICTS_OF_MODELS = (PredictsWithMasks.predict, BaseAlgorithm.predict)
# What they do to observations is a part of an export, or what the export takes
_KNOWN_WRAPPERS = (VecFrameStack, VecTransposeImage)


def check_path(path: Path) -> None:
    """Check that a file can be written, before the work begins.

    :param path: the file
    :raises ValueError: for another suffix, a folder that does not exist, or a path that is a folder
    :raises ImportError: if a package is missing that writes or runs such a file
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path must end in one of {', '.join(SUFFIXES)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"path must lie in a folder that exists, got {str(path)!r}: there is no {str(path.parent)!r}")
    if path.is_dir():
        raise ValueError(f"path must be a file, got the folder {str(path)!r}")
    if path.suffix != ".onnx":
        return
    for package in _PACKAGES_OF_ONNX:
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(
                f"export_policy to .onnx needs {', '.join(_PACKAGES_OF_ONNX)}, and {package} cannot be imported: "
                f"{error}; pip install 'sb3-ppo-plus[export]'"
            ) from error


def policy_of(model: Any) -> Any:  # noqa: ANN401  # whatever a user gives
    """Return the policy that a model's ``predict`` asks.

    :param model: a model, what its ``masked(env)`` has returned, or a policy
    :raises ValueError: for a model with a ``predict`` of its own, which an export of the policy would leave out
    """
    if type(model) is MaskedPredictor:
        model = vars(model)["_model"]
    policy = getattr(model, "policy", None)
    if policy is None:
        return model
    predict = getattr(type(model), "predict", None)
    if "predict" in vars(model) or (predict is not None and predict not in _PREDICTS_OF_MODELS):
        raise ValueError(
            f"export_policy does not know the method predict of {type(model).__name__}, which changes what the policy "
            "chooses; export_policy(model.policy, ...) leaves it out"
        )
    return policy


def normalizer_of(vec_normalize: object) -> VecNormalize | None:
    """Return the normaliser that a user has given.

    :param vec_normalize: a VecNormalize, a VecEnv with one inside, or None
    :raises TypeError: for anything else, and for a subclass, whose way to normalise is not known
    """
    if vec_normalize is None:
        return None
    normalize = None
    if isinstance(vec_normalize, VecEnv):
        normalize = innermost_normalizer(vec_normalize) or unwrap_vec_normalize(vec_normalize)
    if type(normalize) is not VecNormalize:
        raise TypeError(
            "vec_normalize must be None, a VecNormalize (no subclass) or a VecEnv with one inside, got "
            f"{vec_normalize!r}{'' if normalize is None else f' with {normalize!r}'}"
        )
    return normalize


def check_wrappers(env: VecEnv | None) -> None:
    """Check that everything is known that wrappers do to observations, outside of a VecNormalize that there may be.

    :param env: the outermost vectorised environment; None: there is none
    :raises ValueError: for a wrapper that may change observations in another way; it names the class
    """
    unknown = unknown_wrapper(env, innermost_normalizer(env), _KNOWN_WRAPPERS)
    if unknown is not None:
        name = type(unknown).__name__
        raise ValueError(
            f"export_policy does not know what the wrapper {name} does to observations, and would leave it out. Put it "
            f"inside VecNormalize; or export model.policy with the VecNormalize itself, and do what {name} does where "
            "the policy runs"
        )


def check_keys(space: spaces.Space[Any], normalize: VecNormalize | None) -> None:
    """Check that a normaliser has statistics for observations of this kind.

    :param space: what the policy reads
    :param normalize: the normaliser, if there is one
    :raises ValueError: for statistics of a Dict where the policy reads none, and the other way round
    """
    if normalize is None or not normalize.norm_obs:
        return
    if isinstance(normalize.obs_rms, dict) != isinstance(space, spaces.Dict):
        raise ValueError(
            f"vec_normalize normalises observations of {normalize.observation_space}, but the policy reads {space}"
        )
