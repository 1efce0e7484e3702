"""``bshub evaluate``."""

from __future__ import annotations

from bshub_cli import _options as options
from bshub_cli._errors import reported
from bshub_cli._output import Bars, print_json, print_table, say, say_images, seconds_text


def evaluate(
    model: options.Model,
    test_dir: options.TestDir = None,
    trigger: options.TriggerFile = None,
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    classes: options.Classes = None,
    batch_size: options.BatchSize = 32,
    device: options.Device = "auto",
    config: options.Config = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure a model's accuracy and, with a trigger file, its attack success rate."""
    with reported(debug):
        from bshub.commands import Inputs, evaluate_reference
        from bshub.release.card import rate_text
        from bshub.settings import Settings

        report = evaluate_reference(
            Inputs(model, arch, num_classes, None, test_dir, trigger, classes, settings_file=config),
            Settings(batch_size=batch_size, device=device),
            progress=Bars(quiet or as_json),
        )
        if as_json:
            print_json(report)
            return
        names = {"accuracy": "accuracy %", "asr": "attack success %", "ra": "robust accuracy %"}
        rows = [[names[key], rate_text(rate)] for key, rate in report["evaluation"].items()]
        print_table(report["model"]["reference"], ["", "with 95 % interval"], rows)
        say_images(report)
        say(seconds_text(report["seconds"]))
