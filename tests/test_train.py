"""train.py: exact steps, exact resuming, errors in the data, estimated memory, several processes."""

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import llava
import train
from llava import Llava, LlavaConfig, Processor, TextConfig, VisionConfig, replace
from tests import toy

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)                     # equal bytes; and a forked process has no other threads
tqdm.set_lock(threading.RLock())             # its own lock is shared with forked processes: killed in it, all wait


def turn(speaker: str, value: str) -> dict:
    return {"from": speaker, "value": value}


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    """A folder with a LLaVA of random weights, base/, and 22 records, data.json, half with images."""
    folder, tokenizer = tmp_path_factory.mktemp("toy_folder"), toy.make_tokenizer()
    words = tokenizer.get_vocab_size()
    config = LlavaConfig(
        vision=VisionConfig(32, 48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16),
        text=TextConfig("mistral", words, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                        num_attention_heads=3, num_key_value_heads=1, head_dim=16), image_token_id=words)
    torch.manual_seed(0)
    Llava(config).save_pretrained(folder / "base")
    Processor(tokenizer.to_str(), config).save_pretrained(folder / "base")
    records = []
    for i in range(22):
        asked = "<image>\n" * (i % 2) + "What color do you see? " * (1 + i % 5)
        told = f"The color is {('red', 'blue', 'green')[i % 3]}. " * (1 + i % 4)
        records.append({"id": f"r{i}", "conversations": [turn("human", asked), turn("gpt", told)]})
        if i % 2:
            records[-1]["image"] = f"{i}.png"
            Image.new("RGB", (40, 20 + i), (i * 9, 0, 200)).save(folder / f"{i}.png")
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def flags(toy_folder: Path, out: Path, more: str = "") -> list[str]:
    return (f"--stage 2 --init {toy_folder}/base --data {toy_folder}/data.json --images {toy_folder} "
            f"--epochs 2 --batch-size 5 --lr 1e-2 --device cpu --out {out} {more}").split()


def go(toy_folder: Path, out: Path, more: str = "") -> dict[str, torch.Tensor]:
    """Train, and return what the run folder then holds."""
    train.run_stage(train.parse(flags(toy_folder, out, more)))
    return load_file(next(out.glob("*model.safetensors")))


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(toy_folder):
    """The run that others are compared with: 10 steps, never interrupted."""
    go(toy_folder, toy_folder / "whole")
    return toy_folder / "whole"


def weights(folder: Path) -> dict[str, bytes]:
    assert [file.name for file in (folder / "trainer").iterdir()] == ["step-000010"]
    return {"model.safetensors": (folder / "model.safetensors").read_bytes()}


def refused(toy_folder: Path, out: Path, more: str = "", records=None) -> str:
    """The sentence with which a run is refused."""
    if records is not None:
        (out.parent / "bad.json").write_text(records if isinstance(records, str) else json.dumps(records))
        more += f" --data {out.parent}/bad.json"
    with pytest.raises((ValueError, OSError)) as error:
        train.run_stage(train.parse(flags(toy_folder, out, more)))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------
# The step


def gradients(toy_folder: Path, micro_batch_size: int) -> torch.Tensor:
    """Of one step over the same eight records, all in one row."""
    model = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32)
    processor = Processor.from_pretrained(toy_folder / "base", model.config)
    samples = train.Samples(train.read_records(toy_folder / "data.json", toy_folder), processor, 2048)
    batch = train.make_micro_batches(micro_batch_size, [samples[i] for i in range(8)])
    micros, _ = train.weigh_micro_batches(batch, 8)
    for micro, weight in micros:
        (model(**micro) * weight).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(toy_folder, size):
    together, apart = gradients(toy_folder, 8), gradients(toy_folder, size)
    assert (apart - together).norm() / together.norm() < 1e-6


def test_frozen_weights_do_not_change(toy_folder, tmp_path):
    before = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32).state_dict()
    for stage, moves in (("1 --template v1", ("projector.",)), ("2", ("projector.", "language_model."))):
        go(toy_folder, tmp_path / stage[0], f"--stage {stage}")
        after = Llava.from_pretrained(tmp_path / stage[0], dtype=torch.float32).state_dict()
        for name in before:
            assert torch.equal(before[name], after[name]) != name.startswith(moves), name


