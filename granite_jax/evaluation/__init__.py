"""Evaluation: error rates with confidence intervals, from runs that resume.

In short:

    from granite_jax import evaluation

    results = evaluation.evaluate(["demo"], "runs/demo", "demo")
    print(evaluation.to_markdown(results))
    evaluation.compare("runs/a", "runs/b")                     # the same utterances, paired

Needs `pip install 'granite-jax[eval]'`.
"""

from granite_jax.evaluation.compare import compare
from granite_jax.evaluation.metrics import Rate, Scores, score
from granite_jax.evaluation.report import comparison_to_markdown, to_markdown
from granite_jax.evaluation.run import evaluate

__all__ = ["Rate", "Scores", "compare", "comparison_to_markdown", "evaluate", "score", "to_markdown"]
