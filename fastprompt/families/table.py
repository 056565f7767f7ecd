"""The README's table of families, from the registry: ``python -m fastprompt.families``."""

from fastprompt.families import HOSTS, LIBRARIES, REASONS, TEXT, TOWERS, VISION
from fastprompt.families.outside import Library

BEGIN = "<!-- families: python -m fastprompt.families -->"
END = "<!-- /families -->"


def markdown() -> str:
    """What stands between ``BEGIN`` and ``END``."""
    hosts = ", ".join(f"`{host.name}`" for host in HOSTS)
    by_reason: dict[str, list[str]] = {}
    for name, why in REASONS.items():
        by_reason.setdefault(why, []).append(f"`{name}`")
    refused = "; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items())
    return "\n".join(
        (
            "| | families, by `model_type` (* each block runs as one autograd node) |",
            "|---|---|",
            f"| vision | {_towers(VISION)} |",
            f"| language | {_towers(TEXT)} |",
            f"| vision-language | {hosts}, whose towers are among the above |",
            *(f"| {library.name} | {_classes(library)} |" for library in LIBRARIES),
            f"| refused | {refused}; any other by its name |",
        )
    )


def _classes(library: Library) -> str:
    """Its models by class, with the names of the families that serve them."""
    by_name: dict[str, list[str]] = {}
    for family in library.families:
        by_name.setdefault(family.name, []).extend(family.classes)
    towers = ", ".join(f"`{name}` ({', '.join(classes)})" for name, classes in by_name.items())
    return towers + f"; {', '.join(library.whole)} of these" * bool(library.whole)


def _towers(kind: str) -> str:
    names = {
        family.name: f"`{family.name}`" + "*" * any(layout.blocks for layout in family.layouts)
        for family in TOWERS
        if family.kind == kind
    }
    return ", ".join(names.values())
