"""What the paper has: its editors, in the order of its tables. The registry of editors may have more."""

from __future__ import annotations

UNEDITED = "none"
PAPER_EDITORS = ("ft-l", "rome", "memit", "pmet", "malmen", "grace")
A_GRACE = "a-grace"
A_GRACE_VARIANTS = ("grace", A_GRACE, "a-grace-wo-cl", "a-grace-wo-mean")
# not the paper's: what GRACE reaches when its radius is selected as A-GRACE's margin is
TUNED_GRACE = "grace-tuned"
# every variant that the paper measures, each once
PAPER_VARIANTS = (*PAPER_EDITORS, *A_GRACE_VARIANTS[1:])
