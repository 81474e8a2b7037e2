"""Property tests without a deadline; one Ray cluster for the whole run, started by the first test that asks for it.

`make test` runs everything but Ray in two processes, a file in one of them, then what is marked `cluster` in one process.
"""

import os
import secrets
import signal

import pytest
from hypothesis import settings

#: Which of several processes this is; None where there is one only.
PROCESS = os.environ.get("PYTEST_XDIST_WORKER")
if PROCESS:  # before torch is imported: as many threads as processes would stand in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell without job control starts what runs in the background deaf to Ctrl-C, and every child inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing here asserts a wall-clock time, and a busy machine would otherwise fail property tests at random.
# CI draws the same examples every time, so that a change is judged by itself; elsewhere each run draws new ones.
settings.register_profile("any machine", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("any machine")

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # keeps Ray on the loopback, as on those systems
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray makes one in the home directory
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # Serve gives a proxy five seconds to come up
#: What takes longest, longest first: begun last, it would keep one process busy long after the other is done.
LONGEST = (
    "tests/repository/test_rehearsal.py",
    "tests/stagevar/models/test_fused.py",
    "tests/tuner/cli/test_tune.py",
    "tests/tuner/study/test_resume.py",
)
#: GCS notices a dead node after two seconds instead of half a minute.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
#: Ray gives its helper processes 15 seconds to start, which a busy machine may miss.
ATTEMPTS = 3


@pytest.hookimpl(tryfirst=True)  # before pytest's own, which reads the markers for -m
def pytest_collection_modifyitems(items):
    for item in items:
        if "ray_cluster" in item.fixturenames:
            item.add_marker("cluster")
    if PROCESS:
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def claims(kind, gpus=1):
    """Options of a node that claims GPUs of a kind; Ray listens on the loopback only where that is the node's address."""
    node = {"num_cpus": 4, "num_gpus": gpus, "resources": {f"accelerator_type:{kind}": 1}}
    return {**node, "node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="session")
def ray_cluster():
    """Two nodes with one logical GPU each, of kind FAKE; this process is connected to the first."""
    import ray
    from ray.cluster_utils import Cluster

    for attempt in range(1, ATTEMPTS + 1):
        cluster = Cluster()
        try:
            cluster.add_node(**claims("FAKE"), include_dashboard=False, _system_config=HEALTH)
            cluster.add_node(**claims("FAKE"))
            break
        except Exception:
            cluster.shutdown()
            if attempt == ATTEMPTS:
                raise
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
