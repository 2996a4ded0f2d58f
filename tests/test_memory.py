"""Out of memory, for real: the process may allocate only so much, and the allocator refuses."""

import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import SCRIPT, TINY, launch, unwrapped

# Long questions, short answers and many thin layers: nearly all memory is activations.
QUESTION = "un deux trois quatre cinq six sept huit neuf dix " * 40
LAYERS = 40


def start(folder: Path, name: str, *options, limit=resource.RLIM_INFINITY) -> subprocess.Popen:
    """A run that may have `limit` bytes of data; its output folder is `name`, its log `name`.txt."""
    command = [sys.executable, SCRIPT, "--model", "base", "--output", name, "--train-files", "d.chatml", *TINY,
               "--eval-fraction", "0", "--max-length", "4096", "--lora-dropout", "0.05", "--grad-accum", "1", *options]  # fmt: skip
    process = launch(command, folder, f"{name}.txt")
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
    return process


def peak(folder: Path, checkpointing: str) -> int:
    """The most bytes of data (heap and anonymous memory) that a run with this --gradient-checkpointing has."""
    largest, process = 0, start(folder, checkpointing, "--gradient-checkpointing", checkpointing)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "VmData" in status:
            largest = max(largest, int(status.split("VmData:")[1].split()[0]) * 1024)
        time.sleep(0.02)
    assert process.returncode == 0, (folder / f"{checkpointing}.txt").read_text()
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


@pytest.mark.slow
def test_out_of_memory(folder):
    """The run starts with no layer checkpointed, is refused memory, and goes on with half of them."""
    least, most = peak(folder, "all"), peak(folder, "none")
    assert most - least > 2**29, "checkpointing saves too little here for the test to mean anything"

    assert start(folder, "out", limit=(most + least) // 2).wait(240) == 0, (folder / "out.txt").read_text()
    printed = unwrapped((folder / "out.txt").read_text())
    assert re.search(rf"^memory .*\b0 layers .*\b{LAYERS // 2}$", printed, re.MULTILINE), printed
    assert (folder / "out/adapter_model.safetensors").is_file()
