"""What must hold for any command line, not just for the examples."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from wan_distill.errors import UsageError
from wan_distill.settings.command_line import parse_args

quick = settings(max_examples=60, deadline=None)
lines = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=40)


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
