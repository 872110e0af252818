"""``in-context``: the model is not edited; it reads the case's prompt and target before every prompt (not in the paper; Zheng et al. 2023).

This is the baseline that editors have to beat. With the prompt ``x``, the target ``y`` and two line breaks, a prompt ``p`` is read as ``x y \\n\\n p``.
"""

from __future__ import annotations

from ..edits.base import Edit
from ..edits.prompts import PromptEdit
from ..support.schema import Schema
from .base import Editor


def shown(case) -> str:
    """The text before prompts: the case's prompt and target, and two line breaks."""
    return f"{case.prompt} {case.target}\n\n"


class InContext(Editor[Schema]):
    """The case's prompt and target, before every prompt."""

    name, title, order = "in-context", "in context", 10
    updates_weights = False
    reads_given_prompts = False

    def _edit_batch(self, cases, tokenized) -> list[Edit]:
        return [PromptEdit(case.case_id, self.name, texts=(shown(case),)) for case in cases]
