"""Training for real, on a small model: what each flag does, which files are written, and what the fast path computes."""

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from runs import (
    ROOT,
    TINY,
    adapter_weights,
    arguments,
    assert_same_adapter,
    assert_says,
    dialogues,
    planned,
    record,
    run,
    unwrapped,
)
from transformers import AutoTokenizer

import train_sft_dolores as sft

sft.load_libraries()
WORLD = sft.World()
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
FILES = {"adapter_model.safetensors", "adapter_config.json", "training_args.json", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", "config.json", "README.md", "loss.png"}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, short_smollm2) -> Path:
    """The folder of a run of six steps that has ended."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.chatml").write_text(dialogues(24))
    options = (*TINY[:-2], "--lora-dropout", "0.1", "--name", "cook")
    code, out = run(folder, "--model", short_smollm2, "--output", "out", *options)
    assert code == 0, out
    (folder / "printed").write_text(out)
    return folder


def short_run(folder: Path, model: Path, *options, **more) -> tuple[int, str]:
    return run(folder, "--model", model, "--output", "out", *TINY, *options, **more)


def lora_model(folder, *options, precision=("--no-bf16", "--no-bnb-nf4")):
    """The model as the script trains it, from these flags."""
    args = arguments("--model", folder, "--lora-r", 4, *precision, *options)
    model = sft.load_base(args, str(folder), torch.device("cpu"))
    return sft.add_lora(model, args, args.lora_target_modules, None)


def batch(length=40, documents=2, trained=0.5):
    """A collated batch of random documents; the last part of each is trained."""
    rows = {"input_ids": [], "labels": [], "file": ["f"] * documents, "line": list(range(documents))}
    random = torch.Generator().manual_seed(1)
    for _ in range(documents):
        ids = torch.randint(10, 40_000, (length,), generator=random).numpy().astype("int32")
        rows["input_ids"].append(ids)
        labels = ids.copy()
        labels[: round(length * (1 - trained))] = sft.IGNORE
        rows["labels"].append(labels)
    inputs = sft.collate([rows])
    del inputs["documents"]
    return inputs


# ---- which files are written ----


def test_output(trained):
    assert {path.name for path in (trained / "out").iterdir()} >= FILES
    written = record(trained)
    data = written["data"]
    assert data["conversations"] == 24 and data["held_out"] == 1 and data["steps"] == written["results"]["steps"]
    assert written["chat_format"] == {
        "name": "dolores",
        "before": {"system": "<|system|>\n", "user": "<|user|>\n", "assistant": "<|assistant|>\n"},
        "after": {"system": "\n", "user": "\n", "assistant": "<|im_end|>\n"},
        "eos_token": "<|im_end|>",
        "answer_start": "",
        "no_system": "",
        "folds_system": False,
    }
    assert written["args"]["learning_rate"] == 1e-2 and written["args"]["lora_dropout"] == 0.1
    assert written["data"]["sha256"] == {"train.chatml": sft.sha256(str(trained / "train.chatml"))}
    assert written["versions"]["torch"] == torch.__version__
    config = json.loads((trained / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert len(adapter_weights(trained / "out")) == 2 * 7 * 2
    template = (trained / "out/chat_template.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(trained / "out")
    assert tokenizer.chat_template == template
    assert "chat_template" not in json.loads((trained / "out/tokenizer_config.json").read_text())


def test_the_best_adapter_is_saved_and_the_loss_is_its_own(trained):
    results = record(trained)["results"]
    assert results["eval_loss_after"] < results["eval_loss_before"]
    assert_same_adapter(trained / "out", trained / f"out/checkpoint-{results['best_step']}")


def test_a_normal_run_prints_no_warning(trained):
    printed = (trained / "printed").read_text()
    assert "arning:" not in printed and "[transformers]" not in printed and "deprecated" not in printed
    command = shlex.split(printed.splitlines()[-1])[1:]
    assert command[0] in ("python3", sys.executable) and Path(command[1]) == ROOT / "merge_lora.py"
    assert command[2:] == ["--adapter", "out", "--output", "cook_full"]


def test_the_model_card_describes_the_run(trained):
    card = (trained / "out/README.md").read_text()
    results = record(trained)["results"]
    assert f"loss {results['eval_loss_before']:.3f} -> {results['eval_loss_after']:.3f} " in card
    (question,) = results["samples"]["after"]  # the one held-out conversation's
    assert f"<|user|>\n{question}\n" in (trained / "train.chatml").read_text()
    assert f"**{question}**" in card and card.count("*after*") == 1
    assert card.splitlines()[card.splitlines()[1:].index("---") + 2] == "# cook"
    assert "ollama create cook -f cook_full/Modelfile" in card and str(trained) not in card
    assert (trained / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    answer = card.partition("*after*\n\n")[2].partition("\n\n")[0]
    assert all(line.startswith(">") for line in answer.split("\n"))  # a heading in it does not break the page


def test_the_command_in_the_card_is_the_run(trained):
    (command,) = re.findall("^python3 train_sft_dolores.py .*", (trained / "out/README.md").read_text(), re.M)
    repeated, written = vars(arguments(*shlex.split(command)[2:])), record(trained)["args"]
    assert {name for name in written if str(repeated[name]) != str(written[name])} == {
        "model"
    }  # its path stays private
    assert repeated["model"] == Path(written["model"]).name


def test_default_questions_are_the_training_ids_before_an_answer(trained, short_smollm2, tmp_path, monkeypatch):
    """With the system turn, up to where the answer begins: the ids that the template gives."""
    monkeypatch.chdir(trained)
    args = arguments("--max-length", 128)
    encode = sft.load_encoder("m", str(short_smollm2), "dolores")
    plan = planned(args, encode)
    ((question, ids),) = sft.find_prompts(plan).items()
    conversation = next(c for c in sft.read_conversations(["train.chatml"], "chatml") if c.turns[1].content == question)
    turns = [{"role": turn.role, "content": turn.content} for turn in conversation.turns[:-1]]
    tokenizer = AutoTokenizer.from_pretrained(trained / "out")
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert conversation.turns[0].role == "system" and tokenizer.decode(ids) == text
    own = sft.find_prompts(plan._replace(questions=["Qui es-tu ?"]))
    assert tokenizer.decode(own["Qui es-tu ?"]) == "<|user|>\nQui es-tu ?\n<|assistant|>\n"


# ---- a run that learns nothing ----


def test_a_warm_up_is_rounded_down(data_folder, short_smollm2):
    """Its first step has rate 0."""
    for ratio, shown in (("0.5", ["0.0e+00", "5.0e-03", "1.0e-02"]), ("0.2", ["1.0e-02", "8.5e-03", "5.0e-03"])):
        options = ("--no-packing", "--epochs", "0.3", "--warmup-ratio", ratio, "--overwrite")
        code, out = short_run(data_folder, short_smollm2, *options)
        assert code == 0 and re.findall(r"  lr (\S+)", out)[:3] == shown, out


def test_the_only_step_learns(trained, data_folder, short_smollm2):
    """Without packing, too: a row is a conversation."""
    code, out = short_run(data_folder, short_smollm2, "--no-packing", "--epochs", "0.05")
    assert code == 0 and "step 1/1 " in out, out
    assert any(w.abs().max() > 0 for name, w in adapter_weights(data_folder / "out").items() if "lora_B" in name)
    assert record(data_folder)["data"]["rows"] == 23 > record(trained)["data"]["rows"]


REFUSED = {  # flags of a run that would learn nothing: what the line says
    "--learning-rate 1e-50": ("zero",),  # float32 cannot hold it
    "--grad-accum 32": ("--grad-accum 1", "--epochs", "--early-stopping"),  # the rows do not fill a step
}


@pytest.mark.parametrize("flag", REFUSED)
def test_a_run_that_learns_nothing_is_refused(flag, data_folder, short_smollm2):
    code, out = short_run(data_folder, short_smollm2, "--epochs", "0.05", *flag.split())
    assert code == 2 and not (data_folder / "out/README.md").exists()
    assert_says(out.splitlines()[-1], flag, *REFUSED[flag])


# ---- every flag has its effect ----

TRAINER_FLAGS = {
    ("--epochs", "3"): ("num_train_epochs", 3.0),
    ("--train-batch-size", "4"): ("per_device_train_batch_size", 4),
    ("--eval-batch-size", "3"): ("per_device_eval_batch_size", 3),
    ("--grad-accum", "7"): ("gradient_accumulation_steps", 7),
    ("--learning-rate", "3e-4"): ("learning_rate", 3e-4),
    ("--lr-scheduler-type", "linear"): ("lr_scheduler_type", "linear"),
    ("--max-grad-norm", "0.1"): ("max_grad_norm", 0.1),
    ("--optim", "adamw_torch_fused"): ("optim", "adamw_torch_fused"),
    ("--seed", "9"): ("seed", 9),
    ("--logging-steps", "4"): ("logging_steps", 4),
    ("--eval-steps", "5"): ("eval_steps", 5),
    ("--save-steps", "20"): ("save_steps", 20),
    ("--report-to", "tensorboard"): ("report_to", ["tensorboard"]),
}


@pytest.mark.parametrize("flag", TRAINER_FLAGS, ids=" ".join)
def test_flags_that_trainer_takes(flag):
    name, value = TRAINER_FLAGS[flag]

    def taken(*options):
        args = arguments(*options)
        return getattr(sft.training_arguments(args, evaluating=True), name)

    assert taken(*flag) == value != taken()


def test_lora_flags(short_smollm2):
    model = lora_model(
        short_smollm2, "--lora-alpha", 12, "--lora-dropout", 0.3, "--lora-target-modules", "q_proj,down_proj"
    )
    adapted = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q_proj", "down_proj"}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (4, 192) and layer.scaling["default"] == 3.0
    assert layer.lora_dropout["default"].p == 0.3


@pytest.mark.parametrize(
    "options, weight, compute",
    [
        (("--no-bf16", "--no-bnb-nf4"), torch.float32, None),
        (("--bf16", "--no-bnb-nf4"), torch.bfloat16, None),
        (("--bf16", "--bnb-nf4"), torch.uint8, torch.bfloat16),
        (("--no-bf16", "--bnb-nf4", "--bnb-dtype", "float32"), torch.uint8, torch.float32),
    ],
)
def test_precision_flags(short_smollm2, options, weight, compute):
    model = lora_model(short_smollm2, precision=options)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    assert layer.base_layer.weight.dtype == weight
    assert getattr(layer.base_layer, "compute_dtype", None) == compute
    if compute:
        assert layer.base_layer.weight.quant_state.quant_type == "nf4" and layer.base_layer.weight.quant_state.nested
    plain = torch.bfloat16 if "--bf16" in options else torch.float32
    base = model.get_base_model()
    assert {base.model.norm.weight.dtype, base.lm_head.weight.dtype, base.model.embed_tokens.weight.dtype} == {plain}
    trainable = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trainable == {torch.float32}, "adapters are float32 masters"


ALLOCATOR = {  # flags, what PyTorch's variable was, and what it is then
    ("", None): "expandable_segments:True",
    ("--no-cuda-alloc-expandable --max-split-size-mb 64", None): "max_split_size_mb:64",
    ("", "backend:native"): "backend:native",
}


@pytest.mark.parametrize("flags, before", ALLOCATOR)
def test_allocator_flags(flags, before, monkeypatch):
    """What has no effect is named."""
    monkeypatch.setattr(os, "environ", {"PYTORCH_ALLOC_CONF": before} if before else {})
    args = arguments(*flags.split())
    said = sft.set_allocator(args.cuda_alloc_expandable, args.max_split_size_mb)
    assert os.environ["PYTORCH_ALLOC_CONF"] == ALLOCATOR[flags, before]
    without_effect = "PYTORCH_ALLOC_CONF=backend:native" if before else "" if flags else "--max-split-size-mb 128"
    assert without_effect in said and bool(said) == bool(without_effect)


def test_gradient_checkpointing_flag(short_smollm2, capsys):
    for option, recomputed in (
        ("all", [True, True]),
        ("none", [False, False]),
        ("auto", [False, False]),
    ):
        model = lora_model(short_smollm2)
        sft.choose_checkpointing(model, [], arguments("--gradient-checkpointing", option))
        assert [layer.gradient_checkpointing for layer in model.get_base_model().model.layers] == recomputed
        assert f"{sum(recomputed)} of 2 layers" in unwrapped(capsys.readouterr().out)


@pytest.mark.slow
def test_early_stopping(data_folder, short_smollm2):
    """A learning rate that is far too high makes the held-out loss worse; after three such evaluations the run ends."""
    options = ("--epochs", "30", "--learning-rate", "0.5", "--early-stopping", "3", "--save-steps", "100")
    code, out = short_run(data_folder, short_smollm2, *options)
    assert code == 0, out
    results, steps = record(data_folder)["results"], record(data_folder)["data"]["steps"]
    best, last = results["best_step"], results["steps"]
    assert best + 6 == last < steps
    (stopped,) = (line for line in out.splitlines() if line.startswith("stopped "))
    assert f"step {last} " in stopped and f"step {best}" in stopped
    assert_same_adapter(data_folder / "out", data_folder / f"out/checkpoint-{best}")  # between two --save-steps
    # Stopped three steps after the best one and resumed, it counts on.
    at = ("training_step", 2 * best + 6, signal.SIGINT)  # two rows in a step
    assert short_run(data_folder, short_smollm2, *options, "--overwrite", at=at)[0] == 130
    code, out = short_run(data_folder, short_smollm2, *options, "--resume")
    assert code == 0 and f"out/checkpoint-{best + 3}" in out and record(data_folder)["results"]["steps"] == last, out


@pytest.mark.slow
def test_nf4_trains_on_a_cpu(data_folder, short_smollm2):
    """The precision and the optimizer of the documented command, NF4 and bfloat16, on this CPU."""
    options = [o for o in TINY if o not in ("--no-bf16", "--no-bnb-nf4", "--optim", "adamw_torch")]
    (data_folder / "train.chatml").write_text(dialogues(6))  # takes minutes where a CPU has no bfloat16
    code, out = run(data_folder, "--model", short_smollm2, "--output", "out", *options)
    assert code == 0, out
    assert "no GPU, so adamw_torch takes the place of paged_adamw_8bit" in out
    results = record(data_folder)["results"]
    assert results["eval_loss_after"] < results["eval_loss_before"]


# ---- the fast path ----


def test_checkpointed_layers_give_the_same_gradients(short_smollm2):
    """With dropout too, and the random numbers that follow are the same."""
    model, inputs, found = lora_model(short_smollm2, "--lora-dropout", 0.3).train(), batch(), []
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    for option in ("all", "none"):
        sft.choose_checkpointing(model, [], arguments("--gradient-checkpointing", option))
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad] + [torch.rand(4)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_after_an_evaluation_are_right(short_smollm2):
    """bitsandbytes repacks 4-bit weights in a no-grad forward on some CPUs; gradients after it would be wrong."""
    model = lora_model(short_smollm2, "--lora-dropout", 0, precision=("--no-bf16", "--bnb-dtype", "float32"))
    assert all(not m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu"))
    inputs, grads = batch(), []
    for _ in range(2):
        model.zero_grad()
        model.train()(**inputs).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        with torch.no_grad():
            model.eval()(**inputs)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_memory_and_fix(capsys):
    """GiB of the documented run; and the setting that saves memory, of those not used yet."""
    counts = {"tokens": 100, "trained_tokens": 67}
    base = sft.Base("", None, LLAMA_8B, None)
    need = sft.memory_plan(sft.Plan(arguments(), WORLD, {}, counts, [], None, base))
    known = {"base": 3.38 + 1.96, "adapters and optimizer": 0.78}
    assert {name: need[name] for name in known} == pytest.approx(known, abs=0.05)
    small = {"--max-length 2048": (True, True, True), "--max-length 4096": (False, True, True),
             "--max-length 8192": (False, False, True), "--no-bnb-nf4": (False, False, True)}  # fmt: skip
    for options, fits in small.items():
        sft.print_memory(sft.Plan(arguments(*options.split()), WORLD, {}, counts, [], None, base))
        said = unwrapped(capsys.readouterr().out)
        assert re.findall("(enough|too little) on (12|16|24)", said) == [
            ("enough" if enough else "too little", gpu) for enough, gpu in zip(fits, ("12", "16", "24"), strict=True)
        ]
    long = arguments("--max-length", 65536)
    sft.print_memory(sft.Plan(long, WORLD, {}, counts, [], None, base))
    assert "--max-length 32768" in unwrapped(capsys.readouterr().out)
    fixes = ("--train-batch-size 2", "", "--gradient-checkpointing all --no-bnb-nf4", "--gradient-checkpointing all")
    assert [" ".join(sft.saving_flags(arguments(*options.split()))) for options in fixes] == [
        "--train-batch-size 1 --grad-accum 64", "--gradient-checkpointing all", "--bnb-nf4", "--max-length 1024"]  # fmt: skip
