"""A vLLM server of an environment of its own, and what it answers: nothing of vLLM is imported here."""

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 420  # that a server has to start
FLAGS = (
    "--dtype", "float32", "--enforce-eager", "--enable-lora", "--max-lora-rank", "16", "--max-model-len", "512",
    "--max-num-seqs", "8",
)  # fmt: skip
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_PLUGINS": "bslora_convert",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """status: of HTTP. tokens, logprobs: chosen ones; empty where there are none. first: seconds until everything was there."""

    status: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    seconds: float = 0.0
    text: str = ""


@dataclass
class Server:
    """A running server."""

    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    def ask(self, model: str, prompt: Sequence[int], tokens: int = 24) -> Answer:
        """A greedy completion of a prompt of tokens."""
        asked = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": 1,
            "seed": 0,
        }
        began = time.perf_counter()
        status, said = self.post("/v1/completions", {**asked, "ignore_eos": True, "return_token_ids": True})
        seconds = time.perf_counter() - began
        if status != 200:
            return Answer(status, seconds=seconds, text=said)
        choice = json.loads(said)["choices"][0]
        return Answer(200, tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]), seconds)

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """Status and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def memory(self) -> int:
        """Resident bytes of all its processes."""
        import psutil

        whole = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in (whole, *whole.children(recursive=True)))


@contextmanager
def serving(python: str, base: Path, place: Path, environment: Mapping[str, str], *flags: str) -> Iterator[Server]:
    """A server of a base model; `place` takes its log. It ends with the block.

    :raises RuntimeError: with the end of the log, when it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = place / "server.log"
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--host", "127.0.0.1"]
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*words, "--port", str(port), *FLAGS, *flags], stdout=file, stderr=file, env={**kept, **QUIET, **environment},
            start_new_session=True, cwd=place,
        )  # fmt: skip
    server = Server(port, process, log)
    try:
        _wait(server)
        yield server
    finally:
        with suppress(ProcessLookupError):  # it never started
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(server: Server) -> None:
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends and server.process.poll() is None:
        try:
            if server.get("/health")[0] == 200:
                return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"no server: {server.log.read_text(errors='replace')[-3000:]}")
