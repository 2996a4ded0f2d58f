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


def print_row(row: dict, layers: int, found: dict) -> None:
    """A line of the table: the case, and what the tracer found."""
    plan = found["planned"]
    optimizer = plan["adapters and optimizer"] * 2 / 10  # 8-bit state: two of ten bytes a parameter
    planned = f"{sum(plan.values()) - plan['CUDA']:.2f}" if row["checkpointing"] == "all" else ""
    cells = ["NF4" if row.get("nf4", True) else "bf16", f"{row.get('rows', 1)} x {row.get('tokens', 2048):,}",
             row.get("dropout", 0.05), row.get("r", 32), f"{layers - found['spared']} of {layers}",
             f"{found['gflop']:.2f}", f"{found['peak'] / 2**30 + optimizer:.2f}", planned, f"{found['operators']:,}",
             f"{found['kernels']:,}"]  # fmt: skip
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    layers = parser.parse_args().layers
    llama.print_machine("torch", "transformers", "peft", "bitsandbytes")
    print(
        "\n| weights | tokens | dropout | r | layers recomputed | GFLOP a token | traced GiB | planned | operators | kernels |"
    )
    print("|---" * 10 + "|")
    jobs = [
        {
            **row,
            "layers": layers,
            "checkpointing": layers // 2 if row["checkpointing"] == "half" else row["checkpointing"],
        }
        for row in ROWS
    ]
    tracer = [sys.executable, str(llama.ROOT / "tests" / "fake_cuda" / "tracer.py")]
    with subprocess.Popen(tracer, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdin.write("\n".join(map(json.dumps, jobs)))
        process.stdin.close()
        for row, line in zip(ROWS, process.stdout, strict=True):
            found = json.loads(line)
            if "error" in found:
                sys.exit(found["error"])
            print_row(row, layers, found)
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
