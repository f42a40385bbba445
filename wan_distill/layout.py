"""Where everything lies below `--output_dir`: each path is named here, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wan_distill.maths.sigmas import Expert

LORA_FILE: dict[Expert, str] = {
    "high": "high_noise_lora.safetensors",
    "low": "low_noise_lora.safetensors",
}
PICTURE = "first_frame.png"  # an example, of the clip's size: users put their own there
# With --student_layers: all weights of one expert, under diffusers' names.
WHOLE_FILE: dict[Expert, str] = {
    "high": "high_noise_student.safetensors",
    "low": "low_noise_student.safetensors",
}
FIRST_STAGES = ("trajectory",)  # methods of a job's first stages, which have folders of their own
TEACHER_CLIP = "teacher"  # who, in the name of a clip
FEW_CLIP = "few"  # the teacher in as few steps as the yardstick
STUDENT_CLIP = "student"


def strip_of(video: Path) -> Path:
    """The picture that stands for a video where no encoder is installed: its frames side by side.
    Not simply its name with .png: that may be the picture that the video begins with.
    """
    return video.with_suffix(".frames.png")


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Paths only: nothing is made, read or written here."""

    path: Path

    # ------------------------------------------------------------------------ what a run leaves

    def lora(self, expert: Expert) -> Path:
        return self.path / LORA_FILE[expert]

    def whole(self, expert: Expert) -> Path:
        return self.path / WHOLE_FILE[expert]

    def student(self, expert: Expert) -> Path:
        """One expert's student: all of its weights where that file exists, otherwise its LoRA."""
        return self.whole(expert) if self.whole(expert).exists() else self.lora(expert)

    def has_student(self, expert: Expert) -> bool:
        return self.student(expert).exists()

    def single_file(self, expert: Expert, kind: str) -> Path:
        """The merged expert as one file for ComfyUI."""
        return self.path / "comfyui" / f"{expert}_noise_{kind}.safetensors"

    @property
    def workflow(self) -> Path:
        return self.path / "comfyui_workflow.json"  # its own nodes, filled in

    @property
    def wrapper_workflow(self) -> Path:
        return self.path / "wanvideowrapper_workflow.json"

    @property
    def scheduler(self) -> Path:
        return self.path / "scheduler"

    def stage(self, method: str) -> RunFolder:
        return RunFolder(self.path / method)  # of an earlier stage: like a run of its own

    @property
    def merged(self) -> Path:
        return self.path / "student"  # the complete pipeline, adapters merged in

    @property
    def merged_note(self) -> Path:
        return self.path / ".student.json"  # sizes and times of its files, as written

    @property
    def lock(self) -> Path:
        return self.path / ".lock"  # held by the run that writes into this folder

    @property
    def readme(self) -> Path:
        return self.path / "README.md"

    @property
    def model_card(self) -> Path:
        return self.path / "model_card.md"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def first_frame(self) -> Path:
        return self.path / PICTURE

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    def lesser_evaluation(self, kind: str, samples: int) -> Path:
        return self.path / f"evaluation-{kind}-{samples}.json"

    @property
    def clips(self) -> Path:
        return self.path / "clips"  # of the evaluation

    def clip(self, who: str, sample: int) -> Path:
        """One of them; `who` is `TEACHER_CLIP`, `FEW_CLIP` or `STUDENT_CLIP`."""
        return self.clips / f"{who}-{sample:04d}.mp4"

    @property
    def comparison(self) -> Path:
        return self.path / "comparison.png"

    @property
    def pairs(self) -> Path:
        return self.path / "pairs"  # videos of the evaluation: teacher and student side by side

    @property
    def plan(self) -> Path:
        return self.path / "plan.txt"

    @property
    def budget(self) -> Path:
        return self.path / "budget.json"  # what share of the usual counts --budget allowed

    @property
    def plan_numbers(self) -> Path:
        return self.path / "plan.json"

    @property
    def spent(self) -> Path:
        return self.path / "spent.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tracker(self) -> Path:
        return self.path / "logs"

    # --------------------------------------------------------------------------------- previews

    @property
    def previews(self) -> Path:
        return self.path / "previews"

    @property
    def preview_prompts(self) -> Path:
        return self.previews / "prompts.json"

    def preview(self, expert: Expert, who: str, prompt: int) -> Path:
        """A clip; `who` is `TEACHER_CLIP` or the number of student updates."""
        return self.previews / f"{expert}-{who}-{prompt}.mp4"

    # ----------------------------------------------------------------------------- to go on from

    def expert(self, expert: Expert) -> Path:
        return self.path / expert  # the folder of its checkpoints

    def best(self, expert: Expert) -> Path:
        return self.expert(expert) / "best.safetensors"  # what would be exported so far

    # ----------------------------------------------------- caches, which may be deleted at any time

    @property
    def prompts(self) -> Path:
        return self.path / "prompts"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"  # that clips begin with: their latents

    @property
    def image_source(self) -> RunFolder:
        return RunFolder(self.path / "image_source")  # of the teacher that makes the pictures

    @property
    def encoder_note(self) -> Path:
        return self.prompts / "encoder.json"

    def samples(self, kind: str, digest: str = "") -> Path:
        """The folder of one set of stored samples, or of all sets of a kind."""
        return self.path / kind / digest

    def evaluation_cache(self, digest: str) -> Path:
        return self.path / "evaluation" / f"{digest}.safetensors"

    @property
    def caches(self) -> list[Path]:
        """The folders of all caches, those of earlier stages too."""
        stages = [self, self.image_source, *map(self.stage, FIRST_STAGES)]
        kinds = ("trajectories", "anchors", "handovers", "evaluation")
        return [p for s in stages for p in (s.prompts, s.pictures, *map(s.samples, kinds))]


# What an upload takes along, and what of that it must leave behind, as patterns of huggingface_hub,
# whose `*` goes beyond a `/`: that of `*.safetensors` reaches checkpoints.
UPLOADED = (
    *LORA_FILE.values(),
    "comfyui_workflow.json",
    "wanvideowrapper_workflow.json",
    "scheduler/*",
    "previews/*",
    "pairs/*",
    "clips/*",
    "comparison.png",
    "report.html",
    "evaluation.json",
)
NOT_UPLOADED = ("*/.*", "*/small/*")  # half-written files, and the page's own smaller clips


def student_file(folder: str | Path, expert: Expert) -> Path:
    """What a run left of one expert's student: its LoRA, or all of its weights."""
    return RunFolder(Path(folder)).student(expert)
