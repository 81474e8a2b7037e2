"""Budget strings: what is accepted means what it says, everything else is one line of UsageError."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagevar.errors import UsageError
from tuner.config.limits import parse_budget, parse_share, parse_time


@pytest.mark.parametrize(
    ("text", "ms"),
    [("2s", 2000.0), ("800ms", 800.0), (" 1.5 s ", 1500.0), (".5s", 500.0), ("60%", 120.0), ("100%", 200.0)],
)
def test_budget_of_a_200_ms_model(text, ms):
    assert parse_budget(text).resolve(200.0) == pytest.approx(ms)


@pytest.mark.parametrize(
    "text",
    ["", "2", "s", "-1s", "0s", "0%", "nan%", "infs", "1e3ms", "2 m", "60 percent", "1001%", "2h", "²s", "60%%", "٣s"],
)
def test_bad_budgets_are_named(text):
    with pytest.raises(UsageError) as caught:
        parse_budget(text)
    assert "\n" not in str(caught.value) and "budget" in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_a_budget_or_a_usage_error(text):
    try:
        budget = parse_budget(text)
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 200
    else:
        assert budget.resolve(50.0) > 0


@given(st.floats(0.01, 999), st.sampled_from(["ms", "s", "%"]))
def test_a_budget_reads_back_from_its_own_text(number, unit):
    budget = parse_budget(f"{number:.4f}{unit}")
    assert parse_budget(budget.text) == budget
    assert budget.resolve(100.0) == pytest.approx(float(f"{number:.4f}") * {"ms": 1, "s": 1000, "%": 1}[unit])


@given(st.integers(0, 9), st.integers(0, 59), st.integers(0, 59))
def test_times_add_up(hours, minutes, seconds):
    text = f"{hours}h{minutes}m{seconds}s"
    total = 3600 * hours + 60 * minutes + seconds
    if total:
        assert parse_time(text) == total
    else:
        with pytest.raises(UsageError):
            parse_time(text)


@pytest.mark.parametrize(("text", "seconds"), [("10m", 600), ("90s", 90), ("1h30m", 5400), ("2min", 120)])
def test_times(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-3m", "10m5", "1d"])
def test_bad_times(text):
    with pytest.raises(UsageError):
        parse_time(text)


@pytest.mark.parametrize(("text", "share"), [("3%", 0.03), ("0.03", 0.03), ("0", 0.0), ("100%", 1.0)])
def test_shares(text, share):
    assert parse_share(text, "max-drop") == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "3", "-1%", "101%", "x"])
def test_bad_shares_name_what_they_are(text):
    with pytest.raises(UsageError, match="max-drop"):
        parse_share(text, "max-drop")
