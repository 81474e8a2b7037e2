"""In which order forecasts are worth trying."""

from tuner.proposals.forecast import Forecast, layers


def test_a_front_is_proposed_from_its_ends_inwards_and_the_next_front_after_it():
    first = [Forecast({}, f"a{n}", 0.1 * n, float(n), True) for n in range(1, 6)]
    second = [Forecast({}, f"b{n}", 0.1 * n + 0.05, float(n) - 0.5, True) for n in range(1, 6)]
    keys = [forecast.key for forecast in layers([*second, *first])]
    assert keys == ["a5", "a1", "a3", "a2", "a4", "b5", "b1", "b3", "b2", "b4"]
    assert layers([]) == [] and [f.key for f in layers(first[:1])] == ["a1"]
