"""Tests of the model and of training on every device of this computer. Without a GPU they run on the CPU
only, which tests their logic.

    python -m pytest tests/test_gpu.py -v
"""

import gc
import json
import os
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import llava
import prune
import train
from llava import Llava, LlavaConfig, TextConfig, VisionConfig
from tests.test_attention import (check_kernels, make_inputs, make_model, make_qkv, random_shapes,
                                  relative_errors)
from tests.test_train import LiveTensorBytes, toy_flags, toy_folder

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append("cuda")
if torch.backends.mps.is_available():
    DEVICES.append("mps")
pytestmark = pytest.mark.parametrize("device", DEVICES)


# ---------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_attention_past_the_window_equals_an_explicit_mask(device, dtype, tolerance):
    def attention(q, k, v, window):
        return llava.causal_attention(q.to(device), k.to(device), v.to(device), window).cpu()

    torch.manual_seed(0)
    for B, H, K, T, D, W in random_shapes(12):
        errors = relative_errors(*make_qkv(B, H, K, T, D, dtype), W, attention)
        assert max(errors) < tolerance, (B, H, K, T, D, W, errors)


@pytest.mark.parametrize("window", [None, 11, 1])
def test_bf16_uses_only_the_flash_kernel(device, window):
    if device == "mps":
        pytest.skip("MPS has no flash kernel")
    check_kernels(window, device, torch.bfloat16)


