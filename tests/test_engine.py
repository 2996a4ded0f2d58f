"""The GGUF that a merge writes, run by llama.cpp and compared token by token with transformers."""

from pathlib import Path

import pytest
from engine import answers_of_llama_cpp, answers_of_transformers, fields, gap_at_first_difference, random_adapter
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
def adapter(smollm2, tmp_path_factory) -> Path:
    """SmolLM2 changed slightly by an adapter, in its own chat format: it still answers, and stops."""
    return random_adapter(smollm2, tmp_path_factory.mktemp("engine") / "adapter", "chatml", scale=0.02)


def merge(adapter: Path, output: Path, *options: str) -> Path:
    merge_lora.main(["--adapter", str(adapter), "--output", str(output), *options])
    return output


@pytest.fixture(scope="module")
def merged(adapter) -> Path:
    return merge(adapter, adapter.parent / "merged", "--gguf", "BF16")


@pytest.fixture(scope="module")
def prompts(merged) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(merged)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids for chat in chats]


def test_the_file_has_the_settings_of_the_base(merged):
    """RoPE, context, end token and vocabulary are right: a lost theta or end token raises no error anywhere."""
    keys = fields(merged / "dolores-v5-BF16.gguf")
    assert keys["general.architecture"] == "llama" and keys["general.name"] == "dolores-v5"
    assert keys["llama.rope.freq_base"] == 100000.0
    assert keys["llama.context_length"] == 8192
    assert keys["tokenizer.ggml.eos_token_id"] == 2 and not keys["tokenizer.ggml.add_bos_token"]
    assert keys["tokenizer.ggml.pre"] == "smollm"  # with a changed tokenizer.json, a default
    assert len(keys["tokenizer.ggml.tokens"]) == 49152
    assert keys["tokenizer.chat_template"] == (merged / "chat_template.jinja").read_text()
    assert "tool" not in keys["tokenizer.chat_template"]  # else Ollama might prefer it to the Modelfile's


def test_the_file_has_llama31s_rope_scaling_and_end_of_turn(tiny_llama31, tmp_path):
    from gguf import GGUFReader

    file = merge(random_adapter(tiny_llama31, tmp_path / "adapter"), tmp_path / "merged") / "dolores-v5-Q8_0.gguf"
    keys = fields(file)
    assert keys["llama.rope.freq_base"] == 500000.0
    assert keys["tokenizer.ggml.pre"] == "llama-bpe" and keys["tokenizer.ggml.add_bos_token"]
    assert keys["tokenizer.ggml.bos_token_id"] == 128000 and keys["tokenizer.ggml.eos_token_id"] == 128009
    factors = next(tensor.data for tensor in GGUFReader(file).tensors if tensor.name == "rope_freqs.weight")
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


def test_llama_cpp_answers_like_transformers(merged, prompts, ours):
    gaps = gaps_to_llama_cpp(merged, merged / "dolores-v5-BF16.gguf", prompts, ours)
    # Allowed: near ties. llama.cpp rounds activations to bfloat16 too, where the weights are.
    assert len(gaps) <= 4 and all(gap < 0.05 for gap in gaps)


def test_answers_of_q8_0_differ_only_where_two_tokens_are_close(adapter, merged, prompts, ours):
    gguf = merge(adapter, adapter.parent / "q8_0", "--gguf-only") / "dolores-v5-Q8_0.gguf"
    gaps = gaps_to_llama_cpp(merged, gguf, prompts, ours)
    # Three adapters: 9 or 10 answers differ, by at most 0.54. Without the adapter: 13, by 1.13. Without RoPE's theta: 18, by 1.10.
    assert len(gaps) <= 12 and all(gap < 0.8 for gap in gaps)
