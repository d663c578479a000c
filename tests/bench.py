"""How fast, and in how much memory: llava.py and train.py on random weights in the shapes of
CLIP-L/14-336 and of the first layers of Mistral-7B.

    python tests/bench.py                    answers and training steps, beside transformers
    python tests/bench.py --window           tokens past the window, in time and memory
    python tests/bench.py --prune            what fewer visual tokens save
    python tests/bench.py --load --layers 32 memory to save and open a whole checkpoint
    python tests/bench.py --quantize         the language model in 8 and 4 bits; with --model FOLDER
                                             --text FILE its perplexity, too
    python tests/bench.py --gguf FILE --model FOLDER       converts a LLaMA to FOLDER (package gguf)
    python tests/bench.py --layers 1 --vision-layers 2 --repeats 1 --shrink 16     a trial, in seconds

What is compared takes turns, --repeats of them after one that warms up, so that other work on the
machine disturbs all alike. A time is the median of the turns, a ratio the median of each turn's
ratio, with the lowest and the highest beside it.
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

TFLOPS = {"A100": 312, "H100": 989, "H200": 989}         # dense bf16, as the data sheets have it


# ---------------------------------------------------------------------------------------------
# 1. Clock, memory, table


def paired(runs: dict[str, Callable], repeats: int, what: str) -> dict[str, list[float]]:
    """Seconds of each run, turn by turn; every other turn goes backwards, the first does not count."""
    seconds = {name: [] for name in runs}
    for turn in tqdm(range(1 + repeats), desc=what, leave=False):
        for name in list(runs)[::(-1) ** turn]:
            wait()
            began = time.perf_counter()
            runs[name]()
            wait()
            seconds[name].append(time.perf_counter() - began)
    return {name: taken[1:] for name, taken in seconds.items()}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peaks(device: str, build: Callable, work: Callable) -> tuple[float, float]:
    """The most GiB that a fresh process held up to the end of model = build(), and of work(model):
    on a GPU what torch took of it, on a CPU the whole process. A new process inherits the peak of
    the one that starts it, so ask before anything large is here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure_peaks, device, build, work).result()


def measure_peaks(device: str, build: Callable, work: Callable) -> tuple[float, float]:
    def peak() -> float:
        if device.startswith("cuda"):
            return torch.cuda.max_memory_allocated() / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    model = build()
    before = peak()
    work(model)
    return before, peak()


