"""The upload to the Hugging Face Hub, to a stand-in on this machine."""

from __future__ import annotations

import base64
import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from conftest import SMALL
from huggingface_hub import ModelCard

import train_distillation
from wan_distill.layout import LORA_FILE, RunFolder
from wan_distill.results.card import model_card, preview_pairs
from wan_distill.settings.description import read_teacher

pytestmark = pytest.mark.journey  # they share a whole run
TOKEN = "hf_secretsecretsecret"
PUSH = ("--push_to_hub", "--hub_model_id=student-of-mine", f"--hub_token={TOKEN}")


class Hub(BaseHTTPRequestHandler):
    """The few answers that an upload waits for, for the owner of `token` only.

    Attributes:
        files: path in the repository -> what was uploaded.
        private: of each repository that was asked for.
        calls: the first part of each path that was asked for.
        full: whether the hub refuses to store anything.
    """

    token = TOKEN
    full = False
    files: dict[str, bytes]
    calls: list[str]
    private: list[bool]

    def do_GET(self):
        self.respond(b"")

    def do_POST(self):
        length = self.headers["Content-Length"]
        self.respond(self.rfile.read(int(length)) if length else self.chunks())

    def respond(self, body: bytes):
        self.calls.append(self.path)
        if self.headers["Authorization"] != f"Bearer {self.token}":
            self.answer({"error": "who are you?"}, 401)
        elif self.path.endswith("/api/repos/create"):
            asked = json.loads(body)  # as older and newer versions of huggingface_hub ask
            name = asked["name"]
            self.private.append(asked.get("private") or asked.get("visibility") == "private")
            self.answer({"url": f"http://{self.headers['Host']}/me/{name}", "name": f"me/{name}"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": path} | plain for path in paths]})
        elif "/commit/" in self.path and self.full:
            self.answer({"error": "your quota is used up"}, 403)
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['Host']}/me/student-of-mine/commit/0"
            self.answer({"commitOid": "0" * 40, "commitUrl": address, "success": True})
        else:
            self.answer({"name": "me", "type": "user"})

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def answer(self, content, code: int = 200):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("Handler", (Hub,), {"files": {}, "calls": [], "private": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api, "ENDPOINT", address, raising=False)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(random_teacher, tmp_path_factory):
    """Runs a finished job once more, with further flags: it then only exports and uploads."""
    folder = tmp_path_factory.mktemp("hub")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red ball\na blue <b>ball</b>\na green box\n", encoding="utf-8")
    flags = SMALL | dict(
        teacher_path=random_teacher,
        prompts=prompts,
        method="trajectory",
        output_dir=folder / "out",
        validation_steps=2,
    )

    def start(*more: str) -> int:
        return train_distillation.main([f"--{k}={v}" for k, v in flags.items()] + list(more))

    start.out = folder / "out"
    assert start() == 0
    return start


def test_the_hub_gets_the_student_and_a_card_that_explains_it(run, hub, capsys):
    assert run(*PUSH) == 0
    assert "Uploaded to http://127.0.0.1" in capsys.readouterr().out
    for name in LORA_FILE.values():
        assert hub.files[name] == (run.out / name).read_bytes()
    assert {"scheduler/scheduler_config.json", "report.html", "run.json"} <= hub.files.keys()
    record = json.loads(hub.files["run.json"])
    assert record["stages"][0]["output_dir"] == "out" and str(run.out.parent) not in str(record)
    assert record["config"]["rank"] == 4 and hub.private == [False]
    caches = ("prompts/", "trajectories/", "high/", "low/", "student/")
    assert not [name for name in hub.files if name.startswith(caches)]
    card = hub.files["README.md"].decode()
    assert 'load_lora_weights("me/student-of-mine"' in card and '"flow_shift": 5.0' in card
    assert "clips/student-0000.mp4" in card and "clips/student-0000.mp4" in hub.files
    assert "It was measured on 8 clips" in card and "<b>" not in card
    assert "## Training" in card and "no GPU-hours" in card and str(run.out) not in card


def test_the_token_goes_with_each_call_and_into_no_file(run, hub):
    assert run(*PUSH) == 0  # the stand-in answers no call without it
    for call in ("/whoami-v2", "/repos/create", "/preupload/", "/commit/"):
        assert any(call in path for path in hub.calls), call
    assert not any(TOKEN.encode() in data for data in hub.files.values())
    assert not any(TOKEN.encode() in f.read_bytes() for f in run.out.rglob("*") if f.is_file())


def test_a_repository_that_others_do_not_see(run, hub):
    assert run(*PUSH, "--hub_private_repo") == 0
    assert hub.private == [True]


def test_an_unknown_token_is_refused_before_anything_is_written(run, hub, tmp_path, capsys):
    hub.token = "hf_another"
    assert run(*PUSH, f"--output_dir={tmp_path / 'new'}") == 2
    said = capsys.readouterr().err
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "--push_to_hub" in error and "Traceback" not in said and TOKEN not in said
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_none_is_refused(run, hub, capsys):
    assert run("--push_to_hub", "--hub_model_id=a//b", f"--hub_token={TOKEN}") == 2
    assert "--hub_model_id a//b: is no repository name" in capsys.readouterr().err
    assert not hub.calls


def test_an_upload_that_fails_says_how_to_go_on(run, hub, capsys):
    hub.full = True
    assert run(*PUSH) == 1
    error = capsys.readouterr().err
    assert "--push_to_hub: " in error and "run the same command to try again" in error


# --------------------------------------------------------------------------------------- model card


def test_the_card_names_a_teacher_of_the_hub_but_no_folder(small_config, tmp_path):
    config = small_config(output_dir=str(tmp_path))
    info = read_teacher(config)
    local = ModelCard(model_card(tmp_path, (config,), info, None, "me/mine")).data
    assert local.library_name == "diffusers" and local.pipeline_tag == "text-to-video"
    assert "lora" in local.tags and local.base_model is None and local.license is None
    pictured = dataclasses.replace(info, takes_picture=True)
    data = ModelCard(model_card(tmp_path, (config,), pictured, None, "me/mine")).data
    assert data.pipeline_tag == "image-to-video" in data.tags
    wan = dataclasses.replace(info, source="Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    card = ModelCard(model_card(tmp_path, (config,), wan, None, "me/mine"))
    assert card.data.base_model == wan.source and card.data.license == "apache-2.0"
    assert card.data.base_model_relation == "adapter"
    assert "## Clips" not in card.text and "In this folder:" not in card.text


def test_the_card_shows_the_evaluations_clips_and_the_worst(small_config, tmp_path):
    config = small_config(output_dir=str(tmp_path))
    folder = RunFolder(tmp_path)
    folder.clips.mkdir()
    distances = [0.1, 0.2, 0.9, 0.3, 0.8, 0.7, 0.6, 0.4]
    evaluation = dict(
        rows=[dict(sampler="student 4", evaluations=4)],
        gap_closed_by_steps={"4": 0.5},
        floor=1.0,
        samples=8,
        prompts=8,
        clips=[dict(prompt=f"<b>prompt_{i}", paired_distance=d) for i, d in enumerate(distances)],
    )
    for sample in range(8):
        for who in ("teacher", "student"):
            folder.clip(who, sample).touch()
    card = model_card(tmp_path, (config,), read_teacher(config), evaluation, "me/mine")
    first, worst = card.split("## Clips")[1].split("## The worst clips")
    assert [f"clips/student-{i:04d}.mp4" in first for i in range(8)] == [True] * 4 + [False] * 4
    order = [worst.index(f"&lt;b&gt;prompt\\_{i}:") for i in (2, 4, 5, 6)]
    assert order == sorted(order) and "7:" not in worst
    assert "clips/teacher-0002.mp4" in worst and "8 clips of 8 prompts" in card


def test_without_an_evaluation_it_shows_the_newest_finished_previews(tmp_path):
    folder = RunFolder(tmp_path)
    folder.previews.mkdir()
    for expert, who, prompt in [
        ("high", "000200", 0),
        ("low", "000200", 0),
        ("low", "001000", 0),
        ("low", "teacher", 0),
        ("low", "001000", 10),
        ("low", "001000", 2),
    ]:
        folder.preview(expert, who, prompt).touch()
    assert [(who, clip.name) for _, pair in preview_pairs(folder) for who, clip in pair] == [
        ("teacher", "low-teacher-0.mp4"),
        ("student", "low-001000-0.mp4"),
        ("student", "low-001000-2.mp4"),
        ("student", "low-001000-10.mp4"),
    ]
    for clip in folder.previews.glob("low-*"):
        clip.unlink()
    ((_, ((_, clip),)),) = preview_pairs(folder)
    assert clip.name == "high-000200-0.mp4"
