"""What installed plugins cost: `zoo ls` with none and with 200, and what one look-up imports.

    python benchmarks/plugins.py [RUNS]

200 distributions with real metadata are written into a temporary folder and put on the path; this
environment's own plugins are left out of both sides. Figures are medians of CPU seconds (user and
system) over RUNS (15) processes each, interleaved, with the cached names of a second listing.
"""

from __future__ import annotations

import os
import pty
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

PLUGINS = 200
OURS = ("fusion_zoo", "_fusion_zoo", "__editable__", "_editable")
LISTING = [sys.executable, "-S", "-m", "zoo.cli", "ls"]
MODULE = """
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name=f"mix{number}", build="zoo_NAME:mix", kind="weights",
                           summary="a mean of what the members have in common")
            for number in range(3)]

def mix(tensors, *, key):
    return tensors[0].clone()
"""
METADATA = """Metadata-Version: 2.4
Name: fusion-zoo-NAME
Version: 1.0
Summary: Fusions
Requires-Python: >=3.11
Requires-Dist: fusion-zoo
Description-Content-Type: text/markdown

""" + "A line of the README, as distributions carry it in their metadata.\n" * 80


def install(folder: Path, name: str) -> None:
    (folder / f"zoo_{name}.py").write_text(MODULE.replace("NAME", name))
    info = folder / f"fusion_zoo_{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA.replace("NAME", name))
    (info / "entry_points.txt").write_text(f"[zoo.plugins]\n{name} = zoo_{name}\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text(f"zoo_{name}.py,,\n")


def piped(environment: dict[str, str]) -> float:
    process = subprocess.Popen(LISTING, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    return _cpu(process)


def on_a_terminal(environment: dict[str, str]) -> float:
    ours, theirs = pty.openpty()

    def read() -> None:
        try:
            while os.read(ours, 65536):
                pass
        except OSError:  # the other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    process = subprocess.Popen(LISTING, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    spent = _cpu(process)
    reader.join()
    os.close(ours)
    return spent


def _cpu(process: subprocess.Popen[bytes]) -> float:
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(LISTING)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def compare(
    run: Callable[[dict[str, str]], float], none: dict[str, str], many: dict[str, str], runs: int
) -> tuple[float, float]:
    for environment in (none, many):
        run(environment)  # fills the caches of names, of files and of bytecode
    spent = [(run(none), run(many)) for _ in range(runs)]
    return statistics.median(one for one, _ in spent), statistics.median(two for _, two in spent)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as work:
        others, plugins = Path(work, "others"), Path(work, "plugins")
        others.mkdir()
        plugins.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.lower().startswith(OURS) and entry.suffix != ".pth":
                (others / entry.name).symlink_to(entry)
        for number in range(PLUGINS):
            install(plugins, f"p{number:03}")
        path = [str(Path(__file__).resolve().parents[1]), str(others)]
        none = {**os.environ, "ZOO_CACHE": str(Path(work, "cache")),
                "PYTHONPATH": os.pathsep.join(path)}
        many = {**none, "PYTHONPATH": os.pathsep.join([*path, str(plugins)])}
        look_up = ("import sys, zoo; zoo.info('p007/mix1'); "
                   "print(*[name for name in sys.modules if name.startswith('zoo_p')])")
        imported = subprocess.check_output([sys.executable, "-S", "-c", look_up], env=many,
                                           text=True).split()
        piped(none)  # asks timm for its catalogue, once for every version of timm
        cold = piped(none), piped(many)
        print("| | none | 200 plugins | ratio | goal |\n| --- | --- | --- | --- | --- |")
        for what, (one, two) in (
            ("`zoo ls` into a pipe, CPU s", compare(piped, none, many, runs)),
            ("`zoo ls` on a terminal, CPU s", compare(on_a_terminal, none, many, runs)),
        ):
            print(f"| {what} | {one:.3f} | {two:.3f} | {two / one:.2f} | ≤ 1.5 |")
        print(f"| the first `zoo ls`, which imports them all, CPU s | {cold[0]:.3f} | "
              f"{cold[1]:.3f} | {cold[1] / cold[0]:.2f} | |")
        print(f"| plugin modules that a look-up of `p007/mix1` imports | | {len(imported)} | | 1 |")


if __name__ == "__main__":
    main()
