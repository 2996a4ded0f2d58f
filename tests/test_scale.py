"""Several processes (gloo, on this CPU), started by the launchers that users have."""

import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from runs import (
    SCRIPT,
    TINY,
    assert_same_adapter,
    assert_says,
    dialogues,
    launch,
    record,
    run,
    wait_until,
)

TRAIN = ("--train-files", "d.chatml", "--lora-dropout", "0", "--output", "out", *TINY)
LOG = "torchrun.txt"
ROUNDING = 1e-4  # sums in another order, over ten steps at a learning rate of 1e-2

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path, short_smollm2) -> Path:
    (tmp_path / "d.chatml").write_text(dialogues(80))
    (tmp_path / "base").symlink_to(short_smollm2)
    return tmp_path


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
              "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip


def torchrun(folder: Path, *options, launcher=TORCHRUN) -> subprocess.Popen:
    """A launcher and its workers; they print to LOG."""
    command = [sys.executable, "-m", *launcher, SCRIPT, "--model", "base", *TRAIN, *options]
    return launch(command, folder, LOG, OMP_NUM_THREADS="1")


def two_machines(folders: list[Path], *options) -> list[subprocess.Popen]:
    """One launcher in each folder, with one worker each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = ("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
              "--master-port", port)  # fmt: skip
    return [torchrun(folder, *options, launcher=(*common, "--node-rank", str(i))) for i, folder in enumerate(folders)]


def printed(folder: Path) -> str:
    return (folder / LOG).read_text()


def losses(folder: Path) -> list[str]:
    """Loss and gradient norm of each step, as printed."""
    lines = (line for file in ("log.txt", LOG) if (folder / file).exists()
             for line in (folder / file).read_text().splitlines())  # fmt: skip
    return [line.split("  lr ")[0] for line in lines if line.startswith("step") and "loss" in line]


@pytest.fixture
def alone(folder, tmp_path_factory) -> Path:
    """A second working folder with the same data and base, for the run of one process."""
    alone = tmp_path_factory.mktemp("alone")
    for name in ("d.chatml", "base"):
        (alone / name).symlink_to(folder / name)
    return alone


@pytest.fixture
def other_machine(folder, tmp_path_factory) -> Path:
    """A working folder that shares the data, the base and --output, and nothing else."""
    other = tmp_path_factory.mktemp("other")
    for name in ("d.chatml", "base", "out"):
        (other / name).symlink_to(folder / name)
    return other


def test_two_processes_are_one_with_twice_the_accumulation(folder, alone, other_machine):
    assert run(alone, "--model", "base", *TRAIN, "--grad-accum", "4")[0] == 0

    both = torchrun(folder, "--grad-accum", "2")
    assert both.wait(240) == 0, printed(folder)[-3000:]
    assert (
        losses(folder) == losses(alone) and len(losses(folder)) == 15
    )  # ten steps, five evaluations, each printed once
    assert_same_adapter(folder / "out", alone / "out", ROUNDING)
    both, one = (record(each)["results"] for each in (folder, alone))
    assert both["eval_loss_after"] == pytest.approx(one["eval_loss_after"])
    for name, losses_of in one["held_out"].items():  # each conversation measured once, whichever process has it
        assert both["held_out"][name] == pytest.approx(losses_of, abs=1e-3), name

    # Two machines: one that dies ends the run; one process resumes it and ends with the same adapter.
    shutil.rmtree(folder / "out")
    machines = two_machines([folder, other_machine], "--grad-accum", "2")
    wait_until((folder / "out/checkpoint-4/complete.json").exists, machines[0], folder / LOG)
    psutil.Process(machines[1].pid).children()[-1].kill()
    assert all(machine.wait(240) for machine in machines)
    assert not (folder / "out/adapter_model.safetensors").exists()
    status, output = run(folder, "--model", "base", *TRAIN, "--grad-accum", "4", "--resume")
    assert status == 0 and "out/checkpoint-" in output
    assert_same_adapter(folder / "out", alone / "out", ROUNDING)


def test_a_signal_stops_all_at_the_same_step(folder):
    process = torchrun(folder, "--grad-accum", "1", "--epochs", "20")
    wait_until((folder / "out/checkpoint-2/complete.json").exists, process, folder / LOG)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) != 0
    assert " --resume" in printed(folder)
    (step,) = re.findall(r"step (\d+) of ", printed(folder))  # printed once
    assert (folder / f"out/checkpoint-{step}/complete.json").is_file()


def test_machines_must_share_the_output(folder, other_machine):
    (other_machine / "out").unlink()
    assert all(machine.wait(240) for machine in two_machines([folder, other_machine]))
    (line,) = (line for line in printed(other_machine).splitlines() if line.startswith("--output out: "))
    assert_says(line, "--output out", "machine")


def test_an_error_is_printed_once(folder):
    (folder / "d.chatml").write_text("<|user|>\nq\n<|assitant|>\na\n")
    assert torchrun(folder).wait(240) != 0
    assert printed(folder).count("d.chatml:3: ") == 1 and "<|assitant|>" in printed(folder)
