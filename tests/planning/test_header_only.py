"""A14B is planned from configurations and headers alone: as a folder, and as a hub id."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import safetensors
from header_only import write_a14b
from huggingface_hub import HfApi
from random_teachers import write_pictures

import train_distillation
from wan_distill.planning import trace
from wan_distill.settings.description import SKELETON

pytestmark = pytest.mark.journey  # plans at A14B's size: as long as a whole run


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_a14b(tmp_path_factory.mktemp("hosted") / "Wan2.2-T2V-A14B-Diffusers")


@pytest.fixture
def no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens weights fails the test."""
    monkeypatch.setattr(safetensors, "safe_open", lambda *_, **__: pytest.fail("read weights"))


def planned(teacher: str, file: Path, *more: str) -> tuple[dict, int]:
    """What --plan_json says of one H100, and the exit code."""
    flags = [
        "--teacher_path",
        teacher,
        "--dry_run",
        "--gpu",
        "h100",
        "--plan_json",
        str(file),
        *more,
    ]
    code = train_distillation.main([*flags, "--output_dir", str(file.with_suffix(""))])
    return json.loads(file.read_text()), code


@pytest.mark.usefixtures("no_values")
def test_a_folder_of_headers_is_planned_with_default_flags(a14b, tmp_path, capsys):
    plan, _ = planned(str(a14b), tmp_path / "plan.json")
    assert plan["fits"] and 40e9 < plan["peak_bytes"] <= 70e9
    assert plan["host_bytes"]["while the text encoder loads"] == pytest.approx(11.4e9, rel=0.01)
    assert "--num_frames 81" in plan["cards"]["l40s"]  # 48 GB hold the full clip
    said = capsys.readouterr()
    assert "whole by their headers" in said.out and "Host      11.4 GB of memory" in said.out
    assert "the text encoder's table 256384 rows" in said.err  # the tokenizer is not A14B's


@pytest.mark.usefixtures("no_values")
def test_image_to_video_is_planned_with_its_own_sampling(tmp_path, capsys):
    teacher = write_a14b(tmp_path / "Wan2.2-I2V-A14B-Diffusers", picture=True)
    images = write_pictures(tmp_path / "images", 20)
    plan, _ = planned(str(teacher), tmp_path / "plan.json", "--images", str(images))
    assert plan["fits"] and 40e9 < plan["peak_bytes"] <= 70e9
    config = plan["config"]
    sampling = [config[name] for name in ("boundary_ratio", "teacher_shift", "teacher_steps")]
    assert sampling == [0.9, 5.0, 40]
    assert config["guidance_scale"] == config["guidance_scale_2"] == 3.5
    assert config["diversity_weight"] == 0 and config["flow_shift"] == 5
    values = 16 * 21 * 60 * 104 + 3 * 480 * 832
    assert plan["disk_bytes"]["for encoded pictures"] == 20 * 4 * values
    said = capsys.readouterr()
    assert "held out for the evaluation, each with its picture" in said.out
    assert "pictures smaller than the clip, enlarged" in said.err


@pytest.mark.usefixtures("no_values")
def test_headers_without_any_data_are_planned_and_then_refused(tmp_path, capsys):
    teacher = write_a14b(tmp_path / "cut", data=False)
    plan, code = planned(str(teacher), tmp_path / "plan.json")
    said = capsys.readouterr()
    assert code == 2 and plan["fits"] and "Fits      yes" in said.out
    assert "model.safetensors: truncated" in said.err


@pytest.mark.usefixtures("no_values")
def test_a_hub_id_is_planned_from_what_describes_it(a14b, tmp_path, monkeypatch, capsys):
    snapshot = tmp_path / "hub" / "snapshots" / "0123abc"

    def arrive(repo, revision=None, cache_dir=None, allow_patterns=()):
        assert repo == "Wan-AI/Wan2.2-T2V-A14B-Diffusers" and list(allow_patterns) == SKELETON
        for pattern in allow_patterns:
            for file in a14b.glob(pattern):
                copy = snapshot / file.relative_to(a14b)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
        for part in ("transformer", "transformer_2"):  # hosted in shards, each part with an index
            index = snapshot / part / "diffusion_pytorch_model.safetensors.index.json"
            index.write_text(json.dumps({"metadata": {"total_size": 57_153_966_336}}))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", arrive)
    names = [str(file.relative_to(a14b)) for file in a14b.rglob("*.*")]
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: names)
    monkeypatch.chdir(tmp_path)
    plan, _ = planned("Wan-AI/Wan2.2-T2V-A14B-Diffusers", tmp_path / "plan.json")
    assert plan["fits"] and not list(snapshot.rglob("*.safetensors"))
    said = capsys.readouterr()
    assert "on the hub, 4 files of weights; downloaded when needed" in said.out
    assert "114 GB" in said.out + said.err  # or an obstacle, where the disk is too small


@pytest.mark.long
def test_it_takes_less_than_half_a_minute_of_one_core(a14b, tmp_path):
    trace.trace.cache_clear()
    started = time.process_time()
    planned(str(a14b), tmp_path / "plan.json")
    assert time.process_time() - started < 20
