"""A student is sampled as the stock pipeline does with its schedule, and with no other."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
from conftest import SMALL
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline
from random_teachers import write_pipeline
from safetensors.torch import load_file, save_file

import convert_lora
import sample
from wan_distill.errors import UsageError
from wan_distill.layout import LORA_FILE
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.loading import Teacher
from wan_distill.model.student_files import METADATA_KEY, save_lora, schedule_metadata
from wan_distill.results import sampling
from wan_distill.results.evaluated import check_evaluated
from wan_distill.results.student import check_teacher, teacher_config
from wan_distill.settings.assets import EMBEDDED, EMBEDDED_TEACHER
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher
from wan_distill.settings.lora_names import is_in_block
from wan_distill.settings.resolve import resolve
from wan_distill.settings.schedulers import check_diffusers
from wan_distill.settings.series import check_series, note_of, settings_of
from wan_distill.settings.students import read_metadata
from wan_distill.system import pictures
from wan_distill.system.runtime import Runtime

PROMPT = "a small red circle moving left"
SIZE = dict(height=32, width=48, num_frames=5, max_sequence_length=12)


@pytest.fixture(scope="module")
def trained(random_teacher, tmp_path_factory) -> Path:
    """A folder with the LoRAs of both experts, large enough to be seen. Do not write to it."""
    config = Config(
        **SMALL | SIZE, teacher_path=str(random_teacher), sampling_steps=(2, 4), flow_shift=4.0
    )
    info = read_teacher(config)
    config = resolve(config, info)
    teacher = Teacher(info, config, Runtime(config))
    folder = tmp_path_factory.mktemp("student")
    for seed, (expert, name) in enumerate(LORA_FILE.items()):
        transformer = teacher.load_expert(expert)
        layers = config.lora_layers
        add_adapter(transformer, "student", rank=4, alpha=64.0, layers=layers, seed=seed)
        noise = torch.Generator().manual_seed(seed)
        adapter = {
            name: torch.randn(p.shape, generator=noise) * (0.2 if is_in_block(name) else 0.02)
            for name, p in adapter_parameters(transformer, "student").items()
        }
        save_lora(folder / name, adapter, config, info, expert)
    return folder


@pytest.fixture
def student(trained, tmp_path) -> Path:
    """The same, in a folder that a test may change."""
    return shutil.copytree(trained, tmp_path / "student")


@pytest.fixture
def grey_clips(monkeypatch) -> None:
    """Nothing is loaded and every clip is grey: for tests of the files alone."""
    monkeypatch.setattr(sampling, "load_pipeline", lambda *_: None)
    monkeypatch.setattr(sampling, "sample_clip", lambda *_: (numpy.full((5, 32, 48, 3), 0.5), 1.0))


@pytest.fixture(scope="module")
def stock_teacher(random_teacher) -> WanPipeline:
    """The teacher in diffusers, without a line of this project."""
    pipe = WanPipeline.from_pretrained(random_teacher)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def stock_student(random_teacher, trained) -> WanPipeline:
    """The student in diffusers, as the README of a run says."""
    pipe = WanPipeline.from_pretrained(random_teacher)
    pipe.set_progress_bar_config(disable=True)
    for expert, file in LORA_FILE.items():
        second = expert == "low"
        pipe.load_lora_weights(
            trained, weight_name=file, adapter_name=expert, load_into_transformer_2=second
        )
    return pipe


def stock_clip(pipe: WanPipeline, shift: float, seed: int, **call) -> numpy.ndarray:
    pipe.scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    noise = torch.Generator().manual_seed(seed)
    return pipe(PROMPT, generator=noise, output_type="np", **SIZE | call).frames[0]


def sides(both: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The teacher's clip and the student's of a comparison of `SIZE`, as they were sampled: below
    their names, seven times as large, and a gap between them.
    """
    assert both.shape == (5, 32 + 7 * 32, 2 * 7 * 48 + 8, 3)
    assert both[:, :32].max() > 0.5 and not both[:, :, 336:344].any()
    return both[:, 32::7, :336:7], both[:, 32::7, 344::7]


def differs(a: numpy.ndarray, b: numpy.ndarray) -> bool:
    """Whether two clips differ by more than rounding."""
    return a.shape != b.shape or numpy.abs(a - b).max() > 1e-3


# ----------------------------------------------------------------------- like the stock pipeline


@pytest.mark.parametrize(
    ("flags", "call"),
    [
        ([], dict(num_inference_steps=4)),
        (["--steps", "2"], dict(num_inference_steps=2)),
        (
            ["--height", "48", "--width", "32", "--num_frames", "9"],
            dict(num_inference_steps=4, height=48, width=32, num_frames=9),
        ),
    ],
)
def test_the_student_is_sampled_like_this_in_diffusers(flags, call, trained, stock_student, clips):
    argv = ["--student", str(trained), "--prompt", PROMPT, "--seed", "7", *flags]
    assert sample.main(argv) == 0
    stock = stock_clip(stock_student, shift=4.0, seed=7, guidance_scale=1.0, **call)
    numpy.testing.assert_allclose(clips[0], stock, rtol=0, atol=1e-5)


