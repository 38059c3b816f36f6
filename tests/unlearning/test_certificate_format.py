"""The published form of a certificate: the schema is that of the code, and the page names every field."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest

from per_instance_accountant.unlearning import Certificate, certificate_schema, verify
from per_instance_accountant.unlearning.canonical import canonical
from tests.unlearning.test_certificate import leaves

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="session")
def validator():
    published = json.loads((DOCS / "certificate.schema.json").read_text(encoding="utf-8"))
    assert published == certificate_schema()
    jsonschema.Draft202012Validator.check_schema(published)
    return jsonschema.Draft202012Validator(published)


def test_what_is_issued_fits_the_published_schema(certified, validator, tmp_path):
    certificate = certified[2]
    certificate.save(tmp_path / "certificate.json")
    raw = (tmp_path / "certificate.json").read_bytes()
    content = json.loads(raw)
    validator.validate(content)
    assert canonical(content) == raw and Certificate.from_dict(content) == certificate


def test_schema_and_reader_refuse_the_same_forms(certified, validator):
    """Every field removed, and one added to every object."""
    content = certified[2].to_dict()
    for path in leaves(content):
        node = broken = copy.deepcopy(content)
        for key in path[:-1]:
            node = node[key]
        if isinstance(node, dict) and "software" not in path and "assumptions" not in path:
            del node[path[-1]]
            assert not validator.is_valid(broken), path
            assert not verify(broken).valid and verify(broken).checks[0].name == "format"
            node["surplus"] = 1
            assert not validator.is_valid(broken), path


def test_the_page_names_every_field():
    text = (DOCS / "certificate.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[a-z_A-Z0-9]+", " ".join(re.findall(r"`([^`]+)`", text))))
    schema = certificate_schema()
    fields = set(schema["properties"])
    for definition in schema["$defs"].values():
        fields |= set(definition.get("properties", {}))
    assert len(fields) > 40 and fields <= named, fields - named


@pytest.mark.parametrize(("version", "word"), [(1, "older"), (3, "unknown"), (0, "older")])
def test_other_versions_of_the_accounting_are_refused_with_the_reason(certified, version, word):
    content = certified[2].to_dict()
    content["predicate"]["accounting_version"] = version
    check = next(c for c in verify(content).checks if c.name == "accounting version")
    assert check.status == "failed" and word in check.detail and f"version {version}" in check.detail
