"""train.py's memory estimate against the modules of a 7B run, executed on tensors without memory.

On device meta only shapes are computed, so forward, loss, backward and optimizer of a full-size LLaVA
take seconds. Attention is the flash kernel, as on a GPU: its operator has a meta form, with backward.
Ids and labels are on the CPU, where their positions can be read.
"""

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
        train.wrap_blocks(model, args)
        optimizer = train.Adam(model.named_parameters(), in_backward=args.in_backward)
        live.most = 0
        optimizer.begin(1e-3)
        for _ in range(args.batch_size // args.micro_batch_size):
            model(**batch).backward()
        optimizer.step()
    return model, live.most


CASES = [("pad", "--stage 1"), ("text", "--stage 2 --in-backward --checkpoint-blocks 32"),
         ("anyres", "--stage 2 --lora-rank 128 --checkpoint-blocks 16")]
if os.environ.get("LLAVA_TEST_ALL"):         # about ten seconds each
    CASES += [("anyres", "--stage 2"), ("anyres", "--stage 2 --checkpoint-blocks 8"),
              ("pad", "--stage 2 --lora-rank 128"), ("pad", "--stage 2"), ("text", "--stage 2"),
              ("pad", "--stage 2 --in-backward"), ("text", "--stage 2 --checkpoint-blocks 32")]


@pytest.mark.parametrize("mode, more", CASES)
def test_memory_estimate_of_a_7b_run_is_within_3_percent(monkeypatch, mode, more):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
    args = train.parse("--data x --init x --out x --plan --card a100 --batch-size 2 --micro-batch-size 2 "
                       f"--checkpoint-blocks 0 {more}".split())
    rows, supervised, images, words = 2, 60, 1, 200
    if mode == "text":
        images, words = 0, 800
    config = LlavaConfig(text=TextConfig(vocab_size=32064), image_mode=mode.replace("text", "pad"))
    tokens = words + images * count_image_tokens(config, SIZE)
    load = train.Load(rows * tokens, rows * supervised, rows * TILES[mode])
    model, peak = trace_peak(config, args, make_batch(config, rows, images, words, supervised))
    estimate = train.estimate_memory(model, load, args)["peak"]
    print(f"{mode} {more}: {estimate / 2**30:.2f} GiB estimated, {peak / 2**30:.2f} traced")
    assert estimate == pytest.approx(peak, rel=0.03)
