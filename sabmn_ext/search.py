"""``python -m sabmn_ext.search``: who in the gallery looks like the person in an image?"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sabmn_ext.extract import add_network_options
from sabmn_ext.host_memory import keep_freed_memory
from sabmn_ext.ops.retrieval import METRICS
from sabmn_ext.report.found import Found, draw_found

if TYPE_CHECKING:
    from torch import Tensor

    from sabmn_ext.retrieval.extractor import Extractor


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sabmn_ext.search",
        description="Rank a gallery by its likeness to each query image: print the lists and draw them. With a "
        "threshold, images within it are marked as the same person.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="a network that sabmn_ext.train has written"
    )
    parser.add_argument(
        "--gallery", type=Path, required=True, metavar="FOLDER", help="images (with those in folders below), or what "
        "sabmn_ext.extract has written with the same checkpoint"
    )  # fmt: skip
    parser.add_argument("--query", type=Path, required=True, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--k", type=int, metavar="N", help="images to show a query (default: 10, or the whole gallery)")
    parser.add_argument("--metric", choices=METRICS, help="distance (default: the checkpoint's)")
    parser.add_argument("--threshold", type=float, metavar="D", help="the same person: at a distance of at most D")
    parser.add_argument(
        "--result", type=Path, metavar="RUN", help="take the threshold from a result of sabmn_ext.evaluate or train: "
        "its JSON, or a run's folder that holds last.evaluation.json or result.json"
    )  # fmt: skip
    parser.add_argument(
        "--fpr", type=float, metavar="RATE", help="which of the result's thresholds: the share of pairs of two people "
        "that it may accept (default: 0.001)"
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("search.png"), metavar="FILE", help="picture (search.png)")
    add_network_options(parser)
    return parser


def read_threshold(run: Path, fpr: float, metric: str, flip: bool) -> tuple[float, str]:
    """The threshold of a result that ``sabmn_ext.evaluate`` or ``train`` has written, and what it means in words.

    Raises:
        FileNotFoundError: there is no such file; ValueError: it holds no threshold for this rate, metric and flip.
    """
    files = [run / "last.evaluation.json", run / "result.json"] if run.is_dir() else [run]
    file = next((file for file in files if file.is_file()), files[0])
    advice = "write one by: python -m sabmn_ext.evaluate --checkpoint FILE"
    if not file.is_file():
        raise FileNotFoundError(f"there is no result {file}; {advice}")
    try:
        report: dict[str, Any] = json.loads(file.read_bytes())
        points = {point["requested_fpr"]: point for point in report["verification"]["points"]}
        given = report["metric"], report.get("flip", flip), report.get("rerank")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is not a result with verification rates; {advice}") from None
    if given != (metric, flip, None):
        made = f"{given[0]} distances{', re-ranked' if given[2] else ''}, {'with' if given[1] else 'without'} --flip"
        used = f"{metric} distances {'with' if flip else 'without'} --flip"
        raise ValueError(f"the thresholds of {file} are for {made}; this search uses plain {used}")
    if fpr not in points or points[fpr]["threshold"] is None:
        known = ", ".join(f"{rate:g}" for rate, point in points.items() if point["threshold"] is not None)
        few = ": too few pairs of two people were there to measure that" if fpr in points else ""
        raise ValueError(f"{file} has no threshold for --fpr {fpr:g}{few}; it has them for {known or 'no rate'}")
    point = points[fpr]
    rates = f"{100 * point['fpr']:.3g} % of the pairs of two people and {100 * point['tpr']:.3g} % of those of one"
    return point["threshold"], f"accepted {rates} in {file}"


def gallery_of(args: argparse.Namespace, extractor: "Extractor") -> "tuple[Tensor, list[dict[str, str]]]":
    """Features [G, D], and path, pid and camid of each image as strings."""
    from sabmn_ext.retrieval.extraction import file_sha256, images_below, read_identity, read_part, settings_of
    from sabmn_ext.retrieval.features import extract_features
    from sabmn_ext.retrieval.inputs import as_matrix

    folder: Path = args.gallery
    if (folder / "extraction.json").exists():
        identity = read_identity(folder)
        if identity["checkpoint_sha256"] != file_sha256(args.checkpoint):
            raise ValueError(
                f"the features in {folder} are those of another checkpoint ({identity['checkpoint']}, with other "
                f"contents than {args.checkpoint}): distances to them mean nothing; extract them anew"
            )
        if identity["settings"] != settings_of(extractor):
            given = f"{identity['settings']}, not {settings_of(extractor)}"
            raise ValueError(f"the features in {folder} were made with {given}")
        features, rows = read_part(folder, "gallery")
        return as_matrix("gallery", features), rows
    records = images_below(folder)
    indices: list[int] = []
    found = extract_features(
        extractor.model,
        records,
        height=extractor.height,
        width=extractor.width,
        batch_size=extractor.batch_size,
        device=extractor.device,
        workers=args.workers,
        flip=extractor.flip,
        precision=extractor.precision,
        on_error=args.on_error,
        indices=indices,
    )
    return found, [{"path": records[i].path, "pid": "", "camid": ""} for i in indices]


def table(found: Sequence[Found]) -> str:
    lines = [f"{'rank':>4}{'distance':>12}  {'':12}  image"]
    for rank, item in enumerate(found, start=1):
        same = "same person" if item.same else ""
        labels = f"  ({', '.join(item.labels)})" if item.labels else ""
        lines.append(f"{rank:4d}{item.distance:12.5g}  {same:12}  {item.path}{labels}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    from sabmn_ext.retrieval.extractor import Extractor
    from sabmn_ext.retrieval.search import topk

    if args.threshold is not None and args.result:
        raise ValueError("--threshold and --result are two answers to one question; give one of them")
    if args.fpr is not None and not args.result:
        raise ValueError("--fpr chooses among the thresholds of --result RUN, which is missing")
    if args.k is not None and args.k < 1:
        raise ValueError(f"--k {args.k}: expected 1 or more")
    if not args.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: there is no folder {args.out.parent}")
    extractor = Extractor(
        args.checkpoint, device=args.device, batch_size=args.batch_size, flip=True if args.flip else None
    )
    metric = args.metric or extractor.metric
    threshold, meaning = args.threshold, ""
    if args.result:
        rate = 1e-3 if args.fpr is None else args.fpr
        threshold, meaning = read_threshold(args.result, rate, metric, extractor.flip)
    for file in args.query:
        if not file.is_file():
            raise FileNotFoundError(f"--query {file}: no such file")
    query = extractor([str(file) for file in args.query])
    gallery, rows = gallery_of(args, extractor)
    if args.k is not None and args.k > len(rows):
        raise ValueError(f"--k {args.k}: the gallery {args.gallery} has {len(rows):,} images")
    distances, items = topk(query, gallery, args.k or min(10, len(rows)), metric=metric)

    caption = f"{metric} distance"
    if threshold is not None:
        caption += f"; same person: at most {threshold:.5g}" + (f" ({meaning})" if meaning else "")
    print(f"{len(rows):,} images in {args.gallery}; {caption}")
    lists = []
    for file, ds, indices in zip(args.query, distances.tolist(), items.tolist(), strict=True):
        found = [
            Found(rows[i]["path"], d, None if threshold is None else d <= threshold, rows[i]["pid"], rows[i]["camid"])
            for d, i in zip(ds, indices, strict=True)
        ]
        print(f"\nquery {file}\n{table(found)}")
        lists.append((str(file), found))
    draw_found(args.out, lists, caption)
    print(f"\nwritten: {args.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    keep_freed_memory()
    try:
        run(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
