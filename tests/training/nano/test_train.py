"""Training resumes where it stopped, publishes what the runtime loads, and learns."""

import numpy as np
import pytest
import torch

from stagevar.errors import WeightsError
from stagevar.models.nano import scenes
from stagevar.models.nano.presets import preset
from training.nano import train
from training.nano.checkpoints import MAX_SHARD_BYTES, load_checkpoint, save_checkpoint
from training.nano.jobs import TransformerJob, sides_of

PARTS = ("tokenizer", "transformer", "clip")


def trainer(part, out, steps=4, **changes):
    recipe = train.Recipe(steps=steps, batch=4, muon_rate=0.02, adam_rate=1e-3, warmup=2, **changes)
    return train.Trainer(train.build_job(part, preset("micro"), out, torch.device("cpu")), recipe, out)


@pytest.fixture
def out(tmp_path):
    trainer("tokenizer", tmp_path).publish()  # the transformer reads it
    return tmp_path


@pytest.mark.parametrize("part", PARTS)
def test_resumed_equals_uninterrupted(part, out):
    whole = trainer(part, out, clip_norm=1.0)
    for _ in range(4):
        whole.advance()
    first = trainer(part, out, clip_norm=1.0)
    first.advance()
    first.advance()
    first.save()
    second = trainer(part, out, clip_norm=1.0)
    second.restore()
    assert second.step == 2
    second.advance()
    second.advance()
    for name, tensor in whole.job.model.state_dict().items():
        assert torch.equal(tensor, second.job.model.state_dict()[name]), name
        assert torch.equal(whole.average[name], second.average[name]), name


def test_command_line_stops_resumes_and_publishes(tmp_path, capsys):
    arguments = ["tokenizer", "--preset", "micro", "--batch", "4", "--device", "cpu", "--out", str(tmp_path)]
    assert train.main([*arguments, "--steps", "3"]) == 0
    assert train.main([*arguments, "--steps", "5", "--resume"]) == 0
    assert "from step 3 of 5" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "tokenizer.checkpoint")[1]["step"] == 5
    assert train.main(["transformer", *arguments[1:], "--steps", "2"]) == 0
    assert {f.name for f in tmp_path.glob("*.safetensors")} == {
        "tokenizer.safetensors", "transformer.safetensors", "text_encoder.safetensors",
    }  # fmt: skip


