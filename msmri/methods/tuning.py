"""Choice of a method's regularisation weight on validation scans, and on nothing else."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.metrics import LOWER_IS_BETTER, psnr
from msmri.tensors import generators

Method = TypeVar("Method")


def tune(
    method: Method,
    measurements: Sequence[Measurement],
    *,
    metric: Callable[[Any, Any], float] = psnr,
    grid: Sequence[float] | None = None,
    field: str | None = None,
    refinements: int = 8,
    seed: int = 0,
) -> tuple[Method, list[dict[str, Any]]]:
    """Choose the weight that is best on average over the slices of the validation scans given, and only those.

    The grid is evaluated first; then Brent's bounded search refines the logarithm of the weight between the two grid
    neighbours of the best value, unless it is a whole number. Every candidate sees the same scans and the same seeds.
    The method never sees a target.

    Parameters
    ----------
    method
        A frozen dataclass with a class attribute ``tunable``, as the built-in ones.
    measurements
        Validation scans, each with its ``target``; never the scans to be reported.
    metric
        ``(target, image) -> float`` on magnitudes of one slice; the larger the better, except the package's own
        ``mse`` and ``nmse``.
    grid
        Positive values to start from; those of ``method.tunable`` without it.
    field
        Which field to choose; the first of ``method.tunable`` without it.
    refinements
        At most so many evaluations after the grid.
    seed
        For methods that draw random numbers.

    Returns
    -------
    tuple
        The method with the best weight, and the table of all evaluations in ascending weight: rows with the field,
        the mean metric, the number of slices and the stage (``grid`` or ``refined``).

    Raises
    ------
    InputError
        If a scan has no target, if the method has nothing to choose, or if the grid is empty or not positive.

    Warns
    -----
    UserWarning
        If the best value lies at an end of the grid, where a better one may lie beyond.
    """
    from scipy.optimize import minimize_scalar

    field, weights = _search_space(method, field, grid)
    if not measurements or any(measurement.target is None for measurement in measurements):
        raise InputError("tuning needs validation scans with targets", mend="give fully sampled scans")
    label = getattr(metric, "__name__", "metric")
    sign = -1.0 if label in LOWER_IS_BETTER else 1.0
    table: dict[float, dict[str, Any]] = {}

    kind = int if isinstance(getattr(method, field), int) else float  # a number of iterations is not refined

    def loss(weight: float, stage: str) -> float:
        values = _scores(replace(method, **{field: kind(weight)}), measurements, metric, seed)  # type: ignore[type-var]
        mean = float(np.mean(values))
        table[weight] = {field: weight, label: mean, "slices": len(values), "stage": stage}
        return -sign * mean if math.isfinite(mean) else math.inf

    losses = [loss(weight, "grid") for weight in weights]
    best = int(np.argmin(losses))
    if best in (0, len(weights) - 1):
        end = "lower" if best == 0 else "upper"
        message = f"the best {field}, {weights[best]:g}, is at the {end} end of its grid: extend the grid"
        warnings.warn(message, stacklevel=2)
    around = (weights[max(best - 1, 0)], weights[min(best + 1, len(weights) - 1)])
    if refinements > 0 and around[0] < around[1] and kind is float:
        minimize_scalar(
            lambda exponent: loss(float(10**exponent), "refined"),
            bounds=(math.log10(around[0]), math.log10(around[1])),
            method="bounded",
            options={"maxiter": refinements, "xatol": 0.02},  # 5 % of the weight
        )
    rows = [table[weight] for weight in sorted(table)]
    chosen = max(rows, key=lambda row: sign * row[label] if math.isfinite(row[label]) else -math.inf)
    return replace(method, **{field: kind(chosen[field])}), rows  # type: ignore[type-var]


def _search_space(method: Any, field: str | None, grid: Sequence[float] | None) -> tuple[str, list[float]]:
    tunable: Mapping[str, Sequence[float]] = getattr(method, "tunable", {})
    name = getattr(method, "name", type(method).__name__)
    if not tunable:
        raise InputError(f"method '{name}' has no weight to tune")
    field = field if field is not None else next(iter(tunable))
    if field not in tunable:
        raise InputError(f"'{field}' of method '{name}' cannot be tuned", mend=f"tunable: {', '.join(tunable)}")
    weights = sorted({float(weight) for weight in (grid if grid is not None else tunable[field])})
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise InputError("the grid of weights must hold positive numbers", mend="for example 0.001, 0.01, 0.1")
    return field, weights


def _scores(method: Any, measurements: Sequence[Measurement], metric: Callable[[Any, Any], float], seed: int) -> list:
    values = []
    for measurement in measurements:
        blind = replace(measurement, target=None)
        images = method(blind, generators(seed, len(measurement.values))).magnitude
        assert measurement.target is not None
        values += [metric(target, image) for target, image in zip(measurement.target, images, strict=True)]
    return values
