"""How the model behaves: what it sees, in which order, how it decodes, which patches it keeps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import llava
from llava import Llava, LlavaConfig, Processor, TextConfig, VisionConfig
from tests.golden import SIZES, TILES, expanded, llava_grid, llava_window, reference
from tests.layouts import GRIDS, LLAMA, MISTRAL, hub, liuhaotian, write_tokenizer

torch.set_num_threads(1)
SLIDING = MISTRAL | {"sliding_window": 24}
MODELS = {"sliding": hub("old", False, SLIDING), "sliding AnyRes": hub("old", True, SLIDING),
          "whole": hub("new", False, LLAMA), "whole AnyRes": hub("new", True, MISTRAL),
          "LLaVA's AnyRes": liuhaotian(tower=True, anyres=True, text=MISTRAL)}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    cases = {name: build(tmp_path_factory.mktemp("model")) for name, build in MODELS.items()}
    return {name: (case, Llava.from_pretrained(**case.source, dtype=torch.float32).eval())
            for name, case in cases.items()}


def prompts(model: Llava, lengths, marks, seed=0) -> dict:
    """Right-padded rows of random words; `marks` gives the places of each row's pictures."""
    noise, image = torch.Generator().manual_seed(seed), model.config.image_token_id
    ids = torch.randint(3, 80, (len(lengths), max(lengths)), generator=noise)
    for row, places in zip(ids, marks):
        row[list(places)] = image
    count = sum(map(len, marks))
    tiles = TILES * 2 if model.config.image_mode == "anyres" else [1] * 8
    images = [torch.randn(n, 3, 28, 28, generator=noise) for n in tiles[:count]]
    return {"input_ids": ids, "images": images, "image_sizes": (SIZES * 2)[:count],
            "attention_mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]}


def rows_of(inputs: dict, image_id: int):
    """The same rows one by one, without padding."""
    images, sizes = iter(inputs["images"]), iter(inputs["image_sizes"])
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        count = int((ids[mask] == image_id).sum())
        yield {"input_ids": ids[mask][None], "images": [next(images) for _ in range(count)],
               "image_sizes": [next(sizes) for _ in range(count)]}


# ---------------------------------------------------------------------------------------------
# Attention


def masked_attention(q, k, v, window):
    """The definition: a softmax over the keys j with 0 <= i - j < window."""
    T, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    distance = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (distance < 0) | (distance >= (window or T))
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("T, window", [(1, 1), (5, None), (5, 5), (5, 8), (6, 5), (10, 5), (23, 5), (9, 1)])
def test_windowed_attention_and_its_gradients_follow_the_definition(T, window):
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, heads, T, 6, requires_grad=True) for heads in (4, 2, 2))
    y = llava.causal_attention(q, k, v, window)
    wanted = masked_attention(q, k, v, window)
    torch.testing.assert_close(y, wanted)
    outer = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(x, (q, k, v), outer, retain_graph=True) for x in (y, wanted))
    torch.testing.assert_close(ours, theirs)


def test_attention_without_gradients_is_the_same_function():
    q, k, v = (torch.randn(2, heads, 23, 8) for heads in (4, 2, 2))
    with torch.inference_mode():
        torch.testing.assert_close(llava.causal_attention(q, k, v, 5), masked_attention(q, k, v, 5))


@pytest.mark.parametrize("window", [None, 1, 4, 5])
def test_a_token_sees_itself_and_the_window_before_it_and_nothing_else(window):
    torch.manual_seed(0)
    config = TextConfig(vocab_size=9, hidden_size=16, intermediate_size=20, num_hidden_layers=1, head_dim=8,
                        num_attention_heads=2, num_key_value_heads=1, sliding_window=window)
    model, x = llava.LanguageModel(config), torch.randn(1, 12, 16, requires_grad=True)
    y = model(x)
    for i in range(12):
        seen = torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0
        assert seen.nonzero()[:, 0].tolist() == list(range(max(0, i + 1 - (window or 12)), i + 1))


# ---------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("name, words, marks", [
    ("sliding", 3, [2]), ("sliding", 9, [8]), ("sliding", 10, [1]), ("sliding", 30, [4, 20]),
    ("sliding AnyRes", 9, [3]), ("whole", 12, [3, 7]), ("whole AnyRes", 9, [0])])
