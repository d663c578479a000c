"""Train a LLaVA. Stage 1 trains the projector alone, stage 2 also the language model.

    python train.py                          the toy data: both stages, in minutes on a laptop
    python train.py --stage 1 --vision openai/clip-vit-large-patch14-336 \\
        --language mistralai/Mistral-7B-Instruct-v0.2 \\
        --data blip_laion_cc_sft_558k.json --images pretrain --out runs/stage1
    python train.py --stage 2 --init runs/stage1 \\
        --data scienceqa_train.json --images ScienceQA/images/train --out runs/stage2

Records are in LLaVA's format: [{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}].
Ctrl-C saves the run and stops it; --resume continues it. On several GPUs:
torchrun --nproc-per-node N train.py ..., with the same losses.
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
from typing import NamedTuple

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
from llava import (IGNORE, FROM_PUBLISHED, PRUNING, TEMPLATES, Llava, LlavaConfig, Processor, TextConfig,
                   UserError, atomic_write, command_line, count_image_tokens, devices, open_checkpoint,
                   open_image, read_json, rename_key, write_json)

RECIPE = {                                   # Miao et al. 2024: 558k captions, then ScienceQA
    "1": {"lr": 1e-3, "batch_size": 64, "epochs": 1},
    "2": {"lr": 2e-5, "batch_size": 32, "epochs": 15},
    "lora": {"lr": 2e-4, "batch_size": 32, "epochs": 15},                 # LLaVA-1.5's rate
}
GPUS = {                                     # TFLOP/s of dense bf16 in the data sheet, memory in GB
    "a100": (312, 80), "h100": (989, 80), "h200": (989, 141), "rtx4090": (165, 24),
    "cpu": (0.1, None),                      # two cores
}
MEMORY_FRACTION = 0.95                       # of a GPU's memory may be used; the allocator needs the rest
ALLOCATOR_OVERHEAD = 1.15                    # of temporary tensors on a CPU: malloc holds 1.0 to 1.3 times
CHUNK = {"gpu": 1 << 24, "cpu": 1 << 18}     # weights updated at once; on a CPU they fit into its cache
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # torchrun's
progress = partial(tqdm, leave=False, disable=RANK > 0)


# ---------------------------------------------------------------------------------------------
# 1. One stage and its training loop


def run_stage(args: argparse.Namespace) -> None:
    """Run one stage: read the records, choose what fits into memory, train, and save to args.out."""
    config = open_config(args)
    processor = Processor.from_pretrained(args.tokenizer or args.init or args.language, config)
    if args.check_data:
        return check_data(args, processor)
    samples = Samples(read_records(args.data, args.images), processor, args.max_length)
    if args.show is not None:
        return show(samples, args.show)
    batches = make_all_batches(samples, args)
    with torch.device("meta"):
        sketch = Llava(config)               # shapes without memory, for the estimates
    choose_trainable(sketch, args)
    need = choose_micro_batch(sketch, samples, batches, args)
    if args.plan:
        return print_plan(sketch, need, samples, len(batches), args)
    checkpoints = Checkpoints(args)
    newest = checkpoints.newest(args.resume)
    before = peak_memory(args.device)
    model = build_model(args, config)
    if newest:
        load_trained(model, newest)
    wrap_blocks(model, args)
    optimizer = Adam(model.named_parameters(), in_backward=args.in_backward, compile=args.compile)
    if newest:
        optimizer.load(newest)
    print_summary(args, samples, len(batches), optimizer.steps, sketch)
    first = largest_load(samples, batches[:1], args.micro_batch_size)
    estimate = before + estimate_memory(sketch, first, args)["peak"]
    log = TrainingLog(args, optimizer.steps, len(batches), estimate)
    train(model, optimizer, samples, batches, checkpoints, log, args)


def train(model: Llava, optimizer: Adam, samples: Samples, batches: list[list[int]],
          checkpoints: Checkpoints, log: TrainingLog, args: argparse.Namespace) -> None:
    """The training loop. A step is one update from one batch, in micro-batches that fit into memory."""
    shares = [batch[RANK::PROCESSES] for batch in batches[optimizer.steps:]]
    loader = DataLoader(samples, batch_sampler=shares, collate_fn=Collate(args.micro_batch_size),
                        num_workers=args.workers, worker_init_fn=ignore_interrupts,
                        pin_memory=is_gpu(args.device))
    with deferred_signals() as signals:
        began = time.perf_counter()
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            waited = time.perf_counter() - began
            optimizer.begin(args.lr * schedule(optimizer.steps, len(batches)))
            step, loss = optimizer.steps, 0.0
            torch.manual_seed(args.seed + step)      # random numbers depend on the step: resuming is exact
            micro_batches, tokens = split_step(batch)
            for micro, weight in micro_batches:
                part = model(**to_device(micro, args.device)) * weight
                if not math.isfinite(part.item()):
                    raise_nonfinite(samples, batches, step, "loss", part.item())
                part.backward()                      # with --in-backward this also updates the weights
                loss += part.item()
            norm = optimizer.clip(args.clip)
            if not math.isfinite(norm):
                raise_nonfinite(samples, batches, step, "gradient", norm)
            optimizer.step()
            log.write(step, loss=all_reduce_sum(loss) / PROCESSES, lr=optimizer.lr, grad_norm=norm,
                      tokens=tokens, seconds=time.perf_counter() - began, waited=waited)
            stop = all_reduce_sum(len(signals)) > 0  # all processes stop at the same step
            if stop or step == len(batches) or step % args.save_every == 0:
                checkpoints.save(model, samples.processor, optimizer)
            if stop:
                print(f"stopped after step {step}; --resume continues the run")
                raise KeyboardInterrupt
            began = time.perf_counter()


def split_step(batch: list[dict]) -> tuple[list[tuple[dict, float]], int]:
    """([(micro-batch, weight of its mean loss), ...], the number of supervised tokens in the step).

    Each supervised token of a step has equal weight, in whichever micro-batch or process it is.
    Gradients are averaged over the processes, and all processes must take part in every pass: one with
    fewer micro-batches repeats its last one with weight 0."""
    counts = [int((micro["labels"][:, 1:] != IGNORE).sum()) for micro in batch]
    tokens = all_reduce_sum(sum(counts))
    missing = int(all_reduce(len(batch), dist.ReduceOp.MAX)) - len(batch)
    weighted = [(micro, PROCESSES * count / tokens) for micro, count in zip(batch, counts)]
    weighted += [(batch[-1], 0.0)] * missing
    return weighted, int(tokens)


def to_device(micro: dict, device: str) -> dict:
    """Images travel as uint8 and are normalised there; from pinned memory while the device computes."""
    moved = {}
    for name, value in micro.items():
        if isinstance(value, Tensor):
            value = value.to(device, non_blocking=True)
        moved[name] = value
    moved["images"] = [image.to(device, non_blocking=True) for image in micro["images"]]
    return moved


def schedule(step: int, steps: int) -> float:
    """The fraction of the learning rate at step 0, 1, ...: 3% of linear warm-up, then a cosine to 0."""
    warmup = math.ceil(0.03 * steps)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def raise_nonfinite(samples: Samples, batches: list[list[int]], step: int, what: str, value: float) -> None:
    names = ", ".join(str(samples.records[i]["id"]) for i in batches[step - 1])
    raise UserError(f"step {step}: the {what} is {value}, so the run stops; what was saved before is "
                    "untouched; use a lower --lr, or remove the record that causes it; "
                    f"the step contained the records {names}")


@contextmanager
def deferred_signals():
    """Collect SIGINT and SIGTERM in the list that this yields, so that a step can end and be saved."""
    caught = []
    previous = {number: signal.signal(number, lambda number, _: caught.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C also reaches the workers


class TrainingLog:
    """One line per step in RUN/log.jsonl and on the screen; only one process writes the file."""

    def __init__(self, args: argparse.Namespace, done: int, steps: int, estimate: float):
        """Lines after the `done` steps of the checkpoint are removed; `estimate` is in bytes."""
        self.device, self.estimate = args.device, estimate
        self.bar = progress(total=steps, initial=done, desc=f"stage {args.stage}", unit="step")
        args.out.mkdir(parents=True, exist_ok=True)
        self.file = args.out / "log.jsonl" if RANK == 0 else Path(os.devnull)
        lines = self.file.read_text().splitlines(True)[:done] if self.file.exists() else []
        self.file.write_text("".join(lines))

    def write(self, step: int, **line) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step} | line) + "\n")
        self.bar.write(f"step {step:6}/{self.bar.total} | loss {line['loss']:7.4f} | gradient norm "
                       f"{line['grad_norm']:8.3f} | lr {line['lr']:.2e} | "
                       f"{line['tokens'] / line['seconds']:8.0f} answer tokens/s | "
                       f"waited for data {line['waited']:5.2f} s")
        if step == 1:
            self.bar.write(f"peak memory of this step: {peak_memory(self.device) / 2**30:.2f} GiB, "
                           f"estimated {self.estimate / 2**30:.2f} GiB")
        self.bar.update()


def print_summary(args: argparse.Namespace, samples: Samples, steps: int, done: int, model: Llava) -> None:
    """Print what is trained, and write to cut.json which records are cut or left out."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"stage {args.stage}: {trainable:,} of {total:,} parameters are trainable; "
          f"{len(samples.usable):,} records, {steps:,} steps (from step {done + 1}), micro-batches of "
          f"{args.micro_batch_size}, {args.checkpoint_blocks} checkpointed layers; "
          f"{args.card or args.device}, {args.dtype}; to {args.out}")
    if not samples.cut:
        return
    lost = sorted(set(range(len(samples))) - set(samples.usable))
    print(f"{len(samples.cut)} records are longer than --max-length {args.max_length} and are cut; "
          f"{len(lost)} of them lose their whole answer and are left out: {args.out / 'cut.json'}")
    if RANK == 0:
        write_json(args.out / "cut.json", {"cut": [samples.records[i]["id"] for i in samples.cut],
                                           "left out": [samples.records[i]["id"] for i in lost]})


