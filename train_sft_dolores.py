#!/usr/bin/env python3
"""Fine-tune Dolores v5 from Llama-3.1-8B-Instruct on one 24 GB GPU: one file, one command.

    python3 train_sft_dolores.py              # the documented run
    python3 train_sft_dolores.py --dry-run    # only look at the data
    python3 train_sft_dolores.py --resume     # continue after a stop

train.chatml -> turns -> (input_ids, labels) -> packed rows -> NF4 base + LoRA -> Trainer -> --output.
Then `python3 merge_lora.py` merges base and adapter into a folder that Ollama reads.

The flags come first, then the story (`main`, `dry_run`, `train`), then their helpers, in the order of the data.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - an older Python fails at the imports below
    print(f"train_sft_dolores.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)

import argparse
import codecs
import contextlib
import csv
import errno
import functools
import gc
import glob
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import textwrap
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from difflib import get_close_matches
from importlib.metadata import version
from itertools import chain, groupby, islice, pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    import numpy as np
except ModuleNotFoundError:
    np = None  # type: ignore[assignment]  # `main` reports it

if TYPE_CHECKING:  # load_libraries imports these
    import accelerate
    import peft
    import torch
    import transformers
    from transformers import Trainer, TrainerCallback
else:
    Trainer = TrainerCallback = object  # `derive` puts the real ones below our classes

ON_WSL = "microsoft" in platform.release().lower()  # Linux inside Windows
ROLES = ("system", "user", "assistant")
IGNORE = -100  # the label that the loss skips; torch's default
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")
OPTIMIZERS = ("paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch", "adamw_torch_fused")
DEFAULT_OUTPUT = Path("runs_dolores_v5/llama31_clean")
TIMEOUT = timedelta(hours=2)  # how long processes wait for each other, for instance while one hashes a checkpoint
MAX_HELD_OUT = 500  # conversations: an evaluation every ten steps must not grow with the data
RECORD = "training_args.json"  # the run's record, and the contract with merge_lora.py
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")  # what a dry run needs of a base
COMPLETE = "complete.json"  # written last into a checkpoint: its files and their sha256


class InputError(Exception):
    """An error the user can fix: `place: what is wrong; how to fix it`, a line each, exit status 2."""


@contextlib.contextmanager
def explain(place: str, hint: str, *errors: type[Exception]):
    """Turn a library's error into one line: the place, then the hint, in which {error} is the error's first line."""
    try:
        yield
    except errors as error:
        raise InputError(f"{place}: {hint.replace('{error}', first_line(error))}") from None


def first_line(error: Exception) -> str:
    """The first line of a library's error, without its full stop."""
    text = f"no {error} in it" if isinstance(error, KeyError) else getattr(error, "strerror", None) or str(error)
    return text.strip().split("\n")[0].rstrip(".")


