"""JSON Schema of a plan file of ``psannlm compare``, for editors: from the fields that the loader checks."""

from __future__ import annotations

from collections.abc import Mapping

from psannlm.config.run import RunConfig
from psannlm.config.schema import DIALECT, Schema, any_of, or_null, section_schema
from psannlm.config.validation import SECTIONS
from psannlm.experiments.plan import (
    FORMER_KEYS,
    FORMER_VARIANT_KEYS,
    NAME_PATTERN,
    OWNED_KEYS,
    REQUIRED_KEYS,
    PlanSettings,
    VariantKeys,
)

PLAN_TITLE = "psannlm study plan"
# Lists that say something by what is in them: empty or with one item twice they are refused.
_LISTS = {"seeds": 1, "lr_seeds": 1, "learning_rates": 1, "also_compare_to": 0, "horizons": 0}
_LISTS |= {"activations_bits": 0, "activations_places": 1}


def plan_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of a plan file."""
    schema = section_schema(PlanSettings)
    properties = schema["properties"]
    for name, least in _LISTS.items():
        properties[name] = _as_set(properties[name], least)
    sections: Schema = {name: {"$ref": f"#/$defs/{name}"} for name in SECTIONS}
    overrides = {"type": "object", "properties": sections, "additionalProperties": False}
    properties["overrides"] = {"description": properties["overrides"]["description"], **overrides}
    properties["variants"] = {
        "description": properties["variants"]["description"],
        "type": "object",
        "propertyNames": {"pattern": f"^{NAME_PATTERN}$"},
        "additionalProperties": _variant(sections),
        "minProperties": 1,
    }
    properties["name"] |= or_null({"type": "string", "pattern": f"^{NAME_PATTERN}$"})
    budget = properties["budget"]
    [group] = [choice for choice in budget["anyOf"] if choice.get("type") == "object"]
    either = [{"required": [name], "properties": {name: {"type": "number"}}} for name in group["properties"]]
    properties["budget"] = {"description": budget["description"], **group, "oneOf": either}
    for name in REQUIRED_KEYS:
        properties[name].pop("default", None)
    properties |= _former(properties, FORMER_KEYS)
    # What must be given has an empty default in the code, so that every problem can be reported in one message.
    properties["base"]["minLength"] = properties["baseline"]["minLength"] = 1
    return {
        "$schema": DIALECT,
        "title": PLAN_TITLE,
        "description": "Variants of one configuration that psannlm compare trains and compares.",
        **schema,
        "required": list(REQUIRED_KEYS),
        "$defs": _changed_sections(),
    }


def _changed_sections() -> Schema:
    """Return the sections of a configuration without the keys that the plan decides for every run."""
    owned = {name: tuple(key for section, key in OWNED_KEYS if section == name) for name in SECTIONS}
    return {
        name: {
            "description": RunConfig.model_fields[name].description,
            **or_null(section_schema(cls, without=owned[name])),
        }
        for name, cls in SECTIONS.items()
    }


def _variant(sections: Schema) -> Schema:
    own = section_schema(VariantKeys)["properties"]
    own["learning_rates"] = _as_set(own["learning_rates"], 1)
    fraction = own["budget_fraction"]
    notes = {key: fraction.pop(key) for key in ("description", "default")}
    own["budget_fraction"] = {**notes, **or_null(fraction)}
    own |= _former(own, FORMER_VARIANT_KEYS)
    return or_null({"type": "object", "properties": {**sections, **own}, "additionalProperties": False})


def _former(properties: Schema, names: Mapping[str, str]) -> Schema:
    """Return the properties under the names of earlier versions, marked as deprecated."""
    return {
        former: {**properties[name], "description": f"the former name of {name}", "deprecated": True}
        for former, name in names.items()
    }


def _as_set(schema: Schema, least: int) -> Schema:
    """Return the schema with unique items and a minimum number of them in its list; other alternatives stay."""
    if "anyOf" in schema:
        return {**schema, **any_of(*(_as_set(choice, least) for choice in schema["anyOf"]))}
    if schema.get("type") != "array":
        return schema
    return {**schema, "uniqueItems": True, **({"minItems": least} if least else {})}
