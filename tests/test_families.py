"""One model per kind of block in timm and torchvision: removal is exact, physical, and trains afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from nets import Net, Residual, conv_bn, head
from torch import nn

from bshub.release.onnx import export_onnx

# plain CNNs: at least 90 % of the filters may leave
PLAIN = {
    "cspnext_tiny": 64, "cs3darknet_focus_s": 64, "dla46_c": 64, "dpn48b": 64, "fasternet_t0": 64, "fbnetc_100": 64,
    "gernet_s": 64, "ghostnet_050": 64, "hgnetv2_b0": 64, "legacy_seresnet18": 64, "mixnet_s": 64,
    "mobileone_s0": 64, "repghostnet_050": 64, "repvgg_a0": 64, "res2net50_14w_8s": 64, "resnest14d": 64,
    "resnetblur18": 64, "rexnet_100": 64, "selecsls42": 64, "skresnet18": 64, "starnet_s050": 64,
    "ese_vovnet19b_slim_dw": 64, "inception_next_atto": 64, "ecaresnet26t": 64,
}  # fmt: skip
# parts of these are pinned, with reasons
PARTLY = {"efficientvit_m0": 224, "levit_128s": 224, "mobilevitv2_050": 64, "fastvit_t8": 64}


def prune(model: nn.Module, size: int) -> tuple[Net, nn.Module]:
    net = Net(model, size)
    chosen = whole_groups(net, 0.2)
    removal = net.remove_exactly(chosen)
    assert removal.refused == []
    assert sum(p.numel() for p in removal.model.parameters()) < sum(p.numel() for p in model.parameters())
    removal.model.train()(torch.randn(2, *net.size)).square().mean().backward()
    return net, removal.model


def whole_groups(net: Net, share: float) -> dict[str, list[int]]:
    """Random coupling groups with all their writers, so that they can leave."""
    generator = torch.Generator().manual_seed(0)
    writers: dict[int, list[tuple[str, int]]] = {}
    for conv in (*net.pairing.pairs, *net.pairing.bare):
        for index, group in enumerate(net.flow.groups[conv.slots].tolist()):
            writers.setdefault(group, []).append((conv.name, index))
    chosen: dict[str, list[int]] = {}
    for members in writers.values():
        if torch.rand(1, generator=generator) < share:
            for name, index in members:
                chosen.setdefault(name, []).append(index)
    return chosen


def free_share(net: Net) -> float:
    groups = [g for pair in net.pairing.pairs for g in net.flow.groups[pair.slots].tolist()]
    return sum(group not in net.flow.pinned for group in groups) / len(groups)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_cnn_can_be_narrowed_almost_everywhere(name: str) -> None:
    torch.manual_seed(0)
    net, _ = prune(timm.create_model(name), PLAIN[name])
    assert free_share(net) >= 0.9


@pytest.mark.parametrize("name", ["ecaresnet26t", "ghostnet_050", "skresnet18", "resnest14d"])
def test_a_narrowed_network_exports_with_parity(name: str, tmp_path: Path) -> None:
    """A fixed sample; `make coverage` exports all."""
    torch.manual_seed(0)
    net, small = prune(timm.create_model(name), 64)
    assert export_onnx(small.eval(), net.images, tmp_path / "model.onnx").holds


@pytest.mark.parametrize("name", PARTLY)
def test_what_cannot_be_narrowed_stays_with_a_reason(name: str) -> None:
    torch.manual_seed(0)
    net, _ = prune(timm.create_model(name), PARTLY[name])
    assert all(": " in reason or reason.startswith("it is") for reason in net.flow.pinned.values())


def test_auxiliary_heads_are_narrowed_with_the_rest() -> None:
    torch.manual_seed(0)
    model = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=True)
    net = Net(model, 224)
    removal = net.remove_exactly(whole_groups(net, 0.2))
    assert removal.refused == []
    answers = removal.model.train()(torch.randn(2, 3, 224, 224))
    assert len(answers) == 3
    sum(answer.sum() for answer in answers).backward()


class PixelRoundTrip(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pixel_unshuffle(nn.functional.pixel_shuffle(x, 2), 2)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, 2, 1, 1)


@pytest.mark.parametrize(
    ("middle", "out", "flagged"),
    [
        (nn.PixelShuffle(2), 2, [0, 1, 2, 3]),
        (nn.PixelUnshuffle(2), 32, [1, 5]),
        (PixelRoundTrip(), 8, [4, 5, 6, 7]),
        (Doubled(), 16, [2, 3]),
        (nn.PReLU(8), 8, [0, 7]),
        (nn.UpsamplingNearest2d(scale_factor=2), 8, [3]),
    ],
    ids=["pixel shuffle", "pixel unshuffle", "both", "repeat", "prelu", "upsampling"],
)
def test_moving_operations_carry_their_channels(middle: nn.Module, out: int, flagged: list[int]) -> None:
    torch.manual_seed(0)
    net = Net(nn.Sequential(conv_bn(3, 8), middle, Residual(conv_bn(out, out)), head(out)))
    removal = net.remove_exactly({"0.0": flagged})
    assert removal.refused == []
    assert not any(reason.startswith("1:") for reason in net.flow.pinned.values())