@contextlib.contextmanager
def any_terminal() -> Iterator[None]:
    """Print as escapes what the terminal's encoding lacks, and end quietly where nobody reads on (`| head`)."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its exit
        sys.exit(128 + signal.SIGPIPE)


def check_name(name: str) -> None:
    """InputError for a file name whose bytes are not UTF-8: no JSON file can hold it."""
    if re.search("[\ud800-\udfff]", name):
        raise InputError(f"{name!a}: the name is not UTF-8; rename it")


# ---- Flags ---------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Defaults in the words of the command line; no flag or file name is broken across lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, False, 0, [], argparse.SUPPRESS) or "default" in (action.help or ""):
            return action.help
        shown = "on" if default is True else " ".join(default) if isinstance(default, list) else default
        return f"{action.help} (default: {shown})"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


class OneLineParser(argparse.ArgumentParser):
    """argparse that reports a wrong flag in one line instead of printing the whole usage."""

    positional = "--train-files"  # the flag for what is typed without one

    def error(self, message: str):
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            flag, known = unknown[1], self._option_string_actions
            dashed = flag.replace("_", "-")
            # At 0.6, --lora-r would be near to --lr.
            near = get_close_matches(dashed, known, n=1 if dashed in known else 2, cutoff=0.7)
            message = f"unknown option {flag}" + (f"; did you mean {' or '.join(near)}?" if near else "")
            if not flag.startswith("-"):
                message = f"unexpected argument {flag}; did you mean {self.positional} {flag}?"
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}; see --help\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Every default is the documented run's."""
    parser = OneLineParser(
        usage="%(prog)s [options]",
        description="Fine-tune Dolores v5 on assistant tokens only: NF4 + LoRA on one 24 GB GPU.",
        epilog="\n".join(["examples:", *str(__doc__).split("\n\n")[1:2]]),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction
    count, above_zero = bounded(int, 1), bounded(float, 0, low_open=True)

    add = parser.add_argument_group("most often changed").add_argument
    add("--model", metavar="NAME", default="meta-llama/Llama-3.1-8B-Instruct", help="Hub name or local folder")
    add("--train-files", metavar="FILE", nargs="+", default=["train.chatml"], help="data files, folders or globs")
    add("--output", metavar="DIR", type=Path, default=DEFAULT_OUTPUT, help="folder for the adapter")
    add("--name", metavar="NAME", type=model_name, default="dolores-v5", help="the model's name, as in Ollama")
    add("--epochs", metavar="N", type=above_zero, default=1.0, help="passes over the data")
    add("--grad-accum", metavar="N", type=count, default=32, help="batches in an optimizer step")
    add("--learning-rate", metavar="N", type=above_zero, default=1.5e-4, help="peak learning rate")
    add("--max-length", metavar="N", type=bounded(int, 16), default=2048, help="tokens in a row")
    add("--dry-run", action="store_true", help="show data, memory and the command, then exit")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    add("--overwrite", action="store_true", help="delete the contents of --output first")

    add = parser.add_argument_group("data").add_argument
    add("--input-format", choices=("auto", "chatml", "messages"), default="auto",
        help="role tags, or rows of JSON, CSV or Parquet; auto: as each file looks")  # fmt: skip
    add("--eval-files", metavar="FILE", nargs="+", default=[], help="held-out data, instead of --eval-fraction")
    add("--eval-fraction", metavar="N", type=bounded(float, 0, 0.5), default=0.05,
        help="share of the data held out, at most 500 conversations")  # fmt: skip
    add("--chat-format", choices=(*FORMATS, "base"), default="dolores",
        help="the text that wraps each turn; base: as in the base's own chat template")  # fmt: skip
    add("--overlong", choices=("split", "drop", "error"), default="split", help="conversations over --max-length")
    add("--skip-bad", action="store_true", help="train without the conversations that have errors")
    add("--packing", action=switch, default=True, help="put several whole conversations into a row")

    add = parser.add_argument_group("training").add_argument
    add("--train-batch-size", metavar="N", type=count, default=1, help="rows in a batch")
    add("--eval-batch-size", metavar="N", type=count, default=1, help="rows in an evaluation batch")
    add("--lr-scheduler-type", metavar="NAME", choices=SCHEDULERS, default="cosine", help="one of %(choices)s")
    add("--warmup-ratio", metavar="N", type=bounded(float, 0, 0.99), default=0.03, help="share of the steps")
    add("--max-grad-norm", metavar="N", type=bounded(float, 0), default=0.8, help="gradient clipping; 0 turns it off")
    add("--optim", metavar="NAME", choices=OPTIMIZERS, default="paged_adamw_8bit", help="one of %(choices)s")
    add("--seed", metavar="N", type=bounded(int, 0, 2**32 - 1), default=42, help="random seed")
    add("--early-stopping", metavar="N", type=count, help="stop after N evaluations without a better loss")

    add = parser.add_argument_group("LoRA and precision").add_argument
    add("--lora-r", metavar="N", type=count, default=32, help="rank")
    add("--lora-alpha", metavar="N", type=above_zero,
        help="the adapter is scaled by alpha / r (default: twice --lora-r)")  # fmt: skip
    add("--lora-dropout", metavar="N", type=bounded(float, 0, 0.99), default=0.05, help="dropout before the adapter")
    add("--lora-target-modules", metavar="NAMES", type=comma_separated,
        default=comma_separated("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"),
        help="linear layers to adapt, separated by commas, or all-linear (default: all seven projections of a Llama layer)")  # fmt: skip
    add("--init-adapter", metavar="DIR", type=Path, help="train this adapter further, with its rank, alpha and targets")
    add("--bf16", action=switch, default=True, help="weights and activations in bfloat16, otherwise float32")
    add("--bnb-nf4", action=switch, default=True, help="base weights in 4 bits (NF4, double quantized)")
    add("--bnb-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute type of NF4")

    add = parser.add_argument_group("memory").add_argument
    add("--gradient-checkpointing", choices=("auto", "all", "none"), nargs="?", const="auto", default="auto",
        help="layers that recompute activations in backward; auto: as many as the GPU needs")  # fmt: skip
    add("--torch-memory-fraction", metavar="N", type=bounded(float, 0, 1, low_open=True), default=0.95,
        help="share of the GPU's memory that may be used")  # fmt: skip
    add("--cuda-alloc-expandable", action=switch, default=True, help="CUDA memory segments that can grow")
    add("--max-split-size-mb", metavar="N", type=bounded(int, 21), default=128,
        help="largest CUDA block that may be split; only with --no-cuda-alloc-expandable")  # fmt: skip

    add = parser.add_argument_group("logs, samples and checkpoints").add_argument
    add("--logging-steps", metavar="N", type=count, default=1, help="optimizer steps between log lines")
    add("--eval-steps", metavar="N", type=count, default=10, help="optimizer steps between evaluations")
    add("--save-steps", metavar="N", type=count,
        help="optimizer steps between checkpoints, a multiple of --eval-steps (default: --eval-steps)")  # fmt: skip
    add("--save-total-limit", metavar="N", type=count, default=5, help="checkpoints to keep")
    add("--sample-prompts", metavar="FILE", type=Path, help="one question per line, or 'none' to ask nothing")
    add("--report-to", metavar="NAME", nargs="+", default=["none"], help="trackers such as tensorboard or wandb")
    add("--preview", metavar="N", type=bounded(int, 0), default=0, help="show N rows, trained tokens marked, then exit")
    add("--force-resume", action="store_true", help="--resume even if data or settings have changed")

    args = parser.parse_args(argv)
    args.resume |= args.force_resume
    args.dry_run |= bool(args.preview)
    args.save_steps = args.save_steps or args.eval_steps
    args.lora_alpha = args.lora_alpha or 2.0 * args.lora_r
    args.report_to = [name for names in args.report_to for name in comma_separated(names)]
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return args


def bounded(kind: type, low: float, high: float | None = None, low_open: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite int or float from `low` to `high`; with low_open, above `low`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= (high or sys.float_info.max) or (low_open and value == low):
            highest = f" and at most {high}" if high else ""
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if low_open else 'at least'} {low}{highest}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def model_name(text: str) -> str:
    """A name that Ollama, the Hub and a shell take as it is."""
    if not re.fullmatch(r"(?:[a-z0-9][\w-]*/)?[a-z0-9][\w.-]*", text, re.ASCII | re.IGNORECASE) or len(text) > 80:
        rule = "must be letters, digits, '-', '_' and '.', such as my-model: at most 80, no '.' before a '/'"
        raise argparse.ArgumentTypeError(f"{text!r} {rule}")
    return text


def comma_separated(text: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


# ---- The story -----------------------------------------------------------------------------------


class World(NamedTuple):
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


class Base(NamedTuple):
    """The base model on disk, as far as it is known without torch."""

    folder: str
    revision: str | None  # commit on the Hub
    config: dict[str, Any]  # config.json
    encode: Encoder


class Plan(NamedTuple):
    """A run, as far as it is known without torch: a dry run shows it, training runs it, training_args.json keeps it."""

    args: argparse.Namespace
    world: World
    files: dict[str, str]  # name: sha256
    counts: dict[str, Any]  # filled by survey, encode_conversations and make_plan; "data" in training_args.json
    findings: list[Finding]
    questions: list[str] | None  # of --sample-prompts; None: those of held-out conversations
    base: Base = None  # type: ignore[assignment]  # None, with all that follows, until its tokenizer is on this machine
    train_rows: Rows = None  # type: ignore[assignment]
    eval_rows: Rows | None = None
    advice: Sequence[str] = ()
    advised: Sequence[str] = ()  # the flags that the advice names


@any_terminal()
def main() -> None:
    """Look at the data, or train. An error that the user can fix ends in one line and exit status 2."""
    # torchrun and accelerate set these.
    world = World(*(int(os.environ.get(name) or n) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))
    args = parse_args()
    if world.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one process prints for all
    try:
        if np is None:
            raise ModuleNotFoundError(name="numpy")
        for name in (os.getcwd(), *sys.argv[1:]):
            check_name(name)
        if args.init_adapter:
            args = inherit_lora(args)
        dry_run(args, world) if args.dry_run else train(args, world)
    except Exception as error:
        line = describe_error(error, less_memory(args, world))
        if line is None:
            raise
        if not (isinstance(error, InputError) and world.local_rank):  # the same in all processes of a machine
            print(line, file=sys.stderr)
        sys.exit(2)


def describe_error(error: Exception, more_memory: str = "free some, or take a larger machine") -> str | None:
    """The line to print about an error that the user can fix, or None for a bug of ours, which keeps its traceback."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        install = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt"
        return f"{error.name}: not installed; run `{install}`"
    number, place = getattr(error, "errno", None), getattr(error, "filename", None)
    if number == errno.ENOSPC or "os error 28" in str(error):  # safetensors has no errno
        return f"{place or 'cache or output'}: no space left on the disk; free some space"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) and place:
        return f"{place}: {os.strerror(number).lower()}; make it readable and writable"
    if out_of_memory(error):
        return f"out of memory; {more_memory}"
    return None


def dry_run(args: argparse.Namespace, world: World) -> None:
    """Show the data, the memory that a step needs, and what is trained on; torch is not imported."""
    Stop(world)  # handles signals
    folder = model_on_disk(args.model)
    plan = make_plan(args, world, find_base(args, folder) if folder else None)
    print_plan(plan)
    if plan.base:
        print_memory(plan)
        print_rows(plan.train_rows, args.preview, plan.base.encode.tokenizer)
        if not args.preview and world.size == 1:  # a launcher's command is not known here
            print_next(sys.argv[0], *training_flags(parse_args([*training_flags(args), *plan.advised])))
    elif args.preview:
        raise InputError(f"--preview: {args.model} is not on this machine; download {', '.join(TOKENIZER_FILES)} of it")
    else:
        missing = "is not on this machine yet; tokens and settings need these files:"
        print_field("tokens", f"{args.model} {missing}")
        print(f"  hf download {args.model} {' '.join(TOKENIZER_FILES)}")


def train(args: argparse.Namespace, world: World) -> None:
    """The documented run: plan it, load the model, train it, write the adapter and its report."""
    stop = Stop(world)
    if not model_on_disk(args.model):
        make_plan(args, world)  # shows errors in the data before a download
    with contextlib.nullcontext() if world.rank else claim_output(args.output, args.resume, args.overwrite):
        base = find_base(args, *resolve_model(args.model))
        headers = read_headers(f"--model {args.model}", base.folder)
        plan = make_plan(args, world, base)
        check_apart(args.output, [*plan.files, args.model, args.sample_prompts, args.init_adapter])
        print_plan(plan)
        device = start_torch(args, world)
        targets = find_targets(args.model, base.folder, headers, args.lora_target_modules)
        enough = plan.counts["rows"] * max(1, args.epochs) >= plan.counts["rows_per_step"]
        if not enough and args.grad_accum > 1:  # less than a pass may be one short step
            fix = " ".join(more_steps(args, world.size, plan.counts)[0])
            raise InputError(f"--grad-accum {args.grad_accum}: {plan.counts['rows']} rows fill no step; use {fix}")
        record, checkpoint = run_record(plan, fingerprint(headers)), None
        if args.init_adapter:
            check_ancestor(args.init_adapter, record)
        if args.resume and not world.rank:
            checkpoint = resume_point(args.output, record, args.force_resume)
        model = load_model(plan, targets, device)
        trainer = make_trainer(plan, model, load_tokenizer(args.model, base.folder, base.encode), stop)
        fit(plan, trainer, record, checkpoint)
        if not world.rank:
            finish(plan, trainer, record)
    trainer.accelerator.end_training()


def make_plan(args: argparse.Namespace, world: World, base: Base | None = None) -> Plan:
    """Read and check the data; given a base, encode, hold out and pack it. InputError where nothing would be trained."""
    train_files, eval_files = find_files(args.train_files), find_files(args.eval_files)
    files, questions = train_files | eval_files, read_prompts(args.sample_prompts)
    counts, findings, samples = read_data(files, args, base and base.encode)
    if not base:  # not on this machine
        if not HUB_NAME.fullmatch(args.model):
            raise InputError(f"--model {args.model}: no such folder; give a folder or a Hub name such as org/model")
        return Plan(args, world, files, counts, findings, questions)
    tokens, trained, part, for_train, for_eval, more = split_data(samples, train_files, eval_files, args)
    chosen, held_out = np.flatnonzero(for_train), np.flatnonzero(for_eval)
    if args.early_stopping and not len(held_out):
        raise InputError(f"--early-stopping {args.early_stopping}: nothing is held out; use --eval-fraction")
    if len(held_out) and args.save_steps % args.eval_steps:
        raise InputError(f"--save-steps {args.save_steps}: no multiple of --eval-steps {args.eval_steps}; change one")
    too_long = f"no answer fits into --max-length {args.max_length}"
    if not trained[chosen].sum():
        why = too_long if trained.sum() == 0 else "all of it is in --eval-files"
        raise InputError(f"{', '.join(train_files)}: nothing to train on; {why}")
    if eval_files and not trained[held_out].sum():
        raise InputError(f"{', '.join(eval_files)}: nothing to evaluate; {too_long}")

    train_rows = make_rows(samples, chosen, tokens, args)
    rows_per_step = args.train_batch_size * args.grad_accum * world.size
    steps_per_epoch = -(-len(train_rows) // rows_per_step)
    trained_on, evaluated = (int(np.count_nonzero(part[rows] == 0)) for rows in (chosen, held_out))
    counts |= {
        "trained_on": trained_on,
        "held_out": evaluated,
        "copies": counts["conversations"] - counts["dropped"] - trained_on - evaluated,  # also in --eval-files
        "tokens": int(tokens[chosen].sum()),
        "longest": int(tokens[chosen].max()),  # after splitting
        "trained_tokens": int(trained[chosen].sum()),
        "rows": len(train_rows),
        "fill": round(float(tokens[chosen].sum() / (len(train_rows) * args.max_length)), 4),
        "rows_per_step": rows_per_step,
        "steps_per_epoch": steps_per_epoch,
        "steps": int(np.ceil(args.epochs * steps_per_epoch)),
    }
    eval_rows = make_rows(samples, held_out, tokens, args) if len(held_out) else None
    advice = advise(args, world.size, counts)
    return Plan(args, world, files, counts, findings + more, questions, base, train_rows, eval_rows, *advice)


def split_data(samples, train_files: dict[str, str], eval_files: dict[str, str], args: argparse.Namespace) -> tuple:
    """(tokens, trained tokens, part, whether trained on, whether held out) of each sample, [N] each; and warnings."""
    digests, tokens, trained, part, for_eval = measure(samples, eval_files)
    copies = ~for_eval & np.isin(digests, digests[for_eval])
    places = samples.select(np.flatnonzero(copies)).select_columns(["file", "line"])
    both = [(file, 1) for file in train_files if file in eval_files]
    both += dict.fromkeys((place["file"], place["line"]) for place in places)  # once, even if it has several parts
    found = [Finding("warning", *place, "held out", "also in --eval-files: not trained on") for place in both]
    if not eval_files:
        for_eval = hold_out(digests, args.eval_fraction, args.seed)
        if args.eval_fraction and not for_eval.any():
            nothing = "nothing is: the data is one conversation"
            found.append(Finding("warning", next(iter(train_files)), 1, "held out", nothing))
    return tokens, trained, part, ~for_eval & ~copies, for_eval, found


def load_model(plan: Plan, targets: list[str], device: torch.device):
    """The frozen base with trainable adapters on these linear layers."""
    args = plan.args
    transformers.set_seed(args.seed)
    print_field("loading", args.model)
    model = add_lora(load_base(args, plan.base.folder, device), args, targets, plan.base.revision)
    model.forward = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)(model.forward)
    # Without a device PEFT loads the best checkpoint, and the one to resume from, onto cuda:0 in every process.
    model.load_adapter = functools.partial(model.load_adapter, torch_device=str(device))
    check_packing(model, plan.train_rows)
    choose_checkpointing(model, plan.train_rows, args)
    return model


def fit(plan: Plan, trainer, record: dict, checkpoint: str | None) -> None:
    """Measure, empty the output folder, train, measure again; fills record["results"]. Exits on a signal."""
    args = plan.args
    ask = functools.partial(generate_answers, trainer.model, trainer.processing_class, trainer.prompts)
    # Only the first process has read the checkpoint folder.
    checkpoint, results = accelerate.utils.broadcast_object_list([checkpoint, record.get("results") or {}])
    record["results"] = results
    if not results:
        if plan.eval_rows:
            results |= measure_before(plan, trainer)
        results["samples"] = {"before": ask(when="before")}
        if not plan.world.rank:
            for entry in args.output.iterdir():  # what --overwrite deletes, now that the first step can begin
                if entry.name != ".lock":
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            write_json(args.output / RECORD, record)

    trainer.stop.finish_step_first = True
    transformers.set_seed(args.seed)  # the same random numbers whether or not an evaluation came first
    began = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Exception:  # torch, safetensors and tokenizers each raise their own error where the disk is full
        raise_if_disk_full(args.output, trainer.state.global_step)
        raise
    cpu = f"CPU ({platform.machine()}, {plural(os.cpu_count() or 1, 'core')})"
    device = torch.cuda.get_device_name() if trainer.model.device.type == "cuda" else cpu
    results |= {"seconds": round(time.monotonic() - began), "resumed": bool(checkpoint), "device": device}
    state, at = trainer.state, f"at step {trainer.state.global_step} of {trainer.state.max_steps}"
    if state.global_step < state.max_steps and trainer.stop.agreed:
        print(f"stopped {at}; continue with:\n  {same_command(plan.world, '--resume')}")
        sys.exit(128 + trainer.stop.agreed)
    if state.global_step < state.max_steps and args.early_stopping:
        without = f"{plural(args.early_stopping, 'evaluation')} without a better loss than {state.best_metric:.4f}"
        print_field("stopped", f"{at}: {without} at step {state.best_global_step}")
    if plan.eval_rows and "held_out" in results:
        print_field("after", "the loss of each held-out conversation")
        results["held_out"]["after"] = trainer.losses(plan.eval_rows)
    results["samples"]["after"] = ask(when="after")


def measure_before(plan: Plan, trainer) -> dict[str, Any]:
    """The base's losses on the held-out conversations, alone and with examples in the prompt: a part of the results."""
    print_field("before", f"the loss of {plural(plan.counts['held_out'], 'held-out conversation')}")
    before, tokens = trainer.losses(plan.eval_rows), trainer.measured_tokens
    loss = sum(before[place] * tokens[place] for place in tokens) / tokens.total()
    print_field("before", f"held-out loss {loss:.4f}; now with examples in the prompt")
    rows, examples = prompted_rows(plan)
    held_out = {"tokens": tokens, "before": before, "prompted": trainer.losses(rows) if len(rows) else {}}
    return {"eval_loss_before": loss, "examples": examples, "held_out": held_out}


def finish(plan: Plan, trainer, record: dict) -> None:
    """Write the adapter (the best by held-out loss), its record, card and loss curve; print what to type next."""
    args, state, results = plan.args, trainer.state, record["results"]
    if not any(parameter.any() for name, parameter in trainer.model.named_parameters() if "lora_B" in name):
        problem = f"after {plural(state.global_step, 'optimizer step')} the adapter is still zero"
        raise InputError(f"--learning-rate {args.learning_rate:g}: {problem}; raise it, or train for more steps")
    trainer.save_model(str(args.output))
    transformers.AutoConfig.from_pretrained(plan.base.folder).save_pretrained(args.output)
    results["steps"] = state.global_step
    if state.best_metric is not None:
        results |= {"eval_loss_after": state.best_metric, "best_step": state.best_global_step}
    if answers := results["samples"]["after"]:
        print_field("after", "copies of the training data in the answers")
        results["copied"] = count_copied(answers.values(), trained_texts(plan))
    write_json(args.output / RECORD, record)
    write_card(args.output, args, record)
    tokens_per_step = plan.counts["tokens"] / plan.counts["steps_per_epoch"]
    plot_losses(state.log_history, results, tokens_per_step, args.name, args.output / "loss.png")
    print_field("adapter", f"{args.output}/adapter_model.safetensors; README.md and loss.png describe the run")
    for name, text in verdict(results).items():
        print_field(name, text)
    print_next(str(Path(sys.argv[0]).with_name("merge_lora.py")), *merge_flags(args.output, args.name))


# ---- Chat format ---------------------------------------------------------------------------------


class ChatFormat(NamedTuple):
    """The text that wraps each turn. Training ids, the Jinja template and Ollama's TEMPLATE all come from it."""

    before: dict[str, str]  # by role: opens a turn; the assistant's also prompts the model to answer
    after: dict[str, str]  # by role: closes a turn; the assistant's contains the end token, which is trained
    eos_token: str  # the token with which the model ends its answer
    answer_start: str = ""  # opens an answer but is not in the prompt, so it is trained: Mistral's space
    no_system: str = ""  # opens a conversation that has no system turn
    folds_system: bool = False  # the system turn opens the first user turn, which then has no text before it


# {name: (before a turn, after a turn, after an answer, end token)}; {eos} is the end token of the base's tokenizer.
FORMATS = {
    "dolores": ("<|{role}|>\n", "\n", "{eos}\n", "{eos}"),  # readable tags that need no new tokens
    "llama3": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>{role}\n", "<|im_end|>\n", "<|im_end|>\n", "<|im_end|>"),
}


class Vocabulary(NamedTuple):
    """What the data needs of a tokenizer, without transformers."""

    backend_tokenizer: Any  # tokenizers.Tokenizer
    eos_token: str | None
    bos_token: str | None = None
    chat_template: str | None = None  # the base's own


def chat_format(name: str, vocabulary: Vocabulary) -> ChatFormat:
    """The named format with this vocabulary's end token; InputError where the two do not fit."""
    if name == "base":
        return base_format(vocabulary)
    before, after, answer_end, eos = (part.replace("{eos}", vocabulary.eos_token or "") for part in FORMATS[name])
    if eos not in special_tokens(vocabulary):
        raise InputError(f"--chat-format {name}: the model has no end token {eos!r}; choose another format")
    opening = {role: before.replace("{role}", role) for role in ROLES}
    return ChatFormat(opening, {"system": after, "user": after, "assistant": answer_end}, eos)


def special_tokens(vocabulary: Vocabulary) -> dict[str, int]:
    """{text: id} of the control tokens, which no content may produce."""
    added = vocabulary.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: token_id for token_id, token in added.items() if token.special}


# Consecutive messages of one role are one turn, as in the training data and in Ollama.
CHAT_TEMPLATE = """\
{%- set before = @before@ %}
{%- set after = @after@ %}
{%- for message in messages %}
    {%- set role = message['role'] if message['role'] in before else 'user' %}
    {%- set previous = messages[loop.index0 - 1]['role'] if loop.index0 else '' %}
    {%- if message['role'] == previous %}
        {{- '\\n\\n' }}
    {%- elif not (@folds_system@ and role == 'user' and previous == 'system') %}
        {{- before[role] }}
    {%- endif %}
    {{- message['content'] }}
    {%- if loop.last or messages[loop.index0 + 1]['role'] != message['role'] %}
        {{- after[role] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- @prompt@ }}
{%- endif %}"""


def chat_template(chat: ChatFormat, adds_bos: bool = False) -> str:
    """The format as a Jinja template, which renders the text that training sees.

    adds_bos: the tokenizer begins a text with BOS. The template then writes it, as chat servers expect of templates.
    """
    prompt = chat.before["assistant"]
    values = {**chat._asdict(), "before": chat.before | {"assistant": prompt + chat.answer_start}, "prompt": prompt}
    template = re.sub("@([a-z_]+)@", lambda found: json.dumps(values[found[1]], ensure_ascii=False), CHAT_TEMPLATE)
    if chat.no_system:
        text = json.dumps(chat.no_system, ensure_ascii=False)
        template = f"{{%- if messages[0]['role'] != 'system' %}}{{{{ {text} }}}}{{%- endif %}}\n{template}"
    return f"{{{{- bos_token }}}}\n{template}" if adds_bos else template


def base_format(vocabulary: Vocabulary) -> ChatFormat:
    """The layout of the base's own chat template; InputError where this program would write another prompt.

    What a template writes only where no answer is to follow is no part of a prompt: Phi-3's `<|endoftext|>` at the end,
    Qwen 3's empty `<think>` block before the last answer.
    """
    from jinja2 import TemplateError

    fitting = [name for name, parts in FORMATS.items() if parts[-1] in ("{eos}", *special_tokens(vocabulary))]
    hint = f"cannot follow the base's chat template: {{error}}; use --chat-format {fitting[-1]}"
    with explain("--chat-format base", hint, ValueError, TypeError, TemplateError):
        if not vocabulary.chat_template:
            raise ValueError("it has none")
        theirs = chat_renderer(vocabulary.chat_template, vocabulary)
        chat, takes_system = derive_format(theirs, vocabulary)
        ours = chat_renderer(chat_template(chat), vocabulary)
        for messages in probe_conversations(with_system=takes_system):
            wanted, got = theirs(messages), ours(messages)
            if wanted != got:
                at = next(i for i in range(len(wanted) + 1) if wanted[: i + 1] != got[: i + 1])
                raise ValueError(f"it writes {wanted[at : at + 40]!r} where we would write {got[at : at + 40]!r}")
    if not takes_system:
        print_field("format", "the base's template takes no system turn: its text opens the first user turn")
    return chat


def derive_format(render: Callable, vocabulary: Vocabulary) -> tuple[ChatFormat, bool]:
    """A format from the texts that a template puts around turns, and whether the template takes a system turn."""

    def around(*roles: str, prompt: bool = True) -> list[str]:
        """The texts before, between and after turns of these roles."""
        texts = re.split("⟪.⟫", render([{"role": role, "content": f"⟪{role[0]}⟫"} for role in roles], prompt))
        if len(texts) != len(roles) + 1:
            raise ValueError("it leaves out or repeats a turn")
        return texts

    opening, to_answer, to_user, _ = around("user", "assistant", "user")
    prompt = around("user")[-1]
    user_end, answer_end = around("user", prompt=False)[-1], around("user", "assistant", prompt=False)[-1]
    if not to_user.startswith(answer_end):  # Phi-3 closes a whole conversation with one more end token
        user_end, answer_end = (end.removesuffix(vocabulary.eos_token or "") for end in (user_end, answer_end))
    before_user = to_user.removeprefix(answer_end)
    takes_system = True
    try:
        before_system, system_end, _ = around("system", "user")
    except ValueError:  # Gemma 2
        before_system, system_end, takes_system = before_user, "\n\n", False
    folds_system = before_system == before_user
    ends = [token for token in special_tokens(vocabulary) if token in answer_end]
    if not ends:
        raise ValueError("it ends an answer without a control token")
    if not before_user:
        raise ValueError("it puts nothing before a user turn")
    if re.search(r'\{\{|"""', f"{opening}{before_system}{system_end}{to_answer}{to_user}"):
        raise ValueError("it has two braces or three quotes, which a Modelfile cannot hold")
    if not folds_system:
        system_end = system_end.removesuffix(before_user)
    chat = ChatFormat(
        {"system": before_system, "user": before_user, "assistant": prompt.removeprefix(user_end)},
        {"system": system_end, "user": user_end, "assistant": answer_end},
        eos_token=min(ends, key=answer_end.index),
        answer_start=to_answer.removeprefix(prompt),
        no_system=opening.removesuffix(before_user),
        folds_system=folds_system,
    )
    return chat, takes_system


def probe_conversations(with_system: bool) -> Iterator[list[dict[str, str]]]:
    """Conversations that await an answer: with and without a system turn, one to three questions, unusual texts."""
    texts = ("Qui es-tu ?", "« L'été »\n\n\n{{ x }} {% y %} 🙂 日本", "a  b\tc <|user|> [INST] </s>", "-")
    for system, questions, first in product(range(1 + with_system), (1, 2, 3), range(len(texts))):
        roles = ["system"] * system + ["user", "assistant"] * questions
        yield [{"role": role, "content": texts[(first + i) % len(texts)]} for i, role in enumerate(roles[:-1])]


def chat_renderer(template: str, vocabulary: Vocabulary) -> Callable[..., str]:
    """A function that renders messages as transformers does, without the BOS token that the tokenizer adds itself."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message: str):
        raise ValueError(message)

    loops = "jinja2.ext.loopcontrols"
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loops])
    # Training and a runtime on another day would see different text.
    environment.globals |= {"raise_exception": fail, "strftime_now": lambda _: fail("it writes today's date")}
    # transformers has a tag {% generation %} that marks answers and renders nothing.
    template = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", template)
    compiled = environment.from_string(re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", template))
    tokens = {key: getattr(vocabulary, key) or "" for key in ("bos_token", "eos_token")}
    bos = tokens["bos_token"] if vocabulary.backend_tokenizer.encode("").ids else ""

    def render(messages: list[dict[str, str]], prompt: bool = True) -> str:
        text = compiled.render(messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **tokens)
        return text.removeprefix(bos)

    return render


# ---- Text -> turns -------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What one role says, and the line where it begins."""

    role: str
    content: str  # stripped: white space at its edges would merge with the format's own tokens
    line: int
    trained: bool = True  # False: this answer is only context for the next ones


class Finding(NamedTuple):
    """Something to say about the data. A conversation with an error is not trained on."""

    level: str  # error, warning, or note (a column, kind row, or key, kind message, that is not read: `text` names it)
    file: str
    line: int  # 0: `text` names the place
    kind: str
    text: str  # of an error: `what is wrong; how to fix it`

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else self.text


class Conversation(NamedTuple):
    """The turns of one conversation, where it stands, and what there is to say about it."""

    turns: list[Turn]
    file: str
    line: int
    findings: list[Finding]


NAME = r"[^|<>\s]{1,40}"
TAG = re.compile(rf"<\|{NAME}\|>")
LINE_TAG = re.compile(rf"<\|(?<![^\n]<\|)({NAME})\|>")  # at the start of a line; 3.5 times as fast as with ^
# What ends a turn of <|im_start|>: <|im_end|> without a backslash, or at the start of a line the next <|im_start|>.
IM_END = re.compile(r"<\|(?:(?<!\\<\|)im_end|(?<![^\n]<\|)(im_start))\|>")
ESCAPED_TAG = re.compile(rf"(?<=\n)\\+<\|{NAME}\|>")  # not on the line of the turn's own tag
ESCAPED_IM_START = re.compile(r"(?<=\n)\\+<\|im_start\|>")
# A misspelled tag at the start of a line, such as `<| user|>`, `<|user>` or `<user>`.
LIKE_TAG = re.compile(r"([<|｜/\s]*)(system|user|assistant|endoftext|im_start|im_end)(?!\w)([|｜>\s]*)", re.IGNORECASE)
# What nobody sees: controls, joiners, marks of direction, fillers, variation selectors (Unicode's default ignorables).
UNSEEN = (
    "\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff"
)
VISIBLE = re.compile(rf"[^\s{UNSEEN}]")
UNSEEN_BEFORE_TAG = re.compile(rf"[{UNSEEN}](?<![^\n].)[{UNSEEN}]*(?=<\|)")  # the BOM of a joined file
MOJIBAKE = re.compile("Ã[\u0080-\u00bf©¨ª«´§¹]|â€|Â[«»°\u00a0]|\ufffd")
ROW_FILES = {".json": "JSON", ".jsonl": "JSON", ".ndjson": "JSON", ".csv": "CSV", ".tsv": "CSV", ".parquet": "Parquet"}
DATA_FILES = (".chatml", ".txt", *ROW_FILES)
CONTEXT = "assistant:context"  # an answer that is not trained
ROLE_NAMES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", CONTEXT: "assistant"}
SHAREGPT = {"human": "user", "gpt": "assistant"}
TOOL_ROLES = ("tool", "function", "ipython", "observation", "tool_call", "tool_calls", "function_call", "tool_response")
# Tokens with which other formats end a turn or a text.
END_TOKENS = ("<|end|>", "<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "<|eom_id|>", "</s>", "<end_of_turn>", "<eos>")
NOT_CLOSED = "this turn is not closed; end it with <|im_end|>"
NO_TOOLS = "tool turns cannot be trained on; delete them, or write the tool's result into a user turn"
# The columns that hold a conversation: OpenAI's, ShareGPT's, prompt and completion, Alpaca's.
LAYOUTS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "input", "output"))
PAIRS = "'prompt' and 'completion', or 'instruction' and 'output'"
# Columns and keys that change what may be trained, and that are not read.
REFUSED = {"label", "kto_tag", "chosen", "rejected", "rejected_response", "rejected_messages", "preferred_output",
           "non_preferred_output", "history", "train_detail", "training_detail", "loss_mask", "image", "images", "video",
           "videos", "audio", "audios"}  # fmt: skip
