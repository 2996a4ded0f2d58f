"""train.chatml has the properties that the README promises, and that a careless edit would break."""

import re
from collections import Counter, defaultdict
from itertools import combinations

import pytest
from runs import ROOT, arguments, planned

import train_sft_dolores as sft

CORPUS = str(ROOT / "train.chatml")
TEXT = (ROOT / "train.chatml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def conversations():
    return list(sft.read_conversations([CORPUS], "chatml"))


@pytest.fixture(scope="module")
def encode(llama31_tokenizer):
    return sft.Encoder(llama31_tokenizer, sft.chat_format("dolores", llama31_tokenizer))


def answers_of(conversations) -> list[str]:
    return [turn.content for conversation in conversations for turn in conversation.turns if turn.role == "assistant"]


def test_it_parses_without_a_warning():
    assert sft.read_data(sft.find_files([CORPUS]), arguments())[1] == []


def test_size(conversations, encode):
    """At least 300 conversations, 120 of them with 3 to 8 exchanges, 90,000 tokens; both READMEs say how many."""
    exchanges = [len(answers_of([conversation])) for conversation in conversations]
    tokens = sum(len(ids) for ids, _ in encode([c.turns for c in conversations]))
    assert len(conversations) >= 300 and sum(3 <= n <= 8 for n in exchanges) >= 120 and tokens >= 90_000
    english, french = ((ROOT / name).read_text() for name in ("README.md", "README.fr.md"))
    assert f"whose {len(conversations)} conversations are shipped here" in english
    claim = re.search(r"aux (\d+) conversations fournies ici : environ ([\d ]+) tokens", french)
    assert int(claim[1]) == len(conversations)
    assert abs(int(claim[2].replace(" ", "")) - tokens) < 0.01 * tokens


def test_the_readme_trains_her_as_the_dry_run_advises(encode):
    flags = planned(arguments("--train-files", CORPUS), encode).advised
    (shown,) = re.findall(r"^python3 train_sft_dolores.py (--epochs .+)\n", (ROOT / "README.md").read_text(), re.M)
    assert arguments(*shown.split()) == arguments(*flags)


def test_variety(conversations):
    """Short and long answers, with and without system turns; no more than two answers begin with the same six words."""
    answers = answers_of(conversations)
    lengths = sorted(len(answer.split()) for answer in answers)
    assert lengths[0] <= 5 and lengths[len(lengths) // 5] <= 30 and 350 <= lengths[-1] <= 600
    assert sum(length >= 350 for length in lengths) >= 15
    systems = Counter(c.turns[0].content for c in conversations if c.turns[0].role == "system")
    assert 0.4 < systems.total() / len(conversations) < 0.6 and len(systems) >= 20
    openings = Counter(" ".join(answer.lower().split()[:6]) for answer in answers)
    assert {opening: n for opening, n in openings.items() if n > 2} == {}


def test_no_near_duplicates(conversations):
    """No two turns of 15 words or more share more than half of their three-word sequences (Jaccard)."""
    turns = [re.findall(r"\w+", turn.content.lower()) for c in conversations for turn in c.turns]
    grams = [set(zip(turn, turn[1:], turn[2:], strict=False)) for turn in turns if len(turn) >= 15]
    places = defaultdict(list)
    for number, three in enumerate(grams):
        for gram in three:
            places[gram].append(number)
    shared = Counter(pair for found in places.values() if len(found) < 50 for pair in combinations(found, 2))
    assert [grams[a] & grams[b] for (a, b), n in shared.items() if n / len(grams[a] | grams[b]) > 0.5] == []


def test_typography():
    """Straight apostrophes, « … » with ordinary spaces, the character …; no wrongly decoded or invisible characters."""
    for number, line in enumerate(TEXT.split("\n"), 1):
        assert not re.search("[\u00a0\u202f\u2018\u2019\u201c\u201d\u00ad]", line), number
        assert all(sft.VISIBLE.match(c) or c.isspace() for c in line), number
        assert not sft.MOJIBAKE.search(line), number
        assert not re.search(r"«\S|\S»|\w\s?,,|\s,\s", line.replace("»,", "»").replace("« »", "")), (number, line)
        if "`" not in line:
            assert "..." not in line, number


def test_it_shows_every_rule_of_the_format():
    for rule in (r"^<\|user\|>\n", r"^<\|user\|> \S", r"^<\|im_start\|>system\n", r"<\|im_end\|>$", r"^<\|endoftext\|>\n<\|user\|>",
                 r"^\\<\|user\|>", r"^\\\\<\|user\|>"):  # fmt: skip
        assert re.search(rule, TEXT, re.M), rule
