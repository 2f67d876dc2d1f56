"""From an observation in the environment's units to what the policy reads: normaliser, frames, order of channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, VecTransposeImage
from torch import nn

from sb3_ppo_plus.envs.originals import as_normalized
from sb3_ppo_plus.envs.questions import wrappers_of
from sb3_ppo_plus.extractors import real_frames

Observation = Any
"""An array, or a dict of arrays by key."""


class Frames(NamedTuple):
    """How an observation is stacked of frames, as by ``VecFrameStack``.

    :param axis: axis of the observation, without the batch's, along which the frames lie
    :param number: number of frames
    :param shape: shape of one frame
    """

    axis: int
    number: int
    shape: tuple[int, ...]

    @classmethod
    def find(cls, shape: tuple[int, ...], frame_shape: tuple[int, ...]) -> Frames | None:
        """Find out how frames make up an observation.

        :param shape: shape of the observation
        :param frame_shape: shape of a frame
        :return: None if frames of this shape do not make up the observation
        """
        if len(shape) != len(frame_shape):
            return None
        axes = [axis for axis, sizes in enumerate(zip(shape, frame_shape, strict=True)) if sizes[0] != sizes[1]]
        if not axes:
            return cls(max(len(shape) - 1, 0), 1, frame_shape)
        axis = axes[0]
        fits = len(axes) == 1 and frame_shape[axis] > 0 and shape[axis] % frame_shape[axis] == 0
        return cls(axis, shape[axis] // frame_shape[axis], frame_shape) if fits else None


class ObservationPart(nn.Module):
    """One array of an observation: from the environment's units and layout to those of the policy.

    Statistics of single frames, as of ``VecFrameStack(VecNormalize(env))``, normalise each frame. The zero frames with
    which a stack begins an episode stay zero, as they do there.

    :param space: what the environment gives
    :param policy_space: what the policy reads
    :param normalize: the normaliser; None: this part is not normalised
    :param key: key of this part in a Dict observation; None: the observation is no Dict
    :raises ValueError: if the normaliser's statistics have another shape than the observation and its frames
    """

    mean: th.Tensor
    std: th.Tensor

    def __init__(
        self,
        space: spaces.Space[Any],
        policy_space: spaces.Space[Any],
        normalize: VecNormalize | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__()
        self.space, self.policy_space = space, policy_space
        self.is_transposed = space.shape != policy_space.shape
        self.frames: Frames | None = None
        statistics = statistics_of(normalize, key)
        if normalize is None or statistics is None:
            return
        self.frames = Frames.find(space.shape or (), np.shape(statistics.mean))
        if self.frames is None:
            raise ValueError(
                f"vec_normalize has statistics of the shape {np.shape(statistics.mean)}, but observations"
                f"{'' if key is None else f' {key!r}'} have the shape {space.shape}"
            )
        self.clip = float(normalize.clip_obs)
        # In float64, as in VecNormalize: large means of small deviations would lose digits
        self.register_buffer("mean", th.as_tensor(statistics.mean, dtype=th.float64).clone())
        self.register_buffer("std", th.as_tensor(np.sqrt(statistics.var + normalize.epsilon), dtype=th.float64))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Convert observations.

        :param observations: shape (batch, *shape of the environment's space)
        :return: shape (batch, *shape of the policy's space); float32 if they are normalised, else of the same dtype
        """
        if self.frames is not None:
            observations = self._normalize(observations, self.frames)
        return observations.permute(0, 3, 1, 2) if self.is_transposed else observations

    def _normalize(self, observations: th.Tensor, frames: Frames) -> th.Tensor:
        if frames.number == 1:
            return self._normalize_frames(observations)
        shape, axis = observations.shape[1:], frames.axis
        split = observations.reshape(-1, *shape[:axis], frames.number, *frames.shape[axis:]).movedim(axis + 1, 1)
        is_real = real_frames(split.flatten(2)).view(-1, frames.number, *[1] * len(frames.shape))
        normalized = th.where(is_real, self._normalize_frames(split), 0.0)
        return normalized.movedim(1, axis + 1).reshape(-1, *shape)

    def _normalize_frames(self, frames: th.Tensor) -> th.Tensor:
        return ((frames.double() - self.mean) / self.std).clamp(-self.clip, self.clip).float()


def statistics_of(normalize: VecNormalize | None, key: str | None) -> Any:  # noqa: ANN401  # SB3's RunningMeanStd
    """Return the statistics with which a part of an observation is normalised; None: it is not.

    :param normalize: the normaliser, if there is one
    :param key: key of the part; None: the observation is no Dict
    """
    if normalize is None or not normalize.norm_obs:
        return None
    if key is None:
        return normalize.obs_rms
    is_normalized = key in (normalize.norm_obs_keys or ())
    return normalize.obs_rms[key] if is_normalized and isinstance(normalize.obs_rms, dict) else None


def parts_of(space: spaces.Space[Any]) -> dict[str | None, spaces.Space[Any]]:
    """Return the spaces of the arrays that make up an observation, by their keys.

    :param space: the space; one that is no Dict has the single key None
    """
    return {key: part for key, part in space.spaces.items()} if isinstance(space, spaces.Dict) else {None: space}