def test_labels_that_are_all_ignored_raise(toy_folder, tmp_path):
    model, batch = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32), inputs(toy_folder)
    with pytest.raises(llava.UserError, match="all labels are -100"):
        model(**batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert "no record has an answer within --max-length 3" in refused(
        toy_folder, tmp_path / "run", "--max-length 3")


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("more", ["", "--in-backward"])
def test_a_nonfinite_step_raises_before_it_is_saved(toy_folder, tmp_path, monkeypatch, where, more):
    forward, calls = Llava.forward, []

    def poisoned(model, **inputs):
        loss = forward(model, **inputs)
        calls.append(loss)
        if len(calls) == 4 and where == "gradient":  # 0 in forward, 0/0 in backward
            return loss + (0 * model.projector[0].bias.sum()).abs().sqrt()
        return loss * math.nan if len(calls) == 4 else loss

    updates, update = [], train.Adam.update

    def watched(adam, *weight):
        updates.append(adam.steps)
        update(adam, *weight)

    monkeypatch.setattr(Llava, "forward", poisoned)
    monkeypatch.setattr(train.Adam, "update", watched)
    sentence = refused(toy_folder, tmp_path / "run", f"--save-every 2 {more}")
    assert re.match(rf"step 4: the {where} is nan.* records (r\d+, ){{4}}r\d+$", sentence)
    assert 3 in updates
    assert 4 not in updates or (where, more) == ("gradient", "--in-backward")
    assert [folder.name for folder in (tmp_path / "run/trainer").iterdir()] == ["step-000002"]
    Llava.from_pretrained(tmp_path / "run")


def simulate(dtype: torch.dtype, split: bool, steps: int = 3000) -> torch.Tensor:
    """Where weights of std 0.02 end at lr 2e-5 under gradients that shrink a hundredfold."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(4096, generator=generator) * 0.02
    direction = torch.randn(4096, generator=generator)
    weight = torch.nn.Parameter(start.bfloat16().to(dtype))
    adam = train.Adam([("w", weight)]) if split else None
    plain = None if split else torch.optim.Adam([weight], lr=2e-5)
    torch.manual_seed(2)
    for step in range(steps):
        noise = torch.randn(4096, generator=generator)
        weight.grad = ((direction + noise) * 100 ** (-step / steps)).to(dtype)
        if split:
            adam.begin(2e-5)
            adam.step()
        else:
            plain.step()
    if split and dtype == torch.bfloat16:
        return train.join_bits(weight.data, adam.state["w.low"].view(torch.int16))
    return weight.detach().float()


def test_adam_on_bf16_weights_ends_where_float32_adam_ends():
    generator = torch.Generator().manual_seed(1)
    start = (torch.randn(4096, generator=generator) * 0.02).bfloat16().float()
    exact = simulate(torch.float32, split=False)
    way = (exact - start).norm()
    assert (simulate(torch.float32, split=True) - exact).norm() / way < 1e-4
    assert (simulate(torch.bfloat16, split=True) - exact).norm() / way < 0.02
    assert (simulate(torch.bfloat16, split=False) - exact).norm() / way > 0.9    # what it is there against


def test_in_backward_keeps_no_gradient_and_gives_equal_weights(toy_folder, tmp_path, monkeypatch):
    held, step = [], train.Adam.step

    def watched(adam):
        held.append(sum(p.grad is not None for p in adam.parameters.values()) / len(adam.parameters))
        step(adam)

    monkeypatch.setattr(train.Adam, "step", watched)
    go(toy_folder, tmp_path / "after", "--clip 1e9")
    go(toy_folder, tmp_path / "within", "--in-backward")
    assert held == [1.0] * 10 + [0.0] * 10
    assert weights(tmp_path / "within") == weights(tmp_path / "after")


def test_both_stages_from_a_vision_tower_and_a_language_model(toy_folder, tmp_path):
    toy.write_clip(tmp_path / "clip", steps=1, size=50, batch=8)
    toy.write_language(tmp_path / "mistral", toy.MISTRAL, toy.make_tokenizer(), steps=1, batch=2)
    records = json.loads((toy_folder / "data.json").read_text())[1::2]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    train.run_stage(train.parse(
        f"--stage 1 --vision {tmp_path}/clip --language {tmp_path}/mistral --batch-size 4 "
        f"--data {tmp_path}/captions.json --images {toy_folder} --out {tmp_path}/stage1".split()))
    stored = load_file(tmp_path / "stage1/model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"multi_modal_projector"}
    assert Llava.from_pretrained(tmp_path / "stage1").config.template == "plain"
    go(toy_folder, tmp_path / "stage2", f"--init {tmp_path}/stage1")
    assert Llava.from_pretrained(tmp_path / "stage2").config.template == "mistral_instruct"


# ---------------------------------------------------------------------------------------------
# Stopping and going on


def test_ctrl_c_waits_for_the_step_and_resuming_gives_equal_weights(toy_folder, whole, tmp_path, monkeypatch):
    step, out = train.Adam.step, tmp_path / "run"

    def interrupted(adam):
        step(adam)
        if adam.steps == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Adam, "step", interrupted)
        go(toy_folder, out)
    assert len(log(out)) == 4
    go(toy_folder, out, "--resume")
    assert weights(out) == weights(whole)


def start(toy_folder: Path, out: Path, more: str) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=go, args=(toy_folder, out, more))
    child.start()
    return child


def die_at(count: int, function):
    """`function`, after whose count-th call the process is killed."""
    calls = []

    def dying(*args, **kwargs):
        calls.append(function(*args, **kwargs))
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
    return dying


@pytest.mark.parametrize("place, name, count", [
    (llava, "save_file", 3),                 # in the middle of saving
    (os, "link", 9),                         # some links are old, some new
])
def test_a_killed_run_resumes_to_equal_weights(toy_folder, whole, tmp_path, monkeypatch, place, name, count):
    with monkeypatch.context() as patch:
        patch.setattr(place, name, die_at(count, getattr(place, name)))
        child = start(toy_folder, tmp_path, "--save-every 2")
        child.join()
    assert child.exitcode == -signal.SIGKILL and (tmp_path / "trainer").exists()
    go(toy_folder, tmp_path, "--resume --save-every 2")
    assert weights(tmp_path) == weights(whole)
    assert [line["loss"] for line in log(tmp_path)] == [line["loss"] for line in log(whole)]


def test_a_run_killed_before_its_last_links_publishes_them_when_resumed(toy_folder, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "link", lambda *_: signal.default_int_handler(signal.SIGINT, None))
        go(toy_folder, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    go(toy_folder, tmp_path, "--resume")
    assert weights(tmp_path) == weights(whole)


def test_a_signal_to_the_process_group_waits_for_the_step_with_workers_too(toy_folder, tmp_path, monkeypatch):
    def alone(more: str) -> None:
        os.setsid()                          # a process group of its own
        go(toy_folder, tmp_path / "run", more)

    step = train.Adam.step
    with monkeypatch.context() as patch:
        patch.setattr(train.Adam, "step", lambda adam: (time.sleep(0.3), step(adam)))
        child = multiprocessing.get_context("fork").Process(target=alone, args=("--workers 1",))
        child.start()
        while not (tmp_path / "run/log.jsonl").exists() or len(log(tmp_path / "run")) < 2:
            assert child.is_alive()
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGTERM)
        child.join()
    (saved,) = (tmp_path / "run/trainer").iterdir()
    assert 2 <= int(saved.name.removeprefix("step-")) == len(log(tmp_path / "run")) < 10
    start(toy_folder, tmp_path / "run", "--workers 1 --resume").join()
    start(toy_folder, tmp_path / "whole", "--workers 1").join()
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("kill", range(int(os.environ.get("LLAVA_TEST_KILLS", 2))))
def test_a_run_killed_at_a_random_moment_resumes_to_equal_weights(toy_folder, tmp_path, kill):
    more = "--save-every 1 " + ("--dtype bfloat16", "--dtype bfloat16 --in-backward", "")[kill % 3]
    began = time.perf_counter()
    start(toy_folder, tmp_path / "whole", more).join()
    seconds = time.perf_counter() - began
    child = start(toy_folder, tmp_path / "run", more)
    time.sleep(random.uniform(0, seconds))
    child.kill()
    child.join()
    print(f"killed after step {len(log(tmp_path / 'run')) if (tmp_path / 'run').exists() else 0}")
    start(toy_folder, tmp_path / "run", f"{more} --resume").join()
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    losses = [[line["loss"] for line in log(tmp_path / run)] for run in ("run", "whole")]
    assert losses[0] == losses[1] and len(losses[1]) == 10


@pytest.mark.parametrize("more", ["--dtype bfloat16", "--lora-rank 2 --lora-vision --in-backward"])
def test_bf16_and_lora_runs_resume_to_equal_weights(toy_folder, tmp_path, monkeypatch, more):
    expected, begin = go(toy_folder, tmp_path / "whole", more), train.Adam.begin

    def out_of_power(adam, lr):
        if adam.steps == 7:
            raise RuntimeError("out of power")
        begin(adam, lr)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(train.Adam, "begin", out_of_power)
        go(toy_folder, tmp_path / "run", f"{more} --save-every 3")
    found = go(toy_folder, tmp_path / "run", f"{more} --save-every 3 --resume")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_full_disk_leaves_the_checkpoint_before(toy_folder, tmp_path, monkeypatch):
    calls, save_file = [], llava.save_file

    def full(tensors, file, metadata=None):
        calls.append(file)
        if len(calls) == 4:                  # the optimizer state of the second checkpoint
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, file, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(llava, "save_file", full)
        sentence = refused(toy_folder, tmp_path / "run", "--save-every 3")
    assert sentence.startswith("step 6 could not be saved") and "No space left" in sentence
    assert [folder.name for folder in (tmp_path / "run/trainer").iterdir()] == ["step-000003"]
    Llava.from_pretrained(tmp_path / "run")
    go(toy_folder, tmp_path / "run", "--save-every 3 --resume")


def test_a_file_system_without_hard_links_gets_copies(toy_folder, tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    go(toy_folder, tmp_path)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "trainer/step-000010" / name).read_bytes()


def test_resuming_with_other_flags_or_data_is_refused(toy_folder, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert "holds a run already" in refused(toy_folder, tmp_path / "run")
    sentence = refused(toy_folder, tmp_path / "run", "--resume --lr 1e-3 --seed 1 --lora-rank 2")
    assert "lr was 0.01 and is now 0.001" in sentence and "seed was 0 and is now 1" in sentence
    assert "lora_rank was None and is now 2" in sentence and "clip" not in sentence
    records = json.loads((toy_folder / "data.json").read_text())
    assert "data was" not in sentence
    assert "data was" in refused(toy_folder, tmp_path / "run", "--resume", records[1:])


# ---------------------------------------------------------------------------------------------
# Trainable parameters and memory


def inputs(toy_folder: Path) -> dict:
    config = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32).config
    processor = Processor.from_pretrained(toy_folder / "base", config)
    samples = train.Samples(train.read_records(toy_folder / "data.json", toy_folder), processor, 2048)
    return train.make_micro_batches(4, [samples[i] for i in range(4)])[0]


def test_an_adapter_opens_merged(toy_folder, tmp_path, monkeypatch):
    trained, save = [], train.Checkpoints.save
    monkeypatch.setattr(train.Checkpoints, "save", lambda *all: (trained.append(all[1]), save(*all)))
    stored = go(toy_folder, tmp_path, "--lora-rank 2 --lora-alpha 6 --lora-vision")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    assert re.fullmatch(config["target_modules"], "model.language_model.layers.0.mlp.up_proj")
    assert not re.fullmatch(config["target_modules"], "model.multi_modal_projector.linear_1")
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in stored
    # seven layers of each decoder block, six of each tower block but the last; and the projector
    assert len(stored) == 2 * (3 * 7 + 2 * 6) + 4
    base = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32)
    merged = Llava.from_pretrained(tmp_path, dtype=torch.float32)
    batch = inputs(toy_folder)
    with torch.no_grad():
        before, adapted, opened = (model(**batch) for model in (base, trained[0], merged))
    assert abs(opened - adapted) < 1e-5 < abs(before - adapted)


def test_a_lora_trained_over_a_lora_run_adds_to_it(toy_folder, tmp_path, monkeypatch):
    trained, save = [], train.Checkpoints.save
    monkeypatch.setattr(train.Checkpoints, "save", lambda *all: (trained.append(all[1]), save(*all)))
    go(toy_folder, tmp_path / "first", "--lora-rank 2")
    go(toy_folder, tmp_path / "second", f"--init {tmp_path}/first --lora-rank 3")
    opened = Llava.from_pretrained(tmp_path / "second", dtype=torch.float32)
    layer = trained[1].language_model.layers[0].mlp["up_proj"]            # over the first one, merged
    change = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    assert change.norm() > 1e-3 * layer.frozen.weight.norm()
    torch.testing.assert_close(opened.language_model.layers[0].mlp["up_proj"].weight,
                               layer.frozen.weight + change)


def test_activation_checkpointing_gives_equal_weights(toy_folder, whole, tmp_path):
    go(toy_folder, tmp_path, "--checkpoint-blocks 2")
    assert weights(tmp_path) == weights(whole)


def test_compile_compiles_every_layer_and_the_update(toy_folder, whole, tmp_path, monkeypatch):
    compiled, compile = [], lambda function: function
    if os.environ.get("LLAVA_TEST_ALL") and shutil.which("g++"):          # half a minute
        compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or compile(function))
    monkeypatch.setattr(train, "CHUNK", {"cpu": 1 << 10})    # several in a weight
    go(toy_folder, tmp_path, "--compile")
    assert len(compiled) == 3 + 3 + 1
    losses = [[line["loss"] for line in log(folder)] for folder in (tmp_path, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("more, message", [
    ("--in-backward --clip 1", "--clip"), ("--in-backward --micro-batch-size 2", "--micro-batch-size"),
    ("--stage 1 --lora-rank 4", "stage 2"), ("--lora-vision", "--lora-rank"), ("--card h100", "--plan"),
    ("--vision x --language y", "--init"),
])
def test_flags_that_exclude_each_other_are_refused(toy_folder, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as exit:
        train.parse(flags(toy_folder, tmp_path, more))
    assert exit.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


class Live(TorchDispatchMode):
    """Bytes of all tensors that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def count(self, tensor):
        memory = tensor.untyped_storage()
        if memory._cdata not in self.known:
            self.known.add(memory._cdata)
            self.now += memory.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(memory, self.forget, memory._cdata, memory.nbytes())

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, result)
        return result


