"""Pictures that a text-to-video teacher makes: the first frames of its clips, one a prompt."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from wan_distill.data.picture_folders import read_file
from wan_distill.data.pictures import PictureRecord
from wan_distill.data.prompts import split_prompts
from wan_distill.data.run import Run
from wan_distill.data.samples import SampleRequest, SampleStore
from wan_distill.data.solving import solve_missing
from wan_distill.errors import Stopped
from wan_distill.layout import RunFolder
from wan_distill.model.vae import decode
from wan_distill.settings.config import Config
from wan_distill.settings.description import TEACHER_PARTS, TEXT_PARTS, TeacherInfo
from wan_distill.settings.picture_source import source_config
from wan_distill.settings.sample_specs import clips_of_source
from wan_distill.system.console import progress_bar
from wan_distill.system.files import write_atomically


class PictureSource:
    """The teacher of `--image_source`, and the first frames of its clips.

    Raises UsageError as `source_config` and `split_prompts` do.

    Args:
        config: of the job, resolved.
        info: the teacher that makes the pictures.

    Attributes:
        config: of that teacher.
        training, held_out: the prompts, each of which gets a picture.
    """

    def __init__(self, config: Config, info: TeacherInfo):
        self.info = info
        self.config = source_config(config, info)
        self.training, self.held_out = split_prompts(self.config, info)
        self.prompts = (*self.training, *self.held_out)
        self.spec = clips_of_source(self.config, len(self.prompts))
        self.folder = RunFolder(Path(self.config.output_dir)).pictures
        self._fingerprint = info.fingerprint(TEACHER_PARTS + TEXT_PARTS)

    def records(self, prompts: Sequence[str]) -> list[PictureRecord]:
        """The pictures of some of its prompts. Nothing is made yet."""
        rows = {prompt: row for row, prompt in enumerate(self.prompts)}
        found = []
        for prompt in prompts:
            file = self.file(rows[prompt])
            read = functools.partial(read_file, file)
            found.append(PictureRecord(file.name, prompt, self.key(rows[prompt]), read))
        return found

    def key(self, row: int) -> str:
        """32 hexadecimal digits of everything that the picture of prompt `row` depends on: in the
        place of a digest of its bytes, which are known only when it is made.
        """
        config = self.config
        everything = self.spec.key() | dict(
            teacher=self._fingerprint,
            prompt=self.prompts[row],
            row=row,
            seed=config.seed,
            clip=[config.num_frames, config.height, config.width],
            boundary=config.boundary_ratio,
            guidance=[config.guidance_scale, config.guidance_scale_2],
            negative=config.negative_prompt,
            length=config.max_sequence_length,
            weights=config.weights_key,
        )
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]

    def file(self, row: int) -> Path:
        """The picture: a folder for `--images`, with the caption beside each."""
        return self.folder / f"{self.key(row)}.png"

    def missing(self, pictures: Collection[str]) -> list[int]:
        """The rows of those of `pictures`, given by their keys, that are not made yet."""
        rows = range(len(self.prompts))
        return [row for row in rows if self.key(row) in pictures and not self.file(row).exists()]

    def make(self, run: Run, rows: Sequence[int]) -> None:
        """Solves the clips of `rows` and keeps their first frames. All processes call it.

        Raises Stopped after a signal, and NonFiniteError as `solve_missing` does; what is solved is
        kept.

        Args:
            run: of `config` and `prompts`.
        """
        store = SampleStore(run, self.spec)
        solve_missing(run, [SampleRequest(store, frozenset(rows))])
        if run.runtime.is_main:
            vae = run.teacher.load_vae()
            self.folder.mkdir(parents=True, exist_ok=True)
            with progress_bar(len(rows), "first frames", "picture", True) as bar:
                for row in rows:
                    if run.runtime.signal is not None:  # one process alone is at work here
                        raise Stopped("Stopped; pictures are kept. Run the same command to go on.")
                    # Wan's VAE is causal: the first latent frame alone gives the first picture.
                    first = store.at([row], self.spec.stored)[:, :, :1]
                    self._write(row, decode(vae, first)[0, 0])
                    bar.update()
        run.runtime.state.wait_for_everyone()

    def _write(self, row: int, picture: Tensor) -> None:
        """Keeps a picture [H, W, 3] in [0, 1], and its caption first."""
        file, content = self.file(row), io.BytesIO()
        Image.fromarray((picture * 255).round().byte().numpy()).save(content, "PNG")
        write_atomically(file.with_suffix(".txt"), self.prompts[row].encode())
        write_atomically(file, content.getvalue())
