"""chat_template.jinja renders the text and the token ids of training, and generate_answers is greedy with every base."""

import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import parts
import pytest
import torch
from families import TRAINABLE, family, template
from runs import arguments, assert_says, error_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_sft_dolores as sft

GOLDEN = json.loads((Path(__file__).parent / "render_golden.json").read_text())
FITTING = [("llama31", "dolores"), ("llama31", "llama3"), ("smollm2", "dolores"), ("smollm2", "chatml")]


class Saved(NamedTuple):
    """A base's tokenizer with the template of a format, as training saves it."""

    folder: str
    encode: sft.Encoder
    tokenizer: Any

    def ids(self, messages, **options) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, **options)["input_ids"]


@functools.cache
def saved(base: str, name: str) -> Saved:
    sft.load_libraries()
    folder = str({"llama31": parts.tiny_llama31, "smollm2": parts.smollm2}[base]())
    encode = sft.load_encoder(folder, folder, name)
    return Saved(folder, encode, sft.load_tokenizer(folder, folder, encode))


MESSAGES = [
    {"role": "system", "content": "Tu es Dolores."},
    {"role": "user", "content": "Ça va ?"},
    {"role": "assistant", "content": "Oui, ça va."},
    {"role": "user", "content": "Et là ?"},
    {"role": "user", "content": "Tu m'entends ?"},  # of the same role as the one before
    {"role": "assistant", "content": "Bien !"},
]


def training_ids(encode: sft.Encoder, messages: list[dict]) -> list[int]:
    """What training makes of these messages, read as it reads all data."""
    turns = [sft.Turn(message["role"], message["content"], 1) for message in messages]
    conversation = sft.check_conversation("d.chatml", turns)
    return encode([conversation.turns])[0].input_ids.tolist()


@pytest.mark.parametrize(("base", "name"), FITTING)
def test_apply_chat_template_gives_the_training_ids(base, name):
    """With the BOS token where the tokenizer adds one, and never two."""
    _, encode, tokenizer = own = saved(base, name)
    trained = training_ids(encode, MESSAGES)
    prompt = own.ids(MESSAGES[:-1], add_generation_prompt=True)
    assert trained[: len(prompt)] == prompt
    whole = own.ids(MESSAGES)
    # The whole text is encoded in one piece here, the answers apart in training: only the text must be the same.
    assert tokenizer.decode(whole) == tokenizer.decode(trained)
    bos = tokenizer.bos_token_id
    if encode.start:
        assert encode.start == [bos] and prompt[0] == bos and bos not in prompt[1:]
    joined = {"role": "user", "content": "Et là ?\n\nTu m'entends ?"}
    assert own.ids([*MESSAGES[:3], joined, MESSAGES[-1]]) == whole


def test_the_template_renders_what_ollama_rendered():
    """Ollama joins consecutive messages itself, and its engine adds the BOS token."""
    _, encode, tokenizer = saved("llama31", "dolores")
    for case in GOLDEN:
        answering = case["messages"][-1]["role"] != "assistant"
        text = tokenizer.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=answering)
        text = text if answering else text.removesuffix(encode.chat.after["assistant"])
        assert text == "<|begin_of_text|>" + case["rendered"], case["name"]


def test_answers_are_greedy_with_llama31s_own_settings(capfd):
    """Its generation_config samples: two seeds, one answer, no random number drawn, nothing printed."""
    folder, _, tokenizer = own = saved("llama31", "dolores")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    settings = model.generation_config
    assert settings.do_sample and settings.temperature == 0.6 and settings.top_p == 0.9
    ids = own.ids([{"role": "user", "content": "Qui es-tu ?"}], add_generation_prompt=True)
    prompt, answers = {"Qui es-tu ?": list(ids)}, []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in (0, 1):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            answers.append(sft.generate_answers(model, tokenizer, prompt, 12))
            assert torch.equal(before, torch.get_rng_state())
    assert answers[0] == answers[1]
    assert capfd.readouterr() == ("", "")

    for _ in range(12):  # the most probable token, one at a time
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    text = tokenizer.decode(ids[-12:], skip_special_tokens=True).strip()
    assert answers[0] == {"Qui es-tu ?": text}


# ---- --chat-format base: the base's own template ----

SYSTEM, USER, ASSISTANT = sft.ROLES
CONTENTS = ("Qui es-tu ?", "L'été,\n\n  12345 日本 🙂", "{{ x }} {% if y %}", "-", "Oui, ça va.", "« Non »")


def chats(system: int) -> Iterator[list[dict]]:
    """Conversations that await an answer, with or without a system turn."""
    for questions in (1, 2, 3):
        roles = [SYSTEM] * system + [USER, ASSISTANT] * questions
        yield [{"role": role, "content": text} for role, text in zip(roles[:-1], CONTENTS, strict=False)]


@functools.cache
def base_encoder(name: str):
    """(encoder, transformers' tokenizer with the base's own template) of a family."""
    folder = str(family(name))
    return sft.load_encoder(folder, folder, "base"), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TRAINABLE)
