"""GRACE with a radius for each dataset, selected as A-GRACE's margins are (not in the paper, which leaves it at 1).

Without it a comparison with A-GRACE credits the encoder with what any selected radius does.
"""

from __future__ import annotations

from typing import ClassVar

from ..datasets.paper import PAPER_DATASET_NAMES
from .grace import REACHES, CodebookEditor, GRACEHyperparameters, PerDataset, radius_of


class GRACETunedHyperparameters(GRACEHyperparameters):
    """GRACE's, with ``radii`` in the place of its ``radius``: one for each dataset."""

    radii: PerDataset = dict.fromkeys(PAPER_DATASET_NAMES, 1.0)


class GRACETuned(CodebookEditor[GRACETunedHyperparameters]):
    """GRACE with a radius that was selected for each dataset."""

    name, title, order = "grace-tuned", "GRACE, tuned radius", 6
    Hyperparameters = GRACETunedHyperparameters
    selection_grid: ClassVar = [{"radii": dict.fromkeys(PAPER_DATASET_NAMES, radius)} for radius in REACHES]
    selects_reach = True

    def _radius(self, case):
        return radius_of(self.hparams.radii, case)
