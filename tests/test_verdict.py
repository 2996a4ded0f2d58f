"""What a run says about itself: the held-out gain with its interval, examples in the prompt, copies, and the advice."""

import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    ROOT,
    TINY,
    arguments,
    checkpoint_steps,
    dialogues,
    planned,
    record,
    run,
)
from transformers import AutoModelForCausalLM

import train_sft_dolores as sft

sft.load_libraries()
CORPUS = str(ROOT / "train.chatml")
# Of Student's t, the 97.5 % quantile by degrees of freedom, from a printed table.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045, 1000: 1.962}


# ---- the interval ----


@pytest.mark.parametrize("freedom", STUDENT)
def test_equal_conversations_give_the_paired_t_interval(freedom):
    before, after = np.random.default_rng(freedom).normal(size=(2, freedom + 1))
    change, half = sft.paired_change(before, after, np.full(freedom + 1, 7))
    assert change == pytest.approx((after - before).mean())
    assert half == pytest.approx(STUDENT[freedom] * (after - before).std(ddof=1) / (freedom + 1) ** 0.5, rel=4e-3)


def test_tokens_weigh_and_one_conversation_has_no_interval():
    assert sft.paired_change(np.array([2.0, 4.0]), np.array([1.0, 5.0]), np.array([30, 10]))[0] == -0.5
    assert sft.paired_change(np.array([2.0]), np.array([1.0]), np.array([30])) == (-1, float("inf"))


@pytest.mark.parametrize("count", [4, 10, 40])
def test_the_interval_covers(count):
    """Conversations of very different lengths, whose change depends on the length: 95 % of the intervals hold the truth."""
    random = np.random.default_rng(0)

    def draw(n: int):
        tokens = random.lognormal(4, 0.8, n).round() + 1
        return tokens, -0.3 + 0.02 * np.log(tokens) + random.normal(0, 1, n) * 3 / tokens**0.5

    tokens, changes = draw(1_000_000)
    truth = (tokens * changes).sum() / tokens.sum()
    covered = 0
    for _ in range(4_000):
        tokens, changes = draw(count)
        change, half = sft.paired_change(np.zeros(count), changes, tokens)
        covered += abs(change - truth) <= half
    assert 0.93 <= covered / 4_000 <= 0.98


# ---- examples in the prompt ----


def test_examples_are_whole_training_conversations(llama31_tokenizer):
    """Up to five behind one BOS; labels are those of the conversation alone, and only long ones have no row."""
    encode = sft.Encoder(llama31_tokenizer, sft.chat_format("dolores", llama31_tokenizer))
    plan = planned(arguments("--train-files", CORPUS), encode)
    rows, examples = sft.prompted_rows(plan)
    samples = plan.train_rows.samples
    trained = [samples[int(i)]["input_ids"].tolist()[1:] for i in np.concatenate(plan.train_rows.plan)]
    held_out = {one["line"]: one for one in (samples[int(i)] for i in np.concatenate(plan.eval_rows.plan))}
    shown = []
    for row in map(rows.__getitem__, range(len(rows))):
        (ids,), (labels,), (line,) = (row[name].tolist() for name in ("input_ids", "labels", "line"))
        own = held_out.pop(line)  # each once
        assert len(ids) <= 2048 and ids[0] == 128000 and 128000 not in ids[1:]
        assert ids[-len(own["input_ids"]) + 1 :] == own["input_ids"].tolist()[1:]
        assert [i for i in labels if i != sft.IGNORE] == [i for i in own["labels"] if i != sft.IGNORE]
        before, found = ids[1 : len(ids) - len(own["input_ids"]) + 1], []
        while before:
            found.append(next(n for n, one in enumerate(trained) if before[: len(one)] == one))
            before = before[len(trained[found[-1]]) :]
        shown.append(found)
    assert len(rows) >= 18 and all(1 <= len(set(found)) == len(found) <= 5 for found in shown)
    assert np.mean([len(found) for found in shown]) == pytest.approx(examples)
    assert len({n for found in shown for n in found}) > 40
    assert all(len(one["input_ids"]) > 1200 for one in held_out.values())  # only they leave no room


