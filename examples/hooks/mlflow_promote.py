"""Promote a version of a registered MLflow model only after the gate has let its artifact pass.

    python mlflow_promote.py ARTIFACT --name demo --uri sqlite:///mlflow.db [--policy policy.toml]

The artifact is logged and registered in any case, with the verdict as tags; the alias ``champion``, which is what a
deployment loads (``models:/demo@champion``), moves only when ``bshub gate`` says 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mlflow
from mlflow import MlflowClient


def main() -> int:
    parser = argparse.ArgumentParser(description="Register an artifact; promote it if the gate lets it.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--uri", default="sqlite:///mlflow.db")
    parser.add_argument("--policy", type=Path)
    told = parser.parse_args()

    mlflow.set_tracking_uri(told.uri)
    client = MlflowClient()
    with mlflow.start_run() as run:
        mlflow.log_artifacts(str(told.artifact), "model")
    if not client.search_registered_models(filter_string=f"name = '{told.name}'"):
        client.create_registered_model(told.name)
    version = client.create_model_version(told.name, f"{run.info.artifact_uri}/model", run.info.run_id)

    # what the registry holds is gated, not the folder it came from
    with tempfile.TemporaryDirectory() as place:
        copy = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="model", dst_path=place)
        command = ["bshub", "gate", copy, "--json", *(["--policy", str(told.policy)] if told.policy else [])]
        gate = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    document = json.loads(gate.stdout) if gate.stdout else {"verdict": "error", "findings": []}
    client.set_model_version_tag(told.name, version.version, "bshub.verdict", document["verdict"])
    if gate.returncode:
        for finding in document["findings"]:
            if finding["level"] in ("refused", "inconclusive"):
                print(f"{finding['rule']}: {finding['message']}\n  → {finding.get('hint', '')}", file=sys.stderr)
        print(f"version {version.version} was registered and not promoted: {document['verdict']}", file=sys.stderr)
        return gate.returncode
    client.set_registered_model_alias(told.name, "champion", version.version)
    print(f"version {version.version} is now {told.name}@champion")
    return 0


if __name__ == "__main__":
    sys.exit(main())
