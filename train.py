"""Teach a LLaVA to see. Stage 1 trains the projector alone, stage 2 also the language model.

    python train.py                          the doll's house: both stages, in minutes on a laptop
    python train.py --stage 1 --vision openai/clip-vit-large-patch14-336 \\
        --language mistralai/Mistral-7B-Instruct-v0.2 \\
        --data blip_laion_cc_sft_558k.json --images pretrain --out runs/stage1
    python train.py --stage 2 --init runs/stage1 \\
        --data scienceqa_train.json --images ScienceQA/images/train --out runs/stage2

Records are LLaVA's: [{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}]. A run
may be stopped at any moment (Ctrl-C saves first); --resume goes on as if nothing had happened.
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
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava import (IGNORE, TEMPLATES, Llava, Processor, command_line, count_image_tokens,
                   open_image, read_json, replacing)

RECIPE = {                                   # the seed paper's: 558k captions, then ScienceQA
    1: {"lr": 1e-3, "batch_size": 64, "epochs": 1},
    2: {"lr": 2e-5, "batch_size": 32, "epochs": 15},
}


# ---------------------------------------------------------------------------------------------
# 1. Records


def read_records(file: Path, folder: Path) -> list[dict]:
    """LLaVA's records as {"id", "messages", "pictures"}. Whatever can be wrong with one without
    decoding its pictures is found here, before any model is loaded."""
    raw = read_json(file)
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{file} is not a list of records")
    records = []
    for number, record in enumerate(tqdm(raw, desc=f"reading {Path(file).name}", leave=False)):
        try:
            records.append(read_record(record, folder))
        except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
            name = record.get("id", number) if isinstance(record, dict) else number
            reason = error if isinstance(error, (ValueError, OSError)) else f"not a LLaVA record ({error!r})"
            raise ValueError(f"{file}, record {name}: {reason}") from None
    return records


def read_record(record: dict, folder: Path) -> dict:
    turns = record["conversations"]
    turns = turns[1:] if turns and turns[0]["from"] == "gpt" else turns   # as LLaVA does
    for turn, speaker in zip(turns, ("human", "gpt") * len(turns)):
        if turn["from"] != speaker:
            raise ValueError(f"{turn['from']!r} speaks where {speaker!r} should")
        if speaker == "gpt" and not turn["value"].strip():
            raise ValueError("an answer is empty")
    if len(turns) < 2:
        raise ValueError("there is no answer to learn")
    pictures = record.get("image") or []
    pictures = [pictures] if isinstance(pictures, str) else pictures
    if (marks := sum(turn["value"].count("<image>") for turn in turns)) != len(pictures):
        raise ValueError(f"{marks} <image> in the text, but {len(pictures)} pictures")
    for picture in pictures:
        if os.path.isabs(picture) or ".." in Path(picture).parts:
            raise ValueError(f"picture {picture} lies outside {folder}")
        if not os.path.exists(folder / picture):
            raise ValueError(f"there is no picture {folder / picture}")
    messages = [{"role": "user" if turn["from"] == "human" else "assistant", "content": turn["value"]}
                for turn in turns]
    return {"id": record.get("id"), "messages": messages, "pictures": [folder / p for p in pictures]}


class Samples(Dataset):
    """Records as ids, labels and uint8 pictures, cut to max_length tokens as they are after the
    splice. `lengths` holds how many those are; `cut` the records that lost some, `usable` those
    with an answer left to learn from."""

    def __init__(self, records: list[dict], processor: Processor, max_length: int):
        self.records, self.processor, self.max_length = records, processor, max_length
        self.lengths, self.cut, self.usable = [], [], []
        for i, record in enumerate(tqdm(records, desc="measuring", leave=False)):
            ids, labels, length = self.tokenize(record)
            self.lengths.append(length)
            self.usable += [i] * any(label != IGNORE for label in labels)
            self.cut += [i] * (len(ids) < len(processor.tokenize(record["messages"])[0]))

    def tokenize(self, record: dict) -> tuple[list[int], list[int], int]:
        """Ids, labels, and the number of tokens that they become with the pictures spliced in."""
        ids, labels = self.processor.tokenize(record["messages"])
        config, sizes, length = self.processor.config, iter(picture_sizes(record, self.processor)), 0
        for i, token in enumerate(ids):
            more = count_image_tokens(config, next(sizes)) if token == config.image_token_id else 1
            if length + more > self.max_length:
                return ids[:i], labels[:i], length
            length += more
        return ids, labels, length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict | Exception:
        try:
            pictures = [open_image(file) for file in self.records[i]["pictures"]]
        except OSError as error:             # raised in a worker it would come with a long traceback
            return error
        ids, labels, _ = self.tokenize(self.records[i])
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
    random so that small changes survive on average. 8 bytes a weight with everything.
    """

    def __init__(self, named_parameters, betas=(0.9, 0.999), eps: float = 1e-8):
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.betas, self.eps, self.steps = betas, eps, 0
        self.state = {}
        for name, p in self.parameters.items():
            self.state[f"{name}.m"], self.state[f"{name}.v"] = torch.zeros_like(p), torch.zeros_like(p)
            if p.dtype == torch.bfloat16:
                self.state[f"{name}.rest"] = torch.zeros_like(p, dtype=torch.int16)

    def load(self, checkpoint: Path) -> None:
        self.steps = int(checkpoint.name.removeprefix("step-"))
        for name, saved in load_file(checkpoint / "optimizer.safetensors").items():
            self.state[name].copy_(saved)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients, which it clears."""
        self.steps += 1
        for name, p in self.parameters.items():
            if p.grad is not None:
                self.update(name, p, lr)
            p.grad = None

    def update(self, name: str, p: Tensor, lr: float) -> None:
        (beta1, beta2), gradient = self.betas, p.grad.float()
        m, v = self.state[f"{name}.m"], self.state[f"{name}.v"]
        new_m = m.float().lerp_(gradient, 1 - beta1)
        new_v = v.float().lerp_(gradient.square_(), 1 - beta2)
        change = new_m / (1 - beta1**self.steps)
        change /= (new_v / (1 - beta2**self.steps)).sqrt_().add_(self.eps)
        if p.dtype == torch.bfloat16:
            rest = self.state[f"{name}.rest"]
            master = join(p, rest).sub_(change, alpha=lr)
            split(master, p, rest)
            round_at_random(new_m, m)
            round_at_random(new_v, v)
        else:
            p.sub_(change, alpha=lr)
            m.copy_(new_m)
            v.copy_(new_v)


def join(high: Tensor, rest: Tensor) -> Tensor:
    """bf16 weights and their other 16 bits -> the float32 they are."""
    return ((high.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


def split(exact: Tensor, high: Tensor, rest: Tensor) -> None:
    """The reverse, in place: `high` becomes the nearest bf16, `rest` what is left of the bits."""
    bits = exact.view(torch.int32)
    nearest = (bits + 0x8000) >> 16
    high.copy_(nearest.short().view(torch.bfloat16))
    rest.copy_((bits - (nearest << 16)).short())


def round_at_random(exact: Tensor, out: Tensor) -> None:
    """float32 -> bf16, up or down with the chances that keep the mean (out of torch's generator)."""
    bits = exact.view(torch.int32)
    bits += torch.randint_like(bits, 1 << 16)
    out.copy_((bits >> 16).short().view(torch.bfloat16))


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at step 0, 1, ...: 3% of linear warm-up, then a cosine to 0."""
    warmup = math.ceil(0.03 * steps)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---------------------------------------------------------------------------------------------
# 3. The run


def train(model: Llava, optimizer: Adam, batches, steps: int, args, save) -> None:
    """The loop. Every step leaves a line in log.jsonl, every args.save_every steps a checkpoint."""
    stop = []                                # Ctrl-C and kill wait for the end of the step
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.append(True))
    bar = tqdm(total=steps, initial=optimizer.steps, desc=f"stage {args.stage}", unit="step")
    began = time.perf_counter()
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        waited = time.perf_counter() - began
        step, lr = optimizer.steps + 1, args.lr * schedule(optimizer.steps, steps)
        torch.manual_seed(args.seed + step)  # chance depends on the step alone, so resuming is exact
        learned = [int((micro["labels"][:, 1:] != IGNORE).sum()) for micro in batch]
        loss = torch.zeros((), device=args.device)
        for micro, count in zip(batch, learned):     # every answer token of the step weighs the same
            part = model(**micro) * (count / sum(learned))
            part.backward()
            loss += part.detach()
        norm = nn.utils.clip_grad_norm_(optimizer.parameters.values(), args.clip)
        if not math.isfinite(loss + norm):
            raise ValueError(f"step {step}: loss {loss:.4g}, gradient {norm:.4g}; the weights are as "
                             f"before this step and {args.out} as last saved")
        optimizer.step(lr)
        seconds = time.perf_counter() - began
        line = {"step": step, "loss": loss.item(), "lr": lr, "grad_norm": norm.item(),
                "tokens": sum(learned), "seconds": seconds, "waited": waited}
        with (args.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        bar.write(f"step {step:6}/{steps} | loss {loss:7.4f} | gradient {norm:8.3f} | lr {lr:.2e} | "
                  f"{sum(learned) / seconds:8.0f} answer tokens/s | waited {waited:5.2f} s")
        bar.update()
        if stop or step == steps or step % args.save_every == 0:
            save()
        if stop:
            print(f"stopped after step {step}; --resume goes on from here")
            raise KeyboardInterrupt
        began = time.perf_counter()


class Checkpoints:
    """RUN/trainer/step-000120: all that a run needs to go on to the bit. Each is written under
    another name first; the files of the run folder itself are links into the newest."""

    SETTINGS = ("stage", "vision", "language", "init", "tokenizer", "template", "projector",
                "image_mode", "epochs", "batch_size", "micro_batch_size", "lr", "clip", "max_length",
                "seed", "dtype")

    def __init__(self, args: argparse.Namespace):
        self.out, self.folder = args.out, args.out / "trainer"
        self.run = {name: getattr(args, name) for name in self.SETTINGS}
        self.run["data"] = hashlib.sha256(args.data.read_bytes()).hexdigest()

    def newest(self, resume: bool) -> Path | None:
        """The checkpoint to go on from, if there is one of this very run."""
        found = sorted(self.folder.glob("step-*"))
        if found and not resume:
            raise ValueError(f"{self.out} holds a run already: add --resume, or name another --out")
        theirs = read_json(found[-1] / "run.json") if found else self.run
        if changed := [f"{name} was {theirs.get(name)!r} and is now {value!r}"
                       for name, value in self.run.items() if theirs.get(name) != value]:
            raise ValueError(f"{self.out} cannot go on with other settings: {'; '.join(changed)}")
        return found[-1] if found else None

    def save(self, model: Llava, processor: Processor, optimizer: Adam) -> None:
        part, older = self.folder / "part", list(self.folder.glob("step-*"))
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part, trained_only=True)
        processor.save_pretrained(part)
        opened_by_others = [file.name for file in part.iterdir()]
        save_file({k: v.cpu() for k, v in optimizer.state.items()}, part / "optimizer.safetensors")
        (part / "run.json").write_text(json.dumps(self.run))
        whole = part.rename(self.folder / f"step-{optimizer.steps:06}")
        for name in opened_by_others:
            with replacing(self.out / name) as file:
                os.link(whole / name, file)
        for folder in older:
            shutil.rmtree(folder)


def open_parts(args: argparse.Namespace, checkpoint: Path | None) -> tuple[Llava, Processor]:
    """The model to train and its processor: of the checkpoint, of --init, or of two halves."""
    wanted = {"dtype": getattr(torch, args.dtype), "device": args.device}
    for name in ("projector", "image_mode", "template"):
        wanted |= {name: getattr(args, name)} if getattr(args, name) else {}
    if checkpoint:
        model = Llava.from_pretrained(checkpoint, **wanted)
        model.bases = read_json(checkpoint / "config.json")["bases"]
    elif args.init:
        model = Llava.from_pretrained(args.init, **wanted)
    else:
        model = Llava.from_pretrained(vision=args.vision, language=args.language, **wanted)
    if args.stage == 2 and not args.template and model.config.template == "plain":
        model.config = replace(model.config, template=TEMPLATES[model.config.text.model_type])
    words = checkpoint or args.tokenizer or args.init or args.language
    return model, Processor.from_pretrained(words, model.config)


def run(args: argparse.Namespace) -> None:
    """One stage, from records to a run folder."""
    records, checkpoints = read_records(args.data, args.images), Checkpoints(args)
    checkpoint = checkpoints.newest(args.resume)
    torch.manual_seed(args.seed)
    model, processor = open_parts(args, checkpoint)
    learning = ("projector.", "image_newline") + ("language_model.",) * (args.stage == 2)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(learning))
    samples = Samples(records, processor, args.max_length)
    batches = [batch for epoch in range(args.epochs) for batch in make_batches(
        samples.usable, samples.lengths, args.batch_size, args.seed + epoch)]
    optimizer = Adam(model.named_parameters())
    if checkpoint:
        optimizer.load(checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "log.jsonl"             # without the steps after the checkpoint
    kept = log.read_text().splitlines(True)[:optimizer.steps] if log.exists() else []
    log.write_text("".join(kept))
    introduce(args, samples, batches, optimizer, model)
    loader = DataLoader(samples, batch_sampler=batches[optimizer.steps:], num_workers=args.workers,
                        collate_fn=Collate(args.micro_batch_size))
    train(model, optimizer, loader, len(batches), args,
          save=partial(checkpoints.save, model, processor, optimizer))


def introduce(args: argparse.Namespace, samples: Samples, batches, optimizer: Adam, model) -> None:
    """What is about to happen, and what of the data will not take part."""
    learned = sum(p.numel() for p in optimizer.parameters.values())
    print(f"stage {args.stage}: {learned:,} of {sum(p.numel() for p in model.parameters()):,} weights "
          f"learn from {len(samples.usable):,} records in {len(batches):,} steps "
          f"(from step {optimizer.steps + 1}), on {args.device} in {args.dtype}, to {args.out}")
    lost = sorted(set(range(len(samples))) - set(samples.usable))
    if samples.cut:
        print(f"{len(samples.cut)} records are longer than --max-length {args.max_length} and are cut; "
              f"{len(lost)} of them lose all of their answer and are left out: {args.out / 'cut.json'}")
        with replacing(args.out / "cut.json") as file:
            file.write_text(json.dumps({"cut": [samples.records[i]["id"] for i in samples.cut],
                                        "left out": [samples.records[i]["id"] for i in lost]}))


# ---------------------------------------------------------------------------------------------
# 4. The command line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, gpu = parser.add_argument, torch.cuda.is_available()
    add("--stage", type=int, choices=(1, 2), required=True, help="1: the projector; 2: also the language model")
    add("--vision", metavar="ID", help="a CLIP: folder or hub id")
    add("--language", metavar="ID", help="a Mistral, LLaMA or Vicuna: folder or hub id")
    add("--init", metavar="ID", help="a LLaVA or a run to start from, instead of the two")
    add("--tokenizer", metavar="ID", help="where the tokenizer.json is, if not with the language model")
    add("--data", type=Path, required=True, metavar="FILE", help="records, in LLaVA's format")
    add("--images", type=Path, default=Path("."), metavar="DIR", help="folder of their pictures")
    add("--out", type=Path, required=True, metavar="RUN", help="folder for the run")
    add("--resume", action="store_true", help="go on where the run in --out stopped")
    add("--epochs", type=int, help="default: 1, 15")
    add("--batch-size", type=int, metavar="N", help="records per step (default: 64, 32)")
    add("--micro-batch-size", type=int, metavar="N", help="records at once (default: all of the step)")
    add("--lr", type=float, help="peak learning rate (default: 1e-3, 2e-5)")
    add("--clip", type=float, default=1.0, metavar="NORM", help="of the gradient (default: %(default)s)")
    add("--max-length", type=int, default=2048, metavar="T", help="tokens per record (default: %(default)s)")
    add("--template", choices=("plain", "mistral_instruct", "v1"), help="default: plain in stage 1, then the language model's")
    add("--projector", choices=("linear", "mlp2x_gelu"), help="default: mlp2x_gelu")
    add("--image-mode", choices=("pad", "crop", "anyres"), help="default: pad")
    add("--save-every", type=int, default=500, metavar="STEPS", help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--device", default="cuda" if gpu else "cpu", help="default: %(default)s")
    add("--dtype", default="bfloat16" if gpu else "float32", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--workers", type=int, default=8 if gpu else 0, metavar="N", help="processes that decode pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, value in RECIPE[args.stage].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.micro_batch_size = args.micro_batch_size or args.batch_size
    args.template = args.template or ("plain" if args.stage == 1 else None)
    if bool(args.init) == bool(args.vision and args.language):
        parser.error("give either --init, or --vision and --language")
    return args


def main() -> None:
    if sys.argv[1:]:
        run(parse())
    else:
        from tests import toy
        toy.play(run, parse)


if __name__ == "__main__":
    command_line(main)
