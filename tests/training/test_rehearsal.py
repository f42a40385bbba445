"""A rehearsal makes real updates and leaves nothing; where memory runs out, nothing was solved."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import train_distillation
from wan_distill.methods import make_method
from wan_distill.settings.recipes import recipe_of
from wan_distill.training import rehearsal
from wan_distill.training.learner import Learner
from wan_distill.training.rehearsal import rehearse


@pytest.mark.parametrize(
    ("method", "real_score"),
    [("trajectory", "guided"), ("consistency", "guided"), ("dmd", "guided"), ("dmd", "samples")],
)
@pytest.mark.parametrize("expert", ["high", "low"])
def test_each_role_has_one_update_and_nothing_is_solved(
    method, real_score, expert, make_run, monkeypatch
):
    run = make_run(method=method, real_score=real_score, monitor_steps=0)
    moved = []
    update = Learner.update

    def recording(self, *args):
        norm = update(self, *args)
        moved.append((self.role, norm > 0, bool(self.optimizer.state)))
        return norm

    def making(*args):
        learners.update(make(*args))
        return learners

    def losses(self, *args):  # while a graph is held, memory is at its peak
        held.append(all(learner.optimizer.state for learner in learners.values()))
        return compute(self, *args)

    learners, held = {}, []
    make, kind = rehearsal.make_learners, type(make_method(run.config, expert))
    compute = kind.losses
    monkeypatch.setattr(rehearsal, "make_learners", making)
    monkeypatch.setattr(kind, "losses", losses)
    monkeypatch.setattr(Learner, "update", recording)
    rehearse(run, expert)
    roles = recipe_of(run.config).roles(run.config)
    assert sorted(moved) == sorted((role, True, True) for role in roles)
    assert held == [True] * len(roles), "moments come only after the first peak"
    assert {f.name for f in run.folder.path.iterdir()} == {"prompts"}


def test_a_clip_is_decoded_where_clips_will_be_shown(make_run, monkeypatch):
    decoded = []
    monkeypatch.setattr(rehearsal, "decode", lambda vae, latents: decoded.append(latents.shape))
    run = make_run(method="trajectory", monitor_steps=0)
    rehearse(run, "high")
    assert not decoded
    checked = dataclasses.replace(run.config, monitor_steps=1)
    rehearse(dataclasses.replace(run, config=checked), "high")
    assert decoded == [(1, *run.latent_shape)]


@pytest.mark.journey  # as long as a whole run
def test_memory_that_runs_out_ends_the_run_before_anything_is_solved(
    small_config, tmp_path, monkeypatch, capsys
):
    """On a device that is not the CPU; here its name alone is changed."""
    real = train_distillation.run

    def on_a_gpu(config):
        from wan_distill.system.runtime import Runtime

        class Device:
            type = "cuda"

        made = Runtime.__init__

        def init(self, config):
            made(self, config)
            self.device = Device()

        monkeypatch.setattr(Runtime, "__init__", init)
        return real(config)

    def full(run, expert):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr("wan_distill.training.rehearse", full)
    monkeypatch.setattr(train_distillation, "encode_prompts", lambda *args: (None, None))
    monkeypatch.setattr(train_distillation, "run", on_a_gpu)
    config = small_config(method="dmd")
    flags = [f"--{name}={getattr(config, name)}" for name in ("teacher_path", "output_dir")]
    flags += ["--height=32", "--width=32", "--num_frames=5", "--rank=4"]
    assert train_distillation.main(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "out of GPU memory while rehearsing one update of each role" in error
    assert "saves about" in error
    assert not list((tmp_path / "out").glob("anchors/*"))
