"""The figures a run ends with: retrieval on query and gallery, and what the attention contributes to it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from sabmn_ext.data.records import ImageRecord, ReidData
from sabmn_ext.nn.sabmn import SABMN
from sabmn_ext.report.evaluation import counterfactual_report, interval_report, verification_report
from sabmn_ext.report.ranked import Side
from sabmn_ext.retrieval import RetrievalResult, evaluate_retrieval
from sabmn_ext.retrieval.counterfactuals import TRAINED, Counterfactuals
from sabmn_ext.retrieval.features import extract_features
from sabmn_ext.retrieval.statistics import QueryScores
from sabmn_ext.training.config import Config

CONFIDENCE = 0.95  # of the intervals in result.json
Features = tuple[torch.Tensor, list[ImageRecord]]  # [n, feature_dim] float32 on the CPU, and whose they are


def features_of(model: nn.Module, records: list[ImageRecord], config: Config, device: torch.device) -> Features:
    """Features by the run's settings; unreadable images are left out where the settings say so."""
    indices: list[int] = []
    features = extract_features(
        model,
        records,
        height=config.image.height,
        width=config.image.width,
        batch_size=config.evaluation.batch_size,
        device=device,
        workers=config.data.workers,
        flip=config.evaluation.flip,
        precision=config.run.precision,
        on_error=config.data.on_error,
        progress=config.run.progress and sys.stderr.isatty(),
        indices=indices,
    )
    return features, [records[i] for i in indices]


def score(query: Features, gallery: Features, cameras: bool, config: Config) -> RetrievalResult:
    """Retrieval figures; the same features twice are evaluated leave-one-out."""
    return evaluate_retrieval(
        query[0],
        gallery[0],
        [record.pid for record in query[1]],
        [record.pid for record in gallery[1]],
        [record.camid for record in query[1]] if cameras else None,
        [record.camid for record in gallery[1]] if cameras else None,
        metric=config.evaluation.metric,
        exclude_self=gallery is query,
        query_names=[record.path for record in query[1]],
        gallery_names=[record.path for record in gallery[1]],
    )


def retrieval(model: SABMN, data: ReidData, config: Config, device: torch.device) -> RetrievalResult:
    """The network's figures on query and gallery."""
    query = features_of(model, data.query, config, device)
    gallery = features_of(model, data.gallery, config, device)
    return score(query, gallery, data.has_cameras, config)


class AttentionShare:
    """While entered, measures ‖γa‖/‖x‖ at the attention block, whose output is x + γa; over all images seen."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.change = self.input = 0.0

    def _measure(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0].double()  # [B, C, H, W]
        self.input += float(x.square().sum())
        self.change += float((output.double() - x).square().sum())

    def __enter__(self) -> AttentionShare:
        self._hook = self.block.register_forward_hook(self._measure)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    @property
    def ratio(self) -> float:
        return (self.change / self.input) ** 0.5 if self.input else 0.0


def final_figures(
    model: SABMN, data: ReidData, config: Config, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Retrieval on the test images, γ and ‖γa‖/‖x‖ over the query images, and what the network loses without its parts.

    Returns:
        the figures for ``result.json``; of ``ReportContents``, what an evaluation leaves to draw.
    """
    network = Counterfactuals(model, config.evaluation.counterfactuals)
    with AttentionShare(model.attention) if model.attention is not None else nullcontext() as share:
        query = features_of(network, data.query, config, device)
    gallery = features_of(network, data.gallery, config, device)
    features = [network.split(side[0]) for side in (query, gallery)]
    results = {
        name: score((features[0][name], query[1]), (features[1][name], gallery[1]), data.has_cameras, config)
        for name in network.names
    }
    result = results[TRAINED]
    counterfactuals, _ = counterfactual_report(results, CONFIDENCE)
    gamma_zero = results.get("gamma_zero")
    figures = {
        **result.to_dict(),
        "gamma": None if model.attention is None else float(model.attention.gamma.detach()),
        "attention_ratio": None if share is None else share.ratio,
        "map_gamma_zero": None if gamma_zero is None else gamma_zero.map,
        "intervals": interval_report(QueryScores.of(result), CONFIDENCE)[0],
        "verification": verification_report(result)[0],
        "counterfactuals": counterfactuals,
    }
    query_side, gallery_side = (
        Side(
            side[TRAINED],
            np.array([record.pid for record in records]),
            np.array([record.camid for record in records]) if data.has_cameras else None,
            [record.path for record in records],
        )
        for side, (_, records) in zip(features, (query, gallery), strict=True)
    )
    return figures, {"result": result, "query": query_side, "gallery": gallery_side}
