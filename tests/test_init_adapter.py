"""--init-adapter: an adapter is trained further on new data, on its own base and in its own chat format."""

import json
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch
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


def test_nothing_changes_before_the_first_step(half, monkeypatch):
    """The model starts with the adapter's weights, whatever rank and alpha the flags say."""
    sft.load_libraries()
    monkeypatch.chdir(half)
    args = sft.inherit_lora(
        arguments(*options("--lora-r", "2", "--lora-alpha", "99", "--lora-target-modules", "o_proj"))
    )
    base = sft.find_base(args, str(args.model))
    encoded = base.encode([[sft.Turn("user", "un ?", 1), sft.Turn("assistant", "deux.", 1)]])
    row = {"input_ids": [encoded[0].input_ids], "labels": [encoded[0].labels], "file": [""], "line": [0]}
    batch = sft.collate([row])
    del batch["documents"]

    plan = sft.Plan(args, sft.World(), {}, {}, [], None, base, [row])
    model = sft.load_model(plan, args.lora_target_modules, torch.device("cpu")).eval()
    from peft import PeftModel, get_peft_model_state_dict

    weights = adapter_weights(half / "out")
    assert weights.keys() == get_peft_model_state_dict(model).keys()
    assert all(torch.equal(value, weights[name]) for name, value in get_peft_model_state_dict(model).items())
    plain = sft.load_base(args, base.folder, torch.device("cpu"))
    theirs = PeftModel.from_pretrained(plain, half / "out").eval()
    ids = batch["input_ids"]
    assert torch.allclose(model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)


def test_two_halves_beat_one(half):
    """Held-out loss after a second half is below the first's, and starts where the first ended."""
    code, printed = run(half, *options("--output", "chained"), log="chained.txt")
    assert code == 0, printed
    assert "r 4, alpha 8 and down_proj" in printed
    first, second = record(half), record(half, "chained")
    assert second["results"]["eval_loss_before"] == pytest.approx(first["results"]["eval_loss_after"], abs=1e-4)
    assert second["results"]["eval_loss_after"] < first["results"]["eval_loss_after"] - 0.01
    digest = sft.sha256(half / "out/adapter_model.safetensors")
    assert second["init_adapter"] == {"name": "out", "sha256": digest} and first["init_adapter"] is None


def test_rank_and_targets_of_the_checkpoint(half, monkeypatch, capsys):
    """A checkpoint can be trained further too: its record is in the folder above."""
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
