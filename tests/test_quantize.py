"""Weights in 8 and 4 bits. The reference of every path is a layer with explicitly dequantized weights."""

import argparse
import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import llava
from llava import Llava, QuantizedLinear, UserError
from tests.layouts import MISTRAL, backbones, hub

torch.set_num_threads(1)
TEXT = MISTRAL | {"hidden_size": 64, "intermediate_size": 192, "head_dim": 32, "vocab_size": 96}
CASES = [(8, torch.float32, 1e-5), (8, torch.bfloat16, 1e-2), (4, torch.float32, 1e-5),
         (4, torch.bfloat16, 1e-2)]
each_case = pytest.mark.parametrize("bits, dtype, tolerance", CASES)
has_kernel = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
                                reason="torch has no 4-bit kernel for this processor")
PACKED = ("aten::_weight_int8pack_mm", "aten::_weight_int4pack_mm_for_cpu")


def dequantize(layer: QuantizedLinear) -> torch.Tensor:
    """W [O, I] in float32, element by element from the definition of the format on a CPU."""
    if layer.bits == 8:
        return layer.q.float() * layer.scale.float()[:, None]
    height, half = layer.out_features // len(layer.q), layer.q.shape[2]
    rows, columns = torch.arange(layer.out_features)[:, None], torch.arange(layer.in_features)
    byte = layer.q[rows // height, columns, rows % half].int()
    q = torch.where(rows % height < half, byte & 15, byte >> 4)
    scale, middle = layer.scale.float()[columns // 32, rows].unbind(-1)   # [O, I] each
    return (q - 8) * scale + middle


def explicit(model: nn.Module) -> nn.Module:
    """The same model with ordinary linear layers of the dequantized weights, in float32."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight.data = dequantize(layer)
            model.set_submodule(name, linear)
    return model.float()


def make_layer(bits: int, rows: int = 192, columns: int = 256, seed: int = 0) -> QuantizedLinear:
    noise = torch.Generator().manual_seed(seed)
    layer = QuantizedLinear(torch.randn(rows, columns, generator=noise) + 0.1, bits)
    layer.block_rows = 128                         # two blocks, the second one shorter
    return layer


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.detach().float() - reference.detach().float()).norm() / reference.detach().float().norm())


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

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
def test_a_layer_equals_its_explicitly_dequantized_weight(bits, dtype, tolerance, shape):
    layer = make_layer(bits)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 192)
    if x.numel():
        assert error(y, x.float() @ dequantize(layer).T) < tolerance


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_in_bf16_equal_the_explicit_weight_where_avx512_makes_them_fast(bits, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    layer, x = make_layer(bits), torch.randn(40, 256).bfloat16().requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert error(y, x.float() @ dequantize(layer).T) < 1e-2
    assert error(x.grad[0], dequantize(layer).sum(0)) < 1e-2


@each_case
def test_a_row_of_a_batch_that_is_not_contiguous_is_read_rightly(bits, dtype, tolerance):
    layer, x = make_layer(bits), torch.randn(3, 5, 256).to(dtype)
    assert error(layer(x[:, 2:3]), x[:, 2:3].float() @ dequantize(layer).T) < tolerance


@each_case
def test_without_a_kernel_blocks_give_the_same_numbers(bits, dtype, tolerance, monkeypatch):
    reference = make_layer(bits)
    monkeypatch.setattr(llava, "kernel_width", lambda: None)
    layer, x = make_layer(bits), torch.randn(4, 256).to(dtype)
    layer.kernel_tokens = 0                            # 8 bits have a kernel on every CPU
    with Recorder() as recorder:
        y = layer(x)
    assert not set(PACKED) & set(recorder.names)
    assert error(dequantize(layer), dequantize(reference)) == 0
    assert error(y, x.float() @ dequantize(reference).T) < tolerance


@each_case
def test_gradients_of_inputs_equal_the_explicit_ones_and_no_weight_is_kept(bits, dtype, tolerance):
    layer, kept = make_layer(bits), []
    x = torch.randn(2, 3, 256).to(dtype).requires_grad_()
    slope = torch.randn(2, 3, 192).to(dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    y.backward(slope)
    assert error(x.grad, slope.float() @ dequantize(layer)) < tolerance
    assert sum(kept) < 192 * 256 / 8, "only inputs are kept for backward"
    assert not list(layer.parameters()) and not layer.state_dict()


def test_a_learning_layer_in_bf16_does_not_call_a_kernel_without_gradient():
    x = torch.randn(2, 256, dtype=torch.bfloat16, requires_grad=True)
    assert make_layer(4)(x).requires_grad


@has_kernel
def test_int4_is_packed_as_torch_packs_it():
    width = llava.kernel_width()
    q = torch.randint(0, 16, (192, 96), generator=torch.Generator().manual_seed(0))
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    assert torch.equal(llava.pack_int4(q.byte().T, width).flatten(), theirs.flatten())


def pack_tinygemm(pairs: torch.Tensor) -> torch.Tensor:
    """matrix_to_m16n8k16_Bint4_layout<8> of int4mm.cu, thread by thread: uint8 [n, k / 2] whose high
    halves are the even columns -> int32 [n / 8, k / 128, 32, 4]."""
    n, half_k = pairs.shape
    packed = torch.zeros(n // 8, half_k // 64, 32, 4, dtype=torch.int64)
    for tile, outer, lane, inner in torch.cartesian_prod(*map(torch.arange, packed.shape)).tolist():
        base = (8 * outer + 2 * inner) * 8
        v = [int(pairs[8 * tile + lane // 4, base + lane % 4 + step]) for step in (0, 4, 8, 12)]
        bits = [byte >> 4 for byte in v] + [byte & 15 for byte in v]
        packed[tile, outer, lane, inner] = sum(b << 4 * i for i, b in enumerate(bits))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def test_the_cuda_layout_is_read_as_an_emulation_of_its_packing_kernel_writes_it():
    q = torch.randint(0, 16, (16, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(llava.unpack_tinygemm(pack_tinygemm(q[:, ::2] << 4 | q[:, 1::2])), q)


def test_a_layer_in_the_cuda_layout_dequantizes_to_the_same_blocks(monkeypatch):
    reference, packer = make_layer(4, 128), "_convert_weight_to_int4pack"
    layer = make_layer(4, 128)
    monkeypatch.setattr(torch.ops.aten, packer, lambda pairs, _: pack_tinygemm(pairs), raising=False)
    layer.tinygemm = True
    w = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)) + 0.1
    layer.q, layer.scale = layer.quantize(w)
    for start in (0, 64):
        layer.block_rows = reference.block_rows = 128 - start
        assert torch.equal(layer.block(0, torch.float32), reference.block(0, torch.float32))


def test_least_squares_lowers_the_error_of_int4(monkeypatch):
    w, errors = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), []
    for fits in (0, 2, 5):
        monkeypatch.setattr(llava, "FITS", fits)
        errors.append(error(dequantize(QuantizedLinear(w, 4)), w))
    assert errors[0] > 1.04 * errors[1] > 1.04 * errors[2]
    assert errors[0] < 0.09


@pytest.mark.parametrize("bits", [8, 4])
def test_equal_weights_and_zeros_are_kept(bits):
    w = torch.zeros(64, 64)
    w[:32] = 0.5
    assert error(dequantize(QuantizedLinear(w, bits)), w) < 1e-2
    assert dequantize(QuantizedLinear(torch.zeros(64, 64), bits)).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------
# The model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return hub("old", False, TEXT)(tmp_path_factory.mktemp("model")).source["path_or_repo_id"]


def prompt(model: Llava, words: int = 30) -> dict:
    noise = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 80, (2, words), generator=noise)
    ids[:, 1] = model.config.image_token_id
    return {"input_ids": ids, "images": list(torch.randn(2, 1, 3, 28, 28, generator=noise)),
            "image_sizes": [(28, 28)] * 2}


@pytest.mark.parametrize("bits, dtype, tolerance", CASES)
def test_a_quantized_model_equals_its_explicitly_dequantized_one(source, bits, dtype, tolerance):
    model = Llava.from_pretrained(source, dtype=dtype, quantize=f"int{bits}").eval()
    whole = Llava.from_pretrained(source, dtype=dtype)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(layers) == 2 * 7 + 1
    assert {layer.bits for name, layer in layers.items() if "lm_head" not in name} == {bits}
    assert layers["language_model.lm_head"].bits == 8
    others = dict(whole.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, others.pop(name)) and p.dtype == dtype
    assert {name.removesuffix(".weight") for name in others} == set(layers)
    reference = explicit(model)
    for words in (30, 2):
        inputs = prompt(model, words)
        with torch.inference_mode():
            y, z = model(**inputs), reference(**inputs)
        assert error(y, z) < tolerance * (1 if dtype == torch.float32 else 2), "layers add up their roundings"
    if dtype == torch.float32:
        inputs = prompt(model)
        rows = model.generate_batch(**inputs, max_new_tokens=8)
        assert rows == reference.generate_batch(**inputs, max_new_tokens=8)


@has_kernel
@pytest.mark.parametrize("quantize, kernels", [("int8", PACKED[:1]), ("int4", PACKED)])
def test_decoding_in_bf16_reads_packed_weights_only_and_float32_never_does(source, quantize, kernels):
    for dtype in (torch.bfloat16, torch.float32):
        model = Llava.from_pretrained(source, dtype=dtype, quantize=quantize).eval()
        tokens = model.generate_tokens(**prompt(model), max_new_tokens=3)
        next(tokens)
        with Recorder() as recorder:
            next(tokens)
        products = [name for name in recorder.names if name in ("aten::mm", "aten::matmul", "aten::linear")]
        used = {name for name in recorder.names if name in PACKED}
        if dtype == torch.bfloat16:
            assert used == set(kernels) and not products
            assert sum(name in PACKED for name in recorder.names) == 2 * 7 + 1
        else:
            assert not used and products


def test_the_trace_shows_bits_bytes_and_flops_of_quantized_layers(source, capsys):
    flops = {}
    for quantize in ("none", "int4"):
        model = Llava.from_pretrained(source, quantize=quantize).eval()
        inputs = prompt(model, 2) | {"input_ids": prompt(model, 2)["input_ids"][:1]}    # few enough for kernels
        llava.print_trace(model, inputs | {"images": inputs["images"][:1], "image_sizes": [(28, 28)]})
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        flops[quantize] = [row[-4] for row in rows if row and row[0].startswith("language_model.layers")]
    layer = model.language_model.layers[0]
    weights, norms = 64 * (128 + 64 + 64 + 128) + 3 * 64 * 192, 2 * 64
    assert llava.count_weights(layer) == (weights + norms, weights // 2 + weights // 8 + 2 * norms)
    row = next(row for row in rows if row and row[0] == "language_model.layers.0")
    assert row[-5] == f"{weights + norms:,}" and row[-2:] == ["5.0", "0.0"]
    assert flops["int4"] == flops["none"] and len(flops["none"]) == 4


def test_a_quantized_model_is_not_saved_but_what_was_trained_is(source, tmp_path):
    model = Llava.from_pretrained(source, quantize="int4").requires_grad_(False)
    with pytest.raises(UserError, match="8 or 4 bits are not saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.projector.requires_grad_(True)
    model.save_pretrained(tmp_path / "run", whole=False)
    opened = Llava.from_pretrained(tmp_path / "run")
    assert torch.equal(opened.projector[0].weight, model.projector[0].weight)


def test_sizes_that_the_groups_do_not_divide_name_the_layer_and_the_remedy(tmp_path):
    case = hub("old", False, TEXT | {"intermediate_size": 160})(tmp_path)
    with pytest.raises(UserError, match=r"layers.0.mlp.gate_proj.weight is \[160, 64\].*--quantize int8"):
        Llava.from_pretrained(**case.source, quantize="int4")
    Llava.from_pretrained(**case.source, quantize="int8")


def test_a_type_that_cannot_be_served_names_the_layers_and_the_remedy(source):
    with pytest.raises(UserError, match="layers of language_model in int4 work in bfloat16.*--dtype"):
        Llava.from_pretrained(source, quantize="int4", dtype=torch.float16)


def test_an_unknown_number_of_bits_is_refused(source):
    with pytest.raises(UserError, match="none, int8 or int4"):
        Llava.from_pretrained(source, quantize="int2")


@pytest.mark.parametrize("flags, dtype", [([], "bfloat16"), (["--dtype", "float32"], "float32")])
def test_the_default_type_with_quantize_is_bfloat16(source, flags, dtype, monkeypatch):
    opened = {}
    monkeypatch.setattr(llava.Processor, "from_pretrained", lambda *_: None)
    monkeypatch.setattr(Llava, "from_pretrained", lambda *_, **how: opened.update(how) or nn.Linear(1, 1))
    monkeypatch.setattr(nn.Linear, "config", None, raising=False)
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    llava.add_model_flags(parser)
    flags = ["--model", source, "--quantize", "int4", "--device", "cpu", *flags]
    llava.load_model(parser.parse_args(flags))
    assert opened["quantize"] == "int4" and opened["dtype"] == getattr(torch, dtype)


# ---------------------------------------------------------------------------------------------
# Tied embeddings


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_missing_lm_head_is_the_embedding_where_config_ties_them(tmp_path, quantize):
    text = TEXT | {"tie_word_embeddings": True}
    case = backbones(text)(tmp_path)
    drop_lm_head(tmp_path / "text" / "model.safetensors")
    decoder = Llava.from_pretrained(**case.source, dtype=torch.float32, quantize=quantize).language_model
    head = dequantize(decoder.lm_head) if quantize == "int8" else decoder.lm_head.weight
    assert error(head, decoder.embed_tokens.weight) < (1e-2 if quantize == "int8" else 1e-9)
    if quantize == "none":
        assert head.data_ptr() != decoder.embed_tokens.weight.data_ptr(), "each may be trained"


def test_without_a_tie_a_missing_lm_head_is_missing(tmp_path):
    case = backbones(TEXT)(tmp_path)
    drop_lm_head(tmp_path / "text" / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight is missing"):
        Llava.from_pretrained(**case.source)


def drop_lm_head(file) -> None:
    tensors = llava.open_file(file)
    llava.save_file({name: t.clone() for name, t in tensors.items() if name != "lm_head.weight"}, file)
