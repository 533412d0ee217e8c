"""The page: nothing is fetched from elsewhere, every picture is that of a file, and what is shown is the result."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import sabmn_ext
from sabmn_ext.report.attention import Network
from sabmn_ext.report.evaluation import counterfactual_report, interval_report, verification_report
from sabmn_ext.report.page import ReportContents, write_report
from sabmn_ext.report.ranked import Side
from sabmn_ext.retrieval import evaluate_retrieval
from sabmn_ext.retrieval.statistics import FIGURES, QueryScores


class Page(HTMLParser):
    """Text, pictures and addresses of a page; an AssertionError where a tag is not closed."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text, self.open, self.pictures, self.addresses = "", [], [], []
        self.feed(file.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href"):
                self.addresses.append(value)
        if tag == "img":
            assert dict(attributes)["alt"]
            self.pictures.append(base64.b64decode(dict(attributes)["src"].removeprefix("data:image/png;base64,")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


@pytest.fixture
def contents(tmp_path: Path, seed: int) -> ReportContents:
    """Four people with one query and three gallery images each, in a folder whose name needs escaping."""
    rng = np.random.default_rng(seed)
    folder = tmp_path / "<b>&'images'"
    folder.mkdir()

    def side(each: int, camid: int) -> Side:
        pids = np.repeat(np.arange(1, 5), each)
        paths = [str(folder / f"{camid}_{i}.png") for i in range(len(pids))]
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)).save(path)
        features = torch.from_numpy(2.0 * pids[:, None] + rng.normal(size=(len(pids), 3)))
        return Side(features, pids, np.full(len(pids), camid), paths)

    query, gallery = side(1, 1), side(3, 2)
    labels = query.pids, gallery.pids, query.camids, gallery.camids
    result = evaluate_retrieval(query.features, gallery.features, *labels)
    without = evaluate_retrieval(-query.features, gallery.features, *labels)
    figures = {
        "intervals": interval_report(QueryScores.of(result), 0.9)[0],
        "verification": verification_report(result)[0],
        "counterfactuals": counterfactual_report({"trained": result, "gamma_zero": without}, 0.9)[0],
        "untrained": {"map": 0.12345},
        "against": {"file": "a&b.json", "confidence": 0.9}
        | {name: {"other": 0.25, "difference": -0.125, "low": -0.5, "high": 0.0625} for name in FIGURES},
        "gamma": -0.25,
        "attention_ratio": 0.125,
        "data": "<i>people</i>",
    }
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for name in ("loss", "gamma", "rate/added"):
            writer.add_scalar(name, 1.0, 10)
    model = sabmn_ext.SABMN(4, backbone="resnet18", weights="none", feature_dim=8, spectral_norm=False)
    network = Network(model, 32, 16, "cpu")
    title = "<script>alert('$body')</script>"
    curves = tmp_path / "tensorboard"
    return ReportContents(title, figures, result, query, gallery, "euclidean", network, curves, "[data]\npath = '<u>'")


def test_everything_is_in_the_page_and_in_files(contents: ReportContents, tmp_path: Path) -> None:
    file = write_report(tmp_path / "report", contents)
    assert file == tmp_path / "report" / "report.html"
    page = Page(file)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    on_disk = {path.name: path.read_bytes() for path in file.parent.glob("*.png")}
    queries = {f"query{i}_{what}.png" for i in range(1, 5) for what in ("ranked", "attention")}
    curves = {"cmc.png", "verification.png", "counterfactuals.png", "loss.png", "gamma.png", "rates.png"}
    assert set(on_disk) - {"verification.png"} == (queries | curves) - {"verification.png"}
    assert sorted(page.pictures) == sorted(on_disk.values())

    result, text = contents.result, re.sub(r"\s+", " ", page.text)
    low, high = contents.figures["intervals"]["map"]
    assert f"mAP {100 * result.map:.2f} {100 * low:.2f} … {100 * high:.2f} 12.35 {100 * result.chance_map:.2f}" in text
    assert "90 % interval" in text
    without = contents.figures["counterfactuals"]["gamma_zero"]["map"]
    limits = f"{100 * without['low']:+.2f} … {100 * without['high']:+.2f}"
    assert f"attention off (gamma = 0) {100 * without['value']:.2f} {100 * without['drop']:+.2f} {limits}" in text
    assert "minus a&b.json" in text
    assert "rank-1 25.00 -12.50 -50.00 … +6.25" in text
    assert "gamma is -0.2500" in text
    assert "12.50 % of its length" in text
    for title in ("Best", "Worst"):
        assert f"{title}: AP " in text
    # What was handed in stands there as text.
    for given in (contents.title, contents.query.paths[0], contents.settings.split("\n")[1], "<i>people</i>"):
        assert given in page.text


def test_without_images_network_and_training(contents: ReportContents, tmp_path: Path) -> None:
    sides = [Side(side.features, side.pids, None, None) for side in (contents.query, contents.gallery)]
    file = write_report(tmp_path / "report", ReportContents("plain", {}, contents.result, *sides, "euclidean"))
    page = Page(file)
    assert "the features came without the files of their images" in page.text
    assert [path.name for path in file.parent.glob("*.png")] == ["cmc.png"]
    for heading in ("Training", "Verification", "What each part is worth"):
        assert heading not in page.text


def test_where_it_cannot_be_written(contents: ReportContents, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file: that is a file; expected a folder"):
        write_report(tmp_path / "file", contents)
    with pytest.raises(FileNotFoundError, match=r"none/report: there is no folder .*none"):
        write_report(tmp_path / "none" / "report", contents)
    Path(contents.query.paths[2]).unlink()
    with pytest.raises(OSError, match=r"1_2\.png"):
        write_report(tmp_path / "report", replace(contents, figures={}, network=None, curves=None))