# ---------------------------------------------------------------------------------------------
# 2. Records


def read_records(file: Path, folder: Path) -> list[dict]:
    """LLaVA's records as {"id", "messages", "images"}. All errors that show without decoding an
    image are raised here, before any model is loaded."""
    records = []
    for number, raw in enumerate(progress(read_json_list(file), desc=f"reading {file.name}")):
        record = try_record(raw, number, folder)
        if isinstance(record, ValueError):
            raise UserError(f"{file}, {record}; --check-data lists all errors")
        records.append(record)
    return records


def read_json_list(file: Path) -> list:
    raw = read_json(file)
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{file} is not a list of records")
    return raw


def try_record(raw, number: int, folder: Path) -> dict | ValueError:
    """The record, or as a returned error what is wrong with it."""
    try:
        return read_record(raw, folder)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        name = raw.get("id", number) if isinstance(raw, dict) else number
        reason = error if isinstance(error, ValueError) else f"not a LLaVA record ({error!r})"
        return ValueError(f"record {name}: {reason}")


def read_record(record: dict, folder: Path) -> dict:
    turns = record["conversations"]
    if turns and turns[0]["from"] == "gpt":  # LLaVA also drops an answer before the first question
        turns = turns[1:]
    messages = []
    for i, turn in enumerate(turns):
        speaker, role = ("gpt", "assistant") if i % 2 else ("human", "user")
        if turn["from"] != speaker:
            raise UserError(f"turn {i + 1} is from {turn['from']!r}; it must be from {speaker!r}")
        turn["value"].encode()               # ValueError: half of a surrogate pair
        if speaker == "gpt" and not turn["value"].strip():
            raise UserError("an answer is empty")
        messages.append({"role": role, "content": turn["value"]})
    if len(messages) < 2:
        raise UserError("it has no answer")
    names = record.get("image") or []
    if isinstance(names, str):
        names = [names]
    marks = sum(message["content"].count("<image>") for message in messages)
    if marks != len(names):
        raise UserError(f"{marks} <image> in the text, but {len(names)} images")
    for name in names:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"image {name} is outside of {folder}")
        if not os.path.exists(folder / name):
            raise UserError(f"there is no image {folder / name}")
    return {"id": record.get("id"), "messages": messages, "images": [folder / name for name in names]}