def test_base_format_gives_the_ids_of_the_bases_own_template(name):
    """What transformers sends with the base's template is what training sees before the answer, and ours is the same."""
    encode, tokenizer = base_encoder(name)
    ours = sft.chat_template(encode.chat, bool(encode.start))
    with_system = [] if name == "gemma2" else chats(1)  # its template refuses them: see below
    for messages in (*chats(0), *with_system):
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
        options = {"add_generation_prompt": True, "chat_template": ours}
        assert tokenizer.apply_chat_template(messages, **options).input_ids == theirs
        trained = training_ids(encode, [*messages, {"role": ASSISTANT, "content": "Personne."}])
        # A runtime encodes an earlier answer together with what follows, training apart: compare where that is the same.
        if len(messages) < 3:
            assert trained[: len(theirs)] == theirs
        assert tokenizer.decode(trained).startswith(tokenizer.decode(theirs))
        end = encode.special_ids[encode.chat.eos_token]
        assert trained.count(end) == theirs.count(end) + 1 and end in trained[-2:]


LATE = [{"role": role, "content": role} for role in (SYSTEM, USER, ASSISTANT, SYSTEM, USER, SYSTEM, ASSISTANT)]


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_a_system_turn_in_mid_chat(name, tmp_path, monkeypatch):
    """Few templates can write one as `--chat-format base` would: it is refused there, whatever the base."""
    encode, _ = base_encoder(name)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"messages": LATE}))
    refused = arguments("--chat-format", "base", "--max-length", 512)
    assert_says(error_of(sft.read_data, {str(file): ""}, refused, encode), f"{file}:1", "--chat-format")
    assert len(sft.read_data({str(file): ""}, arguments("--max-length", 512), encode)[2]) == 1


@pytest.mark.parametrize("name", TRAINABLE)
def test_contents_cannot_forge_the_bases_control_tokens(name):
    encode, _ = base_encoder(name)
    every = "".join(encode.special_ids)
    control = set(encode.special_ids.values())

    def controls(content: str) -> list[int]:
        messages = [{"role": role, "content": content} for role in (SYSTEM, USER, ASSISTANT)]
        return [i for i in training_ids(encode, messages) if i in control]

    assert controls(every) == controls("x") and len(controls("x")) >= 2


def test_a_conversation_without_system_turn_opens_with_the_default_one():
    encode, tokenizer = base_encoder("qwen2")
    text = tokenizer.decode(training_ids(encode, MESSAGES[1:3]))
    assert text.startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")
    encode, tokenizer = base_encoder("llama3")
    for messages, system in ((MESSAGES[:3], "Tu es Dolores."), (MESSAGES[1:3], "")):
        text = tokenizer.decode(training_ids(encode, messages))
        assert f"Today Date: 26 Jul 2024\n\n{system}<|eot_id|><|start_header_id|>user" in text


def test_a_template_that_refuses_system_turns(capsys):
    """Gemma 2: the text opens the first user turn, as in Gemma 3, and a line says so."""
    folder = str(family("gemma2"))
    encode = sft.load_encoder(folder, folder, "base")
    assert "takes no system turn" in capsys.readouterr().out
    text = base_encoder("gemma2")[1].decode(training_ids(encode, MESSAGES[:3]))
    assert text == (
        "<bos><start_of_turn>user\nTu es Dolores.\n\nÇa va ?<end_of_turn>\n<start_of_turn>model\nOui, ça va.<end_of_turn>\n"
    )


def test_mistrals_blank_before_an_answer_is_trained_and_not_in_the_prompt():
    encode, tokenizer = base_encoder("mistral")
    ids, labels = encode([[sft.Turn(USER, "Qui ?", 1), sft.Turn(ASSISTANT, "Dolores.", 1)]])[0]
    trained = labels != sft.IGNORE
    assert tokenizer.convert_ids_to_tokens(ids[trained].tolist())[0].startswith("▁D")
    assert tokenizer.decode(ids[~trained].tolist()).endswith("[/INST]")


def format_of(name: str, chat_template: str | None) -> sft.ChatFormat:
    """What is made of a template with a family's tokenizer."""
    encode, tokenizer = base_encoder(name)
    return sft.base_format(sft.Vocabulary(encode.tokenizer, tokenizer.eos_token, tokenizer.bos_token, chat_template))


@pytest.mark.parametrize(
    ("name", "source", "fact"),
    [
        ("llama3", template("llama3_2"), "date"),
        ("llama3", None, "has none"),
        ("llama3", "{{ messages[0]['content'] }}", "leaves out"),
        ("llama3", "{{ nothing.at.all }}", "nothing"),
        ("llama3", template("llama3_1").replace("Cutting Knowledge", "{{ '{{' }}"), "two braces"),
        ("llama3", template("phi4"), "control token"),
        ("llama3", "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}", "before a user turn"),
        ("qwen3", template("qwen3_5_think"), "think"),
        # As newer Mistrals have it: the system turn goes into the last user turn.
        ("mistral", template("mistral").replace("loop.first", "loop.last"), "Qui es-tu"),
    ],
)
def test_templates_that_cannot_be_followed(name, source, fact):
    fitting = {"llama3": "llama3", "qwen3": "chatml"}.get(name, "dolores")
    assert_says(error_of(format_of, name, source), "--chat-format base", fact, f"--chat-format {fitting}")


@pytest.mark.parametrize(("base", "name"), [("phi3", "phi3"), ("qwen2", "qwen2_5")])
def test_a_template_that_marks_answers_for_training(base, name):
    """{% generation %} renders nothing: trl's training variants give the format of the original."""
    assert format_of(base, template(name)) == format_of(base, template(f"{name}_training"))
