"""What people prefer, by models trained on their choices: ImageReward and PickScore, loaded into transformers' classes.

The packages that published them need a transformers version from 2023; their weights do not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from stagevar.errors import WeightsError
from stagevar.models.hub import sha256_file
from tuner.metrics.base import Metric, Prompt, prompt_text
from tuner.metrics.downloads import IMAGE_REWARD, IMAGE_REWARD_TOKENIZER, PICKSCORE, PICKSCORE_PROCESSOR
from tuner.metrics.memoized_features import MemoizedFeatures
from tuner.metrics.model_files import from_pretrained, hub_file, pretrained_model, read_state_dict

#: CLIP's mean and standard deviation of colors; both models were trained with them.
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def cut_prompts(prompts: Sequence[Prompt], tokenizer: Any, length: int, what: str) -> list[str]:
    """A sentence on the prompts that a text tower of `length` tokens truncates, if any."""
    texts = list(dict.fromkeys(prompt_text(prompt) for prompt in prompts))
    cut = [text for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True) if len(ids) > length]
    if not cut:
        return []
    return [
        f"{len(cut)} of {len(texts)} prompts are longer than the {length} tokens that {what} reads; the rest of each is "
        f"ignored. The first: {cut[0][:60]!r}"
    ]


class ImageReward(Metric):
    """ImageReward 1.0, higher is better: how much more people like the image for its prompt than the average of its training.

    In standard deviations of its training set, so 0 is average; about -2.5 to 2. A BLIP of ViT-L/16 at 224 pixels whose text
    tower attends to the image, and five linear layers on its class token. Sizes follow from the weights.

    Args:
        weights: the published checkpoint (ImageReward.pt, or its tensors as safetensors): a path, by default the hub's.
        tokenizer: BERT's uncased one: a folder or a hub name.

    Source: Xu et al. 2023 (ImageReward), github zai-org/ImageReward; instead of using its package (2023-07), the weights are
    loaded into transformers' BLIP. A prompt is truncated to 35 tokens, as in the package.
    """

    name: ClassVar[str] = "image_reward"
    needs_prompt: ClassVar[bool] = True
    length = 35
    #: Mean and standard deviation of the scores on its training set.
    mean, deviation = 0.16717362830052426, 1.0333394966054072

    def __init__(
        self,
        *,
        device: str = "cpu",
        weights: str = f"hub:{IMAGE_REWARD}",
        tokenizer: str = IMAGE_REWARD_TOKENIZER,
        batch_size: int = 16,
    ) -> None:
        from transformers import BertTokenizer

        self.device, self.batch_size, self.source = device, batch_size, weights
        self.path = path = hub_file(weights, "ImageReward")
        state = {key.removeprefix("module."): value.float() for key, value in read_state_dict(path).items()}
        self.tokenizer = from_pretrained(BertTokenizer, tokenizer, "tokenizer of ImageReward", option="tokenizer")
        with torch.device("meta"):
            vision, text, head = _blip(state, path)
        for module, part in ((vision, _vision_state(state)), (text, _text_state(state)), (head, _head_state(state))):
            _fill(module, part, path)
        self.side = int(vision.config.image_size)
        self.vision, self.text, self.head = (
            part.eval().requires_grad_(False).to(device) for part in (vision, text, head)
        )

    @torch.inference_mode()
    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        values = []
        for start in range(0, len(images_uint8_BHW3), self.batch_size):
            part = slice(start, start + self.batch_size)
            pixels_B3HW = torch.stack([self._pixels(image) for image in images_uint8_BHW3[part]]).to(self.device)
            image_BND = self.vision(pixel_values=pixels_B3HW).last_hidden_state
            tokens = self.tokenizer(
                [prompt_text(prompt) for prompt in prompts[part]],
                padding="max_length",
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            ).to(self.device)
            class_token_BD = self.text(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                encoder_hidden_states=image_BND,
                encoder_attention_mask=torch.ones(image_BND.shape[:2], dtype=torch.long, device=self.device),
            ).last_hidden_state[:, 0]
            values.append(((self.head(class_token_BD)[:, 0] - self.mean) / self.deviation).cpu())
        return torch.cat(values).numpy()

    def _pixels(self, image_uint8_HW3: np.ndarray) -> torch.Tensor:
        """The middle square (3, S, S), its shorter side resized to the vision tower's."""
        from torchvision.transforms import functional

        picture = functional.resize(
            Image.fromarray(image_uint8_HW3), self.side, interpolation=functional.InterpolationMode.BICUBIC
        )
        square = functional.center_crop(picture, self.side)
        return functional.normalize(functional.to_tensor(square), _MEAN, _DEVIATION)

    def remarks(self, prompts: Sequence[Prompt]) -> list[str]:
        return cut_prompts(prompts, self.tokenizer, self.length, "ImageReward's text tower")

    def describe(self) -> dict[str, object]:
        return super().describe() | {"weights": self.source, "weights_sha256": sha256_file(self.path)}


