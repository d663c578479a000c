"""Train a LLaVA. Stage 1 trains the projector alone, stage 2 also the language model.

    python train.py                          the toy data: both stages, in minutes on a laptop
    python train.py --stage 1 --vision openai/clip-vit-large-patch14-336 \\
        --language mistralai/Mistral-7B-Instruct-v0.2 \\
        --data blip_laion_cc_sft_558k.json --images pretrain --out runs/stage1
    python train.py --stage 2 --init runs/stage1 \\
        --data scienceqa_train.json --images ScienceQA/images/train --out runs/stage2

Records are in LLaVA's format: [{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}].
Ctrl-C saves the run and stops it; --resume continues it. On several GPUs, with losses as on one (saving
after Ctrl-C may take up to 3600 s): torchrun --shutdown-timeout 3600 --nproc-per-node N train.py ...
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
from collections import Counter, namedtuple
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import chain, groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from eval import collate, language_flops, projector_flops, vision_flops
from llava import (FROM_PUBLISHED, IGNORE, PRUNING, TEMPLATE_OF, Llava, LlavaConfig, Processor, TextConfig,
                   UserError, atomic_write, command_line, config_overrides, count_image_tokens, count_tiles,
                   default_dtype, devices, first_line, hf_config, number, open_checkpoints, open_file,
                   open_image, read_json, rename_key, save_sharded, write_json)

Args = argparse.Namespace
RECIPE = {                                   # Miao et al. 2024: 558k captions, then ScienceQA
    "1": {"lr": 1e-3, "batch_size": 64, "epochs": 1},
    "2": {"lr": 2e-5, "batch_size": 32, "epochs": 15},
    "lora": {"lr": 2e-4, "batch_size": 32, "epochs": 15},                 # LLaVA-1.5's rate of LoRA
}
CARDS = {                                    # TFLOP/s of dense bf16 in the data sheet, memory in GiB
    "a100": (312, 80), "h100": (989, 80), "h200": (989, 141), "rtx4090": (165, 24),
    "cpu": (0.1, math.inf),                  # two cores
}
UTILIZATION = {"16 bits": 0.34, "quantized": 0.11}       # H100: full stage 2 with --compile; LoRA over int4
MEMORY_FRACTION = 0.95                       # the share of a GPU's memory to use: the allocator needs some
ALLOCATOR_OVERHEAD = 1.15                    # on a CPU malloc holds 1.0 to 1.3 times the temporary tensors
CHUNK = {"gpu": 1 << 24, "cpu": 1 << 18}     # numbers updated at once; on a CPU they fit into its cache
SHARD_BYTES = 2 * 10**9                      # of a file of a checkpoint; saving holds up to two in memory
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # torchrun's
progress = partial(tqdm, leave=False, disable=RANK > 0)


# ---------------------------------------------------------------------------------------------
# 1. One stage and its training loop

def run_stage(args: Args) -> None:
    """Run one stage: read the records, set the micro-batch size, train, and save to args.out. With --show,
    --check-data or --plan, print that and stop."""
    config = open_config(args)
    if args.max_length is None:
        args.max_length = 4096 if config.image_mode == "anyres" else 2048
    processor = Processor.from_pretrained(args.tokenizer or args.init or args.language, config)
    if args.check_data:
        return check_data(args, processor)
    samples = Samples(read_records(args.data, args.images), processor, args.max_length)
    if args.show is not None:
        return show(samples, args.show)
    val = args.val and Samples(read_records(args.val, args.val_images), processor, args.max_length)
    for file, data in ((args.data, samples), (args.val, val)):
        if data and not data.usable:
            raise UserError(f"{file}: no record has an answer within --max-length {args.max_length}")
    batches = [batch for epoch in range(args.epochs) for batch in make_batches(
        samples.usable, samples.lengths, args.batch_size, args.seed + epoch)]
    checkpoints = Checkpoints(args, len(batches))
    if args.resume and args.micro_batch_size is None:        # the run's own, whatever memory is free now
        args.micro_batch_size = checkpoints.saved.get("micro_batch_size")
    with torch.device("meta"):
        sketch = Llava(config)               # shapes without memory, for the estimates
    choose_trainable(sketch, args)
    need = choose_micro_batch(sketch, samples, batches, args)             # sets the flags that were left open
    loads = [largest_load(samples, [batch], args.micro_batch_size) for batch in batches]
    batches.insert(0, batches.pop(loads.index(max(loads))))  # the largest first: it shows whether all fit
    newest = None if args.plan else checkpoints.to_resume()
    print_summary(args, samples, len(batches), newest, sketch)
    report_cut(args, samples, args.out / "cut.json")
    if args.plan:
        return print_plan(sketch, need, samples, args)
    report_cut(args, val, args.out / "val-cut.json")
    estimate = peak_memory(args.device) + estimate_memory(sketch, max(loads), args)["peak"]
    try:
        model, optimizer = build(args, config, newest)
        log = TrainingLog(args, optimizer.steps, len(batches), estimate)
        train(model, optimizer, samples, val, batches, checkpoints, log, args)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{args.device} is out of memory ({first_line(error)}): use a smaller --micro-batch-"
                        "size, more --checkpoint-blocks, --in-backward or --lora-rank") from None


def train(model: Llava, optimizer: Adam, samples: Samples, val: Samples | None, batches: list[list[int]],
          checkpoints: Checkpoints, log: TrainingLog, args: Args) -> None:
    """The training loop. A step is one update from one batch, in micro-batches that fit into memory."""
    with deferred_signals() as signals:
        began = time.perf_counter()
        for micro_batches in make_loader(samples, batches[optimizer.steps:], args):
            waited = time.perf_counter() - began
            optimizer.begin(args.lr * schedule(optimizer.steps, len(batches)))
            step, loss = optimizer.steps, 0.0        # 1 in the first step: begin has counted it
            torch.manual_seed(args.seed + step)      # random numbers depend on the step: resuming is exact
            weighted, tokens = weigh_micro_batches(micro_batches, len(batches[step - 1]))
            for micro_batch, weight in weighted:
                part = model(**to_device(micro_batch, args.device)) * weight
                check_finite("loss", part.item(), samples, batches, step)
                part.backward()                      # with --in-backward this also updates the weights
                loss += part.item()
            norm = optimizer.clip(args.clip)
            check_finite("gradient", norm, samples, batches, step)
            optimizer.step()                     # with --in-backward nothing is left to update
            line = {"loss": all_reduce(loss) / PROCESSES, "lr": optimizer.lr, "grad_norm": norm,
                    "tokens": tokens, "seconds": time.perf_counter() - began, "waited": waited}
            if val and (step == len(batches) or step % args.val_every == 0):
                line["val_loss"] = validation_loss(model, val, args)
            log.write(step, line)
            stop = all_reduce(len(signals)) > 0  # all processes stop at the same step
            if stop or step == len(batches) or step % args.save_every == 0:
                checkpoints.save(model, samples.processor, optimizer)
            if stop:
                print(f"stopped after step {step}; --resume continues the run")
                raise KeyboardInterrupt
            began = time.perf_counter()


def make_loader(samples: Samples, batches: list[list[int]], args: Args) -> DataLoader:
    """This process's part of each batch as micro-batches; a process without any takes the first record."""
    return DataLoader(samples, batch_sampler=[batch[RANK::PROCESSES] or batch[:1] for batch in batches],
                      collate_fn=partial(make_micro_batches, args.micro_batch_size), num_workers=args.workers,
                      worker_init_fn=ignore_signals, pin_memory=args.device.startswith("cuda"))


