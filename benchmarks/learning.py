#!/usr/bin/env python3
"""What a larger corpus is worth, and which chat format a small model learns faster: on SmolLM2-135M, a CPU is enough.

    python benchmarks/learning.py                    # --steps for shorter or longer runs

22 conversations of train.chatml are set aside; no run trains on them. Then, with the same settings: the rest of
the corpus; 60 conversations of it, one pass; those 60 for as many optimizer steps as the rest; and the rest in
the base's own chat format, the same share of a pass (its headers are shorter: some steps fewer). Loss is the mean over the trained tokens of the held-out conversations (assistant
text and end token, the same tokens in both formats), by the trainer's own evaluation. Differences come with
a 95 % interval over the choice of held-out conversations; what another seed of training would do is not in it.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import llama
from llama import ROOT

HELD_OUT, SMALL = 22, 60  # conversations
KNOBS = ["--optim", "adamw_torch", "--learning-rate", "5e-4", "--lora-r", "16", "--lora-alpha", "32",
         "--lora-dropout", "0", "--max-length", "1024", "--grad-accum", "2", "--sample-prompts", "none"]  # fmt: skip
QUESTIONS = [
    "Qui es-tu ?", "Comment distinguer ce que je sais de ce que je crois ?", "À quoi sert la mémoire ?",
    "Je n'arrive pas à dormir.", "Pourquoi le temps passe-t-il plus vite avec l'âge ?", "As-tu peur de quelque chose ?",
    "Dois-je quitter mon travail ?", "Qu'est-ce qu'un mensonge utile ?", "Mon père ne me parle plus.",
    "Comment apprendre à se taire ?", "Que faire d'un regret ?", "Es-tu consciente ?", "Pourquoi relire un livre ?",
    "J'ai raté mon examen.", "Qu'est-ce que la patience ?", "Donne-moi un conseil pour écrire.",
    "Pourquoi les gens ont-ils peur du silence ?", "Je me sens seul ce soir.", "Comment finir une amitié ?",
    "Qu'est-ce qui reste d'un voyage ?",
]  # fmt: skip


def split(folder: Path) -> dict[str, Path]:
    """train.chatml as three files of messages: held_out, whole (the rest) and small (60 of the rest)."""
    import train_sft_dolores as trainer

    found = list(trainer.read_conversations([str(ROOT / "train.chatml")], "chatml"))
    random.Random(0).shuffle(found)
    parts = {"held_out": found[:HELD_OUT], "whole": found[HELD_OUT:], "small": found[HELD_OUT : HELD_OUT + SMALL]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, conversations in parts.items():
        chats = [[{"role": turn.role, "content": turn.content} for turn in c.turns] for c in conversations]
        lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in parts}


def command(output: Path, files: dict[str, Path], part: str, *options: str) -> list[str]:
    import parts

    return [sys.executable, str(ROOT / "train_sft_dolores.py"), "--model", str(parts.smollm2()), "--output", str(output),
            "--train-files", str(files[part]), "--eval-files", str(files["held_out"]), "--input-format", "messages",
            *KNOBS, *options]  # fmt: skip


def length(steps: int, a_pass: int, evaluations: int = 1) -> list[str]:
    """Options for so many optimizer steps (the trainer rounds epochs up) and evaluations, the last at the end."""
    every = str(steps // evaluations)
    return ["--epochs", f"{(steps - 0.5) / a_pass:.5f}", "--eval-steps", every, "--save-steps", every]


def steps_in_a_pass(files: dict[str, Path], part: str) -> int:
    report = files[part].with_suffix(".report.json")
    subprocess.run(command(report, files, part, "--json", str(report)), check=True, stdout=subprocess.DEVNULL)
    return json.loads(report.read_text())["steps_per_epoch"]


def train(output: Path, files: dict[str, Path], part: str, *options: str) -> dict:
    """Run the trainer, or find its finished run: the record, with the last held-out loss in it."""
    if not (output / "adapter_model.safetensors").exists():
        run = [*command(output, files, part, *options), "--overwrite"]
        print("$", " ".join(run[1:]).replace(f"{ROOT}/", ""), flush=True)
        with open(output.with_suffix(".log"), "w") as log:
            if subprocess.run(run, stdout=log, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"}).returncode:
                sys.exit(Path(log.name).read_text()[-2000:])
    record = json.loads((output / "training_args.json").read_text())
    newest = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    record["results"]["eval_loss_last"] = [log["eval_loss"] for log in history if "eval_loss" in log][-1]
    return record


def held_out(file: Path, chat_format: str):
    """The held-out samples, as the trainer evaluates them."""
    import parts
    from transformers import AutoTokenizer

    import train_sft_dolores as trainer

    tokenizer = AutoTokenizer.from_pretrained(parts.smollm2())
    encode = trainer.Encoder(tokenizer, trainer.chat_format(chat_format, tokenizer))
    conversations = trainer.read_conversations([str(file)], "messages")
    batches = trainer.encode_conversations(conversations, encode, 1024, "split", lambda *_: None)
    return [sample for batch in batches for sample in batch]


def losses(model, samples):
    """Float64 [conversations, 2]: sum of the losses of the trained tokens, and their number."""
    import numpy as np
    import torch

    found = {}
    for sample in samples:
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.input_ids[None].astype(np.int64))).logits[0, :-1]
        targets = torch.from_numpy(sample.labels[1:].astype(np.int64))
        total = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        found[sample.digest] = found.get(sample.digest, 0) + np.array([total, (targets >= 0).sum().item()])
    return np.array(list(found.values()))


def difference(a, b) -> str:
    """Loss of a less that of b on the same conversations, with a paired bootstrap over these."""
    import numpy as np

    mean = lambda sums: sums[..., 0].sum(-1) / sums[..., 1].sum(-1)  # noqa: E731
    picks = np.random.default_rng(0).integers(0, len(a), (10_000, len(a)))
    low, high = np.percentile(mean(a[picks]) - mean(b[picks]), [2.5, 97.5])
    higher = int((a[:, 0] / a[:, 1] > b[:, 0] / b[:, 1]).sum())
    return f"{mean(a) - mean(b):+.3f} [{low:+.3f}, {high:+.3f}], higher in {higher} of {len(a)} conversations"


def trained(adapter: Path, files: dict[str, Path]):
    """`losses` of the base with this adapter, in its own chat format, float32."""
    import parts
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parts.smollm2(), dtype=torch.float32)
    name = json.loads((adapter / "training_args.json").read_text())["chat_format"]["name"]
    return losses(PeftModel.from_pretrained(model, adapter), held_out(files["held_out"], name))


def share_that_stops(adapter: Path, with_adapter: bool, longest: int = 200) -> str:
    """How many greedy answers, by the base with or without its adapter, end by themselves within `longest` tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = json.loads((adapter / "training_args.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(record["base"]["model"], dtype=torch.float32)
    if with_adapter:
        model = PeftModel.from_pretrained(model, adapter)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=longest, do_sample=False)[:, inputs.input_ids.shape[1] :]
    ended = (output == tokenizer.eos_token_id).any(1)
    return f"{int(ended.sum())} of {len(ended)}"


def row(*cells) -> None:
    print("|", " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells), "|", flush=True)


def table(*head: str) -> None:
    print()
    row(*head)
    row(*["---"] * len(head))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=118, help="of 2 rows; 118: one pass (default)")
    parser.add_argument("--precision", default="--bf16", choices=("--bf16", "--no-bf16"), help="what is quicker here")
    parser.add_argument("--folder", type=Path, default=Path("runs_learning"), help="where to work; finished runs stay")
    args = parser.parse_args()
    print("machine", llama.machine(), llama.versions("torch", "transformers", "peft"))
    import train_sft_dolores as trainer

    trainer.quiet()
    files, options = split(args.folder), [args.precision, "--no-bnb-nf4"]
    whole, small = (steps_in_a_pass(files, part) for part in ("whole", "small"))

    def run(name, part, *settings):
        return train(args.folder / name, files, part, *options, *settings)

    runs = {
        "whole": run("whole", "whole", *length(args.steps, whole)),
        "small, one pass": run("small", "small", *length(small, small)),
        "small, as many steps": run("small_long", "small", *length(args.steps, small, evaluations=3)),
    }
    table("trained on", "conversations", "steps", "passes", "loss before", "best", "at the end")
    for name, record in runs.items():
        data, results = record["data"], record["results"]
        passes = results["steps"] / data["steps_per_epoch"]
        losses = [results[key] for key in ("eval_loss_before", "eval_loss_after", "eval_loss_last")]
        row(name, data["conversations"], results["steps"], f"{passes:.2f}", *losses)

    whole_losses = trained(args.folder / "whole", files)
    print("\nsmall, as many steps - whole:", difference(trained(args.folder / "small_long", files), whole_losses))

    own = run("chatml", "whole", *length(args.steps, whole), "--chat-format", "chatml")
    table("chat format", "steps", "loss before", "after", "answers that stop before", "after")
    for name, record, folder in (("dolores", runs["whole"], "whole"), ("chatml (the base's own)", own, "chatml")):
        stops = [share_that_stops(args.folder / folder, after) for after in (False, True)]
        results = record["results"]
        row(name, results["steps"], results["eval_loss_before"], results["eval_loss_last"], *stops)
    print("\ndolores - chatml:", difference(whole_losses, trained(args.folder / "chatml", files)))


if __name__ == "__main__":
    main()
