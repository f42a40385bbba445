"""The whole job as a user runs it, shortened: the README's commands, and what they leave behind."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import REPOSITORY
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.utils import load_video
from PIL import Image
from torch import Tensor

import train_distillation
from train_distillation import encode_prompts, load_encoder
from wan_distill.layout import LORA_FILE
from wan_distill.maths.flow import sample
from wan_distill.maths.randomness import keyed_noise
from wan_distill.maths.sigmas import Expert
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.loading import Teacher
from wan_distill.model.student_files import load_student
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.recipes import Role
from wan_distill.settings.resolve import resolve
from wan_distill.settings.students import read_metadata
from wan_distill.system.runtime import Runtime

SHORT = [
    "--max_train_steps=6",
    "--train_batch_size=8",
    "--num_trajectories=16",
    "--teacher_steps=6",
    "--eval_samples=8",
    "--monitor_samples=4",
    "--checkpointing_steps=3",
    "--refine_steps=2",
    "--critic_warmup_steps=2",
    "--critic_updates=1",
]
PROMPT = "a small red circle moving left"
Experts = dict[Expert, WanTransformer3DModel]


def readme_commands() -> list[str]:
    """The commands of the README's first code block."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(.*?)```", text, re.S)[1]
    lines = [line.split("  #")[0] for line in block.splitlines()]
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


