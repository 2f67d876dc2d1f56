"""Feature extractors: a Transformer over frames, the residual CNN of IMPALA, and one extractor per key of a Dict."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from torch import nn
from torch.nn import functional as F

from sb3_ppo_plus.argument_checks import did_you_mean, integer_of_at_least

POOLINGS = ("mean", "last", "cls")
MIN_IMAGE_SIZE = 7


class _EncoderBlock(nn.Module):
    """One pre-norm block: self-attention, then a GELU MLP, each added to the stream (Xiong et al. 2020, fig. 1b).

    ``nn.TransformerEncoderLayer`` has other kernels under ``no_grad`` in eval mode: rollout and update would differ.
    """

    def __init__(self, d_model: int, n_heads: int, d_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.attention_out = nn.Linear(d_model, d_model)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp_in = nn.Linear(d_model, d_feedforward)
        self.mlp_out = nn.Linear(d_feedforward, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: th.Tensor, attendable: th.Tensor | None, only_last: bool) -> th.Tensor:
        """Mix the tokens.

        :param tokens: ``(batch, n_tokens, d_model)``
        :param attendable: ``(batch, 1, 1, n_tokens)`` bool, True for tokens that may be attended to; None: all of them
        :param only_last: compute the last token only, which still attends to all; for the last block of some poolings
        :return: ``(batch, n_tokens or 1, d_model)``
        """
        batch, n_tokens, d_model = tokens.shape
        qkv = self.query_key_value(self.attention_norm(tokens))
        query, key, value = qkv.view(batch, n_tokens, 3, self.n_heads, d_model // self.n_heads).permute(2, 0, 3, 1, 4)
        if only_last:
            query, tokens = query[:, :, -1:], tokens[:, -1:]
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attendable, dropout_p=dropout)
        tokens = tokens + self.dropout(self.attention_out(mixed.transpose(1, 2).flatten(2)))
        hidden = self.dropout(F.gelu(self.mlp_in(self.mlp_norm(tokens))))
        output: th.Tensor = tokens + self.dropout(self.mlp_out(hidden))
        return output


class TransformerExtractor(BaseFeaturesExtractor):
    """Pre-norm Transformer encoder over the frames of an observation, with learned positions and a final norm.

    Observations are a Box of shape ``(L, D)``, one token per row; or flat, ``(seq_len * D,)``, as VecFrameStack returns
    them (oldest frame first); or flat without ``seq_len``, which makes one token. A frame stack begins an episode with
    frames of zeros. No token attends to these leading zero frames, and pooling leaves them out. The newest frame is
    always real, and so is a zero frame after a non-zero one. Normalise inside the stack,
    ``VecFrameStack(VecNormalize(env))``, so that the padding stays zero.

    It trains equally well under SB3's orthogonal initialisation (gain sqrt(2)) and PyTorch's. Query, key and value
    share one matrix, so the attention logits begin with a deviation below 1. Pre-norm limits what each block adds.

    :param observation_space: Box of one or two dimensions
    :param seq_len: frames in a flat observation (divides its size), or L; None: L, or 1 for a flat observation
    :param d_model: width of a token and of the output (``features_dim``); a multiple of ``n_heads``
    :param n_heads: number of attention heads
    :param n_layers: number of encoder blocks
    :param pooling: "mean" over the real frames, "last" (the newest frame's token) or "cls" (an extra, learned token)
    :param dropout: in [0, 1); above 0, the first log-ratio of an update is not 0, because only ``train`` applies it
    :param d_feedforward: hidden width of the blocks' MLPs; None: ``4 * d_model``
    :raises ValueError: for an argument outside these ranges, or a space of another kind
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        seq_len: int | None = None,
        d_model: int = 64,
        n_heads: int = 4,
        n_layers: int = 2,
        pooling: str = "mean",
        dropout: float = 0.0,
        d_feedforward: int | None = None,
    ) -> None:
        d_model, n_heads = integer_of_at_least(1, "d_model", d_model), integer_of_at_least(1, "n_heads", n_heads)
        n_layers = integer_of_at_least(1, "n_layers", n_layers)
        d_feedforward = integer_of_at_least(1, "d_feedforward", 4 * d_model if d_feedforward is None else d_feedforward)
        if d_model % n_heads != 0:
            raise ValueError(f"d_model must be a multiple of n_heads, got d_model={d_model} and n_heads={n_heads}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        n_frames, frame_dim = _sequence_shape(observation_space, seq_len)
        super().__init__(observation_space, features_dim=d_model)
        self.seq_len, self.frame_dim, self.pooling = n_frames, frame_dim, pooling
        self.lacks_seq_len = seq_len is None and len(observation_space.shape or ()) == 1

        self.embedding = nn.Linear(frame_dim, d_model)
        # Positions have norm 1, like the embedding of a normalised frame. If they were smaller, the layer norms would
        # erase the frame's magnitude. They are registered before they are drawn, so that loading without trust can stop
        # where they are too large
        self.positions = nn.Parameter(th.empty(n_frames, d_model))
        with th.no_grad():
            self.positions.copy_(th.randn(n_frames, d_model) * d_model**-0.5)
        self.cls_token = nn.Parameter(th.randn(d_model) * d_model**-0.5) if pooling == "cls" else None
        self.blocks = nn.ModuleList(_EncoderBlock(d_model, n_heads, d_feedforward, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Encode observations.

        :param observations: ``(batch, L, D)``, ``(batch, seq_len * D)`` or ``(batch, D)``, float
        :return: ``(batch, d_model)``
        """
        frames = observations.reshape(-1, self.seq_len, self.frame_dim)
        return self.encode(frames, real_frames(frames))

    def encode(self, frames: th.Tensor, is_real: th.Tensor) -> th.Tensor:
        """Encode frames, without those that are padding.

        :param frames: ``(batch, seq_len, frame_dim)``, oldest first
        :param is_real: ``(batch, seq_len)`` bool, False where a frame is padding, True for the newest
        :return: ``(batch, d_model)``
        """
        tokens = self.embedding(frames) + self.positions
        attendable = is_real
        if self.cls_token is not None:
            cls_tokens = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
            tokens, attendable = th.cat([tokens, cls_tokens], dim=1), F.pad(is_real, (0, 1), value=True)
        mask = attendable[:, None, None, :] if self.seq_len > 1 else None
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, mask, only_last=self.pooling != "mean" and index == len(self.blocks) - 1)
        normed: th.Tensor = self.norm(tokens)
        if self.pooling != "mean":
            return normed[:, -1]
        weights = is_real.to(normed.dtype).unsqueeze(-1)
        return (normed * weights).sum(dim=1) / weights.sum(dim=1)


def _sequence_shape(space: gym.Space[Any], seq_len: int | None) -> tuple[int, int]:
    """Return an observation's number of tokens and the size of one; raise ValueError if they do not fit the space."""
    if not isinstance(space, spaces.Box) or len(space.shape) not in (1, 2):
        raise ValueError(f"observation_space must be a Box of shape (L, D) or (D,) for a Transformer, got {space}")
    if seq_len is not None:
        seq_len = integer_of_at_least(1, "seq_len", seq_len)
    if len(space.shape) == 2:
        if seq_len not in (None, space.shape[0]):
            raise ValueError(f"seq_len must be None or {space.shape[0]}, the L of the observation, got {seq_len}")
        return space.shape[0], space.shape[1]
    size, n_tokens = space.shape[0], seq_len or 1
    if size % n_tokens != 0:
        raise ValueError(f"seq_len must divide the observation's size {size}, got {seq_len}")
    return n_tokens, size // n_tokens


def real_frames(frames: th.Tensor) -> th.Tensor:
    """Find the frames that are not the zero frames with which a frame stack begins an episode.

    :param frames: ``(batch, L, D)``, oldest first
    :return: ``(batch, L)`` bool: True from the first non-zero frame on, and always for the newest
    """
    non_zero = (frames != 0).any(dim=2)
    newest = th.arange(frames.shape[1], device=frames.device) == frames.shape[1] - 1
    return (non_zero | newest).cumsum(dim=1) > 0


class _ResidualBlock(nn.Module):
    """ReLU, convolution, ReLU, convolution, added to the input (Espeholt et al. 2018, fig. 3, right)."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.conv_in = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, images: th.Tensor) -> th.Tensor:
        """Add the residual to images.

        :param images: ``(batch, channels, height, width)``
        :return: ``(batch, channels, height, width)``
        """
        residual: th.Tensor = self.conv_out(F.relu(self.conv_in(F.relu(images))))
        return images + self.scale * residual


class ImpalaCNN(BaseFeaturesExtractor):
    """Residual CNN of IMPALA (Espeholt et al. 2018, fig. 3, right, without its LSTM), for images from 7x7 up.

    Each of the n residual branches is scaled by 1/sqrt(n). Without the scale, each would double the variance under
    SB3's orthogonal initialisation (gain sqrt(2)). The features of 84x84 images, and so the first values, would be near
    20.

    :param observation_space: channel-first image, ``(channels, height, width)``
    :param features_dim: size of the output
    :param channels: channels of each section; each section halves the image
    :param normalized_image: the image is already scaled, so dtype and bounds are not checked; as in SB3's ``NatureCNN``
    :raises ValueError: for a space other than channel-first images of at least 7x7, or sizes below 1
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        features_dim: int = 256,
        channels: tuple[int, ...] = (16, 32, 32),
        normalized_image: bool = False,
    ) -> None:
        features_dim = integer_of_at_least(1, "features_dim", features_dim)
        if len(channels) == 0:
            raise ValueError(f"channels must name at least one section, got {channels!r}")
        if not is_image_space(observation_space, normalized_image=normalized_image):
            raise ValueError(
                "observation_space must be an image (Box of 3 dimensions, uint8 in [0, 255]) for ImpalaCNN, got "
                f"{observation_space}; for images that are scaled already, pass normalized_image=True"
            )
        assert isinstance(observation_space, spaces.Box)
        n_channels, height, width = observation_space.shape
        if min(height, width) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"observation_space must be a channel-first image of at least {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE} for "
                f"ImpalaCNN, got shape {observation_space.shape} (channels, height, width)"
            )
        super().__init__(observation_space, features_dim)
        scale = (2 * len(channels)) ** -0.5
        sections: list[nn.Module] = []
        for n_out in channels:
            n_out = integer_of_at_least(1, "channels", n_out)
            sections += [
                nn.Conv2d(n_channels, n_out, kernel_size=3, padding=1),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
                _ResidualBlock(n_out, scale),
                _ResidualBlock(n_out, scale),
            ]
            n_channels, height, width = n_out, (height + 1) // 2, (width + 1) // 2
        self.cnn = nn.Sequential(*sections, nn.ReLU(), nn.Flatten())
        self.linear = nn.Sequential(nn.Linear(n_channels * height * width, features_dim), nn.ReLU())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Encode images.

        :param observations: ``(batch, channels, height, width)``, float in [0, 1]
        :return: ``(batch, features_dim)``, at least 0
        """
        features: th.Tensor = self.linear(self.cnn(observations))
        return features


ExtractorSpec = str | type[BaseFeaturesExtractor] | Mapping[str, Any]


class MultiInputExtractor(CombinedExtractor):
    """SB3's ``CombinedExtractor``, with an extractor of your choice for the keys that you name.

    :param observation_space: Dict of observations
    :param cnn_output_dim: output size of SB3's NatureCNN, for images that are not named
    :param normalized_image: images are already scaled, as in SB3; also given to the CNNs among ``extractors``
    :param extractors: for each key a registered name, a class, or ``{"class": name or class, **its arguments}``.
        Other keys get SB3's extractors. None or empty: exactly SB3's CombinedExtractor
    :raises ValueError: for a key that the observation lacks, an unknown name, an extractor that does not fit its key
    :raises TypeError: for an entry of another type
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        cnn_output_dim: int = 256,
        normalized_image: bool = False,
        extractors: Mapping[str, ExtractorSpec] | None = None,
    ) -> None:
        extractors = extractors or {}
        unknown = [key for key in extractors if key not in observation_space.spaces]
        if unknown:
            known = ", ".join(observation_space.spaces)
            raise ValueError(f"extractors must name keys of the observation ({known}), got {unknown}")
        named = {
            key: _build_extractor(key, spec, observation_space.spaces[key], normalized_image)
            for key, spec in extractors.items()
        }
        # SB3 must not see the named keys, because its NatureCNN fails on small images
        others = spaces.Dict({key: space for key, space in observation_space.spaces.items() if key not in named})
        super().__init__(others if named else observation_space, cnn_output_dim, normalized_image=normalized_image)
        if named:
            self._observation_space = observation_space
            self._features_dim += sum(extractor.features_dim for extractor in named.values())
            built = {**dict(self.extractors.items()), **named}
            # SB3 concatenates in the order of the space
            self.extractors = nn.ModuleDict({key: built[key] for key in observation_space.spaces})