def test_any_other_schedule_gives_another_clip(stock_student, stock_teacher):
    """The test above can tell them apart."""
    right = dict(shift=4.0, seed=7, guidance_scale=1.0, num_inference_steps=4)
    clip = stock_clip(stock_student, **right)
    assert differs(clip, stock_clip(stock_teacher, **right))
    for other in (dict(shift=12.0), dict(guidance_scale=5.0), dict(seed=0)):
        assert differs(clip, stock_clip(stock_student, **right | other)), other


def test_its_teacher_is_sampled_as_wan_does_and_stands_on_the_left(
    trained, stock_teacher, clips, capsys
):
    argv = ["--student", str(trained), "--prompt", PROMPT, "--seed", "7"]
    assert sample.main([*argv, "--compare"]) == 0
    said = capsys.readouterr().out
    assert "teacher: 80 evaluations, " in said and "student, adapters merged: 4 evaluations" in said
    assert sample.main(argv) == 0
    assert "video.mp4: 4 evaluations, " in capsys.readouterr().out
    both, alone = clips
    teachers, students = sides(both)
    numpy.testing.assert_allclose(students, alone, rtol=0, atol=1e-5)
    stock = stock_clip(
        stock_teacher,
        shift=12.0,
        seed=7,
        num_inference_steps=40,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        negative_prompt="",  # Wan's own is for Wan's text encoder
    )
    numpy.testing.assert_allclose(teachers, stock, rtol=0, atol=1e-5)


def test_the_seconds_of_a_comparison_are_warm_and_of_merged_adapters(
    trained, clips, monkeypatch, capsys
):
    made = []
    real = sampling.sample_clip

    def watched(pipe, prompt, seed, shift, call):
        frames, _ = real(pipe, prompt, seed, shift, call)
        experts = (pipe.transformer, pipe.transformer_2)
        merged = not any(getattr(expert, "peft_config", None) for expert in experts)
        made.append((merged, call["num_inference_steps"], frames))
        return frames, float(2 ** len(made))

    monkeypatch.setattr(sampling, "sample_clip", watched)
    monkeypatch.setattr(sampling, "TEACHER_STEPS", 3)
    assert sample.main(["--student", str(trained), "--prompt", PROMPT, "--compare"]) == 0
    order = [(merged, steps) for merged, steps, _ in made]
    assert order == [(False, 4), (False, 3), (True, 4), (True, 4), (True, 4)]
    numpy.testing.assert_allclose(made[2][2], made[0][2], rtol=0, atol=1e-4)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        "teacher: 6 evaluations, 4.00 s; student, adapters merged: 4 evaluations, 16.00 s; "
        "decoding included, 0.2 times as fast"
    )


def test_adapters_are_on_again_after_the_teacher(trained, tmp_path, clips, monkeypatch):
    monkeypatch.setattr(sampling, "TEACHER_STEPS", 2)
    (tmp_path / "two.txt").write_text(f"{PROMPT}\na cat\n")
    argv = ["--student", str(trained), "--vbench_prompts", str(tmp_path / "two.txt"), "--samples=1"]
    for more in ([], ["--compare"]):
        assert sample.main([*argv, "--out", str(tmp_path / f"none{len(more)}"), *more]) == 0
    first, second, *both = clips
    for alone, pair in zip((first, second), both, strict=True):
        numpy.testing.assert_allclose(sides(pair)[1], alone, rtol=0, atol=1e-5)


@pytest.mark.journey  # as long as a whole run
def test_the_lora_files_alone_give_the_same_video_and_both_matter(trained, clips):
    both = ",".join(str(trained / name) for name in LORA_FILE.values())
    for files in (str(trained), both, *both.split(",")):
        assert sample.main(["--student", files, "--prompt", PROMPT]) == 0
    folder, files, high, low = clips
    assert numpy.array_equal(folder, files)
    assert differs(folder, high) and differs(folder, low)


def test_one_expert_alone_stands_beside_its_teacher(trained, clips, monkeypatch):
    monkeypatch.setattr(sampling, "TEACHER_STEPS", 2)
    argv = ["--student", str(trained / LORA_FILE["high"]), "--prompt", PROMPT]
    for more in ([], ["--compare"]):
        assert sample.main([*argv, *more]) == 0
    numpy.testing.assert_allclose(sides(clips[1])[1], clips[0], rtol=0, atol=1e-5)


def test_a_teacher_of_variant_files_alone_is_read(trained, random_teacher, tmp_path, clips):
    folder = shutil.copytree(random_teacher, tmp_path / "half")
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    argv = ["--student", str(trained), "--prompt", PROMPT]
    variant = ["--teacher_path", str(folder), "--variant", "fp16"]
    for more in ([], variant):
        assert sample.main([*argv, *more]) == 0
    numpy.testing.assert_allclose(clips[1], clips[0], rtol=0, atol=1e-5)


