#!/usr/bin/env python3
"""The memory plan against a trace of the CUDA path on fake tensors, at Llama-3.1-8B's shape: no GPU, minutes.

    python benchmarks/fake_cuda.py              # all rows
    python benchmarks/fake_cuda.py --layers 2   # a model of two layers: seconds a row

tests/fake_cuda/tracer.py says what a trace counts and what it cannot show. The optimizer's state is the plan's in both
columns, and what the driver takes is in neither.
"""

import argparse
import json
import subprocess
import sys

import llama

TRACER = llama.ROOT / "tests" / "fake_cuda" / "tracer.py"
GIB = 2**30
FREE = {"all": 0.0, "half": 0.5, "none": 1.0}  # --gradient-checkpointing, as the share of layers left without it
ROWS = [
    {"checkpointing": "all"},
    {"checkpointing": "half"},
    {"checkpointing": "none"},
    {"checkpointing": "none", "dropout": 0},
    {"checkpointing": "all", "tokens": 4096},
    {"checkpointing": "half", "tokens": 4096},
    {"checkpointing": "none", "tokens": 4096},
    {"checkpointing": "all", "tokens": 8192},
    {"checkpointing": "none", "tokens": 8192},
    {"checkpointing": "all", "rows": 2},
    {"checkpointing": "half", "rows": 8},
    {"checkpointing": "none", "r": 8},
    {"checkpointing": "none", "r": 128},
    {"checkpointing": "all", "nf4": False},
    {"checkpointing": "none", "nf4": False},
]
KEPT = [{"dropout": 0.05}, {"dropout": 0}, {"dropout": 0, "r": 8}, {"dropout": 0, "r": 128}]


def trace(jobs: list[dict]):
    """Yield what the tracer finds, job by job; one process does them all."""
    process = subprocess.Popen(
        [sys.executable, str(TRACER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )  # fmt: skip
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

    def job(row: dict) -> dict:
        return row | {"layers": layers, "checkpointing": layers - round(FREE[row["checkpointing"]] * layers)}

    print(
        "| weights | tokens | dropout | r | layers checkpointed | traced GiB | planned | difference | operators | kernels |"
    )
    print("|---" * 10 + "|")
    for row, found in zip(ROWS, trace(list(map(job, ROWS))), strict=True):
        optimizer = found["planned"]["optimizer state"]
        traced = found["peak"] / GIB + optimizer
        planned = sum(found["planned"].values()) - found["planned"]["CUDA context"]
        cells = ["NF4" if row.get("nf4", True) else "bf16", f"{row.get('rows', 1)} x {row.get('tokens', 2048):,}",
                 row.get("dropout", 0.05), row.get("r", 32), f"{layers - found['free']} of {layers}", f"{traced:.2f}",
                 f"{planned:.2f}", f"{planned - traced:+.3f}", f"{found['operators']:,}", f"{found['kernels']:,}"]  # fmt: skip
        print("|", " | ".join(map(str, cells)), "|", flush=True)

    # Two layers with one and with both uncheckpointed: the difference is one layer's.
    print("\n| dropout | r | bytes a token kept by an uncheckpointed layer, its input not counted |")
    print("|---" * 3 + "|")
    lengths = (2048, 8192)
    few = {"documents": 1, "trained": 0.0005}  # the loss's last gradients are released at an uncertain moment
    jobs = [
        row | few | {"job": "kept", "layers": 2, "checkpointing": n, "tokens": t}
        for row in KEPT
        for t in lengths
        for n in (1, 0)
    ]
    kept = [found["kept"] for found in trace(jobs)]
    for number, row in enumerate(KEPT):
        one, both, long_one, long_both = kept[4 * number : 4 * number + 4]
        short, long = both - one, long_both - long_one
        a_token = (long - short) / (lengths[1] - lengths[0])
        cells = [row["dropout"], row.get("r", 32), f"{a_token:,.0f}"]
        print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
