"""What bounds the error of a sum of products, whoever computes it."""

from __future__ import annotations

GENEROUS = 1 + 2.0**-10  # times a bound: for the roundings in computing the bound itself
ROUNDOFF = {4: 2.0**-24, 8: 2.0**-53}  # by bytes of the dtype: half the distance from 1 to the next number
MOST_TERMS = 1 << 12  # of a sum in float32: of more, roundings of its bound would count
TINIEST = {4: 2.0**-124, 8: 2.0**-960}  # more than underflow takes from a number
