"""The sub-commands of `offsetjax`: the arguments of each, beside what it calls."""
