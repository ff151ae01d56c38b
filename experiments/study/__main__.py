"""Runs a study. The code is in `command`, because worker processes cannot import a __main__."""

from experiments.study import command

__doc__ = command.__doc__  # for --help

if __name__ == '__main__':
    command.run()
