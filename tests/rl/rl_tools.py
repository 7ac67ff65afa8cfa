"""Helpers of the RL tests; data, model and replies of a small run are made by benchmarks/rl_common.py."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from benchmarks.rl_common import PATCHES, answer, make_data, make_model, reply, score
from teacher import handoff

__all__ = ["PATCHES", "Teacher", "answer", "make_data", "make_model", "reply", "score"]


class Teacher(threading.Thread):
    """Waits beside a running RL for the end of its export, then answers; `sentences` is what it scored."""

    def __init__(self, questions: Path, **how):
        super().__init__(daemon=True)
        self.questions, self.how, self.sentences = questions, how, 0
        self.start()

    def run(self) -> None:
        while not handoff.exported(self.questions):
            time.sleep(0.1)
        self.sentences = answer(self.questions, **self.how)
