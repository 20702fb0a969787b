"""Ranks on two hosts, as far as one machine has them: network namespaces that reach each other through one cable alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tensor_parallel import LIGHT, mpirun, needs_mpirun

pytestmark = needs_mpirun


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """The addresses of two namespaces, and their names."""
    names = [f"fuseline{os.getpid()}{letter}" for letter in "ab"]
    found = {f"10.77.{os.getpid() % 250}.{place}": name for place, name in enumerate(names, start=1)}
    with ExitStack() as stack:
        try:
            for name in names:
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "delete", name)
            _ip("link", "add", "eth7", "netns", names[0], "type", "veth", "peer", "name", "eth7", "netns", names[1])
            for address, name in found.items():
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth7")
                _ip("-n", name, "link", "set", "eth7", "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces: {error}")
        yield found


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


_MEETING = f"""{LIGHT}
import os, signal, sys, time
import torch
from mpi4py import MPI
from fuseline.runtime.mpi import one_job, world

with one_job(2):
    group = world(2)
    x = torch.arange(300000.0) + group.rank
    assert torch.equal(group.all_reduce(x), 2 * torch.arange(300000.0) + 1)
    alone = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).Get_size()
    with open(f"{{sys.argv[1]}}/{{group.rank}}", "w") as file:
        file.write(f"{{alone}} {{os.readlink('/proc/self/ns/net')}}")
    group.all_reduce(x)
    if group.rank == 1:
        with open(f"{{sys.argv[1]}}/ended", "w") as file:
            file.write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    group.all_reduce(x)
"""


@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip")
def test_ranks_of_two_hosts_meet_and_end_together(hosts: dict[str, str], tmp_path: Path) -> None:
    """MPI starts a rank on each through a command in the place of ssh. Each host has a folder of its own for what names
    the dead, and the launcher on one host has to end the rank on the other."""
    remote = tmp_path / "remote"
    names = " ".join(f"{address}) name={name};;" for address, name in hosts.items())
    remote.write_text(
        f'#!/bin/sh\nwhile [ "${{1#-}}" != "$1" ]; do shift; done\ncase $1 in {names} esac\nshift\n'
        'exec ip netns exec $name sh -c "$*"\n'
    )
    remote.chmod(0o700)
    flags = ("-launcher", "ssh", "-launcher-exec", str(remote), "-iface", "eth7", "-hosts", ",".join(hosts))
    within = ("ip", "netns", "exec", next(iter(hosts.values())))
    done = mpirun(2, "-c", _MEETING, str(tmp_path), flags=flags, within=within)
    ended = time.time()
    seen = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert [alone for alone, _ in seen] == ["1", "1"] and seen[0][1] != seen[1][1], "ranks share a host"
    assert done.returncode != 0 and "fuseline: rank 1 of 2 has ended without a word" in done.stderr
    assert ended - float((tmp_path / "ended").read_text()) < 10
