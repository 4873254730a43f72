"""potstill: on-policy distillation of language models."""

from typing import TYPE_CHECKING, Any

from potstill.run import Run, load_run

if TYPE_CHECKING:
    from potstill.comparison import compare
    from potstill.loop import train

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "compare", "load_run", "train"]


def __getattr__(name: str) -> Any:
    """`train` and `compare` are imported when they are asked for: training needs torch, and reading a run does not."""
    if name == "train":
        from potstill.loop import train

        return train
    if name == "compare":
        from potstill.comparison import compare

        return compare
    raise AttributeError(f"module 'potstill' has no attribute {name!r}")
