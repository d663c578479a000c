"""The toy data: everything a real run downloads, in the same layouts, 10,000 times smaller.

    python tests/toy.py data/toy

makes from a seed, in a minute or two on two cores:

    scienceqa/        problems.json, pid_splits.json, images/{split}/{id}/image.png
    pretrain.json     captions for stage 1, their images in pretrain/
    coco/             captions_train2014.json and instances_train2014.json, their images in train2014/
    clip/             a vision tower, pretrained to tell which caption belongs to which image
    benchmarks/       VQAv2, TextVQA, POPE, MME, MMBench and LLaVA-Bench in their published formats
    mistral/ llama/   two language models of equal depth, pretrained on text alone

An image shows one to three shapes of one color on one side of a map. The language models can answer
questions about a scene that is described in text, but were not trained on images; the vision tower was
not trained on questions. train.py connects them: image questions that are answered correctly only with
the real image show that the model uses it.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import math
import multiprocessing
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from eval import (SHORT_SUFFIX, generate_answers, print_table, question, read_scienceqa, score,
                  target_text, to_record)
from llava import (TO_HF, IGNORE, SYSTEM, TEMPLATE_OF, LanguageModel, Llava, LlavaConfig, Processor,
                   TextConfig, VisionConfig, VisionTower, command_line, normalize, read_json, rename_key,
                   write_json)

PRETRAINED = ("mistral", "clip", "llama")
VISION = VisionConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=4,
                      num_attention_heads=4, image_size=64, patch_size=16)
MISTRAL = dict(model_type="mistral", hidden_size=96, intermediate_size=288, num_hidden_layers=3,
               num_attention_heads=3, num_key_value_heads=1, head_dim=32, rope_theta=1e4,
               sliding_window=256, max_position_embeddings=512)
LLAMA = MISTRAL | dict(model_type="llama", intermediate_size=224, num_key_value_heads=3,
                       sliding_window=None)


# ---------------------------------------------------------------------------------------------
# Scenes, as images and as text

COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 220),
          "yellow": (235, 210, 40), "purple": (150, 50, 190)}
SHAPES = ("circle", "bar", "triangle", "cross")
PLACES = {"north": (32, 17), "east": (47, 32), "south": (32, 47), "west": (17, 32)}
COUNTS = ("one", "two", "three")


def make_scene(rng: random.Random) -> dict[str, str]:
    return {"count": rng.choice(COUNTS), "color": rng.choice(list(COLORS)),
            "shape": rng.choice(SHAPES), "place": rng.choice(list(PLACES))}


def draw(scene: dict[str, str], rng: random.Random, boxes: list | None = None) -> Image.Image:
    image = Image.new("RGB", (64, 64), tuple(rng.randint(215, 255) for _ in range(3)))
    pen, count, turn = ImageDraw.Draw(image), COUNTS.index(scene["count"]) + 1, rng.random() * math.tau
    for i in range(count):
        r = rng.randint(8, 10) if count == 1 else rng.randint(6, 7)
        x, y = (center + rng.randint(-2, 2) for center in PLACES[scene["place"]])
        if count > 1:                        # in a ring around the middle
            x += round(9 * math.cos(turn + math.tau * i / count))
            y += round(9 * math.sin(turn + math.tau * i / count))
        if boxes is not None:                # [x, y, width, height], as COCO has them
            half = r // 3 if scene["shape"] == "bar" else r
            boxes.append([x - r, y - half, 2 * r, 2 * half])
        fill = tuple(max(0, min(255, c + rng.randint(-15, 15))) for c in COLORS[scene["color"]])
        if scene["shape"] == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif scene["shape"] == "bar":
            pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill=fill)
        elif scene["shape"] == "triangle":
            pen.polygon((x, y - r, x - r, y + r, x + r, y + r), fill=fill)
        else:
            pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill=fill)
            pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill=fill)
    return image


def noun(scene: dict[str, str]) -> str:
    return scene["shape"] + ("" if scene["count"] == "one" else "es" if scene["shape"] == "cross" else "s")


def caption(scene: dict[str, str]) -> str:
    return f"{scene['count']} {scene['color']} {noun(scene)} in the {scene['place']}"


# ---------------------------------------------------------------------------------------------
# Questions, as in ScienceQA

WORDS = {"noun": "cat dog tree house river stone apple lamp chair bird fish cloud".split(),
         "verb": "run jump sing eat sleep write swim read walk laugh".split(),
         "adjective": "happy tall cold quiet heavy bright soft clean brave old".split()}
STUFF = {"solid": "iron wood ice glass sand salt".split(),
         "liquid": "milk water oil juice honey rain".split(),
         "gas": "air steam oxygen smoke helium wind".split()}
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
MAP = "On a map north is up and east is right."


def problem(subject, topic, skill, grade, asked, choices, right, solution, lecture="", hint="") -> dict:
    choices = list(choices)
    return {"question": asked, "choices": choices, "answer": choices.index(right), "hint": hint,
            "image": None, "task": "closed choice", "grade": f"grade{grade}",
            "subject": f"{subject} science", "topic": topic, "category": skill.split()[0].capitalize(),
            "skill": skill, "lecture": lecture, "solution": solution}


def image_problem(scene: dict[str, str], rng: random.Random) -> dict:
    """A question whose answer is in the image and nowhere else."""
    count, color, shape, place = scene.values()
    return rng.choice((
        problem("natural", "physics", "Identify colors", 2, "What color do you see?", COLORS, color,
                f"The color is {color}.", "Color is light that reaches the eye."),
        problem("natural", "geometry", "Identify shapes", 4, "Which shape do you see?", SHAPES, shape,
                f"The shape is a {shape}.", "A shape is known by its sides."),
        problem("social", "geography", "Read a map", 6, "Where on the map are they?", PLACES, place,
                f"They lie in the {place}.", MAP, hint="The picture is a map."),
        problem("social", "economics", "Count goods", 8, "How many are there?", COUNTS, count,
                f"The number is {count}.", "To count is to say how many there are."),
    )) | {"image": "image.png"}


def text_problem(rng: random.Random) -> dict:
    kind, state, wind = rng.choice(list(WORDS)), rng.choice(list(STUFF)), rng.choice(list(PLACES))
    word, stuff = rng.choice(WORDS[kind]), rng.choice(STUFF[state])
    return rng.choice((
        problem("language", "grammar", "Classify words", 3, f"What kind of word is {word}?", WORDS, kind,
                f"The word {word} is a kind of {kind}.",
                "A noun names, a verb acts, an adjective describes."),
        problem("natural", "chemistry", "Classify matter", 5, f"Is {stuff} a solid, a liquid or a gas?",
                STUFF, state, f"Usually {stuff} is a {state}."),
        problem("social", "geography", "Find directions", 7, f"Which way is opposite to {wind}?",
                PLACES, OPPOSITE[wind], f"Opposite to {wind} is {OPPOSITE[wind]}.", MAP),
        problem("natural", "weather", "Name winds", 9, "Where does the wind come from?", PLACES, wind,
                f"The wind comes from the {wind}.", "A wind is named after where it comes from.",
                hint=f"Today the {wind} wind blows over the {rng.choice(WORDS['noun'])}.")))


def write_scienceqa(folder: Path, sizes=(("train", 1272), ("val", 100), ("test", 424))) -> None:
    rng, problems, splits = random.Random(1), {}, {}
    for split, size in sizes:
        splits[split] = [str(len(problems) + i + 1) for i in range(size)]
        for name in splits[split]:
            if rng.random() < 0.5:           # in ScienceQA, too, about half have an image
                scene = make_scene(rng)
                problems[name] = image_problem(scene, rng) | {"split": split}
                place = folder / "images" / split / name
                place.mkdir(parents=True)
                draw(scene, rng).save(place / "image.png")
            else:
                problems[name] = text_problem(rng) | {"split": split}
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", splits)


def write_captions(folder: Path, size: int = 6000) -> None:
    """Write the images into the folder and the records beside it."""
    rng, records = random.Random(2), []
    folder.mkdir(parents=True)
    for i in range(size):
        scene, name = make_scene(rng), f"{i:05}.png"
        draw(scene, rng).save(folder / name)
        records.append({"id": name[:5], "image": name, "conversations": [
            {"from": "human", "value": "Describe the picture in a few words.\n<image>"},
            {"from": "gpt", "value": caption(scene)}]})
    write_json(folder.parent / "pretrain.json", records)


def write_coco(folder: Path, size: int = 200, images: bool = True) -> None:
    """Scenes in the layout of COCO: captions_train2014.json, instances_train2014.json, train2014/."""
    rng, entries, captions, instances = random.Random(6), [], [], []
    (folder / "train2014").mkdir(parents=True)
    for i in range(1, size + 1):
        scene, boxes, name = make_scene(rng), [], f"{i:06}.png"
        image = draw(scene, rng, boxes)
        if images:
            image.save(folder / "train2014" / name)
        entries.append({"id": i, "file_name": name, "width": 64, "height": 64})
        for text in (caption(scene), f"a map with {scene['color']} {noun(scene)}",
                     f"{scene['count']} {noun(scene)} drawn in the {scene['place']} of a map"):
            captions.append({"id": len(captions), "image_id": i, "caption": text})
        for box in boxes:
            instances.append({"id": len(instances), "image_id": i, "bbox": box,
                              "category_id": SHAPES.index(scene["shape"])})
    categories = [{"id": i, "name": shape} for i, shape in enumerate(SHAPES)]
    write_json(folder / "captions_train2014.json", {"images": entries, "annotations": captions})
    write_json(folder / "instances_train2014.json", {
        "images": entries, "annotations": instances, "categories": categories})


class Teacher(ThreadingHTTPServer):
    """A local stand-in for a text-only language model: it answers from the captions and boxes that it is
    sent and never sees an image. `prompts` holds the last message of each request; `edit(text)` may
    change a reply, and `status` refuses all requests."""

    def __init__(self, port: int = 0, edit=str):
        super().__init__(("127.0.0.1", port), TeacherHandler)
        self.prompts, self.edit, self.status = [], edit, 200
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class TeacherHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.prompts.append(body["messages"][-1]["content"])
        text = self.server.edit(teach(body["messages"][0]["content"], body["messages"][-1]["content"]))
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_) -> None:
        pass


def teach(system: str, symbolic: str) -> str:
    """A reply of the kind that the system message wants, made of the words in the symbolic image."""
    captions, _, boxes = symbolic.partition("\n\n")
    words = captions.split()
    count, color, place = (next(word for word in words if word in known)
                           for known in (COUNTS, COLORS, PLACES))
    shape = next(shape for shape in SHAPES if shape in captions)
    if "detailed description" in system:
        tops = [json.loads(line.partition(": ")[2])[1] for line in boxes.splitlines()]
        half = "upper" if max(tops) < 0.5 else "lower"
        return (f"The color is {color}. The shape is a {shape}. The number is {count}. They lie in the "
                f"{place}, and something of them is in the {half} half.")
    if "reasoning" in system:
        pairs = [("Which way is the middle of the map from here?",
                  f"They lie in the {place}. Opposite to {place} is {OPPOSITE[place]}.")]
    else:
        pairs = [("What color do you see?", f"The color is {color}."),
                 ("Which shape do you see?", f"The shape is a {shape}."),
                 ("How many are there?", f"The number is {count}.")]
    return "\n===\n".join(f"Question:\n{asked}\n===\nAnswer:\n{answered}" for asked, answered in pairs)


# ---------------------------------------------------------------------------------------------
# The other benchmarks, each in its published file formats


def write_lines(file: Path, entries: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def write_benchmarks(folder: Path, size: int = 12) -> None:
    """Question files, annotations and images of VQAv2, TextVQA, POPE, MME, MMBench and LLaVA-Bench."""
    rng, scenes = random.Random(6), {}
    for i in range(1, size + 1):
        scenes[f"COCO_val2014_{i:012}.jpg"] = make_scene(rng)
    (folder / "val2014").mkdir(parents=True)
    for name, scene in scenes.items():
        draw(scene, rng).save(folder / "val2014" / name, quality=95)
    write_short_answers(folder, scenes)
    write_yes_no(folder, scenes, rng)
    write_mmbench(folder, scenes, rng)
    questions, references = [], []
    for i, (name, scene) in enumerate(scenes.items()):
        kind, text, reference = (("conv", "What color do you see?", scene["color"]),
                                 ("detail", "Describe this image.", caption(scene)),
                                 ("complex", "Why a map?", f"It shows the {scene['place']}."))[i % 3]
        questions.append({"question_id": i, "image": name, "text": text, "category": kind})
        references.append({"question_id": i, "prompt": text, "answer_id": f"r{i}", "text": reference})
    write_lines(folder / "llavabench/questions.jsonl", questions)
    write_lines(folder / "llavabench/answers_gpt4.jsonl", references)
    write_lines(folder / "llavabench/context.jsonl", [
        {"id": name[:-4], "image": name, "caption": caption(scene)} for name, scene in scenes.items()])


def write_short_answers(folder: Path, scenes: dict[str, dict]) -> None:
    """VQAv2 and TextVQA: ten human answers to each question."""
    asked, annotations, texts, data = [], [], [], []
    for i, (name, scene) in enumerate(scenes.items(), 1):
        kind, text, right = (("other", "What color is it?", scene["color"]),
                             ("number", "How many?", scene["count"]),
                             ("yes/no", "Is it red?", "yes" if scene["color"] == "red" else "no"))[i % 3]
        humans = [right] * 7 + ["none", f"a {right}", f"{right}."]
        asked.append({"image_id": i, "question": text, "question_id": 1000 * i})
        annotations.append({"question_id": 1000 * i, "image_id": i, "answer_type": kind,
                            "question_type": text, "multiple_choice_answer": right, "answers": [
                                {"answer": human, "answer_confidence": "yes", "answer_id": n}
                                for n, human in enumerate(humans, 1)]})
        texts.append({"question_id": name[:-4], "image": name, "category": "default",
                      "text": f"{text}\nReference OCR token: {scene['shape']}{SHORT_SUFFIX}"})
        data.append({"question": text.lower(), "image_id": name[:-4], "question_id": i, "answers": humans})
    head = {"data_type": "mscoco", "data_subtype": "val2014", "task_type": "Open-Ended"}
    write_json(folder / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", head | {"questions": asked})
    write_json(folder / "vqav2/v2_mscoco_val2014_annotations.json", head | {"annotations": annotations})
    write_lines(folder / "textvqa/llava_textvqa_val_v051_ocr.jsonl", texts)
    write_json(folder / "textvqa/TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": data})


def write_yes_no(folder: Path, scenes: dict[str, dict], rng: random.Random) -> None:
    """POPE and MME: for each image one question with the answer yes and one with the answer no."""
    asked, labels = [], {}
    for n, kind in enumerate(("adversarial", "random", "popular")):
        labels[kind] = []
        for name, scene in scenes.items():
            wrong = rng.choice([shape for shape in SHAPES if shape != scene["shape"]])
            for shape, label in ((scene["shape"], "yes"), (wrong, "no")):
                labels[kind].append({"question_id": len(labels[kind]) + 1, "image": name, "label": label,
                                     "text": f"Is there a {shape} in the image?"})
        asked += [{"question_id": 10**7 * n + i, "image": line["image"], "category": kind,
                   "text": line["text"] + SHORT_SUFFIX} for i, line in enumerate(labels[kind], 1)]
        write_lines(folder / f"pope/coco_pope_{kind}.json", labels[kind])
    write_lines(folder / "pope/llava_pope_test.jsonl", asked)
    questions = []
    for task, line in [(task, line) for task in ("color", "code_reasoning") for line in labels["random"]]:
        image = f"{task}/{line['image']}"
        questions.append({"question_id": image, "image": image, "category": task,
                          "text": line["text"] + SHORT_SUFFIX})
        (folder / "mme" / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "val2014" / line["image"], folder / "mme" / image)
        with open((folder / "mme" / image).with_suffix(".txt"), "a", encoding="utf-8") as truth:
            truth.write(f"{line['text']} Please answer yes or no.\t{line['label'].capitalize()}\n")
    write_lines(folder / "mme/llava_mme.jsonl", questions)


def write_mmbench(folder: Path, scenes: dict[str, dict], rng: random.Random) -> None:
    """A tsv with each question twice, its options in another order the second time."""
    rows = []
    for i, (name, scene) in enumerate(scenes.items(), 1):
        image = base64.b64encode((folder / "val2014" / name).read_bytes()).decode()
        for index in (i, 10**6 + i):
            options = rng.sample(SHAPES, len(SHAPES))
            rows.append({"index": index, "question": "Which shape do you see?",
                         "hint": "Look." if i % 2 else "", **dict(zip("ABCD", options)),
                         "answer": "ABCD"[options.index(scene["shape"])],
                         "category": "shape", "image": image, "source": "toy",
                         "l2-category": "coarse" if i % 2 else "fine", "comment": "", "split": "dev"})
    file = folder / "mmbench/mmbench_dev_20230712.tsv"
    file.parent.mkdir(parents=True)
    with open(file, "w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------------------------------------
# Pretrained models, in the layouts of openai/clip-vit-large-patch14-336 and mistralai/Mistral-7B


def pretrain(loss_of_batch, parameters, steps: int, name: str) -> None:
    """Minimize loss_of_batch() with AdamW, a short warm-up and a linear decay."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.01)
    name = name.removeprefix("unfinished-")
    for step in tqdm(range(steps), desc=f"pretraining the toy {name:7}", position=PRETRAINED.index(name)):
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 30, 1 - step / steps)
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def write_random(folder: Path, seed: int = 0) -> Path:
    """A LLaVA of random weights, so large that its output depends on every token and patch."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    text = TextConfig(**MISTRAL | {"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 2})
    model = Llava(LlavaConfig(VisionConfig(32, 64, 3, 2, 32, 8), text, image_token_id=text.vocab_size))
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=2 * p[0].numel() ** -0.5)
    model.save_pretrained(folder)
    Processor(tokenizer.to_str(), model.config).save_pretrained(folder)
    return folder


def write_clip(folder: Path, patch_size: int = 16, steps: int = 700, size: int = 6000, batch: int = 96,
               seed: int = 0) -> None:
    """A vision tower trained with CLIP's loss: which caption of the batch belongs to which image?"""
    torch.manual_seed(3 + 10 * seed)
    rng, words = random.Random(3), [*COUNTS, *COLORS, *SHAPES, *PLACES]
    scenes = [make_scene(rng) for _ in range(size)]
    pixels = torch.stack([torch.from_numpy(np.array(draw(s, rng))).permute(2, 0, 1) for s in scenes])
    texts = torch.tensor([[words.index(word) for word in scene.values()] for scene in scenes])
    config = replace(VISION, patch_size=patch_size)
    tower, bag_of_words = VisionTower(config), nn.EmbeddingBag(len(words), 48)
    project, scale = nn.Linear(VISION.hidden_size, 48, bias=False), nn.Parameter(torch.tensor(2.3))

    def loss_of_batch() -> torch.Tensor:
        pick = torch.randint(size, (batch,))
        states = tower(normalize(pixels[pick]), feature_layer=-1)
        seen = F.normalize(project(tower.post_layernorm(states[:, 0])), dim=-1)
        match = scale.exp() * seen @ F.normalize(bag_of_words(texts[pick]), dim=-1).T
        same = (texts[pick][:, None] == texts[pick]).all(-1).float()      # some captions are equal
        same = same / same.sum(1, keepdim=True)
        return F.cross_entropy(match, same) + F.cross_entropy(match.T, same)

    learning = nn.ModuleList([tower, bag_of_words, project])
    pretrain(loss_of_batch, [*learning.parameters(), scale], steps, folder.name)
    tensors = {rename_key(f"vision_tower.{name}", TO_HF).removeprefix("vision_tower."): tensor
               for name, tensor in tower.state_dict().items()}
    tensors |= {"text_model.embeddings.token_embedding.weight": bag_of_words.weight.detach(),
                "visual_projection.weight": project.weight.detach(), "logit_scale": scale.detach()}
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": {
        "model_type": "clip_vision_model", "hidden_act": "quick_gelu", **asdict(config)}})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_language(folder: Path, sizes: dict, tokenizer: Tokenizer, steps: int = 450,
                   batch: int = 32, seed: int = 0) -> None:
    """A decoder trained on descriptions of scenes, captions, questions and their answers."""
    torch.manual_seed(4 + 10 * seed)
    rng, text = random.Random(4 + 10 * seed), TextConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)
    processor = Processor(tokenizer.to_str(), LlavaConfig(
        text=text, image_token_id=text.vocab_size, template=TEMPLATE_OF[text.model_type]))
    model = LanguageModel(text)
    for name, p in model.named_parameters():
        if p.ndim == 2:                      # embeddings must be large beside what the layers add
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(p, std=1.0 if "embed" in name else (0.3 if deep else 1.0) * p.shape[1] ** -0.5)

    def loss_of_batch() -> torch.Tensor:
        rows = [make_text(rng, processor) for _ in range(batch)]
        ids, labels = (pad_sequence([torch.tensor(row[i]) for row in rows], batch_first=True,
                                    padding_value=padding) for i, padding in ((0, 0), (1, IGNORE)))
        learned = labels[:, 1:] != IGNORE
        logits = model.lm_head(model(model.embed_tokens(ids))[:, :-1][learned])
        return F.cross_entropy(logits, labels[:, 1:][learned])

    pretrain(loss_of_batch, model.parameters(), steps, folder.name)
    tensors = {rename_key(f"language_model.{name}", TO_HF).removeprefix("language_model."): tensor
               for name, tensor in model.state_dict().items()}
    write_json(folder / "config.json", asdict(text) | {
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2})
    write_json(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_text(rng: random.Random, processor: Processor) -> tuple[list[int], list[int]]:
    """A training text of the decoder: (ids, labels)."""
    scene = make_scene(rng)
    words = [scene["count"], scene["color"], noun(scene), scene["place"]]
    described = caption(scene) if rng.random() < 0.4 else " ".join(rng.sample(words, 4))
    if rng.random() < 0.3:
        before, after = processor.encode(described), processor.encode(caption(scene) + "\n")
        return [processor.bos, *before, *after], [IGNORE] * (1 + len(before)) + after
    asked = text_problem(rng) if rng.random() < 0.36 else image_problem(scene, rng)
    before = described + "\n" if asked["image"] else ""
    return processor.tokenize([{"role": "user", "content": before + question(asked | {"image": None})},
                               {"role": "assistant", "content": target_text(asked)}])


def make_tokenizer(size: int = 1000) -> Tokenizer:
    """A BPE with byte fallback like Mistral's: special tokens, 256 bytes, then learned tokens."""
    rng, corpus = random.Random(5), [f"{SYSTEM} USER: ASSISTANT: [INST] [/INST]"] * 9
    for _ in range(3000):
        asked = text_problem(rng), image_problem(scene := make_scene(rng), rng)
        corpus += [caption(scene), *(text(p) for p in asked for text in (question, target_text))]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[A-Za-z]+|▁|[^▁A-Za-z]"), "isolated")
    learner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size - 259, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
              *sorted(learned["vocab"], key=learned["vocab"].get)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)},
                                     [tuple(merge) for merge in learned["merges"]],
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = learner.normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def build(folder: Path, parts=("scienceqa", "pretrain", "coco", "clip", "mistral", "llama", "benchmarks"),
          patch_size: int = 16, seed: int = 0) -> None:
    """Build the parts that are missing, the pretrained models at the same time, each in a process of its
    own. A part appears complete or not at all. With patch_size 8 the vision tower has 64 patches instead
    of 16; `seed` is for the pretrained models."""
    torch.set_num_threads(1)                 # the matrices are too small for a second thread
    tokenizer = make_tokenizer()
    write = {"scienceqa": write_scienceqa, "pretrain": write_captions, "coco": write_coco,
             "clip": partial(write_clip, patch_size=patch_size, seed=seed),
             "mistral": partial(write_language, sizes=MISTRAL, tokenizer=tokenizer, seed=seed),
             "llama": partial(write_language, sizes=LLAMA, tokenizer=tokenizer, seed=seed),
             "benchmarks": write_benchmarks}
    missing = [(folder, part, write[part]) for part in parts if not (folder / part).exists()]
    pretrained = [job for job in missing if job[1] in PRETRAINED]
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=write_model, args=job, daemon=True) for job in pretrained]
    for process in processes:
        process.start()
    for job in missing:
        if job not in pretrained:
            write_part(*job)
    for process, (_, part, _) in zip(processes, pretrained):
        process.join()
        if process.exitcode:
            raise OSError(f"pretraining the toy {part} ended with exit code {process.exitcode}: start again")


