"""``python -m sabmn_ext.export``: the network of a checkpoint as a file that runs without this package."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sabmn_ext.retrieval.export import FORMATS, export_checkpoint


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sabmn_ext.export",
        description="Write the network of a checkpoint for programs without sabmn_ext: an ONNX model, or a program of "
        "torch.export. Spectral normalisation is folded into the weights, attention is plain operators, batches have "
        "any size. How images are prepared stands in the file's metadata. What was written is run and compared with "
        "the checkpoint.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="a network that sabmn_ext.train has written"
    )
    endings = " or ".join(f"{chosen.ending} ({name})" for name, chosen in FORMATS.items())
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"file to write: {endings}")
    parser.add_argument("--format", choices=FORMATS, required=True, help="onnx takes the packages of sabmn_ext[export]")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        difference = export_checkpoint(args.checkpoint, args.out, args.format)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.out.stat().st_size / 1e6:,.1f} MB; its features differ from the checkpoint's by at most "
          f"{difference:.1e} of the largest one")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
