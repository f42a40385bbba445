"""Replaced experts and merged LoRAs make the teacher that diffusers would make."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_flags
from diffusers import WanPipeline, WanTransformer3DModel
from foreign_loras import write_in
from random_teachers import random_transformer, write_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from written_students import write_student

import sample
import train_distillation
from wan_distill.errors import UsageError
from wan_distill.model.codes import quantise
from wan_distill.model.loading import Teacher
from wan_distill.model.quantise import StoredLinear
from wan_distill.planning.changed_files import check_changes
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.job import LORA_TARGETS
from wan_distill.settings.lora_names import TRAINED, original_name
from wan_distill.settings.teacher_changes import parse_lora
from wan_distill.system.runtime import Runtime


@pytest.fixture
def styles(make_run, tmp_path: Path) -> dict[str, Path]:
    """LoRAs of both experts in this tool's layout; alpha / rank is no power of two. Of blocks only:
    elsewhere diffusers reads no alpha, and nothing of kohya's.
    """
    out = str(tmp_path / "styles")
    layers = tuple(layer for layer in LORA_TARGETS if any(n.endswith(layer) for n in TRAINED))
    run = make_run(method="trajectory", lora_alpha=3.0, lora_layers=layers, output_dir=out)
    write_student(run, "high", "low")
    return {expert: run.folder.lora(expert) for expert in ("high", "low")}


def load(config: Config, expert: str = "high", **options) -> WanTransformer3DModel:
    return Teacher(read_teacher(config), config, Runtime(config)).load_expert(expert, **options)


def assert_same(ours: WanTransformer3DModel, theirs: dict[str, Tensor], tolerance: float) -> None:
    ours = ours.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance, msg=name)


# -------------------------------------------------------------------------------------------- LoRAs


@pytest.mark.parametrize("layout", ["lightning", "kohya", "diffusers"])
def test_a_merged_lora_is_what_diffusers_fuses(
    styles, small_config, random_teacher, tmp_path, layout
):
    files = [
        write_in(layout, styles[expert], tmp_path / f"style_{expert}.safetensors")
        for expert in ("high", "low")
    ]
    config = small_config(teacher_lora=(f"{files[0]},{files[1]}:0.7",))
    pipe = WanPipeline.from_pretrained(random_teacher)
    before = pipe.transformer_2.state_dict()["blocks.0.attn1.to_q.weight"].clone()
    for second, file in enumerate(files):
        pipe.load_lora_weights(
            str(file.parent),
            weight_name=file.name,
            adapter_name=f"style-{second}",
            load_into_transformer_2=bool(second),
        )
    pipe.fuse_lora(components=["transformer", "transformer_2"], lora_scale=0.7)
    pipe.unload_lora_weights()
    for expert, part in (("high", pipe.transformer), ("low", pipe.transformer_2)):
        assert_same(load(config, expert), part.state_dict(), 1e-6)
    after = pipe.transformer_2.state_dict()["blocks.0.attn1.to_q.weight"]
    assert (after - before).abs().max() > 1e-2


def test_several_are_added_and_only_to_their_own_expert(styles, small_config):
    high = str(styles["high"])
    twice = load(small_config(teacher_lora=(high, f"{high}:0.5"))).state_dict()
    once = load(small_config(teacher_lora=(high,))).state_dict()
    plain = load(small_config()).state_dict()
    for name, tensor in plain.items():
        change = once[name] - tensor
        torch.testing.assert_close(twice[name], tensor + 1.5 * change, rtol=0, atol=1e-5)
    low = small_config(teacher_lora=(high,))
    assert_same(load(low, "low"), load(small_config(), "low").state_dict(), 0)


def test_differences_of_biases_and_norms_are_merged_too(styles, small_config, tmp_path):
    tensors = load_file(styles["high"])
    width = 24
    rng = torch.Generator().manual_seed(0)
    bias, norm = torch.randn(width, generator=rng), torch.randn(width, generator=rng)
    tensors["diffusion_model.blocks.0.self_attn.q.diff_b"] = bias
    tensors["diffusion_model.blocks.0.norm3.diff"] = norm
    file = tmp_path / "with_high_extras.safetensors"
    save_file(tensors, file)
    changed = load(small_config(teacher_lora=(f"{file}:2",))).state_dict()
    plain = load(small_config()).state_dict()
    for name, difference in {"attn1.to_q.bias": bias, "norm2.weight": norm}.items():
        expected = plain[f"blocks.0.{name}"] + 2 * difference
        torch.testing.assert_close(changed[f"blocks.0.{name}"], expected)


@pytest.mark.parametrize("options", [dict(base_precision="nf4"), dict(offload=True)])
def test_a_stored_base_is_made_from_the_merged_weights(styles, small_config, options):
    config = small_config(teacher_lora=(str(styles["high"]),), **options)
    merged = load(config, exact=True).state_dict()
    stored = load(config).get_submodule("blocks.0.attn1.to_q")
    assert isinstance(stored, StoredLinear)
    kind = options.get("base_precision", "bf16")
    codes, _ = quantise(merged["blocks.0.attn1.to_q.weight"], kind)
    assert torch.equal(stored.codes, codes)


# ---------------------------------------------------------------------------------- whole experts


def in_original_names(transformer: WanTransformer3DModel) -> dict[str, Tensor]:
    """As a single file of the original Wan or of ComfyUI holds it."""
    special = {"scale_shift_table": "head.modulation", "proj_out": "head.head"}
    tensors = {}
    for name, tensor in transformer.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if name in special:
            name = special[name]
        elif leaf == "scale_shift_table":
            name = f"{module}.modulation"
        else:
            name = f"{original_name(module)}.{leaf}"
        tensors[name] = tensor.clone()
    return tensors


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_replaces_an_expert(small_config, tmp_path, prefix):
    tuned = random_transformer(7)
    tensors = {prefix + name: tensor for name, tensor in in_original_names(tuned).items()}
    file = tmp_path / "tuned.safetensors"
    save_file(tensors, file)
    config = small_config(teacher_transformer=str(file))
    check_changes(read_teacher(config), config)
    assert_same(load(config), tuned.state_dict(), 0)
    assert_same(load(config, "low"), load(small_config(), "low").state_dict(), 0)


def test_scaled_fp8_is_multiplied_out_and_takes_loras(styles, small_config, tmp_path):
    tuned = random_transformer(7)
    tensors, expected = in_original_names(tuned), dict(tuned.state_dict())
    for number, name in enumerate(("self_attn.q", "ffn.0")):
        scale = torch.tensor(0.01 * (1 + number))
        weight = tensors.pop(f"blocks.0.{name}.weight")
        stored = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"blocks.0.{name}.weight"] = stored
        ending = ("scale_weight", "weight_scale")[number]  # older and newer ComfyUI
        tensors[f"blocks.0.{name}.{ending}"] = scale
        ours = {"self_attn.q": "attn1.to_q", "ffn.0": "ffn.net.0.proj"}[name]
        expected[f"blocks.0.{ours}.weight"] = stored.float() * scale
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    tensors["blocks.0.ffn.0.comfy_quant"] = torch.zeros(3, dtype=torch.uint8)
    file = tmp_path / "scaled.safetensors"
    save_file(tensors, file)
    config = small_config(teacher_transformer=str(file))
    check_changes(read_teacher(config), config)
    assert_same(load(config), expected, 0)
    both = load(dataclasses.replace(config, teacher_lora=(str(styles["high"]),))).state_dict()
    plain = load(small_config()).state_dict()
    styled = load(small_config(teacher_lora=(str(styles["high"]),))).state_dict()
    name = "blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(both[name], expected[name] + (styled[name] - plain[name]))


def test_a_fine_tuned_folder_replaces_an_expert(small_config, tmp_path):
    tuned = random_transformer(7)
    tuned.save_pretrained(tmp_path / "tuned" / "transformer_2")
    for source in (tmp_path / "tuned", tmp_path / "tuned" / "transformer_2"):
        config = small_config(teacher_transformer_2=str(source))
        check_changes(read_teacher(config), config)
        assert_same(load(config, "low"), tuned.state_dict(), 0)


ORIGINAL = dict(
    _class_name="WanModel",
    model_type="t2v",
    dim=24,
    num_heads=2,
    ffn_dim=32,
    freq_dim=16,
    in_dim=16,
    out_dim=16,
    num_layers=1,
)


def write_original(folder: Path, transformer: WanTransformer3DModel, **changes) -> Path:
    """As Wan's own repositories hold an expert: two shards, of which one has no block."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ORIGINAL | changes))
    tensors = in_original_names(transformer)
    first = {name: tensor for name, tensor in tensors.items() if name.startswith("blocks.")}
    shards = [first, {name: t for name, t in tensors.items() if name not in first}]
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file(shard, folder / file)
        where |= dict.fromkeys(shard, file)
    index = dict(metadata=dict(total_size=1), weight_map=where)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_the_original_folder_replaces_an_expert(small_config, tmp_path):
    tuned = random_transformer(7)
    folder = write_original(tmp_path / "high_noise_model", tuned)
    config = small_config(teacher_transformer=str(folder))
    info = read_teacher(config)
    check_changes(info, config)
    assert_same(load(config), tuned.state_dict(), 0)
    assert info.fingerprint() != read_teacher(small_config()).fingerprint()
    for name, value, said in (
        ("model_type", "i2v", "its model_type is i2v; give a t2v model"),
        ("num_heads", 3, "its num_heads is 3, the pipeline's is 2"),
    ):
        other = write_original(tmp_path / name, tuned, **{name: value})
        with pytest.raises(UsageError, match=said):
            small_config(teacher_transformer=str(other))