def _build_extractor(
    key: str, spec: ExtractorSpec, space: gym.Space[Any], normalized_image: bool
) -> BaseFeaturesExtractor:
    """Build the extractor of one key of a Dict observation from its entry in ``extractors``."""
    kwargs: dict[str, Any] = {}
    value: Any = spec
    if isinstance(spec, Mapping):
        kwargs = dict(spec)
        if "class" not in kwargs:
            raise ValueError(f"extractors[{key!r}] must have a 'class' (a name or a class), got {dict(spec)!r}")
        value = kwargs.pop("class")
    extractor_class = resolve_features_extractor(value)
    if issubclass(extractor_class, CombinedExtractor):
        raise ValueError(f"extractors[{key!r}] must be an extractor of one observation, not of a Dict, got {value!r}")
    if normalized_image and issubclass(extractor_class, (NatureCNN, ImpalaCNN)):
        kwargs.setdefault("normalized_image", True)
    return extractor_class(space, **kwargs)


FEATURES_EXTRACTORS: dict[str, type[BaseFeaturesExtractor]] = {
    "transformer": TransformerExtractor,
    "impala_cnn": ImpalaCNN,
    "nature_cnn": NatureCNN,
    "flatten": FlattenExtractor,
    "combined": MultiInputExtractor,
}


def resolve_features_extractor(value: str | type[BaseFeaturesExtractor]) -> type[BaseFeaturesExtractor]:
    """Return the extractor class that a name stands for; a class passes through.

    :param value: a key of ``FEATURES_EXTRACTORS``, or a subclass of SB3's BaseFeaturesExtractor
    :return: the class
    :raises ValueError: for an unknown name
    :raises TypeError: for anything else
    """
    if isinstance(value, str):
        if value not in FEATURES_EXTRACTORS:
            names = ", ".join(FEATURES_EXTRACTORS)
            raise ValueError(
                f"features_extractor_class must be a class or one of {names}, got {value!r}"
                f"{did_you_mean(value, FEATURES_EXTRACTORS)}"
            )
        return FEATURES_EXTRACTORS[value]
    if not (isinstance(value, type) and issubclass(value, BaseFeaturesExtractor)):
        raise TypeError(f"features_extractor_class must be a name or a BaseFeaturesExtractor class, got {value!r}")
    return value