class Samples(Dataset):
    """Records as ids, labels and uint8 images, cut to max_length tokens, image tokens included.

    Of each record: `lengths`, its tokens; `supervised`, how many of them are labels.
    `cut`: the records that were too long; `usable`: those that still have a supervised token."""

    def __init__(self, records: list[dict], processor: Processor, max_length: int):
        self.records, self.processor, self.max_length = records, processor, max_length
        self.lengths, self.supervised, self.cut = [], [], []
        for i, record in enumerate(progress(records, desc="measuring")):
            ids, labels, length, complete = self.tokenize(record)
            self.lengths.append(length)
            self.supervised.append(len(labels) - labels.count(IGNORE))
            if not complete:
                self.cut.append(i)
        self.usable = [i for i, count in enumerate(self.supervised) if count]

    def tokenize(self, record: dict) -> tuple[list[int], list[int], int, bool]:
        """(ids, labels, number of tokens including those of the images, whether nothing was cut)."""
        ids, labels = self.processor.tokenize(record["messages"])
        config, length, image = self.processor.config, 0, 0
        sizes = image_sizes(record, config)
        for i, token in enumerate(ids):
            more = 1
            if token == config.image_token_id:
                more, image = count_image_tokens(config, sizes[image]), image + 1
            if length + more > self.max_length:
                return ids[:i], labels[:i], length, False
            length += more
        return ids, labels, length, True

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict | Exception:
        ids, labels, _, _ = self.tokenize(self.records[i])
        shown = ids.count(self.processor.config.image_token_id)           # some may have been cut
        try:
            images = [open_image(file) for file in self.records[i]["images"][:shown]]
        except OSError as error:             # raised in a worker it would have a long traceback
            return error
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels),
                "images": [self.processor.pixels(image) for image in images],
                "image_sizes": [(image.height, image.width) for image in images]}


def image_sizes(record: dict, config: LlavaConfig) -> list[tuple[int, int]]:
    """(height, width) of a record's images; files are opened only if the size decides the token count."""
    if config.image_mode != "anyres":
        return [(0, 0)] * len(record["images"])
    sizes = []
    for file in record["images"]:
        try:
            with Image.open(file) as image:
                sizes.append((image.height, image.width))
        except Image.DecompressionBombError as error:
            raise OSError(f"{file} is not a readable image: {error}") from None
    return sizes


def make_all_batches(samples: Samples, args: argparse.Namespace) -> list[list[int]]:
    """The batches of the whole run, in order; each is a list of record numbers."""
    batches = []
    for epoch in range(args.epochs):
        batches += make_batches(samples.usable, samples.lengths, args.batch_size, args.seed + epoch)
    if not batches or len(batches[-1]) < PROCESSES:
        raise UserError(f"{len(samples.usable)} records with an answer cannot be split among {PROCESSES} "
                        f"processes in batches of {args.batch_size}: choose another --batch-size")
    return batches


