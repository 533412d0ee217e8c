"""The contact sheet shows the right images in the right places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_data import make_fake_market

from sabmn_ext.data import ReidData, load_data, load_image
from sabmn_ext.data.sheet import draw_sheet, save_sheet


def test_rows_are_identities_and_columns_images(tmp_path: Path) -> None:
    data = load_data(make_fake_market(tmp_path))
    Path(data.train[0].path).unlink()  # pid 1, camera 1
    sheet = np.asarray(draw_sheet(data, rows=4, columns=3, height=32, width=16))
    assert sheet.shape == (4 * (32 + 14 + 4) + 4, 3 * (16 + 4) + 4, 3)
    for row, pid in enumerate((1, 5, 9, 13)):  # evenly out of 1, 3 … 15
        for column, camid in enumerate((1, 3, 5)):
            path = next(r.path for r in data.train if (r.pid, r.camid) == (pid, camid))
            y, x = 4 + row * 50, 4 + column * 20
            shown = sheet[y : y + 32, x : x + 16]
            if (pid, camid) == (1, 1):
                assert (shown[0, 1:-1] == (200, 0, 0)).all()  # the frame of an unreadable one
            else:
                assert np.array_equal(shown, load_image(path, 32, 16).permute(1, 2, 0).numpy())
            label = sheet[y + 33 : y + 46, x : x + 16]
            assert label.min() < 100 < label.max()


def test_without_training_images_it_shows_the_test_people(tmp_path: Path) -> None:
    data = load_data(make_fake_market(tmp_path / "data"))
    save_sheet(
        ReidData(data.name, data.root, [], data.query, data.gallery), str(tmp_path / "new" / "sheet.png")
    )
    assert (tmp_path / "new" / "sheet.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"'sheet' must end in \.png"):
        save_sheet(data, "sheet")
