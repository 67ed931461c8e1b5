"""One theme, and one colour for each thing."""

import re

import pandas as pd
import pytest

from adapter_twin.tables import datasets
from study.figures import style

MODULES = sorted((datasets.REPOSITORY / "study").rglob("*.py"))


def test_a_count_has_the_same_colour_in_every_figure():
    few, many = style.shades([8, 32], "adapter slots"), style.shades([32, 64, 384], "adapter slots")
    assert tuple(few[32]) == tuple(many[32])
    assert tuple(many[64]) != tuple(many[384])


def test_shades_without_a_scale_share_out_a_colour_map():
    colors = style.shades(["a", "c", "b"])
    assert list(colors) == ["a", "b", "c"]
    assert len(set(colors.values())) == 3


def test_rows_are_drawn_from_top_to_bottom_with_their_intervals():
    table = pd.DataFrame(
        {"what": ["a", "a", "b"], "twin": ["ours", "authors", "ours"], "value": [1.0, 2, 3]}
    ).assign(low=lambda rows: rows.value - 1, high=lambda rows: rows.value + 1)
    table = table.assign(figure="mean ITL")
    grid = style.dots(
        table, "what", ["b", "a"], "figure", by="twin", colors={"ours": "k", "authors": "r"}
    )
    axes = grid.axes_dict["mean ITL"]
    ours, authors = axes.lines
    assert [text.get_text() for text in grid.legend.get_texts()] == ["ours", "authors"]
    assert sorted(zip(*ours.get_data(), strict=True)) == [(1, 0.88), (3, -0.12)]
    assert authors.get_data() == (2, pytest.approx(1.12))
    assert axes.collections[0].get_segments()[0][:, 0].tolist() == [0, 2]
    assert axes.get_ylim() == (1.5, -0.5)


def test_no_other_module_names_a_colour():
    named = [path.name for path in MODULES if re.search(r"\"#[0-9a-f]{6}\"", path.read_text())]
    assert named == []
