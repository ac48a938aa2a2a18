"""The page: its content, the widths of its bars, and that no text on it is read as markup."""

import copy
import html.parser
import re

import pytest

from vit_dist.plan.html import page

GIB = 2**30
UNKNOWN_LINK = {"link": None, "crosses": None, "ms": None}
PLAN = {
    "target": "v5e:4x4",
    "device_kind": "TPU v5 lite",
    "devices": 16,
    "mesh": {"data": 2, "fsdp": 8},
    "batch_size": 4096,
    "fits": True,
    "peak_bytes": 8 * GIB,
    "device_bytes": 16 * GIB,
    "headroom_bytes": 8 * GIB,
    "memory": {
        "parameters": 1 * GIB,
        "optimizer": 2 * GIB,
        "ema": 0,
        "batch": GIB // 2,
        "temporaries": 4 * GIB,
        "code": GIB // 2,
    },
    "flops": {"model": 2e14, "hardware": 3e14},
    "bounds_ms": {"arithmetic": 80.0, "memory": 40.0, "network": 10.0},
    "binds": "arithmetic",
    "network_ms": {"ICI": 10.0, "network": 2.0},
    "efficiencies": {"arithmetic": 0.7, "memory": 0.8, "network": 0.9},
    "step_ms": 160.0,
    "images_per_second": 25600.0,
    "mfu": 0.4321,
    "steps": 90000,
    "hours": 4.0,
    "device_hours": 64.0,
    "compile_seconds": 21.4,
    "collectives": [
        {"kind": "permute", "axes": [], "bytes": 10, "count": 1, "exposed": 1, **UNKNOWN_LINK},
        {
            "kind": "all-gather",
            "axes": ["fsdp"],
            "bytes": GIB,
            "count": 24,
            "exposed": 2,
            "link": "ICI",
            "crosses": None,
            "ms": 3.0,
        },
        {
            "kind": "all-reduce",
            "axes": ["data"],
            "bytes": 5,
            "count": 1,
            "exposed": 0,
            "link": "network",
            "crosses": "slices",
            "ms": 7.0,
        },
    ],
}
SEARCHED = PLAN | {
    "overrides": ["mesh.fsdp=8", "model.remat=names"],
    "ranking": [
        {
            "overrides": ["mesh.fsdp=8"],
            "step_ms": 160.0,
            "compiled_step_ms": 170.0,
            "peak_bytes": 8 * GIB,
            "note": "the choice",
        },
        {"overrides": [], "step_ms": 200.0, "compiled_step_ms": None, "peak_bytes": 20 * GIB, "note": ""},
    ],
    "fallen": [{"reason": "does not fit", "count": 12, "example": "mesh.data=16"}],
}
NEED_NO_END = {"meta", "br", "link", "img"}


