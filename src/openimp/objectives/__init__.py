"""The losses of tasks: one file per objective, and their weighted sum. An objective of another
package imports its base class from here (docs/objectives.md)."""

from openimp.common.modality import BadMedia
from openimp.common.objective import Objective

__all__ = ["BadMedia", "Objective"]
