"""Several processes (gloo, on this CPU): once with torchrun itself, then with the variables that a launcher sets."""

import re
import signal
import socket
import sys
from pathlib import Path

import pytest
from runs import SCRIPT, TINY, assert_same_adapter, assert_says, dialogues, launch, record, run, start, wait_for

TRAIN = ("--model", "base", "--train-files", "d.chatml", "--lora-dropout", "0", "--output", "out", *TINY)
ROUNDING = 1e-4  # sums in another order, over six steps at a learning rate of 1e-2

pytestmark = pytest.mark.slow


def write_data(folder: Path, base: Path) -> Path:
    (folder / "d.chatml").write_text(dialogues(50))
    (folder / "base").symlink_to(base)
    return folder


@pytest.fixture
def folder(tmp_path, short_smollm2) -> Path:
    return write_data(tmp_path, short_smollm2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, short_smollm2) -> Path:
    """The folder of a run of one process, with four rows in a step."""
    folder = write_data(tmp_path_factory.mktemp("alone"), short_smollm2)
    code, out = run(folder, *TRAIN, "--grad-accum", "4")
    assert code == 0, out
    return folder


@pytest.fixture
def other_machine(folder, tmp_path_factory) -> Path:
    """A working folder that shares the data, the base and --output, and nothing else."""
    other = tmp_path_factory.mktemp("other")
    for name in ("d.chatml", "base", "out"):
        (other / name).symlink_to(folder / name)
    return other


def two_workers(folder: Path, *options, other: Path | None = None, at=None) -> list[tuple[int, str]]:
    """What `wait_for` returns of two processes on one machine, or on two; the second gets the signal of `at`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = (*TRAIN, "--grad-accum", "2", *options)
    first = start(folder, *command, log="first.txt", RANK="0", LOCAL_RANK="0", **world)
    where = {"RANK": "1", "LOCAL_RANK": "0" if other else "1"}
    second = start(other or folder, *command, log="second.txt", at=at, **where, **world)
    return [wait_for(first, folder, "first.txt"), wait_for(second, other or folder, "second.txt")]


def losses(log: Path) -> list[str]:
    """Loss and gradient norm of each step, as printed."""
    lines = log.read_text().splitlines()
    return [line.split("  lr ")[0] for line in lines if line.startswith("step") and "loss" in line]


def test_two_processes_are_one_with_twice_the_accumulation(folder, alone):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    torchrun = launch([*launcher, SCRIPT, *TRAIN, "--grad-accum", "2"], folder, "log.txt", OMP_NUM_THREADS="1")
    assert torchrun.wait(240) == 0, (folder / "log.txt").read_text()[-3000:]
    printed = losses(folder / "log.txt")
    assert printed == losses(alone / "log.txt") and len(printed) == 9  # six steps, three evaluations, each once
    assert_same_adapter(folder / "out", alone / "out", ROUNDING)
    both, one = (record(each)["results"] for each in (folder, alone))
    assert both["eval_loss_after"] == pytest.approx(one["eval_loss_after"])
    for name, losses_of in one["held_out"].items():  # each conversation measured once, whichever process has it
        assert both["held_out"][name] == pytest.approx(losses_of, abs=1e-3), name


def test_a_machine_that_dies_ends_the_run_and_one_process_resumes_it(folder, alone, other_machine):
    (first, out), (second, _) = two_workers(folder, other=other_machine, at=("training_step", 11, signal.SIGKILL))
    assert first and second == -signal.SIGKILL, out
    assert not (folder / "out/adapter_model.safetensors").exists()
    code, out = run(folder, *TRAIN, "--grad-accum", "4", "--resume")
    assert code == 0 and "out/checkpoint-4" in out, out
    assert_same_adapter(folder / "out", alone / "out", ROUNDING)


def test_a_signal_to_one_stops_all_at_the_same_step(folder):
    found = two_workers(folder, at=("training_step", 5, signal.SIGTERM))
    assert [code for code, _ in found] == [143, 143], found
    (step,) = re.findall(r"step (\d+) of ", found[0][1])
    assert " --resume" in found[0][1] and not found[1][1]
    assert (folder / f"out/checkpoint-{step}/complete.json").is_file()


def test_machines_must_share_the_output(folder, other_machine):
    (other_machine / "out").unlink()
    (first, _), (second, out) = two_workers(folder, other=other_machine)
    assert first and second
    (line,) = (line for line in out.splitlines() if line.startswith("--output out: "))
    assert_says(line, "--output out", "machine")


def test_an_error_is_printed_once(folder):
    (folder / "d.chatml").write_text("<|user|>\nq\n<|assitant|>\na\n")
    (first, out), (second, other) = two_workers(folder)
    assert first == second == 2 and out.count("d.chatml:3: ") == 1 and "<|assitant|>" in out and not other
