"""A plan as an HTML page: one file that needs no other, for a browser, a ticket or a mail.

The page is the template `plan.html.jinja`; this module loads it and holds the filters that format its numbers.
"""

from typing import Any

import jinja2

from vit_dist.plan.report import UNKNOWN, bytes_text, ms_text


def page(plan: dict[str, Any]) -> str:
    """Returns the page of what `plan` returned. Any number in it may be None and is then shown as unknown."""
    by_time = sorted(
        plan["collectives"], key=lambda row: (-(row["ms"] or 0), -(row["bytes"] or 0) * (row["count"] or 0))
    )
    return _TEMPLATES.get_template("plan.html.jinja").render(plan=plan, collectives=by_time)


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def _percent_of(value: float, total: float) -> str:
    """Returns the share of `value` in `total` for CSS; 0 if the value is negative or the total is 0."""
    return f"{max(value, 0) / total * 100 if total else 0:.3f}%"


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("vit_dist.plan", ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,  # a misspelt key is an error, not an empty cell
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"bytes": bytes_text, "ms": ms_text, "number": _number, "percent_of": _percent_of}
