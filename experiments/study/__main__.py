"""Runs a study; the command is in `command`, since worker processes cannot import a __main__."""

from experiments.study import command

__doc__ = command.__doc__  # What --help shows.

if __name__ == '__main__':
    command.run()
