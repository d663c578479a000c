"""A test for each line of the README's section on security."""

import ast
import os
import pickle
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFile

import eval as evaluation
import llava
import prune
import train
from llava import Llava, UserError
from tests import toy
from tests.test_bad_input import png_of

ROOT = Path(__file__).resolve().parent.parent
TREES = {name: ast.parse((ROOT / name).read_text()) for name in ("llava.py", "train.py", "eval.py", "prune.py")}


def calls() -> list[tuple[str, str, ast.Call]]:
    """(file and line, dotted name, node) of every call in the four files."""
    return [(f"{file}:{node.lineno}", ast.unparse(node.func), node) for file, tree in TREES.items()
            for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imported() -> set[str]:
    names = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    return names


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    return toy.write_random(tmp_path_factory.mktemp("random") / "model")


class Payload:
    """A pickled object that would create a file when it is loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin", "non_lora_trainables.bin",
                                  "adapter_model.bin"])
@pytest.mark.parametrize("save", [torch.save, lambda content, file: Path(file).write_bytes(pickle.dumps(content))],
                         ids=["zip", "bare"])
def test_no_pickle_is_executed(save, name, random_model, tmp_path):
    config = (random_model / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    if name == "adapter_model.bin":
        (tmp_path / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1, "base_model_name_or_path": "b"}')
    save({"a": Payload(tmp_path / "executed")}, tmp_path / name)
    with pytest.raises((OSError, UserError), match=name):
        Llava.from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()
    assert not {"pickle.load", "pickle.loads", "joblib.load"} & {name for _, name, _ in calls()}
    for where, name, node in calls():
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert name != "torch.load" or words.get("weights_only") == "True", where
        assert "allow_pickle" not in words, where


@pytest.mark.parametrize("image", ["../secret.png", "a/../../secret.png", "/etc/passwd", "..", "./../secret.png"])
def test_no_path_outside_the_image_folder_is_opened(image, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda file, *_: pytest.fail(f"{file} is opened"))
    toy_image = Image.new("RGB", (8, 8))
    toy_image.save(tmp_path / "secret.png")
    (tmp_path / "images/a").mkdir(parents=True)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Red."}]
    llava.write_json(tmp_path / "records.json", [{"id": 1, "image": image, "conversations": turns}])
    with pytest.raises(UserError, match="outside"):
        train.read_records(tmp_path / "records.json", tmp_path / "images")
    toy.write_scienceqa(tmp_path / "scienceqa", sizes=(("test", 3),))
    problems = llava.read_json(tmp_path / "scienceqa/problems.json")
    for changes in ({"image": image}, {"image": "image.png", "split": image}):
        changed = {name: problem | changes for name, problem in problems.items()}
        llava.write_json(tmp_path / "scienceqa/problems.json", changed)
        with pytest.raises(UserError, match="question 1"):
            evaluation.read_scienceqa(tmp_path / "scienceqa", "test")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 7, None])
def test_no_shard_outside_the_checkpoint_is_opened(shard, random_model, tmp_path):
    (tmp_path / "config.json").write_text((random_model / "config.json").read_text())
    llava.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": shard}})
    with pytest.raises(UserError, match="same folder"):
        Llava.from_pretrained(tmp_path)


@pytest.mark.parametrize("width, height", [(60_000, 60_000), (20_000, 20_000), (1, 100_000), (200_000, 1)])
def test_no_decompression_bomb_is_decoded(width, height, tmp_path, monkeypatch):
    """Nor an image whose square, or whose enlarged center, would take gigabytes."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail(f"{image.size} is decoded"))
    (tmp_path / "bomb.png").write_bytes(png_of(width, height))
    with pytest.raises(OSError, match="bomb.png is not a readable image"):
        llava.open_image(tmp_path / "bomb.png")


def test_no_image_runs_a_program(tmp_path, monkeypatch):
    """Pillow decodes EPS by calling Ghostscript."""
    for name in ("Popen", "run", "check_call", "call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("a program is called"))
    lines = ["%!PS-Adobe-3.0 EPSF-3.0", "%%BoundingBox: 0 0 10 10", "%%EndComments", "showpage", "%%EOF"]
    (tmp_path / "image.png").write_text("\n".join(lines))
    with pytest.raises(OSError, match="image.png is not a readable image: EPS"):
        llava.open_image(tmp_path / "image.png")


def test_no_remote_code_is_downloaded_or_executed(monkeypatch, tmp_path):
    for where, name, node in calls():
        assert name not in ("eval", "exec", "compile", "__import__", "importlib.import_module"), where
        assert "trust_remote_code" not in {word.arg for word in node.keywords}, where
    assert not {"transformers", "importlib", "runpy", "marshal", "shelve", "dill", "code"} & imported()
    patterns = []

    def download(repo, allow_patterns, **_):
        patterns.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr(llava, "snapshot_download", download)
    for weights in (True, False):
        llava.fetch("nobody/a-model", weights)
    assert patterns and all(Path(pattern).suffix in (".json", ".safetensors", ".bin") or pattern == "adapter_model.*"
                            for pattern in patterns)


def test_no_shell_is_used():
    for where, name, node in calls():
        assert name not in ("os.system", "os.popen", "pty.spawn") and not name.startswith("os.exec"), where
        assert "shell" not in {word.arg for word in node.keywords}, where
        if name.startswith("subprocess.") and name != "subprocess.TimeoutExpired":
            assert isinstance(node.args[0], ast.List), f"{where}: a list of words needs no shell"


class Judge(BaseHTTPRequestHandler):
    """A server that repeats every header it gets, with the status that its class names."""
    status = 200

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = str(self.headers).encode()
        self.send_response(self.status, "no")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.skipif(not hasattr(evaluation, "chat"), reason="no requests are made yet")
@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 429, 500])
def test_keys_are_never_shown(status, monkeypatch, capsys, caplog):
    """Not even when the server repeats them in its answer."""
    key = "sk-a-secret-key"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (Judge,), {"status": status}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises((UserError, OSError)) as error:
            evaluation.chat(f"http://127.0.0.1:{server.server_port}/v1", "a-model", [{"role": "user", "content": "x"}])
    finally:
        server.shutdown()
        server.server_close()
    shown = capsys.readouterr()
    assert key not in str(error.value) + repr(error.value) + shown.out + shown.err + caplog.text


def test_the_key_is_read_from_the_environment_in_one_place_and_is_no_flag():
    reads = {where for where, name, node in calls() if "API_KEY" in ast.unparse(node) and "environ" in name}
    assert len(reads) <= 1
    for module in (llava, train, evaluation, prune):
        assert "--api-key" not in Path(module.__file__).read_text()
