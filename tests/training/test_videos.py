"""Clips and the evaluation in trackers: TensorBoard's files, and stand-ins for those on the web."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wan_distill.system import pictures
from wan_distill.system.pictures import write_video
from wan_distill.training.metrics import Tracker
from wan_distill.training.videos import log_videos


@pytest.fixture
def clip(tmp_path):
    """A clip of five frames, each brighter than the one before."""
    frames = numpy.linspace(0, 1, 5)[:, None, None, None] * numpy.ones((5, 32, 48, 3))
    return write_video(tmp_path / "clip.mp4", frames, 16)


def test_a_video_that_the_encoder_did_not_finish_is_an_error(clip, tmp_path, monkeypatch):
    """On a full disk it ends as if nothing had happened."""
    half = clip.read_bytes()[: clip.stat().st_size // 2]
    monkeypatch.setattr(
        pictures, "export_to_video", lambda frames, file, **_: Path(file).write_bytes(half)
    )
    with pytest.raises(OSError, match="the encoder did not finish it"):
        write_video(tmp_path / "new.mp4", numpy.zeros((5, 32, 48, 3)), 16)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_tensorboard_shows_clips_that_move_and_the_evaluation(make_run, clip):
    run = make_run(method="trajectory", report_to="tensorboard")
    place = run.folder.preview("low", "000002", 1)
    place.parent.mkdir(parents=True)
    place.write_bytes(clip.read_bytes())
    tracker = Tracker((run.config,), run.runtime)
    tracker.log_clips(run.config, "low", step=2, updates=2)
    tracker.log_evaluation(dict(rows=[dict(sampler="student 4", frechet=1.5)], gap_closed=0.9))
    tracker.log_evaluation(None)
    tracker.finish()
    (folder,) = run.folder.tracker.iterdir()
    found = EventAccumulator(str(folder), size_guidance=dict(images=0)).Reload()
    assert found.Tags()["images"] == ["low/clip 1"]
    (event,) = found.Images("low/clip 1")
    assert event.step == 2 + 2, "after the high expert's two updates"
    picture = Image.open(io.BytesIO(event.encoded_image_string))
    assert (picture.format, picture.n_frames, picture.size) == ("GIF", 5, (48, 32))
    assert found.Scalars("evaluation/student 4/frechet")[0].value == 1.5
    assert found.Scalars("evaluation/gap_closed")[0].step == 4


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_on_the_web_get_the_files(monkeypatch, clip, name):
    """Stand-ins: neither is installed with the tests."""
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(Video=lambda file: f"video {file}"))
    logged = []
    tracker = SimpleNamespace(name=name, log=lambda values, step: logged.append((values, step)))
    log_videos(tracker, {"low/clip 0": clip}, step=7)
    log_videos(tracker, {}, step=8)
    assert logged == [({"low/clip 0": f"video {clip}"}, 7)]
