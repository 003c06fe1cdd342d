"""Products of a step's quantities, such as batch · length · rank, in which formulas count bytes.

``formula.py`` finds here which product the size of each array is a multiple of. Knows no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations_with_replacement
from math import prod

import numpy as np

from qlab.core.graph.graph import Graph, Shape
from qlab.core.graph.sizes import QUANTITIES, Reference
from qlab.errors import UnsupportedError

Exponents = tuple[int, ...]
"""Of a product: the power of each of ``QUANTITIES``."""

RANK: Exponents = tuple(int(name == "rank") for name in QUANTITIES)
"""The product that is the rank alone."""

# roles of what grows with the rank; nearly so where all trained arrays are one vector, some of
# whose numbers (DoRA's lengths) do not
TRAINED = ("adapter", "optimizer", "gradients")
_DEGREE = 4  # of a product: no array has more axes that grow


def terms(values: tuple[int, ...], products: Sequence[Exponents]) -> np.ndarray:
    """Value of every product of quantities, float64 ``(products,)``."""
    each = [float(_value(values, exponents)) for exponents in products]
    return np.array(each)


def _value(values: tuple[int, ...], exponents: Exponents) -> int:
    powers = zip(values, exponents, strict=True)
    return prod(value**power for value, power in powers)


def all_products() -> list[Exponents]:
    """Every product of quantities up to a degree; the first is 1."""
    quantities = range(len(QUANTITIES))
    products = []
    for degree in range(_DEGREE + 1):
        for factors in combinations_with_replacement(quantities, degree):
            exponents = tuple(factors.count(i) for i in quantities)
            products.append(exponents)
    return products


def product_by_shape(
    pair: tuple[Graph, Graph],
    references: tuple[Reference, Reference],
    products: list[Exponents],
) -> dict[Shape, int]:
    """Return which product the size of each shape is a multiple of.

    Args:
        pair: graphs of a step at the two references.
        references: the sizes.
        products: what ``all_products`` returns.

    Returns:
        Index of the product by the shape at the first reference.

    Raises:
        UnsupportedError: the two graphs are not of one structure.
    """
    one, two = pair
    if not _is_same_structure(one, two):
        raise UnsupportedError("The step of this model changes its structure with its sizes.")
    first, second = (reference.sizes for reference in references)
    # the first of several products that grow alike
    by_growth: dict[Fraction, int] = {}
    for i, exponents in enumerate(products):
        at_first = _value(first, exponents)
        at_second = _value(second, exponents)
        growth = Fraction(at_second, at_first)
        by_growth.setdefault(growth, i)
    logs = np.log([float(growth) for growth in by_growth])
    indices = list(by_growth.values())
    rank = products.index(RANK)

    by_shape: dict[Shape, int] = {}
    for a, array in one.arrays.items():
        if array.shape in by_shape:
            continue
        growth = Fraction(1)
        if array.size:
            growth = Fraction(two.arrays[a].size, array.size)
        if growth in by_growth:
            by_shape[array.shape] = by_growth[growth]
        elif array.role in TRAINED:
            by_shape[array.shape] = rank
        else:
            distance = np.abs(logs - np.log(float(growth)))
            nearest = int(distance.argmin())
            by_shape[array.shape] = indices[nearest]
    return by_shape


def _is_same_structure(one: Graph, two: Graph) -> bool:
    if one.arrays.keys() != two.arrays.keys():
        return False
    operations = [node.name for node in one.nodes]
    return operations == [node.name for node in two.nodes]
