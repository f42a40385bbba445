"""A LoRA says the same in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from foreign_loras import LAYOUTS, products_of, write_in
from safetensors.torch import load_file, save_file

from wan_distill.errors import UsageError
from wan_distill.lora.files import LoraFile
from wan_distill.lora.layouts import named_for
from wan_distill.settings.lora_headers import LoraHeader
from wan_distill.settings.lora_names import OF_A_BLOCK, OUTSIDE, TRAINED, original_name, read_name

RANK, ALPHA = 4, 3.0  # their quotient is no power of two
SHAPE = torch.Size((8, 6))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of two blocks in this tool's own layout."""
    lora = {}
    rng = torch.Generator().manual_seed(0)
    for block in range(2):
        for layer in TRAINED.values():
            stem = f"diffusion_model.blocks.{block}.{layer}"
            lora[f"{stem}.lora_down.weight"] = torch.randn(RANK, SHAPE[1], generator=rng)
            lora[f"{stem}.lora_up.weight"] = torch.randn(SHAPE[0], RANK, generator=rng)
            lora[f"{stem}.alpha"] = torch.tensor(ALPHA)
    file = tmp_path_factory.mktemp("loras") / "ours.safetensors"
    save_file(lora, file)
    return file


FIRST = "diffusion_model.blocks.0.self_attn.q"


def of_rank(rank: int) -> dict[str, torch.Tensor]:
    down, up = torch.zeros(rank, SHAPE[1]), torch.zeros(SHAPE[0], rank)
    return {f"{FIRST}.lora_down.weight": down, f"{FIRST}.lora_up.weight": up}


def open_lora(file: Path) -> LoraFile:
    return LoraFile(LoraHeader(file, "--flag"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_changes(ours: Path, tmp_path: Path, layout: str) -> None:
    theirs = open_lora(write_in(layout, ours, tmp_path / "theirs.safetensors"))
    products = products_of(ours)
    assert {
        original_name(m) for m, parts in theirs.header.layers.items() if "down" in parts
    } == set(products)
    assert theirs.header.ranks == (RANK,) and theirs.header.unknown == []
    for module, parts in theirs.header.layers.items():
        if "down" in parts:
            down, up, alpha = products[original_name(module)]
            expected = up @ down * (alpha / RANK)
            torch.testing.assert_close(theirs.read(module).change(SHAPE), expected)


def test_only_what_is_added_and_not_zero_is_an_extra(ours: Path, tmp_path: Path) -> None:
    file = write_in("lightning with extras", ours, tmp_path / "theirs.safetensors")
    ((name, norm),) = open_lora(file).extras()
    assert name == "diffusion_model.blocks.0.cross_attn.k.diff_b"
    assert norm == pytest.approx(0.01 * 8**0.5)


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "kohya"])
def test_what_is_written_is_read_again(ours: Path, tmp_path: Path, layout: str) -> None:
    source, target = open_lora(ours), tmp_path / "theirs.safetensors"
    tensors = {}
    for module in source.header.layers:
        named, left_out = named_for(layout, module, source.read(module))
        tensors |= named
        assert left_out == []
    save_file(tensors, target)
    again = open_lora(target)
    assert (
        again.header.layout == layout and again.header.layers.keys() == source.header.layers.keys()
    )
    for module in source.header.layers:
        expected = source.read(module).change(SHAPE)
        torch.testing.assert_close(again.read(module).change(SHAPE), expected)


def test_every_layer_has_one_name_in_each_layout() -> None:
    for layer in [*(f"blocks.11.{name}" for name in OF_A_BLOCK), *OUTSIDE]:
        original = original_name(layer)
        kohya = "lora_unet_" + original.replace(".", "_")
        for stem in (layer, f"transformer.{layer}", original, f"diffusion_model.{original}", kohya):
            assert read_name(f"{stem}.alpha").module == layer
    assert read_name("blocks.0.self_attn.unknown.alpha") is None
    assert read_name("self_attn.q.alpha") is None
    assert read_name("diffusion_model.blocks.0.self_attn.q.weight") is None