def test_a_teacher_with_another_boundary_is_refused(trained, random_teacher, tmp_path, capsys):
    """Its file belongs to no part, so that no fingerprint has it."""
    folder = shutil.copytree(random_teacher, tmp_path / "edited")
    index = json.loads((folder / "model_index.json").read_text())
    argv = ["--student", str(trained), "--prompt", PROMPT, f"--teacher_path={folder}"]
    for boundary, taken in ((0.95, False), (0.86, True)):  # no step lies between 0.86 and 0.875
        (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": boundary}))
        if taken:
            info = read_teacher(Config(teacher_path=str(folder)))
            check_teacher(info, read_metadata(trained / LORA_FILE["high"]), allow_other=False)
            continue
        said = refused(capsys, *argv)
        assert "is 0.95, where this student was made with 0.875" in said
        assert "the other expert would do the step at sigma" in said and "write 0.875 there" in said


def test_students_in_kohyas_layout_are_sampled(trained, tmp_path, clips):
    (tmp_path / "kohya").mkdir()
    argv = ["--prompt", PROMPT, "--student"]
    for name in LORA_FILE.values():
        files = [str(trained / name), str(tmp_path / "kohya" / name)]
        assert convert_lora.main([*files, "--to=kohya"]) == 0
    for folder in (trained, tmp_path / "kohya"):
        assert sample.main([*argv, str(folder)]) == 0
    numpy.testing.assert_allclose(clips[1], clips[0], rtol=0, atol=1e-5)


def test_the_teacher_is_found_as_the_run_found_it(random_teacher, tmp_path, clips):
    """A variant of the files, and, of a hub teacher, the commit."""
    folder = shutil.copytree(random_teacher, tmp_path / "teacher")
    for part in ("transformer", "transformer_2"):
        file = folder / part / "diffusion_pytorch_model.safetensors"
        other = {name: 1.3 * tensor for name, tensor in load_file(file).items()}
        save_file(other, file.with_suffix(".ema.safetensors"), {"format": "pt"})
    made = Config(**SMALL | SIZE, teacher_path=str(folder), variant="ema", sampling_steps=(2,))
    info = read_teacher(made)
    made = resolve(made, info)
    transformer = Teacher(info, made, Runtime(made)).load_expert("high")
    add_adapter(transformer, "student", rank=4, alpha=64.0, layers=made.lora_layers, seed=0)
    lora = tmp_path / LORA_FILE["high"]
    save_lora(lora, adapter_parameters(transformer, "student"), made, info, "high")
    argv = ["--student", str(lora), "--prompt", PROMPT]
    moved = folder.rename(tmp_path / "moved")
    assert sample.main([*argv, f"--teacher_path={moved}"]) == 2  # the plain files
    moved.rename(folder)
    assert sample.main(argv) == 0
    assert sample.main([*argv, f"--teacher_path={folder}", "--variant=ema"]) == 0
    numpy.testing.assert_array_equal(clips[0], clips[1])


def test_a_hub_teacher_is_the_commit_that_was_trained_on(random_teacher, tmp_path, monkeypatch):
    commits, asked = {"main": "b" * 40}, []
    for name, scale in (("a" * 40, 1.0), ("b" * 40, 1.3)):
        folder = shutil.copytree(random_teacher, tmp_path / name)
        for file in folder.glob("transformer*/*.safetensors"):
            tensors = {key: scale * value for key, value in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})

    def download(source, revision, cache_dir, patterns):
        asked.append((revision, cache_dir))
        return tmp_path / commits.get(revision or "main", revision)

    monkeypatch.setattr("wan_distill.settings.description.download", download)
    names = ("teacher_path", "revision", "variant", "cache_dir")
    chosen: dict = dict.fromkeys(names)
    made = read_teacher(Config(teacher_path="some/Wan", revision="a" * 40))
    metadata = sampling_metadata(made)
    assert metadata["teacher_commit"] == "a" * 40

    found = read_teacher(teacher_config(metadata, chosen | {"cache_dir": "here"}))
    assert found.commit == "a" * 40 and asked[-1] == ("a" * 40, "here")
    check_teacher(found, metadata, allow_other=False)
    newest = read_teacher(teacher_config(metadata, chosen | {"revision": "main"}))
    with pytest.raises(UsageError, match=r"at commit a{40}.*\(other: transformer, transformer_2\)"):
        check_teacher(newest, metadata, allow_other=False)
    check_teacher(newest, metadata, allow_other=True)
    changed = metadata | {"teacher_changes": {"high": "a LoRA"}, "teacher_files": {}}
    with pytest.raises(UsageError, match="not known to be the same"):
        check_teacher(found, changed, allow_other=False)
    # The same files in a folder are the same teacher.
    check_teacher(read_teacher(Config(teacher_path=str(made.folder))), metadata, False)
    other = read_teacher(Config(teacher_path=str(newest.folder)))
    with pytest.raises(UsageError, match="not known to be the same"):
        check_teacher(other, metadata, allow_other=False)