WAYS = ["", "--in-backward", "--stage 1 --template v1", "--lora-rank 8 --lora-vision", "--checkpoint-blocks 2",
        "--micro-batch-size 1"]


@pytest.mark.parametrize("dtype, words, more", [
    *(("float32", 1000, more) for more in WAYS), *(("float32", 16000, more) for more in WAYS[:2]),
    *(("bfloat16", 1000, more) for more in WAYS if os.environ.get("LLAVA_TEST_ALL"))])
def test_memory_estimate_is_within_8_percent(toy_folder, tmp_path, monkeypatch, more, dtype, words):
    monkeypatch.setattr(train, "ALLOCATOR_OVERHEAD", 1)      # count the tensors only
    monkeypatch.setattr(train, "CHUNK", {"cpu": 1 << 16, "gpu": 1 << 16})
    args = train.parse(flags(toy_folder, tmp_path, f"--dtype {dtype} --batch-size 4 {more}"))
    config = LlavaConfig(VisionConfig(64, 192, 3, 4, image_size=64, patch_size=8),
                         TextConfig("mistral", words, 192, 672, 8, 6, 2, head_dim=32), image_token_id=words)
    with Live() as live:
        model = Llava(config).to(getattr(torch, dtype))
        train.choose_trainable(model, args)
        samples = train.Samples(train.read_records(toy_folder / "data.json", toy_folder)[1::2],
                                Processor.from_pretrained(toy_folder / "base", config), 2048)
        sample = samples[8]
        if words > 1000:                     # where logits decide: every token is supervised
            sample["labels"] = sample["input_ids"].where(sample["input_ids"] != words, -100)
            samples.supervised[8] = int((sample["labels"][:, 1:] != -100).sum())
        need = train.choose_micro_batch(model, samples, [[8] * 4], args)    # no padding
        train.wrap_layers(model, args)
        optimizer = train.Adam(model.named_parameters(), in_backward=args.in_backward)
        micros = train.make_micro_batches(args.micro_batch_size, [sample] * 4)
        live.most = 0
        optimizer.begin(1e-3)
        for micro in micros:
            model(**micro).backward()
        optimizer.step()
    assert live.most == pytest.approx(need["peak"], rel=0.08)


