"""How often a limit is proved: certain cases, and a table."""

import numpy as np

from benchmarks.proof_chance import chance, judged, main


def test_identical_images_are_proved_as_soon_as_prompts_allow_and_ruined_ones_given_up():
    assert judged(np.zeros(1024), 0.02, 16) == (True, 512), "256 cannot prove 2 % with so small an error"
    proved, used = judged(np.full(1024, -1.0), 0.02, 16)
    assert not proved and used < 256


def test_more_prompts_prove_a_harmless_schedule_more_often_and_a_harmful_one_rarely():
    few, _ = chance(256, 0.05, 0.0, 0.02, studies=30)
    many, used = chance(2048, 0.05, 0.0, 0.02, studies=30)
    assert few < many > 0.8 and 256 <= used <= 2048
    assert chance(512, 0.05, 0.03, 0.02, studies=30)[0] <= 0.1


def test_the_table_has_a_row_per_case(capsys):
    assert main(["--heldout", "64", "--studies", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 5