def weigh_micro_batches(micro_batches: list[dict] | OSError, batch_size: int) -> tuple[list, int]:
    """([(micro-batch, weight of its mean loss), ...], the number of supervised tokens in the step).
    Each process sums its weighted losses, and gradients are averaged over the processes: the result is
    the mean over all supervised tokens of the step. FSDP2 needs equally many passes in each process, so one
    with fewer micro-batches repeats its last one with weight 0."""
    if isinstance(micro_batches, OSError):   # see Samples.__getitem__
        raise micro_batches
    counts = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in micro_batches]
    if RANK >= batch_size:                   # it has no record in this step, only the stand-in of make_loader
        counts = [0] * len(micro_batches)
    tokens = all_reduce(sum(counts))
    missing = int(all_reduce(len(counts), dist.ReduceOp.MAX)) - len(counts)
    weighted = [(batch, PROCESSES * count / tokens) for batch, count in zip(micro_batches, counts)]
    return weighted + [(micro_batches[-1], 0.0)] * missing, int(tokens)


@torch.no_grad()
def validation_loss(model: Llava, val: Samples, args: Args) -> float:
    """The mean loss of all supervised tokens of `val`."""
    order = sorted(val.usable, key=lambda i: -val.lengths[i])
    size, total, tokens = args.micro_batch_size * PROCESSES, 0.0, 0
    batches = [order[i:i + size] for i in range(0, len(order), size)]
    loader = progress(make_loader(val, batches, args), desc="validation", delay=2)
    for batch, micro_batches in zip(batches, loader):
        weighted, count = weigh_micro_batches(micro_batches, len(batch))
        loss = sum(model(**to_device(part, args.device)).item() * weight for part, weight in weighted)
        total, tokens = total + all_reduce(loss) / PROCESSES * count, tokens + count
    if PROCESSES > 1:
        model.reshard()                      # of the root, which FSDP2 reshards in a backward pass only
    return total / tokens


def to_device(micro_batch: dict, device: str) -> dict:
    """A micro-batch with its images on the device, as uint8, to be normalized there; a copy from pinned
    memory overlaps with computing. Llava.splice reads ids and labels on the CPU."""
    return micro_batch | {"images": [image.to(device, non_blocking=True) for image in micro_batch["images"]]}


def schedule(step: int, steps: int) -> float:
    """The fraction of the learning rate at step 0, 1, ...: linear warm-up in 3% of the steps, then a cosine
    to 0. As in transformers, the first update has rate 0."""
    warmup = math.ceil(0.03 * steps)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def check_finite(what: str, value: float, samples: Samples, batches: list[list[int]], step: int) -> None:
    if not math.isfinite(value):
        names = ", ".join(str(samples.records[i]["id"]) for i in batches[step - 1])
        raise UserError(f"step {step}: the {what} is {value}; what was saved is kept. Use a lower --lr or "
                        f"remove the record that causes it; the step contained the records {names}")


