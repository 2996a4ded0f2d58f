"""The lean forwards (norms, MLPs, RoPE, adapters) compute what transformers' and PEFT's own do, in every family."""

import inspect
import sys

import pytest
import torch
from families import TRAINABLE, family
from runs import TINY, adapter_weights, arguments, assert_same_adapter, dialogues, launch, record, run
from test_train import batch

import train_sft_dolores as sft

SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
SOME = ["q_proj,v_proj", "k_proj,down_proj", "up_proj", "o_proj,gate_proj"]  # not all that read one input


def row(vocabulary: int) -> dict:
    inputs = batch(length=40)
    for name in ("input_ids", "labels", "shift_labels"):
        inputs[name] = inputs[name] % vocabulary
    return inputs


def gradients(model, inputs: dict) -> list[torch.Tensor]:
    """The loss, and the gradients of all adapters, whose B are no longer zero."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.manual_seed(len(name) + parameter.shape[0])
            torch.nn.init.normal_(parameter, std=0.05)
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("name", "targets", "checkpointing"),
    [*((name, SEVEN, "none") for name in TRAINABLE), *(("llama3", some, "1") for some in SOME), ("phi3", "qkv_proj", "all")],
)  # fmt: skip
def test_gradients_are_those_of_peft_and_transformers(name, targets, checkpointing, monkeypatch):
    import peft

    sft.load_libraries()
    folder = str(family(name))
    args = arguments("--no-bf16", "--no-bnb-nf4", "--lora-r", 4, "--lora-dropout", 0, "--lora-target-modules", targets,
                     "--gradient-checkpointing", checkpointing)  # fmt: skip
    args.lora_target_modules = sft.choose_targets(args.lora_target_modules, sft.read_headers(folder, folder))
    lean = sft.load_base(args, folder, "cpu")
    sft.install_chunked_loss(lean)
    lean = sft.add_lora(lean, args, args.lora_target_modules, None)
    sft.plan_micro_steps(lean, [], args)
    inputs = row(lean.config.vocab_size)
    ours = gradients(lean.train(), inputs)
    with lean.disable_adapter(), torch.no_grad():
        without = lean(**inputs).loss

    plain = sft.load_base(args, folder, "cpu")
    modeling = sys.modules[type(plain).__module__]
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", inspect.unwrap(modeling.apply_rotary_pos_emb))
    sft.install_chunked_loss(plain)
    with torch.no_grad():
        torch.testing.assert_close(without, plain(**inputs).loss)
    config = peft.LoraConfig(r=4, lora_alpha=args.lora_alpha, lora_dropout=0, target_modules=args.lora_target_modules)
    theirs = gradients(peft.get_peft_model(plain, config).train(), inputs)
    assert len(ours) == len(theirs) > 2
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_one_dropout_for_layers_that_share_an_input():
    """The mask drawn once, in the formula: y = W x + s B A dropout(x), its gradients, and the next random numbers."""
    sft.load_libraries()
    folder = str(family("llama3"))
    args = arguments("--no-bf16", "--no-bnb-nf4", "--lora-r", 4, "--lora-dropout", 0.5)
    model = sft.add_lora(sft.load_base(args, folder, "cpu"), args, args.lora_target_modules, None).train()
    decoder = model.get_base_model().get_decoder()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    decoder(torch.arange(4)[None])  # casts the adapters
    layers = [getattr(decoder.layers[0].self_attn, f"{name}_proj") for name in "qkv"]
    weights = [getattr(layer, kind)["default"].weight for layer in layers for kind in ("lora_A", "lora_B")]
    source = torch.randn(1, 6, 64, requires_grad=True)

    def outputs(through) -> list[torch.Tensor]:
        torch.manual_seed(3)
        x = sft.keep_inputs(torch.tanh, source)
        found = through(x)
        return [*found, *torch.autograd.grad(sum((y * y).sum() for y in found), [source, *weights]), torch.rand(4)]

    def formula(x):
        dropped, _ = torch.native_dropout(x[0], 0.5, True)
        s = args.lora_alpha / args.lora_r
        return [layer.base_layer(x) + s * (dropped @ a.T @ b.T) for layer, a, b in zip(layers, weights[::2], weights[1::2], strict=True)]  # fmt: skip

    for one, other in zip(outputs(lambda x: [layer(x) for layer in layers]), outputs(formula), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_dropout_drawn_again():
    """The same draw; the generator goes on from where it was, after an error too."""
    x, generator = torch.randn(50, 8), torch.default_generator
    state = generator.get_state()
    first = torch.native_dropout(x, 0.5, True)
    now = generator.get_state()
    again = sft.dropout_again(x, 0.5, generator, state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(generator.get_state(), now) and not torch.equal(state, now)
    with pytest.raises(RuntimeError):
        sft.dropout_again(x.int(), 0.5, generator, state)
    assert torch.equal(generator.get_state(), now)


FORCED = """
import train_sft_dolores as sft
plan = sft.plan_micro_steps
def two_rows_at_once(*args):
    plan(*args)
    return sft.Batches(rows=2, accumulated=2)
sft.plan_micro_steps = two_rows_at_once
sft.main()
"""


@pytest.mark.slow
def test_several_rows_at_once_are_the_same_training(tmp_path, short_smollm2):
    """What a GPU with room decides, forced here; a stopped run may go on with another decision."""
    import os
    import shutil

    from runs import ROOT

    alone, together = tmp_path / "alone", tmp_path / "together"
    options = (
        "--model",
        short_smollm2,
        "--output",
        "out",
        *TINY,
        "--lora-dropout",
        0,
        "--grad-accum",
        4,
        "--epochs",
        2,
    )
    for folder in (alone, together):
        folder.mkdir()
        (folder / "train.chatml").write_text(dialogues(60))
    assert run(alone, *options)[0] == 0
    (together / "forced.py").write_text(FORCED)
    process = launch([sys.executable, "forced.py", *options], together, "log.txt", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))  # fmt: skip
    assert process.wait(240) == 0, (together / "log.txt").read_text()[-3000:]
    one, other = record(alone), record(together)
    assert one["data"] == other["data"] and one["args"] == other["args"]
    assert one["results"]["steps"] == other["results"]["steps"] >= 3
    assert one["results"]["eval_loss_after"] == pytest.approx(other["results"]["eval_loss_after"], rel=1e-4)
    assert_same_adapter(alone / "out", together / "out", tolerance=1e-4)

    last = max((together / "out").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    shutil.rmtree(last)
    os.remove(together / "out/adapter_model.safetensors")
    code, printed = run(together, *options, "--resume")
    assert code == 0, printed
    assert_same_adapter(alone / "out", together / "out", tolerance=1e-4)
    assert adapter_weights(together / "out")
