"""Three tiny real models that come with the package, so that everything can be tried without a hub or a GPU.

- `teacher` answers the arithmetic task nearly always.
- `student` has the same tokenizer, writes the same working, and slips in most of its answers.
- `foreign` has another tokenizer, several notations for the working, and continues the student's from any character.

`potstill.lab.build` makes them again from a seed. Needs no torch.
"""

from pathlib import Path

from potstill.errors import ConfigError, unknown

MODELS = Path(__file__).parent / "models"
NAMES = ("teacher", "student", "foreign")


def model_path(name: str) -> Path:
    """The directory of a bundled model, for `from_pretrained`.

    Raises:
        ConfigError: There is no such model.
    """
    if name not in NAMES:
        raise ConfigError(unknown("lab model", name, NAMES))
    return MODELS / name
