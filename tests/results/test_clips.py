"""The clips on the page: which are shown, and how large ones are embedded."""

from __future__ import annotations

import base64
import json
import os

import imageio.v3 as imageio
import numpy
import pytest

from wan_distill.layout import RunFolder
from wan_distill.results.clips import LARGE, embedded_clip, latest_pairs, over_time
from wan_distill.results.progress import Segment
from wan_distill.settings.config import Config
from wan_distill.system.pictures import write_video

CONFIG = Config(method="dmd", output_dir="out")


@pytest.fixture
def segment(tmp_path):
    """Makes a low expert with previews of one prompt after some numbers of updates."""

    def make(*updates: int, exported: int | None = None) -> Segment:
        folder = RunFolder(tmp_path)
        folder.previews.mkdir(exist_ok=True)
        folder.preview_prompts.write_text(json.dumps(["a cat"]))
        folder.preview("low", "teacher", 0).write_bytes(b"teacher")
        for number in updates:
            folder.preview("low", f"{number:06d}", 0).write_bytes(b"%d" % number)
        return Segment(CONFIG, "low", "low expert", folder, exported=exported)

    return make


def content(address: str) -> bytes:
    return base64.b64decode(address.split(",")[1])


def test_the_first_clips_are_those_of_the_weights_that_are_exported(segment):
    pairs, words = latest_pairs([segment(0, 50, 100)], blurred=True)
    assert content(pairs[0]["clips"]["student"]) == b"100" and "after 100 updates" in words
    pairs, words = latest_pairs([segment(0, 50, 100, exported=50)], blurred=True)
    assert content(pairs[0]["clips"]["student"]) == b"50" and "after 50 updates" in words
    assert content(pairs[0]["clips"]["teacher"]) == b"teacher" and pairs[0]["prompt"] == "a cat"
    assert latest_pairs([], blurred=True) == ([], "")


def test_finished_clips_come_before_blurred_ones(segment, tmp_path):
    """Also of an earlier stage, while the high expert of a later one trains."""
    low = segment(0)
    high = Segment(CONFIG, "high", "high expert, dmd", RunFolder(tmp_path))
    high.folder.preview("high", "000007", 0).write_bytes(b"blurred")
    pairs, words = latest_pairs([low, high], blurred=True)
    assert content(pairs[0]["clips"]["student"]) == b"0" and words.startswith("low expert")
    pairs, words = latest_pairs([high], blurred=True)
    assert content(pairs[0]["clips"]["student"]) == b"blurred" and "blur is normal" in words
    assert "blur" not in latest_pairs([high], blurred=False)[1]


def test_a_long_training_is_shown_at_a_few_times_with_its_ends_and_what_is_exported(segment):
    (phase,) = over_time([segment(*range(0, 1001, 50), exported=350)])
    updates = [int(stop.split("update ")[1].split(",")[0]) for stop in phase["stops"]]
    assert len(updates) == 6 and updates == sorted(updates)
    assert {0, 350, 1000} <= set(updates) and "low expert: update 350, exported" in phase["stops"]
    assert updates[phase["chosen"]] == 350
    (row,) = phase["rows"]
    assert [content(clip) for clip in row["clips"]] == [b"%d" % number for number in updates]


@pytest.mark.journey  # as long as a whole run
def test_a_large_clip_is_embedded_smaller_and_made_smaller_once(tmp_path):
    noise = numpy.random.default_rng(0).random((5, 480, 832, 3))
    large = write_video(tmp_path / "large.mp4", noise, 8)
    assert large.stat().st_size > LARGE
    small = content(embedded_clip(large))
    (file,) = (tmp_path / "small").iterdir()
    assert file.read_bytes() == small and len(small) < large.stat().st_size
    shape = imageio.imread(file).shape
    assert shape == (5, 240, 416, 3) and round(imageio.immeta(file)["fps"]) == 8
    made = file.stat().st_mtime_ns
    embedded_clip(large)
    assert file.stat().st_mtime_ns == made
    os.utime(large, (file.stat().st_mtime + 5,) * 2)  # a new clip under the same name
    embedded_clip(large)
    assert file.stat().st_mtime_ns != made
