"""Toy data: the data sets and models of a real run, 10,000 times smaller, in the same file layouts.

    python tests/toy.py data/toy

writes these files from a seed, in one or two minutes on two cores:

    scienceqa/        problems.json, pid_splits.json, images/{split}/{id}/image.png
    pretrain.json     captions for stage 1, their images in pretrain/
    coco/             captions_train2014.json and instances_train2014.json, their images in train2014/
    clip/             a vision tower, pretrained to match images and captions
    benchmarks/       VQAv2, TextVQA, POPE, MME, MMBench and LLaVA-Bench in their published formats
    mistral/ llama/   two language models of equal depth, pretrained on text alone

An image shows one to three shapes of one color on one side of a map. The language models can answer
questions about a scene that is described in text, but were not trained on images. The vision tower was
not trained on questions. train.py connects them. Questions that are answered correctly only with the real
image show that the model uses it.
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
    """A random scene: one to three equal shapes in one place."""
    return {"count": rng.choice(COUNTS), "color": rng.choice(list(COLORS)),
            "shape": rng.choice(SHAPES), "place": rng.choice(list(PLACES))}


def draw(scene: dict[str, str], rng: random.Random, boxes: list | None = None) -> Image.Image:
    """An image of the scene on a light background; the box of each shape is added to `boxes`."""
    image = Image.new("RGB", (64, 64), tuple(rng.randint(215, 255) for _ in range(3)))
    pen, count, angle = ImageDraw.Draw(image), COUNTS.index(scene["count"]) + 1, rng.random() * math.tau
    for i in range(count):
        r = rng.randint(8, 10) if count == 1 else rng.randint(6, 7)       # half the size of the shape
        x, y = (center + rng.randint(-2, 2) for center in PLACES[scene["place"]])
        if count > 1:                        # several shapes lie on a circle around the place
            x += round(9 * math.cos(angle + math.tau * i / count))
            y += round(9 * math.sin(angle + math.tau * i / count))
        if boxes is not None:                # in COCO's format: [x, y, width, height]
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
    if scene["count"] == "one":
        return scene["shape"]
    return scene["shape"] + ("es" if scene["shape"] == "cross" else "s")


def caption(scene: dict[str, str]) -> str:
    return f"{scene['count']} {scene['color']} {noun(scene)} in the {scene['place']}"


# ---------------------------------------------------------------------------------------------
# Questions, as in ScienceQA

WORDS = {"noun": "cat dog tree house river stone apple lamp chair bird fish cloud".split(),
         "verb": "run jump sing eat sleep write swim read walk laugh".split(),
         "adjective": "happy tall cold quiet heavy bright soft clean brave old".split()}
SUBSTANCES = {"solid": "iron wood ice glass sand salt".split(),
              "liquid": "milk water oil juice honey rain".split(),
              "gas": "air steam oxygen smoke helium wind".split()}
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
MAP = "On a map north is up and east is right."


def problem(subject, topic, skill, grade, text, choices, answer, solution, lecture="", hint="") -> dict:
    """A problem with ScienceQA's keys; `text` is the question, `answer` the correct choice."""
    choices = list(choices)
    return {"question": text, "choices": choices, "answer": choices.index(answer), "hint": hint,
            "image": None, "task": "closed choice", "grade": f"grade{grade}",
            "subject": f"{subject} science", "topic": topic, "category": skill.split()[0].capitalize(),
            "skill": skill, "lecture": lecture, "solution": solution}


def image_problem(scene: dict[str, str], rng: random.Random) -> dict:
    """A question that cannot be answered without the image."""
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
    """A question without an image."""
    kind, state, wind = rng.choice(list(WORDS)), rng.choice(list(SUBSTANCES)), rng.choice(list(PLACES))
    word, substance = rng.choice(WORDS[kind]), rng.choice(SUBSTANCES[state])
    return rng.choice((
        problem("language", "grammar", "Classify words", 3, f"What kind of word is {word}?", WORDS, kind,
                f"The word {word} is a kind of {kind}.",
                "A noun names, a verb acts, an adjective describes."),
        problem("natural", "chemistry", "Classify matter", 5, f"Is {substance} a solid, a liquid or a gas?",
                SUBSTANCES, state, f"Usually {substance} is a {state}."),
        problem("social", "geography", "Find directions", 7, f"Which way is opposite to {wind}?",
                PLACES, OPPOSITE[wind], f"Opposite to {wind} is {OPPOSITE[wind]}.", MAP),
        problem("natural", "weather", "Name winds", 9, "Where does the wind come from?", PLACES, wind,
                f"The wind comes from the {wind}.", "A wind is named after where it comes from.",
                hint=f"Today the {wind} wind blows over the {rng.choice(WORDS['noun'])}.")))


