"""Everything that is printed, word for word, compared with tests/screens/*.txt, at 80 columns.

UPDATE_SCREENS=1 python -m pytest tests/test_screens.py      # writes the files; read the difference
"""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import NO_GPU, SCRIPT, TINY, dialogues, error_of, run
from test_chatml import AUTO_ERRORS, CHATML_ERRORS, MESSAGES_ERRORS, chatml, messages, read, write
from test_cli import NONSENSE
from test_train import LLAMA_8B

import train_sft_dolores as sft

SCREENS = Path(__file__).with_name("screens")
COLOUR = re.compile(r"\033\[[0-9;]*m")


def check(name: str, shown: str, wide=()):
    """Equal to the file; no line is longer than 80 columns, except those that contain one of `wide`."""
    file = SCREENS / f"{name}.txt"
    if os.environ.get("UPDATE_SCREENS"):
        SCREENS.mkdir(exist_ok=True)
        file.write_text(shown, encoding="utf-8")
    assert shown == file.read_text(encoding="utf-8")
    long = [line for line in COLOUR.sub("", shown).splitlines() if len(line) > 80]
    assert [line for line in long if not any(part in line for part in wide)] == []


def command(*options):
    return [sys.executable, str(SCRIPT), *map(str, options)]


def screen(folder: Path, *options, **environment) -> str:
    """What the script prints in this folder, to a pipe."""
    env = {**os.environ, "COLUMNS": "80", **NO_GPU, **environment}
    done = subprocess.run(command(*options), capture_output=True, text=True, cwd=folder, env=env, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return here(done.stdout)


def here(shown: str) -> str:
    """With the command that a dry run ends with as it is typed in the script's own folder."""
    return re.sub(rf"^(next +)\S*python\S* {SCRIPT} ", rf"\1python3 {SCRIPT.name} ", shown, flags=re.MULTILINE)


def terminal(folder: Path, *options, **environment) -> str:
    """What it prints to a terminal, progress bars and all."""
    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | NO_GPU | environment
    process = subprocess.Popen(command(*options), stdout=theirs, stderr=theirs, cwd=folder, env=env)
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed: Linux says EIO
            block = b""
        if not block:
            break
        shown += block
    os.close(ours)
    assert process.wait(60) == 0
    return here(shown.decode().replace("\r\n", "\n"))


@pytest.fixture
def folder(tmp_path, smollm2) -> Path:
    """A folder with a small corpus, and SmolLM2 as `base`."""
    (tmp_path / "train.chatml").write_text(dialogues(40))
    (tmp_path / "base").symlink_to(smollm2)
    return tmp_path


def test_help(tmp_path):
    check("help", screen(tmp_path, "--help"))


def test_dry_run_without_the_model(folder):
    check("dry_run_without_model", screen(folder, "--dry-run"), wide=["hf download"])


def test_warnings(tmp_path):
    ok = "<|user|>\nq\n<|assistant|>\na\n"
    parts = [ok] * 8 + [f"<|system|>\n\n<|user|>\n{q}\n<|assistant|>\na\n" for q in (
        "Ã©tÃ©", "x" * 20_001, "q\n<| user |> r", "a <|eot_id|> b", "\\<|user|>", "é" * 50, "a <|user|> b",
        "\n```\n<|system|>\nS\n```\n<|user|>\nq", "q<|endoftext|>")]  # fmt: skip
    parts += ["<|user|>\nq\n<|assistant|>\na</s>\n", "".join(ok.replace("q", f"q{i}") for i in range(30)), "Lost.\n"]
    (tmp_path / "d.chatml").write_text("<|endoftext|>\n".join(parts) + "<|user|>\nUnanswered.\n")
    check("warnings", screen(tmp_path, "--dry-run", "--skip-bad", "--train-files", "d.chatml"), wide=["hf download"])


def test_one_conversation(tmp_path):
    """The file of a beginner: nothing separates its dialogues."""
    (tmp_path / "d.txt").write_text("<|user|>\nq\n<|assistant|>\na\n" * 12)
    check("one_conversation", screen(tmp_path, "--dry-run", "--train-files", "d.txt"), wide=["hf download"])


def test_all_errors_at_once(tmp_path):
    bad = "<|endoftext|>\n<|user|>\nq\n<|assitant|>\na\n<|usr|>\n"
    (tmp_path / "d.txt").write_text(bad * 12)
    done = subprocess.run(command("--train-files", "d.txt"), capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    check("all_errors", done.stderr)


def unquoted_choices(line: str) -> str:
    """Without quotes around the choices of a flag: Python's versions differ."""
    return re.sub(r"\(choose from [^)]+\)", lambda choices: choices[0].replace("'", ""), line)


def test_errors(tmp_path, monkeypatch, capsys):
    """One line for each mistake in the data (inputs: test_chatml.py) or in the flags (inputs: test_cli.py)."""
    monkeypatch.chdir(tmp_path)
    lines = [error_of(chatml, text) for text, *_ in CHATML_ERRORS]
    lines += [error_of(messages, text) for text, *_ in MESSAGES_ERRORS]
    lines += [error_of(read, write(name, text), input_format="auto") for name, text, *_ in AUTO_ERRORS]
    lines.append(error_of(sft.find_files, ["missing"]))
    monkeypatch.setattr(sys, "argv", [SCRIPT.name])  # argparse begins its lines with it
    for options in NONSENSE:
        with pytest.raises(SystemExit):
            sft.parse_args(options.split())
        lines.append(unquoted_choices(capsys.readouterr().err.removesuffix("\n")))
    check("errors", "\n".join(lines) + "\n", wide=[""])


def test_dry_run(folder):
    """With the tokenizer: lengths, rows, steps and the memory plan; the advice about steps is right when followed."""
    options = ("--dry-run", "--model", "base", "--max-length", 128, "--no-bf16")  # a CPU without bfloat16 says so
    shown = screen(folder, *options, "--grad-accum", 4)
    check("dry_run", shown, wide=["next "])
    steps = re.search(r"would make about (\d+) steps", " ".join(shown.split()))[1]
    followed = screen(folder, *next_flags(shown), "--dry-run")
    made = re.search(r"\nsteps +(\d+) optimizer steps", followed)[1]  # fewer, because more is held out
    assert "advice" not in followed and 0.9 <= int(made) / int(steps) <= 1


def next_flags(shown: str) -> list[str]:
    """The flags of the training command that a dry run ends with."""
    return shlex.split(shown.splitlines()[-1].removeprefix(f"next       python3 {SCRIPT.name}"))


@pytest.mark.parametrize("count", [8, 12, 20, 28, 60])
def test_advice_comes_at_once(count, folder):
    """When all flags of the first advice are added, the second has nothing new to say."""
    (folder / "train.chatml").write_text(dialogues(count))

    def shown(*options) -> tuple[list[str], list[str]]:
        lines = screen(folder, "--dry-run", "--model", "base", "--max-length", 128, *options)
        return re.findall(r"^advice     (.*(?:\n {11}.*)*)", lines, re.M), next_flags(lines)

    first, flags = shown()
    assert any("--" in line for line in first) and "--epochs" in flags
    assert shown(*flags) == ([line for line in first if "--" not in line], flags)


def test_a_plan_that_does_not_fit(folder, llama31_tokenizer):
    (folder / "llama").mkdir()
    llama31_tokenizer.save_pretrained(folder / "llama")
    (folder / "llama/config.json").write_text(json.dumps(LLAMA_8B))
    options = ("--no-bnb-nf4", "--max-length", 8192, "--lora-r", 64, "--grad-accum", 1)
    shown = screen(folder, "--dry-run", "--model", "llama", *options)
    check("plan_does_not_fit", shown[shown.index("memory ") : shown.index("next ")])


def test_preview(folder):
    """Trained tokens are coloured on a terminal, and between brackets in a pipe or if NO_COLOR is set."""
    (folder / "train.chatml").write_text(
        "<|system|>\nTu es Dolores.\n<|user|>\nÇa va <|eot_id|> ?\x1b[2J\n<|assistant|>\nOui.\n<|user|>\nEt là ?\n"
        "<|assistant|>\nBien !\n<|endoftext|>\n<|user|>\nQui ?\n<|assistant|>\nMoi.\n"
    )
    options = ("--preview", 2, "--model", "base", "--eval-fraction", 0)
    preview = lambda shown: shown[shown.index("=== row") :]  # noqa: E731
    plain, coloured = preview(screen(folder, *options)), preview(terminal(folder, *map(str, options)))
    check("preview", plain)
    check("preview_colour", coloured)
    assert COLOUR.sub("", coloured) == re.sub("[⟦⟧]", "", plain)
    assert preview(terminal(folder, *map(str, options), NO_COLOR="1")) == plain


def test_a_run(folder, short_smollm2):
    """The output of a whole run, without times, speeds and losses, which differ between machines."""
    (folder / "questions.txt").write_text("Qui es-tu ?\nOù vas-tu ?\n")
    options = (*TINY, "--max-length", "256", "--epochs", "0.2", "--sample-prompts", "questions.txt")
    code, shown = run(folder, "--model", short_smollm2, "--output", "out", *options)
    assert code == 0, shown
    wide = [line for line in (folder / "log.txt").read_text().splitlines() if len(line) > 80]
    assert all(line.startswith("next ") for line in wide)  # a command to be pasted stays on one line
    shown = shown.replace(sys.executable, "python3").replace(str(short_smollm2), "base")
    shown = shown.replace(f"{SCRIPT.parent}/", "")
    check("run", re.sub(r"\d+\.\d+(e[+-]\d+)?|[\d,]+ tok/s|\d+:\d\d:\d\d", "#", shown), wide=[""])