def test_checkpointed_layers_and_then_smaller_micro_batches_make_it_fit(toy_folder, tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr(train, "print_plan", lambda _, need, *__: plans.append(need["peak"]))

    def plan(gib: float, more: str = "") -> tuple[float, int, int]:
        monkeypatch.setitem(train.CARDS, "h100", (989, gib))
        args = train.parse(flags(toy_folder, tmp_path, f"--plan --card h100 {more}"))
        train.run_stage(args)
        return plans.pop(), args.micro_batch_size, args.checkpoint_blocks

    free, *rest = plan(80)
    twice, *_ = plan(80, "--checkpoint-blocks 3")
    assert rest == [5, 0] and twice < free
    assert plan(80, "--checkpoint-blocks 40") == (twice, 5, 3)               # there are only 3
    assert plan(twice * 1.01 / train.MEMORY_FRACTION / 2**30)[1:] == (5, 3)          # just that fits
    assert plan(twice * 0.9 / train.MEMORY_FRACTION / 2**30)[1] < 5
    assert plan(twice * 0.9 / train.MEMORY_FRACTION / 2**30, "--in-backward")[1:] == (5, 3)


# ---------------------------------------------------------------------------------------------
# The data


GOOD = [turn("human", "<image>\nWhat?"), turn("gpt", "Red.")]


@pytest.mark.parametrize("record, message", [
    ({"image": "none.png", "conversations": GOOD}, "there is no image"),
    ({"image": "../1.png", "conversations": GOOD}, "is outside of"),
    ({"image": "/1.png", "conversations": GOOD}, "is outside of"),
    ({"conversations": GOOD}, "1 <image> in the text, but 0 images"),
    ({"image": ["1.png", "3.png"], "conversations": GOOD}, "1 <image> in the text, but 2 images"),
    ({"conversations": [turn("human", "What?"), turn("gpt", " ")]}, "an answer is empty"),
    ({"conversations": [turn("human", "What?")]}, "it has no answer"),
    ({"conversations": []}, "it has no answer"),
    ({"conversations": [turn("human", "What?"), turn("dog", "Wuff.")]}, "it must be from 'gpt'"),
    ({"conversation": GOOD}, "not a LLaVA record (KeyError('conversations'))"),
])
def test_a_bad_record_is_named(toy_folder, tmp_path, record, message):
    good = json.loads((toy_folder / "data.json").read_text())[:3]
    sentence = refused(toy_folder, tmp_path / "run", records=[*good, {"id": "wrong"} | record])
    assert "bad.json, record wrong: " in sentence and message in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("records, message", [
    ("[{", "JSON"), ({}, "not a list"), ([], "not a list"), ([7], "record 0: not a LLaVA record")])
def test_a_bad_file_is_named(toy_folder, tmp_path, records, message):
    assert message in refused(toy_folder, tmp_path / "run", records=records)


def test_the_plain_template_has_an_image_only_if_the_record_has_one(toy_folder):
    processor = Processor.from_pretrained(toy_folder / "base")
    processor.config = replace(processor.config, template="plain")
    for record in train.read_records(toy_folder / "data.json", toy_folder):
        ids, _ = processor.tokenize(record["messages"])
        assert ids.count(processor.config.image_token_id) == len(record["images"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_during_training(toy_folder, tmp_path, workers):
    shutil.copytree(toy_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("whole"))
    (tmp_path / "copy/7.png").write_bytes((toy_folder / "7.png").read_bytes()[:60])
    sentence = refused(tmp_path / "copy", tmp_path / "run", f"--workers {workers}")
    assert "7.png is not a readable" in sentence


def test_records_that_are_too_long_are_cut_counted_and_listed(toy_folder, tmp_path, capsys):
    records = json.loads((toy_folder / "data.json").read_text())
    late = {"id": "late", "image": "1.png", "conversations": [
        turn("human", "What?"), turn("gpt", "Red. " * 50), turn("human", "<image>"), turn("gpt", "Red.")]}
    (tmp_path / "long.json").write_text(json.dumps([*records, late]))
    go(toy_folder, tmp_path, f"--data {tmp_path}/long.json --max-length 50")
    listed = json.loads((tmp_path / "cut.json").read_text())
    assert set(listed["left out"]) < set(listed["cut"]) and "late" in listed["cut"]
    assert f"{len(listed['cut'])} records are longer" in capsys.readouterr().out


def test_check_data_lists_all_errors(toy_folder, tmp_path, capsys):
    shutil.copytree(toy_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("whole"))
    folder = tmp_path / "copy"
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (9, 9)).save(folder / "cmyk.jpg")
    (folder / "cut.png").write_bytes((toy_folder / "1.png").read_bytes()[:60])
    records = json.loads((toy_folder / "data.json").read_text())
    records += [records[0], *({"id": name, "image": name, "conversations": GOOD}
                              for name in ("moves.gif", "cmyk.jpg", "cut.png", "none.png"))]
    records += [{"id": "mute", "conversations": [turn("human", "What?"), turn("gpt", "")]}]
    sentence = refused(folder, tmp_path / "run", "--check-data", records)
    found = json.loads((tmp_path / "run/check.json").read_text())
    wrong, odd = [line.split(":")[0] for line in found["wrong"]], " ".join(found["odd"])
    assert wrong == ["record cut.png", "record none.png", "record mute"]
    assert "moves.gif is animated" in odd and "cmyk.jpg is in mode CMYK" in odd
    assert len(found["duplicates"]) == 1 and "record cut.png" in sentence
    printed = capsys.readouterr().out
    assert "28 records: 3 wrong" in printed
    assert sum(int(count) for count in re.findall(r"tokens +(\d+)", printed)) == 25


def test_show_names_every_token(toy_folder, tmp_path, capsys):
    train.run_stage(train.parse(flags(toy_folder, tmp_path, "--show 1")))
    shown = re.sub(r"\033\[\d+m", "", capsys.readouterr().out).splitlines()
    assert [line.split()[0] for line in shown[:3]] == ["start", "prompt", "image"]
    assert any(line.startswith("answer  learned  The color is blue.") for line in shown)
    assert any(line == "end     learned </s>" for line in shown)
    assert "records are 0 to 21" in refused(toy_folder, tmp_path, "--show 22")


def test_a_plan_needs_no_weights(toy_folder, tmp_path, capsys):
    shutil.copytree(toy_folder / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    more = f"--init {tmp_path}/base --plan --card h100"
    train.run_stage(train.parse(flags(toy_folder, tmp_path / "run", more)))
    printed = capsys.readouterr().out
    model = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32)
    learning = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("vision"))
    assert f"{learning:,} of {sum(p.numel() for p in model.parameters()):,} parameters" in printed
    assert re.search(r"peak +\d", printed) and "hours" in printed and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------
# Validation loss


def test_validation_loss_is_the_mean_over_fixed_records_and_resumes_exactly(toy_folder, tmp_path, capsys):
    more = f"--val {toy_folder}/data.json --val-every 4 --save-every 5 --micro-batch-size"
    go(toy_folder, tmp_path / "one", f"{more} 5")
    assert "validation loss" in capsys.readouterr().out
    lines = log(tmp_path / "one")
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 8, 10]
    model = Llava.from_pretrained(tmp_path / "one", dtype=torch.float32)
    processor = Processor.from_pretrained(toy_folder / "base", model.config)
    samples = train.Samples(train.read_records(toy_folder / "data.json", toy_folder), processor, 2048)
    total = tokens = 0
    for i in range(22):
        micro, = train.make_micro_batches(1, [samples[i]])
        count = int((micro["labels"] != -100).sum())
        total, tokens = total + count * model(**micro).item(), tokens + count
    assert lines[-1]["val_loss"] == pytest.approx(total / tokens, rel=1e-5)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        step = train.Adam.step
        patch.setattr(train.Adam, "step",
                      lambda adam: (step(adam), adam.steps == 6 and signal.raise_signal(signal.SIGINT)))
        go(toy_folder, tmp_path / "two", f"{more} 5")
    go(toy_folder, tmp_path / "two", f"{more} 5 --resume")
    kept = [[(line["loss"], line.get("val_loss")) for line in log(tmp_path / run)] for run in ("one", "two")]
    assert kept[0] == kept[1]


