"""train.py's memory estimate against the modules of a 7B run, executed on tensors without memory.

On device meta only shapes are computed, so forward, loss, backward and optimizer of a full-size LLaVA
take seconds. Attention is the flash kernel, as on a GPU: its operator has a meta form, with backward.
Ids and labels are on the CPU, where their positions can be read.
"""

import inspect
import os

import pytest
import torch

import train
from llava import IGNORE, Llava, LlavaConfig, TextConfig, count_image_tokens
from tests.test_train import Live

SIZE = 640, 640                              # of each image; for AnyRes the whole and 2 x 2 tiles
TILES = {"pad": 1, "anyres": 5, "text": 0}


def flash_attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """F.scaled_dot_product_attention, which on device meta would compute scores."""
    assert attn_mask is None and (enable_gqa or q.shape[1] == k.shape[1])
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


class FusedNorm(torch.autograd.Function):
    """F.rms_norm, which on a GPU is one kernel that keeps its input and a number per row."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        assert weight is None
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0]), None, None, None


def make_batch(config: LlavaConfig, rows: int, images: int, words: int, supervised: int) -> dict:
    """`rows` equal rows of some images and words, of which the last `supervised` are labels."""
    ids = torch.full((rows, images + words), 5)
    ids[:, :images] = config.image_token_id
    labels = torch.full_like(ids, IGNORE)
    labels[:, -supervised:] = 5
    S = config.vision.image_size
    shape = TILES[config.image_mode], 3, S, S
    return {"input_ids": ids, "labels": labels, "image_sizes": [SIZE] * rows * images,
            "images": [torch.empty(shape, dtype=torch.uint8, device="meta") for _ in range(rows * images)]}


def build(config: LlavaConfig) -> Llava:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return Llava(config)
    finally:
        torch.set_default_dtype(torch.float32)


def trace_peak(config: LlavaConfig, args, batch: dict) -> tuple[Llava, float]:
    """The model, and the most bytes that live tensors hold during one step."""
    with Live() as live:
        model = build(config)
        train.choose_trainable(model, args)
        train.wrap_layers(model, args)
        optimizer = train.Adam(model.named_parameters(), in_backward=args.in_backward)
        live.most = 0
        optimizer.begin(1e-3)
        for _ in range(args.batch_size // args.micro_batch_size):
            model(**batch).backward()
        optimizer.step()
    return model, live.most


CASES = {                                    # layers, image mode, words in a row, labels of a row, flags
    "stage 1": (32, "pad", 200, 60, "--stage 1"),
    # with few layers, each of the moments that the estimate knows
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
    for mode, words, more in (
            ("anyres", 200, ""), ("anyres", 200, "--checkpoint-blocks 8"), ("anyres", 200, "--lora-rank 128"),
            ("anyres", 200, "--lora-rank 128 --checkpoint-blocks 16"),
            ("anyres", 200, "--in-backward"), ("anyres", 200, "--in-backward --checkpoint-blocks 8"),
            ("pad", 200, "--lora-rank 128"), ("pad", 200, ""), ("pad", 200, "--in-backward"),
            ("text", 800, ""), ("text", 800, "--checkpoint-blocks 32"),
            ("text", 800, "--in-backward --checkpoint-blocks 32")):
        CASES[f"{mode} {more}"] = (32, mode, words, 60, f"--stage 2 {more}")


def describe(case: str) -> tuple:
    """The configuration, the flags, the load of a micro-batch, and the batch itself."""
    layers, mode, words, supervised, more = CASES[case]
    args = train.parse("--data x --init x --out x --plan --card a100 --batch-size 2 --micro-batch-size 2 "
                       f"--checkpoint-blocks 0 {more}".split())
    rows, images = args.micro_batch_size, min(1, TILES[mode])
    text = TextConfig(vocab_size=32064, num_hidden_layers=layers)
    config = LlavaConfig(text=text, image_mode=mode.replace("text", "pad"))
    tokens = words + images * count_image_tokens(config, SIZE)
    load = train.Load(rows * tokens, rows * min(supervised, tokens - 1), rows * TILES[mode])
    return config, args, load, make_batch(config, rows, images, words, supervised)


@pytest.mark.parametrize("case", CASES)
def test_memory_estimate_of_a_7b_run_is_within_3_percent(monkeypatch, case):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
    monkeypatch.setattr(torch.nn.functional, "rms_norm", FusedNorm.apply)
    config, args, load, batch = describe(case)
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
def test_an_estimate_without_one_of_its_terms_differs_by_more_than_3_percent(case, term):
    """So the test above fails if a term is dropped: it is multiplied by 0 here."""
    config, args, load, _ = describe(case)
    model = build(config)
    train.choose_trainable(model, args)
    source, changed = inspect.getsource(train.estimate_memory), dict(vars(train))
    assert term in source
    exec(source.replace(term, f"0 * {term}", 1), changed)
    wanted, found = (function(model, load, args)["peak"]
                     for function in (train.estimate_memory, changed["estimate_memory"]))
    print(f"{case}, {term}: {found / wanted - 1:+.2%}")
    assert found < 0.965 * wanted
