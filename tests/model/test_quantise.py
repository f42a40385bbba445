"""A base that is stored in fewer bits, or in host memory, leaves the gradient alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from random_teachers import random_transformer
from regression import adapter_gradient
from torch._subclasses import FakeTensorMode

from wan_distill.model import quantise as quantise_module
from wan_distill.model.codes import dequantise, fp8_product, quantise
from wan_distill.model.expert_weights import ExpertWeights
from wan_distill.model.quantise import StoredLinear, load_streamed
from wan_distill.planning import memory
from wan_distill.settings.weight_files import weight_files

# Cosine of the adapter's gradient with the plain one's: what a rounding of the base of this size
# leaves.
AGREEMENT = {"int8": 0.999, "fp8": 0.99, "nf4": 0.95}
KINDS = pytest.mark.parametrize("kind", ["bf16", *AGREEMENT])
QUANTISED = pytest.mark.parametrize("kind", list(AGREEMENT))


def plain() -> WanTransformer3DModel:
    return random_transformer(7, layers=2).requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of `plain()`."""
    path = tmp_path_factory.mktemp("expert")
    plain().save_pretrained(path)
    return path


def loaded(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: bool
) -> WanTransformer3DModel:
    weights = ExpertWeights(weight_files(folder))
    return load_streamed(folder, weights, kind, dtype, torch.device("cpu"), **changes)


def test_weights_are_read_for_one_of_several_processes_on_a_cpu(folder: Path) -> None:
    """Their device is called cpu:0 there."""
    alone = ExpertWeights(weight_files(folder))
    numbered = ExpertWeights(weight_files(folder), device=torch.device("cpu", 0))
    assert all(torch.equal(numbered[name], tensor) for name, tensor in alone.items())


def stored_layer(kind: str, offload: bool, inputs: int = 8, outputs: int = 6) -> StoredLinear:
    return StoredLinear(torch.nn.Linear(inputs, outputs), kind, torch.float32, offload)


# ----------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("fp8", 0.04), ("nf4", 0.12)])
def test_rounding_error_and_size_are_as_documented(kind: str, error: float) -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise(weight, kind)
    again = dequantise(codes, scale, kind, (96, 160), weight)
    assert (again - weight).norm() / weight.norm() < error
    size = codes.numel() * codes.element_size() + scale.numel() * scale.element_size()
    assert size == pytest.approx(weight.numel() * memory.BASE_BYTES[kind], rel=0.05)


@QUANTISED
def test_the_largest_weight_of_each_scale_and_zero_are_exact(kind: str) -> None:
    """Also of a matrix whose size is no multiple of nf4's 64, and of rows of zeros."""
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    weight[2, 4] = 9.0
    again = dequantise(*quantise(weight, kind), kind, (3, 5), weight)
    assert again.shape == weight.shape and not again[1].any()
    assert float(again[2, 4]) == pytest.approx(9.0, rel=1e-6)


@KINDS
def test_a_restored_matrix_has_the_dtype_that_is_asked_for(kind: str) -> None:
    weight = torch.randn(4, 64)
    like = torch.empty(0, dtype=torch.bfloat16)
    restored = dequantise(*quantise(weight, kind), kind, (4, 64), like)
    assert restored.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@QUANTISED
def test_gradients_through_a_quantised_base_agree_with_the_plain_ones(
    kind: str, checkpointing: bool, folder: Path
) -> None:
    coarse = adapter_gradient(loaded(folder, kind), checkpointing)
    assert torch.cosine_similarity(adapter_gradient(plain()), coarse, dim=0) > AGREEMENT[kind]


