"""Small models with random weights in the formats in which the real ones are published, for offline rehearsals.

A folder holds what a user has after downloading: the transformer's and the tokenizer's `.pth` files and the text encoder as
transformers saves it, with a tokenizer that was trained, on GenEval-style prompts, as the real ones were on theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stagevar.models.base import Grid, LoadedModel, NextScaleModel, Sampling
from stagevar.models.registry import load_model
from stagevar.models.var.transformer import guidance_ramp
from stagevar.models.vq.tokenizer import VQVAE
from tests.fakes.metric_models import clip_folder, mask2former_folder, trunk_file
from tuner.metrics.prompt_sets import generate


def infinity_weights(folder: Path) -> Path:
    """infinity-tiny: a plain state dict, a tokenizer under "vae", a T5 encoder in text/."""
    model = load_model("infinity-tiny", weights="random", device="cpu", seed=1)
    torch.save(model.transformer.state_dict(), folder / "infinity_tiny_256x256.pth")
    vae = {key: value for key, value in model.tokenizer.state_dict().items() if "lfq" not in key}
    torch.save({"vae": vae, "ema": vae, "optimizer": {"lr": 1e-4}}, folder / "infinity_vae_d8.pth")
    _t5(folder / "text", width=256)
    return folder


def star_weights(folder: Path) -> Path:
    """star-tiny: the trainer's checkpoint, a plain tokenizer, CLIP's text model as Stable Diffusion keeps it."""
    model = load_model("star-tiny", weights="random", device="cpu", seed=1)
    torch.save({"trainer": {"var_wo_ddp": model.transformer.state_dict()}}, folder / "star_rope_d4_256.pth")
    torch.save(model.tokenizer.state_dict(), folder / "vae_ch32v256z8.pth")
    _clip_text(folder / "text", width=64)
    return folder


def hart_weights(folder: Path) -> Path:
    """hart-tiny as its repository is laid out: the averaged transformer, the tokenizer with its discriminator, and Qwen2."""
    model = load_model("hart-tiny", weights="random", device="cpu", seed=1)
    (folder / "llm").mkdir()
    (folder / "tokenizer").mkdir()
    masks = {"lvl_1L": torch.zeros(1, 711, dtype=torch.long), "attn_bias_for_masking": torch.zeros(1, 1, 7, 7)}
    torch.save({**model.transformer.state_dict(), **masks}, folder / "llm" / "ema_model.bin")
    vae = {f"vae.{key}": value.clone() for key, value in model.tokenizer.state_dict().items()}
    counts = {"vae.quantize.ema_vocab_hit_SV": torch.zeros(10, 256), "disc.main.0.weight": torch.zeros(4, 3, 4, 4)}
    save_file({**vae, **counts}, folder / "tokenizer" / "model.safetensors")
    _qwen(folder / "Qwen2-VL-1.5B-Instruct", width=64)
    return folder


def var_weights(folder: Path) -> Path:
    """var-tiny: two plain state dicts; class indices need no encoder."""
    model = load_model("var-tiny", weights="random", device="cpu", seed=1)
    torch.save(model.transformer.state_dict(), folder / "var_d4.pth")
    torch.save(model.tokenizer.state_dict(), folder / "vae_ch32v256z8.pth")
    return folder


def _texts() -> list[str]:
    return [item["prompt"] for item in generate(200, 0)]


def _t5(folder: Path, width: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    pieces.train_from_iterator(_texts(), trainer)
    pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=pieces.get_vocab_size(), d_model=width, d_kv=32, d_ff=128, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder)


def _clip_text(folder: Path, width: int) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    made = folder / "made"
    made.mkdir(parents=True)
    pieces = ByteLevelBPETokenizer(end_of_word_suffix="</w>", lowercase=True)
    pieces.train_from_iterator(_texts(), vocab_size=700, special_tokens=["<|startoftext|>", "<|endoftext|>", "!</w>"])
    pieces.save_model(str(made))
    tokenizer = CLIPTokenizer(
        str(made / "vocab.json"), str(made / "merges.txt"), pad_token="!</w>", model_max_length=77
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def _qwen(folder: Path, width: int) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(_texts(), vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, pad_token="<|endoftext|>", padding_side="left", model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=pieces.get_vocab_size(), hidden_size=width, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    Qwen2Model(config).save_pretrained(folder)


def text_metrics(folder: Path) -> list[dict]:
    """The default quality of a text-to-image model on tiny folders of an open_clip model and a COCO detector."""
    (folder / "clip").mkdir()
    clip, detector = clip_folder(folder / "clip"), mask2former_folder(folder / "detector")
    return [
        {"name": "geneval", "weight": 1, "max_drop": 0.02, "detector_model": detector, "clip_model": clip},
        {"name": "clip_score", "weight": 1, "max_drop": 0.3, "model": clip},
        {"name": "clip_image_similarity", "weight": 0, "model": clip},
    ]


def image_metrics(folder: Path) -> list[dict]:
    """VAR's default quality on a tiny open_clip model and a random trunk."""
    (folder / "clip").mkdir()
    return [
        {"name": "lpips", "weight": 1, "max_drop": 0.1, "weights": trunk_file(folder, "alex")},
        {"name": "clip_image_similarity", "weight": 1, "max_drop": 0.05, "model": clip_folder(folder / "clip")},
    ]


def tiny_vq_model(transformer: NextScaleModel, text: Any, grids: Sequence[Grid]) -> LoadedModel:
    """A model of the VAR family with a tokenizer of 24 codes of 4 channels, its weights drawn anew from torch's generator."""
    vae = VQVAE(grids, 24, 4, 32)
    for parameter in (*transformer.parameters(), *vae.quantize.parameters()):
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    transformer.eval().set_grids(grids)
    sampling = Sampling(guidance_ramp(2.0, len(grids)), (1.0,) * len(grids))
    device = torch.device("cpu")
    return LoadedModel("tiny", transformer, vae.eval(), text, sampling, grids, (64, 64), device, torch.float32)
