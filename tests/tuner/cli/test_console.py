"""What a study prints at its end."""

import shutil

from tests import frozen
from tuner.cli.command import main


def test_the_last_lines_say_what_a_latency_covers(tmp_path, capsys):
    shutil.copy(frozen.RUN / "study.json", tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert (
        "\nlatency covers   text encoding, all scales and decoding of one image (batch 1)\n" in capsys.readouterr().out
    )
