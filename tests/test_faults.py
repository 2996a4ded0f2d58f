"""No work is lost: kills, signals, damaged files, full disks, gradients that are not finite; all with real processes."""

import contextlib
import errno
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import (
    SCRIPT,
    TINY,
    arguments,
    assert_same_adapter,
    assert_says,
    checkpoint_steps,
    dialogues,
    error_of,
    record,
    run,
    start,
    wait_for,
    wait_until,
)

import train_sft_dolores as sft


@pytest.fixture(scope="module")
def options(short_smollm2):
    return ("--model", short_smollm2, "--output", "out", *TINY, "--epochs", "2", "--lora-dropout", "0.1")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, options) -> Path:
    """The folder of a run that nothing interrupted: about ten steps in two epochs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "train.chatml").write_text(dialogues(24))
    code, out = run(folder, *options)
    assert code == 0, out
    return folder


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_the_same_run(uninterrupted, options, data_folder):
    """kill -9 at eight random moments, also in saves and evaluations: the final adapter is the same, bit for bit."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    delays, kills, out, code = random.Random(seed), 0, data_folder / "out", None
    while kills < 8 or code != 0:
        resume = "--resume" if (out / "training_args.json").exists() else "--overwrite"
        process, seen = start(data_folder, *options, resume), set(out.glob("checkpoint-*"))
        if kills < 8:
            # Every other kill waits until a step is saved; a run on an idle machine takes three seconds.
            while kills % 2 and process.is_alive() and not set(out.glob("checkpoint-*")) - seen:
                time.sleep(0.002)
            process.join(delays.random() * (0.3 if kills % 2 else 3))
            kills += process.is_alive()
            process.kill()
        code, printed = wait_for(process, data_folder)
        assert code in (0, -signal.SIGKILL), printed
        if code == 0:
            assert_same_adapter(out, uninterrupted / "out")
            last = record(data_folder)["results"]
            if kills < 8:  # start over
                shutil.rmtree(out)
    assert last["eval_loss_after"] == record(uninterrupted)["results"]["eval_loss_after"]


DAMAGE = {
    "optimizer.pt": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "adapter_model.safetensors": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"),
    "complete.json": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "scheduler.pt": Path.unlink,
}


@pytest.mark.slow
def test_damaged_checkpoints_are_skipped(uninterrupted, options, data_folder):
    """The newest one that is whole continues the same run."""
    shutil.copytree(uninterrupted, data_folder, dirs_exist_ok=True)
    whole, *steps = checkpoint_steps(data_folder)
    for step, (name, damage) in zip(steps, DAMAGE.items(), strict=True):
        damage(data_folder / f"out/checkpoint-{step}/{name}")
    code, out = run(data_folder, *options, "--resume")
    assert code == 0 and f"out/checkpoint-{whole}" in out, out
    for step, name in zip(steps, DAMAGE, strict=True):
        assert any(f"out/checkpoint-{step}" in line and name in line for line in out.splitlines()), out
    assert_same_adapter(data_folder / "out", uninterrupted / "out")


@pytest.mark.slow
def test_resume_in_another_place_and_with_another_schedule(uninterrupted, options, data_folder, short_smollm2):
    """The same bytes in another folder are the same run; a forced change of the schedule holds from the first step."""
    shutil.copytree(uninterrupted / "out", data_folder / "moved/run")
    shutil.copytree(short_smollm2, data_folder / "moved/base")
    shutil.copy(uninterrupted / "train.chatml", data_folder / "moved/renamed.chatml")
    shutil.rmtree(data_folder / f"moved/run/checkpoint-{checkpoint_steps(uninterrupted)[-1]}")
    options = (*options[2:], "--model", "moved/base", "--train-files", "moved/renamed.chatml", "--output", "moved/run")
    code, out = run(data_folder, *options, "--resume")
    assert code == 0, out
    assert_same_adapter(data_folder / "moved/run", uninterrupted / "out")

    code, out = run(data_folder, *options, "--force-resume", "--epochs", "3", "--learning-rate", "2e-2")
    assert code == 0, out
    rates = {step: 1e-2 * (1 + math.cos(math.pi * (step - 1) / 18)) for step in range(13, 19)}
    assert dict(re.findall(r"step +(\d+)/18 .* lr (\S+)", out)) == {str(s): f"{r:.1e}" for s, r in rates.items()}


