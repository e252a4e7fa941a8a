"""What is chosen, given measurements; no test depends on how fast this machine is."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moa_train.assembly.choices import DEFAULTS, Choices, apply, choose, decide
from moa_train.assembly.measure import Clock, fastest, time_block, time_workers
from moa_train.assembly.training import build_state
from moa_train.data.dataset import open_split
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.state import TrainState
from moa_train.interfaces import Classifier
from moa_train.model.attention import BiasedAttention
from moa_train.model.layers import DropPath
from moa_train.optim.muon import BatchedMuon
from moa_train.optim.optimizers import Optimizers
from moa_train.runtime.precision import Precision
from moa_train.schema import RunConfig

IN_MEMORY = set(DEFAULTS) - {"data.workers"}
OPEN = {"runtime.precision": "auto", "runtime.deterministic": "false"}


def state_of(config: RunConfig) -> TrainState:
    return build_state(config, 10, 1e-3, Precision.resolve("fp32", torch.device("cpu")), fresh=True)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"fp32": 1.0, "bf16": 0.5}, "bf16"),
        ({"fp32": 1.0, "bf16": 31.0}, "fp32"),
        ({"fp32": 1.0, "bf16": 0.95}, "fp32"),  # not worth a format with fewer digits
        ({"4": 1.0, "16": 0.7, "64": 0.69}, "16"),  # not worth more memory
        ({"4": 1.0, "16": 0.95, "64": 0.9}, "64"),
        ({"plain": 1.0}, "plain"),
    ],
)
def test_the_fastest_is_chosen_and_ties_go_to_the_first(seconds: dict[str, float], best: str) -> None:
    assert fastest(seconds) == best


def test_choices_on_a_cpu_without_bf16_instructions() -> None:
    values, gains = decide(
        {
            "optim.muon_precision": {"fp32": 2.1e-3, "bf16": 66.2e-3},
            "runtime.precision": {"fp32": 0.06e-3, "bf16": 1.1e-3},
            "runtime.attention": {"plain": 8.0e-3, "fused": 9.1e-3},
            "runtime.stochastic_depth": {"select": 7.7e-3, "mask": 8.3e-3},
            "engine.eval_batch_size": {"4": 0.2e-3, "16": 0.14e-3, "64": 0.15e-3},
        }
    )
    assert values == {
        "optim.muon_precision": "fp32",
        "runtime.precision": "fp32",
        "runtime.attention": "plain",
        "runtime.stochastic_depth": "select",
        "engine.eval_batch_size": 16,
    }
    assert gains["optim.muon_precision"] == 31.52


def test_what_the_user_has_set_is_not_measured(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[str] = []
    monkeypatch.setattr(
        "moa_train.assembly.choices.measure", lambda config, state, keys, *rest: wanted.extend(keys) or {}
    )
    config = tiny({**OPEN, "optim.muon_precision": "bf16", "engine.eval_batch_size": 8})
    choose(config, state_of(config))
    assert set(wanted) == set(DEFAULTS) - {"optim.muon_precision", "engine.eval_batch_size"}


def test_deterministic_runs_measure_nothing(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moa_train.assembly.choices.measure", lambda *arguments: pytest.fail("measured"))
    config = tiny({"runtime.precision": "auto"})
    chosen = choose(config, state_of(config))
    assert (chosen.values, chosen.describe()) == ({}, "")


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"model.drop_path": 0.1}, IN_MEMORY),
        ({"model.drop_path": 0}, IN_MEMORY - {"runtime.stochastic_depth"}),
        ({"optim.name": "adamw", "runtime.precision": "fp32", "model.drop_path": 0},
         {"runtime.attention", "runtime.eval_attention", "engine.eval_batch_size"}),
        ({"model.name": "resnet", "model.depths": "[1,1,1,1]", "model.embed_dim": 64, "model.patch_size": 1,
          "model.drop_path": 0, "model.dropout": 0, "optim.name": "sgd"},
         {"runtime.precision", "engine.eval_batch_size"}),
    ],
)  # fmt: skip
def test_everything_that_applies_is_measured_without_a_trace(
    tiny: Callable[..., Any], changes: dict[str, Any], keys: set[str]
) -> None:
    config = tiny({**OPEN, **changes})
    state = state_of(config)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    generator = torch.get_rng_state()
    chosen = choose(config, state, open_split(config.data, "train"))
    assert set(chosen.values) == keys
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.model.state_dict().items())
    assert all(parameter.grad is None for parameter in state.model.parameters())
    filled = apply(chosen, config, state)
    assert filled.runtime.precision in ("fp32", "bf16")
    assert chosen.describe().endswith("s of CPU time")


def test_the_number_of_images_does_not_depend_on_first_calls(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First calls take 0.02 s, others 0.2 ms per image: 64 images take 8 ms, and four times as many are compared."""
    called, raced = set[int](), list[int]()

    def once(clock: Clock, call: Callable[[], object]) -> float:
        images = len(call.args[0]) if isinstance(call, partial) else 1
        first = images not in called
        called.add(images)
        return 0.02 if first else 0.0002 * images

    def race(clock: Clock, candidates: Mapping[str, Any]) -> dict[str, float]:
        raced.extend(len(call.args[0]) for call in candidates.values())
        return dict.fromkeys(candidates, 0.05)

    monkeypatch.setattr("moa_train.assembly.measure._time_product", lambda clock: {"fp32": 1.0, "bf16": 1.0})
    monkeypatch.setattr(Clock, "once", once)
    monkeypatch.setattr(Clock, "race", race)
    config = tiny({**OPEN, "optim.muon_precision": "fp32", "engine.batch_size": 1024, "model.drop_path": 0})
    choose(config, state_of(config))
    assert raced[:4] == [256] * 4  # two number formats, and two attention kernels


