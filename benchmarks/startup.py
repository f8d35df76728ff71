"""What looking around costs: `import zoo`, and a listing against timm's own.

    python benchmarks/startup.py [RUNS]

Every figure is the median over RUNS processes (7): wall clock for the import, CPU (user and
system, of the process and its children) for the listings. The catalogue is built before, as it is
once for every version of timm.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

HEAVY = ("torch", "timm", "pluggy", "huggingface_hub")
LISTING = [sys.executable, "-m", "zoo.cli", "ls", "timm/resnet*"]
TIMM = [sys.executable, "-c", "import timm; timm.list_models('resnet*')"]


def timed(command: list[str]) -> tuple[float, float]:
    """Wall clock and CPU seconds of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return wall, usage.ru_utime + usage.ru_stime


def medians(command: list[str], runs: int) -> tuple[float, float]:
    timed(command)  # fills the caches of files and of bytecode
    walls, cpus = zip(*(timed(command) for _ in range(runs)), strict=True)
    return statistics.median(walls), statistics.median(cpus)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    bare, _ = medians([sys.executable, "-c", "pass"], runs)
    imported, _ = medians([sys.executable, "-c", "import zoo"], runs)
    check = f"import sys, zoo; print(*[name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.check_output([sys.executable, "-c", check], text=True).split()
    _, listing = medians(LISTING, runs)
    _, theirs = medians(TIMM, runs)
    rows = [
        ("import zoo, over bare Python", f"{(imported - bare) * 1e3:.0f} ms", "< 50 ms"),
        (f"of {', '.join(HEAVY)} imported", ", ".join(loaded) or "none", "none"),
        ("zoo ls 'timm/resnet*', CPU", f"{listing * 1e3:.0f} ms", "< 300 ms"),
        ("timm.list_models('resnet*'), CPU", f"{theirs * 1e3:.0f} ms", ""),
        ("times less CPU", f"{theirs / listing:.1f}", ">= 10"),
    ]
    print("| measure | result | goal |\n| --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
