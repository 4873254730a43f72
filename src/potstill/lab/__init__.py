"""Three tiny real models that come with the package, so that everything can be tried without a hub or a GPU.

- `teacher` answers the arithmetic task nearly always.
- `student` has the same tokenizer, writes the same working, and slips in most of its answers.
- `foreign` has another tokenizer, several notations for the working, and continues the student's from any character.

`potstill.lab.build` makes them again from a seed. Needs no torch.
"""

from difflib import get_close_matches
from pathlib import Path

from potstill.errors import ConfigError

MODELS = Path(__file__).parent / "models"
NAMES = ("teacher", "student", "foreign")


def model_path(name: str) -> Path:
    """The directory of a bundled model, for `from_pretrained`.

    Raises:
        ConfigError: There is no such model.
    """
    if name not in NAMES:
        close = get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "write one of those, or the path of a model"
        raise ConfigError(f"the lab has no model {name!r}, only {', '.join(NAMES)}; {hint}")
    return MODELS / name
