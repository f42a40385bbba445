"""What leaves the output folder: a hub repository (a local stand-in), trackers, VBench folders, the
merged pipeline.
"""

from __future__ import annotations

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import REPOSITORY, SMALL
from safetensors.torch import load_file, save_file

import train_distillation
from wan_distill import layout
from wan_distill.results import export as results_export

sys.path.insert(0, str(REPOSITORY))
import sample

TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def run(random_teacher, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "a red ball\na blue <b>ball</b>\na green box\n", encoding="utf-8"
    )

    def start(*more: str) -> int:
        flags = SMALL | dict(
            teacher_path=random_teacher,
            prompts=tmp_path / "prompts.txt",
            method="trajectory",
            output_dir=tmp_path / "out",
            validation_steps=2,
        )
        return train_distillation.main([f"--{k}={v}" for k, v in flags.items()] + list(more))

    return start


class Hub(BaseHTTPRequestHandler):
    """The few answers that `create_repo` and `upload_folder` wait for; keeps what was uploaded."""

    files: dict[str, bytes]
    known = True

    def do_GET(self):
        self.answer(
            {"name": "me", "type": "user"} if self.known else {"error": "who?"},
            200 if self.known else 401,
        )

    def do_POST(self):
        length = self.headers["Content-Length"]
        body = self.rfile.read(int(length)) if length else self.chunks()
        if self.path.endswith("/api/repos/create"):
            name = json.loads(body)["name"]
            self.answer({"url": f"http://{self.headers['Host']}/me/{name}", "name": f"me/{name}"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in asked
                    ]
                }
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['Host']}/me/student-of-mine/commit/0"
            self.answer({"commitOid": "0" * 40, "commitUrl": address, "success": True})
        else:
            self.answer({})

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
    handler = type("Handler", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api, "ENDPOINT", address, raising=False)
    yield handler
    server.shutdown()


def test_the_hub_gets_the_student_and_a_card_that_says_how_to_use_it(run, hub, tmp_path, capsys):
    assert run("--push_to_hub", "--hub_model_id=student-of-mine", f"--hub_token={TOKEN}") == 0
    assert "Uploaded to http://127.0.0.1" in capsys.readouterr().out
    out = tmp_path / "out"
    for name in layout.LORA_FILE.values():
        assert hub.files[name] == (out / name).read_bytes()
    assert {"scheduler/scheduler_config.json", "report.html", "run.json"} <= hub.files.keys()
    assert not [
        name
        for name in hub.files
        if name.startswith(("prompts/", "trajectories/", "high/", "low/"))
    ]
    card = hub.files["README.md"].decode()
    assert (
        card.startswith("---\nlibrary_name: diffusers")
        and 'load_lora_weights("me/student-of-mine"' in card
    )
    assert (
        '"flow_shift": 5.0' in card
        and "previews/low-000002-0.mp4" in card
        and "previews/low-teacher-0.mp4" in card
    )
    assert not any(TOKEN.encode() in data for data in hub.files.values())
    assert not any(TOKEN.encode() in f.read_bytes() for f in out.rglob("*") if f.is_file())


def test_an_unknown_token_is_told_before_training(run, hub, tmp_path, capsys):
    hub.known = False
    assert run("--push_to_hub", f"--hub_token={TOKEN}") == 2
    error = capsys.readouterr().err.strip()
    assert "--push_to_hub" in error and "\n" not in error and TOKEN not in error
    assert not (tmp_path / "out").exists()


def test_a_tracker_gets_the_metrics_of_both_experts(run, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run("--report_to=tensorboard", "--logging_steps=1") == 0
    seen = {}
    for file in (tmp_path / "out" / "logs").rglob("*tfevents*"):
        log = events.EventAccumulator(str(file))
        log.Reload()
        seen |= {
            tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]
        }
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [step for step, _ in seen["low/student_loss"]] == [3, 4]  # after the high expert's two
    assert [v for _, v in seen["high/student_loss"]] == pytest.approx(
        [x["student_loss"] for x in lines[:2]]
    )


def test_a_tracker_that_is_not_installed_is_told(run, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert run("--report_to=trackio") == 2
    assert "pip install trackio" in capsys.readouterr().err


def test_vbench_gets_its_names_and_an_interrupted_series_goes_on(run, tmp_path, capsys):
    assert run() == 0
    file, out = tmp_path / "vbench.txt", tmp_path / "videos"
    file.write_text("a cat: left/right?\na dog\n", encoding="utf-8")
    flags = [
        "--student",
        str(tmp_path / "out"),
        "--vbench_prompts",
        str(file),
        "--samples",
        "2",
        "--out",
        str(out),
    ]
    assert sample.main(flags) == 0
    assert {f.name for f in out.iterdir()} == {
        "a cat_ left_right_-0.mp4",
        "a cat_ left_right_-1.mp4",
        "a dog-0.mp4",
        "a dog-1.mp4",
    }
    assert (out / "a dog-0.mp4").read_bytes() != (out / "a dog-1.mp4").read_bytes()
    (out / "a dog-1.mp4").unlink()
    capsys.readouterr()
    assert sample.main(flags) == 0 and capsys.readouterr().out.count("wrote") == 1
    assert sample.main(flags[:2]) == 2


def test_a_merged_pipeline_that_is_not_the_student_is_refused(run, tmp_path, monkeypatch, capsys):
    assert run("--save_merged") == 0
    assert "student/transformer_2: loaded back; differs" in capsys.readouterr().out
    real = results_export.WanTransformer3DModel.save_pretrained

    def forgetful(self, folder, **kwargs):
        real(self, folder, **kwargs)
        file = Path(folder) / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["proj_out.weight"] = torch.randn_like(weights["proj_out.weight"])
        save_file(weights, file, {"format": "pt"})

    monkeypatch.setattr(results_export.WanTransformer3DModel, "save_pretrained", forgetful)
    assert run("--save_merged") == 1
    assert "do not use it" in capsys.readouterr().err
    assert (tmp_path / "out" / "student" / "model_index.json").exists()  # the good one of before
