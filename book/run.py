"""One step of `make reproduce`: `python -m book.run STEP SIZE COMMAND...`, a chapter or the book.

Lines say which step runs, for how long already, and what is left by the recorded times. How long it
took goes into ``results/timings/SIZE.csv``.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = [*sorted(path.stem for path in ROOT.glob("notebooks/*.ipynb")), "explorer", "book"]
EVERY_S = 10.0


def read_times(path: Path) -> dict[str, dict[str, str]]:
    """Return the rows of a table of times by step; none where there is no table."""
    if not path.is_file():
        return {}
    with path.open() as lines:
        return {row["step"]: row for row in csv.DictReader(lines)}


def write_time(path: Path, step: str, seconds: float) -> None:
    """Add a step to a table of times, or replace it there."""
    about = {"cores": os.cpu_count(), "day": f"{datetime.now(UTC):%Y-%m-%d}"}
    rows = read_times(path) | {step: {"step": step, "seconds": f"{seconds:.1f}", **about}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as lines:
        table = csv.DictWriter(lines, ["step", "seconds", *about], lineterminator="\n")
        table.writeheader()
        table.writerows(rows[name] for name in STEPS if name in rows)


def left(step: str, usual_s: dict[str, float], spent_s: float) -> str:
    """Say what is left of a step and of those after it, by what they took when recorded."""
    if step not in usual_s:
        return ""
    later_s = sum(usual_s.get(name, 0.0) for name in STEPS[STEPS.index(step) + 1 :])
    all_s = max(usual_s[step] - spent_s, 0.0) + later_s
    return f" of about {usual_s[step]:.0f} s; {all_s / 60:.0f} min left in all"


def run(step: str, command: list[str], usual_s: dict[str, float]) -> tuple[int, float]:
    """Run a command and tell how far it is; return its exit status and seconds."""
    title = f"[{STEPS.index(step) + 1:2}/{len(STEPS)}] {step}"
    over, end = ("\r\033[K", "") if sys.stdout.isatty() else ("", "\n")
    started_s = time.monotonic()
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            spent_s = time.monotonic() - started_s
            told = f"{over}{title}: {spent_s:.0f} s{left(step, usual_s, spent_s)}"
            print(told, end=end, flush=True)
            with suppress(subprocess.TimeoutExpired):
                process.wait(EVERY_S)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
    seconds = time.monotonic() - started_s
    ended = "done" if process.returncode == 0 else "stopped"
    print(f"{over}{title}: {ended} after {seconds:.0f} s", flush=True)
    return process.returncode, seconds


def main(step: str, size: str, *command: str) -> int:
    """Run one step, and say how to go on if it did not end."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    recorded = read_times(ROOT / f"data/expected/timings/{size}.csv")
    usual_s = {name: float(row["seconds"]) for name, row in recorded.items()}
    status, seconds = run(step, list(command), usual_s)
    if status == 0:
        write_time(ROOT / f"results/timings/{size}.csv", step, seconds)
    else:
        again = {"quick": " QUICK=1", "full": " FULL=1"}.get(size, "")
        print(f"What is done is kept: `make book{again}` goes on from here.", file=sys.stderr)
    return abs(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
