"""A loaded model with the schedule of a profile: what production calls."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol

from stagevar.choices import check_threads, processors
from stagevar.errors import UsageError
from stagevar.profile.envelope import Envelope, present_envelope
from stagevar.prompts.requests import check_negatives, check_prompts, check_seeds
from stagevar.sections import shown

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from stagevar.models.base import LoadedModel
    from stagevar.sampling.sampler import Sampler
    from stagevar.schedule import Steps


class DeployedSchedule(Protocol):
    """What drawing needs of a profile (`stagevar.profile.Profile`)."""

    @property
    def envelope(self) -> Envelope: ...

    def expand(self, model: LoadedModel) -> Steps: ...

    def warnings_here(self, model: LoadedModel, present: Envelope) -> list[str]: ...


@dataclass(frozen=True)
class PipelineOutput:
    """What a call of a pipeline returns.

    Attributes:
        images: PIL images; the first prompt's `num_images_per_prompt` come first.
        seeds: the seed of each image.
    """

    images: list[Image]
    seeds: list[int]


@dataclass
class Pipeline:
    """Draws with a profile's schedule, using its engine, batch size and CPU threads.

    Args:
        profile: what tuning wrote.
        sampler: runs on the profile's model.
        batch: images per pass, instead of the profile's.
        threads: CPU threads, instead of the profile's, or of as many of these as this process may use.

    Raises:
        UsageError: for a batch or threads that are no such number, and for more threads than this process may use.

    Warns:
        UserWarning: for each difference from where the profile was measured.
    """

    profile: DeployedSchedule
    sampler: Sampler
    batch: int = 0
    threads: int | None = None
    steps: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_numbers(self.batch, self.threads)
        envelope = self.profile.envelope
        self.steps = self.profile.expand(self.sampler.model)
        self.batch = self.batch or envelope.batch
        self.threads = self._usable_threads()
        engine = self.sampler.engine.name
        present = present_envelope(self.sampler.model, batch=self.batch, threads=self.threads, engine=engine)
        for line in self.profile.warnings_here(self.sampler.model, present):
            warnings.warn(line, stacklevel=3)

    def generate(self, prompts: Any, seeds: Any = None, negative: Any = None, **options: Any) -> list[Image]:
        """One image per prompt. The same prompt and seed give the same image in any batch.

        Args:
            prompts: one text or a list of texts.
            seeds: one per prompt (list, array or tensor), one number to count up from, or a random generator (torch,
                numpy, random) to draw them from; 0, 1, 2, ... by default.
            negative: replaces the model's null text: one text for all, or a list with one per prompt.
            options: passed to `Sampler.begin`.

        Raises:
            UsageError: for prompts, seeds or negatives of the wrong kind or number.
        """
        from PIL import Image

        texts = check_prompts(prompts)
        numbers, negatives = check_seeds(seeds, len(texts)), check_negatives(negative, len(texts))
        images: list[Image.Image] = []
        with self.own_threads():
            for first in range(0, len(texts), self.batch):
                part = slice(first, first + self.batch)
                chosen = {} if negatives is None else {"negative": negatives[part]}
                pixels = self.sampler.generate(texts[part], numbers[part], self.steps, **chosen, **options)
                images += [Image.fromarray(image) for image in pixels]
        return images

    def warm(self, lengths: Sequence[int] = (32,), batches: Sequence[int] = ()) -> float:
        """Draws one batch per text length, so that no later image of that length waits for loading, compiling or recording.

        Args:
            lengths: of texts, in tokens; a recorded graph serves all lengths up to the next multiple of 32
                (`stagevar.engine.TEXT_BUCKET`). Models whose texts all have the same length draw once.
            batches: images per pass; by default the pipeline's. The last, smaller part of a call counts as a size of
                its own.

        Returns:
            The seconds that it took.

        Raises:
            UsageError: for numbers below 1.
        """
        import time

        batches = batches or (self.batch,)
        for name, numbers in (("length", lengths), ("batch", batches)):
            for number in numbers:
                if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                    raise UsageError(f"warm: {name} {shown(number)} must be a whole number of at least 1")
        began = time.perf_counter()
        with self.own_threads():
            warm_sampler(self.sampler, self.steps, lengths, batches)
        return time.perf_counter() - began

    def __call__(
        self,
        prompt: Any = None,
        negative_prompt: Any = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Any = None,
        seed: Any = None,
        **others: Any,
    ) -> PipelineOutput:
        """Draws images with the arguments of a diffusers pipeline.

        Args:
            prompt, negative_prompt: one text or a list of texts.
            num_images_per_prompt: images of each prompt, next to each other in the result.
            height, width: in pixels; a profile is for one size, and other sizes are refused.
            generator: random generator, or a list with one per image.
            seed: instead of a generator, like `seeds` of `generate`.

        Raises:
            UsageError: for anything unsupported, including options that belong to diffusion models.
        """
        for name in others:
            raise UsageError(f"{name} is not an option of this pipeline: the profile decides how images are drawn")
        if generator is not None and seed is not None:
            raise UsageError("give either generator= or seed=, not both")
        if isinstance(num_images_per_prompt, bool) or not isinstance(num_images_per_prompt, int):
            raise UsageError(f"num_images_per_prompt {shown(num_images_per_prompt)} must be a whole number")
        if num_images_per_prompt < 1:
            raise UsageError(f"num_images_per_prompt {num_images_per_prompt} must be at least 1")
        for name, asked, made in zip(("height", "width"), (height, width), self.sampler.model.pixels, strict=True):
            if asked is not None and asked != made:
                raise UsageError(
                    f"{name} {shown(asked)}: the profile draws {made} pixels; tune one with --resolution for another size"
                )
        texts = check_prompts(prompt)
        negatives = check_negatives(negative_prompt, len(texts))
        count = len(texts) * num_images_per_prompt
        seeds = check_seeds(seed if generator is None else generator, count)
        repeated = None if negatives is None else _repeat(negatives, num_images_per_prompt)
        return PipelineOutput(self.generate(_repeat(texts, num_images_per_prompt), seeds, repeated), seeds)

    def _usable_threads(self) -> int | None:
        """Those given, or the profile's, of which a CPU has no more than its processors: torch dies of far too many."""
        recorded, device = self.profile.envelope.threads, self.sampler.model.device.type
        if self.threads is not None:
            check_threads(self.threads, device)
            return self.threads
        if recorded is None or device != "cpu":
            return recorded
        return min(recorded, len(processors()) or os.cpu_count() or 1)

    def own_threads(self) -> contextlib.AbstractContextManager[None]:
        """Runs torch on as many CPU threads as a call of the pipeline does; a GPU does not depend on them."""
        from stagevar.timing import threads_of

        return threads_of(self.threads if self.sampler.model.device.type == "cpu" else None)


