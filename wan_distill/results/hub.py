"""The student on the Hugging Face Hub: its files, previews and report, and a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from wan_distill.errors import Halted, UsageError
from wan_distill.layout import NOT_UPLOADED, UPLOADED, RunFolder
from wan_distill.results.card import model_card
from wan_distill.results.facts import without_places
from wan_distill.settings.assets import HUB_ERRORS
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.reading import read_json


def check_hub(config: Config) -> None:
    """Asks the hub, before days of training, whether it would accept the upload.

    Raises UsageError where `--hub_model_id` is no repository name, and where the hub does not know
    the token or cannot be reached.
    """
    try:
        validate_repo_id(repository(config))
        HfApi(token=config.hub_token).whoami()
    except HFValidationError as error:
        raise UsageError(
            f"--hub_model_id {repository(config)}: is no repository name ({error}); give user/name"
        ) from error
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise UsageError(
            f"--push_to_hub: the hub does not know you ({_reason(error)}); `hf auth login`, or "
            "--hub_token with a token that may write"
        ) from error
    except HUB_ERRORS as error:
        raise UsageError(
            f"--push_to_hub: the hub does not answer ({_reason(error)}); check the network"
        ) from error


def repository(config: Config) -> str:
    """The name to upload to; without a user, the token's owner is the user. That of the output
    folder may hold characters that the hub does not take.
    """
    own = re.sub(r"[^\w.-]+|--+", "-", Path(config.output_dir).resolve().name, flags=re.ASCII)
    return config.hub_model_id or own.strip("-.")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def push(stages: Sequence[Config], info: TeacherInfo, evaluation: dict[str, Any] | None) -> str:
    """Uploads the output folder of a job, of whose files `layout.UPLOADED` says which.

    Args:
        stages: the settings of each stage, in order.

    Returns the address of the repository's page. Raises Halted where the upload fails: everything
    is on disk, and the same command tries again.
    """
    config = stages[-1]
    folder = RunFolder(Path(config.output_dir))
    api = HfApi(token=config.hub_token)  # each call below is made with this token
    try:
        private = True if config.hub_private_repo else None  # None: the owner's own default
        name = api.create_repo(repository(config), private=private, exist_ok=True).repo_id
        card = model_card(folder.path, stages, info, evaluation, name)
        folder.model_card.write_text(card, encoding="utf-8")
        api.upload_file(path_or_fileobj=folder.model_card, path_in_repo="README.md", repo_id=name)
        api.upload_folder(
            repo_id=name,
            folder_path=folder.path,
            allow_patterns=list(UPLOADED),
            ignore_patterns=list(NOT_UPLOADED),
        )
        record = without_places(read_json(folder.run_json))
        api.upload_file(
            path_or_fileobj=json.dumps(record, indent=1).encode(),
            path_in_repo=folder.run_json.name,
            repo_id=name,
        )
        if config.whole_student:  # it fits no teacher: the repository is the whole pipeline
            api.upload_folder(repo_id=name, folder_path=folder.merged)
    except HUB_ERRORS as error:
        raise Halted(
            f"--push_to_hub: {_reason(error)}; all is in {folder.path}, run the same command to "
            "try again"
        ) from error
    return f"{api.endpoint}/{name}"
