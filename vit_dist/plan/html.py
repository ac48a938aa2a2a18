"""A plan as a page: one file that needs no other, for a browser, a ticket or a mail.

Bars are boxes whose width is a share of the row, so that the page has no script and prints as it looks.
"""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from vit_dist.plan.report import gib, say_ms

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1d2126; --soft: #667080; --line: #dfe2e6;
  --good: #1a7f4b; --bad: #c0362c; --bar: #3f74c9; --binds: #d9822b; --step: #5b4b9a; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --card: #1d2126; --ink: #e8eaed; --soft: #9aa4b2;
  --line: #343a42; --good: #4cc38a; --bad: #ff7b6e; --bar: #6c9be6; --binds: #e8a25c; --step: #a292e0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.05rem; margin: 0 0 .75rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1.1rem 1.25rem;
  margin-top: 1rem; overflow-x: auto; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); } p { margin: .25rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem; margin: 0; }
.figures dt { color: var(--soft); font-size: .85rem; } .figures dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.bar { position: relative; display: flex; height: 1.75rem; background: var(--line); border-radius: .3rem;
  overflow: hidden; }
.bar > div { height: 100%; flex: none; }
.headroom { background: repeating-linear-gradient(45deg, transparent 0 6px, var(--card) 6px 8px);
  border-left: 2px solid var(--good); }
.bar > .limit { position: absolute; top: 0; bottom: 0; width: 3px; background: var(--bad); }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.25rem; margin: .75rem 0 0; padding: 0; list-style: none; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem; }
.time { display: grid; grid-template-columns: 8rem 1fr 7rem; gap: .75rem; align-items: center; margin: .4rem 0; }
.time .bar { height: 1.1rem; } .time .number { text-align: right; }
.bound { background: var(--bar); } .binds { background: var(--binds); } .step { background: var(--step); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; } .number { text-align: right; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
"""

# One for each part of the memory, in their order; told apart in grey too, and on both backgrounds.
_COLOURS = ("#2f5fb3", "#d9822b", "#7a5fc0", "#3a9a8f", "#8a93a0", "#c44e7a", "#a8a03a", "#5aa0d8")
_NOT_KNOWN = "unknown"


def page(plan: dict[str, Any]) -> str:
    """The page of what `plan` returned; any number of it may be None, for not known."""
    parts = [_heading(plan), _figures(plan), _memory(plan), _time(plan), _collectives(plan)]
    if "ranking" in plan:
        parts += [_ranking(plan), _fallen(plan)]
    parts.append(_small_print(plan))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Plan for {_text(plan['target'])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _heading(plan: dict[str, Any]) -> str:
    mesh = " × ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    what = f"{_count(plan['devices'])} × {plan['device_kind']} as {mesh}, batch {_count(plan['batch_size'])}"
    return f'<header><h1>{_text(plan["target"])}</h1><p class="soft">{_text(what)}</p>{_verdict(plan)}</header>'


def _verdict(plan: dict[str, Any]) -> str:
    spare = plan["headroom_bytes"]
    if plan["fits"] is None:
        return '<p class="verdict">Whether it fits is not known: the memory of this device is not.</p>'
    if plan["fits"]:
        return f'<p class="verdict good">It fits, with {_size(spare)} of a device to spare.</p>'
    short = _size(None if spare is None else -spare)
    return f'<p class="verdict bad">It does not fit: a device would need {short} more.</p>'


def _figures(plan: dict[str, Any]) -> str:
    figures = {
        "a step": say_ms(plan["step_ms"]),
        "images a second": _count(plan["images_per_second"]),
        "MFU": _NOT_KNOWN if plan["mfu"] is None else f"{plan['mfu']:.1%}",
        "memory of a device": _size(plan["peak_bytes"]),
        "steps": _count(plan["steps"]),
        "hours": _decimal(plan["hours"]),
        "device-hours": _decimal(plan["device_hours"]),
    }
    items = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in figures.items())
    return f'<section><dl class="figures">{items}</dl></section>'


def _memory(plan: dict[str, Any]) -> str:
    """The parts of a device's memory side by side, over all that it has; or over the parts, where they are more."""
    parts = {name: size or 0 for name, size in plan["memory"].items()}
    peak, has = sum(parts.values()), plan["device_bytes"]
    scale = max(peak, has or 0)
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(parts)}
    boxes = [
        f'<div class="part" style="width:{_percent(size, scale)};background:{colours[name]}" '
        f'title="{_text(name)}: {_size(size)}"></div>'
        for name, size in parts.items()
    ]
    key = [
        f'<li><i style="background:{colours[name]}"></i>{_text(name)} <b>{_size(size)}</b></li>'
        for name, size in parts.items()
    ]
    if has is not None and has > peak:
        boxes.append(f'<div class="headroom" style="width:{_percent(has - peak, scale)}" title="headroom"></div>')
        key.append(f"<li>headroom <b>{_size(has - peak)}</b></li>")
    elif has is not None:
        boxes.append(f'<div class="limit" style="left:{_percent(has, scale)}" title="what the device has"></div>')
    of = "" if has is None else f" of {_size(has)} that a program may use"
    said = f"{_size(peak)}{of}"
    return (
        f'<section id="memory"><h2>Memory of a device</h2><p>{said}</p>'
        f'<div class="bar" role="img" aria-label="{said}">{"".join(boxes)}</div>'
        f'<ul class="key">{"".join(key)}</ul></section>'
    )


