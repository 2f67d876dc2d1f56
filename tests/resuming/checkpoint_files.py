"""Checkpoints of made-up files, without a model."""

from sb3_ppo_plus.resuming.checkpoint_directory import checkpoint_directories, write_checkpoint

FILES = {"model.zip": bytes(range(256)) * 40, "training_state.json": b'{"a": 1}', "training_state.bin": b"\x01" * 999}


def files_at(num_timesteps):
    return {name: content + str(num_timesteps).encode() for name, content in FILES.items()}


def write(save_path, *steps, mean_return=None):
    return [write_checkpoint(save_path, files_at(n), n, mean_return) for n in steps]


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def remaining(save_path):
    return [int(path.name.split("_")[2]) for path in checkpoint_directories(save_path)]