def write_scienceqa(folder: Path, sizes=(("train", 1272), ("val", 100), ("test", 424))) -> None:
    """Write problems.json, pid_splits.json and images/ in ScienceQA's layout."""
    rng, problems, splits = random.Random(1), {}, {}
    for split, size in sizes:
        splits[split] = [str(len(problems) + i + 1) for i in range(size)]
        for pid in splits[split]:
            if rng.random() < 0.5:           # about half of the problems have an image, as in ScienceQA
                scene = make_scene(rng)
                problems[pid] = image_problem(scene, rng) | {"split": split}
                image_folder = folder / "images" / split / pid
                image_folder.mkdir(parents=True)
                draw(scene, rng).save(image_folder / "image.png")
            else:
                problems[pid] = text_problem(rng) | {"split": split}
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", splits)


def write_captions(folder: Path, size: int = 6000) -> None:
    """Write images into the folder, and their captions to pretrain.json in its parent folder."""
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
    """Write scenes in COCO's layout: captions_train2014.json, instances_train2014.json, train2014/."""
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
    """A local HTTP server with the interface of a text-only language model: it answers from the captions and
    boxes in a request. `prompts` lists the last message of each request, `edit(text)` returns the reply that
    is sent instead of `text`, and `status` is the HTTP status of all replies."""

    def __init__(self, port: int = 0, edit=str):
        super().__init__(("127.0.0.1", port), TeacherHandler)
        self.prompts, self.edit, self.status = [], edit, 200
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class TeacherHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.prompts.append(body["messages"][-1]["content"])
        text = self.server.edit(make_reply(body["messages"][0]["content"], body["messages"][-1]["content"]))
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": text},
                                         "finish_reason": "stop"}]}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_) -> None:
        pass


def make_reply(system: str, symbolic: str) -> str:
    """The kind of reply that the system message requests, from the captions and boxes in `symbolic`."""
    captions, _, boxes = symbolic.partition("\n\n")
    words = captions.split()
    count, color, place = (next(word for word in words if word in names)
                           for names in (COUNTS, COLORS, PLACES))
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
    return "\n===\n".join(f"Question:\n{text}\n===\nAnswer:\n{answer}" for text, answer in pairs)


# ---------------------------------------------------------------------------------------------
# The other benchmarks, each in its published file formats