# --------------------------------------------------------------------------------------- identity


def test_every_change_is_another_teacher(styles, small_config, tmp_path):
    tuned = tmp_path / "tuned.safetensors"
    save_file(in_original_names(random_transformer(7)), tuned)
    changes = [
        {},
        dict(teacher_lora=(str(styles["high"]),)),
        dict(teacher_lora=(f"{styles['high']}:0.5",)),
        dict(teacher_lora=(str(styles["low"]),)),
        dict(teacher_transformer=str(tuned)),
        dict(teacher_transformer_2=str(tuned)),
    ]
    infos = [read_teacher(small_config(**change)) for change in changes]
    assert len({info.fingerprint() for info in infos}) == len(changes)
    high = [info.fingerprint(("transformer",)) for info in infos]
    low = [info.fingerprint(("transformer_2",)) for info in infos]
    assert high[0] == high[3] == high[5] and len(set(high)) == 4
    assert low[0] == low[1] == low[2] == low[4] and len(set(low)) == 3
    moved = shutil.copy(styles["high"], tmp_path / "elsewhere_high.safetensors")
    assert read_teacher(small_config(teacher_lora=(str(moved),))).fingerprint() == (
        infos[1].fingerprint()
    )
    hub = [dataclasses.replace(info, source="some/teacher") for info in infos]
    assert len({info.fingerprint() for info in hub}) == len(changes)


