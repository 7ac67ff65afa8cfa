"""Published figures to stand beside one's own, each with its source and what differs in its set-up.

Copied by hand from the papers (2026-11). ScienceQA: test accuracy in per cent, by the columns of its own table.
"""

from __future__ import annotations

from dataclasses import dataclass

ANSWER_COLUMNS = ("natural", "social", "language", "has_text", "has_image", "no_context", "grade_1_6", "grade_7_12",
                  "average")  # fmt: skip
_MM_COT_5 = "Zhang et al., arXiv 2302.00923v5"
_MM_COT_1 = "Zhang et al., arXiv 2302.00923v1"
_ARES = "Byun et al., EMNLP 2024, pp. 4410-4430"


@dataclass(frozen=True)
class Published:
    """`figures`: column -> value as printed, in per cent. `differs`: what to bear in mind beside one's own."""

    label: str
    dataset: str
    kind: str  # answers, rationales or win rates
    figures: dict[str, float]
    source: str
    differs: str = ""


def _answers(*values: float) -> dict[str, float]:
    return dict(zip(ANSWER_COLUMNS, values, strict=True))


PUBLISHED = (
    Published("MM-CoT base (paper)", "scienceqa", "answers",
              _answers(84.06, 92.35, 82.18, 82.75, 82.75, 84.74, 85.79, 84.44, 85.31), _MM_COT_5,
              "Flan-Alpaca base + ViT, two stages; ARES's starting point"),
    Published("MM-CoT large (paper)", "scienceqa", "answers",
              _answers(91.03, 93.70, 86.64, 90.13, 88.25, 89.48, 91.12, 89.26, 90.45), _MM_COT_5,
              "Flan-Alpaca large + ViT, two stages"),
    Published("MM-CoT base (paper, v1)", "scienceqa", "answers",
              _answers(87.52, 77.17, 85.82, 87.88, 82.90, 86.83, 84.65, 85.37, 84.91), _MM_COT_1,
              "UnifiedQA-T5 + DETR; its category columns do not compare with v5's"),
    Published("MM-CoT large (paper, v1)", "scienceqa", "answers",
              _answers(95.91, 82.00, 90.82, 95.26, 88.80, 92.89, 92.44, 90.31, 91.68), _MM_COT_1,
              "UnifiedQA-T5 + DETR; users reproduce about 90.45 with the released model"),
    Published("GPT-3 CoT (paper)", "scienceqa", "answers", {"average": 75.17}, "Lu et al., 2022",
              "few-shot, captions in place of images"),
    Published("MM-CoT base (paper)", "scienceqa", "rationales", {"rouge": 93.46}, _MM_COT_5, "Flan-Alpaca base + ViT"),
    Published("MM-CoT base, captions only (paper)", "scienceqa", "rationales", {"rouge": 90.88}, _MM_COT_5,
              "no vision features"),
    Published("MM-CoT base, text only (paper)", "scienceqa", "rationales", {"rouge": 90.73}, _MM_COT_5,
              "no vision features, no captions"),
    Published("MM-CoT base (paper)", "aokvqa", "answers", {"average": 50.57}, _MM_COT_5,
              "validation set, multiple choice"),
    Published("MM-CoT base, language only (paper)", "aokvqa", "answers", {"average": 47.86}, _MM_COT_5,
              "validation set, multiple choice"),
    Published("ARES base against MM-CoT base (paper)", "scienceqa", "win rates", {"win_rate": 69.76}, _ARES,
              "GPT-4o judges, one random order a pair"),
    Published("ARES large against MM-CoT large (paper)", "scienceqa", "win rates", {"win_rate": 73.76}, _ARES,
              "GPT-4o judges, one random order a pair"),
    Published("ARES base against MM-CoT base (paper)", "aokvqa", "win rates", {"win_rate": 69.11}, _ARES,
              "GPT-4o judges, one random order a pair"),
    Published("ARES large against MM-CoT large (paper)", "aokvqa", "win rates", {"win_rate": 66.96}, _ARES,
              "GPT-4o judges, one random order a pair"),
)  # fmt: skip
NOTE = (
    "ARES reports +2.5 % of answer accuracy on average (abstract; per-set tables not at hand). Its Teacher, "
    "claude-3-haiku-20240307, was retired in April 2026."
)