def make_batches(usable: list[int], lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """One epoch: every sample once, in random batches of samples of similar length."""
    generator = torch.Generator().manual_seed(seed)
    order = [usable[i] for i in torch.randperm(len(usable), generator=generator)]
    batches = []
    for start in range(0, len(order), 50 * batch_size):
        pool = sorted(order[start:start + 50 * batch_size], key=lambda i: -lengths[i])
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


class Collate:
    """Make right-padded micro-batches, longest first, from the samples of one step."""

    def __init__(self, micro_batch_size: int):
        self.size = micro_batch_size

    def __call__(self, samples: list) -> list[dict] | Exception:
        for sample in samples:
            if isinstance(sample, Exception):
                return sample
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
# 3. The model and its trainable parameters


def open_config(args: argparse.Namespace) -> LlavaConfig:
    """The configuration of the model to train; reads config.json alone."""
    fields = {}
    for source in [args.init] if args.init else [args.vision, args.language]:
        fields |= open_checkpoint(source, weights=False)[0]
    if args.stage == 2 and fields.get("template") == "plain":
        fields["template"] = TEMPLATES[fields["text"].model_type]
    for name in ("projector", "image_mode", "template", "prune"):
        if getattr(args, name):
            fields[name] = getattr(args, name)
    return LlavaConfig(**fields)


def build_model(args: argparse.Namespace, config: LlavaConfig) -> Llava:
    """The model to train; its trainable parameters require a gradient, all others do not."""
    torch.manual_seed(args.seed)
    overrides = {name: value for name, value in vars(config).items() if name not in ("vision", "text")}
    sources = {"path_or_repo_id": args.init, "vision": args.vision, "language": args.language}
    model = Llava.from_pretrained(**sources, **overrides, dtype=getattr(torch, args.dtype),
                                  device=args.device)
    choose_trainable(model, args)
    for p in model.parameters():
        p.data = p.data.clone()              # into memory: until now they are mapped files
    return model


def choose_trainable(model: Llava, args: argparse.Namespace) -> None:
    """Stage 1: the projector. Stage 2: also the language model, or LoRA on each of its linear layers."""
    trainable = ["projector.", "image_newline"]
    if args.stage == 2 and not args.lora_rank:
        trainable.append("language_model.")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(tuple(trainable)))
    blocks = []
    if args.lora_rank:
        blocks += model.language_model.layers
    if args.lora_vision:                     # not in the layers that LLaVA never evaluates
        tower = model.vision_tower.layers
        blocks += tower[:len(tower) + 1 + model.config.vision_feature_layer]
    for block in blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                block.set_submodule(name, LoRA(module, args.lora_rank, args.lora_alpha))


class LoRA(nn.Linear):
    """A frozen linear layer and a trainable one of low rank beside it (Hu et al. 2021, arXiv:2106.09685):
    y = W x + alpha / rank · B A x, where B starts at zero."""

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float):
        super().__init__(frozen.in_features, frozen.out_features, device="meta")
        self.weight, self.bias, self.scale = frozen.weight, frozen.bias, alpha / rank
        like = {"bias": False, "device": frozen.weight.device, "dtype": frozen.weight.dtype}
        self.lora_A = nn.Linear(self.in_features, rank, **like)
        self.lora_B = nn.Linear(rank, self.out_features, **like)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))


def wrap_blocks(model: Llava, args: argparse.Namespace) -> None:
    """Apply torch.compile, activation checkpointing and FSDP2 to each layer, in place."""
    model.language_model.register_forward_pre_hook(partial(connect_unused_inputs, model))
    if args.compile:
        for layer in [*model.vision_tower.layers, *model.language_model.layers]:
            layer.forward = torch.compile(layer.forward)
    for layer in model.language_model.layers[:args.checkpoint_blocks]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    if PROCESSES > 1:
        for module in [*model.language_model.layers, model]:
            fully_shard(module)


def connect_unused_inputs(model: Llava, _, inputs: tuple[Tensor]) -> Tensor:
    """Add 0 × the trainable parameters before the language model to its input: a batch without images
    gives them no gradient, and the other processes would wait for it."""
    unused = [p.sum() for name, p in model.named_parameters()
              if p.requires_grad and not name.startswith("language_model.")]
    return inputs[0] + 0 * sum(unused)