def _blip(state: Mapping[str, torch.Tensor], path: str) -> tuple[Any, Any, nn.Module]:
    """Vision tower, text tower and head in a checkpoint's sizes; attention heads have 64 channels, as published.

    Raises WeightsError if a tensor that determines a size is missing.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    try:
        width, _, patch, _ = state["blip.visual_encoder.patch_embed.proj.weight"].shape
        tokens = state["blip.visual_encoder.pos_embed"].shape[1] - 1
        vocabulary, text_width = state["blip.text_encoder.embeddings.word_embeddings.weight"].shape
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=state["blip.visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_count(state, "blip.visual_encoder.blocks."),
            num_attention_heads=width // 64,
            image_size=patch * round(tokens**0.5),
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=state["blip.text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_count(state, "blip.text_encoder.encoder.layer."),
            num_attention_heads=text_width // 64,
            max_position_embeddings=state["blip.text_encoder.embeddings.position_embeddings.weight"].shape[0],
            bos_token_id=None,
            sep_token_id=None,
        )
        shapes = [state[f"mlp.layers.{index}.weight"].shape for index in _head_layers(state)]
    except KeyError as error:
        raise WeightsError(f"{path} is not a checkpoint of ImageReward: it lacks {error.args[0]}") from None
    head = nn.Sequential(*(nn.Linear(columns, rows) for rows, columns in shapes))
    return BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), head


def _count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).partition(".")[0] for key in state if key.startswith(prefix)})


def _head_layers(state: Mapping[str, torch.Tensor]) -> list[int]:
    """The numbers of the head's linear layers; between them are only dropouts, which are inactive here."""
    return sorted(int(key.split(".")[2]) for key in state if key.startswith("mlp.layers.") and key.endswith(".weight"))


def _vision_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A vision transformer's tensors, renamed from timm's names to those of transformers' BLIP."""
    names = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj.": "embeddings.patch_embedding.",
        "blocks.": "encoder.layers.",
        "norm.": "post_layernorm.",
    }
    inside = {
        "norm1.": "layer_norm1.",
        "norm2.": "layer_norm2.",
        "attn.qkv.": "self_attn.qkv.",
        "attn.proj.": "self_attn.projection.",
    }
    found = {}
    for key, value in state.items():
        if not key.startswith("blip.visual_encoder."):
            continue
        key = key.removeprefix("blip.visual_encoder.")
        old = next((old for old in names if key.startswith(old)), "")
        key = names.get(old, "") + key.removeprefix(old)
        if old == "blocks.":
            for theirs, ours in inside.items():
                key = key.replace(theirs, ours)
        found[key] = value
    return found


def _text_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text tower's tensors: BERT's names are transformers' own, and position indices are generated."""
    prefix = "blip.text_encoder."
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith("position_ids")
    }


def _head_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        f"{place}.{part}": state[f"mlp.layers.{index}.{part}"]
        for place, index in enumerate(_head_layers(state))
        for part in ("weight", "bias")
        if f"mlp.layers.{index}.{part}" in state
    }


def _fill(module: nn.Module, state: dict[str, torch.Tensor], path: str) -> None:
    """Loads strictly into a module on the meta device; its buffers, which checkpoints lack, are created here."""
    module.to_empty(device="cpu")
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        line = (str(error).splitlines()[1:] or [str(error)])[0].strip()
        raise WeightsError(f"{path} does not fit ImageReward's {type(module).__name__}: {line:.150}") from None


class PickScore(Metric):
    """PickScore 1, higher is better: scaled cosine of image and prompt in a CLIP ViT-H/14 trained on users' picks.

    About 17 to 24; a difference d means that people pick the better image with probability 1 / (1 + exp(-d)).

    Args:
        model: a transformers CLIP: a folder or a hub name.
        processor: its image processor and tokenizer; by default those beside a local model, else those its authors name.

    Source: Kirstain et al. 2023 (Pick-a-Pic), github yuvalkirstain/PickScore; we run fp32 instead of half precision.
    """

    name: ClassVar[str] = "pickscore"
    needs_prompt: ClassVar[bool] = True

    def __init__(
        self, *, device: str = "cpu", model: str = PICKSCORE, processor: str | None = None, batch_size: int = 16
    ) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.device, self.batch_size, self.source = device, batch_size, model
        if processor is None:
            processor = (
                model if os.path.isfile(os.path.join(model, "preprocessor_config.json")) else PICKSCORE_PROCESSOR
            )
        self.images = from_pretrained(AutoImageProcessor, processor, "processor of PickScore", option="processor")
        self.tokenizer = from_pretrained(AutoTokenizer, processor, "tokenizer of PickScore", option="processor")
        self.model = pretrained_model(CLIPModel, model, "PickScore", device=device)
        self.scale = float(self.model.logit_scale.exp())
        self.length = int(self.model.config.text_config.max_position_embeddings)
        self.known_text_features = MemoizedFeatures(self.text_features)

    @torch.inference_mode()
    def image_features(self, images_uint8_BHW3: np.ndarray) -> torch.Tensor:
        """Unit features (B, D) on the CPU."""
        parts = []
        for start in range(0, len(images_uint8_BHW3), self.batch_size):
            inputs = self.images(images=list(images_uint8_BHW3[start : start + self.batch_size]), return_tensors="pt")
            pooled_BD = self.model.vision_model(pixel_values=inputs["pixel_values"].to(self.device)).pooler_output
            parts.append(self.model.visual_projection(pooled_BD).cpu())
        return nn.functional.normalize(torch.cat(parts), dim=1)

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit features (B, D) on the CPU; texts are truncated to the text tower's length."""
        parts = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.tokenizer(
                list(texts[start : start + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            ).to(self.device)
            pooled_BD = self.model.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            parts.append(self.model.text_projection(pooled_BD).cpu())
        return nn.functional.normalize(torch.cat(parts), dim=1)

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        image_BD = self.image_features(images_uint8_BHW3)
        text_BD = self.known_text_features([prompt_text(prompt) for prompt in prompts])
        return (self.scale * (image_BD * text_BD).sum(1)).numpy()

    def remarks(self, prompts: Sequence[Prompt]) -> list[str]:
        return cut_prompts(prompts, self.tokenizer, self.length, "PickScore's text tower")

    def describe(self) -> dict[str, object]:
        return super().describe() | {"model": self.source}
