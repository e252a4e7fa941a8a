"""moa-data: look after data sets."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from moa_train.runtime.errors import UserError
from moa_train.runtime.output import protect_output
from moa_train.runtime.signals import Exit
from moa_train.schema import DataConfig

FOUND = 1
"""Exit code of `moa-data check` when it found something."""

EXAMPLES = """examples:
  moa-data pack cifar100_images data/cifar100     once; then: moa-train data=cifar100
  moa-data check /data/imagenet --workers 16      before a long run
  moa-data stats /data/flowers --image-size 224   gives data.mean and data.std
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exit with 0, with 1 if a check found something, with 2 after a mistake of the user."""
    protect_output()
    options = parser().parse_args(arguments)
    try:
        sys.exit(options.command(options))
    except UserError as error:
        print(f"moa-data: {error}", file=sys.stderr)
        sys.exit(Exit.USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = "folder that holds train/, val/ or test/, each with class folders of images or packed"
    result = argparse.ArgumentParser(
        "moa-data", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = result.add_subparsers(required=True, metavar="COMMAND")

    pack = _command(commands, "pack", run_pack, "write small images of one size as memory-mapped arrays")
    pack.add_argument("source", metavar="SRC", type=Path, help=root)
    pack.add_argument("out", metavar="OUT", type=Path, help="folder for pack-train.npy and so on; may be SRC")

    check = _command(commands, "check", run_check, "find unreadable, duplicate and leaking images; exit with 1 if any")
    check.add_argument("root", metavar="ROOT", type=Path, help=root + "; or a folder of class folders")
    check.add_argument("--workers", type=_whole, default=0, help="processes that decode (default: 0, none)")
    check.add_argument("--show", type=_whole, default=10, help="findings printed of each kind (default: 10)")
    check.add_argument("--json", type=Path, metavar="FILE", help="write all findings to this file")

    stats = _command(commands, "stats", run_stats, "compute the mean and deviation of each channel over train")
    stats.add_argument("root", metavar="ROOT", type=Path, help=root)
    stats.add_argument("--image-size", type=_whole, default=224, help="side of the central crop (default: 224)")
    stats.add_argument("--samples", type=_whole, default=10_000, help="images used at most (default: 10000; 0: all)")
    stats.add_argument("--workers", type=_whole, default=0, help="processes that decode (default: 0, none)")
    return result


def run_pack(options: argparse.Namespace) -> int:
    """Pack every split of a class-folder tree."""
    from moa_train.data.dataset import SPLITS
    from moa_train.data.pack import pack_tree
    from moa_train.data.tree import scan_split

    splits = [split for split in SPLITS if (options.source / split).is_dir()]
    if not splits:
        raise UserError(f"{options.source}: no folder {', '.join(SPLITS[:-1])} or {SPLITS[-1]} in it.")
    for split in splits:
        tree = scan_split(options.source, split)
        pack_tree(tree, options.out, split)
        print(f"{options.out}/pack-{split}.npy: {len(tree.files):,} images of {len(tree.classes)} classes")
    return Exit.FINISHED


def run_check(options: argparse.Namespace) -> int:
    """Scan a data set and print what is wrong with it."""
    from moa_train.data.check import check

    report = check(options.root, options.workers, _progress())
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    for split, count in report.images.items():
        ignored = report.ignored.get(split, 0)
        print(f"{split:10} {count:,} images" + (f", {ignored:,} other files ignored" if ignored else ""))
    kinds: dict[str, Sequence[str | list[str]]] = {
        "unreadable images": report.unreadable,
        "groups of equal images within a split": report.duplicates,
        "groups of equal images in different splits": report.leaks,
        "of those groups, with different classes": report.conflicts,
    }
    for kind, findings in kinds.items():
        print(f"{len(findings):10,} {kind}")
        for finding in findings[: options.show]:
            print("           " + (finding if isinstance(finding, str) else " = ".join(finding)))
        if len(findings) > options.show:
            print(f"           ... {len(findings) - options.show:,} more: --show, --json")
    return Exit.FINISHED if report.clean else FOUND


def run_stats(options: argparse.Namespace) -> int:
    """Print channel statistics as settings of data."""
    import numpy as np

    from moa_train.data.dataset import open_split
    from moa_train.data.loader import EvalLoader
    from moa_train.data.statistics import channel_statistics

    if not options.image_size:
        raise UserError("--image-size 0: must be at least 1. Usual: 224.")
    config = DataConfig(name="folder", root=str(options.root), image_size=options.image_size)
    source = open_split(config, "train")
    if 0 < options.samples < len(source):
        source = source.subset(np.linspace(0, len(source) - 1, options.samples).astype(np.int64), source.title)
    mean, std = channel_statistics(EvalLoader(source, batch_size=64, workers=options.workers))
    print(f"# {len(source):,} training images of {options.root}, central crops of {options.image_size} pixels")
    print(f"data.mean=[{','.join(f'{value:.4f}' for value in mean)}]")
    print(f"data.std=[{','.join(f'{value:.4f}' for value in std)}]")
    return Exit.FINISHED


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    purpose: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=purpose, description=purpose)
    command.set_defaults(command=run)
    return command


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _progress() -> Callable[[int], None]:
    """Return a function that shows a count where the output of errors is a terminal."""
    shown = sys.stderr.isatty()

    def show(images: int) -> None:
        if shown and images % 100 == 0:
            print(f"{images:,} images", end="\r", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    main()