class Reader(html.parser.HTMLParser):
    """Every element with its attributes and text, and whether all that begin end in their order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.all_text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})
        if tag not in NEED_NO_END:
            self.open.append((tag, len(self.elements) - 1))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, index in self.open:
            self.elements[index]["text"] += data
        if all(tag != "style" for tag, _ in self.open):
            self.all_text += data

    def having(self, tag, **attributes):
        return [one for one in self.elements if one["tag"] == tag and attributes.items() <= one.items()]

    def one(self, tag, **attributes):
        [found] = self.having(tag, **attributes)
        return found

    def classed(self, name):
        return [one for one in self.elements if name in (one.get("class") or "").split()]

    def rows(self, section):
        """The cells of the table in the section of this id."""
        text = re.search(rf'<section id="{section}".*?</section>', self.rawdata_of, re.DOTALL)[0]
        return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)]


def read(plan):
    text = page(plan)
    reader = Reader(text)
    reader.rawdata_of = text
    return reader


def width(element):
    return float(re.search(r"(?:width|left):([\d.]+)%", element["style"])[1])


def test_the_page_stands_by_itself():
    text, found = page(SEARCHED), read(SEARCHED)
    assert text.startswith("<!DOCTYPE html>") and found.one("html", lang="en") and found.one("title")
    assert not found.having("script") and not found.having("link") and not found.having("img")
    assert not any(name in one for one in found.elements for name in ("src", "href"))
    assert "url(" not in text and "@import" not in text and "prefers-color-scheme: dark" in text


def test_all_that_was_planned_is_there():
    text = read(SEARCHED).all_text
    for part in (
        *("v5e:4x4", "16 × TPU v5 lite", "data=2 × fsdp=8", "batch 4,096", "It fits, with 8.00 GiB"),
        *("160 ms", "25,600", "43.2%", "90,000", "4.0", "64.0", "10 ms", "network 2 ms", "21 s"),
        *("parameters 1.00 GiB", "optimizer 2.00 GiB", "batch 512.00 MiB", "temporaries 4.00 GiB", "code 512.00 MiB"),
        *("8.00 GiB of 16.00 GiB", "arithmetic 70%", "memory 80%", "network 90%", "TFLOP", "200", "300"),
        *("--config.mesh.fsdp=8 --config.model.remat=names", "does not fit"),
    ):
        assert part in text, part


def test_the_boxes_of_memory_are_as_wide_as_their_share_of_the_device():
    found = read(PLAN)
    parts = {one["title"].split(":")[0]: width(one) for one in found.classed("part")}
    assert parts == {
        "parameters": 6.25,
        "optimizer": 12.5,
        "ema": 0,
        "batch": 3.125,
        "temporaries": 25,
        "code": 3.125,
    }
    [headroom] = found.classed("headroom")
    assert width(headroom) == 50 and not found.classed("limit")


def test_each_part_has_a_colour_of_its_own_that_the_key_explains():
    found = read(PLAN)
    colours = [re.search(r"background:(#\w+)", one["style"])[1] for one in found.classed("part")]
    assert len(set(colours)) == 6
    assert [one["style"] for one in found.having("i")] == [f"background:{colour}" for colour in colours]


def test_what_does_not_fit_fills_the_bar_and_the_device_is_marked_on_it():
    plan = PLAN | {"fits": False, "device_bytes": 2 * GIB, "headroom_bytes": -6 * GIB}
    found = read(plan)
    assert sum(width(one) for one in found.classed("part")) == 100 and not found.classed("headroom")
    [limit] = found.classed("limit")
    assert width(limit) == 25
    assert "does not fit: a device would need 6.00 GiB more" in found.all_text


def test_the_bars_of_time_have_one_scale():
    found = read(PLAN)
    assert [width(one) for one in found.classed("bound")] == [25, 6.25]  # memory and network of 160 ms
    assert [width(one) for one in found.classed("binds")] == [50]
    assert [width(one) for one in found.classed("step") if one["tag"] == "div"] == [100]
    assert "arithmetic, the bottleneck" in found.all_text


def test_a_step_that_is_quicker_than_a_bound_would_still_be_to_scale():
    found = read(PLAN | {"step_ms": 20.0})
    assert [width(one) for one in found.classed("binds")] == [100]
    assert [width(one) for one in found.classed("step") if one["tag"] == "div"] == [25]


def test_collectives_are_a_table_with_the_longest_first():
    header, *rows = read(PLAN).rows("collectives")
    assert header == ["collective", "over", "bytes", "count per step", "exposed", "by", "crosses", "time per step"]
    assert rows == [
        ["all-reduce", "data", "5 bytes", "1", "0", "network", "slices", "7 ms"],
        ["all-gather", "fsdp", "1.00 GiB", "24", "2", "ICI", "–", "3 ms"],
        ["permute", "–", "10 bytes", "1", "1", "–", "–", "unknown"],
    ]


def test_a_program_without_collectives_has_no_such_table():
    assert 'id="collectives"' not in page(PLAN | {"collectives": []})


def test_a_search_shows_its_ranking_and_the_rejected_layouts():
    found = read(SEARCHED)
    assert found.rows("ranking")[1:] == [
        ["1", "mesh.fsdp=8", "160 ms", "8.00 GiB", "170 ms", "the choice"],
        ["2", "the config&#39;s own", "200 ms", "20.00 GiB", "–", ""],
    ]
    assert found.rows("fallen")[1:] == [["12", "does not fit", "mesh.data=16"]]
    assert 'id="ranking"' not in page(PLAN) and 'id="fallen"' not in page(PLAN)


def nothing_known(value):
    """The same with every number None."""
    if isinstance(value, dict):
        return {name: nothing_known(one) for name, one in value.items()}
    if isinstance(value, list):
        return [nothing_known(one) for one in value]
    return value if isinstance(value, str) else None


def test_any_number_may_be_unknown():
    plan = nothing_known(copy.deepcopy(SEARCHED)) | {
        "mesh": PLAN["mesh"],
        "efficiencies": PLAN["efficiencies"],
        "network_ms": {},
        "binds": None,
    }
    found = read(plan)
    assert "None" not in found.all_text and "nan" not in found.all_text and found.all_text.count("unknown") > 8
    assert "Whether it fits is not known" in found.all_text
    assert not any(width(one) for one in found.classed("part"))


def test_the_memory_of_a_device_may_be_unknown_while_the_need_is_known():
    found = read(PLAN | {"fits": None, "device_bytes": None, "headroom_bytes": None})
    assert sum(width(one) for one in found.classed("part")) == 100
    assert not found.classed("headroom") and not found.classed("limit")


EVIL = """<script>alert("1")</script>&'"""


@pytest.mark.parametrize(
    "change",
    [
        {"target": EVIL},
        {"device_kind": EVIL},
        {"mesh": {EVIL: 2}},
        {"memory": {EVIL: GIB}},
        {"bounds_ms": {EVIL: 1.0}, "binds": EVIL},
        {"network_ms": {EVIL: 1.0}},
        {"efficiencies": {EVIL: 0.5}},
        {"flops": {EVIL: 1e12}},
        {"collectives": [PLAN["collectives"][1] | dict.fromkeys(("kind", "link", "crosses"), EVIL)]},
        {"collectives": [PLAN["collectives"][1] | {"axes": [EVIL]}]},
        {"overrides": [EVIL]},
        {"ranking": [{"overrides": [EVIL], "step_ms": 1.0, "compiled_step_ms": None, "peak_bytes": 1, "note": EVIL}]},
        {"fallen": [{"reason": EVIL, "count": 1, "example": EVIL}]},
    ],
)
def test_no_text_is_read_as_markup(change):
    found = read(SEARCHED | change)
    assert not found.having("script") and EVIL in found.all_text
    tags = {one["tag"] for one in read(SEARCHED).elements}
    assert {one["tag"] for one in found.elements} <= tags
    names = {name for one in found.elements for name in one}
    assert names <= {name for one in read(SEARCHED).elements for name in one}