def write_lines(file: Path, entries: list[dict]) -> None:
    """Write a JSON Lines file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def write_benchmarks(folder: Path, size: int = 12) -> None:
    """Write questions, annotations and images of VQAv2, TextVQA, POPE, MME, MMBench and LLaVA-Bench."""
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
        variants = (("conv", "What color do you see?", scene["color"]),
                    ("detail", "Describe this image.", caption(scene)),
                    ("complex", "Why a map?", f"It shows the {scene['place']}."))
        kind, text, reference = variants[i % 3]
        questions.append({"question_id": i, "image": name, "text": text, "category": kind})
        references.append({"question_id": i, "prompt": text, "answer_id": f"r{i}", "text": reference})
    write_lines(folder / "llavabench/questions.jsonl", questions)
    write_lines(folder / "llavabench/answers_gpt4.jsonl", references)
    write_lines(folder / "llavabench/context.jsonl", [
        {"id": name[:-4], "image": name, "caption": caption(scene)} for name, scene in scenes.items()])


def write_short_answers(folder: Path, scenes: dict[str, dict]) -> None:
    """Write VQAv2 and TextVQA: each question has ten human answers."""
    questions, annotations, textvqa_questions, textvqa_data = [], [], [], []
    for i, (name, scene) in enumerate(scenes.items(), 1):
        variants = (("other", "What color is it?", scene["color"]),
                    ("number", "How many?", scene["count"]),
                    ("yes/no", "Is it red?", "yes" if scene["color"] == "red" else "no"))
        kind, text, correct = variants[i % 3]
        answers = [correct] * 7 + ["none", f"a {correct}", f"{correct}."]
        questions.append({"image_id": i, "question": text, "question_id": 1000 * i})
        annotations.append({"question_id": 1000 * i, "image_id": i, "answer_type": kind,
                            "question_type": text, "multiple_choice_answer": correct, "answers": [
                                {"answer": answer, "answer_confidence": "yes", "answer_id": n}
                                for n, answer in enumerate(answers, 1)]})
        textvqa_questions.append({
            "question_id": name[:-4], "image": name, "category": "default",
            "text": f"{text}\nReference OCR token: {scene['shape']}{SHORT_SUFFIX}"})
        textvqa_data.append({"question": text.lower(), "image_id": name[:-4], "question_id": i,
                             "answers": answers})
    head = {"data_type": "mscoco", "data_subtype": "val2014", "task_type": "Open-Ended"}
    write_json(folder / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", head | {"questions": questions})
    write_json(folder / "vqav2/v2_mscoco_val2014_annotations.json", head | {"annotations": annotations})
    write_lines(folder / "textvqa/llava_textvqa_val_v051_ocr.jsonl", textvqa_questions)
    write_json(folder / "textvqa/TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": textvqa_data})


def write_yes_no(folder: Path, scenes: dict[str, dict], rng: random.Random) -> None:
    """Write POPE and MME: each image has one question with the answer yes and one with the answer no."""
    pope_questions, labels = [], {}
    for n, kind in enumerate(("adversarial", "random", "popular")):
        labels[kind] = []
        for name, scene in scenes.items():
            absent = rng.choice([shape for shape in SHAPES if shape != scene["shape"]])
            for shape, label in ((scene["shape"], "yes"), (absent, "no")):
                labels[kind].append({"question_id": len(labels[kind]) + 1, "image": name, "label": label,
                                     "text": f"Is there a {shape} in the image?"})
        for i, entry in enumerate(labels[kind], 1):
            pope_questions.append({"question_id": 10**7 * n + i, "image": entry["image"], "category": kind,
                                   "text": entry["text"] + SHORT_SUFFIX})
        write_lines(folder / f"pope/coco_pope_{kind}.json", labels[kind])
    write_lines(folder / "pope/llava_pope_test.jsonl", pope_questions)
    mme_questions = []
    for task in ("color", "code_reasoning"):
        (folder / "mme" / task).mkdir(parents=True)
        for entry in labels["random"]:
            image = f"{task}/{entry['image']}"
            mme_questions.append({"question_id": image, "image": image, "category": task,
                                  "text": entry["text"] + SHORT_SUFFIX})
            shutil.copy(folder / "val2014" / entry["image"], folder / "mme" / image)
            with open((folder / "mme" / image).with_suffix(".txt"), "a", encoding="utf-8") as file:
                file.write(f"{entry['text']} Please answer yes or no.\t{entry['label'].capitalize()}\n")
    write_lines(folder / "mme/llava_mme.jsonl", mme_questions)


def write_mmbench(folder: Path, scenes: dict[str, dict], rng: random.Random) -> None:
    """Write MMBench: a .tsv file with each question twice, with its options in two orders."""
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
    path = folder / "mmbench/mmbench_dev_20230712.tsv"
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t")
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
    """Write a LLaVA with random weights that are so large that the output depends on every token and patch;
    return the folder."""
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
    """Write a vision tower trained with CLIP's contrastive loss on images and captions."""
    torch.manual_seed(3 + 10 * seed)
    rng, words = random.Random(3), [*COUNTS, *COLORS, *SHAPES, *PLACES]
    scenes = [make_scene(rng) for _ in range(size)]
    pixels = torch.stack([torch.from_numpy(np.array(draw(s, rng))).permute(2, 0, 1) for s in scenes])
    texts = torch.tensor([[words.index(word) for word in scene.values()] for scene in scenes])
    config = replace(VISION, patch_size=patch_size)
    tower, bag_of_words = VisionTower(config), nn.EmbeddingBag(len(words), 48)
    project, scale = nn.Linear(VISION.hidden_size, 48, bias=False), nn.Parameter(torch.tensor(2.3))

    def loss_of_batch() -> torch.Tensor:
        indices = torch.randint(size, (batch,))
        states = tower(normalize(pixels[indices]), feature_layer=-1)
        image_features = F.normalize(project(tower.post_layernorm(states[:, 0])), dim=-1)
        text_features = F.normalize(bag_of_words(texts[indices]), dim=-1)
        logits = scale.exp() * image_features @ text_features.T
        targets = (texts[indices][:, None] == texts[indices]).all(-1).float()   # some captions are equal
        targets = targets / targets.sum(1, keepdim=True)
        return F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)

    modules = nn.ModuleList([tower, bag_of_words, project])
    pretrain(loss_of_batch, [*modules.parameters(), scale], steps, folder.name)
    tensors = {rename_key(f"vision_tower.{name}", TO_HF).removeprefix("vision_tower."): tensor
               for name, tensor in tower.state_dict().items()}
    tensors |= {"text_model.embeddings.token_embedding.weight": bag_of_words.weight.detach(),
                "visual_projection.weight": project.weight.detach(), "logit_scale": scale.detach()}
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": {
        "model_type": "clip_vision_model", "hidden_act": "quick_gelu", **asdict(config)}})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_language(folder: Path, sizes: dict, tokenizer: Tokenizer, steps: int = 450,
                   batch: int = 32, seed: int = 0) -> None:
    """Write a language model trained on descriptions of scenes, captions, questions and their answers."""
    torch.manual_seed(4 + 10 * seed)
    rng, text = random.Random(4 + 10 * seed), TextConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)
    processor = Processor(tokenizer.to_str(), LlavaConfig(
        text=text, image_token_id=text.vocab_size, template=TEMPLATE_OF[text.model_type]))
    model = LanguageModel(text)
    for name, p in model.named_parameters():
        if p.ndim == 2:                      # the layers' outputs must be small relative to the embeddings
            std = 1.0 if "embed" in name else p.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std = 0.3 * std
            nn.init.normal_(p, std=std)

    def loss_of_batch() -> torch.Tensor:
        rows = [make_text(rng, processor) for _ in range(batch)]
        ids = pad_sequence([torch.tensor(row_ids) for row_ids, _ in rows], batch_first=True)
        labels = pad_sequence([torch.tensor(row_labels) for _, row_labels in rows], batch_first=True,
                              padding_value=IGNORE)
        supervised = labels[:, 1:] != IGNORE
        logits = model.lm_head(model(model.embed_tokens(ids))[:, :-1][supervised])
        return F.cross_entropy(logits, labels[:, 1:][supervised])

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
    """Token ids and labels of a training text: a description of a scene and then its caption, or a question
    and its answer, with a description in place of an image."""
    scene = make_scene(rng)
    words = [scene["count"], scene["color"], noun(scene), scene["place"]]
    description = caption(scene) if rng.random() < 0.4 else " ".join(rng.sample(words, 4))
    if rng.random() < 0.3:
        prompt, target = processor.encode(description), processor.encode(caption(scene) + "\n")
        return [processor.bos, *prompt, *target], [IGNORE] * (1 + len(prompt)) + target
    p = text_problem(rng) if rng.random() < 0.36 else image_problem(scene, rng)
    context = description + "\n" if p["image"] else ""
    return processor.tokenize([{"role": "user", "content": context + question(p | {"image": None})},
                               {"role": "assistant", "content": target_text(p)}])


