"""Nothing lost: kills, signals, damage, full disks, numbers gone bad; real processes and real weights."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, TINY, dialogues, record, run, start
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def options(short_smollm2):
    return ("--model", short_smollm2, "--output", "out", *TINY, "--epochs", "2", "--lora-dropout", "0.1")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, options) -> Path:
    """A folder with a run that nothing disturbed: some ten steps in two epochs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "train.chatml").write_text(dialogues(24))
    code, out = run(folder, *options)
    assert code == 0, out
    return folder


@pytest.fixture
def here(tmp_path) -> Path:
    (tmp_path / "train.chatml").write_text(dialogues(24))
    return tmp_path


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder, dirs_exist_ok=True)
    return folder


def adapter(folder: Path) -> dict:
    return load_file(folder / "out/adapter_model.safetensors")


def assert_same_adapter(one: Path, other: Path):
    a, b = adapter(one), adapter(other)
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    assert any(value.abs().max() > 0 for name, value in a.items() if "lora_B" in name)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (folder / "out").glob("checkpoint-*"))


def test_killed_at_any_moment_and_resumed_is_the_same_run(uninterrupted, options, here):
    """kill -9 at 20 random moments, in saves and evaluations too: the adapter is bit for bit the undisturbed one."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    moments, killed, started = random.Random(seed), 0, False
    for attempt in range(200):
        if killed == 20:
            break
        resume = ("--resume",) if (here / "out/training_args.json").exists() else ("--overwrite",)
        process = start(here, *options, *resume, log=f"log{attempt}.txt")
        out = here / "out"
        if killed % 2:  # wait until it trains, then some more: the other half hits the start, too
            began, seen = time.monotonic(), set(out.glob("checkpoint-*"))
            while process.is_alive() and not (set(out.glob("checkpoint-*")) - seen) and time.monotonic() - began < 30:
                time.sleep(0.002)
            process.join(moments.random() * 0.3)
        else:
            process.join(1.5 + moments.random() * 3)
        if process.is_alive():
            process.kill()
            killed += 1
        elif process.exitcode == 0:  # it came to its end: begin again, as long as there are moments left
            assert_same_adapter(here, uninterrupted)
            shutil.rmtree(out)
        else:
            pytest.fail((here / f"log{attempt}.txt").read_text())
        process.join()
        started = True
    assert started and killed == 20
    code, out = run(here, *options, "--resume" if (here / "out/training_args.json").exists() else "--overwrite")
    assert code == 0, out
    assert_same_adapter(here, uninterrupted)
    assert record(here)["results"]["eval_loss_after"] == record(uninterrupted)["results"]["eval_loss_after"]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_keeps_a_checkpoint(number, status, uninterrupted, options, here):
    process = start(here, *options)
    log = here / "log.txt"
    while not re.search(r"step +1/", log.read_text() if log.exists() else ""):
        assert process.is_alive(), log.read_text()
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join(60)
    text = log.read_text()
    assert process.exitcode == status, text
    command = text.splitlines()[-1].strip()
    assert command.startswith("python3 ") and command.endswith(" --resume"), text
    assert "stopped at step" in text and (here / f"out/checkpoint-{steps(here)[-1]}/complete.json").exists()
    code, out = run(here, *options, "--resume")
    assert code == 0 and "from out/checkpoint-" in out
    assert_same_adapter(here, uninterrupted)


def test_a_second_signal_leaves_at_once(options, here):
    process = start(here, *options, "--epochs", "50", "--grad-accum", "16")
    log = here / "log.txt"
    while not re.search(r"step +1/", log.read_text() if log.exists() else ""):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130


DAMAGE = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "changed": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "complete.json"])
def test_a_damaged_checkpoint_is_passed_over(damage, name, uninterrupted, options, here):
    copy_of(uninterrupted, here)
    newest, before = steps(here)[-1], steps(here)[-2]
    damage(here / f"out/checkpoint-{newest}/{name}")
    code, out = run(here, *options, "--resume")
    assert code == 0, out
    assert f"out/checkpoint-{newest} is damaged ({name}): removed, the one before is taken" in out
    assert f"from out/checkpoint-{before}" in out
    assert_same_adapter(here, uninterrupted)


def test_resume_only_what_is_the_same(uninterrupted, options, here):
    copy_of(uninterrupted, here)
    (here / "train.chatml").write_text(dialogues(25))
    code, out = run(here, *options, "--resume", "--learning-rate", "2e-2", "--seed", "7", "--logging-steps", "3")
    assert code == 2 and out.strip().splitlines()[-1] == (
        "--resume: not the same run, these differ: data train.chatml, --learning-rate, --seed; "
        "restore them, add --force-resume, or begin anew with --overwrite"
    )
    (here / "q.txt").write_text("Qui es-tu ?\nEt moi ?\n")
    code, out = run(here, *options, "--force-resume", "--learning-rate", "2e-2", "--sample-prompts", "q.txt")
    assert code == 0, out
    card = (here / "out/README.md").read_text()
    assert "**Et moi ?**\n\n*before*\n\n> (not asked)\n\n*after*\n\n> " in card


def test_a_dead_process_holds_no_lock(options, here):
    process = start(here, *options, "--epochs", "50")
    while not (here / "out/training_args.json").exists():
        assert process.is_alive()
        time.sleep(0.01)
    code, out = run(here, *options, "--resume", log="second.txt")
    assert code == 2 and out == "--output out: another process is training there; wait for it or name another\n"
    process.kill()
    process.join()
    code, out = run(here, *options, "--overwrite", log="third.txt")
    assert code == 0, out


def test_numbers_gone_bad_name_the_conversations(uninterrupted, options, here):
    """A learning rate that blows the weights up: the run stops with the step and the places of its data."""
    code, out = run(here, *options, "--learning-rate", "1e30", "--max-grad-norm", "0")
    last = out.strip().splitlines()[-1]
    assert code == 2 and last.startswith("step ") and "the gradient is " in last and "train.chatml:" in last, out
    for folder in (here / "out").glob("checkpoint-*"):
        assert (folder / "complete.json").exists()


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own for this folder; skips where that cannot be had."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(options, here):
    with small_disk(here / "out", "200m"):
        process = start(here, *options, "--overwrite", "--epochs", "50")
        while not list((here / "out").glob("checkpoint-*/complete.json")):
            assert process.is_alive(), (here / "log.txt").read_text()
            time.sleep(0.005)
        with contextlib.suppress(OSError):  # the run writes at the same time: full is full
            (here / "out/filler").write_bytes(b"x" * (shutil.disk_usage(here / "out").free - 2**18))
        process.join(60)
        last = (here / "log.txt").read_text().strip().splitlines()[-1]
        message = r"out/checkpoint-\d+: No space left on the disk; .+ --resume"
        assert process.exitcode == 2 and re.fullmatch(message, last)
        whole = [path for path in (here / "out").glob("checkpoint-*") if (path / "complete.json").exists()]
        assert whole
        for path in whole:
            assert all((path / name).exists() for name in json.loads((path / "complete.json").read_text()))


def test_a_full_disk_under_the_cache(here, short_smollm2):
    (here / "train.chatml").write_text(dialogues(500))
    with small_disk(here / "cache", "100k"):
        command = [sys.executable, ROOT / "train_sft_dolores.py", "--dry-run", "--model", short_smollm2]
        environment = os.environ | {"HF_DATASETS_CACHE": str(here / "cache")}
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        left = [path for path in (here / "cache").rglob("samples*") if path.suffix != ".lock"]
    assert done.returncode == 2 and re.fullmatch(r".*: no space left on the disk; make room\n", done.stderr), (
        done.stderr
    )
    assert not left


def test_disk_space_is_checked_before(options, here):
    with small_disk(here / "out", "30m"):
        code, out = run(here, *options, "--overwrite")
    message = r"--output out: 0.03 GB free, the checkpoints may need 0.\d\d GB; make room .+"
    assert code == 2 and re.fullmatch(message, out.strip().splitlines()[-1])