def test_the_flag_may_be_given_several_times(tmp_path):
    argv = ["--teacher_lora=a.safetensors", "--teacher_lora=b.safetensors,c.safetensors:0.8"]
    given = ("a.safetensors", "b.safetensors,c.safetensors:0.8")
    assert parse_args(argv).teacher_lora == given and parse_args([]).teacher_lora == ()
    file = tmp_path / "settings.yaml"
    file.write_text("teacher_lora: [a.safetensors, 'b.safetensors,c.safetensors:0.8']\n")
    assert parse_args([f"--config={file}"]).teacher_lora == given


def test_a_colon_in_a_path_is_no_strength():
    assert parse_lora("C:/loras/a.safetensors") == ("C:/loras/a.safetensors", 1.0)
    assert parse_lora("C:/loras/a.safetensors:-0.5") == ("C:/loras/a.safetensors", -0.5)
    for strength in ("nan", "inf", "1e999"):
        with pytest.raises(UsageError, match="the strength must be a finite number"):
            parse_lora(f"a.safetensors:{strength}")


# ---------------------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused(styles, small_config, tmp_path):
    def refusal(**changes) -> str:
        with pytest.raises(UsageError) as refused:
            config = small_config(**changes)
            check_changes(read_teacher(config), config)
        return str(refused.value)

    lacking = in_original_names(random_transformer(7))
    del lacking["blocks.0.ffn.2.bias"]
    save_file(lacking, tmp_path / "lacking.safetensors")
    said = refusal(teacher_transformer=str(tmp_path / "lacking.safetensors"))
    assert "blocks.0.ffn.net.2.bias is missing, this teacher's is [24]" in said
    deep = write_pipeline(tmp_path / "deep", layers=2)
    said = refusal(teacher_transformer=str(deep))
    assert "its num_layers is 2, the pipeline's is 1" in said
    assert "give a transformer's folder" in refusal(teacher_transformer=str(tmp_path))
    said = refusal(teacher_transformer=str(tmp_path / "gone.safetensors"))
    assert "gone.safetensors: there is no such file or folder" in said
    whole = {n: t.to(torch.int8) for n, t in in_original_names(random_transformer(7)).items()}
    save_file(whole, tmp_path / "int8.safetensors")
    assert "as I8, which is no float" in refusal(
        teacher_transformer=str(tmp_path / "int8.safetensors")
    )
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "not a .safetensors file" in refusal(teacher_transformer=str(tmp_path / "x.gguf"))
    wide = {
        name: torch.zeros(4, 99) if "lora_down" in name else tensor
        for name, tensor in load_file(styles["high"]).items()
    }
    save_file(wide, tmp_path / "wide_high.safetensors")
    said = refusal(teacher_lora=(str(tmp_path / "wide_high.safetensors"),))
    assert "is [24, 99], this teacher's is [24, 24]; give a LoRA that was made for" in said
    one = write_pipeline(tmp_path / "one", two_experts=False)
    with pytest.raises(UsageError, match="this teacher has a single transformer"):
        small_config(teacher_path=str(one), teacher_transformer_2=str(tmp_path))


