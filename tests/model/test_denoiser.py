"""Roles and routing of the denoiser, against stock diffusers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline
from random_teachers import TEXT_DIM, random_transformer

from wan_distill.maths.flow import sigma_batch
from wan_distill.maths.sigmas import expert_of, sigma_grid
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser, nonfinite_weight
from wan_distill.settings.job import LORA_TARGETS

BOUNDARY = 0.875


def two_role_denoiser(checkpointing: bool) -> Denoiser:
    """One expert with student and fake-score adapters whose effect is not zero."""
    transformer = random_transformer(0, layers=2)
    for seed, role in enumerate(("student", "fake_score")):
        add_adapter(transformer, role, rank=4, alpha=4, layers=LORA_TARGETS, seed=seed)
        for p in adapter_parameters(transformer, role).values():
            p.data.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return Denoiser({"high": transformer}, BOUNDARY)


def inputs(batch: int = 2, sigma: float = 0.9):
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 16, 2, 4, 4, generator=rng)
    return x, sigma_batch(sigma, x), Condition(torch.randn(batch, 8, TEXT_DIM, generator=rng))


def gradients_after_scores(denoiser: Denoiser, role: str) -> dict[str, torch.Tensor | None]:
    """Gradients after `role` ran with gradient, the other roles without, and only then backward:
    DMD's order.
    """
    x, sigma, condition = inputs()
    with denoiser.training(role):
        velocity = denoiser.velocity(x, sigma, condition, role=role)
        with torch.no_grad():
            for other in ("teacher", "student", "fake_score"):
                denoiser.velocity(x, sigma, condition, role=other)
        velocity.square().mean().backward()
    return {name: p.grad for name, p in denoiser.experts["high"].named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_the_trained_role_and_no_other_gets_gradients(role, checkpointing):
    denoiser = two_role_denoiser(checkpointing)
    gradients = gradients_after_scores(denoiser, role)
    trained = set(adapter_parameters(denoiser.experts["high"], role))
    in_a_block, outside = 10, 4  # attention's four occur twice
    assert len(LORA_TARGETS) == 6 + outside and len(trained) == 2 * (2 * in_a_block + outside)
    for name, gradient in gradients.items():
        if name in trained:
            assert gradient is not None and gradient.abs().max() > 0, name
        else:
            assert gradient is None, name


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_gradient_checkpointing_changes_no_gradient(role):
    plain = gradients_after_scores(two_role_denoiser(False), role)
    recomputed = gradients_after_scores(two_role_denoiser(True), role)
    for name, gradient in plain.items():
        assert (gradient is None) == (recomputed[name] is None)
        if gradient is not None:
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-9)


def test_teacher_is_the_base_and_roles_differ():
    denoiser = two_role_denoiser(False)
    x, sigma, condition = inputs()
    with torch.no_grad():
        roles = ("teacher", "student", "fake_score")
        teacher, student, fake = (
            denoiser.velocity(x, sigma, condition, role=role) for role in roles
        )
        base = random_transformer(0, layers=2)(x, 1000 * sigma.float(), condition.prompt).sample
    torch.testing.assert_close(teacher, base, rtol=0, atol=0)
    assert not any(
        p.requires_grad for p in denoiser.experts["high"].parameters()
    )  # nothing is in training
    assert (student - teacher).abs().max() > 1e-3 and (student - fake).abs().max() > 1e-3


def test_a_role_switch_is_undone_after_an_error():
    denoiser = two_role_denoiser(False)
    x, sigma, condition = inputs()
    before = denoiser.velocity(x, sigma, condition, role="teacher")
    with pytest.raises(RuntimeError), denoiser.training("student"):
        denoiser.velocity(x[:, :3], sigma, condition, role="student")
    assert not any(p.requires_grad for p in denoiser.experts["high"].parameters())
    torch.testing.assert_close(
        denoiser.velocity(x, sigma, condition, role="teacher"), before, rtol=0, atol=0
    )


def test_gradients_of_a_role_out_of_training_are_refused():
    denoiser = two_role_denoiser(False)
    x, sigma, condition = inputs()
    with denoiser.training("student"), pytest.raises(RuntimeError, match="no_grad"):
        denoiser.velocity(x, sigma, condition, role="fake_score")


def test_guidance_is_the_pipelines():
    denoiser = two_role_denoiser(False)
    x, sigma, condition = inputs()
    negative = torch.zeros(1, 8, TEXT_DIM)
    with torch.no_grad():
        cond = denoiser.velocity(x, sigma, condition, role="teacher")
        without = Condition(negative.expand_as(condition.prompt))
        uncond = denoiser.velocity(x, sigma, without, role="teacher")
        guided = denoiser.guided_velocity(x, sigma, condition, negative, 4.0)
    torch.testing.assert_close(guided, uncond + 4.0 * (cond - uncond), rtol=1e-5, atol=1e-5)


def test_a_whole_student_has_no_teacher_and_no_scores():
    """--student_layers: all weights are the student's own."""
    transformer = random_transformer(0)
    denoiser = Denoiser({"high": transformer}, BOUNDARY, whole=True)
    x, sigma, condition = inputs()
    with torch.no_grad():
        velocity = denoiser.velocity(x, sigma, condition, role="student")
    assert velocity.isfinite().all()
    for role in ("teacher", "fake_score", "real_score"):
        with pytest.raises(RuntimeError, match=f"{role} asked for.*no teacher beneath"):
            denoiser.velocity(x, sigma, condition, role=role)
    with pytest.raises(RuntimeError, match="no teacher beneath"):
        denoiser.guided_velocity(x, sigma, condition, torch.zeros(1, 8, TEXT_DIM), 4.0)


