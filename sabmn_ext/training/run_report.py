"""The page that a run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sabmn_ext.nn.sabmn import SABMN
from sabmn_ext.training.config import Config, to_toml


def write_run_report(
    out: Path, config: Config, model: SABMN, device: torch.device, result: dict[str, Any], drawn: dict[str, Any]
) -> None:
    """Write ``report/`` in the folder of a run. The result is on the disk already, so a failure is told and no error.

    Args:
        result: what ``result.json`` holds.
        drawn: the second result of ``final_figures``.
    """
    from sabmn_ext.report.attention import Network
    from sabmn_ext.report.page import ReportContents, write_report

    network = None if model.attention is None else Network(model, config.image.height, config.image.width, device)
    contents = ReportContents(
        title=f"{result['data']}: training by the recipe {config.recipe}",
        figures=result,
        metric=config.evaluation.metric,
        network=network,
        curves=out / "tensorboard",
        settings=to_toml(config),
        **drawn,
    )
    try:
        write_report(out / "report", contents)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        again = f"python -m sabmn_ext.evaluate --checkpoint {out / 'last.pt'} --report {out / 'report'}"
        print(f"no report: {error}. Everything else is written; the report alone: {again}", flush=True)
