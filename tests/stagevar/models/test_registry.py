"""Names to loaded models: the table, its light import, where files are looked for, conversion."""

import gzip
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stagevar.errors import UsageError, WeightsError
from stagevar.models import hub, loading, registry
from stagevar.models.checkpoint import tensor_files
from stagevar.models.convert import convert
from stagevar.models.infinity.config import InfinityConfig
from stagevar.models.infinity.text import RandomText, T5Text
from stagevar.models.infinity.transformer import Infinity
from stagevar.models.registry import find, infinity_settings, list_models, load_model, model_parts, register, resolve
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import exact
from stagevar.schedule.grids import infinity_grids
from tests import DATA


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGEVAR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory) -> Path:
    """infinity-tiny's weights in the official layouts: a plain state dict and a tokenizer file, with made-up names."""
    folder = tmp_path_factory.mktemp("tiny")
    model = load_model("infinity-tiny", weights="random", seed=3)
    torch.save(model.transformer.state_dict(), folder / "transformer.pth")
    torch.save({"vae": model.tokenizer.state_dict()}, folder / "vae.pth")
    return folder


def load_tiny(folder: Path, **options):
    return load_model("infinity-tiny", weights=folder / "transformer.pth", tokenizer=folder / "vae.pth", **options)


# ------------------------------------------------------------------------------------------------ the table


def test_listing_models_imports_no_torch():
    code = (
        "import sys; from stagevar.models.registry import list_models; names = [s.name for s in list_models()];"
        "assert 'infinity-8b' in names and 'nano' in names, names; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("typo", ["infinity8b", "infinty-8b"])
def test_an_unknown_name_gets_the_nearest(typo):
    with pytest.raises(UsageError, match=rf"unknown model '{typo}', did you mean infinity-8b\?"):
        find(typo)


def test_a_name_registers_once():
    register(find("infinity-2b"))  # the same row again is harmless
    row = find("infinity-2b")
    with pytest.raises(ValueError, match="twice"):
        register(registry.ModelSpec(row.name, "other", "a:b", "", ("x",), 1.0, 1.0))


def test_every_row_names_importable_functions_and_a_resolution():
    for spec in list_models():
        assert spec.resolutions and spec.summary, spec.name
        if spec.family == "infinity":
            assert callable(pkgutil.resolve_name(spec.builder)) and callable(pkgutil.resolve_name(spec.parts))


@pytest.mark.parametrize("size", registry.INFINITY_SIZES)
def test_sizes_equal_the_official_key_tables(size):
    tables = json.loads(gzip.decompress((DATA / "infinity_key_shapes.json.gz").read_bytes()))
    latent_dim, patchify = (14, True) if size == "infinity_8b" else (32, False)
    settings = infinity_settings(size, latent_dim, patchify)
    with torch.device("meta"):
        model = Infinity(InfinityConfig(token_bits=latent_dim * (4 if patchify else 1), **settings["transformer"]))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == tables[size]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("infinity-125m", 0.125), ("infinity-1b", 0.941), ("infinity-2b", 2.205), ("infinity-8b", 8.376)],
)
def test_public_models_have_their_parameter_counts(name, billions):
    parts = model_parts(resolve(name, device="cpu"))
    count = sum(p.numel() for p in parts.transformer.module.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "guidance", "temperature", "scales", "pixels"),
    [
        ("infinity-2b", 3.0, 0.5, 13, (1024, 1024)),
        ("infinity-8b", 3.0, 1.0, 13, (1024, 1024)),
        ("infinity-8b-512", 3.0, 1.0, 10, (512, 512)),
        ("infinity-125m", 4.0, 0.5, 7, (256, 256)),
    ],
)
def test_defaults_of_the_released_models(name, guidance, temperature, scales, pixels):
    request = resolve(name, device="cpu")
    parts = model_parts(request)
    sampling = loading.default_sampling(request, len(parts.grids))
    assert parts.pixels == pixels and len(parts.grids) == scales
    assert sampling.guidance == (guidance,) * scales and sampling.temperature == (temperature,) * scales
    assert sampling.top_p == 0.97
    residual = parts.tokenizer.module.residual
    assert residual.token_bits == parts.transformer.module.config.token_bits
    assert residual.patchify == name.startswith("infinity-8b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": "2M"}, "has no resolution '2M'; it has 0.06M"),
        ({"ratio": 0}, "aspect ratio 0"),
        ({"device": "tpu9"}, "unknown device 'tpu9'"),
        ({"device": "cuda:99"}, "'cuda:99' does not exist"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"batch": 0}, "batch 0"),
    ],
)
def test_option_values_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        resolve("infinity-tiny", **{"weights": "random", **options})


