"""What `from adapter_twin import ...` gives, and what it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import adapter_twin


@pytest.mark.parametrize("name", adapter_twin.__all__)
def test_every_public_name_is_there_by_itself(name: str) -> None:
    found = getattr(adapter_twin, name)
    assert found.__name__ == name
    assert name in dir(adapter_twin)


def test_type_checkers_see_the_same_names() -> None:
    source = Path(adapter_twin.__file__).read_text()
    told = source.partition("if TYPE_CHECKING:")[2].partition("__version__")[0]
    words = set(told.replace(",", " ").replace("(", " ").replace(")", " ").split())
    assert set(adapter_twin.__all__) <= words


def test_a_wrong_name_is_an_error_as_of_any_module() -> None:
    with pytest.raises(ImportError, match="simulat"):
        exec("from adapter_twin import simulat")


def test_importing_takes_less_than_half_a_second_of_work() -> None:
    took = "time.process_time() - begun"
    code = f"import time; begun = time.process_time(); import adapter_twin; print({took})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


def test_a_run_by_hand_takes_five_lines() -> None:
    from adapter_twin import (
        EngineConfig,
        Lengths,
        Workload,
        deal_adapters,
        load_calibration,
        service_of,
        simulate,
    )

    lengths = Lengths(mean_input_tokens=223, mean_output_tokens=198)
    workload = Workload(adapters=deal_adapters(8, [0.1], [16]), duration_s=60, lengths=lengths)
    engine = EngineConfig(
        model="llama-3.1-8b-instruct", max_loras=8, max_cpu_loras=8, max_lora_rank=16
    )
    run = simulate(workload, engine, load_calibration("auto", engine.model))
    assert "8 adapters on 8 slots" in repr(run)
    assert "mean_ttft_ms" in repr(service_of(run))
