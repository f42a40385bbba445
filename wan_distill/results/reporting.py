"""What a run shows while it works: the page, live where asked for; the tracker; what was spent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from wan_distill.layout import RunFolder
from wan_distill.maths.sigmas import Expert
from wan_distill.planning.plan import plan_numbers
from wan_distill.results.page import Page
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.console import on_progress
from wan_distill.system.files import write_atomically
from wan_distill.system.runtime import Runtime
from wan_distill.system.serving import serve_page
from wan_distill.system.spent import Spent
from wan_distill.training.metrics import Tracker


class Reporting:
    """One job's page, tracker and clock. All processes have one; only the main one writes.

    Args:
        stages: the settings of the job's stages, in order.
    """

    def __init__(self, stages: Sequence[Config], info: TeacherInfo, runtime: Runtime):
        self.stages = stages
        self.info = info
        self.config = stages[-1]
        self.runtime = runtime
        self.folder = RunFolder(Path(self.config.output_dir))
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.spent = Spent(self.folder.spent, runtime)
        self.tracker = Tracker(stages, runtime)
        self.page = Page(stages, info)
        on_progress(self.spent.tick)

    def begin(self, prompts: int) -> None:
        """Writes down what is planned, and serves the page where `--serve` asks for it.

        Raises UsageError where the port is taken, and where a record that the page is made of is
        damaged.

        Args:
            prompts: how many are encoded.
        """
        if not self.runtime.is_main:
            return
        if not self.config.evaluate_only:
            numbers = plan_numbers(self.stages, self.info, prompts, cards=False)
            write_atomically(self.folder.plan_numbers, json.dumps(numbers, indent=1).encode())
        self.page.html()  # what an earlier run left damaged is refused now, not at the end
        if self.config.serve is not None:
            self.runtime.say(*serve_page(self.config.serve, self.page.html, self.page.version))

    # ------------------------------------------------------------------------------ while it works

    def part(self, name: str) -> AbstractContextManager[None]:
        """Inside, time is counted as that part's, under the names of the plan."""
        return self.spent.part(name)

    def training(self, config: Config, expert: Expert) -> AbstractContextManager[None]:
        """The same for the training of one expert in the stage of `config`."""
        stage = f", {config.method}" if len(self.stages) > 1 else ""
        return self.spent.part(f"{expert} expert{stage}")

    def checks(self) -> AbstractContextManager[None]:
        """The same for checks and previews of the student."""
        return self.spent.part("checks and previews")

    def line(self, line: dict[str, Any], config: Config) -> None:
        """One line of metrics.jsonl of the stage of `config`."""
        self.tracker.log(line, config)

    def previews(self, config: Config, expert: Expert, step: int, updates: int) -> None:
        """New clips of the student after `updates` of its updates, `step` of all roles."""
        if self.runtime.is_main:
            self.tracker.log_clips(config, expert, step, updates)
            self.page.write()

    # ------------------------------------------------------------------------------------- the end

    def finish(self, evaluation: dict[str, Any] | None) -> None:
        """Tells the tracker how good the student is, and writes the page for the last time. For the
        main process.
        """
        self.tracker.log_evaluation(evaluation)
        self.tracker.finish()
        self.spent.finish()
        self.page.write()
