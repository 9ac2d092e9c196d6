"""``minimoe doctor``: a line a finding; the exit code says whether the book can run here."""
from __future__ import annotations

import argparse
import dataclasses
import json

from .. import doctor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    findings = doctor.examine()
    broken = [finding for finding in findings if finding.level == "fix"]
    if args.json:
        found = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"ready": not broken, "findings": found}, indent=1))
    else:
        for finding in findings:
            print(finding.line())
        topics = ", ".join(finding.topic for finding in broken)
        print(f"\nThe book cannot run here yet; to fix: {topics}." if broken else "\nThe book can run here.")
    return 1 if broken else 0
