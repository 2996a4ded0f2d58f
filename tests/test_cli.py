"""The command line: the documented run is the default, and bad input ends in one line before a model is loaded."""

import ast
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from runs import SCRIPT, assert_says, main

import train_sft_dolores as sft

HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "pyarrow"}
OK = "".join(f"<|endoftext|>\n<|user|>\nq{i}\n<|assistant|>\na\n" for i in range(4))

DEFAULTS = {
    "model": "meta-llama/Llama-3.1-8B-Instruct", "train_files": ["train.chatml"], "input_format": "auto",
    "output": Path("runs_dolores_v5/llama31_clean"), "epochs": 1.0, "max_length": 2048,
    "train_batch_size": 1, "eval_batch_size": 1, "grad_accum": 32,
    "learning_rate": 1.5e-4, "lr_scheduler_type": "cosine", "warmup_ratio": 0.03, "max_grad_norm": 0.8,
    "lora_r": 32, "lora_alpha": 64.0, "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bf16": True, "bnb_nf4": True, "bnb_dtype": "bfloat16", "optim": "paged_adamw_8bit",
    "torch_memory_fraction": 0.95, "cuda_alloc_expandable": True, "max_split_size_mb": 128,
    "gradient_checkpointing": "auto", "packing": True,
    "logging_steps": 1, "eval_steps": 10, "save_steps": 10, "save_total_limit": 5,
}  # fmt: skip


# ---- the flags ----


def test_the_documented_run_is_the_default():
    """The README's command is compared with the defaults in test_readme.py."""
    args = vars(sft.parse_args([]))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS
    assert sft.detect_format(str(SCRIPT.with_name("train.chatml"))) == "chatml"


def test_every_switch_can_be_turned_off():
    for name in ("packing", "bf16", "bnb-nf4", "cuda-alloc-expandable"):
        assert vars(sft.parse_args([f"--no-{name}"]))[name.replace("-", "_")] is False
    for value in ("none", "all"):
        assert sft.parse_args(["--gradient-checkpointing", value]).gradient_checkpointing == value


# ---- in a process of its own: nothing heavy is imported ----


def run(folder: Path, *options, **environment) -> tuple[int, str, str, set[str]]:
    """(exit status, stdout, stderr, imported modules) of the script in this folder."""
    watch = (
        "import runpy, sys\n"
        "modules, sys.argv = sys.argv[1], sys.argv[2:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: open(modules, 'w').write(' '.join(sys.modules))"
    )
    modules = folder.with_name(folder.name + ".modules")
    done = subprocess.run(
        [sys.executable, "-c", watch, modules, SCRIPT, *map(str, options)],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "COLUMNS": "10000", **environment}, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr, set(modules.read_text().split())


def test_help(tmp_path):
    code, out, err, modules = run(tmp_path, "--help")
    assert code == 0 and "--train-files" in out and err == "" and not HEAVY & modules
    assert list(tmp_path.iterdir()) == []


def test_bad_data_comes_first(tmp_path):
    """It is reported before a bad model, and leaves nothing behind."""
    (tmp_path / "d.chatml").write_text("<|user|>\nq\n<|assitant|>\na")
    code, out, err, modules = run(tmp_path, "--train-files", "d.chatml", "--model", "nowhere", "--output", "out")
    assert (code, out) == (2, "")
    assert_says(err, "d.chatml:3", "<|assistant|>")
    assert not HEAVY & modules and not (tmp_path / "out").exists()


def test_data_is_prepared_before_torch_is_imported(tmp_path, smollm2):
    """Errors that only the tokenizer finds come as early as the others, and leave nothing behind either."""
    (tmp_path / "d.chatml").write_text("<|user|>\nq\n<|assistant|>\n" + "a " * 99)
    options = ("--train-files", "d.chatml", "--model", smollm2, "--output", "mine/runs/out", "--max-length", 16)
    code, _, err, modules = run(tmp_path, *options)
    assert code == 2 and not {"torch", "transformers"} & modules
    assert_says(err, "d.chatml")
    assert not (tmp_path / "mine/runs/out").exists()