@pytest.mark.slow
def test_resume_refuses_another_run(uninterrupted, options, data_folder):
    shutil.copytree(uninterrupted, data_folder, dirs_exist_ok=True)
    (data_folder / "train.chatml").write_text(dialogues(25))
    changes = ("--learning-rate", "2e-2", "--seed", "7")
    code, out = run(data_folder, *options, "--resume", *changes, "--logging-steps", "3")
    last = out.strip().splitlines()[-1]
    assert code == 2 and "--logging-steps" not in last
    assert_says(last, "--resume", "--train-files", "--learning-rate", "--seed", "--force-resume", "--overwrite")
    (data_folder / "q.txt").write_text("Qui es-tu ?\nEt moi ?\n")
    code, out = run(data_folder, *options, "--force-resume", "--learning-rate", "2e-2", "--sample-prompts", "q.txt")
    assert code == 0, out
    card = (data_folder / "out/README.md").read_text()
    # The second question was not asked before training, but after it.
    assert re.search(r"\*\*Et moi \?\*\*\n\n\*before\*\n\n> \([^)]+\)\n\n\*after\*\n\n> ", card)


@pytest.mark.slow
def test_a_dead_process_holds_no_lock(options, data_folder):
    process = start(data_folder, *options, "--epochs", "50")
    wait_until((data_folder / "out/training_args.json").exists, process, data_folder / "log.txt")
    code, out = run(data_folder, *options, "--resume", log="second.txt")
    assert code == 2
    assert_says(out, "--output out")
    process.kill()
    process.join()
    code, out = run(data_folder, *options, "--overwrite", "--epochs", "0.05")
    assert code == 0, out


def test_a_gradient_that_is_not_finite_names_the_conversations(options, data_folder):
    """A learning rate that makes the weights overflow: the run stops with the step and the places of its data."""
    code, out = run(data_folder, *options, "--learning-rate", "1e30", "--max-grad-norm", "0")
    last = out.strip().splitlines()[-1]
    assert code == 2 and re.match(r"step \d+: ", last) and "train.chatml:" in last and "--learning-rate" in last, out
    for folder in (data_folder / "out").glob("checkpoint-*"):
        assert (folder / "complete.json").exists()


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own for this folder; skips the test where tmpfs cannot be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(options, data_folder):
    out, log = data_folder / "out", data_folder / "log.txt"
    with small_disk(out, "200m"):
        process = start(data_folder, *options, "--overwrite", "--epochs", "50")
        wait_until(lambda: list(out.glob("checkpoint-*/complete.json")), process, log)
        with contextlib.suppress(OSError):  # the run writes at the same time, so this may fill the disk
            (out / "filler").write_bytes(b"x" * (shutil.disk_usage(out).free - 2**18))
        process.join(60)
        last = log.read_text().strip().splitlines()[-1]
        assert process.exitcode == 2 and re.fullmatch(r"out/checkpoint-\d+: [^;]+; .*--resume.*", last)
        whole = [path for path in out.glob("checkpoint-*") if (path / "complete.json").exists()]
        assert whole
        for path in whole:
            assert all((path / name).exists() for name in json.loads((path / "complete.json").read_text()))


def test_a_disk_that_is_too_small_for_a_checkpoint(options, data_folder):
    with small_disk(data_folder / "out", "1600k"):
        code, out = run(data_folder, *options, "--overwrite")
    assert code == 2 and re.fullmatch(r"[^;]+: no space left on the disk; [^;]+", out.strip().splitlines()[-1]), out


def test_a_full_disk_under_the_cache(data_folder, short_smollm2):
    (data_folder / "train.chatml").write_text(dialogues(500))
    with small_disk(data_folder / "cache", "100k"):
        command = [sys.executable, SCRIPT, "--dry-run", "--model", short_smollm2]
        environment = os.environ | {"HF_DATASETS_CACHE": str(data_folder / "cache")}
        done = subprocess.run(command, cwd=data_folder, env=environment, capture_output=True, text=True)
        left = [path for path in (data_folder / "cache").rglob("samples*") if path.suffix != ".lock"]
    assert done.returncode == 2 and re.fullmatch(r"[^\n]+: [^\n;]*space[^\n;]*; [^\n]+\n", done.stderr), done.stderr
    assert not left


