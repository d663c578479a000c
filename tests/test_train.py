"""Tests of train.py: steps, resuming, errors in the data, memory estimate, flags, two processes."""

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
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import llava
import train
from llava import Llava, LlavaConfig, Processor, TextConfig, VisionConfig, replace
from tests import toy

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)                     # bit-identical results; threads do not survive a fork
tqdm.set_lock(threading.RLock())             # a killed process would keep tqdm's own, shared lock


def turn(speaker: str, value: str) -> dict:
    return {"from": speaker, "value": value}


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    """A folder with a LLaVA of random weights (base/) and 22 records (data.json), half with an image."""
    folder, tokenizer = tmp_path_factory.mktemp("toy_folder"), toy.make_tokenizer()
    vocab_size = tokenizer.get_vocab_size()
    config = LlavaConfig(
        vision=VisionConfig(32, 48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16),
        text=TextConfig("mistral", vocab_size, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                        num_attention_heads=3, num_key_value_heads=1, head_dim=16), image_token_id=vocab_size)
    torch.manual_seed(0)
    Llava(config).save_pretrained(folder / "base")
    Processor(tokenizer.to_str(), config).save_pretrained(folder / "base")
    records = []
    for i in range(22):
        question = "What color do you see? " * (1 + i % 5)
        answer = f"The color is {('red', 'blue', 'green')[i % 3]}. " * (1 + i % 4)
        if i % 2:
            question = "<image>\n" + question
        records.append({"id": f"r{i}", "conversations": [turn("human", question), turn("gpt", answer)]})
        if i % 2:
            records[-1]["image"] = f"{i}.png"
            Image.new("RGB", (40, 20 + i), (i * 9, 0, 200)).save(folder / f"{i}.png")
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def toy_flags(toy_folder: Path, out: Path, extra_flags: str = "") -> list[str]:
    """The arguments of a run of 10 steps on the toy records, followed by `extra_flags`."""
    return (f"--stage 2 --init {toy_folder}/base --data {toy_folder}/data.json --images {toy_folder} "
            f"--epochs 2 --batch-size 5 --lr 1e-2 --device cpu --out {out} {extra_flags}").split()


def run_training(toy_folder: Path, out: Path, extra_flags: str = "") -> dict[str, torch.Tensor]:
    """Train, and return the tensors of model.safetensors or adapter_model.safetensors in the run folder."""
    train.run_stage(train.parse(toy_flags(toy_folder, out, extra_flags)))
    return load_file(next(out.glob("*model.safetensors")))


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(toy_folder):
    """The run folder of 10 steps without interruption, with which other runs are compared."""
    run_training(toy_folder, toy_folder / "uninterrupted")
    return toy_folder / "uninterrupted"


def saved_weights(folder: Path) -> bytes:
    """The bytes of model.safetensors; only the checkpoint of the last step may be left in the run folder."""
    assert [file.name for file in (folder / "trainer").iterdir()] == ["step-000010"]
    return (folder / "model.safetensors").read_bytes()


def error_message(toy_folder: Path, out: Path, extra_flags: str = "", records=None) -> str:
    """The message of the exception that a run raises; `records` replace those of the toy data."""
    if records is not None:
        text = records if isinstance(records, str) else json.dumps(records)
        (out.parent / "bad.json").write_text(text)
        extra_flags += f" --data {out.parent}/bad.json"
    with pytest.raises((ValueError, OSError)) as error:
        train.run_stage(train.parse(toy_flags(toy_folder, out, extra_flags)))
    assert "\n" not in str(error.value)
    return str(error.value)


def make_samples(toy_folder: Path, config: LlavaConfig) -> train.Samples:
    """The toy records, tokenized for a model of this configuration."""
    processor = Processor.from_pretrained(toy_folder / "base", config)
    return train.Samples(train.read_records(toy_folder / "data.json", toy_folder), processor, 2048)


# ---------------------------------------------------------------------------------------------
# The step

def gradients(toy_folder: Path, micro_batch_size: int) -> torch.Tensor:
    """The gradient of one step over eight records, as one vector."""
    model = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32)
    samples = make_samples(toy_folder, model.config)
    micro_batches = train.make_micro_batches(micro_batch_size, [samples[i] for i in range(8)])
    weighted, _ = train.weigh_micro_batches(micro_batches, 8)
    for micro_batch, weight in weighted:
        (model(**micro_batch) * weight).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_give_the_gradient_of_the_full_batch(toy_folder, size):
    expected, found = gradients(toy_folder, 8), gradients(toy_folder, size)
    assert (found - expected).norm() / expected.norm() < 1e-6


def test_only_trainable_weights_change(toy_folder, tmp_path):
    before = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32).state_dict()
    for stage, trainable in (("1 --template v1", ("projector.",)), ("2", ("projector.", "language_model."))):
        run_training(toy_folder, tmp_path / stage[0], f"--stage {stage}")
        after = Llava.from_pretrained(tmp_path / stage[0], dtype=torch.float32).state_dict()
        for name in before:
            changed = not torch.equal(before[name], after[name])
            assert changed == name.startswith(trainable), name


