"""Prompts from Hugging Face data sets, on the hub or on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from potstill.errors import DataError, did_you_mean, require
from potstill.tasks.rows import Part, Row, Rows


class Hub(Rows, frozen=True):
    """Rows of a data set of the `datasets` library: "org/name", a folder of files, or a folder of `save_to_disk`."""

    kind: Literal["hub"] = "hub"
    path: str
    name: str | None = None
    """The data set's configuration, where it has several ("main" for openai/gsm8k)."""
    split: str = "train"
    """Training prompts; held-out ones too, unless they have a split of their own."""
    validation_split: str | None = None
    test_split: str | None = None

    def has(self, part: Part) -> bool:
        """Whether a split was named for this part."""
        return self._split(part) is not None

    def rows(self, part: Part) -> Iterator[Row] | None:
        """The rows of one split, each with `path[split]:row`; see `Rows.rows`."""
        split = self._split(part)
        return None if split is None else self._read(split)

    def _split(self, part: Part) -> str | None:
        return {"train": self.split, "validation": self.validation_split, "test": self.test_split}[part]

    def _read(self, split: str) -> Iterator[Row]:
        data = self._load()
        if split not in data:
            raise DataError(
                f"{self.path} has no split {split!r} ({did_you_mean(split, data)}the splits are "
                f"{', '.join(sorted(data))}); name one of them"
            )
        if len(data[split]) == 0:
            raise DataError(f"split {split!r} of {self.path} is empty; name one that has rows")
        for number, row in enumerate(data[split]):
            yield f"{self.path}[{split}]:{number}", row

    def _load(self) -> dict[str, Any]:
        """Every split by name; one saved alone is called `split`."""
        require("datasets", "hub", "task hub")
        from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

        saved = any((Path(self.path) / file).is_file() for file in ("state.json", "dataset_dict.json"))
        if saved and self.name is not None:
            raise DataError(
                f"name = {self.name!r} has no effect: {self.path} was written by save_to_disk, which keeps one "
                "configuration; leave it out"
            )
        try:
            data = load_from_disk(self.path) if saved else load_dataset(self.path, self.name)
        except (OSError, ValueError) as error:
            raise DataError(
                f"the data set {self.path!r} cannot be loaded: {error}; check the name and the connection, or give "
                "the path of a folder"
            ) from error
        if isinstance(data, Dataset):
            return {self.split: data}
        assert isinstance(data, DatasetDict)
        return {str(split): rows for split, rows in data.items()}