def table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print(f"{first:{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(others, widths[1:])), sep="   ")


def ms(seconds: list[float]) -> str:
    return f"{1e3 * median(seconds):,.1f}"


def ratio(these: list[float], those: list[float]) -> list[str]:
    """How many times these are as large as those, and the range of it."""
    ratios = [a / b for a, b in zip(these, those)]
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
    return llava.LlavaConfig(vision, text)


def make_inputs(args, rows: int) -> dict[str, dict]:
    """The same rows for both: <s>, a picture, words, of which the second half is learned. Ours has
    one id for the picture, transformers' one for each of its patches."""
    config = make_config(args)
    P, S = config.vision.side**2, config.vision.image_size
    pixels = torch.randn(rows, 3, S, S).to(args.device, getattr(torch, args.dtype))
    ids = torch.randint(3, 32000, (rows, args.tokens - P + 1), device=args.device)
    ids[:, 1] = config.image_token_id
    labels = ids.clone()
    labels[:, :-((args.tokens - P) // 2)] = llava.IGNORE
    times = torch.tensor([1, P] + [1] * (ids.shape[1] - 2), device=args.device)
    return {"llava.py": {"input_ids": ids, "labels": labels, "images": list(pixels[:, None]),
                         "image_sizes": [(S, S)] * rows},
            "transformers": {"input_ids": ids.repeat_interleave(times, 1), "pixel_values": pixels,
                             "labels": labels.repeat_interleave(times, 1)}}


def question(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name != "labels"}


def randomly(args, construct: Callable):
    """The model that construct() gives, on the device and in the type of args."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            return construct().requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(usual)


# ---------------------------------------------------------------------------------------------
# 3. Beside transformers


def build_ours(args) -> Llava:
    return randomly(args, partial(Llava, make_config(args)))


def build_theirs(args):
    from transformers import AutoConfig, AutoModelForImageTextToText
    config = AutoConfig.for_model(**llava.hf_config(make_config(args), whole=True))
    return randomly(args, partial(AutoModelForImageTextToText.from_config, config,
                                  dtype=getattr(torch, args.dtype)))


def answer_ours(model: Llava, inputs: dict, n: int) -> None:
    list(model.generate(**question(inputs), max_new_tokens=n, eos_token_id=None))


@torch.inference_mode()
def answer_theirs(model, inputs: dict, n: int) -> None:
    if n == 1:                               # spared what generate costs besides
        model(**question(inputs), use_cache=True, logits_to_keep=1)
    else:
        model.generate(**question(inputs), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                       pad_token_id=0)


def let_learn(model, stage: int) -> list:
    """The named parameters that learn in a stage, of either side's model."""
    parts = ("projector.",) + ("language_model.",) * (stage == 2)
    for name, p in model.named_parameters():
        p.requires_grad_(llava.rename_key(name, llava.FROM_PUBLISHED).startswith(parts))
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def learn_ours(args, model: Llava, inputs: dict, stage: int) -> Callable:
    """A step as in train.py, in stage 2 with --in-backward. Its lr is next to none: weights are shared."""
    optimizer = train.Adam(let_learn(model, stage), in_backward=stage == 2, compile=args.compile)
    if hasattr(model, "wrapped"):            # by the other stage, in which other weights learn
        torch.compiler.reset()
    else:
        train.wrap_layers(model, args)
        model.wrapped = True

    def step() -> None:
        optimizer.begin(1e-7)
        model(**inputs).backward()
        optimizer.step()

    return step


def learn_theirs(args, model, inputs: dict, stage: int, mixed=False) -> Callable:
    """As Trainer does, with the fused AdamW: all in bf16, which learns less exactly than ours, or
    `mixed`: bf16 products of float32 weights."""
    optimizer = torch.optim.AdamW([p for _, p in let_learn(model, stage)], 1e-7, weight_decay=0, fused=True)

    def step() -> None:
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=mixed):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Side(NamedTuple):
    build: Callable
    answer: Callable
    learn: Callable


SIDES = {"llava.py": Side(build_ours, answer_ours, learn_ours),
         "transformers": Side(build_theirs, answer_theirs, learn_theirs)}


def two_steps(args, name: str, model, **how) -> None:
    step = SIDES[name].learn(args, model, make_inputs(args, args.rows)[name], stage=2, **how)
    step()
    step()                                   # the moments are there from its beginning


def estimated_peak(args) -> float:
    """The GiB that train.py --plan expects of the same step, and an empty process."""
    with torch.device("meta"):
        sketch = Llava(make_config(args))
    let_learn(sketch, 2)
    learned, rows = (args.tokens - sketch.config.vision.side**2) // 2, args.rows
    load = train.Load(rows * args.tokens, rows * learned, rows)
    flags = argparse.Namespace(**vars(args), stage=2, lora_rank=None, lora_vision=False, in_backward=True,
                               card=None, batch_size=rows, micro_batch_size=rows)
    empty, _ = peaks(args.device, dict, len)
    return empty + train.estimate_memory(sketch, load, flags)["peak"] / 2**30


def share_weights(ours: Llava, theirs) -> None:
    """Theirs becomes the same numbers in the same memory: there is room, and nothing else differs."""
    weights = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        p.data = weights[llava.rename_key(name, llava.FROM_PUBLISHED)].data


def beside_transformers(args) -> None:
    both = bool(importlib.util.find_spec("transformers")) and not args.alone
    names = list(SIDES) if both else ["llava.py"]
    sizes, stages = [], () if args.answers else (1, 2)
    for name in tqdm(names if stages else (), desc="stage-2 memory", leave=False):
        sizes.append(peaks(args.device, partial(SIDES[name].build, args), partial(two_steps, args, name)))
    if both and stages:                      # also the one that learns as exactly as ours
        exactly = argparse.Namespace(**vars(args) | {"dtype": "float32"})
        sizes.append(peaks(args.device, partial(build_theirs, exactly),
                           partial(two_steps, args, "transformers", mixed=True)))
    plan = estimated_peak(args) if stages else 0
    one, few, taken = make_inputs(args, 1), make_inputs(args, args.rows), {}
    models = {"llava.py": build_ours(args)}
    if both:
        from transformers.initialization import no_init_weights
        with no_init_weights():              # its memory stays untouched: there may be room for one only
            models["transformers"] = build_theirs(args)
        share_weights(*models.values())
        ours, theirs = (model(**one[name]) for name, model in models.items())
        print(f"loss of the same row: {ours.item():.4f} and {theirs.loss.item():.4f}")
    for what, n in (("prefill", 1), (f"{args.answer}-token answer", args.answer)):
        runs = {name: partial(SIDES[name].answer, model, one[name], n) for name, model in models.items()}
        taken[f"{what} of {args.tokens}, ms"] = paired(runs, args.repeats, what)
    for stage in stages:
        runs = {name: SIDES[name].learn(args, model, few[name], stage) for name, model in models.items()}
        what = f"stage-{stage} step of {args.rows} x {args.tokens}, ms"
        taken[what] = paired(runs, args.repeats, f"stage {stage}")
    rows = [["", *names, *["times", "range"] * both]]
    for what, t in taken.items():
        rows.append([what, *map(ms, t.values()), *(ratio(t["transformers"], t["llava.py"]) if both else ())])
    empty = ["", "", ""] if both else []
    if stages:
        ours = sizes[0][1]
        rows.append(["stage-2 step, peak, GiB", f"{ours:.2f}", *empty])
        rows.append(["  estimate of --plan", f"{plan:.2f}", *empty])
    for what, (_, size) in zip(("  AdamW on bf16 weights", "  AdamW on float32 weights"), sizes[1:]):
        rows.append([what, "", f"{size:.2f}", f"{size / ours:.2f}", ""])
    table(rows)
    efficiency(args, models["llava.py"], *(median(t["llava.py"]) for t in taken.values()))


def efficiency(args, model: Llava, first: float, answer: float, *steps: float) -> None:
    """How much of the machine llava.py uses. P counts the decoder's blocks alone: the tower, the
    projector and lm_head work unpaid, and what the last block leaves out counts as done (2% of 32 blocks).
    A decoded token reads the blocks and lm_head once."""
    blocks = sum(p.numel() for p in model.language_model.layers.parameters())
    head = model.language_model.lm_head.weight
    card = torch.cuda.get_device_name() if args.device.startswith("cuda") else ""
    most = next((tflops for name, tflops in TFLOPS.items() if name in card), None)
    for stage, seconds in enumerate(steps, 1):
        speed, passes = args.rows * args.tokens / seconds, 4 if stage == 1 else 6
        used = speed * passes * blocks / 1e12
        share = f", MFU {used / most:.1%}" if most else ""
        print(f"stage {stage}: {speed:,.0f} tokens/s, {used:.2f} TFLOP/s at {passes}P{share}")
    source = torch.ones(2**29, dtype=torch.int8, device=args.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / median(paired({"": partial(target.copy_, source)}, 9, "copy")[""])
    speed = (args.answer - 1) / (answer - first)
    read = speed * (blocks + head.numel()) * head.element_size()
    print(f"decoding: {speed:.1f} tokens/s, {read / 1e9:.1f} GB/s, {read / copied:.0%} of those of a copy")


# ---------------------------------------------------------------------------------------------
# 4. Beyond the window


def prefill_words(args, tokens: int, model: Llava) -> None:
    answer_ours(model, {"input_ids": torch.full((1, tokens), 5, device=args.device)}, 1)


def band_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """What llava.py's two triangles are compared with: each block of W queries reads the block before
    and its own through a band mask [W, 2W]."""
    T = q.shape[2]
    band = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device).triu(1).tril(window)
    blocks = [F.scaled_dot_product_attention(*(x[:, :, :window] for x in (q, k, v)), is_causal=True,
                                             enable_gqa=True)]
    for i in range(window, T, window):
        n, seen = min(window, T - i), slice(i - window, i + window)       # the last may be short
        blocks.append(F.scaled_dot_product_attention(
            q[:, :, i:i + n], k[:, :, seen], v[:, :, seen], band[:n, :window + n], enable_gqa=True))
    return torch.cat(blocks, dim=2)


def prefill_with_band(args, tokens: int, model: Llava) -> None:
    llava.causal_attention = band_attention                               # in a process of its own
    prefill_words(args, tokens, model)


def attend(attention: Callable, qkv: list[Tensor], window: int, training: bool) -> None:
    with torch.set_grad_enabled(training):
        y = attention(*qkv, window)
    if training:
        torch.autograd.grad(y, qkv, torch.ones_like(y))


def beyond_the_window(args) -> None:
    if args.layers:
        window_growth(args)
    window_attention(args)


def window_growth(args) -> None:
    lengths, build = (16384, 4096), partial(build_ours, args)
    sizes = [peaks(args.device, build, partial(prefill_words, args, n)) for n in lengths]
    sizes.append(peaks(args.device, build, partial(prefill_with_band, args, lengths[0])))
    model, (most, least, band) = build(), [1024 * (after - before) for before, after in sizes]
    taken = paired({str(n): partial(prefill_words, args, n, model) for n in lengths}, args.repeats, "prefill")
    table([["window of 512", *(f"{n:,} tokens" for n in lengths), "times", "range"],
           ["prefill, ms", *map(ms, taken.values()), *ratio(*taken.values())],
           ["peak less the model, MiB", f"{most:.0f}", f"{least:.0f}", f"{most / least:.2f}", ""],
           ["  with a band mask", f"{band:.0f}", "", "", ""]])


def window_attention(args) -> None:
    W = 4096 // args.shrink
    qkv = [torch.randn(1, 2 * W, heads, 128).to(args.device, getattr(torch, args.dtype)).transpose(1, 2)
           for heads in (8, 2, 2)]
    rows = [[f"attention: window {W:,}, {2 * W:,} tokens", "two triangles", "band mask", "times", "range"]]
    for what, training in (("forward, ms", False), ("forward and backward, ms", True)):
        qkv = [x.detach().requires_grad_(training) for x in qkv]
        runs = {name: partial(attend, attention, qkv, W, training)
                for name, attention in (("triangles", llava.causal_attention), ("band", band_attention))}
        taken = paired(runs, args.repeats, what)
        rows.append([what, *map(ms, taken.values()), *ratio(taken["band"], taken["triangles"])])
    table(rows)


# ---------------------------------------------------------------------------------------------
# 5. With fewer visual tokens


@torch.inference_mode()
def with_pruning(args) -> None:
    words = args.tokens - make_config(args).vision.side**2
    model, inputs = build_ours(args), make_inputs(args, 1)["llava.py"]
    decoder, config, pixels = model.language_model, model.config, inputs["images"][0]
    states = model.vision_tower(pixels)
    spread_attention(model, states)
    names = ("none", "prumerge", "prumerge+")
    features = {name: model.encode_images(inputs["images"], prune=name)[0] for name in names}
    reductions = {
        "tower": lambda: model.vision_tower(pixels),
        **{name: partial(reduce_by_prumerge, model, states, name) for name in names[1:]},
        "random": lambda: states[0, 1:][llava.random_patches(pixels[0], 64, config.vision.side**2)],
        "pool": lambda: llava.pool_patches(states[0, 1:], 64),
        "divprune": lambda: llava.diverse_patches(features["none"], 64)}
    taken = paired(reductions, args.repeats, "reductions")
    table([["of one tile", "ms", "of the tower's time"],
           *([name, ms(seconds), f"{median(seconds) / median(taken['tower']):.2%}"]
             for name, seconds in taken.items())])

    def prefill(name: str) -> None:
        x = torch.cat((features[name], features["none"][:words]))[None]
        lengths = torch.tensor([x.shape[1]], device=x.device)
        decoder.prefill(x, [llava.KVCache(x.shape[1], lengths, None) for _ in decoder.layers], None)

    def answer(n: int, name: str) -> None:
        model.config = replace(config, prune=name)
        answer_ours(model, inputs, n)

    rows = [["", *names, *names[1:]], ["visual tokens", *(str(len(f)) for f in features.values()), "", ""]]
    for what, run in (("language model's prefill", prefill), ("until the first token", partial(answer, 1)),
                      (f"{args.answer}-token answer", partial(answer, args.answer))):
        taken = paired({name: partial(run, name) for name in names}, args.repeats, what)
        gains = [f"{ratio(taken['none'], taken[name])[0]} x" for name in names[1:]]
        rows.append([f"{what}, ms", *map(ms, taken.values()), *gains])
    table(rows)


def reduce_by_prumerge(model: Llava, states: Tensor, name: str) -> None:
    (attention,), (keys,) = model.cls_attention(states)
    llava.prumerge(attention, keys, **llava.PRUMERGE[name]) @ states[0, 1:]


def spread_attention(model: Llava, states: Tensor, spread: float = 0.9) -> None:
    """A random tower looks everywhere alike. Larger queries make its attention log-normal; spread by
    0.9, 7% of that is beyond PruMerge's bound for outliers, about 40 of 576 patches."""
    query = model.vision_tower.layers[-1].self_attn["q_proj"]
    factor = spread / model.cls_attention(states)[0].float().log().std()
    query.weight *= factor
    query.bias *= factor


# ---------------------------------------------------------------------------------------------
# 6. Opening


def opening(args) -> None:
    """A checkpoint of random weights: the memory to save it in shards, to open it and to answer about an
    image, the same in 8 and 4 bits, and the time to open it with and without a cast."""
    shard = 3 * 10**8
    with tempfile.TemporaryDirectory() as folder:
        save = partial(Llava.save_pretrained, folder=folder, shard_bytes=shard)
        built, saved = peaks(args.device, partial(build_ours, args), save)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 2**30
        print(f"{size:.2f} GiB of weights, saved in shards of {shard / 2**30:.2f} GiB: at the peak "
              f"{(saved - built) * 2**30 / shard:.2f} shards more than the model takes", flush=True)
        opening_quantized(args, folder)
        how = {"dtype": getattr(torch, args.dtype), "device": args.device}
        opened, answered = peaks(args.device, partial(Llava.from_pretrained, folder, **how),
                                 partial(answer_once, question(make_inputs(args, 1)["llava.py"])))
        print(f"{opened:.2f} GiB at the peak when they are open, {answered:.2f} ({answered / size:.3f} of "
              "their size) when the question is answered")
        rows = [["open, read all weights, ms", "with a cast", "as stored", "times", "range"]]
        for what, cached in (("from the page cache", True), ("from the disk", False)):
            runs = {dtype: partial(open_and_read, folder, dtype, args.device, cached)
                    for dtype in (torch.float16, torch.bfloat16)}
            seconds = paired(runs, args.repeats, f"opening {what}")
            rows.append([what, *map(ms, seconds.values()), *ratio(*seconds.values())])
    table(rows)


def opening_quantized(args, folder: str) -> None:
    """Seconds and memory of the process to open a checkpoint in 8 and in 4 bits, without mapped pages."""
    for quantize in ("int8", "int4"):
        open_ = partial(Llava.from_pretrained, folder, dtype=torch.bfloat16, quantize=quantize)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            seconds, memory = process.submit(watch_memory, open_).result()
        print(f"opened in {quantize} in {seconds:.1f} s, {memory:.2f} GiB of anonymous memory at the peak",
              flush=True)


def watch_memory(work: Callable) -> tuple[float, float]:
    """Seconds of work(), and the most GiB of anonymous memory (Linux), looked at every 10 ms."""
    seen, done = [], threading.Event()

    def watch() -> None:
        while not seen or not done.wait(0.01):
            status = Path("/proc/self/status").read_text()
            seen.append(int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 2**20)

    watcher, began = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        work()
        seconds = time.perf_counter() - began
    finally:
        done.set()
        watcher.join()
    return seconds, max(seen)


def open_and_read(folder: str, dtype: torch.dtype, device: str, cached: bool) -> None:
    """As stored, a file is mapped and its weights are read at their first use: here."""
    for path in () if cached else Path(folder).glob("*.safetensors"):
        with open(path, "rb") as file:       # its written pages leave the page cache (Linux)
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for weight in Llava.from_pretrained(folder, dtype=dtype, device=device).parameters():
        weight.view(torch.int16).amax()


def answer_once(inputs: dict, model: Llava) -> None:
    list(model.eval().generate(**inputs, max_new_tokens=4, eos_token_id=None))


# ---------------------------------------------------------------------------------------------
# 7. Weights in 8 and 4 bits


def quantized(model: Llava, quantize: str) -> Llava:
    """A copy of a model with its linear layers in 8 or 4 bits."""
    state = {}
    with torch.device("meta"):
        copy = Llava(model.config)
    for name, tensor in tqdm(model.state_dict().items(), quantize, leave=False):
        llava.place_tensor(copy, state, name, tensor, quantize, tensor.device, torch.bfloat16)
    copy.load_state_dict(state, assign=True)
    return copy.eval()


def answer_in_two(model: Llava, inputs: dict, n: int) -> tuple[float, float]:
    """Seconds of the prefill and of each of n more tokens."""
    began, tokens = time.perf_counter(), model.generate_tokens(**question(inputs), max_new_tokens=n + 1)
    next(tokens)
    wait()
    first = time.perf_counter()
    list(tokens)
    wait()
    return first - began, (time.perf_counter() - first) / n


def with_quantization(args) -> None:
    if args.model:
        layer_errors(args)
        return perplexities(args)
    models, inputs = {args.dtype: build_ours(args)}, make_inputs(args, 1)["llava.py"]
    for quantize in args.bits:
        began = time.perf_counter()
        models[quantize] = quantized(models[args.dtype], quantize)
        print(f"quantized to {quantize} in {time.perf_counter() - began:.1f} s")
    taken = {name: [] for name in models}
    half = {"images": [tiles.bfloat16() for tiles in inputs["images"]]}
    for turn in tqdm(range(1 + args.repeats), desc="answers", leave=False):
        for name in list(models)[::(-1) ** turn]:
            more = {} if name == args.dtype else half
            taken[name].append(answer_in_two(models[name], inputs | more, args.answer - 1))
    rows = [["", "weights, GB", f"prefill of {args.tokens}, ms", "times", "range", "a token, ms",
             "times as fast", "range"]]
    base = [list(column) for column in zip(*taken[args.dtype][1:])]
    for name, model in models.items():
        prefill, decode = (list(column) for column in zip(*taken[name][1:]))
        size = llava.count_weights(model.language_model)[1] - model.language_model.embed_tokens.weight.nbytes
        rows.append([name, f"{size / 1e9:.2f}", ms(prefill), *ratio(prefill, base[0]), ms(decode),
                     *ratio(base[1], decode)])
    table(rows)


def open_decoder(folder: Path, quantize: str, dtype: torch.dtype, shuffle=False) -> llava.LanguageModel:
    """The language model of a folder. With `shuffle` the columns of int4 weights are shuffled before
    they are quantized and put back afterwards, so that weights that were published in groups of 32
    do not fall into the same groups again. The layers are then ordinary ones of dequantized weights."""
    (parts, stored, _), state, opened = llava.open_checkpoint(str(folder)), {}, {}
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"language_model": llava.LanguageModel(parts["text"])})
    noise = torch.Generator().manual_seed(0)
    for name, ref in tqdm(stored.items(), f"opening in {quantize}", leave=False):
        tensor, how = ref.read(opened), quantize
        if shuffle and re.fullmatch(llava.QUANTIZED, name) and "lm_head" not in name:
            order = torch.randperm(tensor.shape[1], generator=noise)
            layer = llava.QuantizedLinear(tensor[:, order], 4)
            tensor, how = dequantized(layer)[:, order.argsort()], "none"
        if name.startswith("language_model."):
            llava.place_tensor(model, state, name, tensor, how, "cpu", dtype)
    model.load_state_dict(state, assign=True)
    return model["language_model"].eval()


