"""Runs of the training script in processes of their own.

`run` and `start` fork it from a server that has imported torch and the rest once (preloaded.py): a run then takes three
seconds instead of ten. `launch` starts any command, such as torchrun. What a process prints goes to a file. conftest.py
calls `end_all` after each test: no process outlives the test that started it, even one that failed or was interrupted.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import train_sft_dolores as sft  # noqa: E402

SCRIPT = ROOT / "train_sft_dolores.py"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preloaded"])
# Importing bitsandbytes initialises CUDA where there is a GPU, and a process forked after that cannot use it. Besides,
# these tests compare runs bit for bit, as only a CPU gives them.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
MARK = "DOLORES_TEST_LAUNCH"  # in the environment of a launched process and of all that it starts

TINY = ("--no-bf16", "--no-bnb-nf4", "--optim", "adamw_torch", "--max-length", "128", "--grad-accum", "2", "--lora-r", "4",
        "--lora-alpha", "8", "--learning-rate", "1e-2", "--eval-steps", "2", "--save-steps", "2", "--sample-prompts", "none")  # fmt: skip


# ---- Starting and ending processes ----

forked: list[multiprocessing.Process] = []
launched: list[tuple[subprocess.Popen, str]] = []  # with the value of its MARK


def start(folder: Path, *options, log="log.txt", at=None, **environment: str):
    """A running process of the script in `folder`; `at` (function, nth call, signal) it sends itself this signal."""
    args = ([str(o) for o in options], str(folder), str(folder / log), at, environment)
    process = SERVER.Process(target=child, args=args)
    with pytest.MonkeyPatch.context() as server_environment:
        for name, value in {**NO_GPU, "PYTHONPATH": str(ROOT / "tests")}.items():
            server_environment.setenv(name, value)
        process.start()  # the first one starts the server, which keeps this environment
    forked.append(process)
    return process


def child(argv: list[str], folder: str, log: str, at: tuple | None, environment: dict[str, str]):
    """The forked process: the script with these arguments, printing to `log`."""
    os.chdir(folder)
    os.environ |= environment
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    with open(log, "a", buffering=1) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = [str(SCRIPT), *argv]
    import torch

    torch.set_num_threads(1)  # one order of summation on every machine: runs are compared bit for bit
    if at:
        signal_at(*at)
    sft.main()


def signal_at(name: str, calls: int, number: int):
    """Send this process a signal when the script calls its function `name` for the nth time."""
    owner = next(owner for owner in (sft, sft.Training, sft.Steps) if name in vars(owner))
    function, count = vars(owner)[name], itertools.count(1)

    def counted(*args, **kwargs):
        if next(count) == calls:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def wait_for(process, folder: Path, log="log.txt", timeout=240) -> tuple[int, str]:
    """(exit status, all that is in its log) of a process of `start` that ends by itself."""
    process.join(timeout)
    printed = (folder / log).read_text()
    assert process.exitcode is not None, f"still running after {timeout} s: {printed[-2000:]}"
    return process.exitcode, unwrapped(printed)


def run(folder: Path, *options, log="log.txt", **more) -> tuple[int, str]:
    """(exit status, output) of a run that has ended; `more` goes to `start`."""
    (folder / log).unlink(missing_ok=True)
    return wait_for(start(folder, *options, log=log, **more), folder, log)


def launch(command: list, folder: Path, log: str, **environment: str) -> subprocess.Popen:
    """A running command in `folder`; it and its children see no GPU and print to the file `log`."""
    mark = uuid.uuid4().hex
    env = {**os.environ, **NO_GPU, **environment, MARK: mark}
    with open(folder / log, "w") as out:
        process = subprocess.Popen(
            list(map(str, command)), cwd=folder, env=env, stdout=out, stderr=out, start_new_session=True
        )
    launched.append((process, mark))
    return process


def family(mark: str) -> list[psutil.Process]:
    """Every living process with this mark. torchrun starts each worker in a session of its own, and a worker whose
    launcher has died has no parent: neither process groups nor parents find them all."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_all():
    """Kill what `start` and `launch` have started, with all children."""
    for process in forked:
        process.kill()
        process.join()
    forked.clear()
    for process, mark in launched:
        process.kill()  # first: a launcher would replace or report the workers
        while members := family(mark):
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(members, timeout=5)
        process.wait()
    launched.clear()


def wait_until(condition: Callable, process, log: Path, timeout=240):
    """Wait until `condition()` holds, as long as this process lives."""
    deadline = time.monotonic() + timeout
    while not condition():
        alive = process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
        if not alive or time.monotonic() > deadline:
            what = "still waiting" if alive else "ended too early"
            pytest.fail(f"{what}: {log.read_text()[-3000:] if log.exists() else 'nothing printed'}")
        time.sleep(0.002)


# ---- What runs print and write ----


def unwrapped(printed: str) -> str:
    """One line for each message, however many it took at 80 columns."""
    return re.sub(r"\n {11}(?=\S)", " ", printed)


def record(folder: Path, output="out") -> dict:
    """The run's training_args.json."""
    return json.loads((folder / output / "training_args.json").read_text())


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (folder / "out").glob("checkpoint-*"))


def adapter_weights(folder: Path) -> dict:
    """The tensors of a folder that holds an adapter."""
    from safetensors.torch import load_file  # with torch, which most tests of data do without

    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(one: Path, other: Path, tolerance: float = 0):
    """Two adapter folders hold the same weights, which training has moved; bit for bit unless a tolerance is given."""
    a, b = adapter_weights(one), adapter_weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name
    assert any(weight.abs().max() > 0 for name, weight in a.items() if "lora_B" in name)


# ---- The script's own functions ----


def arguments(*options):
    """Parsed flags, as one process has them."""
    return sft.parse_args([str(option) for option in options])


def planned(args, encode) -> sft.Plan:
    """The plan of these flags, for one process and a base of which only the tokenizer matters."""
    return sft.make_plan(args, sft.World(), sft.Base("", None, {}, encode))


def error_of(call: Callable, *args, **kwargs) -> str:
    """The one line of the InputError that this call raises."""
    with pytest.raises(sft.InputError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def assert_says(message: str, place: str, *facts: str):
    """One line `place: problem; fix` that names these facts. How it is worded stands in tests/screens/ alone."""
    assert re.fullmatch(re.escape(place) + r": [^;\n]+; [^\n]+", message.removesuffix("\n")), message
    assert all(fact in message for fact in facts), message


# ---- Data ----

WORDS = ["un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix"]


def dialogues(count: int) -> str:
    """Short conversations, all different."""
    text = ""
    for i in range(count):
        pick = [WORDS[(i * k + k) % len(WORDS)] for k in range(1, 9)]
        text += f"<|system|>\nTu es Dolores numéro {i}.\n<|user|>\n{' '.join(pick[:4])} ?\n<|assistant|>\n{' '.join(pick)}.\n"
    return text


def main(*options) -> int:
    """The exit status of the script in this process: much faster, for what ends before a model is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
        try:
            sft.main()
        except SystemExit as ended:
            return ended.code
    return 0
