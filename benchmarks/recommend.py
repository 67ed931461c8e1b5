"""Time `recommend` on 384 adapters, cold and warm: ``python -m benchmarks.recommend``.

Cold is a whole process, from the start of the interpreter to the printed answer, with the compiled
twin in numba's cache; warm is reading the file and answering, in a process that has answered.
"""

import statistics
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import yaml

from adapter_twin.errors import AdapterTwinError
from adapter_twin.plan.demand import load_demand
from adapter_twin.plan.recommend import recommend
from benchmarks.__main__ import verdict, wall_s

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "recommend.yaml"
REPETITIONS = 9
COLD_BAR_S = 5.0
WARM_BAR_S = 0.5

COLD = (
    "import sys, warnings; warnings.simplefilter('ignore');"
    "from adapter_twin.plan.demand import load_demand;"
    "from adapter_twin.plan.recommend import recommend;"
    "from adapter_twin.cli.report import print_json;"
    "print_json(recommend(load_demand(sys.argv[1])))"
)


def workloads(folder: Path) -> dict[str, Path]:
    """Return files to answer: adapters dealt, listed one by one, and more than one GPU serves."""
    content = yaml.safe_load(EXAMPLE.read_text())
    listed = {**content, "adapters": [asdict(a) for a in load_demand(EXAMPLE).adapters]}
    heavy = {**content, "adapters": {**content["adapters"], "request_rates": [0.05]}}
    files = {"dealt": EXAMPLE}
    for name, changed in {"listed": listed, "refused": heavy}.items():
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(changed))
    return files


def answer(file: Path) -> None:
    demand = load_demand(file)
    with suppress(AdapterTwinError):
        recommend(demand)


def main() -> None:
    warnings.simplefilter("ignore")  # the lengths and ranks asked for may be extrapolations
    command = [sys.executable, "-c", COLD, str(EXAMPLE)]

    def cold() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    cold()  # compiles, where nothing is in numba's cache yet
    cold_s = statistics.median(wall_s(cold) for _ in range(3))
    print(f"384 adapters, cold {cold_s:.2f} s (bar {COLD_BAR_S} s) {verdict(cold_s <= COLD_BAR_S)}")
    with tempfile.TemporaryDirectory() as folder:
        for name, file in workloads(Path(folder)).items():
            answer(file)
            times_s = [wall_s(lambda file=file: answer(file)) for _ in range(REPETITIONS)]
            warm_s = statistics.median(times_s)
            holds = verdict(warm_s <= WARM_BAR_S)
            print(f"384 adapters, {name}, warm {warm_s:.2f} s (bar {WARM_BAR_S} s) {holds}")


if __name__ == "__main__":
    main()
