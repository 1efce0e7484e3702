"""Sanitize a timm model from Python: your model, your images, your loader.

    python examples/sanitize_timm.py

Loads the bundled backdoored model with timm alone. For one of your own put its name there:
``timm.create_model("hf-hub:user/name", pretrained=True)``, and your folder of clean images, one folder per class.
"""

from __future__ import annotations

from pathlib import Path

import timm
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from bshub import sanitize

DEMO = Path(__file__).parent / "demo"


def main() -> None:
    model = timm.create_model(f"local-dir:{DEMO / 'model'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    clean = DataLoader(ImageFolder(str(DEMO / "clean"), transform), batch_size=32)

    result = sanitize(model, clean)

    counts, parameters, images = (result.report[key] for key in ("counts", "parameters", "clean_images"))
    print(f"removed {counts['removed']} filters, silenced {counts['silenced']} in place")
    print(f"parameters {parameters['before']:,} → {parameters['after']:,}")
    print(f"clean images right: {images['accuracy_before']['percent']} → {images['accuracy_after']['percent']} %")
    print(f"proof: equals the masked original to {result.report['proof']['error']:.1e}")
    for layer, filters in result.plan.removed.items():
        print(f"  {layer}: {filters}")


if __name__ == "__main__":
    main()
