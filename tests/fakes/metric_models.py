"""Small models with random weights, saved in the layouts that the real loaders read. Their scores mean nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tuner.metrics.prompt_sets import COCO_CLASSES

CLIP_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def clip_folder(folder: Path) -> str:
    """An open_clip `local-dir:` model."""
    import open_clip
    from safetensors.torch import save_file

    preprocess = {"size": 32, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**{key: CLIP_CONFIG[key] for key in ("embed_dim", "vision_cfg", "text_cfg")})
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return f"local-dir:{folder}"


class Lookup(nn.Module):
    """Features by number: image i, whose first two pixels spell i, has row i of a given table."""

    def __init__(self, table_ND: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor(table_ND, dtype=torch.float64))
        self.num_features = table_ND.shape[1]

    def forward(self, images_uint8_B3HW: torch.Tensor) -> torch.Tensor:
        number_B = images_uint8_B3HW[:, 0, 0, 0].long() + 256 * images_uint8_B3HW[:, 0, 0, 1].long()
        return self.table[number_B]


def numbered_images(start: int, count: int) -> np.ndarray:
    """uint8 (count, 4, 4, 3) images for `Lookup`, numbers start..start + count - 1."""
    images = np.zeros((count, 4, 4, 3), dtype=np.uint8)
    numbers = np.arange(start, start + count)
    images[:, 0, 0] = (numbers % 256)[:, None]
    images[:, 0, 1] = (numbers // 256)[:, None]
    return images


def exact_gaussian(rng: np.random.Generator, count: int, mean_D: np.ndarray, covariance_DD: np.ndarray) -> np.ndarray:
    """A sample (count, D) whose mean and (unbiased) covariance are exactly these."""
    noise_ND = rng.standard_normal((count, len(mean_D)))
    noise_ND -= noise_ND.mean(0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(noise_ND.T))))
    return noise_ND @ whiten.T @ np.linalg.cholesky(covariance_DD).T + mean_D


COCO_LABELS = {
    index: {"computer mouse": "mouse", "tv remote": "remote", "couch": "sofa"}.get(name, name)
    for index, name in enumerate(COCO_CLASSES)
}


def mask2former_folder(folder: Path) -> str:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
        num_queries=5,
        id2label=COCO_LABELS,
        label2id={name: index for index, name in COCO_LABELS.items()},
        num_labels=80,
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def rtdetr_folder(folder: Path, labels: dict[int, str] | None = None) -> str:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig

    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    labels = labels or COCO_LABELS
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        feat_strides=[8, 16, 32],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=6,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_denoising=0,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        num_labels=len(labels),
        eval_size=None,
    )
    RTDetrForObjectDetection(config).save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def clip_tokenizer(folder: Path) -> object:
    """A CLIP tokenizer over single characters."""
    from transformers import CLIPTokenizer

    words = [chr(code) for code in range(33, 127)]
    vocabulary = {
        word: index
        for index, word in enumerate([*words, *(word + "</w>" for word in words), "<|startoftext|>", "<|endoftext|>"])
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def owlv2_folder(folder: Path) -> str:
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    torch.manual_seed(0)
    config = Owlv2Config(
        text_config={
            "vocab_size": 200,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 188,
            "eos_token_id": 189,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
        },
        projection_dim=16,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    image_processor = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    Owlv2Processor(image_processor, clip_tokenizer(folder)).save_pretrained(folder)
    return str(folder)


def dino_folder(folder: Path) -> str:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def vilt_folder(folder: Path) -> str:
    """A ViLT question answerer that says "no" or "yes"."""
    from transformers import BertTokenizerFast, ViltConfig, ViltForQuestionAnswering, ViltImageProcessor, ViltProcessor

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "there", "a", "cat", "dog", "?"]
    (folder / "vocab.txt").write_text("\n".join(words))
    config = ViltConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
    )
    ViltForQuestionAnswering(config).save_pretrained(folder)
    ViltProcessor(
        ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=16), BertTokenizerFast(str(folder / "vocab.txt"))
    ).save_pretrained(folder)
    return str(folder)


def blip_folder(folder: Path) -> str:
    from transformers import BertTokenizerFast, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "yes", "no", "is", "there", "a", "?"]
    (folder / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config=small
        | {
            "vocab_size": len(words),
            "encoder_hidden_size": 16,
            "bos_token_id": 5,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
            "max_position_embeddings": 32,
        },
        vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    BlipForQuestionAnswering(config).save_pretrained(folder)
    BlipProcessor(
        BlipImageProcessor(size={"height": 32, "width": 32}), BertTokenizerFast(str(folder / "vocab.txt"))
    ).save_pretrained(folder)
    return str(folder)


def bert_folder(folder: Path) -> str:
    """BERT's tokenizer over a few words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "dog", "cat", "two", "red", "##s", "x"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return str(folder)