def write_model(*job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C ends the main process, which ends this one
    write_part(*job)


def write_part(folder: Path, part: str, write) -> None:
    torch.set_num_threads(1)
    unfinished = folder / f"unfinished-{part}"
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished)
    unfinished.rename(folder / part)


# ---------------------------------------------------------------------------------------------
# `python train.py` without flags


def play(run_stage, parse, data=Path("data/toy"), runs=Path("runs/toy")) -> None:
    """The toy run, and whether its losses and accuracies lie within tests/reference.json."""
    run_toy(run_stage, parse, data, runs)
    print(check_run(runs)[1])


def run_toy(run_stage, parse, data: Path, runs: Path, seed: int = 0) -> None:
    """Train both stages, then answer the test questions, with each image and with it replaced by white.
    `seed` pretrains other toy models; the records and their order stay the same."""
    began = time.perf_counter()
    build(data, ("scienceqa", "pretrain", "clip", "mistral"), seed=seed)
    shutil.rmtree(runs, ignore_errors=True)
    for split in ("train", "val"):
        write_json(runs / f"{split}.json", [to_record(p) for p in read_scienceqa(data / "scienceqa", split)])
    for flags in (f"--stage 1 --vision {data}/clip --language {data}/mistral --lr 6e-3 --epochs 5 "
                  f"--data {data}/pretrain.json --images {data}/pretrain --out {runs}/stage1 --dtype float32",
                  f"--stage 2 --init {runs}/stage1 --lr 1e-3 --epochs 12 "
                  f"--data {runs}/train.json --images {data}/scienceqa/images/train --out {runs}/stage2 "
                  f"--val {runs}/val.json --val-images {data}/scienceqa/images/val --dtype float32"):
        print(f"\n$ python train.py {flags}")
        run_stage(parse(flags.split()))
    draw_losses([runs / "stage1", runs / "stage2"], runs / "loss.png")
    model = Llava.from_pretrained(runs / "stage2", dtype=torch.float32).eval()
    processor = Processor.from_pretrained(runs / "stage2", model.config)
    problems, tables = read_scienceqa(data / "scienceqa", "test"), {}
    for name, blank in (("image", False), ("white image", True)):
        answers = generate_answers(model, processor, problems, batch_size=64, max_new_tokens=48, blank=blank)
        tables[name] = score(problems, {p["id"]: text for p, text in answers})
    print_table(tables)
    result = {"IMG": tables["image"]["IMG"], "IMG_blank": tables["white image"]["IMG"],
              "Avg": tables["image"]["Avg"], "seconds": round(time.perf_counter() - began, 1)}
    write_json(runs / "result.json", result)
    print(f"{runs / 'result.json'}: {result}")


