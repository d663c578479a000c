"""Teach a LLaVA to see. Stage 1 trains the projector alone, stage 2 also the language model.

    python train.py                          the doll's house: both stages, in minutes on a laptop
    python train.py --stage 1 --vision openai/clip-vit-large-patch14-336 \\
        --language mistralai/Mistral-7B-Instruct-v0.2 \\
        --data blip_laion_cc_sft_558k.json --images pretrain --out runs/stage1
    python train.py --stage 2 --init runs/stage1 \\
        --data scienceqa_train.json --images ScienceQA/images/train --out runs/stage2

Records are LLaVA's: [{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}]. A run
may be stopped at any moment (Ctrl-C saves first); --resume goes on as if nothing had happened. On
several GPUs: torchrun --nproc-per-node N train.py ..., with the same losses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from eval import language_flops, peak_memory, projector_flops, vision_flops
from llava import (IGNORE, FROM_PUBLISHED, PRUNING, TEMPLATES, Llava, LlavaConfig, Processor, command_line,
                   count_image_tokens, open_checkpoint, open_image, read_json, rename_key, atomic_write,
                   write_json, UserError)

RECIPE = {                                   # the seed paper's: 558k captions, then ScienceQA
    "1": {"lr": 1e-3, "batch_size": 64, "epochs": 1},
    "2": {"lr": 2e-5, "batch_size": 32, "epochs": 15},
    "lora": {"lr": 2e-4, "batch_size": 32, "epochs": 15},                 # LLaVA-1.5's rate
}
CARDS = {                                    # TFLOP/s of dense bf16 in the data sheet, GB
    "a100": (312, 80), "h100": (989, 80), "h200": (989, 141), "rtx4090": (165, 24),
    "cpu": (0.1, None),                      # two cores
}
ROOM = 0.95                                  # of a card; the rest is the allocator's
HEAP = 1.15                                  # of tensors that come and go, on a CPU: malloc holds 1.0 to 1.3
PIECE = 1 << 24, 1 << 18                     # weights updated at once: on a GPU, in a CPU's cache
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # torchrun's
progress = partial(tqdm, leave=False, disable=RANK > 0)


# ---------------------------------------------------------------------------------------------
# 1. Records


def read_records(file: Path, folder: Path) -> list[dict]:
    """LLaVA's records as {"id", "messages", "pictures"}. Whatever can be wrong with one without
    decoding its pictures is found here, before any model is loaded."""
    records = []
    for number, raw in enumerate(progress(read_json_list(file), desc=f"reading {file.name}")):
        record = try_record(raw, number, folder)
        if isinstance(record, ValueError):
            raise UserError(f"{file}, {record}; --check-data lists everything that is wrong")
        records.append(record)
    return records


def read_json_list(file: Path) -> list:
    raw = read_json(file)
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{file} is not a list of records")
    return raw


def try_record(raw, number: int, folder: Path) -> dict | ValueError:
    try:
        return read_record(raw, folder)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        name = raw.get("id", number) if isinstance(raw, dict) else number
        reason = error if isinstance(error, ValueError) else f"not a LLaVA record ({error!r})"
        return ValueError(f"record {name}: {reason}")


def read_record(record: dict, folder: Path) -> dict:
    turns = record["conversations"]
    turns = turns[1:] if turns and turns[0]["from"] == "gpt" else turns   # as LLaVA does
    for turn, speaker in zip(turns, ("human", "gpt") * len(turns)):
        if turn["from"] != speaker:
            raise UserError(f"{turn['from']!r} speaks where {speaker!r} should")
        if speaker == "gpt" and not turn["value"].strip():
            raise UserError("an answer is empty")
    if len(turns) < 2:
        raise UserError("there is no answer to learn")
    pictures = record.get("image") or []
    pictures = [pictures] if isinstance(pictures, str) else pictures
    if (marks := sum(turn["value"].count("<image>") for turn in turns)) != len(pictures):
        raise UserError(f"{marks} <image> in the text, but {len(pictures)} pictures")
    for picture in pictures:
        if os.path.isabs(picture) or ".." in Path(picture).parts:
            raise UserError(f"picture {picture} lies outside {folder}")
        if not os.path.exists(folder / picture):
            raise UserError(f"there is no picture {folder / picture}")
    messages = [{"role": "user" if turn["from"] == "human" else "assistant", "content": turn["value"]}
                for turn in turns]
    return {"id": record.get("id"), "messages": messages, "pictures": [folder / p for p in pictures]}


class Samples(Dataset):
    """Records as ids, labels and uint8 pictures, cut to max_length tokens as they are after the
    splice. `lengths` holds how many those are and `learned` how many of them are labels; `cut` the
    records that lost some, `usable` those with an answer left to learn from."""

    def __init__(self, records: list[dict], processor: Processor, max_length: int):
        self.records, self.processor, self.max_length = records, processor, max_length
        self.lengths, self.learned, self.cut = [], [], []
        for i, record in enumerate(progress(records, desc="measuring")):
            ids, labels, length, whole = self.tokenize(record)
            self.lengths.append(length)
            self.learned.append(len(labels) - labels.count(IGNORE))
            self.cut += [] if whole else [i]
        self.usable = [i for i, learned in enumerate(self.learned) if learned]

    def tokenize(self, record: dict) -> tuple[list[int], list[int], int, bool]:
        """Ids, labels, the number of tokens that they become with the pictures spliced in, and
        whether that is all of them."""
        ids, labels = self.processor.tokenize(record["messages"])
        config, sizes, length = self.processor.config, iter(picture_sizes(record, self.processor)), 0
        for i, token in enumerate(ids):
            more = count_image_tokens(config, next(sizes)) if token == config.image_token_id else 1
            if length + more > self.max_length:
                return ids[:i], labels[:i], length, False
            length += more
        return ids, labels, length, True

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict | Exception:
        ids, labels, *_ = self.tokenize(self.records[i])
        shown = ids.count(self.processor.config.image_token_id)           # the cut may have taken some
        try:
            pictures = [open_image(file) for file in self.records[i]["pictures"][:shown]]
        except OSError as error:             # raised in a worker it would come with a long traceback
            return error
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels),
                "images": [self.processor.pixels(p) for p in pictures],
                "image_sizes": [(p.height, p.width) for p in pictures]}


def picture_sizes(record: dict, processor: Processor) -> list[tuple[int, int]]:
    """(height, width) of a record's pictures, read only where they decide the number of tokens."""
    if processor.config.image_mode != "anyres":
        return [(0, 0)] * len(record["pictures"])
    sizes = []
    for file in record["pictures"]:
        with Image.open(file) as image:
            sizes.append((image.height, image.width))
    return sizes


