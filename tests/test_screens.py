"""Everything that is printed, word for word, compared with tests/screens/*.txt, at 80 columns.

UPDATE_SCREENS=1 python -m pytest tests/test_screens.py      # writes the files; read the difference
"""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from runs import SCRIPT, TINY, assert_says, dialogues, error_of, main, run
from test_chatml import ERRORS, OK, load
from test_train import LLAMA_8B

SCREENS = Path(__file__).with_name("screens")
COLOR = re.compile(r"\033\[[0-9;]*m")


def check(name: str, shown: str, wide=()):
    """Equal to the file; no line is longer than 80 columns, except those that contain one of `wide`."""
    file = SCREENS / f"{name}.txt"
    if os.environ.get("UPDATE_SCREENS"):
        file.write_text(shown, encoding="utf-8")
    assert shown == file.read_text(encoding="utf-8")
    long = [line for line in COLOR.sub("", shown).splitlines() if len(line) > 80]
    assert [line for line in long if not any(part in line for part in wide)] == []


@pytest.fixture
def folder(tmp_path, smollm2, monkeypatch) -> Path:
    """The current folder, with a small corpus and SmolLM2 as `base`."""
    (tmp_path / "train.chatml").write_text(dialogues(40))
    (tmp_path / "base").symlink_to(smollm2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def screen(folder, capsys):
    """A function that returns what the script prints there with these options."""

    def screen(*options) -> str:
        code = main(*options)
        shown, err = capsys.readouterr()
        assert (code, err) == (0, "")
        # The command that a dry run ends with, as it is typed in the script's own folder.
        return re.sub(rf"^(next +)\S*python\S* {SCRIPT} ", rf"\1python3 {SCRIPT.name} ", shown, flags=re.MULTILINE)

    return screen


def next_flags(shown: str) -> list[str]:
    """The flags of the training command that a dry run ends with."""
    return shlex.split(shown.splitlines()[-1].removeprefix(f"next       python3 {SCRIPT.name}"))


def test_help(screen):
    check("help", screen("--help"))


def test_warnings(folder, screen):
    parts = [OK] * 8 + [f"<|system|>\n\n<|user|>\n{q}\n<|assistant|>\na\n" for q in (
        "Ã©tÃ©", "x" * 20_001, "q\n<| user |> r", "a <|eot_id|> b", "\\<|user|>", "é" * 50, "a <|user|> b",
        "\n```\n<|system|>\nS\n```\n<|user|>\nq", "q<|endoftext|>")]  # fmt: skip
    parts += ["<|user|>\nq\n<|assistant|>\na</s>\n", "".join(OK.replace("q", f"q{i}") for i in range(30)), "Lost.\n"]
    (folder / "d.chatml").write_text("<|endoftext|>\n".join(parts) + "<|user|>\nUnanswered.\n")
    check("warnings", screen("--dry-run", "--skip-bad", "--train-files", "d.chatml"), wide=["hf download"])


def test_all_errors_at_once(folder, capsys):
    """Equal ones are one line; of others the first twenty are shown."""
    bad = (f"<|endoftext|>\n<|user|>\nq\n<|assitant|>\na\n<|r{i}|>\n" for i in range(30))
    (folder / "d.txt").write_text(OK + "".join(bad))
    assert main("--train-files", "d.txt") == 2
    out, err = capsys.readouterr()
    assert out == ""
    check("all_errors", err, wide=["d.txt:"])


NONSENSE = [
    "--max-length 15", "--max-length 2k", "--max-length 1e3", "--lora-dropout -0.1", "--lora-dropout 1", "--learning-rate 0",
    "--learning-rate nan", "--learning-rate inf", "--epochs 0", "--epochs inf", "--grad-accum 0", "--train-batch-size 0",
    "--eval-batch-size -1", "--lora-r 0", "--lora-r 1.5", "--lora-alpha 0", "--warmup-ratio 1", "--warmup-ratio -0.1",
    "--max-grad-norm -1", "--torch-memory-fraction 0", "--torch-memory-fraction 1.5", "--max-split-size-mb 20",
    "--eval-fraction 0.9", "--seed -1", "--seed 4294967296", "--logging-steps 0", "--eval-steps 0", "--save-steps 0",
    "--save-total-limit 0", "--input-format csv", "--chat-format alpaca", "--optim sgdd", "--lr-scheduler-type cosin",
    "--bnb-dtype int8", "--overlong cut", "--gradient-checkpointing some", "--gradient-checkpointing -1", "--epoch 1",
    "--lora_r 8", "--model", "--train-files", "extra", "--resume --overwrite",
]  # fmt: skip


def test_errors(folder, capsys):
    """One line for each mistake in the data (inputs: test_chatml.py) or in the flags."""
    lines = []
    for name, content in ERRORS:
        lines.append(error_of(load, content, name))
        assert_says(lines[-1], lines[-1].split(": ")[0])
    for options in NONSENSE:
        assert main(*options.split()) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        # Python's versions differ in the quotes around the choices of a flag.
        lines.append(re.sub(r"\(choose from [^)]+\)", lambda choices: choices[0].replace("'", ""), err[:-1]))
    check("errors", "\n".join(lines) + "\n", wide=[""])


def test_dry_run(screen):
    """With the tokenizer: lengths, rows, steps and the memory plan; the advice about steps is right when followed."""
    options = ("--dry-run", "--model", "base", "--max-length", 128, "--no-bf16")  # a CPU without bfloat16 says so
    shown = screen(*options, "--grad-accum", 4)
    check("dry_run", shown, wide=["next "])
    steps = re.search(r"would make about (\d+) steps", " ".join(shown.split()))[1]
    followed = screen(*next_flags(shown), "--dry-run")
    made = re.search(r"\nsteps +(\d+) optimizer steps", followed)[1]  # fewer, because more is held out
    assert "advice" not in followed and 0.9 <= int(made) / int(steps) <= 1


@pytest.mark.parametrize("count", [8, 12, 20, 28, 60])
def test_advice_comes_at_once(count, folder, screen):
    """When all flags of the first advice are added, the second has nothing new to say."""
    (folder / "train.chatml").write_text(dialogues(count))

    def shown(*options) -> tuple[list[str], list[str]]:
        lines = screen("--dry-run", "--model", "base", "--max-length", 128, *options)
        return re.findall(r"^advice     (.*(?:\n {11}.*)*)", lines, re.M), next_flags(lines)

    first, flags = shown()
    assert any("--" in line for line in first) and "--epochs" in flags
    assert shown(*flags) == ([line for line in first if "--" not in line], flags)


def test_a_plan_that_does_not_fit(folder, screen, llama31_tokenizer):
    llama31_tokenizer.save_pretrained(folder / "llama")
    (folder / "llama/config.json").write_text(json.dumps(LLAMA_8B))
    options = ("--no-bnb-nf4", "--max-length", 8192, "--lora-r", 64, "--grad-accum", 1)
    shown = screen("--dry-run", "--model", "llama", *options)
    check("plan_does_not_fit", shown[shown.index("memory ") : shown.index("next ")])


def test_preview(folder, screen, monkeypatch):
    """Trained tokens are colored on a terminal, and between brackets in a pipe or if NO_COLOR is set."""
    (folder / "train.chatml").write_text(
        "<|system|>\nTu es Dolores.\n<|user|>\nÇa va <|eot_id|> ?\x1b[2J\n<|assistant|>\nOui.\n<|user|>\nEt là ?\n"
        "<|assistant|>\nBien !\n<|endoftext|>\n<|user|>\nQui ?\n<|assistant|>\nMoi.\n"
    )

    def preview() -> str:
        shown = screen("--preview", 2, "--model", "base", "--eval-fraction", 0)
        return shown[shown.index("=== row") :]

    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = preview()
    check("preview", plain)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    colored = preview()
    check("preview_color", colored)
    assert COLOR.sub("", colored) == re.sub("[⟦⟧]", "", plain)
    monkeypatch.setenv("NO_COLOR", "1")
    assert preview() == plain


def test_a_run(folder, short_smollm2):
    """The output of a whole run, without times, speeds and losses, which differ between machines."""
    (folder / "questions.txt").write_text("Qui es-tu ?\n")
    options = (*TINY, "--max-length", "256", "--epochs", "0.2", "--sample-prompts", "questions.txt")
    code, shown = run(folder, "--model", short_smollm2, "--output", "out", *options)
    assert code == 0, shown
    wide = [line for line in (folder / "log.txt").read_text().splitlines() if len(line) > 80]
    assert all(line.startswith("next ") for line in wide)  # a command to be pasted stays on one line
    shown = shown.replace(sys.executable, "python3").replace(str(short_smollm2), "base")
    shown = shown.replace(f"{SCRIPT.parent}/", "")
    check("run", re.sub(r"\d+\.\d+(e[+-]\d+)?|[\d,]+ tok/s|\d+:\d\d:\d\d", "#", shown), wide=[""])
