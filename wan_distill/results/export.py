"""The scheduler, and a picture to begin with; each LoRA is loaded back and compared."""

from __future__ import annotations

from PIL import Image

from wan_distill.data.first_frames import Prompt
from wan_distill.data.run import Run
from wan_distill.model.student_files import scheduler_for
from wan_distill.model.verification import verify_lora
from wan_distill.results.merged import save_merged
from wan_distill.results.single_files import export_single_files
from wan_distill.system.files import written_aside


def write_first_frame(run: Run, prompt: Prompt) -> None:
    """Writes an example of a picture, for the commands and workflows that need one, where the
    student takes any. The user's own stays.

    Args:
        prompt: whose picture it is, as it was encoded.
    """
    if run.first_frames is None or run.folder.first_frame.exists():
        return
    (pixels,) = run.first_frames.pixels([prompt])
    with written_aside(run.folder.first_frame) as file:
        Image.fromarray((255 * pixels).round().byte().numpy()).save(file, format="PNG")


def export_student(run: Run) -> None:
    """Writes the scheduler and, where asked for, the merged pipeline; the LoRA files were written
    by training.
    """
    config, folder = run.config, run.folder
    # What the second stage does not refine is the first one's, and exported beside it.
    experts = run.info.experts if config.is_second_stage else config.experts
    for expert in () if config.whole_student else experts:
        file = folder.lora(expert)
        if not file.exists():
            continue
        difference = verify_lora(run.info.transformer, file)
        print(
            f"{file.name}: {config.lora_dtype}, loaded back as diffusers and as ComfyUI do; equal "
            f"to {difference:.1g}"
        )
    folder.scheduler.mkdir(parents=True, exist_ok=True)  # diffusers only asserts that it is none
    scheduler_for(config).save_pretrained(folder.scheduler)
    if config.save_merged:
        save_merged(run)
    export_single_files(run)
