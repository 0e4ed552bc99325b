"""Training processes as tests start them: a port, the launcher of every host, and how they end."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from distill.distributed import end_process

ROOT = Path(__file__).parents[1]
WORKERS_DONE = "worker group successfully finished"  # what a launcher logs before it waits for the others
PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
HANGS_S = 200  # what needs seconds hangs by then; less than pytest's own limit, which would leave the processes behind


def free_port() -> int:
    """A port nobody listens on, where possible below those that outgoing connections get: nothing that connects takes
    it before its server does, not even a client that is waiting for just that server."""
    first = int(PORTS.read_text().split()[0]) if PORTS.is_file() else 49_152
    lowest = 20_000
    for port in random.SystemRandom().sample(range(lowest, first), 50) if first > lowest + 50 else []:
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def in_two_processes(work: Callable[..., None], *args: Any) -> None:
    """Call `work(rank, *args)` in two processes that find each other as a launcher's do.  Raises: what one raises."""
    mp.spawn(_one_of_two, (work, free_port(), args), nprocs=2)


def _one_of_two(rank: int, work: Callable[..., None], port: int, args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    work(rank, *args)
    end_process(0)


def launch(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start `accelerate launch WORDS` without GPUs; what it says of itself and its workers goes to `log`."""
    changed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "LOGLEVEL": "INFO"}
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *words],
            cwd=ROOT,
            env=os.environ | changed,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def wait_for_hosts(started: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Exit codes of the launchers of one run; None for one that had to be stopped.

    Once in a while torch's launcher waits for the other one although that has ended well (its barrier at the exit, five
    minutes long): when one has ended, the others get a while to follow. WORKERS_DONE is then the last that it logs.
    """
    ends = time.monotonic() + HANGS_S
    try:
        while any(process.poll() is None for process in started) and time.monotonic() < ends:
            if any(process.returncode is not None for process in started):
                ends = min(ends, time.monotonic() + 30)
            time.sleep(0.1)
        return [process.poll() for process in started]
    finally:
        for process in started:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a launcher. It has to be asked first: its workers are in sessions of their own and would outlive it."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
