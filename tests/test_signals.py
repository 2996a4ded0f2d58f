"""SIGINT, SIGTERM and SIGHUP at every stage of a real run: exit status, no partial files, and --resume ends with the same adapter."""

import json
import os
import pty
import re
import signal
import sys
from pathlib import Path

import pytest
from runs import NO_GPU, SCRIPT, TINY, assert_same_adapter, dialogues, run, start, wait_for, wait_until

import train_sft_dolores as sft

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
LAST_WORD = "\nstopped before the first step: nothing to save; the same command starts again\n"


@pytest.fixture(scope="module")
def options(short_smollm2):
    """Eight steps, an evaluation after every second one."""
    return ("--model", short_smollm2, "--output", "out", *TINY, "--epochs", "2", "--lora-dropout", "0.1")


def write_data(folder: Path) -> Path:
    (folder / "train.chatml").write_text(dialogues(16))
    (folder / "prompts.txt").write_text("Qui es-tu ?\n")
    return folder


IN_TRAINING = [  # signal, function of the script, which call of it, step at which the run stops
    (signal.SIGTERM, "on_save", 1, 3),
    (signal.SIGINT, "training_step", 1, 4),
    (signal.SIGTERM, "evaluation_loop", 1, 7),
]


@pytest.mark.slow
def test_in_training(options, tmp_path_factory, tmp_path):
    """The current work and one more step are finished, then a checkpoint is saved; --resume ends like a whole run."""
    whole = write_data(tmp_path_factory.mktemp("whole"))
    code, out = run(whole, *options)
    assert code == 0, out
    write_data(tmp_path)
    for number, function, call, step in IN_TRAINING:
        code, out = run(tmp_path, *options, at=(function, call, number))
        assert code == STATUS[number] and f"step {step} of 8" in out and "Traceback" not in out, out
        assert re.search(rf"\n  (python3|{re.escape(sys.executable)}) /.* --resume\n$", out)
        for folder in (tmp_path / "out").glob("checkpoint-*"):
            files = json.loads((folder / "complete.json").read_text())
            assert all(sft.sha256(str(folder / name)) == digest for name, digest in files.items())
        options += ("--resume",) if "--resume" not in options else ()
    code, out = run(tmp_path, *options)
    assert code == 0 and "out/checkpoint-7" in out, out
    assert_same_adapter(tmp_path / "out", whole / "out")


def test_a_second_signal_stops_at_once(options, tmp_path):
    at, more = ("training_step", 2, signal.SIGINT), ("--grad-accum", "16", "--epochs", "50")
    process, log = start(write_data(tmp_path), *options, *more, at=at), tmp_path / "log.txt"
    wait_until(lambda: log.exists() and "stopping after this step" in log.read_text(), process, log)
    os.kill(process.pid, signal.SIGINT)
    code, out = wait_for(process, tmp_path)
    assert code == STATUS[signal.SIGINT] and not list((tmp_path / "out").glob("checkpoint-*")), out


@pytest.mark.slow
def test_a_closed_terminal(options, tmp_path):
    """The run saves a checkpoint, although it can no longer print."""
    write_data(tmp_path)
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        command = [sys.executable, *map(str, (SCRIPT, *options))]
        os.execve(sys.executable, command, {**os.environ, **NO_GPU, "OMP_NUM_THREADS": "1"})
    shown = b""
    while b"step 1/8" not in shown:
        shown += os.read(terminal, 1 << 12)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == STATUS[signal.SIGHUP]
    assert list((tmp_path / "out").glob("checkpoint-*/complete.json"))


BEFORE_TRAINING = [  # signal, function of the script, more flags
    (signal.SIGTERM, "encode_conversations", ()),
    (signal.SIGHUP, "encode_conversations", ("--dry-run",)),
    (signal.SIGINT, "evaluation_loop", ("--overwrite",)),
    (signal.SIGTERM, "generate_answers", ("--overwrite",)),
]


@pytest.mark.parametrize("number, function, more", BEFORE_TRAINING)
def test_before_training(number, function, more, options, tmp_path):
    """There is nothing to save: it stops at once, leaves no part of a cache, and what --overwrite would delete."""
    write_data(tmp_path)
    old = [tmp_path / "out" / name for name in ("training_args.json", "adapter_model.safetensors")]
    if "--overwrite" in more:
        old[0].parent.mkdir()
        for file in old:
            file.write_text("{}")
    options += ("--sample-prompts", "prompts.txt", *more)
    code, out = run(tmp_path, *options, at=(function, 1, number), HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert code == STATUS[number] and "Traceback" not in out and out.endswith(LAST_WORD), out
    assert not list(tmp_path.rglob("*.incomplete"))
    if "--overwrite" in more:
        assert [file.read_text() for file in old] == ["{}", "{}"]
    else:
        assert not (tmp_path / "out").exists()
