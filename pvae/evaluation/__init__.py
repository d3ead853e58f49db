"""Statements about log p(x): what a number is, in which direction it errs, and by how much.

pair, data  --evaluate, ais-->  Evaluation;    {name: Evaluation}  --compare-->  Comparison
pair, data  --collapse-->  Collapse: what the guide's latents tell of x
pair, data  --gaps-->  Gaps: what of the ELBO the guide's family loses, and what its network
model, data  --impute-->  Imputation: what was not seen, from what was
pair        --sandwich-->  Sandwich: both bounds, on data of the pair's own
"""

from pvae.evaluation.ais import ais
from pvae.evaluation.collapse import Collapse, collapse
from pvae.evaluation.compare import Comparison, compare
from pvae.evaluation.evaluate import evaluate
from pvae.evaluation.gaps import Gaps, gaps
from pvae.evaluation.imputation import Imputation, impute
from pvae.evaluation.result import Evaluation
from pvae.evaluation.sandwich import Sandwich, sandwich

__all__ = [
    "Collapse",
    "Comparison",
    "Evaluation",
    "Gaps",
    "Imputation",
    "Sandwich",
    "ais",
    "collapse",
    "compare",
    "evaluate",
    "gaps",
    "impute",
    "sandwich",
]
