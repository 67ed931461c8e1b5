"""One theme, and one colour for each thing."""

import re

import pytest

from adapter_twin import datasets, style

PLOTTING = sorted((datasets.REPOSITORY / "adapter_twin").glob("*plots.py"))


def test_a_count_has_the_same_colour_in_every_figure():
    few, many = style.shades([8, 32], "adapter slots"), style.shades([32, 64, 384], "adapter slots")
    assert tuple(few[32]) == tuple(many[32])
    assert tuple(many[64]) != tuple(many[384])


def test_shades_without_a_scale_share_out_a_colour_map():
    colors = style.shades(["a", "c", "b"])
    assert list(colors) == ["a", "b", "c"]
    assert len(set(colors.values())) == 3


@pytest.mark.parametrize("path", PLOTTING, ids=lambda path: path.stem)
def test_no_other_module_names_a_colour(path):
    assert not re.search(r"#[0-9a-f]{6}", path.read_text())