def test_only_a_student_of_this_teacher_and_schedule_is_evaluated(random_teacher, tmp_path):
    out = tmp_path / "out"
    settings = dict(SMALL, method="trajectory", output_dir=str(out), evaluate_only=True)
    config = Config(**settings, teacher_path=str(random_teacher))
    info = read_teacher(config)
    config = resolve(config, info)
    with pytest.raises(UsageError, match=f"{out} holds no high_noise_lora.*a student that is tr"):
        check_evaluated(config, info)
    out.mkdir()
    halves = (f"blocks.0.attn1.to_q.lora_{half}.student.weight" for half in "AB")
    weights = {half: torch.zeros(1, 1) for half in halves}
    save_lora(out / LORA_FILE["high"], weights, config, info, "high")
    check_evaluated(dataclasses.replace(config, expert="high"), info)
    with pytest.raises(UsageError, match="holds no low_noise_lora"):
        check_evaluated(config, info)
    save_lora(out / LORA_FILE["low"], weights, config, info, "low")
    check_evaluated(config, info)
    shifted = dataclasses.replace(config, flow_shift=7.0)
    with pytest.raises(UsageError, match=r"flow_shift was 5\.0, is 7\.0.*--allow_config_change"):
        check_evaluated(shifted, info)
    check_evaluated(dataclasses.replace(shifted, allow_config_change=True), info)
    check_evaluated(dataclasses.replace(shifted, evaluate_only=False), info)
    other = shutil.copytree(random_teacher, tmp_path / "other")
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UsageError, match=r"\(other: vae\).*--allow_config_change"):
        check_evaluated(config, read_teacher(Config(teacher_path=str(other))))


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_teacher_is_found_from_another_machine(name):
    metadata = sampling_metadata(read_teacher(Config(teacher_path=name)))
    assert metadata["teacher"] == name  # and no path of this machine
    config = teacher_config(metadata, {"teacher_path": None})
    assert config.teacher_path == name
    check_teacher(read_teacher(config), metadata, allow_other=False)


@pytest.mark.parametrize("written", ["embedded", "/home/me/wan_distill/assets/tiny_wan22"])
def test_students_of_earlier_versions_find_the_one_that_was_embedded(written):
    metadata = sampling_metadata(read_teacher(Config())) | dict(teacher=written)
    assert teacher_config(metadata, {"teacher_path": None}).teacher_path is None


def sampling_metadata(info: TeacherInfo) -> dict:
    """Of a student of `info`."""
    config = resolve(Config(teacher_path=info.source, output_dir="x", **SIZE), info)
    return schedule_metadata(config, info, "high")


def test_names_of_videos_never_collide_nor_are_too_long(tmp_path):
    long = "长" * 300
    prompts = ["a cat/dog?", "a cat_dog_", "A CAT_DOG_", long, long + "x", "...", "a" * 300]
    names = sample.file_names(prompts)
    assert names["a cat/dog?"] == "a cat_dog_" and names["..."] == "_"
    assert len({name.casefold() for name in names.values()}) == len(prompts)
    for name in names.values():
        (tmp_path / f"{name}-0.mp4").touch()
    assert len(list(tmp_path.iterdir())) == len(prompts)


# -------------------------------------------------------------------------------------------- files


def test_the_longest_name_that_is_taken_can_be_written(tmp_path):
    name = "a" * (sample.LONGEST_NAME - 4) + ".mp4"
    assert pictures.write_video(tmp_path / name, numpy.full((5, 32, 48, 3), 0.5), 8).exists()


def test_a_video_is_written_where_it_is_asked_for(trained, grey_clips, tmp_path, capsys):
    import imageio.v3

    out = tmp_path / "new" / "clip.mp4"
    argv = ["--student", str(trained), "--prompt", PROMPT, "--out", str(out), "--fps", "8"]
    assert sample.main(argv) == 0
    assert imageio.v3.imread(out).shape == (5, 32, 48, 3)
    assert imageio.v3.immeta(out)["fps"] == 8
    assert f"wrote {out}" in capsys.readouterr().out


def test_without_a_name_nothing_is_overwritten(trained, grey_clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "write_video", lambda file, *_: file.write_bytes(b"video"))
    Path("video-1.frames.png").write_bytes(b"a strip, where no encoder was installed")
    for _ in range(3):
        assert sample.main(["--student", str(trained), "--prompt", PROMPT]) == 0
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["video-1.frames.png", "video-2.mp4", "video-3.mp4", "video.mp4"]


