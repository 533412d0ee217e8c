"""python -m sabmn_ext.data PATH: what is in a data set, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import sys

from .records import FORMATS, load_data
from .sheet import save_sheet
from .summary import as_text, audit, summarize


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sabmn_ext.data", description="Summary and audit of a data set."
    )
    parser.add_argument(
        "path", help="the data set's folder or the one around it, a .csv file, or demo (demo:SEED)"
    )
    parser.add_argument("--format", choices=FORMATS, default="auto", help="default: by what is on disk")
    parser.add_argument("--no-camera-rule", action="store_true", help="for data with one camera or none")
    parser.add_argument(
        "--with-val", action="store_true", help="MSMT17: list_val.txt belongs to the training images"
    )
    parser.add_argument("--no-audit", action="store_true", help="counts only: do not open the images")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--sheet", metavar="FILE.png", help="draw a sheet of sample images with pid and camera"
    )
    options = parser.parse_args(arguments)
    try:
        data = load_data(
            options.path, format=options.format, cameras=not options.no_camera_rule, with_val=options.with_val
        )
        if options.sheet:
            save_sheet(data, options.sheet)
        summary = summarize(data)
        found = None if options.no_audit else audit(data)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary | {"audit": found}, indent=2) if options.json else as_text(summary, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
