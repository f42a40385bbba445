"""Does a clip begin with its picture, and leave it?"""

from __future__ import annotations

import math

import pytest
import torch

from wan_distill.maths.first_frames import first_frame_statistics


def test_a_clip_that_stands_still_is_as_far_from_the_picture_all_the_time():
    pictures = torch.rand(2, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    frozen = (pictures[:, None] + torch.tensor([0.1, -0.1]).view(2, 1, 1, 1, 1)).repeat(
        1, 5, 1, 1, 1
    )
    found = first_frame_statistics(frozen, pictures)
    assert found == pytest.approx(dict(first_frame=0.1, departure=0.1))


def test_the_first_frame_is_measured_apart_from_those_after_it():
    pictures = torch.zeros(1, 2, 2, 3)
    frames = torch.tensor([0.0, 0.2, 0.4]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 2, 3)
    found = first_frame_statistics(frames, pictures)
    assert found == pytest.approx(dict(first_frame=0.0, departure=0.3))
    half = frames.clone()
    half[..., 0] = 0  # one channel of three: root mean square
    found = first_frame_statistics(half, pictures)
    assert found["departure"] == pytest.approx(0.3 * math.sqrt(2 / 3))


def test_each_clip_is_compared_with_its_own_picture():
    pictures = torch.stack([torch.zeros(2, 2, 3), torch.ones(2, 2, 3)])
    clips = pictures[:, None].expand(2, 3, 2, 2, 3)
    assert first_frame_statistics(clips, pictures) == dict(first_frame=0.0, departure=0.0)
    assert first_frame_statistics(clips.flip(0), pictures)["first_frame"] == 1


def test_a_clip_of_one_frame_departs_nowhere():
    found = first_frame_statistics(torch.zeros(1, 1, 2, 2, 3), torch.ones(1, 2, 2, 3))
    assert found["first_frame"] == 1 and math.isnan(found["departure"])
