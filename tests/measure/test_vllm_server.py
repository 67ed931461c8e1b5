"""The server process: what is refused before it starts, how it is watched, that it always ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.measure import engine_flags, vllm_server
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.measure.vllm_server import Server, error_message, free_port, telling_line

FLAGS = EngineFlags(max_loras=2, max_lora_rank=16, max_cpu_loras=4)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path)


def make_model(folder: Path, **behaviour: object) -> Path:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(behaviour))
    return model


def make_adapter(folder: Path, rank: int = 8) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").touch()
    return folder


def start(model: Path, adapters: dict[str, Path] | None = None, **options: float) -> Server:
    log = model.parent / "server.log"
    return Server(model, adapters or {}, FLAGS, free_port(), log, **options)


def is_running(process_id: int) -> bool:
    """Tell whether a process exists and is more than an entry that nobody has collected."""
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def ends(process_id: int, within_s: float = 10.0) -> bool:
    limit_s = time.monotonic() + within_s
    while is_running(process_id) and time.monotonic() < limit_s:
        time.sleep(0.05)
    return not is_running(process_id)


@pytest.mark.usefixtures("fake_vllm")
def test_adapters_come_and_go_while_the_server_runs(model: Path, tmp_path: Path) -> None:
    first, second = (make_adapter(tmp_path / name) for name in ("first", "second"))
    with start(model, {"a": first}) as running:
        assert running.failure() is None
        assert running.startup_s > 0
        running.unload_adapter("a")
        running.load_adapter("b", second)
        running.unload_adapter("b")
        with pytest.raises(AdapterTwinError, match=r"b: the server did not unload it .*found"):
            running.unload_adapter("b")
        with pytest.raises(AdapterTwinError, match="rank 32 exceeds max_lora_rank = 16"):
            running.load_adapter("c", make_adapter(tmp_path / "c", rank=32))


@pytest.mark.usefixtures("fake_vllm")
def test_a_port_in_use_is_refused_before_anything_starts(model: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        log = model / "log"
        with (
            pytest.raises(AdapterTwinError, match=f"port: {port} cannot be used .*in use"),
            Server(model, {}, FLAGS, port, log),
        ):
            pass
        assert not log.exists()


def test_a_missing_engine_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_flags, "engine_version", lambda: None)
    with (
        pytest.raises(AdapterTwinError, match="vllm: not installed in this environment"),
        start(model),
    ):
        pass


def test_a_folder_without_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError, match=r"config\.json"), start(tmp_path):
        pass


def test_adapters_are_checked_before_the_start(model: Path, tmp_path: Path) -> None:
    wide = make_adapter(tmp_path / "wide", rank=32)
    with (
        pytest.raises(AdapterTwinError, match="wide: rank 32 exceeds max_lora_rank = 16"),
        start(model, {"a": wide}),
    ):
        pass


KV_REFUSAL = """\
(EngineCore pid=7) ERROR 11-25 03:47:03 [core.py:1510] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-25 03:47:03 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-25 03:47:03 [core.py:1510]     raise ValueError(
(EngineCore pid=7) ERROR 11-25 03:47:03 [core.py:1510] ValueError: No available memory for it.
Traceback (most recent call last):
ValueError: No available memory for it.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
resource_tracker: There appear to be 2 leaked shared_memory objects to clean up at shutdown"""


@pytest.mark.usefixtures("fake_vllm")
def test_a_death_at_the_start_is_told_with_the_line_that_tells_why(tmp_path: Path) -> None:
    model = make_model(tmp_path, dies=KV_REFUSAL)
    expected = r"server: died \(exit status 1\): ValueError: No available memory .*server\.log"
    with pytest.raises(AdapterTwinError, match=expected) as caught, start(model):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("fake_vllm")
def test_a_server_that_is_not_ready_in_time_is_stopped(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "_healthy", lambda self: False)
    slow = start(model, ready_within_s=0.5)
    with pytest.raises(AdapterTwinError, match=r"not ready within 0\.5 s"), slow:
        pass
    assert slow.failure() == "server: not started"


@pytest.mark.parametrize("behaviour", [{}, {"stubborn": True}])
@pytest.mark.usefixtures("fake_vllm")
def test_an_exception_leaves_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: dict[str, bool]
) -> None:
    monkeypatch.setattr(vllm_server, "STOP_WITHIN_S", 0.5)
    model = make_model(tmp_path, child=True, **behaviour)
    processes = []
    with contextlib.suppress(KeyboardInterrupt), start(model) as running:
        assert running._process is not None
        processes = [running._process.pid, int((model / "child.pid").read_text())]
        assert all(map(is_running, processes))
        raise KeyboardInterrupt
    assert len(processes) == 2
    assert all(map(ends, processes))


OWNER = """\
import signal, sys, time
from pathlib import Path
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.measure import vllm_server
from adapter_twin.measure.vllm_server import Server, free_port
vllm_server.STOP_WITHIN_S = 0.5
# Where the tests run in the background, the shell has told them to ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
model = Path(sys.argv[1])
flags = EngineFlags(max_loras=2, max_lora_rank=16, max_cpu_loras=4)
with Server(model, {}, flags, free_port(), model / "log") as server:
    print(server._process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("is_stopped", [False, True])
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.usefixtures("fake_vllm")
def test_the_server_ends_with_its_owner(
    tmp_path: Path, death: signal.Signals, is_stopped: bool
) -> None:
    model = make_model(tmp_path, child=True)
    command = [sys.executable, "-c", OWNER, str(model)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as owner:
        assert owner.stdout is not None
        leader = int(owner.stdout.readline())
        child = int((model / "child.pid").read_text())
        assert is_running(leader)
        assert is_running(child)
        if is_stopped:
            os.killpg(leader, signal.SIGSTOP)
        owner.send_signal(death)
        owner.wait(60)
    assert ends(leader)
    assert ends(child)


@pytest.mark.usefixtures("fake_vllm")
def test_a_death_while_serving_is_told(model: Path) -> None:
    with start(model) as running:
        assert running._process is not None
        os.kill(running._process.pid, signal.SIGKILL)
        running._process.wait()
        assert "server: died (signal SIGKILL)" in (running.failure() or "")
        with pytest.raises(AdapterTwinError, match="died"):
            running.unload_adapter("a")


def test_without_an_exception_the_last_line_tells(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("usage: vllm serve\nvllm serve: error: unrecognized arguments: --nope\n\n")
    assert telling_line(log) == "vllm serve: error: unrecognized arguments: --nope"
    log.write_text("")
    assert telling_line(log) == "its log is empty"


def test_error_messages_fit_one_line() -> None:
    assert error_message('{"error": {"message": "no\\nsuch model."}}') == "no such model"
    assert error_message("Internal Server Error") == "Internal Server Error"
    assert error_message("") == "no reason given"
