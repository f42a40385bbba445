"""Which file is which expert's."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import wan_distill.settings.lora_sources as experts
from wan_distill.errors import UsageError
from wan_distill.settings.lora_sources import expert_in_name, find_loras

BOTH = ("high", "low")


def write(file: Path, prefixes: tuple[str, ...] = ("diffusion_model",), **metadata: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for prefix in prefixes:
        stem = f"{prefix}.blocks.0.ffn.{'0' if prefix == 'diffusion_model' else 'net.0.proj'}"
        tensors[f"{stem}.lora_A.weight"] = torch.ones(1, 2)
        tensors[f"{stem}.lora_B.weight"] = torch.ones(2, 1)
    save_file(tensors, file, {"wan_distill": json.dumps(metadata)} if metadata else None)
    return file


def found(source: object, teacher: tuple[str, ...] = BOTH) -> dict[str, str]:
    return {e: f.path.name for e, f in find_loras(str(source), "--flag", teacher, None).items()}


def refusal(source: object, teacher: tuple[str, ...] = BOTH) -> str:
    with pytest.raises(UsageError) as refused:
        find_loras(str(source), "--flag", teacher, None)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("high_noise_model", "high"),
        ("low_noise_model", "low"),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16", "high"),
        ("Wan22-LowNoise-style", "low"),
        ("style_lownoise", "low"),
        ("motion-HN", "high"),
        ("wan22_t2v_l", "low"),
        ("slow_flow_highres", None),
        ("high_and_low", None),
        ("model", None),
    ],
)
def test_names_say_whose_a_file_is(name: str, expert: str | None) -> None:
    assert expert_in_name(name) == expert


def test_files_in_order_need_no_names(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.safetensors"), write(tmp_path / "b.safetensors")
    assert found(f"{a},{b}") == {"high": "a.safetensors", "low": "b.safetensors"}
    assert found(f"{a},{a}") == {"high": "a.safetensors", "low": "a.safetensors"}


def test_files_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    high, low = write(tmp_path / "high.safetensors"), write(tmp_path / "low.safetensors")
    assert found(f"{high},{low}") == {"high": "high.safetensors", "low": "low.safetensors"}
    assert "says that it is for the low one; give HIGH,LOW" in refusal(f"{low},{high}")


def test_one_file_is_the_experts_that_it_names(tmp_path: Path) -> None:
    assert found(write(tmp_path / "x_low.safetensors")) == {"low": "x_low.safetensors"}
    assert found(write(tmp_path / "y.safetensors", expert="high")) == {"high": "y.safetensors"}
    plain = write(tmp_path / "plain.safetensors")
    assert "does not say which expert it is for" in refusal(plain)
    assert found(plain, ("high",)) == {"high": "plain.safetensors"}
    second = write(tmp_path / "z.safetensors", ("transformer_2",))
    assert found(second) == {"low": "z.safetensors"}


def test_a_file_of_both_transformers_is_both_experts(tmp_path: Path) -> None:
    file = write(tmp_path / "pytorch_lora_weights.safetensors", ("transformer", "transformer_2"))
    loras = find_loras(str(file), "--flag", BOTH, None)
    names = {e: lora.layers["blocks.0.ffn.net.0.proj"]["down"] for e, lora in loras.items()}
    assert names["high"].startswith("transformer.") and names["low"].startswith("transformer_2.")


def test_a_folder_is_searched_by_names(tmp_path: Path) -> None:
    assert "holds no high_noise_lora.safetensors" in refusal(tmp_path)
    write(tmp_path / "high_noise_model.safetensors")
    write(tmp_path / "low_noise_model.safetensors")
    write(tmp_path / "other.safetensors")
    theirs = {"high": "high_noise_model.safetensors", "low": "low_noise_model.safetensors"}
    assert found(tmp_path) == theirs
    write(tmp_path / "another_high.safetensors")
    assert "are both for the high expert" in refusal(tmp_path)
    write(tmp_path / "high_noise_lora.safetensors")
    assert found(tmp_path) == {"high": "high_noise_lora.safetensors"}


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "there is no such file or folder" in refusal(tmp_path / "gone.safetensors")
    assert "names no file" in refusal(",")


def test_a_mistyped_file_of_a_folder_that_is_here_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "outputs" / "base" / "high_noise_lora.safetensors")
    monkeypatch.chdir(tmp_path)
    said = refusal("outputs/base/high.safetensor")
    assert "outputs/base/high.safetensor: outputs/base is here and holds no high.safetensor" in said
    assert "(high_noise_lora.safetensors); check the spelling" in said


def test_of_the_hub_only_what_is_asked_for_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    write(tmp_path / "V1" / "high_noise_model.safetensors")
    write(tmp_path / "V1" / "low_noise_model.safetensors")
    write(tmp_path / "top_high.safetensors")
    names = ["huge.safetensors", "top_high.safetensors", "V1/high_noise_model.safetensors"]
    listed = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot(repository: str, cache_dir: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(experts, "snapshot_download", snapshot)
    monkeypatch.setattr(experts.HfApi, "model_info", lambda self, repository: listed)
    monkeypatch.chdir(tmp_path)
    theirs = {"high": "high_noise_model.safetensors", "low": "low_noise_model.safetensors"}
    assert found("some/loras/V1") == theirs
    assert found("some/loras/top_high.safetensors") == {"high": "top_high.safetensors"}
    assert found("some/loras") == {"high": "top_high.safetensors"}
    assert asked == [
        ("some/loras", ["V1/*.safetensors"]),
        ("some/loras", ["top_high.safetensors"]),
        ("some/loras", ["top_high.safetensors"]),
    ]
    assert "the hub has no such file" in refusal("some/loras/V2")


def test_without_a_network_a_mistyped_folder_is_refused_at_once() -> None:
    """It looks like a name on the hub."""
    began = time.perf_counter()
    for source in ("outputs/nope", "outputs/nope/high_noise_lora.safetensors"):
        assert "outputs/nope: neither a file or folder here nor reachable" in refusal(source)
    assert time.perf_counter() - began < 5