def run(command: str, *more: str) -> subprocess.CompletedProcess:
    """Runs one of the README's commands, in the repository as it says."""
    words = command.split()
    assert words[0] in ("python", "pip")
    start = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "pip"]
    return subprocess.run(
        [*start, *words[1:], *more],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def run_again(*more: str) -> str:
    """What the main script prints with `SHORT` and further flags, in this process."""
    with redirect_stdout(StringIO()) as printed:
        assert train_distillation.main([*SHORT, *more]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the README's second command, shortened."""
    folder = tmp_path_factory.mktemp("run") / "out"
    result = run(readme_commands()[1], *SHORT, f"--output_dir={folder}")
    assert result.returncode == 0, result.stderr
    assert "embedded tiny teacher" in result.stdout and "Gap closed" in result.stdout
    (folder / "stdout.txt").write_text(result.stdout, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def resolved(distilled: Path) -> Config:
    settings = json.loads((distilled / "run.json").read_text(encoding="utf-8"))["config"]
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return resolve(Config(**settings), read_teacher(Config(**settings)))


@pytest.fixture(scope="module")
def printed(distilled: Path) -> str:
    return (distilled / "stdout.txt").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------ the commands


def test_the_readme_installs_what_it_needs():
    install, distil = readme_commands()[:2]
    assert (install, distil) == ("pip install -r requirements.txt", "python train_distillation.py")
    result = run(install, "--dry-run", "--no-index")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Would install" not in result.stdout, result.stdout


def test_help_needs_no_torch_and_begins_with_the_flags_that_matter():
    """So it answers at once."""
    code = (
        "import sys, train_distillation\n"
        "try:\n"
        "    train_distillation.main(['--help'])\n"
        "finally:\n"
        "    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    first_group = result.stdout.split("start here:")[1].split("\n\n")[0]
    assert 8 <= len(re.findall(r"^  --", first_group, re.M)) <= 16


# ------------------------------------------------------------------------------ what it leaves


def test_it_says_the_truth_about_the_text_encoder(distilled, printed):
    assert "encoder.embed_tokens.weight" in printed
    results = json.loads((distilled / "run.json").read_text(encoding="utf-8"))
    assert results["text_encoder"]["verdict"] == "PASS"
    assert "UMT5 has one token table under two names" in printed


def test_everything_promised_is_left_behind(distilled):
    names = {p.name for p in distilled.iterdir()}
    assert {
        "high_noise_lora.safetensors",
        "low_noise_lora.safetensors",
        "scheduler",
        "student",
        "run.json",
        "metrics.jsonl",
        "plan.txt",
        "README.md",
        "report.html",
        "comparison.png",
        "evaluation.json",
    } <= names
    for stage, experts in ((distilled / "trajectory", {"high", "low"}), (distilled, {"low"})):
        text = (stage / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        assert {line["expert"] for line in lines} == experts
        norms = [line["student_gradient_norm"] for line in lines if "student_loss" in line]
        assert norms and min(norms) > 0
    assert Image.open(distilled / "comparison.png").width > 300


def test_both_stages_share_one_store_of_samples(distilled):
    """The second stage solves none of the teacher's samples anew."""
    assert len(list((distilled / "trajectories").glob("*"))) >= 1
    assert not any(
        (distilled / "trajectory" / kind).exists() for kind in ("trajectories", "prompts")
    )
    for expert, file in LORA_FILE.items():
        first, second = distilled / "trajectory" / file, distilled / file
        assert read_metadata(first)["method"] == "trajectory"
        refined = "trajectory+dmd" if expert == "low" else "trajectory"  # --refine_expert low
        assert read_metadata(second)["method"] == refined


def test_evaluation_has_the_table(distilled):
    table = json.loads((distilled / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["sampler"] for row in table["rows"]] == [
        "teacher 6 guided",
        "teacher 4 guided",
        "teacher 4 unguided",
        "student 4",
    ]
    assert [row["evaluations"] for row in table["rows"]] == [12, 8, 4, 4]
    for row in table["rows"]:
        assert {
            "steps",
            "frechet",
            "excess",
            "obeys",
            "steadiness",
            "paired_distance",
            "motion",
            "diversity",
            "luminance_drift",
            "seconds_per_sample",
        } <= set(row)
    student, worst = table["rows"][3]["frechet"], table["rows"][2]["frechet"]
    assert table["gap_closed"] == pytest.approx(
        1 - (student - table["floor"]) / (worst - table["floor"])
    )


def test_the_schedule_travels_with_the_weights(distilled):
    for expert, file in LORA_FILE.items():
        metadata = read_metadata(distilled / file)
        assert metadata["expert"] == expert and metadata["sampling_steps"] == [4]
        assert metadata["guidance_scale"] == 1
        assert metadata["sigmas"] == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0])
        assert metadata["max_sequence_length"] == 16 and metadata["boundary_ratio"] == 0.875
    scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(distilled, subfolder="scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx(metadata["sigmas"], abs=1e-15)


def test_the_readme_it_writes_has_a_snippet_that_runs(distilled, monkeypatch):
    text = (distilled / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(distilled)
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], {})
    frames = load_video(str(distilled / "video.mp4"))
    assert len(frames) == 17 and frames[0].size == (64, 64)


# ------------------------------------------------------------- our sampler and the stock pipeline


class Start(NamedTuple):
    """Where both samplers begin."""

    prompt: Tensor
    """[2, L, D]."""
    noise: Tensor
    """[2, C, F, H, W]."""


@pytest.fixture(scope="module")
def start(resolved: Config) -> Start:
    pipe = WanPipeline.from_pretrained(EMBEDDED_TEACHER, transformer=None, transformer_2=None)
    prompt, _ = pipe.encode_prompt(
        PROMPT, do_classifier_free_guidance=False, max_sequence_length=resolved.max_sequence_length
    )
    shape = read_teacher(resolved).latent_shape(resolved)
    noise = torch.stack([keyed_noise(shape, "parity", i) for i in range(2)])
    return Start(prompt.expand(2, -1, -1), noise)


@pytest.fixture(scope="module")
def load_experts(resolved: Config) -> Callable[[], Experts]:
    teacher = Teacher(read_teacher(resolved), resolved, Runtime(resolved))
    return lambda: {e: teacher.load_expert(e) for e in ("high", "low")}


@torch.no_grad()
def our_latents(resolved: Config, start: Start, experts: Experts, role: Role = "student") -> Tensor:
    """[2, C, F, H, W] of our own sampler."""
    denoiser = Denoiser(experts, resolved.boundary_ratio)
    return sample(
        lambda x, sigma: denoiser.velocity(x, sigma, Condition(start.prompt), role=role),
        start.noise,
        resolved.sigmas(),
    )


def stock_latents(resolved: Config, start: Start, pipe: WanPipeline) -> Tensor:
    """[2, C, F, H, W] of the pipeline, as users call it."""
    return pipe(
        prompt_embeds=start.prompt,
        latents=start.noise,
        num_inference_steps=4,
        guidance_scale=1.0,
        height=resolved.height,
        width=resolved.width,
        num_frames=resolved.num_frames,
        output_type="latent",
    ).frames


@pytest.fixture(scope="module")
def ours(distilled: Path, resolved: Config, start: Start, load_experts) -> Tensor:
    """Latents of our own sampler with the exported LoRAs."""
    experts = load_experts()
    for expert, transformer in experts.items():
        load_student(transformer, distilled / LORA_FILE[expert])
    return our_latents(resolved, start, experts)


def test_our_sampler_equals_the_stock_pipeline_with_the_loras(distilled, resolved, start, ours):
    pipe = WanPipeline.from_pretrained(EMBEDDED_TEACHER)
    pipe.load_lora_weights(distilled, weight_name=LORA_FILE["high"], adapter_name="high")
    pipe.load_lora_weights(
        distilled, weight_name=LORA_FILE["low"], adapter_name="low", load_into_transformer_2=True
    )
    pipe.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(distilled, subfolder="scheduler")
    torch.testing.assert_close(ours, stock_latents(resolved, start, pipe), rtol=0, atol=1e-5)


def test_our_sampler_equals_the_stock_pipeline_on_the_merged_student(
    distilled, resolved, start, ours
):
    pipe = WanPipeline.from_pretrained(distilled / "student")
    assert type(pipe.scheduler) is FlowMapEulerDiscreteScheduler
    assert pipe.config.boundary_ratio == 0.875
    theirs = stock_latents(resolved, start, pipe)
    experts = dict(high=pipe.transformer, low=pipe.transformer_2)
    merged = our_latents(resolved, start, experts, role="teacher")
    torch.testing.assert_close(merged, theirs, rtol=0, atol=1e-5)
    # W + BA rounds once where Wx + BAx rounds twice: 1.1e-5 was seen on values around 1.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_adapters_do_something(resolved, start, ours, load_experts):
    teacher = our_latents(resolved, start, load_experts(), role="teacher")
    assert (ours - teacher).abs().max() > 0.01


# ---------------------------------------------------------------------------------------- prompts


# as WanPipeline.__call__ is: with gradients other kernels round differently, by 1e-6
@torch.no_grad()
def test_prompt_embeddings_are_the_pipelines(resolved, tmp_path):
    """Bit-equal: same cleaning, same length, zero past the end."""
    config = dataclasses.replace(resolved, output_dir=str(tmp_path))
    runtime = Runtime(config)
    prompts = [PROMPT, ""]
    teacher = Teacher(read_teacher(config), config, runtime)
    embeddings, _ = encode_prompts(config, teacher, prompts, runtime)
    pipe = WanPipeline.from_pretrained(EMBEDDED_TEACHER, transformer=None, transformer_2=None)
    expected = [
        pipe.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=resolved.max_sequence_length,
        )[0]
        for prompt in prompts
    ]
    assert torch.equal(embeddings.batch(prompts), torch.cat(expected))
    assert not embeddings.missing(prompts)
    assert embeddings._embedding(prompts[0]).shape[0] == 7  # stored at its true length
    assert expected[0][0, -1].abs().max() == 0 and expected[0][0, 0].abs().max() > 0


def test_an_encoder_whose_prompts_are_all_cached_is_not_loaded(
    resolved, tmp_path, monkeypatch, capsys
):
    config = dataclasses.replace(resolved, output_dir=str(tmp_path))
    runtime = Runtime(config)
    teacher = Teacher(read_teacher(config), config, runtime)
    embeddings, verdict = encode_prompts(config, teacher, ["one", "two"], runtime)
    loads = []

    def counted(*given, **more):
        loads.append(given)
        return load_encoder(*given, **more)

    monkeypatch.setattr(train_distillation, "load_encoder", counted)
    again, same = encode_prompts(config, teacher, ["two", "one"], runtime)
    assert not loads and same == verdict
    assert "so it is not loaded" in capsys.readouterr().out
    assert torch.equal(again.batch(["one"]), embeddings.batch(["one"]))
    encode_prompts(config, teacher, ["two", "three"], runtime)
    assert len(loads) == 1  # one is new
    note = tmp_path / "prompts" / "encoder.json"
    note.write_text(note.read_text().replace(verdict.transformers, "5.1.0"))
    encode_prompts(config, teacher, ["two", "three"], runtime)
    assert len(loads) == 2  # another transformers may load it differently
    monkeypatch.setattr(type(teacher.info), "fingerprint", lambda self, parts=(): "other files")
    encode_prompts(config, teacher, ["two", "three"], runtime)
    assert len(loads) == 3


# ------------------------------------------------------------------------------------------- again


def test_running_again_goes_on_instead_of_starting_over(distilled):
    before = (distilled / LORA_FILE["high"]).read_bytes()
    said = run_again("--no-evaluate", f"--output_dir={distilled}")
    assert said.count("Going on from") == 3  # both experts, then the refined one
    assert (distilled / LORA_FILE["high"]).read_bytes() == before


def test_evaluate_only_measures_what_is_there(distilled):
    table = json.loads((distilled / "evaluation.json").read_text(encoding="utf-8"))
    weights = {name: (distilled / name).read_bytes() for name in LORA_FILE.values()}
    (distilled / "evaluation.json").unlink()
    for checkpoints in [*distilled.rglob("checkpoint-*")]:
        shutil.rmtree(checkpoints)  # the closing line offers it
    stranger = [*SHORT, "--evaluate_only", f"--output_dir={distilled}", "--rank=8"]
    assert train_distillation.main(stranger) == 2
    run_again("--evaluate_only", f"--output_dir={distilled}")
    again = json.loads((distilled / "evaluation.json").read_text(encoding="utf-8"))
    assert again["gap_closed"] == pytest.approx(table["gap_closed"], abs=1e-4)
    assert weights == {name: (distilled / name).read_bytes() for name in LORA_FILE.values()}
