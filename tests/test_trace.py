"""record: a model's run as a graph of named tensors and ATen operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from nets import Apply, Auxiliary, Net, conv_bn, head, residual_net, vgg_like
from torch import Tensor, nn

from bshub.errors import TraceError
from bshub.graph.coupling import follow_channels, op_name
from bshub.graph.trace import in_mode, overwritten, record

SIZE = (3, 16, 16)


class Unregistered(nn.Module):
    """Scales by a tensor that is no parameter and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = conv_bn(3, 8), nn.Sequential(conv_bn(8, 6), head(6))
        self.scale = torch.rand(8, 1, 1) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.stem(x) * self.scale)


def half_overwritten(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :4] = 0
    return y


def flattened_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y.view(len(y), -1).mul_(2)
    return y


def names(model: nn.Module) -> set[str]:
    everything = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return {name for name in everything if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    "make",
    [
        residual_net,
        vgg_like,
        lambda: timm.create_model("test_resnet"),
        lambda: torchvision.models.mobilenet_v2(width_mult=0.25),
    ],
)
def test_every_tensor_the_forward_reads_is_a_named_node_with_its_shape(make: object) -> None:
    model = make()  # type: ignore[operator]
    recording = record(model, SIZE if isinstance(model, nn.Sequential) else (3, 32, 32))
    assert recording.parameters_used() == names(model)
    state = model.state_dict()
    for node in recording.graph.nodes:
        if node.op == "get_attr" and node.users:
            assert node.meta["shape"] == tuple(state[node.target].shape)


def test_a_parameter_that_the_forward_ignores_is_not_used() -> None:
    model = Auxiliary()
    ignored = names(model) - record(model, SIZE).parameters_used()
    assert ignored == {name for name in names(model) if name.startswith("aux.")}
    assert record(model, SIZE, training=True).parameters_used() >= names(model) - {
        name for name in names(model) if "running" in name
    }


def test_nodes_carry_the_module_that_ran_them() -> None:
    recording = record(residual_net(), SIZE)
    ran = [node.meta["module"] for node in recording.graph.nodes if op_name(node.target) == "convolution"]
    assert ran == ["0.0", "1.body.0.0", "1.body.1", "2.body.0.0", "2.body.1"]


@pytest.mark.parametrize("training", [False, True])
def test_the_callers_model_is_left_exactly_as_it_was(training: bool) -> None:
    model = residual_net().train()
    model[1].eval()
    model[0][1].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    rng = torch.get_rng_state()
    record(model, SIZE, training=training)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[0][1].weight.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_in_mode_restores_mixed_modes_after_an_error() -> None:
    model = residual_net().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), in_mode(model, False):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == modes


def test_an_unregistered_tensor_falls_back_to_a_real_run_and_stays_what_it_was() -> None:
    torch.manual_seed(0)
    model = Unregistered()
    scale, state = model.scale.clone(), copy.deepcopy(model.state_dict())
    recording = record(model, SIZE, training=True)
    assert any(str(node.target).startswith("<constant") for node in recording.graph.nodes)
    assert recording.parameters_used() >= {name for name, _ in model.named_parameters()}
    assert torch.equal(model.scale, scale)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_channels_that_meet_an_unregistered_tensor_stay_and_the_rest_leaves() -> None:
    torch.manual_seed(0)
    net = Net(Unregistered())
    removal = net.remove_exactly({"stem.0": [1, 5], "tail.0.0": [2]})
    assert removal.plan.silenced == {"stem.0": [1, 5]}
    assert removal.plan.removed == {"tail.0.0": [2]}


def test_a_recording_does_not_depend_on_the_fallback() -> None:
    model = residual_net()
    targets = [op_name(node.target) for node in record(model, SIZE).graph.nodes if node.op == "call_function"]
    model.register_forward_pre_hook(lambda module, args: (args[0] + torch.zeros(1),))
    real = [op_name(node.target) for node in record(model, SIZE).graph.nodes if node.op == "call_function"]
    assert [name for name in real if name in targets and name != "add"] == [n for n in targets if n != "add"]


