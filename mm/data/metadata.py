"""Metadata in front of documents: where a text is from, read and not learned (MeCo, arXiv 2501.01956).

A sequence is begin of text + `prefix` + value + `suffix` + document + end of text. What stands in front is tokenised
apart from the document; the loss is on the document and its end, so that the first token of a document is predicted
from the last one of its metadata.
"""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from mm.data.sample import Metadata
from mm.data.shards import in_root
from mm.errors import ConfigError, DataError
from mm.settings import Number, Section

UNKNOWN = "unknown"


class MetadataConfig(Section):
    """What stands in front of the documents of a source and is read, not learned. Documents without it stay plain."""

    field: str = "url"
    """The field of a document that it is made of. Documents where it is absent or empty count as `no_metadata`."""
    take: Literal["host", "domain", "suffix", "value", "hash"] = "host"
    """What of it. Of addresses: `host` (`en.wikipedia.org`), `domain` (`wikipedia.org`), `suffix` (`org`), and `hash`,
    16 hex digits of the host, which tell sites apart and say nothing else. `value`: all of it. MeCo: `host`."""
    prefix: str = "URL: "
    """Text in front of the value. By default MeCo's."""
    suffix: str = "\n\n"
    """Text behind the value. By default MeCo's."""
    fixed: str | None = None
    """This value for every document, whatever its fields are."""
    known: str = ""
    """A file of values, one a line: others become `unknown`. `{root}` in it is `data.root`."""
    share: Number = Field(default=1, ge=0, le=1)
    """Share of the documents that have it, drawn anew for each visit."""

    @model_validator(mode="after")
    def _says_something(self) -> "MetadataConfig":
        plain = type(self).model_fields
        others = [name for name in ("field", "take", "known") if getattr(self, name) != plain[name].default]
        if self.fixed is not None and (others or not self.fixed):
            beside = f", and leave out {', '.join(others)}" if others else ""
            raise ValueError(f"fixed: is the value of every document as it stands; give it some text{beside}")
        return self

    def spelt(self, value: str) -> Metadata:
        """A value as it stands in front of a document."""
        return Metadata(f"{self.prefix}{value}{self.suffix}")

    def asked(self, value: str) -> Metadata:
        """What stands in front of a prompt: a field's value, made into metadata as those of documents are.

        Raises `ConfigError` where nothing of it is left.
        """
        found = MetadataReader(self, "").of({self.field: value})
        if not found.text:
            raise ConfigError(
                f"metadata {value!r}: the model was trained with take: {self.take}, which leaves nothing of it; give a "
                "value as documents have it, such as https://en.wikipedia.org/wiki/Cat"
            )
        return found


class MetadataReader:
    """Finds the metadata of documents among their fields."""

    def __init__(self, config: MetadataConfig, root: str) -> None:
        self._config = config
        self._known: frozenset[str] | None = None
        self.elsewhere: tuple[str, ...] = ()
        """What decides values besides fields and settings, for the name of a packed set."""
        if config.known:
            path = Path(in_root(config.known, root))
            try:
                data = path.read_bytes()
                self._known = frozenset(filter(None, map(str.strip, data.decode("utf-8-sig").splitlines())))
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path}: not a file of values, one a line ({error})") from None
            self.elsewhere = (hashlib.blake2b(data, digest_size=8).hexdigest(),)
        if config.take in ("domain", "suffix") and config.fixed is None:
            _public_suffixes()
            self.elsewhere += (f"tldextract {version('tldextract')}",)

    def of(self, fields: dict[str, Any]) -> Metadata:
        """The metadata of a document; without text where it has none."""
        config = self._config
        if config.fixed is not None:
            return config.spelt(config.fixed)
        given = fields.get(config.field)
        if isinstance(given, list):
            given = ", ".join(map(str, given))
        value = "" if given is None else taken(str(given).strip(), config.take)
        if not value:
            return Metadata("")
        return config.spelt(value if self._known is None or value in self._known else UNKNOWN)


def taken(value: str, take: str) -> str:
    """`https://en.wikipedia.org/wiki/Cat` -> `en.wikipedia.org`, `wikipedia.org`, `org`; empty where there is none."""
    if take == "value":
        return value
    try:
        host = urlsplit(value if "://" in value else f"//{value}").hostname or ""
    except ValueError:  # brackets that do not belong in an address
        return ""
    if not host or take == "host":
        return host
    if take == "hash":
        return hashlib.blake2b(host.encode(), digest_size=8).hexdigest()
    found = _public_suffixes()(host)
    if take == "suffix":
        return found.suffix
    return f"{found.domain}.{found.suffix}" if found.domain and found.suffix else ""


@cache
def _public_suffixes() -> Any:
    """The list of public suffixes that comes with tldextract: nothing is fetched."""
    try:
        from tldextract import TLDExtract
    except ImportError:
        raise ConfigError(
            "metadata.take: domain and suffix need public suffixes: pip install 'mm-pretrain[urls]', or take host"
        ) from None
    return TLDExtract(suffix_list_urls=(), cache_dir=None)
