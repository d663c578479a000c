"""Tests that attention equals a softmax with an explicit mask, in output and gradients, and that the flash
kernel computes it: without a mask, a matrix of scores or repeated key heads."""

import random
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import llava
from llava import Llava, LlavaConfig, TextConfig, VisionConfig
from tests.bench import band_attention

torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------
# Values and gradients


def explicit_attention(q, k, v, window):
    """Attention as it is defined: a softmax over the keys j with 0 <= i - j < window."""
    T, repeats = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (distance < 0) | (distance >= (window or T))
    scores = q @ k.mT / q.shape[3] ** 0.5
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def relative_errors(q, k, v, window, attention=llava.causal_attention):
    """Relative errors of the output and of the gradients of q, k and v, each in the norm of all elements."""
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    y, expected = attention(q, k, v, window), explicit_attention(*exact, window)
    output_gradient = torch.randn_like(y)
    ours = y, *torch.autograd.grad(y, (q, k, v), output_gradient)
    theirs = expected, *torch.autograd.grad(expected, exact, output_gradient.double())
    # With a window of 1 the gradients of q and k are 0, so that their error has no relative size.
    return [((a - b).norm() / b.norm().clamp(min=1)).item() for a, b in zip(ours, theirs)]


def random_shapes(count):
    """Yield (B, H, K, T, D, W): T below, at and above multiples of W; also W = 1, K = H and K < H."""
    generator = random.Random(0)
    choice = generator.choice
    for i in range(count):
        W, K = choice([1, 2, 3, 5, 8, 17, 32]), choice([1, 2, 3])
        T = [W, W + 1, 2 * W, 2 * W + 1, 3 * W - 1, generator.randint(1, 100)][i % 6]
        yield choice([1, 2, 3]), K * choice([1, 2, 4]), K, T, choice([8, 16, 40]), W


def make_qkv(B, H, K, T, D, dtype=torch.float32, requires_grad=True):
    """Random q, k and v in the memory layout that Attention makes: the heads of a token are contiguous."""
    return [torch.randn(B, T, heads, D).to(dtype).transpose(1, 2).requires_grad_(requires_grad)
            for heads in (H, K, K)]


def test_output_and_gradients_equal_an_explicit_mask_on_60_random_shapes():
    torch.manual_seed(0)
    for B, H, K, T, D, W in random_shapes(60):
        errors = relative_errors(*make_qkv(B, H, K, T, D), W)
        assert max(errors) < 2e-5, (B, H, K, T, D, W, errors)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision_equals_an_explicit_mask_in_float64(dtype, tolerance):
    torch.manual_seed(0)
    for B, H, K, T, D, W in random_shapes(12):
        assert max(relative_errors(*make_qkv(B, H, K, T, D, dtype), W)) < tolerance, (B, H, K, T, D, W)


def test_masked_attention_and_gradients_equal_an_explicit_mask():
    torch.manual_seed(0)
    for B, H, K, T, D, W in random_shapes(12):
        assert max(relative_errors(*make_qkv(B, H, K, T, D), W, llava.masked_attention)) < 2e-5


def test_an_expanded_output_gradient_is_accepted():
    q, k, v = make_qkv(2, 4, 2, 23, 8)
    y = llava.causal_attention(q, k, v, 5)
    expanded = torch.ones(()).expand_as(y)   # all elements are one number in memory
    gradients = torch.autograd.grad(y, (q, k, v), expanded, retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(y, (q, k, v), torch.ones_like(y)))


def test_inference_mode_checkpointing_and_compile_give_equal_results():
    torch.manual_seed(0)
    q, k, v = make_qkv(2, 4, 2, 23, 8)
    y = llava.causal_attention(q, k, v, 5)
    gradients = torch.autograd.grad(y.square().sum(), (q, k, v))
    with torch.inference_mode():
        torch.testing.assert_close(llava.causal_attention(q, k, v, 5), y)
    compiled_attention = torch.compile(llava.causal_attention, backend="aot_eager")
    checkpointed = checkpoint(llava.causal_attention, q, k, v, 5, use_reentrant=False)
    for result in (checkpointed, compiled_attention(q, k, v, 5)):
        torch.testing.assert_close(result, y)
        torch.testing.assert_close(torch.autograd.grad(result.square().sum(), (q, k, v)), gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_meta_tensors_get_the_shapes_of_real_tensors(dtype):
    q, k, v = (x.detach().to("meta", dtype).requires_grad_() for x in make_qkv(2, 4, 2, 23, 8))
    y = llava.causal_attention(q, k, v, 5)
    y.backward(torch.empty_like(y))
    assert [y.shape, k.grad.shape, v.grad.shape] == [q.grad.shape, k.shape, v.shape]


# ---------------------------------------------------------------------------------------------
# Kernels


FLASH = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
         "_scaled_dot_product_flash_attention_backward",
         "_scaled_dot_product_flash_attention_for_cpu_backward",
         "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward")
MAY_USE_SOFTMAX = {"sample", "cls_attention", "cross_entropy"}            # names of functions
VISION = VisionConfig(32, 48, 2, 2, image_size=28, patch_size=14)         # 4 patches, 5 tokens
TEXT = TextConfig(vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
                  num_attention_heads=8, num_key_value_heads=2, head_dim=8)
