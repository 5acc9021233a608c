"""Groups that differ in their learning rate alone, and the rate that the validation images choose among them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastlocal.train.groups import Group, alike_but_for


def rate(group: Group) -> float:
    """The learning rate that a group's runs had; 0 for a default that was not recorded."""
    return group.runs[0].summary.get("resolved", group.config)["lr"] or 0.0


def chosen(groups: Sequence[Group]) -> Group:
    """The group of the best mean validation accuracy, of those without a diverged seed if there are any.

    Never by the test images.
    """

    def reached(group: Group) -> tuple[bool, float]:
        found = group.spread("best_val_accuracy")
        return not group.diverged, -1.0 if found is None else found.mean

    return max(groups, key=reached)


@dataclass(frozen=True)
class RateSearch:
    """One setting at several rates, from low to high."""

    name: str
    groups: list[Group]

    @property
    def chosen(self) -> Group:
        """The group that validation chooses."""
        return chosen(self.groups)


def searches(groups: Sequence[Group]) -> list[RateSearch]:
    """The settings that were tried at more than one rate, in the order of the groups."""
    families: dict[str, list[Group]] = {}
    for group in groups:
        families.setdefault(alike_but_for(group, "lr"), []).append(group)
    found = []
    for members in families.values():
        if len({rate(group) for group in members}) > 1:
            first = members[0]
            # The rate's part of the name, wherever the study's file has it.
            name = re.sub(rf"(^|-)lr{re.escape(f'{rate(first):g}')}(?=-|$)", "", first.name).lstrip("-")
            found.append(RateSearch(name or "all", sorted(members, key=rate)))
    return found