def local_shard(t: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return t.to_local() if PROCESSES > 1 else t


def full_tensor(t: Tensor) -> Tensor:
    """A sharded tensor put together again; all processes must call this."""
    return t.full_tensor() if PROCESSES > 1 else t


def all_reduce(number: float, op) -> float:
    """A number that each process has, reduced over all of them."""
    if PROCESSES == 1:
        return number
    cell = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(cell, op)
    return cell.item()


def all_reduce_sum(number: float) -> float:
    return all_reduce(number, dist.ReduceOp.SUM)


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


# ---------------------------------------------------------------------------------------------
# 4. The optimizer


class Adam:
    """Adam without weight decay, computed in float32 for bf16 weights, too.

    In bf16 alone, steps of lr 2e-5 are rounded away. So the optimizer keeps the low 16 bits of each
    float32 master weight, and stores bf16 moments with stochastic rounding: small changes survive on
    average. That is 8 bytes a weight in all, if each weight is updated `in_backward`, as soon as its
    gradient is complete, so that only one gradient exists at a time.
    """

    def __init__(self, named_parameters, betas=(0.9, 0.999), eps=1e-8, in_backward=False, compile=False):
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.betas, self.eps, self.steps, self.square_sum = betas, eps, 0, 0.0
        self.in_backward, self.state = in_backward, {}
        self.update_chunk = torch.compile(self.update_chunk) if compile else self.update_chunk
        for name, p in self.parameters.items():
            self.state[f"{name}.m"], self.state[f"{name}.v"] = torch.zeros_like(p), torch.zeros_like(p)
            if p.dtype == torch.bfloat16:    # bits, not numbers; bf16 because processes exchange no int16
                self.state[f"{name}.low"] = torch.zeros_like(p)
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
        """Begin a step. `rate` and `v_scale` correct the bias of the moments; tensors, so that
        torch.compile takes them for variables."""
        self.steps, self.lr, self.square_sum = self.steps + 1, lr, 0.0
        self.rate = torch.tensor(lr / (1 - self.betas[0]**self.steps))
        self.v_scale = torch.tensor(1 - self.betas[1]**self.steps)

    def clip(self, max_norm: float | None) -> float:
        """Return the norm of the whole gradient and scale it down to max_norm; with in_backward it is
        too late to scale."""
        if self.in_backward:
            return math.sqrt(all_reduce_sum(float(self.square_sum)))
        return full_tensor(nn.utils.clip_grad_norm_(self.parameters.values(), max_norm)).item()

    def step(self) -> None:
        """Update all weights that have a gradient."""
        for name, p in self.parameters.items():
            if p.grad is not None:
                self.update(name, p)

    @torch.no_grad()
    def update(self, name: str, p: Tensor) -> None:
        """Update one weight and clear its gradient. In chunks: the temporary float32 tensors take little
        memory, and on a CPU stay in the cache. All chunks share the noise that rounds them."""
        gradient, p.grad, p = local_shard(p.grad).reshape(-1), None, local_shard(p)
        size = CHUNK["cpu" if p.device.type == "cpu" else "gpu"]
        noise = torch.randint(1 << 16, (min(size, p.numel()),), dtype=torch.int32, device=p.device)
        kinds = ("m", "v", "low") if p.dtype == torch.bfloat16 else ("m", "v")
        kept = [p.view(-1), *(local_shard(self.state[f"{name}.{kind}"]).view(-1) for kind in kinds)]
        for gradient, *kept in zip(*(tensor.split(size) for tensor in [gradient, *kept])):
            gradient = gradient.float()
            if self.in_backward:
                self.square_sum += gradient.dot(gradient)
            self.update_chunk(gradient, *kept, noise=noise[:len(gradient)], rate=self.rate,
                              v_scale=self.v_scale)

    def update_chunk(self, gradient: Tensor, p: Tensor, m: Tensor, v: Tensor, low: Tensor | None = None, *,
                     noise: Tensor, rate: Tensor, v_scale: Tensor) -> None:
        """Adam's rule, in place; the memory of the float32 gradient is reused."""
        new_m = m.float().lerp_(gradient, 1 - self.betas[0])
        new_v = v.float().lerp_(gradient.square_(), 1 - self.betas[1])
        change = torch.div(new_v, v_scale, out=gradient).sqrt_().add_(self.eps)
        change = torch.div(new_m, change, out=change).mul_(rate)
        if low is None:
            p.sub_(change)
            m.copy_(new_m)
            v.copy_(new_v)
        else:
            split_bits(join_bits(p, low).sub_(change), p, low)
            round_stochastically(new_m, m, noise)
            round_stochastically(new_v, v, noise)


def join_bits(high: Tensor, low: Tensor) -> Tensor:
    """bf16 weights and the low 16 bits of their master weights -> the float32 master weights."""
    return high.float().view(torch.int32).add_(low.view(torch.int16).int()).view(torch.float32)


def split_bits(exact: Tensor, high: Tensor, low: Tensor) -> None:
    """The reverse, in place: `high` becomes the nearest bf16, `low` the low 16 bits."""
    bits = exact.view(torch.int32)
    low.view(torch.int16).copy_(bits)        # as int16; if negative, the nearest bf16 is one higher
    high.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


def round_stochastically(exact: Tensor, out: Tensor, noise: Tensor) -> None:
    """float32 -> bf16, up or down with the probabilities that keep the mean; noise in 0 ... 65535."""
    out.view(torch.int16).copy_(exact.view(torch.int32).add_(noise).bitwise_right_shift_(16))


# ---------------------------------------------------------------------------------------------
# 5. Memory, and --plan


class Load(NamedTuple):
    """What a micro-batch holds."""
    tokens: int                              # with padding
    supervised: int
    images: int


def largest_load(samples: Samples, batches: list[list[int]], micro_batch_size: int) -> Load:
    """The most of each in any first, longest micro-batch of `batches`."""
    loads = []
    for batch in batches:
        micro = sorted(batch, key=lambda i: -samples.lengths[i])[:micro_batch_size]
        loads.append(Load(tokens=len(micro) * samples.lengths[micro[0]],
                          supervised=sum(samples.supervised[i] for i in micro),
                          images=sum(len(samples.records[i]["images"]) for i in micro)))
    return Load(*(max(column) for column in zip(*loads)))


def estimate_memory(model: Llava, load: Load, args: argparse.Namespace) -> dict[str, float]:
    """Bytes on one device, by use; "peak" is the most that is needed at once.

    The model may be on device meta. Tests hold the estimate within 8% of the measured bytes."""
    text, size = model.config.text, 2 if args.dtype == "bfloat16" else 4
    on_cpu = args.card == "cpu" or not (args.card or is_gpu(args.device))
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    gradients = max(trainable) if args.in_backward else sum(trainable)
    need = {"weights": size * sum(p.numel() for p in model.parameters()) / PROCESSES,
            "optimizer": (6 if size == 2 else 8) * sum(trainable) / PROCESSES,
            "gradients": size * gradients / PROCESSES,
            "activations": activation_bytes(model.config, load, args, size),
            "logits": 12 * load.supervised * text.vocab_size}    # float32: log-softmax, two gradients
    in_layer = size * 4 * text.intermediate_size             # a token, in the backward pass of one layer
    if args.checkpoint_blocks:
        in_layer += sum(layer_bytes(text, args, size))
    in_layer *= load.tokens
    kept_gradients, accumulated = 0, 0
    if args.in_backward:
        kept_gradients = need["gradients"]
    elif args.micro_batch_size < args.batch_size:            # gradients wait for other micro-batches
        kept_gradients = accumulated = need["gradients"]
    update = 24 * min(max(trainable), CHUNK["cpu" if on_cpu else "gpu"])  # six float32 tensors
    moments = (need["activations"] + need["logits"] + accumulated,        # at the loss
               need["activations"] + in_layer + kept_gradients,           # in the last layer's backward
               need["gradients"] + in_layer,                              # in the first layer's
               need["gradients"] + update)                                # in the optimizer
    overhead = ALLOCATOR_OVERHEAD if on_cpu else 1
    need["peak"] = need["weights"] + need["optimizer"] + overhead * max(moments)
    return need


def layer_bytes(text: TextConfig, args: argparse.Namespace, size: int) -> tuple[int, int]:
    """Bytes a token that autograd keeps of a decoder layer: of its attention, of its MLP."""
    C, inner = text.hidden_size, text.intermediate_size
    qkvy = 2 * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
    attention = 4 * C + size * qkvy          # the norm is in float32
    mlp = 4 * C + size * 3 * inner
    if args.stage == 2:                      # inputs of trainable layers
        attention += size * C
        mlp += size * (C + inner)
        if not args.lora_rank:
            attention += size * C
            mlp += size * C
    return attention, mlp


def activation_bytes(config: LlavaConfig, load: Load, args: argparse.Namespace, size: int) -> int:
    """Bytes that autograd keeps of one micro-batch; of a checkpointed layer only its input."""
    text, vision = config.text, config.vision
    attention, mlp = layer_bytes(text, args, size)
    whole_layers = text.num_hidden_layers - args.checkpoint_blocks
    total = load.tokens * (whole_layers * (attention + mlp)
                           + size * text.hidden_size * (args.checkpoint_blocks + 3))
    if whole_layers > 0:                     # the last MLP sees supervised positions only
        total -= (load.tokens - load.supervised) * mlp
    patch = vision.hidden_size + 2 * text.hidden_size
    if args.lora_vision:
        patch += (8 * vision.hidden_size + 3 * vision.intermediate_size) * vision.num_hidden_layers
    return total + load.images * vision.side**2 * size * patch


def choose_micro_batch(model: Llava, samples: Samples, batches: list[list[int]],
                       args: argparse.Namespace) -> dict[str, float]:
    """Set args.micro_batch_size and args.checkpoint_blocks where the flags left them open: the largest
    micro-batch that fits, with as few checkpointed layers as possible. Returns the memory needed."""
    available = math.inf
    if args.card and GPUS[args.card][1]:
        available = GPUS[args.card][1] * 2**30
    elif not args.card and is_gpu(args.device):
        available = torch.cuda.mem_get_info()[1]
    share, layers = math.ceil(args.batch_size / PROCESSES), len(model.language_model.layers)
    sizes = [args.micro_batch_size or share]
    if not args.micro_batch_size and not args.in_backward:
        sizes = [share >> i for i in range(share.bit_length())]           # halves
    checkpointed = [args.checkpoint_blocks]
    if args.checkpoint_blocks is None:
        checkpointed = [0]
        if args.stage == 2:
            checkpointed = range(0, layers + 1, max(1, layers // 8))
    for args.micro_batch_size in sizes:
        load = largest_load(samples, batches, args.micro_batch_size)
        for args.checkpoint_blocks in checkpointed:
            need = estimate_memory(model, load, args)
            if need["peak"] < MEMORY_FRACTION * available:
                return need
    return need


def print_plan(model: Llava, need: dict, samples: Samples, steps: int, args, utilisation=0.5) -> None:
    """Print the estimated memory, FLOPs and hours on the GPU --card. A backward pass costs as much as a
    forward pass, and once more for trainable layers; an image counts as all tiles that it can have."""
    print_summary(args, samples, steps, 0, model)
    config, S, (speed, memory) = model.config, model.config.vision.image_size, GPUS[args.card]
    passes = 2 + args.checkpoint_blocks / config.text.num_hidden_layers
    if args.stage == 2 and not args.lora_rank:
        passes += 1
    tile = vision_flops(config.vision, config.vision.num_hidden_layers - 1)
    if args.lora_vision:
        tile *= 2
    tile += 3 * projector_flops(config, config.vision.side**2)
    tiles = 1 + max((w * h // S**2 for w, h in config.grids), default=0)
    flops = args.epochs * sum(
        passes * language_flops(config.text, samples.lengths[i], samples.supervised[i])
        + tile * tiles * len(samples.records[i]["images"]) for i in samples.usable)
    hours = flops / (speed * 1e12 * utilisation * PROCESSES) / 3600
    for name, size in need.items():
        print(f"  {name:12} {size / 2**30:10.2f} GiB")
    if memory and need["peak"] > MEMORY_FRACTION * memory * 2**30:
        print(f"  more than {memory} GB: use --in-backward, --lora-rank 128 or a smaller --batch-size")
    tokens = args.epochs * sum(samples.lengths[i] for i in samples.usable)
    print(f"  {tokens:,} tokens, {flops / 1e15:,.3g} PFLOP: {hours:,.2f} hours on {PROCESSES} x {args.card}, "
          f"at {utilisation:.0%} of {speed:g} TFLOP/s")


# ---------------------------------------------------------------------------------------------
# 6. --check-data and --show


def check_data(args: argparse.Namespace, processor: Processor) -> None:
    """Read every record and decode every image once; write all errors to RUN/check.json."""
    raw = read_json_list(args.data)
    with ThreadPool(args.workers or os.cpu_count()) as pool:              # Pillow decodes in parallel
        found = pool.imap(partial(check_record, folder=args.images), enumerate(raw), chunksize=16)
        found = list(progress(found, total=len(raw), desc="checking"))
    records = [record for record, _ in found if isinstance(record, dict)]
    copies = Counter(str((record["messages"], record["images"])) for record in records)
    lists = {"wrong": [str(record) for record, _ in found if isinstance(record, ValueError)],
             "odd": [line for _, odd in found for line in odd],
             "duplicates": [text for text, times in copies.items() if times > 1]}
    write_json(args.out / "check.json", lists)
    print_histogram(Samples(records, processor, sys.maxsize).lengths)
    summary = ", ".join(f"{len(lines)} {name}" for name, lines in lists.items())
    print(f"{len(raw)} records: {summary}; listed in {args.out / 'check.json'}")
    if lists["wrong"]:
        raise UserError(f"{args.data} has records with errors, the first is: {lists['wrong'][0]}")


def check_record(number_and_raw: tuple[int, dict], folder: Path) -> tuple[dict | ValueError, list[str]]:
    """(the record or its error, what is unusual about its images but accepted)."""
    record, odd = try_record(number_and_raw[1], number_and_raw[0], folder), []
    if isinstance(record, ValueError):
        return record, odd
    for file in record["images"]:
        try:
            open_image(file)
            with Image.open(file) as image:
                if image.mode not in ("RGB", "L"):
                    odd.append(f"{file} is in mode {image.mode}")
                if getattr(image, "is_animated", False):
                    odd.append(f"{file} is animated: its first frame is used")
        except OSError as error:
            return ValueError(f"record {record['id']}: {error}"), []
    return record, odd


def print_histogram(lengths: list[int]) -> None:
    width = 1 + max(lengths, default=0) // 10
    bins = Counter(length // width for length in lengths)
    for i in sorted(bins):
        bar = "#" * (50 * bins[i] // max(bins.values()))
        print(f"{i * width:6} to {(i + 1) * width - 1:6} tokens {bins[i]:8} {bar}")


def show(samples: Samples, number: int) -> None:
    """Print a record as the model gets it: which tokens are image, prompt, supervised and end."""
    if not 0 <= number < len(samples):
        raise UserError(f"--show {number}: the records are 0 to {len(samples) - 1}")
    processor, record = samples.processor, samples.records[number]
    files, (ids, labels, _, _) = list(record["images"]), samples.tokenize(record)
    special = {processor.config.image_token_id: "image", processor.bos: "start", processor.eos: "end"}
    colors = {"image": 35, "start": 31, "end": 31, "prompt": 34, "answer": 32}
    kinds = []
    for token, label in zip(ids, labels):
        usual = "prompt" if label == IGNORE else "answer"
        kinds.append((special.get(token, usual), "" if label == IGNORE else "learned"))
    for (kind, learned), group in groupby(zip(kinds, ids), key=lambda pair: pair[0]):
        text = "".join(str(files.pop(0)) if kind == "image" else processor.tokenizer.id_to_token(token)
                       for _, token in group).replace("▁", " ").replace("<0x0A>", "\n")
        print(f"{kind:8}{learned:8}\033[{colors[kind]}m{text}\033[0m")
    print(f"{samples.lengths[number]} tokens with those of the images, {samples.supervised[number]} learned")


# ---------------------------------------------------------------------------------------------
# 7. Checkpoints


class Checkpoints:
    """RUN/trainer/step-000120: all that is needed to continue a run exactly. A checkpoint is written
    under another name first; the files of the run folder itself are hard links to the newest one."""

    SETTINGS = ("stage vision language init tokenizer template projector image_mode prune lora_rank "
                "lora_alpha lora_vision epochs batch_size micro_batch_size in_backward compile lr clip "
                "max_length seed dtype").split()

    def __init__(self, args: argparse.Namespace):
        self.out, self.folder, self.args = args.out, args.out / "trainer", args
        self.settings = {name: getattr(args, name) for name in self.SETTINGS}
        self.settings |= {"processes": PROCESSES, "data": hashlib.sha256(args.data.read_bytes()).hexdigest()}

    def newest(self, resume: bool) -> Path | None:
        """The checkpoint to continue from, if there is one; UserError if its settings differ."""
        found = sorted(self.folder.glob("step-*"))
        if not found:
            return None
        if not resume:
            raise UserError(f"{self.out} holds a run already: add --resume, or name another --out")
        saved = read_json(found[-1] / "run.json")
        changed = [f"{name} was {saved.get(name)!r} and is now {value!r}"
                   for name, value in self.settings.items() if saved.get(name) != value]
        if changed:
            raise UserError(f"{self.out} cannot be continued with other settings: {'; '.join(changed)}")
        return found[-1]

    def save(self, model: Llava, processor: Processor, optimizer: Adam) -> None:
        """Every process gives its shards, the first one writes."""
        shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in shards:
            module.unshard()
        state = {}
        for name, tensor in optimizer.state.items():
            gathered = full_tensor(tensor)
            if RANK == 0:
                state[name] = gathered.cpu()
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
            exported = [file.name for file in part.iterdir()]
            save_file(state, part / "optimizer.safetensors")
            (part / "run.json").write_text(json.dumps(self.settings))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"step {step} could not be saved to {self.folder} ({error}): what was saved "
                          "before is untouched; free some space and use --resume") from None
        saved = part.rename(self.folder / f"step-{step:06}")
        for name in exported:
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
    """Turn the output of save_pretrained into an adapter as PEFT saves it for a llava-hf model."""
    tensors = load_file(folder / "model.safetensors")
    save_file({f"base_model.model.model.{name.replace('language_model.model.', 'language_model.')}": tensor
               for name, tensor in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    layers = {name.rsplit(".", 1)[1] for name, module in model.named_modules() if isinstance(module, LoRA)}
    where = r".*\.(language_model|vision_tower)\." if args.lora_vision else r".*\.language_model\."
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "base_model_name_or_path": model.bases[0], "r": args.lora_rank,
        "lora_alpha": args.lora_alpha, "target_modules": rf"{where}.*\.({'|'.join(sorted(layers))})",
        "bias": "none", "modules_to_save": ["multi_modal_projector"]})


def load_trained(model: Llava, folder: Path) -> None:
    """Copy the trained weights of a checkpoint, LoRA unmerged, into a model as it was at the start."""
    parameters = dict(model.named_parameters())
    for file in folder.glob("*model.safetensors"):
        for name, saved in load_file(file).items():
            parameters[rename_key(name.removeprefix("base_model.model."), FROM_PUBLISHED)].data.copy_(saved)


# ---------------------------------------------------------------------------------------------
# 8. The command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--stage", type=int, choices=(1, 2), required=True, help="1: projector; 2: also the language model")
    add("--vision", metavar="ID", help="a CLIP: folder or hub id")
    add("--language", metavar="ID", help="a Mistral, LLaMA or Vicuna: folder or hub id")
    add("--init", metavar="ID", help="a LLaVA or a run to start from, instead of the two")
    add("--tokenizer", metavar="ID", help="where the tokenizer.json is, if not with the language model")
    add("--data", type=Path, required=True, metavar="FILE", help="records, in LLaVA's format")
    add("--images", type=Path, default=Path("."), metavar="DIR", help="folder of their images")
    add("--out", type=Path, required=True, metavar="RUN", help="folder for the run")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")

    before = parser.add_argument_group("instead of training").add_argument
    before("--plan", action="store_true",
           help="estimate memory, FLOPs and hours from config.json and the records")
    before("--card", choices=GPUS, help="the GPU to estimate for (default: a100)")
    before("--check-data", action="store_true", help="read and decode everything once, list all errors")
    before("--show", type=int, metavar="N", help="print record N in colors: image, prompt, answer, end")

    recipe = parser.add_argument_group("the recipe; defaults for stage 1, stage 2").add_argument
    recipe("--epochs", type=int, help="default: 1, 15")
    recipe("--batch-size", type=int, metavar="N", help="records in a step (default: 64, 32)")
    recipe("--lr", type=float, help="peak learning rate (default: 1e-3, 2e-5; with LoRA 2e-4)")
    recipe("--clip", type=float, metavar="NORM", help="largest norm of the gradient (default: 1)")
    recipe("--max-length", type=int, default=2048, metavar="T", help="tokens a record (default: %(default)s)")
    recipe("--template", choices=("plain", "mistral_instruct", "v1"), help="default: plain, the model's")
    recipe("--projector", choices=("linear", "mlp2x_gelu"), help="default: mlp2x_gelu")
    recipe("--image-mode", choices=("pad", "crop", "anyres"), help="default: pad")
    recipe("--prune", choices=("none", *PRUNING), help="reduce each image's tokens (default: the model's)")
    recipe("--lora-rank", type=int, metavar="R", help="train LoRA of this rank instead of all weights")
    recipe("--lora-alpha", type=float, metavar="A", help="scale LoRA by A / R (default: 2 R)")
    recipe("--lora-vision", action="store_true", help="LoRA in the vision tower, too")
    recipe("--seed", type=int, default=0, help="default: %(default)s")

    fitting = parser.add_argument_group("memory and speed").add_argument
    fitting("--micro-batch-size", type=int, metavar="N", help="records at once (default: as many as fit)")
    fitting("--checkpoint-blocks", type=int, metavar="N",
            help="decoder layers with activation checkpointing (default: as few as possible)")
    fitting("--in-backward", action="store_true",
            help="update each weight in the backward pass, so that only one gradient exists at a time")
    fitting("--compile", action="store_true", help="torch.compile each layer and the update, for GPUs")
    fitting("--device", choices=devices(), help="default: cuda if there is one, else cpu")
    fitting("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU")
    fitting("--workers", type=int, default=8 if torch.cuda.is_available() else 0, metavar="N",
            help="processes that decode images (default: %(default)s)")
    fitting("--save-every", type=int, default=500, metavar="STEPS", help="default: %(default)s")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    args = parser.parse_args(argv)
    recipe = RECIPE["lora" if args.lora_rank else str(args.stage)]
    batch_size = args.batch_size or recipe["batch_size"]
    for applies, sentence in (
            (bool(args.init) == bool(args.vision and args.language),
             "give either --init, or --vision and --language"),
            (args.card and not args.plan, "--card is the GPU of a --plan"),
            (args.lora_rank and args.stage == 1, "--lora-rank is for stage 2"),
            (not args.lora_rank and (args.lora_alpha or args.lora_vision), "--lora-... needs --lora-rank"),
            (args.in_backward and args.clip, "--in-backward updates before the norm for --clip is known"),
            (args.in_backward and args.micro_batch_size not in (None, batch_size),
             "--in-backward does not add up gradients: --micro-batch-size must be the whole batch")):
        if applies:
            parser.error(sentence)
    if args.plan and args.card is None:
        args.card = "a100"
    cuda = torch.cuda.is_available()
    on_gpu = args.card != "cpu" if args.plan else cuda
    defaults = recipe | {
        "clip": None if args.in_backward else 1.0, "lora_alpha": 2 * (args.lora_rank or 0),
        "template": "plain" if args.stage == 1 else None, "device": "cuda" if cuda else "cpu",
        "dtype": "bfloat16" if on_gpu else "float32"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    if not sys.argv[1:]:
        from tests import toy
        return toy.play(run_stage, parse)
    args = parse()
    if PROCESSES > 1:                        # torchrun: each process has its own GPU, or CPU cores
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
