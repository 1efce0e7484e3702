"""``bshub scan``."""

from __future__ import annotations

from bshub_cli import _options as options
from bshub_cli._errors import reported
from bshub_cli._output import Bars, print_json, print_table
from bshub_cli.sanitize import show_plan


def scan(
    model: options.Model,
    clean_dir: options.CleanDir = None,
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    classes: options.Classes = None,
    unlabelled: options.Unlabelled = False,
    score: options.ScoreName = "tac",
    mu: options.Mu = "auto",
    budget: options.Budget = 5.0,
    batch_size: options.BatchSize = 32,
    device: options.Device = "auto",
    config: options.Config = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """List a model's suspicious filters and touch nothing; without clean images the weights alone are judged."""
    with reported(debug):
        from bshub.commands import Inputs, scan_reference
        from bshub.settings import Settings

        settings = Settings(score=score, mu=options.parse_mu(mu), budget=budget, batch_size=batch_size, device=device)
        inputs = Inputs(
            model, arch, num_classes, clean_dir, classes=classes, unlabelled=unlabelled, settings_file=config
        )
        report = scan_reference(inputs, settings, progress=Bars(quiet or as_json))
        if as_json:
            print_json(report)
            return
        show_plan(report)
        if report["suspects"]:
            rows = [[item["layer"], str(item["filter"]), f"{item['score']:.2f}"] for item in report["suspects"]]
            print_table("most suspicious", ["layer", "filter", "deviations"], rows)
