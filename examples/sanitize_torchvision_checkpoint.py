"""Sanitize a torchvision checkpoint file: what ``torch.save(model.state_dict(), "resnet18.pth")`` wrote.

    python examples/sanitize_torchvision_checkpoint.py resnet18.pth --arch torchvision/resnet18?num_classes=10 \\
        --clean-dir samples --output cleaned

The file is opened by a child process with ``weights_only``; code in it is refused, not run. The same on the command
line: ``bshub sanitize resnet18.pth --arch … --clean-dir samples -o cleaned``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import bshub
from bshub.commands import sanitize_to_folder
from bshub.inputs import Inputs
from bshub.writing import Wishes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--arch", default="torchvision/resnet18")
    parser.add_argument("--clean-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    inputs = Inputs(str(args.checkpoint), arch=args.arch, clean_dir=args.clean_dir)
    report = sanitize_to_folder(inputs, bshub.Settings(), args.output, wishes=Wishes(onnx=True, page=False))
    print(f"removed {report['counts']['removed']}, silenced {report['counts']['silenced']}")

    small = bshub.load(str(args.output))  # module, preprocessing, labels
    print(f"{args.output} holds {sum(p.numel() for p in small.module.parameters()):,} parameters")


if __name__ == "__main__":
    main()