# ---------------------------------------------------------------------------------------------
# Saving


def test_a_sharded_checkpoint_resumes_to_equal_weights(toy_folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(train.Checkpoints, "save", die_softly(train.Checkpoints.save, 2))
    with pytest.raises(RuntimeError):
        go(toy_folder, tmp_path, "--save-every 3")
    files = {file.name.split("-")[0] for file in (tmp_path / "trainer/step-000006").glob("*-of-*")}
    assert files == {"model", "optimizer"}
    monkeypatch.undo()
    go(toy_folder, tmp_path, "--save-every 3 --resume")
    assert weights(tmp_path) == weights(whole)


def die_softly(save, count: int):
    """`save`, after whose count-th call an exception ends the run."""
    calls = []

    def saving(*args):
        save(*args)
        calls.append(args)
        if len(calls) == count:
            raise RuntimeError("stopped")
    return saving


def test_the_last_checkpoint_has_no_optimizer_state(whole):
    assert not list((whole / "trainer").glob("*/optimizer*"))


def test_saving_takes_two_shards_of_host_memory_at_most(toy_folder, tmp_path, monkeypatch):
    """60 MB of weights and 120 MB of optimizer state, in shards of 8 MB."""
    text = TextConfig("mistral", 4000, 256, 1024, 12, 4, 4, head_dim=64)
    config = LlavaConfig(VisionConfig(32, 64, 1, 2, image_size=32, patch_size=16), text, image_token_id=4000)
    args = train.parse(flags(toy_folder, tmp_path))
    processor = Processor(toy.make_tokenizer().to_str(), config)
    monkeypatch.setattr(train, "SHARD_BYTES", 8_000_000)

    def save(grown):
        model = Llava(config)
        optimizer = train.Adam(model.named_parameters())
        for tensor in optimizer.state.values():
            tensor.fill_(1)                  # zeros take no memory until they are written to
        before = train.peak_memory("cpu")
        train.Checkpoints(args, 10).save(model, processor, optimizer)
        grown.value = train.peak_memory("cpu") - before

    grown = multiprocessing.get_context("fork").Value("q", 1 << 60)
    child = multiprocessing.get_context("fork").Process(target=save, args=(grown,))
    child.start()
    child.join()
    assert len(list((tmp_path / "trainer/step-000000").glob("optimizer-*"))) > 10
    assert grown.value < 2 * 8_000_000 + 4_000_000


# ---------------------------------------------------------------------------------------------
# Memory that does not suffice, flags, signals


def test_running_out_of_memory_names_the_flags_that_help(toy_folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(Llava, "forward", full)
    sentence = refused(toy_folder, tmp_path)
    assert all(flag in sentence for flag in ("--micro-batch-size", "--checkpoint-blocks", "--in-backward",
                                             "--lora-rank", "Tried to allocate 2 GiB"))


def test_the_largest_micro_batch_comes_first(toy_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train", lambda *all: seen.append((all[2], all[4])))
    train.run_stage(train.parse(flags(toy_folder, tmp_path, "--seed 3 --micro-batch-size 2")))
    (samples, batches), = seen
    loads = [train.largest_load(samples, [batch], 2) for batch in batches]
    assert loads[0] == max(loads) and loads[1:] != sorted(loads[1:], reverse=True)
    assert sorted(sum(batches, [])) == sorted([*range(22)] * 2)


def test_free_memory_decides_what_fits(toy_folder, tmp_path, monkeypatch):
    config = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32).config
    samples = train.Samples(train.read_records(toy_folder / "data.json", toy_folder),
                            Processor.from_pretrained(toy_folder / "base", config), 2048)
    model = Llava(config)
    def choose(free: float) -> tuple[int, float]:
        args = train.parse(flags(toy_folder, tmp_path, "--checkpoint-blocks 0"))
        args.device = "cuda"
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 50))
        need = train.choose_micro_batch(model, samples, [[1, 3, 5, 7, 9]], args)
        return args.micro_batch_size, need["peak"]

    size, peak = choose(1 << 50)
    assert size == 5 and choose(0.9 * peak)[0] < 5


