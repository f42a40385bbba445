"""The pictures that clips of an image-to-video teacher begin with, and their split."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from wan_distill.data.first_frames import FirstFrames, PicturedPrompt, Prompt
from wan_distill.data.picture_source import PictureSource
from wan_distill.data.pictures import BUILT_IN_PICTURES, PictureRecord, read_pictures
from wan_distill.data.prompts import counting_tokens, held_out_of, split_prompts
from wan_distill.data.run import caches_of
from wan_distill.errors import FileError, Stopped, UsageError
from wan_distill.model.loading import Teacher
from wan_distill.model.vae import encode_first_frame
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.scale import scale_of
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
    source: PictureSource | None = None
    """what makes them, where they are not given"""

    def pixels(
        self, keys: Collection[str], height: int, width: int
    ) -> dict[str, Callable[[], Tensor]]:
        """Digest of each of the pictures -> what reads its pixels [3, H, W] in [-1, 1]."""
        return {
            record.key: functools.partial(record.pixels, height, width)
            for record in (*self.training, *self.held_out)
            if record.key in keys
        }


def read_picture_sets(config: Config, teacher: TeacherInfo) -> PictureSets:
    """The pictures of `--images`, of which a tenth is held out, chosen by the hash of each one.

    Without it: those that `--image_source` makes, those that come with a tiny teacher, or a few
    that come with this package. Raises UsageError as `read_pictures`, `counting_tokens` and
    `PictureSource` do.

    Args:
        config: resolved.
    """
    if not teacher.takes_picture:
        return PictureSets()
    if teacher.picture_source is not None:
        source = PictureSource(config, teacher.picture_source)
        training, held_out = map(source.records, (source.training, source.held_out))
        return PictureSets(training, held_out, source)
    say = functools.partial(print, file=sys.stderr)
    read = functools.partial(
        read_pictures,
        say=say,
        size=(config.height, config.width),
        too_long=counting_tokens(config, teacher),
    )
    if config.images is None and teacher.world is not None:
        training, held_out = (read(teacher.folder / name) for name in (OWN, OWN_HELD_OUT))
        return PictureSets(training, held_out)
    if config.images is None:
        if scale_of(config, teacher).is_large and not config.dry_run:
            raise UsageError(
                f"--images: none given; {teacher.title} needs hours for a student, and the few "
                "rendered pictures that come with this tool make none of any use. Give a folder of "
                "pictures with captions, or --image_source"
            )
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


def keys_of(prompts: Iterable[Prompt]) -> frozenset[str]:
    """The digests of the pictures of those that have one."""
    return frozenset(p.picture for p in prompts if isinstance(p, PicturedPrompt))


def encode_pictures(
    config: Config,
    teacher: Teacher,
    pictures: PictureSets,
    read: Iterable[Prompt],
    runtime: Runtime,
) -> FirstFrames:
    """Encodes each distinct picture once with the teacher's VAE, which is then freed; nothing where
    the cache has all of them.

    Raises Stopped after a signal; what is encoded is kept.

    Args:
        read: the prompts whose pictures the run looks at.
    """
    info = teacher.info
    size = [config.num_frames, config.height, config.width]
    key = dict(vae=info.fingerprint(("vae",)), size=size)
    folder = caches_of(config).pictures
    first_frames = FirstFrames(folder, key, info.mask_channels, runtime.device)
    pixels = pictures.pixels(keys_of(read), config.height, config.width)
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
            given = f"--images {config.images}"
            if pictures.source is not None:
                given = f"--image_source {config.image_source}"
            raise UsageError(f"{given}: {error}") from error
    runtime.state.wait_for_everyone()
    return first_frames
