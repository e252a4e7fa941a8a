"""moa-eval: evaluate weights. Their files record the model and the data set."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli import app
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_file
from moa_train.runtime.libraries import require
from moa_train.schema import EvalConfig, RunConfig

if TYPE_CHECKING:
    from moa_train.assembly.trained import Trained
    from moa_train.data.source import Source
    from moa_train.runtime.distributed import Distributed

EXAMPLES = """moa-eval: compute accuracy and loss of trained weights, from exact counts.

The result is printed as JSON and written to a file.

Examples:
  moa-eval ckpt=outputs/RUN                              the best checkpoint of a run, or else the newest
  moa-eval ckpt=outputs/RUN/checkpoints/last split=val
  moa-eval ckpt=weights.safetensors root=/data/imagenet
  moa-eval ckpt=outputs/RUN report=true                  a page with mistakes, confusions and calibration
  moa-eval ckpt=outputs/RUN weights=model tta=flip       raw weights, averaged over mirror images
  moa-eval ckpt=outputs/RUN 'robustness=[all]' benchmarks=/data/shifted
  torchrun --nproc-per-node 2 -m moa_train.cli.evaluate ckpt=outputs/RUN"""


def evaluate(config: EvalConfig, overrides: list[str]) -> None:
    """Evaluate weights, and print and write the result."""
    place = config.place()
    if config.output and not Path(config.output).parent.is_dir():
        raise UserError(f"output={config.output}: there is no folder {Path(config.output).parent}.")
    if config.command:
        print_commands(place)
        return
    from moa_train.assembly.inputs import check_same_images
    from moa_train.assembly.process import set_up_process
    from moa_train.assembly.trained import Trained
    from moa_train.runtime.distributed import Distributed

    if config.report:
        require("report=true", ["matplotlib"], "plot")
    reference = read_reference(config)
    trained = Trained.open(place, weights=config.weights, code=config.code)
    run = overlay(trained.config, config)
    name = f"{'robustness' if config.robustness else 'eval'}-{config.split}.json"
    output = Path(config.output) if config.output else trained.folder / name
    with Distributed.start(config.device, run.runtime.timeout) as distributed:
        set_up_process(run.runtime, distributed)
        source = trained.open_split(config.split, config.root, config.workers)
        check_same_images({config.split: source}, distributed)
        if reference is not None and reference["data"].get("fingerprint") != source.fingerprint:
            raise UserError(f"reference={config.reference} was measured on other images. Evaluate it on the same ones.")
        if config.robustness:
            write = evaluate_shifts(config, trained, run, source, distributed, reference)
        else:
            write = evaluate_split(config, trained, run, source, distributed)
    if distributed.is_main:
        write(output)


def print_commands(place: Path) -> None:
    """Print the commands that produced the weights in ``place``."""
    from moa_train.engine.find_weights import find_weights
    from moa_train.tracking.provenance import reproduce

    found = find_weights(place)
    origin = json.loads(found.load()[1].get("origin", "[]"))
    print(reproduce(origin) or f"{found.path} does not record the commands that produced it.")


def evaluate_split(
    config: EvalConfig, trained: "Trained", run: RunConfig, source: "Source", distributed: "Distributed"
) -> Callable[[Path], None]:
    """Evaluate a split on all ranks, and return a function for rank 0 that writes the result to a file."""
    from moa_train.assembly.evaluation import build_evaluation
    from moa_train.assembly.outcome import describe
    from moa_train.assembly.process import adaptive_threads
    from moa_train.assembly.views import Views
    from moa_train.engine.predictions import OutcomeRecorder, Recorder, predictions_file

    if config.report and source.in_memory and distributed.is_main:
        from moa_train.report.plots import preload

        preload()
    model = trained.build().to(distributed.device)
    recorder = Recorder() if config.report else OutcomeRecorder()
    evaluation = build_evaluation(
        run,
        source,
        distributed,
        stream=sys.stderr,  # standard output is for the JSON only
        record=recorder,
        views=Views.plan(config.tta, run, source),
        threads=adaptive_threads(run.runtime, distributed),
    )
    result = evaluation(model)
    assert result is not None
    predictions = None
    if isinstance(recorder, Recorder):
        predictions = recorder.gather(distributed)
        outcomes = predictions.outcomes(source)
    else:
        outcomes = recorder.gather(distributed, source)

    def write(output: Path) -> None:
        outcome = {"split": config.split, **result.as_dict(), "weights": str(trained.found.path)}
        outcome |= {"data": source.describe(), **({"tta": config.tta} if config.tta != "none" else {})}
        write_json(outcome, output, required=bool(config.output))
        # The file in a run folder is what moa-compare tests: the run's own weights and images, as in its training.
        usual = (config.weights, config.tta, config.precision) == ("auto", "none", None)
        own = usual and config.place().resolve() == trained.folder.resolve()
        own = own and _knows(trained.folder, source, config)
        predicted, report = predictions_file(output.parent, config.split), output.parent / f"report-{config.split}"
        if output.name != f"eval-{config.split}.json":  # several results may share a folder
            predicted, report = (output.with_name(f"{output.stem}-{name}") for name in ("predictions.npz", "report"))
        if own or (config.output and output.parent.resolve() != trained.folder.resolve()):
            try:
                outcomes.write(predicted)
            except UserError as error:
                print(error, file=sys.stderr)
        if predictions is not None:
            from moa_train.report.class_map import class_map
            from moa_train.report.evaluation import Evaluated

            evaluated = Evaluated(trained, run, config.split, config.tta, source, predictions, model)
            html, _ = evaluated.write(report, class_map)
            print(f"Report: {html}", file=sys.stderr)
        print(f"{describe(result, config.split)}; {trained.found.description}", file=sys.stderr)

    return write


def evaluate_shifts(
    config: EvalConfig,
    trained: "Trained",
    run: RunConfig,
    source: "Source",
    distributed: "Distributed",
    reference: dict[str, Any] | None,
) -> Callable[[Path], None]:
    """Evaluate shifted images on all ranks, and return a function for rank 0 that writes the result and its page."""
    from moa_train.report.robustness import Robustness, relative_to, robustness_page
    from moa_train.runtime.files import write_whole

    folder = Path(config.benchmarks) if config.benchmarks else None
    model = trained.build().to(distributed.device)
    measured = Robustness(trained, run, config.tta, model, distributed).measure(config.robustness, folder, source)

    def write(output: Path) -> None:
        mistake = None
        if reference is not None:
            measured["reference"] = config.reference
            errors = measured["mean_corruption_error"]
            try:
                measured["relative"] = relative_to(errors, reference["mean_corruption_error"])
            except UserError as error:  # an hour of evaluations must not be lost
                mistake = error
        write_json(measured, output, required=bool(config.output))
        html = output.with_suffix(".html")
        write_whole(html, robustness_page(measured))
        print(f"Robustness: {html}", file=sys.stderr)
        if mistake is not None:
            raise mistake

    return write


def _knows(run_dir: Path, source: "Source", config: EvalConfig) -> bool:
    """Return whether the images are those of the run's own data set, as far as its records say."""
    from moa_train.tracking import provenance

    recorded = [start.get("data", {}).get(config.split, {}) for start in provenance.read(run_dir)[-1:]]  # old: no data
    return all(images.get("fingerprint", source.fingerprint) == source.fingerprint for images in recorded)


