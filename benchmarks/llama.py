"""What the benchmarks share: Llama-3.1-8B's shape, the machine in one line, processes measured in turns."""

import argparse
import itertools
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses its CPU kernels; the figures say what that costs

LLAMA31_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
              "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
              "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}  # fmt: skip


def print_machine(*packages: str) -> None:
    """Processor, cores, memory and system of this machine, and the installed versions of these packages."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    print(f"machine   {cpu}, {os.cpu_count()} cores, {memory:.0f} GiB memory, {platform.system()}")
    print(f"versions  {', '.join(f'{name} {version(name)}' for name in packages)}", flush=True)


def measured(command: list, log: Path, timeout: float | None = None, **environment) -> tuple[int, float, float]:
    """(exit status, seconds, peak GiB) of a child process, its output in `log`; ended after `timeout` seconds."""
    start, peak = time.monotonic(), 0
    with open(log, "w") as stream:
        words = list(map(str, command))
        process = subprocess.Popen(words, stdout=stream, stderr=stream, env=os.environ | environment)
        while process.poll() is None:
            peak = max(peak, peak_kib(process.pid))
            if timeout and time.monotonic() - start > timeout:
                process.kill()
            time.sleep(0.05)
    return process.returncode, time.monotonic() - start, peak / 2**20


def peak_kib(pid: int) -> int:
    """Peak memory of a process so far; 0 once it has ended. ru_maxrss would count what its parent had when it started it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int((re.search(r"VmHWM:\s+(\d+)", status) or [0, 0])[1])


# ---- Sides that take turns, each run in a process of its own ----


def side_parser(sides: Iterable[str]) -> argparse.ArgumentParser:
    """The flags of a benchmark that compares sides."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--sides", nargs="+", choices=sides, default=list(sides), metavar="SIDE", help=f"of {', '.join(sides)}")
    add("--rounds", type=int, default=3, help="runs of each side")
    add("--folder", type=Path, help=argparse.SUPPRESS)  # one side in a process of its own
    return parser


def take_turns(options, folder: Path) -> dict[str, list[dict]]:
    """Runs of each side: the JSON object that this benchmark printed last when it was given `--folder`, and `peak` in GiB.

    The sides share a datasets cache in the folder.
    """
    runs = {side: [] for side in options.sides}
    for number, side in itertools.product(range(options.rounds), options.sides):
        command = [sys.executable, *sys.argv, "--folder", folder, "--sides", side]
        code, seconds, peak = measured(command, folder / "log", HF_DATASETS_CACHE=str(folder / "cache"))
        printed = (folder / "log").read_text()
        if code:
            sys.exit(f"{side}: exit status {code}\n{printed[-2000:]}")
        runs[side].append(json.loads(printed.splitlines()[-1]) | {"peak": peak})
        print(f"  round {number + 1}  {side:<24}{seconds:7.0f} s", flush=True)
    return runs
