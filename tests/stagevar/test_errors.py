"""What one line says of an error."""

import pytest

from stagevar.errors import first_line, reason_of


@pytest.mark.parametrize(("message", "line", "reason"), [
    ("no space\nleft", "ValueError: no space", "no space"),
    ("  \n ", "ValueError: ", "ValueError"),
    ("x" * 400, "ValueError: " + "x" * 188, "x" * 160),
])  # fmt: skip
def test_one_line_with_and_without_the_type(message, line, reason):
    assert first_line(ValueError(message)) == line
    assert reason_of(ValueError(message)) == reason
    assert reason_of(ValueError(message), at_most=3) == reason[:3]
