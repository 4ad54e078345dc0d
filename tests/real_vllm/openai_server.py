"""vLLM's OpenAI server in processes of its own, as people run it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx


@contextmanager
def serving(
    model: Path, name: str, options: Mapping[str, object], log: Path, **variables: str
) -> Iterator[str]:
    """The address of a server that answers; what it wrote is shown where it does not start."""
    port = free_port()
    given = {"model": model, "served-model-name": name, "host": "127.0.0.1", "port": port}
    words = [str(x) for name, value in {**given, **options}.items() for x in (f"--{name}", value)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | variables
    with log.open("w") as file:
        running = subprocess.Popen(
            [*command, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        assert answers(address, running, seconds=900), log.read_text()
        yield address
    finally:
        running.terminate()
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:  # one that still starts does not listen
            os.killpg(running.pid, signal.SIGKILL)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(address: str, running: subprocess.Popen, seconds: float) -> bool:
    """Whether a server that starts comes to answer before it ends, and within so many seconds."""
    until = time.monotonic() + seconds
    while running.poll() is None and time.monotonic() < until:
        try:
            return httpx.get(f"{address}/health").is_success
        except httpx.TransportError:
            time.sleep(0.5)
    return False
