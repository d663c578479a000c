"""Speed and memory of llava.py and train.py, with random weights in the shapes of CLIP-L/14-336 and of
the first layers of Mistral-7B.

    python tests/bench.py                    answers and training steps, beside transformers
    python tests/bench.py --window           attention and prefill past the sliding window
    python tests/bench.py --prune            token reduction
    python tests/bench.py --load --layers 32 memory and time to save and open a whole checkpoint
    python tests/bench.py --quantize         weights in 8 and 4 bits; with --llama-cpp beside llama.cpp
                                             (packages gguf and llama-cpp-python)
    python tests/bench.py --quantize --model FOLDER --text FILE    errors and perplexity of a language model
    python tests/bench.py --gguf FILE --model FOLDER    converts a LLaMA of llama.cpp to FOLDER (package gguf)
    python tests/bench.py --layers 1 --vision-layers 2 --repeats 1 --shrink 16     a trial, in seconds

The runs that are compared take turns. The first turn is not counted; --repeats turns follow. So other work
on the machine slows all sides alike. A time is the median over the turns. A ratio is the median of each
turn's ratio, printed with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import llava
import train
from llava import FITS, Llava

TFLOPS = {"A100": 312, "H100": 989, "H200": 989}         # dense bf16, from the data sheets


# ---------------------------------------------------------------------------------------------
# 1. Time, memory, tables


def time_in_turns(runs: dict[str, Callable], repeats: int, description: str) -> dict[str, list[float]]:
    """Seconds of each run in each turn, see take_turns."""
    def time_once(run: Callable) -> float:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start

    return take_turns({name: partial(time_once, run) for name, run in runs.items()}, repeats, description)


def take_turns(runs: dict[str, Callable], repeats: int, description: str) -> dict[str, list]:
    """What each run returns in each turn but the first. Every second turn has the reverse order."""
    results = {name: [] for name in runs}
    for turn in tqdm(range(1 + repeats), desc=description, leave=False):
        order = list(runs) if turn % 2 == 0 else list(reversed(runs))
        for name in order:
            results[name].append(runs[name]())
    return {name: all_turns[1:] for name, all_turns in results.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(device: str, build: Callable, work: Callable) -> tuple[float, float]:
    """Peak GiB of a new process: after model = build(), then after work(model). On a GPU it is the memory of
    torch's allocator, on a CPU of the whole process. A new process starts with the peak of its parent, so
    this must be called before the parent builds a large model."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure_peaks, device, build, work).result()


def measure_peaks(device: str, build: Callable, work: Callable) -> tuple[float, float]:
    def peak() -> float:
        if device.startswith("cuda"):
            return torch.cuda.max_memory_allocated() / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    model = build()
    after_build = peak()
    work(model)
    return after_build, peak()