@QUANTISED
def test_a_quantised_layer_is_exactly_the_layer_with_its_rounded_weights(
    kind: str, folder: Path
) -> None:
    """Arithmetic and backward are exact: all error is the rounding's."""
    model = plain()
    for module in model.blocks.modules():
        if type(module) is torch.nn.Linear:
            shape = (module.out_features, module.in_features)
            codes, scale = quantise(module.weight, kind)
            module.weight.copy_(dequantise(codes, scale, kind, shape, module.weight))
    torch.testing.assert_close(
        adapter_gradient(loaded(folder, kind)), adapter_gradient(model), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_offloaded_base_gives_the_very_same_gradient(checkpointing: bool, folder: Path) -> None:
    model = loaded(folder, "bf16", offload=True, fetch_ahead=checkpointing)
    assert torch.equal(adapter_gradient(model, checkpointing), adapter_gradient(plain()))


def test_bf16_arithmetic_agrees_with_float32(folder: Path) -> None:
    exact = adapter_gradient(plain())
    half = WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    for model, agreement in (
        (half, 0.99),
        (loaded(folder, "int8", torch.bfloat16), 0.98),
        (loaded(folder, "bf16", torch.bfloat16, offload=True), 0.99),
    ):
        rounded = adapter_gradient(model, dtype=torch.bfloat16)
        assert torch.cosine_similarity(exact, rounded, dim=0) > agreement


# ------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])  # nf4 slices, which fake tensors cannot
@pytest.mark.parametrize("offload", [False, True])
def test_only_offloaded_matrices_leave_the_card(kind: str, offload: bool) -> None:
    """Fake tensors stand in for those of a card: they have a device and no content."""
    layer = stored_layer(kind, offload)
    with FakeTensorMode():
        layer.fill(torch.empty(6, 8, device="cuda"))
    assert layer.codes.device.type == ("cpu" if offload else "cuda")
    assert layer.weight.device.type == "cuda" and layer.weight.numel() == 0


@KINDS
def test_an_offloaded_matrix_works_on_another_device_and_stays_where_it_is(kind: str) -> None:
    """The meta device stands in for the card: operations there refuse tensors of the host."""
    layer = stored_layer(kind, offload=True)
    layer.fill(torch.randn(6, 8))
    layer.requires_grad_(False)
    x = torch.empty(2, 8, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.is_meta and x.grad.shape == x.shape
    assert layer.codes.device.type == "cpu"


@KINDS
def test_what_is_not_quantised_is_loaded_as_diffusers_loads_it(kind: str, folder: Path) -> None:
    """Wan keeps its norms and tables in float32 beside bf16 matrices."""
    expected = WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16)
    model = loaded(folder, kind, torch.bfloat16)
    plain_parameters = dict(expected.named_parameters())
    exact = 0
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, StoredLinear) and name.endswith(".weight"):
            assert parameter.dtype == torch.bfloat16 and parameter.numel() == 0
            continue
        assert parameter.dtype == plain_parameters[name].dtype, name
        assert torch.equal(parameter, plain_parameters[name]), name
        exact += parameter.dtype == torch.float32
    assert exact > 2 * 2  # of two blocks
    assert dict(model.config) | {"_name_or_path": folder} == dict(expected.config)
    assert not model.training
    buffers = dict(expected.named_buffers())
    for name, buffer in model.named_buffers():
        assert name.endswith((".scale", ".levels")) or torch.equal(buffer, buffers[name])


@KINDS
def test_every_matrix_of_the_blocks_is_stored(kind: str, folder: Path) -> None:
    model = loaded(folder, kind)
    stored = {name for name, m in model.named_modules() if isinstance(m, StoredLinear)}
    linear = {n for n, m in plain().named_modules() if isinstance(m, torch.nn.Linear)}
    assert stored == {name for name in linear if name.startswith("blocks.")}
    assert all(model.get_submodule(name).kind == kind for name in stored)


# ------------------------------------------------------------------------------------- fp8 products


@pytest.mark.parametrize("bias", [False, True])
def test_an_fp8_product_is_that_of_the_rounded_factors(bias: bool) -> None:
    """The CPU has the product too; it is compared with one in float32."""
    rng = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, 40, 64, generator=rng).bfloat16()
    x[0, 0] = 0
    weight, offset = torch.randn(48, 64, generator=rng), torch.randn(48, generator=rng)
    codes, scale = quantise(weight, "fp8")
    added = offset.bfloat16() if bias else None
    product = fp8_product(x, codes, scale, added)
    assert product.shape == (2, 40, 48) and product.dtype == torch.bfloat16
    rows = x.flatten(0, 1).float()
    size = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    size = (1 / size).bfloat16().float().reciprocal()
    rounded = (rows / size).clamp(-448, 448).bfloat16().to(torch.float8_e4m3fn).float() * size
    matrix = dequantise(codes, scale, "fp8", (48, 64), weight)
    expected = rounded @ matrix.T + (added.float() if bias else 0)
    error = (product.flatten(0, 1).float() - expected).norm() / expected.norm()
    assert error < 0.003  # bf16's own rounding
    exact = x.flatten(0, 1).float() @ weight.T + (offset if bias else 0)
    assert (product.flatten(0, 1).float() - exact).norm() / exact.norm() < 0.05


def test_fp8_products_are_for_devices_that_have_them_and_never_for_gradients(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied = []

    def product(*given: torch.Tensor | None) -> torch.Tensor:
        multiplied.append(given)
        return fp8_product(*given)

    layer = stored_layer("fp8", offload=False, inputs=32, outputs=16)
    layer.dtype = torch.bfloat16
    layer.fill(torch.randn(16, 32))
    layer.bias = torch.nn.Parameter(torch.randn(16), requires_grad=False)
    x = torch.randn(5, 32, requires_grad=True)
    monkeypatch.setattr(quantise_module, "fp8_product", product)
    with torch.no_grad():
        weights_only = layer(x)
    assert not multiplied
    monkeypatch.setattr(quantise_module, "has_fp8_products", lambda device: True)
    layer(x).sum().backward()
    assert not multiplied and x.grad is not None
    with torch.no_grad():
        fast = layer(x)
    assert len(multiplied) == 1
    assert (fast - weights_only).norm() / weights_only.norm() < 0.05
    for unfit in (dict(dtype=torch.float32), dict(kind="int8"), dict(out_features=24)):
        other = stored_layer("fp8", offload=False, inputs=32, outputs=16)
        other.dtype = torch.bfloat16
        for name, value in unfit.items():
            setattr(other, name, value)
        other.fill(torch.randn(other.out_features, 32))
        other.bias = torch.nn.Parameter(torch.randn(other.out_features), requires_grad=False)
        with torch.no_grad():
            other(x)
    assert len(multiplied) == 1
