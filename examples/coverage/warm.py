"""Imported once by the process that all probes are forked from: the libraries, and the exporter warmed up."""

from __future__ import annotations

import io
import os
import warnings
from contextlib import redirect_stderr, redirect_stdout

os.environ["OMP_NUM_THREADS"] = "1"

import timm  # noqa: F401
import torch
import torchvision  # noqa: F401

import bshub.release.onnx
import bshub.surgery.remove  # noqa: F401

torch.set_num_threads(1)
with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    torch.onnx.export(net, (torch.zeros(1, 3, 8, 8),), dynamo=True, verbose=False)
