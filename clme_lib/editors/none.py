"""``none``: the model as it is. The baseline row; its specificity measures the noise of generating twice."""

from __future__ import annotations

from ..edits.base import Unedited
from ..support.schema import Schema
from .base import Editor


class NoEditor(Editor[Schema]):
    """Changes nothing."""

    name, title, order, colour = "none", "unedited", 0, 7
    updates_weights = False

    def _edit_batch(self, cases, tokenized):
        return [Unedited(case.case_id, self.name) for case in cases]
