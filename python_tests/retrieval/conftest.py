"""An extractor of a small network, on one thread."""

from collections.abc import Iterator

import pytest
import torch
from small_checkpoint import write_checkpoint

import sabmn_ext


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> sabmn_ext.Extractor:
    return sabmn_ext.Extractor(write_checkpoint(tmp_path_factory.mktemp("run") / "last.pt"), device="cpu")