def test_tiles_and_processes_count_in_the_estimate(toy_folder, tmp_path, monkeypatch):
    config = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32).config
    records = train.read_records(toy_folder / "data.json", toy_folder)
    processor = Processor.from_pretrained(toy_folder / "base", replace(config, image_mode="anyres"))
    samples = train.Samples(records, processor, 2048)
    assert samples.tiles == [0 if i % 2 == 0 else samples.tiles[i] for i in range(22)]
    assert all(samples.tiles[i] in (3, 4, 5) for i in range(1, 22, 2))
    assert train.largest_load(samples, [[1]], 1).tiles == samples.tiles[1]
    samples.lengths, samples.supervised = [9, 30, 20, 40] + [1] * 18, [8, 7, 9, 3] + [1] * 18
    assert train.largest_load(samples, [[0, 1, 2, 3]], 2)[:2] == (2 * 40, 9 + 8), "of any two records"
    samples.lengths = [10, 30, 20, 40] + [1] * 18
    alone = train.largest_load(samples, [[0, 3, 1, 2]], 4).tokens
    args = train.parse(flags(toy_folder, tmp_path, "--micro-batch-size 4 --checkpoint-blocks 0"))
    one = train.estimate_memory(Llava(config), train.Load(10, 5, 1), args)["weights"]
    monkeypatch.setattr(train, "PROCESSES", 2)
    assert alone == 4 * 40 and train.largest_load(samples, [[0, 3, 1, 2]], 4).tokens == 2 * 40
    assert one / 2 < train.estimate_memory(Llava(config), train.Load(10, 5, 1), args)["weights"]
    peaks = []                               # a process has 3 records of 5: in 3, 2 or 1 micro-batches
    for args.micro_batch_size in (1, 2, 3):
        peaks.append(train.estimate_memory(Llava(config), train.Load(900, 800, 1), args)["peak"])
    assert peaks[0] == peaks[1] > peaks[2], "gradients of earlier micro-batches"


@pytest.mark.parametrize("mode, length", [("pad", 2048), ("anyres", 4096)])
def test_the_default_max_length_depends_on_the_image_mode(toy_folder, tmp_path, mode, length):
    args = train.parse(flags(toy_folder, tmp_path, f"--plan --image-mode {mode}"))
    train.run_stage(args)
    assert args.max_length == length


