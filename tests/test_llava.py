"""Tests of the model in llava.py: attention, decoding, the input of the language model, AnyRes, PruMerge."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import llava
from llava import Llava, LlavaConfig, Processor, TextConfig, VisionConfig
from tests.golden import SIZES, TILES, build_hf_model, llava_grid, llava_window, to_hf_batch
from tests.layouts import GRIDS, LLAMA, MISTRAL, llava_hf, liuhaotian, write_tokenizer
from tests.test_attention import explicit_attention

torch.set_num_threads(1)
SLIDING = MISTRAL | {"sliding_window": 24}
MODELS = {"window": llava_hf("old", False, SLIDING), "window, AnyRes": llava_hf("old", True, SLIDING),
          "no window": llava_hf("new", False, LLAMA), "no window, AnyRes": llava_hf("new", True, MISTRAL),
          "LLaVA's AnyRes": liuhaotian(tower=True, anyres=True, text=MISTRAL)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: (case, model)}, where the model is loaded from the files of the case."""
    cases = {name: build(tmp_path_factory.mktemp("model")) for name, build in MODELS.items()}
    return {name: (case, Llava.from_pretrained(**case.source, dtype=torch.float32).eval())
            for name, case in cases.items()}


def make_inputs(model: Llava, lengths, image_positions, seed=0) -> dict:
    """Right-padded rows of random ids, with images at the given positions of each row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (len(lengths), max(lengths)), generator=generator)
    for row, positions in zip(ids, image_positions):
        row[list(positions)] = model.config.image_token_id
    count = sum(map(len, image_positions))
    tiles = TILES * 2 if model.config.image_mode == "anyres" else [1] * 8
    images = [torch.randn(n, 3, 28, 28, generator=generator) for n in tiles[:count]]
    return {"input_ids": ids, "images": images, "image_sizes": (SIZES * 2)[:count],
            "attention_mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]}


def split_rows(inputs: dict, image_id: int):
    """Yield the inputs of each row alone, without padding."""
    images, sizes = iter(inputs["images"]), iter(inputs["image_sizes"])
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        count = int((ids[mask] == image_id).sum())
        yield {"input_ids": ids[mask][None], "images": [next(images) for _ in range(count)],
               "image_sizes": [next(sizes) for _ in range(count)]}


# ---------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("T, window", [(1, 1), (5, None), (5, 5), (5, 8), (6, 5), (10, 5), (23, 5), (9, 1)])
def test_window_attention_and_gradients_equal_the_definition(T, window):
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, heads, T, 6, requires_grad=True) for heads in (4, 2, 2))
    y = llava.causal_attention(q, k, v, window)
    expected = explicit_attention(q, k, v, window)
    torch.testing.assert_close(y, expected)
    output_gradient = torch.randn_like(y)
    ours = torch.autograd.grad(y, (q, k, v), output_gradient)
    theirs = torch.autograd.grad(expected, (q, k, v), output_gradient)
    torch.testing.assert_close(ours, theirs)


def test_attention_in_inference_mode_equals_the_definition():
    q, k, v = (torch.randn(2, heads, 23, 8) for heads in (4, 2, 2))
    with torch.inference_mode():
        torch.testing.assert_close(llava.causal_attention(q, k, v, 5), explicit_attention(q, k, v, 5))


@pytest.mark.parametrize("window", [None, 1, 4, 5])
def test_a_token_attends_only_to_itself_and_the_window_before_it(window):
    torch.manual_seed(0)
    config = TextConfig(vocab_size=9, hidden_size=16, intermediate_size=20, num_hidden_layers=1, head_dim=8,
                        num_attention_heads=2, num_key_value_heads=1, sliding_window=window)
    model, x = llava.LanguageModel(config), torch.randn(1, 12, 16, requires_grad=True)
    y = model(x)
    for i in range(12):
        gradient, = torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)
        used = gradient[0].abs().sum(-1) > 0
        assert used.nonzero()[:, 0].tolist() == list(range(max(0, i + 1 - (window or 12)), i + 1))


# ---------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("name, length, image_positions", [
    ("window", 3, [2]), ("window", 9, [8]), ("window", 10, [1]), ("window", 30, [4, 20]),
    ("window, AnyRes", 9, [3]), ("no window", 12, [3, 7]), ("no window, AnyRes", 9, [0])])
def test_48_greedy_tokens_equal_those_of_transformers(name, length, image_positions, models):
    pytest.importorskip("transformers", minversion="5")
    case, model = models[name]
    inputs = make_inputs(model, [length], [image_positions])
    ours = list(model.generate(**next(split_rows(inputs, model.config.image_token_id)), max_new_tokens=48,
                               eos_token_id=None))
    counts = [llava.count_image_tokens(model.config, size) for size in inputs["image_sizes"]]
    inputs["labels"] = inputs["input_ids"]
    hf_inputs = to_hf_batch(inputs, counts, model.config.image_token_id, case.anyres)
    del hf_inputs["labels"]
    theirs = build_hf_model(case).generate(**hf_inputs, max_new_tokens=48, do_sample=False, eos_token_id=None,
                                           pad_token_id=0)
    assert ours == theirs[0, -48:].tolist()
    assert len(set(ours)) > 3                # a repetition of few tokens would prove little


@pytest.mark.parametrize("name", ["window", "no window"])
@pytest.mark.parametrize("length", [1, 23, 24, 25, 60])
def test_decoding_with_the_kv_cache_equals_full_forward_passes(name, length, models):
    _, model = models[name]
    row = next(split_rows(make_inputs(model, [length], [[]], seed=length), -1))
    ids, lm = row["input_ids"], model.language_model
    with torch.no_grad():
        for token in model.generate(ids, max_new_tokens=30, eos_token_id=None):
            assert token == lm.lm_head(lm(lm.embed_tokens(ids)))[0, -1].argmax()
            ids = torch.cat((ids, torch.tensor([[token]])), dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_batch_generation_equals_generation_of_single_rows(name, models):
    _, model = models[name]
    inputs = make_inputs(model, [3, 40, 11, 1, 26], [[], [5, 6], [0], [], [20]])
    answers = model.generate_batch(**inputs, max_new_tokens=30, eos_token_id=None)
    single_answers = [list(model.generate(**row, max_new_tokens=30, eos_token_id=None))
                      for row in split_rows(inputs, model.config.image_token_id)]
    assert answers == single_answers and {len(row) for row in answers} == {30}


@pytest.mark.parametrize("rows, dtype, onednn", [(1, torch.bfloat16, False), (2, torch.bfloat16, True),
                                                 (1, torch.float32, True)])
def test_a_single_bf16_row_on_a_cpu_is_decoded_without_onednn(rows, dtype, onednn, monkeypatch):
    text = TextConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    torch.manual_seed(0)
    model = Llava(LlavaConfig(VisionConfig(32, 48, 2, 2, 28), text, image_token_id=64)).to(dtype).eval()
    ids, lm, enabled = torch.randint(3, 60, (rows, 9)), model.language_model, []
    before, decode_step = torch.backends.mkldnn.enabled, lm.decode_step
    expected = torch.stack(list(model.generate_tokens(ids, max_new_tokens=5)))

    def record_decode_step(*args, **kwargs):
        enabled.append(torch.backends.mkldnn.enabled)
        if len(enabled) == 11:               # the first decode step in pytest.raises
            raise RuntimeError("interrupted")
        return decode_step(*args, **kwargs)

    monkeypatch.setattr(lm, "decode_step", record_decode_step)
    hook = lm.lm_head.register_forward_pre_hook(lambda *_: enabled.append(torch.backends.mkldnn.enabled))
    tokens = []
    for token in model.generate_tokens(ids, max_new_tokens=5):
        assert torch.backends.mkldnn.enabled == before, "oneDNN is off outside of the model"
        tokens.append(token)
    assert torch.equal(torch.stack(tokens), expected) and len(enabled) == 9
    assert set(enabled) == {onednn and before}
    with pytest.raises(RuntimeError):
        list(model.generate_tokens(ids, max_new_tokens=5))
    assert torch.backends.mkldnn.enabled == before
    hook.remove()


def test_each_row_stops_at_its_own_end_of_text_token(models):
    _, model = models["window"]
    inputs = make_inputs(model, [3, 40, 11], [[], [5, 6], [0]])
    answers = model.generate_batch(**inputs, max_new_tokens=20, eos_token_id=None)
    end = answers[0][4]
    expected = [row[:row.index(end)] if end in row else row for row in answers]
    assert model.generate_batch(**inputs, max_new_tokens=20, eos_token_id=end) == expected
    rows = split_rows(inputs, model.config.image_token_id)
    assert [list(model.generate(**row, max_new_tokens=20, eos_token_id=end)) for row in rows] == expected
    assert len(expected[0]) == answers[0].index(end) < 20


def test_top_p_and_temperature_sample_from_the_most_probable_tokens(models):
    _, model = models["no window"]
    row = next(split_rows(make_inputs(model, [7], [[]]), -1))
    with torch.no_grad():
        probabilities = model(**row)[0, -1].div(1.5).softmax(-1)
    order = probabilities.argsort(descending=True)
    nucleus = order[:int((probabilities[order].cumsum(0) < 0.6).sum()) + 1].tolist()
    ids = row["input_ids"].expand(300, -1)

    def sample(**sampling) -> list[int]:
        torch.manual_seed(0)
        rows = model.generate_batch(ids, max_new_tokens=1, eos_token_id=None, **sampling)
        return [token for tokens in rows for token in tokens]

    sampled = sample(temperature=1.5, top_p=0.6)
    assert set(sampled) == set(nucleus) and len(nucleus) > 2
    assert sampled == sample(temperature=1.5, top_p=0.6)        # the same seed
    assert not set(sample(temperature=1.5)) <= set(nucleus)
    assert set(sample(temperature=1.5, top_p=1e-6)) == {order[0].item()}


# ---------------------------------------------------------------------------------------------
# The input of the language model


def test_image_features_replace_the_image_id_at_its_position(models):
    _, model = models["no window"]
    lm, inputs = model.language_model, make_inputs(model, [6, 4], [[1, 4], [3]])
    with torch.no_grad():
        features = model.encode_images(inputs["images"], inputs["image_sizes"])
        assert [tuple(f.shape) for f in features] == [(16, 40)] * 3
        logits = model(**inputs)
        assert logits.shape == (2, 6 - 2 + 2 * 16, 90)          # B, T', V
        text = lm.embed_tokens(inputs["input_ids"].clamp(max=88))
        row = torch.cat((text[0, :1], features[0], text[0, 2:4], features[1], text[0, 5:]))
        torch.testing.assert_close(logits[0], lm.lm_head(lm(row[None]))[0])
        row = torch.cat((text[1, :3], features[2]))
        torch.testing.assert_close(logits[1, :19], lm.lm_head(lm(row[None]))[0])


def test_padding_does_not_change_logits(models):
    _, model = models["window"]
    inputs = make_inputs(model, [31, 9], [[], [2]])
    with torch.no_grad():
        logits = model(**inputs)
        inputs["input_ids"][1, 9:] = 7
        torch.testing.assert_close(model(**inputs)[1, :24], logits[1, :24])
        second_row = list(split_rows(inputs, model.config.image_token_id))[1]
        torch.testing.assert_close(model(**second_row)[0], logits[1, :24])


def test_loss_is_the_mean_over_all_supervised_tokens_of_the_batch(models):
    _, model = models["no window"]
    inputs = make_inputs(model, [9, 5], [[1], []])
    labels = inputs["input_ids"].masked_fill(~inputs["attention_mask"], -100)
    labels[0, :4] = labels[1, 3] = -100
    with torch.no_grad():
        logits, total, count = model(**inputs), 0.0, 0
        for row, shift in ((0, 15), (1, 0)):                    # 16 patches replace one id
            for position in range(1, 9):
                if labels[row, position] != -100:
                    total += F.cross_entropy(logits[row, position + shift - 1], labels[row, position])
                    count += 1
        torch.testing.assert_close(model(**inputs, labels=labels), total / count)
    assert count == 8


def test_features_come_from_the_input_of_the_towers_last_layer(models):
    _, model = models["no window"]
    images = list(torch.randn(2, 1, 3, 28, 28))
    *_, second_last, last = model.vision_tower.layers
    with torch.no_grad():
        states = model.vision_tower(torch.cat(images))
        features = torch.stack(model.encode_images(images, SIZES[:2]))
        torch.testing.assert_close(features, model.projector(states[:, 1:]))
        for p in last.parameters():
            p.mul_(2)
        assert torch.equal(features, torch.stack(model.encode_images(images, SIZES[:2])))
        for p in last.parameters():
            p.div_(2)                        # other tests use the same model
        second_last.mlp["fc2"].bias.add_(1)
        assert not torch.equal(features[0], model.encode_images(images[:1], SIZES[:1])[0])
        second_last.mlp["fc2"].bias.sub_(1)


def test_uint8_pixels_are_normalized_by_the_model(models):
    _, model = models["no window"]
    pixels = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        features, = model.encode_images([pixels], [(28, 28)])
        expected, = model.encode_images([llava.normalize(pixels)], [(28, 28)])
    assert torch.equal(features, expected)


@pytest.mark.parametrize("name", ["no window", "no window, AnyRes"])
def test_count_image_tokens_equals_the_number_of_features(name, models):
    _, model = models[name]
    inputs = make_inputs(model, [5], [[0, 1, 2, 3]])
    counts = [len(f) for f in model.encode_images(inputs["images"], inputs["image_sizes"])]
    assert counts == [llava.count_image_tokens(model.config, size) for size in inputs["image_sizes"]]
    if name == "no window, AnyRes":
        assert len(set(counts)) == 4


def test_an_anyres_image_of_one_tile_ends_with_a_newline(models):
    _, model = models["window, AnyRes"]
    tile = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    whole, newline = model.encode_images([tile], [SIZES[0]])[0].split([model.config.vision.side**2, 1])
    expected = model.projector(model.vision_tower(tile)[0, 1:])
    assert torch.allclose(whole, expected, atol=1e-5) and torch.equal(newline[0], model.image_newline)


@pytest.mark.parametrize("width, height", [(56, 56), (200, 100), (100, 30), (47, 188), (343, 392), (588, 49),
                                           (1, 500)])
def test_anyres_features_are_the_whole_image_then_rows_with_newlines(width, height, models):
    case, model = models["LLaVA's AnyRes"]
    grid = llava_grid(width, height, GRIDS)
    columns = grid[0] // 28
    top, bottom, left, right = llava_window(width, height, grid, 7)
    with torch.no_grad():
        tiles = torch.randn(1 + columns * grid[1] // 28, 3, 28, 28)
        patches = model.projector(model.vision_tower(tiles)[:, 1:])       # [tiles, 16, C]
        features, = model.encode_images([tiles], [(height, width)])
    expected = list(patches[0])
    for row in range(top, bottom):
        for column in range(left, right):
            expected.append(patches[1 + row // 4 * columns + column // 4, row % 4 * 4 + column % 4])
        expected.append(case.tensors["newline"])
    assert torch.equal(features, torch.stack(expected))


@pytest.mark.parametrize("height, width", [(100, 200), (188, 47), (392, 343), (49, 588), (500, 1)])
def test_logits_equal_transformers_where_the_anyres_rules_differ(height, width, models):
    pytest.importorskip("transformers", minversion="5")
    from transformers.image_processing_utils import select_best_resolution
    case, model = models["no window, AnyRes"]
    grid_height, grid_width = select_best_resolution((height, width), GRIDS)
    tiles = torch.randn(1 + grid_height * grid_width // 28**2, 3, 28, 28)
    inputs = make_inputs(model, [5], [[2]]) | {"images": [tiles], "image_sizes": [(height, width)]}
    count = llava.count_image_tokens(model.config, (height, width))
    with_labels = inputs | {"labels": inputs["input_ids"]}
    hf_inputs = to_hf_batch(with_labels, [count], model.config.image_token_id, True)
    with torch.no_grad():
        expected = build_hf_model(case)(**hf_inputs).logits          # raises if the token counts differ
        torch.testing.assert_close(model(**inputs), expected, rtol=2e-5, atol=2e-5)


def test_token_of_another_tokenizer_is_an_error(models):
    _, model = models["no window"]
    with pytest.raises(ValueError, match="the tokenizer is that of another model"):
        model(torch.tensor([[1, model.config.text.vocab_size]]))


def test_number_of_image_ids_must_equal_the_number_of_images(models):
    _, model = models["no window"]
    inputs = make_inputs(model, [6, 4], [[1, 4], [3]])
    for images in (inputs["images"][:2], [*inputs["images"], inputs["images"][0]], []):
        with pytest.raises(ValueError, match="<image>"):
            model(**inputs | {"images": images, "image_sizes": SIZES[:len(images)]})


def test_the_model_accepts_the_output_of_the_processor(tmp_path):
    text = TextConfig(**MISTRAL | {"vocab_size": 400})
    config = LlavaConfig(VisionConfig(24, 44, 3, 3, 28, 7), text, image_token_id=400, image_mode="anyres")
    model, processor = Llava(config).eval(), Processor.from_pretrained(write_tokenizer(tmp_path), config)
    messages = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]
    inputs = processor(messages, [Image.new("RGB", (50, 20))], labels=True)
    assert inputs["image_sizes"] == [(20, 50)] and inputs["images"][0].shape == (3, 3, 28, 28)
    assert model(**inputs).isfinite() and inputs["input_ids"].shape == inputs["labels"].shape
    assert "labels" not in processor(messages, [Image.new("RGB", (50, 20))])
    with pytest.raises(ValueError, match="<image>"):
        processor(messages, [])


# ---------------------------------------------------------------------------------------------
# PruMerge


def prumerge_by_loops(features, attention, keys, plus=False, ratio=None, paper=False):
    """PruMerge's tokens by plain loops, as in the released code. It keeps the outliers, or the share `ratio`,
    in order of decreasing attention; `plus` adds evenly spaced patches, but never the last; with `ratio` it
    may repeat some. A token is a kept patch plus the attention-weighted sum of its 32 most similar patches.
    The last token is the weighted sum of all patches not kept. `paper`: patches in the image's order,
    attention with the sum 1, similarity of keys that are not normalized, a kept patch weighted by its
    attention, like its neighbors, and no last token."""
    P = len(attention)
    a = attention.double().numpy()
    q1, q3 = np.percentile(a, [25, 75])
    m = max(1, sum(a > q3 + 1.5 * (q3 - q1)) if ratio is None else int(P * ratio))
    kept = sorted(range(P), key=lambda p: -a[p])[:m]
    if plus and ratio is None:
        kept += [p for p in range(0, P - 1, max(1, int(int(P / m) / 3))) if p not in kept]
    elif plus:
        kept += range(P // m // 2, P - 1, P // m)
    kept = sorted(kept) if paper else kept
    a = a / a.sum() if paper else a
    keys = keys.double() if paper else keys.double() / keys.double().norm(dim=1, keepdim=True)
    tokens = []
    for p in kept:
        others = sorted((q for q in range(P) if q != p), key=lambda q: -float(keys[p] @ keys[q]))[:32]
        weights = {p: a[p] if paper else 1.0} | {q: a[q] for q in others}
        tokens.append(sum(w * features[q].double() for q, w in weights.items()))
    if not paper:
        rest = [q for q in range(P) if q not in kept]
        zero = torch.zeros(features.shape[1])
        tokens.append(sum((a[q] * features[q].double() for q in rest), zero))
    return torch.stack(tokens).float()


@pytest.mark.parametrize("variant", llava.PRUMERGE.values(), ids=str)
def test_every_prumerge_variant_equals_its_definition_in_loops(variant):
    torch.manual_seed(0)
    attention, keys, features = torch.rand(81) / 10, torch.randn(81, 7), torch.randn(81, 6)
    attention[torch.randperm(81)[:5]] += 1 + torch.rand(5)
    attention = attention / 80
    tokens = llava.prumerge(attention, keys, **variant) @ features
    expected = prumerge_by_loops(features, attention, keys, **variant)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plus", [False, True], ids=["prumerge", "prumerge+"])
@pytest.mark.parametrize("P, outliers", [(64, 5), (100, 1), (100, 33), (40, 0), (32, 2), (5, 0), (2, 0)])
def test_prumerge_equals_its_definition_in_loops(P, outliers, plus):
    torch.manual_seed(P + outliers)
    attention = torch.rand(P) / 10
    attention[torch.randperm(P)[:outliers]] += 1 + torch.rand(outliers)
    attention, keys, features = attention / 80, torch.randn(P, 7), torch.randn(P, 6)
    expected = prumerge_by_loops(features, attention, keys, plus)
    tokens = llava.prumerge(attention, keys, plus) @ features
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


def test_plus_with_many_outliers_keeps_all_patches_but_the_last():
    attention, keys = torch.full((40,), 1e-3), torch.randn(40, 4)
    attention[:9] = 1.0                      # with 11 or more, the third quartile would be 1.0: no outliers
    assert llava.prumerge(attention, keys, True).shape == (40, 40)       # 39 patches and the last token
    assert llava.prumerge(attention, keys, False).shape == (10, 40)


def test_without_outliers_the_patch_with_most_attention_is_kept():
    attention = torch.linspace(1, 2, 40) / 60
    assert llava.prumerge(attention, torch.randn(40, 4), False).shape == (2, 40)
    assert llava.prumerge(attention, torch.randn(40, 4), False)[0, 39] == 1


@pytest.mark.parametrize("variant", ["prumerge", "prumerge+"])
@pytest.mark.parametrize("name", ["no window", "no window, AnyRes"])
def test_prumerge_uses_q_and_k_of_the_towers_last_layer(name, variant, models):
    case, model = models[name]
    inputs = make_inputs(model, [5], [[0, 1, 2]])

    def last_layer(module):
        return [case.tensors[f"vision.encoder.layers.2.{module}.{part}"] for part in ("weight", "bias")]

    with torch.no_grad():
        pruned = model.encode_images(inputs["images"], inputs["image_sizes"], prune=variant)
        for features, tiles in zip(pruned, inputs["images"], strict=True):
            expected = []
            for x in model.vision_tower(tiles):                 # [17, 24]
                normed = F.layer_norm(x, (24,), *last_layer("layer_norm1"), 1e-5)
                q = F.linear(normed, *last_layer("self_attn.q_proj"))
                k = F.linear(normed, *last_layer("self_attn.k_proj"))
                attention = (q[0] @ k.T / 24**0.5).softmax(-1)[1:]
                expected.append(prumerge_by_loops(x[1:], attention, k[1:], variant == "prumerge+"))
            torch.testing.assert_close(features, model.projector(torch.cat(expected)), rtol=1e-5, atol=1e-5)


def test_pruned_rows_can_be_decoded_in_batches_and_trained(models):
    case, _ = models["window"]
    model = Llava.from_pretrained(**case.source, dtype=torch.float32, prune="prumerge").eval()
    inputs = make_inputs(model, [7, 30, 5], [[2], [5, 9], []])
    answers = model.generate_batch(**inputs, max_new_tokens=12, eos_token_id=None)
    rows = split_rows(inputs, model.config.image_token_id)
    assert answers == [list(model.generate(**row, max_new_tokens=12, eos_token_id=None)) for row in rows]
    model(**inputs, labels=inputs["input_ids"]).backward()
    assert model.projector[0].weight.grad.abs().sum() > 0
