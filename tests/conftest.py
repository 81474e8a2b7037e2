"""One Ray cluster for the whole test run, started by the first test that asks for it."""

import os

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # on a busy machine a node takes a while
#: GCS notices a dead node after a second or two instead of half a minute.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
#: Ray listens on the loopback only where that is the node's address.
NODE = {"num_cpus": 4, "node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20}


def claims(kind, gpus=1):
    """Options of a node that claims GPUs of a kind."""
    return {**NODE, "num_gpus": gpus, "resources": {f"accelerator_type:{kind}": 1}}


@pytest.fixture(scope="session")
def ray_cluster():
    """Two nodes with one logical GPU each, of kind FAKE; this process is connected to the first."""
    import ray
    from ray.cluster_utils import Cluster

    head = {**claims("FAKE"), "include_dashboard": False, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**claims("FAKE"))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