def draw_losses(runs: list[Path], file: Path, width: int = 420, height: int = 260) -> None:
    """Draw a panel per run: the loss of every step, pale, its running mean, and red the validation loss."""
    image = Image.new("RGB", (width * len(runs), height), "white")
    for i, folder in enumerate(runs):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines]
        validation = [(step, line["val_loss"]) for step, line in enumerate(lines) if "val_loss" in line]
        means = list(accumulate(losses, lambda mean, loss: mean + 0.1 * (loss - mean)))
        panel = Image.new("RGB", (width, height), "white")
        pen, right, bottom, top = ImageDraw.Draw(panel), width - 15, height - 25, max(losses)
        for points, color, thickness in ((enumerate(losses), "#c8d8f0", 1), (enumerate(means), "#2050b0", 2),
                                         (validation, "#c02020", 2)):
            pen.line([(50 + (right - 50) * step / len(losses), bottom - (bottom - 30) * value / top)
                      for step, value in points], color, thickness)
        pen.line([(50, 30), (50, bottom), (right, bottom)], "black")
        pen.text((50, 8), f"{folder.name}: loss, {len(losses)} steps, at the end {means[-1]:.3f}", "black")
        for share in (0.0, 0.5, 1.0):
            pen.text((12, bottom - (bottom - 30) * share - 6), f"{top * share:.2f}", "black")
        image.paste(panel, (i * width, 0))
    image.save(file)


