"""The files that `weight_files` names are those that the loaders read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from transformers import PretrainedConfig, PreTrainedModel
from weight_layouts import KINDS, SETTINGS, empty_part, save, values_in, write

from wan_distill.errors import FileError
from wan_distill.settings.weight_files import variant_or_none, weight_files


class DiffusersModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(1))
        self.b = torch.nn.Parameter(torch.zeros(1))


class TransformersConfig(PretrainedConfig):
    model_type = "tiny"


class TransformersModel(PreTrainedModel):
    config_class = TransformersConfig

    def __init__(self, config: TransformersConfig) -> None:
        super().__init__(config)
        self.a = torch.nn.Parameter(torch.zeros(1))
        self.b = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing is initialised: what no file holds stays zero."""


MODELS = {"model": TransformersModel, "diffusion_pytorch_model": DiffusersModel}


@pytest.fixture(params=list(SETTINGS))
def stem(request) -> str:
    """The stem of the file names of one library."""
    return request.param


@pytest.fixture
def folder(tmp_path: Path, stem: str) -> Path:
    """A folder with that library's config.json and no weights."""
    return empty_part(tmp_path / "part", stem)


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


def loaded_values(folder: Path, stem: str, variant: str | None, is_pickle: bool) -> set[float]:
    """The distinct weights of the model that the library loads."""
    model = MODELS[stem].from_pretrained(
        folder, variant=variant, use_safetensors=False if is_pickle else None
    )
    return {float(parameter.detach()) for parameter in model.parameters()}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_files_are_those_that_the_loader_reads(tmp_path, stem, variant):
    """Every set of up to three checkpoints side by side, each with values of its own."""
    compared = 0
    for n, kinds in enumerate(
        kinds for size in range(4) for kinds in itertools.combinations(KINDS, size)
    ):
        folder = empty_part(tmp_path / str(n), stem)
        for kind in kinds:
            write(kind, folder, stem, 1.0 + KINDS.index(kind))
        try:
            files = weight_files(folder, variant)
        except FileError as error:
            if "two checkpoints" in str(error):
                continue
            with pytest.raises(OSError):
                MODELS[stem].from_pretrained(folder, variant=variant)
            continue
        pickled = files[0].suffix == ".bin"
        assert loaded_values(folder, stem, variant, pickled) == values_in(files), kinds
        compared += 1
    assert compared > 20


def test_the_plain_files_and_a_variant_are_not_two_checkpoints(folder, stem):
    write("single", folder, stem, 1.0)
    write("shards fp16", folder, stem, 2.0)
    assert names(weight_files(folder)) == [f"{stem}.safetensors"]
    assert values_in(weight_files(folder, "fp16")) == {2.0}


def test_beside_an_index_without_its_shards_each_loader_does_its_own(folder, stem):
    write("single", folder, stem, 1.0)
    write("shards", folder, stem, 2.0)
    (folder / f"{stem}-00002-of-00002.safetensors").unlink()
    if stem == "model":
        assert loaded_values(folder, stem, None, False) == {1.0}
        assert names(weight_files(folder)) == ["model.safetensors"]
    else:
        with pytest.raises(FileError, match=r"00002-of-00002.safetensors is named by"):
            weight_files(folder)


def test_an_index_that_names_the_single_file_is_one_checkpoint(folder, stem):
    write("single", folder, stem, 1.0)
    name = f"{stem}.safetensors"
    index = {"metadata": {}, "weight_map": {"a": name, "b": name}}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    assert names(weight_files(folder)) == [name]


def test_the_older_form_of_a_variants_index_is_read_for_diffusers(tmp_path):
    folder = empty_part(tmp_path / "part", "diffusion_pytorch_model")
    write("shards fp16", folder, "diffusion_pytorch_model", 3.0)
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.rename(folder / "diffusion_pytorch_model.safetensors.fp16.index.json")
    assert values_in(weight_files(folder, "fp16")) == {3.0}
    assert variant_or_none(folder, "fp16") == "fp16"


def test_the_file_that_the_configuration_names_is_read(tmp_path):
    """transformers reads `transformers_weights` before any name; so must the comparison."""
    folder = empty_part(tmp_path / "part", "model")
    write("single", folder, "model", 1.0)
    save({"a": 2.0, "b": 2.0}, folder / "other.safetensors")
    settings = SETTINGS["model"] | {"transformers_weights": "other.safetensors"}
    (folder / "config.json").write_text(json.dumps(settings))
    assert names(weight_files(folder)) == ["other.safetensors"]
    assert loaded_values(folder, "model", None, False) == {2.0}
    (folder / "other.safetensors").unlink()
    with pytest.raises(FileError, match="transformers_weights"):
        weight_files(folder)


def test_a_part_without_the_variant_is_loaded_plain(folder, stem):
    write("single", folder, stem, 1.0)
    assert variant_or_none(folder, "fp16") is None
    write("shards fp16", folder, stem, 1.0)
    assert variant_or_none(folder, "fp16") == "fp16"
    assert variant_or_none(folder, "fp1") is None and variant_or_none(folder, None) is None
