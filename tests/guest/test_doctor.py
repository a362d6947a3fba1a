"""What `doctor` says where there are RDMA devices."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.needs import needs_verbs

pytestmark = needs_verbs()


def test_doctor_names_the_devices_and_writes_by_verbs() -> None:
    done = subprocess.run([sys.executable, "-m", "aiotransfer", "doctor", "--json"], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)["facts"]
    assert facts["providers"]["data"]["verbs"] == "ok"
    assert facts["self test"]["data"]["verbs"] == "ok"
    port = facts["rdma"]["data"]["devices"]["rxea0"]["ports"]["1"]
    assert (port["state"], port["best_gid"]["type"]) == ("ACTIVE", "RoCE v2")
    assert "RoCE v2" in facts["rdma"]["text"]
