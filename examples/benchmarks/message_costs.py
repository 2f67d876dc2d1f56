"""What the messages of an update cost, measured for a few processes, and on paper for many.

    python examples/benchmarks/message_costs.py --scaling logs/scaling/scaling.json

Gloo and NCCL send sums and rows round a ring of K processes, in steps of a latency and of bytes over a bandwidth:

    sum(K, n)  = 2 (K - 1) (latency + n / (K bandwidth))      a minibatch of more than 64 KiB
    rows(K, n) =   (K - 1) (latency + n / bandwidth)          everything else, and all with distributed="exact"

(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.) Latency and
bandwidth are those with which the two formulas come nearest to messages between two processes of this machine. They are
checked against messages between more, and against the time that training spends in messages by ``scaling.py``, whose
steps per second and bytes give the table for many processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist
from scaling import figures_of

from sb3_ppo_plus.distributed.process_group import MAX_GATHERED_BYTES, ProcessRanks

SIZES = [2**power for power in range(6, 25, 3)]
MANY = (8, 64, 512)


@dataclass(frozen=True)
class Network:
    """Between two processes.

    :param latency: seconds of a step
    :param bandwidth: bytes per second
    """

    latency: float
    bandwidth: float

    def sum(self, n_processes: int, n_bytes: float) -> float:
        """Return the seconds in which all processes have the sum of a vector."""
        return 2 * (n_processes - 1) * (self.latency + n_bytes / (n_processes * self.bandwidth))

    def rows(self, n_processes: int, n_bytes: float) -> float:
        """Return the seconds in which all processes have the vectors of all."""
        return (n_processes - 1) * (self.latency + n_bytes / self.bandwidth)


# Round numbers for what clusters have: NCCL or gloo over Ethernet of 25 Gbit/s, and over InfiniBand of 200 Gbit/s
CLUSTERS = {"25 Gbit/s, 30 us": Network(30e-6, 25e9 / 8), "200 Gbit/s, 5 us": Network(5e-6, 200e9 / 8)}


def time_messages(n_processes: int, rank: int, seconds: float, folder: str) -> None:
    """Send messages of all sizes as one process of a group; the first one writes the medians."""
    th.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_processes)
    ranks = ProcessRanks()
    figures = {}
    for n_bytes in SIZES:
        vector = th.zeros(n_bytes // 4)
        figures[f"rows {n_bytes}"] = median_seconds(partial(ranks.gather, vector), seconds)
        if n_bytes > MAX_GATHERED_BYTES:
            figures[f"sum {n_bytes}"] = median_seconds(partial(ranks.sum, vector), seconds)
    if rank == 0:
        Path(folder, "figures.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def median_seconds(send: Callable[[], object], seconds: float) -> float:
    """Return the median time of a message, after some that do not count."""
    started = time.perf_counter()
    for _ in range(10):
        send()
    # All must send equally many
    n_messages = th.tensor(max(10, round(10 * seconds / (time.perf_counter() - started))))
    dist.broadcast(n_messages, 0)
    taken = []
    for _ in range(int(n_messages)):
        started = time.perf_counter()
        send()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measured(n_processes: int, seconds: float) -> dict[str, float]:
    """Return the seconds of each kind and size of message between processes of this machine."""
    return figures_of(n_processes, lambda rank, folder: (n_processes, rank, seconds, folder), time_messages)


def on_paper(network: Network, n_processes: int, message: str) -> float:
    """Return the seconds of a message such as ``"sum 4096"``."""
    kind, n_bytes = message.split()
    formula = network.sum if kind == "sum" else network.rows
    return formula(n_processes, int(n_bytes))


def fitted(figures: dict[str, float]) -> Network:
    """Return the network with the least squared relative errors, for messages between two processes."""
    # Both formulas are linear in the latency and in 1 / bandwidth, so each message is an equation
    equations = [
        [on_paper(Network(1.0, np.inf), 2, message), on_paper(Network(0.0, 1.0), 2, message)] for message in figures
    ]
    seconds = np.array(list(figures.values()))
    latency, per_byte = np.linalg.lstsq(np.array(equations) / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    return Network(float(latency), 1 / float(per_byte))


def update_seconds(network: Network, row: dict[str, Any], n_processes: int) -> float:
    """Return the time of an update's messages. Those that do not belong to a minibatch have few bytes.

    :param row: an entry of scaling.json, with ``distributed=True``
    """
    n_others = row["messages_per_update"] - row["minibatches_per_update"]
    n_bytes = row["bytes_of_a_minibatch"]
    add = network.rows if n_bytes <= MAX_GATHERED_BYTES else network.sum
    return float(row["minibatches_per_update"] * add(n_processes, n_bytes) + n_others * network.rows(n_processes, 1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scaling", type=Path, required=True, help="scaling.json that scaling.py has written")
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 3, 4], help="2 and more, for the check")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each kind of message is measured")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    figures = {n_processes: measured(n_processes, arguments.seconds) for n_processes in arguments.processes}
    here = fitted(figures[2])
    print(f"latency {1e6 * here.latency:.0f} us, bandwidth {here.bandwidth / 1e9:.2f} GB/s\n")
    print("| message, bytes | " + " | ".join(f"{n}: measured, on paper (us)" for n in figures) + " |")
    print("|---" * (1 + len(figures)) + "|")
    for message in figures[2]:
        cells = [f"{1e6 * one[message]:.0f}, {1e6 * on_paper(here, n, message):.0f}" for n, one in figures.items()]
        print(f"| {message} | " + " | ".join(cells) + " |")
    rows = json.loads(arguments.scaling.read_text())
    print("\n| case | processes | ms of messages in an update: measured with waiting, on paper |\n|---|---|---|")
    for row in rows:
        if row["processes"] > 1 and row["distributed"]:
            in_messages = row["waiting"] * row["seconds_per_update"]
            paper = update_seconds(here, row, row["processes"])
            print(
                f"| {row['case']}, {row['scaling']} | {row['processes']} | {1e3 * in_messages:.1f}, {1e3 * paper:.1f} |"
            )
    alone = {row["case"]: row["seconds_per_update"] for row in rows if row["processes"] == 1 and row["distributed"]}
    networks = {"this machine": here, **CLUSTERS}
    print("\n| case | network | " + " | ".join(f"{n}: ms, efficiency" for n in MANY) + " |\n" + "|---" * 5 + "|")
    for row in rows:
        if row["processes"] == 2 and row["scaling"] == "weak" and row["distributed"]:
            for name, network in networks.items():
                costs = [update_seconds(network, row, n) for n in MANY]
                computing = alone[row["case"]]
                cells = [f"{1e3 * cost:.1f}, {100 * computing / (computing + cost):.0f}%" for cost in costs]
                print(f"| {row['case']} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