def test_no_supervised_token_raises(toy_folder, tmp_path):
    model, batch = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32), make_inputs(toy_folder)
    with pytest.raises(llava.UserError, match="all labels are -100"):
        model(**batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert "no record has an answer within --max-length 3" in error_message(
        toy_folder, tmp_path / "run", "--max-length 3")


@pytest.mark.parametrize("nonfinite", ["loss", "gradient"])
@pytest.mark.parametrize("extra_flags", ["", "--in-backward"])
def test_nonfinite_loss_or_gradient_raises_before_saving(
        toy_folder, tmp_path, monkeypatch, nonfinite, extra_flags):
    forward, losses = Llava.forward, []

    def nonfinite_forward(model, **inputs):
        loss = forward(model, **inputs)
        losses.append(loss)
        if len(losses) != 4:
            return loss
        if nonfinite == "loss":
            return loss * math.nan
        return loss + (0 * model.projector[0].bias.sum()).abs().sqrt()    # 0 in forward, 0/0 in backward

    update, updated_steps = train.Adam.update, []

    def recorded_update(adam, *weight):
        updated_steps.append(adam.steps)
        update(adam, *weight)

    monkeypatch.setattr(Llava, "forward", nonfinite_forward)
    monkeypatch.setattr(train.Adam, "update", recorded_update)
    message = error_message(toy_folder, tmp_path / "run", f"--save-every 2 {extra_flags}")
    assert re.match(rf"step 4: the {nonfinite} is nan.* records (r\d+, ){{4}}r\d+$", message)
    assert 3 in updated_steps
    if (nonfinite, extra_flags) != ("gradient", "--in-backward"):         # this one updates before the check
        assert 4 not in updated_steps
    assert [folder.name for folder in (tmp_path / "run/trainer").iterdir()] == ["step-000002"]
    Llava.from_pretrained(tmp_path / "run")


def simulate(dtype: torch.dtype, train_adam: bool, steps: int = 3000) -> torch.Tensor:
    """Final weights of train.Adam or torch.optim.Adam, from weights of std 0.02, at a learning rate of 2e-5,
    with noisy gradients that become 100 times smaller. bf16 weights of train.Adam include their low bits."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(4096, generator=generator) * 0.02
    direction = torch.randn(4096, generator=generator)
    weight = torch.nn.Parameter(start.bfloat16().to(dtype))
    if train_adam:
        optimizer = train.Adam([("w", weight)])
    else:
        optimizer = torch.optim.Adam([weight], lr=2e-5)
    torch.manual_seed(2)
    for step in range(steps):
        noise = torch.randn(4096, generator=generator)
        weight.grad = ((direction + noise) * 100 ** (-step / steps)).to(dtype)
        if train_adam:
            optimizer.begin(2e-5)
        optimizer.step()
    if train_adam and dtype == torch.bfloat16:
        return train.join_bits(weight.data, optimizer.state["w.low"].view(torch.int16))
    return weight.detach().float()


def test_adam_on_bf16_weights_ends_where_float32_adam_ends():
    generator = torch.Generator().manual_seed(1)
    start = (torch.randn(4096, generator=generator) * 0.02).bfloat16().float()
    expected = simulate(torch.float32, train_adam=False)
    distance = (expected - start).norm()     # that the weights move in float32
    assert (simulate(torch.float32, train_adam=True) - expected).norm() / distance < 1e-4
    assert (simulate(torch.bfloat16, train_adam=True) - expected).norm() / distance < 0.02
    assert (simulate(torch.bfloat16, train_adam=False) - expected).norm() / distance > 0.9


def test_in_backward_keeps_no_gradients_and_gives_bit_identical_weights(toy_folder, tmp_path, monkeypatch):
    with_gradient, step = [], train.Adam.step            # the share of parameters that have a gradient

    def recorded_step(adam):
        count = sum(p.grad is not None for p in adam.parameters.values())
        with_gradient.append(count / len(adam.parameters))
        step(adam)

    monkeypatch.setattr(train.Adam, "step", recorded_step)
    run_training(toy_folder, tmp_path / "after_backward", "--clip 1e9")
    run_training(toy_folder, tmp_path / "in_backward", "--in-backward")
    assert with_gradient == [1.0] * 10 + [0.0] * 10
    assert saved_weights(tmp_path / "in_backward") == saved_weights(tmp_path / "after_backward")


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
    run_training(toy_folder, tmp_path / "stage2", f"--init {tmp_path}/stage1")
    assert Llava.from_pretrained(tmp_path / "stage2").config.template == "mistral_instruct"


# ---------------------------------------------------------------------------------------------
# Interrupting and resuming

def interrupt_after(steps: int):
    """A replacement of Adam.step that raises SIGINT after step number `steps`."""
    step = train.Adam.step

    def interrupted_step(adam):
        step(adam)
        if adam.steps == steps:
            signal.raise_signal(signal.SIGINT)
    return interrupted_step


def test_run_stopped_by_ctrl_c_resumes_to_bit_identical_weights(
        toy_folder, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Adam, "step", interrupt_after(4))
        run_training(toy_folder, tmp_path / "run")
    assert len(read_log(tmp_path / "run")) == 4          # the step was completed
    run_training(toy_folder, tmp_path / "run", "--resume")
    assert saved_weights(tmp_path / "run") == saved_weights(uninterrupted)


def start_process(toy_folder: Path, out: Path, extra_flags: str) -> multiprocessing.Process:
    arguments = toy_folder, out, extra_flags
    child = multiprocessing.get_context("fork").Process(target=run_training, args=arguments)
    child.start()
    return child


def kill_after(count: int, function):
    """A replacement of `function` that kills the process after its `count`-th call."""
    calls = []

    def killing_function(*args, **kwargs):
        calls.append(function(*args, **kwargs))
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
    return killing_function


@pytest.mark.parametrize("module, name, count", [
    (llava, "save_file", 3),                 # while a checkpoint is written
    (os, "link", 9),                         # while files are linked: some links are old, some new
])
def test_run_killed_while_saving_resumes_to_bit_identical_weights(
        toy_folder, uninterrupted, tmp_path, monkeypatch, module, name, count):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, kill_after(count, getattr(module, name)))
        child = start_process(toy_folder, tmp_path, "--save-every 2")
        child.join()
    assert child.exitcode == -signal.SIGKILL and (tmp_path / "trainer").exists()
    run_training(toy_folder, tmp_path, "--resume --save-every 2")
    assert saved_weights(tmp_path) == saved_weights(uninterrupted)
    assert [line["loss"] for line in read_log(tmp_path)] == [line["loss"] for line in read_log(uninterrupted)]


def test_resuming_removes_checkpoints_that_a_killed_run_left(toy_folder, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.copytree(uninterrupted / "trainer/step-000010", tmp_path / "run/trainer/step-000009")
    run_training(toy_folder, tmp_path / "run", "--resume")
    assert saved_weights(tmp_path / "run") == saved_weights(uninterrupted)


def test_resuming_links_the_files_that_a_stopped_run_did_not_link(
        toy_folder, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "link", lambda *_: signal.default_int_handler(signal.SIGINT, None))
        run_training(toy_folder, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    run_training(toy_folder, tmp_path, "--resume")
    assert saved_weights(tmp_path) == saved_weights(uninterrupted)


def test_signal_to_the_process_group_stops_after_the_step_with_workers(toy_folder, tmp_path, monkeypatch):
    step, run = train.Adam.step, tmp_path / "run"

    def slow_step(adam):
        time.sleep(0.3)
        step(adam)

    def train_in_own_process_group() -> None:
        os.setsid()
        run_training(toy_folder, run, "--workers 1")

    with monkeypatch.context() as patch:
        patch.setattr(train.Adam, "step", slow_step)
        child = multiprocessing.get_context("fork").Process(target=train_in_own_process_group)
        child.start()
        while not (run / "log.jsonl").exists() or len(read_log(run)) < 2:
            assert child.is_alive()
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGTERM)
        child.join()
    (saved,) = (run / "trainer").iterdir()
    assert 2 <= int(saved.name.removeprefix("step-")) == len(read_log(run)) < 10
    start_process(toy_folder, run, "--workers 1 --resume").join()
    start_process(toy_folder, tmp_path / "uninterrupted", "--workers 1").join()
    assert saved_weights(run) == saved_weights(tmp_path / "uninterrupted")


@pytest.mark.parametrize("kill", range(int(os.environ.get("LLAVA_TEST_KILLS", 2))))
def test_run_killed_at_a_random_time_resumes_to_bit_identical_weights(toy_folder, tmp_path, kill):
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    extra_flags = "--save-every 1 " + ("--dtype bfloat16", "--dtype bfloat16 --in-backward", "")[kill % 3]
    began = time.perf_counter()
    start_process(toy_folder, uninterrupted, extra_flags).join()
    seconds = time.perf_counter() - began
    child = start_process(toy_folder, run, extra_flags)
    time.sleep(random.uniform(0, seconds))
    child.kill()
    child.join()
    if (run / "log.jsonl").exists():
        print(f"killed after step {len(read_log(run))}")
    start_process(toy_folder, run, f"{extra_flags} --resume").join()
    assert saved_weights(run) == saved_weights(uninterrupted)
    losses = [[line["loss"] for line in read_log(folder)] for folder in (run, uninterrupted)]
    assert losses[0] == losses[1] and len(losses[1]) == 10


@pytest.mark.parametrize("extra_flags", ["--dtype bfloat16", "--lora-rank 2 --lora-vision --in-backward"])
def test_bf16_and_lora_runs_resume_to_bit_identical_weights(toy_folder, tmp_path, monkeypatch, extra_flags):
    expected = run_training(toy_folder, tmp_path / "uninterrupted", extra_flags)
    begin = train.Adam.begin

    def failing_begin(adam, lr):
        if adam.steps == 7:
            raise RuntimeError("out of power")
        begin(adam, lr)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(train.Adam, "begin", failing_begin)
        run_training(toy_folder, tmp_path / "run", f"{extra_flags} --save-every 3")
    found = run_training(toy_folder, tmp_path / "run", f"{extra_flags} --save-every 3 --resume")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_full_disk_keeps_the_previous_checkpoint(toy_folder, tmp_path, monkeypatch):
    calls, save_file = [], llava.save_file

    def save_file_on_full_disk(tensors, file, metadata=None):
        calls.append(file)
        if len(calls) == 4:                  # the optimizer state of the second checkpoint
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, file, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(llava, "save_file", save_file_on_full_disk)
        message = error_message(toy_folder, tmp_path / "run", "--save-every 3")
    assert message.startswith("step 6 could not be saved") and "No space left" in message
    assert [folder.name for folder in (tmp_path / "run/trainer").iterdir()] == ["step-000003"]
    Llava.from_pretrained(tmp_path / "run")
    run_training(toy_folder, tmp_path / "run", "--save-every 3 --resume")


def test_files_are_copied_where_hard_links_are_not_supported(toy_folder, tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    run_training(toy_folder, tmp_path)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "trainer/step-000010" / name).read_bytes()


def test_resuming_with_other_flags_or_data_raises(toy_folder, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    assert "holds a run already" in error_message(toy_folder, tmp_path / "run")
    message = error_message(toy_folder, tmp_path / "run", "--resume --lr 1e-3 --seed 1 --lora-rank 2")
    assert "lr was 0.01 and is now 0.001" in message and "seed was 0 and is now 1" in message
    assert "lora_rank was None and is now 2" in message and "clip" not in message
    records = json.loads((toy_folder / "data.json").read_text())
    assert "data was" not in message
    assert "data was" in error_message(toy_folder, tmp_path / "run", "--resume", records[1:])


def test_folder_with_a_model_is_not_trained_into(toy_folder, tmp_path):
    shutil.copytree(toy_folder / "base", tmp_path / "run")
    message = error_message(toy_folder, tmp_path / "run", f"--init {tmp_path}/run")
    assert "run holds a model, which the run would overwrite" in message
    before, after = ({file.name: file.read_bytes() for file in folder.iterdir()}
                     for folder in (toy_folder / "base", tmp_path / "run"))
    assert before == after


def test_data_that_changes_during_a_run_does_not_change_its_checkpoints(toy_folder, tmp_path):
    shutil.copy(toy_folder / "data.json", tmp_path)
    checkpoints = train.Checkpoints(train.parse(toy_flags(
        toy_folder, tmp_path / "run", f"--data {tmp_path}/data.json")), 10)
    before = checkpoints.settings()
    (tmp_path / "data.json").unlink()
    assert checkpoints.settings() == before


def test_newest_checkpoint_has_the_highest_number(toy_folder, tmp_path):
    for name in ("step-999999", "step-1000000"):
        llava.write_json(tmp_path / "trainer" / name / "run.json", {})
    newest = train.Checkpoints(train.parse(toy_flags(toy_folder, tmp_path)), 10).newest
    assert newest.name == "step-1000000"


# ---------------------------------------------------------------------------------------------
# Trainable parameters and memory

def make_inputs(toy_folder: Path) -> dict:
    """The first four toy records as one micro-batch."""
    samples = make_samples(toy_folder, Llava.from_pretrained(toy_folder / "base", dtype=torch.float32).config)
    return train.make_micro_batches(4, [samples[i] for i in range(4)])[0]


def record_saved_models(monkeypatch) -> list[Llava]:
    """A list to which every call of Checkpoints.save appends its model."""
    models, save = [], train.Checkpoints.save

    def recorded_save(checkpoints, model, processor, optimizer):
        models.append(model)
        save(checkpoints, model, processor, optimizer)

    monkeypatch.setattr(train.Checkpoints, "save", recorded_save)
    return models


def test_lora_adapter_opens_merged_into_its_base(toy_folder, tmp_path, monkeypatch):
    trained = record_saved_models(monkeypatch)
    stored = run_training(toy_folder, tmp_path, "--lora-rank 2 --lora-alpha 6 --lora-vision")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    assert re.fullmatch(config["target_modules"], "model.language_model.layers.0.mlp.up_proj")
    assert not re.fullmatch(config["target_modules"], "model.multi_modal_projector.linear_1")
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in stored
    # A and B of 7 linear layers in each decoder layer and of 6 in each vision layer but the last, which is
    # not evaluated; and 4 tensors of the projector.
    assert len(stored) == 2 * (3 * 7 + 2 * 6) + 4
    base = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32)
    merged = Llava.from_pretrained(tmp_path, dtype=torch.float32)
    batch = make_inputs(toy_folder)
    with torch.no_grad():
        base_loss, trained_loss, merged_loss = (model(**batch) for model in (base, trained[0], merged))
    assert abs(merged_loss - trained_loss) < 1e-5 < abs(base_loss - trained_loss)


def test_lora_run_that_starts_from_a_lora_run_adds_to_it(toy_folder, tmp_path, monkeypatch):
    trained = record_saved_models(monkeypatch)
    run_training(toy_folder, tmp_path / "first", "--lora-rank 2")
    run_training(toy_folder, tmp_path / "second", f"--init {tmp_path}/first --lora-rank 3")
    opened = Llava.from_pretrained(tmp_path / "second", dtype=torch.float32)
    layer = trained[1].language_model.layers[0].mlp["up_proj"]            # frozen: base + first LoRA
    change = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    assert change.norm() > 1e-3 * layer.frozen.weight.norm()
    torch.testing.assert_close(opened.language_model.layers[0].mlp["up_proj"].weight,
                               layer.frozen.weight + change)


def test_activation_checkpointing_gives_bit_identical_weights(toy_folder, uninterrupted, tmp_path):
    run_training(toy_folder, tmp_path, "--checkpoint-blocks 2")
    assert saved_weights(tmp_path) == saved_weights(uninterrupted)


def test_compile_compiles_every_layer_and_the_update(toy_folder, uninterrupted, tmp_path, monkeypatch):
    compiled, torch_compile = [], torch.compile
    really_compile = os.environ.get("LLAVA_TEST_ALL") and shutil.which("g++")         # takes half a minute

    def recorded_compile(function):
        compiled.append(function)
        return torch_compile(function) if really_compile else function

    monkeypatch.setattr(torch, "compile", recorded_compile)
    monkeypatch.setattr(train, "CHUNK", {"cpu": 1 << 10})    # several chunks per weight
    run_training(toy_folder, tmp_path, "--compile")
    assert len(compiled) == 3 + 3 + 1
    losses = [[line["loss"] for line in read_log(folder)] for folder in (tmp_path, uninterrupted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("extra_flags, message", [
    ("--in-backward --clip 1", "--clip"), ("--in-backward --micro-batch-size 2", "--micro-batch-size"),
    ("--stage 1 --lora-rank 4", "stage 2"), ("--lora-vision", "--lora-rank"), ("--card h100", "--plan"),
    ("--vision x --language y", "--init"), ("--language y", "--init"),
])
def test_conflicting_flags_exit_with_2(toy_folder, tmp_path, capsys, extra_flags, message):
    with pytest.raises(SystemExit) as error:
        train.parse(toy_flags(toy_folder, tmp_path, extra_flags))
    assert error.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


class LiveTensorBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist: `now`, and the most so far, `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = set()                # tensors that share a storage are counted once

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key, size):
        self.storages.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, result)
        return result


FLAG_SETS = ["", "--in-backward", "--stage 1 --template v1", "--lora-rank 8 --lora-vision",
             "--checkpoint-blocks 2", "--micro-batch-size 1"]


@pytest.mark.parametrize("dtype, vocab_size, extra_flags", [
    *(("float32", 1000, extra_flags) for extra_flags in FLAG_SETS),
    *(("float32", 16000, extra_flags) for extra_flags in FLAG_SETS[:2]),
    *(("bfloat16", 1000, extra_flags) for extra_flags in FLAG_SETS if os.environ.get("LLAVA_TEST_ALL"))])
def test_memory_estimate_is_within_8_percent(
        toy_folder, tmp_path, monkeypatch, extra_flags, dtype, vocab_size):
    monkeypatch.setattr(train, "ALLOCATOR_OVERHEAD", 1)      # count the tensors only
    monkeypatch.setattr(train, "CHUNK", {"cpu": 1 << 16, "gpu": 1 << 16})
    args = train.parse(toy_flags(toy_folder, tmp_path, f"--dtype {dtype} --batch-size 4 {extra_flags}"))
    config = LlavaConfig(VisionConfig(64, 192, 3, 4, image_size=64, patch_size=8),
                         TextConfig("mistral", vocab_size, 192, 672, 8, 6, 2, head_dim=32),
                         image_token_id=vocab_size)
    with LiveTensorBytes() as live:
        model = Llava(config).to(getattr(torch, dtype))
        train.choose_trainable(model, args)
        samples = train.Samples(train.read_records(toy_folder / "data.json", toy_folder)[1::2],
                                Processor.from_pretrained(toy_folder / "base", config), 2048)
        sample = samples[8]
        if vocab_size > 1000:                # supervise every token, so that the logits decide the peak
            sample["labels"] = sample["input_ids"].where(sample["input_ids"] != vocab_size, -100)
            samples.supervised[8] = int((sample["labels"][:, 1:] != -100).sum())
        need = train.choose_micro_batch(model, samples, [[8] * 4], args)    # equal records: no padding
        train.wrap_layers(model, args)
        optimizer = train.Adam(model.named_parameters(), in_backward=args.in_backward)
        micro_batches = train.make_micro_batches(args.micro_batch_size, [sample] * 4)
        live.peak = 0
        optimizer.begin(1e-3)
        for micro_batch in micro_batches:
            model(**micro_batch).backward()
        optimizer.step()
    assert live.peak == pytest.approx(need["peak"], rel=0.08)


def test_layers_are_checkpointed_before_micro_batches_become_smaller(toy_folder, tmp_path, monkeypatch):
    peaks = []
    monkeypatch.setattr(train, "print_plan", lambda model, need, *_: peaks.append(need["peak"]))

    def plan(gib: float, extra_flags: str = "") -> tuple[float, int, int]:
        """(peak bytes, micro-batch size, number of checkpointed layers) for a GPU of `gib` GiB."""
        monkeypatch.setitem(train.CARDS, "h100", (989, gib))
        args = train.parse(toy_flags(toy_folder, tmp_path, f"--plan --card h100 {extra_flags}"))
        train.run_stage(args)
        return peaks.pop(), args.micro_batch_size, args.checkpoint_blocks

    peak, *chosen = plan(80)
    checkpointed_peak, *_ = plan(80, "--checkpoint-blocks 3")
    assert chosen == [5, 0] and checkpointed_peak < peak
    assert plan(80, "--checkpoint-blocks 40") == (checkpointed_peak, 5, 3)           # there are only 3
    gib = checkpointed_peak / train.MEMORY_FRACTION / 2**30
    assert plan(gib * 1.01)[1:] == (5, 3)
    assert plan(gib * 0.9)[1] < 5
    assert plan(gib * 0.9, "--in-backward")[1:] == (5, 3)


# ---------------------------------------------------------------------------------------------
# The data

GOOD = [turn("human", "<image>\nWhat?"), turn("gpt", "Red.")]


@pytest.mark.parametrize("record, expected", [
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
def test_error_names_the_bad_record(toy_folder, tmp_path, record, expected):
    good = json.loads((toy_folder / "data.json").read_text())[:3]
    message = error_message(toy_folder, tmp_path / "run", records=[*good, {"id": "wrong"} | record])
    assert "bad.json, record wrong: " in message and expected in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("records, message", [
    ("[{", "JSON"), ({}, "not a list"), ([], "not a list"), ([7], "record 0: not a LLaVA record")])
def test_bad_record_file_raises(toy_folder, tmp_path, records, message):
    assert message in error_message(toy_folder, tmp_path / "run", records=records)


def test_json_lines_are_named_as_such(toy_folder, tmp_path):
    message = error_message(toy_folder, tmp_path / "run", records='{"id": 1}\n{"id": 2}\n')
    assert "bad.json is not valid JSON, perhaps it is JSON Lines" in message


def test_plain_template_has_as_many_images_as_the_record(toy_folder):
    processor = Processor.from_pretrained(toy_folder / "base")
    processor.config = replace(processor.config, template="plain")
    for record in train.read_records(toy_folder / "data.json", toy_folder):
        ids, _ = processor.tokenize(record["messages"])
        assert ids.count(processor.config.image_token_id) == len(record["images"])


def test_conversation_in_the_plain_template_names_the_record(toy_folder, tmp_path):
    records = [{"id": "two", "conversations": [turn("human", "What?"), turn("gpt", "Red.")] * 2}]
    message = error_message(toy_folder, tmp_path / "run", "--template plain", records)
    assert message.startswith("record two: the template plain is for one image and its caption")


@pytest.mark.parametrize("workers", [0, 2])
def test_error_during_training_names_the_broken_image(toy_folder, tmp_path, workers):
    shutil.copytree(toy_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("un*", "two_*"))
    (tmp_path / "copy/7.png").write_bytes((toy_folder / "7.png").read_bytes()[:60])
    message = error_message(tmp_path / "copy", tmp_path / "run", f"--workers {workers}")
    assert "7.png is not a readable" in message


def test_too_long_records_are_cut_counted_and_listed(toy_folder, tmp_path, capsys):
    records = json.loads((toy_folder / "data.json").read_text())
    late = {"id": "late", "image": "1.png", "conversations": [
        turn("human", "What?"), turn("gpt", "Red. " * 50), turn("human", "<image>"), turn("gpt", "Red.")]}
    (tmp_path / "long.json").write_text(json.dumps([*records, late]))
    run_training(toy_folder, tmp_path, f"--data {tmp_path}/long.json --max-length 50")
    listed = json.loads((tmp_path / "cut.json").read_text())
    assert set(listed["left out"]) < set(listed["cut"]) and "late" in listed["cut"]
    assert f"{len(listed['cut'])} records are longer" in capsys.readouterr().out


def test_cut_validation_records_are_listed_and_a_plan_lists_nothing(toy_folder, tmp_path, capsys):
    run_training(toy_folder, tmp_path / "run", f"--val {toy_folder}/data.json --max-length 50")
    listed = json.loads((tmp_path / "run/val-cut.json").read_text())
    assert listed == json.loads((tmp_path / "run/cut.json").read_text()) and listed["cut"]
    capsys.readouterr()
    train.run_stage(train.parse(toy_flags(toy_folder, tmp_path / "plan", "--max-length 50 --plan")))
    text = capsys.readouterr().out
    assert "are left out\n" in text and "cut.json" not in text and not (tmp_path / "plan").exists()


def test_record_without_an_id_has_its_index(toy_folder):
    raw = {"conversations": [turn("human", "What?"), GOOD[1]]}
    record = train.try_record(train.read_record, raw, 7, toy_folder)
    assert record["id"] == 7


def test_image_with_a_damaged_second_frame_counts_as_animated():
    class Damaged:
        @property
        def is_animated(self):
            raise IndexError

    assert train.is_animated(Damaged()) and not train.is_animated(Image.new("RGB", (9, 9)))


@pytest.mark.parametrize("error", [RuntimeError, ZeroDivisionError])
def test_error_of_a_decoder_names_the_file(monkeypatch, error):
    def fail(_):
        raise error("Failed to decode frame 0")          # as of damaged AVIF files

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="a.avif is not a readable image"):
        llava.open_image("a.avif")


def test_toy_run_takes_one_process(monkeypatch):
    monkeypatch.setattr(train, "PROCESSES", 2)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(llava.UserError, match="the toy run takes one process"):
        train.main()


def test_error_about_an_image_header_names_the_file(tmp_path):
    info = PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)      # more than Pillow accepts
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(OSError, match="a.png: not a readable image"):
        train.image_sizes({"images": [tmp_path / "a.png"]}, LlavaConfig(image_mode="anyres"))


@pytest.mark.parametrize("flags, missing", [
    ("--init {0}/mistral", "no vision model"), ("--vision {0}/clip --language {0}/clip", "no text model")])
def test_plan_names_a_missing_model(toy_folder, tmp_path, flags, missing):
    llava.write_json(tmp_path / "mistral/config.json", llava.hf_config(LlavaConfig(), True)["text_config"])
    llava.write_json(tmp_path / "clip/config.json", llava.hf_config(LlavaConfig(), True)["vision_config"])
    with pytest.raises(llava.UserError, match=missing):
        train.open_config(train.parse(f"--stage 1 --data d --out o {flags.format(tmp_path)}".split()))


def test_check_data_lists_all_errors(toy_folder, tmp_path, capsys):
    shutil.copytree(toy_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("un*", "two_*"))
    folder = tmp_path / "copy"
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (9, 9)).save(folder / "cmyk.jpg")
    (folder / "cut.png").write_bytes((toy_folder / "1.png").read_bytes()[:60])
    records = json.loads((toy_folder / "data.json").read_text())
    records += [records[0], *({"id": name, "image": name, "conversations": GOOD}
                              for name in ("moves.gif", "cmyk.jpg", "cut.png", "none.png"))]
    records += [{"id": "mute", "conversations": [turn("human", "What?"), turn("gpt", "")]}]
    message = error_message(folder, tmp_path / "run", "--check-data", records)
    found = json.loads((tmp_path / "run/check.json").read_text())
    wrong, odd = [line.split(":")[0] for line in found["wrong"]], " ".join(found["odd"])
    assert wrong == ["record cut.png", "record none.png", "record mute"]
    assert "moves.gif is animated" in odd and "cmyk.jpg is in mode CMYK" in odd
    assert len(found["duplicates"]) == 1 and "record cut.png" in message
    printed = capsys.readouterr().out
    assert "28 records: 3 wrong" in printed
    assert sum(int(count) for count in re.findall(r"tokens +(\d+)", printed)) == 25


def test_an_image_is_not_blamed_for_a_lack_of_memory(monkeypatch, toy_folder):
    def fail(_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        llava.open_image(toy_folder / "1.png")
    with pytest.raises(MemoryError):
        train.image_sizes({"images": [toy_folder / "1.png"]}, SimpleNamespace(image_mode="anyres"))


def test_check_data_lists_all_records_that_do_not_fit_the_template(toy_folder, tmp_path):
    text = [turn("human", "What?"), turn("gpt", "Red."), turn("human", "Sure?"), turn("gpt", "Yes.")]
    records = [{"id": name, "conversations": text} for name in "ab"]
    records.append({"id": "c", "image": "1.png", "conversations": GOOD})
    message = error_message(toy_folder, tmp_path / "run", "--check-data --template plain", records)
    wrong = json.loads((tmp_path / "run/check.json").read_text())["wrong"]
    assert [line.split(":")[0] for line in wrong] == ["record a", "record b"] and wrong[0] in message


def test_show_prints_the_kind_of_every_token(toy_folder, tmp_path, capsys):
    train.run_stage(train.parse(toy_flags(toy_folder, tmp_path, "--show 1")))
    shown = re.sub(r"\033\[\d+m", "", capsys.readouterr().out).splitlines()
    assert [line.split()[0] for line in shown[:3]] == ["start", "prompt", "image"]
    assert any(line.startswith("answer  supervised  The color is blue.") for line in shown)
    assert any(line == "end     supervised </s>" for line in shown)
    assert "records are 0 to 21" in error_message(toy_folder, tmp_path, "--show 22")


def test_plan_needs_no_weights(toy_folder, tmp_path, capsys):
    shutil.copytree(toy_folder / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    extra_flags = f"--init {tmp_path}/base --plan --card h100"
    train.run_stage(train.parse(toy_flags(toy_folder, tmp_path / "run", extra_flags)))
    printed = capsys.readouterr().out
    model = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("vision"))
    assert f"{trainable:,} of {total:,} parameters" in printed
    assert re.search(r"peak +\d", printed) and "hours" in printed and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------
# Validation loss

def test_validation_loss_is_the_mean_over_its_records_and_resumes_exactly(toy_folder, tmp_path, capsys):
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    extra_flags = f"--val {toy_folder}/data.json --val-every 4 --save-every 5 --micro-batch-size 5"
    run_training(toy_folder, uninterrupted, extra_flags)
    assert "validation loss" in capsys.readouterr().out
    lines = read_log(uninterrupted)
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 8, 10]
    model = Llava.from_pretrained(uninterrupted, dtype=torch.float32)
    samples = make_samples(toy_folder, model.config)
    total = tokens = 0
    for i in range(22):
        (micro_batch,) = train.make_micro_batches(1, [samples[i]])
        count = int((micro_batch["labels"] != -100).sum())
        total += count * model(**micro_batch).item()
        tokens += count
    assert lines[-1]["val_loss"] == pytest.approx(total / tokens, rel=1e-5)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Adam, "step", interrupt_after(6))
        run_training(toy_folder, run, extra_flags)
    run_training(toy_folder, run, f"{extra_flags} --resume")
    losses = [[(line["loss"], line.get("val_loss")) for line in read_log(folder)]
              for folder in (uninterrupted, run)]
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------------------------------
# Saving

def test_sharded_checkpoint_resumes_to_bit_identical_weights(
        toy_folder, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(train.Checkpoints, "save", raise_after(2, train.Checkpoints.save))
    with pytest.raises(RuntimeError):
        run_training(toy_folder, tmp_path, "--save-every 3")
    files = {file.name.split("-")[0] for file in (tmp_path / "trainer/step-000006").glob("*-of-*")}
    assert files == {"model", "optimizer"}
    monkeypatch.undo()
    run_training(toy_folder, tmp_path, "--save-every 3 --resume")
    assert saved_weights(tmp_path) == saved_weights(uninterrupted)


def raise_after(count: int, save):
    """A replacement of `save` that raises RuntimeError after its `count`-th call."""
    calls = []

    def raising_save(*args):
        save(*args)
        calls.append(args)
        if len(calls) == count:
            raise RuntimeError("stopped")
    return raising_save


def test_last_checkpoint_has_no_optimizer_state(uninterrupted):
    assert not list((uninterrupted / "trainer").glob("*/optimizer*"))


def test_saving_needs_host_memory_for_at_most_two_shards(toy_folder, tmp_path, monkeypatch):
    """60 MB of weights and 120 MB of optimizer state, in shards of 8 MB."""
    text = TextConfig("mistral", 4000, 256, 1024, 12, 4, 4, head_dim=64)
    config = LlavaConfig(VisionConfig(32, 64, 1, 2, image_size=32, patch_size=16), text, image_token_id=4000)
    args = train.parse(toy_flags(toy_folder, tmp_path))
    processor = Processor(toy.make_tokenizer().to_str(), config)
    monkeypatch.setattr(train, "SHARD_BYTES", 8_000_000)

    def save(added):
        model = Llava(config)
        optimizer = train.Adam(model.named_parameters())
        for tensor in optimizer.state.values():
            tensor.fill_(1)                  # zeros take no memory until they are written to
        before = train.peak_memory("cpu")
        train.Checkpoints(args, 10).save(model, processor, optimizer)
        added.value = train.peak_memory("cpu") - before

    context = multiprocessing.get_context("fork")
    added = context.Value("q", 1 << 60)      # bytes that saving adds to the peak
    child = context.Process(target=save, args=(added,))
    child.start()
    child.join()
    assert len(list((tmp_path / "trainer/step-000000").glob("optimizer-*"))) > 10
    assert added.value < 2 * 8_000_000 + 4_000_000


# ---------------------------------------------------------------------------------------------
# Out of memory, memory estimate, flags, signals

def test_out_of_memory_error_names_the_flags_that_help(toy_folder, tmp_path, monkeypatch):
    def forward(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(Llava, "forward", forward)
    message = error_message(toy_folder, tmp_path)
    assert all(text in message for text in ("--micro-batch-size", "--checkpoint-blocks", "--in-backward",
                                            "--lora-rank", "Tried to allocate 2 GiB"))


def test_largest_micro_batch_comes_first(toy_folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "train", lambda *args: calls.append(args))
    train.run_stage(train.parse(toy_flags(toy_folder, tmp_path, "--seed 3 --micro-batch-size 2")))
    ((_, _, samples, _, batches, *_),) = calls
    loads = [train.largest_load(samples, [batch], 2) for batch in batches]
    assert loads[0] == max(loads) and loads[1:] != sorted(loads[1:], reverse=True)
    assert sorted(sum(batches, [])) == sorted([*range(22)] * 2)


def test_free_gpu_memory_determines_the_micro_batch_size(toy_folder, tmp_path, monkeypatch):
    config = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32).config
    samples, model = make_samples(toy_folder, config), Llava(config)

    def choose(free: float) -> tuple[int, float]:
        """(micro-batch size, estimated peak) with `free` bytes of GPU memory."""
        args = train.parse(toy_flags(toy_folder, tmp_path, "--checkpoint-blocks 0"))
        args.device = "cuda"
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 50))
        need = train.choose_micro_batch(model, samples, [[1, 3, 5, 7, 9]], args)
        return args.micro_batch_size, need["peak"]

    size, peak = choose(1 << 50)
    assert size == 5 and choose(0.9 * peak)[0] < 5


def test_memory_estimate_depends_on_tiles_and_processes(toy_folder, tmp_path, monkeypatch):
    config = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32).config
    samples = make_samples(toy_folder, replace(config, image_mode="anyres"))
    assert len(samples.tiles) == 22 and samples.tiles[0::2] == [0] * 11
    assert all(tiles in (3, 4, 5) for tiles in samples.tiles[1::2])
    assert train.largest_load(samples, [[1]], 1).tiles == samples.tiles[1]
    samples.lengths, samples.supervised = [9, 30, 20, 40] + [1] * 18, [8, 7, 9, 3] + [1] * 18
    assert train.largest_load(samples, [[0, 1, 2, 3]], 2)[:2] == (2 * 40, 9 + 8), "of any two records"

    args = train.parse(toy_flags(toy_folder, tmp_path, "--micro-batch-size 4 --checkpoint-blocks 0"))
    samples.lengths, load = [10, 30, 20, 40] + [1] * 18, train.Load(10, 5, 1)
    assert train.largest_load(samples, [[0, 3, 1, 2]], 4).tokens == 4 * 40
    of_one_process = train.estimate_memory(Llava(config), load, args)["weights"]
    monkeypatch.setattr(train, "PROCESSES", 2)
    assert train.largest_load(samples, [[0, 3, 1, 2]], 4).tokens == 2 * 40
    assert of_one_process / 2 < train.estimate_memory(Llava(config), load, args)["weights"]
    peaks = []                               # a process has 3 of 5 records: in 3, 2 or 1 micro-batches
    for args.micro_batch_size in (1, 2, 3):
        peaks.append(train.estimate_memory(Llava(config), train.Load(900, 800, 1), args)["peak"])
    assert peaks[0] == peaks[1] > peaks[2], "gradients of earlier micro-batches"


@pytest.mark.parametrize("mode, length", [("pad", 2048), ("anyres", 4096)])
def test_default_max_length_depends_on_the_image_mode(toy_folder, tmp_path, mode, length):
    args = train.parse(toy_flags(toy_folder, tmp_path, f"--plan --image-mode {mode}"))
    train.run_stage(args)
    assert args.max_length == length


def test_lengths_are_counted_after_token_reduction(toy_folder):
    config = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32).config
    without, reduced = (make_samples(toy_folder, replace(config, **options)).lengths[1]
                        for options in ({}, {"prune": "pool", "keep_tokens": 1}))
    assert without - reduced == config.vision.side**2 - 1


@pytest.mark.parametrize("flag", [
    "--lora-rank -1", "--lora-rank 0", "--checkpoint-blocks -1", "--workers -1", "--clip -1", "--lr -1",
    "--micro-batch-size 0", "--max-length 0", "--save-every 0", "--epochs 0", "--batch-size 0",
    "--keep-tokens 0", "--val-every 0", "--device mps", "--device cuda", "--quantize int4",
    "--val-images x", "--quantize int3 --lora-rank 2"])
def test_flag_out_of_range_exits_with_2(toy_folder, tmp_path, capsys, monkeypatch, flag):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        train.parse(toy_flags(toy_folder, tmp_path, flag))
    assert error.value.code == 2 and flag.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_default_device_and_dtype_depend_on_the_gpu_and_are_never_mps(toy_folder, tmp_path, monkeypatch):
    argv = [flag for flag in toy_flags(toy_folder, tmp_path) if flag not in ("--device", "cpu")]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (train.parse(argv).device, train.parse(argv).dtype) == ("cpu", "float32")
    assert train.parse([*argv, "--device", "mps"]).dtype == "float32"
    assert train.parse([*argv, "--quantize", "int4", "--lora-rank", "2"]).dtype == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
        assert (train.parse(argv).device, train.parse(argv).dtype) == ("cuda", dtype)


def test_toy_run_uses_float32_on_a_gpu(tmp_path, monkeypatch):
    def stop_after_training(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(toy, "build", lambda *_, **__: toy.write_scienceqa(
        tmp_path / "scienceqa", sizes=(("train", 8), ("val", 8), ("test", 8))))
    monkeypatch.setattr(toy, "draw_losses", stop_after_training)          # it is called after both stages
    runs = []
    with pytest.raises(ZeroDivisionError):
        toy.run_and_check(runs.append, train.parse, tmp_path, tmp_path / "runs")
    assert [(args.device, args.dtype) for args in runs] == [("cuda", "float32")] * 2


def test_second_ctrl_c_stops_immediately():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), train.deferred_signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_only_bf16_weights_draw_rounding_noise(monkeypatch):
    calls, randint = [], torch.randint

    def recorded_randint(*args, **kwargs):
        calls.append(args)
        return randint(*args, **kwargs)

    monkeypatch.setattr(torch, "randint", recorded_randint)
    for dtype, expected_calls in ((torch.float32, 0), (torch.bfloat16, 1)):
        weight = torch.nn.Parameter(torch.ones(8, dtype=dtype))
        adam = train.Adam([("w", weight)])
        weight.grad = torch.ones_like(weight)
        adam.begin(0.1)
        adam.step()
        assert len(calls) == expected_calls and weight[0].item() == pytest.approx(0.9, rel=1e-2)


def test_gradients_are_reduced_in_float32(toy_folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "PROCESSES", 2)
    monkeypatch.setattr(train, "init_device_mesh", lambda device, shape: (device, shape))
    monkeypatch.setattr(train, "fully_shard", lambda module, mesh, mp_policy: calls.append((mesh, mp_policy)))
    args = train.parse(toy_flags(toy_folder, tmp_path, "--checkpoint-blocks 0"))
    train.wrap_layers(Llava.from_pretrained(toy_folder / "base", dtype=torch.bfloat16), args)
    assert [(mesh, policy.reduce_dtype) for mesh, policy in calls] == [(("cpu", (2,)), torch.float32)] * 4


def test_clip_0_or_none_does_not_clip():
    weight = torch.nn.Parameter(torch.ones(4))
    adam, gradient = train.Adam([("weight", weight)]), torch.tensor([3.0, 0, 4, 0])
    for max_norm, expected in ((0, gradient), (None, gradient), (1, gradient / 5)):
        weight.grad = gradient.clone()
        assert adam.clip(max_norm) == pytest.approx(5)
        torch.testing.assert_close(weight.grad, expected)


def test_every_process_waits_after_saving_and_before_exiting(toy_folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "PROCESSES", 2)
    monkeypatch.setattr(train, "run_stage", lambda args: calls.append("run"))
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda name=name, **kwargs: calls.append((name, kwargs)))
    argv = toy_flags(toy_folder, tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    train.main()
    (_, init_arguments), *other_calls = calls
    assert other_calls == ["run", ("barrier", {}), ("destroy_process_group", {})]
    assert init_arguments["timeout"] >= timedelta(hours=1)   # the time to write 60 GB at 17 MB/s
    for rank, written in ((1, False), (0, True)):
        monkeypatch.setattr(train, "RANK", rank)
        calls.clear()
        model = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32)
        optimizer = SimpleNamespace(steps=4, state={})
        processor = Processor.from_pretrained(toy_folder / "base", model.config)
        train.Checkpoints(train.parse(argv), 10).save(model, processor, optimizer)
        assert calls == [("barrier", {})] and (tmp_path / "trainer/step-000004").exists() == written


class WeightlessLinear(torch.nn.Module):
    """A linear layer without a parameter `weight`, like llava.QuantizedLinear."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("stored", linear.weight.detach().clone())

    def forward(self, x):
        return x @ self.stored.T


def test_lora_works_on_layers_without_a_weight(toy_folder, tmp_path, monkeypatch):
    args = train.parse(toy_flags(toy_folder, tmp_path, "--lora-rank 2"))
    plain, weightless = (Llava.from_pretrained(toy_folder / "base", dtype=torch.float32) for _ in range(2))
    for name, module in list(weightless.language_model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            weightless.language_model.layers.set_submodule(name, WeightlessLinear(module))
    for model in (plain, weightless):
        torch.manual_seed(0)
        train.choose_trainable(model, args)
    batch = make_inputs(toy_folder)
    assert torch.allclose(plain(**batch), weightless(**batch))
    names = [[n for n, p in model.named_parameters() if p.requires_grad] for model in (plain, weightless)]
    assert names[0] == names[1] and len(names[0]) == 2 * 7 * 3 + 4


def write_wide_base(toy_folder: Path, folder: Path) -> None:
    """Write a LLaVA of random weights. The widths of its language model are multiples of 64, for int4."""
    config = LlavaConfig(**llava.open_checkpoint(str(toy_folder / "base"), weights=False)[0])
    text = replace(config.text, hidden_size=64, intermediate_size=128, num_attention_heads=3, head_dim=64)
    torch.manual_seed(0)
    Llava(replace(config, text=text)).save_pretrained(folder)
    Processor.from_pretrained(toy_folder / "base", config).save_pretrained(folder)


@pytest.mark.parametrize("quantize", ["int8", "int4"] if os.environ.get("LLAVA_TEST_ALL") else ["int4"])
def test_quantized_run_resumes_exactly_and_opens_with_the_full_base(toy_folder, tmp_path, quantize):
    write_wide_base(toy_folder, tmp_path / "base")
    extra_flags = f"--init {tmp_path}/base --quantize {quantize} --lora-rank 2 --save-every 4"
    expected = run_training(toy_folder, tmp_path / "uninterrupted", extra_flags)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Adam, "step", interrupt_after(6))
        run_training(toy_folder, tmp_path / "run", extra_flags)
    found = run_training(toy_folder, tmp_path / "run", f"{extra_flags} --resume")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    losses = [line["loss"] for line in read_log(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    Llava.from_pretrained(tmp_path / "run", dtype=torch.float32)


def test_quantize_flag_reaches_the_model_and_the_memory_estimate(toy_folder, tmp_path, monkeypatch):
    quantized, need = [], {}
    config = LlavaConfig(**llava.open_checkpoint(str(toy_folder / "base"), weights=False)[0])

    def from_pretrained(*_, **options):
        quantized.append(options.get("quantize"))
        return Llava(config)

    monkeypatch.setattr(Llava, "from_pretrained", from_pretrained)
    for bits, quantize_flag in (("int4", "--quantize int4"), ("int8", "--quantize int8"), (None, "")):
        args = train.parse(toy_flags(toy_folder, tmp_path, f"--lora-rank 2 --dtype bfloat16 {quantize_flag}"))
        args.micro_batch_size, args.checkpoint_blocks = 1, 0
        model, _ = train.build(args, config, None)
        need[bits] = train.estimate_memory(model, train.Load(10, 5, 1), args)["weights"]
    assert quantized == ["int4", "int8", "none"]
    parameters = sum(m.frozen.weight.numel() for m in model.modules() if isinstance(m, train.LoRA))
    assert need["int8"] - need["int4"] == pytest.approx(parameters * 3 / 8, rel=0.15)
    assert need[None] > need["int8"] + 0.9 * parameters


def test_all_files_import_without_unix_modules():
    code = ("import sys\nfor name in ('resource', 'fcntl', 'termios', 'pwd', 'grp'):\n"
            "    sys.modules[name] = None\nimport llava, eval, prune, train")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------------------------------------
# Two processes

TORCHRUN_SCRIPT = """
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
def torchrun(request, toy_folder):
    """The running torchrun, which trains with two processes, or None if no selected test needs it. It starts
    before the first test of this file, so that it runs on a second core at the same time."""
    if not any("two_process_runs" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder = toy_folder / "two_processes"
    runs = {name: (False, toy_flags(toy_folder, folder / name, extra_flags))
            for name, extra_flags in TWO_PROCESS_FLAGS.items()}
    resumed = toy_flags(toy_folder, folder / "resumed", TWO_PROCESS_FLAGS["lora"])
    runs |= {"interrupted": (True, resumed), "resumed": (False, [*resumed, "--resume"])}
    script = toy_folder / "two_processes.py"
    script.write_text(TORCHRUN_SCRIPT.format(root=str(ROOT), runs=json.dumps(list(runs.values()))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(script)]
    with open(toy_folder / "two_processes.log", "w") as output, subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        yield process
        process.terminate()


@pytest.fixture(scope="module")
def two_process_runs(toy_folder, torchrun):
    """The folder that contains the runs trained by two processes."""
    assert torchrun.wait(timeout=100) == 0, (toy_folder / "two_processes.log").read_text()
    return toy_folder / "two_processes"


TWO_PROCESS_FLAGS = {
    "micro": "--epochs 1 --batch-size 7 --seed 0 --micro-batch-size 2",
    "in_backward": "--epochs 1 --batch-size 7 --seed 2 --in-backward",
    "lora": "--epochs 1 --batch-size 7 --seed 3 --lora-rank 2 --lora-vision --save-every 2"}


@pytest.mark.parametrize("run", TWO_PROCESS_FLAGS)
def test_two_processes_give_the_losses_and_weights_of_one(toy_folder, two_process_runs, tmp_path, run):
    expected = run_training(toy_folder, tmp_path, TWO_PROCESS_FLAGS[run])
    seed, index = {"micro": (0, 0), "in_backward": (2, 2), "lora": (3, 3)}[run]
    assert len(train.make_batches(range(22), [1] * 22, 7, seed)[index]) == 1  # the second has no record
    for one, two in zip(read_log(tmp_path), read_log(two_process_runs / run), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert two["tokens"] == one["tokens"]
    for name, tensor in load_file(next((two_process_runs / run).glob("*model.safetensors"))).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_two_processes_resume_to_bit_identical_weights(two_process_runs):
    runs = [two_process_runs / name for name in ("lora", "resumed")]
    weights = [(run / "adapter_model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    losses = [[line["loss"] for line in read_log(run)] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 4
