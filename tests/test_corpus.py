"""train.chatml has the properties that the README promises, and that a careless edit would break."""

import re
from collections import Counter

import pytest
from runs import ROOT, arguments, planned

import train_sft_dolores as sft

CORPUS = str(ROOT / "train.chatml")
TEXT = (ROOT / "train.chatml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def conversations():
    return list(sft.read_conversations([CORPUS], "chatml"))


@pytest.fixture(scope="module")
def answers(conversations):
    return [turn.content for conversation in conversations for turn in conversation.turns if turn.role == "assistant"]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_it_parses_without_a_warning():
    assert sft.read_data(sft.find_files([CORPUS]), arguments())[1] == []


def test_size(conversations, llama31_tokenizer):
    """At least 300 conversations, 120 of them with 3 to 8 exchanges, 90,000 tokens; both READMEs say how many."""
    exchanges = [sum(turn.role == "assistant" for turn in c.turns) for c in conversations]
    encode = sft.Encoder(llama31_tokenizer, sft.chat_format("dolores", llama31_tokenizer))
    tokens = sum(len(ids) for ids, _ in encode([c.turns for c in conversations]))
    assert len(conversations) >= 300 and sum(3 <= n <= 8 for n in exchanges) >= 120 and tokens >= 90_000
    claim = re.search(r"whose (\d+) conversations are shipped here", (ROOT / "README.md").read_text())
    assert int(claim[1]) == len(conversations)
    claim = re.search(
        r"aux (\d+) conversations fournies ici : environ ([\d ]+) tokens", (ROOT / "README.fr.md").read_text()
    )
    assert int(claim[1]) == len(conversations)
    assert abs(int(claim[2].replace(" ", "")) - tokens) < 0.01 * tokens


def test_the_readme_trains_her_as_the_dry_run_advises(llama31_tokenizer):
    encode = sft.Encoder(llama31_tokenizer, sft.chat_format("dolores", llama31_tokenizer))
    flags = planned(arguments("--train-files", CORPUS), encode).advised
    (shown,) = re.findall(r"^python3 train_sft_dolores.py (--epochs .+)\n", (ROOT / "README.md").read_text(), re.M)
    assert arguments(*shown.split()) == arguments(*flags)


def test_lengths_are_spread(answers):
    lengths = sorted(len(answer.split()) for answer in answers)
    assert lengths[0] <= 5 and lengths[len(lengths) // 5] <= 30 and 350 <= lengths[-1] <= 600
    assert sum(length >= 350 for length in lengths) >= 15


def test_system_turns(conversations):
    systems = Counter(c.turns[0].content for c in conversations if c.turns[0].role == "system")
    assert 0.4 < systems.total() / len(conversations) < 0.6 and len(systems) >= 20


def test_openings(answers):
    """No more than two answers begin with the same six words."""
    openings = Counter(" ".join(answer.lower().split()[:6]) for answer in answers)
    assert {opening: n for opening, n in openings.items() if n > 2} == {}


def test_no_near_duplicates(conversations):
    """Near duplicates: two turns of 15 words or more whose sets of three-word sequences overlap by more than half (Jaccard)."""
    turns = [words(turn.content) for c in conversations for turn in c.turns if len(words(turn.content)) >= 15]
    grams = [{tuple(turn[i : i + 3]) for i in range(len(turn) - 2)} for turn in turns]
    places = {}
    for number, three in enumerate(grams):
        for gram in three:
            places.setdefault(gram, []).append(number)
    shared = Counter(
        (a, b) for found in places.values() if len(found) < 50 for i, a in enumerate(found) for b in found[i + 1 :]
    )
    near = [(" ".join(turns[a][:12]), n) for (a, b), n in shared.items() if n / len(grams[a] | grams[b]) > 0.5]
    assert near == []


def test_typography():
    """Straight apostrophes, « … » with ordinary spaces, the character …; no wrongly decoded or invisible characters."""
    for number, line in enumerate(TEXT.split("\n"), 1):
        assert not re.search("[\u00a0\u202f\u2018\u2019\u201c\u201d\u200b-\u200f\u2028-\u202e\u00ad\ufeff]", line), (
            number
        )
        assert not sft.MOJIBAKE.search(line), number
        assert not re.search(r"«\S|\S»|\w\s?,,|\s,\s", line.replace("»,", "»").replace("« »", "")), (number, line)
        if "`" not in line:
            assert "..." not in line, number


def test_it_shows_every_rule_of_the_format():
    for rule in (r"^<\|user\|>\n", r"^<\|user\|> \S", r"^<\|im_start\|>system\n", r"<\|im_end\|>$", r"^<\|endoftext\|>\n<\|user\|>",
                 r"^\\<\|user\|>", r"^\\\\<\|user\|>"):  # fmt: skip
        assert re.search(rule, TEXT, re.M), rule


def test_vocabulary_grows_like_prose(answers):
    """Heaps' law, V = k n^b: b is 0.6 to 0.8 for the prose of one author, and far lower for generated templates."""
    import numpy as np

    spoken = [word for answer in answers for word in words(answer)]
    seen, sizes = set(), []
    for word in spoken:
        seen.add(word)
        sizes.append(len(seen))
    n = np.logspace(3, np.log10(len(spoken)), 20).astype(int)
    b = np.polyfit(np.log(n), np.log([sizes[i - 1] for i in n]), 1)[0]
    assert 0.6 < b < 0.85 and len(seen) / len(spoken) > 0.1
