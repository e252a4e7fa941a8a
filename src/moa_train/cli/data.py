"""moa-data: pack and check data sets, and compute their statistics."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from moa_train.runtime.command_line import argument, leave_with, path
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_file
from moa_train.runtime.output import protect_output
from moa_train.runtime.signals import Exit
from moa_train.schema import DataConfig

if TYPE_CHECKING:
    from moa_train.data.image import Decoding

FOUND = 1
"""Exit code of `moa-data check` if there are findings."""

EXAMPLES = """examples:
  moa-data pack cifar100_images data/cifar100     run once; afterward: moa-train data=cifar100
  moa-data check /data/imagenet --workers 16      run before a long training
  moa-data stats /data/flowers --image-size 224   prints data.mean and data.std
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exit with 0, with 1 if a check has findings, with 2 after an error that the user can fix."""
    protect_output()
    options = parser().parse_args(arguments)
    leave_with(lambda: options.command(options))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = "folder that holds train/, val/ or test/, each with class folders of images, or their packs"
    result = argparse.ArgumentParser(
        "moa-data",
        description="Pack and check data sets, and compute their statistics.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = result.add_subparsers(required=True, metavar="COMMAND")

    pack = _command(commands, "pack", run_pack, "convert small images of equal size to memory-mapped arrays")
    pack.add_argument("source", metavar="SRC", type=path, help=root)
    pack.add_argument(
        "out", metavar="OUT", type=path, help="folder for pack-train.npy, pack-val.npy, pack-test.npy; may be SRC"
    )
    _add_decoding(pack)

    check = _command(
        commands, "check", run_check, "find unreadable images, duplicates, and images that occur in several splits"
    )
    check.add_argument("root", metavar="ROOT", type=path, help=root + "; or a folder that holds class folders")
    check.add_argument(
        "--show",
        type=_whole,
        metavar="COUNT",
        default=10,
        help="number of findings to print of each kind (default: 10)",
    )
    check.add_argument("--json", type=path, metavar="FILE", help="write all findings to this JSON file")
    _add_decoding(check, workers=True)

    stats = _command(
        commands, "stats", run_stats, "compute the mean and standard deviation of each channel over the training images"
    )
    stats.add_argument("root", metavar="ROOT", type=path, help=root)
    stats.add_argument(
        "--image-size",
        type=_whole,
        metavar="PIXELS",
        default=224,
        help="side of the center crop in pixels (default: 224)",
    )
    stats.add_argument(
        "--samples",
        type=_whole,
        metavar="COUNT",
        default=10_000,
        help="largest number of images to use (default: 10000; 0: all)",
    )
    _add_decoding(stats, workers=True)
    return result


def run_pack(options: argparse.Namespace) -> int:
    """Pack every split of a folder tree."""
    from moa_train.data.pack import is_packed, pack_tree
    from moa_train.data.tree import check_split_names, compare_classes, scan_split
    from moa_train.schema import SPLITS

    splits = [split for split in SPLITS if (options.source / split).is_dir()]
    if not splits:
        raise UserError(f"{options.source} contains no folder train, val or test. Give the folder that contains them.")
    check_split_names(options.source)
    if old := [split for split in SPLITS if split not in splits and is_packed(options.out, split)]:
        raise UserError(
            f"{options.out} holds packs of {' and '.join(old)}, which {options.source} does not have. They may hold "
            f"the same images as the new ones. Delete {' and '.join(f'pack-{split}.*' for split in old)} there first."
        )
    trees = [scan_split(options.source, split) for split in splits]
    for tree in trees[1:]:
        compare_classes(str(trees[0].root), trees[0].classes, str(tree.root), tree.classes)
    for split, tree in zip(splits, trees, strict=True):
        pack_tree(tree, options.out, split, _decoding(options))
        print(f"{options.out}/pack-{split}.npy: {len(tree.files):,} images of {len(tree.classes)} classes")
    return Exit.FINISHED


def run_check(options: argparse.Namespace) -> int:
    """Check a data set and print the findings."""
    from moa_train.data.check import check

    report = check(options.root, options.workers, _progress(), _decoding(options))
    if options.json:
        write_file(options.json, (json.dumps(asdict(report), indent=1) + "\n").encode())
    for split, count in report.images.items():
        ignored = report.ignored.get(split, 0)
        print(f"{split:10} {count:,} images" + (f", {ignored:,} other files ignored" if ignored else ""))
    kinds: dict[str, Sequence[str | list[str]]] = {
        "unreadable images": report.unreadable,
        "groups of identical images within a split": report.duplicates,
        "groups of identical images in different splits": report.leaks,
        "of these groups contain different classes": report.conflicts,
        "images with almost no contrast": report.flat,
        "links that are broken or lead to a folder that contains them": report.broken,
        "images that differ from those in the pack": report.stale,
    }
    for kind, findings in kinds.items():
        print(f"{len(findings):10,} {kind}")
        for finding in findings[: options.show]:
            print("           " + (finding if isinstance(finding, str) else " = ".join(finding)))
        if len(findings) > options.show:
            print(f"           ... and {len(findings) - options.show:,} more; see --show and --json")
    return Exit.FINISHED if report.clean else FOUND


def run_stats(options: argparse.Namespace) -> int:
    """Print channel statistics in the form of settings."""
    import numpy as np

    from moa_train.data.dataset import open_split
    from moa_train.data.loader import EvalLoader
    from moa_train.data.statistics import channel_statistics

    if not options.image_size:
        raise UserError("--image-size is 0, but must be at least 1. The usual value is 224.")
    config = DataConfig(
        name="folder",
        root=str(options.root),
        image_size=options.image_size,
        max_pixels=options.max_pixels,
        max_seconds=options.max_seconds,
        range=options.range,
    )
    source = open_split(config, "train")
    if 0 < options.samples < len(source):
        source = source.subset(np.linspace(0, len(source) - 1, options.samples).astype(np.int64), source.title)
    mean, std = channel_statistics(EvalLoader(source, batch_size=64, workers=max(1, options.workers)))
    print(f"# {len(source):,} training images of {options.root}, center crops of {options.image_size} pixels")
    for key, values in (("data.mean", mean), ("data.std", std)):
        print(argument(key, [f"{value:.4f}" for value in values]))
    return Exit.FINISHED


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    purpose: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
    command.set_defaults(command=run)
    return command


def _add_decoding(command: argparse.ArgumentParser, *, workers: bool = False) -> None:
    if workers:
        text = "number of processes that decode images (default: 1)"
        command.add_argument("--workers", type=_whole, default=1, metavar="COUNT", help=text)
    command.add_argument(
        "--range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="gray levels of black and white in images with more than 8 bits per channel, like data.range",
    )
    command.add_argument(
        "--max-pixels",
        type=_whole,
        default=DataConfig.max_pixels,
        metavar="COUNT",
        help="images with more pixels count as unreadable, like data.max_pixels (default: %(default)s)",
    )
    command.add_argument(
        "--max-seconds",
        type=float,
        default=DataConfig.max_seconds,
        metavar="SECONDS",
        help="an image whose decoding takes longer is an error, like data.max_seconds (default: %(default)s)",
    )


def _decoding(options: argparse.Namespace) -> "Decoding":
    from moa_train.data.image import Decoding

    return Decoding.of(DataConfig(max_pixels=options.max_pixels, max_seconds=options.max_seconds, range=options.range))


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a non-negative integer")
    return int(text)


def _progress() -> Callable[[int], None]:
    """Return a function that prints a count to standard error if that is a terminal."""
    shown = sys.stderr.isatty()

    def show(images: int) -> None:
        if shown and images % 100 == 0:
            print(f"{images:,} images", end="\r", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    main()
