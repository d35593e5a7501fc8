"""What one sample may cost to look at: bounds that keep a hostile or broken file from taking memory or time."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Samples beyond any of these are bad samples; see `data.max_…` in the configuration."""

    pixels: int = 100_000_000
    """Of a picture or of a frame."""
    seconds: float = 14_400.0
    """Of a recording or clip."""
    media_bytes: int = 2_000_000_000
    """Of one encoded picture, recording or clip."""
    json_bytes: int = 64_000_000
    """Of the JSON or text of one sample, pictures in base64 included."""
    text_chars: int = 8_000_000
    """Of all text of one sample."""
