"""Evaluation during a training run and at its end."""

from contextlib import nullcontext
from typing import Any

from openimp.common.progress import Progress, console
from openimp.evaluation.evaluate import NotMeasured, evaluate
from openimp.evaluation.results import table
from openimp.parallel import distributed
from openimp.parallel.layout import reshard
from openimp.training.setup import Parts


def measure(parts: Parts, step: int, watch: Progress | None = None) -> tuple[list[dict[str, Any]], NotMeasured | None]:
    """Measures the EMA after `step` steps if there is one, else the model, on the recipe's evaluation sets. Writes,
    prints and returns the results, and says which sets could not be measured.

    The ranks share the work as they share the model. `watch` wraps the passes; see `Evaluator`.
    """
    failure = None
    ema = parts.updater.ema
    with ema.swapped() if ema else nullcontext():
        try:
            results = evaluate(
                parts.model,
                parts.recipe,
                parts.data.modalities,
                step=step,
                classes=parts.data.classes,
                watch=watch,
                tables=parts.evaluated_tables,
            )
        except NotMeasured as error:
            failure = error
            results = error.results
        finally:
            reshard(parts.model)  # Gathered weights are out of date once the EMA is swapped back.
    if results:
        distributed.run_on_rank_zero(lambda: parts.log.metrics.write_results(results))
        console.print(table(results))
    return results, failure