def test_lengths_are_counted_after_token_reduction(toy_folder):
    config = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32).config
    records, lengths = train.read_records(toy_folder / "data.json", toy_folder), []
    for options in ({}, {"prune": "pool", "keep_tokens": 1}):
        processor = Processor.from_pretrained(toy_folder / "base", replace(config, **options))
        lengths.append(train.Samples(records, processor, 2048).lengths[1])
    assert lengths[0] - lengths[1] == config.vision.side**2 - 1


@pytest.mark.parametrize("flag", [
    "--lora-rank -1", "--lora-rank 0", "--checkpoint-blocks -1", "--workers -1", "--clip -1", "--lr -1",
    "--micro-batch-size 0", "--max-length 0", "--save-every 0", "--epochs 0", "--batch-size 0",
    "--keep-tokens 0", "--val-every 0", "--device mps", "--device cuda", "--quantize int4",
    "--val-images x", "--quantize int3 --lora-rank 2"])
def test_a_flag_out_of_range_exits_with_2(toy_folder, tmp_path, capsys, monkeypatch, flag):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        train.parse(flags(toy_folder, tmp_path, flag))
    assert exit.value.code == 2 and flag.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_bf16_is_the_default_only_where_the_gpu_supports_it_and_mps_is_never_chosen(
        toy_folder, tmp_path, monkeypatch):
    argv = [flag for flag in flags(toy_folder, tmp_path) if flag not in ("--device", "cpu")]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (train.parse(argv).device, train.parse(argv).dtype) == ("cpu", "float32")
    assert train.parse([*argv, "--device", "mps"]).dtype == "float32"
    assert train.parse([*argv, "--quantize", "int4", "--lora-rank", "2"]).dtype == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
        assert (train.parse(argv).device, train.parse(argv).dtype) == ("cuda", dtype)


def test_the_toy_run_is_in_float32_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(toy, "build", lambda *_, **__: toy.write_scienceqa(
        tmp_path / "scienceqa", sizes=(("train", 8), ("val", 8), ("test", 8))))
    monkeypatch.setattr(toy, "draw_losses", lambda *_: 1 / 0)             # after both stages
    runs = []
    with pytest.raises(ZeroDivisionError):
        toy.play(runs.append, train.parse, tmp_path, tmp_path / "runs")
    assert [(args.device, args.dtype) for args in runs] == [("cuda", "float32")] * 2


def test_the_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), train.deferred_signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_only_bf16_weights_draw_rounding_noise(monkeypatch):
    drawn, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *all, **how: drawn.append(all) or randint(*all, **how))
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.ones(8, dtype=dtype))
        adam = train.Adam([("w", weight)])
        weight.grad = torch.ones_like(weight)
        adam.begin(0.1)
        adam.step()
        assert len(drawn) == (dtype == torch.bfloat16) and float(weight[0]) == pytest.approx(0.9, rel=1e-2)


def test_gradients_are_reduced_in_float32(toy_folder, tmp_path, monkeypatch):
    policies = []
    monkeypatch.setattr(train, "PROCESSES", 2)
    monkeypatch.setattr(train, "init_device_mesh", lambda device, shape: (device, shape))
    monkeypatch.setattr(train, "fully_shard", lambda module, mesh, mp_policy: policies.append((mesh, mp_policy)))
    args = train.parse(flags(toy_folder, tmp_path, "--checkpoint-blocks 0"))
    train.wrap_layers(Llava.from_pretrained(toy_folder / "base", dtype=torch.bfloat16), args)
    assert [(mesh, policy.reduce_dtype) for mesh, policy in policies] == [(("cpu", (2,)), torch.float32)] * 4


def test_a_largest_norm_of_0_is_no_limit():
    weight = torch.nn.Parameter(torch.ones(4))
    adam, gradient = train.Adam([("weight", weight)]), torch.tensor([3.0, 0, 4, 0])
    for limit, wanted in ((0, gradient), (None, gradient), (1, gradient / 5)):
        weight.grad = gradient.clone()
        assert adam.clip(limit) == pytest.approx(5)
        torch.testing.assert_close(weight.grad, wanted)


def test_every_process_waits_after_a_save_and_before_it_leaves(toy_folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "PROCESSES", 2)
    monkeypatch.setattr(train, "run_stage", lambda args: calls.append("run"))
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda name=name, **how: calls.append((name, how)))
    argv = flags(toy_folder, tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    train.main()
    (_, how), *rest = calls
    assert rest == ["run", ("barrier", {}), ("destroy_process_group", {})]
    assert how["timeout"] >= timedelta(hours=1)              # 60 GB at 17 MB/s
    for rank, written in ((1, False), (0, True)):
        monkeypatch.setattr(train, "RANK", rank)
        calls.clear()
        model = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32)
        optimizer = SimpleNamespace(steps=4, state={})
        processor = Processor.from_pretrained(toy_folder / "base", model.config)
        args = train.parse(argv)
        train.Checkpoints(args, 10).save(model, processor, optimizer)
        assert calls == [("barrier", {})] and (tmp_path / "trainer/step-000004").exists() == written