def dequantized(layer: llava.QuantizedLinear) -> Tensor:
    """The weight [O, I] of a layer in 4 bits."""
    starts = range(0, layer.out_features, layer.block_rows)
    return torch.cat([layer.block(start, torch.float32) for start in starts], 1).T


@torch.inference_mode()
def layer_errors(args) -> None:
    """Relative error of the outputs of each kind of layer, over all layers, for inputs from N(0, 1)."""
    errors: dict[str, dict[str, list]] = {}
    exact = dict(open_decoder(args.model, "none", torch.float32).named_modules())
    for quantize in ("int8", "int4"):
        for name, layer in open_decoder(args.model, quantize, torch.float32).named_modules():
            if isinstance(layer, llava.QuantizedLinear):
                x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
                y, z = exact[name](x), layer(x)
                errors.setdefault(name.split(".")[-1], {}).setdefault(quantize, []).append(
                    ((y - z).norm() / y.norm()).item())
    table([["error of outputs", "int8", "int4"],
           *([kind, *(f"{sum(e) / len(e):.4f}" for e in found.values())] for kind, found in errors.items())])


@torch.inference_mode()
def perplexity(decoder: llava.LanguageModel, ids: Tensor) -> float:
    """exp of the mean loss over all next tokens in rows ids [n, T]."""
    total = 0.0
    for row in tqdm(ids, "perplexity", leave=False):
        hidden = decoder(decoder.embed_tokens(row[None, :-1]))[0]
        for states, labels in zip(hidden.split(512), row[1:].split(512)):
            logits = decoder.lm_head(states).float()
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    return math.exp(total / ids[:, 1:].numel())