FLAGS = ("weight", "train", "training", "trainable", "loss")  # false or 0: this answer is only context
TEXT_PARTS = ("text", "input_text", "output_text")  # the last two are those of OpenAI's Responses
NOT_SPACE = re.compile(r"[^\s\ufeff]")
QUOTED = re.compile(r'^"((?:[^"]|"")*)"$')
# The first bytes, in lower case, of files that hold no text of ours.
NOT_DATA = {
    "compressed (gzip, bzip2, xz, zstd or 7-Zip); unpack it": (b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"(\xb5/\xfd", b"7z\xbc\xaf"),
    "a zip archive or an Office document; unpack it, or save its text as UTF-8": (b"pk\3\4", b"\xd0\xcf\x11\xe0"),
    "UTF-16, RTF or PDF; open it and save its text as UTF-8": (b"\xff\xfe", b"\xfe\xff", b"{\\rtf", b"%pdf"),
    "SQLite, Arrow or XML; write its rows as JSON lines, CSV or Parquet": (b"sqlite format", b"arrow1", b"\xff\xff\xff\xff", b"<?xml"),
    "HTML or a Git LFS pointer; download the file itself": (b"<!doctype", b"<html", b"version https://git-lfs"),
}  # fmt: skip


def find_files(patterns: list[str]) -> dict[str, str]:
    """{name: sha256} of the files that these paths, folders and globs name, in order, each once."""
    found: dict[str, str] = {}
    for pattern in patterns:
        matches = [] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        for match in matches or [pattern]:
            names = [match]
            if os.path.isdir(match):
                inside = [path for path in Path(match).glob("[!.]*") if path.is_file()]
                names = sorted(str(path) for path in inside if path.suffix.lower() in DATA_FILES)
            if not names:
                raise InputError(f"{match}: no data file in this folder; their names end in {', '.join(DATA_FILES)}")
            for name in names:
                check_name(name)
                if not os.path.isfile(name):
                    problem = "a pipe, which can be read only once" if os.path.exists(name) else "no such file"
                    raise InputError(f"{name}: {problem}; give the path of a data file or a glob that matches one")
                with explain(name, "cannot be read ({error}); make it readable", OSError):
                    found[name] = found.get(name) or sha256(name)
    return found


