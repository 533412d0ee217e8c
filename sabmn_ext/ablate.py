"""``python -m sabmn_ext.ablate``: the paper's ablation as training runs, in a table beside the paper's numbers.

One run for each row and seed, each in a folder of its own. The same command goes on after a stop or a kill.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from sabmn_ext.host_memory import keep_freed_memory
from sabmn_ext.train import build_config, is_message, settings_parser
from sabmn_ext.training.ablation import GROUPS, Row, check_folder, pick_rows, run
from sabmn_ext.training.checkpoint import write_atomically
from sabmn_ext.training.config import Config, to_toml

# Three times an evaluation's work, and a page, for every run: not unless --set asks for them.
PLAIN = ("evaluation.counterfactuals=false", "run.report=false")


def build_parser() -> argparse.ArgumentParser:
    parser = settings_parser("ablate", __doc__)
    names = "; ".join(f"{group}: {' '.join(row.name for row in rows)}" for group, rows in GROUPS.items())
    parser.add_argument("--out", type=Path, required=True, help="output folder; one with runs in it is gone on with")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help=f"rows or groups (default: all). {names}")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="one run of each row for each (run.seed)")
    return parser


def ablate(base: Config, rows: list[Row], seeds: list[int], out: Path) -> list[dict[str, Any]]:
    """Train all rows with the first seed, then with the next one; the table is written anew after each run."""
    configs = {(row.name, seed): row.config(base, seed) for seed in seeds for row in rows}
    folders = {(name, seed): out / name / f"seed{seed}" for name, seed in configs}
    for key, config in configs.items():
        check_folder(config, folders[key])
    table: list[dict[str, Any]] = [
        {"name": row.name, "title": row.title, "paper": row.paper, "seeds": [], "runs": []} for row in rows
    ]
    started = time.monotonic()
    for number, ((name, seed), config) in enumerate(configs.items()):
        line = next(line for line in table if line["name"] == name)
        elapsed = f", {(time.monotonic() - started) / 60:.0f} min so far"
        print(f"\n{number + 1} of {len(configs)}: {line['title']}, seed {seed}{elapsed}", flush=True)
        line["runs"].append(run(config, folders[name, seed]))
        line["seeds"].append(seed)
        write_table(out, [line for line in table if line["runs"]], base)
    return table


def write_table(out: Path, table: list[dict[str, Any]], base: Config) -> None:
    """table.json, table.md and table.png."""
    from sabmn_ext.report.ablation import draw, markdown_table, summary

    settings = {"data": base.data.path, "recipe": to_toml(base)}
    contents = {**settings, "rows": [{**row, "summary": summary(row)} for row in table]}
    seeds = sorted({seed for row in table for seed in row["seeds"]})
    about = f"\nData {base.data.path}, recipe {base.recipe}, seeds {', '.join(map(str, seeds))}.\n"
    write_atomically(out / "table.json", lambda file: file.write(json.dumps(contents, indent=2).encode()))
    write_atomically(out / "table.md", lambda file: file.write((markdown_table(table) + about).encode()))
    draw(out / "table.png", table)


def main(arguments: list[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    keep_freed_memory()
    from sabmn_ext.report.ablation import text_table
    from sabmn_ext.training.interrupt import TrainingInterrupted

    args.resume, args.set = False, [*PLAIN, *args.set]
    try:
        rows = pick_rows(args.rows)
        base = build_config(args)
        seeds = list(dict.fromkeys(args.seeds or [base.run.seed]))
        table = ablate(base, rows, seeds, args.out)
    except TrainingInterrupted as stop:
        print(f"{stop}, or the whole ablation with the same command as before", file=sys.stderr)
        return 128 + stop.signum
    except (ValueError, OSError, RuntimeError) as error:
        if not is_message(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{text_table(table)}\nfiles: {args.out}/ (table.json, table.md, table.png, a folder for each row)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
