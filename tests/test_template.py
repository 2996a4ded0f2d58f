"""chat_template.jinja renders the text and the token ids of training, and generate_answers is greedy with every base."""

import json
import warnings
from pathlib import Path

import parts
import pytest
import torch
from transformers import AutoModelForCausalLM

import train_sft_dolores as sft

GOLDEN = json.loads((Path(__file__).parent / "render_golden.json").read_text())
FITTING = [("llama31", "dolores"), ("llama31", "llama3"), ("smollm2", "dolores"), ("smollm2", "chatml")]


class Setup:
    """A base's tokenizer with the template of a format, as training saves it."""

    def __init__(self, base: str, name: str):
        sft.load_libraries()
        self.folder = str({"llama31": parts.tiny_llama31, "smollm2": parts.smollm2}[base]())
        self.encode = sft.load_encoder(self.folder, self.folder, name)
        self.tokenizer = sft.load_tokenizer(self.folder, self.folder)
        self.tokenizer.chat_template = sft.chat_template(self.encode.chat, bool(self.encode.start))

    def ids(self, messages, **options) -> list[int]:
        options = {"tokenize": True, "return_dict": True, **options}
        return self.tokenizer.apply_chat_template(messages, **options)["input_ids"]


@pytest.fixture(scope="module", params=FITTING, ids="-".join)
def setup(request) -> Setup:
    return Setup(*request.param)


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
    conversation = sft.build_conversation(turns, "d.chatml", lambda *_: None)
    return encode([conversation.turns])[0].input_ids.tolist()


def test_apply_chat_template_gives_the_training_ids(setup):
    """With the BOS token where the tokenizer adds one, and never two."""
    trained = training_ids(setup.encode, MESSAGES)
    prompt = setup.ids(MESSAGES[:-1], add_generation_prompt=True)
    assert trained[: len(prompt)] == prompt
    whole = setup.ids(MESSAGES)
    # The whole text is encoded in one piece here, the answers apart in training: only the text must be the same.
    assert setup.tokenizer.decode(whole) == setup.tokenizer.decode(trained)
    bos = setup.tokenizer.bos_token_id
    if setup.encode.start:
        assert setup.encode.start == [bos] and prompt[0] == bos and bos not in prompt[1:]
    else:
        assert setup.tokenizer.bos_token == "<|im_start|>"
        assert prompt.count(bos) == (5 if "im_start" in setup.encode.chat.before["user"] else 0)  # one for each turn


def test_consecutive_messages_of_one_role_are_one_turn(setup):
    assert setup.ids(MESSAGES) == setup.ids(
        [*MESSAGES[:3], {"role": "user", "content": "Et là ?\n\nTu m'entends ?"}, MESSAGES[-1]]
    )


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_the_template_renders_what_ollama_rendered(case):
    """Ollama joins consecutive messages itself, and its engine adds the BOS token."""
    setup = Setup("llama31", "dolores")
    answering = case["messages"][-1]["role"] != "assistant"
    text = setup.tokenizer.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=answering)
    text = text if answering else text.removesuffix(setup.encode.chat.after["assistant"])
    assert text == "<|begin_of_text|>" + case["rendered"]


def test_answers_are_greedy_with_llama31s_own_settings(capfd):
    """Its generation_config samples: two seeds, one answer, no random number drawn, nothing printed."""
    setup = Setup("llama31", "dolores")
    model = AutoModelForCausalLM.from_pretrained(setup.folder, attn_implementation=sft.packed_attention())
    settings = model.generation_config
    assert settings.do_sample and settings.temperature == 0.6 and settings.top_p == 0.9
    ids = setup.ids([{"role": "user", "content": "Qui es-tu ?"}], add_generation_prompt=True)
    prompt, answers = sft.Prompt("Qui es-tu ?", list(ids)), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in (0, 1):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            answers.append(sft.generate_answers(model, setup.tokenizer, [prompt], 12))
            assert torch.equal(before, torch.get_rng_state())
    assert answers[0] == answers[1]
    assert capfd.readouterr() == ("", "")

    for _ in range(12):  # the most probable token, one at a time
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    text = setup.tokenizer.decode(ids[-12:], skip_special_tokens=True).strip()
    assert answers[0] == {"Qui es-tu ?": text}
