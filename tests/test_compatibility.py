"""COMPATIBILITY.md says what is so, and that is nearly everything."""

from __future__ import annotations

import pytest
from coverage_probe import TABLE, Row, probe_an_engine, public_methods, render
from tinker import ServiceClient


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return probe_an_engine()


def test_the_table_is_not_stale(rows: list[Row]):
    assert TABLE.read_text(encoding="utf-8") == render(rows), "run python tests/coverage_probe.py"


def test_at_least_95_percent_of_the_methods_work(rows: list[Row]):
    counted = [row for row in rows if not row.outcome.startswith("not counted")]
    failing = [row for row in counted if row.outcome != "works"]
    assert len(counted) >= 90
    assert len(failing) <= 0.05 * len(counted), failing


def test_only_a_hosted_accounts_matters_are_not_counted(rows: list[Row]):
    out = {row.method.removesuffix("_async") for row in rows if row.outcome.startswith("not")}
    assert out == {"get_billing_usage", "get_audit_log", "whoami", "assign_session_project"}


def test_the_probe_discovers_methods_and_misses_none_that_is_new():
    found = set(public_methods(ServiceClient))
    assert {"create_lora_training_client", "create_lora_training_client_async"} <= found

    class Newer(ServiceClient):
        def brand_new(self) -> None: ...

    assert list(public_methods(Newer)) == ["brand_new"]