def test_a_name_that_was_taken_meanwhile_is_left_alone(
    trained, grey_clips, tmp_path, monkeypatch, capsys
):
    """As by a second run in the same folder, which has chosen the same name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "write_video", lambda file, *_: file.write_bytes(b"v") and file)
    load = sampling.load_pipeline

    def slowly(*arguments):
        Path("video.mp4").write_bytes(b"another's")
        Path("a.mp4").write_bytes(b"another's")
        return load(*arguments)

    monkeypatch.setattr(sampling, "load_pipeline", slowly)
    argv = ["--student", str(trained), "--prompt", PROMPT]
    for more, name in (([], "video-1.mp4"), (["--out=a.mp4"], "a-1.mp4")):
        Path("a.mp4").unlink(missing_ok=True)
        Path("video.mp4").unlink(missing_ok=True)
        assert sample.main([*argv, *more]) == 0
        assert Path("a.mp4").read_bytes() == Path("video.mp4").read_bytes() == b"another's"
        assert Path(name).read_bytes() == b"v" and f"wrote {name}" in capsys.readouterr().out
    assert sample.main([*argv, "--overwrite"]) == 0
    assert Path("video.mp4").read_bytes() == b"v"


def test_a_picture_beside_the_video_is_not_the_video(trained, grey_clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"the user's")
    argv = ["--student", str(trained), "--prompt", PROMPT, "--out=a.mp4"]
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    assert sample.main(argv) == 0
    assert Path("a.png").read_bytes() == b"the user's" and Path("a.frames.png").exists()


def test_several_videos_of_a_prompt_are_numbered_and_have_seeds_of_their_own(
    trained, grey_clips, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "write_video", lambda file, *_: file.write_bytes(b"video"))
    seeds = []
    clip = (numpy.full((5, 32, 48, 3), 0.5), 1.0)
    monkeypatch.setattr(sampling, "sample_clip", lambda _, p, seed, *__: seeds.append(seed) or clip)
    argv = ["--student", str(trained), "--prompt", PROMPT, "--samples=3", "--seed=7"]
    Path("video-1.mp4").touch()
    assert sample.main(argv) == 0
    assert "Makes 3 videos: 5 frames of 32x48 in 4 steps, from seed 7" in capsys.readouterr().out
    assert sample.main([*argv, "--out=a.mp4"]) == 0
    assert seeds == [7, 8, 9] * 2
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {f"{name}.mp4" for name in ("video", "video-1", "video-2", "video-3")} | {
        f"{name}.mp4" for name in ("a", "a-1", "a-2")
    }
    Path("a.mp4").unlink()
    assert "--out a-1.mp4: exists; choose another name" in refused(capsys, *argv, "--out=a.mp4")
    assert sample.main([*argv, "--out=a.mp4", "--overwrite"]) == 0


def test_a_series_for_vbench_goes_on(trained, grey_clips, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat/dog?\na ball\n")
    out = tmp_path / "vbench"
    out.mkdir()
    (out / "a ball-1.mp4").write_bytes(b"finished")
    monkeypatch.setattr(pictures, "write_video", lambda file, *_: file.write_bytes(b"new"))
    argv = ["--student", str(trained), "--vbench_prompts", str(tmp_path / "prompts.txt")]
    assert sample.main([*argv, "--samples", "2", "--out", str(out)]) == 0
    written = {file.name: file.read_bytes() for file in out.glob("*.mp4")}
    assert written == {
        "a cat_dog_-0.mp4": b"new",
        "a cat_dog_-1.mp4": b"new",
        "a ball-0.mp4": b"new",
        "a ball-1.mp4": b"finished",
    }


def test_a_file_of_prompts_makes_one_video_each_and_overwrites_only_where_asked(
    trained, grey_clips, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na ball\n")
    Path("videos").mkdir()
    Path("videos/a ball-0.mp4").write_bytes(b"finished")
    monkeypatch.setattr(pictures, "write_video", lambda file, *_: file.write_bytes(b"new"))
    argv = ["--student", str(trained), "--prompts=prompts.txt"]
    for more, left in (([], b"finished"), (["--overwrite"], b"new")):
        assert sample.main([*argv, *more]) == 0
        written = {file.name: file.read_bytes() for file in Path("videos").glob("*.mp4")}
        assert written == {"a cat-0.mp4": b"new", "a ball-0.mp4": left}
        assert ("1 of 2 videos are in videos already" in capsys.readouterr().out) == (not more)
    assert "makes several videos; give a folder" in refused(capsys, *argv, "--out=a.mp4")


def test_a_series_of_other_settings_is_another_series(
    trained, grey_clips, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na ball\n")
    monkeypatch.setattr(pictures, "write_video", lambda file, *_: file.write_bytes(b"new"))
    argv = ["--student", str(trained), "--prompts=prompts.txt"]
    assert sample.main(argv) == 0
    assert "there is no such file or folder" in refused(capsys, "--student=no", *argv[2:])
    said = refused(capsys, *argv, "--seed=7")
    assert "--out videos: its videos are of --seed 0, not of 7; give another folder" in said
    half = ["--student", str(trained / LORA_FILE["high"]), *argv[2:]]
    assert "its videos are of another student, not of this one" in refused(capsys, *half)
    assert sample.main(argv) == 0
    assert sample.main([*argv, "--seed=7", "--overwrite"]) == 0
    assert "of --seed 7, not of 0" in refused(capsys, *argv)
    Path("one.txt").write_text("a tree\n")
    other = [*argv[:2], "--prompts=one.txt", "--seed=3", "--overwrite"]
    said = refused(capsys, *other)  # the note is one for all: the others would pass as of seed 3
    assert "of no prompt that is given (2 such in all); give another folder" in said
    assert sample.main([*other[:3], "--seed=7"]) == 0


def test_an_interrupted_replacement_does_not_pass_old_videos_as_new(
    trained, grey_clips, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na ball\n")
    content = [b"old", b"old", b"new", KeyboardInterrupt(), b"new"]

    def write(file, *_):
        if isinstance(what := content.pop(0), KeyboardInterrupt):
            raise what
        file.write_bytes(what)

    monkeypatch.setattr(pictures, "write_video", write)
    argv = ["--student", str(trained), "--prompts=prompts.txt"]
    assert sample.main(argv) == 0
    assert sample.main([*argv, "--seed=7", "--overwrite"]) == 130
    assert sample.main([*argv, "--seed=7"]) == 0
    assert [file.read_bytes() for file in Path("videos").glob("*.mp4")] == [b"new", b"new"]


def test_a_series_of_another_picture_is_another_series(tmp_path):
    """Under the same name."""
    picture = tmp_path / "picture.png"
    args = sample.build_parser().parse_args([f"--image={picture}", "--prompts=x"])
    found = []
    for content in (b"one", b"two"):
        picture.write_bytes(content)
        found.append(settings_of(args, [], 4))
    check_folder = tmp_path / "videos"
    check_folder.mkdir()
    note_of(check_folder).write_text(json.dumps(found[0]))
    check_series(check_folder, found[0])
    with pytest.raises(UsageError, match="of another image, not of this one"):
        check_series(check_folder, found[1])


def test_the_videos_of_a_series_have_consecutive_seeds(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    flags = ["--student=x", f"--vbench_prompts={tmp_path / 'prompts.txt'}", "--seed=3"]
    videos = sample.wanted_videos(sample.build_parser().parse_args(flags))
    assert [seed for _, seed, _ in videos] == [3, 4, 5, 6, 7]


# ------------------------------------------------------------------------------------------ refused


def refused(capsys, *flags: str) -> str:
    """The one line with which `flags` are refused."""
    assert sample.main(list(flags)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def test_another_teacher_is_refused(trained, tmp_path, capsys, clips):
    other = write_pipeline(tmp_path / "other")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.01 for k, v in load_file(file).items()}, file, {"format": "pt"})
    command = ["--student", str(trained), "--prompt", PROMPT, "--teacher_path", str(other)]
    assert "not known to be the same" in refused(capsys, *command)
    assert sample.main([*command, "--allow_other_teacher"]) == 0 and len(clips) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(flow_shift=7.0), "flow_shift 7.0 against 4.0"),
        (dict(sampling_steps=[8]), "sampling_steps"),
        (dict(boundary_ratio=0.9), "boundary_ratio 0.9 against 0.875"),
        (dict(max_sequence_length=512), "max_sequence_length 512 against 12"),
        (dict(teacher="another"), "teacher another against"),
        (dict(teacher_files={"vae": "other"}), "made from other files of the teacher"),
        (dict(expert="high"), "both are for the high expert"),
    ],
)
def test_files_of_two_students_are_refused(student, change, reason, capsys):
    file = student / LORA_FILE["low"]
    metadata = {METADATA_KEY: json.dumps(read_metadata(file) | change), "format": "pt"}
    save_file(load_file(file), file, metadata)
    assert reason in refused(capsys, "--student", str(student), "--prompt", PROMPT)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--steps=3"], "--steps 3: this student was trained for 2 or 4 steps"),
        (["--steps=0"], "--steps 0: must be greater than 0"),
        (["--steps=--"], "--steps=--: '--' is no value; give one"),
        (["--fps=0"], "--fps 0: must be greater than 0"),
        (["--samples=0"], "--samples 0: must be greater than 0"),
        (["--height=40"], "--height 40: Wan's patches need a multiple of 16; use 32 or 48"),
        (["--width=8"], "--width 8: Wan's patches need a multiple of 16; use 16 or 32"),
        (["--num_frames=16"], "--num_frames 16: Wan needs 4k+1 frames; use 13 or 17"),
        (["--height=1040"], "--height 1040: needs 65 positions, of which random has 64"),
        (["--width=1040"], "--width 1040: needs 65 positions"),
        (["--num_frames=257"], "--num_frames 257: needs 65 positions"),
        ([f"--out={'a' * 300}.mp4"], "is too long a name; choose another"),
        ([f"--out={'a' * 237}.mp4", "--samples=10"], "is too long a name; choose another"),
        (["--vbench_prompts=x.txt"], "--prompt: give one, or --prompts FILE, or --vbench_prompts"),
        (["--prompts=x.txt"], "--prompt: give one, or --prompts FILE, or --vbench_prompts FILE"),
        (["--seed=-1"], "--seed -1: must be at least 0"),
        (["--seed=99999999999999999999"], "must be at least 0 and below 2^63"),
        (["--prompt="], "--prompt: is empty"),
        (["--prompt=a \udce9"], "is no text of the terminal's encoding"),
        (["--out=."], "--out .: is a folder; name a file in it"),
        (["--out=clip.gif"], "videos are written as mp4"),
        (["--out=clip"], "videos are written as mp4"),
        ([f"--out={__file__}/clip.mp4"], "cannot be written (File exists); choose another"),
        (["--heigth=32"], "--heigth: there is no such flag; did you mean --height?"),
        (["--num_inference_steps=4"], "there is no such flag; did you mean --steps?"),
        (["--height=tall"], "--height tall: is no whole number"),
        (["--teacher_path="], "--teacher_path: is empty"),
        (["--prompt=红色的球"], "100 % of the prompts' characters are unknown"),
        (["--variant=ema"], "--variant ema: no part of"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_loads(
    flags, reason, trained, capsys, monkeypatch
):
    monkeypatch.setattr(sampling, "load_pipeline", None)
    assert reason in refused(capsys, "--student", str(trained), "--prompt", PROMPT, *flags)


def test_a_prompt_is_needed(trained, capsys):
    assert "--prompt: give one" in refused(capsys, "--student", str(trained))
    said = refused(capsys, "--student", str(trained), "--vbench_prompts=nowhere.txt")
    assert "--vbench_prompts nowhere.txt: cannot be read" in said


def test_what_it_will_do_is_said_before_anything_loads(trained, capsys, monkeypatch, tmp_path):
    def load(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "load_pipeline", load)
    out = tmp_path / "clip.mp4"
    argv = ["--student", str(trained), "--prompt", PROMPT, "--compare", f"--out={out}"]
    assert sample.main(argv) == 130  # Ctrl-C: no traceback
    said = capsys.readouterr()
    assert said.out == (
        f"Makes a video of '{PROMPT}', beside its teacher's: 5 frames of 32x48 in 4 steps, from "
        f"seed 0, to {out}; loads {trained_on(trained)} first\n"
    )
    assert said.err == "Stopped; videos that are finished stay.\n"


def test_a_log_gets_no_progress_bars(trained, clips, capfd):
    """Of the loaders and the pipeline, which write to whatever stderr is."""
    assert sample.main(["--student", str(trained), "--prompt", PROMPT]) == 0
    assert capfd.readouterr().err == ""


def trained_on(student: Path) -> str:
    """The name of a student's teacher."""
    return Path(read_metadata(student / LORA_FILE["high"])["teacher"]).name