# ------------------------------------------------------------------------ what transformers get


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformer_gets_exact_timesteps(dtype, per_token):
    """In bf16, 833.3 would become 832. One per token for Wan2.2 TI2V-5B, of clips that are not
    square.
    """
    transformer = random_transformer(0).to(dtype)
    sent = {}

    def record(module, given, named):
        sent["autocast"] = torch.is_autocast_enabled("cpu")
        sent.update(zip(("hidden_states", "timestep", "encoder_hidden_states"), given, strict=True))

    transformer.register_forward_pre_hook(record, with_kwargs=True)
    autocast = partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
    denoiser = Denoiser({"high": transformer}, None, expand_timesteps=per_token, autocast=autocast)
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(2, 16, 3, 4, 6, generator=rng)
    sigma = torch.tensor([5 / 6, 0.1], dtype=torch.float64)
    with torch.no_grad():
        velocity = denoiser.velocity(
            x, sigma, Condition(torch.zeros(2, 8, TEXT_DIM)), role="teacher"
        )
    expected = torch.tensor([833.3333, 100.0])
    tokens = 3 * (4 // 2) * (6 // 2)
    if per_token:
        expected = expected[:, None].expand(2, tokens)
    assert sent["timestep"].dtype == torch.float32
    torch.testing.assert_close(sent["timestep"], expected, rtol=1e-7, atol=1e-4)
    assert sent["hidden_states"].dtype == sent["encoder_hidden_states"].dtype == dtype
    assert sent["autocast"] == (dtype != torch.float32) and not torch.is_autocast_enabled("cpu")
    assert velocity.dtype == torch.float32 and velocity.shape == x.shape


def test_a_guidance_scale_of_one_costs_one_evaluation():
    denoiser = two_role_denoiser(False)
    batches = []
    denoiser.experts["high"].register_forward_hook(
        lambda _, given, __: batches.append(len(given[0]))
    )
    x, sigma, condition = inputs()
    negative = torch.zeros(1, 8, TEXT_DIM)
    with torch.no_grad():
        denoiser.guided_velocity(x, sigma, condition, negative, 1.0)
        denoiser.guided_velocity(x, sigma, condition, negative, 3.0)
    assert batches == [2, 4]


def test_the_first_weight_that_is_not_finite_is_named():
    transformer = random_transformer(0).to(torch.bfloat16)
    assert nonfinite_weight(transformer) is None
    for name in ("blocks.0.ffn.net.2.weight", "blocks.0.attn1.to_q.bias"):
        transformer.get_parameter(name).data.view(-1)[-1] = torch.inf
    assert nonfinite_weight(transformer) == "blocks.0.attn1.to_q.bias"


# ------------------------------------------------------------------------------------------ experts


def test_sigmas_on_both_sides_of_the_boundary_are_refused():
    denoiser = two_role_denoiser(False)
    x, _, condition = inputs()
    with pytest.raises(ValueError, match="both sides"):
        denoiser.velocity(x, torch.tensor([0.9, 0.5]), condition, role="teacher")
    with pytest.raises(ValueError, match="not loaded"):
        denoiser.velocity(x, torch.tensor([0.4, 0.5]), condition, role="teacher")


def test_each_expert_answers_for_its_own_sigmas():
    experts = {"high": random_transformer(0), "low": random_transformer(1)}
    denoiser = Denoiser(experts, BOUNDARY)
    for level, expert in ((0.9, "high"), (BOUNDARY, "high"), (0.874, "low"), (0.01, "low")):
        x, sigma, condition = inputs(sigma=level)
        with torch.no_grad():
            velocity = denoiser.velocity(x, sigma, condition, role="teacher")
            expected = experts[expert](x, (1000 * sigma).float(), condition.prompt).sample
        assert torch.equal(velocity, expected)


@pytest.mark.parametrize("shift, steps", [(5, 2), (5, 3), (5, 4), (5, 8), (7, 4)])
def test_routing_is_the_pipelines_also_at_exactly_the_boundary(random_teacher, shift, steps):
    """Shift 7 with 4 steps puts a step at sigma 0.875 exactly; the pipeline gives it to
    `transformer`.
    """
    pipe = WanPipeline.from_pretrained(random_teacher)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    called = []
    pipe.transformer.register_forward_hook(lambda *_: called.append("high"))
    pipe.transformer_2.register_forward_hook(lambda *_: called.append("low"))
    pipe(
        prompt_embeds=torch.zeros(1, 4, TEXT_DIM),
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
    )
    sigmas = sigma_grid(steps, shift)
    assert called == [expert_of(s, BOUNDARY) for s in sigmas[:-1]]
    if shift == 7:
        assert sigmas[2] == BOUNDARY and called[2] == "high"
