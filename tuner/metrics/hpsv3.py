"""HPSv3: a Qwen2-VL of 7 B parameters with a ranking head, for verification only."""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from stagevar.errors import UsageError, WeightsError
from tuner.metrics.base import Metric, Prompt, prompt_text
from tuner.metrics.downloads import HPSV3, HPSV3_BASE
from tuner.metrics.model_files import from_pretrained, hub_file, read_state_dict, refuse_missing

#: The token whose hidden state the head reads; it follows Qwen2-VL's own.
_REWARD = "<|Reward|>"
_PLACE = "{text_prompt}"
#: Where a package has the instruction: its module, and the names of the two parts.
_PACKAGE, _MODULE, _PARTS = "diffsynth", "models/hpsv3.py", ("HPSV3_INSTRUCTION", "HPSV3_PROMPT_WITH_SPECIAL_TOKEN")


class HpsV3(Metric):
    """HPSv3, higher is better: how much people like the image for its prompt, about 0 to 15.

    Args:
        weights: the published checkpoint: a path, by default the hub's.
        model: the Qwen2-VL that it was trained from, for its sizes and processor: a folder or a hub name.
        instruction: a text file with the question that the model was trained on, with {text_prompt} for the prompt and
            <|Reward|> where the answer is read; by default, that of an installed diffsynth, which is read but not imported.

    Source: Ma et al. 2025 (HPSv3, arXiv 2508.03789), github MizzenAI/HPSv3: the first of the head's two numbers, images of
    about 256 patches of 28 pixels.
    """

    name: ClassVar[str] = "hpsv3"
    needs_prompt: ClassVar[bool] = True
    pixels, patch = 256 * 28 * 28, 28

    def __init__(
        self,
        *,
        device: str = "cpu",
        weights: str = f"hub:{HPSV3}",
        model: str = HPSV3_BASE,
        instruction: str | None = None,
    ) -> None:
        from transformers import AutoConfig, AutoProcessor, Qwen2VLModel

        self.device, self.source = device, weights
        self.instruction = _instruction(instruction)
        config = from_pretrained(AutoConfig, model, "Qwen2-VL of HPSv3")
        self.processor = from_pretrained(AutoProcessor, model, "Qwen2-VL of HPSv3")
        self.processor.tokenizer.add_special_tokens({"additional_special_tokens": [_REWARD]})
        self.reward_id = int(self.processor.tokenizer.convert_tokens_to_ids(_REWARD))
        path = hub_file(weights, "HPSv3")
        state = {_renamed(key): value for key, value in read_state_dict(path).items()}
        self.head = _head(state, path).to(device)
        body = {key: value for key, value in state.items() if not key.startswith(("rm_head.", "lm_head."))}
        config.text_config.vocab_size = body.get("language_model.embed_tokens.weight", torch.zeros(0)).shape[0]
        with refuse_missing(f"HPSv3 {path}"):
            loaded: Any = Qwen2VLModel.from_pretrained(
                None, config=config, state_dict=body, dtype=torch.bfloat16, output_loading_info=True
            )
        network, info = loaded
        lost = sorted([*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])])
        if lost:
            raise WeightsError(
                f"{path} lacks {len(lost)} weights of HPSv3, such as {lost[0]}; give the complete checkpoint"
            )
        self.network: Any = network.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        return np.array(
            [self._one(image, prompt_text(prompt)) for image, prompt in zip(images_uint8_BHW3, prompts, strict=True)]
        )

    def _one(self, image_uint8_HW3: np.ndarray, prompt: str) -> float:
        picture = self._resized(Image.fromarray(image_uint8_HW3))
        content = [{"type": "image"}, {"type": "text", "text": self.instruction.replace(_PLACE, prompt)}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = self.processor(text=[text], images=[picture], return_tensors="pt").to(self.device)
        hidden_TD = self.network(**inputs).last_hidden_state[0]
        places = (inputs["input_ids"][0] == self.reward_id).nonzero()[:, 0]
        return float(self.head(hidden_TD[places[-1]].float())[0])

    def _resized(self, picture: Image.Image) -> Image.Image:
        """Resized to whole patches and about as many pixels as in training, at nearly the same aspect ratio."""
        width, height = (max(self.patch, round(side / self.patch) * self.patch) for side in picture.size)
        scale = math.sqrt(picture.width * picture.height / self.pixels)
        if width * height != self.pixels:
            whole = math.floor if width * height > self.pixels else math.ceil
            width, height = (max(1, whole(side / scale / self.patch)) * self.patch for side in picture.size)
        return picture.resize((width, height), Image.Resampling.BICUBIC)

    def describe(self) -> dict[str, object]:
        return super().describe() | {"weights": self.source}


def _renamed(key: str) -> str:
    """The checkpoint's name for a tensor as Qwen2VLModel spells it since its language model is a separate part."""
    if key.startswith(("visual.", "rm_head.", "lm_head.")):
        return key
    key = key.removeprefix("model.")
    return key if key.startswith(("visual.", "language_model.")) else f"language_model.{key}"


def _head(state: dict[str, torch.Tensor], path: str) -> nn.Module:
    """The ranking head: linear layers with a ReLU between them, in float32; dropout does nothing here."""
    numbers = sorted(int(key.split(".")[1]) for key in state if key.startswith("rm_head.") and key.endswith(".weight"))
    if not numbers or any(f"rm_head.{number}.bias" not in state for number in numbers):
        raise WeightsError(f"{path} is not a checkpoint of HPSv3: it has no complete rm_head")
    layers: list[nn.Module] = []
    for number in numbers:
        weight, bias = (state[f"rm_head.{number}.{part}"].float() for part in ("weight", "bias"))
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval().requires_grad_(False)


def _instruction(path: str | None) -> str:
    """The text that images are judged by. Raises UsageError if there is none, or if it lacks one of its two placeholders."""
    if path is not None:
        from stagevar.text_files import read_text

        text, where = read_text(path), path
    else:
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise UsageError(
                f"hpsv3 needs an instruction that {_PACKAGE} ships: pip install --no-deps {_PACKAGE}, or give a file as option "
                "instruction"
            )
        file = Path(spec.origin).parent / _MODULE
        text, where = "".join(_constants(file).get(part, "") for part in _PARTS), str(file)
    if text.count(_PLACE) != 1 or text.count(_REWARD) != 1:
        raise UsageError(f"{where}: the instruction of hpsv3 must hold {_PLACE} and {_REWARD} once each")
    return text


def _constants(file: Path) -> dict[str, str]:
    """Texts that a module assigns to names; the module is read, not run."""
    if not file.is_file():
        return {}
    return {
        target.id: node.value.value
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