def read_reference(config: EvalConfig) -> dict[str, Any] | None:
    """Check the settings of robustness, and return the results of the reference model, if there is one.

    Raises:
        UserError: a file or folder does not exist, or a setting has no effect.
    """
    if not config.robustness and (config.benchmarks or config.reference):
        raise UserError(
            "benchmarks= and reference= have an effect only with robustness=, for example 'robustness=[all]'."
        )
    if config.robustness and config.report:
        raise UserError("report=true and robustness= are two evaluations. Run them one after the other.")
    if config.benchmarks and not Path(config.benchmarks).is_dir():
        raise UserError(f"benchmarks={config.benchmarks}: there is no such folder.")
    if not config.reference:
        return None
    try:
        reference: dict[str, Any] = json.loads(Path(config.reference).read_text())
        if not isinstance(reference["mean_corruption_error"], dict) or not isinstance(reference["data"], dict):
            raise TypeError("it has other content")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"reference={config.reference} cannot be used ({error}). Give the robustness-SPLIT.json of another model."
        ) from error
    return reference


def overlay(run: RunConfig, config: EvalConfig) -> RunConfig:
    """Return the run's configuration with the settings of this command applied to it."""
    data = replace(run.data, workers=run.data.workers if config.workers is None else config.workers)
    engine = replace(run.engine, eval_batch_size=config.batch_size or run.engine.eval_batch_size)
    precision = config.precision or run.runtime.eval_precision
    return replace(run, data=data, engine=engine, runtime=replace(run.runtime, eval_precision=precision))


def write_json(outcome: dict[str, Any], path: Path, required: bool) -> None:
    """Write the result as JSON and print it.

    Raises:
        UserError: the file cannot be written and is ``required``.
    """
    text = json.dumps(outcome, indent=2)
    try:
        write_file(path, f"{text}\n".encode())
    except OSError as error:
        message = f"Cannot write the result to {path}: {error.strerror}. Choose another file with output=."
        print(text)
        if required:
            raise UserError(message) from error
        print(message, file=sys.stderr)
        return
    print(text)


def main() -> None:
    """Entry point."""
    app.run(evaluate, EvalConfig, "eval", EXAMPLES)


if __name__ == "__main__":
    main()