@contextmanager
def deferred_signals():
    """Collect SIGINT or SIGTERM in the list that this yields, so that a step can end and be saved; the
    second one stops at once."""
    caught = []

    def handle(caught_signal: int, _) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(caught_signal)
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    previous = {name: signal.signal(name, handle) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def ignore_signals(worker: int) -> None:
    """A DataLoader worker ignores Ctrl-C and leaves the process group that torchrun stops: its parent still
    needs it to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()


class TrainingLog:
    """One line per step in RUN/log.jsonl and on the screen; only one process writes the file."""

    def __init__(self, args: Args, done: int, steps: int, estimate: float):
        """Lines after the `done` steps of the checkpoint are removed; `estimate`: bytes in the first step."""
        self.device, self.estimate = args.device, estimate
        self.bar = progress(total=steps, initial=done, desc=f"stage {args.stage}", unit="step")
        args.out.mkdir(parents=True, exist_ok=True)
        self.file = args.out / "log.jsonl" if RANK == 0 else Path(os.devnull)
        lines = self.file.read_text() if self.file.exists() else ""
        self.file.write_text("".join(lines.splitlines(True)[:done]))

    def write(self, step: int, line: dict) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step} | line) + "\n")
        val = f" | validation loss {line['val_loss']:7.4f}" if "val_loss" in line else ""
        speed = f"{line['tokens'] / line['seconds']:8.0f} answer tokens/s | waited {line['waited']:.2f} s"
        self.bar.write(f"step {step:6}/{self.bar.total} | loss {line['loss']:7.4f}{val} | gradient norm "
                       f"{line['grad_norm']:8.3f} | lr {line['lr']:.2e} | {speed}")
        if step == 1:
            self.bar.write(f"peak memory of this step: {peak_memory(self.device) / 2**30:.2f} GiB, "
                           f"estimated {self.estimate / 2**30:.2f} GiB")
        self.bar.update()


def print_summary(args: Args, samples: Samples, steps: int, newest: Path | None, model: Llava) -> None:
    start = 1 + (step_number(newest) if newest else 0)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"stage {args.stage}: {trainable:,} of {total:,} parameters are trainable; "
          f"{len(samples.usable):,} records, {steps:,} steps (from step {start}), micro-batches of "
          f"{args.micro_batch_size}, {args.checkpoint_blocks} checkpointed layers; "
          f"{args.card or args.device}, {args.dtype}; to {args.out}")


def report_cut(args: Args, samples: Samples | None, file: Path) -> None:
    """Print how many records are cut or left out; unless it is a --plan, write to `file` which."""
    if samples is None or not samples.cut:
        return
    lost = [i for i, count in enumerate(samples.supervised) if not count]
    print(f"{len(samples.cut)} records are longer than --max-length {args.max_length} and are cut; "
          f"{len(lost)} of them lose their whole answer and are left out{'' if args.plan else f': {file}'}")
    if RANK == 0 and not args.plan:
        write_json(file, {"cut": [samples.records[i]["id"] for i in samples.cut],
                          "left out": [samples.records[i]["id"] for i in lost]})


# ---------------------------------------------------------------------------------------------
# 2. Records

def read_records(file: Path, folder: Path) -> list[dict]:
    """LLaVA's records as [{"id", "messages", "images"}]; UserError for wrong fields or a missing image.
    Samples raises the errors of template and image headers, also before any model is loaded."""
    records = []
    for i, raw in enumerate(progress(read_json_list(file), desc=f"reading {file.name}")):
        record = try_record(read_record, raw, i, folder)
        if isinstance(record, ValueError):
            raise UserError(f"{file}, {record}; --check-data lists all errors")
        records.append(record)
    return records


def read_json_list(file: Path) -> list:
    raw = read_json(file)
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{file} is not a list of records")
    return raw


def try_record(read, raw, i: int, folder: Path) -> dict | ValueError:
    """read(raw, folder) with an id, where read is read_record or check_record; or a ValueError to report."""
    try:
        return read(raw, folder) | {"id": raw.get("id", i)}
    except (ValueError, OSError, AttributeError, KeyError, TypeError, IndexError) as error:
        name = raw.get("id", i) if isinstance(raw, dict) else i
        reason = error if isinstance(error, ValueError | OSError) else f"not a LLaVA record ({error!r})"
        return ValueError(f"record {name}: {reason}")


def read_record(record: dict, folder: Path) -> dict:
    turns, messages, first = record["conversations"], [], 1
    if turns and turns[0]["from"] == "gpt":  # LLaVA also drops an answer before the first question
        turns, first = turns[1:], 2
    for i, turn in enumerate(turns):
        speaker, role = ("gpt", "assistant") if i % 2 else ("human", "user")
        if turn["from"] != speaker:
            raise UserError(f"turn {first + i} is from {turn['from']!r}; it must be from {speaker!r}")
        turn["value"].encode()               # UnicodeEncodeError, a ValueError, for a lone surrogate
        if speaker == "gpt" and not turn["value"].strip():
            raise UserError("an answer is empty")
        messages.append({"role": role, "content": turn["value"]})
    if len(messages) < 2:
        raise UserError("it has no answer")
    names = record.get("image") or []
    if isinstance(names, str):
        names = [names]
    if (marks := sum(message["content"].count("<image>") for message in messages)) != len(names):
        raise UserError(f"{marks} <image> in the text, but {len(names)} images")
    if any("<image>" in message["content"] for message in messages[1::2]):
        raise UserError("an answer contains <image>, which stands for an image in a question")
    for name in names:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"image {name} is outside of {folder}")
        if not os.path.exists(folder / name):
            raise UserError(f"there is no image {folder / name}")
    return {"messages": messages, "images": [folder / name for name in names]}


class Samples(Dataset):
    """Records as ids, labels and uint8 images, cut to max_length tokens; an image counts as its tokens
    after token reduction. Lists with an entry per record: `lengths` and `supervised`, numbers of tokens,
    and `tiles`. Lists of indices: `cut`, the records that are too long, `usable`, those with an answer."""

    def __init__(self, records: list[dict], processor: Processor, max_length: int):
        self.records, self.processor, self.max_length = records, processor, max_length
        self.sizes = [image_sizes(record, processor.config) for record in progress(records, desc="sizes")]
        self.tiles = [sum(count_tiles(processor.config, size) for size in sizes) for sizes in self.sizes]
        self.lengths, self.supervised, self.cut = [], [], []
        for i in progress(range(len(records)), desc="measuring"):
            _, labels, length, complete = self.tokenize(i)
            self.lengths.append(length)
            self.supervised.append(len(labels) - labels.count(IGNORE))
            if not complete:
                self.cut.append(i)
        self.usable = [i for i, count in enumerate(self.supervised) if count]

    def tokenize(self, i: int) -> tuple[list[int], list[int], int, bool]:
        """(ids, labels, number of tokens including those of the images, whether nothing was cut)."""
        try:
            ids, labels = self.processor.tokenize(self.records[i]["messages"])
        except UserError as error:
            raise UserError(f"record {self.records[i]['id']}: {error}") from None
        config, length, sizes = self.processor.config, 0, list(self.sizes[i])
        for position, token in enumerate(ids):
            more = count_image_tokens(config, sizes.pop(0)) if token == config.image_token_id else 1
            if length + more > self.max_length:
                return ids[:position], labels[:position], length, False
            length += more
        return ids, labels, length, True

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict | OSError:
        ids, labels, _, _ = self.tokenize(i)
        shown = ids.count(self.processor.config.image_token_id)           # some may have been cut
        try:
            images = [open_image(file) for file in self.records[i]["images"][:shown]]
        except OSError as error:             # raised in a worker it would have a long traceback
            return error
        return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]),
                "images": [self.processor.pixels(image) for image in images],
                "image_sizes": [(image.height, image.width) for image in images]}


def image_sizes(record: dict, config: LlavaConfig) -> list[tuple[int, int]]:
    """(height, width) of each image; (0, 0) without AnyRes, where the size does not matter."""
    if config.image_mode != "anyres":
        return [(0, 0)] * len(record["images"])
    try:
        return [Image.open(file).size[::-1] for file in record["images"]]            # reads the header only
    except MemoryError:
        raise
    except Exception as error:               # as in open_image
        raise OSError(f"{', '.join(map(str, record['images']))}: not a readable image: {error}") from None


def make_batches(usable: list[int], lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """One epoch: every record in `usable` once, in random batches of records of similar length."""
    generator = torch.Generator().manual_seed(seed)
    order = [usable[i] for i in torch.randperm(len(usable), generator=generator)]
    pools = [order[i:i + 50 * batch_size] for i in range(0, len(order), 50 * batch_size)]
    order = [i for pool in pools for i in sorted(pool, key=lambda i: -lengths[i])]
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def make_micro_batches(size: int, samples: list[dict | OSError]) -> list[dict] | OSError:
    """The samples as right-padded batches of at most `size` rows, those with most ids first; or an error."""
    if errors := [sample for sample in samples if isinstance(sample, OSError)]:
        return errors[0]
    samples = sorted(samples, key=lambda s: -s["input_ids"].shape[1])
    return [collate(samples[i:i + size]) for i in range(0, len(samples), size)]


# ---------------------------------------------------------------------------------------------
# 3. The model and its trainable parameters

def open_config(args: Args) -> LlavaConfig:
    """The configuration of the model to train; reads config.json alone."""
    sources = [args.init] if args.init else [args.vision, args.language]
    fields, _, _ = open_checkpoints(sources, weights=False, moved=args.base)
    if args.stage == 2 and fields.get("template") == "plain":             # --init is a run of stage 1
        fields["template"] = TEMPLATE_OF[fields["text"].model_type]
    return LlavaConfig(**fields | config_overrides(args))


def build(args: Args, config: LlavaConfig, newest: Path | None) -> tuple[Llava, Adam]:
    """Model and optimizer as they were at the checkpoint `newest`, or at the start."""
    torch.manual_seed(args.seed)
    options = {name: value for name, value in vars(config).items() if name not in ("vision", "text")}
    model = Llava.from_pretrained(args.init, vision=args.vision, language=args.language, base=args.base,
                                  dtype=getattr(torch, args.dtype), device=args.device,
                                  quantize=args.quantize or "none", **options)
    choose_trainable(model, args)
    if args.device == "cpu":
        for p in model.parameters():
            p.data = p.data.clone()          # into memory: until now they are mapped files
    if newest:
        load_trained(model, newest)
    wrap_layers(model, args)
    optimizer = Adam(model.named_parameters(), in_backward=args.in_backward, compile=args.compile)
    if newest:
        optimizer.load(newest)
    return model, optimizer


def choose_trainable(model: Llava, args: Args) -> None:
    """Set requires_grad, and insert LoRA. Stage 1: the projector. Stage 2: also the language model, or LoRA
    in its layers (not lm_head) and, with --lora-vision, in the vision tower's."""
    trainable = ("projector.", "image_newline")
    if args.stage == 2 and not args.lora_rank:
        trainable += ("language_model.",)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(trainable))
    if not args.lora_rank:
        return
    layers, tower = list(model.language_model.layers), model.vision_tower.layers
    if args.lora_vision:                     # only in those that VisionTower.forward evaluates
        layers += tower[:len(tower) + 1 + model.config.vision_feature_layer]
    like = model.language_model.embed_tokens.weight
    for layer in layers:
        for name, module in list(layer.named_modules()):
            if hasattr(module, "in_features"):           # nn.Linear or QuantizedLinear
                layer.set_submodule(name, LoRA(module, args.lora_rank, args.lora_alpha, like))    # trainable