def make_tokenizer(size: int = 1000) -> Tokenizer:
    """A BPE tokenizer with byte fallback, like Mistral's: special tokens, 256 bytes, then merged tokens."""
    rng, corpus = random.Random(5), [f"{SYSTEM} USER: ASSISTANT: [INST] [/INST]"] * 9
    for _ in range(3000):
        p, scene = text_problem(rng), make_scene(rng)
        corpus += [caption(scene), question(p), target_text(p)]
        p = image_problem(scene, rng)
        corpus += [question(p), target_text(p)]
    plain = Tokenizer(models.BPE())          # without special tokens and bytes
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[A-Za-z]+|▁|[^▁A-Za-z]"), "isolated")
    plain.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size - 259, show_progress=False))
    bpe = json.loads(plain.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
              *sorted(bpe["vocab"], key=bpe["vocab"].get)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)},
                                     [tuple(merge) for merge in bpe["merges"]],
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = plain.normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def build(folder: Path, parts=("scienceqa", "pretrain", "coco", "clip", "mistral", "llama", "benchmarks"),
          patch_size: int = 16, seed: int = 0) -> None:
    """Build the missing parts; the models are pretrained in parallel, one process each. With patch_size 8 the
    vision tower has 64 patches instead of 16; `seed` changes only the pretrained models."""
    torch.set_num_threads(1)                 # a second thread does not speed up such small matrices
    tokenizer = make_tokenizer()
    writers = {"scienceqa": write_scienceqa, "pretrain": write_captions, "coco": write_coco,
               "clip": partial(write_clip, patch_size=patch_size, seed=seed),
               "mistral": partial(write_language, sizes=MISTRAL, tokenizer=tokenizer, seed=seed),
               "llama": partial(write_language, sizes=LLAMA, tokenizer=tokenizer, seed=seed),
               "benchmarks": write_benchmarks}
    missing = [(folder, part, writers[part]) for part in parts if not (folder / part).exists()]
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # at Ctrl-C the main process stops this one
    write_part(*job)


