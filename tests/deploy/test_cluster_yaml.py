from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).parents[2] / "cluster.yaml"


def test_cluster_yaml_passes_rays_own_validation() -> None:
    config = yaml.safe_load(FILE.read_text())
    validate_config(prepare_config(config))
    gpu = config["available_node_types"]["gpu"]
    assert gpu["min_workers"] < gpu["max_workers"], "the cluster must autoscale"
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert any("mlflow server" in command for command in config["head_start_ray_commands"])


def test_a_mistyped_key_fails_the_validation() -> None:
    config = yaml.safe_load(FILE.read_text())
    config["max_wrokers"] = config.pop("max_workers")
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(config))
