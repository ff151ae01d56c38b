"""Hosts in a network of their own on this machine, made of Linux namespaces.

A host has its own network, name and /etc/hosts. A process that holds them waits for the end of a
pipe that the tests hold open; the kernel removes the namespaces, links and firewall rules with the
last process in them, and ends all when the tests are killed: nothing outlives them.
"""

import contextlib
import os
import shutil
import subprocess

import pytest

from tests.experiments.conftest import ROOT

NEEDED = ('ip', 'unshare', 'nsenter', 'setpriv', 'mount', 'hostname')
BOOT = 'mount --bind "$1" /etc/hosts && hostname "$2" && ip link set lo up && echo up && exec cat'


class Host:
    """A host without links.

    Args:
      name: what its `hostname` prints.
      etc_hosts: a file that it has as /etc/hosts.
    """

    def __init__(self, name, etc_hosts):
        self.name = name
        self._holder = subprocess.Popen(
            ['unshare', '--net', '--uts', '--mount']
            + ['sh', '-c', BOOT, 'sh', str(etc_hosts), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if self._holder.stdout.readline() != 'up\n':
            pytest.skip(f'needs to make namespaces: {self._holder.communicate()[1].strip()}')

    @property
    def process(self):
        """A process on the host, by which the kernel knows it."""
        return self._holder.pid

    def command(self, *arguments):
        """Returns a command line that runs this command on the host, and ends with the tests."""
        enter = ['nsenter', f'--target={self.process}', '--net', '--uts', '--mount', f'--wd={ROOT}']
        return [*enter, 'setpriv', '--pdeathsig=KILL', *map(str, arguments)]

    def run(self, *arguments):
        """Runs a command on the host; returns its output."""
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True)
        assert done.returncode == 0, f'{arguments}: {done.stderr}'
        return done.stdout

    def drop(self, *rules):
        """Adds a firewall whose rules drop some of the packets that come in at eth0.

        Args:
          rules: in the language of nftables, each with its verdict.
        """
        if not shutil.which('nft'):
            pytest.skip('needs nft, of nftables')
        self.run('nft', 'add table inet drill')
        self.run('nft', 'add chain inet drill in { type filter hook input priority 0; }')
        for rule in rules:
            self.run('nft', f'add rule inet drill in iif eth0 {rule}')

    def stop(self):
        self._holder.communicate()  # It ends with its standard input.


class Network:
    """Hosts 10.77.0.1, 10.77.0.2, ... called host0, host1, ..., and the switch between them."""

    PORT = 4321  # of the coordinator, on the first host

    def __init__(self):
        self.hosts, self.switch = [], None

    def build(self, directory, count, own_addresses=None):
        """Starts the hosts.

        Args:
          directory: for files.
          own_addresses: what each host resolves its own name to; None: its address.
        """
        addresses = [self.address(index) for index in range(count)]
        self.switch = Host('switch', os.devnull)
        self.switch.run('ip', 'link', 'add', 'bridge', 'type', 'bridge')
        self.switch.run('ip', 'link', 'set', 'bridge', 'up')
        for index in range(count):
            known = addresses.copy()
            if own_addresses:
                known[index] = own_addresses[index]
            names = ''.join(f'{address} host{i}\n' for i, address in enumerate(known))
            etc_hosts = directory / f'hosts{index}'
            etc_hosts.write_text(f'127.0.0.1 localhost\n{names}')
            host = Host(f'host{index}', etc_hosts)
            self.hosts.append(host)
            self.switch.run(
                *('ip', 'link', 'add', f'port{index}', 'type', 'veth'),
                *('peer', 'name', 'eth0', 'netns', host.process),
            )
            self.switch.run('ip', 'link', 'set', f'port{index}', 'master', 'bridge', 'up')
            host.run('ip', 'address', 'add', f'{addresses[index]}/24', 'dev', 'eth0')
            host.run('ip', 'link', 'set', 'eth0', 'up')

    @staticmethod
    def address(index):
        return f'10.77.0.{index + 1}'

    def plug(self, index, state):
        """Pulls the cable between a host and the switch ('down'), or puts it in again ('up')."""
        self.switch.run('ip', 'link', 'set', f'port{index}', state)

    def close(self):
        for host in (*self.hosts, *filter(None, [self.switch])):
            host.stop()


@contextlib.contextmanager
def networks(directory):
    """Gives a function (count, own_addresses=None) -> `Network`, and removes the networks."""
    missing = [tool for tool in NEEDED if not shutil.which(tool)]
    if os.geteuid() or missing:
        pytest.skip(f'needs root, iproute2 and util-linux {missing}')
    with contextlib.ExitStack() as stack:

        def make(*arguments, **options):
            network = Network()
            stack.callback(network.close)
            network.build(directory, *arguments, **options)
            return network

        yield make
