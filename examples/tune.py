"""Tunes a model from Python, says what was found, and keeps the front as a table.

python examples/tune.py nano 75% outputs/from_python
"""

import sys

from tuner import tune


def main(model: str, budget: str, out: str, **options: object) -> None:
    """Runs or continues the study, and writes front.csv into its directory. Takes the options of the command."""
    result = tune(model, budget, out=out, **options)
    print(result)
    for profile in result.pareto:  # fastest first
        proved = "proved" if profile.verified else "not proved"
        print(f"{profile.latency.median_ms:.1f} ms with {profile.schedule.accelerator}, its limits {proved}")
    trials = result.trials  # a pandas table, as in trials.csv
    trials[trials["on_front"]].to_csv(result.run_dir / "front.csv", index=False)
    if result.profile is not None:
        print(f"deploy {result.run_dir / 'profile.yaml'} as examples/deploy.py does")
    print(f"look at {result.report}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
