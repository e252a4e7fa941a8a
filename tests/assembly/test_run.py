"""From a configuration to a run."""

from pathlib import Path

from moa_train.assembly.run import build_run
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.signals import StopSignals


def test_without_a_validation_split_nothing_is_evaluated_during_training(tiny, tmp_path: Path):
    config = tiny({"data.val_fraction": "0"})
    with Distributed.start("cpu", 60.0) as alone:
        run = build_run(config, run_dir=tmp_path, distributed=alone, stop=StopSignals())
    run.trainer.tracker.close()
    assert run.trainer.evaluate is None
    assert (run.trainer.eval_split, run.final_split) == ("none", "test")
