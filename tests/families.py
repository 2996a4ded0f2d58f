"""Tiny models of random weights with the real config of each family, and a small vocabulary of the family's kind.

Sizes are small; everything else in the config is the real model's: fused projections, biases, softcaps, sliding windows,
norms of queries and keys, tied embeddings, RoPE.
"""

import importlib.util
import zlib
from pathlib import Path
from typing import NamedTuple

import parts

TEXT = parts.ROOT / "train.chatml"
WORDS = 700  # of the trained vocabulary, without special tokens


class Tokens(NamedTuple):
    """A family's tokenizer without its vocabulary."""

    kind: str  # the pre-tokenizer as llama.cpp names it, or SentencePiece with or without a blank before each text
    bos: str | None
    eos: str  # in chats
    others: tuple[str, ...]  # other special tokens
    adds_bos: bool = True


GEMMA = Tokens("sentencepiece", "<bos>", "<end_of_turn>", ("<pad>", "<eos>", "<unk>", "<start_of_turn>"))
QWEN = Tokens("qwen2", None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>"), False)
TOKENS = {
    "llama3": Tokens("llama-bpe", "<|begin_of_text|>", "<|eot_id|>",
                     ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|finetune_right_pad_id|>")),
    "qwen2": QWEN,
    "qwen3": QWEN,
    "mistral": Tokens("blank", "<s>", "</s>", ("<unk>",)),
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi3": Tokens("blank", "<s>", "<|end|>", ("<unk>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"), False),
    "phi4": Tokens("dbrx", None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>", "<|im_sep|>"), False),
    "mixtral": Tokens("blank", "<s>", "</s>", ("<unk>",)),
    "gpt2": Tokens("gpt-2", None, "<|endoftext|>", (), False),
}  # fmt: skip
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a family splits text before BPE, as in its real tokenizer.json.
SPLITS = {"llama-bpe": LLAMA_SPLIT, "dbrx": LLAMA_SPLIT, "qwen2": LLAMA_SPLIT.replace(r"{1,3}", "")}
# Each family's real chat template: in the package trl, or written here after the real one.
TEMPLATES = {
    "llama3": "llama3_1",
    "qwen2": "qwen2_5",
    "qwen3": "qwen3",
    "gemma2": "gemma",
    "gemma3": "gemma3",
    "phi3": "phi3",
}
MISTRAL_TEMPLATE = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\n\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}"""
PHI4_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
TRAINABLE = ("llama3", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "phi4")
REFUSED = ("mixtral", "gpt2")


def template(name: str) -> str | None:
    """The chat template of a family, or one of the package trl by its name there."""
    if name in ("mistral", "phi4"):
        return MISTRAL_TEMPLATE if name == "mistral" else PHI4_TEMPLATE
    trl = Path(importlib.util.find_spec("trl").origin).parent
    file = trl / "chat_templates" / f"{TEMPLATES.get(name, name)}.jinja"
    return file.read_text() if file.is_file() else None


def family(name: str, folder: Path | None = None) -> Path:
    """The family's folder in Hugging Face's layout, made once."""
    version = f"{zlib.crc32(Path(__file__).read_bytes()):08x}"
    return parts.made_once(folder or parts.CACHE / f"family-{name}-{version}", lambda partial: make(name, partial))


def tokenizer(name: str):
    """transformers' tokenizer of a family."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(family(name))


def make(name: str, partial: Path) -> None:
    """Write config, random weights and tokenizer of one family."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = make_tokenizer(name, partial)
    tokenizer.save_pretrained(partial)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():  # biases, norms and attention that matter, unlike freshly made ones
            parameter.add_(0.2 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.25)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(partial)


def make_tokenizer(name: str, folder: Path):
    """A tokenizer of the family's kind, trained on train.chatml, with its special tokens."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    tokens = TOKENS[name]
    special = list(dict.fromkeys([token for token in (tokens.bos, tokens.eos, *tokens.others) if token]))
    sentencepiece = tokens.kind in ("sentencepiece", "blank")
    backend = sentencepiece_bpe(tokens, folder) if sentencepiece else byte_level_bpe(tokens.kind)
    # Phi-3's control tokens swallow the white space after them.
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=name == "phi3" and "|" in t) for t in special]
    )
    if tokens.adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens.bos} $A", special_tokens=[(tokens.bos, backend.token_to_id(tokens.bos))]
        )
    pad = next(
        (token for token in ("<|finetune_right_pad_id|>", "<pad>", "<|endoftext|>") if token in special), tokens.eos
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens.bos,
        eos_token=tokens.eos,
        pad_token=pad,
        chat_template=template(name),
    )


def byte_level_bpe(kind: str):
    """A byte-level BPE as Llama 3, Qwen, Phi-4 and GPT-2 have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in SPLITS)
    if kind in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[kind]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train([str(TEXT)], trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False))
    return backend


def sentencepiece_bpe(tokens: Tokens, folder: Path):
    """SentencePiece's BPE with byte fallback as Mistral, Gemma and Phi-3 have it; writes tokenizer.model too."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.tokenization_utils_base import generate_merges

    blank = tokens.kind == "blank"
    ids = (
        {"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2}
        if blank
        else {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    )
    names = {"bos_piece": tokens.bos, "eos_piece": "</s>" if blank else "<eos>"}
    SentencePieceTrainer.train(
        input=str(TEXT), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=WORDS + 256, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=blank, minloglevel=2, **ids, **names,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    model = SentencePieceProcessor(str(folder / "tokenizer.model"))
    pieces = {model.id_to_piece(i): i for i in range(len(model))}
    merges = generate_merges(pieces)
    backend = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if blank else replace
    if not blank:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] if blank else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def config_of(name: str, tokenizer):
    """The family's real config with small sizes; windows are short, so that they matter in rows of 128 tokens."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 5, "bos_token_id": tokenizer.bos_token_id,
             "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip

    def rope(theta: float, **more) -> dict:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}

    llama3_rope = rope(
        5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    llama3_rope["rope_parameters"]["rope_type"] = "llama3"
    real = {
        "llama3": ("LlamaConfig", {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, **llama3_rope}),
        "qwen2": ("Qwen2Config", {"max_position_embeddings": 32768, "tie_word_embeddings": True, **rope(1e6)}),
        "qwen3": ("Qwen3Config", {"max_position_embeddings": 40960, "head_dim": 32, "tie_word_embeddings": True, **rope(1e6)}),
        "mistral": ("MistralConfig", {"max_position_embeddings": 32768, "sliding_window": 24, **rope(1e4)}),
        "gemma2": ("Gemma2Config", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24,
                                    "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, **rope(1e4)}),
        "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24,
                                        "num_hidden_layers": 6}),
        "phi3": ("Phi3Config", {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
                                "sliding_window": 24, **rope(1e4)}),
        "phi4": ("Phi3Config", {"max_position_embeddings": 16384, "original_max_position_embeddings": 16384, **rope(25e4)}),
        "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, **rope(1e6)}),
        "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": len(tokenizer) + 5,
                                "bos_token_id": 0, "eos_token_id": 0}),
    }  # fmt: skip
    kind, values = real[name]
    return getattr(transformers, kind)(**(values if name == "gpt2" else sizes | values))
