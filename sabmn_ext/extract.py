"""``python -m sabmn_ext.extract``: the features of a data set or a folder of images, into files."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sabmn_ext.host_memory import keep_freed_memory

SPLITS = ("train", "query", "gallery")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sabmn_ext.extract",
        description="Write the features of a data set or of a folder of images: NAME_features.npy and NAME.csv (path, "
        "pid, camid) for query and gallery, or for the folder as gallery. The same call again goes on where it was "
        "stopped or killed. python -m sabmn_ext.search and evaluate --features read the result.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="a network that sabmn_ext.train has written"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="FOLDER", help="all images in a folder and below it")
    source.add_argument("--data", metavar="PATH", help="a data set, as for sabmn_ext.train")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument(
        "--split", choices=SPLITS, action="append", help="part of the data set; may be repeated (query and gallery)"
    )
    parser.add_argument("--format", help="layout of the data set (default: recognised)")
    parser.add_argument("--no-camera-rule", action="store_true", help="data with one camera or none: leave camid out")
    add_network_options(parser)
    return parser


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``extract`` and ``search`` that say how images are turned into features."""
    parser.add_argument("--flip", action="store_true", help="average the features of each image and its mirror image")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images a step (default: the checkpoint's)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode images")
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="an unreadable image ends it, or is left out"
    )


def run(args: argparse.Namespace) -> None:
    from sabmn_ext.data import load_data
    from sabmn_ext.retrieval.extraction import images_below, write_features
    from sabmn_ext.retrieval.extractor import Extractor

    if args.images and (args.split or args.format or args.no_camera_rule):
        raise ValueError("--split, --format and --no-camera-rule go with --data, not with --images")
    extractor = Extractor(
        args.checkpoint, device=args.device, batch_size=args.batch_size, flip=True if args.flip else None
    )
    if args.images:
        parts = {"gallery": images_below(args.images)}
    else:
        data = load_data(args.data, format=args.format or "auto", cameras=not args.no_camera_rule)
        parts = {name: getattr(data, name) for name in dict.fromkeys(args.split or ("query", "gallery"))}
    rows = write_features(
        args.out, extractor, parts, labelled=not args.images, workers=args.workers, on_error=args.on_error
    )
    for name, count in rows.items():
        left_out = len(parts[name]) - count
        note = f" ({left_out:,} unreadable images left out)" if left_out else ""
        shape = f"{count:,} × {extractor.feature_dim} float32"
        print(f"{args.out / name}_features.npy: {shape}{note}; {name}.csv beside it")


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    keep_freed_memory()
    try:
        run(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; what was done is in {args.out}: the same call goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