def image_reward_state() -> dict[str, torch.Tensor]:
    """Random tensors under the names of ImageReward.pt: two blocks, one text layer, an image of 32 pixels."""
    generator = torch.Generator().manual_seed(0)
    width, text_width, hidden = 128, 64, 48
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, width),
        "visual_encoder.pos_embed": (1, 5, width),
        "visual_encoder.patch_embed.proj.weight": (width, 3, 16, 16),
        "text_encoder.embeddings.word_embeddings.weight": (16, text_width),
        "text_encoder.embeddings.position_embeddings.weight": (40, text_width),
        "vision_proj.weight": (8, width),
    }
    linear = {"vision_proj": (8, width), "visual_encoder.patch_embed.proj": (width,)}
    norms = {"visual_encoder.norm": width, "text_encoder.embeddings.LayerNorm": text_width}
    for block in ("visual_encoder.blocks.0.", "visual_encoder.blocks.1."):
        norms |= {block + "norm1": width, block + "norm2": width}
        linear |= {block + "attn.qkv": (3 * width, width), block + "attn.proj": (width, width)}
        linear |= {block + "mlp.fc1": (hidden, width), block + "mlp.fc2": (width, hidden)}
    layer = "text_encoder.encoder.layer.0."
    for kind, source in (("attention", text_width), ("crossattention", width)):
        linear |= {f"{layer}{kind}.self.query": (text_width, text_width)}
        linear |= {f"{layer}{kind}.self.{name}": (text_width, source) for name in ("key", "value")}
        linear |= {f"{layer}{kind}.output.dense": (text_width, text_width)}
        norms |= {f"{layer}{kind}.output.LayerNorm": text_width}
    linear |= {layer + "intermediate.dense": (hidden, text_width), layer + "output.dense": (text_width, hidden)}
    norms |= {layer + "output.LayerNorm": text_width}
    shapes |= {name + ".weight": shape for name, shape in linear.items() if len(shape) == 2}
    shapes |= {name + ".bias": shape[:1] for name, shape in linear.items()}
    shapes |= {f"{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}
    shapes = {"blip." + name: shape for name, shape in shapes.items()}
    for index, (rows, columns) in {0: (24, text_width), 2: (12, 24), 4: (8, 12), 6: (4, 8), 7: (1, 4)}.items():
        shapes |= {f"mlp.layers.{index}.weight": (rows, columns), f"mlp.layers.{index}.bias": (rows,)}
    state = {
        name: torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        + ("norm" in name.lower())
        for name, shape in shapes.items()
    }
    return state | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


def image_reward_options(folder: Path) -> dict[str, str]:
    """ImageReward.pt and its tokenizer."""
    torch.save(image_reward_state(), folder / "ImageReward.pt")
    return {"weights": str(folder / "ImageReward.pt"), "tokenizer": bert_folder(folder)}


def pickscore_folder(folder: Path) -> str:
    """A transformers CLIP with its processor beside it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower
        | {"vocab_size": 190, "max_position_embeddings": 40, "bos_token_id": 188, "eos_token_id": 189},
        vision_config=tower | {"image_size": 32, "patch_size": 16},
        projection_dim=16,
        logit_scale_init_value=4.6,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    clip_tokenizer(folder).save_pretrained(folder)
    return str(folder)


def trunk_file(folder: Path, net: str) -> str:
    """torchvision's state dict of a network's `features`, random."""
    import torchvision
    from safetensors.torch import save_file

    torch.manual_seed(0)
    with torch.device("meta"):
        features = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[net](weights=None).features
    state = {
        f"features.{key}": torch.randn(value.shape) * (2 / max(1, value[0].numel())) ** 0.5
        for key, value in features.state_dict().items()
    }
    save_file(state, folder / f"{net}.safetensors")
    return str(folder / f"{net}.safetensors")


_QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _qwen_tokenizer(folder: Path, merges: Sequence[str] = ()) -> tuple[Any, dict[str, int]]:
    """A tokenizer of bytes and of what these merges make of them, and the tokens that a configuration names."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    words = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("".join(f"{line}\n" for line in ("#version: 0.2", *merges)))
    tokenizer = Qwen2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    names = "vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"
    return tokenizer, dict(zip(names, tokenizer.convert_tokens_to_ids(marks[:4]), strict=True))


def qwen3_vl_folder(folder: Path) -> str:
    """A Qwen3-VL that reads bytes, with a token of its own for Yes."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    torch.manual_seed(0)
    tokenizer, ids = _qwen_tokenizer(folder, ("e s", "Y es"))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **ids,
    )
    Qwen3VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    images = Qwen2VLImageProcessor(
        patch_size=16, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    )
    Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=_QWEN_CHAT).save_pretrained(folder)
    return str(folder)


def qwen2_vl_folder(folder: Path) -> tuple[str, Any]:
    """Configuration and processor of a Qwen2-VL that reads bytes, and that configuration."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer, ids = _qwen_tokenizer(folder)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
        **ids,
    )
    config.save_pretrained(folder)
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=_QWEN_CHAT)
    processor.save_pretrained(folder)
    return str(folder), config


