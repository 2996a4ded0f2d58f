"""The benchmarks run, at sizes that take seconds, and count correctly. No times are asserted."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, launch

import train_sft_dolores as sft

sft.load_libraries()

sys.path[:0] = [str(ROOT / "benchmarks")]
import flops  # noqa: E402
import learning  # noqa: E402
import llama  # noqa: E402


def benchmark(folder: Path, name: str, *options) -> str:
    """What a benchmark prints; it and the processes that it starts end with the test."""
    process = launch([sys.executable, ROOT / "benchmarks" / name, *options], folder, "printed")
    status, printed = process.wait(400), (folder / "printed").read_text()
    assert status == 0, printed[-3000:]
    return printed


def table(out: str, width: int) -> dict[str, list[str]]:
    """The lines of a table: the first `width` characters as the key, the rest split into words."""
    return {line[:width].strip(): line[width:].split() for line in out.splitlines()}


# ---- flops.py ----

H, F, KV, LAYERS, VOCABULARY, DOCUMENTS = 256, 384, 128, 2, 1000, (40, 100)
SHAPE = llama.LLAMA31_8B | {"hidden_size": H, "intermediate_size": F, "num_hidden_layers": LAYERS,
                            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY}  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    ids = [torch.arange(n).numpy().astype("int32") for n in DOCUMENTS]
    labels = [
        torch.where(torch.arange(n) < n // 2, sft.IGNORE, torch.arange(n)).numpy().astype("int32") for n in DOCUMENTS
    ]
    return sft.collate([{"input_ids": ids, "labels": labels, "file": ["f", "f"], "line": [1, 2]}])


def by_hand(who: str, free: int) -> int:
    tokens, trained = sum(DOCUMENTS), sum(n - n // 2 for n in DOCUMENTS)
    weights = 2 * H * H + 2 * H * KV + 3 * H * F
    lora = 32 * (2 * (H + H) + 2 * (H + KV) + 3 * (H + F))
    # Ours multiplies each token with the earlier ones of its document, the others all with all.
    pairs = sum(n * (n + 1) // 2 for n in DOCUMENTS) if who == "ours" else tokens**2
    forward = 2 * tokens * (weights + lora) + 4 * pairs * H
    backward = 2 * tokens * weights + 4 * tokens * lora + 10 * pairs * H
    head = VOCABULARY * H * {"ours": 4 * trained, flops.TRL: 6 * trained, flops.PLAIN: 4 * tokens}[who]
    # Recomputation stops at the last tensor that is needed: the peers' before the product with down_proj's lora_B.
    again = forward - (0 if who == "ours" else 2 * tokens * 32 * H)
    return LAYERS * (forward + backward) + (LAYERS - free) * again + head


@pytest.mark.parametrize(("who", "free"), [("ours", 0), ("ours", 1), ("ours", 2), (flops.TRL, 0), (flops.PLAIN, 0)])
def test_flops_are_those_counted_by_hand(batch, who, free):
    args, formulas = sft.parse_args([]), flops.attention_on_meta(DOCUMENTS)
    step = flops.our_step(SHAPE, args, batch, free) if who == "ours" else flops.peer_step(SHAPE, args, batch, who)
    assert flops.flops(step[1], formulas) == by_hand(who, free)


def test_bytes_kept_by_a_layer(batch):
    """A checkpointed layer saves its input; a free one what the memory plan says, tensor by tensor."""
    flops.attention_on_meta(DOCUMENTS)
    tokens = sum(DOCUMENTS)
    for dropout in (0, 0.05):
        args = sft.parse_args(["--lora-dropout", str(dropout)])
        make = lambda layers, free, args=args: flops.our_step(SHAPE | {"num_hidden_layers": layers}, args, batch, free)  # noqa: E731
        checkpointed, free = flops.kept_by_layer(make, tokens)
        assert checkpointed == 2 * H
        kept = 2 * (2 * H + 2 * H + 2 * KV + 2 * F + 7 * 32) + 4 * 2
        rope, adapters = 2 * 2 * 128, 2 * 32 * (2 * (H + H) + 2 * (H + KV) + 3 * (H + F))  # once, in bfloat16
        assert free == pytest.approx(kept + rope + adapters / tokens, abs=1)


def test_flops_table(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["flops.py", "--layers", "2", "--hidden", "256", "--intermediate", "512", "--length", "256"]
    )
    flops.main()
    rows = {name: words for name, words in table(capsys.readouterr().out, 44).items() if "of" in words[1:4]}
    assert list(rows)[:2] == [flops.PLAIN, flops.TRL] and len(rows) == 6
    gflop = [float(words[0]) for words in rows.values()]
    assert gflop[0] > gflop[2] >= gflop[3] >= gflop[4] > 0


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

    options = gpu.parse_args(["--tiny"])
    results = {name: gpu.train(name, tmp_path, options) for name in options.variants}
    assert list(results) == [name for name in gpu.VARIANTS if "compiled" not in name]
    losses = {name: result["losses"][0] for name, result in results.items()}
    assert max(losses.values()) - min(losses.values()) < 0.005, losses
    uncheckpointed = {name: result["free"] for name, result in results.items()}
    assert uncheckpointed["plain Trainer"] == uncheckpointed["TRL"] == 0
    assert uncheckpointed["ours, all layers checkpointed"] == 0 and uncheckpointed["ours"] == 2
    longest = sides.random_rows(2, 64, 100).longest()  # the memory probe on a GPU needs it
    assert sum(map(len, longest["input_ids"])) > 60


@pytest.mark.slow
def test_gpu_prints_a_line_for_each_variant(tmp_path):
    """The whole program, with one variant in a process of its own."""
    out = benchmark(tmp_path, "gpu.py", "--tiny", "--optim", "adamw_torch", "--variants", "ours")
    (words,) = [words for name, words in table(out, 31).items() if name == "ours"]
    assert " ".join(words[4:7]) == "0 of 2" and float(words[-1]) > 0, out


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda script: script.stem)
def test_benchmarks_call_what_exists(script):
    """Not every benchmark is run here; the trainer's functions that it names exist."""
    tree = ast.parse(script.read_text())
    imports = [name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    aliases = {name.asname or name.name for name in imports if name.name == "train_sft_dolores"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            assert hasattr(sft, node.attr), f"{script.name}:{node.lineno}: {node.attr}"