IMAGE_ID = 96


class Recorder(TorchDispatchMode):
    """Records every operator as (name, arguments, shapes of its results). Without gradients SDPA is
    one operator; it is replaced by the operators that it calls, so that its kernel is recorded."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten.scaled_dot_product_attention.default:
            with self:
                return function.decompose(*args, **kwargs)
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if not ("softmax" in name and MAY_USE_SOFTMAX & callers()):
            results = result if isinstance(result, (tuple, list)) else [result]
            shapes = [tuple(x.shape) for x in results if isinstance(x, torch.Tensor)]
            self.calls.append((name, args, kwargs, shapes))
        return result


def callers() -> set[str]:
    """The names of all functions that are running."""
    names, frame = set(), sys._getframe()
    while frame:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


def check_calls(calls, lengths, masked=False) -> None:
    """Raise AssertionError if recorded attention is not the flash kernel alone.

    lengths: the numbers of tokens that a row or block has, chosen so that no other dimension equals one of
    them; masked: the calls are a decode step, which needs a mask."""
    problems, kernels = [], 0
    for name, args, kwargs, shapes in calls:
        if "attention" in name:
            kernels += 1
            q, k = args[1:3] if "backward" in name else args[:2]
            has_mask = kwargs.get("attn_mask") is not None or any(
                isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args)
            if has_mask and not masked:
                problems.append(f"{name} has a mask")
            if name not in FLASH and not masked:
                problems.append(f"{name} is not the flash kernel")
            if k.shape[1] != 2:
                problems.append(f"{name} has {k.shape[1]} key heads, not 2")
        elif "softmax" in name and name != "_log_softmax_backward_data":  # the backward of the loss
            problems.append("a softmax")
        elif any(len(s) >= 2 and s[-1] in lengths and s[-2] in lengths for s in shapes):
            problems.append(f"{name} makes a matrix of scores or a mask")
    assert kernels > 0, "no attention was recorded"
    assert not problems, "; ".join(sorted(set(problems)))


def make_model(window, device="cpu", dtype=torch.float32) -> Llava:
    torch.manual_seed(0)
    config = LlavaConfig(VISION, llava.replace(TEXT, sliding_window=window), image_token_id=IMAGE_ID)
    return Llava(config).to(device, dtype)


def make_inputs(tokens, rows=2) -> dict:
    """Inputs of rows that have `tokens` tokens after splicing: 4 of an image, the others of text."""
    ids = torch.randint(3, 90, (rows, tokens - 3), generator=torch.Generator().manual_seed(0))
    ids[:, 1] = IMAGE_ID
    images = [torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(i)) for i in range(rows)]
    return {"input_ids": ids, "images": images, "image_sizes": [(28, 28)] * rows}


def check_kernels(window, device, dtype) -> None:
    """Record training, prefill and a decode step; raise AssertionError for a forbidden operator."""
    T, W = 37, window or 37
    lengths = {T, T + 1, W, W - 1, 2 * W, -(-T // W) * W} - {0, 1, 2}
    model, inputs = make_model(window, device, dtype), make_inputs(T)
    with Recorder() as training:
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_ID, llava.IGNORE)
        model(**inputs, labels=labels).backward()
    check_calls(training.calls, lengths)
    tokens = model.eval().generate_tokens(**inputs, max_new_tokens=3, temperature=0.7, top_p=0.9)
    with Recorder() as prefill:
        next(tokens)
    check_calls(prefill.calls, lengths)
    with Recorder() as decode_step:
        next(tokens)
    check_calls(decode_step.calls, lengths, masked=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 11, 1])
def test_kernels_of_training_prefill_and_decode_step(window, dtype):
    check_kernels(window, "cpu", dtype)


def repeated_heads(q, k, v, window):
    k, v = (x.repeat_interleave(4, 1) for x in (k, v))
    return llava.SlidingWindow.apply(q, k, v, window)


def score_matrix(q, k, v, window):
    k, v = (x.repeat_interleave(4, 1) for x in (k, v))
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("replacement, message", [
    (band_attention, "has a mask"), (repeated_heads, "8 key heads"), (score_matrix, "a softmax"),
    (score_matrix, "matrix of scores"), (llava.masked_attention, "has a mask")])
def test_the_check_finds_a_mask_a_score_matrix_and_repeated_heads(monkeypatch, replacement, message):
    monkeypatch.setattr(llava, "causal_attention", replacement)
    with pytest.raises(AssertionError, match=message):
        check_kernels(11, "cpu", torch.float32)


@pytest.mark.parametrize("capability, masked", [((7, 5), True), ((8, 0), False)])
def test_gpus_before_ampere_use_masked_attention_past_the_window(capability, masked, monkeypatch):
    """They have no flash kernel. `q` replaces a tensor on CUDA."""
    calls, cuda = [], SimpleNamespace(type="cuda")
    q = SimpleNamespace(shape=(1, 2, 9, 8), dtype=torch.float16, device=cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(llava, "masked_attention", lambda *_: calls.append("mask"))
    monkeypatch.setattr(llava.SlidingWindow, "apply", lambda *_: calls.append("flash"))
    llava.causal_attention(q, q, q, 4)
    assert calls == (["mask"] if masked else ["flash"])