def test_peft_settings_scale_layers_by_pattern(ours: Path, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    file = write_in("base_model", ours, folder / "adapter_model.safetensors")
    settings = dict(r=RANK, lora_alpha=8, alpha_pattern={"to_q": 2}, use_rslora=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    lora = open_lora(file)
    assert lora.scale("blocks.0.attn1.to_k") == 4.0  # 8 / sqrt(4)
    assert lora.scale("blocks.0.attn1.to_q") == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.clear(), "holds no LoRA layer of Wan"),
        (lambda t: t.update(other=torch.zeros(1)), None),
        (
            lambda t: t.pop(next(n for n in t if "lora_up" in n)),
            "blocks.* has its down matrix without the up",
        ),
        (
            lambda t: t.update({"diffusion_model.blocks.0.ffn.0.lokr_w1": torch.zeros(1)}),
            "holds lokr tensors",
        ),
        (
            lambda t: t.update({f"{FIRST}.alpha": torch.ones(3)}),
            r".* has an alpha of \[3\] numbers",
        ),
        (lambda t: t.update({f"{FIRST}.alpha": torch.ones(1)}), None),
        (
            lambda t: t.update({f"{FIRST}.lora_up.weight": torch.zeros(8, 7)}),
            r".* has matrices of \[8, 7\] and \[4, 6\], which have no product",
        ),
        (lambda t: t.update({f"{FIRST}.lora_down.weight": torch.ones(5)}), ".*have no product"),
        (lambda t: t.update(of_rank(0)), ".*have no product"),
        (
            lambda t: t.update({f"{FIRST}.lora_down.weight": torch.ones(4, 6, dtype=torch.int8)}),
            ".* is stored as I8, which is no float",
        ),
    ],
)
def test_what_is_no_whole_lora_is_refused(ours: Path, tmp_path: Path, change, said) -> None:
    tensors = load_file(ours)
    change(tensors)
    file = tmp_path / "changed.safetensors"
    save_file(tensors, file)
    if said is None:
        assert LoraHeader(file, "--flag").unknown in (["other"], [])
        return
    with pytest.raises(UsageError, match=f"--flag .*changed.safetensors: {said}"):
        LoraHeader(file, "--flag")


@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight", "alpha"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_no_numbers_are_found(ours: Path, tmp_path: Path, part, value) -> None:
    open_lora(ours).check()
    tensors = load_file(ours)
    tensors[f"{FIRST}.{part}"].view(-1)[-1:] = value
    file = tmp_path / "changed.safetensors"
    save_file(tensors, file)
    with pytest.raises(
        UsageError, match=r"--flag .*: blocks\.0\.attn1\.to_q holds values that are"
    ):
        open_lora(file).check()


@pytest.mark.parametrize(
    "settings", ["{", "[1]", '{"a.lora_alpha": "x"}', '{"a.alpha_pattern": {"q": []}}', "[" * 99999]
)
def test_peft_settings_that_are_none_are_refused(ours: Path, tmp_path: Path, settings) -> None:
    file = write_in("diffusers", ours, tmp_path / "theirs.safetensors")
    save_file(load_file(file), file, {"lora_adapter_metadata": settings})
    with pytest.raises(UsageError, match="its adapter settings cannot be read"):
        open_lora(file).check()


@pytest.mark.parametrize(
    "schedule",
    [
        *("{", "[1]", "[" * 99999, '{"expert": 5}', '{"sigmas": "x"}', '{"flow_shift": NaN}'),
        *('{"sampling_steps": []}', '{"sampling_steps": [0]}', '{"height": "32"}'),
    ],
)
def test_a_schedule_that_is_none_is_refused(ours: Path, tmp_path: Path, schedule) -> None:
    file = tmp_path / "changed.safetensors"
    save_file(load_file(ours), file, {"wan_distill": schedule})
    with pytest.raises(UsageError, match=r"changed.safetensors: its schedule .*; train again"):
        _ = LoraHeader(file, "--flag").schedule


def test_a_damaged_file_is_refused(ours: Path, tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    file.write_bytes(ours.read_bytes()[:-9])
    with pytest.raises(UsageError, match="truncated"):
        LoraHeader(file, "--flag")
