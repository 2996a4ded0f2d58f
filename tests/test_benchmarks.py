"""The benchmarks run, at sizes that take seconds, and count correctly. No times are asserted."""

import ast
import contextlib
import re
import sys
from pathlib import Path

import pytest
from runs import ROOT, launch, run

import train_sft_dolores as sft

sft.load_libraries()

sys.path[:0] = [str(ROOT / "benchmarks")]
import learning  # noqa: E402


def benchmark(folder: Path, name: str, *options) -> str:
    """What a benchmark prints; it and the processes that it starts end with the test."""
    process = launch([sys.executable, ROOT / "benchmarks" / name, *options], folder, "printed")
    status, printed = process.wait(400), (folder / "printed").read_text()
    assert status == 0, printed[-3000:]
    return printed


def table(out: str, width: int) -> dict[str, list[str]]:
    """The lines of a table: the first `width` characters as the key, the rest split into words."""
    return {line[:width].strip(): line[width:].split() for line in out.splitlines()}


# ---- learning.py ----


def test_interval_of_three_seeds():
    assert learning.interval([1, 2, 3]) == "2.000 ± 2.484"  # t = 4.303, standard error 1 / sqrt(3)


@pytest.mark.slow
def test_learning_trains_and_prints_a_table(tmp_path, short_smollm2, monkeypatch, capsys):
    """One setting, two seeds, four held-out exchanges; each run is forked instead of started."""
    (held_out, rest), center = learning.exchanges(), learning.Settings(12, 1, 4)
    small = {
        "SEEDS": (1, 2),
        "CENTERS": [center],
        "variations": lambda: [center],
        "exchanges": lambda: (held_out[:4], rest),
    }
    for name, value in small.items():
        monkeypatch.setattr(learning, name, value)

    def forked(command, **_):
        code, printed = run(tmp_path, *command[2:])
        assert code == 0, printed

    monkeypatch.setattr("subprocess.run", forked)
    shown = []
    for options in (["--base", short_smollm2, "--precision=--no-bf16"], ["--table"]):
        monkeypatch.setattr(sys, "argv", list(map(str, ["learning.py", "--folder", tmp_path / "runs", *options])))
        learning.main()
        shown.append(capsys.readouterr().out)
    assert shown[0].count("-seed") == 2 and re.search(r"^\| center: 12-.* ± ", shown[1], re.M), shown
    assert shown[0].endswith(shown[1])


# ---- export.py, merge.py ----


@pytest.mark.slow
def test_export_compares_with_llama_cpps_tools(tmp_path, short_smollm2):
    out = benchmark(tmp_path, "export.py", "--base", short_smollm2, "--dialogues", 4, "--gguf", "BF16", "Q4_K_M")
    rows = table(out, 28)
    assert abs(float(rows["merged, transformers"][0]) - float(rows["BF16"][0])) < 0.05
    for kind in ("BF16", "Q4_K_M"):
        ours, theirs, equal, _, of = rows[kind][:5]
        assert ours == theirs and equal == of, out


@pytest.mark.slow
def test_merge_measures_copy_merge_and_gguf(tmp_path, monkeypatch, capsys):
    """One small layer; no rest between the runs, no PEFT snippet."""
    import merge

    monkeypatch.setattr(merge, "REST", 0)
    monkeypatch.setitem(merge.SHAPE, "hidden_size", 512)
    merge.compare(tmp_path, 1, 1)
    merge.ggufs(tmp_path, ["Q8_0"])
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["merge_lora.py", "merge_lora.py", "Q8_0"], out


# ---- prep.py, gpu.py ----


@pytest.mark.slow
def test_prep_makes_the_same_tokens_as_trl(tmp_path):
    out = benchmark(tmp_path, "prep.py", "--conversations", 300, "--rounds", 1, "--sides", "TRL 1.16", "ours", "ours, second start")  # fmt: skip
    rows = table(out, 20)
    tokens, trained, packed, fill = rows["ours"][3:]
    assert rows["TRL 1.16"][3:5] == rows["ours, second start"][3:5] == [tokens, trained]
    assert abs(int(rows["TRL 1.16"][5]) - int(packed)) <= 1 and float(fill.rstrip("%")) > 90


@pytest.mark.slow
def test_gpu_on_a_cpu(tmp_path):
    """Every variant trains, from the same weights on the same rows: the first losses are equal."""
    import gpu
    import sides

    options = gpu.parse_args(["--tiny", "--optim", "adamw_torch"])
    results = {name: gpu.train(name, tmp_path / name, options) for name in gpu.VARIANTS}
    losses = {name: result["losses"][0] for name, result in results.items() if "16 bits" not in name}
    assert max(losses.values()) - min(losses.values()) < 0.005, losses
    recomputed = {name: result["recomputed"] for name, result in results.items()}
    assert recomputed["plain Trainer"] == recomputed["TRL"] == recomputed["ours, all layers recompute"] == 2
    assert recomputed["ours"] == 0 and results["ours"]["planned"] > 0
    longest = sides.random_rows(2, 64, 100).longest()  # the memory probe on a GPU needs it
    assert sum(map(len, longest["input_ids"])) > 60


@pytest.mark.slow
def test_gpu_prints_a_line_for_each_variant(tmp_path):
    """The whole program, with one variant in a process of its own."""
    out = benchmark(tmp_path, "gpu.py", "--tiny", "--optim", "adamw_torch", "--variants", "ours")
    (words,) = [words for name, words in table(out, 27).items() if name == "ours"]
    assert words[7] == "0" and float(words[-1]) > 0, out
    assert "checked " in out and "on this CPU" in out


@pytest.mark.slow
def test_train_cpu(tmp_path, short_smollm2):
    """Both sides start from the same loss."""
    options = ("--base", short_smollm2, "--rounds", 1, "--steps", 2, "--length", 256, "--sides", "TRL", "ours")
    rows = table(benchmark(tmp_path, "train_cpu.py", *options), 24)
    assert abs(float(rows["TRL"][4]) - float(rows["ours"][4])) < 0.01


@pytest.mark.slow
def test_fake_cuda_prints_a_table(monkeypatch, capfd):
    """Three of its rows, at two layers."""
    import fake_cuda

    monkeypatch.setattr(fake_cuda, "ROWS", fake_cuda.ROWS[:3])
    monkeypatch.setattr(sys, "argv", ["fake_cuda.py", "--layers", "2"])
    with contextlib.suppress(SystemExit):
        fake_cuda.main()
    rows = [line.split("|")[1:-1] for line in capfd.readouterr().out.splitlines() if line.startswith("| NF4")]
    recomputed, gflop = [row[4].split()[0] for row in rows], [float(row[5]) for row in rows]
    assert recomputed == ["2", "1", "0"] and gflop[0] > gflop[1] > gflop[2]


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda script: script.stem)
def test_benchmarks_call_what_exists(script):
    """Not every benchmark is run here; the trainer's functions that it names exist."""
    tree = ast.parse(script.read_text())
    imports = [name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    aliases = {name.asname or name.name for name in imports if name.name == "train_sft_dolores"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            assert hasattr(sft, node.attr), f"{script.name}:{node.lineno}: {node.attr}"
