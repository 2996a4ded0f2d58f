"""Tiny models of random weights with the real config of each family, and a small vocabulary of the family's kind.

Sizes are small; everything else in the config is the real model's: fused projections, biases, softcaps, sliding windows,
norms of queries and keys, tied embeddings, RoPE.
"""

import zlib
from pathlib import Path

import parts

ROOT = parts.ROOT
WORDS = 700  # of the trained vocabulary, without special tokens

# What stands around a family's real vocabulary: (BOS, EOS in chats, other special tokens, does it add BOS).
TOKENS = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|finetune_right_pad_id|>"), True),
    "qwen2": (None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>"), False),
    "qwen3": (None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>"), False),
    "mistral": ("<s>", "</s>", ("<unk>", "[INST]", "[/INST]"), True),
    "gemma2": ("<bos>", "<end_of_turn>", ("<pad>", "<eos>", "<start_of_turn>"), True),
    "gemma3": ("<bos>", "<end_of_turn>", ("<pad>", "<eos>", "<start_of_turn>"), True),
    "phi3": ("<s>", "<|end|>", ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"), False),
    "mixtral": ("<s>", "</s>", ("<unk>",), True),
    "gpt2": (None, "<|endoftext|>", (), False),
}  # fmt: skip
TRAINABLE = ("llama3", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3")
REFUSED = ("mixtral", "gpt2")


def family(name: str, folder: Path | None = None) -> Path:
    """The family's folder in Hugging Face's layout, made once."""
    version = f"{zlib.crc32(Path(__file__).read_bytes()):08x}"
    return parts.made_once(folder or parts.CACHE / f"family-{name}-{version}", lambda partial: make(name, partial))


def make(name: str, partial: Path) -> None:
    """Write config, random weights and tokenizer of one family."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = make_tokenizer(name)
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


def make_tokenizer(name: str):
    """A byte-level BPE trained on train.chatml, with the special tokens of the family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bos, eos, others, adds_bos = TOKENS[name]
    special = list(dict.fromkeys([token for token in (bos, eos, *others) if token]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS + len(special), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train([str(ROOT / "train.chatml")], trainer)
    if adds_bos:
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=ids
        )
    pad = next((token for token in ("<|finetune_right_pad_id|>", "<pad>", "<|endoftext|>") if token in special), eos)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)


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
        "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, **rope(1e6)}),
        "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": len(tokenizer) + 5,
                                "bos_token_id": 0, "eos_token_id": 0}),
    }  # fmt: skip
    kind, values = real[name]
    return getattr(transformers, kind)(**(values if name == "gpt2" else sizes | values))
