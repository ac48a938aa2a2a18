"""A plan as an HTML page: one file that needs no other, for a browser, a ticket or a mail.

The page is the template `plan.html.jinja`; here are the filters that write its numbers.
"""

from typing import Any

import jinja2

from vit_dist.plan.report import UNKNOWN, gib, say_ms


def page(plan: dict[str, Any]) -> str:
    """Returns the page of what `plan` returned. Any number in it may be None and is then shown as unknown."""
    by_time = sorted(
        plan["collectives"], key=lambda row: (-(row["ms"] or 0), -(row["bytes"] or 0) * (row["count"] or 0))
    )
    return _TEMPLATES.get_template("plan.html.jinja").render(plan=plan, collectives=by_time)


def _bytes(size: int | None) -> str:
    return UNKNOWN if size is None else gib(size)


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def _percent_of(value: float, total: float) -> str:
    """Returns `value` as a share of `total` for CSS; 0 where it is negative or there is no total."""
    return f"{max(value, 0) / total * 100 if total else 0:.3f}%"


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("vit_dist.plan", ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,  # a misspelt key is an error, not an empty cell
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"bytes": _bytes, "ms": say_ms, "number": _number, "percent_of": _percent_of}