def make_batches(usable: list[int], lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """One epoch: every sample once, in random batches of samples of similar length."""
    shuffle = torch.Generator().manual_seed(seed)
    order = [usable[i] for i in torch.randperm(len(usable), generator=shuffle)]
    pools = [order[i:i + 50 * batch_size] for i in range(0, len(order), 50 * batch_size)]
    order = [i for pool in pools for i in sorted(pool, key=lambda i: -lengths[i])]
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=shuffle)]


class Collate:
    """Samples to right-padded micro-batches, longest first, that together are one step."""

    def __init__(self, micro_batch_size: int):
        self.size = micro_batch_size

    def __call__(self, samples: list) -> list[dict] | Exception:
        if errors := [s for s in samples if isinstance(s, Exception)]:
            return errors[0]
        samples = sorted(samples, key=lambda s: -len(s["input_ids"]))
        return [self.pad(samples[i:i + self.size]) for i in range(0, len(samples), self.size)]

    def pad(self, samples: list[dict]) -> dict:
        real = [torch.ones_like(s["input_ids"], dtype=torch.bool) for s in samples]
        return {"input_ids": pad_sequence([s["input_ids"] for s in samples], batch_first=True),
                "labels": pad_sequence([s["labels"] for s in samples], batch_first=True,
                                       padding_value=IGNORE),
                "attention_mask": pad_sequence(real, batch_first=True),
                "images": [image for s in samples for image in s["images"]],
                "image_sizes": [size for s in samples for size in s["image_sizes"]]}


# ---------------------------------------------------------------------------------------------
# 2. The optimizer


class Adam:
    """Adam without weight decay, in float32 whatever the weights are kept in.

    A bf16 weight and 16 more bits kept here are together an exact float32: in bf16 alone, steps of
    lr 2e-5 are rounded away. The moments of such weights are bf16 too, rounded up or down at
    random so that small changes survive on average. 8 bytes a weight with everything, if each is
    updated `in_backward`, as soon as its gradient is there: then that is gone before the next comes.
    """

    def __init__(self, named_parameters, betas=(0.9, 0.999), eps=1e-8, in_backward=False, compile=False):
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.betas, self.eps, self.steps, self.squares = betas, eps, 0, 0.0
        self.in_backward, self.state = in_backward, {}
        self.move = torch.compile(self.move) if compile else self.move
        for name, p in self.parameters.items():
            self.state[f"{name}.m"], self.state[f"{name}.v"] = torch.zeros_like(p), torch.zeros_like(p)
            if p.dtype == torch.bfloat16:    # 16 bits, called bf16 because processes exchange no int16
                self.state[f"{name}.rest"] = torch.zeros_like(p)
            if in_backward:
                p.register_post_accumulate_grad_hook(partial(self.update, name))

    def load(self, folder: Path) -> None:
        self.steps = int(folder.name.removeprefix("step-"))
        for name, saved in load_file(folder / "optimizer.safetensors").items():
            state = self.state[name]
            if PROCESSES > 1:
                saved = distribute_tensor(saved.to(state.device), state.device_mesh, state.placements)
            state.copy_(saved)

    def begin(self, lr: float) -> None:
        self.steps, self.lr, self.squares = self.steps + 1, lr, 0.0
        self.rate, self.scale = (torch.tensor(x) for x in (
            lr / (1 - self.betas[0]**self.steps), 1 - self.betas[1]**self.steps))

    def clip(self, most: float | None) -> float:
        """The norm of the whole gradient, which is scaled down to `most`; in backward that is too late."""
        if self.in_backward:
            return math.sqrt(total(float(self.squares)))
        return whole(nn.utils.clip_grad_norm_(self.parameters.values(), most)).item()

    def step(self) -> None:
        """Update what has a gradient."""
        for name, p in self.parameters.items():
            if p.grad is not None:
                self.update(name, p)

    @torch.no_grad()
    def update(self, name: str, p: Tensor) -> None:
        """One weight from its gradient, which it clears. In pieces: the float32 on the way takes little
        memory, and on a CPU stays in the cache. They share the noise that rounds them."""
        gradient, p.grad, p = own(p.grad).reshape(-1), None, own(p)
        size = PIECE[p.device.type == "cpu"]
        noise = torch.randint(1 << 16, (min(size, p.numel()),), dtype=torch.int32, device=p.device)
        kinds = ("m", "v", "rest") if p.dtype == torch.bfloat16 else ("m", "v")
        kept = [p.view(-1), *(own(self.state[f"{name}.{kind}"]).view(-1) for kind in kinds)]
        for gradient, *kept in zip(*(tensor.split(size) for tensor in [gradient, *kept])):
            gradient = gradient.float()
            if self.in_backward:
                self.squares += gradient.dot(gradient)
            self.move(gradient, *kept, noise=noise[:len(gradient)], rate=self.rate, scale=self.scale)

    def move(self, gradient: Tensor, p: Tensor, m: Tensor, v: Tensor, rest=None, *, noise, rate, scale):
        """Adam's rule on some weights, in place; the gradient's memory is used up. `rate` and `scale`
        (of v) are tensors, so that --compile takes them for variables."""
        new_m = m.float().lerp_(gradient, 1 - self.betas[0])
        new_v = v.float().lerp_(gradient.square_(), 1 - self.betas[1])
        change = torch.div(new_v, scale, out=gradient).sqrt_().add_(self.eps)
        change = torch.div(new_m, change, out=change).mul_(rate)
        if rest is None:
            p.sub_(change)
            m.copy_(new_m)
            v.copy_(new_v)
        else:
            split(join(p, rest).sub_(change), p, rest)
            round_at_random(new_m, m, noise)
            round_at_random(new_v, v, noise)


