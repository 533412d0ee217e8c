"""``python -m sabmn_ext.evaluate``: score a checkpoint on a data set, or features, by Market-1501's rules."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sabmn_ext.host_memory import keep_freed_memory
from sabmn_ext.ops.retrieval import METRICS
from sabmn_ext.report.evaluation import counterfactual_report, difference_report, interval_report, verification_report
from sabmn_ext.report.page import ReportContents, check_folder, write_report
from sabmn_ext.report.ranked import Side, draw_ranked, pick_queries
from sabmn_ext.retrieval import conformance
from sabmn_ext.retrieval.counterfactuals import TRAINED, Counterfactuals
from sabmn_ext.retrieval.evaluation import evaluate_retrieval
from sabmn_ext.retrieval.files import NEEDED, OPTIONAL, read_features, read_result, write_result
from sabmn_ext.retrieval.inputs import as_matrix
from sabmn_ext.retrieval.reranking import K1, K2, LAMBDA, evaluate_reranked
from sabmn_ext.retrieval.result import RetrievalResult
from sabmn_ext.retrieval.statistics import QueryScores


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sabmn_ext.evaluate",
        description="Score a trained network on a data set, or features of any origin.",
        epilog=f"Features are an .npz file, or a folder of .npy files, with {', '.join(NEEDED)} and, where there are "
        f"any, {', '.join(OPTIONAL)}.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="a network that sabmn_ext.train has written")
    source.add_argument("--features", type=Path, metavar="FILE", help="features and labels: .npz, or a folder of .npy")
    source.add_argument(
        "--conformance",
        type=Path,
        metavar="DIR",
        nargs="?",
        const=conformance.VECTORS,
        help="test this evaluator on small retrievals with exact answers (default: those of the package)",
    )
    parser.add_argument("--data", metavar="PATH", help="data set for --checkpoint (default: the one trained on)")
    parser.add_argument("--format", help="layout of the data set (default: recognised)")
    parser.add_argument("--metric", choices=METRICS, help="distance (default: the checkpoint's, else euclidean)")
    parser.add_argument("--flip", action="store_true", help="average the features of each image and its mirror image")
    parser.add_argument("--no-camera-rule", action="store_true", help="keep gallery images of the query's own camera")
    parser.add_argument("--rerank", action="store_true", help="by k-reciprocal neighbours (k1 20, k2 6, lambda 0.3)")
    parser.add_argument("--max-rank", type=int, default=50, metavar="K", help="length of the CMC curve (default: 50)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images a step (default: the checkpoint's)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode images")
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="an unreadable image ends it, or is left out"
    )
    parser.add_argument("--confidence", type=float, default=95, metavar="P", help="of the intervals, in percent (95)")
    parser.add_argument(
        "--against", type=Path, metavar="RUN", help="compare with a result: its JSON, or a run's folder that has one"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="result (default: NAME.evaluation.json beside NAME)")
    parser.add_argument("--ranked", type=Path, metavar="FILE.png", help="draw the best, median and worst ranked lists")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write a page with all results, and its pictures")
    parser.add_argument(
        "--no-counterfactuals", action="store_true", help="leave out the network without attention and the like"
    )
    return parser


def given_features(source: Path) -> tuple[Side, Side, dict[str, Any]]:
    """Both sides from files of features, and what to note in the result."""
    arrays = read_features(source)

    def side(name: str) -> Side:
        paths = arrays.get(f"{name}_paths")
        names = None if paths is None else [str(path) for path in paths]
        features = as_matrix(f"{name}_features", arrays[f"{name}_features"])
        return Side(features, arrays[f"{name}_pids"], arrays.get(f"{name}_camids"), names)

    return side("query"), side("gallery"), {"features": str(source)}


def extract(args: argparse.Namespace) -> tuple[Side, Side, dict[str, Any], dict[str, Any]]:
    """Both sides from a checkpoint and a data set, what to note in the result, and what a report shows of the network.

    Fills in the settings left open.
    """
    from sabmn_ext.data import load_data
    from sabmn_ext.report.attention import Network
    from sabmn_ext.retrieval.features import extract_features
    from sabmn_ext.training.checkpoint import load_model
    from sabmn_ext.training.config import config_from_dict, to_toml

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: there is no GPU that torch can use here")
    model, config = load_model(args.checkpoint, device)
    path = args.data or config["data"]["path"]
    if path is None:
        raise ValueError("the checkpoint names no data set; give --data PATH")
    trained_on: dict[str, Any] = {"format": "auto", "cameras": True} if args.data else config["data"]
    cameras = trained_on["cameras"] and not args.no_camera_rule
    data = load_data(path, format=args.format or trained_on["format"], cameras=cameras)
    for note in data.notes:
        print(note)
    args.metric = args.metric or config["evaluation"]["metric"]
    flip = args.flip or config["evaluation"]["flip"]
    height, width = config["image"]["height"], config["image"]["width"]
    network = Counterfactuals(model, not args.no_counterfactuals)
    skipped: list[str] = []

    def side(records: Sequence[Any]) -> Side:
        indices: list[int] = []
        features = extract_features(
            network,
            records,
            height=height,
            width=width,
            batch_size=args.batch_size or config["evaluation"]["batch_size"],
            device=device,
            workers=args.workers,
            flip=flip,
            precision=config["run"]["precision"],
            on_error=args.on_error,
            indices=indices,
        )
        skipped.extend(records[i].path for i in sorted(set(range(len(records))) - set(indices)))
        pids, camids = (np.array([getattr(records[i], name) for i in indices]) for name in ("pid", "camid"))
        paths = [records[i].path for i in indices]
        others = network.split(features)
        return Side(others.pop(TRAINED), pids, camids if data.has_cameras else None, paths, others)

    about = {"checkpoint": str(args.checkpoint), "data": str(path), "flip": flip, "skipped_images": skipped}
    shown = {
        "network": Network(model, height, width, device) if model.attention is not None else None,
        "curves": args.checkpoint.parent / "tensorboard",
        "settings": to_toml(config_from_dict(config)),
    }
    return side(data.query), side(data.gallery), about, shown


def run(args: argparse.Namespace) -> None:
    """Evaluate, print the tables, write the JSON and the picture."""
    source: Path = args.checkpoint or args.features
    output: Path = args.json or source.with_name(f"{source.stem}.evaluation.json")
    for option, file in (("--json", args.json), ("--ranked", args.ranked)):
        if file is not None and not file.resolve().parent.is_dir():
            raise FileNotFoundError(f"{option} {file}: there is no folder {file.parent}")
    if args.report:
        check_folder(args.report)
    if not 0 < args.confidence < 100:
        raise ValueError(f"--confidence {args.confidence:g}: expected percent between 0 and 100, such as 95")
    for option, drawn in (("--ranked", args.ranked), ("--report", args.report)):
        if args.rerank and drawn:
            raise ValueError(f"{option} draws the plain ranking, not the re-ranked: give one of --rerank and {option}")
    other = read_result(args.against) if args.against else None
    if args.features:
        given = [name for name in ("data", "format", "batch_size", "flip", "no_counterfactuals") if getattr(args, name)]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} goes with --checkpoint, not with --features")
        query, gallery, about = given_features(args.features)
        shown: dict[str, Any] = {}
    else:
        query, gallery, about, shown = extract(args)
    if args.ranked and (query.paths is None or gallery.paths is None):
        raise ValueError(f"--ranked needs the images: {source} has no query_paths and gallery_paths")
    if args.no_camera_rule:
        query, gallery = (replace(side, camids=None) for side in (query, gallery))
    elif query.camids is None and gallery.camids is None:
        print("no camera numbers: the camera rule is off")

    metric = args.metric or METRICS[0]

    def evaluate(query_features: Tensor, gallery_features: Tensor) -> RetrievalResult:
        return (evaluate_reranked if args.rerank else evaluate_retrieval)(
            query_features,
            gallery_features,
            query.pids,
            gallery.pids,
            query.camids,
            gallery.camids,
            metric=metric,
            max_rank=args.max_rank,
            query_names=query.paths,
            gallery_names=gallery.paths,
        )

    result = evaluate(query.features, gallery.features)
    print(result.table())
    scores = QueryScores.of(result)
    confidence = args.confidence / 100
    intervals, text = interval_report(scores, confidence)
    print(text)
    verification, text = verification_report(result)
    print(text)
    others = {name: evaluate(x, gallery.counterfactuals[name]) for name, x in query.counterfactuals.items()}
    counterfactuals, text = counterfactual_report({TRAINED: result, **others}, confidence)
    if text:
        print(text)
    report = result.to_dict() | about
    report |= {
        "num_junk": result.num_junk,
        "metric": metric,
        "rerank": {"k1": K1, "k2": K2, "lambda": LAMBDA} if args.rerank else None,
        "camera_rule": result.camera_rule,
        "invalid_queries": [q if query.paths is None else query.paths[q] for q in result.invalid_queries],
        "cmc": result.cmc.tolist(),
        "intervals": intervals,
        "verification": verification,
        "counterfactuals": counterfactuals,
        "camera_pairs": [asdict(pair) for pair in result.camera_pairs()],
        "queries": scores.to_dict(),
    }
    if other:
        report["against"], text = difference_report(result, other, confidence)
        print(text)
    write_result(output, report)
    print(f"written: {output}")
    if args.ranked:
        titles = pick_queries(result.ap, query.pids)
        draw_ranked(args.ranked, query, gallery, titles, ap=result.ap, metric=metric)
        print(f"written: {args.ranked}")
    if args.report:
        contents = ReportContents(f"Evaluation of {source}", report, result, query, gallery, metric, **shown)
        print(f"written: {write_report(args.report, contents)}")


def check_conformance(folder: Path) -> int:
    """A line for every vector, and how many agree; 1 where one does not."""
    wrong = total = 0
    for name, differences in conformance.check(folder):
        print(f"{'DIFFERS' if differences else 'ok':8}{name}")
        print("".join(f"        {line}\n" for line in differences), end="")
        total, wrong = total + 1, wrong + bool(differences)
    print(f"{total} vectors: {total - wrong} agree, {wrong} differ")
    return int(wrong > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    keep_freed_memory()
    try:
        if args.conformance:
            for name in ("data", "format", "metric", "against", "json", "ranked", "report"):
                if getattr(args, name):
                    raise ValueError(f"--{name} does not go with --conformance")
            return check_conformance(args.conformance)
        run(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