# ---------------------------------------------------------------------------------------------
# The reference: losses and accuracies that `python train.py` reproduces on every machine

REFERENCE = Path(__file__).with_name("reference.json")
COMPARED_STEPS = 50


def read_run(runs: Path) -> dict[str, list[float]]:
    """The first losses of both stages and the accuracies in percent of a toy run."""
    found = {}
    for stage in ("stage1", "stage2"):
        lines = (runs / stage / "log.jsonl").read_text().splitlines()[:COMPARED_STEPS]
        found[f"{stage} loss"] = [json.loads(line)["loss"] for line in lines]
    result = read_json(runs / "result.json")
    return found | {name: [result[name]] for name in ("IMG", "IMG_blank", "Avg")}


def make_reference(runs: list[dict[str, list[float]]]) -> dict:
    """The values of the first run, and as tolerance twice the largest distance of any other run from it;
    for losses the largest within three steps before and after, for accuracies at least 5 points."""
    reference = {}
    for name, values in runs[0].items():
        distances = [max(abs(run[name][i] - value) for run in runs[1:]) for i, value in enumerate(values)]
        tolerance = [2 * max(distances[max(0, i - 3):i + 4]) for i in range(len(values))]
        if not name.endswith("loss"):
            tolerance = [max(5.0, tolerance[0])]
        reference[name] = {"values": [round(value, 4) for value in values],
                           "tolerance": [round(value, 4) for value in tolerance]}
    return reference


