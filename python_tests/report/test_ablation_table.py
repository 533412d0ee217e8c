"""The table of an ablation: means and spreads over seeds, the paper's figures in their columns, runs that diverged."""

import matplotlib.image
import pytest

from sabmn_ext.report.ablation import HEADINGS, cells, draw, markdown_table, summary, text_table


def run(mean_ap, rank1, *, loss=1.5, sigma=2.0):
    result = {"map": mean_ap, "rank1": rank1, "intervals": {"map": [0.1, 0.3], "rank1": [0.25, 0.65]}}
    return {"result": result, "steps": 40, "not_finite": 0, "loss": loss, "sigma": sigma, "sigma_stored": 3 * sigma}


DIVERGED = {"result": None, "steps": 40, "not_finite": 12, "loss": 7.0, "sigma": 90.0, "sigma_stored": 90.0}


def row(*runs, paper=None):
    return {"name": "four", "title": "four classifiers", "paper": paper, "seeds": list(range(len(runs))), "runs": runs}


def test_one_seed():
    assert cells(row(run(0.2, 0.5), paper=(92.4, 78.6))) == [
        *("four classifiers", "20.0", "10.0 … 30.0", "78.6", "50.0", "25.0 … 65.0", "92.4"),
        *("1.500", "0 of 40", "2", "6"),
    ]


def test_several_seeds_and_one_that_diverged():
    runs = run(0.2, 0.5, loss=1.0), DIVERGED, run(0.3, 0.6, loss=2.0)
    found = summary(row(*runs))
    assert found["map"]["mean"] == pytest.approx(0.25)
    assert found["map"]["spread"] == pytest.approx(0.005**0.5), "sqrt((0.05² + 0.05²) / 1)"
    assert found["loss"]["mean"] == pytest.approx(10 / 3)
    line = cells(row(*runs))
    assert line[1:7] == ["25.0 ± 7.1", "10.0 … 30.0", "-", "55.0 ± 7.1", "25.0 … 65.0", "-"]
    assert line[8:] == ["12 of 120", "90", "90"]


def test_nothing_but_divergence():
    line = cells(row({**DIVERGED, "loss": None}, paper=(92.4, 78.6)))
    assert line[1:] == ["-", "-", "78.6", "-", "-", "92.4", "-", "12 of 40", "90", "90"]


def test_both_forms_hold_every_cell_and_the_picture_differs(tmp_path):
    rows = [row(run(0.2, 0.5), paper=(92.4, 78.6)), row(DIVERGED)]
    lines = text_table(rows).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    table = markdown_table(rows).splitlines()
    assert {line.count("|") for line in table} == {len(HEADINGS) + 1}
    for line, written, each in zip(lines[1:], table[2:], rows, strict=True):
        assert all(cell in line and f"| {cell} |" in written for cell in cells(each))
    pictures = []
    for name, each in (("both", rows), ("one", rows[:1])):
        draw(tmp_path / f"{name}.png", each)
        pictures.append(matplotlib.image.imread(tmp_path / f"{name}.png"))
    assert pictures[0].shape[0] > pictures[1].shape[0]
    assert pictures[0].std() > 0.05
