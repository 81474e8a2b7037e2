"""The text encoder knows every word of every scene, and says so once when it does not."""

import pytest
import torch

from stagevar.models.nano import scenes
from stagevar.models.nano.presets import preset
from stagevar.models.nano.text import END, MOST_NAMED, PAD, UNKNOWN, NanoTextEncoder


def test_every_caption_is_in_the_vocabulary():
    encoder = NanoTextEncoder(preset("micro"))
    texts = [m["prompt"] for tag in scenes.TASKS for c in (False, True) for m in scenes.all_captions(tag, c)]
    ids, lengths = encoder.tokenize(texts)
    assert not (ids == UNKNOWN).any()
    assert (ids.gather(1, lengths[:, None] - 1) == END).all()
    assert int(lengths.max()) == scenes.LONGEST_CAPTION + 1 <= encoder.maxlen


def test_unknown_words_are_named_once():
    encoder = NanoTextEncoder(preset("micro"))
    with pytest.warns(UserWarning) as warned:
        ids, _ = encoder.tokenize(["a photo of a dragon", "a dragon"])
    assert ids[0, 4] == UNKNOWN
    assert [str(one.message) for one in warned] == ["nano does not know the word 'dragon'; it reads it as <unk>"]


def test_unknown_words_are_shortened_and_only_so_many_are_named_and_kept():
    encoder = NanoTextEncoder(preset("micro"))
    with pytest.warns(UserWarning) as warned:
        encoder.tokenize(["x" * 4000, *(f"word{number}" for number in range(MOST_NAMED + 20))])
    lines = [str(one.message) for one in warned]
    assert len(lines) == MOST_NAMED and max(map(len, lines)) < 200
    assert lines[-1].endswith("; further unknown words are not named") and not lines[-2].endswith("named")


def test_padding_changes_nothing():
    torch.manual_seed(0)
    encoder = NanoTextEncoder(preset("micro")).eval()
    short, long = "a photo of a ring", "a photo of a red ring left of a blue star"
    alone = encoder.encode([short])[0]
    beside = encoder.encode([long, short])[1]
    assert alone.shape == (6, 128)
    assert torch.allclose(alone, beside, atol=1e-5)


def test_long_prompts_are_cut_and_end():
    encoder = NanoTextEncoder(preset("micro"))
    ids, lengths = encoder.tokenize(["ring " * 100, ""])
    assert lengths.tolist() == [encoder.maxlen, 1]
    assert ids[0, -1] == END and ids[1, 0] == END and (ids[1, 1:] == PAD).all()
