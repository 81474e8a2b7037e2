"""GenEval 2 on images: a vision-language model's probabilities of right answers; `tuner.metrics.answer_rules` adds them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, cast

import numpy as np
import torch
from PIL import Image

from stagevar.errors import UsageError
from tuner.metrics.answer_rules import geneval2_questions, geometric_mean, read_geneval2, score_geneval2
from tuner.metrics.base import BenchmarkMetric, Facts, Prompt, prompt_text
from tuner.metrics.downloads import GENEVAL2_MODEL
from tuner.metrics.model_files import from_pretrained, pretrained_model

_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), start=1
    )
}


class Judge(Protocol):
    """Anything that says how likely a given answer to a question about an image is."""

    def __call__(self, image: Image.Image, question: str, spellings: Sequence[str]) -> float:
        """The probability, 0 to 1, that the answer begins like one of the spellings."""
        ...

    def describe(self) -> dict[str, str]:
        """Names, JSON values only."""
        ...


class GenEval2(BenchmarkMetric):
    """GenEval 2's Soft-TIFA GM of an image, 0 to 1: the geometric mean of the probabilities of the right answers.

    Args:
        questions: path of geneval2_data.jsonl, which is not shipped (CC BY-NC 4.0).
        model: a transformers vision-language model with a chat template: a hub name or a local folder.
        judge: an object that follows `Judge`, in place of the model.

    A prompt's questions are found by its text. `summary` gives AM and GM times 100, by skill and by number of atoms.
    Source: Kamath et al. 2025 (GenEval 2), github facebookresearch/GenEval2 evaluation.py, with Qwen3-VL-8B-Instruct. What
    differs: a token that begins two spellings counts once.
    """

    name: ClassVar[str] = "geneval2"

    def __init__(
        self,
        *,
        device: str = "cpu",
        questions: str | None = None,
        model: str = GENEVAL2_MODEL,
        judge: Judge | None = None,
    ) -> None:
        if questions is None:
            raise UsageError("geneval2 needs its prompts: give the path of geneval2_data.jsonl as option questions")
        self.prompts = read_geneval2(questions)
        self._index_of = {asked.prompt.strip(): index for index, asked in enumerate(self.prompts)}
        self.judge = TransformersJudge(model, device) if judge is None else judge

    def index(self, prompt: Prompt) -> int:
        """A prompt's line, counted from 0. Raises UsageError if there is none."""
        text = prompt_text(prompt).strip()
        if text not in self._index_of:
            raise UsageError(f"geneval2: no questions for prompt {text!r:.60}; give the benchmark's own text")
        return self._index_of[text]

    def _rows(self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt]) -> list[Facts]:
        rows = []
        for image_uint8_HW3, prompt in zip(images_uint8_BHW3, prompts, strict=True):
            index, image = self.index(prompt), Image.fromarray(image_uint8_HW3)
            shares = [
                self.judge(image, f"{question} Answer in one word.", spellings_of(question, answer))
                for question, answer, _ in self.prompts[index].questions
            ]
            rows.append({"value": geometric_mean(shares), "item_id": str(index), "answers": shares})
        return rows

    def summary(self, rows: Sequence[Mapping[str, object]], prompts: Sequence[Prompt]) -> Facts:
        """AM and GM of all rows; several images of one prompt count by their mean."""
        answers: dict[tuple[str, int, int], float] = {}
        images: dict[str, int] = {}
        for row in rows:
            item, shares = str(row["item_id"]), cast(list[float], row["answers"])
            tile = images.get(item, 0)
            images[item] = tile + 1
            answers |= {(item, number, tile): share for number, share in enumerate(shares, start=1)}
        score = score_geneval2(geneval2_questions(self.prompts), answers)
        return {**score.figures, **score.groups, "prompts": len(score.items)}

    def describe(self) -> Facts:
        return super().describe() | {"judge": self.judge.describe()}


def spellings_of(question: str, answer: str) -> tuple[str, ...]:
    """How a right answer may begin: yes, or a count as a word or in digits, each with and without a leading space."""
    if not question.startswith("How many"):
        return "Yes", "yes", " yes", " Yes"
    digits = _DIGITS.get(answer, "other")
    return answer, answer.capitalize(), f" {answer}", f" {answer.capitalize()}", digits, f" {digits}"


class TransformersJudge:
    """A chat model for images and text, in its checkpoint's precision; the answer's first token decides."""

    def __init__(self, source: str, device: str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.source, self.device = source, device
        self.processor = from_pretrained(AutoProcessor, source, "vision-language model")
        if not getattr(self.processor, "chat_template", None):
            raise UsageError(f"vision-language model {source} has no chat template; use a chat model")
        self.model = pretrained_model(
            AutoModelForImageTextToText, source, "vision-language model", device=device, dtype="auto"
        )

    @torch.inference_mode()
    def __call__(self, image: Image.Image, question: str, spellings: Sequence[str]) -> float:
        content = [{"type": "image", "image": image.convert("RGB")}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device)
        answer = self.model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        share_V = answer.scores[0][0].float().softmax(0)
        return min(1.0, float(share_V[self.first_tokens(spellings)].sum()))

    def first_tokens(self, spellings: Sequence[str]) -> list[int]:
        """The distinct tokens that the spellings begin with."""
        encode = self.processor.tokenizer.encode
        return list(dict.fromkeys(encode(spelling, add_special_tokens=False)[0] for spelling in spellings))

    def describe(self) -> dict[str, str]:
        return {"model": self.source, "precision": str(self.model.dtype).removeprefix("torch.")}
