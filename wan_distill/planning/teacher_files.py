"""Are the teacher's files whole, and what does its tokenizer make of the prompts?"""

from __future__ import annotations

from collections.abc import Sequence

from wan_distill.errors import FileError, UsageError
from wan_distill.maths.sigmas import SUBFOLDER
from wan_distill.model.hub_files import outline
from wan_distill.model.part_files import check_part, files_of, of_teacher, parts_of
from wan_distill.settings.assets import is_offline
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.picture_source import named_by_its_flag, source_config
from wan_distill.settings.reading import read_json
from wan_distill.settings.teacher_changes import expert_of_part
from wan_distill.settings.weight_files import variant_or_none
from wan_distill.umt5.text import tokenizer_of
from wan_distill.umt5.tokenizer import describe_prompts, tokenise


def check_files(info: TeacherInfo, config: Config) -> str:
    """What the teacher's weight files hold, in words; offline also those in the hub's cache. Of
    those on the hub, the names.

    Raises UsageError naming a damaged or missing one, and pickles that may not or cannot be read.
    """
    if info.is_local or is_offline():
        return describe_files(info, config)
    with outline(info) as shown:
        if shown is None:
            return "on the hub; downloaded when needed"
        part_variants(shown, config.variant)
        _check_pickles(shown, config)
        count = sum(len(files_of(shown, config, part)) for part in parts_of(shown))
    return f"on the hub, {count} files of weights; downloaded when needed"


def describe_files(info: TeacherInfo, config: Config) -> str:
    """What the weight files on this machine hold, in words. Raises UsageError as `check_files`
    does.
    """
    part_variants(info, config.variant)
    _check_pickles(info, config)
    dtypes = []
    for part in parts_of(info):
        header = check_part(info, config, part)
        dtypes.append(f"{part} {'/'.join(sorted({t['dtype'] for t in header.values()}))}")
    return f"whole by their headers; {', '.join(dtypes)}"


def check_text(info: TeacherInfo, prompts: Sequence[str], config: Config | None = None) -> str:
    """What the teacher's tokenizer makes of `prompts`, and of the negative prompt in `config`, in
    words.

    Raises UsageError where the tokenizer is not the text encoder's, and where it does not know what
    the prompts say; of the embedded teacher, whose vocabulary is small, that is said only.
    """
    try:
        tokenizer = tokenizer_of(info.folder)
        strict = not info.embedded
        found = describe_prompts(tokenizer, prompts, info.folder / "tokenizer", strict)
    except FileError as error:
        raise UsageError(f"--teacher_path {info.source}: {error}") from error
    found += f"; the tokenizer has {len(tokenizer)} entries"
    if config is not None and config.negative_prompt:
        negative = tokenise(tokenizer, config.negative_prompt)
        if negative.count > config.max_sequence_length:
            found += (
                f"; the negative prompt has {negative.count}, of which "
                f"{config.max_sequence_length} are seen (--max_sequence_length)"
            )
        if negative.unknown:
            share = 100 * negative.unknown / negative.characters
            found += f"; of the negative prompt's text {share:.1f} % is unknown"
    return found


def check_picture_source(info: TeacherInfo, config: Config, prompts: Sequence[str]) -> str | None:
    """What the files of the teacher that makes the pictures hold, and what its tokenizer makes of
    the prompts. Raises UsageError as `check_files` and `check_text` do.
    """
    source = info.picture_source
    if source is None:
        return None
    own = source_config(config, source)
    with named_by_its_flag():
        return f"{check_files(source, own)}; {check_text(source, prompts, own)}"


def part_variants(info: TeacherInfo, variant: str | None) -> dict[str, str | None]:
    """The variant that each part is loaded with: `variant` where the part has files of it, else the
    plain files, as WanPipeline does.

    Raises UsageError where no part has any, and where one of two experts lacks them.
    """
    experts = [SUBFOLDER[expert] for expert in info.experts]
    variants = {
        part: variant_or_none(info.folder / part, variant)
        for part in ("text_encoder", "vae", *experts)
    }
    if variant and not any(variants.values()):
        raise UsageError(
            f"--variant {variant}: no part of {info.source} has files of it; leave it out"
        )
    lacking = [part for part in experts if variants[part] is None]
    if variant and len(lacking) == 1 and len(experts) == 2:
        raise UsageError(
            f"--variant {variant}: of two experts only one has files of it, {lacking[0]} has none; "
            "download them, or leave it out"
        )
    return variants


def download_left(info: TeacherInfo) -> float:
    """Bytes of a hub teacher's weights that are not in the hub's cache yet, as its indices say.
    Raises UsageError where one cannot be read.
    """
    if info.is_local:
        return 0.0
    total = 0.0
    for file in info.folder.glob("*/*.index.json"):
        if expert_of_part(file.parent.name) in info.changes.experts:
            continue
        try:
            metadata = read_json(file).get("metadata", {})
        except FileError as error:
            raise UsageError(of_teacher(info, error)) from error
        here = sum(weights.stat().st_size for weights in file.parent.glob("*.safetensors"))
        total += max(0.0, metadata.get("total_size", 0) - here)
    return total


def _check_pickles(info: TeacherInfo, config: Config) -> None:
    """Raises UsageError for pickles that may not or cannot be read."""
    files = {part: files_of(info, config, part) for part in parts_of(info)}
    changed = {SUBFOLDER[expert] for expert in info.experts if info.changes.touches(expert)}
    stored = config.base_precision != "bf16" or config.offload
    flag = "--offload" if config.offload else f"--base_precision {config.base_precision}"
    for part in files.keys() & {SUBFOLDER[expert] for expert in info.experts}:
        if (stored or part in changed) and files[part][0].suffix == ".bin":
            loras = info.changes.loras
            flag = flag if stored or not loras else loras[0].header.flag
            raise UsageError(
                f"{flag}: reads safetensors only, and {part} has .bin weights; convert them, or "
                "leave it out"
            )
