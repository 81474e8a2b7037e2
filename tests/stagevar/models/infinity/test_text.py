"""Prompt features: a tiny T5 made here stands for flan-t5-xl; cached, uncached and batched encodings agree."""

import sys
import warnings

import pytest
import torch

from stagevar.errors import WeightsError
from stagevar.models.hub import HubFile
from stagevar.models.infinity.text import RandomText, T5Text
from stagevar.models.text_encoder import FeatureCache

WORDS = ["a", "red", "blue", "circle", "square", "left", "of", "on", "the", "and", "two"]
PROMPTS = ["a red circle", "two blue square left of the red circle", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-layer T5 encoder with a word tokenizer, saved the way transformers saves models."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGEVAR_CACHE", str(tmp_path / "cache"))


def reference(folder, prompt: str) -> torch.Tensor:
    """One prompt, alone and padded to 512 tokens as the reference does, rows of real tokens only."""
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([prompt], max_length=512, padding="max_length", truncation=True, return_tensors="pt")
    model = T5EncoderModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return hidden[0, : int(batch["attention_mask"].sum())]


def test_features_are_the_references_without_its_padding(folder):
    features = T5Text(folder).encode(PROMPTS)
    assert [tuple(rows.shape) for rows in features] == [(4, 16), (9, 16), (1, 16)]
    for prompt, rows in zip(PROMPTS, features, strict=True):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, reference(folder, prompt), atol=1e-5, rtol=1e-5)


def test_order_and_repeats_do_not_matter(folder):
    a = T5Text(folder).encode(PROMPTS)
    b = T5Text(folder).encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert torch.equal(b[0], a[1]) and torch.equal(b[1], a[0]) and b[2] is b[0]


def test_cached_prompts_load_no_encoder(folder, monkeypatch):
    first = T5Text(folder)
    first.prepare(PROMPTS)
    assert not first.loaded
    second = T5Text(folder)
    monkeypatch.setattr(T5Text, "_load", lambda self: pytest.fail("T5 was loaded although every prompt is cached"))
    assert [rows.shape[0] for rows in second.encode(PROMPTS)] == [4, 9, 1]
    assert not second.loaded


def test_the_encoder_is_freed_and_comes_back(folder):
    text = T5Text(folder)
    text.encode(["a red circle"])
    assert text.loaded
    text.release()
    assert not text.loaded
    assert text.encode(["two red square"])[0].shape == (4, 16)


def test_precision_and_encoder_keep_separate_caches(folder, tmp_path):
    T5Text(folder).prepare(["a red circle"])
    low = T5Text(folder, dtype=torch.bfloat16)
    low.encode(["a red circle"])
    assert low.loaded
    other = FeatureCache("another encoder")
    assert other.get("a red circle") is None


def test_a_damaged_cache_entry_is_encoded_again(folder, tmp_path):
    text = T5Text(folder)
    (wanted,) = text.encode(["a red circle"])
    (entry,) = (tmp_path / "cache" / "text").rglob("*.safetensors")
    entry.write_bytes(b"torn")
    (again,) = T5Text(folder).encode(["a red circle"])
    assert torch.equal(again, wanted)
    assert entry.stat().st_size > 4


def test_long_prompts_are_cut_with_a_warning(folder):
    with pytest.warns(UserWarning, match="prompt of 41 tokens is cut to 32"):
        (rows,) = T5Text(folder, max_length=32).encode(["red " * 40])
    assert rows.shape == (32, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        T5Text(folder, max_length=32).encode(["red " * 31])


def test_provenance_names_revision_or_hashes(folder):
    remote = T5Text(HubFile("google/flan-t5-xl", "", "7d6315df")).provenance()
    assert remote == {"repo": "google/flan-t5-xl", "revision": "7d6315df"}
    local = T5Text(folder).provenance()["sha256"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(local)
    assert all(len(digest) == 64 for digest in local.values())


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json"):
        T5Text(tmp_path)


def test_missing_transformers_is_one_line(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(WeightsError, match="needs transformers: pip install"):
        T5Text(folder).encode(["a red circle"])


def test_an_offline_hub_is_one_line(monkeypatch):
    import transformers

    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(WeightsError, match="cannot load the text encoder google/flan-t5-xl") as caught:
        T5Text(HubFile("google/flan-t5-xl", "")).encode(["a"])
    assert "\n" not in str(caught.value)


def test_random_text_is_deterministic_and_as_long_as_t5s():
    text = RandomText(64)
    a, b, again = text.encode(["a red circle", "a photo of two blue squares on the left", "a red circle"])
    assert a.shape == (5, 64) and b.shape == (13, 64) and a.dtype == torch.float32
    assert torch.equal(a, again) and not torch.equal(a[:5], b[:5])
    assert text.encode([""])[0].shape == (1, 64)
    assert RandomText(8, max_length=16).encode(["word " * 100])[0].shape == (16, 8)
