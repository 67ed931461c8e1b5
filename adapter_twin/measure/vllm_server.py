"""Servers (``vllm serve``): checked before they start, watched, and always stopped."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.measure.ask import ask
from adapter_twin.measure.child import Child
from adapter_twin.measure.engine_flags import EngineFlags, environment, require_engine
from adapter_twin.measure.model_folder import check_adapters, check_model

HOST = "127.0.0.1"
READY_WITHIN_S = 900.0
"""Start-up may take that long: an 8B model with many slots captures CUDA graphs for minutes."""

STOP_WITHIN_S = 20.0
CALL_WITHIN_S = 120.0
HEALTH_WITHIN_S = 5.0
_POLL_EVERY_S = 0.2


class Server:
    """A context manager: inside it, a vLLM server answers on this machine.

    Adapters are loaded over HTTP once the server is healthy, not named on its command line: their
    number is then not bounded by the length of a command, an adapter that cannot be loaded is named
    in the error, and it is the way they come and go at run time. The engine does the same for both.

    Parameters
    ----------
    model_folder : pathlib.Path
    adapters : mapping of str to pathlib.Path
        PEFT folders by the name under which requests ask for them.
    flags : EngineFlags
    port : int
        On 127.0.0.1.
    log : pathlib.Path
        Keeps what the server prints; overwritten.
    ready_within_s : float

    Attributes
    ----------
    base_url : str
    model_name : str
        Under which requests ask for the base model.
    startup_s : float
        From the start of the process to a healthy server, before adapters are loaded.

    Raises
    ------
    AdapterTwinError
        On entering: no engine, no model folder, an adapter that is none or of too high a rank, the
        port is in use, or the server died or was not ready in time.
    """

    def __init__(
        self,
        model_folder: Path,
        adapters: Mapping[str, Path],
        flags: EngineFlags,
        port: int,
        log: Path,
        ready_within_s: float = READY_WITHIN_S,
    ) -> None:
        self.model_folder, self.adapters, self.flags = model_folder, adapters, flags
        self.port, self.log, self.ready_within_s = port, log, ready_within_s
        self.base_url = f"http://{HOST}:{port}"
        self.model_name = model_folder.resolve().name
        self.startup_s = float("nan")
        self._process: Child | None = None

    def __enter__(self) -> Self:
        check_model(self.model_folder)
        check_adapters(list(self.adapters.values()), self.flags.max_lora_rank)
        require(
            not self.adapters or self.flags.max_loras > 0,
            "max_loras: 0 slots serve no adapter; raise it or serve the base model alone",
        )
        require_engine()
        check_port(self.port)
        try:
            self._start()
            for name, folder in self.adapters.items():
                self.load_adapter(name, folder)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter into the running server; requests may name it from now on.

        Raises
        ------
        AdapterTwinError
            It is no adapter, its rank is too high, the name is taken, or the server is gone.
        """
        check_adapters([folder], self.flags.max_lora_rank)
        self._change("load", {"lora_name": name, "lora_path": str(folder.resolve())})

    def unload_adapter(self, name: str) -> None:
        """Take an adapter's name from the running server; raises as `load_adapter`."""
        self._change("unload", {"lora_name": name})

    def failure(self) -> str | None:
        """Return why the server is no longer running, in one line; None while it is."""
        process = self._process
        if process is None:
            return "server: not started"
        status = process.poll()
        if status is None:
            return None
        died = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"server: died ({died}): {telling_line(self.log)}; see {self.log}"

    def stop(self) -> None:
        """Stop the server and every process that it started."""
        process = self._process
        if process is None:
            return
        try:
            process.terminate()
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also after a second Ctrl-C
            process.kill_session()
            self._process = None

    def _start(self) -> None:
        begun_s = time.monotonic()
        allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "NO_COLOR": "1"}
        variables = environment(self.flags) | allowed
        self._process = Child(self._command(), variables, self.log)
        while not self._healthy():
            failure = self.failure()
            require(failure is None, str(failure))
            require(
                time.monotonic() - begun_s < self.ready_within_s,
                f"server: not ready within {self.ready_within_s:g} s; see {self.log}",
            )
            time.sleep(_POLL_EVERY_S)
        self.startup_s = time.monotonic() - begun_s

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "adapter_twin.measure.vllm_cli", "serve"),
            str(self.model_folder.resolve()),
            *("--served-model-name", self.model_name, "--host", HOST, "--port", str(self.port)),
            "--disable-uvicorn-access-log",  # a line per request, written by the event loop
            *self.flags.command_line(),
        ]

    def _healthy(self) -> bool:
        try:
            return ask(f"{self.base_url}/health", HEALTH_WITHIN_S)[0] == 200
        except AdapterTwinError:
            return False

    def _change(self, verb: str, body: dict[str, str]) -> None:
        name = body["lora_name"]
        try:
            url = f"{self.base_url}/v1/{verb}_lora_adapter"
            status, answer = ask(url, CALL_WITHIN_S, body)
        except AdapterTwinError as error:
            raise AdapterTwinError(
                self.failure() or f"{name}: the server did not {verb} it ({error}); see {self.log}"
            ) from None
        require(status == 200, f"{name}: the server did not {verb} it ({error_message(answer)})")


def check_port(port: int) -> None:
    """Raise `AdapterTwinError` if something listens on `port` already."""
    require(0 < port < 65536, f"port: must lie between 1 and 65535, got {port}")
    with socket.socket() as probe:
        # as the server does: connections that linger from an earlier one are no hindrance
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise AdapterTwinError(
                f"port: {port} cannot be used ({error.strerror}); choose another port"
            ) from None


def free_port() -> int:
    """Return a port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


_EXCEPTION = re.compile(r"(?:^|\] )[\w.]*(?:Error|Exception): \S.*")
_CONSEQUENCES = ("Engine core initialization failed", "EngineDeadError", "See root cause")


def telling_line(log: Path) -> str:
    """Return the line of a server's log that tells why it ended.

    The first exception that is no mere consequence of another process's; else the last line.
    """
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        found = _EXCEPTION.search(line)
        if found is not None and not any(sign in line for sign in _CONSEQUENCES):
            return found[0].removeprefix("] ").rstrip(".")
    return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")


def error_message(answer: str) -> str:
    """Return the message of an error that vLLM answered with, in one line."""
    try:
        message = json.loads(answer)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer
    return " ".join(str(message).split()).rstrip(".") or "no reason given"