def perplexities(args) -> None:
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    ids = torch.cat([torch.tensor(tokenizer.encode(file.read_text()).ids[:2048 * args.pieces])
                     for file in args.text])
    if len(ids) < 2048:
        raise llava.UserError(f"--text has {len(ids)} tokens; a row of them has 2,048")
    ids = ids[:len(ids) // 2048 * 2048].view(-1, 2048)
    print(f"perplexity over {ids.numel():,} tokens, rows of 2,048, computed in {args.dtype}")
    dtype, exact = getattr(torch, args.dtype), None
    runs = [(args.dtype, "none", FITS, False), ("int8", "int8", FITS, False), ("int4", "int4", FITS, False),
            *((f"int4, columns shuffled, {fits} fits", "int4", fits, True) for fits in (2, 0, 5))]
    for name, quantize, fits, shuffle in runs:
        llava.FITS = fits
        found = perplexity(open_decoder(args.model, quantize, dtype, shuffle), ids)
        exact = exact or found
        print(f"{name:32}{found:8.3f}   x {found / exact:.4f}", flush=True)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a LLaMA of llama.cpp in Hugging Face's layout, in float32. llama.cpp pairs rotated
    dimensions (2i, 2i + 1), so the rows of q and k are put back into their order."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    reader, tensors = GGUFReader(file), {}
    field = {name.removeprefix("llama."): f.contents() for name, f in reader.fields.items()}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm", "token_embd": "model.embed_tokens",
             "output_norm": "model.norm", "output": "lm_head"}
    heads = {"attn_q": field["attention.head_count"], "attn_k": field["attention.head_count_kv"]}
    for tensor in tqdm(reader.tensors, "converting"):
        *block, kind = tensor.name.removesuffix(".weight").split(".")
        w = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        if kind in heads:
            w = w.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
        start = f"model.layers.{block[1]}." if block else ""
        tensors[f"{start}{names[kind]}.weight"] = w.contiguous()
    words = field["tokenizer.ggml.tokens"]
    llava.write_json(folder / "config.json", {
        "model_type": "llama", "vocab_size": len(words), "hidden_size": field["embedding_length"],
        "intermediate_size": field["feed_forward_length"], "num_hidden_layers": field["block_count"],
        "num_attention_heads": heads["attn_q"], "num_key_value_heads": heads["attn_k"],
        "rms_norm_eps": field["attention.layer_norm_rms_epsilon"], "rope_theta": field["rope.freq_base"],
        "max_position_embeddings": field["context_length"], "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    merges = [tuple(pair.split(" ")) for pair in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


# ---------------------------------------------------------------------------------------------
# 8. The command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, gpu = parser.add_argument, torch.cuda.is_available()
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--window", action="store_true", help="the cost of long texts")
    mode.add_argument("--prune", action="store_true", help="fewer visual tokens, and 40 words")
    mode.add_argument("--load", action="store_true", help="the memory that opening takes")
    mode.add_argument("--quantize", action="store_true", help="the language model in 8 and 4 bits")
    mode.add_argument("--alone", action="store_true", help="without transformers, where two do not fit")
    add("--layers", type=int, default=4, metavar="N",
        help="of the decoder (default: %(default)s; all: 32; with --window 0: only attention)")
    add("--vision-layers", type=int, default=24, metavar="N", help="of the tower (default: %(default)s, all)")
    add("--tokens", type=int, metavar="T", help="576 and text (default: 640; with --prune 628)")
    add("--answer", type=int, default=33, metavar="N", help="tokens of an answer (default: %(default)s)")
    add("--answers", action="store_true", help="no training, for models whose optimizers do not fit")
    add("--rows", type=int, default=2, metavar="B", help="of a training step (default: %(default)s)")
    add("--checkpoint-blocks", type=int, default=0, metavar="N", help="as of train.py (default: %(default)s)")
    add("--compile", action="store_true", help="llava.py's stage-2 step as with train.py --compile")
    add("--repeats", type=int, default=5, metavar="N", help="turns that count (default: %(default)s)")
    add("--shrink", type=int, default=1, choices=(1, 2, 4, 8, 16), help="divide all widths, for a trial")
    add("--bits", nargs="+", default=("int8", "int4"), choices=("int8", "int4"),
        help="with --quantize (default: both; at 32 layers 24 GB have room for one beside bfloat16)")
    add("--model", type=Path, metavar="FOLDER", help="with --quantize: a language model to measure")
    add("--text", type=Path, nargs="+", metavar="FILE", help="with --model: text for its perplexity")
    add("--pieces", type=int, default=1, metavar="N", help="read N x 2,048 tokens of a text (default: 1)")
    add("--gguf", type=Path, metavar="FILE", help="first convert this file of llama.cpp into --model")
    add("--device", default="cuda" if gpu else "cpu", help="default: %(default)s")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: %(default)s")
    args = parser.parse_args()
    args.tokens = args.tokens or (628 if args.prune else 640)
    if args.gguf and not args.model:
        parser.error("--gguf needs --model, the folder to write")
    if args.quantize and args.model and not args.text:
        parser.error("--model needs --text, one or more files")
    if args.tokens < 578:
        parser.error("--tokens: a picture takes 576 of them, and its text at least 2")
    return args


def main() -> None:
    args, load = parse(), os.getloadavg()[0]
    if args.gguf:
        convert_gguf(args.gguf, args.model)
        if not args.quantize:
            return
    torch.manual_seed(0)
    gpu = args.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}, {args.dtype}, {args.layers} decoder layers, "
          f"{args.vision_layers} vision layers, {args.repeats} turns")
    (beyond_the_window if args.window else with_pruning if args.prune else
     opening if args.load else with_quantization if args.quantize else beside_transformers)(args)
    if not gpu:
        print(f"load of the machine: {load:.1f} before, {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    llava.command_line(main)
