"""What a model needs on a machine, said without loading or fetching."""

import pytest

from stagevar.errors import UsageError
from stagevar.models import memory, readiness, registry
from stagevar.models.memory import MIB
from stagevar.models.request import ModelRequest


def states(findings: list[tuple[str, str]], text: str) -> set[str]:
    return {state for state, line in findings if text in line}


@pytest.fixture(autouse=True)
def plenty(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100 * 2**30)


def test_a_large_model_is_accounted_for_and_its_missing_files_named(monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, path, revision: asked.append(path))
    findings = readiness.check_model(ModelRequest("infinity-8b", device="cpu", dtype="bfloat16"))
    assert states(findings, "KV cache") == {"ok"} and states(findings, "it fits: 102,400 MiB are free") == {"ok"}
    assert states(findings, "infinity_8b_weights/@main will be fetched") == {"warn"}
    assert states(findings, "google/flan-t5-xl") == {"warn"}
    assert "infinity_8b_weights/model.safetensors.index.json" in asked
    assert "infinity_vae_d56_f8_14_patchify.pth" in asked


def test_cached_files_are_recognized(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, path, revision: f"/cache/{path}")
    findings = readiness.check_model(ModelRequest("infinity-2b", device="cpu"))
    assert states(findings, "is in the hub's cache") == {"ok"} and not states(findings, "will be fetched")


def test_what_does_not_fit_fails(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000 * MIB)
    findings = readiness.check_model(ModelRequest("infinity-2b", device="cpu"))
    assert states(findings, "infinity-2b needs about") == {"fail"}


def test_missing_packages_fail(monkeypatch):
    monkeypatch.setattr(readiness.importlib.util, "find_spec", lambda name: None)
    findings = readiness.check_model(ModelRequest("infinity-2b", device="cpu"))
    assert states(findings, "transformers is missing") == states(findings, "huggingface_hub is missing (") == {"fail"}


def test_weights_that_are_not_there_or_not_public(tmp_path):
    assert states(readiness.check_model(ModelRequest("infinity-1b", device="cpu")), "no public weights") == {"fail"}
    findings = readiness.check_model(ModelRequest("infinity-2b", weights=tmp_path / "gone.pth", device="cpu"))
    assert states(findings, "no weights at") == {"fail"}
    (tmp_path / "infinity_2b_reg.pth").touch()
    (tmp_path / "infinity_vae_d32reg.pth").touch()
    findings = readiness.check_model(ModelRequest("infinity-2b", weights=tmp_path, device="cpu"))
    assert states(findings, "infinity_2b_reg.pth") == states(findings, "infinity_vae_d32reg.pth") == {"ok"}


def test_random_weights_and_the_shipped_model_need_no_files():
    findings = readiness.check_model(ModelRequest("infinity-tiny", weights="random", device="cpu"))
    assert states(findings, "nothing to fetch") == {"ok"} and {state for state, _ in findings} == {"ok"}
    assert readiness.check_model(ModelRequest("nano", device="cpu")) == [("ok", "nano ships in the package")]


def test_an_unknown_model_is_a_usage_error():
    with pytest.raises(UsageError, match="did you mean infinity-2b"):
        readiness.check_model(ModelRequest("infinity-2"))


@pytest.mark.parametrize("spec", [s for s in registry.list_models() if s.parts], ids=lambda s: s.name)
def test_every_model_can_be_estimated(spec):
    findings = readiness.check_model(ModelRequest(spec.name, weights="random", device="cpu"))
    peak = next(line for _, line in findings if line.strip().startswith("peak"))
    assert int(peak.split()[1].replace(",", "")) > 600
