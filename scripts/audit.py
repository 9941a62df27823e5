"""Compares the installed packages with the published advisories; passes, and says so, where they are out of reach."""

import json
import subprocess
import sys


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off", "--skip-editable"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return _not_audited("no answer in two minutes")
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return _not_audited((done.stderr.strip() or "no answer").splitlines()[-1])
    # Of a package that the advisories do not know pip-audit says nothing, and ends well: that is no audit.
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        return _not_audited(f"none of {len(packages)} packages was found there")
    found = [(package, flaw) for package in audited for flaw in package["vulns"]]
    for package, flaw in found:
        mended = ", ".join(flaw["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {flaw['id']}, mended in: {mended}", file=sys.stderr)
    print(f"{len(audited)} of {len(packages)} packages audited, {len(found)} known vulnerabilities")
    return int(bool(found))


def _not_audited(reason: str) -> int:
    print(f"not audited, the advisories are out of reach: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