def test_half_a_student_is_warned_of(trained, grey_clips, clips, capsys):
    for name, missing in ((LORA_FILE["high"], "low"), (LORA_FILE["low"], "high")):
        assert sample.main(["--student", str(trained / name), "--prompt", PROMPT]) == 0
        said = capsys.readouterr().err
        assert f"half a student: nothing of the {missing} expert" in said
    assert sample.main(["--student", str(trained), "--prompt", PROMPT]) == 0
    assert capsys.readouterr().err == ""


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 145776\n"


def with_metadata(file: Path, text: str) -> Path:
    save_file(load_file(file), file, {METADATA_KEY: text, "format": "pt"})
    return file


def test_what_is_not_a_student_is_refused(random_teacher, student, tmp_path, capsys):
    foreign = random_teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    high = student / LORA_FILE["high"]
    (tmp_path / "pointer.safetensors").write_bytes(POINTER)
    (tmp_path / "cut.safetensors").write_bytes(high.read_bytes()[:-100])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("none", "bare", "list"):
        shutil.copy(high, tmp_path / f"{name}.safetensors")
    (tmp_path / "empty").mkdir()
    for given, reason in (
        (tmp_path / "empty", "train first, or give the folder of the run"),
        (random_teacher, "is a whole pipeline; load it with"),
        ("nowhere.safetensors", "no such file"),
        ("a" * 400, "there is no such file or folder; check the spelling"),
        (f"{high},nowhere", "--student nowhere: there is no such file"),
        (f"{high},{high}", "both are for the high expert"),
        (foreign, "holds no LoRA layer of Wan, only names such as"),
        (tmp_path / "pointer.safetensors", "is a pointer of Git LFS"),
        (tmp_path / "cut.safetensors", "truncated"),
        (tmp_path / "empty.safetensors", "truncated or not safetensors"),
        (with_metadata(tmp_path / "none.safetensors", "{"), "its schedule cannot be read"),
        (with_metadata(tmp_path / "list.safetensors", "[]"), "its schedule is none"),
        (with_metadata(tmp_path / "bare.safetensors", "{}"), "its schedule lacks teacher, "),
    ):
        assert reason in refused(capsys, "--student", str(given), "--prompt", PROMPT)


