"""What the benchmarks share: a Llama of random NF4 weights on any device, the machine in one line, measured processes."""

import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
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
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_llama(shape: dict, device, attention: str, nf4: bool = True):
    """LlamaForCausalLM in bfloat16 with random weights, its projections in NF4, quantized one by one.

    No more than one projection is ever held in 16 bits, so eight billion parameters take 6 GiB and seconds on a GPU.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoModelForCausalLM, LlamaConfig

    config, dtype = LlamaConfig(**shape), torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for parent in list(model.modules()) if nf4 else []:
        for name, module in list(parent.named_children()):
            if name not in PROJECTIONS:
                continue
            weight = torch.randn(module.weight.shape, device=device, dtype=dtype) * 0.02
            data, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
            sizes = {"input_features": weight.shape[1], "output_features": weight.shape[0]}
            linear = Linear4bit(**sizes, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            linear.weight = Params4bit(data, requires_grad=False, quant_state=state, blocksize=64, quant_type="nf4",
                                       bnb_quantized=True, module=linear)  # fmt: skip
            linear.quant_state = state
            linear.support_avx512bf16_for_cpu = False  # the trainer's load_base says why
            setattr(parent, name, linear)
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                value = torch.randn(value.shape, device=device, dtype=dtype) * 0.02 + (value.dim() == 1)
                setattr(module, name, torch.nn.Parameter(value))
    model.is_loaded_in_4bit = nf4  # PEFT and TRL ask for this
    model.config.use_cache = False
    return model.requires_grad_(False)


def machine() -> str:
    """Processor, cores, memory and system of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB memory, {platform.system()}"


def versions(*names: str) -> str:
    """The installed versions of these packages."""
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in names)


def measured(command: list[str], log: Path, timeout: float | None = None, **environment) -> tuple[int, float, float]:
    """(exit status, seconds, peak GiB) of a child process, its output in `log`; ended after `timeout` seconds."""
    start, peak = time.monotonic(), 0
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | environment)
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


def answer_of(command: list[str], folder: Path, **environment) -> dict:
    """The JSON object that a child process prints last, and its `peak` in GiB; the benchmark ends where it fails."""
    code, _, peak = measured(command, folder / "log", **environment)
    text = (folder / "log").read_text()
    if code:
        sys.exit(f"{' '.join(command[1:])}: exit status {code}\n{text[-2000:]}")
    return json.loads(text.splitlines()[-1]) | {"peak": peak}
