"""Gated Transformer-XL: a memory (see ``memory.py``) that attends to the last steps of the episode."""

from __future__ import annotations

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_ppo_plus.policies.memory import State, reset


class GTrXLMemory(nn.Module):
    """Gated Transformer-XL (Parisotto et al. 2019, "GTrXL": TrXL-I with GRU gating).

    In each layer, a step attends to itself and to the ``memory_length`` steps before it in its episode. The state is
    therefore the last inputs of each layer. No gradient flows into the state (Dai et al. 2019, section 3.2).

    :param features_dim: size of the features
    :param hidden_size: width of a token and of the output; a multiple of ``n_heads``
    :param n_layers: number of layers
    :param n_heads: number of attention heads
    :param memory_length: number of steps to which a layer looks back
    :param gate_bias: b_g of the gates; the larger it is, the closer each layer is to the identity at first
    :param d_feedforward: hidden width of each layer's MLP; None: 4 * hidden_size
    :raises ValueError: if ``hidden_size`` is not a multiple of ``n_heads``
    """

    def __init__(
        self,
        features_dim: int,
        hidden_size: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        memory_length: int = 64,
        gate_bias: float = 2.0,
        d_feedforward: int | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % n_heads != 0:
            raise ValueError(
                "memory_kwargs: hidden_size must be a multiple of n_heads, got "
                f"hidden_size={hidden_size} and n_heads={n_heads}"
            )
        self.output_dim = hidden_size
        self.memory_length = memory_length
        self.embedding = nn.Linear(features_dim, hidden_size)
        self.layers = nn.ModuleList(
            _Layer(hidden_size, n_heads, gate_bias, d_feedforward or 4 * hidden_size) for _ in range(n_layers)
        )
        # Registered before it is computed, so that loading without trust can stop where it is too large
        encoding = th.empty(memory_length + 1, hidden_size)
        self.register_buffer("distance_encoding", encoding, persistent=False)
        encoding.copy_(sinusoidal_encoding(th.arange(memory_length + 1), hidden_size))

    def initial_state(self, n_envs: int) -> State:
        """Return the state in which an episode begins, see :meth:`Memory.initial_state`.

        :param n_envs: number of environments
        :return: the last inputs of each layer, shape (n_layers, n_envs, memory_length, hidden_size), newest last, and
            how many of them belong to the episode, shape (1, n_envs, 1)
        """
        weight = self.embedding.weight
        inputs = weight.new_zeros(len(self.layers), n_envs, self.memory_length, self.output_dim)
        return inputs, weight.new_zeros(1, n_envs, 1)

    def step(self, features: th.Tensor, state: State, episode_starts: th.Tensor) -> tuple[th.Tensor, State]:
        """Take one step of every env; parameters as in :meth:`Memory.step`."""
        memory, n_remembered = reset(state, episode_starts)
        outputs, inputs = self._run(features.unsqueeze(1), memory, n_remembered[0])
        new_memory = th.cat([memory[:, :, 1:], th.stack(inputs)], dim=2)
        return outputs.squeeze(1), (new_memory, (n_remembered + 1).clamp(max=self.memory_length))

    def sequence(self, features: th.Tensor, state: State, episode_starts: th.Tensor) -> th.Tensor:
        """Take all steps of sequences at once; parameters as in :meth:`Memory.sequence`."""
        memory, n_remembered = reset(state, episode_starts[:, 0])
        return self._run(features, memory, steps_before(episode_starts, n_remembered[0]))[0]

    def _run(self, features: th.Tensor, memory: th.Tensor, n_before: th.Tensor) -> tuple[th.Tensor, list[th.Tensor]]:
        """Run the layers.

        :param features: shape (batch, length, features_dim)
        :param memory: earlier inputs of each layer, shape (n_layers, batch, memory_length, hidden_size)
        :param n_before: for each step, how many earlier steps of its episode are known, shape (batch, length)
        :return: outputs, and the inputs of each layer; all of shape (batch, length, hidden_size)
        """
        length, n_blocks, block_size = features.shape[1], 1, features.shape[1]
        if length > self.memory_length:
            # Each block of queries gets only the keys that it may attend to. So the cost grows with the length of the
            # sequence, not with its square
            block_size = self.memory_length
            n_blocks = -(-length // block_size)
        padding = n_blocks * block_size - length
        n_before = F.pad(n_before, (0, padding)).view(-1, n_blocks, block_size)
        visible = visible_keys(n_before, self.memory_length)
        tokens = self.embedding(F.pad(features, (0, 0, 0, padding)))
        inputs = []
        for layer, remembered in zip(self.layers, memory.detach(), strict=True):
            inputs.append(tokens[:, :length])
            tokens = layer(tokens, remembered, self.distance_encoding, visible)
        return tokens[:, :length], inputs


class _Layer(nn.Module):
    """One layer: attention and MLP, both on normed inputs and gated (Parisotto et al. 2019, eq. 5 and fig. 1)."""

    def __init__(self, hidden_size: int, n_heads: int, gate_bias: float, d_feedforward: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = _RelativeAttention(hidden_size, n_heads)
        self.attention_gate = GRUGate(hidden_size, gate_bias)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, d_feedforward), nn.ReLU(), nn.Linear(d_feedforward, hidden_size)
        )
        self.mlp_gate = GRUGate(hidden_size, gate_bias)

    def forward(
        self, tokens: th.Tensor, memory: th.Tensor, distance_encoding: th.Tensor, visible: th.Tensor
    ) -> th.Tensor:
        context = self.attention_norm(th.cat([memory, tokens], dim=1))
        tokens = self.attention_gate(tokens, F.relu(self.attention(context, distance_encoding, visible)))
        output: th.Tensor = self.mlp_gate(tokens, F.relu(self.mlp(self.mlp_norm(tokens))))
        return output


class GRUGate(nn.Module):
    """Gating instead of a residual sum (Parisotto et al. 2019, section 3.2, "Gated-Recurrent-Unit-type gating").

    :param size: width
    :param bias: b_g; the larger it is, the more of ``x`` passes at first
    """

    def __init__(self, size: int, bias: float) -> None:
        super().__init__()
        # One matrix for each input: W_r, W_z, W_g for y; U_r, U_z for x; U_g for r * x. Saved models have these names
        self.of_y = nn.Linear(size, 3 * size, bias=False)
        self.of_x = nn.Linear(size, 2 * size, bias=False)
        self.of_reset_x = nn.Linear(size, size, bias=False)
        self.bias = nn.Parameter(th.full((size,), float(bias)))

    def forward(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        """Mix the stream with the output of a submodule.

        :param x: the stream, shape (..., size)
        :param y: the submodule's output, shape (..., size)
        :return: shape (..., size)
        """
        y_reset, y_update, y_candidate = self.of_y(y).chunk(3, dim=-1)
        x_reset, x_update = self.of_x(x).chunk(2, dim=-1)
        update = th.sigmoid(y_update + x_update - self.bias)
        candidate = th.tanh(y_candidate + self.of_reset_x(th.sigmoid(y_reset + x_reset) * x))
        return x + update * (candidate - x)


class _RelativeAttention(nn.Module):
    """Attention with relative positions (Dai et al. 2019, section 3.3) over a window of the past."""

    def __init__(self, hidden_size: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.distance_key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        # u and v of eq. 4 in Dai et al.
        self.content_bias = nn.Parameter(th.zeros(n_heads, 1, hidden_size // n_heads))
        self.distance_bias = nn.Parameter(th.zeros(n_heads, 1, hidden_size // n_heads))

    def forward(self, context: th.Tensor, distance_encoding: th.Tensor, visible: th.Tensor) -> th.Tensor:
        """Let the steps that follow the memory attend to the memory and to each other.

        :param context: memory and steps, shape (batch, memory_length + n_blocks * block_size, hidden_size)
        :param distance_encoding: encodings of distances 0 to memory_length, shape (memory_length + 1, hidden_size)
        :param visible: what :func:`visible_keys` returns
        :return: shape (batch, n_blocks * block_size, hidden_size)
        """
        n_blocks, block_size, n_keys = visible.shape[1:]
        memory_length = n_keys - block_size
        query = self._by_head(self.query(context[:, memory_length:]))
        query = query.reshape(*query.shape[:2], n_blocks, block_size, -1)
        # Both have the shape (batch, heads, blocks, keys, size of a head)
        key, value = (
            self._by_head(part).unfold(2, n_keys, block_size).transpose(-1, -2)
            for part in (self.key(context), self.value(context))
        )
        distance_key = self._by_head(self.distance_key(distance_encoding).unsqueeze(0)).unsqueeze(2)
        content_scores = (query + self.content_bias.unsqueeze(1)) @ key.transpose(-1, -2)
        distance_scores = (query + self.distance_bias.unsqueeze(1)) @ distance_key.transpose(-1, -2)
        scores = (content_scores + by_key(distance_scores)) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~visible.unsqueeze(1), -th.inf).softmax(dim=-1)
        mixed: th.Tensor = self.out((weights @ value).permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))
        return mixed

    def _by_head(self, tokens: th.Tensor) -> th.Tensor:
        return tokens.view(*tokens.shape[:2], self.n_heads, -1).transpose(1, 2)


def steps_before(episode_starts: th.Tensor, n_remembered: th.Tensor) -> th.Tensor:
    """Count, for each step, the earlier steps of its episode that the sequence or the memory holds.

    :param episode_starts: bool, shape (n_sequences, length)
    :param n_remembered: number of steps in the memory at the sequence's start, shape (n_sequences, 1)
    :return: int64, shape (n_sequences, length)
    """
    times = th.arange(episode_starts.shape[1], device=episode_starts.device)
    last_start = th.where(episode_starts, times, -1).cummax(dim=1).values
    return th.where(last_start < 0, times + n_remembered.long(), times - last_start)


def visible_keys(n_before: th.Tensor, memory_length: int) -> th.Tensor:
    """Mark what each step may attend to: itself and at most ``memory_length`` steps before it in its episode.

    :param n_before: number of earlier steps in each step's episode, shape (batch, n_blocks, block_size)
    :param memory_length: number of steps to look back
    :return: bool, shape (batch, n_blocks, block_size, memory_length + block_size). The keys of a block are the
        ``memory_length`` steps before it and its own steps
    """
    block_size = n_before.shape[-1]
    queries = th.arange(block_size, device=n_before.device).unsqueeze(1)
    keys = th.arange(memory_length + block_size, device=n_before.device)
    distances = queries + memory_length - keys
    return (distances >= 0) & (distances <= n_before.clamp(max=memory_length).unsqueeze(-1))


def by_key(distance_scores: th.Tensor) -> th.Tensor:
    """Put scores of distances into the order of the keys (the "relative shift" of Dai et al. 2019, appendix B).

    :param distance_scores: scores of distances 0 to memory_length, shape (..., block_size, memory_length + 1)
    :return: shape (..., block_size, memory_length + block_size); 0 where a key has another distance
    """
    block_size, n_distances = distance_scores.shape[-2:]
    n_keys = n_distances - 1 + block_size
    # The padded rows have n_keys + 1 elements. Cut again into rows of n_keys, each row shifts by one key more
    padded = F.pad(distance_scores.flip(-1), (0, block_size)).flatten(-2)
    return padded[..., : block_size * n_keys].view(*distance_scores.shape[:-1], n_keys)


def sinusoidal_encoding(positions: th.Tensor, size: int) -> th.Tensor:
    """Encode positions by sines and cosines (Vaswani et al. 2017, section 3.5).

    :param positions: shape (n,)
    :param size: size of each encoding
    :return: shape (n, size)
    """
    frequencies = 10_000 ** (-th.arange(0, size, 2) / size)
    angles = positions.unsqueeze(1) * frequencies
    return th.cat([angles.sin(), angles.cos()], dim=1)[:, :size]