def check_numbers(batch: Any, threads: Any) -> None:
    """Raises UsageError for a batch that is no whole number of at least 0 (the profile's), and for threads that are none."""
    if isinstance(batch, bool) or not isinstance(batch, Integral) or batch < 0:
        raise UsageError(f"batch {shown(batch)} must be a whole number of at least 1, or 0 for the profile's")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, Integral)):
        raise UsageError(f"threads {shown(threads)} must be a whole number, or None for the profile's")


def warm_sampler(sampler: Sampler, steps: Steps, lengths: Sequence[int], batches: Sequence[int]) -> None:
    """Loads the text encoder and draws one batch for every size and text length; see `Pipeline.warm`."""
    from stagevar.models.text_encoder import LazyEncoder
    from stagevar.sampling.bench import bench_prompts

    model = sampler.model
    if isinstance(model.text, LazyEncoder):
        model.text.load()  # encoding does not if the prompts' features are cached
    for batch in batches:
        prompts = bench_prompts(model, 1) * batch
        features = model.text.encode(prompts)
        ragged = isinstance(features, list) and all(getattr(rows, "ndim", 0) == 2 for rows in features)
        for length in lengths if ragged else (None,):
            encoded = features if length is None else [_of_length(rows_TC, length) for rows_TC in features]
            sampler.generate(prompts, list(range(batch)), steps, encoded=encoded)


def _of_length(rows_TC: Tensor, length: int) -> Tensor:
    """Text features with the requested number of rows, repeated from the start."""
    return rows_TC[[row % len(rows_TC) for row in range(length)]]


def _repeat(texts: list[str], times: int) -> list[str]:
    return list(itertools.chain.from_iterable([text] * times for text in texts))
