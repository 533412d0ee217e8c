"""The figures a run ends with: retrieval on query and gallery, and what the attention contributes to it."""

from __future__ import annotations

import json
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
from sabmn_ext.training.processes import ALONE, Job

CONFIDENCE = 0.95  # of the intervals in result.json
# Of this process's share of the images: [n, feature_dim] float32 on the CPU, and whose they are.
Features = tuple[torch.Tensor, list[ImageRecord]]


def features_of(
    model: nn.Module, records: list[ImageRecord], config: Config, device: torch.device, job: Job = ALONE
) -> Features:
    """Features of this process's share, by the run's settings; unreadable images are left out where those say so."""
    share = job.part(len(records), config.evaluation.batch_size)
    records = records[share.start : share.stop]
    indices: list[int] = []

    def extract() -> torch.Tensor:
        if job.size > 1 and not records:
            variants = (len(model.names),) if isinstance(model, Counterfactuals) else ()
            return torch.empty(0, *variants, config.model.feature_dim)
        return extract_features(
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
            progress=config.run.progress and job.rank == 0 and sys.stderr.isatty(),
            indices=indices,
        )

    features = job.run(extract)
    return features, [records[i] for i in indices]


def _of_all(features: Features, job: Job) -> Features:
    """The features of all processes' images, in order."""
    if job.size == 1:
        return features
    own, records = features
    lists = [[record.path for record in records], [record.pid for record in records], [r.camid for r in records]]
    texts = job.exchange.gather(np.frombuffer(json.dumps(lists).encode(), np.uint8).copy())
    everyones = [ImageRecord(*record) for text in texts for record in zip(*json.loads(text.tobytes()), strict=True)]
    values = np.concatenate(job.exchange.gather(own.numpy().reshape(-1)))
    return torch.from_numpy(values).view(len(everyones), own.shape[1]), everyones


def score(query: Features, gallery: Features, cameras: bool, config: Config, job: Job = ALONE) -> RetrievalResult:
    """Retrieval figures, the same in all processes; the same features twice are evaluated leave-one-out."""
    queries = _of_all(query, job)
    return evaluate_retrieval(
        queries[0],
        gallery[0],
        [record.pid for record in queries[1]],
        [record.pid for record in gallery[1]],
        [record.camid for record in queries[1]] if cameras else None,
        [record.camid for record in gallery[1]] if cameras else None,
        metric=config.evaluation.metric,
        exclude_self=gallery is query,
        query_names=[record.path for record in queries[1]],
        gallery_names=[record.path for record in gallery[1]],
        group=job.group,
    )


def retrieval(
    model: SABMN, data: ReidData, config: Config, device: torch.device, job: Job = ALONE
) -> RetrievalResult:
    """The network's figures on query and gallery."""
    query = features_of(model, data.query, config, device, job)
    gallery = features_of(model, data.gallery, config, device, job)
    return score(query, gallery, data.has_cameras, config, job)


class AttentionShare:
    """While entered, measures ‖γa‖/‖x‖ at the attention block, whose output is x + γa; over all images seen."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.squares: list[tuple[float, float]] = []  # of each batch: ‖γa‖², ‖x‖²

    def _measure(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0].double()  # [B, C, H, W]
        self.squares.append((float((output.double() - x).square().sum()), float(x.square().sum())))

    def __enter__(self) -> AttentionShare:
        self._hook = self.block.register_forward_hook(self._measure)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def ratio(self, job: Job = ALONE) -> float:
        """Over the images of all processes; summed batch by batch, in one order however many processes there are."""
        gathered = job.exchange.gather(np.array(self.squares, np.float64).reshape(-1))
        batches = np.concatenate(gathered).reshape(-1, 2).tolist()
        change, size = (sum(column) for column in zip(*batches, strict=True)) if batches else (0.0, 0.0)
        return (change / size) ** 0.5 if size else 0.0


def final_figures(
    model: SABMN, data: ReidData, config: Config, device: torch.device, job: Job = ALONE
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Retrieval on the test images, γ and ‖γa‖/‖x‖ over the query images, and what the network loses without its parts.

    Returns:
        the figures for ``result.json``; of ``ReportContents``, what an evaluation leaves to draw.
    """
    network = Counterfactuals(model, config.evaluation.counterfactuals)
    with AttentionShare(model.attention) if model.attention is not None else nullcontext() as share:
        query = features_of(network, data.query, config, device, job)
    gallery = features_of(network, data.gallery, config, device, job)
    features = [network.split(side[0]) for side in (query, gallery)]
    results = {
        name: score((features[0][name], query[1]), (features[1][name], gallery[1]), data.has_cameras, config, job)
        for name in network.names
    }
    result = results[TRAINED]
    counterfactuals, _ = counterfactual_report(results, CONFIDENCE)
    gamma_zero = results.get("gamma_zero")
    figures = {
        **result.to_dict(),
        "flip": config.evaluation.flip,
        "gamma": None if model.attention is None else float(model.attention.gamma.detach()),
        "attention_ratio": None if share is None else share.ratio(job),
        "map_gamma_zero": None if gamma_zero is None else gamma_zero.map,
        "intervals": interval_report(QueryScores.of(result), CONFIDENCE)[0],
        "verification": verification_report(result)[0],
        "counterfactuals": counterfactuals,
    }
    sides = (  # of all processes, though the first one alone draws
        _of_all((variants[TRAINED], records), job)
        for variants, (_, records) in zip(features, (query, gallery), strict=True)
    )
    query_side, gallery_side = (
        Side(
            trained,
            np.array([record.pid for record in records]),
            np.array([record.camid for record in records]) if data.has_cameras else None,
            [record.path for record in records],
        )
        for trained, records in sides
    )
    return figures, {"result": result, "query": query_side, "gallery": gallery_side}