class LoRA(nn.Module):
    """A frozen linear layer and a trainable one of low rank beside it (Hu et al. 2021, arXiv:2106.09685):
    y = W x + alpha / rank · B A x, where B starts at zero. `like` has the device and dtype of A and B."""

    def __init__(self, frozen: nn.Module, rank: int, alpha: float, like: Tensor):
        super().__init__()
        self.frozen, self.scale = frozen, alpha / rank
        options = {"bias": False, "device": like.device, "dtype": like.dtype}
        self.lora_A = nn.Linear(frozen.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, frozen.out_features, **options)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.scale * self.lora_B(self.lora_A(x))


def wrap_layers(model: Llava, args: Args) -> None:
    """Compile each layer, checkpoint the first ones of the language model, shard all by FSDP2, in place."""
    model.language_model.register_forward_pre_hook(partial(connect_parameters, model))
    if args.compile:
        for layer in [*model.vision_tower.layers, *model.language_model.layers]:
            layer.forward = torch.compile(layer.forward)
    for layer in model.language_model.layers[:args.checkpoint_blocks]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    if PROCESSES > 1:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        mesh = init_device_mesh(args.device, (PROCESSES,))   # without it fully_shard prefers a GPU
        for module in [*model.language_model.layers, model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)


def connect_parameters(model: Llava, _, inputs: tuple) -> tuple:
    """Add 0 × all trainable parameters outside the language model to its input, so that a batch without
    images gives them the gradient 0: other processes would wait for it, and one process would skip their
    update, but several would not."""
    others = [p.sum() for name, p in model.named_parameters()
              if p.requires_grad and not name.startswith("language_model.")]
    return inputs[0] + 0 * sum(others), *inputs[1:]


