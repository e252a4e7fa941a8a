"""Models by name or import path: checked, then built."""

from moa_train.interfaces import Classifier
from moa_train.plugins import MODELS
from moa_train.runtime.errors import UserError
from moa_train.schema import ModelConfig


def create_model(config: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> Classifier:
    """Build a freshly initialized model that maps images (B, 3, H, W) to logits (B, num_classes).

    Args:
        config: architecture; ``config.name`` selects the class or function that builds it.
        image_size: (height, width) in pixels.
        num_classes: width of the classifier.

    Raises:
        UserError: these settings do not fit together. No memory has been allocated yet.
    """
    check_model(config, image_size)
    model = MODELS.create(
        config.name, config.args, "model.args", config, image_size=image_size, num_classes=num_classes
    )
    if not isinstance(model, Classifier):
        raise UserError(
            f"model.name={config.name} returned a {type(model).__name__}, which must be a Classifier: "
            "class Mine(moa_train.interfaces.Classifier)."
        )
    if model.head_name not in dict(model.named_modules()):
        raise UserError(
            f"model.name={config.name}: there is no module {model.head_name!r} in it. Set head_name to the name of "
            "its last linear layer."
        )
    return model


def check_model(config: ModelConfig, image_size: tuple[int, int]) -> None:
    """Raise `UserError` if `create_model` could not build such a model; cheap, and allocates nothing.

    A model's class may have a static method ``check(config, image_size)`` for this.
    """
    check = getattr(MODELS.load(config.name), "check", None)
    if check is not None:
        check(config, image_size)