def test_48_greedy_tokens_are_those_of_transformers(name, words, marks, opened):
    pytest.importorskip("transformers", minversion="5")
    case, model = opened[name]
    inputs = prompts(model, [words], [marks])
    ours = list(model.generate(**next(rows_of(inputs, model.config.image_token_id)), max_new_tokens=48,
                               eos_token_id=None))
    counts = [llava.count_image_tokens(model.config, size) for size in inputs["image_sizes"]]
    inputs["labels"] = inputs["input_ids"]
    stretched = expanded(inputs, counts, model.config.image_token_id, case.anyres)
    del stretched["labels"]
    theirs = reference(case).generate(**stretched, max_new_tokens=48, do_sample=False, eos_token_id=None,
                                      pad_token_id=0)
    assert ours == theirs[0, -48:].tolist()
    assert len(set(ours)) > 3                # no loop that any model would fall into


@pytest.mark.parametrize("name", ["sliding", "whole"])
@pytest.mark.parametrize("length", [1, 23, 24, 25, 60])
def test_the_cache_gives_what_reading_everything_again_gives(name, length, opened):
    _, model = opened[name]
    row = next(rows_of(prompts(model, [length], [[]], seed=length), -1))
    ids, words = row["input_ids"], model.language_model
    with torch.no_grad():
        for token in model.generate(ids, max_new_tokens=30, eos_token_id=None):
            assert token == words.lm_head(words(words.embed_tokens(ids)))[0, -1].argmax()
            ids = torch.cat((ids, torch.tensor([[token]])), dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_rows_generated_together_are_the_rows_generated_alone(name, opened):
    _, model = opened[name]
    inputs = prompts(model, [3, 40, 11, 1, 26], [[], [5, 6], [0], [], [20]])
    together = model.generate_batch(**inputs, max_new_tokens=30, eos_token_id=None)
    alone = [list(model.generate(**row, max_new_tokens=30, eos_token_id=None))
             for row in rows_of(inputs, model.config.image_token_id)]
    assert together == alone and {len(row) for row in together} == {30}


@pytest.mark.parametrize("rows, dtype, onednn", [(1, torch.bfloat16, False), (2, torch.bfloat16, True),
                                                 (1, torch.float32, True)])
def test_a_single_bf16_row_on_a_cpu_is_decoded_without_onednn(rows, dtype, onednn, monkeypatch):
    text = TextConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    torch.manual_seed(0)
    model = Llava(LlavaConfig(VisionConfig(32, 48, 2, 2, 28), text, image_token_id=64)).to(dtype).eval()
    ids, lm, seen = torch.randint(3, 60, (rows, 9)), model.language_model, []
    before, decode_step = torch.backends.mkldnn.enabled, lm.decode_step
    wanted = torch.stack(list(model.generate_tokens(ids, max_new_tokens=5)))

    def spy(*args, **kwargs):
        seen.append(torch.backends.mkldnn.enabled)
        if len(seen) == 11:                  # in the second answer
            raise RuntimeError("interrupted")
        return decode_step(*args, **kwargs)

    monkeypatch.setattr(lm, "decode_step", spy)
    head = lm.lm_head.register_forward_pre_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
    tokens = [token for token in model.generate_tokens(ids, max_new_tokens=5)
              if torch.backends.mkldnn.enabled == before or pytest.fail("the caller sees it switched off")]
    assert torch.equal(torch.stack(tokens), wanted) and len(seen) == 9
    assert set(seen) == {onednn and before}
    with pytest.raises(RuntimeError):
        list(model.generate_tokens(ids, max_new_tokens=5))
    assert torch.backends.mkldnn.enabled == before
    head.remove()


def test_a_row_ends_at_its_own_end_of_text(opened):
    _, model = opened["sliding"]
    inputs = prompts(model, [3, 40, 11], [[], [5, 6], [0]])
    free = model.generate_batch(**inputs, max_new_tokens=20, eos_token_id=None)
    end = free[0][4]
    wanted = [row[:row.index(end)] if end in row else row for row in free]
    assert model.generate_batch(**inputs, max_new_tokens=20, eos_token_id=end) == wanted
    rows = rows_of(inputs, model.config.image_token_id)
    assert [list(model.generate(**row, max_new_tokens=20, eos_token_id=end)) for row in rows] == wanted
    assert len(wanted[0]) == free[0].index(end) < 20


def test_top_p_and_temperature_draw_from_the_likeliest(opened):
    _, model = opened["whole"]
    row = next(rows_of(prompts(model, [7], [[]]), -1))
    with torch.no_grad():
        p = model(**row)[0, -1].div(1.5).softmax(-1)
    order = p.argsort(descending=True)
    nucleus = order[:int((p[order].cumsum(0) < 0.6).sum()) + 1].tolist()

    many = row["input_ids"].expand(300, -1)

    def draw(**how):
        torch.manual_seed(0)
        return sum(model.generate_batch(many, max_new_tokens=1, eos_token_id=None, **how), [])
    drawn = draw(temperature=1.5, top_p=0.6)
    assert set(drawn) == set(nucleus) and len(nucleus) > 2
    assert drawn == draw(temperature=1.5, top_p=0.6)            # the seed decides
    assert not set(draw(temperature=1.5)) <= set(nucleus)
    assert set(draw(temperature=1.5, top_p=1e-6)) == {order[0].item()}


# ---------------------------------------------------------------------------------------------
# What the language model reads


def test_a_picture_becomes_words_where_it_stands(opened):
    _, model = opened["whole"]
    inputs = prompts(model, [6, 4], [[1, 4], [3]])
    with torch.no_grad():
        features = model.encode_images(inputs["images"], inputs["image_sizes"])
        assert [tuple(f.shape) for f in features] == [(16, 40)] * 3
        logits = model(**inputs)
        assert logits.shape == (2, 6 - 2 + 2 * 16, 90)          # B, T', V
        words = model.language_model.embed_tokens(inputs["input_ids"].clamp(max=88))
        row = torch.cat((words[0, :1], features[0], words[0, 2:4], features[1], words[0, 5:]))
        read = model.language_model.lm_head(model.language_model(row[None]))
        torch.testing.assert_close(logits[0], read[0])
        row = torch.cat((words[1, :3], features[2]))
        read = model.language_model.lm_head(model.language_model(row[None]))
        torch.testing.assert_close(logits[1, :19], read[0])


def test_padding_changes_nothing(opened):
    _, model = opened["sliding"]
    inputs = prompts(model, [31, 9], [[], [2]])
    with torch.no_grad():
        logits = model(**inputs)
        inputs["input_ids"][1, 9:] = 7
        torch.testing.assert_close(model(**inputs)[1, :24], logits[1, :24])
        alone = list(rows_of(inputs, model.config.image_token_id))[1]
        torch.testing.assert_close(model(**alone)[0], logits[1, :24])


def test_the_loss_is_the_mean_over_all_supervised_tokens_of_the_batch(opened):
    _, model = opened["whole"]
    inputs = prompts(model, [9, 5], [[1], []])
    labels = inputs["input_ids"].masked_fill(~inputs["attention_mask"], -100)
    labels[0, :4] = labels[1, 3] = -100
    with torch.no_grad():
        logits, total, count = model(**inputs), 0.0, 0
        for row, shift in ((0, 15), (1, 0)):                    # 16 patches stand for one id
            for place in range(1, 9):
                if labels[row, place] != -100:
                    total += F.cross_entropy(logits[row, place + shift - 1], labels[row, place])
                    count += 1
        torch.testing.assert_close(model(**inputs, labels=labels), total / count)
    assert count == 8


def test_the_tower_is_read_before_its_last_block_and_without_cls(opened):
    _, model = opened["whole"]
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        before = model.vision_tower(pixels)
        features = torch.stack(model.encode_images([pixels[:1], pixels[1:]], SIZES[:2]))
        torch.testing.assert_close(features, model.projector(before[:, 1:]))
        for p in model.vision_tower.layers[-1].parameters():
            p.mul_(2)
        assert torch.equal(features, torch.stack(model.encode_images([pixels[:1], pixels[1:]], SIZES[:2])))
        for p in model.vision_tower.layers[-1].parameters():
            p.div_(2)
        model.vision_tower.layers[-2].mlp["fc2"].bias.add_(1)
        assert not torch.equal(features[0], model.encode_images([pixels[:1]], SIZES[:1])[0])
        model.vision_tower.layers[-2].mlp["fc2"].bias.sub_(1)


def test_unnormalized_pixels_are_normalized_by_the_model(opened):
    _, model = opened["whole"]
    pixels = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        (raw,), (normal,) = (model.encode_images([x], [(28, 28)]) for x in (pixels, llava.normalize(pixels)))
    assert torch.equal(raw, normal)


@pytest.mark.parametrize("name", ["whole", "whole AnyRes"])
def test_as_many_features_as_counted(name, opened):
    _, model = opened[name]
    inputs = prompts(model, [5], [[0, 1, 2, 3]])
    counts = [len(f) for f in model.encode_images(inputs["images"], inputs["image_sizes"])]
    assert counts == [llava.count_image_tokens(model.config, size) for size in inputs["image_sizes"]]
    assert name == "whole" or len(set(counts)) == 4


@pytest.mark.parametrize("width, height", [(56, 56), (200, 100), (100, 30), (47, 188), (343, 392), (588, 49),
                                           (1, 500)])
def test_llavas_anyres_is_the_whole_then_the_covered_rows_each_with_a_newline(width, height, opened):
    case, model = opened["LLaVA's AnyRes"]
    grid = llava_grid(width, height, GRIDS)
    columns = grid[0] // 28
    top, bottom, left, right = llava_window(width, height, grid, 7)
    with torch.no_grad():
        tiles = torch.randn(1 + columns * grid[1] // 28, 3, 28, 28)
        patches = model.projector(model.vision_tower(tiles)[:, 1:])       # [tiles, 16, C]
        features, = model.encode_images([tiles], [(height, width)])
    wanted = [*patches[0]]
    for row in range(top, bottom):
        for column in range(left, right):
            wanted.append(patches[1 + row // 4 * columns + column // 4, row % 4 * 4 + column % 4])
        wanted.append(case.tensors["newline"])
    assert torch.equal(features, torch.stack(wanted))


@pytest.mark.parametrize("height, width", [(100, 200), (188, 47), (392, 343), (49, 588), (500, 1)])
def test_where_the_publishers_disagree_llava_hfs_model_follows_transformers(height, width, opened):
    pytest.importorskip("transformers", minversion="5")
    from transformers.image_processing_utils import select_best_resolution
    case, model = opened["whole AnyRes"]
    tall, wide = select_best_resolution((height, width), GRIDS)
    inputs = prompts(model, [5], [[2]]) | {"images": [torch.randn(1 + tall * wide // 28**2, 3, 28, 28)],
                                           "image_sizes": [(height, width)]}
    count = llava.count_image_tokens(model.config, (height, width))
    stretched = expanded(inputs | {"labels": inputs["input_ids"]}, [count], model.config.image_token_id, True)
    with torch.no_grad():
        wanted = reference(case)(**stretched).logits            # raises if it counts otherwise
        torch.testing.assert_close(model(**inputs), wanted, rtol=2e-5, atol=2e-5)


def test_the_number_of_marks_must_be_the_number_of_pictures(opened):
    _, model = opened["whole"]
    inputs = prompts(model, [6, 4], [[1, 4], [3]])
    for images in (inputs["images"][:2], [*inputs["images"], inputs["images"][0]], []):
        with pytest.raises(ValueError, match="<image>"):
            model(**inputs | {"images": images, "image_sizes": SIZES[:len(images)]})


def test_what_the_processor_makes_is_what_the_model_takes(tmp_path):
    from PIL import Image
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
    """The released code in words: keep the outliers or a share of all, strongest first; with plus an
    even sample of the others but never the last; add to each its 32 most similar patches, weighted;
    then the sum of all that is left. The paper: in order, by the plain product of keys, a patch as
    weighty as its neighbors, and nothing of what is left."""
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
    unit = keys.double() if paper else keys.double() / keys.double().norm(dim=1, keepdim=True)
    tokens = []
    for p in kept:
        others = sorted((q for q in range(P) if q != p), key=lambda q: -float(unit[p] @ unit[q]))[:32]
        weights = {p: a[p] if paper else 1.0} | {q: a[q] for q in others}
        tokens.append(sum(w * features[q].double() for q, w in weights.items()))
    if not paper:
        rest = [q for q in range(P) if q not in kept]
        nothing = torch.zeros(features.shape[1])
        tokens.append(sum((a[q] * features[q].double() for q in rest), nothing))
    return torch.stack(tokens).float()


@pytest.mark.parametrize("variant", llava.PRUMERGE.values(), ids=str)
def test_every_variant_of_prumerge_is_the_double_loop_of_its_definition(variant):
    torch.manual_seed(0)
    attention, keys, features = torch.rand(81) / 10, torch.randn(81, 7), torch.randn(81, 6)
    attention[torch.randperm(81)[:5]] += 1 + torch.rand(5)
    attention = attention / 80
    tokens = llava.prumerge(attention, keys, **variant) @ features
    wanted = prumerge_by_loops(features, attention, keys, **variant)
    torch.testing.assert_close(tokens, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plus", [False, True], ids=["prumerge", "prumerge+"])
@pytest.mark.parametrize("P, loud", [(64, 5), (100, 1), (100, 33), (40, 0), (32, 2), (5, 0), (2, 0)])
def test_prumerge_is_the_double_loop_of_its_definition(P, loud, plus):
    torch.manual_seed(P + loud)
    attention = torch.rand(P) / 10
    attention[torch.randperm(P)[:loud]] += 1 + torch.rand(loud)
    attention, keys, features = attention / 80, torch.randn(P, 7), torch.randn(P, 6)
    wanted = prumerge_by_loops(features, attention, keys, plus)
    torch.testing.assert_close(llava.prumerge(attention, keys, plus) @ features, wanted, rtol=1e-5, atol=1e-5)


def test_when_almost_a_quarter_are_outliers_plus_keeps_all_but_the_last():
    attention, keys = torch.full((40,), 1e-3), torch.randn(40, 4)
    attention[:9] = 1.0                      # a quarter cannot be exceeded: it would move the quartile
    assert llava.prumerge(attention, keys, True).shape == (40, 40)       # 39 patches and the rest
    assert llava.prumerge(attention, keys, False).shape == (10, 40)


def test_without_an_outlier_the_strongest_patch_is_kept():
    attention = torch.linspace(1, 2, 40) / 60
    assert llava.prumerge(attention, torch.randn(40, 4), False).shape == (2, 40)
    assert llava.prumerge(attention, torch.randn(40, 4), False)[0, 39] == 1


@pytest.mark.parametrize("variant", ["prumerge", "prumerge+"])
@pytest.mark.parametrize("name", ["whole", "whole AnyRes"])
def test_pruned_pictures_follow_the_definition_from_the_last_blocks_q_and_k(name, variant, opened):
    case, model = opened[name]
    inputs = prompts(model, [5], [[0, 1, 2]])

    def last(kind):
        return (case.tensors[f"vision.encoder.layers.2.{kind}.{part}"] for part in ("weight", "bias"))
    with torch.no_grad():
        pruned = model.encode_images(inputs["images"], inputs["image_sizes"], prune=variant)
        for features, tiles in zip(pruned, inputs["images"], strict=True):
            wanted = []
            for x in model.vision_tower(tiles):                 # [17, 24]
                normed = F.layer_norm(x, (24,), *last("layer_norm1"), 1e-5)
                q, k = (F.linear(normed, *last(f"self_attn.{which}_proj")) for which in "qk")
                attention = (q[0] @ k.T / 24**0.5).softmax(-1)[1:]
                wanted.append(prumerge_by_loops(x[1:], attention, k[1:], variant == "prumerge+"))
            torch.testing.assert_close(features, model.projector(torch.cat(wanted)), rtol=1e-5, atol=1e-5)


def test_pruned_rows_decode_in_batches_and_train(opened):
    case, model = opened["sliding"]
    pruned = Llava.from_pretrained(**case.source, dtype=torch.float32, prune="prumerge").eval()
    inputs = prompts(pruned, [7, 30, 5], [[2], [5, 9], []])
    together = pruned.generate_batch(**inputs, max_new_tokens=12, eos_token_id=None)
    rows = rows_of(inputs, pruned.config.image_token_id)
    assert together == [list(pruned.generate(**row, max_new_tokens=12, eos_token_id=None)) for row in rows]
    pruned(**inputs, labels=inputs["input_ids"]).backward()
    assert pruned.projector[0].weight.grad.abs().sum() > 0
