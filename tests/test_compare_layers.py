"""Cosines by layer in a comparison: in its JSON, its table and its picture."""

import json

import pytest

from altgrad import report
from altgrad.compare import Choice, CompareSettings, compare
from altgrad.report_layers import layer_table, layers_of


@pytest.fixture(scope="module")
def found():
    plain = Choice("plain", "equilibrium", {"correction": "none", "tolerance": 1e-4})
    whole = Choice("corrected", "equilibrium", {"tolerance": 1e-5})
    asked = {"problem": "recurrent-digits", "problem_settings": {"hidden": "16-16", "sweeps": 3}, "baselines": ("backprop",), "seeds": (0,)}
    return compare(CompareSettings(engines=(plain, whole), budget="forwards=2", lr=0.01, **asked))


def test_every_parameter_has_its_cosine_to_the_gradient_at_the_fixed_point(found):
    rows = {row.label: row for row in found.rows}
    assert set(rows["plain"].cosines) == set(rows["corrected"].cosines) == set(layers_of(found.rows))
    assert all(cosine > 0.99 for cosine in rows["corrected"].cosines.values())  # three sweeps would not give that
    assert rows["plain"].cosines["weights.0"] < 0.9
    assert rows["backprop"].cosines["weights.0"] == pytest.approx(1.0)


def test_they_are_in_the_table_the_picture_and_the_json(found, tmp_path):
    report.write(found, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert layer_table(found.rows) in text
    assert "backward_weights.0" in text
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert rows[-1]["cosines"]["weights.1"] > 0.99


def test_a_comparison_without_them_has_no_such_table(found):
    assert layer_table([]) == ""