def test_a_shift_is_the_students_own(trained, clips, capsys):
    command = ["--student", str(trained), "--prompt", PROMPT]
    said = refused(capsys, *command, "--flow_shift=5")
    assert "--flow_shift 5: this student was trained with 4; leave it out" in said
    assert sample.main([*command, "--flow_shift=4"]) == 0 and len(clips) == 1


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.34.0", "nothing loads a LoRA into the second expert"),
        ("0.35.2", "FlowMatchEulerDiscreteScheduler(shift=4.0), with set_timesteps always given "),
        ("0.38.0", "sigmas=[1.0, 0.75, 0.5, 0.25], gives its sigmas with this version"),
        ("0.39.0", "FlowMapEulerDiscreteScheduler(shift=4.0) gives its sigmas with this version"),
        ("0.40.0", "sample.py needs 0.41 or newer; pip install -U diffusers"),
    ],
)
def test_an_old_diffusers_is_told_what_gives_the_sigmas(
    version, reason, trained, capsys, monkeypatch
):
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    monkeypatch.delattr("diffusers.FlowMapEulerDiscreteScheduler")
    monkeypatch.delitem(sys.modules, "wan_distill.results.sampling")
    said = refused(capsys, "--student", str(trained), "--prompt", PROMPT)
    assert f"diffusers {version}: " in said and reason in said


