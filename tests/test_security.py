"""Tests of the README's section on security."""

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
from tests.test_bad_input import make_png

ROOT = Path(__file__).resolve().parent.parent
TREES = {name: ast.parse((ROOT / name).read_text())
         for name in ("llava.py", "train.py", "eval.py", "prune.py")}


def calls() -> list[tuple[str, str, ast.Call]]:
    """Return (file and line, dotted name, syntax node) of every call in the four programs."""
    return [(f"{file}:{node.lineno}", ast.unparse(node.func), node) for file, tree in TREES.items()
            for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imports() -> set[str]:
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
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def save_bare_pickle(content, file: Path) -> None:
    file.write_bytes(pickle.dumps(content))


def test_files_in_the_older_format_of_torch_are_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    assert llava.open_file(tmp_path / "a.bin")["a"].tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin", "non_lora_trainables.bin",
                                  "adapter_model.bin"])
@pytest.mark.parametrize("save", [torch.save, save_bare_pickle], ids=["zip", "bare"])
def test_no_pickle_is_executed(save, name, random_model, tmp_path):
    (tmp_path / "config.json").write_text((random_model / "config.json").read_text())
    if name == "adapter_model.bin":
        adapter = '{"r": 1, "lora_alpha": 1, "base_model_name_or_path": "b"}'
        (tmp_path / "adapter_config.json").write_text(adapter)
    save({"a": Payload(tmp_path / "executed")}, tmp_path / name)
    with pytest.raises((OSError, UserError), match=name):
        Llava.from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()
    assert not {"pickle.load", "pickle.loads", "joblib.load"} & {function for _, function, _ in calls()}
    for where, function, node in calls():
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert function != "torch.load" or arguments.get("weights_only") == "True", where
        assert "allow_pickle" not in arguments, where


@pytest.mark.parametrize("image", ["../secret.png", "a/../../secret.png", "/etc/passwd", "..",
                                   "./../secret.png"])
def test_no_image_outside_the_image_folder_is_opened(image, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda file, *_: pytest.fail(f"{file} is opened"))
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
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
    """A thin image counts too: padded to a square, or enlarged and cropped, it would need gigabytes."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail(f"{image.size} is decoded"))
    (tmp_path / "bomb.png").write_bytes(make_png(width, height))
    with pytest.raises(OSError, match="bomb.png is not a readable image"):
        llava.open_image(tmp_path / "bomb.png")


def test_no_image_starts_a_process(tmp_path, monkeypatch):
    """Pillow would decode EPS with Ghostscript."""
    for name in ("Popen", "run", "check_call", "call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("a program is called"))
    lines = ["%!PS-Adobe-3.0 EPSF-3.0", "%%BoundingBox: 0 0 10 10", "%%EndComments", "showpage", "%%EOF"]
    (tmp_path / "image.png").write_text("\n".join(lines))
    with pytest.raises(OSError, match="image.png is not a readable image: EPS"):
        llava.open_image(tmp_path / "image.png")


def test_no_remote_code_is_downloaded_or_executed(monkeypatch, tmp_path):
    for where, function, node in calls():
        assert function not in ("eval", "exec", "compile", "__import__", "importlib.import_module"), where
        assert "trust_remote_code" not in {keyword.arg for keyword in node.keywords}, where
    assert not {"transformers", "importlib", "runpy", "marshal", "shelve", "dill", "code"} & imports()
    patterns = []

    def download(repo, allow_patterns, **_):
        patterns.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr(llava, "snapshot_download", download)
    for weights in (True, False):
        llava.fetch("nobody/a-model", weights)
    assert patterns
    for pattern in patterns:
        assert Path(pattern).suffix in (".json", ".safetensors", ".bin") or pattern == "adapter_model.*"


def test_no_shell_is_used():
    for where, function, node in calls():
        assert function not in ("os.system", "os.popen", "pty.spawn"), where
        assert not function.startswith("os.exec"), where
        assert "shell" not in {keyword.arg for keyword in node.keywords}, where
        if function.startswith("subprocess.") and function != "subprocess.TimeoutExpired":
            assert isinstance(node.args[0], ast.List), f"{where}: the command must be a list of arguments"


class EchoHandler(BaseHTTPRequestHandler):
    """Reply with the headers of the request as the body, and with the class's status."""
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


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 429, 500])
def test_api_key_is_never_printed(status, monkeypatch, capsys, caplog):
    """The key stays hidden even if the server's reply contains it."""
    key = "sk-a-secret-key"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (EchoHandler,), {"status": status}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, messages = f"http://127.0.0.1:{server.server_port}/v1", [{"role": "user", "content": "x"}]
    try:
        with pytest.raises((UserError, OSError)) as error:
            evaluation.chat(url, "a-model", messages)
    finally:
        server.shutdown()
        server.server_close()
    printed = capsys.readouterr()
    assert key not in str(error.value) + repr(error.value) + printed.out + printed.err + caplog.text


def test_api_key_is_read_in_one_place_and_is_no_flag():
    reads = {where for where, function, node in calls()
             if "API_KEY" in ast.unparse(node) and "environ" in function}
    assert len(reads) == 1
    for module in (llava, train, evaluation, prune):
        assert "--api-key" not in Path(module.__file__).read_text()
