"""Probes: two classifiers on features of the frozen encoder, before any projection, show what the features contain.

The linear probe is CLIP's (arXiv 2103.00020, section 3.2): logistic regression by scikit-learn's L-BFGS with an L2
penalty, on standardized features. The nearest neighbors are DINO's (arXiv 2104.14294, appendix F.1): by cosine, each
one votes with weight exp(similarity / 0.07).

Shape suffixes: N examples, M of them in a block, K nearest neighbors, D width.
"""

import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from openimp.common.errors import UserError, counted
from openimp.common.schema import as_text
from openimp.common.versions import require_library
from openimp.data.tables import Table, Unreadable
from openimp.data.targets import find_classes, sort_classes
from openimp.evaluation.evaluator import Evaluator, Predicted, ReadableRows
from openimp.evaluation.metrics import accuracy
from openimp.evaluation.retrieval import MAX_SIMILARITIES
from openimp.parallel.distributed import run_on_rank_zero
from openimp.recipe.evaluation import Probe

C_CANDIDATES = [10.0**power for power in range(-4, 4)]
"""Candidates for C, the inverse of the weight of the L2 penalty. CLIP searches for it, too: the best C depends on the
number of examples and on the width by orders of magnitude, so a fixed one would favor some models."""
MAX_ITER = 1000
"""Maximum number of L-BFGS iterations per fit."""
FOLDS = 5
"""Folds of the cross-validation that chooses C; fewer if a class has fewer examples."""
TEMPERATURE = 0.07
"""Temperature of the neighbors' votes."""


@dataclass(frozen=True)
class Probed(Predicted):
    """The predictions of one classifier."""

    kind: str  # "linear" or "kNN"
    classes: list[Any]  # the labels, sorted
    truth: np.ndarray  # (N,) int64, the class of each test example
    predicted: np.ndarray
    setting: dict[str, Any]  # {"C": ...} or {"k": ...}

    @property
    def task(self) -> str:
        return f"{super().task} ({self.kind})"

    def metrics(self) -> dict[str, Any]:
        """Top-1 with its 95 % interval, top-1 averaged over the classes, chance, and the classifier's setting."""
        return accuracy(self.predicted == self.truth, self.truth, len(self.classes)) | self.setting


def check(options: Probe, error_prefix: str, tables: dict[str, Table]) -> None:
    """UserError, without encoding anything, if scikit-learn or the label column is missing, or a row has no class or
    several.

    The training rows must have every class of the test rows, at least two classes, two examples of each, and `k`
    examples.
    """
    require_library("sklearn", "probe")
    labels = {}
    for name in (options.source, options.train):
        table = tables[name]
        table.require([options.label], error_prefix)
        values = table.column(options.label)
        find_classes(table, options.label, values, False, error_prefix)
        labels[name] = [as_text(value) for value in values if not isinstance(value, Unreadable)]
    _checked_classes(labels[options.source], labels[options.train], options, error_prefix)


def probe(evaluator: Evaluator, options: Probe, error_prefix: str) -> tuple[list[Probed], ReadableRows, ReadableRows]:
    """Fits both classifiers to the training rows and predicts the classes of the test rows.

    C is chosen by cross-validation within the training rows, so the test rows decide on nothing. Returns the
    predictions of each classifier, the test rows and the training rows that could be read. UserError if these do not
    fulfill the conditions of `check`.
    """
    test_ND, test_labels, test_rows = _read(evaluator, options, error_prefix, options.source)
    train_ND, train_labels, train_rows = _read(evaluator, options, error_prefix, options.train)
    classes = _checked_classes(test_labels, train_labels, options, error_prefix)
    index = {label: i for i, label in enumerate(classes)}
    test_N = np.array([index[label] for label in test_labels], np.int64)
    train_N = np.array([index[label] for label in train_labels], np.int64)
    linear_N, c = run_on_rank_zero(lambda: linear(train_ND, train_N, test_ND))
    near_N = run_on_rank_zero(lambda: nearest_neighbors(train_ND, train_N, test_ND, options.k))
    (query,) = options.inputs
    probed = partial(Probed, query, options.label, classes=classes, truth=test_N)
    answers = [
        probed(kind="linear", predicted=linear_N, setting={"C": c}),
        probed(kind="kNN", predicted=near_N, setting={"k": options.k}),
    ]
    return answers, test_rows, train_rows


def _read(
    evaluator: Evaluator, options: Probe, error_prefix: str, source: str
) -> tuple[np.ndarray, list[Any], ReadableRows]:
    """The features (N, D) and labels of the rows of a source that can be read."""
    vectors, labels, readable = evaluator.encode_labelled(options, error_prefix, evaluator.tables[source], None)
    features_ND = vectors.double().cpu().numpy()
    if not np.isfinite(features_ND).all():
        raise UserError(f"{error_prefix}: the encoder's features of source {source} are not finite")
    return features_ND, [as_text(label) for label in labels], readable


def linear(train_ND: np.ndarray, class_N: np.ndarray, test_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """The predictions (N,) of logistic regression, and its C. Of equally good C, the strongest penalty is chosen."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(min(FOLDS, int(np.bincount(class_N).min())), shuffle=True, random_state=0)
    # The scaler is validated, too, so it sees only the training examples of a fold.
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITER))
    search = GridSearchCV(pipeline, {"logisticregression__C": C_CANDIDATES}, cv=folds)
    with warnings.catch_warnings():
        # A weak penalty may need more than MAX_ITER iterations. Its result is compared as it is.
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(train_ND, class_N)
    return search.predict(test_ND), search.best_params_["logisticregression__C"]


def nearest_neighbors(train_ND: np.ndarray, class_N: np.ndarray, test_ND: np.ndarray, k: int) -> np.ndarray:
    """The predictions (N,) by the `k` nearest training examples."""
    train_ND = _unit_vectors(train_ND)
    classes = int(class_N.max()) + 1
    predicted = []
    for block_MD in np.array_split(_unit_vectors(test_ND), 1 + len(test_ND) * len(train_ND) // MAX_SIMILARITIES):
        similarity_MN = block_MD @ train_ND.T
        nearest_MK = np.argpartition(-similarity_MN, k - 1, axis=1)[:, :k]
        vote_MK = np.exp(np.take_along_axis(similarity_MN, nearest_MK, axis=1) / TEMPERATURE)
        votes = np.zeros((len(block_MD), classes))
        np.add.at(votes, (np.arange(len(block_MD))[:, None], class_N[nearest_MK]), vote_MK)
        predicted.append(votes.argmax(1))
    return np.concatenate(predicted)


def _unit_vectors(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True).clip(1e-12)


def _checked_classes(test: list[Any], train: list[Any], options: Probe, error_prefix: str) -> list[Any]:
    """The sorted classes of the training rows. UserError if the rows do not fulfill the conditions of `check`."""
    examples = Counter(train)
    source = f"{error_prefix}: source {options.train}"
    for label in sort_classes({*test}):
        if label not in examples:
            # If such rows counted as errors, the metrics would measure the split and not the model.
            missing = f"no example of class {label!r} of source {options.source}"
            raise UserError(f"{source} has {missing}; leave it out with where, or train on it too")
    classes = sort_classes(examples)
    if len(classes) < 2:
        raise UserError(f"{source} has {counted(len(classes), 'class')}; a probe needs two")
    for label in classes:
        if examples[label] < 2:
            raise UserError(f"{source} has a single example of class {label!r}; a probe needs two of each")
    if len(train) < options.k:
        count = counted(len(train), "example")
        raise UserError(f"{error_prefix}: k is {options.k}, but source {options.train} has {count}")
    return classes
