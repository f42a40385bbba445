"""What a text encoder's configuration and files say, without loading a weight; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from wan_distill.errors import TextEncoderError
from wan_distill.settings.assets import EMBEDDED, download
from wan_distill.settings.reading import read_header, read_json
from wan_distill.settings.weight_files import weight_files
from wan_distill.settings.weight_names import explain_codes, explain_names
from wan_distill.umt5.tables import EMBED, SHARED, StoredTable, equal_tables, tables_in


@dataclass(frozen=True)
class Inspection:
    """What the configuration and the weight files of a text encoder say.

    `files` are those that the loader reads. `tables_equal` is None unless the files hold both
    tables, and for pickles, which are not compared before they are loaded.
    """

    folder: Path
    variant: str | None
    files: tuple[Path, ...]
    model_type: str
    tables: dict[str, StoredTable]
    tables_equal: bool | None
    transformers: str

    @property
    def keys_in_file(self) -> str:
        """Which of the two tables the files hold, in words."""
        if len(self.tables) == 2:
            comparison = {True: "equal", False: "different", None: "not compared"}
            return f"both, {comparison[self.tables_equal]}"
        only = next(iter(self.tables), None)
        return {SHARED: "shared only", EMBED: "embed_tokens only", None: "neither"}[only]

    @property
    def loads_right_on(self) -> str:
        """Versions of transformers whose `from_pretrained` gives the right table (measured:
        docs/UMT5_MATRIX.md).
        """
        return {
            "shared only": "4.x, and 5.3 or newer (5.0 to 5.2 leave the table uninitialised)",
            "embed_tokens only": "any",
            "both, equal": "any",
            "both, not compared": "any, if the two tables are equal",
            "neither": "none",
            "both, different": (
                "none for certain: 4.x uses shared, 5.x uses embed_tokens, and neither reports it"
            ),
        }[self.keys_in_file]


def installed_transformers() -> str:
    """Version of transformers; empty where it is not installed."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""


def inspect_text_encoder(folder: str | Path, variant: str | None = None) -> Inspection:
    """Reads config.json and the headers of the weight files of `variant` in `folder`, which is a
    text encoder's or a pipeline's.

    Raises FileError where the configuration or the weights cannot be read.
    """
    folder = Path(folder)
    if (folder / "text_encoder").is_dir():
        folder = folder / "text_encoder"
    if not (folder / "config.json").is_file():
        raise TextEncoderError(
            f"{folder}: holds no config.json",
            "give the folder of a Wan pipeline or of its text encoder",
        )
    config = read_json(folder / "config.json")
    files = tuple(weight_files(folder, variant))
    if shown := explain_codes(config, {}):
        raise TextEncoderError(f"{folder}: {shown[0]}", shown[1])
    tables = {key: table for file in files for key, table in tables_in(file).items()}
    return Inspection(
        folder=folder,
        variant=variant,
        files=files,
        model_type=str(config.get("model_type")),
        tables=tables,
        tables_equal=equal_tables(tables[SHARED], tables[EMBED]) if len(tables) == 2 else None,
        transformers=installed_transformers(),
    )


def check_class(inspection: Inspection, loaded: str) -> None:
    """Raises TextEncoderError unless the files are UMT5's and `loaded`, the name of the class that
    loads them, is too. T5 loads them without an error, and gives wrong embeddings.
    """
    if inspection.model_type != "umt5" or loaded != "UMT5EncoderModel":
        raise TextEncoderError(
            f"{inspection.folder}: a {inspection.model_type} checkpoint loaded as {loaded}, but "
            "Wan's text encoder is UMT5, where every layer has its own position bias",
            "load UMT5's files with UMT5EncoderModel",
        )
    if not inspection.tables:
        files = [file for file in inspection.files if file.suffix == ".safetensors"]
        stored = {name for file in files for name in read_header(file)[0]}
        if shown := explain_names(stored, [SHARED]):
            raise TextEncoderError(f"{inspection.folder}: {shown[0]}", shown[1])
        raise TextEncoderError(
            f"{inspection.folder}: holds neither {SHARED} nor {EMBED}",
            "get the original checkpoint",
        )


def locate(
    source: str | Path,
    subfolder: str = "text_encoder",
    revision: str | None = None,
    cache_dir: str | None = None,
) -> Path:
    """The local folder of a text encoder; of a hub repository only that folder and the tokenizer's
    are fetched.

    Raises UsageError where `source` is neither a folder nor reachable on the hub.
    """
    folder = EMBEDDED.get(str(source), Path(source))
    if folder.is_dir():
        return folder
    patterns = [f"{subfolder}/*", "tokenizer/*"]
    return download(str(source), revision, cache_dir, patterns) / subfolder