def join(high: Tensor, rest: Tensor) -> Tensor:
    """bf16 weights and their other 16 bits -> the float32 they are."""
    return high.float().view(torch.int32).add_(rest.view(torch.int16).int()).view(torch.float32)


def split(exact: Tensor, high: Tensor, rest: Tensor) -> None:
    """The reverse, in place: `high` becomes the nearest bf16, `rest` what is left of the bits."""
    bits = exact.view(torch.int32)
    rest.view(torch.int16).copy_(bits)       # the lower half; if negative, the nearest is one higher
    high.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


def round_at_random(exact: Tensor, out: Tensor, noise: Tensor) -> None:
    """float32 -> bf16, up or down with the chances that keep the mean; noise in 0 ... 65535."""
    out.view(torch.int16).copy_(exact.view(torch.int32).add_(noise).bitwise_right_shift_(16))


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at step 0, 1, ...: 3% of linear warm-up, then a cosine to 0."""
    warmup = math.ceil(0.03 * steps)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---------------------------------------------------------------------------------------------
# 3. What learns, and how it fits


class LoRA(nn.Linear):
    """A linear layer that stays as it is, and beside it one of low rank that learns (Hu et al. 2021,
    arXiv:2106.09685): y = W x + alpha / rank · B A x, where B starts at zero."""

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float):
        super().__init__(frozen.in_features, frozen.out_features, device="meta")
        self.weight, self.bias, self.scale = frozen.weight, frozen.bias, alpha / rank
        like = {"bias": False, "device": frozen.weight.device, "dtype": frozen.weight.dtype}
        self.lora_A = nn.Linear(self.in_features, rank, **like)
        self.lora_B = nn.Linear(rank, self.out_features, **like)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))


def choose_learning(model: Llava, args: argparse.Namespace) -> None:
    """Stage 1: the projector. Stage 2: also the language model, or LoRA on each of its layers."""
    learning = ["projector.", "image_newline"]
    if args.stage == 2 and not args.lora_rank:
        learning.append("language_model.")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(tuple(learning)))
    blocks = list(model.language_model.layers) * bool(args.lora_rank)
    if args.lora_vision:                     # not in the blocks that LLaVA never runs
        tower = model.vision_tower.layers
        blocks += tower[:len(tower) + 1 + model.config.vision_feature_layer]
    for block in blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                block.set_submodule(name, LoRA(module, args.lora_rank, args.lora_alpha))


def wrap_blocks(model: Llava, args: argparse.Namespace) -> None:
    """Block by block: compiled, computed twice instead of remembered, spread over all processes."""
    model.language_model.register_forward_pre_hook(partial(touch_eyes, model))
    for layer in [*model.vision_tower.layers, *model.language_model.layers] * args.compile:
        layer.forward = torch.compile(layer.forward)
    for layer in model.language_model.layers[:args.checkpoint_blocks]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    for module in [*model.language_model.layers, model] * (PROCESSES > 1):
        fully_shard(module)


def touch_eyes(model: Llava, _, inputs: tuple[Tensor]) -> Tensor:
    """Text alone would leave the projector without a gradient, and processes waiting for each other's:
    nothing of it is added to the words."""
    eyes = [p for name, p in model.named_parameters() if p.requires_grad and "language_model" not in name]
    return inputs[0] + 0 * sum(p.sum() for p in eyes)


def own(t: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return t.to_local() if PROCESSES > 1 else t


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if PROCESSES > 1 else t


def total(number: float, op=dist.ReduceOp.SUM) -> float:
    """A number that every process has, summed over all."""
    if PROCESSES == 1:
        return number
    cell = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(cell, op)
    return cell.item()


def weigh(batch: list[dict]) -> tuple[list[tuple[dict, float]], int]:
    """A step's micro-batches with their weights, and its number of answer tokens, each of which
    counts the same wherever it is learned. Gradients are averaged over processes, and all must take
    part in every pass: who has fewer repeats its last one, at weight 0."""
    counts = [int((micro["labels"][:, 1:] != IGNORE).sum()) for micro in batch]
    learned, missing = total(sum(counts)), int(total(len(batch), dist.ReduceOp.MAX)) - len(batch)
    weights = [PROCESSES * count / learned for count in counts] + [0.0] * missing
    return list(zip(batch + batch[-1:] * missing, weights)), int(learned)


# ---------------------------------------------------------------------------------------------
# 4. Before the run: what it will take, what the data is


def memory(model: Llava, samples: Samples, batches: list[list[int]], args) -> dict[str, float]:
    """Bytes on one card by what takes them, in the micro-batch that takes most; "peak": the most of
    them at once. The model may be without memory itself (device meta). Activations are what autograd
    keeps. Tests hold it within 8% of what is measured."""
    text, vision, size = model.config.text, model.config.vision, 2 if args.dtype == "bfloat16" else 4
    cpu = (args.card or torch.device(args.device).type) == "cpu"
    C, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    qkvy = 2 * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
    micros = [sorted(batch, key=lambda i: -samples.lengths[i])[:args.micro_batch_size] for batch in batches]
    tokens = max(len(micro) * samples.lengths[micro[0]] for micro in micros)
    learned = max(sum(samples.learned[i] for i in micro) for micro in micros)
    pictures = max(sum(len(samples.records[i]["pictures"]) for i in micro) for micro in micros)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    # a token leaves behind: a norm in float32, q, k, v, y; a norm, three of the MLP; what learning reads
    reads, full = args.stage == 2, args.stage == 2 and not args.lora_rank
    attention = 4 * C + size * (qkvy + C * (reads + full))
    mlp = 4 * C + size * (3 * inner + (C + inner) * reads + C * full)
    twice = args.checkpoint_blocks           # of those only what enters
    blocks = tokens * ((layers - twice) * (attention + mlp) + size * C * (twice + 3))
    blocks -= (tokens - learned) * mlp * (twice < layers)                 # the last drops others early
    tower = (8 * vision.hidden_size + 3 * vision.intermediate_size) * vision.num_hidden_layers
    patch = size * (tower * args.lora_vision + vision.hidden_size + 2 * C)
    need = {"weights": size * sum(p.numel() for p in model.parameters()) / PROCESSES,
            "optimizer": (6 if size == 2 else 8) * sum(trained) / PROCESSES,
            "gradients": size * (max(trained) if args.in_backward else sum(trained)) / PROCESSES,
            "activations": blocks + pictures * vision.side**2 * patch,
            "logits": 12 * learned * text.vocab_size}    # float32: their logarithm, two gradients
    passed = tokens * (size * 4 * inner + (attention + mlp) * (twice > 0))       # backward in one block
    update = 24 * min(max(trained), PIECE[cpu])      # six times float32
    waiting = not args.in_backward and args.micro_batch_size < args.batch_size   # gradients, for more
    need["peak"] = need["weights"] + need["optimizer"] + (HEAP if cpu else 1) * max(
        need["activations"] + need["logits"] + waiting * need["gradients"],
        need["activations"] + passed + (waiting or args.in_backward) * need["gradients"],
        need["gradients"] + passed, need["gradients"] + update)
    return need


def fit(model: Llava, samples: Samples, batches: list[list[int]], args) -> dict[str, float]:
    """Choose what the flags left open, so that it fits: as few blocks computed twice, then as large
    micro-batches as possible. Returns the memory needed."""
    room = (CARDS[args.card][1] or math.inf) * 2**30 if args.card else math.inf
    if not args.card and torch.device(args.device).type == "cuda":
        room = torch.cuda.mem_get_info()[1]
    share, layers = math.ceil(args.batch_size / PROCESSES), len(model.language_model.layers)
    sizes = [args.micro_batch_size or share]
    if not args.micro_batch_size and not args.in_backward:
        sizes = [share >> i for i in range(share.bit_length())]
    blocks = [args.checkpoint_blocks]
    if args.checkpoint_blocks is None:
        blocks = range(0, layers * (args.stage == 2) + 1, max(1, layers // 8))
    for args.micro_batch_size in sizes:
        for args.checkpoint_blocks in blocks:
            need = memory(model, samples, batches, args)
            if need["peak"] < ROOM * room:
                return need
    return need


def print_plan(model: Llava, need: dict, samples: Samples, steps: int, args, utilisation=0.5) -> None:
    """What the run takes on the card that it is planned for. Backward costs as much as forward for what
    is passed through, and once more for what learns; a picture counts as all tiles that it can have."""
    introduce(args, samples, steps, 0, model)
    config, S, (speed, room) = model.config, model.config.vision.image_size, CARDS[args.card]
    full = args.stage == 2 and not args.lora_rank
    passes = 2 + full + args.checkpoint_blocks / config.text.num_hidden_layers
    tile = vision_flops(config.vision, config.vision.num_hidden_layers - 1) * (1 + args.lora_vision)
    tile += 3 * projector_flops(config, config.vision.side**2)
    tiles = 1 + max((w * h // S**2 for w, h in config.grids), default=0)
    work = args.epochs * sum(
        passes * language_flops(config.text, samples.lengths[i], samples.learned[i])
        + tile * tiles * len(samples.records[i]["pictures"]) for i in samples.usable)
    hours = work / (speed * 1e12 * utilisation * PROCESSES) / 3600
    for name, size in need.items():
        print(f"  {name:12} {size / 2**30:10.2f} GiB")
    if room and need["peak"] > ROOM * room * 2**30:
        print(f"  does not fit in {room} GB: try --in-backward, --lora-rank 128 or a smaller --batch-size")
    tokens = args.epochs * sum(samples.lengths[i] for i in samples.usable)
    print(f"  {tokens:,} tokens, {work / 1e15:,.3g} PFLOP: {hours:,.2f} hours on {PROCESSES} x {args.card}, "
          f"if it does {utilisation:.0%} of {speed:g} TFLOP/s")


def inspect(number_and_raw: tuple[int, dict], folder: Path) -> tuple[dict | ValueError, list[str]]:
    """A record or what is wrong with it, and what is odd about its pictures but will do."""
    record, odd = try_record(number_and_raw[1], number_and_raw[0], folder), []
    for file in [] if isinstance(record, ValueError) else record["pictures"]:
        try:
            open_image(file)
            with Image.open(file) as image:
                odd += [f"{file} is in mode {image.mode}"] * (image.mode not in ("RGB", "L"))
                odd += [f"{file} moves: its first frame is taken"] * getattr(image, "is_animated", False)
        except OSError as error:
            return ValueError(f"record {record['id']}: {error}"), []
    return record, odd


def check_data(args: argparse.Namespace, processor: Processor) -> None:
    """Read every record and decode every picture once; write what is wrong to RUN/check.json."""
    raw = read_json_list(args.data)
    with ThreadPool(args.workers or os.cpu_count()) as pool:              # Pillow decodes in parallel
        found = pool.imap(partial(inspect, folder=args.images), enumerate(raw), chunksize=16)
        found = list(progress(found, total=len(raw), desc="checking"))
    records = [record for record, _ in found if isinstance(record, dict)]
    copies = Counter(str((record["messages"], record["pictures"])) for record in records)
    lists = {"wrong": [str(record) for record, _ in found if isinstance(record, ValueError)],
             "odd": [line for _, odd in found for line in odd],
             "duplicates": [text for text, times in copies.items() if times > 1]}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "check.json", lists)
    lengths = Samples(records, processor, sys.maxsize).lengths
    width = 1 + max(lengths, default=0) // 10
    bins = Counter(length // width for length in lengths)
    for i in sorted(bins):
        bar = "#" * (50 * bins[i] // max(bins.values()))
        print(f"{i * width:6} to {(i + 1) * width - 1:6} tokens {bins[i]:8} {bar}")
    summary = ", ".join(f"{len(lines)} {name}" for name, lines in lists.items())
    print(f"{len(raw)} records: {summary}; listed in {args.out / 'check.json'}")
    if lists["wrong"]:
        raise UserError(f"{args.data} cannot be trained on, first: {lists['wrong'][0]}")


def show(samples: Samples, number: int) -> None:
    """A record as the model gets it: which tokens are picture, prompt, learned and the end."""
    if not 0 <= number < len(samples):
        raise UserError(f"--show {number}: the records are 0 to {len(samples) - 1}")
    processor, record = samples.processor, samples.records[number]
    files, (ids, labels, *_) = iter(record["pictures"]), samples.tokenize(record)
    special = {processor.config.image_token_id: "picture", processor.bos: "start", processor.eos: "end"}
    colors = {"picture": 35, "start": 31, "end": 31, "prompt": 34, "learned": 32}
    kinds = [(special.get(token, "prompt" if label == IGNORE else "learned"), label != IGNORE)
             for token, label in zip(ids, labels)]
    for (kind, learned), group in groupby(zip(kinds, ids), key=lambda pair: pair[0]):
        text = "".join(str(next(files)) if kind == "picture" else processor.tokenizer.id_to_token(token)
                       for _, token in group).replace("▁", " ").replace("<0x0A>", "\n")
        print(f"{kind:8}{'learned' * learned:8}\033[{colors[kind]}m{text}\033[0m")
    print(f"{samples.lengths[number]} tokens with the pictures, {samples.learned[number]} of them learned")


# ---------------------------------------------------------------------------------------------
# 5. The run


@contextmanager
def deferred_signals():
    """Ctrl-C and kill wait in the list that this gives, so that a step can end and be saved."""
    caught = []
    usual = {number: signal.signal(number, lambda number, _: caught.append(number))
             for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C reaches the workers, too


def train(model: Llava, optimizer: Adam, loader, steps: int, args, refuse, report, save) -> None:
    """The loop. A step is one update from a batch, in micro-batches that fit into memory."""
    with deferred_signals() as stop:
        began = time.perf_counter()
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            waited, loss = time.perf_counter() - began, 0.0
            optimizer.begin(args.lr * schedule(optimizer.steps, steps))
            step = optimizer.steps
            torch.manual_seed(args.seed + step)      # chance depends on the step: resuming is exact
            micros, learned = weigh(batch)
            for micro, weight in micros:
                part = model(**to_device(micro, args.device)) * weight
                if not math.isfinite(part.item()):
                    refuse(step, "loss", part.item())
                part.backward()              # with --in-backward this updates, too
                loss += part.detach()
            norm = optimizer.clip(args.clip)
            if not math.isfinite(norm):
                refuse(step, "gradient", norm)
            optimizer.step()
            report(step, loss=total(float(loss)) / PROCESSES, lr=optimizer.lr, grad_norm=norm,
                   tokens=learned, seconds=time.perf_counter() - began, waited=waited)
            stopped = total(len(stop))       # all processes stop at the same step
            if stopped or step == steps or step % args.save_every == 0:
                save()
            if stopped:
                print(f"stopped after step {step}; --resume goes on from here")
                raise KeyboardInterrupt
            began = time.perf_counter()


def to_device(micro: dict, device: str) -> dict:
    """Uint8 pictures travel, to be normalised there; pinned memory lets them while others compute."""
    images = [image.to(device, non_blocking=True) for image in micro["images"]]
    return {name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x
            for name, x in micro.items()} | {"images": images}


def refuse(samples: Samples, batches: list[list[int]], step: int, what: str, value: float) -> None:
    names = ", ".join(str(samples.records[i]["id"]) for i in batches[step - 1])
    raise UserError(f"step {step}: the {what} is {value}, so the run ends as last saved; try a lower "
                     f"--lr, or leave out the culprit among the records {names}")


def report(log: Path, bar: tqdm, device: str, predicted: float, step: int, **line) -> None:
    """A step as a line in log.jsonl and on the screen."""
    with log.open("a") as file:
        file.write(json.dumps({"step": step} | line) + "\n")
    bar.write(f"step {step:6}/{bar.total} | loss {line['loss']:7.4f} | gradient {line['grad_norm']:8.3f} | "
              f"lr {line['lr']:.2e} | {line['tokens'] / line['seconds']:8.0f} answer tokens/s | "
              f"waited {line['waited']:5.2f} s")
    if step == 1:
        bar.write(f"memory: {peak_memory(device) / 2**30:.2f} GiB at most in this step, predicted "
                  f"{predicted / 2**30:.2f} GiB")
    bar.update()


class Checkpoints:
    """RUN/trainer/step-000120: all that a run needs to go on to the bit. Each is written under
    another name first; the files of the run folder itself are links into the newest."""

    SETTINGS = ("stage vision language init tokenizer template projector image_mode prune keep_tokens lora_rank "
                "lora_alpha lora_vision epochs batch_size micro_batch_size in_backward compile lr clip "
                "max_length seed dtype").split()

    def __init__(self, args: argparse.Namespace):
        self.out, self.folder, self.args = args.out, args.out / "trainer", args
        self.run = {name: getattr(args, name) for name in self.SETTINGS}
        self.run |= {"processes": PROCESSES, "data": hashlib.sha256(args.data.read_bytes()).hexdigest()}

    def newest(self, resume: bool) -> Path | None:
        """The checkpoint to go on from, if there is one of this very run."""
        found = sorted(self.folder.glob("step-*"))
        if found and not resume:
            raise UserError(f"{self.out} holds a run already: add --resume, or name another --out")
        theirs = read_json(found[-1] / "run.json") if found else self.run
        if changed := [f"{name} was {theirs.get(name)!r} and is now {value!r}"
                       for name, value in self.run.items() if theirs.get(name) != value]:
            raise UserError(f"{self.out} cannot go on with other settings: {'; '.join(changed)}")
        return found[-1] if found else None

    def save(self, model: Llava, processor: Processor, optimizer: Adam) -> None:
        """Every process gives its shards, the first one writes."""
        shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in shards:
            module.unshard()
        gathered = ((name, whole(tensor)) for name, tensor in optimizer.state.items())
        state = {name: tensor.cpu() for name, tensor in gathered if RANK == 0}
        if RANK == 0:
            self.write(model, processor, optimizer.steps, state)
        for module in shards:
            module.reshard()

    def write(self, model: Llava, processor: Processor, step: int, state: dict[str, Tensor]) -> None:
        part, older = self.folder / "part", list(self.folder.glob("step-*"))
        shutil.rmtree(part, ignore_errors=True)
        try:
            model.save_pretrained(part, trained_only=True)
            processor.save_pretrained(part)
            if self.args.lora_rank:
                to_adapter(part, model, self.args)
            opened_by_others = [file.name for file in part.iterdir()]
            save_file(state, part / "optimizer.safetensors")
            (part / "run.json").write_text(json.dumps(self.run))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"step {step} could not be saved to {self.folder} ({error}): what was saved "
                          "before is untouched; make room and --resume") from None
        saved = part.rename(self.folder / f"step-{step:06}")
        for name in opened_by_others:
            with atomic_write(self.out / name) as file:
                link(saved / name, file)
        for folder in older:
            shutil.rmtree(folder)


def link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:                          # a file system without hard links
        shutil.copyfile(file, name)


def to_adapter(folder: Path, model: Llava, args: argparse.Namespace) -> None:
    """Make what save_pretrained wrote an adapter as PEFT saves one of llava-hf, the projector included."""
    tensors = load_file(folder / "model.safetensors")
    save_file({f"base_model.model.model.{name.replace('language_model.model.', 'language_model.')}": tensor
               for name, tensor in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    layers = {name.rsplit(".", 1)[1] for name, module in model.named_modules() if isinstance(module, LoRA)}
    where = r".*\.(language_model|vision_tower)\." if args.lora_vision else r".*\.language_model\."
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "base_model_name_or_path": model.bases[0], "r": args.lora_rank,
        "lora_alpha": args.lora_alpha, "target_modules": rf"{where}.*\.({'|'.join(sorted(layers))})",
        "bias": "none", "modules_to_save": ["multi_modal_projector"]}, indent=1))


def load_trained(model: Llava, folder: Path) -> None:
    """Lay a checkpoint's weights, an adapter's unmerged, over a model as it was when training began."""
    parameters = dict(model.named_parameters())
    for file in folder.glob("*model.safetensors"):
        for name, saved in load_file(file).items():
            parameters[rename_key(name.removeprefix("base_model.model."), FROM_PUBLISHED)].data.copy_(saved)


def open_config(args: argparse.Namespace) -> LlavaConfig:
    """Of the model to train, from config.json alone."""
    parts = {}
    for source in [args.init] if args.init else [args.vision, args.language]:
        parts |= open_checkpoint(source, weights=False)[0]
    if args.stage == 2 and parts.get("template") == "plain":
        parts["template"] = TEMPLATES[parts["text"].model_type]
    chosen = {name: getattr(args, name) for name in ("projector", "image_mode", "template", "prune", "keep_tokens")}
    return LlavaConfig(**parts | {name: value for name, value in chosen.items() if value})


def build_model(args: argparse.Namespace, config: LlavaConfig) -> Llava:
    """The model to train, in whose parameters is marked what learns."""
    torch.manual_seed(args.seed)
    how = {"dtype": getattr(torch, args.dtype), "device": args.device} | vars(config)
    del how["vision"], how["text"]           # the files' own
    model = (Llava.from_pretrained(args.init, **how) if args.init else
             Llava.from_pretrained(vision=args.vision, language=args.language, **how))
    choose_learning(model, args)
    for p in model.parameters():
        p.data = p.data.clone()              # into memory: until now they are mapped files
    return model


def run_stage(args: argparse.Namespace) -> None:
    """One stage, from records to a run folder."""
    config = open_config(args)
    processor = Processor.from_pretrained(args.tokenizer or args.init or args.language, config)
    if args.check_data:
        return check_data(args, processor)
    samples = Samples(read_records(args.data, args.images), processor, args.max_length)
    if args.show is not None:
        return show(samples, args.show)
    batches = [batch for epoch in range(args.epochs) for batch in make_batches(
        samples.usable, samples.lengths, args.batch_size, args.seed + epoch)]
    if not batches or len(batches[-1]) < PROCESSES:
        raise UserError(f"{len(samples.usable)} records with an answer cannot be dealt out to {PROCESSES} "
                         f"processes in batches of {args.batch_size}: choose another --batch-size")
    with torch.device("meta"):
        sketch = Llava(config)
    choose_learning(sketch, args)
    need = fit(sketch, samples, batches, args)
    if args.plan:
        return print_plan(sketch, need, samples, len(batches), args)
    checkpoints = Checkpoints(args)
    newest = checkpoints.newest(args.resume)
    before, model = peak_memory(args.device), build_model(args, config)
    if newest:
        load_trained(model, newest)
    wrap_blocks(model, args)
    optimizer = Adam(model.named_parameters(), in_backward=args.in_backward, compile=args.compile)
    if newest:
        optimizer.load(newest)
    introduce(args, samples, len(batches), optimizer.steps, sketch)
    predicted = before + memory(sketch, samples, batches[:1], args)["peak"]
    left = [batch[RANK::PROCESSES] for batch in batches[optimizer.steps:]]
    loader = DataLoader(samples, batch_sampler=left, collate_fn=Collate(args.micro_batch_size),
                        num_workers=args.workers, worker_init_fn=ignore_interrupts,
                        pin_memory=torch.device(args.device).type == "cuda")
    bar = progress(total=len(batches), initial=optimizer.steps, desc=f"stage {args.stage}", unit="step")
    log = open_log(args.out, optimizer.steps)
    train(model, optimizer, loader, len(batches), args, refuse=partial(refuse, samples, batches),
          report=partial(report, log, bar, args.device, predicted),
          save=partial(checkpoints.save, model, processor, optimizer))


def open_log(folder: Path, steps: int) -> Path:
    """log.jsonl without the lines after the checkpoint; only one process writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl" if RANK == 0 else Path(os.devnull)
    log.write_text("".join(log.read_text().splitlines(True)[:steps]) if log.exists() else "")
    return log


