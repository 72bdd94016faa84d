"""Pages that need no other file and no network: tables, and plots drawn as SVG in the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqexport.errors import HostError, UsageError
from tqexport.files import ensure_folder
from tqexport.versions import COMPARING, versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "TEXT", "Plot", "check_report", "plot", "render_page"]

_START = b"<!doctype html"  # of every page
TEXT = "#010203"  # what the plots draw text and axes in, and the page replaces by its own colour
COLORS = ("#2f7ed8", "#e07b39", "#2ca58d", "#b05cc6")


@dataclass(frozen=True)
class Plot:
    """A drawing with its heading."""

    title: str
    note: str
    svg: str
    wide: bool = False


def check_report(path: Path) -> None:
    """Make sure that a report can be made and written, before any slow work.

    Raises:
        UsageError: Something else than a page is there.
        HostError: Jinja or matplotlib is missing, or the folder cannot be written.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise HostError(f"--report needs {error.name}: pip install 'tqexport[report]'") from error
    ensure_folder(path.parent)
    if path.exists():
        with path.open("rb") as stream:
            start = stream.read(len(_START))
        if start.lower() != _START:
            raise UsageError(f"{path} is there and is no report of an earlier run; name another file with --report")


def render_page(package: str | None, template: str, **values: Any) -> bytes:
    """A page as UTF-8.

    Args:
        package: The package that the template is in.
        template: Its name; it extends ``page.html.j2`` of this one.
        values: What is filled in.
    """
    import jinja2

    loaders = [jinja2.PackageLoader(name or "", ".") for name in (__package__, package)]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, undefined=jinja2.StrictUndefined
    )
    made_by = ", ".join(f"{name} {version}" for name, version in versions(COMPARING).items())
    return environment.get_template(template).render(versions=made_by, **values).encode(errors="replace")


def plot(title: str, note: str, draw: Callable[[Axes], None], *, wide: bool = False) -> Plot:
    """Draw a plot as SVG in the colours of the page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(9.5, 3.6) if wide else (4.6, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return Plot(title, note, svg.replace(TEXT, "currentColor"), wide)


@contextmanager
def _style() -> Iterator[None]:
    """The settings of matplotlib that the page wants."""
    import matplotlib as mpl

    settings: dict[str, Any] = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "tqexport",  # the same page for the same results
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.alpha": 0.2,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
        "grid.color": TEXT,
    }
    with mpl.rc_context(settings):  # type: ignore[arg-type]
        yield