# -------------------------------------------------------------------------------------- a whole run


@pytest.mark.journey  # as long as a whole run
def test_a_run_distils_the_changed_teacher_and_says_so(
    styles, random_teacher, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    high, low = styles["high"], styles["low"]
    changes = dict(teacher_lora=f"{high},{low}:0.7", method="trajectory", save_merged=True)
    flags = tiny_flags(random_teacher, out, **changes)
    assert train_distillation.main(flags) == 0
    assert f"changed: {high.name} x 0.7 (high)" in (out / "plan.txt").read_text(encoding="utf-8")
    text = (out / "README.md").read_text(encoding="utf-8")
    assert f"The teacher was changed: {high.name} x 0.7 (high); {low.name} x 0.7 (low)." in text
    # The code of the README makes what is in the merged pipeline.
    code = text.split("```python\n")[1].split("```")[0].split("video = ")[0]
    monkeypatch.chdir(out)
    scope: dict = {}
    exec(code, scope)
    scope["pipe"].fuse_lora(components=["transformer", "transformer_2"])
    scope["pipe"].unload_lora_weights()
    for part in ("transformer", "transformer_2"):
        merged = WanTransformer3DModel.from_pretrained(out / "student", subfolder=part)
        assert_same(merged, getattr(scope["pipe"], part).state_dict(), 1e-5)
    # sample.py finds the same teacher, and refuses another.
    clip = [f"--student={out}", "--prompt=a", f"--out={tmp_path / 'a.mp4'}"]
    assert sample.main(clip) == 0
    assert sample.main([*clip, "--overwrite", f"--teacher_lora={high},{low}"]) == 2
    assert (
        "are not known to be the same (other: transformer, transformer_2)"
        in capsys.readouterr().err
    )
    # Neither does the run go on with another.
    other = tiny_flags(random_teacher, out, **changes | dict(teacher_lora=None))
    assert train_distillation.main(other) == 2
    assert "the teacher's files were" in capsys.readouterr().err
    with (out / "run.json").open() as file:
        assert json.load(file)["config"]["teacher_lora"] == [f"{high},{low}:0.7"]
