"""The formats of checkpoints, and how the state in an older one becomes the state of the next.

Every version reads the manifest in the same way, to verify the files: its fields keep their names and meanings, and new
ones are optional. What may change from format to format is the state that ``read_state`` returns.

A new format is needed only where an older version must not read what is written. Then raise :data:`FORMAT`, enter the
way from the format before in :data:`MIGRATIONS`, and add an archive as ``tests/saving/old_checkpoints.py`` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sb3_ppo_plus.errors import InvalidCheckpointError
from sb3_ppo_plus.untrusted.strict_json import short

TrainingState = dict[str, Any]

FORMAT = 1
"""The format that is written. Format 1 is that of version 0.1 and of all versions since."""

MIGRATIONS: dict[int, Callable[[TrainingState], TrainingState]] = {}
"""For each older format, the function that turns its state into the state of the next format."""


def check_format(manifest: dict[str, Any], name: str) -> None:
    """Check that a checkpoint has a format that can be read.

    :param manifest: the contents of its ``manifest.json``
    :param name: what to call the checkpoint in the error
    :raises InvalidCheckpointError: for another format; the message says which version wrote it
    """
    written = manifest["format"]
    if type(written) is int and (written == FORMAT or written in MIGRATIONS):
        return
    readable = ", ".join(str(number) for number in (*sorted(MIGRATIONS), FORMAT))
    versions = manifest.get("versions")
    version = versions.get("sb3-ppo-plus") if isinstance(versions, dict) else None
    raise InvalidCheckpointError(
        f"{name}: its format is {short(written)}, this version reads {readable}. sb3-ppo-plus {short(version)} wrote "
        "it: install that version or a later one"
    )


def migrated(state: TrainingState, written: int) -> TrainingState:
    """Bring a state to the present format.

    :param state: what ``read_state`` has returned
    :param written: the format in which it was written, see :func:`check_format`
    """
    for number in range(written, FORMAT):
        state = MIGRATIONS[number](state)
    return state
