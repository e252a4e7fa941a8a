"""moa-train: train, resume and fine-tune models."""

import copy

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from moa_train.cli import app, sweep
from moa_train.cli.compose import GROUPS, typed
from moa_train.knobs import knobs
from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import StopSignals
from moa_train.schema import PLACES, RunConfig
from moa_train.serialization import FromEnvironment

EXAMPLES = """moa-train: train, resume or fine-tune a MOA-Transformer or a baseline model.

Examples:
  moa-train                                              train on handwritten digits: offline, about a minute
  moa-train model=moa_b data=cifar100                    downloads the data once
  moa-train model=moa_t data=imagenet data.root=/data/imagenet
  torchrun --nproc-per-node 8 -m moa_train.cli.train model=moa_t data=imagenet data.root=/data/imagenet
  moa-train resume=outputs/RUN                           resume a stopped run
  moa-train preflight=true model=moa_b data=cifar100     check the run, and estimate time, memory and disk
  moa-train -m optim.lr=5e-4,1e-3,2e-3 runtime.seed=0,1  train several runs, one after the other
  moa-train -m sweep.dir=outputs/SWEEP                   continue a sweep
  moa-train model=swin_t data=cifar100 --cfg job         print the composed configuration and exit
  moa-train --config-dir my_conf experiment=mine         use your own recipe, my_conf/experiment/mine.yaml
  moa-train model.name=my_package.blocks:Tiny            train your own model, see docs/DEVELOPMENT.md
  eval "$(moa-train --shell-completion install=bash)"    enable completion with the Tab key"""


def train(config: RunConfig, overrides: list[str]) -> int:
    """Run a training session and return the exit code."""
    sweep.refuse_sweep_settings(config)
    with StopSignals() as stop:
        # Importing torch takes seconds, so it happens only once the configuration is known to be valid.
        from moa_train.assembly.resume import resolve_resume
        from moa_train.assembly.session import run_session

        config, changed = resolve_resume(config, lambda before: with_overrides(before, overrides))
        if config.preflight:
            from moa_train.assembly.preflight import preflight

            return preflight(config, stop)
        return run_session(config, changed, stop)


def with_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """Return the configuration of a run with ``key=value`` arguments applied to it.

    Raises:
        UserError: an argument selects an option of a group, which would replace many settings of the run.
    """
    result = OmegaConf.structured(copy.deepcopy(config))
    for key, _, value in knobs(config):
        if isinstance(value, FromEnvironment):
            OmegaConf.update(result, key, value.expression)
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key in GROUPS:
            raise UserError(
                f"{override.input_line}: a resumed run cannot select an option of a group. Change individual settings "
                "instead, such as optim.lr=1e-4, or start a new run from its weights with init=."
            )
        if key not in PLACES and not key.startswith("hydra"):
            OmegaConf.update(result, key, override.value(), force_add=True)
    changed: RunConfig = typed(result)
    return changed


def main() -> None:
    """Entry point."""
    app.run(train, RunConfig, "train", EXAMPLES, sweep.run)


if __name__ == "__main__":
    main()
