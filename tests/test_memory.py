"""Out of memory, for real: what the process may allocate is limited, and the allocator refuses."""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, TINY

# Long questions and short answers, many thin layers: what counts are the activations.
QUESTION = "un deux trois quatre cinq six sept huit neuf dix " * 40
LAYERS = 32


def start(folder: Path, *options, limit=resource.RLIM_INFINITY) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train_sft_dolores.py"), "--train-files", "d.chatml", *TINY, "--eval-fraction",
               "0", "--max-length", "4096", "--lora-dropout", "0.05", "--grad-accum", "1", *options]  # fmt: skip
    bound = lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # noqa: E731
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=bound)  # fmt: skip


def peak(process: subprocess.Popen) -> int:
    """Bytes of data (heap and anonymous memory) at most, of a run to its end."""
    largest = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "VmData" in status:
            largest = max(largest, int(status.split("VmData:")[1].split()[0]) * 1024)
        time.sleep(0.02)
    assert process.returncode == 0, process.stdout.read()
    return largest


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama31) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("memory")
    text = "".join(f"<|system|>\n{i}\n<|user|>\n{QUESTION}\n<|assistant|>\noui {i}\n" for i in range(7))
    (folder / "d.chatml").write_text(text)
    shutil.copytree(tiny_llama31, folder / "base")
    config = AutoConfig.from_pretrained(tiny_llama31, num_hidden_layers=LAYERS)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "base")
    return folder


def test_out_of_memory(folder):
    options = ("--model", "base")
    least = peak(start(folder, *options, "--output", "all", "--gradient-checkpointing", "all"))
    most = peak(start(folder, *options, "--output", "none", "--gradient-checkpointing", "none"))
    assert most - least > 2**29, "checkpointing saves too little here for the test to mean anything"

    between = start(folder, *options, "--output", "out", limit=(most + least) // 2)
    printed = between.communicate(timeout=240)[0]
    assert between.returncode == 0, printed
    assert "memory     not enough with 0 layers checkpointed; going on with 16" in printed
    assert (folder / "out/adapter_model.safetensors").is_file()
