"""Probes: two plain classifiers on features of the frozen encoder, before any projection, tell what is in them.

The linear one is CLIP's (arXiv 2103.00020, section 3.2): logistic regression by scikit-learn's L-BFGS with an L2
penalty, on standardised features. The nearest neighbours are DINO's (arXiv 2104.14294, appendix F.1): by cosine, each
votes with weight exp(similarity / 0.07).

Shape suffixes: N examples, D width.
"""

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from openimp.common.errors import UserError
from openimp.common.modality import Modality
from openimp.data.tables import Table
from openimp.encoding.items import Progress, encode_input, require_columns
from openimp.evaluation.figures import Readable, accuracy, classes_in, readable_rows
from openimp.model.embedder import Embedder
from openimp.recipe.evaluation import Probe
from openimp.recipe.schema import Recipe

STRENGTHS = [10.0**power for power in range(-4, 4)]
"""Values of C, the inverse of the L2 penalty's weight, to choose from. CLIP sweeps it too: the best one depends on the
number of examples and the width by orders of magnitude, so a fixed one would favour some models."""
MAX_ITER = 1000
"""Of L-BFGS, a fit."""
FOLDS = 5
"""Parts of the training examples for that choice; fewer where a class has fewer examples."""
TEMPERATURE = 0.07
"""Of the neighbours' votes."""


@dataclass(frozen=True)
class Probed:
    """What one classifier answered.

    Attributes:
        query, target: the modality, and the column with the class.
        kind: "linear" or "kNN".
        classes: the labels, sorted.
        truth, predicted: (N,) int64, the class of each test example, and the answer.
        chosen: its setting, {"C": ...} or {"k": ...}.
    """

    query: str
    target: str
    kind: str
    classes: list[Any]
    truth: np.ndarray
    predicted: np.ndarray
    chosen: dict[str, Any]

    @property
    def task(self) -> str:
        """What a result calls it."""
        return f"{self.query} -> {self.target} ({self.kind})"

    def figures(self) -> dict[str, Any]:
        """Top-1 with its interval, the mean over the classes of their top-1, chance, and the classifier's setting."""
        return accuracy(self.predicted == self.truth, self.truth, len(self.classes)) | self.chosen


def probe(
    model: Embedder,
    recipe: Recipe,
    modalities: dict[str, Modality],
    name: str,
    test: Table,
    train: Table,
    progress: Progress | None = None,
) -> tuple[list[Probed], Readable, Readable]:
    """Fits both classifiers of one evaluation set, which `check` has passed, to `train` and asks them about `test`.

    Nothing of the test part decides on anything: C is chosen by cross-validation within the training part.

    Returns:
        What each classifier answered, and the rows of `test` and of `train` that counted.

    Raises:
        UserError: what is left without the rows that cannot be read would not pass, or a feature is not finite.
    """
    options = recipe.evaluation.sets[name]
    assert isinstance(options, Probe)
    where = f"evaluation.sets.{name}"
    test_ND, test_labels, tested = _read(model, recipe, modalities, options, where, test, progress)
    train_ND, train_labels, learned = _read(model, recipe, modalities, options, where, train, progress)
    classes = _classes(test_labels, train_labels, options, where)
    index = {label: i for i, label in enumerate(classes)}
    truth_N, known_N = (np.array([index[x] for x in labels], np.int64) for labels in (test_labels, train_labels))
    fitted_N, c = linear(train_ND, known_N, test_ND)
    near_N = neighbours(train_ND, known_N, test_ND, options.k)
    (seen,) = options.inputs
    answers = [
        Probed(seen, options.label, kind, classes, truth_N, predicted_N, chosen)
        for kind, predicted_N, chosen in (("linear", fitted_N, {"C": c}), ("kNN", near_N, {"k": options.k}))
    ]
    return answers, tested, learned


def check(modalities: dict[str, Modality], options: Probe, where: str, test: Table, train: Table) -> None:
    """Finds what would stop `probe`, without encoding anything.

    Raises:
        UserError: scikit-learn or a column is missing, a row has no class or a list of them, the training part has
            fewer than two classes, two examples of each, or `k`, or the test part has a class that it lacks.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError(f"{where}: a probe needs scikit-learn: pip install 'openimp[probe]'") from None
    ((seen, spec),) = options.inputs.items()
    for table in (test, train):
        require_columns(table, modalities[seen], spec, where)
        table.require([options.label], where)
    _classes(test.column(options.label), train.column(options.label), options, where)


def _read(
    model: Embedder,
    recipe: Recipe,
    modalities: dict[str, Modality],
    options: Probe,
    where: str,
    table: Table,
    progress: Progress | None,
) -> tuple[np.ndarray, list[Any], Readable]:
    """The features (N, D) and labels of the rows of a source that can be read."""
    (seen,) = options.inputs
    encoded = encode_input(model, recipe, modalities, options, seen, table, None, progress)
    labels = table.column(options.label)
    counted = readable_rows(table, [encoded], f"{where}: source {table.name}", labels)
    features = encoded.embeddings.double().cpu().numpy()[encoded.item[counted.row]]
    if not np.isfinite(features).all():
        raise UserError(f"{where}: the encoder's features of source {table.name} are not finite")
    return features, [labels[row] for row in counted.row], counted


def linear(train_ND: np.ndarray, class_N: np.ndarray, test_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """The answers (N,) of logistic regression, and its C; of equally good ones the strongest penalty."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(min(FOLDS, int(np.bincount(class_N).min())), shuffle=True, random_state=0)
    # The scaler is part of what is validated, so it too sees a fold's training examples only.
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITER))
    search = GridSearchCV(pipeline, {"logisticregression__C": STRENGTHS}, cv=folds)
    with warnings.catch_warnings():
        # Weak penalties may want more than MAX_ITER steps; how they do then is compared as it is.
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(train_ND, class_N)
    return search.predict(test_ND), search.best_params_["logisticregression__C"]


def neighbours(train_ND: np.ndarray, class_N: np.ndarray, test_ND: np.ndarray, k: int) -> np.ndarray:
    """The answers (N,) of the `k` nearest training examples."""
    from sklearn.neighbors import KNeighborsClassifier

    # A vote's weight is that of the similarity up to a factor, for a cosine distance is 1 - similarity.
    voters = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp(-distance / TEMPERATURE))
    return voters.fit(train_ND, class_N).predict(test_ND)


def _classes(test: list[Any], train: list[Any], options: Probe, where: str) -> list[Any]:
    """The classes of the training part, in order, if they will do for both parts."""
    found = []
    for labels, source in ((test, options.source), (train, options.train)):
        column = f"{where}: column {options.label!r} of source {source}"
        found.append(classes_in(labels, column))
        if None in found[-1]:
            raise UserError(f"{column} has {labels.count(None)} rows without a class")
    in_test, in_train = found
    examples = Counter(train)
    if len(in_train) < 2:
        raise UserError(f"{where}: source {options.train} has one class only, {in_train[0]!r}; a probe needs two")
    for label in in_test:
        if label not in examples:
            # Counted as errors, such rows would measure the split and not the model.
            raise UserError(
                f"{where}: source {options.train} has no example of class {label!r} of source {options.source}; "
                "leave it out with where, or train on it too"
            )
    for label in in_train:
        if examples[label] < 2:
            raise UserError(
                f"{where}: source {options.train} has a single example of class {label!r}; a probe needs two of each"
            )
    if len(train) < options.k:
        raise UserError(f"{where}: k is {options.k}, but source {options.train} has {len(train)} examples")
    return in_train