def _time(plan: dict[str, Any]) -> str:
    """The lower bounds of a step and the step itself, all to one scale."""
    bounds, step = plan["bounds_ms"], plan["step_ms"]
    scale = max((value for value in (*bounds.values(), step) if value is not None), default=0.0)
    rows = [
        _time_row(name, "binds" if name == plan["binds"] else "bound", bound, scale) for name, bound in bounds.items()
    ]
    rows.append(_time_row("step, likely", "step", step, scale))
    wires = ", ".join(f"{_text(link)} {say_ms(busy)}" for link, busy in plan["network_ms"].items())
    wires = f'<p class="soft">Network by wire: {wires}.</p>' if wires else ""
    return (
        '<section id="time"><h2>Time of a step</h2><p class="soft">How long each would take alone, at its full rate; '
        f"and the step as it is likely to be.</p>{''.join(rows)}{wires}</section>"
    )


def _time_row(name: str, kind: str, value: float | None, scale: float) -> str:
    box = "" if value is None else f'<div class="{kind}" style="width:{_percent(value, scale)}"></div>'
    bar = f'<div class="bar" role="img" aria-label="{_text(name)}: {say_ms(value)}">{box}</div>'
    binds = ", binds" if kind == "binds" else ""
    return f'<div class="time"><span>{_text(name)}{binds}</span>{bar}<span class="number">{say_ms(value)}</span></div>'


def _collectives(plan: dict[str, Any]) -> str:
    by_time = sorted(
        plan["collectives"], key=lambda one: (-(one["ms"] or 0), -(one["bytes"] or 0) * (one["count"] or 0))
    )
    rows = [
        (
            one["kind"],
            " × ".join(one["axes"]) or "–",
            _size(one["bytes"]),
            _count(one["count"]),
            one["link"] or "–",
            one["crosses"] or "–",
            say_ms(one["ms"]),
        )
        for one in by_time
    ]
    header = ("collective", "over", "bytes", "times a step", "by", "crosses", "time a step")
    return _table("collectives", "Who transfers", header, rows, numbers=(2, 3, 6))


def _ranking(plan: dict[str, Any]) -> str:
    rows = [
        (
            str(place),
            " ".join(one["overrides"]) or "as it is",
            say_ms(one["step_ms"]),
            _size(one["peak_bytes"]),
            say_ms(one["compiled_step_ms"]) if one["compiled_step_ms"] is not None else "–",
            one["note"] or "",
        )
        for place, one in enumerate(plan["ranking"], start=1)
    ]
    header = ("", "layout", "a step, estimated", "memory", "compiled", "")
    return _table("ranking", "Layouts, the quickest first", header, rows, numbers=(2, 3, 4))


def _fallen(plan: dict[str, Any]) -> str:
    rows = [(_count(one["count"]), one["reason"], one["example"] or "") for one in plan["fallen"]]
    return _table("fallen", "Layouts that fall", ("how many", "because", "such as"), rows, numbers=(0,))


def _small_print(plan: dict[str, Any]) -> str:
    reached = ", ".join(f"{name} {share:.0%}" for name, share in plan["efficiencies"].items())
    lines = [f"The likely step takes these shares of the full rates to be reached: {reached}."]
    names = {"model": "of the model", "hardware": "as computed, with what is computed twice"}
    flops = (
        f"{count / 1e12:,.4g} {names.get(which, which)}" for which, count in plan["flops"].items() if count is not None
    )
    lines.append(f"TFLOP of a step over all devices: {', '.join(flops) or _NOT_KNOWN}.")
    if plan["compile_seconds"] is not None:
        lines.append(f"Compiled in {plan['compile_seconds']:,.0f} s.")
    said = "".join(f"<p>{_text(line)}</p>" for line in lines)
    asked = " ".join(f"--config.{one}" for one in plan.get("overrides") or ())
    asked = f"<p>To train so, add: <code>{_text(asked)}</code></p>" if asked else ""
    return f'<section id="about" class="soft">{asked}{said}</section>'


def _table(
    name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Iterable[int]
) -> str:
    """A section with a table, nothing where it has no rows; numbers: the columns to be set to the right."""
    if not rows:
        return ""
    right = set(numbers)

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = (' class="number"' if i in right else "" for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{mark}>{_text(cell)}</{tag}>" for mark, cell in zip(marks, cells)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return (
        f'<section id="{name}"><h2>{_text(title)}</h2>'
        f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table></section>"
    )


def _percent(part: float, whole: float) -> str:
    """A part of the whole as a width; never below nothing."""
    return f"{max(part, 0) / whole * 100 if whole else 0:.3f}%"


def _size(value: int | None) -> str:
    return _NOT_KNOWN if value is None else gib(value)


def _count(value: float | None) -> str:
    return _NOT_KNOWN if value is None else f"{value:,.0f}"


def _decimal(value: float | None) -> str:
    return _NOT_KNOWN if value is None else f"{value:,.1f}"


def _text(value: Any) -> str:
    return html.escape(str(value))
