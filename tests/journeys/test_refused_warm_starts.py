"""A student to begin with that does not fit is refused before anything is solved."""

from __future__ import annotations

import pytest
from conftest import tiny_flags
from lessons import make_lesson

import train_distillation
from wan_distill.errors import UsageError
from wan_distill.layout import RunFolder
from wan_distill.model.student_files import save_lora
from wan_distill.model.warm_start import check_warm_start
from wan_distill.settings.description import read_teacher


@pytest.fixture
def first(make_run, tmp_path):
    """The folder of a run that left a high expert's LoRA, of rank 4."""
    run = make_run(method="trajectory", output_dir=str(tmp_path / "first"))
    weights = make_lesson(run, "high").learners["student"].exported()
    save_lora(run.folder.lora("high"), weights, run.config, run.info, "high")
    return run.folder


CASES = [
    (dict(expert="both"), "holds no low_noise_lora.safetensors"),
    (
        dict(lora_layers=("to_q",)),
        "its layers are to_q,to_k,to_v,to_out.0,ffn.net.0.proj,ffn.net.2,time_embedder.linear_1,",
    ),
]


@pytest.mark.parametrize(("change", "said"), CASES)
def test_a_warm_start_that_does_not_fit_is_refused(small_config, first, change, said):
    settings = dict(method="dmd", init_student_from=str(first.path), expert="high") | change
    with pytest.raises(UsageError) as refused:
        config = small_config(**settings)
        check_warm_start(config, read_teacher(config))
    assert said in str(refused.value)


def test_it_is_refused_before_anything_is_solved(random_teacher, first, tmp_path, capsys):
    second = tmp_path / "second"
    fitting = dict(method="dmd", init_student_from=first.path, expert="high")

    def run(**changes) -> int:
        capsys.readouterr()
        return train_distillation.main(tiny_flags(random_teacher, second, **(fitting | changes)))

    for change, said in [
        *CASES,
        (dict(init_student_from=tmp_path), "holds no high_noise_lora.safetensors"),
    ]:
        values = {k: ",".join(v) if isinstance(v, tuple) else v for k, v in change.items()}
        assert run(**values) == 2
        assert said in capsys.readouterr().err
    assert run(dry_run=True) == 0
    file = RunFolder(first.path).lora("high")
    file.write_bytes(file.read_bytes()[:-9])
    assert run() == 2
    assert "truncated" in capsys.readouterr().err
    assert not second.exists()