def local_shard(t: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return t.to_local() if PROCESSES > 1 else t


def full_tensor(t: Tensor) -> Tensor:
    """A sharded tensor put together again; all processes must call this."""
    return t.full_tensor() if PROCESSES > 1 else t


def all_reduce(value: float, op=dist.ReduceOp.SUM) -> float:
    """A number that each process has, reduced over all of them by `op`."""
    if PROCESSES == 1:
        return value
    cell = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(cell, op)
    return cell.item()


# ---------------------------------------------------------------------------------------------
# 4. The optimizer

class Adam:
    """Adam without weight decay, computed in float32 for bf16 weights, too: in bf16 alone, steps of lr
    2e-5 are rounded away. So the optimizer keeps the low 16 bits of each float32 master weight, and
    stores bf16 moments with stochastic rounding: small changes survive on average. That is 8 bytes a
    weight in all, if each weight is updated `in_backward`, as soon as its gradient is complete."""

    def __init__(self, named_parameters, in_backward=False, compile=False):
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.betas, self.eps, self.steps, self.square_sum = (0.9, 0.999), 1e-8, 0, 0.0
        self.in_backward, self.state = in_backward, {}
        if compile:
            self.update_chunk = torch.compile(self.update_chunk)
        for name, p in self.parameters.items():
            self.state[f"{name}.m"], self.state[f"{name}.v"] = torch.zeros_like(p), torch.zeros_like(p)
            if p.dtype == torch.bfloat16:
                self.state[f"{name}.low"] = torch.zeros_like(p)  # int16 bits as bf16: gloo, NCCL lack int16
            if in_backward:
                p.register_post_accumulate_grad_hook(partial(self.update, name))

    def load(self, folder: Path) -> None:
        self.steps = step_number(folder)
        for file in sorted(folder.glob("optimizer*.safetensors")):
            for name, saved in open_file(file).items():
                state = self.state[name]
                if PROCESSES > 1:
                    saved = distribute_tensor(saved.to(state.device), state.device_mesh, state.placements)
                state.copy_(saved)

    def begin(self, lr: float) -> None:
        """Begin the next step, from 1. `rate` is lr with the bias correction of m, v_correction that of v:
        tensors, so that torch.compile treats them as variables."""
        self.steps, self.lr, self.square_sum = self.steps + 1, lr, 0.0
        self.rate = torch.tensor(lr / (1 - self.betas[0]**self.steps))
        self.v_correction = torch.tensor(1 - self.betas[1]**self.steps)

    def clip(self, max_norm: float | None) -> float:
        """Return the norm of the whole gradient and, without in_backward, scale it down to max_norm; None and
        0 mean no limit."""
        if self.in_backward:
            return math.sqrt(all_reduce(float(self.square_sum)))
        return full_tensor(nn.utils.clip_grad_norm_(self.parameters.values(), max_norm or math.inf)).item()

    def step(self) -> None:
        for name, p in self.parameters.items():
            if p.grad is not None:
                self.update(name, p)

    @torch.no_grad()
    def update(self, name: str, p: Tensor) -> None:
        """Update one parameter and clear its gradient, in chunks, so that the temporary float32 tensors take
        little memory. All chunks share the noise that rounds them."""
        gradient, weight = local_shard(p.grad).reshape(-1), local_shard(p.detach()).view(-1)
        p.grad = None
        size = CHUNK["cpu" if p.device.type == "cpu" else "gpu"]
        keys, noise = [f"{name}.{key}" for key in ("m", "v", "low")], None
        if p.dtype == torch.bfloat16:        # float32 weights have neither low bits nor rounding noise
            noise = torch.randint(1 << 16, (min(size, len(weight)),), dtype=torch.int32, device=p.device)
        states = [local_shard(self.state[key]).view(-1) for key in keys if key in self.state]
        for chunk, *others in zip(*(tensor.split(size) for tensor in (gradient, weight, *states))):
            if self.in_backward:             # not in update_chunk, where a compiled sum would be slow
                self.square_sum += torch.linalg.vector_norm(chunk, dtype=torch.float32).square()
            self.update_chunk(chunk, *others, noise=noise, rate=self.rate, v_correction=self.v_correction)

    def update_chunk(self, gradient: Tensor, p: Tensor, m: Tensor, v: Tensor, low: Tensor | None = None, *,
                     noise: Tensor | None, rate: Tensor, v_correction: Tensor) -> None:
        """Adam's rule, in place; the memory of the float32 gradient is reused."""
        gradient = gradient.float()
        new_m = m.float().lerp_(gradient, 1 - self.betas[0])
        new_v = v.float().lerp_(gradient.square_(), 1 - self.betas[1])
        root = torch.div(new_v, v_correction, out=gradient).sqrt_().add_(self.eps)
        change = torch.div(new_m, root, out=root).mul_(rate)
        if low is None:                      # float32: new_m is m, new_v is v
            p.sub_(change)
        else:
            split_bits(join_bits(p, low).sub_(change), p, low)
            round_stochastically(new_m, m, noise[:len(m)])
            round_stochastically(new_v, v, noise[:len(v)])


def join_bits(high: Tensor, low: Tensor) -> Tensor:
    """bf16 weights and the low 16 bits of their master weights -> the float32 master weights."""
    return high.float().view(torch.int32).add_(low.view(torch.int16).int()).view(torch.float32)


def split_bits(exact: Tensor, high: Tensor, low: Tensor) -> None:
    """The reverse: `high` becomes the nearest bf16, `low` the low 16 bits; `exact` is overwritten."""
    bits = exact.view(torch.int32)
    low.view(torch.int16).copy_(bits)        # negative from 0x8000 on, which undoes the rounding up of `high`
    high.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


def round_stochastically(exact: Tensor, out: Tensor, noise: Tensor) -> None:
    """float32 -> bf16, up or down with the probabilities that keep the mean; noise in 0 ... 65535.
    `exact` is overwritten."""
    out.view(torch.int16).copy_(exact.view(torch.int32).add_(noise).bitwise_right_shift_(16))


# ---------------------------------------------------------------------------------------------
# 5. Memory, and --plan

Load = namedtuple("Load", "tokens supervised tiles")         # of a micro-batch; tokens with padding


def largest_load(samples: Samples, batches: list[list[int]], micro_batch_size: int) -> Load:
    """An upper bound of each field over the micro-batches of all `batches` and processes: as if the longest
    records, those with most supervised tokens and those with most tiles came together."""
    loads = []
    for part in [batch[rank::PROCESSES] or batch[:1] for batch in batches for rank in range(PROCESSES)]:
        lengths, supervised, tiles = (sorted((column[i] for i in part), reverse=True)[:micro_batch_size]
                                      for column in (samples.lengths, samples.supervised, samples.tiles))
        loads.append(Load(tokens=len(lengths) * lengths[0], supervised=sum(supervised), tiles=sum(tiles)))
    return Load(*(max(column) for column in zip(*loads)))


def estimate_memory(model: Llava, load: Load, args: Args) -> dict[str, float]:
    """Bytes on one device, by use; "peak" is the most that is needed at once. The model may be on device
    meta. In tests the estimate is within 3% of the bytes of all tensors of a 7B run."""
    text, size = model.config.text, 2 if args.dtype == "bfloat16" else 4
    C, on_cpu = text.hidden_size, (args.card or args.device) in ("cpu", "mps")       # without a fused RMSNorm
    attention, mlp = layer_bytes(text, args, size, on_cpu)
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    need = {"weights": weight_bytes(model, args, size),
            "optimizer": (6 if size == 2 else 8) * sum(trainable) / PROCESSES,
            "gradients": size * (max(trainable) if args.in_backward else sum(trainable)) / PROCESSES,
            "activations": activation_bytes(model.config, load, args, size, attention, mlp),
            "logits": 12 * load.supervised * text.vocab_size}    # float32: log-softmax, two gradients
    # Gradients before this backward pass (of earlier micro-batches), and when it reaches checkpointed layers.
    earlier, so_far = 0.0, need["gradients"] * (1 - args.checkpoint_blocks / text.num_hidden_layers)
    if args.in_backward:
        so_far = 0.0
    elif args.micro_batch_size < math.ceil(args.batch_size / PROCESSES):
        earlier = so_far = need["gradients"]
    at_update = need["activations"] if args.in_backward else 0.0          # lm_head's update is the first
    # Gradients of an MLP's output and of 3 inner tensors; in stage 2 down_proj's input is freed by then.
    in_mlp = load.tokens * size * (C + (2 if args.stage == 2 else 3) * text.intermediate_size)
    in_layer = load.tokens * (attention + mlp) + in_mlp      # backward of a layer: also what autograd kept
    if on_cpu:                               # the last layer: backward of its first norm, its attention freed
        last = load.tokens * ((24 + size) * C - attention)   # six float32 tensors
    else:                                    # the last layer: forward of its attention
        last = load.tokens * 4 * size * C
        in_layer -= load.tokens * size * C   # the fused norm keeps x itself, the layer's input
    inputs = load.tokens * size * C * args.checkpoint_blocks
    update = 24 * min(max(trainable), CHUNK["cpu" if on_cpu else "gpu"])  # six float32 tensors
    phases = (need["activations"] + need["logits"] + earlier,             # the loss
              need["activations"] + last + earlier,                       # the last layer's attention
              inputs + in_layer + so_far,                                 # backward of a checkpointed layer
              need["gradients"] + in_layer,                               # backward of the first layer
              at_update + need["gradients"] + update)                     # the update
    need["peak"] = need["weights"] + need["optimizer"] + max(phases) * (ALLOCATOR_OVERHEAD if on_cpu else 1)
    return need


def weight_bytes(model: Llava, args: Args, size: int) -> float:
    """Bytes of all weights on one device. Of several processes each holds its shard, and in full what FSDP2
    gathers: two decoder layers at a time, and all that is outside of decoder layers."""
    total, gathered = 0.0, 0.0
    for name, p in model.named_parameters():
        bits = 8 * size
        if args.quantize and name.endswith(("frozen.weight", "lm_head.weight")) and "vision" not in name:
            bits = 8 + 16 / p.shape[1]       # int8 and a bf16 scale a row
            if args.quantize == "int4" and "lm_head" not in name:
                bits = 5                     # 4 bits, a bf16 scale and a bf16 middle for 32 weights
        total += p.numel() * bits / 8
        if not name.startswith("language_model.layers.") or name.split(".")[2] in ("0", "1"):     # any two
            gathered += p.numel() * bits / 8
    return total if PROCESSES == 1 else total / PROCESSES + gathered


def layer_bytes(text: TextConfig, args: Args, size: int, on_cpu: bool) -> tuple[int, int]:
    """What autograd keeps of a decoder layer, in bytes per token: of its attention, of its MLP."""
    C, inner = text.hidden_size, text.intermediate_size
    qkvy = 2 * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
    norm = 4 if on_cpu else size             # a norm's input, on a CPU in float32
    attention, mlp = norm * C + size * qkvy, norm * C + size * 3 * inner
    if args.stage == 2:                      # inputs of the trainable layers; with LoRA also of its B
        rank = args.lora_rank or 0
        attention += size * (C + 4 * rank)   # o_proj's input y is in qkvy
        mlp += size * (C + inner + 3 * rank)
        if not args.lora_rank:               # the norms' normalized inputs, for their weights' gradients
            attention, mlp = attention + size * C, mlp + size * C
    return attention, mlp


def activation_bytes(config: LlavaConfig, load: Load, args: Args, size: int, attention: int, mlp: int) -> int:
    """Bytes that autograd keeps of one micro-batch; of a checkpointed layer only its input."""
    text, vision = config.text, config.vision
    other_layers = text.num_hidden_layers - args.checkpoint_blocks
    total = load.tokens * size * text.hidden_size * args.checkpoint_blocks
    if other_layers > 0:                     # the last MLP sees supervised positions only
        total += load.tokens * (other_layers * (attention + mlp) - mlp) + load.supervised * mlp
    patch = vision.hidden_size + 2 * text.hidden_size
    if args.lora_vision:
        patch += (8 * vision.hidden_size + 3 * vision.intermediate_size) * vision.num_hidden_layers
    return total + load.tiles * vision.side**2 * size * patch


def choose_micro_batch(model: Llava, samples: Samples, batches: list, args: Args) -> dict[str, float]:
    """Set args.micro_batch_size and args.checkpoint_blocks where the flags left them open: the largest
    micro-batch that fits, with as few checkpointed layers as possible. Returns the memory needed."""
    available = math.inf
    if args.card:
        available = CARDS[args.card][1] * 2**30
    elif args.device.startswith("cuda"):     # free now, on the GPU that has least
        available = all_reduce(torch.cuda.mem_get_info(args.device)[0], dist.ReduceOp.MIN)
    share, layers = math.ceil(args.batch_size / PROCESSES), len(model.language_model.layers)
    sizes, checkpointed = [args.micro_batch_size or share], [args.checkpoint_blocks or 0]
    if not args.micro_batch_size and not args.in_backward:
        sizes = [share >> i for i in range(share.bit_length())]           # halves
    if args.checkpoint_blocks is None and args.stage == 2:
        checkpointed = [layers * i // 8 for i in range(9)]
    for size in sizes:
        load = largest_load(samples, batches, size)
        for blocks in checkpointed:
            args.micro_batch_size, args.checkpoint_blocks = size, min(blocks, layers)
            need = estimate_memory(model, load, args)
            if need["peak"] < MEMORY_FRACTION * available:
                return need
    return need                              # nothing fits: the run tries the smallest


def peak_memory(device: str) -> int:
    """Peak bytes: of tensors on a CUDA device, otherwise of the process (0 on Windows)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource                      # missing on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak        # macOS counts bytes, Linux KiB


def print_plan(model: Llava, need: dict, samples: Samples, args: Args) -> None:
    """Print the estimated memory, disk space, FLOPs and hours on the GPU --card. A backward pass costs
    as much as a forward pass, and for layers with trainable weights twice as much. The FLOPs of LoRA itself,
    at rank 128 7% of a 7B model's, are left out."""
    config, (speed, memory), bf16 = model.config, CARDS[args.card], args.dtype == "bfloat16"
    passes = 2 + args.checkpoint_blocks / config.text.num_hidden_layers
    if args.stage == 2 and not args.lora_rank:
        passes += 1
    tower = vision_flops(config.vision, config.vision.num_hidden_layers - 1)
    tile = (2 if args.lora_vision else 1) * tower + 3 * projector_flops(config, config.vision.side**2)
    flops = args.epochs * sum(
        passes * language_flops(config.text, samples.lengths[i], samples.supervised[i])
        + tile * samples.tiles[i] for i in samples.usable)
    utilization = UTILIZATION["quantized" if args.quantize else "16 bits"]
    hours = flops / (speed * 1e12 * utilization * PROCESSES) / 3600
    for name, size in need.items():
        print(f"  {name:12} {size / 2**30:10.2f} GiB")
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad) * (2 if bf16 else 4)
    disk = 2 * (weights + PROCESSES * need["optimizer"])     # the newest checkpoint and the next one
    print(f"  disk         {disk / 2**30:10.2f} GiB while training, {weights / 2**30:.2f} GiB in the end\n"
          f"  host memory  {min(2 * SHARD_BYTES, disk) / 2**30:10.2f} GiB while saving, besides Python's")
    if need["peak"] > MEMORY_FRACTION * memory * 2**30:
        print(f"  more than {MEMORY_FRACTION:.0%} of {memory} GiB: use --in-backward, --lora-rank 128, with "
              "it --quantize int4, or a smaller --batch-size")
    tokens = args.epochs * sum(samples.lengths[i] for i in samples.usable)
    print(f"  {tokens:,} tokens, {flops / 1e15:,.3g} PFLOP: {hours:,.2f} hours on {PROCESSES} x {args.card}, "
          f"at {utilization:.0%} of {speed:g} TFLOP/s")


# ---------------------------------------------------------------------------------------------
# 6. --check-data and --show

def check_data(args: Args, processor: Processor) -> None:
    """Read every record and decode every image; write what is wrong, odd or repeated to RUN/check.json."""
    raw = read_json_list(args.data)
    with ThreadPool(args.workers or os.cpu_count()) as pool:              # Pillow decodes in parallel
        check = partial(check_record, processor)
        found = pool.imap(lambda i: try_record(check, raw[i], i, args.images), range(len(raw)), chunksize=16)
        found = list(progress(found, total=len(raw), desc="checking"))
    records = [record for record in found if isinstance(record, dict)]
    copies = Counter(str((record["messages"], record["images"])) for record in records)
    lists = {"wrong": [str(error) for error in found if isinstance(error, ValueError)],
             "odd": [line for record in records for line in record["odd"]],
             "duplicates": [text for text, times in copies.items() if times > 1]}
    write_json(args.out / "check.json", lists)
    lengths = Samples(records, processor, sys.maxsize).lengths
    counts, edges = np.histogram(lengths, bins=10)
    for count, edge in zip(counts, edges):
        print(f"from {edge:6.0f} tokens {count:8} {'#' * (50 * count // max(1, *counts))}")
    summary = ", ".join(f"{len(lines)} {name}" for name, lines in lists.items())
    print(f"{len(raw)} records: {summary}; listed in {args.out / 'check.json'}")
    if lists["wrong"]:
        raise UserError(f"{args.data} has records with errors, the first is: {lists['wrong'][0]}")


def check_record(processor: Processor, raw: dict, folder: Path) -> dict:
    """Like read_record, and tokenizes the text and decodes the images; "odd": what is unusual about them."""
    record, odd = read_record(raw, folder), []
    processor.tokenize(record["messages"])   # UserError where they do not fit the template
    for file in record["images"]:
        open_image(file)
        with Image.open(file) as image:
            if image.mode not in ("RGB", "L"):
                odd.append(f"{file} is in mode {image.mode}")
            if is_animated(image):
                odd.append(f"{file} is animated: its first frame is used")
    return record | {"odd": odd}


def is_animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:                        # its second frame is damaged: Pillow raises errors of many types
        return True


def show(samples: Samples, index: int) -> None:
    """Print a record as the model reads it: the kind of each token, and whether it is supervised."""
    if not 0 <= index < len(samples):
        raise UserError(f"--show {index}: the records are 0 to {len(samples) - 1}")
    processor, files = samples.processor, list(samples.records[index]["images"])
    ids, labels, _, _ = samples.tokenize(index)
    special = {processor.config.image_token_id: "image", processor.bos: "start", processor.eos: "end"}
    colors = {"image": 35, "start": 31, "end": 31, "prompt": 34, "answer": 32}       # of the terminal
    kinds = []
    for token, label in zip(ids, labels):
        kind, mark = ("prompt", "") if label == IGNORE else ("answer", "supervised")
        kinds.append((special.get(token, kind), mark))
    for (kind, mark), group in groupby(zip(kinds, ids), key=lambda pair: pair[0]):
        text = "".join(str(files.pop(0)) if kind == "image" else processor.tokenizer.id_to_token(token)
                       for _, token in group).replace("▁", " ").replace("<0x0A>", "\n")
        print(f"{kind:8}{mark:11}\033[{colors[kind]}m{text}\033[0m")
    print(f"{samples.lengths[index]} tokens with those of the images, {samples.supervised[index]} supervised")


# ---------------------------------------------------------------------------------------------
# 7. Checkpoints

def step_number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


class Checkpoints:
    """RUN/trainer/step-000120: all that is needed to continue a run exactly. A checkpoint is written
    under another name first; the files of the run folder itself are hard links to the newest one."""

    SETTINGS = ("stage vision language init tokenizer template projector image_mode prune keep_tokens "
                "lora_rank lora_alpha lora_vision quantize epochs batch_size micro_batch_size in_backward "
                "compile lr clip max_length seed dtype").split()

    def __init__(self, args: Args, steps: int):
        self.out, self.folder, self.args, self.total_steps = args.out, args.out / "trainer", args, steps
        self.newest = max(self.folder.glob("step-*"), default=None, key=step_number)
        self.data = hashlib.sha256(args.data.read_bytes()).hexdigest()    # now: the file may change later
        self.saved = read_json(self.newest / "run.json") if self.newest else {}

    def settings(self) -> dict:
        chosen = {name: getattr(self.args, name) for name in self.SETTINGS}
        return chosen | {"processes": PROCESSES, "data": self.data}

    def to_resume(self) -> Path | None:
        """The newest checkpoint or None. UserError without --resume, or if settings, data or the number of
        processes differ."""
        if self.newest is None and (self.out / "config.json").exists():
            raise UserError(f"{self.out} holds a model, which the run would overwrite: name another --out")
        if self.newest is None:
            return None
        if not self.args.resume:
            raise UserError(f"{self.out} holds a run already: add --resume, or name another --out")
        changed = [f"{name} was {self.saved.get(name)!r} and is now {value!r}"
                   for name, value in self.settings().items() if self.saved.get(name) != value]
        if changed:
            raise UserError(f"{self.out} cannot be continued with other settings: {'; '.join(changed)}")
        if RANK == 0:                        # the run may have been killed between save and publish
            self.publish(self.newest)
        return self.newest

    def save(self, model: Llava, processor: Processor, optimizer: Adam) -> None:
        """All processes gather the tensors, one at a time; rank 0 writes them. After the last step the
        optimizer state is not needed."""
        state = optimizer.state if optimizer.steps < self.total_steps else {}
        tensors = ((name, full_tensor(tensor).cpu()) for name, tensor in state.items())
        if RANK == 0:
            self.write(model, processor, optimizer.steps, tensors)
        else:
            for _ in chain(model.hf_tensors(whole=False), tensors):
                pass
        if PROCESSES > 1:
            dist.barrier()

    def write(self, model: Llava, processor: Processor, step: int, tensors) -> None:
        unfinished = self.folder / "part"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            if self.args.lora_rank:
                save_adapter(unfinished, model, self.args)
            else:
                model.save_pretrained(unfinished, whole=False, shard_bytes=SHARD_BYTES)
            processor.save_pretrained(unfinished)
            if step < self.total_steps:
                save_sharded(unfinished / "optimizer.safetensors", tensors, SHARD_BYTES)
            write_json(unfinished / "run.json", self.settings())
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(f"step {step} could not be saved to {self.folder} ({error}): what was saved "
                          "before is untouched; free some space and use --resume") from None
        self.publish(unfinished.rename(self.folder / f"step-{step:06}"))

    def publish(self, checkpoint: Path) -> None:
        """Link the model's files of the newest checkpoint into the run folder, and remove the older ones."""
        for file in checkpoint.iterdir():
            if not file.name.startswith(("optimizer", "run.json")):
                with atomic_write(self.out / file.name) as target:
                    link(file, target)
        for older in set(self.folder.glob("step-*")) - {checkpoint}:
            shutil.rmtree(older)


def link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:                          # a file system without hard links
        shutil.copyfile(source, target)


def save_adapter(folder: Path, model: Llava, args: Args) -> None:
    """Write the trained weights as PEFT saves the adapter of a llava-hf model, and config.json. A name is
    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight."""
    write_json(folder / "config.json", hf_config(model.config, whole=False) | {"bases": model.bases})
    tensors = ((f"base_model.model.model.{name.replace('language_model.model.', 'language_model.')}", tensor)
               for name, tensor in model.hf_tensors(whole=False))
    save_sharded(folder / "adapter_model.safetensors", tensors, sys.maxsize)         # one file
    targets = {name.rsplit(".", 1)[1] for name, module in model.named_modules() if isinstance(module, LoRA)}
    where = r".*\.(language_model|vision_tower)\." if args.lora_vision else r".*\.language_model\."
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "base_model_name_or_path": model.bases[0], "r": args.lora_rank,
        "lora_alpha": args.lora_alpha, "target_modules": rf"{where}.*\.({'|'.join(sorted(targets))})",
        "bias": "none", "modules_to_save": ["multi_modal_projector"]})


