"""Write a report of a run."""

EXAMPLE = "x"


def add_arguments(parser):
    pass


def run(args):
    pass
