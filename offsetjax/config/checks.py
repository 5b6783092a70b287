"""What a config may hold: every field of its type and in its range; `rules.py` has what they may be together."""

from ml_collections import ConfigDict

from offsetjax.config.rules import combinations
from offsetjax.config.schema import fields
from offsetjax.config.settings import flatten
from offsetjax.config.stages import check_together, stages_in
from offsetjax.config.values import check
from offsetjax.errors import UserError


def validate(config: ConfigDict) -> None:
    """Checks that a config has every field and no other, each value's type and range, and the combinations.

    Where it has stages, the combinations are those of each.

    Raises:
        UserError: with the field, its value and what it must be.
    """
    values, declared = dict(flatten(config)), fields()
    if values.keys() != declared.keys():
        wrong = sorted(values.keys() ^ declared.keys())[0]
        what = "lacks" if wrong in declared else "has"
        raise UserError(f"config: it {what} {wrong}; it must be the ConfigDict of default_config(), with its fields")
    for path, field in declared.items():
        check(path, field, values[path])
    for stage in stages_in(values):
        with stage.named():
            for is_wrong, reason in combinations(stage.values(values)):
                if is_wrong:
                    raise UserError(f"config: {reason}")
    check_together(values)
