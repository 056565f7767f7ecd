"""The README's table of families, from the registry: ``python -m fastprompt.families``."""

from fastprompt.families import HOSTS, REASONS, TEXT, TOWERS, VISION

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
            f"| refused | {refused}; any other by its name |",
        )
    )


def _towers(kind: str) -> str:
    names = {
        family.name: f"`{family.name}`" + "*" * any(layout.blocks for layout in family.layouts)
        for family in TOWERS
        if family.kind == kind
    }
    return ", ".join(names.values())
