"""A scorer of relevance that needs no model, for the stages around it."""

from clme_lib.datasets.construction import relevance
from clme_lib.datasets.construction.stages import Step, stage_row
from clme_lib.datasets.neighbours import subtokens


def _score(rows):
    for row in rows:
        words = {word for word in subtokens(row["snippet"]) if len(word) > 1}
        share = len(words & set(subtokens(row["intent"]))) / len(words) if words else 0.0
        yield stage_row(row["id"], level=relevance.LEVELS[min(4, int(10 * share))])


BY_WORDS = Step({"scorer": "words"}, _score, fields={"level": str})
