"""A small collection, and its plan."""

import pytest
from fleet_files import RATES, write_collection

import prolora


@pytest.fixture
def collection(tmp_path):
    return write_collection(tmp_path)


@pytest.fixture
def plan(collection):
    loras, source, targets = collection
    return prolora.plan_migration([loras], source, targets, rates=RATES)
