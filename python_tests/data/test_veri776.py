"""VeRi-776's folders and three-digit cameras."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_data import write_image

from sabmn_ext.data import load_data


def test_veri776(tmp_path: Path) -> None:
    write_image(tmp_path / "image_train" / "0001_c001_00016450_0.jpg")
    write_image(tmp_path / "image_query" / "0002_c002_00030600_0.jpg")
    write_image(tmp_path / "image_test" / "0002_c020_00030670_1.jpg")
    data = load_data(str(tmp_path))
    assert data.name == "veri776"
    assert data.gallery[0][1:] == (2, 20)
    assert "query has 1 images, veri776 was published with 1,678" in data.notes
    (tmp_path / "image_test").rename(tmp_path / "test")
    with pytest.raises(FileNotFoundError, match=r"veri776: missing folder .*image_test"):
        load_data(str(tmp_path), format="veri776")