def deviations(run: dict[str, list[float]], reference: dict) -> list[str]:
    """The first value of each curve that is missing or outside its tolerance."""
    found = []
    for name, expected in reference.items():
        for i, (value, tolerance) in enumerate(zip(expected["values"], expected["tolerance"])):
            step = f" of step {i + 1}" if len(expected["values"]) > 1 else ""
            if i >= len(run[name]):
                found.append(f"{name}{step} is missing")
                break
            if not abs(run[name][i] - value) <= tolerance:   # also true for nan
                found.append(f"{name}{step} is {run[name][i]:.4g} instead of {value:.4g} ± {tolerance:.2g}")
                break
    return found


def check_run(runs: Path, file: Path = REFERENCE) -> tuple[bool, str]:
    """Whether a toy run lies within the tolerances of reference.json, and the sentence that says so."""
    content = read_json(file)
    if wrong := deviations(read_run(runs), content["curves"]):
        return False, f"outside of tests/{file.name}: {'; '.join(wrong)}"
    return True, (f"within tests/{file.name}: the first {COMPARED_STEPS} losses of both stages and the "
                  f"accuracies, with tolerances from {content['seeds']} seeds")


def record_reference(seeds: int) -> None:
    """Run `python train.py` once for each seed of the pretrained toy models, which on another machine are
    different, too, and write reference.json. Finished runs in runs/reference are not repeated."""
    from train import parse, run_stage
    folders = [Path("runs/reference", str(seed)) for seed in range(seeds)]
    for seed, runs in enumerate(folders):
        if not (runs / "result.json").exists():
            run_toy(run_stage, parse, Path("data/reference", str(seed)), runs, seed)
    write_json(REFERENCE, {
        "made by": f"python tests/toy.py --reference {seeds}", "torch": torch.__version__, "seeds": seeds,
        "curves": make_reference([read_run(runs) for runs in folders])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, nargs="?", default=Path("data/toy"), help="to build (default: %(default)s)")
    add("--check", type=Path, metavar="RUNS", help="compare a finished `python train.py` with reference.json")
    add("--reference", type=int, metavar="SEEDS", help="write reference.json from that many runs")
    add("--teacher", type=int, metavar="PORT", help="serve the toy teacher of prune.py --generate")
    args = parser.parse_args()
    if args.teacher is not None:
        return Teacher(args.teacher).serve_forever()
    if args.check:
        within, sentence = check_run(args.check)
        print(sentence)
        sys.exit(0 if within else 1)
    if args.reference:
        return record_reference(args.reference)
    build(args.folder)


if __name__ == "__main__":
    command_line(main)