@pytest.mark.parametrize("window", [None, 11])
def test_logits_equal_those_of_float32_on_the_cpu(device, window):
    inputs = make_inputs(37)
    expected = make_model(window)(**inputs)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):   # a GPU may compute in TF32
        logits = make_model(window, device, dtype)(**inputs).float().cpu()
        assert (logits - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("window", [None, 11])
def test_batch_generation_equals_generation_of_single_rows(device, window):
    model, inputs, lengths = make_model(window, device).eval(), make_inputs(37), [34, 9]
    inputs["attention_mask"] = torch.arange(34) < torch.tensor(lengths)[:, None]
    batch = torch.stack(list(model.generate_tokens(**inputs, max_new_tokens=12))).cpu()
    for row, length in enumerate(lengths):
        single = {"input_ids": inputs["input_ids"][row:row + 1, :length],
                  "images": inputs["images"][row:row + 1], "image_sizes": [(28, 28)]}
        tokens = torch.stack(list(model.generate_tokens(**single, max_new_tokens=12))).cpu()
        assert torch.equal(batch[:, row], tokens[:, 0])


@pytest.mark.parametrize("window", [None, 11])
def test_replayed_decode_steps_equal_decode_steps_without_a_graph(device, window, monkeypatch):
    """Without CUDA an emulated graph is replayed: it calls the recorded step again."""
    model, outputs = make_model(window, device).eval(), []
    inputs = make_inputs(37) | {"attention_mask": torch.arange(34) < torch.tensor([34, 9])[:, None]}
    lm = model.language_model
    for replayed in (False, True):
        with torch.inference_mode():
            x, lengths, _ = model.splice(**inputs)
            caches = [llava.KVCache(window or 80, lengths, window) for _ in lm.layers]
            lm.prefill(x, caches, None)
            step = partial(lm.decode_step, caches=caches)
            if replayed:
                step = llava.ReplayedStep(step)
                if device != "cuda":
                    emulate_graphs(monkeypatch, step)
            xs = torch.randn(12, 2, 1, lm.config.hidden_size, generator=torch.Generator().manual_seed(0))
            outputs.append([step(x.to(device), positions=lengths + i).clone() for i, x in enumerate(xs)])
    for expected, y in zip(*outputs):
        torch.testing.assert_close(expected, y)


def emulate_graphs(monkeypatch, recorded: llava.ReplayedStep) -> None:
    """Replace CUDA graphs by a class whose replay calls the step again."""
    class Graph:
        def replay(self):
            recorded.output.copy_(recorded.step(recorded.x, positions=recorded.positions))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for context in ("graph", "device"):
        monkeypatch.setattr(torch.cuda, context, lambda _: nullcontext())


@pytest.mark.parametrize("bits, dtype, tolerance", [(8, torch.float32, 1e-5), (8, torch.bfloat16, 1e-2),
                                                    (4, torch.float32, 1e-5), (4, torch.bfloat16, 1e-2)])
def test_quantized_layer_equals_its_dequantized_weight_and_the_cpu(device, bits, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(192, 256, generator=generator)
    layer, cpu_layer = llava.QuantizedLinear(w, bits, device), llava.QuantizedLinear(w, bits)
    cpu_layer.block_rows = layer.block_rows = 192
    block, expected = (x.block(0, torch.float32).cpu() for x in (layer, cpu_layer))      # [I, O]
    if bits == 8:
        block, expected = block * layer.scale.float().cpu(), expected * cpu_layer.scale.float()
    assert (block - expected).norm() / expected.norm() < 1e-3             # devices may round ties differently
    for tokens in (1, 7, 128, 300):          # with and without the kernel
        x = torch.randn(tokens, 256, generator=generator).to(dtype)
        y = layer(x.to(device)).float().cpu()
        assert (y - x.float() @ block).norm() / y.norm() < tolerance


@pytest.mark.parametrize("measure", ["last", "mean", "loss", "gain"])
def test_measurements_of_questions_equal_those_of_the_cpu(toy_folder, device, measure):
    problem = {"lecture": "", "solution": "It is red.", "answer": 1, "image": None}
    problems = [problem | {"prompt": "What color do you see?\n<image>", "image": "1.png",
                           "file": toy_folder / "1.png"}]
    if measure != "gain":
        problems.append(problem | {"prompt": "What color do you see? Is it red?"})
    results = []
    for model_device in ("cpu", device):
        model = Llava.from_pretrained(toy_folder / "base", dtype=torch.float32, device=model_device).eval()
        processor = llava.Processor.from_pretrained(toy_folder / "base", model.config)
        results.append(prune.measure_batch(model, processor, problems, measure).float().cpu())
    assert results[0].abs().max() > 1e-4
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------------------------------------
# Training


def train_on(toy_folder, out, device, extra_flags="") -> tuple[dict, list[float]]:
    """Train on the device and return the weights in the run folder and the loss of each step."""
    train.run_stage(train.parse(toy_flags(toy_folder, out, f"--device {device} {extra_flags}")))
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    return load_file(next(out.glob("*model.safetensors"))), losses


@pytest.mark.parametrize("extra_flags", ["--stage 1", "--in-backward", "--lora-rank 4 --checkpoint-blocks 2"])
def test_bf16_losses_are_close_to_float32_losses_on_the_cpu(toy_folder, tmp_path, device, extra_flags):
    extra_flags += " --epochs 1"
    _, expected = train_on(toy_folder, tmp_path / "cpu", "cpu", extra_flags.replace("--in-backward", ""))
    _, losses = train_on(toy_folder, tmp_path / "device", device, f"{extra_flags} --dtype bfloat16")
    assert losses == pytest.approx(expected, rel=5e-2)


def test_resumed_run_equals_an_uninterrupted_run(toy_folder, tmp_path, device, monkeypatch):
    expected, losses = train_on(toy_folder, tmp_path / "uninterrupted", device)
    write = train.TrainingLog.write

    def write_and_interrupt(self, step, *line):
        write(self, step, *line)
        if step == 4:
            train.signal.raise_signal(train.signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.TrainingLog, "write", write_and_interrupt)
        train_on(toy_folder, tmp_path / "resumed", device)
    weights, resumed_losses = train_on(toy_folder, tmp_path / "resumed", device, "--resume")
    assert resumed_losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-4)


def test_batches_for_a_gpu_are_in_pinned_memory(toy_folder, tmp_path, device, monkeypatch):
    to_device, pinned = train.to_device, set()

    def record(micro_batch, target):
        pinned.update(x.is_pinned() for x in (micro_batch["input_ids"], *micro_batch["images"]))
        return to_device(micro_batch, target)

    monkeypatch.setattr(train, "to_device", record)
    train_on(toy_folder, tmp_path / "run", device, "--epochs 1")
    assert pinned == {device == "cuda"}


PEAK_FLAGS = ["--stage 2 --lora-rank 8"]
if torch.cuda.is_available() or os.environ.get("LLAVA_TEST_ALL"):
    PEAK_FLAGS += ["--stage 1", "--stage 2", "--stage 2 --in-backward", "--stage 2 --checkpoint-blocks 4",
                   "--stage 2 --checkpoint-blocks 8"]


@pytest.mark.parametrize("extra_flags", PEAK_FLAGS)
def test_peak_memory_is_within_8_percent_of_the_estimate(device, extra_flags, monkeypatch):
    monkeypatch.setattr(train, "ALLOCATOR_OVERHEAD", 1)      # count the tensors only
    C = 1024 if device == "cuda" else 128                    # a GPU also holds workspaces of some MB
    dtype = torch.bfloat16 if device == "cuda" else torch.float32         # bf16 is slow on many CPUs
    config = LlavaConfig(VisionConfig(C // 2, 2 * C, 3, 4, image_size=64, patch_size=8),
                         TextConfig("mistral", 1000, C, 4 * C, 8, 8, 2, head_dim=C // 8), image_token_id=999)
    args = train.parse(f"--data x --init x --out x --device {device} --batch-size 4 --dtype {str(dtype)[6:]} "
                       f"--micro-batch-size 4 --checkpoint-blocks 0 {extra_flags}".split())
    ids = torch.full((4, 101), 5)
    ids[:, 1] = config.image_token_id
    labels = ids.masked_fill(torch.arange(101) < 61, llava.IGNORE)
    images, other_bytes = [torch.zeros(1, 3, 64, 64) for _ in range(4)], 0
    if device == "cuda":
        # The first step allocates workspaces of cuBLAS, which stay and are not part of the estimate.
        Llava(config).to(device, dtype)(ids, images, [(64, 64)] * 4, labels=labels).backward()
        gc.collect()
        other_bytes = torch.cuda.memory_allocated()
    with LiveTensorBytes() as live:
        model = Llava(config).to(device, dtype)
        train.choose_trainable(model, args)
        train.wrap_layers(model, args)
        optimizer = train.Adam(model.named_parameters(), in_backward=args.in_backward)
        live.peak = 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            optimizer.begin(1e-3)
            model(ids, images, [(64, 64)] * 4, labels=labels).backward()
            optimizer.step()
    peak = torch.cuda.max_memory_allocated() - other_bytes if device == "cuda" else live.peak
    estimate = train.estimate_memory(model, train.Load(4 * 164, 4 * 40, 4), args)["peak"]
    assert estimate == pytest.approx(peak, rel=0.08)
