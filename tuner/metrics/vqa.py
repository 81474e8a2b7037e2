"""DPG-Bench on images: a transformers VQA model answers the benchmark's questions, `tuner.metrics.dpg` adds them up."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image

from stagevar.errors import UsageError
from tuner.metrics.answers_file import Question, is_yes, read_questions
from tuner.metrics.base import BenchmarkMetric, Prompt
from tuner.metrics.dpg import MODES, score_dpg
from tuner.metrics.model_files import from_pretrained, pretrained_model


class Answerer(Protocol):
    """Anything that answers one question on several images."""

    def __call__(self, images: Sequence[Image.Image], question: str) -> list[str]:
        """One answer per image, lower case, without punctuation."""
        ...

    def describe(self) -> dict[str, object]:
        """Names, JSON values only."""
        ...


class DpgBench(BenchmarkMetric):
    """DPG-Bench score of an image's prompt, 0..1: tiles' mean of questions after dependencies (corrected arithmetic).

    Args:
        questions: path of dpg_bench.csv.
        tiles: 1, or 4 for the benchmark's 2x2 grids (top left, top right, bottom left, bottom right).
        model: a transformers VQA model: a hub name or a local folder.
        vqa: an object that follows `Answerer`, in place of the model.

    A prompt's item is its "item_id", else the item whose text equals its caption.
    `summary` gives both the published and the corrected DPG score.
    Source: ELLA dpg_bench, which uses modelscope's mPLUG; that model is not in transformers, so figures from another one are
    not comparable with published ones.
    """

    name: ClassVar[str] = "dpg"

    def __init__(
        self,
        *,
        device: str = "cpu",
        questions: str | None = None,
        tiles: int = 1,
        model: str = "Salesforce/blip-vqa-capfilt-large",
        vqa: Answerer | None = None,
    ) -> None:
        if questions is None:
            raise UsageError("dpg needs its questions: give the path of dpg_bench.csv as option questions")
        if tiles not in (1, 4):
            raise UsageError(f"dpg: tiles {tiles!r}, expected 1 (an image) or 4 (a 2x2 grid)")
        self.questions = read_questions(questions)
        self.tiles = tiles
        self._groups: dict[str, list[Question]] = {}
        for question in self.questions:
            self._groups.setdefault(question.item_id, []).append(question)
        self._items_by_prompt = {question.prompt: question.item_id for question in self.questions if question.prompt}
        self.vqa = TransformersVqa(model, device) if vqa is None else vqa

    def item_id(self, prompt: Prompt) -> str:
        """The benchmark's item of a prompt. Raises UsageError if there is none."""
        if isinstance(prompt, Mapping) and "item_id" in prompt:
            item = str(prompt["item_id"])
        else:
            text = prompt if isinstance(prompt, str) else str(prompt.get("prompt"))
            item = self._items_by_prompt.get(text.strip(), "")
        if item not in self._groups:
            raise UsageError(f"dpg: no questions for prompt {prompt!r:.60}; give item_id or the benchmark's own text")
        return item

    def _rows(self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt]) -> list[dict[str, object]]:
        rows = []
        for image_uint8_HW3, prompt in zip(images_uint8_BHW3, prompts, strict=True):
            item = self.item_id(prompt)
            tiles = tile_images(Image.fromarray(image_uint8_HW3), self.tiles)
            answers = {question.proposition_id: self.vqa(tiles, question.text) for question in self._groups[item]}
            given = {
                (item, proposition, tile): is_yes(answer)
                for proposition, row in answers.items()
                for tile, answer in enumerate(row)
            }
            score = score_dpg(self._groups[item], given, "corrected").prompts[0].score
            rows.append({"value": score, "item_id": item, "answers": {str(key): row for key, row in answers.items()}})
        return rows

    def summary(self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> dict[str, object]:
        """Both DPG scores of all rows; several images of one item count as its tiles, in row order."""
        answers: dict[tuple[str, int, int], float] = {}
        tiles_so_far: dict[str, int] = {}
        for row in rows:
            item, offset = row["item_id"], tiles_so_far.get(row["item_id"], 0)
            for proposition, given in row["answers"].items():
                for tile, answer in enumerate(given):
                    answers[item, int(proposition), offset + tile] = is_yes(answer)
            tiles_so_far[item] = offset + max(len(given) for given in row["answers"].values())
        result: dict[str, object] = {}
        for mode in MODES:
            score = score_dpg(self.questions, answers, mode)
            result[mode] = {
                "score": score.score,
                "l1": score.l1,
                "l2": score.l2,
                "dropped": score.dropped,
                "prompts": len(score.prompts),
            }
        return result

    def describe(self) -> dict[str, object]:
        return super().describe() | {"vqa": self.vqa.describe(), "tiles": self.tiles}


def tile_images(image: Image.Image, tiles: int) -> list[Image.Image]:
    """The image itself, or the four quarters of a grid: top left, top right, bottom left, bottom right."""
    if tiles == 1:
        return [image]
    if image.width % 2 or image.height % 2:
        raise UsageError(f"dpg: a grid of {image.width}x{image.height} pixels does not divide into four equal tiles")
    width, height = image.width // 2, image.height // 2
    return [image.crop((x, y, x + width, y + height)) for y in (0, height) for x in (0, width)]


class TransformersVqa:
    """BLIP's and ViLT's question-answering heads, or any chat model for images and text (told to answer yes or no).

    Only the first word counts, in lower case and without punctuation, since the benchmark compares with exactly "yes".
    """

    def __init__(self, source: str, device: str = "cpu") -> None:
        import transformers

        self.source, self.device = source, device
        self.kind = from_pretrained(transformers.AutoConfig, source, "VQA model").model_type
        model_class = {
            "blip": transformers.BlipForQuestionAnswering,
            "vilt": transformers.ViltForQuestionAnswering,
        }.get(self.kind, transformers.AutoModelForImageTextToText)
        self.processor = from_pretrained(transformers.AutoProcessor, source, "VQA model")
        self.model = pretrained_model(model_class, source, "VQA model", device=device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], question: str) -> list[str]:
        images = [image.convert("RGB") for image in images]
        if self.kind == "vilt":
            inputs = self.processor(images=images, text=[question] * len(images), return_tensors="pt").to(self.device)
            labels = self.model(**inputs).logits.argmax(-1).tolist()
            return [first_word(self.model.config.id2label[label]) for label in labels]
        if self.kind == "blip":
            inputs = self.processor(images=images, text=[question] * len(images), return_tensors="pt").to(self.device)
            tokens = self.model.generate(**inputs, max_new_tokens=8, num_beams=1, do_sample=False)
        else:
            tokens = torch.cat([self._chat(image, question) for image in images])
        return [first_word(text) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def _chat(self, image: Image.Image, question: str) -> torch.Tensor:
        """The answer's tokens (1, T), padded to 4."""
        content = [{"type": "image", "image": image}, {"type": "text", "text": f"{question} Answer yes or no."}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device)
        tokens = self.model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return torch.nn.functional.pad(tokens, (0, 4 - tokens.shape[1]), value=self.processor.tokenizer.pad_token_id)

    def describe(self) -> dict[str, object]:
        return {"kind": self.kind, "model": self.source}


def first_word(text: str) -> str:
    """The first word in lower case without punctuation; "" if there is none."""
    words = text.lower().translate(str.maketrans(string.punctuation, " " * len(string.punctuation))).split()
    return words[0] if words else ""
