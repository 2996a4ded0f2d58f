"""More processes than one (gloo, on this CPU), by the launchers that users have."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import ROOT, TINY, dialogues, record, run
from safetensors.torch import load_file

TRAIN = ("--train-files", "d.chatml", "--lora-dropout", "0", "--output", "out", *TINY)


@pytest.fixture
def folder(tmp_path, short_smollm2) -> Path:
    (tmp_path / "d.chatml").write_text(dialogues(80))
    (tmp_path / "base").symlink_to(short_smollm2)
    return tmp_path


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
              "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip


def torchrun(folder: Path, *options, launcher=TORCHRUN) -> subprocess.Popen:
    """The launcher with its workers, in a session of their own; what they print goes to a file."""
    script = str(ROOT / "train_sft_dolores.py")
    command = [sys.executable, "-m", *launcher, script, "--model", "base", *TRAIN, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "torchrun.txt", "w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def two_machines(folders: list[Path], *options) -> list[subprocess.Popen]:
    """One launcher in each folder, with one worker each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = ("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
              "--master-port", port)  # fmt: skip
    return [torchrun(folder, *options, launcher=(*common, "--node-rank", str(i))) for i, folder in enumerate(folders)]


def wait_for(path: Path, process: subprocess.Popen):
    while not path.exists():
        assert process.poll() is None, (path.parent.parent / "torchrun.txt").read_text()[-3000:]
        time.sleep(0.05)


def losses(folder: Path) -> list[str]:
    """Loss and gradient norm of each step, as printed."""
    lines = (line for file in ("log.txt", "torchrun.txt") if (folder / file).exists()
             for line in (folder / file).read_text().splitlines())  # fmt: skip
    return [line.split("  lr ")[0] for line in lines if line.startswith("step") and "loss" in line]


def same_adapter(one: Path, other: Path):
    one, other = (load_file(folder / "out/adapter_model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    for name in one:  # sums in another order, over ten steps at a learning rate of 1e-2
        assert (one[name] - other[name]).abs().max() < 1e-4, name


@pytest.fixture
def other_machine(folder, tmp_path_factory) -> Path:
    """A working folder that shares the data, the base and --output, and nothing else."""
    other = tmp_path_factory.mktemp("other")
    for name in ("d.chatml", "base", "out"):
        (other / name).symlink_to(folder / name)
    return other


def test_two_processes_are_one_with_twice_the_accumulation(folder, other_machine, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    for name in ("d.chatml", "base"):
        (alone / name).symlink_to(folder / name)
    assert run(alone, "--model", "base", *TRAIN, "--grad-accum", "4")[0] == 0

    both = torchrun(folder, "--grad-accum", "2")
    assert both.wait(240) == 0, (folder / "torchrun.txt").read_text()[-3000:]
    assert losses(folder) == losses(alone) and len(losses(folder)) == 15  # ten steps, five evaluations, each said once
    same_adapter(folder, alone)
    assert record(folder)["results"]["eval_loss_after"] == pytest.approx(record(alone)["results"]["eval_loss_after"])

    # Two machines: one that dies ends the run; one process goes on and ends with the same adapter.
    shutil.rmtree(folder / "out")
    machines = two_machines([folder, other_machine], "--grad-accum", "2")
    wait_for(other_machine / "out/checkpoint-4/complete.json", machines[0])
    psutil.Process(machines[1].pid).children()[-1].kill()
    assert all(machine.wait(240) for machine in machines)
    assert not (folder / "out/adapter_model.safetensors").exists()
    status, printed = run(folder, "--model", "base", *TRAIN, "--grad-accum", "4", "--resume")
    assert status == 0 and "resume     from out/checkpoint-" in printed
    same_adapter(folder, alone)


def test_a_shared_base_changes_nothing(folder, tmp_path_factory):
    """--shard-base (FSDP): each process holds half of the NF4 layers; losses and adapter are those of one process."""
    alone = tmp_path_factory.mktemp("alone")
    for name in ("d.chatml", "base"):
        (alone / name).symlink_to(folder / name)
    for where in (alone, folder):
        (where / "q").write_text("Qui es-tu ?\n")
    options = ("--bnb-nf4", "--bnb-dtype", "float32", "--epochs", "0.5", "--sample-prompts", "q")
    assert run(alone, "--model", "base", *TRAIN, *options, "--grad-accum", "4")[0] == 0
    both = torchrun(folder, *options, "--grad-accum", "2", "--shard-base", launcher=ACCELERATE)
    assert both.wait(240) == 0, (folder / "torchrun.txt").read_text()[-3000:]
    assert losses(folder) == losses(alone) and len(losses(folder)) > 5
    mine, whole = re.search(r"holds ([\d.]+) of the ([\d.]+) MB", (folder / "torchrun.txt").read_text()).groups()
    assert 0.5 <= float(mine) / float(whole) < 0.55
    assert (folder / "out/samples.md").read_text() == (alone / "out/samples.md").read_text()
    same_adapter(folder, alone)


def test_a_signal_stops_all_at_the_same_step(folder):
    process = torchrun(folder, "--grad-accum", "1", "--epochs", "20")
    wait_for(folder / "out/checkpoint-2/complete.json", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) != 0
    printed = (folder / "torchrun.txt").read_text()
    assert "stopped at step" in printed and "torchrun --nproc-per-node 2 " in printed
    step = printed.split("stopped at step ")[1].split()[0]
    assert (folder / f"out/checkpoint-{step}/complete.json").is_file()


def test_machines_without_a_shared_output_are_told(folder, other_machine):
    (other_machine / "out").unlink()
    assert all(machine.wait(240) for machine in two_machines([folder, other_machine]))
    printed = (other_machine / "torchrun.txt").read_text()
    assert "--output out: not on this machine; name a folder that all machines share\n" in printed


def test_what_a_shared_base_needs(folder):
    said = run(folder, "--model", "base", *TRAIN, "--shard-base")
    assert said == (2, "--shard-base: needs several processes; start them by torchrun, or leave it out\n")
    command = [sys.executable, ROOT / "train_sft_dolores.py", "--model", "base", *TRAIN]
    environment = {**os.environ, "ACCELERATE_USE_FSDP": "true"}
    fsdp = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert fsdp.returncode == 2
    assert re.fullmatch("accelerate's FSDP is on: .*; turn it off and use --shard-base\n", fsdp.stderr)


def test_an_error_is_said_once(folder):
    (folder / "d.chatml").write_text("<|user|>\nq\n<|assitant|>\na\n")
    process = torchrun(folder)
    assert process.wait(240) != 0
    printed = (folder / "torchrun.txt").read_text()
    assert printed.count("d.chatml:3: unknown role tag <|assitant|>; did you mean <|assistant|>?") == 1