def test_command_line_refuses_in_one_line(tmp_path, capsys):
    assert train.main(["transformer", "--preset", "micro", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert train.main(["tokenizer", "--steps", "0", "--out", str(tmp_path), "--device", "cpu"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "tokenizer.safetensors" in said[0] and "--steps 0" in said[1]


def test_words_before_and_after_a_relation_stand_on_opposite_sides():
    left, right, above, below = (1 + scenes.RELATIONS.index(r) for r in ("left of", "right of", "above", "below"))
    words = ["a", "photo", "of", "a", "red", "ring", "left", "of", "a", "blue", "star"]
    assert sides_of(words) == [left] * 6 + [0] + [right] * 4
    assert sides_of(["a", "photo", "of", "a", "ring", "below", "a", "star"]) == [below] * 5 + [0] + [above] * 2
    assert sides_of(["a", "photo", "of", "two", "rings"]) == [0] * 5


def test_the_words_of_a_relation_teach_the_text_encoder(out):
    """The only gradient that tells "left of" from "right of" at once: a few steps on it alone beat guessing by far."""
    job = trainer("transformer", out).job
    parameters = [p for n, p in job.model.named_parameters() if n.startswith(("text", "placing"))]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for step in range(60):
        world = scenes.sample(32, np.random.default_rng(step), task_weights=(0, 0, 0, 0, 1, 0, 0))
        ids_BT, _ = job.model["text"].tokenize(world.captions)
        loss = job._placing_loss(job.model["text"](ids_BT)[0], world)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and np.mean(losses[-10:]) < 0.7


def test_a_run_can_start_from_published_weights(out, tmp_path):
    first = trainer("transformer", out)
    first.advance()
    first.publish()
    second = trainer("transformer", out, seed=7)
    second.job.load_published(out)
    second.forget_average()
    for name, tensor in second.job.model.state_dict().items():
        if not name.startswith(("naming", "placing")):  # thrown away after training
            assert torch.equal(tensor.half(), first.average[name].half()), name
            assert torch.equal(second.average[name], tensor)
    other = train.build_job("tokenizer", preset("64px"), out, torch.device("cpu"))
    with pytest.raises(WeightsError, match="does not fit"):
        other.load_published(out)


def test_the_decoder_alone_can_be_trained(out, capsys):
    first = trainer("tokenizer", out)
    first.job.freeze_encoder()
    second = train.Trainer(first.job, first.recipe, out)
    before = {name: tensor.clone() for name, tensor in first.job.model.state_dict().items()}
    second.advance()
    for name, tensor in first.job.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("encode_"), name
    arguments = ["--preset", "micro", "--out", str(out), "--device", "cpu", "--decoder-only"]
    assert train.main(["transformer", *arguments, "--start", str(out)]) == 2
    assert train.main(["tokenizer", *arguments]) == 2
    assert capsys.readouterr().err.count("--decoder-only is for the tokenizer") == 2


def test_a_batch_sees_the_layout_scales_or_a_third_of_it_all():
    for progress, share in ((0.0, 0.1), (0.5, 0.2), (0.9, 0.5)):
        seen = []
        for seed in range(400):
            world, scales = TransformerJob.world(preset("micro"), np.random.default_rng([7, seed]), 12, progress)
            assert (len(world), scales) in ((12, 2), (4, 3))
            seen.append(scales == 3)
        assert abs(np.mean(seen) - share) < 0.07


def test_the_lowpass_is_what_a_partial_sum_approximates():
    """With scales fine enough, the code sum after one lies nearer to that scale's low-pass than to the latent."""
    job = train.build_job("tokenizer", preset("64px"), None, torch.device("cpu"))
    latent = torch.randn(8, 24, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.2
    sums = job.model.partial_sums(latent)
    for scale in (5, 6):
        low = job.lowpass(latent, scale)
        assert (sums[scale] - low).pow(2).mean() < (sums[scale] - latent).pow(2).mean()
    assert torch.equal(job.lowpass(latent, 7), latent)


def test_losses_fall(out):
    for part in ("tokenizer", "transformer"):
        run = trainer(part, out, steps=40)
        losses = [run.advance()[0] for _ in range(25)]
        assert np.mean(losses[-5:]) < np.mean(losses[:5]), part


def test_rate_warms_up_stays_and_falls(out):
    run = trainer("tokenizer", out, steps=100, cooldown=0.5)
    factors = []
    for run.step in (0, 1, 10, 50, 75, 99):
        factors.append(run._factor())
    assert factors == [0.5, 1.0, 1.0, 1.0, 0.5, 0.02]


def test_checkpoint_shards_stay_small_and_survive_a_torn_write(tmp_path):
    tensors = {f"t{i}": torch.full((2**20,), float(i)) for i in range(9)}
    save_checkpoint(tmp_path / "c", tensors, {"step": 1})
    save_checkpoint(tmp_path / "c", tensors, {"step": 2})
    files = list((tmp_path / "c").glob("*.safetensors"))
    assert len(files) == 3
    assert all(f.stat().st_size < MAX_SHARD_BYTES + 2**20 for f in files)
    (tmp_path / "c").rename(tmp_path / "c.old")  # as if killed between the two renames
    found, state = load_checkpoint(tmp_path / "c")
    assert state["step"] == 2
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(WeightsError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_dropped_captions_and_flips_reach_the_loss(out):
    """Without captions dropped or bits flipped the loss of the same batch differs."""
    job = train.build_job("transformer", preset("micro"), out, torch.device("cpu"))

    def loss():
        torch.manual_seed(0)
        return job.loss(np.random.default_rng(1), 16, 0.0)[0].item()

    base = loss()
    assert base == loss()
    job.max_flip = 0.0
    unflipped = loss()
    job.caption_drop = 1.0
    assert len({base, unflipped, loss()}) == 3