def observation_parts(
    space: spaces.Space[Any], policy_space: spaces.Space[Any], normalize: VecNormalize | None
) -> dict[str | None, ObservationPart]:
    """Return what converts each array of an observation, by the arrays' keys.

    :param space: what the environment gives
    :param policy_space: what the policy reads
    :param normalize: the normaliser, if there is one
    """
    own = parts_of(space)
    return {key: ObservationPart(own[key], read, normalize, key) for key, read in parts_of(policy_space).items()}


def space_before_wrappers(
    policy_space: spaces.Space[Any], env: VecEnv | None, normalize: VecNormalize | None
) -> spaces.Space[Any]:
    """Find the space of the environment's observations, before they are normalised and images are transposed.

    :param policy_space: what the policy reads
    :param env: the model's vectorised environment, if it has one
    :param normalize: the normaliser, if there is one
    :return: the policy's space with the layout, dtype and bounds that these observations have
    """
    raw = None if normalize is None else parts_of(normalize.venv.observation_space)
    transposed = _transposed_keys(env)
    found = {
        key: _part_before_wrappers(part, None if raw is None else raw.get(key), key in transposed)
        for key, part in parts_of(policy_space).items()
    }
    if not isinstance(policy_space, spaces.Dict):
        return found[None]
    # A sequence of pairs keeps its order
    return spaces.Dict([(str(key), part) for key, part in found.items()])


def _transposed_keys(env: VecEnv | None) -> set[str | None]:
    """Return the keys of the images whose channels a VecTransposeImage puts first."""
    keys: set[str | None] = set()
    for wrapper in wrappers_of(env):
        if isinstance(wrapper, VecTransposeImage) and not wrapper.skip:
            keys |= set(getattr(wrapper, "image_space_keys", (None,)))
    return keys


def _part_before_wrappers(
    part: spaces.Space[Any], raw: spaces.Space[Any] | None, is_transposed: bool
) -> spaces.Space[Any]:
    if not isinstance(part, spaces.Box):
        return part
    layouts = [part]
    if len(part.shape) == 3:
        last = [np.moveaxis(bound, 0, -1) for bound in (part.low, part.high)]
        channels_last = spaces.Box(last[0], last[1], dtype=part.low.dtype.type)
        layouts = [channels_last, part] if is_transposed else [part, channels_last]
    if not isinstance(raw, spaces.Box):
        return layouts[0]
    for layout in layouts:
        frames = Frames.find(layout.shape, raw.shape)
        if frames is not None:
            low, high = (
                np.repeat(bound, frames.number, axis=frames.axis) if bound.ndim else bound
                for bound in (raw.low, raw.high)
            )
            return spaces.Box(low, high, layout.shape, raw.low.dtype.type)
    return layouts[0]


def check_observation_space(space: spaces.Space[Any], policy_space: spaces.Space[Any]) -> None:
    """Check that a space that a user has given has the arrays that the policy reads.

    :param space: the user's
    :param policy_space: the policy's
    :raises ValueError: for other keys, or an array that is neither the policy's nor has its channels last
    """
    given, read = parts_of(space), parts_of(policy_space)
    missing = [key for key in read if key not in given]
    if missing:
        raise ValueError(f"observation_space lacks {missing}, which the policy reads; got {space}")
    for key, part in read.items():
        shapes = [part.shape]
        if isinstance(part, spaces.Box) and len(part.shape) == 3:
            shapes.append((*part.shape[1:], part.shape[0]))
        if given[key].shape not in shapes or type(given[key]) is not type(part):
            where = "" if key is None else f" of {key!r}"
            raise ValueError(f"observation_space{where} must be {part}, or have its channels last, got {given[key]}")


def as_policy_reads(
    observation: Observation, parts: Mapping[str | None, ObservationPart], normalize: VecNormalize | None
) -> Observation:
    """Convert observations in NumPy, as the normaliser does: what an exported policy is compared with.

    :param observation: a batch in the environment's units
    :param parts: the parts
    :param normalize: the normaliser
    :return: what the model's ``predict`` takes
    """
    arrays = observation if isinstance(observation, dict) else {None: observation}
    read = {}
    for key, part in parts.items():
        array = arrays[key]
        if part.frames is not None:
            array = _normalized(array, part.frames, normalize, statistics_of(normalize, key))
        read[key] = np.transpose(array, (0, 3, 1, 2)) if part.is_transposed else array
    return read if isinstance(observation, dict) else read[None]


def _normalized(array: np.ndarray, frames: Frames, normalize: Any, statistics: Any) -> np.ndarray:  # noqa: ANN401  # SB3's
    shape, axis = array.shape, frames.axis + 1
    split = [array] if frames.number == 1 else np.split(array, frames.number, axis=axis)
    is_padding = np.ones((len(array), *[1] * (array.ndim - 1)), bool)
    normalized = []
    for index, frame in enumerate(split):
        is_zero = (frame == 0).all(axis=tuple(range(1, array.ndim)), keepdims=True)
        is_padding &= is_zero & (index < frames.number - 1)
        of_frame = as_normalized(normalize, frame, statistics.mean, statistics.var)
        normalized.append(np.where(is_padding, 0.0, of_frame))
    joined = np.concatenate(normalized, axis=axis) if frames.number > 1 else normalized[0]
    return joined.reshape(shape).astype(np.float32)
