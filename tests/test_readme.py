"""The README says nothing that the program does not know."""

import re
import shlex
import subprocess
import sys

import pytest
from runs import ROOT

import merge_lora
import train_sft_dolores as sft

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("python3 ") and ".py" in line
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_understood(command):
    parse = {"train_sft_dolores.py": sft.parse_args, "merge_lora.py": merge_lora.parse_args}[command[1]]
    parse(command[2:])


def test_the_documented_command_is_the_defaults():
    (documented,) = [command for command in COMMANDS if "--lora-target-modules" in command]
    assert sft.parse_args(documented[2:]) == sft.parse_args([])


def test_every_flag_it_names_exists():
    texts = [subprocess.run([sys.executable, ROOT / name, "--help"], capture_output=True, text=True, check=True).stdout
             for name in ("train_sft_dolores.py", "merge_lora.py")]  # fmt: skip
    others = {"--modelfile", "--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-endpoint"}  # Ollama's, torchrun's
    assert set(re.findall(r"--[a-z][a-z0-9-]+", README)) - others <= set(
        re.findall(r"--[a-z][a-z0-9-]+", "".join(texts))
    )


def test_files_it_names_exist():
    for name in ("train.chatml", "Modelfile", "requirements.txt", "LICENSE"):
        assert (ROOT / name).is_file()
    targets = set(re.findall(r"^make ([a-z-]+)", README, re.M))
    assert targets and all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets)
