"""Keys and addresses that cannot be sent, and what is said of them: never what they are."""

from pathlib import Path

import pytest

from potstill.errors import ConfigError
from potstill.teachers.keys import read_key
from potstill.teachers.settings import plain_url


@pytest.mark.parametrize("key", ["sécret", "sk-a—b", "a b", "a\x01b", "“quoted”", "a\x7fb"])
def test_a_key_that_no_header_holds_is_refused_and_not_shown(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINE", key)
    with pytest.raises(ConfigError, match="the environment variable MINE holds a key that cannot be sent") as caught:
        read_key("MINE", None, (), needed=True)
    assert key not in str(caught.value)
    file = tmp_path / "key"
    file.write_text(key, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"teacher.key_file = .*(cannot be sent|nothing else)") as caught:
        read_key(None, file, (), needed=True)
    assert key not in str(caught.value)


def test_a_file_that_is_no_text_holds_no_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"teacher.key_file = .* is no text. Give a file"):
        read_key(None, file, (), needed=True)


def test_a_key_is_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", " sk-AZaz09_.~+/==!\n")
    assert read_key("MINE", None, (), needed=True).reveal() == "sk-AZaz09_.~+/==!"


@pytest.mark.parametrize("host", ["a..b", ".a", "a" * 64, "a b", "%41", "[::1%25]:x", "a:99999", "a:x"])
def test_an_address_of_no_machine(host: str) -> None:
    with pytest.raises(ValueError, match=r"its (host|port) is no") as caught:
        plain_url(f"http://{host}/v1")
    assert host not in str(caught.value)


@pytest.mark.parametrize(
    "host", ["localhost", "a_b.c:1", "10.0.0.7:80", "[::1]:8123", "[fe80::1%eth0]", "gpu-box.", "tøst.example", "vm"]
)
def test_an_address_of_a_machine(host: str) -> None:
    assert plain_url(f"http://{host}/") == f"http://{host}"
