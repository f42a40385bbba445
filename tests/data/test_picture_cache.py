"""Pictures that clips begin with: encoded once, kept, and part of what samples depend on."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import PICTURES, PROMPTS

from wan_distill.data.first_frames import FirstFrames, PicturedPrompt
from wan_distill.data.samples import SampleRequest, SampleStore
from wan_distill.data.solving import solve_missing
from wan_distill.errors import Halted, UsageError
from wan_distill.maths.flow import euler_step, guide, sigma_batch
from wan_distill.maths.sigmas import expert_of
from wan_distill.model.condition import Condition
from wan_distill.settings.sample_specs import trajectories

KEY = dict(vae="a vae", size=[5, 32, 32])


@pytest.fixture
def first_frames(tmp_path) -> FirstFrames:
    return FirstFrames(tmp_path / "pictures", KEY, 4, torch.device("cpu"))


def pixels(level: float) -> torch.Tensor:
    return torch.full((3, 32, 32), level)


def test_each_picture_is_encoded_once_and_read_back(first_frames):
    encoded = []

    def encode(given):
        encoded.append(float(given.max()))
        return given.mean() * torch.ones(16, 2, 4, 4)

    both = {"dark": lambda: pixels(-1.0), "grey": lambda: pixels(0.5)}
    first_frames.fill(dict(dark=both["dark"]), encode, shown=False)
    first_frames.fill(both, encode, shown=False)
    assert encoded == [-1, 0.5] and first_frames.missing(both) == []
    prompts = [
        PicturedPrompt("a", "grey"),
        PicturedPrompt("b", "dark"),
        PicturedPrompt("c", "grey"),
    ]
    batch = first_frames.batch(prompts)
    assert batch.shape == (3, 4 + 16, 2, 4, 4)
    assert batch[:, :4, 0].unique().tolist() == [1] and batch[:, :4, 1].unique().tolist() == [0]
    assert [float(x) for x in batch[:, 4, 1, 2, 3]] == [0.5, -1, 0.5]
    shown = first_frames.pixels(prompts[:2])
    assert shown.shape == (2, 32, 32, 3) and shown[:, 0, 0, 0].tolist() == [0.75, 0]


@pytest.mark.parametrize("change", [dict(vae="another"), dict(size=[9, 32, 32])])
def test_another_vae_or_size_is_another_file(first_frames, change):
    other = FirstFrames(first_frames.folder, KEY | change, 4, torch.device("cpu"))
    assert other.file("a picture") != first_frames.file("a picture")
    assert first_frames.file("a picture") != first_frames.file("another")


def test_latents_that_are_not_finite_are_not_kept(first_frames):
    with pytest.raises(Halted, match="picture dark: the VAE gives latents that are not finite"):
        first_frames.fill(
            dict(dark=lambda: pixels(-1.0)), lambda given: given / 0 * torch.inf, shown=False
        )
    assert first_frames.missing(["dark"]) == ["dark"]


def test_a_damaged_file_is_named_with_the_remedy(first_frames):
    first_frames.fill(
        dict(dark=lambda: pixels(-1.0)), lambda given: given[None].clone(), shown=False
    )
    file = first_frames.file("dark")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match=f"{file.name}.*delete it and run again"):
        first_frames.batch([PicturedPrompt("a", "dark")])


# -------------------------------------------------------------------------------------- in samples


def test_samples_are_guided_with_the_picture_on_both_sides(picture_run):
    """Another sampler, written out: the unguided half has the picture too."""
    run = picture_run(method="trajectory")
    store = SampleStore(run, trajectories(run.config))
    solve_missing(run, [SampleRequest(store, frozenset(range(4)))])
    denoisers = {e: run.denoiser(e, run.teacher.load_expert(e)) for e in ("high", "low")}
    x, text = store.noise(1)[None], run.embeddings.batch([PROMPTS[1]])
    image = run.first_frames.batch([PicturedPrompt(PROMPTS[1], PICTURES[1])])
    for sigma, after in itertools.pairwise(store.spec.sigmas):
        now, owner = sigma_batch(sigma, x), expert_of(sigma, 0.9)
        with torch.no_grad():
            with_prompt, without = (
                denoisers[owner].velocity(x, now, Condition(embedding, image), role="teacher")
                for embedding in (text, run.negative)
            )
        x = euler_step(x, guide(with_prompt, without, 3.5), now, sigma_batch(after, x))
        if after in store.spec.stored:
            torch.testing.assert_close(store.at([1], [after]), x, rtol=1e-4, atol=1e-5)


def test_the_pictures_and_their_encoding_are_in_the_name_of_samples(picture_run):
    run = picture_run(method="trajectory")
    spec = trajectories(run.config)
    store = SampleStore(run, spec)
    assert SampleStore(run, spec).folder == store.folder
    others = [PicturedPrompt(text, "another picture") for text in PROMPTS]
    assert SampleStore(run, spec, others).folder != store.folder
    run.first_frames.key["vae"] = "another"
    assert SampleStore(run, spec).folder != store.folder


def test_text_to_video_has_the_names_that_it_had(make_run):
    """Nothing of pictures is in them: samples of earlier versions are found again."""
    run = make_run(method="trajectory")
    key = SampleStore(run, trajectories(run.config)).key()
    assert key["prompts"] == list(PROMPTS) and "first_frames" not in key
    assert run.condition(PROMPTS).image is None
    assert run.first_frame_statistics(PROMPTS, torch.zeros(3, 5, 32, 32, 3)) == {}
