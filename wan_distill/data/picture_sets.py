"""The pictures that clips of an image-to-video teacher begin with, and their split."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from wan_distill.data.first_frames import FirstFrames, PicturedPrompt, Prompt
from wan_distill.data.pictures import BUILT_IN_PICTURES, PictureRecord, read_pictures
from wan_distill.data.prompts import counting_tokens, held_out_of, split_prompts
from wan_distill.data.run import caches_of
from wan_distill.errors import FileError, Stopped, UsageError
from wan_distill.model.loading import Teacher, encode_first_frame
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.console import enter
from wan_distill.system.runtime import Runtime

# In the folder of a tiny teacher that takes pictures.
OWN, OWN_HELD_OUT = "pictures", "heldout_pictures"


@dataclass(frozen=True)
class PictureSets:
    """Pictures with their captions; none of a text-to-video teacher."""

    training: Sequence[PictureRecord] = ()
    held_out: Sequence[PictureRecord] = ()
    """for the evaluation and previews"""

    def pixels(self, height: int, width: int) -> dict[str, Callable[[], Tensor]]:
        """Digest of a picture -> what reads its pixels [3, height, width] in [-1, 1]."""
        return {
            record.key: functools.partial(record.pixels, height, width)
            for record in (*self.training, *self.held_out)
        }


def read_picture_sets(config: Config, teacher: TeacherInfo) -> PictureSets:
    """The pictures of `--images`, of which a tenth is held out, chosen by the hash of each one.

    Without it: those that come with a tiny teacher, or a few that come with this package. Raises
    UsageError as `read_pictures` and `counting_tokens` do.

    Args:
        config: resolved.
    """
    if not teacher.takes_picture:
        return PictureSets()
    say = functools.partial(print, file=sys.stderr)
    read = functools.partial(
        read_pictures,
        say=say,
        size=(config.height, config.width),
        too_long=counting_tokens(config, teacher),
    )
    if config.images is None and teacher.world is not None:
        own = [read(teacher.folder / name) for name in (OWN, OWN_HELD_OUT)]
        return PictureSets(*own)
    if config.images is None:
        say(
            "--images: none given; a few rendered pictures that come with this tool are used: "
            "enough to try, not to make a student of any use"
        )
    records = read(config.images or BUILT_IN_PICTURES)
    keys = list(dict.fromkeys(record.key for record in records))
    if len(keys) == 1:
        say(f"--images {config.images}: one picture only; the evaluation and previews use it too")
        return PictureSets(records, records)
    excluded = set(held_out_of(keys))
    return PictureSets(
        [record for record in records if record.key not in excluded],
        [record for record in records if record.key in excluded],
    )


def prompts_of(
    config: Config, teacher: TeacherInfo, pictures: PictureSets
) -> tuple[list[Prompt], list[Prompt]]:
    """(training, evaluation): captions with their pictures or, where a teacher takes none, texts as
    `split_prompts` divides them.
    """
    if not pictures.training:
        training, held_out = split_prompts(config, teacher)
        return [*training], [*held_out]
    return _prompts(pictures.training), _prompts(pictures.held_out)


def _prompts(records: Sequence[PictureRecord]) -> list[Prompt]:
    return [PicturedPrompt(record.caption, record.key) for record in records]


def encode_pictures(
    config: Config, teacher: Teacher, pictures: PictureSets, runtime: Runtime
) -> FirstFrames | None:
    """Encodes each distinct picture once with the teacher's VAE, which is then freed; nothing where
    the cache has all of them. None for a teacher that takes no pictures.

    Raises Stopped after a signal; what is encoded is kept.
    """
    info = teacher.info
    if not info.takes_picture:
        return None
    size = [config.num_frames, config.height, config.width]
    key = dict(vae=info.fingerprint(("vae",)), size=size)
    folder = caches_of(config).pictures
    first_frames = FirstFrames(folder, key, info.mask_channels, runtime.device)
    pixels = pictures.pixels(config.height, config.width)
    if runtime.is_main and first_frames.missing(pixels):
        enter("encode pictures")
        vae = teacher.load_vae()

        def encode(picture: Tensor) -> Tensor:
            if runtime.signal is not None:  # one process alone is at work here
                raise Stopped("Stopped; encoded pictures are kept. Run the same command to go on.")
            return encode_first_frame(vae, picture, config.num_frames)

        try:
            first_frames.fill(pixels, encode, shown=True)
        except FileError as error:  # a picture that was changed since it was read
            raise UsageError(f"--images {config.images}: {error}") from error
    runtime.state.wait_for_everyone()
    return first_frames
