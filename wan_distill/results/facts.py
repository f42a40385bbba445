"""Tables of the page: settings that differ from the defaults, and what was planned against what was
spent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_distill.errors import UsageError
from wan_distill.layout import RunFolder
from wan_distill.planning.wording import duration, size
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.job import SECOND_STAGE_FLAGS
from wan_distill.settings.resolve import resolve_stages

# What says where a run takes place and not what it does.
LEFT_OUT = {"output_dir", "init_student_from", "serve", "dry_run", "evaluate_only", "plan_json"}
SAME_TEACHER = (
    *("teacher_path", "revision", "variant", "cache_dir", "teacher_lora"),
    *("teacher_transformer", "teacher_transformer_2", "init_student_from", "output_dir"),
)


def read_plan(folder: RunFolder) -> dict[str, Any]:
    """What plan.json says; nothing where there is none."""
    file = folder.plan_numbers
    plan: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return plan


def changed_settings(
    config: Config, info: TeacherInfo, plan: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """(flag, value, default) of each setting of the run that is not the default for its teacher and
    method.
    """
    stages = plan.get("stages") or [config.to_json()]
    methods = [stage["method"] for stage in stages]
    given = {name: getattr(config, name) for name in SAME_TEACHER}
    if len(stages) > 1:
        given["init_student_from"] = None
    try:
        defaults = resolve_stages(Config(**given, method="+".join(methods)), info)
    except UsageError:  # such as a method of the user's own: there are no defaults to compare with
        return []
    found: dict[str, tuple[str, str, str]] = {}
    for number, (stage, default) in enumerate(zip(stages, defaults, strict=False)):
        usual = default.to_json() | _refinement(defaults)
        for name, value in stage.items():
            own = name not in LEFT_OUT and (number == 0 or name not in SECOND_STAGE_FLAGS)
            own &= not (name.startswith("refine_") and value is None)  # left open
            if own and value != usual.get(name):
                found.setdefault(name, (f"--{name}", plain(value), plain(usual.get(name))))
    return sorted(found.values())


def _refinement(stages: Sequence[Config]) -> dict[str, Any]:
    """The values of the flags that are about the second stage: left open, they are its own."""
    if len(stages) == 1:
        return {}
    return {own: getattr(stages[-1], name) for name, own in SECOND_STAGE_FLAGS.items()}


def plain(value: Any) -> str:
    """A setting's value for a reader elsewhere: of paths on this machine the last part only."""
    if isinstance(value, list):
        return ",".join(map(plain, value)) or "none"
    if value is None:
        return "none"
    text = str(value)
    return Path(text).name if os.path.isabs(text) else text


def without_places(value: Any) -> Any:
    """JSON-ready values for a reader elsewhere, as `plain` has each of them."""
    if isinstance(value, dict):
        return {name: without_places(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_places(part) for part in value]
    return plain(value) if isinstance(value, str) else value


def planned_and_spent(plan: dict[str, Any], spent: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, planned, spent): time by part, in all, and the peak of memory."""
    planned, taken = plan.get("seconds_by_stage", {}), spent.get("seconds", {})
    names = [*planned, *(name for name in taken if name not in planned)]
    rows = [
        (
            name,
            _time(planned[name]) if name in planned else "",
            _time(taken[name]) if name in taken else "",
        )
        for name in names
    ]
    if not rows:
        return []
    rows.append(("in all", _time(sum(planned.values())), _time(sum(taken.values()))))
    if "peak_bytes" in plan:
        peak = size(spent["peak_bytes"]) if spent.get("peak_bytes") else ""
        more = "" if not spent or spent["gpu"] else ", spent: libraries included"
        rows.append((f"peak of memory{more}", size(plan["peak_bytes"]), peak))
    return rows


def plan_basis(plan: dict[str, Any]) -> str:
    """What the planned seconds are computed from; empty where that was not written down."""
    hardware = plan.get("hardware")
    if not hardware:
        return ""
    return f"Planned at {hardware['rate'] / 1e12:.3g} TFLOP/s per device: {hardware['reason']}."


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else f"{seconds:.0f} s"