def print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print(f"{first:{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(others, widths[1:])), sep="   ")


def ms(seconds: list[float]) -> str:
    return f"{1e3 * median(seconds):,.1f}"


def ratio(numerators: list[float], denominators: list[float]) -> list[str]:
    """Median of the ratios of each turn, and their range."""
    ratios = [a / b for a, b in zip(numerators, denominators)]
    return [f"{median(ratios):.2f}", f"{min(ratios):.2f} - {max(ratios):.2f}"]


# ---------------------------------------------------------------------------------------------
# 2. Models and inputs


def make_config(args) -> llava.LlavaConfig:
    n = args.shrink
    vision = llava.VisionConfig(1024 // n, 4096 // n, args.vision_layers, 16 // n)
    text = llava.TextConfig(vocab_size=32064, hidden_size=4096 // n, intermediate_size=14336 // n,
                            num_hidden_layers=args.layers, num_attention_heads=32 // n,
                            num_key_value_heads=max(1, 8 // n))
    if args.window:
        vision, text = replace(vision, num_hidden_layers=0), replace(text, sliding_window=512)
    return llava.LlavaConfig(vision, text, image_mode="anyres" if args.anyres else "pad")


def image_size(args) -> tuple[int, int]:
    """(height, width): with --anyres an image that fills four tiles, 2,928 tokens."""
    edge = make_config(args).vision.image_size * (2 if args.anyres else 1)
    return edge, edge


def make_inputs(args, rows: int) -> dict[str, dict]:
    """The same rows for both sides: a token, an image, text. The second half of the text is supervised.
    llava.py has one id for the image, transformers one for each of its tokens."""
    config, size = make_config(args), image_size(args)
    image_tokens, edge = llava.count_image_tokens(config, size), config.vision.image_size
    tiles = torch.randn(rows, llava.count_tiles(config, size), 3, edge, edge)
    tiles = tiles.to(args.device, getattr(torch, args.dtype))
    ids = torch.randint(3, 32000, (rows, args.tokens - image_tokens + 1), device=args.device)
    ids[:, 1] = config.image_token_id
    labels = ids.clone()
    labels[:, :-((args.tokens - image_tokens) // 2)] = llava.IGNORE
    copies = torch.ones(ids.shape[1], dtype=torch.int64, device=args.device)
    copies[1] = image_tokens
    theirs = {"input_ids": ids.repeat_interleave(copies, 1), "labels": labels.repeat_interleave(copies, 1),
              "pixel_values": tiles if args.anyres else tiles[:, 0]}
    if args.anyres:
        theirs["image_sizes"] = torch.tensor([size] * rows, device=args.device)
    return {"llava.py": {"input_ids": ids, "labels": labels, "images": list(tiles),
                         "image_sizes": [size] * rows},
            "transformers": theirs}


def without_labels(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name != "labels"}


def build_random(args, construct: Callable):
    """The model that construct() returns, on the device and in the dtype of args."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            return construct().requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(default_dtype)


# ---------------------------------------------------------------------------------------------
# 3. Beside transformers


def build_ours(args) -> Llava:
    return build_random(args, partial(Llava, make_config(args)))


def build_theirs(args):
    from transformers import AutoConfig, AutoModelForImageTextToText
    config = AutoConfig.for_model(**llava.hf_config(make_config(args), whole=True))
    return build_random(args, partial(AutoModelForImageTextToText.from_config, config,
                                      dtype=getattr(torch, args.dtype)))


def answer_ours(model: Llava, inputs: dict, tokens: int) -> None:
    list(model.generate(**without_labels(inputs), max_new_tokens=tokens, eos_token_id=None))


@torch.inference_mode()
def answer_theirs(model, inputs: dict, tokens: int) -> None:
    if tokens == 1:                          # a prefill, without the overhead of generate
        model(**without_labels(inputs), use_cache=True, logits_to_keep=1)
    else:
        model.generate(**without_labels(inputs), max_new_tokens=tokens, min_new_tokens=tokens,
                       do_sample=False, pad_token_id=0)


def select_trainable(model, stage: int) -> list:
    """The named parameters that a stage trains, of a model of either side; the others are frozen."""
    parts = ("projector.", "image_newline")
    if stage == 2:
        parts += ("language_model.",)
    for name, p in model.named_parameters():
        p.requires_grad_(llava.rename_key(name, llava.FROM_PUBLISHED).startswith(parts))
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def make_step_ours(args, model: Llava, inputs: dict, stage: int) -> Callable:
    """A training step as in train.py, in stage 2 with --in-backward, without gradient clipping. The learning
    rate is 1e-7, so that the weights, which both sides share, hardly change."""
    optimizer = train.Adam(select_trainable(model, stage), in_backward=stage == 2, compile=args.compile)
    if hasattr(model, "wrapped"):            # compiled for the other stage, which trains other parameters
        torch.compiler.reset()
    else:
        train.wrap_layers(model, args)
        model.wrapped = True

    def step() -> None:
        optimizer.begin(1e-7)
        model(**inputs).backward()
        optimizer.step()

    return step


def make_step_theirs(args, model, inputs: dict, stage: int, autocast=False) -> Callable:
    """A training step as in transformers' Trainer, without gradient clipping, with the fused AdamW: on bf16
    weights, which are less exact than master weights, or with `autocast` on float32 weights, whose products
    are in bf16."""
    parameters = [p for _, p in select_trainable(model, stage)]
    optimizer = torch.optim.AdamW(parameters, 1e-7, weight_decay=0, fused=True)

    def step() -> None:
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=autocast):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Side(NamedTuple):
    build: Callable
    answer: Callable
    make_step: Callable


SIDES = {"llava.py": Side(build_ours, answer_ours, make_step_ours),
         "transformers": Side(build_theirs, answer_theirs, make_step_theirs)}


def two_steps(args, side: str, model, **options) -> None:
    step = SIDES[side].make_step(args, model, make_inputs(args, args.rows)[side], stage=2, **options)
    step()
    step()                                   # begins with the optimizer's moments in memory


def estimated_peak(args) -> float:
    """GiB that train.py --plan estimates for this step of stage 2, and the memory of an empty process."""
    with torch.device("meta"):
        model = Llava(make_config(args))
    select_trainable(model, 2)
    rows, image_tokens = args.rows, llava.count_image_tokens(model.config, image_size(args))
    load = train.Load(rows * args.tokens, rows * ((args.tokens - image_tokens) // 2),
                      rows * llava.count_tiles(model.config, image_size(args)))
    flags = argparse.Namespace(**vars(args), stage=2, lora_rank=None, lora_vision=False, in_backward=True,
                               card=None, batch_size=rows, micro_batch_size=rows)
    empty, _ = peak_memory(args.device, dict, len)           # imports torch and builds nothing
    return empty + train.estimate_memory(model, load, flags)["peak"] / 2**30


def share_weights(ours: Llava, theirs) -> None:
    """Make the parameters of transformers' model views of ours, so that the weights are in memory once."""
    weights = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        p.data = weights[llava.rename_key(name, llava.FROM_PUBLISHED)].data


def build_sides(args, with_theirs: bool) -> dict:
    """The models of both sides, with the same weights, or ours alone."""
    models = {"llava.py": build_ours(args)}
    if with_theirs:
        from transformers.initialization import no_init_weights
        with no_init_weights():              # writes no weights: there may be room for one model only
            models["transformers"] = build_theirs(args)
        share_weights(*models.values())
    return models


def measure_stage_2(args, sides: list[str]) -> list[list[str]]:
    """Rows of the table: peak memory of a step of stage 2, of each side and as estimated."""
    peaks = []
    for side in tqdm(sides, desc="memory of stage 2", leave=False):
        _, peak = peak_memory(args.device, partial(SIDES[side].build, args), partial(two_steps, args, side))
        peaks.append(peak)
    unused = [""] * (3 if len(sides) == 2 else 0)
    rows = [["step of stage 2, peak, GiB", f"{peaks[0]:.2f}", *unused],
            ["  estimate of --plan", f"{estimated_peak(args):.2f}", *unused]]
    if len(sides) == 2:                      # also with float32 weights, which are as exact as master weights
        float32 = argparse.Namespace(**vars(args) | {"dtype": "float32"})
        _, peak = peak_memory(args.device, partial(build_theirs, float32),
                              partial(two_steps, args, "transformers", autocast=True))
        for name, theirs in (("bf16", peaks[1]), ("float32", peak)):
            rows.append([f"  AdamW on {name} weights", "", f"{theirs:.2f}", f"{theirs / peaks[0]:.2f}", ""])
    return rows


def beside_transformers(args) -> None:
    with_theirs = importlib.util.find_spec("transformers") is not None and not args.alone
    sides = list(SIDES) if with_theirs else ["llava.py"]
    stages = () if args.answers else (1, 2)
    memory_rows = measure_stage_2(args, sides) if stages else []
    one_row, batch, times = make_inputs(args, 1), make_inputs(args, args.rows), {}
    models = build_sides(args, with_theirs)
    if with_theirs:
        ours, theirs = (model(**one_row[side]) for side, model in models.items())
        print(f"loss of the same row: {ours.item():.4f} and {theirs.loss.item():.4f}")
    for name, tokens in (("prefill", 1), (f"answer of {args.answer} tokens", args.answer)):
        runs = {side: partial(SIDES[side].answer, model, one_row[side], tokens)
                for side, model in models.items()}
        times[f"{name}, prompt of {args.tokens}, ms"] = time_in_turns(runs, args.repeats, name)
    for stage in stages:
        runs = {side: SIDES[side].make_step(args, model, batch[side], stage)
                for side, model in models.items()}
        name = f"step of stage {stage}, {args.rows} x {args.tokens}, ms"
        times[name] = time_in_turns(runs, args.repeats, f"stage {stage}")
    comparison = ["times as fast", "range"] if with_theirs else []
    rows = [["", *sides, *comparison]]
    for name, seconds in times.items():
        comparison = ratio(seconds["transformers"], seconds["llava.py"]) if with_theirs else []
        rows.append([name, *map(ms, seconds.values()), *comparison])
    print_table(rows + memory_rows)
    prefill, answer, *steps = (median(seconds["llava.py"]) for seconds in times.values())
    print_utilization(args, models["llava.py"], prefill, answer, steps)


def print_utilization(args, model: Llava, prefill: float, answer: float, steps: list[float]) -> None:
    """Print tokens/s, MFU and bandwidth of llava.py from its seconds. P is the number of weights in the
    layers of the language model: tower, projector and lm_head are not counted. The last layer is counted in
    full, although its MLP runs for some positions only (2% too much with 32 layers). A decode step reads the
    layers and lm_head once."""
    weights = sum(p.numel() for p in model.language_model.layers.parameters())
    head = model.language_model.lm_head.weight
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else ""
    peak = next((tflops for name, tflops in TFLOPS.items() if name in gpu), None)
    for stage, seconds in enumerate(steps, 1):
        speed = args.rows * args.tokens / seconds
        flops_per_weight = 4 if stage == 1 else 6
        tflops = speed * flops_per_weight * weights / 1e12
        mfu = f", MFU {tflops / peak:.1%}" if peak else ""
        print(f"stage {stage}: {speed:,.0f} tokens/s, {tflops:.2f} TFLOP/s at {flops_per_weight}P a token"
              f"{mfu}")
    source = torch.ones(2**29, dtype=torch.int8, device=args.device)
    target = torch.empty_like(source)
    copy = time_in_turns({"copy": partial(target.copy_, source)}, 9, "copy")["copy"]
    bandwidth = 2 * source.nbytes / median(copy)
    speed = (args.answer - 1) / (answer - prefill)
    read = speed * (weights + head.numel()) * head.element_size()
    print(f"decoding: {speed:.1f} tokens/s, {read / 1e9:.1f} GB/s, {read / bandwidth:.0%} of the bandwidth "
          "of a copy")


# ---------------------------------------------------------------------------------------------
# 4. Past the sliding window


def prefill_text(args, tokens: int, model: Llava) -> None:
    answer_ours(model, {"input_ids": torch.full((1, tokens), 5, device=args.device)}, 1)


def band_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Like llava.causal_attention, with a mask: each block of W queries reads the block before it and its own
    through a band mask [W, 2W]."""
    T = q.shape[2]
    band = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device).triu(1).tril(window)
    blocks = [F.scaled_dot_product_attention(*(x[:, :, :window] for x in (q, k, v)), is_causal=True,
                                             enable_gqa=True)]
    for i in range(window, T, window):
        n, keys = min(window, T - i), slice(i - window, i + window)       # the last block may be shorter
        blocks.append(F.scaled_dot_product_attention(
            q[:, :, i:i + n], k[:, :, keys], v[:, :, keys], band[:n, :window + n], enable_gqa=True))
    return torch.cat(blocks, dim=2)


def prefill_with_band(args, tokens: int, model: Llava) -> None:
    llava.causal_attention = band_attention  # runs in a process of its own
    prefill_text(args, tokens, model)


def attend(attention: Callable, qkv: list[Tensor], window: int, training: bool) -> None:
    with torch.set_grad_enabled(training):
        y = attention(*qkv, window)
    if training:
        torch.autograd.grad(y, qkv, torch.ones_like(y))


def past_the_window(args) -> None:
    if args.layers:
        time_long_prefill(args)
    time_window_attention(args)


def time_long_prefill(args) -> None:
    """Print time and memory of prefills of 16,384 and 4,096 tokens, with a window of 512."""
    lengths, build = (16384, 4096), partial(build_ours, args)
    peaks = [peak_memory(args.device, build, partial(prefill_text, args, n)) for n in lengths]
    peaks.append(peak_memory(args.device, build, partial(prefill_with_band, args, lengths[0])))
    model = build()
    long, short, band = (1024 * (after - before) for before, after in peaks)      # MiB
    runs = {f"{n:,} tokens": partial(prefill_text, args, n, model) for n in lengths}
    seconds = time_in_turns(runs, args.repeats, "prefill")
    print_table([["window of 512", *runs, "times as much", "range"],
                 ["prefill, ms", *map(ms, seconds.values()), *ratio(*seconds.values())],
                 ["peak without the model, MiB", f"{long:.0f}", f"{short:.0f}", f"{long / short:.2f}", ""],
                 ["  with a band mask", f"{band:.0f}", "", "", ""]])


def time_window_attention(args) -> None:
    W = 4096 // args.shrink
    qkv = [torch.randn(1, 2 * W, heads, 128).to(args.device, getattr(torch, args.dtype)).transpose(1, 2)
           for heads in (8, 2, 2)]
    rows = [[f"attention, window {W:,}, {2 * W:,} tokens", "llava.py", "band mask", "times as fast", "range"]]
    for name, training in (("forward, ms", False), ("forward and backward, ms", True)):
        qkv = [x.detach().requires_grad_(training) for x in qkv]
        runs = {"llava.py": partial(attend, llava.causal_attention, qkv, W, training),
                "band mask": partial(attend, band_attention, qkv, W, training)}
        seconds = time_in_turns(runs, args.repeats, name)
        ours, band = seconds.values()
        rows.append([name, ms(ours), ms(band), *ratio(band, ours)])
    print_table(rows)


# ---------------------------------------------------------------------------------------------
# 5. Token reduction


@torch.inference_mode()
def with_reduction(args) -> None:
    model, inputs = build_ours(args), make_inputs(args, 1)["llava.py"]
    tile, states = inputs["images"][0], model.vision_tower(inputs["images"][0])
    spread_attention(model, states)
    methods = ("none", "prumerge", "prumerge+")
    features = {name: model.encode_images(inputs["images"], prune=name)[0] for name in methods}
    time_reductions(args, model, tile, states, features["none"])
    decoder, text_tokens = model.language_model, args.tokens - len(features["none"])

    def prefill(method: str) -> None:
        x = torch.cat((features[method], features["none"][:text_tokens]))[None]
        lengths = torch.tensor([x.shape[1]], device=x.device)
        decoder.prefill(x, [llava.KVCache(x.shape[1], lengths, None) for _ in decoder.layers], None)

    def answer(tokens: int, method: str) -> None:
        model.config = replace(model.config, prune=method)
        answer_ours(model, inputs, tokens)

    rows = [["", *methods, *(f"times as fast: {method}" for method in methods[1:])],
            ["image tokens", *(str(len(f)) for f in features.values()), "", ""]]
    for name, run in (("prefill of the language model", prefill), ("first token", partial(answer, 1)),
                      (f"answer of {args.answer} tokens", partial(answer, args.answer))):
        seconds = time_in_turns({method: partial(run, method) for method in methods}, args.repeats, name)
        faster = [ratio(seconds["none"], seconds[method])[0] for method in methods[1:]]
        rows.append([f"{name}, ms", *map(ms, seconds.values()), *faster])
    print_table(rows)


def time_reductions(args, model: Llava, tile: Tensor, states: Tensor, projected: Tensor) -> None:
    """Print the time of each reduction of one tile to 64 tokens, or PruMerge's number, beside the tower's."""
    patches = states[0, 1:]
    runs = {"tower": lambda: model.vision_tower(tile),
            "prumerge": partial(reduce_by_prumerge, model, states, "prumerge"),
            "prumerge+": partial(reduce_by_prumerge, model, states, "prumerge+"),
            "random": lambda: patches[llava.random_patches(tile[0], 64, len(patches))],
            "pool": lambda: llava.pool_patches(patches, 64),
            "divprune": lambda: llava.diverse_patches(projected, 64)}
    times = time_in_turns(runs, args.repeats, "reductions")
    rows = [["one tile", "ms", "of the tower's time"]]
    for name, seconds in times.items():
        rows.append([name, ms(seconds), f"{median(seconds) / median(times['tower']):.2%}"])
    print_table(rows)


def reduce_by_prumerge(model: Llava, states: Tensor, method: str) -> None:
    (attention,), (keys,) = model.cls_attention(states)
    llava.prumerge(attention, keys, **llava.PRUMERGE[method]) @ states[0, 1:]


def spread_attention(model: Llava, states: Tensor) -> None:
    """Scale the queries of the last layer until the logarithm of the attention has a standard deviation of
    0.9: about 7% of 576 patches are then PruMerge's outliers. A random tower's attention is uniform."""
    query = model.vision_tower.layers[-1].self_attn["q_proj"]
    factor = 0.9 / model.cls_attention(states)[0].float().log().std()
    query.weight *= factor
    query.bias *= factor


# ---------------------------------------------------------------------------------------------
# 6. Saving and opening


def saving_and_opening(args) -> None:
    """Print, for a checkpoint of random weights: the memory to save it in shards, to open it, and to answer;
    memory and time to open it in 8 and 4 bits; the time to open it with and without a cast."""
    shard = 3 * 10**8
    with tempfile.TemporaryDirectory() as folder:
        save = partial(Llava.save_pretrained, folder=folder, shard_bytes=shard)
        built, saved = peak_memory(args.device, partial(build_ours, args), save)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 2**30
        shards = (saved - built) * 2**30 / shard
        print(f"{size:.2f} GiB of weights, saved in shards of {shard / 2**30:.2f} GiB: at the peak "
              f"{saved - built:.2f} GiB, {shards:.2f} shards, more than the model", flush=True)
        open_quantized(folder)
        open_as_stored = partial(Llava.from_pretrained, folder, dtype=getattr(torch, args.dtype),
                                 device=args.device)
        answer = partial(answer_four_tokens, without_labels(make_inputs(args, 1)["llava.py"]))
        opened, answered = peak_memory(args.device, open_as_stored, answer)
        print(f"{opened:.2f} GiB at the peak of opening, {answered:.2f} after an answer: "
              f"{answered / size:.3f} of the size of the weights")
        rows = [["open, read all weights, ms", "with a cast", "as stored", "times as long", "range"]]
        for name, cached in (("from the page cache", True), ("from the disk", False)):
            runs = {dtype: partial(open_and_read, folder, dtype, args.device, cached)
                    for dtype in (torch.float16, getattr(torch, args.dtype))}
            seconds = time_in_turns(runs, args.repeats, f"opening {name}")
            rows.append([name, *map(ms, seconds.values()), *ratio(*seconds.values())])
    print_table(rows)


def open_quantized(folder: str) -> None:
    """Print seconds and peak memory to open a checkpoint in 8 and in 4 bits, without mapped pages."""
    for quantize in ("int8", "int4"):
        open_model = partial(Llava.from_pretrained, folder, dtype=torch.bfloat16, quantize=quantize)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            seconds, memory = process.submit(watch_memory, open_model).result()
        print(f"opened in {quantize} in {seconds:.1f} s, {memory:.2f} GiB of anonymous memory at the peak",
              flush=True)


def watch_memory(work: Callable) -> tuple[float, float]:
    """Seconds of work(), and the peak GiB of anonymous memory (Linux), read every 10 ms."""
    memory, done = [], threading.Event()

    def watch() -> None:
        while not memory or not done.wait(0.01):         # at least one reading
            status = Path("/proc/self/status").read_text()
            memory.append(int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 2**20)

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        work()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    return seconds, max(memory)


def open_and_read(folder: str, dtype: torch.dtype, device: str, cached: bool) -> None:
    """Open a checkpoint and read all weights, because a mapped file is read only when it is used."""
    if not cached:
        for path in Path(folder).glob("*.safetensors"):
            with open(path, "rb") as file:   # remove its pages from the page cache (Linux)
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for weight in Llava.from_pretrained(folder, dtype=dtype, device=device).parameters():
        weight.view(torch.int16).amax()


def answer_four_tokens(inputs: dict, model: Llava) -> None:
    list(model.eval().generate(**inputs, max_new_tokens=4, eos_token_id=None))


# ---------------------------------------------------------------------------------------------
# 7. Weights in 8 and 4 bits


def quantized_copy(model: Llava, quantize: str) -> Llava:
    """A copy of a model with the linear layers of its language model in 8 or 4 bits."""
    state = {}
    with torch.device("meta"):
        copy = Llava(model.config)
    for name, tensor in tqdm(model.state_dict().items(), quantize, leave=False):
        llava.place_tensor(copy, state, name, tensor, quantize, tensor.device, torch.bfloat16)
    copy.load_state_dict(state, assign=True)
    return copy.eval()


def time_answer(model: Llava, inputs: dict, tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, and of each decode step of an answer of `tokens`."""
    start = time.perf_counter()
    answer = model.generate_tokens(**without_labels(inputs), max_new_tokens=tokens)
    next(answer)
    synchronize()
    first = time.perf_counter()
    list(answer)
    synchronize()
    return first - start, (time.perf_counter() - first) / (tokens - 1)


def time_answers(runs: dict[str, Callable], repeats: int) -> dict[str, tuple]:
    """Seconds of the prefill in each turn, and of a decode step, for each run; a run returns both."""
    return {name: tuple(zip(*pairs)) for name, pairs in take_turns(runs, repeats, "answers").items()}


def with_quantization(args) -> None:
    model, inputs = build_ours(args), make_inputs(args, 1)["llava.py"]
    models = {args.dtype: model}
    for quantize in args.bits:
        start = time.perf_counter()
        models[quantize] = quantized_copy(model, quantize)
        print(f"quantized to {quantize} in {time.perf_counter() - start:.1f} s")
    runs = {name: partial(time_answer, model, inputs, args.answer) for name, model in models.items()}
    times = time_answers(runs, args.repeats)
    rows = [["", "weights, GB", f"prefill of {args.tokens}, ms", "times as long", "range",
             "a decode step, ms", "times as fast", "range"]]
    base_prefill, base_step = times[args.dtype]
    for name, (prefill, step) in times.items():
        decoder = models[name].language_model
        size = llava.count_weights(decoder)[1] - decoder.embed_tokens.weight.nbytes
        rows.append([name, f"{size / 1e9:.2f}", ms(prefill), *ratio(prefill, base_prefill), ms(step),
                     *ratio(base_step, step)])
    print_table(rows)


def beside_llama_cpp(args) -> None:
    """Print the time of a text prompt and an answer in int4, beside llama.cpp with all matrices in Q4_0. Its
    lm_head has 4 bits, ours 8; it rounds activations to 8 bits, ours are in bf16."""
    from llama_cpp import Llama
    model = quantized_copy(build_ours(args), "int4")
    ids = torch.randint(3, 32000, (1, args.tokens))
    prompt, threads = ids[0].tolist(), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(args, Path(folder) / "random.gguf")
        theirs = Llama(f"{folder}/random.gguf", n_ctx=args.tokens + args.answer, n_batch=args.tokens,
                       n_ubatch=args.tokens, n_threads=threads, n_threads_batch=threads, verbose=False)
    # Its file stays mapped although it is deleted now (Linux, macOS).

    def answer_llama_cpp() -> tuple[float, float]:
        theirs.reset()
        start = time.perf_counter()
        theirs.eval(prompt)
        first = time.perf_counter()
        for _ in range(args.answer - 1):     # any token: the time does not depend on it
            theirs.eval(prompt[:1])
        return first - start, (time.perf_counter() - first) / (args.answer - 1)

    runs = {"llava.py": partial(time_answer, model, {"input_ids": ids}, args.answer),
            "llama.cpp": answer_llama_cpp}
    (our_prefill, our_step), (their_prefill, their_step) = time_answers(runs, args.repeats).values()
    our_answer, their_answer = ([first + (args.answer - 1) * step for first, step in zip(prefill, steps)]
                                for prefill, steps in ((our_prefill, our_step), (their_prefill, their_step)))
    rows = [["", *runs, "times as long", "range"]]
    for name, ours, other in ((f"prefill of {args.tokens}, ms", our_prefill, their_prefill),
                              ("a decode step, ms", our_step, their_step),
                              (f"answer of {args.answer} tokens, ms", our_answer, their_answer)):
        rows.append([name, ms(ours), ms(other), *ratio(ours, other)])
    print_table(rows)


# llama.cpp's names of tensors -> those of Hugging Face's LLaMA
FROM_GGUF = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm", "token_embd": "embed_tokens", "output_norm": "norm",
             "output": "lm_head"}


def write_gguf(args, file: Path) -> None:
    """Write a language model of random weights as llama.cpp reads it, its matrices in Q4_0."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
    text, writer = make_config(args).text, GGUFWriter(file, "llama")
    to_gguf = {theirs: name for name, theirs in FROM_GGUF.items()}
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(text.rope_theta)
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]       # llama.cpp needs that of the line feed
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*byte_tokens, *(f"token {i}" for i in range(256, text.vocab_size))])
    writer.add_token_scores([0.0] * text.vocab_size)
    writer.add_token_types([TokenType.BYTE] * 256 + [TokenType.NORMAL] * (text.vocab_size - 256))
    with torch.device("meta"):
        model = llava.LanguageModel(text)
    for name, p in tqdm(model.named_parameters(), "writing GGUF", leave=False):
        _, layer, module = re.fullmatch(r"(layers\.(\d+)\.)?(.+)\.weight", name).groups()
        prefix = f"blk.{layer}." if layer else ""
        name = f"{prefix}{to_gguf[module]}.weight"
        if p.dim() == 1:
            writer.add_tensor(name, np.ones(p.shape, np.float32))
            continue
        w = torch.randn(p.shape).mul_(p.shape[1] ** -0.5).numpy()
        w = quants.quantize(w, GGMLQuantizationType.Q4_0)
        writer.add_tensor(name, w, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure_language_model(args) -> None:
    print_layer_errors(args)
    print_perplexities(args)


def open_decoder(folder: Path, quantize: str, dtype: torch.dtype, shuffle=False) -> llava.LanguageModel:
    """The language model of a folder. With `shuffle` the columns of int4 weights are shuffled before
    they are quantized and put back afterwards, so that weights that were published in groups of 32
    do not fall into the same groups again. The layers are then ordinary ones of dequantized weights."""
    (config, stored, _), state = llava.open_checkpoint(str(folder)), {}
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"language_model": llava.LanguageModel(config["text"])})
    generator = torch.Generator().manual_seed(0)
    for name, stored_tensor in tqdm(stored.items(), f"opening in {quantize}", leave=False):
        if not name.startswith("language_model."):
            continue
        tensor, quantize_tensor = stored_tensor.read(None), quantize
        if shuffle and re.fullmatch(llava.QUANTIZED, name) and "lm_head" not in name:
            order = torch.randperm(tensor.shape[1], generator=generator)
            layer = llava.QuantizedLinear(tensor[:, order], 4)
            tensor, quantize_tensor = dequantize(layer)[:, order.argsort()], "none"
        llava.place_tensor(model, state, name, tensor, quantize_tensor, "cpu", dtype)
    model.load_state_dict(state, assign=True)
    return model["language_model"].eval()


def dequantize(layer: llava.QuantizedLinear) -> Tensor:
    """The weight [O, I] of a layer in 4 bits."""
    starts = range(0, layer.out_features, layer.block_rows)
    return torch.cat([layer.block(start, torch.float32) for start in starts], 1).T


@torch.inference_mode()
def print_layer_errors(args) -> None:
    """Print the mean relative error of the outputs of each kind of layer, for inputs from N(0, 1)."""
    errors: dict[str, dict[str, list]] = {}                               # [kind of layer][bits]
    exact = dict(open_decoder(args.model, "none", torch.float32).named_modules())
    for quantize in ("int8", "int4"):
        for name, layer in open_decoder(args.model, quantize, torch.float32).named_modules():
            if isinstance(layer, llava.QuantizedLinear):
                x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
                y, approximate = exact[name](x), layer(x)
                kind = errors.setdefault(name.split(".")[-1], {})
                kind.setdefault(quantize, []).append(((y - approximate).norm() / y.norm()).item())
    rows = [["relative error of the outputs", "int8", "int4"]]
    for kind, of_bits in errors.items():
        rows.append([kind, *(f"{sum(e) / len(e):.4f}" for e in of_bits.values())])
    print_table(rows)


@torch.inference_mode()
def perplexity(decoder: llava.LanguageModel, ids: Tensor) -> float:
    """exp of the mean loss over all next tokens of the rows ids [n, T]."""
    total = 0.0
    for row in tqdm(ids, "perplexity", leave=False):
        hidden = decoder(decoder.embed_tokens(row[None, :-1]))[0]
        for states, targets in zip(hidden.split(512), row[1:].split(512)):
            logits = decoder.lm_head(states).float()
            total += F.cross_entropy(logits, targets, reduction="sum").item()
    return math.exp(total / ids[:, 1:].numel())


def print_perplexities(args) -> None:
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    ids = torch.cat([torch.tensor(tokenizer.encode(file.read_text()).ids[:2048 * args.pieces])
                     for file in args.text])
    if len(ids) < 2048:
        raise llava.UserError(f"--text has {len(ids)} tokens, but a row has 2,048: give more text")
    ids = ids[:len(ids) // 2048 * 2048].view(-1, 2048)
    print(f"perplexity of {ids.numel():,} tokens in rows of 2,048, computed in {args.dtype}")
    dtype, exact = getattr(torch, args.dtype), None
    runs = [(args.dtype, "none", FITS, False), ("int8", "int8", FITS, False), ("int4", "int4", FITS, False),
            *((f"int4, columns shuffled, {fits} fits", "int4", fits, True) for fits in (0, 2, 3, 5))]
    for name, quantize, fits, shuffle in runs:
        llava.FITS = fits
        value = perplexity(open_decoder(args.model, quantize, dtype, shuffle), ids)
        if exact is None:
            exact = value
        print(f"{name:32}{value:8.3f}   x {value / exact:.4f}", flush=True)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a LLaMA of llama.cpp in Hugging Face's layout, in float32. llama.cpp pairs rotated
    dimensions (2i, 2i + 1), so the rows of q and k are put back into their order."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    reader, tensors = GGUFReader(file), {}
    field = {name.removeprefix("llama."): f.contents() for name, f in reader.fields.items()}
    heads = {"attn_q": field["attention.head_count"], "attn_k": field["attention.head_count_kv"]}
    for tensor in tqdm(reader.tensors, "converting"):
        *layer, kind = tensor.name.removeprefix("blk.").removesuffix(".weight").split(".")
        w = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        if kind in heads:
            w = w.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
        prefix = "model."
        if kind == "output":
            prefix = ""
        elif layer:
            prefix = f"model.layers.{layer[0]}."
        tensors[f"{prefix}{FROM_GGUF[kind]}.weight"] = w.contiguous()
    vocabulary = field["tokenizer.ggml.tokens"]
    llava.write_json(folder / "config.json", {
        "model_type": "llama", "vocab_size": len(vocabulary), "hidden_size": field["embedding_length"],
        "intermediate_size": field["feed_forward_length"], "num_hidden_layers": field["block_count"],
        "num_attention_heads": heads["attn_q"], "num_key_value_heads": heads["attn_k"],
        "rms_norm_eps": field["attention.layer_norm_rms_epsilon"], "rope_theta": field["rope.freq_base"],
        "max_position_embeddings": field["context_length"], "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    merges = [tuple(pair.split(" ")) for pair in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


# ---------------------------------------------------------------------------------------------
# 8. The command line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, llava.number(int, 1)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--window", action="store_true", help="attention and prefill past the sliding window")
    mode.add_argument("--prune", action="store_true", help="token reduction")
    mode.add_argument("--load", action="store_true", help="saving and opening a checkpoint")
    mode.add_argument("--quantize", action="store_true", help="weights in 8 and 4 bits")
    mode.add_argument("--alone", action="store_true", help="without transformers, whose model may not fit")
    add("--layers", type=int, default=4, metavar="N",
        help="of the language model (default: %(default)s; all: 32; 0 with --window: attention only)")
    add("--vision-layers", type=count, default=24, metavar="N",
        help="of the tower (default: all, %(default)s)")
    add("--anyres", action="store_true", help="an image of four tiles, 2,928 tokens instead of 576")
    add("--tokens", type=int, metavar="T", help="of image and text (default: 64 of text; --prune: 52)")
    add("--answer", type=llava.number(int, 2), default=33, metavar="N",
        help="tokens of an answer (default: %(default)s)")
    add("--answers", action="store_true", help="no training, for models whose optimizers do not fit")
    add("--rows", type=count, default=2, metavar="B", help="of a training step (default: %(default)s)")
    add("--checkpoint-blocks", type=int, default=0, metavar="N", help="of llava.py (default: %(default)s)")
    add("--compile", action="store_true", help="compile llava.py's layers and optimizer in training")
    add("--repeats", type=count, default=5, metavar="N", help="turns that count (default: %(default)s)")
    add("--shrink", type=int, default=1, choices=(1, 2, 4, 8, 16), help="divide all widths, for a trial")
    add("--bits", nargs="+", default=("int8", "int4"), choices=("int8", "int4"),
        help="with --quantize (default: both; with 32 layers, 24 GB hold bfloat16 and one of them)")
    add("--llama-cpp", action="store_true", help="with --quantize: int4 and text only, beside llama.cpp")
    add("--model", type=Path, metavar="FOLDER", help="with --quantize: a language model to measure")
    add("--text", type=Path, nargs="+", metavar="FILE", help="with --model: text for its perplexity")
    add("--pieces", type=int, default=1, metavar="N", help="read N x 2,048 tokens of a text (default: 1)")
    add("--gguf", type=Path, metavar="FILE", help="first convert this file of llama.cpp into --model")
    devices = [device for device in llava.devices() if device != "mps"]   # synchronize() does not know mps
    add("--device", choices=devices, default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: %(default)s")
    args = parser.parse_args()
    image_tokens = llava.count_image_tokens(make_config(args), image_size(args))
    if args.tokens is None:
        args.tokens = image_tokens + (52 if args.prune else 64)
    if args.tokens < image_tokens + 2 and not (args.llama_cpp or args.window):    # these read no image
        parser.error(f"--tokens must be at least {image_tokens + 2}: {image_tokens} of the image, 2 of text")
    if args.anyres and (args.prune or args.window):
        parser.error("--anyres does not work with --prune or --window")
    if not args.layers and not args.window:
        parser.error("--layers 0 is for --window")
    suitable = args.quantize and not args.model and args.device == "cpu" and args.dtype == "bfloat16"
    if args.llama_cpp and not suitable:
        parser.error("--llama-cpp needs --quantize without --model, --device cpu and --dtype bfloat16")
    packages = {"gguf": args.gguf or args.llama_cpp, "llama_cpp": args.llama_cpp}
    for package, needed in packages.items():
        if needed and importlib.util.find_spec(package) is None:
            parser.error(f"install the package {package.replace('llama_cpp', 'llama-cpp-python')}")
    if args.gguf and not args.model:
        parser.error("--gguf needs --model, the folder to write")
    if args.quantize and args.model and not args.text:
        parser.error("--model needs --text, one or more files")
    return args


def main() -> None:
    args, load = parse_args(), os.getloadavg()[0]
    if args.gguf:
        convert_gguf(args.gguf, args.model)
        if not args.quantize:
            return
    torch.manual_seed(0)
    gpu = args.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}, {args.dtype}, {args.layers} layers of the language model, "
          f"{args.vision_layers} of the tower, {args.repeats} turns")
    if args.window:
        past_the_window(args)
    elif args.prune:
        with_reduction(args)
    elif args.load:
        saving_and_opening(args)
    elif args.quantize and args.model:
        measure_language_model(args)
    elif args.quantize and args.llama_cpp:
        beside_llama_cpp(args)
    elif args.quantize:
        with_quantization(args)
    else:
        beside_transformers(args)
    if not gpu:
        print(f"load of the machine: {load:.1f} before, {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    llava.command_line(main)
