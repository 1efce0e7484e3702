"""Publish a sanitized model and load it back, as anybody else would.

    hf auth login
    python examples/publish_and_load.py out/demo user/name

The second time changes nothing: the same files make no new commit. ``bshub sanitize`` with ``--no-thumbnails`` leaves
your clean images out of the report page; without it a public repository is refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import bshub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", help="folder that bshub sanitize wrote")
    parser.add_argument("repository", help="user/name on the Hub")
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args()

    published = bshub.publish(Path(args.artifact), args.repository, private=args.private)
    print("was already there" if published.unchanged else "published", published.url)

    here, there = bshub.load(args.artifact), bshub.load(args.repository)
    images = torch.randn(2, *here.preprocessing.input_size)
    with torch.no_grad():
        assert torch.equal(here.module(images), there.module(images)), "what came back is not what was sent"
    print(f"loaded {args.repository}: the same answers, bit for bit")


if __name__ == "__main__":
    main()
