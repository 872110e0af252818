"""What the paper fixes. The registries may hold more editors; what is said about the paper's study is said about these."""

PAPER_EDITORS = ("none", "ft-l", "rome", "memit", "pmet", "malmen", "grace")
A_GRACE_VARIANTS = ("a-grace", "a-grace-wo-cl", "a-grace-wo-mean")
# all that edit: what efficiency is measured of
STUDY_EDITORS = (*PAPER_EDITORS[1:], *A_GRACE_VARIANTS)
