"""Verifiers: is an answer right?"""

from potstill.verifiers.base import Verifier
from potstill.verifiers.exact import Exact
from potstill.verifiers.math import Math

__all__ = ["Exact", "Math", "Verifier"]
