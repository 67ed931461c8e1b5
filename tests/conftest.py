"""Fixtures that several test modules share, and a compilation that workers share."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import pytest
from hypothesis import settings
from numba.core.dispatcher import Dispatcher

from adapter_twin import cli

# An example that takes long on a busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# The tests are parallel already: work that a verb shares out over processes stays in this one.
joblib.parallel_config("sequential")


def pytest_configure(config: pytest.Config) -> None:
    """Let a worker that needs a function which another one compiles wait for numba's cache."""
    if not hasattr(config, "workerinput"):
        return
    file = os.open(__file__, os.O_RDWR)  # only to lock places in it, one for each function
    compile_alone = Dispatcher.compile

    def compile_once(self: Any, signature: Any) -> Any:
        function = f"{self.py_func.__module__}.{self.py_func.__qualname__}{signature}"
        place = int.from_bytes(hashlib.sha256(function.encode()).digest()[:7])
        fcntl.lockf(file, fcntl.LOCK_EX, 1, place)
        try:
            return compile_alone(self, signature)
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN, 1, place)

    Dispatcher.compile = compile_once


@pytest.fixture
def dask_scheduler() -> Iterator[str]:
    """Start a Dask cluster of one worker on ports that nobody has, and give its address."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        dashboard_address="127.0.0.1:0",
        protocol="tcp",
        processes=False,
    ) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install `fake_vllm.py` as the vLLM of this process and of those that it starts."""
    site = tmp_path / "site"
    package = site / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (site / "vllm", site / "vllm" / "entrypoints", package):
        (folder / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("fake_vllm.py"), package / "main.py")
    metadata = site / "vllm-0.32.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in an empty folder; return status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert isinstance(exit_.value.code, int)
        return (exit_.value.code, *capsys.readouterr())

    return call
