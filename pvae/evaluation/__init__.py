"""Statements about log p(x): what a number is, in which direction it errs, and by how much.

pair, data  --evaluate-->  Evaluation;    {name: Evaluation}  --compare-->  Comparison
"""

from pvae.evaluation.compare import Comparison, compare
from pvae.evaluation.evaluate import evaluate
from pvae.evaluation.result import Evaluation

__all__ = ["Comparison", "Evaluation", "compare", "evaluate"]
