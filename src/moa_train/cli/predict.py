"""moa-predict: predict the classes of image files, and explain the predictions."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moa_train.cli import app
from moa_train.runtime.errors import UserError, choose
from moa_train.runtime.libraries import require
from moa_train.runtime.output import unprotected
from moa_train.runtime.signals import Exit
from moa_train.schema import PredictConfig

if TYPE_CHECKING:
    from moa_train.assembly.predictor import PredictedBatch, Predictor
    from moa_train.report.class_map import Faithfulness

EXAMPLES = """moa-predict: predict the classes of image files with trained weights.

Images are prepared as in evaluation. Files that cannot be read are reported and skipped; the exit code is then 2. If
decoding a file takes longer than max_seconds, the command ends with an error.

Examples:
  moa-predict ckpt=outputs/RUN input=photo.jpg
  moa-predict ckpt=outputs/RUN input=photos top=1 format=csv output=predictions.csv
  moa-predict ckpt=outputs/RUN 'input=photos/*.png' format=jsonl
  find photos -name '*.jpg' | moa-predict ckpt=weights.safetensors input=-
  moa-predict ckpt=outputs/RUN input=photos explain=pictures   class maps and attention, one PNG per image"""

MAPS = 16
"""Class maps computed at a time. Their backward passes need far more memory per image than predictions."""


def predict(config: PredictConfig, overrides: list[str]) -> int:
    """Predict, write the predictions, and return the exit code."""
    place = config.place()
    if not config.input:
        raise UserError("input is missing. Give input=PATH: an image file, a folder, a pattern in quotes, or -.")
    for key, folder in (("output", config.output), ("explain", config.explain)):
        if folder and not Path(folder).absolute().parent.is_dir():
            raise UserError(f"{key}={folder}: there is no folder {Path(folder).parent}.")
    if config.explain:
        require("explain=", ["matplotlib"], "plot")
    if config.explain_window is not None and len(config.explain_window) != 2:
        raise UserError(f"explain_window={config.explain_window} must be [row,column].")
    from moa_train.data.paths import find_images

    # as bytes, because names of files need not be valid UTF-8
    paths = find_images(config.input, map(os.fsdecode, sys.stdin.buffer) if config.input == "-" else ())
    from moa_train.assembly.predictor import Predictor
    from moa_train.assembly.process import set_up_process
    from moa_train.assembly.trained import Trained
    from moa_train.report.rows import open_rows
    from moa_train.runtime.distributed import Distributed
    from moa_train.runtime.text import printable
    from moa_train.tracking.console import EvaluationProgress

    trained = Trained.open(place, weights=config.weights, code=config.code)
    if config.explain_class is not None and config.explain_class not in trained.classes:
        raise UserError(choose("explain_class", config.explain_class, trained.classes))
    unreadable = 0
    style = trained.config.tracking.progress
    if not config.output and sys.stdout.isatty():
        style = "plain"  # the bar would share a line with the predictions
    with Distributed.start(config.device, trained.config.runtime.timeout) as distributed:
        set_up_process(trained.config.runtime, distributed)
        predictor = Predictor(
            trained,
            distributed.device,
            config.precision,
            max_pixels=config.max_pixels,
            max_seconds=config.max_seconds,
            range=config.range,
        )
        explain = _Explainer(config, predictor) if config.explain else None
        progress = EvaluationProgress("predicting", style=style, stream=sys.stderr)
        batches = predictor.batches(paths, batch_size=config.batch_size, processes=config.workers, advance=progress)
        with _opened(config) as stream, contextlib.closing(progress):
            with _writing(config):
                write = open_rows(config.format, stream, paths, predictor.classes)
            for batch in batches:
                with _writing(config):
                    for path, logits_K in zip(batch.paths, batch.logits, strict=True):
                        write(path, *predictor.name(logits_K, config.top))
                    stream.flush()
                for message in batch.unreadable:
                    progress.say(printable(message))
                unreadable += len(batch.unreadable)
                if explain:
                    explain(batch)
    print(f"{len(paths) - unreadable} images; {predictor.description}", file=sys.stderr)
    if explain:
        explain.report()
    if unreadable:
        print(f"error: {unreadable} of {len(paths)} files are unreadable and were skipped.", file=sys.stderr)
    return Exit.USER_ERROR if unreadable else Exit.FINISHED


@contextlib.contextmanager
def _opened(config: PredictConfig) -> Iterator[TextIO]:
    """Open ``output``, or return standard output without its protection, so that it raises errors."""
    if not config.output:
        yield unprotected(sys.stdout)
        return
    with _writing(config):
        # newline="" so that names with carriage returns are written as they are
        stream = Path(config.output).open("w", encoding="utf-8", errors="backslashreplace", newline="")  # noqa: SIM115
    try:
        yield stream
    finally:
        with _writing(config):
            stream.close()


@contextlib.contextmanager
def _writing(config: PredictConfig) -> Iterator[None]:
    """Exit quietly if the reader of the predictions has exited, as in ``moa-predict | head``.

    Raises:
        UserError: the predictions cannot be written for another reason.
    """
    try:
        yield
    except BrokenPipeError:
        sys.exit(Exit.FINISHED)
    except OSError as error:
        place = config.output or "to standard output"
        reason = error.strerror or error
        raise UserError(f"Cannot write {place}: {reason}. Choose another file with output=.") from error


class _Explainer:
    """Draw the explanation of every image, and measure the class maps of the first ones."""

    def __init__(self, config: PredictConfig, predictor: "Predictor") -> None:
        assert config.explain
        self._config, self._predictor, self._count = config, predictor, 0
        self._folder, self._measured = Path(config.explain), list["Faithfulness"]()
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"explain={config.explain} cannot be created: {error.strerror}.") from error

    def __call__(self, batch: "PredictedBatch") -> None:
        """Draw the images of a batch."""
        import torch

        from moa_train.report.attention import attention_maps
        from moa_train.report.class_map import class_map, faithfulness
        from moa_train.report.explain import draw_explanation

        if not batch.paths:
            return
        predictor, config = self._predictor, self._config
        model, chosen_B = predictor.model, batch.logits.argmax(1)
        if config.explain_class is not None:
            chosen_B.fill_(predictor.classes.index(config.explain_class))
        x_BCHW = predictor.normalize(batch.images.to(predictor.precision.device))
        parts = zip(x_BCHW.split(MAPS), chosen_B.to(x_BCHW.device).split(MAPS), strict=True)
        maps_BHW = torch.cat([class_map(model, *part) for part in parts])
        left = min(len(batch.paths), max(0, config.explain_checks - self._count))
        if left:
            part = slice(0, left)
            chosen = chosen_B.to(x_BCHW.device)
            self._measured.append(faithfulness(model, x_BCHW[part], chosen[part], maps_BHW[part], seed=self._count))
        window = None if config.explain_window is None else (config.explain_window[0], config.explain_window[1])
        for row, path in enumerate(batch.paths):
            draw_explanation(
                self._folder / f"{self._count + row:05}-{_file_name(path)}.png",
                batch.images[row],
                maps_BHW[row].cpu(),
                *attention_maps(model, x_BCHW[row : row + 1]),  # those of a whole batch might not fit into memory
                title=path,
                explained=predictor.classes[int(chosen_B[row])],
                predictions=predictor.name(batch.logits[row], 3),
                window=window,
            )
        self._count += len(batch.paths)

    def report(self) -> None:
        """Print how faithful the class maps are."""
        from moa_train.report.class_map import Faithfulness

        print(f"{self._count} pictures in {self._folder}", file=sys.stderr)
        if self._measured:
            print(f"class maps: {Faithfulness.concatenate(self._measured)}", file=sys.stderr)


def _file_name(path: str) -> str:
    """Return the stem of a path, with only the characters that are safe in names of files."""
    return "".join(char if char.isalnum() or char in "-_" else "_" for char in Path(path).stem)[:60]


def main() -> None:
    """Entry point."""
    app.run(predict, PredictConfig, "predict", EXAMPLES)


if __name__ == "__main__":
    main()
