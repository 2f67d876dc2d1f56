"""Processes of a second attempt do not read what the first one has left in their store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from sb3_ppo_plus.distributed.fresh_store import fresh_store


def begin(store, size):
    """Begin an attempt, with a thread for each rank; return the part of the store that they have."""

    def of_rank(rank):
        own = fresh_store(store, rank, size)
        before = own.check(["address"])
        own.add("come", 1)
        return before

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(of_rank, range(size)))
    assert not any(found), "an earlier attempt was here"
    return fresh_store_of(store, size)


def fresh_store_of(store, size):
    """The part of the store that the last attempt has used."""
    digests = {digest.decode() for digest in store.multi_get([f"sb3_ppo_plus/digests/{rank}" for rank in range(size)])}
    (digest,) = digests
    return dist.PrefixStore(f"sb3_ppo_plus/{digest}", store)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_attempt_has_a_part_of_the_store_of_its_own(size):
    store = dist.HashStore()
    for _ in range(5):
        own = begin(store, size)
        assert own.add("come", 0) == size
        own.set("address", "of a process that will be killed")


@pytest.mark.parametrize("ranks", [[0], [1], [0, 2]])
def test_an_attempt_to_which_not_all_have_come_does_not_disturb_the_next(ranks):
    store = dist.HashStore()
    begin(store, 3).set("address", "of a process that will be killed")
    store.set_timeout(timedelta(seconds=0.5))
    for rank in ranks:
        with pytest.raises(RuntimeError, match=f"rank {rank} of 3 has waited for the others longer than 0:00:00.5"):
            fresh_store(store, rank, 3)
    store.set_timeout(timedelta(seconds=60))
    assert begin(store, 3).add("come", 0) == 3