def introduce(args: argparse.Namespace, samples: Samples, steps: int, done: int, model: Llava) -> None:
    """What is about to happen, and what of the data will not take part."""
    sizes = [(p.numel(), p.requires_grad * p.numel()) for p in model.parameters()]
    everything, learning = map(sum, zip(*sizes))
    print(f"stage {args.stage}: {learning:,} of {everything:,} weights learn from {len(samples.usable):,} "
          f"records in {steps:,} steps (from step {done + 1}), {args.micro_batch_size} at once, "
          f"{args.checkpoint_blocks} blocks twice, on {args.card or args.device} in {args.dtype}, to {args.out}")
    lost = sorted(set(range(len(samples))) - set(samples.usable))
    if samples.cut:
        print(f"{len(samples.cut)} records are longer than --max-length {args.max_length} and are cut; "
              f"{len(lost)} of them lose all of their answer and are left out: {args.out / 'cut.json'}")
    if samples.cut and RANK == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "cut.json", {"cut": [samples.records[i]["id"] for i in samples.cut],
                                           "left out": [samples.records[i]["id"] for i in lost]})


# ---------------------------------------------------------------------------------------------
# 6. The command line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    args, cuda = parser.parse_args(argv), torch.cuda.is_available()
    recipe = RECIPE["lora" if args.lora_rank else str(args.stage)]
    whole_batch = args.batch_size or recipe["batch_size"]
    for applies, sentence in (
            (bool(args.init) == bool(args.vision and args.language),
             "give either --init, or --vision and --language"),
            (args.card and not args.plan, "--card is the card of a --plan"),
            (args.lora_rank and args.stage == 1, "--lora-rank is for stage 2; stage 1 has none"),
            (not args.lora_rank and (args.lora_alpha or args.lora_vision), "--lora-... without --lora-rank"),
            (args.in_backward and args.clip, "--in-backward updates before --clip could know the norm"),
            (args.in_backward and (args.micro_batch_size or whole_batch) != whole_batch,
             "--in-backward keeps no gradients to add up: --micro-batch-size must be the whole batch")):
        if applies:
            parser.error(sentence)
    args.card = args.card or ("a100" if args.plan else None)
    gpu = args.card != "cpu" if args.plan else cuda
    usual = recipe | {"clip": None if args.in_backward else 1.0, "lora_alpha": 2 * (args.lora_rank or 0),
                      "template": "plain" if args.stage == 1 else None, "device": "cuda" if cuda else "cpu",
                      "dtype": "bfloat16" if gpu else "float32"}
    for name, value in usual.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    return args


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--stage", type=int, choices=(1, 2), required=True, help="1: projector; 2: also the language model")
    add("--vision", metavar="ID", help="a CLIP: folder or hub id")
    add("--language", metavar="ID", help="a Mistral, LLaMA or Vicuna: folder or hub id")
    add("--init", metavar="ID", help="a LLaVA or a run to start from, instead of the two")
    add("--tokenizer", metavar="ID", help="where the tokenizer.json is, if not with the language model")
    add("--data", type=Path, required=True, metavar="FILE", help="records, in LLaVA's format")
    add("--images", type=Path, default=Path("."), metavar="DIR", help="folder of their pictures")
    add("--out", type=Path, required=True, metavar="RUN", help="folder for the run")
    add("--resume", action="store_true", help="go on where the run in --out stopped")

    before = parser.add_argument_group("instead of training").add_argument
    before("--plan", action="store_true", help="memory, FLOPs and hours, from config.json and the records")
    before("--card", choices=CARDS, help="of the plan (default: a100)")
    before("--check-data", action="store_true", help="read and decode all once, list what is wrong")
    before("--show", type=int, metavar="N", help="record N in colours: picture, prompt, learned, end")

    recipe = parser.add_argument_group("the recipe; defaults for stage 1, stage 2").add_argument
    recipe("--epochs", type=int, help="default: 1, 15")
    recipe("--batch-size", type=int, metavar="N", help="records per step (default: 64, 32)")
    recipe("--lr", type=float, help="peak learning rate (default: 1e-3, 2e-5; with LoRA 2e-4)")
    recipe("--clip", type=float, metavar="NORM", help="of the gradient (default: 1)")
    recipe("--max-length", type=int, default=2048, metavar="T", help="tokens a record (default: %(default)s)")
    recipe("--template", choices=("plain", "mistral_instruct", "v1"), help="default: plain, the model's")
    recipe("--projector", choices=("linear", "mlp2x_gelu"), help="default: mlp2x_gelu")
    recipe("--image-mode", choices=("pad", "crop", "anyres"), help="default: pad")
    recipe("--prune", choices=("none", *PRUNING), help="merge each picture's tokens (default: the model's)")
    recipe("--keep-tokens", type=int, metavar="N", help="tokens to keep of each tile (default: the model's)")
    recipe("--lora-rank", type=int, metavar="R", help="train LoRA of this rank instead of the language model")
    recipe("--lora-alpha", type=float, metavar="A", help="weighs it by A / R (default: 2 R)")
    recipe("--lora-vision", action="store_true", help="LoRA in the vision tower, too")
    recipe("--seed", type=int, default=0, help="default: %(default)s")

    fitting = parser.add_argument_group("memory and speed").add_argument
    fitting("--micro-batch-size", type=int, metavar="N", help="records at once (default: what fits)")
    fitting("--checkpoint-blocks", type=int, metavar="N",
            help="blocks computed twice instead of remembered (default: as few as fit)")
    fitting("--in-backward", action="store_true", help="update each weight as its gradient comes; keep none")
    fitting("--compile", action="store_true", help="compile each block and the update, for GPUs")
    fitting("--device", help="default: cuda if there is one, else cpu")
    fitting("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU")
    fitting("--workers", type=int, default=8 if torch.cuda.is_available() else 0, metavar="N",
            help="processes that decode pictures (default: %(default)s)")
    fitting("--save-every", type=int, default=500, metavar="STEPS", help="default: %(default)s")


def main() -> None:
    if not sys.argv[1:]:
        from tests import toy
        return toy.play(run_stage, parse)
    args = parse()
    if PROCESSES > 1:                        # torchrun: each process has a card, or cores, of its own
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    try:
        run_stage(args)
    finally:
        if PROCESSES > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main)