def test_a_missing_diffusers_is_one_line(trained, capsys, monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    said = refused(capsys, "--student", str(trained), "--prompt", PROMPT)
    assert "diffusers: not installed; pip install -r requirements.txt" in said


@pytest.mark.parametrize("version", ["0.41.0", "0.42.1", "1.0.0.dev0"])
def test_newer_versions_are_not_refused(version, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    check_diffusers(dict(flow_shift=5.0, sampling_steps=[4]))


def test_three_files_are_compared_with_each_other(student, tmp_path, capsys):
    files = [student / name for name in LORA_FILE.values()]
    again = shutil.copy(files[1], tmp_path / "low.safetensors")
    given = ",".join(map(str, [*files, again]))
    assert "both are for the low expert" in refused(capsys, f"--student={given}", "--prompt=a cat")


def test_a_student_of_another_size_is_refused_before_anything_loads(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sampling, "load_pipeline", None)
    command = ["--student", str(trained), "--prompt", PROMPT, "--allow_other_teacher"]
    single = write_pipeline(tmp_path / "single", two_experts=False)
    said = refused(capsys, *command, "--teacher_path", str(single))
    assert "is for the low expert" in said and "single transformer" in said
    said = refused(capsys, *command, "--teacher_path", str(EMBEDDED_TEACHER))
    assert "give a LoRA that was made for this teacher" in said


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda t: shutil.rmtree(t / "tokenizer"), "holds no vocabulary"),
        (lambda t: next((t / "vae").glob("*.safetensors")).unlink(), "no weight file"),
        (lambda t: (t / "transformer" / "config.json").write_bytes(POINTER), "Git LFS"),
        (lambda t: to_pickle(t / "transformer_2"), "pass --allow_pickle if you trust them"),
        (lambda t: shutil.rmtree(t), "or say where it is now: --teacher_path"),
    ],
)
def test_a_teacher_that_was_damaged_since_is_refused_before_anything_loads(
    damage, reason, random_teacher, student, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sampling, "load_pipeline", None)
    teacher = shutil.copytree(random_teacher, tmp_path / "teacher")
    for name in LORA_FILE.values():
        told = json.dumps(read_metadata(student / name) | {"teacher": str(teacher)})
        with_metadata(student / name, told)
    damage(teacher)
    assert reason in refused(capsys, "--student", str(student), "--prompt", PROMPT)


def to_pickle(part: Path) -> None:
    (file,) = part.glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def test_pickles_and_a_teacher_without_a_scheduler_are_read(
    trained, random_teacher, tmp_path, clips
):
    teacher = shutil.copytree(random_teacher, tmp_path / "teacher")
    shutil.rmtree(teacher / "scheduler")
    (teacher / "vae" / ".ipynb_checkpoints").mkdir()
    argv = ["--student", str(trained), "--prompt", PROMPT]
    assert sample.main(argv) == 0
    assert sample.main([*argv, "--teacher_path", str(teacher)]) == 0
    to_pickle(teacher / "transformer")
    other = ["--teacher_path", str(teacher), "--allow_other_teacher", "--allow_pickle"]
    assert sample.main([*argv, *other]) == 0
    for clip in clips[1:]:
        numpy.testing.assert_allclose(clip, clips[0], rtol=0, atol=1e-5)


def test_what_is_not_finite_is_not_written(student, random_teacher, tmp_path, clips, capsys):
    command = ["--student", str(student), "--prompt", PROMPT, "--allow_other_teacher"]
    teacher = shutil.copytree(random_teacher, tmp_path / "teacher")
    (vae,) = (teacher / "vae").glob("*.safetensors")
    save_file({k: v + torch.nan for k, v in load_file(vae).items()}, vae, {"format": "pt"})
    assert sample.main([*command, f"--teacher_path={teacher}"]) == 1
    assert "error: the clip is not finite" in capsys.readouterr().err
    file = student / LORA_FILE["low"]
    text = json.dumps(read_metadata(file))
    save_file({k: v + torch.nan for k, v in load_file(file).items()}, file)
    with_metadata(file, text)
    assert "holds values that are no numbers" in refused(capsys, *command)
    assert not clips


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("to", "error: the pipeline does not fit the GPU's memory; give --offload"),
        (
            "__call__",
            "error: out of GPU memory; give --offload, or a smaller --height, --width or "
            "--num_frames",
        ),
    ],
)
def test_too_little_gpu_memory_is_one_line(trained, monkeypatch, capsys, name, said):
    def fail(*_, **__) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(WanPipeline, name, fail)
    assert sample.main(["--student", str(trained), "--prompt", PROMPT]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_long_prompts_are_said(trained, grey_clips, clips, capsys):
    argv = ["--student", str(trained), "--prompt", "left " * 12]
    assert sample.main(argv) == 0
    assert "13 tokens; Wan sees the first 12" in capsys.readouterr().err


def test_a_finished_series_loads_nothing(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "load_pipeline", None)
    (tmp_path / "p.txt").write_text("a ball\n")
    (tmp_path / "vbench").mkdir()
    (tmp_path / "vbench" / "a ball-0.mp4").touch()
    flags = [
        f"--vbench_prompts={tmp_path / 'p.txt'}",
        f"--out={tmp_path / 'vbench'}",
        "--samples=1",
    ]
    assert sample.main(["--student", str(trained), *flags]) == 0
    assert "all videos are there" in capsys.readouterr().out


def test_a_disk_that_does_not_take_the_video_is_no_traceback(
    trained, grey_clips, monkeypatch, tmp_path, capsys
):
    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "write_video", fail)
    out = tmp_path / "clip.mp4"
    assert sample.main(["--student", str(trained), "--prompt", PROMPT, f"--out={out}"]) == 1
    said = capsys.readouterr().err
    assert (
        said == f"error: --out {out}: cannot be written (No space left on device); choose another\n"
    )


def test_the_home_folder_is_found(trained, grey_clips, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    shutil.copytree(trained, tmp_path / "student")
    both = ",".join(f"~/student/{name}" for name in LORA_FILE.values())
    for given in ("~/student", both):
        assert sample.main([f"--student={given}", f"--prompt={PROMPT}", "--out=~/a.mp4"]) == 0
        (tmp_path / "a.mp4").unlink()
