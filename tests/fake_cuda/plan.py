"""What one training step needs on a card, calculated; tests/test_cuda_path.py holds it against the trace."""

from collections.abc import Callable

GIB = 2**30
CONTEXT = 0.7  # GiB that CUDA takes for a process and cuBLAS for its workspace; a guess, no card has been asked


def memory_plan(
    shape: dict,
    tokens: int,
    trained_share: float,
    free_layers: int,
    *,
    lora_r: int,
    targets: list[str],
    dropout: bool,
    nf4: bool = True,
    size: int = 2,
    optimizer_bytes: int = 2,
    chunk_rows: int,
    world_size: int = 1,
    sharded: bool = False,
) -> dict[str, float]:
    """GiB by part: weights and what belongs to them, then what is alive at the worst moment of a micro-step.

    `tokens` of a whole batch; `free_layers`, the last ones, keep their activations; `size` in bytes of an activation;
    `optimizer_bytes` and `chunk_rows` as in the trainer. Of a step's moments these three can be the worst, for
    everything else is smaller: the loss, the backward of the last norm (both while all free layers are full), and the
    recomputation of a checkpointed layer (when the free ones are empty again).
    """
    h, f, layers, vocabulary = (
        shape[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    heads = shape["num_attention_heads"]
    width = shape.get("head_dim") or h // heads
    q, kv = heads * width, shape.get("num_key_value_heads", heads) * width
    projections = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h),
                   "gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}  # fmt: skip
    adapted = [name for name in projections if name in targets]
    lora_layer = lora_r * sum(sum(projections[name]) for name in adapted)
    base, lora = layers * sum(i * o for i, o in projections.values()), layers * lora_layer
    share = 1 / world_size + 2 / layers if sharded else 1  # a share of the layers, and two of them gathered

    # What a layer keeps for its backward, in bytes a token.
    norms = 2 * (4 * h + 4)  # their input in float32, and the inverse root
    attention = size * (2 * q + 2 * kv) + 4 * heads  # q, k, v, output, and the softmax's float32 log-sum
    mlp = size * 3 * f  # gate, silu(gate), up
    inputs = (size + 1) * sum(projections[name][0] for name in adapted)  # each adapter's own dropped copy, and its mask
    if not dropout:  # q, k and v share one, gate and up too; o's is the attention's output
        shared = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"down_proj"})
        inputs = size * sum(projections[min(group)][0] for group in shared if group & set(adapted))
    ranks = size * lora_r * len(adapted)  # A x
    kept = tokens * (norms + attention + mlp + inputs + ranks) + size * lora_layer  # A and B in the activations' dtype

    # What a layer needs beside that while it is recomputed or goes backward.
    weight = f * h * (size + 2 * 4 / 64) if nf4 else 0  # the largest weight restored to `size` bytes, its scales twice
    if dropout:  # down_proj's input before dropout and five hidden states; or its weight, before its input is dropped
        recomputed = tokens * size * (f + 5 * h) + max(0, weight - tokens * (size + 1) * f)
    else:  # its weight and four hidden states; or three gradients of its input, which is gone by then
        recomputed = max(weight + tokens * size * 4 * h, tokens * size * (2 * f + h))

    checkpoints = max(layers - free_layers, 1) * tokens * h * size  # layers' inputs; the embedding's output always
    trained = trained_share * tokens
    head = 4 * tokens * h  # the last norm's input in float32
    loss = 12 * min(trained, chunk_rows) * vocabulary + 2 * trained * h * size  # three float32 logits; states, gradients
    norm = 5 * 4 * tokens * h  # float32 terms of the last norm's gradient
    full = free_layers * kept
    worst = max(full + head + max(loss, norm), kept + recomputed if free_layers < layers else 0)

    parts = {
        "base weights": base * (0.5 * share + (1 + 4 / 256) / 64) if nf4 else base * size * share,
        "embedding and head": vocabulary * h * size * (1 if shape.get("tie_word_embeddings") else 2),
        "LoRA, float32": lora * 4,
        "its gradients": lora * 4 * (2 if world_size > 1 else 1),  # DDP keeps a second copy in its buckets
        "optimizer state": lora * optimizer_bytes,
        "checkpoints": checkpoints,
        "activations": max(free_layers, 1) * kept,
        "loss or backward": worst - max(free_layers, 1) * kept,
        "CUDA context": CONTEXT * GIB,
    }
    return {name: amount / GIB for name, amount in parts.items()}


def uncheckpointed_layers_that_fit(layers: int, peak: Callable[[int], int], limit: int) -> int:
    """How many layers may keep their activations below `limit` bytes.

    peak(n) does one step with n such layers and returns the bytes at its peak, sys.maxsize where it ran out of
    memory. It is a line from n = 1 on; at 0 the recomputed layer's activations stand where the first free one's
    would, so a slope measured from there is too small. The answer is measured too, and lowered until it fits.
    """
    peak(0)  # gradients, kernels and workspaces come with the first step
    few = min(3, layers)
    at_one, at_few = peak(1), peak(few)
    if at_one > limit:
        return 0
    per_layer = max(1, (at_few - at_one) // max(1, few - 1))
    free = min(layers, 1 + (limit - at_one) // per_layer)
    while free > 1 and (over := peak(free) - limit) > 0:
        free -= min(-(-over // per_layer), -(-free // 4))  # out of memory says nothing about how much
    return free
