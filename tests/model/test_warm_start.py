"""A student that begins where another run's ended."""

from __future__ import annotations

import pytest
import torch
from lessons import make_lesson
from random_teachers import TEXT_DIM, random_transformer

from wan_distill.errors import UsageError
from wan_distill.layout import LORA_FILE
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.student_files import init_student, save_lora
from wan_distill.settings.job import LORA_TARGETS

BOUNDARY = 0.875


def test_a_warm_start_begins_with_the_other_runs_student(make_run, tmp_path):
    run = make_run(method="dmd", lora_alpha=16.0, diversity_weight=0.0)
    lesson = make_lesson(run, "high", moved=0.05)
    first = lesson.denoiser
    file = tmp_path / LORA_FILE["high"]
    save_lora(file, lesson.learners["student"].exported(), run.config, run.info, "high")
    second = random_transformer(1)
    add_adapter(second, "student", rank=4, alpha=2.0, layers=LORA_TARGETS, seed=9)
    init_student(second, file)
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    prompt, sigma = torch.zeros(1, 12, TEXT_DIM), torch.tensor([0.9], dtype=torch.float64)
    with torch.no_grad():
        expected = first.velocity(x, sigma, prompt, role="student")
        begun = Denoiser({"high": second}, BOUNDARY).velocity(x, sigma, prompt, role="student")
        teacher = first.velocity(x, sigma, prompt, role="teacher")
    torch.testing.assert_close(begun, expected, rtol=1e-4, atol=1e-5)
    assert (expected - teacher).abs().max() > 1e-3
    smaller = random_transformer(1)
    add_adapter(smaller, "student", rank=2, alpha=2.0, layers=LORA_TARGETS, seed=9)
    with pytest.raises(UsageError, match="--rank"):
        init_student(smaller, file)


def test_a_warm_start_of_equal_alpha_takes_the_weights_as_they_are(make_run, tmp_path):
    run = make_run(method="trajectory")
    weights = make_lesson(run, "high", moved=0.05).learners["student"].exported()
    file = tmp_path / LORA_FILE["high"]
    save_lora(file, weights, run.config, run.info, "high")
    second = random_transformer(1)
    alpha = run.config.lora_alpha
    add_adapter(second, "student", rank=4, alpha=alpha, layers=LORA_TARGETS, seed=9)
    init_student(second, file)
    begun = adapter_parameters(second, "student")
    assert set(begun) == set(weights)
    assert all(torch.equal(p, weights[name]) for name, p in begun.items())