def hpsv3_options(folder: Path) -> dict[str, str]:
    """A checkpoint under HPSv3's names, with its base and a short instruction."""
    from safetensors.torch import save_file
    from transformers import Qwen2VLModel

    base, config = qwen2_vl_folder(folder)
    config.text_config.vocab_size += 1  # the token whose state is read
    torch.manual_seed(0)
    state = {}
    for key, value in Qwen2VLModel(config).to(torch.bfloat16).state_dict().items():
        state[key if key.startswith("visual.") else f"model.{key.removeprefix('language_model.')}"] = value.contiguous()
    state["lm_head.weight"] = torch.zeros(1, 32, dtype=torch.bfloat16)
    for number, (rows, columns) in {0: (24, 32), 3: (16, 24), 5: (2, 16)}.items():
        state[f"rm_head.{number}.weight"] = torch.randn(rows, columns) * columns**-0.5
        state[f"rm_head.{number}.bias"] = torch.randn(rows) * 0.1
    save_file(state, folder / "HPSv3.safetensors")
    (folder / "instruction.txt").write_text(
        "Judge it.\nTextual prompt - {text_prompt}\n\nThe rating: <|Reward|>\n\nEND\n"
    )
    weights, instruction = str(folder / "HPSv3.safetensors"), str(folder / "instruction.txt")
    return {"weights": weights, "model": base, "instruction": instruction}


class FixedColor:
    """A color classifier that always says red."""

    def __call__(self, image, class_name, boxes_xyxy, masks_HW=None):
        return ["red"] * len(boxes_xyxy)


class AnswersYes:
    """A VQA model that says yes to bright images."""

    def __call__(self, images, question):
        return ["yes" if np.asarray(image).mean() > 127 else "no" for image in images]

    def describe(self):
        return {"kind": "bright"}


class Brightness:
    """A judge that takes bright images for right ones."""

    def __call__(self, image, question, spellings):
        return float(np.asarray(image).mean() / 255)

    def describe(self):
        return {"kind": "bright"}


#: Two lines in the layout of geneval2_data.jsonl.
GENEVAL2 = (
    '{"prompt": "a photo of a dog", "atom_count": 3, "vqa_list": [["How many dogs are in the image?", "one"], '
    '["Are there any dogs in the image?", "Yes"]], "skills": ["count", "object"]}\n'
    '{"prompt": "two cats", "atom_count": 4, "vqa_list": [["How many cats are in the image?", "two"]], "skills": ["count"]}\n'
)
QUESTIONS = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question
a,a photo of a dog,k,1,0,entity,whole,entity - whole (dog),is there a dog?
a,a photo of a dog,k,2,1,attribute,color,attribute - color (dog),is there a cat?
"""
