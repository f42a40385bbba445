"""Before a run: is there a repository's name, and does the hub answer?"""

from __future__ import annotations

import pytest
from huggingface_hub.utils import validate_repo_id

from wan_distill.errors import UsageError
from wan_distill.results.hub import check_hub, repository
from wan_distill.settings.config import Config


@pytest.mark.parametrize("folder", ["tiny_wan22-trajectory+dmd-4steps", "a b", "-x--y.", "Wän+å"])
def test_every_output_folder_gives_a_name_that_the_hub_takes(folder, tmp_path):
    name = repository(Config(output_dir=str(tmp_path / folder)))
    validate_repo_id(name)
    assert name == {"a b": "a-b", "-x--y.": "x-y", "Wän+å": "W-n"}.get(folder, name)
    assert repository(Config(hub_model_id="me/mine", output_dir=folder)) == "me/mine"


def test_without_a_network_it_is_refused_in_one_line(tmp_path):
    config = Config(output_dir=str(tmp_path / "out"), hub_token="hf_some")
    with pytest.raises(UsageError, match=r"--push_to_hub: the hub does not answer \(.+\)") as error:
        check_hub(config)
    assert "\n" not in str(error.value)