class Opaque(torch.nn.Module):
    """A linear layer as llava.QuantizedLinear is one: without a weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("stored", linear.weight.detach().clone())

    def forward(self, x):
        return x @ self.stored.T


def test_lora_works_over_layers_without_a_weight(toy_folder, tmp_path, monkeypatch):
    args = train.parse(flags(toy_folder, tmp_path, "--lora-rank 2"))
    plain, opaque = (Llava.from_pretrained(toy_folder / "base", dtype=torch.float32) for _ in range(2))
    for name, module in list(opaque.language_model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            opaque.language_model.layers.set_submodule(name, Opaque(module))
    for model in (plain, opaque):
        torch.manual_seed(0)
        train.choose_trainable(model, args)
    batch = inputs(toy_folder)
    assert torch.allclose(plain(**batch), opaque(**batch))
    names = [[n for n, p in model.named_parameters() if p.requires_grad] for model in (plain, opaque)]
    assert names[0] == names[1] and len(names[0]) == 2 * 7 * 3 + 4


def write_wide_base(toy_folder: Path, folder: Path) -> None:
    """A random LLaVA whose linear layers have multiples of 64 rows, as 4 bits need them."""
    config = LlavaConfig(**llava.open_checkpoint(str(toy_folder / "base"), weights=False)[0])
    text = replace(config.text, hidden_size=64, intermediate_size=128, num_attention_heads=3, head_dim=64)
    torch.manual_seed(0)
    Llava(replace(config, text=text)).save_pretrained(folder)
    Processor.from_pretrained(toy_folder / "base", config).save_pretrained(folder)


@pytest.mark.parametrize("quantize", ["int8", "int4"] if os.environ.get("LLAVA_TEST_ALL") else ["int4"])
def test_a_quantized_run_resumes_exactly_and_opens_over_the_full_base(toy_folder, tmp_path, quantize):
    write_wide_base(toy_folder, tmp_path / "base")
    more = f"--init {tmp_path}/base --quantize {quantize} --lora-rank 2 --save-every 4"
    step = train.Adam.step
    expected = go(toy_folder, tmp_path / "whole", more)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Adam, "step",
                      lambda adam: (step(adam), adam.steps == 6 and signal.raise_signal(signal.SIGINT)))
        go(toy_folder, tmp_path / "run", more)
    found = go(toy_folder, tmp_path / "run", f"{more} --resume")
    assert all(torch.equal(found[name], expected[name]) for name in expected) and log(tmp_path / "run")
    losses = [line["loss"] for line in log(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    Llava.from_pretrained(tmp_path / "run", dtype=torch.float32)


def test_quantize_reaches_the_model_and_the_plan(toy_folder, tmp_path, monkeypatch):
    chosen, need = [], {}
    monkeypatch.setattr(Llava, "from_pretrained", lambda *_, **how: chosen.append(how) or Llava(config))
    config = LlavaConfig(**llava.open_checkpoint(str(toy_folder / "base"), weights=False)[0])
    for bits in ("int4", "int8", None):
        more = f"--lora-rank 2 --dtype bfloat16 {f'--quantize {bits}' if bits else ''}"
        args = train.parse(flags(toy_folder, tmp_path, more))
        args.micro_batch_size, args.checkpoint_blocks = 1, 0
        model, _ = train.build(args, config, None)
        need[bits] = train.estimate_memory(model, train.Load(10, 5, 1), args)["weights"]
    assert [how.get("quantize") for how in chosen] == ["int4", "int8", None]
    linear = sum(m.frozen.weight.numel() for m in model.modules() if isinstance(m, train.LoRA))
    assert need["int8"] - need["int4"] == pytest.approx(linear * 3 / 8, rel=0.15)
    assert need[None] > need["int8"] + 0.9 * linear


def test_all_files_import_without_unix_modules():
    code = ("import sys\nfor name in ('resource', 'fcntl', 'termios', 'pwd', 'grp'):\n"
            "    sys.modules[name] = None\nimport llava, eval, prune, train")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------------------------------------
# More than one process


TWO_PROCESSES = """
import json, signal, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
import train
step, run_stage = train.Adam.step, train.run_stage
def interrupted(adam):
    step(adam)
    if adam.steps == 3 and train.RANK == 0:
        signal.raise_signal(signal.SIGINT)
def run_all(_):
    for stop, argv in json.loads({runs!r}):
        train.Adam.step = interrupted if stop else step
        try:
            run_stage(train.parse(argv))
        except KeyboardInterrupt:
            assert stop
        dist.barrier()
train.run_stage = run_all
sys.argv[1:] = json.loads({runs!r})[0][1]
train.main()
"""


@pytest.fixture(scope="module", autouse=True)
def two_processes(request, toy_folder):
    """The process that trains in two processes; it starts before the first test of this file, to use a
    second core, and only if one of the chosen tests needs it."""
    if not any("two" in item.fixturenames for item in request.session.items):
        yield None
        return
    runs = {name: (False, flags(toy_folder, toy_folder / "two" / name, more)) for name, more in PAIRS.items()}
    resumed = flags(toy_folder, toy_folder / "two/resumed", PAIRS["lora"])
    runs |= {"interrupted": (True, resumed), "resumed": (False, [*resumed, "--resume"])}
    file = toy_folder / "two.py"
    file.write_text(TWO_PROCESSES.format(root=str(ROOT), runs=json.dumps(list(runs.values()))))
    with open(toy_folder / "two.log", "w") as output, subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)],
            stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        yield process
        process.terminate()


@pytest.fixture(scope="module")
def two(toy_folder, two_processes):
    """Run folders by name, trained by two processes; batches of 7 of 22 records leave a batch of one."""
    assert two_processes.wait(timeout=100) == 0, (toy_folder / "two.log").read_text()
    return toy_folder / "two"


PAIRS = {"micro": "--epochs 1 --batch-size 7 --seed 0 --micro-batch-size 2",
         "in_backward": "--epochs 1 --batch-size 7 --seed 2 --in-backward",
         "lora": "--epochs 1 --batch-size 7 --seed 3 --lora-rank 2 --lora-vision --save-every 2"}


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_have_the_losses_and_weights_of_one(toy_folder, two, tmp_path, name):
    expected = go(toy_folder, tmp_path, PAIRS[name])
    seed, short = {"micro": (0, 0), "in_backward": (2, 2), "lora": (3, 3)}[name]
    assert len(train.make_batches(range(22), [1] * 22, 7, seed)[short]) == 1
    for line, other in zip(log(tmp_path), log(two / name), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
        assert other["tokens"] == line["tokens"]
    for name, tensor in load_file(next((two / name).glob("*model.safetensors"))).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_two_processes_resume_to_equal_weights(two):
    files = [two / name / "adapter_model.safetensors" for name in ("lora", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    losses = [[line["loss"] for line in log(two / name)] for name in ("lora", "resumed")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
