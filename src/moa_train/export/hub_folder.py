"""Export to a folder that is ready to be uploaded to a model hub: weights, config.json and a model card.

moa-eval and init= read the folder. For models that timm also has, the tensors are named as in timm and config.json is
in timm's format, so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it, too.
"""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from moa_train.assembly.commands import command, own_packages
from moa_train.engine.tensorfile import write_tensors
from moa_train.export import weights_file
from moa_train.export.subject import Runner, Subject
from moa_train.knobs import knobs
from moa_train.model.timm_door import TimmModel
from moa_train.runtime.command_line import argument, hydra_quoted
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_flushed
from moa_train.schema import ExportConfig
from moa_train.serialization import to_dict
from moa_train.tracking.provenance import reproduce

OF_OTHER_WEIGHTS = ("test_", "paper_", "tag", "url", "origin_url", "hf_hub", "file", "source", "notes", "description")
"""Prefixes of the entries of ``pretrained_cfg`` that describe timm's own weights of the architecture."""


def check(config: ExportConfig) -> None:
    """Raise `UserError` if the license is missing."""
    if not config.license:
        raise UserError(
            "format=hub requires license=ID, the license of the weights, such as mit, apache-2.0, cc-by-nc-4.0 or "
            "unknown. The data set may restrict it."
        )


def write(subject: Subject, path: Path) -> dict[str, Any]:
    """Write the folder."""
    path.mkdir()
    model = timm_model(subject)
    prefix = "net." if isinstance(subject.model.model, TimmModel) else ""
    weights = {name.removeprefix(prefix): tensor for name, tensor in subject.trained.weights.items()}
    header = weights_file.header(subject) | ({"prefix": prefix} if prefix else {})
    write_tensors(path / "model.safetensors", weights, header)
    config = own_config(subject) if model is None else timm_config(subject, model, path)
    write_flushed(path / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_flushed(path / "README.md", card(subject, None if model is None else config["architecture"]).encode())
    return {"timm": None if model is None else config["architecture"]}


def load(path: Path, config: ExportConfig) -> Runner:
    """Open the folder as moa-eval does."""
    return weights_file.load(path, config)


def own_config(subject: Subject) -> dict[str, Any]:
    """Return config.json of a model that only moa-train has."""
    return {
        "library": "moa-train",
        "architecture": subject.run.model.title,
        "num_classes": len(subject.trained.classes),
        "label_names": subject.trained.classes,
        "model": to_dict(subject.run.model),
        "preprocessing": subject.preprocessing.as_dict(),
    }


def timm_model(subject: Subject) -> Any:
    """Return timm's model with the architecture and parameter names of these weights, or None if there is none."""
    own, config = subject.model.model, subject.run.model
    if isinstance(own, TimmModel):
        return own.net
    if config.name != "resnet" or find_spec("timm") is None:
        return None
    import timm

    # torchvision's ResNet-50 and timm's have the same layers and parameter names; other baselines differ.
    with torch.device("meta"):
        other = timm.create_model("resnet50", num_classes=len(subject.trained.classes))
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (own, other)]
    return other if shapes[0] == shapes[1] else None


def timm_config(subject: Subject, model: Any, path: Path) -> dict[str, Any]:
    """Return config.json in timm's format, as timm itself writes it."""
    from timm.models._hub import save_config_for_hf

    preprocessing = subject.preprocessing
    pretrained = {
        "input_size": [3, *preprocessing.size],
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "crop_pct": preprocessing.size[0] / preprocessing.cover[0],
        "crop_mode": "center",
        "interpolation": "bicubic",
        "license": subject.config.license,
    }
    arguments = getattr(subject.model.model, "arguments", {})
    settings = {
        "pretrained_cfg": pretrained,
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "label_names": subject.trained.classes,
    }
    save_config_for_hf(model, str(path / "config.json"), model_config=settings)
    result: dict[str, Any] = json.loads((path / "config.json").read_text())
    for key in [key for key in result["pretrained_cfg"] if key.startswith(OF_OTHER_WEIGHTS)]:
        del result["pretrained_cfg"][key]
    return result