@pytest.mark.parametrize(
    ("bf16", "block", "chosen"), [(2.4, 0.7, "bf16"), (2.4, 1.2, "fp32"), (5.7, 0.7, "fp32"), (27.0, 0.1, "fp32")]
)
def test_only_emulated_formats_are_ruled_out_by_a_small_product(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, bf16: float, block: float, chosen: str
) -> None:
    """Given seconds of a product and of a block, relative to fp32: the block decides unless bf16 is emulated."""

    def race(clock: Clock, candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        return {name: block if name == "bf16" else 1.0 for name in candidates}

    monkeypatch.setattr("moa_train.assembly.measure._time_product", lambda clock: {"fp32": 1.0, "bf16": bf16})
    monkeypatch.setattr(Clock, "race", race)
    config = tiny({**OPEN, "optim.muon_precision": "fp32"})
    assert choose(config, state_of(config)).values["runtime.precision"] == chosen


def test_choices_reach_the_model_and_the_optimizer(tiny: Callable[..., Any]) -> None:
    config = tiny({**OPEN, "model.drop_path": 0.1})
    state = state_of(config)
    values = {
        "runtime.precision": "bf16",
        "optim.muon_precision": "fp32",
        "runtime.attention": "fused",
        "runtime.eval_attention": "plain",
        "runtime.stochastic_depth": "mask",
        "engine.eval_batch_size": 16,
    }
    filled = apply(Choices("cpu", values), config, state)
    assert state.precision.name == "bf16"
    assert (filled.engine.eval_batch_size, config.engine.eval_batch_size) == (16, None)
    attention = [module for module in state.model.modules() if isinstance(module, BiasedAttention)]
    assert {(module.kernel, module.eval_kernel) for module in attention} == {("fused", "plain")}
    assert {module.method for module in state.model.modules() if isinstance(module, DropPath)} == {"mask"}
    assert [part.dtype for part in state.optimizer.parts if isinstance(part, BatchedMuon)] == [torch.float32]


def test_choices_keep_a_loss_scale_that_was_restored(tiny: Callable[..., Any]) -> None:
    """It is a part of the precision, and the choices are applied after a checkpoint is restored."""
    config = tiny(OPEN)
    state = state_of(config)
    before = state.precision
    apply(Choices("cpu", {"runtime.precision": "fp32"}), config, state)
    assert state.precision is before


def test_a_resume_keeps_the_choices_that_affect_numbers(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow: dict[str, str] = {}

    def measured(config: RunConfig, state: TrainState, wanted: list[str], *rest: Any) -> Any:
        candidates = {"optim.muon_precision": ("fp32", "bf16"), "engine.eval_batch_size": ("4", "16")}
        return {
            key: {name: 9.0 if name == slow.get(key) else 1.0 for name in names}
            for key, names in candidates.items()
            if key in wanted
        }

    monkeypatch.setattr("moa_train.assembly.choices.measure", measured)
    slow.update({"optim.muon_precision": "fp32", "engine.eval_batch_size": "4"})
    settings = {"runtime__deterministic": "false", "engine__stop_after": "4 steps"}
    assert train(tmp_path / "run", **settings) == 0
    slow.update({"optim.muon_precision": "bf16", "engine.eval_batch_size": "16"})
    assert train(tmp_path / "run", resume=True, engine__stop_after="8 steps") == 0
    store = CheckpointStore(tmp_path / "run")
    recorded = [checkpoint.state["choices"]["values"] for checkpoint in (store.at(4), store.newest()) if checkpoint]
    assert recorded == [
        {"optim.muon_precision": "bf16", "engine.eval_batch_size": 16},
        {"optim.muon_precision": "bf16", "engine.eval_batch_size": 4},
    ]


def test_a_resume_does_not_measure_what_was_left_to_rules(tiny: Callable[..., Any]) -> None:
    """Otherwise, the precision could change in the middle of a run that started on a slow machine."""
    config = tiny(OPEN)
    found = choose(config, state_of(config), recorded={"device": "cpu", "values": {}})
    assert set(found.values) <= {"engine.eval_batch_size", "data.workers"}


class Pair(nn.Module):
    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return x + position


class OfPairs(Classifier):
    head_name = "head"

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Flatten(), Pair(), nn.Linear(3072, 10)

    def layer_names(self) -> list[str]:
        return ["stem", "block"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.stem(x), torch.ones(())))


def test_own_models_whose_blocks_cannot_be_measured_take_the_fixed_choices(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(OPEN)
    config.model.name = "my:OfPairs"
    config.optim.name = "adamw"
    state = TrainState(OfPairs(), Optimizers([]), Precision.resolve("fp32", torch.device("cpu")), None)
    timed = []
    monkeypatch.setattr("moa_train.assembly.measure.time_block", lambda *args: timed.append(args) or time_block(*args))
    assert not choose(config, state).values
    assert timed, "the block was found, and could not be run with one input"


def test_choices_of_another_kind_of_device_are_not_kept(tiny: Callable[..., Any]) -> None:
    config = tiny({**OPEN, "runtime.precision": "fp32"})
    recorded = Choices("cuda", {"optim.muon_precision": "nothing"}).as_dict()
    assert choose(config, state_of(config), recorded=recorded).values["optim.muon_precision"] in ("fp32", "bf16")


@pytest.mark.parametrize(
    ("read", "step", "cores", "workers"),
    [(2e-3, 300e-3, 2, 1), (2e-3, 1e-3, 8, 2), (9e-3, 1e-3, 4, 4), (9e-3, 1e-3, 16, 8), (1e-3, 1e-3, 1, 1)],
)
def test_there_are_as_many_workers_as_keep_up_with_the_training(
    read: float, step: float, cores: int, workers: int
) -> None:
    assert decide({"data.workers": time_workers(read, step, cores)})[0] == {"data.workers": workers}


def test_workers_are_chosen_for_images_in_files(tiny: Callable[..., Any], make_classes: Callable[[int], Path]) -> None:
    config = tiny({**OPEN, "data.name": "folder", "data.root": make_classes(3), "data.val_fraction": 0})
    chosen = choose(config, state_of(config), open_split(config.data, "train"))
    assert 1 <= chosen.values["data.workers"] <= 8


class Simulated(Clock):
    """A clock whose time only the candidates advance."""

    time = 0.0

    def now(self) -> float:
        return self.time

    def candidate(self, name: str, seconds: list[float], calls: list[str]) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            self.time += seconds.pop(0) if len(seconds) > 1 else seconds[0]

        return call


def test_a_race_ends_in_time_and_gives_up_hopeless_candidates() -> None:
    clock, calls = Simulated(torch.device("cpu"), 0.1), list[str]()
    steady = {"a": [0.03, 0.01], "b": [0.03, 0.02], "c": [5.0]}
    times = clock.race({name: clock.candidate(name, seconds, calls) for name, seconds in steady.items()})
    assert times == pytest.approx({"a": 0.01, "b": 0.02, "c": 5.0})
    assert calls == ["a", "b", "c", "a", "b"]  # the time was over, and c is hopeless
    calls.clear()
    steady = {"a": [0.03, 0.01], "b": [0.03, 0.02], "c": [0.11]}
    clock.seconds = 0.6
    times = clock.race({name: clock.candidate(name, seconds, calls) for name, seconds in steady.items()})
    assert times == pytest.approx({"a": 0.01, "b": 0.02, "c": 0.11})
    assert calls.count("c") == 2  # a warmup, and the time that shows that it is hopeless
    assert 3 <= calls.count("a") <= 9
    assert clock.race({"only": lambda: pytest.fail("called")}) == {}


def test_a_race_never_compares_the_first_call_of_one_candidate_with_the_second_of_another() -> None:
    clock, calls = Simulated(torch.device("cpu"), 0.1), list[str]()
    steady = {"a": [0.09, 0.04], "b": [0.03, 0.03]}  # the time is over after the first calls
    times = clock.race({name: clock.candidate(name, seconds, calls) for name, seconds in steady.items()})
    assert times == pytest.approx({"a": 0.04, "b": 0.03})
    assert calls == ["a", "b", "a", "b"]
