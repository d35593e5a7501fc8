"""Pages: one self-contained HTML file from a template in `mm/pages/`, readable offline and in light and dark.

The one idea: a page is a value. Pictures and charts go into it as data, colours are CSS variables that the
charts use too, and whatever comes from data is escaped by the template engine.
"""

import base64
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Charts are drawn in these colours, which stand for CSS variables of the page (pages/base.html.j2).
INK, SOFT, LINE, ACCENT, SECOND, BAD = "#000001", "#000002", "#000003", "#000004", "#000005", "#000006"
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", ACCENT: "accent", SECOND: "second", BAD: "bad"}
# Several lines in one chart: as many colours, of different lightness, so that print keeps them apart too.
SERIES = tuple(f"#0000{number:02x}" for number in range(16, 24))
_VARIABLES |= {colour: f"series-{number}" for number, colour in enumerate(SERIES)}

MIME = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
THUMBNAIL_BYTES = 16_000
THUMBNAIL_PIXELS = 128
MINUS, THIN = "−", "\u2009"


def render(template: str, **values: Any) -> str:
    """The page that `mm/pages/TEMPLATE` makes of the values. Everything but `Markup` is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mm", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "count": count,
        "short": short,
        "percent": percent,
        "duration": duration,
    }
    environment.filters.update(filters)
    return environment.get_template(template).render(**values)


def data_uri(data: bytes, mime: str) -> str:
    """The bytes as an address that needs no network."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def thumbnail(data: bytes, ext: str) -> str | None:
    """A picture as a data URI: its own bytes when they are few, else a small copy. None for a damaged one."""
    ext = ext.lower()
    if ext in MIME and len(data) <= THUMBNAIL_BYTES:
        return data_uri(data, MIME[ext])
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            small = picture.convert("RGB")
    except Exception:  # a page about data shows damaged pictures as gaps
        return None
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return data_uri(out.getvalue(), "image/jpeg")


def count(value: float) -> str:
    """1234567 -> 1,234,567"""
    return f"{value:,.0f}".replace("-", MINUS)


def short(value: float) -> str:
    """1234567 -> 1.23 M, with three figures; below ten thousand in full"""
    rounded = float(f"{value:.3g}")
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 9999.5 and abs(rounded) >= limit:
            return f"{rounded / limit:#.3g}".rstrip(".").replace("-", MINUS) + THIN + unit
    return count(value)


def percent(share: float, digits: int = 1) -> str:
    """0.1837 -> 18.4 %"""
    return f"{100 * share:.{digits}f}{THIN}%".replace("-", MINUS)


def duration(seconds: float) -> str:
    """5025 -> 1 h 24 min"""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def chart(width: int, height: int) -> tuple["Figure", "Axes"]:
    """An empty figure with one axes in the page's style; sizes in CSS pixels. Draw in `ACCENT`, `SOFT`, …"""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=11, labelcolor=SOFT, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(6 if width > 500 else 4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
    axes.yaxis.set_major_locator(MaxNLocator(4 if height < 300 else 6))
    axes.margins(x=0.01)
    return figure, axes


def svg(figure: "Figure", title: str) -> "Markup":
    """The figure as inline SVG with the page's width, font and colours. `title` is read out for it."""
    from markupsafe import Markup, escape
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    box = re.search(r'viewBox="[^"]*"', drawn)
    assert box is not None
    head = f'<svg class="chart" role="img" {box[0]}><title>{escape(title)}</title>'
    return Markup(re.sub(r"^<svg[^>]*>", lambda _: head, drawn))


def histogram(values: "np.ndarray", title: str, unit: str, share: bool = False) -> "Markup":
    """A chart of how often values occur; `share` writes them as per cent."""
    import numpy as np
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = float(values.min()), float(values.max())
    if share:
        edges = np.linspace(min(low, 0.9), 1.0, 41)
    else:
        width = max(1, int(np.ceil((high - low + 1) / 40)))
        edges = np.arange(low, high + width + 1, width) - 0.5
    figure, axes = chart(520, 190)
    axes.hist(values, bins=edges.tolist(), color=ACCENT, rwidth=0.86, linewidth=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: count(y)))
    if share:
        digits = 0 if low < 0.8 else 1
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: percent(x, digits)))
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(unit, color=SOFT, fontsize=11)
    return svg(figure, title)


def seconds_of_frames(about: dict[str, Any], frames: int) -> float:
    """How long so many positions of sound last, by the layout in a `dataset.json`; 0 where it takes none."""
    audio = about.get("layout", {}).get("audio")
    return seconds_of_samples(about, frames * audio["hop"]) if audio else 0.0


def seconds_of_samples(about: dict[str, Any], samples: int) -> float:
    """How long so many samples of sound last at the rate of the layout in a `dataset.json`; 0 where it takes none."""
    audio = about.get("layout", {}).get("audio")
    return samples / audio["sampling_rate"] if audio else 0.0


def ledger_rows(about: dict[str, Any], written: dict[str, dict[str, int]] | None = None) -> list[dict[str, Any]]:
    """Per source, the counts of a `dataset.json` and `open`: the sums that do not close (empty when all do).

    `written`: the same counts by source, as found in the packs themselves, to hold the ledger against.
    """
    visits = about["settings"]["visits"]
    rows = []
    for source, n in about["ledger"].items():
        tokens = n["segment_tokens"]
        media = sum(n[f"{kind}_tokens"] for kind in ("image", "audio", "video"))
        sums = {
            "(samples − filtered − quarantined) × visits + extra pieces = segments + too long + unlearned": (
                (n["samples"] - n["filtered"] - n["quarantined"]) * visits + n["pieces"],
                n["segments"] + n["too_long"] + n["unlearned"],
            ),
            "text + media tokens = segment tokens": (n["text_tokens"] + media, tokens),
            "learned + masked tokens = segment tokens": (n["loss_tokens"] + n["masked_tokens"], tokens),
        }
        if written is not None:
            for name, found in written[source].items():
                sums[f"{name} in the ledger = {name} in the packs"] = (n[name], found)
        broken = [f"{name}: {count(a)} ≠ {count(b)}" for name, (a, b) in sums.items() if a != b]
        seconds = seconds_of_samples(about, n["audio_samples"])
        rows.append({**n, "source": source, "audio_seconds": seconds, "sums": len(sums), "open": broken})
    return rows
