"""A pytest plugin that keeps every foreign file that a test hands to a reader, for ``tests/fuzz/under_limits.py``.

``PYTHONPATH=tests/fuzz KEPT_FILES=kept pytest -p keep_files tests/saving tests/untrusted ...``
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEPT = Path(os.environ.get("KEPT_FILES", "kept")).resolve()
#: Larger ones are of tests of sizes
MAX_BYTES = 2**27


def keep(kind: str, content: bytes) -> None:
    """Write a file under its hash."""
    if len(content) <= MAX_BYTES:
        path = KEPT / kind / hashlib.sha256(content).hexdigest()[:24]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _before(module: Any, name: str, look: Callable[..., None]) -> None:
    original = getattr(module, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        look(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(module, name, wrapped)


def _keep_model(path: Any, *_: object) -> None:
    if isinstance(path, io.BytesIO):
        keep("model", path.getvalue())
    elif isinstance(path, str | Path):
        _keep_file("model", path if Path(path).is_file() else f"{path}.zip")


def _keep_file(kind: str, path: Any, *_: object) -> None:
    if Path(path).is_file() and Path(path).stat().st_size <= MAX_BYTES:
        keep(kind, Path(path).read_bytes())


def _keep_exported(path: Any, *_: object, **__: object) -> None:
    """Keep a policy's file and its contract together."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for part in (Path(path), Path(f"{path}.json")):
            if part.is_file() and part.stat().st_size <= MAX_BYTES:
                archive.write(part, part.name)
    keep("exported", file.getvalue())


def _keep_checkpoint(save_path: Any, follows_links: bool = True, *_: object) -> None:
    for folder in [Path(save_path)] if not follows_links else []:
        members = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for path in members:
                if path.stat().st_size <= MAX_BYTES:
                    archive.write(path, path.name)
        keep("checkpoint", file.getvalue())


def pytest_configure() -> None:
    """Look at what the readers get, before they read it."""
    from sb3_ppo_plus import export
    from sb3_ppo_plus.resuming import resume
    from sb3_ppo_plus.saving import untrusted_model, vec_normalize
    from sb3_ppo_plus.untrusted import plain_yaml, tensor_file

    _before(untrusted_model, "opened_model", _keep_model)
    _before(vec_normalize, "read_regular_file", functools.partial(_keep_file, "normalizer"))
    _before(plain_yaml, "read_regular_file", functools.partial(_keep_file, "config"))
    _before(resume, "newest_checkpoint", _keep_checkpoint)
    # Tests import it from the package
    _before(export, "load_exported", _keep_exported)
    _before(tensor_file, "_read_archive", lambda data, *_: keep("tensors", data))
    _before(tensor_file, "_read_legacy", lambda data, *_: keep("tensors", data))
