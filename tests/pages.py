"""app.py in a process of its own, as its users start it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.launching import free_port

ROOT = Path(__file__).parents[1]


@dataclass
class AppProcess:
    """A page that answers at `url`; `output` is what it wrote, None until it has ended."""

    url: str
    process: subprocess.Popen[str]
    output: str | None = None

    def end(self, signum: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            self.output = self.process.communicate(timeout=30)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.output = self.process.communicate()[0]
        return self.process.returncode


@contextmanager
def app_process(**env: str) -> Iterator[AppProcess]:
    """app.py without a flag in an environment of these variables, and none of ours for it; fails if it wrote a
    traceback."""
    port = str(free_port())
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MMMAMBA_", "GRADIO_"))}
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GRADIO_SERVER_PORT": port} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    page = AppProcess(f"http://127.0.0.1:{port}", process)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"{page.url}/config", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline, "app.py does not answer"
                time.sleep(0.2)
        yield page
    finally:
        if page.output is None:
            page.end()
    assert "Traceback" not in (page.output or ""), page.output
