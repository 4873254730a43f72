"""phi(a, b) in [0, 1]: how alike two texts are; 1 for equal ones. Used by OmniOPD's soft count (Eq. 3).

Two empty texts are equal (1); an empty and a non-empty one share nothing (0). White space around a text is part of it.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from rapidfuzz.distance import Levenshtein

from potstill.errors import ConfigError, require, unknown

Similarity = Callable[[str, str], float]


def edit(a: str, b: str) -> float:
    """1 - edit distance / longer length, in characters (the paper's default)."""
    return Levenshtein.normalized_similarity(a, b)


def exact(a: str, b: str) -> float:
    """1 for equal texts, else 0."""
    return float(a == b)


def token_f1(a: str, b: str) -> float:
    """F1 of the two bags of words, cut at white space; case counts."""
    x, y = a.split(), b.split()
    if not x or not y:
        return float(x == y)
    common = (Counter(x) & Counter(y)).total()
    return 2 * common / (len(x) + len(y))


def rouge1(a: str, b: str) -> float:
    """ROUGE-1 F1 by `rouge_score`: lower-cased words of letters and digits, no stemming."""
    return _rouge().score(a, b)["rouge1"].fmeasure if a != b else 1.0


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=False)


@cache
def _embedding(model: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model)


def embedding(a: str, b: str, model: str = "sentence-transformers/all-MiniLM-L6-v2") -> float:
    """Cosine of two sentence embeddings, negative ones as 0. `model` is a path or a hub name."""
    if not a or not b:
        return float(a == b)
    x, y = _embedding(model).encode([a, b], normalize_embeddings=True, show_progress_bar=False)
    return min(max(float(x @ y), 0.0), 1.0)


_ALL: dict[str, Similarity] = {f.__name__: f for f in (edit, rouge1, exact, token_f1, embedding)}
NAMES = tuple(_ALL)


def get(name: str) -> Similarity:
    """The similarity of that name: `edit`, `rouge1`, `exact`, `token_f1`, `embedding`. Raises ConfigError for another."""
    if name == "embedding":
        require("sentence_transformers", "embedding", "similarity 'embedding'")
    if name not in _ALL:
        raise ConfigError(unknown("similarity", name, NAMES))
    return _ALL[name]