def sha256(file: str | Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(file, "rb") as source:
        while block := source.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_conversations(files: Iterable[str], input_format: str) -> Iterator[Conversation]:
    """Yield the conversations of all files, with and without errors; InputError where the rest cannot be read."""
    for file in files:
        found, kind = False, detect_format(file, input_format)
        for said in read_chatml(file) if kind == "chatml" else read_rows(file, kind):
            found = True
            yield check_conversation(file, said)
        if not found:
            raise InputError(f"{file}: no conversation in it; see the README on the data format")


def mistake(file: str, line: int, text: str) -> Finding:
    """The finding that a conversation cannot be trained on."""
    return Finding("error", file, line, "mistake", text)


def detect_format(file: str, input_format: str = "auto") -> str:
    """chatml, JSON, CSV or Parquet: by the first bytes where they are clear, otherwise by the extension."""
    with open(file, "rb") as source:
        raw = source.read(1 << 12)
    start, by_name = raw.removeprefix(codecs.BOM_UTF8).lstrip(), ROW_FILES.get(os.path.splitext(file)[1].lower())
    for what, magic in NOT_DATA.items():
        if start.lower().startswith(magic):
            raise InputError(f"{file}: this is {what}")
    kind = by_name or ("JSON" if re.match(rb'\{\s*["}]|\[\s*[{\]]', start) else "chatml")
    if start.startswith((b"<|", b"PAR1")):
        kind = "Parquet" if start.startswith(b"PAR1") else "chatml"
    if input_format == "chatml" and kind != "chatml":
        raise InputError(f"{file}: looks like {kind}; leave out --input-format chatml")
    return by_name or "JSON" if input_format == "messages" and kind == "chatml" else kind


def read_chatml(file: str) -> Iterator[list[Turn | Finding]]:
    """Yield the turns of each conversation of a file in either dialect, and what there is to say about them.

    Role tags at the start of a line (`<|user|>`, content on the same line or the next ones), or
    `<|im_start|>user` … `<|im_end|>`. A backslash before a tag makes it text. A conversation starts at the
    file's start, at a system turn or at a line `<|endoftext|>`.
    """
    said: list[Turn | Finding] = []
    opened = 0  # the line of the turn before, if it needs <|im_end|>
    for line, tag, text in split_at_tags(file):
        im, opened = opened, 0
        if im and tag:
            said.append(mistake(file, im, NOT_CLOSED))
        name, escaped = tag, ESCAPED_TAG
        if tag == "im_start":
            opened, escaped = line, ESCAPED_IM_START
            name, newline, text = text.partition("\n")
            name, text = name.strip(), newline + text.replace("\\<|im_end|>", "<|im_end|>")
        role = ROLE_NAMES.get(name or "")
        if said and (role == "system" or tag == "endoftext"):
            yield said
            said = []
        if role:
            content, warnings = unescape_tags(file, line, text, escaped)
            said += [Turn(role, content.strip(), line, name != CONTEXT), *warnings]
        elif tag and tag != "endoftext":
            said.append(mistake(file, line, unknown_role(name, is_tag=not opened)))
        elif text.strip():
            line += text[: -len(text.lstrip())].count("\n")
            what = "before the first tag or after <|im_end|> or <|endoftext|>; put it after a tag such as <|user|>"
            if meant := like_tag(text.lstrip().split("\n")[0]):
                what = f"outside of a turn; did you mean {meant} at the start of the line?"
            said.append(mistake(file, line, f"text {what}"))
    if opened:
        said.append(mistake(file, opened, NOT_CLOSED))
    if said:
        yield said


def split_at_tags(file: str) -> Iterator[tuple[int, str | None, str]]:
    """Yield (line, tag's name, text up to the next tag); no name: the text before the first tag or after <|im_end|>."""
    start, name, pieces = 1, None, []
    for line, text in read_blocks(file):
        at = 0
        while tag := (IM_END if name == "im_start" else LINE_TAG).search(text, at):
            begin = tag.start()
            yield start, name, "".join(pieces) + text[at:begin]
            line += text.count("\n", at, begin)
            start, name, at, pieces = line, tag[1], tag.end(), []
        pieces.append(text[at:])
    yield start, name, "".join(pieces)


def read_blocks(file: str) -> Iterator[tuple[int, str]]:
    """Yield (first line's number, text) of a UTF-8 file, a megabyte of whole lines; BOM and all line ends are accepted."""
    number = 1
    with open(file, "rb") as source:
        while raw := source.read(1 << 20) + source.readline():
            bad, problem = raw.find(0), "a NUL character (U+0000); delete it, or save the file as UTF-8"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad, problem = error.start, f"not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
            if bad >= 0:
                number += raw.count(b"\n", 0, bad)
                raise InputError(f"{file}:{number}: {problem}")
            if "\r" in text:  # the test is much faster
                text = text.replace("\r\n", "\n") if b"\n" in raw else text.replace("\r", "\n")  # alone: an old Mac's
            yield number, UNSEEN_BEFORE_TAG.sub("", text)
            number += text.count("\n")


def read_lines(file: str) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of a UTF-8 file, without line ends."""
    for number, text in read_blocks(file):
        yield from enumerate(text.removesuffix("\n").split("\n"), number)


def unescape_tags(file: str, line: int, text: str, escaped: re.Pattern) -> tuple[str, list[Finding]]:
    """The text without the backslash that makes a tag text, and warnings about text that may be meant as a tag."""
    if "<" not in text and "|" not in text and "｜" not in text:  # almost always
        return text, []
    lines, at, warnings = text.split("\n"), 0, []
    for i, content in enumerate(lines):
        if escaped.match(text, at):
            lines[i] = content[1:]
        elif found := TAG.search(content):
            warnings.append(tag_inside(file, line + i, found[0], ", or start a line with it if it is a tag"))
        elif tag := like_tag(content):
            warnings.append(Finding("warning", file, line + i, "tag", f"this line is text; did you mean {tag}?"))
        at += len(content) + 1
    return "\n".join(lines), warnings


def like_tag(line: str) -> str:
    """The tag that is probably meant where a line begins with a misspelled one, else ""."""
    found = LIKE_TAG.match(line)
    start = found[0].strip() if found else ""
    meant = found and (start == f"<{found[2]}>" or (re.search("[<>]", start) and re.search("[|｜]", start)))
    return f"<|{found[2].lower()}|>" if found and meant else ""


def tag_inside(file: str, line: int, tag: str, other_fix: str = "") -> Finding:
    """The warning about a tag inside a turn."""
    text = f"{escape_controls(tag)[:60]} is trained as text; delete it if it ends an answer{other_fix}"
    return Finding("warning", file, line, "tag", text)


def read_rows(file: str, kind: str) -> Iterator[list[Turn | Finding]]:
    """Yield the turns of each row of JSON, CSV or Parquet, and what there is to say about them; of errors the first."""
    for row, record in {"JSON": read_json_rows, "CSV": read_csv, "Parquet": read_parquet}[kind](file):
        said: list[Turn | Finding] = []
        try:
            if isinstance(record, InputError):
                raise record
            messages, unread = row_messages(record)
            said += [Finding("note", file, row, "row", name) for name in unread]
            for message in messages:
                turn, unread = message_turn(message, row)
                said += [Finding("note", file, row, "message", name) for name in unread]
                if found := TAG.search(turn.content):
                    said.append(tag_inside(file, row, found[0]))
                if turn.role != "system" or [other for other in said if isinstance(other, Turn)] != [turn]:
                    said.append(turn)  # a system turn in a column and in the first message is one
        except InputError as error:
            said = [mistake(file, row, str(error))]
        yield said


def given(record: Any) -> dict[str, Any]:
    """What a row or message holds; InputError, without a place, where a name in it decides what may be trained."""
    fields = {name: value for name, value in record.items() if value not in (None, "", [], {})}
    if refused := REFUSED.intersection(map(str.lower, fields)):
        fix = "delete it, and what should not be trained without it"
        raise InputError(f"{min(refused)!r} is not read, but decides what may be trained; {fix}")
    return fields


def layout(row: Any) -> tuple[str, ...]:
    """The columns that hold the conversation of a row; `input` may be absent."""
    return next((names for names in LAYOUTS if isinstance(row, dict) and row.keys() >= {*names} - {"input"}), ())


def row_messages(row: Any) -> tuple[list, dict]:
    """The messages of a row, and what it holds that is not read; InputError, without a place, if it has none."""
    unread = given(row) if isinstance(row, dict) else {}
    names, messages = ", ".join(unread), []
    columns = layout(unread) or layout(row)
    for name in columns:
        value = unread.pop(name, [])
        if isinstance(value, list):
            messages += value
        elif len(columns) > 1:
            messages.append({"role": "assistant" if name in ("completion", "output") else "user", "content": value})
    if not messages:
        problem = f"no list of messages in {columns[0]!r}" if columns else f"no 'messages', 'conversations', {PAIRS}"
        if unread:
            rows = [name for name, value in unread.items() if isinstance(value, list) and layout(value[0])]
            problem += f" in {shorten(names)}{f', but a list of rows in {rows[0]!r}' if rows else ''}"
        raise InputError(f"{problem}; write one conversation per row, in columns of these names")
    if "system" in unread:  # ShareGPT's and Anthropic's place for the system turn
        messages = [{"role": "system", "content": unread.pop("system")}, *messages]
    return messages, unread


def message_turn(message: Any, row: int) -> tuple[Turn, dict]:
    """The turn of a message in OpenAI's keys or ShareGPT's, and what is not read; InputError without a place."""
    if not isinstance(message, dict):
        raise InputError("a message must be an object; write {'role': …, 'content': …}")
    unread, absent = given(message), "" if message.keys() & {"content", "value"} else None
    name = unread.pop("role" if "role" in unread else "from", None)
    content = unread.pop("content" if "content" in unread else "value", absent)
    role = ROLE_NAMES.get(SHAREGPT.get(name, name)) if isinstance(name, str) else None
    if not role or unread.keys() & {"tool_calls", "function_call"}:
        raise InputError(NO_TOOLS if role else unknown_role(name))
    flags = {flag: unread.pop(flag) for flag in FLAGS if flag in unread and role == "assistant"}
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        unread |= {key: part[key] for part in parts for key in given(part) if key not in ("type", "text")}
        texts = [part["text"] for part in parts if part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        problem = f"the {role} message's 'content' is neither text nor a list of {{'type': 'text', 'text': …}}"
        raise InputError(f"{problem}; only text can be trained on")
    if broken := re.search("[\0\ud800-\udfff]", content):
        raise InputError(f"a NUL or lone surrogate ({escape_controls(broken[0])}) in the {role} message; delete it")
    for flag, value in flags.items():
        if value not in (0, 1):
            raise InputError(f"unknown {flag} {shorten(value)}; write 1 for a trained answer, 0 for only context")
    return Turn(role, content.strip(), row, name != CONTEXT and all(flags.values())), unread


def read_json_rows(file: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, record) of JSON lines or objects, (row, record) of a list; an InputError for a line that is not JSON."""
    lines, decode = read_lines(file), json.JSONDecoder().raw_decode
    number, text = next(((number, line) for number, line in lines if line.strip()), (1, "[]"))
    try:
        by_line = not text.lstrip().startswith("[") and bool(json.loads(text))
    except (ValueError, RecursionError):  # the latter where it is nested too deeply
        by_line = False
    texts = chain([(number, text)], lines) if by_line else [(number, "\n".join([text, *(line for _, line in lines)]))]
    for line, text in texts:
        at = 0
        while found := NOT_SPACE.search(text, at):
            begin = found.start()
            line += text.count("\n", at, begin)
            try:
                record, at = decode(text, begin)
            except (ValueError, RecursionError) as error:
                line += text.count("\n", begin, getattr(error, "pos", begin))
                problem = (
                    f"not JSON ({getattr(error, 'msg', first_line(error))}); write one object per line, or one list"
                )
                if not by_line:
                    raise InputError(f"{file}:{line}: {problem}") from None
                yield line, InputError(problem)
                break
            yield from enumerate(record, 1) if isinstance(record, list) and not by_line else [(line, record)]
            line += text.count("\n", begin, at)


def read_csv(file: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, record) of a CSV file with a header; an InputError, without a place, for one with other fields."""
    lines = read_lines(file)
    above, header = next(lines, (1, ""))
    if sep := re.fullmatch('"?sep=(.)"?', header, re.IGNORECASE):  # Excel's line above the header
        above, header = next(lines, (2, ""))
    delimiter = sep[1] if sep else max(",;\t", key=header.count)
    # Where each line has the same number of tabs, no quote holds lines together: quotes are text.
    tabs = header.count("\t") if delimiter == "\t" else -1
    plain = all(line.count("\t") == tabs for _, line in read_lines(file) if line.strip())
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than csv's 131,072 characters
    texts = (line + "\n" for line in chain([header], (line for _, line in lines)))
    quoting = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    reader, row = csv.reader(texts, delimiter=delimiter, quoting=quoting, strict=True), above  # type: ignore[arg-type]
    try:
        names = [name.strip().lower() for name in next(reader)]
        twice = [name for name in names if name and names.count(name) > 1]
        if twice or not layout(dict.fromkeys(names)):
            problem = f"two columns {twice[0]!r}" if twice else f"no columns {PAIRS} in {shorten(','.join(names))}"
            raise InputError(f"{file}:{row}: {problem}; rename columns in the first line")
        row = above + reader.line_num
        for values in reader:
            if len(values) != len(names) and values:
                problem = f"{len(values)} fields where the first line has {len(names)}"
                yield row, InputError(f"{problem}; put quotes around texts that contain the delimiter")
            elif any(values):  # Excel may write empty rows below the last one
                if plain:
                    values = [QUOTED.sub(lambda found: found[1].replace('""', '"'), value) for value in values]
                yield row, dict(zip(names, values, strict=True))
            row = above + reader.line_num
    except csv.Error as error:
        raise InputError(f"{file}:{row}: not CSV ({error}); double each quote inside a quoted text") from None


def read_parquet(file: str) -> Iterator[tuple[int, dict]]:
    """Yield (row number, record) of a Parquet file."""
    import pyarrow.parquet

    problem = "not a Parquet file, damaged, or its texts are not UTF-8; write it again"
    with explain(file, problem, pyarrow.ArrowInvalid, OSError, UnicodeDecodeError):
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def check_conversation(file: str, said: list[Turn | Finding]) -> Conversation:
    """Join neighboring turns of one role as Ollama does, and say what is wrong or left out."""
    findings = [part for part in said if isinstance(part, Finding)]
    turns, line = [part for part in said if isinstance(part, Turn)], said[0].line
    if any(finding.level == "error" for finding in findings):  # what it hides would only look like another one
        return Conversation(turns, file, line, findings)
    wrong, empty = [], [turn for turn in turns if not VISIBLE.search(turn.content)]
    for role, _, at, _ in empty:
        if role == "system":
            findings.append(Finding("warning", file, at, "empty system", "an empty system turn is ignored"))
        else:
            wrong.append((at, f"empty {role} turn; fill it, or delete the conversation"))
    turns = [turn for turn in turns if turn not in empty] if empty else turns
    for _, content, at, _ in turns:
        if len(content) > 10**6 and " " * 10**6 in content:  # ten million make Llama 3.1's tokenizer panic
            wrong.append((at, "a million spaces in a row; delete them"))
        elif content.endswith(("</s>", "<end_of_turn>", "<eos>")):  # TAG has found those with bars
            findings.append(tag_inside(file, at, content[content.rindex("<") :]))
        if strange := MOJIBAKE.search(content):
            findings.append(Finding("warning", file, at, "encoding", f"{strange[0]!r} looks wrongly decoded"))
    answers = [turn for turn in turns if turn.role == "assistant"]
    mixed = [b.line for a, b in pairwise(turns) if a.role == b.role and a.trained != b.trained]
    if wrong:
        pass  # what an empty turn hides would only look like another mistake
    elif not answers:
        meant = [(found.line, found.text) for found in findings if "<|assistant|>" in found.text]
        wrong = meant[:1] or [(line, "a conversation without an assistant turn; add an answer or delete it")]
    elif next(turn for turn in turns if turn.role != "system") in answers:
        wrong = [(answers[0].line, "the assistant speaks first; put a user turn before it")]
    elif not any(turn.trained for turn in answers):
        wrong = [(line, "every answer is only context; let one be trained, or delete the conversation")]
    elif mixed:
        wrong = [(mixed[0], "neighboring answers, one trained and one only context; mark both alike or join them")]
    turns = join_neighbors(turns)
    if not wrong and (last := turns[-1]).role != "assistant":
        text = f"the last {last.role} turn has no answer and is ignored"
        findings.append(Finding("warning", file, last.line, "no answer", text))
        while turns[-1].role != "assistant":
            turns.pop()
    return Conversation(turns, file, line, findings + [mistake(file, *place_and_text) for place_and_text in wrong])


def join_neighbors(turns: list[Turn]) -> list[Turn]:
    """Neighboring turns of one role as one, with a blank line between them, as Ollama and our template join them."""
    if all(one.role != other.role for one, other in pairwise(turns)):  # almost always, and faster
        return turns
    groups = [list(group) for _, group in groupby(turns, key=lambda turn: turn.role)]
    return [group[0]._replace(content="\n\n".join(turn.content for turn in group)) for group in groups]


def shorten(value: Any) -> str:
    """repr, cut to 60 characters: an error message must not print a whole file."""
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"


def escape_controls(text: str, keep: str = "") -> str:
    """Write controls and what nobody sees as escapes: the content of a file must not control the terminal."""
    keep += " \u00a0\u202f\u3000\u200c\u200d\ufe0f"  # spaces of French and Chinese, joiners of Persian, Hindi and emoji
    return "".join(c if c in keep or (c.isprintable() and VISIBLE.match(c)) else ascii(c)[1:-1] for c in text)


def unknown_role(name: Any, is_tag: bool = False) -> str:
    """What is wrong with the name of a role or tag, and how to fix it."""
    if name in TOOL_ROLES:
        return NO_TOOLS
    shown, known = shorten(name), list(ROLE_NAMES)
    fix = f"use one of {', '.join(known)}"
    if is_tag:
        shown = f"<|{escape_controls(name)[:60]}|>"
        known = [] if f"<|{name}|>" in END_TOKENS else [*known, "endoftext"]
        fix = f"delete it if it ends a turn (the chat format adds its own), or write \\{shown} if it is text"
    if near := get_close_matches(str(name)[:60].lower(), known, n=1):
        fix = f"did you mean {f'<|{near[0]}|>' if is_tag else near[0]}?"
    return f"unknown role {shown}; {fix}"


# ---- Turns -> tokens -----------------------------------------------------------------------------


class Tokens(NamedTuple):
    """A conversation, or a part of one, as token ids."""

    input_ids: np.ndarray  # [T] int32
    labels: np.ndarray  # [T] int32: the id where it is trained, else IGNORE


NO_SYSTEM = Turn("no system", "", 0)  # opens a conversation without a system turn


class Encoder:
    """Turns -> token ids, so that training sees exactly the ids that a runtime will send.

    A runtime encodes the text between two special tokens as one string. So do we, but each answer
    apart from its prompt: then the prompt's ids are a prefix of the training ids. Special tokens
    come from the format alone: contents are encoded with encode_special_tokens, so that a user's
    `<|eot_id|>` stays text.
    """

    def __init__(self, vocabulary: Vocabulary, chat: ChatFormat):
        self.tokenizer, self.chat = vocabulary.backend_tokenizer, chat
        self.tokenizer.no_padding()  # a tokenizer that was saved after padded training would pad and cut here too
        self.tokenizer.no_truncation()
        self.start = self.tokenizer.encode("").ids[:1]  # BOS, if this tokenizer adds one
        self.special_ids = special_tokens(vocabulary)
        added = [token for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        # A special token, with the white space around it that the tokenizer removes (Phi-3).
        patterns = [
            (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
            for token in sorted(added, key=lambda token: -len(token.content))
        ]
        self.special = re.compile(f"({'|'.join(patterns)})")
        end = self.special_ids[chat.eos_token]
        # {role: [(text or a special token's id, whether it is trained)]}
        self.before = {role: self.split(text) for role, text in {**chat.before, NO_SYSTEM.role: chat.no_system}.items()}
        self.after = {role: self.split(text) for role, text in {**chat.after, NO_SYSTEM.role: ""}.items()}
        self.after["assistant"] = [(bit, bit == end) for bit, _ in self.after["assistant"]]
        # SentencePiece tokenizers add a space before each text.
        adds_space = self.tokenizer.encode("a", add_special_tokens=False).tokens[:1] == ["▁a"]
        self.answer_start = chat.answer_start.removeprefix(" ") if adds_space else chat.answer_start

    def split(self, text: str) -> list[tuple[str | int, bool]]:
        """The format's text, with special tokens as ids; none is trained."""
        return [(self.special_ids.get(bit.strip(), bit), False) for bit in self.special.split(text) if bit]

    def pieces(self, turns: list[Turn]) -> Iterator[tuple[str | int, bool]]:
        """Yield (text or a special token's id, whether it is trained) of a conversation."""
        yield from ((bos, False) for bos in self.start)
        text = ""  # untrained text since the last special token or answer
        if not turns or turns[0].role != "system":
            turns = [NO_SYSTEM, *turns]
        previous = ""
        for role, content, _, trained in turns:
            before = [] if self.chat.folds_system and (previous, role) == ("system", "user") else self.before[role]
            content, previous = self.answer_start + content if role == "assistant" else content, role
            for piece, answer in (*before, (content, role == "assistant"), *self.after[role]):
                if isinstance(piece, str) and not answer:
                    text += piece
                    continue
                if text:
                    yield text, False
                yield piece, answer and trained
                text = ""
        if text:
            yield text, False

    def __call__(self, conversations: list[list[Turn]]) -> list[Tokens]:
        """The tokens of each conversation, with one call of the tokenizer for all."""
        pieces = [list(self.pieces(turns)) for turns in conversations]
        texts = [piece for parts in pieces for piece, _ in parts if isinstance(piece, str)]
        self.tokenizer.encode_special_tokens = True  # transformers resets it in each call of its own
        encoded = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        samples = []
        for parts in pieces:
            ids = [next(encoded).ids if isinstance(piece, str) else [piece] for piece, _ in parts]
            input_ids = np.fromiter(chain.from_iterable(ids), np.int32)
            trained = np.repeat([trained for _, trained in parts], list(map(len, ids)))
            samples.append(Tokens(input_ids, np.where(trained, input_ids, IGNORE)))
        return samples


def encode_conversations(
    conversations: list[Conversation], encode: Encoder, max_length: int, overlong: str, counts: dict, findings: list
) -> list[dict[str, Any]]:
    """The samples of these conversations, none above max_length; adds what is split or lost to counts and findings."""
    samples = []
    for (turns, file, line, _), tokens in zip(conversations, encode([c.turns for c in conversations]), strict=True):
        parts, size = [tokens], len(tokens.input_ids)
        if size > max_length and overlong == "error":
            problem = f"{size} tokens, above --max-length {max_length}; shorten it or use --overlong split"
            findings.append(Finding("error", file, line, "too long", problem))
        elif size > max_length:
            parts, unfit = split_conversation(turns, encode, max_length) if overlong == "split" else ([], [])
            parts = [part for part in parts if count_trained(part.labels)]  # the others hold only context
            kept = sum(count_trained(part.labels) for part in parts)
            counts["dropped"] += not parts
            counts["split"] += len(parts) > 1
            counts["dropped_exchanges"] += len(unfit) if parts else 0
            counts["lost_trained_tokens"] += count_trained(tokens.labels) - kept
            if overlong == "drop":
                findings.append(Finding("warning", file, line, "dropped", f"a conversation of {size:,} tokens"))
            if len(parts) > 1:
                findings.append(Finding("warning", file, line, "split", f"{size:,} tokens: split into {len(parts)}"))
            text = "this exchange alone is longer than a row"
            findings += [Finding("warning", file, turn.line, "dropped", text) for turn in unfit]
        key = digest(turns)
        for part, (ids, labels) in enumerate(parts):
            sample = {"input_ids": ids, "labels": labels, "trained": count_trained(labels), "digest": key}
            samples.append(sample | {"file": file, "line": line, "part": part})
    return samples


def count_trained(labels: np.ndarray) -> int:
    """How many labels are trained."""
    return int(np.count_nonzero(labels != IGNORE))


def split_conversation(turns: list[Turn], encode: Encoder, max_length: int) -> tuple[list[Tokens], list[Turn]]:
    """The parts of a long conversation, each with its system turn; and the first turn of each exchange above max_length."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    exchanges: list[list[Turn]] = []
    for turn in turns[len(system) :]:
        if not exchanges or (turn.role != "assistant" and exchanges[-1][-1].role == "assistant"):
            exchanges.append([])
        exchanges[-1].append(turn)
    head = len(encode([system])[0].input_ids)
    if head >= max_length:  # nothing fits behind it; encoding it with each exchange would take quadratic time
        return [], [exchange[0] for exchange in exchanges]
    alone = encode([join_neighbors(system + exchange) for exchange in exchanges])
    ends = np.cumsum([0, *(len(tokens.input_ids) - head for tokens in alone)])
    parts, lost, first = [], [], 0
    while first < len(exchanges):
        most = int(np.searchsorted(ends, ends[first] + max_length - head, "right")) - 1
        for last in range(most, first, -1):  # sizes add up except for a token at a seam, in some tokenizers
            tokens = encode([join_neighbors(system + list(chain(*exchanges[first:last])))])[0]
            if len(tokens.input_ids) <= max_length:
                parts.append(tokens)
                first = last
                break
        else:
            lost.append(exchanges[first][0])
            first += 1
    return parts, lost


def digest(turns: list[Turn]) -> int:
    """63 bits that identify a conversation by its content."""
    text = "\0".join(f"{role if trained else CONTEXT}\0{content}" for role, content, _, trained in turns)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


# ---- Tokens -> rows ------------------------------------------------------------------------------


def read_data(
    files: dict[str, str], args: argparse.Namespace, encode: Encoder | None = None
) -> tuple[dict[str, Any], list[Finding], Any]:
    """Read and check files {name: sha256} and, given an encoder, encode them in the same pass.

    Returns counts, warnings and the samples, a memory-mapped datasets.Dataset or None. A second start finds them in
    the cache and never runs `samples`. InputError lists all errors.
    """
    counts: dict[str, Any] = {"split": 0, "dropped": 0, "dropped_exchanges": 0, "lost_trained_tokens": 0}
    findings: list[Finding] = []
    conversations = survey(files, args, counts, findings)

    def samples() -> Iterator[dict[str, Any]]:
        assert encode
        while batch := list(islice(conversations, 256)):
            yield from encode_conversations(batch, encode, args.max_length, args.overlong, counts, findings)
        raise_errors(counts, findings)
        if counts["dropped"] == counts["conversations"]:
            raise InputError(f"{', '.join(files)}: no answer fits into --max-length {args.max_length}; raise it")
        write_json(report, [counts, findings])

    if not encode:
        deque(conversations, maxlen=0)  # only counted
        raise_errors(counts, findings)
        return counts, findings, None
    import datasets
    from huggingface_hub.constants import HF_HOME

    code, tokenizer = Path(__file__).read_text(encoding="utf-8"), encode.tokenizer.to_str()
    settings = (args.input_format, args.skip_bad, args.max_length, args.overlong, args.chat_format, encode.chat)
    key = hashlib.sha256(repr([code, tokenizer, *settings, *files.items()]).encode()).hexdigest()
    kinds = {"trained": "int32", "digest": "int64", "file": "string", "line": "int32", "part": "int32"}
    columns = dict.fromkeys(("input_ids", "labels"), datasets.List(datasets.Value("int32")))
    features = datasets.Features(columns | {name: datasets.Value(kind) for name, kind in kinds.items()})
    datasets.disable_progress_bars()
    cache = os.environ.get("HF_DATASETS_CACHE") or f"{HF_HOME}/datasets"
    report = Path(cache, f"{key[:32]}.json")
    try:
        made = datasets.Dataset.from_generator(samples, features, cache, fingerprint=key[:32])
        counts, found = read_json(report)
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    except OSError as error:
        problem = f"the cache cannot be {'locked' if error.errno in NO_LOCKS else 'written'} ({error.strerror})"
        raise InputError(f"{error.filename or cache}: {problem}; set HF_HOME to a folder on a local disk") from None
    return counts, [Finding(*fields) for fields in found], made


def measure(samples, eval_files: Iterable[str] = ()) -> tuple[np.ndarray, ...]:
    """(digest, tokens, trained tokens, part: int64; whether it is from one of these files: bool) of all samples, [N] each."""
    import pyarrow as pa
    from pyarrow.compute import is_in, list_value_length

    table = samples.with_format("arrow")[:]  # mapped, not loaded
    digests, trained, part = (table[name].to_numpy().astype(np.int64) for name in ("digest", "trained", "part"))
    lengths = list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
    return digests, lengths, trained, part, is_in(table["file"], value_set=pa.array(eval_files, pa.string())).to_numpy()


def hold_out(digests: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [N]: which samples are held out. All parts and copies of a conversation fall on one side."""
    conversations = np.unique(digests)
    size = min(max(1, round(fraction * len(conversations))), len(conversations) - 1, MAX_HELD_OUT) if fraction else 0
    return np.isin(digests, np.random.default_rng(seed).permutation(conversations)[:size])


def make_rows(samples, chosen: np.ndarray, lengths: np.ndarray, args: argparse.Namespace) -> Rows:
    """Rows of the chosen samples (int64 [N]): packed, or one sample each."""
    packed = pack(lengths[chosen], args.max_length, args.seed) if args.packing else np.arange(len(chosen))[:, None]
    return Rows(samples, [chosen[row] for row in packed])


def pack(lengths: np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Best-fit-decreasing: int64 arrays of sample numbers, one for each row of at most `capacity` tokens.

    Rows with room are kept in stacks by their free space. The set of free spaces is the bits of one
    integer, so the smallest that is large enough is its lowest set bit: a million samples take seconds.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    row_of, rows, spaces = np.empty(len(lengths), np.int64), 0, 0
    rows_with: dict[int, list[int]] = {}  # by free space
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[space].pop()
            if not rows_with[space]:
                spaces ^= 1 << space
        else:
            space, row, rows = capacity, rows, rows + 1
        row_of[sample] = row
        if space > length:
            rows_with.setdefault(space - length, []).append(row)
            spaces |= 1 << (space - length)
    if not rows:
        return []
    by_row = np.argsort(row_of, kind="stable")
    return np.split(by_row, np.searchsorted(row_of[by_row], np.arange(1, rows)))


class Rows:
    """A sequence of rows, each read from disk on demand: the samples that it packs."""

    def __init__(self, samples, plan: list[np.ndarray]):
        self.samples, self.plan = samples.with_format("numpy"), plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.samples[self.plan[row]]

    def longest(self) -> dict[str, Any]:
        """The row with the most tokens, which needs the most memory."""
        lengths = measure(self.samples)[1]
        return self[max(range(len(self.plan)), key=lambda row: lengths[self.plan[row]].sum())]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows -> one batch without padding: all their documents in a sequence, [1, T].

    input_ids, position_ids: [1, T] int64; positions restart at each document.
    cu_seq_lens_q: [documents + 1] int32, and max_length_q, for attention within documents.
    logits_to_keep: [N] int64, the positions whose next token is trained.
    labels = shift_labels: [1, N] int64, those next tokens.
    documents: their `file:line`, for messages.
    There is no attention_mask: given one, transformers would join the documents.
    """
    documents = [ids for row in rows for ids in row["input_ids"]]
    labels = np.concatenate([labels for row in rows for labels in row["labels"]])
    lengths = [len(ids) for ids in documents]
    keep = np.flatnonzero(labels[1:] != IGNORE)
    targets = torch.from_numpy(labels[keep + 1].astype(np.int64))[None]
    return {
        "input_ids": torch.from_numpy(np.concatenate(documents).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        "cu_seq_lens_q": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        "max_length_q": max(lengths),
        "logits_to_keep": torch.from_numpy(keep),
        "labels": targets,
        "shift_labels": targets,
        "documents": [f"{file}:{line}" for row in rows for file, line in zip(row["file"], row["line"], strict=True)],
    }


# ---- Looking at the data -------------------------------------------------------------------------

MANY_EXCHANGES = 30  # dialogues that nothing separates are read as one conversation


def survey(
    files: Iterable[str], args: argparse.Namespace, counts: dict[str, Any], findings: list[Finding]
) -> Iterator[Conversation]:
    """Read and check all files: yield their conversations up to the first error, and fill `counts` and `findings`."""
    counts |= {"files": list(files), "conversations": 0, "skipped": 0, "turns": Counter()}
    counts["not_read"] = {"row": Counter(), "message": Counter()}
    seen: dict[int, str] = {}  # the first place of each conversation, by its content
    failed = False
    for name in files:
        try:
            for conversation in read_conversations([name], args.input_format):
                turns, file, line, found = conversation
                if args.chat_format == "base" and (late := [turn.line for turn in turns[1:] if turn.role == "system"]):
                    fix = "write it into the first system turn or a user turn, or use another --chat-format"
                    found.append(mistake(file, late[0], f"the base's template has no system turn in mid-chat; {fix}"))
                bad = any(finding.level == "error" for finding in found)
                if not bad:
                    system = turns[0].content if turns[0].role == "system" else None
                    counts["system"] = system if system == counts.get("system", system) else None  # that all share
                    counts["conversations"] += 1
                    counts["turns"].update(turn.role for turn in turns)
                    answers = sum(turn.role == "assistant" for turn in turns)
                    fix = "put a line <|endoftext|> between them, or give each a row"
                    text = f"{answers} exchanges are one conversation; if they are separate dialogues, {fix}"
                    several = Finding("warning", file, line, "several exchanges", text)
                    if answers >= MANY_EXCHANGES:
                        found.append(several)
                    if "system" in (turn.role for turn in turns):
                        with_system = file, line
                    if (first := seen.setdefault(digest(turns), f"{file}:{line}")) != f"{file}:{line}":
                        found.append(Finding("warning", file, line, "duplicate", f"the same conversation as {first}"))
                for finding in found:
                    if finding.level == "note":
                        counts["not_read"][finding.kind][finding.text] += 1
                    elif args.skip_bad and finding.level == "error":
                        findings.append(finding._replace(level="warning", kind="skipped"))
                    else:
                        findings.append(finding)
                counts["skipped"] += bad
                failed |= bad and not args.skip_bad
                if not bad and not failed:
                    yield conversation
        except InputError as error:
            findings.append(Finding("error", name, 0, "unreadable", str(error)))
            failed = True
    if counts["conversations"] == 1 and 1 < answers < MANY_EXCHANGES:
        findings.append(several)
    if counts["turns"]["system"] == 1 and counts["conversations"] > 2:
        text = "the only conversation with a system turn; it does not carry over to the next: repeat it or delete it"
        findings.append(Finding("warning", *with_system, "system", text))


def raise_errors(counts: dict[str, Any], findings: list[Finding], shown: int = 20) -> None:
    """InputError that lists the errors among the findings, equal ones in a file as one; the first ones of many."""
    errors = [finding for finding in findings if finding.level == "error"]
    alike = Counter((finding.file, finding.text) for finding in errors)
    first = {(finding.file, finding.text): str(finding) for finding in reversed(errors)}
    lines = [first[key] + (f" ({count:,} times)" if count > 1 else "") for key, count in alike.items()]
    last = [f"and {len(lines) - shown:,} more"] if len(lines) > shown else []
    if len(errors) > 1 and counts["conversations"] and all(finding.kind == "mistake" for finding in errors):
        last.append(f"{len(errors):,} errors in all; --skip-bad trains without these conversations")
    if errors:
        raise InputError("\n".join([*lines[:shown], *([", ".join(last)] if last else [])]))
    if not counts["conversations"]:
        files = ", ".join(counts["files"])
        raise InputError(f"{files}: all conversations have errors; leave out --skip-bad to see them")


def print_findings(findings: list[Finding], shown: int = 5) -> None:
    """Each kind of warning with its count and its first places."""
    for kind, count in Counter(finding.kind for finding in findings).items():
        print_field("warning", f"{count:,} x {kind}")
        for finding in islice((finding for finding in findings if finding.kind == kind), shown):
            print(wrap(f"  {finding}", 4))
        if count > shown:
            print(f"  … and {count - shown:,} more")


def plural(count: float, noun: str) -> str:
    """As `1 row`, `1,234 rows` or `0.5 rows`."""
    return f"{f'{count:,}' if isinstance(count, int) else f'{count:g}'} {noun}{'' if count == 1 else 's'}"


def print_field(name: str, text: str) -> None:
    """Print one aligned paragraph."""
    print(wrap(f"{name:<10} {text}", 11), flush=True)


def wrap(text: str, indent: int) -> str:
    """Wrap at 80 columns; paths and flags stay whole."""
    return textwrap.fill(text, 80, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def print_plan(plan: Plan) -> None:
    """What was read and what was not, how it is used, tokens, rows and steps, advice and warnings."""
    args, counts = plan.args, plan.counts
    names, turns = counts["files"], counts["turns"]
    print_field("files", ", ".join(names[:5]) + (f", … and {len(names) - 5:,} more" if len(names) > 5 else ""))
    print_field("data", describe_use(counts))
    print_field("turns", ", ".join(f"{turns.get(role, 0):,} {role}" for role in ROLES))
    for noun, unread in counts["not_read"].items():
        if unread:
            shown = (f"{escape_controls(name)[:40] or 'unnamed'} ({plural(n, noun)})" for name, n in unread.items())
            print_field("not read", ", ".join(shown))
    if plan.base:
        lost = [counts[key] for key in ("split", "dropped", "dropped_exchanges", "lost_trained_tokens")]
        if any(lost):
            text = "conversations: {:,} split, {:,} dropped; lost: {:,} exchanges of others, {:,} trained tokens"
            print_field("overlong", text.format(*lost))
        share = counts["trained_tokens"] / counts["tokens"]
        each = f"{counts['tokens'] / counts['trained_on']:,.0f} in a conversation, {counts['longest']:,} in the longest"
        print_field("tokens", f"{counts['tokens']:,}, of which {share:.0%} trained; {each}")
        print_field("rows", f"{counts['rows']:,} of at most {args.max_length:,} tokens, {counts['fill']:.1%} full")
        each = f"{plural(args.epochs, 'epoch')}, up to {plural(counts['rows_per_step'], 'row')} each"
        print_field("steps", f"{plural(counts['steps'], 'optimizer step')} ({each})")
    for advice in plan.advice:
        print_field("advice", advice)
    print_findings(plan.findings)


def describe_use(counts: dict[str, Any]) -> str:
    """Where all conversations went, for the screen and the model card."""
    ways = {"trained on": "trained_on", "held out": "held_out", "also in --eval-files": "copies",
            "dropped (--overlong)": "dropped", "with errors skipped (--skip-bad)": "skipped"}  # fmt: skip
    shown = [f"{counts[key]:,} {way}" for way, key in ways.items() if counts.get(key)]
    return ", ".join([plural(counts["conversations"] + counts["skipped"], "conversation"), *shown])


# By held-out losses of SmolLM2 (benchmarks/learning.py): fewer steps teach little, further passes learn by heart, and
# larger data learn more in smaller steps. With plenty of steps neither smaller ones nor further passes were measured.
ENOUGH_STEPS, PLENTY_STEPS, MOST_ROWS, MOST_EPOCHS = 30, 100, 8, 3


def advise(args: argparse.Namespace, processes: int, counts: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What the data needs, as sentences and as flags: more steps, but few passes; enough conversations held out."""
    advice, (flags, steps) = [], more_steps(args, processes, counts)
    own = counts["trained_on"] + counts["held_out"]  # all in the training files, unless there are --eval-files
    five = np.ceil(500 / own) / 100  # the --eval-fraction that holds out five
    little = five > 0.25 and not args.eval_files
    few = counts["steps"] < 0.75 * ENOUGH_STEPS  # close to it is good enough
    coarse = counts["rows_per_step"] > 1.25 * MOST_ROWS and counts["steps"] < PLENTY_STEPS
    found = f"{plural(counts['steps'], 'step')} of {plural(counts['rows_per_step'], 'row')} "
    found += "will teach little" if few else "teach less than smaller ones"
    if (few or coarse) and steps > counts["steps"]:
        advice.append(f"{found}: {' '.join(flags)} would make about {steps:,} steps")
    else:
        flags = []
        if few and not little:
            advice.append(f"{found}, and more passes would learn the data by heart: write more conversations")
        elif args.epochs > MOST_EPOCHS and counts["held_out"] and not args.early_stopping:
            flags = ["--early-stopping", "2"]
            passes = f"{args.epochs:g} passes may learn the data by heart"
            advice.append(f"{passes}: {' '.join(flags)} stops when the held-out loss rises")

    loss = f"the loss of {plural(counts['held_out'], 'held-out conversation')} is too noisy to trust"
    if little:
        advice.append(f"only {plural(own, 'conversation')}: write more, fifty are a good start")
    elif 0 < counts["held_out"] < 5 and args.eval_files:
        advice.append(f"{loss}: give more --eval-files")
    elif 0 < counts["held_out"] < 5 and args.eval_fraction < five:
        flags += ["--eval-fraction", f"{five:g}"]
        advice.append(f"{loss}: {' '.join(flags[-2:])} holds out more")
    return advice, flags


def more_steps(args: argparse.Namespace, processes: int, counts: dict[str, Any]) -> tuple[list[str], int]:
    """Flags for at least ENOUGH_STEPS optimizer steps of at most MOST_ROWS, in few passes; and how many steps they make."""
    rows, batch, flags = counts["rows"], args.train_batch_size * processes, []
    if args.packing and rows * MOST_EPOCHS < ENOUGH_STEPS * batch and counts["trained_on"] > rows:
        rows, flags = counts["trained_on"], ["--no-packing"]  # a row for each conversation makes more steps
    batches, most = -(-rows // batch), max(1, MOST_ROWS // batch)
    plenty = batches / most >= PLENTY_STEPS  # in one pass
    epochs = args.epochs if plenty else max(args.epochs, MOST_EPOCHS)
    accum = min(args.grad_accum, most, max(1, int(batches * epochs) // ENOUGH_STEPS))
    per_epoch = -(-batches // accum)
    flags += ["--grad-accum", f"{accum}", *(["--epochs", f"{epochs:g}"] if epochs != args.epochs else [])]
    if counts["held_out"]:  # after each pass, or four times in a long one: with more held out, each takes longer
        every = max(args.eval_steps, per_epoch // 4) if plenty else min(args.eval_steps, per_epoch)
        flags += ["--eval-steps", f"{every}"] if every != args.eval_steps else []
        flags += ["--save-steps", f"{every}"] if args.save_steps != args.eval_steps != every else []
        flags += ["--early-stopping", f"{args.early_stopping or 2}"] if epochs > 1 else []
    return flags, int(np.ceil(epochs * per_epoch))


def print_rows(rows: Rows, count: int, tokenizer) -> None:
    """Print rows with trained tokens in color, or between ⟦ ⟧ where color is not wanted."""
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\033[30;42m", "\033[0m") if color else ("⟦", "⟧")
    for number in range(min(count, len(rows))):
        row = rows[number]
        print(f"=== row {number + 1}: {sum(map(len, row['input_ids'])):,} tokens")
        for ids, labels, file, line in zip(*(row[key] for key in ("input_ids", "labels", "file", "line")), strict=True):
            print(f"--- {file}:{line}: {len(ids):,} tokens, {(labels != IGNORE).sum():,} trained")
            edges = [0, *(np.flatnonzero(np.diff(labels != IGNORE)) + 1), len(ids)]
            for begin, end in pairwise(edges):
                text = tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
                text = escape_controls(text, keep="\n\t")
                print(f"{on}{text}{off}" if labels[begin] != IGNORE else text, end="")
            print()


# ---- Memory --------------------------------------------------------------------------------------


def memory_plan(plan: Plan) -> dict[str, float]:
    """GiB that a step needs on a GPU if all layers recompute their activations: calculated, not measured.

    For Llama-like models; {} where config.json leaves sizes to transformers.
    """
    args, config, counts = plan.args, plan.base.config, plan.counts
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if not all(config.get(key) for key in sizes):
        return {}
    h, f, layers, heads, vocabulary = (config[key] for key in sizes)
    width = config.get("head_dim") or h // heads
    kv = (config.get("num_key_value_heads") or heads) * width
    weights, tables = layers * h * (2 * heads * width + 2 * kv + 3 * f), 1 + (not config.get("tie_word_embeddings"))
    size, tokens = 2 if args.bf16 else 4, args.max_length * args.train_batch_size
    trained = tokens * counts["trained_tokens"] / counts["tokens"]
    # All seven projections of a layer read and write about 10 h + 3 f numbers.
    adapters, moments = layers * args.lora_r * (10 * h + 3 * f), 2 if "8bit" in args.optim else 8
    parts = {
        # NF4: 4 bits, and for each block of 64 weights an 8-bit scale.
        "base": weights * (0.52 if args.bnb_nf4 else size) + tables * vocabulary * h * size,
        "adapters and optimizer": adapters * (4 + 4 + moments),
        "activations": tokens * size * (layers + 2) * h,  # each layer's input
        # Not at once: one layer whole; logits in float32, their copy and their gradient.
        "one layer or the loss": max(tokens * size * 9 * (h + f), 12 * trained * vocabulary),
        "CUDA": 0.7 * 2**30,
    }
    return {name: amount / 2**30 for name, amount in parts.items()}


def print_memory(plan: Plan) -> None:
    """Print what a step needs, and on which common GPUs that is enough."""
    args, need, gpus = plan.args, sum(memory_plan(plan).values()), (12, 16, 24)
    fits = [need <= gpu * args.torch_memory_fraction for gpu in gpus]
    said = ", ".join(f"{'enough' if fit else 'too little'} on {gpu}" for gpu, fit in zip(gpus, fits, strict=True))
    fix = "" if fits[-1] else f"; try {' '.join(saving_flags(args, checkpointed=True))}"
    rows = f"rows of {args.max_length:,} x {args.train_batch_size}"
    if need:
        print_field("memory", f"{need:.1f} GiB for {rows}, not measured: {said} GiB{fix}")


def saving_flags(args: argparse.Namespace, checkpointed: bool = False) -> list[str]:
    """The flags that save memory at the least cost; checkpointed: all layers recompute their activations already."""
    if args.train_batch_size > 1:  # the same optimizer step
        return ["--train-batch-size", "1", "--grad-accum", str(args.grad_accum * args.train_batch_size)]
    if not checkpointed and args.gradient_checkpointing != "all":
        return ["--gradient-checkpointing", "all"]
    if not args.bnb_nf4:
        return ["--bnb-nf4"]
    return ["--max-length", str(args.max_length // 2)]


def less_memory(args: argparse.Namespace, world: World) -> str:
    """What to do where memory has run out: the command that continues with the flags that save most."""
    flags = saving_flags(args)
    goes_on = (
        not args.dry_run and os.path.isfile(args.output / RECORD) and flags[0] not in ("--bnb-nf4", "--max-length")
    )
    return f"use {same_command(world, *(['--resume'] if goes_on else []), *flags)}"


def choose_checkpointing(model, rows: Rows, args: argparse.Namespace) -> None:
    """Choose which layers recompute their activations, as --gradient-checkpointing says.

    Each layer that need not saves about 1 % of a step, so auto spares as many as the GPU has room for.
    """
    base, mode = model.get_base_model(), args.gradient_checkpointing
    layers = base.get_decoder().layers
    enable_checkpointing(base)
    spared = 0 if mode == "all" else len(layers)
    if mode == "auto" and model.device.type == "cuda":
        spared = layers_with_room(model, layers, rows, args)
    checkpoint_layers(layers, spared)
    recompute = f"{len(layers) - spared} of {len(layers)} layers recompute their activations"
    print_field("memory", f"{recompute} (--gradient-checkpointing {mode})")


def enable_checkpointing(base) -> None:
    """Make layers able to recompute; `checkpoint_layers` says which do."""
    # transformers 5.20 knows it only by its old name.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def checkpoint_layers(layers, spared: int) -> None:
    """Checkpoint all layers except the last ones, whose activations are the first that backward frees."""
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i < len(layers) - spared


def model_inputs(rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Rows as the model takes them."""
    batch = collate(rows)
    del batch["documents"]
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


def layers_with_room(model, layers, rows: Rows, args: argparse.Namespace) -> int:
    """How many layers need not recompute on this GPU, in eighths, by the measured peak of a step of the longest row."""
    print_field("memory", "measuring how many layers can keep their activations")
    inputs = model_inputs([rows.longest()] * args.train_batch_size, model.device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Not there yet, in bytes for each number: the optimizer's moments, DDP's copy of the gradients.
    later = (2 if "8bit" in args.optim else 8) + (4 if torch.distributed.is_initialized() else 0)
    free, total = torch.cuda.mem_get_info(model.device)
    # What this process has and what nobody else has, below the cap; a twentieth is left for fragmentation.
    available = min(torch.cuda.memory_reserved() + free, args.torch_memory_fraction * total)
    limit = 0.95 * available - trained * later
    for spared in sorted({len(layers) * eighths // 8 for eighths in range(9)}, reverse=True):
        checkpoint_layers(layers, spared)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            model.train()(**inputs).loss.backward()
            if torch.cuda.max_memory_reserved() < limit:
                break
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        finally:
            model.zero_grad()
    torch.cuda.empty_cache()
    return spared


# ---- Model ---------------------------------------------------------------------------------------

HUB_NAME = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*", re.ASCII)
TOKENIZER_HINT = "its tokenizer does not load ({error}); complete the folder"
ADAPTER_HINT = "{error}; give a folder that training wrote"


def load_libraries() -> None:
    """Import torch and what builds on it: seconds that --help, a dry run and errors in the data need not wait for."""
    global accelerate, torch, transformers, peft
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns on import that it lacks a CPU kernel
    gc.disable()  # without garbage collection the imports take a quarter less time
    import accelerate
    import peft
    import torch
    import transformers

    gc.freeze()  # they stay: later collections, the last of them at exit, pass them over
    gc.enable()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT 0.21 asks
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def find_base(args: argparse.Namespace, folder: str, revision: str | None = None) -> Base:
    """The base model in this folder, checked as far as that needs no torch."""
    place, adapter = f"--model {args.model}", Path(folder, "adapter_config.json")
    if adapter.is_file():
        fix = f"give its base, {read_json(adapter).get('base_model_name_or_path')}, and --init-adapter {args.model}"
        raise InputError(f"{place}: is a LoRA adapter, not a whole model; {fix}")
    hint = "config.json does not load ({error}); give a complete model in Hugging Face's layout"
    with explain(place, hint, ValueError, OSError):
        config = dict(read_json(Path(folder, "config.json")))
    check_base(args, config)
    encode = load_encoder(args.model, folder, args.chat_format)
    last, rows = max((i, token) for token, i in encode.tokenizer.get_vocab().items()), config["vocab_size"]
    if last[0] >= rows:  # neither the merge nor Ollama could use it
        problem = f"its tokenizer has the token {last[1]!r} (id {last[0]:,}), its embedding only {rows:,} rows"
        raise InputError(f"{place}: {problem}; delete such tokens from tokenizer.json, or resize the embedding")
    return Base(folder, revision, config, encode)


def model_on_disk(name: str) -> str | None:
    """The folder of a model whose tokenizer is on this machine, or None."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import try_to_load_from_cache

    found = [HUB_NAME.fullmatch(name) and try_to_load_from_cache(name, file) for file in TOKENIZER_FILES]
    return os.path.dirname(str(found[0])) if all(isinstance(file, str) for file in found) else None


def resolve_model(name: str) -> tuple[str, str | None]:
    """(local folder, Hub revision or None) of a folder or Hub name; downloads what is missing."""
    if os.path.isdir(name):
        return name, None
    folder = download_model(f"--model {name}", name, ["*.json", "*.safetensors", "*.jinja"])
    return folder, os.path.basename(folder)


def download_model(place: str, name: str, patterns: list[str], revision: str | None = None) -> str:
    """The folder of a Hub model in the local cache; downloads what is missing. `place` begins the error's line."""
    from huggingface_hub import constants, errors, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    offline = (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError)
    reasons = {  # the last one that fits counts
        "cannot use the Hugging Face cache ({error}); set HF_HOME to a folder that can be written to": (OSError,),
        "not in the local cache, and cannot reach the Hugging Face Hub; go online or give a local folder": offline,
        "neither a folder nor a Hub name; check the path": (errors.HFValidationError,),
        "not found on the Hub; check the name, or run `hf auth login`": (errors.RepositoryNotFoundError,),
        f"no revision {revision} on the Hub; give a local folder": (errors.RevisionNotFoundError,),
        f"access is gated; accept the license at hf.co/{name}, then run `hf auth login`": (errors.GatedRepoError,),
    }
    which = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": ["*/*", "consolidated*"]}
    with contextlib.ExitStack() as stack:
        for hint, kinds in reasons.items():
            stack.enter_context(explain(place, hint, *kinds))
        with contextlib.suppress(errors.DryRunError):  # offline: nothing to download
            files = snapshot_download(name, dry_run=True, **which)
            size = sum(file.file_size or 0 for file in files if file.will_download)
            free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.is_dir())).free
            if size > free:
                problem = f"{size / 1e9:,.1f} GB to download, but {free / 1e9:,.1f} GB free in {cache}"
                raise InputError(f"{place}: {problem}; free some space, or set HF_HOME to a folder on a larger disk")
            if size > 1e9:
                # Merged weights are as large as the base's, a GGUF in Q8_0 takes 8.5 of their 16 bits.
                later = f"{free / 1e9:,.0f} GB free; merging will take {1.53 * size / 1e9:,.0f} GB more"
                print_field("download", f"{size / 1e9:,.1f} GB to {cache} ({later})")
        return snapshot_download(name, **which)


def load_encoder(name: str, folder: str, format_name: str) -> Encoder:
    """The encoder for this model's tokenizer and a chat format, without transformers."""
    from tokenizers import Tokenizer

    with explain(f"--model {name}", TOKENIZER_HINT, Exception):  # tokenizers raises plain Exception
        backend = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        config = read_json(Path(folder, "tokenizer_config.json"))
        tokens = config["eos_token"], config.get("bos_token")
        eos, bos = (token["content"] if isinstance(token, dict) else token for token in tokens)
        own = Path(folder, "chat_template.jinja")
        template = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
        if isinstance(template, list):  # several by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    vocabulary = Vocabulary(backend, eos, bos, template)
    return Encoder(vocabulary, chat_format(format_name, vocabulary))


def load_tokenizer(name: str, folder: str, encode: Encoder):
    """transformers' tokenizer of the base, for saving and generating, with the chat template of the encoder's format."""
    with explain(f"--model {name}", TOKENIZER_HINT, ValueError, OSError, KeyError):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = chat_template(encode.chat, adds_bos=bool(encode.start))
    return tokenizer


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file; start and end are bytes from the beginning of the file."""

    file: Path
    dtype: str
    shape: list[int]
    start: int
    end: int


def read_headers(place: str, folder: str | Path) -> dict[str, StoredTensor]:
    """The base's tensors by name; InputError for a missing or damaged file."""
    tensors, index = {}, Path(folder, "model.safetensors.index.json")
    with explain(place, f"{index.name} is damaged ({{error}}); download it again", ValueError, LookupError, TypeError):
        names = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for file in (Path(folder, name) for name in sorted(names)):
        if not file.is_file():
            fix = "give a folder with the weights, or go online if the Hub's cache lacks them"
            raise InputError(f"{place}: no {file.name} in it; {fix}")
        tensors |= read_header(place, file)
    return tensors


def read_header(place: str, file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name: 8 bytes of length, a JSON header, the data."""
    tensors = {}
    hint, size = f"{file.name} is damaged or incomplete; copy or download it again", file.stat().st_size
    # A file that is not safetensors may have any bytes here.
    damaged = explain(place, hint, ValueError, KeyError, TypeError, AttributeError)
    with damaged, open(file, "rb") as stream:
        data = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(data - 8) if data <= size else "")
        header.pop("__metadata__", None)
        for key, tensor in header.items():
            start, end = (data + offset for offset in tensor["data_offsets"])
            tensors[key] = StoredTensor(file, tensor["dtype"], tensor["shape"], start, end)
            if end > size:
                raise ValueError
    return tensors


def fingerprint(headers: dict[str, StoredTensor]) -> str:
    """Tells models apart: the sha256 of each tensor's line "name dtype [shape]" and first 4,096 bytes, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(headers.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        with open(tensor.file, "rb", buffering=0) as file:
            file.seek(tensor.start)
            digest.update(file.read(min(tensor.end - tensor.start, 4096)))
    return digest.hexdigest()


def check_base(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Refuse by its config.json a base that cannot be trained or merged here, or whose rows are shorter."""
    kind, longest = config.get("model_type", "this model"), config.get("max_position_embeddings")
    problem = ""
    if config.get("quantization_config"):
        problem = "it is already quantized; give the 16-bit original, --bnb-nf4 quantizes it"
    elif "text_config" in config:
        problem = f"{kind} reads images too, and merge_lora.py merges text models only; give a text model"
    elif any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        problem = f"{kind} is a mixture of experts, which merge_lora.py cannot merge; give a dense model"
    elif not all(config.get(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size")):
        problem = f"{kind} is not built like a Llama; give a Llama, Qwen, Mistral, Gemma or Phi model"
    if problem:
        raise InputError(f"--model {args.model}: {problem}")
    if longest and args.max_length > longest:
        raise InputError(f"--max-length {args.max_length}: the model reads at most {longest:,} tokens; lower it")


def find_targets(name: str, folder: str, headers: dict[str, StoredTensor], targets: list[str]) -> list[str]:
    """The names of the linear layers to adapt; InputError for a wrong one, or for weights of other names or shapes."""
    hint = "{error}; give a causal language model"
    with explain(f"--model {name}", hint, ValueError, OSError, KeyError), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter, value in model.named_parameters():
        found, wanted = headers[parameter].shape if parameter in headers else None, list(value.shape)
        if found != wanted and (found or parameter not in model.all_tied_weights_keys):
            problem = f"{parameter} is {found or 'missing'}, but by its config.json {wanted}"
            raise InputError(f"--model {name}: {problem}; give a complete model with the names of transformers")
    modules = model.get_decoder().named_modules()
    linear = sorted({key.rpartition(".")[2] for key, module in modules if isinstance(module, torch.nn.Linear)})
    for target in targets or [""]:
        if target not in ("all-linear", *linear):
            names = ",".join(["all-linear", *linear])
            raise InputError(f"--lora-target-modules {target}: is no linear layer of this model; choose from {names}")
    return linear if "all-linear" in targets else targets


def load_base(args: argparse.Namespace, folder: str, device: torch.device):
    """The frozen base model: NF4 with double quantization or plain, everything else in bfloat16 or float32."""
    # prepare_model_for_kbit_training would cast norms, embeddings and head to float32, and with them the residual
    # stream: about 30 % slower by calculation, and 3.4 GiB more.
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, args.bnb_dtype),  # the default would be float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16 if args.bf16 else torch.float32,
        quantization_config=quantization if args.bnb_nf4 else None,
        device_map={"": device},
        attn_implementation=choose_attention(folder, device, args.bf16),
    )
    model.requires_grad_(False)
    model.config.use_cache = False  # with a cache transformers would not look for packed documents
    for module in model.modules():
        # On CPUs with avx512_bf16 a forward without gradients repacks the 4-bit weights, and every gradient
        # after it is wrong while the loss looks right.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def add_lora(model, args: argparse.Namespace, targets: list[str], revision: str | None):
    """A PeftModel whose adapters are float32, new or those of --init-adapter."""
    model.name_or_path = args.model if revision else os.path.abspath(args.model)
    if args.init_adapter:
        with explain(f"--init-adapter {args.init_adapter}", ADAPTER_HINT, RuntimeError, ValueError):
            model = peft.PeftModel.from_pretrained(model, args.init_adapter, is_trainable=True)
        config = model.peft_config["default"]
        config.base_model_name_or_path, config.revision = model.get_base_model().name_or_path, revision
        return model
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        # Ollama and others refuse 64.0 in adapter_config.json.
        lora_alpha=int(args.lora_alpha) if args.lora_alpha.is_integer() else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        revision=revision,
    )
    return peft.get_peft_model(model, config)


def inherit_lora(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with the rank, alpha, dropout and targets of --init-adapter in place of their own."""
    folder, place = args.init_adapter, f"--init-adapter {args.init_adapter}"
    with explain(place, ADAPTER_HINT, OSError, ValueError, KeyError):
        config = read_json(folder / "adapter_config.json")
        sha256(folder / "adapter_model.safetensors")
        r, alpha, targets = config["r"], float(config["lora_alpha"]), sorted(config["target_modules"])
        inherited = {"lora_r": r, "lora_alpha": alpha, "lora_dropout": config["lora_dropout"]}
    print_field("lora", f"r {r}, alpha {alpha:g} and {', '.join(targets)}, from {folder}")
    return argparse.Namespace(**vars(args) | inherited | {"lora_target_modules": targets})


def check_ancestor(folder: Path, record: dict[str, Any]) -> None:
    """Refuse to train an adapter further on another base or in another chat format; `record` is the new run's."""
    own = folder if (folder / RECORD).is_file() else folder.parent  # of a checkpoint
    with explain(f"--init-adapter {folder}", ADAPTER_HINT, OSError, ValueError, KeyError):
        before = read_json(own / RECORD)
        base, chat = before["base"], before["chat_format"]
        if base["fingerprint"] != record["base"]["fingerprint"]:
            raise InputError(f"--init-adapter {folder}: trained on another base; use --model {base['model']}")
        if chat != json.loads(json.dumps(record["chat_format"])):
            raise InputError(f"--init-adapter {folder}: in another chat format; use --chat-format {chat['name']}")


# ---- Attention -----------------------------------------------------------------------------------


def choose_attention(folder: str, device: torch.device, bf16: bool) -> str:
    """The name of an attention that stays inside the documents of a row.

    transformers' sdpa does so with a T x T mask. On CUDA torch's varlen_attn needs none and skips what it would hide.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"  # Gemma 2's softcap, which the other two do not know
    if device.type != "cuda" or not bf16:
        return "sdpa"
    from torch.nn.attention.varlen import varlen_attn
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module, query, key, value, mask, sliding_window=None, cu_seq_lens_q=None, max_length_q=None, **rest):
        """query [1, heads, T, d], key and value [1, kv_heads, T, d] -> [1, T, heads, d]"""
        if cu_seq_lens_q is None:  # generation: one sequence, without padding
            return sdpa_attention_forward(module, query, key, value, mask, **rest)
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        ends, longest = (cu_seq_lens_q,) * 2, (max_length_q,) * 2
        window = (sliding_window - 1 if sliding_window else -1, 0)
        out = varlen_attn(q, k, v, *ends, *longest, scale=rest["scaling"], window_size=window, enable_gqa=True)
        return out[None], None

    # transformers finds no mask function of this name, so it builds no mask.
    transformers.AttentionInterface.register("packed", attention)
    return "packed"


# ---- Self-check ----------------------------------------------------------------------------------

# By bfloat16's rounding alone gradients differ by 1 % in two layers, 3 % in Gemma 3's six, 70 % in SmolLM2's thirty.
TOLERANCE = 0.06


def check_packing(model, rows: Rows) -> None:
    """Compare packed rows with their documents alone, on this device; where varlen_attn is wrong, sdpa takes its place."""
    config, where = model.get_base_model().config, "GPU" if model.device.type == "cuda" else "CPU"
    while True:
        loss, gradients = differences(model, rows)
        found = f"loss differs by {100 * loss:.2f} %, gradients by {100 * gradients:.1f} % from the plain path"
        if max(loss, gradients) <= TOLERANCE:
            return print_field("checked", f"{found} on this {where}")
        if config._attn_implementation != "packed":
            problem = f"packed rows do not train on this {where} as their documents do alone ({found})"
            raise InputError(f"--model: {problem}; give another base, and please report this")
        print_field("checked", f"{found}: on this {where} sdpa takes the place of varlen_attn, which is faster")
        config._attn_implementation = "sdpa"


def differences(model, rows: Rows) -> tuple[float, float]:
    """How far a packed row's loss and gradients are from those of its documents in the plain path, in any process.

    Two documents of 256 tokens in all go through the first layers of each kind, one of them checkpointed, without
    dropout and with B not zero. Weights and random state stay as they are.
    """
    base, device, decoder = model.get_base_model(), model.device, model.get_base_model().get_decoder()
    layers, kinds = decoder.layers, getattr(base.config, "layer_types", None) or [None]
    documents = np.split(np.resize(np.concatenate(rows[0]["input_ids"]), 256).astype(np.int64), [160])
    labels = [np.where(np.arange(len(ids)) % 3, ids, IGNORE) for ids in documents]
    alone = [torch.tensor(np.stack(pair)[:, None], device=device) for pair in zip(documents, labels, strict=True)]
    row = {"input_ids": documents, "labels": labels, "file": [], "line": []}
    decoder.layers = layers[: max(2, *(kinds.index(kind) + 1 for kind in kinds))]
    a, b = ([p for name, p in decoder.layers.named_parameters() if kind in name] for kind in ("lora_A", "lora_B"))
    kept, random = [p.detach().clone() for p in b], torch.Generator().manual_seed(0)

    def backward(loss) -> list[torch.Tensor]:
        grads = [grad.flatten() for grad in torch.autograd.grad(loss, [*a, *b], materialize_grads=True)]
        return [loss.detach(), torch.cat(grads[: len(a)]), torch.cat(grads[len(a) :])]

    try:
        for p in b:
            p.data.copy_(0.01 * torch.randn(p.shape, generator=random))
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        with plain_path(decoder):
            plain = backward(sum(base(ids, labels=targets, num_items_in_batch=1).loss for ids, targets in alone))
        enable_checkpointing(base)
        checkpoint_layers(decoder.layers, len(decoder.layers) - 1)
        packed = backward(model(**model_inputs([row], device), num_items_in_batch=1).loss)
        apart = torch.stack([(one - other).norm() / other.norm() for one, other in zip(packed, plain, strict=True)])
    except (RuntimeError, TypeError) as error:
        if out_of_memory(error):
            raise
        print_field("checked", first_line(error))
        apart = torch.full((3,), float("inf"), device=device)
    finally:
        decoder.layers = layers
        for p, value in zip(b, kept, strict=True):
            p.data.copy_(value)
    apart = apart.nan_to_num(nan=float("inf"))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(apart, torch.distributed.ReduceOp.MAX)
    return apart[0].item(), apart[1:].max().item()


@contextlib.contextmanager
def plain_path(decoder) -> Iterator[None]:
    """Eager attention, nothing recomputed, and NF4 weights restored."""
    from bitsandbytes.functional import dequantize_4bit

    quantized = [module for module in decoder.layers.modules() if hasattr(module, "quant_state")]
    for linear in quantized:
        weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        linear.forward = functools.partial(torch.nn.functional.linear, weight=weight, bias=linear.bias)
    checkpoint_layers(decoder.layers, len(decoder.layers))
    attention, decoder.config._attn_implementation = decoder.config._attn_implementation, "eager"
    try:
        yield
    finally:
        decoder.config._attn_implementation = attention
        for linear in quantized:
            del linear.forward


# ---- Training ------------------------------------------------------------------------------------


def start_torch(args: argparse.Namespace, world: World) -> torch.device:
    """Set CUDA's allocator, import torch and the rest, and choose this process's device."""
    said = set_allocator(args.cuda_alloc_expandable, args.max_split_size_mb)
    flags = ("--cuda-alloc-expandable", "--no-cuda-alloc-expandable", "--max-split-size-mb")
    if said and any(option.startswith(flags) for option in sys.argv):
        print_field("allocator", said)
    print_field("starting", "torch, transformers and peft")
    load_libraries()
    with explain("--report-to", "{error}; name a tracker that is installed", ValueError, RuntimeError):
        names = [name for name in args.report_to if name != "none"]
        for tracker in transformers.integrations.get_reporting_integration_callbacks(names):
            tracker()  # before the model is loaded: Trainer would only then look for its package
    return choose_device(args, world)


def set_allocator(expandable: bool, max_split_size_mb: int) -> str:
    """Set CUDA's allocator: torch reads the variable on import. Returns what is to be said about it."""
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if variable in os.environ:
            return f"{variable}={os.environ[variable]} from the environment is kept"
    if expandable and not ON_WSL:  # there they fail on some GPUs (pytorch issue 192330)
        # Together the two block the reuse of freed segments: 220 MiB reserved become 14,060 (pytorch issue 123548).
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        return f"expandable_segments, without --max-split-size-mb {max_split_size_mb}: together they waste memory"
    os.environ["PYTORCH_ALLOC_CONF"] = f"max_split_size_mb:{max_split_size_mb}"
    return ""


def choose_device(args: argparse.Namespace, world: World) -> torch.device:
    """This process's GPU with its memory capped, or the CPU, with one line for each flag that has no effect there."""
    for way in ("FSDP", "DEEPSPEED"):  # they would shard the adapters too
        if os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true":
            raise InputError(f"accelerate: {way} is on; turn it off with `accelerate config`, or use torchrun")
    if world.size > 1:  # before anything else starts the process group with a shorter timeout
        accelerate.PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    if not torch.cuda.is_available():
        # Refuse to train on it by accident; these values of the variable ask for it.
        if torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            problem = f"torch {torch.__version__} was built for CUDA {torch.version.cuda}, but no GPU answers"
            fix = "update the NVIDIA driver (CUDA 13 needs 580, CUDA 12 needs 525), install torch for CUDA 12 as README.md"
            raise InputError(f"GPU: {problem}; {fix} says, or set CUDA_VISIBLE_DEVICES= to train on the CPU")
        print_field("device", "CPU")
        if args.bf16 and not torch.cpu._is_avx512_bf16_supported():
            print_field("device", "this CPU has no bfloat16: --no-bf16 --bnb-dtype float32 is about ten times faster")
        if (optim := optimizer_on(args.optim, "cpu")) != args.optim:
            print_field("device", f"no GPU, so {optim} takes the place of {args.optim}")
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise InputError(f"GPU: none is left for process {world.local_rank}; start as many processes as GPUs")
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    torch.cuda.set_per_process_memory_fraction(args.torch_memory_fraction, device)
    needs_bf16 = args.bf16 or (args.bnb_nf4 and args.bnb_dtype == "bfloat16")
    if needs_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        # float16 without loss scaling loses small gradients: 30 % in the first layer of SmolLM2 at 65,000 tokens a step.
        problem = f"{torch.cuda.get_device_name(device)} has no bfloat16 (it came with Ampere)"
        raise InputError(f"--bf16: {problem}; use --no-bf16 --bnb-dtype float32, or a newer GPU")
    card = torch.cuda.get_device_properties(device)
    print_field("device", f"{card.name}, {args.torch_memory_fraction:.0%} of {card.total_memory / 2**30:.1f} GiB")
    if (optim := optimizer_on(args.optim, "cuda")) != args.optim:
        print_field("device", f"WSL2, where paged memory can end the run: {optim} takes the place of {args.optim}")
    if world.size == 1 and (cards := torch.cuda.device_count()) > 1:
        print_field("device", f"1 of {cards} GPUs; `torchrun --nproc-per-node {cards}` in place of python3 uses all")
    return device


def optimizer_on(optim: str, device_type: str) -> str:
    """The optimizer for this device: paged state needs CUDA, and on a CPU 8-bit state takes seconds a step.

    On WSL2 paged memory can end the process at the first step without an error (bitsandbytes issue 726).
    """
    pages = device_type == "cuda" and not ON_WSL
    if pages or not optim.startswith("paged_"):
        return optim
    return "adamw_8bit" if device_type == "cuda" and "8bit" in optim else "adamw_torch"


class Stop:
    """Signals to stop: exit at once before training; during training finish the step and save a checkpoint.

    SIGHUP is one of them: the terminal's window or connection was closed. `nohup` makes a process ignore it.
    """

    def __init__(self, world: World):
        self.signal = self.agreed = 0  # received by this process; by any process
        self.finish_step_first, self.world = False, world
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self)

    def __call__(self, signum: int, frame) -> None:
        if signum == signal.SIGHUP:
            for stream in self.terminals:  # writing to a closed terminal is an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        elif self.signal:
            os._exit(128 + signum)
        self.signal = signum
        text = "stopping after this step and its checkpoint; press Ctrl-C again to exit at once"
        if not self.finish_step_first:
            text = "stopped before the first step: nothing to save; the same command starts again"
        if not self.world.rank:
            os.write(1, f"\n{text}\n".encode())  # print fails where the signal came within another print
        if not self.finish_step_first:
            sys.exit(128 + signum)

    def any_rank_signaled(self, accelerator) -> bool:
        """Whether any process has received a signal: all of them must stop at the same step."""
        self.agreed = self.signal
        if self.world.size > 1:
            self.agreed = int(accelerator.gather(torch.tensor([self.signal], device=accelerator.device)).max())
        return bool(self.agreed)


def training_arguments(args: argparse.Namespace, evaluating: bool) -> transformers.TrainingArguments:
    """Our flags under transformers' names."""
    cuda = torch.cuda.is_available()
    arguments = transformers.TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.train_batch_size,
        per_device_eval_batch_size=args.eval_batch_size,
        gradient_accumulation_steps=args.grad_accum,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        max_grad_norm=args.max_grad_norm,
        optim=optimizer_on(args.optim, "cuda" if cuda else "cpu"),
        seed=args.seed,
        logging_steps=args.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it waits for the GPU after every batch; we look once per step
        eval_strategy="steps" if evaluating else "no",
        eval_steps=args.eval_steps,
        save_steps=args.save_steps,
        load_best_model_at_end=evaluating,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=args.report_to,
        restore_callback_states_from_checkpoint=True,  # --early-stopping continues to count
        ddp_find_unused_parameters=False,
        ddp_timeout=int(TIMEOUT.total_seconds()),
        use_cpu=not cuda,
    )
    # With several GPUs in the machine Trainer would wrap the model in DataParallel and halve the steps.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def make_trainer(plan: Plan, model, tokenizer, stop: Stop):
    """A Hugging Face Trainer with exact evaluation, complete checkpoints and one line for each step."""
    args, eval_rows = plan.args, plan.eval_rows
    arguments = training_arguments(args, evaluating=eval_rows is not None)  # starts the process group
    if not args.output.is_dir():
        raise InputError(f"--output {args.output}: does not exist on this machine; name a folder that all share")
    # Trainer would round the share up. The first step of a warm-up has rate 0, and a short run should not lose it.
    arguments.warmup_steps = int(args.warmup_ratio * plan.counts["steps"])
    trainer = derive(Training, transformers.Trainer)(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=plan.train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )
    trainer.prompts, trainer.stop = find_prompts(plan), stop
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(derive(Steps, transformers.TrainerCallback)(trainer, args))
    if args.early_stopping and eval_rows:
        trainer.add_callback(transformers.EarlyStoppingCallback(args.early_stopping))
    return trainer


def derive(ours: type, theirs: type) -> Any:
    """A class of ours on top of one of transformers, which is not imported yet where ours is written."""
    return type(ours.__name__, (ours, theirs), {})


class Training(Trainer):
    """What Hugging Face's Trainer does differently here, where no argument or callback does it."""

    prompts: dict[str, list[int]]
    stop: Stop
    tokens = 0  # trained on by this process
    documents: tuple[str, ...] = ()  # of the current step
    measured: dict[str, float]  # of the last evaluation: each conversation's loss, by file:line
    measured_tokens: Counter[str]  # and its tokens

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Keep the documents' places, which are no input of the model. Callbacks do not see the inputs."""
        self.tokens += inputs["input_ids"].numel()
        self.documents = (*self.documents, *inputs.pop("documents"))
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model, grad_norm=None):
        """Stop before the optimizer applies a gradient that is NaN or infinite. Callbacks do not see it."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not torch.isfinite(torch.as_tensor(grad_norm)):
            places = ", ".join(self.documents[:8])
            problem, fix = f"the gradient is {float(grad_norm)}", f"lower --learning-rate, or check {places}"
            raise InputError(f"step {self.state.global_step + 1}: {problem}; {fix}")
        self.documents = ()
        return grad_norm

    def evaluation_loop(self, dataloader, description, *_, metric_key_prefix="eval", **__):
        """Mean loss of all trained tokens; Trainer's own is a mean of batch means. Keeps each conversation's loss."""
        cross_entropy, found = torch.nn.functional.cross_entropy, []
        self.model.eval()
        for inputs in map(self._prepare_inputs, dataloader):
            places, targets, _ = (inputs.pop(name) for name in ("documents", "labels", "shift_labels"))
            with torch.no_grad():  # in one expression: a second batch of logits would not fit
                losses = cross_entropy(self.model(**inputs).logits[0].float(), targets[0], reduction="none")
            starts, kept = (inputs[name].cpu().numpy() for name in ("cu_seq_lens_q", "logits_to_keep"))
            each = losses.double().cpu().split(np.diff(np.searchsorted(kept, starts)).tolist())
            found += [(place, float(part.sum()), len(part)) for place, part in zip(places, each, strict=True)]
        total, self.measured_tokens = Counter(), Counter()  # parts of a conversation are added up
        for place, loss, tokens in accelerate.utils.gather_object(found):
            total[place] += loss
            self.measured_tokens[place] += tokens
        self.measured = {place: round(total[place] / tokens, 6) for place, tokens in self.measured_tokens.items()}
        metrics = {f"{metric_key_prefix}_loss": total.total() / self.measured_tokens.total()}
        return transformers.trainer_utils.EvalLoopOutput(None, None, metrics, len(self.eval_dataset))

    def get_eval_dataloader(self, eval_dataset=None):
        """Each row once. For training accelerate repeats some, so that all processes have as many batches."""
        self.accelerator.even_batches = False
        loader = super().get_eval_dataloader(eval_dataset)
        self.accelerator.even_batches = True
        return loader

    def losses(self, rows: Rows) -> dict[str, float]:
        """The mean loss of each conversation's trained tokens, by file:line."""
        self.evaluation_loop(self.get_eval_dataloader(rows), "")
        return self.measured


class Steps(TrainerCallback):
    """Around each step: a line on the screen, the end on a signal, and complete checkpoints."""

    def __init__(self, trainer, options: argparse.Namespace):
        self.trainer, self.options, self.seconds = trainer, options, 0.0  # in steps alone

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        restore_paging(optimizer)  # after Trainer has loaded its state
        if state.global_step:  # the checkpoint has restored its learning rate, which --force-resume may change
            lr_scheduler.base_lrs = [args.learning_rate] * len(lr_scheduler.base_lrs)
            lr_scheduler.last_epoch -= 1
            lr_scheduler.step()
        self.first = state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.monotonic() - self.step_began
        if self.trainer.stop.any_rank_signaled(self.trainer.accelerator):
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "loss" in logs:
            left = self.seconds / (state.global_step - self.first) * (state.max_steps - state.global_step)
            speed = f"{self.trainer.tokens * args.world_size / self.seconds:,.0f} tok/s"
            values = f"loss {logs['loss']:.4f}  grad {logs['grad_norm']:.3f}  lr {logs['learning_rate']:.1e}"
            print(f"{step}  {values}  {speed}  left {timedelta(seconds=round(left))}", flush=True)
        elif "eval_loss" in logs:
            print(f"{step}  held-out loss {logs['eval_loss']:.4f}", flush=True)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        # Trainer would remember a best between two --save-steps, but keep the checkpoint of another step.
        control.should_save |= state.best_metric is None or metrics["eval_loss"] < state.best_metric

    def on_save(self, args, state, control, **kwargs):
        self.trainer.accelerator.wait_for_everyone()  # each process adds its random state
        if state.is_world_process_zero:
            complete_checkpoint(self.options.output / f"checkpoint-{state.global_step}")
            rotate = transformers.trainer_utils.rotate_checkpoints
            rotate(args.output_dir, self.options.save_total_limit, state.best_model_checkpoint)


def restore_paging(optimizer) -> None:
    """Put the loaded state of a paged bitsandbytes optimizer back into managed memory.

    Loading leaves it in ordinary memory, but bitsandbytes would prefetch it as managed memory all the same.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in state.keys() & {"state1", "state2"}:
            state[name] = optimizer.get_state_buffer(parameter, dtype=state[name].dtype).copy_(state[name])


def out_of_memory(error: BaseException) -> bool:
    """Whether GPU memory or main memory has run out: CUDA, cuBLAS, NCCL and torch's CPU allocator each say it differently."""
    words = "out of memory|ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|DefaultCPUAllocator"
    said = isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE)
    return isinstance(error, MemoryError) or bool(said)


# ---- Checkpoints and the run's record ------------------------------------------------------------

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems
# These may differ when a run is resumed; batch size and accumulation may as long as their product does not.
MAY_DIFFER = {"model", "train_files", "eval_files", "init_adapter", "output", "name", "input_format", "resume",
              "force_resume", "overwrite", "dry_run", "preview", "report_to", "sample_prompts", "train_batch_size",
              "grad_accum", "eval_batch_size", "logging_steps", "save_steps", "save_total_limit",
              "gradient_checkpointing", "torch_memory_fraction", "cuda_alloc_expandable", "max_split_size_mb"}  # fmt: skip


def check_apart(output: Path, inputs: Iterable[Any]) -> None:
    """InputError for an input inside the output folder, which a new run empties."""
    for name in inputs:
        path = Path(str(name)).resolve()
        if path.exists() and output.resolve() in (path, *path.parents):
            raise InputError(f"--output {output}: {name} lies in it and would be deleted; name another folder")


@contextlib.contextmanager
def claim_output(folder: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """Create and lock the output folder: refuse a used one unless told otherwise, and one in use always.

    The lock ends with the process, whatever ends it. A run that stops before it has written anything leaves no folder.
    """
    import fcntl

    names = set(os.listdir(folder)) if folder.is_dir() else set()
    used, problem = names - {".lock"}, ""
    if resume and RECORD not in names:
        raise InputError(f"--resume: no run in {folder}; start it without --resume")
    if used and not (resume or overwrite):
        problem = "not empty; --resume continues it, --overwrite deletes it, or name another folder"
    elif used and overwrite and not names & {".lock", RECORD}:
        problem = "not created by this script; refusing to overwrite it; name another folder"
    if problem:
        raise InputError(f"--output {folder}: {problem}")
    with explain(f"--output {folder}", "{error}; name a folder that can be written, not a file", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - closed below
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--output {folder}: another process is training there; wait for it") from None
        except OSError:
            print_field("output", "its file system has no locks: start no second run in this folder")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # someone else has deleted the folder
                if os.listdir(folder) == [".lock"]:
                    shutil.rmtree(folder)


def raise_if_disk_full(output: Path, step: int) -> None:
    """InputError, and the unfinished checkpoint deleted, if an error came from a full disk."""
    folder = output / f"checkpoint-{step}"
    if shutil.disk_usage(output).free <= 2**20:
        if folder.exists() and not (folder / COMPLETE).exists():
            shutil.rmtree(folder)
        raise InputError(f"{folder}: no space left on the disk; free some space, then use --resume") from None


def complete_checkpoint(folder: Path) -> None:
    """Write the list of the checkpoint's files and their sha256; a checkpoint without it does not count."""
    files = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != COMPLETE}
    write_json(folder / COMPLETE, files)


def newest_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint; damaged ones are named and deleted."""
    while checkpoint := transformers.trainer_utils.get_last_checkpoint(str(output)):
        folder = Path(checkpoint)
        try:
            files = read_json(folder / COMPLETE)
            damaged = next((name for name, expected in files.items() if sha256(folder / name) != expected), None)
        except (FileNotFoundError, ValueError) as error:
            damaged = getattr(error, "filename", None) or COMPLETE
        if not damaged:
            break
        print_field("resume", f"{folder} is damaged ({os.path.basename(damaged)}): deleted, using the one before")
        shutil.rmtree(folder)
    return checkpoint


def resume_point(output: Path, record: dict, force: bool) -> str | None:
    """The checkpoint to continue from, with the earlier results put into the record; InputError for another run."""
    with explain("--resume", f"{output / RECORD} is not of this version ({{error}}); start over", ValueError, KeyError):
        previous = read_json(output / RECORD)
        old, new = comparable(previous), comparable(json.loads(json.dumps(record, default=str)))
    different = [key for key in old | new if old.get(key) != new.get(key)]
    if different and not force:
        problem = f"not the same run, these differ: {', '.join(different)}"
        raise InputError(f"--resume: {problem}; restore them, add --force-resume, or start over with --overwrite")
    record["results"], checkpoint = previous.get("results", {}), newest_checkpoint(output)
    if list(previous["data"]["sha256"]) != list(record["data"]["sha256"]):  # files have moved: no place is the same
        record["results"].pop("held_out", None)
        print_field("resume", "the files have other names: the verdict on held-out conversations is left out")
    print_field("resume", f"from {checkpoint or 'the beginning: there is no complete checkpoint yet'}")
    return checkpoint


def run_record(plan: Plan, fingerprint: str) -> dict[str, Any]:
    """The content of training_args.json: enough to merge the adapter and to repeat the run."""
    libraries = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors", "tokenizers")
    args, base = plan.args, plan.base
    model = args.model if base.revision else os.path.abspath(args.model)
    weights = args.init_adapter and sha256(args.init_adapter / "adapter_model.safetensors")
    return {
        "chat_format": {"name": args.chat_format, **base.encode.chat._asdict()},
        "base": {"model": model, "revision": base.revision, "fingerprint": fingerprint},
        "init_adapter": weights and {"name": args.init_adapter.resolve().name, "sha256": weights},
        "args": vars(args),
        "data": {"sha256": plan.files, **plan.counts},
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in libraries}},
    }


def comparable(record: dict) -> dict[str, Any]:
    """What --resume must find unchanged, under names the user knows. Files may move: their bytes count."""
    data = record["data"]
    contents = [data["trained_on"], data["held_out"], *data["sha256"].values()]
    return {
        "the contents of --train-files and --eval-files": contents,
        "the weights of --model": record["base"]["fingerprint"],
        "the weights of --init-adapter": (record["init_adapter"] or {}).get("sha256"),
        "rows per step (--train-batch-size x --grad-accum x processes)": data["rows_per_step"],
        **{f"--{key.replace('_', '-')}": value for key, value in record["args"].items() if key not in MAY_DIFFER},
    }


def same_command(world: World, *flags: str) -> str:
    """This run's command with more flags, of which --resume stands once and never beside --overwrite."""
    if world.size > 1:  # the launcher's command is not known here
        never = "without --overwrite and " if "--resume" in flags else ""
        return f"the same command, launcher included, {never}with {' '.join(flags)}"
    options = [option for option in sys.argv if "--resume" not in flags or option not in ("--resume", "--overwrite")]
    return shlex.join([this_python(), *options, *flags])


def read_json(file: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file that appears complete or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(partial, file)


# ---- Report --------------------------------------------------------------------------------------


def read_prompts(file: Path | None) -> list[str] | None:
    """The questions of --sample-prompts; None where it is not given."""
    if file is None:
        return None
    if str(file) == "none":
        return []
    with explain(f"--sample-prompts {file}", "{error}; write one question per line, or give none", OSError):
        return [line.strip() for _, line in read_lines(str(file)) if line.strip()]


def find_prompts(plan: Plan, count: int = 3) -> dict[str, list[int]]:
    """{question: ids up to where the answer begins}: those of --sample-prompts, or the first that are held out.

    The latter keep their system turn. Where nothing is held out they come from training conversations.
    """
    encode, questions = plan.base.encode, plan.questions
    if questions is not None:
        turns = [[Turn("user", question, 0), Turn("assistant", "-", 0)] for question in questions]
        return {q: before_answer(*tokens) for q, tokens in zip(questions, encode(turns), strict=True)}
    found: dict[str, list[int]] = {}
    rows = plan.eval_rows or plan.train_rows
    before, after = encode.chat.before, encode.chat.after
    for i in sorted(chain.from_iterable(islice(rows.plan, 8 * count))):
        sample = rows.samples[int(i)]
        ids = before_answer(sample["input_ids"], sample["labels"])
        text = encode.tokenizer.decode(ids, skip_special_tokens=False).rpartition(before["user"])[2]
        text = text.removesuffix(before["assistant"]).removesuffix(after["user"]).strip()
        found.setdefault(text, ids)
        if len(found) == count:
            break
    return found


def before_answer(input_ids: np.ndarray, labels: np.ndarray) -> list[int]:
    """The ids before the first trained token: what a runtime sends to get that answer."""
    return input_ids[: int(np.argmax(labels != IGNORE))].tolist()


def generate_answers(model, tokenizer, prompts: dict[str, list[int]], tokens=80, when="") -> dict[str, str]:
    """Greedy answers by their questions, one at a time, without padding; `when` (before, after) announces each."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    # What is not set here comes from the base's own settings; Llama 3.1's turn sampling on. Without sampling
    # transformers warns about any values of the other three but these.
    greedy = transformers.GenerationConfig(
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        max_new_tokens=tokens,
        use_cache=True,
        eos_token_id=[tokenizer.eos_token_id, *ends],
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.eval()
    answers = {}
    for number, (text, prompt) in enumerate(prompts.items(), 1):
        if when:
            print_field(when, f"question {number} of {len(prompts)}: {escape_controls(one_line(text, 200))}")
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(ids, generation_config=greedy)
        answers[text] = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    return answers


def one_line(text: str, width: int = 300) -> str:
    """Text as one line of Markdown."""
    return textwrap.shorten(text, width, placeholder=" …")


MOST_PROMPTED = 50  # held-out conversations: each fills a row


def prompted_rows(plan: Plan, examples: int = 5) -> tuple[Rows, float]:
    """Rows of held-out conversations, each behind training conversations; and how many of these on average.

    That is what one can do without training: as many examples as fit into a row. A conversation that was split, or
    leaves no room for one, is left out. Only its own answers are labels.
    """
    import datasets

    samples, random, found, used = plan.train_rows.samples, np.random.default_rng(plan.args.seed), [], 0
    _, lengths, _, part, _ = measure(samples)
    whole = (part == 0) & (np.append(part[1:], 0) == 0)  # the parts of a conversation follow each other
    assert plan.eval_rows
    shown, held_out = (random.permutation(np.concatenate(rows.plan)) for rows in (plan.train_rows, plan.eval_rows))
    bos = len(plan.base.encode.start)  # only the first of a row keeps it
    for number, own in enumerate(held_out[whole[held_out]][:MOST_PROMPTED]):
        before = np.roll(shown, -examples * number)[:examples]
        before = before[np.cumsum(lengths[before]) <= plan.args.max_length - lengths[own]]
        if len(before):
            alone, prompt = samples[int(own)], np.concatenate([samples[int(i)]["input_ids"][bos:] for i in before])
            ids = np.concatenate([alone["input_ids"][:bos], prompt, alone["input_ids"][bos:]])
            labels = np.concatenate([np.full(len(prompt), IGNORE), alone["labels"]])
            found.append(alone | {"input_ids": ids, "labels": labels})
            used += len(before)
    return Rows(datasets.Dataset.from_list(found), list(np.arange(len(found))[:, None])), used / max(1, len(found))


def trained_texts(plan: Plan) -> Iterator[str]:
    """The trained text of each sample: its answers, between which the end token stands."""
    rows, decode = plan.train_rows, plan.base.encode.tokenizer.decode
    for sample in rows.samples.select(np.concatenate(rows.plan)).select_columns("labels"):
        yield decode(sample["labels"][sample["labels"] != IGNORE].tolist(), skip_special_tokens=False)


def count_copied(answers: Iterable[str], training: Iterable[str], size: int = 8) -> dict[str, int]:
    """How many runs of eight words in the answers stand in the training answers too, and the words of the longest."""

    def runs(text: str) -> list[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]

    own = [run for answer in answers for run in runs(answer)]
    wanted, found, longest = set(own), set(), 0
    for text in training:
        length = size - 1
        for run in runs(text):
            length = length + 1 if run in wanted else size - 1
            if length >= size:
                found.add(run)
                longest = max(longest, length)
    return {"runs": len(own), "copied": sum(run in found for run in own), "longest": longest}


def paired_change(before: np.ndarray, after: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Change of the mean loss of all tokens, and half of its 95 % interval over the choice of conversations.

    Loss and tokens of each conversation: float64 [N]. The variance is the jackknife's: the change with each
    conversation left out in turn. So a long one weighs more; with few of them Student's t is wider.
    """
    changes, n = (after - before) * tokens, len(tokens)
    change = float(changes.sum() / tokens.sum())
    if n == 1:
        return change, float("inf")
    without = (changes.sum() - changes) / (tokens.sum() - tokens)
    error = ((n - 1) / n * ((without - without.mean()) ** 2).sum()) ** 0.5
    # Student's t for 95 % and n - 1 degrees of freedom, within 0.3 %; scipy is not among the requirements.
    return change, float(np.polyval([1.407, 1.589, 2.556, 2.822, 2.372, 1.960], 1 / (n - 1)) * error)


def verdict(results: dict[str, Any]) -> dict[str, str]:
    """Whether it worked, a line each, for the screen and the card."""
    said, copied = {}, results.get("copied", {})
    held_out = {"before": {}, "prompted": {}, "after": {}} | results.get("held_out", {})

    def compare(*names: str) -> tuple[list[str], float, float]:
        """The mean losses on the conversations that all of these have, and the change between the last two."""
        places = [place for place in held_out["after"] if all(place in held_out[name] for name in names)]
        *losses, tokens = (np.array([held_out[name][place] for place in places]) for name in (*names, "tokens"))
        means = [f"{np.average(loss, weights=tokens):.3f}" for loss in losses]
        return means, *paired_change(losses[-2], losses[-1], tokens)

    # After --force-resume with other data, or in a renamed file, there may be none that was measured before.
    if common := held_out["before"].keys() & held_out["after"].keys():
        (before, after), change, half = compare("before", "after")
        within = f"{change:+.3f} ± {f'{half:.3f}' if half < float('inf') else 'unknown'}"
        within += f", {plural(len(common), 'conversation')}"
        chance = ": that may be chance, nothing certain was learned"
        comment = chance if abs(change) <= half else "" if change < 0 else ": worse than before"
        said["held out"] = f"loss {before} -> {after} ({within}){comment}"
    if held_out["prompted"].keys() & held_out["after"].keys():
        (before, prompted, after), change, half = compare("before", "prompted", "after")
        better = f"{'training' if change < 0 else 'examples'} did better, by {abs(change):.3f} ± {half:.3f}"
        comment = "no certain difference, examples may do as well" if abs(change) <= half else better
        shown = f"{plural(round(results['examples']), 'example')} in the prompt"
        said["examples"] = f"loss {before} alone, {prompted} with {shown}, {after} trained: {comment}"
    if copied.get("runs"):
        share, longest = copied["copied"] / copied["runs"], f", the longest of {copied['longest']} words"
        found = f"{share:.0%} of the answers' eight-word runs stand in the training data{longest if share else ''}"
        said["copied"] = f"{found}: learned by heart" if share > 0.05 else found
    return said


def plot_losses(history: list[dict], results: dict[str, Any], tokens_per_step: float, title: str, file: Path) -> None:
    """Plot training and held-out loss by optimizer step, with the adapter's step marked."""
    from matplotlib.figure import Figure

    steps, losses = zip(*((log["step"], log["loss"]) for log in history if "loss" in log), strict=True)
    held_out = [(0, results["eval_loss_before"])] if "eval_loss_before" in results else []
    held_out += [(log["step"], log["eval_loss"]) for log in history if "eval_loss" in log]
    figure = Figure((7, 4), layout="constrained")
    axes, window = figure.subplots(), max(1, len(losses) // 10)
    axes.plot(steps, losses, lw=0.6, marker=".", ms=3, alpha=0.35, color="tab:blue")
    means = np.convolve(losses, np.ones(window) / window, "valid")
    axes.plot(steps[window - 1 :], means, color="tab:blue", label="training, smoothed" if window > 1 else "training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", ms=4, color="tab:orange", label="held out")
    if "best_step" in results:
        best, value = results["best_step"], results["eval_loss_after"]
        axes.plot(best, value, "*", ms=13, color="tab:red", zorder=3, label=f"adapter: step {best}, {value:.2f}")
    label = f"optimizer step (about {tokens_per_step:,.0f} tokens each)"
    axes.set(title=title, ylabel="loss, nats per token", xlabel=label)
    axes.locator_params("x", integer=True)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def write_card(output: Path, args: argparse.Namespace, record: dict[str, Any]) -> None:
    """The adapter's README.md: a model card with what was done, measured and answered."""
    from huggingface_hub import ModelCardData

    base, results = record["base"], record["results"]
    hub = {"base_model": base["model"], "base_model_relation": "adapter"} if base["revision"] else {}
    card = ModelCardData(library_name="peft", pipeline_tag="text-generation", tags=["lora", "sft"], **hub)
    revision = f" at revision `{base['revision']}`" if base["revision"] else ""
    lines = ["---", card.to_yaml().strip(), "---", f"# {args.name}", ""]
    lines += [f"LoRA adapter for `{without_folder(base['model'], base['revision'])}`{revision}"]
    lines += ["", "![Loss](loss.png)", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in card_rows(record).items()]
    before, after = results["samples"]["before"], results["samples"]["after"]
    lines += ["", "## Before and after"] if after else []
    for prompt in after:  # a resumed run may ask what was not asked before
        lines += ["", f"**{one_line(prompt)}**"]
        for when, text in (("before", before.get(prompt, "(not asked)")), ("after", after[prompt])):
            lines += ["", f"*{when}*", "", *(f"> {line}".rstrip() for line in text.split("\n"))]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    folder = Path(output.name) if output.is_absolute() else output
    merge = shlex.join(["python3", "merge_lora.py", *merge_flags(folder, args.name)])
    train = shlex.join(["python3", "train_sft_dolores.py", *map(without_folder, training_flags(args))])
    lines += ["", "## Merge and run", "", "```bash", merge,
              f"ollama create {args.name} -f {merged_folder(args.name)}/Modelfile", f"ollama run {args.name}",
              f"python3 merge_lora.py --chat {merged_folder(args.name)}    # without Ollama", "```", "",
              "## Reproduce", "", "```bash", train, "```", "", f"Versions: {versions}", "",
              "The license of the base model applies to this adapter and to what is merged from it."]  # fmt: skip
    (output / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def without_folder(name: str, on_hub: Any = None) -> str:
    """A name for others to read: an absolute path says nothing outside of this machine."""
    return os.path.basename(name.rstrip("/")) if os.path.isabs(name) and not on_hub else name


def training_flags(args: argparse.Namespace) -> list[str]:
    """All flags of a run that are not the default, as they are typed."""
    once = {"resume", "force_resume", "overwrite", "dry_run", "preview"}
    flags, defaults = [], vars(parse_args([])) | {"save_steps": args.eval_steps, "lora_alpha": 2.0 * args.lora_r}
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if name in once or value == defaults[name]:
            continue
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
            continue
        value = ",".join(value) if name == "lora_target_modules" else value
        values = value if isinstance(value, list) else [value]
        flags += [flag, *(f"{v:.12g}" if isinstance(v, float) else str(v) for v in values)]
    return flags


def card_rows(record: dict[str, Any]) -> dict[str, str]:
    """The card's table."""
    data, results = record["data"], record["results"]
    rows = {
        "data": describe_use(data),
        "tokens per epoch": f"{data['tokens']:,}, of which {data['trained_tokens']:,} trained",
        "optimizer steps": f"{results['steps']:,}",
        "chat format": record["chat_format"]["name"],
        "training time": f"{timedelta(seconds=results['seconds'])} on {results['device']}"
        + (", after the last --resume" if results["resumed"] else ""),
    }
    rows |= verdict(results)
    if "best_step" in results:
        rows["adapter from"] = f"step {results['best_step']}, the best by held-out loss"
    if len(after := results.get("held_out", {}).get("after", {})) > 3:
        worst = sorted(after, key=after.__getitem__, reverse=True)[:3]
        rows["learned worst"] = ", ".join(f"`{without_folder(place)}` ({after[place]:.2f})" for place in worst)
    return rows | {f"`{without_folder(name)}`": f"sha256 `{value[:16]}…`" for name, value in data["sha256"].items()}


def merge_flags(output: Path, name: str) -> list[str]:
    """What merge_lora.py needs to be told about this run."""
    return ["--adapter", str(output), "--output", merged_folder(name)]


def merged_folder(name: str) -> str:
    """Where the merged model of this name goes: dolores_v5_full for dolores-v5."""
    return name.split("/")[-1].replace("-", "_") + "_full"


def print_next(script: str, *flags: str) -> None:
    """Print what to type next, on one line, however long: it is there to be pasted."""
    print(f"{'next':<10} {shlex.join([this_python(), script, *flags])}", flush=True)


def this_python() -> str:
    """The interpreter as the user can type it: by its path from here if it is below this folder."""
    near = os.path.relpath(sys.executable)
    return sys.executable if near.startswith("..") else near


if __name__ == "__main__":
    main()
