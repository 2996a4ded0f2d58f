#!/usr/bin/env python3
"""Time, memory and size of merge_lora.py, of a plain copy of the same shards, and of the usual PEFT snippet.

    python benchmarks/merge.py                       # Llama-3.1-8B's shape, 16 GB: needs 60 GB of disk
    python benchmarks/merge.py --gguf Q8_0 Q4_K_M    # with a GGUF of these types too
    python benchmarks/merge.py --layers 4            # a smaller model of the same width

The base holds random bf16 weights in four shards, made on the spot and removed afterwards. Runs alternate, each in
a process of its own, with the base to be read from the disk and with the base in the page cache (where it fits into
memory); each begins with an empty write queue and after a rest, and no side calls fsync. Peak memory is the kernel's figure
for the process (VmHWM), read every 50 ms. The copy is `cp`; its time is the floor for whoever writes a folder. That
comparison is of the safetensors alone; each type of GGUF is then written once, without safetensors.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

import llama
from llama import LLAMA31_8B, PROJECTIONS, ROOT

SHAPE = {name: LLAMA31_8B[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads",
                                             "num_key_value_heads", "head_dim", "vocab_size")}  # fmt: skip
# Seconds. A virtual machine gives freed memory back to its host, and who touches it first pays several times the price:
# without a rest the side that starts faster after the other's files are deleted would find it still at hand.
REST = 15
PEFT_SNIPPET = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


def skeleton(base: Path):
    """The model without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))


