"""The sides of the training benchmarks: the trainer itself, TRL's SFTTrainer and a plain Trainer on the same rows.

Each function returns a Trainer, ready to train; `timed` trains and returns what was measured.
"""

import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import llama  # noqa: F401 - makes the trainer importable
import numpy as np

import train_sft_dolores as sft


def arguments(output: Path, *options):
    """The trainer's arguments for a short run that keeps nothing."""
    fixed = ("--output", output, "--eval-fraction", 0, "--warmup-ratio", 0, "--sample-prompts", "none")
    args = sft.parse_args([str(option) for option in (*fixed, *options)])
    args.output.mkdir(parents=True, exist_ok=True)
    return args


def random_rows(count: int, length: int, vocabulary: int):
    """`count` full rows of random tokens, in documents as long, and trained in such shares, as in train.chatml."""
    import datasets

    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(length / 5), 0.5, count * 8).astype(int).clip(8, length)
    samples = []
    for number, size in enumerate(lengths):
        ids = random.integers(3, vocabulary, size, dtype=np.int32)
        labels = np.where(np.arange(size) < size // 3, sft.IGNORE, ids).astype(np.int32)
        samples.append({"input_ids": ids, "labels": labels, "trained": size - size // 3, "digest": number,
                        "file": "random", "line": number, "part": 0})  # fmt: skip
    plan = sorted(sft.pack(lengths, length, 0), key=lambda row: -lengths[row].sum())
    return sft.Rows(datasets.Dataset.from_list(samples), plan[:count])


def random_llama(shape: dict, device, attention: str, nf4: bool = True):
    """LlamaForCausalLM in bfloat16 with random weights, its projections in NF4, quantized one by one.

    No more than one projection is ever held in 16 bits, so eight billion parameters take 6 GiB and seconds on a GPU.
    """
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoModelForCausalLM, LlamaConfig

    def random(weight):
        return torch.randn(weight.shape, device=device, dtype=dtype) * 0.02 + (weight.dim() == 1)

    config, dtype = LlamaConfig(**shape), torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for name, module in list(model.named_modules()):
        if nf4 and name.endswith("_proj"):
            sizes = module.in_features, module.out_features
            linear = Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            linear.weight = Params4bit(random(module.weight), quant_type="nf4", module=linear).to(device)
            linear.support_avx512bf16_for_cpu = False  # the trainer's load_base says why
            model.set_submodule(name, linear)
        elif "weight" in module._parameters:
            module.weight = torch.nn.Parameter(random(module.weight))
    model.is_loaded_in_4bit = nf4  # PEFT and TRL ask for this
    model.config.use_cache = False
    return model.requires_grad_(False)


def as_trl_packs(rows):
    """The same rows as SFTTrainer's own packing gives them: input_ids, labels, seq_lengths."""
    import datasets

    rows = [rows[i] for i in range(len(rows))]
    return datasets.Dataset.from_dict({
        "input_ids": [np.concatenate(row["input_ids"]) for row in rows],
        "labels": [np.concatenate(row["labels"]) for row in rows],
        "seq_lengths": [[len(ids) for ids in row["input_ids"]] for row in rows],
    })  # fmt: skip


def plan(args, rows, config: dict, trained: float):
    """The trainer's plan for these rows, `trained` their share of trained tokens."""
    base = sft.Base(args.model, None, config, lambda turns: [])
    counts = {"tokens": 1000, "trained_tokens": round(1000 * trained), "steps": len(rows)}
    return sft.Plan(args, sft.World(), {}, counts, [], [], base, rows)


def ours(planned, model, device):
    """From the frozen base to the Trainer by the trainer's own functions, with its self-check and choice of layers."""
    with mock.patch.object(sft, "load_base", lambda *_: model):
        model = sft.load_model(planned, planned.args.lora_target_modules, device)
    return in_order(sft.make_trainer(planned, model, None, SimpleNamespace(any_rank_signaled=lambda _: False)))


def lora_config(args):
    """PEFT's configuration with the same values as ours."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                      target_modules=args.lora_target_modules)  # fmt: skip


def peer_arguments(args, kind, **more):
    """The trainer's TrainingArguments with the peers' own defaults: bf16 autocast, Trainer's logging."""
    ours = sft.training_arguments(args, evaluating=False)
    same = ("output_dir", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "use_cpu",
            "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "optim", "seed", "logging_steps",
            "disable_tqdm")  # fmt: skip
    return kind(**{name: getattr(ours, name) for name in same}, report_to=[], bf16=args.bf16, **more)


def trl(args, model, rows, tokenizer, checkpointing: bool):
    """TRL's trainer on our rows in our order."""
    from trl import SFTConfig, SFTTrainer

    config = peer_arguments(args, SFTConfig, max_length=args.max_length, packing=True, packing_strategy="bfd",
                            gradient_checkpointing=checkpointing,
                            dataset_kwargs={"skip_prepare_dataset": True})  # fmt: skip
    return in_order(SFTTrainer(model=model, args=config, train_dataset=as_trl_packs(rows), processing_class=tokenizer,
                               peft_config=lora_config(args)))  # fmt: skip


def plain(args, model, rows):
    """The usual recipe: prepare_model_for_kbit_training, get_peft_model, Trainer with bf16 and checkpointing."""
    import peft
    import torch
    import transformers

    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(model, lora_config(args))

    def collate(batch):
        row = batch[0]
        tensor = {name: torch.tensor(row[name])[None] for name in ("input_ids", "labels")}
        return tensor | {"position_ids": torch.cat([torch.arange(n) for n in row["seq_lengths"]])[None]}

    config = peer_arguments(args, transformers.TrainingArguments, remove_unused_columns=False, gradient_checkpointing=True,
                            gradient_checkpointing_kwargs={"use_reentrant": False})  # fmt: skip
    return in_order(transformers.Trainer(model, config, collate, as_trl_packs(rows)))


def in_order(trainer):
    """Every side sees the rows in the same order and writes no checkpoint."""
    from torch.utils.data import SequentialSampler

    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    trainer.args.save_strategy = "no"
    return trainer


def timed(trainer, tokens_per_step: float, warm_up: int) -> dict:
    """Train; {"tokens_per_second": median over the steps after the first `warm_up`, "losses", "first_step_seconds"}."""
    import torch
    from transformers import TrainerCallback

    times = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.monotonic())

        on_step_end = on_train_begin

    trainer.add_callback(Watch())
    trainer.train()
    steps = np.diff(times)
    speed = tokens_per_step / float(np.median(steps[warm_up:]))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"tokens_per_second": speed, "losses": losses, "first_step_seconds": float(steps[0])}
