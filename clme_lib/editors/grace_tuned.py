"""GRACE with a radius per dataset, selected in the same way as A-GRACE's margins (not in the paper, where the radius is 1).

Without this editor, a comparison with A-GRACE would credit the encoder with the effect of a selected radius.
"""

from __future__ import annotations

from typing import ClassVar

from ..datasets.paper import PAPER_DATASET_NAMES
from .grace import REACHES, CodebookEditor, GRACEHyperparameters, PerDataset, radius_of


class GRACETunedHyperparameters(GRACEHyperparameters):
    """GRACE's hyperparameters, with ``radii``, one per dataset, instead of ``radius``."""

    radii: PerDataset = dict.fromkeys(PAPER_DATASET_NAMES, 1.0)


class GRACETuned(CodebookEditor[GRACETunedHyperparameters]):
    """GRACE with a radius that was selected for each dataset."""

    name, title, order = "grace-tuned", "GRACE (tuned radius)", 6
    Hyperparameters = GRACETunedHyperparameters
    selection_grid: ClassVar = [{"radii": dict.fromkeys(PAPER_DATASET_NAMES, radius)} for radius in REACHES]
    selects_reach = True

    def _radius(self, case):
        return radius_of(self.hparams.radii, case)
