"""Tests of weights in 8 and 4 bits. The reference is always a linear layer of the dequantized weights."""

import argparse
import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import llava
from llava import Llava, LlavaConfig, QuantizedLinear, UserError
from tests.layouts import MISTRAL, backbones, llava_hf

torch.set_num_threads(1)
TEXT = MISTRAL | {"hidden_size": 64, "intermediate_size": 192, "head_dim": 32, "vocab_size": 96}
CASES = [(8, torch.float32, 1e-5), (8, torch.bfloat16, 1e-2), (4, torch.float32, 1e-5),
         (4, torch.bfloat16, 1e-2)]
each_case = pytest.mark.parametrize("bits, dtype, tolerance", CASES)
needs_int4_kernel = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
                                       reason="torch has no 4-bit kernel for this processor")
PACKED_KERNELS = ("aten::_weight_int8pack_mm", "aten::_weight_int4pack_mm_for_cpu")


def dequantize(layer: QuantizedLinear) -> torch.Tensor:
    """The weight [O, I] in float32, element by element as the CPU format is defined."""
    if layer.bits == 8:
        return layer.q.float() * layer.scale.float()[:, None]
    height, half = layer.out_features // len(layer.q), layer.q.shape[2]
    rows, columns = torch.arange(layer.out_features)[:, None], torch.arange(layer.in_features)
    byte = layer.q[rows // height, columns, rows % half].int()
    q = torch.where(rows % height < half, byte & 15, byte >> 4)
    scale, middle = layer.scale.float()[columns // 32, rows].unbind(-1)   # [O, I] each
    return (q - 8) * scale + middle


def dequantize_model(model: nn.Module) -> nn.Module:
    """A copy of the model with ordinary linear layers of the dequantized weights, in float32."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight.data = dequantize(layer)
            model.set_submodule(name, linear)
    return model.float()


def make_layer(bits: int, rows: int = 192) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    layer = QuantizedLinear(torch.randn(rows, 256, generator=generator) + 0.1, bits)
    layer.block_rows = 128                   # two blocks, the second one shorter
    return layer


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    y, reference = y.detach().float(), reference.detach().float()
    return float((y - reference).norm() / reference.norm())


class Recorder(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **kwargs or {})


# ---------------------------------------------------------------------------------------------
# The layer


@each_case
@pytest.mark.parametrize("shape", [(1, 256), (2, 8, 256), (17, 256), (3, 50, 256), (0, 256)])
def test_layer_output_equals_that_of_the_dequantized_weight(bits, dtype, tolerance, shape):
    layer = make_layer(bits)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 192)
    if x.numel():
        assert relative_error(y, x.float() @ dequantize(layer).T) < tolerance


@pytest.mark.parametrize("bits", [8, 4])
def test_bf16_blocks_with_avx512_equal_the_dequantized_weight(bits, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    layer, x = make_layer(bits), torch.randn(40, 256).bfloat16().requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert relative_error(y, x.float() @ dequantize(layer).T) < 1e-2
    assert relative_error(x.grad[0], dequantize(layer).sum(0)) < 1e-2


@pytest.mark.parametrize("rows, columns", [(96, 40), (33, 33)])
def test_8_bit_layers_of_any_width_equal_the_dequantized_weight(rows, columns):
    """torch's kernel reads beyond the weight unless the width is a multiple of 16."""
    layer, x = QuantizedLinear(torch.randn(rows, columns), 8), torch.randn(4, columns).bfloat16()
    assert relative_error(layer(x), x.float() @ dequantize(layer).T) < 3e-2


@each_case
def test_non_contiguous_input_gives_the_right_output(bits, dtype, tolerance):
    layer, x = make_layer(bits), torch.randn(3, 5, 256).to(dtype)
    assert relative_error(layer(x[:, 2:3]), x[:, 2:3].float() @ dequantize(layer).T) < tolerance


@each_case
def test_blocks_without_a_kernel_equal_the_dequantized_weight(bits, dtype, tolerance, monkeypatch):
    reference = make_layer(bits)
    monkeypatch.setattr(llava, "kernel_width", lambda: None)
    layer, x = make_layer(bits), torch.randn(4, 256).to(dtype)
    layer.kernel_tokens = 0                  # 8 bits have a kernel on every CPU
    with Recorder() as recorder:
        y = layer(x)
    assert not set(PACKED_KERNELS) & set(recorder.names)
    assert relative_error(dequantize(layer), dequantize(reference)) == 0
    assert relative_error(y, x.float() @ dequantize(reference).T) < tolerance


@each_case
def test_input_gradients_are_right_and_no_weight_is_saved_for_backward(bits, dtype, tolerance):
    layer, saved_sizes = make_layer(bits), []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved_sizes.append(tensor.numel())
        return tensor

    x = torch.randn(2, 3, 256).to(dtype).requires_grad_()
    output_gradient = torch.randn(2, 3, 192).to(dtype)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        y = layer(x)
    y.backward(output_gradient)
    assert relative_error(x.grad, output_gradient.float() @ dequantize(layer)) < tolerance
    assert sum(saved_sizes) < 192 * 256 / 8, "only inputs are saved for backward"
    assert not list(layer.parameters()) and not layer.state_dict()


def test_bf16_layer_avoids_packed_kernels_where_a_gradient_is_needed():
    """The packed kernels have no backward."""
    x = torch.randn(2, 256, dtype=torch.bfloat16, requires_grad=True)
    assert make_layer(4)(x).requires_grad


@needs_int4_kernel
def test_pack_int4_equals_torchs_packing():
    width = llava.kernel_width()
    q = torch.randint(0, 16, (192, 96), generator=torch.Generator().manual_seed(0))
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    assert torch.equal(llava.pack_int4(q.byte().T, width).flatten(), theirs.flatten())


def pack_tinygemm(pairs: torch.Tensor) -> torch.Tensor:
    """What matrix_to_m16n8k16_Bint4_layout<8> of int4mm.cu packs, computed thread by thread: uint8 [n, k / 2]
    with the even columns in the high four bits -> int32 [n / 8, k / 128, 32, 4]."""
    n, half_k = pairs.shape
    packed = torch.zeros(n // 8, half_k // 64, 32, 4, dtype=torch.int64)
    for tile, outer, lane, inner in torch.cartesian_prod(*map(torch.arange, packed.shape)).tolist():
        base = (8 * outer + 2 * inner) * 8
        v = [int(pairs[8 * tile + lane // 4, base + lane % 4 + step]) for step in (0, 4, 8, 12)]
        bits = [byte >> 4 for byte in v] + [byte & 15 for byte in v]
        packed[tile, outer, lane, inner] = sum(b << 4 * i for i, b in enumerate(bits))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def test_unpack_tinygemm_inverts_an_emulated_cuda_packing_kernel():
    q = torch.randint(0, 16, (16, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(llava.unpack_tinygemm(pack_tinygemm(q[:, ::2] << 4 | q[:, 1::2])), q)


def test_blocks_in_the_cuda_layout_equal_those_in_the_cpu_layout(monkeypatch):
    reference, layer = make_layer(4, 128), make_layer(4, 128)
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda pairs, _: pack_tinygemm(pairs),
                        raising=False)
    layer.tinygemm = True
    w = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)) + 0.1
    layer.q, layer.scale = layer.quantize(w)
    for rows in (128, 64):
        layer.block_rows = reference.block_rows = rows
        assert torch.equal(layer.block(0, torch.float32), reference.block(0, torch.float32))


def test_least_squares_lowers_the_error_of_int4(monkeypatch):
    w, errors = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), []
    for fits in (0, 2, 5):
        monkeypatch.setattr(llava, "FITS", fits)
        errors.append(relative_error(dequantize(QuantizedLinear(w, 4)), w))
    assert errors[0] > 1.04 * errors[1] > 1.04 * errors[2]
    assert errors[0] < 0.09


@pytest.mark.parametrize("bits", [8, 4])
def test_constant_weights_and_zeros_are_preserved(bits):
    w = torch.zeros(64, 64)
    w[:32] = 0.5
    assert relative_error(dequantize(QuantizedLinear(w, bits)), w) < 1e-2
    assert dequantize(QuantizedLinear(torch.zeros(64, 64), bits)).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------
# The model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return llava_hf("old", False, TEXT)(tmp_path_factory.mktemp("model")).source["path_or_repo_id"]


def make_inputs(model: Llava, length: int = 30) -> dict:
    """Two rows of `length` random ids, the second id of each an image."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 80, (2, length), generator=generator)
    ids[:, 1] = model.config.image_token_id
    return {"input_ids": ids, "images": list(torch.randn(2, 1, 3, 28, 28, generator=generator)),
            "image_sizes": [(28, 28)] * 2}


@pytest.mark.parametrize("bits, dtype, tolerance", CASES)
def test_quantized_model_equals_the_dequantized_model(model_folder, bits, dtype, tolerance):
    model = Llava.from_pretrained(model_folder, dtype=dtype, quantize=f"int{bits}").eval()
    original = Llava.from_pretrained(model_folder, dtype=dtype)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(layers) == 2 * 7 + 1
    assert {layer.bits for name, layer in layers.items() if "lm_head" not in name} == {bits}
    assert layers["language_model.lm_head"].bits == 8
    others = dict(original.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, others.pop(name)) and p.dtype == dtype
    assert {name.removesuffix(".weight") for name in others} == set(layers)
    reference = dequantize_model(model)
    if dtype == torch.bfloat16:
        tolerance *= 2                       # rounding errors of several layers add up
    for length in (30, 2):
        inputs = make_inputs(model, length)
        with torch.inference_mode():
            assert relative_error(model(**inputs), reference(**inputs)) < tolerance
    if dtype == torch.float32:
        inputs = make_inputs(model)
        answers = model.generate_batch(**inputs, max_new_tokens=8)
        assert answers == reference.generate_batch(**inputs, max_new_tokens=8)


@needs_int4_kernel
@pytest.mark.parametrize("quantize, kernels", [("int8", PACKED_KERNELS[:1]), ("int4", PACKED_KERNELS)])
def test_decode_step_calls_packed_kernels_in_bf16_but_not_in_float32(model_folder, quantize, kernels):
    for dtype in (torch.bfloat16, torch.float32):
        model = Llava.from_pretrained(model_folder, dtype=dtype, quantize=quantize).eval()
        tokens = model.generate_tokens(**make_inputs(model), max_new_tokens=3)
        next(tokens)
        with Recorder() as recorder:
            next(tokens)
        products = [name for name in recorder.names if name in ("aten::mm", "aten::matmul", "aten::linear")]
        used = {name for name in recorder.names if name in PACKED_KERNELS}
        if dtype == torch.bfloat16:
            assert used == set(kernels) and not products
            assert sum(name in PACKED_KERNELS for name in recorder.names) == 2 * 7 + 1
        else:
            assert not used and products


def test_trace_shows_bits_bytes_and_flops_of_quantized_layers(model_folder, capsys):
    flops = {}
    for quantize in ("none", "int4"):
        model = Llava.from_pretrained(model_folder, quantize=quantize).eval()
        inputs = make_inputs(model, 2)       # short enough for the packed kernels
        llava.print_trace(model, {"input_ids": inputs["input_ids"][:1], "images": inputs["images"][:1],
                                  "image_sizes": [(28, 28)]})
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        flops[quantize] = [row[-4] for row in rows if row and row[0].startswith("language_model.layers")]
    layer = model.language_model.layers[0]
    weights, norms = 64 * (128 + 64 + 64 + 128) + 3 * 64 * 192, 2 * 64
    assert llava.count_weights(layer) == (weights + norms, weights // 2 + weights // 8 + 2 * norms)
    row = next(row for row in rows if row and row[0] == "language_model.layers.0")
    assert row[-5] == f"{weights + norms:,}" and row[-2:] == ["5.0", "0.0"]
    assert flops["int4"] == flops["none"] and len(flops["none"]) == 4


def test_quantized_weights_are_not_saved_but_trained_parameters_are(model_folder, tmp_path):
    model = Llava.from_pretrained(model_folder, quantize="int4").requires_grad_(False)
    with pytest.raises(UserError, match="8 or 4 bits are not saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.projector.requires_grad_(True)
    model.save_pretrained(tmp_path / "run", whole=False)
    reopened = Llava.from_pretrained(tmp_path / "run")
    assert torch.equal(reopened.projector[0].weight, model.projector[0].weight)


def test_error_for_indivisible_sizes_names_layer_and_remedy(tmp_path):
    case = llava_hf("old", False, TEXT | {"intermediate_size": 160})(tmp_path)
    with pytest.raises(UserError, match=r"layers.0.mlp.gate_proj.weight is \[160, 64\].*--quantize int8"):
        Llava.from_pretrained(**case.source, quantize="int4")
    Llava.from_pretrained(**case.source, quantize="int8")


def test_error_for_an_unsupported_dtype_names_layers_and_remedy(model_folder):
    with pytest.raises(UserError, match="layers of language_model in int4 work in bfloat16.*--dtype"):
        Llava.from_pretrained(model_folder, quantize="int4", dtype=torch.float16)


def test_unknown_number_of_bits_is_an_error(model_folder):
    with pytest.raises(UserError, match="none, int8 or int4"):
        Llava.from_pretrained(model_folder, quantize="int2")


@pytest.mark.parametrize("flags, dtype", [([], "bfloat16"), (["--dtype", "float32"], "float32")])
def test_default_dtype_with_quantize_is_bfloat16(model_folder, flags, dtype, monkeypatch):
    arguments = {}

    def open_model(_, **kwargs) -> nn.Module:
        arguments.update(kwargs)
        return nn.Linear(1, 1)

    monkeypatch.setattr(llava.Processor, "from_pretrained", lambda *_: None)
    monkeypatch.setattr(Llava, "from_pretrained", open_model)
    monkeypatch.setattr(nn.Linear, "config", LlavaConfig(), raising=False)
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    llava.add_model_flags(parser)
    flags = ["--model", model_folder, "--quantize", "int4", "--device", "cpu", *flags]
    llava.load_model(parser.parse_args(flags))
    assert arguments["quantize"] == "int4" and arguments["dtype"] == getattr(torch, dtype)


# ---------------------------------------------------------------------------------------------
# Tied embeddings


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_missing_lm_head_is_a_copy_of_tied_embeddings(tmp_path, quantize):
    text = TEXT | {"tie_word_embeddings": True}
    case = backbones(text)(tmp_path)
    drop_lm_head(tmp_path / "text" / "model.safetensors")
    lm = Llava.from_pretrained(**case.source, dtype=torch.float32, quantize=quantize).language_model
    head = dequantize(lm.lm_head) if quantize == "int8" else lm.lm_head.weight
    assert relative_error(head, lm.embed_tokens.weight) < (1e-2 if quantize == "int8" else 1e-9)
    if quantize == "none":
        assert head.data_ptr() != lm.embed_tokens.weight.data_ptr(), "each can be trained separately"


def test_missing_lm_head_without_tied_embeddings_is_an_error(tmp_path):
    case = backbones(TEXT)(tmp_path)
    drop_lm_head(tmp_path / "text" / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight is missing"):
        Llava.from_pretrained(**case.source)


def drop_lm_head(file) -> None:
    tensors = llava.open_file(file)
    llava.save_file({name: t.clone() for name, t in tensors.items() if name != "lm_head.weight"}, file)
