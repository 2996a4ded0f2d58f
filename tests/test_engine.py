"""A merged folder in llama.cpp: converted by its converter, run by its engine, compared token by token with transformers."""

from pathlib import Path

import pytest
from engine import (
    answers_of_llama_cpp,
    answers_of_transformers,
    gap_at_first_difference,
    random_adapter,
    to_gguf,
)
from transformers import AutoTokenizer

import merge_lora

pytestmark = pytest.mark.slow

LENGTH = 24  # maximum tokens of an answer
QUESTIONS = [
    "What is the capital of France?", "Name three colours.", "Say hello.", "What is 2 + 2?", "Who wrote Hamlet?",
    "What do bees make?", "Is the sky blue?", "Name a fruit.", "What is the opposite of hot?", "Count to five.",
    "Quelle est la capitale de l'Italie ?", "Dis bonjour.", "Nomme un animal.", "What is water made of?",
    "How many days are in a week?", "What colour is grass?", "Name a planet.", "Who painted the Mona Lisa?",
    "What is the largest ocean?", "Translate 'chat' into English.",
]  # fmt: skip


@pytest.fixture(scope="module")
def merged(smollm2, tmp_path_factory) -> Path:
    """SmolLM2 changed slightly by an adapter, in its own chat format: it still answers, and stops."""
    folder = tmp_path_factory.mktemp("engine")
    adapter = random_adapter(smollm2, folder / "adapter", "chatml", scale=0.02)
    merge_lora.main(["--adapter", str(adapter), "--output", str(folder / "merged")])
    return folder / "merged"


@pytest.fixture(scope="module")
def gguf(merged) -> Path:
    return to_gguf(merged, merged.parent / "merged-f16.gguf")


@pytest.fixture(scope="module")
def prompts(merged) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(merged)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids for chat in chats]


def test_the_converter_reads_the_settings_of_the_base(gguf, merged):
    """RoPE, context, end token and vocabulary are right: a lost theta or end token raises no error anywhere."""
    from gguf import GGUFReader

    fields = {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.rope.freq_base"] == 100000.0
    assert fields["llama.context_length"] == 8192
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.pre"] == "smollm"  # with a changed tokenizer.json, a default
    assert len(fields["tokenizer.ggml.tokens"]) == 49152
    assert fields["tokenizer.chat_template"] == (merged / "chat_template.jinja").read_text()


def test_the_converter_reads_rope_scaling_and_end_of_turn_of_llama31(tiny_llama31, tmp_path):
    from gguf import GGUFReader

    adapter = random_adapter(tiny_llama31, tmp_path / "adapter")
    merge_lora.main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    reader = GGUFReader(to_gguf(tmp_path / "merged", tmp_path / "merged.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.rope.freq_base"] == 500000.0
    assert fields["tokenizer.ggml.pre"] == "llama-bpe"
    assert fields["tokenizer.ggml.bos_token_id"] == 128000 and fields["tokenizer.ggml.eos_token_id"] == 128009
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    # Llama 3.1's RoPE scaling: the highest frequency is unchanged, the lowest divided by 8.
    assert factors[0] == 1.0 and factors[-1] == 8.0


@pytest.fixture(scope="module")
def ours(merged, prompts) -> list[list[int]]:
    return answers_of_transformers(merged, prompts, LENGTH)


def gaps_to_llama_cpp(folder: Path, gguf: Path, prompts, ours) -> list[float]:
    """One number for each answer of llama.cpp that differs from that of transformers: the gap at the first difference."""
    theirs = answers_of_llama_cpp(gguf, prompts, LENGTH)
    ended = [ids for ids, reason in theirs if reason == "stop"]
    assert len(ended) >= 5 and all(ids[-1] == 2 for ids in ended)  # most short answers stop with the end token
    answers = zip(prompts, ours, theirs, strict=True)
    return [gap_at_first_difference(folder, prompt, mine, its) for prompt, mine, (its, _) in answers if mine != its]


def test_llama_cpp_answers_like_transformers(merged, gguf, prompts, ours):
    gaps = gaps_to_llama_cpp(merged, gguf, prompts, ours)
    # Allowed: a near tie between two tokens that float16 weights decide the other way.
    assert len(gaps) <= 2 and all(gap < 0.05 for gap in gaps)


def test_answers_quantised_to_q8_0_differ_only_where_two_tokens_are_close(merged, prompts, ours):
    gaps = gaps_to_llama_cpp(merged, to_gguf(merged, merged.parent / "merged-q8_0.gguf", "q8_0"), prompts, ours)
    # Three adapters: 9 or 10 answers differ, by at most 0.54. Without the adapter: 13, by 1.13. Without RoPE's theta: 18, by 1.10.
    assert len(gaps) <= 12 and all(gap < 0.8 for gap in gaps)
