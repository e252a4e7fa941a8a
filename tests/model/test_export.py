"""Every variant is one graph: torch.export and torch.compile(fullgraph=True) take it and return the same numbers."""

import torch


def images_for(variant: str) -> torch.Tensor:
    return torch.randn(2, 3, *((18, 21) if variant == "paper, padded" else (16, 16)))


def test_export_for_any_batch(small, variant):
    model, images = small(variant).eval(), images_for(variant)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    for batch in (images, images[:1], torch.cat([images, images, images[:1]])):
        torch.testing.assert_close(program(batch), model(batch))


def test_compile_of_the_full_graph(small, variant):
    torch._dynamo.reset()
    model, images = small(variant).train(), images_for(variant)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_compiled_gradients_are_those_of_the_model(small):
    torch._dynamo.reset()
    model, images = small("paper, padded", checkpointing=True), images_for("paper, padded")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        forward(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4 * own.abs().max().item())


def test_compiled_inference_in_bf16(small):
    torch._dynamo.reset()
    model, images = small().eval(), images_for("paper")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(images), model(images), rtol=0.05, atol=0.02)