def write_part(folder: Path, part: str, write) -> None:
    """Write a part to a temporary folder, and rename the folder when the part is complete."""
    torch.set_num_threads(1)
    unfinished = folder / f"unfinished-{part}"
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished)
    unfinished.rename(folder / part)


# ---------------------------------------------------------------------------------------------
# `python train.py` without flags


def run_and_check(run_stage, parse, data=Path("data/toy"), runs=Path("runs/toy")) -> None:
    """Run the toy run, and print whether its losses and accuracies are within tests/reference.json."""
    run_toy(run_stage, parse, data, runs)
    print(check_run(runs)[1])


def run_toy(run_stage, parse, data: Path, runs: Path, seed: int = 0) -> None:
    """Train both stages, then answer the test questions, with each image and with it replaced by white.
    `seed` changes only the pretrained toy models, not the records or their order."""
    start = time.perf_counter()
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
              "Avg": tables["image"]["Avg"], "seconds": round(time.perf_counter() - start, 1)}
    write_json(runs / "result.json", result)
    print(f"{runs / 'result.json'}: {result}")


def draw_losses(runs: list[Path], file: Path) -> None:
    """Draw one panel per run: loss of each step (light blue), running mean (blue), validation loss (red)."""
    width, height = 420, 260                 # of a panel, in pixels
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
        for fraction in (0.0, 0.5, 1.0):
            pen.text((12, bottom - (bottom - 30) * fraction - 6), f"{top * fraction:.2f}", "black")
        image.paste(panel, (i * width, 0))
    image.save(file)


# ---------------------------------------------------------------------------------------------
# The reference: losses and accuracies of `python train.py`, with tolerances for other machines

REFERENCE = Path(__file__).with_name("reference.json")
COMPARED_STEPS = 50


def read_run(runs: Path) -> dict[str, list[float]]:
    """The first losses of both stages and the accuracies in percent of a toy run."""
    curves = {}
    for stage in ("stage1", "stage2"):
        lines = (runs / stage / "log.jsonl").read_text().splitlines()[:COMPARED_STEPS]
        curves[f"{stage} loss"] = [json.loads(line)["loss"] for line in lines]
    result = read_json(runs / "result.json")
    return curves | {name: [result[name]] for name in ("IMG", "IMG_blank", "Avg")}


def make_reference(runs: list[dict[str, list[float]]]) -> dict:
    """The values of the first run and their tolerances: twice the largest difference between the first and
    another run, for losses within three steps before and after, for accuracies at least 5 points."""
    reference = {}
    for name, values in runs[0].items():
        differences = [max(abs(run[name][i] - value) for run in runs[1:]) for i, value in enumerate(values)]
        tolerance = [2 * max(differences[max(0, i - 3):i + 4]) for i in range(len(values))]
        if not name.endswith("loss"):
            tolerance = [max(5.0, tolerance[0])]
        reference[name] = {"values": [round(value, 4) for value in values],
                           "tolerance": [round(value, 4) for value in tolerance]}
    return reference


def deviations(run: dict[str, list[float]], reference: dict) -> list[str]:
    """A message for the first value of each curve that is missing or outside its tolerance."""
    errors = []
    for name, expected in reference.items():
        for i, (value, tolerance) in enumerate(zip(expected["values"], expected["tolerance"])):
            step = f" of step {i + 1}" if len(expected["values"]) > 1 else ""
            if i >= len(run[name]):
                errors.append(f"{name}{step} is missing")
                break
            if not abs(run[name][i] - value) <= tolerance:   # also true for nan
                errors.append(f"{name}{step} is {run[name][i]:.4g} instead of {value:.4g} ± {tolerance:.2g}")
                break
    return errors


def check_run(runs: Path, file: Path = REFERENCE) -> tuple[bool, str]:
    """Whether a toy run is within the tolerances of reference.json, and a sentence with the result."""
    content = read_json(file)
    if errors := deviations(read_run(runs), content["curves"]):
        return False, f"outside of tests/{file.name}: {'; '.join(errors)}"
    return True, (f"within tests/{file.name}: the first {COMPARED_STEPS} losses of both stages and the "
                  f"accuracies, with tolerances from {content['seeds']} seeds")


def record_reference(seeds: int) -> None:
    """Run `python train.py` once per seed, and write reference.json. The seed changes the pretrained toy
    models, because they also differ between machines. Finished runs in runs/reference are not repeated."""
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
    add("folder", type=Path, nargs="?", default=Path("data/toy"), help="for the data (default: %(default)s)")
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