def test_a_side_in_pixels_names_a_budget():
    assert resolve("infinity-2b", resolution=512, device="cpu").resolution == "0.25M"
    assert resolve("infinity-8b-512", device="cpu").resolution == "0.25M"


# ------------------------------------------------------------------------------------------------ random weights


def test_random_weights_make_a_whole_model_that_says_so():
    model = load_model("infinity-tiny", weights="random", ratio=1.5, guidance=[3, 2, 1], temperature=0.7)
    assert model.random_weights and model.provenance["random_seed"] == 0 and not model.provenance["weights"]
    assert model.grids == infinity_grids("0.06M", 1.5)[0] and model.pixels == (336, 224)
    assert model.sampling.guidance == (3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert isinstance(model.text, RandomText)
    sampler = Sampler(model)
    steps = exact(len(model.grids)).expand(model.grids, sampler.chunks)
    images = sampler.generate(["a red circle", "two blue squares"], [0, 1], steps, negative=["blurry", "dark"])
    assert images.shape == (2, 336, 224, 3) and images.std() > 1


def test_the_seed_of_random_weights_counts():
    a, b, c = (load_model("infinity-tiny", weights="random", seed=s).transformer.head.weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("name", ["infinity-tiny", "infinity-1b"])
def test_models_without_public_files_say_so(name):
    with pytest.raises(UsageError, match="has no public weights; give --weights PATH, or --weights random"):
        load_model(name, device="cpu")


# ------------------------------------------------------------------------------------------------ files


def test_local_files_load_and_are_recorded(tiny_files):
    model = load_tiny(tiny_files)
    assert not model.random_weights
    assert model.provenance["weights"] == {
        part: hub.sha256_file(tiny_files / name)
        for part, name in (("transformer", "transformer.pth"), ("tokenizer", "vae.pth"))
    }
    assert model.provenance["load"] == {"resolution": "0.06M", "ratio": 1.0}
    again = load_model("infinity-tiny", weights="random", seed=3)
    assert torch.equal(model.transformer.head.weight, again.transformer.head.weight)
    assert torch.equal(model.tokenizer.decoder.conv_out.conv.weight, again.tokenizer.decoder.conv_out.conv.weight)


def test_the_tokenizer_is_found_beside_the_weights(tmp_path):
    spec = find("infinity-2b")
    (tmp_path / "infinity_2b_reg.pth").touch()
    (tmp_path / "infinity_vae_d32_reg.pth").touch()
    for given in (tmp_path, tmp_path / "infinity_2b_reg.pth"):
        found = loading.locate(resolve(spec.name, weights=given, device="cpu"))
        assert found == (tmp_path / "infinity_2b_reg.pth", tmp_path / "infinity_vae_d32_reg.pth", {})
    shards = tmp_path / "infinity_8b_weights"
    shards.mkdir()
    (shards / "model.safetensors.index.json").touch()
    (tmp_path / "infinity_vae_d56_f8_14_patchify.pth").touch()
    for given in (tmp_path, shards):
        found = loading.locate(resolve("infinity-8b", weights=given, device="cpu"))
        assert found == (shards, tmp_path / "infinity_vae_d56_f8_14_patchify.pth", {})


def test_public_files_are_fetched_by_their_official_names(tmp_path, monkeypatch):
    asked = []

    def fetch(file):
        asked.append((file.repo, file.path))
        return tmp_path / file.name, "c0ffee"

    monkeypatch.setattr(hub, "fetch", fetch)
    _, _, sources = loading.locate(resolve("infinity-8b", device="cpu"))
    assert asked == [
        ("FoundationVision/Infinity", "infinity_8b_weights/"),
        ("FoundationVision/Infinity", "infinity_vae_d56_f8_14_patchify.pth"),
    ]
    assert sources["weights"] == "FoundationVision/Infinity/infinity_8b_weights/@c0ffee"
    asked.clear()
    loading.locate(resolve("infinity-2b", device="cpu"))
    assert [path for _, path in asked] == ["infinity_2b_reg.pth", "infinity_vae_d32reg.pth"]


def test_an_offline_hub_ends_with_exit_code_2_and_one_line(tmp_path):
    """The whole way through the command line, with the hub switched off and an empty cache."""
    call = "main(['generate', 'a cat', '--model', 'infinity-125m'])"
    code = f"import sys; from stagevar.cli.command import main; sys.exit({call})"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert run.returncode == 2, run.stderr
    assert "cannot fetch FoundationVision/Infinity/infinity_125M_256x256.pth" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_the_text_encoder_beside_the_weights_is_used(tiny_files, tmp_path):
    (tmp_path / "flan-t5-xl").mkdir()
    (tmp_path / "flan-t5-xl" / "config.json").write_text("{}")
    (tmp_path / "transformer.pth").symlink_to(tiny_files / "transformer.pth")
    request = resolve("infinity-2b", weights=tmp_path / "transformer.pth", device="cpu")
    from stagevar.models.infinity import loader as infinity_loader

    text = infinity_loader.text_encoder(request, model_parts(request))
    assert isinstance(text, T5Text) and text.source == tmp_path / "flan-t5-xl"
    public = resolve("infinity-2b", device="cpu")
    text = infinity_loader.text_encoder(public, model_parts(public))
    assert isinstance(text, T5Text) and text.source == registry.FLAN_T5_XL and not text.loaded


def test_another_models_tokenizer_is_refused(tiny_files):
    with pytest.raises(WeightsError, match=r"infinity-tiny's tokenizer: .*missing"):
        load_model(
            "infinity-tiny",
            weights=tiny_files / "transformer.pth",
            tokenizer=tiny_files / "transformer.pth",
            device="cpu",
        )


# ------------------------------------------------------------------------------------------------ converting


def test_converted_weights_load_the_same(tiny_files, tmp_path):
    out = tmp_path / "converted"
    files = convert("infinity-tiny", out, weights=tiny_files / "transformer.pth", tokenizer=tiny_files / "vae.pth")
    assert {path.name for path in files} == {"transformer.safetensors", "tokenizer.safetensors", "stagevar.json"}
    plain, converted = load_tiny(tiny_files), load_model("infinity-tiny", weights=out)
    for part in ("transformer", "tokenizer"):
        a, b = getattr(plain, part).state_dict(), getattr(converted, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert set(converted.provenance["weights"]) == {"transformer", "tokenizer"}


def test_conversion_to_bfloat16_shrinks_the_blocks_only(tiny_files, tmp_path):
    out = tmp_path / "half"
    convert(
        "infinity-tiny",
        out,
        weights=tiny_files / "transformer.pth",
        tokenizer=tiny_files / "vae.pth",
        dtype="bfloat16",
        shard_bytes=500_000,
    )
    assert (out / "transformer.safetensors.index.json").is_file()
    assert not (tmp_path / "half.partial").exists()
    file = tensor_files.open_weights(out / "transformer.safetensors.index.json")
    cpu = torch.device("cpu")
    assert file.read("block_chunks.0.module.0.ffn.fc1.weight", cpu).dtype == torch.bfloat16
    assert file.read("word_embed.weight", cpu).dtype == torch.float32
    assert load_model("infinity-tiny", weights=out, device="cpu").transformer.head.weight.dtype == torch.float32


def test_conversion_refuses_and_leaves_nothing_behind(tiny_files, tmp_path):
    with pytest.raises(UsageError, match="already exists"):
        convert("infinity-tiny", tiny_files, weights=tiny_files)
    with pytest.raises(UsageError, match="nothing to convert"):
        convert("infinity-tiny", tmp_path / "x", weights="random")
    with pytest.raises(WeightsError, match="do not fit"):
        convert(
            "infinity-tiny",
            tmp_path / "x",
            weights=tiny_files / "transformer.pth",
            tokenizer=tiny_files / "transformer.pth",
        )
    assert not list(tmp_path.glob("x*"))


def test_a_folder_converted_for_another_model_is_refused(tmp_path):
    (tmp_path / loading.MARK).write_text('{"model": "infinity-2b"}')
    with pytest.raises(WeightsError, match="holds infinity-2b, not infinity-8b"):
        load_model("infinity-8b", weights=tmp_path, device="cpu")


def test_the_command_line_converts_and_loads_what_it_wrote(tiny_files, tmp_path, capsys):
    from stagevar.cli.command import build_parser, main
    from stagevar.cli.model_options import model_request

    out = tmp_path / "converted"
    files = ["--weights", str(tiny_files / "transformer.pth"), "--tokenizer", str(tiny_files / "vae.pth")]
    assert main(["convert", "--model", "infinity-tiny", *files, "-o", str(out)]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == sorted(p.name for p in out.iterdir())
    assert main(["convert", "--model", "infinity-tiny", *files, "-o", str(out)]) == 2
    options = ["--resolution", "512", "--ratio", "0.7", "--weights", str(out)]
    model = load_model(
        model_request(build_parser().parse_args(["generate", "a cat", "--model", "infinity-tiny", *options]))
    )
    assert model.grids == infinity_grids("0.25M", 0.666)[0]
