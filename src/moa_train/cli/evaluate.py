"""moa-eval: evaluate weights. Their files record the model and the data set."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from moa_train.cli import app
from moa_train.runtime.errors import UserError
from moa_train.schema import EvalConfig, RunConfig

EXAMPLES = """moa-eval: compute accuracy and loss of trained weights, from exact counts.

The result is printed as JSON and written to a file.

Examples:
  moa-eval ckpt=outputs/RUN                              the best checkpoint of a run, or else the newest
  moa-eval ckpt=outputs/RUN/checkpoints/last split=val
  moa-eval ckpt=weights.safetensors root=/data/imagenet
  moa-eval ckpt=outputs/RUN report=true                  a page with mistakes, confusions and calibration
  moa-eval ckpt=outputs/RUN weights=model tta=flip       raw weights, averaged over mirror images
  torchrun --nproc-per-node 2 -m moa_train.cli.evaluate ckpt=outputs/RUN"""


def evaluate(config: EvalConfig, overrides: list[str]) -> None:
    """Evaluate weights, and print and write the result."""
    if not config.ckpt:
        raise UserError("ckpt is missing. Give ckpt=PATH: a run folder, a checkpoint folder or a .safetensors file.")
    if config.output and not Path(config.output).parent.is_dir():
        raise UserError(f"output={config.output}: there is no folder {Path(config.output).parent}.")
    from moa_train.assembly.evaluation import build_evaluation
    from moa_train.assembly.outcome import describe
    from moa_train.assembly.process import set_up_process
    from moa_train.assembly.trained import Trained
    from moa_train.assembly.views import Views
    from moa_train.engine.find_weights import find_weights
    from moa_train.engine.predictions import Recorder, predictions_file
    from moa_train.runtime.distributed import Distributed
    from moa_train.tracking.provenance import reproduce

    if config.command:
        found = find_weights(Path(config.ckpt))
        origin = json.loads(found.load()[1].get("origin", "[]"))
        print(reproduce(origin) or f"{found.path} does not record the commands that produced it.")
        return
    if config.report:
        from moa_train.report.plots import require_matplotlib

        require_matplotlib()
    trained = Trained.open(Path(config.ckpt), weights=config.weights, code=config.code)
    run = overlay(trained.config, config)
    with Distributed.start(config.device, run.runtime.timeout) as distributed:
        set_up_process(run.runtime, distributed)
        source = trained.open_split(config.split, config.root, config.workers)
        model, recorder = trained.build().to(distributed.device), Recorder()
        views = Views.plan(config.tta, run, source)
        # Standard output is for the JSON only.
        result = build_evaluation(run, source, distributed, stream=sys.stderr, record=recorder, views=views)(model)
        assert result is not None
        predictions = recorder.gather(distributed)
    if distributed.is_main:
        path = trained.found.path
        outcome = {"split": config.split, **result.as_dict(), "weights": str(path), "data": source.describe()}
        outcome |= {"tta": config.tta} if config.tta != "none" else {}
        output = Path(config.output) if config.output else trained.folder / f"eval-{config.split}.json"
        write(outcome, output, required=bool(config.output))
        try:
            predictions.outcomes(source).write(predictions_file(output.parent, config.split))
        except UserError as error:
            print(error, file=sys.stderr)
        if config.report:
            from moa_train.report.evaluation import Evaluated

            evaluated = Evaluated(trained, run, config.split, config.tta, source, predictions, model)
            html, _ = evaluated.write(output.parent / f"report-{config.split}")
            print(f"Report: {html}", file=sys.stderr)
        print(f"{describe(result, config.split)}; {trained.found.description}", file=sys.stderr)


def overlay(run: RunConfig, config: EvalConfig) -> RunConfig:
    """Return the run's configuration with the settings of this command applied to it."""
    data = replace(run.data, workers=run.data.workers if config.workers is None else config.workers)
    engine = replace(run.engine, eval_batch_size=config.batch_size or run.engine.eval_batch_size)
    precision = config.precision or run.runtime.eval_precision
    return replace(run, data=data, engine=engine, runtime=replace(run.runtime, eval_precision=precision))


def write(outcome: dict[str, Any], path: Path, required: bool) -> None:
    """Write the result as JSON and print it.

    Raises:
        UserError: the file cannot be written and is ``required``.
    """
    text = json.dumps(outcome, indent=2)
    try:
        path.write_text(text + "\n")
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
