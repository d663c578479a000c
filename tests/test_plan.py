"""Tests of train.py's memory estimate: it is compared with the tensors of a training step of a 7B LLaVA.

On device meta tensors have shapes but no memory, so a step of a full-size model takes seconds. Attention and
RMSNorm are replaced by functions that keep the tensors that the GPU kernels keep. Ids and labels are on the
CPU, because Llava.splice reads their values.
"""

import inspect
import os

import pytest
import torch

import train
from llava import IGNORE, Llava, LlavaConfig, TextConfig, count_image_tokens
from tests.test_train import LiveTensorBytes

IMAGE_SIZE = 640, 640                        # with AnyRes 5 tiles: the resized image and 2 x 2 tiles
TILES = {"pad": 1, "anyres": 5, "text": 0}


def flash_attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """Replaces F.scaled_dot_product_attention, because that computes the attention scores on device meta."""
    assert attn_mask is None and (enable_gqa or q.shape[1] == k.shape[1])
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


class FusedNorm(torch.autograd.Function):
    """Replaces F.rms_norm. It keeps its input and one number per row, like the fused kernel on a GPU."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        assert weight is None
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0]), None, None, None


def make_batch(config: LlavaConfig, rows: int, images: int, text_tokens: int, supervised: int) -> dict:
    """A batch of equal rows: images, then text tokens, the last `supervised` of them with labels."""
    ids = torch.full((rows, images + text_tokens), 5)
    ids[:, :images] = config.image_token_id
    labels = torch.full_like(ids, IGNORE)
    labels[:, -supervised:] = 5
    shape = TILES[config.image_mode], 3, config.vision.image_size, config.vision.image_size
    return {"input_ids": ids, "labels": labels, "image_sizes": [IMAGE_SIZE] * rows * images,
            "images": [torch.empty(shape, dtype=torch.uint8, device="meta") for _ in range(rows * images)]}


def build(config: LlavaConfig) -> Llava:
    """A bf16 model on device meta."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return Llava(config)
    finally:
        torch.set_default_dtype(torch.float32)


def trace_peak(config: LlavaConfig, args, batch: dict) -> tuple[Llava, float]:
    """(the model, the peak bytes of all tensors during one training step)."""
    with LiveTensorBytes() as live:
        model = build(config)
        train.choose_trainable(model, args)
        train.wrap_layers(model, args)
        optimizer = train.Adam(model.named_parameters(), in_backward=args.in_backward)
        live.peak = 0
        optimizer.begin(1e-3)
        for _ in range(args.batch_size // args.micro_batch_size):
            model(**batch).backward()
        optimizer.step()
    return model, live.peak


CASES = {                                    # layers, image mode, text and supervised tokens of a row, flags
    "stage 1": (32, "pad", 200, 60, "--stage 1"),
    # With few layers, the cases have their peaks in different phases of a step.
    "in-backward": (4, "text", 800, 60, "--stage 2 --in-backward --checkpoint-blocks 4"),
    "LoRA": (4, "anyres", 200, 60, "--stage 2 --lora-rank 128 --checkpoint-blocks 2"),
    "loss": (4, "text", 800, 800, "--stage 2 --lora-rank 128"),
    "last layer": (4, "text", 8000, 60, "--stage 2 --lora-rank 128"),
    "2 of 4 layers checkpointed": (4, "text", 8000, 60, "--stage 2 --in-backward --checkpoint-blocks 2"),
    "last checkpointed layer": (4, "text", 8000, 60, "--stage 2 --lora-rank 128 --checkpoint-blocks 4"),
    "first layer": (8, "text", 8000, 60, "--stage 2 --checkpoint-blocks 8"),
    "optimizer": (4, "text", 100, 60, "--stage 2 --checkpoint-blocks 4"),
    "first update": (4, "text", 400, 60, "--stage 2 --in-backward"),
    "two micro-batches": (4, "text", 8000, 60, "--stage 2 --micro-batch-size 1"),
}
if os.environ.get("LLAVA_TEST_ALL"):         # about five seconds each
    for mode, text_tokens, extra_flags in (
            ("anyres", 200, ""), ("anyres", 200, "--checkpoint-blocks 8"), ("anyres", 200, "--lora-rank 128"),
            ("anyres", 200, "--lora-rank 128 --checkpoint-blocks 16"),
            ("anyres", 200, "--in-backward"), ("anyres", 200, "--in-backward --checkpoint-blocks 8"),
            ("pad", 200, "--lora-rank 128"), ("pad", 200, ""), ("pad", 200, "--in-backward"),
            ("text", 800, ""), ("text", 800, "--checkpoint-blocks 32"),
            ("text", 800, "--in-backward --checkpoint-blocks 32")):
        CASES[f"{mode} {extra_flags}"] = (32, mode, text_tokens, 60, f"--stage 2 {extra_flags}")


def make_case(case: str) -> tuple:
    """(configuration, flags, load of a micro-batch, micro-batch)."""
    layers, mode, text_tokens, supervised, extra_flags = CASES[case]
    args = train.parse("--data x --init x --out x --plan --card a100 --batch-size 2 --micro-batch-size 2 "
                       f"--checkpoint-blocks 0 {extra_flags}".split())
    rows, images = args.micro_batch_size, min(1, TILES[mode])
    text = TextConfig(vocab_size=32064, num_hidden_layers=layers)
    config = LlavaConfig(text=text, image_mode="pad" if mode == "text" else mode)
    tokens = text_tokens + images * count_image_tokens(config, IMAGE_SIZE)
    load = train.Load(rows * tokens, rows * min(supervised, tokens - 1), rows * TILES[mode])
    return config, args, load, make_batch(config, rows, images, text_tokens, supervised)


@pytest.mark.parametrize("case", CASES)
def test_memory_estimate_of_a_7b_run_is_within_3_percent(monkeypatch, case):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
    monkeypatch.setattr(torch.nn.functional, "rms_norm", FusedNorm.apply)
    config, args, load, batch = make_case(case)
    model, peak = trace_peak(config, args, batch)
    estimate = train.estimate_memory(model, load, args)["peak"]
    print(f"{case}: {peak / 2**30:.2f} GiB traced, the estimate differs by {estimate / peak - 1:+.2%}")
    assert estimate == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("case, term", [
    ("stage 1", "weight_bytes("), ("stage 1", "activation_bytes("), ("last layer", "last + earlier"),
    ("in-backward", "(6 if size == 2 else 8)"), ("loss", "12 * load.supervised"),
    ("last checkpointed layer", "inputs + in_layer"), ("last checkpointed layer", "in_layer + so_far"),
    ("last checkpointed layer", "(attention + mlp)"), ("last checkpointed layer", "in_mlp      #"),
    ("first layer", "size * (max(trainable)"), ("two micro-batches", 'need["gradients"]\n    at_update'),
    ("first update", 'need["activations"] if')])
def test_estimate_without_one_of_its_terms_is_too_small_by_over_3_percent(case, term):
    """The term is multiplied by 0 here: without it the test above would fail."""
    config, args, load, _ = make_case(case)
    model = build(config)
    train.choose_trainable(model, args)
    source, namespace = inspect.getsource(train.estimate_memory), dict(vars(train))
    assert term in source
    exec(source.replace(term, f"0 * {term}", 1), namespace)
    estimate = train.estimate_memory(model, load, args)["peak"]
    without_term = namespace["estimate_memory"](model, load, args)["peak"]
    print(f"{case}, {term}: {without_term / estimate - 1:+.2%}")
    assert without_term < 0.965 * estimate
