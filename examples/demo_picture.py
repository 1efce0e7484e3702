"""Draw the result of ``make demo`` for the README: rates before and after, and every filter's score.

make demo && python examples/demo_picture.py out/demo docs/demo.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import bshub
from bshub.release.chart_style import PRINT
from bshub.release.evidence import FATES, Layer
from bshub.release.score_chart import scores_chart

DEMO = Path(__file__).parent / "demo"
WORDS = {"accuracy": "clean accuracy", "asr": "attack success"}


def rates_chart(evaluation: dict[str, Any]) -> alt.LayerChart:
    """Two bars per rate, with the 95 % interval as a line and the figure in words."""
    rows = [
        {"rate": WORDS[key], "when": when, "percent": rate["percent"], "low": rate["low"], "high": rate["high"]}
        for when in ("before", "after")
        for key in WORDS
        for rate in [evaluation[when][key]]
    ]
    base = alt.Chart(alt.Data(values=rows))
    x = alt.X("when:N", sort=["before", "after"], title=None, axis=alt.Axis(labelAngle=0))
    y = alt.Y("percent:Q", title="percent", scale=alt.Scale(domain=[0, 100]))
    colour = alt.Color(
        "rate:N", legend=None, scale=alt.Scale(domain=list(WORDS.values()), range=[PRINT.accent, PRINT.removed])
    )
    bars = base.mark_bar(size=38).encode(x=x, y=y, color=colour)
    spread = base.mark_rule(color=PRINT.ink).encode(x=x, y="low:Q", y2="high:Q")
    words = base.mark_text(dy=-8, fontWeight="bold", color=PRINT.ink).encode(
        x=x, y="high:Q", text=alt.Text("percent:Q", format=".1f")
    )
    layered = alt.layer(bars, spread, words).properties(width=130, height=250)
    return layered.facet(column=alt.Column("rate:N", sort=list(WORDS.values()), title=None))


def layers_of(found: Any, report: dict[str, Any]) -> list[Layer]:
    """Scores by layer, with what really happened to each filter."""
    fate = {
        (layer, index): word
        for word, key in zip(FATES[1:4], ("removed", "silenced", "followers"), strict=True)
        for layer, filters in report[key].items()
        for index in filters
    }
    return [
        Layer(
            name,
            list(range(len(values))),
            values.tolist(),
            [fate.get((name, i), "kept") for i in range(len(values))],
            {},
        )
        for name, values in found.scores.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    report = json.loads((args.artifact / "bshub-report.json").read_text(encoding="utf-8"))
    loaded = bshub.load(str(DEMO / "model"))
    images = ImageFolder(str(DEMO / "clean"), lambda image: loaded.preprocessing(pil_to_tensor(image)))
    found = bshub.scan(loaded.module, DataLoader(images, batch_size=32))
    mu = report["diagnosis"]["threshold"]["mu"]
    scores = scores_chart(layers_of(found, report), mu, PRINT).properties(width=420)
    spec = scores.to_dict()
    rates = rates_chart(report["evaluation"]).to_dict()
    config = spec.pop("config", {})
    config.pop("background", None)
    for part in (spec, rates):
        part.pop("config", None)
        part.pop("$schema", None)
        part.pop("padding", None)
    rates["title"] = {"text": "The demo, measured", "anchor": "start"}
    spec["title"] = {"text": "Filters, layer by layer", "anchor": "start"}
    whole = {"$schema": alt.SCHEMA_URL, "background": "white", "padding": 16, "spacing": 40, "hconcat": [rates, spec]}
    whole["resolve"] = {"scale": {"color": "independent"}, "legend": {"color": "independent"}}
    args.picture.write_bytes(vl_convert.vegalite_to_png({**whole, "config": config}, scale=1.5))


if __name__ == "__main__":
    main()
