"""What a reader should know of the metrics that a study used, each once; docs/metrics.md says the same at more length.

Sources (facts): GenEval's drift: Kamath et al. 2025 (GenEval 2, arXiv 2512.16853). Prompt rewriting: the README of
FoundationVision/Infinity. Bias of FID on small sets: Chong and Forsyth 2020 (arXiv 1911.07023).
"""

from __future__ import annotations

from html import escape

from tuner.results.result import StudyResult

GENEVAL = (
    "GenEval is saturated: for current models its verdict is off by up to 17.7 % against people's (GenEval 2, "
    "arXiv 2512.16853). It ranks schedules of one model; read it beside a metric that compares with the full schedule."
)
REWRITING = (
    "Infinity's published GenEval was drawn from prompts that a language model rewrote (2B: 0.73, without it 0.69); this "
    "study draws the prompts as they are, so only the change between its own schedules means something."
)


def metric_notes_section(result: StudyResult) -> str:
    """A list, empty where no metric needs a word."""
    metrics = [] if result.random_weights else [limit.metric for limit in result.limits]
    notes = []
    if "geneval" in metrics:
        notes.append(GENEVAL)
        if result.model.startswith("infinity"):
            notes.append(REWRITING)
    biased = [metric for metric in metrics if metric in ("fid", "fid_dinov2", "is")]
    if biased:
        images = len(result.heldout_prompts) or len(result.search_prompts)
        notes.append(
            f"{' and '.join(biased)} of {images} images mostly {'measures' if len(biased) == 1 else 'measure'} how few they "
            "are: compare with sets of the same size only, never with published figures of 30,000 or 50,000 images."
        )
    return f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""
