#!/usr/bin/env python3
"""FLOPs, memory and kernels of a step at Llama-3.1-8B's shape, traced on fake CUDA tensors: no GPU, minutes.

    python benchmarks/fake_cuda.py              # all rows
    python benchmarks/fake_cuda.py --layers 2   # a model of two layers: seconds a row

tests/fake_cuda/tracer.py says what a trace counts and what it cannot show. The optimizer's state is the plan's in both
columns, what the driver takes is in neither; the plan is that of --dry-run, with all layers recomputing.
"""

import argparse
import json
import subprocess
import sys

import llama

GIB = 2**30
ROWS = [
    {"checkpointing": "all"},
    {"checkpointing": "half"},
    {"checkpointing": "none"},
    {"checkpointing": "none", "dropout": 0},
    {"checkpointing": "all", "tokens": 4096},
    {"checkpointing": "none", "tokens": 4096},
    {"checkpointing": "all", "tokens": 8192},
    {"checkpointing": "all", "rows": 2},
    {"checkpointing": "all", "r": 128},
    {"checkpointing": "all", "nf4": False},
]
COLUMNS = ("weights", "tokens", "dropout", "r", "layers recomputed", "GFLOP a token", "traced GiB", "planned", "operators",
           "kernels")  # fmt: skip


def trace(jobs: list[dict]):
    """Yield what the tracer finds, job by job; one process does them all."""
    command = [sys.executable, str(llama.ROOT / "tests" / "fake_cuda" / "tracer.py")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    process.stdin.write("\n".join(map(json.dumps, jobs)))
    process.stdin.close()
    for line in process.stdout:
        found = json.loads(line)
        if "error" in found:
            sys.exit(found["error"])
        yield found
    if process.wait():
        sys.exit("the tracer failed; run it alone: tests/fake_cuda/tracer.py")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    layers = parser.parse_args().layers
    print(llama.machine())
    print(llama.versions("torch", "transformers", "peft", "bitsandbytes"), "\n")
    print("|", " | ".join(COLUMNS), "|")
    print("|---" * len(COLUMNS) + "|")
    mode = {"all": "all", "half": layers // 2, "none": "none"}
    jobs = [row | {"layers": layers, "checkpointing": mode[row["checkpointing"]]} for row in ROWS]
    for row, found in zip(ROWS, trace(jobs), strict=True):
        parts = found["planned"]
        optimizer = parts["adapters and optimizer"] * 2 / 10  # 8-bit state: two of ten bytes a parameter
        planned = sum(parts.values()) - parts["CUDA"] if row["checkpointing"] == "all" else None
        cells = ["NF4" if row.get("nf4", True) else "bf16", f"{row.get('rows', 1)} x {row.get('tokens', 2048):,}",
                 row.get("dropout", 0.05), row.get("r", 32), f"{layers - found['spared']} of {layers}",
                 f"{found['gflop']:.2f}", f"{found['peak'] / GIB + optimizer:.2f}", f"{planned:.2f}" if planned else "",
                 f"{found['operators']:,}", f"{found['kernels']:,}"]  # fmt: skip
        print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
