"""The gap closed, its interval, and what clips of tiny teachers show."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from wan_distill.maths.distances import picture_statistics
from wan_distill.maths.tiny_world import World
from wan_distill.model.vae import decode
from wan_distill.results import comparison
from wan_distill.results.comparison import gap_closed, gap_error, interval_95, judged, shown


def test_the_gap_is_closed_at_the_floor_and_open_at_the_worst():
    assert (gap_closed(2.0, 2.0, 10.0), gap_closed(10.0, 2.0, 10.0)) == (1.0, 0.0)
    assert gap_closed(4.0, 2.0, 10.0) == 0.75


def test_the_error_is_the_spread_over_other_samples():
    """The jackknife of one set against the spread over 40 sets of the same distributions."""
    rng = torch.Generator().manual_seed(0)

    def sets(shift: float = 0.6, worst: float = 3.0, count: int = 128, width: int = 4):
        draws = torch.randn(4, count, width, generator=rng, dtype=torch.float64)
        return [draws[0] + shift, draws[1], draws[2] + worst], draws[3]

    from wan_distill.maths.distances import frechet_distance

    drawn = [sets() for _ in range(40)]
    closed = [gap_closed(*(frechet_distance(s, ref) for s in three)) for three, ref in drawn]
    spread = float(torch.tensor(closed).std())
    errors = torch.tensor([gap_error(*each) for each in drawn])
    assert float(errors.median()) == pytest.approx(spread, rel=0.35)


def test_the_interval_is_two_gap_errors_wide():
    assert interval_95(0.9, 0.1) == pytest.approx([0.704, 1.096])


def test_clips_of_a_tiny_teacher_are_judged_by_their_captions():
    world = World()
    captions = world.training_captions[:4]
    clips = (world.render(captions, torch.Generator().manual_seed(0)) + 1) / 2
    frames = clips.permute(0, 2, 3, 4, 1)  # [N, F, H, W, 3], as clips are decoded
    values = dataclasses.asdict(world)
    found = judged(values, frames, captions)
    assert len(found) == len(captions)
    assert all(obeys and steadiness > 0.8 for obeys, steadiness in found)
    assert not any(obeys for obeys, _ in judged(values, frames.flip(1), captions))
    assert judged(values, frames, [*captions[:3], "a dog"]) == found[:3]
    assert judged(None, frames, captions) == judged(values, frames, ["a dog"] * 4) == []


@pytest.mark.parametrize("tiny", [False, True])
def test_means_are_over_more_clips_of_a_tiny_teacher_than_of_others(make_run, monkeypatch, tiny):
    monkeypatch.setattr(comparison, "AT_ONCE", 2)  # the last part is smaller
    monkeypatch.setattr(comparison, "PICTURES", 3)
    monkeypatch.setattr(comparison, "JUDGED_PICTURES", 5)
    run = make_run(method="trajectory")
    assert run.info.world is None
    texts = ["a dog"] * 4 + World().training_captions[:1] + ["a dog"]
    if tiny:
        info = dataclasses.replace(run.info, world=dataclasses.asdict(World()))
        monkeypatch.setattr(run.teacher, "info", info)
    latents = torch.randn(6, *run.latent_shape, generator=torch.Generator().manual_seed(0))
    clips = decode(run.teacher.load_vae(), latents[: 5 if tiny else 3])
    found = shown(run, latents, texts)
    expected = picture_statistics(clips)
    assert {name: found.pop(name) for name in expected} == pytest.approx(expected)
    obeys, steadiness = judged(dataclasses.asdict(World()), clips[-1:], texts[4:5])[0]
    assert found == (dict(obeys=obeys, steadiness=steadiness) if tiny else {})
