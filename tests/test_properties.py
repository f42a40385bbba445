"""What must hold for any input, not just for the examples: prompt parsing, schedules, keys."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from wan_distill.data.embeddings import PromptBank
from wan_distill.data.prompts import MUSUBI_OPTION, read_prompts
from wan_distill.errors import UsageError
from wan_distill.maths.flow import shift_sigmas
from wan_distill.maths.randomness import keyed_order, keyed_seed
from wan_distill.maths.sigmas import expert_of, handover, insert_sigmas, sigma_grid, steps_of
from wan_distill.settings.command_line import parse_args

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
steps = st.integers(1, 16)
shifts = st.floats(0.3, 20)
lines = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=40)


@quick
@given(st.lists(lines, max_size=12), st.sampled_from([".txt", ".json", ".jsonl"]))
def test_prompts_come_back_once_each_and_in_order(tmp_path, written, suffix):
    file = tmp_path / f"prompts{suffix}"
    text = {
        ".txt": "\n".join(written),
        ".json": json.dumps(written),
        ".jsonl": "\n".join(json.dumps({"text": line}) for line in written),
    }[suffix]
    file.write_bytes(text.encode())
    cleaned = [
        MUSUBI_OPTION.split(
            line.strip().lstrip("\ufeff") if i == 0 and suffix == ".txt" else line.strip(),
            maxsplit=1,
        )[0].strip()
        for i, line in enumerate(written)
    ]
    expected = list(dict.fromkeys(line for line in cleaned if line and not line.startswith("#")))
    if not expected:
        with pytest.raises(UsageError, match="holds no prompt"):
            read_prompts(file)
    else:
        assert read_prompts(file) == expected


@quick
@given(st.binary(max_size=200), st.sampled_from([".txt", ".json", ".jsonl", ".csv"]))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path, data, suffix):
    file = tmp_path / f"prompts{suffix}"
    file.write_bytes(data)
    try:
        prompts = read_prompts(file)
    except UsageError as refused:
        assert "\n" not in str(refused) and str(file) in str(refused)
    else:
        assert (
            prompts
            and len(set(prompts)) == len(prompts)
            and all(p == p.strip() != "" for p in prompts)
        )


@quick
@given(steps, shifts)
def test_a_grid_descends_from_1_to_0_and_is_what_the_stock_scheduler_gives(count, shift):
    sigmas = sigma_grid(count, shift)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and all(a > b for a, b in itertools.pairwise(sigmas))
    scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(count)
    assert scheduler.sigmas.tolist() == pytest.approx(sigmas, abs=2e-7)
    finer = sigma_grid(2 * count, shift)  # nested: each is also a point of twice as many steps
    assert [finer[2 * i] for i in range(count + 1)] == pytest.approx(sigmas, rel=1e-12, abs=0)


@quick
@given(steps, shifts, st.floats(0.05, 0.95))
def test_each_step_has_one_expert_and_the_high_one_comes_first(count, shift, boundary):
    sigmas = sigma_grid(count, shift)
    high, low = steps_of("high", sigmas, boundary), steps_of("low", sigmas, boundary)
    assert high + low == list(range(count)) and 0 in high
    assert handover(sigmas, boundary) == (sigmas[low[0]] if low else 0)
    assert all(
        (expert_of(sigmas[i], boundary) == "high") == (sigmas[i] * 1000 >= boundary * 1000)
        for i in range(count)
    )


@quick
@given(steps, shifts, st.integers(2, 60), shifts)
def test_the_teachers_grid_takes_up_the_students_sigmas(count, shift, teacher_steps, teacher_shift):
    sigmas, grid = sigma_grid(count, shift), sigma_grid(teacher_steps, teacher_shift)
    merged = insert_sigmas(sigmas, grid)
    assert set(sigmas) <= set(merged) and list(merged) == sorted(set(merged), reverse=True)
    assert len(grid) <= len(merged) <= max(len(grid), len(set(grid) | set(sigmas)))


@quick
@given(st.floats(0, 1), shifts)
def test_the_two_forms_of_the_shift_agree(u, shift):
    from wan_distill.maths.sigmas import shift_sigma

    assert float(shift_sigmas(torch.tensor(u, dtype=torch.float64), shift)) == pytest.approx(
        shift_sigma(u, shift)
    )


keys = st.lists(st.one_of(st.integers(), lines), min_size=1, max_size=4)


@quick
@given(keys, keys)
def test_seeds_tell_keys_apart_and_repeat_for_equal_ones(a, b):
    assert keyed_seed(*a) == keyed_seed(*a) and 0 <= keyed_seed(*a) < 2**63
    assume(a != b)
    assert keyed_seed(*a) != keyed_seed(*b)


@quick
@given(st.tuples(lines, st.integers(2, 512), lines), st.tuples(lines, st.integers(2, 512), lines))
def test_an_embeddings_file_depends_on_encoder_length_and_prompt(tmp_path, a, b):
    def file(encoder, length, prompt):
        return PromptBank(
            tmp_path, dict(encoder=encoder, length=length), length, torch.device("cpu")
        ).file(prompt)

    assert file(*a) == file(*a) and file(*a).parent == tmp_path
    assume(a != b)
    assert file(*a) != file(*b)


@quick
@given(st.integers(1, 50), st.integers(0, 5), st.integers())
def test_an_epoch_visits_everything_once(size, epoch, seed):
    visited = [keyed_order(seed, position=epoch * size + i, size=size) for i in range(size)]
    assert sorted(visited) == list(range(size))


@quick
@given(
    st.lists(
        lines | st.sampled_from(["--height", "--width=64", "--sampling_steps", "--", "="]),
        max_size=5,
    )
)
def test_any_flags_are_taken_or_refused_in_one_line(argv):
    try:
        parse_args(argv)
    except UsageError as refused:
        assert str(refused) and "\n" not in str(refused)
    except SystemExit as ended:
        assert ended.code == 0 and ({"-h", "--help"} & set(argv))