def test_at_most_fifty_conversations_are_prompted(tmp_path, monkeypatch, smollm2_tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.chatml").write_text(dialogues(3))
    (tmp_path / "held.chatml").write_text(dialogues(70)[len(dialogues(3)) :])
    encode = sft.Encoder(smollm2_tokenizer, sft.chat_format("dolores", smollm2_tokenizer))
    plan = planned(arguments("--eval-files", "held.chatml"), encode)
    rows, examples = sft.prompted_rows(plan)
    assert (len(rows), examples) == (50, 3)  # no example twice
    assert len({rows[i]["line"][0] for i in range(50)}) == 50
    rows, examples = sft.prompted_rows(plan._replace(args=arguments("--max-length", "70")))
    assert (len(rows), examples) == (0, 0)


# ---- copies ----


def test_copied_runs_of_eight_words():
    trained = ["Un deux, trois quatre cinq six sept huit neuf dix onze.", "a b c d e f g h"]
    for answer, expected in {
        "Il dit : « UN deux trois, quatre cinq six sept huit neuf » et puis": (6, 2, 9),
        "un deux trois quatre cinq six sept": (0, 0, 0),
        "un deux trois quatre cinq six sept 8 neuf": (2, 0, 0),
        "cinq six sept huit neuf dix onze a b c d e f g h": (8, 1, 8),  # no run across two answers
    }.items():
        assert tuple(sft.count_copied([answer], trained).values()) == expected, answer


# ---- a whole run ----


@pytest.fixture(scope="module")
def options(short_smollm2) -> tuple:
    data = ("--eval-files", "held.chatml", "--max-length", "256", "--epochs", "2")
    return ("--model", short_smollm2, "--output", "out", *TINY[:-2], *data)


def write_data(folder: Path) -> Path:
    """Training data for four steps; six held-out conversations, one of them much shorter."""
    (folder / "train.chatml").write_text(dialogues(18))
    held_out = dialogues(23).removeprefix(dialogues(18))
    (folder / "held.chatml").write_text(f"<|user|>\nun ?\n<|assistant|>\nun.\n<|endoftext|>\n{held_out}")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, options):
    """The folder of a run of four steps, and what it printed."""
    folder = write_data(tmp_path_factory.mktemp("finished"))
    code, out = run(folder, *options)
    assert code == 0, out
    return folder, out