def test_missing_packages(tmp_path):
    """A Python without any package: one line with the commands that install them."""
    python = [sys.executable, "-I", "-S", SCRIPT, "--dry-run"]
    done = subprocess.run(python, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert_says(done.stderr, "numpy", "pip install -r requirements.txt")


def test_an_old_python(tmp_path):
    """It is told its version before anything fails; the file is still valid Python 3.8."""
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
    old = "import sys; sys.version_info, sys.version = (3, 9, 1), '3.9.1 (main)'; exec(open(sys.argv[1]).read())"
    done = subprocess.run([sys.executable, "-c", old, SCRIPT], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "3.10" in done.stderr and "3.9.1" in done.stderr and done.stderr.count("\n") == 1


# ---- in this process: the output, and the model, which is inspected, never loaded ----


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # restored after the test, whatever main sets
    (tmp_path / "train.chatml").write_text(OK)
    return tmp_path


@pytest.fixture
def base(smollm2, workdir) -> Path:
    """SmolLM2's folder; of the weights only the headers are real, so no test may get as far as training."""
    folder = workdir / "base"
    shutil.copytree(smollm2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with open(smollm2 / "model.safetensors", "rb") as weights, open(folder / "model.safetensors", "wb") as copy:
        length = weights.read(8)
        copy.write(length + weights.read(int.from_bytes(length, "little")))
        copy.truncate(os.path.getsize(smollm2 / "model.safetensors"))  # takes no room on the disk
    return folder


@pytest.fixture
def error(capsys):
    """A function that runs the script with these options and returns its one line on stderr."""

    def error(*options) -> str:
        assert main("--output", "out", *options) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.endswith("\n")
        return err[:-1]

    return error


OUTPUTS = [  # what is there, options, place, facts
    ("out/training_args.json", "", "--output out", "--resume --overwrite"),
    ("out/thesis.tex", "--overwrite", "--output out", ""),
    ("out", "", "--output out", "file"),
    ("out/", "--resume", "--resume", "out"),
    ("e.chatml", "--output train.chatml/out", "--output train.chatml/out", ""),
    ("e.chatml", "--output /proc/out", "--output /proc/out", ""),
]


@pytest.mark.parametrize("there, options, place, facts", OUTPUTS)
def test_bad_output(there, options, place, facts, workdir, error):
    folder, _, name = there.rpartition("/")
    Path(folder).mkdir(exist_ok=True)
    if name:
        Path(there).write_text("{}")

    def files() -> list[tuple]:
        return sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*") if path.name != ".lock")

    before = files()
    assert_says(error("--model", "org/nowhere", *options.split()), place, *facts.split())
    assert files() == before


def test_one_run_a_folder(workdir, error):
    (workdir / "out").mkdir()
    with open(workdir / "out/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_says(error("--model", "org/nowhere"), "--output out")


def test_bad_eval_files(workdir, error):
    (workdir / "e.chatml").write_text("oops")
    assert_says(error("--eval-files", "train.chatml", "e.chatml"), "e.chatml:1", "<|user|>")


def test_lora_targets(base, error):
    for targets, name in (("q_proj,k_porj", "k_porj"), ("lm_head", "lm_head"), (",", ""), ("proj", "proj")):
        message = error("--model", "base", "--lora-target-modules", targets)
        assert_says(message, f"--lora-target-modules {name}", "down_proj,gate_proj,k_proj", "all-linear")


def test_trackers(base, error):
    """They must be known and installed before the model is loaded."""
    assert_says(error("--model", "base", "--report-to", "none,tensorbord"), "--report-to", "tensorbord", "tensorboard")
    assert_says(error("--model", "base", "--report-to", "mlflow"), "--report-to", "MLflow", "installed")


REFUSED = {  # flags: place, what the line says
    "--model nowhere": ("--model nowhere", "org/model"),
    "--model ./a/b/c": ("--model ./a/b/c", "org/model"),
    "--model a--b/c": ("--model a--b/c", "org/model"),
    "--model adapter": ("--model adapter", "org/base"),
    "--model base --max-length 8193": ("--max-length 8193", "8,192"),
    "--model base --save-steps 15": ("--save-steps 15", "--eval-steps 10"),
    "--model base --early-stopping 2 --eval-fraction 0": ("--early-stopping 2", "--eval-fraction"),
    "--sample-prompts missing.txt": ("--sample-prompts missing.txt", "none"),
    "--sample-prompts .": ("--sample-prompts .", "none"),
}


@pytest.mark.parametrize("options", REFUSED)
def test_dry_run_and_training_refuse_the_same(options, workdir, smollm2, error):
    (workdir / "base").symlink_to(smollm2)
    (workdir / "adapter").mkdir()
    (workdir / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (workdir / "adapter/config.json").write_text("{}")
    place, fact = REFUSED[options]
    messages = [error(*options.split(), *more) for more in ([], ["--dry-run"])]
    assert messages[0] == messages[1]
    assert_says(messages[0], place, fact)
    assert not (workdir / "out").exists()


def test_a_cache_that_cannot_be_written(workdir, smollm2, error, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", "/proc/cache")
    assert_says(error("--dry-run", "--model", smollm2), "/proc/cache", "HF_HOME")


NO_MODEL = [  # a file, its content instead (None: deleted, a number: cut to that size), what the line says
    ("config.json", None, "config.json"),
    ("config.json", b"{", ""),
    ("config.json", b'{"model_type": "dolores"}', ""),
    ("config.json", b'{"model_type": "t5"}', ""),
    ("config.json", b'{"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}', "--bnb-nf4"),
    ("tokenizer.json", None, ""),
    ("tokenizer.json", b'{"version": "1.0"}', ""),
    ("tokenizer.json", b"\xff\0", ""),
    ("model.safetensors", None, "model.safetensors"),
    ("model.safetensors", b"no weights", "model.safetensors"),
    ("model.safetensors", 200_000_000, "model.safetensors"),
]


@pytest.mark.parametrize("name, content, fact", NO_MODEL)
def test_a_folder_that_is_not_a_model(name, content, fact, base, error):
    if isinstance(content, int):
        os.truncate(base / name, content)
    else:
        (base / name).unlink()
    if isinstance(content, bytes):
        (base / name).write_bytes(content)
    assert_says(error("--model", "base"), "--model base", fact)


def test_what_does_not_fit_the_model(base, error):
    long = "<|user|>\nq\n<|assistant|>\n" + "long " * 100
    assert_says(error("--model", "base", "--chat-format", "llama3"), "--chat-format llama3", "<|eot_id|>")
    Path("train.chatml").write_text(long)
    options = ("--model", "base", "--max-length", "64")
    message = error(*options, "--overlong", "error")
    assert_says(message, "train.chatml:1", "--max-length 64", "--overlong split")
    assert re.search(r"\b1\d\d tokens", message)


def test_overwrite_deletes_nothing_before_the_new_run_can_start(base, error):
    """A misspelt name does not delete the old adapter."""
    old = Path("out/adapter_model.safetensors")
    old.parent.mkdir()
    old.write_bytes(b"hours of work")
    Path("out/.lock").touch()  # as a run leaves it
    error("--overwrite", "--model", "nowhere")
    error("--overwrite", "--model", "base", "--lora-target-modules", "q_porj")
    Path("train.chatml").write_text(OK.split("<|endoftext|>\n")[1])  # one conversation, so one line
    error("--overwrite", "--model", "base", "--max-length", "16", "--overlong", "error")
    assert old.read_bytes() == b"hours of work"


# ---- the Hub: a local server with the Hub's own answers ----


FILE = {"type": "file", "path": "model.safetensors", "size": 10**18, "oid": 40 * "b"}  # an exabyte
HUB = (  # part of a path, status, headers, body
    ("org/gated", 403, {"X-Error-Code": "GatedRepo"}, ""),
    ("org/unknown", 401, {"X-Error-Code": "RepoNotFound"}, ""),
    ("/resolve/", 200, {"X-Repo-Commit": 40 * "a", "ETag": '"1"', "Content-Length": str(10**18)}, ""),
    ("/tree/", 200, {}, json.dumps([FILE])),
    ("org/huge", 200, {}, json.dumps({"id": "org/huge", "sha": 40 * "a", "siblings": []})),
)


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        status, headers, body = next(answer for part, *answer in HUB if part in self.path)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_the_hub_refuses(tmp_path):
    resolve = (
        "import sys, train_sft_dolores as sft\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(sft.resolve_model(name))\n"
        "    except sft.InputError as error: print(error)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}

        def ask(*names) -> subprocess.CompletedProcess:
            command = [sys.executable, "-c", resolve, *names]
            return subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent, env={**os.environ, **hub})

        refused = ask("org/gated", "org/unknown", "org/huge")
        server.shutdown()
    unreachable = ask("org/unknown")
    assert refused.returncode == unreachable.returncode == 0, refused.stderr + unreachable.stderr
    gated, unknown, huge = refused.stdout.splitlines()
    assert_says(gated, "--model org/gated", "hf.co/org/gated", "hf auth login")
    assert_says(unknown, "--model org/unknown", "hf auth login")
    assert_says(unreachable.stdout, "--model org/unknown", "Hub")
    assert "hf auth login" not in unreachable.stdout
    assert_says(huge, "--model org/huge", "1,000,000,000.0 GB", "HF_HOME")