# ---- what the environment lacks, and what an output must not touch ----


def script(folder: Path, *options, **environment) -> subprocess.CompletedProcess:
    """The script as a user starts it, in a new process."""
    command = [sys.executable, SCRIPT, *map(str, options)]
    env = os.environ | {"HF_HOME": str(folder / "hf")} | environment
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=120)


def test_a_terminal_without_utf8(data_folder, short_smollm2):
    """What it cannot show is printed as an escape."""
    (data_folder / "train.chatml").write_text("<|user|>\nÀ toi 🙂\n<|assistant|>\nOui…\n", encoding="utf-8")
    done = script(data_folder, "--model", short_smollm2, "--preview", 1, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and "À toi \\U0001f642".encode("latin-1") in done.stdout, done.stderr


def test_a_pipe_that_ends(data_folder, short_smollm2):
    (data_folder / "train.chatml").write_text(dialogues(1000))
    command = shlex.join([sys.executable, str(SCRIPT), "--model", str(short_smollm2), "--preview", "1000"])
    done = subprocess.run(f"{command} | head -n 1", shell=True, cwd=data_folder, capture_output=True, text=True)
    assert (done.stdout[:5], done.stderr) == ("files", "")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number, data_folder, monkeypatch, capsys, smollm2_tokenizer):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(data_folder / "cache"))
    with sft.claim_output(data_folder / "out", resume=False, overwrite=False):
        assert "locks" in capsys.readouterr().out
    encode = sft.Encoder(smollm2_tokenizer, sft.chat_format("dolores", smollm2_tokenizer))
    files = sft.find_files([str(data_folder / "train.chatml")])
    if number == errno.ENOSYS:  # the library takes another kind of lock
        assert sft.read_data(files, arguments(), encode)[0]["conversations"] == 24
    else:
        assert_says(error_of(sft.read_data, files, arguments(), encode), str(data_folder / "cache"), "HF_HOME")


def test_an_output_never_holds_an_input(data_folder, short_smollm2):
    """--overwrite deletes what is in the folder."""
    (data_folder / "out").mkdir()
    (data_folder / "out/.lock").touch()
    (data_folder / "train.chatml").rename(data_folder / "out/train.chatml")
    options = ("--model", short_smollm2, "--output", "out", *TINY, "--train-files", "out/train.chatml", "--overwrite")
    code, out = run(data_folder, *options)
    assert code == 2 and (data_folder / "out/train.chatml").is_file()
    assert_says(out.splitlines()[-1], "--output out", "out/train.chatml")


def test_half_a_model_in_the_cache(data_folder, short_smollm2):
    """Only the tokenizer, as a dry run needs it, and no network."""
    hub = data_folder / "hf/hub/models--acme--mini"
    for folder in ("refs", "snapshots/abc"):
        (hub / folder).mkdir(parents=True)
    (hub / "refs/main").write_text("abc")
    for name in sft.TOKENIZER_FILES:
        shutil.copy(short_smollm2 / name, hub / "snapshots/abc")
    done = script(data_folder, "--model", "acme/mini", "--output", "out", *TINY)
    assert done.returncode == 2
    assert_says(done.stderr.decode(), "--model acme/mini", "cache", "Hub")


def test_names_that_are_not_utf8(data_folder):
    done = script(data_folder, "--dry-run", "--output", os.fsdecode(b"caf\xe9"))
    assert done.returncode == 2
    assert_says(done.stderr.decode(), r"'caf\udce9'", "UTF-8")


def test_more_tokens_than_rows_in_the_embedding(tmp_path, short_smollm2):
    for name in sft.TOKENIZER_FILES:
        shutil.copy(short_smollm2 / name, tmp_path)
    args, config = arguments("--model", tmp_path), json.loads((tmp_path / "config.json").read_text())
    assert sft.find_base(args, tmp_path).config["vocab_size"] == 49152
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 49151}))
    assert_says(error_of(sft.find_base, args, tmp_path), f"--model {tmp_path}", "49,151")
