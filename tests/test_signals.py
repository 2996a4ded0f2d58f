"""SIGINT, SIGTERM and SIGHUP at every stage of a real run: exit status, no partial files, and --resume ends with the same adapter."""

import json
import os
import pty
import re
import signal
import sys
from pathlib import Path

import pytest
from runs import NO_GPU, SCRIPT, TINY, assert_same_adapter, dialogues, run, start, wait_until

import train_sft_dolores as sft

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
LAST_WORD = "\nstopped before the first step: nothing to save; the same command starts again\n"


@pytest.fixture(scope="module")
def options(short_smollm2):
    """About six steps; an evaluation of about a second before the first and after every second one."""
    held_out = ("--eval-files", "held.chatml", "--lora-dropout", "0.1")
    return ("--model", short_smollm2, "--output", "out", *TINY[:-2], *held_out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, options) -> Path:
    folder = write_data(tmp_path_factory.mktemp("undisturbed"))
    code, out = run(folder, *options)
    assert code == 0, out
    return folder


def write_data(folder: Path) -> Path:
    (folder / "train.chatml").write_text(dialogues(16))
    (folder / "held.chatml").write_text(dialogues(36).removeprefix(dialogues(16)))
    (folder / "prompts.txt").write_text("Qui es-tu ?\n")
    return folder


def interrupted(folder: Path, number, moment, *options) -> tuple[int, str]:
    """(exit status, output) of a run that gets this signal in its nth call of a function."""
    process = start(folder, *options, moment=moment, HF_DATASETS_CACHE=str(folder / "cache"))
    wait_until((folder / "moment").exists, process, folder / "log.txt")
    assert bool(list(folder.rglob("*.incomplete"))) == (moment[0] == "encode_conversations")
    os.kill(process.pid, number)
    process.join(60)
    assert not list(folder.rglob("*.incomplete"))
    return process.exitcode, (folder / "log.txt").read_text()


IN_TRAINING = {
    "evaluation": (signal.SIGTERM, ("evaluation_loop", 3)),  # two come before training
    "sampling": (signal.SIGINT, ("generate_answers", 2)),
    "saving": (signal.SIGTERM, ("on_save", 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("number, moment", IN_TRAINING.values(), ids=IN_TRAINING)
def test_in_training(number, moment, undisturbed, options, tmp_path):
    """The current work and one more step are finished, then a checkpoint is saved; --resume ends like a whole run."""
    options += ("--sample-prompts", "prompts.txt") if moment[0] == "generate_answers" else ()
    code, out = interrupted(write_data(tmp_path), number, moment, *options)
    assert code == STATUS[number], out
    assert "step 3 of 4" in out and re.search(rf"\n  (python3|{re.escape(sys.executable)}) /", out)
    assert out.endswith(" --resume\n") and "Traceback" not in out
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        files = json.loads((folder / "complete.json").read_text())
        assert all(sft.sha256(str(folder / name)) == digest for name, digest in files.items())
    code, out = run(tmp_path, *options, "--resume")
    assert code == 0 and "out/checkpoint-3" in out and "out/checkpoint-2" not in out, out
    assert_same_adapter(tmp_path / "out", undisturbed / "out")


@pytest.mark.slow
def test_a_closed_terminal(options, undisturbed, tmp_path):
    """The run saves a checkpoint, although it can no longer print; --resume ends like a whole run."""
    write_data(tmp_path)
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        os.execve(
            sys.executable,
            [sys.executable, *map(str, (SCRIPT, *options))],
            {**os.environ, **NO_GPU, "OMP_NUM_THREADS": "1"},
        )
    shown = b""
    while b"step 1/4" not in shown:
        shown += os.read(terminal, 1 << 12)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == STATUS[signal.SIGHUP]
    assert sft.newest_checkpoint(tmp_path / "out")
    code, out = run(tmp_path, *options, "--resume")
    assert code == 0, out
    assert_same_adapter(tmp_path / "out", undisturbed / "out")


BEFORE_TRAINING = {
    "preparing": (signal.SIGTERM, ("encode_conversations", 1)),
    "evaluation": (signal.SIGINT, ("evaluation_loop", 1)),
    "sampling": (signal.SIGTERM, ("generate_answers", 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("number, moment", BEFORE_TRAINING.values(), ids=BEFORE_TRAINING)
def test_before_training(number, moment, options, tmp_path):
    """There is nothing to save yet: it stops at once, and the same command can start over.

    What --overwrite would delete is still there.
    """
    write_data(tmp_path)
    old = [tmp_path / "out" / name for name in ("training_args.json", "adapter_model.safetensors")]
    if moment[0] == "evaluation_loop":
        old[0].parent.mkdir()
        for file in old:
            file.write_text("{}")
        options += ("--overwrite",)
    options += ("--sample-prompts", "prompts.txt") if moment[0] == "generate_answers" else ()
    if moment[0] == "encode_conversations":
        (tmp_path / "train.chatml").write_text(dialogues(3_000))
    code, out = interrupted(tmp_path, number, moment, *options)
    assert code == STATUS[number] and "Traceback" not in out, out
    assert out.endswith(LAST_WORD)
    if moment[0] == "evaluation_loop":
        assert [file.read_text() for file in old] == ["{}", "{}"]
        code, out = run(tmp_path, *options)
        assert code == 0 and all(file.stat().st_size > 2 for file in old), out
    else:
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", STATUS)
def test_in_a_dry_run(number, smollm2, tmp_path):
    write_data(tmp_path)
    (tmp_path / "train.chatml").write_text(dialogues(3_000))
    code, out = interrupted(tmp_path, number, ("encode_conversations", 1), "--dry-run", "--model", smollm2)
    assert (code, out) == (STATUS[number], LAST_WORD)
