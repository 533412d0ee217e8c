"""``python -m sabmn_ext.train``: train, evaluate and report; without arguments, the built-in demo.

Several processes, one a GPU: ``torchrun --nproc-per-node N -m sabmn_ext.train ...``
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from sabmn_ext.host_memory import keep_freed_memory
from sabmn_ext.training.config import Config, all_keys, load_recipe, set_key

# Convenience options: each is an alias of one key of the recipe.
ALIASES = {
    "--data": "data.path",
    "--format": "data.format",
    "--cache": "data.cache",
    "--workers": "data.workers",
    "--backbone": "model.backbone",
    "--weights": "model.weights",
    "--epochs": "train.epochs",
    "--max-steps": "train.max_steps",
    "--batch-size": "train.batch_size",
    "--backbone-rate": "train.rate_backbone",
    "--added-rate": "train.rate_added",
    "--val-ids": "evaluation.val_ids",
    "--seed": "run.seed",
    "--device": "run.device",
    "--precision": "run.precision",
}
SWITCHES = ("channels_last", "compile")  # of the section "run"


def build_parser() -> argparse.ArgumentParser:
    parser = settings_parser("train", __doc__)
    parser.add_argument("--out", type=Path, help="output folder (default: runs/RECIPE-DATE-TIME)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, under its settings")
    return parser


def settings_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that ``build_config`` reads, ``--out`` and ``--resume`` aside."""
    meanings = all_keys()
    parser = argparse.ArgumentParser(
        prog=f"python -m sabmn_ext.{command}",
        description=description.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys for --set:\n" + "\n".join(f"  {key:31s} {meaning}" for key, meaning in meanings.items()),
    )
    parser.add_argument("--recipe", help="market1501, dukemtmc, strong, demo or a TOML file (default: by the data)")
    for option, key in ALIASES.items():
        parser.add_argument(option, dest=key, metavar="VALUE", help=f"{key}: {meanings[key]}")
    parser.add_argument("--image-size", metavar="HxW", help="image size in pixels (image.height, image.width)")
    for switch in SWITCHES:
        help_text = f"run.{switch}: {meanings[f'run.{switch}']}"
        parser.add_argument(f"--{switch.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=help_text)
    parser.add_argument("--no-camera-rule", action="store_true", help="ignore camera numbers (data.cameras)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key below")
    return parser


def build_config(args: argparse.Namespace) -> Config:
    """The recipe that was asked for (or fits the data, or was resumed) with the command line's changes."""
    changes = {key: value for key in ALIASES.values() if (value := getattr(args, key)) is not None}
    if args.image_size:
        size = re.fullmatch(r"(\d+)x(\d+)", args.image_size)
        if not size:
            raise ValueError(f"--image-size {args.image_size}: expected HxW in pixels, such as 256x128")
        changes["image.height"], changes["image.width"] = size.groups()
    for switch in SWITCHES:
        if (value := getattr(args, switch)) is not None:
            changes[f"run.{switch}"] = str(value).lower()
    if args.no_camera_rule:
        changes["data.cameras"] = "false"
    for item in args.set:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item}: expected KEY=VALUE, such as train.epochs=10")
        changes[key.strip()] = value.strip()

    if args.recipe:
        config = load_recipe(args.recipe)
    elif args.resume and args.out and (args.out / "config.toml").exists():
        config = load_recipe(str(args.out / "config.toml"))
    else:
        config = load_recipe(_recipe_for(changes))
    for key, value in changes.items():
        set_key(config, key, value, text=True)
    return config


def _recipe_for(changes: dict[str, str]) -> str:
    path = changes.get("data.path", "demo")
    if path.split(":")[0] == "demo":
        return "demo"
    from sabmn_ext.data.records import load_data

    data = load_data(path, format=changes.get("data.format", "auto"), cameras=changes.get("data.cameras") != "false")
    return "dukemtmc" if "duke" in data.name.lower() else "market1501"


def table(result: dict[str, Any]) -> str:
    """The result beside the same network untrained, chance, and the trained one with its attention off."""
    columns = ["map", "map_trapezoid", "minp", "rank1", "rank5", "rank10"]
    titles = ["mAP", "mAP trapez.", "mINP", "rank-1", "rank-5", "rank-10"]
    rows = {
        "trained": result,
        "untrained": result["untrained"],
        "chance": {"map": result["chance_map"]},
        "trained, gamma = 0": {"map": result["map_gamma_zero"]},
    }
    lines = [f"{'in %':20s}" + "".join(f"{title:>13s}" for title in titles)]
    for name, figures in rows.items():
        values = [figures.get(column) for column in columns]
        if values[0] is not None:
            cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
            lines.append(f"{name:20s}" + "".join(f"{cell:>13s}" for cell in cells))
    return "\n".join(lines)


def is_message(error: Exception) -> bool:
    """Whether the package itself has raised it, to be read, and it is no fault of the program."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(__file__).parent in Path(frames[-1].filename).parents


def main(arguments: list[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    keep_freed_memory()
    from sabmn_ext.training.interrupt import TrainingInterrupted
    from sabmn_ext.training.loop import train
    from sabmn_ext.training.processes import joined

    try:
        if args.resume and args.out is None:
            raise ValueError("--resume: name the folder of the run to go on with by --out DIR")
        config = build_config(args)
        name = config.recipe.replace("/", "-")
        out = args.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        with joined() as job:
            out = Path(job.text_of_first(str(out)))  # the time is not the same in all processes
            result = train(config, out, resume=args.resume, job=job)
    except TrainingInterrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except (ValueError, OSError, RuntimeError) as error:
        if not is_message(error):
            raise  # the traceback is what helps
        print(f"error: {error}", file=sys.stderr)
        return 2
    if job.rank > 0:
        return 0
    print(table(result))
    print(
        f"{result['num_valid_queries']} of {result['num_queries']} queries have a match among the"
        f" {result['num_gallery']} gallery images; {result['steps']} steps in {result['seconds']:.0f} s"
    )
    if result["gamma"] is not None:
        print(f"attention: gamma {result['gamma']:+.4f}, |gamma a| / |x| {result['attention_ratio']:.4f}")
    print(f"files: {out}/ (result.json, last.pt, log.txt, config.toml, tensorboard/)")
    if (out / "report" / "report.html").exists():
        print(f"report: {out / 'report' / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
