"""Engine flags: one description, as keyword arguments, as a command line and as variables."""

import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.measure import engine_flags
from adapter_twin.measure.engine_flags import EngineFlags, environment

FLAGS = EngineFlags(max_loras=2, max_lora_rank=8, max_cpu_loras=4, cpu_kv_cache_gib=0.25)


@pytest.fixture(params=["0.32.0", "0.32.0+cpu", None])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setattr(engine_flags, "engine_version", lambda: request.param)
    return request.param


def test_only_a_cpu_build_is_told_the_size_of_its_kv_cache(version: str | None) -> None:
    size = FLAGS.arguments().get("kv_cache_memory_bytes")
    assert size == (2**28 if version == "0.32.0+cpu" else None)


def test_the_base_model_alone_is_served_without_lora() -> None:
    flags = EngineFlags(max_loras=0, max_lora_rank=8, max_cpu_loras=0)
    assert not [name for name in flags.arguments() if "lora" in name]


def test_the_command_line_says_what_the_arguments_say() -> None:
    line = FLAGS.command_line()
    assert line[line.index("--max-loras") + 1] == "2"
    assert "--enable-lora" in line
    assert "--no-enable-prefix-caching" in line
    assert "--no-enforce-eager" in line
    assert len(line) == 2 * len(FLAGS.arguments()) - 3


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_loras": 5}, "max_cpu_loras"),
        ({"max_loras": -1}, "max_loras"),
        ({"max_lora_rank": 10}, "max_lora_rank"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"cpu_kv_cache_gib": 0.0}, "cpu_kv_cache_gib"),
    ],
)
def test_a_value_the_engine_would_refuse_is_named(change: dict[str, float], field: str) -> None:
    sound = {"max_loras": 2, "max_lora_rank": 8, "max_cpu_loras": 4}
    with pytest.raises(AdapterTwinError, match=f"^{field}: "):
        EngineFlags(**(sound | change))  # type: ignore[arg-type]


def test_on_a_cpu_the_worker_is_in_the_engines_process(version: str | None) -> None:
    told = environment(FLAGS).get("VLLM_ENABLE_V1_MULTIPROCESSING")
    assert told == ("0" if version == "0.32.0+cpu" else None)


def test_a_variable_that_would_replace_the_flags_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert environment(FLAGS)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with pytest.raises(AdapterTwinError, match=r"^cpu_kv_cache_gib: unset VLLM_CPU_KVCACHE_SPACE"):
        environment(FLAGS)


@pytest.mark.live
@pytest.mark.filterwarnings("default")
def test_vllm_reads_the_command_line_as_the_arguments() -> None:
    pytest.importorskip("vllm")
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    read = EngineArgs.from_cli_args(parser.parse_args(FLAGS.command_line()))
    given = FLAGS.arguments()
    assert {name: getattr(read, name) for name in given} == given