def load_trained(model: Llava, folder: Path) -> None:
    """Copy the trained weights of a checkpoint into a newly built model."""
    parameters = dict(model.named_parameters())
    for file in folder.glob("*model*.safetensors"):
        for name, saved in open_file(file).items():
            parameters[rename_key(name.removeprefix("base_model.model."), FROM_PUBLISHED)].data.copy_(saved)


# ---------------------------------------------------------------------------------------------
# 8. The command line

def add_flags(parser: argparse.ArgumentParser) -> None:
    add, positive = parser.add_argument, number(int, 1)
    add("--stage", type=int, choices=(1, 2), required=True, help="1: projector; 2: also the language model")
    add("--vision", metavar="ID", help="a CLIP: folder or hub id")
    add("--language", metavar="ID", help="a Mistral, LLaMA or Vicuna: folder or hub id")
    add("--init", metavar="ID", help="a LLaVA or a run to start from, instead of the two")
    add("--base", action="append", default=[], metavar="ID",
        help="new place of a base of the run --init; once for each, in the order of its config.json")
    add("--tokenizer", metavar="ID", help="where the tokenizer.json is, if not with the language model")
    add("--data", type=Path, required=True, metavar="FILE", help="records, in LLaVA's format")
    add("--images", type=Path, default=Path("."), metavar="DIR", help="folder of their images")
    add("--val", type=Path, metavar="FILE", help="records for the validation loss")
    add("--val-images", type=Path, metavar="DIR", help="folder of their images (default: --images)")
    add("--val-every", type=positive, metavar="STEPS", help="default: 100")
    add("--out", type=Path, required=True, metavar="RUN", help="folder for the run")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")

    instead = parser.add_argument_group("instead of training").add_argument
    instead("--plan", action="store_true", help="estimate memory, disk space, FLOPs and hours")
    instead("--card", choices=CARDS, help="the GPU to estimate for (default: a100)")
    instead("--check-data", action="store_true", help="read and decode everything once, list all errors")
    instead("--show", type=int, metavar="N", help="print record N in colors: image, prompt, answer, end")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    positive, count, rate = number(int, 1), number(int, 0), number(float, 0)
    recipe = parser.add_argument_group("the recipe; defaults for stage 1, stage 2").add_argument
    recipe("--epochs", type=positive, help="default: 1, 15")
    recipe("--batch-size", type=positive, metavar="N", help="records in a step (default: 64, 32)")
    recipe("--lr", type=rate, help="peak learning rate (default: 1e-3, 2e-5; with LoRA 2e-4)")
    recipe("--clip", type=rate, metavar="NORM", help="largest gradient norm, 0: none (1; --in-backward: 0)")
    recipe("--max-length", type=positive, metavar="T", help="tokens a record (default: 2048, anyres 4096)")
    recipe("--template", choices=("plain", "mistral_instruct", "v1"), help="default: plain, the model's")
    recipe("--projector", choices=("linear", "mlp2x_gelu"), help="default: the model's, or mlp2x_gelu")
    recipe("--image-mode", choices=("pad", "crop", "anyres"), help="default: the model's, or pad")
    recipe("--prune", choices=("none", *PRUNING), help="reduce each tile's tokens (default: the model's)")
    recipe("--keep-tokens", type=positive, metavar="N", help="tokens of a tile after --prune")
    recipe("--lora-rank", type=positive, metavar="R", help="train LoRA of this rank instead of all weights")
    recipe("--lora-alpha", type=number(float, 1e-9), metavar="A", help="scale LoRA by A / R (default: 2 R)")
    recipe("--lora-vision", action="store_true", help="LoRA in the vision tower, too")
    recipe("--quantize", choices=("int8", "int4"), help="keep the frozen language model in few bits (QLoRA)")
    recipe("--seed", type=number(int, 0, 2**62), default=0, help="default: %(default)s")

    fitting = parser.add_argument_group("memory and speed").add_argument
    fitting("--micro-batch-size", type=positive, metavar="N",
            help="records at once (default: what fits; on a CPU the whole batch)")
    fitting("--checkpoint-blocks", type=count, metavar="N",
            help="first layers with activation checkpointing (default: as few as fit; in stage 1 none)")
    fitting("--in-backward", action="store_true", help="update each weight when its gradient is complete")
    fitting("--compile", action="store_true", help="torch.compile each layer and the update, for GPUs")
    device, workers = ("cuda", 8) if torch.cuda.is_available() else ("cpu", 0)
    fitting("--device", choices=devices(), default=device, help="default: %(default)s")
    fitting("--dtype", choices=("bfloat16", "float32"),
            help="default: bfloat16 on a GPU that supports it or with --quantize, float32 on a CPU")
    fitting("--workers", type=count, default=workers, metavar="N", help="for images (default: %(default)s)")
    fitting("--save-every", type=positive, default=500, metavar="STEPS", help="default: %(default)s")


