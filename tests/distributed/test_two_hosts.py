"""Two hosts with a rank each: network namespaces with addresses of their own, and torchrun's rendezvous over them."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch as th
from launched_run import environment_of_ranks, launch, torchrun
from states import assert_same_bits

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]

PORT = 29517
LIMIT = 180


@dataclass
class Host:
    """A network namespace.

    :param name: its name
    :param interface: its end of the cable
    :param address: its address
    """

    name: str
    interface: str
    address: str


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if shutil.which("ip") is None:
        pytest.skip("there is no program `ip` (iproute2), which makes network namespaces")
    number = os.getpid() % 65536
    network = f"10.{200 + number % 50}.{number // 50 % 256}"
    made = [Host(f"sb3plus{number}{end}", f"v{number}{end}", f"{network}.{index}") for index, end in enumerate("ab", 1)]
    with contextlib.ExitStack() as cleaning:
        try:
            for host in made:
                ip("netns", "add", host.name)
                # With a namespace, its end of the cable goes, and with this the other end
                cleaning.callback(ip, "netns", "delete", host.name)
            first, second = made
            ip(
                "link",
                "add",
                first.interface,
                "netns",
                first.name,
                "type",
                "veth",
                "peer",
                "name",
                second.interface,
                "netns",
                second.name,
            )
            for host in made:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
                ip("-n", host.name, "link", "set", host.interface, "up")
                ip("-n", host.name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield made


def start(host: Host, first: Host, folder: Path, *arguments: str, max_restarts: int = 0) -> subprocess.Popen[str]:
    """Start one rank on a host, with what a user would set there."""
    given = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "run"]
    given += ["--rdzv-endpoint", f"{first.address}:{PORT}", "--local-addr", host.address]
    # Both have the name of this machine, by which torchrun would find out who keeps the store
    given += ["--rdzv-conf", f"is_host={host == first}", "--max-restarts", str(max_restarts)]
    script = Path(__file__).with_name("launched_run.py")
    command = ["ip", "netns", "exec", host.name, *torchrun(*given), str(script), str(folder), *arguments]
    environment = environment_of_ranks(GLOO_SOCKET_IFNAME=host.interface)
    output = (folder / f"output_{host.name}").open("w")
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment)


def run_on(hosts: list[Host], folder: Path, *arguments: str, max_restarts: int = 0) -> list[int | None]:
    """Run the script on all hosts; return the exit codes of the launchers."""
    started = [start(host, hosts[0], folder, *arguments, max_restarts=max_restarts) for host in hosts]
    try:
        return [launcher.wait(LIMIT) for launcher in started]
    finally:
        for launcher in started:
            # torchrun ends its ranks too
            launcher.terminate()
            launcher.wait()


def printed_by(hosts: list[Host], folder: Path) -> str:
    return "".join((folder / f"output_{host.name}").read_text() for host in hosts)


@pytest.mark.parametrize("distributed", ["True", "exact"])
def test_two_hosts_train_as_one_host_with_two_ranks(distributed, hosts, tmp_path):
    folders = [tmp_path / "two", tmp_path / "one"]
    for folder in folders:
        folder.mkdir()
    statuses = run_on(hosts, folders[0], distributed, "none", "0", "0")
    assert statuses == [0, 0], printed_by(hosts, folders[0])
    results = [th.load(path, weights_only=False) for path in sorted(folders[0].glob("result_*.pt"))]
    assert len(results) == 2
    assert_same_bits(results[0]["state"], results[1]["state"])
    assert_same_bits(results, launch(folders[1], distributed).results)


def test_both_hosts_are_restarted_after_a_kill_on_one(hosts, tmp_path):
    folders = [tmp_path / "two", tmp_path / "one"]
    for folder in folders:
        folder.mkdir()
    statuses = run_on(hosts, folders[0], "exact", "sigkill", "1", "100", max_restarts=2)
    assert statuses == [0, 0], printed_by(hosts, folders[0])
    results = [th.load(path, weights_only=False) for path in sorted(folders[0].glob("result_*.pt"))]
    assert_same_bits(results, launch(folders[1], "exact").results)
