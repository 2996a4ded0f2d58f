"""SIGINT and SIGTERM at every stage of a real run: the exit status, nothing half written, and resume as if undisturbed."""

import json
import os
import signal
import time
from pathlib import Path

import datasets
import pytest
from runs import TINY, dialogues, run, start
from test_faults import assert_same_adapter

import train_sft_dolores as sft

PREPARED = Path(datasets.config.HF_DATASETS_CACHE) / "dolores_sft"
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def options(short_smollm2):
    """Some six steps, an evaluation of about a second before them and at every second one, three sample answers."""
    return (
        "--model",
        short_smollm2,
        "--output",
        "out",
        *TINY[:-2],
        "--eval-files",
        "held.chatml",
        "--lora-dropout",
        "0.1",
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, options) -> Path:
    folder = data(tmp_path_factory.mktemp("undisturbed"))
    code, out = run(folder, *options)
    assert code == 0, out
    return folder


def data(folder: Path) -> Path:
    (folder / "train.chatml").write_text(dialogues(16))
    (folder / "held.chatml").write_text(dialogues(36).removeprefix(dialogues(16)))
    (folder / "prompts.txt").write_text("Qui es-tu ?\n")
    return folder


def interrupted(folder: Path, number, moment, *options) -> tuple[int, str]:
    """(exit status, what it printed) of a run that gets this signal in its nth call of a function."""
    process = start(folder, *options, moment=moment)
    while not (folder / "moment").exists():
        assert process.is_alive(), (folder / "log.txt").read_text()
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(60)
    assert not list(PREPARED.glob(f"*.{process.pid}.partial"))
    assert not list((folder / "out").rglob("*.partial"))
    return process.exitcode, (folder / "log.txt").read_text()


IN_TRAINING = {
    "evaluation": (signal.SIGTERM, ("evaluation_loop", 2)),
    "sampling": (signal.SIGINT, ("answers", 2)),
    "saving": (signal.SIGTERM, ("_save_checkpoint", 1)),
}


@pytest.mark.parametrize("number, moment", IN_TRAINING.values(), ids=IN_TRAINING)
def test_in_training(number, moment, undisturbed, options, tmp_path):
    """What runs is finished, then one step more, then comes the checkpoint; resumed, the run is the undisturbed one."""
    options += ("--sample-prompts", "prompts.txt") if moment[0] == "answers" else ()
    code, out = interrupted(data(tmp_path), number, moment, *options)
    assert code == STATUS[number], out
    assert "stopped at step 3 of 4; go on with:\n  python3 /" in out
    assert out.endswith(" --resume\n") and "Traceback" not in out
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        files = json.loads((folder / "complete.json").read_text())
        assert all(sft.sha256(str(folder / name)) == digest for name, digest in files.items())
    code, out = run(tmp_path, *options, "--resume")
    assert code == 0 and "from out/checkpoint-3" in out and "damaged" not in out, out
    assert_same_adapter(tmp_path, undisturbed)


BEFORE = {
    "preparing": (signal.SIGTERM, ("write_arrow", 1)),
    "evaluation": (signal.SIGINT, ("evaluation_loop", 1)),
    "sampling": (signal.SIGTERM, ("answers", 1)),
}


@pytest.mark.parametrize("number, moment", BEFORE.values(), ids=BEFORE)
def test_before_training(number, moment, options, tmp_path):
    """Nothing is there to keep: it leaves at once, and the same command can begin anew."""
    data(tmp_path)
    options += ("--sample-prompts", "prompts.txt") if moment[0] == "answers" else ()
    if moment[0] == "write_arrow":
        text = dialogues(3_000) + f"<|endoftext|>\n<|user|>\n{tmp_path}\n<|assistant|>\nNever prepared before.\n"
        (tmp_path / "train.chatml").write_text(text)
    code, out = interrupted(tmp_path, number, moment, *options)
    assert code == STATUS[number] and "Traceback" not in out, out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}
    if moment[0] == "evaluation_loop":
        code, out = run(tmp_path, *options)
        assert code == 0, out


@pytest.mark.parametrize("number", STATUS)
def test_in_a_dry_run(number, smollm2, tmp_path):
    data(tmp_path)
    (tmp_path / "train.chatml").write_text(dialogues(3_000) + f"<|user|>\n{tmp_path}\n<|assistant|>\n{number}\n")
    code, out = interrupted(tmp_path, number, ("write_arrow", 1), "--dry-run", "--model", smollm2)
    assert (code, out.count("\n")) == (STATUS[number], 4), out  # the survey