def test_losses_are_those_of_transformers_alone(finished, short_smollm2, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(folder)
    results = record(folder)["results"]
    held_out = results["held_out"]
    model = AutoModelForCausalLM.from_pretrained(short_smollm2).float()

    def loss(ids, labels) -> float:
        ids, labels = (torch.tensor(each)[None].long() for each in (ids, labels))
        with torch.no_grad():
            return float(model(input_ids=ids, labels=labels).loss)

    encode = sft.load_encoder("m", str(short_smollm2), "dolores")
    found = {f"{c.file}:{c.line}": c.turns for c in sft.read_conversations(["held.chatml"], "chatml")}
    alone = {place: loss(*encode([found[place]])[0]) for place in held_out["before"]}
    assert held_out["before"] == pytest.approx(alone, abs=1e-4) and len(alone) == 6
    plan = planned(arguments(*TINY, "--max-length", "256", "--eval-files", "held.chatml"), encode)
    rows, examples = sft.prompted_rows(plan)
    prompted = {
        f"held.chatml:{row['line'][0]}": loss(row["input_ids"][0], row["labels"][0])
        for row in map(rows.__getitem__, range(len(rows)))
    }
    assert held_out["prompted"] == pytest.approx(prompted, abs=1e-4) and results["examples"] == examples > 0
    tokens = np.array(list(held_out["tokens"].values()))
    for when in ("before", "after"):
        mean = np.average([held_out[when][place] for place in held_out["tokens"]], weights=tokens)
        assert mean == pytest.approx(results[f"eval_loss_{when}"], abs=1e-4)


def test_screen_card_and_samples_say_the_same(finished):
    folder, out = finished
    said, card = sft.verdict(record(folder)["results"]), (folder / "out/README.md").read_text()
    assert list(said) == ["held out", "examples", "copied"]
    for name, text in said.items():
        assert f"\n{name:<10} {text}\n" in out and f"| {name} | {text} |" in card
    after = record(folder)["results"]["held_out"]["after"]
    (worst,) = re.findall(r"\| learned worst \| (.+) \|", card)
    assert re.findall(r"`(.+?)`", worst) == sorted(after, key=after.get)[:-4:-1]


@pytest.mark.slow
def test_a_resumed_run_says_the_same(finished, options, tmp_path):
    code, out = run(write_data(tmp_path), *options, at=("evaluation_loop", 4, signal.SIGKILL))
    assert code == -signal.SIGKILL and checkpoint_steps(tmp_path) == [2], out
    code, out = run(tmp_path, *options, "--resume")
    assert code == 0, out
    names = ("eval_loss_before", "examples", "held_out", "samples", "copied")
    resumed, whole = (record(folder)["results"] for folder in (tmp_path, finished[0]))
    assert [resumed[name] for name in names] == [whole[name] for name in names]
    assert "in the prompt" not in out.split("resume ")[1].split("step")[0]  # not measured again


@pytest.mark.parametrize("fraction, names", [("0", []), ("0.01", ["held out", "examples"])])
def test_little_or_nothing_held_out(fraction, names, short_smollm2, tmp_path):
    (tmp_path / "train.chatml").write_text(dialogues(8))
    options = (*TINY, "--epochs", "0.1", "--eval-fraction", fraction)
    code, out = run(tmp_path, "--model", short_smollm2, "--output", "out", *options)
    said = sft.verdict(record(tmp_path)["results"])
    assert code == 0 and list(said) == names, out
    assert all("certain" in text for text in said.values())


# ---- the verdict in words ----


def results(before, after, prompted=(), **more) -> dict:
    """Results of conversations of a hundred tokens each."""
    columns = {"tokens": [100] * len(before), "before": before, "prompted": prompted, "after": after}
    return {"held_out": {name: dict(zip("abcdef", column)) for name, column in columns.items()}, **more}  # noqa: B905


def test_verdict_tells_good_from_chance_and_worse():
    learned = sft.verdict(results([2.0, 2.1, 2.2], [1.6, 1.69, 1.81]))["held out"]
    assert learned == "loss 2.100 -> 1.700 (-0.400 ± 0.025, 3 conversations)"
    chance = sft.verdict(results([2.0, 2.1, 2.2], [1.6, 2.3, 2.1]))["held out"]
    assert chance.endswith(", 3 conversations): that may be chance, nothing certain was learned")
    assert sft.verdict(results([2.0, 2.1], [2.5, 2.6]))["held out"].endswith(": worse than before")


def test_verdict_compares_on_the_conversations_that_were_prompted():
    before, after = [2.0, 2.1, 9.0], [1.6, 1.7, 9.0]
    trained = sft.verdict(results(before, after, [1.9, 2.0], examples=5.0))["examples"]
    assert trained == (
        "loss 2.050 alone, 1.950 with 5 examples in the prompt, 1.650 trained: training did better, by 0.300 ± 0.000"
    )
    assert ": examples did better" in sft.verdict(results(before, after, [1.4, 1.5], examples=4.0))["examples"]
    assert ": no certain " in sft.verdict(results(before, after, [1.5, 1.9], examples=4.25))["examples"]


def test_verdict_names_learning_by_heart():
    copied = {"runs": 50, "copied": 2, "longest": 9}
    assert sft.verdict({"copied": copied})["copied"].startswith("4% of the answers' eight-word runs")
    assert "by heart" not in sft.verdict({"copied": copied})["copied"]
    assert sft.verdict({"copied": copied | {"copied": 3}})["copied"].endswith("of 9 words: learned by heart")
    assert sft.verdict({"copied": copied | {"runs": 0}}) == {}


# ---- advice ----

ADVICE = {
    12: "--no-packing --grad-accum 1 --epochs 3 --early-stopping 2",
    50: "--grad-accum 1 --epochs 3 --early-stopping 2 --eval-fraction 0.1",
    200: "--grad-accum 4 --epochs 3 --early-stopping 2",
    1_000: "--grad-accum 8 --epochs 3 --early-stopping 2",
    5_000: "--grad-accum 8 --eval-steps 37",
    20_000: "",
}


def counts(dialogues: int, args) -> dict:
    """What a plan counts, with four dialogues in a row."""
    held_out = min(max(1, round(args.eval_fraction * dialogues)), 500)
    trained = dialogues - held_out
    rows = int(np.ceil(trained / 4)) if args.packing else trained
    steps = -(-rows // args.grad_accum)
    return {"trained_on": trained, "held_out": held_out, "rows": rows, "rows_per_step": args.grad_accum,
            "steps_per_epoch": steps, "steps": int(np.ceil(args.epochs * steps))}  # fmt: skip


@pytest.mark.parametrize("dialogues", ADVICE)
def test_advice_grows_with_the_data(dialogues):
    """And when it is followed, there is nothing more to advise."""
    _, flags = sft.advise(arguments(), 1, counts(dialogues, arguments()))
    assert " ".join(flags) == ADVICE[dialogues]
    followed = arguments(*flags)
    found = counts(dialogues, followed)
    assert found["rows_per_step"] <= 10 or found["steps"] >= 100
    assert sft.advise(followed, 1, found)[1] == []


def test_steps_of_several_processes_are_not_made_smaller_than_a_batch():
    args = arguments("--train-batch-size", "4", "--grad-accum", "8")
    found = counts(1_000, arguments()) | {"rows_per_step": 128, "steps": 2}
    assert sft.advise(args, 4, found)[1][:2] == ["--grad-accum", "1"]
    args = arguments("--train-batch-size", "4", "--grad-accum", "1", "--epochs", "6", "--early-stopping", "2")
    assert sft.advise(args, 4, found | {"rows_per_step": 16, "steps": 96}) == ([], [])


def test_the_rank_alone_does_not_change_the_scale():
    assert [arguments("--lora-r", r).lora_alpha for r in (32, 8)] == [64, 16]
    assert arguments("--lora-r", "8", "--lora-alpha", "64").lora_alpha == 64
    for options in (("--lora-r", "8"), ("--lora-r", "8", "--lora-alpha", "64")):
        assert arguments(*sft.training_flags(arguments(*options))) == arguments(*options)  # the card's command
