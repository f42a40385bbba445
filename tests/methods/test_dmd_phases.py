"""Phased distribution matching: exits, hand-overs, and where each expert's phase begins."""

from __future__ import annotations

import pytest
import torch
from lessons import make_lesson, rows_of, solved_inputs

from wan_distill.data.samples import open_inputs
from wan_distill.maths.flow import sample
from wan_distill.maths.randomness import generator
from wan_distill.methods import make_method
from wan_distill.model.student_files import save_lora

# ------------------------------------------------------------------------------- exits and phases


def test_the_exit_is_agreed_over_ranks_and_changes_with_the_update(make_run):
    run = make_run(method="dmd", diversity_weight=0.0, sampling_steps=(2, 4, 8))
    method, inputs = make_method(run.config, "high"), open_inputs(run, "high")
    exits = set()
    for step in range(80):
        ranks = [method.batch_at(inputs, step, micro) for micro in (2 * step, 2 * step + 1)]
        assert len({(b.sigmas, b.exit) for b in ranks}) == 1
        assert not torch.equal(ranks[0].x, ranks[1].x)
        exits.add((len(ranks[0].sigmas) - 1, ranks[0].exit))
    assert exits == {(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)}


@pytest.mark.parametrize(
    ("steps", "end"), [((1,), 0.0), ((2,), 5 / 6), ((3,), 5 / 7), ((6,), 5 / 6), ((8,), 5 / 6)]
)
def test_any_number_of_steps_has_its_own_hand_over(make_run, steps, end):
    run = make_run(method="dmd", diversity_weight=0.0, sampling_steps=steps)
    assert run.config.experts == (("high", "low") if end else ("high",))
    batch = make_method(run.config, "high").batch_at(open_inputs(run, "high"), 0, 0)
    assert batch.sigmas[0] == 1 and batch.sigmas[-1] == pytest.approx(end)


def test_the_diversity_loss_takes_the_first_step_from_the_matching_loss(make_run):
    run = make_run(method="dmd", diversity_weight=0.05, critic_warmup_steps=0, critic_updates=1)
    lesson = make_lesson(run, "high", moved=0.02)
    assert {lesson.batch(step).exit for step in range(20)} == {1}
    assert lesson.batch(0).anchor is None  # the critic's update
    batch, anchors = lesson.batch(1), lesson.inputs.samples["anchors"]
    (second,) = anchors.spec.stored
    rows = rows_of(batch.x, anchors, 1.0)
    assert torch.equal(batch.x, torch.stack([anchors.noise(row) for row in rows]))
    assert torch.equal(batch.anchor, anchors.at(rows, [second] * 2))
    matching, diversity = lesson.learn("student", batch, generator("g"))
    with torch.no_grad():
        sigma = torch.ones(2, dtype=torch.float64)
        velocity = lesson.denoiser.velocity(batch.x, sigma, batch.condition, role="student")
    target = (batch.x - batch.anchor) / (1 - second)
    expected = (velocity - target).square().mean()
    torch.testing.assert_close(diversity.metrics["diversity_loss"], expected)
    torch.testing.assert_close(diversity.value.detach(), 0.05 * expected)
    assert "diversity_loss" not in matching.metrics


# ------------------------------------------------------------------------------ the low expert's


def test_the_low_phase_begins_where_the_distilled_high_expert_ends(make_run):
    """Each sampling grid at the end of its own high phase: that of 2 steps goes straight there."""
    run = make_run(method="dmd", diversity_weight=0.0, sampling_steps=(2, 4))
    high = make_lesson(run, "high", moved=0.05)
    weights = high.learners["student"].exported()
    file = run.folder.lora("high")
    save_lora(file, weights, run.config, run.info, "high")
    inputs, low = solved_inputs(run, "low"), make_method(run.config, "low")

    def carried(steps: int, row: int) -> torch.Tensor:
        """Latents of one row where the high phase of `steps` ends."""
        store = inputs.samples[f"inputs {steps}"]
        condition = store.condition([row])
        sigmas = [sigma for sigma in run.config.sigmas(steps) if sigma >= 0.83]
        assert len(sigmas) == steps // 2 + 1
        with torch.no_grad():
            return sample(
                lambda x, s: high.denoiser.velocity(x, s, condition, role="student"),
                store.noise(row)[None],
                sigmas,
            )[0]

    assert (carried(2, 0) - carried(4, 0)).abs().max() > 1e-2
    grids = set()
    for step in range(8):
        batch = low.batch_at(inputs, step, step)
        steps = {(5 / 6, 0): 2, (5 / 6, 0.625, 0): 4}[batch.sigmas]
        grids.add(steps)
        for latents, row in zip(batch.x, low.rows_at(step, step)[f"inputs {steps}"], strict=True):
            torch.testing.assert_close(latents, carried(steps, row), rtol=1e-4, atol=1e-5)
    assert grids == {2, 4}

    before = inputs.samples["inputs 4"].folder
    save_lora(file, {k: 2 * v for k, v in weights.items()}, run.config, run.info, "high")
    after = open_inputs(run, "low").samples["inputs 4"].folder
    assert after != before  # another high expert, other inputs


def test_without_a_distilled_high_expert_the_low_ones_pairs_share_their_beginning(make_run, capsys):
    run = make_run(method="dmd", real_score="samples", expert="low")
    method, inputs = make_method(run.config, "low"), solved_inputs(run, "low")
    assert "There is no distilled high expert" in capsys.readouterr().out
    assert inputs.samples["inputs 4"] is inputs.samples["samples"]
    batch = method.batch_at(inputs, 0, 0)
    rows = method.rows_at(0, 0)["samples"]
    sigmas = [batch.sigmas[0]] * len(rows)
    assert torch.equal(batch.x, inputs.samples["samples"].at(rows, sigmas))
