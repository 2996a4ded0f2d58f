"""--init-adapter: an adapter is trained further on new data, on its own base and in its own chat format."""

import json
import shutil
from itertools import count
from pathlib import Path

import pytest
from families import family
from runs import TINY, adapter_weights, arguments, assert_says, dialogues, error_of, record, run

import train_sft_dolores as sft

OPTIONS = (*TINY, "--eval-files", "held.chatml", "--epochs", "2")


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A folder with the halves of a corpus, other held-out conversations, and an adapter of the first half in out/."""
    folder = tmp_path_factory.mktemp("half")
    parts = dialogues(56).split("<|system|>")[1:]
    for name, chosen in (("one", parts[:24]), ("two", parts[24:48]), ("held", parts[48:])):
        (folder / f"{name}.chatml").write_text("".join(f"<|system|>{part}" for part in chosen))
    code, printed = run(folder, "--model", family("llama3"), "--train-files", "one.chatml", "--output", "out", *OPTIONS)
    assert code == 0, printed
    return folder


def options(*more) -> tuple:
    return ("--model", family("llama3"), "--train-files", "two.chatml", "--init-adapter", "out", *OPTIONS, *more)


def test_two_halves_beat_one(half):
    """Held-out loss starts where the first half ended, whatever the flags of LoRA say, and ends below."""
    others = ("--lora-r", "2", "--lora-alpha", "99", "--lora-target-modules", "o_proj")
    code, printed = run(half, *options("--output", "chained", *others), log="chained.txt")
    assert code == 0, printed
    assert "r 4, alpha 8 and down_proj" in printed
    first, second = record(half), record(half, "chained")
    assert second["results"]["eval_loss_before"] == pytest.approx(first["results"]["eval_loss_after"], abs=1e-4)
    assert second["results"]["eval_loss_after"] < first["results"]["eval_loss_after"] - 0.01
    assert adapter_weights(half / "chained").keys() == adapter_weights(half / "out").keys()
    digest = sft.sha256(half / "out/adapter_model.safetensors")
    assert second["init_adapter"] == {"name": "out", "sha256": digest} and first["init_adapter"] is None


def test_a_checkpoint_can_be_trained_further(half, monkeypatch):
    """Its record is in the folder above."""
    monkeypatch.chdir(half)
    checkpoint = max(Path("out").glob("checkpoint-*"))
    args = sft.inherit_lora(arguments("--init-adapter", checkpoint))
    assert (args.lora_r, args.lora_alpha, len(args.lora_target_modules)) == (4, 8.0, 7)
    sft.check_ancestor(checkpoint, record(half))


def test_what_does_not_fit_is_refused(half, monkeypatch, tmp_path):
    monkeypatch.chdir(half)
    other = tmp_path / "other"
    shutil.copytree(family("llama3"), other)
    with open(other / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")

    numbers = count()

    def refused(*changes) -> str:
        args = arguments(*options("--output", f"no{next(numbers)}", *changes))  # a refused one stays locked
        return error_of(lambda: sft.train(sft.inherit_lora(args), sft.World()))

    assert_says(refused("--model", other), "--init-adapter out", "another base", str(family("llama3")))
    assert_says(refused("--chat-format", "llama3"), "--init-adapter out", "--chat-format dolores")
    assert_says(refused("--init-adapter", "nowhere"), "--init-adapter nowhere")
    assert_says(refused("--init-adapter", family("llama3")), f"--init-adapter {family('llama3')}")
    assert_says(refused("--overwrite", "--output", "out"), "--output out", "out lies in it")
    assert not list(Path().glob("no*/*.safetensors"))
    damaged = tmp_path / "damaged"
    shutil.copytree("out", damaged)
    (damaged / "training_args.json").write_text(json.dumps({"base": {}}))
    assert_says(refused("--init-adapter", damaged), f"--init-adapter {damaged}")

    again = arguments("--model", other, "--train-files", "one.chatml", "--output", "out", *OPTIONS, "--resume")
    assert_says(error_of(sft.train, again, sft.World()), "--resume", "weights of --model", "--force-resume")
