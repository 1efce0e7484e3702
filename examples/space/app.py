"""A Gradio Space: upload a checkpoint, see which of its filters look suspicious. Scans; changes and keeps nothing.

python examples/space/app.py, then http://127.0.0.1:7860
"""

from __future__ import annotations

import html
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from bshub import Settings, scan
from bshub.errors import BshubError
from bshub.inputs import Inputs, load_inputs
from bshub.progress import Steps
from bshub.release.chart_style import PRINT
from bshub.release.evidence import Layer
from bshub.release.score_chart import scores_chart

INTRODUCTION = """# Does this checkpoint carry a backdoor?

Upload weights (`.safetensors`, `.pth`), name the network, and add a few clean pictures if you have them. Filters far
above their layer are listed: candidates, not a proof. To remove them: `bshub sanitize`.
"""
HEADER = ["layer", "filter", "deviations above its layer", "what sanitize would do"]


def examine(checkpoint: str | None, arch: str, pictures: list[str] | None) -> tuple[str, Any, list[list[Any]], Any]:
    """What the button does.

    Args:
        checkpoint: The uploaded file.
        arch: Its network, as after ``--arch``.
        pictures: Uploaded clean pictures, without labels.

    Returns:
        Summary (HTML), chart, table, and the report as a file.
    """
    if not checkpoint:
        raise gr.Error("Upload a checkpoint first.")
    with tempfile.TemporaryDirectory() as name:
        clean_dir = Path(name)
        for number, picture in enumerate(pictures or ()):
            shutil.copy(picture, clean_dir / f"{number}{Path(picture).suffix}")
        inputs = Inputs(checkpoint, arch=arch, clean_dir=clean_dir if pictures else None, unlabelled=bool(pictures))
        try:
            settings = Settings(score="lipschitz")  # a visitor waits: the weights are judged, which takes no search
            source, clean, _, _ = load_inputs(inputs, settings, Steps())
            batches = list(clean.batches(source.preprocessing, settings.batch_size)) if clean else None
            found = scan(source.module, batches, settings, input_size=source.preprocessing.input_size)
        except BshubError as error:  # its words quote file names: they are shown as HTML
            raise gr.Error(html.escape(f"{error.message}. {error.hint or ''}")) from None
    done = {"removed": found.plan.removed, "silenced": found.plan.silenced}
    fate = {(layer, i): word for word, plan in done.items() for layer, index in plan.items() for i in index}
    layers = [
        Layer(
            layer,
            list(range(len(values))),
            values.tolist(),
            [fate.get((layer, i), "kept") for i in range(len(values))],
            {},
        )
        for layer, values in found.scores.items()
    ]
    rows = [
        [layer, i, round(score, 2), {"removed": "remove", "silenced": "silence"}.get(fate.get((layer, i), ""), "keep")]
        for layer, i, score in found.most_suspicious(50)
    ]
    counts = found.plan.counts()
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in found.warnings)
    summary = (
        f"<p><b>{counts['flagged']} of {found.pairing.filters:,} filters</b> lie more than {found.threshold.mu:g} "
        f"deviations above their layer ({html.escape(found.score)}; {html.escape(found.threshold.reason)}).</p>"
        + (f"<ul>{warnings}</ul>" if warnings else "")
    )
    report = Path(tempfile.mkdtemp()) / "bshub-scan.json"
    report.write_text(json.dumps(found.as_dict(), indent=2), encoding="utf-8")
    return summary, picture_of(scores_chart(layers, found.threshold.mu, PRINT).properties(width=560)), rows, str(report)


def picture_of(chart: Any) -> Any:
    """A chart as a Pillow image."""
    import io

    import vl_convert
    from PIL import Image

    return Image.open(io.BytesIO(vl_convert.vegalite_to_png(chart.to_dict(), scale=2)))


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="bshub scan", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            checkpoint = gr.File(label="Checkpoint", file_types=[".safetensors", ".pth", ".pt", ".bin"], height=180)
            with gr.Column():
                arch = gr.Textbox(
                    "timm/resnet18",
                    label="Network",
                    info="timm/NAME or torchvision/NAME; options follow: timm/resnet18?num_classes=10&input_size=32",
                )
                pictures = gr.File(
                    label="Clean pictures (optional)", file_count="multiple", file_types=["image"], height=180
                )
        button = gr.Button("Scan", variant="primary")
        summary = gr.HTML()
        gr.Markdown("Suspiciousness of every filter, layer by layer")
        chart = gr.Image(show_label=False, type="pil")
        table = gr.Dataframe(headers=HEADER, label="Most suspicious filters", interactive=False, wrap=True)
        report = gr.File(label="Report (JSON)")
        button.click(examine, [checkpoint, arch, pictures], [summary, chart, table, report], api_name="scan")
    return page


if __name__ == "__main__":
    build().launch(max_file_size="1gb")
