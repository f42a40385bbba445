"""The tiny worlds: what is rendered obeys its caption, and what does not is told apart."""

from __future__ import annotations

import pytest
import torch

from wan_distill.maths.tiny_judge import Judge
from wan_distill.maths.tiny_world import ALONE, COLOURS, PAIRS, Scene, World, is_caption

WORLDS = [
    World(),
    World(frames=9, height=32, width=32, scale=0.5),
    World(frames=9, height=48, width=48, scale=0.75),
    World(frames=9, height=64, width=64, pairs=True),
]


def rendered(world: World, count: int = 12) -> tuple[list[str], torch.Tensor]:
    captions = world.training_captions[:: len(world.training_captions) // count][:count]
    return captions, world.render(captions, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_rendered_obeys_and_is_steady(world):
    captions, clips = rendered(world)
    assert all(
        Judge(world).obeys(clip, caption) for clip, caption in zip(clips, captions, strict=True)
    )
    steady = [
        Judge(world).steadiness(clip, caption)
        for clip, caption in zip(clips, captions, strict=True)
    ]
    assert min(steady) > 0.75


@pytest.mark.parametrize("world", WORLDS)
def test_another_colour_direction_or_backward_motion_does_not_obey(world):
    captions, clips = rendered(world)
    for clip, caption in zip(clips, captions, strict=True):
        scene = Scene.parse(caption)
        turned = {"left": "right", "right": "left", "up": "down", "down": "up"}[scene.direction]
        assert not Judge(world).obeys(clip, scene._replace(direction=turned).caption)
        assert not Judge(world).obeys(clip.flip(1), caption)  # played backwards
        assert not Judge(world).obeys(clip[[1, 2, 0]], caption)  # other colours


@pytest.mark.parametrize("world", WORLDS[:2])
def test_a_shape_that_vanishes_half_way_is_not_steady(world):
    captions, clips = rendered(world, 6)
    for clip, caption in zip(clips, captions, strict=True):
        empty = clip[:, :1].flatten(1).median(dim=1).values[:, None, None]
        clip[:, world.frames // 2] = empty
        assert Judge(world).steadiness(clip, caption) == 0.0


@pytest.mark.parametrize("world", WORLDS[:2])
def test_a_shape_of_which_a_speck_is_left_does_not_obey(world):
    captions, clips = rendered(world, 6)
    for clip, caption in zip(clips, captions, strict=True):
        empty = clip[:, 0].flatten(1).median(dim=1).values
        last = clip[:, -1].flatten(1)
        shown = (last - empty[:, None]).abs().sum(0).gt(0.5).nonzero().flatten()
        speck = empty[:, None].repeat(1, last.shape[1])
        kept = shown[len(shown) // 2 - 2 :][:4]  # where its middle is, and in its colour
        speck[:, kept] = last[:, kept]
        clip[:, -1] = speck.view(3, world.height, world.width)
        assert not Judge(world).obeys(clip, caption)


def test_a_still_shape_that_vanishes_does_not_obey():
    world = WORLDS[-1]
    captions, clips = rendered(world, 6)
    for clip, caption in zip(clips, captions, strict=True):
        scene = Scene.parse(caption)
        alone = scene._replace(still=None).caption
        only_mover = world.render([alone], torch.Generator().manual_seed(1))[0]
        assert not Judge(world).obeys(only_mover, caption)
        colour = torch.tensor(COLOURS[scene.still[0]])[:, None, None, None]
        only_mover[:, :, 2:4, 2:4] = 2 * colour - 1  # a speck of the other
        assert not Judge(world).obeys(only_mover, caption)
        assert Judge(world).obeys(clip, caption)


def test_captions_are_held_out_in_a_latin_square():
    assert len(ALONE) == 144 and len(PAIRS) == 120 * 3
    for scenes in (ALONE, PAIRS):
        held_out = [scene for scene in scenes if scene.is_held_out]
        assert len(held_out) == pytest.approx(len(scenes) / 6, rel=0.05)
    world = World(pairs=True)
    assert (len(world.training_captions), len(world.heldout_captions)) == (300, 60)
    assert not set(world.training_captions) & set(world.heldout_captions)


def test_other_sentences_are_no_captions():
    assert is_caption("a big red circle moving left past a blue square")
    for text in ("a dog", "a big blue circle moving left past a blue square", "a red big circle"):
        assert not is_caption(text)