def card(subject: Subject, timm_name: str | None) -> str:
    """Return the model card: what the model is, its measured accuracy, how to use it, and how it was trained."""
    trained, config = subject.trained, subject.config
    scores = subject.scores(subject.reference)
    found = subject.source.describe()
    origin = json.loads(trained.metadata.get("origin", "[]"))
    lines = [line for line in reproduce(origin).splitlines() if not line.startswith("cd ")]
    # Folders of the machine that trained the weights say nothing to others.
    commands = [re.sub(r"^\S*python[\d.]* \S*/(moa-\w+) ", r"\1 ", line) for line in lines]
    title = f"{subject.run.model.title}, trained on {subject.run.data.name}"
    library = "timm" if timm_name else "moa-train"
    metrics = [
        {"type": "accuracy", "name": "top-1", "value": round(scores["top1"], 2)},
        {"type": "accuracy", "name": "top-5", "value": round(scores["top5"], 2)},
    ]
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": found["name"], "type": subject.run.data.name},
        "metrics": metrics,
    }
    front = {
        "license": config.license,
        "library_name": library,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "moa-train", *(["timm"] if timm_name else [])],
        "model-index": [{"name": title, "results": [result]}],
    }
    parameters = sum(parameter.numel() for parameter in subject.model.model.parameters())
    height, width = subject.preprocessing.size
    settings = [
        argument(f"model.{key}", value)
        for key, item, value in knobs(subject.run.model)
        if (item.metadata["fixed"] or key == "variant") and key != "args"
    ]
    own = {key: value for key, value in subject.run.model.args.items() if key != "pretrained"}
    settings += [shlex.quote(f"model.args.{key}={_hydra(value)}") for key, value in own.items()]
    evaluate = command("moa-eval", subject.run, ckpt="FOLDER", root="DATA")
    code = own_packages(subject.run)
    use = MOA_USE.format(
        height=height,
        width=width,
        settings=" ".join(settings),
        evaluate=evaluate,
        code=f", code={json.dumps(code)}" if code else "",
    )
    use += TIMM_USE.format(height=height, width=width) if timm_name else ""
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False).rstrip(),
        title=title,
        model=subject.run.model.title,
        parameters=parameters / 1e6,
        classes=len(trained.classes),
        height=height,
        width=width,
        cover="{} x {}".format(*subject.preprocessing.cover),
        mean=", ".join(map(str, subject.preprocessing.mean)),
        std=", ".join(map(str, subject.preprocessing.std)),
        levels=subject.preprocessing.levels,
        source=found["name"],
        fingerprint=found["fingerprint"],
        weights=trained.found.description,
        **scores,
        use=use,
        commands="\n".join(commands) or "# The weights do not record the commands that produced them.",
        license=config.license,
    )


def _hydra(value: Any) -> str:
    """Return a value in Hydra's grammar, in which keys have no quotes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    return hydra_quoted(value) if isinstance(value, str) else json.dumps(value)


CARD = """---
{front}
---

# {title}

An image classifier: {model} with {parameters:.2f} million parameters and {classes} classes ({weights}).

## Accuracy

Measured by the export itself, on {total} images of {source} (fingerprint `{fingerprint}`), in fp32 on a CPU:

| top-1 | top-5 | loss | images |
| --- | --- | --- | --- |
| {top1:.2f}% ({top1_count}) | {top5:.2f}% ({top5_count}) | {loss:.4f} | {total} |

## Input

Images of {height} x {width} pixels, RGB; {levels}. Resize an image (bicubic, with antialiasing) so that it just
covers {cover} pixels, cut out the center, and normalize each channel: (x / 255 - mean) / std, with mean {mean} and
std {std}. The names of the classes, in the order of the logits, are `label_names` in config.json.

## Use

{use}
## Training

```bash
{commands}
```

## License

{license}
"""

MOA_USE = """With moa-train, where FOLDER is this folder:

```bash
{evaluate}    # measure the accuracy again
moa-train init=FOLDER init_head=new data=folder data.root=DATA 'data.image_size=[{height},{width}]' {settings}
```

```python
import moa_train

model = moa_train.load("FOLDER"{code})
print(model.predict(["cat.jpg"])[0].classes[0])
```
"""

TIMM_USE = """
With timm, in Python:

```python
import timm
import torch

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
logits = model(torch.zeros(1, 3, {height}, {width}))  # normalized images
```
"""