def parse(argv: list[str] | None = None) -> Args:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    add_training_flags(parser)
    args = parser.parse_args(argv)
    recipe = RECIPE["lora" if args.lora_rank else str(args.stage)]
    batch_size = args.batch_size or recipe["batch_size"]
    for applies, sentence in (
            (bool(args.vision) != bool(args.language) or bool(args.init) == bool(args.vision),
             "give either --init, or --vision and --language"),
            (args.card and not args.plan, "--card is the GPU of a --plan"),
            ((args.val_images or args.val_every) and not args.val, "--val-images and --val-every need --val"),
            (args.lora_rank and args.stage == 1, "--lora-rank is for stage 2"),
            (not args.lora_rank and (args.lora_alpha or args.lora_vision), "--lora-... needs --lora-rank"),
            (args.quantize and not args.lora_rank, "--quantize needs --lora-rank: frozen weights only"),
            (args.quantize and PROCESSES > 1, "--quantize works in one process only"),
            (PROCESSES > 1 and ":" in args.device, "torchrun gives each process its own GPU: --device cuda"),
            (args.in_backward and args.clip, "--in-backward updates before the norm for --clip is known"),
            (args.in_backward and args.micro_batch_size not in (None, batch_size),
             "--in-backward does not add up gradients: --micro-batch-size must be the whole batch")):
        if applies:
            parser.error(sentence)
    if args.plan and args.card is None:
        args.card = "a100"
    for_gpu = args.plan and args.card != "cpu"
    bf16 = for_gpu or default_dtype(args.card or args.device, args.quantize or "none") == "bfloat16"
    defaults = recipe | {
        "clip": None if args.in_backward else 1.0, "lora_alpha": 2 * (args.lora_rank or 0),
        "template": "plain" if args.stage == 1 else None, "val_every": 100, "val_images": args.images,
        "dtype": "bfloat16" if bf16 else "float32"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    if not sys.argv[1:]:
        if PROCESSES > 1:
            raise UserError("the toy run takes one process: python train.py")
        from tests import toy
        return toy.run_and_check(run_stage, parse)
    args = parse()
    if args.out.is_file():
        raise OSError(f"--out {args.out} is a file, not a folder for the run")
    if PROCESSES == 1:
        return run_stage(args)
    if args.device.startswith("cuda"):                 # torchrun: each process has its own GPU, or CPU cores
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=timedelta(hours=3))      # others wait while the first writes up to 60 GB
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        run_stage(args)
        dist.barrier()                       # none leaves while another one still communicates
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main)