def make_base(base: Path, layers: int) -> None:
    """tiny_llama31 with the real width: configuration, tokenizer, four shards of random bf16 numbers."""
    import parts
    import torch

    shutil.copytree(parts.tiny_llama31(), base)
    (base / "model.safetensors").unlink()
    config = json.loads((base / "config.json").read_text()) | SHAPE | {"num_hidden_layers": layers}
    (base / "config.json").write_text(json.dumps(config))
    # 64 Mi normal numbers, read from another place for each tensor: drawing eight billion would take minutes.
    pool = (torch.randn(1 << 26) * 0.02).bfloat16().view(torch.uint8).numpy().data
    tensors = [(name, list(value.shape), 2 * value.numel()) for name, value in skeleton(base).named_parameters()]
    total, shards, weight_map = sum(size for *_, size in tensors), [[], [], [], []], {}
    done = 0
    for tensor in tensors:
        number = min(3, 4 * done // total)
        shards[number].append(tensor)
        weight_map[tensor[0]] = f"model-{number + 1:05}-of-00004.safetensors"
        done += tensor[2]
    for number, shard in enumerate(shards):
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape, size in shard:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        with open(base / f"model-{number + 1:05}-of-00004.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, _, left in shard:
                start = 2 * (zlib.crc32(name.encode()) % (1 << 20))
                while left:
                    piece = pool[start : start + min(left, len(pool) - start)]
                    left, start = left - file.write(piece), 0
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapter(base: Path, folder: Path) -> None:
    """A random LoRA adapter of rank 32 on all projections, as the trainer writes it."""
    import torch
    from engine import complete_adapter
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors.torch import save_file

    folder.mkdir()
    config = LoraConfig(r=32, lora_alpha=64, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = inject_adapter_in_model(config, skeleton(base), low_cpu_mem_usage=True)
    names = {name.replace(".default", ""): value.shape for name, value in model.named_parameters() if "lora_" in name}
    lora = {f"base_model.model.{name}": shape for name, shape in names.items()}
    save_file({name: torch.randn(shape) * 0.02 for name, shape in lora.items()}, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    complete_adapter(base, folder)


def measured(command: list[str], log: Path, read: list[Path], cached: bool) -> tuple[float, float, float]:
    """(seconds, peak GiB, CPU seconds) of a child process that must succeed, its input in the page cache or not."""
    os.sync()
    for file in read:
        with open(file, "rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cached and stream.read(1 << 24):
                pass
    time.sleep(REST)
    before = os.times()
    code, seconds, peak = llama.measured(command, log)
    after = os.times()
    if code:
        sys.exit(f"{' '.join(command[:3])} …: exit status {code}\n{log.read_text()[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, peak, cpu


def available() -> int:
    """Bytes of main memory that can still be had."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def compare(work: Path, layers: int, rounds: int) -> None:
    """Copy and merge in turns, and their medians."""
    base, adapter = work / "base", work / "adapter"
    make_base(base, layers)
    make_adapter(base, adapter)
    shards = sorted(base.glob("*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards)
    commands = {
        "copy": ["cp", *map(str, shards), str(work / "copy")],
        "merge": [sys.executable, str(ROOT / "merge_lora.py"), "--adapter", str(adapter), "--output", str(work / "merge"), "--gguf", "none"],
    }  # fmt: skip
    print(
        f"{'':<16}{'base':<12}{'copy':>9}{'merge':>9}{'ratio':>7}{'peak GiB':>10}{'CPU: copy':>12}{'merge':>9}   {size / 1e9:.1f} GB"
    )
    for cached in (False, True):
        runs = {side: [] for side in commands}
        if cached and size > 0.8 * available():
            print("merge_lora.py   cached      left out: the base does not fit into the page cache")
            continue
        for _ in range(rounds):
            for side, command in commands.items():
                if side == "copy":
                    (work / side).mkdir()
                runs[side].append(measured(command, work / "log", shards, cached))
                shutil.rmtree(work / side)
        copy, merge = (statistics.median(seconds for seconds, *_ in runs[side]) for side in commands)
        copy_cpu, merge_cpu = (statistics.median(cpu for *_, cpu in runs[side]) for side in commands)
        peak = max(peak for _, peak, _ in runs["merge"])
        print(f"merge_lora.py   {'cached' if cached else 'on disk':<12}{copy:>7.1f} s{merge:>7.1f} s{merge / copy:>7.2f}"
              f"{peak:>10.2f}{copy_cpu:>10.1f} s{merge_cpu:>7.1f} s   "
              f"{', '.join(f'{m[0] / c[0]:.2f}' for c, m in zip(*runs.values(), strict=True))}",
              flush=True)  # fmt: skip


def ggufs(work: Path, kinds: list[str]) -> None:
    """Each type of GGUF from the base and the adapter of `compare`."""
    shards = sorted((work / "base").glob("*.safetensors"))
    for kind in kinds:
        merge = [sys.executable, str(ROOT / "merge_lora.py"), "--adapter", str(work / "adapter"), "--gguf-only"]
        merge += ["--output", str(work / "gguf"), "--gguf", kind]
        seconds, peak, cpu = measured(merge, work / "log", shards, False)
        size = next((work / "gguf").glob("*.gguf")).stat().st_size
        print(
            f"{kind:<16}on disk              {seconds:>7.1f} s{'':>7}{peak:>10.2f}{cpu:>21.1f} s   {size / 1e9:.2f} GB"
        )
        shutil.rmtree(work / "gguf")


def peft(work: Path, layers: int) -> None:
    """The usual snippet on the largest model of this width whose weights fit into the memory at hand."""
    layer, rest = 436_224_000, 2_101_354_496  # bytes in bf16: one layer; embedding, head and norm
    fitting = int((0.75 * available() - rest - 2 * 2**30) / layer)
    if fitting < 1:
        print("PEFT snippet    left out: too little memory")
        return
    if fitting < layers:
        for folder in ("base", "adapter"):
            shutil.rmtree(work / folder)
        make_base(work / "base", fitting)
        make_adapter(work / "base", work / "adapter")
    shards = list((work / "base").glob("*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards)
    folders = [str(work / name) for name in ("base", "adapter", "peft")]
    seconds, peak, _ = measured([sys.executable, "-c", PEFT_SNIPPET, *folders], work / "log", shards, False)
    print(f"PEFT snippet    on disk              {seconds:>7.1f} s{'':>7}{peak:>10.2f}   {size / 1e9:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers; Llama-3.1-8B has 32")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of copy and merge")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--gguf", nargs="*", default=["Q8_0"], help="types of GGUF to write")
    parser.add_argument("--no-peft", action="store_true", help="leave the PEFT snippet out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-benchmark-", dir=args.folder) as folder:
        print(f"machine        {llama.machine()}")
        compare(Path(folder), args.layers, args.rounds)
        ggufs(Path(folder), args.gguf)
        if not args.no_peft:
            peft(Path(folder), args.layers)


if __name__ == "__main__":
    main()
