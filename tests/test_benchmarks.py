"""The benchmarks run, at sizes that take seconds, and count correctly. No times are asserted."""

import ast
import re
import sys
from pathlib import Path

import pytest
from runs import ROOT, launch

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


def test_each_setting_differs_from_its_center_in_one_thing():
    settings = learning.variations()
    assert len(set(settings)) == len(settings)
    for wanted in settings:
        (center,) = [center for center in learning.CENTERS if center.size == wanted.size]
        assert sum(a != b for a, b in zip(wanted, center, strict=True)) == (wanted != center)


def test_interval_of_three_seeds():
    assert learning.interval([1, 2, 3]) == "2.000 ± 2.484"  # t = 4.303, standard error 1 / sqrt(3)


@pytest.mark.slow
def test_learning_runs_and_prints_a_table(tmp_path, tiny_llama31):
    options = ("--most", 1, "--base", tiny_llama31, "--precision=--no-bf16", "--folder", tmp_path / "runs")
    out = benchmark(tmp_path, "learning.py", *options)
    assert out.count("-seed") == 3 and re.search(r"^\| center: 50-.* ± ", out, re.M), out
    assert "center: 50-" in benchmark(tmp_path, "learning.py", "--table", "--folder", tmp_path / "runs")


# ---- export.py, merge.py ----


@pytest.mark.slow
def test_export_compares_with_llama_cpps_tools(tmp_path, short_smollm2):
    out = benchmark(
        tmp_path, "export.py", "--base", short_smollm2, "--dialogues", 4, "--gguf", "BF16", "Q8_0", "Q4_K_M"
    )
    rows = table(out, 28)
    losses = [float(rows[kind][0]) for kind in ("merged, transformers", "BF16", "Q8_0")]
    assert max(losses) - min(losses) < 0.05
    for kind in ("BF16", "Q8_0", "Q4_K_M"):
        ours, theirs, equal, _, of = rows[kind][:5]
        assert ours == theirs and equal == of, out


@pytest.mark.slow
def test_merge_measures_copy_merge_and_gguf(tmp_path, monkeypatch, capsys):
    """At the real width of a layer, with a small vocabulary: no rest between the runs, no PEFT snippet."""
    import merge

    monkeypatch.setattr(merge, "REST", 0)
    monkeypatch.setitem(merge.SHAPE, "hidden_size", 512)
    merge.compare(tmp_path, 1, 1)
    merge.ggufs(tmp_path, ["Q8_0", "Q6_K"])
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["merge_lora.py"] * 2 + ["Q8_0", "Q6_K"], out


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
def test_fake_cuda_prints_a_table(tmp_path):
    out = benchmark(tmp_path, "fake_cuda.py", "--layers", 2)
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith(("| NF4", "| bf16"))]
    assert len(rows) == 10 and {len(row) for row in rows} == {10}
    recomputed, gflop = [row[4].split()[0] for row in rows[:3]], [float(row[5]) for row in rows[:3]]
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
