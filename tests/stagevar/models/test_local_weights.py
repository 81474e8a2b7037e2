"""Weights on disk as people download them: the pair of files under the families' names, the text encoder beside them."""

import shutil
import warnings

import pytest

from stagevar.errors import WeightsError
from stagevar.models import readiness
from stagevar.models.downloads import model_downloads
from stagevar.models.infinity.text import RandomText, T5Text
from stagevar.models.loading import locate, text_beside
from stagevar.models.registry import find, load_model, resolve
from stagevar.models.request import ModelRequest
from stagevar.models.star.text import ClipText
from tests.fakes import weights as stand_ins

MAKERS = {
    "infinity-tiny": stand_ins.infinity_weights,
    "star-tiny": stand_ins.star_weights,
    "var-tiny": stand_ins.var_weights,
}


@pytest.fixture(scope="module", params=MAKERS)
def downloaded(request, tmp_path_factory):
    return request.param, MAKERS[request.param](tmp_path_factory.mktemp("weights"))


def test_the_official_pair_and_its_text_encoder_load_strictly(downloaded, tmp_path, monkeypatch):
    monkeypatch.setenv("STAGEVAR_CACHE", str(tmp_path))
    name, folder = downloaded
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(name, weights=folder, device="cpu")
    assert not model.random_weights and len(model.provenance["weights"]) == 2
    kinds = {"infinity-tiny": T5Text, "star-tiny": ClipText}
    if name in kinds:
        assert isinstance(model.text, kinds[name])
        first, second = model.text.encode(["a photo of a dog", "a photo of two cats"])
        assert repr(first) != repr(second)
    found = readiness.check_model(ModelRequest(name, weights=str(folder), device="cpu"))
    assert not [text for state, text in found if state == "fail"]
    assert any(text.startswith("text encoder ") for _, text in found) == (name in kinds)


def test_one_file_of_the_pair_may_be_named(downloaded):
    name, folder = downloaded
    both = locate(resolve(name, weights=folder, device="cpu"))[:2]
    assert locate(resolve(name, weights=both[0], device="cpu"))[:2] == both


def test_weights_without_a_text_encoder_say_so(downloaded, tmp_path):
    name, folder = downloaded
    for file in folder.glob("*.pth"):
        shutil.copy(file, tmp_path)
    assert text_beside(resolve(name, weights=tmp_path, device="cpu")) is None
    if name == "infinity-tiny":
        with pytest.warns(UserWarning, match="made-up text features.*text/ with a T5 encoder"):
            assert isinstance(load_model(name, weights=tmp_path, device="cpu").text, RandomText)
        found = readiness.check_model(ModelRequest(name, weights=str(tmp_path), device="cpu"))
        assert ("warn", "no text encoder in text/ next to the weights: made-up features") in found


def test_two_candidates_are_not_guessed_between(downloaded, tmp_path):
    name, folder = downloaded
    transformer, tokenizer, _ = locate(resolve(name, weights=folder, device="cpu"))
    shutil.copy(tokenizer, tmp_path)
    shutil.copy(transformer, tmp_path)
    shutil.copy(transformer, tmp_path / transformer.name.replace(".pth", "_more.pth"))
    with pytest.raises(WeightsError, match=r"several candidate files \(.*_more\.pth.*give the path of one"):
        locate(resolve(name, weights=tmp_path, device="cpu"))


PUBLIC = {
    "infinity-8b": "infinity_vae_d56_f8_14_patchify.pth",
    "star-1.7b": "vae_ch160v4096z32.pth",
    "var-d16": "vae_x.pt",
}


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr("stagevar.models.hub.fetch", lambda file: pytest.fail(f"{file} was asked for"))


@pytest.mark.parametrize("held", ["nothing", "the tokenizer"])
@pytest.mark.parametrize("name", PUBLIC)
def test_a_folder_without_a_transformer_is_refused_with_the_names_that_it_lacks(name, held, tmp_path, no_hub):
    if held == "the tokenizer":
        (tmp_path / PUBLIC[name]).touch()
    official = find(name).weights
    with pytest.raises(WeightsError, match=f"holds no transformer of {name}: none of {official.name}") as caught:
        load_model(name, weights=tmp_path, device="cpu")
    asked = ModelRequest(name, weights=str(tmp_path), device="cpu")
    assert ("fail", str(caught.value)) in readiness.check_model(asked)
    with pytest.raises(WeightsError, match="holds no transformer"):
        readiness.check_local(asked)


def test_an_empty_folder_of_shards_is_refused(tmp_path, no_hub):
    (tmp_path / "infinity_8b_weights").mkdir()
    with pytest.raises(WeightsError, match=r"folder .*infinity_8b_weights holds no transformer"):
        readiness.check_local(ModelRequest("infinity-8b", weights=str(tmp_path), device="cpu"))


def test_a_tokenizer_that_is_not_beside_the_weights_is_a_file_to_download(tmp_path, no_hub):
    (tmp_path / "infinity_2b_reg.pth").touch()
    asked = ModelRequest("infinity-2b", weights=str(tmp_path), device="cpu")
    readiness.check_local(asked)
    (line,) = [text for _, text in readiness.check_model(asked) if text.startswith("tokenizer")]
    assert "infinity_vae_d32reg.pth" in line
    parts = {download.part: download.source for download in model_downloads(resolve(asked))}
    assert parts.keys() == {"tokenizer", "text encoder"} and "infinity_vae_d32reg.pth" in parts["tokenizer"]
    (tmp_path / "infinity_vae_d32reg.pth").touch()
    assert [download.part for download in model_downloads(resolve(asked))] == ["text encoder"]


def test_a_tokenizer_that_is_neither_beside_the_weights_nor_public_is_missing(tmp_path):
    (tmp_path / "infinity_tiny_256x256.pth").touch()
    with pytest.raises(WeightsError, match=r"no tokenizer next to weights .*infinity-tiny has no public one"):
        readiness.check_local(ModelRequest("infinity-tiny", weights=str(tmp_path), device="cpu"))
