"""The store through which processes find each other, without what an earlier attempt has left in it.

torchrun's agents keep one store for all attempts of ``--max-restarts``. The processes of a later one would find the
addresses of those that were killed, and wait for them or fail.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from typing import Any

import torch.distributed as dist

SECONDS_BETWEEN_LOOKS = 0.02


def outlives_attempts() -> bool:
    """Whether the launcher keeps the store of its processes when it starts them again."""
    return dist.is_torchelastic_launched()


def fresh_store(store: Any, rank: int, size: int) -> Any:  # noqa: ANN401  # Stores of torch.distributed
    """Return a part of a store that only the processes of this attempt use.

    Each process writes a token of its own, and a digest of all tokens that it sees. Where all digests are alike, each
    process has seen the new token of each other one, and none of an earlier attempt.

    :param store: a store that all processes share
    :param rank: number of this process
    :param size: how many processes there are; each calls this
    :raises RuntimeError: if some do not come within the timeout of the store
    """
    tokens, digests = ([f"sb3_ppo_plus/{name}/{each}" for each in range(size)] for name in ("tokens", "digests"))
    store.set(tokens[rank], uuid.uuid4().hex)
    until = time.monotonic() + store.timeout.total_seconds()
    while time.monotonic() < until:
        digest = hashlib.sha256(b"".join(store.multi_get(tokens))).hexdigest()
        store.set(digests[rank], digest)
        if all(each.decode() == digest for each in store.multi_get(digests)):
            # Documented, and not in the list of what the module exports
            return dist.PrefixStore(f"sb3_ppo_plus/{digest}", store)  # type: ignore[attr-defined]
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise RuntimeError(f"rank {rank} of {size} has waited for the others longer than {store.timeout}")
