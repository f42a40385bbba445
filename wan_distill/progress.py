"""Going on where a run stopped: the same command resumes from the last whole checkpoint, bit for bit."""

from __future__ import annotations

from pathlib import Path

from wan_distill import checkpoint
from wan_distill.config import Config, UsageError
from wan_distill.denoiser import Role
from wan_distill.runtime import Learner, Runtime

# Settings that may differ between a run and its continuation: they do not change what an update does.
FREE = {
    "teacher_path", "output_dir", "dry_run", "cache_dir", "verbose_loading", "allow_pickle", "max_train_steps",
    "expert", "sample_batch_size", "gradient_checkpointing", "checkpointing_steps", "checkpoints_total_limit",
    "logging_steps", "monitor_steps", "monitor_samples", "save_merged", "evaluate",
    "evaluate_only", "eval_samples", "eval_seed", "debug",
    "validation_steps", "validation_prompt", "fps", "report_to", "tracker_project_name", "push_to_hub",
    "hub_model_id", "hub_token",
}


def save(config: Config, root: Path, step: int, learners: dict[Role, Learner], runtime: Runtime) -> None:
    """A checkpoint of every role after `step` updates; a no-op where it already exists."""
    if runtime.is_main and not (root / f"checkpoint-{step}").exists():
        state = dict(config=config.to_json(), done={role: learner.done for role, learner in learners.items()})
        checkpoint.save(root, step, {role: learner.tensors() for role, learner in learners.items()}, state,
                        config.checkpoints_total_limit)
    runtime.state.wait_for_everyone()


def resume(config: Config, root: Path, learners: dict[Role, Learner], runtime: Runtime) -> int:
    """Restores the newest whole checkpoint below `root` and returns its step; 0 where there is none."""
    folder = checkpoint.latest(root, runtime.say)
    if folder is None:
        return 0
    tensors, state = checkpoint.load(folder)
    check_same_run(config, state["config"], folder)
    for role, learner in learners.items():
        learner.restore(tensors[role], state["done"][role])
    runtime.say(f"Going on from {folder}.")
    return state["step"]


def check_same_run(config: Config, before: dict, folder: Path) -> None:
    """Raises UsageError where a setting that matters differs from the checkpoint's."""
    now = config.to_json()
    changed = [f"{k} was {before.get(k)}, is {now[k]}" for k in now if k not in FREE and before.get(k) != now[k]]
    if changed:
        raise UsageError(f"{folder} was trained with other settings ({'; '.join(changed)}); "
                         "set them back, or choose another --output_dir")
