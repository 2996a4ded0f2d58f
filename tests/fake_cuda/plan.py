# ruff: noqa: F821 - the names are the trainer's
"""Functions for train_sft_dolores.py, run in its namespace by tracer.py until it has them itself."""


def memory_plan(
    args: argparse.Namespace, world: World, config: dict, tokens: int, trained_share: float, uncheckpointed: int = 0
) -> dict[str, float]:
    """GiB that one step of `tokens` tokens needs on a GPU, from config.json alone.

    uncheckpointed: how many layers, the last ones, keep their activations instead of recomputing them.
    """
    h, f, layers, vocabulary = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or h // heads
    q, kv = heads * width, config.get("num_key_value_heads", heads) * width
    shapes = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h),
              "gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}  # fmt: skip
    projections = layers * sum(rows * columns for rows, columns in shapes.values())
    adapted = {name: shapes[name] for name in args.lora_target_modules if name in shapes}
    lora_layer = args.lora_r * sum(rows + columns for rows, columns in adapted.values())
    size = 2 if args.bf16 else 4  # bytes of a weight or activation
    # NF4: 4 bits, and for each block of 64 an 8-bit scale, whose own blocks of 256 have a float32 scale.
    weight_bytes = 0.5 + (1 + 4 / 256) / 64 if args.bnb_nf4 else size
    share = 1 / world.size + 2 / layers if args.shard_base else 1  # with --shard-base two layers are gathered
    lora = layers * lora_layer
    kept = tokens * kept_bytes(h, f, q, kv, heads, size, args, adapted) + size * lora_layer  # A and B, cast
    checkpoints = max(layers - uncheckpointed, 1) * tokens * h * size  # the inputs of the checkpointed layers

    # Three moments can be the worst. In the loss and in the backward of the last norm, all uncheckpointed layers are
    # full; when a checkpointed layer is recomputed, they are empty again.
    trained = trained_share * tokens
    loss = 12 * min(trained, logit_rows(vocabulary)) * vocabulary + 2 * trained * h * size
    last_norm = 5 * 4 * tokens * h
    full = uncheckpointed * kept + 4 * tokens * h + max(loss, last_norm)
    # NF4: the largest weight in `size` bytes, and its scales in float32, twice.
    dequantized = f * h * (size + 2 * 4 / 64) if args.bnb_nf4 else 0
    if args.lora_dropout:
        beside = tokens * size * (f + 5 * h) + max(0, dequantized - tokens * (size + 1) * f)
    else:
        beside = max(dequantized + tokens * size * 4 * h, tokens * size * (2 * f + h))
    recomputed = kept + beside if uncheckpointed < layers else 0
    activations = max(uncheckpointed, 1) * kept
    parts = {
        "base weights": projections * weight_bytes * share,
        "embedding and head": vocabulary * h * size * (1 if config.get("tie_word_embeddings") else 2),
        "LoRA, float32": lora * 4,
        "LoRA gradients": lora * 4 * (2 if world.size > 1 else 1),  # DDP's buckets are a second copy
        "optimizer state": lora * optimizer_bytes(args.optim),
        "checkpoints": checkpoints,
        "activations": activations,
        "loss or backward": max(full, recomputed) - activations,
        "CUDA context": 0.7 * 2**30,
    }
    return {name: amount / 2**30 for name, amount in parts.items()}


def kept_bytes(h: int, f: int, q: int, kv: int, heads: int, size: int, args: argparse.Namespace, adapted: dict) -> int:
    """Bytes that a layer keeps of each token for its backward: counted with tests/fake_cuda, tensor by tensor."""
    kept = 2 * (4 * h + 4)  # two norms: the input in float32 and its inverse root
    kept += size * (2 * q + 2 * kv) + 4 * heads  # q, k, v and output of the attention; its float32 log-sum
    kept += size * 3 * f  # gate, silu(gate), up
    kept += size * args.lora_r * len(adapted)  # A x
    if args.lora_dropout:  # each adapter has its own dropped input, and a mask of one byte
        return kept + (size + 1) * sum(rows for rows, _ in adapted.values())
    kept += size * h * any(name in adapted for name in ("q_proj", "k_proj", "v_proj"))  # one input for all three
    kept += size * h * any(name in adapted for name in ("gate_proj", "up_proj"))
    return kept + size * f * ("down_proj" in adapted)  # o_proj's input is the attention's output


def measure_uncheckpointed(model, rows: Rows, args: argparse.Namespace) -> int:
    """How many layers can keep their activations on this GPU, from the measured peaks of real steps."""
    batch = collate([rows.longest()] * args.train_batch_size)
    del batch["documents"]
    inputs = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
    layers = model.get_base_model().get_decoder().layers

    def peak(uncheckpointed: int) -> int:
        checkpoint_layers(layers, uncheckpointed)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            model.train()(**inputs).loss.backward()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return sys.maxsize
        return torch.cuda.max_memory_reserved()

    peak(0)  # gradients, kernels and workspaces come with the first step
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    # What this process has and what nobody else has, below the cap; a twentieth is left for fragmentation.
    available = min(torch.cuda.memory_reserved() + free, args.torch_memory_fraction * total)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    buckets = 4 if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0  # DDP's copy of the gradients, not yet there
    limit = int(0.95 * available) - trained * (optimizer_bytes(args.optim) + buckets)
    uncheckpointed = uncheckpointed_layers_that_fit(len(layers), peak, limit)
    model.zero_grad()
    torch.cuda.empty_cache()
    return uncheckpointed


def uncheckpointed_layers_that_fit(layers: int, peak: Callable[[int], int], limit: int) -> int:
    """How many layers may keep their activations below `limit` bytes.

    peak(n) does one step with n such layers and returns the bytes at its peak, sys.maxsize where it ran out of
    memory; one step has been done before. From n = 1 on it is a line. peak(0) is not on it: a recomputed layer's
    activations are there where the first uncheckpointed layer's would be. The answer is measured, and lowered until
    it fits.
    """
    few = min(3, layers)
    at_one, at_few = peak(1), peak(few)
    if at_one > limit:
        return 0
    per_layer = max(1, (at_few - at_one) // max(1, few - 1))
    uncheckpointed = min(layers, 1 + (limit - at_one) // per_layer)
    while uncheckpointed > 1 and (over := peak(uncheckpointed) - limit) > 0:
        # A step that ran out of memory does not say by how much.
        uncheckpointed -= min(-(-over // per_layer), -(-uncheckpointed // 4))
    return uncheckpointed
