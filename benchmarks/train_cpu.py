#!/usr/bin/env python3
"""Training on a CPU: ours beside TRL's SFTTrainer, on SmolLM2-135M-Instruct and the same packed rows of train.chatml.

    python benchmarks/train_cpu.py                     # float32 where the CPU has no bf16 arithmetic
    python benchmarks/train_cpu.py --dtype bfloat16

Runs alternate, each in a process of its own, through both Trainers as they ship: LoRA of rank 16 on all projections,
the same rows in the same order, the same optimizer. The clock runs from the end of the first optimizer step to the
end of the last. Peak RSS is the kernel's figure for the whole process. The losses of the first step, taken before any
weight has changed, must agree.
TRL's defaults checkpoint every layer; its second row is without. What TRL does on CUDA only: it runs its head on the
trained tokens alone, and its Triton kernel spares the float32 copy of the logits; here it scores every token.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VARIANTS = ("ours", "TRL, as it comes", "TRL, no checkpointing")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def options(args, output: Path):
    """The trainer's knobs for this run; one epoch over the rows is `--steps` optimizer steps."""
    import train_sft_dolores as trainer

    lone = ["--no-bf16"] if args.dtype == "float32" else ["--bf16"]
    knobs = f"""--max-length {args.max_length} --grad-accum {args.grad_accum} --eval-fraction 0 --epochs 1
        --learning-rate 1e-4 --lr-scheduler-type constant --warmup-ratio 0 --optim adamw_torch --save-steps 100000
        --lora-r 16 --lora-alpha 32 --lora-dropout {args.dropout} --no-bnb-nf4 --gradient-checkpointing none"""
    files = ["--model", str(args.model), "--output", str(output), "--train-files", str(ROOT / "train.chatml")]
    found = trainer.parse_args([*files, *lone, *knobs.split(), *(["--compile"] if args.compile else [])])
    found.process, found.processes = 0, 1
    return found


def make_rows(args, knobs):
    """The first rows of train.chatml, packed; as many as the steps need."""
    from transformers import AutoTokenizer

    import train_sft_dolores as trainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encode = trainer.Encoder(tokenizer, trainer.chat_format("dolores", tokenizer))
    rows, *_ = trainer.make_rows(knobs.train_files, [], knobs, encode)
    rows.plan = rows.plan[: args.steps * args.grad_accum]
    assert len(rows) == args.steps * args.grad_accum, f"only {len(rows)} rows; fewer --steps"
    return rows, tokenizer


def ours(args, folder: Path):
    import torch

    import train_sft_dolores as trainer

    knobs = options(args, folder)
    trainer.quiet()
    rows, tokenizer = make_rows(args, knobs)
    model = trainer.load_base(knobs, str(args.model), torch.device("cpu"))
    trainer.lose_on_trained_tokens(model)
    model = trainer.add_lora(model, knobs, None)
    trainer.plan_checkpointing(model, rows, knobs)
    return trainer.make_trainer(knobs, model, tokenizer, rows, None, [], trainer.Stop()), rows


def trl(args, folder: Path):
    """SFTTrainer on the same rows, given as a finished packed data set; everything else as it comes."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows, tokenizer = make_rows(args, options(args, folder))
    packed = Dataset.from_list([
        {
            "input_ids": [int(i) for ids in row["input_ids"] for i in ids],
            "labels": [int(i) for labels in row["labels"] for i in labels],
            "seq_lengths": [len(ids) for ids in row["input_ids"]],
        }
        for row in (rows[number] for number in range(len(rows)))
    ])  # fmt: skip
    arguments = SFTConfig(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=1, use_cpu=True, report_to=[],
        gradient_accumulation_steps=args.grad_accum, learning_rate=1e-4, lr_scheduler_type="constant",
        optim="adamw_torch", max_grad_norm=0.8, logging_steps=1, save_strategy="no", max_length=args.max_length,
        packing=True, dataset_kwargs={"skip_prepare_dataset": True}, bf16=args.dtype == "bfloat16", disable_tqdm=True,
        model_init_kwargs={"dtype": args.dtype},
        **({"gradient_checkpointing": False} if args.run == "TRL, no checkpointing" else {}),
    )  # fmt: skip
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=args.dropout, target_modules=TARGETS
    )
    model = str(args.model)
    return SFTTrainer(model, arguments, train_dataset=packed, processing_class=tokenizer, peft_config=lora), rows


def run(args, folder: Path) -> dict:
    """Train one variant: {losses of the steps, tokens and seconds after the first step, peak MiB}."""
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback, set_seed

    set_seed(0)
    trainer, rows = (ours if args.run == "ours" else trl)(args, folder)
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    counted = range(args.grad_accum, len(rows))
    return {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "tokens": sum(len(ids) for number in counted for ids in rows[number]["input_ids"]),
        "seconds": ends[-1] - ends[0],
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measured(variant: str) -> dict:
    """What one variant's own process says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, "--run", variant, "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{variant}: exit status {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, help="a small model's folder; else SmolLM2 from tests/parts.py")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 unless the CPU has bf16 arithmetic")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps, the first one not timed")
    parser.add_argument("--grad-accum", type=int, default=2, help="rows in a step")
    parser.add_argument("--dropout", type=float, default=0.05, help="LoRA dropout")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs; medians are shown")
    parser.add_argument("--compile", action="store_true", help="our layers compiled")
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    args.dtype = args.dtype or ("bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32")
    if not args.model:
        import parts

        args.model = parts.smollm2()
    if args.run:
        print("\n" + json.dumps(run(args, args.folder)))
        return
    print(f"command   {shlex.join(['python', *sys.argv])}")
    print(f"machine   {platform.machine()}, {os.cpu_count()} cores; {datetime.date.today()}; torch {torch.__version__}")
    print(f"model     {args.model.name}, {args.dtype}, rows of {args.max_length} tokens, {args.grad_accum} in a step")
    print("TRL       off CUDA its head scores every token; on CUDA the trained ones only")
    variants = [variant for variant in VARIANTS if variant == "ours" or find_spec("trl")]
    runs = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant in variants:
            runs[variant].append(measured(variant))
    print(f"\n{'':24}tokens/s   ours is faster by   first loss   last loss   peak RSS")
    for variant in variants:
        speed = statistics.median(run["tokens"] / run["seconds"] for run in runs[variant])
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(runs["ours"], runs[variant], strict=True))
        first, last, mib = runs[variant][0]["losses"][0], runs[variant][0]["losses"][-1], max(r["mib"] for r in runs[variant])
        print(f"{variant:24}{speed:8.0f}{ratio:18.2f} ×{first:13.5f}{last:12.4f}{mib:8,.0f} MiB")
    first = [runs[variant][0]["losses"][0] for variant in variants]
    tolerance = 1e-4 if args.dtype == "float32" else 2e-2
    assert max(first) - min(first) <= tolerance * max(first), f"the first losses differ: {first}"


if __name__ == "__main__":
    main()
