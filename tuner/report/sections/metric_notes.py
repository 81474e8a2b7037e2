"""What a reader should know about a study's metrics, each note once; docs/metrics.md says the same in more detail.

Sources (facts): GenEval's drift: Kamath et al. 2025 (GenEval 2, arXiv 2512.16853). Prompt rewriting: the README of
FoundationVision/Infinity. Bias of FID on small sets: Chong and Forsyth 2020 (arXiv 1911.07023).
"""

from __future__ import annotations

from html import escape

from tuner.results.result import StudyResult

GENEVAL = (
    "GenEval is saturated: for current models its verdict differs from people's by up to 17.7 % (GenEval 2, "
    "arXiv 2512.16853). It ranks schedules of one model; read it with a metric that compares with the full schedule."
)
REWRITING = (
    "Infinity's published GenEval used prompts rewritten by a language model (2B: 0.73, without rewriting 0.69); this "
    "study uses the prompts as they are, so only changes between its own schedules are meaningful."
)


def metric_notes_section(result: StudyResult) -> str:
    """A list, empty if no metric needs a note."""
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
            "are: compare only with sets of the same size, never with published figures on 30,000 or 50,000 images."
        )
    return f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""