@pytest.mark.parametrize("write", [half_overwritten, flattened_in_place])
def test_writing_into_a_view_marks_the_base_and_pins_it(write: object) -> None:
    torch.manual_seed(0)
    net = Net(nn.Sequential(conv_bn(3, 8), Apply(write), conv_bn(8, 6), head(6)))
    graph = record(net.model, SIZE).graph
    assert any(node.target is overwritten for node in graph.nodes)
    removal = net.remove_exactly({"0.0": [1, 6], "2.0": [3]})
    assert removal.plan.silenced == {"0.0": [1, 6]}
    assert removal.plan.removed == {"2.0": [3]}
    assert removal.refused == []


def test_writing_in_place_without_views_pins_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn(3, 8), Apply(lambda x: x.mul_(2).relu_()), conv_bn(8, 6), head(6))
    net = Net(model)
    assert not any(node.target is overwritten for node in record(model, SIZE).graph.nodes)
    assert net.remove_exactly({"0.0": [1, 6]}).plan.removed == {"0.0": [1, 6]}


def test_a_failing_forward_names_the_module_and_the_size() -> None:
    model = nn.Sequential(conv_bn(3, 8), nn.Sequential(conv_bn(9, 4)), head(4))
    model.train()
    with pytest.raises(TraceError, match=r"'1\.0\.0'") as caught:
        record(model, SIZE)
    assert "(3, 16, 16)" in str(caught.value)
    assert model.training
    with pytest.raises(TraceError, match=r"'0\.0'"):
        record(residual_net(), (4, 16, 16))


def test_a_failing_forward_leaves_no_hooks_behind() -> None:
    with pytest.raises(TraceError):
        record(nn.Sequential(conv_bn(9, 4)), SIZE)
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_an_answer_in_a_dictionary_is_followed_to_its_tensors() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = residual_net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    (output,) = [node for node in record(Named(), SIZE).graph.nodes if node.op == "output"]
    assert [arg.meta["shape"] for arg in output.args[0]] == [(2, 5)]


def test_a_training_run_that_cannot_be_recorded_is_left_out_and_said() -> None:
    class WantsTargets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aux = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            if self.training and targets is None:
                raise ValueError("training needs targets")
            return self.body(x).mean((2, 3))

    flow, _ = follow_channels(WantsTargets(), (3, 8, 8))
    assert flow.unseen == ("aux.bias", "aux.weight")


class Deciding(nn.Module):
    """Takes one of two ways, by something that ``by`` says of the input."""

    def __init__(self, by: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.by = nn.Conv2d(3, 4, 3), by
        self.register_buffer("flag", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.mean((2, 3)) if self.by(self, y) else y.amax((2, 3))


@pytest.mark.parametrize(
    "by",
    [
        lambda net, y: y.mean() > 0,
        lambda net, y: y.flatten()[0].item() > 0,
        lambda net, y: torch.equal(y, y.abs()),
        lambda net, y: int(y.argmax()) % 2,
        lambda net, y: float(net.flag * y.sum()) > 0,
    ],
)
def test_code_that_decides_by_the_images_is_refused_with_its_line(by: Callable[[nn.Module, Tensor], Any]) -> None:
    with pytest.raises(TraceError) as caught:
        record(nn.Sequential(nn.Identity(), Deciding(by)), (3, 8, 8))
    assert caught.value.module == "1"
    assert f"in module '1' ({Path(__file__).name}, line " in caught.value.message


@pytest.mark.parametrize(
    "by",
    [
        lambda net, y: y.shape[1] > 3,
        lambda net, y: float(net.conv.weight.detach().sum()) > 0,
        lambda net, y: bool(net.flag),
        lambda net, y: int(torch.tensor(y.shape[-1]) // 2) > 1,
    ],
)
def test_code_that_decides_by_shapes_or_weights_is_followed(by: Callable[[nn.Module, Tensor], Any]) -> None:
    assert record(nn.Sequential(Deciding(by)), (3, 8, 8)).graph
